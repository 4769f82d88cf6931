"""The selector of a child's asyncio loop: epoll(7), with direct calls for readers.

asyncio queues a handle for each ready descriptor and runs each handle in a context of its own. For a small message that
takes as long as all other work for it. A *direct reader* needs neither: the selector calls it as soon as its descriptor
is ready, before asyncio runs its queue.
"""

from __future__ import annotations

import asyncio
import math
import select
import selectors
from collections.abc import Callable, Mapping
from contextlib import suppress
from selectors import EVENT_READ, EVENT_WRITE, SelectorKey
from typing import Any

from twisted.logger import Logger

from realtime.process import log

_log = Logger(observer=log.observer)

# Ready descriptors handled in one turn of the loop: more would delay the loop's timers and callbacks.
MAX_EVENTS = 256

ReadyEvents = list[tuple[int, int]]
"""Ready descriptors with their epoll(7) event masks."""


class _Keys(dict[int, SelectorKey]):
    """The registered keys by descriptor. Lookups accept a file object too, as `selectors` wants."""

    def __missing__(self, fileobj: Any) -> SelectorKey:
        if not isinstance(fileobj, int):
            key = self.get(self.descriptor(fileobj))
            if key is not None:
                return key
        raise KeyError(fileobj)

    def descriptor(self, fileobj: Any) -> int:
        """The descriptor under which a file object is or would be registered. Raises ValueError for a closed one."""
        fd = fileobj if isinstance(fileobj, int) else int(fileobj.fileno())
        if fd >= 0:
            return fd
        for key in self.values():  # closed before it was unregistered
            if key.fileobj is fileobj:
                return key.fd
        raise ValueError(f"{fileobj!r} has no descriptor")


class ReadingSelector(selectors.BaseSelector):
    """A selector that calls direct readers itself.

    asyncio and Twisted register descriptors; an application may register file objects, as in
    `loop.add_reader(socket, ...)`.
    """

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._keys = _Keys()
        self._readers: dict[int, Callable[[], None]] = {}
        self._masks: dict[int, int] = {}  # event masks registered with epoll(7), by descriptor
        self._is_reading = False
        self._after_reading: list[Callable[[], None]] = []

    # Direct readers

    def add_direct_reader(self, fd: int, reader: Callable[[], None]) -> None:
        """Call `reader` whenever `fd` is readable or its peer has gone. `reader` must not raise.

        Raises OSError for a descriptor that epoll(7) does not support, such as a file's.
        """
        if fd not in self._masks:
            self._epoll.register(fd, select.EPOLLIN)
            self._masks[fd] = select.EPOLLIN
            self._readers[fd] = reader
            return
        self._readers[fd] = reader
        try:
            self._update_epoll(fd)
        except OSError:
            del self._readers[fd]
            raise

    def remove_direct_reader(self, fd: int) -> None:
        """Remove the direct reader of `fd`, if there is one."""
        if self._readers.pop(fd, None) is not None:
            self._update_epoll(fd)

    def descriptors(self) -> list[int]:
        """Return the registered descriptors and that of epoll(7) itself."""
        return [self._epoll.fileno(), *self._masks]

    def call_after_reading(self, function: Callable[[], None]) -> None:
        """Call `function` after the last direct reader of this turn, or in the loop's next turn if none is running.

        So all that several readers have to write to one peer leaves together, and without an asyncio event.
        """
        if self._is_reading:
            self._after_reading.append(function)
        else:
            asyncio.get_running_loop().call_soon(function)

    def dispatch(self, ready: ReadyEvents) -> list[tuple[SelectorKey, int]]:
        """Call the direct readers of ready descriptors; return the other events, for asyncio.

        This loop runs for each received segment: it looks up the reader for each event, because a reader may remove
        another one, and it builds nothing for descriptors with a reader.
        """
        readers, keys = self._readers, self._keys
        events = []
        self._is_reading = True
        for fd, event in ready:
            reader = readers.get(fd)
            if reader is not None and event != select.EPOLLOUT:
                reader()
                event &= select.EPOLLOUT
                if not event:
                    continue
            key = keys.get(fd)
            if key is not None:
                # Errors and hang-ups count as readable and writable: recv(2) and send(2) then report them.
                mask = (EVENT_READ if event & ~select.EPOLLOUT else 0) | (EVENT_WRITE if event & ~select.EPOLLIN else 0)
                events.append((key, mask & key.events))
        self._is_reading = False
        if self._after_reading:
            self._finish_reading()
        return events

    def _finish_reading(self) -> None:
        functions, self._after_reading = self._after_reading, []
        for function in functions:
            try:
                function()
            except Exception:
                _log.failure("a function raised after reading; the loop goes on")

    def poll(self, timeout: float | None) -> ReadyEvents:
        """Wait at most `timeout` seconds, None for no limit, and return the ready descriptors."""
        # Rounded up to whole milliseconds: otherwise epoll(7) returns a little too early, again and again.
        seconds = -1 if timeout is None else math.ceil(timeout * 1e3) * 1e-3 if timeout > 0 else 0
        try:
            return self._epoll.poll(seconds, MAX_EVENTS)
        except InterruptedError:
            return []

    # The interface of `selectors.BaseSelector`, for asyncio

    def select(self, timeout: float | None = None) -> list[tuple[SelectorKey, int]]:
        return self.dispatch(self.poll(timeout))

    def register(self, fileobj: Any, events: int, data: Any = None) -> SelectorKey:
        fd = self._keys.descriptor(fileobj)
        if fd in self._keys:
            raise KeyError(f"{fileobj} is registered already")
        key = self._keys[fd] = SelectorKey(fileobj, fd, events, data)
        try:
            self._update_epoll(fd)
        except OSError:
            del self._keys[fd]
            raise
        return key

    def modify(self, fileobj: Any, events: int, data: Any = None) -> SelectorKey:
        before = self._keys[fileobj]
        fd = before.fd
        key = self._keys[fd] = SelectorKey(before.fileobj, fd, events, data)
        if events != before.events:
            self._update_epoll(fd)
        return key

    def unregister(self, fileobj: Any) -> SelectorKey:
        key = self._keys[fileobj]
        del self._keys[key.fd]
        self._update_epoll(key.fd)
        return key

    def get_map(self) -> Mapping[Any, SelectorKey]:
        return self._keys

    def close(self) -> None:
        self._keys.clear()
        self._readers.clear()
        self._masks.clear()
        self._epoll.close()

    def _update_epoll(self, fd: int) -> None:
        """Register the events of `fd` that its key and its direct reader need, or remove it from epoll(7)."""
        key = self._keys.get(fd)
        events = key.events if key is not None else 0
        mask = select.EPOLLIN if events & EVENT_READ or fd in self._readers else 0
        mask |= select.EPOLLOUT if events & EVENT_WRITE else 0
        before = self._masks.pop(fd, 0)
        if mask and before:
            self._epoll.modify(fd, mask)
        elif mask:
            self._epoll.register(fd, mask)
        elif before:
            with suppress(OSError):  # the descriptor may be closed already
                self._epoll.unregister(fd)
        if mask:
            self._masks[fd] = mask
