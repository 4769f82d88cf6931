"""Orphans: processes whose parent has exited. This process adopts those of its descendants, and reaps them.

The kernel makes the nearest ancestor that asks for it the parent of an orphan (prctl(2), PR_SET_CHILD_SUBREAPER): of
each child that the zygote forks (`realtime.process.zygote`), and of the programs that a handler of a killed worker had
started. Until this process asks for their exit status, they stay in the process table.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Collection

INTERVAL = 1.0
"""Seconds between two calls of `reap`."""

_BATCH = 100
_PR_SET_CHILD_SUBREAPER = 36


def adopt_all() -> None:
    """Become the parent of all future orphans among the descendants of this process. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER) failed")


def reap(own: Callable[[], Collection[int]]) -> int:
    """Reap the exited children that are not our own, and return their number.

    own: returns the pids of the processes that other code waits for. The children in the process group of this process
    are other code's too: Twisted and `subprocess` start them so, and wait for them. Orphans are in groups of workers.
    """
    for count in range(_BATCH):
        try:
            found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return count
        # The kernel shows one exited child at a time. One of ours hides the others until it has been reaped.
        if found is None or found.si_pid in own() or os.getpgid(found.si_pid) == os.getpgrp():
            return count
        os.waitpid(found.si_pid, os.WNOHANG)
    return _BATCH
