"""Passes accepted connections from the supervisor to a worker, each connection to exactly one worker.

They go over a pair of SOCK_SEQPACKET sockets, unix(7). A message to the worker holds a number and two descriptors: the
connection, and its *claim*, an eventfd(2) with the value 1. The process that reads the claim owns the connection. The
worker reads it before it adopts the connection; the sender reads it to take the connection back from a worker that does
not answer. So a worker that was stopped and resumes later adopts nothing that another worker has got meanwhile. The
worker answers with the number and whether it has adopted the connection.

The sender keeps its copy of a connection until the answer, because a receiver at its limit of descriptors loses the
ones in a message (MSG_CTRUNC, recvmsg(2)). A connection without an answer when the worker ends was never read from,
since the worker's loop does not turn between adopting and answering. It can go to another worker.
"""

from __future__ import annotations

import array
import errno
import os
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from twisted.internet.interfaces import IReadDescriptor
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from realtime.process import log

ANSWER_TIMEOUT = 0.25
"""Seconds for a worker to answer."""

MAX_IN_FLIGHT = 64
"""Unanswered connections that one worker may have."""

# Connections adopted in one turn of the worker's loop. Their handshakes follow together, half a millisecond each.
_BATCH = 4
_NUMBER = struct.Struct("=Q")
_ANSWER = struct.Struct("=Q?")
_DESCRIPTORS = 2

_log = Logger(observer=log.observer)


def pair() -> tuple[socket.socket, socket.socket]:
    """Create a pair of sockets for a sender and a receiver. Raises OSError."""
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in ends:
        end.setblocking(False)
    return ends


@implementer(IReadDescriptor)
class _End:
    """One end of the pair, as a reader in a reactor."""

    def __init__(self, reactor: Any, stream: socket.socket) -> None:
        self._reactor = reactor
        self._stream = stream
        self.open = True
        reactor.addReader(self)

    def fileno(self) -> int:
        return self._stream.fileno()

    def logPrefix(self) -> str:
        return type(self).__name__

    def doRead(self) -> None:
        raise NotImplementedError

    def connectionLost(self, reason: Failure) -> None:
        """Called by the reactor when it finds the descriptor in error."""
        self.close()

    def close(self) -> None:
        """Leave the reactor and close the socket. Idempotent."""
        if self.open:
            self.open = False
            self._reactor.removeReader(self)
            self._stream.close()


class _Transfer:
    """A sent connection without an answer. on_settled: called once, with whether the worker has taken it."""

    __slots__ = ("claim", "connection", "deadline", "on_settled")

    def __init__(
        self, connection: socket.socket, claim: int, deadline: float, on_settled: Callable[[bool], None]
    ) -> None:
        self.connection = connection
        self.claim = claim
        self.deadline = deadline
        self.on_settled = on_settled

    def settle(self, is_taken: bool) -> None:
        os.close(self.claim)
        if is_taken:
            self.connection.close()
        self.on_settled(is_taken)


