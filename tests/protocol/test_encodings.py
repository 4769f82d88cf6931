"""Every encoding keeps the contract of `Encoding`."""

from __future__ import annotations

import msgspec
import pytest
from msgspec import UNSET

from realtime.errors import ClientError, Disconnect
from realtime.protocol.encodings import Encoding
from realtime.protocol.json_encoding import JSON_ENCODING, JSON_PUSHES
from realtime.protocol.messages import ProtocolError
from realtime.protocol.protobuf import PROTOBUF
from realtime.types import Publication
from tests.protocol.sessions import in_protobuf

BIDIRECTIONAL = pytest.mark.parametrize("encoding", [JSON_ENCODING, PROTOBUF], ids=["json", "protobuf"])
ALL = pytest.mark.parametrize("encoding", [JSON_ENCODING, JSON_PUSHES, PROTOBUF], ids=["json", "pushes", "protobuf"])

PUBLISH = {"id": 3, "publish": {"channel": "news", "data": {"n": 1}}}
SEND = {"send": {"data": 2}}


def message_of(encoding: Encoding, *commands: dict) -> bytes:
    if encoding is PROTOBUF:
        return b"".join(map(in_protobuf, commands))
    return b"\n".join(map(msgspec.json.encode, commands))


@BIDIRECTIONAL
def test_a_message_with_one_command_needs_no_iteration(encoding: Encoding) -> None:
    message = message_of(encoding, PUBLISH)
    command = encoding.decode_command(message)
    assert command is not None and [command] == list(encoding.decode_commands(message))
    assert (command.id, command.publish.channel) == (3, "news")
    assert encoding.validate_data(command.publish.data) == b'{"n":1}'


@BIDIRECTIONAL
def test_a_message_with_several_commands_is_iterated(encoding: Encoding) -> None:
    message = message_of(encoding, PUBLISH, SEND)
    assert encoding.decode_command(message) is None
    assert [command.request()[0] for command in encoding.decode_commands(message)] == ["publish", "send"]


@BIDIRECTIONAL
def test_commands_before_an_invalid_one_are_decoded(encoding: Encoding) -> None:
    commands = encoding.decode_commands(message_of(encoding, PUBLISH) + b"\n\xff\xff")
    assert next(commands).id == 3
    with pytest.raises(ProtocolError):
        list(commands)


@BIDIRECTIONAL
def test_a_ping_is_the_empty_command_and_reply(encoding: Encoding) -> None:
    command = encoding.decode_command(encoding.ping)
    assert command is not None and command.request() == ("", None)


@ALL
def test_data_of_handlers_passes_there_and_back(encoding: Encoding) -> None:
    assert encoding.decode_data(encoding.encode_data({"a": [1, None]})) == {"a": [1, None]}
    assert encoding.encode_data(None) == b"" and encoding.decode_data(b"") is None
    assert encoding.validate_data(UNSET) == b""


@ALL
def test_json_data_fits_every_encoding(encoding: Encoding) -> None:
    assert encoding.is_json(b'{"a":1}')
    for make in (encoding.make_pub, encoding.make_full_pub):
        assert make(Publication(b'{"a":1}', 7), "epoch").offset == 7
    delta = encoding.make_delta_pub(Publication(b'{"a":1}', 7), b"a delta")
    assert delta is not None and delta.delta


def test_only_protobuf_carries_binary_data() -> None:
    publication = Publication(b"\xff", binary=True)
    assert bytes(PROTOBUF.make_pub(publication).data) == b"\xff"
    for encoding in (JSON_ENCODING, JSON_PUSHES):
        for make in (encoding.make_pub, encoding.make_full_pub):
            with pytest.raises(Disconnect) as caught:
                make(publication)
            assert caught.value.code == 3506
        assert encoding.make_delta_pub(publication, b"a delta") is None


@BIDIRECTIONAL
def test_an_error_reply_carries_the_error_s_message(encoding: Encoding) -> None:
    assert b"not found" in encoding.encode_error(3, ClientError(404, "not found"))


@BIDIRECTIONAL
def test_a_command_encoded_again_is_the_same_command(encoding: Encoding) -> None:
    tree = {"op": "or", "nodes": [{"key": "a", "cmp": "ex"}, {"op": "not", "nodes": [{"key": "b", "cmp": "ex"}]}]}
    commands = (
        PUBLISH,
        SEND,
        {
            "id": 4,
            "history": {"channel": "news", "limit": -1, "since": {"offset": 2**63, "epoch": "e"}, "reverse": True},
        },
        {"id": 5, "connect": {"token": "t", "subs": {"news": {"recover": True}}, "headers": {"a": "b"}}},
        {"id": 6, "subscribe": {"channel": "news", "tf": tree, "flag": -1}},
        {},
    )
    for command in commands:
        (decoded,) = encoding.decode_commands(message_of(encoding, command))
        assert list(encoding.decode_commands(encoding.encode_command(decoded))) == [decoded]


def test_a_unidirectional_connect_encoded_again_is_the_same() -> None:
    (command,) = JSON_PUSHES.decode_commands(b'{"token":"t","data":{"a":1}}')
    assert list(JSON_PUSHES.decode_commands(JSON_PUSHES.encode_command(command))) == [command]
