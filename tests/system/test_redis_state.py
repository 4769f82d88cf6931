"""A server whose Redis is away, comes, and denies: what operators and programs see."""

from __future__ import annotations

import json
import urllib.request
from typing import Any

from tests.redis.deployments import PASSWORD, USER, RedisStarter
from tests.system.serving import Server, ServerStarter, wait_until


def publish(server: Server) -> dict[str, Any]:
    """Publish by the HTTP API; the answer."""
    body = json.dumps({"channel": "stream:a", "data": 1}).encode()
    request = urllib.request.Request(f"{server.http}/api/publish", body, {"X-API-Key": "test-key"})
    with urllib.request.urlopen(request, timeout=20) as response:
        answer: dict[str, Any] = json.load(response)
        return answer


def problems(server: Server) -> list[str]:
    return [problem["text"] for problem in server.health()["problems"] if problem["tone"] == "bad"]


def test_a_server_starts_without_redis_and_serves_once_it_is_there(
    redis_starter: RedisStarter, start_server: ServerStarter
) -> None:
    redis = redis_starter.standalone()
    redis.kill()
    address = f"redis://{USER}:{PASSWORD}@{redis.address}"
    server = start_server(workers={"count": 1}, engine={"type": "redis", "redis": {"address": [address]}})

    wait_until(lambda: problems(server), "bad health")
    assert problems(server) == ["Redis servers or Clusters that can't be used: 1; see the log"]
    assert server.operate("/health")[0] == 503
    assert publish(server)["error"]["code"] == 100
    assert f"Redis {redis.address} is away: " in server.log
    assert PASSWORD not in server.log

    redis.start()
    wait_until(lambda: not problems(server), "good health")
    assert publish(server)["result"]["offset"] == 1

    redis.command("ACL", "SETUSER", USER, "-eval", "-evalsha")
    assert publish(server)["error"]["code"] == 100
    wait_until(lambda: problems(server), "bad health")
    assert "denies a permission: engine.redis.user: " in server.log
    assert "give the user the rights of docs/redis.md" in server.log
    redis.command("ACL", "SETUSER", USER, "+eval", "+evalsha")
