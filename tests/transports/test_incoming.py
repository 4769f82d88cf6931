"""Processing of received bytes: the short path and Autobahn alone give the same result, in any segmentation."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from twisted.internet.task import Clock

from realtime.config import settings
from realtime.deadlines import Deadlines
from realtime.http.request import RequestHead, RequestParser
from realtime.metrics import Metrics
from realtime.transports import incoming as module
from realtime.transports.admission import Admission
from realtime.transports.websocket import WebSocketConnection, WebSocketFactory
from tests.transports.stage import Echo, frame, frames_in, handshake

SETTINGS = settings.WebSocketSettings(message_size_limit=2000, max_fragments=5, compression=True)


class Wire:
    """A transport that accepts all data."""

    def __init__(self) -> None:
        self.written = bytearray()
        self.reading = True

    def write(self, data: bytes) -> None:
        self.written += data

    def getPeer(self) -> Any:
        return self

    host = "192.0.2.1"

    def pauseProducing(self) -> None:
        self.reading = False

    def resumeProducing(self) -> None:
        self.reading = True

    def _ignore(self, *arguments: object) -> None: ...

    setTcpNoDelay = registerProducer = unregisterProducer = loseWriteConnection = abortConnection = _ignore
    getHost = getPeer


class ByAutobahn(WebSocketConnection):
    """A connection that passes all received bytes to Autobahn."""

    def dataReceived(self, data: bytes) -> None:
        self.data += data
        while self.state == self.STATE_OPEN and self.processData():
            pass


class Server:
    """One connection, its session, and the written data."""

    def __init__(self, protocol: type[WebSocketConnection] = WebSocketConnection, more: str = "") -> None:
        self.clock = Clock()
        self.sessions: list[Echo] = []
        self.wire = Wire()
        metrics, client = Metrics(), settings.ClientSettings()
        self.factory = WebSocketFactory(
            self.make_session,
            SETTINGS,
            client,
            Deadlines(0.0),
            metrics,
            self.clock,
            Admission(client, metrics, self.clock.seconds),
        )
        self.factory.protocol = protocol
        head = RequestParser(16384, 100).feed(handshake(*([more] if more else [])))
        assert isinstance(head, RequestHead)
        self.connection = self.factory.make_connection(head, self.wire)
        self.connection.makeConnection(self.wire)
        self.wire.written.clear()

    def make_session(self, connection: WebSocketConnection, request: Any) -> Echo:
        self.sessions.append(Echo(connection, request))
        return self.sessions[-1]

    def feed(self, *pieces: bytes) -> tuple[list[bytes], list[tuple[int, bytes]], bool]:
        """Receive data; return the session's messages, the sent frames, and whether the connection is still open."""
        for piece in pieces:
            self.connection.dataReceived(piece)
            self.clock.pump([0.0] * 3)
        return self.sessions[0].received, frames_in(bytes(self.wire.written)), not self.connection.is_closing


def segments(data: bytes, places: list[int]) -> list[bytes]:
    edges = sorted({0, len(data), *(place % (len(data) + 1) for place in places)})
    return [data[start:end] for start, end in itertools.pairwise(edges)]


payloads = st.one_of(
    st.binary(max_size=10),
    st.text(max_size=200).map(str.encode),
    st.sampled_from([0, 1, 125, 126, 127, 999, 1000, 1001, 1999, 2000, 2001]).map(lambda size: b"x" * size),
)
masks = st.binary(min_size=4, max_size=4)
good_frames = st.builds(
    lambda payload, mask: frame(1, payload, mask=mask), st.text(max_size=200).map(str.encode), masks
)
any_frames = st.builds(
    frame,
    st.sampled_from([0, 0, 1, 1, 1, 1, 1, 2, 8, 9, 10, 3, 11]),
    payloads,
    st.sampled_from([True, True, True, False]),
    st.sampled_from([0, 0, 0, 0, 0, 4, 2]),
    st.one_of(masks, masks, masks, masks, st.none()),
)
fragmented = st.lists(payloads, min_size=2, max_size=7).map(
    lambda parts: b"".join(
        frame(0 if number else 1, part, fin=number == len(parts) - 1) for number, part in enumerate(parts)
    )
)
streams = st.one_of(
    st.lists(st.one_of(good_frames, good_frames, any_frames, fragmented), max_size=12).map(b"".join),
    st.lists(any_frames, max_size=6).map(b"".join),
    st.binary(max_size=300),
)
# Completes the last frame or fails the connection, because only complete headers are checked.
END = b"\0" * 14


