"""Connections move from one worker to another one, over a real broker. Both workers are in the process of the test."""

from __future__ import annotations

import json
import os
import resource
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import ModuleType
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import TCP4ClientEndpoint, connectProtocol

from realtime.config.settings import (
    AppSettings,
    ChannelSettings,
    HTTPStreamSettings,
    SSESettings,
    UniHTTPStreamSettings,
    UniSSESettings,
    UniWebSocketSettings,
)
from realtime.process.fd_stream import FdStream, stream_pair
from realtime.worker import handover
from realtime.worker.handover import VERSION, Accepted, Expected, Offered, Refused, Taken
from tests.driving import on_loop
from tests.protocol.sessions import from_protobuf, in_protobuf
from tests.system.brokers import BrokerProcess
from tests.transports.stage import Client, eventually, frame, handshake, text
from tests.transports.streaming import events, lines, post
from tests.worker.serving import SETTINGS, ServedWorker

MODULE = "tests.worker.handover_app"
OPTIONS = replace(
    SETTINGS.channel.without_namespace,
    presence=True,
    join_leave=True,
    force_push_join_leave=True,
    allow_presence_for_subscriber=True,
    allow_presence_for_anonymous=True,
)
HANDOVER = replace(
    SETTINGS,
    app=AppSettings(module=f"{MODULE}:app"),
    channel=ChannelSettings(without_namespace=OPTIONS),
    client=replace(SETTINGS.client, connection_limit_per_address=100),
    sse=SSESettings(enabled=True),
    http_stream=HTTPStreamSettings(enabled=True),
    uni_sse=UniSSESettings(enabled=True),
    uni_http_stream=UniHTTPStreamSettings(enabled=True),
    uni_websocket=UniWebSocketSettings(enabled=True),
)


class Scene:
    """Two workers. source_app, target_app: their applications."""

    def __init__(self, source: ServedWorker, target: ServedWorker, source_app: ModuleType, target_app: ModuleType):
        self.source = source
        self.target = target
        self.source_app = source_app
        self.target_app = target_app

    async def move(self, connections: int = -1, timeout: float = 10.0) -> dict[str, Any]:
        ours, theirs = stream_pair()
        self.target.worker.take_over(theirs.detach())
        return await self.source.worker.hand_over(ours.detach(), connections, timeout)

    @property
    def counts(self) -> tuple[float, float]:
        """The connections of source and target."""
        return self.source.metric("realtime_connections"), self.target.metric("realtime_connections")


async def start(broker: BrokerProcess, slot: int, generation: int) -> tuple[ServedWorker, ModuleType]:
    sys.modules.pop(MODULE, None)  # each worker imports the application anew
    listening = socket.create_server(("127.0.0.1", 0))
    served = ServedWorker(HANDOVER, listening, broker, slot, generation)
    await served.start()
    return served, sys.modules[MODULE]


@asynccontextmanager
async def scene(slot: int = 0) -> AsyncIterator[Scene]:
    """Serve with two workers. slot: that of the target; the source has the slot 0."""
    broker = BrokerProcess(SETTINGS.engine)
    await broker.start()
    workers = [await start(broker, 0, 0), await start(broker, slot, 1)]
    try:
        yield Scene(workers[0][0], workers[1][0], workers[0][1], workers[1][1])
    finally:
        for served, _ in workers:
            served.child.heartbeat.stop()
            await served.drain(0.0)
            served.listening.close()
            served.child.page.close()
        await broker.stop()


class Moving:
    """A client of one transport, with the interface that the tests need. channel "news" from the beginning on."""

    def __init__(self, kind: str, client: Client) -> None:
        self.kind = kind
        self.client = client
        self.secret = self.node = ""

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The messages of the server, without pings."""
        if self.kind == "websocket protobuf":
            found = [from_protobuf(payload) for opcode, payload in self.client.frames if opcode == 2]
        elif "websocket" in self.kind:
            found = [json.loads(part) for whole in self.client.texts for part in whole.splitlines()]
        else:
            found = (events if "sse" in self.kind else lines)(self.client)
        return [message for message in found if message]

    def pushes(self, name: str) -> list[Any]:
        found = [message.get("push", message) for message in self.messages if "id" not in message]
        return [push[name] for push in found if name in push]

    @property
    def numbers(self) -> list[int]:
        """The numbers in the publications that the client has received."""
        return [pub["data"]["n"] for pub in self.pushes("pub")]

    async def reply(self, id: int) -> Any:
        found: list[Any] = []

        def arrived() -> bool:
            found[:] = [message for message in self.messages if message.get("id") == id]
            return bool(found)

        await eventually(arrived)
        assert len(found) == 1
        return found[0]

    def command(self, **command: Any) -> bytes:
        """A command, encoded and framed, for a WebSocket."""
        if self.kind == "websocket protobuf":
            return frame(2, in_protobuf(command))
        return text(json.dumps(command))

    async def say(self, via: ServedWorker, **command: Any) -> None:
        """Send a command. via: the worker that a stream's client posts it to."""
        if "websocket" in self.kind:
            self.client.send(self.command(**command))
            return
        body = json.dumps({"session": self.secret, "node": self.node, "data": json.dumps(command)})
        poster = await connect(via)
        poster.send(post("/emulation", body.encode(), "Content-Type: application/json"))
        await eventually(lambda: bool(poster.status))
        assert poster.status == 204
        poster.leave()

    def leave(self) -> None:
        self.client.leave()


