"""Pressure begins at once when a limit is reached, and ends RECOVERY_TIME after it was last reached."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from realtime.config.settings import LoopSettings
from realtime.supervision.loop_time import LoopAccount, LoopWork
from realtime.supervision.pressure import RECOVERY_TIME, Pressure, Throttle
from realtime.supervision.vitals import ProcessState, Vitals

LOOP = LoopSettings(
    interval=0.01, max_lag=0.2, max_utilization=0.9, max_rss=1000, max_queued_bytes=500, max_threads_waiting=9
)
FINE = Vitals(0, 0.0, 3, 3, ProcessState.READY)


class Worker:
    """A pressure, with its clock and its beats."""

    def __init__(self, loop: LoopSettings = LOOP) -> None:
        self.now = 1000.0
        self.pressure = Pressure(loop, lambda: self.now)

    def beat(self, **vitals: Any) -> None:
        self.pressure.observe(replace(FINE, beat=int(self.now * 1e9), **vitals))

    def pass_calmly(self, seconds: float) -> None:
        until = self.now + seconds
        while self.now < until - 1e-6:
            self.now = min(self.now + 0.01, until)
            self.beat()


def test_a_memory_limit_below_the_memory_of_a_worker_without_clients_refuses_no_work() -> None:
    worker = Worker()
    worker.beat(state=ProcessState.STARTING, rss=1500)
    worker.beat(rss=1500)
    worker.beat(rss=2000)
    assert not worker.pressure.pressed
    worker.beat(rss=2000, queued_bytes=500)
    assert worker.pressure.reasons == ("queued_bytes",)


def test_without_a_limit_reached_there_is_no_pressure() -> None:
    worker = Worker()
    assert worker.pressure.reasons == ()
    worker.pass_calmly(1)
    assert (worker.pressure.reasons, worker.pressure.pressed, worker.pressure.load) == ((), False, 0.0)


@pytest.mark.parametrize(
    ("name", "value"), [("lag", 0.2), ("rss", 1000), ("queued_bytes", 500), ("threads_waiting", 9)]
)
def test_pressure_lasts_from_reaching_a_limit_until_the_recovery_time_has_passed(name: str, value: float) -> None:
    worker = Worker()
    worker.beat()
    worker.beat(**{name: value})
    assert worker.pressure.reasons == (name,)
    assert worker.pressure.pressed
    assert worker.pressure.load >= 1
    worker.pass_calmly(RECOVERY_TIME - 0.02)
    assert worker.pressure.reasons == (name,)
    worker.pass_calmly(0.03)
    assert worker.pressure.reasons == ()
    assert not worker.pressure.pressed


@pytest.mark.parametrize(
    ("name", "value"), [("lag", 0.19), ("rss", 999), ("queued_bytes", 499), ("threads_waiting", 8)]
)
def test_below_a_limit_there_is_no_pressure(name: str, value: float) -> None:
    worker = Worker()
    worker.beat(**{name: value})
    assert worker.pressure.reasons == ()


@pytest.mark.parametrize("name", ["lag", "utilization", "rss", "queued_bytes", "threads_waiting"])
def test_a_limit_of_zero_is_off(name: str) -> None:
    worker = Worker(replace(LOOP, **{f"max_{name}": 0}))
    worker.beat(**{name: 10**9})
    worker.now += 10**6 if name == "lag" else 0
    assert worker.pressure.reasons == ()
    assert worker.pressure.load == 0
    assert not worker.pressure.busy


def test_utilization_warns_and_causes_no_pressure() -> None:
    worker = Worker()
    worker.beat(utilization=1.0)
    assert worker.pressure.busy
    assert (worker.pressure.reasons, worker.pressure.pressed, worker.pressure.load) == ((), False, 0.0)
    worker.pass_calmly(RECOVERY_TIME + 0.01)
    assert not worker.pressure.busy


def test_an_overdue_beat_is_lag_before_the_timer_fires() -> None:
    worker = Worker()
    worker.beat()
    worker.now += 0.209
    assert not worker.pressure.pressed
    worker.now += 0.002
    assert worker.pressure.reasons == ("lag",)
    assert worker.pressure.lag == pytest.approx(0.201)


def test_an_overdue_first_beat_is_lag() -> None:
    worker = Worker()
    worker.now += 0.211
    assert worker.pressure.reasons == ("lag",)


def test_lag_of_a_starting_worker_does_not_count() -> None:
    worker = Worker()
    worker.beat(lag=3.0, state=ProcessState.STARTING)
    assert worker.pressure.reasons == ()
    worker.beat(lag=3.0)
    assert worker.pressure.reasons == ("lag",)


def test_load_is_the_lag_as_a_share_of_its_limit() -> None:
    worker = Worker()
    worker.beat(lag=0.05)
    assert worker.pressure.load == pytest.approx(0.25)
    worker.pass_calmly(0.1)
    assert worker.pressure.load == pytest.approx(0.25)
    worker.beat(lag=0.1)
    assert worker.pressure.load == pytest.approx(0.5)


def test_several_limits_can_be_reached_together() -> None:
    worker = Worker()
    worker.beat(lag=0.3, queued_bytes=10**6)
    assert set(worker.pressure.reasons) == {"lag", "queued_bytes"}


@given(st.lists(st.tuples(st.floats(0.001, 0.3), st.floats(0, 1)), min_size=1, max_size=60))
def test_lag_is_the_maximum_of_the_recovery_time(beats: list[tuple[float, float]]) -> None:
    worker = Worker()
    history: list[tuple[float, float]] = []
    for wait, lag in beats:
        worker.now += wait
        worker.beat(lag=lag)
        at = int(worker.now * 1e9) / 1e9
        history.append((at, lag))
        assert worker.pressure.lag == max(lag for when, lag in history if worker.now - when < RECOVERY_TIME)


# -- throttles --------------------------------------------------------------------------------------------------------

MAX_LAG = 0.2


class Handler:
    """A throttled handler whose calls the test begins and ends, on a loop that it blocks."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.account = LoopAccount(LoopWork.HANDLER, "rpc report")
        self.throttle = Throttle(self.account)

    def begin(self, calls: int) -> int:
        """Begin `calls` calls, as far as admitted, and end none. Returns the number of admitted calls."""
        admitted = 0
        for _ in range(calls):
            if self.throttle.admits():
                self.throttle.enter()
                admitted += 1
        return admitted

    def end(self) -> None:
        while self.throttle.running:
            self.throttle.leave()

    def block(self, seconds: float, spent: float | None = None) -> None:
        """Block the loop for `seconds`, of which this handler takes `spent` seconds, by default all."""
        self.now += seconds
        self.account.spent += int(1e9 * (seconds if spent is None else spent))
        self.throttle.observe(self.now, seconds, MAX_LAG)

    def burst(self, calls: int, each: float) -> int:
        """Begin `calls` calls at once. Each admitted call then blocks the loop for `each` seconds."""
        admitted = self.begin(calls)
        self.block(admitted * each)
        self.end()
        self.pass_calmly(0.02)
        return admitted

    def pass_calmly(self, seconds: float) -> None:
        for _ in range(round(seconds / 0.02)):
            self.now += 0.02
            self.throttle.observe(self.now, 0.0, MAX_LAG)


