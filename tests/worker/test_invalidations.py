"""Invalidations of caches between workers: the engine carries them, and the sender has carried out its own."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from realtime.cache import Cache, Done, Host
from realtime.errors import EngineUnavailable
from realtime.protocol.orders import InvalidateOrder, decode_order
from realtime.pubsub.engine import SendOrder
from realtime.worker.invalidations import CacheInvalidations


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine that does not wait."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return stop.value
    raise AssertionError("it waits")


class Workers:
    """Two workers, each with a cache of the same name, and the engine between them."""

    def __init__(self) -> None:
        self.is_available = True
        self.computed = [0, 0]
        self.hosts = [Host(perform=run, start=self._start) for _ in range(2)]
        engine: Any = self
        self.invalidations = [CacheInvalidations(host, engine, str(slot)) for slot, host in enumerate(self.hosts)]
        self.caches = [self._make_cache(host) for host in self.hosts]

    @staticmethod
    def _make_cache(host: Host) -> Cache:
        made = Cache(ttl=60, key=lambda key: key, tags=lambda key: [key[0]], host=host)
        made.attach_to("forecast")
        return made

    @staticmethod
    def _start(coroutine: Coroutine[Any, Any, Any], done: Done) -> None:
        done(run(coroutine), None)

    async def ask(self, request: SendOrder) -> int:
        """Stands for the engine: delivers an order to every worker."""
        if not self.is_available:
            raise EngineUnavailable("the broker did not answer in time")
        order = decode_order(request.order)
        assert isinstance(order, InvalidateOrder)
        for each in self.invalidations:
            each.on_order(order)
        return len(self.invalidations)

    def has_cached(self, worker: int, key: Any) -> bool:
        """Whether a worker answers from its cache; it has cached an answer afterwards."""

        async def compute() -> int:
            self.computed[worker] += 1
            return self.computed[worker]

        async def ask() -> bool:
            before = self.computed[worker]
            await self.caches[worker].call(compute, (key,))
            return self.computed[worker] == before

        with ThreadPoolExecutor(1) as thread:  # the loop of the test run is busy
            return thread.submit(asyncio.run, ask()).result()


@pytest.fixture
def workers() -> Workers:
    workers = Workers()
    for worker in range(2):
        for key in ("oslo", "rome"):
            assert not workers.has_cached(worker, key)
            assert workers.has_cached(worker, key)
    return workers


def test_clear_reaches_every_worker(workers: Workers) -> None:
    workers.caches[0].clear()
    assert not any(workers.has_cached(worker, key) for worker in range(2) for key in ("oslo", "rome"))


@pytest.mark.parametrize("how", ["invalidate", "invalidate_tags"])
def test_keys_and_tags_reach_every_worker(workers: Workers, how: str) -> None:
    getattr(workers.caches[1], how)("oslo" if how == "invalidate" else "o")
    for worker in range(2):
        assert not workers.has_cached(worker, "oslo")
        assert workers.has_cached(worker, "rome")


def test_without_an_engine_it_is_carried_out_here_and_raises(workers: Workers) -> None:
    workers.is_available = False
    with pytest.raises(EngineUnavailable):
        workers.caches[0].clear()
    assert not workers.has_cached(0, "oslo")
    assert workers.has_cached(1, "oslo")


def test_a_worker_that_was_cut_off_clears_its_caches(workers: Workers) -> None:
    workers.invalidations[1].on_interruption()
    assert workers.has_cached(0, "oslo")
    assert not workers.has_cached(1, "oslo")
