"""Periodic tasks, with times that the test chooses."""

from __future__ import annotations

import math

import pytest
from twisted.logger import Logger

from realtime.process.periodic import PeriodicTasks


@pytest.fixture
def tasks() -> PeriodicTasks:
    return PeriodicTasks(Logger(observer=lambda event: None))


def test_the_first_interval_begins_with_the_first_wake_up(tasks: PeriodicTasks) -> None:
    done: list[str] = []
    tasks.add(1.0, lambda: done.append("a"))
    tasks.run_due(100.0)
    assert (done, tasks.next_due()) == ([], 101.0)
    tasks.run_due(100.9)
    assert done == []
    tasks.run_due(101.0)
    assert done == ["a"]


def test_small_delays_do_not_add_up(tasks: PeriodicTasks) -> None:
    done: list[float] = []
    tasks.add(0.25, lambda: done.append(1))
    for turn in range(1001):
        tasks.run_due(100.0 + 0.04 * turn)
    assert len(done) == pytest.approx(40 / 0.25, abs=1)


def test_missed_calls_are_not_made_up_for(tasks: PeriodicTasks) -> None:
    done: list[float] = []
    tasks.add(0.25, lambda: done.append(1))
    tasks.run_due(100.0)
    tasks.run_due(200.0)
    tasks.run_due(200.1)
    assert (len(done), tasks.next_due()) == (1, 200.25)


def test_a_task_that_is_not_needed_has_no_due_time_and_begins_anew(tasks: PeriodicTasks) -> None:
    need: list[int] = []
    done: list[int] = []
    tasks.add(1.0, lambda: done.append(1), is_needed=lambda: need)
    for now in (100.0, 101.0, 102.0):
        tasks.run_due(now)
    assert (done, tasks.next_due()) == ([], math.inf)
    need.append(1)
    tasks.run_due(102.5)
    assert (done, tasks.next_due()) == ([], 103.5)
    tasks.run_due(103.5)
    assert done == [1]


def test_a_task_that_raises_does_not_stop_others_and_runs_again(tasks: PeriodicTasks) -> None:
    done: list[str] = []

    def fail() -> None:
        done.append("fails")
        raise ZeroDivisionError

    tasks.add(1.0, fail)
    tasks.add(1.0, lambda: done.append("works"))
    for now in (100.0, 101.0, 102.0):
        tasks.run_due(now)
    assert done == ["fails", "works"] * 2


def test_the_log_names_the_task_that_raised() -> None:
    events: list[dict[str, object]] = []
    tasks = PeriodicTasks(Logger(observer=events.append))  # type: ignore[arg-type]

    def sweep_everything() -> None:
        raise ZeroDivisionError

    tasks.add(0.25, sweep_everything)
    for now in (100.0, 101.0):
        tasks.run_due(now)
    (event,) = events
    assert "sweep_everything" in str(event["name"])
    assert event["interval"] == 0.25
