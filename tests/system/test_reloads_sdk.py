"""The official SDKs, unmodified, across reloads: none of their clients notices one."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from centrifuge import Client, ClientEventHandler, SubscriptionEventHandler

from tests.system.serving import BASE, Server, ServerStarter, run_node
from tests.system.test_deltas_sdk import PRICES
from tests.system.test_streams_sdk import EVERYTHING

CHANNEL = "prices:sdk"


def noting(name: str) -> Any:
    """Return a method that notes an event which a reload must not cause."""

    async def note(self: Any, context: Any) -> None:
        self.changes.append(name)

    return note


class Connection(ClientEventHandler):
    def __init__(self, changes: list[str]) -> None:
        self.changes = changes

    on_connecting, on_connected, on_disconnected = map(noting, ("connecting", "connected", "disconnected"))
    on_error = noting("error")


class Reader(SubscriptionEventHandler):
    def __init__(self, changes: list[str]) -> None:
        self.changes = changes
        self.offsets: list[int] = []

    on_subscribing, on_subscribed, on_unsubscribed = map(noting, ("subscribing", "subscribed", "unsubscribed"))
    on_join, on_leave, on_error = map(noting, ("join", "leave", "subscription error"))

    async def on_publication(self, ctx: Any) -> None:
        self.offsets.append(ctx.pub.offset)


class PythonClients:
    """Two clients of the Python SDK in a loop of their own, in JSON and in Protobuf."""

    def __init__(self, endpoint: str) -> None:
        self.readers: list[Reader] = []
        self._endpoint = endpoint
        self._ready, self._stop = threading.Event(), threading.Event()

    async def _run(self) -> None:
        clients = []
        for binary in (False, True):
            reader = Reader([])
            data = {"user": f"python {binary}"}
            client = Client(
                self._endpoint,
                events=Connection(reader.changes),
                use_protobuf=binary,
                data=json.dumps(data).encode() if binary else data,
                proxy=None,
            )
            await client.connect()
            subscription = client.new_subscription(CHANNEL, events=reader)
            await subscription.subscribe()
            await subscription.ready(timeout=20)
            reader.changes.clear()
            clients.append(client)
            self.readers.append(reader)
        self._ready.set()
        await asyncio.to_thread(self._stop.wait)
        connections = [client._conn for client in clients]
        self.changes = [list(reader.changes) for reader in self.readers]
        for client in clients:
            await client.disconnect()
        for connection in connections:
            await connection.wait_closed()

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        with ThreadPoolExecutor(1) as thread:
            running = thread.submit(asyncio.run, self._run())
            running.add_done_callback(lambda _: self._ready.set())
            self._ready.wait()
            try:
                yield
            finally:
                self._stop.set()
            running.result()


def reloading(server: Server) -> list[str]:
    return [str(Path(sys.executable).with_name("realtime")), "reload", f"--port={server.operator_port}"]


@pytest.mark.browser
@pytest.mark.node
@pytest.mark.timeout(300)
def test_no_client_of_an_sdk_notices_a_reload(start_server: ServerStarter, pytestconfig: pytest.Config) -> None:
    server = start_server(**EVERYTHING, channel={"namespaces": [*BASE["channel"]["namespaces"], PRICES]})
    times = pytestconfig.getoption("reloads")
    python = PythonClients(server.endpoint)
    with python.listening():
        seen = run_node("reloads.mjs", server.http, reloading(server), times, 5, limit=250)

    assert seen["failed"] == []
    for name, client in seen["clients"].items():
        assert client["changes"] == [], name
        assert client["heard"] == [seen["published"]] * 2, name
        assert client["disorder"] == ["", ""] and client["right"], name
        assert client["processes"] == times + 1, name
    assert python.changes == [[], []]
    for reader in python.readers:
        assert reader.offsets == list(range(1, seen["published"] + 1))
