"""The control plane: AMP over a socketpair between the supervisor and each of its processes.

It carries control alone, at low volume; publications have their own way (`realtime.server.broker`). The supervisor
is the one that introduces worker and broker to each other: it makes a socketpair and gives each of them an end, so
there is no path in the file system to guard and nobody else can connect.
"""

from __future__ import annotations

from twisted.internet.interfaces import ITransport
from twisted.internet.protocol import connectionDone
from twisted.protocols import amp
from twisted.python.failure import Failure


class Peer(amp.AMP):
    """One end of the control plane. Twisted's own AMP logs each connection; ours are told of by those who own them."""

    def makeConnection(self, transport: ITransport) -> None:
        amp.BinaryBoxProtocol.makeConnection(self, transport)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        amp.BinaryBoxProtocol.connectionLost(self, reason)
        self.transport = None


class Ready(amp.Command):
    """Process -> supervisor: serving. A worker sends it when its app is loaded and its sockets are open."""


class Failed(amp.Command):
    """Process -> supervisor: can't start, for this reason (one readable line). Exit status 78 follows."""

    arguments = [(b"reason", amp.Unicode())]


class Link(amp.Command):
    """Supervisor -> worker and broker: your end of a fresh data-plane stream to each other.

    slot: the worker's slot, for both. It replaces the stream that was there before, if any.
    """

    arguments = [(b"slot", amp.Integer()), (b"stream", amp.Descriptor())]


class LinkLost(amp.Command):
    """Worker -> supervisor: my stream to the broker ended; introduce us again."""


class Adopt(amp.Command):
    """Supervisor -> worker: adopt the connections that come over this stream, see `realtime.server.handover`."""

    arguments = [(b"stream", amp.Descriptor())]


class Collect(amp.Command):
    """Supervisor -> process: your metrics now, as the bytes of `realtime.metrics.dump`."""

    response = [(b"metrics", amp.String())]


class Report(amp.Command):
    """Supervisor -> process: tell of yourself. what: one of `realtime.server.reports.REPORTS`. text: UTF-8, or cut."""

    arguments = [(b"what", amp.Unicode())]
    response = [(b"text", amp.String())]


class Drain(amp.Command):
    """Supervisor -> process: take no more work, have clients reconnect, finish, and exit 0 within `timeout` seconds."""

    arguments = [(b"timeout", amp.Float())]
