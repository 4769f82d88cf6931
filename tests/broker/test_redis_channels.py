"""Channels across outages of Redis: nothing is lost silently, whatever happens to server, data or connections."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from typing import NamedTuple

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import Deferred, DeferredList
from twisted.internet.task import deferLater

from realtime.errors import ClientError
from realtime.types import Position
from tests.broker.redis_nodes import Node, nodes
from tests.broker.redis_readers import KEEP, Publisher, Reader, caught_up
from tests.pubsub.benches import Bench
from tests.redis.deployments import RedisProcess, RedisStarter
from tests.system.brokers import POLL, until


class Stage(NamedTuple):
    """A server that keeps everything, workers of two nodes, and the only worker of one without a strict epoch."""

    redis: RedisProcess
    here: Bench
    there: Bench
    lax: Bench
    node: Node


@pytest_twisted.async_yield_fixture(scope="module")
async def stage() -> AsyncIterator[Stage]:
    starter = RedisStarter()
    redis = starter.standalone(aof=True)
    async with (
        nodes(redis.address, 2, io_timeout=1.5) as (here, there),
        nodes(redis.address, prefix="lax", strict_epoch=False) as (lax,),
    ):
        yield Stage(redis, here.workers[0], there.workers[0], lax.workers[0], there)
    starter.finish()


@pytest.fixture
def channel(request: pytest.FixtureRequest) -> str:
    """A channel name that no other test uses."""
    return request.node.name.replace("[", "-").rstrip("]")


def kill_one_connection(redis: RedisProcess) -> None:
    """End the connection of a node, if one is connected."""
    for client in redis.client.client_list():
        if client["resp"] == "3":
            redis.command("CLIENT", "KILL", "ID", client["id"])
            return


async def test_publications_missed_during_a_lost_connection_are_delivered_unnoticed(stage: Stage, channel: str) -> None:
    readers = [Reader(bench, channel) for bench in (stage.here, stage.there)]
    for reader in readers:
        await reader.subscribe()
    publishers = [Publisher(bench, channel, 1000 * number) for number, bench in enumerate((stage.here, stage.there))]
    for _ in range(10):
        busy = [Deferred.fromCoroutine(publisher.burst(50)) for publisher in publishers]
        kill_one_connection(stage.redis)
        await DeferredList(busy)
    tops = [await publisher.until_accepted() for publisher in publishers]
    for reader in readers:
        for top in tops:
            await caught_up(reader, top)
        assert reader.told == 0
        for publisher in publishers:
            reader.has_all(publisher)
    assert sum(publisher.refused for publisher in publishers) > 0
    assert readers[0].seen == readers[1].seen


async def under_load(stage: Stage, channel: str, *commands: tuple[str, ...]) -> tuple[Reader, Publisher]:
    """Carry out commands on Redis while one node publishes and the other one reads."""
    reader, publisher = Reader(stage.there, channel), Publisher(stage.here, channel)
    await reader.subscribe()
    for command in commands:
        busy = Deferred.fromCoroutine(publisher.burst(50))
        stage.redis.command(*command)
        await busy
    await caught_up(reader, await publisher.until_accepted())
    assert publisher.refused == 0
    return reader, publisher


@pytest.mark.parametrize("command", ["FLUSHALL", "DEL"])
async def test_lost_metadata_begin_an_epoch_that_never_was(stage: Stage, channel: str, command: str) -> None:
    words = (command, f"realtime.meta.{{.{channel}}}") if command == "DEL" else (command,)
    reader, publisher = await under_load(stage, channel, *[words] * 5)
    assert publisher.has_positions_of_its_own
    assert len({position.epoch for position in publisher.accepted.values()}) > 1
    reader.has_all(publisher)


async def test_a_lost_history_leaves_no_gap_for_subscribers(stage: Stage, channel: str) -> None:
    reader, publisher = await under_load(stage, channel, *[("DEL", f"realtime.history.{{.{channel}}}")] * 5)
    assert reader.told == 0
    reader.has_all(publisher)


async def test_forgotten_scripts_are_sent_again_unnoticed(stage: Stage, channel: str) -> None:
    reader, publisher = await under_load(stage, channel, *[("SCRIPT", "FLUSH")] * 5)
    assert reader.told == 0
    assert list(publisher.accepted) == [b"%d" % number for number in range(publisher.next)]
    assert [position.offset for position in publisher.accepted.values()] == list(range(1, publisher.next + 1))


async def test_a_restart_with_all_data_is_noticed_only_where_the_epoch_is_strict(stage: Stage, channel: str) -> None:
    readers = [Reader(bench, channel) for bench in (stage.here, stage.lax)]
    publishers = [Publisher(bench, channel) for bench in (stage.here, stage.lax)]
    for reader, publisher in zip(readers, publishers, strict=True):
        await reader.subscribe()
        await publisher.burst(20)
    strict, lax = [await publisher.until_accepted() for publisher in publishers]
    stage.redis.kill()
    for publisher in publishers:
        while not publisher.refused:
            await publisher.publish()
    stage.redis.start()
    strict_after, lax_after = [await publisher.until_accepted() for publisher in publishers]
    await caught_up(readers[0], strict_after)
    await caught_up(readers[1], lax_after)
    assert (strict_after.epoch != strict.epoch, readers[0].told) == (True, 1)
    assert (lax_after.epoch, lax_after.offset > lax.offset, readers[1].told) == (lax.epoch, True, 0)
    readers[1].has_all(publishers[1])


@pytest.mark.parametrize("data", ["none", "old"])
async def test_after_a_restart_with_other_data_every_subscriber_starts_anew(
    stage: Stage, channel: str, data: str
) -> None:
    reader, idle = Reader(stage.here, channel), Reader(stage.there, channel + "!")
    publisher = Publisher(stage.here, channel)
    await reader.subscribe()
    await idle.subscribe()
    await publisher.burst(20)
    copy, files = stage.redis.folder / "copy", stage.redis.folder / "appendonlydir"
    shutil.copytree(files, copy)
    await publisher.burst(20)
    stage.redis.kill()
    shutil.rmtree(files)
    if data == "old":
        shutil.move(copy, files)
    else:
        shutil.rmtree(copy)
    stage.redis.start()

    def is_told() -> bool:
        idle.follow()
        return idle.told > 0

    await until(is_told)  # though no publication follows
    await caught_up(reader, await publisher.until_accepted())
    assert reader.told > 0
    assert publisher.has_positions_of_its_own


async def test_a_server_that_stops_refuses_publications_in_time_and_continues(stage: Stage, channel: str) -> None:
    reader, publisher = Reader(stage.there, channel), Publisher(stage.here, channel)
    await reader.subscribe()
    await publisher.burst(10)
    stage.redis.pause()
    await publisher.burst(10)  # refused after the time limit
    assert publisher.refused == 10
    await publisher.burst(10)  # refused at once
    assert publisher.refused == 20
    stage.redis.resume()
    await caught_up(reader, await publisher.until_accepted())
    assert reader.told == 0
    reader.has_all(publisher)


async def test_an_idempotency_key_makes_the_retry_of_an_unknown_publication_safe(stage: Stage, channel: str) -> None:
    stage.redis.pause()
    with pytest.raises(ClientError):
        await stage.here.publish(channel, b"once", KEEP, idempotency_key="k")
    stage.redis.resume()  # and carries out what it has received

    async def retry(bench: Bench) -> Position:
        while True:
            try:
                return await bench.publish(channel, b"once", KEEP, idempotency_key="k")
            except ClientError:
                await deferLater(reactor, POLL)

    assert await retry(stage.here) == await retry(stage.there)
    assert [one.data for one in (await stage.there.history(channel, KEEP)).publications] == [b"once"]


FAULTS = {"OOM": ("maxmemory", "1", "0"), "NOREPLICAS": ("min-replicas-to-write", "1", "0")}


@pytest.mark.parametrize("fault", FAULTS)
async def test_what_redis_refuses_to_write_is_never_accepted(stage: Stage, channel: str, fault: str) -> None:
    reader, publisher = Reader(stage.there, channel), Publisher(stage.here, channel)
    await reader.subscribe()
    before = await publisher.until_accepted()
    name, wrong, right = FAULTS[fault]
    stage.redis.command("CONFIG", "SET", name, wrong)
    refused = publisher.refused
    await publisher.burst(10)
    assert publisher.refused == refused + 10
    stage.redis.command("CONFIG", "SET", name, right)
    after = await publisher.until_accepted()
    assert after == Position(before.offset + 1, before.epoch)
    await caught_up(reader, after)
    assert reader.told == 0


async def test_messages_of_strangers_are_dropped_and_counted(stage: Stage, channel: str) -> None:
    reader, publisher = Reader(stage.there, channel), Publisher(stage.there, channel)
    await reader.subscribe()
    pipeline = stage.redis.client.pipeline(transaction=False)
    for number in range(1000):
        pipeline.publish(f"realtime.channel.{{.{channel}}}", number.to_bytes(2) * (number % 50))
    pipeline.execute()
    await caught_up(reader, await publisher.until_accepted())
    assert len(reader.seen) == 1
    assert (await stage.node.broker.samples("realtime_redis_foreign_messages"))[""] == 1000
    stage.redis.command("RPUSH", f"realtime.history.{{.{channel}}}", "no publication")
    with pytest.raises(ClientError) as caught:
        await stage.there.history(channel, KEEP)
    assert caught.value.code == 100


async def test_many_channels_are_checked_in_turns(stage: Stage, channel: str) -> None:
    names = [f"{channel}{number}" for number in range(500)]
    readers = [Reader(stage.there, name) for name in names]
    # Publishers at the same node: what they publish must not overtake the check of its channel.
    publishers = [
        Publisher(bench, name, start) for name in names for start, bench in ((0, stage.here), (1000, stage.there))
    ]

    async def publish() -> None:
        await DeferredList([Deferred.fromCoroutine(publisher.until_accepted()) for publisher in publishers])

    await DeferredList([Deferred.fromCoroutine(reader.subscribe()) for reader in readers])
    await publish()
    for client in stage.redis.client.client_list():
        if client["resp"] == "3":
            stage.redis.command("CLIENT", "KILL", "ID", client["id"])
    await publish()
    by_name = dict(zip(names, readers, strict=True))
    for publisher in publishers:
        await caught_up(by_name[publisher.channel], next(reversed(publisher.accepted.values())))
        by_name[publisher.channel].has_all(publisher)
    assert [reader.told for reader in readers] == [0] * len(readers)
