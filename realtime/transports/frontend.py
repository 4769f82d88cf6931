"""The one port for clients: reads the head of every request once, strictly, and passes on what it accepted.

A request to an endpoint, such as a WebSocket handshake, gets a protocol that takes this one's place on the transport.
Everything else goes to twisted.web, request by request: bodies pass through untouched, and each head of a kept-alive
connection is judged like the first. What twisted.web is given are heads that were rebuilt from what was accepted.
A request that is refused gets one complete small response; after it the connection is shut in order, so that the
response is not lost to a reset, and aborted if the peer does not follow.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any
from typing import Protocol as Interface

from twisted.internet.interfaces import IAddress
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.python.failure import Failure
from twisted.web.server import Site

from realtime.config import settings
from realtime.deadlines import Deadlines
from realtime.http.request import CHUNKED, UNCOUNTED, Refusal, RequestHead, RequestParser
from realtime.metrics import Counter, Metrics
from realtime.transports.admission import response
from realtime.transports.websocket import bad_input

# Seconds for the peer to read a refusal and close: what it sends meanwhile is read and thrown away.
LINGER = 2.0

# Milliseconds after which the kernel drops a peer of twisted.web that takes nothing of its response (tcp(7)):
# `loseConnection` would wait for it for ever.
HTTP_PATIENCE = 30_000

# A request line that no parser takes.
_UNREADABLE = b"\0\r\n"

_TIMED_OUT = Refusal(HTTPStatus.REQUEST_TIMEOUT, "the request took too long", "head_timeout")
_PIPELINED = Refusal(HTTPStatus.BAD_REQUEST, "an earlier request is still being answered", "pipelined")


class ConnectionEndpoint(Interface):
    """A path whose requests take over their connections."""

    def judge(self, head: RequestHead) -> Refusal | None:
        """Why this request is not let in, or None. Asked once."""

    def open(self, head: RequestHead, transport: Any) -> Protocol:
        """The protocol for a request that `judge` let in, which is fed the bytes after the head."""


class HTTPPeer(Interface):
    """A connection's end in twisted.web; see `realtime.transports.http_server.Channel`."""

    def makeConnection(self, transport: Any) -> None: ...
    def dataReceived(self, data: bytes) -> None: ...
    def connectionLost(self, reason: Failure) -> None: ...

    def release(self) -> bool:
        """Let go of the transport for good; False while a request is being answered."""


