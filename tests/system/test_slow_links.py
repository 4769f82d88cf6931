"""Clients behind slow links recover all that they missed, however long it takes: the official SDKs, unmodified."""

from __future__ import annotations

import asyncio
import json
from contextlib import closing
from typing import Any

import jwt
import pytest
from cent import Client as API
from cent import PublishRequest
from centrifuge import Client, DisconnectedContext, ErrorContext

from tests.system.serving import Server, ServerStarter, run_node
from tests.system.slow_link import SlowLink
from tests.system.test_python_sdk import ClientEvents, SubscriptionEvents, in_own_loop, leave, soon

BULK = {
    "name": "bulk",
    "history_size": 1000,
    "history_ttl": "600s",
    "force_recovery": True,
    "allow_subscribe_for_client": True,
}


@pytest.fixture
def server(start_server: ServerStarter) -> Server:
    # A machine that is busy with other things is not the subject.
    return start_server(
        channel={"namespaces": [BULK]},
        http_stream={"enabled": True},
        client={"recovery_max_publication_limit": 300},
        loop={"max_lag": "5s"},
        websocket={"write_timeout": "10s"},
    )


def replays(server: Server, event: str) -> int:
    lines = server.operate("/metrics")[1].splitlines()
    return sum(
        int(float(line.split()[-1]))
        for line in lines
        if line.startswith("realtime_recovery_replays") and f'event="{event}"' in line
    )


@pytest.mark.node
def test_the_javascript_sdk_recovers_over_20_50_and_100_kilobytes_a_second(server: Server) -> None:
    token = jwt.encode({"sub": "42", "channels": [f"bulk:of-token-{n}" for n in range(8)]}, "secret")
    with (
        SlowLink(server.port, 20e3) as slowest,
        SlowLink(server.port, 50e3) as slow,
        SlowLink(server.port, 1e5) as link,
    ):
        seen = run_node("slow_links.mjs", server.http, slowest.port, slow.port, link.port, token)
    healthy = {"disorder": "", "errors": []}
    assert seen["one"] == {"heard": 245, "recovered": [True, True], "cutIn": True, **healthy}
    assert seen["eight"] == {"heard": 600, "recovered": [True] * 8, **healthy}
    assert seen["streamed"] == {
        "heard": 50,
        "recovered": [True],
        "echoed": {"a": 1},
        "answeredMeanwhile": True,
        **healthy,
    }
    assert replays(server, "begun") >= replays(server, "completed") >= 10
    assert replays(server, "lost") == 0


class Events(ClientEvents):
    def __init__(self) -> None:
        super().__init__()
        self.codes: list[int] = []
        self.errors: list[Any] = []

    async def on_disconnected(self, ctx: DisconnectedContext) -> None:
        self.codes.append(ctx.code)

    async def on_error(self, ctx: ErrorContext) -> None:
        self.errors.append(ctx.error)


async def recover_over(port: int, api: API, channel: str, *, use_protobuf: bool) -> None:
    """Miss 230 publications, and have the connection break in the middle of their recovery."""

    async def publish(numbers: range) -> None:
        for n in numbers:
            request = PublishRequest(channel=channel, data={"n": n, "text": "x" * 2000})
            await asyncio.get_running_loop().run_in_executor(None, api.publish, request)

    events, seen = Events(), SubscriptionEvents()
    endpoint = f"ws://127.0.0.1:{port}/connection/websocket{'?format=protobuf' if use_protobuf else ''}"
    client = Client(endpoint, events=events, use_protobuf=use_protobuf, min_reconnect_delay=0.02)
    await client.connect()
    await client.new_subscription(channel, events=seen).subscribe()
    await soon(seen.subscribed.get())
    await client.disconnect()
    await publish(range(1, 231))
    await client.connect()
    back = await soon(seen.subscribed.get())
    assert back.was_recovering and back.recovered and back.stream_position.offset == 0
    heard = [(await soon(seen.publications.get())).pub for _ in range(100)]
    # The SDK goes on from the last publication that it has received.
    client._conn.transport.abort()
    await publish(range(231, 236))
    again = await soon(seen.subscribed.get())
    assert again.recovered and 100 <= again.stream_position.offset < 230
    heard += [(await soon(seen.publications.get())).pub for _ in range(135)]
    await publish(range(236, 238))
    heard += [(await soon(seen.publications.get())).pub for _ in range(2)]
    contents = [json.loads(pub.data) if use_protobuf else pub.data for pub in heard]
    assert [pub.offset for pub in heard] == [content["n"] for content in contents] == list(range(1, 238))
    assert not events.errors
    await leave(client)


def test_the_python_sdk_recovers_over_50_kilobytes_a_second(server: Server) -> None:
    async def scenario(api: API, port: int, other: int) -> None:
        await asyncio.gather(
            recover_over(port, api, "bulk:json", use_protobuf=False),
            recover_over(other, api, "bulk:protobuf", use_protobuf=True),
        )

    with (
        closing(API(f"{server.http}/api", "test-key")) as api,
        SlowLink(server.port, 50e3) as link,
        SlowLink(server.port, 50e3) as other,
    ):
        in_own_loop(scenario(api, link.port, other.port))
    assert replays(server, "begun") >= 4
