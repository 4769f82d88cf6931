"""Reports of a process for an operator: its threads' stacks, its tasks, its memory.

A report is made on the loop and holds the interpreter's lock, so it is exact and safe, but the loop must turn. For a
blocked loop `realtime.process.stack_dumps` has the stack.
"""

from __future__ import annotations

import asyncio
import gc
import io
import sys
import threading
import traceback
import tracemalloc
from collections import Counter
from collections.abc import Callable

import psutil

# Frames shown of one task's stack.
_MAX_FRAMES = 10
# Lines of code, or types, in a report of memory.
_MAX_ROWS = 30
# Objects counted by type at most: a million take about a tenth of a second.
_MAX_OBJECTS = 1_000_000


def stacks() -> str:
    """The stack of every thread, most recent call last."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "\n".join(
        f"Thread {names.get(ident, ident)} (most recent call last):\n" + "".join(traceback.format_stack(frame))
        for ident, frame in sys._current_frames().items()
    )


def tasks() -> str:
    """Every asyncio task of the loop, with the stack at which it waits."""
    all_tasks = asyncio.all_tasks()
    text = io.StringIO()
    print(f"{len(all_tasks)} tasks", file=text)
    for task in all_tasks:
        task.print_stack(limit=_MAX_FRAMES, file=text)
    return text.getvalue()


def memory() -> str:
    """Resident memory, and its use: bytes by line of code where tracemalloc traces, else numbers of objects by type."""
    rss = psutil.Process().memory_info().rss
    lines = [f"resident: {rss / 2**20:.1f} MiB"]
    if tracemalloc.is_tracing():
        lines += [str(line) for line in tracemalloc.take_snapshot().statistics("lineno")[:_MAX_ROWS]]
        return "\n".join(lines) + "\n"
    objects = gc.get_objects()
    lines.append(f"the garbage collector tracks {len(objects)} objects; by type:")
    counts = Counter(f"{type(item).__module__}.{type(item).__qualname__}" for item in objects[:_MAX_OBJECTS])
    lines += [f"{count:9} {name}" for name, count in counts.most_common(_MAX_ROWS)]
    lines.append("(for memory by line of code, start the server with PYTHONTRACEMALLOC=1 in its environment)")
    return "\n".join(lines) + "\n"


REPORTS: dict[str, Callable[[], str]] = {"stacks": stacks, "tasks": tasks, "memory": memory}
