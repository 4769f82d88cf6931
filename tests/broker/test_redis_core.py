"""Channels of several nodes on one Redis server."""

from __future__ import annotations

from twisted.internet.defer import Deferred, DeferredList

from realtime.pubsub.engine import AddPresence, Publish, RemovePresence, Subscribe, Unsubscribe
from realtime.types import ClientInfo, HistoryOptions
from tests.broker.redis_nodes import nodes
from tests.redis.deployments import RedisProcess
from tests.redis.relays import LateMessages
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


async def test_after_the_death_of_a_broker_channels_go_on_where_they_were(redis_server: RedisProcess) -> None:
    async with nodes(redis_server.address, 2) as (here, there):
        ours = here.workers[0]
        await ours.engine.ask(Subscribe("news"))
        first = await ours.publish("news", b"1", LONG)
        await here.broker.kill()
        await there.workers[0].publish("news", b"2", LONG)
        await here.restart()
        await until(lambda: ours.log.named("interrupted") != [])
        third = await ours.publish("news", b"3", LONG)
        assert (third.offset, third.epoch) == (3, first.epoch)
        await until(lambda: [one.data for one in ours.log.publications] == [b"1", b"3"])
        assert [one.data for one in (await ours.history("news", LONG)).publications] == [b"1", b"2", b"3"]


async def test_an_answer_waits_for_the_delivery_where_redis_replies_first(redis_server: RedisProcess) -> None:
    """Redis 7.2 and later write a message to its own publisher behind the reply; the relay does it with any version."""
    relay = LateMessages(redis_server.port)
    await relay.start()
    try:
        async with nodes(f"redis://127.0.0.1:{relay.port}") as (node,):
            (bench,) = node.workers
            await bench.engine.ask(Subscribe("news"))
            for history_options in (LONG, HistoryOptions()):
                order: list[object] = []
                bench.log.on_publication = lambda channel, publication, epoch, order=order: order.append(  # type: ignore
                    publication.data
                )
                for number in range(3):
                    bench.engine.ask_then(
                        Publish("news", b"%d" % number, history_options), lambda answer, error, o=order: o.append(error)
                    )
                await until(lambda order=order: len(order) == 6)
                assert order == [b"0", None, b"1", None, b"2", None]
    finally:
        await relay.stop()
