"""The timers of the server's own code, beside those of asyncio, which are the application's.

The selector of the loop runs them. So the loop's own thread can do so, and the relief thread while the loop is blocked:
asyncio's queue belongs to one thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from heapq import heapify, heappop, heappush
from itertools import count
from math import inf
from typing import Any

from twisted.internet.base import DelayedCall
from twisted.logger import Logger

from realtime.process import log

_log = Logger(observer=log.observer)

# Cancelled calls that are kept in the queue: beyond these, and beyond half of it, they are removed.
_KEPT = 64


class Timers:
    """Scheduled calls, in the order of their times. next_due: the time of the first one; infinity without any.

    Times are seconds of CLOCK_MONOTONIC. For the holder of the server's state (`realtime.process.server_lock`).
    """

    def __init__(self, seconds: Callable[[], float] = time.monotonic) -> None:
        self.seconds = seconds
        self.next_due = inf
        self._calls: list[tuple[float, int, DelayedCall]] = []
        self._serial = count()
        self._cancelled = 0

    def callLater(self, delay: float, function: Callable[..., object], *args: Any, **kw: Any) -> DelayedCall:
        """Call `function` after `delay` seconds; see `IReactorTime.callLater` of Twisted."""
        call = DelayedCall(self.seconds() + delay, function, args, kw, self._cancel, self._move, self.seconds)
        self._push(call)
        return call

    def getDelayedCalls(self) -> list[DelayedCall]:
        """Return the scheduled calls."""
        return [call for _, _, call in self._calls if not (call.cancelled or call.called)]

    def run_due(self) -> None:
        """Make the due calls, each once; calls that these schedule for now follow in the next turn."""
        now = self.seconds()
        last = next(self._serial)
        while self._calls and self._calls[0][0] <= now and self._calls[0][1] < last:
            _, _, call = heappop(self._calls)
            if call.cancelled:
                self._cancelled -= 1
                continue
            if call.delayed_time > 0:
                call.activate_delay()
                self._push(call)
                continue
            # Before the call: it may block, and the relief thread then makes the next calls.
            self._update()
            call.called = 1
            try:
                call.func(*call.args, **call.kw)
            except Exception:
                _log.failure("a timer of the server raised; the loop goes on")
        self._update()

    def _push(self, call: DelayedCall) -> None:
        heappush(self._calls, (call.time, next(self._serial), call))
        self._update()

    def _update(self) -> None:
        self.next_due = self._calls[0][0] if self._calls else inf

    def _cancel(self, call: DelayedCall) -> None:
        self._cancelled += 1
        if self._cancelled > max(_KEPT, len(self._calls) // 2):
            self._calls = [entry for entry in self._calls if not entry[2].cancelled]
            heapify(self._calls)
            self._cancelled = 1  # this one, which Twisted marks only now
        self._update()

    def _move(self, call: DelayedCall) -> None:
        """Schedule a call anew whose time has become earlier: it is in the queue twice, but made once."""
        self._calls = [entry for entry in self._calls if entry[2] is not call]
        heapify(self._calls)
        self._push(call)
