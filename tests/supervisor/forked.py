"""A module that the zygote of the tests runs in its children."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

VERSION = 1


def main(argv: Sequence[str]) -> int:
    """`describe`: write what this process is to descriptor 5. `exit N`. `wait`: for ever, with a process of its own."""
    match argv:
        case ["describe"]:
            facts = {
                "version": VERSION,
                "parent": os.getppid(),
                "argv": sys.argv[1:],
                "descriptors": [fd for fd in range(100) if is_open(fd)],
                "command": Path("/proc/self/cmdline").read_text().rstrip("\0").replace("\0", " ").split(" "),
                "name": Path("/proc/self/comm").read_text().strip(),
                "environment": sorted(os.environ),
                "collects": gc.isenabled(),
                "folders": sys.path,
                "main": sys.modules["__main__"].__spec__.name,
            }
            os.write(5, json.dumps(facts).encode())
        case ["exit", status]:
            return int(status)
        case ["wait"]:
            os.setpgid(0, 0)
            other = subprocess.Popen(["sleep", "600"])
            os.write(5, str(other.pid).encode())
            time.sleep(600)
    return 0


def is_open(fd: int) -> bool:
    """Whether this process has the descriptor."""
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True
