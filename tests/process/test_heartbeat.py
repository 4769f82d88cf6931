"""The beat of a loop, on a clock that the test turns."""

from __future__ import annotations

import asyncio
import os
import selectors
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from twisted.internet.task import Clock

from realtime.config.settings import LoopSettings
from realtime.process.heartbeat import HandlerMarker, Heartbeat, LoadGauges, MeasuredSelector
from realtime.process.selector import ReadyEvents
from realtime.supervision.loop_time import LoopTimeLedger, LoopWork
from realtime.supervision.vitals import ProcessState, RunningHandler, Vitals, VitalsPage


class Beating:
    def __init__(self) -> None:
        self.clock = Clock()
        self.clock.advance(100)
        self.page = VitalsPage.create()
        self.turns = MeasuredSelector(self.page)
        self.pulse = Heartbeat(self.page, self.clock, LoopSettings(interval=0.01), self.turns)

    def read(self) -> Vitals:
        reading = self.page.read()
        assert reading is not None
        return reading


def busy_since(page: VitalsPage) -> int:
    reading = page.read()
    assert reading is not None
    return reading.busy_since


@pytest.fixture
def beating() -> Iterator[Beating]:
    beating = Beating()
    yield beating
    beating.turns.close()
    beating.page.close()


def test_nothing_is_written_before_the_start(beating: Beating) -> None:
    assert beating.page.read() is None


def test_a_beat_tells_the_time_and_what_is_held(beating: Beating) -> None:
    gauges = LoadGauges(
        connections=lambda: 3,
        subscriptions=lambda: 5,
        queued_bytes=lambda: 7,
        threads_busy=lambda: 2,
        threads_waiting=lambda: 9,
    )
    handed: list[Vitals] = []
    beating.pulse.observe(gauges, handed.append)
    beating.pulse.start()
    read = beating.read()
    assert handed == [read]
    assert (read.beat, read.lag, read.state) == (100_000_000_000, 0.0, ProcessState.STARTING)
    assert (read.connections, read.subscriptions, read.queued_bytes) == (3, 5, 7)
    assert (read.threads_busy, read.threads_waiting) == (2, 9)
    assert read.rss > 1_000_000
    beating.clock.advance(0.01)
    assert beating.read().beat == pytest.approx(100_010_000_000)


def test_lag_is_how_late_the_latest_beat_was(beating: Beating) -> None:
    beating.pulse.start()
    beating.clock.advance(0.5)
    assert beating.read().lag == pytest.approx(0.49)
    beating.clock.advance(0.01)
    assert beating.read().lag == pytest.approx(0.0, abs=1e-9)


def test_missed_beats_are_not_made_up_for(beating: Beating) -> None:
    beating.pulse.start()
    beating.clock.advance(1.0)
    assert len(beating.clock.getDelayedCalls()) == 1
    assert beating.clock.getDelayedCalls()[0].getTime() == pytest.approx(101.01)


def test_a_new_state_shows_at_once(beating: Beating) -> None:
    beating.pulse.start()
    beating.clock.rightNow += 0.004
    beating.pulse.enter(ProcessState.DRAINING)
    assert beating.read().state is ProcessState.DRAINING


def test_stop_is_idempotent_and_final(beating: Beating) -> None:
    beating.pulse.stop()
    beating.pulse.start()
    beating.pulse.stop()
    beating.pulse.stop()
    before = beating.read()
    assert before.state is ProcessState.ENDED
    beating.clock.advance(5)
    assert beating.read() == before
    assert beating.clock.getDelayedCalls() == []


def test_utilization_is_the_share_that_was_not_idle(beating: Beating) -> None:
    beating.pulse.start()
    for _ in range(500):
        beating.turns.idle += 7_500_000
        beating.clock.advance(0.01)
    assert beating.read().utilization == pytest.approx(0.25, abs=0.01)
    beating.clock.advance(3.0)  # in one turn, without any idling
    assert beating.read().utilization > 0.95


def test_utilization_follows_within_a_second_or_so(beating: Beating) -> None:
    beating.pulse.start()
    for _ in range(100):
        beating.clock.advance(0.01)
    assert beating.read().utilization == pytest.approx(0.63, abs=0.01)


# Turns.


