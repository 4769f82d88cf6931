"""The zygote by itself: packets in, packets out. What its children get is in tests/supervisor/test_zygote.py."""

from __future__ import annotations

import errno
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from realtime.process import zygote
from realtime.process.zygote import Fork, Forked, FromZygote, NotForked, ZygoteStarted
from realtime.supervisor import orphans

MODULES = Path(__file__).parents[1] / "supervisor"


class Zygote:
    """A running zygote, and our end of its link."""

    def __init__(self, descriptors: int = 1024) -> None:
        self.link, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.link.settimeout(60)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "realtime.process.zygote", "--link", str(theirs.fileno()), "forked"],
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": str(MODULES)},
                preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors)),
            )

    def receive(self) -> FromZygote:
        return zygote.decode(self.link.recv(4096))

    def fork(self, *arguments: str, numbers: tuple[int, ...] = ()) -> FromZygote:
        fork = Fork("child", "forked", arguments, numbers)
        socket.send_fds(self.link, [zygote.encode(fork)], [2] * len(numbers))
        return self.receive()

    def close(self) -> None:
        self.link.close()
        self.process.kill()
        self.process.wait(60)


@pytest.fixture
def started() -> Iterator[Zygote]:
    orphans.adopt_all()
    started = Zygote()
    assert started.receive() == ZygoteStarted("")
    yield started
    started.close()


def test_it_ends_in_order_when_its_supervisor_has_ended_meanwhile() -> None:
    zygote = Zygote()
    zygote.link.close()  # before it has imported its modules
    assert zygote.process.wait(60) == 0


def test_it_ends_in_order_when_its_supervisor_has_ended(started: Zygote) -> None:
    started.link.close()
    assert started.process.wait(60) == 0


def test_a_child_runs_the_function_main_of_its_module(started: Zygote) -> None:
    match started.fork("exit", "7"):
        case Forked(pid):
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
        case other:
            pytest.fail(f"{other}")


def test_descriptors_that_did_not_arrive_fail_the_fork() -> None:
    few = Zygote(descriptors=12)
    try:
        assert few.receive() == ZygoteStarted("")
        assert few.fork("exit", "0", numbers=tuple(range(20, 40))) == NotForked(errno.EMFILE)
        assert isinstance(few.fork("exit", "0"), Forked)
    finally:
        few.close()
