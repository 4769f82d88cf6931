"""Where a plain function with run="auto" runs: on the loop while it is quick, in a thread when it is not.

On the loop a call costs no thread, and stalls every client of the worker for as long as it takes. So each call is
timed. Three that took `loop.lagging` or longer within a minute, and the function moves to the threads; when none has
been that slow there for a minute, it is tried on the loop again. `Placement` decides, without I/O and with times as
arguments; `PlacementTracker` carries it out.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

from twisted.logger import Logger

from realtime.app import Handler
from realtime.metrics import Metrics

Result = TypeVar("Result")

# So many slow calls, within so many seconds.
BLAMES = 3
WITHIN = 60.0
# Seconds without a slow call after which a function goes back to the loop.
CALM = 60.0


class Placement:
    """The place of one function, "loop" or "thread"; it begins on the loop."""

    def __init__(self, slow: float) -> None:
        """slow: seconds of a call from which it counts; 0: none ever does."""
        self.where = "loop"
        self._slow = slow
        self._blames: deque[float] = deque(maxlen=BLAMES)
        self._stormy = 0.0

    def took(self, seconds: float, where: str, now: float) -> bool:
        """Note a call that ended at `now`. where: it ran. Returns whether the function has just moved."""
        slow = 0 < self._slow <= seconds
        if where != self.where:
            return False  # it began before the function moved, and says nothing about the new place
        if where == "loop":
            return slow and self._blame(now)
        if slow:
            self._stormy = now
        elif now - self._stormy >= CALM:
            self.where = "loop"
            return True
        return False

    def _blame(self, now: float) -> bool:
        self._blames.append(now)
        if len(self._blames) < BLAMES or now - self._blames[0] > WITHIN:
            return False
        self._blames.clear()
        self.where, self._stormy = "thread", now
        return True


class PlacementTracker:
    """Times the calls of one handler with run="auto", and tells the log and the metrics where it moves."""

    def __init__(self, handler: Handler, slow: float, reactor: Any, metrics: Metrics, log: Logger) -> None:
        """slow: see `Placement`. reactor: IReactorTime and IReactorFromThreads."""
        self._handler = handler
        self._auto = Placement(slow)
        self._reactor = reactor
        self._log = log
        self._counters = {
            place: metrics.counter(
                "realtime_handler_placement_changes",
                'Moves of handlers with run="auto".',
                handler=handler.name,
                to=place,
            )
            for place in ("loop", "thread")
        }

    @property
    def where(self) -> str:
        """Where the next call is to run: "loop" or "thread"."""
        return self._auto.where

    def timed(self, where: str, function: Callable[..., Result], *args: Any) -> Result:
        """Call `function` here, which is `where` says. The time that it waits for a thread does not count."""
        began = time.perf_counter()
        try:
            return function(*args)
        finally:
            took = time.perf_counter() - began
            if where == "loop":
                self._note(took, where)
            else:
                self._reactor.callFromThread(self._note, took, where)

    def _note(self, took: float, where: str) -> None:
        if not self._auto.took(took, where, self._reactor.seconds()):
            return
        self._counters[self.where].value += 1
        if self.where == "thread":
            says = "{handler} at {place} blocks the loop, {took:.0f} ms this time: it runs in threads from now on"
        else:
            says = "{handler} at {place} has been quick for a while: it runs on the loop again"
        self._log.warn(says, handler=self._handler.name, place=self._handler.place, took=took * 1000)
