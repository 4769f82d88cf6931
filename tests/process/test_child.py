"""How a child process begins and ends, seen from the supervisor's end of its link."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from realtime import metrics
from realtime.config.settings import Settings, ShutdownSettings
from realtime.errors import EngineUnavailable, SettingsError
from realtime.metrics import Sample
from realtime.process import child as children
from realtime.process import control, diagnostics
from realtime.process.child import Child
from realtime.supervision.loop_time import LoopWork
from realtime.supervision.vitals import ProcessState, VitalsPage
from tests.transports.stage import eventually


class Reactor(Clock):
    """A clock that can be stopped, and runs what other threads and signal handlers ask for at once."""

    running = True

    def stop(self) -> None:
        self.running = False

    def callFromThread(self, function: Any, *arguments: Any) -> None:
        function(*arguments)


class Supervisor(control.Peer):
    """The other end of the link."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[object] = []

    @control.Ready.responder
    def ready(self) -> dict[str, object]:
        self.heard.append("ready")
        return {}

    @control.Failed.responder
    def failed(self, reason: str) -> dict[str, object]:
        self.heard.append(reason)
        return {}

    @control.LinkLost.responder
    def link_lost(self) -> dict[str, object]:
        self.heard.append("link lost")
        return {}


class Family:
    """A child and its supervisor, joined by a real socketpair on the test's reactor; the child's timers by a clock."""

    def __init__(self) -> None:
        from twisted.internet import reactor

        self.reactor = Reactor()
        self.reactor.advance(100)
        self.page = VitalsPage.create()
        self.child = Child(1, Settings(shutdown=ShutdownSettings(timeout=5.0)), (), self.page, self.reactor)
        self.supervisor = Supervisor()
        for end, protocol in zip(socket.socketpair(), (self.child.control, self.supervisor), strict=True):
            children._adopt(reactor, end.detach(), protocol)

    @property
    def state(self) -> ProcessState:
        vitals = self.page.read()
        assert vitals is not None
        return vitals.state

    async def round_trip(self) -> None:
        """Until everything that the child has sent by now was heard."""
        await self.child.control.callRemote(control.LinkLost)
        assert self.supervisor.heard.pop() == "link lost"


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


async def nothing(child: Child) -> None:
    return None


async def test_ready_is_told_when_start_has_returned(family: Family) -> None:
    gate: Deferred[None] = Deferred()

    async def start(child: Child) -> None:
        await gate

    family.child.begin(start)
    await family.round_trip()
    assert (family.supervisor.heard, family.state) == ([], ProcessState.STARTING)
    gate.callback(None)
    await family.round_trip()
    assert (family.supervisor.heard, family.state) == (["ready"], ProcessState.READY)


async def test_a_misconfiguration_is_told_in_one_line(family: Family) -> None:
    async def start(child: Child) -> None:
        raise SettingsError(["app.module: no module named chat", "app.path: no such directory"])

    family.child.begin(start)
    await family.round_trip()
    assert family.supervisor.heard == ["app.module: no module named chat; app.path: no such directory"]
    assert (family.reactor.running, family.child.status) == (False, 78)


async def test_a_supervisor_that_does_not_listen_does_not_hold_up_the_failure(family: Family) -> None:
    async def start(child: Child) -> None:
        raise SettingsError(["no"])

    family.supervisor.transport.pauseProducing()
    family.child.begin(start)
    assert family.reactor.running
    family.reactor.advance(3)
    assert (family.reactor.running, family.child.status) == (False, 78)


@pytest.mark.parametrize(("error", "status"), [(EngineUnavailable("later"), 75), (ZeroDivisionError(), 70)])
async def test_other_failures_have_their_status(family: Family, error: Exception, status: int) -> None:
    async def start(child: Child) -> None:
        raise error

    family.child.begin(start)
    assert (family.reactor.running, family.child.status) == (False, status)


