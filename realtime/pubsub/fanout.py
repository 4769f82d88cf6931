"""The fan-out of one channel: what is under way to its open members.

An event is encoded once for all members that get the same bytes, and delivered at once, as long as nothing else of the
channel is under way and the turn has time for it. Else it waits in the channel's backlog, in order, and is worked off
in slices (`realtime.pubsub.time_slices`), so that a burst on one channel holds neither the loop nor the other channels.
Publications that wait there go to each member several at a time.

What is complete, and who may hear it, has been judged before (`realtime.pubsub.hub`). Whoever leaves hears nothing of
what waits; whoever opens while something waits begins behind that.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from typing import TypeGuard

from realtime.errors import Disconnect
from realtime.metrics import Counter
from realtime.pubsub.backlog import Backlog, DeltaBase, Event, EventKind, Opening
from realtime.pubsub.fossil_delta import delta
from realtime.pubsub.subscriber import FrameEncoder, Sink, Subscriber
from realtime.pubsub.time_slices import CHUNK, TimeSlicer
from realtime.types import ClientInfo, Publication

BACKLOG_LIMIT = 4096
"""Events that one channel may have yet to deliver. Beyond it they are dropped, and whoever needs them is told."""

BACKLOG_BYTES = 64 * 1024 * 1024
"""Bytes of publications that all channels may have yet to deliver. Beyond it the largest backlog is dropped."""

TOGETHER_BYTES = 16 * 1024
"""Bytes of publications that go to a member in one write, when more than one waits."""

PATCH_LIMIT = 256 * 1024
"""Bytes of the longest publication that is sent as a delta: to make one takes time."""

# To part with a member takes as long as many deliveries, and so may its filter.
_SMALL_CHUNK = 8

# How a group gets publications. Filtered members are asked for each.
_PLAIN, _WHOLE, _PATCHED, _FILTERED, _FILTERED_WHOLE = range(5)


class _Group:
    """Members that get the same bytes. The lists are parallel, and never change once the group is in use."""

    __slots__ = ("form", "members", "sinks", "variant")

    def __init__(self, form: FrameEncoder, variant: int) -> None:
        self.form = form
        self.variant = variant
        self.members: list[Subscriber] = []
        self.sinks: list[Sink] = []


class _Deltas:
    """What the deltas of a channel start from. There is one while it has members with `delta`.

    base: what they all got last, but the `fresh` ones, who have nothing yet. members: how many they are.
    """

    __slots__ = ("base", "fresh", "members")

    def __init__(self) -> None:
        self.base: DeltaBase | None = None
        self.fresh: set[Subscriber] = set()
        self.members = 0

    def patch(self, publication: Publication) -> bytes | None:
        """The publication as a delta, if it is to be sent as one, and that is shorter."""
        if self.base is None or not publication.delta or len(publication.data) > PATCH_LIMIT:
            return None
        patch = delta(self.base.publication.data, publication.data)
        return patch if len(patch) < len(publication.data) else None


class FanoutContext:
    """What the fans of one worker share.

    sent: counts deliveries. broadcast: sends one frame to many, as the function here or in a better way. overflows:
    counts backlogs that were dropped. queued: bytes of publications that are yet to be delivered. charged: may put
    something around the steps that a channel's backlog takes.
    """

    def __init__(
        self, slices: TimeSlicer, overflowed: Callable[[str], None], unfit: Callable[[str, Subscriber], None]
    ) -> None:
        """overflowed: a channel's backlog was dropped. unfit: a member of a channel can't be sent a publication."""
        self.slices = slices
        self.overflowed = overflowed
        self.unfit = unfit
        self.sent = Counter()
        self.broadcast: Callable[[bytes, Sequence[Sink]], None] = broadcast
        self.overflows = Counter()
        self.queued = 0
        self.charged: Callable[[str, Iterator[None]], Iterator[None]] = lambda channel, steps: steps
        self.backlogs: dict[ChannelFanout, Backlog] = {}
        self._direct = 0

    def spend(self, deliveries: int) -> None:
        """As much time was spent as so many deliveries take."""
        self._direct += deliveries
        if self._direct >= CHUNK:
            self._direct = 0
            self.slices.begin()

    def work(self, steps: Iterator[None], priority: int) -> None:
        """Work for as long as there is time, and leave the rest for later turns."""
        slices = self.slices
        while slices.free:
            for _ in steps:
                break
            else:
                return
        slices.add(steps, priority)


class ChannelFanout:
    """See the module. members: the open ones."""

    __slots__ = (
        "_backlog",
        "_busy",
        "_channel",
        "_deltas",
        "_few",
        "_filters",
        "_groups",
        "_heralds",
        "_priority",
        "_traffic",
        "_version",
        "members",
    )

    def __init__(self, channel: str, priority: int, traffic: FanoutContext) -> None:
        """priority: of `slices`."""
        self.members: dict[Subscriber, None] = {}
        self._channel = channel
        self._priority = priority
        self._traffic = traffic
        # From the first delivery of something until nothing waits any more.
        self._busy = False
        self._backlog: Backlog | None = None
        self._deltas: _Deltas | None = None
        # Made when needed, from the members who hear the channel now; another version whenever those are others.
        self._version = 0
        self._groups: list[_Group] | None = None
        self._heralds: list[_Group] | None = None
        # The groups, if all members together are few and get plain publications.
        self._few: list[_Group] | None = None
        self._filters = 0  # members that have one

    # Members

    def open(self, member: Subscriber, events: list[Event], base: DeltaBase | None) -> None:
        """Deliver these events to a new member, and from now on whatever comes.

        base: the last publication that it has already, if there is one.
        """
        self.members[member] = None
        self._filters += member.filter is not None
        if events or self._busy:
            self._submit(Opening(member, events, base))
        else:
            self._let_hear(member, base)

    def _let_hear(self, member: Subscriber, base: DeltaBase | None) -> None:
        if self._backlog is not None:
            self._backlog.late.discard(member)
        if member.delta:
            deltas = self._deltas = self._deltas or _Deltas()
            deltas.members += 1
            if base is not None and deltas.base is None:
                deltas.base = base
            elif base is None or deltas.base is None or not base.same(deltas.base):
                deltas.fresh.add(member)
        self._changed()

    def discard(self, member: Subscriber) -> bool:
        """Take a member out; whether it was here. It hears nothing more."""
        if member not in self.members:
            return False
        del self.members[member]
        self._filters -= member.filter is not None
        if self._backlog is not None and member in self._backlog.late:
            self._backlog.late.discard(member)
        elif member.delta and self._deltas is not None:
            self._deltas.fresh.discard(member)
            self._deltas.members -= 1
            if not self._deltas.members:
                self._deltas = None
        self._changed()
        return True

    def _changed(self) -> None:
        self._version += 1
        self._groups = self._heralds = self._few = None

    def _hearing(self) -> Iterable[Subscriber]:
        if self._backlog is None or not self._backlog.late:
            return self.members
        return [member for member in self.members if member not in self._backlog.late]

    # Events

    def publish(self, publication: Publication, epoch: str) -> None:
        """Deliver a publication."""
        few, traffic = self._few, self._traffic
        if few is None or self._busy or publication.binary or (traffic.slices.timed and not traffic.slices.free):
            self._submit(Event(EventKind.PUBLISHED, publication, epoch))
            return
        # The most frequent case, in which all the rest comes to no more than this.
        self._busy = True
        try:
            for group in few:
                frame = group.form.publication(self._channel, publication, epoch)
                traffic.broadcast(frame, group.sinks)
                traffic.sent.value += len(group.sinks)
        finally:
            traffic.spend(len(self.members))
            self._end_direct()

    def herald(self, kind: EventKind, info: ClientInfo) -> None:
        """Deliver a join or leave to those who want to know."""
        self._submit(Event(kind, info=info))

    def clear(self) -> None:
        """Drop what waits."""
        if self._backlog is not None:
            self._drop(self._backlog, *EventKind)

    def _submit(self, job: Event | Opening) -> None:
        """Do a job after all that came before it: at once, if nothing waits and there is time."""
        few = len(self.members) <= CHUNK and self._filters <= _SMALL_CHUNK
        if self._busy or not (few and _is_light(job) and self._traffic.slices.free):
            self._queue(job)
            return
        self._busy = True
        try:
            for _ in self._fan_out(job):
                pass
        finally:
            self._end_direct()

    def _end_direct(self) -> None:
        self._busy = False
        if self._backlog is not None:  # a delivery had further events as its consequence
            self._start(self._backlog)

    def _queue(self, job: Event | Opening) -> None:
        traffic, backlog = self._traffic, self._backlog
        if backlog is None:
            backlog = self._backlog = traffic.backlogs[self] = Backlog()
        backlog.append(job)
        if isinstance(job, Event):
            traffic.queued += job.size
            if backlog.events > BACKLOG_LIMIT:
                self._shorten(backlog)
            elif traffic.queued > BACKLOG_BYTES:
                max(traffic.backlogs, key=lambda fan: traffic.backlogs[fan].size)._overflow()
        if not self._busy:
            self._start(backlog)

    def _start(self, backlog: Backlog) -> None:
        self._busy = True
        self._traffic.work(self._traffic.charged(self._channel, self._work_off(backlog)), self._priority)

    def _work_off(self, backlog: Backlog) -> Iterator[None]:
        try:
            while backlog.jobs:
                job = backlog.popleft()
                if isinstance(job, Opening):
                    yield from self._replay(job)
                else:
                    self._traffic.queued -= job.size
                    yield from self._fan_out(job, backlog)
        except Exception:
            # A mistake of ours costs this job, and none of those behind it.
            self._start(backlog)
            raise
        self._backlog = None
        self._busy = False
        del self._traffic.backlogs[self]

    def _fan_out(self, event: Event, backlog: Backlog | None = None) -> Iterator[None]:
        """backlog: what waits behind the event. Of that, what can go with it does."""
        version = self._version
        frames, number = self._frames(event), 1
        if backlog is not None and backlog.jobs and _is_text(event):
            frames, number = self._joined(frames, event.size, backlog)
        for group, frame in frames:
            size = CHUNK if frame is not None and group.variant < _FILTERED else _SMALL_CHUNK
            for start in range(0, len(group.members), size):
                end = start + size
                if self._version == version and frame is not None and group.variant < _FILTERED:
                    sinks = group.sinks[start:end]
                    self._traffic.broadcast(frame, sinks)
                    self._traffic.sent.value += len(sinks) * number
                else:
                    for member in group.members[start:end]:
                        self._give(member, frame, event, number)
                self._traffic.spend(min(size, len(group.members)) * (CHUNK // size))
                yield
        self._end(event)

    def _joined(
        self, frames: list[tuple[_Group, bytes | None]], size: int, backlog: Backlog
    ) -> tuple[list[tuple[_Group, bytes | None]], int]:
        """These frames with those of the publications behind them, and how many publications that makes.

        A write costs about the same for one frame and for many. Only where everybody gets the same bytes.
        """
        number = 1
        if any(group.variant != _PLAIN or frame is None for group, frame in frames):
            return frames, number
        parts = [[frame or b""] for _, frame in frames]
        while backlog.jobs and _is_text(job := backlog.jobs[0]) and (size := size + job.size) <= TOGETHER_BYTES:
            try:
                more = [frame for _, frame in self._frames(job)]
            except Exception:  # a mistake of ours costs this publication, once it is the first
                break
            if None in more:
                break
            backlog.popleft()
            self._traffic.queued -= job.size
            number += 1
            for part, frame in zip(parts, more, strict=True):
                part.append(frame or b"")
        return [(group, b"".join(part)) for (group, _), part in zip(frames, parts, strict=True)], number

    def _give(self, member: Subscriber, frame: bytes | None, event: Event, number: int = 1) -> None:
        """Deliver to one member, if it is still there and wants the event. number: of publications in the frame."""
        if member not in self.members or not _wants(member, event):
            return
        if frame is None:
            self._traffic.unfit(self._channel, member)
        else:
            member.sink.deliver(frame)
            self._traffic.sent.value += number

    def _end(self, event: Event) -> None:
        """An event was delivered. If it was a publication, all members have it for a base now."""
        if event.publication is not None and self._deltas is not None and self._deltas.fresh:
            self._deltas.fresh.clear()
            self._changed()

    def _replay(self, opening: Opening) -> Iterator[None]:
        """Deliver what was held back for one member, and let it hear the channel then."""
        member, base = opening.member, opening.base
        variant = _WHOLE if member.delta else _PLAIN
        for number, event in enumerate(opening.events, 1):
            if member not in self.members:
                return
            if _wants(member, event):
                self._give(member, self._frame({}, member.form, variant, event, None), event)
                if event.publication is not None:
                    base = DeltaBase(event.publication, event.epoch)
            if number % CHUNK == 0:
                self._traffic.spend(CHUNK)
                yield
        if member in self.members:
            self._let_hear(member, base)
        yield

    # Encoding

    def _frames(self, event: Event) -> list[tuple[_Group, bytes | None]]:
        """The groups that hear of an event, each with its bytes; None if its form can't carry them."""
        made: dict[tuple[FrameEncoder, bool], bytes | None] = {}
        if event.publication is None:
            if self._heralds is None:
                self._heralds = _grouped((member for member in self._hearing() if member.announced), None)
            return [(group, self._frame(made, group.form, _PLAIN, event, None)) for group in self._heralds]
        groups = self._groups
        if groups is None:
            fresh = self._deltas.fresh if self._deltas is not None else ()
            groups = self._groups = _grouped(self._hearing(), fresh)
            if len(self.members) <= CHUNK and all(group.variant == _PLAIN for group in groups):
                self._few = groups
        patch = None
        if self._deltas is not None:
            if any(group.variant == _PATCHED for group in groups):
                patch = self._deltas.patch(event.publication)
            self._deltas.base = DeltaBase(event.publication, event.epoch)
        return [(group, self._frame(made, group.form, group.variant, event, patch)) for group in groups]

    def _frame(
        self,
        made: dict[tuple[FrameEncoder, bool], bytes | None],
        form: FrameEncoder,
        variant: int,
        event: Event,
        patch: bytes | None,
    ) -> bytes | None:
        """What members of this form and variant get; None if the form can't carry it. made: what was made already."""
        channel, publication, epoch, info = self._channel, event.publication, event.epoch, event.info
        if info is not None:
            return form.join(channel, info) if event.kind is EventKind.JOINED else form.leave(channel, info)
        assert publication is not None
        if variant == _PATCHED and patch is not None:
            frame = form.delta_publication(channel, publication, patch, epoch)
            if frame is not None:
                return frame
        whole = variant in (_WHOLE, _PATCHED, _FILTERED_WHOLE)
        key = (form, whole)
        if key not in made:
            try:
                made[key] = (form.full_publication if whole else form.publication)(channel, publication, epoch)
            except Disconnect:
                made[key] = None
        return made[key]

    # What is too much

    def _shorten(self, backlog: Backlog) -> None:
        """There are too many events. Joins and leaves are the first to go: nobody counts on them."""
        self._drop(backlog, EventKind.JOINED, EventKind.LEFT)
        if backlog.events > BACKLOG_LIMIT // 2:
            self._overflow()

    def _overflow(self) -> None:
        """Drop the backlog. Positioned members recover from history; the others miss what they were not promised."""
        self._traffic.overflows.value += 1
        self.clear()
        self._traffic.overflowed(self._channel)

    def _drop(self, backlog: Backlog, *kinds: EventKind) -> None:
        self._traffic.queued -= backlog.size
        backlog.drop(*kinds)
        self._traffic.queued += backlog.size


