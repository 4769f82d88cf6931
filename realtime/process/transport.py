"""A TCP transport that writes immediately.

Twisted's own transport buffers written data until the next loop turn, and then asks the selector to report the socket
as writable: two changes of the selector's set for every frame, which cost more than the send(2) itself. A socket nearly
always accepts a frame at once. `DirectConnection` therefore calls send(2) first, and leaves to Twisted only the bytes
that the kernel refused. From then on, until Twisted's buffer is empty again, all writes go through Twisted: the order
of bytes, producers and `loseConnection` behave as in Twisted.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

from twisted.internet import tcp
from twisted.internet.protocol import Factory, Protocol


class DirectConnection(tcp.Connection):
    """One side of a TCP connection.

    reads_directly: the selector itself calls the protocol's `dataReceived`, if the reactor supports it
    (`realtime.process.reactor`): "stream" to read the socket there, "reader" to call `doRead`.
    """

    reads_directly: str = "stream"

    def connectionLost(self, reason: Any) -> None:
        reactor: Any = self.reactor
        if getattr(reactor, "held", None) is self:
            # The loop's thread is in the midst of this connection, and application code blocks it.
            reactor.lose_later(lambda: self.connectionLost(reason))
            return
        super().connectionLost(reason)

    def write(self, data: bytes) -> None:
        buffered = self._tempDataLen or self.dataBuffer
        if buffered or not self.connected or self.disconnecting or self._writeDisconnecting or self.TLS:
            super().write(data)
            return
        try:
            sent = self.socket.send(data)
        except OSError:
            # The socket buffer is full, or the connection is lost. In the second case Twisted's own write fails later
            # and calls `connectionLost` from the loop: a protocol must not lose its connection inside `write`.
            sent = 0
        if sent < len(data):
            super().write(data[sent:])

    @property
    def is_buffering(self) -> bool:
        """Whether bytes are buffered here that the kernel has not taken."""
        return bool(self._tempDataLen or self.dataBuffer)

    @property
    def buffered(self) -> int:
        """The number of bytes buffered here."""
        return self._tempDataLen + len(self.dataBuffer) - self.offset

    @property
    def unsent(self) -> bytes:
        """The bytes buffered here."""
        return bytes(self.dataBuffer[self.offset :]) + b"".join(self._tempDataBuffer)

    @property
    def direct_send(self) -> Callable[[bytes], int] | None:
        """The socket's send(2), for callers that use it only while nothing is buffered here. None under TLS.

        See `pause_producer_if_buffering`.
        """
        return None if self.TLS else self.socket.send

    def _getLogPrefix(self, applicationObject: object) -> str:
        # Twisted puts it into a text for its log, for each connection. Its own search for it takes longer.
        return type(applicationObject).__name__

    def detach(self) -> tuple[int, bytes]:
        """Give up the connection: return its descriptor and the bytes that the kernel has not taken.

        The reactor serves it no more, and the protocol sees no end. The caller owns the descriptor. To close it leaves
        the connection to other holders of the socket, as there is no shutdown(2).
        """
        unsent = self.unsent
        self.stopReading()
        self.stopWriting()
        self.connected, self.disconnected = 0, 1
        self.producer = None
        self.protocol = Protocol()  # the connection's own would be kept alive by it, and the other way round
        self.dataBuffer, self.offset, self._tempDataBuffer, self._tempDataLen = b"", 0, [], 0
        return self.socket.detach(), unsent

    def pause_producer_if_buffering(self) -> None:
        """Pause the producer if any byte is buffered here; Twisted resumes it when the buffer is empty.

        Twisted itself pauses a producer only above its buffer limit.
        """
        producer: Any = self.producer
        if (self._tempDataLen or self.dataBuffer) and producer is not None:
            self.producerPaused = True
            producer.pauseProducing()


class DirectServer(DirectConnection, tcp.Server):
    """Server side of a TCP connection. Set it as `Port.transport`."""


class DirectClient(DirectConnection, tcp.Client):
    """Client side of a TCP connection. `DirectConnector` makes it."""


class DirectConnector(tcp.Connector):
    """Connects to a server. Call `connect`."""

    def _makeTransport(self) -> DirectClient:
        return DirectClient(self.host, self.port, self.bindAddress, self, self.reactor)


def adopt(
    reactor: Any, fd: int, family: socket.AddressFamily, factory: Factory, server: type[DirectServer] = DirectServer
) -> None:
    """Serve a connection that another process has accepted. The caller keeps and closes `fd`.

    Like `reactor.adoptStreamConnection`, but with a transport of class `server`. Raises OSError if the peer has gone,
    or if no descriptor is left for the reactor's duplicate.
    """
    server._fromConnectedSocket(fd, family, factory, reactor)


def take_over(
    reactor: Any, fd: int, peer: tuple[Any, ...], protocol: Any, server: type[DirectServer] = DirectServer
) -> DirectServer:
    """Make the transport of a connection that another process has served before. Takes ownership of `fd`.

    peer: the address of the peer, as accept(2) returns it; the peer may have gone since. The transport does not read
    before `resumeProducing`, and knows `protocol`, which the caller connects. Raises OSError.
    """
    connection: Any = socket.SocketType(fileno=fd)  # as for an accepted connection
    no_port: Any = None
    transport = server(connection, protocol, peer, no_port, 0, reactor)
    transport.pauseProducing()
    transport.repstr = f"<{type(protocol).__name__} taken over>"
    return transport
