"""An engine inside the test's process, for one worker.

The server itself has one embedded engine, the broker process, also with one worker.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection
from typing import Any

from realtime.config.settings import EngineSettings
from realtime.handlers.coroutines import DoneCallback, drive
from realtime.pubsub.broker_core import BrokerCore
from realtime.pubsub.engine import Answer, EngineNotice, EngineRequest, Receiver
from realtime.types import ClientInfo, Publication


class MemoryEngine:
    """An `Engine` that carries out each request at once: its publications have reached the receiver by then.

    clock: seconds of a clock that never goes back. address: of the worker, see `SendOrder`.
    overrides: coroutine functions that tests put in place of `carry_out`, by kind of request.
    """

    def __init__(
        self, receiver: Receiver, settings: EngineSettings, clock: Callable[[], float], address: str = "0"
    ) -> None:
        self._receiver = receiver
        self._clock = clock
        self.core: BrokerCore[Receiver] = BrokerCore(_DirectDelivery(), settings.max_channels)
        self.core.attach(receiver, address)
        self.overrides: dict[type, Callable[[Any], Awaitable[Any]]] = {}

    def ask(self, request: EngineRequest[Answer]) -> Awaitable[Answer]:
        override = self.overrides.get(type(request))
        return self.carry_out(request) if override is None else override(request)

    def ask_then(self, request: EngineRequest[Answer], done: DoneCallback) -> None:
        drive(self.ask(request), done)  # type: ignore[arg-type]

    def tell(self, notice: EngineNotice) -> None:
        self.core.take_note(self._receiver, self._clock(), notice)

    async def carry_out(self, request: EngineRequest[Answer]) -> Answer:
        """Carry out a request without regard to `overrides`."""
        return self.execute(request)

    def execute(self, request: EngineRequest[Answer]) -> Answer:
        """The same for a caller that is not a coroutine."""
        return self.core.carry_out(self._receiver, self._clock(), request)


class _DirectDelivery:
    """Delivers to receivers in this process."""

    def deliver_publication(
        self, peers: Collection[Receiver], channel: str, publication: Publication, epoch: str
    ) -> None:
        for peer in peers:
            peer.on_publication(channel, publication, epoch)

    def deliver_join(self, peers: Collection[Receiver], channel: str, info: ClientInfo) -> None:
        for peer in peers:
            peer.on_join(channel, info)

    def deliver_leave(self, peers: Collection[Receiver], channel: str, info: ClientInfo) -> None:
        for peer in peers:
            peer.on_leave(channel, info)

    def deliver_order(self, peers: Collection[Receiver], order: bytes) -> None:
        for peer in peers:
            peer.on_order(order)
