"""Frames with file descriptors over a Unix stream between two processes, in both directions.

A frame is 4 bytes of length, 2 bytes with the number of its descriptors (both big-endian), then a body of that length.
Its descriptors travel with its first byte (SCM_RIGHTS, unix(7)). A receiver at its limit of descriptors loses some of
them (MSG_CTRUNC, recvmsg(2)), so a frame may arrive with too few: the receiver says so, and the sender keeps its copies
until the receiver has confirmed them.
"""

from __future__ import annotations

import array
import os
import socket
import struct
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from twisted.internet.interfaces import IReadWriteDescriptor
from twisted.python.failure import Failure
from zope.interface import implementer

MAX_DESCRIPTORS = 200
"""The most descriptors of one frame; the kernel's limit for a message is 253 (SCM_MAX_FD)."""

MAX_FRAME = 1 << 30
"""The longest frame in bytes; a longer one ends the stream."""

_HEAD = struct.Struct(">IH")
_CHUNK = 256 * 1024
_ANCILLARY_SPACE = socket.CMSG_SPACE((MAX_DESCRIPTORS + 1) * array.array("i").itemsize)


def stream_pair() -> tuple[socket.socket, socket.socket]:
    """Create the two ends of a stream. Raises OSError."""
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    for end in ends:
        end.setblocking(False)
    return ends


class _Outgoing:
    """A queued frame. descriptors: empty as soon as they are sent."""

    __slots__ = ("data", "descriptors")

    def __init__(self, data: memoryview, descriptors: Sequence[int]) -> None:
        self.data = data
        self.descriptors = descriptors


@implementer(IReadWriteDescriptor)
class FdStream:
    """One end of the stream.

    on_frame: called with the body of each frame and its descriptors, which it owns; none if any of them was lost.
    on_end: called once when the other end is closed or broken, but not by `close`.
    """

    def __init__(
        self,
        reactor: Any,
        fd: int,
        on_frame: Callable[[bytes, list[int]], None],
        on_end: Callable[[], None],
    ) -> None:
        """fd: the socket, owned by this object."""
        self._reactor = reactor
        self._socket = socket.socket(fileno=fd)
        self._socket.setblocking(False)  # whatever default timeout the application has set
        self._on_frame = on_frame
        self._on_end = on_end
        self._queue: deque[_Outgoing] = deque()
        self._received = bytearray()
        self._descriptors: deque[list[int]] = deque()  # of received frames, each list of one frame
        self.open = True
        reactor.addReader(self)

    @property
    def is_writing(self) -> bool:
        """Whether frames wait for the other end to read."""
        return bool(self._queue)

    def send(self, body: bytes, descriptors: Sequence[int] = ()) -> None:
        """Send a frame after the queued ones. The caller keeps the descriptors open until the receiver has answered."""
        if not self.open:
            return
        frame = _HEAD.pack(len(body), len(descriptors)) + body
        self._queue.append(_Outgoing(memoryview(frame), descriptors))
        if len(self._queue) == 1:
            self._write()

    def close(self) -> None:
        """Close this end, with what is queued, and the descriptors of incomplete frames. Idempotent."""
        if self.open:
            self.open = False
            self._reactor.removeReader(self)
            self._reactor.removeWriter(self)
            self._socket.close()
            self._queue.clear()
            while self._descriptors:
                close_all(self._descriptors.popleft())

    # Called by the reactor

    def fileno(self) -> int:
        return self._socket.fileno()

    def logPrefix(self) -> str:
        return type(self).__name__

    def connectionLost(self, reason: Failure) -> None:
        self._end()

    def doWrite(self) -> None:
        self._write()

    def _write(self) -> None:
        try:
            while self._queue:
                frame = self._queue[0]
                if frame.descriptors:
                    sent = socket.send_fds(self._socket, [frame.data], list(frame.descriptors))
                    frame.descriptors = ()
                else:
                    sent = self._socket.send(frame.data)
                frame.data = frame.data[sent:]
                if not frame.data:
                    self._queue.popleft()
        except BlockingIOError:
            self._reactor.addWriter(self)
        except OSError:  # the other end is closed, or the kernel has no memory for further descriptors on their way
            self._reactor.callLater(0, self._end)
        else:
            self._reactor.removeWriter(self)

    def doRead(self) -> None:
        try:
            data, ancillary, flags, _ = self._socket.recvmsg(_CHUNK, _ANCILLARY_SPACE, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return
        except OSError:
            data, ancillary, flags = b"", [], 0
        descriptors = array.array("i")
        for level, kind, content in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                descriptors.frombytes(content[: len(content) - len(content) % descriptors.itemsize])
        # One call returns the descriptors of one frame at most.
        if descriptors or flags & socket.MSG_CTRUNC:
            self._descriptors.append(descriptors.tolist())
        if not data:
            self._end()
            return
        self._received += data
        self._take_frames()

    def _take_frames(self) -> None:
        received = self._received
        while self.open and len(received) >= _HEAD.size:
            length, count = _HEAD.unpack_from(received)
            end = _HEAD.size + length
            if length > MAX_FRAME:
                self._end()
            if len(received) < end or not self.open:
                return
            body = bytes(memoryview(received)[_HEAD.size : end])
            del received[:end]
            descriptors = self._descriptors.popleft() if count and self._descriptors else []
            if len(descriptors) != count:
                close_all(descriptors)
                descriptors = []
            self._on_frame(body, descriptors)

    def _end(self) -> None:
        if self.open:
            self.close()
            self._on_end()


def close_all(descriptors: Sequence[int]) -> None:
    """Close these descriptors."""
    for descriptor in descriptors:
        os.close(descriptor)
