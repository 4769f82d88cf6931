"""The pressure on this worker, as felt by the rest of it: fed by the pulse, heeded by handshakes and caches, shown."""

from __future__ import annotations

import math
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from twisted.logger import Logger

from realtime import cache
from realtime.handlers.coroutines import await_deferreds
from realtime.handlers.dispatch import Dispatcher, shed
from realtime.http.request import UNCOUNTED, Refusal
from realtime.metrics import Counter, Metrics
from realtime.supervision.pressure import Pressure, Throttle
from realtime.supervision.vitals import Vitals, VitalsPage

# Seconds between two log entries about pressure, or about a busy loop.
REPEAT_AFTER = 60.0
_SHED = {"lag", "rss", "queued_bytes", "threads_waiting"}


class Shedding:
    """What the worker does about its pressure, apart from its handlers, which their `Dispatcher` sees to."""

    def __init__(self, pressure: Pressure, page: VitalsPage, metrics: Metrics, log: Logger) -> None:
        self._pressure = pressure
        self._page = page
        self._log = log
        self._metrics = metrics
        self._throttles: Sequence[Throttle] = ()
        self._since: float | None = None  # when the pressure that lasts began
        self._logged: dict[str, float] = {}
        self._handshakes: dict[str, Counter] = {}
        for name in sorted(_SHED):
            metrics.gauge("realtime_pressure", "Whether this presses the worker.", self._presses(name), reason=name)

    def beat(self, vitals: Vitals) -> None:
        """Take a reading of the loop, and log what it changes."""
        pressure, now = self._pressure, vitals.beat / 1e9
        pressure.observe(vitals)
        for throttle in self._throttles:
            throttle.observe(now, vitals.lag, pressure.max_lag)
        if pressure.pressed:
            if self._since is None:
                self._since = now
                why = ", ".join(pressure.reasons)
                self._say("pressed", now, "under pressure by {why}: lag {lag:.0f} ms", why=why, lag=1000 * pressure.lag)
        elif self._since is not None:
            self._say("calm", now, "under pressure no more, after {seconds:.1f} s", seconds=now - self._since)
            self._since = None
        if pressure.busy:
            self._say(
                "busy", now, "the loop is {share:.0%} busy; nothing is refused for that", share=vitals.utilization
            )

    def refuse_handshake(self) -> Refusal | None:
        """Why no WebSocket is opened just now: the worker is under pressure and no other can take the client."""
        if not self._pressure.pressed or self._page.has_relief():
            return None
        why = next(iter(self._pressure.reasons), "lag")
        counter = self._handshakes.get(why)
        if counter is None:
            counter = self._handshakes[why] = shed(self._metrics, "handshake", why)
        counter.value += 1
        return Refusal(503, "too busy", UNCOUNTED)

    def serve(self, dispatcher: Dispatcher) -> None:
        """Tell the handlers of each beat, and give the application's caches what they need of this process."""
        self._throttles = dispatcher.throttles
        host = cache.HOST
        host.load = lambda: self._pressure.load
        host.start = _start
        host.perform = dispatcher.perform
        host.counter = lambda name, outcome: self._metrics.counter(
            "realtime_cache_events", "Answers of caches, and entries that had to go.", cache=name, outcome=outcome
        )

    def _presses(self, name: str) -> Callable[[], float]:
        return lambda: float(name in self._pressure.reasons)

    def _say(self, what: str, now: float, text: str, **fields: Any) -> None:
        """Warn, unless that was said a short while ago: the metrics have every change."""
        if now - self._logged.get(what, -math.inf) >= REPEAT_AFTER:
            self._logged[what] = now
            self._log.warn(text, **fields)


def _start(coroutine: Coroutine[Any, Any, Any], done: cache.Done) -> None:
    """As a task, in which it may await Deferreds too."""

    async def driven() -> Any:
        return await await_deferreds(coroutine)

    cache.start_task(driven(), done)
