"""Counters of processes -> changes per second, without I/O: the clock is an argument."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Mapping
from typing import Any, Generic, TypeVar

from msgspec import Struct

# Seconds after which a reading is too old for a rate.
MAX_AGE = 3.0

Name = TypeVar("Name", bound=Hashable)


class _Reading(Struct):
    """Counters of one process at one time. owner: the process; a new process in the slot starts again at 0."""

    owner: Hashable
    at: float
    counts: Mapping[Any, float]


class Rates(Generic[Name]):
    """Rates per slot, from the oldest to the newest of its kept readings."""

    def __init__(self, span: int = 1) -> None:
        """span: number of intervals between the oldest and the newest kept reading."""
        self._span = span
        self._readings: dict[int, deque[_Reading]] = {}

    def record(self, slot: int, owner: Hashable, counts: Mapping[Name, float], now: float) -> None:
        """Keep a reading. owner: the process. counts: totals, which only grow. now: seconds of a monotonic clock."""
        readings = self._readings.setdefault(slot, deque(maxlen=self._span + 1))
        if readings and readings[-1].owner != owner:
            readings.clear()
        readings.append(_Reading(owner, now, dict(counts)))

    def of(self, slot: int, owner: Hashable, now: float) -> dict[Name, float] | None:
        """Return how much each count grows per second; None without two recent readings of this process."""
        readings = self._readings.get(slot)
        if not readings or readings[-1].owner != owner or now - readings[-1].at > MAX_AGE:
            return None
        first, last = readings[0], readings[-1]
        elapsed = last.at - first.at
        if elapsed <= 0:
            return None
        return {name: (total - first.counts.get(name, 0)) / elapsed for name, total in last.counts.items()}
