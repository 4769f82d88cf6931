"""The official SDKs in Protobuf, alone and beside clients that speak JSON."""

from __future__ import annotations

import asyncio
import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jwt
import pytest
from centrifuge import (
    CentrifugeError,
    Client,
    PublicationContext,
    SubscribedContext,
    Subscription,
    SubscriptionEventHandler,
)

from tests.system.serving import ServerStarter, run_node

LIMIT = 20.0
NOISE = bytes(range(256))


def token(**claims: object) -> str:
    return jwt.encode(claims, "secret", algorithm="HS256")


@pytest.mark.node
def test_the_javascript_sdk(start_server: ServerStarter) -> None:
    server = start_server(client={"ping_interval": "1s", "pong_timeout": "900ms"}, http_stream={"enabled": True})
    now = int(time.time())
    tokens = {
        "brief": token(sub="7", exp=now + 3),
        "renewed": token(sub="7", exp=now + 3600),
        "channel": token(sub="7", channel="$private", exp=now + 3),
        "renewedChannel": token(sub="7", channel="$private", exp=now + 3600),
    }
    seen = run_node("binary.mjs", server.endpoint, server.http, server.port, tokens)

    spoken = [
        [1, {"from": "ada", "текст": [1, None]}, "ada"],
        [2, {"from": "bob", "текст": [2.5]}, "bob"],
        [3, {"lines": 2}, "ada"],
    ]
    assert set(seen["contextData"]) == {"pid"}
    assert seen["subscribed"]["recoverable"] and seen["subscribed"]["streamPosition"]["epoch"]
    assert seen["joins"] == ["ada", "bob", "eve"] and seen["leaves"] == ["bob", "ada"]
    assert seen["atAda"] == seen["atBob"] == spoken
    assert seen["nick"] == {"nick": "Ada"}
    assert seen["presence"] == ["ada", "bob", "eve"] and seen["stats"] == [3, 3]
    assert seen["history"] == [publication[:2] for publication in spoken] and seen["since"] == [2, 3]
    assert seen["echoed"] == {"a": [1, "ü"]}
    assert seen["echoedNoise"] == [NOISE.hex()] * 2
    assert seen["errors"]["missing"] == {"code": 104, "message": "method not found", "temporary": False}
    assert seen["errors"]["publishing"]["code"] == 103
    assert seen["recovery"] == [True, True, ""] and seen["recovered"] == list(range(20))
    assert seen["noise"] == [NOISE.hex()] * 3 and seen["noiseHistory"] == [NOISE.hex()]
    gap = {"code": 2500, "reason": "insufficient state", "wasRecovering": True, "recovered": False}
    assert seen["refused"] == gap
    assert seen["renewals"] == ["connection", "subscription"] and seen["keptSubscriptions"] == 1
    assert set(seen["states"]) == {"connected"}


@pytest.mark.browser
@pytest.mark.node
def test_the_javascript_sdk_in_chromium(start_server: ServerStarter) -> None:
    server = start_server(http_stream={"enabled": True})
    seen = run_node("binary_page.mjs", server.http, server.endpoint, server.port)

    spoken = [[1, {"from": "ada", "текст": [1, None]}, "ada"], [2, {"from": "bob"}, "bob"]]
    missed = [[3 + n, n, "bob"] for n in range(5)]
    for transport in ("websocket", "http_stream"):
        at = seen[transport]
        assert at["used"] == transport
        assert at["echoed"] == NOISE.hex()
        assert at["heard"] == at["atBob"] == spoken + missed
        assert at["subscribed"] == [[False, False], [True, True]]


class SubscriptionEvents(SubscriptionEventHandler):
    def __init__(self) -> None:
        self.subscribed: asyncio.Queue[SubscribedContext] = asyncio.Queue()
        self.publications: asyncio.Queue[PublicationContext] = asyncio.Queue()

    async def on_subscribed(self, ctx: SubscribedContext) -> None:
        self.subscribed.put_nowait(ctx)

    async def on_publication(self, ctx: PublicationContext) -> None:
        self.publications.put_nowait(ctx)

    async def data(self) -> Any:
        return (await asyncio.wait_for(self.publications.get(), LIMIT)).pub.data


