"""The shared page of one process's vital signs: its layout, writing, and consistent reading.

The process writes the page (`realtime.process.heartbeat`). The supervisor reads it at any time, also while the
process's loop is blocked, because reading needs no message. The page is a sealed memfd that both map: neither side can
grow it, or shrink it under the other (reading past its end would raise SIGBUS).

Both ends run on one machine, so the byte order is native. Each part has its own way of writing:

    0    the reading, at every beat: a sequence number, then the body. The writer makes the number odd, writes the
         body, and makes the number even again (a seqlock with one writer). A reader that sees an odd number, or two
         different numbers before and after the body, has a torn copy and tries again.
    256  busy_since, at every turn of the loop: one aligned machine word, which can't be torn.
    264  the latest long turn, after it has ended: its beginning and its end. The beginning is 0 during the write.
    280  the latest idle beat, of a loop that idles and has nothing new to report: one word.
    288  when the latest relief began (`realtime.process.relief`): one word.
    320  substitute, the only part that the supervisor writes: one word.
    384  the latest call of a handler: a serial number, two names, its turn, the calls of the handler in this turn with
         the time of those before, the serial number again; then whether it still runs. Written upwards and read
         downwards, so a reader sees two different numbers if it met a write.

Parts with different writers, or with different rates of writing, have cache lines of their own.
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
_IDLE_BEAT = _BUSY_SINCE + 3
_RELIEF_SINCE = _BUSY_SINCE + 4
_BEAT, _LAG = 1, 2  # the first two words of the body
_SUBSTITUTE = 320 // _WORD
_NAME_BYTES = 64
_MARK_AT = 384
_MARK = struct.Struct(f"=q{_NAME_BYTES}s{_NAME_BYTES}sqqqqq")
_CALL = struct.Struct(f"={_NAME_BYTES}s{_NAME_BYTES}sqqq")
_MARK_OPEN = _MARK_AT // _WORD
_MARK_CLOSE = (_MARK_AT + _WORD + _CALL.size) // _WORD
_MARK_RUNS = _MARK_CLOSE + 1
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL

NEGLIGIBLE_LAG = 0.002
"""Seconds: a beat with at most this lag carries no news."""

# The number is odd for about a microsecond: after this many failed tries, the writer was stopped within a write.
_TRIES = 3


class ProcessState(IntEnum):
    """State of a process by its own account. ENDED: its loop has stopped, and the process is about to exit."""

    STARTING = 1
    READY = 2
    DRAINING = 3
    ENDED = 4


class Vitals(Struct, frozen=True):
    """One reading of a process's vital signs. Times are CLOCK_MONOTONIC nanoseconds.

    beat: when the loop last ran its beat timer. lag: seconds by which that timer was late; of an idle loop, the latest
    lag above NEGLIGIBLE_LAG. connections, subscriptions: held now. utilization: the share of about the last second in
    which the loop worked instead of idling in its selector, 0 to 1. turns: turns of the loop since its start.
    callbacks: callbacks ready at the start of those turns, in total. queued_bytes: bytes queued for slow sockets.
    threads_busy: handler threads at work. threads_waiting: calls queued for a thread. rss: resident memory in bytes.

    busy_since: when the loop's selector last returned, 0 while the loop idles in it; never torn, and never late.
    block_since, block_until: the latest long turn, from its `busy_since` to its end; 0 before the first.
    relief_since: when the latest relief began; 0 before the first.
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
    relief_since: int = 0


LAYOUT = f"{_BODY.format} {_MARK_AT} {_MARK.format} {_CALL.format} {Vitals.__struct_fields__}"
"""Of the page: processes of two versions share pages if it is the same in both."""


class RunningHandler(Struct, frozen=True):
    """The handler that runs on the loop. subject: the channel or method of the call."""

    handler: str
    subject: str


class LatestCalls(Struct, frozen=True):
    """The handler that was called last on the loop, and its calls in that turn.

    turn: `Vitals.busy_since` of the turn. calls: the last one counts. seconds: of the calls before the last one.
    """

    handler: str
    turn: int
    calls: int
    seconds: float


