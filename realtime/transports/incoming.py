"""Incoming side of one WebSocket connection: from bytes to whole messages, within the loop's time slices.

A frame that is a whole message, as nearly all frames are, is decoded here. Autobahn parses all other frames by the
rules of RFC 6455; this module assembles the fragments of a message, within limits of size, number and time.

A message may be a *batch* of many commands, longer than one command may be: an SDK sends all its subscriptions in one
frame when it comes back. Its commands are passed on as they arrive, so that no more than the largest command is kept.

Frames that exceed the time slice of a loop turn are processed in later turns, one frame of each connection at a time,
together with all other long work (`realtime.pubsub.time_slices`). Meanwhile the socket is not read. It is also not read
while the session has paused the connection, or while a peer that sends commands does not read the replies.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator
from typing import Any

from autobahn.twisted.websocket import WebSocketServerProtocol
from autobahn.websocket import USES_NVX
from autobahn.websocket.xormasker import create_xor_masker
from msgspec import Struct

from realtime.errors import TOO_MANY_COMMANDS
from realtime.http.frames import frame_bounds, masked_frame, whole_message
from realtime.protocol.encodings import CommandTooLong
from realtime.protocol.messages import ProtocolError
from realtime.protocol.wire_formats import WireFormat
from realtime.pubsub.time_slices import TimeSlicer
from realtime.transports.outbox import Outbox

# State of the received bytes:
# IDLE: none is buffered, and the next byte begins a message. PARTIAL: a message has been received in part.
# WORKING: buffered frames are processed, now or in a later slice. BLOCKED: buffered frames wait for `resume`.
_IDLE, _PARTIAL, _WORKING, _BLOCKED = range(4)

_OPEN = WebSocketServerProtocol.STATE_OPEN
# First bytes of frames with a whole message (RFC 6455 section 5.2): FIN set, no reserved bit, text or binary.
TEXT, BINARY = 0x81, 0x82
# The bit RSV1, which marks compressed messages (RFC 7692 section 6).
_COMPRESSED = 0x40
# Received bytes that are processed at once even after the slice of this turn.
_SHORT = 2048
# Payload size in bytes from which on Autobahn's native code unmasks faster than integer arithmetic.
_NATIVE_FROM = 1000
# Size in bytes of a message that no client means to send.
_ABSURD = 1 << 31
# By number of 32-bit words: an integer with the value 1 in each word.
_ONES = [int.from_bytes(b"\1\0\0\0" * words, "little") for words in range(_NATIVE_FROM // 4 + 1)]


# Of the first byte of a frame (RFC 6455 section 5.2).
_FIN, _OPCODE = 0x80, 0x0F
_CONTROL_OPCODES = range(8, 16)
_NO_MASK = bytes(4)

_from_bytes = int.from_bytes
_Utf8Decoder = codecs.getincrementaldecoder("utf-8")


class _PartialMessage:
    """A message received in part. size: bytes as sent, possibly compressed, of all frames whose header was read.

    data: the received bytes that were not passed on. is_batch: its first commands were passed on.
    """

    __slots__ = ("_decoder", "connection", "data", "deadline_bucket", "fragments", "is_batch", "is_binary", "size")

    def __init__(self, connection: Incoming, is_binary: bool) -> None:
        self.connection = connection
        self.is_binary = is_binary
        self.data = bytearray()
        self.size = self.fragments = 0
        self.is_batch = False
        self.deadline_bucket = 0
        self._decoder = None if is_binary else _Utf8Decoder()

    def append(self, data: bytes) -> None:
        """Append received bytes. Raises UnicodeDecodeError as soon as a text message can't become valid UTF-8."""
        if self._decoder is not None:
            self._decoder.decode(data)
        self.data += data

    def abort(self) -> None:
        """See `DeadlineOwner`."""
        self.connection.abort()

    def on_deadline(self) -> None:
        self.connection.on_message_timeout()


class HandedInput(Struct, frozen=True, array_like=True):
    """The incoming side of a WebSocket for another process, see `Incoming.take_input`.

    started: frames as of a client, with the received part of an incomplete message, and of an incomplete frame, whose
    rest may be missing. unprocessed: further received bytes. size, fragments, is_batch: of the incomplete message.
    """

    started: bytes
    unprocessed: bytes
    size: int = 0
    fragments: int = 0
    is_batch: bool = False


