"""Vital signs -> the condition of each worker, without I/O: the clock is an argument.

A worker's *lag* is how late its loop is at this moment: the age of a beat that has not come, the time that the turn of
its loop takes already, or how late the latest timer was, whichever is longest. A condition is entered at once and left
after CALM seconds without cause, so that it does not flap.

A judge that comes late itself (it was stopped or starved, or the machine slept) can't tell whose fault it is: what
happened before is held against nobody.
"""

from __future__ import annotations

import math
from enum import Enum

from msgspec import Struct

from realtime.config.settings import LoopSettings
from realtime.supervision.vitals import QUIET, ProcessState, Vitals

# Seconds between two looks at a worker that is not healthy; and at one that is, at most: a turn that has begun by then
# is looked at again when it could be too long. Less than `loop.interval`, so that every beat is seen.
TICK = 0.01
CALM_TICK = 0.035
# Seconds between two looks at one that is healthy, at least.
_SOON = TICK / 2
# Seconds without cause after which a worse condition is left.
CALM = 0.5
# Seconds between two looks that make the later one late. Less than `loop.lagging`: a shorter pause of the whole machine
# makes nobody look like lagging.
_LATE = 0.048
# A beat that is further ahead than this is no beat: nothing can be told of such a loop.
_FUTURE = 1.0


class Condition(Enum):
    """How a worker does. ABSENT: no process that is ready."""

    ABSENT = "absent"
    HEALTHY = "healthy"
    LAGGING = "lagging"
    PRESSED = "pressed"
    DRAINING = "draining"


class Health(Struct, frozen=True):
    """A worker as it was judged at the latest look.

    since: when it came into this condition, CLOCK_MONOTONIC seconds. lag: seconds, see above. connections,
    subscriptions: held, as its page says. utilization: of its loop, 0 to 1. due: when to look again.
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


class Judge:
    """Remembers of each slot what hysteresis needs."""

    def __init__(self, loop: LoopSettings) -> None:
        self._lagging = loop.lagging or math.inf
        self._pressed = loop.max_lag or math.inf
        self._interval = loop.interval
        self._records: dict[int, _Record] = {}

    def judge(self, slot: int, vitals: Vitals | None, now: float, leaving: bool = False) -> Health:
        """The health of a slot. Whenever it is `due` for one of them, for every slot.

        vitals: of a process that serves or is leaving, read not before `now`; None when there is none. leaving: it is
        expected to end, whether or not it knows. now: CLOCK_MONOTONIC seconds.
        """
        record = self._records.get(slot)
        if record is None:
            record = self._records[slot] = _Record(now)
        if now - record.looked > _LATE:
            record.excused = now
        record.looked = now
        if vitals is None or vitals.state is ProcessState.ENDED:
            record.forget()
            return Health(slot, Condition.ABSENT, record.enter(Condition.ABSENT, now), due=now + TICK)
        blocked = self._blocked(vitals, now, record.excused)
        # Of a timer that was late, only the part since we began to look.
        lag = max(blocked, min(vitals.lag, vitals.beat / 1e9 - record.excused))
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
            self._due(vitals.beat, vitals.busy_since, now) if condition is Condition.HEALTHY else now + TICK,
        )

    def glance(self, slot: int, beat: int, lag: float, busy_since: int, now: float) -> float:
        """When to look again at a slot that was healthy at the latest look; 0.0: now, and closely, with `judge`.

        beat, lag, busy_since: see `Vitals`. It takes a microsecond, and touches little: on a machine that idles, that
        is what a look costs.
        """
        record = self._records[slot]
        due = self._due(beat, busy_since, now)
        if lag > QUIET or now - record.looked > _LATE or due <= now + _SOON or beat / 1e9 > now + _FUTURE:
            return 0.0
        record.looked = now
        return due

    def _due(self, beat: int, busy_since: int, now: float) -> float:
        """When this loop could be lagging at the earliest, by the turn that it is in and by the beat that is next."""
        turn = busy_since / 1e9 or now
        earliest = min(turn, beat / 1e9 + self._interval) + min(self._lagging, self._pressed)
        return min(max(earliest, now + _SOON), now + CALM_TICK)

    def _blocked(self, vitals: Vitals, now: float, excused: float) -> float:
        beat = vitals.beat / 1e9
        if beat > now + _FUTURE:
            return math.inf
        overdue = now - max(beat, excused) - self._interval
        turning = now - max(vitals.busy_since / 1e9, excused) if vitals.busy_since else 0.0
        return max(0.0, overdue, turning)


class _Record:
    """What is remembered of a slot. lagging, pressed: when it last was. looked, excused: see the module."""

    __slots__ = ("condition", "excused", "lagging", "looked", "pressed", "since")

    def __init__(self, now: float) -> None:
        self.looked = self.excused = self.since = now
        self.condition = Condition.ABSENT
        self.forget()

    def forget(self) -> None:
        """The next process begins with a clean record."""
        self.lagging = self.pressed = -math.inf

    def condition_at(self, now: float) -> Condition:
        """The worst one that there was cause for lately."""
        if now - self.pressed < CALM:
            return Condition.PRESSED
        if now - self.lagging < CALM:
            return Condition.LAGGING
        return Condition.HEALTHY

    def enter(self, condition: Condition, now: float) -> float:
        """Be in this condition; since when it lasts."""
        if condition is not self.condition:
            self.condition, self.since = condition, now
        return self.since
