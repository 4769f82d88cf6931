"""Python's `logging` and `warnings` in a child's log, in processes of their own: `logging` is global."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

LINE = re.compile(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4} \[worker 3 (?P<logger>\S+)#(?P<level>\w+)\] (?P<text>.*)$")


def said(code: str, level: str = "info", loggers: str = "{}") -> tuple[list[tuple[str, str, str]], str]:
    """Run an application's code under our log. Returns logger, level and text of each line, and the standard error."""
    begin = f"""
import logging, logging.config, sys, warnings
from realtime.config.settings import LogSettings
from realtime.process import app_log
app_log.begin("worker 3", LogSettings("{level}", {loggers}), sys.stdout.write)
{code}
"""
    done = subprocess.run([sys.executable, "-c", begin], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    matches = [LINE.match(line) for line in done.stdout.split("\n") if line and not line.startswith("\t")]
    assert all(matches), done.stdout
    return [(match["logger"], match["level"], match["text"]) for match in matches if match], done.stderr


def test_events_of_all_loggers_have_time_process_logger_and_level() -> None:
    lines, stderr = said('logging.info("hi %s", "you"); logging.getLogger("app.rooms").warning("full")')
    assert lines == [("root", "info", "hi you"), ("app.rooms", "warn", "full")]
    assert stderr == ""


def test_a_warning_has_them_too() -> None:
    [(logger, level, text)], stderr = said('warnings.warn("old name", UserWarning)')
    assert (logger, level, stderr) == ("py.warnings", "warn", "")
    assert text.endswith("UserWarning: old name")


@pytest.mark.parametrize(("level", "expected"), [("debug", "diwe"), ("info", "iwe"), ("error", "e"), ("none", "")])
def test_the_level_is_that_of_the_server(level: str, expected: str) -> None:
    code = 'for one in ("debug", "info", "warning", "error"): getattr(logging, one)(one[0])'
    assert [text for _, _, text in said(code, level)[0]] == list(expected)


def test_a_logger_may_have_a_level_of_its_own() -> None:
    code = """
for name in ("chat", "chat.rooms", "sql", "other"):
    logging.getLogger(name).info("i"); logging.getLogger(name).error("e")
"""
    lines, _ = said(code, "warn", '{"chat": "info", "sql": "none"}')
    assert [f"{logger} {text}" for logger, _, text in lines] == [
        *("chat i", "chat e", "chat.rooms i", "chat.rooms e", "other e")
    ]


def test_no_line_is_forged_and_no_terminal_commanded() -> None:
    [(_, _, text)], _ = said(r'logging.info("a\r\n2026-01-01 [supervisor] forged\x1b[2J")')
    assert text == "a\\x0d"
    [(_, _, text)], _ = said(r'logging.info("a\x1b[2J\x9bb")')
    assert text == "a\\x1b[2J\\x9bb"


def test_an_exception_keeps_its_traceback() -> None:
    lines, _ = said('try: 1/0\nexcept Exception: logging.exception("failed")')
    assert lines == [("root", "error", "failed")]


@pytest.mark.parametrize(
    "configure",
    [
        'logging.basicConfig(format="own %(message)s", level="INFO", stream=sys.stderr)',
        """logging.config.dictConfig({
            "version": 1, "disable_existing_loggers": False,
            "formatters": {"own": {"format": "own %(message)s"}},
            "handlers": {"own": {"class": "logging.StreamHandler", "formatter": "own"}},
            "root": {"handlers": ["own"], "level": "INFO"}})""",
        """handler = logging.StreamHandler(); handler.setFormatter(logging.Formatter("own %(message)s"))
logging.getLogger().addHandler(handler)""",
        """handler = logging.StreamHandler(); handler.setFormatter(logging.Formatter("own %(message)s"))
logging.getLogger("chat").addHandler(handler)""",
    ],
    ids=["basicConfig", "dictConfig", "root handler", "handler of one logger"],
)
def test_an_application_that_configures_logging_keeps_its_choice(configure: str) -> None:
    lines, stderr = said(f'{configure}\nlogging.getLogger("chat").info("hi")')
    assert (lines, stderr) == ([], "own hi\n")


def test_a_library_with_a_null_handler_is_logged() -> None:
    lines, _ = said('library = logging.getLogger("lib"); library.addHandler(logging.NullHandler()); library.info("hi")')
    assert lines == [("lib", "info", "hi")]