UNIDIRECTIONAL = ["uni_websocket", "uni_sse", "uni_http_stream"]
BIDIRECTIONAL = ["websocket json", "websocket protobuf", "sse", "http_stream"]


async def connect(served: ServedWorker) -> Client:
    endpoint = TCP4ClientEndpoint(reactor, *served.listening.getsockname())
    client: Client = await connectProtocol(endpoint, Client())
    return client


async def arrive(served: ServedWorker, kind: str = "websocket json", **subscribe: Any) -> Moving:
    """Connect a client to a worker, and subscribe it to "news"."""
    moving = Moving(kind, await connect(served))
    if kind in UNIDIRECTIONAL:
        request = json.dumps({"subs": {"news": subscribe}})
        if kind == "uni_websocket":
            moving.client.send(handshake(path="/connection/uni_websocket") + text(request))
        else:
            moving.client.send(post(f"/connection/{kind}", request.encode()))
        await eventually(lambda: bool(moving.pushes("connect")))
        return moving
    if "websocket" in kind:
        query = "?cf_protocol=protobuf" if "protobuf" in kind else ""
        moving.client.send(handshake(path=f"/connection/websocket{query}") + moving.command(id=1, connect={}))
    else:
        moving.client.send(post(f"/connection/{kind}", b'{"id":1,"connect":{}}'))
    result = (await moving.reply(1))["connect"]
    moving.secret, moving.node = result.get("session", ""), result.get("node", "")
    await moving.say(served, id=2, subscribe={"channel": "news", **subscribe})
    assert "subscribe" in await moving.reply(2)
    return moving


async def publish(moving: Moving, via: ServedWorker, *numbers: int) -> None:
    """Publish these numbers, one after the other."""
    for number in numbers:
        await moving.say(via, id=1000 + number, publish={"channel": "news", "data": {"n": number}})
        assert "publish" in await moving.reply(1000 + number)


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
        assert stage.source.metric("realtime_handovers", direction="out") == 70
        assert stage.target.metric("realtime_handovers", direction="in") == 70
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
        client.client.send(client.command(id=4, rpc={"method": "echo", "data": 4}))
        assert (await client.reply(3))["rpc"] == {"data": "done"}
        assert (await client.reply(4))["rpc"] == {"data": 4}
        assert stage.counts == (1, 1)
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


# Failures


class Target:
    """The target's end of a hand-over, in the hands of the test. answers: by the kind of the source's message."""

    def __init__(self, **answers: Any) -> None:
        self.answers = answers
        self.received: list[str] = []
        self.descriptors: list[int] = []
        ours, self.theirs = stream_pair()
        self.stream = FdStream(reactor, ours.detach(), self._receive, lambda: self.received.append("end"))

    def _receive(self, body: bytes, descriptors: list[int]) -> None:
        message = handover._decode_at_target(body)
        kind = type(message).__name__.lower()
        self.received.append(kind)
        self.descriptors += descriptors
        answer = self.answers.get(kind)
        if answer is None:
            return
        if answer == "close":
            self.stream.close()
            return
        if isinstance(answer, Expected):
            answer = replace(answer, batch=message.batch)
        self.stream.send(msgspec.msgpack.encode(answer))

    def close(self) -> None:
        self.stream.close()
        for descriptor in self.descriptors:
            os.close(descriptor)


async def hand_over_to(stage: Scene, target: Target, timeout: float = 10.0) -> dict[str, Any]:
    result: dict[str, Any] = await stage.source.worker.hand_over(target.theirs.detach(), -1, timeout)
    target.close()
    return result


@on_loop
@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        ({"offered": Accepted(VERSION + 1, "0-1")}, "version"),
        ({"offered": Refused("it is drained")}, "it is drained"),
        ({"offered": Taken([])}, "no acceptance"),
        ({"offered": "close"}, "has ended"),
        ({"offered": Accepted(VERSION, "0-1"), "announced": "close"}, "has ended"),
        ({"offered": Accepted(VERSION, "0-1"), "announced": Refused("no descriptors")}, "no descriptors"),
        ({"offered": Accepted(VERSION, "9-9"), "announced": Expected("")}, "the broker did not move"),
    ],
    ids=["version", "refused", "no acceptance", "ends", "ends later", "refused later", "no such target"],
)
async def test_a_failure_before_the_cut_leaves_the_clients_at_their_worker(
    answers: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handover, "_FAILURE_PAUSE", 0.0)
    async with scene() as stage:
        client = await arrive(stage.source)
        result = await hand_over_to(stage, Target(**answers))
        assert (result["moved"], result["closed"], result["left"]) == (0, 0, 1)
        assert reason in result["reason"]
        await publish(client, stage.source, 1)
        await eventually(lambda: client.numbers == [1])
        client.leave()