def test_a_turn_is_busy_and_a_wait_is_not(beating: Beating) -> None:
    beating.pulse.start()
    seen: list[int] = []

    class WatchedTurns(MeasuredSelector):
        def poll(self, timeout: float | None) -> ReadyEvents:
            seen.append(busy_since(self._page))
            return super().poll(timeout)

    turns = WatchedTurns(beating.page)
    before = time.monotonic_ns()
    turns.select(0.001)
    assert seen == [0]
    assert before < busy_since(beating.page) <= time.monotonic_ns()
    assert turns.idle >= 1_000_000
    turns.close()


def test_to_look_for_more_work_is_not_to_idle(beating: Beating) -> None:
    beating.pulse.start()
    beating.turns.select(0.001)
    idle = beating.turns.idle
    since = busy_since(beating.page)
    beating.turns.select(0)
    assert beating.turns.idle == idle
    assert busy_since(beating.page) > since
    assert beating.turns.turns == 2


def test_the_exact_length_of_a_long_turn_is_kept(beating: Beating) -> None:
    beginning = [1_000_000_000] * 2
    moments = iter([*beginning, 1_001_000_000, 3_001_000_000, 3_002_000_000, 3_003_000_000, 3_004_000_000])
    turns = MeasuredSelector(beating.page, lambda: next(moments))
    turns.select(0)
    beating.pulse.start()
    assert (beating.read().block_since, beating.read().block_until) == (0, 0)
    turns.select(0.001)
    turns.select(0.001)
    assert (beating.read().block_since, beating.read().block_until) == (1_001_000_000, 3_001_000_000)
    turns.close()


def test_all_that_is_not_idle_is_charged(beating: Beating) -> None:
    time = 0

    def now() -> int:
        nonlocal time
        time += 1_000
        return time

    turns = MeasuredSelector(beating.page, now)
    protocol = turns.accounts.open(LoopWork.PROTOCOL)
    for timeout in (0, 0.001, 0, 0, 0.001, 0.001):
        turns.select(timeout)
        turns.accounts.switch(turns.accounts.switch(protocol))
    turns.select(0.001)
    charged = {account.kind: account.spent for account in turns.accounts}
    assert charged[LoopWork.PROTOCOL] == 6_000
    # Each of the four waits took as long as it takes to read this clock.
    assert turns.idle == 4_000
    assert sum(charged.values()) + turns.idle == time - 1_000
    turns.close()


def test_a_beat_is_charged_to_the_timers(beating: Beating) -> None:
    beating.pulse.start()
    beating.clock.advance(0.01)
    (timers,) = (account for account in beating.turns.accounts if account.kind is LoopWork.TIMERS)
    assert timers.spent > 0


def test_callbacks_are_events_and_what_is_queued(beating: Beating) -> None:
    reader, writer = os.pipe()
    beating.turns.register(reader, selectors.EVENT_READ)
    beating.turns.ready = [1, 2, 3]
    os.write(writer, b"x")
    beating.turns.select(1)
    assert beating.turns.callbacks == 4
    os.close(reader)
    os.close(writer)


def test_a_loop_runs_on_it(beating: Beating) -> None:
    beating.pulse.start()
    turns = MeasuredSelector(beating.page)
    busy: list[int] = []

    def run() -> None:
        loop = asyncio.SelectorEventLoop(turns)
        loop.call_later(0.001, lambda: busy.append(busy_since(beating.page)))
        loop.call_later(0.002, loop.stop)
        loop.run_forever()
        loop.close()

    thread = threading.Thread(target=run)  # this one has a loop already
    thread.start()
    thread.join()
    assert busy[0] > 0
    assert turns.turns >= 1
    assert turns.idle > 500_000


# Rest.


class IdleTurns(MeasuredSelector):
    """Takes as long as it is told to, on a clock of its own, and `late` longer."""

    now = 1_000_000_000
    late = 0
    waits: list[float]

    def poll(self, timeout: float | None) -> ReadyEvents:
        assert timeout is not None
        self.waits.append(timeout)
        ready = super().poll(0)
        if not ready:
            self.now += round(timeout * 1e9) + self.late
        return ready