class VitalsPage:
    """The page of one process, which alone writes it but for `set_substitute`; any number of processes read it."""

    def __init__(self, fd: int) -> None:
        """Map the memfd `fd`. The caller keeps the descriptor if this raises ValueError or OSError: `fd` is no page."""
        self.fd = fd
        self._memory = mmap.mmap(fd, _SIZE)
        self._words = memoryview(self._memory).cast("q")
        self._numbers = memoryview(self._memory).cast("d")
        self._sequence = _SEQUENCE.unpack_from(self._memory)[0]
        self._serial = 0

    @classmethod
    def create(cls) -> VitalsPage:
        """Create an empty, sealed page. `close` closes its `fd`. Raises OSError without memfd or free descriptors."""
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
        """Map an inherited page. The page owns `fd` from now on, and `close` closes it."""
        return cls(fd)

    # The process's side, for its loop thread only.

    def write(self, vitals: Vitals) -> None:
        """Publish a reading, except for its last four fields. Takes about three microseconds."""
        # A predecessor that was killed during a write left an odd number: the next odd number begins a write anyway.
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

    def set_busy_since(self, since: int) -> None:
        """Note that the loop began a turn at `since`, or with 0 that it idles from now on.

        Called twice per turn, so it costs a single store.
        """
        self._words[_BUSY_SINCE] = since

    def idle_beat(self, now: int) -> None:
        """Publish a beat that changes only the time of the latest reading."""
        self._words[_IDLE_BEAT] = now

    def record_block(self, since: int, until: int) -> None:
        """Publish the beginning and the end of a long turn that has ended."""
        self._words[_BLOCK_SINCE] = 0
        self._words[_BLOCK_UNTIL] = until
        self._words[_BLOCK_SINCE] = since

    def mark(self, handler: bytes, subject: bytes, turn: int = 0, calls: int = 1, spent: int = 0) -> None:
        """Publish the handler that begins to run on the loop. Names are UTF-8; the page keeps their first 64 bytes.

        turn, calls: see `LatestCalls`. spent: nanoseconds of its earlier calls in this turn.
        """
        self._serial = serial = self._serial + 1
        _MARK.pack_into(self._memory, _MARK_AT, serial, handler, subject, turn, calls, spent, serial, 1)

    @property
    def calls(self) -> int:
        """The number of steps of handlers that this process has marked."""
        return self._serial

    def busy_since(self) -> int:
        """Return when the loop began its turn, 0 while it idles."""
        return self._words[_BUSY_SINCE]

    def note_relief(self, since: int) -> None:
        """Publish that a relief has begun. In the relief thread."""
        self._words[_RELIEF_SINCE] = since

    def unmark(self) -> None:
        """Note that no handler runs."""
        self._words[_MARK_RUNS] = 0

    def has_substitute(self) -> bool:
        """Return whether another worker can take new clients in place of this one."""
        return self._words[_SUBSTITUTE] != 0

    # The supervisor's side.

    def read(self) -> Vitals | None:
        """Return the latest reading; None before the first, when every try was torn, and for impossible values."""
        for _ in range(_TRIES):
            before = _SEQUENCE.unpack_from(self._memory)[0]
            body = _BODY.unpack_from(self._memory, _SEQUENCE.size)
            if before % 2 == 0 and _SEQUENCE.unpack_from(self._memory)[0] == before:
                beat, *rest = body
                beat = max(beat, self._words[_IDLE_BEAT])
                return _validated(beat, *rest, *self._turns()) if before else None
        return None

    def peek(self) -> tuple[int, float, int]:
        """Return the latest `beat`, `lag` and `busy_since`, each read on its own and unchecked. Cheaper than `read`."""
        words = self._words
        return max(words[_BEAT], words[_IDLE_BEAT]), self._numbers[_LAG], words[_BUSY_SINCE]

    def _turns(self) -> tuple[int, ...]:
        """Return `busy_since` and the fields after it."""
        return self._words[_BUSY_SINCE], *self._block(), max(self._words[_RELIEF_SINCE], 0)

    def _block(self) -> tuple[int, int]:
        since, until = self._words[_BLOCK_SINCE], self._words[_BLOCK_UNTIL]
        return (since, until) if since == self._words[_BLOCK_SINCE] and until >= since > 0 else (0, 0)

    def running(self) -> RunningHandler | None:
        """Return the handler that runs on the loop now; None without one, and while the process changes it."""
        if not self._words[_MARK_RUNS]:
            return None
        call = self._call()
        return RunningHandler(_text(call[0]), _text(call[1])) if call else None

    def latest_calls(self) -> LatestCalls | None:
        """Return the calls of the handler that ran last; None before the first, and while the process changes them."""
        call = self._call()
        if call is None:
            return None
        handler, _, turn, calls, spent = call
        return LatestCalls(_text(handler), turn, calls, spent / 1e9)

    def _call(self) -> tuple[bytes, bytes, int, int, int] | None:
        serial = self._words[_MARK_CLOSE]
        call: tuple[bytes, bytes, int, int, int] = _CALL.unpack_from(self._memory, _MARK_AT + _WORD)
        return call if serial and self._words[_MARK_OPEN] == serial else None

    def set_substitute(self, available: bool) -> None:
        """Publish whether another worker can take new clients in place of this one."""
        self._words[_SUBSTITUTE] = int(available)

    def close(self) -> None:
        """Unmap the page and close its descriptor. The other process's mapping stays."""
        self._words.release()
        self._numbers.release()
        self._memory.close()
        os.close(self.fd)


def _validated(
    beat: int, lag: float, connections: int, subscriptions: int, state: int, utilization: float, *counts: int
) -> Vitals | None:
    """Build a reading; None for values that no process writes: the page may hold anything."""
    if beat <= 0 or not math.isfinite(lag) or not 0.0 <= utilization <= 1.0:
        return None
    if min(lag, connections, subscriptions, *counts) < 0:
        return None
    try:
        return Vitals(beat, lag, connections, subscriptions, ProcessState(state), utilization, *counts)
    except ValueError:
        return None


def _text(name: bytes) -> str:
    # A name cut within a character, or invalid UTF-8, shows replacement characters instead of raising.
    return name.rstrip(b"\0").decode("utf-8", "replace")
