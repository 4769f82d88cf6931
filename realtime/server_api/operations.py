"""The server API: operations on channels and clients, for other programs and for the application itself.

The HTTP API (`realtime.server_api.http_api`) and the methods of the `App` call the same coroutines. Names, defaults and
error codes are those of Centrifugo's server API (client protocol, section 13). This module checks no permissions: the
API key and the application's code have them all.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from typing import Annotated, Any, Unpack

import msgspec
from msgspec import Meta, Struct

from realtime import errors, json_text
from realtime.auth.tokens import OVERRIDABLE
from realtime.errors import ClientError, Disconnect, EngineUnavailable
from realtime.protocol import channel_patterns
from realtime.protocol.channel_rules import ChannelRules, ResolvedChannel
from realtime.protocol.context import Gather
from realtime.protocol.orders import (
    DisconnectOrder,
    Order,
    RefreshOrder,
    SubscribeOrder,
    UnsubscribeOrder,
    encode_order,
)
from realtime.pubsub.engine import (
    PRESENCE_PAGE,
    AnswerCallback,
    Engine,
    GetHistory,
    GetNodes,
    GetPresence,
    GetPresenceStats,
    Publish,
    RemoveHistory,
    SendOrder,
    new_listing,
)
from realtime.pubsub.history import approximate_size
from realtime.pubsub.time_slices import TimeSlicer
from realtime.types import (
    ChannelCounts,
    ClientInfo,
    HistoryOptions,
    HistoryPage,
    Position,
    Publication,
    PublishOptions,
    SubscribeOptions,
)

PAGE_BYTES = 4 * 1024 * 1024
"""The most bytes of publications in one page of `history`; a caller continues after the last publication."""

HISTORY_PART = 2000
"""Publications that one request reads of the page: a long stream of short ones takes many short steps."""

BROADCAST_BYTES = 4 * 1024 * 1024
"""The most bytes of one broadcast's data in flight to the engine, if it has several channels."""

BROADCAST_CHANNELS = 100
"""Concurrent publications of one broadcast."""

MAX_NAME = 4096
"""The most characters of a channel name, an idempotency key or a version epoch. The engine stores each of them."""

Survey = Callable[[str], Awaitable[ChannelCounts]]


async def sequentially(coroutines: Sequence[Coroutine[Any, Any, Any]]) -> list[Any]:
    """Run coroutines one after the other, and return their results in that order."""
    return [await coroutine for coroutine in coroutines]


class _PublishOptions(Struct, array_like=True):
    """The types of options that the application's own code passes unchecked.

    A wrong type would make the broker end the worker's stream.
    """

    tags: dict[str, str] | None
    idempotency_key: str
    delta: bool
    version: Annotated[int, Meta(ge=0)]
    version_epoch: str


