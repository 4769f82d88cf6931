"""Queue of frames for a connection whose socket buffer is full, limited in bytes.

A connection has an outbox only while its socket refuses data: as long as the peer keeps up, frames go straight to the
transport and none is queued.
"""

from __future__ import annotations

from collections import deque


class QueuedBytes:
    """The number of bytes queued in several outboxes together."""

    __slots__ = ("size",)

    def __init__(self) -> None:
        self.size = 0


class Outbox:
    """A first-in, first-out queue of whole frames with a limit in bytes.

    size: queued bytes. is_finished: the last frame has been queued; frames offered afterwards are dropped.
    """

    __slots__ = ("_frames", "_limit", "_total", "is_finished", "size")

    def __init__(self, limit: int, total: QueuedBytes) -> None:
        """limit: largest size of the queue in bytes; 0 for no limit.

        total: includes the size of this outbox. Call `clear` before discarding the outbox.
        """
        self._total = total
        self._frames: deque[bytes] = deque()
        self._limit = limit
        self.size = 0
        self.is_finished = False

    def __bool__(self) -> bool:
        """Return whether any byte is queued."""
        return self.size > 0

    def offer(self, frame: bytes) -> bool:
        """Queue `frame`; return False, without queuing it, if it exceeds the limit: the peer is too slow."""
        if self.is_finished:
            return True
        size = self.size + len(frame)
        if 0 < self._limit < size:
            return False
        self._frames.append(frame)
        self.size = size
        self._total.size += len(frame)
        return True

    def finish(self, frame: bytes) -> None:
        """Queue `frame` as the last one, even above the limit."""
        self._frames.append(frame)
        self.size += len(frame)
        self._total.size += len(frame)
        self.is_finished = True

    def take(self, min_size: int) -> bytes:
        """Remove the first frames and return them joined: as many whole frames as reach `min_size` bytes.

        Returns fewer bytes if fewer are queued, and b"" if none is.
        """
        frames = self._frames
        taken: list[bytes] = []
        size = 0
        while frames and size < min_size:
            frame = frames.popleft()
            taken.append(frame)
            size += len(frame)
        self.size -= size
        self._total.size -= size
        return b"".join(taken)

    def clear(self) -> None:
        """Drop all queued frames."""
        self._frames.clear()
        self._total.size -= self.size
        self.size = 0
