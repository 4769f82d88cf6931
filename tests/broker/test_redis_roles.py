"""Roles in a real Redis, for two nodes."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_twisted
from twisted.internet.defer import Deferred

from realtime.broker.redis_roles import RedisRoles
from realtime.config.settings import RedisSettings
from realtime.pubsub.engine import HoldRole, ResignRole, Term
from realtime.pubsub.history import make_epoch
from tests.redis.deployments import RedisProcess
from tests.redis.users import User

pytestmark = pytest.mark.timeout(60)


class Node(User):
    """One node with its connection."""

    def __init__(self, redis: RedisProcess, role: str) -> None:
        super().__init__(RedisSettings(address=(redis.address,)))
        self.role = role
        self.holder = f"{make_epoch()}/0-2"
        self.roles = RedisRoles(lambda kind, name: f"{kind}.{{{name}}}".encode(), lambda name: self.server)

    async def hold(self, seconds: float = 60.0) -> Term:
        answer: Deferred[Term] = Deferred()

        def reply(term: Term | None, error: Exception | None = None) -> None:
            if term is not None:
                answer.callback(term)
            else:
                answer.errback(error)

        self.roles.hold(HoldRole(self.role, self.holder, seconds), reply)  # type: ignore[arg-type]
        return await answer

    async def resign(self) -> bool:
        answer: Deferred[bool] = Deferred()
        self.roles.resign(ResignRole(self.role, self.holder, b""), lambda was, error: answer.callback(was))
        return await answer


@pytest_twisted.async_yield_fixture
async def nodes(redis_server: RedisProcess) -> AsyncIterator[list[Node]]:
    role = make_epoch()
    made = [Node(redis_server, role), Node(redis_server, role)]
    for node in made:
        await node.ready()
    yield made
    for node in made:
        await node.close()


@pytest_twisted.ensureDeferred
async def test_a_role_has_one_holder_over_all_nodes(nodes: list[Node]) -> None:
    ada, ben = nodes
    assert await ada.hold() == Term(1, 60.0)
    refused = await ben.hold()
    assert refused.number == 0
    assert 0 < refused.left <= 60.0
    assert (await ada.hold()).number == 1
    assert not await ben.resign()
    assert await ada.resign()
    assert (await ben.hold()).number == 2


@pytest_twisted.ensureDeferred
async def test_the_term_of_a_silent_holder_ends_by_the_clock_of_redis(nodes: list[Node]) -> None:
    ada, ben = nodes
    await ada.hold(0.05)
    while not (term := await ben.hold()).number:
        pass
    assert term.number == 2
    assert (await ada.hold()).number == 0
