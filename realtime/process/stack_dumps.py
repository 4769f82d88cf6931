"""Stacks of a process on request by a signal: both ends of the pipe that carries them.

Python writes the stack of the loop's thread from a signal handler of its own, which runs between two instructions of
the program. A thread that waits in C code runs no such handler: if no answer came within IN_C_AFTER, faulthandler
writes the stack, from its C signal handler. The process need not turn its loop then, nor hold the interpreter's lock,
nor run any Python. faulthandler comes second because it walks the stack wherever the signal finds the thread: in the
middle of a call from C code into Python the newest frame is not linked yet (CPython 3.11), and reading it can crash the
process. A thread that has run no Python for so long is in no such place.

Interrupted system calls are resumed: by the kernel (all handlers are set with SA_RESTART), or by Python if the
kernel never resumes them, such as sleeping (PEP 475).

From a process that is to live on, the supervisor requests only the stack of the loop's own thread. Other threads may be
running, and walking the stack of a running thread can crash the process. Their stacks are requested only when none of
them can run Python, or when the process is about to be killed.
"""

from __future__ import annotations

import faulthandler
import fcntl
import os
import re
import signal
from collections.abc import Callable
from contextlib import suppress
from types import CodeType, FrameType

from twisted.internet.defer import Deferred
from twisted.internet.error import ProcessExitedAlready
from twisted.internet.interfaces import IDelayedCall

# The signals. They do nothing to a process that has not called `register`: each of our processes ignores the first two,
# and SIGURG is ignored by default.
STACK = signal.SIGUSR1
STACK_IN_C = signal.SIGRTMIN + 5
STACKS = signal.SIGURG

IN_C_AFTER = 0.3
"""Seconds without an answer to STACK after which STACK_IN_C asks for the same."""

# As many as faulthandler writes.
_MAX_FRAMES = 100

_PIPE_BYTES = 262_144
_MAX_BYTES = 1_048_576
# Seconds without another byte after which a dump counts as complete without its usual end.
_END_AFTER = 0.1
# The outermost frame of a process: the zygote's, which has forked it, or that of `python -m …`. The frames below the
# zygote's only show how that was started. faulthandler cuts a stack after a hundred frames.
_OUTERMOST = rb'(/realtime/process/zygote\.py", line \d+ in serve\n|in _run_module_as_main\n)(?:  File .*\n?)*'
_END = re.compile(_OUTERMOST)
_WHOLE_ALL = re.compile(_OUTERMOST + rb"\Z")
_WHOLE = re.compile(rb"(?:" + _OUTERMOST + rb"|^  \.\.\.\n)\Z", re.MULTILINE)


def register(fd: int) -> None:
    """Have this process write its stacks to `fd`, the write end of a pipe, on each of the signals.

    Call it in the thread of the loop, the main thread.
    """
    os.set_blocking(fd, False)  # a full pipe cuts the dump, and must not block the process
    with suppress(OSError):  # the user's limit for pipes is reached: dumps of many threads may be cut
        fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)

    def write_stack(number: int, frame: FrameType | None) -> None:
        with suppress(OSError):
            os.write(fd, _describe(frame, write_stack.__code__))

    signal.signal(STACK, write_stack)
    signal.siginterrupt(STACK, False)
    faulthandler.register(STACK_IN_C, file=fd, all_threads=False, chain=False)
    faulthandler.register(STACKS, file=fd, all_threads=True, chain=False)


def _describe(frame: FrameType | None, handler: CodeType) -> bytes:
    """Return a stack, innermost frame first, in faulthandler's form.

    handler: of the signal; a second signal may interrupt it, and the program's own frames are those outside it.
    """
    head = "Stack (most recent call first):"
    lines = [head]
    while frame is not None and len(lines) <= _MAX_FRAMES:
        code = frame.f_code
        if code is handler:
            lines, frame = [head], frame.f_back
            continue
        lines.append(f'  File "{code.co_filename}", line {frame.f_lineno or "???"} in {code.co_name}')
        frame = frame.f_back
    if frame is not None:
        lines.append("  ...")
    return ("\n".join(lines) + "\n").encode("ascii", "backslashreplace")


class StackReader:
    """The read end: gives each dump to its waiters, and drops dumps without one."""

    def __init__(self, call_later: Callable[[float, Callable[[], None]], IDelayedCall]) -> None:
        """call_later: the reactor's `callLater`."""
        self._call_later = call_later
        self._text = b""
        self._waiting: dict[int, list[Deferred[str]]] = {STACK: [], STACKS: []}
        self._end_call: IDelayedCall | None = None

    def next(self, number: int) -> Deferred[str]:
        """Wait for the next dump of a kind. The text is faulthandler's. Fails when the process ends.

        number: STACK or STACKS; sending the signal is the caller's part.
        """
        waiter: Deferred[str] = Deferred(lambda waiter: self._waiting[number].remove(waiter))
        self._waiting[number].append(waiter)
        return waiter

    def feed(self, data: bytes) -> None:
        """Take bytes that were read from the pipe."""
        if not any(self._waiting.values()):
            self._text = b""
            return
        self._text = (self._text + data)[:_MAX_BYTES]
        self._cancel_end()
        if (_WHOLE_ALL if self._waiting[STACKS] else _WHOLE).search(self._text):
            self._complete()
        else:
            self._end_call = self._call_later(_END_AFTER, self._complete)

    def end(self) -> None:
        """Fail all waiters: the process has ended."""
        self._cancel_end()
        for waiters in self._waiting.values():
            while waiters:
                waiters.pop().errback(ProcessExitedAlready())

    def _cancel_end(self) -> None:
        if self._end_call is not None and self._end_call.active():
            self._end_call.cancel()
        self._end_call = None

    def _complete(self) -> None:
        text, self._text = _END.sub(rb"\1", self._text).decode("utf-8", "replace"), b""
        for number, head in ((STACK, "Stack ("), (STACKS, "Current thread")):
            if head in text:
                waiters, self._waiting[number] = self._waiting[number], []
                for waiter in waiters:
                    waiter.callback(text)
