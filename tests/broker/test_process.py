"""The broker process and the engine that talks to it, when something goes wrong between them."""

from __future__ import annotations

import itertools
import os
import select
import signal
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import pytest_twisted
from twisted.internet.defer import Deferred, DeferredList
from twisted.internet.task import Clock

from realtime.broker.process import Broker
from realtime.config.settings import EngineSettings
from realtime.errors import ClientError, EngineUnavailable
from realtime.metrics import Metrics
from realtime.pubsub import broker_messages
from realtime.pubsub.engine import (
    AddClient,
    AddPresence,
    AdmitClient,
    GetHistory,
    GetPresence,
    GetPresenceStats,
    GetStats,
    Publish,
    RemoveClient,
    RemovePresence,
    ReportSubscriptions,
    Subscribe,
    Unsubscribe,
)
from realtime.pubsub.hub import Hub
from realtime.types import ClientInfo, EngineStats, HistoryOptions, Position, Publication
from realtime.worker.engine import BrokerEngine
from tests.pubsub.sinks import WholeFrames
from tests.system.brokers import BrokerProcess, broker_engine, until

SETTINGS = EngineSettings(publish_timeout=30.0, queue_max_size=1_000_000)
KEEP = HistoryOptions(size=100, ttl=60.0)
ALICE = ClientInfo("alice", "client-a", b'{"name":"Alice"}')
BOB = ClientInfo("bob", "client-b")
PEER: Any = None  # publishing does not look at the peer


class Worker:
    """A receiver and its engine, kept attached to whatever broker there is."""

    def __init__(self, slot: int = 0, settings: EngineSettings = SETTINGS) -> None:
        self.slot = slot
        self.entries: list[tuple[Any, ...]] = []
        self.lost_links = 0
        self.metrics = Metrics()
        self.engine = broker_engine(self, settings, self._lost, self.metrics)

    def _lost(self) -> None:
        self.lost_links += 1

    def on_publication(self, channel: str, publication: Publication, epoch: str) -> None:
        self.entries.append(("published", channel, publication.data, publication.offset))

    def on_join(self, channel: str, info: ClientInfo) -> None:
        self.entries.append(("joined", channel, info))

    def on_leave(self, channel: str, info: ClientInfo) -> None:
        self.entries.append(("left", channel, info))

    def on_order(self, order: bytes) -> None:
        self.entries.append(("instructed", order))

    def on_interruption(self) -> None:
        self.entries.append(("interrupted",))

    async def publish(self, channel: str = "c", data: bytes = b"1", history_options: HistoryOptions = KEEP) -> Position:
        return await self.engine.ask(Publish(channel, data, history_options))

    def count(self, name: str) -> float:
        return next(sample.value for sample in self.metrics.snapshot() if sample.name == name)


@pytest_twisted.async_yield_fixture
async def brokers() -> AsyncIterator[Callable[..., Any]]:
    """`await brokers()` starts a broker process."""
    running: list[BrokerProcess] = []

    async def start(settings: EngineSettings = SETTINGS) -> BrokerProcess:
        broker = BrokerProcess(settings)
        running.append(broker)
        await broker.start()
        return broker

    yield start
    for broker in running:
        await broker.stop()


@pytest.fixture
def workers() -> Any:
    """`workers(slot)` makes a worker; all are closed afterwards."""
    made: list[Worker] = []

    def make(slot: int = 0, settings: EngineSettings = SETTINGS) -> Worker:
        made.append(Worker(slot, settings))
        return made[-1]

    yield make
    for worker in made:
        worker.engine.close()


async def failure_of(waiting: Deferred[Any]) -> str:
    with pytest.raises(EngineUnavailable) as error:
        await waiting
    return str(error.value)


# The broker dies


async def test_what_waits_for_a_killed_broker_fails(brokers: Any, workers: Any) -> None:
    broker, worker = await brokers(), workers()
    await broker.link(0, worker.engine)
    await worker.publish()
    broker.signal(signal.SIGSTOP)
    waiting = [Deferred.fromCoroutine(worker.publish()) for _ in range(3)]
    waiting.append(worker.engine.ask(Subscribe("d")))
    await broker.kill()
    for each in waiting:
        assert await failure_of(each) == "the broker was lost"
    assert worker.lost_links == 1
    assert worker.count("realtime_engine_lost_links") == 1
    assert worker.count("realtime_engine_waiting") == 0


