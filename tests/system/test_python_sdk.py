"""The official Python SDK, unmodified. It needs an asyncio loop of its own: the one here belongs to the reactor."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from centrifuge import (
    CentrifugeError,
    Client,
    ClientEventHandler,
    ConnectedContext,
    JoinContext,
    LeaveContext,
    PublicationContext,
    SubscribedContext,
    Subscription,
    SubscriptionEventHandler,
)

from tests.system.serving import Server

LIMIT = 20.0


def in_own_loop(coroutine: Coroutine[Any, Any, Any], limit: float = 60.0) -> Any:
    async def limited() -> Any:
        try:
            return await asyncio.wait_for(coroutine, limit)
        finally:
            for _ in range(5):  # transports that were closed or aborted close their sockets in the next turns
                await asyncio.sleep(0)

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, limited()).result()


class ClientEvents(ClientEventHandler):
    def __init__(self) -> None:
        self.connected: asyncio.Queue[ConnectedContext] = asyncio.Queue()

    async def on_connected(self, ctx: ConnectedContext) -> None:
        self.connected.put_nowait(ctx)


class SubscriptionEvents(SubscriptionEventHandler):
    def __init__(self) -> None:
        self.subscribed: asyncio.Queue[SubscribedContext] = asyncio.Queue()
        self.publications: asyncio.Queue[PublicationContext] = asyncio.Queue()
        self.joined: asyncio.Queue[str] = asyncio.Queue()
        self.left: asyncio.Queue[str] = asyncio.Queue()

    async def on_subscribed(self, ctx: SubscribedContext) -> None:
        self.subscribed.put_nowait(ctx)

    async def on_publication(self, ctx: PublicationContext) -> None:
        self.publications.put_nowait(ctx)

    async def on_join(self, ctx: JoinContext) -> None:
        self.joined.put_nowait(ctx.info.user)

    async def on_leave(self, ctx: LeaveContext) -> None:
        self.left.put_nowait(ctx.info.user)


async def soon(awaitable: Awaitable[Any]) -> Any:
    return await asyncio.wait_for(awaitable, LIMIT)


async def connect(endpoint: str, **data: Any) -> tuple[Client, ClientEvents]:
    events = ClientEvents()
    client = Client(endpoint, events=events, data=data, min_reconnect_delay=0.02, max_reconnect_delay=0.5)
    await client.connect()
    return client, events


async def leave(*clients: Client) -> None:
    """Disconnect, and wait until the connections are closed: the end of the loop would leave their sockets open."""
    connections = [client._conn for client in clients]
    for client in clients:
        await client.disconnect()
    for connection in connections:
        await soon(connection.wait_closed())


async def subscribe(client: Client, channel: str) -> tuple[Subscription, SubscriptionEvents]:
    events = SubscriptionEvents()
    subscription = client.new_subscription(channel, events=events)
    await subscription.subscribe()
    return subscription, events


def test_every_command_does_what_the_sdk_expects(server: Server) -> None:
    async def scenario() -> None:
        ada, ada_events = await connect(server.endpoint, user="ada", info={"nick": "Ada"})
        bob, _ = await connect(server.endpoint, user="bob")
        context = await soon(ada_events.connected.get())
        assert context.client and context.version and set(context.data) == {"pid"}

        here, seen = await subscribe(ada, "stream:python")
        subscribed = await soon(seen.subscribed.get())  # before the other joins
        there, elsewhere = await subscribe(bob, "stream:python")
        assert subscribed.recoverable and subscribed.positioned and subscribed.stream_position.epoch
        assert {await soon(seen.joined.get()), await soon(seen.joined.get())} == {"ada", "bob"}

        await here.publish({"n": 1, "текст": "値"})
        publication = await soon(elsewhere.publications.get())
        assert publication.pub.data == {"n": 1, "текст": "値"}
        assert (publication.pub.offset, publication.pub.info.user) == (1, "ada")
        assert publication.pub.info.conn_info == {"nick": "Ada"}

        history = await here.history(limit=10)
        assert [kept.offset for kept in history.publications] == [1]
        assert (history.offset, history.epoch) == (1, subscribed.stream_position.epoch)
        presence = await here.presence()
        assert sorted(info.user for info in presence.clients.values()) == ["ada", "bob"]
        stats = await here.presence_stats()
        assert (stats.num_clients, stats.num_users) == (2, 2)

        assert (await ada.rpc("echo", {"a": [1]})).data == {"a": [1]}
        with pytest.raises(CentrifugeError) as refused:
            await ada.rpc("refuse", {})
        assert "1234" in repr(refused.value) or getattr(refused.value, "code", None) == 1234

        await there.unsubscribe()
        assert await soon(seen.left.get()) == "bob"
        await leave(ada, bob)

    in_own_loop(scenario())


def test_recovery_after_the_connection_broke(server: Server) -> None:
    async def scenario() -> None:
        ada, _ = await connect(server.endpoint, user="ada")
        bob, bob_events = await connect(server.endpoint, user="bob")
        await soon(bob_events.connected.get())
        voice, _ = await subscribe(ada, "stream:python")
        _, seen = await subscribe(bob, "stream:python")
        await soon(seen.subscribed.get())
        await voice.publish(1)
        assert (await soon(seen.publications.get())).pub.data == 1

        # The connection breaks below the SDK; what is said while it is away it has to ask for.
        bob._conn.transport.abort()
        for n in range(2, 52):
            await voice.publish(n)
        back = await soon(seen.subscribed.get())
        assert back.was_recovering and back.recovered
        assert [(await soon(seen.publications.get())).pub.data for _ in range(50)] == list(range(2, 52))
        await leave(ada, bob)

    in_own_loop(scenario())
