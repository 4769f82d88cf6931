"""Streams: HTTP responses without end, for clients whose WebSockets are blocked and for clients that only read.

The request identifies the client. The response carries all messages of the server, one chunk for each message. A
*unidirectional* stream consists of nothing else. The client of a bidirectional stream sends its commands in further
requests (`realtime.transports.emulation`). Both end with their connection.

The frontend has read and checked the request head before it makes a `StreamConnection`. From then on a stream costs as
much as a WebSocket: frames are shared between connections and written by `Outgoing`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from email.utils import formatdate
from functools import partial
from http import HTTPStatus
from typing import Any

import msgspec
from msgspec import Struct
from twisted.internet.protocol import Protocol, connectionDone
from twisted.python.failure import Failure

from realtime.config import settings
from realtime.deadlines import Deadlines
from realtime.errors import BAD_PROTOCOL, TOO_MANY_COMMANDS
from realtime.http.body import LAST_CHUNK, BodyParser, chunk
from realtime.http.cors import Headers, response_headers
from realtime.http.handshake import OpeningRequest, make_opening_request
from realtime.http.request import Refusal, RequestHead
from realtime.metrics import Metrics
from realtime.protocol import messages
from realtime.protocol.wire_formats import (
    JSON_EVENTS,
    JSON_LINES,
    JSON_PUSHES_EVENTS,
    JSON_PUSHES_LINES,
    PROTOBUF_CHUNKS,
    UNCHUNKED,
    WireFormat,
)
from realtime.transports.admission import Admission, refusal_response
from realtime.transports.connection import (
    ClientConnection,
    ConnectionContext,
    HandedConnection,
    TransportSession,
    Unsupported,
    close_code_label,
)
from realtime.transports.emulation import Emulation, HandedOrder
from realtime.transports.http_server import describe_request
from realtime.transports.outbox import QueuedBytes
from realtime.transports.outgoing import FlushAtTurnEnd
from realtime.transports.routes import CORSRoute, serve_init

BINARY = "application/octet-stream"

# Bytes that a queued message counts beside its own.
_MESSAGE_SURCHARGE = 256

_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_TIMED_OUT = Refusal(HTTPStatus.REQUEST_TIMEOUT, "the request took too long", "body_timeout")
_EMPTY = Refusal(HTTPStatus.BAD_REQUEST, "the request holds no command", "stream")
_UNREADABLE = Refusal(HTTPStatus.BAD_REQUEST, "the request is not a connect request", "stream")


class StreamKind(Struct, frozen=True):
    """One kind of stream.

    name: of its section in the configuration. methods: allowed methods of its request. A GET request has the client's
    message in the query, others in the body. wire_format: of the response. protobuf: wire format for requests with a
    Protobuf body; None if not supported. content_type: of the response. preamble: first bytes of the response's body.
    """

    name: str
    methods: tuple[str, ...]
    wire_format: WireFormat
    protobuf: WireFormat | None = None
    content_type: str = BINARY
    preamble: bytes = b""


# The preamble is an empty line, which ends no event: some proxies forward a response's head with its first body bytes.
_EVENTS = ("text/event-stream; charset=utf-8", b"\r\n")

SSE = StreamKind("sse", ("GET", "POST"), JSON_EVENTS, None, *_EVENTS)
HTTP_STREAM = StreamKind("http_stream", ("POST",), JSON_LINES, PROTOBUF_CHUNKS)
UNI_SSE = StreamKind("uni_sse", ("GET", "POST"), JSON_PUSHES_EVENTS, None, *_EVENTS)
UNI_HTTP_STREAM = StreamKind("uni_http_stream", ("POST",), JSON_PUSHES_LINES)


class HandedStream(Struct, frozen=True, array_like=True):
    """The state of a stream for another process. is_chunked: whether its response has chunks (HTTP/1.1).

    messages: received and not passed on. order: of further ones, None for a unidirectional stream.
    """

    secret: str
    is_chunked: bool
    messages: list[bytes]
    order: HandedOrder | None


class StreamConnection(ClientConnection, Protocol):
    """The connection of one stream, as its session's `Connection`. Loop thread only."""

    transport: Any
    factory: StreamContext
    form: WireFormat
    secret = ""
    _last_chunk = LAST_CHUNK  # b"" for HTTP/1.0
    _is_closing = False
    _is_paused = False  # by the session
    _is_suspended = False  # for a hand-over
    _is_receiving = False  # a message is being handled, which code of the application may block
    # Received meanwhile, and while the session was paused, or the stream congested.
    _queued_messages: deque[bytes] | None = None
    _queued_bytes = 0

    _head: RequestHead | None = None  # None from the beginning of the response on
    _body: BodyParser | None = None

    def __init__(self, context: StreamContext, kind: StreamKind) -> None:
        self.factory = context
        self._kind = kind

    def set_opening(self, head: RequestHead, max_body_size: int) -> None:
        """Set the head of the request of a new connection."""
        self._head = head
        if head.method != "GET" and head.body:
            self._body = BodyParser(head.body, max_body_size)

    # Called by the session

    @property
    def transport_name(self) -> str:
        return self._kind.name

    @property
    def is_closing(self) -> bool:
        return self._is_closing

    def close(self, code: int, reason: str) -> None:
        """Send a disconnect push after the queued frames, and end the response and the connection."""
        if self._is_closing:
            return
        self._is_closing = True
        self._count_disconnect("server", close_code_label(code))
        push = self.form.encoding.encode_push("", "disconnect", messages.DisconnectPush(code, reason))
        self.finish_writing(self.form.frame(push) + self._last_chunk)

    def pause(self) -> None:
        """Queue the client's messages, within a limit: they arrive on other connections, which are read on."""
        self._is_paused = True

    def resume(self) -> None:
        """Pass the queued messages to the session, then further ones as they arrive."""
        self._is_paused = False
        self._receive_queued()

    def _receive_queued(self) -> None:
        while self._queued_messages and not (self._is_paused or self._is_suspended or self._is_receiving):
            if self.is_congested:
                self.when_drained(self._receive_queued)
                return
            message = self._queued_messages.popleft()
            self._count_queued(-len(message) - _MESSAGE_SURCHARGE)
            self._is_receiving = True
            self._receive(message)
            self._is_receiving = False

    # Incoming messages

    def emulate(self, message: bytes) -> None:
        """Handle a message that the client sent on another connection."""
        is_blocked = self._is_paused or self._is_suspended or self.is_congested or self._is_receiving
        if not (is_blocked or self._queued_messages):
            self._is_receiving = True
            self._receive(message)
            self._is_receiving = False
            self._receive_queued()
            return
        if self.is_congested:
            self.when_drained(self._receive_queued)
        self._queue(message)
        if self._queued_bytes > self.factory.max_queued_bytes:
            self._drop_queued()
            self.factory.client_log.refuse("emulation_flood", self.describe)
            self.close(*TOO_MANY_COMMANDS)

    def _queue(self, message: bytes) -> None:
        if self._queued_messages is None:
            self._queued_messages = deque()
        self._queued_messages.append(message)
        self._count_queued(len(message) + _MESSAGE_SURCHARGE)

    def _count_queued(self, change: int) -> None:
        self._queued_bytes += change
        self.factory.queued.size += change

    def _drop_queued(self) -> None:
        if self._queued_messages is not None:
            self._queued_messages.clear()
        self._count_queued(-self._queued_bytes)

    # Hand-over

    def stop_receiving(self) -> None:
        self._is_suspended = True

    def start_receiving(self) -> None:
        self._is_suspended = False
        self._receive_queued()

    @property
    def is_held(self) -> bool:
        return self._is_receiving or super().is_held

    @property
    def is_movable(self) -> bool:
        return self._is_suspended and self._head is None and not (self._is_closing or self._is_receiving)

    def restore_form(self, form: WireFormat, state: HandedStream) -> None:
        """Set the wire format of a handed connection and its state, before it has a transport."""
        self.form, self.handed_state, self.secret = form, state, state.secret
        if not state.is_chunked:
            self._last_chunk = b""

    def _take_state(self) -> HandedStream:
        order = self.factory.emulation.hand_over(self.secret)
        state = HandedStream(self.secret, bool(self._last_chunk), list(self._queued_messages or ()), order)
        self._is_closing = True
        self._drop_queued()
        self.factory.connections -= 1
        return state

    def _restore_state(self) -> None:
        state, self.handed_state = self.handed_state, None
        self.factory.connections += 1
        self._is_suspended = True
        for message in state.messages:
            self._queue(message)
        if state.order is not None:
            self.factory.emulation.take_over(self.secret, self.emulate, self.form.encoding, state.order)
        self.transport.resumeProducing()  # to notice the end of the connection

    # The request

    def connectionMade(self) -> None:
        assert self._head is not None
        self.factory.connections += 1
        self.transport.setTcpNoDelay(True)
        if self._body is None:
            self._start_response(b"")
            return
        self.factory.deadlines.set(self, self.factory.deadlines.now + self.factory.body_timeout)
        if "100-continue" in map(str.lower, self._head.get_all("expect")):
            self.transport.write(_CONTINUE)

    def dataReceived(self, data: bytes) -> None:
        # Once the response has begun, further requests on this connection are ignored: it never ends.
        if self._body is None or self._is_closing:
            return
        body = self._body.feed(data)
        if isinstance(body, Refusal):
            self._refuse(body)
        elif body is not None:
            self._start_response(body)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.factory.connections -= 1
        self.release_place()
        self.factory.emulation.unregister(self.secret)
        self._drop_queued()
        self.stop_writing()
        self.end_session()

    def on_deadline(self) -> None:
        if self._head is not None and not self._is_closing:
            self._refuse(_TIMED_OUT)
        else:
            super().on_deadline()

    def _start_response(self, body: bytes) -> None:
        """Start the response to the complete request, and open the session with the client's first message."""
        head, kind = self._head, self._kind
        assert head is not None
        address = self.factory.admission.client_address(head, self.transport.getPeer().host)
        request, query_message = parse_opening(head, address)
        message = body or query_message
        self.form = kind.wire_format
        if kind.protobuf is not None and media_type(head) == BINARY:
            self.form = kind.protobuf
        preamble = kind.preamble
        is_chunked = head.version != "1.0"
        if not is_chunked:
            self.form, self._last_chunk = UNCHUNKED[self.form], b""
        elif preamble:
            preamble = chunk(preamble)
        if not message and not self.form.encoding.unidirectional:
            self._refuse(_EMPTY)
            return
        if self.form.encoding.unidirectional and not self._is_readable(message):
            self._refuse(_UNREADABLE)
            return
        self.factory.deadlines.clear(self)
        self._head = self._body = None
        self.factory.connects.value += 1
        self.transport.write(response_head(kind.content_type, response_headers(head), is_chunked) + preamble)
        self.start_writing()
        self.secret = self.factory.emulation.register(self.emulate, self.form.encoding, message)
        if self.open_session(request):
            self._receive(message)

    def _is_readable(self, message: bytes) -> bool:
        """Return whether a message is a connect request: the session would end the stream as soon as it began."""
        try:
            message.decode()
            self.form.encoding.decode_command(message)
        except (UnicodeDecodeError, messages.ProtocolError):
            return False
        return True

    def _receive(self, message: bytes) -> None:
        """Pass a message of the client to its session."""
        if self._session is None or self._is_closing:
            return
        self.factory.received.value += 1
        if self.form.encoding.name == "json" and not message.isascii():
            try:
                message.decode()
            except UnicodeDecodeError:
                self.factory.client_log.refuse("text", self.describe)
                self.close(*BAD_PROTOCOL)
                return
        try:
            self._session.receive(message)
        except Exception:
            self._fail_session()

    def _refuse(self, refusal: Refusal) -> None:
        """Send a refusal in place of the stream."""
        assert self._head is not None
        self._is_closing = True
        describe = partial(describe_request, self._head, self.transport.getPeer().host, self.factory.admission.proxies)
        self.factory.client_log.refuse(refusal.kind, describe, detail=refusal.reason)
        self.finish_writing(refusal_response(with_cors_headers(refusal, self._head)))


