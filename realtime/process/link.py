"""Framed messages over a Unix stream: one end of the data plane between a worker and the broker.

Frames are gathered during one turn of the loop and written in one go at its end, straight to the socket. A peer that
does not keep up is cut off, not waited for: both ends know how to start again on a fresh stream.
"""

from __future__ import annotations

import asyncio
import os
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
from realtime.pubsub.broker_messages import BadFrame, FrameReader
from realtime.supervision.loop_time import LoopTimeLedger, LoopWork

BATCH = 1024 * 1024
"""Bytes written to a slow peer at a time, so that joining a long queue does not stall the loop."""

CLOSE_TIMEOUT = 2.0
"""Seconds for what is queued at `close` to go out."""

PEER_ENDED = "the peer ended the stream"

_log = Logger()


def adopt(reactor: Any, fd: int, link: Link) -> None:
    """Put a link on a connected stream socket. Takes ownership of `fd`."""
    try:
        os.set_blocking(fd, False)
        _Stream._fromConnectedSocket(fd, Factory.forProtocol(lambda: link), reactor)
    finally:
        os.close(fd)  # the transport works on a duplicate


class _Stream(DirectServer, unix.Server):
    """The transport. A turn's frames cost one send(2), as the selector is asked only when the peer is behind."""

    doRead = tcp.Connection.doRead  # type: ignore[assignment]  # recv(2): no descriptors come over the data plane


@implementer(IPushProducer)
class Link(Protocol):
    """One stream of messages.

    soon: has a call made in the loop's next turn. limit: bytes that may wait for the peer; beyond it the link cuts
    itself. received: called with each message, in order. An exception from it is a bug: logged, and the stream is cut,
    for nobody knows what was left undone. ended: called once with the reason when the stream is over, whoever ended it.
    accounts: the loop's, of which ENGINE is charged. patience: bytes that wait for the peer, from which on nothing more
    of it is worked off until half of them are gone: who asks for more than it reads, waits. 0 for no such thing; at one
    end of a stream at most, or each could wait for the other.
    """

    def __init__(
        self,
        reactor: Any,
        soon: Callable[[Callable[[], None]], asyncio.Handle | IDelayedCall],
        limit: int,
        received: Callable[[int, bytes], None],
        ended: Callable[[Link, str], None],
        accounts: LoopTimeLedger | None = None,
        patience: int = 0,
    ) -> None:
        if accounts is not None:
            account = accounts.open(LoopWork.ENGINE)
            for name in ("dataReceived", "resumeProducing", "_turn_over"):
                setattr(self, name, accounts.charging(account, getattr(self, name)))
        self._reactor = reactor
        self._soon = soon
        self._reader = FrameReader()
        self._limit = limit
        self._received = received
        self._ended = ended
        self._patience = patience
        self._held: Iterator[tuple[int, bytes]] | None = None  # what has come and is not worked off yet
        self._waiting: deque[bytes] = deque()
        self._bytes = 0  # in _waiting
        self._inside = 0  # bytes that the transport was given when it was last full
        self._paused = False
        self._flushing: asyncio.Handle | IDelayedCall | None = None
        self._closing: IDelayedCall | None = None
        self._over = ""  # why nothing is sent or received any more

    @property
    def backlog(self) -> int:
        """Bytes that wait for the peer; what the kernel holds is not counted."""
        return self._bytes + self._inside

    def connectionMade(self) -> None:
        self._transport.registerProducer(self, True)

    @property
    def _transport(self) -> Any:
        return self.transport

    # Out

    def send(self, frame: bytes) -> None:
        """Queue one frame, as `wire.pack` makes it; it may be shared. Without effect once the link is cut."""
        if self._over:
            return
        self._waiting.append(frame)
        self._bytes += len(frame)
        if self._bytes + self._inside > self._limit:
            self.cut("the peer is too far behind")
        elif self._flushing is None and not self._paused:
            self._flushing = self._soon(self._turn_over)

    def _turn_over(self) -> None:
        self._flushing = None
        self._flush()

    def _flush(self) -> None:
        while self._waiting and not self._paused:
            batch = self._take()
            self._bytes -= len(batch)
            self._inside = len(batch)
            self._transport.write(batch)  # calls pauseProducing when it could not take it all
            if not self._paused:
                self._inside = 0
        if self._held is not None and self.backlog <= self._patience // 2:
            messages, self._held = self._held, None
            self._transport.resumeProducing()
            self._work_off(messages)

    def _take(self) -> bytes:
        """The next frames, one at least, joined."""
        waiting = self._waiting
        if self._bytes <= BATCH:
            batch = b"".join(waiting)
            waiting.clear()
            return batch
        frames = [waiting.popleft()]
        room = BATCH - len(frames[0])
        while waiting and len(waiting[0]) <= room:
            room -= len(waiting[0])
            frames.append(waiting.popleft())
        return b"".join(frames)

    def pauseProducing(self) -> None:
        self._paused = True

    def resumeProducing(self) -> None:
        self._paused = False
        self._inside = 0
        self._flush()

    def stopProducing(self) -> None:
        self._paused = True

    # In

    def dataReceived(self, data: bytes) -> None:
        self._work_off(self._reader.feed(data))

    def _work_off(self, frames: Iterator[tuple[int, bytes]]) -> None:
        try:
            for number, body in frames:
                if self._over:
                    return
                self._received(number, body)
                if self._bytes + self._inside > self._patience > 0:
                    self._held = frames
                    self._transport.pauseProducing()
                    return
        except BadFrame as error:
            self.cut(str(error))
        except Exception:
            _log.failure("a message could not be worked off: the stream is cut")
            self.cut("a fault while working off a message")

    # The end

    def cut(self, reason: str) -> None:
        """End the stream at once; what waits is dropped. `ended` is called later, from the loop. Idempotent."""
        if self._over:
            return
        self._over = reason
        self._drop()
        if self.transport is not None:
            self._transport.abortConnection()

    def close(self) -> None:
        """End the stream when what waits is out, or CLOSE_TIMEOUT is over. Nothing is received any more."""
        if self._over:
            return
        self._over = "closed"
        self._transport.unregisterProducer()
        self._transport.write(b"".join(self._waiting))
        self._drop()
        self._closing = self._reactor.callLater(CLOSE_TIMEOUT, self._give_up)
        self._transport.loseConnection()

    def _give_up(self) -> None:
        self._closing = None
        self._transport.abortConnection()

    def _drop(self) -> None:
        self._waiting.clear()
        self._held = None
        self._bytes = self._inside = 0
        if self._flushing is not None:
            self._flushing.cancel()
            self._flushing = None

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        if self._closing is not None:
            self._closing.cancel()
            self._closing = None
        self._over = self._over or PEER_ENDED
        self._drop()
        self._ended(self, self._over)
