"""Links whose frames wait until the disk has the changes that they tell of: fsync = "always"."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from realtime.process.link import Link


class ChannelStorage(Protocol):
    """The file, as far as frames wait for it. See `realtime.broker.persistence.Persistence`."""

    on_stored: Callable[[int], None]

    @property
    def is_behind(self) -> bool: ...

    @property
    def position(self) -> int: ...


class UnstoredFrames:
    """Frames to all workers that wait for the file, in one order.

    Any frame may tell of an unstored change, so all frames behind one wait, too.
    """

    def __init__(self, storage: ChannelStorage) -> None:
        self._storage = storage
        self._waiting: deque[tuple[int, StoredFirstLink, bytes]] = deque()
        storage.on_stored = self._release

    def hold(self, link: StoredFirstLink, frame: bytes) -> bool:
        """Hold a frame if it has to wait; returns whether it has to."""
        if not self._waiting and not self._storage.is_behind:
            return False
        self._waiting.append((self._storage.position, link, frame))
        return True

    def take(self, link: StoredFirstLink) -> list[bytes]:
        """Remove and return the frames that a link has given."""
        taken = [frame for _, of, frame in self._waiting if of is link]
        if taken:
            self._waiting = deque(entry for entry in self._waiting if entry[1] is not link)
        return taken

    def _release(self, position: int) -> None:
        waiting = self._waiting
        while waiting and waiting[0][0] <= position:
            _, link, frame = waiting.popleft()
            link.send_stored(frame)


class StoredFirstLink(Link):
    """A link that sends a frame only when the file has all changes so far."""

    def __init__(self, *parts: Any, keeps: bool, unstored: UnstoredFrames) -> None:
        super().__init__(*parts, keeps=keeps)
        self._unstored = unstored

    def send(self, frame: bytes) -> None:
        if not self._unstored.hold(self, frame):
            super().send(frame)

    def send_stored(self, frame: bytes) -> None:
        """Send a frame that has waited."""
        super().send(frame)

    def take_rest(self, handled: int | None) -> list[bytes] | None:
        for frame in self._unstored.take(self):
            self.send_stored(frame)  # the stream has ended, so this only queues it
        return super().take_rest(handled)
