"""The server API: what other programs, and the application itself, may do with channels and clients.

Two doors lead to the same coroutines. `App.publish` and the rest call them with Python values; the HTTP API calls
`ServerAPI.call` with the method's name and a JSON body, and gets the result as something to encode. Names, defaults
and error codes are those of Centrifugo's server HTTP API. Permissions are not asked for here: who has the key may.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

from realtime import errors
from realtime.errors import ClientError, Disconnect, EngineUnavailable, RealtimeError
from realtime.protocol import messages
from realtime.protocol.messages import StreamPosition, one_line, payload
from realtime.protocol.registry import DisconnectOrder, UnsubscribeOrder, encode_order
from realtime.protocol.rules import ResolvedChannel, Rules
from realtime.pubsub.engine import Engine
from realtime.records import Census, ClientInfo, HistoryPage, Position, Retention

NOT_FOUND = (104, "not found", False)


class BadBody(RealtimeError):
    """The body of a call is not the JSON that its method wants: HTTP status 400."""


class UnknownMethod(RealtimeError):
    """There is no such method: HTTP status 404."""


# -- requests, as they come over HTTP ---------------------------------------------------------------------------------


class _Publish(Struct, frozen=True):
    channel: str = ""
    data: Raw | UnsetType = UNSET
    b64data: str = ""
    skip_history: bool = False
    tags: dict[str, str] | None = None
    idempotency_key: str = ""
    version: int = 0


class _Broadcast(_Publish, frozen=True):
    channels: list[str] = []


class _Unsubscribe(Struct, frozen=True):
    user: str = ""
    channel: str = ""
    client: str = ""


class _Reason(Struct, frozen=True):
    code: int = 0
    reason: str = ""


class _Disconnect(Struct, frozen=True):
    user: str = ""
    client: str = ""
    whitelist: tuple[str, ...] | None = None
    disconnect: _Reason | None = None


class _Channel(Struct, frozen=True):
    channel: str = ""


class _History(Struct, frozen=True):
    channel: str = ""
    limit: int = 0
    since: StreamPosition | None = None
    reverse: bool = False


class _Nothing(Struct, frozen=True):
    pass


class _Batch(Struct, frozen=True):
    commands: list[dict[str, Raw] | None] = []
    parallel: bool = False


# -- results ----------------------------------------------------------------------------------------------------------


class PublishResult(Struct, frozen=True, omit_defaults=True):
    offset: int = 0
    epoch: str = ""


class ErrorBody(Struct, frozen=True):
    """What a caller learns of an error; `temporary` is for clients alone."""

    code: int
    message: str

    @classmethod
    def of(cls, error: ClientError) -> ErrorBody:
        return cls(error.code, error.message)


class Response(Struct, frozen=True, omit_defaults=True):
    """A result or an error, wrapped as the body of an answer."""

    result: Any = None
    error: ErrorBody | None = None


class BroadcastResult(Struct, frozen=True):
    responses: list[Response]


class NodeResult(Struct, frozen=True):
    uid: str
    name: str
    version: str
    num_clients: int
    num_users: int
    num_channels: int
    num_subs: int
    uptime: int


class InfoResult(Struct, frozen=True):
    nodes: list[NodeResult]


class BatchResult(Struct, frozen=True):
    replies: list[dict[str, Any]]


Together = Callable[[Sequence[Coroutine[Any, Any, Any]]], Awaitable[list[Any]]]


async def in_turn(coroutines: Sequence[Coroutine[Any, Any, Any]]) -> list[Any]:
    """Run one after the other, and return the results in the same order."""
    return [await coroutine for coroutine in coroutines]


class NodeFacts(NamedTuple):
    """What a node is known by. uid: the same in all its workers. uptime: seconds since it started."""

    uid: str
    name: str
    version: str
    uptime: float


_Marks = tuple[dict[str, str] | None, str]

# -- the API ----------------------------------------------------------------------------------------------------------


class ServerAPI:
    """See the module. All coroutines may raise ClientError, and EngineUnavailable when nothing was done."""

    def __init__(
        self, engine: Engine, rules: Rules, facts: Callable[[], NodeFacts], together: Together = in_turn
    ) -> None:
        """together: runs coroutines side by side, beginning with all of them in order, and gathers their results."""
        self._engine = engine
        self._rules = rules
        self._facts = facts
        self._together = together

    def _options(self, channel: str) -> ResolvedChannel:
        """Raises ClientError 107 for no name, 102 for an unknown namespace."""
        if not channel:
            raise ClientError(*errors.BAD_REQUEST)
        return self._rules.options(channel)

    async def publish(
        self,
        channel: str,
        data: bytes,
        *,
        tags: dict[str, str] | None = None,
        skip_history: bool = False,
        idempotency_key: str = "",
    ) -> Position:
        """Publish JSON text; the publication carries no `info`, as its publisher is no client."""
        options = self._options(channel)
        if not data:
            raise ClientError(*errors.BAD_REQUEST)
        # Nobody has looked at what the application's own code gives; the broker would end the stream over it.
        msgspec.convert((tags, idempotency_key), _Marks)
        retention = Retention() if skip_history else options.retention
        return await self._engine.publish(
            channel, one_line(data), retention=retention, tags=tags or None, idempotency_key=idempotency_key
        )

    async def broadcast(
        self,
        channels: list[str],
        data: bytes,
        *,
        tags: dict[str, str] | None = None,
        skip_history: bool = False,
        idempotency_key: str = "",
    ) -> list[Position | ClientError]:
        """Publish the same to each channel; what came of each, in the same order."""
        if not channels:
            raise ClientError(*errors.BAD_REQUEST)

        async def publish(channel: str) -> Position | ClientError:
            try:
                return await self.publish(
                    channel, data, tags=tags, skip_history=skip_history, idempotency_key=idempotency_key
                )
            except ClientError as error:
                return error
            except EngineUnavailable:
                return ClientError(*errors.INTERNAL_ERROR)

        return await self._together([publish(channel) for channel in channels])

    async def history(
        self, channel: str, *, limit: int = 0, since: Position | None = None, reverse: bool = False
    ) -> HistoryPage:
        """Publications after `since`. limit: -1 for all that is kept. Raises ClientError 107, 108, 112."""
        options = self._options(channel)
        if not options.retention.kept:
            raise ClientError(*errors.NOT_AVAILABLE)
        if limit < -1 or (reverse and since is not None and not since.offset):
            raise ClientError(*errors.BAD_REQUEST)
        page = await self._engine.history(
            channel, retention=options.retention, since=since, limit=limit, reverse=reverse
        )
        if since is not None and since.epoch and since.epoch != page.position.epoch:
            raise ClientError(*errors.UNRECOVERABLE_POSITION)
        return page

    async def history_remove(self, channel: str) -> None:
        """Drop what is kept; the numbering goes on."""
        if not self._options(channel).retention.kept:
            raise ClientError(*errors.NOT_AVAILABLE)
        await self._engine.remove_history(channel)

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

    async def info(self) -> list[dict[str, Any]]:
        """One record for each node."""
        return [msgspec.to_builtins(await self._node())]

    async def _node(self) -> NodeResult:
        facts, census = self._facts(), await self._engine.census()
        return _node_result(facts, census)

    async def disconnect(
        self,
        user: str,
        *,
        client: str = "",
        whitelist: tuple[str, ...] = (),
        code: int = errors.FORCE_DISCONNECT[0],
        reason: str = errors.FORCE_DISCONNECT[1],
    ) -> None:
        """Close the user's connections on every worker. Raises ClientError 107 for a code or reason that can't be."""
        try:
            Disconnect(code, reason)
        except ValueError:
            raise ClientError(*errors.BAD_REQUEST) from None
        await self._engine.instruct(encode_order(DisconnectOrder(user, client, whitelist, code, reason)))

    async def unsubscribe(self, user: str, channel: str, *, client: str = "") -> None:
        """End the user's subscriptions to a channel on every worker."""
        self._options(channel)
        await self._engine.instruct(encode_order(UnsubscribeOrder(user, channel, client)))

    # -- the door for HTTP -------------------------------------------------------------------------------------------

    async def call(self, method: str, body: bytes) -> Struct:
        """The result of one call. Raises UnknownMethod, BadBody, and ClientError for all that the method refuses."""
        try:
            kind, answer = _METHODS[method]
        except KeyError:
            raise UnknownMethod(method) from None
        try:
            body.decode()  # the decoder does not look at text that it only passes on
            request = msgspec.json.decode(body, type=kind)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            raise BadBody(method) from None
        try:
            return await answer(self, request)
        except EngineUnavailable:
            raise ClientError(*errors.INTERNAL_ERROR) from None

    async def _call_publish(self, request: _Publish) -> PublishResult:
        position = await self.publish(
            request.channel,
            _data(request),
            tags=request.tags,
            skip_history=request.skip_history,
            idempotency_key=request.idempotency_key,
        )
        return PublishResult(position.offset, position.epoch)

    async def _call_broadcast(self, request: _Broadcast) -> BroadcastResult:
        outcomes = await self.broadcast(
            request.channels,
            _data(request),
            tags=request.tags,
            skip_history=request.skip_history,
            idempotency_key=request.idempotency_key,
        )
        return BroadcastResult([_response(outcome) for outcome in outcomes])

    async def _call_unsubscribe(self, request: _Unsubscribe) -> messages.Empty:
        await self.unsubscribe(request.user, request.channel, client=request.client)
        return messages.EMPTY

    async def _call_disconnect(self, request: _Disconnect) -> messages.Empty:
        code, reason = errors.FORCE_DISCONNECT
        if request.disconnect is not None:
            code, reason = request.disconnect.code, request.disconnect.reason
        await self.disconnect(
            request.user, client=request.client, whitelist=request.whitelist or (), code=code, reason=reason
        )
        return messages.EMPTY

    async def _call_presence(self, request: _Channel) -> messages.PresenceResult:
        present = await self.presence(request.channel)
        return messages.PresenceResult({client: messages.info(info) for client, info in present.items()})

    async def _call_presence_stats(self, request: _Channel) -> messages.PresenceStatsResult:
        return messages.PresenceStatsResult(*await self.presence_stats(request.channel))

    async def _call_history(self, request: _History) -> messages.HistoryResult:
        since = Position(request.since.offset, request.since.epoch) if request.since else None
        page = await self.history(request.channel, limit=request.limit, since=since, reverse=request.reverse)
        publications = [messages.pub(one, one.data) for one in page.publications]
        return messages.HistoryResult(publications, page.position.epoch, page.position.offset)

    async def _call_history_remove(self, request: _Channel) -> messages.Empty:
        await self.history_remove(request.channel)
        return messages.EMPTY

    async def _call_info(self, request: _Nothing) -> InfoResult:
        return InfoResult([await self._node()])

    async def _call_batch(self, request: _Batch) -> BatchResult:
        run = self._together if request.parallel else in_turn
        return BatchResult(await run([self._reply(command) for command in request.commands]))

    async def _reply(self, command: dict[str, Raw] | None) -> dict[str, Any]:
        try:
            if command is None:
                raise ClientError(*errors.BAD_REQUEST)
            method = next((name for name in command if name in _METHODS and name != "batch"), "")
            if not method:
                raise ClientError(*NOT_FOUND)
            return {method: await self.call(method, bytes(command[method]))}
        except BadBody:
            return {"error": ErrorBody.of(ClientError(*errors.BAD_REQUEST))}
        except ClientError as error:
            return {"error": ErrorBody.of(error)}


