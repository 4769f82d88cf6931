"""The recent publications of each channel, and their numbering.

A channel with history has a *stream*: the last publications, the offset of the newest (the top) and an epoch, as in
sections 5.6 and 7.1 of the client protocol. `ChannelStreams` holds all streams; `IdempotencyCache` holds the
idempotency keys. Neither knows of subscribers. Time is an argument everywhere, in seconds of any clock that never goes
back.

There are no timers. An access finds expired entries, and `sweep`, called periodically, frees those without an access.
For the sweep a channel needs at most two list entries, in queues by the time of expiry.

A channel that was only asked about has no stream, however many are asked about: its epoch is derived from its name
(`Epochs`), and its first publication starts the stream with that epoch.
"""

from __future__ import annotations

import random
import secrets
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from heapq import heappop, heappush
from itertools import islice
from string import ascii_letters
from typing import Generic, TypeVar

from msgspec import Struct

from realtime.errors import LIMIT_EXCEEDED, ClientError
from realtime.pubsub.broker_state import StatePart, chunks
from realtime.pubsub.engine import PAGE_BYTES, GetHistory, Publish
from realtime.types import HistoryOptions, HistoryPage, Position, Publication

IDEMPOTENCY_TTL = 300.0
"""Seconds for which an idempotency key is remembered (client protocol, section 7.1)."""

EXPORTED = 256
"""Publications of one stream in one part of the state."""

SHORT = 128
"""Up to this length a list moves up when its oldest publication is dropped; a longer one leaves the place empty."""

_PAST = float("-inf")

T = TypeVar("T")


def make_epoch() -> str:
    """Return a new epoch: 8 random letters, as Centrifugo does."""
    return "".join(random.choices(ascii_letters, k=8))


def epoch_letters(number: bytes) -> str:
    """Return the epoch that 8 random bytes stand for: 8 letters, as `make_epoch`."""
    rest = int.from_bytes(number)
    letters = []
    for _ in range(8):
        rest, letter = divmod(rest, len(ascii_letters))
        letters.append(ascii_letters[letter])
    return "".join(letters)


class Epochs:
    """The epochs of channels without a stream.

    An epoch follows from the channel's name, a secret of this object, and the generation of the channel: the number of
    streams forgotten so far. So it stays the same until the store forgets a stream of the channel, and never returns.
    Channels share generations, in GENERATIONS groups: after a stream was forgotten, other channels of its group get a
    new epoch early, and their clients `recovered: false`.
    """

    GENERATIONS = 65536

    def __init__(self) -> None:
        self._secret = secrets.token_bytes(16)
        self._generations: dict[int, int] = {}

    def of(self, channel: str) -> str:
        """Return the channel's epoch: 8 letters, as `make_epoch`."""
        group = self.group(self._secret, channel)
        seed = b"%d %b" % (self._generations.get(group, 0), channel.encode())
        return epoch_letters(blake2b(seed, digest_size=8, key=self._secret).digest())

    def retire(self, channel: str) -> None:
        """Give the channel a new epoch, as its stream is forgotten."""
        group = self.group(self._secret, channel)
        self._generations[group] = self._generations.get(group, 0) + 1

    def export(self) -> EpochsState:
        """Return the whole state."""
        return EpochsState(self._secret, self._generations)

    def import_part(self, part: EpochsState) -> None:
        """Go on with the state of other epochs."""
        self._secret, self._generations = part.secret, dict(part.generations)

    @classmethod
    def group(cls, secret: bytes, channel: str) -> int:
        """Return the group of a channel under this secret."""
        return int.from_bytes(blake2b(channel.encode(), digest_size=4, key=secret).digest()) % cls.GENERATIONS


def approximate_size(publication: Publication) -> int:
    """Return the approximate bytes of a publication on the wire."""
    info, tags = publication.info, publication.tags
    size = len(publication.data) + 64
    if info is not None:
        size += len(info.conn_info) + len(info.chan_info) + 128
    return size + sum(len(name) + len(value) + 8 for name, value in tags.items()) if tags else size


class EpochsState(StatePart, tag=1, frozen=True, gc=False):
    """`Epochs`. secret, generations: as there."""

    secret: bytes
    generations: dict[int, int]


