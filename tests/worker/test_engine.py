"""The engine of a worker: broken streams, slow and restarted brokers, and the limits of waiting requests."""

from __future__ import annotations

import os
import signal
import socket
from typing import Any

import pytest
from twisted.internet import reactor
from twisted.internet.defer import Deferred, DeferredList
from twisted.internet.task import Clock, deferLater

from realtime.config.settings import EngineSettings
from realtime.errors import ClientError, EngineUnavailable
from realtime.metrics import Metrics
from realtime.pubsub import broker_messages
from realtime.pubsub.engine import (
    AddClient,
    AddPresence,
    AdmitClient,
    Cut,
    GetHistory,
    GetPresence,
    GetPresenceStats,
    GetStats,
    Publish,
    RemoveClient,
    RemovePresence,
    ReportSubscriptions,
    SendOrder,
    Subscribe,
    Unsubscribe,
    worker_address,
)
from realtime.pubsub.hub import Hub
from realtime.types import ClientInfo, EngineStats, Position, Publication
from realtime.worker.engine import BrokerEngine
from tests.broker import workers as fixtures
from tests.broker.workers import ALICE, BOB, KEEP, SETTINGS, Worker, failure_of
from tests.pubsub.sinks import WholeFrames
from tests.system.brokers import broker_engine, until

brokers, workers = fixtures.brokers, fixtures.workers


# Restarted brokers


async def test_requests_to_a_killed_broker_fail(brokers: Any, workers: Any) -> None:
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
    assert worker.count("realtime_engine_pending_requests") == 0


async def test_a_new_broker_gets_the_state_of_a_worker(brokers: Any, workers: Any) -> None:
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
    await until(lambda: worker.entries == [("interrupted",)])
    await second.link(other.slot, other.engine)
    assert await other.engine.ask(GetPresence("c")) == {"client-a": ALICE}
    assert await other.engine.ask(GetStats()) == EngineStats(clients=1, users=1, channels=1, subscriptions=4)
    after = await other.publish("c", b"2")
    await other.publish("given up", b"3")
    assert after.offset == 1
    assert after.epoch != before.epoch
    await worker.engine.ask(GetStats())
    # The subscribers never received the leave of the first broker's end, so they receive no join.
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


async def test_a_client_that_left_before_the_first_stream_is_not_present(brokers: Any, workers: Any) -> None:
    worker = workers(0, EngineSettings(publish_timeout=30.0, queue_max_size=10_000))
    client = "x" * 2000
    entered = worker.engine.ask(AddPresence("c", ClientInfo("", client), present=True, announce=True))
    filling = Deferred.fromCoroutine(worker.publish("c", b"x" * 6500))
    assert "queue for the next one is full" in await failure_of(worker.engine.ask(RemovePresence("c", client)))
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


async def test_a_replaced_broker_is_a_gap_for_positioned_subscribers(brokers: Any) -> None:
    """Run a hub over the engine: a positioned subscriber gets a gap when the broker is replaced."""

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

    hub, member, again = Hub(lambda hub: broker_engine(hub, SETTINGS), lambda order: None), Member(), Member()
    engine = hub.engine
    assert isinstance(engine, BrokerEngine)
    first = await brokers()
    await first.link(0, engine)
    await hub.subscribe("c", member)
    assert hub.activate("c", member, (await engine.ask(GetHistory("c", KEEP))).position)
    await engine.ask(Publish("c", b"1", KEEP))
    await first.kill()
    second = await brokers()
    await second.link(0, engine)
    await until(lambda: (member.losses, hub.subscriptions) == (1, 0))
    await hub.subscribe("c", again)
    await engine.ask(Publish("c", b"2", KEEP))
    page = await engine.ask(GetHistory("c", KEEP))
    assert hub.activate("c", again, page.position)
    await engine.ask(Publish("c", b"3", KEEP))
    assert (member.frames, again.frames) == ([b"1"], [b"3"])
    engine.close()


# Slow brokers


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
    # The late requests were carried out in order all the same. The engine has then removed the client again.
    await until(lambda: ("published", "c", b"late", 1) in worker.entries)
    assert (await worker.publish()).offset == 2
    assert await worker.engine.ask(GetPresence("c")) == {}


