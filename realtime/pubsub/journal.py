"""The journal of a broker's history: records of every change, from which another broker rebuilds channels and epochs.

    JournaledStreams, JournaledKeys    histories and idempotency keys that write a record of each change
    snapshot                           the whole state as records: all records before its beginning can be dropped
    JournalReplay                      reads records, and returns the state in parts (`realtime.pubsub.broker_state`)

A record is a Struct in MessagePack, behind its length (`frame`, `records_in`). Times in records are those of the
monotonic clock of the process that wrote them; a *shift* beside the records makes them Unix times.

Where accepted changes may be missing at the end of a journal, a `Renewed` record follows. It gives each channel, also
those without a stream, a new epoch: no position that a client has is of that epoch (reference N7: an epoch of a store
that may have forgotten a publication does not come back). Without I/O.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from hashlib import blake2b
from typing import Union

import msgspec
from msgspec import Struct

from realtime.errors import LIMIT_EXCEEDED, ClientError, RealtimeError
from realtime.pubsub.broker_state import PART_BYTES, StatePart, chunks
from realtime.pubsub.engine import GetHistory, Publish
from realtime.pubsub.history import (
    EXPORTED,
    ChannelStream,
    ChannelStreams,
    Epochs,
    EpochsState,
    IdempotencyCache,
    KeysState,
    KeyState,
    StreamsState,
    StreamState,
    epoch_letters,
)
from realtime.types import HistoryOptions, Position, Publication

FORMAT = 1
"""Number of the format of the records. A broker reads no other one."""

RESTART_GRACE = 600.0
"""Seconds for which a stream that was idle for its meta_ttl stays after a restart: reading prolongs a stream without a
record, so its clients get the time to come back."""


class BadJournal(RealtimeError):
    """Bytes that are no journal."""


class Change(Struct, array_like=True, frozen=True, gc=False):
    """A record of the journal alone."""


class Appended(Change, tag=41, frozen=True, gc=False):
    """A publication. now: its time. version, version_epoch: as in `Publish`."""

    now: float
    channel: str
    epoch: str
    options: HistoryOptions
    publication: Publication
    version: int = 0
    version_epoch: str = ""


class Cleared(Change, tag=42, frozen=True, gc=False):
    """The publications of a channel were removed."""

    channel: str


class Forgotten(Change, tag=43, frozen=True, gc=False):
    """The stream of a channel was forgotten, and its epoch retired."""

    channel: str


class Renewed(Change, tag=44, frozen=True, gc=False):
    """All epochs became others, which follow from the earlier ones and a random salt."""

    salt: bytes


JournalRecord = Union[Appended, Cleared, Forgotten, Renewed, EpochsState, StreamsState, KeysState]  # noqa: UP007
Write = Callable[[Change | StatePart], None]

encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(JournalRecord).decode
_pack_length = struct.Struct("<I").pack
_length_at = struct.Struct("<I").unpack_from


def frame(record: Change | StatePart) -> bytes:
    """Return the bytes of one record."""
    body = encode(record)
    return _pack_length(len(body)) + body


def records_in(data: bytes) -> Iterator[JournalRecord]:
    """Yield the records in these bytes. Raises BadJournal for anything else than whole records."""
    at = 0
    while at < len(data):
        if len(data) - at < 4:
            raise BadJournal("a record ends early")
        start = at + 4
        at = start + _length_at(data, at)[0]
        if at > len(data):
            raise BadJournal("a record ends early")
        try:
            yield _decode(data[start:at])
        except (ValueError, RecursionError) as error:
            raise BadJournal(f"not a record: {error}") from error


class JournaledStreams(ChannelStreams):
    """The streams of all channels, with a record of each change. write: takes the records, in order.

    max_bytes: of the data of one publication; a longer one raises ClientError 106.
    """

    def __init__(self, max_channels: int, write: Write, max_bytes: int) -> None:
        self.epochs = Epochs()
        super().__init__(max_channels, self.epochs)
        self._write = write
        self._max_bytes = max_bytes

    def append(self, now: float, request: Publish) -> tuple[Publication, str]:
        if len(request.data) > self._max_bytes:
            raise ClientError(*LIMIT_EXCEEDED)
        publication, epoch = super().append(now, request)
        options, version = request.history_options, request.version
        self._write(Appended(now, request.channel, epoch, options, publication, version, request.version_epoch))
        return publication, epoch

    def remove(self, channel: str) -> None:
        super().remove(channel)
        self._write(Cleared(channel))

    def _forget(self, channel: str) -> None:
        super()._forget(channel)
        self._write(Forgotten(channel))

    def snapshot(self) -> Iterator[StatePart]:
        """Yield the state in parts, each as it is then. Changes are allowed meanwhile: their own records follow."""
        yield self.epochs.export()
        for stream in tuple(self._streams.values()):
            after, end = 0, stream.top  # later publications have records of their own
            while self._streams.get(stream.channel) is stream:
                state = _part_of(stream, after)
                yield StreamsState([state])
                after = state.publications[-1].offset if state.publications else stream.top
                if after >= end:
                    break


def _part_of(stream: ChannelStream, after: int) -> StreamState:
    """Return the state of a stream, with the first publications behind this offset."""
    query = GetHistory("", HistoryOptions(), Position(after), EXPORTED, max_bytes=PART_BYTES)
    publications = stream.page(query).publications
    return StreamState(
        stream.channel, stream.epoch, stream.idle_until, stream.top, stream.expires, *stream.version, publications
    )


class JournaledKeys(IdempotencyCache):
    """Idempotency keys, with a record of each. write: takes the records, in order."""

    def __init__(self, limit: int, write: Write) -> None:
        super().__init__(limit)
        self._write = write

    def store(self, now: float, channel: str, key: str, position: Position) -> None:
        super().store(now, channel, key, position)
        self._write(KeysState([KeyState(channel, key, self._positions[channel, key][0], position)]))

    def snapshot(self) -> Iterator[StatePart]:
        """Yield the keys in parts. Changes are allowed meanwhile: their own records follow."""
        keys = (KeyState(*name, *kept) for name, kept in tuple(self._positions.items()))
        yield from map(KeysState, chunks(keys, lambda state: len(state.channel) + len(state.key)))


class _ReplayedStream(Struct, eq=False):
    """A stream as its records describe it. Times are Unix times. size: 0 if no record says it."""

    epoch: str
    top: int = 0
    size: int = 0
    idle_until: float = 0.0
    expires: float = 0.0
    version: tuple[int, str] = (0, "")
    publications: dict[int, Publication] = {}  # by offset

    def stored(self) -> list[Publication]:
        """Return the publications up to the top without a gap: others are leftovers."""
        offset = self.top
        found: list[Publication] = []
        while offset in self.publications and not 0 < self.size <= len(found):
            found.append(self.publications[offset])
            offset -= 1
        return found[::-1]


class JournalReplay:
    """The state that records describe; `apply` each in order."""

    def __init__(self) -> None:
        self._secret = b""
        self._generations: dict[int, int] = {}
        self._streams: dict[str, _ReplayedStream] = {}
        self._keys: dict[tuple[str, str], tuple[float, Position]] = {}

    @property
    def is_empty(self) -> bool:
        """Whether no record has said which epochs channels have. Such a journal has no beginning."""
        return not self._secret

    def apply(self, record: JournalRecord, shift: float) -> None:
        """Carry out one record. shift: from its times to Unix times."""
        match record:
            case Appended():
                self._append(record, shift)
            case Cleared(channel):
                if channel in self._streams:
                    self._streams[channel].publications = {}
            case Forgotten(channel):
                self._streams.pop(channel, None)
                group = Epochs.group(self._secret, channel)
                self._generations[group] = self._generations.get(group, 0) + 1
            case Renewed(salt):
                self._renew(salt)
            case EpochsState(secret, generations):
                self._secret, self._generations = secret, dict(generations)
            case StreamsState(states):
                for state in states:
                    self._add(state, shift)
            case KeysState(keys):
                for key in keys:
                    self._keys.pop((key.channel, key.key), None)
                    self._keys[key.channel, key.key] = key.ends + shift, key.position

    def _append(self, record: Appended, shift: float) -> None:
        now, options, publication = record.now + shift, record.options, record.publication
        stream = self._stream(record.channel, record.epoch)
        if now >= stream.expires:
            stream.publications = {}
        stream.top, stream.size = publication.offset, options.size
        stream.publications[publication.offset] = publication
        stream.publications.pop(publication.offset - options.size, None)
        stream.expires, stream.idle_until = now + options.ttl, now + options.meta_ttl
        latest, latest_epoch = stream.version
        if record.version and (record.version > latest or record.version_epoch not in ("", latest_epoch)):
            stream.version = record.version, record.version_epoch

    def _add(self, state: StreamState, shift: float) -> None:
        stream = self._stream(state.channel, state.epoch)
        stream.top, stream.version = state.top, (state.version, state.version_epoch)
        stream.expires, stream.idle_until = state.expires + shift, state.idle_until + shift
        stream.publications.update((publication.offset, publication) for publication in state.publications)

    def _stream(self, channel: str, epoch: str) -> _ReplayedStream:
        stream = self._streams.get(channel)
        if stream is None or stream.epoch != epoch:
            stream = self._streams[channel] = _ReplayedStream(epoch)
        return stream

    def _renew(self, salt: bytes) -> None:
        def renewed(epoch: str) -> str:
            return epoch_letters(blake2b(epoch.encode(), digest_size=8, key=salt).digest())

        for stream in self._streams.values():
            stream.epoch = renewed(stream.epoch)
        for name, (ends, position) in self._keys.items():
            if position.epoch:
                self._keys[name] = ends, Position(position.offset, renewed(position.epoch))
        # Groups follow from the secret, so the generations of the earlier one mean nothing any more.
        self._secret, self._generations = blake2b(self._secret, digest_size=16, key=salt).digest(), {}

    def state(self, now: float, shift: float) -> Iterator[EpochsState | StreamsState | KeysState]:
        """Yield the state in parts. now: by the clock of this process. shift: from that clock to Unix times."""
        yield EpochsState(self._secret, self._generations)
        for channel, stream in self._streams.items():
            expires, idle_until = stream.expires - shift, max(stream.idle_until - shift, now + RESTART_GRACE)
            publications = stream.stored() if expires > now else []
            yield StreamsState(
                [StreamState(channel, stream.epoch, idle_until, stream.top, expires, *stream.version, publications)]
            )
        keys = sorted((ends - shift, *name, position) for name, (ends, position) in self._keys.items())
        for ends, channel, key, position in keys:
            if ends > now:
                yield KeysState([KeyState(channel, key, ends, position)])
