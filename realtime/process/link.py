"""Framed messages over a Unix stream: one end of the connection between a worker and the broker.

Frames are collected during one turn of the loop and written together at its end, straight to the socket. A peer that
does not keep up is cut off instead of waited for: both ends can start again on a fresh stream.
"""

from __future__ import annotations

import os
import select
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from msgspec import Struct
from twisted.internet import tcp, unix
from twisted.internet.interfaces import IDelayedCall, IPushProducer
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from realtime.process.transport import DirectServer
from realtime.pubsub.broker_messages import ANSWERS, HEAD_SIZE, BadFrame, FrameReader, frame_of, frames_in
from realtime.supervision.loop_time import LoopTimeLedger, LoopWork

BATCH = 1024 * 1024
"""Bytes written to a slow peer at a time, so that joining a long queue does not block the loop."""

CLOSE_TIMEOUT = 2.0
"""Seconds that `close` gives the queued frames to go out."""

PEER_ENDED = "the peer ended the stream"

REPLACED = "another stream took its place"

READ_SIZE = 64 * 1024
"""Bytes that the peer may have read and not handled, besides one partial frame."""

# The request number in the head of frames that are no answers.
_UNNUMBERED = bytes(8)
# The least first byte of the number of a publication that is an answer, too.
_ANSWERING = bytes([ANSWERS >> 56])

_log = Logger()


class LinkState(Struct, array_like=True, frozen=True, gc=False):
    """Where one end of a stream stands, for another process that goes on with its socket.

    received: what was read and not handled. unsent: what the kernel has not taken of the written bytes, from any byte
    on. queued: whole frames behind it. kept, forgotten: the last written bytes, and the number of those before.
    allowance: bytes that may be queued beyond the limit.
    """

    received: bytes
    unsent: bytes
    queued: bytes
    kept: bytes
    forgotten: int
    allowance: int


def adopt(reactor: Any, fd: int, link: Protocol) -> None:
    """Connect a link, or another protocol, to a connected Unix stream socket. Takes ownership of `fd`.

    The relief thread may call its `dataReceived` while application code blocks another call of it.
    """
    try:
        os.set_blocking(fd, False)
        _Stream._fromConnectedSocket(fd, Factory.forProtocol(lambda: link), reactor)
    finally:
        os.close(fd)  # the transport works on a duplicate


class _Stream(DirectServer, unix.Server):
    """Writes immediately: all frames queued in one loop turn leave in a single send(2). The selector is used only when
    the socket buffer is full. Reads directly: frames are handled before other work of the turn.

    is_shared: while application code blocks the handling of a frame, the relief thread handles the next ones."""

    doRead = tcp.Connection.doRead  # type: ignore[assignment]  # recv(2): this stream carries no file descriptors
    is_shared = True


