"""`log.level` in the supervisor's log, which is twistd's, and in a child's own."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator

import pytest
from twisted.logger import Logger, LogLevel, capturedLogs
from twisted.python.failure import Failure

from realtime.metrics import Metrics
from realtime.process import log

LEVELS = ["debug", "info", "warn", "error", "critical"]


@pytest.fixture(autouse=True)
def reset_level() -> Iterator[None]:
    yield
    log.limit("trace")


@pytest.mark.parametrize(
    ("level", "lowest"), [("trace", 0), ("debug", 0), ("info", 1), ("warn", 2), ("error", 3), ("none", 5)]
)
def test_events_below_the_level_are_left_out(level: str, lowest: int) -> None:
    log.limit(level)
    logger, other = Logger(observer=log.observer), Logger()
    with capturedLogs() as seen:
        for name in LEVELS:
            logger.emit(LogLevel.lookupByName(name), "ours")
        other.debug("another's")
    assert [event["log_level"].name for event in seen if event["log_format"] == "ours"] == LEVELS[lowest:]
    assert [event["log_format"] for event in seen][-1] == "another's"


def test_every_logger_of_the_supervisor_has_the_level() -> None:
    """All modules that it loads use the same observer, but for lines that the children have filtered already."""
    code = """
import sys, realtime.tap
from twisted.logger import Logger
from realtime.process import log
loggers = {f"{name}.{key}": value for name, module in sys.modules.items() if name.startswith("realtime")
           for key, value in vars(module).items() if isinstance(value, Logger)}
assert "realtime.supervisor.service._log" in loggers
print(*[name for name, logger in loggers.items() if logger.observer is not log.observer])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout.split(), done.stderr) == (["realtime.supervisor.child_output._output_log"], "")


def test_a_child_filters_by_level_names_itself_and_escapes_control_characters() -> None:
    code = """
import sys
from twisted.logger import Logger
from realtime.config.settings import LogSettings
from realtime.process import log
log.begin("worker 3", LogSettings("warn"), sys.stdout)
logger = Logger("app")
logger.info("left out")
logger.warn("{text}", text="a\\x1b[2Jb")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    (line,) = done.stdout.splitlines()
    assert line.endswith("[worker 3 app#warn] a\\x1b[2Jb")


def test_exceptions_outside_of_handlers_are_counted() -> None:
    metrics = Metrics()
    stop = log.count_internal_errors(metrics)

    def count() -> float:
        return metrics.snapshot(["realtime_internal_errors"])[0].value

    loop = asyncio.new_event_loop()
    loop.close()
    try:
        log.log_loop_error(loop, {"message": "a callback raised", "exception": ZeroDivisionError()})
        assert count() == 1
        logger = Logger()
        logger.failure("a handler raised", Failure(ZeroDivisionError()), level=LogLevel.error)
        logger.critical("can't start")
        log.log_loop_error(loop, {"message": "a transport is still open"})
        assert count() == 1
    finally:
        stop()
    logger.failure("after the end", Failure(ZeroDivisionError()))
    assert count() == 1
