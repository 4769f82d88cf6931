"""The hub: the local subscriptions of one worker.

Publications arrive from the engine (`Hub.on_publication`). Each is encoded once for every wire format among the
subscribers, and the frame goes straight to every connection, past its session. That shortcut is the hot path of the
server: the only work for one subscriber is the call of its sink's `send` (`realtime.pubsub.fanout`).

Completeness is checked once per channel, when a publication arrives. Repeats are dropped. After a gap or under another
epoch every positioned subscriber is removed and informed (`Subscriber.on_gap`), and receives nothing newer. Where joins
or leaves may be missing, this applies to the subscribers that receive those: a list of members would stay wrong.

A subscription takes two steps, so that its subscribe reply precedes everything else on its channel: `subscribe` holds
the channel's events back; the session then asks for the position, replies, and calls `activate` with the position of
that reply.

If the reply does not reach the top, the session calls `begin_replay` in place of `activate`: the subscriber receives
joins and leaves from then on, while the session sends it the publications behind the reply from history. At the last of
these the session calls `end_replay`, which holds the channel's publications back again, and then `activate`.

Subscribers move to the hub of another worker in batches (`realtime.protocol.handover`). The source removes each one
behind the events that have arrived at the cut (`hand_out`). The target subscribes to their channels before the cut
(`expect`), holds the events behind it, and begins with these (`adopt`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from typing import NamedTuple

from realtime.errors import ClientError, EngineUnavailable
from realtime.pubsub.backlog import DeltaBase, Event, EventKind
from realtime.pubsub.engine import Engine, GetHistory, GetStats, Receiver, Subscribe, Unsubscribe
from realtime.pubsub.fanout import ChannelFanout, FanoutContext, FanoutServices
from realtime.pubsub.presence_record import PresenceRecord, PresenceRecords
from realtime.pubsub.subscriber import Subscriber
from realtime.pubsub.time_slices import HIGH, LOW, NORMAL, YIELD_EVERY, TimeSlicer, Waiter
from realtime.types import ClientInfo, HistoryOptions, HistoryPage, Position, Publication

HELD_LIMIT = 4096
"""Upper limit of held events on one channel, while a subscriber is between `subscribe` and `activate`. Beyond it they
are dropped, and `activate` refuses the positioned subscribers that needed them."""

# Informing one subscriber about a gap takes as long as this many deliveries.
_GAP_COST = 4

_PRIORITIES = {"high": HIGH, "normal": NORMAL, "low": LOW}
_GAP = Event(EventKind.BROKEN)


class Place(NamedTuple):
    """The place of a subscriber in its channel at a cut.

    position: of the last publication before it, None if unknown. base: of the subscriber's next delta, None without.
    """

    position: Position | None
    base: DeltaBase | None


class _Batch:
    """Subscribers that will arrive together. It takes their place among the pending ones of each channel.

    channels: in which events are held. is_cut: the cut has reached this hub.
    """

    __slots__ = ("channels", "is_cut")

    def __init__(self) -> None:
        self.channels: set[str] = set()
        self.is_cut = False


class _SharedRead:
    """A read of history for several subscribers. page: None until the answer. waiters: of all but the first of them."""

    __slots__ = ("page", "waiters")

    def __init__(self) -> None:
        self.page: HistoryPage | None = None
        self.waiters: list[Waiter] = []

    def resume(self) -> Iterator[None]:
        """Resume the waiting subscribers, one in each step."""
        for waiter in self.waiters:
            waiter.callback(None)
            yield


class _Channel:
    """One channel: its active subscribers (`fanout`), its pending ones, and the events held for those.

    last: the position of the latest publication; None if unknown. is_quiet: no publication has arrived since the last
    `Hub.check_positions`. is_subscribed: the engine has answered `Subscribe`. reads: those under way that subscribers
    share, by their query; None before the first.
    """

    __slots__ = ("fanout", "held", "is_quiet", "is_subscribed", "last", "pending", "reads")

    def __init__(self, fanout: ChannelFanout) -> None:
        self.fanout = fanout
        self.is_subscribed = self.is_quiet = False
        self.last: Position | None = None
        # The index of the first held event after each `subscribe`, the oldest subscriber first.
        self.pending: dict[Subscriber | _Batch, int] = {}
        self.held: list[Event] = []
        self.reads: dict[GetHistory, _SharedRead] | None = None

    def __len__(self) -> int:
        waiting = (each for each in self.pending if not isinstance(each, _Batch))
        return len(self.fanout.subscribers) + sum(each not in self.fanout.subscribers for each in waiting)

    def __bool__(self) -> bool:
        return bool(self.fanout.subscribers or self.pending)

    def discard(self, subscriber: Subscriber) -> bool:
        """Remove a subscriber, active or pending. Returns whether it was here."""
        was_pending = self.release(subscriber)
        return self.fanout.discard(subscriber) or was_pending

    def release(self, subscriber: Subscriber | _Batch) -> bool:
        """Hold no events for this subscriber any more. Returns whether they were held."""
        if subscriber not in self.pending:
            return False
        del self.pending[subscriber]
        if not self.pending:
            self.held = []
        return True

    def hold(self, event: Event) -> None:
        """Hold an event for the pending subscribers, if there are any."""
        if not self.pending:
            return
        if len(self.held) >= HELD_LIMIT:
            self._make_room()
        self.held.append(event)

    def _make_room(self) -> None:
        """Drop the events before the oldest pending subscriber. If they are few, it has waited too long: drop all."""
        unneeded = next(iter(self.pending.values()))
        if unneeded >= HELD_LIMIT // 2:
            del self.held[:unneeded]
            self.pending = {subscriber: first - unneeded for subscriber, first in self.pending.items()}
        else:
            self.fanout.count_dropped(len(self.held))
            self.held = [_GAP]
            self.pending = dict.fromkeys(self.pending, 0)


class Hub:
    """The local subscriptions of one worker: an `engine.Receiver`.

    engine: delivers to this hub. fanout: counts deliveries.
    """

    def __init__(
        self,
        make_engine: Callable[[Receiver], Engine],
        apply_order: Callable[[bytes], None],
        slices: TimeSlicer | None = None,
        services: FanoutServices | None = None,
        begin_arrivals: Callable[[str], None] | None = None,
    ) -> None:
        """make_engine: makes the engine that delivers to this hub, as hub and engine need each other.

        apply_order: carries out an order (see `SendOrder`). slices: for long work; None for no limit. begin_arrivals:
        called at the cut of an expected batch.
        """
        self._apply_order = apply_order
        self._begin_arrivals = begin_arrivals
        self._batches: dict[str, _Batch] = {}
        self._slices = slices or TimeSlicer.unlimited()
        self.fanout = FanoutContext(self._slices, self._on_dropped, self._on_unencodable, services or FanoutServices())
        self._channels: dict[str, _Channel] = {}
        # Channels with a gap whose relying subscribers are still in place. They are removed before anything else
        # happens on the channel. Then subscribers that are removed, but do not know of it yet.
        self._broken: dict[str, _Channel] = {}
        self._uninformed: dict[Subscriber, None] = {}
        self._is_informing = False
        self._presence_records = PresenceRecords()
        self.subscriptions = 0
        self.engine = make_engine(self)

    def channels(self) -> list[str]:
        """Return the channels that have subscribers here."""
        return list(self._channels)

    def subscribers(self, channel: str) -> int:
        """Return the number of a channel's subscribers here, active and pending."""
        state = self._channels.get(channel)
        return len(state) if state is not None else 0

    # Subscribers

    async def subscribe(self, channel: str, subscriber: Subscriber) -> None:
        """Hold a channel's events for this subscriber from now on, until `activate`.

        Raises what the engine raises for `Subscribe`; the subscriber is not added then. Waits only while the channel is
        new to this worker. A subscriber that is removed meanwhile stays removed, and `activate` returns False.
        """
        state = self._channels.get(channel)
        if state is None:
            state = self._open(channel, subscriber.priority)
        state.pending[subscriber] = len(state.held)
        self.subscriptions += 1
        if state.is_subscribed:
            return
        # Subscribers that come while the first request is under way make their own. The engine ignores a repeat, and
        # each subscriber then has an answer that does not depend on the fate of the others.
        try:
            await self.engine.ask(Subscribe(channel))
        except BaseException:
            self.unsubscribe(channel, subscriber)
            raise
        state.is_subscribed = True

    async def read_history(self, query: GetHistory) -> HistoryPage:
        """Read history for a subscriber between `subscribe` and `activate`. Raises what the engine raises.

        Subscribers that ask for the same page while one of them waits for it share its answer: thousands may come back
        at once. The answer covers every publication up to its position, and later ones arrive after it, so a subscriber
        that came after the request misses none. The sharing ends with the channel's last subscriber here.
        """
        state, waiter = self._channels.get(query.channel), self._slices.make_waiter()
        if state is None or waiter is None:
            return await self.engine.ask(query)
        reads = state.reads = state.reads if state.reads is not None else {}
        shared = reads.get(query)
        if shared is not None:
            shared.waiters.append(waiter)
            await waiter
            # Without a page the request has failed, or its subscriber has gone.
            return shared.page if shared.page is not None else await self.read_history(query)
        shared = reads[query] = _SharedRead()
        try:
            shared.page = await self.engine.ask(query)
        finally:
            del reads[query]
            if shared.waiters:
                self._slices.add(shared.resume())
        return shared.page

    def _open(self, channel: str, priority: str) -> _Channel:
        fanout = ChannelFanout(channel, _PRIORITIES[priority], self.fanout)
        state = self._channels[channel] = _Channel(fanout)
        return state

    def activate(
        self, channel: str, subscriber: Subscriber, position: Position | None, base: Publication | None = None
    ) -> bool:
        """Deliver the events held for the subscriber, and all later events of the channel.

        position: of the last publication that the subscribe reply covers, which is the top of the page that
        `GetHistory` returned; None for a subscriber without a position, which receives all held events.
        base: the last publication in the reply itself, if any: the next delta may start from it.
        Publications come first, in order; then the joins and leaves, unless the subscriber has received those already
        since `begin_replay`.
        Returns False, and has removed the subscriber, if publications are missing after `position` or belong to another
        epoch. Returns False too if the subscriber is not here (removed meanwhile, or never added).
        """
        delta_base = DeltaBase(base, position.epoch) if base is not None and position is not None else None
        return self._activate(channel, subscriber, position, delta_base)

    def _activate(
        self,
        channel: str,
        subscriber: Subscriber,
        position: Position | None,
        base: DeltaBase | None,
        *,
        continues: bool = False,
    ) -> bool:
        """continues: the subscriber was active elsewhere, so that the next publication may be a delta from `base`."""
        state = self._channels.get(channel)
        if state is None or subscriber not in state.pending:
            return False
        if self._broken.pop(channel, None) is not None:
            self._remove_relying(channel, state)
        if subscriber not in state.pending:
            return False  # it was behind, and relied on what is missing
        events = state.held[state.pending[subscriber] :]
        if (position is not None and not self._continues(channel, state, position, events)) or (
            subscriber.announced and _GAP in events
        ):
            self.unsubscribe(channel, subscriber)
            return False
        if subscriber not in state.pending:
            return False  # `on_gap` of another subscriber has just unsubscribed this one
        state.release(subscriber)
        after = position.offset if position is not None else 0
        if continues:
            missed = _in_order(after, events, announced=subscriber.announced)
        else:
            missed = _publications_after(after, events)
            if subscriber not in state.fanout.subscribers:
                missed += _joins_and_leaves(events, subscriber)
        state.fanout.activate(subscriber, missed, base, continues=continues)
        return True

    def begin_replay(self, channel: str, subscriber: Subscriber) -> bool:
        """Deliver the joins and leaves held for the subscriber, and all later ones, but no publications.

        Returns False, and has removed the subscriber, if joins or leaves are missing that it relies on; False too if
        the subscriber is not here.
        """
        state = self._channels.get(channel)
        if state is None or subscriber not in state.pending:
            return False
        if self._broken.pop(channel, None) is not None:
            self._remove_relying(channel, state)
        events = state.held[state.pending[subscriber] :]
        if subscriber.announced and _GAP in events:
            self.unsubscribe(channel, subscriber)
            return False
        state.release(subscriber)
        state.fanout.activate(subscriber, _joins_and_leaves(events, subscriber), None, is_behind=True)
        return True

    def end_replay(self, channel: str, subscriber: Subscriber) -> None:
        """Hold the channel's publications from now on for a subscriber that is behind, until `activate`.

        Call it at the engine's answer with the last page of its replay, without a wait.
        """
        state = self._channels.get(channel)
        if state is not None and subscriber in state.fanout.subscribers:
            state.pending[subscriber] = len(state.held)

    def when_delivered(self, channel: str, reached: Callable[[], None]) -> None:
        """Call `reached` when the subscribers have received all publications that have arrived so far."""
        state = self._channels.get(channel)
        if state is None:
            reached()
        else:
            state.fanout.when_delivered(reached)

    def _continues(self, channel: str, state: _Channel, position: Position, events: list[Event]) -> bool:
        """Whether the held events follow `position` without a gap, up to the latest publication."""
        if _GAP in events:
            return False
        last = state.last
        if last is None:
            state.last = position
            return True
        if last.epoch != position.epoch:
            return False
        if last.offset < position.offset:
            # An answer never overtakes a publication that it counts, so those in between are lost.
            state.last = position
            self._break(channel, state)
            return True
        newer = [e.publication.offset for e in events if e.publication and e.publication.offset > position.offset]
        return newer[0] == position.offset + 1 if newer else last.offset == position.offset

    def unsubscribe(self, channel: str, subscriber: Subscriber) -> None:
        """Remove a subscriber, active or pending. Idempotent. The last one unsubscribes the channel at the engine.

        The subscriber receives nothing more, not even queued events or a pending `on_gap`.
        """
        self._uninformed.pop(subscriber, None)
        state = self._channels.get(channel)
        if state is not None and state.discard(subscriber):
            self._account_removal(channel, state, 1)

    def _account_removal(self, channel: str, state: _Channel, subscribers: int) -> None:
        self.subscriptions -= subscribers
        if not state:
            del self._channels[channel]
            self._presence_records.interrupt(channel)
            state.fanout.clear()
            self.engine.tell(Unsubscribe(channel))

    def regroup(self, channel: str) -> None:
        """Note that an active subscriber of the channel has changed its `announced`."""
        state = self._channels.get(channel)
        if state is not None:
            state.fanout.invalidate_groups()

    # Subscribers that move

    def hand_out(self, channel: str, subscriber: Subscriber, handed: Callable[[Place | None], None]) -> None:
        """Remove a subscriber behind the events that have arrived so far, then call `handed` with its place.

        With None if the subscriber is not here, or had a gap meanwhile, which calls no `on_gap` any more.
        """
        state = self._channels.get(channel)
        if state is None:
            self._uninformed.pop(subscriber, None)
            handed(None)
            return
        if self._broken.pop(channel, None) is not None:
            self._remove_relying(channel, state)
        position = state.last

        def reached() -> None:
            if subscriber in state.fanout.subscribers:
                base = state.fanout.delta_base(subscriber)
                self.unsubscribe(channel, subscriber)
                handed(Place(position, base))
            else:
                self._uninformed.pop(subscriber, None)
                handed(None)

        state.fanout.when_delivered(reached)

    def open_batch(self, batch: str) -> None:
        """Begin to expect subscribers, before `expect` for each of their channels."""
        self._batches[batch] = _Batch()

    async def expect(self, batch: str, channel: str, priority: str) -> None:
        """Hold a channel's events from the cut of this batch on, until `release`, for subscribers that will arrive.

        Raises what the engine raises for `Subscribe`.
        """
        expected = self._batches.get(batch)
        if expected is None:
            return  # it was released meanwhile
        state = self._channels.get(channel)
        if state is None:
            state = self._open(channel, priority)
        expected.channels.add(channel)
        state.pending[expected] = len(state.held)
        if not state.is_subscribed:
            await self.engine.ask(Subscribe(channel))
            state.is_subscribed = True

    def on_cut(self, batch: str) -> None:
        """Hold the events behind this point for the subscribers of an expected batch."""
        expected = self._batches.get(batch)
        if expected is None:
            self.engine.forget_arrivals(batch)
            return
        self._hold_from_now(expected)
        if self._begin_arrivals is not None:
            self._begin_arrivals(batch)

    async def arrived(self, batch: str) -> None:
        """Wait for the cut of an expected batch that the engine has made.

        Its notice is lost if the stream to the engine was interrupted: the subscribers then have a gap.
        """
        expected = self._batches.get(batch)
        if expected is None or expected.is_cut:
            return
        with suppress(EngineUnavailable):
            await self.engine.ask(GetStats())  # the answer comes behind the cut
        if not expected.is_cut and self._batches.get(batch) is expected:
            self._hold_from_now(expected)
            for channel in expected.channels:
                self._channels[channel].hold(_GAP)

    def _hold_from_now(self, expected: _Batch) -> None:
        expected.is_cut = True
        for channel in expected.channels:
            state = self._channels[channel]
            state.release(expected)
            state.pending[expected] = len(state.held)

    def adopt(self, batch: str, channel: str, subscriber: Subscriber, place: Place, *, is_behind: bool = False) -> bool:
        """Deliver the channel's events behind the cut to a subscriber that has arrived.

        is_behind: joins and leaves alone, as after `begin_replay`. Returns False, and has not added the subscriber, if
        events that it relies on are missing.
        """
        expected, state = self._batches.get(batch), self._channels.get(channel)
        if expected is None or state is None or expected not in state.pending:
            return False
        state.pending[subscriber] = state.pending[expected]
        self.subscriptions += 1
        if is_behind:
            return self.begin_replay(channel, subscriber)
        position = place.position if subscriber.positioned else None
        return self._activate(channel, subscriber, position, place.base, continues=True)

    def release(self, batch: str) -> None:
        """Hold no more events for a batch. Idempotent."""
        expected = self._batches.pop(batch, None)
        if expected is None:
            return
        for channel in expected.channels:
            state = self._channels[channel]
            state.release(expected)
            self._account_removal(channel, state, 0)

    # Gaps

    def _break(self, channel: str, state: _Channel) -> None:
        """Handle a gap now: no positioned subscriber may receive newer publications."""
        state.hold(_GAP)
        self._remove(channel, state, [each for each in state.fanout.subscribers if each.positioned])
        self._inform()

    def _remove_relying(self, channel: str, state: _Channel) -> None:
        """Remove the subscribers that rely on every publication, or on every join and leave."""
        self._remove(channel, state, [each for each in state.fanout.subscribers if each.positioned or each.announced])

    def _remove(self, channel: str, state: _Channel, subscribers: list[Subscriber]) -> None:
        if not subscribers:
            return
        for subscriber in subscribers:
            state.discard(subscriber)
        self._account_removal(channel, state, len(subscribers))
        self._uninformed.update(dict.fromkeys(subscribers))

    def _inform(self) -> None:
        """Inform the removed subscribers, in slices of time."""
        if not self._is_informing and (self._uninformed or self._broken):
            self._is_informing = True
            self.fanout.run_sliced(self._inform_steps(), HIGH)

    def _inform_steps(self) -> Iterator[None]:
        try:
            while self._uninformed or self._broken:
                if self._uninformed:
                    subscriber, _ = self._uninformed.popitem()
                    subscriber.on_gap()
                else:
                    self._remove_relying(*self._broken.popitem())
                self.fanout.spend(_GAP_COST)
                yield
        finally:
            self._is_informing = False

    def _on_dropped(self, channel: str, publications: bool) -> None:
        state = self._channels.get(channel)
        if state is None:
            return
        self._presence_records.interrupt(channel)
        if publications:
            self._remove_relying(channel, state)
        else:
            self._remove(channel, state, [each for each in state.fanout.subscribers if each.announced])
        self._inform()

    def _on_unencodable(self, channel: str, subscriber: Subscriber) -> None:
        self.unsubscribe(channel, subscriber)
        subscriber.on_unencodable()

    # The engine's receiver

    def on_publication(self, channel: str, publication: Publication, epoch: str) -> None:
        """Check that a publication follows the latest one, and fan it out."""
        state = self._channels.get(channel)
        if state is None:
            return  # it crossed our `Unsubscribe`
        if self._broken and self._broken.pop(channel, None) is not None:
            self._remove_relying(channel, state)
        offset = publication.offset
        if offset:
            last = state.last
            if last is not None and epoch == last.epoch and offset <= last.offset:
                return
            state.last = Position(offset, epoch)
            if last is not None and (epoch != last.epoch or offset != last.offset + 1):
                self._break(channel, state)
        state.is_quiet = False
        if state.pending:
            state.hold(Event(EventKind.PUBLISHED, publication, epoch))
        state.fanout.publish(publication, epoch)

    def on_join(self, channel: str, info: ClientInfo) -> None:
        """Send the join to the subscribers that asked for joins and leaves."""
        self._deliver_join_leave(channel, EventKind.JOINED, info)

    def on_leave(self, channel: str, info: ClientInfo) -> None:
        """Send the leave to the subscribers that asked for joins and leaves."""
        self._deliver_join_leave(channel, EventKind.LEFT, info)

    def _deliver_join_leave(self, channel: str, kind: EventKind, info: ClientInfo) -> None:
        if self._presence_records:
            self._presence_records.add(channel, info, joined=kind is EventKind.JOINED)
        state = self._channels.get(channel)
        if state is not None:
            state.hold(Event(kind, info=info))
            state.fanout.deliver_join_leave(kind, info)

    def on_order(self, order: bytes) -> None:
        """Carry out an order."""
        self._apply_order(order)

    def on_missed(self, channel: str, publications: bool) -> None:
        """Handle a gap in one channel."""
        self._presence_records.interrupt(channel)
        state = self._channels.get(channel)
        if state is None or not state.is_subscribed:
            return
        state.hold(_GAP)
        if publications:
            state.last = None
            self._broken[channel] = state
        else:
            self._remove(channel, state, [each for each in state.fanout.subscribers if each.announced])
        self._inform()

    def on_interruption(self) -> None:
        """Handle a gap in every channel.

        A channel whose first `subscribe` still waits has none: its publications begin after the interruption.
        """
        self._presence_records.interrupt_all()
        for channel, state in self._channels.items():
            if state.is_subscribed:
                state.last = None
                state.hold(_GAP)
                self._broken[channel] = state
        self._inform()

    def record_presence(self, channel: str) -> AbstractContextManager[PresenceRecord]:
        """Record the channel's joins and leaves. Begin at the engine's answer to `GetPresence`, without a wait."""
        state = self._channels.get(channel)
        return self._presence_records.open(channel, is_complete=state is not None and state.is_subscribed)

    # Positions

    async def check_positions(self, history_options: Callable[[str], HistoryOptions]) -> None:
        """Compare positions with the engine's, for channels without a publication since the last call.

        The next publication reveals a lost one; this check finds a loss that no publication follows. Positioned
        subscribers of a channel with a gap are removed and informed. history_options: returns those of a channel.
        Raises EngineUnavailable. Call it every `client.channel_position_check_delay`. It asks for one channel after
        another.
        """
        for number, channel in enumerate(self.channels(), 1):
            state = self._channels.get(channel)
            if state is not None and state.is_quiet:
                await self.check_position(channel, history_options(channel))
            elif state is not None:
                state.is_quiet = True
            if number % YIELD_EVERY == 0:
                await self._slices.yield_to_loop()

    async def check_position(self, channel: str, history_options: HistoryOptions) -> None:
        """Compare one channel's position with the engine's. Raises EngineUnavailable."""
        state = self._channels.get(channel)
        if state is None or state.last is None or not history_options.enabled:
            return
        last = state.last
        try:
            page = await self.engine.ask(GetHistory(channel, history_options))
        except ClientError:
            return  # the engine has forgotten the channel and has no room for it now: there is no position to compare
        # An answer never overtakes a publication that it counts, so those have arrived, or are lost. If one arrived
        # meanwhile, the channel is not quiet, and `on_publication` has checked it.
        if self._channels.get(channel) is state and state.last is last and page.position != last:
            state.last = page.position
            self._break(channel, state)


def _publications_after(offset: int, events: list[Event]) -> list[Event]:
    """Select the held publications for a subscriber whose reply covered those up to `offset`."""
    return [event for event in events if event.publication is not None and not 0 < event.publication.offset <= offset]


def _in_order(offset: int, events: list[Event], *, announced: bool) -> list[Event]:
    """Select the held events for a subscriber that has received those before, publications up to `offset` included."""
    return [
        event
        for event in events
        if (event.info is not None and announced)
        or (event.publication is not None and not 0 < event.publication.offset <= offset)
    ]


def _joins_and_leaves(events: list[Event], subscriber: Subscriber) -> list[Event]:
    """Select the held joins and leaves for a new subscriber."""
    if not subscriber.announced:
        return []
    # The client's own leave is of an earlier subscription, which it has ended itself.
    return [
        event
        for event in events
        if event.info is not None and (event.kind is EventKind.JOINED or event.info.client != subscriber.client)
    ]
