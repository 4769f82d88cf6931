"""The limit of a user's connections over nodes, which count in a real Redis."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import Deferred

from realtime.broker.user_connections import LIFETIME, UserConnections
from realtime.config.settings import RedisSettings
from realtime.process.reactor import turn_end_caller
from realtime.pubsub.history import make_epoch
from tests.redis.deployments import RedisProcess
from tests.redis.users import User

pytestmark = pytest.mark.timeout(60)


class Node(User):
    """One node with connections of users."""

    def __init__(self, redis: RedisProcess) -> None:
        super().__init__(RedisSettings(address=(redis.address,)))
        self.counts: dict[str, int] = {}
        self.dead: set[str] = set()
        self.run_name = make_epoch()
        self.connections = UserConnections(
            self.run_name,
            lambda user: f"connections.{user}".encode(),
            lambda user: self.server,
            self.counts,
            lambda run: run in self.dead,
            turn_end_caller(reactor),
        )

    async def connect(self, user: str = "ann", limit: int = 2) -> bool:
        self.counts[user] = self.counts.get(user, 0) + 1
        answer: Deferred[bool] = Deferred()
        self.connections.admit(user, limit, answer.callback)
        admitted = await answer
        if not admitted:
            await self.disconnect(user)
        return admitted

    async def disconnect(self, user: str = "ann") -> None:
        self.counts[user] -= 1
        if not self.counts[user]:
            del self.counts[user]
        self.connections.changed(user)
        for _ in range(2):
            await self.call("PING")


@pytest_twisted.async_yield_fixture
async def nodes(redis_server: RedisProcess) -> AsyncIterator[list[Node]]:
    made = [Node(redis_server), Node(redis_server)]
    for node in made:
        await node.ready()
    yield made
    for node in made:
        await node.close()


@pytest_twisted.ensureDeferred
async def test_connections_count_over_nodes(redis_server: RedisProcess, nodes: list[Node]) -> None:
    here, there = nodes
    assert [await here.connect(), await there.connect(), await here.connect(), await there.connect()] == [
        True,
        True,
        False,
        False,
    ]
    assert await here.connect("bob")
    await there.disconnect()
    assert [await here.connect(), await there.connect()] == [True, False]
    for _ in range(2):
        await here.disconnect()
    await here.disconnect("bob")
    assert redis_server.command("DBSIZE") == 0


@pytest_twisted.ensureDeferred
async def test_connections_of_an_ended_node_do_not_count(nodes: list[Node]) -> None:
    here, there = nodes
    assert [await there.connect(), await there.connect(), await here.connect()] == [True, True, False]
    here.dead.add(there.run_name)
    assert [await here.connect(), await here.connect(), await here.connect()] == [True, True, False]


@pytest_twisted.ensureDeferred
async def test_numbers_that_redis_has_lost_are_written_again(redis_server: RedisProcess, nodes: list[Node]) -> None:
    here, there = nodes
    assert [await there.connect(), await there.connect()] == [True, True]
    redis_server.command("FLUSHALL")
    there.connections.renew(1.0)
    for _ in range(2):
        await there.call("PING")
    assert not await here.connect()
    assert 0 < await here.call("PTTL", "connections.ann") <= 1000 * LIFETIME


@pytest_twisted.ensureDeferred
async def test_while_redis_is_away_each_node_has_its_own_limit(nodes: list[Node]) -> None:
    here, there = nodes
    assert [await there.connect(), await there.connect()] == [True, True]
    await here.close()
    for count, admitted in ((1, True), (2, True), (3, False)):
        here.counts["ann"] = count
        answer: Deferred[bool] = Deferred()
        here.connections.admit("ann", 2, answer.callback)
        assert await answer is admitted
