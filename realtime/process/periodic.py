"""Work that is due every so often, and has no timer of its own: it is done by a loop that has woken up anyway.

An idle process costs what its wake-ups cost, whatever is done in them: about a fifth of a millisecond each.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from twisted.logger import Logger


class _PeriodicTask:
    __slots__ = ("due", "function", "seconds", "wanted")

    def __init__(self, seconds: float, function: Callable[[], object], wanted: Callable[[], object]) -> None:
        self.seconds = seconds
        self.function = function
        self.wanted = wanted
        self.due = -math.inf


class PeriodicTasks:
    """Functions, and how often each is called; by whoever turns up with the time."""

    def __init__(self, log: Logger) -> None:
        """log: is told of functions that raise, which are called again like the others."""
        self._log = log
        self._all: list[_PeriodicTask] = []

    def add(self, seconds: float, function: Callable[[], object], wanted: Callable[[], object] = lambda: True) -> None:
        """Have it called every `seconds`, or at the next `do` after that. The next one begins the first interval.

        wanted: whether there is anything to do. What is not wanted is not waited for, and begins anew when it is.
        """
        self._all.append(_PeriodicTask(seconds, function, wanted))

    def due(self) -> float:
        """When there is something to do; infinite for never."""
        return min((chore.due for chore in self._all if chore.wanted()), default=math.inf)

    def do(self, now: float) -> None:
        """Call what is due. now: seconds of a clock that never goes back."""
        for chore in self._all:
            if not chore.wanted():
                chore.due = -math.inf
                continue
            late = now - chore.due
            if late < 0:
                continue
            # What is a little late does not make the next one later; what was missed is not made up for.
            chore.due = now + chore.seconds - (late if late < chore.seconds else 0.0)
            if late == math.inf:
                continue
            try:
                chore.function()
            except Exception:
                self._log.failure("what is done every {seconds:g} s failed", seconds=chore.seconds)
