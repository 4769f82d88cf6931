"""The shared types: their form on the data plane, and what they keep out of logs."""

from __future__ import annotations

import msgspec
import pytest

from realtime.types import ClientInfo, ConnectRequest, Position, Publication

CONFIDENTIAL = ConnectRequest(token="secret", headers={"cookie": "secret"}, name="js", remote_address="10.0.0.1")


def test_a_connect_request_shows_neither_token_nor_cookies() -> None:
    assert repr(CONFIDENTIAL) == "<ConnectRequest of 'js' from '10.0.0.1'>"


@pytest.mark.parametrize(
    ("value", "array"),
    [
        (Position(7, "abc"), [7, "abc"]),
        (ClientInfo("ada", "c1", b"{}"), ["ada", "c1", b"{}", b""]),
        (Publication(b"1", 3), [b"1", 3, None, None, False, False]),
    ],
)
def test_types_on_the_data_plane_are_arrays_whose_fields_have_defaults(value: msgspec.Struct, array: list) -> None:
    encoded = msgspec.msgpack.encode(value)
    assert msgspec.msgpack.decode(encoded) == array
    assert msgspec.msgpack.decode(encoded, type=type(value)) == value
    required = sum(field.required for field in msgspec.structs.fields(type(value)))
    shortened = msgspec.msgpack.encode(array[:required])
    assert msgspec.msgpack.decode(shortened, type=type(value)) == type(value)(*array[:required])
