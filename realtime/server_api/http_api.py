"""The HTTP API: decodes the JSON body of each method, calls the server API, and builds the result to encode.

`realtime.server_api.operations` carries out the operations; this module knows the fields of requests and results. It
ignores unknown keys. A field of the wrong type makes the whole body invalid (`BadBody`).
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Coroutine, Mapping
from functools import cache
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, Raw, Struct, UnsetType

from realtime import errors, json_text
from realtime.auth.tokens import OVERRIDABLE
from realtime.client_log import ClientLog
from realtime.config.settings import HTTPAPISettings
from realtime.errors import ClientError, EngineUnavailable, RealtimeError
from realtime.metrics import Counter, Metrics
from realtime.protocol import messages
from realtime.protocol.context import Gather
from realtime.protocol.messages import StreamPosition
from realtime.pubsub.engine import AnswerCallback
from realtime.pubsub.time_slices import TimeSlicer
from realtime.server_api.operations import ServerAPI, sequentially
from realtime.types import ClientInfo, Position, Publication

NOT_FOUND = (104, "not found", False)

BATCH_AT_A_TIME = 8
"""Concurrent commands of a parallel batch. The reply to each may have some megabytes."""

BATCH_BYTES = 16 * 1024 * 1024
"""The most bytes of all replies to one batch or pipeline; the remaining commands are refused."""

COMMANDS_PER_TURN = 100
"""Commands of one batch or pipeline that run before the loop gets another turn: a command that fails never waits."""

FEW_ITEMS = 2000
"""Items of a field of a long body that are not counted before it is decoded."""

LONG_BODY = 65536
"""Bytes of a body from which on it is decoded, and its content checked, in several steps."""

# A line that is not empty.
_LINE = re.compile(rb"[^\s][^\n]*")


class BadBody(RealtimeError):
    """The body of a call is not valid JSON for its method: HTTP status 400."""


class _HasNulls(BadBody):
    """The body may be valid without its nulls."""


class UnknownMethod(RealtimeError):
    """The method does not exist: HTTP status 404."""


# -- requests over HTTP -----------------------------------------------------------------------------------------------

_UnixTime = Annotated[int, Meta(ge=0, le=2**53)]


class _Publish(Struct, frozen=True):
    channel: str = ""
    data: Raw | UnsetType = UNSET
    b64data: str = ""
    skip_history: bool = False
    tags: dict[str, str] | None = None
    idempotency_key: str = ""
    delta: bool = False
    version: Annotated[int, Meta(ge=0)] = 0
    version_epoch: str = ""


class _Broadcast(_Publish, frozen=True):
    channels: list[str] = []


class _Bool(Struct, frozen=True):
    value: bool = False


_Override = msgspec.defstruct("_Override", [(name, _Bool | None, None) for name in OVERRIDABLE], frozen=True)


class _Target(Struct, frozen=True):
    """The connections that an operation addresses."""

    user: str = ""
    client: str = ""
    session: str = ""


class _Subscribe(_Target, frozen=True):
    channel: str = ""
    info: Raw | UnsetType = UNSET
    b64info: str = ""
    data: Raw | UnsetType = UNSET
    b64data: str = ""
    recover_since: StreamPosition | None = None
    override: _Override | None = None  # type: ignore[valid-type]
    expire_at: _UnixTime = 0


class _Unsubscribe(_Target, frozen=True):
    channel: str = ""


class _Reason(Struct, frozen=True):
    code: int = 0
    reason: str = ""


class _Disconnect(_Target, frozen=True):
    whitelist: tuple[str, ...] | None = None
    disconnect: _Reason | None = None


class _Refresh(_Target, frozen=True):
    expired: bool = False
    expire_at: _UnixTime = 0
    info: Raw | UnsetType = UNSET


class _Channel(Struct, frozen=True):
    channel: str = ""


class _History(Struct, frozen=True):
    channel: str = ""
    limit: int = 0
    since: StreamPosition | None = None
    reverse: bool = False


class _Channels(Struct, frozen=True):
    pattern: str = ""


class _RPC(Struct, frozen=True):
    method: str = ""


class _Nothing(Struct, frozen=True):
    pass


class _Batch(Struct, frozen=True):
    commands: list[Raw] = []  # each is decoded on its own
    parallel: bool = False


class _Named(Struct, frozen=True):
    """A call in the older form, with the method's name in the body."""

    method: str = ""
    params: Raw = Raw(b"{}")


