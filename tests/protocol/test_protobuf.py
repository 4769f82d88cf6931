"""The Protobuf encoding, judged by the schema of the official SDK in the hands of Google's parser."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest
from centrifuge.protocol import client_pb2
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from hypothesis import given
from hypothesis import strategies as st
from msgspec import UNSET, Raw, Struct

from realtime.errors import ClientError
from realtime.protocol import messages
from realtime.protocol.json_encoding import JSON_ENCODING
from realtime.protocol.messages import Command, ProtocolError
from realtime.protocol.protobuf import MAX_FILTER_NODES, PROTOBUF, emulation_request
from realtime.protocol.wire_formats import PROTOBUF_BINARY
from realtime.types import ClientInfo, Publication


def schema() -> dict[str, Any]:
    """The message classes by name: those of the SDK, with the fields that are newer than it."""
    file = descriptor_pb2.FileDescriptorProto()
    client_pb2.DESCRIPTOR.CopyToProto(file)
    types = {message.name: message for message in file.message_type}
    field = descriptor_pb2.FieldDescriptorProto
    types["SubscribeRequest"].field.add(name="type", number=15, type=field.TYPE_INT32, label=field.LABEL_OPTIONAL)
    types["PublishRequest"].field.add(name="type", number=3, type=field.TYPE_INT32, label=field.LABEL_OPTIONAL)
    types["Publication"].field.add(name="epoch", number=14, type=field.TYPE_STRING, label=field.LABEL_OPTIONAL)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    found = {name: pool.FindMessageTypeByName(f"{file.package}.{name}") for name in types}
    return {name: message_factory.GetMessageClass(type) for name, type in found.items()}


SCHEMA = schema()


def varint(number: int) -> bytes:
    low, rest = number & 0x7F, number >> 7
    return bytes((low | 0x80,)) + varint(rest) if rest else bytes((low,))


def sized(body: bytes) -> bytes:
    return varint(len(body)) + body


def field(number: int, wire_type: int, rest: bytes) -> bytes:
    return varint(number << 3 | wire_type) + rest


def commands(message: bytes) -> list[Command]:
    return list(PROTOBUF.decode_commands(message))


def reply(payload: bytes) -> Any:
    """The one reply that is in a payload, as the SDK reads it."""
    size = next(n for n, byte in enumerate(payload, 1) if byte < 0x80)
    assert payload[:size] == varint(len(payload) - size)
    return SCHEMA["Reply"].FromString(payload[size:])


# -- what comes in ----------------------------------------------------------------------------------------------------

texts = st.text(max_size=20)
flags = st.booleans()
int32s = st.integers(-(2**31), 2**31 - 1)
int64s = st.integers(-(2**63), 2**63 - 1)
offsets = st.integers(0, 2**63 - 1)
# Text that is JSON, so that both encodings can carry it.
payloads = st.lists(texts | st.integers(-5, 5) | st.none(), max_size=3).map(msgspec.json.encode)


def some(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=fields)


nodes = st.recursive(
    some(op=texts, key=texts, cmp=texts, val=texts, vals=st.lists(texts, max_size=3)),
    lambda inner: some(op=texts, nodes=st.lists(inner, max_size=3)),
    max_leaves=6,
)
channel = some(channel=texts)
subscribe = some(
    channel=texts,
    token=texts,
    recover=flags,
    epoch=texts,
    offset=offsets,
    data=payloads,
    positioned=flags,
    recoverable=flags,
    join_leave=flags,
    delta=texts,
    tf=nodes,
    flag=int64s,
    type=int32s,
)
connect = some(
    token=texts,
    data=payloads,
    subs=st.dictionaries(texts, subscribe, min_size=1, max_size=3),
    name=texts,
    version=texts,
    headers=st.dictionaries(texts, texts, min_size=1, max_size=3),
)
requests = {
    "connect": connect,
    "subscribe": subscribe,
    "unsubscribe": channel,
    "publish": some(channel=texts, data=payloads, type=int32s),
    "presence": channel,
    "presence_stats": channel,
    "history": some(channel=texts, limit=int32s, since=some(offset=offsets, epoch=texts), reverse=flags),
    "send": some(data=payloads),
    "rpc": some(data=payloads, method=texts),
    "refresh": some(token=texts),
    "sub_refresh": some(channel=texts, token=texts),
}
contents = st.sampled_from(sorted(requests)).flatmap(
    lambda name: st.fixed_dictionaries({"id": st.integers(0, 2**32 - 1), name: requests[name]})
)


def in_json(content: Any) -> Any:
    """`content` as it can be encoded: what is bytes in it is JSON text already."""
    match content:
        case bytes():
            return Raw(content)
        case dict():
            return {key: in_json(value) for key, value in content.items()}
        case list():
            return [in_json(value) for value in content]
    return content


def fill(message: Any, content: dict[str, Any]) -> Any:
    """The same in a message of the judge's."""
    for name, value in content.items():
        place = getattr(message, name)
        match value:
            case dict() if hasattr(place, "DESCRIPTOR"):
                place.SetInParent()
                fill(place, value)
            case dict() if name == "subs":
                for key, inner in value.items():
                    fill(place[key], inner)
            case dict():
                place.update(value)
            case list() if name == "nodes":
                for inner in value:
                    fill(place.add(), inner)
            case list():
                place.extend(value)
            case _:
                setattr(message, name, value)
    return message


