"""The head of an HTTP request, read strictly: bytes in, a `RequestHead` or a `Refusal` out.

Everything behind this parser is handed a head that was rebuilt from what was accepted here (`RequestHead.rebuilt`), so
two parsers can never disagree about one request. Where RFC 9110 and RFC 9112 leave a choice, the strict one is taken:
lines end in CRLF, nothing is folded, a target is a path, and a message that could be framed in two ways is refused.

The verdict depends on the bytes alone, never on how they were cut into segments: lines are judged one by one, in
order, and of each line first its length, then its end, then its content.
"""

from __future__ import annotations

import re
from http import HTTPStatus

from msgspec import Struct

MAX_LINE = 8192  # bytes of the request line, and of one header, without CRLF
MAX_PARAMETERS = 100  # in the query

_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"  # RFC 9110 section 5.6.2
_REQUEST_LINE = re.compile(rb"(" + _TOKEN + rb") ([!-~]+) HTTP/(\d\.\d)")
# RFC 9110 section 5.5 without 0x85, which str.splitlines() takes for the end of a line.
_FIELD = re.compile(rb"(" + _TOKEN + rb"):([\t -~\x80-\x84\x86-\xff]*)")
_TOKEN_START = re.compile(_TOKEN)
# RFC 3986 section 3.2.2, and a port. An empty host is no host.
_HOST = re.compile(r"(?:[A-Za-z0-9._~!$&'()*+,;=%-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?")
_LENGTH = re.compile(r"[0-9]{1,15}")

CHUNKED = -1
UNCOUNTED = ""


class Refusal(Struct, frozen=True, gc=False):
    """Why a request is not served.

    status: of HTTP. reason: plain text for the peer, with nothing in it that the peer sent. kind: label of the counter
    of bad input, or UNCOUNTED when the fault is not the peer's. headers: more lines for the response, as (name, value).
    """

    status: int
    reason: str
    kind: str
    headers: tuple[tuple[str, str], ...] = ()


class RequestHead(Struct, frozen=True):
    """One accepted request line and its headers.

    target: path and query as sent, nothing decoded, always with a leading slash. version: "1.0" or "1.1". fields: names
    in lower case and values without surrounding space, in order. body: bytes of the body that follows; CHUNKED when
    only its end will tell.
    """

    method: str
    target: str
    version: str
    fields: tuple[tuple[str, str], ...]
    body: int

    @property
    def path(self) -> str:
        """The target up to the query."""
        return self.target.partition("?")[0]

    @property
    def query(self) -> str:
        """The target after the first question mark, "" without one."""
        return self.target.partition("?")[2]

    def all(self, name: str) -> list[str]:
        """The values of every header of this lower-case name."""
        return [value for field, value in self.fields if field == name]

    @property
    def headers(self) -> dict[str, str]:
        """By lower-case name. Values of a repeated one are joined, those of cookies as in RFC 9113 section 8.2.3."""
        joined: dict[str, str] = {}
        for name, value in self.fields:
            if name in joined:
                separator = "; " if name == "cookie" else ", "
                joined[name] += separator + value
            else:
                joined[name] = value
        return joined

    def rebuilt(self, *more: tuple[str, str]) -> bytes:
        """The head as bytes, for the next parser. more: fields that take the place of those of the same name."""
        replaced = {name for name, _ in more}
        kept = [field for field in self.fields if field[0] not in replaced]
        lines = [f"{self.method} {self.target} HTTP/{self.version}"]
        lines += [f"{name}: {value}" for name, value in (*kept, *more)]
        return "\r\n".join([*lines, "\r\n"]).encode("latin-1")