async def test_a_new_broker_gets_all_that_a_worker_holds(brokers: Any, workers: Any) -> None:
    worker, other = workers(0), workers(1)
    first = await brokers()
    for each in (worker, other):
        await first.link(each.slot, each.engine)
    await worker.engine.ask(Subscribe("c"))
    await worker.engine.ask(Subscribe("given up"))
    worker.engine.tell(Unsubscribe("given up"))
    await worker.engine.ask(AddPresence("c", ALICE, present=True, announce=True))
    await worker.engine.ask(AddPresence("c", BOB, present=True, announce=True))
    await worker.engine.ask(RemovePresence("c", BOB.client))
    for info in (ALICE, BOB):
        worker.engine.tell(AddClient(info))
    worker.engine.tell(RemoveClient(BOB.client))
    worker.engine.tell(ReportSubscriptions(4))
    before = await worker.publish()
    await first.kill()
    await until(lambda: worker.lost_links == 1 and other.lost_links == 1)

    second = await brokers()
    worker.entries.clear()
    await second.link(worker.slot, worker.engine)
    assert worker.entries == [("interrupted",)]
    await second.link(other.slot, other.engine)
    assert await other.engine.ask(GetPresence("c")) == {"client-a": ALICE}
    assert await other.engine.ask(GetStats()) == EngineStats(clients=1, users=1, channels=1, subscriptions=4)
    after = await other.publish("c", b"2")
    await other.publish("given up", b"3")
    assert after.offset == 1
    assert after.epoch != before.epoch
    await worker.engine.ask(GetStats())
    # The subscribers were never told that anybody left, so nobody joins.
    assert worker.entries == [("interrupted",), ("published", "c", b"2", 1)]
    await worker.engine.ask(RemovePresence("c", ALICE.client))
    assert worker.entries[-1] == ("left", "c", ALICE)


async def test_requests_wait_for_a_broker(brokers: Any, workers: Any) -> None:
    worker, witness = workers(), workers(1)
    waiting = [Deferred.fromCoroutine(worker.publish("c", b"%d" % number)) for number in range(3)]
    gone = worker.engine.ask(Subscribe("given up"))
    worker.engine.tell(Unsubscribe("given up"))
    subscribed = worker.engine.ask(Subscribe("c"))
    broker = await brokers()
    await broker.link(0, worker.engine)
    assert [(await each).offset for each in waiting] == [1, 2, 3]
    await gone
    await subscribed
    await broker.link(1, witness.engine)
    await witness.publish("given up")
    await witness.publish("c", b"later")
    await worker.engine.ask(GetStats())
    assert worker.entries == [("published", "c", b"%d" % n, n + 1) for n in range(3)] + [
        ("published", "c", b"later", 4)
    ]


async def test_who_left_before_there_was_a_broker_is_not_present(brokers: Any, workers: Any) -> None:
    worker = workers(0, EngineSettings(publish_timeout=30.0, queue_max_size=10_000))
    client = "x" * 2000
    entered = worker.engine.ask(AddPresence("c", ClientInfo("", client), present=True, announce=True))
    filling = Deferred.fromCoroutine(worker.publish("c", b"x" * 6500))
    assert "too much" in await failure_of(worker.engine.ask(RemovePresence("c", client)))
    broker = await brokers()
    await broker.link(0, worker.engine)
    await entered
    await filling
    assert await worker.engine.ask(GetPresence("c")) == {}


async def test_the_first_stream_is_no_interruption(brokers: Any, workers: Any) -> None:
    broker, worker = await brokers(), workers()
    await broker.link(0, worker.engine)
    await worker.publish()
    assert worker.entries == []


