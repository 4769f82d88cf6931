"""The way in of one WebSocket connection: from bytes to whole messages, for as long as the loop has time.

A frame that is a whole message, as nearly all are, is taken as it is. Any other is given to Autobahn, which has the
rules of RFC 6455, and the parts of a message are put together here, within limits of size, number and time.

What can't be acted on at once waits in the slices of all long work (`realtime.pubsub.time_slices`), a frame of each
connection at a time, and the socket is not read meanwhile. Nor is it read while the session asks for that, or while a
peer that sends commands does not take the replies.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from autobahn.twisted.websocket import WebSocketServerProtocol
from autobahn.websocket import USES_NVX
from autobahn.websocket.xormasker import create_xor_masker

from realtime.http.frames import frame_at, message_at
from realtime.transports.outbox import Outbox

# What becomes of the bytes that were read. Nothing waits, and what comes begins a frame that begins a message; or some
# of a message has come; or they are acted on, now or in a later slice; or something holds us, and the rest waits until
# that is over.
_IDLE, _MIDST, _WORKING, _HELD = range(4)

_OPEN = WebSocketServerProtocol.STATE_OPEN
# First bytes of frames that are whole messages (RFC 6455 section 5.2): FIN set, no reserved bit, text or binary.
TEXT, BINARY = 0x81, 0x82
# Bytes from which on Autobahn's native code unmasks faster than Python's integers do.
_NATIVE_FROM = 1000
# By a number of 32-bit words: a number that is 1 in each of them.
_ONES = [int.from_bytes(b"\1\0\0\0" * words, "little") for words in range(_NATIVE_FROM // 4 + 1)]


class _Message:
    """A message of which not all has come yet. size: bytes as they are sent, of the frames that have begun."""

    __slots__ = ("bucket", "connection", "data", "fragments", "is_binary", "size")

    def __init__(self, connection: Incoming, is_binary: bool) -> None:
        self.connection = connection
        self.is_binary = is_binary
        self.data = bytearray()
        self.size = self.fragments = 0
        self.bucket = 0

    def wake(self) -> None:
        """It took too long."""
        self.connection.late(self)


class Incoming(WebSocketServerProtocol):
    """See the module. A base of connections, beside `Outgoing`. Loop thread only.

    A subclass gets whole messages by `onMessage`, closes by `sendCloseFrame`, calls `go_on` when the peer has taken
    what waited for it, and `drop_message` at the end. opening: how nearly all frames of the peer begin, TEXT or BINARY.
    is_read: whether the socket is; if not, it is not the peer's fault that it is silent.
    """

    opening = TEXT
    is_read = True
    factory: Any
    transport: Any
    _outbox: Outbox | None
    _message: _Message | None = None
    _backlog = b""  # the start of a frame's header, or all that is not acted on yet
    _stage = _IDLE
    _paused = False  # by the session

    def pause(self) -> None:
        """Act on no more of what the peer sends, and stop reading the socket."""
        self._paused = True
        self._read(False)

    def resume(self) -> None:
        """Go on, in a later turn of the loop if something was left undone."""
        self._paused = False
        self.go_on()

    def dataReceived(self, data: bytes) -> None:
        if self.state == _OPEN:
            if self._stage == _IDLE and self._outbox is None and not self._paused:
                # Nearly always it is one message.
                opening = self.opening
                body = message_at(data, opening, self.factory.message_size_limit)
                if body:
                    self.onMessage(_unmasked(data, body), opening == BINARY)
                    if not (self.is_read or self._held):
                        self._read(True)
                    return
            self._take(data)
        # After our close frame, what the peer still sends means nothing.

    def _take(self, data: bytes) -> None:
        """Act on bytes of the peer, behind those that wait."""
        self._backlog += data
        if self._stage in (_WORKING, _HELD):
            return
        self._stage = _WORKING
        slices = self.factory.slices
        work = self._work()
        for _ in work:
            slices.begin()
            if not slices.free:
                self._read(False)
                slices.add(self.factory.charged(work))
                break

    def _work(self) -> Iterator[None]:
        """Act on what waits, a frame at each step, until something holds us or nothing is left."""
        data, start, self._backlog = self._backlog, 0, b""
        stage = _HELD
        while self.state == self.STATE_OPEN and not self._held:
            stop = self._act(data, start)
            if stop in (start, len(data)):
                start = stop
                between = self.current_frame is None and not self.inside_message
                stage = _IDLE if start == len(data) and between else _MIDST
                break
            start = stop
            yield
        self._stage = stage
        if self.state != self.STATE_OPEN:
            self.data = b""
            return
        self._backlog = data[start:] + self._backlog
        if self._message is not None:
            self._expect_end_of_message()
        if stage == _HELD:
            self._read(False)
        elif not (self.is_read or self._held):
            self._read(True)

    def _act(self, data: bytes, start: int) -> int:
        """Act on one frame, or on as much of it as there is; where the next begins. `start`: it takes more to begin.

        A frame that is a whole message, as nearly all are, is taken as it is. Any other is given to Autobahn, and
        nothing of the next one, for Autobahn copies what it has not come to yet.
        """
        if self.current_frame is not None:
            stop = start + self.current_frame.length - self.current_frame_masker.pointer()
        else:
            place = frame_at(data, start)
            if place is None:
                return start
            _, stop = place
            if not self.inside_message and data[start] == self.opening and stop <= len(data):
                frame = data[start:stop]
                body = message_at(frame, self.opening, self.factory.message_size_limit)
                if body:
                    self.onMessage(_unmasked(frame, body), self.opening == BINARY)
                    return stop
        self.data = data[start:stop]
        while self.processData() and self.state == self.STATE_OPEN:
            pass
        return min(stop, len(data))

    @property
    def _held(self) -> bool:
        """Whether nothing is acted on: the session has enough, or the peer does not take what it asked for."""
        return self._paused or (self._outbox is not None and self._outbox.size > self.factory.queue_max_size // 2)

    def go_on(self) -> None:
        """What held us may have gone."""
        if self.state != self.STATE_OPEN or self._stage == _WORKING or self._held:
            return
        if self._stage == _HELD:
            self._stage = _WORKING
            self.factory.slices.add(self.factory.charged(self._work()))
        else:
            self._read(True)

    def _read(self, on: bool) -> None:
        if on != self.is_read and self.state == self.STATE_OPEN:
            self.is_read = on
            if on:
                self.transport.resumeProducing()
            else:
                self.transport.pauseProducing()

    def onMessageBegin(self, isBinary: bool) -> None:
        if self.state == self.STATE_OPEN:  # Autobahn goes on with a frame whose header failed the connection
            self._message = _Message(self, isBinary)

    def onMessageFrameBegin(self, length: int) -> None:
        """The header of a data frame was read: judge by it alone, before any of the payload is kept."""
        message = self._message
        if message is None:
            return
        message.size += length
        message.fragments += 1
        if self.factory.message_size_limit < message.size:
            self.sendCloseFrame(1009)
        elif 0 < self.factory.max_fragments < message.fragments:
            self.sendCloseFrame(1008)

    def onMessageFrameData(self, payload: bytes) -> None:
        if self._message is not None:
            self._message.data += payload
            self.factory.queued.size += len(payload)

    def onMessageFrameEnd(self) -> None: ...

    def onMessageEnd(self) -> None:
        message = self._message
        if message is not None:
            self.drop_message()
            self.onMessage(bytes(message.data), message.is_binary)

    def _expect_end_of_message(self) -> None:
        """Give the rest of a message that has begun a limit of time."""
        message = self._message
        if message is not None and not message.bucket and self.factory.message_timeout > 0:
            self.factory.deadlines.set(message, self.factory.deadlines.now + self.factory.message_timeout)

    def late(self, message: _Message) -> None:
        """The time for the rest of a message is up."""
        if self.is_read:
            self.sendCloseFrame(1008)
        else:
            self._expect_end_of_message()  # it may have come

    def drop_message(self) -> None:
        """Keep nothing of a message that has begun."""
        message, self._message = self._message, None
        if message is not None:
            self.factory.queued.size -= len(message.data)
            self.factory.deadlines.clear(message)


def _unmasked(frame: bytes, body: int) -> bytes:
    """The payload of a frame, which begins at `body`, behind the mask (RFC 6455 section 5.3)."""
    payload, mask = frame[body:], frame[body - 4 : body]
    size = len(payload)
    if size >= _NATIVE_FROM and USES_NVX:
        return bytes(create_xor_masker(mask, size).process(payload))
    words = (size + 3) >> 2
    ones = _ONES[words] if words < len(_ONES) else int.from_bytes(b"\1\0\0\0" * words, "little")
    # As one large number: times the ones, the mask stands in each of the words.
    key = int.from_bytes(mask, "little") * ones
    return (int.from_bytes(payload, "little") ^ key).to_bytes(4 * words, "little")[:size]
