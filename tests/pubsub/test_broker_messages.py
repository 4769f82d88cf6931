"""Messages between worker and broker: whole frames however a stream is cut, and one typed error for anything else."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from realtime.pubsub import broker_messages
from realtime.pubsub.broker_messages import (
    FRAME_LIMIT,
    NOTICES,
    REQUESTS,
    TO_BROKER,
    TO_WORKER,
    VERSION,
    BadFrame,
    FrameReader,
    pack,
)
from realtime.pubsub.engine import (
    AddClient,
    AddPresence,
    AdmitClient,
    Cut,
    DropValues,
    EndLease,
    EngineRequest,
    FetchValue,
    FoundValue,
    GetHistory,
    GetNodes,
    GetPresence,
    GetPresenceStats,
    GetStats,
    HoldRole,
    Publish,
    RemoveClient,
    RemoveHistory,
    RemovePresence,
    ReportSubscriptions,
    ResignRole,
    SendOrder,
    StoreValue,
    Subscribe,
    TakeLease,
    TakeLostClients,
    Term,
    Unsubscribe,
    ValueState,
)
from realtime.types import ClientInfo, EngineStats, HistoryOptions, HistoryPage, NodeInfo, Position, Publication

CLIENT = ClientInfo("42", "client-1", b'{"name":"A"}', b"")
AT = Position(7, "abcdefgh")

FROM_WORKER: list[Any] = [
    broker_messages.Hello(VERSION, "abcdefgh"),
    broker_messages.Restore(["a", "b"], [AddPresence("a", CLIENT, True, False)], [CLIENT]),
    Publish("chat", b'{"a":1}', HistoryOptions(10, 60.0), CLIENT, {"k": "v"}, "key", 2**64 - 1, "epoch", True, False),
    Publish("chat", b"", HistoryOptions(), binary=True),
    Subscribe("chat"),
    Unsubscribe("chat"),
    GetHistory("chat", HistoryOptions(10, 60.0), AT, -1, True, 4096),
    GetHistory("chat", HistoryOptions(), None, 0, False, 1),
    RemoveHistory("chat"),
    AddPresence("chat", CLIENT, True, False),
    RemovePresence("chat", "client-1"),
    GetPresence("chat"),
    GetPresenceStats("chat"),
    AddClient(CLIENT),
    RemoveClient("client-1"),
    ReportSubscriptions(1000),
    GetStats(),
    GetNodes(),
    SendOrder(b"\x00\xff", "3"),
    AdmitClient(CLIENT, 5),
    TakeLostClients(100),
    Cut("batch", "1-2", ["client-1"], {"client-1": "secret"}, {"chat": ["client-1"]}),
    HoldRole("tasks", "node/1-2", 5.0, 3),
    ResignRole("tasks", "node/1-2", b"order"),
    TakeLease("forecast", b"key", "1-2/3", 10.0, b"order"),
    EndLease("1-2/3", b"order"),
    FetchValue("forecast", b"key", ["tag"], "1-2/3", 10.0, 1.5),
    StoreValue("forecast", b"key", ["tag"], "1-2/3", b"stamp", b"value", 1.5, 60.0),
    DropValues("forecast", None, ["tag"], 60.0),
]
FROM_BROKER: list[Any] = [
    broker_messages.Welcome(VERSION, "abcdefgh"),
    broker_messages.Published("chat", Publication(b"1", 2**64 - 1, CLIENT, {"k": "v"}), "abcdefgh"),
    broker_messages.Joined("chat", CLIENT),
    broker_messages.Left("chat", CLIENT),
    broker_messages.OrderSent(b"order"),
    broker_messages.CutReached("batch", [CLIENT], {"client-1": "secret"}, {"chat": ["client-1"]}),
    broker_messages.CaughtUp(2),
    broker_messages.ClientsLost(),
    broker_messages.Missed("chat", True),
    broker_messages.RequestFailed(7, 106, "limit exceeded", False),
]
DIRECTIONS = [(TO_BROKER, FROM_WORKER), (TO_WORKER, FROM_BROKER)]
ANSWERS: list[tuple[type[EngineRequest[Any]], Any]] = [
    (Publish, AT),
    (GetHistory, HistoryPage([Publication(b"1", 7)], AT)),
    (RemoveHistory, None),
    (Subscribe, None),
    (SendOrder, 2),
    (AddPresence, None),
    (RemovePresence, None),
    (GetPresence, {"client-1": CLIENT}),
    (GetPresenceStats, (2, 1)),
    (AdmitClient, True),
    (Cut, None),
    (HoldRole, Term(3, 4.5)),
    (ResignRole, None),
    (TakeLostClients, [CLIENT]),
    (TakeLease, "1-2/3"),
    (EndLease, None),
    (FetchValue, FoundValue(ValueState.GRANTED, b"", 0.0, b"stamp")),
    (StoreValue, True),
    (DropValues, None),
    (GetStats, EngineStats(1, 2, 3, 4)),
    (GetNodes, [NodeInfo("uid", "name", "1.0", 60.5, EngineStats(1, 2, 3, 4), 2)]),
]


def decode(kinds: tuple[type[msgspec.Struct], ...], *pieces: bytes) -> list[Any]:
    """Return the messages of a stream. Raises BadFrame for invalid ones, as worker and broker do."""
    reader, decode_body = FrameReader(), broker_messages.message_decoder(kinds)
    try:
        return [decode_body(body) for piece in pieces for _, body in reader.feed(piece)]
    except (ValueError, RecursionError) as error:
        raise BadFrame(str(error)) from error


def frame(body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + bytes(8) + body


@pytest.mark.parametrize(("kinds", "messages"), DIRECTIONS)
def test_every_kind_is_decoded_as_it_was_encoded(kinds: Any, messages: list[Any]) -> None:
    assert {type(message) for message in messages} == set(kinds)
    assert decode(kinds, b"".join(map(pack, messages))) == messages


def test_no_two_kinds_share_a_number() -> None:
    for kinds in (TO_BROKER, TO_WORKER):
        assert len({msgspec.msgpack.decode(pack(m)[12:])[0] for m in FROM_WORKER if type(m) in kinds}) in (
            len(kinds),
            0,
        )


@pytest.mark.parametrize(("kind", "answer"), ANSWERS)
def test_every_answer_is_decoded_as_it_was_encoded(kind: type[EngineRequest[Any]], answer: Any) -> None:
    ((number, body),) = FrameReader().feed(pack(answer, 2**64 - 1))
    assert (number, broker_messages.answer_decoder(kind)(body)) == (2**64 - 1, answer)


def test_every_request_has_an_answer_and_no_notice_has() -> None:
    assert {kind for kind, _ in ANSWERS} == set(REQUESTS)
    assert not set(REQUESTS) & set(NOTICES)
    with pytest.raises(ValueError):
        broker_messages.answer_decoder(Publish)(pack(None)[12:])


@given(st.data())
def test_a_stream_may_be_cut_anywhere(data: st.DataObject) -> None:
    messages = data.draw(st.lists(st.sampled_from(FROM_WORKER), max_size=8))
    stream = b"".join(map(pack, messages))
    cuts = sorted(data.draw(st.sets(st.integers(0, len(stream)))))
    pieces = [stream[start:end] for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    assert decode(TO_BROKER, *pieces) == messages


def test_a_frame_is_complete_with_its_last_byte() -> None:
    reader, packed = FrameReader(), pack(Subscribe("chat"), 1)
    for byte in packed[:-1]:
        assert list(reader.feed(bytes([byte]))) == []
    assert list(reader.feed(packed[-1:])) == [(1, packed[12:])]


def test_a_frame_of_the_largest_size_passes() -> None:
    message = SendOrder(b"x" * (FRAME_LIMIT - 9), "")
    packed = pack(message)
    assert len(packed) == FRAME_LIMIT + 12
    assert decode(TO_BROKER, packed) == [message]


def test_a_larger_message_is_not_packed() -> None:
    with pytest.raises(BadFrame):
        pack(SendOrder(b"x" * (FRAME_LIMIT - 7), ""))


@pytest.mark.parametrize("length", [FRAME_LIMIT + 1, 2**31, 2**32 - 1])
def test_a_length_over_the_limit_is_refused_at_once(length: int) -> None:
    with pytest.raises(BadFrame):
        decode(TO_BROKER, length.to_bytes(4, "big") + bytes(8))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1",
        b"\x90",
        b"\x80",
        b"\x91\x63",
        b"\x91\x04",
        b"\x92\x04\x01",
        b"\x92\x04\xa1\xff",
        b"\x92\x04" + b"\x91" * 100_000,
        b"\x93\x04\xa1c" + b"\x91" * 100_000,
        b"\x94\x02\xdd\xff\xff\xff\xff",
        b"\x94\x02\x90\x90\xdd\xff\xff\xff\xff",
        b"\x92\x10\xc6\xff\xff\xff\xff",
        b"\x92\x04\xcf" + b"\xff" * 8,
    ],
)
def test_an_invalid_body_is_a_bad_frame(body: bytes) -> None:
    with pytest.raises(BadFrame):
        decode(TO_BROKER, frame(body))


def test_messages_of_the_other_direction_are_bad_frames() -> None:
    with pytest.raises(BadFrame):
        decode(TO_WORKER, pack(FROM_WORKER[2]))


def test_fields_of_a_later_version_are_skipped() -> None:
    assert decode(TO_BROKER, frame(b"\x93\x04\xa1c\xc3")) == [Subscribe("c")]


def feed_anything(kinds: Any, data: bytes) -> None:
    """Feed bytes that may be invalid: they yield messages or raise BadFrame. Any other exception fails the test."""
    try:
        for message in decode(kinds, data):
            assert isinstance(message, kinds)
    except BadFrame:
        pass


@given(st.sampled_from([TO_BROKER, TO_WORKER]), st.binary(max_size=200))
def test_random_bytes_decode_or_are_a_bad_frame(kinds: Any, body: bytes) -> None:
    feed_anything(kinds, body)
    feed_anything(kinds, frame(body))


@pytest.mark.parametrize(("kinds", "messages"), DIRECTIONS)
def test_damaged_messages_decode_or_are_a_bad_frame(kinds: Any, messages: list[Any]) -> None:
    random_source = random.Random(5)
    for message in messages * 300:
        body = bytearray(pack(message)[12:])
        for _ in range(random_source.randint(1, 3)):
            at = random_source.randrange(len(body) + 1)
            body[at : at + random_source.randint(0, 2)] = random_source.randbytes(random_source.randint(0, 2))
        feed_anything(kinds, frame(bytes(body)))


@pytest.mark.parametrize(("kinds", "messages"), DIRECTIONS)
def test_truncated_messages_are_bad_frames(kinds: Any, messages: list[Any]) -> None:
    for message in messages:
        body = pack(message)[12:]
        for end in range(len(body)):
            with pytest.raises(BadFrame):
                decode(kinds, frame(body[:end]))


@pytest.mark.timeout(20)
def test_a_large_frame_in_small_pieces_takes_linear_time() -> None:
    """Copying the received bytes with every piece would take minutes here."""
    packed = pack(message := SendOrder(b"x" * 15_000_000, ""))
    assert decode(TO_BROKER, *(packed[at : at + 512] for at in range(0, len(packed), 512))) == [message]