async def test_a_stream_is_given_to_the_hook(family: Family) -> None:
    got: Deferred[tuple[int, int]] = Deferred()
    family.child.on_link = lambda slot, stream: got.callback((slot, stream))
    ours, theirs = socket.socketpair()
    await family.supervisor.callRemote(control.Link, slot=1, stream=theirs.fileno())
    slot, stream = await got
    os.write(stream, b"hello")
    assert (slot, ours.recv(10)) == (1, b"hello")
    for fd in (ours, theirs):
        fd.close()
    os.close(stream)


async def test_a_stream_that_comes_too_early_is_asked_for_again(family: Family) -> None:
    ours, theirs = socket.socketpair()
    await family.supervisor.callRemote(control.Link, slot=1, stream=theirs.fileno())
    theirs.close()
    assert ours.recv(1) == b""
    ours.close()
    assert family.supervisor.heard == ["link lost"]


async def test_metrics_are_collected(family: Family) -> None:
    family.child.metrics.counter("realtime_things", "Things.", kind="a").value += 3
    answer = await family.supervisor.callRemote(control.Collect, names=[])
    collected = metrics.load(answer["metrics"])
    assert Sample("realtime_things", "counter", "Things.", [("kind", "a")], 3) in collected


@pytest.mark.parametrize("count", [0, 600, 2_000, 20_000])
async def test_any_number_of_metrics_arrives_whole(family: Family, count: int) -> None:
    samples = [Sample(f"realtime_{number}", "counter", "x" * 100, [], number) for number in range(count)]
    family.child.metrics.sources = [lambda: samples]
    answer = await family.supervisor.callRemote(control.Collect, names=[])
    assert metrics.load(answer["metrics"]) == samples


async def test_only_the_metrics_that_are_asked_for_are_told(family: Family) -> None:
    family.child.metrics.counter("realtime_things", "Things.", kind="a").value += 3
    family.child.metrics.gauge("realtime_level", "A level.", lambda: 7)
    for name in ("realtime_things", "realtime_level", "realtime_loop_seconds", "realtime_nothing"):
        answer = await family.supervisor.callRemote(control.Collect, names=[name])
        assert {sample.name for sample in metrics.load(answer["metrics"])} == {name} - {"realtime_nothing"}


async def test_the_time_of_the_loop_is_a_metric_of_each_account(family: Family) -> None:
    family.child.accounts.open(LoopWork.HANDLER, "rpc report").spent = 1_500_000_000
    answer = await family.supervisor.callRemote(control.Collect, names=["realtime_loop_seconds"])
    told = {tuple(sample.labels): sample.value for sample in metrics.load(answer["metrics"])}
    assert told[("kind", "handler"), ("name", "rpc report")] == 1.5
    assert (("kind", "other"), ("name", "")) in told


async def test_it_tells_of_itself_when_asked(family: Family) -> None:
    answer = await family.supervisor.callRemote(control.Report, what="stacks")
    assert "Thread MainThread" in answer["text"].decode()


