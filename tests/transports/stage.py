"""A frontend with echo sessions on a real port, and raw clients. The reactor is real, deadlines are not."""

from __future__ import annotations

import socket
import struct
import zlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from twisted.internet import reactor, task
from twisted.internet.defer import Deferred
from twisted.internet.protocol import ClientFactory, Protocol, connectionDone
from twisted.logger import LogEvent, globalLogPublisher
from twisted.python.failure import Failure

from realtime.config import settings
from realtime.deadlines import RESOLUTION, Deadlines
from realtime.handlers.coroutines import drive
from realtime.handlers.results import PreparedResponse
from realtime.http.handshake import OpeningRequest
from realtime.http.hosts import HostNames
from realtime.http.request import Refusal, RequestHead
from realtime.metrics import Metrics
from realtime.process.transport import DirectServer
from realtime.transports.admission import Admission
from realtime.transports.frontend import HTTPFrontend, HTTPFrontendFactory
from realtime.transports.http_server import Exchange, HTTPSite
from realtime.transports.websocket import (
    UNIDIRECTIONAL_WIRE_FORMATS,
    WIRE_FORMATS,
    WebSocketConnection,
    WebSocketFactory,
)

PATH = "/connection/websocket"
KEY = "dGhlIHNhbXBsZSBub25jZQ=="
ACCEPT = "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="  # the example of RFC 6455 section 1.3


