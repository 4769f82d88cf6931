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

from realtime.settings import Loop
from realtime.supervision.vitals import State, Vitals

# Seconds between two looks; the second while nobody is late. Then a block is seen at the next look, and looked at again
# at once: it is found out as soon as ever. Less than `loop.interval`, so that every beat is seen.
TICK = 0.01
CALM_TICK = 0.02
# Seconds without cause after which a worse condition is left.
CALM = 0.5
# Seconds between two looks that make the later one late. Less than `loop.lagging`: a shorter pause of the whole machine
# makes nobody look like lagging.
_LATE = 0.045
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
    subscriptions: held, as its page says. utilisation: of its loop, 0 to 1.
    """

    slot: int
    condition: Condition
    since: float
    lag: float = 0.0
    utilisation: float = 0.0
    connections: int = 0
    subscriptions: int = 0
    queued_bytes: int = 0
    blocked: float = 0.0
    vitals: Vitals | None = None

    @property
    def calm(self) -> bool:
        """Whether it will do to look again after CALM_TICK."""
        return self.condition is Condition.HEALTHY and self.lag < TICK


class Judge:
    """Remembers of each slot what hysteresis needs."""

    def __init__(self, loop: Loop) -> None:
        self._lagging = loop.lagging or math.inf
        self._pressed = loop.pressed or math.inf
        self._interval = loop.interval
        self._records: dict[int, _Record] = {}

    def judge(self, slot: int, vitals: Vitals | None, now: float, leaving: bool = False) -> Health:
        """The health of a slot. Every TICK or CALM_TICK seconds, for every slot.

        vitals: of a process that serves or is leaving, read not before `now`; None when there is none. leaving: it is
        expected to end, whether or not it knows. now: CLOCK_MONOTONIC seconds.
        """
        record = self._records.get(slot)
        if record is None:
            record = self._records[slot] = _Record(now)
        if now - record.looked > _LATE:
            record.excused = now
        record.looked = now
        if vitals is None or vitals.state is State.ENDED:
            record.forget()
            return Health(slot, Condition.ABSENT, record.enter(Condition.ABSENT, now))
        blocked = self._blocked(vitals, now, record.excused)
        # Of a timer that was late, only the part since we began to look.
        lag = max(blocked, min(vitals.lag, vitals.beat / 1e9 - record.excused))
        if lag >= self._pressed:
            record.pressed = now
        if lag >= self._lagging:
            record.lagging = now
        leaving = leaving or vitals.state is State.DRAINING
        condition = Condition.DRAINING if leaving else record.condition_at(now)
        since = record.enter(condition, now)
        return Health(
            slot,
            condition,
            since,
            lag,
            vitals.utilisation,
            vitals.connections,
            vitals.subscriptions,
            vitals.queued_bytes,
            blocked,
            vitals,
        )

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
