"""The supervisor as a service: the ports it opens, the descriptors its children get, and its stop. Real processes are
in tests/system/test_processes.py."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from twisted.internet.defer import Deferred, succeed
from twisted.logger import LogLevel, capturedLogs, formatEvent

from realtime.config import settings as configuration
from realtime.config.cores import count_cores
from realtime.config.settings import HTTPServerSettings, LoopSettings, Settings, ShutdownSettings, WorkersSettings
from realtime.process import control
from realtime.process.child import _adopt
from realtime.process.zygote import Fork
from realtime.supervision.pool import TICK
from realtime.supervision.slots import BROKER, SlotState
from realtime.supervision.vitals import ProcessState, Vitals, VitalsPage
from realtime.supervisor import orphans, service
from realtime.supervisor.service import Supervisor


class Spawned:
    """A requested process that does not run: its module, arguments, descriptors, and the child's end of its link."""

    def __init__(self, pid: int, fork: Fork, descriptors: Sequence[int], exited: Callable[[int], None]) -> None:
        self.pid = pid
        self.fork = fork
        self.fds = {number: os.dup(fd) for number, fd in zip(fork.descriptors, descriptors, strict=True)}
        self.exited = exited
        self.signals: list[int] = []
        self.received: list[tuple[str, object]] = []
        self.peer = Peer(self)
        self.settings = configuration.load(os.pread(self.fds[4], 1 << 20, 0))
        self.link = self.fds.pop(3)

    def argument(self, name: str) -> str:
        return self.fork.arguments[self.fork.arguments.index(name) + 1]

    def signal(self, number: int) -> None:
        self.signals.append(number)

    def exit(self, status: int) -> None:
        """Exit. status: an exit status, or minus a signal."""
        if self.peer.transport is not None:
            self.peer.transport.abortConnection()
        while self.fds:
            os.close(self.fds.popitem()[1])
        self.exited(status)


class Peer(control.Peer):
    """The child's end of the control link."""

    def __init__(self, spawned: Spawned) -> None:
        super().__init__()
        self.spawned = spawned

    @control.AttachStream.responder
    def link(self, slot: int, stream: int) -> dict[str, object]:
        self.spawned.received.append(("link", slot))
        os.close(stream)
        return {}

    @control.Drain.responder
    def drain(self, timeout: float) -> dict[str, object]:
        self.spawned.received.append(("drain", timeout))
        return {}


class Reactor:
    """The test's reactor, with processes that do not run and a clock that the test sets."""

    def __init__(self, reactor: Any) -> None:
        self._reactor = reactor
        self.spawned: list[Spawned] = []
        self.refuse: OSError | None = None
        self.seconds = reactor.seconds

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reactor, name)

    def callWhenRunning(self, function: Any, *arguments: Any) -> None:
        function(*arguments)

    def callLater(self, delay: float, function: Any, *arguments: Any) -> None:
        pass


class Forks:
    """A zygote whose children do not run."""

    is_forking = False
    pids = (999,)

    def __init__(self, reactor: Reactor, modules: Sequence[str], *, early: None, capture: bool, formats: str) -> None:
        self.reactor = reactor
        self.is_closed = False
        self.renewals = 0
        self.renewed: Deferred[None] = succeed(None)

    def fork(self, fork: Fork, descriptors: Sequence[int], exited: Callable[[int], None]) -> Spawned:
        if self.reactor.refuse:
            raise self.reactor.refuse
        spawned = Spawned(1000 + len(self.reactor.spawned), fork, descriptors, exited)
        self.reactor.spawned.append(spawned)
        _adopt(self.reactor._reactor, spawned.link, spawned.peer)
        return spawned

    def renew(self) -> Deferred[None]:
        self.renewals += 1
        return self.renewed

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture(autouse=True)
def forks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "Zygote", Forks)


class Operators:
    """An operators' port that only keeps its state."""

    def __init__(
        self, supervisor: Supervisor, reactor: Any, address: str, port: int, inherited: int | None = None
    ) -> None:
        self.address = address
        self.port = port
        self.state = "listening"

    def fileno(self) -> int:
        return 0

    def start(self) -> None:
        self.state = "started"

    def close(self) -> None:
        self.state = "closed"


