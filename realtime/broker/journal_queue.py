"""The queue between the broker's loop and the thread that writes its journal: a ring of bytes in shared memory.

The ring is a file of /dev/shm, which outlives the process but not the machine. What the loop has queued is so kept when
the broker is killed, without a system call for each publication; the next broker reads it. Its name is random, and the
journal has it. Without /dev/shm the ring is the process's own memory, and a killed broker leaves no queue.

Positions count the bytes since the journal began: the *tail* is where the loop writes, the *head* is what the journal
has got.
"""

from __future__ import annotations

import mmap
import os
import stat
import struct
from contextlib import suppress
from pathlib import Path

DIRECTORY = Path("/dev/shm")
PREFIX = "realtime-journal-"

# Native format: an aligned 64-bit field is written at once, so that a killed process leaves the old or the new value.
_HEADER = struct.Struct("@16sQQQdQ")  # token, capacity, head, tail, shift, whether the journal is incomplete
_pack_position = struct.Struct("@Q").pack_into
_pack_time = struct.Struct("@d").pack_into
_HEAD_AT, _TAIL_AT, _SHIFT_AT, _INCOMPLETE_AT = 24, 32, 40, 48
_START = 64


class JournalQueue:
    """The ring. One thread appends, another one reads and frees.

    path: of the file, "" without one. shift: from the times in its records to Unix times. is_incomplete: the journal
    lacks changes, so the queue can't continue it.
    """

    def __init__(self, memory: mmap.mmap, path: str) -> None:
        self._memory = memory
        self.path = path
        fields: tuple[bytes, int, int, int, float, int] = _HEADER.unpack_from(memory)
        self.token, self.capacity, self.head, self.tail, self.shift = fields[:5]
        self.is_incomplete = bool(fields[5])

    @classmethod
    def create(cls, capacity: int, token: bytes, position: int, shift: float) -> JournalQueue:
        """Make an empty ring at this position. token: 16 bytes that identify it. Raises OSError."""
        header = _HEADER.pack(token, capacity, position, position, shift, 0)
        path, size = DIRECTORY / f"{PREFIX}{token.hex()}", _START + capacity
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError:
            memory = mmap.mmap(-1, size)
            memory[: len(header)] = header
            return cls(memory, "")
        try:
            os.posix_fallocate(fd, 0, size)  # a write to memory that there is not would end the process
            memory = mmap.mmap(fd, size)
        except OSError:
            os.unlink(path)
            memory, path = mmap.mmap(-1, size), Path()
        finally:
            os.close(fd)
        memory[: len(header)] = header
        return cls(memory, str(path) if path.name else "")

    @classmethod
    def open(cls, path: str, token: bytes) -> JournalQueue | None:
        """Return the ring that an earlier process has left, None if there is none with this token."""
        with suppress(OSError, ValueError, struct.error):
            fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                status = os.fstat(fd)
                if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
                    return None
                queue = cls(mmap.mmap(fd, 0), path)
            finally:
                os.close(fd)
            is_whole = status.st_size == _START + queue.capacity and 0 <= queue.used <= queue.capacity
            return queue if queue.token == token and is_whole else None
        return None

    @property
    def used(self) -> int:
        """Bytes that the journal has not got."""
        return self.tail - self.head

    def append(self, data: bytes) -> bool:
        """Append bytes; False if there is no room for them."""
        size, tail, capacity = len(data), self.tail, self.capacity
        end = tail + size
        if end - self.head > capacity:
            return False
        at = tail % capacity
        room = capacity - at
        if size <= room:
            self._memory[_START + at : _START + at + size] = data
        else:
            self._memory[_START + at : _START + capacity] = data[:room]
            self._memory[_START : _START + size - room] = data[room:]
        self.tail = end
        _pack_position(self._memory, _TAIL_AT, end)
        return True

    def read(self, start: int, end: int) -> bytes:
        """Return the bytes between two positions, which are not freed yet."""
        at, size = start % self.capacity, end - start
        room = self.capacity - at
        if size <= room:
            return self._memory[_START + at : _START + at + size]
        return self._memory[_START + at : _START + self.capacity] + self._memory[_START : _START + size - room]

    def free(self, position: int, shift: float) -> None:
        """Free the bytes before a position. shift: see the class."""
        self.head, self.shift = position, shift
        _pack_position(self._memory, _HEAD_AT, position)
        _pack_time(self._memory, _SHIFT_AT, shift)

    def mark(self, is_incomplete: bool) -> None:
        """Note whether the journal lacks changes."""
        self.is_incomplete = is_incomplete
        _pack_position(self._memory, _INCOMPLETE_AT, is_incomplete)

    def remove(self) -> None:
        """Remove the file. Idempotent."""
        if self.path:
            with suppress(OSError):
                os.unlink(self.path)
