"""Framed messages over a Unix stream: one end of the connection between a worker and the broker.

Frames are collected during one turn of the loop and written together at its end, straight to the socket. A peer that
does not keep up is cut off instead of waited for: both ends can start again on a fresh stream.
"""

from __future__ import annotations

import os
import select
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from twisted.internet import tcp, unix
from twisted.internet.interfaces import IDelayedCall, IPushProducer
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from realtime.process.transport import DirectServer
from realtime.pubsub.broker_messages import ANSWERS, BadFrame, FrameReader
from realtime.supervision.loop_time import LoopTimeLedger, LoopWork

BATCH = 1024 * 1024
"""Bytes written to a slow peer at a time, so that joining a long queue does not block the loop."""

CLOSE_TIMEOUT = 2.0
"""Seconds that `close` gives the queued frames to go out."""

PEER_ENDED = "the peer ended the stream"

# The request number in the head of frames that are no answers.
_UNNUMBERED = bytes(8)
# The least first byte of the number of a publication that is an answer, too.
_ANSWERING = bytes([ANSWERS >> 56])

_log = Logger()


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
    wait for the other. dropped: counts the queued deliveries that were never sent.
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
    ) -> None:
        self._ledger = ledger or LoopTimeLedger(time.monotonic_ns)
        self._account = self._ledger.open(LoopWork.ENGINE)
        self._reactor = reactor
        self._call_soon = call_soon
        self._reader = FrameReader()
        self._limit = limit
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
        self._close_timer: IDelayedCall | None = None
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

    @property
    def _transport(self) -> Any:
        return self.transport

    # Out

    def send(self, frame: bytes) -> None:
        """Queue one frame, as `broker_messages.pack` returns it; links may share it. No effect once the link is cut."""
        if self._end_reason:
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
            # Calls pauseProducing if the socket did not take all of it.
            self.transport.write(batch)  # type: ignore[union-attr]
            if not self._is_paused:
                self._bytes_in_transport = 0
        if self._unread is not None and self.backlog <= self._patience // 2:
            frames, self._unread = self._unread, None
            self._transport.resumeProducing()
            self._handle(frames)

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

    # The end

    def cut(self, reason: str) -> None:
        """End the stream at once and drop queued frames. `on_end` is called later, from the loop. Idempotent."""
        if self._end_reason:
            return
        self._end_reason = reason
        self._drop()
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

    def _drop(self) -> None:
        self.dropped += sum(frame[4:12] == _UNNUMBERED or frame[4:5] >= _ANSWERING for frame in self._queue)
        self._queue.clear()
        self._unread = None
        self._queued_bytes = self._bytes_in_transport = 0

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        if self._close_timer is not None:
            self._close_timer.cancel()
            self._close_timer = None
        self._end_reason = self._end_reason or PEER_ENDED
        self._drop()
        self._on_end(self, self._end_reason)
