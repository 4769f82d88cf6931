"""The reports of a process: stacks, tasks and memory."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import tracemalloc

from realtime.process.diagnostics import memory, stacks, tasks
from tests.driving import on_loop


def test_every_thread_has_its_stack_and_name() -> None:
    release = threading.Event()

    def wait_for_release() -> None:
        release.wait(30)

    thread = threading.Thread(target=wait_for_release, name="a waiting thread")
    thread.start()
    text = stacks()
    release.set()
    thread.join()
    assert "Thread a waiting thread (most recent call last):" in text
    assert "in wait_for_release" in text
    assert "Thread MainThread" in text


@on_loop
async def test_every_task_has_the_stack_at_which_it_waits() -> None:
    async def wait_for_ever() -> None:
        await asyncio.Event().wait()

    task = asyncio.get_running_loop().create_task(wait_for_ever(), name="a waiting task")
    await asyncio.sleep(0)
    text = tasks()
    task.cancel()
    assert "a waiting task" in text
    assert "in wait_for_ever" in text


def test_memory_is_reported_by_type() -> None:
    # A process of its own: the one of the tests holds more objects than a report counts.
    code = """
from realtime.process.diagnostics import memory

class Leaked:
    def __init__(self):
        self.itself = self

kept = [Leaked() for _ in range(200_000)]
print(memory())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    assert "200000 __main__.Leaked" in done.stdout
    assert done.stdout.startswith("resident: ")


def test_memory_is_reported_by_line_where_it_is_traced() -> None:
    tracemalloc.start()
    kept = [str(number) for number in range(100_000)]
    text = memory()
    tracemalloc.stop()
    assert kept
    assert f"{__file__}:" in text
