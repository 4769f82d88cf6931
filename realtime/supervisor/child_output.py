"""The output of the children in our log."""

from __future__ import annotations

import re

from twisted.logger import Logger, LogLevel

_MAX_LINE = 16384
# A line of a child's log: `realtime.process.log`, `realtime.process.app_log`.
_LOG_LINE = re.compile(
    r"\d{4}-\d\d-\d\dT\S+ \[(?P<system>(?:worker|broker)[^]]*#(?P<level>debug|info|warn|error|critical))\] (?P<text>.*)"
)

_output_log = Logger()  # the children have already applied `log.level` to it


class ChildOutput:
    """Copies a child's output to our log, where the lines of its log keep their process, logger and level."""

    def __init__(self) -> None:
        self._partial = b""

    def feed(self, data: bytes) -> None:
        """Log the lines that `data` completes. A line longer than _MAX_LINE is logged in parts."""
        *lines, self._partial = (self._partial + data).split(b"\n")
        for line in lines:
            self._log(line.decode("utf-8", "backslashreplace"))
        if len(self._partial) > _MAX_LINE:
            self.flush()

    def _log(self, line: str) -> None:
        found = _LOG_LINE.match(line)
        if found is None:
            _output_log.info("{line}", line=line)
        else:
            level = LogLevel.lookupByName(found["level"])
            _output_log.emit(level, "{line}", line=found["text"], log_system=found["system"])

    def flush(self) -> None:
        """Log an incomplete line."""
        if self._partial:
            self.feed(b"\n")
