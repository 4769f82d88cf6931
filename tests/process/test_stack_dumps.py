"""Stacks by signal: the process that writes them, and the end that reads them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest
from twisted.internet.error import ProcessExitedAlready
from twisted.internet.task import Clock

from realtime.process import stack_dumps
from realtime.process.stack_dumps import STACK, STACK_IN_C, STACKS, StackReader
from realtime.supervision.stacks import parse
from tests.system.serving import wait_until

ONE = b'Stack (most recent call first):\n  File "<frozen runpy>", line 198 in _run_module_as_main\n'
ALL = (
    b'Thread 0x01 (most recent call first):\n  File "/a.py", line 1 in f\n\n'
    b'Current thread 0x02 (most recent call first):\n  File "<frozen runpy>", line 198 in _run_module_as_main\n'
)


class Reading:
    def __init__(self) -> None:
        self.clock = Clock()
        self.reader = StackReader(self.clock.callLater)
        self.got: list[str] = []

    def ask(self, number: int) -> Any:
        return self.reader.next(number).addCallback(self.got.append)


@pytest.fixture
def reading() -> Iterator[Reading]:
    reading = Reading()
    yield reading
    assert reading.clock.getDelayedCalls() == []


def test_a_dump_is_complete_with_its_outermost_frame(reading: Reading) -> None:
    reading.ask(STACK)
    reading.reader.feed(ONE[:40])
    reading.reader.feed(ONE[40:-1])
    assert reading.got == []
    reading.reader.feed(ONE[-1:])
    assert reading.got == [ONE.decode()]


def test_a_stack_that_faulthandler_cut_is_complete(reading: Reading) -> None:
    reading.ask(STACK)
    text = b'Stack (most recent call first):\n  File "/a.py", line 1 in f\n  ...\n'
    reading.reader.feed(text)
    assert reading.got == [text.decode()]


def test_all_stacks_are_complete_with_the_current_thread(reading: Reading) -> None:
    reading.ask(STACKS)
    reading.reader.feed(ALL[:100])
    assert reading.got == []
    reading.reader.feed(ALL[100:])
    assert reading.got == [ALL.decode()]


def test_a_dump_without_its_usual_end_is_complete_after_a_pause(reading: Reading) -> None:
    reading.ask(STACK)
    reading.reader.feed(b'Stack (most recent call first):\n  File "/a.py", line 1 in f\n')
    reading.clock.advance(1)
    assert len(reading.got) == 1


def test_a_dump_without_a_waiter_is_dropped(reading: Reading) -> None:
    reading.reader.feed(ONE)
    reading.ask(STACK)
    reading.reader.feed(ONE)
    assert reading.got == [ONE.decode()]


def test_each_waiter_gets_the_kind_that_it_waits_for(reading: Reading) -> None:
    reading.ask(STACK)
    reading.ask(STACKS)
    reading.reader.feed(ONE)
    assert reading.got == [ONE.decode()]
    reading.reader.feed(ALL)
    assert reading.got == [ONE.decode(), ALL.decode()]


def test_waiters_fail_at_the_end_of_the_process_and_at_their_time_limit(reading: Reading) -> None:
    failures: list[Any] = []
    reading.reader.next(STACK).addTimeout(1, reading.clock).addErrback(failures.append)
    reading.clock.advance(1)
    reading.reader.next(STACKS).addErrback(failures.append)
    reading.reader.end()
    assert len(failures) == 2
    assert failures[1].check(ProcessExitedAlready)


WRITING = """
import os, sys, time
from realtime.process import stack_dumps as dumps
dumps.register(int(sys.argv[1]))
print("ready", flush=True)
began = time.monotonic()
time.sleep(0.5)
heard = os.read(0, 10)
print(time.monotonic() - began >= 0.5, heard.decode(), flush=True)
"""


@pytest.mark.parametrize("number", [STACK, STACK_IN_C, STACKS])
def test_a_process_writes_its_stacks_and_goes_on_undisturbed(number: int) -> None:
    reader, writer = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", WRITING, str(writer)],
        pass_fds=[writer],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    os.close(writer)
    with process, open(reader, "rb") as stacks:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        for _ in range(20):
            process.send_signal(number)
        process.stdin.write("hello")
        process.stdin.close()
        assert process.stdout.read() == "True hello\n"
        found = parse(stacks.read().decode())
    assert process.returncode == 0
    assert found
    assert all(stack.is_main for stack in found)
    assert {stack.frames[0].file for stack in found} == {"<string>"}


IN_C = """
import ctypes, sys
from realtime.process import stack_dumps as dumps
dumps.register(int(sys.argv[1]))
def wait():
    ctypes.PyDLL(None).read(0, ctypes.create_string_buffer(1), 1)
print("ready", flush=True)
wait()
print("went on", flush=True)
sys.stdin.buffer.read()
"""


def _is_waiting(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] == "S"


def _read_dump(dumps: IO[bytes]) -> str:
    text = b""
    while not text.endswith(b"in <module>\n"):
        text += dumps.read(4096)
    return text.decode()


def test_the_stack_of_a_thread_that_runs_no_python_is_written_in_c_alone() -> None:
    """Python's own handler waits for a place where the stack can be walked: faulthandler may crash a busy thread."""
    reader, writer = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", IN_C, str(writer)],
        pass_fds=[writer],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    os.close(writer)
    with process, open(reader, "rb", buffering=0) as dumps:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        wait_until(lambda: _is_waiting(process.pid), "the call of read")
        process.send_signal(STACK)
        process.send_signal(STACK_IN_C)
        text = _read_dump(dumps)
        assert [frame.function for frame in parse(text)[0].frames] == ["wait", "<module>"]
        process.stdin.write("x")
        process.stdin.flush()
        assert process.stdout.readline() == "went on\n"
        assert parse(_read_dump(dumps))[0].is_main
        process.stdin.close()
        assert dumps.read() == b""  # one dump for each signal, the first one in C
    assert process.returncode == 0


def test_a_full_pipe_does_not_block_the_process() -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    while True:
        try:
            os.write(writer, b"x" * 4096)
        except BlockingIOError:
            break
    process = subprocess.Popen(
        [sys.executable, "-c", WRITING, str(writer)],
        pass_fds=[writer],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        for _ in range(20):
            process.send_signal(STACKS)
        assert process.stdout.read() == "True \n"
    os.close(reader)
    os.close(writer)


def test_the_signals_do_nothing_to_a_process_without_registration() -> None:
    assert (
        stack_dumps.STACK == signal.SIGUSR1
    )  # as the next one ignored at the beginning of realtime.process.child.main
    assert stack_dumps.STACK_IN_C > signal.SIGRTMIN  # signals that no terminal and no shell sends
    assert stack_dumps.STACKS == signal.SIGURG  # ignored by default, signal(7)
