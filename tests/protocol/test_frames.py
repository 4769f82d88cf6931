"""Frames against a decoder written from RFC 6455 section 5.2."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from realtime.protocol.frames import binary_frame, close_frame, compressed, frame_at, ping_frame, pong_frame, text_frame


def decode(frame: bytes) -> tuple[int, bytes]:
    """(opcode, payload) of exactly one final, unmasked frame with the shortest length."""
    assert frame[0] & 0xF0 == 0x80, "FIN set, RSV clear"
    assert not frame[1] & 0x80, "a server does not mask"
    length, start = frame[1], 2
    if length == 126:
        length, start = int.from_bytes(frame[2:4], "big"), 4
        assert length > 125
    elif length == 127:
        length, start = int.from_bytes(frame[2:10], "big"), 10
        assert length > 65535
    payload = frame[start:]
    assert len(payload) == length
    return frame[0] & 0x0F, payload


@pytest.mark.parametrize("length", [0, 1, 125, 126, 127, 65535, 65536, 70000])
def test_each_form_of_length(length: int) -> None:
    assert decode(text_frame(b"x" * length)) == (1, b"x" * length)


@given(st.binary(max_size=300))
def test_any_text(payload: bytes) -> None:
    assert decode(text_frame(payload)) == (1, payload)


@given(st.binary(max_size=300))
def test_any_binary(payload: bytes) -> None:
    assert decode(binary_frame(payload)) == (2, payload)


def test_a_ping() -> None:
    assert decode(ping_frame()) == (9, b"")


@given(st.binary(max_size=125))
def test_any_pong(payload: bytes) -> None:
    assert decode(pong_frame(payload)) == (10, payload)


@given(st.integers(1000, 4999), st.text(max_size=200))
def test_any_close(code: int, reason: str) -> None:
    opcode, payload = decode(close_frame(code, reason))
    assert opcode == 8
    assert len(payload) <= 125
    assert int.from_bytes(payload[:2], "big") == code
    assert reason.startswith(payload[2:].decode())
    if len(reason.encode()) <= 123:
        assert payload[2:].decode() == reason


def test_a_compressed_frame_says_so() -> None:
    assert compressed(text_frame(b"x" * 300)) == b"\xc1" + text_frame(b"x" * 300)[1:]


@given(st.binary(max_size=20), st.integers(0, 25))
def test_where_any_frame_begins_and_ends(data: bytes, start: int) -> None:
    place = frame_at(data, start)
    if place is not None:
        body, stop = place
        assert start + 2 <= body <= len(data)
        assert body <= stop
    else:
        assert len(data) < start + 14


@given(
    st.one_of(st.binary(max_size=300), st.sampled_from([65535, 65536]).map(bytes)), st.booleans(), st.binary(max_size=5)
)
def test_where_a_good_frame_begins_and_ends(payload: bytes, masked: bool, before: bytes) -> None:
    plain = text_frame(payload)
    head, body = plain[: len(plain) - len(payload)], plain[len(plain) - len(payload) :]
    whole = bytes((head[0], head[1] | 0x80)) + head[2:] + b"mask" + body if masked else plain
    start = len(before)
    assert frame_at(before + whole, start) == (start + len(whole) - len(payload), start + len(whole))
    for length in range(len(whole) - len(payload)):
        assert frame_at(before + whole[:length], start) is None