_METHODS: Mapping[str, tuple[type[Struct], Callable[[ServerAPI, Any], Awaitable[Struct]]]] = {
    "publish": (_Publish, ServerAPI._call_publish),
    "broadcast": (_Broadcast, ServerAPI._call_broadcast),
    "unsubscribe": (_Unsubscribe, ServerAPI._call_unsubscribe),
    "disconnect": (_Disconnect, ServerAPI._call_disconnect),
    "presence": (_Channel, ServerAPI._call_presence),
    "presence_stats": (_Channel, ServerAPI._call_presence_stats),
    "history": (_History, ServerAPI._call_history),
    "history_remove": (_Channel, ServerAPI._call_history_remove),
    "info": (_Nothing, ServerAPI._call_info),
    "batch": (_Batch, ServerAPI._call_batch),
}


def _data(request: _Publish) -> bytes:
    """The JSON text to publish. Raises ClientError 107 when it is none, 108 for what is not supported yet."""
    if request.version:
        raise ClientError(*errors.NOT_AVAILABLE)
    if not request.b64data:
        return payload(request.data)
    try:
        text = base64.b64decode(request.b64data, validate=True)
        text.decode()
        return payload(msgspec.json.decode(text, type=Raw))
    except (binascii.Error, UnicodeDecodeError, msgspec.MsgspecError, RecursionError):
        raise ClientError(*errors.BAD_REQUEST) from None


def _response(outcome: Position | ClientError) -> Response:
    if isinstance(outcome, ClientError):
        return Response(error=ErrorBody.of(outcome))
    return Response(result=PublishResult(outcome.offset, outcome.epoch))


def _node_result(facts: NodeFacts, census: Census) -> NodeResult:
    return NodeResult(
        uid=facts.uid,
        name=facts.name,
        version=facts.version,
        num_clients=census.clients,
        num_users=census.users,
        num_channels=census.channels,
        num_subs=census.subscriptions,
        uptime=int(facts.uptime),
    )
