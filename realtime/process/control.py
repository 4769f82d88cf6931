"""The control plane: AMP over a socketpair between the supervisor and each of its processes.

It carries commands and metrics, at low volume; publications have a data plane of their own (`realtime.process.link`).
The supervisor connects each worker to the broker: it makes a socketpair and gives each of the two an end. So there is
no path in the file system to guard, and no other process can connect.
"""

from __future__ import annotations

from typing import Any

from twisted.internet.interfaces import ITransport
from twisted.internet.protocol import connectionDone
from twisted.logger import Logger
from twisted.protocols import amp
from twisted.python.failure import Failure

from realtime.process import log

# The most of an invalid message that is logged.
_LOGGED_BYTES = 200

_log = Logger(observer=log.observer)


class Peer(amp.AMP):
    """One end of the control plane.

    Twisted's AMP logs each connection and its end; here the owners of the connections log what is worth a line.

    sent_descriptors: number of the descriptors that have been sent. The other end counts them too. has_failed: whether
    this end has ended the link, for a reason in the log.
    """

    sent_descriptors = 0
    has_failed = False

    def __init__(self) -> None:
        super().__init__()
        self._getDescriptor = self._take_descriptor  # type: ignore[assignment]

    def makeConnection(self, transport: ITransport) -> None:
        amp.BinaryBoxProtocol.makeConnection(self, transport)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        amp.BinaryBoxProtocol.connectionLost(self, reason)
        self.transport = None

    def _sendFileDescriptor(self, descriptor: int) -> int:
        """Called by twisted: send a descriptor, and return its number for the message."""
        transport: Any = self.transport
        transport.sendFileDescriptor(descriptor)
        self.sent_descriptors += 1
        return self.sent_descriptors - 1

    def _take_descriptor(self, number: int) -> int:
        """Called by twisted: return a descriptor of a message. Ends the link if it was lost, as the others' numbers are
        wrong from now on."""
        descriptor: int | None = self._descriptors.pop(number, None)
        if descriptor is None:
            self.has_failed = True
            _log.error(
                "a control link ends: a descriptor was lost, as this process has no room for it; raise the limit of"
                " open files (`ulimit -n`)"
            )
            raise amp.RemoteAmpError(b"DESCRIPTOR_LOST", "it has no room for a descriptor", fatal=True)
        return descriptor

    @property
    def is_quiet(self) -> bool:
        """Whether nothing is under way at this end: no request without its answer, no part of a message."""
        transport: Any = self.transport
        if transport is None or self._outstandingRequests:
            return False
        return not (self._currentBox or self._unprocessed or transport.dataBuffer or transport._tempDataBuffer)

    # A peer that sends anything but our commands is broken: the link ends, and with it the child.

    def dataReceived(self, data: bytes) -> None:
        try:
            super().dataReceived(data)
        except (amp.AmpError, KeyError, ValueError) as error:  # no command, no text, or an answer to no request
            self._end_link(repr(error))

    def locateResponder(self, name: bytes) -> Any:
        responder = None if name == amp.StartTLS.commandName else super().locateResponder(name)
        if responder is None:
            self._end_link(f"unknown command {name[:_LOGGED_BYTES]!r}")
        return responder

    def _end_link(self, reason: str) -> None:
        self.has_failed = True
        _log.error("a control link ends: the peer sent an invalid message ({reason})", reason=reason[:_LOGGED_BYTES])
        transport: Any = self.transport
        if transport is not None:
            transport.abortConnection()


class Long(amp.Argument):
    """Bytes of any length up to LONGEST, in parts: a value of AMP holds 64 KiB, a message any number of values."""

    LONGEST = 16 << 20

    def toBox(self, name: bytes, strings: dict[bytes, bytes], objects: dict[str, Any], proto: Any) -> None:
        """Called by twisted. Cuts the bytes at LONGEST: an error here would end the link."""
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
    """Process -> supervisor: the process serves. A worker has loaded its app and opened its sockets by then."""


class Failed(amp.Command):
    """Process -> supervisor: the process can't start. reason: one readable line. status: its exit status."""

    arguments = [(b"reason", amp.Unicode()), (b"status", amp.Integer())]


class AttachStream(amp.Command):
    """Supervisor -> worker and broker: the receiver's end of a fresh data-plane stream between the two.

    slot: the worker's slot, in both messages. The stream replaces the previous one, if any.
    """

    arguments = [(b"slot", amp.Integer()), (b"stream", amp.Descriptor())]


class LinkLost(amp.Command):
    """Worker -> supervisor: the worker's stream to the broker has ended and a fresh one is needed."""


class Adopt(amp.Command):
    """Supervisor -> worker: adopt the connections that arrive over this stream, see `realtime.process.fd_passing`."""

    arguments = [(b"stream", amp.Descriptor())]


class TakeConnectionsOver(amp.Command):
    """Supervisor -> worker: take over the connections that arrive over this stream, see `realtime.worker.handover`."""

    arguments = [(b"stream", amp.Descriptor())]


class HandConnectionsOver(amp.Command):
    """Supervisor -> process: hand connections over to another process, over this stream, within `timeout` seconds. The
    broker hands its state over, and the streams to the workers, which it counts as connections.

    connections: their number; -1 for all, and then the worker accepts no further ones. moved, closed, left: what became
    of them. reason: why the hand-over ended early, "" if it did not. bytes: of state sent. failures: numbers of
    connections that could not move, by reason; see docs/transports.md.
    """

    arguments = [(b"stream", amp.Descriptor()), (b"connections", amp.Integer()), (b"timeout", amp.Float())]
    response = [
        (b"moved", amp.Integer()),
        (b"closed", amp.Integer()),
        (b"left", amp.Integer()),
        (b"reason", amp.Unicode()),
        (b"bytes", amp.Integer()),
        (b"failures", amp.AmpList([(b"reason", amp.Unicode()), (b"count", amp.Integer())])),
    ]


class LimitLog(amp.Command):
    """Supervisor -> process: log events of this level or above from now on. level: as `log.level`."""

    arguments = [(b"level", amp.Unicode())]


class Collect(amp.Command):
    """Supervisor -> process: send the metrics. names: only these; empty for all. metrics: `realtime.metrics.dump`'s."""

    arguments = [(b"names", amp.ListOf(amp.Unicode()))]
    response = [(b"metrics", Long())]


class Report(amp.Command):
    """Supervisor -> process: send a report. what: one of `realtime.process.diagnostics.REPORTS`. text: UTF-8."""

    arguments = [(b"what", amp.Unicode())]
    response = [(b"text", Long())]


class Drain(amp.Command):
    """Supervisor -> process: refuse new work, disconnect clients, finish, and exit 0 within `timeout` seconds."""

    arguments = [(b"timeout", amp.Float())]