class Incoming(WebSocketServerProtocol):
    """Incoming side of a WebSocket connection; a base class beside `Outgoing`. Loop thread only.

    A subclass gets whole messages by `onMessage`, closes by `sendCloseFrame`, queues outgoing frames between `hold` and
    `release`, calls `resume_processing` when the peer has read queued frames, and `drop_partial_message` at the end.
    first_byte: first byte of nearly all frames of the peer, TEXT or BINARY. is_reading: whether the socket is read; if
    not, a silent peer is not at fault. is_known: whether the peer is connected as a client.
    """

    first_byte = TEXT
    is_reading = True
    when_drained: Callable[[Callable[[], None]], None]  # of `Outgoing`
    is_known = True
    _is_suspended = False  # for a hand-over
    _isMessageCompressed = False  # Autobahn's
    form: WireFormat
    factory: Any
    transport: Any
    abort: Callable[[], None]  # of `Outgoing`, as the next three
    abort_after_error: Callable[[], None]
    describe: Callable[[], dict[str, object]]
    _outbox: Outbox | None
    hold: Callable[[], bool]
    release: Callable[[], None]
    _message: _PartialMessage | None = None
    _unprocessed = b""  # the start of a frame's header, or all buffered frames
    _receive_state = _IDLE
    _is_paused_by_session = False
    _is_paused = False  # by the session, or for a hand-over

    def close(self, code: int, reason: str) -> None:
        """See `Outgoing.close`."""
        raise NotImplementedError

    def pause(self) -> None:
        """Stop reading the socket, and process no more buffered frames."""
        self._is_paused = self._is_paused_by_session = True
        self._set_reading(False)

    def resume(self) -> None:
        """Read again; buffered frames are processed in a later turn of the loop."""
        self._is_paused_by_session = False
        self._is_paused = self._is_suspended
        self.resume_processing()

    def stop_receiving(self) -> None:
        """As `pause`, for a hand-over: at the end of the present step nothing is received until `start_receiving`."""
        self._is_paused = self._is_suspended = True
        self._set_reading(False)

    def start_receiving(self) -> None:
        """Undo `stop_receiving`; the session may have paused the connection meanwhile."""
        self._is_suspended = False
        self._is_paused = self._is_paused_by_session
        self.resume_processing()

    @property
    def has_stopped_receiving(self) -> bool:
        """Whether no received frame is being processed, and none is kept that can't be handed over."""
        is_inflating = self.inside_message and self._isMessageCompressed
        return self._is_suspended and self._receive_state != _WORKING and not is_inflating

    def take_input(self) -> HandedInput:
        """Return everything received that was not passed on, and forget it."""
        message, unprocessed = self._message, self._unprocessed
        started = self._started_frames()
        self._unprocessed = b""
        self.drop_partial_message()
        if message is None:
            return HandedInput(started, unprocessed)
        return HandedInput(started, unprocessed, message.size, message.fragments, message.is_batch)

    def _started_frames(self) -> bytes:
        """Return frames that bring another process to the same state of an incomplete message and an incomplete frame.

        The part of the message that has arrived stands in a frame of its own, unmasked.
        """
        message, started = self._message, b""
        frame: Any = self.current_frame
        if message is not None:
            opcode = (BINARY if message.is_binary else TEXT) & _OPCODE
            started = masked_frame(opcode, _NO_MASK, bytes(message.data), len(message.data))
        if frame is None:
            return started
        if frame.opcode in _CONTROL_OPCODES:
            payload = create_xor_masker(frame.mask, frame.length).process(b"".join(self.control_frame_data))
            return started + masked_frame(_FIN | frame.opcode, frame.mask, payload, frame.length)
        done = self.current_frame_masker.pointer()
        mask = (2 * frame.mask)[done % 4 :][:4]
        return started + masked_frame(_FIN if frame.fin else 0, mask, b"", frame.length - done)

    def restore_input(self, handed: HandedInput) -> None:
        """Continue with what another process has received; until `start_receiving`, nothing more is."""
        self.is_reading = False  # as `realtime.process.transport.take_over` leaves the transport
        self._is_paused = self._is_suspended = True
        started, start = handed.started, 0
        while start < len(started) and self.state == _OPEN:
            start = self._process_frame(started, start)
        if self._message is not None:
            self._message.size, self._message.fragments = handed.size, handed.fragments
            self._message.is_batch = handed.is_batch
            self._set_message_deadline()
        self._unprocessed = handed.unprocessed
        self._receive_state = _BLOCKED if handed.unprocessed else _PARTIAL if started else _IDLE

    def dataReceived(self, data: bytes) -> None:
        # Data that arrives after our close frame is ignored.
        if self.state == _OPEN:
            if self._receive_state == _IDLE and self._outbox is None and not self._is_paused:
                # Nearly every segment is exactly one whole message: it is handled without buffering, without Autobahn
                # and without a time slice.
                first_byte = self.first_byte
                payload = whole_message(data, first_byte, self.factory.message_size_limit)
                if payload and (len(data) <= _SHORT or self._slices.has_time):
                    self.onMessage(_unmask(data, payload), first_byte == BINARY)
                    if not (self.is_reading or self._is_blocked):
                        self._set_reading(True)
                    return
            self._process(data)

    def _process(self, data: bytes) -> None:
        """Process received bytes after the buffered ones, in this turn's time slice and then in later ones."""
        self._unprocessed += data
        if self._receive_state in (_WORKING, _BLOCKED):
            return
        self._receive_state = _WORKING
        slices = self._slices
        steps = self._process_frames()
        # One step is short, but any number of connections may have one in this turn.
        is_short = len(data) <= _SHORT
        if (slices.has_time if is_short or self.is_known else not slices.is_timed) or (is_short and self.is_known):
            holds = self.hold()
            try:
                for _ in steps:
                    slices.start_slice()
                    if not slices.has_time:
                        break
                else:
                    slices.start_slice()
                    return
            finally:
                if holds:
                    self.release()
        self._set_reading(False)
        slices.add(self.factory.charge_work(self._abort_on_error(steps)))

    @property
    def _slices(self) -> TimeSlicer:
        """The slices for this peer: until it is connected as a client, it shares a small one with all strangers."""
        slices: TimeSlicer = self.factory.slices if self.is_known else self.factory.strangers
        return slices

    def _process_frames(self) -> Iterator[None]:
        """Process the buffered bytes, one frame for each step, until the connection is blocked or no frame is left."""
        data, start, self._unprocessed = self._unprocessed, 0, b""
        state = _BLOCKED
        while self.state == self.STATE_OPEN and not self._is_blocked:
            stop = self._process_frame(data, start)
            if stop in (start, len(data)):
                start = stop
                between_messages = self.current_frame is None and not self.inside_message
                state = _IDLE if start == len(data) and between_messages else _PARTIAL
                break
            start = stop
            yield
        self._receive_state = state
        if self.state != self.STATE_OPEN:
            self.data = b""
            return
        self._unprocessed = data[start:] + self._unprocessed
        if self._message is not None:
            self._set_message_deadline()
        if state == _BLOCKED:
            self._set_reading(False)
        elif not (self.is_reading or self._is_blocked):
            self._set_reading(True)
        if not (self.is_reading or self._is_paused):
            # Replies of this turn are in the way. They may leave at its end without a pause of the transport.
            self.when_drained(self.resume_processing)

    def _process_frame(self, data: bytes, start: int) -> int:
        """Process the frame at `start`, or the received part of it; return the position after the processed bytes.

        Returns `start` if the frame's header is incomplete. A frame with a whole message is decoded here. Autobahn is
        given the bytes of one frame only, because it copies all bytes that it has not parsed yet.
        """
        if self.current_frame is not None:
            stop: int = start + self.current_frame.length - self.current_frame_masker.pointer()
        else:
            bounds = frame_bounds(data, start)
            if bounds is None:
                return start
            _, stop = bounds
            if not self.inside_message and data[start] == self.first_byte and stop <= len(data):
                frame = data[start:stop]
                payload = whole_message(frame, self.first_byte, self.factory.message_size_limit)
                if payload:
                    self.onMessage(_unmask(frame, payload), self.first_byte == BINARY)
                    return stop
        if self._perMessageCompress is not None and self._is_compressed(data[start]):
            # A thousand times as many bytes may come out.
            stop = min(stop, start + self._perMessageCompress.step)
        self.data = data[start:stop]
        while self.processData() and self.state == self.STATE_OPEN:
            pass
        return min(stop, len(data))

    def _is_compressed(self, first: int) -> bool:
        """Whether the current frame, or the next one, belongs to a compressed message. first: its first byte."""
        is_inside = self.current_frame is not None or self.inside_message
        return bool(self._isMessageCompressed if is_inside else first & _COMPRESSED)

    def _abort_on_error(self, steps: Iterator[None]) -> Iterator[None]:
        """Yield the steps in later turns, where no caller closes the connection after an exception."""
        try:
            yield from steps
        except Exception:
            self.abort_after_error()

    @property
    def _is_blocked(self) -> bool:
        """Whether frames must not be processed: the session has paused us, or the peer does not read its replies."""
        return self._is_paused or (self._outbox is not None and self._outbox.size > self.factory.queue_max_size // 2)

    def resume_processing(self) -> None:
        """Process buffered frames and read the socket again, unless the connection is still blocked."""
        if self.state != self.STATE_OPEN or self._receive_state == _WORKING or self._is_blocked:
            return
        if self._receive_state == _BLOCKED:
            self._receive_state = _WORKING
            self._slices.add(self.factory.charge_work(self._abort_on_error(self._process_frames())))
        else:
            self._set_reading(True)

    def _set_reading(self, is_reading: bool) -> None:
        if is_reading != self.is_reading and self.state == self.STATE_OPEN:
            self.is_reading = is_reading
            if is_reading:
                self.transport.resumeProducing()
            else:
                self.transport.pauseProducing()

    def onMessageBegin(self, isBinary: bool) -> None:
        if self.state == self.STATE_OPEN:  # Autobahn continues with a frame whose header failed the connection
            self._message = _PartialMessage(self, isBinary)

    def onMessageFrameBegin(self, length: int) -> None:
        """Check the limits by the header of a data frame, before any of its payload is buffered."""
        message = self._message
        if message is None:
            return
        message.size += length
        message.fragments += 1
        if self.factory.batch_size_limit < message.size:
            self._refuse_size(message.size)
        elif 0 < self.factory.max_fragments < message.fragments:
            self.sendCloseFrame(1008)

    def onMessageFrameData(self, payload: bytes) -> None:
        message = self._message
        if message is None:
            return
        try:
            message.append(payload)
        except UnicodeDecodeError:
            self.sendCloseFrame(1007)  # at once: RFC 6455 section 8.1
        else:
            self.factory.queued.size += len(payload)
            if len(message.data) > self.factory.message_size_limit:
                self._pass_commands(message)

    def _pass_commands(self, message: _PartialMessage) -> None:
        """Pass the whole commands of a message on that is longer than one command may be."""
        data, encoding = bytes(message.data), self.form.encoding
        try:
            end = encoding.end_of_commands(data, self.factory.message_size_limit)
        except CommandTooLong:
            self.sendCloseFrame(1009)
            return
        except ProtocolError:
            self._refuse_size(len(data))
            return
        message.is_batch = True
        if end:
            message.data = bytearray(data[end:])
            self.factory.queued.size -= end
            # A long batch over a slow link is late only if it stops.
            self.factory.deadlines.clear(message)
            self.onMessage(data[:end], message.is_binary)

    def _refuse_size(self, size: int) -> None:
        """Close the connection for a batch of this size, so that an SDK comes back: its next one may be shorter."""
        if size >= _ABSURD or self.form.encoding.unidirectional:
            self.sendCloseFrame(1009)
            return
        self.factory.client_log.refuse("batch_size", self.describe)
        self.close(*TOO_MANY_COMMANDS)

    def onMessageFrameEnd(self) -> None: ...

    def onMessageEnd(self) -> None:
        message = self._message
        if message is not None:
            self.drop_partial_message()
            if message.data or not message.is_batch:
                self.onMessage(bytes(message.data), message.is_binary)

    def _set_message_deadline(self) -> None:
        """Set the deadline for the rest of a partial message, if it has none."""
        message = self._message
        if message is not None and not message.deadline_bucket and self.factory.message_timeout > 0:
            self.factory.deadlines.set(message, self.factory.deadlines.now + self.factory.message_timeout)

    def on_message_timeout(self) -> None:
        """Close the connection, because a message was not completed in time."""
        if self.is_reading:
            self.sendCloseFrame(1008)
        else:
            self._set_message_deadline()  # the rest may have arrived already, and is not read yet

    def drop_partial_message(self) -> None:
        """Discard a partial message, its size and its deadline."""
        message, self._message = self._message, None
        if message is not None:
            self.factory.queued.size -= len(message.data)
            self.factory.deadlines.clear(message)


def _unmask(frame: bytes, start: int) -> bytes:
    """Return the unmasked payload of a frame (RFC 6455 section 5.3). start: offset of the payload, after the mask."""
    size = len(frame) - start
    if size >= _NATIVE_FROM and USES_NVX:
        return bytes(create_xor_masker(frame[start - 4 : start], size).process(frame[start:]))
    words = (size + 7) >> 2  # of mask and payload
    ones = _ONES[words] if words < len(_ONES) else int.from_bytes(b"\1\0\0\0" * words, "little")
    # XOR of two large integers: multiplied by the ones, the mask stands in each 32-bit word of the key. In the first
    # word it meets itself.
    masked = _from_bytes(frame[start - 4 :], "little")
    return (masked ^ (masked & 0xFFFFFFFF) * ones).to_bytes(4 * words, "little")[4 : size + 4]
