"""Deadlines, with simulated time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from realtime.deadlines import MAX_STEP, RESOLUTION, Deadlines


class Owner:
    def __init__(self, deadlines: Deadlines) -> None:
        self.deadline_bucket = 0
        self.deadlines = deadlines
        self.called_at: list[float] = []
        self.is_aborted = False

    def abort(self) -> None:
        self.is_aborted = True

    def on_deadline(self) -> None:
        self.called_at.append(self.deadlines.now)


def sweep(deadlines: Deadlines, start: float, seconds: float) -> float:
    steps = round(seconds / RESOLUTION)
    for step in range(1, steps + 1):
        deadlines.sweep(start + step * RESOLUTION)
    return start + steps * RESOLUTION


@given(st.lists(st.floats(min_value=0, max_value=30), max_size=30))
def test_each_deadline_is_called_once_and_within_its_resolution(delays):
    deadlines = Deadlines(100.0)
    owners = [(delay, Owner(deadlines)) for delay in delays]
    for delay, owner in owners:
        deadlines.set(owner, delay)
    sweep(deadlines, 100.0, 31)
    for delay, owner in owners:
        (woken,) = owner.called_at
        assert delay <= woken <= delay + 2 * RESOLUTION
        assert owner.deadline_bucket == 0


def test_a_later_deadline_replaces_an_earlier_one():
    deadlines = Deadlines(0.0)
    owner = Owner(deadlines)
    deadlines.set(owner, 1.0)
    deadlines.set(owner, 5.0)
    now = sweep(deadlines, 0.0, 4)
    assert owner.called_at == []
    sweep(deadlines, now, 2)
    assert owner.called_at == [5.0]


def test_a_cleared_deadline_is_not_called():
    deadlines = Deadlines(0.0)
    owner = Owner(deadlines)
    deadlines.set(owner, 1.0)
    deadlines.clear(owner)
    deadlines.clear(owner)
    sweep(deadlines, 0.0, 3)
    assert owner.called_at == []


def test_on_deadline_may_clear_another_due_deadline():
    deadlines = Deadlines(0.0)
    first, second = Owner(deadlines), Owner(deadlines)
    first.on_deadline = lambda: deadlines.clear(second)  # type: ignore[method-assign]
    deadlines.set(first, 1.0)
    deadlines.set(second, 1.0)
    sweep(deadlines, 0.0, 3)
    assert second.called_at == []


def test_on_deadline_may_set_the_deadline_again():
    deadlines = Deadlines(0.0)
    owner = Owner(deadlines)
    woken: list[float] = []

    def wake() -> None:
        woken.append(deadlines.now)
        deadlines.set(owner, deadlines.now + 1.0)

    owner.on_deadline = wake  # type: ignore[method-assign]
    deadlines.set(owner, 1.0)
    sweep(deadlines, 0.0, 3)
    assert woken == [1.0, 2.0, 3.0]


def test_a_blocked_loop_or_a_clock_set_back_does_not_advance_deadlines():
    deadlines = Deadlines(0.0)
    owner = Owner(deadlines)
    deadlines.set(owner, 5.0)
    deadlines.sweep(RESOLUTION)
    deadlines.sweep(60.0)
    assert deadlines.now == RESOLUTION + MAX_STEP
    deadlines.sweep(30.0)
    assert deadlines.now == RESOLUTION + MAX_STEP
    assert owner.called_at == []


def test_a_deadline_set_after_a_pause_of_the_sweeps_is_not_early():
    deadlines = Deadlines(0.0)
    deadlines.sweep(RESOLUTION)
    owner = Owner(deadlines)
    assert not deadlines.any()
    deadlines.set(owner, deadlines.now + 1.0)
    assert deadlines.any()
    sweep(deadlines, 100.0, 1.0 - RESOLUTION)
    assert owner.called_at == []
    sweep(deadlines, 101.0, 2 * RESOLUTION)
    assert len(owner.called_at) == 1
    assert not deadlines.any()


def test_an_exception_of_one_owner_does_not_lose_the_others():
    reported: list[Exception] = []
    deadlines = Deadlines(0.0, reported.append)
    owners = [Owner(deadlines) for _ in range(3)]

    def fail() -> None:
        raise ZeroDivisionError

    owners[1].on_deadline = fail
    for owner in owners:
        deadlines.set(owner, 0.2)
    deadlines.sweep(RESOLUTION)
    assert [len(owner.called_at) for owner in owners] == [1, 0, 1]
    assert [owner.is_aborted for owner in owners] == [False, True, False]
    assert [type(error) for error in reported] == [ZeroDivisionError]


def test_an_exception_that_is_not_reported_is_raised_and_loses_no_owner():
    deadlines = Deadlines(0.0)
    owners = [Owner(deadlines) for _ in range(2)]

    def fail() -> None:
        raise ZeroDivisionError

    owners[0].on_deadline = fail
    for owner in owners:
        deadlines.set(owner, 0.2)
    with pytest.raises(ZeroDivisionError):
        deadlines.sweep(RESOLUTION)
    deadlines.sweep(2 * RESOLUTION)
    assert len(owners[1].called_at) == 1
