"""The notification protocol of the service manager, as in sd_notify(3): datagrams of VARIABLE=VALUE lines.

The manager passes its socket in NOTIFY_SOCKET. With a watchdog, WATCHDOG_USEC has the microseconds within which it
expects each next WATCHDOG=1, and WATCHDOG_PID the process that must send it. Without these variables nothing is sent.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping

from twisted.logger import Logger

from realtime.process import log

# Variables for this process alone: a child that inherited them could send notifications in its name.
VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")

_log = Logger(observer=log.observer)


class SystemdNotifier:
    """Notifies the service manager, if there is one. No method raises or blocks.

    watchdog: seconds of the watchdog's interval; 0 without a watchdog.
    """

    def __init__(self, environ: Mapping[str, str], pid: int | None = None) -> None:
        """pid: this process's id, by default `os.getpid()`."""
        self.watchdog = _watchdog_interval(environ, os.getpid() if pid is None else pid)
        self._address = _address(environ.get("NOTIFY_SOCKET", ""))
        self._fed_at = float("-inf")
        self._has_warned = False

    def ready(self) -> None:
        """Notify that the service is ready."""
        self._send("READY=1")

    def reloading(self, now: float) -> None:
        """Notify that the service begins to reload, at `now` (monotonic seconds). `ready` ends it."""
        self._send(f"RELOADING=1\nMONOTONIC_USEC={now * 1e6:.0f}")

    def stopping(self) -> None:
        """Notify that the service begins to stop."""
        self._send("STOPPING=1")

    def status(self, text: str) -> None:
        """Send a description of the service's state, for `systemctl status`. Newlines become spaces."""
        self._send("STATUS=" + text.replace("\n", " "))

    def feed_watchdog(self, now: float) -> None:
        """Report a healthy service at `now` (monotonic seconds). Sends once per half of the watchdog's interval."""
        if self.watchdog and now - self._fed_at >= self.watchdog / 2:
            self._fed_at = now
            self._send("WATCHDOG=1")

    def stretch_watchdog(self, seconds: float = 0.0) -> None:
        """Have the watchdog wait for `seconds` from now on, if that is longer; 0: for its own interval again."""
        if self.watchdog:
            self._send(f"WATCHDOG_USEC={max(self.watchdog, seconds) * 1e6:.0f}\nWATCHDOG=1")

    def _send(self, message: str) -> None:
        if self._address is None:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
                sender.setblocking(False)
                sender.sendto(message.encode(), self._address)
        except OSError as error:
            if not self._has_warned:
                self._has_warned = True
                _log.warn(
                    "can't reach the service manager's socket (NOTIFY_SOCKET): {error}; allow access to it", error=error
                )


def _address(name: str) -> str | None:
    """Convert NOTIFY_SOCKET (a path, or "@" and an abstract name) to an address; None for other kinds of sockets."""
    if name.startswith("@"):
        return "\0" + name[1:]
    return name if name.startswith("/") else None


def _watchdog_interval(environ: Mapping[str, str], pid: int) -> float:
    """Return the interval in seconds; 0 without a watchdog for this process."""
    if environ.get("WATCHDOG_PID", str(pid)) != str(pid):
        return 0.0
    microseconds = environ.get("WATCHDOG_USEC", "")
    return int(microseconds) / 1e6 if microseconds.isascii() and microseconds.isdigit() else 0.0
