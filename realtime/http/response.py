"""HTTP responses as bytes: every complete response of the clients' port is written by `encode_response`.

Head and body are one byte string, so that a response is one system call and one packet. What is the same in many
responses is prepared: the status lines, the Date, and the start of the head for a second, until the Date changes.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from email.utils import formatdate
from http import HTTPStatus

Headers = Iterable[tuple[str, str]]

_STATUS_LINES = {int(status): f"HTTP/1.1 {int(status)} {status.phrase}\r\n".encode() for status in HTTPStatus}
_SERVER = "Server: realtime\r\n"
_NOSNIFF = "X-Content-Type-Options: nosniff\r\n"
_CLOSE = b"Connection: close\r\n"
_OURS = _SERVER.encode() + _NOSNIFF.encode()
# RFC 9110 sections 15.3.5 and 15.4.5.
_WITHOUT_BODY = {204, 304}
# Where a response ends, and whether the connection does, is not for the application to say.
_FRAMING = {"content-length", "transfer-encoding", "connection", "date"}
_TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_LINE_ENDS = re.compile(r"[\r\n\0]+")

_date_second = 0
_date_line = b""
# Heads without further headers up to the length of the body, by status and content type; of this second.
_starts: dict[tuple[int, str], bytes] = {}


def date_line() -> bytes:
    """Return the Date header with its line end, formatted once a second."""
    global _date_line, _date_second
    now = int(time.time())
    if now != _date_second:
        _date_line = f"Date: {formatdate(now, usegmt=True)}\r\n".encode()
        _date_second = now
        _starts.clear()
    return _date_line


def encode_response(
    status: int, content_type: str, headers: Headers, body: bytes, close: bool = False, without_body: bool = False
) -> bytes:
    """Build a complete response.

    content_type: "" for none. headers: further ones; they take the place of the server's own headers of the same name,
    line ends in values become spaces. close: announce the end of the connection. without_body: the response to HEAD.
    Raises ValueError for a header name that is not a token.
    """
    date = date_line()
    is_plain = not (headers or close or without_body)
    if is_plain and (start := _starts.get((status, content_type))):
        return b"%b%d\r\n\r\n%b" % (start, len(body), body)
    line = _STATUS_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status
    own = _OURS if not headers else _own_headers(headers)
    if content_type and not (headers and _names(headers) & {"content-type"}):
        own += b"Content-Type: %b\r\n" % content_type.encode("latin-1", "replace")
    start = b"".join((line, own, date, _CLOSE if close else b""))
    if status in _WITHOUT_BODY:
        return start + b"\r\n"
    start += b"Content-Length: "
    if is_plain:
        _starts[status, content_type] = start
    return b"%b%d\r\n\r\n%b" % (start, len(body), b"" if without_body else body)


def encode_head(status: int, headers: Headers, *, close: bool = False) -> bytes:
    """Build the head of a response whose framing is among `headers`, such as that of a file."""
    line = _STATUS_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status
    lines = [f"{name}: {value}\r\n" for name, value in headers]
    return b"".join((line, date_line(), "".join(lines).encode("latin-1"), _CLOSE if close else b"", b"\r\n"))


def _names(headers: Headers) -> set[str]:
    return {name.lower() for name, _ in headers}


def _own_headers(headers: Headers) -> bytes:
    """Encode the server's headers that `headers` does not replace, and `headers`."""
    names = _names(headers)
    lines = [own for own, name in ((_SERVER, "server"), (_NOSNIFF, "x-content-type-options")) if name not in names]
    for name, value in headers:
        if _TOKEN.fullmatch(name) is None:
            raise ValueError(f"{name!r} is not the name of a header")
        if name.lower() not in _FRAMING:
            lines.append(f"{name}: {_LINE_ENDS.sub(' ', value)}\r\n")
    return "".join(lines).encode("latin-1", "replace")
