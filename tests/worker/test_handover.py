"""Clients move from one worker to another one and notice nothing."""

from __future__ import annotations

from typing import Any

import pytest
from twisted.internet.defer import Deferred

from tests.driving import on_loop
from tests.transports.stage import eventually
from tests.transports.streaming import get
from tests.worker.moving import BIDIRECTIONAL, UNIDIRECTIONAL, Scene, arrive, connect, publish, scene


@on_loop
@pytest.mark.parametrize("slot", [0, 1], ids=["same slot", "other slot"])
async def test_clients_move_and_notice_nothing(slot: int) -> None:
    async with scene(slot) as stage:
        witness = await arrive(stage.target)
        moving = [await arrive(stage.source) for _ in range(70)]
        await eventually(lambda: len(witness.pushes("join")) == 71)  # its own, too
        await publish(witness, stage.target, 1)
        result = await stage.move()
        assert (result["moved"], result["closed"], result["left"], result["reason"]) == (70, 0, 0, "")
        await publish(witness, stage.target, 2)
        await publish(moving[0], stage.target, 3)
        for client in moving:
            await eventually(lambda: client.numbers == [1, 2, 3])  # noqa: B023
            assert [pub["offset"] for pub in client.pushes("pub")] == [1, 2, 3]
        assert stage.counts == (0, 71)
        await witness.say(stage.target, id=7, presence={"channel": "news"})
        assert len((await witness.reply(7))["presence"]["presence"]) == 71
        assert (len(witness.pushes("join")), len(witness.pushes("leave"))) == (71, 0)
        assert stage.source_app.ended == stage.target_app.ended == []
        assert stage.source.metric("realtime_connects") + stage.target.metric("realtime_connects") == 71
        disconnects = [
            sample.name for worker in (stage.source, stage.target) for sample in worker.child.metrics.snapshot()
        ]
        assert "realtime_disconnects" not in disconnects
        assert 70 * 200 < result["bytes"] < 70 * 2000
        await moving[0].say(stage.target, id=9, unsubscribe={"channel": "news"})
        await moving[0].reply(9)
        await eventually(lambda: len(witness.pushes("leave")) == 1)
        for client in (witness, *moving):
            client.leave()
        await eventually(lambda: stage.counts == (0, 0))
        await eventually(lambda: len(stage.target_app.ended) == 71)


@on_loop
async def test_clients_of_every_transport_move_while_others_publish() -> None:
    async with scene(1) as stage:
        witness = await arrive(stage.target)
        moving = [await arrive(stage.source, kind) for kind in (*BIDIRECTIONAL, *UNIDIRECTIONAL)]
        await publish(witness, stage.target, *range(10))
        handed: list[Any] = []
        Deferred.fromCoroutine(stage.move(7)).addCallback(handed.append)
        number = 10
        while not handed:
            await publish(witness, stage.target, number)
            number += 1
        assert (handed[0]["moved"], handed[0]["closed"], handed[0]["left"]) == (7, 0, 0)
        await publish(witness, stage.target, number)
        for client in moving:
            await eventually(lambda: number in client.numbers)  # noqa: B023
            assert client.numbers == list(range(number + 1))
        # Commands posted to either worker, and to none in particular by a WebSocket, find their session.
        for client in moving[: len(BIDIRECTIONAL)]:
            await client.say(stage.source, id=5, rpc={"method": "echo", "data": client.kind})
            await client.say(stage.target, id=6, rpc={"method": "echo", "data": client.kind})
            for id in (5, 6):
                assert (await client.reply(id))["rpc"]["data"] == client.kind
        assert len(witness.pushes("leave")) == 0
        for client in (witness, *moving):
            client.leave()
        await eventually(lambda: len(ends(stage)) == 8)


def ends(stage: Scene) -> list[tuple[str, int]]:
    return [*stage.source_app.ended, *stage.target_app.ended]


