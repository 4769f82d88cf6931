"""Health monitor: how often it checks each worker, and when it calls listeners, functions and tasks."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from twisted.internet.task import Clock

from realtime.config.settings import LoopSettings, WorkersSettings
from realtime.supervision.health import CHECK_INTERVAL, RECOVERY_TIME, Condition, Health
from realtime.supervision.pool import Pool
from realtime.supervision.slots import BROKER
from realtime.supervision.vitals import ProcessState, Vitals
from realtime.supervisor.health_monitor import FULL_CHECK_INTERVAL, HealthMonitor


class Worker:
    """A process whose loop beats at every time of the clock, unless it is blocked."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.blocked_at = 0.0
        self.lag = 0.0

    @property
    def vitals(self) -> Vitals:
        beat, lag, _ = self.peek()
        return Vitals(beat, lag, 1, 1, ProcessState.READY)

    def peek(self) -> tuple[int, float, int]:
        beat = self.blocked_at or self._clock.seconds()
        return int(beat * 1e9), self.lag, 0


class Scene:
    def __init__(self) -> None:
        self.clock = Clock()
        self.clock.advance(100)
        self.pool = Pool(2, WorkersSettings(), LoopSettings(), 30.0, broker=False)
        self.pool.start(100.0)
        self.processes: dict[int, Any] = {0: Worker(self.clock), 1: Worker(self.clock)}
        self.monitor = HealthMonitor(self.clock, LoopSettings(interval=0.01), self.pool, self.processes)
        self.changes: list[tuple[int, Condition]] = []
        self.monitor.listeners.append(lambda slot, health: self.changes.append((slot, health.condition)))

    def pass_time(self, seconds: float) -> None:
        for _ in range(round(seconds / CHECK_INTERVAL)):
            self.clock.advance(CHECK_INTERVAL)

    def take_changes(self) -> list[tuple[int, Condition]]:
        changes, self.changes[:] = list(self.changes), []
        return changes


@pytest.fixture
def scene() -> Scene:
    scene = Scene()
    scene.monitor.start()
    return scene


def test_listeners_are_called_for_changes_only(scene: Scene) -> None:
    assert scene.take_changes() == [(0, Condition.ABSENT), (1, Condition.ABSENT)]
    scene.pool.process_ready(scene.pool.slots[0].process.generation, scene.clock.seconds())
    scene.pool.process_ready(scene.pool.slots[1].process.generation, scene.clock.seconds())
    scene.pass_time(1)
    assert scene.take_changes() == [(0, Condition.HEALTHY), (1, Condition.HEALTHY)]
    scene.processes[1].blocked_at = scene.clock.seconds()
    scene.pass_time(0.3)
    assert scene.take_changes() == [(1, Condition.LAGGING), (1, Condition.PRESSED)]
    scene.processes[1].blocked_at = 0.0
    scene.pass_time(RECOVERY_TIME + 0.1)
    assert scene.take_changes() == [(1, Condition.HEALTHY)]


def test_a_process_that_exits_is_draining_and_then_absent(scene: Scene) -> None:
    scene.pool.process_ready(scene.pool.slots[0].process.generation, scene.clock.seconds())
    scene.pass_time(0.1)
    scene.take_changes()
    scene.pool.control_link_lost(scene.pool.slots[0].process.generation, scene.clock.seconds())
    scene.pass_time(0.1)
    assert scene.take_changes() == [(0, Condition.DRAINING)]
    del scene.processes[0]
    scene.pool.process_exited(scene.pool.slots[0].process.generation, 0, scene.clock.seconds())
    scene.pass_time(0.1)
    assert scene.take_changes() == [(0, Condition.ABSENT)]


def test_health_is_up_to_date_when_a_listener_is_called(scene: Scene) -> None:
    seen: list[list[Condition]] = []
    scene.monitor.listeners.append(
        lambda *_: seen.append([health.condition for health in scene.monitor.health.values()])
    )
    for slot in (0, 1):
        scene.pool.process_ready(scene.pool.slots[slot].process.generation, scene.clock.seconds())
    scene.pass_time(CHECK_INTERVAL)
    assert seen == [[Condition.HEALTHY, Condition.HEALTHY]] * 2


async def test_a_listener_that_raises_does_not_end_the_monitoring(scene: Scene) -> None:
    def fail(slot: int, health: Health) -> None:
        raise ValueError("a mistake")

    scene.monitor.listeners.insert(0, fail)
    scene.pool.process_ready(scene.pool.slots[0].process.generation, scene.clock.seconds())
    scene.pass_time(0.1)
    assert (0, Condition.HEALTHY) in scene.changes


