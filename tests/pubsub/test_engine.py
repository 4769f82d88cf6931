"""The contract of an engine: one suite, run over each engine, and tests of several workers on one broker."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable
from typing import Any

import msgspec
import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import Deferred, DeferredList
from twisted.internet.task import deferLater

from realtime.config.settings import EngineSettings, RedisSettings
from realtime.errors import ClientError
from realtime.pubsub.engine import (
    PRESENCE_PAGE,
    AddClient,
    AddPresence,
    AdmitClient,
    Engine,
    GetNodes,
    GetPresence,
    GetPresenceStats,
    GetStats,
    HoldRole,
    Publish,
    RemoveClient,
    RemoveHistory,
    RemovePresence,
    ReportSubscriptions,
    ResignRole,
    SendOrder,
    Subscribe,
    Unsubscribe,
    new_listing,
    worker_address,
)
from realtime.types import ClientInfo, EngineStats, HistoryOptions, HistoryPage, Position, Publication
from realtime.worker.engine import BrokerEngine
from tests.pubsub.benches import KEEP, Bench
from tests.pubsub.memory_engine import MemoryEngine
from tests.redis.deployments import RedisStarter
from tests.system.brokers import LIMIT, POLL, BrokerProcess, broker_engine, until

SETTINGS = EngineSettings(max_channels=50)
ALICE = ClientInfo("alice", "client-a", b'{"name":"Alice"}', b'{"role":"admin"}')
BOB = ClientInfo("bob", "client-b")
ALICE_AGAIN = ClientInfo("alice", "client-c")


async def no_clients(bench: Bench) -> None:
    """Wait until the broker has removed the clients of the previous test. Raises TimeoutError."""

    async def left() -> None:
        while (await bench.engine.ask(GetStats())) != EngineStats():
            await deferLater(reactor, POLL)

    await Deferred.fromCoroutine(left()).addTimeout(LIMIT, reactor)


@pytest_twisted.async_yield_fixture(scope="module")
async def broker() -> AsyncIterator[BrokerProcess]:
    process = BrokerProcess(SETTINGS)
    await process.start()
    yield process
    await process.stop()


@pytest_twisted.async_yield_fixture(scope="module")
async def redis_broker() -> AsyncIterator[BrokerProcess]:
    starter = RedisStarter()
    redis = RedisSettings(address=(starter.standalone().address,))
    process = BrokerProcess(msgspec.structs.replace(SETTINGS, type="redis", redis=redis))
    await process.start()
    yield process
    await process.stop()
    starter.finish()


@pytest_twisted.async_yield_fixture(params=["broker", "redis"])
async def workers(
    request: pytest.FixtureRequest, broker: BrokerProcess, redis_broker: BrokerProcess
) -> AsyncIterator[list[Bench]]:
    """Three workers on one broker."""
    broker = {"broker": broker, "redis": redis_broker}[request.param]
    benches = [Bench(lambda log: broker_engine(log, SETTINGS)) for _ in range(3)]
    for slot, bench in enumerate(benches):
        await broker.link(slot, bench.engine)
    await no_clients(benches[0])
    yield benches
    for bench in benches:
        bench.engine.close()


@pytest_twisted.async_yield_fixture(params=["memory", "broker", "redis"])
async def bench(
    request: pytest.FixtureRequest, broker: BrokerProcess, redis_broker: BrokerProcess
) -> AsyncIterator[Bench]:
    if request.param == "memory":
        yield Bench(lambda log: MemoryEngine(log, SETTINGS, reactor.seconds))
        return
    broker = {"broker": broker, "redis": redis_broker}[request.param]
    bench = Bench(lambda log: broker_engine(log, SETTINGS))
    await broker.link(0, bench.engine)
    await no_clients(bench)
    yield bench
    bench.engine.close()


@pytest.fixture
def channel(request: pytest.FixtureRequest) -> str:
    """A channel name that no other test uses."""
    return request.node.name


async def refusal(action: Awaitable[Any]) -> int:
    """Return the code of the ClientError that an action raises."""
    with pytest.raises(ClientError) as error:
        await action
    return error.value.code


# Publications


async def test_publications_are_numbered_from_one_in_one_epoch(bench: Bench, channel: str) -> None:
    first, second = await bench.publish(channel), await bench.publish(channel)
    assert (first.offset, second.offset) == (1, 2)
    assert first.epoch == second.epoch != ""


async def test_ask_then_keeps_the_order_of_all_requests(bench: Bench, channel: str) -> None:
    offsets: list[int] = []

    def done(position: Any, error: BaseException | None) -> None:
        assert error is None
        offsets.append(position.offset)

    await bench.engine.ask(Subscribe(channel))
    bench.engine.ask_then(Publish(channel, b"1", KEEP), done)
    second = Deferred.fromCoroutine(bench.publish(channel, b"2"))
    bench.engine.ask_then(Publish(channel, b"3", KEEP), done)
    assert (await second).offset == 2
    assert [entry[2] for entry in (await bench.settled()).entries] == [b"1", b"2", b"3"]
    assert offsets == [1, 3]


async def test_subscribed_channels_are_delivered(bench: Bench, channel: str) -> None:
    await bench.publish(channel, b"before")
    await bench.engine.ask(Subscribe(channel))
    position = await bench.publish(channel, b"after")
    await bench.publish("another channel", b"elsewhere")
    assert (await bench.settled()).entries == [("published", channel, b"after", 2, position.epoch)]


async def test_a_publication_carries_its_author_and_tags(bench: Bench, channel: str) -> None:
    await bench.publish(channel, b"1", info=ALICE, tags={"k": "v"})
    page = await bench.history(channel)
    assert page.publications == [Publication(b"1", 1, ALICE, {"k": "v"})]


async def test_data_is_passed_on_byte_for_byte(bench: Bench, channel: str) -> None:
    data = b'{"n": 12345678901234567890,  "n": 1.0, "\xc3\xa9": "\\u0000"}' + b" " * 100_000
    await bench.engine.ask(Subscribe(channel))
    await bench.publish(channel, data)
    assert (await bench.settled()).entries[0][2] == data


async def test_without_history_nothing_is_numbered_or_stored(bench: Bench, channel: str) -> None:
    await bench.engine.ask(Subscribe(channel))
    for history_options in (HistoryOptions(), HistoryOptions(size=10), HistoryOptions(ttl=60.0)):
        assert await bench.publish(channel, b"1", history_options) == Position()
    assert (await bench.settled()).entries == [("published", channel, b"1", 0, "")] * 3
    assert await bench.history(channel, HistoryOptions()) == HistoryPage([], Position())


async def test_unnumbered_publications_leave_the_numbering_alone(bench: Bench, channel: str) -> None:
    await bench.publish(channel)
    await bench.publish(channel, b"aside", HistoryOptions())
    assert (await bench.publish(channel)).offset == 2
    assert [publication.offset for publication in (await bench.history(channel)).publications] == [1, 2]


async def test_nothing_arrives_after_unsubscribe(bench: Bench, channel: str) -> None:
    await bench.engine.ask(Subscribe(channel))
    await bench.engine.ask(Subscribe(channel))
    bench.engine.tell(Unsubscribe(channel))
    bench.engine.tell(Unsubscribe(channel))
    await bench.publish(channel)
    assert (await bench.settled()).entries == []


async def test_an_idempotency_key_publishes_once(bench: Bench, channel: str) -> None:
    await bench.engine.ask(Subscribe(channel))
    first = await bench.publish(channel, b"1", idempotency_key="key")
    await bench.publish(channel, b"2")
    assert await bench.publish(channel, b"1", idempotency_key="key") == first
    assert (await bench.publish(channel + "!", b"1", idempotency_key="key")).offset == 1
    assert [entry[1] for entry in (await bench.settled()).named("published")] == [b"1", b"2"]


async def test_an_idempotency_key_counts_without_history_too(bench: Bench, channel: str) -> None:
    await bench.engine.ask(Subscribe(channel))
    for _ in range(2):
        assert await bench.publish(channel, b"1", HistoryOptions(), idempotency_key="key") == Position()
    assert len((await bench.settled()).entries) == 1


@pytest.mark.parametrize("marks", [{"delta": True}, {"binary": True}, {"delta": True, "binary": True}])
async def test_a_publication_carries_its_delta_and_binary_flags(
    bench: Bench, channel: str, marks: dict[str, bool]
) -> None:
    await bench.engine.ask(Subscribe(channel))
    await bench.publish(channel, b"\xff", **marks)
    await bench.publish(channel, b"2", HistoryOptions(), **marks)
    kept, passing = (await bench.settled()).publications
    assert (kept, passing) == (Publication(b"\xff", 1, **marks), Publication(b"2", 0, **marks))
    assert (await bench.history(channel)).publications == [kept]


async def test_an_old_version_is_not_published(bench: Bench, channel: str) -> None:
    await bench.engine.ask(Subscribe(channel))

    async def offer(version: int, epoch: str = "", **more: Any) -> int:
        position = await bench.publish(channel, version=version, version_epoch=epoch, **more)
        assert position.epoch
        return position.offset

    assert [await offer(version) for version in (5, 5, 4, 6, 2**64 - 1)] == [1, 1, 1, 2, 3]
    assert (await bench.publish(channel)).offset == 4  # no version, no comparison
    assert await offer(7, "e") == 5  # of another epoch
    assert [await offer(7, "e"), await offer(6)] == [5, 5]
    assert await offer(8) == 6
    assert await offer(9, idempotency_key="k") == 7
    assert await offer(10) == 8
    assert await offer(11, idempotency_key="k") == 7
    assert await offer(11) == 9
    assert [entry[2] for entry in (await bench.settled()).named("published")] == list(range(1, 10))


async def test_versions_outlive_the_publications_but_not_the_numbering(bench: Bench, channel: str) -> None:
    await bench.publish(channel, version=5)
    await bench.engine.ask(RemoveHistory(channel))
    assert (await bench.publish(channel, version=5)).offset == 1
    history_options = HistoryOptions(size=10, ttl=0.01, meta_ttl=0.02)
    first = await bench.publish(channel + "!", b"1", history_options, version=5)
    await deferLater(reactor, 0.05)
    again = await bench.publish(channel + "!", b"1", history_options, version=5)
    assert (again.offset, again.epoch != first.epoch) == (1, True)


async def test_versions_are_ignored_without_history(bench: Bench, channel: str) -> None:
    await bench.engine.ask(Subscribe(channel))
    for _ in range(2):
        assert await bench.publish(channel, b"1", HistoryOptions(), version=5) == Position()
    assert len((await bench.settled()).entries) == 2


async def test_many_publications_arrive_in_order(bench: Bench, channel: str) -> None:
    await bench.engine.ask(Subscribe(channel))
    await DeferredList([Deferred.fromCoroutine(bench.publish(channel, b"%d" % n)) for n in range(500)])
    assert [entry[2] for entry in (await bench.settled()).named("published")] == list(range(1, 501))


# History


async def test_history_pages(bench: Bench, channel: str) -> None:
    for number in range(1, 13):
        position = await bench.publish(channel, b"%d" % number)

    async def page(**query: Any) -> list[int]:
        found = await bench.history(channel, **query)
        assert found.position == position
        return [publication.offset for publication in found.publications]

    assert await page(limit=0) == []
    assert await page() == list(range(3, 13))
    assert await page(limit=2) == [3, 4]
    assert await page(since=Position(10, position.epoch)) == [11, 12]
    assert await page(since=Position(1, position.epoch), limit=1) == [3]
    assert await page(since=position) == []
    assert await page(reverse=True, limit=2) == [12, 11]
    assert await page(since=Position(5, position.epoch), reverse=True) == [4, 3]
    assert await page(since=Position(3, position.epoch), reverse=True) == []


async def test_a_page_may_be_bounded_in_bytes(bench: Bench, channel: str) -> None:
    for _ in range(5):
        await bench.publish(channel, b"x" * 1000, tags={"t": "y" * 1000})

    async def page(**query: Any) -> list[int]:
        return [publication.offset for publication in (await bench.history(channel, **query)).publications]

    assert await page(max_bytes=5000) == [1, 2]
    assert await page(max_bytes=5000, limit=1) == [1]
    assert await page(max_bytes=5000, reverse=True) == [5, 4]
    assert await page(max_bytes=1) == [1]
    assert await page(max_bytes=2**40) == [1, 2, 3, 4, 5]


async def test_the_first_query_creates_the_epoch(bench: Bench, channel: str) -> None:
    page = await bench.history(channel, limit=0)
    assert page.publications == []
    assert page.position.offset == 0
    assert len(page.position.epoch) == 8
    assert await bench.publish(channel) == Position(1, page.position.epoch)


async def test_publications_expire_and_the_numbering_continues(bench: Bench, channel: str) -> None:
    history_options = HistoryOptions(size=10, ttl=0.05)
    first = await bench.publish(channel, b"1", history_options)
    while (await bench.history(channel, history_options)).publications:
        await deferLater(reactor, 0.01)
    assert await bench.publish(channel, b"2", history_options) == Position(2, first.epoch)


async def test_the_numbering_restarts_after_meta_ttl_without_access(bench: Bench, channel: str) -> None:
    history_options = HistoryOptions(size=10, ttl=0.01, meta_ttl=0.02)
    first = await bench.publish(channel, b"1", history_options)
    await deferLater(reactor, 0.05)
    again = await bench.publish(channel, b"1", history_options)
    assert again.offset == 1
    assert again.epoch != first.epoch


async def test_removal_keeps_the_numbering(bench: Bench, channel: str) -> None:
    first = await bench.publish(channel)
    await bench.engine.ask(RemoveHistory(channel))
    await bench.engine.ask(RemoveHistory("unknown"))
    assert await bench.history(channel) == HistoryPage([], first)
    assert await bench.publish(channel) == Position(2, first.epoch)


async def test_an_answer_never_overtakes_nor_lags_behind_publications(bench: Bench, channel: str) -> None:
    """When an answer counts n publications, exactly n have been delivered."""
    await bench.engine.ask(Subscribe(channel))
    waiting: list[Deferred[Any]] = []

    async def ask() -> None:
        page = await bench.history(channel, limit=0)
        bench.log.entries.append(("answered", page.position.offset))

    for _ in range(100):
        waiting += [Deferred.fromCoroutine(bench.publish(channel)), Deferred.fromCoroutine(ask())]
    await DeferredList(waiting)
    delivered = 0
    for entry in (await bench.settled()).entries:
        if entry[0] == "published":
            delivered += 1
        else:
            assert entry == ("answered", delivered)
    assert delivered == 100


# Presence


async def test_presence_delivers_joins_and_leaves(bench: Bench, channel: str) -> None:
    await bench.engine.ask(Subscribe(channel))
    await bench.engine.ask(AddPresence(channel, ALICE, present=True, announce=True))
    await bench.engine.ask(AddPresence(channel, ALICE_AGAIN, present=True, announce=False))
    await bench.engine.ask(AddPresence(channel, BOB, present=False, announce=True))
    assert await bench.engine.ask(GetPresence(channel)) == {"client-a": ALICE, "client-c": ALICE_AGAIN}
    assert await bench.engine.ask(GetPresenceStats(channel)) == (2, 1)
    for info in (ALICE, ALICE_AGAIN, BOB):
        await bench.engine.ask(RemovePresence(channel, info.client))
    assert await bench.engine.ask(GetPresence(channel)) == {}
    assert await bench.engine.ask(GetPresenceStats(channel)) == (0, 0)
    log = await bench.settled()
    assert log.entries == [(what, channel, info) for what in ("joined", "left") for info in (ALICE, BOB)]


async def test_presence_comes_in_pages(bench: Bench, channel: str) -> None:
    infos = {f"client-{number}": ClientInfo("42", f"client-{number}") for number in range(2 * PRESENCE_PAGE + 1)}
    for info in infos.values():
        await bench.engine.ask(AddPresence(channel, info, present=True, announce=False))
    pages, listing = [], new_listing()
    while not pages or len(pages[-1]) == PRESENCE_PAGE:
        pages.append(await bench.engine.ask(GetPresence(channel, listing)))
    assert [len(page) for page in pages] == [PRESENCE_PAGE, PRESENCE_PAGE, 1]
    assert pages[0] | pages[1] | pages[2] == infos


async def test_removing_an_absent_client_delivers_no_leave(bench: Bench, channel: str) -> None:
    await bench.engine.ask(Subscribe(channel))
    await bench.engine.ask(RemovePresence(channel, "stranger"))
    await bench.engine.ask(AddPresence(channel, BOB, present=False, announce=False))
    await bench.engine.ask(RemovePresence(channel, BOB.client))
    assert (await bench.settled()).entries == []


async def test_presence_of_an_unknown_channel_is_empty(bench: Bench, channel: str) -> None:
    assert await bench.engine.ask(GetPresence(channel)) == {}
    assert await bench.engine.ask(GetPresenceStats(channel)) == (0, 0)


async def test_repeated_presence_delivers_no_second_join(bench: Bench, channel: str) -> None:
    await bench.engine.ask(Subscribe(channel))
    for _ in range(2):
        await bench.engine.ask(AddPresence(channel, ALICE, present=True, announce=True))
    assert (await bench.settled()).entries == [("joined", channel, ALICE)]


async def test_presence_may_change_its_info(bench: Bench, channel: str) -> None:
    await bench.engine.ask(Subscribe(channel))
    renamed = msgspec.structs.replace(ALICE, conn_info=b'"renamed"')
    for info in (ALICE, renamed):
        await bench.engine.ask(AddPresence(channel, info, present=True, announce=True))
    assert await bench.engine.ask(GetPresence(channel)) == {ALICE.client: renamed}
    await bench.engine.ask(RemovePresence(channel, ALICE.client))
    assert (await bench.settled()).entries == [("joined", channel, ALICE), ("left", channel, renamed)]


# Statistics and orders


async def test_stats(bench: Bench, channel: str) -> None:
    for info in (ALICE, ALICE_AGAIN, BOB, BOB):
        bench.engine.tell(AddClient(info))
    await bench.engine.ask(Subscribe(channel))
    bench.engine.tell(ReportSubscriptions(7))
    assert await bench.engine.ask(GetStats()) == EngineStats(clients=3, users=2, channels=1, subscriptions=7)
    bench.engine.tell(RemoveClient(ALICE.client))
    bench.engine.tell(RemoveClient(BOB.client))
    bench.engine.tell(RemoveClient(BOB.client))
    bench.engine.tell(Unsubscribe(channel))
    bench.engine.tell(ReportSubscriptions(0))
    assert await bench.engine.ask(GetStats()) == EngineStats(clients=1, users=1, channels=0, subscriptions=0)


async def test_connections_of_a_user_are_limited(bench: Bench) -> None:
    assert await bench.engine.ask(AdmitClient(ALICE, 2))
    bench.engine.tell(AddClient(ALICE_AGAIN))
    third = ClientInfo("alice", "client-d")
    assert not await bench.engine.ask(AdmitClient(third, 2))
    assert await bench.engine.ask(AdmitClient(BOB, 1))
    assert (await bench.engine.ask(GetStats())).clients == 3
    bench.engine.tell(RemoveClient(third.client))
    bench.engine.tell(RemoveClient(ALICE.client))
    assert await bench.engine.ask(AdmitClient(third, 2))
    assert not await bench.engine.ask(AdmitClient(ALICE, 2))
    assert await bench.engine.ask(AdmitClient(ALICE, 0))
    assert await bench.engine.ask(GetStats()) == EngineStats(clients=4, users=2)


async def test_connections_of_the_anonymous_user_are_unlimited(bench: Bench) -> None:
    for client in ("1", "2", "3"):
        assert await bench.engine.ask(AdmitClient(ClientInfo("", client), 1))
    assert (await bench.engine.ask(GetStats())).clients == 3


async def test_an_order_reaches_its_own_sender(bench: Bench) -> None:
    assert await bench.engine.ask(SendOrder(b"\x00order")) == 1
    assert await bench.engine.ask(SendOrder(b"to me", worker=worker_address(0, 0))) == 1
    assert await bench.engine.ask(SendOrder(b"to nobody", worker=worker_address(0, 1))) == 0
    assert await bench.engine.ask(SendOrder(b"to no node", worker=worker_address(0, 0, "unknown"))) == 0
    assert (await bench.settled()).entries == [("order", b"\x00order"), ("order", b"to me")]


# Limits


async def test_subscribed_channels_are_limited(bench: Bench, channel: str) -> None:
    for number in range(SETTINGS.max_channels):
        await bench.engine.ask(Subscribe(f"{channel}{number}"))
    assert await refusal(bench.engine.ask(Subscribe("one more"))) == 106
    await bench.engine.ask(Subscribe(f"{channel}0"))
    bench.engine.tell(Unsubscribe(f"{channel}0"))
    await bench.engine.ask(Subscribe("one more"))


async def test_channels_with_presence_are_limited(bench: Bench, channel: str) -> None:
    for number in range(SETTINGS.max_channels):
        await bench.engine.ask(AddPresence(f"{channel}{number}", ALICE, present=True, announce=False))
    assert await refusal(bench.engine.ask(AddPresence("one more", ALICE, present=True, announce=False))) == 106


@pytest.mark.parametrize("bench", ["memory", "broker"], indirect=True)
async def test_idempotency_keys_are_limited(bench: Bench, channel: str) -> None:
    with pytest.raises(ClientError) as error:
        for number in range(SETTINGS.max_channels + 1):
            await bench.publish(channel, idempotency_key=str(number))
    assert error.value.code == 106
    assert (await bench.publish(channel)).offset > 0


@pytest.mark.parametrize("bench", ["memory", "broker"], indirect=True)  # Redis has its own limit of memory
async def test_channels_with_history_are_limited(bench: Bench, channel: str) -> None:
    """Runs after the other tests with history, as the broker keeps their streams."""
    with pytest.raises(ClientError) as error:
        for number in range(SETTINGS.max_channels + 1):
            await bench.publish(f"{channel}{number}")
    assert error.value.code == 106
    # Whether a channel that is only asked about exists makes no difference to it.
    position = (await bench.history("only asked about")).position
    assert (await bench.history("only asked about")).position == position
    assert await refusal(bench.publish("one more")) == 106


# Several workers on one broker


async def test_publications_cross_workers_in_order(workers: list[Bench], channel: str) -> None:
    here, there, _ = workers
    for bench in (here, there):
        await bench.engine.ask(Subscribe(channel))
    await DeferredList(
        [
            Deferred.fromCoroutine(bench.publish(channel, b"%d" % number, HistoryOptions()))
            for number in range(300)
            for bench in workers
        ]
    )
    deliveries = [(await bench.settled()).named("published") for bench in workers]
    assert len(deliveries[0]) == 900
    assert deliveries[0] == deliveries[1]
    assert deliveries[2] == []


async def test_presence_joins_and_leaves_cross_workers(workers: list[Bench], channel: str) -> None:
    here, there, elsewhere = workers
    await there.engine.ask(Subscribe(channel))
    await here.engine.ask(AddPresence(channel, ALICE, present=True, announce=True))
    await there.engine.ask(AddPresence(channel, BOB, present=True, announce=True))
    for bench in workers:
        assert await bench.engine.ask(GetPresence(channel)) == {"client-a": ALICE, "client-b": BOB}
        assert await bench.engine.ask(GetPresenceStats(channel)) == (2, 2)
    await here.engine.ask(RemovePresence(channel, ALICE.client))
    assert (await there.settled()).entries == [
        ("joined", channel, ALICE),
        ("joined", channel, BOB),
        ("left", channel, ALICE),
    ]
    assert (await elsewhere.settled()).entries == []


async def test_orders_reach_every_worker(workers: list[Bench]) -> None:
    assert await workers[1].engine.ask(SendOrder(b"order")) == 3
    for bench in workers:
        assert (await bench.settled()).entries == [("order", b"order")]


async def test_an_order_may_address_one_worker(workers: list[Bench]) -> None:
    assert await workers[1].engine.ask(SendOrder(b"order", worker=worker_address(2, 0))) == 1
    assert await workers[1].engine.ask(SendOrder(b"order", worker="7")) == 0
    assert [(await bench.settled()).entries for bench in workers] == [[], [], [("order", b"order")]]


async def test_an_address_names_the_node(workers: list[Bench]) -> None:
    (node,) = await workers[0].engine.ask(GetNodes())
    address = worker_address(2, 0, node.uid)
    assert (node.workers, address != worker_address(2, 0)) == (3, True)
    assert await workers[1].engine.ask(SendOrder(b"order", worker=address)) == 1
    assert (await workers[2].settled()).entries == [("order", b"order")]


async def test_one_worker_holds_a_role_until_it_resigns(workers: list[Bench], channel: str) -> None:
    here, there, _ = workers
    term = await here.engine.ask(HoldRole(channel, "here", 60.0))
    refused = await there.engine.ask(HoldRole(channel, "there", 60.0))
    assert (term.number, refused.number) == (1, 0)
    assert 0 < refused.left <= 60.0
    assert await here.engine.ask(HoldRole(channel, "here", 60.0, 1)) == term
    await there.engine.ask(ResignRole(channel, "there", b"no effect"))
    await here.engine.ask(ResignRole(channel, "here", b"open"))
    for bench in workers:
        assert (await bench.settled()).entries == [("order", b"open")]
    assert (await there.engine.ask(HoldRole(channel, "there", 60.0))).number == 2


async def test_a_role_whose_time_has_ended_goes_to_another_worker(workers: list[Bench], channel: str) -> None:
    here, there, _ = workers
    await here.engine.ask(HoldRole(channel, "here", 0.05))
    while not (term := await there.engine.ask(HoldRole(channel, "there", 60.0))).number:
        await deferLater(reactor, term.left)
    assert (await here.engine.ask(HoldRole(channel, "here", 60.0))).number == 0


async def test_connections_of_a_user_are_limited_over_all_workers(workers: list[Bench]) -> None:
    here, there, _ = workers
    answers = await DeferredList(
        [
            bench.engine.ask(AdmitClient(ClientInfo("alice", f"{number}"), 3))
            for number, bench in enumerate([here, there] * 3)
        ]
    )
    assert [admitted for _, admitted in answers].count(True) == 3
    assert (await here.engine.ask(GetStats())).clients == 3
    here.engine.close()
    while not await there.engine.ask(AdmitClient(ALICE, 3)):
        await deferLater(reactor, 0.01)


async def test_stats_count_all_workers(workers: list[Bench], channel: str) -> None:
    for bench, info in zip(workers, (ALICE, BOB, ALICE_AGAIN), strict=True):
        bench.engine.tell(AddClient(info))
        bench.engine.tell(ReportSubscriptions(10))
        await bench.engine.ask(Subscribe(channel))
        await bench.settled()
    assert await workers[0].engine.ask(GetStats()) == EngineStats(clients=3, users=2, channels=1, subscriptions=30)


async def test_the_clients_of_a_closed_worker_leave(workers: list[Bench], channel: str) -> None:
    leaving, staying, _ = workers
    await staying.engine.ask(Subscribe(channel))
    await leaving.engine.ask(Subscribe(channel))
    leaving.engine.tell(AddClient(ALICE))
    leaving.engine.tell(ReportSubscriptions(5))
    await leaving.engine.ask(AddPresence(channel, ALICE, present=True, announce=True))
    leaving.engine.close()
    await until(lambda: ("left", channel, ALICE) in staying.log.entries)
    assert await staying.engine.ask(GetPresence(channel)) == {}
    assert await staying.engine.ask(GetStats()) == EngineStats(clients=0, users=0, channels=1, subscriptions=0)


def test_both_are_engines() -> None:
    """Have the type checker compare both classes with the protocol."""
    engines: list[type[Engine]] = [MemoryEngine, BrokerEngine]
    assert len(engines) == 2
