"""Substitutes: which workers learn that another one can take their new clients."""

from __future__ import annotations

from typing import Any

import pytest

from realtime.config.settings import LoopSettings
from realtime.supervision.health import Condition, Health
from realtime.supervision.vitals import ProcessState, Vitals
from realtime.supervisor.substitutes import Substitutes

LOOP = LoopSettings(max_queued_bytes=1000, max_threads_waiting=10, max_rss=5000, max_utilization=0.5)


class Process:
    substitute: bool | None = None

    def set_substitute(self, available: bool) -> None:
        self.substitute = available


def health(slot: int, condition: Condition = Condition.HEALTHY, **vitals: Any) -> Health:
    absent = condition is Condition.ABSENT
    return Health(slot, condition, 0.0, vitals=None if absent else Vitals(1, 0.0, 0, 0, ProcessState.READY, **vitals))


def substitutes(*found: Health) -> list[bool | None]:
    processes = {slot: Process() for slot in range(len(found))}
    Substitutes(LOOP, dict(enumerate(found)), processes).update()
    return [process.substitute for process in processes.values()]


def test_a_single_worker_has_no_substitute() -> None:
    assert substitutes(health(0)) == [False]


@pytest.mark.parametrize("condition", [Condition.PRESSED, Condition.DRAINING, Condition.ABSENT])
def test_a_worker_that_accepts_nothing_replaces_no_other(condition: Condition) -> None:
    assert substitutes(health(0), health(1, condition)) == [False, True]
    assert substitutes(health(0, condition), health(1, condition)) == [False, False]


def test_a_lagging_worker_still_accepts() -> None:
    assert substitutes(health(0, Condition.PRESSED), health(1, Condition.LAGGING)) == [True, False]


@pytest.mark.parametrize("over", [{"queued_bytes": 1000}, {"threads_waiting": 10}, {"rss": 5000}])
def test_a_worker_over_a_limit_of_its_own_replaces_no_other(over: dict[str, int]) -> None:
    assert substitutes(health(0), health(1, **over)) == [False, True]


def test_a_busy_worker_still_accepts() -> None:
    assert substitutes(health(0), health(1, utilization=0.9)) == [True, True]


def test_a_slot_without_a_process_is_skipped() -> None:
    process = Process()
    Substitutes(LOOP, {0: health(0), 1: health(1, Condition.ABSENT)}, {0: process}).update()
    assert process.substitute is False


def test_a_changed_condition_is_published_at_once() -> None:
    found, process = {0: health(0), 1: health(1)}, Process()
    published = Substitutes(LOOP, found, {0: process})
    published.update()
    found[1] = health(1, Condition.PRESSED)
    published.condition_changed(1, found[1])
    assert process.substitute is False
