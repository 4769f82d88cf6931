"""The data plane: what a worker and the broker say to each other, and its bytes.

A stream between them is a row of frames in each direction: 4 bytes of length, big-endian, then a message of that many
bytes. A message is a MessagePack array: the number of its kind, then its fields. The format is private to one version
of this package; `VERSION` is in the first message of either side.

    worker                                              broker
    Hello, Restore ..., Tally                ------->
                                             <-------   Welcome
    a request (it has an `id`)               ------->
                                             <-------   its answer (the same `id`), or Failed
    Unsubscribe, Connected, Disconnected,    ------->
    Tally, a request with id 0
                                             <-------   Published, Joined, Left, Instructed

Either side works off what it gets in order, and its answers keep that order: the answer to a request comes after all
that was routed before it, and before all that is routed after it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import msgspec
from msgspec import Struct

from realtime.errors import RealtimeError
from realtime.types import ClientInfo, EngineStats, HistoryOptions, HistoryPage, Position, Publication

VERSION = 2

FRAME_LIMIT = 16 * 1024 * 1024
"""Bytes of the longest message."""

_LENGTH = struct.Struct(">I")
_PREFIX = _LENGTH.size
_length_at = _LENGTH.unpack_from


class BadFrame(RealtimeError):
    """Bytes that are no frame of the data plane, or a message that is too long for one."""


class BrokerMessage(Struct, array_like=True, frozen=True, gc=False):
    """Any message. Kinds have numbers: a new one gets a new number."""


class BrokerRequest(BrokerMessage, frozen=True, gc=False):
    """id: comes back in the answer; 0 if none is wanted."""

    id: int


class Hello(BrokerMessage, tag=1, frozen=True, gc=False):
    """The worker's first message. instance: what Welcome said on the stream before this one, "" if there was none."""

    version: int
    instance: str


class Restore(BrokerMessage, tag=2, frozen=True, gc=False):
    """A part of what the worker holds, in one or more messages after Hello.

    occupants: (channel, info, present, announce), the arguments of `Engine.enter`. clients: the connected ones.
    """

    channels: list[str]
    occupants: list[tuple[str, ClientInfo, bool, bool]]
    clients: list[ClientInfo]


class Publish(BrokerRequest, tag=3, frozen=True, gc=False):
    channel: str
    data: bytes
    retention: HistoryOptions
    info: ClientInfo | None
    tags: dict[str, str] | None
    idempotency_key: str
    version: int
    version_epoch: str
    delta: bool
    binary: bool


class Subscribe(BrokerRequest, tag=4, frozen=True, gc=False):
    channel: str


class Unsubscribe(BrokerMessage, tag=5, frozen=True, gc=False):
    channel: str


class History(BrokerRequest, tag=6, frozen=True, gc=False):
    channel: str
    retention: HistoryOptions
    since: Position | None
    limit: int
    reverse: bool
    max_bytes: int


class RemoveHistory(BrokerRequest, tag=7, frozen=True, gc=False):
    channel: str


class Enter(BrokerRequest, tag=8, frozen=True, gc=False):
    channel: str
    info: ClientInfo
    present: bool
    announce: bool


class Leave(BrokerRequest, tag=9, frozen=True, gc=False):
    channel: str
    client: str


class Presence(BrokerRequest, tag=10, frozen=True, gc=False):
    channel: str


class PresenceStats(BrokerRequest, tag=11, frozen=True, gc=False):
    channel: str


class Connected(BrokerMessage, tag=12, frozen=True, gc=False):
    info: ClientInfo


class Disconnected(BrokerMessage, tag=13, frozen=True, gc=False):
    client: str


class Tally(BrokerMessage, tag=14, frozen=True, gc=False):
    subscriptions: int


class TakeCensus(BrokerRequest, tag=15, frozen=True, gc=False):
    pass


class Instruct(BrokerRequest, tag=16, frozen=True, gc=False):
    order: bytes
    worker: str


class Admit(BrokerRequest, tag=17, frozen=True, gc=False):
    info: ClientInfo
    limit: int


