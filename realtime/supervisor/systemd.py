"""The service manager's notification protocol, as sd_notify(3) documents it: a datagram of VARIABLE=VALUE lines.

The manager names its socket in NOTIFY_SOCKET, and in WATCHDOG_USEC the microseconds within which it wants to hear
WATCHDOG=1 again and again (WATCHDOG_PID: from which process). Without these variables nothing is sent.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping

from twisted.logger import Logger

from realtime.process import log

# What belongs to this process alone; a child that inherited it could speak in our name.
VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")

_log = Logger(observer=log.observer)


class SystemdNotifier:
    """Speaks to the service manager, if there is one. No method raises or blocks."""

    def __init__(self, environ: Mapping[str, str], pid: int | None = None) -> None:
        """pid: of the process that the watchdog watches; this one by default."""
        self.watchdog = _watchdog_interval(environ, os.getpid() if pid is None else pid)
        self._address = _address(environ.get("NOTIFY_SOCKET", ""))
        self._fed = float("-inf")
        self._complained = False

    def ready(self) -> None:
        """The service is up."""
        self._send("READY=1")

    def stopping(self) -> None:
        """The service begins to end."""
        self._send("STOPPING=1")

    def status(self, text: str) -> None:
        """Describe the service's state in one line, for `systemctl status`."""
        self._send("STATUS=" + text.replace("\n", " "))

    def feed(self, now: float) -> None:
        """All is well at `now` (monotonic seconds): tell the watchdog, if half its interval has passed."""
        if self.watchdog and now - self._fed >= self.watchdog / 2:
            self._fed = now
            self._send("WATCHDOG=1")

    def _send(self, message: str) -> None:
        if self._address is None:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
                sender.setblocking(False)
                sender.sendto(message.encode(), self._address)
        except OSError as error:
            if not self._complained:
                self._complained = True
                _log.warn("NOTIFY_SOCKET: can't reach the service manager: {error}", error=error)


def _address(name: str) -> str | None:
    """A path, or "@" and a name in the abstract namespace; None for no socket, and for the kinds we don't speak."""
    if name.startswith("@"):
        return "\0" + name[1:]
    return name if name.startswith("/") else None


def _watchdog_interval(environ: Mapping[str, str], pid: int) -> float:
    """Seconds; 0 when nobody watches this process."""
    if environ.get("WATCHDOG_PID", str(pid)) != str(pid):
        return 0.0
    microseconds = environ.get("WATCHDOG_USEC", "")
    return int(microseconds) / 1e6 if microseconds.isascii() and microseconds.isdigit() else 0.0
