"""The hub: who on this worker hears which channel.

Publications come from the engine (`published`), each is encoded once for every wire form among the subscribers, and
the finished frame goes straight to every connection, past its session. That shortcut is the hot path of the server:
nothing happens there for one subscriber but the call of its sink's `send` (`realtime.pubsub.fanout`).

Whether the publications of a channel are complete is judged once per channel, when they arrive: repeats are dropped,
and after a gap or under another epoch every positioned member is told that it lost its place, and hears nothing newer.

A member goes through two steps, so that its subscribe reply can come before anything else on its channel: `add` has
the channel's publications arrive, held back for now; then the session asks for the position, replies, and calls `open`
with what the reply said.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from realtime.errors import ClientError
from realtime.pubsub.backlog import DeltaBase, Event, EventKind
from realtime.pubsub.engine import Engine, GetHistory, Subscribe, Unsubscribe
from realtime.pubsub.fanout import ChannelFanout, FanoutContext
from realtime.pubsub.subscriber import Subscriber
from realtime.pubsub.time_slices import BREATH, HIGH, LOW, NORMAL, TimeSlicer
from realtime.types import ClientInfo, HistoryOptions, Position, Publication

HELD_LIMIT = 4096
"""Events held back on one channel while some member is between `add` and `open`. Beyond it they are dropped, and
whoever needed them is told at `open`."""

# Telling one member that it lost its place takes as long as this many deliveries.
_LOSS = 4

_PRIORITIES = {"high": HIGH, "normal": NORMAL, "low": LOW}
_BREAK = Event(EventKind.BROKEN)


class _Channel:
    """One channel: its open members (`fan`), those that are not open yet, and what is held back for them.

    last: the position of the last publication that came (None: not known). quiet: nothing was published since the last
    look at all channels.
    """

    __slots__ = ("fan", "held", "last", "pending", "quiet", "subscribed")

    def __init__(self, fan: ChannelFanout) -> None:
        self.fan = fan
        self.subscribed = self.quiet = False
        self.last: Position | None = None
        # The index of the first held event that came after `add`; the eldest member first.
        self.pending: dict[Subscriber, int] = {}
        self.held: list[Event] = []

    def __len__(self) -> int:
        return len(self.fan.members) + len(self.pending)

    def discard(self, member: Subscriber) -> bool:
        """Whether the member was here."""
        if member in self.pending:
            del self.pending[member]
            if not self.pending:
                self.held = []
            return True
        return self.fan.discard(member)

    def hold(self, event: Event) -> None:
        """Keep an event for the pending members, if there are any."""
        if not self.pending:
            return
        if len(self.held) >= HELD_LIMIT:
            self._make_room()
        self.held.append(event)

    def _make_room(self) -> None:
        """Drop what came before the eldest pending member; if that is not much, it waits for too long: drop all."""
        unneeded = next(iter(self.pending.values()))
        if unneeded >= HELD_LIMIT // 2:
            del self.held[:unneeded]
            self.pending = {member: first - unneeded for member, first in self.pending.items()}
        else:
            self.held = [_BREAK]
            self.pending = dict.fromkeys(self.pending, 0)


class Hub:
    """The local subscriptions of one worker: an `engine.Receiver`.

    engine: set once by whoever builds both, since each needs the other. traffic: counts what is delivered.
    """

    engine: Engine

    def __init__(self, obey: Callable[[bytes], None], slices: TimeSlicer | None = None) -> None:
        """obey: is handed every order (see `SendOrder`). slices: where long work waits, None for nowhere."""
        self._obey = obey
        self._slices = slices or TimeSlicer.unlimited()
        self.fanout = FanoutContext(self._slices, self._overflowed, self._unfit)
        self._channels: dict[str, _Channel] = {}
        # Channels whose positioned members have lost their place and are yet to be taken out, before anything else
        # happens there; then members that are out, and yet to be told.
        self._broken: dict[str, _Channel] = {}
        self._lost: dict[Subscriber, None] = {}
        self._losing = False
        self.subscriptions = 0

    def channels(self) -> list[str]:
        """The channels that have members here."""
        return list(self._channels)

    def subscribers(self, channel: str) -> int:
        """How many members a channel has here, those that are not open yet included."""
        state = self._channels.get(channel)
        return len(state) if state is not None else 0

    # Members

    async def subscribe(self, channel: str, member: Subscriber) -> None:
        """Have a channel's events held back for this member from now on, until `open`.

        Raises what `Engine.subscribe` raises; the member is not added then. Waits only while the channel is new to
        this worker. A member that is removed meanwhile stays removed, and `open` will say so.
        """
        state = self._channels.get(channel)
        if state is None:
            fan = ChannelFanout(channel, _PRIORITIES[member.priority], self.fanout)
            state = self._channels[channel] = _Channel(fan)
        state.pending[member] = len(state.held)
        self.subscriptions += 1
        if state.subscribed:
            return
        # Members that come while the first one's call is under way make their own: the engine takes a repeat for
        # nothing, and each then has an answer of its own, whatever becomes of the others.
        try:
            await self.engine.ask(Subscribe(channel))
        except BaseException:
            self.unsubscribe(channel, member)
            raise
        state.subscribed = True

    def activate(
        self, channel: str, member: Subscriber, position: Position | None, base: Publication | None = None
    ) -> bool:
        """Deliver what was held back for the member, and from now on whatever comes.

        position: of the last publication that the subscribe reply covers, which is the top of the page that the
        engine's `history` returned; None for a member without a position, which gets all that was held.
        base: the last publication that the reply itself brought, if it brought any: a delta may start from that.
        Publications come first, in order; then the joins and leaves.
        Returns False, and has removed the member, if publications are missing after `position` or belong to another
        epoch; also if the member is not there (removed meanwhile, or never added).
        """
        state = self._channels.get(channel)
        if state is None or member not in state.pending:
            return False
        if self._broken.pop(channel, None) is not None:
            self._lose(channel, state)
        events = state.held[state.pending[member] :]
        if position is not None and not self._continues(channel, state, position, events):
            self.unsubscribe(channel, member)
            return False
        if member not in state.pending:
            return False  # somebody who was lost just now took it along
        state.discard(member)
        after = position.offset if position is not None else 0
        state.fan.open(
            member,
            _counted_out(member, events, after),
            DeltaBase(base, position.epoch) if base is not None and position is not None else None,
        )
        return True

    def _continues(self, channel: str, state: _Channel, position: Position, events: list[Event]) -> bool:
        """Whether what was held follows on `position` without a hole, up to the last publication that came."""
        if _BREAK in events:
            return False
        last = state.last
        if last is None:
            state.last = position
            return True
        if last.epoch != position.epoch:
            return False
        if last.offset < position.offset:
            # An answer never overtakes a publication that it counts, so those in between will not come any more.
            state.last = position
            self._break(channel, state)
            return True
        newer = [e.publication.offset for e in events if e.publication and e.publication.offset > position.offset]
        return newer[0] == position.offset + 1 if newer else last.offset == position.offset

    def unsubscribe(self, channel: str, member: Subscriber) -> None:
        """Take a member out, open or not. Idempotent. The last one unsubscribes the channel at the engine.

        It hears nothing more, whatever waits for it; nor that it lost its place, if it was to hear that.
        """
        self._lost.pop(member, None)
        state = self._channels.get(channel)
        if state is not None and state.discard(member):
            self._gone(channel, state, 1)

    def _gone(self, channel: str, state: _Channel, members: int) -> None:
        """Account for members that were taken out of `state`."""
        self.subscriptions -= members
        if not state:
            del self._channels[channel]
            state.fan.clear()
            self.engine.tell(Unsubscribe(channel))

    def _break(self, channel: str, state: _Channel) -> None:
        """Continuity is broken: no positioned member may go on as if nothing were missing."""
        state.hold(_BREAK)
        self._lose(channel, state)
        self._work_off_losses()

    def _lose(self, channel: str, state: _Channel) -> None:
        lost = [member for member in state.fan.members if member.positioned]
        if not lost:
            return
        for member in lost:
            state.discard(member)
        self._gone(channel, state, len(lost))
        self._lost.update(dict.fromkeys(lost))

    def _work_off_losses(self) -> None:
        if not self._losing and (self._lost or self._broken):
            self._losing = True
            self.fanout.work(self._losses(), HIGH)

    def _losses(self) -> Iterator[None]:
        try:
            while self._lost or self._broken:
                if self._lost:
                    member, _ = self._lost.popitem()
                    member.on_gap()
                else:
                    self._lose(*self._broken.popitem())
                self.fanout.spend(_LOSS)
                yield
        finally:
            self._losing = False

    def _overflowed(self, channel: str) -> None:
        state = self._channels.get(channel)
        if state is not None:
            self._lose(channel, state)
            self._work_off_losses()

    def _unfit(self, channel: str, member: Subscriber) -> None:
        self.unsubscribe(channel, member)
        member.on_unencodable()

    # What the engine calls

    def on_publication(self, channel: str, publication: Publication, epoch: str) -> None:
        """Judge a publication's place, and fan it out."""
        state = self._channels.get(channel)
        if state is None:
            return  # it crossed our unsubscribe
        if self._broken and self._broken.pop(channel, None) is not None:
            self._lose(channel, state)
        offset = publication.offset
        if offset:
            last = state.last
            if last is not None and epoch == last.epoch and offset <= last.offset:
                return
            state.last = Position(offset, epoch)
            if last is not None and (epoch != last.epoch or offset != last.offset + 1):
                self._break(channel, state)
        state.quiet = False
        if state.pending:
            state.hold(Event(EventKind.PUBLISHED, publication, epoch))
        state.fan.publish(publication, epoch)

    def on_join(self, channel: str, info: ClientInfo) -> None:
        """Tell the members that want to know."""
        self._deliver_join_leave(channel, EventKind.JOINED, info)

    def on_leave(self, channel: str, info: ClientInfo) -> None:
        """Tell the members that want to know."""
        self._deliver_join_leave(channel, EventKind.LEFT, info)

    def _deliver_join_leave(self, channel: str, kind: EventKind, info: ClientInfo) -> None:
        state = self._channels.get(channel)
        if state is not None:
            state.hold(Event(kind, info=info))
            state.fan.herald(kind, info)

    def on_order(self, order: bytes) -> None:
        self._obey(order)

    def on_interruption(self) -> None:
        """Every positioned member loses its place. A channel whose first `add` still waits has none to lose: its
        publications begin after the interruption."""
        for channel, state in self._channels.items():
            if state.subscribed:
                state.last = None
                state.hold(_BREAK)
                self._broken[channel] = state
        self._work_off_losses()

    # Positions

    async def check_positions(self, history_options: Callable[[str], HistoryOptions]) -> None:
        """Compare the positions of the channels that had no publication since the last call with the engine's.

        What was lost on the way shows by the next publication, if there is one; this finds what was lost with none
        after it. Positioned members of a channel with a hole lose their place. history_options: of a channel, by its
        name. Raises EngineUnavailable. To be called every `client.channel_position_check_delay`; one channel after
        another.
        """
        for number, channel in enumerate(self.channels(), 1):
            state = self._channels.get(channel)
            if state is not None and state.quiet:
                await self.check_position(channel, history_options(channel))
            elif state is not None:
                state.quiet = True
            if number % BREATH == 0:
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
            return  # the engine has forgotten the channel, and has no room for it now: there is nothing to compare with
        # An answer never overtakes what it counts, so all of that has come, unless it is lost. If something came
        # meanwhile, then the channel is not quiet, and `published` judges.
        if self._channels.get(channel) is state and state.last is last and page.position != last:
            state.last = page.position
            self._break(channel, state)


def _counted_out(member: Subscriber, events: list[Event], after: int) -> list[Event]:
    """What of the held events is for this member, whose reply counted the publications up to `after`."""
    newer = [one for one in events if one.publication is not None and not 0 < one.publication.offset <= after]
    return newer + [one for one in events if one.info is not None] if member.announced else newer