def supervisor(reactor: Any, settings: Settings, leave: Callable[[int], None] | None = None) -> Supervisor:
    return Supervisor(reactor, settings, Operators, worker="some.worker", broker="some.broker", leave=leave)


class Running:
    """A started supervisor of two workers, on such a reactor."""

    def __init__(self, reactor: Any, loop: LoopSettings | None = None) -> None:
        self.reactor = Reactor(reactor)
        self.left: list[int] = []
        settings = Settings(
            http_server=HTTPServerSettings(address="127.0.0.1", port=0, internal_port=0),
            workers=WorkersSettings(count=2),
            shutdown=ShutdownSettings(timeout=20.0),
            loop=loop or LoopSettings(),
        )
        self.supervisor = supervisor(self.reactor, settings, self.left.append)
        self.supervisor.startService()

    def process(self, slot: int) -> Spawned:
        """The latest process of the slot."""
        return next(process for process in reversed(self.reactor.spawned) if process.argument("--slot") == str(slot))

    async def ready(self) -> None:
        for slot in (BROKER, 0, 1):
            await self.process(slot).peer.callRemote(control.Ready)

    def end(self) -> None:
        self.supervisor.stopService()
        self.supervisor.stopService()
        for slot in list(self.supervisor.processes):
            self.process(slot).exit(-signal.SIGKILL)

    def tick(self, seconds: float = TICK) -> None:
        now = self.reactor.seconds() + seconds
        self.reactor.seconds = lambda: now
        self.supervisor.monitor.start()


@pytest.fixture
def running() -> Iterator[Running]:
    from twisted.internet import reactor

    running = Running(reactor)
    yield running
    running.end()


def test_nothing_is_opened_before_the_start() -> None:
    before = os.listdir("/proc/self/fd")
    supervisor(object(), Settings())
    assert os.listdir("/proc/self/fd") == before


def test_by_default_there_is_one_worker_per_core() -> None:
    pool = supervisor(object(), Settings()).pool
    assert len(pool.workers) == count_cores()


async def test_each_process_gets_its_arguments_settings_and_sockets(running: Running) -> None:
    broker, first, second = (running.process(slot) for slot in (BROKER, 0, 1))
    assert (broker.fork.name, broker.fork.module) == ("broker", "some.broker")
    assert (first.fork.name, first.fork.module) == ("worker 0", "some.worker")
    assert "--listen" not in broker.fork.arguments
    for worker in (first, second):
        assert worker.argument("--listen") == "6"
        assert worker.settings.workers.count == 2
    for worker in (first, second):
        with socket.socket(fileno=os.dup(worker.fds[6])) as listening:
            assert listening.getsockname() == ("127.0.0.1", running.supervisor.port)
    assert first.fds[6] != second.fds[6]
    assert not {0, 1, 2} & first.fds.keys()  # they are the zygote's, which has ours


async def test_a_child_can_not_change_the_settings(running: Running) -> None:
    fd = running.process(0).fds[4]
    with pytest.raises(PermissionError):
        os.pwrite(fd, b"x", 0)
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 1)
    assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SEAL


async def test_each_worker_and_the_broker_get_a_stream_to_each_other(running: Running) -> None:
    await running.ready()
    for slot in (0, 1):
        # The answer to a later command proves that the earlier commands have arrived.
        await running.process(slot).peer.callRemote(control.Ready)
        assert running.process(slot).received == [("link", slot)]
    assert sorted(running.process(BROKER).received) == [("link", 0), ("link", 1)]


async def test_a_lost_stream_is_replaced(running: Running) -> None:
    await running.ready()
    await running.process(1).peer.callRemote(control.LinkLost)
    running.tick()
    await running.process(1).peer.callRemote(control.Ready)
    assert running.process(1).received == [("link", 1)] * 2


