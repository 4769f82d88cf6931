"""Messages between a worker and its compute processes: msgpack of typed records, each preceded by its length.

The length has 4 bytes, big-endian. Each end decodes the records that it expects and refuses anything else, so a handler
that writes to the stream can make the worker do nothing else than its calls may ask for. Data of clients and results
for them travel as JSON text.

    worker                                  process
    ProcessSettings              ------->
                                 <-------   ProcessReady, or CallFailed
    ComputeCall                  ------->
    ServerResult or ServerError  <------>   ServerCall, any number of times, one after another
                                 <-------   CallReturned, CallRefused, CallDisconnected or CallFailed
"""

from __future__ import annotations

import struct
from typing import Any

import msgspec
from msgspec import Raw, Struct

from realtime.app import Request, Server
from realtime.config.settings import AppSettings, LogSettings
from realtime.errors import ClientError, Disconnect, EngineUnavailable
from realtime.handlers.error_answers import ErrorAnswer
from realtime.handlers.results import PreparedResponse
from realtime.types import ClientInfo, HistoryPage, Position

# The most bytes of one message from a process, with its length. A handler with a longer result ends as CallFailed.
MAX_REPLY = 1_048_576
HEAD = struct.Struct("!I")

SERVER_METHODS = frozenset(name for name in vars(Server) if not name.startswith("_"))
"""The methods of the server that a handler may call."""


class ProcessSettings(Struct, frozen=True):
    """The application to import, and the log. worker: name of the worker, for the log."""

    app: AppSettings
    log: LogSettings
    worker: str


class ComputeCall(Struct, frozen=True):
    """Call the handler of this name, with a client's data or with an HTTP request.

    data: JSON text, or bytes that a Protobuf client sent if not `is_json`.
    """

    handler: str
    data: bytes = b""
    is_json: bool = True
    request: Request | None = None


class ProcessReady(Struct, frozen=True, tag=True):
    """The application is loaded. pid: of this process."""

    pid: int


class CallReturned(Struct, frozen=True, tag=True):
    """The handler returned. The fields have its converted return value, see `realtime.handlers.results`.

    data: of an RPC, JSON text or bytes for the client. response: to an HTTP request. answers_error: the handler raised
    an exception, and the response is the application's answer to it.
    """

    data: bytes | None = None
    is_json: bool = True
    response: PreparedResponse | None = None
    answers_error: bool = False


class CallRefused(Struct, frozen=True, tag=True):
    """The handler raised ClientError."""

    code: int
    message: str
    temporary: bool


class CallDisconnected(Struct, frozen=True, tag=True):
    """The handler raised Disconnect."""

    code: int
    reason: str


class CallFailed(Struct, frozen=True, tag=True):
    """The handler raised another exception, or the application could not be loaded.

    place: file and line. text: a traceback, or the reason. kind: the exception's type.
    """

    place: tuple[str, int]
    text: str
    kind: str = "HandlerFailed"


INVALIDATE = "invalidate"
"""The method of a `ServerCall` that carries out a `realtime.cache.Invalidation`, its only argument."""


class ServerCall(Struct, frozen=True, tag=True):
    """The handler calls a method of its App. method: of `realtime.app.Server`, with its arguments; or INVALIDATE."""

    method: str
    args: list[Any] = []
    options: dict[str, Any] = {}


class ServerResult(Struct, frozen=True, tag=True):
    """The method of the server returned. result: msgpack of its result, see `unpack_result`."""

    result: Raw


class ServerError(Struct, frozen=True, tag=True):
    """The method of the server raised an exception. kind: a name of `_ERRORS`; "" for a bug of the server."""

    kind: str
    message: str
    code: int = 0
    temporary: bool = False


Reply = CallReturned | CallRefused | CallDisconnected | CallFailed
FromProcess = ProcessReady | Reply | ServerCall
ServerOutcome = ServerResult | ServerError

_ERRORS: dict[str, type[Exception]] = {
    error.__name__: error for error in (ClientError, Disconnect, EngineUnavailable, ValueError, TypeError, RuntimeError)
}


