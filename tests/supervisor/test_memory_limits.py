"""Which workers use too much memory."""

from __future__ import annotations

from realtime.config.settings import LoopSettings, Settings, WorkersSettings
from realtime.supervision.pool import Pool
from realtime.supervision.vitals import ProcessState, Vitals
from realtime.supervisor.memory_limits import MemoryLimits

SETTINGS = Settings(loop=LoopSettings(max_rss=300), workers=WorkersSettings(max_rss=200))


def ready_pool() -> Pool:
    pool = Pool(2, SETTINGS.workers, SETTINGS.loop, 1.0)
    pool.start(0.0)
    for generation in (1, 2, 3):
        pool.process_ready(generation, 0.0)
    return pool


def vitals(rss: int) -> Vitals:
    return Vitals(1, 0.0, 0, 0, ProcessState.READY, rss=rss)


def test_a_worker_exceeds_each_limit_that_is_below_its_memory() -> None:
    limits = MemoryLimits(ready_pool(), SETTINGS)
    assert list(limits.excesses({1: vitals(999), 2: vitals(250), 3: vitals(200)})) == [(0, 250, "workers.max_rss")]
    assert [key for _, _, key in limits.excesses({3: vitals(301)})] == ["loop.max_rss", "workers.max_rss"]


def test_other_limits_count_from_the_next_look_and_zero_is_none() -> None:
    limits = MemoryLimits(ready_pool(), SETTINGS)
    limits.configure(Settings())
    assert list(limits.excesses({2: vitals(1 << 40), 3: None})) == []
