"""Start and end of a child process, seen from the supervisor's end of its link."""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.logger import LogLevel, capturedLogs

from realtime import metrics
from realtime.config.settings import Settings, ShutdownSettings
from realtime.errors import ApplicationFailed, EngineUnavailable, SettingsError
from realtime.metrics import Sample
from realtime.process import child as children
from realtime.process import control, diagnostics
from realtime.process.child import Child
from realtime.supervision.loop_time import LoopWork
from realtime.supervision.vitals import ProcessState, VitalsPage
from tests.transports.stage import eventually


class Reactor(Clock):
    """A clock that can be stopped, and that calls functions from other threads and signal handlers at once."""

    running = True

    def stop(self) -> None:
        self.running = False

    def callFromThread(self, function: Any, *arguments: Any) -> None:
        function(*arguments)


class Supervisor(control.Peer):
    """The other end of the link."""

    def __init__(self) -> None:
        super().__init__()
        self.received: list[object] = []

    @control.Ready.responder
    def ready(self) -> dict[str, object]:
        self.received.append("ready")
        return {}

    @control.Failed.responder
    def failed(self, reason: str, status: int) -> dict[str, object]:
        self.received += [reason, status]
        return {}

    @control.LinkLost.responder
    def link_lost(self) -> dict[str, object]:
        self.received.append("link lost")
        return {}


class Service:
    """Stands for the work of a child. Each hook replaces one method."""

    def __init__(self) -> None:
        self.on_start: Callable[[], Awaitable[None]] | None = None
        self.on_drain: Callable[[float], Awaitable[None]] | None = None
        self.links: Deferred[tuple[int, int]] = Deferred()
        self.adopted: Deferred[int] = Deferred()

    async def start(self) -> None:
        if self.on_start is not None:
            await self.on_start()

    def link(self, slot: int, stream: int) -> None:
        self.links.callback((slot, stream))

    def adopt(self, stream: int) -> None:
        self.adopted.callback(stream)

    def take_over(self, stream: int) -> None:
        self.adopted.callback(stream)

    async def hand_over(self, stream: int, connections: int, timeout: float) -> dict[str, object]:
        os.close(stream)
        numbers = {"moved": connections, "closed": 1, "left": 2, "bytes": 1000}
        return {**numbers, "reason": f"{timeout:g} s have passed", "failures": [{"reason": "busy", "count": 2}]}

    async def drain(self, timeout: float) -> None:
        if self.on_drain is not None:
            await self.on_drain(timeout)


class Family:
    """A child and its supervisor, joined by a real socketpair on the test's reactor; the child's timers by a clock."""

    def __init__(self) -> None:
        from twisted.internet import reactor

        self.reactor = Reactor()
        self.reactor.advance(100)
        self.page = VitalsPage.create()
        self.child = Child(1, Settings(shutdown=ShutdownSettings(timeout=5.0)), (), self.page, self.reactor)
        self.service = Service()
        self.supervisor = Supervisor()
        for end, protocol in zip(socket.socketpair(), (self.child.control, self.supervisor), strict=True):
            children._adopt(reactor, end.detach(), protocol)

    @property
    def state(self) -> ProcessState:
        vitals = self.page.read()
        assert vitals is not None
        return vitals.state

    def begin(self, start: Callable[[], Awaitable[None]] | None = None) -> None:
        self.service.on_start = start
        self.child.begin(lambda child: self.service)

    async def hand_over(self, stream: int, connections: int, timeout: float) -> dict[str, Any]:
        arguments = {"stream": stream, "connections": connections, "timeout": timeout}
        answer: dict[str, Any] = await self.supervisor.callRemote(control.HandConnectionsOver, **arguments)
        return answer

    async def round_trip(self) -> None:
        """Wait until the supervisor has received all earlier commands of the child."""
        await self.child.control.callRemote(control.LinkLost)
        assert self.supervisor.received.pop() == "link lost"


