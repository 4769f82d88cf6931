"""The server lock: who holds it, and where code of the server goes on."""

from __future__ import annotations

import asyncio
import contextlib
import threading

from realtime.process.server_lock import ServerLock
from tests.process.looping import PATIENCE, Blocking, blocking


def run(loop: Blocking, function: object) -> None:
    done = threading.Event()
    loop.loop.call_soon_threadsafe(lambda: (function(), done.set()))  # type: ignore[operator]
    assert done.wait(PATIENCE)


def test_without_a_relief_thread_calls_are_plain() -> None:
    lock, called = ServerLock(), list[int]()
    assert lock.call(max, 1, 2) == 2
    lock.call_on_loop(called.append, 1)
    assert called == [1]


def test_a_step_releases_it_and_a_call_of_the_server_takes_it_back() -> None:
    seen: list[bool] = []
    with blocking(after=PATIENCE) as loop:
        lock = loop.lock

        def look() -> None:
            seen.append(lock.is_released)

        def inner() -> None:
            loop.step(look)  # as when the server calls another handler

        def step() -> None:
            look()
            lock.call(look)
            lock.call(inner)
            look()

        run(loop, look)
        run(loop, lambda: loop.step(step))
        run(loop, look)
    assert seen == [False, True, False, True, True, False]


def test_a_step_that_raises_gives_the_lock_back_to_the_server() -> None:
    with blocking(after=PATIENCE) as loop:

        def fail() -> None:
            raise ValueError

        def guarded() -> None:
            try:
                loop.step(lambda: loop.lock.call(fail))
            except ValueError:
                released.append(loop.lock.is_released)

        released: list[bool] = []
        run(loop, guarded)
    assert released == [False]


def test_code_in_the_relief_thread_goes_on_in_the_loops_own() -> None:
    threads: list[str] = []
    relieved, back = threading.Event(), threading.Event()

    def note(*_: object) -> None:
        threads.append(threading.current_thread().name)

    with blocking() as loop:

        async def server() -> None:
            note()
            await loop.lock.back_on_loop()
            note()
            back.set()

        def begin() -> None:
            coroutine = server()
            awaited = coroutine.send(None)

            def resume(_: object) -> None:
                with contextlib.suppress(StopIteration):
                    coroutine.send(None)

            awaited.addCallback(resume)
            loop.lock.call_on_loop(note)
            assert asyncio.get_running_loop() is loop.loop
            relieved.set()

        with loop.blocked():
            loop.reactor.callFromThread(begin)
            assert relieved.wait(PATIENCE)
            assert threads == ["relief"]
        assert back.wait(PATIENCE)
        assert threads == ["relief", loop.thread.name, loop.thread.name]
