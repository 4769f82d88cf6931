"""The way out of one connection: straight to the socket, or into a bounded outbox while the socket takes no more.

While nothing waits, `write` of a connection's sink is the socket's own `send`, so that fan-out costs a call of the
kernel and no more; as soon as something does, it is a method that queues. What one turn of the loop has to say to one
client alone, beyond the first frame, waits for the end of the turn, and leaves in one write.

A peer that does not keep up is closed as slow when its outbox is full, and as stalled when it takes nothing for a
while. The end has a deadline: what is queued and a last frame are written, this side of the socket is shut, and the
connection is over when the peer shuts its side, or is aborted when it does not.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable
from itertools import count
from typing import Any, Protocol

from twisted.internet.interfaces import IPushProducer
from zope.interface import implementer

from realtime.deadlines import Deadlines
from realtime.errors import SLOW, WRITE_ERROR
from realtime.metrics import Counter
from realtime.process.transport import DirectServer
from realtime.protocol.wire_formats import WireFormat
from realtime.pubsub.subscriber import Sink
from realtime.transports.outbox import Outbox, QueuedBytes

# Bytes handed to a transport that has just emptied its buffer: more than what makes it pause again, at once.
_REFILL = 128 * 1024

# The outbox of a connection whose last frame was handed to the transport: it takes everything and keeps nothing.
_SHUT = Outbox(0, QueuedBytes())
_SHUT.shut = True


class OutboxLimits(Protocol):
    """What the connections of one transport share.

    queue_max_size: bytes that may wait for one peer. queued: what waits for all. write_timeout, close_timeout: seconds,
    the first may be 0 for none. sent: messages. ends: of the loop's turns.
    """

    deadlines: Deadlines
    ends: FlushAtTurnEnd
    queue_max_size: int
    queued: QueuedBytes
    write_timeout: float
    close_timeout: float
    sent: Counter

    def count(self, kind: str) -> None:
        """Count one that was "slow" or "stalled"."""


class FlushAtTurnEnd:
    """The connections that have something to write at the end of the loop's turn."""

    def __init__(
        self,
        turn: Callable[[], int] | None = None,
        later: Callable[[Callable[[], None]], object] = lambda flush: flush(),
    ) -> None:
        """turn: the number of this turn; None: every moment is another. later: calls what it is given at its end."""
        self.turn = turn or count().__next__
        self._later = later
        self._waiting: list[Outgoing] = []

    def await_end(self, connection: Outgoing) -> None:
        """Have `connection.flush` called then."""
        self._waiting.append(connection)
        if len(self._waiting) == 1:
            self._later(self._flush)

    def _flush(self) -> None:
        waiting, self._waiting = self._waiting, []
        for connection in waiting:
            connection.flush()


