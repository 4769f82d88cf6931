"""Channels across outages of Redis: nothing is lost silently, whatever happens to the server, its data or connections.

The tests stand for the workers: `Reader` follows a channel as the hub does, and fails on what a positioned client must
never see.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import Deferred, DeferredList
from twisted.internet.task import deferLater

from realtime.errors import ClientError, EngineUnavailable
from realtime.pubsub.engine import Subscribe
from realtime.types import HistoryOptions, Position
from tests.broker.redis_nodes import nodes
from tests.pubsub.benches import Bench
from tests.redis.deployments import RedisProcess, RedisStarter
from tests.system.brokers import POLL, until

KEEP = HistoryOptions(size=10_000, ttl=600.0)


class Reader:
    """A positioned subscriber of a channel at one worker. told: how often it had to start anew.

    stays: whether nothing but the next publications has arrived so far.
    """

    def __init__(self, bench: Bench, channel: str) -> None:
        self.bench = bench
        self.channel = channel
        self.read = 0
        self.told = 0
        self.position: Position | None = None
        self.seen: dict[tuple[str, int], bytes] = {}

    async def subscribe(self) -> None:
        await self.bench.engine.ask(Subscribe(self.channel))
        self.position = (await self.bench.history(self.channel, KEEP, limit=0)).position
        self.read = len(self.bench.log.entries)

    def follow(self) -> None:
        """Read what has arrived."""
        for entry in self.bench.log.entries[self.read :]:
            self.read += 1
            if entry[0] == "missed" and entry[1] == self.channel and entry[2]:
                self.told += 1
                self.position = None
            elif entry[0] == "published" and entry[1] == self.channel:
                self._publication(*entry[2:])

    def _publication(self, data: bytes, offset: int, epoch: str) -> None:
        last = self.position
        if last is not None and last.epoch == epoch:
            if offset <= last.offset:
                assert self.seen.get((epoch, offset), data) == data, "two publications with one position"
                return
            assert offset == last.offset + 1, f"a gap after {last}: {offset}"
        elif last is not None:
            self.told += 1  # as the hub breaks at another epoch
        assert self.seen.setdefault((epoch, offset), data) == data
        self.position = Position(offset, epoch)


class Publisher:
    """Publishes numbers. accepted: positions by number."""

    def __init__(self, bench: Bench, channel: str, start: int = 0) -> None:
        self.bench = bench
        self.channel = channel
        self.next = start
        self.accepted: dict[bytes, Position] = {}
        self.refused = 0

    async def publish(self) -> None:
        data = b"%d" % self.next
        self.next += 1
        try:
            self.accepted[data] = await self.bench.publish(self.channel, data, KEEP)
        except ClientError as error:
            assert (error.code, error.temporary) == (100, True)
            self.refused += 1
        except EngineUnavailable:
            self.refused += 1

    async def burst(self, count: int) -> None:
        await DeferredList([Deferred.fromCoroutine(self.publish()) for _ in range(count)])

    async def until_accepted(self) -> Position:
        before = len(self.accepted)
        while len(self.accepted) == before:
            await self.publish()
            await deferLater(reactor, POLL)
        return next(reversed(self.accepted.values()))


async def caught_up(reader: Reader, position: Position) -> None:
    """Return when the reader has a publication at this position."""

    def has() -> bool:
        reader.follow()
        return (position.epoch, position.offset) in reader.seen

    await until(has)


@pytest.fixture
def redis(redis_starter: RedisStarter) -> RedisProcess:
    return redis_starter.standalone(aof=True)


@pytest_twisted.async_yield_fixture
async def pair(redis: RedisProcess) -> AsyncIterator[tuple[Bench, Bench]]:
    """Workers of two nodes."""
    async with nodes(redis.address, 2, io_timeout=0.6) as (here, there):
        yield here.workers[0], there.workers[0]


def kill_one_connection(redis: RedisProcess) -> None:
    """End the connection of a node, if one is connected."""
    for client in redis.client.client_list():
        if client["resp"] == "3":
            redis.command("CLIENT", "KILL", "ID", client["id"])
            return


async def test_publications_missed_during_a_lost_connection_are_delivered_and_nobody_notices(
    redis: RedisProcess, pair: tuple[Bench, Bench]
) -> None:
    readers = [Reader(bench, "news") for bench in pair]
    for reader in readers:
        await reader.subscribe()
    publishers = [Publisher(bench, "news", 1000 * number) for number, bench in enumerate(pair)]
    for _ in range(10):
        busy = [Deferred.fromCoroutine(publisher.burst(50)) for publisher in publishers]
        kill_one_connection(redis)
        await DeferredList(busy)
    tops = [await publisher.until_accepted() for publisher in publishers]
    for reader in readers:
        for top in tops:
            await caught_up(reader, top)
        assert reader.told == 0
        for publisher in publishers:
            for data, position in publisher.accepted.items():
                assert reader.seen[position.epoch, position.offset] == data
    assert sum(publisher.refused for publisher in publishers) > 0
    assert readers[0].seen == readers[1].seen


@pytest.mark.parametrize("command", [["FLUSHALL"], ["DEL", "realtime.meta.{.news}"]])
async def test_lost_metadata_begin_an_epoch_that_never_was(
    redis: RedisProcess, pair: tuple[Bench, Bench], command: list[str]
) -> None:
    here, there = pair
    reader, publisher = Reader(there, "news"), Publisher(here, "news")
    await reader.subscribe()
    for _ in range(5):
        busy = Deferred.fromCoroutine(publisher.burst(50))
        redis.command(*command)
        await busy
    await caught_up(reader, await publisher.until_accepted())
    epochs = {position.epoch for position in publisher.accepted.values()}
    positions = [(position.epoch, position.offset) for position in publisher.accepted.values()]
    assert len(set(positions)) == len(positions)
    assert len(epochs) > 1
    assert publisher.refused == 0
    for data, position in publisher.accepted.items():
        assert reader.seen[position.epoch, position.offset] == data


async def test_a_lost_history_leaves_no_gap_for_subscribers(redis: RedisProcess, pair: tuple[Bench, Bench]) -> None:
    here, there = pair
    reader, publisher = Reader(there, "news"), Publisher(here, "news")
    await reader.subscribe()
    for _ in range(5):
        busy = Deferred.fromCoroutine(publisher.burst(50))
        redis.command("DEL", "realtime.history.{.news}")
        await busy
    await caught_up(reader, await publisher.until_accepted())
    assert (reader.told, publisher.refused) == (0, 0)


async def test_forgotten_scripts_are_sent_again_unnoticed(redis: RedisProcess, pair: tuple[Bench, Bench]) -> None:
    reader, publisher = Reader(pair[1], "news"), Publisher(pair[0], "news")
    await reader.subscribe()
    for _ in range(5):
        busy = Deferred.fromCoroutine(publisher.burst(50))
        redis.command("SCRIPT", "FLUSH")
        await busy
    await caught_up(reader, await publisher.until_accepted())
    assert (reader.told, publisher.refused) == (0, 0)
    assert list(publisher.accepted) == [b"%d" % number for number in range(publisher.next)]


async def outage(redis: RedisProcess, publisher: Publisher) -> None:
    """Publish until publications are refused, and then no more of them wait."""
    while not publisher.refused:
        await publisher.publish()


@pytest.mark.parametrize("strict_epoch", [True, False])
async def test_a_restart_with_all_data_is_noticed_only_where_the_epoch_is_strict(
    redis: RedisProcess, strict_epoch: bool
) -> None:
    async with nodes(redis.address, strict_epoch=strict_epoch) as (node,):
        (bench,) = node.workers
        reader, publisher = Reader(bench, "news"), Publisher(bench, "news")
        await reader.subscribe()
        await publisher.burst(20)
        before = await publisher.until_accepted()
        redis.kill()
        await outage(redis, publisher)
        redis.start()
        after = await publisher.until_accepted()
        await caught_up(reader, after)
        if strict_epoch:
            assert after.epoch != before.epoch
            assert reader.told == 1
        else:
            assert (after.epoch, after.offset > before.offset, reader.told) == (before.epoch, True, 0)


@pytest.mark.parametrize("strict_epoch", [True, False])
async def test_after_a_restart_without_data_every_subscriber_starts_anew(
    redis_starter: RedisStarter, strict_epoch: bool
) -> None:
    redis = redis_starter.standalone()
    async with nodes(redis.address, strict_epoch=strict_epoch) as (node,):
        (bench,) = node.workers
        reader, idle = Reader(bench, "news"), Reader(bench, "idle")
        publishers = [Publisher(bench, "news"), Publisher(bench, "idle")]
        for each in (reader, idle):
            await each.subscribe()
        before = [await publisher.until_accepted() for publisher in publishers]
        redis.kill()
        redis.start()

        def is_told() -> bool:
            idle.follow()
            return idle.told == 1

        await until(is_told)  # without a publication
        after = await publishers[0].until_accepted()
        await caught_up(reader, after)
        assert (after.epoch != before[0].epoch, reader.told) == (True, 1)


async def test_after_a_restart_with_an_old_snapshot_no_position_is_used_twice(redis_starter: RedisStarter) -> None:
    redis = redis_starter.standalone()
    async with nodes(redis.address) as (node,):
        (bench,) = node.workers
        reader, publisher = Reader(bench, "news"), Publisher(bench, "news")
        await reader.subscribe()
        await publisher.burst(10)
        redis.command("SAVE")
        await publisher.burst(10)
        await publisher.until_accepted()
        redis.restart()
        await caught_up(reader, await publisher.until_accepted())
        positions = {(position.epoch, position.offset) for position in publisher.accepted.values()}
        assert len(positions) == len(publisher.accepted)
        assert reader.told == 1


async def test_a_server_that_stops_refuses_publications_in_time_and_continues(
    redis: RedisProcess, pair: tuple[Bench, Bench]
) -> None:
    reader, publisher = Reader(pair[1], "news"), Publisher(pair[0], "news")
    await reader.subscribe()
    await publisher.burst(10)
    redis.pause()
    await publisher.burst(10)  # refused after the time limit
    assert publisher.refused == 10
    await publisher.burst(10)  # refused at once
    assert publisher.refused == 20
    redis.resume()
    await caught_up(reader, await publisher.until_accepted())
    assert reader.told == 0
    for data, position in publisher.accepted.items():
        assert reader.seen[position.epoch, position.offset] == data


async def test_an_idempotency_key_makes_the_retry_of_an_unknown_publication_safe(
    redis: RedisProcess, pair: tuple[Bench, Bench]
) -> None:
    here, there = pair
    redis.pause()
    with pytest.raises(ClientError):
        await here.publish("news", b"once", KEEP, idempotency_key="k")
    redis.resume()  # and carries out what it has received

    async def retry(bench: Bench) -> Position:
        while True:
            try:
                return await bench.publish("news", b"once", KEEP, idempotency_key="k")
            except ClientError:
                await deferLater(reactor, POLL)

    assert await retry(here) == await retry(there)
    assert [one.data for one in (await there.history("news", KEEP)).publications] == [b"once"]


SETTINGS: list[tuple[dict[str, str], dict[str, str]]] = [
    ({"maxmemory": "1", "maxmemory-policy": "noeviction"}, {"maxmemory": "0"}),
    ({"min-replicas-to-write": "1"}, {"min-replicas-to-write": "0"}),
]


@pytest.mark.parametrize(("fault", "remedy"), SETTINGS, ids=["OOM", "NOREPLICAS"])
async def test_what_redis_refuses_to_write_is_never_accepted(
    redis: RedisProcess, pair: tuple[Bench, Bench], fault: dict[str, str], remedy: dict[str, str]
) -> None:
    reader, publisher = Reader(pair[1], "news"), Publisher(pair[0], "news")
    await reader.subscribe()
    before = await publisher.until_accepted()
    for name, value in fault.items():
        redis.command("CONFIG", "SET", name, value)
    await publisher.burst(10)
    assert publisher.refused == 10
    for name, value in remedy.items():
        redis.command("CONFIG", "SET", name, value)
    after = await publisher.until_accepted()
    assert after == Position(before.offset + 1, before.epoch)
    await caught_up(reader, after)
    assert reader.told == 0


async def test_messages_of_strangers_are_dropped_and_counted(redis: RedisProcess) -> None:
    async with nodes(redis.address) as (node,):
        (bench,) = node.workers
        reader, publisher = Reader(bench, "news"), Publisher(bench, "news")
        await reader.subscribe()
        pipeline = redis.client.pipeline(transaction=False)
        for number in range(1000):
            pipeline.publish("realtime.channel.{.news}", number.to_bytes(2) * (number % 50))
        pipeline.execute()
        await caught_up(reader, await publisher.until_accepted())
        assert len(reader.seen) == 1
        assert (await node.broker.samples("realtime_bad_input"))["redis_message"] == 1000
        redis.command("RPUSH", "realtime.history.{.news}", "no publication")
        with pytest.raises(ClientError) as caught:
            await bench.history("news", KEEP)
        assert caught.value.code == 100