class Resting:
    """A loop that idles; its timers are set off by the test."""

    def __init__(self) -> None:
        self.page = VitalsPage.create()
        self.turns = IdleTurns(self.page, lambda: self.turns.now if hasattr(self, "turns") else IdleTurns.now)
        self.turns.waits = []
        self.timers: list[tuple[float, Callable[[], None]]] = []
        self.pulse = Heartbeat(self.page, self, LoopSettings(interval=0.01), self.turns)
        self.pulse.rests = True
        self.told: list[Vitals] = []
        self.pulse.observe(LoadGauges(), self.told.append)
        self.pulse.start()
        self.told.clear()

    def seconds(self) -> float:
        return self.turns.now / 1e9

    def callLater(self, delay: float, f: Callable[[], None]) -> Any:
        timer = delay, f
        self.timers.append(timer)
        return SimpleNamespace(cancel=lambda: self.timers.remove(timer))

    def fire(self) -> None:
        self.timers.pop()[1]()

    def read(self) -> Vitals:
        reading = self.page.read()
        assert reading is not None
        return reading


@pytest.fixture
def resting() -> Iterator[Resting]:
    resting = Resting()
    yield resting
    resting.turns.close()
    resting.page.close()


def test_a_loop_that_idles_beats_without_a_turn_or_a_timer(resting: Resting) -> None:
    assert resting.timers == []
    assert resting.turns.select(0.1) == []
    assert resting.turns.turns == 1
    assert resting.turns.waits == pytest.approx([0.01] * 10, abs=1e-6)
    assert resting.read().beat == pytest.approx(resting.turns.now)


def test_when_it_has_work_everything_is_told_and_the_next_beat_is_a_timers(resting: Resting) -> None:
    resting.pulse.observe(LoadGauges(connections=lambda: 7), resting.told.append)
    resting.turns.select(0.095)
    assert [told.connections for told in resting.told] == [resting.read().connections] == [7]
    assert [delay for delay, _ in resting.timers] == pytest.approx([0.005])
    resting.turns.select(0.05)  # that timer's from now on
    assert len(resting.told) == 1
    assert resting.turns.waits[-1] == 0.05


def test_an_event_ends_the_rest_at_once(resting: Resting) -> None:
    reader, writer = os.pipe()
    resting.turns.register(reader, selectors.EVENT_READ)
    os.write(writer, b"x")
    assert len(resting.turns.select(None)) == 1
    assert resting.told == []  # it did not nod, so there is no news
    assert len(resting.timers) == 1
    os.close(reader)
    os.close(writer)


def test_a_loop_that_only_looks_for_more_work_has_a_timer(resting: Resting) -> None:
    resting.turns.select(0)
    assert len(resting.timers) == 1


def test_a_nod_that_is_late_is_a_beat_that_tells_of_it(resting: Resting) -> None:
    resting.turns.late = 20_000_000
    resting.turns.select(1)
    assert len(resting.turns.waits) == 1
    assert [delay for delay, _ in resting.timers] == [0.0]
    resting.fire()
    assert resting.read().lag == pytest.approx(0.02, abs=1e-6)


def test_a_chore_ends_the_rest(resting: Resting) -> None:
    done: list[float] = []
    resting.pulse.chores.add(0.05, lambda: done.append(resting.seconds()))
    resting.turns.select(0)
    resting.fire()  # a beat, with which the interval begins
    began = resting.seconds()
    resting.turns.select(None)
    resting.fire()
    assert done == [pytest.approx(began + 0.05)]


def test_time_at_rest_is_idle(resting: Resting) -> None:
    resting.turns.select(0.1)
    assert resting.turns.idle == pytest.approx(100_000_000, rel=1e-6)
    assert busy_since(resting.page) == resting.turns.now


def test_no_timer_is_left_when_it_stops_at_rest(resting: Resting) -> None:
    resting.pulse.stop()
    resting.turns.select(0.03)
    assert resting.timers == []
    assert resting.read().state is ProcessState.ENDED


# Marks.


def test_the_inner_handler_counts_and_the_outer_comes_back(beating: Beating) -> None:
    accounts = LoopTimeLedger(lambda: 0)
    first, second = (accounts.open(LoopWork.HANDLER, name) for name in ("rpc a", "on_publish chat:*"))
    marks = HandlerMarker(beating.page, accounts)
    outside = marks.enter((b"rpc a", b"a"), first)
    inside = marks.enter((b"on_publish chat:*", b"chat:1"), second)
    assert accounts.current is second
    assert beating.page.running() == RunningHandler("on_publish chat:*", "chat:1")
    marks.leave(inside)
    assert beating.page.running() == RunningHandler("rpc a", "a")
    assert accounts.current is first
    marks.leave(outside)
    assert beating.page.running() is None
