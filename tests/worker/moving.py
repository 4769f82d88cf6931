"""Two workers in the process of a test, with a real broker, and clients of every transport that move between them."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import ModuleType
from typing import Any, Protocol

from msgspec.structs import replace
from twisted.internet import reactor
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
from realtime.process.fd_stream import stream_pair
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


class Served(Protocol):
    """Something that clients can connect to."""

    @property
    def address(self) -> tuple[str, int]: ...


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

    async def say(self, via: Served, **command: Any) -> None:
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


async def connect(served: Served) -> Client:
    endpoint = TCP4ClientEndpoint(reactor, *served.address)
    client: Client = await connectProtocol(endpoint, Client())
    return client


async def arrive(
    served: Served, kind: str = "websocket json", client: Client | None = None, **subscribe: Any
) -> Moving:
    """Connect a client to a worker, and subscribe it to "news". client: connected already; None for a new one."""
    moving = Moving(kind, client or await connect(served))
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


async def publish(moving: Moving, via: Served, *numbers: int) -> None:
    """Publish these numbers, one after the other."""
    for number in numbers:
        await moving.say(via, id=1000 + number, publish={"channel": "news", "data": {"n": number}})
        assert "publish" in await moving.reply(1000 + number)
