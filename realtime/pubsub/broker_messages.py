"""Messages between a worker and the broker process, and their bytes.

A stream between them carries frames in both directions. A frame is 4 bytes of length, 8 bytes of request number (both
big-endian), then a body of that length in MessagePack. Number 0 means that no answer belongs to the frame.

    worker                                              broker
    Hello, Restore ..., ReportSubscriptions  ------->
                                             <-------   Welcome; the rest of the stream before, CaughtUp
    an EngineRequest, with a number          ------->
                                             <-------   its answer (the same number), or RequestFailed
    Publish, with a number, by a subscribed  ------->
    worker
                                             <-------   Published, with that number and ANSWERS
    an EngineNotice, or a request without    ------->
    a number
                                             <-------   Published, Joined, Left, OrderSent, CutReached, Missed

The body of a message is an array: the number of its kind, then its fields. The body of an answer is the bare value,
whose type follows from the request (`answer_decoder`). Kinds and types are derived from the Structs of
`realtime.pubsub.engine`, so a new operation changes nothing here. The format is private to one version of this package:
either side sends `VERSION` in its first message, and a new format raises it.

Both sides process frames in order, and answers keep that order: the answer to a request comes after all deliveries
that precede it in the broker, and before all that follow it.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from typing import Any, Union, get_args

import msgspec
from msgspec import Struct

from realtime.errors import RealtimeError
from realtime.pubsub.engine import AddPresence, Answer, EngineNotice, EngineRequest
from realtime.types import ClientInfo, Publication

VERSION = 10

FRAME_LIMIT = 16 * 1024 * 1024
"""Upper limit in bytes of a frame's body."""

_HEAD = struct.Struct(">IQ")  # the number counts up for the life of a worker, so 32 bits would not last
HEAD_SIZE = _HEAD.size
_pack_head = _HEAD.pack
_head_at = _HEAD.unpack_from


ANSWERS = 1 << 63
"""Added to the number of a request in the frame of a Published that answers it: one frame is cheaper than two."""


class BadFrame(RealtimeError):
    """Bytes that are no frame or no message of the right kind, or a message too long for a frame."""


class BrokerMessage(Struct, array_like=True, frozen=True, gc=False):
    """A message that is neither a request nor a notice. Each direction numbers its kinds on its own."""


class Hello(BrokerMessage, tag=1, frozen=True, gc=False):
    """The worker's first message. instance: as in the Welcome of its previous stream, "" without one.

    takes_lost_clients: whether the worker will ask for the clients of its predecessor (`engine.TakeLostClients`).
    generation: of the worker's process, see `engine.worker_address`. stream: counts the streams of the process from 1.
    previous: the latest stream whose Welcome it received, and 0 if it cannot be continued. handled: bytes of the whole
    frames of that stream that it has handled; of later ones it has handled none. pid: of the worker.
    """

    version: int
    instance: str
    takes_lost_clients: bool = False
    generation: int = 0
    stream: int = 0
    previous: int = 0
    handled: int = 0
    pid: int = msgspec.field(default_factory=os.getpid)

    def handled_of(self, stream: int) -> int | None:
        """Return the bytes that the worker has handled of an earlier stream, None if unknown."""
        if not self.previous or stream < self.previous:
            return None
        return self.handled if stream == self.previous else 0


class Restore(BrokerMessage, tag=2, frozen=True, gc=False):
    """A part of the worker's state, in one or more messages after Hello; later the state of clients that it has again,
    or that it has and another worker had. clients: those connected. sessions: see `engine.Cut`.
    """

    channels: list[str]
    presence: list[AddPresence]
    clients: list[ClientInfo]
    sessions: dict[str, str] = {}


class Welcome(BrokerMessage, tag=1, frozen=True, gc=False):
    """The broker's answer to Hello. instance: identifies this run of the broker.

    continues: whether this stream continues the previous one without a gap: the frames that the worker did not handle
    follow, up to `CaughtUp`.
    """

    version: int
    instance: str
    continues: bool = False


class Published(BrokerMessage, tag=2, frozen=True, gc=False):
    """Carries `Receiver.on_publication`."""

    channel: str
    publication: Publication
    epoch: str


class Joined(BrokerMessage, tag=3, frozen=True, gc=False):
    """Carries `Receiver.on_join`."""

    channel: str
    info: ClientInfo


class Left(BrokerMessage, tag=4, frozen=True, gc=False):
    """Carries `Receiver.on_leave`."""

    channel: str
    info: ClientInfo


class OrderSent(BrokerMessage, tag=5, frozen=True, gc=False):
    """Carries `Receiver.on_order`."""

    order: bytes


