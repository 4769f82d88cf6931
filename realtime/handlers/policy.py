"""Decides which calls of a handler are admitted while the worker, or the handler itself, is overloaded."""

from __future__ import annotations

from typing import Any, Protocol

from realtime.app import POLICIES, Handler
from realtime.client_log import ClientLog
from realtime.errors import Overloaded
from realtime.metrics import Counter, Metrics
from realtime.supervision.pressure import Throttle


class PressureReading(Protocol):
    """The pressure on this worker; may be read in any thread."""

    @property
    def pressed(self) -> bool:
        """Whether the worker is under pressure."""

    @property
    def reasons(self) -> tuple[str, ...]:
        """The causes: names of a closed set, empty without pressure."""


class _NoPressure:
    """A reading that never shows pressure."""

    pressed = False
    reasons = ()


NO_PRESSURE = _NoPressure()


class AdmissionPolicy:
    """The declared policy of one handler, applied to its calls while the worker or the handler is overloaded.

    throttle: limits the concurrent calls of a handler that has pressed the loop. admits_always: whether
    `admits_directly` is true at any time.
    """

    def __init__(
        self,
        handler: Handler,
        pressure: PressureReading,
        throttle: Throttle,
        metrics: Metrics,
        client_log: ClientLog | None = None,
    ) -> None:
        """client_log: of the refused calls."""
        self.throttle = throttle
        self._client_log = client_log or ClientLog()
        self._handler = handler
        self._pressure = pressure
        self._metrics = metrics
        self._refusals: dict[str, Counter] = {}
        self.admits_always = handler.cache is None and handler.pressure == "ignore"
        if self.is_throttled:
            metrics.gauge(
                "realtime_handler_throttle",
                "Calls of a handler that may run on the loop at a time; 0: as many as come.",
                lambda: throttle.limit or 0,
                handler=handler.name,
            )

    @property
    def is_throttled(self) -> bool:
        """Whether the throttle may limit the handler: it may run on the loop, and its policy heeds pressure."""
        return self._handler.run in ("loop", "auto") and self._handler.pressure != "ignore"

    @property
    def may_serve_cached(self) -> bool:
        """Whether a cached answer may be served without a decision about the call."""
        return self._handler.pressure in ("stale", "ignore") or not self._pressure.pressed

    @property
    def admits_directly(self) -> bool:
        """Whether a call needs no decision: there is no cache to ask, and no pressure that the policy heeds."""
        if self.admits_always:
            return True
        return self._handler.cache is None and not self._pressure.pressed and self.throttle.admits()

    def is_under_pressure(self) -> bool:
        """Return whether the worker is under pressure."""
        return self._pressure.pressed

    def admit(self, args: tuple[Any, ...]) -> bool:
        """Return whether the handler may run for a call; False leaves the answer to the handler's cache.

        Raises Overloaded when the call is refused. A policy function is the application's: it may raise anything, and
        ValueError is raised when it returns no policy.
        """
        if not self._pressure.pressed and self.throttle.admits():
            return True
        policy = self._handler.pressure
        if callable(policy):
            policy = policy(*args)
            if policy not in POLICIES:
                raise ValueError(f"a pressure policy returns one of {', '.join(POLICIES)}, not {policy!r}")
        if policy == "refuse" or (policy == "stale" and self._handler.cache is None):
            raise self.refusal()
        return policy == "ignore"

    def refusal(self) -> Overloaded:
        """Count a refused call, and return the exception to raise for it."""
        reason = next(iter(self._pressure.reasons), "lag")  # no pressure: the handler's own throttle, which is for lag
        counter = self._refusals.get(reason)
        if counter is None:
            counter = self._refusals[reason] = shed_counter(self._metrics, self._handler.kind, reason)
        counter.value += 1
        self._client_log.refuse("handler_pressure", handler=self._handler.name, reason=reason)
        return Overloaded(f"{self._handler.name} is refused: {reason}")


def shed_counter(metrics: Metrics, kind: str, reason: str) -> Counter:
    """Return the counter of calls refused under pressure. kind: the kind of handler, or "handshake"."""
    return metrics.counter("realtime_shed_requests", "Refused because of pressure.", kind=kind, reason=reason)
