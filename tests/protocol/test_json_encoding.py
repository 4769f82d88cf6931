"""The JSON encoding: commands from bytes, messages as the SDKs read them, and data that passes through unchanged."""

from __future__ import annotations

import json
import time
import typing

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from realtime.errors import ClientError
from realtime.json_text import payload
from realtime.protocol import messages
from realtime.protocol.json_encoding import JSON_ENCODING, JSON_PUSHES
from realtime.protocol.messages import Command, ProtocolError
from realtime.protocol.wire_formats import WireFormat
from realtime.types import ClientInfo, Publication

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


BARE = WireFormat(JSON_ENCODING, lambda payload: payload)
commands = JSON_ENCODING.decode_commands


def raw(text: bytes) -> msgspec.Raw:
    return msgspec.Raw(text)


@given(st.binary(max_size=200))
def test_any_bytes_are_commands_or_a_protocol_error(data):
    try:
        for command in commands(data):
            command.request()
    except ProtocolError:
        pass


@given(st.lists(json_values, min_size=1, max_size=3), st.sampled_from([None, 1, "\t"]))
def test_payloads_pass_byte_for_byte_but_for_line_ends(values, indent):
    texts = [json.dumps(value, indent=indent, ensure_ascii=False).encode() for value in values]
    lines = [b'{"id":%d,"publish":{"channel":"a","data":%b}}' % (n + 1, text.replace(b"\n", b"\r"))
             for n, text in enumerate(texts)]  # fmt: skip
    read = [payload(command.request()[1].data) for command in commands(b"\n".join(lines))]
    assert read == [text.replace(b"\n", b"") for text in texts]


@given(json_values)
def test_a_publication_carries_its_data_unchanged(value):
    data = msgspec.json.encode(value)
    push = BARE.publication("a", Publication(data, 3, ClientInfo("u", "c", data, data)), "epoch")
    decoded = msgspec.json.decode(push)["push"]
    assert msgspec.json.encode(decoded["pub"]["data"]) == data
    assert b"\n" not in push


def test_an_absent_payload_is_empty_and_null_is_not():
    (absent,) = commands(b'{"id":1,"publish":{"channel":"a"}}')
    (null,) = commands(b'{"id":1,"publish":{"channel":"a","data":null}}')
    assert payload(absent.publish.data) == b""
    assert payload(null.publish.data) == b"null"


@pytest.mark.parametrize(
    ("made", "text"),
    [
        (JSON_ENCODING.encode_reply(3, "unsubscribe", messages.EMPTY), '{"id":3,"unsubscribe":{}}'),
        (JSON_ENCODING.encode_reply(2, "subscribe", messages.SubscribeResult()), '{"id":2,"subscribe":{}}'),
        (
            JSON_ENCODING.encode_reply(1, "history", messages.HistoryResult([], "", 0)),
            '{"id":1,"history":{"publications":[],"epoch":"","offset":0}}',
        ),
        (JSON_ENCODING.encode_reply(1, "presence", messages.PresenceResult({})), '{"id":1,"presence":{"presence":{}}}'),
        (
            JSON_ENCODING.encode_reply(1, "presence_stats", messages.PresenceStatsResult(0, 0)),
            '{"id":1,"presence_stats":{"num_clients":0,"num_users":0}}',
        ),
        (JSON_ENCODING.encode_reply(1, "rpc", messages.RPCResult()), '{"id":1,"rpc":{}}'),
        (
            JSON_ENCODING.encode_error(5, ClientError(103, "permission denied")),
            '{"id":5,"error":{"code":103,"message":"permission denied"}}',
        ),
        (
            JSON_ENCODING.encode_error(5, ClientError(100, "internal server error", temporary=True)),
            '{"id":5,"error":{"code":100,"message":"internal server error","temporary":true}}',
        ),
        (
            BARE.publication("a", Publication(b'{"n":1}', 1), "ep"),
            '{"push":{"channel":"a","pub":{"data":{"n":1},"offset":1,"epoch":"ep"}}}',
        ),
        (
            BARE.publication("a", Publication(b"2", 2, None, {"kind": "news"}), "ep"),
            '{"push":{"channel":"a","pub":{"data":2,"offset":2,"tags":{"kind":"news"}}}}',
        ),
        (
            BARE.publication("a", Publication(b"3"), ""),
            '{"push":{"channel":"a","pub":{"data":3}}}',
        ),
        (
            BARE.join("a", ClientInfo("", "c1")),
            '{"push":{"channel":"a","join":{"info":{"user":"","client":"c1"}}}}',
        ),
        (
            BARE.leave('a"b', ClientInfo("u", "c1", b'{"x":1}')),
            '{"push":{"channel":"a\\"b","leave":{"info":{"user":"u","client":"c1","conn_info":{"x":1}}}}}',
        ),
        (
            JSON_ENCODING.encode_push("a", "unsubscribe", messages.UnsubscribePush(2500, "insufficient state")),
            '{"push":{"channel":"a","unsubscribe":{"code":2500,"reason":"insufficient state"}}}',
        ),
        (
            JSON_ENCODING.encode_push("", "message", messages.MessagePush(raw(b"[1]"))),
            '{"push":{"message":{"data":[1]}}}',
        ),
    ],
)
def test_messages_as_the_sdks_read_them(made, text):
    assert made.decode() == text


