"""The fan-out of one channel: deliveries to its active subscribers, in order.

An event is encoded once for all subscribers that receive the same bytes. It is delivered at once if the channel has no
other delivery in progress and the turn has time. Otherwise it joins the channel's backlog, which is delivered in slices
(`realtime.pubsub.time_slices`), so a burst on one channel blocks neither the loop nor the other channels. From the
backlog, subscribers receive several publications in one write.

The hub (`realtime.pubsub.hub`) has decided before that an event is complete and who subscribes. A subscriber that
leaves receives nothing of the backlog; one that becomes active while there is a backlog starts behind it. A subscriber
that is *behind* receives joins and leaves alone, as its session sends it earlier publications from history.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeGuard

from realtime.errors import Disconnect
from realtime.metrics import Counter
from realtime.pubsub.backlog import Activation, Backlog, DeltaBase, Event, EventKind, Job, Mark
from realtime.pubsub.fossil_delta import delta
from realtime.pubsub.subscriber import FrameEncoder, Sink, Subscriber
from realtime.pubsub.time_slices import CHUNK, TimeSlicer
from realtime.types import ClientInfo, Publication

BACKLOG_LIMIT = 4096
"""Upper limit of events in the backlog of one channel. Beyond it they are dropped, which is a gap for the
subscribers that rely on them."""

BACKLOG_BYTES = 64 * 1024 * 1024
"""Upper limit in bytes of the publications in all backlogs. Beyond it the largest backlog is dropped."""

BATCH_BYTES = 16 * 1024
"""Upper limit in bytes of the publications that one write delivers to a subscriber, if the backlog has several."""

PATCH_LIMIT = 256 * 1024
"""Bytes of the longest publication that is sent as a delta, as computing one takes time."""

# Removing a subscriber takes as long as many deliveries, and so may its filter.
_SMALL_CHUNK = 8

# How a group receives publications. The filters of filtered subscribers are called for each publication.
_PLAIN, _WHOLE, _PATCHED, _FILTERED, _FILTERED_WHOLE = range(5)


class _Group:
    """Subscribers that receive the same bytes. The lists are parallel, and immutable once the group is in use."""

    __slots__ = ("form", "sinks", "subscribers", "variant")

    def __init__(self, form: FrameEncoder, variant: int) -> None:
        self.form = form
        self.variant = variant
        self.subscribers: list[Subscriber] = []
        self.sinks: list[Sink] = []


class _DeltaState:
    """The delta base of a channel, while it has subscribers with `delta`.

    base: the publication that all of them received last, except the `fresh` ones, which have no base yet. subscribers:
    their number.
    """

    __slots__ = ("base", "fresh", "subscribers")

    def __init__(self) -> None:
        self.base: DeltaBase | None = None
        self.fresh: set[Subscriber] = set()
        self.subscribers = 0

    def patch(self, publication: Publication) -> bytes | None:
        """Return the delta of a publication for the subscribers that are not fresh, if it has one."""
        return _patch_from(self.base, publication)


def _patch_from(base: DeltaBase | None, publication: Publication | None) -> bytes | None:
    """Return the delta of a publication; None if it was not published with `delta`, or the delta is not shorter."""
    if base is None or publication is None or not publication.delta or len(publication.data) > PATCH_LIMIT:
        return None
    patch = delta(base.publication.data, publication.data)
    return patch if len(patch) < len(publication.data) else None


def broadcast(frame: bytes, sinks: Sequence[Sink]) -> None:
    """Write a frame to each sink. The hot path of the server: one call for each delivery, as a rule send(2).

    It is `Sink.deliver` written out, since a further call for each delivery would cost as much as the loop itself.
    """
    size = len(frame)
    for sink in sinks:
        send = sink.send
        try:
            sent = send(frame)
        except OSError:
            sent = 0
        if sent != size:
            sink.queue_remainder(frame, sent)


def _uncharged(channel: str, steps: Iterator[None]) -> Iterator[None]:
    return steps


@dataclass(frozen=True, slots=True)
class FanoutServices:
    """Collaborators of all fan-outs of one worker.

    broadcast: sends one frame to many sinks. charge: takes a channel and the steps of its backlog, and returns steps
    whose time is charged to the channel. sent: counts deliveries. overflows: counts dropped backlogs. dropped: counts
    dropped events.
    """

    broadcast: Callable[[bytes, Sequence[Sink]], None] = broadcast
    charge: Callable[[str, Iterator[None]], Iterator[None]] = _uncharged
    sent: Counter = field(default_factory=Counter)
    overflows: Counter = field(default_factory=Counter)
    dropped: Counter = field(default_factory=Counter)


class FanoutContext:
    """State and collaborators that the fan-outs of one worker share.

    queued: bytes of the publications in all backlogs. The other attributes: see `FanoutServices`.
    """

    def __init__(
        self,
        slices: TimeSlicer,
        on_dropped: Callable[[str, bool], None],
        on_unencodable: Callable[[str, Subscriber], None],
        services: FanoutServices,
    ) -> None:
        """on_dropped: called with a channel whose queued joins and leaves were dropped, and whether the publications
        were too. on_unencodable: called with a channel and a subscriber whose format cannot carry a publication."""
        self.slices = slices
        self.on_dropped = on_dropped
        self.on_unencodable = on_unencodable
        # Attributes of this object and not of a record within: the hot path reads them once less.
        self.broadcast = services.broadcast
        self.charge = services.charge
        self.sent = services.sent
        self.overflows = services.overflows
        self.dropped = services.dropped
        self.queued = 0
        self.backlogs: dict[ChannelFanout, Backlog] = {}
        self._direct_deliveries = 0  # since the clock was last read

    def spend(self, deliveries: int) -> None:
        """Charge the time of `deliveries` deliveries to this turn. The clock is read once for each chunk of them."""
        self._direct_deliveries += deliveries
        if self._direct_deliveries >= CHUNK:
            self._direct_deliveries = 0
            self.slices.start_slice()

    def run_sliced(self, steps: Iterator[None], priority: int) -> None:
        """Run steps as long as this turn has time, and the others in later turns."""
        slices = self.slices
        while slices.has_time:
            for _ in steps:
                break
            else:
                return
        slices.add(steps, priority)


class ChannelFanout:
    """Delivers the events of one channel. See the module. subscribers: the active ones, in the order of activation."""

    __slots__ = (
        "_backlog",
        "_behind",
        "_busy",
        "_channel",
        "_context",
        "_deltas",
        "_filters",
        "_groups",
        "_join_leave_groups",
        "_plain_groups",
        "_priority",
        "_version",
        "subscribers",
    )

    def __init__(self, channel: str, priority: int, context: FanoutContext) -> None:
        """priority: of `time_slices`."""
        self.subscribers: dict[Subscriber, None] = {}
        self._channel = channel
        self._priority = priority
        self._context = context
        # From the first delivery until the backlog is empty.
        self._busy = False
        self._backlog: Backlog | None = None
        self._deltas: _DeltaState | None = None
        # Groups are made on demand from the subscribers that receive events now, and dropped when those change. The
        # version changes with them, so that a fan-out in progress notices.
        self._version = 0
        self._groups: list[_Group] | None = None
        self._join_leave_groups: list[_Group] | None = None
        # The same as `_groups`, if all subscribers together are few and receive plain publications.
        self._plain_groups: list[_Group] | None = None
        self._filters = 0  # subscribers with a filter
        self._behind: set[Subscriber] | None = None

    # Subscribers

    def activate(
        self,
        subscriber: Subscriber,
        events: list[Event],
        base: DeltaBase | None,
        *,
        is_behind: bool = False,
        continues: bool = False,
    ) -> None:
        """Deliver the held events to a subscriber that is new or was behind, and all later events of the channel.

        base: the last publication that the subscriber has already, if any. is_behind: only joins and leaves, until the
        next call. continues: the held publications may be deltas, as for a subscriber that has been active.
        """
        is_new = subscriber not in self.subscribers
        if is_new:
            self.subscribers[subscriber] = None
            self._filters += subscriber.filter is not None
        if events or self._busy:
            self._submit(Activation(subscriber, events, base, is_behind, is_late=is_new, continues=continues))
        else:
            self._start_delivery(subscriber, base, is_behind)

    def _start_delivery(self, subscriber: Subscriber, base: DeltaBase | None, is_behind: bool) -> None:
        if self._backlog is not None:
            self._backlog.late.discard(subscriber)
        if is_behind:
            self._behind = self._behind or set()
            self._behind.add(subscriber)
        else:
            self._catch_up(subscriber, base)
        self.invalidate_groups()

    def _catch_up(self, subscriber: Subscriber, base: DeltaBase | None) -> None:
        """Let a subscriber receive publications."""
        if self._behind is not None:
            self._behind.discard(subscriber)
            self._behind = self._behind or None
        if subscriber.delta:
            deltas = self._deltas = self._deltas or _DeltaState()
            deltas.subscribers += 1
            if base is not None and deltas.base is None:
                deltas.base = base
            elif base is None or deltas.base is None or not base.is_same(deltas.base):
                deltas.fresh.add(subscriber)

    def discard(self, subscriber: Subscriber) -> bool:
        """Remove a subscriber, which receives nothing more. Returns whether it was active."""
        if subscriber not in self.subscribers:
            return False
        del self.subscribers[subscriber]
        self._filters -= subscriber.filter is not None
        if self._backlog is not None and subscriber in self._backlog.late:
            self._backlog.late.discard(subscriber)
        elif self._behind is not None and subscriber in self._behind:
            self._behind.discard(subscriber)
        elif subscriber.delta and self._deltas is not None:
            self._deltas.fresh.discard(subscriber)
            self._deltas.subscribers -= 1
            if not self._deltas.subscribers:
                self._deltas = None
        self.invalidate_groups()
        return True

    def delta_base(self, subscriber: Subscriber) -> DeltaBase | None:
        """Return the publication from which the next delta for an active subscriber would start, if it has one."""
        deltas = self._deltas
        if deltas is None or not subscriber.delta or subscriber in deltas.fresh:
            return None
        return deltas.base if self._behind is None or subscriber not in self._behind else None

    def count_dropped(self, events: int) -> None:
        """Count events that were held for new subscribers, and dropped."""
        self._context.dropped.value += events

    def invalidate_groups(self) -> None:
        """Group the subscribers anew before the next event: they or their features have changed."""
        self._version += 1
        self._groups = self._join_leave_groups = self._plain_groups = None

    def _recipients(self) -> Iterable[Subscriber]:
        """Return the subscribers that receive joins and leaves now."""
        if self._backlog is None or not self._backlog.late:
            return self.subscribers
        return [subscriber for subscriber in self.subscribers if subscriber not in self._backlog.late]

    def _readers(self) -> Iterable[Subscriber]:
        """Return the subscribers that receive publications now."""
        if not self._behind:
            return self._recipients()
        return [subscriber for subscriber in self._recipients() if subscriber not in self._behind]

    # Events

    def publish(self, publication: Publication, epoch: str) -> None:
        """Deliver a publication."""
        groups, context = self._plain_groups, self._context
        slices = context.slices
        if groups is None or self._busy or publication.binary or (slices.is_timed and not slices.has_time):
            self._submit(Event(EventKind.PUBLISHED, publication, epoch))
            return
        # The short way for the most frequent case: few subscribers, no filters or deltas, text, and time left. It does
        # what `_submit` comes to then, without an event, a generator or a chunk.
        self._busy = True  # a delivery may end a subscription, or publish on this channel
        try:
            for group in groups:
                frame = group.form.publication(self._channel, publication, epoch)
                context.broadcast(frame, group.sinks)
                context.sent.value += len(group.sinks)
        finally:
            context.spend(len(self.subscribers))
            self._end_direct()

    def deliver_join_leave(self, kind: EventKind, info: ClientInfo) -> None:
        """Deliver a join or leave to the subscribers with `announced`."""
        self._submit(Event(kind, info=info))

    def when_delivered(self, reached: Callable[[], None]) -> None:
        """Call `reached` when the present backlog has been delivered: at once if there is none."""
        if self._busy:
            self._queue(Mark(reached))
        else:
            reached()

    def clear(self) -> None:
        """Drop the events of the backlog."""
        if self._backlog is not None:
            self._drop(self._backlog, *EventKind)

    def _submit(self, job: Job) -> None:
        """Deliver a job after all earlier ones: at once, if there is no backlog and the turn has time."""
        # Small enough to run in one piece, without a look at the clock in between.
        is_short = len(self.subscribers) <= CHUNK and self._filters <= _SMALL_CHUNK
        if self._busy or not (is_short and _is_light(job) and self._context.slices.has_time):
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
        if self._backlog is not None:  # the delivery itself caused further events
            self._start(self._backlog)

    def _queue(self, job: Job) -> None:
        context, backlog = self._context, self._backlog
        if backlog is None:
            backlog = self._backlog = context.backlogs[self] = Backlog()
        backlog.append(job)
        if isinstance(job, Event):
            context.queued += job.size
            if backlog.events > BACKLOG_LIMIT:
                self._shorten(backlog)
            elif context.queued > BACKLOG_BYTES:
                max(context.backlogs, key=lambda fanout: context.backlogs[fanout].size)._overflow()
        if not self._busy:
            self._start(backlog)

    def _start(self, backlog: Backlog) -> None:
        self._busy = True
        self._context.run_sliced(self._context.charge(self._channel, self._deliver_backlog(backlog)), self._priority)

    def _deliver_backlog(self, backlog: Backlog) -> Iterator[None]:
        try:
            while backlog.jobs:
                job = backlog.popleft()
                if isinstance(job, Activation):
                    yield from self._replay(job)
                elif isinstance(job, Mark):
                    job.reached()
                else:
                    self._context.queued -= job.size
                    yield from self._fan_out(job, backlog)
        except Exception:
            # A bug costs this job alone: the jobs behind it are still delivered.
            self._start(backlog)
            raise
        self._backlog = None
        self._busy = False
        del self._context.backlogs[self]

    def _fan_out(self, event: Event, backlog: Backlog | None = None) -> Iterator[None]:
        """Deliver an event to its groups, a chunk at each step.

        backlog: the jobs behind the event; publications among them may go into the same writes.
        """
        version = self._version
        frames, number = self._frames(event), 1
        if backlog is not None and backlog.jobs and _is_text(event):
            frames, number = self._batch(frames, event.size, backlog)
        for group, frame in frames:
            # Without a frame each subscriber is removed, and with a filter each is asked: both are slower than a write.
            size = CHUNK if frame is not None and group.variant < _FILTERED else _SMALL_CHUNK
            for start in range(0, len(group.subscribers), size):
                end = start + size
                if self._version == version and frame is not None and group.variant < _FILTERED:
                    # No subscriber has left since the groups were made, so the sinks need no check.
                    sinks = group.sinks[start:end]
                    self._context.broadcast(frame, sinks)
                    self._context.sent.value += len(sinks) * number
                else:
                    for subscriber in group.subscribers[start:end]:
                        self._deliver(subscriber, frame, event, number)
                self._context.spend(min(size, len(group.subscribers)) * (CHUNK // size))
                yield
        self._end(event)

    def _batch(
        self, frames: list[tuple[_Group, bytes | None]], size: int, backlog: Backlog
    ) -> tuple[list[tuple[_Group, bytes | None]], int]:
        """Append the frames of the publications at the head of the backlog, which are removed from it.

        Returns the frames and the number of publications in each. A write costs about the same for one frame and for
        many. Only where all subscribers of a format receive the same bytes. size: bytes of the publication in `frames`.
        """
        number = 1
        if any(group.variant != _PLAIN or frame is None for group, frame in frames):
            return frames, number
        parts = [[frame or b""] for _, frame in frames]
        while backlog.jobs and _is_text(job := backlog.jobs[0]) and (size := size + job.size) <= BATCH_BYTES:
            try:
                following = [frame for _, frame in self._frames(job)]
            except Exception:  # a bug costs this publication, once it is the first of a batch
                break
            if None in following:
                break
            backlog.popleft()
            self._context.queued -= job.size
            number += 1
            for part, frame in zip(parts, following, strict=True):
                part.append(frame or b"")
        return [(group, b"".join(part)) for (group, _), part in zip(frames, parts, strict=True)], number

    def _deliver(self, subscriber: Subscriber, frame: bytes | None, event: Event, number: int = 1) -> None:
        """Deliver to one subscriber, if it is still active and its filter passes. number: of publications in the
        frame."""
        if subscriber not in self.subscribers or not _passes_filter(subscriber, event):
            return
        if frame is None:
            self._context.on_unencodable(self._channel, subscriber)
        else:
            subscriber.sink.deliver(frame)
            self._context.sent.value += number

    def _end(self, event: Event) -> None:
        """Note that an event was delivered: a publication is the delta base of all subscribers now."""
        if event.publication is not None and self._deltas is not None and self._deltas.fresh:
            self._deltas.fresh.clear()
            self.invalidate_groups()

    def _replay(self, activation: Activation) -> Iterator[None]:
        """Deliver the held events to one subscriber; from then on it receives the channel's events."""
        subscriber, base = activation.subscriber, activation.base
        variant = _WHOLE if subscriber.delta else _PLAIN
        is_patched = activation.continues and subscriber.delta and subscriber.filter is None
        for number, event in enumerate(activation.events, 1):
            if subscriber not in self.subscribers:
                return
            if _passes_filter(subscriber, event):
                patch = _patch_from(base, event.publication) if is_patched else None
                frame = self._frame({}, subscriber.form, _PATCHED if patch is not None else variant, event, patch)
                self._deliver(subscriber, frame, event)
                if event.publication is not None:
                    base = DeltaBase(event.publication, event.epoch)
            if number % CHUNK == 0:
                self._context.spend(CHUNK)
                yield
        if subscriber in self.subscribers:
            self._start_delivery(subscriber, base, activation.is_behind)
        yield

    # Encoding

    def _frames(self, event: Event) -> list[tuple[_Group, bytes | None]]:
        """Return the groups that receive an event, each with its bytes; None if its format cannot carry them."""
        encoded: dict[tuple[FrameEncoder, bool], bytes | None] = {}
        if event.publication is None:
            if self._join_leave_groups is None:
                self._join_leave_groups = _grouped((s for s in self._recipients() if s.announced), None)
            return [(group, self._frame(encoded, group.form, _PLAIN, event, None)) for group in self._join_leave_groups]
        groups = self._groups
        if groups is None:
            fresh = self._deltas.fresh if self._deltas is not None else ()
            groups = self._groups = _grouped(self._readers(), fresh)
            if len(self.subscribers) <= CHUNK and all(group.variant == _PLAIN for group in groups):
                self._plain_groups = groups
        patch = None
        if self._deltas is not None:
            if any(group.variant == _PATCHED for group in groups):
                patch = self._deltas.patch(event.publication)
            self._deltas.base = DeltaBase(event.publication, event.epoch)
        return [(group, self._frame(encoded, group.form, group.variant, event, patch)) for group in groups]

    def _frame(
        self,
        encoded: dict[tuple[FrameEncoder, bool], bytes | None],
        form: FrameEncoder,
        variant: int,
        event: Event,
        patch: bytes | None,
    ) -> bytes | None:
        """Return the bytes for subscribers of this format and variant; None if the format cannot carry the event.

        encoded: frames of this event so far, by format and whether they are for subscribers with `delta`.
        """
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
        if key not in encoded:
            try:
                encoded[key] = (form.full_publication if whole else form.publication)(channel, publication, epoch)
            except Disconnect:
                encoded[key] = None
        return encoded[key]

    # Limits

    def _shorten(self, backlog: Backlog) -> None:
        """Handle too many events. Joins and leaves go first: their subscribers only have to ask for presence anew."""
        before = backlog.events
        self._drop(backlog, EventKind.JOINED, EventKind.LEFT)
        dropped = before - backlog.events
        self._context.dropped.value += dropped
        if backlog.events > BACKLOG_LIMIT // 2:
            self._overflow()
        elif dropped:
            self._context.on_dropped(self._channel, False)

    def _overflow(self) -> None:
        """Drop the backlog. Positioned subscribers recover from history; the others were not promised everything."""
        self._context.overflows.value += 1
        if self._backlog is not None:
            self._context.dropped.value += self._backlog.events
        self.clear()
        self._context.on_dropped(self._channel, True)

    def _drop(self, backlog: Backlog, *kinds: EventKind) -> None:
        self._context.queued -= backlog.size
        backlog.drop(*kinds)
        self._context.queued += backlog.size