class StreamState(Struct, array_like=True, frozen=True, gc=False):
    """A stream, with its first or next publications."""

    channel: str
    epoch: str
    idle_until: float
    top: int
    expires: float
    version: int
    version_epoch: str
    publications: list[Publication]


class StreamsState(StatePart, tag=2, frozen=True, gc=False):
    """Some streams."""

    streams: list[StreamState]


class KeyState(Struct, array_like=True, frozen=True, gc=False):
    """An idempotency key. ends: when it is forgotten."""

    channel: str
    key: str
    ends: float
    position: Position


class KeysState(StatePart, tag=3, frozen=True, gc=False):
    """Some idempotency keys, those that end first before the others."""

    keys: list[KeyState]


class ChannelStream(Struct, eq=False, gc=False):
    """The stream of one channel.

    The stored publications have successive offsets up to `top`. They are `_stored[_head:]`. In a long list, dropping
    the oldest clears its place, and the cleared places are cut off from time to time: a publish takes constant time,
    and a page is a slice.

    There may be a million streams. Each has few objects, of which the garbage collector tracks the list alone.
    idle_until: the time from which the stream may be removed, unless it has publications. expires: the time from which
    the publications are dropped; in the past without any. is_queued: whether the queue of expiring publications has
    this stream.
    """

    channel: str
    epoch: str
    idle_until: float
    top: int = 0
    is_queued: bool = False
    expires: float = _PAST
    _stored: list[Publication | None] = []
    _head: int = 0
    _version: tuple[int, str] = (0, "")  # the latest version, and its epoch

    def __len__(self) -> int:
        return len(self._stored) - self._head

    @property
    def position(self) -> Position:
        """The position of the top."""
        return Position(self.top, self.epoch)

    @property
    def version(self) -> tuple[int, str]:
        """The latest version, and its epoch."""
        return self._version

    @property
    def removable_from(self) -> float:
        """The time from which the stream may be removed: when it is idle for long enough, and empty."""
        return max(self.idle_until, self.expires)

    def touch(self, now: float, history_options: HistoryOptions) -> bool:
        """Prolong the stream for an access, and drop expired publications. False: the stream itself has expired."""
        if now >= self.expires:
            if now >= self.idle_until:
                return False
            if self._stored:
                self.clear()
        self.idle_until = now + history_options.meta_ttl
        return True

    def expire(self, now: float) -> None:
        """Drop the publications if they have expired at `now`."""
        if now >= self.expires and self._stored:
            self.clear()

    def clear(self) -> None:
        """Drop the publications; the numbering continues."""
        self._stored = []
        self._head = 0
        self.expires = _PAST

    def append(self, now: float, request: Publish) -> Publication:
        """Number and store one publication; drop the oldest beyond the size."""
        self.top = top = self.top + 1
        stored, options = self._stored, request.history_options
        excess = len(stored) + 1 - options.size
        if excess > self._head:
            self._drop(excess)
        publication = Publication(request.data, top, request.info, request.tags, request.delta, request.binary)
        stored.append(publication)
        self.expires = now + options.ttl
        return publication

    def _drop(self, end: int) -> None:
        """Drop the publications before this index."""
        stored = self._stored
        if len(stored) < SHORT or end > len(stored) // 2:
            del stored[:end]
            self._head = 0
        else:
            stored[self._head : end] = [None] * (end - self._head)
            self._head = end

    def advance(self, version: int, epoch: str) -> bool:
        """Store a version if it is later than the latest one, or belongs to another epoch. Returns whether it was.

        epoch: "" for the epoch of the latest version.
        """
        latest, latest_epoch = self._version
        if version <= latest and epoch in ("", latest_epoch):
            return False
        self._version = (version, epoch)
        return True

    def export(self) -> Iterator[StreamState]:
        """Yield the state, in parts of EXPORTED publications."""
        stored = [publication for publication in islice(self._stored, self._head, None) if publication is not None]
        for start in range(0, len(stored) or 1, EXPORTED):
            some = stored[start : start + EXPORTED]
            yield StreamState(self.channel, self.epoch, self.idle_until, self.top, self.expires, *self._version, some)

    def import_part(self, part: StreamState) -> None:
        """Go on with the state of another stream, of which this is the next part."""
        self.idle_until, self.top, self.expires = part.idle_until, part.top, part.expires
        self._version = (part.version, part.version_epoch)
        self._stored = [*self._stored, *part.publications]

    def page(self, query: GetHistory) -> HistoryPage:
        """Return a page of the stored publications, and the position of the top. See `GetHistory`.

        Only the offset of `since` counts. If the publication after it is no longer stored, a forward page starts at the
        oldest one. A reverse page is empty if the publication before `since` is not stored.
        """
        oldest, since = self.top - len(self) + 1, query.since
        if query.reverse:
            first = self.top if since is None else since.offset - 1
            offsets: Iterable[int] = range(first, oldest - 1, -1) if first <= self.top else ()
        else:
            first = oldest if since is None else max(since.offset + 1, oldest)
            offsets = range(first, self.top + 1)
        room = min(query.max_bytes, PAGE_BYTES)
        return HistoryPage(self._collect(offsets, query.limit, room, self._head - oldest), self.position)

    def _collect(self, offsets: Iterable[int], limit: int, room: int, shift: int) -> list[Publication]:
        """Return the publications of these offsets, at most `limit`, and up to `room` bytes.

        shift: the index of a publication minus its offset.
        """
        found: list[Publication] = []
        for offset in offsets:
            publication = self._stored[offset + shift]
            if len(found) == limit or publication is None:
                break
            room -= approximate_size(publication)
            if room < 0 and found:
                break
            found.append(publication)
        return found


