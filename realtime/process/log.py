"""The log, by `log.level`.

A child logs for itself, and nothing less severe gets into its log (`begin`). The supervisor's log is twistd's, with its
own options for where it goes; twistd offers no way to choose by severity, so what is too unimportant is left out where
it is made: the loggers of all modules that the supervisor uses are `Logger(observer=log.observer)`. What twistd and
Twisted say there themselves is theirs to choose.
"""

from __future__ import annotations

import sys
from typing import Any, TextIO

from twisted.logger import (
    FilteringLogObserver,
    ILogFilterPredicate,
    LogLevel,
    PredicateResult,
    formatEventAsClassicLogText,
    globalLogBeginner,
    globalLogPublisher,
)
from zope.interface import implementer

# Those of Centrifugo. The one that is missing here, "none", lets nothing pass.
_LEVELS = {
    "trace": LogLevel.debug,
    "debug": LogLevel.debug,
    "info": LogLevel.info,
    "warn": LogLevel.warn,
    "error": LogLevel.error,
}
# A handler's mistake may quote what a client sent: it shall neither begin a line nor command a terminal.
_ESCAPES = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\t\n"}


@implementer(ILogFilterPredicate)
class _Limit:
    """Which events pass."""

    level = "trace"

    def __call__(self, event: dict[str, Any]) -> Any:
        least, level = _LEVELS.get(self.level), event.get("log_level")
        return PredicateResult.no if least is None or level is None or level < least else PredicateResult.maybe


_limit = _Limit()
observer = FilteringLogObserver(globalLogPublisher, [_limit])


def limit(level: str) -> None:
    """Let no less severe event pass `observer` from now on; until then all pass. level: as in `settings.Log`."""
    _limit.level = level


def begin(name: str, level: str, out: TextIO) -> None:
    """Log everything from this level on to `out` in twistd's form, with this process's name in every line."""
    spec = sys.modules["__main__"].__spec__
    program = spec.name if spec else "__main__"

    def write(event: dict[str, Any]) -> None:
        namespace = event.get("log_namespace", "-").replace("__main__", program)
        system = event.get("log_system") or f"{namespace}#{event['log_level'].name}"
        text = formatEventAsClassicLogText({**event, "log_system": f"{name} {system}"})
        if text:
            out.write(text.translate(_ESCAPES))
            out.flush()

    wanted = _Limit()
    wanted.level = level
    sieve: Any = FilteringLogObserver(write, [wanted])  # type: ignore[arg-type]
    globalLogBeginner.beginLoggingTo([sieve], redirectStandardIO=False)