offers = st.sampled_from(["", "Sec-WebSocket-Extensions: permessage-deflate"])


@examples(max_examples=300)
@given(streams, st.lists(st.integers(0, 5000), max_size=8), offers)
@example(frame(1, b"a", fin=False) + frame(1, b"b") + frame(0, b"c"), [], "")
@example(frame(1, b"x" * 2000) + frame(1, b"x" * 2001) + frame(1, b"c"), [], "")
@example(frame(1, b"a") + b"\x81\xfe\x00\x05\x01\x02\x03\x04ijklm" + frame(1, b"b"), [], "")
@example(
    frame(1, b"a") + frame(1, b"\xf2\x48\xcd\xc9\xc9\x07\x00", rsv=4),
    [],
    "Sec-WebSocket-Extensions: permessage-deflate",
)
def test_short_path_and_autobahn_agree_in_any_segmentation(stream: bytes, places: list[int], more: str) -> None:
    data = stream + END
    expected = Server(ByAutobahn, more).feed(data)
    assert Server(more=more).feed(data) == expected
    assert Server(more=more).feed(*segments(data, places)) == expected


def test_invalid_utf8_is_refused_before_the_message_ends() -> None:
    server = Server()
    received, sent, is_open = server.feed(frame(1, "κόσμε".encode() + b"\xf4", fin=False), b"")
    assert is_open and not sent
    received, sent, is_open = server.feed(frame(0, b"\x90", fin=False))  # no character begins with these two bytes
    assert not received and not is_open
    assert [(opcode, payload[:2]) for opcode, payload in sent] == [(8, (1007).to_bytes(2, "big"))]


@given(st.lists(st.one_of(good_frames, fragmented), max_size=5).map(b"".join))
def test_short_path_and_autobahn_agree_byte_by_byte(stream: bytes) -> None:
    data = stream + END
    assert Server().feed(*(bytes((byte,)) for byte in data)) == Server(ByAutobahn).feed(data)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("size", [0, 1, 3, 4, 5, 125, 126, 999, 1000, 1001, 2000])
def test_every_length_is_unmasked(size: int, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "USES_NVX", module.USES_NVX and native)
    text = bytes(33 + place % 90 for place in range(size))
    for mask in (b"\0\0\0\0", b"\x01\x80\xff\x10", b"\xff\xff\xff\xff"):
        received, sent, is_open = Server().feed(frame(1, text, mask=mask))
        assert (received, sent, is_open) == ([text], [(1, text)], True)


def test_frames_beyond_a_time_slice_are_processed_in_later_turns() -> None:
    server = Server()
    clock, session = server.clock, server.sessions[0]
    receive = session.receive

    def slowly(payload: bytes) -> None:
        clock.rightNow += 0.002
        receive(payload)

    session.receive = slowly  # type: ignore[method-assign]
    numbers = [b"%d" % number for number in range(20)]
    server.connection.dataReceived(b"".join(frame(1, number) for number in numbers) + frame(1, b"cut")[:3])
    received = [len(session.received)]
    while not server.wire.reading:
        clock.advance(0)
        received.append(len(session.received))
    assert session.received == numbers
    assert all(2 <= later - earlier <= 4 for earlier, later in itertools.pairwise([0, *received[:-1]]))
    server.connection.dataReceived(frame(1, b"cut")[3:])
    assert session.received[-1] == b"cut"
