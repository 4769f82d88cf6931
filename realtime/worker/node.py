"""The identity of this node, the same in all its workers: derived from the supervisor's host, port and age."""

from __future__ import annotations

import os
import socket
import time
import uuid
from pathlib import Path

from realtime._version import __version__
from realtime.config.settings import Settings
from realtime.server_api.operations import NodeIdentity


class NodeIdentitySource:
    """Returns the `NodeIdentity` of this node when called; its uptime is the supervisor's."""

    def __init__(self, settings: Settings, supervisor: int | None = None) -> None:
        """supervisor: the process id whose age counts; None for this process's parent."""
        host, port = socket.gethostname(), settings.http_server.port
        self.uid = str(uuid.uuid5(uuid.NAMESPACE_URL, f"realtime://{host}:{port}"))
        self._name = settings.node.name or f"{host}_{port}"
        self._started = _start_time(os.getppid() if supervisor is None else supervisor)

    def __call__(self) -> NodeIdentity:
        uptime = time.clock_gettime(time.CLOCK_BOOTTIME) - self._started
        return NodeIdentity(self.uid, self._name, __version__, max(0.0, uptime))


def _start_time(pid: int) -> float:
    """Return the start of a process in seconds of CLOCK_BOOTTIME.

    It is field 22 of /proc/PID/stat, see proc_pid_stat(5); field 2, in brackets, may contain any character. No other
    file of /proc/PID is read, since access to the others may be restricted.
    """
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[19]) / os.sysconf("SC_CLK_TCK")
