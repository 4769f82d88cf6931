"""Vital signs -> the condition of each process. Without I/O: the clock is an argument.

A worker's *lag* says how late its loop is at this moment. It is the largest of three: the age of an overdue beat, the
length of the present turn of the loop, and the lateness of its latest timer. A worker enters a worse condition at once
and leaves it after RECOVERY_TIME seconds without a cause, so conditions do not flap.

A supervisor that checks late itself (it was stopped or starved, or the machine slept) can't tell whether it or the
worker was at fault: such a period counts against no worker.
"""

from __future__ import annotations

import math
from enum import Enum

from msgspec import Struct

from realtime.config.settings import LoopSettings
from realtime.supervision.vitals import NEGLIGIBLE_LAG, ProcessState, Vitals

# Seconds between two checks of a worker that is not healthy.
CHECK_INTERVAL = 0.01
# Most seconds between two checks of a healthy worker. Less than `loop.interval`, so that the checks see every beat. A
# turn in progress at a check is checked again at the moment when it would be too long.
MAX_QUICK_INTERVAL = 0.035
# Fewest seconds between two checks of a healthy worker.
_MIN_QUICK_INTERVAL = CHECK_INTERVAL / 2
# Seconds without a cause after which a worker leaves a worse condition.
RECOVERY_TIME = 0.5
# Seconds between two checks from which the second one counts as late. Less than `loop.lagging`, so a shorter pause of
# the whole machine makes no worker look lagging.
_LATE = 0.048
# Seconds: a beat further in the future than this is invalid, and says nothing about its loop.
_FUTURE = 1.0


def broker_beat_interval(loop: LoopSettings) -> float:
    """Seconds between two beats of the broker: no application blocks it, so it needs no more than a sign of life."""
    return max(loop.interval, min(1.0, (loop.stuck or math.inf) / 4))


class Condition(Enum):
    """Condition of a worker or of the broker. ABSENT: its slot has no ready process."""

    ABSENT = "absent"
    HEALTHY = "healthy"
    LAGGING = "lagging"
    PRESSED = "pressed"
    DRAINING = "draining"


class Health(Struct, frozen=True):
    """Health of a worker, or of the broker, at the latest check.

    since: when the process entered this condition, CLOCK_MONOTONIC seconds. lag: seconds, see the module. utilization,
    connections, subscriptions, queued_bytes: from its page, see `Vitals`. blocked: seconds for which the loop has not
    turned, 0 for a loop that turns. vitals: the reading behind all this; None for an absent process. due: when to check
    again.
    """

    slot: int
    condition: Condition
    since: float
    lag: float = 0.0
    utilization: float = 0.0
    connections: int = 0
    subscriptions: int = 0
    queued_bytes: int = 0
    blocked: float = 0.0
    vitals: Vitals | None = None
    due: float = 0.0


