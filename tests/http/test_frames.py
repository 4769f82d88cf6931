"""Frames against a decoder written from RFC 6455 section 5.2."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from realtime.http.frames import (
    binary_frame,
    close_frame,
    frame_bounds,
    mark_compressed,
    ping_frame,
    pong_frame,
    text_frame,
    whole_message,
)


def decode(frame: bytes) -> tuple[int, bytes]:
    """Return (opcode, payload) of exactly one final, unmasked frame with the shortest length."""
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
def test_each_encoding_of_the_length(length: int) -> None:
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


def test_mark_compressed_sets_rsv1() -> None:
    assert mark_compressed(text_frame(b"x" * 300)) == b"\xc1" + text_frame(b"x" * 300)[1:]


@given(st.binary(max_size=20), st.integers(0, 25))
def test_frame_bounds_of_arbitrary_bytes(data: bytes, start: int) -> None:
    bounds = frame_bounds(data, start)
    if bounds is not None:
        body, stop = bounds
        assert start + 2 <= body <= len(data)
        assert body <= stop
    else:
        assert len(data) < start + 14


@given(
    st.one_of(st.binary(max_size=300), st.sampled_from([65535, 65536]).map(bytes)), st.booleans(), st.binary(max_size=5)
)
def test_frame_bounds_of_a_valid_frame(payload: bytes, masked: bool, before: bytes) -> None:
    plain = text_frame(payload)
    head, body = plain[: len(plain) - len(payload)], plain[len(plain) - len(payload) :]
    whole = bytes((head[0], head[1] | 0x80)) + head[2:] + b"mask" + body if masked else plain
    start = len(before)
    assert frame_bounds(before + whole, start) == (start + len(whole) - len(payload), start + len(whole))
    for length in range(len(whole) - len(payload)):
        assert frame_bounds(before + whole[:length], start) is None


masks = st.binary(min_size=4, max_size=4)


def client_frame(first: int, payload: bytes, mask: bytes, length: int | None = None) -> bytes:
    """Build a client's frame. The payload is not masked: it is not decoded. length: bytes of the extended length."""
    size = len(payload)
    length = (0 if size < 126 else 2 if size < 65536 else 8) if length is None else length
    second = 0x80 | (size if not length else 126 if length == 2 else 127)
    return bytes((first, second)) + (size.to_bytes(length, "big") if length else b"") + mask + payload


@given(st.sampled_from([0x81, 0x82]), st.binary(max_size=300), masks)
def test_whole_message_accepts_exactly_one_complete_frame(first: int, payload: bytes, mask: bytes) -> None:
    frame = client_frame(first, payload, mask)
    body = whole_message(frame, first, len(payload))
    assert frame[body:] == payload and frame[body - 4 : body] == mask
    # Shorter or longer data, and all other frames, give 0.
    assert not whole_message(frame[:-1], first, len(payload))
    assert not whole_message(frame + b"x", first, len(payload))
    assert not whole_message(frame, first ^ 3, len(payload))
    assert not whole_message(bytes((first & 0x7F,)) + frame[1:], first, len(payload))  # a fragment
    assert not whole_message(bytes((first | 0x40,)) + frame[1:], first, len(payload))  # a compressed message
    assert not whole_message(frame[:1] + bytes((frame[1] & 0x7F,)) + frame[2:], first, len(payload))  # no mask
    assert not (payload and whole_message(frame, first, len(payload) - 1))  # over the limit


@given(st.binary(max_size=125), masks, st.sampled_from([2, 8]))
def test_whole_message_rejects_a_length_that_is_not_in_its_shortest_form(
    payload: bytes, mask: bytes, length: int
) -> None:
    assert not whole_message(client_frame(0x81, payload, mask, length), 0x81, 1000)


@given(st.binary(max_size=20))
def test_whole_message_of_arbitrary_bytes(data: bytes) -> None:
    body = whole_message(data, data[0] if data else 0x81, 1000)
    assert 0 <= body <= len(data)
