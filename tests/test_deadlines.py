"""Shared deadlines, in made-up time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from realtime.deadlines import MAX_STEP, RESOLUTION, Deadlines


class Sleeper:
    def __init__(self, deadlines: Deadlines) -> None:
        self.bucket = 0
        self.deadlines = deadlines
        self.woken: list[float] = []

    def wake(self) -> None:
        self.woken.append(self.deadlines.now)


def sweep(deadlines: Deadlines, start: float, seconds: float) -> float:
    steps = round(seconds / RESOLUTION)
    for step in range(1, steps + 1):
        deadlines.sweep(start + step * RESOLUTION)
    return start + steps * RESOLUTION


@given(st.lists(st.floats(min_value=0, max_value=30), max_size=30))
def test_everybody_is_woken_once_and_not_early_nor_much_late(delays):
    deadlines = Deadlines(100.0)
    sleepers = [(delay, Sleeper(deadlines)) for delay in delays]
    for delay, sleeper in sleepers:
        deadlines.set(sleeper, delay)
    sweep(deadlines, 100.0, 31)
    for delay, sleeper in sleepers:
        (woken,) = sleeper.woken
        assert delay <= woken <= delay + 2 * RESOLUTION
        assert sleeper.bucket == 0


def test_a_later_deadline_takes_the_place_of_an_earlier_one():
    deadlines = Deadlines(0.0)
    sleeper = Sleeper(deadlines)
    deadlines.set(sleeper, 1.0)
    deadlines.set(sleeper, 5.0)
    now = sweep(deadlines, 0.0, 4)
    assert sleeper.woken == []
    sweep(deadlines, now, 2)
    assert sleeper.woken == [5.0]


def test_a_cleared_deadline_does_not_come():
    deadlines = Deadlines(0.0)
    sleeper = Sleeper(deadlines)
    deadlines.set(sleeper, 1.0)
    deadlines.clear(sleeper)
    deadlines.clear(sleeper)
    sweep(deadlines, 0.0, 3)
    assert sleeper.woken == []


def test_one_that_wakes_may_clear_another_that_is_due_too():
    deadlines = Deadlines(0.0)
    first, second = Sleeper(deadlines), Sleeper(deadlines)
    first.wake = lambda: deadlines.clear(second)  # type: ignore[method-assign]
    deadlines.set(first, 1.0)
    deadlines.set(second, 1.0)
    sweep(deadlines, 0.0, 3)
    assert second.woken == []


def test_one_that_wakes_may_sleep_again():
    deadlines = Deadlines(0.0)
    sleeper = Sleeper(deadlines)
    woken: list[float] = []

    def wake() -> None:
        woken.append(deadlines.now)
        deadlines.set(sleeper, deadlines.now + 1.0)

    sleeper.wake = wake  # type: ignore[method-assign]
    deadlines.set(sleeper, 1.0)
    sweep(deadlines, 0.0, 3)
    assert woken == [1.0, 2.0, 3.0]


def test_a_stalled_loop_and_a_clock_that_goes_back_cost_nobody_anything():
    deadlines = Deadlines(0.0)
    sleeper = Sleeper(deadlines)
    deadlines.set(sleeper, 5.0)
    deadlines.sweep(RESOLUTION)
    deadlines.sweep(60.0)
    assert deadlines.now == RESOLUTION + MAX_STEP
    deadlines.sweep(30.0)
    assert deadlines.now == RESOLUTION + MAX_STEP
    assert sleeper.woken == []


def test_without_sweeps_while_nobody_waits_the_first_who_does_is_not_woken_early():
    deadlines = Deadlines(0.0)
    deadlines.sweep(RESOLUTION)
    sleeper = Sleeper(deadlines)
    assert not deadlines.any()
    deadlines.set(sleeper, deadlines.now + 1.0)
    assert deadlines.any()
    sweep(deadlines, 100.0, 1.0 - RESOLUTION)
    assert sleeper.woken == []
    sweep(deadlines, 101.0, 2 * RESOLUTION)
    assert len(sleeper.woken) == 1
    assert not deadlines.any()


def test_one_that_fails_takes_nobody_along():
    deadlines = Deadlines(0.0)
    sleepers = [Sleeper(deadlines) for _ in range(3)]

    def fail() -> None:
        raise ZeroDivisionError

    sleepers[1].wake = fail
    for sleeper in sleepers:
        deadlines.set(sleeper, 0.2)
    with pytest.raises(ZeroDivisionError):
        deadlines.sweep(RESOLUTION)
    deadlines.sweep(2 * RESOLUTION)
    assert [len(sleeper.woken) for sleeper in sleepers] == [1, 0, 1]
