"""The Protobuf encoding of the client protocol: proto3, straight to and from the Structs of `messages`.

    message of the transport   one or more of: length as a varint, then a Command (from the client) or a Reply (to it)
    field                      a varint of number << 3 | wire type, then a varint, or a length and so many bytes
    ping, pong                 a Reply and a Command without any field: the single byte 00

The table below gives each field its number. The annotations of the Structs define the type and the bounds of a field,
so that a limit is the same in all encodings. The module builds its readers and writers once, at import.

Google's `protobuf` package, in C, is no replacement. It takes as long to decode a command, since most of the time goes
into attributes and Structs, and longer to encode a small reply; only for long replies does it take half the time. It
also accepts invalid input (fields of the wrong type, groups, varints of more than 64 bits), which a second pass would
have to find after the package has allocated memory for the whole message.

Zero values are not written. Unknown fields are skipped. Where proto3 leaves a reader a choice, this reader is strict: a
known field of another wire type, a group, a number outside its type, and a varint of more than 64 bits are errors. Of a
repeated single field the last one counts, also for a message, which other readers would merge.

Payloads are arbitrary bytes. They must be JSON only where an application or a client of another encoding receives them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import repeat
from typing import Any

import msgspec
from msgspec import Raw, Struct, UnsetType, inspect

from realtime import json_text
from realtime.errors import ClientError
from realtime.protocol import messages
from realtime.protocol.encodings import MAX_BATCHED, MAX_FIELDS, CommandTooLong, Encoding, TooManyFields
from realtime.protocol.messages import Command, ProtocolError, Pub
from realtime.types import ClientInfo, Publication


class EmulationRequest(Struct, frozen=True):
    """Commands for a session whose stream leads only from the server to the client. data: a message of commands."""

    node: str = ""
    session: str = ""
    data: bytes = b""


_READ: dict[type[Struct], str] = {
    Command: (
        "1 id, 4 connect, 5 subscribe, 6 unsubscribe, 7 publish, 8 presence, 9 presence_stats, 10 history, 11 ping, "
        "12 send, 13 rpc, 14 refresh, 15 sub_refresh"
    ),
    messages.ConnectRequest: "1 token, 2 data, 3 subs, 4 name, 5 version, 6 headers",
    messages.SubscribeRequest: (
        "1 channel, 2 token, 3 recover, 6 epoch, 7 offset, 8 data, 9 positioned, 10 recoverable, 11 join_leave, "
        "12 delta, 13 tf, 14 flag, 15 type"
    ),
    messages.UnsubscribeRequest: "1 channel",
    messages.PublishRequest: "1 channel, 2 data, 3 type",
    messages.PresenceRequest: "1 channel",
    messages.PresenceStatsRequest: "1 channel",
    messages.HistoryRequest: "1 channel, 7 limit, 8 since, 9 reverse",
    messages.SendRequest: "1 data",
    messages.RPCRequest: "1 data, 2 method",
    messages.RefreshRequest: "1 token",
    messages.SubRefreshRequest: "1 channel, 2 token",
    messages.StreamPosition: "1 offset, 2 epoch",
    messages.FilterNode: "1 op, 2 key, 3 cmp, 4 val, 5 vals, 6 nodes",
    EmulationRequest: "1 node, 2 session, 3 data",
}

# A type stands behind those that are part of it, unlike above.
_WRITTEN: dict[type[Struct], str] = {
    messages.Error: "1 code, 2 message, 3 temporary",
    messages.Info: "1 user, 2 client, 3 conn_info, 4 chan_info",
    messages.Pub: "4 data, 5 info, 6 offset, 7 tags, 8 delta, 14 epoch",
    messages.SubscribeResult: (
        "1 expires, 2 ttl, 3 recoverable, 6 epoch, 7 publications, 8 recovered, 9 offset, 10 positioned, 11 data, "
        "12 was_recovering, 13 delta"
    ),
    messages.ConnectResult: (
        "1 client, 2 version, 3 expires, 4 ttl, 5 data, 6 subs, 7 ping, 8 pong, 9 session, 10 node, 11 time"
    ),
    messages.Empty: "",
    messages.PresenceResult: "1 presence",
    messages.PresenceStatsResult: "1 num_clients, 2 num_users",
    messages.HistoryResult: "1 publications, 2 epoch, 3 offset",
    messages.RPCResult: "1 data",
    messages.RefreshResult: "1 client, 2 version, 3 expires, 4 ttl",
    messages.SubRefreshResult: "1 expires, 2 ttl",
    messages.JoinPush: "1 info",
    messages.UnsubscribePush: "2 code, 3 reason",
    messages.SubscribePush: "1 recoverable, 4 epoch, 5 offset, 6 positioned, 7 data",
    messages.MessagePush: "1 data",
    messages.DisconnectPush: "1 code, 2 reason",
    messages.RefreshPush: "1 expires, 2 ttl",
}

# The two envelopes of what is written are made by hand: exactly one of their fields is set, and of any type.
_REPLY = (
    "1 id, 2 error, 4 push, 5 connect, 6 subscribe, 7 unsubscribe, 8 publish, 9 presence, 10 presence_stats, "
    "11 history, 13 rpc, 14 refresh, 15 sub_refresh"
)
_PUSH = "2 channel, 4 pub, 5 join, 6 leave, 7 unsubscribe, 8 message, 9 subscribe, 11 disconnect, 12 refresh"

_EMPTY_COMMAND = Command()

MAX_FILTER_NODES = 2048
"""Nodes of all filters in one message: two bytes are enough for one, and reading it takes some microseconds."""

# Wire types. The two of groups have no name here.
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

_MAX_NUMBER = 2**29 - 1
_MAX_VARINT = 2**64 - 1


class Protobuf:
    """Each payload brings its length along, so that payloads can be joined."""

    name = "protobuf"
    unidirectional = False
    ping = b"\x00"
    embed = staticmethod(messages.embed_bytes)
    make_info = staticmethod(messages.make_binary_info)

    def decode_command(self, message: bytes) -> Command | None:
        try:
            size, start = _varint(message, 0)
        except (IndexError, ProtocolError):
            return None
        if start + size != len(message):
            return None
        _FILTER_NODES.left = MAX_FILTER_NODES
        command: Command = _whole(Command, message, start, start + size)
        return command

    def decode_commands(self, message: bytes, fields: int = MAX_FIELDS) -> Iterator[Command]:
        position, end = 0, len(message)
        nodes = MAX_FILTER_NODES
        if not end:
            raise ProtocolError("no command")
        while position < end:
            try:
                size, start = _varint(message, position)
            except IndexError:
                raise ProtocolError("a length that is cut off") from None
            position = start + size
            if position > end:
                raise ProtocolError("a command ends behind its message")
            # Empty ones are short, so that a message can hold a great many.
            if not size:
                yield _EMPTY_COMMAND
                continue
            _FILTER_NODES.left = nodes
            command: Command = _whole(Command, message, start, position, fields)
            nodes = _FILTER_NODES.left
            yield command

    def end_of_commands(self, data: bytes, limit: int) -> int:
        position, end = 0, len(data)
        for _ in range(MAX_BATCHED):
            if position >= end:
                return position
            size, start = data[position], position + 1
            if size > 0x7F:
                try:
                    size, start = _varint(data, position)
                except IndexError:
                    return position
                if size > limit:
                    raise CommandTooLong("a command is too long")
            if start + size > end:
                return position
            position = start + size
        raise ProtocolError("too many commands")

    def command_ids(self, message: bytes) -> Iterator[int]:
        position, end = 0, len(message)
        try:
            while position < end:
                size, start = _varint(message, position)
                position = start + size
                # Writers put fields in the order of their numbers.
                yield _varint(message, start + 1)[0] if size and message[start] == _ID_TAG[0] else 0
        except IndexError:
            raise ProtocolError("a command that is cut off") from None

    def validate_data(self, raw: Raw | UnsetType) -> bytes:
        return bytes(raw) if isinstance(raw, Raw) else b""

    def decode_data(self, data: bytes) -> Any:
        """The value of JSON text, or the bytes of what is something else."""
        try:
            return json_text.value(data)
        except (ClientError, UnicodeDecodeError):
            return data

    def encode_data(self, value: Any) -> bytes:
        """Bytes as they are, anything else as JSON text."""
        if value is None:
            return b""
        return value if isinstance(value, bytes) else msgspec.json.encode(value)

    def is_json(self, data: bytes) -> bool:
        return json_text.is_json(data)

    def encode_command(self, command: Command) -> bytes:
        return _sized(b"", _WRITERS[Command](command))

    def encode_reply(self, id: int, name: str, result: Struct) -> bytes:
        return _reply(id, name, _WRITERS[type(result)](result))

    def encode_rpc_reply(self, id: int, value: Any) -> bytes:
        return self.encode_reply(id, "rpc", messages.RPCResult(Raw(self.encode_data(value) or b"null")))

    def encode_error(self, id: int, error: ClientError) -> bytes:
        return self.encode_reply(id, "error", messages.Error(error.code, error.message, error.temporary))

    def encode_member(self, info: ClientInfo) -> bytes:
        return _WRITERS[messages.PresenceResult](messages.PresenceResult({info.client: self.make_info(info)}))

    def encode_presence_reply(self, id: int, members: Iterable[bytes]) -> bytes:
        return _reply(id, "presence", b"".join(members))

    def encode_push(self, channel: str, name: str, body: Struct) -> bytes:
        push = _sized(_PUSH_TAGS[name], _WRITERS[type(body)](body))
        if channel:
            push = _sized(_PUSH_TAGS["channel"], channel.encode()) + push
        return _sized(b"", _sized(_REPLY_TAGS["push"], push))

    def make_pub(self, publication: Publication, epoch: str = "") -> Pub:
        return messages.make_pub(publication, publication.data, epoch, make_info=messages.make_binary_info)

    def make_full_pub(self, publication: Publication, epoch: str = "") -> Pub:
        return messages.make_pub(publication, publication.data, epoch, make_info=messages.make_binary_info)

    def make_delta_pub(self, publication: Publication, delta: bytes, epoch: str = "") -> Pub | None:
        return messages.make_pub(publication, delta, epoch, delta=True, make_info=messages.make_binary_info)


def emulation_request(body: bytes) -> EmulationRequest:
    """The whole body of a request to the emulation endpoint. Raises ProtocolError."""
    request: EmulationRequest = _whole(EmulationRequest, body, 0, len(body))
    return request


# -- reading ----------------------------------------------------------------------------------------------------------


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """The number at `position`, and where it ends. Raises ProtocolError, and IndexError at the end of `data`."""
    byte = data[position]
    if byte < 0x80:
        return byte, position + 1
    number = byte & 0x7F
    for shift in range(7, 70, 7):
        position += 1
        byte = data[position]
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            if number > _MAX_VARINT:
                break
            return number, position + 1
    raise ProtocolError("a varint of more than 64 bits")


def _whole(struct: type[Struct], data: bytes, position: int, end: int, fields: int = MAX_FIELDS) -> Any:
    """A message that lies in a part of `data` and in no other message. Raises ProtocolError.

    fields: see `Encoding.decode_commands`. Reading one takes half a microsecond.
    """
    # A field takes a byte or more, so that a short message can't have too many.
    _BUDGET.fields = _UNLIMITED if end - position <= fields else repeat(None, fields)
    try:
        return _READERS[struct].read(data, position, end)
    except (IndexError, UnicodeDecodeError, RecursionError):
        raise ProtocolError("not a message of this type") from None


_UNLIMITED = repeat(None)


class _Budget:
    """The fields that may still be read of the current command: all its messages share one iterator."""

    __slots__ = ("fields",)
    fields: Iterator[None]


_BUDGET = _Budget()

_TakeNumber = Callable[[dict[str, Any], int], None]
_TakePart = Callable[[dict[str, Any], bytes, int, int], None]


class _Reader:
    """Reads one type of message. make: takes the fields that were there, by name.

    The tag of a field, its number and wire type in one, leads to what takes the field.
    """

    __slots__ = ("_known", "_make", "_numbers", "_parts")

    def __init__(self, make: Callable[..., Any]) -> None:
        self._make = make
        self._known: set[int] = set()
        self._numbers: dict[int, _TakeNumber] = {}
        self._parts: dict[int, _TakePart] = {}

    def read(self, data: bytes, position: int, end: int) -> Any:
        """The message that lies in a part of `data`.

        Raises ProtocolError, UnicodeDecodeError, IndexError when it goes on behind the end of `data`, and
        RecursionError.
        """
        values: dict[str, Any] = {}
        skipped = -1  # the tag of the last unknown field
        for _ in _BUDGET.fields:
            if position >= end:
                break
            # Most varints have one byte, and most others two: calls for these would take half of the time.
            tag = data[position]
            position += 1
            if tag > 0x7F:
                if (high := data[position]) < 0x80:
                    tag, position = tag & 0x7F | high << 7, position + 1
                else:
                    tag, position = _varint(data, position - 1)
            wire_type = tag & 7
            if wire_type == _BYTES:
                size = data[position]
                position += 1
                if size > 0x7F:
                    if (high := data[position]) < 0x80:
                        size, position = size & 0x7F | high << 7, position + 1
                    else:
                        size, position = _varint(data, position - 1)
                stop = position + size
                if stop > end:
                    raise ProtocolError("a field ends behind its message")
                if (take := self._parts.get(tag)) is not None:
                    take(values, data, position, stop)
                elif tag != skipped:
                    self._check_unknown(tag)
                    skipped = tag
                position = stop
            elif wire_type == _VARINT:
                value = data[position]
                position += 1
                if value > 0x7F:
                    value, position = _varint(data, position - 1)
                if (keep := self._numbers.get(tag)) is not None:
                    keep(values, value)
                elif tag != skipped:
                    self._check_unknown(tag)
                    skipped = tag
            elif wire_type in (_FIXED32, _FIXED64):
                self._check_unknown(tag)
                position += 4 if wire_type == _FIXED32 else 8
            else:
                raise ProtocolError("a group, or no wire type at all")
        else:
            raise TooManyFields("too many fields")
        if position != end:
            raise ProtocolError("a field ends behind its message")
        return self._make(**values)

    def _check_unknown(self, tag: int) -> None:
        """Whether a field that nothing takes may be skipped."""
        number = tag >> 3
        if not 0 < number <= _MAX_NUMBER or number in self._known:
            raise ProtocolError("a field of the wrong wire type, or with a number that no field can have")

    def add(self, number: int, name: str, type: inspect.Type) -> None:
        """A field of this message."""
        self._known.add(number)
        of_number, of_part = number << 3 | _VARINT, number << 3 | _BYTES
        match type:
            case inspect.BoolType():
                self._numbers[of_number] = _takes_bool(name)
            case inspect.IntType(ge=int(low), le=high):
                self._numbers[of_number] = _takes_int(name, low, _MAX_VARINT if high is None else high)
            case inspect.StrType():
                self._parts[of_part] = _takes_text(name)
            case inspect.ListType(item_type=item):
                self._parts[of_part] = _takes_item(name, _part(item))
            case inspect.DictType(key_type=key, value_type=value):
                entry = _Reader(_entry(value))
                entry.add(1, "key", key)
                entry.add(2, "value", value)
                self._parts[of_part] = _takes_entry(name, entry.read)
            case _:
                self._parts[of_part] = _takes_part(name, _part(type))


class _CountedReader(_Reader):
    """Reads messages of a type of which few are ever meant. left: how many more may come."""

    __slots__ = ("left",)
    left: int

    def read(self, data: bytes, position: int, end: int) -> Any:
        self.left -= 1
        if self.left < 0:
            raise TooManyFields("too many of one kind")
        return super().read(data, position, end)


_Part = Callable[[bytes, int, int], Any]


def _part(type: inspect.Type) -> _Part:
    """What makes a value of a part of the data."""
    match type:
        case inspect.StrType():
            return lambda data, start, stop: data[start:stop].decode()
        case inspect.BytesType():
            return lambda data, start, stop: data[start:stop]
        case inspect.RawType():
            return lambda data, start, stop: Raw(data[start:stop])
        case inspect.StructType(cls=cls):
            return _READERS[cls].read
    raise TypeError(type)


def _takes_bool(name: str) -> _TakeNumber:
    def take(values: dict[str, Any], number: int) -> None:
        values[name] = number != 0

    return take


def _takes_int(name: str, low: int, high: int) -> _TakeNumber:
    def take(values: dict[str, Any], number: int) -> None:
        if low < 0 and number >> 63:
            number -= 1 << 64
        if not low <= number <= high:
            raise ProtocolError("a number out of range")
        values[name] = number

    return take


def _takes_text(name: str) -> _TakePart:
    def take(values: dict[str, Any], data: bytes, start: int, stop: int) -> None:
        values[name] = data[start:stop].decode()

    return take


def _takes_part(name: str, part: _Part) -> _TakePart:
    def take(values: dict[str, Any], data: bytes, start: int, stop: int) -> None:
        values[name] = part(data, start, stop)

    return take


def _takes_item(name: str, part: _Part) -> _TakePart:
    def take(values: dict[str, Any], data: bytes, start: int, stop: int) -> None:
        values.setdefault(name, []).append(part(data, start, stop))

    return take


def _takes_entry(name: str, part: _Part) -> _TakePart:
    def take(values: dict[str, Any], data: bytes, start: int, stop: int) -> None:
        key, value = part(data, start, stop)
        values.setdefault(name, {})[key] = value

    return take


def _entry(type: inspect.Type) -> Callable[..., tuple[str, Any]]:
    """Makes an entry of a map: a message of two fields, each of which may be absent."""
    absent: Any = type.cls() if isinstance(type, inspect.StructType) else ""
    return lambda key="", value=absent: (key, value)


# -- writing ----------------------------------------------------------------------------------------------------------

_ONE_BYTE = [bytes((number,)) for number in range(0x80)]


def _varint_of(number: int) -> bytes:
    if 0 <= number < 0x80:
        return _ONE_BYTE[number]
    number &= _MAX_VARINT  # a negative number is its two's complement
    if number < 0x4000:
        return bytes((number & 0x7F | 0x80, number >> 7))
    made = bytearray()
    while number > 0x7F:
        made.append(number & 0x7F | 0x80)
        number >>= 7
    made.append(number)
    return bytes(made)


def _sized(tag: bytes, part: bytes) -> bytes:
    """A field, or with an empty tag a whole payload."""
    size = len(part)
    return tag + (_ONE_BYTE[size] if size < 0x80 else _varint_of(size)) + part


def _reply(id: int, name: str, result: bytes) -> bytes:
    return _sized(b"", _ID_TAG + _varint_of(id) + _sized(_REPLY_TAGS[name], result))


_Write = Callable[[Any], bytes]


def _message_writer(struct: type[Struct], numbers: str) -> _Write:
    fields = [_field_writer(number, type) for number, _, type in _fields(struct, numbers)]
    values_of = msgspec.structs.astuple

    def write(message: Struct) -> bytes:
        # What is unset, empty, zero or None is false; a message never is.
        return b"".join([write(value) for value, write in zip(values_of(message), fields) if value])  # noqa: B905

    return write


def _field_writer(number: int, type: inspect.Type) -> _Write:
    match type:
        case inspect.BoolType():
            true = _tag(number, _VARINT) + _ONE_BYTE[1]
            return lambda value: true
        case inspect.IntType():
            tag = _tag(number, _VARINT)
            return lambda value: tag + _varint_of(value)
        case inspect.StrType():
            return _part_writer(number, str.encode)
        case inspect.RawType() | inspect.BytesType():
            return _part_writer(number, bytes)
        case inspect.StructType(cls=cls):
            return _part_writer(number, _WRITERS.get(cls) or (lambda part: _WRITERS[cls](part)))  # a tree has itself
        case inspect.ListType(item_type=item):
            write_item = _field_writer(number, item)
            return lambda items: b"".join(map(write_item, items))
        case inspect.DictType(key_type=key, value_type=value):
            write_key, write_value = _field_writer(1, key), _field_writer(2, value)
            write_entry = _part_writer(number, lambda entry: write_key(entry[0]) + write_value(entry[1]))
            return lambda entries: b"".join(map(write_entry, entries.items()))
    raise TypeError(type)


def _part_writer(number: int, make: _Write) -> _Write:
    """A writer of fields that bring their length along. make: makes a part of a value."""
    tag = _tag(number, _BYTES)
    heads = [tag + size for size in _ONE_BYTE]

    def write(value: Any) -> bytes:
        part = make(value)
        size = len(part)
        return heads[size] + part if size < 0x80 else _sized(tag, part)

    return write


# -- the table at work ------------------------------------------------------------------------------------------------


def _fields(struct: type[Struct], numbers: str) -> list[tuple[int, str, inspect.Type]]:
    """Return number, name and type of each field in the order of the Struct; the type without None."""
    info = inspect.type_info(struct)
    assert isinstance(info, inspect.StructType)
    of = _numbers(numbers)
    return [(of[field.name], field.name, _without_none(field.type)) for field in info.fields]


def _numbers(text: str) -> dict[str, int]:
    return {name: int(number) for number, name in map(str.split, filter(None, text.split(",")))}


def _without_none(type: inspect.Type) -> inspect.Type:
    if isinstance(type, inspect.UnionType):
        (type,) = (one for one in type.types if not isinstance(one, inspect.NoneType))
    return type


def _tag(number: int, wire_type: int) -> bytes:
    return _varint_of(number << 3 | wire_type)


_FILTER_NODES = _CountedReader(messages.FilterNode)
_READERS = {struct: _Reader(struct) for struct in _READ} | {messages.FilterNode: _FILTER_NODES}
for _struct, _text in _READ.items():
    for _number, _name, _type in _fields(_struct, _text):
        _READERS[_struct].add(_number, _name, _type)

_WRITERS: dict[type[Struct], _Write] = {}
for _struct, _text in (*_WRITTEN.items(), *reversed(_READ.items())):
    _WRITERS[_struct] = _message_writer(_struct, _text)

_ID_TAG = _tag(_numbers(_REPLY)["id"], _VARINT)
_REPLY_TAGS = {name: _tag(number, _BYTES) for name, number in _numbers(_REPLY).items()}
_PUSH_TAGS = {name: _tag(number, _BYTES) for name, number in _numbers(_PUSH).items()}

PROTOBUF: Encoding = Protobuf()
