"""Message compression: negotiation, outgoing messages, and incoming messages from hostile peers."""

from __future__ import annotations

import itertools
import random
import time
import tracemalloc
import zlib
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from realtime.http.deflate import (
    Agreement,
    CompressedFrames,
    CorruptMessage,
    Inflater,
    MessageTooBig,
    deflate,
    negotiate,
)
from realtime.http.frames import text_frame

LIMIT = 655_360
BOTH = "permessage-deflate; server_no_context_takeover; client_no_context_takeover"


def inflate(*pieces: bytes, limit: int = LIMIT) -> bytes:
    inflater = Inflater(limit)
    inflated = b"".join([inflater.feed(piece) for piece in pieces])
    inflater.finish()
    return inflated


def inflate_by_rfc(payload: bytes, window: int = 15) -> bytes:
    """Inflate as RFC 7692 section 7.2.2 says, without context."""
    return zlib.decompressobj(-window).decompress(payload + b"\x00\x00\xff\xff")


GOOD: dict[str, Agreement] = {
    "permessage-deflate": Agreement(BOTH, 12),
    "permessage-deflate; client_max_window_bits": Agreement(BOTH, 12),
    "permessage-deflate;client_max_window_bits=15": Agreement(BOTH, 12),
    "permessage-deflate; client_max_window_bits=8": Agreement(BOTH, 12),
    'permessage-deflate; client_max_window_bits="10"': Agreement(BOTH, 12),
    "permessage-deflate; server_no_context_takeover": Agreement(BOTH, 12),
    "permessage-deflate; client_no_context_takeover; server_no_context_takeover": Agreement(BOTH, 12),
    "permessage-deflate; server_max_window_bits=15": Agreement(f"{BOTH}; server_max_window_bits=12", 12),
    "permessage-deflate; server_max_window_bits=12": Agreement(f"{BOTH}; server_max_window_bits=12", 12),
    "permessage-deflate; server_max_window_bits=11": Agreement(f"{BOTH}; server_max_window_bits=11", 11),
    'permessage-deflate; server_max_window_bits="9"': Agreement(f"{BOTH}; server_max_window_bits=9", 9),
    "permessage-deflate ;\tserver_max_window_bits=10 ; client_max_window_bits": Agreement(
        f"{BOTH}; server_max_window_bits=10", 10
    ),
    "x-unknown, permessage-deflate": Agreement(BOTH, 12),
    "x-unknown; a=b; c, permessage-deflate; client_max_window_bits, other": Agreement(BOTH, 12),
    "permessage-deflate; server_max_window_bits=8, permessage-deflate": Agreement(BOTH, 12),
    "permessage-deflate; what=1, permessage-deflate; server_max_window_bits=10": Agreement(
        f"{BOTH}; server_max_window_bits=10", 10
    ),
    ", ,permessage-deflate": Agreement(BOTH, 12),
    "x," * 7 + "permessage-deflate": Agreement(BOTH, 12),
    "permessage-deflate," * 50: Agreement(BOTH, 12),
}


@pytest.mark.parametrize("offers", GOOD)
def test_supported_offers_are_accepted(offers: str) -> None:
    assert negotiate(offers) == GOOD[offers]


ODD_BITS = (
    "",
    "7",
    "16",
    "-1",
    "abc",
    "0",
    "08",
    "010",
    "1_0",
    "+9",
    "9.0",
    "1e1",
    "99999",
    "9" * 5000,
    "\u0661\u0660",
)
DECLINED = [
    "",
    ",",
    ";",
    "=",
    "x",
    "permessage-deflate-2",
    "permessage_deflate",
    "Permessage-Deflate",
    "permessage-deflat",
    "x-webkit-deflate-frame",
    "permessage-bzip2",
    '"permessage-deflate"',
    "permessage-deflate=1",
    "permessage-deflate;",
    "permessage-deflate;;",
    "permessage-deflate; unknown",
    "permessage-deflate; Server_no_context_takeover",
    "permessage-deflate; server_no_context_takeover=1",
    "permessage-deflate; server_no_context_takeover=",
    "permessage-deflate; client_no_context_takeover=true",
    'permessage-deflate; client_no_context_takeover=""',
    "permessage-deflate; server_max_window_bits",
    "permessage-deflate; server_max_window_bits=8",  # not supported by zlib
    'permessage-deflate; server_max_window_bits="10',
    'permessage-deflate; server_max_window_bits=10"',
    "permessage-deflate; server_max_window_bits='10'",
    "permessage-deflate; server_max_window_bits=10; server_max_window_bits=10",
    "permessage-deflate; client_max_window_bits; client_max_window_bits=10",
    "permessage-deflate; server_no_context_takeover; server_no_context_takeover",
    "permessage-deflate server_no_context_takeover",
    "permessage-deflate; server_max_window_bits=10 11",
    "permessage-deflate; server_max_window_bits = = 10",
    "permessage-deflate; a" * 400,
    "x," * 8 + "permessage-deflate",
    "permessage-deflate; server_max_window_bits=8," * 50,
    "x" * 8000,
    ";" * 8000,
    "=" * 8000,
    '"' * 8000,
    *(f"permessage-deflate; server_max_window_bits={bits}" for bits in ODD_BITS),
    *(f"permessage-deflate; client_max_window_bits={bits}" for bits in ODD_BITS),
    *(f'permessage-deflate; client_max_window_bits="{bits}"' for bits in ("", "7", "16", "1 0")),
]


@pytest.mark.parametrize("offers", DECLINED)
def test_unsupported_offers_are_declined_quickly(offers: str) -> None:
    began = time.process_time()
    assert negotiate(offers) is None
    assert time.process_time() - began < 0.05


