"""One server: what it refuses, how late it answers, and what operators see."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_twisted
from twisted.logger import LogLevel, capturedLogs

from realtime.config.settings import RedisSettings
from realtime.errors import EngineUnavailable
from tests.redis.deployments import PASSWORD, USER, RedisProcess, RedisStarter
from tests.redis.users import User
from tests.system.brokers import until


@pytest.fixture
def server(redis_starter: RedisStarter) -> RedisProcess:
    return redis_starter.standalone(enable_debug_command="yes")


@pytest_twisted.async_yield_fixture
async def user(server: RedisProcess) -> AsyncIterator[User]:
    user = User(RedisSettings(address=(server.address,), user=USER, password=PASSWORD))
    await user.ready()
    yield user
    await user.close()


async def temporary(user: User, *command: Any) -> str:
    """The text of a temporary refusal."""
    with pytest.raises(EngineUnavailable) as caught:
        await user.call(*command)
    return str(caught.value)


def errors(user: User) -> dict[str, float]:
    samples = user.metrics.snapshot(["realtime_redis_errors"])
    return {dict(sample.labels)["kind"]: sample.value for sample in samples}


@pytest_twisted.ensureDeferred
async def test_refusals_that_may_pass_are_temporary_and_counted(user: User, server: RedisProcess) -> None:
    server.command("CONFIG", "SET", "maxmemory", "1")
    assert "OOM" in await temporary(user, "SET", "realtime.x", "1")
    server.command("CONFIG", "SET", "maxmemory", "0", "min-replicas-to-write", "1")
    assert "NOREPLICAS" in await temporary(user, "SET", "realtime.x", "1")
    server.command("CONFIG", "SET", "min-replicas-to-write", "0")
    assert await user.call("SET", "realtime.x", "1") == b"OK"
    assert errors(user) == {"oom": 1, "noreplicas": 1}
    assert user.value("realtime_redis_away") == 0
    assert user.losses == []


@pytest_twisted.ensureDeferred
async def test_a_server_that_becomes_a_replica_is_left_until_it_is_a_master(user: User, server: RedisProcess) -> None:
    server.command("REPLICAOF", "127.0.0.1", "1")
    assert "READONLY" in await temporary(user, "SET", "realtime.x", "1")
    await until(lambda: not user.server.is_ready)
    server.command("REPLICAOF", "NO", "ONE")
    await user.ready()
    assert await user.call("SET", "realtime.x", "1") == b"OK"


@pytest_twisted.ensureDeferred
async def test_a_missing_permission_makes_the_server_unhealthy_and_names_the_key(
    user: User, server: RedisProcess
) -> None:
    server.command("ACL", "SETUSER", USER, "resetchannels")
    with capturedLogs() as events:
        await user.subscribe(b"realtime.c").addErrback(lambda failure: None)
        assert user.value("realtime_redis_away") == 1
        [event] = [event for event in events if event["log_level"] is LogLevel.error]
        await user.subscribe(b"realtime.c").addErrback(lambda failure: None)
    assert event["reason"].startswith("engine.redis.user: ") and "channel" in event["reason"]
    assert len([event for event in events if event["log_level"] is LogLevel.error]) == 1
    assert errors(user) == {"noperm": 2}


@pytest_twisted.ensureDeferred
async def test_a_slow_server_shows_its_lag(user: User, server: RedisProcess) -> None:
    server.pause()
    await until(lambda: user.value("realtime_redis_lagging") == 1)
    assert user.value("realtime_redis_lag_seconds") >= 1
    server.resume()
    await until(lambda: user.value("realtime_redis_lagging") == 0)
    assert user.losses == []


@pytest_twisted.ensureDeferred
async def test_a_server_that_evicts_is_warned_of(redis_starter: RedisStarter) -> None:
    server = redis_starter.standalone(maxmemory_policy="allkeys-lru")
    with capturedLogs() as events:
        user = User(RedisSettings(address=(server.address,)))
        await user.ready()
        await user.close()
    assert any("maxmemory-policy is allkeys-lru" in event.get("line", "") for event in events)
