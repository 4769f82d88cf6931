"""One session's subscription to one channel: what the client is granted, joining with recovery, leaving.

The order of joining makes it lossless. First the subscription is added to the hub, which from then on holds back
arriving publications for it. Then history is read, the client is entered into presence, and the reply is written. Last,
the hub is given the position of the reply: it delivers the held back publications above that position, and every later
one as it arrives. All requests to the engine are sent at once: the engine keeps their order.

Missed publications that exceed the room in the reply follow as pushes (`realtime.protocol.replay`).
"""

from __future__ import annotations

import enum
from collections.abc import Coroutine
from typing import Any, NamedTuple, Protocol

from realtime.errors import BAD_REQUEST, UNRECOVERABLE_POSITION, ClientError, Disconnect, RealtimeError
from realtime.protocol.channel_rules import ResolvedChannel
from realtime.protocol.context import SessionServices, SessionSettings
from realtime.protocol.messages import FilterNode, Pub, SubscribeRequest, SubscribeResult
from realtime.protocol.wire_formats import WireFormat
from realtime.pubsub import filters, fossil_delta
from realtime.pubsub.engine import AddPresence, GetHistory, RemovePresence
from realtime.pubsub.fanout import PATCH_LIMIT
from realtime.pubsub.history import approximate_size
from realtime.pubsub.subscriber import Sink
from realtime.types import ClientInfo, HistoryPage, Position, Publication, SubscribeOptions

# Bit 2 of a subscribe request's `flag`: an unrecovered subscription is refused with error 112, except in cache mode.
REJECT_UNRECOVERED = 2
# The share of a client's outbox that the publications may fill among which cache mode looks for the newest one.
CACHE_SHARE = 0.5
# Deltas computed before other work gets a turn: a long one takes most of a millisecond.
DELTAS_AT_ONCE = 5


class SubscriptionSource(enum.Enum):
    """The origin of a subscription: a command of the client, the server, or the client's connection token.

    A client can't repeat a subscription of the server or the token: when it fails, the connection is closed.
    """

    CLIENT = enum.auto()
    SERVER = enum.auto()
    TOKEN = enum.auto()


class SubscriptionOwner(Protocol):
    """The session, as its subscriptions see it."""

    settings: SessionSettings
    services: SessionServices

    def reply_room(self) -> ReplyRoom:
        """Return the room for missed publications in a reply that is sent now."""

    def subscription_lost_position(self, subscription: Subscription) -> None:
        """Handle a subscription that the hub has removed: the client may have missed publications."""

    def describe(self) -> dict[str, object]:
        """Return the facts about the client for the log."""


class ReplyRoom:
    """The room for missed publications in one reply, over all its channels. left: bytes."""

    __slots__ = ("left",)

    def __init__(self, left: int) -> None:
        self.left = left

    def take(self, publications: list[Publication]) -> list[Publication]:
        """Return the first of these publications, as many as fit."""
        for number, publication in enumerate(publications):
            size = approximate_size(publication)
            if size > self.left:
                return publications[:number]
            self.left -= size
        return publications


class JoinResult(NamedTuple):
    """The outcome of joining. result: for the client's reply. The other fields are for `Subscription.activate`.

    position: where the subscription continues, None for one without a position. delta_base: the last publication in
    the result, if deltas were agreed: the next publication may be sent as a difference from it. is_behind: further
    missed publications follow after `position`.
    """

    result: SubscribeResult
    position: Position | None
    delta_base: Publication | None
    is_behind: bool = False


class Replay:
    """The progress of a replay: the position of the last publication sent, and the base of the next delta."""

    __slots__ = ("delta_base", "position")

    def __init__(self, position: Position, delta_base: Publication | None) -> None:
        self.position = position
        self.delta_base = delta_base


class ReplayPage(NamedTuple):
    """One page of a replay. is_last: it reaches the top of the stream."""

    pubs: list[Pub]
    is_last: bool