class HealthTracker:
    """Assesses the health of slots, and keeps per slot the state that hysteresis needs."""

    def __init__(self, loop: LoopSettings, interval: float = 0.0) -> None:
        """interval: seconds between two beats of the processes in these slots; 0.0 for `loop.interval`."""
        self.configure(loop)
        self._interval = interval or loop.interval
        self._records: dict[int, _SlotRecord] = {}

    def configure(self, loop: LoopSettings) -> None:
        """Use other limits of lag from now on."""
        self._lagging = loop.lagging or math.inf
        self._pressed = loop.max_lag or math.inf

    def assess(self, slot: int, vitals: Vitals | None, now: float, leaving: bool = False) -> Health:
        """Return the health of a slot. Call it for every slot as soon as one of them is `due`.

        vitals: of a process that serves or is leaving, read at `now` or later; None without such a process. leaving:
        whether the pool expects the process to end, which the process itself may not know. now: CLOCK_MONOTONIC
        seconds.
        """
        record = self._records.get(slot)
        if record is None:
            record = self._records[slot] = _SlotRecord(now)
        if now - record.checked > _LATE:
            record.excused_until = now
        record.checked = now
        if vitals is None or vitals.state is ProcessState.ENDED:
            record.forget()
            return Health(slot, Condition.ABSENT, record.enter(Condition.ABSENT, now), due=now + CHECK_INTERVAL)
        blocked = self._blocked(vitals, now, record.excused_until)
        # Of a late timer, only the part since the excused period counts.
        lag = max(blocked, min(vitals.lag, vitals.beat / 1e9 - record.excused_until))
        if lag >= self._pressed:
            record.pressed = now
        if lag >= self._lagging:
            record.lagging = now
        leaving = leaving or vitals.state is ProcessState.DRAINING
        condition = Condition.DRAINING if leaving else record.condition_at(now)
        since = record.enter(condition, now)
        return Health(
            slot,
            condition,
            since,
            lag,
            vitals.utilization,
            vitals.connections,
            vitals.subscriptions,
            vitals.queued_bytes,
            blocked,
            vitals,
            self._due(vitals.beat, vitals.busy_since, now) if condition is Condition.HEALTHY else now + CHECK_INTERVAL,
        )

    def forget(self, slot: int) -> None:
        """Forget what the slot's process did, because the slot has another one."""
        self._records.pop(slot, None)

    def quick_check(self, slot: int, beat: int, lag: float, busy_since: int, now: float) -> float:
        """Return when to check again a slot that was healthy at the latest check; 0.0: now, and fully, with `assess`.

        beat, lag, busy_since: see `Vitals`. Takes a microsecond and touches little memory, because on an idle machine
        cold caches make up the cost of a check.
        """
        record = self._records[slot]
        due = self._due(beat, busy_since, now)
        if (
            lag > NEGLIGIBLE_LAG
            or now - record.checked > _LATE
            or due <= now + _MIN_QUICK_INTERVAL
            or beat / 1e9 > now + _FUTURE
        ):
            return 0.0
        record.checked = now
        return due

    def _due(self, beat: int, busy_since: int, now: float) -> float:
        """Return when this loop can be lagging at the earliest, by its present turn and by its next beat."""
        turn = busy_since / 1e9 or now
        earliest = min(turn, beat / 1e9 + self._interval) + min(self._lagging, self._pressed)
        return min(max(earliest, now + _MIN_QUICK_INTERVAL), now + MAX_QUICK_INTERVAL)

    def _blocked(self, vitals: Vitals, now: float, excused_until: float) -> float:
        """Return for how many seconds the loop has not turned; infinite for a page with an invalid beat."""
        beat = vitals.beat / 1e9
        if beat > now + _FUTURE:
            return math.inf
        overdue = now - max(beat, excused_until) - self._interval
        turning = now - max(vitals.busy_since / 1e9, excused_until) if vitals.busy_since else 0.0
        return max(0.0, overdue, turning)


class _SlotRecord:
    """State of one slot between checks.

    checked: time of the latest check. excused_until: time before which nothing counts, see the module. lagging,
    pressed: when the worker last had cause for that condition.
    """

    __slots__ = ("checked", "condition", "excused_until", "lagging", "pressed", "since")

    def __init__(self, now: float) -> None:
        self.checked = self.excused_until = self.since = now
        self.condition = Condition.ABSENT
        self.forget()

    def forget(self) -> None:
        """Forget the causes, so that the next process starts without them."""
        self.lagging = self.pressed = -math.inf

    def condition_at(self, now: float) -> Condition:
        """Return the worst condition with a cause in the last RECOVERY_TIME seconds."""
        if now - self.pressed < RECOVERY_TIME:
            return Condition.PRESSED
        if now - self.lagging < RECOVERY_TIME:
            return Condition.LAGGING
        return Condition.HEALTHY

    def enter(self, condition: Condition, now: float) -> float:
        """Enter `condition`, unless it lasts already. Returns since when it lasts."""
        if condition is not self.condition:
            self.condition, self.since = condition, now
        return self.since