# -- results ----------------------------------------------------------------------------------------------------------


class PublishResult(Struct, frozen=True, omit_defaults=True):
    offset: int = 0
    epoch: str = ""


class ErrorBody(Struct, frozen=True):
    """The error that a caller sees. `temporary` is for clients alone."""

    code: int
    message: str

    @classmethod
    def of(cls, error: ClientError) -> ErrorBody:
        return cls(error.code, error.message)


class APIResponse(Struct, frozen=True, omit_defaults=True):
    """The body of a response: a result or an error."""

    result: Any = None
    error: ErrorBody | None = None


class BroadcastResult(Struct, frozen=True):
    """responses: each an encoded `APIResponse`."""

    responses: list[Raw]


class BinaryPub(Struct, frozen=True, omit_defaults=True):
    """A publication with data that JSON can't represent: binary, or none; its `data` is null."""

    b64data: str
    data: None
    info: messages.Info | None = None
    offset: int = 0
    tags: dict[str, str] | None = None


class HistoryPageResult(Struct, frozen=True):
    """publications: each an encoded `Pub` or `BinaryPub`."""

    publications: list[Raw]
    epoch: str
    offset: int


class ChannelsResult(Struct, frozen=True):
    """channels: an encoded object with `num_clients` by channel. silent_workers: see `ChannelCounts`."""

    channels: Raw
    silent_workers: int | UnsetType = UNSET


class InfoResult(Struct, frozen=True):
    nodes: list[dict[str, Any]]


class BatchResult(Struct, frozen=True):
    """replies: each encoded, an object with the name of the method and its result, or with an error."""

    replies: list[Raw]


class PipelineResult(Struct, frozen=True):
    """The responses to commands that a caller sent in one body, one a line. lines: JSON text of an `APIResponse`."""

    lines: list[bytes]


# -- the API ----------------------------------------------------------------------------------------------------------