class ServerAPI:
    """The operations of one server. All may raise ClientError, and EngineUnavailable after an unknown outcome."""

    def __init__(
        self,
        engine: Engine,
        rules: ChannelRules,
        survey: Survey,
        gather: Gather = sequentially,
        wall_clock: Callable[[], float] = time.time,
        slices: TimeSlicer | None = None,
    ) -> None:
        """survey: counts the subscribers of each channel that matches a valid pattern, over all workers of all nodes.

        gather: see `realtime.protocol.context.Gather`. slices: for the check of long data; None for no limit.
        """
        self._slices = slices or TimeSlicer.unlimited()
        self._engine = engine
        self._rules = rules
        self._survey = survey
        self._gather = gather
        self._wall_clock = wall_clock

    def _options(self, channel: str) -> ResolvedChannel:
        """Raises ClientError 107 for an empty or overlong name, and 102 for an unknown namespace."""
        if not channel or len(channel) > MAX_NAME:
            raise ClientError(*errors.BAD_REQUEST)
        return self._rules.options(channel)

    # -- publications ------------------------------------------------------------------------------------------------

    async def publish(
        self,
        channel: str,
        data: bytes,
        *,
        binary: bool = False,
        tags: dict[str, str] | None = None,
        skip_history: bool = False,
        idempotency_key: str = "",
        delta: bool = False,
        version: int = 0,
        version_epoch: str = "",
    ) -> Position:
        """Publish JSON text, without `info`, since the publisher is not a client.

        binary: the data may be any bytes. JSON text is published as such even so; other data reaches only Protobuf
        clients. The other options: see `PublishOptions`. Raises ClientError 107 also for data that the channel's
        `publication_data_format` does not allow.
        """
        options = _checked(tags, skip_history, idempotency_key, delta, version, version_epoch)
        text = not binary or await self._is_json(data)
        return await self._engine.ask(self._publication(channel, data, text, *options))

    def publish_then(
        self,
        done: AnswerCallback,
        channel: str,
        data: bytes,
        binary: bool,
        tags: dict[str, str] | None,
        skip_history: bool,
        idempotency_key: str,
        delta: bool,
        version: int,
        version_epoch: str,
    ) -> None:
        """Publish like `publish`, without a coroutine, with arguments of the right types.

        done: see `Engine.ask_then`. Raises the ClientErrors that are not the engine's.
        """
        text = not binary or json_text.is_json(data)
        request = self._publication(
            channel, data, text, tags, skip_history, idempotency_key, delta, version, version_epoch
        )
        self._engine.ask_then(request, done)

    def _publication(
        self,
        channel: str,
        data: bytes,
        text: bool,
        tags: dict[str, str] | None,
        skip_history: bool,
        idempotency_key: str,
        delta: bool,
        version: int,
        version_epoch: str,
    ) -> Publish:
        """Check the arguments of `publish`, and build the request to the engine. text: the data is JSON text."""
        options = self._options(channel)
        options.check_data(data, text)
        if version >= 2**64 or len(idempotency_key) > MAX_NAME or len(version_epoch) > MAX_NAME:
            raise ClientError(*errors.BAD_REQUEST)
        return Publish(
            channel,
            (json_text.one_line(data) or data) if text else data,
            HistoryOptions() if skip_history else options.history_options,
            tags=tags or None,
            idempotency_key=idempotency_key,
            version=version,
            version_epoch=version_epoch,
            delta=delta or options.delta_publish,
            binary=not text,
        )

    async def _is_json(self, data: bytes) -> bool:
        """Check data as `json_text.is_json` does, in slices."""
        try:
            await self._slices.exhaust(json_text.json_steps(data))
        except ClientError:
            return False
        return True

    async def broadcast(
        self, channels: list[str], data: bytes, **options: Unpack[PublishOptions]
    ) -> list[Position | ClientError]:
        """Publish the same data to each channel; return the outcomes in their order. options: see `publish`."""
        if not channels:
            raise ClientError(*errors.BAD_REQUEST)
        details: dict[str, Any] = dict(options)
        text = not details.pop("binary", False) or await self._is_json(data)
        checked = _checked(**details)

        async def publish(channel: str) -> Position | ClientError:
            try:
                position: Position = await self._engine.ask(self._publication(channel, data, text, *checked))
                return position
            except ClientError as error:
                return error
            except EngineUnavailable:
                return ClientError(*errors.INTERNAL_ERROR)

        size = max(1, min(BROADCAST_CHANNELS, BROADCAST_BYTES // max(1, len(data))))
        outcomes: list[Position | ClientError] = []
        for begin in range(0, len(channels), size):
            if begin:
                await self._slices.yield_to_loop()  # a channel that is refused never waits
            outcomes += await self._gather([publish(channel) for channel in channels[begin : begin + size]])
        return outcomes

    async def history(
        self, channel: str, *, limit: int = 0, since: Position | None = None, reverse: bool = False
    ) -> HistoryPage:
        """Return publications after `since`, up to PAGE_BYTES. limit: -1 for all, 0 for the position alone.

        Raises ClientError 107, 108, and 112 if `since` has another epoch.
        """
        options = self._options(channel)
        if not options.history_options.enabled:
            raise ClientError(*errors.NOT_AVAILABLE)
        _check_position(since)
        if not -1 <= limit < 2**63 or (reverse and since is not None and not since.offset):
            raise ClientError(*errors.BAD_REQUEST)
        query = GetHistory(channel, options.history_options, since, limit, reverse, PAGE_BYTES)
        page = await self._read_history(query)
        if since is not None and since.epoch and since.epoch != page.position.epoch:
            raise ClientError(*errors.UNRECOVERABLE_POSITION)
        return page

    async def _read_history(self, query: GetHistory) -> HistoryPage:
        """Read a page in several requests, which are short steps for the broker and this worker.

        The page ends early if the stream has lost the next publication meanwhile.
        """
        publications: list[Publication] = []
        top, since, left, room = None, query.since, query.limit, query.max_bytes
        while True:
            limit = HISTORY_PART if left < 0 else min(left, HISTORY_PART)
            part = await self._engine.ask(msgspec.structs.replace(query, since=since, limit=limit, max_bytes=room))
            found = part.publications
            top = top or part.position
            if publications:
                next_offset = publications[-1].offset + (-1 if query.reverse else 1)
                if not found or found[0].offset != next_offset or part.position.epoch != top.epoch:
                    break
                found = [publication for publication in found if publication.offset <= top.offset]
            publications += found
            left -= len(found)
            room -= sum(map(approximate_size, found))
            if len(part.publications) < limit or not left or room <= 0:
                break
            since = Position(publications[-1].offset, top.epoch)
        return HistoryPage(publications, top)

    async def history_remove(self, channel: str) -> None:
        """Remove the stored publications; the numbering continues."""
        if not self._options(channel).history_options.enabled:
            raise ClientError(*errors.NOT_AVAILABLE)
        await self._engine.ask(RemoveHistory(channel))

    # -- presence ---------------------------------------------------------------------------------------------------

    async def presence(self, channel: str) -> dict[str, ClientInfo]:
        """Return the present clients by client id."""
        self._check_presence(channel)
        present: dict[str, ClientInfo] = {}
        listing = new_listing()
        while True:
            page = await self._engine.ask(GetPresence(channel, listing))
            present.update(page)
            if len(page) < PRESENCE_PAGE:
                return present

    async def presence_stats(self, channel: str) -> tuple[int, int]:
        """Return the number of present clients and the number of distinct users among them."""
        self._check_presence(channel)
        return await self._engine.ask(GetPresenceStats(channel))

    def _check_presence(self, channel: str) -> None:
        if not self._options(channel).presence:
            raise ClientError(*errors.NOT_AVAILABLE)

    async def channels(self, pattern: str = "") -> ChannelCounts:
        """Return the number of subscribers of each channel that has any. pattern: see `protocol.channel_patterns`.

        Raises ClientError 107 for an invalid pattern, and 106 if there are more channels than one answer holds.
        """
        try:
            channel_patterns.compile_pattern(pattern)
        except ValueError:
            raise ClientError(*errors.BAD_REQUEST) from None
        return await self._survey(pattern)

    async def info(self) -> list[dict[str, Any]]:
        """Return one dict for each node: its identity, and the counts over its workers."""
        return [
            {
                "uid": node.uid,
                "name": node.name,
                "version": node.version,
                "num_clients": node.stats.clients,
                "num_users": node.stats.users,
                "num_channels": node.stats.channels,
                "num_subs": node.stats.subscriptions,
                "uptime": int(node.uptime),
            }
            for node in await self._engine.ask(GetNodes())
        ]

    # -- orders to all workers, about the connections of a user; "" is the anonymous user
    # ---------------------------------

    async def subscribe(
        self,
        user: str,
        channel: str,
        *,
        client: str = "",
        session: str = "",
        info: bytes = b"",
        data: bytes = b"",
        recover_since: Position | None = None,
        override: Mapping[str, bool] | None = None,
        expire_at: float = 0.0,
    ) -> None:
        """Subscribe the user's connections to a channel, regardless of its permissions.

        client, session: restrict the order to one connection. info, data: see `SubscribeOptions`. The other arguments:
        see `SubscribeOrder`. Raises ClientError 107 also for an option that can't be overridden, and 110 for an expiry
        in the past.
        """
        self._options(channel)
        if expire_at and expire_at <= self._wall_clock():
            raise ClientError(*errors.EXPIRED)
        if not set(override or ()).issubset(OVERRIDABLE):
            raise ClientError(*errors.BAD_REQUEST)
        _check_position(recover_since)
        terms = SubscribeOptions(_content(info), _content(data), float(expire_at), dict(override or {}))
        await self._send_order(SubscribeOrder(user, channel, terms, client, session, recover_since))

    async def unsubscribe(self, user: str, channel: str, *, client: str = "", session: str = "") -> None:
        """End the user's subscriptions to a channel."""
        self._options(channel)
        await self._send_order(UnsubscribeOrder(user, channel, client, session))

    async def disconnect(
        self,
        user: str,
        *,
        client: str = "",
        session: str = "",
        whitelist: Iterable[str] = (),
        code: int = errors.FORCE_DISCONNECT[0],
        reason: str = errors.FORCE_DISCONNECT[1],
    ) -> None:
        """Close the user's connections. Raises ClientError 107 for an invalid code or reason."""
        try:
            Disconnect(code, reason)
        except ValueError:
            raise ClientError(*errors.BAD_REQUEST) from None
        await self._send_order(DisconnectOrder(user, client, tuple(whitelist), code, reason, session))

    async def refresh(
        self,
        user: str,
        *,
        client: str = "",
        session: str = "",
        expired: bool = False,
        expire_at: float = 0.0,
        info: bytes = b"",
    ) -> None:
        """Change the time at which the user's connections expire, 0.0 for never; see `RefreshOrder`. info: JSON
        text."""
        await self._send_order(RefreshOrder(user, float(expire_at), expired, _content(info), client, session))

    async def _send_order(self, order: Order) -> None:
        await self._engine.ask(SendOrder(encode_order(order)))


def _checked(
    tags: dict[str, str] | None = None,
    skip_history: bool = False,
    idempotency_key: str = "",
    delta: bool = False,
    version: int = 0,
    version_epoch: str = "",
) -> tuple[dict[str, str] | None, bool, str, bool, int, str]:
    """Return the options of a publication. Raises msgspec.ValidationError for a wrong type."""
    msgspec.convert((tags, idempotency_key, delta, version, version_epoch), _PublishOptions)
    return tags, skip_history, idempotency_key, delta, version, version_epoch


def _content(content: bytes) -> bytes:
    """Return JSON text on one line, and bytes behind BINARY as they are."""
    return content if content.startswith(json_text.BINARY) else json_text.one_line(content)


def _check_position(position: Position | None) -> None:
    """Raises ClientError 107 for an offset that no channel has, nor a message to the broker can carry."""
    if position is not None and not 0 <= position.offset < 2**63:
        raise ClientError(*errors.BAD_REQUEST)
