"""WebSocket connections: Autobahn parses incoming data, outgoing frames are prebuilt, and a session is between them.

Autobahn implements the framing and closing rules of RFC 6455. The handshake has been checked before a connection is
made, and is answered without Autobahn (`realtime.http.handshake`). This module bounds everything that Autobahn leaves
unbounded. Outgoing frames bypass Autobahn: they are built once (`realtime.http.frames`) and go straight to the
transport, or to an outbox while the transport is full (`realtime.transports.outgoing`). Incoming frames of the common
kind bypass it, too (`realtime.transports.incoming`).

The end of a connection always has a deadline. The server's close frame is the last frame written, whichever side starts
to close; then the socket is half-closed, further data of the peer is discarded, and the connection ends when the peer
closes its side, or is aborted at the deadline. This way no close frame is lost to a TCP reset.
"""

from __future__ import annotations

import random
import secrets
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import msgspec
from autobahn.exception import PayloadCorruptError, PayloadExceededError
from autobahn.twisted.websocket import WebSocketServerFactory, WebSocketServerProtocol
from autobahn.websocket import USES_NVX
from autobahn.websocket.protocol import TrafficStats
from msgspec import Struct
from twisted.internet.protocol import connectionDone
from twisted.logger import Logger
from twisted.python.failure import Failure

from realtime.config import settings
from realtime.deadlines import Deadlines
from realtime.errors import BAD_PROTOCOL, NO_PONG
from realtime.http.deflate import EXTENSION, CompressedFrames, CorruptMessage, Inflater, MessageTooBig, negotiate
from realtime.http.frames import close_frame, ping_frame, pong_frame
from realtime.http.handshake import (
    OpeningRequest,
    check_handshake,
    handshake_response,
    make_opening_request,
    requested_encoding,
    select_subprotocol,
)
from realtime.http.request import Refusal, RequestHead
from realtime.metrics import Metrics
from realtime.process import log
from realtime.protocol.messages import DisconnectPush
from realtime.protocol.wire_formats import JSON_PUSHES_TEXT, JSON_TEXT, PROTOBUF_BINARY, WireFormat
from realtime.pubsub.time_slices import TimeSlicer
from realtime.transports.admission import Admission
from realtime.transports.connection import (
    ClientConnection,
    ConnectionContext,
    HandedConnection,
    TransportSession,
    Unsupported,
    close_code_label,
)
from realtime.transports.incoming import BINARY, HandedInput, Incoming
from realtime.transports.outbox import QueuedBytes
from realtime.transports.outgoing import FlushAtTurnEnd

# Wire formats of the two WebSocket transports, by the name of the encoding.
WIRE_FORMATS = {"json": JSON_TEXT, "protobuf": PROTOBUF_BINARY}
UNIDIRECTIONAL_WIRE_FORMATS = {"json": JSON_PUSHES_TEXT}

# Seconds of a loop turn for processing the clients' frames.
TIME_SLICE = 0.005

# Random bytes in the secret of a connection.
SECRET_BYTES = 24

# Seconds' worth of control frames at the allowed rate that may come at once.
CONTROL_FRAMES_BURST = 2.5

# Bytes of a compressed message that are inflated in one step: a thousand times as many may come out. Four times as many
# while less than this multiple comes out.
_INFLATED_STEP = 64
_HIGH_RATIO = 32

_NO_LIMIT = 1 << 40  # bytes

# By close code (RFC 6455 section 7.4.1): the reason sent to the peer, and the kind of the refusal.
_FAILURES = {
    1002: ("protocol error", "frame"),
    1007: ("invalid data", "frame_data"),
    1008: ("policy violation", "frame_rate"),
    1009: ("message too big", "frame_size"),
}
_NORMAL = 1000

_log = Logger(observer=log.observer)


class _SilentLogger:
    """Replacement for Autobahn's logger, which warns of every bad frame; they are counted here instead."""

    def debug(self, *args: object, **fields: object) -> None: ...

    info = warn = debug

    def error(self, format: str, **fields: object) -> None:
        _log.error(format, **fields)


class _UnusedDeferred:
    """Replacement for a Deferred that Autobahn makes for each connection, and that has no use here."""

    def callback(self, result: object) -> None: ...


