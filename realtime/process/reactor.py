"""The reactor of a child: Twisted's on asyncio's loop, with short ways where it is called most."""

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


class Reactor(asyncioreactor.AsyncioSelectorReactor):
    """Twisted's on asyncio, by a clock that never jumps; and without a logging context around each event (3 µs).

    A transport with `is_straight` is read by the poller itself.
    """

    seconds = staticmethod(time.monotonic)

    def __init__(self, loop: asyncio.AbstractEventLoop, poller: ReadingSelector) -> None:
        """poller: the loop's."""
        super().__init__(loop)
        self._poller = poller

    def addReader(self, reader: Any) -> None:
        if getattr(reader, "is_straight", False):
            if reader not in self._readers:
                fd = self._readers[reader] = reader.fileno()
                self._poller.read(fd, self._reading(reader))
            return
        self._add(reader, self._readers, self._asyncioEventloop.add_reader, True, super().addReader)

    def removeReader(self, reader: Any) -> None:
        if getattr(reader, "is_straight", False):
            fd = self._readers.pop(reader, None)
            if fd is not None:
                self._poller.forget(fd)
            return
        super().removeReader(reader)

    def _reading(self, server: Any) -> Callable[[], None]:
        """What reads a transport once. Whatever is not data, Twisted looks at again."""
        receive, most, received = server.socket.recv, server.bufferSize, server.protocol.dataReceived

        def read() -> None:
            try:
                data = receive(most)
            except OSError:
                data = b""
            if not data:
                self._readOrWrite(server, True)
                return
            try:
                received(data)
            except Exception as error:
                _log.failure("a connection failed on what it read")
                self._disconnectSelectable(server, error, True)

        return read

    def addWriter(self, writer: Any) -> None:
        self._add(writer, self._writers, self._asyncioEventloop.add_writer, False, super().addWriter)

    def _add(
        self, one: Any, known: dict[Any, int], add: Callable[..., object], read: bool, otherwise: Callable[[Any], None]
    ) -> None:
        if one in known:
            return
        fd = one.fileno()
        try:
            add(fd, self._readOrWrite, one, read)
        except OSError:  # not a descriptor that epoll(7) knows; Twisted has its own ways with those
            otherwise(one)
        else:
            known[one] = fd
