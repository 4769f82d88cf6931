"""Relief: what a second thread does while a step of application code blocks the loop, and what it leaves."""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.process.looping import PATIENCE, Blocking, blocking


@pytest.fixture
def loop() -> Iterator[Blocking]:
    with blocking() as made:
        yield made


class Calls:
    """A function that records the threads in which it is called."""

    def __init__(self) -> None:
        self.threads: list[str] = []
        self._called = threading.Event()

    def __call__(self, *_: Any) -> None:
        self.threads.append(threading.current_thread().name)
        self._called.set()

    def wait(self) -> str:
        """Wait for the first call, and return its thread."""
        assert self._called.wait(PATIENCE)
        return self.threads[0]


def on_loop(loop: Blocking, function: Callable[[], object]) -> None:
    """Run a function in the loop's thread, and wait for its end."""
    done = threading.Event()
    loop.loop.call_soon_threadsafe(lambda: (function(), done.set()))
    assert done.wait(PATIENCE)


def test_descriptors_timers_and_calls_of_the_server_are_served(loop: Blocking) -> None:
    ours, theirs = socket.socketpair()
    read, written, timed, periodic, called, queued = (Calls() for _ in range(6))

    def reader() -> None:
        read(ours.recv(100))

    def writer() -> None:
        loop.selector.remove_direct_writer(ours.fileno())
        written()

    with ours, theirs:
        on_loop(loop, lambda: loop.selector.add_direct_reader(ours.fileno(), reader))
        loop.tasks.add(0.001, periodic)
        with loop.blocked():
            theirs.send(b"x")
            assert read.wait() == "relief"
            loop.reactor.callFromThread(loop.reactor.callLater, 0.001, timed)
            loop.reactor.callFromThread(loop.reactor.call_at_turn_end, called)
            loop.reactor.callFromThread(loop.reactor.call_next_turn, queued)
            loop.reactor.callFromThread(loop.selector.add_direct_writer, ours.fileno(), writer)
            assert [each.wait() for each in (timed, called, queued, written, periodic)] == ["relief"] * 5
        on_loop(loop, lambda: loop.selector.remove_direct_reader(ours.fileno()))


def test_what_is_the_applications_waits_for_the_loops_own_thread(loop: Blocking) -> None:
    ours, theirs = socket.socketpair()
    called, read, task, server = (Calls() for _ in range(4))

    async def run() -> None:
        task()

    with ours, theirs:
        on_loop(loop, lambda: loop.loop.add_reader(ours, lambda: read(ours.recv(100))))
        with loop.blocked() as ended:
            theirs.send(b"x")
            loop.loop.call_soon_threadsafe(called)
            loop.loop.call_soon_threadsafe(lambda: loop.loop.create_task(run()))
            loop.reactor.callFromThread(server)
            assert server.wait() == "relief"
            assert not (ended.is_set() or called.threads or read.threads or task.threads)
        assert {called.wait(), read.wait(), task.wait()} == {loop.thread.name}
        on_loop(loop, lambda: loop.loop.remove_reader(ours))


def test_the_connection_that_is_being_served_is_held(loop: Blocking) -> None:
    """Its messages stay in order, and its protocol is not entered twice."""
    (ours, theirs), (others, far) = socket.socketpair(), socket.socketpair()
    got: list[bytes] = []
    entered, release, read = threading.Event(), threading.Event(), Calls()

    def block() -> None:
        entered.set()
        release.wait(PATIENCE)

    def reader() -> None:
        got.append(ours.recv(1))
        if got == [b"1"]:
            loop.step(block)

    with ours, theirs, others, far:
        on_loop(loop, lambda: loop.selector.add_direct_reader(ours.fileno(), reader))
        on_loop(loop, lambda: loop.selector.add_direct_reader(others.fileno(), lambda: read(others.recv(9))))
        theirs.send(b"1")
        assert entered.wait(PATIENCE)
        theirs.send(b"23")
        far.send(b"x")
        assert read.wait() == "relief"
        assert got == [b"1"]
        release.set()
        deadline = time.monotonic() + PATIENCE
        while len(got) < 3 and time.monotonic() < deadline:
            time.sleep(0.001)
        assert got == [b"1", b"2", b"3"]
        for each in (ours, others):
            on_loop(loop, lambda each=each: loop.selector.remove_direct_reader(each.fileno()))


