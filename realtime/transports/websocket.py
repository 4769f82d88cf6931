"""One WebSocket connection: Autobahn's framing in, ready frames out, and the session in between.

Autobahn keeps the framing and the closing rules of RFC 6455. The handshake has been judged, and is answered, before it
takes over (`realtime.http.handshake`). This module bounds everything that Autobahn leaves unbounded, and writes
past it: outgoing frames are built once (`realtime.http.frames`) and go straight to the transport, or wait in an
outbox while the transport is full (`realtime.transports.outgoing`); frames of the common kind are read without it,
too (`realtime.transports.incoming`).

The end of a connection always has a deadline. Whoever starts it, our close frame is the last thing that is written;
then this side of the socket is shut, what the peer still sends is thrown away, and the connection is over when the
peer shuts its side, or is aborted when it does not. So no close frame is lost to a reset.
"""

from __future__ import annotations

import random
import secrets
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Protocol

from autobahn.exception import PayloadCorruptError, PayloadExceededError
from autobahn.twisted.websocket import WebSocketServerFactory, WebSocketServerProtocol
from autobahn.websocket import USES_NVX
from autobahn.websocket.protocol import TrafficStats
from twisted.internet.protocol import connectionDone
from twisted.logger import Logger
from twisted.python.failure import Failure

from realtime.config import settings
from realtime.deadlines import Deadlines
from realtime.errors import BAD_PROTOCOL, NO_PONG, SERVER_ERROR
from realtime.http.deflate import EXTENSION, CompressedFrames, CorruptMessage, Inflater, MessageTooBig, agree
from realtime.http.frames import close_frame, ping_frame, pong_frame
from realtime.http.handshake import (
    OpeningRequest,
    encoding,
    judge_handshake,
    opening_request,
    opening_response,
    subprotocol,
)
from realtime.http.request import Refusal, RequestHead
from realtime.metrics import Counter, Metrics
from realtime.process import log
from realtime.protocol.messages import DisconnectPush
from realtime.protocol.wire_formats import JSON_PUSHES_TEXT, JSON_TEXT, PROTOBUF_BINARY, WireFormat
from realtime.pubsub.time_slices import TimeSlicer
from realtime.transports.admission import Admission
from realtime.transports.incoming import BINARY, Incoming
from realtime.transports.outbox import QueuedBytes
from realtime.transports.outgoing import FlushAtTurnEnd, Outgoing

# The wire forms of the two transports, by the name of the encoding.
FORMS = {"json": JSON_TEXT, "protobuf": PROTOBUF_BINARY}
UNIDIRECTIONAL_FORMS = {"json": JSON_PUSHES_TEXT}

# Seconds of the loop's time for what connections send, in one turn.
SLICE = 0.005

# Bytes of randomness in the secret of a connection.
SECRET_BYTES = 24

CONTROL_FRAMES_PER_SECOND = 20
CONTROL_FRAMES_BURST = 50

_NO_LIMIT = 1 << 40  # bytes

# Close codes of RFC 6455 section 7.4.1: the reason that the peer is told, and the kind under which it is counted.
_FAILURES = {
    1002: ("protocol error", "frame"),
    1007: ("invalid data", "frame_data"),
    1008: ("policy violation", "frame_rate"),
    1009: ("message too big", "frame_size"),
}
_NORMAL = 1000
_KINDS = (*(kind for _, kind in _FAILURES.values()), "inappropriate", "ignored", "pong", "slow", "stalled")

_log = Logger(observer=log.observer)


class WebSocketSession(Protocol):
    """What this module asks of a session."""

    def receive(self, payload: bytes) -> None:
        """One whole message of the connection's encoding; if it is text, valid UTF-8."""

    def closed(self) -> None:
        """The socket is gone. Called once."""


class _SilentLogger:
    """Stands for Autobahn's logger: it warns of every bad frame, and those are counted here instead."""

    def debug(self, *args: object, **fields: object) -> None: ...

    info = warn = debug

    def error(self, format: str, **fields: object) -> None:
        _log.error(format, **fields)


class _UnusedDeferred:
    """Stands for a Deferred that Autobahn makes for each connection, and which nobody here waits for."""

    def callback(self, result: object) -> None: ...