class FdSender(_End):
    """The supervisor's end, for one worker process."""

    def __init__(self, reactor: Any, stream: socket.socket) -> None:
        super().__init__(reactor, stream)
        self._transfers: dict[int, _Transfer] = {}  # by number, in the order of their deadlines
        self._next_number = 0

    @property
    def in_flight(self) -> int:
        """Number of unanswered connections."""
        return len(self._transfers)

    @property
    def has_room(self) -> bool:
        """Whether another connection can be sent."""
        return self.open and len(self._transfers) < MAX_IN_FLIGHT

    def send(self, connection: socket.socket, on_settled: Callable[[bool], None]) -> bool:
        """Send a connection. Returns False if it could not be sent; the caller then keeps it.

        on_settled: called once, later. With True the worker has the connection and our copy is closed; with False the
        caller has it again.
        """
        if not self.has_room:
            return False
        try:
            claim = os.eventfd(1, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        except OSError:  # no free descriptor
            return False
        try:
            socket.send_fds(self._stream, [_NUMBER.pack(self._next_number)], [connection.fileno(), claim])
        except OSError:  # the socket buffer is full, or the worker has ended
            os.close(claim)
            return False
        deadline = self._reactor.seconds() + ANSWER_TIMEOUT
        self._transfers[self._next_number] = _Transfer(connection, claim, deadline, on_settled)
        self._next_number += 1
        return True

    def reclaim_overdue(self) -> None:
        """Take back the connections that were not answered in time. Call it many times a second."""
        now = self._reactor.seconds()
        for number, transfer in list(self._transfers.items()):
            if transfer.deadline > now:
                break
            # If the worker has the claim, it is about to answer, or to end.
            if take_claim(transfer.claim):
                del self._transfers[number]
                transfer.settle(False)

    def doRead(self) -> None:
        while self.open:
            try:
                data = self._stream.recv(_ANSWER.size + 1)
            except BlockingIOError:
                return
            except ConnectionResetError:  # the worker left messages unread; its answers come first
                continue
            except OSError:
                data = b""
            if len(data) != _ANSWER.size:
                self._end(worker_ended=not data)
                return
            number, is_taken = _ANSWER.unpack(data)
            transfer = self._transfers.pop(number, None)
            if transfer is not None:
                transfer.settle(is_taken)

    def connectionLost(self, reason: Failure) -> None:
        self._end(worker_ended=True)

    def close(self) -> None:
        """Stop sending. The worker keeps the connections that it has claimed, and the caller gets the others back."""
        self._end(worker_ended=False)

    def worker_ended(self) -> None:
        """Note that the process has ended. The caller gets all unanswered connections back."""
        self.doRead()
        self._end(worker_ended=True)

    def _end(self, worker_ended: bool) -> None:
        """worker_ended: whether the worker closed its end or died, so that it has no unanswered connection."""
        super().close()
        transfers, self._transfers = self._transfers, {}
        for transfer in transfers.values():
            transfer.settle(not (take_claim(transfer.claim) or worker_ended))


class FdReceiver(_End):
    """The worker's end."""

    def __init__(self, reactor: Any, fd: int, adopt: Callable[[int], None]) -> None:
        """fd: the socket's descriptor, owned by this object. adopt: called with the descriptor of a connection, must
        duplicate it, and raises OSError on failure."""
        super().__init__(reactor, socket.socket(fileno=fd))
        self._stream.setblocking(False)  # whatever default timeout the application has set
        self._adopt = adopt

    def doRead(self) -> None:
        for _ in range(_BATCH):
            if not self._receive():
                return

    def _receive(self) -> bool:
        """Handle one message. Returns False without one, and when the end is closed."""
        try:
            data, descriptors = _receive_message(self._stream)
        except BlockingIOError:
            return False
        except OSError:
            data, descriptors = b"", []
        if len(data) != _NUMBER.size:
            _close(descriptors)
            self.close()
            return False
        if len(descriptors) == _DESCRIPTORS:
            is_taken = self._claim_and_adopt(*descriptors)
        else:
            _close(descriptors)
            is_taken = False
        if is_taken is not None:
            self._answer(data, is_taken)
        return self.open

    def _answer(self, number: bytes, is_taken: bool) -> None:
        # The buffer always has room, because at most MAX_IN_FLIGHT connections are unanswered.
        try:
            self._stream.send(_ANSWER.pack(*_NUMBER.unpack(number), is_taken))
        except OSError:  # the supervisor has ended
            self.close()

    def _claim_and_adopt(self, connection: int, claim: int) -> bool | None:
        """Return whether the connection was adopted; None if the sender has taken it back meanwhile."""
        try:
            try:
                is_claimed = take_claim(claim)
            finally:
                os.close(claim)  # before adopting, which needs a free descriptor
            if not is_claimed:
                return None
            self._adopt(connection)
            return True
        except OSError as error:
            if error.errno == errno.ENOTCONN:
                return True  # the client has disconnected, so another worker could not serve it either
            _log.warn(
                "can't adopt a connection from the supervisor, which passes it to another worker: {error}; "
                "check `ulimit -n`",
                error=error,
            )
            return False
        except Exception:
            _log.failure("adopting a connection from the supervisor raised; the supervisor passes it to another worker")
            return False
        finally:
            os.close(connection)


def take_claim(claim: int) -> bool:
    """Read the eventfd's 1, at which only one process succeeds."""
    with suppress(BlockingIOError):
        return os.eventfd_read(claim) == 1
    return False


def _receive_message(stream: socket.socket) -> tuple[bytes, list[int]]:
    """Receive one message and its descriptors, which the caller owns. Raises OSError."""
    space = socket.CMSG_SPACE(_DESCRIPTORS * array.array("i").itemsize)
    data, ancillary, _, _ = stream.recvmsg(_NUMBER.size + 1, space, socket.MSG_CMSG_CLOEXEC)
    descriptors = array.array("i")
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            descriptors.frombytes(content[: len(content) - len(content) % descriptors.itemsize])
    return data, descriptors.tolist()


def _close(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
