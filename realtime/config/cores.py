"""The number of cores that this process may use: by its CPU affinity, and by the CPU quota of its control group."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

_ROOT = Path("/")


def count_cores(root: Path = _ROOT) -> int:
    """Return the number of cores, at least 1; of a quota of 1.5 cores, 2. root: of the file system, for tests.

    `docker run --cpus=1` and a container's CPU limit in Kubernetes are quotas: the affinity still has all cores.
    """
    return max(1, min(len(os.sched_getaffinity(0)), math.ceil(cpu_quota(root))))


def cpu_quota(root: Path = _ROOT) -> float:
    """Return the quota in cores of our control group, 10^9 for none."""
    return min(_quotas(root), default=1e9)


def _quotas(root: Path) -> Iterator[float]:
    """Yield the quota, in cores, of our control group and of each group above it that has one."""
    for controllers, path in _groups(root):
        if controllers == "":
            yield from _quotas_v2(root / "sys/fs/cgroup", path)
        elif "cpu" in controllers.split(","):
            for mount in (controllers, "cpu", "cpu,cpuacct"):
                yield from _quotas_v1(root / "sys/fs/cgroup" / mount, path)


def _groups(root: Path) -> Iterator[tuple[str, PurePosixPath]]:
    """Yield controllers and path of each of our groups, as in /proc/self/cgroup; "" for the unified hierarchy."""
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            # In a container without a cgroup namespace the path is the host's, and the container's root is its own.
            yield controllers, PurePosixPath(path.lstrip("/"))


def _quotas_v2(mount: Path, path: PurePosixPath) -> Iterator[float]:
    for folder in (path, *path.parents):
        with suppress(OSError, ValueError, ZeroDivisionError):
            quota, period = (mount / folder / "cpu.max").read_text().split()
            if quota != "max":
                yield int(quota) / int(period)


def _quotas_v1(mount: Path, path: PurePosixPath) -> Iterator[float]:
    for folder in (path, *path.parents):
        with suppress(OSError, ValueError, ZeroDivisionError):
            quota = int((mount / folder / "cpu.cfs_quota_us").read_text())
            period = int((mount / folder / "cpu.cfs_period_us").read_text())
            if quota > 0:
                yield quota / period