class _Pinger:
    """Sends WebSocket ping frames to a client that asked for them in place of the protocol's pings.

    expects_pong: whether a ping has not been answered yet.
    """

    __slots__ = ("connection", "deadline_bucket", "expects_pong")

    def __init__(self, connection: WebSocketConnection, expects_pong: bool = False) -> None:
        self.connection = connection
        self.expects_pong = expects_pong
        self.deadline_bucket = 0
        if expects_pong:
            self._set_deadline(connection.factory.pong_timeout)
            return
        # Random, so that clients that connected at the same time are not pinged at the same time.
        self._set_deadline(connection.factory.ping_interval * random.uniform(0.5, 1.0))

    def on_deadline(self) -> None:
        """Send a ping, or close the connection if the pong is missing."""
        factory = self.connection.factory
        if self.expects_pong and self.connection.is_reading and not self.connection.is_held:
            self.connection.close(*NO_PONG)
        elif self.expects_pong:
            self._set_deadline(factory.pong_timeout)
        else:
            self.connection.sink.deliver(ping_frame())
            self.expects_pong = factory.pong_timeout > 0
            self._set_deadline(factory.pong_timeout if self.expects_pong else factory.ping_interval)

    def abort(self) -> None:
        """See `DeadlineOwner`."""
        self.connection.abort()

    def pong_received(self) -> None:
        """Schedule the next ping, if the pong answers one."""
        if self.expects_pong:
            self.expects_pong = False
            self._set_deadline(self.connection.factory.ping_interval - self.connection.factory.pong_timeout)

    def stop(self) -> None:
        self.connection.factory.deadlines.clear(self)

    def _set_deadline(self, seconds: float) -> None:
        deadlines = self.connection.factory.deadlines
        deadlines.set(self, deadlines.now + seconds)


class _InflateExtension:
    """The negotiated decompression, with the interface of Autobahn's extensions.

    step: received bytes to inflate next; the loop gets another turn behind them.
    """

    EXTENSION_NAME = EXTENSION
    __slots__ = ("_inflater", "_limit", "step", "window")

    def __init__(self, limit: int, window: int) -> None:
        """limit: largest size of an inflated message, in bytes. window: that of outgoing messages."""
        self._limit = limit
        self.window = window
        self.step = _INFLATED_STEP
        self._inflater: Inflater | None = None  # None between messages

    def start_decompress_message(self) -> None:
        self._inflater = Inflater(self._limit)

    def decompress_message_data(self, data: bytes, max_output_len: int | None = None) -> bytes:
        assert self._inflater is not None
        try:
            inflated = self._inflater.feed(data)
            self.step = _INFLATED_STEP if len(inflated) > _HIGH_RATIO * len(data) else 4 * _INFLATED_STEP
            return inflated
        except CorruptMessage as error:
            raise PayloadCorruptError(str(error)) from None
        except MessageTooBig as error:
            raise PayloadExceededError(str(error)) from None

    def end_decompress_message(self) -> None:
        inflater, self._inflater = self._inflater, None
        assert inflater is not None
        try:
            inflater.finish()
        except CorruptMessage as error:
            raise PayloadCorruptError(str(error)) from None


class HandedWebSocket(Struct, frozen=True, array_like=True):
    """The state of a WebSocket for another process. window: that of compressed messages, 0 without compression.

    needs_pings, secret, messages_left: of the connection. expects_pong: whether a ping frame has not been answered.
    """

    input: HandedInput
    window: int
    needs_pings: bool
    expects_pong: bool
    secret: str
    messages_left: int | None