def test_a_handler_has_no_limit_before_it_causes_pressure() -> None:
    handler = Handler()
    assert handler.begin(1000) == 1000
    handler.block(0.19)
    assert handler.begin(1000) == 1000


def test_after_a_burst_the_limit_keeps_the_lag_low() -> None:
    handler = Handler()
    assert handler.burst(100, 0.02) == 100
    assert handler.throttle.limit == 5
    assert handler.burst(100, 0.02) == 5


def test_calls_that_are_known_to_block_are_limited_before_they_cause_lag() -> None:
    handler = Handler()
    handler.pass_calmly(0.02)
    for _ in range(handler.throttle.sample):
        handler.burst(1, 0.02)
    assert handler.burst(100, 0.02) == 5


def test_calls_that_take_little_are_not_limited_by_their_number() -> None:
    handler = Handler()
    for _ in range(3):
        assert handler.burst(5, 0.01) == 5
    assert handler.begin(1000) == 1000


def test_the_number_of_calls_settles_where_the_lag_is_half_its_limit() -> None:
    handler = Handler()
    handler.burst(100, 0.02)
    for _ in range(200):
        assert handler.burst(100, 0.02) <= 6
    assert handler.throttle.limit in (5, 6)


def test_a_handler_is_not_throttled_for_the_lag_of_another() -> None:
    handler = Handler()
    handler.begin(100)
    handler.block(2.0, spent=0.9)
    assert handler.throttle.limit is None


def test_one_call_is_always_admitted() -> None:
    handler = Handler()
    handler.burst(1, 10.0)
    assert handler.throttle.limit == 1
    assert handler.burst(5, 10.0) == 1


def test_a_limit_rises_while_there_is_room_and_is_removed_when_not_needed() -> None:
    handler = Handler()
    handler.burst(100, 0.02)
    handler.begin(6)  # one too many
    handler.end()
    handler.pass_calmly(RECOVERY_TIME + 0.02)
    assert handler.throttle.limit == 6
    handler.pass_calmly(Throttle.LIFT_AFTER)
    assert handler.throttle.limit == 6
    handler.pass_calmly(2 * RECOVERY_TIME)
    assert handler.throttle.limit is None


@given(st.lists(st.tuples(st.integers(0, 50), st.floats(0, 0.5), st.floats(0, 1)), max_size=40))
def test_a_throttle_always_admits_some_calls(stretches: list[tuple[int, float, float]]) -> None:
    handler = Handler()
    for calls, seconds, share in stretches:
        admitted = handler.begin(calls)
        assert admitted == calls or admitted == handler.throttle.limit
        handler.block(seconds, seconds * share)
        handler.end()
        assert handler.throttle.limit is None or handler.throttle.limit >= 1
