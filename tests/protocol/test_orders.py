"""Orders as bytes, from worker to worker."""

from __future__ import annotations

import msgspec
import pytest

from realtime.protocol.orders import (
    ChannelsAnswer,
    ChannelsOrder,
    DisconnectOrder,
    EmulateOrder,
    Order,
    RefreshOrder,
    SubscribeOrder,
    SupersedeOrder,
    UnsubscribeOrder,
    decode_order,
    encode_order,
)
from realtime.types import Position, SubscribeOptions


@pytest.mark.parametrize(
    "order",
    [
        DisconnectOrder("ann", "c1", ("c2", "c3"), 4001, "tidy up", "s3cret"),
        UnsubscribeOrder("ann", "news", "c1", "s3cret", 2500, "moved"),
        SubscribeOrder("ann", "news", SubscribeOptions(b"1", b"2", 3.0, {"presence": True}), since=Position(7, "e")),
        RefreshOrder("", 5.0, True, b'{"n":1}'),
        SupersedeOrder("ann", "c1"),
        ChannelsOrder(1, "0", "news:*"),
        ChannelsAnswer(1, {"news:a": 2}),
        ChannelsAnswer(2, None),
        EmulateOrder("s3cret", b"\x00\xff"),
    ],
)
def test_an_order_arrives_as_it_was_sent(order: Order) -> None:
    assert decode_order(encode_order(order)) == order


@pytest.mark.parametrize(
    "order", [DisconnectOrder(42), DisconnectOrder("42", whitelist=[1]), UnsubscribeOrder("42", None)]
)
def test_an_order_with_a_field_of_a_wrong_type_is_refused(order: Order) -> None:
    with pytest.raises(msgspec.ValidationError):
        encode_order(order)


@pytest.mark.parametrize("data", [b"", b"\xff", b"order", encode_order(SupersedeOrder("ann", "c1"))[:-1]])
def test_other_bytes_are_no_order(data: bytes) -> None:
    with pytest.raises(msgspec.MsgspecError):
        decode_order(data)
