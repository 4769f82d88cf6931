"""Queue of frames for a connection whose socket buffer is full, limited in bytes.

A connection has an outbox only while its socket refuses data: as long as the peer keeps up, frames go straight to the
transport and none is queued. The limit applies to pushes, which come at the server's pace. A reply is always queued:
the client has asked for it, and its next commands wait.
"""

from __future__ import annotations

import heapq
from collections import deque
from typing import Protocol

# Connections closed by one call of `drop_largest`: each takes about 50 µs.
_DROPPED_AT_ONCE = 50

# Size of the pieces of restored bytes.
_PIECE = 65536


class StuckConnection(Protocol):
    """A connection whose socket takes no data at present."""

    def queued_bytes(self) -> int:
        """Return the size of its outbox."""

    def drop_as_largest(self) -> None:
        """Drop its outbox and disconnect it, because all outboxes together are too large."""


class QueuedBytes:
    """The bytes queued in all outboxes of a worker together.

    stuck: the connections whose sockets take no data at present.
    """

    __slots__ = ("size", "stuck")

    def __init__(self) -> None:
        self.size = 0
        self.stuck: set[StuckConnection] = set()

    def drop_largest(self, limit: int) -> None:
        """Disconnect those stuck connections with the most queued bytes, until `limit` bytes are left, or later."""
        for connection in heapq.nlargest(_DROPPED_AT_ONCE, self.stuck, key=lambda each: each.queued_bytes()):
            if self.size <= limit:
                break
            connection.drop_as_largest()


class Outbox:
    """A first-in, first-out queue of whole frames with a limit in bytes.

    size: queued bytes. is_finished: the last frame has been queued; frames offered afterwards are dropped.
    """

    __slots__ = ("_frames", "_limit", "_replies_end", "_taken", "_total", "is_finished", "size")

    def __init__(self, limit: int, total: QueuedBytes) -> None:
        """limit: most bytes queued by `offer` behind the last reply; 0 for no limit.

        total: includes the size of this outbox. Call `clear` before discarding the outbox.
        """
        self._total = total
        # Places in the sequence of all bytes ever queued: of the first one still here, and of the last reply's end.
        self._taken = self._replies_end = 0
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
        if 0 < self._limit < size and self._limit < size - self.replies:
            return False
        self._frames.append(frame)
        self.size = size
        self._total.size += len(frame)
        return True

    def add_reply(self, frame: bytes) -> None:
        """Queue `frame`, even above the limit, which applies to the frames behind it."""
        if self.is_finished:
            return
        self._frames.append(frame)
        self.size += len(frame)
        self._total.size += len(frame)
        self._replies_end = self._taken + self.size

    def finish(self, frame: bytes) -> None:
        """Queue `frame` as the last one, even above the limit."""
        self._frames.append(frame)
        self.size += len(frame)
        self._total.size += len(frame)
        self.is_finished = True

    def restore(self, data: bytes, replies: int) -> None:
        """Queue bytes that another outbox held, even above the limit. replies: their number up to the last reply's end.

        They need not begin or end with a frame.
        """
        self._frames.extend(data[at : at + _PIECE] for at in range(0, len(data), _PIECE))
        self.size += len(data)
        self._total.size += len(data)
        self._replies_end = self._taken + replies

    @property
    def replies(self) -> int:
        """The number of queued bytes up to the last reply's end."""
        return max(self._replies_end - self._taken, 0)

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
        self._taken += size
        self._total.size -= size
        return b"".join(taken)

    def clear(self) -> None:
        """Drop all queued frames."""
        self._frames.clear()
        self._total.size -= self.size
        self.size = self._taken = self._replies_end = 0
