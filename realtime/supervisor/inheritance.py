"""What a supervisor leaves to the program that it executes in its own place: its sockets and processes.

The process stays the same: its id, its children, the service manager's view of it, and all descriptors that are
inheritable. The rest goes through a memfd. `realtime.supervisor.upgrade` executes the program.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import msgspec
from msgspec import Struct

from realtime.supervision.slots import SlotRecord

HELD_SIGNALS = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1})
"""Signals that wait until the new program handles them: by default they would end it."""


class InheritedProcess(Struct, frozen=True):
    """A child that serves its slot. link, page, stacks, outputs: our descriptors of it, see `ChildProcess`.

    sent_descriptors: see `control.Peer`.
    """

    record: SlotRecord
    pid: int
    link: int
    sent_descriptors: int
    page: int
    stacks: int
    outputs: list[int]


class InheritedPort(Struct, frozen=True):
    """The shared port. sockets, lock: descriptors; -1 for no lock. has_other_listeners: see `SharedPort`."""

    sockets: list[int]
    lock: int
    has_other_listeners: bool


class Inheritance(Struct, frozen=True):
    """All of it. A later version may add fields with defaults; a field that it takes away makes upgrades fail.

    version: of the package before. formats: of the messages of the processes, see `Zygote`. generation: the latest one.
    operators: descriptor of their listening socket. configured_count: `workers.count` as it was configured before.
    fixed: settings that stay, see `realtime.config.reload`. settings: those to begin with, as the trial of the program
    has dumped them; b"" in the trial. pidfile: the path of a file to remove at the end, or "".
    """

    version: str
    formats: str
    processes: list[InheritedProcess]
    generation: int
    port: InheritedPort
    operators: int
    configured_count: int
    fixed: dict[str, Any]
    pidfile: str
    settings: bytes = b""

    @property
    def workers(self) -> int:
        """The number of workers."""
        return sum(process.record.number >= 0 for process in self.processes)

    def descriptors(self) -> Iterator[int]:
        """Yield all descriptors."""
        yield from self.port.sockets
        if self.port.lock >= 0:
            yield self.port.lock
        yield self.operators
        for process in self.processes:
            yield from (process.link, process.page, process.stacks, *process.outputs)

    def publish(self) -> int:
        """Write it to a memfd, and return its descriptor. Raises OSError."""
        fd = os.memfd_create("realtime-inheritance", os.MFD_CLOEXEC)
        with open(fd, "wb", closefd=False) as file:
            file.write(msgspec.msgpack.encode(self))
        return fd


def read(fd: int) -> Inheritance:
    """Read what `Inheritance.publish` has written. Raises msgspec.MsgspecError for that of a version too different."""
    size = os.fstat(fd).st_size
    return msgspec.msgpack.decode(os.pread(fd, size, 0), type=Inheritance)


def take(fd: int) -> Inheritance:
    """Read it and close its descriptor; the others are no longer inherited by the programs that this process starts."""
    inherited = read(fd)
    os.close(fd)
    for descriptor in inherited.descriptors():
        os.set_inheritable(descriptor, False)
    return inherited
