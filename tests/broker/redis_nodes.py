"""Nodes of one deployment under test: brokers on the same Redis server, each with workers in the test's process."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from realtime.config.settings import EngineSettings, RedisSettings
from tests.pubsub.benches import Bench
from tests.system.brokers import BrokerProcess, broker_engine


@asynccontextmanager
async def nodes(address: str, count: int = 1, workers: int = 1, **redis: object) -> AsyncIterator[list[Node]]:
    """Start nodes, and end them at last. redis: further settings of engine.redis."""
    async with nodes_of(RedisSettings(address=(address,), **redis), count, workers) as started:  # type: ignore[arg-type]
        yield started


@asynccontextmanager
async def nodes_of(settings: RedisSettings, count: int = 1, workers: int = 1) -> AsyncIterator[list[Node]]:
    """Start nodes with these settings."""
    started = [Node(EngineSettings(type="redis", redis=settings)) for _ in range(count)]
    try:
        for node in started:
            await node.start(workers)
        yield started
    finally:
        for node in started:
            await node.stop()


class Node:
    """One broker, and its workers."""

    def __init__(self, settings: EngineSettings) -> None:
        self.settings = settings
        self.broker = BrokerProcess(settings)
        self.workers: list[Bench] = []

    async def start(self, workers: int) -> None:
        await self.broker.start()
        for slot in range(workers):
            await self.add_worker(slot)

    async def add_worker(self, slot: int) -> Bench:
        bench = Bench(lambda log: broker_engine(log, self.settings))
        await self.broker.link(slot, bench.engine)
        self.workers.append(bench)
        return bench

    async def restart(self) -> None:
        """Start another broker in the place of one that has ended."""
        self.broker = BrokerProcess(self.settings, port=self.broker.port)
        await self.broker.start()
        for slot, bench in enumerate(self.workers):
            await self.broker.link(slot, bench.engine)

    async def stop(self) -> None:
        for bench in self.workers:
            bench.engine.close()
        await self.broker.stop()
