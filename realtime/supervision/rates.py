"""Counters of processes -> changes per second, without I/O: the clock is an argument."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

from msgspec import Struct

# Seconds after which a rate says nothing about now.
FRESH = 3.0


class _Reading(Struct):
    """owner: whose counters they are, since a process that takes another's place begins at 0 again."""

    owner: Hashable
    at: float
    counts: Mapping[str, float]
    rates: dict[str, float] | None = None


class Rates:
    """The latest two readings of each slot, as rates."""

    def __init__(self) -> None:
        self._latest: dict[int, _Reading] = {}

    def count(self, slot: int, owner: Hashable, counts: Mapping[str, float], now: float) -> None:
        """Take a reading. owner: the process. counts: totals, which only grow. now: seconds of a monotonic clock."""
        before = self._latest.get(slot)
        reading = self._latest[slot] = _Reading(owner, now, dict(counts))
        if before is not None and before.owner == owner and now > before.at:
            elapsed = now - before.at
            reading.rates = {name: (total - before.counts.get(name, 0)) / elapsed for name, total in counts.items()}

    def of(self, slot: int, owner: Hashable, now: float) -> dict[str, float] | None:
        """What each count grows by in a second; None while that is not known of this process."""
        reading = self._latest.get(slot)
        if reading is None or reading.owner != owner or now - reading.at > FRESH:
            return None
        return reading.rates