async def test_a_client_whose_admission_timed_out_is_not_counted(brokers: Any, workers: Any) -> None:
    settings = EngineSettings(publish_timeout=0.2)
    broker, worker = await brokers(settings), workers(0, settings)
    await broker.link(0, worker.engine)
    broker.signal(signal.SIGSTOP)
    await failure_of(worker.engine.ask(AdmitClient(ALICE, 1)))
    broker.signal(signal.SIGCONT)
    assert await worker.engine.ask(AdmitClient(ALICE, 1))


async def test_a_new_broker_counts_admitted_clients(brokers: Any, workers: Any) -> None:
    worker, first = workers(), await brokers()
    await first.link(0, worker.engine)
    assert await worker.engine.ask(AdmitClient(ALICE, 1))
    await first.kill()
    await until(lambda: worker.lost_links == 1)
    second = await brokers()
    await second.link(0, worker.engine)
    assert not await worker.engine.ask(AdmitClient(ClientInfo("alice", "client-c"), 1))
    assert (await worker.engine.ask(GetStats())).clients == 1


async def test_requests_without_a_broker_time_out(workers: Any) -> None:
    worker = workers(0, EngineSettings(publish_timeout=0.05))
    assert "in time" in await failure_of(Deferred.fromCoroutine(worker.publish()))
    assert worker.count("realtime_engine_pending_requests") == 0


async def test_requests_that_wait_for_a_broker_are_limited(workers: Any) -> None:
    worker = workers(0, EngineSettings(publish_timeout=30.0, queue_max_size=10_000))
    waiting = [Deferred.fromCoroutine(worker.publish("c", b"x" * 1000)) for _ in range(9)]
    assert "queue for the next one is full" in await failure_of(
        Deferred.fromCoroutine(worker.publish("c", b"x" * 1000))
    )
    worker.engine.close()
    for each in waiting:
        assert "leaving" in await failure_of(each)


async def test_timed_out_requests_make_room(workers: Any) -> None:
    worker = workers(0, EngineSettings(publish_timeout=0.02, queue_max_size=2_000))
    for _ in range(5):
        assert "in time" in await failure_of(Deferred.fromCoroutine(worker.publish("c", b"x" * 1000)))


async def test_a_worker_far_ahead_of_its_broker_cuts_the_stream(brokers: Any, workers: Any) -> None:
    broker, worker = await brokers(), workers()
    await broker.link(0, worker.engine)
    broker.signal(signal.SIGSTOP)
    waiting = [Deferred.fromCoroutine(worker.publish("c", b"x" * 100_000)) for _ in range(40)]
    await until(lambda: worker.lost_links == 1)
    for each in waiting:
        await each.addErrback(lambda failure: failure.trap(EngineUnavailable))
    assert worker.count("realtime_engine_pending_requests") == 0


# Replaced and broken streams


async def test_requests_on_a_replaced_stream_fail(brokers: Any, workers: Any) -> None:
    broker, worker = await brokers(), workers()
    await broker.link(0, worker.engine)
    broker.signal(signal.SIGSTOP)
    waiting = Deferred.fromCoroutine(worker.publish())
    ours, theirs = socket.socketpair()
    worker.engine.attach(ours.detach())
    assert "lost" in await failure_of(waiting)
    theirs.close()
    await until(lambda: worker.lost_links == 1)


async def test_presence_survives_an_unanswered_change(brokers: Any, workers: Any) -> None:
    broker, worker = await brokers(), workers(settings=EngineSettings(publish_timeout=0.2))
    await broker.link(0, worker.engine)
    await worker.engine.ask(AddPresence("c", ALICE, present=True, announce=True))
    renamed = ClientInfo(ALICE.user, ALICE.client, b'"renamed"')
    broker.signal(signal.SIGSTOP)
    with pytest.raises(EngineUnavailable):
        await worker.engine.ask(AddPresence("c", renamed, present=True, announce=True))
    broker.signal(signal.SIGCONT)
    await until(lambda: worker.count("realtime_engine_pending_requests") == 0)
    assert await worker.engine.ask(GetPresence("c")) == {ALICE.client: renamed}


