"""The selector of a child's asyncio loop: epoll(7), with direct calls for readers.

asyncio queues a handle for each ready descriptor and runs each handle in a context of its own. For a small message that
takes as long as all other work for it. A *direct reader* needs neither: the selector calls it as soon as its descriptor
is ready, before asyncio runs its queue. All descriptors of the server's own have direct readers and writers.

The descriptors that asyncio registers, which are the application's, are in an epoll(7) of their own inside the first
one. So the relief thread (`realtime.process.relief`) can wait for the server's descriptors alone.
"""

from __future__ import annotations

import math
import os
import select
import selectors
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from selectors import EVENT_READ, EVENT_WRITE, SelectorKey
from typing import Any, Protocol

from twisted.logger import Logger

from realtime.process import log
from realtime.process.timers import Timers

_log = Logger(observer=log.observer)

# Ready descriptors handled in one turn of the loop: more would delay the loop's timers and callbacks.
MAX_EVENTS = 256

# Up to so many ready descriptors are served in the order of their events; among more, those of strangers come last.
_FEW = 8
# Seconds for these in one turn. Long work for strangers has slices of the same length (`realtime.pubsub.time_slices`).
STRANGER_SLICE = 0.0005

ReadyEvents = list[tuple[int, int]]
"""Ready descriptors with their epoll(7) event masks."""


