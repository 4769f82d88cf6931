"""Protocol of the clients' port: HTTP/1.1, one request after the other, each head parsed once and strictly.

A request to an endpoint, such as a WebSocket handshake, makes a new protocol, which replaces the frontend on the
transport. All other requests go to the site (`realtime.transports.http_server`), which calls `respond` once for each.

One read may hold thousands of pipelined requests. The first is served at once; the others are served one at a time, in
slices of `STRANGER_SLICE` that all connections share, so that other clients wait for one slice. While a request is
being answered, or the peer does not read its responses, the data after it waits in a buffer of bounded size.

A refused request gets one small, complete response. Then the connection is half-closed, so that no TCP reset destroys
the response, and aborted if the peer does not close its side.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from http import HTTPStatus
from itertools import islice
from typing import Any
from typing import Protocol as Interface

from twisted.internet.interfaces import IAddress, IPushProducer
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from realtime.client_log import ClientLog
from realtime.config import settings
from realtime.deadlines import Deadlines
from realtime.http.body import BodyParser
from realtime.http.forwarded import TrustedProxies
from realtime.http.handshake import origin_fault
from realtime.http.request import CHUNKED, Refusal, RequestHead, RequestParser, parse_whole_head
from realtime.metrics import Metrics
from realtime.pubsub.time_slices import STRANGER_SLICE, TimeSlicer
from realtime.transports.admission import Admission, refusal_response
from realtime.transports.http_server import Exchange, HTTPSite, describe_request

# Seconds for a refused peer to read the response and close its side; data received meanwhile is discarded.
LINGER = 2.0

# Bytes of later requests that wait until the current one is answered. At this size the frontend stops reading.
MAX_WAITING = 65536

# Bytes of an incomplete body that any request may have, however many others there are.
SHORT_BODY = 65536

# TCP_USER_TIMEOUT (tcp(7)) of HTTP connections, in milliseconds: the kernel drops a peer that acknowledges nothing of
# a response. `loseConnection` would wait for it without limit.
HTTP_USER_TIMEOUT = 30_000

_log = Logger()

_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_TIMED_OUT = Refusal(HTTPStatus.REQUEST_TIMEOUT, "the request took too long", "head_timeout")


class ConnectionEndpoint(Interface):
    """Handler of a path whose requests take over their connection, such as WebSocket handshakes."""

    def check(self, head: RequestHead) -> Refusal | None:
        """Check a request; return None to accept it. Called once for each request."""

    def make_connection(self, head: RequestHead, transport: Any) -> Protocol:
        """Make the protocol for a request that `check` accepted; it gets the data after the head."""


@implementer(IPushProducer)
class HTTPFrontend(Protocol):
    """Protocol of a connection until an endpoint takes it over, and of HTTP connections until their end."""

    factory: HTTPFrontendFactory
    transport: Any
    is_known = False  # the peer may be a stranger, see `selector.Guest`
    deadline_bucket = 0  # see DeadlineOwner
    _parser: RequestParser | None = None  # of a head that did not arrive in one piece
    _body: BodyParser | None = None  # of the current request, while it arrives
    _body_bytes = 0  # bytes of it that are kept
    _exchange: Exchange | None = None  # the current request, until it is answered
    _waiting = b""  # data after the current request
    _is_scheduled = False  # waiting for a turn in the slices
    _is_congested = False  # the peer does not read its responses
    _is_reading_paused = False
    _is_refused = False  # the last response is written; further data is discarded
    _is_lost = False
    _idle_since = -1.0  # loop time, if the deadline is that of an idle connection from then on
    _is_http = False  # the connection has had a request for the site
    _address = ""  # the client's, counted towards the limit of each address
    _peer = ""

    def connectionMade(self) -> None:
        factory = self.factory
        factory.pending += 1
        factory.set_deadline(self, factory.header_timeout)
        factory.make_room()
        factory.idle[self] = None

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        factory = self.factory
        self._is_lost = True
        factory.deadlines.clear(self)
        factory.idle.pop(self, None)
        factory.release_address(self._address)
        if self._is_http:
            factory.serving -= 1
        else:
            factory.pending -= 1
        exchange, self._exchange = self._exchange, None
        self._waiting = b""
        if self._body_bytes:
            self._count_body(0)
        if exchange is not None:
            exchange.abandon()

    def dataReceived(self, data: bytes) -> None:
        if self._is_refused:
            return
        # A connection's first request goes first: it may be a client's handshake.
        if not (self._is_scheduled or self._is_congested or (self._exchange is not None and self._body is None)) and (
            not self._is_http or not (pipelines := self.factory.pipelines).is_timed or pipelines.has_time
        ):
            end = self._step(data, 0)
            if end < len(data) and not self._is_refused and self.transport.protocol is self:
                self._waiting = data[end:] + self._waiting
                if not (self._is_answering or self._is_congested):
                    self._schedule()
            return
        if not (self._is_congested or self._is_answering):
            self._schedule()
        self._waiting += data
        if len(self._waiting) >= MAX_WAITING and not self._is_reading_paused:
            self._is_reading_paused = True
            self.transport.pauseProducing()

    @property
    def is_movable(self) -> bool:
        """Whether nothing of a request has been received that is not answered."""
        return not (self._parser or self._waiting or self._exchange or self._is_scheduled or self._is_lost)

    def hand_over(self) -> int:
        """End here, without an end for the peer; return the descriptor of the socket."""
        descriptor: int = self.transport.detach()[0]  # nothing is unsent: that would keep the frontend from being idle
        self.connectionLost()
        return descriptor

    def abort(self) -> None:
        """End the connection at once, without a response."""
        self.transport.abortConnection()

    def on_deadline(self) -> None:
        """Refuse a request that is not complete in time; close an idle connection; abort a refused one."""
        if self._is_refused:
            self.transport.abortConnection()
        elif self._body is not None and self._exchange is not None:
            self._exchange.refuse_body("body_timeout")
        elif self._exchange is not None or self._is_scheduled:
            return
        elif self._parser is not None:
            self._refuse(_TIMED_OUT)
        else:
            if not self._is_http:
                self.factory.client_log.refuse(_TIMED_OUT.kind, lambda: {"address": self.peer})
            self.transport.loseConnection()

    # Called by the exchange

    @property
    def peer(self) -> str:
        """Address of the connection's peer, possibly a proxy's."""
        if not self._peer:
            self._peer = getattr(self.transport.getPeer(), "host", "")
        return self._peer

    def answered(self, response: bytes, close: bool) -> None:
        """Write the response to the current request; go on with the next one, unless `close`."""
        if self._is_lost:
            return
        if close:
            self.end_with(response)
            return
        self.transport.write(response)
        self.go_on()

    def go_on(self) -> None:
        """Serve the next request, once the transport has written the response to the last one."""
        self._exchange = self._body = None
        transport = self.transport
        if self._is_lost:
            return
        if transport.is_buffering:
            # The peer does not read its responses: it gets no more of them until it does.
            self._is_congested = True
            transport.registerProducer(self, True)
            transport.pause_producer_if_buffering()
        elif self._waiting:
            self._schedule()
        elif not self._is_scheduled:
            self._await_request()

    def end_with(self, response: bytes) -> None:
        """Write the last response of the connection, and close it once the peer has read it."""
        self._is_refused = True
        self._exchange = self._body = self._parser = None
        if self._body_bytes:
            self._count_body(0)
        self._waiting = b""
        self.factory.idle.pop(self, None)
        if response:
            self.transport.write(response)
        self.transport.loseWriteConnection()
        self.factory.set_deadline(self, LINGER)

    # IPushProducer: registered only while the peer does not read its responses

    def pauseProducing(self) -> None:
        """Do nothing: no request is served while this producer is registered."""

    def resumeProducing(self) -> None:
        """Go on: the transport has written all responses."""
        if self._is_congested:
            self._is_congested = False
            self.transport.unregisterProducer()
            self.go_on()

    def stopProducing(self) -> None:
        """Do nothing: `connectionLost` follows."""

    # Requests

    @property
    def _is_answering(self) -> bool:
        """Whether the current request is complete and not answered."""
        return self._exchange is not None and self._body is None

    def _schedule(self) -> None:
        """Serve the waiting data in the slices of the pipelines."""
        if not self._is_scheduled:
            self._is_scheduled = True
            self.factory.idle.pop(self, None)
            self.factory.pipelines.add(self.factory.charge(self._serve_waiting()))

    def _serve_waiting(self) -> Iterator[None]:
        """Serve the waiting requests, one in each step, until one is not answered at once."""
        data, self._waiting = self._waiting, b""  # data that arrives from now on comes after this data
        start = 0
        self._resume_reading()
        while start < len(data) and not (self._is_refused or self._is_lost):
            if self._is_answering or self._is_congested:
                self._waiting = data[start:] + self._waiting
                break
            try:
                start = self._step(data, start)
            except Exception:
                _log.failure("serving a connection raised an exception; closing it")
                self.transport.abortConnection()
                return
            if self.transport.protocol is not self:
                return
            yield
        self._is_scheduled = False
        if not (self._exchange or self._is_congested or self._is_refused or self._is_lost):
            self.go_on()
        elif self._waiting and self._body is not None:
            self._schedule()

    def _step(self, data: bytes, start: int) -> int:
        """Take a head or a part of a body from `data`; return the place after it."""
        if self._body is not None:
            return self._read_body(data, start)
        factory = self.factory
        end = len(data)
        if self._parser is None:
            found = parse_whole_head(data, start, factory.max_header_bytes, factory.max_headers)
            if found is not None:
                head, end = found
                return self._route(head, data, end)
            self._parser = RequestParser(factory.max_header_bytes, factory.max_headers, factory.max_query_parameters)
            factory.set_deadline(self, factory.header_timeout)
        verdict = self._parser.feed(data[start:])
        if verdict is None:
            return end
        if isinstance(verdict, Refusal):
            self._refuse(verdict)
            return end
        end -= len(self._parser.trailing_data)
        self._parser = None
        return self._route(verdict, data, end)

    def _route(self, head: RequestHead, data: bytes, end: int) -> int:
        """Serve the request of this head. end: the place after it in `data`. Returns the place of the next request."""
        factory = self.factory
        factory.idle.pop(self, None)
        if not self._is_http:
            refusal = factory.check_first(self, head)
            if refusal is not None:
                self._refuse(refusal, head)
                return len(data)
        # The site answers preflight requests; the browser may send the request itself on the same connection.
        endpoint = factory.endpoints.get(head.path)
        if endpoint is not None and head.method != "OPTIONS":
            self._switch_protocol(endpoint, head, data[end:])
            return len(data)
        if not self._is_http:
            self._become_http()
        exchange = self._exchange = Exchange(self, factory.http, head, factory.is_draining or head.is_last)
        if not head.body:
            exchange.serve(b"")
        elif exchange.accepts_body():
            whole_end = end + head.body
            if end < whole_end <= len(data):  # the short path for a body that came with its head
                exchange.serve(data[end:whole_end])
                return whole_end
            self._body = BodyParser(head.body, exchange.max_body_size or (1 << 62))
            factory.set_deadline(self, factory.http.settings.body_timeout)
            if head.version == "1.1" and head.get("expect").lower() == "100-continue" and end == len(data):
                self.transport.write(_CONTINUE)
            if end < len(data):
                return self._read_body(data, end)
        return end

    def _read_body(self, data: bytes, start: int) -> int:
        """Take a part of the current body from `data`; return the place after it."""
        body, exchange = self._body, self._exchange
        assert body is not None and exchange is not None
        size = exchange.head.body
        # No request follows a chunked body.
        end = len(data) if size == CHUNKED else min(len(data), start + body.missing)
        verdict = body.feed(data[start:end])
        if isinstance(verdict, Refusal):
            exchange.refuse_body(verdict.kind)
        elif verdict is not None:
            self._count_body(0)
            self._body = None
            exchange.serve(verdict)
        elif not self._count_body(body.received):
            exchange.refuse_body("body_memory")
        return end

    def _count_body(self, size: int) -> bool:
        """Count `size` bytes of an incomplete body; return whether there is room for them."""
        factory = self.factory
        factory.body_bytes += size - self._body_bytes
        self._body_bytes = size
        return size <= SHORT_BODY or factory.body_bytes <= factory.max_body_bytes

    def _become_http(self) -> None:
        """Count the connection among those of the site, and set it up for responses."""
        self._is_http = True
        self.factory.pending -= 1
        self.factory.serving += 1
        self.transport.getHandle().setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, HTTP_USER_TIMEOUT)

    def _await_request(self) -> None:
        """Wait for the next request on a kept-alive connection."""
        factory = self.factory
        now = factory.deadlines.now
        if now != self._idle_since:  # loop time advances a few times a second
            factory.set_deadline(self, factory.keepalive_timeout)
            self._idle_since = now
        factory.idle[self] = None
        if self._is_reading_paused:
            self._resume_reading()

    def _resume_reading(self) -> None:
        if self._is_reading_paused:
            self._is_reading_paused = False
            self.transport.resumeProducing()

    def _switch_protocol(self, endpoint: ConnectionEndpoint, head: RequestHead, data: bytes) -> None:
        """Replace this protocol by a connection of `endpoint`, if that accepts the request. data: after the head."""
        factory = self.factory
        refusal = endpoint.check(head)
        if refusal is not None:
            self._refuse(refusal, head)
            return
        transport = self.transport
        self._resume_reading()
        factory.deadlines.clear(self)
        connection: Any = endpoint.make_connection(head, transport)
        if self._is_http:
            factory.serving -= 1
            transport.getHandle().setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 0)
        else:
            factory.pending -= 1
        if self._address:
            connection.release_address = factory.address_releaser(self._address)
        transport.protocol = connection
        connection.makeConnection(transport)
        data += self._waiting
        if data:
            connection.dataReceived(data)

    def _refuse(self, refusal: Refusal, head: RequestHead | None = None) -> None:
        """Refuse a request. head: None if it is incomplete or malformed."""
        kind = origin_fault(head) if head is not None and refusal.kind == "origin" else refusal.kind
        self.factory.client_log.refuse(kind, partial(self._describe, head), detail=refusal.reason)
        self.end_with(refusal_response(refusal))

    def _describe(self, head: RequestHead | None) -> dict[str, object]:
        return {"address": self.peer} if head is None else describe_request(head, self.peer, self.factory.proxies)


class HTTPFrontendFactory(Factory):
    """Makes an `HTTPFrontend` for each accepted connection.

    protocol: `HTTPFrontend` or a subclass. pending: connections before the end of their first head, or refused and not
    closed yet. serving: connections with requests for the site. body_bytes: of incomplete bodies. idle: the connections
    without a current request, the longest idle one first. is_draining: each connection ends with its next response.
    client_log: counts and logs refusals. proxies: the trusted proxies.
    """

    noisy = False
    protocol: type[HTTPFrontend] = HTTPFrontend  # type: ignore[assignment]

    def __init__(
        self,
        http_server: settings.HTTPServerSettings,
        endpoints: Mapping[str, ConnectionEndpoint],
        http: HTTPSite,
        deadlines: Deadlines,
        metrics: Metrics,
        reactor: Any,
        admission: Admission | None = None,
        charge: Callable[[Iterator[None]], Iterator[None]] = lambda steps: steps,
        slices: TimeSlicer | None = None,
    ) -> None:
        """endpoints: by path, compared with the request's path as sent, without decoding.

        http: serves all other paths. deadlines: the caller sweeps them. admission: its limits; None for none.
        charge: charges the steps of pipelined requests to an account. slices: for these.
        """
        self.endpoints = endpoints
        self.http = http
        self.deadlines = deadlines
        self.header_timeout = http_server.header_timeout
        self.keepalive_timeout = http_server.keepalive_timeout
        self.max_header_bytes = http_server.max_header_bytes
        self.max_headers = http_server.max_headers
        self.max_query_parameters = http_server.max_query_parameters
        self.max_body_bytes = http_server.max_queued_body_bytes
        self.body_bytes = 0
        self.pending = 0
        self.serving = 0
        self.idle: dict[HTTPFrontend, None] = {}
        self.charge = charge
        self.pipelines = slices or TimeSlicer(reactor.seconds, STRANGER_SLICE, lambda run: reactor.callLater(0, run))
        self._admission = admission
        self.is_draining = False
        self.client_log = admission.client_log if admission is not None else ClientLog(metrics)
        self.proxies = admission.proxies if admission is not None else TrustedProxies(())
        metrics.gauge(
            "realtime_pending_connections", "Connections before the end of their first head", lambda: self.pending
        )
        metrics.gauge(
            "realtime_http_body_bytes", "Bytes of request bodies that are not complete.", lambda: self.body_bytes
        )
        metrics.gauge("realtime_http_connections", "HTTP connections that are open", lambda: self.serving)
        self._dropped = metrics.counter(
            "realtime_http_connections_dropped", "Idle HTTP connections that were closed to make room for new ones"
        )
        if admission is not None:
            admission.add_idle(lambda: self.pending + self.serving, self._drop_oldest)

    def buildProtocol(self, addr: IAddress | None) -> HTTPFrontend:  # type: ignore[override]
        frontend = self.protocol()
        frontend.factory = self
        return frontend

    @property
    def is_busy(self) -> bool:
        """Whether a request is being answered."""
        return self.pending + self.serving > len(self.idle)

    def start_draining(self) -> None:
        """Announce the end of each connection with its next response."""
        self.is_draining = True

    def take_idle(self, limit: int) -> list[int]:
        """Give up idle connections to another process, which serves them from their next request on.

        Returns the descriptors of `limit` of them at most.
        """
        movable = list(islice((frontend for frontend in self.idle if frontend.is_movable), limit))
        return [frontend.hand_over() for frontend in movable]

    def make_room(self) -> None:
        """Close the longest idle connection if a new one makes too many."""
        if self._admission is not None:
            self._admission.make_room()

    def check_first(self, frontend: HTTPFrontend, head: RequestHead) -> Refusal | None:
        """Check the first request of a connection by the limit of its client's address."""
        if self._admission is None or frontend._address:
            return None
        address, refusal = self._admission.take_address(head, frontend.transport)
        frontend._address = address
        return refusal

    def release_address(self, address: str) -> None:
        """Count one connection less of a client's address; "" is none."""
        if address and self._admission is not None:
            self._admission.release_address(address)

    def address_releaser(self, address: str) -> Callable[[], None]:
        """Return a function that calls `release_address`."""
        return lambda: self.release_address(address)

    def set_deadline(self, frontend: HTTPFrontend, seconds: float) -> None:
        """Set the deadline of `frontend` to this number of seconds from now, in place of its earlier one."""
        self.deadlines.set(frontend, self.deadlines.now + seconds)
        frontend._idle_since = -1.0

    def _drop_oldest(self) -> bool:
        """Close the connection that has been idle longest; return False if none is."""
        frontend = next(iter(self.idle), None)
        if frontend is None:
            return False
        del self.idle[frontend]
        self._dropped.value += 1
        self.client_log.refuse("idle", lambda: {"address": frontend.peer})
        frontend.transport.loseConnection()
        return True