_RESULT_TYPES: dict[str, Any] = {
    "publish": Position,
    "broadcast": list[Position | dict[str, Any]],  # the arguments of a ClientError
    "history": HistoryPage,
    "presence": dict[str, ClientInfo],
    "presence_stats": tuple[int, int],
    "channels": dict[str, int],
    "info": list[dict[str, Any]],
}
_POSITIONS = ("since", "recover_since")


def pack(message: object) -> bytes:
    """Encode a message with its length. Raises TypeError and the like for an object that msgpack can't represent."""
    content = msgspec.msgpack.encode(message, enc_hook=_encode_error)
    return HEAD.pack(len(content)) + content


def call_of(handler: str, args: tuple[Any, ...]) -> ComputeCall:
    """Return the message that calls a handler. args: the decoded data of an RPC, or the request of a route."""
    (argument,) = args
    if isinstance(argument, Request):
        return ComputeCall(handler, request=argument)
    if isinstance(argument, bytes):
        return ComputeCall(handler, argument, is_json=False)
    return ComputeCall(handler, msgspec.json.encode(argument))


def arguments_of(call: ComputeCall) -> tuple[Any, ...]:
    """Return the arguments of the handler; the inverse of `call_of`."""
    if call.request is not None:
        return (call.request,)
    return (msgspec.json.decode(call.data) if call.is_json else call.data,)


def returned(result: Any, answers_error: bool = False) -> CallReturned:
    """Return the message with a converted result. Raises msgspec.ValidationError for a response of wrong types."""
    if isinstance(result, PreparedResponse):
        response = msgspec.convert(msgspec.structs.asdict(result), PreparedResponse)
        return CallReturned(response=response, answers_error=answers_error)
    return CallReturned(None if result is None else bytes(result), not isinstance(result, bytes))


def result_of(reply: CallReturned) -> Any:
    """Return the converted result of a handler; the inverse of `returned`. Raises ErrorAnswer for its response."""
    if reply.response is not None and reply.answers_error:
        raise ErrorAnswer(reply.response)
    if reply.response is not None:
        return reply.response
    return Raw(reply.data) if reply.is_json and reply.data is not None else reply.data


def options_of(call: ServerCall) -> dict[str, Any]:
    """Return the keyword arguments of a server call. Raises msgspec.ValidationError."""
    positions = {name: call.options[name] for name in _POSITIONS if call.options.get(name) is not None}
    return {**call.options, **{name: msgspec.convert(value, Position) for name, value in positions.items()}}


def pack_error(error: Exception) -> bytes:
    """Encode the exception of a server call."""
    if isinstance(error, ClientError):
        return pack(ServerError("ClientError", error.message, error.code, error.temporary))
    if isinstance(error, Disconnect):
        return pack(ServerError("Disconnect", error.reason, error.code))
    kind = next((name for name, known in _ERRORS.items() if isinstance(error, known)), "")
    return pack(ServerError(kind, str(error) if kind else repr(error)))


def unpack_error(error: ServerError) -> Exception:
    """Return the exception of a server call."""
    if error.kind == "ClientError":
        return ClientError(error.code, error.message, error.temporary)
    if error.kind == "Disconnect":
        return Disconnect(error.code, error.message)
    return _ERRORS.get(error.kind, RuntimeError)(error.message)


def pack_result(result: Any) -> bytes:
    """Encode the result of a server call."""
    return pack(ServerResult(Raw(msgspec.msgpack.encode(result, enc_hook=_encode_error))))


def unpack_result(method: str, result: Raw) -> Any:
    """Decode the result of a call of this method of the server."""
    value = msgspec.msgpack.decode(result, type=_RESULT_TYPES.get(method, Any))
    if method == "broadcast":
        return [ClientError(**item) if isinstance(item, dict) else item for item in value]
    return value


def _encode_error(value: Any) -> Any:
    if isinstance(value, ClientError):
        return {"code": value.code, "message": value.message, "temporary": value.temporary}
    raise TypeError(f"objects of type {type(value).__name__} can't be sent to another process")
