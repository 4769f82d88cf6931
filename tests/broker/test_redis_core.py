"""Channels of several nodes on one Redis server."""

from __future__ import annotations

from twisted.internet.defer import Deferred, DeferredList

from realtime.pubsub.engine import AddPresence, RemovePresence, Subscribe, Unsubscribe
from realtime.types import ClientInfo, HistoryOptions
from tests.broker.redis_nodes import nodes
from tests.redis.deployments import RedisProcess
from tests.system.brokers import until

ALICE = ClientInfo("alice", "client-a", b'{"name":"Alice"}')
LONG = HistoryOptions(size=1000, ttl=60.0)


async def test_publications_of_all_nodes_reach_all_nodes_in_the_order_of_their_offsets(
    redis_server: RedisProcess,
) -> None:
    async with nodes(redis_server.address, 2) as (here, there):
        ours, theirs = here.workers[0], there.workers[0]
        for bench in (ours, theirs):
            await bench.engine.ask(Subscribe("news"))
        await DeferredList(
            [
                Deferred.fromCoroutine(bench.publish("news", b"%d" % number, LONG))
                for number in range(200)
                for bench in (ours, theirs)
            ]
        )
        await until(lambda: len(ours.log.publications) == len(theirs.log.publications) == 400)
        assert ours.log.entries == theirs.log.entries
        assert [publication.offset for publication in ours.log.publications] == list(range(1, 401))
        page = await theirs.history("news", LONG)
        assert page.publications == ours.log.publications


async def test_joins_and_leaves_reach_all_nodes(redis_server: RedisProcess) -> None:
    async with nodes(redis_server.address, 2) as (here, there):
        await there.workers[0].engine.ask(Subscribe("news"))
        await here.workers[0].engine.ask(AddPresence("news", ALICE, present=True, announce=True))
        await here.workers[0].engine.ask(RemovePresence("news", ALICE.client))
        await until(lambda: len(there.workers[0].log.entries) == 2)
        assert there.workers[0].log.entries == [("joined", "news", ALICE), ("left", "news", ALICE)]


async def test_a_channel_is_subscribed_at_redis_from_the_first_route_to_the_last(redis_server: RedisProcess) -> None:
    def receivers() -> int:
        return int(redis_server.command("PUBSUB", "NUMSUB", "realtime.channel.{.news}")[1])

    async with nodes(redis_server.address, 1, workers=2) as (node,):
        first, second = node.workers
        await first.engine.ask(Subscribe("news"))
        await second.engine.ask(Subscribe("news"))
        assert receivers() == 1
        first.engine.tell(Unsubscribe("news"))
        await second.publish("news")
        assert receivers() == 1
        second.engine.tell(Unsubscribe("news"))
        await second.engine.ask(Subscribe("news"))
        await second.publish("news")
        second.engine.tell(Unsubscribe("news"))
        await until(lambda: receivers() == 0)
        assert len((await first.settled()).entries) == 0
        assert len((await second.settled()).entries) == 2


async def test_an_idempotency_key_counts_on_all_nodes(redis_server: RedisProcess) -> None:
    async with nodes(redis_server.address, 2) as (here, there):
        first = await here.workers[0].publish("news", idempotency_key="k")
        await here.workers[0].publish("news")
        assert await there.workers[0].publish("news", idempotency_key="k") == first


async def test_two_deployments_with_different_prefixes_share_a_server(redis_server: RedisProcess) -> None:
    async with (
        nodes(redis_server.address, prefix="one") as (here,),
        nodes(redis_server.address, prefix="two") as (there,),
    ):
        await there.workers[0].engine.ask(Subscribe("news"))
        await here.workers[0].publish("news")
        assert (await there.workers[0].history("news")).publications == []
        assert (await there.workers[0].settled()).entries == []
