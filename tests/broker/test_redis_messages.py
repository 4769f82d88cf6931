"""Messages between nodes: what is not one is refused, whatever its bytes."""

from __future__ import annotations

from contextlib import suppress

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from realtime.broker.redis_messages import (
    VERSION,
    BadMessage,
    ChannelJoin,
    ChannelPublication,
    decode,
    decode_entry,
    decode_position,
    encode,
    entry_of,
)
from realtime.types import ClientInfo, Publication

ALICE = ClientInfo("alice", "client-a")
PUBLICATION = ChannelPublication(VERSION, "sender", 7, b"1", ALICE, {"k": "v"}, True, False, 0, "")


def test_an_entry_is_a_publication_without_its_position() -> None:
    found = decode_entry(entry_of(encode(PUBLICATION)), 2**53 - 1, "epoch")
    assert found == msgspec.structs.replace(PUBLICATION, offset=2**53 - 1, epoch="epoch")
    assert found.publication == Publication(b"1", 2**53 - 1, ALICE, {"k": "v"}, True)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1",
        b"\x91" * 5000,
        encode(PUBLICATION)[:-1],
        encode(PUBLICATION) + b"\x00",
        encode([1, VERSION + 1, "sender", 7, b"1", None, None, False, False, 0, ""]),
        encode([9, VERSION, "sender", 7]),
        encode([1, VERSION, "sender", 7, "text", None, None, False, False, 0, ""]),
        encode([1, VERSION, b"\xff", 7, b"1", None, None, False, False, 0, ""]),
    ],
)
def test_what_is_no_message_is_refused(body: bytes) -> None:
    with pytest.raises(BadMessage):
        decode(body)


@given(st.binary())
def test_any_bytes_are_a_message_or_refused(body: bytes) -> None:
    for read in (decode, decode_position, lambda entry: decode_entry(entry, 1, "e")):
        with suppress(BadMessage):
            read(body)  # type: ignore[operator]


def test_a_join_in_a_history_is_refused() -> None:
    with pytest.raises(BadMessage):
        decode_entry(encode(ChannelJoin(VERSION, "sender", 7, ALICE)), 1, "epoch")
