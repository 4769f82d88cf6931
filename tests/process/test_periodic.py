"""Work that rides on the wake-ups of others, by a clock that the test turns."""

from __future__ import annotations

import math

import pytest
from twisted.logger import Logger

from realtime.process.periodic import PeriodicTasks


@pytest.fixture
def chores() -> PeriodicTasks:
    return PeriodicTasks(Logger(observer=lambda event: None))


def test_the_first_interval_begins_with_the_first_wake_up(chores: PeriodicTasks) -> None:
    done: list[str] = []
    chores.add(1.0, lambda: done.append("a"))
    chores.do(100.0)
    assert (done, chores.due()) == ([], 101.0)
    chores.do(100.9)
    assert done == []
    chores.do(101.0)
    assert done == ["a"]


def test_wake_ups_that_are_a_little_late_do_not_add_up(chores: PeriodicTasks) -> None:
    done: list[float] = []
    chores.add(0.25, lambda: done.append(1))
    for turn in range(1001):
        chores.do(100.0 + 0.04 * turn)
    assert len(done) == pytest.approx(40 / 0.25, abs=1)


def test_what_was_missed_is_not_made_up_for(chores: PeriodicTasks) -> None:
    done: list[float] = []
    chores.add(0.25, lambda: done.append(1))
    chores.do(100.0)
    chores.do(200.0)
    chores.do(200.1)
    assert (len(done), chores.due()) == (1, 200.25)


def test_what_is_not_wanted_is_not_waited_for_and_begins_anew(chores: PeriodicTasks) -> None:
    wanted: list[int] = []
    done: list[int] = []
    chores.add(1.0, lambda: done.append(1), wanted=lambda: wanted)
    for now in (100.0, 101.0, 102.0):
        chores.do(now)
    assert (done, chores.due()) == ([], math.inf)
    wanted.append(1)
    chores.do(102.5)
    assert (done, chores.due()) == ([], 103.5)
    chores.do(103.5)
    assert done == [1]


async def test_one_that_fails_takes_nobody_along_and_is_tried_again(chores: PeriodicTasks) -> None:
    done: list[str] = []

    def fail() -> None:
        done.append("fails")
        raise ZeroDivisionError

    chores.add(1.0, fail)
    chores.add(1.0, lambda: done.append("works"))
    for now in (100.0, 101.0, 102.0):
        chores.do(now)
    assert done == ["fails", "works"] * 2
