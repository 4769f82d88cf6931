"""The timers of the server's own code."""

from __future__ import annotations

from math import inf

import pytest
from twisted.internet.error import AlreadyCalled, AlreadyCancelled

from realtime.process.timers import Timers


class Clock:
    now = 100.0

    def seconds(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def timers(clock: Clock) -> Timers:
    return Timers(clock.seconds)


def test_calls_are_made_in_the_order_of_their_times(clock: Clock, timers: Timers) -> None:
    made: list[object] = []
    timers.callLater(2, made.append, "second")
    timers.callLater(1, made.append, "first")
    timers.callLater(2, made.append, "third")
    timers.run_due()
    assert (made, timers.next_due) == ([], 101.0)
    clock.now += 2
    timers.run_due()
    assert (made, timers.next_due) == (["first", "second", "third"], inf)


def test_a_call_for_now_that_a_call_makes_follows_in_the_next_turn(timers: Timers) -> None:
    made: list[str] = []

    def again() -> None:
        made.append("made")
        timers.callLater(0, again)

    timers.callLater(0, again)
    timers.run_due()
    assert made == ["made"]
    timers.run_due()
    assert made == ["made", "made"]


def test_a_call_that_runs_the_timers_itself_is_made_once(clock: Clock, timers: Timers) -> None:
    """As when a call blocks, and the relief thread makes the next ones."""
    made: list[str] = []

    def first() -> None:
        made.append("first")
        timers.run_due()

    timers.callLater(0, first)
    timers.callLater(0, made.append, "second")
    timers.run_due()
    assert made == ["first", "second"]


def test_calls_can_be_cancelled_and_moved(clock: Clock, timers: Timers) -> None:
    made: list[str] = []
    cancelled = timers.callLater(1, made.append, "cancelled")
    delayed = timers.callLater(1, made.append, "delayed")
    earlier = timers.callLater(9, made.append, "earlier")
    cancelled.cancel()
    delayed.reset(3)
    earlier.reset(2)
    clock.now += 2
    timers.run_due()
    assert made == ["earlier"]
    assert timers.getDelayedCalls() == [delayed]
    clock.now += 1
    timers.run_due()
    assert made == ["earlier", "delayed"]
    with pytest.raises(AlreadyCancelled):
        cancelled.cancel()
    with pytest.raises(AlreadyCalled):
        delayed.cancel()


def test_cancelled_calls_do_not_pile_up(timers: Timers) -> None:
    for _ in range(1000):
        timers.callLater(30, print).cancel()
    assert len(timers._calls) < 200
    assert timers.getDelayedCalls() == []


def test_a_call_that_raises_does_not_keep_the_next_one(timers: Timers) -> None:
    made: list[str] = []
    timers.callLater(0, lambda: 1 / 0)
    timers.callLater(0, made.append, "next")
    timers.run_due()
    assert made == ["next"]
