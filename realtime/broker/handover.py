"""Hand-over of the broker's state to another process, which goes on with it and with the streams to the workers.

The supervisor starts the *target* with one end of a stream (`realtime.process.fd_stream`), and gives the broker that
serves, the *source*, the other end:

    target                                              source
    StateWanted                       ─────────────▶
                                                        waits until its state is settled, and freezes it
                                      ◀─────────────    Begun, then the parts of the core's state
                                      ◀─────────────    StreamHanded (with its descriptor), for each stream of a worker
                                      ◀─────────────    StateComplete (with the claim)
    reads the claim, and serves
    StateTaken                        ─────────────▶
                                                        closes its copies of the streams

While the state is frozen, the requests of the workers wait in their sockets: workers notice nothing but the pause. The
*claim* is an eventfd(2) with the value 1, as in `realtime.process.fd_passing`: the process that reads it serves. The
target reads it once it has the whole state, and the source reads it to go on itself, when the target has ended or takes
too long. So exactly one of them serves, wherever one of them dies: the source until the claim, the target from then on.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, Union

import msgspec
from msgspec import Struct
from twisted.internet.defer import Deferred
from twisted.logger import Logger

from realtime.errors import TakeoverFailed
from realtime.process.fd_passing import take_claim
from realtime.process.fd_stream import FdStream
from realtime.process.link import LinkState
from realtime.pubsub.broker_core import STATE_PARTS
from realtime.pubsub.broker_state import StatePart

SLICE = 0.005
"""Seconds in which parts are exported in one turn of the loop."""

PAUSE = 0.001
"""Seconds between two turns of an export."""

SETTLING_INTERVAL = 0.05
"""Seconds between two looks at a state that is not settled."""

_log = Logger()


class PeerState(Struct, array_like=True, frozen=True, gc=False):
    """The stream of a worker. slot: the worker's. address and all others: from its Hello; "" before."""

    slot: int
    address: str
    stream: int
    is_returning: bool
    pid: int
    takes_lost: bool


class StateMessage(Struct, array_like=True, frozen=True, gc=False):
    """A message between source and target, besides the parts of the state."""


class StateWanted(StateMessage, tag=101, frozen=True, gc=False):
    """Target: the first message. formats: see `formats`."""

    formats: str


class Begun(StateMessage, tag=102, frozen=True, gc=False):
    """Source: instance: identifies the run of the broker, which goes on."""

    instance: str
    peers: list[PeerState]


class StreamHanded(StateMessage, tag=103, frozen=True, gc=False):
    """Source: comes with the descriptor of the next stream, in the order of `Begun`."""

    state: LinkState


class StateComplete(StateMessage, tag=104, frozen=True, gc=False):
    """Source: comes with the claim."""


class StateTaken(StateMessage, tag=105, frozen=True, gc=False):
    """Target: it serves."""


_encode = msgspec.msgpack.Encoder().encode
_FROM_TARGET = (StateWanted, StateTaken)
_FROM_SOURCE = (*STATE_PARTS, Begun, StreamHanded, StateComplete)
_decode_at_source = msgspec.msgpack.Decoder(Union[_FROM_TARGET]).decode  # noqa: UP007 (a union of a tuple)
_decode_at_target = msgspec.msgpack.Decoder(Union[_FROM_SOURCE]).decode  # noqa: UP007


def formats() -> str:
    """Return a digest of the messages and of the parts of the state, as `realtime.worker.formats`."""
    described = repr(msgspec.inspect.multi_type_info((*_FROM_TARGET, *_FROM_SOURCE)))
    return hashlib.sha256(described.encode()).hexdigest()[:16]


class FrozenBroker(Protocol):
    """The broker, as both ends need it: `realtime.broker.process.Broker`."""

    instance: str
    is_frozen: bool

    def freeze(self) -> list[tuple[PeerState, int, LinkState]] | None: ...
    def export(self) -> Iterator[StatePart]: ...
    def thaw(self) -> None: ...
    def release(self) -> None: ...
    def expect(self, instance: str, peers: Sequence[PeerState]) -> None: ...
    def import_part(self, part: StatePart) -> None: ...
    def go_on(self, streams: Sequence[tuple[int, LinkState]]) -> None: ...


