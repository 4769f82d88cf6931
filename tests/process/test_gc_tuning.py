"""The tuned garbage collector: what it leaves alone, what it still frees, and what it tells."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from realtime.metrics import Metrics
from realtime.process import gc_tuning
from realtime.process.gc_tuning import GCTuner


class Knot:
    """A cycle of one."""

    def __init__(self) -> None:
        self.itself = self


def make_knot() -> weakref.ref[Knot]:
    return weakref.ref(Knot())


class Collector:
    def __init__(self) -> None:
        self.now = 100.0
        self.metrics = Metrics()
        self.garbage = GCTuner(self.metrics, lambda: self.now, lambda: self.now)
        self.garbage.begin()

    def told(self, name: str, **labels: str) -> float:
        (sample,) = (one for one in self.metrics.snapshot([name]) if dict(one.labels) == labels)
        return sample.value

    def call(self, seconds: float, generation: int = 1) -> None:
        """What Python calls it with for a collection that takes so long."""
        info = {"generation": generation, "collected": 0, "uncollectable": 0}
        self.garbage._called("start", info)
        self.now += seconds
        self.garbage._called("stop", info)


@pytest.fixture
def collector() -> Iterator[Collector]:
    before = gc.get_threshold()
    collector = Collector()
    yield collector
    collector.garbage.end()
    gc.set_threshold(*before)


def test_what_is_there_at_the_beginning_is_frozen(collector: Collector) -> None:
    assert gc.get_freeze_count() > 10_000
    assert len(gc.get_objects()) < 1_000


def test_garbage_that_is_made_afterwards_is_collected_without_being_asked_for(collector: Collector) -> None:
    knot = make_knot()
    kept = [[] for _ in range(20 * gc_tuning._EACH)]  # type: ignore[var-annotated]
    assert kept
    assert knot() is None
    for generation in "012":
        assert collector.told("realtime_gc_collections", generation=generation) > 0
    assert collector.told("realtime_gc_collected_objects") >= 1


def test_what_a_full_collection_leaves_alive_is_frozen(collector: Collector) -> None:
    kept = [[number] for number in range(1000)]
    before = gc.get_freeze_count()
    gc.collect()
    assert gc.get_freeze_count() >= before + len(kept)


def test_a_cycle_that_was_frozen_is_freed_when_everything_is_looked_through(collector: Collector) -> None:
    knot = Knot()
    reference = weakref.ref(knot)
    gc.collect()
    del knot
    gc.collect()
    assert reference() is not None
    collector.garbage.look_through()
    assert reference() is None
    assert collector.told("realtime_gc_collections", generation="all") == 1
    assert gc.get_freeze_count() > 10_000


def freeze_until_due(collector: Collector) -> int:
    """How many full collections it takes."""
    count = 0
    while not collector.garbage.due():
        collector.call(0.0, generation=2)
        count += 1
    return count


def test_everything_is_due_when_much_was_frozen_and_later_when_that_finds_nothing(collector: Collector) -> None:
    assert not collector.garbage.due()
    first = freeze_until_due(collector)
    assert first * gc_tuning._EACH >= gc_tuning.WHOLE
    collector.garbage.look_through()
    assert not collector.garbage.due()
    assert freeze_until_due(collector) >= 2 * first
    knots = [Knot() for _ in range(gc_tuning.WHOLE // 20)]
    gc.collect()
    del knots
    collector.garbage.look_through()
    assert freeze_until_due(collector) <= 2 * first


def test_the_longest_pause_is_told_for_a_minute_or_two(collector: Collector) -> None:
    collector.call(0.003)
    collector.call(0.001)
    assert collector.told("realtime_gc_pause_seconds") == pytest.approx(0.003)
    collector.now += gc_tuning.SPAN
    collector.call(0.002)
    assert collector.told("realtime_gc_pause_seconds") == pytest.approx(0.003)
    collector.now += gc_tuning.SPAN
    assert collector.told("realtime_gc_pause_seconds") == pytest.approx(0.002)
    collector.now += 3 * gc_tuning.SPAN
    assert collector.told("realtime_gc_pause_seconds") == 0.0
