"""Files of the application's static directories, served by twisted.web's `File`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, cast
from urllib.parse import unquote

from twisted.internet.interfaces import IPushProducer
from twisted.web.http import Request
from twisted.web.http_headers import Headers
from twisted.web.server import NOT_DONE_YET
from twisted.web.static import File, getTypeAndEncoding
from zope.interface import implementer

from realtime.app import Static
from realtime.http.response import encode_head
from realtime.transports.http_server import Exchange

_HEADERS = (("Server", "realtime"), ("X-Content-Type-Options", "nosniff"), ("Cache-Control", "no-cache"))

# The syntax that browsers use for the headers of partial and conditional requests. Headers with another syntax may be
# ignored (RFC 9110 sections 13.1.3 and 14.2). They are removed, because twisted.web would log their value, raise an
# exception, or send a thousand parts for one request.
_RANGE = re.compile(r"bytes=(?:([0-9]{1,15})-([0-9]{0,15})|-0*[1-9][0-9]{0,14})")
_HTTP_DATE = re.compile(r"[A-Z][a-z]{2}, [0-9]{2} [A-Z][a-z]{2} [0-9]{4} [0-9]{2}:[0-9]{2}:[0-9]{2} GMT")


def locate(static: Static, path: str) -> Path | None:
    """Return the file for a URL path below the prefix of `static`; None if there is none.

    No spelling of a path and no symbolic link leads outside the directory, and hidden files are never returned.
    """
    try:
        *folders, name = [unquote(part, errors="strict") for part in path.split("/")]
    except UnicodeDecodeError:
        return None
    parts = [*folders, name or "index.html"]
    if any(not part or part.startswith(".") or any(character in part for character in "/\\\0") for part in parts):
        return None
    try:
        file = static.directory.joinpath(*parts).resolve(strict=True)
    except OSError:
        return None
    return file if file.is_file() and file.is_relative_to(static.directory) else None


def serve_file(file: Path, exchange: Exchange) -> None:
    """Send a file, or the requested range of it. The peer may cache it, but must revalidate it for each use."""
    request = Request(cast(Any, _Channel(exchange)), False)
    request.method = exchange.head.method.encode()
    request.uri = exchange.head.target.encode()
    request.clientproto = b"HTTP/1.1"
    for name, is_common in (("range", _is_range), ("if-modified-since", _is_http_date)):
        values = exchange.head.get_all(name)
        if len(values) == 1 and is_common(values[0]):
            request.requestHeaders.addRawHeader(name.encode(), values[0].encode("latin-1"))
    resource = File(str(file))
    content_type, resource.encoding = getTypeAndEncoding(
        file.name, File.contentTypes, File.contentEncodings, "application/octet-stream"
    )
    resource.type = f"{content_type}; charset=utf-8" if content_type.startswith("text/") else content_type
    for name, value in _HEADERS:
        request.setHeader(name, value)
    body = resource.render_GET(request)
    if body is not NOT_DONE_YET:
        request.write(body)
        request.finish()


@implementer(IPushProducer)
class _Channel:
    """The channel of twisted.web's `Request`, which writes the response to the transport of an exchange."""

    def __init__(self, exchange: Exchange) -> None:
        self.transport = exchange.transport
        self._exchange = exchange
        self._head = b""
        self._producer: Any = None
        self._is_paused = False
        self.getPeer, self.getHost = self.transport.getPeer, self.transport.getHost

    def writeHeaders(self, version: bytes, code: bytes, reason: bytes, headers: Headers) -> None:
        lines = [
            (name.decode("ascii"), value.decode("latin-1"))
            for name, values in headers.getAllRawHeaders()
            for value in values
        ]
        self._head = encode_head(int(code), lines, close=self._exchange.closes)

    def write(self, data: bytes) -> None:
        head, self._head = self._head, b""
        self.transport.write(head + data)

    def registerProducer(self, producer: Any, streaming: bool) -> None:
        """Let `producer`, a pull producer, write a part of the file in each turn, as the socket takes it."""
        self._producer = producer
        self.transport.registerProducer(self, True)
        self.resumeProducing()

    def unregisterProducer(self) -> None:
        self._producer = None
        self.transport.unregisterProducer()

    def pauseProducing(self) -> None:
        self._is_paused = True

    def resumeProducing(self) -> None:
        self._is_paused = False
        self._produce()

    def stopProducing(self) -> None:
        producer, self._producer = self._producer, None
        if producer is not None:
            producer.stopProducing()

    def _produce(self) -> None:
        if self._producer is None or self._is_paused:
            return
        self._producer.resumeProducing()
        if self._producer is not None:
            self.transport.pause_producer_if_buffering()
            if not self._is_paused:
                self.transport.reactor.callLater(0, self._produce)

    def requestDone(self, request: Request) -> None:
        if self._head:
            self.write(b"")
        self._exchange.finish()


def _is_range(text: str) -> bool:
    match = _RANGE.fullmatch(text)
    return match is not None and int(match[1] or 0) <= int(match[2] or 10**15)


def _is_http_date(text: str) -> bool:
    return _HTTP_DATE.fullmatch(text) is not None