class _Heartbeat:
    """Pings by WebSocket frames, for a client that wants them in place of those of the protocol.

    is_due: whether a pong is.
    """

    __slots__ = ("bucket", "connection", "is_due")

    def __init__(self, connection: WebSocketConnection) -> None:
        self.connection = connection
        self.is_due = False
        self.bucket = 0
        # Spread, so that clients that came together are not pinged together.
        self._wait(connection.factory.ping_interval * random.uniform(0.5, 1.0))

    def wake(self) -> None:
        """It is time for a ping, or the time for a pong is up."""
        factory = self.connection.factory
        if self.is_due and self.connection.is_read:
            self.connection.close(*NO_PONG)
        elif self.is_due:
            self._wait(factory.pong_timeout)
        else:
            self.connection.sink.deliver(ping_frame())
            self.is_due = factory.pong_timeout > 0
            self._wait(factory.pong_timeout if self.is_due else factory.ping_interval)

    def answered(self) -> None:
        """A pong came."""
        if self.is_due:
            self.is_due = False
            self._wait(self.connection.factory.ping_interval - self.connection.factory.pong_timeout)

    def stop(self) -> None:
        self.connection.factory.deadlines.clear(self)

    def _wait(self, seconds: float) -> None:
        deadlines = self.connection.factory.deadlines
        deadlines.set(self, deadlines.now + seconds)


class _Inflation:
    """What was agreed on compression, as Autobahn asks for it."""

    EXTENSION_NAME = EXTENSION
    __slots__ = ("_inflater", "_limit")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._inflater: Inflater | None = None  # between messages there is none

    def start_decompress_message(self) -> None:
        self._inflater = Inflater(self._limit)

    def decompress_message_data(self, data: bytes, max_output_len: int | None = None) -> bytes:
        assert self._inflater is not None
        try:
            return self._inflater.feed(data)
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


