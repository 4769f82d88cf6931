"""The heartbeat of a loop, by a clock that the test advances."""

from __future__ import annotations

import asyncio
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from twisted.internet.task import Clock

from realtime.config.settings import LoopSettings
from realtime.process.heartbeat import HandlerMarker, Heartbeat, LoadGauges, MeasuredSelector, loop_time
from realtime.process.selector import ReadyEvents
from realtime.supervision.loop_time import LoopTimeLedger, LoopWork
from realtime.supervision.vitals import LatestCalls, ProcessState, RunningHandler, Vitals, VitalsPage


class Beating:
    """A heartbeat and its page."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.clock.advance(100)
        self.page = VitalsPage.create()
        self.selector = MeasuredSelector(self.page)
        self.heartbeat = Heartbeat(self.page, self.clock, LoopSettings(interval=0.01), self.selector)

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
    beating.selector.close()
    beating.page.close()


def test_nothing_is_written_before_the_start(beating: Beating) -> None:
    assert beating.page.read() is None


def test_a_beat_writes_the_time_and_the_load(beating: Beating) -> None:
    gauges = LoadGauges(
        connections=lambda: 3,
        subscriptions=lambda: 5,
        queued_bytes=lambda: 7,
        threads_busy=lambda: 2,
        threads_waiting=lambda: 9,
    )
    readings: list[Vitals] = []
    beating.heartbeat.observe(gauges, readings.append)
    beating.heartbeat.start()
    read = beating.read()
    assert readings == [read]
    assert (read.beat, read.lag, read.state) == (100_000_000_000, 0.0, ProcessState.STARTING)
    assert (read.connections, read.subscriptions, read.queued_bytes) == (3, 5, 7)
    assert (read.threads_busy, read.threads_waiting) == (2, 9)
    assert read.rss > 1_000_000
    beating.clock.advance(0.01)
    assert beating.read().beat == pytest.approx(100_010_000_000)


def test_lag_is_the_delay_of_the_latest_beat(beating: Beating) -> None:
    beating.heartbeat.start()
    beating.clock.advance(0.5)
    assert beating.read().lag == pytest.approx(0.49)
    beating.clock.advance(0.01)
    assert beating.read().lag == pytest.approx(0.0, abs=1e-9)


def test_missed_beats_are_not_made_up_for(beating: Beating) -> None:
    beating.heartbeat.start()
    beating.clock.advance(1.0)
    assert len(beating.clock.getDelayedCalls()) == 1
    assert beating.clock.getDelayedCalls()[0].getTime() == pytest.approx(101.01)


def test_a_new_state_is_written_at_once(beating: Beating) -> None:
    beating.heartbeat.start()
    beating.clock.rightNow += 0.004
    beating.heartbeat.enter(ProcessState.DRAINING)
    assert beating.read().state is ProcessState.DRAINING


def test_what_delayed_the_loop_before_it_was_ready_is_no_lag(beating: Beating) -> None:
    handed: list[Vitals] = []
    beating.heartbeat.observe(LoadGauges(), handed.append)
    beating.heartbeat.start()
    beating.clock.rightNow += 0.5
    beating.heartbeat.enter(ProcessState.READY)
    beating.clock.advance(0.01)
    beating.clock.advance(0.01)
    ready = [vitals for vitals in handed if vitals.state is ProcessState.READY]
    assert ready[0].beat == pytest.approx(100_500_000_000)
    assert max(vitals.lag for vitals in ready) == pytest.approx(0.0, abs=0.011)
    beating.clock.advance(0.5)
    assert beating.read().lag > 0.4


def test_stop_is_idempotent_and_final(beating: Beating) -> None:
    beating.heartbeat.stop()
    beating.heartbeat.start()
    beating.heartbeat.stop()
    beating.heartbeat.stop()
    before = beating.read()
    assert before.state is ProcessState.ENDED
    beating.clock.advance(5)
    assert beating.read() == before
    assert beating.clock.getDelayedCalls() == []


def test_utilization_is_the_share_of_time_without_idling(beating: Beating) -> None:
    beating.heartbeat.start()
    for _ in range(500):
        beating.selector.idle += 7_500_000
        beating.clock.advance(0.01)
    assert beating.read().utilization == pytest.approx(0.25, abs=0.01)
    beating.clock.advance(3.0)  # in one turn, without any idling
    assert beating.read().utilization > 0.95


def test_utilization_follows_within_a_second_or_so(beating: Beating) -> None:
    beating.heartbeat.start()
    for _ in range(100):
        beating.clock.advance(0.01)
    assert beating.read().utilization == pytest.approx(0.63, abs=0.01)


# The selector


def test_a_turn_is_busy_and_a_wait_is_not(beating: Beating) -> None:
    beating.heartbeat.start()
    seen: list[int] = []

    class WatchedSelector(MeasuredSelector):
        def poll(self, timeout: float | None) -> ReadyEvents:
            seen.append(busy_since(self._page))
            return super().poll(timeout)

    selector = WatchedSelector(beating.page)
    before = time.monotonic_ns()
    selector.select(0.001)
    assert seen == [0]
    assert before < busy_since(beating.page) <= time.monotonic_ns()
    assert selector.idle >= 1_000_000
    selector.close()


def test_polling_for_more_work_is_not_idling(beating: Beating) -> None:
    beating.heartbeat.start()
    beating.selector.select(0.001)
    idle = beating.selector.idle
    since = busy_since(beating.page)
    beating.selector.select(0)
    assert beating.selector.idle == idle
    assert busy_since(beating.page) > since
    assert beating.selector.turns == 2


def test_the_exact_length_of_a_long_turn_is_kept(beating: Beating) -> None:
    beginning = [1_000_000_000] * 2
    moments = iter([*beginning, 1_001_000_000, 3_001_000_000, 3_002_000_000, 3_003_000_000, 3_004_000_000])
    selector = MeasuredSelector(beating.page, lambda: next(moments))
    selector.select(0)
    beating.heartbeat.start()
    assert (beating.read().block_since, beating.read().block_until) == (0, 0)
    selector.select(0.001)
    selector.select(0.001)
    assert (beating.read().block_since, beating.read().block_until) == (1_001_000_000, 3_001_000_000)
    selector.close()


def test_all_time_without_idling_is_charged(beating: Beating) -> None:
    time = 0

    def now() -> int:
        nonlocal time
        time += 1_000
        return time

    selector = MeasuredSelector(beating.page, now)
    protocol = selector.accounts.open(LoopWork.PROTOCOL)
    for timeout in (0, 0.001, 0, 0, 0.001, 0.001):
        selector.select(timeout)
        selector.accounts.switch(selector.accounts.switch(protocol))
    selector.select(0.001)
    charged = {account.kind: account.spent for account in selector.accounts}
    assert charged[LoopWork.PROTOCOL] == 6_000
    # Each of the four waits took as long as it takes to read this clock.
    assert selector.idle == 4_000
    assert sum(charged.values()) + selector.idle == time - 1_000
    selector.close()


def test_a_beat_is_charged_to_the_timers(beating: Beating) -> None:
    beating.heartbeat.start()
    beating.clock.advance(0.01)
    (timers,) = (account for account in beating.selector.accounts if account.kind is LoopWork.TIMERS)
    assert timers.spent > 0


def test_callbacks_are_events_and_queued_callbacks(beating: Beating) -> None:
    reader, writer = os.pipe()
    beating.selector.register(reader, selectors.EVENT_READ)
    beating.selector.attach(SimpleNamespace(_ready=[1, 2, 3]))
    os.write(writer, b"x")
    beating.selector.select(1)
    assert beating.selector.callbacks == 4
    os.close(reader)
    os.close(writer)


def test_an_asyncio_loop_runs_on_the_selector(beating: Beating) -> None:
    beating.heartbeat.start()
    selector = MeasuredSelector(beating.page)
    busy: list[int] = []

    def run() -> None:
        loop = asyncio.SelectorEventLoop(selector)
        loop.call_later(0.001, lambda: busy.append(busy_since(beating.page)))
        loop.call_later(0.002, loop.stop)
        loop.run_forever()
        loop.close()

    thread = threading.Thread(target=run)  # this one has a loop already
    thread.start()
    thread.join()
    assert busy[0] > 0
    assert selector.turns >= 1
    assert selector.idle > 500_000


def test_direct_readers_need_no_turns_of_asyncio_and_delay_nothing_else(beating: Beating) -> None:
    selector, seen, turns = MeasuredSelector(beating.page), list[str](), list[int]()
    ours, peer = socket.socketpair()

    def read() -> None:
        message = ours.recv(100).decode()
        seen.append(message)
        match message:
            case "call":
                loop.call_soon(say, "called")
            case "timer":
                loop.call_later(0.001, say, "timed")
            case "thread":
                loop.call_soon_threadsafe(say, "woken")
            case "stop":
                loop.stop()
            case number:
                turns.append(selector.turns)
                peer.send(str(int(number) + 1).encode() if int(number) < 20 else b"call")

    def say(word: str) -> None:
        seen.append(word)
        peer.send({"called": b"timer", "timed": b"thread", "woken": b"stop"}[word])

    def run() -> None:
        loop.call_later(0.0, ticks.append, "a timer that was due before")
        selector.add_direct_reader(ours.fileno(), read)
        peer.send(b"1")
        loop.run_forever()
        loop.close()

    class CountingLoop(asyncio.SelectorEventLoop):
        asyncio_turns = 0

        def _run_once(self) -> None:
            self.asyncio_turns += 1
            super()._run_once()  # type: ignore[misc]

    ticks: list[str] = []
    loop = CountingLoop(selector)
    selector.attach(loop)
    thread = threading.Thread(target=run)  # this one has a loop already
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    assert seen == [*map(str, range(1, 21)), "call", "called", "timer", "timed", "thread", "woken", "stop"]
    assert ticks and len(set(turns)) == 20  # the selector has waited for each message
    assert loop.asyncio_turns < 15
    ours.close()
    peer.close()


# Idle beats


class IdleSelector(MeasuredSelector):
    """Waits for the whole timeout on a clock of its own, and `late` nanoseconds longer."""

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


class Idling:
    """A loop that idles; the test fires its timers."""

    def __init__(self) -> None:
        self.page = VitalsPage.create()
        self.selector = IdleSelector(
            self.page, lambda: self.selector.now if hasattr(self, "selector") else IdleSelector.now
        )
        self.selector.waits = []
        self.timers: list[tuple[float, Callable[[], None]]] = []
        self.heartbeat = Heartbeat(self.page, self, LoopSettings(interval=0.01), self.selector, beats_idle=True)
        self.readings: list[Vitals] = []
        self.heartbeat.observe(LoadGauges(), self.readings.append)
        self.heartbeat.start()
        self.readings.clear()

    def seconds(self) -> float:
        return self.selector.now / 1e9

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
def idling() -> Iterator[Idling]:
    idling = Idling()
    yield idling
    idling.selector.close()
    idling.page.close()


def test_an_idle_loop_beats_without_a_turn_or_a_timer(idling: Idling) -> None:
    assert idling.timers == []
    assert idling.selector.select(0.1) == []
    assert idling.selector.turns == 1
    assert idling.selector.waits == pytest.approx([0.01] * 10, abs=1e-6)
    assert idling.read().beat == pytest.approx(idling.selector.now)


def test_the_first_turn_after_idling_writes_a_whole_reading_and_sets_a_timer(idling: Idling) -> None:
    idling.heartbeat.observe(LoadGauges(connections=lambda: 7), idling.readings.append)
    idling.selector.select(0.095)
    assert [reading.connections for reading in idling.readings] == [idling.read().connections] == [7]
    assert [delay for delay, _ in idling.timers] == pytest.approx([0.005])
    idling.selector.select(0.05)  # the timer beats from now on
    assert len(idling.readings) == 1
    assert idling.selector.waits[-1] == 0.05


def test_an_event_ends_idling_at_once(idling: Idling) -> None:
    reader, writer = os.pipe()
    idling.selector.register(reader, selectors.EVENT_READ)
    os.write(writer, b"x")
    assert len(idling.selector.select(None)) == 1
    assert idling.readings == []  # there was no idle beat, so nothing has changed
    assert len(idling.timers) == 1
    os.close(reader)
    os.close(writer)


def test_a_loop_that_polls_for_more_work_has_a_timer(idling: Idling) -> None:
    idling.selector.select(0)
    assert len(idling.timers) == 1


def test_a_late_idle_beat_becomes_a_beat_with_its_lag(idling: Idling) -> None:
    idling.selector.late = 20_000_000
    idling.selector.select(1)
    assert len(idling.selector.waits) == 1
    assert [delay for delay, _ in idling.timers] == [0.0]
    idling.fire()
    assert idling.read().lag == pytest.approx(0.02, abs=1e-6)


def test_a_periodic_task_ends_idling(idling: Idling) -> None:
    done: list[float] = []
    idling.heartbeat.tasks.add(0.05, lambda: done.append(idling.seconds()))
    idling.selector.select(0)
    idling.fire()  # a beat, with which the interval begins
    began = idling.seconds()
    idling.selector.select(None)
    idling.fire()
    assert done == [pytest.approx(began + 0.05)]


def test_time_between_idle_beats_is_idle_time(idling: Idling) -> None:
    idling.selector.select(0.1)
    assert idling.selector.idle == pytest.approx(100_000_000, rel=1e-6)
    assert busy_since(idling.page) == idling.selector.now


def test_no_timer_is_left_when_the_heartbeat_stops_while_idling(idling: Idling) -> None:
    idling.heartbeat.stop()
    idling.selector.select(0.03)
    assert idling.timers == []
    assert idling.read().state is ProcessState.ENDED


# The marker


def test_the_inner_handler_is_marked_and_then_the_outer_again(beating: Beating) -> None:
    accounts = LoopTimeLedger(lambda: 0)
    first, second = (accounts.open(LoopWork.HANDLER, name) for name in ("rpc a", "on_publish chat:*"))
    marker = HandlerMarker(beating.page, accounts)
    outside = marker.enter((b"rpc a", b"a"), first)
    inside = marker.enter((b"on_publish chat:*", b"chat:1"), second)
    assert accounts.current is second
    assert beating.page.running() == RunningHandler("on_publish chat:*", "chat:1")
    marker.leave(inside)
    assert beating.page.running() == RunningHandler("rpc a", "a")
    assert accounts.current is first
    marker.leave(outside)
    assert beating.page.running() is None


def test_the_calls_of_a_handler_are_counted_in_each_turn(beating: Beating) -> None:
    clock = iter(range(0, 10_000, 10))
    accounts = LoopTimeLedger(lambda: next(clock))
    account = accounts.open(LoopWork.HANDLER, "rpc a")
    marker = HandlerMarker(beating.page, accounts)
    for turn in (1, 2):
        accounts.turn = turn
        for _ in range(3):
            marker.leave(marker.enter((b"rpc a", b"a"), account))
        assert beating.page.latest_calls() == LatestCalls("rpc a", turn, 3, 20 / 1e9)


def test_slowing_down_never_shortens_the_interval(beating: Beating) -> None:
    beating.heartbeat.slow_down(0.5)
    beating.heartbeat.slow_down(0.1)
    beating.heartbeat.start()
    assert beating.clock.getDelayedCalls()[0].getTime() == pytest.approx(100.5)


def test_the_time_of_each_account_is_a_sample() -> None:
    accounts = LoopTimeLedger(lambda: 0)
    accounts.open(LoopWork.HANDLER, "rpc report").spent = 1_500_000_000
    samples = {tuple(sample.labels): sample.value for sample in loop_time(accounts)}
    assert samples == {(("kind", "other"), ("name", "none")): 0.0, (("kind", "handler"), ("name", "rpc report")): 1.5}
