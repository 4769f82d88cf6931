"""Counters of processes -> changes per second, without I/O: the clock is an argument."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Mapping
from typing import Any, Generic, TypeVar

from msgspec import Struct

# Seconds after which a rate says nothing about now.
FRESH = 3.0

Name = TypeVar("Name", bound=Hashable)


class _Reading(Struct):
    """owner: whose counters they are, since a process that takes another's place begins at 0 again."""

    owner: Hashable
    at: float
    counts: Mapping[Any, float]


class Rates(Generic[Name]):
    """The latest readings of each slot, as rates from the oldest to the newest."""

    def __init__(self, span: int = 1) -> None:
        """span: how many readings back the oldest is."""
        self._span = span
        self._readings: dict[int, deque[_Reading]] = {}

    def count(self, slot: int, owner: Hashable, counts: Mapping[Name, float], now: float) -> None:
        """Take a reading. owner: the process. counts: totals, which only grow. now: seconds of a monotonic clock."""
        readings = self._readings.setdefault(slot, deque(maxlen=self._span + 1))
        if readings and readings[-1].owner != owner:
            readings.clear()
        readings.append(_Reading(owner, now, dict(counts)))

    def of(self, slot: int, owner: Hashable, now: float) -> dict[Name, float] | None:
        """What each count grows by in a second; None while that is not known of this process."""
        readings = self._readings.get(slot)
        if not readings or readings[-1].owner != owner or now - readings[-1].at > FRESH:
            return None
        first, last = readings[0], readings[-1]
        elapsed = last.at - first.at
        if elapsed <= 0:
            return None
        return {name: (total - first.counts.get(name, 0)) / elapsed for name, total in last.counts.items()}
