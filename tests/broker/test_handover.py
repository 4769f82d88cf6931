"""Another broker process takes the place of the one that serves: workers notice nothing, and one of them serves."""

from __future__ import annotations

import os
import random
import signal
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import Deferred

from realtime.broker import handover
from realtime.broker.handover import StateWanted, formats
from realtime.config.settings import EngineSettings
from realtime.errors import EngineUnavailable
from realtime.process.fd_passing import take_claim
from realtime.process.fd_stream import FdStream, stream_pair
from realtime.pubsub.engine import (
    AddClient,
    AddPresence,
    GetHistory,
    GetPresence,
    GetStats,
    Publish,
    Subscribe,
)
from realtime.types import ClientInfo, HistoryOptions, Position
from tests.broker import workers as fixtures
from tests.broker.test_continued_streams import CHANNELS, Story, turn
from tests.broker.workers import ALICE, KEEP, SETTINGS
from tests.system.brokers import BrokerProcess, until

brokers, workers = fixtures.brokers, fixtures.workers

encode = msgspec.msgpack.encode
WIDE = EngineSettings(publish_timeout=30.0)
LARGE = HistoryOptions(size=2000, ttl=600.0)


@pytest_twisted.async_yield_fixture
async def successors() -> AsyncIterator[Callable[..., Any]]:
    """`await successors(broker)` starts a process that takes the place of a broker, and returns it with the result."""
    running: list[BrokerProcess] = []

    async def start(before: BrokerProcess, settings: EngineSettings = SETTINGS) -> tuple[BrokerProcess, dict[str, Any]]:
        after = BrokerProcess(settings)
        running.append(after)
        ours, theirs = stream_pair()
        with ours, theirs:
            after.spawn(theirs.fileno())
            handed = before.hand_over(ours.fileno())
            return after, await handed

    yield start
    for broker in running:
        await broker.stop()


@pytest.mark.parametrize("seed", range(3))
async def test_streams_and_requests_go_on_at_the_same_byte(
    brokers: Any, successors: Any, workers: Any, seed: int
) -> None:
    broker = await brokers()
    story = Story(broker, workers(0), workers(1), random.Random(seed))
    await story.begin()
    for number in range(60):
        story.act()
        await story.run(story.random.choice((1, 100, 1 << 16)))
        if number in (20, 40):
            handed = Deferred.fromCoroutine(successors(story.broker))
            while not handed.called:  # requests and deliveries are under way all the time
                if sum(not each.called for each in story.waiting) < 20:
                    story.act()
                await story.run(story.random.choice((1, 100, 1 << 16, 1 << 16)))
            story.broker, result = await handed
            assert (result["moved"], result["reason"]) == (2, "")
            await story.broker.ready()
    await story.settle()
    story.wire.cut()
    await until(lambda: story.worker.lost_links > 0)
    assert (story.worker.lost_links, story.witness.lost_links) == (1, 0)
    assert story.worker.entries == story.witness.entries
    assert sum(entry[0] == "published" for entry in story.worker.entries) == story.published
    assert set(CHANNELS) <= {entry[1] for entry in story.worker.entries if entry[0] == "published"}


async def test_history_offsets_keys_presence_and_clients_are_the_same(
    brokers: Any, successors: Any, workers: Any
) -> None:
    broker, worker = await brokers(WIDE), workers(0, WIDE)
    await broker.link(0, worker.engine)
    engine = worker.engine
    await engine.ask(Subscribe("news"))
    for number in range(2000):
        engine.ask(Publish("news", b"%d" % number + b"x" * 500, LARGE))
    keyed = await engine.ask(Publish("kept", b"1", KEEP, idempotency_key="key"))
    engine.tell(AddClient(ALICE))
    await engine.ask(AddPresence("room", ALICE, present=True, announce=True))
    before = await engine.ask(GetHistory("news", LARGE, limit=3))
    broker, result = await successors(broker, WIDE)
    assert result["reason"] == ""
    await broker.ready()
    assert await engine.ask(GetHistory("news", LARGE, limit=3)) == before
    epoch = before.position.epoch
    assert await engine.ask(Publish("news", b"next", LARGE)) == Position(2001, epoch)
    assert await engine.ask(Publish("kept", b"1", KEEP, idempotency_key="key")) == keyed
    assert await engine.ask(GetPresence("room")) == {"client-a": ALICE}
    assert (await engine.ask(GetStats())).clients == 1
    assert worker.lost_links == 0
    await broker.link(1, (other := workers(1)).engine)
    await other.engine.ask(Subscribe("news"))
    assert (await worker.publish("news")).epoch == epoch
    await until(lambda: ("published", "news", b"1", 2002) in other.entries)


