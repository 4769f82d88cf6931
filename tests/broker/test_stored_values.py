"""Caches of two nodes with one Redis: one computation for all, values for all, and invalidations that reach all."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from twisted.internet.defer import Deferred
from twisted.logger import LogEvent, formatEvent, globalLogPublisher

from realtime.cache import Cache, Host
from realtime.protocol.orders import InvalidateOrder, LandOrder, decode_order
from realtime.worker.load_shedding import configure_cache_host
from realtime.worker.shared_caches import SharedCaches
from tests.broker.redis_nodes import nodes
from tests.pubsub.benches import Bench
from tests.redis.deployments import RedisProcess
from tests.system.brokers import until


class CachingWorker:
    """A cache of one worker. Its computations wait until the test ends them."""

    def __init__(self, bench: Bench, name: str, **options: Any) -> None:
        pressure: Any = None  # without load
        self.host = Host()
        metrics: Any = None
        configure_cache_host(self.host, pressure, Deferred.fromCoroutine, metrics)
        self.host.load, self.host.counter = float, Host().counter
        self.shared = SharedCaches(self.host, bench.engine, name, 10.0)
        self.cache = Cache(
            storage="redis",
            key=lambda city: city,
            tags=lambda city: [city[0]],
            host=self.host,
            **{"ttl": 60, **options},
        )
        self.cache.attach_to("forecast")
        self.running: list[asyncio.Future[Any]] = []
        bench.log.on_order = self._receive  # type: ignore[method-assign]

    def _receive(self, data: bytes) -> None:
        match decode_order(data):
            case InvalidateOrder() as order:
                self.shared.on_order(order)
            case LandOrder() as order:
                self.shared.on_landing(order)

    def ask(self, city: str = "oslo") -> Deferred[Any]:
        return _start(self.cache.call(self._compute, (city,)))

    async def _compute(self) -> Any:
        self.running.append(asyncio.get_running_loop().create_future())
        return await self.running[-1]

    async def answer(self, value: Any) -> None:
        """Wait for a computation, and end it."""
        await until(lambda: bool(self.running))
        self.running.pop().set_result(value)


def _start(coroutine: Any) -> Deferred[Any]:
    return Deferred.fromFuture(asyncio.ensure_future(coroutine))


@asynccontextmanager
async def caches(redis_server: RedisProcess, **options: Any) -> AsyncIterator[tuple[CachingWorker, CachingWorker]]:
    async with nodes(redis_server.address, 2) as started:
        here, there = (
            CachingWorker(node.workers[0], f"{number}.0-1", **options) for number, node in enumerate(started)
        )
        yield here, there


async def test_one_worker_of_all_nodes_computes_and_another_one_after_an_error(redis_server: RedisProcess) -> None:
    async with caches(redis_server) as (here, there):
        asked = [here.ask(), there.ask(), here.ask()]
        await until(lambda: bool(here.running or there.running))
        for _ in range(20):  # time for a second computation
            await until(lambda: True)
        (computing,) = [worker for worker in (here, there) if worker.running]
        await computing.answer({"sun": [1, b"x"]})
        assert [await answer for answer in asked] == [{"sun": [1, b"x"]}] * 3
        assert not here.running and not there.running

        failing = here.ask("rome")
        await until(lambda: bool(here.running))
        waiting = there.ask("rome")
        here.running.pop().set_exception(ValueError("no weather"))
        with pytest.raises(ValueError, match="no weather"):
            await failing
        await there.answer("sun")
        assert await waiting == "sun"


async def test_a_value_outlives_a_node_and_its_workers(redis_server: RedisProcess) -> None:
    async with caches(redis_server) as (here, there):
        asked = here.ask()
        await here.answer("sun")
        assert await asked == await there.ask() == "sun"
    async with caches(redis_server) as (here, there):
        assert [await here.ask(), await there.ask()] == ["sun", "sun"]


async def test_an_invalidation_reaches_the_copies_of_all_nodes_and_computations_under_way(
    redis_server: RedisProcess,
) -> None:
    async with caches(redis_server) as (here, there):
        for how in ("key", "tag", "all"):
            asked = here.ask()
            await here.answer("sun")
            assert await asked == await there.ask() == "sun"
            await _invalidate(there, how)
            await until(lambda: len(here.cache._storage) == 0)  # type: ignore[arg-type]
            late = here.ask()
            await until(lambda: bool(here.running))
            await _invalidate(there, how)
            fresh = there.ask()
            await there.answer("snow")
            await here.answer("from before")
            assert (await late, await fresh) == ("from before", "snow")
            assert await here.ask() == await there.ask() == "snow"
            await _invalidate(here, "all")
            await until(lambda: len(there.cache._storage) == 0)  # type: ignore[arg-type]


async def _invalidate(worker: CachingWorker, how: str) -> None:
    await {
        "key": lambda: worker.cache.invalidate("oslo"),
        "tag": lambda: worker.cache.invalidate_tags("o"),
        "all": worker.cache.clear,
    }[how]()


async def test_while_one_node_computes_anew_the_others_serve_the_stale_value(redis_server: RedisProcess) -> None:
    async with caches(redis_server, ttl=0.05, stale=60) as (here, there):
        asked = here.ask()
        await here.answer("sun")
        assert await asked == "sun"
        stale_at = time.monotonic() + 0.06
        await until(lambda: time.monotonic() > stale_at)
        here.cache._storage._entries.clear()  # type: ignore[attr-defined]
        anew = here.ask()
        await until(lambda: bool(here.running))
        assert await there.ask() == "sun"
        await here.answer("rain")
        assert await anew == "rain"


async def test_without_redis_each_machine_computes_and_says_so_once(redis_starter: Any) -> None:
    server = redis_starter.standalone()
    lines: list[str] = []

    def observe(event: LogEvent) -> None:
        lines.append(formatEvent(event))

    globalLogPublisher.addObserver(observe)
    try:
        async with caches(server) as (here, there):
            server.kill()
            for city in ("oslo", "rome"):
                asked = [here.ask(city), there.ask(city)]
                await here.answer("sun")
                await there.answer("rain")
                assert [await answer for answer in asked] == ["sun", "rain"]
    finally:
        globalLogPublisher.removeObserver(observe)
    assert len([line for line in lines if "compute their values on this machine alone" in line]) == 2