class WebSocketConnection(Outgoing, Incoming):
    """A connection as its session sees it: `send`, `sink`, `close`, `pause`, `resume`. Loop thread only.

    Names in camelCase are Autobahn's or Twisted's, and overridden here.
    """

    # Autobahn copies 33 options from the factory to every connection; here one class holds them for all. Those of the
    # opening handshake have no meaning here.
    logOctets = logFrames = False
    # Checked by `onMessage` on the whole message, in C and without a validator for each connection.
    utf8validateIncoming = False
    requireMaskedClientFrames = applyMask = True
    maskServerFrames = False
    # Limits are checked by `onMessageFrameBegin`.
    maxFramePayloadSize = maxMessagePayloadSize = autoFragmentSize = 0
    failByDrop = echoCloseCodeReason = False
    # The closing has a deadline in `wake`.
    closeHandshakeTimeout = 0
    autoPingRestartOnAnyTraffic = False

    log = _SilentLogger()
    is_closed = _UnusedDeferred()
    _transport_details: Any = None

    # What Autobahn gives to every connection, and is the same for all until something happens.
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
    pings = True  # whether the session asks for signs of life, not `_heartbeat`
    peer: Any
    factory: WebSocketFactory
    transport: Any
    _session: WebSocketSession | None = None
    _words: int | None = None  # messages that the client may still send: a unidirectional one has one
    _ended = False  # we said why this connection ends, or the peer did
    _heartbeat: _Heartbeat | None = None
    _control_due = 0.0  # when the control frames so far would be used up at the allowed rate

    def __init__(
        self, factory: WebSocketFactory, request: OpeningRequest, form: WireFormat, answer: bytes, inflate: bool
    ) -> None:
        """answer: to the handshake. inflate: whether compressed messages may come."""
        # Autobahn's own initializer only makes what the class attributes above stand for.
        self.factory = factory
        self._opening = request, answer
        self.form = form
        if inflate:
            self._perMessageCompress = _Inflation(factory.decompressed_limit)
        if form.encoding.name == "protobuf":
            self.opening = BINARY
        if request.query.get("cf_ws_frame_ping_pong") == "true":
            self.pings = False
        if form.encoding.unidirectional:
            self._words = 1
            # Such a client can't speak for itself: whoever does by the server API may name it by this.
            self.secret = secrets.token_urlsafe(SECRET_BYTES)

    # The session's side

    @property
    def is_closing(self) -> bool:
        return bool(self.state != self.STATE_OPEN)

    def close(self, code: int, reason: str) -> None:
        """Send a close frame after what is queued, and end the connection within `websocket.close_timeout`."""
        self.sendCloseFrame(code, reason.encode())

    # The way in: hooks that Autobahn calls. It does not guard them.

    def connectionMade(self) -> None:
        """The handshake is answered, and the connection open, before anything else is read of it."""
        request, answer = self._opening
        del self._opening
        self.factory.countConnections += 1
        self.state = self.STATE_OPEN
        self.transport.setTcpNoDelay(True)
        self.transport.write(answer)
        self._open(request)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.lose_queue()
        self._let_go()
        self._connectionLost(reason)  # type: ignore[arg-type]

    def _open(self, request: OpeningRequest) -> None:
        self.factory.connects.value += 1
        self.begin()
        try:
            self._session = self.factory.open_session(self, request)
        except Exception:
            _log.failure("a session could not be opened")
            self.close(*SERVER_ERROR)
            return
        if not self.pings and self.factory.ping_interval > 0:
            self._heartbeat = _Heartbeat(self)
        if self.form.encoding.unidirectional and request.query.get("cf_connect"):
            self._hear(request.query["cf_connect"].encode())

    def resumeProducing(self) -> None:
        super().resumeProducing()
        self.go_on()

    def _let_go(self) -> None:
        """Of what an open connection has besides its session."""
        self.drop_message()
        if self._heartbeat is not None:
            self._heartbeat.stop()

    def onMessage(self, payload: bytes, isBinary: bool) -> None:
        self.factory.received.value += 1
        if isBinary != (self.opening == BINARY):
            self.factory.count("inappropriate")
            self.close(*BAD_PROTOCOL)
            return
        if not isBinary and not payload.isascii():
            try:
                payload.decode()
            except UnicodeDecodeError:
                self.sendCloseFrame(1007)
                return
        self._hear(payload)

    def _hear(self, payload: bytes) -> None:
        if self._session is None:
            return
        if self._words is not None:
            if not self._words:
                # It has nothing more to say, and could say it for ever.
                self.factory.count("ignored")
                self._spend_control_frame()
                return
            self._words -= 1
        try:
            self._session.receive(payload)
        except Exception:
            _log.failure("a session failed on a message")
            self.close(*SERVER_ERROR)

    def onPing(self, payload: bytes) -> None:
        if self._spend_control_frame():
            self.sink.deliver(pong_frame(payload))

    def onPong(self, payload: bytes) -> None:
        if not self._spend_control_frame():
            return
        if self._heartbeat is None:
            self.factory.count("pong")
        else:
            self._heartbeat.answered()

    def onClose(self, wasClean: bool, code: int | None, reason: str | None) -> None:
        session, self._session = self._session, None
        if session is None:
            return
        self._count_end("client", "")
        try:
            session.closed()
        except Exception:
            _log.failure("a session failed at the end of its connection")

    # The end

    def sendCloseFrame(self, code: int | None = None, reasonUtf8: bytes | None = None, isReply: bool = False) -> None:
        """The one way to close, for the session, for Autobahn's failures, and in answer to the peer's close frame."""
        if self.state != self.STATE_OPEN:
            return
        self.state = self.STATE_CLOSING
        reason = (reasonUtf8 or b"").decode()
        if code in _FAILURES:
            reason, kind = _FAILURES[code]
            self.factory.count(kind)
        if isReply:
            self._count_end("client", "")
        else:
            self._count_end("server", why(code or _NORMAL))
        self._let_go()
        last = close_frame(code or _NORMAL, reason)
        if self.form.encoding.unidirectional and code is not None and code >= 3000:
            last = self.form.frame(self.form.encoding.push("", "disconnect", DisconnectPush(code, reason))) + last
        self.end(last, drop=isReply)  # a peer that answers has left

    def _count_end(self, by: str, code: str) -> None:
        """Count who ends this connection, the first time that it is known."""
        if not self._ended:
            self._ended = True
            self.factory.count_end(by, code)

    def _closeConnection(self, abort: bool = False) -> None:
        """Autobahn is done with the connection: the peer's close frame came."""
        if self._outbox:
            self.transport.write(self._outbox.take(self._outbox.size))
        if not self.bucket:
            self.factory.deadlines.set(self, self.factory.deadlines.now + self.factory.close_timeout)
        self.shut_down()

    def _spend_control_frame(self) -> bool:
        """Whether one more ping or pong is within the rate; if not, the connection is failed."""
        now = self.factory.reactor.seconds()
        self._control_due = max(self._control_due, now) + 1 / CONTROL_FRAMES_PER_SECOND
        if self._control_due - now <= CONTROL_FRAMES_BURST / CONTROL_FRAMES_PER_SECOND:
            return True
        self.sendCloseFrame(1008)
        return False