def test_line_ends_in_protobuf_data_do_not_reach_json_clients():
    push = BARE.publication("a", Publication(b'{\r\n "a": "\\n"\n}'), "")
    assert push == b'{"push":{"channel":"a","pub":{"data":{ "a": "\\n"}}}}'


def test_pushes_of_the_unidirectional_encoding_are_bare():
    assert JSON_PUSHES.encode_push("a", "pub", messages.Pub(raw(b"1"))) == b'{"channel":"a","pub":{"data":1}}'
    assert JSON_PUSHES.encode_reply(1, "connect", messages.EMPTY) == b'{"connect":{}}'


def test_a_connect_request_of_the_unidirectional_encoding_is_bare():
    assert JSON_PUSHES.decode_command(b'{"token":"t"}') == Command(id=1, connect=messages.ConnectRequest(token="t"))
    assert JSON_PUSHES.decode_command(b"") == Command(id=1, connect=messages.ConnectRequest())
    with pytest.raises(ProtocolError):
        JSON_PUSHES.decode_command(b"[]")


class TestNull:
    """null in a field means that the field is absent."""

    @pytest.mark.parametrize("field", [f for f in Command.__struct_fields__ if f not in ("rpc", "ping")])
    def test_fields_of_a_command(self, field):
        (command,) = commands(b'{"%b":null,"rpc":{"method":"a","data":{"x":null}}}' % field.encode())
        assert command.rpc == messages.RPCRequest(raw(b'{"x":null}'), "a")
        assert command == Command(rpc=command.rpc)

    @pytest.mark.parametrize(
        ("name", "struct"),
        [
            (field.name, cls)
            for field in msgspec.structs.fields(Command)
            for cls in typing.get_args(field.type)
            if isinstance(cls, type) and issubclass(cls, msgspec.Struct)
        ],
    )
    def test_fields_of_every_request(self, name, struct):
        nulls = ",".join(f'"{field}":null' for field in struct.__struct_fields__ if field != "data")
        (command,) = commands(f'{{"id":1,"{name}":{{{nulls}}}}}'.encode())
        assert command.request() == (name, struct())

    def test_data_may_be_null(self):
        (command,) = commands(b'{"id":null,"publish":{"channel":"a","data":null,"type":null}}')
        assert payload(command.publish.data) == b"null"

    def test_nested_fields(self):
        text = (
            b'{"id":1,"connect":{"data":[null],"subs":{"a":{"offset":null,"tf":{"op":"and","val":null,'
            b'"nodes":[{"key":"k","cmp":"ex","nodes":null},'
            b'{"op":"not","nodes":[{"key":"l","cmp":"ex","vals":null}]}]}}}}}'
        )
        (command,) = commands(text)
        assert payload(command.connect.data) == b"[null]"
        node = messages.FilterNode
        leaves = [node(key="k", cmp="ex"), node(op="not", nodes=[node(key="l", cmp="ex")])]
        assert command.connect.subs == {"a": messages.SubscribeRequest(tf=node(op="and", nodes=leaves))}

    @pytest.mark.parametrize(
        "text",
        [
            b'{"id":1,"connect":{"subs":{"a":null}}}',
            b'{"id":1,"subscribe":{"channel":"a","tf":{"op":"and","nodes":[null]}}}',
            b'{"id":1,"subscribe":{"channel":"a","tf":{"key":"a","cmp":"in","vals":[null]}}}',
            b'{"id":1,"publish":{"channel":"a","type":null,"data":}}',
            b'{"id":"null","rpc":{}}',
        ],
    )
    def test_items_are_not_optional(self, text):
        with pytest.raises(ProtocolError):
            list(commands(text))

    def test_a_bare_connect_request(self):
        command = JSON_PUSHES.decode_command(b'{"token":null,"name":"js","subs":null}')
        assert command == Command(id=1, connect=messages.ConnectRequest(name="js"))
        assert JSON_PUSHES.decode_command(b"null") == Command(id=1, connect=messages.ConnectRequest())

    def test_the_unused_ping(self):
        (command,) = commands(b'{"id":1,"rpc":{},"ping":null}')
        assert command.request() == ("rpc", messages.RPCRequest())
        (alone,) = commands(b'{"id":1,"ping":null}')
        with pytest.raises(ProtocolError):
            alone.request()

    @pytest.mark.parametrize(
        "text",
        [
            b'{"id":1,"connect":{"subs":{%b}}}' % b",".join(b'"%d":{"tf":{"key":null}}' % n for n in range(2500)),
            b'{"id":1,"subscribe":{"tf":%b}}' % (b'{"op":"and","nodes":[' * 60 + b'{"key":null}' + b"]}" * 60),
            b'{"id":1,"subscribe":{"tf":%b}}' % (b'{"op":null,"nodes":[' * 900 + b"]}" * 900),
        ],
    )
    def test_the_work_for_one_message_is_bounded(self, text):
        start = time.process_time()
        for _ in range(10):
            with pytest.raises(ProtocolError):
                list(commands(text))
        assert time.process_time() - start < 10 * 0.05