def test_the_blocked_step_and_the_relief_thread_use_the_server_in_turns(loop: Blocking) -> None:
    inside: list[str] = []
    overlaps: list[list[str]] = []
    rounds = 300

    def touch() -> None:
        inside.append(threading.current_thread().name)
        if len(inside) > 1:
            overlaps.append(list(inside))
        time.sleep(0)
        inside.pop()

    served = threading.Event()

    def again(left: int) -> None:
        touch()
        if left:
            loop.reactor.call_next_turn(lambda: again(left - 1))
        else:
            served.set()

    def step() -> None:
        while not served.is_set():
            loop.lock.call(touch)

    loop.reactor.callFromThread(again, rounds)
    on_loop(loop, lambda: loop.step(step))
    assert served.is_set() and not overlaps


def test_a_short_step_needs_no_relief() -> None:
    with blocking(after=PATIENCE) as loop:
        for _ in range(100):
            on_loop(loop, lambda: loop.step(int))
        assert not [sample for sample in loop.metrics.snapshot() if sample.name.startswith("realtime_relief")]


def test_the_servers_own_code_is_never_relieved(loop: Blocking) -> None:
    """It holds the lock, however long it takes."""
    called, entered, release = Calls(), threading.Event(), threading.Event()

    def server() -> None:
        entered.set()
        release.wait(PATIENCE)

    def step() -> None:
        loop.lock.call(server)

    loop.loop.call_soon_threadsafe(lambda: loop.step(step))
    assert entered.wait(PATIENCE)
    loop.reactor.callFromThread(called)
    time.sleep(0.05)
    assert not called.threads
    release.set()
    called.wait()


def test_a_relief_is_counted_and_published_and_does_not_hide_the_block(loop: Blocking) -> None:
    served, interval = Calls(), sys.getswitchinterval()
    with loop.blocked():
        since = loop.page.busy_since()
        loop.reactor.callFromThread(served)
        served.wait()
        assert loop.page.busy_since() == since > 0
        vitals = loop.page.read()
        assert vitals is None or vitals.relief_since > since  # None: no heartbeat has written a reading
        assert sys.getswitchinterval() < interval
    on_loop(loop, int)
    values = {sample.name: (sample.labels, sample.value) for sample in loop.metrics.snapshot()}
    assert values["realtime_reliefs"] == ([("handler", "rpc block")], 1)
    assert values["realtime_relief_seconds"][1] > 0
    assert sys.getswitchinterval() == pytest.approx(interval)


def test_the_handler_is_charged_for_its_whole_step(loop: Blocking) -> None:
    began = time.monotonic_ns()
    with loop.blocked():
        served = Calls()
        for _ in range(50):
            loop.reactor.callFromThread(time.sleep, 0.001)
        loop.reactor.callFromThread(served)
        served.wait()
        blocked = time.monotonic_ns() - began
    on_loop(loop, int)
    assert loop.account.spent >= 0.5 * blocked
    assert loop.account.spent <= time.monotonic_ns() - began


def test_calls_that_raise_do_not_end_it(loop: Blocking) -> None:
    called = Calls()
    with loop.blocked():
        loop.reactor.callFromThread(lambda: 1 / 0)
        loop.reactor.callFromThread(loop.reactor.callLater, 0, lambda: 1 / 0)
        loop.reactor.callFromThread(called)
        assert called.wait() == "relief"


def test_it_ends_while_a_step_blocks(loop: Blocking) -> None:
    served, late = Calls(), Calls()
    with loop.blocked():
        loop.reactor.callFromThread(served)
        served.wait()
        loop.relief.stop()
        assert loop.relief._thread is not None
        loop.relief._thread.join(PATIENCE)
        assert not loop.relief._thread.is_alive()
        loop.reactor.callFromThread(late)
    assert late.wait() == loop.thread.name
