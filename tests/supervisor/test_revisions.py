"""Revisions of the settings, and the descriptors by which children read them."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from realtime.config import settings as configuration
from realtime.config.cores import count_cores
from realtime.config.settings import LogSettings, Settings, WorkersSettings
from realtime.supervisor.revisions import Revisions, with_counts

NEW = Settings(log=LogSettings(level="warn"))


@pytest.fixture
def revisions() -> Iterator[Revisions]:
    revisions = Revisions(Settings())
    revisions.publish()
    yield revisions
    before = len(os.listdir("/proc/self/fd"))
    revisions.close()
    assert len(os.listdir("/proc/self/fd")) == before - 1, "only the settings in force had a descriptor"


def read(fd: int) -> Settings:
    return configuration.load(os.pread(fd, 1 << 20, 0))


def test_children_of_both_revisions_can_be_started_during_a_reload(revisions: Revisions) -> None:
    revisions.add(1, NEW)
    assert (read(revisions.fd(0)), read(revisions.fd(1)), revisions.settings) == (Settings(), NEW, Settings())
    revisions.use(1)
    assert (read(revisions.fd(1)), revisions.settings) == (NEW, NEW)
    with pytest.raises(KeyError):
        revisions.fd(0)


def test_a_failed_reload_leaves_the_settings_in_force(revisions: Revisions) -> None:
    revisions.add(1, NEW)
    revisions.drop_others()
    assert (read(revisions.fd(0)), revisions.settings) == (Settings(), Settings())
    revisions.add(2, NEW)
    revisions.use(2)
    assert revisions.settings == NEW


def test_the_number_of_workers_reaches_children_that_start_later(revisions: Revisions) -> None:
    revisions.use_workers(7)
    assert read(revisions.fd(0)).workers.count == revisions.settings.workers.count == 7


def test_open_numbers_follow_the_cores() -> None:
    workers = with_counts(Settings()).workers
    assert (workers.count, workers.processes) == (count_cores(), 1)
    assert with_counts(Settings(workers=WorkersSettings(count=3, processes=2))).workers.processes == 2
