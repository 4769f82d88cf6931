"""One session's subscription to one channel: what was granted, joining with recovery, leaving.

The order of joining is what makes it lossless. The subscription is put into the hub first, which from then on holds
back what arrives for it; then history is read, the client entered into presence, and the reply written; at last the
hub is told the position that the reply named, delivers what is newer of the publications held back, and lets the
rest through as it comes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from realtime.errors import UNRECOVERABLE_POSITION, ClientError
from realtime.protocol.forms import Form
from realtime.protocol.messages import SubscribeRequest, SubscribeResult
from realtime.protocol.node import Node
from realtime.protocol.rules import ResolvedChannel
from realtime.records import ClientInfo, HistoryPage, Position

# Bit 2 of a subscribe request's `flag`: answer error 112 instead of "not recovered".
REJECT_UNRECOVERED = 2


class Owner(Protocol):
    """The session, as its subscription sees it."""

    def lost_position(self, channel: str) -> None:
        """The subscription is no longer in the hub: what the client has may have a gap."""


class Subscription:
    """A member of the hub.

    positioned, recoverable, announced (join and leave pushes): what the client is granted; set before `join`.
    expire_at: Unix seconds, 0.0 for never. live: from the reply to the subscribe command until the end.
    """

    __slots__ = (
        "_engine",
        "_entered",
        "_hub",
        "_owner",
        "announced",
        "channel",
        "deliver",
        "expire_at",
        "form",
        "info",
        "live",
        "options",
        "positioned",
        "recoverable",
    )

    def __init__(
        self,
        owner: Owner,
        deliver: Callable[[bytes], None],
        form: Form,
        node: Node,
        channel: str,
        options: ResolvedChannel,
        info: ClientInfo,
    ) -> None:
        """deliver: takes one frame for this client, of this form. info: the client, as others in the channel see it."""
        self._owner = owner
        self._engine = node.engine
        self._hub = node.hub
        self._entered = False
        self.deliver = deliver
        self.form = form
        self.channel = channel
        self.options = options
        self.info = info
        self.positioned = self.recoverable = self.announced = False
        self.expire_at = 0.0
        self.live = False

    async def join(self, request: SubscribeRequest, limit: int) -> tuple[SubscribeResult, Position | None]:
        """Enter the channel; the reply to write, and the position to `open` at once it is written.

        limit: the most publications that are recovered, -1 for all.
        Raises ClientError 112 when the client wants no unrecovered subscription, or EngineUnavailable. Either way,
        and when the coroutine is closed, the caller calls `leave`.
        """
        await self._hub.add(self.channel, self)
        page, recovering = await self._read(request, limit)
        recovered = recovering and is_recovered(request, page)
        if recovering and not recovered and request.flag & REJECT_UNRECOVERED:
            raise ClientError(*UNRECOVERABLE_POSITION)
        if self.options.presence or self.options.join_leave:
            self._entered = True
            await self._engine.enter(
                self.channel, self.info, present=self.options.presence, announce=self.options.join_leave
            )
        result = SubscribeResult(
            recoverable=self.recoverable,
            positioned=self.positioned,
            epoch=page.position.epoch,
            # The client counts on from here with every publication of the list.
            offset=request.offset if recovered else page.position.offset,
            was_recovering=recovering,
            recovered=recovered,
            publications=[self.form.encoding.pub(one) for one in page.publications]
            if recovered and page.publications
            else None,
        )
        return result, page.position if self.positioned else None

    async def _read(self, request: SubscribeRequest, limit: int) -> tuple[HistoryPage, bool]:
        if not self.positioned:
            return HistoryPage([], Position()), False
        recovering = self.recoverable and request.recover
        page = await self._engine.history(
            self.channel,
            retention=self.options.retention,
            since=Position(request.offset, request.epoch) if recovering else None,
            limit=limit if recovering else 0,
        )
        return page, recovering

    def open(self, position: Position | None) -> bool:
        """Let publications through. False: there is a gap already, and the hub has dropped the subscription."""
        self.live = True
        return self._hub.open(self.channel, self, position)

    async def describe(self, info: ClientInfo) -> None:
        """Others see the client as `info` from now on. Raises EngineUnavailable, while presence says the old."""
        self.info = info
        if self._entered:
            await self._engine.enter(
                self.channel, info, present=self.options.presence, announce=self.options.join_leave
            )

    async def leave(self) -> None:
        """End it, at whatever stage it is. Raises EngineUnavailable, when it has ended here all the same."""
        self.live = False
        self._hub.remove(self.channel, self)
        if self._entered:
            self._entered = False
            await self._engine.leave(self.channel, self.info.client)

    def lost(self) -> None:
        """The hub dropped this subscription, because continuity broke."""
        self._owner.lost_position(self.channel)


def is_recovered(request: SubscribeRequest, page: HistoryPage) -> bool:
    """Whether `page`, read after the request's position, is exactly what the client missed.

    An empty epoch in the request matches any (client protocol, recovery in stream mode).
    """
    if request.epoch and request.epoch != page.position.epoch:
        return False
    if not page.publications:
        return page.position.offset == request.offset
    return page.publications[0].offset == request.offset + 1 and page.publications[-1].offset == page.position.offset
