"""A worker's listening ports: the supervisor opened the sockets, and the worker adopts its copies.

A TLS listener would be another kind of `ListeningPort` here; sockets that a previous worker hands over are adopted in
the same way.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

from twisted.internet import tcp
from twisted.internet.interfaces import IProtocolFactory
from twisted.internet.protocol import Factory
from twisted.logger import ILogObserver, LogEvent, Logger, formatEvent
from zope.interface import implementer

from realtime.repetition import Repetition
from realtime.supervision.loop_time import LoopTimeLedger, LoopWork

# Connections accepted in one turn of the loop: their handshakes follow together, at half a millisecond each.
MAX_ACCEPTS = 4

_log = Logger()


class ListeningPort(tcp.Port):
    """A port on an inherited listening socket, which accepts few connections in one turn of the loop.

    `stopListening` ends this process's copy of the socket alone; the socket and its queue live on in the supervisor.
    """

    def __init__(
        self,
        fd: int,
        factory: IProtocolFactory,
        reactor: Any,
        transport: type[tcp.Server] = tcp.Server,
        ledger: LoopTimeLedger | None = None,
        is_busy: Callable[[], bool] = lambda: False,
    ) -> None:
        """fd: the inherited socket; it is closed here, as the port makes its own copy. transport: of the connections.

        is_busy: whether work for earlier connections waits; then one is accepted in each turn. ledger: has the time for
        accepting connections charged to HTTP; None charges nothing.
        """
        with socket.socket(fileno=fd) as inherited:
            inherited.setblocking(False)
            interface, port_number, *_ = inherited.getsockname()
            super().__init__(port_number, factory, interface=interface, reactor=reactor)
            # As `tcp.Port._fromListeningDescriptor` does, which can't pass on further arguments.
            self._preexistingSocket = socket.fromfd(fd, inherited.family, inherited.type)
        # The application may have set a default timeout, and accept(2) would then wait for it in the loop.
        self._preexistingSocket.setblocking(False)
        self.transport = transport
        self._is_busy = is_busy
        self._factory: Any = factory
        self._ledger = ledger or LoopTimeLedger(int)
        self._account = self._ledger.open(LoopWork.HTTP)
        self._logger = Logger(observer=_DescriptorShortageLog(reactor))

    def startListening(self) -> None:
        super().startListening()
        listening: Any = self.socket
        self._kind = int(listening.family), int(listening.type), listening.proto

    def doRead(self) -> None:
        charged_before = self._ledger.switch(self._account)
        try:
            self._accept_some()
        except OSError:
            # While the queue stays full, Twisted accepts more connections in each turn, and the connected clients wait.
            self.numberAccepts = min(self.numberAccepts, MAX_ACCEPTS)
            super().doRead()  # finds the error again, and handles it
        finally:
            self._ledger.switch(charged_before)

    def _accept_some(self) -> None:
        """Accept up to MAX_ACCEPTS connections, as Twisted does but without its searches. Raises OSError."""
        listening: Any = self.socket
        limit = self.numberAccepts = 1 if self._is_busy() else min(self.numberAccepts, MAX_ACCEPTS)
        count = 0
        while count < limit:
            try:
                fd, address = listening._accept()
            except BlockingIOError:
                break
            count += 1
            # The class below `socket.socket`: twice as fast to make, and with all that a transport needs.
            self._serve(socket.SocketType(*self._kind, fd), address)
        # An accept(2) that fails costs as much as one that succeeds: next time try no more often than it succeeded now.
        self.numberAccepts = MAX_ACCEPTS if count == limit else max(1, count)

    def _serve(self, accepted: Any, address: Any) -> None:
        if len(address) == 4 and address[3]:  # a link-local IPv6 address: its text includes the interface
            host, _ = socket.getnameinfo(address, socket.NI_NUMERICHOST | socket.NI_NUMERICSERV)
            address = (host, *address[1:])
        transport = None
        try:
            protocol = self._factory.buildProtocol(None)
            number = self.sessionno
            self.sessionno = number + 1
            transport = self.transport(accepted, protocol, address, self, number, self.reactor)
            protocol.makeConnection(transport)
        except Exception:
            _log.failure("making the protocol of an accepted connection raised; closing the connection")
            if transport is None:
                accepted.close()
            else:
                transport.abortConnection()


def adopt(
    reactor: Any,
    fd: int,
    factory: Factory,
    transport: type[tcp.Server] = tcp.Server,
    ledger: LoopTimeLedger | None = None,
    is_busy: Callable[[], bool] = lambda: False,
) -> ListeningPort:
    """Accept connections from the inherited listening socket `fd`; see `ListeningPort` for the arguments."""
    factory.noisy = False
    port = ListeningPort(fd, factory, reactor, transport, ledger, is_busy)
    port.startListening()
    return port


@implementer(ILogObserver)
class _DescriptorShortageLog:
    """Logs one of the events that Twisted emits about clients it has no descriptor for: there are three per client."""

    def __init__(self, reactor: Any) -> None:
        self._reactor = reactor
        self._repetition: Repetition[str] = Repetition()

    def __call__(self, event: LogEvent) -> None:
        if self._repetition.admit("", self._reactor.seconds()) is not None:
            _log.warn(
                "no descriptor is left for new clients, which are turned away; raise the limit of open files "
                "(`ulimit -n`): {event}",
                event=formatEvent(event),
            )
