"""The broker process: ended streams, workers that do not read, invalid input, and sweeps."""

from __future__ import annotations

import itertools
import os
import select
import signal
import socket
import subprocess
import time
from contextlib import suppress
from typing import Any

import pytest
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock, deferLater

from realtime.broker.process import Broker
from realtime.config.settings import EngineSettings
from realtime.errors import ClientError
from realtime.metrics import Metrics
from realtime.pubsub import broker_messages
from realtime.pubsub.engine import (
    AddClient,
    AddPresence,
    GetHistory,
    GetPresence,
    GetPresenceStats,
    GetStats,
    Publish,
    RemovePresence,
    Subscribe,
    TakeLostClients,
)
from realtime.types import ClientInfo, HistoryOptions, Position, Publication
from tests.broker import workers as fixtures
from tests.broker.workers import ALICE, KEEP, SETTINGS
from tests.system.brokers import until

brokers, workers = fixtures.brokers, fixtures.workers

BOB = ClientInfo("bob", "client-b")
PEER: Any = None  # publishing ignores the peer


# Streams of workers


async def test_the_clients_of_an_ended_stream_leave(brokers: Any, workers: Any) -> None:
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


async def test_the_clients_of_a_cut_stream_that_return_neither_leave_nor_join(brokers: Any, workers: Any) -> None:
    broker, returning, witness = await brokers(), workers(0), workers(1)
    for worker in (returning, witness):
        await broker.link(worker.slot, worker.engine)
    await witness.engine.ask(Subscribe("c"))
    await returning.engine.ask(Subscribe("c"))
    await returning.engine.ask(AddPresence("c", ALICE, present=True, announce=True))
    returning.engine.tell(AddClient(ALICE))
    await broker.link(returning.slot, returning.engine)
    assert await returning.engine.ask(GetPresence("c")) == {"client-a": ALICE}
    await returning.engine.ask(AddPresence("c", BOB, present=True, announce=True))
    await returning.engine.ask(RemovePresence("c", "client-a"))
    await until(lambda: len(witness.entries) == 3)
    assert witness.entries == [("joined", "c", ALICE), ("joined", "c", BOB), ("left", "c", ALICE)]
    assert await witness.engine.ask(GetPresence("c")) == {"client-b": BOB}
    assert (await witness.engine.ask(GetStats())).clients == 1
    position = await witness.publish("c", b"1")
    await returning.engine.ask(GetStats())
    assert returning.entries[-1] == ("published", "c", b"1", position.offset)
    await witness.engine.ask(GetStats())
    assert returning.entries == witness.entries


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


async def test_the_clients_of_a_dead_worker_are_there_for_the_next_one_at_once(brokers: Any) -> None:
    """The end of its stream and the request of the next worker are on their way at the same time."""
    broker = await brokers()
    before, following = socket.socket(fileno=await broker.stream(0)), socket.socket(fileno=await broker.stream(0))
    with subprocess.Popen(["true"]) as dead:
        pass
    for message in (broker_messages.Hello(broker_messages.VERSION, "", True, pid=dead.pid), AddClient(ALICE)):
        before.sendall(broker_messages.pack(message))
    await until(lambda: _readable(before))
    welcome = before.recv(65536)
    broker.signal(signal.SIGSTOP)
    hello = broker_messages.pack(broker_messages.Hello(broker_messages.VERSION, "", True, 1))
    following.sendall(hello + broker_messages.pack(TakeLostClients(10), 1))
    before.close()
    broker.signal(signal.SIGCONT)
    answer = broker_messages.pack([ClientInfo(ALICE.user, ALICE.client)], 1)
    with following:
        await until(lambda: _readable(following))
        assert following.recv(len(welcome + answer), socket.MSG_WAITALL) == welcome + answer


async def test_a_worker_learns_that_the_one_which_hands_over_to_it_has_died(brokers: Any) -> None:
    broker = await brokers()
    before, following = socket.socket(fileno=await broker.stream(0)), socket.socket(fileno=await broker.stream(0))
    with before, following:
        for generation, stream in enumerate((before, following)):
            hello = broker_messages.Hello(broker_messages.VERSION, "", True, generation, pid=os.getpid())
            stream.sendall(broker_messages.pack(hello))
            await until(lambda stream=stream: _readable(stream))
            stream.recv(65536)
        before.sendall(broker_messages.pack(AddClient(ALICE)))
        before.shutdown(socket.SHUT_WR)
        await until(lambda: _readable(following))
        assert following.recv(65536) == broker_messages.pack(broker_messages.ClientsLost())
        following.sendall(broker_messages.pack(TakeLostClients(10), 1))
        await until(lambda: _readable(following))
        assert following.recv(65536) == broker_messages.pack([ClientInfo(ALICE.user, ALICE.client)], 1)


def _readable(stream: socket.socket) -> bool:
    return bool(select.select([stream], [], [], 0)[0])


async def test_a_worker_that_does_not_read_is_cut(brokers: Any, workers: Any) -> None:
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
    """The queue is written in pieces, as the worker reads."""
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


