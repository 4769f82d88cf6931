"""The broker process with Redis."""

from __future__ import annotations

import socket

import pytest

from realtime.broker.redis_process import RedisBrokerService
from realtime.errors import ClientError
from tests.broker.redis_nodes import nodes
from tests.redis.deployments import RedisStarter
from tests.system.brokers import until


async def test_it_starts_without_redis_and_serves_once_redis_is_there(redis_starter: RedisStarter) -> None:
    redis = redis_starter.standalone()
    redis.kill()
    async with nodes(redis.address) as (node,):
        (bench,) = node.workers
        with pytest.raises(ClientError) as caught:
            await bench.publish("news")
        assert (caught.value.code, caught.value.temporary) == (100, True)
        redis.start()
        offsets = []

        async def publishes() -> None:
            while not offsets:
                try:
                    offsets.append((await bench.publish("news")).offset)
                except ClientError:
                    await until(lambda: True)

        await publishes()
        assert offsets == [1]


async def test_it_hands_no_state_over() -> None:
    ours, theirs = socket.socketpair()
    service = RedisBrokerService.__new__(RedisBrokerService)
    with ours:
        answer = await service.hand_over(theirs.detach(), -1, 1.0)
        assert answer["reason"] == "a broker with Redis can't hand its state over; restart the server"
        assert ours.recv(1) == b"", "the other process does not wait"
