"""Cut streams between a worker and the broker: the next one continues them, or counts what is lost."""

from __future__ import annotations

import random
import socket
from contextlib import suppress
from typing import Any

import pytest
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater

from realtime.config.settings import EngineSettings
from realtime.errors import EngineUnavailable
from realtime.pubsub.engine import (
    AddClient,
    AddPresence,
    Cut,
    GetPresence,
    GetStats,
    Publish,
    RemovePresence,
    SendOrder,
    Subscribe,
    TakeLostClients,
    Unsubscribe,
    worker_address,
)
from realtime.types import ClientInfo, HistoryOptions
from tests.broker import workers as fixtures
from tests.broker.workers import ALICE, KEEP, Worker
from tests.system.brokers import BrokerProcess, until

brokers, workers = fixtures.brokers, fixtures.workers

PLAIN = HistoryOptions()
CHANNELS = {"plain": PLAIN, "kept": KEEP, "other": PLAIN}


class Wire:
    """Passes bytes between the broker and a worker, and is cut at any of them."""

    def __init__(self, stream: int, worker: Worker) -> None:
        ours, theirs = socket.socketpair()
        self.ends = socket.socket(fileno=stream), ours
        for end in self.ends:
            end.setblocking(False)
        worker.engine.attach(theirs.detach())

    def pass_on(self, limit: int) -> None:
        """Pass up to `limit` bytes of the broker, and all of the worker."""
        broker, worker = self.ends
        for source, target, size in ((broker, worker, limit), (worker, broker, 1 << 16)):
            with suppress(BlockingIOError, ConnectionError):
                target.sendall(source.recv(size))

    def cut(self) -> None:
        for end in self.ends:
            end.close()


async def turn() -> None:
    await deferLater(reactor, 0)  # type: ignore[arg-type]


class Story:
    """One worker with a wire that is cut, and a witness with a whole stream. Both receive the same deliveries."""

    def __init__(self, broker: BrokerProcess, worker: Worker, witness: Worker, random: random.Random) -> None:
        self.broker, self.worker, self.witness, self.random = broker, worker, witness, random
        self.published = 0
        self.present: list[ClientInfo] = []
        self.waiting: list[Deferred[Any]] = []

    async def begin(self) -> None:
        await self.broker.link(1, self.witness.engine)
        await self.connect()
        for worker in (self.worker, self.witness):
            asked = [worker.engine.ask(Subscribe(channel)) for channel in CHANNELS]
            while not all(each.called for each in asked):
                await self.run(1 << 16)

    async def connect(self) -> None:
        self.wire = Wire(await self.broker.stream(0), self.worker)

    async def run(self, limit: int) -> None:
        self.wire.pass_on(limit)
        await turn()

    def act(self) -> None:
        """Publish, join or leave at the witness."""
        kind = self.random.random()
        if kind < 0.15:
            self.present.append(ClientInfo("user", f"client-{self.published}-{len(self.present)}"))
            self.waiting.append(self.witness.engine.ask(AddPresence("plain", self.present[-1], True, True)))
        elif kind < 0.25 and self.present:
            info = self.present.pop(self.random.randrange(len(self.present)))
            self.waiting.append(self.witness.engine.ask(RemovePresence("plain", info.client)))
        elif kind < 0.3:
            self.waiting.append(self.witness.engine.ask(SendOrder(b"%d" % self.published)))
        else:
            channel = self.random.choice(list(CHANNELS))
            data = b"%d " % self.published + b"x" * self.random.choice((1, 10, 1000, 20_000))
            self.published += 1
            self.waiting.append(self.witness.engine.ask(Publish(channel, data, CHANNELS[channel])))

    async def cut(self) -> None:
        """Cut the wire behind any byte; more deliveries come before the next stream, and before its end."""
        for _ in range(self.random.randrange(3)):
            self.act()
            await self.run(self.random.choice((1, 7, 30, 300, 5000)))
        self.wire.cut()
        lost = self.worker.lost_links
        if self.random.random() < 0.7:
            await until(lambda: self.worker.lost_links > lost)
        for _ in range(self.random.randrange(3)):
            self.act()
            await turn()
        await self.connect()

    async def settle(self) -> None:
        done = [each.addErrback(lambda failure: failure.trap(EngineUnavailable)) for each in self.waiting]
        asked = self.worker.engine.ask(GetStats())
        asked.addErrback(lambda failure: failure.trap(EngineUnavailable))
        while not (asked.called and all(each.called for each in done)):
            await self.run(1 << 16)
        asked = self.worker.engine.ask(GetStats())
        while not asked.called:
            await self.run(1 << 16)


@pytest.mark.parametrize("seed", range(6))
async def test_a_cut_stream_goes_on_at_the_same_frame(brokers: Any, workers: Any, seed: int) -> None:
    broker = await brokers()
    story = Story(broker, workers(0), workers(1), random.Random(seed))
    await story.begin()
    for _ in range(40):
        if story.random.random() < 0.4:
            await story.cut()
        story.act()
        await story.run(story.random.choice((1, 100, 1 << 16)))
    await story.settle()
    story.wire.cut()
    assert story.worker.lost_links > 5
    assert story.worker.entries == story.witness.entries
    assert (await broker.samples("realtime_messages_dropped"))["link"] == 0


