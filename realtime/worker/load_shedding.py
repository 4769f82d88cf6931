"""What a worker under pressure does apart from its handlers: refuses handshakes, ages caches, warns the operator.

The heartbeat feeds every reading to `LoadShedding.beat`. Handlers are refused by their `AdmissionPolicy`.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from twisted.logger import Logger

from realtime import cache
from realtime.handlers.coroutines import await_deferreds
from realtime.handlers.policy import shed_counter
from realtime.http.request import Refusal
from realtime.metrics import Counter, Metrics
from realtime.repetition import Repetition
from realtime.supervision.pressure import Pressure, Throttle
from realtime.supervision.vitals import Vitals, VitalsPage

_REASONS = {"lag", "rss", "queued_bytes", "threads_waiting"}


class LoadShedding:
    """The response of a worker to its own pressure, apart from its handlers."""

    def __init__(
        self, pressure: Pressure, throttles: Sequence[Throttle], page: VitalsPage, metrics: Metrics, log: Logger
    ) -> None:
        """throttles: of the handlers; they get every reading too. page: tells whether other workers have room."""
        self._pressure = pressure
        self._throttles = throttles
        self._page = page
        self._log = log
        self._metrics = metrics
        self._pressed_since: float | None = None
        self._repetition: Repetition[str] = Repetition()
        self._refusals: dict[str, Counter] = {}
        for reason in sorted(_REASONS):
            metrics.gauge(
                "realtime_pressure", "Whether this presses the worker.", self._is_reason(reason), reason=reason
            )

    def beat(self, vitals: Vitals) -> None:
        """Take a reading of the loop, and log the changes that it brings."""
        pressure, now = self._pressure, vitals.beat / 1e9
        pressure.observe(vitals)
        for throttle in self._throttles:
            throttle.observe(now, vitals.lag, pressure.max_lag)
        if pressure.pressed:
            if self._pressed_since is None:
                self._pressed_since = now
                self._warn(
                    "pressed",
                    now,
                    "the worker is under pressure by {reasons} (its loop is {lag:.0f} ms late) "
                    "and sheds load until it recovers",
                    reasons=", ".join(pressure.reasons),
                    lag=1000 * pressure.lag,
                )
        elif self._pressed_since is not None:
            seconds = now - self._pressed_since
            self._warn("calm", now, "the worker is no longer under pressure, after {seconds:.1f} s", seconds=seconds)
            self._pressed_since = None
        if pressure.busy:
            self._warn(
                "busy",
                now,
                "the loop is {share:.0%} busy and refuses nothing yet; consider more workers (workers.count)",
                share=vitals.utilization,
            )

    def refuse_handshake(self) -> Refusal | None:
        """Return a refusal while the worker is under pressure and no other worker can take the client, else None."""
        if not self._pressure.pressed or self._page.has_substitute():
            return None
        reason = next(iter(self._pressure.reasons), "lag")
        counter = self._refusals.get(reason)
        if counter is None:
            counter = self._refusals[reason] = shed_counter(self._metrics, "handshake", reason)
        counter.value += 1
        return Refusal(503, "too busy", "pressure")

    def _is_reason(self, reason: str) -> Callable[[], float]:
        return lambda: float(reason in self._pressure.reasons)

    def _warn(self, subject: str, now: float, text: str, **fields: Any) -> None:
        """Log a warning unless the subject was logged within the last minute; the metrics have every change."""
        if self._repetition.admit(subject, now) is not None:
            self._log.warn(text, **fields)


def configure_cache_host(
    host: cache.Host, pressure: Pressure, perform: Callable[[Coroutine[Any, Any, Any]], Any], metrics: Metrics
) -> None:
    """Give the caches of a process its load, its loop and its metrics. perform: `Dispatcher.run_coroutine`."""
    host.load = lambda: pressure.load
    host.start = _start_task
    host.perform = perform
    host.counter = lambda name, outcome: metrics.counter(
        "realtime_cache_events", "Answers of caches, and entries that had to go.", cache=name, outcome=outcome
    )


def _start_task(coroutine: Coroutine[Any, Any, Any], done: cache.Done) -> None:
    """Start a task in which the coroutine may await Deferreds too."""

    async def awaiting() -> Any:
        return await await_deferreds(coroutine)

    cache.start_task(awaiting(), done)
