"""Periodic tasks without timers of their own: a loop that has woken up for another reason runs the due ones.

The cost of an idle process is the number of its wake-ups: about a fifth of a millisecond each, however little is done.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from twisted.logger import Logger


class _PeriodicTask:
    __slots__ = ("due", "function", "interval", "is_needed")

    def __init__(self, interval: float, function: Callable[[], object], is_needed: Callable[[], object]) -> None:
        self.interval = interval
        self.function = function
        self.is_needed = is_needed
        self.due = -math.inf


class PeriodicTasks:
    """Functions and their intervals; any caller with the time runs the due ones."""

    def __init__(self, log: Logger) -> None:
        """log: for the failures of tasks; a task that raises stays scheduled."""
        self._log = log
        self._tasks: list[_PeriodicTask] = []

    def add(
        self, interval: float, function: Callable[[], object], is_needed: Callable[[], object] = lambda: True
    ) -> None:
        """Have `function` called every `interval` seconds, or at the first `run_due` after that.

        The first `run_due` begins the first interval. is_needed: whether there is anything to do. A task that is not
        needed has no due time; its interval begins anew when it is needed again.
        """
        self._tasks.append(_PeriodicTask(interval, function, is_needed))

    def next_due(self) -> float:
        """The time at which the next task is due; infinity if no task is needed."""
        return min((task.due for task in self._tasks if task.is_needed()), default=math.inf)

    def run_due(self, now: float) -> None:
        """Call the due tasks. now: seconds of a monotonic clock."""
        for task in self._tasks:
            if not task.is_needed():
                task.due = -math.inf
                continue
            late = now - task.due
            if late < 0:
                continue
            # A call that is a little late does not delay the next one; missed calls are not made up for.
            task.due = now + task.interval - (late if late < task.interval else 0.0)
            if late == math.inf:
                continue
            try:
                task.function()
            except Exception:
                name = getattr(task.function, "__qualname__", repr(task.function))
                self._log.failure(
                    "periodic task {name} (every {interval:g} s) raised; it runs again in {interval:g} s",
                    name=name,
                    interval=task.interval,
                )
