"""Decides where a plain function with run="auto" runs: on the loop while it is quick, in a thread while it is slow.

On the loop a call costs no thread, but it stalls every client of the worker for as long as it takes. Therefore each
call is timed. After three calls within a minute that took `loop.lagging` or longer, the function moves to the threads;
after a minute there without so slow a call, it is tried on the loop again. `Placement` decides, without I/O and with
times as arguments; `PlacementTracker` measures the calls, logs the moves and counts them.
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

# Slow calls after which a function leaves the loop, and the seconds within which they count.
SLOW_CALLS = 3
WINDOW = 60.0
# Seconds without a slow call after which a function returns to the loop.
QUIET_PERIOD = 60.0


class Placement:
    """The place of one function, "loop" or "thread"; it starts on the loop."""

    def __init__(self, slow: float) -> None:
        """slow: a call that takes this many seconds or more is slow; 0: no call is."""
        self.place = "loop"
        self._slow = slow
        self._slow_calls: deque[float] = deque(maxlen=SLOW_CALLS)
        self._last_slow = 0.0

    def record(self, seconds: float, place: str, now: float) -> bool:
        """Record a call that took `seconds` in `place` and ended at `now`; return whether the function moves."""
        is_slow = 0 < self._slow <= seconds
        if place != self.place:
            return False  # the call began before the function moved, and says nothing about its new place
        if place == "loop":
            return is_slow and self._record_slow_call(now)
        if is_slow:
            self._last_slow = now
        elif now - self._last_slow >= QUIET_PERIOD:
            self.place = "loop"
            return True
        return False

    def _record_slow_call(self, now: float) -> bool:
        self._slow_calls.append(now)
        if len(self._slow_calls) < SLOW_CALLS or now - self._slow_calls[0] > WINDOW:
            return False
        self._slow_calls.clear()
        self.place, self._last_slow = "thread", now
        return True


class PlacementTracker:
    """Measures the calls of one handler with run="auto"; logs and counts its moves."""

    def __init__(self, handler: Handler, slow: float, reactor: Any, metrics: Metrics, log: Logger) -> None:
        """slow: see `Placement`. reactor: IReactorTime and IReactorFromThreads."""
        self._handler = handler
        self._placement = Placement(slow)
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
    def place(self) -> str:
        """The place of the next call: "loop" or "thread"."""
        return self._placement.place

    def measure(self, place: str, function: Callable[..., Result], *args: Any) -> Result:
        """Call `function` in the current thread, and record its time. place: "loop" or "thread", where that is.

        The time that the call has waited for a thread does not count.
        """
        began = time.perf_counter()
        try:
            return function(*args)
        finally:
            seconds = time.perf_counter() - began
            if place == "loop":
                self._record(seconds, place)
            else:
                self._reactor.callFromThread(self._record, seconds, place)

    def _record(self, seconds: float, place: str) -> None:
        if not self._placement.record(seconds, place, self._reactor.seconds()):
            return
        self._counters[self.place].value += 1
        if self.place == "thread":
            text = (
                "handler {handler} at {place} has blocked the loop {count} times within a minute, "
                "the last time for {ms:.0f} ms: it runs in threads from now on"
            )
        else:
            text = "handler {handler} at {place} has been quick for {quiet:.0f} s: it runs on the loop again"
        self._log.warn(
            text,
            handler=self._handler.name,
            place=self._handler.place,
            count=SLOW_CALLS,
            ms=seconds * 1000,
            quiet=QUIET_PERIOD,
        )