@implementer(IPushProducer)
class Link(Protocol):
    """One stream of frames. It knows their numbers and sizes, but not their content.

    call_soon: has its argument called at the end of the loop's turn, or in the next one. limit: bytes that may be
    queued for the peer; beyond it the link cuts itself. on_frame: called with the number and the body of each
    frame, in order. If it raises BadFrame, the link cuts itself with that reason; any other exception is a bug, is
    logged, and cuts the link too, as the state of both ends may differ then. on_end: called once with the reason
    when the stream has ended, at either end's wish. ledger: the loop's, whose ENGINE account is charged. patience:
    bytes queued for the peer from which on its further frames wait until half of them are sent, so that a peer that
    reads slower than it asks is slowed down; 0 for no limit. Only one end of a stream may have one, or each could
    wait for the other. keeps: whether a fresh stream may continue this one: the last written frames are kept, and
    when the stream has ended for no fault of a frame, further ones are queued until `take_rest`. dropped: counts the
    deliveries that are lost for certain.
    """

    def __init__(
        self,
        reactor: Any,
        call_soon: Callable[[Callable[[], None]], object],
        limit: int,
        on_frame: Callable[[int, bytes], None],
        on_end: Callable[[Link, str], None],
        ledger: LoopTimeLedger | None = None,
        patience: int = 0,
        *,
        keeps: bool = False,
    ) -> None:
        self._ledger = ledger or LoopTimeLedger(time.monotonic_ns)
        self._account = self._ledger.open(LoopWork.ENGINE)
        self._reactor = reactor
        self._call_soon = call_soon
        self._reader = FrameReader()
        self._limit = self._hold_limit = limit
        self._on_frame = on_frame
        self._on_end = on_end
        self._patience = patience
        self._unread: Iterator[tuple[int, bytes]] | None = None  # received frames that wait for the peer to read
        self._frames: Iterator[tuple[int, bytes]] = iter(())  # of the latest read
        self._queue: deque[bytes] = deque()
        self._queued_bytes = 0
        self._bytes_in_transport = 0  # given to the transport when it filled up
        self._is_paused = False
        self._is_flush_due = False
        self._is_held_back = False
        self._close_timer: IDelayedCall | None = None
        # The last written batches, which the peer may not have handled, and those before that it has read for certain.
        self._kept: deque[bytes] | None = deque() if keeps else None
        self._kept_bytes = self._forgotten_bytes = self._window = 0
        self._received_bytes = 0
        self._is_holding = False  # the stream has ended, and another may continue it
        self._suspended = b""  # received and not handled
        self._was_paused = False  # before `freeze`
        self.dropped = 0
        self._end_reason = ""  # once nothing is sent or received any more

    @property
    def backlog(self) -> int:
        """Bytes queued for the peer, without those in the kernel."""
        return self._queued_bytes + self._bytes_in_transport

    @property
    def is_hung_up(self) -> bool:
        """Whether the stream has ended, which is noticed here only after the last frames of the peer."""
        if self._end_reason or self.transport is None:
            return True
        poll = select.poll()
        poll.register(self._transport.fileno(), 0)  # a hang-up is always reported
        return bool(poll.poll(0))

    def connectionMade(self) -> None:
        self._transport.registerProducer(self, True)
        if self._kept is not None:
            # The kernel takes at most one more write of half of it when it is full.
            self._window = 2 * self._transport.socket.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) + READ_SIZE

    @property
    def _transport(self) -> Any:
        return self.transport

    # Out

    def send(self, frame: bytes) -> None:
        """Queue one frame, as `broker_messages.pack` returns it; links may share it. Once the link is cut, it is
        queued for `take_rest`, or lost and counted."""
        if self._end_reason:
            self._hold(frame)
            return
        self._queue.append(frame)
        self._queued_bytes += len(frame)
        if self._queued_bytes + self._bytes_in_transport > self._limit:
            self.cut("the peer is too far behind")
        elif not (self._is_flush_due or self._is_paused):
            self._is_flush_due = True
            self._call_soon(self._end_turn)

    def _end_turn(self) -> None:
        self._is_flush_due = False
        before = self._ledger.switch(self._account)
        try:
            self._flush()  # of nothing, if the stream has ended meanwhile
        finally:
            self._ledger.switch(before)

    def _flush(self) -> None:
        queue = self._queue
        while queue and not self._is_paused:
            batch = queue.popleft() if len(queue) == 1 else self._take_batch()
            self._queued_bytes -= len(batch)
            self._bytes_in_transport = len(batch)
            if self._kept is not None:
                self._keep(self._kept, batch)
            # Calls pauseProducing if the socket did not take all of it.
            self.transport.write(batch)  # type: ignore[union-attr]
            if not self._is_paused:
                self._bytes_in_transport = 0
        if self._unread is not None and self.backlog <= self._patience // 2 and not self._is_held_back:
            frames, self._unread = self._unread, None
            self._transport.resumeProducing()
            self._handle(frames)

    def _keep(self, kept: deque[bytes], batch: bytes) -> None:
        """Keep a batch, and forget the oldest: the peer has read them, as the kernel does not hold so much."""
        kept.append(batch)
        self._kept_bytes += len(batch)
        spare = self._kept_bytes - len(batch) - self._window
        while spare >= len(kept[0]):
            forgotten = len(kept.popleft())
            spare -= forgotten
            self._kept_bytes -= forgotten
            self._forgotten_bytes += forgotten

    def _take_batch(self) -> bytes:
        """Join the next frames, at least one, up to BATCH bytes."""
        queue = self._queue
        if self._queued_bytes <= BATCH:
            batch = b"".join(queue)
            queue.clear()
            return batch
        frames = [queue.popleft()]
        room = BATCH - len(frames[0])
        while queue and len(queue[0]) <= room:
            room -= len(queue[0])
            frames.append(queue.popleft())
        return b"".join(frames)

    def pauseProducing(self) -> None:
        self._is_paused = True

    def resumeProducing(self) -> None:
        before = self._ledger.switch(self._account)
        try:
            self._is_paused = False
            self._bytes_in_transport = 0
            self._flush()
        finally:
            self._ledger.switch(before)

    def stopProducing(self) -> None:
        self._is_paused = True

    # In

    def dataReceived(self, data: bytes) -> None:
        before = self._ledger.switch(self._account)
        try:
            self._received_bytes += len(data)
            # None is left of the read before, unless application code blocks the loop's thread within one of them.
            self._handle(self._frames)
            self._frames = frames = self._reader.feed(data)
            self._handle(frames)
        finally:
            self._ledger.switch(before)

    def _handle(self, frames: Iterator[tuple[int, bytes]]) -> None:
        try:
            for number, body in frames:
                if self._end_reason:
                    return
                self._on_frame(number, body)
                if self._queued_bytes + self._bytes_in_transport > self._patience > 0:
                    self._unread = frames
                    self._transport.pauseProducing()
                    return
        except BadFrame as error:
            self.cut(str(error))
        except Exception:
            _log.failure("handling a frame of the peer raised; cutting the stream, which is then set up anew")
            self.cut("an exception while handling a frame")

    def hold_back(self, is_held: bool) -> None:
        """Stop or continue reading; frames that have been read already are handled all the same."""
        self._is_held_back = is_held
        if self._end_reason or self.transport is None:
            return
        if is_held:
            self._transport.pauseProducing()
        elif self._unread is None:
            self._transport.resumeProducing()
        else:
            self._flush()

    # The end

    def cut(self, reason: str) -> None:
        """End the stream at once and drop queued frames, unless another stream may continue this one.

        `on_end` is called later, from the loop. Idempotent.
        """
        if self._end_reason:
            return
        self._end(reason)
        if self.transport is not None:
            self._transport.abortConnection()

    def close(self) -> None:
        """End the stream once queued frames are out, or after CLOSE_TIMEOUT. Nothing is received any more."""
        if self._end_reason:
            return
        self._end_reason = "closed"
        self._transport.unregisterProducer()
        self._transport.write(b"".join(self._queue))
        self._queue.clear()
        self._drop()
        self._close_timer = self._reactor.callLater(CLOSE_TIMEOUT, self._abort_close)
        self._transport.loseConnection()

    def _abort_close(self) -> None:
        self._close_timer = None
        self._transport.abortConnection()

    def _end(self, reason: str) -> None:
        self._end_reason = reason
        if self._kept is not None and self.is_continuable:
            self._is_holding = True
            self._unread = None
            self._bytes_in_transport = 0
            if self._queued_bytes > self._hold_limit:
                self._drop()
        else:
            self._drop()

    def _drop(self) -> None:
        self._is_holding = False
        self.dropped += _deliveries(self._queue)
        self._queue.clear()
        self._unread = None
        self._queued_bytes = self._bytes_in_transport = 0

    # A stream that continues another

    @property
    def is_continuable(self) -> bool:
        """Whether the stream ended for no fault of a frame, nor of the peer's pace."""
        return self._end_reason in (PEER_ENDED, REPLACED)

    def count_handled(self) -> int:
        """Return the bytes of the whole frames that this end has handled, or has begun to. For an ended stream.

        Frames that were received and not handled, as application code blocks an earlier one, will not be. Raises
        BadFrame behind the last of them.
        """
        left = sum(HEAD_SIZE + len(body) for _, body in self._frames)
        return self._received_bytes - left - self._reader.rest

    def _hold(self, frame: bytes) -> None:
        if not self._is_holding:
            self.dropped += _deliveries((frame,))
            return
        self._queue.append(frame)
        self._queued_bytes += len(frame)
        if self._queued_bytes > self._hold_limit:
            self._drop()

    def take_rest(self, handled: int | None) -> list[bytes] | None:
        """Return the frames of an ended stream that another has to begin with. Later frames are lost.

        None if they are not complete: those known are counted as dropped. handled: bytes that the peer has handled,
        see `count_handled`; None if unknown.
        """
        kept = b"".join(self._kept or ())
        start = 0 if handled is None else handled - self._forgotten_bytes
        rest = frames_in(kept[max(0, start) :])
        if self._kept is not None:
            self._kept.clear()
        self._forgotten_bytes += self._kept_bytes
        self._kept_bytes = 0
        if self._is_holding and handled is not None and 0 <= start <= len(kept):
            rest += self._queue
            self._queue.clear()
            self._drop()
            return rest
        self.dropped += _deliveries(rest)
        self._drop()
        return None

    def continue_with(self, frames: list[bytes]) -> None:
        """Send the rest of another stream, whatever the limit."""
        self._limit += sum(map(len, frames))
        for frame in frames:
            self.send(frame)

    # A stream that another process goes on with

    @property
    def is_open(self) -> bool:
        """Whether neither end has ended the stream, as far as this one knows."""
        return self.transport is not None and not self._end_reason

    def fileno(self) -> int:
        """The descriptor of the stream."""
        return int(self._transport.fileno())

    def suspend(self) -> None:
        """Read and handle nothing from now on."""
        self._transport.stopReading()
        frames, self._unread = self._unread or iter(()), None
        try:
            unread = [frame_of(number, body) for number, body in frames]
        except BadFrame as error:
            self.cut(str(error))
        else:
            self._suspended = b"".join(unread) + self._reader.take_rest()

    def freeze(self) -> LinkState:
        """Write nothing from now on either, and return the state. The link is suspended. Further frames are queued."""
        self._flush()
        self._transport.stopWriting()
        self._is_paused, self._was_paused = True, self._is_paused
        return LinkState(
            self._suspended,
            self._transport.unsent,
            b"".join(self._queue),
            b"".join(self._kept or ()),
            self._forgotten_bytes,
            self._limit - self._hold_limit,
        )

    def thaw(self) -> None:
        """Write again, as no other process does. Then `read_again`, once all links write."""
        self._is_paused = self._was_paused
        if self._transport.is_buffering:
            self._transport.startWriting()
        self._flush()

    def read_again(self, received: bytes | None = None) -> None:
        """Go on reading, behind these bytes of a `LinkState`; None for those of `suspend`."""
        received = self._suspended if received is None else received
        self._received_bytes -= len(received)
        self._transport.startReading()
        self.dataReceived(received)

    def release(self) -> int:
        """Let another process go on, and return the descriptor, which the caller closes. Nothing is reported."""
        self._end_reason = "continued by another process"
        self._queue.clear()
        fd, _ = self._transport.detach()
        return int(fd)

    def go_on_from(self, state: LinkState) -> None:
        """Write from where another process has frozen the stream. Then `read_again`, once all links write."""
        self._kept, self._kept_bytes = deque([state.kept] if state.kept else ()), len(state.kept)
        self._forgotten_bytes = state.forgotten
        self._limit += state.allowance
        if state.unsent:
            self._bytes_in_transport = len(state.unsent)
            self._transport.write(state.unsent)
            if not self._is_paused:
                self._bytes_in_transport = 0
        for frame in frames_in(state.queued):
            self.send(frame)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        if self._close_timer is not None:
            self._close_timer.cancel()
            self._close_timer = None
        if not self._end_reason:
            self._end(PEER_ENDED)
        self._on_end(self, self._end_reason)


def _deliveries(frames: Iterable[bytes]) -> int:
    return sum(frame[4:12] == _UNNUMBERED or frame[4:5] >= _ANSWERING for frame in frames)