async def test_no_member_is_left_with_a_hole(brokers: Any) -> None:
    """A hub over the engine: a positioned member is told when the broker was replaced."""

    class Raw:
        def publication(self, channel: str, publication: Publication, epoch: str) -> bytes:
            return publication.data

        def join(self, channel: str, info: ClientInfo) -> bytes:
            return b""

        leave = join

    class Member(WholeFrames):
        form, positioned, announced, losses = Raw(), True, False, 0
        delta, filter, priority = False, None, "normal"

        def __init__(self) -> None:
            self.frames: list[bytes] = []
            self.deliver = self.frames.append

        def on_gap(self) -> None:
            self.losses += 1

    hub, member, again = Hub(obey=lambda order: None), Member(), Member()
    hub.engine = engine = broker_engine(hub, SETTINGS)
    first = await brokers()
    await first.link(0, engine)
    await hub.subscribe("c", member)
    assert hub.activate("c", member, (await engine.ask(GetHistory("c", KEEP))).position)
    await engine.ask(Publish("c", b"1", KEEP))
    await first.kill()
    second = await brokers()
    await second.link(0, engine)
    assert (member.losses, hub.subscriptions) == (1, 0)
    await hub.subscribe("c", again)
    await engine.ask(Publish("c", b"2", KEEP))
    page = await engine.ask(GetHistory("c", KEEP))
    assert hub.activate("c", again, page.position)
    await engine.ask(Publish("c", b"3", KEEP))
    assert (member.frames, again.frames) == ([b"1"], [b"3"])
    engine.close()


# The broker is slow


async def test_a_stopped_broker_is_not_waited_for(brokers: Any, workers: Any) -> None:
    settings = EngineSettings(publish_timeout=0.2)
    broker, worker = await brokers(settings), workers(0, settings)
    await broker.link(0, worker.engine)
    await worker.engine.ask(Subscribe("c"))
    broker.signal(signal.SIGSTOP)
    publishing = Deferred.fromCoroutine(worker.publish("c", b"late"))
    entering = worker.engine.ask(AddPresence("c", ALICE, present=True, announce=False))
    assert "in time" in await failure_of(publishing)
    await failure_of(entering)
    assert worker.count("realtime_engine_timeouts") == 2
    assert worker.lost_links == 0
    broker.signal(signal.SIGCONT)
    # What came too late has its place in the order all the same, except for the client that was told it is not there.
    await until(lambda: ("published", "c", b"late", 1) in worker.entries)
    assert (await worker.publish()).offset == 2
    assert await worker.engine.ask(GetPresence("c")) == {}


async def test_a_client_admitted_too_late_is_not_counted(brokers: Any, workers: Any) -> None:
    settings = EngineSettings(publish_timeout=0.2)
    broker, worker = await brokers(settings), workers(0, settings)
    await broker.link(0, worker.engine)
    broker.signal(signal.SIGSTOP)
    await failure_of(worker.engine.ask(AdmitClient(ALICE, 1)))
    broker.signal(signal.SIGCONT)
    assert await worker.engine.ask(AdmitClient(ALICE, 1))


async def test_a_new_broker_counts_the_admitted(brokers: Any, workers: Any) -> None:
    worker, first = workers(), await brokers()
    await first.link(0, worker.engine)
    assert await worker.engine.ask(AdmitClient(ALICE, 1))
    await first.kill()
    await until(lambda: worker.lost_links == 1)
    second = await brokers()
    await second.link(0, worker.engine)
    assert not await worker.engine.ask(AdmitClient(ClientInfo("alice", "client-c"), 1))
    assert (await worker.engine.ask(GetStats())).clients == 1


async def test_without_a_broker_requests_end_too(workers: Any) -> None:
    worker = workers(0, EngineSettings(publish_timeout=0.05))
    assert "in time" in await failure_of(Deferred.fromCoroutine(worker.publish()))
    assert worker.count("realtime_engine_waiting") == 0


async def test_what_waits_for_a_broker_is_bounded(workers: Any) -> None:
    worker = workers(0, EngineSettings(publish_timeout=30.0, queue_max_size=10_000))
    waiting = [Deferred.fromCoroutine(worker.publish("c", b"x" * 1000)) for _ in range(9)]
    assert "too much" in await failure_of(Deferred.fromCoroutine(worker.publish("c", b"x" * 1000)))
    worker.engine.close()
    for each in waiting:
        assert "leaving" in await failure_of(each)


