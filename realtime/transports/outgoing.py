"""Outgoing side of a connection: writes straight to the socket, and to a bounded outbox while its buffer is full.

While nothing is queued, `send` of a connection's sink is the `send` of its socket, so fan-out costs one system call for
each receiver and no Python frame. As soon as a frame is queued, it is a method that queues. `Outgoing.send` writes the
first message for one client in a loop turn at once, and queues further ones until the end of the turn: they leave
together in one write.

A peer that does not keep up with its pushes is disconnected as *slow* when its outbox is full, and as *stalled* when
its kernel acknowledges no byte for `write_timeout`. Replies are always queued, but the session starts no command while
the connection is congested, and sends missed publications only while it is drained. The end of a connection has a
deadline: queued frames and a last frame are written, the socket is half-closed, and the connection ends when the peer
closes its side. At the deadline it is aborted.
"""

from __future__ import annotations

import fcntl
import socket
import struct
import termios
from collections import deque
from collections.abc import Callable
from itertools import count
from typing import Any, Protocol

from msgspec import Struct
from twisted.internet.interfaces import IPushProducer
from twisted.logger import Logger
from zope.interface import implementer

from realtime.client_log import ClientLog
from realtime.deadlines import Deadlines
from realtime.errors import SLOW, WRITE_ERROR
from realtime.metrics import Counter
from realtime.process.transport import DirectServer
from realtime.protocol.wire_formats import WireFormat
from realtime.pubsub.subscriber import Sink
from realtime.transports.outbox import Outbox, QueuedBytes

_log = Logger()

# Bytes written to a transport with an empty buffer: above its limit, so that it pauses the producer again at once.
_REFILL_SIZE = 128 * 1024

# Bytes that the kernel takes from a paced connection beyond those it may send at once: 0.3 s of a link of 50 KB/s.
_PACED_UNSENT = 16 * 1024

# Stands for the outbox after the last frame was passed to the transport: it drops all further frames.
_DISCARDING = Outbox(0, QueuedBytes())
_DISCARDING.is_finished = True


class HandedOutput(Struct, frozen=True, array_like=True):
    """The outgoing side of a connection for another process.

    data: queued bytes, which may begin within a frame. replies: their number up to the end of the last reply.
    """

    data: bytes = b""
    replies: int = 0


class OutgoingContext(Protocol):
    """State shared by the outgoing sides of one transport's connections.

    queue_max_size: limit of one outbox, in bytes. queued: bytes queued in all outboxes. write_timeout, close_timeout:
    seconds; write_timeout may be 0 for none. sent: messages sent to one client alone.
    """

    deadlines: Deadlines
    turn_end: FlushAtTurnEnd
    queue_max_size: int
    queued: QueuedBytes
    write_timeout: float
    close_timeout: float
    sent: Counter
    client_log: ClientLog


class FlushAtTurnEnd:
    """Flushes connections at the end of the loop turn in which they queued messages.

    current_turn: function that returns the number of the current loop turn.
    """

    def __init__(
        self,
        current_turn: Callable[[], int] | None = None,
        call_at_end: Callable[[Callable[[], None]], object] = lambda flush: flush(),
    ) -> None:
        """current_turn: None counts each call as a turn. call_at_end: calls its argument at the end of the turn."""
        self.current_turn = current_turn or count().__next__
        self._call_at_end = call_at_end
        self._scheduled: list[Outgoing] = []
        self._due: deque[Outgoing] = deque()

    def schedule(self, connection: Outgoing) -> None:
        """Call `connection.flush` at the end of this turn."""
        self._scheduled.append(connection)
        if len(self._scheduled) == 1:
            self._call_at_end(self.flush)

    def flush(self) -> None:
        """Flush the scheduled connections.

        A flush may start a handler that blocks: the relief thread flushes the other connections meanwhile.
        """
        due = self._due
        due.extend(self._scheduled)
        self._scheduled.clear()
        while due:
            connection = due.popleft()
            try:
                connection.flush()
            except Exception:  # the others must be flushed all the same
                connection.abort_after_error()


