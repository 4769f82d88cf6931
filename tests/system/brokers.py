"""A real broker process under test, with the test in the supervisor's place."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from itertools import count
from typing import Any

import psutil
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.protocol import Factory
from twisted.internet.task import deferLater
from twisted.protocols import amp
from twisted.python.failure import Failure

from realtime.config.settings import EngineSettings, HTTPServerSettings, Settings, WorkersSettings, dump
from realtime.metrics import Metrics, Sample, load
from realtime.process import control
from realtime.supervision.vitals import VitalsPage
from realtime.supervisor.service import BROKER_MODULES
from realtime.worker.engine import BrokerEngine

POLL = 0.01  # seconds between two looks at something that can't notify us
LIMIT = 20.0  # seconds for a broker to start, and to be gone after a SIGKILL


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something that the broker does in its own time; the test's own time limit ends it."""
    while not condition():
        await deferLater(reactor, POLL)


_ports = count(1)


class _Control(amp.AMP):
    def __init__(self) -> None:
        super().__init__()
        self.ready: Deferred[None] = Deferred()
        self.ended: Deferred[None] = Deferred()

    @control.Ready.responder
    def _ready(self) -> dict[str, object]:
        self.ready.callback(None)
        return {}

    def connectionLost(self, reason: Failure) -> None:
        super().connectionLost(reason)
        if not self.ready.called:
            self.ready.errback(AssertionError("the broker ended before it was ready"))
        self.ended.callback(None)


class BrokerProcess:
    """One broker. Await `start`, and `stop` at the end. port: that of its node; None for a node of its own."""

    def __init__(self, settings: EngineSettings, workers: int = 0, port: int | None = None) -> None:
        # The port tells nodes with the same parent apart; a broker does not listen.
        self.port = next(_ports) if port is None else port
        server = HTTPServerSettings(port=self.port)
        self._settings = Settings(engine=settings, workers=WorkersSettings(count=workers), http_server=server)
        self._page = VitalsPage.create()
        self._control = _Control()

    async def start(self) -> None:
        """Returns when it serves. Raises AssertionError when it ends instead, TimeoutError when it does neither."""
        self.spawn()
        await self.ready()

    async def ready(self) -> None:
        """As `start`, after `spawn`."""
        await self._control.ready.addTimeout(LIMIT, reactor)

    def spawn(self, predecessor: int | None = None) -> None:
        """Start the process. predecessor: of the stream over which it takes the state of another broker."""
        ours, theirs = socket.socketpair()
        tree = os.memfd_create("settings")
        os.write(tree, dump(self._settings))
        passed = {"--link": theirs.fileno(), "--settings": tree, "--vitals": self._page.fd}
        if predecessor is not None:
            passed["--predecessor"] = predecessor
        arguments = [text for name, fd in passed.items() for text in (name, str(fd))]
        self._process = subprocess.Popen(
            [sys.executable, "-m", BROKER_MODULES[self._settings.engine.type], *arguments],
            pass_fds=list(passed.values()),
        )
        os.close(tree)
        theirs.close()
        ours.setblocking(False)
        reactor.adoptStreamConnection(ours.fileno(), socket.AF_UNIX, Factory.forProtocol(lambda: self._control))
        ours.close()

    async def hand_over(self, stream: int, timeout: float = 30.0) -> dict[str, Any]:
        """Hand its state over. stream: the other end is the new process's."""
        answer: dict[str, Any] = await self._control.callRemote(
            control.HandConnectionsOver, stream=stream, connections=-1, timeout=timeout
        )
        return answer

    async def link(self, slot: int, engine: BrokerEngine) -> None:
        """Introduce an engine to the broker, as the worker of this slot."""
        engine.attach(await self.stream(slot))

    async def stream(self, slot: int) -> int:
        """A worker's end of a fresh stream."""
        ours, theirs = socket.socketpair()
        await self._control.callRemote(control.AttachStream, slot=slot, stream=theirs.fileno())
        theirs.close()
        return ours.detach()

    async def series(self) -> dict[str, float]:
        """The broker's metrics, by name."""
        answer: dict[str, Any] = await self._control.callRemote(control.Collect, names=[])
        samples: list[Sample] = load(answer["metrics"])
        return {sample.name: sample.value for sample in samples}

    async def samples(self, name: str) -> dict[str, float]:
        """Return the values of one metric, by the value of its only label; by "" without one."""
        answer: dict[str, Any] = await self._control.callRemote(control.Collect, names=[])
        samples: list[Sample] = load(answer["metrics"])
        return {value: s.value for s in samples if s.name == name for _, value in s.labels or [("", "")]}

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def resident_memory(self) -> int:
        """The memory of the process, in bytes."""
        return int(psutil.Process(self._process.pid).memory_info().rss)

    @property
    def last_beat(self) -> float:
        """The time of its latest heartbeat, in seconds of the monotonic clock."""
        vitals = self._page.read()
        return vitals.beat / 1e9 if vitals is not None else 0.0

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    async def kill(self) -> None:
        """SIGKILL; returns when it is gone."""
        self.signal(signal.SIGKILL)
        await self.gone()

    async def gone(self) -> None:
        """Returns when it has ended, for whatever reason, and we have heard of it. Raises TimeoutError."""
        await Deferred.fromCoroutine(self._gone()).addTimeout(LIMIT, reactor)

    async def _gone(self) -> None:
        await until(lambda: self._process.poll() is not None and self._control.ended.called)

    async def stop(self) -> None:
        """End it, whatever it is doing; idempotent."""
        self._process.kill()  # no signal is sent to a process that was waited for
        await self.gone()
        self._page.close()


def broker_engine(
    receiver: Any,
    settings: EngineSettings,
    on_lost: Callable[[], None] = lambda: None,
    metrics: Metrics | None = None,
    generation: int = 0,
) -> BrokerEngine:
    """An engine in this process that is not attached yet."""
    return BrokerEngine(receiver, settings, metrics or Metrics(), reactor, on_lost, generation=generation)
