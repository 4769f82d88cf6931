"""Streams: HTTP responses that do not end, for clients whose WebSockets do not get through, and for plain readers.

The request says who the client is; the response carries everything that the server has to say, a chunk for each
message. A *unidirectional* stream has no more to it. The client of another one sends its commands by further requests
(`realtime.transports.emulation`). Either is over when its connection is.

A connection comes here from the front with its head read and judged. From then on it costs what a WebSocket costs:
frames are shared, and go out by the same way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from email.utils import formatdate
from http import HTTPStatus
from typing import Any
from typing import Protocol as Interface

import msgspec
from msgspec import Struct
from twisted.internet.protocol import Protocol, connectionDone
from twisted.logger import Logger
from twisted.python.failure import Failure

from realtime.config import settings
from realtime.deadlines import Deadlines
from realtime.errors import BAD_PROTOCOL, SERVER_ERROR, TOO_MANY_COMMANDS
from realtime.http.body import LAST_CHUNK, Body, chunk
from realtime.http.cors import Headers, sharing
from realtime.http.handshake import OpeningRequest, opening_request
from realtime.http.request import Refusal, RequestHead
from realtime.metrics import Counter, Metrics
from realtime.protocol import messages
from realtime.protocol.wire_formats import (
    JSON_EVENTS,
    JSON_LINES,
    JSON_PUSHES_EVENTS,
    JSON_PUSHES_LINES,
    PROTOBUF_CHUNKS,
    WireFormat,
)
from realtime.transports.admission import Admission, response
from realtime.transports.emulation import Emulation
from realtime.transports.http_server import CORSRoute, serve_init
from realtime.transports.outbox import QueuedBytes
from realtime.transports.outgoing import FlushAtTurnEnd, Outgoing
from realtime.transports.websocket import bad_input, why

BINARY = "application/octet-stream"

# Bytes of messages that wait while a session has enough to do, and what each counts beside its length: so two of the
# largest may wait, and not too many of the smallest.
MAX_WAITING = 128 * 1024
_COST = 256

_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_TIMED_OUT = Refusal(HTTPStatus.REQUEST_TIMEOUT, "the request took too long", "body_timeout")
_EMPTY = Refusal(HTTPStatus.BAD_REQUEST, "the request holds no command", "stream")
_KINDS = (
    *("body_timeout", "body_too_large", "body_syntax", "body_encoding", "stream", "origin"),
    *("slow", "stalled", "text", "emulation_flood"),
)

_log = Logger()


class StreamSession(Interface):
    """What this module asks of a session."""

    def receive(self, payload: bytes) -> None:
        """One whole message of the connection's encoding; if that is JSON, valid UTF-8."""

    def closed(self) -> None:
        """The connection is gone. Called once."""


class StreamKind(Struct, frozen=True):
    """One kind of stream.

    methods: of its request. With GET the client's message is in the query, else in the body. form: what the response
    is made of. binary: the same for requests that announce Protobuf, None where that is not spoken. type, opening: of
    the response, and what it begins with.
    """

    methods: tuple[str, ...]
    form: WireFormat
    binary: WireFormat | None = None
    type: str = BINARY
    opening: bytes = b""


# An empty line ends no event; it is there for proxies that pass the head on with the first bytes of the body.
_EVENTS = ("text/event-stream; charset=utf-8", chunk(b"\r\n"))

SSE = StreamKind(("GET", "POST"), JSON_EVENTS, None, *_EVENTS)
HTTP_STREAM = StreamKind(("POST",), JSON_LINES, PROTOBUF_CHUNKS)
UNI_SSE = StreamKind(("GET", "POST"), JSON_PUSHES_EVENTS, None, *_EVENTS)
UNI_HTTP_STREAM = StreamKind(("POST",), JSON_PUSHES_LINES)


