"""The log, filtered by `log.level`.

A child writes a log of its own, without events below the level (`begin`), for its Twisted loggers and for those of
Python's `logging`, which applications use (`realtime.process.app_log`). The supervisor's log is twistd's, whose
options choose its destination but not a level. So the supervisor filters at the source: all modules that it loads use
`Logger(observer=log.observer)`. Events that twistd and Twisted log themselves are not filtered.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable
from typing import Any, TextIO

from twisted.logger import (
    FilteringLogObserver,
    ILogFilterPredicate,
    Logger,
    LogLevel,
    PredicateResult,
    formatEventAsClassicLogText,
    globalLogBeginner,
    globalLogPublisher,
)
from twisted.python.failure import Failure
from zope.interface import implementer

from realtime.config.settings import LogSettings
from realtime.metrics import Metrics
from realtime.process import app_log

# Centrifugo's levels. The level "none" is missing here, so no event passes it.
_LEVELS = {
    "trace": LogLevel.debug,
    "debug": LogLevel.debug,
    "info": LogLevel.info,
    "warn": LogLevel.warn,
    "error": LogLevel.error,
}


@implementer(ILogFilterPredicate)
class _LevelFilter:
    """Lets events of a level, or above it, pass."""

    def __init__(self, level: str) -> None:
        self.level = level

    def __call__(self, event: dict[str, Any]) -> Any:
        lowest, level = _LEVELS.get(self.level), event.get("log_level")
        return PredicateResult.no if lowest is None or level is None or level < lowest else PredicateResult.maybe


_filter = _LevelFilter("trace")  # of `observer`
_own_filter = _LevelFilter("trace")  # of the log that `begin` has begun
observer = FilteringLogObserver(globalLogPublisher, [_filter])
_log = Logger(observer=observer)


def is_on(event: str, level: str) -> bool:
    """Return whether events of level `event` are logged. level: `log.level`."""
    lowest = _LEVELS.get(level)
    return lowest is not None and _LEVELS[event] >= lowest


def limit(level: str) -> None:
    """Log only events of `level` or above from now on. level: `log.level`.

    In the supervisor: those of `observer`; before, all pass. In a child: all but those of Python's `logging`.
    """
    _filter.level = _own_filter.level = level


def count_internal_errors(metrics: Metrics) -> Callable[[], None]:
    """Count each exception that is logged as critical: a bug of this server, or of the application's own callbacks.

    Handlers' exceptions are errors, and have a counter of their own. Returns a function that ends the counting.
    """
    counter = metrics.counter("realtime_internal_errors", "Exceptions outside of handlers that reached an event loop.")

    def count(event: dict[str, Any]) -> None:
        if event.get("log_level") is LogLevel.critical and "log_failure" in event:
            counter.value += 1

    counting: Any = count
    globalLogPublisher.addObserver(counting)
    return lambda: globalLogPublisher.removeObserver(counting)


def log_loop_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Log an error that the loop has no caller for; for `set_exception_handler`."""
    error = context.get("exception")
    message = context.get("message", "the event loop has met an error")
    if isinstance(error, Exception):
        _log.failure("{message}", Failure(error), message=message)
    else:
        _log.error("{message}: {context}", message=message, context=context)


def begin(name: str, settings: LogSettings, out: TextIO) -> None:
    """Log events of `log.level` or above to `out` in twistd's format. name: of this process, for every line."""
    lock = threading.RLock()  # handlers log in threads; a signal handler may log during a write
    spec = sys.modules["__main__"].__spec__
    program = spec.name if spec else "__main__"

    def write_text(text: str) -> None:
        with lock:
            out.write(text)
            out.flush()

    def write(event: dict[str, Any]) -> None:
        namespace = event.get("log_namespace", "-").replace("__main__", program)
        system = event.get("log_system") or f"{namespace}#{event['log_level'].name}"
        text = formatEventAsClassicLogText({**event, "log_system": f"{name} {system}"})
        if text:
            write_text(app_log.escape(text))

    _own_filter.level = settings.level
    filtered: Any = FilteringLogObserver(write, [_own_filter])  # type: ignore[arg-type]
    globalLogBeginner.beginLoggingTo([filtered], redirectStandardIO=False)
    app_log.begin(name, settings, write_text)  # after Twisted, which takes warnings too