async def test_the_supervisor_leaks_no_descriptor_of_dead_processes(running: Running) -> None:
    await running.ready()
    await running.process(0).peer.callRemote(control.Ready)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        running.process(0).exit(-signal.SIGKILL)
        while running.supervisor.pool.slots[0].state is not SlotState.STARTING:
            running.tick()
        await running.process(0).peer.callRemote(control.Ready)
        await running.process(BROKER).peer.callRemote(control.Ready)
    assert len(os.listdir("/proc/self/fd")) <= before + 1


async def test_it_reaps_orphans_but_not_its_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    from twisted.internet import reactor

    calls: list[list[int]] = []
    monkeypatch.setattr(orphans, "reap", lambda own: calls.append(sorted(own())))
    running = Running(reactor)
    await running.ready()
    running.tick(2 * orphans.INTERVAL)
    assert calls[-1] == [999, 1000, 1001, 1002]
    running.supervisor.zygote.is_forking = True  # a child may have exited whose pid is not known yet
    running.tick(2 * orphans.INTERVAL)
    assert len(calls) == 1
    running.end()


async def test_late_events_of_a_dead_process_do_not_affect_its_successor(running: Running) -> None:
    old = running.process(0)
    (late,) = (process for process in running.supervisor.children.values() if process.slot == 0)
    old.exit(-signal.SIGKILL)
    while running.process(0) is old:
        running.tick()
    running.supervisor.process_ready(late)
    running.supervisor.control_link_lost(late)
    running.supervisor.process_exited(late, 0)
    assert running.supervisor.pool.slots[0].state is SlotState.STARTING


async def test_a_failed_spawn_is_retried(running: Running) -> None:
    await running.ready()
    running.reactor.refuse = OSError(errno.EAGAIN, "Resource temporarily unavailable")
    running.process(0).exit(1)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(10):
        running.tick()
    assert running.supervisor.pool.slots[0].deaths > 1
    assert len(os.listdir("/proc/self/fd")) <= before
    running.reactor.refuse = None
    while running.supervisor.pool.slots[0].state is not SlotState.STARTING:
        running.tick()


async def test_stop_drains_all_processes_before_its_deferred_fires(running: Running) -> None:
    await running.ready()
    stopped: Deferred[None] = running.supervisor.stopService()
    for slot in (0, 1):
        await running.process(slot).peer.callRemote(control.LinkLost)
        assert running.process(slot).received[-1][0] == "drain"
        running.process(slot).exit(0)
    assert not stopped.called
    await running.process(BROKER).peer.callRemote(control.LinkLost)
    assert running.process(BROKER).received[-1][0] == "drain"
    running.process(BROKER).exit(0)
    assert stopped.called
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", running.supervisor.port), timeout=5)


async def test_leave_gets_the_exit_status(running: Running) -> None:
    await running.process(0).peer.callRemote(control.Failed, reason="no such module", status=78)
    for slot in (0, 1, BROKER):
        running.process(slot).exit(78 if slot == 0 else -signal.SIGKILL)
    assert running.left == [78]


async def test_a_memory_limit_below_an_empty_workers_memory_is_logged_once() -> None:
    from twisted.internet import reactor

    running = Running(reactor, LoopSettings(max_rss=1_000_000))
    for slot in (0, 1):
        page = VitalsPage.open(os.dup(running.process(slot).fds[5]))
        page.write(Vitals(1, 0.0, 0, 0, ProcessState.READY, rss=50_000_000))
        page.close()
    with capturedLogs() as events:
        await running.ready()
    lines = [formatEvent(event) or "" for event in events if event["log_level"] is LogLevel.error]
    assert [line.split(",")[0] for line in lines] == [
        "loop.max_rss = 1000000: a worker without clients already uses 50000000 bytes"
    ]
    running.end()


def test_a_port_in_use_exits_with_status_1() -> None:
    from twisted.internet import reactor

    with socket.create_server(("127.0.0.1", 0)) as other:
        settings = Settings(http_server=HTTPServerSettings("127.0.0.1", other.getsockname()[1], "127.0.0.1", 0))
        with pytest.raises(SystemExit) as caught:
            supervisor(Reactor(reactor), settings).privilegedStartService()
        assert caught.value.code == 1
