"""What a child's loop waits with: epoll(7), as asyncio asks for it, and with a short way for those who only read.

asyncio makes an entry in its queue of everything that is ready, and runs each entry in a context of its own. For a
small message that takes as long as all else that has to be done with it. Readers that need none of this are called as
soon as they are ready, before asyncio's queue is worked off.
"""

from __future__ import annotations

import math
import select
import selectors
from collections.abc import Callable, Mapping
from contextlib import suppress
from selectors import EVENT_READ, EVENT_WRITE, SelectorKey
from typing import Any

# What is ready, that is taken in one turn of the loop: more would keep what else is to be done waiting.
MOST = 256

Ready = list[tuple[int, int]]


class ReadingSelector(selectors.BaseSelector):
    """See the module. Descriptors are numbers here, as asyncio has them."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._keys: dict[int, SelectorKey] = {}
        self._readers: dict[int, Callable[[], None]] = {}
        self._masks: dict[int, int] = {}  # as epoll(7) has been told them

    # The short way

    def read(self, fd: int, reader: Callable[[], None]) -> None:
        """Have `reader` called whenever there is something to read, or the peer has gone. It must not raise.

        Raises OSError for a descriptor that epoll(7) does not take.
        """
        self._readers[fd] = reader
        try:
            self._watch(fd)
        except OSError:
            del self._readers[fd]
            raise

    def forget(self, fd: int) -> None:
        """Call no reader for this descriptor any more."""
        if self._readers.pop(fd, None) is not None:
            self._watch(fd)

    def serve(self, ready: Ready) -> list[tuple[SelectorKey, int]]:
        """Call the readers of those that are ready; the others are for asyncio."""
        readers, keys = self._readers, self._keys
        events = []
        for fd, event in ready:
            reader = readers.get(fd)
            if reader is not None and event != select.EPOLLOUT:
                reader()
                event &= select.EPOLLOUT
                if not event:
                    continue
            key = keys.get(fd)
            if key is not None:
                # Errors and the peer's end are found out by reading and by writing.
                mask = (EVENT_READ if event & ~select.EPOLLOUT else 0) | (EVENT_WRITE if event & ~select.EPOLLIN else 0)
                events.append((key, mask & key.events))
        return events

    def wait(self, timeout: float | None) -> Ready:
        """Who is ready, waiting for it for at most `timeout` seconds; None: as long as it takes."""
        # Rounded up to whole milliseconds, or epoll(7) would return a little too early, again and again.
        seconds = -1 if timeout is None else math.ceil(timeout * 1e3) * 1e-3 if timeout > 0 else 0
        try:
            return self._epoll.poll(seconds, MOST)
        except InterruptedError:
            return []

    # For asyncio; see `selectors`

    def select(self, timeout: float | None = None) -> list[tuple[SelectorKey, int]]:
        return self.serve(self.wait(timeout))

    def register(self, fileobj: Any, events: int, data: Any = None) -> SelectorKey:
        if fileobj in self._keys:
            raise KeyError(f"{fileobj} is registered already")
        key = self._keys[fileobj] = SelectorKey(fileobj, fileobj, events, data)
        try:
            self._watch(fileobj)
        except OSError:
            del self._keys[fileobj]
            raise
        return key

    def modify(self, fileobj: Any, events: int, data: Any = None) -> SelectorKey:
        before = self._keys[fileobj]
        key = self._keys[fileobj] = SelectorKey(fileobj, fileobj, events, data)
        if events != before.events:
            self._watch(fileobj)
        return key

    def unregister(self, fileobj: Any) -> SelectorKey:
        key = self._keys.pop(fileobj)
        self._watch(fileobj)
        return key

    def get_map(self) -> Mapping[Any, SelectorKey]:
        return self._keys

    def close(self) -> None:
        self._keys.clear()
        self._readers.clear()
        self._masks.clear()
        self._epoll.close()

    def _watch(self, fd: int) -> None:
        """Have epoll(7) watch a descriptor for those who want to know of it."""
        key = self._keys.get(fd)
        wanted = key.events if key is not None else 0
        mask = select.EPOLLIN if wanted & EVENT_READ or fd in self._readers else 0
        mask |= select.EPOLLOUT if wanted & EVENT_WRITE else 0
        before = self._masks.pop(fd, 0)
        if mask and before:
            self._epoll.modify(fd, mask)
        elif mask:
            self._epoll.register(fd, mask)
        elif before:
            with suppress(OSError):  # it may be closed
                self._epoll.unregister(fd)
        if mask:
            self._masks[fd] = mask
