"""How calls of handlers end, for the operator: counted by outcome, and mistakes in the log."""

from __future__ import annotations

from typing import Any

from twisted.logger import Logger
from twisted.python.failure import Failure

from realtime.app import Handler
from realtime.handlers.compute_pool import HandlerFailed
from realtime.metrics import Counter, Metrics

# Seconds between two log entries about the same mistake at the same place.
REPEAT_AFTER = 60.0


class HandlerErrorLog:
    """The log of what handlers did wrong: each place once a minute, with the number of times left out."""

    def __init__(self, log: Logger, clock: Any) -> None:
        self._log = log
        self._clock = clock
        self._logged: dict[tuple[str, str, int], tuple[float, int]] = {}

    def report(self, handler: Handler, error: BaseException) -> None:
        """Log `error` with its traceback, unless the same place was logged a short while ago."""
        place = (handler.name, *_innermost(error))
        now = self._clock.seconds()
        since, left_out = self._logged.get(place, (now - REPEAT_AFTER, 0))
        if now - since < REPEAT_AFTER:
            self._logged[place] = (since, left_out + 1)
            return
        if len(self._logged) >= 1000:  # code that is made while it runs has places without end
            self._logged.clear()
        self._logged[place] = (now, 0)
        self._log.failure(
            "the handler {handler} at {place} failed{repeats}",
            Failure(error),
            handler=handler.name,
            place=handler.place,
            repeats=f" (and {left_out} times more since it was logged last)" if left_out else "",
        )


class OutcomeCounters:
    """Counts how the calls of one handler end."""

    def __init__(self, metrics: Metrics, handler: str) -> None:
        self._metrics = metrics
        self._handler = handler
        self._counters: dict[str, Counter] = {}

    def __call__(self, outcome: str) -> None:
        counter = self._counters.get(outcome)
        if counter is None:
            counter = self._counters[outcome] = self._metrics.counter(
                "realtime_handler_calls",
                "Calls of handlers, by how they ended.",
                handler=self._handler,
                outcome=outcome,
            )
        counter.value += 1


def _innermost(error: BaseException) -> tuple[str, int]:
    """File and line where an exception was raised, be it in another process."""
    if isinstance(error, HandlerFailed):
        return error.place
    step = error.__traceback__
    if step is None:
        return ("", 0)
    while step.tb_next is not None:
        step = step.tb_next
    return step.tb_frame.f_code.co_filename, step.tb_lineno
