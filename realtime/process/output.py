"""Standard output and error that never block the process: `install` replaces `sys.stdout` and `sys.stderr`.

A pipe without a reader and a terminal after Ctrl-S accept no more bytes. A plain write then waits for ever, and so does
the loop. Here a write takes what the kernel accepts at once. The rest waits in a bounded queue, which a thread empties;
text that does not fit is dropped and counted. O_NONBLOCK on the descriptor itself would reach every process that shares
it, so a pipe or a terminal is opened anew, and a socket gets MSG_DONTWAIT.
"""

from __future__ import annotations

import atexit
import io
import os
import select
import socket
import stat
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from typing import Any

from realtime.metrics import Sample

# Seconds at the exit of the process for the queued text to be written.
EXIT_TIMEOUT = 1.0
# Seconds between two checks by the thread of a descriptor that accepts nothing.
_POLL_INTERVAL = 1.0

_outputs: list[Output] = []


class Output(io.RawIOBase):
    """A raw stream to a descriptor. `write` accepts all bytes at once, and may be called in any thread.

    dropped: number of writes that did not fit in the queue.
    """

    def __init__(self, fd: int, max_queued_bytes: int) -> None:
        self.dropped = 0
        self._fd = fd
        self._max_queued_bytes = max_queued_bytes
        self._queue: deque[bytes] = deque()
        self._queued_bytes = 0
        self._unreported = 0
        self._lock = threading.RLock()  # a signal handler may write during a write
        self._writer: threading.Thread | None = None
        # At the first write: twistd replaces the descriptors when it makes a daemon.
        self._send: Callable[[bytes], int] | None = None
        self._undo = ExitStack()

    def close(self) -> None:
        """Close our own copy of the descriptor, if any; the descriptor itself stays open."""
        self._undo.close()
        super().close()

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._fd

    def isatty(self) -> bool:
        return os.isatty(self._fd)

    def write(self, data: object) -> int:
        """Write, queue or drop all of `data`."""
        content = bytes(data)  # type: ignore[call-overload]
        with self._lock:
            rest = content if self._queue else self._send_now(content)
            if not rest:
                return len(content)
            if self._queued_bytes + len(rest) > self._max_queued_bytes and len(rest) == len(content):
                self.dropped += 1
                self._unreported += 1
            else:
                self._queue.append(rest)
                self._queued_bytes += len(rest)
            self._start_writer()
        return len(content)

    def drain(self, timeout: float) -> bool:
        """Wait at most `timeout` seconds for the queue to become empty. Returns whether it is."""
        deadline = time.monotonic() + timeout
        while self._queue and time.monotonic() < deadline:
            time.sleep(0.01)
        return not self._queue

    def forget_threads(self) -> None:
        """Go on in a fork: the thread and the queue are the parent's."""
        self._lock = threading.RLock()
        self._writer = None
        self._queue.clear()
        self._queued_bytes = 0

    def _send_now(self, data: bytes) -> bytes:
        """Send what the kernel accepts without a wait. Returns the rest; b"" once the reader is gone."""
        try:
            if self._send is None:
                self._send = _sender(self._fd, self._undo)
            return data[self._send(data) :]
        except BlockingIOError:
            return data
        except OSError:
            return b""  # the descriptor or its reader is closed, or the disk is full: no report has a place

    def _start_writer(self) -> None:
        if self._writer is None:
            self._writer = threading.Thread(target=self._write_queued, name="output", daemon=True)
            try:
                self._writer.start()
            except RuntimeError:  # no thread can be started now; the next write tries again
                self._writer = None

    def _write_queued(self) -> None:
        """Write the queue until it is empty. Runs in the thread."""
        while True:
            _wait_writable(self._fd)
            with self._lock:
                while self._queue:
                    first = self._queue[0]
                    rest = self._send_now(first)
                    self._queued_bytes -= len(first) - len(rest)
                    if rest:
                        self._queue[0] = rest
                        break
                    self._queue.popleft()
                if self._queue:
                    continue
                if not self._unreported:
                    self._writer = None
                    return
                report = f"[log] {self._unreported} lines were dropped: the reader of this output did not keep up\n"
                self._queue.append(report.encode())
                self._queued_bytes += len(self._queue[0])
                self._unreported = 0


def install(max_queued_bytes: int) -> None:
    """Replace `sys.stdout` and `sys.stderr`, where they are the process's own."""
    for name, fd in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is getattr(sys, f"__{name}__") and getattr(sys, name) is not None:
            output = Output(fd, max_queued_bytes)
            _outputs.append(output)
            raw: Any = output  # TextIOWrapper needs no more of it than its methods
            stream = io.TextIOWrapper(raw, "utf-8", "backslashreplace", newline="\n", line_buffering=True)
            with suppress(OSError):
                getattr(sys, name).flush()
            setattr(sys, name, stream)
    atexit.register(drain)


def forget_threads() -> None:
    """Let a fork of this process write to the installed outputs."""
    for output in _outputs:
        output.forget_threads()


def drain() -> None:
    """Give the queued text a last chance before the process exits."""
    for output in _outputs:
        output.drain(EXIT_TIMEOUT)


def samples() -> Iterator[Sample]:
    """Return the metrics of the installed outputs."""
    help = "Lines of output that were dropped because its reader did not keep up (log.max_queued_bytes)."
    yield Sample("realtime_log_lines_dropped", "counter", help, [], float(sum(one.dropped for one in _outputs)))


def _sender(fd: int, undo: ExitStack) -> Callable[[bytes], int]:
    """Return a function that sends bytes and raises BlockingIOError where a write would wait.

    undo: closes what is opened here."""
    mode = os.fstat(fd).st_mode
    if stat.S_ISSOCK(mode):
        connection = undo.enter_context(socket.socket(fileno=os.dup(fd)))
        return lambda data: connection.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
    if stat.S_ISFIFO(mode) or stat.S_ISCHR(mode):
        flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        try:
            anew = os.open(f"/proc/self/fd/{fd}", flags)
        except OSError:  # another user's, after a change of the user, or no /proc
            return lambda data: _write_if_writable(fd, data)
        undo.callback(os.close, anew)
        return lambda data: os.write(anew, data)
    return lambda data: os.write(fd, data)  # a file, whose position other processes share


def _write_if_writable(fd: int, data: bytes) -> int:
    """Write as much as a pipe surely accepts. Of two processes that do so at a time, one may have to wait."""
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    if not poll.poll(0):
        raise BlockingIOError
    return os.write(fd, data[: select.PIPE_BUF])


def _wait_writable(fd: int) -> None:
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    began = time.monotonic()
    poll.poll(_POLL_INTERVAL * 1000)
    if time.monotonic() - began < 0.001:
        time.sleep(0.005)  # writable, but perhaps for less than a line
