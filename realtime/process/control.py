"""The control plane: AMP over a socketpair between the supervisor and each of its processes.

It carries control alone, at low volume; publications have their own way (`realtime.broker.process`). The supervisor
is the one that introduces worker and broker to each other: it makes a socketpair and gives each of them an end, so
there is no path in the file system to guard and nobody else can connect.
"""

from __future__ import annotations

from typing import Any

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


class Long(amp.Argument):
    """Bytes of any length up to LONGEST. A value of AMP's ends at 64 KiB, but a message has any number of values."""

    LONGEST = 16 << 20

    def toBox(self, name: bytes, strings: dict[bytes, bytes], objects: dict[str, Any], proto: Any) -> None:
        """Called by twisted. What is too long is cut: a failure here would end the link."""
        data = objects[name.decode()][: self.LONGEST]
        starts = range(0, len(data) or 1, amp.MAX_VALUE_LENGTH)
        strings.update((_part(name, number), data[at : at + amp.MAX_VALUE_LENGTH]) for number, at in enumerate(starts))

    def fromBox(self, name: bytes, strings: dict[bytes, bytes], objects: dict[str, Any], proto: Any) -> None:
        """Called by twisted."""
        parts: list[bytes] = []
        while (part := strings.pop(_part(name, len(parts)), None)) is not None:
            parts.append(part)
        objects[name.decode()] = b"".join(parts)


def _part(name: bytes, number: int) -> bytes:
    return b"%b-%d" % (name, number)


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
    """Supervisor -> worker: adopt the connections that come over this stream, see `realtime.process.fd_passing`."""

    arguments = [(b"stream", amp.Descriptor())]


class Collect(amp.Command):
    """Supervisor -> process: your metrics now, as the bytes of `realtime.metrics.dump`. names: only these; or all."""

    arguments = [(b"names", amp.ListOf(amp.Unicode()))]
    response = [(b"metrics", Long())]


class Report(amp.Command):
    """Supervisor -> process: tell of yourself. what: one of `realtime.process.diagnostics.REPORTS`. text: UTF-8."""

    arguments = [(b"what", amp.Unicode())]
    response = [(b"text", Long())]


class Drain(amp.Command):
    """Supervisor -> process: take no more work, have clients reconnect, finish, and exit 0 within `timeout` seconds."""

    arguments = [(b"timeout", amp.Float())]