def broadcast(frame: bytes, sinks: Sequence[Sink]) -> None:
    """The hot path of the server: for each delivery one call, which as a rule is send(2)."""
    size = len(frame)
    for sink in sinks:
        send = sink.send
        try:
            sent = send(frame)
        except OSError:
            sent = 0
        if sent != size:
            sink.queue_remainder(frame, sent)


def _is_light(job: Event | Opening) -> TypeGuard[Event]:
    """Whether a job takes no more time than the deliveries to all members; binary data may part with them."""
    return isinstance(job, Event) and (job.publication is None or not job.publication.binary)


def _is_text(job: Event | Opening) -> TypeGuard[Event]:
    """Whether a job is a publication that every form can carry."""
    return isinstance(job, Event) and job.publication is not None and not job.publication.binary


def _wants(member: Subscriber, event: Event) -> bool:
    return member.filter is None or event.publication is None or member.filter(event.publication.tags)


def _grouped(members: Iterable[Subscriber], fresh: Container[Subscriber] | None) -> list[_Group]:
    """The members by what they get. fresh: see `_Deltas`; None when all of a form get the same."""
    groups: dict[object, _Group] = {}
    for member in members:
        key: object = member.form
        variant = _PLAIN
        if (member.delta or member.filter is not None) and fresh is not None:
            variant = _variant(member, fresh)
            key = (key, variant)
        group = groups.get(key)
        if group is None:
            group = groups[key] = _Group(member.form, variant)
        group.members.append(member)
        group.sinks.append(member.sink)
    return list(groups.values())


def _variant(member: Subscriber, fresh: Container[Subscriber]) -> int:
    if member.filter is not None:
        return _FILTERED_WHOLE if member.delta else _FILTERED
    return _WHOLE if member in fresh else _PATCHED
