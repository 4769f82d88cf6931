"""A few clients of a soak that are the published Python SDK, beside the many small ones."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import msgspec
from centrifuge import Client, ClientEventHandler, SubscriptionEventHandler

from tests.soak.account import BROKEN, Account, Subscription
from tests.soak.world import World

NUMBER = 6


class _Connection(ClientEventHandler):
    def __init__(self, account: Account, name: str) -> None:
        self._account = account
        self._name = name

    async def on_disconnected(self, context: Any) -> None:
        final = context.code != 0  # 0: the soak's own call
        self._account.require(not final, "refused", BROKEN, self._name, "connection", f"the SDK stopped: {context!r}")


class _Reader(SubscriptionEventHandler):
    """Reports what the SDK tells its application."""

    def __init__(self, account: Account, book: Subscription) -> None:
        self._account = account
        self._book = book

    async def on_subscribing(self, context: Any) -> None:
        self._book.ended()
        self._book.ask()

    async def on_subscribed(self, context: Any) -> None:
        place = context.stream_position
        self._book.subscribed(place.epoch, place.offset, context.recovered, context.was_recovering, [])

    async def on_publication(self, context: Any) -> None:
        data = context.pub.data
        number = (msgspec.json.decode(data) if isinstance(data, bytes) else data)["n"]
        self._book.publication(context.pub.offset, number)

    async def on_unsubscribed(self, context: Any) -> None:
        self._book.ended()
        final = context.code != 0
        text = f"the SDK unsubscribed: {context!r}"
        self._account.require(not final, "refused", BROKEN, self._book.client, self._book.channel.name, text)


class Readers:
    """The SDK's clients, half of them with Protobuf."""

    def __init__(self, world: World, ports: Sequence[int]) -> None:
        logging.getLogger("centrifuge").setLevel(logging.CRITICAL)
        streams = [channel for name, channel in world.channels.items() if name.startswith("stream:")]
        self._clients = []
        for index in range(NUMBER):
            name, channel = f"SDK {index}", streams[index % len(streams)]
            client = Client(
                f"ws://127.0.0.1:{ports[index % len(ports)]}/connection/websocket",
                events=_Connection(world.account, name),
                use_protobuf=index % 2 > 0,
                data=b'{"user":"SDK"}' if index % 2 else {"user": "SDK"},
                max_reconnect_delay=5.0,
                proxy=None,
            )
            book = Subscription(world.account, name, channel)
            subscription = client.new_subscription(channel.name, events=_Reader(world.account, book))
            self._clients.append((client, subscription))

    async def start(self) -> None:
        for client, subscription in self._clients:
            await client.connect()
            await subscription.subscribe()

    async def close(self) -> None:
        for client, _ in self._clients:
            await client.disconnect()