async def test_a_worker_receives_its_own_publication_and_the_answer_in_one_frame(brokers: Any, workers: Any) -> None:
    broker, other = await brokers(), workers(1)
    await broker.link(1, other.engine)
    await other.engine.ask(Subscribe("c"))
    with socket.socket(fileno=await broker.stream(0)) as stream:
        requests = [Subscribe("c"), Publish("c", b"1", KEEP), Publish("d", b"2", KEEP)]
        stream.sendall(
            broker_messages.pack(broker_messages.Hello(broker_messages.VERSION, ""))
            + b"".join(broker_messages.pack(request, number) for number, request in enumerate(requests, 1))
        )
        reader, frames = broker_messages.FrameReader(), list[tuple[int, bytes]]()
        stream.settimeout(0)
        while not frames or frames[-1][0] != 3:
            await other.engine.ask(GetStats())
            with suppress(BlockingIOError):
                frames += reader.feed(stream.recv(65536))
    welcome, subscribed, (number, body), answer = frames
    assert (welcome[0], subscribed[0], number, answer[0]) == (0, 1, 2 | broker_messages.ANSWERS, 3)
    published = broker_messages.message_decoder(broker_messages.TO_WORKER)(body)
    assert (published.channel, published.publication.offset) == ("c", 1)
    assert other.entries == [("published", "c", b"1", 1)]


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
async def test_an_invalid_stream_of_a_worker_is_cut(brokers: Any, workers: Any, junk: bytes) -> None:
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


# Sizes


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


async def test_many_long_answers_wait_for_the_reader(brokers: Any, workers: Any) -> None:
    """Clients that reconnect all at once ask for much more than the queue of a worker may hold."""
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


async def test_an_answer_longer_than_a_frame_is_an_error(brokers: Any, workers: Any) -> None:
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


# Counting and sweeping


async def test_the_broker_counts_publications_and_requests(brokers: Any, workers: Any) -> None:
    broker, worker, other = await brokers(), workers(0), workers(1)
    for each in (worker, other):
        await broker.link(each.slot, each.engine)
        await each.engine.ask(Subscribe("c"))
    for _ in range(3):
        await worker.publish()
    series = await broker.series()
    assert series["realtime_broker_publications"] == 3
    assert series["realtime_broker_deliveries"] == 6
    assert series["realtime_broker_requests"] == 5
    assert series["realtime_broker_channels"] == 1
    assert series["realtime_broker_streams"] == 1
    assert series["realtime_broker_cut_links"] == 0
    assert worker.count("realtime_engine_requests") == 4


def test_the_sweep_frees_expired_history() -> None:
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


def test_much_expired_history_is_freed_in_slices() -> None:
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


# A restart of the broker


async def test_publications_that_waited_reach_the_subscribers_of_all_workers(brokers: Any, workers: Any) -> None:
    """The first worker restores and publishes before the others have restored their subscriptions."""
    first, pair = await brokers(workers=2), [workers(0), workers(1)]
    for worker in pair:
        await first.link(worker.slot, worker.engine)
        await worker.engine.ask(Subscribe("c"))
    await first.kill()
    await until(lambda: all(worker.lost_links for worker in pair))
    waiting = [pair[0].publish("c", b"%d" % number, HistoryOptions()) for number in range(3)]
    deferred = [Deferred.fromCoroutine(one) for one in waiting]
    second = await brokers(workers=2)
    await second.link(0, pair[0].engine)
    await deferLater(reactor, 0.1)
    assert not any(one.called for one in deferred)
    await second.link(1, pair[1].engine)
    for one in deferred:
        await one
    await pair[1].engine.ask(GetStats())
    for worker in pair:
        assert [entry[2] for entry in worker.entries if entry[0] == "published"] == [b"0", b"1", b"2"]
    # From now on nothing is held.
    await second.link(0, pair[0].engine)
    await pair[0].publish("c", b"3", HistoryOptions())


async def test_a_worker_that_does_not_return_holds_nothing_for_long(brokers: Any, workers: Any) -> None:
    first, pair = await brokers(workers=2), [workers(0), workers(1)]
    for worker in pair:
        await first.link(worker.slot, worker.engine)
        await worker.engine.ask(GetStats())
    await first.kill()
    await until(lambda: all(worker.lost_links for worker in pair))
    lost = Deferred.fromCoroutine(pair[0].publish("c", b"1", HistoryOptions()))
    kept = Deferred.fromCoroutine(pair[0].publish("c", b"2", KEEP))
    second = await brokers(workers=2)
    await second.link(0, pair[0].engine)
    await lost
    assert (await kept).offset == 1
    assert (await second.samples("realtime_messages_dropped"))["restart"] == 1


async def test_the_first_workers_of_a_server_wait_for_nobody(brokers: Any, workers: Any) -> None:
    broker, worker = await brokers(workers=2), workers(0)
    await broker.link(0, worker.engine)
    began = reactor.seconds()
    await worker.publish()
    assert reactor.seconds() - began < 0.9


async def test_deliveries_of_a_cut_link_are_counted(brokers: Any, workers: Any) -> None:
    broker, busy = await brokers(EngineSettings(queue_max_size=200_000)), workers(1)
    await broker.link(1, busy.engine)
    with socket.socket(fileno=await broker.stream(0)) as stuck:
        stuck.sendall(broker_messages.pack(broker_messages.Hello(broker_messages.VERSION, "")))
        stuck.sendall(broker_messages.pack(Subscribe("c"), 1))
        await until(lambda: _readable(stuck))
        while not (await broker.series())["realtime_broker_cut_links"]:
            await busy.publish("c", b"x" * 20_000, HistoryOptions())
    assert (await broker.samples("realtime_messages_dropped"))["link"] >= 5


async def test_the_memory_of_a_peak_is_given_back(brokers: Any, workers: Any) -> None:
    broker, worker = await brokers(), workers()
    await broker.link(0, worker.engine)
    for number in range(40_000):
        info = ClientInfo("user", f"client-{number}", bytes(600))
        added = worker.engine.ask(AddPresence(f"channel-{number % 100}", info, present=True, announce=False))
        if number % 500 == 499:
            await added
    peak, reached = broker.resident_memory, time.monotonic()
    await until(lambda: broker.last_beat > reached)  # a beat notes the peak
    worker.engine.close()
    while not (await broker.series())["realtime_heap_trims"]:
        await deferLater(reactor, 0.1)  # type: ignore[arg-type]
    assert broker.resident_memory < peak - 15e6