class StateSource:
    """The end of the broker that serves.

    ended: fires with the reason for which the broker goes on, in one line, or with "": another process has taken its
    place. moved: streams that have gone to the target. is_open: the hand-over is under way.
    """

    def __init__(self, reactor: Any, fd: int, broker: FrozenBroker, timeout: float, longest_pause: float) -> None:
        """fd: of the stream, which this object owns. timeout: seconds until the target must have taken the state.
        longest_pause: the most of them for which the state may be frozen."""
        self.ended: Deferred[str] = Deferred()
        self.moved = 0
        self.is_open = True
        self._reactor = reactor
        self._broker = broker
        self._frames: Iterator[tuple[bytes, list[int]]] = iter(())
        self._claim = -1
        self._stream = FdStream(reactor, fd, self._receive, lambda: self._end("the new process has ended"))
        self._longest_pause = longest_pause
        self._timer = reactor.callLater(timeout, self._end, f"the new process did not begin within {timeout:g} s")

    def _receive(self, body: bytes, descriptors: list[int]) -> None:
        try:
            message = _decode_at_source(body)
        except msgspec.MsgspecError as error:
            self._end(f"the new process sent no message: {error}")
            return
        match message:
            case StateWanted(formats=theirs):
                if theirs != formats():
                    self._end("the new process has another format of the state")
                else:
                    self._reactor.callLater(0, self._begin)  # not in the midst of a read
            case StateTaken():
                self._end("")

    def _begin(self) -> None:
        if not self.is_open:
            return
        streams = self._broker.freeze()
        if streams is None:
            self._reactor.callLater(SETTLING_INTERVAL, self._begin)
            return
        self._timer.cancel()
        pause = self._longest_pause
        self._timer = self._reactor.callLater(
            pause, self._end, f"the state is too large to go over within {pause:g} s (half of engine.publish_timeout)"
        )
        self.moved = len(streams)
        self._frames = self._all_frames(streams)
        self._send_slice()

    def _all_frames(self, streams: list[tuple[PeerState, int, LinkState]]) -> Iterator[tuple[bytes, list[int]]]:
        yield _encode(Begun(self._broker.instance, [peer for peer, _, _ in streams])), []
        for part in self._broker.export():
            yield _encode(part), []
        for _, fd, state in streams:
            yield _encode(StreamHanded(state)), [fd]
        self._claim = os.eventfd(1, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        yield _encode(StateComplete()), [self._claim]

    def _send_slice(self) -> None:
        """Send for one slice of time, as long as the target keeps up, and go on in a later turn."""
        until = self._reactor.seconds() + SLICE
        try:
            while self.is_open and not self._stream.is_writing and self._reactor.seconds() < until:
                body, descriptors = next(self._frames)
                self._stream.send(body, descriptors)
        except StopIteration:
            return
        except Exception as error:
            _log.failure("exporting the broker's state raised; the broker goes on")
            self._end(f"exporting the state raised {error!r}")
            return
        if self.is_open:
            self._reactor.callLater(PAUSE, self._send_slice)

    def _end(self, reason: str) -> None:
        """End the hand-over, and go on unless the target has the claim."""
        if not self.is_open:
            return
        self.is_open = False
        if self._timer.active():
            self._timer.cancel()
        self._stream.close()
        is_ours = self._claim < 0 or take_claim(self._claim)
        if self._claim >= 0:
            os.close(self._claim)
        if not is_ours:
            self._broker.release()
            reason = ""
        elif self._broker.is_frozen:
            self._broker.thaw()
        self.ended.callback(reason)


class StateTarget:
    """The end of the process that takes the place of a broker.

    taken: fires when it serves; fails with TakeoverFailed if it can't.
    """

    def __init__(self, reactor: Any, fd: int, broker: FrozenBroker) -> None:
        """fd: of the stream, which this object owns."""
        self.taken: Deferred[None] = Deferred()
        self._broker = broker
        self._streams: list[tuple[int, LinkState]] = []
        self._expected = 0
        end = "the broker before has ended, or goes on, before its state was complete"
        self._stream = FdStream(reactor, fd, self._receive, lambda: self._fail(end))
        self._stream.send(_encode(StateWanted(formats())))

    def _receive(self, body: bytes, descriptors: list[int]) -> None:
        try:
            self._handle(_decode_at_target(body), descriptors)
        except Exception as error:
            _log.failure("taking the broker's state over raised; the broker before goes on")
            self._fail(f"taking the state over raised {error!r}")

    def _handle(self, message: Any, descriptors: list[int]) -> None:
        match message:
            case Begun(instance, peers):
                self._expected = len(peers)
                self._broker.expect(instance, peers)
            case StreamHanded(state):
                if not descriptors:
                    self._fail("no descriptor is left for a stream of a worker; check `ulimit -n`")
                    return
                self._streams.append((descriptors[0], state))
            case StateComplete():
                self._complete(descriptors)
            case _:
                self._broker.import_part(message)

    def _complete(self, descriptors: list[int]) -> None:
        if not descriptors or len(self._streams) != self._expected:
            self._fail("no descriptor is left for the claim of the state; check `ulimit -n`")
            return
        claim = descriptors[0]
        is_ours = take_claim(claim)
        os.close(claim)
        if not is_ours:
            self._fail("the broker before goes on: it did not wait any longer")
            return
        streams, self._streams = self._streams, []
        self._broker.go_on(streams)
        self._stream.send(_encode(StateTaken()))
        self.taken.callback(None)

    def _fail(self, reason: str) -> None:
        self._stream.close()
        for fd, _ in self._streams:
            os.close(fd)
        self._streams = []
        if not self.taken.called:
            self.taken.errback(TakeoverFailed(reason))
