"""A worker's listening sockets: the supervisor opened them, and the worker adopts its copies."""

from __future__ import annotations

import socket
from typing import Any

from twisted.internet.protocol import Factory
from twisted.logger import ILogObserver, LogEvent, Logger, formatEvent
from zope.interface import implementer

# New connections taken in one turn of a worker's loop: their handshakes follow together, half a millisecond each.
ACCEPTS = 4

# Seconds between two lines of the log about clients that were turned away.
SELDOM = 60.0

_log = Logger()


def adopt(reactor: Any, fd: int, factory: Factory) -> Any:
    """Accept connections from the inherited listening socket `fd`, which is closed here: the port has its own copy.

    Returns the IListeningPort. Its `stopListening` ends that copy alone; the socket and its queue go on in the
    supervisor.
    """
    factory.noisy = False
    with socket.socket(fileno=fd) as inherited:
        inherited.setblocking(False)
        port = reactor.adoptStreamPort(fd, inherited.family, factory)
    port._logger = Logger(observer=_Seldom(reactor))
    accept = port.doRead

    def accept_some() -> None:
        # Twisted takes ever more in one turn of the loop while the queue stays full; the clients that we have wait.
        port.numberAccepts = min(port.numberAccepts, ACCEPTS)
        accept()

    port.doRead = accept_some
    return port


@implementer(ILogObserver)
class _Seldom:
    """Twisted writes three lines for each client that it has no descriptor for. Of those, some are enough."""

    def __init__(self, reactor: Any) -> None:
        self._reactor = reactor
        self._silent_until = 0.0

    def __call__(self, event: LogEvent) -> None:
        now = self._reactor.seconds()
        if now >= self._silent_until:
            self._silent_until = now + SELDOM
            _log.warn("clients are turned away, see `ulimit -n`: {what}", what=formatEvent(event))
