"""The data plane's bytes: whole messages however they are cut, and one typed error for all else."""

from __future__ import annotations

import random
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from realtime.pubsub import broker_messages
from realtime.types import ClientInfo, EngineStats, HistoryOptions, HistoryPage, Position, Publication

ANYBODY = ClientInfo("42", "client-1", b'{"name":"A"}', b"")
AT = Position(7, "abcdefgh")

TO_BROKER: list[broker_messages.BrokerMessage] = [
    broker_messages.Hello(broker_messages.VERSION, "abcdefgh"),
    broker_messages.Restore(["a", "b"], [("a", ANYBODY, True, False)], [ANYBODY]),
    broker_messages.Publish(
        1, "chat", b'{"a":1}', HistoryOptions(10, 60.0), ANYBODY, {"k": "v"}, "key", 2**64 - 1, "epoch", True, False
    ),
    broker_messages.Publish(2, "chat", b"", HistoryOptions(), None, None, "", 0, "", False, True),
    broker_messages.Subscribe(3, "chat"),
    broker_messages.Unsubscribe("chat"),
    broker_messages.History(4, "chat", HistoryOptions(10, 60.0), AT, -1, True, 4096),
    broker_messages.History(5, "chat", HistoryOptions(), None, 0, False, 1),
    broker_messages.RemoveHistory(6, "chat"),
    broker_messages.Enter(7, "chat", ANYBODY, True, False),
    broker_messages.Leave(8, "chat", "client-1"),
    broker_messages.Presence(9, "chat"),
    broker_messages.PresenceStats(10, "chat"),
    broker_messages.Connected(ANYBODY),
    broker_messages.Disconnected("client-1"),
    broker_messages.Tally(1000),
    broker_messages.TakeCensus(11),
    broker_messages.Instruct(12, b"\x00\xff", "3"),
    broker_messages.Admit(13, ANYBODY, 5),
]
TO_WORKER: list[broker_messages.BrokerMessage] = [
    broker_messages.Welcome(broker_messages.VERSION, "abcdefgh"),
    broker_messages.Published("chat", Publication(b"1", 2**64 - 1, ANYBODY, {"k": "v"}), "abcdefgh"),
    broker_messages.Joined("chat", ANYBODY),
    broker_messages.Left("chat", ANYBODY),
    broker_messages.Instructed(b"order"),
    broker_messages.Done(1),
    broker_messages.Placed(2, AT),
    broker_messages.Page(3, HistoryPage([Publication(b"1", 7)], AT)),
    broker_messages.Present(4, {"client-1": ANYBODY}),
    broker_messages.Stats(5, (2, 1)),
    broker_messages.Counted(6, EngineStats(1, 2, 3, 4)),
    broker_messages.Failed(7, 106, "limit exceeded", False),
    broker_messages.Reached(8, 2),
    broker_messages.Admitted(9, True),
]
DIRECTIONS = [(broker_messages.ToBroker, TO_BROKER), (broker_messages.ToWorker, TO_WORKER)]


def decode(kinds: Any, *pieces: bytes) -> list[broker_messages.BrokerMessage]:
    decoder = broker_messages.Decoder(kinds)
    return [message for piece in pieces for message in decoder.feed(piece)]


