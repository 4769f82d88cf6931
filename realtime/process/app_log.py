"""Python's `logging` and `warnings` in the server's log, for the application and its libraries. Without Twisted.

The root logger gets a handler that writes the server's format: time, process, name of the logger, level. It is a last
resort: an application that sets up logging itself, for all loggers or for some, gets what it chose, and nothing twice.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from realtime.config.settings import LogSettings

# Levels of `logging` by those of `log.level` and `log.loggers`.
_LEVELS = {
    "none": logging.CRITICAL + 1,
    "trace": logging.DEBUG,
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warn": logging.WARNING,
    "error": logging.ERROR,
}
_WARN = "warn"  # Twisted's name of this level, and Centrifugo's
# A message may quote a client's input, which must not begin a line or control a terminal.
_ESCAPES = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\t\n"}

Write = Callable[[str], object]
"""Writes text, which ends with a line end. May be called in any thread."""


def escape(text: str) -> str:
    """Escape the control characters of a text but tabs and line ends."""
    return text.translate(_ESCAPES)


def begin(name: str, settings: LogSettings, write: Write) -> None:
    """Log the events of all loggers to `write`. name: of this process, for every line."""
    handler = _LastResort(write)
    handler.setFormatter(_Format(name))
    logging.root.addHandler(handler)
    logging.root.setLevel(_LEVELS[settings.level])
    for logger, level in settings.loggers.items():
        logging.getLogger(logger).setLevel(_LEVELS[level])
    logging.captureWarnings(True)
    configure = logging.basicConfig

    def basic_config(**options: Any) -> None:
        # It does nothing if the root logger has a handler. Ours must not make the application's choice void.
        logging.root.removeHandler(handler)
        configure(**options)

    logging.basicConfig = basic_config


class _LastResort(logging.Handler):
    """Writes the events for which no other handler was set up."""

    def __init__(self, write: Write) -> None:
        super().__init__()
        self._write = write

    def emit(self, record: logging.LogRecord) -> None:
        try:
            if not self._has_another_handler(record):
                self._write(escape(self.format(record)) + "\n")
        except Exception:
            self.handleError(record)

    def _has_another_handler(self, record: logging.LogRecord) -> bool:
        logger: logging.Logger | None = logging.getLogger(record.name)
        while logger is not None:
            if any(handler is not self and not _is_void(handler) for handler in logger.handlers):
                return True
            logger = logger.parent if logger.propagate else None
        return False


def _is_void(handler: logging.Handler) -> bool:
    """Whether a handler drops all events, as libraries add one to their loggers."""
    return isinstance(handler, logging.NullHandler)


class _Format(logging.Formatter):
    """The format of twistd's log."""

    def __init__(self, name: str) -> None:
        super().__init__(datefmt="%Y-%m-%dT%H:%M:%S%z")
        self._name = name

    def format(self, record: logging.LogRecord) -> str:
        level = _WARN if record.levelno == logging.WARNING else record.levelname.lower()
        text = super().format(record).rstrip("\n").replace("\n", "\n\t")
        return f"{self.formatTime(record, self.datefmt)} [{self._name} {record.name}#{level}] {text}"