class Welcome(BrokerMessage, tag=1, frozen=True, gc=False):
    """The broker's answer to Hello. instance: names this run of the broker."""

    version: int
    instance: str


class Published(BrokerMessage, tag=2, frozen=True, gc=False):
    channel: str
    publication: Publication
    epoch: str


class Joined(BrokerMessage, tag=3, frozen=True, gc=False):
    channel: str
    info: ClientInfo


class Left(BrokerMessage, tag=4, frozen=True, gc=False):
    channel: str
    info: ClientInfo


class Instructed(BrokerMessage, tag=5, frozen=True, gc=False):
    order: bytes


class Done(BrokerMessage, tag=6, frozen=True, gc=False):
    """The answer to a request that has no result."""

    id: int
    result: None = None


class Placed(BrokerMessage, tag=7, frozen=True, gc=False):
    id: int
    result: Position


class Page(BrokerMessage, tag=8, frozen=True, gc=False):
    id: int
    result: HistoryPage


class Present(BrokerMessage, tag=9, frozen=True, gc=False):
    id: int
    result: dict[str, ClientInfo]


class Stats(BrokerMessage, tag=10, frozen=True, gc=False):
    id: int
    result: tuple[int, int]


class Counted(BrokerMessage, tag=11, frozen=True, gc=False):
    id: int
    result: EngineStats


class Failed(BrokerMessage, tag=12, frozen=True, gc=False):
    """The request failed with `errors.ClientError` of these fields."""

    id: int
    code: int
    message: str
    temporary: bool


class Reached(BrokerMessage, tag=13, frozen=True, gc=False):
    id: int
    result: int


class Admitted(BrokerMessage, tag=14, frozen=True, gc=False):
    id: int
    result: bool


Answer = Done | Placed | Page | Present | Stats | Counted | Reached | Admitted
ToBroker = (
    Hello
    | Restore
    | Publish
    | Subscribe
    | Unsubscribe
    | History
    | RemoveHistory
    | Enter
    | Leave
    | Presence
    | PresenceStats
    | Connected
    | Disconnected
    | Tally
    | TakeCensus
    | Instruct
    | Admit
)
ToWorker = Welcome | Published | Joined | Left | Instructed | Answer | Failed

_encode = msgspec.msgpack.Encoder().encode


def pack(message: BrokerMessage) -> bytes:
    """The frame of a message. Raises BadFrame if it would be longer than FRAME_LIMIT."""
    body = _encode(message)
    length = len(body)
    if length > FRAME_LIMIT:
        raise BadFrame(f"a message of {length} bytes is longer than {FRAME_LIMIT}")
    return _LENGTH.pack(length) + body


class Decoder:
    """Bytes as they come, cut anywhere, to messages. Linear in the bytes, however they are cut.

    kinds: `ToBroker` or `ToWorker`.
    """

    def __init__(self, kinds: object) -> None:
        self._decode = msgspec.msgpack.Decoder(kinds).decode
        self._rest = bytearray()

    def feed(self, data: bytes) -> Iterator[BrokerMessage]:
        """The messages that are whole now. Walk the iterator to its end before feeding more.

        Raises BadFrame for a length over FRAME_LIMIT, and for anything that is not a message of the right kind and
        types; the decoder is of no more use then.
        """
        rest = self._rest
        if rest:
            rest += data
            if len(rest) < _PREFIX or len(rest) - _PREFIX < _length_at(rest)[0] <= FRAME_LIMIT:
                return
            data, self._rest = bytes(rest), bytearray()
        decode, at, last = self._decode, 0, len(data) - _PREFIX
        while at <= last:
            (length,) = _length_at(data, at)
            if length > FRAME_LIMIT:
                raise BadFrame(f"a frame of {length} bytes is longer than {FRAME_LIMIT}")
            start = at + _PREFIX
            end = start + length
            if end > len(data):
                break
            try:
                message = decode(data[start:end])
            except (ValueError, RecursionError) as error:
                # msgspec's own errors and UnicodeDecodeError are ValueErrors.
                raise BadFrame(f"not a message: {error}") from error
            yield message
            at = end
        self._rest += memoryview(data)[at:]