def handshake(*more: str, path: str = PATH, host: str = "localhost") -> bytes:
    """Build a valid opening handshake. more: further header lines."""
    lines = [
        f"GET {path} HTTP/1.1",
        f"Host: {host}",
        "Upgrade: websocket",
        "Connection: Upgrade",
        "Sec-WebSocket-Version: 13",
        f"Sec-WebSocket-Key: {KEY}",
        *more,
    ]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def frame(
    opcode: int, payload: bytes = b"", fin: bool = True, rsv: int = 0, mask: bytes | None = b"\x01\x02\x03\x04"
) -> bytes:
    """Build a client's frame (RFC 6455 section 5.2)."""
    length = len(payload)
    first = (0x80 if fin else 0) | rsv << 4 | opcode
    flag = 0 if mask is None else 0x80
    if length < 126:
        head = struct.pack("!BB", first, flag | length)
    elif length < 65536:
        head = struct.pack("!BBH", first, flag | 126, length)
    else:
        head = struct.pack("!BBQ", first, flag | 127, length)
    if mask is None:
        return head + payload
    key = (mask * (length // 4 + 1))[:length]
    masked = (int.from_bytes(payload, "big") ^ int.from_bytes(key, "big")).to_bytes(length, "big")
    return head + mask + masked


def text(payload: str) -> bytes:
    return frame(1, payload.encode())


def frames_in(data: bytes) -> list[tuple[int, bytes]]:
    """Parse the complete server frames in `data`: (opcode, inflated payload)."""
    frames = []
    start = 0
    while len(data) - start >= 2:
        opcode, is_compressed, length, body = data[start] & 15, data[start] & 0x40, data[start + 1], start + 2
        if length == 126:
            length, body = int.from_bytes(data[body : body + 2], "big"), body + 2
        elif length == 127:
            length, body = int.from_bytes(data[body : body + 8], "big"), body + 8
        if body + length > len(data):
            break
        payload = bytes(data[body : body + length])
        if is_compressed:
            payload = zlib.decompressobj(-15).decompress(payload + b"\x00\x00\xff\xff")
        frames.append((opcode, payload))
        start = body + length
    return frames


async def eventually(condition: Callable[[], bool]) -> None:
    """Run the reactor until `condition` holds; the timeout of the test limits the wait."""
    await task.deferLater(reactor, 0)
    while not condition():
        await task.deferLater(reactor, 0.002)


class Client(Protocol):
    """A raw TCP peer; it records received data, and whether the connection is lost."""

    def __init__(self) -> None:
        self.received = bytearray()
        self.lost = False

    def dataReceived(self, data: bytes) -> None:
        self.received += data

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.lost = True

    def send(self, data: bytes) -> None:
        self.transport.write(data)

    def leave(self) -> None:
        self.transport.loseConnection()

    @property
    def response(self) -> bytes:
        """Head of the first HTTP response."""
        return bytes(self.received.partition(b"\r\n\r\n")[0])

    @property
    def status(self) -> int:
        """Status of the first HTTP response; 0 while there is none."""
        return int(self.received[9:12] or 0)

    @property
    def frames(self) -> list[tuple[int, bytes]]:
        """Frames after the response to the handshake."""
        return frames_in(bytes(self.received.partition(b"\r\n\r\n")[2]))

    @property
    def texts(self) -> list[str]:
        return [payload.decode() for opcode, payload in self.frames if opcode == 1]

    @property
    def close(self) -> tuple[int, str] | None:
        """Code and reason of the server's close frame; None before it."""
        for opcode, payload in self.frames:
            if opcode == 8:
                return int.from_bytes(payload[:2], "big"), payload[2:].decode()
        return None

    async def closed(self) -> tuple[int, str]:
        """Wait for the server's close frame."""
        await eventually(lambda: self.close is not None)
        assert self.close is not None
        return self.close

    async def echo(self, message: str) -> None:
        """Send a message and wait for its echo."""
        self.send(text(message))
        await eventually(lambda: message in self.texts)


class Echo:
    """A session that echoes messages; "raise" and "close" make it do so."""

    def __init__(self, connection: WebSocketConnection, request: OpeningRequest) -> None:
        self.connection = connection
        self.request = request
        self.received: list[bytes] = []
        self.ends = 0

    def receive(self, payload: bytes) -> None:
        self.received.append(payload)
        if payload == b"raise":
            raise RuntimeError("a bug in the session")
        if payload == b"close":
            self.connection.close(3001, "shutdown")
        else:
            self.connection.send(payload)

    def closed(self) -> None:
        self.ends += 1


class Page:
    """Router that answers each request with its path and body, and /large with 16 MB. pending: unanswered /later."""

    def __init__(self) -> None:
        self.pending: list[Exchange] = []

    def resolve(self, head: RequestHead) -> Callable[[Exchange], None]:
        return self._answer

    def _answer(self, exchange: Exchange) -> None:
        path = exchange.head.path.encode()
        if path == b"/later":
            self.pending.append(exchange)
            return
        body = b"x" * 16_000_000 if path == b"/large" else b"page " + path + b" " + exchange.body
        exchange.respond(PreparedResponse(200, body, "text/plain"))

    def max_body_size(self, path: str) -> int:
        return 1 << 20

    def cors_headers(self, head: RequestHead) -> tuple[tuple[str, str], ...]:
        return ()


class Stage:
    """The server of a test. sessions: all opened sessions, in order."""

    def __init__(
        self,
        http_server: settings.HTTPServerSettings,
        websocket: settings.WebSocketSettings | settings.UniWebSocketSettings,
        client: settings.ClientSettings,
    ) -> None:
        self.now = 0.0
        self.path = websocket.handler_prefix
        self.deadlines = Deadlines(self.now)
        self.metrics = Metrics()
        self.sessions: list[Echo] = []
        self.failures: list[LogEvent] = []
        self.make_session: Callable[[WebSocketConnection, OpeningRequest], Any] = Echo
        self.refusal: Refusal | None = None  # of all handshakes, if set
        self.admission = Admission(
            client, self.metrics, lambda: self.now, lambda: self.refusal, own_names=HostNames(["named.example"])
        )
        self.websocket = WebSocketFactory(
            self._open_session,
            websocket,
            client,
            self.deadlines,
            self.metrics,
            reactor,
            self.admission,
            wire_formats=(
                WIRE_FORMATS if isinstance(websocket, settings.WebSocketSettings) else UNIDIRECTIONAL_WIRE_FORMATS
            ),
        )
        endpoints = {websocket.handler_prefix: self.websocket}
        self.page = Page()
        site = HTTPSite(self.page, settings.HTTPAPISettings(), self.metrics, drive)
        self.front = HTTPFrontendFactory(
            http_server, endpoints, site, self.deadlines, self.metrics, reactor, self.admission
        )
        self.fronts: list[HTTPFrontend] = []  # of all connections
        build = self.front.buildProtocol

        def build_and_keep(address: Any) -> HTTPFrontend:
            self.fronts.append(build(address))
            return self.fronts[-1]

        self.front.buildProtocol = build_and_keep  # type: ignore[method-assign]
        self._port = reactor.listenTCP(0, self.front, interface="127.0.0.1")
        self._port.transport = DirectServer
        self._port.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # as the supervisor does
        self.port = self._port.getHost().port

    def _open_session(self, connection: WebSocketConnection, request: OpeningRequest) -> Any:
        session = self.make_session(connection, request)
        self.sessions.append(session)
        return session

    def advance(self, seconds: float) -> None:
        """Advance the time of the deadlines."""
        end = self.now + seconds
        while self.now < end:
            self.now += RESOLUTION
            self.deadlines.sweep(self.now)

    def count(self, kind: str) -> int:
        """Return the counter of this kind of bad input."""
        return self.metrics.counter("realtime_bad_input", "", kind=kind).value

    def gauge(self, name: str) -> float:
        return next(sample.value for sample in self.metrics.snapshot() if sample.name == name)

    @property
    def idle(self) -> bool:
        """Whether no state of any connection is left."""
        return (
            self.front.pending == 0
            and self.front.serving == 0
            and self.websocket.connections == 0
            and self.websocket.queued.size == 0
            and all(session.ends == 1 for session in self.sessions)
            and not self.deadlines._buckets
        )

    async def connect(self, data: bytes = b"") -> Client:
        """Connect a raw client and send `data`."""
        connected: Deferred[Client] = Deferred()

        class Connected(Client):
            def connectionMade(self) -> None:
                self.transport.setTcpNoDelay(True)
                connected.callback(self)

        factory = ClientFactory.forProtocol(Connected)
        factory.noisy = False
        reactor.connectTCP("127.0.0.1", self.port, factory)
        client = await connected
        client.send(data)
        return client

    async def request(self, data: bytes) -> Client:
        """Connect a raw client, send `data`, and wait for a response."""
        client = await self.connect(data)
        await eventually(lambda: b"\r\n\r\n" in client.received)
        return client

    async def open(self, *more: str) -> Client:
        """Open a WebSocket."""
        client = await self.request(handshake(*more, path=self.path))
        assert client.status == 101, client.response
        return client

    def open_socket(self, receive_buffer: int, data: bytes | None = None) -> socket.socket:
        """Connect a plain socket that reads only when the test does. data: sent in place of a handshake."""
        peer = socket.socket()
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        peer.connect(("127.0.0.1", self.port))
        peer.sendall(handshake() if data is None else data)
        peer.setblocking(False)
        return peer

    def log(self, event: LogEvent) -> None:
        if "log_failure" in event:
            self.failures.append(event)

    async def finish(self) -> None:
        await self._port.stopListening()


@asynccontextmanager
async def staged(
    *,
    http_server: settings.HTTPServerSettings | None = None,
    websocket: settings.WebSocketSettings | settings.UniWebSocketSettings | None = None,
    client: settings.ClientSettings | None = None,
) -> AsyncIterator[Stage]:
    """Run a server; at the end, wait until all connections are closed and no state is left."""
    stage = Stage(
        http_server or settings.HTTPServerSettings(),
        websocket or settings.WebSocketSettings(),
        client or settings.ClientSettings(),
    )
    globalLogPublisher.addObserver(stage.log)
    try:
        yield stage
        while not stage.idle:
            stage.advance(RESOLUTION)
            await task.deferLater(reactor, 0.002)
    finally:
        globalLogPublisher.removeObserver(stage.log)
        await stage.finish()