def frame(body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + body


@pytest.mark.parametrize(("kinds", "messages"), DIRECTIONS)
def test_every_kind_survives_the_journey(kinds: Any, messages: list[broker_messages.BrokerMessage]) -> None:
    assert {type(message) for message in messages} == set(get_args(kinds))
    assert decode(kinds, b"".join(map(broker_messages.pack, messages))) == messages


@given(st.data())
def test_a_stream_may_be_cut_anywhere(data: st.DataObject) -> None:
    messages = data.draw(st.lists(st.sampled_from(TO_BROKER), max_size=8))
    stream = b"".join(map(broker_messages.pack, messages))
    cuts = sorted(data.draw(st.sets(st.integers(0, len(stream)))))
    pieces = [stream[start:end] for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    assert decode(broker_messages.ToBroker, *pieces) == messages


def test_a_message_comes_with_its_last_byte() -> None:
    decoder, packed = (
        broker_messages.Decoder(broker_messages.ToBroker),
        broker_messages.pack(broker_messages.Subscribe(1, "chat")),
    )
    for byte in packed[:-1]:
        assert list(decoder.feed(bytes([byte]))) == []
    assert list(decoder.feed(packed[-1:])) == [broker_messages.Subscribe(1, "chat")]


def test_a_frame_of_the_largest_size_passes() -> None:
    message = broker_messages.Instruct(1, b"x" * (broker_messages.FRAME_LIMIT - 9), "")
    packed = broker_messages.pack(message)
    assert len(packed) == broker_messages.FRAME_LIMIT + 4
    assert decode(broker_messages.ToBroker, packed) == [message]


def test_a_larger_message_is_not_packed() -> None:
    with pytest.raises(broker_messages.BadFrame):
        broker_messages.pack(broker_messages.Instruct(1, b"x" * (broker_messages.FRAME_LIMIT - 8), ""))


@pytest.mark.parametrize("length", [broker_messages.FRAME_LIMIT + 1, 2**31, 2**32 - 1])
def test_a_length_over_the_limit_is_refused_at_once(length: int) -> None:
    with pytest.raises(broker_messages.BadFrame):
        decode(broker_messages.ToBroker, length.to_bytes(4, "big"))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1",
        b"\x90",
        b"\x80",
        b"\x91\x63",
        b"\x92\x04\x01",
        b"\x93\x04\x01\xa1\xff",
        b"\x93\x04\xff\xa1c" + b"\x91" * 100_000,
        b"\x94\x04\x01\xa1c" + b"\x91" * 100_000,
        b"\x94\x02\xdd\xff\xff\xff\xff",
        b"\x94\x02\x90\x90\xdd\xff\xff\xff\xff",
        b"\x93\x10\x01\xc6\xff\xff\xff\xff",
        b"\x93\x04\xcf" + b"\xff" * 8 + b"\xa1c\x00",
    ],
)
def test_what_is_no_message_is_a_bad_frame(body: bytes) -> None:
    with pytest.raises(broker_messages.BadFrame):
        decode(broker_messages.ToBroker, frame(body))


def test_the_other_direction_is_not_understood() -> None:
    with pytest.raises(broker_messages.BadFrame):
        decode(broker_messages.ToWorker, broker_messages.pack(TO_BROKER[2]))


def test_fields_of_a_later_version_are_skipped() -> None:
    assert decode(broker_messages.ToBroker, frame(b"\x94\x04\x01\xa1c\xc3")) == [broker_messages.Subscribe(1, "c")]


def feed_anything(kinds: Any, data: bytes) -> None:
    """Whatever comes, it is messages or BadFrame; anything else fails the test."""
    try:
        for message in broker_messages.Decoder(kinds).feed(data):
            assert isinstance(message, get_args(kinds))
    except broker_messages.BadFrame:
        pass


@given(st.sampled_from([broker_messages.ToBroker, broker_messages.ToWorker]), st.binary(max_size=200))
def test_random_bytes(kinds: Any, body: bytes) -> None:
    feed_anything(kinds, body)
    feed_anything(kinds, frame(body))


@pytest.mark.parametrize(("kinds", "messages"), DIRECTIONS)
def test_damaged_messages(kinds: Any, messages: list[broker_messages.BrokerMessage]) -> None:
    random_source = random.Random(5)
    for message in messages * 300:
        body = bytearray(broker_messages.pack(message)[4:])
        for _ in range(random_source.randint(1, 3)):
            at = random_source.randrange(len(body) + 1)
            body[at : at + random_source.randint(0, 2)] = random_source.randbytes(random_source.randint(0, 2))
        feed_anything(kinds, frame(bytes(body)))


@pytest.mark.parametrize(("kinds", "messages"), DIRECTIONS)
def test_messages_cut_short(kinds: Any, messages: list[broker_messages.BrokerMessage]) -> None:
    for message in messages:
        body = broker_messages.pack(message)[4:]
        for end in range(len(body)):
            with pytest.raises(broker_messages.BadFrame):
                decode(kinds, frame(body[:end]))


@pytest.mark.timeout(20)
def test_a_large_frame_in_small_pieces() -> None:
    """Copying what has come with every piece would take minutes here."""
    packed = broker_messages.pack(broker_messages.Instruct(1, b"x" * 15_000_000, ""))
    assert decode(broker_messages.ToBroker, *(packed[at : at + 512] for at in range(0, len(packed), 512)))
