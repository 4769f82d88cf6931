"""The engine inside a process: for one worker, and for tests."""

from __future__ import annotations

from collections.abc import Callable, Collection

from realtime.config.settings import EngineSettings
from realtime.pubsub.broker_core import BrokerCore
from realtime.pubsub.engine import Receiver
from realtime.pubsub.history import PAGE_BYTES
from realtime.types import ClientInfo, EngineStats, HistoryOptions, HistoryPage, Position, Publication


class MemoryEngine:
    """An `Engine` in this process, for one receiver.

    No coroutine of it ever waits, and what it publishes has reached the receiver when `publish` returns.

    clock: seconds of a clock that never goes back. address: of the worker, see `Engine.instruct`. Whoever builds the
    engine calls `sweep` every quarter of a second or so; without it nothing goes wrong, only what is over keeps its
    memory until somebody asks for it.
    """

    def __init__(
        self, receiver: Receiver, settings: EngineSettings, clock: Callable[[], float], address: str = "0"
    ) -> None:
        self._receiver = receiver
        self._clock = clock
        self._exchange: BrokerCore[Receiver] = BrokerCore(_Direct(), settings.max_channels)
        self._exchange.attach(receiver, address)

    def sweep(self) -> None:
        """Free what is over; a few ms at most."""
        self._exchange.sweep(self._clock())

    async def publish(
        self,
        channel: str,
        data: bytes,
        *,
        retention: HistoryOptions,
        info: ClientInfo | None = None,
        tags: dict[str, str] | None = None,
        idempotency_key: str = "",
        version: int = 0,
        version_epoch: str = "",
        delta: bool = False,
        binary: bool = False,
    ) -> Position:
        return self._exchange.publish(
            self._clock(),
            channel,
            data,
            retention,
            info,
            tags,
            idempotency_key,
            version,
            version_epoch,
            delta,
            binary,
        )

    async def subscribe(self, channel: str) -> None:
        self._exchange.subscribe(self._receiver, channel)

    def unsubscribe(self, channel: str) -> None:
        self._exchange.unsubscribe(self._receiver, channel)

    async def history(
        self,
        channel: str,
        *,
        retention: HistoryOptions,
        since: Position | None = None,
        limit: int = 0,
        reverse: bool = False,
        max_bytes: int = PAGE_BYTES,
    ) -> HistoryPage:
        return self._exchange.history(self._clock(), channel, retention, since, limit, reverse, max_bytes)

    async def remove_history(self, channel: str) -> None:
        self._exchange.remove_history(channel)

    async def enter(self, channel: str, info: ClientInfo, *, present: bool, announce: bool) -> None:
        self._exchange.enter(self._receiver, channel, info, present=present, announce=announce)

    async def leave(self, channel: str, client: str) -> None:
        self._exchange.leave(self._receiver, channel, client)

    async def presence(self, channel: str) -> dict[str, ClientInfo]:
        return self._exchange.presence(channel)

    async def presence_stats(self, channel: str) -> tuple[int, int]:
        return self._exchange.presence_stats(channel)

    def connected(self, info: ClientInfo) -> None:
        self._exchange.connected(self._receiver, info)

    async def admit(self, info: ClientInfo, limit: int) -> bool:
        return self._exchange.admit(self._receiver, info, limit)

    def disconnected(self, client: str) -> None:
        self._exchange.disconnected(self._receiver, client)

    def tally(self, subscriptions: int) -> None:
        self._exchange.tally(self._receiver, subscriptions)

    async def census(self) -> EngineStats:
        return self._exchange.census()

    async def instruct(self, order: bytes, *, worker: str = "") -> int:
        return self._exchange.instruct(order, worker)


class _Direct:
    """The way out of an exchange whose peers are receivers in this process."""

    def published(self, peers: Collection[Receiver], channel: str, publication: Publication, epoch: str) -> None:
        for peer in peers:
            peer.published(channel, publication, epoch)

    def joined(self, peers: Collection[Receiver], channel: str, info: ClientInfo) -> None:
        for peer in peers:
            peer.joined(channel, info)

    def left(self, peers: Collection[Receiver], channel: str, info: ClientInfo) -> None:
        for peer in peers:
            peer.left(channel, info)

    def instructed(self, peers: Collection[Receiver], order: bytes) -> None:
        for peer in peers:
            peer.instructed(order)
