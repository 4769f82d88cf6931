"""The state of a broker in parts, for the process that takes its place.

Each module of the core defines the parts of its own state, as Structs below `StatePart`. Parts are short, and a state
is complete once all of them have been imported in order. Times are those of CLOCK_MONOTONIC, which all processes of a
machine share, so that what is kept for a while keeps its remaining time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from msgspec import Struct

PART_BYTES = 256 * 1024
"""Approximate limit in bytes of one part; a single longer entry still fits into one."""

_ENTRY_BYTES = 256

T = TypeVar("T")


class StatePart(Struct, array_like=True, frozen=True, gc=False):
    """A part of the state. Its kinds have numbers."""


def chunks(entries: Iterable[T], size: Callable[[T], int], room: int = PART_BYTES) -> Iterator[list[T]]:
    """Split entries into lists of about `room` bytes, counting `size` and _ENTRY_BYTES more for each entry."""
    chunk: list[T] = []
    left = room
    for entry in entries:
        left -= size(entry) + _ENTRY_BYTES
        if left < 0 and chunk:
            yield chunk
            chunk, left = [], room - size(entry) - _ENTRY_BYTES
        chunk.append(entry)
    if chunk:
        yield chunk
