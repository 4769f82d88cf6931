"""The settings of the server and of its children, by revision: those in force, and those of a reload under way."""

from __future__ import annotations

import fcntl
import os

from msgspec.structs import replace

from realtime.config import settings as configuration
from realtime.config.cores import count_cores
from realtime.config.settings import Settings

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL


class Revisions:
    """Settings by the number of their revision, each also as a descriptor for children. settings: those in force."""

    def __init__(self, settings: Settings) -> None:
        """settings: of revision 0. Opens nothing; `publish` does."""
        self.settings = settings
        self._present = 0
        self._others: dict[int, Settings] = {}
        self._fds: dict[int, int] = {}

    def publish(self) -> None:
        """Make the settings in force available to children. Raises OSError without a free descriptor."""
        self._publish(self._present, self.settings)

    def fd(self, number: int) -> int:
        """Return the descriptor of a revision, which stays ours."""
        return self._fds[number]

    def add(self, number: int, settings: Settings) -> None:
        """Add a revision that is not in force yet. Raises OSError without a free descriptor."""
        self._publish(number, settings)
        self._others[number] = settings

    def use(self, number: int) -> None:
        """Put an added revision into force, in place of the present one."""
        self.settings = self._others.pop(number)
        self._close(self._present)
        self._present = number

    def drop_others(self) -> None:
        """Forget the revisions that are not in force."""
        for number in self._others:
            self._close(number)
        self._others.clear()

    def use_workers(self, count: int) -> None:
        """Change the number of workers in the settings in force. Raises OSError without a free descriptor."""
        settings = with_workers(self.settings, count)
        self._publish(self._present, settings)
        self.settings = settings

    def close(self) -> None:
        """Close all descriptors."""
        for number in list(self._fds):
            self._close(number)

    def _publish(self, number: int, settings: Settings) -> None:
        fd = _sealed_memfd(configuration.dump(settings))
        self._close(number)
        self._fds[number] = fd

    def _close(self, number: int) -> None:
        if number in self._fds:
            os.close(self._fds.pop(number))


def with_counts(settings: Settings) -> Settings:
    """Set the numbers of processes that the settings leave open: children do not count the cores themselves."""
    cores = count_cores()
    count = settings.workers.count or cores
    processes = settings.workers.processes or max(1, cores // count)
    return replace(settings, workers=replace(settings.workers, count=count, processes=processes))


def with_workers(settings: Settings, count: int) -> Settings:
    """Set the number of workers."""
    return replace(settings, workers=replace(settings.workers, count=count))


def _sealed_memfd(data: bytes) -> int:
    """Create a memfd that holds `data` and can no longer be changed. Returns its descriptor."""
    fd = os.memfd_create("realtime-settings", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with open(fd, "wb", closefd=False) as file:
        file.write(data)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    return fd