class WebSocketConnection(ClientConnection, Incoming):
    """One WebSocket connection; a session uses `send`, `sink`, `close`, `pause`, `resume`. Loop thread only.

    Names in camelCase are Autobahn's or Twisted's, overridden here.
    """

    # Autobahn copies 33 options from the factory to every connection. Class attributes replace them, to save memory.
    # Options of the opening handshake are not used.
    logOctets = logFrames = False
    # `onMessage` checks the whole message, in C and without a validator for each connection.
    utf8validateIncoming = False
    requireMaskedClientFrames = applyMask = True
    maskServerFrames = False
    # `onMessageFrameBegin` checks the limits.
    maxFramePayloadSize = maxMessagePayloadSize = autoFragmentSize = 0
    failByDrop = echoCloseCodeReason = False
    # `on_deadline` ends the closing handshake.
    closeHandshakeTimeout = 0
    autoPingRestartOnAnyTraffic = False

    log = _SilentLogger()
    is_closed = _UnusedDeferred()
    _transport_details: Any = None

    # Autobahn's initial values of the attributes of a connection, shared by all connections to save memory.
    trafficStats = TrafficStats()
    send_queue: Any = ()
    utf8validator: Any = None
    trackedTimings: Any = None
    _perMessageCompress: Any = None
    current_frame: Any = None
    inside_message = False
    data = b""
    send_state = WebSocketServerProtocol.SEND_STATE_GROUND
    message_data_total_length = 0
    triggered = closedByMe = failedByMe = droppedByMe = wasClean = False
    wasMaxFramePayloadSizeExceeded = wasMaxMessagePayloadSizeExceeded = wasServingFlashSocketPolicyFile = False
    wasServerConnectionDropTimeout = wasOpenHandshakeTimeout = wasCloseHandshakeTimeout = False
    wasNotCleanReason: Any = None
    localCloseCode = localCloseReason = remoteCloseCode = remoteCloseReason = None
    openHandshakeTimeoutCall = closeHandshakeTimeoutCall = None
    autoPingTimeoutCall = autoPingPending = autoPingPendingCall = autoPingPendingSent = None
    autoPingPendingSeq = 0
    websocket_protocol_in_use = None
    websocket_version = 13

    form: WireFormat = JSON_TEXT
    secret = ""
    needs_pings = True  # whether the session sends pings of the protocol; if not, `_pinger` sends ping frames
    peer: Any
    factory: WebSocketFactory
    transport: Any
    _messages_left: int | None = None  # number of messages that a unidirectional client may still send
    _pinger: _Pinger | None = None
    _control_due = 0.0  # time at which the control frames received so far conform to the allowed rate

    def __init__(self, factory: WebSocketFactory, form: WireFormat, window: int) -> None:
        """window: that of compressed messages, 0 if the client must not send such."""
        # Autobahn's initializer is not called: it only sets the attributes that are class attributes here.
        self.factory = factory
        self.form = form
        if window:
            self._perMessageCompress = _InflateExtension(factory.decompressed_limit, window)
        if form.encoding.name == "protobuf":
            self.first_byte = BINARY

    def set_opening(self, request: OpeningRequest, response: bytes) -> None:
        """Set the opening request of a new connection, and the response to it."""
        self._opening = request, response
        if request.query.get("cf_ws_frame_ping_pong") == "true":
            self.needs_pings = False
        if self.form.encoding.unidirectional:
            self._messages_left = 1
            # A unidirectional client cannot send commands. Calls of the server API may name its session by this secret.
            self.secret = secrets.token_urlsafe(SECRET_BYTES)

    # Called by the session

    @property
    def is_known(self) -> bool:  # type: ignore[override]
        return bool(getattr(self._session, "is_connected", True))

    @property
    def transport_name(self) -> str:
        return "uni_websocket" if self.form.encoding.unidirectional else "websocket"

    @property
    def is_closing(self) -> bool:
        return bool(self.state != self.STATE_OPEN)

    def close(self, code: int, reason: str) -> None:
        """Send a close frame after the queued frames, and end the connection within `websocket.close_timeout`."""
        self.sendCloseFrame(code, reason.encode())

    # Hooks called by Twisted and Autobahn, which do not catch exceptions of the session

    def connectionMade(self) -> None:
        """Answer the handshake and open the session, before any further data is read."""
        request, response = self._opening
        del self._opening
        self.factory.countConnections += 1
        self.state = self.STATE_OPEN
        self.transport.write(response)
        self.factory.connects.value += 1
        self.start_writing()
        if not self.open_session(request):
            return
        if not self.needs_pings and self.factory.ping_interval > 0:
            self._pinger = _Pinger(self)
        if self.form.encoding.unidirectional and request.query.get("cf_connect"):
            self._receive(request.query["cf_connect"].encode())

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.release_place()
        self.stop_writing()
        self._release_resources()
        self._connectionLost(reason)  # type: ignore[arg-type]

    def resumeProducing(self) -> None:
        super().resumeProducing()
        self.resume_processing()

    def flush(self) -> None:
        super().flush()
        self.resume_processing()

    def _release_resources(self) -> None:
        """Release the state of an open connection (partial message, pinger), but keep the session."""
        self.drop_partial_message()
        if self._pinger is not None:
            self._pinger.stop()

    # Hand-over

    @property
    def is_movable(self) -> bool:
        return self.state == self.STATE_OPEN and self.has_stopped_receiving

    def _take_state(self) -> HandedWebSocket:
        expects_pong = self._pinger is not None and self._pinger.expects_pong
        window = self._perMessageCompress.window if self._perMessageCompress is not None else 0
        state = HandedWebSocket(
            self.take_input(), window, self.needs_pings, expects_pong, self.secret, self._messages_left
        )
        self._release_resources()
        self.state = self.STATE_CLOSED
        self.factory.countConnections -= 1
        return state

    def _restore_state(self) -> None:
        state, self.handed_state = self.handed_state, None
        self.factory.countConnections += 1
        if state.messages_left is not None:
            self._messages_left = state.messages_left
        if not self.needs_pings and self.factory.ping_interval > 0:
            self._pinger = _Pinger(self, state.expects_pong)
        self.restore_input(state.input)

    def onMessage(self, payload: bytes, isBinary: bool) -> None:
        self.factory.received.value += 1
        is_json = self.first_byte != BINARY
        if not (isBinary or is_json):
            self.factory.client_log.refuse("inappropriate", self.describe)
            self.close(*BAD_PROTOCOL)
            return
        # JSON may come in a binary frame, too. ASCII is valid UTF-8: the common case needs no decoded copy.
        if is_json and not payload.isascii():
            try:
                payload.decode()
            except UnicodeDecodeError:
                if isBinary:
                    self.factory.client_log.refuse("inappropriate", self.describe)
                    self.close(*BAD_PROTOCOL)
                else:
                    self.sendCloseFrame(1007)
                return
        if self._messages_left is not None or self._session is None:
            self._receive(payload)
            return
        # The short path of `_receive`, without a further call for each message.
        try:
            self._session.receive(payload)
        except Exception:
            self._fail_session()

    def _receive(self, payload: bytes) -> None:
        """Pass a message to the session, unless a unidirectional client has sent its only message already."""
        if self._session is None:
            return
        if self._messages_left is not None:
            if not self._messages_left:
                # The message is ignored. A client that goes on sending is limited like one that floods pings.
                self.factory.client_log.refuse("ignored", self.describe)
                self._allow_control_frame()
                return
            self._messages_left -= 1
        try:
            self._session.receive(payload)
        except Exception:
            self._fail_session()

    def onPing(self, payload: bytes) -> None:
        if self._allow_control_frame():
            self.sink.deliver(pong_frame(payload))

    def onPong(self, payload: bytes) -> None:
        if not self._allow_control_frame():
            return
        if self._pinger is None:
            self.factory.client_log.refuse("pong", self.describe)
        else:
            self._pinger.pong_received()

    def onClose(self, wasClean: bool, code: int | None, reason: str | None) -> None:
        self.end_session()

    # Closing

    def sendCloseFrame(self, code: int | None = None, reasonUtf8: bytes | None = None, isReply: bool = False) -> None:
        """Close the connection: for the session, for failures found by Autobahn, and in reply to a close frame."""
        if self.state != self.STATE_OPEN:
            return
        self.state = self.STATE_CLOSING
        reason = (reasonUtf8 or b"").decode()
        if code in _FAILURES:
            reason, kind = _FAILURES[code]
            self.factory.client_log.refuse(kind, self.describe)
        if isReply:
            self._count_disconnect("client", "")
        else:
            self._count_disconnect("server", close_code_label(code or _NORMAL))
        self._release_resources()
        last_frame = close_frame(code or _NORMAL, reason)
        if self.form.encoding.unidirectional and code is not None and code >= 3000:
            push = self.form.encoding.encode_push("", "disconnect", DisconnectPush(code, reason))
            last_frame = self.form.frame(push) + last_frame
        # A peer that sent a close frame reads no further messages, so they are dropped.
        self.finish_writing(last_frame, drop_queued=isReply)

    def _closeConnection(self, abort: bool = False) -> None:
        """Write the queued frames and half-close: Autobahn has received the peer's close frame."""
        if self._outbox:
            self.transport.write(self._outbox.take(self._outbox.size))
        if not self.deadline_bucket:
            self.factory.deadlines.set(self, self.factory.deadlines.now + self.factory.close_timeout)
        self.half_close()

    def _allow_control_frame(self) -> bool:
        """Count one ping or pong of the peer; return False and close the connection if it exceeds the rate."""
        now = self.factory.reactor.seconds()
        self._control_due = max(self._control_due, now) + 1 / self.factory.control_frames_per_second
        if self._control_due - now <= CONTROL_FRAMES_BURST:
            return True
        self.sendCloseFrame(1008)
        return False