@implementer(IPushProducer)
class Outgoing:
    """Outgoing side of a connection; a base class of protocols on a TCP server transport. Loop thread only.

    A subclass calls `start_writing` once it has a transport for frames, implements `is_closing` and `close`, and calls
    `stop_writing` from `connectionLost`.

    sink: where fan-out delivers frames; set by `start_writing`. needs_pings: see `protocol.context.Connection`.
    """

    form: WireFormat
    needs_pings = True
    sink: Any = None
    factory: Any  # an OutgoingContext
    transport: Any
    deadline_bucket = 0  # see DeadlineOwner
    _outbox: Outbox | None = None  # None: nothing is queued, frames go straight to the transport
    _is_transport_full = False  # the transport has paused us
    _acknowledged = 0  # bytes that the peer's kernel had acknowledged at the last check
    _on_drained: tuple[Callable[[], None], ...] = ()  # see `when_drained`
    _last_send_turn = -1  # number of the loop turn of the latest `send`

    @property
    def is_closing(self) -> bool:
        """Whether `close` was called, or the peer closes: then the deadline is the close timeout."""
        raise NotImplementedError

    def close(self, code: int, reason: str) -> None:
        """Send code and reason after the queued frames, and end the connection within the close timeout."""
        raise NotImplementedError

    def describe(self) -> dict[str, object]:
        """Return the facts about the client for the log."""
        raise NotImplementedError

    def start_writing(self) -> None:
        """Allow frames to be written."""
        self.sink = Sink(self._queue_frame, self._queue_remainder)
        self.transport.registerProducer(self, True)
        self._write_directly()
        if isinstance(self.transport, DirectServer):
            # The response to an earlier HTTP request on this connection may still be buffered.
            self.transport.pause_producer_if_buffering()

    def send(self, payload: bytes, *, is_push: bool = False) -> None:
        """Send one message, encoded as `form` requires, after all queued frames.

        is_push: the message is no reply, so the peer is slow if its outbox has no room for it.
        """
        factory = self.factory
        factory.sent.value += 1
        turn = factory.turn_end.current_turn()
        # A client seldom gets more than one message of its own in a turn, so the first is not delayed. From the second
        # on they are queued: a burst of replies costs two system calls, whatever its length.
        if turn == self._last_send_turn and self._outbox is None:
            self._write_to_outbox(Outbox(factory.queue_max_size, factory.queued))
            factory.turn_end.schedule(self)
        self._last_send_turn = turn
        frame = self.form.frame(payload)
        if self._outbox is not None and not is_push:
            self._outbox.add_reply(frame)
            return
        sink = self.sink
        try:  # as `Sink.deliver`, without a further call for each message
            sent = sink.send(frame)
        except OSError:
            sent = 0
        if sent != len(frame):
            sink.queue_remainder(frame, sent)

    @property
    def is_held(self) -> bool:
        """Whether the relief thread leaves the connection to the loop's thread (`realtime.process.relief`)."""
        return getattr(getattr(self.transport, "reactor", None), "held", None) is self.transport

    @property
    def is_drained(self) -> bool:
        """Whether the socket has taken all frames."""
        return self._outbox is None

    @property
    def is_congested(self) -> bool:
        """Whether so many bytes are queued that no further command of the client may start."""
        return self._outbox is not None and self._outbox.size > self.factory.queue_max_size // 2

    def when_drained(self, callback: Callable[[], None]) -> None:
        """Call `callback` once when the socket has taken all frames, however often this is asked for until then."""
        if callback not in self._on_drained:
            self._on_drained += (callback,)

    def unsent(self) -> int:
        """Return the number of bytes that the peer's kernel has not acknowledged, queued ones included."""
        if self._outbox is _DISCARDING:
            return 0
        queued = self._outbox.size if self._outbox is not None else 0
        if isinstance(self.transport, DirectServer):
            queued += self.transport.buffered
        (unacknowledged,) = struct.unpack("i", fcntl.ioctl(self._tcp_socket, termios.TIOCOUTQ, b"\0\0\0\0"))
        return queued + int(unacknowledged)

    def pace(self, is_paced: bool) -> None:
        """Have the kernel take only as many bytes as it may send soon, or as many as fit into its buffer.

        That buffer holds megabytes. On a slow link they would delay replies and pings behind them by minutes.
        """
        if self._outbox is not _DISCARDING:
            self._tcp_socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _PACED_UNSENT if is_paced else 0)

    @property
    def _tcp_socket(self) -> Any:
        tcp = getattr(self.transport, "transport", self.transport)  # a TLS transport wraps the TCP transport
        return tcp.getHandle()

    def _queue_frame(self, frame: bytes) -> int:
        """Queue a frame: `sink.send` while an outbox exists, and for transports without a direct send."""
        try:
            if self._outbox is None:
                self.transport.write(frame)
            elif not self._outbox.offer(frame):
                self._drop_peer("slow", *SLOW)
        except Exception:  # fan-out goes on with the other subscribers
            self.abort_after_error()
        return len(frame)

    def _queue_remainder(self, frame: bytes, sent: int) -> None:
        """Let the transport write the rest of a frame that the socket accepted only in part, before anything else."""
        try:
            self._write_to_transport(frame[sent:])
        except Exception:
            self.abort_after_error()

    def hold(self) -> bool:
        """Queue all frames until `release`, which writes them together. Returns False if they are queued already."""
        if self._outbox is not None:
            return False
        self._write_to_outbox(Outbox(self.factory.queue_max_size, self.factory.queued))
        return True

    def release(self) -> None:
        """Write the frames queued since `hold`, unless the transport is full."""
        try:
            self.flush()
        except Exception:  # a close frame would wait behind the frames that could not be written
            self.abort_after_error()

    def flush(self) -> None:
        """Write the messages queued in this loop turn, unless the transport is full."""
        if not self._is_transport_full:
            self._write_queued()

    def finish_writing(self, last_frame: bytes, drop_queued: bool = False) -> None:
        """Write `last_frame` after the queued frames, or in place of those for a full transport, then half-close."""
        self.factory.deadlines.set(self, self.factory.deadlines.now + self.factory.close_timeout)
        if self._outbox is None:
            self.transport.write(last_frame)
            self.half_close()
            return
        if drop_queued and self._is_transport_full:
            self._outbox.clear()
        self._outbox.finish(last_frame)

    def half_close(self) -> None:
        """Close the writing side of the socket after the written data, and drop further frames. Idempotent."""
        if self._outbox is _DISCARDING:
            return
        self._write_to_outbox(_DISCARDING)
        self.transport.unregisterProducer()
        self.transport.resumeProducing()
        self.transport.loseWriteConnection()

    def stop_writing(self) -> None:
        """Drop queued and further frames of a lost connection, and clear its deadline."""
        self.factory.deadlines.clear(self)
        self.factory.queued.stuck.discard(self)
        self._on_drained = ()
        if self._outbox is not None:
            self._outbox.clear()
        self._write_to_outbox(_DISCARDING)
        if self.sink is not None:
            # Subscribers may keep the sink for a while: it stays callable, without a reference to this connection.
            self.sink.send, self.sink.queue_remainder = len, _discard_remainder

    def take_connection(self) -> tuple[int, HandedOutput]:
        """Give up the socket without an end for the peer: return its descriptor, and what it has not taken."""
        descriptor, data = self.transport.detach()
        replies = 0
        if self._outbox:
            replies = self._outbox.replies and len(data) + self._outbox.replies
            data += self._outbox.take(self._outbox.size)
        self.stop_writing()
        return descriptor, HandedOutput(data, replies)

    def restore_output(self, handed: HandedOutput) -> None:
        """Begin to write, with the bytes that another process has queued."""
        self.start_writing()
        if handed.data:
            outbox = Outbox(self.factory.queue_max_size, self.factory.queued)
            outbox.restore(handed.data, handed.replies)
            self._write_to_outbox(outbox)
            self.flush()

    def abort(self) -> None:
        """End the connection at once, without a close frame."""
        self.transport.abortConnection()

    def abort_after_error(self) -> None:
        """Log the present exception, and end the connection: its state, and the client's, are not certain."""
        _log.failure("serving a client raised an exception; aborting its connection")
        self.abort()

    def pauseProducing(self) -> None:
        """Queue frames from now on: the transport has buffered data. It may call this at every write."""
        if self._is_transport_full:
            return
        self._is_transport_full = True
        if self._outbox is None:
            self._write_to_outbox(Outbox(self.factory.queue_max_size, self.factory.queued))
        self.factory.queued.stuck.add(self)
        self._check_progress_later()

    def resumeProducing(self) -> None:
        """Write queued frames: the transport's buffer is empty."""
        self._is_transport_full = False
        self.factory.queued.stuck.discard(self)
        self._write_queued()

    def _write_queued(self) -> None:
        outbox = self._outbox
        while outbox and not self._is_transport_full:
            self._write_to_transport(outbox.take(_REFILL_SIZE))
        if outbox is None or self._is_transport_full:
            return
        if outbox.is_finished:
            self.half_close()
        else:
            self.factory.deadlines.clear(self)
            self._write_directly()
            if self._on_drained:
                callbacks, self._on_drained = self._on_drained, ()
                for callback in callbacks:
                    callback()

    def _write_to_transport(self, data: bytes) -> None:
        """Write to the transport; if it buffers any of the data, it pauses us until its buffer is empty."""
        self.transport.write(data)
        if isinstance(self.transport, DirectServer):
            self.transport.pause_producer_if_buffering()

    def _write_directly(self) -> None:
        """Discard the empty outbox, and let the sink call send(2) of the socket itself."""
        self._outbox = None
        if isinstance(self.transport, DirectServer) and (direct_send := self.transport.direct_send):
            self.sink.send = direct_send
            self.sink.fd = self.transport.fileno()

    def _write_to_outbox(self, outbox: Outbox) -> None:
        """Queue all further frames in `outbox`."""
        self._outbox = outbox
        if self.sink is not None:
            self.sink.send = self._queue_frame
            self.sink.fd = -1

    def stopProducing(self) -> None:
        """Do nothing: the transport calls `connectionLost` as well."""

    def on_deadline(self) -> None:
        """Abort a closing connection; otherwise disconnect the peer if it has acknowledged nothing."""
        if self.is_closing:
            self.transport.abortConnection()
        elif self._acknowledged_bytes() > self._acknowledged:
            self._check_progress_later()
        else:
            self._drop_peer("stalled", *WRITE_ERROR)

    def _check_progress_later(self) -> None:
        """Check after `write_timeout` whether the peer has acknowledged further bytes."""
        if not self.is_closing and self.factory.write_timeout > 0:
            self._acknowledged = self._acknowledged_bytes()
            self.factory.deadlines.set(self, self.factory.deadlines.now + self.factory.write_timeout)

    def _acknowledged_bytes(self) -> int:
        """Return the number of bytes that the peer's kernel has acknowledged.

        It is tcpi_bytes_acked of linux/tcp.h, a 64-bit number at offset 120. Bytes accepted by the local kernel show no
        progress of the peer: its buffer holds megabytes, and it accepts more in large steps.
        """
        info = self._tcp_socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 128)
        return int(struct.unpack_from("=Q", info, 120)[0])

    def queued_bytes(self) -> int:
        return self._outbox.size if self._outbox is not None else 0

    def drop_as_largest(self) -> None:
        self._drop_peer("largest_queue", *SLOW)

    def _drop_peer(self, kind: str, code: int, reason: str) -> None:
        """Drop the queued frames of a peer that does not read, and close its connection."""
        self.factory.client_log.refuse(kind, self.describe)
        if self._outbox is not None:
            self._outbox.clear()
        self.close(code, reason)


def _discard_remainder(frame: bytes, sent: int) -> None: ...
