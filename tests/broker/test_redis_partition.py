"""A node that is cut from Redis, while another one is not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.broker.redis_nodes import nodes
from tests.broker.redis_readers import Publisher, Reader, caught_up
from tests.redis.deployments import RedisStarter
from tests.redis.namespaces import Namespace
from tests.system.brokers import until


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    try:
        namespace = Namespace()
    except (PermissionError, FileNotFoundError):
        pytest.skip("needs root and network namespaces")
    yield namespace
    namespace.close()


async def test_a_node_without_its_network_misses_nothing_and_accepts_nothing(namespace: Namespace) -> None:
    starter = RedisStarter(place=namespace.place())
    redis = starter.standalone(protected_mode="no")
    addresses = [f"{host}:{redis.port}" for host in namespace.hosts]
    try:
        async with nodes(addresses[0]) as (here,), nodes(addresses[1], io_timeout=0.6) as (there,):
            reader, publisher = Reader(there.workers[0], "news"), Publisher(here.workers[0], "news")
            isolated = Publisher(there.workers[0], "news", start=100_000)
            await reader.subscribe()
            await publisher.burst(20)
            namespace.cut(1)
            await isolated.publish()
            assert isolated.refused == 1  # in time, and the next at once
            await publisher.burst(100)
            assert publisher.refused == 0
            await isolated.burst(10)
            assert isolated.refused == 11
            namespace.mend(1)
            await caught_up(reader, await isolated.until_accepted())
            reader.has_all(publisher)
            assert reader.told == 0
            await until(lambda: len(reader.seen) >= 121)
    finally:
        starter.finish()
