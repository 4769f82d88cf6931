"""A process's stacks, for whoever asks by a signal: both ends of the pipe that they come through.

faulthandler writes them from its C signal handler, so the process need not turn its loop, nor hold the interpreter's
lock, nor run any Python. Interrupted system calls are resumed: by the kernel (its handler is set with SA_RESTART), or
by Python for those that the kernel never resumes, such as sleeping (PEP 475).

Of a process that is to live on, only the loop's own thread is asked for: it is in the handler meanwhile, and so stands
still. Other threads may be running, and to walk the stack of a running thread can end in a crash; they are asked for
only when none of them can run Python, or when the process is given up.
"""

from __future__ import annotations

import faulthandler
import fcntl
import os
import re
import signal
from collections.abc import Callable
from contextlib import suppress

from twisted.internet.defer import Deferred
from twisted.internet.error import ProcessExitedAlready
from twisted.internet.interfaces import IDelayedCall

# The signals. Sent to a process that has not called `answer` yet, or no more, they do nothing: SIGUSR1 is ignored in
# each of our processes, SIGURG by default.
STACK = signal.SIGUSR1
STACKS = signal.SIGURG

_PIPE_BYTES = 262_144
_MAX_BYTES = 1_048_576
# Seconds without another byte after which a dump is complete that does not look it.
_QUIET = 0.1
# The outermost frame of every process of ours (`python -m …`); faulthandler cuts a stack after a hundred frames.
_WHOLE = re.compile(rb"(?:in _run_module_as_main|^  \.\.\.)\n\Z", re.MULTILINE)
_WHOLE_ALL = re.compile(rb"in _run_module_as_main\n\Z")


def answer(fd: int) -> None:
    """Have this process write its stacks to `fd`, the write end of a pipe, when it gets one of the signals."""
    os.set_blocking(fd, False)  # a dump that nobody reads is cut, and holds up nobody
    with suppress(OSError):  # the user's limit for pipes is reached: dumps of many threads may be cut
        fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    faulthandler.register(STACK, file=fd, all_threads=False, chain=False)
    faulthandler.register(STACKS, file=fd, all_threads=True, chain=False)


class Dumps:
    """The read end: gives what comes to those who wait for it. What nobody waits for is dropped."""

    def __init__(self, later: Callable[[float, Callable[[], None]], IDelayedCall]) -> None:
        """later: the reactor's `callLater`."""
        self._later = later
        self._text = b""
        self._waiting: dict[int, list[Deferred[str]]] = {STACK: [], STACKS: []}
        self._quiet: IDelayedCall | None = None

    def next(self, number: int) -> Deferred[str]:
        """The next dump of this kind, as faulthandler wrote it. Fails when the process ends."""
        waiter: Deferred[str] = Deferred(lambda waiter: self._waiting[number].remove(waiter))
        self._waiting[number].append(waiter)
        return waiter

    def take(self, data: bytes) -> None:
        """Some of it has come."""
        if not any(self._waiting.values()):
            self._text = b""
            return
        self._text = (self._text + data)[:_MAX_BYTES]
        self._stop_waiting_for_more()
        if (_WHOLE_ALL if self._waiting[STACKS] else _WHOLE).search(self._text):
            self._complete()
        else:
            self._quiet = self._later(_QUIET, self._complete)

    def end(self) -> None:
        """There will be no more."""
        self._stop_waiting_for_more()
        for waiters in self._waiting.values():
            while waiters:
                waiters.pop().errback(ProcessExitedAlready())

    def _stop_waiting_for_more(self) -> None:
        if self._quiet is not None and self._quiet.active():
            self._quiet.cancel()
        self._quiet = None

    def _complete(self) -> None:
        text, self._text = self._text.decode("utf-8", "replace"), b""
        for number, head in ((STACK, "Stack ("), (STACKS, "Current thread")):
            if head in text:
                waiters, self._waiting[number] = self._waiting[number], []
                for waiter in waiters:
                    waiter.callback(text)
