"""The tuned garbage collector: frozen objects, freed cycles, and metrics."""

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
        self.tuner = GCTuner(self.metrics, lambda: self.now, lambda: self.now)
        self.tuner.begin()

    def value(self, name: str, **labels: str) -> float:
        (sample,) = (sample for sample in self.metrics.snapshot([name]) if dict(sample.labels) == labels)
        return sample.value

    def call(self, seconds: float, generation: int = 1) -> None:
        """Call the tuner as Python does for a collection of this length."""
        info = {"generation": generation, "collected": 0, "uncollectable": 0}
        self.tuner._on_collection("start", info)
        self.now += seconds
        self.tuner._on_collection("stop", info)


@pytest.fixture
def collector() -> Iterator[Collector]:
    before = gc.get_threshold()
    collector = Collector()
    yield collector
    collector.tuner.end()
    gc.set_threshold(*before)


def test_present_objects_are_frozen_at_the_beginning(collector: Collector) -> None:
    assert gc.get_freeze_count() > 10_000
    assert len(gc.get_objects()) < 1_000


def test_later_garbage_is_collected_by_itself(collector: Collector) -> None:
    knot = make_knot()
    kept = [[] for _ in range(20 * gc_tuning._FROZEN_EACH)]  # type: ignore[var-annotated]
    assert kept
    assert knot() is None
    for generation in "012":
        assert collector.value("realtime_gc_collections", generation=generation) > 0
    assert collector.value("realtime_gc_collected_objects") >= 1


def test_survivors_of_a_full_collection_are_frozen(collector: Collector) -> None:
    kept = [[number] for number in range(1000)]
    before = gc.get_freeze_count()
    gc.collect()
    assert gc.get_freeze_count() >= before + len(kept)


def test_a_frozen_cycle_is_freed_by_a_collection_of_all_objects(collector: Collector) -> None:
    knot = Knot()
    reference = weakref.ref(knot)
    gc.collect()
    del knot
    gc.collect()
    assert reference() is not None
    collector.tuner.collect_all()
    assert reference() is None
    assert collector.value("realtime_gc_collections", generation="all") == 1
    assert gc.get_freeze_count() > 10_000


def freeze_until_due(collector: Collector) -> int:
    """The number of full collections until a collection of all objects is due."""
    count = 0
    while not collector.tuner.is_due():
        collector.call(0.0, generation=2)
        count += 1
    return count


def test_a_collection_of_all_objects_is_due_later_when_the_last_found_nothing(collector: Collector) -> None:
    assert not collector.tuner.is_due()
    first = freeze_until_due(collector)
    assert first * gc_tuning._FROZEN_EACH >= gc_tuning.WHOLE
    collector.tuner.collect_all()
    assert not collector.tuner.is_due()
    assert freeze_until_due(collector) >= 2 * first
    knots = [Knot() for _ in range(gc_tuning.WHOLE // 20)]
    gc.collect()
    del knots
    collector.tuner.collect_all()
    assert freeze_until_due(collector) <= 2 * first


def test_a_fork_gets_the_thresholds_of_python_and_keeps_objects_frozen(collector: Collector) -> None:
    collector.tuner.end_in_fork()
    assert gc.get_threshold() != gc_tuning.THRESHOLDS
    assert gc.get_freeze_count() > 0
    frozen = gc.get_freeze_count()
    gc.collect()
    assert gc.get_freeze_count() <= frozen


def test_the_longest_pause_is_kept_for_a_minute_or_two(collector: Collector) -> None:
    collector.call(0.003)
    collector.call(0.001)
    assert collector.value("realtime_gc_pause_seconds") == pytest.approx(0.003)
    collector.now += gc_tuning.SPAN
    collector.call(0.002)
    assert collector.value("realtime_gc_pause_seconds") == pytest.approx(0.003)
    collector.now += gc_tuning.SPAN
    assert collector.value("realtime_gc_pause_seconds") == pytest.approx(0.002)
    collector.now += 3 * gc_tuning.SPAN
    assert collector.value("realtime_gc_pause_seconds") == 0.0
