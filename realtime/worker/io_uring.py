"""Sends one frame to many sockets in one system call: io_uring(7), by its kernel interface (linux/io_uring.h).

A fan-out repeats the same send(2) for each receiver. Here the sockets are listed in memory shared with the kernel, and
one call has the kernel send to all of them, in order; it reports only the sockets that did not take the whole frame.
That saves the transition into the kernel and back for each socket, and Python's part of it. Where io_uring is missing
or forbidden, as in many containers, constructing `IOURing` raises OSError, and the worker sends one by one.
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

# The most sends in one call; more sinks take several calls.
MAX_SENDS = 256
# The most bytes of a frame; a longer one is sent one by one.
MAX_FRAME = 64 * 1024
# The fewest sinks for which the ring is faster than sending one by one.
MIN_SINKS = 8

# io_uring_setup(2) and io_uring_enter(2); the numbers are the same on all architectures.
_SETUP, _ENTER = 425, 426
_SQES_AT = 0x10000000  # IORING_OFF_SQES
# IORING_FEAT_SINGLE_MMAP, and IORING_FEAT_CQE_SKIP of Linux 5.17.
_REQUIRED_FEATURES = 1 << 0 | 1 << 11
_SEND = 26  # IORING_OP_SEND
_SKIP_SUCCESS = 1 << 6  # IOSQE_CQE_SKIP_SUCCESS: a send that succeeds makes no completion entry
# With MSG_WAITALL a partial send is no success, so it is reported; MSG_DONTWAIT keeps the kernel from waiting.
_FLAGS = 0x4000 | 0x100 | 0x40  # MSG_NOSIGNAL, MSG_WAITALL, MSG_DONTWAIT
_PARAMS = struct.Struct("=30I")  # struct io_uring_params
_SQE = struct.Struct("=BBHiQQIIQ24x")  # struct io_uring_sqe
_CQE = struct.Struct("=QiI")  # struct io_uring_cqe
# The indices of the socket and the length among the 32-bit words of a submission entry, and the number of words.
_FD, _LENGTH, _WORDS = 1, 6, 16
_WORD_MASK = 2**32 - 1

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.argtypes = [ctypes.c_long] * 7
_libc.syscall.restype = ctypes.c_long


class IOURing:
    """An io_uring that sends frames. Loop thread only."""

    def __init__(self) -> None:
        """Raises OSError where the kernel has no io_uring, or forbids it to this process."""
        if not sys.platform.startswith("linux"):
            raise OSError("only Linux has io_uring")
        params = ctypes.create_string_buffer(_PARAMS.size)
        self._ring_fd = _call(_SETUP, MAX_SENDS, ctypes.addressof(params))
        if self._ring_fd < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        entries, completions, _, _, _, features, *offsets = _PARAMS.unpack(params.raw)
        if features & _REQUIRED_FEATURES != _REQUIRED_FEATURES:
            os.close(self._ring_fd)
            raise OSError("the io_uring of this kernel is too old: Linux 5.17 or later is needed")
        # struct io_sqring_offsets and io_cqring_offsets: offsets in the ring, in bytes; those of 32-bit words in words.
        submission, completion = offsets[4:14], offsets[14:24]
        self._submission_tail, self._submission_array = submission[1] // 4, submission[6] // 4
        self._completion_head, self._completion_tail = completion[0] // 4, completion[1] // 4
        self._completion_entries = completion[5]
        self._entries, self._completions = entries, completions
        size = max(submission[6] + 4 * entries, self._completion_entries + _CQE.size * completions)
        self._ring = mmap.mmap(self._ring_fd, size)
        self._words = memoryview(self._ring).cast("I")
        self._frame = mmap.mmap(-1, MAX_FRAME)
        self._fds, self._lengths = self._prepare_entries(mmap.mmap(self._ring_fd, entries * _SQE.size, offset=_SQES_AT))
        self._indices = array("I", range(entries))
        self._frame_size = 0  # the length in all entries

    def _prepare_entries(self, memory: mmap.mmap) -> tuple[memoryview, memoryview]:
        """Fill in all submission entries; return views of the two fields that change: the sockets and the lengths."""
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._frame))
        for index in range(self._entries):
            entry = _SEND, _SKIP_SUCCESS, 0, -1, 0, address, 0, _FLAGS, index
            _SQE.pack_into(memory, index * _SQE.size, *entry)
        words = memoryview(memory).cast("i")
        return words[_FD::_WORDS], words[_LENGTH::_WORDS]

    def broadcast(self, frame: bytes, sinks: Sequence[Sink]) -> None:
        """Send a frame as `realtime.pubsub.fanout.broadcast` does.

        Sinks with queued frames (`fd` is -1) get it after all others.
        """
        size = len(frame)
        if len(sinks) < MIN_SINKS or size > MAX_FRAME:
            broadcast(frame, sinks)
            return
        self._frame[:size] = frame
        if size != self._frame_size:
            self._frame_size = size
            self._lengths[:] = array("i", [size]) * self._entries
        for start in range(0, len(sinks), self._entries):
            self._broadcast(frame, sinks[start : start + self._entries])

    def _broadcast(self, frame: bytes, sinks: Sequence[Sink]) -> None:
        fds = array("i", [sink.fd for sink in sinks])
        queueing: list[Sink] = []
        if min(fds) < 0:
            queueing = [sink for sink in sinks if sink.fd < 0]
            sinks = [sink for sink in sinks if sink.fd >= 0]
            fds = array("i", [sink.fd for sink in sinks])
        # After the kernel has sent to all: `queue_remainder` may close sockets, and their numbers may be used again.
        for index, sent in self._send(fds):
            sinks[index].queue_remainder(frame, sent)
        broadcast(frame, queueing)

    def _send(self, fds: array[int]) -> list[tuple[int, int]]:
        """Send the frame to these sockets; return (index, sent bytes) of each that did not take the whole frame."""
        words, array_start, count = self._words, self._submission_array, len(fds)
        self._fds[:count] = fds
        # The first `count` entries are submitted, in order. The submission array is circular: its current position may
        # require two parts.
        tail = words[self._submission_tail]
        start = tail % self._entries
        first_part = min(count, self._entries - start)
        words[array_start + start : array_start + start + first_part] = self._indices[:first_part]
        words[array_start : array_start + count - first_part] = self._indices[first_part:count]
        words[self._submission_tail] = (tail + count) & _WORD_MASK
        submitted = max(_call(_ENTER, self._ring_fd, count), 0)
        incomplete = []
        if submitted != count:  # the kernel is out of memory, for example: withdraw the others
            words[self._submission_tail] = (tail + submitted) & _WORD_MASK
            incomplete = [(index, 0) for index in range(submitted, count)]
        head, end = words[self._completion_head], words[self._completion_tail]
        while head != end:
            offset = self._completion_entries + head % self._completions * _CQE.size
            index, result, _ = _CQE.unpack_from(self._ring, offset)
            incomplete.append((index, max(result, 0)))
            head = (head + 1) & _WORD_MASK
        words[self._completion_head] = head
        return incomplete


def _call(number: int, *arguments: int) -> int:
    """Make a system call; returns -1 and sets errno if it fails."""
    result: int = _libc.syscall(number, *arguments, *(0,) * (6 - len(arguments)))
    return result
