"""Invalidations of caches between workers: the engine carries them, and the sender has carried out its own."""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable, Collection, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from realtime.cache import Cache, Done, Host, Invalidation
from realtime.errors import EngineUnavailable
from realtime.protocol.orders import InvalidateOrder, LandOrder, decode_order
from realtime.pubsub.broker_core import BrokerCore
from realtime.pubsub.engine import SendOrder
from realtime.worker.shared_caches import SharedCaches


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
        self.invalidations = [SharedCaches(host, engine, str(slot), 0) for slot, host in enumerate(self.hosts)]
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


class Machine:
    """Workers with a cache each, and a broker's core between them, whose frames arrive when the test wants it."""

    def __init__(self, workers: int, lease: float = 10.0) -> None:
        self.now = 1000.0
        self.source = 0  # of the values: the version of the data
        self.running: list[tuple[int, int, asyncio.Future[None]]] = []  # worker, version at the start
        machine: Any = self
        self.core: BrokerCore[int] = BrokerCore(machine, 1000)
        self.streams: list[deque[Callable[[], None]]] = [deque() for _ in range(workers)]  # towards each worker
        self.ups: list[deque[tuple[Any, Any]]] = [deque() for _ in range(workers)]  # towards the broker
        self.known = [0] * workers  # the version that callers of a worker may count on
        self.sending: list[deque[int]] = [deque() for _ in range(workers)]  # versions of invalidations
        self.sent: list[int] = []  # the same, in the order of the broker
        self.seen = [0] * workers  # how many of them a worker has received
        self.caches, self.shared = [], []
        for number in range(workers):
            self.core.attach(number, str(number), str(number))
            host = Host(clock=lambda: self.now)
            self.shared.append(SharedCaches(host, MachineEngine(self, number), str(number), lease))
            cache = Cache(ttl=1000, key=lambda key: key, host=host)
            cache.attach_to("forecast")
            self.caches.append(cache)

    def deliver_order(self, peers: Collection[int], order: bytes) -> None:
        for peer in peers:
            self.streams[peer].append(lambda peer=peer: self._receive(peer, order))  # type: ignore[misc]

    def _receive(self, worker: int, data: bytes) -> None:
        match decode_order(data):
            case InvalidateOrder() as order:
                self.shared[worker].on_order(order)
                self.known[worker] = max(self.known[worker], self.sent[self.seen[worker]])
                self.seen[worker] += 1
            case LandOrder() as order:
                self.shared[worker].on_landing(order)

    def transfer(self, worker: int) -> None:
        """Let the next frame of a worker arrive, and the next one for it."""
        if self.ups[worker]:
            request, done = self.ups[worker].popleft()
            if isinstance(request, SendOrder):
                self.sent.append(self.sending[worker].popleft())
            answer = self.core.carry_out(worker, self.now, request)
            self.streams[worker].append(lambda: done(answer, None))
        if self.streams[worker]:
            self.streams[worker].popleft()()

    async def rest(self) -> None:
        """Let everything happen that is on its way."""
        for _ in range(30):
            for worker in range(len(self.caches)):
                self.transfer(worker)
            await asyncio.sleep(0)

    async def invalidate(self, worker: int) -> None:
        invalidation = Invalidation("forecast")
        await self.caches[worker].carry_out(invalidation)
        self.known[worker] = self.source
        self.sending[worker].append(self.source)
        await self.shared[worker]._broadcast(invalidation)

    def call(self, worker: int, key: str = "oslo") -> asyncio.Task[int]:
        async def compute() -> int:
            version = self.source
            done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self.running.append((worker, version, done))
            await done
            return version

        return asyncio.ensure_future(self.caches[worker].call(compute, (key,)))


class MachineEngine:
    """The engine of one worker of a `Machine`."""

    def __init__(self, machine: Machine, worker: int) -> None:
        self._machine = machine
        self._worker = worker

    def ask_then(self, request: Any, done: Any) -> None:
        self._machine.ups[self._worker].append((request, done))

    def ask(self, request: Any) -> asyncio.Future[Any]:
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.ask_then(request, lambda result, error: answer.set_result(result))
        return answer

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"a cache has no need of {name}")


def in_a_loop(scene: Coroutine[Any, Any, None]) -> None:
    with ThreadPoolExecutor(1) as thread:  # the loop of the test run is busy
        thread.submit(asyncio.run, scene).result()


def test_one_worker_computes_and_all_have_the_value_afterwards() -> None:
    async def scene() -> None:
        machine = Machine(3)
        calls = [machine.call(worker) for worker in (1, 0, 2, 1)]
        await machine.rest()
        ((_, _, done),) = machine.running
        done.set_result(None)
        await machine.rest()
        assert [await call for call in calls] == [0] * 4
        machine.source = 1
        again = [machine.call(worker) for worker in range(3)]
        await machine.rest()
        assert [await call for call in again] == [0] * 3

    in_a_loop(scene())


def test_after_an_error_or_the_end_of_a_worker_the_others_compute() -> None:
    async def scene() -> None:
        machine = Machine(3)
        calls = [machine.call(worker) for worker in range(3)]
        await machine.rest()
        machine.running.pop()[2].set_exception(ValueError("no weather"))
        await machine.rest()
        assert sorted(worker for worker, _, _ in machine.running) == [1, 2]
        for _, _, done in machine.running:
            done.set_result(None)
        await machine.rest()
        assert [type(call.exception()) for call in calls] == [ValueError, type(None), type(None)]

        machine.running.clear()
        calls = [machine.call(worker, "rome") for worker in range(3)]
        await machine.rest()
        machine.core.detach(0, machine.now)
        await machine.rest()
        assert len(machine.running) == 2  # the lost one, and one of the others
        machine.running[1][2].set_result(None)
        await machine.rest()
        assert [call.done() for call in calls] == [False, True, True]
        calls[0].cancel()

    in_a_loop(scene())


def test_a_value_that_can_not_travel_is_computed_by_each_worker() -> None:
    async def scene() -> None:
        machine = Machine(2)

        async def compute() -> object:
            return object()

        calls = [asyncio.ensure_future(machine.caches[worker].call(compute, ("oslo",))) for worker in range(2)]
        await machine.rest()
        first, second = [await call for call in calls]
        assert first is not second

    in_a_loop(scene())


@pytest.mark.parametrize("seed", range(30))
def test_nobody_gets_a_value_from_before_the_invalidation_that_it_knows_of(seed: int) -> None:
    """Whatever the order in which frames arrive, computations end and callers come."""

    async def scene() -> None:
        chance, machine = random.Random(seed), Machine(3)
        calls: list[tuple[int, asyncio.Task[int]]] = []
        invalidations: list[asyncio.Future[None]] = []
        for _ in range(300):
            worker = chance.randrange(3)
            match chance.randrange(6):
                case 0:
                    calls.append((machine.known[worker], machine.call(worker)))
                case 1 if machine.running:
                    done = machine.running.pop(chance.randrange(len(machine.running)))[2]
                    done.set_result(None)
                case 2 if chance.random() < 0.3:
                    machine.source += 1
                    invalidations.append(asyncio.ensure_future(machine.invalidate(worker)))
                case _:
                    machine.transfer(worker)
            await asyncio.sleep(0)
        for _ in range(20):
            await machine.rest()
            for _, _, done in machine.running:
                if not done.done():
                    done.set_result(None)
        await asyncio.gather(*invalidations)
        for floor, call in calls:
            assert await call >= floor

    in_a_loop(scene())