async def subscribe(client: Client, channel: str) -> tuple[Subscription, SubscriptionEvents, SubscribedContext]:
    events = SubscriptionEvents()
    subscription = client.new_subscription(channel, events=events)
    await subscription.subscribe()
    return subscription, events, await asyncio.wait_for(events.subscribed.get(), LIMIT)


async def leave(*clients: Client) -> None:
    connections = [client._conn for client in clients]
    for client in clients:
        await client.disconnect()
    for connection in connections:
        await asyncio.wait_for(connection.wait_closed(), LIMIT)


def test_the_python_sdk(start_server: ServerStarter) -> None:
    server = start_server()
    now = int(time.time())
    renewals = []

    async def renewed() -> str:
        renewals.append(1)
        return token(sub="ada", exp=now + 3600)

    async def scenario() -> None:
        again = {"min_reconnect_delay": 0.02, "max_reconnect_delay": 0.5}
        ada = Client(
            server.endpoint, use_protobuf=True, token=token(sub="ada", exp=now + 3), get_token=renewed, **again
        )
        eve = Client(server.endpoint, use_protobuf=True, data=b'{"user":"eve","info":{"nick":"Eve"}}', **again)
        bob = Client(server.endpoint, data={"user": "bob"})
        for client in (ada, eve, bob):
            await client.connect()
        here, at_ada, subscribed = await subscribe(ada, "stream:mixed")
        _, at_eve, _ = await subscribe(eve, "stream:mixed")
        there, at_bob, _ = await subscribe(bob, "stream:mixed")
        assert subscribed.recoverable and subscribed.stream_position.epoch

        await here.publish('{"from": "ada", "n": 1.50, "текст": "値"}'.encode())
        await there.publish({"from": "bob"})
        for events in (at_ada, at_eve):
            assert await events.data() == '{"from": "ada", "n": 1.50, "текст": "値"}'.encode()
            assert json.loads(await events.data()) == {"from": "bob"}
        assert await at_bob.data() == {"from": "ada", "n": 1.5, "текст": "値"}
        assert await at_bob.data() == {"from": "bob"}

        history = await here.history(limit=10)
        assert [kept.offset for kept in history.publications] == [1, 2]
        assert (history.offset, history.epoch) == (2, subscribed.stream_position.epoch)
        presence = await here.presence()
        infos = {info.user: info.conn_info for info in presence.clients.values()}
        assert set(infos) == {"ada", "bob", "eve"} and json.loads(infos["eve"]) == {"nick": "Eve"}
        stats = await here.presence_stats()
        assert (stats.num_clients, stats.num_users) == (3, 3)
        assert (await ada.rpc("echo", NOISE)).data == NOISE
        assert json.loads((await ada.rpc("in_thread", b"{}")).data)["user"] == "ada"
        with pytest.raises(CentrifugeError):
            await ada.rpc("refuse", b"{}")

        # Cut off below the SDK, one of them recovers what it missed.
        eve._conn.transport.abort()
        for n in range(20):
            await there.publish(n)
        back = await asyncio.wait_for(at_eve.subscribed.get(), LIMIT)
        assert back.was_recovering and back.recovered
        assert [await at_eve.data() for _ in range(20)] == [str(n).encode() for n in range(20)]

        # Bytes that are no text reach Protobuf clients. For a JSON client they are a gap: it subscribes again at once.
        await here.publish(NOISE)
        assert await at_eve.data() == NOISE
        again = await asyncio.wait_for(at_bob.subscribed.get(), LIMIT)
        assert again.was_recovering and not again.recovered
        kept = await here.history(limit=1, reverse=True)
        assert [publication.data for publication in kept.publications] == [NOISE]

        while not renewals:
            await asyncio.sleep(0.05)
        assert (await ada.rpc("echo", b"still here")).data == b"still here"
        await leave(ada, eve, bob)

    with ThreadPoolExecutor(1) as thread:
        thread.submit(asyncio.run, asyncio.wait_for(scenario(), 60)).result()
    assert renewals == [1]
