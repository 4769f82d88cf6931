"""Processing of received bytes: the short path and Autobahn alone give the same result, in any segmentation."""

from __future__ import annotations

import itertools
import zlib
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

# Without batches: where one is divided depends on the segments.
SETTINGS = settings.WebSocketSettings(message_size_limit=2000, batch_size_limit=0, max_fragments=5, compression=True)
BATCHES = settings.WebSocketSettings(
    message_size_limit=2000,
    batch_size_limit=50_000,
    decompressed_message_size_limit=50_000,
    max_fragments=5,
    compression=True,
)


class Wire:
    """A transport that accepts all data."""

    def __init__(self) -> None:
        self.written = bytearray()
        self.writes = 0
        self.reading = True

    def write(self, data: bytes) -> None:
        self.written += data
        self.writes += 1

    def getPeer(self) -> Any:
        return self

    client = ("192.0.2.1", 4711)

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

    def __init__(
        self,
        protocol: type[WebSocketConnection] = WebSocketConnection,
        more: str = "",
        websocket: settings.WebSocketSettings = SETTINGS,
    ) -> None:
        self.clock = Clock()
        self.sessions: list[Echo] = []
        self.wire = Wire()
        self.metrics = metrics = Metrics()
        client = settings.ClientSettings()
        self.factory = WebSocketFactory(
            self.make_session,
            websocket,
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


def test_the_answers_to_all_frames_of_one_read_leave_in_one_write() -> None:
    server = Server()
    server.wire.writes = 0
    received, sent, _ = server.feed(frame(1, b"one") + frame(1, b"two") + frame(9, b"?") + frame(1, b"three"))
    assert received == [b"one", b"two", b"three"]
    assert sent == [(1, b"one"), (1, b"two"), (10, b"?"), (1, b"three")]
    assert server.wire.writes == 1


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


COMMANDS = [b'{"id":%d,"subscribe":{"channel":"c%d","token":"%b"}}' % (n, n, b"t" * 700) for n in range(1, 51)]
BATCH = b"\n".join(COMMANDS)
DEFLATE = "Sec-WebSocket-Extensions: permessage-deflate"


def compressed(payload: bytes) -> bytes:
    deflater = zlib.compressobj(wbits=-15)
    data = deflater.compress(payload) + deflater.flush(zlib.Z_SYNC_FLUSH)
    return frame(1, data.removesuffix(b"\0\0\xff\xff"), rsv=4)


@pytest.mark.parametrize("batch", [BATCH, BATCH + b"\n"])
@pytest.mark.parametrize("size", [1, 997, 4096, 100_000])
def test_a_batch_may_be_longer_than_a_command_and_is_passed_on_as_it_arrives(batch: bytes, size: int) -> None:
    server = Server(websocket=BATCHES)
    data = frame(1, batch)
    for start in range(0, len(data), size):
        server.connection.dataReceived(data[start : start + size])
        assert server.factory.queued.size <= 2000
    received = server.sessions[0].received
    assert not server.connection.is_closing
    assert [line for part in received for line in part.removesuffix(b"\n").split(b"\n")] == COMMANDS
    assert size == 100_000 or len(received) > 5
    assert server.factory.queued.size == 0
    assert server.feed(frame(1, b"after it"))[0][-1] == b"after it"


def test_a_batch_in_fragments_and_a_compressed_one() -> None:
    cut = len(BATCH) // 2
    for data in (frame(1, BATCH[:cut], fin=False) + frame(0, BATCH[cut:]), compressed(BATCH)):
        received, _, is_open = Server(more=DEFLATE, websocket=BATCHES).feed(data)
        assert is_open
        assert b"".join(received).count(b"subscribe") == 50


@pytest.mark.parametrize("before", [b"", COMMANDS[0] + b"\n", BATCH + b"\n"])
@pytest.mark.parametrize("make", [lambda payload: frame(1, payload), compressed])
def test_each_command_of_a_batch_is_held_to_the_limit_of_commands(before: bytes, make: Any) -> None:
    for payload, code in ((b"x" * 2000, None), (b"x" * 2001, 1009), (b"x" * 2001 + b"\n{}", 1009)):
        _, sent, is_open = Server(more=DEFLATE, websocket=BATCHES).feed(make(before + payload))
        assert is_open == (code is None)
        assert [int.from_bytes(body[:2], "big") for opcode, body in sent if opcode == 8] == [code] * (not is_open)


def test_a_client_comes_back_after_a_batch_that_is_too_long() -> None:
    server = Server(websocket=BATCHES)
    received, sent, is_open = server.feed(frame(1, BATCH + b"\n" + BATCH)[:14])
    assert (received, is_open) == ([], False)
    assert int.from_bytes(sent[-1][1][:2], "big") == 3013
    bad_input = [one for one in server.metrics.snapshot() if one.name == "realtime_bad_input" and one.value]
    assert [dict(one.labels)["kind"] for one in bad_input] == ["batch_size"]