async def test_the_state_of_a_worker_may_change_between_two_streams(brokers: Any, workers: Any) -> None:
    broker, worker, witness = await brokers(), workers(0), workers(1)
    for each in (worker, witness):
        await broker.link(each.slot, each.engine)
    for channel in ("left", "stays"):
        await worker.engine.ask(Subscribe(channel))
    wire = Wire(await broker.stream(0), worker)
    await witness.engine.ask(GetStats())
    wire.cut()
    await until(lambda: worker.lost_links == 1)
    worker.engine.tell(Unsubscribe("left"))
    worker.engine.tell(AddClient(ClientInfo("new", "client-n")))
    joining = worker.engine.ask(Subscribe("joined"))
    await broker.link(0, worker.engine)
    await joining
    for channel in ("left", "stays", "joined"):
        await witness.publish(channel, b"1", PLAIN)
    stats = await worker.engine.ask(GetStats())
    assert (stats.clients, stats.channels) == (1, 2)
    assert worker.entries == [("published", "stays", b"1", 0), ("published", "joined", b"1", 0)]


@pytest.mark.parametrize("arrives", [True, False])
async def test_a_stream_that_is_cut_while_clients_move(brokers: Any, workers: Any, arrives: bool) -> None:
    """The target gets the cut over its next stream, which has not begun with the clients."""
    broker, old, new, witness = await brokers(), workers(0), workers(0, generation=1), workers(1)
    for each in (old, witness):
        await broker.link(each.slot, each.engine)
    wire = Wire(await broker.stream(0), new)
    welcome = new.engine.ask(GetStats())
    while not welcome.called:
        wire.pass_on(1 << 16)
        await turn()
    await old.engine.ask(AddPresence("c", ALICE, True, True))
    old.engine.tell(AddClient(ALICE))
    await old.engine.ask(Cut("batch", worker_address(0, 1), ["client-a"], {}, {"c": ["client-a"]}))
    wire.cut()
    await until(lambda: new.lost_links == 1)
    await broker.link(0, new.engine)
    await new.engine.ask(GetStats())
    assert new.entries == [("cut", "batch")]
    if arrives:
        new.engine.claim("batch", ALICE, "", [AddPresence("c", ALICE, True, True)])
        await new.engine.ask(GetStats())
    assert len(new.engine.forget_arrivals("batch")) == 1 - arrives
    await new.engine.ask(GetStats())
    assert await witness.engine.ask(GetPresence("c")) == ({"client-a": ALICE} if arrives else {})
    assert (await witness.engine.ask(GetStats())).clients == arrives


async def test_deliveries_to_a_worker_that_does_not_return_are_counted(brokers: Any, workers: Any) -> None:
    broker, worker, witness = await brokers(), workers(0), workers(1)
    for each in (worker, witness):
        await broker.link(each.slot, each.engine)
    await worker.engine.ask(Subscribe("c"))
    await worker.engine.ask(AddPresence("c", ALICE, True, False))
    wire = Wire(await broker.stream(0), worker)
    wire.cut()
    await until(lambda: worker.lost_links == 1)
    for number in range(5):
        await witness.publish("c", b"%d" % number, PLAIN)
    while await witness.engine.ask(GetPresence("c")):
        await turn()
    assert (await broker.samples("realtime_messages_dropped"))["link"] >= 5
    await broker.link(0, worker.engine)
    await worker.engine.ask(GetStats())
    assert ("interrupted",) in worker.entries
    await witness.publish("c", b"after", PLAIN)
    await worker.engine.ask(GetStats())
    assert worker.entries[-1] == ("published", "c", b"after", 0)


async def test_a_worker_whose_successor_comes_first_returns_all_the_same(brokers: Any, workers: Any) -> None:
    """The successor of a living worker, to which that one hands over."""
    broker, old, new, witness = await brokers(), workers(0), workers(0, generation=1), workers(1)
    for each in (old, witness):
        await broker.link(each.slot, each.engine)
        await each.engine.ask(Subscribe("c"))
    await old.engine.ask(AddPresence("c", ALICE, True, True))
    old.engine.tell(AddClient(ALICE))
    Wire(await broker.stream(0), old).cut()
    await until(lambda: old.lost_links == 1)
    await broker.link(0, new.engine)
    assert await new.engine.ask(TakeLostClients(10)) == []
    await witness.publish("c", b"1", PLAIN)
    await broker.link(0, old.engine)
    await old.engine.ask(GetStats())
    assert [entry[0] for entry in old.entries if entry[0] != "joined"] == ["published"]
    assert ("left", "c", ALICE) not in witness.entries
    assert (await broker.samples("realtime_messages_dropped"))["link"] == 0


async def test_deliveries_beyond_the_limit_of_a_cut_stream_are_counted(brokers: Any, workers: Any) -> None:
    settings = EngineSettings(publish_timeout=30.0, queue_max_size=100_000)
    broker, worker, witness = await brokers(settings), workers(0), workers(1)
    for each in (worker, witness):
        await broker.link(each.slot, each.engine)
    await worker.engine.ask(Subscribe("c"))
    stream = await broker.stream(0)
    Wire(await broker.stream(0), worker).cut()
    await until(lambda: worker.lost_links == 1)
    for _ in range(12):
        await witness.publish("c", b"x" * 10_000, PLAIN)
    worker.engine.attach(stream)
    await worker.engine.ask(GetStats())
    delivered = sum(entry[0] == "published" for entry in worker.entries)
    assert ("interrupted",) in worker.entries
    assert delivered + (await broker.samples("realtime_messages_dropped"))["link"] == 12