@on_loop
async def test_a_command_under_way_is_answered_first_and_commands_behind_it_go_along() -> None:
    async with scene() as stage:
        client = await arrive(stage.source)
        client.client.send(
            client.command(id=3, rpc={"method": "late", "data": 0.3})
            + client.command(id=4, rpc={"method": "echo", "data": 4})
            + client.command(id=5, rpc={"method": "echo", "data": 5})
        )
        await eventually(lambda: stage.source.metric("realtime_commands", command="rpc") == 1)
        assert (await stage.move())["moved"] == 1
        assert (await client.reply(3))["rpc"] == {"data": "done"}
        assert [(await client.reply(id))["rpc"]["data"] for id in (4, 5)] == [4, 5]
        assert stage.target.metric("realtime_commands", command="rpc") == 2
        client.leave()


@on_loop
async def test_a_client_whose_command_takes_too_long_stays_and_goes_on() -> None:
    async with scene() as stage:
        client, other = await arrive(stage.source), await arrive(stage.source)
        client.client.send(client.command(id=3, rpc={"method": "late", "data": 1.0}))
        await eventually(lambda: stage.source.metric("realtime_commands", command="rpc") == 1)
        result = await stage.move(timeout=0.2)
        assert (result["moved"], result["closed"], result["left"]) == (1, 0, 1)
        assert result["failures"] == [{"reason": "busy", "count": 1}]
        client.client.send(client.command(id=4, rpc={"method": "echo", "data": 4}))
        assert (await client.reply(3))["rpc"] == {"data": "done"}
        assert (await client.reply(4))["rpc"] == {"data": 4}
        assert stage.counts == (1, 1)
        client.leave()
        other.leave()


@on_loop
async def test_the_state_of_the_application_moves_along_or_keeps_its_connection() -> None:
    async with scene() as stage:
        client, other = await arrive(stage.source), await arrive(stage.source)
        await client.say(stage.source, id=3, rpc={"method": "remember", "data": [1, {"a": None}]})
        await client.reply(3)
        await other.say(stage.source, id=3, rpc={"method": "keep a function"})
        await other.reply(3)
        result = await stage.move()
        assert (result["moved"], result["closed"], result["left"]) == (1, 0, 1)
        assert result["failures"] == [{"reason": "state", "count": 1}]
        await client.say(stage.target, id=4, rpc={"method": "recall"})
        assert (await client.reply(4))["rpc"] == {"data": [1, {"a": None}]}
        await other.say(stage.source, id=4, rpc={"method": "echo", "data": 4})
        assert (await other.reply(4))["rpc"] == {"data": 4}
        client.leave()
        other.leave()


@on_loop
async def test_some_of_the_connections_move_and_come_back() -> None:
    async with scene(1) as stage:
        clients = [await arrive(stage.source) for _ in range(5)]
        stream = await arrive(stage.target, "http_stream")
        assert (await stage.move(2))["moved"] == 2
        assert stage.counts == (3, 3)
        stage.source, stage.target = stage.target, stage.source
        assert (await stage.move(3))["moved"] == 3
        assert stage.counts == (0, 6)
        stage.source, stage.target = stage.target, stage.source
        assert (await stage.move(4))["moved"] == 4
        await publish(stream, stage.source, 1)
        for client in (*clients, stream):
            await eventually(lambda: client.numbers == [1])  # noqa: B023
            client.leave()


@on_loop
async def test_connections_between_two_requests_and_before_the_first_one_move_too() -> None:
    async with scene() as stage:
        silent, kept, answered = [await connect(stage.source) for _ in range(3)]
        answered.send(get("/connection/init", "Connection: close"))
        kept.send(get("/nowhere"))
        await eventually(lambda: kept.status == answered.status == 404)
        await eventually(lambda: stage.source.metric("realtime_pending_connections") == 1)
        result = await stage.move()
        assert (result["moved"], result["closed"], result["left"], result["reason"]) == (0, 0, 0, "")
        assert stage.target.metric("realtime_pending_connections") == 2
        kept.received.clear()
        kept.send(get("/nowhere"))
        await eventually(lambda: kept.status == 404)
        assert b"Connection: close" not in kept.response
        client = await arrive(stage.target, client=silent)
        await publish(client, stage.target, 1)
        kept.leave()
        client.leave()
