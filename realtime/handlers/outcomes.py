"""Records how calls of handlers end, for the operator: counters of outcomes and of errors, and errors in the log."""

from __future__ import annotations

from typing import Any

from twisted.logger import Logger, LogLevel
from twisted.python.failure import Failure

from realtime.app import Handler
from realtime.config.settings import WorkersSettings
from realtime.handlers.compute_pool import HandlerFailed
from realtime.metrics import Counter, Metrics
from realtime.repetition import Repetition

# Lines in one minute that are logged: an application that generates code at run time has no end of them.
MAX_LINES = 1000


class HandlerErrorLog:
    """The log of exceptions that handlers raise: one entry per line of code and minute, with the number left out.

    All of them are counted, by handler and type of exception.
    """

    def __init__(
        self,
        log: Logger,
        clock: Any,
        metrics: Metrics,
        max_series: int = WorkersSettings().max_error_series,
    ) -> None:
        """clock: IReactorTime. max_series: see `workers.max_error_series`."""
        self._log = log
        self._clock = clock
        self._metrics = metrics
        self._max_series = max_series
        self._counters: dict[tuple[str, str], Counter] = {}
        self._repetition: Repetition[tuple[str, str, int]] = Repetition(MAX_LINES)  # by handler, file and line

    def report(self, handler: Handler, error: BaseException) -> None:
        """Count `error`, and log it with its traceback unless the same line was logged within the last minute."""
        self._count(handler.name, error.kind if isinstance(error, HandlerFailed) else type(error).__name__)
        left_out = self._repetition.admit((handler.name, *_raising_line(error)), self._clock.seconds())
        if left_out is None:
            return
        self._log.failure(
            "handler {handler} at {place} raised an exception{repeats}",
            Failure(error),
            level=LogLevel.error,
            handler=handler.name,
            place=handler.place,
            repeats=f" (and {left_out} times more since it was last logged)" if left_out else "",
        )

    def _count(self, handler: str, exception: str) -> None:
        if (handler, exception) not in self._counters and len(self._counters) >= self._max_series:
            exception = "other"
        counter = self._counters.get((handler, exception))
        if counter is None:
            help = "Exceptions that handlers raised by mistake, by type."
            counter = self._counters[handler, exception] = self._metrics.counter(
                "realtime_handler_errors", help, handler=handler, exception=exception
            )
        counter.value += 1


class OutcomeCounters(dict[str, Counter]):
    """Counters of how the calls of one handler end, by outcome. Each begins with the first call that ended so."""

    def __init__(self, metrics: Metrics, handler: str) -> None:
        super().__init__()
        self._metrics = metrics
        self._handler = handler

    def __missing__(self, outcome: str) -> Counter:
        help = "Calls of handlers, by how they ended."
        counter = self._metrics.counter("realtime_handler_calls", help, handler=self._handler, outcome=outcome)
        self[outcome] = counter
        return counter


def _raising_line(error: BaseException) -> tuple[str, int]:
    """Return the file and line that raised an exception, also in another process; ("", 0) if unknown."""
    if isinstance(error, HandlerFailed):
        return error.place
    step = error.__traceback__
    if step is None:
        return ("", 0)
    while step.tb_next is not None:
        step = step.tb_next
    return step.tb_frame.f_code.co_filename, step.tb_lineno
