"""Reaps orphans where this process is PID 1, as in a container without an init process.

The kernel makes PID 1 the parent of every process whose own parent has exited, such as the programs that a handler of a
killed worker had started. Until PID 1 asks for their exit status, they stay in the process table.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection

INTERVAL = 1.0
"""Seconds between two calls of `reap`."""

_BATCH = 100


def is_needed() -> bool:
    """Return whether orphans become children of this process."""
    return os.getpid() == 1


def reap(own: Callable[[], Collection[int]]) -> int:
    """Reap the exited children that are not our own, and return their number.

    own: returns the pids of the processes that Twisted waits for.
    """
    for count in range(_BATCH):
        try:
            found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return count
        # The kernel shows one exited child at a time. One of ours hides the others until Twisted has reaped it.
        if found is None or found.si_pid in own():
            return count
        os.waitpid(found.si_pid, os.WNOHANG)
    return _BATCH