async def test_a_stream_goes_on_after_the_hand_over_and_a_cut(brokers: Any, successors: Any, workers: Any) -> None:
    broker = await brokers()
    story = Story(broker, workers(0), workers(1), random.Random(1))
    await story.begin()
    for _ in range(10):
        story.act()
        await story.run(30)  # the worker is behind
    story.broker, _ = await successors(broker)
    await story.broker.ready()
    await story.cut()
    await story.settle()
    story.wire.cut()
    assert story.worker.lost_links > 0
    assert story.worker.entries == story.witness.entries
    assert (await story.broker.samples("realtime_messages_dropped"))["link"] == 0


async def test_what_a_slow_worker_has_not_read_goes_over(brokers: Any, successors: Any, workers: Any) -> None:
    broker, worker, publisher = await brokers(), workers(0), workers(1)
    ours, theirs = socket.socketpair()
    stream = await broker.stream(0)
    worker.engine.attach(theirs.detach())
    with socket.socket(fileno=stream) as end, ours:
        for each in (end, ours):
            each.setblocking(False)
        subscribed = worker.engine.ask(Subscribe("news"))
        while not subscribed.called:
            _pass(end, ours)
            _pass(ours, end)
            await turn()
        await broker.link(1, publisher.engine)
        for number in range(60):
            await publisher.engine.ask(Publish("news", b"%d" % number + b"x" * 10_000, LARGE))
        broker, result = await successors(broker)
        assert result["moved"] == 2
        await broker.ready()
        await publisher.engine.ask(Publish("news", b"last", LARGE))
        while not worker.entries or worker.entries[-1][2] != b"last":
            _pass(end, ours)
            await turn()
    assert [entry[3] for entry in worker.entries] == list(range(1, 62))


def _pass(source: socket.socket, target: socket.socket) -> None:
    try:
        target.sendall(source.recv(1 << 16))
    except BlockingIOError:
        return


class Stand:
    """A process that should take the place of a broker, in the test's own. It stops at a message."""

    def __init__(self, stops_at: str) -> None:
        self.messages: list[str] = []
        self.claim = -1
        self.stopped: Deferred[None] = Deferred()
        self._stops_at = stops_at
        ours, self.theirs = stream_pair()
        self.stream = FdStream(reactor, ours.detach(), self._receive, lambda: None)
        self.stream.send(encode(StateWanted(formats())))

    def _receive(self, body: bytes, descriptors: list[int]) -> None:
        name = type(handover._decode_at_target(body)).__name__
        self.messages.append(name)
        if name == "StateComplete":
            self.claim = descriptors.pop()
        for fd in descriptors:
            os.close(fd)
        if name == self._stops_at and not self.stopped.called:
            self.stopped.callback(None)


@pytest.mark.parametrize("message", ["Begun", "PeerHead", "StreamsState", "StreamHanded", "StateComplete"])
async def test_a_broker_goes_on_when_the_new_process_ends_before_the_claim(
    brokers: Any, successors: Any, workers: Any, message: str
) -> None:
    broker, worker = await brokers(), workers()
    await broker.link(0, worker.engine)
    before = await worker.publish("kept")
    stand = Stand(message)
    handed = Deferred.fromCoroutine(broker.hand_over(stand.theirs.fileno()))
    await stand.stopped
    waiting = worker.engine.ask(Publish("kept", b"2", KEEP))
    stand.stream.close()
    stand.theirs.close()
    assert (await handed)["reason"] == "the new process has ended"
    assert await waiting == Position(2, before.epoch)
    _, result = await successors(broker)
    assert result["reason"] == "", "and later another process can take its place"
    assert worker.lost_links == 0