class RequestParser:
    """Reads one head. After a verdict it is used up; `rest` holds what followed the head."""

    __slots__ = ("_buffer", "_fields", "_max_bytes", "_max_headers", "_request_line", "_scanned", "_used", "rest")

    def __init__(self, max_bytes: int, max_headers: int) -> None:
        """max_bytes: of the whole head. max_headers: how many header lines."""
        self._max_bytes = max_bytes
        self._max_headers = max_headers
        self._buffer = bytearray()  # what is not judged yet: at most one unfinished line between two calls
        self._scanned = 0  # bytes of the buffer that are known to hold no line feed
        self._used = 0  # bytes of the lines judged so far
        self._request_line: tuple[str, str, str] | None = None
        self._fields: list[tuple[str, str]] = []
        self.rest = b""

    @property
    def started(self) -> bool:
        """Whether any byte has arrived."""
        return bool(self._used or self._buffer)

    def feed(self, data: bytes) -> RequestHead | Refusal | None:
        """Take the next bytes. None: the head is not complete yet. Linear in the bytes fed, however they are cut."""
        fresh = not self.started
        self._buffer += data
        if fresh and data and _TOKEN_START.match(data) is None:
            return _malformed("not an HTTP request")
        start = 0
        while True:
            end = self._buffer.find(b"\n", max(start, self._scanned)) + 1
            refusal = self._measure(start, end or len(self._buffer))
            if refusal is not None:
                return refusal
            if not end:
                break
            line = bytes(self._buffer[start:end])
            if not line.endswith(b"\r\n"):
                return _malformed("a line must end in CRLF")
            if line == b"\r\n":
                self.rest = bytes(self._buffer[end:])
                return self._conclude()
            refusal = self._judge(line[:-2])
            if refusal is not None:
                return refusal
            start = end
        self._used += start
        del self._buffer[:start]
        self._scanned = len(self._buffer)
        return None

    def _measure(self, start: int, end: int) -> Refusal | None:
        """Judge the length of a line, whole or not: the limit that is met first is the one that counts."""
        line_limit = start + MAX_LINE + 2
        head_limit = self._max_bytes - self._used
        if end <= min(line_limit, head_limit):
            return None
        if line_limit <= head_limit and self._request_line is None:
            return Refusal(HTTPStatus.REQUEST_URI_TOO_LONG, "request line too long", "head_size")
        return _too_large("request header too large")

    def _judge(self, line: bytes) -> Refusal | None:
        """Judge the content of one line and keep it."""
        if self._request_line is None:
            return self._judge_request_line(line)
        if len(self._fields) >= self._max_headers:
            return _too_large("too many headers")
        match = _FIELD.fullmatch(line)
        if match is None:
            return _malformed("malformed header")
        name, value = match.groups()
        self._fields.append((name.decode("ascii").lower(), value.strip(b" \t").decode("latin-1")))
        return None

    def _judge_request_line(self, line: bytes) -> Refusal | None:
        match = _REQUEST_LINE.fullmatch(line)
        if match is None:
            return _malformed("malformed request line")
        method, target, version = (part.decode("ascii") for part in match.groups())
        if version not in ("1.0", "1.1"):
            return Refusal(
                HTTPStatus.HTTP_VERSION_NOT_SUPPORTED, "this version of HTTP is not spoken here", "head_version"
            )
        if not target.startswith("/") or "#" in target:
            return _malformed("the request target must be a path")
        if target.partition("?")[2].count("&") >= MAX_PARAMETERS:
            return _malformed("too many query parameters")
        self._request_line = (method, target, version)
        return None

    def _conclude(self) -> RequestHead | Refusal:
        """Judge the head as a whole, at its blank line."""
        if self._request_line is None:
            return _malformed("not an HTTP request")
        method, target, version = self._request_line
        head = RequestHead(method, target, version, tuple(self._fields), 0)
        hosts = head.all("host")
        if len(hosts) > 1 or (version == "1.1" and not hosts) or not all(map(_HOST.fullmatch, hosts)):
            return _malformed("exactly one valid Host header is needed")
        body = _body_of(head)
        if isinstance(body, Refusal):
            return body
        return RequestHead(method, target, version, head.fields, body)


def _body_of(head: RequestHead) -> int | Refusal:
    """The length of the body, by RFC 9112 section 6.3 without its leniencies."""
    lengths = head.all("content-length")
    codings = head.all("transfer-encoding")
    if not lengths and not codings:
        return 0
    if len(lengths) + len(codings) > 1:
        return _malformed("ambiguous message length")
    if codings:
        chunked = codings[0].lower() == "chunked" and head.version == "1.1"
        return CHUNKED if chunked else _malformed("unknown transfer coding")
    if _LENGTH.fullmatch(lengths[0]) is None:
        return _malformed("malformed Content-Length")
    return int(lengths[0])


def _malformed(reason: str) -> Refusal:
    return Refusal(HTTPStatus.BAD_REQUEST, reason, "head_syntax")


def _too_large(reason: str) -> Refusal:
    return Refusal(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, reason, "head_size")
