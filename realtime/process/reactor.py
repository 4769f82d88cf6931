"""The reactors of a child: the application's, which is Twisted's on asyncio, and the server's own.

    Reactor        `twisted.internet.reactor`: timers, descriptors and calls from threads go through asyncio's queue
    ServerReactor  the same interface for the server's own code: its descriptors have direct readers and writers, and
                   its timers and calls from threads are the selector's (`realtime.process.selector`)

Both run in the loop's thread. While application code blocks that thread, the relief thread does what is the server's
(`realtime.process.relief`); the application's waits.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from twisted.internet import asyncioreactor
from twisted.internet.posixbase import _NO_FILEDESC, _DisconnectSelectableMixin
from twisted.logger import Logger

from realtime.process import log
from realtime.process.selector import ReadingSelector
from realtime.process.transport import DirectConnector

_log = Logger(observer=log.observer)


def turn_end_caller(reactor: Any) -> Callable[[Callable[[], None]], object]:
    """Return a function that has its argument called at the end of this turn of the loop, or in the next one.

    reactor: the loop's. With another one than those of this module, the end of a turn is the beginning of the next.
    """
    caller: Callable[[Callable[[], None]], object] | None = getattr(reactor, "call_at_turn_end", None)
    return caller or asyncio.get_running_loop().call_soon


def next_turn_caller(reactor: Any) -> Callable[[Callable[[], None]], object]:
    """Return a function that has its argument called in the loop's next turn; see `turn_end_caller`."""
    caller: Callable[[Callable[[], None]], object] | None = getattr(reactor, "call_next_turn", None)
    return caller or asyncio.get_running_loop().call_soon


class ServerReactor(_DisconnectSelectableMixin):
    """The reactor of the server's own code. Other methods than those here are Twisted's, and run on the loop alone.

    call_at_turn_end: see `turn_end_caller`. call_next_turn: see the selector. held: the reader or writer that relief
    leaves to the loop's thread, None without relief.
    """

    seconds = staticmethod(time.monotonic)

    def __init__(self, twisted: Any, selector: ReadingSelector) -> None:
        """twisted: the application's reactor, on the loop of `selector`."""
        self._twisted = twisted
        self._selector = selector
        self._readers: dict[Any, int] = {}
        self._writers: dict[Any, int] = {}
        self._lost: list[Callable[[], None]] = []  # the end of a connection that was held
        self.held: Any = None
        self.callLater = selector.timers.callLater
        self.getDelayedCalls = selector.timers.getDelayedCalls
        self.call_at_turn_end = selector.call_after_reading
        self.call_next_turn = selector.call_next_turn

    def __getattr__(self, name: str) -> Any:
        return getattr(self._twisted, name)

    def callFromThread(self, function: Callable[..., object], *args: Any, **kw: Any) -> None:
        """See `IReactorFromThreads`."""
        self._selector.call_from_thread(partial(function, *args, **kw))

    def connectTCP(self, host: str, port: int, factory: Any, timeout: float = 30, bindAddress: Any = None) -> Any:
        """See `IReactorTCP`. The transport writes immediately, see `DirectConnection`."""
        connector = DirectConnector(host, port, factory, timeout, bindAddress, self)
        connector.connect()
        return connector

    # Descriptors

    def addReader(self, reader: Any) -> None:
        if reader in self._readers:
            return
        fd = reader.fileno()
        is_stream = getattr(reader, "reads_directly", "") == "stream"
        read = self._make_stream_reader(reader) if is_stream else partial(self._read, reader)
        is_known = getattr(getattr(reader, "protocol", None), "is_known", True)
        guest = None if is_known else reader
        self._selector.add_direct_reader(fd, read, getattr(reader, "is_shared", False), guest)
        self._readers[reader] = fd

    def removeReader(self, reader: Any) -> None:
        fd = self._readers.pop(reader, None)
        if fd is not None:
            self._selector.remove_direct_reader(fd)

    def addWriter(self, writer: Any) -> None:
        if writer not in self._writers:
            fd = writer.fileno()
            self._selector.add_direct_writer(fd, partial(self._write, writer))
            self._writers[writer] = fd

    def removeWriter(self, writer: Any) -> None:
        fd = self._writers.pop(writer, None)
        if fd is not None:
            self._selector.remove_direct_writer(fd)

    def getReaders(self) -> list[Any]:
        return list(self._readers)

    def getWriters(self) -> list[Any]:
        return list(self._writers)

    def removeAll(self) -> list[Any]:
        """Remove all readers and writers, and return them, as the reactor does at its end."""
        removed = list(self._readers | self._writers)
        for each in removed:
            self.removeReader(each)
            self.removeWriter(each)
        return removed

    def _make_stream_reader(self, transport: Any) -> Callable[[], None]:
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
                self._read(transport)
                return
            try:
                transport.protocol.dataReceived(data)
            except Exception as error:
                _log.failure("a protocol raised an exception while handling received data; closing its connection")
                self._disconnectSelectable(transport, error, True)

        return read

    def _read(self, selectable: Any) -> None:
        self._read_or_write(selectable, selectable.doRead, True)

    def _write(self, selectable: Any) -> None:
        self._read_or_write(selectable, selectable.doWrite, False)

    def _read_or_write(self, selectable: Any, method: Callable[[], Any], is_read: bool) -> None:
        if selectable.fileno() == -1:
            self._disconnectSelectable(selectable, _NO_FILEDESC, is_read)
            return
        try:
            why = method()
        except Exception as error:
            _log.failure("a descriptor's protocol raised an exception; closing the descriptor")
            why = error
        if why:
            self._disconnectSelectable(selectable, why, is_read)

    def _disconnectSelectable(self, selectable: Any, *reason: Any) -> None:
        """Called for a lost connection, and for one whose protocol raised an exception.

        A protocol that raises once more must not end the loop, which the selector's own reads would pass it to.
        """
        try:
            super()._disconnectSelectable(selectable, *reason)
        except Exception:
            _log.failure("a protocol raised an exception at the end of its connection")

    # Relief

    def hold(self, fd: int) -> None:
        """Hold the connection of `fd`, which the loop's thread is serving, until `unhold`."""
        for descriptors in (self._readers, self._writers):
            for selectable, each in descriptors.items():
                if each == fd:
                    self.held = selectable
                    return

    def unhold(self) -> None:
        """End `hold`. If the connection was lost meanwhile, its protocol learns so in the next turn."""
        self.held = None
        lost, self._lost = self._lost, []
        for function in lost:
            self._selector.call_next_turn(function)

    def lose_later(self, connection_lost: Callable[[], None]) -> None:
        """Call the `connectionLost` of the held connection after `unhold`."""
        self._lost.append(connection_lost)


