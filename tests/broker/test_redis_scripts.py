"""The scripts of channels: keys that hold something else, and positions that can't go on."""

from __future__ import annotations

import pytest

from realtime.errors import ClientError
from realtime.types import HistoryOptions
from tests.broker.redis_nodes import nodes
from tests.redis.deployments import RedisProcess

META, HISTORY = "realtime.meta.{.news}", "realtime.history.{.news}"


@pytest.mark.parametrize("key", [META, HISTORY])
async def test_a_key_with_another_value_fails_its_channel_alone_and_changes_nothing(
    redis_server: RedisProcess, key: str
) -> None:
    async with nodes(redis_server.address) as (node,):
        (bench,) = node.workers
        await bench.publish("news")
        redis_server.command("SET", key, "something else")
        other = HISTORY if key == META else META
        before = redis_server.command("DUMP", other) if other == HISTORY else redis_server.client.get(other)
        for ask in (bench.publish("news"), bench.history("news")):
            with pytest.raises(ClientError) as caught:
                await ask
            assert (caught.value.code, caught.value.temporary) == (100, True)
        after = redis_server.command("DUMP", other) if other == HISTORY else redis_server.client.get(other)
        assert before == after
        assert (await bench.publish("other")).offset == 1


async def test_channels_without_metadata_begin_a_new_epoch_without_history(redis_server: RedisProcess) -> None:
    async with nodes(redis_server.address) as (node,):
        (bench,) = node.workers
        first = await bench.publish("news")
        redis_server.command("DEL", META)
        page = await bench.history("news")
        assert (page.publications, page.position.offset) == ([], 0)
        second = await bench.publish("news")
        assert (second.offset, second.epoch) == (1, page.position.epoch)
        assert second.epoch != first.epoch
        assert [one.offset for one in (await bench.history("news")).publications] == [1]


async def test_a_lost_history_leaves_the_numbering(redis_server: RedisProcess) -> None:
    async with nodes(redis_server.address) as (node,):
        (bench,) = node.workers
        first = await bench.publish("news")
        redis_server.command("DEL", HISTORY)
        second = await bench.publish("news")
        assert (second.offset, second.epoch) == (2, first.epoch)
        assert [one.offset for one in (await bench.history("news")).publications] == [2]


async def test_the_metadata_outlive_the_history(redis_server: RedisProcess) -> None:
    history_options = HistoryOptions(size=10, ttl=60.0, meta_ttl=1.0)
    async with nodes(redis_server.address) as (node,):
        (bench,) = node.workers
        await bench.publish("news", b"1", history_options)
        await bench.publish("news", b"2", history_options, version=1)
        await bench.history("news", history_options)
        assert redis_server.command("PTTL", META) >= redis_server.command("PTTL", HISTORY) > 1000


async def test_a_smaller_size_shortens_a_history(redis_server: RedisProcess) -> None:
    async with nodes(redis_server.address) as (node,):
        (bench,) = node.workers
        for _ in range(8):
            await bench.publish("news")
        await bench.publish("news", b"1", HistoryOptions(size=3, ttl=60.0))
        assert [one.offset for one in (await bench.history("news")).publications] == [7, 8, 9]
