"""The number of cores, by affinity and by the quotas of control groups, on file systems of the test."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from realtime.config import cores
from realtime.config.cores import count_cores


@pytest.fixture(autouse=True)
def sixty_four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda pid: set(range(64)))


def write(root: Path, **files: str) -> Path:
    """files: by path, with __ for / and _dot_ for a dot."""
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_without_a_quota_the_affinity_counts(tmp_path: Path) -> None:
    assert count_cores(tmp_path) == 64
    root = write(tmp_path, proc__self__cgroup="0::/\n", sys__fs__cgroup__cpu_dot_max="max 100000\n")
    assert count_cores(root) == 64


@pytest.mark.parametrize(("quota", "count"), [(1_000, 1), (50_000, 1), (100_000, 1), (150_000, 2), (10_000_000, 64)])
def test_a_quota_limits_the_count_and_a_part_of_a_core_is_a_core(tmp_path: Path, quota: int, count: int) -> None:
    root = write(tmp_path, proc__self__cgroup="0::/\n", sys__fs__cgroup__cpu_dot_max=f"{quota} 100000\n")
    assert count_cores(root) == count


def test_the_smallest_quota_on_the_way_to_the_root_counts(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        proc__self__cgroup="0::/system.slice/realtime.service\n",
        sys__fs__cgroup__system_dot_slice__cpu_dot_max="200000 100000\n",
        sys__fs__cgroup__system_dot_slice__realtime_dot_service__cpu_dot_max="400000 100000\n",
    )
    assert count_cores(root) == 2


@pytest.mark.parametrize("mount", ["cpu", "cpu,cpuacct"])
def test_a_quota_of_the_first_version_counts(tmp_path: Path, mount: str) -> None:
    (tmp_path / "sys/fs/cgroup" / mount / "docker").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup" / mount / "docker/cpu.cfs_quota_us").write_text("150000\n")
    (tmp_path / "sys/fs/cgroup" / mount / "docker/cpu.cfs_period_us").write_text("50000\n")
    root = write(tmp_path, proc__self__cgroup=f"4:memory:/\n3:{mount}:/docker\n")
    assert count_cores(root) == 3
    (tmp_path / "sys/fs/cgroup" / mount / "docker/cpu.cfs_quota_us").write_text("-1\n")
    assert count_cores(root) == 64


@pytest.mark.parametrize("text", ["", "max", "x 1", "1 0", "\0"])
def test_files_that_say_nothing_are_ignored(tmp_path: Path, text: str) -> None:
    root = write(tmp_path, proc__self__cgroup="0::/\n", sys__fs__cgroup__cpu_dot_max=text)
    assert count_cores(root) == 64


def test_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert 1 <= count_cores() <= len(os.sched_getaffinity(0))