def in_protobuf(content: dict[str, Any]) -> bytes:
    return sized(fill(SCHEMA["Command"](), content).SerializeToString())


@given(st.lists(contents, min_size=1, max_size=3))
def test_a_command_means_the_same_in_both_encodings(contents):
    lines = b"\n".join(msgspec.json.encode(in_json(content)) for content in contents)
    assert commands(b"".join(map(in_protobuf, contents))) == list(JSON_ENCODING.decode_commands(lines))


@pytest.mark.parametrize(
    ("body", "command"),
    [
        ("080122082206707974686f6e", Command(1, connect=messages.ConnectRequest(name="python"))),
        ("08022a080a046e6577737001", Command(2, subscribe=messages.SubscribeRequest(channel="news", flag=1))),
        ("", Command()),
    ],
)
def test_commands_as_the_protocol_documents_them(body, command):
    assert commands(sized(bytes.fromhex(body))) == [command]


def test_an_empty_command_is_a_pong():
    (command,) = commands(b"\x00")
    assert command.request() == ("", None)


def test_ping_is_no_request_here_either():
    (command,) = commands(sized(field(1, 0, b"\x01") + field(11, 2, b"\x00")))
    with pytest.raises(ProtocolError):
        command.request()


PUBLISH = field(7, 2, sized(field(1, 2, sized(b"news")) + field(2, 2, sized(b"\x00\xff"))))
GOOD = sized(field(1, 0, b"\x05") + PUBLISH)
UNKNOWN = [
    field(500, 0, varint(2**64 - 1)),
    field(500, 1, bytes(8)),
    field(500, 2, sized(b"\xff" * 200)),
    field(500, 5, bytes(4)),
    field(2**29 - 1, 0, b"\x00"),
]


@pytest.mark.parametrize("unknown", UNKNOWN)
def test_unknown_fields_are_skipped(unknown):
    subs = field(3, 2, sized(unknown + field(1, 2, sized(b"c")) + field(2, 2, sized(unknown)) + unknown))
    (around,) = commands(sized(unknown + field(1, 0, b"\x05") + PUBLISH + unknown))
    (within,) = commands(sized(field(7, 2, sized(unknown + field(1, 2, sized(b"news")) + unknown))))
    (deep,) = commands(sized(field(4, 2, sized(subs))))
    assert [around] == commands(GOOD)
    assert within.publish.channel == "news"
    assert deep.connect.subs == {"c": messages.SubscribeRequest()}


@pytest.mark.parametrize("zeros", [1, 4, 8])
def test_varints_may_be_longer_than_need_be(zeros):
    def long(number: int) -> bytes:
        return bytes((number | 0x80,)) + b"\x80" * (zeros - 1) + b"\x00"

    body = long(1 << 3) + long(5) + long(7 << 3 | 2) + long(len(PUBLISH) - 2) + PUBLISH[2:]
    assert commands(long(len(body)) + body) == commands(GOOD)
    (skipped,) = commands(sized(GOOD[1:] + long(3 << 3) + long(1) + long(2 << 3 | 2) + long(0)))
    assert [skipped] == commands(GOOD)


