"""The publishers of a soak: programs that call the HTTP API, and clients that publish over their connections."""

from __future__ import annotations

import asyncio
from collections import Counter
from random import Random
from typing import Any

import aiohttp
import msgspec

from tests.soak.account import Channel
from tests.soak.clients import ON, Client, Crowd
from tests.soak.wire import Reply
from tests.soak.world import KEY, World, tags, text

# Seconds for one attempt, and until a publisher gives a publication up.
ATTEMPT = 8.0
PATIENCE = 90.0
FAILURES = (aiohttp.ClientError, OSError, msgspec.DecodeError)


class Numbers:
    """The next number of each channel."""

    def __init__(self) -> None:
        self._last: Counter[str] = Counter()

    def next(self, channel: str) -> int:
        self._last[channel] += 1
        return self._last[channel]


class APIPublisher:
    """A program that publishes to channels of its own, one publication at a time.

    It retries with the same idempotency key until it has an answer, except in channels without history: there every
    publication has one attempt.
    """

    def __init__(
        self, world: World, http: aiohttp.ClientSession, port: int, numbers: Numbers, channels: list[Channel]
    ) -> None:
        self.counts: Counter[str] = Counter()
        self.channels = channels
        self._url = f"http://127.0.0.1:{port}/api/publish"
        self.is_ending = False
        self._world = world
        self._http = http
        self._numbers = numbers

    async def run(self, rate: float, random: Random) -> None:
        """Publish `rate` times a second, until `is_ending`."""
        while not self.is_ending:
            await asyncio.sleep(random.expovariate(rate))
            await self.publish(random.choice(self.channels))

    async def publish(self, channel: Channel) -> None:
        number = self._numbers.next(channel.name)
        body: dict[str, object] = {"channel": channel.name, "data": msgspec.Raw(text(channel.name, number))}
        if channel.size:
            body["idempotency_key"] = f"{channel.name}/{number}"
        if channel.name.startswith("tags:"):
            body["tags"] = tags(number)
        began = channel_now = self._world.account.now()
        channel.ask(number)
        newest = channel.newest()
        while channel_now - began < PATIENCE:
            self.counts["attempts"] += 1
            result = await self._call(msgspec.json.encode(body))
            if result is not None:
                place = (result["epoch"], result["offset"]) if "epoch" in result else None
                channel.accept(number, place, newest)
                return
            if not channel.size:
                break
            await asyncio.sleep(0.2)
            channel_now = self._world.account.now()
        channel.give_up(number)
        self.counts["without an answer"] += 1

    async def _call(self, body: bytes) -> dict[str, Any] | None:
        """Return the result; None if the API refuses the call, or does not answer."""
        limit = aiohttp.ClientTimeout(total=ATTEMPT)
        headers = {"X-API-Key": KEY}
        try:
            async with self._http.post(self._url, data=body, headers=headers, timeout=limit) as answer:
                said = msgspec.json.decode(await answer.read())
        except FAILURES as error:
            self.counts[type(error).__name__] += 1
            return None
        if "result" not in said:
            self.counts[f"status {answer.status}, error {said.get('error', {}).get('code')}"] += 1
            return None
        result: dict[str, Any] = said["result"]
        return result


class Speakers:
    """Clients that publish over their own connections, each time another one."""

    def __init__(self, crowd: Crowd, numbers: Numbers) -> None:
        self.counts: Counter[str] = Counter()
        self._crowd = crowd
        self._numbers = numbers
        self._speakers = [
            (client, part.channel)
            for client in crowd.clients
            for part in client.parts.values()
            if part.channel.startswith("talk:")
        ]

    async def run(self, rate: float, random: Random) -> None:
        while self._speakers:
            await asyncio.sleep(random.expovariate(rate))
            self.speak(*random.choice(self._speakers))

    def speak(self, client: Client, name: str) -> None:
        if client.parts[name].state != ON or client.connection is None or client.connection.is_deaf:
            return
        channel = self._crowd.world.channels[name]
        number = self._numbers.next(name)
        self.counts["attempts"] += 1

        def done(reply: Reply | None) -> None:
            if reply is None:
                self.counts["without an answer"] += 1
            elif reply.error:
                self.counts[f"error {reply.error.code}"] += 1
            else:
                channel.accept(number, None, -1)

        channel.ask(number)
        client.publish(name, number, done)


def share_out(world: World, publishers: int) -> list[list[Channel]]:
    """Return the channels of each publisher of the API, which are fewer than `publishers` if there are fewer channels.
    Each channel has one publisher."""
    channels = [channel for channel in world.channels.values() if not channel.name.startswith("talk:")]
    return [channels[index::publishers] for index in range(min(publishers, len(channels)))]
