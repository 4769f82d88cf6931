"""Vital signs -> condition, on a clock that the test turns."""

from __future__ import annotations

from realtime.config.settings import LoopSettings
from realtime.supervision.health import CHECK_INTERVAL, RECOVERY_TIME, Condition, Health, HealthTracker
from realtime.supervision.vitals import ProcessState, Vitals

ABSENT, HEALTHY, LAGGING, PRESSED, DRAINING = Condition


class Watching:
    """A assess who looks every CHECK_INTERVAL, and a worker whose loop beats unless it is told not to."""

    def __init__(self, loop: LoopSettings | None = None) -> None:
        self.assess = HealthTracker(loop or LoopSettings(interval=0.01))
        self.now = 100.0
        self.beat = 100.0
        self.lag = 0.0
        self.state = ProcessState.READY
        self.busy_since = 0.0

    def look(self, leaving: bool = False) -> Health:
        vitals = Vitals(int(self.beat * 1e9), self.lag, 3, 5, self.state, busy_since=int(self.busy_since * 1e9))
        return self.assess.assess(0, vitals, self.now, leaving)

    def pass_time(self, seconds: float, beating: bool = True) -> Health:
        end = self.now + seconds
        health = self.look()
        while self.now < end - CHECK_INTERVAL / 2:
            self.now += CHECK_INTERVAL
            if beating:
                self.beat = self.now
            health = self.look()
        return health

    def late_beat(self) -> Health:
        """The loop turns again, with a timer that is as late as it was blocked."""
        self.now += CHECK_INTERVAL
        self.lag = self.now - self.beat - 0.01
        self.beat = self.now
        health = self.look()
        self.lag = 0.0
        return health


def test_a_loop_that_beats_is_healthy() -> None:
    health = Watching().pass_time(5)
    assert (health.condition, health.lag, health.connections, health.subscriptions) == (HEALTHY, 0.0, 3, 5)


def test_no_process_is_absent() -> None:
    watching = Watching()
    assert watching.assess.assess(0, None, 100.0).condition is ABSENT
    assert watching.pass_time(1).condition is HEALTHY
    assert watching.assess.assess(0, None, watching.now).condition is ABSENT


def test_a_blocked_loop_is_lagging_and_then_pressed() -> None:
    watching = Watching()
    watching.pass_time(1)
    assert watching.pass_time(0.05, beating=False).condition is HEALTHY
    assert watching.pass_time(0.02, beating=False).condition is LAGGING
    health = watching.pass_time(0.2, beating=False)
    assert health.condition is PRESSED
    assert 0.2 <= health.lag <= 0.27


def test_it_is_well_again_after_a_while_without_cause() -> None:
    watching = Watching()
    watching.pass_time(1)
    watching.pass_time(0.3, beating=False)
    assert watching.late_beat().condition is PRESSED
    assert watching.pass_time(RECOVERY_TIME - 3 * CHECK_INTERVAL).condition is PRESSED
    assert watching.pass_time(4 * CHECK_INTERVAL).condition is HEALTHY


def test_late_timers_count_although_the_loop_beats() -> None:
    watching = Watching()
    watching.pass_time(1)
    watching.lag = 0.06
    assert watching.pass_time(0.02).condition is LAGGING
    watching.lag = 0.25
    assert watching.pass_time(0.02).condition is PRESSED
    watching.lag = 0.06
    assert watching.pass_time(2).condition is LAGGING


def test_a_turn_that_takes_long_counts_before_any_beat_is_late() -> None:
    watching = Watching(LoopSettings(interval=10.0, stuck=20.0))
    watching.pass_time(1)
    watching.busy_since = watching.now
    assert watching.pass_time(0.04, beating=False).condition is HEALTHY
    health = watching.pass_time(0.02, beating=False)
    assert health.condition is LAGGING
    assert 0.05 <= health.lag <= 0.07


def test_a_beat_from_the_future_is_nonsense() -> None:
    watching = Watching()
    watching.pass_time(1)
    watching.beat = watching.now + 3600
    assert watching.look().condition is PRESSED


def test_since_is_when_the_condition_came() -> None:
    watching = Watching()
    watching.pass_time(1)
    blocked = watching.pass_time(0.1, beating=False)
    later = watching.pass_time(0.05, beating=False)
    assert later.since == blocked.since > 101.0


def test_a_block_while_nobody_looked_is_held_against_nobody() -> None:
    watching = Watching()
    watching.pass_time(1)
    watching.now += 15  # all were stopped; the assess is the first to run again
    assert watching.look().condition is HEALTHY
    assert watching.late_beat().condition is HEALTHY
    assert watching.pass_time(1).condition is HEALTHY


def test_a_loop_that_stays_blocked_after_it_is_judged_from_there() -> None:
    watching = Watching()
    watching.pass_time(1)
    watching.now += 15
    watching.look()
    assert watching.pass_time(0.04, beating=False).condition is HEALTHY
    assert watching.pass_time(0.04, beating=False).condition is LAGGING
    assert watching.pass_time(0.2, beating=False).condition is PRESSED


def test_a_draining_worker_is_draining_however_it_does() -> None:
    watching = Watching()
    watching.pass_time(1)
    assert watching.look(leaving=True).condition is DRAINING
    watching.state = ProcessState.DRAINING
    assert watching.pass_time(1, beating=False).condition is DRAINING


def test_a_loop_that_has_ended_is_absent_and_not_late() -> None:
    watching = Watching()
    watching.pass_time(1)
    watching.state = ProcessState.ENDED
    health = watching.pass_time(1, beating=False)
    assert (health.condition, health.blocked) == (ABSENT, 0.0)


def test_a_new_process_has_a_clean_record() -> None:
    watching = Watching()
    watching.pass_time(1)
    assert watching.pass_time(1, beating=False).condition is PRESSED
    watching.assess.assess(0, None, watching.now)
    watching.beat = watching.now
    assert watching.look().condition is HEALTHY


def test_zero_judges_never() -> None:
    watching = Watching(LoopSettings(interval=0.01, lagging=0, pressed=0))
    assert watching.pass_time(5, beating=False).condition is HEALTHY


def test_slots_are_judged_apart() -> None:
    watching = Watching()
    watching.assess.assess(1, Vitals(int(99e9), 0.0, 0, 0, ProcessState.READY), 100.0)
    for _ in range(50):
        watching.pass_time(CHECK_INTERVAL)
        other = watching.assess.assess(1, Vitals(int(99e9), 0.0, 0, 0, ProcessState.READY), watching.now)
    assert other.condition is PRESSED
    assert watching.look().condition is HEALTHY
