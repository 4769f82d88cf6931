"""Two nodes on one Redis, seen from their workers: presence, orders, limits, and the nodes themselves."""

from __future__ import annotations

import signal
from typing import Any

from twisted.internet import reactor
from twisted.internet.task import deferLater

from realtime.pubsub.engine import (
    AddClient,
    AddPresence,
    AdmitClient,
    GetNodes,
    GetPresence,
    GetPresenceStats,
    RemoveClient,
    RemovePresence,
    ReportSubscriptions,
    SendOrder,
    Subscribe,
    worker_address,
)
from realtime.types import ClientInfo
from tests.broker.redis_nodes import nodes
from tests.pubsub.benches import Bench
from tests.redis.deployments import RedisProcess, RedisStarter
from tests.system.brokers import POLL, until

ALICE = ClientInfo("alice", "client-a", b'{"name":"Alice"}')
BOB = ClientInfo("bob", "client-b")


def present(info: ClientInfo, channel: str = "room") -> AddPresence:
    return AddPresence(channel, info, present=True, announce=True)


async def until_nodes_are(bench: Bench, number: int) -> list[Any]:
    while True:
        found = await bench.engine.ask(GetNodes())
        if len(found) == number:
            return found
        await deferLater(reactor, POLL)


async def until_present(bench: Bench, *infos: ClientInfo) -> None:
    while await bench.engine.ask(GetPresence("room")) != {info.client: info for info in infos}:
        await deferLater(reactor, POLL)


def of(info: ClientInfo, bench: Bench) -> list[str]:
    """Return the joins and leaves of a client that a worker has received. A busy machine may show pairs of them more:
    a node that is silent for long has ended for the others."""
    return [entry[0] for entry in bench.log.entries if entry[-1] == info]


async def test_presence_is_that_of_all_nodes(redis_server: RedisProcess) -> None:
    async with nodes(redis_server.address, 2) as (here, there):
        ours, theirs = here.workers[0], there.workers[0]
        await ours.engine.ask(Subscribe("room"))
        await ours.engine.ask(present(ALICE))
        await theirs.engine.ask(present(BOB))
        assert await ours.engine.ask(GetPresence("room")) == {info.client: info for info in (ALICE, BOB)}
        assert await theirs.engine.ask(GetPresenceStats("room")) == (2, 2)
        await theirs.engine.ask(RemovePresence("room", BOB.client))
        assert await ours.engine.ask(GetPresenceStats("room")) == (1, 1)
        await until(lambda: len(ours.log.entries) == 3)
        assert ours.log.entries == [("joined", "room", ALICE), ("joined", "room", BOB), ("left", "room", BOB)]


