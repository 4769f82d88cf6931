"""What a process tells of itself when an operator asks: its threads' stacks, its tasks, its memory.

Made on the loop, with the interpreter's lock, so it is exact and safe, but needs a loop that turns. Of one that does
not, `realtime.process.stack_dumps` has the stack.
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

# Calls of one task that are shown, lines and types that are listed.
_DEPTH = 10
_LISTED = 30
# Objects that are counted by type at most: a million take about a tenth of a second.
_MAX_OBJECTS = 1_000_000


def stacks() -> str:
    """The stack of every thread, most recent call last."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "\n".join(
        f"Thread {names.get(ident, ident)} (most recent call last):\n" + "".join(traceback.format_stack(frame))
        for ident, frame in sys._current_frames().items()
    )


def tasks() -> str:
    """Every asyncio task of the loop, with where it waits."""
    found = asyncio.all_tasks()
    text = io.StringIO()
    print(f"{len(found)} tasks", file=text)
    for task in found:
        task.print_stack(limit=_DEPTH, file=text)
    return text.getvalue()


def memory() -> str:
    """Resident bytes, and what takes them: by line where memory is traced, else the number of objects by type."""
    used = psutil.Process().memory_info().rss
    lines = [f"resident: {used / 2**20:.1f} MiB"]
    if tracemalloc.is_tracing():
        lines += [str(line) for line in tracemalloc.take_snapshot().statistics("lineno")[:_LISTED]]
        return "\n".join(lines) + "\n"
    objects = gc.get_objects()
    lines.append(f"{len(objects)} objects are known to the garbage collector; by type:")
    counts = Counter(f"{type(one).__module__}.{type(one).__qualname__}" for one in objects[:_MAX_OBJECTS])
    lines += [f"{count:9} {name}" for name, count in counts.most_common(_LISTED)]
    lines.append("(for memory by line of code, start the server with PYTHONTRACEMALLOC=1 in its environment)")
    return "\n".join(lines) + "\n"


REPORTS: dict[str, Callable[[], str]] = {"stacks": stacks, "tasks": tasks, "memory": memory}
