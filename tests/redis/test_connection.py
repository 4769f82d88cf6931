"""A connection to a real Redis server: pipelining, order, scripts that Redis has lost, late replies."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.task import deferLater

from realtime.config.settings import RedisSettings
from realtime.errors import EngineUnavailable
from realtime.redis import server
from realtime.redis.connection import RedisError
from realtime.redis.scripts import Script
from tests.redis.deployments import RedisProcess
from tests.redis.users import DirectReactor, User

ECHO = Script("return ARGV[2]")
COUNT = Script("redis.call('PUBLISH', KEYS[1], ARGV[2]) return redis.call('INCR', 'count')")


@pytest_twisted.async_yield_fixture
async def user(redis_server: RedisProcess) -> AsyncIterator[User]:
    user = User(RedisSettings(address=(redis_server.address,), io_timeout=1.0))
    await user.ready()
    yield user
    await user.close()


@pytest_twisted.ensureDeferred
async def test_replies_come_in_the_order_of_the_commands(user: User) -> None:
    answers = [user.call("SET", "a", "1"), user.call("INCR", "a"), user.call("GET", b"a"), user.call("GET", "none")]
    assert [await answer for answer in answers] == [b"OK", 2, b"2", None]


@pytest_twisted.ensureDeferred
async def test_a_refused_command_fails_alone_with_the_code_of_redis(user: User) -> None:
    await user.call("SET", "a", "1")
    refused, later = user.call("LPUSH", "a", "1"), user.call("GET", "a")
    with pytest.raises(RedisError) as caught:
        await refused
    assert caught.value.code == "WRONGTYPE"
    assert await later == b"1"


@pytest_twisted.ensureDeferred
async def test_messages_come_between_subscription_and_its_end(user: User) -> None:
    await user.call("PUBLISH", "news", "0")
    await user.subscribe(b"news")
    await user.call("PUBLISH", "news", "1")
    await user.call("PUBLISH", "other", "1")
    await user.unsubscribe(b"news")
    await user.call("PUBLISH", "news", "2")
    await user.call("PING")
    assert user.messages == [(b"news", b"1")]


@pytest_twisted.ensureDeferred
async def test_a_script_that_redis_has_lost_runs_in_the_order_of_the_calls(
    user: User, redis_server: RedisProcess
) -> None:
    assert await user.run(COUNT, ["news"], ["0"]) == 1
    await user.subscribe(b"news")
    redis_server.command("SCRIPT", "FLUSH")
    answers = [user.run(COUNT, ["news"], [number]) for number in range(1, 6)]
    answers.append(user.run(ECHO, [], ["last"]))
    assert [await answer for answer in answers] == [2, 3, 4, 5, 6, b"last"]
    assert user.messages == [(b"news", b"%d" % number) for number in range(1, 6)]


@pytest_twisted.ensureDeferred
async def test_a_server_that_does_not_answer_is_away_until_it_does(user: User, redis_server: RedisProcess) -> None:
    redis_server.pause()
    with pytest.raises(EngineUnavailable):
        await user.call("PING")
    assert not user.server.is_ready
    with pytest.raises(EngineUnavailable):
        await user.call("PING")  # at once
    redis_server.resume()
    await user.ready()
    assert await user.call("PING") == b"PONG"
    assert len(user.losses) == 1


async def test_commands_that_redis_does_not_read_are_refused_beyond_a_limit(
    redis_server: RedisProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "QUEUE_LIMIT", 8 * 1024 * 1024)
    user = User(RedisSettings(address=(redis_server.address,), io_timeout=20.0), DirectReactor())
    await user.ready()
    redis_server.pause()
    answers = []
    for _ in range(32):
        answers.append(user.call("ECHO", b"x" * 1024 * 1024))
        await deferLater(reactor, 0)
    refused = [answer for answer in answers if answer.called]
    redis_server.resume()
    for answer in refused:
        with pytest.raises(EngineUnavailable):
            await answer
    assert len(refused) > 10
    for answer in answers:
        if answer not in refused:
            assert len(await answer) == 1024 * 1024
    assert await user.call("PING") == b"PONG"
    await user.close()
