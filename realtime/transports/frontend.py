"""Protocol of the clients' port: it parses each request head once, strictly, and routes the request by its path.

A request to an endpoint, such as a WebSocket handshake, makes a new protocol, which replaces the frontend on the
transport. All other requests go to twisted.web, one after the other: bodies are forwarded unchanged, and each head of a
kept-alive connection is parsed like the first. twisted.web gets heads rebuilt from the accepted fields.

A refused request gets one small, complete response. Then the connection is half-closed, so that no TCP reset destroys
the response, and aborted if the peer does not close its side.
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
from realtime.metrics import Counter, Metrics, bad_input_counter
from realtime.transports.admission import refusal_response

# Seconds for a refused peer to read the response and close its side; data received meanwhile is discarded.
LINGER = 2.0

# TCP_USER_TIMEOUT (tcp(7)) of connections in twisted.web, in milliseconds: the kernel drops a peer that acknowledges
# nothing of a response. `loseConnection` would wait for it without limit.
HTTP_USER_TIMEOUT = 30_000

# An invalid request line, which makes twisted.web respond with 400 and close.
_INVALID_REQUEST_LINE = b"\0\r\n"

_TIMED_OUT = Refusal(HTTPStatus.REQUEST_TIMEOUT, "the request took too long", "head_timeout")
_PIPELINED = Refusal(HTTPStatus.BAD_REQUEST, "an earlier request is still being answered", "pipelined")


class ConnectionEndpoint(Interface):
    """Handler of a path whose requests take over their connection, such as WebSocket handshakes."""

    def check(self, head: RequestHead) -> Refusal | None:
        """Check a request; return None to accept it. Called once for each request."""

    def make_connection(self, head: RequestHead, transport: Any) -> Protocol:
        """Make the protocol for a request that `check` accepted; it gets the data after the head."""


class DetachableHTTPChannel(Interface):
    """A twisted.web channel that can give up its transport, see `realtime.transports.http_server.HTTPConnection`."""

    def makeConnection(self, transport: Any) -> None: ...
    def dataReceived(self, data: bytes) -> None: ...
    def connectionLost(self, reason: Failure) -> None: ...

    def detach(self) -> bool:
        """Give up the transport for good; return False, and keep it, while a request is being answered."""


class HTTPFrontend(Protocol):
    """Protocol of a connection until an endpoint takes it over, and of HTTP connections until their end."""

    factory: HTTPFrontendFactory
    transport: Any
    deadline_bucket = 0  # see DeadlineOwner
    _parser: RequestParser | None = None  # of the current head
    _is_refused = False  # a refusal was written; further data is discarded
    _channel: DetachableHTTPChannel | None = None  # set while requests of the connection go to twisted.web
    _body_left = 0  # bytes missing of the current request's body, or CHUNKED

    def connectionMade(self) -> None:
        self.factory.pending += 1
        self._start_head()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.factory.deadlines.clear(self)
        if self._channel is None:
            self.factory.pending -= 1
        else:
            self.factory.serving -= 1
            self._channel.connectionLost(reason)

    def dataReceived(self, data: bytes) -> None:
        while data and not self._is_refused:
            data = self._forward_body(data) if self._body_left else self._read_head(data)

    def on_deadline(self) -> None:
        """Refuse a head that is not complete in time; abort a refused connection that the peer does not close."""
        if self._is_refused:
            self.transport.abortConnection()
        elif self._parser is not None and self._parser.has_started:
            self._refuse(_TIMED_OUT)
        else:
            self.factory.count_bad_input(_TIMED_OUT.kind)
            self.transport.loseConnection()

    def _start_head(self) -> RequestParser:
        self.factory.set_deadline(self, self.factory.header_timeout)
        self._parser = self.factory.make_parser()
        return self._parser

    def _read_head(self, data: bytes) -> bytes:
        """Parse a head, or a part of it, and route the request; return the data after the head."""
        parser = self._parser or self._start_head()
        head = parser.feed(data)
        if head is None:
            return b""
        if isinstance(head, Refusal):
            self._refuse(head)
            return b""
        self._parser = None
        self.factory.deadlines.clear(self)
        endpoint = self.factory.endpoints.get(head.path)
        # twisted.web answers preflight requests; the browser may send the request itself on the same connection.
        if endpoint is not None and head.method != "OPTIONS":
            self._switch_protocol(endpoint, head, parser.trailing_data)
            return b""
        self._forward_head(head)
        return parser.trailing_data

    def _switch_protocol(self, endpoint: ConnectionEndpoint, head: RequestHead, data: bytes) -> None:
        """Replace this protocol by a connection of `endpoint`, if that accepts the request. data: after the head."""
        if self._channel is not None and not self._detach_http(self._channel):
            self._refuse(_PIPELINED)
            return
        refusal = endpoint.check(head)
        if refusal is not None:
            self._refuse(refusal)
            return
        transport = self.transport
        connection = endpoint.make_connection(head, transport)
        self.factory.pending -= 1
        transport.protocol = connection
        connection.makeConnection(transport)
        if data:
            connection.dataReceived(data)

    def _detach_http(self, channel: DetachableHTTPChannel) -> bool:
        """Take the transport back from twisted.web; return False while it is still answering a request."""
        if not channel.detach():
            return False
        self._channel = None
        self.factory.serving -= 1
        self.factory.pending += 1
        self.transport.getHandle().setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 0)
        return True

    def _forward_head(self, head: RequestHead) -> None:
        """Pass the head of a request to twisted.web, and attach that to the connection for the first one."""
        if self._channel is None:
            self.factory.pending -= 1
            self.factory.serving += 1
            self.transport.getHandle().setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, HTTP_USER_TIMEOUT)
            self._channel = self.factory.http.buildProtocol(self.transport.getPeer())
            assert self._channel is not None
            self._channel.makeConnection(self.transport)
        self._body_left = head.body
        # twisted.web alone parses the chunks, so the end of a chunked body is unknown here: no further head can follow.
        self._channel.dataReceived(head.to_bytes(("connection", "close")) if head.body == CHUNKED else head.to_bytes())

    def _forward_body(self, data: bytes) -> bytes:
        """Pass data of a body to twisted.web; return the data after the body."""
        assert self._channel is not None
        size = len(data) if self._body_left == CHUNKED else min(self._body_left, len(data))
        if self._body_left != CHUNKED:
            self._body_left -= size
        self._channel.dataReceived(data[:size])
        return data[size:]

    def _refuse(self, refusal: Refusal) -> None:
        self._is_refused = True
        self.factory.count_bad_input(refusal.kind)
        if self._channel is not None:
            # Responses to earlier requests may be pending: twisted.web responds with 400 in order, and closes.
            self.factory.deadlines.clear(self)
            self._channel.dataReceived(_INVALID_REQUEST_LINE)
            return
        self.transport.write(refusal_response(refusal))
        self.transport.loseWriteConnection()
        self.factory.set_deadline(self, LINGER)


class HTTPFrontendFactory(Factory):
    """Makes an `HTTPFrontend` for each accepted connection.

    pending: connections before the end of their first head, or refused and not closed yet. serving: HTTP connections in
    twisted.web.
    """

    noisy = False

    def __init__(
        self,
        http_server: settings.HTTPServerSettings,
        endpoints: Mapping[str, ConnectionEndpoint],
        http: Site,
        deadlines: Deadlines,
        metrics: Metrics,
    ) -> None:
        """endpoints: by path, compared with the request's path as sent, without decoding.

        http: serves all other paths. deadlines: the caller sweeps them.
        """
        self.endpoints = endpoints
        self.http = http
        self.deadlines = deadlines
        self.header_timeout = http_server.header_timeout
        self.pending = 0
        self.serving = 0
        self._max_header_bytes = http_server.max_header_bytes
        self._max_headers = http_server.max_headers
        self._metrics = metrics
        self._counters: dict[str, Counter] = {}
        metrics.gauge(
            "realtime_pending_connections", "Connections before the end of their first head", lambda: self.pending
        )
        metrics.gauge("realtime_http_connections", "HTTP connections that are open", lambda: self.serving)

    def buildProtocol(self, addr: IAddress | None) -> HTTPFrontend:  # type: ignore[override]
        frontend = HTTPFrontend()
        frontend.factory = self
        return frontend

    def make_parser(self) -> RequestParser:
        """Make a parser for one head, with the limits of the settings."""
        return RequestParser(self._max_header_bytes, self._max_headers)

    def startFactory(self) -> None:
        self.http.doStart()

    def stopFactory(self) -> None:
        self.http.doStop()

    def set_deadline(self, frontend: HTTPFrontend, seconds: float) -> None:
        """Set the deadline of `frontend` to this number of seconds from now, in place of its earlier one."""
        self.deadlines.set(frontend, self.deadlines.now + seconds)

    def count_bad_input(self, kind: str) -> None:
        """Count one refusal, unless its kind is UNCOUNTED. kind: `Refusal.kind`, from a closed set."""
        if kind == UNCOUNTED:
            return
        counter = self._counters.get(kind)
        if counter is None:
            counter = self._counters[kind] = bad_input_counter(self._metrics, kind)
        counter.value += 1
