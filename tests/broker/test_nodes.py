"""The registry of nodes in a real Redis, and the orders between nodes in this process."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_twisted
from twisted.internet.defer import Deferred

from realtime.broker.nodes import ALL, SUPERSEDED, NodeOrder, Nodes
from realtime.config.settings import RedisSettings
from realtime.metrics import Metrics
from realtime.pubsub.history import make_epoch
from realtime.redis.servers import RedisServer
from realtime.types import EngineStats, NodeInfo
from tests.redis.deployments import RedisProcess
from tests.redis.users import User
from tests.system.brokers import until

DEAD_AFTER = 30.0

pytestmark = pytest.mark.timeout(60)


class Node(User):
    """One run of a node's broker. now: its clock. pause: seconds by which Redis' answers come from the past."""

    def __init__(self, redis: RedisProcess, uid: str, workers: int = 1) -> None:
        self.now = 1000.0
        self.run_name = make_epoch()
        self.workers = workers
        self.orders: list[NodeOrder] = []
        self.ended: list[str] = []
        self.uid = uid
        self.nodes = Nodes(
            self.run_name,
            lambda: NodeInfo(uid, f"name of {uid}", "1.0", 5.0, EngineStats(1, 2, 3, 4), self.workers),
            lambda name: self.server,
            str.encode,
            b"nodes",
            self.orders.append,
            self.ended.append,
            DEAD_AFTER,
            lambda: self.now,
            Metrics(),
        )
        super().__init__(RedisSettings(address=(redis.address,)))

    def on_message(self, server: RedisServer, channel: bytes, payload: bytes) -> None:
        self.nodes.on_message(payload)

    def on_ready(self, server: RedisServer) -> None:
        for topic in (ALL, self.uid):
            server.subscribe(topic.encode())
        self.nodes.on_ready()

    def on_lost(self, server: RedisServer, reason: str) -> None:
        self.nodes.on_lost()

    async def look(self) -> list[str]:
        """Announce this run; return the ids of the nodes that it knows then."""
        self.nodes.announce()
        await self.settle()
        return [info.uid for info in self.nodes.infos()]

    async def settle(self) -> None:
        for _ in range(2):
            await self.call("PING")


@pytest_twisted.async_yield_fixture
async def nodes(redis_server: RedisProcess) -> AsyncIterator[list[Node]]:
    made = [
        Node(redis_server, "node-1"),
        Node(redis_server, "node-2", workers=2),
        Node(redis_server, "node-3", workers=4),
    ]
    for node in made:
        await node.ready()
        await node.settle()
    yield made
    for node in made:
        await node.close()


async def answer(send: Any, *arguments: Any) -> int:
    outcome: Deferred[int] = Deferred()
    send(*arguments, lambda count, error: outcome.callback(count) if error is None else outcome.errback(error))
    return await outcome


def pass_time(nodes: list[Node], seconds: float) -> None:
    for node in nodes:
        node.now += seconds


async def move_clocks(redis: RedisProcess, seconds: int, nodes: list[Node], awake: list[Node]) -> None:
    """Let time pass, during which only some nodes announce themselves. Redis' own clock can't be set, so announcements
    grow older instead."""
    for _ in range(seconds):
        pass_time(nodes, 1.0)
        script = """
            for _, run in ipairs(redis.call('HKEYS', 'nodes')) do
              local value = redis.call('HGET', 'nodes', run)
              local time = string.format('%016d', tonumber(string.sub(value, 1, 16)) - 1000)
              redis.call('HSET', 'nodes', run, time .. string.sub(value, 17))
            end"""
        redis.command("EVAL", script, 0)
        for node in awake:
            await node.look()


@pytest_twisted.ensureDeferred
async def test_nodes_know_each_other_at_once_with_their_numbers(nodes: list[Node]) -> None:
    first, second, third = nodes
    for node in nodes:
        others = sorted({"node-1", "node-2", "node-3"} - {node.uid})
        await until(lambda node=node, others=others: [i.uid for i in node.nodes.infos()] == [node.uid, *others])  # type: ignore[misc]
    info = first.nodes.infos()[2]
    assert (info.name, info.version, info.stats, info.workers) == ("name of node-3", "1.0", EngineStats(1, 2, 3, 4), 4)
    third.workers = 5
    third.nodes.tick()
    await until(lambda: first.nodes.infos()[2].workers == 5)
    assert not any(first.nodes.is_dead(node.run_name) for node in nodes)
    left: Deferred[Any] = Deferred()
    second.nodes.leave(lambda reply, error: left.callback(error))
    assert await left is None
    await until(lambda: first.nodes.is_dead(second.run_name))
    assert (await first.look(), first.ended) == (["node-1", "node-3"], [second.run_name])


@pytest_twisted.ensureDeferred
async def test_orders_reach_all_other_nodes_or_one(nodes: list[Node]) -> None:
    first, second, third = nodes
    await first.look()
    assert await answer(first.nodes.send_to_all, b"to all") == 6
    assert await answer(first.nodes.send_to, "node-2", "node-2/0-1", "secret", b"to one") == 1
    assert await answer(first.nodes.send_to, "node-4", "node-4/0-1", "", b"to none") == 0
    for node in nodes:
        await node.settle()
    to_all = NodeOrder(1, "node-1", b"to all")
    assert second.orders == [to_all, NodeOrder(1, "node-1", b"to one", "node-2/0-1", "secret")]
    assert (third.orders, first.orders) == ([to_all], [])
    assert second.nodes.on_message(b"\xff of strangers") is None


@pytest_twisted.ensureDeferred
async def test_a_silent_node_is_no_longer_listed_and_then_dead(redis_server: RedisProcess, nodes: list[Node]) -> None:
    first, second, third = nodes
    await move_clocks(redis_server, 5, nodes, [first, second])
    assert await first.look() == ["node-1", "node-2", "node-3"]
    await move_clocks(redis_server, 3, nodes, [first, second])
    assert await first.look() == ["node-1", "node-2"]
    assert not first.nodes.is_dead(third.run_name)
    await move_clocks(redis_server, 30, nodes, [first, second])
    assert first.nodes.is_dead(third.run_name) and first.ended == [third.run_name]
    # It comes back, and has seen nothing of the others meanwhile.
    assert await third.look() == ["node-3", "node-1", "node-2"]
    assert not third.nodes.is_dead(first.run_name)
    await first.look()
    assert not first.nodes.is_dead(third.run_name)


@pytest_twisted.ensureDeferred
async def test_no_node_is_dead_for_one_that_has_not_watched(redis_server: RedisProcess, nodes: list[Node]) -> None:
    first, second, _ = nodes
    await first.look()
    unknown = make_epoch()
    assert not first.nodes.is_dead(unknown)
    # Neither this node nor Redis was there.
    pass_time(nodes, 10 * DEAD_AFTER)
    await first.look()
    assert not any(first.nodes.is_dead(run) for run in (unknown, second.run_name))
    await move_clocks(redis_server, 32, nodes, [first])
    assert all(first.nodes.is_dead(run) for run in (unknown, second.run_name))
    # Its connection to Redis was cut.
    first.nodes.on_lost()
    assert not any(first.nodes.is_dead(run) for run in (unknown, second.run_name))


@pytest_twisted.ensureDeferred
async def test_the_next_run_of_a_node_ends_the_earlier_one(redis_server: RedisProcess, nodes: list[Node]) -> None:
    first, second, _ = nodes
    again = Node(redis_server, "node-2", workers=3)
    try:
        await again.ready()
        await again.settle()
        await first.settle()
        for node in (first, again):
            assert [info.workers for info in node.nodes.infos() if info.uid == "node-2"] == [3]
            assert not node.nodes.is_dead(second.run_name)  # its clients are about to come back
            node.now += SUPERSEDED + 1
            assert node.nodes.is_dead(second.run_name) and not node.nodes.is_dead(again.run_name)
    finally:
        await again.close()
