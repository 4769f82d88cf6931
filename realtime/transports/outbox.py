"""Frames that wait for a slow socket, counted in bytes.

A connection has an outbox only while its socket refuses more: as long as the peer keeps up, frames go straight to the
transport and nothing is kept here.
"""

from __future__ import annotations

from collections import deque


class QueuedBytes:
    """Bytes that wait in many outboxes together."""

    __slots__ = ("size",)

    def __init__(self) -> None:
        self.size = 0


class Outbox:
    """A queue of whole frames, in order, with a limit in bytes.

    size: bytes that wait. shut: nothing more will be sent; what is offered from then on is dropped.
    """

    __slots__ = ("_frames", "_limit", "_total", "shut", "size")

    def __init__(self, limit: int, total: QueuedBytes) -> None:
        """limit: bytes that may wait; 0 for no limit. total: is told of all that does; `clear` before it is let go."""
        self._total = total
        self._frames: deque[bytes] = deque()
        self._limit = limit
        self.size = 0
        self.shut = False

    def __bool__(self) -> bool:
        """Whether anything waits."""
        return self.size > 0

    def offer(self, frame: bytes) -> bool:
        """Keep `frame` until the socket takes it.

        False: it would pass the limit and was not kept; the peer is too slow.
        """
        if self.shut:
            return True
        size = self.size + len(frame)
        if 0 < self._limit < size:
            return False
        self._frames.append(frame)
        self.size = size
        self._total.size += len(frame)
        return True

    def finish(self, frame: bytes) -> None:
        """Keep `frame` as the last one, whatever the limit."""
        self._frames.append(frame)
        self.size += len(frame)
        self._total.size += len(frame)
        self.shut = True

    def take(self, room: int) -> bytes:
        """The first frames, joined: as many whole ones as it takes to reach `room` bytes, b"" when nothing waits."""
        frames = self._frames
        taken: list[bytes] = []
        size = 0
        while frames and size < room:
            frame = frames.popleft()
            taken.append(frame)
            size += len(frame)
        self.size -= size
        self._total.size -= size
        return b"".join(taken)

    def clear(self) -> None:
        """Drop all that waits."""
        self._frames.clear()
        self._total.size -= self.size
        self.size = 0
