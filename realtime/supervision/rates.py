"""Counters of processes -> changes per second and growth, without I/O: the clock is an argument."""

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


class Growth(Generic[Name]):
    """How much counters have grown over all processes, in total and in the last `span` seconds.

    The growth of a process still counts after the process has ended.
    """

    def __init__(self, span: float = 60.0) -> None:
        self._span = span
        self._last: dict[int, tuple[Hashable, Mapping[Name, float]]] = {}
        self._totals: dict[Name, float] = {}  # the latest to grow at the end
        self._steps: deque[tuple[float, Name, float]] = deque()
        self._recent: dict[Name, float] = {}

    def record(self, slot: int, owner: Hashable, counts: Mapping[Name, float], now: float) -> None:
        """Add the growth since the previous reading. owner: the process; a new one in the slot starts again at 0."""
        previous, before = self._last.get(slot, (owner, {}))
        if previous != owner:
            before = {}
        for name, count in counts.items():
            grown = count - before.get(name, 0.0)
            if grown > 0:
                self._totals[name] = self._totals.pop(name, 0.0) + grown
                self._recent[name] = self._recent.get(name, 0.0) + grown
                self._steps.append((now, name, grown))
        self._last[slot] = owner, dict(counts)

    def totals(self) -> dict[Name, float]:
        """The growth of each counter that has grown, in the order of the latest growth: the latest at the end."""
        return dict(self._totals)

    def recent(self, now: float) -> dict[Name, float]:
        """The growth of each counter in the last `span` seconds, without those that have not grown."""
        while self._steps and self._steps[0][0] <= now - self._span:
            _, name, grown = self._steps.popleft()
            self._recent[name] -= grown
            if self._recent[name] <= 0:
                del self._recent[name]
        return dict(self._recent)
