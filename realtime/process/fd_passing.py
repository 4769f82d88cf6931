"""Hands accepted connections from the supervisor to a worker, each to one worker and to no second one.

They go over a pair of SOCK_SEQPACKET sockets, unix(7). A message to the worker is a number and two descriptors: the
connection, and its *claim*, an eventfd(2) that holds 1. Whoever reads the claim has the connection: the worker reads
it before it adopts, the sender to take the connection back from a worker that does not answer. So one that was stopped,
and goes on later, adopts nothing that another worker was given meanwhile. The worker answers with the number and a
verdict.

The sender keeps its copy of a connection until it is answered: a receiver that is at its limit of descriptors loses what
was sent (MSG_CTRUNC, recvmsg(2)). What is unanswered when the worker ends was never read from: between adopting and
answering, its loop does not turn. It can be given to another.
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
"""Seconds that a worker has to answer."""

MAX_IN_FLIGHT = 64
"""Connections that one worker may have unanswered."""

# Connections adopted in one turn of the worker's loop: their handshakes follow together, half a millisecond each.
_BATCH = 4
_NUMBER = struct.Struct("=Q")
_ANSWER = struct.Struct("=Q?")
_DESCRIPTORS = 2

_log = Logger(observer=log.observer)


def pair() -> tuple[socket.socket, socket.socket]:
    """A sender's and a receiver's end. Raises OSError."""
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in ends:
        end.setblocking(False)
    return ends


@implementer(IReadDescriptor)
class _End:
    """One end in a reactor."""

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
        """Leave the reactor. Idempotent."""
        if self.open:
            self.open = False
            self._reactor.removeReader(self)
            self._stream.close()


class _Transfer:
    """A connection that was given and not yet answered. settled: told once, and whether it was taken."""

    __slots__ = ("claim", "connection", "deadline", "settled")

    def __init__(self, connection: socket.socket, claim: int, deadline: float, settled: Callable[[bool], None]) -> None:
        self.connection = connection
        self.claim = claim
        self.deadline = deadline
        self.settled = settled

    def settle(self, taken: bool) -> None:
        os.close(self.claim)
        if taken:
            self.connection.close()
        self.settled(taken)


class FdSender(_End):
    """The supervisor's end, towards one worker process."""

    def __init__(self, reactor: Any, stream: socket.socket) -> None:
        super().__init__(reactor, stream)
        self._transfers: dict[int, _Transfer] = {}
        self._number = 0

    @property
    def in_flight(self) -> int:
        """Connections that are unanswered."""
        return len(self._transfers)

    @property
    def has_room(self) -> bool:
        """Whether another one can be given."""
        return self.open and len(self._transfers) < MAX_IN_FLIGHT

    def send(self, connection: socket.socket, settled: Callable[[bool], None]) -> bool:
        """Offer a connection. False: it could not be sent, and stays the caller's.

        settled: called later, once: True when the worker has it, and our copy is closed; False when it is the caller's
        again.
        """
        if not self.has_room:
            return False
        try:
            claim = os.eventfd(1, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        except OSError:  # out of descriptors
            return False
        try:
            socket.send_fds(self._stream, [_NUMBER.pack(self._number)], [connection.fileno(), claim])
        except OSError:  # full, or the worker has ended
            os.close(claim)
            return False
        deadline = self._reactor.seconds() + ANSWER_TIMEOUT
        self._transfers[self._number] = _Transfer(connection, claim, deadline, settled)
        self._number += 1
        return True

    def reclaim_overdue(self) -> None:
        """Take back what was not answered in time. Often."""
        now = self._reactor.seconds()
        for number, transfer in list(self._transfers.items()):
            if transfer.deadline > now:
                break
            # Where the claim is gone the worker is about to answer, or to end.
            if _take_claim(transfer.claim):
                del self._transfers[number]
                transfer.settle(False)

    def doRead(self) -> None:
        while self.open:
            try:
                data = self._stream.recv(_ANSWER.size + 1)
            except BlockingIOError:
                return
            except ConnectionResetError:  # it left messages unread; its answers come first
                continue
            except OSError:
                data = b""
            if len(data) != _ANSWER.size:
                self._end(ended=not data)
                return
            number, taken = _ANSWER.unpack(data)
            transfer = self._transfers.pop(number, None)
            if transfer is not None:
                transfer.settle(taken)

    def connectionLost(self, reason: Failure) -> None:
        self._end(ended=True)

    def close(self) -> None:
        """Give no more. Of what is unanswered, the worker keeps what it has, and the rest is the caller's again."""
        self._end(ended=False)

    def worker_ended(self) -> None:
        """The process is no more: whatever it did not answer is the caller's again."""
        self.doRead()
        self._end(ended=True)

    def _end(self, ended: bool) -> None:
        """ended: the worker has closed its end or died, so it has nothing that it did not answer."""
        super().close()
        transfers, self._transfers = self._transfers, {}
        for transfer in transfers.values():
            transfer.settle(taken=not (_take_claim(transfer.claim) or ended))


class FdReceiver(_End):
    """The worker's end."""

    def __init__(self, reactor: Any, fd: int, adopt: Callable[[int], None]) -> None:
        """fd: the end that was inherited or passed on; owned from now on. adopt: called with the descriptor of a
        connection, of which it makes its own copy. It raises OSError when it can't."""
        super().__init__(reactor, socket.socket(fileno=fd))
        self._adopt = adopt

    def doRead(self) -> None:
        for _ in range(_BATCH):
            if not self._take():
                return

    def _take(self) -> bool:
        """Deal with one message. False when there is none."""
        try:
            data, descriptors = _receive(self._stream)
        except BlockingIOError:
            return False
        except OSError:
            data, descriptors = b"", []
        if len(data) != _NUMBER.size:
            _close(descriptors)
            self.close()
            return False
        if len(descriptors) == _DESCRIPTORS:
            taken = self._claim_and_adopt(*descriptors)
        else:
            _close(descriptors)
            taken = False
        if taken is not None:
            self._answer(data, taken)
        return self.open

    def _answer(self, number: bytes, taken: bool) -> None:
        # There is always room: only so many are in transfer.
        try:
            self._stream.send(_ANSWER.pack(*_NUMBER.unpack(number), taken))
        except OSError:  # the supervisor is gone
            self.close()

    def _claim_and_adopt(self, connection: int, claim: int) -> bool | None:
        """None: it was taken back in the meantime."""
        try:
            try:
                claimed = _take_claim(claim)
            finally:
                os.close(claim)  # first: adopting takes a descriptor
            if not claimed:
                return None
            self._adopt(connection)
            return True
        except OSError as error:
            if error.errno == errno.ENOTCONN:
                return True  # its peer has gone, and no other worker would find more of it
            _log.warn("a rescued connection could not be adopted: {error}", error=error)
            return False
        except Exception:
            _log.failure("a rescued connection could not be adopted")
            return False
        finally:
            os.close(connection)


def _take_claim(claim: int) -> bool:
    """Take the claim's 1, which one process can."""
    with suppress(BlockingIOError):
        return os.eventfd_read(claim) == 1
    return False


def _receive(stream: socket.socket) -> tuple[bytes, list[int]]:
    """One message and the descriptors that arrived with it, which are ours. Raises OSError."""
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