@pytest.fixture
def family() -> Iterator[Family]:
    handler = signal.getsignal(signal.SIGTERM)
    family = Family()
    yield family
    signal.alarm(0)
    signal.signal(signal.SIGTERM, handler)
    family.child.drain = lambda timeout: None  # type: ignore[method-assign]  # the link ends after this fixture
    for protocol in (family.child.control, family.supervisor):
        if protocol.transport is not None:
            protocol.transport.abortConnection()
    family.page.close()


async def test_the_supervisor_gets_ready_when_start_has_returned(family: Family) -> None:
    gate: Deferred[None] = Deferred()

    async def start() -> None:
        await gate

    family.begin(start)
    await family.round_trip()
    assert (family.supervisor.received, family.state) == ([], ProcessState.STARTING)
    gate.callback(None)
    await family.round_trip()
    assert (family.supervisor.received, family.state) == (["ready"], ProcessState.READY)


async def test_the_supervisor_gets_a_misconfiguration_in_one_line(family: Family) -> None:
    async def start() -> None:
        raise SettingsError(["app.module: no module named chat", "app.path: no such directory"])

    family.begin(start)
    await family.round_trip()
    assert family.supervisor.received == ["app.module: no module named chat; app.path: no such directory", 78]
    assert (family.reactor.running, family.child.status) == (False, 78)


async def test_the_supervisor_gets_a_failure_of_the_application_with_a_status_for_a_restart(family: Family) -> None:
    async def start() -> None:
        raise ApplicationFailed("chat.py:3: on_start failed: no database")

    family.begin(start)
    await family.round_trip()
    assert family.supervisor.received == ["chat.py:3: on_start failed: no database", 75]
    assert (family.reactor.running, family.child.status) == (False, 75)


async def test_after_a_failed_start_the_end_of_the_link_is_no_surprise(family: Family) -> None:
    async def start() -> None:
        raise SettingsError(["no"])

    with capturedLogs() as events:
        family.begin(start)
        await family.round_trip()
        family.child.control.connectionLost()
    assert not [event for event in events if event["log_level"] is LogLevel.warn]


async def test_a_supervisor_that_does_not_read_does_not_delay_the_exit(family: Family) -> None:
    async def start() -> None:
        raise SettingsError(["no"])

    family.supervisor.transport.pauseProducing()
    family.begin(start)
    assert family.reactor.running
    family.reactor.advance(3)
    assert (family.reactor.running, family.child.status) == (False, 78)


@pytest.mark.parametrize(("error", "status"), [(EngineUnavailable("later"), 75), (ZeroDivisionError(), 70)])
async def test_other_failures_have_their_status(family: Family, error: Exception, status: int) -> None:
    async def start() -> None:
        raise error

    family.begin(start)
    assert (family.reactor.running, family.child.status) == (False, status)


async def test_the_service_gets_a_stream_to_the_broker(family: Family) -> None:
    family.begin()
    ours, theirs = socket.socketpair()
    await family.supervisor.callRemote(control.AttachStream, slot=1, stream=theirs.fileno())
    slot, stream = await family.service.links
    os.write(stream, b"hello")
    assert (slot, ours.recv(10)) == (1, b"hello")
    for fd in (ours, theirs):
        fd.close()
    os.close(stream)


async def test_a_stream_before_the_service_is_closed_and_requested_again(family: Family) -> None:
    ours, theirs = socket.socketpair()
    await family.supervisor.callRemote(control.AttachStream, slot=1, stream=theirs.fileno())
    theirs.close()
    assert ours.recv(1) == b""
    ours.close()
    assert family.supervisor.received == ["link lost"]


async def test_metrics_are_collected(family: Family) -> None:
    family.child.metrics.counter("realtime_things", "Things.", kind="a").value += 3
    answer = await family.supervisor.callRemote(control.Collect, names=[])
    collected = metrics.load(answer["metrics"])
    assert Sample("realtime_things", "counter", "Things.", [("kind", "a")], 3) in collected


