"""The identity of this node, the same in all its processes: derived from the supervisor's process."""

from __future__ import annotations

import os
import socket
import time
import uuid
from contextlib import suppress
from pathlib import Path

from realtime._version import __version__
from realtime.config.settings import Settings
from realtime.types import NodeInfo


class NodeIdentity:
    """The identity of this node. uid: differs from that of any other node, and of an earlier start of this one.

    It is the same after a re-execution of the supervisor, and is no secret.
    """

    def __init__(self, settings: Settings, supervisor: int | None = None) -> None:
        """supervisor: its process id; None for this process's parent."""
        process = os.getppid() if supervisor is None else supervisor
        self._started, ticks = _start_time(process)
        self._name = settings.node.name or f"{socket.gethostname()}_{settings.http_server.port}"
        # A process id is unique within its namespace, while it lasts, and a namespace within one run of the kernel.
        place = f"{_boot_id()}/{os.stat('/proc/self/ns/pid').st_ino}/{process}/{ticks}/{settings.http_server.port}"
        self.uid = str(uuid.uuid5(uuid.NAMESPACE_URL, f"realtime://{place}"))

    def describe(self) -> NodeInfo:
        """Return the identity, with the supervisor's uptime."""
        uptime = time.clock_gettime(time.CLOCK_BOOTTIME) - self._started
        return NodeInfo(self.uid, self._name, __version__, max(0.0, uptime))


def _boot_id() -> str:
    """Return the random identity of this run of the kernel, see random(4).

    Where it is hidden, as by `ProcSubset=pid` of systemd.exec(5), return that of the machine, see machine-id(5).
    """
    for path in ("/proc/sys/kernel/random/boot_id", "/etc/machine-id"):
        with suppress(OSError):
            return Path(path).read_text().strip()
    return socket.gethostname()


def _start_time(pid: int) -> tuple[float, int]:
    """Return the start of a process in seconds of CLOCK_BOOTTIME, and in ticks.

    It is field 22 of /proc/PID/stat, see proc_pid_stat(5); field 2, in brackets, may contain any character. No other
    file of /proc/PID is read, since access to the others may be restricted.
    """
    ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    return ticks / os.sysconf("SC_CLK_TCK"), ticks
