"""The shared page of one process's vital signs: layout, write, consistent read.

The process writes it (`realtime.process.heartbeat`); the supervisor reads it whenever it likes, also while that
process's loop is blocked, since no message passes. The page is a memfd, mapped by both and sealed: neither side can
shrink it under the other (a read past its end would be a SIGBUS) or grow it.

Native byte order, both ends being the same machine. Each part is written in its own way:

    0    the reading: a sequence number, then the body, at every beat. The writer makes the number odd, writes, and
         makes it even again (a seqlock with one writer); a reader that met an odd number, or two different ones
         before and after, has a torn copy and tries again.
    256  busy_since, at every turn: one aligned machine word, which is never torn.
    264  the latest long turn, when it is over: its beginning and its end. The beginning is 0 meanwhile.
    280  the latest nod: the beat of a loop that idles and has no news, one word.
    320  relief, the only part that the supervisor writes: one word.
    384  the handler that runs: a serial number, names, the serial number once more (0 when it has returned). Written
         upwards and read downwards, so that a reader sees two different numbers if the writer was at it.

Parts that are written by different hands, or at different rates, are in cache lines of their own.
"""

from __future__ import annotations

import fcntl
import math
import mmap
import os
import struct
from enum import IntEnum

from msgspec import Struct

_SIZE = 4096
_SEQUENCE = struct.Struct("=Q")
_BODY = struct.Struct("=qdqqqdqqqqqq")  # the fields of Vitals in order, without busy_since
_WORD = 8
_BUSY_SINCE = 256 // _WORD
_BLOCK_SINCE, _BLOCK_UNTIL = _BUSY_SINCE + 1, _BUSY_SINCE + 2
_NOD = _BUSY_SINCE + 3
_BEAT, _LAG = 1, 2  # the first two words of the body
_RELIEF = 320 // _WORD
_NAME_BYTES = 64
_MARK_AT = 384
_MARK = struct.Struct(f"=q{_NAME_BYTES}s{_NAME_BYTES}sq")
_NAMES = struct.Struct(f"={_NAME_BYTES}s{_NAME_BYTES}s")
_MARK_OPEN = _MARK_AT // _WORD
_MARK_CLOSE = (_MARK_AT + _WORD + _NAMES.size) // _WORD
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL

QUIET = 0.002
"""Seconds: a beat that is no later than this is no news."""

# A writer holds the number odd for about a microsecond: more tries than this mean that it was stopped right there.
_TRIES = 3


class ProcessState(IntEnum):
    """What a process says of itself. ENDED: its loop has stopped, and the process is about to exit."""

    STARTING = 1
    READY = 2
    DRAINING = 3
    ENDED = 4


class Vitals(Struct, frozen=True):
    """One reading. Times are CLOCK_MONOTONIC nanoseconds.

    beat: when the loop last served its timer. lag: seconds by which that timer was late; of a loop that idles, the
    latest one that was later than QUIET. connections, subscriptions: held. utilization: share of the last second or so
    that the loop did not idle in its selector, 0 to 1. turns: of the loop since it began. callbacks: that were ready at
    the start of those turns, together. queued_bytes: that wait for slow sockets. threads_busy, threads_waiting: handler
    threads at work, calls that wait for one. rss: resident bytes.
    busy_since: when the loop's selector returned last, 0 while the loop idles in it; never torn, and never late.
    block_since, block_until: the latest turn that took long, a `busy_since` and the end; 0 when there was none yet.
    """

    beat: int
    lag: float
    connections: int
    subscriptions: int
    state: ProcessState
    utilization: float = 0.0
    turns: int = 0
    callbacks: int = 0
    queued_bytes: int = 0
    threads_busy: int = 0
    threads_waiting: int = 0
    rss: int = 0
    busy_since: int = 0
    block_since: int = 0
    block_until: int = 0


class RunningHandler(Struct, frozen=True):
    """The handler that runs on the loop. subject: the channel or method that it is called for."""

    handler: str
    subject: str


