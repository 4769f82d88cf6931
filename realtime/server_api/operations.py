"""What other programs and the application itself may do with channels and clients.

The HTTP API (`realtime.server_api.http_api`) and the methods of the `App` are two doors to the same coroutines. Names,
defaults and error codes are those of Centrifugo's server API (client protocol, section 13). Permissions are not asked
for here: who has the key may.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import msgspec
from msgspec import Meta

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
from realtime.pubsub.engine import Engine
from realtime.types import ClientInfo, HistoryOptions, HistoryPage, Position, SubscribeOptions

PAGE_BYTES = 4 * 1024 * 1024
"""Bytes of publications in one answer of `history`; who wants more asks again, from the last one on."""

BROADCAST_BYTES = 4 * 1024 * 1024
"""Bytes of one broadcast's data that are on their way to the engine at a time, if more than one channel's."""

BROADCAST_CHANNELS = 100
"""Channels of one broadcast that are published to at a time."""

MAX_NAME = 4096
"""Characters of a channel's name, an idempotency key or a version's epoch: what is kept for each has to have a size."""

Survey = Callable[[str], Awaitable[dict[str, int]]]


async def sequentially(coroutines: Sequence[Coroutine[Any, Any, Any]]) -> list[Any]:
    """Run one after the other, and return the results in the same order."""
    return [await coroutine for coroutine in coroutines]


class NodeFacts(NamedTuple):
    """What a node is known by. uid: the same in all its workers. uptime: seconds since it started."""

    uid: str
    name: str
    version: str
    uptime: float


# What the application's own code gives is looked at here: else the broker would end the stream over a wrong type.
_Marks = tuple[dict[str, str] | None, str, bool, Annotated[int, Meta(ge=0)], str]


class ServerAPI:
    """See the module. All coroutines may raise ClientError, and EngineUnavailable when nothing was done."""

    def __init__(
        self,
        engine: Engine,
        rules: ChannelRules,
        facts: Callable[[], NodeFacts],
        survey: Survey,
        together: Gather = sequentially,
    ) -> None:
        """survey: the numbers of subscribers over all workers, by channel, of those that a valid pattern fits.

        together: runs coroutines side by side, beginning with all of them in order, and gathers their results.
        """
        self._engine = engine
        self._rules = rules
        self._facts = facts
        self._survey = survey
        self._together = together

    def _options(self, channel: str) -> ResolvedChannel:
        """Raises ClientError 107 for no name or one too long, 102 for an unknown namespace."""
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
        """Publish JSON text; the publication carries no `info`, as its publisher is no client.

        binary: the data may be anything. What is JSON text all the same is published as such; the rest only clients
        that speak Protobuf can be sent. delta: subscribers that agreed on deltas may be sent one. version,
        version_epoch: see `Engine.publish`. Raises ClientError 107 also for data that is not what the channel takes.
        """
        options = self._options(channel)
        msgspec.convert((tags, idempotency_key, delta, version, version_epoch), _Marks)
        text = not binary or json_text.is_json(data)
        options.check_data(data, text)
        if version >= 2**64 or len(idempotency_key) > MAX_NAME or len(version_epoch) > MAX_NAME:
            raise ClientError(*errors.BAD_REQUEST)
        return await self._engine.publish(
            channel,
            json_text.one_line(data) if text else data,
            retention=HistoryOptions() if skip_history else options.retention,
            tags=tags or None,
            idempotency_key=idempotency_key,
            version=version,
            version_epoch=version_epoch,
            delta=delta or options.delta_publish,
            binary=not text,
        )

    async def broadcast(self, channels: list[str], data: bytes, **marks: Any) -> list[Position | ClientError]:
        """Publish the same to each channel; what came of each, in the same order. marks: as for `publish`."""
        if not channels:
            raise ClientError(*errors.BAD_REQUEST)

        async def publish(channel: str) -> Position | ClientError:
            try:
                return await self.publish(channel, data, **marks)
            except ClientError as error:
                return error
            except EngineUnavailable:
                return ClientError(*errors.INTERNAL_ERROR)

        size = max(1, min(BROADCAST_CHANNELS, BROADCAST_BYTES // max(1, len(data))))
        outcomes: list[Position | ClientError] = []
        for begin in range(0, len(channels), size):
            outcomes += await self._together([publish(channel) for channel in channels[begin : begin + size]])
        return outcomes

    async def history(
        self, channel: str, *, limit: int = 0, since: Position | None = None, reverse: bool = False
    ) -> HistoryPage:
        """Publications after `since`, up to PAGE_BYTES. limit: -1 for all that is kept.

        Raises ClientError 107, 108, and 112 when `since` is of another epoch.
        """
        options = self._options(channel)
        if not options.retention.kept:
            raise ClientError(*errors.NOT_AVAILABLE)
        if limit < -1 or (reverse and since is not None and not since.offset):
            raise ClientError(*errors.BAD_REQUEST)
        page = await self._engine.history(
            channel, retention=options.retention, since=since, limit=limit, reverse=reverse, max_bytes=PAGE_BYTES
        )
        if since is not None and since.epoch and since.epoch != page.position.epoch:
            raise ClientError(*errors.UNRECOVERABLE_POSITION)
        return page

    async def history_remove(self, channel: str) -> None:
        """Drop what is kept; the numbering goes on."""
        if not self._options(channel).retention.kept:
            raise ClientError(*errors.NOT_AVAILABLE)
        await self._engine.remove_history(channel)

    # -- who is there ------------------------------------------------------------------------------------------------

    async def presence(self, channel: str) -> dict[str, ClientInfo]:
        """Who is present, by client id."""
        self._check_presence(channel)
        return await self._engine.presence(channel)

    async def presence_stats(self, channel: str) -> tuple[int, int]:
        """The numbers of clients and of distinct users present."""
        self._check_presence(channel)
        return await self._engine.presence_stats(channel)

    def _check_presence(self, channel: str) -> None:
        if not self._options(channel).presence:
            raise ClientError(*errors.NOT_AVAILABLE)

    async def channels(self, pattern: str = "") -> dict[str, int]:
        """The channels that have subscribers, with their numbers. pattern: see `realtime.protocol.channel_patterns`.

        Raises ClientError 107 for a pattern that can't be, and 106 when there are more than one answer holds.
        """
        try:
            channel_patterns.matcher(pattern)
        except ValueError:
            raise ClientError(*errors.BAD_REQUEST) from None
        return await self._survey(pattern)

    async def info(self) -> list[dict[str, Any]]:
        """One record for each node: what it is known by, and the counts over its workers."""
        facts, census = self._facts(), await self._engine.census()
        return [
            {
                "uid": facts.uid,
                "name": facts.name,
                "version": facts.version,
                "num_clients": census.clients,
                "num_users": census.users,
                "num_channels": census.channels,
                "num_subs": census.subscriptions,
                "uptime": int(facts.uptime),
            }
        ]

    # -- orders to all workers: the connections of a user, "" for the anonymous ones ---------------------------------

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
        """Subscribe the user's connections to a channel, whatever its options say of who may.

        client, session: of the only connection that is meant. info, data: JSON text, b"" for none. The rest: see
        `SubscribeOrder`. Raises ClientError 107 also for an option that can't be overridden.
        """
        self._options(channel)
        if not set(override or ()).issubset(OVERRIDABLE):
            raise ClientError(*errors.BAD_REQUEST)
        terms = SubscribeOptions(
            json_text.one_line(info), json_text.one_line(data), float(expire_at), dict(override or {})
        )
        await self._order(SubscribeOrder(user, channel, terms, client, session, recover_since))

    async def unsubscribe(self, user: str, channel: str, *, client: str = "", session: str = "") -> None:
        """End the user's subscriptions to a channel."""
        self._options(channel)
        await self._order(UnsubscribeOrder(user, channel, client, session))

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
        """Close the user's connections. Raises ClientError 107 for a code or reason that can't be."""
        try:
            Disconnect(code, reason)
        except ValueError:
            raise ClientError(*errors.BAD_REQUEST) from None
        await self._order(DisconnectOrder(user, client, tuple(whitelist), code, reason, session))

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
        """Let the user's connections expire at another time, 0.0 for never; see `RefreshOrder`. info: JSON text."""
        await self._order(RefreshOrder(user, float(expire_at), expired, json_text.one_line(info), client, session))

    async def _order(self, order: Order) -> None:
        await self._engine.instruct(encode_order(order))
