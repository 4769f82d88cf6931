"""The garbage collector of one process, so that it holds the loop for a few milliseconds at most, and is measured.

Python's own full collections walk through everything that is alive: 130 ms at 10,000 connections. Here what a full
collection has left alive is frozen, which is to say that no further one looks at it. So each walks through what is new,
and there is a new one as soon as there are some thousand new objects. What is frozen is still freed when the last
reference goes, as nearly everything is.

But a cycle that becomes garbage when it is frozen stays. So everything is looked through once more when WHOLE objects
may have been frozen since the last time, or as many as there were then. That takes as long as ever, so it is put off
further if there is no need: if the last time has found next to nothing.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable

from realtime.metrics import Counter, Metrics

THRESHOLDS = (400, 4, 0)
"""New objects that begin a collection of the young, and how many of those begin one of the next older generation."""

WHOLE = 500_000
"""Objects frozen after which everything is looked through: 50 to 100 MB, if all of them were garbage."""

SPAN = 60.0
"""Seconds for which the longest pause is remembered, at least; and half of the time for which it is at most."""

# Objects that one full collection may freeze, about: a limit is passed by one more than it says.
_EACH = THRESHOLDS[0] * (THRESHOLDS[1] + 1) * (THRESHOLDS[2] + 2)
# Of what was frozen, the share that is worth the search.
_WORTH = 0.01
_MOST_PATIENCE = 16


class GCTuner:
    """The collector, from `begin` on. Loop thread only, but collections happen in whatever thread allocates."""

    def __init__(
        self,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
        spent: Callable[[], float] = time.thread_time,
    ) -> None:
        """clock: seconds. spent: those that this thread was at work; what other processes take is no pause of ours."""
        self._clock = clock
        self._spent = spent
        self._began = 0.0
        self._pauses = (0.0, 0.0)  # the longest of this span, and of the one before
        self._span = -math.inf
        self._frozen = 0  # since everything was looked through
        self._allowed = WHOLE
        self._patience = 1
        self._whole = False
        help = "Collections, by the oldest generation that was looked through; all: what was frozen, too."
        self._collections: dict[str, Counter] = {
            name: metrics.counter("realtime_gc_collections", help, generation=name) for name in ("0", "1", "2", "all")
        }
        help = "Objects in cycles that the garbage collector has freed."
        self._collected = metrics.counter("realtime_gc_collected_objects", help)
        help = "CPU time of the longest collection of the last minute or two."
        metrics.gauge("realtime_gc_pause_seconds", help, self._longest)

    def begin(self) -> None:
        """What is there now stays: it is collected, and frozen. Measure and tune the collector from now on."""
        gc.set_threshold(*THRESHOLDS)
        gc.collect()
        _freeze()
        gc.callbacks.append(self._called)

    def end(self) -> None:
        """Leave the collector alone."""
        gc.callbacks.remove(self._called)
        gc.unfreeze()

    def due(self) -> bool:
        """Whether everything should be looked through."""
        return self._frozen >= self._allowed * self._patience

    def look_through(self) -> None:
        """Free all cycles that are garbage, the frozen ones, too. A quarter of a second for each million objects."""
        gc.unfreeze()
        self._whole = True
        try:
            found = gc.collect()
        finally:
            self._whole = False
        _freeze()
        worth = found >= self._frozen * _WORTH
        self._patience = 1 if worth else min(2 * self._patience, _MOST_PATIENCE)
        self._allowed = max(WHOLE, gc.get_freeze_count())
        self._frozen = 0

    def _called(self, phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            self._began = self._spent()
            return
        pause = self._spent() - self._began
        self._turn_over(self._clock())
        self._pauses = max(self._pauses[0], pause), self._pauses[1]
        self._collected.value += info["collected"]
        self._collections["all" if self._whole else str(info["generation"])].value += 1
        if info["generation"] == 2 and not self._whole:
            gc.freeze()
            self._frozen += _EACH

    def _turn_over(self, now: float) -> None:
        if now - self._span >= SPAN:
            self._pauses = 0.0, self._pauses[0] if now - self._span < 2 * SPAN else 0.0
            self._span = now

    def _longest(self) -> float:
        self._turn_over(self._clock())
        return max(self._pauses)


def _freeze() -> None:
    """Freeze everything, after a full collection.

    Python begins the next one when there are new objects for a quarter of what the last has left alive: of nothing.
    """
    gc.freeze()
    gc.collect()