_decode_handed = msgspec.msgpack.Decoder(HandedStream).decode


class StreamEndpoint:
    """A path with streams of one kind: a `ConnectionEndpoint` of the frontend."""

    def __init__(self, context: StreamContext, kind: StreamKind, max_body_size: int) -> None:
        self._context = context
        self._kind = kind
        self._max_body_size = max_body_size
        self.transport_name = kind.name

    def check(self, head: RequestHead) -> Refusal | None:
        """Check a request's origin, head and body size, and the limits of admission; return None to accept it."""
        if not self._context.admission.origin_allowed(head):
            return Refusal(HTTPStatus.FORBIDDEN, "this origin is not allowed", "origin")
        refusal = self._check_head(head) or self._check_body(head) or self._context.admission.check()
        return refusal and with_cors_headers(refusal, head)

    def make_connection(self, head: RequestHead, transport: Any) -> StreamConnection:
        """Make the connection for a request that `check` accepted."""
        connection = StreamConnection(self._context, self._kind)
        connection.set_opening(head, self._max_body_size)
        return connection

    def restore_connection(self, handed: HandedConnection) -> StreamConnection:
        """See `HandOverEndpoint`."""
        state = _decode_handed(handed.state)
        kind = self._kind
        form = kind.wire_format if handed.encoding == kind.wire_format.encoding.name else kind.protobuf
        if form is None:
            raise Unsupported(f"no {kind.name} stream here carries {handed.encoding}")
        connection = StreamConnection(self._context, kind)
        connection.restore_form(form if state.is_chunked else UNCHUNKED[form], state)
        return connection

    def _check_head(self, head: RequestHead) -> Refusal | None:
        if head.method not in self._kind.methods:
            allow = (("Allow", ", ".join((*self._kind.methods, "OPTIONS"))),)
            return Refusal(HTTPStatus.METHOD_NOT_ALLOWED, "not by this method", "stream", allow)
        return None

    def _check_body(self, head: RequestHead) -> Refusal | None:
        if head.method == "GET":
            return None
        if any(coding.lower() not in ("", "identity") for coding in head.get_all("content-encoding")):
            return Refusal(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "the body must not be compressed", "body_encoding")
        if head.body > self._max_body_size:
            return Refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "request body too large", "body_too_large")
        return None