class CutReached(BrokerMessage, tag=6, frozen=True, gc=False):
    """Carries `Receiver.on_cut`. The fields are those of `engine.Cut`."""

    batch: str
    clients: list[ClientInfo]
    sessions: dict[str, str]
    presence: dict[str, list[str]]


class CaughtUp(BrokerMessage, tag=7, frozen=True, gc=False):
    """The end of the frames that earlier streams did not deliver. stream: as in the Hello of this one."""

    stream: int


class Missed(BrokerMessage, tag=8, frozen=True, gc=False):
    """Carries `Receiver.on_missed`."""

    channel: str
    publications: bool


class ClientsLost(BrokerMessage, tag=9, frozen=True, gc=False):
    """Another worker of the slot has ended: ask for its clients (`engine.TakeLostClients`)."""


class RequestFailed(BrokerMessage, tag=12, frozen=True, gc=False):
    """The request of this number failed with an `errors.ClientError` of these fields."""

    request: int
    code: int
    message: str
    temporary: bool


REQUESTS: tuple[type[EngineRequest[Any]], ...] = tuple(EngineRequest.__subclasses__())
NOTICES: tuple[type[EngineNotice], ...] = tuple(EngineNotice.__subclasses__())
TO_BROKER: tuple[type[Struct], ...] = (Hello, Restore, *REQUESTS, *NOTICES)
TO_WORKER: tuple[type[Struct], ...] = (
    *(Welcome, Published, Joined, Left, OrderSent, CutReached, CaughtUp, Missed, ClientsLost, RequestFailed),
)

_encode = msgspec.msgpack.Encoder().encode


def pack(message: object, number: int = 0) -> bytes:
    """Return the frame of a message or an answer. Raises BadFrame for a body longer than FRAME_LIMIT.

    number: of the request, in its frame and in its answer's; 0 for none.
    """
    body = _encode(message)
    length = len(body)
    if length > FRAME_LIMIT:
        raise BadFrame(f"a message of {length} bytes is longer than {FRAME_LIMIT}")
    return _pack_head(length, number) + body


def frame_of(number: int, body: bytes) -> bytes:
    """Return the frame that `FrameReader` has split into these two."""
    return _pack_head(len(body), number) + body


def message_decoder(kinds: tuple[type[Struct], ...]) -> Callable[[bytes], Any]:
    """Return a function from the body of a frame to a message. kinds: `TO_BROKER` or `TO_WORKER`.

    The function raises ValueError or RecursionError for any other body.
    """
    return msgspec.msgpack.Decoder(Union[kinds]).decode  # noqa: UP007 (a union of a tuple)


def answer_decoder(kind: type[EngineRequest[Answer]]) -> Callable[[bytes], Answer]:
    """Return a function from the body of a frame to the answer of a request of this kind. It raises as above."""
    return msgspec.msgpack.Decoder(answer_type(kind)).decode


def answer_type(kind: type[EngineRequest[Any]]) -> Any:
    """The type of the answer to requests of this kind: `Answer` in its base class `EngineRequest[Answer]`."""
    (base,) = (base for base in kind.__orig_bases__ if get_args(base))  # type: ignore[attr-defined]
    return get_args(base)[0]


def frames_in(data: bytes) -> list[bytes]:
    """Split whole frames."""
    frames, at = [], 0
    while at < len(data):
        end = at + HEAD_SIZE + _head_at(data, at)[0]
        frames.append(data[at:end])
        at = end
    return frames


class FrameReader:
    """Splits a byte stream, cut anywhere, into frames. Linear in the bytes, however they are cut."""

    def __init__(self) -> None:
        self._rest = bytearray()

    @property
    def rest(self) -> int:
        """Bytes of the frame that is not complete yet."""
        return len(self._rest)

    def take_rest(self) -> bytes:
        """Remove and return the bytes of the frame that is not complete yet."""
        rest, self._rest = bytes(self._rest), bytearray()
        return rest

    def feed(self, data: bytes) -> Iterator[tuple[int, bytes]]:
        """Yield the number and the body of each complete frame. Exhaust the iterator before feeding more.

        Raises BadFrame for a length over FRAME_LIMIT; the reader is of no use afterwards.
        """
        rest = self._rest
        if rest:
            rest += data
            if len(rest) < HEAD_SIZE or len(rest) - HEAD_SIZE < _head_at(rest)[0] <= FRAME_LIMIT:
                return
            data, self._rest = bytes(rest), bytearray()
        at, last = 0, len(data) - HEAD_SIZE
        while at <= last:
            length, number = _head_at(data, at)
            if length > FRAME_LIMIT:
                raise BadFrame(f"a frame of {length} bytes is longer than {FRAME_LIMIT}")
            start = at + HEAD_SIZE
            end = start + length
            if end > len(data):
                break
            yield number, data[start:end]
            at = end
        self._rest += memoryview(data)[at:]
