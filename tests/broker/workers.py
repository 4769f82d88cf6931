"""Real brokers and engines for tests: fixtures that start and stop them, and a receiver that logs deliveries."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import pytest_twisted
from twisted.internet.defer import Deferred

from realtime.config.settings import EngineSettings
from realtime.errors import EngineUnavailable
from realtime.metrics import Metrics
from realtime.pubsub.engine import (
    Publish,
)
from realtime.types import ClientInfo, HistoryOptions, Position, Publication
from tests.system.brokers import BrokerProcess, broker_engine

SETTINGS = EngineSettings(publish_timeout=30.0, queue_max_size=1_000_000)
KEEP = HistoryOptions(size=100, ttl=60.0)
ALICE = ClientInfo("alice", "client-a", b'{"name":"Alice"}')
BOB = ClientInfo("bob", "client-b")


class Worker:
    """A receiver and its engine. The receiver logs its deliveries in `entries`."""

    def __init__(self, slot: int = 0, settings: EngineSettings = SETTINGS, generation: int = 0) -> None:
        self.slot = slot
        self.entries: list[tuple[Any, ...]] = []
        self.lost_links = 0
        self.metrics = Metrics()
        self.engine = broker_engine(self, settings, self._lost, self.metrics, generation)

    def _lost(self) -> None:
        self.lost_links += 1

    def on_publication(self, channel: str, publication: Publication, epoch: str) -> None:
        self.entries.append(("published", channel, publication.data, publication.offset))

    def on_join(self, channel: str, info: ClientInfo) -> None:
        self.entries.append(("joined", channel, info))

    def on_leave(self, channel: str, info: ClientInfo) -> None:
        self.entries.append(("left", channel, info))

    def on_order(self, order: bytes) -> None:
        self.entries.append(("order", order))

    def on_cut(self, batch: str) -> None:
        self.entries.append(("cut", batch))

    def on_missed(self, channel: str, publications: bool) -> None:
        self.entries.append(("missed", channel, publications))

    def on_interruption(self) -> None:
        self.entries.append(("interrupted",))

    async def publish(self, channel: str = "c", data: bytes = b"1", history_options: HistoryOptions = KEEP) -> Position:
        return await self.engine.ask(Publish(channel, data, history_options))

    def count(self, name: str) -> float:
        return next(sample.value for sample in self.metrics.snapshot() if sample.name == name)


@pytest_twisted.async_yield_fixture
async def brokers() -> AsyncIterator[Callable[..., Any]]:
    """`await brokers()` starts a broker process, which ends with the test."""
    running: list[BrokerProcess] = []

    async def start(settings: EngineSettings = SETTINGS, workers: int = 0) -> BrokerProcess:
        broker = BrokerProcess(settings, workers)
        running.append(broker)
        await broker.start()
        return broker

    yield start
    for broker in running:
        await broker.stop()


@pytest.fixture
def workers() -> Any:
    """`workers(slot, …)` makes a worker, whose engine is closed after the test."""
    made: list[Worker] = []

    def make(slot: int = 0, settings: EngineSettings = SETTINGS, generation: int = 0) -> Worker:
        made.append(Worker(slot, settings, generation))
        return made[-1]

    yield make
    for worker in made:
        worker.engine.close()


async def failure_of(waiting: Deferred[Any]) -> str:
    with pytest.raises(EngineUnavailable) as error:
        await waiting
    return str(error.value)
