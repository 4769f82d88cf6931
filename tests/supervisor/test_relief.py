"""Relief: which workers learn that another one can take their new clients."""

from __future__ import annotations

from typing import Any

import pytest

from realtime.config.settings import LoopSettings
from realtime.supervision.health import Condition, Health
from realtime.supervision.vitals import ProcessState, Vitals
from realtime.supervisor.relief import Relief

LOOP = LoopSettings(max_queued_bytes=1000, max_threads_waiting=10, max_rss=5000, max_utilization=0.5)


class Process:
    relief: bool | None = None

    def set_relief(self, available: bool) -> None:
        self.relief = available


def health(slot: int, condition: Condition = Condition.HEALTHY, **vitals: Any) -> Health:
    absent = condition is Condition.ABSENT
    return Health(slot, condition, 0.0, vitals=None if absent else Vitals(1, 0.0, 0, 0, ProcessState.READY, **vitals))


def reliefs(*found: Health) -> list[bool | None]:
    processes = {slot: Process() for slot in range(len(found))}
    Relief(LOOP, dict(enumerate(found)), processes).update()
    return [process.relief for process in processes.values()]


def test_a_single_worker_has_no_relief() -> None:
    assert reliefs(health(0)) == [False]


@pytest.mark.parametrize("condition", [Condition.PRESSED, Condition.DRAINING, Condition.ABSENT])
def test_a_worker_that_accepts_nothing_relieves_no_other(condition: Condition) -> None:
    assert reliefs(health(0), health(1, condition)) == [False, True]
    assert reliefs(health(0, condition), health(1, condition)) == [False, False]


def test_a_lagging_worker_still_accepts() -> None:
    assert reliefs(health(0, Condition.PRESSED), health(1, Condition.LAGGING)) == [True, False]


@pytest.mark.parametrize("over", [{"queued_bytes": 1000}, {"threads_waiting": 10}, {"rss": 5000}])
def test_a_worker_over_a_limit_of_its_own_relieves_no_other(over: dict[str, int]) -> None:
    assert reliefs(health(0), health(1, **over)) == [False, True]


def test_a_busy_worker_still_accepts() -> None:
    assert reliefs(health(0), health(1, utilization=0.9)) == [True, True]


def test_a_slot_without_a_process_is_skipped() -> None:
    process = Process()
    Relief(LOOP, {0: health(0), 1: health(1, Condition.ABSENT)}, {0: process}).update()
    assert process.relief is False


def test_a_changed_condition_is_published_at_once() -> None:
    found, process = {0: health(0), 1: health(1)}, Process()
    relief = Relief(LOOP, found, {0: process})
    relief.update()
    found[1] = health(1, Condition.PRESSED)
    relief.condition_changed(1, found[1])
    assert process.relief is False
