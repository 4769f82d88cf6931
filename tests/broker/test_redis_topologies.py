"""Channels on a Cluster and behind Sentinels: they work as on one server, and no fault loses anything silently."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager

import pytest
from twisted.internet import reactor
from twisted.internet.defer import Deferred, DeferredList
from twisted.internet.task import deferLater

from realtime.config.settings import RedisSettings
from realtime.pubsub.engine import AddPresence, GetPresence, SendOrder
from realtime.types import ClientInfo
from tests.broker.redis_nodes import Node, nodes_of
from tests.broker.redis_readers import Publisher, Reader, meet
from tests.conftest import PROGRAMS
from tests.redis.deployments import RedisCluster, RedisProcess, RedisStarter, SentinelSet
from tests.system.brokers import POLL, until

CHANNELS = ["news", "a}b", "", "chat:1", "chat:2", "chat:3"]
MANY_CHANNELS = ["news", *(f"room:{number}" for number in range(10))]
ALICE = ClientInfo("alice", "client-a")


@pytest.fixture(scope="module", params=PROGRAMS)
def cluster(request: pytest.FixtureRequest) -> Iterator[RedisCluster]:
    starter = RedisStarter(program=request.param)
    yield starter.cluster()
    starter.finish()


@pytest.fixture(params=PROGRAMS)
def watched(request: pytest.FixtureRequest) -> Iterator[SentinelSet]:
    starter = RedisStarter(program=request.param)
    yield starter.sentinels(replicas=1)
    starter.finish()


def on(servers: RedisCluster | SentinelSet) -> AbstractAsyncContextManager[list[Node]]:
    """Two nodes."""
    if isinstance(servers, RedisCluster):
        return nodes_of(RedisSettings(cluster_address=(servers.addresses,)), 2)
    return nodes_of(RedisSettings(sentinel_address=(servers.addresses,), sentinel_master_name=servers.name), 2)


class Load:
    """Publications of one node in several channels without a pause, and readers on the other node."""

    def __init__(self, here: Node, there: Node, channels: list[str]) -> None:
        self.publishers = [Publisher(here.workers[0], channel) for channel in channels]
        self.readers = [Reader(there.workers[0], channel) for channel in channels]
        self._is_over = False
        self._running: list[Deferred[None]] = []

    async def start(self) -> None:
        for reader in self.readers:
            await reader.subscribe()
        for publisher in self.publishers:
            await publisher.until_accepted()
        self._running = [Deferred.fromCoroutine(self._publish(publisher)) for publisher in self.publishers]

    async def _publish(self, publisher: Publisher) -> None:
        while not self._is_over:
            await publisher.burst(5)
            await deferLater(reactor, POLL)

    async def resumed(self) -> None:
        """Return when every channel has accepted a publication from now on."""
        before = [len(publisher.accepted) for publisher in self.publishers]
        await until(
            lambda: all(
                len(publisher.accepted) > count for publisher, count in zip(self.publishers, before, strict=True)
            )
        )

    async def close_account(self) -> None:
        """End the load, and check: what was accepted was seen, or its reader was told."""
        self._is_over = True
        await DeferredList(self._running)
        for publisher, reader in zip(self.publishers, self.readers, strict=True):
            await meet(reader, publisher)
            assert publisher.has_positions_of_its_own
            accepted = publisher.accepted.items()
            are_seen = [reader.seen.get((position.epoch, position.offset)) == data for data, position in accepted]
            assert all(are_seen) or reader.told


async def test_two_nodes_share_presence_orders_and_channels_on_a_cluster(cluster: RedisCluster) -> None:
    async with on(cluster) as (here, there):
        load = Load(here, there, CHANNELS)
        await load.start()
        await here.workers[0].engine.ask(AddPresence("room", ALICE, present=True, announce=True))
        assert await there.workers[0].engine.ask(GetPresence("room")) == {ALICE.client: ALICE}
        await there.workers[0].engine.ask(SendOrder(b"order"))
        await until(lambda: (b"order",) in here.workers[0].log.named("order"))
        await load.close_account()
        assert [reader.told for reader in load.readers] == [0] * len(CHANNELS)
        assert sum(publisher.refused for publisher in load.publishers) == 0


def key_of(channel: str) -> str:
    return f"realtime.meta.{{.{channel}}}"


Fault = Callable[[Load], Awaitable[RedisProcess]]
"""Causes a fault under load, and returns the server that has the first channel afterwards."""


async def during(servers: RedisCluster | SentinelSet, fault: Fault, channels: list[str]) -> Load:
    """Cause a fault, and check what the nodes make of it."""
    async with on(servers) as (here, there):
        load = Load(here, there, channels)
        await load.start()
        server = await fault(load)
        await load.resumed()
        await load.close_account()
        top = list(load.publishers[0].accepted.values())[-1]
        assert top.epoch.encode() in server.connect().get(key_of(channels[0]))
        # Orders still reach the other node.
        await there.workers[0].engine.ask(SendOrder(b"order"))
        await until(lambda: (b"order",) in here.workers[0].log.named("order"))
        return load


async def test_moved_slots_lose_nothing_silently(cluster: RedisCluster) -> None:
    source = cluster.owner(key_of("news"))
    target = next(
        server for server in cluster.servers if server is not source and server.info("replication")["role"] == "master"
    )

    async def move(load: Load) -> RedisProcess:
        for name in (*CHANNELS, "all"):
            if cluster.owner(key_of(name)) is not target:
                cluster.move_slot(key_of(name), target)
                await load.resumed()
        return target

    load = await during(cluster, move, CHANNELS)
    assert all(reader.told <= 2 for reader in load.readers)


async def test_a_cluster_failover_loses_nothing_silently(cluster: RedisCluster) -> None:
    master = cluster.owner(key_of("news"))
    others = {channel for channel in MANY_CHANNELS if cluster.owner(key_of(channel)) is not master}

    async def kill(load: Load) -> RedisProcess:
        replica = cluster.replica_of(master)
        master.kill()
        return replica

    load = await during(cluster, kill, MANY_CHANNELS)
    assert load.readers[0].told >= 1
    # Channels of the other masters were refused for a moment, and continue their epochs.
    assert {reader.told for reader in load.readers if reader.channel in others} == {0}
    assert sum(publisher.refused for publisher in load.publishers) > 0
    master.start()


async def test_a_sentinel_failover_loses_nothing_silently(watched: SentinelSet) -> None:
    [replica] = watched.replicas

    async def kill(load: Load) -> RedisProcess:
        watched.master.kill()
        return replica

    load = await during(watched, kill, ["news", "chat:1"])
    assert all(reader.told >= 1 for reader in load.readers)


async def test_a_promoted_replica_that_lags_begins_new_epochs(watched: SentinelSet) -> None:
    [replica] = watched.replicas

    async def promote(load: Load) -> RedisProcess:
        master = watched.master
        replica.pause()
        for _ in range(10):
            await load.resumed()
        master.kill()
        replica.resume()
        return replica

    load = await during(watched, promote, ["news", "chat:1"])
    assert all(reader.told >= 1 for reader in load.readers)