class HTTPAPI:
    """The methods of the HTTP API, by name."""

    def __init__(
        self,
        operations: ServerAPI,
        gather: Gather = sequentially,
        metrics: Metrics | None = None,
        slices: TimeSlicer | None = None,
        client_log: ClientLog | None = None,
        max_batch: int = HTTPAPISettings().max_batch_commands,
    ) -> None:
        """gather: see `ServerAPI`. slices: time slices for long work; None for no limit. client_log: of the errors.

        max_batch: see `http_api.max_batch_commands`.
        """
        self._client_log = client_log or ClientLog()
        self._slices = slices or TimeSlicer.unlimited()
        self._operations = operations
        self._gather = gather
        self._metrics = metrics or Metrics()
        self._max_batch = max_batch
        self._counters: dict[tuple[str, int], Counter] = {}

    async def call(self, method: str, body: bytes) -> Struct:
        """Return the result of one call. Raises UnknownMethod, BadBody, and ClientError if the method refuses."""
        try:
            kind, answer = METHODS[method]
        except KeyError:
            raise UnknownMethod(method) from None
        try:
            request = _decode(body, kind) if len(body) <= LONG_BODY else await self._decode_long(body, kind)
            result = await answer(self, request)
        except (EngineUnavailable, ClientError) as error:
            raise self._refusal(method, error) from None
        self._count(method, 0)
        return result

    def publish(self, body: bytes, done: AnswerCallback) -> None:
        """Publish like `call`, without a coroutine: the short path for the most frequent method.

        done: called once with the result or the error, perhaps before this returns.
        """

        def published(position: Any, error: BaseException | None) -> None:
            if error is None:
                self._count("publish", 0)
                done(PublishResult(position.offset, position.epoch), None)
            else:
                done(None, self._refusal("publish", error))

        try:
            request: _Publish = _decode(body, _Publish)
        except BadBody as error:
            done(None, error)
            return
        try:
            data, binary = _data(request)
            self._operations.publish_then(
                published,
                request.channel,
                data,
                binary,
                request.tags,
                request.skip_history,
                request.idempotency_key,
                request.delta,
                request.version,
                request.version_epoch,
            )
        except ClientError as error:
            published(None, error)

    async def _decode_long(self, body: bytes, kind: type[Struct]) -> Any:
        """Decode as `_decode`, in several steps. Raises ClientError 106 for too many items, see `_check_items`."""
        await self._check_items(body, kind)
        await self._slices.yield_to_loop()
        try:
            return _decode_strictly(body, kind)
        except _HasNulls:
            await self._slices.yield_to_loop()
        body = _without_nulls(body, kind)
        await self._slices.yield_to_loop()
        return _decode_strictly(body, kind)

    async def _check_items(self, body: bytes, kind: type[Struct]) -> None:
        """Raises ClientError 106 if a field has more items than `http_api.max_batch_commands` and FEW_ITEMS.

        They are decoded in one step. A tag counts as two items.
        """
        limits = {
            name: max(self._max_batch, FEW_ITEMS) // _LISTS[name] for name in kind.__struct_fields__ if name in _LISTS
        }
        if not limits or body.count(b",") < min(limits.values()):
            return
        for name, text in _decode_fields(body, kind).items():
            value, limit = bytes(text), limits.get(name, len(body))
            if value.count(b",") < limit:
                continue
            await self._slices.yield_to_loop()
            for commas in json_text.comma_steps(value):
                if commas >= limit:
                    raise ClientError(*errors.LIMIT_EXCEEDED)
                await self._slices.yield_to_loop()

    def _refusal(self, method: str, error: BaseException) -> BaseException:
        """Count and log a call that failed, and return the error for its caller."""
        if isinstance(error, EngineUnavailable):
            error = ClientError(*errors.INTERNAL_ERROR)
        if isinstance(error, ClientError):
            self._count(method, error.code)
            self._client_log.refuse("api_error", method=method, code=error.code, reason=error.message)
        return error

    def _count(self, method: str, code: int) -> None:
        counter = self._counters.get((method, code))
        if counter is None:
            counter = self._counters[method, code] = self._metrics.counter(
                "realtime_api_calls",
                "Calls of the HTTP API, including calls in batches, by error code; 0 for success.",
                method=method,
                code=str(code),
            )
        counter.value += 1

    async def call_named(self, body: bytes) -> Struct:
        """Like `call`, for the older form {"method": ..., "params": {...}}. An unknown method raises ClientError 104.

        A body with several commands, one a line, has a PipelineResult. No command runs if a line is not a command.
        """
        try:
            named = _decode(body, _Named)
        except BadBody:
            if b"\n" not in body.strip():
                raise
        else:
            return await self._call_named(named)
        lines = _LINE.findall(body)
        try:
            self._check_number(len(lines))
        except ClientError as error:
            self._count("pipeline", error.code)
            raise
        return PipelineResult(await self._pipeline(await self._slices.map_sliced(_named, lines)))

    async def _call_named(self, named: _Named) -> Struct:
        try:
            params = bytes(named.params)
            return await self.call(named.method, b"{}" if params == b"null" else params)
        except UnknownMethod:
            raise ClientError(*NOT_FOUND) from None

    async def _pipeline(self, commands: list[_Named]) -> list[bytes]:
        """Run commands one after another, in the bounds of a batch; return the text of their responses."""
        lines: list[bytes] = []
        room = BATCH_BYTES
        for number, command in enumerate(commands, 1):
            if number % COMMANDS_PER_TURN == 0:
                await self._slices.yield_to_loop()
            if room < 0:
                refused = msgspec.json.encode(_response(ClientError(*errors.LIMIT_EXCEEDED)))
                return lines + [refused] * (len(commands) - len(lines))
            try:
                response = APIResponse(result=await self._call_named(command))
            except BadBody:
                response = _response(ClientError(*errors.BAD_REQUEST))
            except ClientError as error:
                response = _response(error)
            lines.append(msgspec.json.encode(response))
            room -= len(lines[-1])
        return lines

    async def _publish(self, request: _Publish) -> PublishResult:
        position = await self._operations.publish(request.channel, **await self._publication(request))
        return PublishResult(position.offset, position.epoch)

    async def _publication(self, request: _Publish) -> dict[str, Any]:
        """Return the arguments of publish and broadcast besides the channels. Raises ClientError 107 for invalid data.

        Long data is checked in slices.
        """
        if request.b64data:
            data = _decode_base64(request.b64data)
        else:
            data = await self._content(request.data, "")
        return {
            "data": data,
            "binary": bool(request.b64data) or not data,
            "tags": request.tags,
            "skip_history": request.skip_history,
            "idempotency_key": request.idempotency_key,
            "delta": request.delta,
            "version": request.version,
            "version_epoch": request.version_epoch,
        }

    async def _content(self, value: Raw | UnsetType, encoded: str) -> bytes:
        """Return the JSON text of a field, or the bytes of its base64 form, which wins; see `json_text.text_or_bytes`.

        Long content is checked in slices. Raises ClientError 107.
        """
        if not encoded:
            text = json_text.one_line(bytes(value)) if isinstance(value, Raw) else b""
            await self._slices.exhaust(json_text.check_steps(text))
            return text
        content = _decode_base64(encoded)
        try:
            await self._slices.exhaust(json_text.json_steps(content))
        except ClientError:
            return json_text.BINARY + content
        return json_text.one_line(content)

    async def _broadcast(self, request: _Broadcast) -> BroadcastResult:
        self._check_number(len(request.channels))
        outcomes = await self._operations.broadcast(request.channels, **await self._publication(request))
        return BroadcastResult(await self._slices.map_sliced(_encoded_response, outcomes))

    async def _subscribe(self, request: _Subscribe) -> messages.Empty:
        override: dict[str, _Bool | None] = msgspec.structs.asdict(request.override or _Override())
        await self._operations.subscribe(
            **_target(request),
            channel=request.channel,
            info=await self._content(request.info, request.b64info),
            data=await self._content(request.data, request.b64data),
            recover_since=_position(request.recover_since),
            override={name: option.value for name, option in override.items() if option is not None},
            expire_at=request.expire_at,
        )
        return messages.EMPTY

    async def _unsubscribe(self, request: _Unsubscribe) -> messages.Empty:
        await self._operations.unsubscribe(**_target(request), channel=request.channel)
        return messages.EMPTY

    async def _disconnect(self, request: _Disconnect) -> messages.Empty:
        code, reason = errors.FORCE_DISCONNECT
        if request.disconnect is not None:
            code, reason = request.disconnect.code, request.disconnect.reason
        await self._operations.disconnect(
            **_target(request), whitelist=request.whitelist or (), code=code, reason=reason
        )
        return messages.EMPTY

    async def _refresh(self, request: _Refresh) -> messages.Empty:
        await self._operations.refresh(
            **_target(request),
            expired=request.expired,
            expire_at=request.expire_at,
            info=await self._content(request.info, ""),
        )
        return messages.EMPTY

    async def _presence(self, request: _Channel) -> messages.PresenceResult:
        present = await self._operations.presence(request.channel)
        infos = await self._slices.map_sliced(_encoded_info, present.values())
        encoded: dict[str, Any] = dict(zip(present, infos, strict=True))
        return messages.PresenceResult(encoded)

    async def _presence_stats(self, request: _Channel) -> messages.PresenceStatsResult:
        return messages.PresenceStatsResult(*await self._operations.presence_stats(request.channel))

    async def _history(self, request: _History) -> HistoryPageResult:
        page = await self._operations.history(
            request.channel, limit=request.limit, since=_position(request.since), reverse=request.reverse
        )
        publications = await self._slices.map_sliced(_encoded_pub, page.publications)
        return HistoryPageResult(publications, page.position.epoch, page.position.offset)

    async def _history_remove(self, request: _Channel) -> messages.Empty:
        await self._operations.history_remove(request.channel)
        return messages.EMPTY

    async def _channels(self, request: _Channels) -> ChannelsResult:
        found = await self._operations.channels(request.pattern)
        entries = await self._slices.map_sliced(_encoded_channel, found.items())
        return ChannelsResult(Raw(b"{%b}" % b",".join(entries)), found.silent_workers or UNSET)

    async def _info(self, request: _Nothing) -> InfoResult:
        return InfoResult(await self._operations.info())

    async def _rpc(self, request: _RPC) -> Struct:
        # The API defines no RPC methods of its own.
        raise ClientError(*(NOT_FOUND if request.method else errors.BAD_REQUEST))

    def _check_number(self, number: int) -> None:
        """Raises ClientError 106 for too many commands or channels, whose results would be encoded in one step."""
        if number > self._max_batch:
            raise ClientError(*errors.LIMIT_EXCEEDED)

    async def _batch(self, request: _Batch) -> BatchResult:
        self._check_number(len(request.commands))
        run, size = (self._gather, BATCH_AT_A_TIME) if request.parallel else (sequentially, 1)
        replies: list[Raw] = []
        room = BATCH_BYTES
        for begin in range(0, len(request.commands), size):
            if begin and begin % COMMANDS_PER_TURN < size:
                await self._slices.yield_to_loop()
            if room < 0:
                replies += [_error_reply(ClientError(*errors.LIMIT_EXCEEDED))] * (len(request.commands) - begin)
                break
            for reply in await run([self._reply(command) for command in request.commands[begin : begin + size]]):
                replies.append(reply)
                room -= len(bytes(reply))
        return BatchResult(replies)

    async def _reply(self, encoded: Raw) -> Raw:
        try:
            if bytes(encoded) == b"null":
                raise ClientError(*errors.BAD_REQUEST)
            command = _method_of(bytes(encoded))
            if command is None:
                raise ClientError(*NOT_FOUND)
            method, body = command
            result = await self.call(method, body)
            return Raw(b'{"%b":%b}' % (method.encode(), msgspec.json.encode(result)))
        except BadBody:
            return _error_reply(ClientError(*errors.BAD_REQUEST))
        except ClientError as error:
            return _error_reply(error)


