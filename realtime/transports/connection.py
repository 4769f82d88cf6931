"""Parts that client connections of all transports share: the session of a connection, its counters, its end.

`ClientConnection` is the base of `WebSocketConnection` and `StreamConnection`, and `ConnectionContext` holds the state
that all connections of one transport share.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import msgspec
from msgspec import Raw, Struct
from twisted.logger import Logger

from realtime.client_log import ClientLog
from realtime.config.settings import MessageSettings
from realtime.deadlines import Deadlines
from realtime.errors import SERVER_ERROR, RealtimeError
from realtime.http.handshake import OpeningRequest
from realtime.metrics import Metrics
from realtime.process import log
from realtime.transports.outbox import QueuedBytes
from realtime.transports.outgoing import FlushAtTurnEnd, HandedOutput, Outgoing

_log = Logger(observer=log.observer)
_encode = msgspec.msgpack.Encoder().encode


class TransportSession(Protocol):
    """The interface through which a transport calls the session of a connection."""

    def receive(self, payload: bytes) -> None:
        """Handle one whole message in the connection's encoding; a text message is valid UTF-8."""

    def closed(self) -> None:
        """Handle the loss of the connection. Called once."""

    def describe(self) -> dict[str, object]:
        """Return the facts about the client for the log."""


class ConnectionContext:
    """State shared by all connections of one transport; it implements `OutgoingContext`.

    open_session: called with a connection and its opening request; returns the connection's session. connects,
    received, sent: counters. Fan-out counts its messages itself, see `FanoutContext.sent`.
    """

    def __init__(
        self,
        open_session: Callable[[Any, OpeningRequest], TransportSession],
        websocket: MessageSettings,
        queue_max_size: int,
        deadlines: Deadlines,
        metrics: Metrics,
        client_log: ClientLog,
        queued: QueuedBytes | None = None,
        turn_end: FlushAtTurnEnd | None = None,
    ) -> None:
        """websocket: has the write and close timeouts. client_log: counts and logs refusals.

        queued: bytes queued over all transports. turn_end: the end of the loop's turns; None flushes at once.
        """
        self.open_session = open_session
        self.deadlines = deadlines
        self.write_timeout = websocket.write_timeout
        self.close_timeout = websocket.close_timeout
        self.queue_max_size = queue_max_size
        self.queued = queued or QueuedBytes()
        self.turn_end = turn_end or FlushAtTurnEnd()
        self.connects = metrics.counter("realtime_connects", "Connections of clients that were opened.")
        self.received = metrics.counter("realtime_messages_received", "Messages from clients.")
        self.sent = metrics.counter("realtime_messages_sent", "Messages to clients.")
        self._metrics = metrics
        self.client_log = client_log

    def count_disconnect(self, initiator: str, code: str) -> None:
        """Count the end of a connection.

        initiator: "server" or "client". code: `close_code_label` of the server's close code; "" for a client.
        """
        self._metrics.counter(
            "realtime_disconnects", "Connections that ended, by who ended them and why.", initiator=initiator, code=code
        ).value += 1


class HandedConnection(Struct, frozen=True, array_like=True):
    """A connection for another process, without its socket and its session.

    transport: see `ClientConnection.transport_name`. encoding: the name of the encoding. peer: the address of the peer,
    as accept(2) returns it. state: of the transport, a Struct of it as MessagePack.
    """

    transport: str
    encoding: str
    peer: tuple[str | int, ...]
    output: HandedOutput
    state: Raw


class HandOverEndpoint(Protocol):
    """A transport whose connections can be handed over."""

    def restore_connection(self, handed: HandedConnection) -> ClientConnection:
        """Make the connection of another process, without a socket. Raises msgspec.MsgspecError and Unsupported."""


class Unsupported(RealtimeError):
    """This process has no transport for a handed connection: its configuration differs."""


class ClientConnection(Outgoing):
    """A connection with a session: `send`, `sink`, `close` serve the session. Loop thread only.

    stop_receiving: has no further message passed to the session until `start_receiving`, for a hand-over.
    """

    stop_receiving: Callable[[], None]
    start_receiving: Callable[[], None]

    factory: Any  # a ConnectionContext
    _session: TransportSession | None = None
    _is_disconnect_counted = False
    release_address: Callable[[], None] | None = None  # set if the client's address has a limit of connections
    handed_state: Any = None  # what `restore` continues with, between `restore_connection` and `restore`

    def open_session(self, request: OpeningRequest) -> bool:
        """Open the session, or close the connection if that raises; return whether the session is open."""
        try:
            self._session = self.factory.open_session(self, request)
        except Exception:
            _log.failure("opening a session raised an exception; closing its connection")
            self.close(*SERVER_ERROR)
            return False
        return True

    def end_session(self) -> None:
        """Tell the session that its connection is lost, and count the disconnect. Idempotent."""
        session, self._session = self._session, None
        if session is None:
            return
        self._count_disconnect("client", "")
        try:
            session.closed()
        except Exception:
            _log.failure("a session raised an exception at the end of its connection")

    @property
    def transport_name(self) -> str:
        """The name of the transport, as the configuration spells it."""
        raise NotImplementedError

    def describe(self) -> dict[str, object]:
        if self._session is not None:
            return self._session.describe()
        return {"address": getattr(self.transport.getPeer(), "host", ""), "transport": self.transport_name}

    def release_place(self) -> None:
        """Count one connection less of the client's address. Idempotent."""
        release, self.release_address = self.release_address, None
        if release is not None:
            release()

    # Hand-over to another process

    @property
    def is_movable(self) -> bool:
        """Whether `hand_over` is possible now, after `stop_receiving`."""
        raise NotImplementedError

    def hand_over(self) -> tuple[int, HandedConnection]:
        """End here, without an end for the peer; return the descriptor of the socket, and what another process needs.

        The session has been exported before.
        """
        peer = self.transport.client
        self.release_place()
        self._session = None
        self._is_disconnect_counted = True
        state = self._take_state()
        descriptor, output = self.take_connection()
        name, encoding = self.transport_name, self.form.encoding.name
        return descriptor, HandedConnection(name, encoding, peer, output, Raw(_encode(state)))

    def _take_state(self) -> Struct:
        """Return the state of the transport, and count one connection less."""
        raise NotImplementedError

    def take_over(self, transport: Any, handed: HandedConnection) -> None:
        """Continue with the connection of another process. Nothing is received before `start_receiving`."""
        self.transport = transport
        self.restore_output(handed.output)
        self._restore_state()

    def _restore_state(self) -> None:
        """Continue with `handed_state`, and count one connection more."""
        raise NotImplementedError

    @property
    def session(self) -> Any:
        """The session, None before it is open and after its end."""
        return self._session

    def adopt_session(self, session: TransportSession) -> None:
        """Have the session that was restored for this connection receive its messages."""
        self._session = session

    def _fail_session(self) -> None:
        """Log the exception that the session raised for a message, and close the connection."""
        _log.failure("a session raised an exception for a message; closing its connection")
        self.close(*SERVER_ERROR)

    def _count_disconnect(self, initiator: str, code: str) -> None:
        """Count the end of this connection under its first reason."""
        if not self._is_disconnect_counted:
            self._is_disconnect_counted = True
            self.factory.count_disconnect(initiator, code)


def close_code_label(code: int) -> str:
    """Return the metric label of a close code; the application's codes, possibly thousands, share one label."""
    return "application" if code >= 4000 else str(code)
