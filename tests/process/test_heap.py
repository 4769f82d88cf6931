"""Memory returns to the kernel after a peak, and the heap is left alone otherwise."""

from __future__ import annotations

import subprocess
import sys

import pytest

from realtime.metrics import Metrics
from realtime.process.heap import MIN_FREED_BLOCKS, HeapTrimmer, find_malloc_trim

PEAK = """
import psutil
from realtime.metrics import Metrics
from realtime.process.heap import HeapTrimmer, find_malloc_trim

trimmer = HeapTrimmer(Metrics(), find_malloc_trim())
rss = psutil.Process().memory_info
assert not trimmer.is_due()
kept, freed = [], []
for number in range(300_000):
    (freed if number % 100 else kept).append((number, bytes(600)))
assert not trimmer.is_due()
peak = rss().rss
freed.clear()
assert trimmer.is_due()
before = rss().rss
trimmer.trim()
assert not trimmer.is_due()
print(peak, before, rss().rss)
"""


def test_a_peak_leaves_no_memory_behind() -> None:
    if find_malloc_trim() is None:
        pytest.skip("this C library has no malloc_trim")
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    peak, before, after = map(int, done.stdout.split())
    assert peak > 200e6
    assert after < peak / 2
    assert after < before


def test_it_trims_only_after_a_third_of_a_peak_was_freed() -> None:
    blocks = [MIN_FREED_BLOCKS]
    trims: list[int] = []

    def trim(pad: int) -> int:
        trims.append(pad)
        return 1

    metrics = Metrics()
    trimmer = HeapTrimmer(metrics, trim, lambda: blocks[-1])
    due = []
    for size in (1.0, 6.0, 4.1, 4.0, 1.0):
        blocks.append(round(size * MIN_FREED_BLOCKS))
        due.append(trimmer.is_due())
    assert due == [False, False, False, True, True]
    trimmer.trim()
    assert trims == [0]
    assert not trimmer.is_due()
    blocks.append(1)
    assert not trimmer.is_due(), "too little to be worth a trim"
    assert [sample.value for sample in metrics.snapshot(["realtime_heap_trims"])] == [1]


def test_another_c_library_is_never_trimmed() -> None:
    blocks = [10 * MIN_FREED_BLOCKS, 0]
    trimmer = HeapTrimmer(Metrics(), None, lambda: blocks.pop(0))
    assert not trimmer.is_due()
    assert not trimmer.is_due()
    trimmer.trim()