class StreamConnection(Outgoing, Protocol):
    """A connection as its session sees it: `send`, `sink`, `close`, `pause`, `resume`. Loop thread only."""

    transport: Any
    factory: Streams
    form: WireFormat
    secret = ""
    _session: StreamSession | None = None
    _closing = False
    _ended = False  # we said why this connection ends
    _paused = False  # the session has enough to do
    _waiting: deque[bytes] | None = None  # what came meanwhile

    def __init__(self, streams: Streams, kind: StreamKind, head: RequestHead, max_body_size: int) -> None:
        self.factory = streams
        self._kind = kind
        self._head: RequestHead | None = head  # until the response begins
        self._body = Body(head.body, max_body_size) if head.method != "GET" and head.body else None

    # The session's side

    @property
    def is_closing(self) -> bool:
        return self._closing

    def close(self, code: int, reason: str) -> None:
        """Send a disconnect push after what is queued, and end the response and the connection."""
        if self._closing:
            return
        self._closing = True
        self._count_end("server", why(code))
        push = self.form.encoding.push("", "disconnect", messages.DisconnectPush(code, reason))
        self.end(self.form.frame(push) + LAST_CHUNK)

    def pause(self) -> None:
        """Keep back what the client sends, up to a limit. It comes by other connections than this one."""
        self._paused = True

    def resume(self) -> None:
        """Hand on what was kept back, and what comes."""
        self._paused = False
        while self._waiting and not self._paused:
            self._hear(self._waiting.popleft())

    def emulate(self, message: bytes) -> None:
        """Take a message of the client that came by another connection."""
        if not self._paused:
            self._hear(message)
            return
        if self._waiting is None:
            self._waiting = deque()
        self._waiting.append(message)
        if sum(len(one) + _COST for one in self._waiting) > MAX_WAITING:
            self._waiting.clear()
            self.factory.count("emulation_flood")
            self.close(*TOO_MANY_COMMANDS)

    # The way in

    def connectionMade(self) -> None:
        assert self._head is not None
        self.factory.connections += 1
        self.transport.setTcpNoDelay(True)
        if self._body is None:
            self._begin(b"")
            return
        self.factory.deadlines.set(self, self.factory.deadlines.now + self.factory.body_timeout)
        if "100-continue" in map(str.lower, self._head.all("expect")):
            self.transport.write(_CONTINUE)

    def dataReceived(self, data: bytes) -> None:
        # Once the response has begun, a further request on this connection would have to wait for ever.
        if self._body is None or self._closing:
            return
        body = self._body.feed(data)
        if isinstance(body, Refusal):
            self._refuse(body)
        elif body is not None:
            self._begin(body)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.factory.connections -= 1
        self.factory.emulation.leave(self.secret)
        self.lose_queue()
        session, self._session = self._session, None
        if session is None:
            return
        self._count_end("client", "")
        try:
            session.closed()
        except Exception:
            _log.failure("a session failed at the end of its connection")

    def wake(self) -> None:
        if self._head is not None and not self._closing:
            self._refuse(_TIMED_OUT)
        else:
            super().wake()

    def _begin(self, message: bytes) -> None:
        """The request is whole: begin the response, and the session with it."""
        head, kind = self._head, self._kind
        assert head is not None
        request, asked = opening(head, self.factory.admission.address(head, self.transport.getPeer().host))
        message = message or asked
        self.form = kind.binary if kind.binary is not None and media_type(head) == BINARY else kind.form
        if not message and not self.form.encoding.unidirectional:
            self._refuse(_EMPTY)
            return
        self.factory.deadlines.clear(self)
        self._head = self._body = None
        self.factory.connects.value += 1
        self.transport.write(response_head(kind.type, sharing(head)) + kind.opening)
        self.begin()
        emulated = None if self.form.encoding.unidirectional else self.emulate
        self.secret = self.factory.emulation.enter(emulated)
        try:
            self._session = self.factory.open_session(self, request)
        except Exception:
            _log.failure("a session could not be opened")
            self.close(*SERVER_ERROR)
        else:
            self._hear(message)

    def _hear(self, message: bytes) -> None:
        """Hand a message of the client to its session."""
        if self._session is None or self._closing:
            return
        self.factory.received.value += 1
        if self.form.encoding.name == "json" and not message.isascii():
            try:
                message.decode()
            except UnicodeDecodeError:
                self.factory.count("text")
                self.close(*BAD_PROTOCOL)
                return
        try:
            self._session.receive(message)
        except Exception:
            _log.failure("a session failed on a message")
            self.close(*SERVER_ERROR)

    def _refuse(self, refusal: Refusal) -> None:
        """Say no in place of the response."""
        assert self._head is not None
        self._closing = True
        self.factory.count(refusal.kind)
        self.end(response(shared(refusal, self._head)))

    def _count_end(self, by: str, code: str) -> None:
        """Count who ends this connection, the first time that it is known."""
        if not self._ended:
            self._ended = True
            self.factory.count_end(by, code)


class StreamEndpoint:
    """One path with streams of one kind. `Front` calls it."""

    def __init__(self, streams: Streams, kind: StreamKind, max_body_size: int) -> None:
        self._streams = streams
        self._kind = kind
        self._max_body_size = max_body_size

    def judge(self, head: RequestHead) -> Refusal | None:
        """Why this request gets no stream, or None."""
        if not self._streams.admission.origin_allowed(head):
            return Refusal(HTTPStatus.FORBIDDEN, "this origin is not allowed", "origin")
        refusal = self._judge_head(head) or self._judge_body(head) or self._streams.admission.judge()
        return refusal and shared(refusal, head)

    def open(self, head: RequestHead, transport: Any) -> StreamConnection:
        """A connection for a request that `judge` let in."""
        return StreamConnection(self._streams, self._kind, head, self._max_body_size)

    def _judge_head(self, head: RequestHead) -> Refusal | None:
        if head.version != "1.1":
            return Refusal(HTTPStatus.HTTP_VERSION_NOT_SUPPORTED, "a stream needs HTTP/1.1", "stream")
        if head.method not in self._kind.methods:
            allow = (("Allow", ", ".join((*self._kind.methods, "OPTIONS"))),)
            return Refusal(HTTPStatus.METHOD_NOT_ALLOWED, "not by this method", "stream", allow)
        return None

    def _judge_body(self, head: RequestHead) -> Refusal | None:
        if head.method == "GET":
            return None
        if any(coding.lower() not in ("", "identity") for coding in head.all("content-encoding")):
            return Refusal(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "the body must not be compressed", "body_encoding")
        if head.body > self._max_body_size:
            return Refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "request body too large", "body_too_large")
        return None


