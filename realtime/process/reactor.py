"""The reactor of a child: Twisted's reactor on asyncio, with short paths for its most frequent calls."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from twisted.internet import asyncioreactor
from twisted.logger import Logger

from realtime.process import log
from realtime.process.selector import ReadingSelector

_log = Logger(observer=log.observer)


def turn_end_caller(reactor: Any) -> Callable[[Callable[[], None]], object]:
    """Return a function that has its argument called at the end of this turn of the loop, or in the next one.

    reactor: the loop's. With another one than `Reactor`, the end of a turn is the beginning of the next.
    """
    caller: Callable[[Callable[[], None]], object] | None = getattr(reactor, "call_at_turn_end", None)
    return caller or asyncio.get_running_loop().call_soon


class Reactor(asyncioreactor.AsyncioSelectorReactor):
    """Twisted's asyncio reactor with a monotonic clock, and without a logging context around each event (3 µs).

    The selector itself reads transports with `reads_directly`. call_at_turn_end: see `turn_end_caller`.
    """

    seconds = staticmethod(time.monotonic)

    def __init__(self, loop: asyncio.AbstractEventLoop, selector: ReadingSelector) -> None:
        """selector: that of `loop`."""
        super().__init__(loop)
        self._selector = selector
        self.call_at_turn_end = selector.call_after_reading

    def addReader(self, reader: Any) -> None:
        if getattr(reader, "reads_directly", False):
            if reader not in self._readers:
                fd = reader.fileno()
                self._selector.add_direct_reader(fd, self._make_direct_reader(reader))
                self._readers[reader] = fd
            return
        self._add(reader, self._readers, self._asyncioEventloop.add_reader, True, super().addReader)

    def removeReader(self, reader: Any) -> None:
        if getattr(reader, "reads_directly", False):
            fd = self._readers.pop(reader, None)
            if fd is not None:
                self._selector.remove_direct_reader(fd)
            return
        super().removeReader(reader)

    def _make_direct_reader(self, transport: Any) -> Callable[[], None]:
        """Build a function that reads `transport` once and passes the data to its protocol.

        It is called for each received segment, so socket and buffer size are looked up once, here. Twisted handles
        errors and the end of the stream: its own read finds them again.
        """
        recv, buffer_size = transport.socket.recv, transport.bufferSize

        def read() -> None:
            try:
                data = recv(buffer_size)
            except OSError:
                data = b""
            if not data:
                self._readOrWrite(transport, True)
                return
            try:
                transport.protocol.dataReceived(data)
            except Exception as error:
                _log.failure("a protocol raised an exception while handling received data; closing its connection")
                self._disconnectSelectable(transport, error, True)

        return read

    def _disconnectSelectable(self, selectable: Any, *reason: Any) -> None:
        """Called by Twisted for a lost connection, and for one whose protocol raised an exception.

        A protocol that raises once more must not end the loop, which the selector's own reads would pass it to.
        """
        try:
            super()._disconnectSelectable(selectable, *reason)
        except Exception:
            _log.failure("a protocol raised an exception at the end of its connection")

    def addWriter(self, writer: Any) -> None:
        self._add(writer, self._writers, self._asyncioEventloop.add_writer, False, super().addWriter)

    def _add(
        self,
        selectable: Any,
        descriptors: dict[Any, int],
        add: Callable[..., object],
        is_read: bool,
        fallback: Callable[[Any], None],
    ) -> None:
        """Add `selectable` to the loop and to `descriptors`, without Twisted's logging context."""
        if selectable in descriptors:
            return
        fd = selectable.fileno()
        try:
            add(fd, self._readOrWrite, selectable, is_read)
        except OSError:  # epoll(7) does not support this descriptor; Twisted has a fallback for it
            fallback(selectable)
        else:
            descriptors[selectable] = fd