METHODS: Mapping[str, tuple[type[Struct], Callable[[HTTPAPI, Any], Coroutine[Any, Any, Struct]]]] = {
    "publish": (_Publish, HTTPAPI._publish),
    "broadcast": (_Broadcast, HTTPAPI._broadcast),
    "subscribe": (_Subscribe, HTTPAPI._subscribe),
    "unsubscribe": (_Unsubscribe, HTTPAPI._unsubscribe),
    "disconnect": (_Disconnect, HTTPAPI._disconnect),
    "refresh": (_Refresh, HTTPAPI._refresh),
    "presence": (_Channel, HTTPAPI._presence),
    "presence_stats": (_Channel, HTTPAPI._presence_stats),
    "history": (_History, HTTPAPI._history),
    "history_remove": (_Channel, HTTPAPI._history_remove),
    "channels": (_Channels, HTTPAPI._channels),
    "info": (_Nothing, HTTPAPI._info),
    "rpc": (_RPC, HTTPAPI._rpc),
    "batch": (_Batch, HTTPAPI._batch),
}


_decoders = {kind: msgspec.json.Decoder(kind).decode for kind in (_Named, *(kind for kind, _ in METHODS.values()))}


def _named(line: bytes) -> _Named:
    """Decode one line of a pipeline. Raises BadBody."""
    command: _Named = _decode(line, _Named)
    return command