class StreamContext(ConnectionContext):
    """State shared by all streams of a worker. connections: number of open ones."""

    def __init__(
        self,
        open_session: Callable[[StreamConnection, OpeningRequest], TransportSession],
        tree: settings.Settings,
        deadlines: Deadlines,
        metrics: Metrics,
        admission: Admission,
        emulation: Emulation,
        queued: QueuedBytes,
        turn_end: FlushAtTurnEnd | None = None,
    ) -> None:
        """queued, turn_end: see `ConnectionContext`."""
        super().__init__(
            open_session,
            tree.websocket,
            tree.client.queue_max_size,
            deadlines,
            metrics,
            admission.client_log,
            queued,
            turn_end,
        )
        self.admission = admission
        self.emulation = emulation
        self.max_queued_bytes = tree.emulation.max_queued_bytes
        self.body_timeout = tree.http_api.body_timeout
        self.connections = 0
        admission.add_transport(lambda: self.connections)


def make_endpoints(
    tree: settings.Settings, context: StreamContext
) -> tuple[dict[str, StreamEndpoint], dict[str, CORSRoute]]:
    """Make what the settings enable, by path: the endpoints of streams, and CORS routes.

    The CORS routes answer preflight requests for the connections of all transports, and serve emulation and init.
    """
    allowed = context.admission.origin_allowed
    endpoints: dict[str, StreamEndpoint] = {}
    cors_routes: dict[str, CORSRoute] = {}
    if not tree.websocket.disabled:
        cors_routes[tree.websocket.handler_prefix] = CORSRoute(("GET",), allowed)
    if tree.uni_websocket.enabled:
        cors_routes[tree.uni_websocket.handler_prefix] = CORSRoute(("GET",), allowed)
    kinds: tuple[tuple[settings.StreamSettings, str, StreamKind], ...] = (
        (tree.sse, tree.sse.handler_prefix, SSE),
        (tree.http_stream, tree.http_stream.handler_prefix, HTTP_STREAM),
        (tree.uni_sse, tree.uni_sse.handler_prefix, UNI_SSE),
        (tree.uni_http_stream, tree.uni_http_stream.handler_prefix, UNI_HTTP_STREAM),
    )
    for branch, path, kind in kinds:
        if branch.enabled:
            endpoints[path] = StreamEndpoint(context, kind, branch.max_request_body_size)
            cors_routes[path] = CORSRoute(kind.methods, allowed)
    if tree.sse.enabled or tree.http_stream.enabled:
        cors_routes[tree.emulation.handler_prefix] = CORSRoute(
            ("POST",), allowed, context.emulation.serve, tree.emulation.max_request_body_size
        )
    if tree.init.enabled:
        cors_routes[tree.init.handler_prefix] = CORSRoute(("GET",), allowed, serve_init)
    return endpoints, cors_routes