def test_of_a_field_that_comes_twice_the_last_one_counts():
    other = field(7, 2, sized(field(1, 2, sized(b"old"))))
    assert commands(sized(field(1, 0, b"\x04") + other + PUBLISH + field(1, 0, b"\x05"))) == commands(GOOD)


def test_an_entry_of_a_map_may_lack_its_key_or_its_value():
    (command,) = commands(
        sized(field(4, 2, sized(field(3, 2, b"\x00") + field(6, 2, sized(field(2, 2, sized(b"v")))))))
    )
    assert command.connect.subs == {"": messages.SubscribeRequest()}
    assert command.connect.headers == {"": "v"}


def test_a_message_holds_so_many_nodes_of_filters_and_no_more():
    def subscribe(nodes: int) -> bytes:
        return sized(field(5, 2, sized(field(13, 2, sized((nodes - 1) * field(6, 2, b"\x00"))))))

    (command,) = commands(subscribe(MAX_FILTER_NODES))
    assert len(command.subscribe.tf.nodes) == MAX_FILTER_NODES - 1
    halves = 2 * subscribe(MAX_FILTER_NODES // 2)
    assert len(commands(halves)) == len(commands(halves)) == 2
    for too_many in (subscribe(MAX_FILTER_NODES + 1), halves + subscribe(1)):
        with pytest.raises(ProtocolError):
            commands(too_many)


def nested(depth: int) -> bytes:
    body = b""
    for _ in range(depth):
        body = field(6, 2, sized(body))
    return sized(field(5, 2, sized(field(13, 2, sized(body)))))


def test_a_filter_of_some_depth_is_read():
    (command,) = commands(nested(50))
    node, depth = command.subscribe.tf, 0
    while node.nodes:
        (node,), depth = node.nodes, depth + 1
    assert depth == 50


@pytest.mark.parametrize(
    "bad",
    {
        "length past the end": varint(3) + b"\x08\x01",
        "length cut off": b"\x80",
        "length of 2**63": varint(2**63) + b"\x08\x01",
        "length of 11 bytes": b"\x82" + b"\x80" * 9 + b"\x00\x08\x01",
        "tag cut off": sized(b"\x80"),
        "value missing": sized(b"\x08"),
        "value cut off": sized(b"\x08\x80"),
        "varint of 11 bytes": sized(field(1, 0, b"\x80" * 10 + b"\x01")),
        "varint over 64 bits": sized(field(1, 0, b"\xff" * 9 + b"\x02")),
        "unknown varint of 11 bytes": sized(field(500, 0, b"\x80" * 10 + b"\x01")),
        "id over 32 bits": sized(field(1, 0, varint(2**32)) + PUBLISH),
        "negative id": sized(field(1, 0, varint(2**64 - 1)) + PUBLISH),
        "limit over 32 bits": sized(field(10, 2, sized(field(7, 0, varint(2**31))))),
        "limit under 32 bits": sized(field(10, 2, sized(field(7, 0, varint(2**64 - 2**31 - 1))))),
        "id as bytes": sized(field(1, 2, sized(b"\x05"))),
        "id as fixed32": sized(field(1, 5, bytes(4))),
        "publish as a number": sized(field(7, 0, b"\x01")),
        "publish as fixed64": sized(field(7, 1, bytes(8))),
        "group": sized(field(500, 3, field(500, 4, b""))),
        "end of a group": sized(field(500, 4, b"")),
        "wire type 6": sized(field(500, 6, b"\x00")),
        "wire type 7": sized(field(500, 7, b"\x00")),
        "field number 0": sized(field(0, 0, b"\x00")),
        "field number 2**29": sized(field(2**29, 0, b"\x00")),
        "bad UTF-8": sized(field(7, 2, sized(field(1, 2, sized(b"\xff"))))),
        "half a surrogate pair": sized(field(7, 2, sized(field(1, 2, sized(b"\xed\xa0\x80"))))),
        "bad UTF-8 in a key": sized(field(4, 2, sized(field(6, 2, sized(field(1, 2, sized(b"\xff"))))))),
        "part longer than its message": sized(field(7, 2, sized(field(1, 2, b"\x04new")))),
        "part that is all missing": sized(field(7, 2, sized(field(1, 2, b"\x01")))),
        "part that would end behind the command": sized(field(7, 2, varint(9) + b"\x0a\x01a")) + GOOD,
        "number that ends behind its message": sized(field(5, 2, sized(b"\x38\x80")) + b"\x01"),
        "unknown fixed32 cut off": sized(field(500, 5, bytes(3))),
        "unknown fixed64 cut off": sized(field(500, 1, bytes(7))),
        "unknown bytes cut off": sized(field(500, 2, varint(5) + bytes(4))),
        "filter of great depth": nested(20_000),
    }.items(),
    ids=lambda item: item[0],
)
def test_what_is_no_command_ends_the_message_and_what_came_before_counts(bad):
    read = PROTOBUF.decode_commands(GOOD + bad[1])
    assert next(read).publish.channel == "news"
    with pytest.raises(ProtocolError):
        for _ in read:
            pass


def test_a_message_without_a_command_is_an_error():
    with pytest.raises(ProtocolError):
        commands(b"")


@given(st.binary(max_size=200))
def test_any_bytes_are_commands_or_a_protocol_error(data):
    for message in (data, sized(data)):
        try:
            for command in PROTOBUF.decode_commands(message):
                command.request()
        except ProtocolError:
            pass


def test_damaged_commands_are_commands_or_a_protocol_error():
    subs = {"c": {"recover": True, "offset": 2**40, "epoch": "e", "tf": {"nodes": [{"vals": ["a", "b"]}]}}}
    whole = [
        in_protobuf({"id": 1, "connect": {"token": "t" * 200, "data": b"{}", "subs": subs, "headers": {"a": "ü"}}}),
        in_protobuf({"id": 70_000, "subscribe": {**subs["c"], "flag": -1, "type": -5}}),
        in_protobuf({"id": 3, "history": {"channel": "c", "limit": -1, "since": {"offset": 7, "epoch": "e"}}}),
        in_protobuf({"id": 4, "rpc": {"method": "m", "data": b"\xff" * 50}}),
        GOOD,
    ]
    dice = random.Random(7)
    outcomes = set()
    for _ in range(20_000):
        data = bytearray(dice.choice(whole) + dice.choice(whole))
        for _ in range(dice.randint(1, 4)):
            place = dice.randrange(len(data))
            match dice.randrange(4):
                case 0:
                    data[place] ^= 1 << dice.randrange(8)
                case 1:
                    data[place] = dice.choice((0, 0x7F, 0x80, 0xFF))
                case 2:
                    del data[place : place + dice.randint(1, 5)]
                case 3:
                    data[place:place] = data[dice.randrange(len(data) + 1) :][: dice.randint(1, 9)]
            if not data:
                break
        try:
            outcomes.add(len(commands(bytes(data))))
        except ProtocolError:
            outcomes.add(-1)
    assert {-1, 2} <= outcomes


@given(texts, texts, st.binary(max_size=50))
def test_an_emulation_request(node, session, data):
    body = SCHEMA["EmulationRequest"](node=node, session=session, data=data).SerializeToString()
    request = emulation_request(body)
    assert (request.node, request.session, request.data) == (node, session, data)


@pytest.mark.parametrize("body", [b"\x0a", b"\x0a\x05ab", b"\x0a\x01\xff", b"\x08\x01", b"{}"])
def test_a_body_that_is_no_emulation_request(body):
    with pytest.raises(ProtocolError):
        emulation_request(body)


# -- what goes out ----------------------------------------------------------------------------------------------------

uint32s = st.integers(0, 2**32 - 1)
raws = st.binary(max_size=50).map(Raw)
maybe_raws = st.just(UNSET) | raws
tags = st.dictionaries(texts, texts, max_size=3)
infos = st.builds(messages.Info, texts, texts, maybe_raws, maybe_raws)
pubs = st.builds(messages.Pub, raws, st.none() | infos, offsets, st.none() | tags, texts, flags)
subscribe_results = st.builds(
    messages.SubscribeResult,
    expires=flags,
    ttl=uint32s,
    recoverable=flags,
    epoch=texts,
    publications=st.none() | st.lists(pubs, max_size=3),
    recovered=flags,
    offset=offsets,
    positioned=flags,
    data=maybe_raws,
    was_recovering=flags,
    delta=flags,
)
connect_results = st.builds(
    messages.ConnectResult,
    client=texts,
    version=texts,
    expires=flags,
    ttl=uint32s,
    data=maybe_raws,
    subs=st.none() | st.dictionaries(texts, subscribe_results, max_size=3),
    ping=uint32s,
    pong=flags,
    session=texts,
    node=texts,
    time=offsets,
)
results = {
    "connect": connect_results,
    "subscribe": subscribe_results,
    "unsubscribe": st.just(messages.EMPTY),
    "publish": st.just(messages.EMPTY),
    "presence": st.builds(messages.PresenceResult, st.dictionaries(texts, infos, max_size=3)),
    "presence_stats": st.builds(messages.PresenceStatsResult, uint32s, uint32s),
    "history": st.builds(messages.HistoryResult, st.lists(pubs, max_size=3), texts, offsets),
    "rpc": st.builds(messages.RPCResult, maybe_raws),
    "refresh": st.builds(messages.RefreshResult, texts, texts, flags, uint32s),
    "sub_refresh": st.builds(messages.SubRefreshResult, flags, uint32s),
}
pushes = {
    "pub": pubs,
    "join": st.builds(messages.JoinPush, infos),
    "leave": st.builds(messages.JoinPush, infos),
    "unsubscribe": st.builds(messages.UnsubscribePush, uint32s, texts),
    "subscribe": st.builds(messages.SubscribePush, flags, texts, offsets, flags, maybe_raws),
    "message": st.builds(messages.MessagePush, raws),
    "disconnect": st.builds(messages.DisconnectPush, uint32s, texts),
    "refresh": st.builds(messages.RefreshPush, flags, uint32s),
}


def agrees(read: Any, made: Any) -> bool:
    """Whether the judge reads what was written."""
    match made:
        case None | msgspec.UNSET:
            return not (read.ByteSize() if hasattr(read, "ByteSize") else read)
        case Struct():
            names = type(made).__struct_fields__
            absent = [name for name in names if isinstance(getattr(made, name), Struct) and not read.HasField(name)]
            return not absent and all(agrees(getattr(read, name), getattr(made, name)) for name in names)
        case Raw():
            return bool(read == bytes(made))
        case list():
            return len(read) == len(made) and all(map(agrees, read, made))
        case dict():
            return set(read) == set(made) and all(agrees(read[key], value) for key, value in made.items())
    return bool(read == made)


@given(uint32s, st.sampled_from(sorted(results)).flatmap(lambda name: st.tuples(st.just(name), results[name])))
def test_replies_are_read_as_they_were_written(id, made):
    name, result = made
    read = reply(PROTOBUF.encode_reply(id, name, result))
    assert read.id == id and [field.name for field, _ in read.ListFields() if field.name != "id"] == [name]
    assert agrees(getattr(read, name), result)
    assert not unknown_in(read)


@given(texts, st.sampled_from(sorted(pushes)).flatmap(lambda name: st.tuples(st.just(name), pushes[name])))
def test_pushes_are_read_as_they_were_written(channel, made):
    name, body = made
    read = reply(PROTOBUF.encode_push(channel, name, body))
    assert [field.name for field, _ in read.ListFields()] == ["push"]
    assert [field.name for field, _ in read.push.ListFields() if field.name != "channel"] == [name]
    assert read.push.channel == channel and agrees(getattr(read.push, name), body)
    assert not unknown_in(read)


def unknown_in(message: Any) -> bool:
    """Whether anything was written that the schema does not have: it is gone when the rest is written again."""
    size = message.ByteSize()
    message.DiscardUnknownFields()
    return message.ByteSize() != size


@pytest.mark.parametrize(
    ("payload", "body"),
    [
        (
            PROTOBUF.encode_reply(1, "connect", messages.ConnectResult("c1", "v", ping=25, pong=True)),
            "08012a0b0a02633112017638194001",
        ),
        (PROTOBUF.encode_reply(3, "unsubscribe", messages.EMPTY), "08033a00"),
        (
            PROTOBUF.encode_error(3, ClientError(103, "permission denied")),
            "08031215086712117065726d697373696f6e2064656e696564",
        ),
        (
            PROTOBUF.encode_push("news", "pub", PROTOBUF.make_pub(Publication(b'{"a":1}', 1))),
            "221312046e657773220b22077b2261223a317d3001",
        ),
        (PROTOBUF.ping, ""),
    ],
)
def test_replies_as_the_protocol_documents_them(payload, body):
    assert payload == sized(bytes.fromhex(body))


def test_what_goes_to_all_subscribers_is_a_binary_frame():
    info = ClientInfo("ada", "c1", b'{"nick":"Ada"}')
    frame = PROTOBUF_BINARY.publication("news", Publication(b"\x00\xff", 1, info, {"k": "v"}, binary=True), "epoch")
    assert frame[0] == 0x82 and frame[1] == len(frame) - 2
    pub = reply(frame[2:]).push.pub
    assert (pub.data, pub.offset, pub.epoch, dict(pub.tags)) == (b"\x00\xff", 1, "epoch", {"k": "v"})
    assert (pub.info.user, pub.info.client, pub.info.conn_info) == ("ada", "c1", b'{"nick":"Ada"}')
    assert reply(PROTOBUF_BINARY.join("news", info)[2:]).push.join.info.user == "ada"
    assert reply(PROTOBUF_BINARY.publication("news", Publication(b"1", 2), "epoch")[2:]).push.pub.epoch == ""


# -- payloads ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"\x00\xff", b"[" * 5000, b'"\\ud800"', b'{ "a":\r\n1}'])
def test_payloads_are_bytes_of_any_kind(data):
    (command,) = commands(sized(field(7, 2, sized(field(2, 2, sized(data))))))
    assert PROTOBUF.validate_data(command.publish.data) == data
    assert bytes(PROTOBUF.make_pub(Publication(data)).data) == data


def test_an_absent_payload_and_an_empty_one_are_the_same():
    (absent,) = commands(sized(field(7, 2, sized(b""))))
    (empty,) = commands(sized(field(7, 2, sized(field(2, 2, sized(b""))))))
    assert PROTOBUF.validate_data(absent.publish.data) == PROTOBUF.validate_data(empty.publish.data) == b""
    assert PROTOBUF.decode_data(b"") is None


@pytest.mark.parametrize(
    ("data", "value", "is_json"),
    [
        (b'{"a":[1,"\xc3\xbc"]}', {"a": [1, "ü"]}, True),
        (b"null", None, True),
        (b"\x00\xff", b"\x00\xff", False),
        (b'"\xff"', b'"\xff"', False),
        (b'"\\ud800"', b'"\\ud800"', False),
        (b"hello", b"hello", False),
        (b"[" * 5000, b"[" * 5000, False),
    ],
)
def test_handlers_get_the_value_of_json_text_and_all_else_as_bytes(data, value, is_json):
    assert PROTOBUF.decode_data(data) == value
    assert PROTOBUF.is_json(data) is is_json


@pytest.mark.parametrize(
    ("value", "data"), [(None, b""), (b"\x00\xff", b"\x00\xff"), ({"a": "ü"}, b'{"a":"\xc3\xbc"}'), ("text", b'"text"')]
)
def test_what_handlers_return(value, data):
    assert PROTOBUF.encode_data(value) == data


def test_deltas_are_bytes_like_any_data():
    publication = Publication(b"\xff\xfe", 7, binary=True)
    whole, patch = PROTOBUF.make_full_pub(publication), PROTOBUF.make_delta_pub(publication, b"\xff;")
    assert (bytes(whole.data), whole.delta) == (b"\xff\xfe", False)
    assert (bytes(patch.data), patch.delta, patch.offset) == (b"\xff;", True, 7)
