"""The official SDK on two nodes that share a Redis server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.redis.deployments import RedisProcess
from tests.system.serving import Server, ServerStarter, run_node

pytestmark = pytest.mark.node


@pytest.fixture
def nodes(start_server: ServerStarter, redis_server: RedisProcess) -> Iterator[list[Server]]:
    """Two nodes with one worker each."""
    sections: dict[str, Any] = {
        "workers": {"count": 1},
        "client": {"commands_per_second": 0},
        "engine": {"type": "redis", "redis": {"address": [redis_server.address]}},
    }
    yield [start_server(**sections) for _ in range(2)]


def test_clients_on_two_nodes_exchange_10_000_messages_in_order(nodes: list[Server]) -> None:
    seen = run_node("exchange.mjs", [node.endpoint for node in nodes], 5_000)

    assert seen["workers"] == [worker for node in nodes for worker in node.workers()]
    assert seen["heard"] == [10_000, 10_000]
    assert seen["disorder"] == ["", ""]
    assert seen["outOfTurn"] == ["", ""]


def test_a_client_goes_on_at_another_node_when_its_own_dies(nodes: list[Server], start_server: ServerStarter) -> None:
    dying, other = nodes
    start_server.started.remove(dying)
    pids = [process.pid for process in dying.family()]
    try:
        seen = run_node("nodes.mjs", [dying.port, other.port], pids, 400)
    finally:
        dying.kill()

    assert seen["present"] == [["listener", "speaker"]] * 2
    assert seen["joined"][:2] == ["listener", "speaker"]
    assert seen["heard"] == list(range(1, 401))
    assert seen["subscribed"][1:] == [{"wasRecovering": True, "recovered": True}]