class Streams:
    """What all streams of a worker share; see `outgoing.Limits`. connections: how many are open."""

    def __init__(
        self,
        open_session: Callable[[StreamConnection, OpeningRequest], StreamSession],
        tree: settings.Settings,
        deadlines: Deadlines,
        metrics: Metrics,
        admission: Admission,
        emulation: Emulation,
        queued: QueuedBytes,
        ends: FlushAtTurnEnd | None = None,
    ) -> None:
        """queued: bytes that wait, over all transports. ends: of the loop's turns."""
        self.open_session = open_session
        self.deadlines = deadlines
        self.admission = admission
        self.emulation = emulation
        self.connections = 0
        admission.counts.append(lambda: self.connections)
        self.body_timeout = tree.http_api.body_timeout
        self.write_timeout = tree.websocket.write_timeout
        self.close_timeout = tree.websocket.close_timeout
        self.queue_max_size = tree.client.queue_max_size
        self.queued = queued
        self.ends = ends or FlushAtTurnEnd()
        self._metrics = metrics
        self._counters: dict[str, Counter] = {kind: bad_input(metrics, kind) for kind in _KINDS}
        self.connects = metrics.counter("realtime_connects", "Connections of clients that were opened.")
        self.received = metrics.counter("realtime_messages_received", "Messages from clients.")
        self.sent = metrics.counter("realtime_messages_sent", "Messages to clients.")

    def count(self, kind: str) -> None:
        """Count one bad input or one client that was too slow."""
        self._counters[kind].value += 1

    def count_end(self, by: str, code: str) -> None:
        """Count the end of one connection. by: "server" or "client". code: why the server ended it, of a closed set."""
        self._metrics.counter(
            "realtime_disconnects", "Connections that ended, by who ended them and why.", initiator=by, code=code
        ).value += 1


def paths(tree: settings.Settings, streams: Streams) -> tuple[dict[str, StreamEndpoint], dict[str, CORSRoute]]:
    """What is served by the settings: paths that give streams, and, by plain requests, what belongs to them.

    What a browser asks before it opens a connection of any transport is a plain request, too.
    """
    allowed = streams.admission.origin_allowed
    endpoints: dict[str, StreamEndpoint] = {}
    services: dict[str, CORSRoute] = {}
    if not tree.websocket.disabled:
        services[tree.websocket.handler_prefix] = CORSRoute(("GET",), allowed)
    if tree.uni_websocket.enabled:
        services[tree.uni_websocket.handler_prefix] = CORSRoute(("GET",), allowed)
    kinds: tuple[tuple[settings.StreamSettings, str, StreamKind], ...] = (
        (tree.sse, tree.sse.handler_prefix, SSE),
        (tree.http_stream, tree.http_stream.handler_prefix, HTTP_STREAM),
        (tree.uni_sse, tree.uni_sse.handler_prefix, UNI_SSE),
        (tree.uni_http_stream, tree.uni_http_stream.handler_prefix, UNI_HTTP_STREAM),
    )
    for branch, path, kind in kinds:
        if branch.enabled:
            endpoints[path] = StreamEndpoint(streams, kind, branch.max_request_body_size)
            services[path] = CORSRoute(kind.methods, allowed)
    if tree.sse.enabled or tree.http_stream.enabled:
        services[tree.emulation.handler_prefix] = CORSRoute(
            ("POST",), allowed, streams.emulation.serve, tree.emulation.max_request_body_size
        )
    if tree.init.enabled:
        services[tree.init.handler_prefix] = CORSRoute(("GET",), allowed, serve_init)
    return endpoints, services


def opening(head: RequestHead, address: str) -> tuple[OpeningRequest, bytes]:
    """What the session gets to know of a request, and the client's message if the query holds it."""
    request = opening_request(head, address)
    return request, request.query.pop("cf_connect", "").encode()


def media_type(head: RequestHead) -> str:
    """What a body is said to be, without parameters."""
    return next(iter(head.all("content-type")), "").partition(";")[0].strip(" \t").lower()


def shared(refusal: Refusal, head: RequestHead) -> Refusal:
    """The same, for the page of an allowed origin to read."""
    return msgspec.structs.replace(refusal, headers=refusal.headers + sharing(head))


def response_head(type: str, more: Headers) -> bytes:
    """The head of a response that no cache keeps and no proxy gathers."""
    lines = [
        "HTTP/1.1 200 OK",
        "Server: realtime",
        f"Date: {formatdate(usegmt=True)}",
        f"Content-Type: {type}",
        "X-Content-Type-Options: nosniff",
        "X-Accel-Buffering: no",
        "Cache-Control: private, no-cache, no-store, must-revalidate, max-age=0",
        "Pragma: no-cache",
        "Expire: 0",
        "Connection: keep-alive",
        "Transfer-Encoding: chunked",
    ]
    lines += [f"{name}: {value}" for name, value in more]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")
