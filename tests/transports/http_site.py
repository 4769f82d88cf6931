"""The HTTP site of a worker on a real port, and requests to it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest_twisted
import requests
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.task import LoopingCall
from twisted.internet.threads import deferToThread
from twisted.logger import Logger

from realtime.app import App
from realtime.client_log import ClientLog
from realtime.config.settings import (
    ChannelSettings,
    ClientSettings,
    HTTPAPISettings,
    HTTPServerSettings,
    Namespace,
    Settings,
    WorkersSettings,
)
from realtime.deadlines import Deadlines
from realtime.handlers.call import HandlerServices
from realtime.handlers.dispatch import Dispatcher
from realtime.http.hosts import HostNames
from realtime.metrics import Metrics
from realtime.process.transport import DirectServer
from realtime.protocol.channel_rules import ChannelRules
from realtime.pubsub.broker_core import BrokerCore
from realtime.pubsub.hub import Hub
from realtime.server_api.http_api import HTTPAPI
from realtime.server_api.operations import ServerAPI
from realtime.transports.frontend import HTTPFrontendFactory
from realtime.transports.routes import make_site
from realtime.types import ChannelCounts, NodeInfo
from tests.pubsub.memory_engine import DirectDelivery, MemoryEngine

KEY = "k3y-of-the-tests"
LIMIT = 4096
CHAT = Namespace(name="chat", presence=True, history_size=10, history_ttl=60.0)


async def survey_no_channels(pattern: str) -> ChannelCounts:
    return ChannelCounts({})


class Site:
    """The HTTP site of one worker on a free port, with an engine in memory."""

    def __init__(
        self,
        workers: WorkersSettings | None = None,
        http_server: HTTPServerSettings | None = None,
        allowed_origins: tuple[str, ...] = (),
        **http_api: Any,
    ) -> None:
        options = {"key": KEY, "max_body_size": LIMIT, "body_timeout": 10.0} | http_api
        self.settings = Settings(
            http_server=http_server or HTTPServerSettings(),
            client=ClientSettings(allowed_origins=allowed_origins),
            http_api=HTTPAPISettings(**options),
            channel=ChannelSettings(namespaces=(CHAT,)),
        )
        self.app = App()
        self.orders: list[bytes] = []
        self.logged: list[dict[str, Any]] = []
        self.lines: list[str] = []  # of refusals
        self.metrics = Metrics()
        self.workers = workers or WorkersSettings(threads=2)
        self.reasons: tuple[str, ...] = ()  # reasons for which the worker is overloaded
        self.has_available_peer = False  # another worker accepts new clients
        self._port: Any = None

    async def start(self) -> str:
        """Start to serve; return the base URL."""
        facts = NodeInfo("n1", "node", "1.0", 12.5)
        core = BrokerCore[Any](DirectDelivery(), self.settings.engine.max_channels, describe_node=lambda: facts)
        hub = Hub(lambda hub: MemoryEngine(hub, self.settings.engine, time.monotonic, core=core), self.orders.append)
        self.engine = hub.engine
        operations = ServerAPI(self.engine, ChannelRules(self.settings.channel), survey_no_channels)
        api = HTTPAPI(operations)
        log = Logger(observer=self.logged.append)
        services = HandlerServices(reactor, self.workers, self.metrics, log, pressure=self)
        self.dispatcher = Dispatcher(self.app, services)
        await self.dispatcher.start()
        self.dispatcher.bind(operations)
        site = make_site(
            self.app,
            self.dispatcher,
            api,
            self.settings,
            self.metrics,
            another_worker_available=lambda: self.has_available_peer,
            own_names=HostNames([]),
            client_log=ClientLog(self.metrics, info=self.lines.append),
        )
        deadlines = Deadlines(time.monotonic())
        self._sweeping = LoopingCall(lambda: deadlines.sweep(time.monotonic()))
        self._sweeping.start(0.05)
        self.front = HTTPFrontendFactory(self.settings.http_server, {}, site, deadlines, self.metrics, reactor)
        self._port = reactor.listenTCP(0, self.front, interface="127.0.0.1")  # type: ignore[attr-defined]
        self._port.transport = DirectServer
        self.port = self._port.getHost().port
        return f"http://127.0.0.1:{self.port}"

    @property
    def pressed(self) -> bool:
        return bool(self.reasons)

    async def stop(self) -> None:
        await self._port.stopListening()
        self._sweeping.stop()
        await self.dispatcher.stop(5)

    def faults(self) -> dict[str, float]:
        """Return the number of counted refusals by kind."""
        samples = [sample for sample in self.metrics.snapshot() if sample.name == "realtime_bad_input"]
        return {sample.labels[0][1]: sample.value for sample in samples if sample.value}

    async def raw(self, *parts: bytes) -> bytes:
        """Send bytes and return all received bytes, up to the end of the connection."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            for part in parts:
                writer.write(part)
                await writer.drain()
            return await reader.read()
        finally:
            writer.close()


@contextmanager
def site_for_test(**options: Any) -> Iterator[Site]:
    """Make a site, and stop it at the end if the test has started it: all tests share one reactor."""
    site = Site(**options)
    yield site
    if site._port is not None:
        pytest_twisted.blockon(Deferred.fromCoroutine(site.stop()))


async def fetch(method: str, url: str, **options: Any) -> requests.Response:
    """Send one request with an ordinary client, in a thread."""
    return await deferToThread(requests.request, method, url, timeout=20, **options)


def post(path: str, body: bytes, *headers: bytes) -> bytes:
    """Build a POST request that closes its connection; it has no Content-Length unless `headers` has one."""
    head = [b"POST " + path.encode() + b" HTTP/1.1", b"Host: x", b"Connection: close", *headers]
    return b"\r\n".join([*head, b"", body])


def status_of(response: bytes) -> int:
    return int(response.split(b" ", 2)[1])
