"""An engine under test, and the log of what it delivers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from realtime.pubsub.engine import Engine, GetHistory, GetStats, Publish
from realtime.types import ClientInfo, HistoryOptions, HistoryPage, Position, Publication

KEEP = HistoryOptions(size=10, ttl=60.0)


class Log:
    """A receiver that logs its deliveries, in order."""

    def __init__(self) -> None:
        self.entries: list[tuple[Any, ...]] = []
        self.publications: list[Publication] = []

    def on_publication(self, channel: str, publication: Publication, epoch: str) -> None:
        self.entries.append(("published", channel, publication.data, publication.offset, epoch))
        self.publications.append(publication)

    def on_join(self, channel: str, info: ClientInfo) -> None:
        self.entries.append(("joined", channel, info))

    def on_leave(self, channel: str, info: ClientInfo) -> None:
        self.entries.append(("left", channel, info))

    def on_order(self, order: bytes) -> None:
        self.entries.append(("order", order))

    def on_cut(self, batch: str) -> None:
        self.entries.append(("cut", batch))

    def on_missed(self, channel: str, publications: bool) -> None:
        self.entries.append(("missed", channel, publications))

    def on_interruption(self) -> None:
        self.entries.append(("interrupted",))

    def named(self, name: str) -> list[tuple[Any, ...]]:
        return [entry[1:] for entry in self.entries if entry[0] == name]


class Bench:
    """An engine of one worker, and the log of its deliveries."""

    def __init__(self, make: Callable[[Log], Engine]) -> None:
        self.log = Log()
        self.engine = make(self.log)

    async def publish(
        self, channel: str, data: bytes = b"1", history_options: HistoryOptions = KEEP, **more: Any
    ) -> Position:
        return await self.engine.ask(Publish(channel, data, history_options, **more))

    async def history(
        self, channel: str, history_options: HistoryOptions = KEEP, limit: int = -1, **more: Any
    ) -> HistoryPage:
        return await self.engine.ask(GetHistory(channel, history_options, limit=limit, **more))

    async def settled(self) -> Log:
        """Return the log once all deliveries under way have arrived: an answer comes after them."""
        await self.engine.ask(GetStats())
        return self.log