async def test_what_waited_too_long_makes_room(workers: Any) -> None:
    worker = workers(0, EngineSettings(publish_timeout=0.02, queue_max_size=2_000))
    for _ in range(5):
        assert "in time" in await failure_of(Deferred.fromCoroutine(worker.publish("c", b"x" * 1000)))


async def test_a_worker_far_ahead_of_its_broker_gives_the_stream_up(brokers: Any, workers: Any) -> None:
    broker, worker = await brokers(), workers()
    await broker.link(0, worker.engine)
    broker.signal(signal.SIGSTOP)
    waiting = [Deferred.fromCoroutine(worker.publish("c", b"x" * 100_000)) for _ in range(40)]
    await until(lambda: worker.lost_links == 1)
    for each in waiting:
        await each.addErrback(lambda failure: failure.trap(EngineUnavailable))
    assert worker.count("realtime_engine_waiting") == 0


# A worker is gone, or slow


async def test_when_a_stream_ends_its_clients_leave(brokers: Any, workers: Any) -> None:
    broker, gone, stays = await brokers(), workers(0), workers(1)
    for worker in (gone, stays):
        await broker.link(worker.slot, worker.engine)
    await stays.engine.ask(Subscribe("c"))
    gone.engine.tell(AddClient(ALICE))
    await gone.engine.ask(AddPresence("c", ALICE, present=True, announce=True))
    gone.engine.close()
    await until(lambda: stays.entries == [("joined", "c", ALICE), ("left", "c", ALICE)])
    assert await stays.engine.ask(GetPresence("c")) == {}
    assert (await stays.engine.ask(GetStats())).clients == 0


async def test_clients_that_come_back_to_the_same_broker_join_again(brokers: Any, workers: Any) -> None:
    broker, returning, witness = await brokers(), workers(0), workers(1)
    for worker in (returning, witness):
        await broker.link(worker.slot, worker.engine)
    await witness.engine.ask(Subscribe("c"))
    await returning.engine.ask(Subscribe("c"))
    await returning.engine.ask(AddPresence("c", ALICE, present=True, announce=True))
    await broker.link(returning.slot, returning.engine)
    assert returning.entries[-1] == ("interrupted",)
    await until(lambda: len(witness.entries) == 3)
    assert [entry[0] for entry in witness.entries] == ["joined", "left", "joined"]
    assert await witness.engine.ask(GetPresence("c")) == {"client-a": ALICE}
    position = await witness.publish("c", b"1")
    await returning.engine.ask(GetStats())
    assert returning.entries[-1] == ("published", "c", b"1", position.offset)


async def test_a_second_stream_of_a_slot_ends_the_first(brokers: Any, workers: Any) -> None:
    broker, worker = await brokers(), workers()
    with socket.socket(fileno=await broker.stream(0)) as before:
        before.sendall(
            broker_messages.pack(broker_messages.Hello(broker_messages.VERSION, ""))
            + broker_messages.pack(AddPresence("c", ALICE, True, False), 1)
        )
        await until(lambda: _readable(before))
        answers = broker_messages.pack(
            broker_messages.Welcome(broker_messages.VERSION, "x" * 8)
        ) + broker_messages.pack(None, 1)
        assert len(before.recv(len(answers), socket.MSG_WAITALL)) == len(answers)
        await broker.link(0, worker.engine)
        assert await worker.engine.ask(GetPresence("c")) == {}
        await until(lambda: _readable(before))
        assert before.recv(1) == b""
    await worker.publish()


def _readable(stream: socket.socket) -> bool:
    return bool(select.select([stream], [], [], 0)[0])


async def test_a_replaced_stream_fails_what_waited_on_it(brokers: Any, workers: Any) -> None:
    broker, worker = await brokers(), workers()
    await broker.link(0, worker.engine)
    broker.signal(signal.SIGSTOP)
    waiting = Deferred.fromCoroutine(worker.publish())
    ours, theirs = socket.socketpair()
    worker.engine.attach(ours.detach())
    assert "lost" in await failure_of(waiting)
    theirs.close()
    await until(lambda: worker.lost_links == 1)