class VitalsPage:
    """One process's page. Exactly one process writes it (but for `relieve`); any number read it."""

    def __init__(self, fd: int) -> None:
        """Map the memfd `fd`, which stays the caller's. Raises ValueError or OSError when it is not such a page."""
        self.fd = fd
        self._memory = mmap.mmap(fd, _SIZE)
        self._words = memoryview(self._memory).cast("q")
        self._numbers = memoryview(self._memory).cast("d")
        self._sequence = _SEQUENCE.unpack_from(self._memory)[0]
        self._serial = 0

    @classmethod
    def create(cls) -> VitalsPage:
        """A new page, empty and sealed. Its `fd` is closed by `close`. Raises OSError without memfd or descriptors."""
        fd = os.memfd_create("realtime-vitals", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, _SIZE)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            return cls(fd)
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def open(cls, fd: int) -> VitalsPage:
        """Map an inherited page; `fd` is now the page's own, closed by `close`."""
        return cls(fd)

    # The process's side. Its loop thread only.

    def write(self, vitals: Vitals) -> None:
        """Publish a reading, all but its last three fields. About three microseconds."""
        # A predecessor that was killed in mid-write left the number odd: the next odd number begins a write anyway.
        odd = (self._sequence + 1) | 1
        _SEQUENCE.pack_into(self._memory, 0, odd)
        _BODY.pack_into(
            self._memory,
            _SEQUENCE.size,
            vitals.beat,
            vitals.lag,
            vitals.connections,
            vitals.subscriptions,
            vitals.state,
            vitals.utilization,
            vitals.turns,
            vitals.callbacks,
            vitals.queued_bytes,
            vitals.threads_busy,
            vitals.threads_waiting,
            vitals.rss,
        )
        self._sequence = odd + 1
        _SEQUENCE.pack_into(self._memory, 0, self._sequence)

    def be_busy(self, since: int) -> None:
        """The loop begins a turn, or idles from now on (0). Twice a turn, so it must cost next to nothing."""
        self._words[_BUSY_SINCE] = since

    def nod(self, now: int) -> None:
        """A beat, while all but the time is as in the latest reading."""
        self._words[_NOD] = now

    def note_block(self, since: int, until: int) -> None:
        """A turn that took long is over."""
        self._words[_BLOCK_SINCE] = 0
        self._words[_BLOCK_UNTIL] = until
        self._words[_BLOCK_SINCE] = since

    def mark(self, handler: bytes, subject: bytes) -> None:
        """A handler begins to run on the loop. Names are UTF-8; the page keeps the first 64 bytes."""
        self._serial += 1
        _MARK.pack_into(self._memory, _MARK_AT, self._serial, handler, subject, self._serial)

    def unmark(self) -> None:
        """No handler runs."""
        self._words[_MARK_CLOSE] = 0

    def relieved(self) -> bool:
        """Whether another worker can take new clients in place of this one."""
        return self._words[_RELIEF] != 0

    # The supervisor's side.

    def read(self) -> Vitals | None:
        """The latest reading; None before the first, when every try was torn, and for values that can't be true."""
        for _ in range(_TRIES):
            before = _SEQUENCE.unpack_from(self._memory)[0]
            body = _BODY.unpack_from(self._memory, _SEQUENCE.size)
            if before % 2 == 0 and _SEQUENCE.unpack_from(self._memory)[0] == before:
                beat, *rest = body
                beat = max(beat, self._words[_NOD])
                return _sensible(beat, *rest, self._words[_BUSY_SINCE], *self._block()) if before else None
        return None

    def glance(self) -> tuple[int, float, int]:
        """The latest `beat`, `lag` and `busy_since`, each for itself, whatever was written. Cheaper than `read`."""
        words = self._words
        return max(words[_BEAT], words[_NOD]), self._numbers[_LAG], words[_BUSY_SINCE]

    def _block(self) -> tuple[int, int]:
        since, until = self._words[_BLOCK_SINCE], self._words[_BLOCK_UNTIL]
        return (since, until) if since == self._words[_BLOCK_SINCE] and until >= since > 0 else (0, 0)

    def running(self) -> RunningHandler | None:
        """The handler that runs on the loop now; None when there is none, or it just changes."""
        serial = self._words[_MARK_CLOSE]
        handler, subject = _NAMES.unpack_from(self._memory, _MARK_AT + _WORD)
        if serial == 0 or self._words[_MARK_OPEN] != serial:
            return None
        return RunningHandler(_text(handler), _text(subject))

    def relieve(self, possible: bool) -> None:
        """Say whether another worker can take new clients in place of this one."""
        self._words[_RELIEF] = int(possible)

    def close(self) -> None:
        """Unmap the page and close its descriptor. The other process's mapping stays."""
        self._words.release()
        self._numbers.release()
        self._memory.close()
        os.close(self.fd)


def _sensible(
    beat: int, lag: float, connections: int, subscriptions: int, state: int, utilization: float, *counts: int
) -> Vitals | None:
    if beat <= 0 or not math.isfinite(lag) or not 0.0 <= utilization <= 1.0:
        return None
    if min(lag, connections, subscriptions, *counts) < 0:
        return None
    try:
        return Vitals(beat, lag, connections, subscriptions, ProcessState(state), utilization, *counts)
    except ValueError:
        return None


def _text(name: bytes) -> str:
    # A name that was cut in the middle of a character, or is nonsense, shows that instead of failing.
    return name.rstrip(b"\0").decode("utf-8", "replace")
