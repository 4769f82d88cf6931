"""Sentinels: the master that they name, and another one after a failover."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import pytest_twisted
from twisted.logger import capturedLogs

from realtime.config.settings import RedisSettings
from tests.conftest import PROGRAMS
from tests.redis.deployments import RedisStarter, SentinelSet
from tests.redis.users import User
from tests.system.brokers import until


@pytest.fixture(scope="module", params=PROGRAMS)
def watched(request: pytest.FixtureRequest) -> Iterator[SentinelSet]:
    starter = RedisStarter(program=request.param)
    yield starter.sentinels(requirepass="p")
    starter.finish()


def settings(watched: SentinelSet, **more: str) -> RedisSettings:
    known = {"sentinel_address": (watched.addresses,), "sentinel_master_name": watched.name, "password": "p"}
    return RedisSettings(**known | more)


@pytest_twisted.ensureDeferred
async def test_the_master_changes_with_a_failover_and_has_another_generation(watched: SentinelSet) -> None:
    user = User(settings(watched))
    try:
        await user.ready()
        before, generation = watched.master, user.server.generation
        assert before.address in user.server.name
        await user.call("SET", "a", "1")
        promoted = watched.fail_over()
        await until(lambda: promoted.address in user.server.name and user.server.is_ready)
        assert user.server.generation != generation
        await user.call("SET", "a", "2")
        assert user.losses == ["the Sentinels name another master"] or user.losses == ["the server is a replica now"]
    finally:
        await user.close()


@pytest_twisted.ensureDeferred
async def test_a_killed_master_is_replaced_though_a_sentinel_is_silent(watched: SentinelSet) -> None:
    user = User(settings(watched))
    try:
        await user.ready()
        before = watched.master
        watched.sentinels[0].pause()
        before.kill()
        await until(lambda: not user.server.is_ready)
        await until(lambda: user.server.is_ready)
        assert before.address not in user.server.name
        watched.sentinels[0].resume()
        before.start()
        await until(lambda: watched.sentinels[0].command("SENTINEL", "CKQUORUM", watched.name))
    finally:
        watched.sentinels[0].resume()
        await user.close()


@pytest_twisted.ensureDeferred
async def test_a_master_of_another_name_is_reported_with_the_key(watched: SentinelSet) -> None:
    with capturedLogs() as events:
        user = User(settings(watched, sentinel_master_name="other"))
        try:
            await until(lambda: any("sentinel_master_name" in event.get("reason", "") for event in events))
        finally:
            await user.close()
    assert user.value("realtime_redis_away") == 1