async def test_an_invalid_stream_of_a_broker_is_cut(workers: Any) -> None:
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


async def test_a_request_longer_than_a_frame_is_refused(brokers: Any, workers: Any) -> None:
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


async def test_the_state_of_a_worker_is_restored_at_any_size(brokers: Any, workers: Any) -> None:
    settings = EngineSettings(publish_timeout=50.0)  # 10,000 requests at once, on a busy machine
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


# Closing


async def test_a_closed_engine_refuses_requests_and_streams(brokers: Any, workers: Any) -> None:
    broker, worker = await brokers(), workers()
    await broker.link(0, worker.engine)
    waiting = Deferred.fromCoroutine(worker.publish())
    worker.engine.close()
    assert "leaving" in await failure_of(waiting)
    assert "leaving" in await failure_of(Deferred.fromCoroutine(worker.publish()))
    outcomes: list[Any] = []
    worker.engine.ask_then(Publish("c", b"1", KEEP), lambda answer, error: outcomes.append((answer, error)))
    assert [(answer, type(error)) for answer, error in outcomes] == [(None, EngineUnavailable)]
    stream = await broker.stream(0)
    worker.engine.attach(stream)
    with pytest.raises(OSError):
        os.fstat(stream)
    assert worker.lost_links == 0


def test_requests_that_change_the_state_of_the_worker_take_no_short_path() -> None:
    engine = BrokerEngine(Worker(), SETTINGS, Metrics(), Clock(), lambda: None)
    with pytest.raises(TypeError, match=r"needs ask\(\)"):
        engine.ask_then(Subscribe("c"), lambda answer, error: None)


def test_notices_need_no_stream() -> None:
    engine = BrokerEngine(Worker(), SETTINGS, Metrics(), Clock(), lambda: None)
    for notice in (AddClient(ALICE), RemoveClient(ALICE.client), Unsubscribe("c"), ReportSubscriptions(3)):
        engine.tell(notice)


# Clients that move to another worker

CUT = Cut("batch", worker_address(0, 1), [ALICE.client], {ALICE.client: "secret"}, {"c": [ALICE.client]})
PRESENCE = AddPresence("c", ALICE, present=True, announce=True)


async def start_move(broker: Any, workers: Any) -> tuple[Worker, Worker, Worker]:
    """Two processes of one slot, the older one with a client, and another worker that sees it come and go."""
    old, new, witness = workers(0), workers(0, generation=1), workers(1)
    for worker in (old, new, witness):
        await broker.link(worker.slot, worker.engine)
        await worker.engine.ask(Subscribe("c"))
    old.engine.tell(AddClient(ALICE))
    await old.engine.ask(PRESENCE)
    for worker in (new, witness):
        await worker.engine.ask(GetStats())
        worker.entries.clear()
    return old, new, witness


async def test_a_cut_is_at_one_point_of_the_deliveries_to_both_workers(brokers: Any, workers: Any) -> None:
    broker = await brokers()
    old, new, witness = await start_move(broker, workers)
    old.entries.clear()
    publications = [Deferred.fromCoroutine(witness.publish("c", b"%d" % number)) for number in range(50)]
    cut = old.engine.ask(CUT).addCallback(lambda answer: old.entries.append(("cut", "batch")))
    publications += [Deferred.fromCoroutine(witness.publish("c", b"%d" % number)) for number in range(50, 100)]
    for waiting in (cut, *publications):
        await waiting
    for worker in (old, new):
        await worker.engine.ask(GetStats())
    assert old.entries == new.entries
    assert len(new.entries) == 101


