"""Vital signs -> condition, on a clock that the test sets."""

from __future__ import annotations

from realtime.config.settings import LoopSettings
from realtime.supervision.health import CHECK_INTERVAL, RECOVERY_TIME, Condition, Health, HealthTracker
from realtime.supervision.vitals import ProcessState, Vitals

ABSENT, HEALTHY, LAGGING, PRESSED, DRAINING = Condition


class Scene:
    """A tracker that checks every CHECK_INTERVAL, and a worker whose loop beats unless the test stops it."""

    def __init__(self, loop: LoopSettings | None = None) -> None:
        self.tracker = HealthTracker(loop or LoopSettings(interval=0.01))
        self.now = 100.0
        self.beat = 100.0
        self.lag = 0.0
        self.state = ProcessState.READY
        self.busy_since = 0.0

    def check(self, leaving: bool = False) -> Health:
        vitals = Vitals(int(self.beat * 1e9), self.lag, 3, 5, self.state, busy_since=int(self.busy_since * 1e9))
        return self.tracker.assess(0, vitals, self.now, leaving)

    def pass_time(self, seconds: float, beating: bool = True) -> Health:
        end = self.now + seconds
        health = self.check()
        while self.now < end - CHECK_INTERVAL / 2:
            self.now += CHECK_INTERVAL
            if beating:
                self.beat = self.now
            health = self.check()
        return health

    def late_beat(self) -> Health:
        """End a block: the loop turns again, and its timer is late by the length of the block."""
        self.now += CHECK_INTERVAL
        self.lag = self.now - self.beat - 0.01
        self.beat = self.now
        health = self.check()
        self.lag = 0.0
        return health


def test_a_loop_that_beats_is_healthy() -> None:
    health = Scene().pass_time(5)
    assert (health.condition, health.lag, health.connections, health.subscriptions) == (HEALTHY, 0.0, 3, 5)


def test_no_process_is_absent() -> None:
    scene = Scene()
    assert scene.tracker.assess(0, None, 100.0).condition is ABSENT
    assert scene.pass_time(1).condition is HEALTHY
    assert scene.tracker.assess(0, None, scene.now).condition is ABSENT


def test_a_blocked_loop_is_lagging_and_then_pressed() -> None:
    scene = Scene()
    scene.pass_time(1)
    assert scene.pass_time(0.05, beating=False).condition is HEALTHY
    assert scene.pass_time(0.02, beating=False).condition is LAGGING
    health = scene.pass_time(0.2, beating=False)
    assert health.condition is PRESSED
    assert 0.2 <= health.lag <= 0.27


def test_a_worker_is_healthy_again_after_a_while_without_cause() -> None:
    scene = Scene()
    scene.pass_time(1)
    scene.pass_time(0.3, beating=False)
    assert scene.late_beat().condition is PRESSED
    assert scene.pass_time(RECOVERY_TIME - 3 * CHECK_INTERVAL).condition is PRESSED
    assert scene.pass_time(4 * CHECK_INTERVAL).condition is HEALTHY


def test_late_timers_count_although_the_loop_beats() -> None:
    scene = Scene()
    scene.pass_time(1)
    scene.lag = 0.06
    assert scene.pass_time(0.02).condition is LAGGING
    scene.lag = 0.25
    assert scene.pass_time(0.02).condition is PRESSED
    scene.lag = 0.06
    assert scene.pass_time(2).condition is LAGGING


def test_a_long_turn_counts_before_a_beat_is_late() -> None:
    scene = Scene(LoopSettings(interval=10.0, stuck=20.0))
    scene.pass_time(1)
    scene.busy_since = scene.now
    assert scene.pass_time(0.04, beating=False).condition is HEALTHY
    health = scene.pass_time(0.02, beating=False)
    assert health.condition is LAGGING
    assert 0.05 <= health.lag <= 0.07


def test_a_beat_from_the_future_counts_as_a_blocked_loop() -> None:
    scene = Scene()
    scene.pass_time(1)
    scene.beat = scene.now + 3600
    assert scene.check().condition is PRESSED


def test_since_is_the_beginning_of_the_condition() -> None:
    scene = Scene()
    scene.pass_time(1)
    blocked = scene.pass_time(0.1, beating=False)
    later = scene.pass_time(0.05, beating=False)
    assert later.since == blocked.since > 101.0


def test_a_block_during_a_pause_of_the_checks_does_not_count() -> None:
    scene = Scene()
    scene.pass_time(1)
    scene.now += 15  # all processes were stopped; the supervisor resumes first
    assert scene.check().condition is HEALTHY
    assert scene.late_beat().condition is HEALTHY
    assert scene.pass_time(1).condition is HEALTHY


def test_a_loop_that_stays_blocked_counts_from_the_end_of_the_pause() -> None:
    scene = Scene()
    scene.pass_time(1)
    scene.now += 15
    scene.check()
    assert scene.pass_time(0.04, beating=False).condition is HEALTHY
    assert scene.pass_time(0.04, beating=False).condition is LAGGING
    assert scene.pass_time(0.2, beating=False).condition is PRESSED


def test_a_draining_worker_is_draining_at_any_lag() -> None:
    scene = Scene()
    scene.pass_time(1)
    assert scene.check(leaving=True).condition is DRAINING
    scene.state = ProcessState.DRAINING
    assert scene.pass_time(1, beating=False).condition is DRAINING


def test_a_worker_whose_loop_has_ended_is_absent_and_not_late() -> None:
    scene = Scene()
    scene.pass_time(1)
    scene.state = ProcessState.ENDED
    health = scene.pass_time(1, beating=False)
    assert (health.condition, health.blocked) == (ABSENT, 0.0)


def test_a_new_process_does_not_inherit_the_condition() -> None:
    scene = Scene()
    scene.pass_time(1)
    assert scene.pass_time(1, beating=False).condition is PRESSED
    scene.tracker.assess(0, None, scene.now)
    scene.beat = scene.now
    assert scene.check().condition is HEALTHY


def test_a_limit_of_zero_is_off() -> None:
    scene = Scene(LoopSettings(interval=0.01, lagging=0, max_lag=0))
    assert scene.pass_time(5, beating=False).condition is HEALTHY


def test_each_slot_has_a_condition_of_its_own() -> None:
    scene = Scene()
    scene.tracker.assess(1, Vitals(int(99e9), 0.0, 0, 0, ProcessState.READY), 100.0)
    for _ in range(50):
        scene.pass_time(CHECK_INTERVAL)
        other = scene.tracker.assess(1, Vitals(int(99e9), 0.0, 0, 0, ProcessState.READY), scene.now)
    assert other.condition is PRESSED
    assert scene.check().condition is HEALTHY
