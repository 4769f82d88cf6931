"""Many sends in one system call: io_uring(7), by its kernel interface (linux/io_uring.h).

A fan-out is the same send(2) over and over. Here the sockets are written down in memory that the kernel shares, and one
call has it send to all of them, in order; it tells only of those that did not take everything. That saves the way into
the kernel and back for each, and Python's share in it. Where io_uring is missing or forbidden, as it is in many
containers, nobody needs it: `IOURing` can't be made then.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
import sys
from array import array
from collections.abc import Sequence

from realtime.pubsub.fanout import broadcast
from realtime.pubsub.subscriber import Sink

# Sends in one call, and bytes of one frame: more go out in several calls, longer ones one by one.
MOST = 256
LONGEST = 64 * 1024
# Sinks from which on it pays.
FEW = 8

# The system calls have the same numbers on all machines.
_SETUP, _ENTER = 425, 426
_SQES_AT = 0x10000000  # IORING_OFF_SQES
# IORING_FEAT_SINGLE_MMAP, and IORING_FEAT_CQE_SKIP of Linux 5.17.
_NEEDED = 1 << 0 | 1 << 11
_SEND = 26  # IORING_OP_SEND
_SILENT = 1 << 6  # IOSQE_CQE_SKIP_SUCCESS: nothing is said of what succeeds
# MSG_WAITALL makes less than the whole frame no success; with MSG_DONTWAIT nothing is waited for all the same.
_FLAGS = 0x4000 | 0x100 | 0x40  # MSG_NOSIGNAL, MSG_WAITALL, MSG_DONTWAIT
_PARAMS = struct.Struct("=30I")  # struct io_uring_params
_SQE = struct.Struct("=BBHiQQIIQ24x")  # struct io_uring_sqe
_CQE = struct.Struct("=QiI")  # struct io_uring_cqe
_FD, _LENGTH, _WORDS = 1, 6, 16  # which of an entry's words are those, and how many it has
_WORD = 2**32 - 1

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.argtypes = [ctypes.c_long] * 7
_libc.syscall.restype = ctypes.c_long


class IOURing:
    """See the module. For one thread alone, the loop's."""

    def __init__(self) -> None:
        """Raises OSError where the kernel has no such thing, or not for us."""
        if not sys.platform.startswith("linux"):
            raise OSError("only Linux has it")
        params = ctypes.create_string_buffer(_PARAMS.size)
        self._ring_fd = _call(_SETUP, MOST, ctypes.addressof(params))
        if self._ring_fd < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        entries, completions, _, _, _, features, *offsets = _PARAMS.unpack(params.raw)
        if features & _NEEDED != _NEEDED:
            os.close(self._ring_fd)
            raise OSError("this kernel's io_uring is too old: Linux 5.17 has what is needed")
        # struct io_sqring_offsets and io_cqring_offsets: where in the ring is what, in bytes.
        submission, completion = offsets[4:14], offsets[14:24]
        self._tail, self._order = submission[1] // 4, submission[6] // 4
        self._seen, self._done, self._completed = completion[0] // 4, completion[1] // 4, completion[5]
        self._entries, self._completions = entries, completions
        size = max(submission[6] + 4 * entries, self._completed + _CQE.size * completions)
        self._ring = mmap.mmap(self._ring_fd, size)
        self._words = memoryview(self._ring).cast("I")
        self._frame = mmap.mmap(-1, LONGEST)
        self._fds, self._lengths = self._prepared(mmap.mmap(self._ring_fd, entries * _SQE.size, offset=_SQES_AT))
        self._numbers = array("I", range(entries))
        self._size = 0

    def _prepared(self, memory: mmap.mmap) -> tuple[memoryview, memoryview]:
        """Write down all of each send but the socket and the length of the frame; where those two belong."""
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._frame))
        for number in range(self._entries):
            entry = _SEND, _SILENT, 0, -1, 0, address, 0, _FLAGS, number
            _SQE.pack_into(memory, number * _SQE.size, *entry)
        words = memoryview(memory).cast("i")
        return words[_FD::_WORDS], words[_LENGTH::_WORDS]

    def broadcast(self, frame: bytes, sinks: Sequence[Sink]) -> None:
        """As `realtime.pubsub.fanout.broadcast`; where something waits, it is written later than to the others."""
        size = len(frame)
        if len(sinks) < FEW or size > LONGEST:
            broadcast(frame, sinks)
            return
        self._frame[:size] = frame
        if size != self._size:
            self._size = size
            self._lengths[:] = array("i", [size]) * self._entries
        for start in range(0, len(sinks), self._entries):
            self._broadcast(frame, sinks[start : start + self._entries])

    def _broadcast(self, frame: bytes, sinks: Sequence[Sink]) -> None:
        fds = array("i", [sink.fd for sink in sinks])
        waiting: list[Sink] = []
        if min(fds) < 0:
            waiting = [sink for sink in sinks if sink.fd < 0]
            sinks = [sink for sink in sinks if sink.fd >= 0]
            fds = array("i", [sink.fd for sink in sinks])
        # Only when the kernel has sent to all: `queue_remainder` may close sockets, and open others.
        for number, taken in self._send(fds):
            sinks[number].queue_remainder(frame, taken)
        broadcast(frame, waiting)

    def _send(self, fds: array[int]) -> list[tuple[int, int]]:
        """Send the frame to these sockets; the places of those that did not take all of it, and how much they took."""
        words, order, count = self._words, self._order, len(fds)
        self._fds[:count] = fds
        # The first entries are handed in, in order, at whatever place of the ring it is by now.
        tail = words[self._tail]
        place = tail % self._entries
        here = min(count, self._entries - place)
        words[order + place : order + place + here] = self._numbers[:here]
        words[order : order + count - here] = self._numbers[here:count]
        words[self._tail] = (tail + count) & _WORD
        sent = max(_call(_ENTER, self._ring_fd, count), 0)
        refused = []
        if sent != count:  # out of memory, say: the others are taken back
            words[self._tail] = (tail + sent) & _WORD
            refused = [(number, 0) for number in range(sent, count)]
        seen, done = words[self._seen], words[self._done]
        while seen != done:
            at = self._completed + seen % self._completions * _CQE.size
            number, result, _ = _CQE.unpack_from(self._ring, at)
            refused.append((number, max(result, 0)))
            seen = (seen + 1) & _WORD
        words[self._seen] = seen
        return refused


def _call(number: int, *arguments: int) -> int:
    """A system call; -1 and errno for one that failed."""
    result: int = _libc.syscall(number, *arguments, *(0,) * (6 - len(arguments)))
    return result
