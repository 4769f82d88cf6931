"""Hand-over of established connections from a worker to another process: the messages, and the worker's parts for it.

The supervisor gives each of the two processes one end of a stream (`realtime.process.fd_stream`). The *source*
(`handover_source`) moves connections to the *target* (`handover_target`) in batches; `realtime.protocol.handover` moves
their sessions:

    source                                             target
    Offered                          ─────────────▶
                                     ◀─────────────    Accepted, or Refused
    suspends some connections
    Announced (channels of a batch)  ─────────────▶    expects their events
                                     ◀─────────────    Expected
    cuts, and exports them
    Moved (state, descriptors)       ─────────────▶    restores them
                                     ◀─────────────    Taken
    Sent                             ─────────────▶

HTTP connections without a request go as they are (MovedHTTP).

A connection is served once. Beside the descriptors, a Moved message carries a *claim*, an eventfd(2) with the value 1
(see `realtime.process.fd_passing`): the process that reads it owns the connections of the message. The target reads it
before it touches one of them, and the source reads it to take them back when the target does not answer, or has ended.
The source keeps its copies of the descriptors until the answer. What comes back is closed with 3001; connections that
the target has claimed before it died are closed without a close frame, as it may have written to them.

A connection whose commands take too long stays with the source, and so does all that a failure before the cut leaves.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Union

import msgspec
from msgspec import Struct
from twisted.logger import Logger
from twisted.python.failure import Failure

from realtime.handlers.coroutines import drive
from realtime.process import transport
from realtime.process.transport import DirectServer
from realtime.protocol.context import SessionServices
from realtime.protocol.handover import HandedSession
from realtime.protocol.session import Session
from realtime.transports.admission import Admission
from realtime.transports.connection import HandedConnection, HandOverEndpoint, Unsupported
from realtime.transports.emulation import Emulation
from realtime.transports.frontend import HTTPFrontendFactory
from realtime.types import ClientInfo
from realtime.worker.lost_clients import DisconnectedHandler, report_ends

VERSION = 1
"""Of the messages below. Processes of different versions move nothing between each other."""

SLICE = 0.002
"""Seconds in which connections are exported or restored in one turn of the loop, at about 0.1 ms each."""

_log = Logger()


class HandOverMessage(Struct, frozen=True, array_like=True):
    """A message between source and target."""


class Offered(HandOverMessage, frozen=True, tag=1):
    """Source: the first message, the same in every version. address: of the source, see `engine.worker_address`."""

    version: int
    address: str


class Announced(HandOverMessage, frozen=True, tag=2):
    """Source: the channels of a batch of connections, and the secrets of its emulated clients."""

    batch: str
    connections: int
    channels: list[str]
    secrets: list[str]


class MovedConnection(Struct, frozen=True, array_like=True):
    connection: HandedConnection
    session: HandedSession


class Moved(HandOverMessage, frozen=True, tag=3):
    """Source: connections of a batch, after its cut. Comes with the claim and a descriptor for each of them."""

    batch: str
    connections: list[MovedConnection]


class MovedHTTP(HandOverMessage, frozen=True, tag=9):
    """Source: connections between two HTTP requests, or before their first one. Comes like `Moved`."""

    connections: int


class Sent(HandOverMessage, frozen=True, tag=4):
    """Source: the end of a batch, whether it was cut or not."""

    batch: str


class Accepted(HandOverMessage, frozen=True, tag=5):
    """Target: address as in `Offered`."""

    version: int
    address: str


class Refused(HandOverMessage, frozen=True, tag=6):
    """Target: it takes nothing over. reason: one readable line."""

    reason: str


class Expected(HandOverMessage, frozen=True, tag=7):
    """Target: the batch may be cut, unless there is an error."""

    batch: str
    error: str = ""


class Taken(HandOverMessage, frozen=True, tag=8):
    """Target: the answer to a message with connections. failures: "" for each connection that the target has, for each
    other one the reason why it is the source's again."""

    failures: list[str]


encode = msgspec.msgpack.Encoder().encode
"""Returns the bytes of a message."""

decode_at_source = msgspec.msgpack.Decoder(Union[Accepted, Refused, Expected, Taken]).decode  # noqa: UP007
"""Returns the message of a target. Raises msgspec.MsgspecError, like the next one."""

decode_at_target = msgspec.msgpack.Decoder(Union[Offered, Announced, Moved, MovedHTTP, Sent]).decode  # noqa: UP007
"""Returns the message of a source."""


class HandOverCounts(Struct, frozen=True):
    """The result of a hand-over, see `control.HandConnectionsOver`."""

    moved: int
    closed: int
    left: int
    reason: str
    bytes: int
    failures: list[dict[str, Any]]


class HandOverParts(Struct, frozen=True):
    """The parts of a worker that a hand-over works with.

    address: this process's, see `engine.worker_address`. restore: `handover.restore` from its batch on. endpoints: by
    the name of the transport. frontend: has the HTTP connections. transport: the class of TCP transports. disconnected:
    the application's handler, if any.
    """

    reactor: Any
    address: str
    services: SessionServices
    restore: Callable[[str, Any, HandedSession], Session]
    endpoints: Mapping[str, HandOverEndpoint]
    frontend: HTTPFrontendFactory
    transport: type[DirectServer]
    emulation: Emulation
    admission: Admission
    disconnected: DisconnectedHandler | None

    def open_connection(self, descriptor: int, handed: HandedConnection) -> Any:
        """Continue with a connection, still without a session. Owns the descriptor.

        Raises Unsupported, msgspec.MsgspecError and OSError; the connection is untouched then.
        """
        try:
            endpoint = self.endpoints.get(handed.transport)
            if endpoint is None:
                raise Unsupported(f"the transport {handed.transport} is off")
            connection = endpoint.restore_connection(handed)
        except BaseException:
            os.close(descriptor)
            raise
        stream = transport.take_over(self.reactor, descriptor, handed.peer, connection, self.transport)
        try:
            connection.take_over(stream, handed)
        except Exception:
            _log.failure("taking a connection over raised; it is aborted")
            stream.abortConnection()
        return connection

    def adopt_http(self, descriptor: int) -> None:
        """Serve an HTTP connection of another process. Owns the descriptor. Raises OSError."""
        with socket.socket(fileno=descriptor) as connection:
            transport.adopt(self.reactor, descriptor, connection.family, self.frontend, self.transport)

    def report_ends(self, clients: Iterable[ClientInfo], code: int, reason: str) -> None:
        """Call the application's `on_disconnected` for these clients."""
        if self.disconnected is not None:
            reports = report_ends(list(clients), self.disconnected, self.services.gather, code, reason)
            drive(reports, log_unexpected)


def log_unexpected(result: object, error: BaseException | None) -> None:
    """Log the exception of a part of a hand-over: for `drive`."""
    if error is not None:
        _log.failure("handing connections over raised", Failure(error))
