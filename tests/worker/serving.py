"""A worker in the process of the test, with a real broker process, real sockets and raw clients."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from msgspec.structs import replace
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import TCP4ClientEndpoint, connectProtocol

from realtime.config.settings import (
    AppSettings,
    ChannelOptions,
    ChannelSettings,
    ClientSettings,
    Settings,
    WorkersSettings,
)
from realtime.process.child import Child
from realtime.supervision.vitals import VitalsPage
from realtime.worker.process import Worker
from tests.system.brokers import BrokerProcess
from tests.transports.stage import Client, eventually, handshake, text

MODULE = "tests.worker.worker_app"
OPTIONS = ChannelOptions(
    allow_subscribe_for_client=True,
    allow_subscribe_for_anonymous=True,
    allow_publish_for_client=True,
    allow_publish_for_anonymous=True,
    history_size=10,
    history_ttl=60.0,
)
SETTINGS = replace(
    Settings(),
    app=AppSettings(module=f"{MODULE}:app"),
    client=ClientSettings(allow_anonymous_connect_without_token=True),
    channel=ChannelSettings(without_namespace=OPTIONS),
    workers=WorkersSettings(count=1),  # the supervisor never passes on the default, 0 for one per core
)


class WorkerChild(Child):
    """The child of a supervisor that only counts the requests for another stream to the broker."""

    def __init__(
        self, settings: Settings, listening: socket.socket | None = None, slot: int = 0, generation: int = 0
    ) -> None:
        listen = () if listening is None else (listening.dup().detach(),)
        super().__init__(slot, settings, listen, VitalsPage.create(), reactor, generation=generation)
        self.supervisor = os.getpid()  # as of the broker
        self.lost_links = 0

    def link_lost(self) -> None:
        self.lost_links += 1


class Peer(Client):
    """A WebSocket client that speaks the JSON protocol."""

    def say(self, **command: Any) -> None:
        self.send(text(json.dumps(command)))

    @property
    def messages(self) -> list[Any]:
        """All messages of the server so far."""
        return [json.loads(line) for payload in self.texts for line in payload.splitlines()]

    async def reply(self, id: int) -> Any:
        """Wait for the reply to the command with this id."""

        def replies() -> list[Any]:
            return [message for message in self.messages if message.get("id") == id]

        await eventually(lambda: bool(replies()))
        return replies()[0]


class ServedWorker:
    """A worker that serves."""

    def __init__(
        self,
        settings: Settings,
        listening: socket.socket,
        broker: BrokerProcess,
        slot: int = 0,
        generation: int = 0,
    ) -> None:
        self.listening = listening
        self.broker = broker
        # A worker of the broker's node; the port is not used otherwise, as the socket is there.
        settings = replace(settings, http_server=replace(settings.http_server, port=broker.port))
        self.child = WorkerChild(settings, listening, slot, generation)
        self.worker = Worker(self.child)
        self._is_drained = False

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.listening.getsockname()
        return host, port

    async def start(self) -> None:
        starting = Deferred.fromCoroutine(self.worker.start())
        self.worker.link(self.child.slot, await self.broker.stream(self.child.slot))
        await starting
        self.child.heartbeat.start()

    async def drain(self, timeout: float) -> None:
        """Drain the worker. Idempotent."""
        if not self._is_drained:
            self._is_drained = True
            await self.worker.drain(timeout)

    async def connect(self, **connect: Any) -> Peer:
        """Connect a client, and wait for the reply to its connect command."""
        endpoint = TCP4ClientEndpoint(reactor, *self.listening.getsockname())
        peer: Peer = await connectProtocol(endpoint, Peer())
        await self.open(peer, **connect)
        return peer

    async def open(self, peer: Peer, **connect: Any) -> None:
        peer.send(handshake())
        peer.say(id=1, connect=connect)
        assert "connect" in await peer.reply(1)

    def metric(self, name: str, **labels: str) -> float:
        return next(
            sample.value
            for sample in self.child.metrics.snapshot()
            if sample.name == name and labels.items() <= dict(sample.labels).items()
        )


@asynccontextmanager
async def serving(settings: Settings = SETTINGS) -> AsyncIterator[ServedWorker]:
    """Serve; afterwards the worker is drained, whatever the test did."""
    sys.modules.pop(MODULE, None)  # each worker imports the application anew
    broker = BrokerProcess(settings.engine)
    await broker.start()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        served = ServedWorker(settings, listening, broker)
        try:
            await served.start()
            yield served
        finally:
            served.child.heartbeat.stop()
            await served.drain(0.0)
            await broker.stop()
            served.child.page.close()