@given(st.text(alphabet='permessage-deflate;,= \t"0123456789_serverclientnocontexttakeovermaxwindowbits', max_size=200))
def test_no_offer_raises(offers: str) -> None:
    negotiate("permessage-deflate;" + offers)
    negotiate(offers)


@given(st.binary(max_size=20_000), st.integers(9, 12), st.integers(1, 9))
def test_a_deflated_message_inflates_with_its_window_and_without_context(
    payload: bytes, window: int, level: int
) -> None:
    assert inflate_by_rfc(deflate(payload, window, level), window) == payload


@given(st.binary(max_size=5000), st.lists(st.integers(0, 5000), max_size=5))
def test_a_message_is_inflated_in_any_segmentation(payload: bytes, cuts: list[int]) -> None:
    message = deflate(payload, 12, 6)
    edges = sorted({0, len(message), *(min(cut, len(message)) for cut in cuts)})
    pieces = [message[start:end] for start, end in itertools.pairwise(edges)]
    assert inflate(*pieces) == payload


# The examples of RFC 7692 section 7.2.3, all for the same word.
EXAMPLES = {
    "compressed": b"\xf2\x48\xcd\xc9\xc9\x07\x00",
    "not compressed": b"\x00\x05\x00\xfa\xff\x48\x65\x6c\x6c\x6f\x00",
    "a last block": b"\xf3\x48\xcd\xc9\xc9\x07\x00\x00",
    "a last block without following byte": b"\xf3\x48\xcd\xc9\xc9\x07\x00",
    "two blocks": b"\xf2\x48\x05\x00\x00\x00\xff\xff\xca\xc9\xc9\x07\x00",
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_of_the_standard(name: str) -> None:
    message = EXAMPLES[name]
    for cut in range(len(message) + 1):
        assert inflate(message[:cut], message[cut:]) == b"Hello"


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"\xff",
        b"\x06",  # a block of the reserved kind
        b"\x00\x05\x00\x00\x00Hello\x00",  # the length is not that of its complement
        b"\x00\x05\x00\xfa\xffHel",  # ends inside a block
        b"\xf2\x48\xcd",
        b"\xf2\x00\x11\x00\x00",  # the standard's second message, with the context of the first
        b"\xf3\x48\xcd\xc9\xc9\x07\x00\x00\x00",  # continues after a last block
        b"\xf3\x48\xcd\xc9\xc9\x07\x00\x01",
        b"\x03\x00" * 30_000,
        b"\xf2\x48\xcd\xc9\xc9\x07\x00" + b"\x00\x00\xff\xff" + b"trailing",
    ],
)
def test_corrupt_messages(message: bytes) -> None:
    for step in (1, 7, len(message) or 1):
        pieces = [message[start : start + step] for start in range(0, len(message), step)]
        with pytest.raises(CorruptMessage):
            inflate(*pieces)


def test_flipped_bits_raise_corrupt_message_only() -> None:
    chance = random.Random(1)
    text = ('{"id":1,"publish":{"channel":"chat","data":"' + "words and more words " * 20 + '"}}').encode()
    message = deflate(text, 12, 6)
    refused = 0
    for _ in range(10_000):
        broken = bytearray(message)
        for _ in range(chance.randint(1, 3)):
            broken[chance.randrange(len(broken))] ^= 1 << chance.randrange(8)
        try:
            inflate(bytes(broken))
        except CorruptMessage:
            refused += 1
    assert refused > 3000


@given(st.lists(st.binary(max_size=300), max_size=5))
def test_random_bytes_raise_declared_errors_only(pieces: list[bytes]) -> None:
    with suppress(CorruptMessage, MessageTooBig):
        inflate(*pieces, limit=1000)


def test_the_limit_is_exact() -> None:
    message = deflate(b"x" * 1000, 12, 6)
    assert len(inflate(message, limit=1000)) == 1000
    with pytest.raises(MessageTooBig):
        inflate(message, limit=999)


@pytest.mark.parametrize("pieces", [1, 1000])
def test_a_decompression_bomb_of_60_megabytes_takes_no_more_memory_than_the_limit(pieces: int) -> None:
    message = deflate(bytes(60 << 20), 12, 9)
    size = -(-len(message) // pieces)
    assert len(message) < 65536
    tracemalloc.start()
    try:
        with pytest.raises(MessageTooBig):
            inflate(*(message[start : start + size] for start in range(0, len(message), size)))
        assert tracemalloc.get_traced_memory()[1] < 3 * LIMIT
    finally:
        tracemalloc.stop()


def test_frames_are_compressed_only_if_that_saves_bytes() -> None:
    frames = CompressedFrames(text_frame, 12, 1, min_size=100)
    long, short, dense = b"again and " * 20, b"a" * 99, random.Random(1).randbytes(200)
    assert frames(short) == text_frame(short)
    assert frames(dense) == text_frame(dense)
    assert frames(b"") == text_frame(b"")
    frame = frames(long)
    assert frame[0] == 0xC1  # FIN, RSV1, text
    assert frame[1] == len(frame) - 2 < 100
    assert inflate_by_rfc(frame[2:]) == long


def test_level_and_window_take_effect() -> None:
    chance = random.Random(1)
    words = [chance.randbytes(6).hex() for _ in range(300)]
    text = " ".join(chance.choice(words) for _ in range(3000)).encode()
    lengths = [len(deflate(text, 12, level)) for level in (1, 6)]
    assert lengths[1] < lengths[0]
    assert len(deflate(text, 9, 6)) > len(deflate(text, 12, 6))
