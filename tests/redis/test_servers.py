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
        await until(lambda: user.losses != [] and user.server.is_ready)
        assert user.server.generation != first
    finally:
        await user.close()