def _method_of(command: bytes) -> tuple[str, bytes] | None:
    """Return the method of a command in a batch, and its body; None if it names none. Raises BadBody."""
    try:
        command.decode()
        fields = msgspec.json.decode(command, type=_fields_of(tuple(METHODS)))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise BadBody("the command is not valid JSON") from None
    bodies = ((name, bytes(getattr(fields, name))) for name in METHODS if name != "batch")
    return next(((name, body) for name, body in bodies if body), None)


def _decode(body: bytes, kind: type[Struct]) -> Any:
    """Decode a body; a field that is null is absent. Raises BadBody."""
    try:
        return _decode_strictly(body, kind)
    except _HasNulls:
        return _decode_strictly(_without_nulls(body, kind), kind)


def _decode_strictly(body: bytes, kind: type[Struct]) -> Any:
    try:
        if not body.isascii():
            body.decode()  # the decoder does not check text that it passes on undecoded
        return _decoders[kind](body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        may_be_null = isinstance(error, msgspec.ValidationError) and b"null" in body
        raise (_HasNulls if may_be_null else BadBody)("the body is not valid JSON for the method") from None


# Fields whose JSON text stays as it is: content, in which null is a value, and commands, which are decoded one by one.
_CONTENT = ("data", "info")
_UNREAD = (*_CONTENT, "commands", "params")
# Fields with many items, which are decoded one by one, and the items that each counts for.
_LISTS = {"commands": 1, "channels": 1, "whitelist": 1, "tags": 2}


def _without_nulls(body: bytes, kind: type[Struct]) -> bytes:
    """Return a body without the fields that are unknown or null: null means absent."""
    fields = _decode_fields(body, kind)
    return msgspec.json.encode({name: _without_inner_nulls(name, value) for name, value in fields.items()})


def _decode_fields(body: bytes, kind: type[Struct]) -> dict[str, Raw]:
    """Return the known fields of a body as JSON text, without those that are null. Unknown ones cost little.

    Raises BadBody.
    """
    try:
        decoded = msgspec.json.decode(body, type=_fields_of(kind.__struct_fields__))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise BadBody("the body is not valid JSON for the method") from None
    fields: dict[str, Raw] = {name: value for name, value in msgspec.structs.asdict(decoded).items() if value}
    return {name: value for name, value in fields.items() if name in _CONTENT or bytes(value) != b"null"}


@cache
def _fields_of(names: tuple[str, ...]) -> type[Struct]:
    return msgspec.defstruct("_Fields", [(name, Raw, Raw(b"")) for name in names])


def _without_inner_nulls(name: str, value: Raw) -> Any:
    text = bytes(value)
    # Nulls in a long list or object are refused: removing them takes long.
    if name in _UNREAD or text[:1] not in b"{[" or len(text) > LONG_BODY:
        return value
    return _present(msgspec.json.decode(value))


def _present(value: Any) -> Any:
    """Return a decoded value without fields that are null. An item of a list keeps its place, as empty text."""
    if isinstance(value, dict):
        return {name: _present(field) for name, field in value.items() if field is not None}
    if isinstance(value, list):
        return ["" if item is None else item for item in value]
    return value


def _data(request: _Publish) -> tuple[bytes, bool]:
    """Return the data to publish, and whether it may be any bytes. Raises ClientError 107 for invalid data."""
    if request.b64data:
        return _decode_base64(request.b64data), True
    data = json_text.payload(request.data)
    return data, not data


def _decode_base64(text: str) -> bytes:
    try:
        return json_text.decode_base64(text)
    except ValueError:
        raise ClientError(*errors.BAD_REQUEST) from None


def _target(request: _Target) -> dict[str, str]:
    return {"user": request.user, "client": request.client, "session": request.session}


def _position(position: StreamPosition | None) -> Position | None:
    return Position(position.offset, position.epoch) if position is not None else None


def _encoded_channel(channel: tuple[str, int]) -> bytes:
    name, clients = channel
    return b'%b:{"num_clients":%d}' % (msgspec.json.encode(name), clients)


def _encoded_info(client: ClientInfo) -> Raw:
    """Encode a client, so that a result with thousands of them is encoded in a short step."""
    return Raw(msgspec.json.encode(messages.make_info(client)))


def _encoded_pub(publication: Publication) -> Raw:
    """Encode a publication, so that a result with thousands of them is encoded in a short step."""
    plain = messages.make_pub(publication, json_text.one_line(publication.data))
    if not publication.binary and publication.data.strip(b"\r\n"):
        return Raw(msgspec.json.encode(plain))
    data = base64.b64encode(publication.data).decode()
    return Raw(msgspec.json.encode(BinaryPub(data, None, plain.info, plain.offset, plain.tags)))


def _error_reply(error: ClientError) -> Raw:
    return Raw(msgspec.json.encode({"error": ErrorBody.of(error)}))


def _encoded_response(outcome: Position | ClientError) -> Raw:
    """Encode the outcome for one channel, so that a result with thousands of them is encoded in a short step."""
    return Raw(msgspec.json.encode(_response(outcome)))


def _response(outcome: Position | ClientError) -> APIResponse:
    if isinstance(outcome, ClientError):
        return APIResponse(error=ErrorBody.of(outcome))
    return APIResponse(result=PublishResult(outcome.offset, outcome.epoch))
