"""An engine inside the test's process, for one worker.

The server itself has one embedded engine, the broker process, also with one worker.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection
from typing import Any

from realtime.config.settings import EngineSettings
from realtime.handlers.coroutines import DoneCallback, drive
from realtime.pubsub.broker_core import BrokerCore
from realtime.pubsub.engine import AddPresence, Answer, Cut, EngineNotice, EngineRequest, Receiver
from realtime.types import ClientInfo, Publication


class MemoryEngine:
    """An `Engine` that carries out each request at once: its publications have reached the receiver by then.

    clock: seconds of a clock that never goes back. address: of the worker, see `SendOrder`. core: shared with the
    engine of another worker; None for one of its own. overrides: coroutine functions that tests put in place of
    `carry_out`, by kind of request.
    """

    def __init__(
        self,
        receiver: Receiver,
        settings: EngineSettings,
        clock: Callable[[], float],
        address: str = "0-0",
        core: BrokerCore[Receiver] | None = None,
    ) -> None:
        self._receiver = receiver
        self._clock = clock
        self.address = address
        self.core: BrokerCore[Receiver] = core or BrokerCore(DirectDelivery(), settings.max_channels)
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

    def claim(self, batch: str, info: ClientInfo, secret: str, presence: list[AddPresence]) -> None:
        """See `Engine.claim`: this engine loses no cut, and knows the rest."""

    def forget_arrivals(self, batch: str) -> list[ClientInfo]:
        """See `Engine.forget_arrivals`: in these tests all clients arrive."""
        return []


class DirectDelivery:
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

    def deliver_cut(self, peer: Receiver, request: Cut, clients: list[ClientInfo]) -> None:
        peer.on_cut(request.batch)