async def test_only_the_requested_metrics_are_collected(family: Family) -> None:
    family.child.metrics.counter("realtime_things", "Things.", kind="a").value += 3
    family.child.metrics.gauge("realtime_level", "A level.", lambda: 7)
    for name in ("realtime_things", "realtime_level", "realtime_loop_seconds", "realtime_nothing"):
        answer = await family.supervisor.callRemote(control.Collect, names=[name])
        assert {sample.name for sample in metrics.load(answer["metrics"])} == {name} - {"realtime_nothing"}


async def test_the_time_of_the_loop_is_a_metric_of_each_account(family: Family) -> None:
    family.child.accounts.open(LoopWork.HANDLER, "rpc report").spent = 1_500_000_000
    answer = await family.supervisor.callRemote(control.Collect, names=["realtime_loop_seconds"])
    seconds = {tuple(sample.labels): sample.value for sample in metrics.load(answer["metrics"])}
    assert seconds[("kind", "handler"), ("name", "rpc report")] == 1.5
    assert (("kind", "other"), ("name", "none")) in seconds


async def test_a_child_reports_its_stacks(family: Family) -> None:
    answer = await family.supervisor.callRemote(control.Report, what="stacks")
    assert "Thread MainThread" in answer["text"].decode()


async def test_a_report_that_fails_does_not_end_the_link(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(diagnostics.REPORTS, "memory", lambda: 1 / 0)
    answer = await family.supervisor.callRemote(control.Report, what="memory")
    assert "the report of memory raised ZeroDivisionError" in answer["text"].decode()
    await family.round_trip()


async def test_drain_drains_the_service_and_ends_with_0(family: Family) -> None:
    family.begin()
    timeouts: list[float] = []
    done: Deferred[None] = Deferred()

    async def drain(timeout: float) -> None:
        timeouts.append(timeout)
        await done

    family.service.on_drain = drain
    await family.supervisor.callRemote(control.Drain, timeout=4.0)
    family.reactor.advance(0)
    assert (timeouts, family.state, family.reactor.running) == ([4.0], ProcessState.DRAINING, True)
    done.callback(None)
    assert (family.reactor.running, family.child.status) == (False, 0)


async def test_a_drain_begins_while_a_handler_blocks_the_loop(family: Family) -> None:
    family.begin()
    timeouts: list[float] = []

    async def drain(timeout: float) -> None:
        timeouts.append(timeout)

    family.service.on_drain = drain
    family.child.lock.is_relieving = True
    await family.supervisor.callRemote(control.Drain, timeout=4.0)
    family.reactor.advance(0)
    assert (timeouts, family.reactor.running) == ([4.0], True)
    family.child.lock.is_relieving = False
    await eventually(lambda: not family.reactor.running)  # the end is the loop's


async def test_the_kernel_keeps_the_deadline_of_a_drain_too(family: Family) -> None:
    family.begin()
    family.service.on_drain = lambda timeout: Deferred()
    family.child.drain(4.0)
    assert 4.0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 5.0
    family.reactor.advance(4.1)
    assert (family.reactor.running, family.child.status) == (False, 0)


async def test_a_second_drain_can_only_bring_the_deadline_nearer(family: Family) -> None:
    calls: list[float] = []

    async def drain(timeout: float) -> None:
        calls.append(timeout)
        await Deferred()

    family.begin()
    family.service.on_drain = drain
    family.child.drain(60.0)
    family.child.drain(10.0)
    assert 10.0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 11.0
    family.child.drain(100.0)
    assert signal.getitimer(signal.ITIMER_REAL)[0] <= 11.0
    assert calls == [60.0]


async def test_a_drain_that_raises_ends_the_process(family: Family) -> None:
    async def drain(timeout: float) -> None:
        raise ZeroDivisionError

    family.begin()
    family.service.on_drain = drain
    family.child.drain(4.0)
    assert (family.reactor.running, family.child.status) == (False, 0)


async def test_sigterm_drains(family: Family) -> None:
    family.begin()
    os.kill(os.getpid(), signal.SIGTERM)
    await eventually(lambda: not family.reactor.running)
    assert family.child.draining


async def test_the_end_of_the_link_drains(family: Family) -> None:
    timeouts: list[float] = []

    async def drain(timeout: float) -> None:
        timeouts.append(timeout)

    family.begin()
    family.service.on_drain = drain
    family.supervisor.transport.abortConnection()
    await eventually(lambda: not family.reactor.running)
    assert timeouts == [5.0]  # shutdown.timeout, which is less than ORPHAN_DRAIN


async def test_an_alarm_of_a_stray_signal_is_cancelled(family: Family) -> None:
    family.begin()
    signal.alarm(1000)
    family.reactor.advance(3.1)
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
    family.service.on_drain = lambda timeout: Deferred()
    family.child.drain(4.0)
    family.reactor.advance(3.1)
    assert signal.getitimer(signal.ITIMER_REAL)[0] > 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="prctl is Linux's")
