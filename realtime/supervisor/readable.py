"""Descriptors that the reactor watches."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from twisted.internet import fdesc
from twisted.internet.interfaces import IReadDescriptor
from twisted.python.failure import Failure
from zope.interface import implementer


@implementer(IReadDescriptor)
class Readable:
    """Calls a function whenever its descriptor can be read, until `close`. Owns the descriptor."""

    def __init__(self, reactor: Any, fd: int, ready: Callable[[], None]) -> None:
        self._reactor = reactor
        self._fd = fd
        self._ready = ready
        reactor.addReader(self)

    def close(self) -> None:
        """Close the descriptor. Idempotent."""
        if self._fd >= 0:
            self._reactor.removeReader(self)
            os.close(self._fd)
            self._fd = -1

    # Called by Twisted.

    def fileno(self) -> int:
        return self._fd

    def doRead(self) -> None:
        self._ready()

    def logPrefix(self) -> str:
        return "-"

    def connectionLost(self, reason: Failure) -> None:
        self.close()


def read_pipe(reactor: Any, fd: int, received: Callable[[bytes], None]) -> Readable:
    """Read a pipe until its end, and close it then. Owns the descriptor."""
    os.set_blocking(fd, False)

    def read() -> None:
        if fdesc.readFromFD(fd, received) is not None:
            pipe.close()

    pipe = Readable(reactor, fd, read)
    return pipe