class Guest(Protocol):
    """The owner of a descriptor. protocol: if it has `is_known`, that is whether its peer is connected as a client."""

    protocol: Any


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
        self._others = select.epoll()  # of the descriptors that asyncio registers
        self._others_fd = self._others.fileno()
        self._epoll.register(self._others_fd, select.EPOLLIN)
        self._keys = _Keys()
        self._readers: dict[int, Callable[[], None]] = {}
        self._writers: dict[int, Callable[[], None]] = {}
        self._masks: dict[int, int] = {}  # event masks of the direct readers and writers, by descriptor
        self._other_masks: dict[int, int] = {}  # of asyncio's
        self._served = -1  # the descriptor whose reader or writer runs, or ran last
        self._held = -1  # see `hold`
        self._shared: set[int] = set()  # descriptors that are never held
        self._guests: dict[int, Guest] = {}  # owners that may be strangers, by descriptor
        self._late: dict[int, int] = {}  # events of strangers that wait for a later turn, by descriptor
        self._after_reading: deque[Callable[[], None]] = deque()
        self._next_turn: deque[Callable[[], None]] = deque()
        self._from_threads: deque[Callable[[], object]] = deque()
        self._wakeup = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.timers = Timers()
        self.add_direct_reader(self._wakeup, self._run_from_threads, is_shared=True)

    # Direct readers and writers

    def add_direct_reader(
        self, fd: int, reader: Callable[[], None], is_shared: bool = False, guest: Guest | None = None
    ) -> None:
        """Call `reader` whenever `fd` is readable or its peer has gone. `reader` must not raise.

        is_shared: whether it may be called while it runs already, blocked by application code; otherwise see `hold`.
        guest: the owner of `fd`, if its peer may be a stranger; see `_strangers_last`.
        Raises OSError for a descriptor that epoll(7) does not support, such as a file's.
        """
        if is_shared:
            self._shared.add(fd)
        else:
            self._shared.discard(fd)
        if guest is not None:
            self._guests[fd] = guest
        self._add_direct(self._readers, fd, reader)

    def remove_direct_reader(self, fd: int) -> None:
        """Remove the direct reader of `fd`, if there is one."""
        self._guests.pop(fd, None)
        if self._readers.pop(fd, None) is not None:
            self._update_direct(fd)

    def add_direct_writer(self, fd: int, writer: Callable[[], None]) -> None:
        """Call `writer` whenever `fd` is writable; otherwise as `add_direct_reader`."""
        self._add_direct(self._writers, fd, writer)

    def remove_direct_writer(self, fd: int) -> None:
        """Remove the direct writer of `fd`, if there is one."""
        if self._writers.pop(fd, None) is not None:
            self._update_direct(fd)

    def _add_direct(self, functions: dict[int, Callable[[], None]], fd: int, function: Callable[[], None]) -> None:
        functions[fd] = function
        try:
            self._update_direct(fd)
        except OSError:
            del functions[fd]
            raise

    def _update_direct(self, fd: int) -> None:
        if fd != self._held:
            mask = select.EPOLLIN if fd in self._readers else 0
            mask |= select.EPOLLOUT if fd in self._writers else 0
            _set_mask(self._epoll, self._masks, fd, mask)

    def descriptors(self) -> list[int]:
        """Return the registered descriptors and those of epoll(7) itself."""
        return [self._epoll.fileno(), self._others_fd, *self._masks, *self._other_masks]

    # Calls at the end of a turn, and in the next one

    def call_after_reading(self, function: Callable[[], None]) -> None:
        """Call `function` after the last direct reader of this turn, or before the loop waits again.

        So all that several readers have to write to one peer leaves together, and without an asyncio event.
        """
        self._after_reading.append(function)

    def call_next_turn(self, function: Callable[[], None]) -> None:
        """Call `function` in the next turn, after the descriptors that are ready then were read."""
        self._next_turn.append(function)

    @property
    def queued_calls(self) -> int:
        """The number of calls for the next turn."""
        return len(self._next_turn)

    def call_from_thread(self, function: Callable[[], object]) -> None:
        """Call `function` soon, in the thread that serves. May be called in any thread, and by signal handlers."""
        self._from_threads.append(function)
        os.eventfd_write(self._wakeup, 1)

    def _run_from_threads(self) -> None:
        with suppress(BlockingIOError):  # the other thread that serves was quicker
            os.eventfd_read(self._wakeup)
        queue = self._from_threads
        for _ in range(len(queue)):
            if queue:
                _call(queue.popleft())

    def run_calls(self, number: int) -> None:
        """Make the due calls: those after reading, the first `number` of the next turn's, and the timers."""
        if self._after_reading:
            self._finish_reading()
        queue = self._next_turn
        while number > 0 and queue:
            number -= 1
            _call(queue.popleft())
        if self.timers.next_due < math.inf:
            self.timers.run_due()
        if self._after_reading:
            self._finish_reading()

    def _finish_reading(self) -> None:
        # One function at a time from the common queue: if one blocks, the relief thread calls the others meanwhile.
        queue = self._after_reading
        for _ in range(len(queue)):
            if queue:
                _call(queue.popleft())

    # The events

    def dispatch(self, ready: ReadyEvents) -> list[tuple[SelectorKey, int]]:
        """Call the direct readers and writers of ready descriptors; return the events for asyncio.

        This loop runs for each received segment: it looks up the reader for each event, because a reader may remove
        another one, and it builds nothing for descriptors with a reader. A reader may find nothing to read: the relief
        thread has read it.
        """
        readers, writers = self._readers, self._writers
        events: list[tuple[SelectorKey, int]] = []
        has_strangers = self._late or (self._guests and len(ready) > _FEW)
        for fd, event in self._strangers_last(ready) if has_strangers else ready:
            reader = readers.get(fd)
            if reader is not None and event != select.EPOLLOUT:
                self._served = fd
                reader()
                event &= select.EPOLLOUT
                if not event:
                    continue
            writer = writers.get(fd)
            if writer is not None:
                self._served = fd
                writer()
            elif fd == self._others_fd:
                events = self._other_events()
        self._served = -1
        if self._after_reading:
            self._finish_reading()
        return events

    def _strangers_last(self, ready: ReadyEvents) -> Iterator[tuple[int, int]]:
        """Yield the events of clients, and then those of strangers, one after the other, for one slice.

        An attack may come over any number of connections. The kernel reports the remaining ones again.
        """
        guests, late = self._guests, self._late
        for fd, event in ready:
            guest = guests.get(fd)
            if guest is None:
                yield fd, event
            elif getattr(guest.protocol, "is_known", True):
                del guests[fd]
                yield fd, event
            else:
                late[fd] = event  # in its place, if it waits already
        slice_end = time.monotonic() + STRANGER_SLICE
        for fd in [*late]:
            yield fd, late.pop(fd)
            if time.monotonic() >= slice_end:
                break

    def _other_events(self) -> list[tuple[SelectorKey, int]]:
        """Return the events of asyncio's descriptors.

        Errors and hang-ups count as readable and writable: recv(2) and send(2) then report them.
        """
        events = []
        for fd, event in self._others.poll(0, MAX_EVENTS):
            key = self._keys.get(fd)
            if key is not None:
                mask = (EVENT_READ if event & ~select.EPOLLOUT else 0) | (EVENT_WRITE if event & ~select.EPOLLIN else 0)
                events.append((key, mask & key.events))
        return events

    # For the relief thread

    def hold(self) -> int:
        """Leave the descriptor that is being served, and asyncio's, to the loop's thread, until `unhold`.

        Returns the held descriptor, -1 for none.
        """
        self._epoll.modify(self._others_fd, 0)
        if self._served >= 0 and self._served not in self._shared:
            self._held = self._served
            _set_mask(self._epoll, self._masks, self._held, 0)
        return self._held

    def serve(self, ready: ReadyEvents, goes_on: Callable[[], bool]) -> None:
        """Call the direct readers and writers of ready descriptors, in the relief thread, while `goes_on` is true."""
        for fd, event in ready:
            reader = self._readers.get(fd)
            if reader is not None and event != select.EPOLLOUT:
                reader()
                event &= select.EPOLLOUT
            writer = self._writers.get(fd)
            if event and writer is not None:
                writer()
            if not goes_on():
                return

    def wait(self, timeout: float) -> None:
        """Wait for an event of the server's descriptors, `timeout` seconds at most. For the relief thread."""
        with suppress(InterruptedError):
            self._epoll.poll(timeout, 1)

    def unhold(self) -> None:
        """End what `hold` began."""
        self._epoll.modify(self._others_fd, select.EPOLLIN)
        fd, self._held = self._held, -1
        if fd >= 0:
            with suppress(OSError):  # the descriptor may be closed already
                self._update_direct(fd)

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
        self._finish_reading()
        number = len(self._next_turn)
        until_due = max(0.0, self.timers.next_due - self.timers.seconds())
        timeout = 0 if number else until_due if timeout is None else min(timeout, until_due)
        events = self.dispatch(self.poll(None if timeout == math.inf else timeout))
        self.run_calls(number)
        return events

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
        for registered in (self._keys, self._readers, self._writers, self._masks, self._other_masks):
            registered.clear()
        self._guests.clear()
        os.close(self._wakeup)
        self._others.close()
        self._epoll.close()

    def _update_epoll(self, fd: int) -> None:
        """Register the events that asyncio wants of `fd`, or remove it from epoll(7)."""
        key = self._keys.get(fd)
        events = key.events if key is not None else 0
        mask = select.EPOLLIN if events & EVENT_READ else 0
        mask |= select.EPOLLOUT if events & EVENT_WRITE else 0
        _set_mask(self._others, self._other_masks, fd, mask)


def _set_mask(epoll: select.epoll, masks: dict[int, int], fd: int, mask: int) -> None:
    """Wait for the events of `mask` of `fd`, none with 0. masks: the registered ones. Raises OSError."""
    before = masks.pop(fd, 0)
    if mask and before:
        epoll.modify(fd, mask)
    elif mask:
        epoll.register(fd, mask)
    elif before:
        with suppress(OSError):  # the descriptor may be closed already
            epoll.unregister(fd)
    if mask:
        masks[fd] = mask


def _call(function: Callable[[], object]) -> None:
    try:
        function()
    except Exception:
        _log.failure("a queued call of the server raised; the loop goes on")