def test_the_signal_number_is_a_fitting_number_of_seconds() -> None:
    assert children.ORPHAN_DRAIN + 1 < signal.SIGUSR2 < 15


def test_a_link_without_a_supervisor_has_hung_up() -> None:
    ours, theirs = socket.socketpair()
    assert not children._has_hung_up(theirs.fileno())
    ours.close()
    assert children._has_hung_up(theirs.fileno())
    theirs.close()


def test_a_start_without_descriptors_says_so_in_one_line() -> None:
    ours, theirs = socket.socketpair()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with ours, theirs:
        assert children._has_descriptors(theirs.fileno())
        inherited = [part for name in ("link", "settings", "vitals") for part in (f"--{name}", str(theirs.fileno()))]
        process = subprocess.run(
            [sys.executable, "-m", "realtime.broker.process", *inherited],
            pass_fds=[theirs.fileno()],
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (12, hard)),
            stderr=subprocess.PIPE,
            text=True,
        )
    assert process.returncode == children.EX_TEMPFAIL
    [line] = process.stderr.splitlines()
    assert "raise the limit of open files" in line


async def test_the_service_gets_a_stream_of_rescued_connections(family: Family) -> None:
    ours, theirs = socket.socketpair()
    await family.supervisor.callRemote(control.Adopt, stream=theirs.fileno())
    theirs.close()
    assert ours.recv(1) == b""  # before there is a service, the stream is closed
    family.begin()
    again, theirs = socket.socketpair()
    await family.supervisor.callRemote(control.Adopt, stream=theirs.fileno())
    stream = await family.service.adopted
    os.write(stream, b"hello")
    assert again.recv(10) == b"hello"
    for end in (ours, theirs, again):
        end.close()
    os.close(stream)


async def test_a_hand_over_reaches_the_service_and_its_result_the_supervisor(family: Family) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        early = await family.hand_over(ours.fileno(), -1, 1.0)
        assert early["reason"] == "the process has not started yet"
        family.begin()
        answer = await family.hand_over(ours.fileno(), 5, 1.5)
        assert answer.pop("reason") == "1.5 s have passed"
        assert answer.pop("failures") == [{"reason": "busy", "count": 2}]
        assert answer == {"moved": 5, "closed": 1, "left": 2, "bytes": 1000}
        await family.supervisor.callRemote(control.TakeConnectionsOver, stream=theirs.fileno())
        stream = await family.service.adopted
        os.write(stream, b"hello")
        assert ours.recv(10) == b"hello"
        os.close(stream)


async def test_a_service_that_can_not_be_made_fails_the_start(family: Family) -> None:
    def make_service(child: Child) -> Service:
        raise SettingsError(["app.module: no module named chat"])

    family.child.begin(make_service)
    await family.round_trip()
    assert family.supervisor.received == ["app.module: no module named chat", 78]
    assert (family.reactor.running, family.child.status) == (False, 78)


def test_children_read_the_same_settings_at_the_same_time() -> None:
    """They share the offset of the file, which another child may move at any moment."""
    shared = os.memfd_create("settings")
    os.write(shared, b"x" * 3_000_000)
    own = os.dup(shared)
    os.lseek(shared, 2_000_000, os.SEEK_SET)
    assert children._read(own) == b"x" * 3_000_000
    assert os.lseek(shared, 0, os.SEEK_CUR) == 2_000_000
    os.close(shared)