@on_loop
@pytest.mark.parametrize("answer", ["close", None, Taken([False, False])], ids=["ends", "silent", "refuses"])
async def test_clients_that_the_target_does_not_claim_are_closed_with_3001(
    answer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handover, "ANSWER_TIMEOUT", 0.2)
    async with scene() as stage:
        client, stream = await arrive(stage.source), await arrive(stage.source, "http_stream")
        target = Target(offered=Accepted(VERSION, "0-1"), announced=Expected(""), moved=answer)
        result = await hand_over_to(stage, target)
        assert (result["moved"], result["closed"], result["left"]) == (0, 2, 0)
        assert await client.client.closed() == (3001, "shutdown")
        await eventually(lambda: stream.client.lost)
        assert stream.pushes("disconnect") == [{"code": 3001, "reason": "shutdown"}]
        await eventually(lambda: sorted(code for _, code in stage.source_app.ended) == [3001, 3001])
        client.leave()
        await eventually(lambda: stage.counts == (0, 0))


@on_loop
async def test_clients_that_the_target_has_claimed_before_its_end_are_closed_without_a_frame() -> None:
    async with scene() as stage:
        client = await arrive(stage.source)
        target = Target(offered=Accepted(VERSION, "0-1"), announced=Expected(""))
        handed: list[Any] = []
        Deferred.fromCoroutine(stage.source.worker.hand_over(target.theirs.detach(), -1, 10.0)).addCallback(
            handed.append
        )
        await eventually(lambda: len(target.descriptors) == 2)
        assert os.eventfd_read(target.descriptors[0]) == 1
        target.close()
        await eventually(lambda: bool(handed) and client.client.lost)
        assert client.client.close is None


@on_loop
async def test_a_target_without_free_descriptors_takes_nothing_and_the_clients_come_back() -> None:
    async with scene() as stage:
        clients = [await arrive(stage.source) for _ in range(3)]
        ours, theirs = stream_pair()
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        send = FdStream.send

        def send_and_limit(self: FdStream, body: bytes, descriptors: Any = ()) -> None:
            send(self, body, descriptors)
            if descriptors:
                free = os.dup(0)
                os.close(free)
                resource.setrlimit(resource.RLIMIT_NOFILE, (free + 2, limits[1]))  # room for the claim and one other

        stage.target.worker.take_over(theirs.detach())
        FdStream.send = send_and_limit  # type: ignore[method-assign]
        try:
            result = await stage.source.worker.hand_over(ours.detach(), -1, 10.0)
        finally:
            FdStream.send = send  # type: ignore[method-assign]
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert (result["moved"], result["closed"]) == (0, 3)
        for client in clients:
            assert (await client.client.closed())[0] == 3001
            client.leave()
        assert stage.target.metric("realtime_handover_failures", reason="descriptors") == 3


@on_loop
async def test_a_source_that_ends_after_the_cut_leaves_no_client_behind() -> None:
    async with scene() as stage:
        witness = await arrive(stage.target)
        client = await arrive(stage.source)
        ours, theirs = stream_pair()
        stage.target.worker.take_over(theirs.detach())
        send = FdStream.send

        def die_instead(self: FdStream, body: bytes, descriptors: Any = ()) -> None:
            if descriptors:
                self.close()
            else:
                send(self, body)

        FdStream.send = die_instead  # type: ignore[method-assign]
        try:
            result = await stage.source.worker.hand_over(ours.detach(), -1, 10.0)
        finally:
            FdStream.send = send  # type: ignore[method-assign]
        assert (result["moved"], result["closed"]) == (0, 1)
        await eventually(lambda: len(witness.pushes("leave")) == 1)
        assert (await client.client.closed())[0] == 3001
        client.leave()
        witness.leave()


@on_loop
async def test_a_target_refuses_another_version() -> None:
    async with scene() as stage:
        ours, theirs = stream_pair()
        stage.target.worker.take_over(theirs.detach())
        received: list[Any] = []
        stream = FdStream(
            reactor,
            ours.detach(),
            lambda body, descriptors: received.append(handover._decode_at_source(body)),
            lambda: None,
        )
        stream.send(msgspec.msgpack.encode(Offered(VERSION + 1, "0-9")))
        await eventually(lambda: bool(received))
        assert isinstance(received[0], Refused)
        stream.close()
