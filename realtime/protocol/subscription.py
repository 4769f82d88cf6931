"""One session's subscription to one channel: what was granted, joining with recovery, leaving.

The order of joining is what makes it lossless. The subscription is put into the hub first, which from then on holds
back what arrives for it; then history is read, the client entered into presence, and the reply written; at last the
hub is told the position that the reply named, delivers what is newer of the publications held back, and lets the
rest through as it comes. What the engine has to do with it, it is asked for all at once: it keeps the order.
"""

from __future__ import annotations

import enum
from collections.abc import Coroutine
from typing import Any, NamedTuple, Protocol

from realtime.errors import BAD_REQUEST, INAPPROPRIATE_PROTOCOL, UNRECOVERABLE_POSITION, ClientError
from realtime.protocol.channel_rules import ResolvedChannel
from realtime.protocol.context import SessionServices, SessionSettings
from realtime.protocol.messages import Pub, SubscribeRequest, SubscribeResult
from realtime.protocol.wire_formats import WireFormat
from realtime.pubsub import filters, fossil_delta
from realtime.pubsub.engine import AddPresence, GetHistory, RemovePresence
from realtime.pubsub.subscriber import Sink
from realtime.types import ClientInfo, HistoryPage, Position, Publication

# Bit 2 of a subscribe request's `flag`: answer error 112 instead of "not recovered".
REJECT_UNRECOVERED = 2
# The share of a client's queue that recovered publications may fill, so that a reply never makes it a slow one.
RECOVERED_SHARE = 0.5
# Deltas that are made before others have a turn: to make a long one takes most of a millisecond.
DELTAS_AT_ONCE = 5


class SubscriptionSource(enum.Enum):
    """Who wanted the subscription: the client by a command, the server, or the token that the client connected with.

    What the server began, the client can't begin again by itself: when it fails, the connection is closed.
    """

    CLIENT = enum.auto()
    SERVER = enum.auto()
    TOKEN = enum.auto()


class SubscriptionOwner(Protocol):
    """The session, as its subscription sees it."""

    settings: SessionSettings
    services: SessionServices

    def lost_position(self, subscription: Subscription) -> None:
        """The subscription is no longer in the hub: what the client has may have a gap."""

    def disconnect(self, code: int, reason: str) -> None: ...


class JoinResult(NamedTuple):
    """What joining came to. result: to be told to the client; then the rest is for `Subscription.open`.

    position: from which the subscription goes on, None for one without a position. base: the last publication that
    the result brings, if deltas are agreed: the next may come as a difference from it.
    """

    result: SubscribeResult
    position: Position | None
    base: Publication | None


