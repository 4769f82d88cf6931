"""A TCP transport that writes at once.

Twisted's own keeps what is written until the loop's next turn and then asks to be told when the socket takes it: two
changes of the selector's set for every frame, which cost more than the send(2) itself. A socket nearly always takes a
frame at once; so this one tries first, and leaves to Twisted what the kernel refuses. From then on, and until all of
that is out, everything goes Twisted's way: order, producers and `loseConnection` are as ever.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

from twisted.internet import tcp
from twisted.internet.protocol import Factory


class DirectServer(tcp.Server):
    """The server side of a connection. Set it as `Port.transport`."""

    is_straight = False

    def write(self, data: bytes) -> None:
        queued = self._tempDataLen or self.dataBuffer
        if queued or not self.connected or self.disconnecting or self._writeDisconnecting or self.TLS:
            super().write(data)
            return
        try:
            sent = self.socket.send(data)
        except OSError:
            # Full, or lost. If lost, Twisted finds out when it writes, and tells the protocol then, not from in here.
            sent = 0
        if sent < len(data):
            super().write(data[sent:])

    @property
    def straight(self) -> Callable[[bytes], int] | None:
        """send(2) itself, for whoever watches that nothing waits here: see `hold`. None under TLS."""
        return None if self.TLS else self.socket.send

    def read_straight(self) -> None:
        """Have the reactor read without a detour from now on, if it can. The protocol stays the same from now on."""
        if not self.TLS:
            self.stopReading()
            self.is_straight = True
            self.startReading()

    def hold(self) -> None:
        """Pause the producer if anything waits here, however little. It is resumed when all of that is out."""
        producer: Any = self.producer
        if (self._tempDataLen or self.dataBuffer) and producer is not None:
            self.producerPaused = True
            producer.pauseProducing()


def adopt(
    reactor: Any, fd: int, family: socket.AddressFamily, factory: Factory, server: type[DirectServer] = DirectServer
) -> None:
    """Serve a connection that another process has accepted. `fd` stays the caller's.

    As `reactor.adoptStreamConnection` does, with the transport `server`. Raises OSError when the peer has gone, or
    there is no descriptor for the reactor's own copy.
    """
    server._fromConnectedSocket(fd, family, factory, reactor)