class Subscription:
    """A subscriber of the hub.

    positioned, recoverable, announced (join and leave pushes), delta, filter: features granted to the client; see
    `grant` and `subscriber.Subscriber`. tf: the filter as the client has sent it. is_entered: the subscription has
    entered presence. expire_at: Unix seconds, 0.0 for never. is_active: true from the reply or push
    that reports the subscription to the client until the end. renewal: terms that the server gave it before that.
    replay: of missed publications, None without one.
    """

    __slots__ = (
        "_left",
        "_owner",
        "announced",
        "channel",
        "channel_options",
        "delta",
        "expire_at",
        "filter",
        "form",
        "info",
        "is_active",
        "is_entered",
        "positioned",
        "recoverable",
        "renewal",
        "replay",
        "sink",
        "source",
        "tf",
    )

    def __init__(
        self,
        owner: SubscriptionOwner,
        sink: Sink,
        form: WireFormat,
        channel: str,
        channel_options: ResolvedChannel,
        info: ClientInfo,
        source: SubscriptionSource,
    ) -> None:
        """sink: takes the client's frames, in this form. info: the client, as others in the channel see it."""
        self._owner = owner
        self.is_entered = self._left = False
        self.sink = sink
        self.form = form
        self.channel = channel
        self.channel_options = channel_options
        self.info = info
        self.source = source
        self.positioned = self.recoverable = self.announced = self.delta = False
        self.filter: filters.Filter | None = None
        self.tf: FilterNode | None = None
        self.expire_at = 0.0
        self.is_active = False
        self.renewal: SubscribeOptions | None = None
        self.replay: Replay | None = None

    def grant(self, request: SubscribeRequest, *, history: bool, presence: bool) -> None:
        """Grant the features that the namespace forces, and the requested ones that the client may have.

        history, presence: whether the client may read these. Raises ClientError 107 for a filter that is not allowed
        or not valid, and 112 when the client refuses an unrecovered subscription to a channel that has no history,
        although its token makes it recoverable.
        """
        options = self.channel_options
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
                raise ClientError(*BAD_REQUEST, kind="filter_refused")
            client = self._owner.settings.client
            try:
                self.filter = filters.compiled(request.tf, client.max_filter_nodes, client.max_filter_depth)
            except ValueError as error:
                raise ClientError(*BAD_REQUEST, kind="filter_refused") from RealtimeError(str(error))
            self.tf = request.tf
        if options.force_recovery and not kept and request.recover and self._refuses_unrecovered(request):
            raise ClientError(*UNRECOVERABLE_POSITION)

    def _refuses_unrecovered(self, request: SubscribeRequest) -> bool:
        """Return whether the client refuses a subscription without recovery. In cache mode there is always a state."""
        return bool(request.flag & REJECT_UNRECOVERED) and self.channel_options.force_recovery_mode != "cache"

    async def join(self, request: SubscribeRequest, room: ReplyRoom | None = None) -> JoinResult:
        """Enter the channel. The caller sends the result to the client, and passes the outcome to `activate`.

        room: for the missed publications of several channels in one reply; None for a reply of its own.
        Raises ClientError 112 when the client refuses an unrecovered subscription, and EngineUnavailable. Then, and
        when the coroutine is closed, the caller calls `leave`.
        """
        page, recovering, recovered = await self._enter_and_read(request, room)
        try:
            publications, end = self._fitting(page, room) if recovered else ([], page.position)
            pubs = await self._encode(publications)
        except Disconnect:
            # The client's encoding can't carry a missed publication: for this client that is a gap.
            self.log_unencodable()
            recovered, publications, pubs, end = False, [], [], page.position
        if recovering and not recovered and self._refuses_unrecovered(request):
            raise ClientError(*UNRECOVERABLE_POSITION)
        # After `leave` there may be a new subscription of the same client already, and its presence must stay.
        if self._is_visible and not self.is_entered and not self._left:
            await self._enter_presence()
        result = SubscribeResult(
            recoverable=self.recoverable,
            positioned=self.positioned,
            epoch=page.position.epoch,
            # The client counts on from this offset with each publication in the list.
            offset=request.offset if recovered else page.position.offset,
            was_recovering=recovering or request.recover,
            recovered=recovered,
            publications=pubs or None,
            delta=self.delta,
        )
        delta_base = publications[-1] if self.delta and publications else None
        return JoinResult(result, end if self.positioned else None, delta_base, end != page.position)

    def _fitting(self, page: HistoryPage, room: ReplyRoom | None) -> tuple[list[Publication], Position]:
        """Select the publications of a recovery for its reply. Returns them, and the position that the reply covers.

        Raises Disconnect if the client's encoding can't carry the first one, although the reply has no room for it:
        otherwise the client would recover again and again.
        """
        publications, top = self._filtered(page.publications), page.position
        if self.channel_options.force_recovery_mode == "cache":
            return publications, top
        fitting = (room or self._owner.reply_room()).take(publications) if publications else []
        if len(fitting) < len(publications):
            if not fitting:
                self._encodable(publications[:1])
            return fitting, Position(publications[len(fitting)].offset - 1, top.epoch)
        return fitting, Position(page.publications[-1].offset, top.epoch) if page.publications else top

    async def _enter_and_read(
        self, request: SubscribeRequest, room: ReplyRoom | None
    ) -> tuple[HistoryPage, bool, bool]:
        """Subscribe in the hub, enter presence, and return the result of `_read`: one round trip to the engine.

        A client that may yet refuse the subscription (REJECT_UNRECOVERED) does not enter presence here.
        """
        services = self._owner.services
        added = services.hub.subscribe(self.channel, self)
        if not (self.positioned or self._is_visible):
            await added
            return await self._read(request, room)
        steps: list[Coroutine[Any, Any, Any]] = [added, self._read(request, room)]
        if self._is_visible and not self._refuses_unrecovered(request):
            steps.append(self._enter_presence())
        _, (page, recovering, recovered), *_ = await services.gather(steps)
        return page, recovering, recovered

    async def _read(self, request: SubscribeRequest, room: ReplyRoom | None) -> tuple[HistoryPage, bool, bool]:
        """Read the channel's position and the first missed publications.

        Returns the page, whether the client is recovering, and whether history has all that the client missed.
        """
        if not self.positioned:
            return HistoryPage([], Position()), False, False
        options, settings = self.channel_options, self._owner.settings.client
        read, history_options = self._owner.services.hub.read_history, options.history_options
        if not (self.recoverable and (request.recover or options.auto_cache_recover)):
            return await read(GetHistory(self.channel, history_options)), False, False
        limit = settings.recovery_max_publication_limit or -1
        if options.force_recovery_mode == "cache":
            max_bytes = int(settings.queue_max_size * CACHE_SHARE)
            # With a filter the newest publication that passes is the state, wherever it is.
            limit = 1 if self.filter is None else limit
            newest = GetHistory(self.channel, history_options, limit=limit, reverse=True, max_bytes=max_bytes)
            page = await read(newest)
            if _is_at(request, page):
                return HistoryPage([], page.position), True, True
            is_kept = bool(page.publications) and page.publications[0].offset == page.position.offset
            return HistoryPage(self._filtered(page.publications)[:1], page.position), True, is_kept
        missed = GetHistory(
            self.channel,
            history_options,
            since=Position(request.offset, request.epoch),
            limit=limit,
            max_bytes=room.left if room is not None else settings.recovery_reply_size,
        )
        page = await read(missed)
        return page, True, is_recovered(request, page, limit)

    def _encodable(self, publications: list[Publication]) -> list[Publication]:
        """Return those before one that the client's encoding can't carry. Raises Disconnect if that is the first."""
        for number, publication in enumerate(publications):
            try:
                if publication.binary:
                    self.form.encoding.make_pub(publication)
            except Disconnect:
                if not number:
                    raise
                return publications[:number]
        return publications

    def _filtered(self, publications: list[Publication]) -> list[Publication]:
        passes = self.filter
        return publications if passes is None else [each for each in publications if passes(each.tags)]

    async def _encode(
        self, publications: list[Publication], base: Publication | None = None, epoch: str = ""
    ) -> list[Pub]:
        """Encode publications for a reply or a page; with deltas, each may be a difference from the one before.

        base: the publication before the first, None for none: the first is in full then. epoch: for a page, as the
        first publication of a stream carries it in a push.
        """
        encoding, slices = self.form.encoding, self._owner.services.slices
        make = encoding.make_full_pub if self.delta else encoding.make_pub

        def whole(publication: Publication) -> Pub:
            return make(publication, epoch if publication.offset == 1 else "")

        if not self.delta:
            return await slices.map_sliced(whole, publications)
        pubs: list[Pub] = []
        for count, publication in enumerate(publications, 1):
            pubs.append((base and self._delta_pub(base, publication)) or whole(publication))
            base = publication
            if count % DELTAS_AT_ONCE == 0:
                await slices.yield_to_loop()
        return pubs

    def _delta_pub(self, base: Publication, target: Publication) -> Pub | None:
        """Encode `target` as its difference from `base`; None if that is not allowed, possible or shorter."""
        if not target.delta or len(target.data) > PATCH_LIMIT:
            return None
        delta = fossil_delta.delta(base.data, target.data)
        return self.form.encoding.make_delta_pub(target, delta) if len(delta) < len(target.data) else None

    def activate(self, joined: JoinResult) -> bool:
        """Let publications through. Returns False after a gap: the hub has then removed the subscription."""
        self.is_active = True
        hub = self._owner.services.hub
        if joined.is_behind:
            assert joined.position is not None
            self.replay = Replay(joined.position, joined.delta_base)
            return hub.begin_replay(self.channel, self)
        return hub.activate(self.channel, self, joined.position, joined.delta_base)

    async def read_page(self, replay: Replay) -> ReplayPage | None:
        """Read and encode the publications after `replay.position`, which moves on. None: history has lost the next.

        The caller sends them, and calls `end_replay` after the last page. Raises EngineUnavailable, ClientError, and
        Disconnect for a publication that the client's encoding can't carry.
        """
        services, before = self._owner.services, replay.position
        size, history_options = self._owner.settings.client.recovery_reply_size, self.channel_options.history_options
        query = GetHistory(self.channel, history_options, since=before, limit=-1, max_bytes=size)
        page = await services.engine.ask(query)
        top, stored = page.position, page.publications
        if top.epoch != before.epoch or before.offset + 1 != (stored[0].offset if stored else top.offset + 1):
            return None
        end = Position(stored[-1].offset, top.epoch) if stored else top
        passing = self._filtered(stored)
        publications = self._encodable(passing)
        if len(publications) < len(passing):
            end = Position(publications[-1].offset, top.epoch)
        if end == top:
            services.hub.end_replay(self.channel, self)
        pubs = await self._encode(publications, replay.delta_base, top.epoch)
        replay.position = end
        if self.delta and publications:
            replay.delta_base = publications[-1]
        return ReplayPage(pubs, end == top)

    def end_replay(self) -> bool:
        """Let new publications through behind the last page. Returns False after a gap, as `activate`."""
        replay, self.replay = self.replay, None
        assert replay is not None
        position = replay.position if self.positioned else None
        return self._owner.services.hub.activate(self.channel, self, position, replay.delta_base)

    @property
    def _is_visible(self) -> bool:
        """Whether other clients can see this one in the channel."""
        return self.channel_options.presence or self.channel_options.join_leave

    @property
    def presence(self) -> AddPresence:
        """The request that shows the client to others in the channel."""
        options = self.channel_options
        return AddPresence(
            self.channel,
            self.info,
            present=options.presence,
            announce=options.join_leave,
            grace=options.presence_grace,
        )

    async def _enter_presence(self) -> None:
        self.is_entered = True
        await self._owner.services.engine.ask(self.presence)

    async def show(self) -> None:
        """Enter presence, if the client is visible now, and was not before. Raises EngineUnavailable, ClientError."""
        if self._is_visible and not (self.is_entered or self._left):
            await self._enter_presence()

    async def renew(self, channel_options: ResolvedChannel, info: ClientInfo) -> Position:
        """Give the active subscription new options and info; return the channel's position, if it has one now.

        A client's own wishes stay granted. Raises EngineUnavailable.
        """
        services, had = self._owner.services, self.announced
        self.channel_options, self.info = channel_options, info
        kept, by_client = channel_options.history_options.enabled, self.source is SubscriptionSource.CLIENT
        self.recoverable = kept and (channel_options.force_recovery or (by_client and self.recoverable))
        self.positioned = kept and (
            self.recoverable or channel_options.force_positioning or (by_client and self.positioned)
        )
        self.announced = channel_options.join_leave and (
            channel_options.force_push_join_leave or (by_client and self.announced)
        )
        if self.announced != had:
            services.hub.regroup(self.channel)
        if self._is_visible:
            await self._enter_presence()
        elif self.is_entered:
            self.is_entered = False
            await services.engine.ask(RemovePresence(self.channel, info.client))
        if not self.positioned:
            return Position()
        page = await services.engine.ask(GetHistory(self.channel, channel_options.history_options))
        return page.position

    async def update_info(self, info: ClientInfo) -> None:
        """Show the client as `info` from now on. Raises EngineUnavailable; presence then still has the old info."""
        self.info = info
        if self.is_entered:
            await self._enter_presence()

    async def leave(self, *, is_returning: bool = False) -> None:
        """End the subscription, at any stage. Raises EngineUnavailable; on this worker it has ended all the same.

        is_returning: see `RemovePresence`.
        """
        self.is_active = False
        self._left = True
        self._owner.services.hub.unsubscribe(self.channel, self)
        if self.is_entered:
            self.is_entered = False
            await self._owner.services.engine.ask(RemovePresence(self.channel, self.info.client, is_returning))

    # Called by the hub

    @property
    def client(self) -> str:
        """The id of the client."""
        return self.info.client

    @property
    def priority(self) -> str:
        """See `ChannelOptions.priority`."""
        return self.channel_options.priority

    def on_gap(self) -> None:
        """Handle a gap in the publications, after which the hub has removed this subscription."""
        self._owner.subscription_lost_position(self)

    def on_unencodable(self) -> None:
        """Handle a publication that the client's encoding can't carry: for this client it is a gap."""
        self.log_unencodable()
        self._owner.subscription_lost_position(self)

    def log_unencodable(self) -> None:
        """Count and log a publication that the client's encoding can't carry."""
        self._owner.services.client_log.refuse("encoding", self._owner.describe, channel=repr(self.channel))


def is_recovered(request: SubscribeRequest, page: HistoryPage, limit: int) -> bool:
    """Return whether `page`, read after the request's position, begins with the first publication the client missed.

    limit: of all that it missed, -1 for none. An empty epoch in the request matches any (client protocol, recovery in
    stream mode).
    """
    if request.epoch and request.epoch != page.position.epoch:
        return False
    if not page.publications:
        return page.position.offset == request.offset
    missed = page.position.offset - request.offset
    return page.publications[0].offset == request.offset + 1 and (limit < 0 or missed <= limit)


def _is_at(request: SubscribeRequest, page: HistoryPage) -> bool:
    """Return whether the client has the newest publication already. In cache mode an empty epoch matches none."""
    return request.offset > 0 and (request.offset, request.epoch) == (page.position.offset, page.position.epoch)