async def test_a_paused_node_keeps_its_clients_or_adds_them_again(redis_server: RedisProcess) -> None:
    async with nodes(redis_server.address, 2, presence_ttl=6.0) as (here, paused):
        ours, theirs = here.workers[0], paused.workers[0]
        await ours.engine.ask(Subscribe("room"))
        await ours.engine.ask(present(ALICE))
        await theirs.engine.ask(present(BOB))
        paused.broker.signal(signal.SIGSTOP)
        await until(lambda: of(BOB, ours)[-1:] == ["left"])
        paused.broker.signal(signal.SIGCONT)
        await until_present(ours, ALICE, BOB)
        await until(lambda: len(ours.log.named("joined")) - len(ours.log.named("left")) == 2)
        redis_server.command("FLUSHALL")
        await until_present(ours, ALICE, BOB)
        signs = of(BOB, ours)
        assert signs == ["joined", "left"] * (len(signs) // 2) + ["joined"]


async def test_a_broker_that_restarts_continues_the_presence_of_its_node(redis_server: RedisProcess) -> None:
    async with nodes(redis_server.address, 2, presence_ttl=12.0) as (here, there):
        ours, theirs = here.workers[0], there.workers[0]
        await ours.engine.ask(Subscribe("room"))
        for info in (ALICE, BOB):
            await theirs.engine.ask(present(info))
        await there.broker.kill()
        # It leaves while there is no broker.
        removed = theirs.engine.ask(RemovePresence("room", BOB.client))
        removed.addErrback(lambda failure: None)
        await there.restart()
        await until_present(ours, ALICE)
        await until(lambda: of(BOB, ours)[-1:] == ["left"])
        assert (of(ALICE, ours)[-1], of(ALICE, ours).count("joined")) == ("joined", of(ALICE, ours).count("left") + 1)
        assert len(await until_nodes_are(ours, 2)) == 2


async def test_orders_reach_the_workers_of_all_nodes_or_the_one_that_they_name(redis_server: RedisProcess) -> None:
    async with nodes(redis_server.address, 2, workers=2) as (here, there):
        ours = here.workers[0]
        _, other = await until_nodes_are(ours, 2)
        await until_workers(ours, 2)
        assert await ours.engine.ask(SendOrder(b"to all")) == 4
        assert await ours.engine.ask(SendOrder(b"to one", worker_address(1, 0, other.uid))) == 1
        assert await ours.engine.ask(SendOrder(b"to none", worker_address(1, 0, "no node"))) == 0
        first, second = there.workers
        await until(lambda: second.log.entries == [("order", b"to all"), ("order", b"to one")])
        await until(lambda: first.log.entries == [("order", b"to all")])
        for bench in here.workers:
            assert (await bench.settled()).entries == [("order", b"to all")]


async def until_workers(bench: Bench, workers: int) -> None:
    while [node.workers for node in await bench.engine.ask(GetNodes())] != [workers, workers]:
        await deferLater(reactor, POLL)


async def test_an_order_follows_a_session_to_the_worker_of_its_node(redis_server: RedisProcess) -> None:
    async with nodes(redis_server.address, 2, workers=2) as (here, there):
        ours, (first, second) = here.workers[0], there.workers
        _, other = await until_nodes_are(ours, 2)
        second.engine.claim("batch", ALICE, "secret", [])
        await second.engine.ask(Subscribe("room"))  # the broker knows by then
        order = SendOrder(b"order", worker_address(0, 0, other.uid), "secret")
        assert await ours.engine.ask(order) == 1
        await until(lambda: second.log.entries == [("order", b"order")])
        assert (await first.settled()).entries == []


async def test_connections_of_a_user_are_limited_over_all_nodes(redis_server: RedisProcess) -> None:
    async with nodes(redis_server.address, 2) as (here, there):
        ours, theirs = here.workers[0].engine, there.workers[0].engine
        admitted = [
            await engine.ask(AdmitClient(ClientInfo("alice", f"{number}"), 3))
            for number, engine in enumerate((ours, ours, theirs, theirs))
        ]
        assert admitted == [True, True, True, False]
        ours.tell(RemoveClient("0"))
        while not await theirs.ask(AdmitClient(ClientInfo("alice", "5"), 3)):
            await deferLater(reactor, POLL)
        assert not await ours.ask(AdmitClient(ClientInfo("alice", "6"), 3))
        assert await ours.ask(AdmitClient(ClientInfo("bob", "7"), 1))


async def test_nodes_are_listed_with_their_numbers_until_they_stop(redis_server: RedisProcess) -> None:
    async with nodes(redis_server.address, 2, presence_ttl=2.0) as (here, there):
        ours, theirs = here.workers[0].engine, there.workers[0].engine
        for info in (ALICE, BOB):
            theirs.tell(AddClient(info))
        theirs.tell(ReportSubscriptions(7))
        for engine in (ours, theirs):
            await engine.ask(Subscribe("room"))
        await theirs.ask(present(BOB))
        while True:
            listed = await ours.ask(GetNodes())
            if len(listed) == 2 and listed[1].stats.channels:
                break
            await deferLater(reactor, POLL)
        stats = listed[1].stats
        assert (stats.clients, stats.users, stats.channels, stats.subscriptions) == (2, 2, 1, 7)
        assert listed[0].uid != listed[1].uid
        there.workers[0].engine.close()
        there.broker.signal(signal.SIGTERM)
        await there.broker.gone()
        assert len(await ours.ask(GetNodes())) == 1
        # It has written the leaves of its clients, too.
        assert (await here.workers[0].settled()).named("left") == [("room", BOB)]


async def test_nodes_share_a_cluster(redis_starter: RedisStarter) -> None:
    cluster = redis_starter.cluster(replicas=0)
    async with nodes(cluster.servers[0].address, 2, workers=1) as (here, there):
        ours, theirs = here.workers[0], there.workers[0]
        await until_nodes_are(ours, 2)
        await until_workers(ours, 1)
        assert await ours.engine.ask(SendOrder(b"to all")) == 2
        for number in range(8):  # on all masters
            channel = f"room-{number}"
            await ours.engine.ask(Subscribe(channel))
            await theirs.engine.ask(present(ALICE, channel))
            assert await ours.engine.ask(GetPresence(channel)) == {ALICE.client: ALICE}
            await theirs.engine.ask(RemovePresence(channel, ALICE.client))
            user = f"user-{number}"
            assert await ours.engine.ask(AdmitClient(ClientInfo(user, f"a{number}"), 1))
            assert not await theirs.engine.ask(AdmitClient(ClientInfo(user, f"b{number}"), 1))
        await until(lambda: len(ours.log.named("left")) == 8)
        assert ours.log.named("joined") == ours.log.named("left") == [(f"room-{n}", ALICE) for n in range(8)]
