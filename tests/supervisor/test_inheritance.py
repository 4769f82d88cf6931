"""What a supervisor leaves to the program in its place: written to a memfd, and taken from it."""

from __future__ import annotations

import os
from collections.abc import Iterator

import msgspec
import pytest

from realtime.supervision.slots import BROKER, SlotRecord
from realtime.supervisor import inheritance
from realtime.supervisor.inheritance import Inheritance, InheritedPort, InheritedProcess


@pytest.fixture
def pipes() -> Iterator[list[int]]:
    fds = [fd for _ in range(5) for fd in os.pipe()]
    yield fds
    for fd in fds:
        os.close(fd)


def left(fds: list[int]) -> Inheritance:
    def process(number: int, *own: int) -> InheritedProcess:
        record = SlotRecord(number, number + 2, 1.5, 0, 0, 0.0, {"reload": 3})
        return InheritedProcess(record, 100 + number, own[0], 7, own[1], own[2], list(own[3:]))

    processes = [process(BROKER, *fds[:3]), process(0, *fds[3:7])]
    fixed = {"http_server.port": 8000, "engine.redis.address": ["a", "b"]}
    return Inheritance("1.0", "9.x", processes, 2, InheritedPort([fds[7]], fds[8], False), fds[9], 1, fixed, "/x.pid")


def test_what_is_left_is_taken_and_no_program_inherits_it_any_more(pipes: list[int]) -> None:
    leaving = left(pipes)
    for fd in pipes:
        os.set_inheritable(fd, True)
    memfd = leaving.publish()
    assert inheritance.read(memfd) == leaving, "the trial reads it, and leaves it there"
    assert inheritance.take(memfd) == leaving
    assert sorted(leaving.descriptors()) == sorted(pipes)
    assert not any(map(os.get_inheritable, pipes))
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(memfd)
    assert leaving.workers == 1


def test_an_older_version_is_understood_and_a_field_that_is_gone_is_an_error() -> None:
    fields = msgspec.to_builtins(left(list(range(10))), builtin_types=(bytes,))
    for change, is_good in (({"later": 1}, True), ({"port": None}, False)):
        memfd = os.memfd_create("left")
        os.write(memfd, msgspec.msgpack.encode(fields | change))
        if is_good:
            assert inheritance.read(memfd).version == "1.0"
        else:
            with pytest.raises(msgspec.ValidationError):
                inheritance.read(memfd)
        os.close(memfd)