class Subscription:
    """A member of the hub.

    positioned, recoverable, announced (join and leave pushes), delta, filter: what the client is granted; see `grant`
    and `member.Member`. end_at: Unix seconds at which it is ended, 0.0 for never. live: from the reply to the subscribe
    command, or what stands for it, until the end.
    """

    __slots__ = (
        "_entered",
        "_left",
        "_owner",
        "announced",
        "channel",
        "delta",
        "end_at",
        "filter",
        "form",
        "info",
        "live",
        "options",
        "origin",
        "positioned",
        "recoverable",
        "sink",
    )

    def __init__(
        self,
        owner: SubscriptionOwner,
        sink: Sink,
        form: WireFormat,
        channel: str,
        options: ResolvedChannel,
        info: ClientInfo,
        origin: SubscriptionSource,
    ) -> None:
        """sink: takes frames for this client, of this form. info: the client, as others in the channel see it."""
        self._owner = owner
        self._entered = self._left = False
        self.sink = sink
        self.form = form
        self.channel = channel
        self.options = options
        self.info = info
        self.origin = origin
        self.positioned = self.recoverable = self.announced = self.delta = False
        self.filter: filters.Filter | None = None
        self.end_at = 0.0
        self.live = False

    def grant(self, request: SubscribeRequest, *, history: bool, presence: bool) -> None:
        """Settle what the namespace forces, and what the client asks for and may have.

        history, presence: whether the client may read those. Raises ClientError 107 for a filter that is not allowed,
        or not valid.
        """
        options = self.options
        kept = options.history_options.enabled
        self.recoverable = kept and (
            options.force_recovery or (request.recoverable and (options.allow_recovery or history))
        )
        self.positioned = kept and (
            self.recoverable
            or options.force_positioning
            or (request.positioned and (options.allow_positioning or history))
        )
        self.announced = options.join_leave and (options.force_push_join_leave or (request.join_leave and presence))
        self.delta = request.delta in options.allowed_delta_types
        if request.tf is not None:
            if not options.allow_tags_filter:
                raise ClientError(*BAD_REQUEST)
            try:
                self.filter = filters.compiled(request.tf)
            except ValueError:
                raise ClientError(*BAD_REQUEST) from None

    async def join(self, request: SubscribeRequest) -> JoinResult:
        """Enter the channel; what to tell the client, and then to `open` with.

        Raises ClientError 112 when the client wants no unrecovered subscription, Disconnect 3506 when it can't be sent
        what it missed, or EngineUnavailable. Either way, and when the coroutine is closed, the caller calls `leave`.
        """
        page, recovering, recovered = await self._arrive(request)
        if recovering and not recovered and request.flag & REJECT_UNRECOVERED:
            raise ClientError(*UNRECOVERABLE_POSITION)
        # One that was ended meanwhile has perhaps a successor already, whose presence is the same client's.
        if self._present and not self._entered and not self._left:
            await self._enter()
        publications = self._wanted(page.publications) if recovered else []
        result = SubscribeResult(
            recoverable=self.recoverable,
            positioned=self.positioned,
            epoch=page.position.epoch,
            # The client counts on from here with every publication of the list.
            offset=request.offset if recovered else page.position.offset,
            was_recovering=recovering,
            recovered=recovered,
            publications=await self._told(publications) or None,
            delta=self.delta,
        )
        base = publications[-1] if self.delta and publications else None
        return JoinResult(result, page.position if self.positioned else None, base)

    async def _arrive(self, request: SubscribeRequest) -> tuple[HistoryPage, bool, bool]:
        """Into the hub, and what `_read` returns; the client is entered, too, unless it may yet want no subscription.

        One round trip to the engine.
        """
        services = self._owner.services
        added = services.hub.subscribe(self.channel, self)
        if not (self.positioned or self._present):
            await added
            return await self._read(request)
        steps: list[Coroutine[Any, Any, Any]] = [added, self._read(request)]
        if self._present and not request.flag & REJECT_UNRECOVERED:
            steps.append(self._enter())
        _, (page, recovering, recovered), *_ = await services.gather(steps)
        return page, recovering, recovered

    async def _read(self, request: SubscribeRequest) -> tuple[HistoryPage, bool, bool]:
        """The top of the channel, with what the client missed; whether it is to recover; and whether that is all."""
        if not self.positioned:
            return HistoryPage([], Position()), False, False
        options, settings = self.options, self._owner.settings.client
        engine, history_options = self._owner.services.engine, options.history_options
        if not (self.recoverable and (request.recover or options.auto_cache_recover)):
            return await engine.ask(GetHistory(self.channel, history_options)), False, False
        if options.force_recovery_mode == "cache":
            page = await engine.ask(GetHistory(self.channel, history_options, limit=1, reverse=True))
            if _is_at(request, page):
                return HistoryPage([], page.position), True, True
            newest = page.publications[0].offset if page.publications else 0
            return page, True, 0 < newest == page.position.offset
        missed = GetHistory(
            self.channel,
            history_options,
            since=Position(request.offset, request.epoch),
            limit=settings.recovery_max_publication_limit or -1,
            max_bytes=int(settings.queue_max_size * RECOVERED_SHARE),
        )
        page = await engine.ask(missed)
        return page, True, is_recovered(request, page)

    def _wanted(self, publications: list[Publication]) -> list[Publication]:
        wanted = self.filter
        return publications if wanted is None else [one for one in publications if wanted(one.tags)]

    async def _told(self, publications: list[Publication]) -> list[Pub]:
        """Publications as the client is sent them in a reply; where deltas are agreed, the first is whole."""
        encoding, slices = self.form.encoding, self._owner.services.slices
        if not self.delta:
            return await slices.map_sliced(encoding.pub, publications)
        told: list[Pub] = []
        base = None
        for number, one in enumerate(publications, 1):
            told.append((base and self._patch(base, one)) or encoding.whole(one))
            base = one
            if number % DELTAS_AT_ONCE == 0:
                await slices.yield_to_loop()
        return told

    def _patch(self, base: Publication, target: Publication) -> Pub | None:
        """A publication as its difference from the one before it, if that may be, and is shorter."""
        if not target.delta:
            return None
        delta = fossil_delta.delta(base.data, target.data)
        return self.form.encoding.patch(target, delta) if len(delta) < len(target.data) else None

    def open(self, joined: JoinResult) -> bool:
        """Let publications through. False: there is a gap already, and the hub has dropped the subscription."""
        self.live = True
        return self._owner.services.hub.activate(self.channel, self, joined.position, joined.base)

    @property
    def _present(self) -> bool:
        """Whether others can know that the client is here."""
        return self.options.presence or self.options.join_leave

    async def _enter(self) -> None:
        self._entered = True
        options = self.options
        await self._owner.services.engine.ask(
            AddPresence(self.channel, self.info, present=options.presence, announce=options.join_leave)
        )

    async def describe(self, info: ClientInfo) -> None:
        """Others see the client as `info` from now on. Raises EngineUnavailable, while presence says the old."""
        self.info = info
        if self._entered:
            await self._enter()

    async def leave(self) -> None:
        """End it, at whatever stage it is. Raises EngineUnavailable, when it has ended here all the same."""
        self.live = False
        self._left = True
        self._owner.services.hub.unsubscribe(self.channel, self)
        if self._entered:
            self._entered = False
            await self._owner.services.engine.ask(RemovePresence(self.channel, self.info.client))

    # What the hub asks, and calls

    @property
    def priority(self) -> str:
        """See `ChannelOptions.priority`."""
        return self.options.priority

    def on_gap(self) -> None:
        """The hub dropped this subscription, because continuity broke."""
        self._owner.lost_position(self)

    def on_unencodable(self) -> None:
        """There is a publication that the client's encoding can't carry."""
        self._owner.disconnect(*INAPPROPRIATE_PROTOCOL)


def is_recovered(request: SubscribeRequest, page: HistoryPage) -> bool:
    """Whether `page`, read after the request's position, is exactly what the client missed.

    An empty epoch in the request matches any (client protocol, recovery in stream mode).
    """
    if request.epoch and request.epoch != page.position.epoch:
        return False
    if not page.publications:
        return page.position.offset == request.offset
    return page.publications[0].offset == request.offset + 1 and page.publications[-1].offset == page.position.offset


def _is_at(request: SubscribeRequest, page: HistoryPage) -> bool:
    """Whether the client has the newest publication; in cache mode an empty epoch matches none."""
    return request.offset > 0 and (request.offset, request.epoch) == (page.position.offset, page.position.epoch)
