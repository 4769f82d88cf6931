"""Gives memory back to the kernel after a peak.

glibc keeps freed memory for later allocations, and returns by itself only what is free at the end of its heap. A
process whose content has shrunk therefore keeps the size of its peak. malloc_trim(3) returns all free pages. It takes
about a tenth of a millisecond for each megabyte, and so it is called only after much was freed.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable

from realtime.metrics import Metrics

# Seconds between the moment when enough is free and the trim: what a peak leaves is freed in steps.
TRIM_INTERVAL = 5.0
# Blocks of Python's allocator that must have been freed since the peak, besides a third of the peak's.
MIN_FREED_BLOCKS = 100_000


def find_malloc_trim() -> Callable[[int], int] | None:
    """Return glibc's malloc_trim(3); None with another C library."""
    trim: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return trim


class HeapTrimmer:
    """Trims the heap of this process when much less is allocated than at the peak since the last trim."""

    def __init__(
        self,
        metrics: Metrics,
        trim: Callable[[int], int] | None,
        allocated_blocks: Callable[[], int] = sys.getallocatedblocks,
    ) -> None:
        """trim: malloc_trim(3), or None for a heap that can't be trimmed. allocated_blocks: of Python's allocator."""
        self._trim = trim
        self._allocated_blocks = allocated_blocks
        self._peak = 0
        self._trims = metrics.counter("realtime_heap_trims", "Times that freed memory was returned to the kernel.")

    def is_due(self) -> bool:
        """Note the present allocation, and return whether it has fallen far enough.

        It takes a tenth of a microsecond for each thousand blocks: call it once a second.
        """
        if self._trim is None:
            return False
        blocks = self._allocated_blocks()
        self._peak = max(self._peak, blocks)
        return self._peak - blocks >= max(MIN_FREED_BLOCKS, self._peak // 3)

    def trim(self) -> None:
        """Return free memory to the kernel."""
        if self._trim is not None:
            self._trim(0)
            self._trims.value += 1
            self._peak = self._allocated_blocks()