async def test_a_moved_client_stays_with_its_new_worker(brokers: Any, workers: Any) -> None:
    broker = await brokers()
    old, new, witness = await start_move(broker, workers)
    await old.engine.ask(CUT)
    new.engine.claim("batch", ALICE, "secret", [PRESENCE])
    old.engine.close()
    order = SendOrder(b"order", worker_address(0, 0), "secret")
    assert await witness.engine.ask(order) == 1
    assert await witness.engine.ask(GetPresence("c")) == {"client-a": ALICE}
    assert new.engine.forget_arrivals("batch") == []
    assert witness.entries == []

    await broker.kill()
    second = await brokers()
    for worker in (new, witness):
        await until(lambda worker=worker: worker.lost_links == 1)
        await second.link(worker.slot, worker.engine)
    assert await witness.engine.ask(order) == 1
    assert await witness.engine.ask(GetPresence("c")) == {"client-a": ALICE}
    assert (await witness.engine.ask(GetStats())).clients == 1
    await new.engine.ask(GetStats())
    assert new.entries.count(("order", b"order")) == 2


async def test_the_broker_forgets_a_client_that_does_not_arrive(brokers: Any, workers: Any) -> None:
    broker = await brokers()
    old, new, witness = await start_move(broker, workers)
    await old.engine.ask(CUT)
    await new.engine.ask(GetStats())
    assert new.engine.forget_arrivals("batch") == [ClientInfo("alice", "client-a")]
    await new.engine.ask(GetStats())
    assert await witness.engine.ask(GetPresence("c")) == {}
    assert (await witness.engine.ask(GetStats())).clients == 0
    assert witness.entries == [("left", "c", ALICE)]


async def test_the_new_worker_announces_a_client_after_a_broken_stream(brokers: Any, workers: Any) -> None:
    """Its new stream begins between the cut and the arrival."""
    broker = await brokers()
    old, new, witness = await start_move(broker, workers)
    await old.engine.ask(CUT)
    await new.engine.ask(GetStats())
    await broker.link(new.slot, new.engine)
    new.engine.claim("batch", ALICE, "", [PRESENCE])
    await new.engine.ask(GetStats())
    assert await witness.engine.ask(GetPresence("c")) == {"client-a": ALICE}
    assert (await witness.engine.ask(GetStats())).clients == 1
    assert [entry[0] for entry in witness.entries] == ["left", "joined"]


async def test_the_old_worker_keeps_its_clients_without_an_answer(brokers: Any, workers: Any) -> None:
    """A new stream begins before the answer comes; the broker may have made the cut or not."""
    broker = await brokers()
    old, new, witness = await start_move(broker, workers)
    stream = await broker.stream(old.slot)
    broker.signal(signal.SIGSTOP)
    cut = old.engine.ask(CUT)
    await deferLater(reactor, 0.01)
    old.engine.attach(stream)
    assert await failure_of(cut) == "the broker was lost"
    broker.signal(signal.SIGCONT)
    for worker in (old, new):
        await worker.engine.ask(GetStats())
    new.engine.forget_arrivals("batch")
    for worker in (old, new):
        await worker.engine.ask(GetStats())
    assert await witness.engine.ask(GetPresence("c")) == {"client-a": ALICE}
    assert (await witness.engine.ask(GetStats())).clients == 1
    assert witness.entries[-1:] in ([], [("joined", "c", ALICE)])


async def test_a_cut_that_is_not_answered_in_time_is_undone(brokers: Any, workers: Any) -> None:
    broker = await brokers()
    old, new, witness = workers(0, EngineSettings(publish_timeout=0.2)), workers(0, generation=1), workers(1)
    for worker in (old, new, witness):
        await broker.link(worker.slot, worker.engine)
    await witness.engine.ask(Subscribe("c"))
    old.engine.tell(AddClient(ALICE))
    await old.engine.ask(PRESENCE)
    broker.signal(signal.SIGSTOP)
    assert await failure_of(old.engine.ask(CUT)) == "the broker did not answer in time"
    broker.signal(signal.SIGCONT)
    await until(lambda: ("cut", "batch") in new.entries)
    new.engine.forget_arrivals("batch")
    await new.engine.ask(GetStats())
    assert await witness.engine.ask(GetPresence("c")) == {"client-a": ALICE}
    assert (await witness.engine.ask(GetStats())).clients == 1
    assert witness.entries == [("joined", "c", ALICE)]
