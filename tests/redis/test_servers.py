"""Servers that come, go and come back."""

from __future__ import annotations

import pytest_twisted

from realtime.config.settings import RedisSettings
from tests.redis.deployments import RedisStarter
from tests.redis.users import User
from tests.system.brokers import until


@pytest_twisted.ensureDeferred
async def test_a_server_that_starts_later_and_restarts_is_connected_to_and_has_another_generation(
    redis_starter: RedisStarter,
) -> None:
    redis = redis_starter.standalone()
    redis.kill()
    user = User(RedisSettings(address=(redis.address,)))
    try:
        redis.start()
        await user.ready()
        first = user.server.generation
        redis.kill()
        await until(lambda: not user.server.is_ready)
        redis.start()
        await user.ready()
        assert await user.call("PING") == b"PONG"
        assert "" not in (first, user.server.generation) and first != user.server.generation
    finally:
        await user.close()


@pytest_twisted.ensureDeferred
async def test_a_server_whose_data_another_one_replaced_has_another_generation(redis_starter: RedisStarter) -> None:
    redis, other = redis_starter.standalone(), redis_starter.standalone()
    user = User(RedisSettings(address=(redis.address,)))
    try:
        await user.ready()
        first = user.server.generation
        redis.command("REPLICAOF", "127.0.0.1", other.port)
        await until(lambda: not user.server.is_ready)
        redis.command("REPLICAOF", "NO", "ONE")
        await user.ready()
        assert user.server.generation != first
    finally:
        await user.close()


@pytest_twisted.ensureDeferred
async def test_several_addresses_share_the_names(redis_starter: RedisStarter) -> None:
    processes = [redis_starter.standalone(), redis_starter.standalone()]
    user = User(RedisSettings(address=tuple(process.address for process in processes)))
    try:
        await user.ready()
        names = [f"chat:{number}" for number in range(50)]
        for name in names:
            await user.call("SET", name, "1", of=name)
        counts = [process.command("DBSIZE") for process in processes]
        assert sum(counts) == 50 and min(counts) > 10
        processes[1].kill()
        await until(lambda: not user.servers.servers[1].is_ready)
        assert user.value("realtime_redis_away") == 1
        kept = [name for name in names if user.servers.of(name) is user.servers.servers[0]]
        assert len(kept) == counts[0]
        assert await user.call("GET", kept[0], of=kept[0]) == b"1"
    finally:
        await user.close()
