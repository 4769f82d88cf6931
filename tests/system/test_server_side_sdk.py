"""What the server begins and limits, over several workers, as the official Python SDK sees it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import jwt
import pytest
from cent import Client as API
from cent import PublishRequest, RefreshRequest, SubscribeRequest, UnsubscribeRequest
from centrifuge import (
    Client,
    ClientEventHandler,
    DisconnectedContext,
    ServerPublicationContext,
    ServerSubscribedContext,
    ServerUnsubscribedContext,
)
from centrifuge.client import DeltaType
from centrifuge.filter import Filter

from tests.system.serving import Server, ServerStarter
from tests.system.test_python_sdk import SubscriptionEvents, in_own_loop, leave, soon

KEPT = {"history_size": 1000, "history_ttl": "600s", "force_recovery": True}
OPEN = {"allow_subscribe_for_client": True}


@pytest.fixture
def server(start_server: ServerStarter) -> Server:
    return start_server(
        client={"subscribe_to_user_personal_channel": {"enabled": True, "single_connection": True}},
        channel={
            "namespaces": [
                {"name": "news", **KEPT},
                {"name": "prices", "allowed_delta_types": ["fossil"], "delta_publish": True, **KEPT, **OPEN},
                {"name": "tagged", "allow_tags_filter": True, **KEPT, **OPEN},
            ]
        },
    )


class Events(ClientEventHandler):
    def __init__(self) -> None:
        self.subscribed: asyncio.Queue[ServerSubscribedContext] = asyncio.Queue()
        self.unsubscribed: asyncio.Queue[str] = asyncio.Queue()
        self.publications: asyncio.Queue[ServerPublicationContext] = asyncio.Queue()
        self.disconnected: asyncio.Queue[int] = asyncio.Queue()

    async def on_subscribed(self, ctx: ServerSubscribedContext) -> None:
        self.subscribed.put_nowait(ctx)

    async def on_unsubscribed(self, ctx: ServerUnsubscribedContext) -> None:
        self.unsubscribed.put_nowait(ctx.channel)

    async def on_publication(self, ctx: ServerPublicationContext) -> None:
        self.publications.put_nowait(ctx)

    async def on_disconnected(self, ctx: DisconnectedContext) -> None:
        self.disconnected.put_nowait(ctx.code)


async def connect(server: Server, **claims: Any) -> tuple[Client, Events]:
    events = Events()
    token = jwt.encode({"sub": "42", **claims}, "secret")
    client = Client(server.endpoint, events=events, token=token, min_reconnect_delay=0.02, max_reconnect_delay=0.5)
    await client.connect()
    return client, events


def quote(n: int) -> dict[str, Any]:
    return {"n": n, "text": "what all quotes have in common is said once, and then only what is new: äöü"}


@pytest.fixture
def api(server: Server) -> Iterator[API]:
    client = API(f"{server.http}/api", "test-key")
    yield client
    client.close()


def test_what_the_server_subscribes(server: Server, api: API) -> None:
    async def tell(request: Any) -> None:
        method = {PublishRequest: api.publish, SubscribeRequest: api.subscribe}.get(type(request))
        method = method or {UnsubscribeRequest: api.unsubscribe, RefreshRequest: api.refresh}[type(request)]
        await asyncio.get_running_loop().run_in_executor(None, method, request)

    async def scenario() -> None:
        client, events = await connect(server, channels=["news:a"])
        begun = {context.channel: context for context in [await soon(events.subscribed.get()) for _ in range(2)]}
        assert begun.keys() == {"news:a", "#42"}
        assert begun["news:a"].recoverable and begun["news:a"].stream_position.epoch
        await tell(PublishRequest(channel="#42", data="to you alone"))
        assert (await soon(events.publications.get())).pub.data == "to you alone"

        # The connection breaks below the SDK; what is said meanwhile comes with the next connect reply.
        await tell(PublishRequest(channel="news:a", data=1))
        assert (await soon(events.publications.get())).pub.offset == 1
        client._conn.transport.abort()
        for n in (2, 3):
            await tell(PublishRequest(channel="news:a", data=n))
        back = {context.channel: context for context in [await soon(events.subscribed.get()) for _ in range(2)]}
        assert back["news:a"].was_recovering and back["news:a"].recovered
        assert [(await soon(events.publications.get())).pub.data for _ in range(2)] == [2, 3]

        # By order of a backend, on whichever worker the client is.
        await tell(SubscribeRequest(user="42", channel="news:b", data={"since": "now"}))
        assert (await soon(events.subscribed.get())).channel == "news:b"
        await tell(PublishRequest(channel="news:b", data="b"))
        assert (await soon(events.publications.get())).channel == "news:b"
        await tell(UnsubscribeRequest(user="42", channel="news:b"))
        assert await soon(events.unsubscribed.get()) == "news:b"

        # Another connection of the same user takes this one's place.
        other, others = await connect(server)
        await soon(others.subscribed.get())
        assert await soon(events.disconnected.get()) == 3504
        # One that has expired comes back.
        await tell(RefreshRequest(user="42", expired=True))
        await soon(others.subscribed.get())
        await leave(other)

    in_own_loop(scenario())


def test_deltas_and_filters(server: Server, api: API) -> None:
    async def tell(channel: str, data: Any, tags: dict[str, str] | None = None) -> None:
        request = PublishRequest(channel=channel, data=data, tags=tags)
        await asyncio.get_running_loop().run_in_executor(None, api.publish, request)

    async def scenario() -> None:
        client, _ = await connect(server)
        prices, tagged = SubscriptionEvents(), SubscriptionEvents()
        await client.new_subscription("prices:a", events=prices, delta=DeltaType.FOSSIL).subscribe()
        wanted = Filter.all(Filter.eq("kind", "gold"), Filter.gte("price", "100"))
        await client.new_subscription("tagged:a", events=tagged, tags_filter=wanted).subscribe()
        await soon(prices.subscribed.get())
        await soon(tagged.subscribed.get())
        for n in range(3):
            await tell("prices:a", quote(n))
        assert [(await soon(prices.publications.get())).pub.data for _ in range(3)] == [quote(n) for n in range(3)]
        for n, price in enumerate(("99", "100", "1e9", "100.5")):
            await tell("tagged:a", n, {"kind": "gold", "price": price})
        assert [(await soon(tagged.publications.get())).pub.data for _ in range(2)] == [1, 3]

        client._conn.transport.abort()
        for n in range(3, 6):
            await tell("prices:a", quote(n))
            await tell("tagged:a", n, {"kind": "gold" if n == 4 else "lead", "price": "101"})
        assert (await soon(prices.subscribed.get())).recovered
        assert (await soon(tagged.subscribed.get())).recovered
        await tell("prices:a", quote(6))
        assert [(await soon(prices.publications.get())).pub.data for _ in range(4)] == [quote(n) for n in range(3, 7)]
        assert (await soon(tagged.publications.get())).pub.data == 4
        await leave(client)

    in_own_loop(scenario())