async def test_a_report_that_fails_does_not_end_the_link(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(diagnostics.REPORTS, "memory", lambda: 1 / 0)
    answer = await family.supervisor.callRemote(control.Report, what="memory")
    assert "memory can't be told: ZeroDivisionError" in answer["text"].decode()
    await family.round_trip()


async def test_a_long_report_arrives_whole_and_an_endless_one_is_cut(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = "".join(map(str, range(100_000)))
    for text in ("", "x" * 65_535, "x" * 65_536, long):
        monkeypatch.setitem(diagnostics.REPORTS, "tasks", lambda text=text: text)
        answer = await family.supervisor.callRemote(control.Report, what="tasks")
        assert answer["text"].decode() == text
    monkeypatch.setattr(control.Long, "LONGEST", 100_000)
    answer = await family.supervisor.callRemote(control.Report, what="tasks")
    assert answer["text"].decode() == long[:100_000]


async def test_drain_runs_the_hook_and_ends_with_0(family: Family) -> None:
    family.child.begin(nothing)
    given: list[float] = []
    done: Deferred[None] = Deferred()

    async def drain(timeout: float) -> None:
        given.append(timeout)
        await done

    family.child.on_drain = drain
    await family.supervisor.callRemote(control.Drain, timeout=4.0)
    family.reactor.advance(0)
    assert (given, family.state, family.reactor.running) == ([4.0], ProcessState.DRAINING, True)
    done.callback(None)
    assert (family.reactor.running, family.child.status) == (False, 0)


async def test_a_drain_has_a_deadline_that_the_kernel_keeps_too(family: Family) -> None:
    family.child.begin(nothing)
    family.child.on_drain = lambda timeout: Deferred()
    family.child.drain(4.0)
    assert 4.0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 5.0
    family.reactor.advance(4.1)
    assert (family.reactor.running, family.child.status) == (False, 0)


async def test_a_second_drain_can_only_come_nearer(family: Family) -> None:
    calls: list[float] = []

    async def drain(timeout: float) -> None:
        calls.append(timeout)
        await Deferred()

    family.child.begin(nothing)
    family.child.on_drain = drain
    family.child.drain(60.0)
    family.child.drain(10.0)
    assert 10.0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 11.0
    family.child.drain(100.0)
    assert signal.getitimer(signal.ITIMER_REAL)[0] <= 11.0
    assert calls == [60.0]


async def test_a_drain_that_raises_ends_all_the_same(family: Family) -> None:
    async def drain(timeout: float) -> None:
        raise ZeroDivisionError

    family.child.begin(nothing)
    family.child.on_drain = drain
    family.child.drain(4.0)
    assert (family.reactor.running, family.child.status) == (False, 0)


async def test_sigterm_drains(family: Family) -> None:
    family.child.begin(nothing)
    os.kill(os.getpid(), signal.SIGTERM)
    assert (family.child.draining, family.reactor.running) == (True, False)


async def test_the_end_of_the_link_drains(family: Family) -> None:
    given: list[float] = []

    async def drain(timeout: float) -> None:
        given.append(timeout)

    family.child.begin(nothing)
    family.child.on_drain = drain
    family.supervisor.transport.abortConnection()
    await eventually(lambda: not family.reactor.running)
    assert given == [5.0]  # shutdown.timeout, which is less than an orphan has


async def test_an_alarm_that_a_stranger_set_off_is_undone(family: Family) -> None:
    family.child.begin(nothing)
    signal.alarm(1000)
    family.reactor.advance(3.1)
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
    family.child.on_drain = lambda timeout: Deferred()
    family.child.drain(4.0)
    family.reactor.advance(3.1)
    assert signal.getitimer(signal.ITIMER_REAL)[0] > 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="prctl is Linux's")
def test_the_signal_number_is_a_fitting_number_of_seconds() -> None:
    assert children.ORPHAN_DRAIN + 1 < signal.SIGUSR2 < 15


def test_a_child_whose_supervisor_is_gone_before_it_begins_does_not_begin() -> None:
    ours, theirs = socket.socketpair()
    assert not children._has_hung_up(theirs.fileno())
    ours.close()
    assert children._has_hung_up(theirs.fileno())
    theirs.close()


async def test_a_stream_of_rescued_connections_is_given_to_its_hook(family: Family) -> None:
    ours, theirs = socket.socketpair()
    await family.supervisor.callRemote(control.Adopt, stream=theirs.fileno())
    theirs.close()
    assert ours.recv(1) == b""  # without a hook it is closed
    got: Deferred[int] = Deferred()
    family.child.on_adopt = got.callback
    again, theirs = socket.socketpair()
    await family.supervisor.callRemote(control.Adopt, stream=theirs.fileno())
    stream = await got
    os.write(stream, b"hello")
    assert again.recv(10) == b"hello"
    for one in (ours, theirs, again):
        one.close()
    os.close(stream)
