"""Positioned subscribers and publishers of a channel, at the workers of a node.

A `Reader` follows a channel as the hub does, and fails on what a positioned client must never see.
"""

from __future__ import annotations

from twisted.internet import reactor
from twisted.internet.defer import Deferred, DeferredList
from twisted.internet.task import deferLater

from realtime.errors import ClientError, EngineUnavailable
from realtime.pubsub.engine import Subscribe
from realtime.types import HistoryOptions, Position
from tests.pubsub.benches import Bench
from tests.system.brokers import POLL, until

KEEP = HistoryOptions(size=10_000, ttl=600.0)


class Reader:
    """A positioned subscriber of a channel at one worker. told: how often it had to start anew.

    stays: whether nothing but the next publications has arrived so far.
    """

    def __init__(self, bench: Bench, channel: str) -> None:
        self.bench = bench
        self.channel = channel
        self.read = 0
        self.told = 0
        self.position: Position | None = None
        self.seen: dict[tuple[str, int], bytes] = {}

    async def subscribe(self) -> None:
        await self.bench.engine.ask(Subscribe(self.channel))
        self.position = (await self.bench.history(self.channel, KEEP, limit=0)).position
        self.read = len(self.bench.log.entries)

    def follow(self) -> None:
        """Read what has arrived."""
        for entry in self.bench.log.entries[self.read :]:
            self.read += 1
            if entry[0] == "missed" and entry[1] == self.channel and entry[2]:
                self.told += 1
                self.position = None
            elif entry[0] == "published" and entry[1] == self.channel:
                self._publication(*entry[2:])

    def _publication(self, data: bytes, offset: int, epoch: str) -> None:
        last = self.position
        if last is not None and last.epoch == epoch:
            if offset <= last.offset:
                assert self.seen.get((epoch, offset), data) == data, "two publications with one position"
                return
            assert offset == last.offset + 1, f"a gap after {last}: {offset}"
        elif last is not None:
            self.told += 1  # as the hub breaks at another epoch
        assert self.seen.setdefault((epoch, offset), data) == data
        self.position = Position(offset, epoch)

    def has_all(self, publisher: Publisher) -> None:
        """Check that every accepted publication was seen at its position."""
        for data, position in publisher.accepted.items():
            assert self.seen[position.epoch, position.offset] == data


class Publisher:
    """Publishes numbers. accepted: positions by number."""

    def __init__(self, bench: Bench, channel: str, start: int = 0) -> None:
        self.bench = bench
        self.channel = channel
        self.next = start
        self.accepted: dict[bytes, Position] = {}
        self.refused = 0

    @property
    def has_positions_of_its_own(self) -> bool:
        """Whether no two accepted publications share a position."""
        return len({(position.epoch, position.offset) for position in self.accepted.values()}) == len(self.accepted)

    async def publish(self) -> None:
        data = b"%d" % self.next
        self.next += 1
        try:
            self.accepted[data] = await self.bench.publish(self.channel, data, KEEP)
        except ClientError as error:
            assert (error.code, error.temporary) == (100, True)
            self.refused += 1
        except EngineUnavailable:
            self.refused += 1

    async def burst(self, count: int) -> None:
        await DeferredList([Deferred.fromCoroutine(self.publish()) for _ in range(count)])

    async def until_accepted(self) -> Position:
        before = len(self.accepted)
        while len(self.accepted) == before:
            await self.publish()
            await deferLater(reactor, POLL)
        return next(reversed(self.accepted.values()))


async def caught_up(reader: Reader, position: Position) -> None:
    """Return when the reader has a publication at this position."""

    def has() -> bool:
        reader.follow()
        return (position.epoch, position.offset) in reader.seen

    await until(has)


async def meet(reader: Reader, publisher: Publisher) -> Position:
    """Publish until the reader receives it, and return its position. A reader may start anew behind some."""
    while True:
        position = await publisher.until_accepted()
        for _ in range(20):
            reader.follow()
            if (position.epoch, position.offset) in reader.seen:
                return position
            await deferLater(reactor, POLL)
