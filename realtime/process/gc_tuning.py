"""Tuning of the garbage collector of one process: a collection holds the loop for a few milliseconds, and is measured.

Python's own full collections traverse all live objects: 130 ms at 10,000 connections. Here the objects that survive a
full collection are frozen, so that no further collection traverses them. Each one then traverses new objects only, and
begins as soon as there are some thousand of them. A frozen object is still freed when its last reference goes, as
nearly all objects are.

But a cycle that becomes garbage after it was frozen stays. So all objects are collected, frozen ones too, when WHOLE
objects may have been frozen since the last time, or as many as there were then. That takes as long as Python's own full
collection, so it is put off further as long as it finds next to nothing.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable

from realtime.metrics import Counter, Metrics

THRESHOLDS = (400, 4, 0)
"""New objects that begin a collection of generation 0, and the number of collections that begin one of the next."""

WHOLE = 500_000
"""Frozen objects after which all objects are collected: 50 to 100 MB, if all of them were garbage."""

SPAN = 60.0
"""Seconds for which the longest pause is kept at least; it is kept for twice as long at most."""

# Approximate number of objects that one full collection freezes: a threshold is exceeded by one before it acts.
_FROZEN_EACH = THRESHOLDS[0] * (THRESHOLDS[1] + 1) * (THRESHOLDS[2] + 2)
# Share of the frozen objects that must be garbage for a collection of all objects to pay off.
_MIN_GARBAGE = 0.01
# Factor by which collections of all objects are put off at most.
_MAX_DELAY_FACTOR = 16


class GCTuner:
    """The collector's tuner, at work from `begin` on. For the loop's thread; collections run in any thread."""

    def __init__(
        self,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
        cpu_time: Callable[[], float] = time.thread_time,
    ) -> None:
        """clock: seconds. cpu_time: seconds that this thread has run, without the time that other processes took."""
        self._clock = clock
        self._cpu_time = cpu_time
        self._began = 0.0
        self._pauses = (0.0, 0.0)  # the longest of this span, and of the one before
        self._span_began = -math.inf
        self._frozen = 0  # since the last collection of all objects
        self._frozen_limit = WHOLE
        self._delay_factor = 1
        self._is_collecting_all = False
        self._default_thresholds = gc.get_threshold()
        help = "Collections, by the oldest generation traversed; all: frozen objects were traversed too."
        self._collections: dict[str, Counter] = {
            name: metrics.counter("realtime_gc_collections", help, generation=name) for name in ("0", "1", "2", "all")
        }
        help = "Objects in cycles that the garbage collector has freed."
        self._collected = metrics.counter("realtime_gc_collected_objects", help)
        help = "CPU time of the longest collection of the last minute or two."
        metrics.gauge("realtime_gc_pause_seconds", help, self._longest_pause)

    def begin(self) -> None:
        """Collect and freeze all present objects, and tune and measure the collector from now on."""
        self._default_thresholds = gc.get_threshold()
        gc.set_threshold(*THRESHOLDS)
        gc.collect()
        _freeze()
        gc.callbacks.append(self._on_collection)

    def end(self) -> None:
        """Stop measuring, and unfreeze all objects."""
        self.end_in_fork()
        gc.unfreeze()

    def end_in_fork(self) -> None:
        """Leave collections to Python's defaults. Frozen objects stay frozen, so a fork shares their memory."""
        if self._on_collection in gc.callbacks:
            gc.callbacks.remove(self._on_collection)
            gc.set_threshold(*self._default_thresholds)

    def is_due(self) -> bool:
        """Whether all objects should be collected."""
        return self._frozen >= self._frozen_limit * self._delay_factor

    def collect_all(self) -> None:
        """Free all garbage cycles, frozen ones too. Takes a quarter of a second for each million objects."""
        gc.unfreeze()
        self._is_collecting_all = True
        try:
            found = gc.collect()
        finally:
            self._is_collecting_all = False
        _freeze()
        pays_off = found >= self._frozen * _MIN_GARBAGE
        self._delay_factor = 1 if pays_off else min(2 * self._delay_factor, _MAX_DELAY_FACTOR)
        self._frozen_limit = max(WHOLE, gc.get_freeze_count())
        self._frozen = 0

    def _on_collection(self, phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            self._began = self._cpu_time()
            return
        pause = self._cpu_time() - self._began
        self._begin_span_if_due(self._clock())
        self._pauses = max(self._pauses[0], pause), self._pauses[1]
        self._collected.value += info["collected"]
        self._collections["all" if self._is_collecting_all else str(info["generation"])].value += 1
        if info["generation"] == 2 and not self._is_collecting_all:
            gc.freeze()
            self._frozen += _FROZEN_EACH

    def _begin_span_if_due(self, now: float) -> None:
        if now - self._span_began >= SPAN:
            self._pauses = 0.0, self._pauses[0] if now - self._span_began < 2 * SPAN else 0.0
            self._span_began = now

    def _longest_pause(self) -> float:
        self._begin_span_if_due(self._clock())
        return max(self._pauses)


def _freeze() -> None:
    """Freeze all objects after a full collection.

    Python begins the next full one when the new objects are a quarter of the survivors of the last: the second
    collection here leaves none.
    """
    gc.freeze()
    gc.collect()
