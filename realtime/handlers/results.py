"""Converts the return values of handlers into results that can be sent; a handler's cache keeps the converted result.

A return value that can't be sent is the handler's error, so it is converted where the handler ran, and raises there.
The module imports no Twisted: neither does the process of a handler.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import msgspec

from realtime.app import Handler, Response
from realtime.cache import share_values_of
from realtime.errors import LIMIT_EXCEEDED, PERMISSION_DENIED, ClientError
from realtime.types import Credentials, Grant

# The most bytes of JSON in one result for a client: a result is a message, not a download.
MAX_RESULT = 1_048_576

JSON = "application/json"
TEXT = "text/plain; charset=utf-8"
_BYTES = "application/octet-stream"

_encode = msgspec.json.Encoder().encode


class PreparedResponse(msgspec.Struct, frozen=True):
    """An HTTP response, ready to be written.

    fault: the peer's error, a key of `http.FAULTS`, or "". close: end the connection after the response.
    """

    status: int
    body: bytes = b""
    type: str = ""
    headers: tuple[tuple[str, str], ...] = ()
    fault: str = ""
    close: bool = False


share_values_of(PreparedResponse)


def status_response(status: int, *headers: tuple[str, str]) -> PreparedResponse:
    """Return a response whose body is the phrase of its status."""
    return PreparedResponse(status, HTTPStatus(status).phrase.encode(), TEXT, headers)


def json_response(status: int, value: Any) -> PreparedResponse:
    """Return a response with a JSON body. value: anything that JSON can represent."""
    return PreparedResponse(status, _encode(value), JSON)


def call_plain_function(handler: Handler, args: tuple[Any, ...]) -> Any:
    """Call a plain function. Raises TypeError when it returns an awaitable: no loop would await it."""
    value = handler.function(*args)
    if hasattr(value, "__await__"):
        if inspect.iscoroutine(value):
            value.close()
        raise TypeError(
            f'it ran in a thread and returned an awaitable; declare it with run="loop", or async: {value!r}'
        )
    return value


def result_converter(kind: str, has_cache: bool = False) -> Callable[[Any], Any]:
    """Return the function that converts the return values of this kind of handler.

    has_cache: whether other callers may get the same result.

    It raises ClientError for a value that means a refusal; for a value that can't be sent it raises TypeError, or the
    exception of the encoder.
    """
    if kind == "http" and has_cache:
        return _to_shared_response
    return _CONVERTERS.get(kind, _unchanged)


def _unchanged(value: Any) -> Any:
    return value


def _to_credentials(value: Any) -> Credentials | None:
    if isinstance(value, Credentials):
        if not isinstance(value.user, str):
            raise TypeError(f"Credentials.user is a text, not {type(value.user).__name__}")
        value.user.encode()  # raises UnicodeEncodeError for a lone surrogate
        return value
    if value is None:
        return value
    raise TypeError(f"on_connecting returns Credentials or None, not {type(value).__name__}")


def _to_grant(value: Any) -> Grant | None:
    if value is False:
        raise ClientError(*PERMISSION_DENIED)
    if value is None or value is True:
        return None
    if isinstance(value, Grant):
        return value
    raise TypeError(f"on_subscribe returns a Grant, True, False or None, not {type(value).__name__}")


def _to_data(value: Any) -> msgspec.Raw | bytes | None:
    if value is None:
        return None
    # Bytes stay bytes: their representation depends on the encoding that the client speaks.
    is_bytes = isinstance(value, bytes)
    encoded = value if is_bytes else _encode(value)
    if len(encoded) > MAX_RESULT:
        raise ClientError(*LIMIT_EXCEEDED)
    return encoded if is_bytes else msgspec.Raw(encoded)


def _to_response(value: Any) -> PreparedResponse:
    match value:
        case None:
            return PreparedResponse(204)
        case Response():
            body = value.body.encode() if isinstance(value.body, str) else value.body
            content_type = TEXT if isinstance(value.body, str) else _BYTES
            headers = (*value.headers.items(), *(cookie.header() for cookie in value.cookies))
            return PreparedResponse(value.status, body, content_type if body else "", headers)
        case str():
            return PreparedResponse(200, value.encode(), TEXT)
        case bytes():
            return PreparedResponse(200, value, _BYTES)
    return json_response(200, value)


def _to_shared_response(value: Any) -> PreparedResponse:
    response = _to_response(value)
    if any(name.lower() == "set-cookie" for name, _ in response.headers):
        raise TypeError("a route with a cache sets no cookies: other users would get them")
    return response


_CONVERTERS: dict[str, Callable[[Any], Any]] = {
    "on_connecting": _to_credentials,
    "on_subscribe": _to_grant,
    "on_publish": _to_data,
    "rpc": _to_data,
    "http": _to_response,
}
