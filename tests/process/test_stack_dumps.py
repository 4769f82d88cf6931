"""Stacks by signal: a process that answers, and the end that reads."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from twisted.internet.error import ProcessExitedAlready
from twisted.internet.task import Clock

from realtime.process import stack_dumps
from realtime.process.stack_dumps import STACK, STACKS, Dumps
from realtime.supervision.stacks import parse

ONE = b'Stack (most recent call first):\n  File "<frozen runpy>", line 198 in _run_module_as_main\n'
ALL = (
    b'Thread 0x01 (most recent call first):\n  File "/a.py", line 1 in f\n\n'
    b'Current thread 0x02 (most recent call first):\n  File "<frozen runpy>", line 198 in _run_module_as_main\n'
)


class Reading:
    def __init__(self) -> None:
        self.clock = Clock()
        self.dumps = Dumps(self.clock.callLater)
        self.got: list[str] = []

    def ask(self, number: int) -> Any:
        return self.dumps.next(number).addCallback(self.got.append)


@pytest.fixture
def reading() -> Iterator[Reading]:
    reading = Reading()
    yield reading
    assert reading.clock.getDelayedCalls() == []


def test_a_dump_is_given_when_it_is_whole(reading: Reading) -> None:
    reading.ask(STACK)
    reading.dumps.take(ONE[:40])
    reading.dumps.take(ONE[40:-1])
    assert reading.got == []
    reading.dumps.take(ONE[-1:])
    assert reading.got == [ONE.decode()]


def test_a_stack_that_was_cut_is_whole_too(reading: Reading) -> None:
    reading.ask(STACK)
    text = b'Stack (most recent call first):\n  File "/a.py", line 1 in f\n  ...\n'
    reading.dumps.take(text)
    assert reading.got == [text.decode()]


def test_all_stacks(reading: Reading) -> None:
    reading.ask(STACKS)
    reading.dumps.take(ALL[:100])
    assert reading.got == []
    reading.dumps.take(ALL[100:])
    assert reading.got == [ALL.decode()]


def test_what_never_looks_whole_is_given_when_no_more_comes(reading: Reading) -> None:
    reading.ask(STACK)
    reading.dumps.take(b'Stack (most recent call first):\n  File "/a.py", line 1 in f\n')
    reading.clock.advance(1)
    assert len(reading.got) == 1


def test_what_nobody_asked_for_is_dropped(reading: Reading) -> None:
    reading.dumps.take(ONE)
    reading.ask(STACK)
    reading.dumps.take(ONE)
    assert reading.got == [ONE.decode()]


def test_each_gets_the_kind_it_asked_for(reading: Reading) -> None:
    reading.ask(STACK)
    reading.ask(STACKS)
    reading.dumps.take(ONE)
    assert reading.got == [ONE.decode()]
    reading.dumps.take(ALL)
    assert reading.got == [ONE.decode(), ALL.decode()]


def test_an_end_is_told_and_a_time_limit_holds(reading: Reading) -> None:
    failures: list[Any] = []
    reading.dumps.next(STACK).addTimeout(1, reading.clock).addErrback(failures.append)
    reading.clock.advance(1)
    reading.dumps.next(STACKS).addErrback(failures.append)
    reading.dumps.end()
    assert len(failures) == 2
    assert failures[1].check(ProcessExitedAlready)


ANSWERING = """
import os, sys, time
from realtime.process import stack_dumps as dumps
dumps.answer(int(sys.argv[1]))
print("ready", flush=True)
began = time.monotonic()
time.sleep(0.5)
heard = os.read(0, 10)
print(time.monotonic() - began >= 0.5, heard.decode(), flush=True)
"""


@pytest.mark.parametrize("number", [STACK, STACKS])
def test_a_process_answers_and_is_not_disturbed(number: int) -> None:
    reader, writer = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", ANSWERING, str(writer)],
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
    assert all(one.is_main for one in found)
    assert {one.frames[0].file for one in found} == {"<string>"}


def test_a_pipe_that_nobody_reads_holds_up_nobody() -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    while True:
        try:
            os.write(writer, b"x" * 4096)
        except BlockingIOError:
            break
    process = subprocess.Popen(
        [sys.executable, "-c", ANSWERING, str(writer)],
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


def test_the_signals_do_nothing_to_a_process_that_does_not_answer_yet() -> None:
    assert stack_dumps.STACK == signal.SIGUSR1  # ignored at the beginning of realtime.process.child.main
    assert stack_dumps.STACKS == signal.SIGURG  # ignored by default, signal(7)