def parse_opening(head: RequestHead, address: str) -> tuple[OpeningRequest, bytes]:
    """Return the session's view of a request, and the client's message if the query has one, else b""."""
    request = make_opening_request(head, address)
    return request, request.query.pop("cf_connect", "").encode()


def media_type(head: RequestHead) -> str:
    """Return the media type of a request's body in lower case, without parameters; "" if it is missing."""
    return next(iter(head.get_all("content-type")), "").partition(";")[0].strip(" \t").lower()


def with_cors_headers(refusal: Refusal, head: RequestHead) -> Refusal:
    """Add the CORS headers with which a page of an allowed origin can read the refusal."""
    return msgspec.structs.replace(refusal, headers=refusal.headers + response_headers(head))


def response_head(content_type: str, headers: Headers, is_chunked: bool) -> bytes:
    """Build the head of a streaming response, which must not be cached or buffered by proxies."""
    framing = ["Connection: keep-alive", "Transfer-Encoding: chunked"] if is_chunked else ["Connection: close"]
    lines = [
        "HTTP/1.1 200 OK",
        "Server: realtime",
        f"Date: {formatdate(usegmt=True)}",
        f"Content-Type: {content_type}",
        "X-Content-Type-Options: nosniff",
        "X-Accel-Buffering: no",
        "Cache-Control: private, no-cache, no-store, must-revalidate, max-age=0",
        "Pragma: no-cache",
        "Expire: 0",
        *framing,
    ]
    lines += [f"{name}: {value}" for name, value in headers]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")