@implementer(IPushProducer)
class Outgoing:
    """See the module. A base of protocols whose transport is a TCP server's. Loop thread only.

    A subclass calls `begin` when frames may be written, has `is_closing` and `close`, and calls `lose_queue` when the
    connection is lost.
    """

    form: WireFormat
    pings = True  # by the session; see `realtime.protocol.session.Connection`
    sink: Any = None  # a Sink, from `begin` on
    factory: Any  # Limits
    transport: Any
    bucket = 0  # belongs to Deadlines
    _outbox: Outbox | None = None  # None while the transport takes what it is given
    _stuffed = False  # the transport asked for a pause and has not yet ended it
    _acknowledged = 0  # bytes the peer had taken when progress was last checked
    _spoken = -1  # the turn in which the last frame was sent to this client alone

    @property
    def is_closing(self) -> bool:
        """Whether the end has begun: then the deadline is for that."""
        raise NotImplementedError

    def close(self, code: int, reason: str) -> None:
        """Tell the peer why, after what is queued, and end the connection within the close timeout."""
        raise NotImplementedError

    def begin(self) -> None:
        """Frames may be written from now on."""
        self.sink = Sink(self._queue, self._keep)
        self.transport.registerProducer(self, True)
        self._go_straight()
        if isinstance(self.transport, DirectServer):
            self.transport.read_straight()
            # What was written before, the response to an earlier request for one, may still wait there.
            self.transport.hold()

    def send(self, payload: bytes) -> None:
        """Send one message, behind whatever waits. payload: of the connection's encoding."""
        factory = self.factory
        factory.sent.value += 1
        turn = factory.ends.turn()
        if turn == self._spoken and self._outbox is None:
            self._go_by(Outbox(factory.queue_max_size, factory.queued))
            factory.ends.await_end(self)
        self._spoken = turn
        self.sink.deliver(self.form.frame(payload))

    def _queue(self, frame: bytes) -> int:
        """What stands for `sink.write` while something waits, and where there is no straight way."""
        if self._outbox is None:
            self.transport.write(frame)
        elif not self._outbox.offer(frame):
            self._give_up("slow", *SLOW)
        return len(frame)

    def _keep(self, frame: bytes, taken: int) -> None:
        """Send the rest of a frame before anything else."""
        self._hand_over(frame[taken:])

    def flush(self) -> None:
        """The turn ends in which frames were put together."""
        if not self._stuffed:
            self._refill()

    def end(self, last: bytes, drop: bool = False) -> None:
        """Write `last` after what is queued, or in place of it, and nothing more; then shut this side."""
        self.factory.deadlines.set(self, self.factory.deadlines.now + self.factory.close_timeout)
        if self._outbox is None:
            self.transport.write(last)
            self.shut_down()
            return
        if drop:
            self._outbox.clear()
        self._outbox.finish(last)

    def shut_down(self) -> None:
        """Write nothing more, and wait for the peer to do the same."""
        if self._outbox is _SHUT:
            return
        self._go_by(_SHUT)
        self.transport.unregisterProducer()
        self.transport.resumeProducing()
        self.transport.loseWriteConnection()

    def lose_queue(self) -> None:
        """The connection is lost: nothing waits any more, and what still comes is dropped."""
        self.factory.deadlines.clear(self)
        if self._outbox is not None:
            self._outbox.clear()
        self._go_by(_SHUT)
        if self.sink is not None:
            # Whoever still has it may use it, and it holds us no longer.
            self.sink.write, self.sink.keep = len, _drop

    def pauseProducing(self) -> None:
        """The transport holds something; it may say so again at every write."""
        if self._stuffed:
            return
        self._stuffed = True
        if self._outbox is None:
            self._go_by(Outbox(self.factory.queue_max_size, self.factory.queued))
        self._watch_progress()

    def resumeProducing(self) -> None:
        """The transport has written all that it held."""
        self._stuffed = False
        self._refill()

    def _refill(self) -> None:
        outbox = self._outbox
        while outbox and not self._stuffed:
            self._hand_over(outbox.take(_REFILL))
        if outbox is None or self._stuffed:
            return
        if outbox.shut:
            self.shut_down()
        else:
            self.factory.deadlines.clear(self)
            self._go_straight()

    def _hand_over(self, data: bytes) -> None:
        """Have the transport write this, and keep what it can't write at once; we are paused while it does."""
        self.transport.write(data)
        if isinstance(self.transport, DirectServer):
            self.transport.hold()

    def _go_straight(self) -> None:
        """Nothing waits."""
        self._outbox = None
        if isinstance(self.transport, DirectServer) and (send := self.transport.straight):
            self.sink.write = send
            self.sink.fd = self.transport.fileno()

    def _go_by(self, outbox: Outbox) -> None:
        """Everything goes by way of this outbox."""
        self._outbox = outbox
        if self.sink is not None:
            self.sink.write = self._queue
            self.sink.fd = -1

    def stopProducing(self) -> None:
        """The connection is lost; `connectionLost` does the rest."""

    def wake(self) -> None:
        """The deadline came: for the peer to take some bytes, or for the connection to end."""
        if self.is_closing:
            self.transport.abortConnection()
        elif self._taken() > self._acknowledged:
            self._watch_progress()
        else:
            self._give_up("stalled", *WRITE_ERROR)

    def _watch_progress(self) -> None:
        """Look again after `write_timeout` whether the peer has taken anything."""
        if not self.is_closing and self.factory.write_timeout > 0:
            self._acknowledged = self._taken()
            self.factory.deadlines.set(self, self.factory.deadlines.now + self.factory.write_timeout)

    def _taken(self) -> int:
        """Bytes that the peer's kernel has acknowledged: tcpi_bytes_acked in linux/tcp.h, a 64-bit number at 120.

        What the local kernel took would not do: its buffer holds megabytes, and it asks for more in large steps.
        """
        carrier = getattr(self.transport, "transport", self.transport)  # under TLS the transport has one of its own
        info = carrier.getHandle().getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 128)
        return int(struct.unpack_from("=Q", info, 120)[0])

    def _give_up(self, kind: str, code: int, reason: str) -> None:
        """Close a connection that doesn't take its frames; those that wait are dropped."""
        self.factory.count(kind)
        if self._outbox is not None:
            self._outbox.clear()
        self.close(code, reason)


def _drop(frame: bytes, taken: int) -> None: ...