class ExpiryQueue(Generic[T]):
    """Entries ordered by the time of their expiry, in buckets of `grain` seconds.

    Adding costs one list append, whatever the length of the queue. No entry is returned before its time.
    """

    def __init__(self, grain: float) -> None:
        self._grain = grain
        self._buckets: dict[int, list[T]] = {}
        self._order: list[int] = []

    def add(self, when: float, entry: T) -> None:
        """Add an entry that expires at this time."""
        number = int(when // self._grain) + 1
        bucket = self._buckets.get(number)
        if bucket is None:
            bucket = self._buckets[number] = []
            heappush(self._order, number)
        bucket.append(entry)

    def take(self, now: float, limit: int) -> list[T]:
        """Remove and return up to `limit` expired entries."""
        due: list[T] = []
        while self._order and self._order[0] * self._grain <= now and len(due) < limit:
            bucket = self._buckets[self._order[0]]
            room = limit - len(due)
            due += bucket[-room:]
            del bucket[-room:]
            if not bucket:
                del self._buckets[heappop(self._order)]
        return due


class ChannelStreams:
    """The streams of all channels with a publication. max_channels: their limit."""

    def __init__(self, max_channels: int, epochs: Epochs | None = None) -> None:
        self._max_channels = max_channels
        self._epochs = epochs or Epochs()
        self._streams: dict[str, ChannelStream] = {}
        self._expiring: ExpiryQueue[ChannelStream] = ExpiryQueue(1.0)
        self._idle: ExpiryQueue[ChannelStream] = ExpiryQueue(60.0)

    def __len__(self) -> int:
        return len(self._streams)

    def open(self, now: float, channel: str, history_options: HistoryOptions) -> ChannelStream:
        """Return the stream of a channel to read, and prolong it; an empty one that is not stored if there is none."""
        stream = self._find(now, channel, history_options)
        return stream if stream is not None else ChannelStream(channel, self._epochs.of(channel), now)

    def open_to_publish(self, now: float, channel: str, history_options: HistoryOptions) -> ChannelStream:
        """Return the stream of a channel, which is created if there is none, and prolong it.

        Raises ClientError 106 if the limit leaves no room for it.
        """
        stream = self._find(now, channel, history_options)
        if stream is not None:
            return stream
        if len(self._streams) >= self._max_channels:
            raise ClientError(*LIMIT_EXCEEDED)
        epoch = self._epochs.of(channel)
        stream = self._streams[channel] = ChannelStream(channel, epoch, now + history_options.meta_ttl)
        self._idle.add(stream.removable_from, stream)
        return stream

    def _find(self, now: float, channel: str, history_options: HistoryOptions) -> ChannelStream | None:
        stream = self._streams.get(channel)
        if stream is None or stream.touch(now, history_options):
            return stream
        self._forget(channel)
        return None

    def _forget(self, channel: str) -> None:
        del self._streams[channel]
        self._epochs.retire(channel)

    def append(self, now: float, request: Publish) -> tuple[Publication, str]:
        """Number and store one publication; returns it with its epoch. Raises as `open_to_publish`."""
        stream = self.open_to_publish(now, request.channel, request.history_options)
        publication = stream.append(now, request)
        if not stream.is_queued:
            stream.is_queued = True
            self._expiring.add(stream.expires, stream)
        return publication, stream.epoch

    def remove(self, channel: str) -> None:
        """Drop the publications of a channel; offset and epoch continue."""
        stream = self._streams.get(channel)
        if stream is not None:
            stream.clear()

    def export(self) -> Iterator[StatePart]:
        """Yield the state in parts. Nothing may change meanwhile."""
        yield self._epochs.export()
        states = (state for stream in self._streams.values() for state in stream.export())
        yield from map(StreamsState, chunks(states, _size_of))

    def import_streams(self, part: StreamsState) -> None:
        """Add streams of another object, or further publications of them, whatever the limit."""
        for state in part.streams:
            stream = self._streams.get(state.channel)
            if stream is None:
                stream = ChannelStream(state.channel, state.epoch, state.idle_until)
                self._streams[state.channel] = stream
                self._idle.add(max(state.idle_until, state.expires), stream)
            stream.import_part(state)
            if stream and not stream.is_queued:
                stream.is_queued = True
                self._expiring.add(stream.expires, stream)

    def import_epochs(self, part: EpochsState) -> None:
        """Go on with the epochs of another object."""
        self._epochs.import_part(part)

    def sweep(self, now: float, limit: int) -> bool:
        """Free expired publications and streams, at most `limit` of each. Returns True if there may be more."""
        expiring, idle = self._expiring.take(now, limit), self._idle.take(now, limit)
        for stream in expiring:
            stream.expire(now)
            stream.is_queued = bool(stream)
            if stream:
                self._expiring.add(stream.expires, stream)
        for stream in idle:
            if now < stream.removable_from:
                self._idle.add(stream.removable_from, stream)
            elif self._streams.get(stream.channel) is stream:
                self._forget(stream.channel)
        return limit in (len(expiring), len(idle))


class IdempotencyCache:
    """Positions of publications with an idempotency key, by channel and key, for IDEMPOTENCY_TTL.

    limit: of the keys. Dropping a key early could publish twice, so a key beyond the limit is refused.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._positions: OrderedDict[tuple[str, str], tuple[float, Position]] = OrderedDict()  # the oldest first

    def __len__(self) -> int:
        return len(self._positions)

    def recall(self, now: float, channel: str, key: str) -> Position | None:
        """Return the position stored for this key, or None. Raises ClientError 106 for a new key beyond the limit."""
        ends, position = self._positions.get((channel, key), (now, None))
        if ends > now:
            return position
        self.sweep(now, 2)
        if len(self._positions) >= self._limit:
            raise ClientError(*LIMIT_EXCEEDED)
        return None

    def store(self, now: float, channel: str, key: str, position: Position) -> None:
        """Store the position of a publication with this key."""
        self._positions.pop((channel, key), None)
        self._positions[channel, key] = (now + IDEMPOTENCY_TTL, position)

    def export(self) -> Iterator[StatePart]:
        """Yield the state in parts. Nothing may change meanwhile."""
        keys = (KeyState(*name, *kept) for name, kept in self._positions.items())
        yield from map(KeysState, chunks(keys, lambda state: len(state.channel) + len(state.key)))

    def import_keys(self, part: KeysState) -> None:
        """Add keys of another object, whatever the limit."""
        self._positions.update(((state.channel, state.key), (state.ends, state.position)) for state in part.keys)

    def sweep(self, now: float, limit: int) -> bool:
        """Free at most `limit` expired keys. Returns True if there are more."""
        while self._positions and next(iter(self._positions.values()))[0] <= now:
            if not limit:
                return True
            self._positions.popitem(last=False)
            limit -= 1
        return False


def _size_of(state: StreamState) -> int:
    return len(state.channel) + sum(map(approximate_size, state.publications))