def all_ready(scene: Scene) -> None:
    for slot in (0, 1):
        scene.pool.process_ready(scene.pool.slots[slot].process.generation, scene.clock.seconds())
    scene.pass_time(2 * CHECK_INTERVAL)


def checks_in(scene: Scene, seconds: float) -> int:
    checks: list[float] = []
    scene.monitor.after_check = [lambda: checks.append(scene.clock.seconds())]
    scene.pass_time(seconds)
    return len(checks)


def test_healthy_workers_get_a_few_full_checks_a_second(scene: Scene) -> None:
    assert checks_in(scene, 1.0) == pytest.approx(1 / CHECK_INTERVAL, abs=2)  # no worker is ready
    all_ready(scene)
    assert checks_in(scene, 1.0) <= 1 / FULL_CHECK_INTERVAL
    scene.processes[1].blocked_at = scene.clock.seconds()
    assert checks_in(scene, 1.0) > 0.9 / CHECK_INTERVAL


def test_quick_checks_of_healthy_workers_are_more_frequent_than_beats(scene: Scene) -> None:
    all_ready(scene)
    peeks: list[float] = []
    scene.processes[0].peek = lambda: (peeks.append(scene.clock.seconds()), Worker.peek(scene.processes[0]))[1]
    for _ in range(1000):
        scene.clock.advance(0.001)
    assert max(after - before for before, after in pairwise(peeks)) <= LoopSettings().interval


def test_a_late_beat_causes_a_full_check(scene: Scene) -> None:
    all_ready(scene)
    scene.processes[1].lag = 0.02
    lags: list[float] = []
    scene.monitor.after_check = [lambda: lags.append(scene.monitor.health[1].lag)]
    scene.pass_time(LoopSettings().interval)
    assert lags == pytest.approx([0.02])


def test_a_block_is_noticed_in_time_also_after_a_healthy_period(scene: Scene) -> None:
    all_ready(scene)
    for begins in range(4):
        scene.pass_time(RECOVERY_TIME + 0.1 + begins * CHECK_INTERVAL / 2)
        scene.take_changes()
        scene.processes[1].blocked_at = blocked = scene.clock.seconds()
        while scene.take_changes() != [(1, Condition.LAGGING)]:
            scene.clock.advance(CHECK_INTERVAL / 10)
        # The beats of these workers are due every 10 ms.
        assert scene.clock.seconds() - blocked <= LoopSettings().lagging + 1.6 * CHECK_INTERVAL
        scene.processes[1].blocked_at = 0.0


def test_tasks_run_after_full_checks(scene: Scene) -> None:
    done: list[float] = []
    scene.monitor.tasks.add(0.1, lambda: done.append(scene.clock.seconds()))
    scene.pass_time(2)
    assert len(done) == pytest.approx(19, abs=1)
    all_ready(scene)
    done.clear()
    scene.pass_time(2)
    assert len(done) >= 6


def test_an_exception_in_a_check_does_not_end_the_monitoring(scene: Scene) -> None:
    scene.pool.slots = None  # type: ignore[assignment]
    for _ in range(3):
        with pytest.raises(AttributeError):
            scene.clock.advance(CHECK_INTERVAL)
    assert scene.clock.getDelayedCalls()


def test_stop_ends_all_checks_and_may_be_repeated(scene: Scene) -> None:
    scene.monitor.stop()
    scene.monitor.stop()
    assert scene.clock.getDelayedCalls() == []


def test_the_broker_is_checked_by_its_own_slower_beat() -> None:
    clock = Clock()
    clock.advance(100)
    pool = Pool(1, WorkersSettings(), LoopSettings(), 30.0)
    pool.start(100.0)
    processes: dict[int, Any] = {0: Worker(clock), BROKER: Worker(clock)}
    monitor = HealthMonitor(clock, LoopSettings(), pool, processes)
    changes: list[int] = []
    monitor.listeners.append(lambda slot, health: changes.append(slot))
    monitor.start()
    for slot in pool.slots:
        pool.process_ready(pool.slots[slot].process.generation, 100.0)

    def condition_after(seconds: float) -> Condition:
        for _ in range(round(seconds / CHECK_INTERVAL)):
            clock.advance(CHECK_INTERVAL)
        assert monitor.broker is not None
        return monitor.broker.condition

    assert condition_after(1.0) is Condition.HEALTHY
    processes[BROKER].blocked_at = clock.seconds()
    assert condition_after(0.9) is Condition.HEALTHY
    assert condition_after(0.5) is Condition.PRESSED
    assert set(changes) == {0}, "listeners steer clients, which the broker does not have"
    processes[BROKER].blocked_at = 0.0
    assert condition_after(RECOVERY_TIME + 0.1) is Condition.HEALTHY
    monitor.stop()
