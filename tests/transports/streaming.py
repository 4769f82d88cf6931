"""A frontend with streams beside the WebSockets of `stage`, and parsers for their responses."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from twisted.internet import reactor, task
from twisted.logger import Logger, globalLogPublisher

from realtime.app import App
from realtime.config import settings
from realtime.deadlines import RESOLUTION
from realtime.handlers.call import HandlerServices
from realtime.handlers.dispatch import Dispatcher
from realtime.http.body import BodyParser
from realtime.http.request import CHUNKED
from realtime.protocol.orders import EmulateOrder
from realtime.protocol.sessions import Sessions
from realtime.pubsub.hub import Hub
from realtime.transports.emulation import Emulation, EmulationLimits
from realtime.transports.routes import make_site
from realtime.transports.streams import StreamContext, make_endpoints
from tests.pubsub.memory_engine import MemoryEngine
from tests.transports.stage import Client, Stage

NODE = "the-node"
WORKER = "3"
SSE = "/connection/sse"
HTTP_STREAM = "/connection/http_stream"
UNI_SSE = "/connection/uni_sse"
UNI_HTTP_STREAM = "/connection/uni_http_stream"
EMULATION = "/emulation"
INIT = "/connection/init"

BODY_LIMIT = 1000


def tree(**branches: Any) -> settings.Settings:
    """Settings with all transports enabled."""
    stream: dict[str, Any] = {"enabled": True, "max_request_body_size": BODY_LIMIT}
    values: dict[str, Any] = {
        "sse": settings.SSESettings(**stream),
        "http_stream": settings.HTTPStreamSettings(**stream),
        "uni_sse": settings.UniSSESettings(**stream),
        "uni_http_stream": settings.UniHTTPStreamSettings(**stream),
        "emulation": settings.EmulationSettings(max_request_body_size=BODY_LIMIT),
        "init": settings.InitSettings(enabled=True),
    }
    return settings.Settings(**(values | branches))


def post(path: str, body: bytes, *more: str, method: str = "POST") -> bytes:
    """Build a request with a body. more: further header lines."""
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}", *more]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def get(path: str, *more: str, method: str = "GET") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: localhost", *more, "", ""]).encode("latin-1")


def fields(client: Client) -> dict[str, str]:
    """Return the headers of the first response by lower-case name."""
    lines = client.response.decode("latin-1").split("\r\n")[1:]
    return {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}


def chunks(client: Client) -> tuple[bytes, bool]:
    """Return the content of the received chunks, and whether the last chunk is among them."""
    data = bytes(client.received.partition(b"\r\n\r\n")[2])
    content, body = bytearray(), BodyParser(CHUNKED, 1 << 30)
    whole = body.feed(data)
    if isinstance(whole, bytes):
        return whole, True
    while data:
        size, _, rest = data.partition(b"\r\n")
        length = int(size or b"0", 16)
        if len(rest) < length + 2:
            break
        content += rest[:length]
        data = rest[length + 2 :]
    return bytes(content), False


def events(client: Client) -> list[Any]:
    """Return the received server-sent events, decoded."""
    content, _ = chunks(client)
    parts = content.removeprefix(b"\r\n").split(b"\n\n")
    assert all(part.startswith(b"data: ") for part in parts[:-1])
    return [json.loads(part.removeprefix(b"data: ")) for part in parts[:-1]]


def lines(client: Client) -> list[Any]:
    """Return the received lines, decoded."""
    return [json.loads(line) for line in chunks(client)[0].splitlines()]


class StreamStage(Stage):
    """A server with streams and an HTTP site."""

    def __init__(self, values: settings.Settings, app: App) -> None:
        super().__init__(values.http_server, values.websocket, values.client)
        registry = Sessions()
        hub = Hub(lambda hub: MemoryEngine(hub, values.engine, time.monotonic, WORKER), registry.apply)
        self.engine = hub.engine
        dispatcher = Dispatcher(app, HandlerServices(reactor, values.workers, self.metrics, Logger()))
        self.emulation = Emulation(
            self.engine,
            NODE,
            WORKER,
            EmulationLimits(
                values.emulation,
                values.websocket.message_size_limit,
                self.metrics,
                reactor.callLater,  # type: ignore[attr-defined]
            ),
        )
        registry.add_handler(EmulateOrder, self.emulation.receive)
        self.streams = StreamContext(
            self._open_session,
            values,
            self.deadlines,
            self.metrics,
            self.admission,
            self.emulation,
            self.websocket.queued,
        )
        endpoints, cors_routes = make_endpoints(values, self.streams)
        self.front.endpoints = {**self.front.endpoints, **endpoints}
        self.front.http = make_site(
            app,
            dispatcher,
            None,  # type: ignore[arg-type]
            values,
            self.metrics,
            cors_routes=cors_routes,
            proxies=self.admission.proxies,
        )

    @property
    def idle(self) -> bool:
        return super().idle and self.streams.connections == 0 and not self.emulation._by_secret

    async def stream(self, request: bytes) -> Client:
        """Open a stream."""
        client = await self.request(request)
        assert client.status == 200, client.response
        return client

    async def status(self, request: bytes) -> int:
        """Send a request on a new connection, close it, and return the status of the response."""
        client = await self.request(request)
        client.leave()
        return client.status


@asynccontextmanager
async def streaming(app: App | None = None, **branches: Any) -> AsyncIterator[StreamStage]:
    """Run a server; at the end, wait until all connections are closed and no state is left."""
    stage = StreamStage(tree(**branches), app or App())
    globalLogPublisher.addObserver(stage.log)
    try:
        yield stage
        while not stage.idle:
            stage.advance(RESOLUTION)
            await task.deferLater(reactor, 0.002)
    finally:
        globalLogPublisher.removeObserver(stage.log)
        await stage.finish()