async def test_who_is_present_stays_when_a_change_is_not_answered(brokers: Any, workers: Any) -> None:
    broker, worker = await brokers(), workers(settings=EngineSettings(publish_timeout=0.2))
    await broker.link(0, worker.engine)
    await worker.engine.ask(AddPresence("c", ALICE, present=True, announce=True))
    renamed = ClientInfo(ALICE.user, ALICE.client, b'"renamed"')
    broker.signal(signal.SIGSTOP)
    with pytest.raises(EngineUnavailable):
        await worker.engine.ask(AddPresence("c", renamed, present=True, announce=True))
    broker.signal(signal.SIGCONT)
    await until(lambda: worker.count("realtime_engine_waiting") == 0)
    assert await worker.engine.ask(GetPresence("c")) == {ALICE.client: renamed}


async def test_a_worker_that_does_not_read_is_cut_off(brokers: Any, workers: Any) -> None:
    broker, publisher = await brokers(), workers(1)
    await broker.link(1, publisher.engine)
    with socket.socket(fileno=await broker.stream(0)) as stuck:
        stuck.setblocking(True)
        stuck.sendall(broker_messages.pack(broker_messages.Hello(broker_messages.VERSION, "")))
        stuck.sendall(broker_messages.pack(Subscribe("c"), 1))
        stuck.sendall(broker_messages.pack(AddPresence("c", ALICE, True, False), 2))
        while (await publisher.engine.ask(GetPresence("c"))) == {}:
            pass
        while await publisher.engine.ask(GetPresence("c")):
            await publisher.publish("c", b"x" * 50_000, HistoryOptions())
    series = await broker.series()
    assert series["realtime_broker_cut_links"] == 1
    assert series["realtime_broker_backlog_bytes"] == 0
    assert series["realtime_broker_channels"] == 0
    assert (await publisher.publish()).offset == 1


async def test_a_slow_worker_within_the_limit_gets_everything(brokers: Any, workers: Any) -> None:
    """The queue is written piece by piece, as the worker reads."""
    settings = EngineSettings(queue_max_size=32_000_000)
    broker, publisher = await brokers(settings), workers(1, settings)
    await broker.link(1, publisher.engine)
    with socket.socket(fileno=await broker.stream(0)) as slow:
        slow.sendall(
            broker_messages.pack(broker_messages.Hello(broker_messages.VERSION, ""))
            + broker_messages.pack(Subscribe("c"), 1)
        )
        while (await publisher.engine.ask(GetStats())).channels == 0:
            pass
        for number in range(200):
            await publisher.publish("c", b"%d" % number + b"x" * 50_000)
        reader, offsets = broker_messages.FrameReader(), list[int]()
        decode = broker_messages.message_decoder(broker_messages.TO_WORKER)
        slow.settimeout(0)
        while len(offsets) < 200:
            await publisher.engine.ask(GetStats())
            try:
                received = [decode(body) for number, body in reader.feed(slow.recv(1_000_000)) if not number]
            except BlockingIOError:
                continue
            offsets += [each.publication.offset for each in received if isinstance(each, broker_messages.Published)]
    assert offsets == list(range(1, 201))


@pytest.mark.parametrize(
    "junk",
    [
        b"\xff" * 12,
        b"\x00\x00\x00\x01" + bytes(8) + b"\xc1",
        broker_messages.pack(Subscribe("c"), 1),
        broker_messages.pack(broker_messages.Hello(broker_messages.VERSION, "")) * 2,
        broker_messages.pack(broker_messages.Hello(broker_messages.VERSION + 1, "")),
        broker_messages.pack(broker_messages.Hello(broker_messages.VERSION, ""))
        + broker_messages.pack(broker_messages.Published("c", Publication(b""), "")),
    ],
    ids=["length", "body", "no greeting", "two greetings", "version", "wrong way"],
)
async def test_a_stream_that_makes_no_sense_is_ended(brokers: Any, workers: Any, junk: bytes) -> None:
    broker, bystander = await brokers(), workers(1)
    await broker.link(1, bystander.engine)
    ended: list[bytes] = []
    with socket.socket(fileno=await broker.stream(0)) as stream:
        stream.sendall(junk)
        stream.settimeout(0)
        while not ended or ended[-1]:
            await bystander.publish()
            try:
                ended.append(stream.recv(65536))
            except BlockingIOError:
                continue
            except ConnectionResetError:
                break
    assert (await broker.series())["realtime_broker_cut_links"] == 1
    assert bystander.lost_links == 0


