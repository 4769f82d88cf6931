"""Channels on Sentinel and Cluster: failovers and moving slots lose nothing silently."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from twisted.internet.threads import deferToThread

from realtime.config.settings import RedisSettings
from tests.broker.redis_nodes import nodes_of
from tests.broker.redis_readers import Publisher, Reader, meet
from tests.redis.deployments import RedisStarter


async def under_load(publisher: Publisher, fault: Callable[[], Any]) -> None:
    """Publish while a fault is caused in a thread."""
    done = deferToThread(fault)
    while not done.called:
        await publisher.burst(10)
    await done


async def test_a_failover_of_sentinel_starts_every_subscriber_anew(redis_starter: RedisStarter) -> None:
    sentinels = redis_starter.sentinels(1)
    settings = RedisSettings(
        sentinel_address=(sentinels.addresses,), sentinel_master_name=sentinels.name, io_timeout=1.0
    )
    async with nodes_of(settings, 2) as (here, there):
        reader, publisher = Reader(there.workers[0], "news"), Publisher(here.workers[0], "news")
        await reader.subscribe()
        before = await publisher.until_accepted()
        await under_load(publisher, sentinels.fail_over)
        after = await meet(reader, publisher)
        assert after.epoch != before.epoch
        assert reader.told >= 1
        assert publisher.has_positions_of_its_own


async def test_a_cluster_moves_channels_between_servers(redis_starter: RedisStarter) -> None:
    cluster = redis_starter.cluster()
    settings = RedisSettings(cluster_address=(cluster.addresses,), io_timeout=1.0)
    channels = [f"news{number}" for number in range(6)]
    async with nodes_of(settings, 2) as (here, there):
        readers = [Reader(there.workers[0], channel) for channel in channels]
        publishers = [Publisher(here.workers[0], channel) for channel in channels]
        for reader in readers:
            await reader.subscribe()
        for publisher in publishers:
            await publisher.until_accepted()
        key = "realtime.meta.{.news0}"
        owner = cluster.owner(key)
        ports = {channel: cluster.owner(f"realtime.meta.{{.{channel}}}").port for channel in channels}
        (target, *_) = [server for server in cluster.servers[:3] if server is not owner]
        await under_load(publishers[0], lambda: cluster.move_slot(key, target))
        await meet(readers[0], publishers[0])
        await under_load(publishers[0], lambda: cluster.fail_over(target))
        for reader, publisher in zip(readers, publishers, strict=True):
            await meet(reader, publisher)
            assert publisher.has_positions_of_its_own
        # Channels of a server that nothing has happened to have noticed nothing.
        others = [reader for reader in readers if ports[reader.channel] not in (owner.port, target.port)]
        assert [reader.told for reader in others] == [0] * len(others)