class Reactor(asyncioreactor.AsyncioSelectorReactor):
    """Twisted's asyncio reactor with a monotonic clock, and without a logging context around each event (3 µs).

    server: the reactor of the server's own code, which has the readers and writers with `reads_directly`.
    """

    seconds = staticmethod(time.monotonic)

    def __init__(self, loop: asyncio.AbstractEventLoop, selector: ReadingSelector) -> None:
        """selector: that of `loop`."""
        super().__init__(loop)
        self.server = ServerReactor(self, selector)

    def addReader(self, reader: Any) -> None:
        if getattr(reader, "reads_directly", False):
            self.server.addReader(reader)
        else:
            self._add(reader, self._readers, self._asyncioEventloop.add_reader, True, super().addReader)

    def removeReader(self, reader: Any) -> None:
        self.server.removeReader(reader)
        super().removeReader(reader)

    def addWriter(self, writer: Any) -> None:
        if getattr(writer, "reads_directly", False):
            self.server.addWriter(writer)
        else:
            self._add(writer, self._writers, self._asyncioEventloop.add_writer, False, super().addWriter)

    def removeWriter(self, writer: Any) -> None:
        self.server.removeWriter(writer)
        super().removeWriter(writer)

    def getReaders(self) -> list[Any]:
        return [*super().getReaders(), *self.server.getReaders()]

    def getWriters(self) -> list[Any]:
        return [*super().getWriters(), *self.server.getWriters()]

    def removeAll(self) -> list[Any]:
        return [*super().removeAll(), *self.server.removeAll()]

    def _disconnectSelectable(self, selectable: Any, *reason: Any) -> None:
        """See `ServerReactor._disconnectSelectable`."""
        try:
            super()._disconnectSelectable(selectable, *reason)
        except Exception:
            _log.failure("a protocol raised an exception at the end of its connection")

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