async def test_a_broker_that_makes_no_sense_is_left(workers: Any) -> None:
    worker = workers()
    ours, theirs = socket.socketpair()
    worker.engine.attach(ours.detach())
    waiting = Deferred.fromCoroutine(worker.publish())
    theirs.sendall(broker_messages.pack(broker_messages.Welcome(broker_messages.VERSION + 1, "")))
    assert "lost" in await failure_of(waiting)
    await until(lambda: worker.lost_links == 1)
    theirs.close()


@pytest.mark.parametrize("cut", range(0, 46, 5))
async def test_a_stream_may_end_at_any_byte_of_an_answer(workers: Any, cut: int) -> None:
    worker = workers()
    ours, theirs = socket.socketpair()
    worker.engine.attach(ours.detach())
    waiting = Deferred.fromCoroutine(worker.publish())
    answer = broker_messages.pack(broker_messages.Welcome(broker_messages.VERSION, "instance")) + broker_messages.pack(
        Position(1, "e" * 20), 1
    )
    assert cut < len(answer)
    theirs.sendall(answer[:cut])
    theirs.close()
    assert "lost" in await failure_of(waiting)
    await until(lambda: worker.lost_links == 1)


# Sizes


async def test_what_does_not_fit_into_a_frame_is_refused(brokers: Any, workers: Any) -> None:
    settings = EngineSettings()
    broker, worker = await brokers(settings), workers(0, settings)
    await broker.link(0, worker.engine)
    with pytest.raises(ClientError) as error:
        await worker.publish("c", b"x" * broker_messages.FRAME_LIMIT)
    assert error.value.code == 106
    await worker.engine.ask(Subscribe("c"))
    await worker.publish("c", b"x" * (broker_messages.FRAME_LIMIT - 2000))
    page = await worker.engine.ask(GetHistory("c", KEEP, limit=-1))
    assert len(page.publications[0].data) == len(worker.entries[0][2]) == broker_messages.FRAME_LIMIT - 2000


async def test_a_history_longer_than_a_frame_comes_in_pages(brokers: Any, workers: Any) -> None:
    settings = EngineSettings()
    broker, worker = await brokers(settings), workers(0, settings)
    await broker.link(0, worker.engine)
    for _ in range(30):
        top = await worker.publish("c", b"x" * 1_000_000)
    offsets: list[int] = []
    since: Position | None = None
    while len(offsets) < 30:
        page = await worker.engine.ask(GetHistory("c", KEEP, limit=-1, since=since))
        assert page.position == top
        offsets += [publication.offset for publication in page.publications]
        since = Position(offsets[-1], top.epoch)
    assert offsets == list(range(1, 31))


async def test_many_long_answers_at_a_time_are_written_as_they_are_read(brokers: Any, workers: Any) -> None:
    """Clients that come back all at once ask for much more than may wait for a worker."""
    broker, worker = await brokers(), workers()
    await broker.link(0, worker.engine)
    top = await worker.publish("c", b"x" * 400_000)
    asking = [worker.engine.ask(GetHistory("c", KEEP, limit=-1)) for _ in range(50)]
    asking.append(Deferred.fromCoroutine(worker.publish("c", b"after them")))
    pages = [await each for each in asking]
    assert [page.position for page in pages[:-1]] == [top] * 50
    assert pages[-1].offset == 2
    assert worker.lost_links == 0
    assert (await broker.series())["realtime_broker_backlog_bytes"] == 0


async def test_an_answer_that_does_not_fit_is_an_error(brokers: Any, workers: Any) -> None:
    settings = EngineSettings()
    broker, worker = await brokers(settings), workers(0, settings)
    await broker.link(0, worker.engine)
    for number in range(9):
        info = ClientInfo("user", f"client-{number}", b"x" * 2_000_000)
        await worker.engine.ask(AddPresence("c", info, present=True, announce=False))
    with pytest.raises(ClientError) as error:
        await worker.engine.ask(GetPresence("c"))
    assert error.value.code == 106
    assert await worker.engine.ask(GetPresenceStats("c")) == (9, 1)


