"""Facts of servers: versions, fitness, risks."""

from __future__ import annotations

from dataclasses import replace

import pytest

from realtime.redis.faults import ServerFacts
from tests.redis.deployments import RedisProcess


def facts(**fields: str) -> ServerFacts:
    known = {"redis_version": "8.2.9", "redis_mode": "standalone", "role": "master", "run_id": "a", "loading": "0"}
    known |= {"master_replid": "b", "maxmemory_policy": "noeviction"}
    return ServerFacts.parse("".join(f"{name}:{value}\r\n" for name, value in (known | fields).items()).encode())


def test_the_facts_of_a_real_server_are_found(redis_server: RedisProcess) -> None:
    found = ServerFacts.parse(str(redis_server.command("INFO")).encode())
    assert (found.mode, found.role, found.loading, found.unfitness) == ("standalone", "master", "0", "")
    assert found.version == redis_server.info("server")["redis_version"] or found.product == "Valkey"
    others = [replace(found, run_id="other"), replace(found, replication_id="other")]
    assert len({each.generation for each in (found, *others)}) == 3


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"redis_version": "6.0.16"}, "Redis 6.0.16 is too old; upgrade it to 6.2 or later"),
        ({"loading": "1"}, "loading its data"),
        ({"cluster_state": "fail"}, "its Cluster is down"),
        ({"redis_mode": "sentinel"}, "this is a Sentinel; use engine.redis.sentinel_address"),
        ({"run_id": ""}, "engine.redis.user: INFO has no run id"),
    ],
)
def test_an_unfit_server_is_named(fields: dict[str, str], reason: str) -> None:
    assert reason in facts(**fields).unfitness


@pytest.mark.parametrize(
    ("fields", "warning"),
    [
        ({"redis_version": "6.2.19"}, "upgrade it to 6.2.20 or later"),
        ({"redis_version": "7.0.15"}, "gets no fixes from its authors"),
        ({"redis_version": "7.2.4", "server_name": "valkey", "valkey_version": "8.1.3"}, "Valkey 8.1.3 has known"),
        ({"maxmemory_policy": "allkeys-lru"}, "maxmemory-policy is allkeys-lru"),
        ({"maxmemory_policy": "volatile-ttl"}, "maxmemory-policy is volatile-ttl"),
    ],
)
def test_a_risk_is_one_warning(fields: dict[str, str], warning: str) -> None:
    [line] = facts(**fields).warnings
    assert warning in line


@pytest.mark.parametrize("version", ["6.2.20", "8.2.2", "8.4.0", "9.0.0"])
def test_a_patched_server_has_no_warning(version: str) -> None:
    assert facts(redis_version=version).warnings == []


def test_only_nodes_of_newer_clusters_have_sharded_channels() -> None:
    assert facts(redis_mode="cluster", redis_version="7.0.0").has_sharded_channels
    assert not facts(redis_mode="cluster", redis_version="6.2.20").has_sharded_channels
    assert not facts(redis_mode="standalone").has_sharded_channels