class WebSocketFactory(WebSocketServerFactory):
    """Judges handshakes and makes connections. `Front` owns the port and calls it."""

    protocol = WebSocketConnection  # type: ignore[assignment]

    def __init__(
        self,
        open_session: Callable[[WebSocketConnection, OpeningRequest], WebSocketSession],
        websocket: settings.MessageSettings,
        client: settings.ClientSettings,
        deadlines: Deadlines,
        metrics: Metrics,
        reactor: Any,
        admission: Admission,
        *,
        forms: Mapping[str, WireFormat] = FORMS,
        slices: TimeSlicer | None = None,
        charged: Callable[[Iterator[None]], Iterator[None]] = lambda work: work,
        queued: QueuedBytes | None = None,
        ends: FlushAtTurnEnd | None = None,
    ) -> None:
        """forms: what may be spoken, by the name of the encoding; JSON is among them.

        slices: where work waits for other turns of the loop. charged: the same work, its time on somebody's account.
        queued: is told of all that waits. ends: of the loop's turns.
        """
        super().__init__(server="realtime", reactor=reactor)
        if not USES_NVX:
            _log.warn("Autobahn runs without its native code: reading a large message costs 30 times as much")
        self.open_session = open_session
        self.deadlines = deadlines
        self.message_size_limit = websocket.message_size_limit or _NO_LIMIT
        self.decompressed_limit = websocket.decompressed_message_size_limit or 10 * self.message_size_limit
        self.max_fragments = websocket.max_fragments
        self.message_timeout = websocket.message_timeout
        self.write_timeout = websocket.write_timeout
        self.close_timeout = websocket.close_timeout
        self.queue_max_size = client.queue_max_size
        self.ping_interval = client.ping_interval
        self.pong_timeout = client.pong_timeout
        self.queued = queued or QueuedBytes()
        self.ends = ends or FlushAtTurnEnd()
        self.slices = slices or TimeSlicer(reactor.seconds, SLICE, partial(reactor.callLater, 0))
        self.charged = charged
        self._forms = forms
        self._compression = websocket.compression
        self._compression_level = websocket.compression_level
        self._compression_min_size = websocket.compression_min_size
        self._compressed: dict[tuple[str, int], WireFormat] = {}
        self._admission = admission
        admission.counts.append(lambda: self.connections)
        self._counters = {kind: bad_input(metrics, kind) for kind in _KINDS}
        self._metrics = metrics
        self.connects = metrics.counter("realtime_connects", "Connections of clients that were opened.")
        self.received = metrics.counter("realtime_messages_received", "Messages from clients.")
        # Those of the fan-out are counted by the hub.
        self.sent = metrics.counter("realtime_messages_sent", "Messages to clients.")

    @property
    def connections(self) -> int:
        """How many are open."""
        return int(self.countConnections)

    def judge(self, head: RequestHead) -> Refusal | None:
        """Why this request is not let in, or None."""
        return judge_handshake(head, self._admission.origin_allowed) or self._admission.judge()

    def open(self, head: RequestHead, transport: Any) -> WebSocketConnection:
        """A connection for a request that `judge` let in."""
        chosen = subprotocol(head, self._forms)
        request = opening_request(head, self._admission.address(head, transport.getPeer().host))
        spoken = encoding(chosen, request.query)
        spoken = spoken if spoken in self._forms else "json"
        agreement = agree(",".join(head.all("sec-websocket-extensions"))) if self._compression else None
        if agreement is None:
            return self.protocol(self, request, self._forms[spoken], opening_response(head, chosen), False)
        form = self._compressed_form(spoken, agreement.window)
        return self.protocol(self, request, form, opening_response(head, chosen, agreement.response), True)

    def _compressed_form(self, encoding: str, window: int) -> WireFormat:
        """The form of all connections that agreed on this window: what goes to many of them is compressed once."""
        form = self._compressed.get((encoding, window))
        if form is None:
            plain = self._forms[encoding]
            frames = CompressedFrames(plain.frame, window, self._compression_level, self._compression_min_size)
            form = self._compressed[encoding, window] = WireFormat(plain.encoding, frames)
        return form

    def count(self, kind: str) -> None:
        """Count one bad input or one client that was too slow."""
        self._counters[kind].value += 1

    def count_end(self, by: str, code: str) -> None:
        """Count the end of one connection. by: "server" or "client". code: why the server ended it, of a closed set."""
        self._metrics.counter(
            "realtime_disconnects", "Connections that ended, by who ended them and why.", initiator=by, code=code
        ).value += 1


def why(code: int) -> str:
    """A close code as the label of a metric: the application's own, of which there may be thousands, are one."""
    return "application" if code >= 4000 else str(code)


def bad_input(metrics: Metrics, kind: str) -> Counter:
    """The counter of what was refused, by kind."""
    return metrics.counter("realtime_bad_input", "Refused input and faults of peers", kind=kind)
