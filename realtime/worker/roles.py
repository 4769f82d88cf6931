"""A role of this worker: work that it does for all workers while it holds the role (`realtime.pubsub.roles`)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from twisted.internet.interfaces import IDelayedCall

from realtime.errors import ClientError, EngineUnavailable
from realtime.protocol.orders import RoleOrder, encode_order
from realtime.pubsub.engine import Engine, HoldRole, ResignRole, Term

RENEWALS = 3
"""The holder asks this many times within the time of its role."""

PAUSE_MIN = 0.05
"""Seconds between two requests, at least."""


class Role:
    """Asks for a role until it is resigned, and renews it.

    term: the number of the term in which this worker is the holder, else 0. The holder's time counts from the moment
    before the request, so it ends here before the engine gives the role to another worker.
    """

    def __init__(
        self,
        name: str,
        holder: str,
        seconds: float,
        engine: Engine,
        reactor: Any,
        on_gain: Callable[[], object],
        on_loss: Callable[[], object],
    ) -> None:
        """holder: the address of this worker, with its node. seconds: of the role without a renewal. reactor:
        IReactorTime. on_gain, on_loss: called when a term of this worker begins, and has ended."""
        self.term = 0
        self._name = name
        self._holder = holder
        self._seconds = seconds
        self._engine = engine
        self._reactor = reactor
        self._on_gain = on_gain
        self._on_loss = on_loss
        self._ends = 0.0
        self._is_asking = False
        self._is_open = False  # the holder has resigned since the latest request
        self._has_resigned = False
        self._next: IDelayedCall | None = None
        self._expiry: IDelayedCall | None = None

    @property
    def is_held(self) -> bool:
        """Whether this worker holds the role at this moment, also when a blocked loop has delayed `on_loss`."""
        return bool(self.term) and self._reactor.seconds() < self._ends

    def start(self) -> None:
        """Ask for the role from now on."""
        self._ask()

    def on_order(self, order: RoleOrder) -> None:
        """Ask at once, as the holder has resigned."""
        if order.name != self._name or self._has_resigned or self.term:
            return
        if self._is_asking:
            self._is_open = True
        elif self._next is not None:
            self._next.cancel()
            self._ask()

    async def resign(self) -> None:
        """Give the role to another worker, and ask no more. Returns when the engine has answered, or can't."""
        self._has_resigned = True
        if self._next is not None:
            self._next.cancel()
            self._next = None
        self._lose()
        with suppress(EngineUnavailable, ClientError):
            await self._engine.ask(ResignRole(self._name, self._holder, encode_order(RoleOrder(self._name))))

    def _ask(self) -> None:
        asked_at = self._reactor.seconds()
        self._next, self._is_asking, self._is_open = None, True, False
        request = HoldRole(self._name, self._holder, self._seconds, self.term if self.is_held else 0)
        self._engine.ask_then(request, lambda term, error: self._answered(term, error, asked_at))

    def _answered(self, term: Term | None, error: BaseException | None, asked_at: float) -> None:
        self._is_asking = False
        if self._has_resigned:
            return
        pause = self._seconds / RENEWALS
        if term is not None and term.number:
            self._hold(term.number, asked_at + self._seconds)
        elif term is not None:
            self._lose()
            pause = 0.0 if self._is_open else min(term.left, self._seconds)
        self._next = self._reactor.callLater(max(pause, PAUSE_MIN), self._ask)

    def _hold(self, number: int, ends: float) -> None:
        now = self._reactor.seconds()
        if self.term != number:
            self._lose()
        self._ends = ends
        if ends <= now:  # the answer took too long; a later one counts
            self._lose()
            return
        if self._expiry is not None:
            self._expiry.reset(ends - now)
        else:
            self._expiry = self._reactor.callLater(ends - now, self._expire)
        if not self.term:
            self.term = number
            self._on_gain()

    def _expire(self) -> None:
        self._expiry = None
        self._lose()

    def _lose(self) -> None:
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None
        if self.term:
            self.term = 0
            self._on_loss()
