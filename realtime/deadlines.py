"""Deadlines of all connections, checked by one periodic sweep.

Ten thousand connections have ten thousand pings and timeouts pending, none of which needs to be exact. Each deadline is
therefore rounded up to a bucket of `RESOLUTION` seconds, and one periodic `sweep` handles the buckets that are due.
Setting, moving and clearing a deadline take constant time and need no reactor timer.

Time is *loop time*: it advances by the time measured between two sweeps, but by at most `MAX_STEP` each time. While
the loop itself is blocked, loop time stands still, so no client times out for data that the server could not read.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

RESOLUTION = 0.25  # seconds
MAX_STEP = 2 * RESOLUTION


class DeadlineOwner(Protocol):
    """An object with at most one deadline. deadline_bucket: written by `Deadlines` alone; 0 if no deadline is set."""

    deadline_bucket: int

    def on_deadline(self) -> None:
        """Handle the deadline, which is no longer set; the owner may set another one."""

    def abort(self) -> None:
        """End the connection at once: `on_deadline` has raised an exception."""


def _raise(error: Exception) -> None:
    raise error


class Deadlines:
    """The pending deadlines of a process, at most one for each owner. now: loop time, in seconds."""

    def __init__(self, clock_now: float, report_error: Callable[[Exception], None] = _raise) -> None:
        """clock_now: current time of the monotonic clock that `sweep` is given. report_error: takes an exception of
        `on_deadline`, whose owner is aborted."""
        self.now = 0.0
        self._report_error = report_error
        self._swept_at = clock_now
        self._last_swept = 0
        self._buckets: dict[int, dict[DeadlineOwner, None]] = {}
        self._was_pending = False

    def any(self) -> bool:
        """Return whether a deadline is set. While none is, sweeps are not needed."""
        return bool(self._buckets)

    def set(self, owner: DeadlineOwner, when: float) -> None:
        """Set the deadline of `owner` to loop time `when`, in place of its earlier one.

        `on_deadline` is called at `when` or up to one `RESOLUTION` later.
        """
        bucket = max(math.ceil(when / RESOLUTION), self._last_swept + 1)
        if bucket == owner.deadline_bucket:
            return
        self.clear(owner)
        owner.deadline_bucket = bucket
        self._buckets.setdefault(bucket, {})[owner] = None

    def clear(self, owner: DeadlineOwner) -> None:
        """Remove the deadline of `owner`, if it has one."""
        if owner.deadline_bucket:
            owners = self._buckets.get(owner.deadline_bucket)
            if owners is not None:
                owners.pop(owner, None)
                if not owners:
                    del self._buckets[owner.deadline_bucket]
            owner.deadline_bucket = 0

    def sweep(self, clock_now: float) -> None:
        """Advance loop time to the monotonic clock, and call `on_deadline` of each owner whose deadline is due.

        If `report_error` raises, so does this; the next sweep handles the remaining due owners.
        """
        elapsed = clock_now - self._swept_at
        self._swept_at = clock_now
        # Sweeps may have been omitted while no deadline was set: a deadline set since the last sweep advances by one
        # resolution at most, so it is not early.
        self.now += min(max(elapsed, 0.0), MAX_STEP if self._was_pending else RESOLUTION)
        due = math.floor(self.now / RESOLUTION)
        while self._last_swept < due:
            self._last_swept += 1
            owners = self._buckets.get(self._last_swept)
            # One at a time, without an iterator: `on_deadline` may clear other owners of the same bucket.
            while owners:
                owner = next(iter(owners))
                self.clear(owner)
                try:
                    self._act(owner)
                except BaseException:
                    self._last_swept -= 1
                    raise
        self._was_pending = bool(self._buckets)

    def _act(self, owner: DeadlineOwner) -> None:
        try:
            owner.on_deadline()
        except Exception as error:
            self._report_error(error)
            owner.abort()