_decode_handed = msgspec.msgpack.Decoder(HandedWebSocket).decode


class WebSocketFactory(WebSocketServerFactory, ConnectionContext):
    """Checks handshakes and makes connections, as a `ConnectionEndpoint` of the frontend."""

    protocol = WebSocketConnection  # type: ignore[assignment]

    def __init__(
        self,
        open_session: Callable[[WebSocketConnection, OpeningRequest], TransportSession],
        websocket: settings.MessageSettings,
        client: settings.ClientSettings,
        deadlines: Deadlines,
        metrics: Metrics,
        reactor: Any,
        admission: Admission,
        *,
        wire_formats: Mapping[str, WireFormat] = WIRE_FORMATS,
        slices: TimeSlicer | None = None,
        strangers: TimeSlicer | None = None,
        charge_work: Callable[[Iterator[None]], Iterator[None]] = lambda work: work,
        queued: QueuedBytes | None = None,
        turn_end: FlushAtTurnEnd | None = None,
    ) -> None:
        """wire_formats: the supported ones, by the name of the encoding; "json" is required.

        slices: processes frames in later turns of the loop. strangers: the same for peers that are not connected as
        clients; None for `slices`. charge_work: wraps such work so that its time is accounted.
        queued, turn_end: see `ConnectionContext`.
        """
        WebSocketServerFactory.__init__(self, server="realtime", reactor=reactor)
        ConnectionContext.__init__(
            self,
            open_session,
            websocket,
            client.queue_max_size,
            deadlines,
            metrics,
            admission.client_log,
            queued,
            turn_end,
        )
        if not USES_NVX:
            _log.warn(
                "Autobahn runs without its native code: reading a large message costs 30 times as much."
                " Install a wheel of autobahn with NVX."
            )
        self.message_size_limit = websocket.message_size_limit or _NO_LIMIT
        # A unidirectional client sends one command and no batch.
        batch_size_limit = websocket.batch_size_limit if isinstance(websocket, settings.WebSocketSettings) else 0
        self.batch_size_limit = max(batch_size_limit, self.message_size_limit)
        self.decompressed_limit = websocket.decompressed_message_size_limit or 10 * self.message_size_limit
        self.max_fragments = websocket.max_fragments
        self.control_frames_per_second = websocket.control_frames_per_second
        self.message_timeout = websocket.message_timeout
        self.ping_interval = client.ping_interval
        self.pong_timeout = client.pong_timeout
        self.slices = slices or TimeSlicer(reactor.seconds, TIME_SLICE, partial(reactor.callLater, 0))
        self.strangers = strangers or self.slices
        self.charge_work = charge_work
        self._wire_formats = wire_formats
        self._compression = websocket.compression
        self._compression_level = websocket.compression_level
        self._compression_min_size = websocket.compression_min_size
        self._compressed_formats: dict[tuple[str, int], WireFormat] = {}
        self._admission = admission
        admission.add_transport(lambda: self.connections)

    @property
    def connections(self) -> int:
        """Number of open connections."""
        return int(self.countConnections)

    def check(self, head: RequestHead) -> Refusal | None:
        """Check a handshake and the limits of admission; return None to accept it."""
        return check_handshake(head, self._admission.origin_allowed) or self._admission.check()

    def make_connection(self, head: RequestHead, transport: Any) -> WebSocketConnection:
        """Make the connection for a request that `check` accepted."""
        subprotocol = select_subprotocol(head, self._wire_formats)
        request = make_opening_request(head, self._admission.client_address(head, transport.client[0]))
        encoding = requested_encoding(subprotocol, request.query)
        encoding = encoding if encoding in self._wire_formats else "json"
        agreement = negotiate(",".join(head.get_all("sec-websocket-extensions"))) if self._compression else None
        connection: WebSocketConnection
        if agreement is None:
            connection = self.protocol(self, self._wire_formats[encoding], 0)
            response = handshake_response(head, subprotocol)
        else:
            connection = self.protocol(self, self._compressed_format(encoding, agreement.window), agreement.window)
            response = handshake_response(head, subprotocol, agreement.response)
        connection.set_opening(request, response)
        return connection

    def restore_connection(self, handed: HandedConnection) -> WebSocketConnection:
        """See `HandOverEndpoint`."""
        state = _decode_handed(handed.state)
        if handed.encoding not in self._wire_formats:
            raise Unsupported(f"no WebSocket here carries {handed.encoding}")
        window = state.window
        form = self._compressed_format(handed.encoding, window) if window else self._wire_formats[handed.encoding]
        connection: WebSocketConnection = self.protocol(self, form, window)
        connection.handed_state, connection.state = state, connection.STATE_OPEN
        connection.needs_pings, connection.secret = state.needs_pings, state.secret
        return connection

    def _compressed_format(self, encoding: str, window: int) -> WireFormat:
        """Return the wire format shared by all connections with this window, so a broadcast is compressed once."""
        wire_format = self._compressed_formats.get((encoding, window))
        if wire_format is None:
            plain = self._wire_formats[encoding]
            frames = CompressedFrames(plain.frame, window, self._compression_level, self._compression_min_size)
            wire_format = self._compressed_formats[encoding, window] = WireFormat(plain.encoding, frames)
        return wire_format