def _is_light(job: Job) -> TypeGuard[Event]:
    """Whether a job takes no longer than its deliveries; binary data may remove subscribers instead."""
    return isinstance(job, Event) and (job.publication is None or not job.publication.binary)


def _is_text(job: Job) -> TypeGuard[Event]:
    """Whether a job is a publication that every format can carry."""
    return isinstance(job, Event) and job.publication is not None and not job.publication.binary


def _passes_filter(subscriber: Subscriber, event: Event) -> bool:
    return subscriber.filter is None or event.publication is None or subscriber.filter(event.publication.tags)


def _grouped(subscribers: Iterable[Subscriber], fresh: Container[Subscriber] | None) -> list[_Group]:
    """Group subscribers by the bytes that they receive.

    fresh: see `_DeltaState`; None for joins and leaves, which are the same for all subscribers of a format.
    """
    groups: dict[object, _Group] = {}
    for subscriber in subscribers:
        key: object = subscriber.form
        variant = _PLAIN
        if (subscriber.delta or subscriber.filter is not None) and fresh is not None:
            variant = _variant(subscriber, fresh)
            key = (key, variant)
        group = groups.get(key)
        if group is None:
            group = groups[key] = _Group(subscriber.form, variant)
        group.subscribers.append(subscriber)
        group.sinks.append(subscriber.sink)
    return list(groups.values())


def _variant(subscriber: Subscriber, fresh: Container[Subscriber]) -> int:
    if subscriber.filter is not None:
        return _FILTERED_WHOLE if subscriber.delta else _FILTERED
    return _WHOLE if subscriber in fresh else _PATCHED
