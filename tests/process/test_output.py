"""Output that never blocks: what the kernel does not accept waits, is written later, or is dropped and counted."""

from __future__ import annotations

import fcntl
import os
import pty
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from realtime.process import output
from realtime.process.output import Output

LIMIT = 100_000
LINE = b"x" * 99 + b"\n"


def pipe() -> tuple[int, int]:
    return os.pipe()


def stream() -> tuple[int, int]:
    ours, theirs = socket.socketpair()
    return ours.detach(), theirs.detach()


def terminal() -> tuple[int, int]:
    ours, theirs = pty.openpty()
    return ours, theirs


@pytest.fixture(params=[pipe, stream, terminal])
def ends(request: pytest.FixtureRequest) -> Iterator[tuple[int, int]]:
    """The reading and the writing end."""
    make: Callable[[], tuple[int, int]] = request.param
    reading, writing = make()
    os.set_blocking(reading, False)
    yield reading, writing
    os.close(writing)
    os.close(reading)


def fill(to: Output) -> None:
    """Write until something is dropped."""
    for _ in range(100_000):
        to.write(LINE)
        if to.dropped:
            return
    raise AssertionError("nothing was dropped")


def read_all(fd: int, until: bytes) -> bytes:
    text, deadline = b"", time.monotonic() + 10
    while until not in text and time.monotonic() < deadline:
        try:
            text += os.read(fd, 65536)
        except BlockingIOError:
            time.sleep(0.005)
    return text


def test_a_reader_that_reads_nothing_blocks_no_write(ends: tuple[int, int]) -> None:
    reading, writing = ends
    to = Output(writing, LIMIT)
    fill(to)
    to.write(LINE)
    assert to.dropped == 2
    assert os.get_blocking(writing), "other processes share this flag"
    text = read_all(reading, b"dropped")
    assert to.drain(5)
    assert b"[log] 2 lines were dropped" in text
    assert set(text.replace(b"\r", b"").split(b"\n")[:-2]) == {LINE[:-1]}


def test_text_keeps_its_order_through_the_queue(ends: tuple[int, int]) -> None:
    reading, writing = ends
    to = Output(writing, 10 << 20)
    for number in range(10_000):
        to.write(b"line %d %s\n" % (number, b"." * 40))
    to.write(b"end\n")
    text = read_all(reading, b"end").replace(b"\r", b"")
    assert [int(line.split()[1]) for line in text.splitlines()[:-1]] == list(range(10_000))
    assert to.dropped == 0


def test_a_closed_reader_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    to = Output(writing, LIMIT)
    assert to.write(LINE) == len(LINE)
    assert to.drain(0)
    os.close(writing)


def test_a_pipe_of_another_user_blocks_no_write(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    opened = os.open

    def refuse(path: str, flags: int) -> int:
        if path.startswith("/proc/self/fd/"):
            raise PermissionError
        return opened(path, flags)

    monkeypatch.setattr(output.os, "open", refuse)
    to = Output(writing, LIMIT)
    fill(to)
    os.set_blocking(reading, False)
    assert b"dropped" in read_all(reading, b"dropped")
    assert to.drain(5)
    os.close(writing)
    os.close(reading)


def test_a_file_is_appended_to_at_the_shared_position(tmp_path: Path) -> None:
    with open(tmp_path / "log", "wb", buffering=0) as file:
        file.write(b"before\n")
        Output(file.fileno(), LIMIT).write(b"line\n")
        file.write(b"after\n")
    assert (tmp_path / "log").read_bytes() == b"before\nline\nafter\n"


def run(code: str, **streams: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", code], **streams)  # type: ignore[call-overload,no-any-return]


def test_print_never_blocks_and_the_process_exits() -> None:
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    code = """
import sys
from realtime.process import output
output.install(10_000)
for _ in range(1000):
    print("x" * 99)
    print("y" * 99, file=sys.stderr, flush=True)
(sample,) = output.samples()
assert sample.name == "realtime_log_lines_dropped"
sys.exit(0 if sample.value > 1000 else 1)
"""
    process = run(code, stdout=writing, stderr=writing)
    assert process.wait(20) == 0
    os.close(reading)
    os.close(writing)


def test_a_fork_writes_without_the_queue_and_the_threads_of_its_parent() -> None:
    reading, writing = pipe()
    to = Output(writing, LIMIT)
    holder = threading.Thread(target=to._lock.acquire)  # at the moment of the fork, which does not have this thread
    holder.start()
    holder.join()
    to._queue.append(LINE)
    to.forget_threads()
    to.write(b"from the fork\n")
    assert os.read(reading, 65536) == b"from the fork\n"
    to.close()
    os.close(reading)
    os.close(writing)


def test_queued_text_is_written_before_the_exit() -> None:
    code = """
from realtime.process import output
output.install(1 << 20)
print("x" * 200_000)
print("the end")
"""
    with run(code, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        time.sleep(0.3)
        assert process.stdout.read().endswith(b"x\nthe end\n")
    assert process.returncode == 0


def test_streams_that_are_not_the_processs_own_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    before = sys.stdout
    output.install(LIMIT)
    assert sys.stdout is before