async def test_a_broker_ends_its_streams_when_the_new_process_ends_behind_the_claim(brokers: Any, workers: Any) -> None:
    broker, worker = await brokers(), workers()
    await broker.link(0, worker.engine)
    await worker.publish("kept")
    stand = Stand("StateComplete")
    handed = Deferred.fromCoroutine(broker.hand_over(stand.theirs.fileno()))
    await stand.stopped
    assert take_claim(stand.claim)
    waiting = worker.engine.ask(Publish("kept", b"2", KEEP))
    stand.stream.close()
    stand.theirs.close()
    await handed
    with pytest.raises(EngineUnavailable):
        await waiting
    assert worker.lost_links == 1
    await broker.gone()  # by itself


async def test_a_broker_goes_on_when_the_new_process_takes_too_long(brokers: Any, workers: Any) -> None:
    settings = EngineSettings(publish_timeout=1.0)
    broker, worker = await brokers(settings), workers()
    await broker.link(0, worker.engine)
    before = await worker.publish("kept")
    stand = Stand("StateComplete")
    handed = Deferred.fromCoroutine(broker.hand_over(stand.theirs.fileno()))
    reason = "the state is too large to go over within 0.5 s (half of engine.publish_timeout)"
    assert (await handed)["reason"] == reason
    assert not take_claim(stand.claim), "the claim is the broker's again"
    assert await worker.publish("kept") == Position(2, before.epoch)
    stand.stream.close()
    stand.theirs.close()


async def test_another_format_of_the_state_is_refused(brokers: Any, workers: Any) -> None:
    broker = await brokers()
    ours, theirs = stream_pair()
    stream = FdStream(reactor, ours.detach(), lambda body, fds: None, lambda: None)
    stream.send(encode(StateWanted("other")))
    with theirs:
        assert (await broker.hand_over(theirs.fileno()))["reason"] == "the new process has another format of the state"
    stream.close()


@pytest.mark.parametrize("frames", [0, 1, 3])
async def test_a_new_process_ends_when_the_broker_ends_before_the_claim(frames: int) -> None:
    """The supervisor starts another broker then."""
    after = BrokerProcess(SETTINGS)
    ours, theirs = stream_pair()
    asked: Deferred[None] = Deferred()
    stream = FdStream(reactor, ours.detach(), lambda body, fds: asked.callback(None), lambda: None)
    with theirs:
        after.spawn(theirs.fileno())
    await asked
    for frame in [encode(handover.Begun("epoch", [])), encode(handover.StateComplete())][:frames]:
        stream.send(frame)
    stream.close()
    with pytest.raises(AssertionError, match="ended before it was ready"):
        await after.ready()
    await after.stop()


async def test_a_killed_broker_during_its_export_leaves_no_half_state(brokers: Any, workers: Any) -> None:
    broker, worker = await brokers(WIDE), workers(0, WIDE)
    await broker.link(0, worker.engine)
    for number in range(2000):
        worker.engine.ask(Publish("news", b"%d" % number + b"x" * 5000, LARGE))
    await worker.publish("news")
    after = BrokerProcess(SETTINGS)
    ours, theirs = stream_pair()
    with ours, theirs:
        handed = Deferred.fromCoroutine(broker.hand_over(ours.fileno()))
        handed.addErrback(lambda failure: None)
        after.spawn(theirs.fileno())
    broker.signal(signal.SIGSTOP)
    broker.signal(signal.SIGKILL)
    with pytest.raises(AssertionError, match="ended before it was ready"):
        await after.ready()
    await until(lambda: worker.lost_links == 1)
    await handed
    await after.stop()


async def test_presence_under_way_during_the_hand_over_is_announced_once(
    brokers: Any, successors: Any, workers: Any
) -> None:
    broker, worker = await brokers(), workers()
    await broker.link(0, worker.engine)
    await worker.engine.ask(Subscribe("room"))
    handed = Deferred.fromCoroutine(successors(broker))
    infos = [ClientInfo("u", f"c{number}") for number in range(300)]
    for info in infos:
        await worker.engine.ask(AddPresence("room", info, True, True))
    broker, _ = await handed
    await broker.ready()
    assert set(await worker.engine.ask(GetPresence("room"))) == {info.client for info in infos}
    assert [entry for entry in worker.entries if entry[0] == "joined"] == [("joined", "room", info) for info in infos]
