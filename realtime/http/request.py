"""Strict parser for the head of an HTTP request: bytes in, a `RequestHead` or a `Refusal` out.

Where RFC 9110 and RFC 9112 leave a choice, this parser takes the strict one: lines end in CRLF, header lines are not
folded, and a message with ambiguous framing is refused. A target in absolute form names the host in place of the Host
header (RFC 9112 section 3.2.2); the head has the target in origin form.

The result depends on the bytes alone, not on their segmentation. `RequestParser` checks line by line, in order: first
the length of a line, then its line end, then its content. `parse_whole_head` is the short path for a head that arrived
in one piece and has no fault: one regular expression and the same grammar. llhttp needs as long for the same head and
accepts more than this grammar does. Clients repeat themselves, so a short head that came before is not parsed again.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from http import HTTPStatus
from typing import Any, Generic, TypeVar

from msgspec import Struct

# Bytes of the request line, and of one header, without CRLF, as long as the limit of the head is the default one. A
# greater limit of the head is the limit of a line too.
MAX_LINE = 8192
_DEFAULT_MAX_HEAD = 2 * MAX_LINE
MAX_PARAMETERS = 100  # in the query, by default

_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"  # RFC 9110 section 5.6.2
_REQUEST_LINE = re.compile(rb"(" + _TOKEN + rb") ([!-~]+) HTTP/(\d\.\d)")
# RFC 9110 section 5.5 without 0x85, which str.splitlines() treats as a line end.
_FIELD = re.compile(rb"(" + _TOKEN + rb"):([\t -~\x80-\x84\x86-\xff]*)")
_TOKEN_START = re.compile(_TOKEN)
# Possessive quantifiers: what does not match fails in linear time.
_HEAD = re.compile(
    _REQUEST_LINE.pattern + rb"\r\n((?:" + _TOKEN + rb"+:[\t -~\x80-\x84\x86-\xff]*+\r\n)++)\r\n",
)
# RFC 9112 section 3.2.2: the authority, and the target in origin form without its leading slash, if it has one.
_ABSOLUTE = re.compile(r"[Hh][Tt][Tt][Pp][Ss]?://([^/?#]*)(.*)")
# RFC 3986 section 3.2.2, with an optional port. An empty host is invalid.
_HOST = re.compile(r"(?:[A-Za-z0-9._~!$&'()*+,;=%-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?")
_LENGTH = re.compile(r"[0-9]{1,15}")

_VERSIONS = (b"1.1", b"1.0")
_FRAMING = ("content-length", "transfer-encoding")

# Bytes of the longest head that is remembered, and the number of those: a few megabytes in the worst case.
MAX_KNOWN_HEAD = 1024
KNOWN_HEADS = 1024

CHUNKED = -1  # `RequestHead.body` of a request with a chunked body


T = TypeVar("T")


class _computed_once(Generic[T]):
    """`functools.cached_property` without the lock that it takes before Python 3.12, for half a microsecond."""

    def __init__(self, function: Callable[[Any], T]) -> None:
        self._function = function

    def __get__(self, instance: Any, owner: type | None = None) -> T:
        value = instance.__dict__[self._function.__name__] = self._function(instance)
        return value


class Refusal(Struct, frozen=True, gc=False):
    """The reason for which a request is not served.

    status: HTTP status code. reason: plain text for the response body; it never repeats input of the peer. kind: of
    the refusal, for counters and log (`realtime.client_log`). headers: further response headers, as (name, value).
    """

    status: int
    reason: str
    kind: str
    headers: tuple[tuple[str, str], ...] = ()


class RequestHead(Struct, frozen=True, dict=True):
    """An accepted request line and its headers.

    target: path and query as sent, not decoded, always with a leading slash. version: "1.0" or "1.1". fields: pairs of
    lower-case name and value without surrounding whitespace, in order. body: length of the body in bytes; CHUNKED if
    the body is chunked. Requests with the same bytes may share one object.
    """

    method: str
    target: str
    version: str
    fields: tuple[tuple[str, str], ...]
    body: int

    @_computed_once
    def path(self) -> str:
        """The target without its query."""
        return self.target.partition("?")[0]

    @_computed_once
    def query(self) -> str:
        """The part of the target after the first question mark; "" if there is none."""
        return self.target.partition("?")[2]

    @_computed_once
    def is_last(self) -> bool:
        """Whether the peer expects the end of the connection after the response, or its framing requires it."""
        return self.version == "1.0" or self.body == CHUNKED or "close" in self.get("connection").lower()

    def get(self, name: str) -> str:
        """Return the value of the first header with this lower-case name; "" if there is none."""
        return self._first.get(name, "")

    def get_all(self, name: str) -> list[str]:
        """Return the values of all headers with this lower-case name, in order."""
        return [value for field, value in self.fields if field == name] if name in self._first else []

    @property
    def headers(self) -> dict[str, str]:
        """Header values by lower-case name. Repeated headers are joined: cookies as in RFC 9113 section 8.2.3."""
        joined = self._first.copy()
        if len(joined) < len(self.fields):
            for name in joined:
                joined[name] = ("; " if name == "cookie" else ", ").join(self.get_all(name))
        return joined

    @_computed_once
    def _first(self) -> dict[str, str]:
        first: dict[str, str] = {}
        for name, value in self.fields:
            first.setdefault(name, value)
        return first


def parse_whole_head(data: bytes, start: int, max_bytes: int, max_headers: int) -> tuple[RequestHead, int] | None:
    """Parse the head that begins at `start` of `data`; return it and the place of its end.

    Returns None for a head that is incomplete, unusual or faulty: then `RequestParser` judges it. Limits: as there.
    More than MAX_PARAMETERS query parameters are unusual.
    """
    end = data.find(b"\r\n\r\n", start) + 4
    size = end - start
    if end < 4 or size > max_bytes or size > MAX_LINE:
        return None
    whole = data[start:end]
    # A handshake, which is a GET, has a key of its own, so it never comes again.
    is_remembered = size <= MAX_KNOWN_HEAD and (data[start] != _G or b"Sec-WebSocket-Key" not in whole)
    head = _known_head(whole) if is_remembered else _parse(whole)
    if head is None or len(head.fields) > max_headers:
        return None
    return head, end


def _parse(whole: bytes) -> RequestHead | None:
    """Parse a whole head. Returns None for an unusual or faulty head."""
    match = _HEAD.fullmatch(whole)
    if match is None:
        return None
    method, target, version, block = match.groups()
    lines = block.decode("latin-1").split("\r\n")
    lines.pop()
    fields = []
    framed = hosts = 0
    for line in lines:
        name, _, value = line.partition(":")
        name = name.lower()
        fields.append((name, value.strip(" \t")))
        if name == "host":
            hosts += 1
        elif name in _FRAMING:
            framed += 1
    if hosts != 1 or version not in _VERSIONS or not target.startswith(b"/") or b"#" in target:
        return None
    if target.count(b"&") >= MAX_PARAMETERS:
        return None
    head = RequestHead(method.decode("ascii"), target.decode("ascii"), version.decode("ascii"), tuple(fields), 0)
    if _HOST.fullmatch(head.get("host")) is None:
        return None
    if framed:
        body = _body_length(head)
        if isinstance(body, Refusal):
            return None
        head = RequestHead(head.method, head.target, head.version, head.fields, body)
    return head


# The result depends on the bytes alone, and nothing changes it.
_G = ord("G")
_known_head = lru_cache(KNOWN_HEADS)(_parse)


class RequestParser:
    """Parser for one head; discard it after its result.

    trailing_data: bytes after the head, once `feed` returned a `RequestHead`.
    """

    __slots__ = (
        *("_authority", "_buffer", "_consumed", "_fields", "_max_bytes", "_max_headers", "_max_line"),
        *("_max_parameters", "_request_line", "_scanned"),
        "trailing_data",
    )

    def __init__(self, max_bytes: int, max_headers: int, max_parameters: int = MAX_PARAMETERS) -> None:
        """max_bytes: limit of the whole head. max_headers: limit of the number of header lines.

        max_parameters: limit of the number of parameters in the query, MAX_PARAMETERS or more.
        """
        self._max_bytes = max_bytes
        self._max_headers = max_headers
        self._max_parameters = max_parameters
        self._max_line = max_bytes if max_bytes > _DEFAULT_MAX_HEAD else MAX_LINE
        self._buffer = bytearray()  # unparsed bytes: at most one incomplete line between two calls
        self._scanned = 0  # length of the buffer's start that holds no line feed
        self._consumed = 0  # bytes of the lines parsed so far
        self._request_line: tuple[str, str, str] | None = None
        self._authority: str | None = None  # of a target in absolute form
        self._fields: list[tuple[str, str]] = []
        self.trailing_data = b""

    @property
    def has_started(self) -> bool:
        """Whether the parser has been fed any byte."""
        return bool(self._consumed or self._buffer)

    def feed(self, data: bytes) -> RequestHead | Refusal | None:
        """Parse the next bytes; return None while the head is incomplete.

        The time taken is linear in the number of bytes, independent of their segmentation.
        """
        is_first = not self.has_started
        self._buffer += data
        if is_first and data and _TOKEN_START.match(data) is None:
            return _malformed("not an HTTP request")
        start = 0
        while True:
            end = self._buffer.find(b"\n", max(start, self._scanned)) + 1
            refusal = self._check_length(start, end or len(self._buffer))
            if refusal is not None:
                return refusal
            if not end:
                break
            line = bytes(self._buffer[start:end])
            if not line.endswith(b"\r\n"):
                return _malformed("a line must end in CRLF")
            if line == b"\r\n":
                self.trailing_data = bytes(self._buffer[end:])
                return self._finish()
            refusal = self._parse_line(line[:-2])
            if refusal is not None:
                return refusal
            start = end
        self._consumed += start
        del self._buffer[:start]
        self._scanned = len(self._buffer)
        return None

    def _check_length(self, start: int, end: int) -> Refusal | None:
        """Check the length of a line, complete or not; of two exceeded limits, report the lower one."""
        line_limit = start + self._max_line + 2
        head_limit = self._max_bytes - self._consumed
        if end <= min(line_limit, head_limit):
            return None
        if line_limit <= head_limit and self._request_line is None:
            return Refusal(HTTPStatus.REQUEST_URI_TOO_LONG, "request line too long", "head_size")
        return _too_large("request header too large")

    def _parse_line(self, line: bytes) -> Refusal | None:
        """Parse and store one line without its CRLF."""
        if self._request_line is None:
            return self._parse_request_line(line)
        if len(self._fields) >= self._max_headers:
            return _too_large("too many headers")
        match = _FIELD.fullmatch(line)
        if match is None:
            return _malformed("malformed header")
        name, value = match.groups()
        self._fields.append((name.decode("ascii").lower(), value.strip(b" \t").decode("latin-1")))
        return None

    def _parse_request_line(self, line: bytes) -> Refusal | None:
        match = _REQUEST_LINE.fullmatch(line)
        if match is None:
            return _malformed("malformed request line")
        method, target, version = (part.decode("ascii") for part in match.groups())
        if version not in ("1.0", "1.1"):
            return Refusal(
                HTTPStatus.HTTP_VERSION_NOT_SUPPORTED, "this version of HTTP is not spoken here", "head_version"
            )
        absolute = _ABSOLUTE.fullmatch(target)
        if absolute is not None:
            self._authority, rest = absolute.groups()
            target = rest if rest.startswith("/") else "/" + rest
        if not target.startswith("/") or "#" in target:
            return _malformed("the request target must be a path")
        if target.partition("?")[2].count("&") >= self._max_parameters:
            return Refusal(HTTPStatus.BAD_REQUEST, "too many query parameters", "parameters")
        self._request_line = (method, target, version)
        return None

    def _finish(self) -> RequestHead | Refusal:
        """Check the whole head, at its blank line, and build the result."""
        if self._request_line is None:
            return _malformed("not an HTTP request")
        method, target, version = self._request_line
        head = RequestHead(method, target, version, tuple(self._fields), 0)
        hosts = head.get_all("host")
        if self._authority is not None:
            # The authority of the target counts (RFC 9112 section 3.2.2). Host may differ, and must be well-formed.
            others = (field for field in self._fields if field[0] != "host")
            head = RequestHead(method, target, version, (("host", self._authority), *others), 0)
            if _HOST.fullmatch(self._authority) is None:
                return _malformed("malformed host in the request target")
        if len(hosts) > 1 or (version == "1.1" and not hosts) or not all(map(_HOST.fullmatch, hosts)):
            return _malformed("exactly one valid Host header is needed")
        body = _body_length(head)
        if isinstance(body, Refusal):
            return body
        return RequestHead(method, target, version, head.fields, body)


def _body_length(head: RequestHead) -> int | Refusal:
    """Return the length of the body (RFC 9112 section 6.3, without its leniencies), or CHUNKED."""
    lengths = head.get_all("content-length")
    codings = head.get_all("transfer-encoding")
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
