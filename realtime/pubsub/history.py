"""The recent publications of each channel, and their numbering.

A channel with history has a *stream*: the last publications, the offset of the newest (the top) and an epoch, as in
sections 5.6 and 7.1 of the client protocol. `ChannelStreams` holds them all; `IdempotencyCache` holds the idempotency
keys. Neither knows of subscribers. Time is an argument everywhere, in seconds of any clock that never goes back.

Nothing has a timer of its own. What is over is seen to be over on access, and `sweep`, called now and then, frees what
nobody asks for any more. To be found by the sweep costs a channel two list entries at most.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable, Iterable
from heapq import heappop, heappush
from string import ascii_letters
from typing import Generic, TypeVar

from msgspec import Struct

from realtime.errors import LIMIT_EXCEEDED, ClientError
from realtime.pubsub.engine import PAGE_BYTES, GetHistory, Publish
from realtime.types import HistoryOptions, HistoryPage, Position, Publication

IDEMPOTENCY_TTL = 300.0
"""Seconds for which an idempotency key is remembered (client protocol, section 7.1)."""

SHORT = 128
"""Publications that are moved up at once when the oldest is dropped; in a longer list its place is left empty."""

_PAST = float("-inf")

T = TypeVar("T")


def make_epoch() -> str:
    """A fresh epoch: 8 random letters, as upstream writes them."""
    return "".join(random.choices(ascii_letters, k=8))


def _weight(publication: Publication) -> int:
    """About how many bytes a publication takes on the wire."""
    info, tags = publication.info, publication.tags
    size = len(publication.data) + 64
    if info is not None:
        size += len(info.conn_info) + len(info.chan_info) + 128
    return size + sum(len(name) + len(value) + 8 for name, value in tags.items()) if tags else size


class ChannelStream(Struct, eq=False, gc=False):
    """The stream of one channel.

    The kept publications have successive offsets, the newest being `top`. They lie in `_kept[_head:]`: where there are
    many, what is dropped from the front is cleared at once and cut off now and then, which makes a publish constant in
    time and a page a slice.

    There may be a million: each has few objects, and of those the garbage collector is shown the list alone.
    idle_until: the time from which the stream as a whole may be forgotten, unless something is kept. expires: the time
    from which the kept publications are dropped; in the past when there are none. noted: whether the agenda of expiring
    contents holds this stream.
    """

    channel: str
    epoch: str
    idle_until: float
    top: int = 0
    noted: bool = False
    expires: float = _PAST
    _kept: list[Publication | None] = []
    _head: int = 0
    _version: tuple[int, str] = (0, "")  # with its epoch

    def __len__(self) -> int:
        return len(self._kept) - self._head

    @property
    def position(self) -> Position:
        return Position(self.top, self.epoch)

    @property
    def over(self) -> float:
        """The time from which the stream may be forgotten as a whole: when idle for long enough, and empty."""
        return max(self.idle_until, self.expires)

    def touch(self, now: float, history_options: HistoryOptions) -> bool:
        """Note an access, and drop the publications whose time is over. False: the stream itself is over."""
        if now >= self.expires:
            if now >= self.idle_until:
                return False
            if self._kept:
                self.clear()
        self.idle_until = now + history_options.meta_ttl
        return True

    def expire(self, now: float) -> None:
        """Drop the publications if their time is over at `now`."""
        if now >= self.expires and self._kept:
            self.clear()

    def clear(self) -> None:
        """Drop the publications; the numbering goes on."""
        self._kept = []
        self._head = 0
        self.expires = _PAST

    def append(self, now: float, request: Publish) -> Publication:
        """Number and store one publication; drop the oldest beyond the size."""
        self.top = top = self.top + 1
        kept, options = self._kept, request.history_options
        excess = len(kept) + 1 - options.size
        if excess > self._head:
            self._drop(excess)
        publication = Publication(request.data, top, request.info, request.tags, request.delta, request.binary)
        kept.append(publication)
        self.expires = now + options.ttl
        return publication

    def _drop(self, end: int) -> None:
        """Drop what lies before this index."""
        kept = self._kept
        if len(kept) < SHORT or end > len(kept) // 2:
            del kept[:end]
            self._head = 0
        else:
            kept[self._head : end] = [None] * (end - self._head)
            self._head = end

    def advance(self, version: int, epoch: str) -> bool:
        """Whether this version is later than all the stream has had of that epoch, "" for any; if so, it is noted."""
        latest, latest_epoch = self._version
        if version <= latest and epoch in ("", latest_epoch):
            return False
        self._version = (version, epoch)
        return True

    def page(self, query: GetHistory) -> HistoryPage:
        """A page of what is kept, and the position of the top.

        since: exclusive; only its offset counts. Forwards, a page after one that is no longer kept starts at the
        oldest; in reverse it is empty when the publication before `since` is not kept.
        limit: 0 for the position alone, negative for all. max_bytes: where the page ends before that, though not before
        its first publication.
        """
        oldest, since = self.top - len(self) + 1, query.since
        if query.reverse:
            first = self.top if since is None else since.offset - 1
            wanted: Iterable[int] = range(first, oldest - 1, -1) if first <= self.top else ()
        else:
            first = oldest if since is None else max(since.offset + 1, oldest)
            wanted = range(first, self.top + 1)
        room = min(query.max_bytes, PAGE_BYTES)
        return HistoryPage(self._collect(wanted, query.limit, room, self._head - oldest), self.position)

    def _collect(self, offsets: Iterable[int], limit: int, room: int, shift: int) -> list[Publication]:
        """The publications of these offsets, `limit` of them at most, and up to `room` bytes.

        shift: the difference between an offset and its index.
        """
        found: list[Publication] = []
        for offset in offsets:
            publication = self._kept[offset + shift]
            if len(found) == limit or publication is None:
                break
            room -= _weight(publication)
            if room < 0 and found:
                break
            found.append(publication)
        return found


class ExpiryQueue(Generic[T]):
    """Things to look at again, each at its time, to the coarseness of `grain` seconds.

    Adding is one list append however many wait; no thing is handed out before its time.
    """

    def __init__(self, grain: float) -> None:
        self._grain = grain
        self._buckets: dict[int, list[T]] = {}
        self._order: list[int] = []

    def add(self, when: float, thing: T) -> None:
        number = int(when // self._grain) + 1
        bucket = self._buckets.get(number)
        if bucket is None:
            bucket = self._buckets[number] = []
            heappush(self._order, number)
        bucket.append(thing)

    def take(self, now: float, limit: int) -> list[T]:
        """Up to `limit` things whose time has come. They are out of the agenda; add again what is to be seen again."""
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
    """The streams of all channels.

    max_channels: the most streams held at a time.
    """

    def __init__(self, max_channels: int, epoch: Callable[[], str] = make_epoch) -> None:
        self._max = max_channels
        self._epoch = epoch
        self._streams: dict[str, ChannelStream] = {}
        self._contents: ExpiryQueue[ChannelStream] = ExpiryQueue(1.0)
        self._idle: ExpiryQueue[ChannelStream] = ExpiryQueue(60.0)

    def __len__(self) -> int:
        return len(self._streams)

    def open(self, now: float, channel: str, history_options: HistoryOptions) -> ChannelStream:
        """The stream of a channel, made if there is none, and the access noted.

        Raises ClientError 106 when it would be one stream too many.
        """
        stream = self._streams.get(channel)
        if stream is not None and stream.touch(now, history_options):
            return stream
        if stream is None and len(self._streams) >= self._max:
            raise ClientError(*LIMIT_EXCEEDED)
        stream = self._streams[channel] = ChannelStream(channel, self._epoch(), now + history_options.meta_ttl)
        self._idle.add(stream.over, stream)
        return stream

    def append(self, now: float, request: Publish) -> tuple[Publication, str]:
        """Number and store one publication; returns it with its epoch. Raises ClientError 106 as `open` does."""
        stream = self.open(now, request.channel, request.history_options)
        publication = stream.append(now, request)
        if not stream.noted:
            stream.noted = True
            self._contents.add(stream.expires, stream)
        return publication, stream.epoch

    def remove(self, channel: str) -> None:
        """Drop the publications of a channel; offset and epoch go on."""
        stream = self._streams.get(channel)
        if stream is not None:
            stream.clear()

    def sweep(self, now: float, limit: int) -> bool:
        """Free publications and streams whose time is over. Looks at `limit` of each at most; True if more may be."""
        filled, idle = self._contents.take(now, limit), self._idle.take(now, limit)
        for stream in filled:
            stream.expire(now)
            stream.noted = bool(stream)
            if stream:
                self._contents.add(stream.expires, stream)
        for stream in idle:
            if now < stream.over:
                self._idle.add(stream.over, stream)
            elif self._streams.get(stream.channel) is stream:
                del self._streams[stream.channel]
        return limit in (len(filled), len(idle))


class IdempotencyCache:
    """What publishing with an idempotency key returned, by channel and key, for IDEMPOTENCY_TTL.

    limit: the most keys held at a time. To forget one early might publish twice, so a further one is refused.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._found: OrderedDict[tuple[str, str], tuple[float, Position]] = OrderedDict()  # the oldest first

    def __len__(self) -> int:
        return len(self._found)

    def recall(self, now: float, channel: str, key: str) -> Position | None:
        """The position that was noted for this key. Raises ClientError 106 for a new key when there is no room."""
        ends, position = self._found.get((channel, key), (now, None))
        if ends > now:
            return position
        self.sweep(now, 2)
        if len(self._found) >= self._limit:
            raise ClientError(*LIMIT_EXCEEDED)
        return None

    def store(self, now: float, channel: str, key: str, position: Position) -> None:
        self._found.pop((channel, key), None)
        self._found[channel, key] = (now + IDEMPOTENCY_TTL, position)

    def sweep(self, now: float, limit: int) -> bool:
        """Free keys whose time is over, `limit` at most; True if there are more."""
        while self._found and next(iter(self._found.values()))[0] <= now:
            if not limit:
                return True
            self._found.popitem(last=False)
            limit -= 1
        return False
