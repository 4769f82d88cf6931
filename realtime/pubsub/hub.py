"""The hub: who on this worker hears which channel, and the fan-out to them.

Publications come from the engine (`published`), each is encoded once for every wire form among the subscribers, and
the finished frame goes straight to every connection, past its session. That shortcut is the hot path of the server:
nothing happens there for one subscriber but the call of its `deliver`.

Whether the publications of a channel are complete is judged once per channel: repeats are dropped, and after a gap or
under another epoch every positioned member is told that it lost its place, before it sees anything newer.

A member goes through two steps, so that its subscribe reply can come before anything else on its channel: `add` has
the channel's publications arrive, held back for now; then the session asks for the position, replies, and calls `open`
with what the reply said.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import Enum, auto
from typing import NamedTuple, Protocol

from realtime.metrics import Counter
from realtime.pubsub.engine import Engine
from realtime.records import ClientInfo, Position, Publication

HELD_LIMIT = 4096
"""Events held back on one channel while some member is between `add` and `open`. Beyond it they are dropped, and
whoever needed them is told at `open`."""


class Form(Protocol):
    """One wire form of a push. The frames are complete and ready to write."""

    def publication(self, channel: str, publication: Publication, epoch: str) -> bytes: ...

    def join(self, channel: str, info: ClientInfo) -> bytes: ...

    def leave(self, channel: str, info: ClientInfo) -> bytes: ...


class Member(Protocol):
    """One subscription of one session. Told apart by identity; added to one channel, once.

    positioned: told when continuity breaks. announced: gets joins and leaves. None of these changes from `Hub.open` on.
    """

    @property
    def form(self) -> Form:
        """Its wire form, told apart by identity."""

    positioned: bool
    announced: bool
    deliver: Callable[[bytes], None]
    """A bound method of the connection. Never raises."""

    def lost(self) -> None:
        """The publications have a hole, or another epoch. The hub has removed this member before it says so."""


class _Kind(Enum):
    PUBLISHED = auto()
    JOINED = auto()
    LEFT = auto()
    BROKEN = auto()


class _Event(NamedTuple):
    """Something held back for members that are not open yet."""

    kind: _Kind
    publication: Publication | None = None
    epoch: str = ""
    info: ClientInfo | None = None


_BREAK = _Event(_Kind.BROKEN)

Fan = list[tuple[Form, list[Callable[[bytes], None]]]]


class _Channel:
    """The members of one channel, and the position of the last publication that came (None: not known)."""

    __slots__ = ("_fan", "_heralds", "held", "last", "members", "pending", "subscribed")

    def __init__(self) -> None:
        self.subscribed = False
        self.last: Position | None = None
        self.members: dict[Member, None] = {}
        # The index of the first held event that came after `add`; the eldest member first.
        self.pending: dict[Member, int] = {}
        self.held: list[_Event] = []
        self._fan: Fan | None = None
        self._heralds: Fan | None = None

    def __len__(self) -> int:
        return len(self.members) + len(self.pending)

    def open(self, member: Member) -> None:
        """Make a pending member an open one."""
        self.discard(member)
        self.members[member] = None
        self._fan = self._heralds = None

    def discard(self, member: Member) -> bool:
        """Whether the member was here."""
        if member in self.members:
            del self.members[member]
            self._fan = self._heralds = None
            return True
        if member in self.pending:
            del self.pending[member]
            if not self.pending:
                self.held = []
            return True
        return False

    def hold(self, event: _Event) -> None:
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

    def fan(self) -> Fan:
        """The open members' `deliver`, by form. A list once made is never changed, so it may be walked while members
        come and go."""
        if self._fan is None:
            self._fan = _group(self.members)
        return self._fan

    def heralds(self) -> Fan:
        """As `fan`, for joins and leaves."""
        if self._heralds is None:
            self._heralds = _group(member for member in self.members if member.announced)
        return self._heralds


def _heralding(form: Form, channel: str, kind: _Kind, info: ClientInfo) -> bytes:
    return form.join(channel, info) if kind is _Kind.JOINED else form.leave(channel, info)


def _group(members: Iterable[Member]) -> Fan:
    groups: dict[Form, list[Callable[[bytes], None]]] = {}
    for member in members:
        groups.setdefault(member.form, []).append(member.deliver)
    return list(groups.items())


class Hub:
    """The local subscriptions of one worker: an `engine.Receiver`.

    obey: is handed every order (see `Engine.instruct`).
    engine: set once by whoever builds both, since each needs the other. sent: counts what the fan-out delivers.
    """

    engine: Engine

    def __init__(self, obey: Callable[[bytes], None]) -> None:
        self._obey = obey
        self._channels: dict[str, _Channel] = {}
        self.subscriptions = 0
        self.sent = Counter()

    def channels(self) -> list[str]:
        """The channels that have members here."""
        return list(self._channels)

    def subscribers(self, channel: str) -> int:
        """How many members a channel has here, those that are not open yet included."""
        state = self._channels.get(channel)
        return len(state) if state is not None else 0

    async def add(self, channel: str, member: Member) -> None:
        """Have a channel's events held back for this member from now on, until `open`.

        Raises what `Engine.subscribe` raises; the member is not added then. Waits only while the channel is new to
        this worker. A member that is removed meanwhile stays removed, and `open` will say so.
        """
        state = self._channels.get(channel)
        if state is None:
            state = self._channels[channel] = _Channel()
        state.pending[member] = len(state.held)
        self.subscriptions += 1
        if state.subscribed:
            return
        # Members that come while the first one's call is under way make their own: the engine takes a repeat for
        # nothing, and each then has an answer of its own, whatever becomes of the others.
        try:
            await self.engine.subscribe(channel)
        except BaseException:
            self.remove(channel, member)
            raise
        state.subscribed = True

    def open(self, channel: str, member: Member, position: Position | None) -> bool:
        """Deliver what was held back for the member, and from now on whatever comes.

        position: of the last publication that the subscribe reply covers, which is the top of the page that the
        engine's `history` returned; None for a member without a position, which gets all that was held.
        Publications come first, in order; then the joins and leaves.
        Returns False, and has removed the member, if publications are missing after `position` or belong to another
        epoch; also if the member is not there (removed meanwhile, or never added).
        """
        state = self._channels.get(channel)
        if state is None or member not in state.pending:
            return False
        events = state.held[state.pending[member] :]
        if position is not None and not self._continues(channel, state, position, events):
            self.remove(channel, member)
            return False
        after = position.offset if position is not None else 0
        if member not in state.pending:
            return False  # somebody who was lost just now took it along
        state.open(member)
        form = member.form
        for _, publication, epoch, _ in events:
            if publication is not None and not 0 < publication.offset <= after:
                member.deliver(form.publication(channel, publication, epoch))
        if member.announced:
            for event in events:
                if event.info is not None:
                    member.deliver(_heralding(form, channel, event.kind, event.info))
        return True

    def _continues(self, channel: str, state: _Channel, position: Position, events: list[_Event]) -> bool:
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

    def remove(self, channel: str, member: Member) -> None:
        """Take a member out, open or not. Idempotent. The last one unsubscribes the channel at the engine."""
        state = self._channels.get(channel)
        if state is not None and state.discard(member):
            self._gone(channel, state, 1)

    def _gone(self, channel: str, state: _Channel, members: int) -> None:
        """Account for members that were taken out of `state`."""
        self.subscriptions -= members
        if not state:
            del self._channels[channel]
            self.engine.unsubscribe(channel)

    def _break(self, channel: str, state: _Channel) -> None:
        """Continuity is broken: no positioned member may go on as if nothing were missing."""
        state.hold(_BREAK)
        lost = [member for member in state.members if member.positioned]
        if not lost:
            return
        for member in lost:
            state.discard(member)
        self._gone(channel, state, len(lost))
        for member in lost:
            member.lost()

    # What the engine calls

    def published(self, channel: str, publication: Publication, epoch: str) -> None:
        """Judge a publication's place, and fan it out."""
        state = self._channels.get(channel)
        if state is None:
            return  # it crossed our unsubscribe
        offset = publication.offset
        if offset:
            last = state.last
            if last is not None and epoch == last.epoch and offset <= last.offset:
                return
            state.last = Position(offset, epoch)
            if last is not None and (epoch != last.epoch or offset != last.offset + 1):
                self._break(channel, state)
        if state.pending:
            state.hold(_Event(_Kind.PUBLISHED, publication, epoch))
        for form, delivers in state.fan():
            frame = form.publication(channel, publication, epoch)
            for deliver in delivers:
                deliver(frame)
            self.sent.value += len(delivers)

    def joined(self, channel: str, info: ClientInfo) -> None:
        """Tell the members that want to know."""
        self._herald(channel, _Kind.JOINED, info)

    def left(self, channel: str, info: ClientInfo) -> None:
        """Tell the members that want to know."""
        self._herald(channel, _Kind.LEFT, info)

    def _herald(self, channel: str, kind: _Kind, info: ClientInfo) -> None:
        state = self._channels.get(channel)
        if state is None:
            return
        state.hold(_Event(kind, info=info))
        for form, delivers in state.heralds():
            frame = _heralding(form, channel, kind, info)
            for deliver in delivers:
                deliver(frame)
            self.sent.value += len(delivers)

    def instructed(self, order: bytes) -> None:
        self._obey(order)

    def interrupted(self) -> None:
        """Every positioned member loses its place. A channel whose first `add` still waits has none to lose: its
        publications begin after the interruption."""
        for channel, state in list(self._channels.items()):
            if state.subscribed:
                state.last = None
                self._break(channel, state)
