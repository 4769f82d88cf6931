"""Which processes hold the server's ends of the clients' connections: each exactly one, also after a hand-over."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

ESTABLISHED = "01"


def sockets(pid: int) -> dict[int, int]:
    """Return the inodes of a process's sockets, by descriptor."""
    found = {}
    with suppress(OSError):
        for name in os.listdir(f"/proc/{pid}/fd"):
            with suppress(OSError):
                target = os.readlink(f"/proc/{pid}/fd/{name}")
                if target.startswith("socket:["):
                    found[int(name)] = int(target[8:-1])
    return found


def holders(port: int, pids: Iterable[int]) -> dict[int, list[int]]:
    """Return the processes that hold a connection at the server's port, by the client's port. A process is there once
    for each of its descriptors."""
    of_inode: defaultdict[int, list[int]] = defaultdict(list)
    for pid in pids:
        for inode in sockets(pid).values():
            of_inode[inode].append(pid)
    found = {}
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] == ESTABLISHED and int(fields[1].rpartition(":")[2], 16) == port:
            found[int(fields[2].rpartition(":")[2], 16)] = of_inode[int(fields[9])]
    return found
