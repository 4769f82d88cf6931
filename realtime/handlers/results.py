"""Answers, ready to be sent: made of what a handler returned where it ran, and kept as such by its cache.

What can't be sent is the handler's mistake, so it is found here and not later. No Twisted: the process of a handler
has none.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from email.utils import formatdate
from http import HTTPStatus
from typing import Any

import msgspec

from realtime import app as declared
from realtime.errors import LIMIT_EXCEEDED, PERMISSION_DENIED, ClientError
from realtime.types import Credentials, Grant

# Bytes of JSON that one answer to a client may have: an answer is a message, not a download.
MAX_ANSWER = 1_048_576

JSON = "application/json"
TEXT = "text/plain; charset=utf-8"


class PreparedResponse(msgspec.Struct, frozen=True):
    """A response, ready to be written.

    fault: what the peer did wrong, a key of `http.FAULTS`, or "". close: end the connection with it.
    """

    status: int
    body: bytes = b""
    type: str = ""
    headers: tuple[tuple[str, str], ...] = ()
    fault: str = ""
    close: bool = False

    def all_headers(self) -> Iterable[tuple[str, str]]:
        """Every header line. The application's own stand in place of ours."""
        ours = {"Server": "realtime", "X-Content-Type-Options": "nosniff"}
        if self.type:
            ours["Content-Type"] = self.type
        theirs = {name.lower() for name, _ in self.headers}
        yield from ((name, value) for name, value in ours.items() if name.lower() not in theirs)
        yield from ((name, value) for name, value in self.headers if name.lower() not in _FRAMING)
        yield "Date", formatdate(usegmt=True)
        if self.status not in _WITHOUT_BODY:
            yield "Content-Length", str(len(self.body))


# RFC 9110 sections 15.3.5 and 15.4.5.
_WITHOUT_BODY = {204, 304}
# Where a response ends is for us to say.
_FRAMING = {"content-length", "transfer-encoding", "connection", "date"}


def plain(status: int, *headers: tuple[str, str]) -> PreparedResponse:
    """A response that says its status in words."""
    return PreparedResponse(status, HTTPStatus(status).phrase.encode(), TEXT, headers)


def json(status: int, value: Any) -> PreparedResponse:
    """A response of anything that JSON can carry."""
    return PreparedResponse(status, msgspec.json.encode(value), JSON)


def answer_of(result: Any) -> PreparedResponse:
    """What a handler returned, as a response. Raises TypeError for what can't be one."""
    match result:
        case None:
            return PreparedResponse(204)
        case declared.Response():
            body = result.body.encode() if isinstance(result.body, str) else result.body
            named = TEXT if isinstance(result.body, str) else "application/octet-stream"
            return PreparedResponse(result.status, body, named if body else "", tuple(result.headers.items()))
        case str():
            return PreparedResponse(200, result.encode(), TEXT)
        case bytes():
            return PreparedResponse(200, result, "application/octet-stream")
    return json(200, result)


def maker(kind: str) -> Callable[[Any], Any]:
    """What makes answers of the results of this kind of handler.

    It raises TypeError and whatever encoding raises for what can't be one, and ClientError for what is a refusal.
    """
    return _MAKERS.get(kind, _unchanged)


def plain_result(handler: declared.Handler, args: tuple[Any, ...]) -> Any:
    """Call a plain function. Raises TypeError when it returns an awaitable, for which there is no loop."""
    result = handler.function(*args)
    if hasattr(result, "__await__"):
        if inspect.iscoroutine(result):
            result.close()
        raise TypeError(
            f'it ran in a thread and returned an awaitable; declare it with run="loop", or async: {result!r}'
        )
    return result


def _unchanged(result: Any) -> Any:
    return result


def _credentials(result: Any) -> Credentials | None:
    if isinstance(result, Credentials):
        if not isinstance(result.user, str):
            raise TypeError(f"Credentials.user is a text, not {type(result.user).__name__}")
        result.user.encode()
        return result
    if result is None:
        return result
    raise TypeError(f"on_connecting returns Credentials or None, not {type(result).__name__}")


def _grant(result: Any) -> Grant | None:
    if result is False:
        raise ClientError(*PERMISSION_DENIED)
    if result is None or result is True:
        return None
    if isinstance(result, Grant):
        return result
    raise TypeError(f"on_subscribe returns a Grant, True, False or None, not {type(result).__name__}")


def _encoded(result: Any) -> msgspec.Raw | bytes | None:
    if result is None:
        return None
    # What becomes of bytes depends on the encoding that the client speaks.
    is_bytes = isinstance(result, bytes)
    made = result if is_bytes else _encode(result)
    if len(made) > MAX_ANSWER:
        raise ClientError(*LIMIT_EXCEEDED)
    return made if is_bytes else msgspec.Raw(made)


_encode = msgspec.json.Encoder().encode


_MAKERS: dict[str, Callable[[Any], Any]] = {
    "on_connecting": _credentials,
    "on_subscribe": _grant,
    "on_publish": _encoded,
    "rpc": _encoded,
    "http": answer_of,
}