class HTTPFrontend(Protocol):
    """A connection until its first head is read, and for as long as it speaks HTTP."""

    factory: HTTPFrontendFactory
    transport: Any
    bucket = 0  # belongs to Deadlines
    _parser: RequestParser | None = None  # of the head that is being read
    _refused = False  # a response that says no was written; what still comes is thrown away
    _channel: HTTPPeer | None = None  # twisted.web's end, from the first request that went to it
    _body = 0  # bytes of the body that are still to come, or CHUNKED

    def connectionMade(self) -> None:
        self.factory.waiting += 1
        self._expect_head()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.factory.deadlines.clear(self)
        if self._channel is None:
            self.factory.waiting -= 1
        else:
            self.factory.serving -= 1
            self._channel.connectionLost(reason)

    def dataReceived(self, data: bytes) -> None:
        while data and not self._refused:
            data = self._pass_body(data) if self._body else self._read_head(data)

    def wake(self) -> None:
        """The deadline came: for a head, counted from its beginning, or for the peer to close after a refusal."""
        if self._refused:
            self.transport.abortConnection()
        elif self._parser is not None and self._parser.started:
            self._refuse(_TIMED_OUT)
        else:
            self.factory.count(_TIMED_OUT.kind)
            self.transport.loseConnection()

    def _expect_head(self) -> RequestParser:
        self.factory.wake_after(self, self.factory.header_timeout)
        self._parser = self.factory.make_parser()
        return self._parser

    def _read_head(self, data: bytes) -> bytes:
        """Take a head, or a part of it; returns what follows it."""
        parser = self._parser or self._expect_head()
        verdict = parser.feed(data)
        if verdict is None:
            return b""
        if isinstance(verdict, Refusal):
            self._refuse(verdict)
            return b""
        self._parser = None
        self.factory.deadlines.clear(self)
        endpoint = self.factory.endpoints.get(verdict.path)
        # What browsers ask before is answered by twisted.web, after which they may go on with the same connection.
        if endpoint is not None and verdict.method != "OPTIONS":
            self._give_way(endpoint, verdict, parser.rest)
            return b""
        self._serve(verdict)
        return parser.rest

    def _give_way(self, endpoint: ConnectionEndpoint, head: RequestHead, rest: bytes) -> None:
        """Have another protocol go on, from this request."""
        if self._channel is not None and not self._leave_http(self._channel):
            self._refuse(_PIPELINED)
            return
        refusal = endpoint.judge(head)
        if refusal is not None:
            self._refuse(refusal)
            return
        transport = self.transport
        connection = endpoint.open(head, transport)
        self.factory.waiting -= 1
        transport.protocol = connection
        connection.makeConnection(transport)
        if rest:
            connection.dataReceived(rest)

    def _leave_http(self, channel: HTTPPeer) -> bool:
        """Whether twisted.web has nothing more to say, and is left."""
        if not channel.release():
            return False
        self._channel = None
        self.factory.serving -= 1
        self.factory.waiting += 1
        self.transport.getHandle().setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 0)
        return True

    def _serve(self, head: RequestHead) -> None:
        """Pass a request's head to twisted.web."""
        if self._channel is None:
            self.factory.waiting -= 1
            self.factory.serving += 1
            self.transport.getHandle().setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, HTTP_PATIENCE)
            self._channel = self.factory.http.buildProtocol(self.transport.getPeer())
            assert self._channel is not None
            self._channel.makeConnection(self.transport)
        self._body = head.body
        # Where a chunked body ends is twisted.web's to find out, so no head of ours can follow it.
        self._channel.dataReceived(head.rebuilt(("connection", "close")) if head.body == CHUNKED else head.rebuilt())

    def _pass_body(self, data: bytes) -> bytes:
        """Pass bytes of a body to twisted.web; returns what follows it."""
        assert self._channel is not None
        size = len(data) if self._body == CHUNKED else min(self._body, len(data))
        if self._body != CHUNKED:
            self._body -= size
        self._channel.dataReceived(data[:size])
        return data[size:]

    def _refuse(self, refusal: Refusal) -> None:
        self._refused = True
        self.factory.count(refusal.kind)
        if self._channel is not None:
            # Responses to earlier requests may be on their way: twisted.web says 400 in their order, and closes.
            self.factory.deadlines.clear(self)
            self._channel.dataReceived(_UNREADABLE)
            return
        self.transport.write(response(refusal))
        self.transport.loseWriteConnection()
        self.factory.wake_after(self, LINGER)


class HTTPFrontendFactory(Factory):
    """Makes a `HTTPFrontend` for each accepted connection, and keeps what they share."""

    noisy = False

    def __init__(
        self,
        http_server: settings.HTTPServerSettings,
        endpoints: Mapping[str, ConnectionEndpoint],
        http: Site,
        deadlines: Deadlines,
        metrics: Metrics,
    ) -> None:
        """endpoints: by path, which is compared with the request's path as it was sent.

        http: serves every other path. deadlines: swept by the caller.
        """
        self.endpoints = endpoints
        self.http = http
        self.deadlines = deadlines
        self.header_timeout = http_server.header_timeout
        self.waiting = 0  # connections whose head is not read yet, or that were refused and have not gone
        self.serving = 0  # connections that speak HTTP with twisted.web
        self._max_header_bytes = http_server.max_header_bytes
        self._max_headers = http_server.max_headers
        self._metrics = metrics
        self._counters: dict[str, Counter] = {}
        metrics.gauge(
            "realtime_pending_connections", "Connections before the end of their first head", lambda: self.waiting
        )
        metrics.gauge("realtime_http_connections", "HTTP connections that are open", lambda: self.serving)

    def buildProtocol(self, addr: IAddress | None) -> HTTPFrontend:  # type: ignore[override]
        front = HTTPFrontend()
        front.factory = self
        return front

    def make_parser(self) -> RequestParser:
        """A parser for one head, with the limits of the settings."""
        return RequestParser(self._max_header_bytes, self._max_headers)

    def startFactory(self) -> None:
        self.http.doStart()

    def stopFactory(self) -> None:
        self.http.doStop()

    def wake_after(self, front: HTTPFrontend, seconds: float) -> None:
        """Wake `front` after so many seconds, in place of any earlier deadline."""
        self.deadlines.set(front, self.deadlines.now + seconds)

    def count(self, kind: str) -> None:
        """Count one refusal. kind: one of those that our own refusals carry, a closed set."""
        if kind == UNCOUNTED:
            return
        counter = self._counters.get(kind)
        if counter is None:
            counter = self._counters[kind] = bad_input(self._metrics, kind)
        counter.value += 1