async def test_all_that_a_worker_holds_is_restored_whatever_its_size(brokers: Any, workers: Any) -> None:
    settings = EngineSettings()
    worker, first = workers(0, settings), await brokers(settings)
    await first.link(0, worker.engine)
    names = [f"channel{number}" for number in range(10_000)]
    await DeferredList([worker.engine.ask(Subscribe(name)) for name in names])
    for number in range(10_000):
        worker.engine.tell(AddClient(ClientInfo(f"user{number}", f"client{number}")))
    for number in range(20):
        info = ClientInfo("user", f"client{number}", b"x" * 2_000_000)
        await worker.engine.ask(AddPresence(f"large{number}", info, present=True, announce=False))
    await first.link(0, worker.engine)
    census = await worker.engine.ask(GetStats())
    assert (census.clients, census.users, census.channels) == (10_000, 10_000, 10_000)
    for number in range(20):
        assert await worker.engine.ask(GetPresenceStats(f"large{number}")) == (1, 1)


# Counting


async def test_the_broker_counts(brokers: Any, workers: Any) -> None:
    broker, worker, other = await brokers(), workers(0), workers(1)
    for each in (worker, other):
        await broker.link(each.slot, each.engine)
        await each.engine.ask(Subscribe("c"))
    for _ in range(3):
        await worker.publish()
    series = await broker.series()
    assert series["realtime_broker_publications"] == 3
    assert series["realtime_broker_routed"] == 6
    assert series["realtime_broker_requests"] == 5
    assert series["realtime_broker_channels"] == 1
    assert series["realtime_broker_streams"] == 1
    assert series["realtime_broker_cut_links"] == 0
    assert worker.count("realtime_engine_requests") == 4


async def test_an_engine_that_was_closed_takes_nothing_more(brokers: Any, workers: Any) -> None:
    broker, worker = await brokers(), workers()
    await broker.link(0, worker.engine)
    waiting = Deferred.fromCoroutine(worker.publish())
    worker.engine.close()
    assert "leaving" in await failure_of(waiting)
    assert "leaving" in await failure_of(Deferred.fromCoroutine(worker.publish()))
    stream = await broker.stream(0)
    worker.engine.attach(stream)
    with pytest.raises(OSError):
        os.fstat(stream)
    assert worker.lost_links == 0


def test_the_sweep_frees_what_is_over() -> None:
    clock = Clock()
    broker = Broker(SETTINGS, Metrics(), clock)
    assert not broker.core.has_expirable()
    broker.core.carry_out(PEER, broker.now(), Publish("c", b"1", HistoryOptions(1, 1.0, meta_ttl=10.0)))
    assert broker.core.streams == 1
    for _ in range(4 * 80):
        assert broker.core.has_expirable()
        clock.advance(0.25)
        broker.sweep()
        if not broker.core.streams:
            break
    assert not broker.core.has_expirable()


def test_much_that_is_over_at_once_is_freed_in_slices_between_which_the_loop_turns() -> None:
    clock = Clock()
    broker = Broker(SETTINGS, Metrics(), clock)
    for number in range(25_000):
        broker.core.carry_out(PEER, broker.now(), Publish(str(number), b"1", HistoryOptions(1, 1.0, meta_ttl=10.0)))
    clock.advance(1000.0)
    left = [broker.core.streams]
    broker.sweep()
    left.append(broker.core.streams)
    while left[-1]:
        clock.advance(0.01)
        left.append(broker.core.streams)
    assert len(left) == 26
    assert {before - after for before, after in itertools.pairwise(left)} == {1000}


def test_an_engine_needs_no_stream_for_what_never_fails() -> None:
    engine = BrokerEngine(Worker(), SETTINGS, Metrics(), Clock(), lambda: None)
    for notice in (AddClient(ALICE), RemoveClient(ALICE.client), Unsubscribe("c"), ReportSubscriptions(3)):
        engine.tell(notice)
