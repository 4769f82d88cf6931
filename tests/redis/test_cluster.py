"""A Cluster: the right node for each key, and what happens when slots and masters change."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_twisted

from realtime.config.settings import RedisSettings
from realtime.errors import EngineUnavailable
from realtime.redis.faults import ServerFacts
from realtime.redis.keys import key
from realtime.redis.scripts import Script
from tests.conftest import PROGRAMS
from tests.redis.deployments import RedisCluster, RedisProcess, RedisStarter
from tests.redis.users import User
from tests.system.brokers import until

NAMES = ["", "news", "a}b", "{x", "chat:1", "chat:2", "chat:3", "é"]
PUBLISH = Script("redis.call('SET', KEYS[1], ARGV[1]) redis.call('SPUBLISH', KEYS[2], ARGV[2]) return ARGV[1]")


@pytest.fixture(scope="module", params=PROGRAMS)
def cluster(request: pytest.FixtureRequest) -> Iterator[RedisCluster]:
    starter = RedisStarter(program=request.param)
    yield starter.cluster()
    starter.finish()


@pytest_twisted.async_yield_fixture
async def user(cluster: RedisCluster) -> AsyncIterator[User]:
    user = User(RedisSettings(cluster_address=(cluster.addresses,)))
    await user.ready()
    yield user
    await user.close()


def value(name: str) -> bytes:
    return key("realtime", "x", name)


def channel(name: str) -> bytes:
    return key("realtime", "c", name)


def other_master(cluster: RedisCluster, owner: RedisProcess) -> RedisProcess:
    return next(
        server for server in cluster.servers if server is not owner and server.info("replication")["role"] == "master"
    )


async def publish(user: User, name: str, payload: str) -> bytes:
    keys = [value(name), channel(name)]
    return await user.run(PUBLISH, keys, [payload], of=name)


@pytest_twisted.ensureDeferred
async def test_each_name_has_the_node_with_its_keys_and_its_channel(user: User, cluster: RedisCluster) -> None:
    for name in NAMES:
        assert user.servers.of(name).name == cluster.owner(value(name).decode()).address
        await user.subscribe(channel(name), of=name)
        await publish(user, name, "1")
        assert await user.call("GET", value(name), of=name) == user.servers.of(name).generation.encode()
    assert user.messages == [(channel(name), b"1") for name in NAMES]
    assert len({server.generation for server in user.servers.servers}) == len(user.servers.servers) == 3
    assert user.value("realtime_redis_errors") == 0


@pytest_twisted.ensureDeferred
async def test_a_moved_slot_has_its_new_node_from_the_first_command_on(user: User, cluster: RedisCluster) -> None:
    owner = cluster.owner(value("news").decode())
    target = other_master(cluster, owner)
    await user.subscribe(channel("news"), of="news")
    await publish(user, "news", "0")
    moves, stale = user.moves, user.servers.of("news").generation
    cluster.move_slot(value("news").decode(), target)
    # The command that finds out gets the answer of the other node, with that node's generation.
    generation = await publish(user, "news", "1")
    await until(lambda: user.moves > moves and user.servers.of("news").name == target.address)
    assert generation == user.servers.of("news").generation.encode() != stale.encode()
    await user.subscribe(channel("news"), of="news")
    await publish(user, "news", "2")
    assert user.messages[-1] == (channel("news"), b"2")
    assert user.value("realtime_redis_away") == 0


@pytest_twisted.ensureDeferred
async def test_a_moved_slot_without_commands_is_noticed_by_its_subscription(user: User, cluster: RedisCluster) -> None:
    owner = cluster.owner(value("chat:1").decode())
    target = other_master(cluster, owner)
    await user.subscribe(channel("chat:1"), of="chat:1")
    cluster.move_slot(value("chat:1").decode(), target)
    await until(lambda: user.servers.of("chat:1").name == target.address)
    assert user.moves > 1


@pytest_twisted.ensureDeferred
async def test_an_unsubscription_that_crosses_a_moved_slot_keeps_the_order_of_replies(
    user: User, cluster: RedisCluster
) -> None:
    before = user.servers.of("news")
    await user.subscribe(channel("news"), of="news")
    # Both happens in one turn of the loop: the node has ended the subscription before it is asked to.
    cluster.move_slot(value("news").decode(), other_master(cluster, cluster.owner(value("news").decode())))
    left = user.unsubscribe(channel("news"), of="news")
    answers = [user.echo(before, text) for text in ("a", "b")]
    await left
    assert [await answer for answer in answers] == [b"a", b"b"]


@pytest_twisted.ensureDeferred
async def test_an_older_cluster_forwards_messages_to_all_nodes(
    cluster: RedisCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ServerFacts, "has_sharded_channels", False)
    users = [User(RedisSettings(cluster_address=(cluster.addresses,))) for _ in range(2)]
    try:
        for user in users:
            await user.ready()
        for name in NAMES:
            await users[0].subscribe(channel(name), of=name)
            await users[1].call("PUBLISH", channel(name), "1", of=name)
        await until(lambda: len(users[0].messages) == len(NAMES))
    finally:
        for user in users:
            await user.close()


@pytest_twisted.ensureDeferred
async def test_commands_follow_keys_that_are_on_their_way(user: User, cluster: RedisCluster) -> None:
    owner = cluster.owner(value("chat:2").decode())
    target = other_master(cluster, owner)
    slot = owner.command("CLUSTER", "KEYSLOT", value("chat:2"))
    await user.call("SET", value("chat:2"), "before", of="chat:2")
    target.command("CLUSTER", "SETSLOT", slot, "IMPORTING", owner.command("CLUSTER", "MYID"))
    owner.command("CLUSTER", "SETSLOT", slot, "MIGRATING", target.command("CLUSTER", "MYID"))
    assert await user.call("GET", value("chat:2"), of="chat:2") == b"before"
    owner.command("MIGRATE", "127.0.0.1", target.port, value("chat:2"), 0, 5000)
    assert await user.call("GET", value("chat:2"), of="chat:2") == b"before"  # by ASK
    with pytest.raises(EngineUnavailable, match="TRYAGAIN"):  # half of the keys are there, also at the second attempt
        await user.call("MSET", value("chat:2"), "1", b"{.chat:2}", "2", of="chat:2")
    cluster.move_slot(value("chat:2").decode(), target)
    assert await user.call("GET", value("chat:2"), of="chat:2") == b"before"


@pytest_twisted.ensureDeferred
async def test_a_replica_takes_over_from_a_killed_master_with_another_generation(
    user: User, cluster: RedisCluster
) -> None:
    owner = cluster.owner(value("chat:3").decode())
    before = user.servers.of("chat:3").generation
    owner.kill()
    await until(lambda: not user.servers.of("chat:3").is_ready)
    with pytest.raises(EngineUnavailable):
        await user.call("GET", value("chat:3"), of="chat:3")
    assert user.value("realtime_redis_away") == 1
    await user.ready()
    assert user.servers.of("chat:3").name != owner.address
    assert user.servers.of("chat:3").generation != before
    await user.call("SET", value("chat:3"), "1", of="chat:3")
    owner.start()


@pytest_twisted.ensureDeferred
async def test_a_cluster_behind_a_plain_address_is_used_whole(cluster: RedisCluster) -> None:
    user = User(RedisSettings(address=(f"redis://{cluster.living.address}",)))
    try:
        await user.ready()
        assert len(user.servers.servers) == 3
        for name in NAMES:
            assert user.servers.of(name).name == cluster.owner(value(name).decode()).address
    finally:
        await user.close()


@pytest_twisted.ensureDeferred
async def test_a_cluster_that_starts_later_is_connected_to(redis_starter: RedisStarter) -> None:
    late = redis_starter.cluster(masters=1, replicas=0)
    late.servers[0].kill()
    user = User(RedisSettings(cluster_address=(late.addresses,)))
    try:
        with pytest.raises(EngineUnavailable):
            await user.call("GET", "x")
        assert user.value("realtime_redis_away") == 1
        late.servers[0].start()
        await user.ready()
        assert await user.call("GET", "x") is None
    finally:
        await user.close()
