"""The timers of all connections, in one sweep.

Ten thousand connections have ten thousand pings and deadlines due, none of which needs to be exact. So each
connection waits in a bucket of `RESOLUTION` seconds, and one periodic `sweep` wakes the buckets that are due; moving
from bucket to bucket is constant time and costs no reactor timer.

Time here is *loop time*: it advances by what a sweep measured, but never by more than `MAX_STEP` at once. When the
loop itself stalls, loop time stands still for that long, and no client is blamed for what the server could not read.
"""

from __future__ import annotations

import math
from typing import Protocol

RESOLUTION = 0.25  # seconds
MAX_STEP = 2 * RESOLUTION


class Sleeper(Protocol):
    """Something with one deadline at a time. `bucket` belongs to `Deadlines`; 0 means that none is set."""

    bucket: int

    def wake(self) -> None:
        """The deadline came. It is no longer set; the sleeper may set another."""


class Deadlines:
    """At most one deadline for each sleeper. `now`: loop time, in seconds."""

    def __init__(self, clock_now: float) -> None:
        """clock_now: the monotonic clock at this moment, as in `sweep`."""
        self.now = 0.0
        self._swept_at = clock_now
        self._last = 0
        self._buckets: dict[int, dict[Sleeper, None]] = {}
        self._waited = False

    def any(self) -> bool:
        """Whether somebody waits. While nobody does there is no need to sweep."""
        return bool(self._buckets)

    def set(self, sleeper: Sleeper, when: float) -> None:
        """Wake `sleeper` at loop time `when` or up to one resolution later; replaces the deadline it had."""
        bucket = max(math.ceil(when / RESOLUTION), self._last + 1)
        if bucket == sleeper.bucket:
            return
        self.clear(sleeper)
        sleeper.bucket = bucket
        self._buckets.setdefault(bucket, {})[sleeper] = None

    def clear(self, sleeper: Sleeper) -> None:
        """Forget the sleeper's deadline, if it has one."""
        if sleeper.bucket:
            waiting = self._buckets.get(sleeper.bucket)
            if waiting is not None:
                waiting.pop(sleeper, None)
                if not waiting:
                    del self._buckets[sleeper.bucket]
            sleeper.bucket = 0

    def sweep(self, clock_now: float) -> None:
        """Advance loop time to the monotonic clock and wake whoever is due.

        Raises what a sleeper raises; the others that are due are woken by the next sweep.
        """
        elapsed = clock_now - self._swept_at
        self._swept_at = clock_now
        # The first who waits after a time without has waited for one resolution at most.
        self.now += min(max(elapsed, 0.0), MAX_STEP if self._waited else RESOLUTION)
        due = math.floor(self.now / RESOLUTION)
        while self._last < due:
            self._last += 1
            waiting = self._buckets.get(self._last)
            # One by one: a sleeper that wakes may close another that is due in the same bucket.
            while waiting:
                sleeper = next(iter(waiting))
                self.clear(sleeper)
                try:
                    sleeper.wake()
                except BaseException:
                    self._last -= 1
                    raise
        self._waited = bool(self._buckets)
