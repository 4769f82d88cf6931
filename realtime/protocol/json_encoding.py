"""The JSON encoding of the client protocol.

One text message holds one or more JSON objects, joined by newlines. Data of applications is embedded unparsed, byte for
byte except for raw line ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any, TypeVar

import msgspec
from msgspec import Raw, Struct, inspect

from realtime import errors, json_text
from realtime.errors import ClientError, Disconnect
from realtime.protocol import messages
from realtime.protocol.encodings import FEWEST_FIELDS, MAX_FIELDS, CommandTooLong, Encoding, TooManyFields
from realtime.protocol.messages import Command, ConnectRequest, Error, ProtocolError, Pub
from realtime.pubsub.filters import MAX_DEPTH, MAX_NODES
from realtime.types import ClientInfo, Publication


class JSONEncoding:
    """JSON objects, joined by newlines within one text message."""

    name = "json"
    unidirectional = False
    ping = b"{}"
    embed = staticmethod(messages.embed)
    make_info = staticmethod(messages.make_info)
    validate_data = staticmethod(json_text.payload)
    decode_data = staticmethod(json_text.value)

    def decode_command(self, message: bytes) -> Command | None:
        if _NEWLINE in message:
            return None
        if len(message) > FEWEST_FIELDS:
            return self._decode_command(message, MAX_FIELDS)
        try:
            return _decode_command(message)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return _decode_without_nulls(message, Command)

    def _decode_command(self, message: bytes, fields: int) -> Command:
        try:
            if len(message) > FEWEST_FIELDS:
                _check_objects(message, _decode_outline, fields // 2)
            return _decode_command(message)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return _decode_without_nulls(message, Command)

    def decode_commands(self, message: bytes, fields: int = MAX_FIELDS) -> Iterator[Command]:
        # A newline at the end of the message is allowed.
        start, end = 0, len(message) - message.endswith(b"\n")
        while start <= end:
            stop = message.find(b"\n", start, end)
            if stop < 0:
                stop = end
            yield self._decode_command(message[start:stop], fields)
            start = stop + 1

    def end_of_commands(self, data: bytes, limit: int) -> int:
        end = 0
        while len(data) - end > limit:
            # The last line end that a command of the largest size may have.
            line_end = data.rfind(b"\n", end, end + limit + 1)
            if line_end < 0:
                raise CommandTooLong("a command is too long")
            end = line_end + 1
        return max(end, data.rfind(b"\n") + 1)

    def command_ids(self, message: bytes) -> Iterator[int]:
        start, end = 0, len(message) - message.endswith(b"\n")
        try:
            while start <= end:
                stop = message.find(b"\n", start, end)
                if stop < 0:
                    stop = end
                yield _decode_id(message[start:stop]).id
                start = stop + 1
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            raise ProtocolError("not a command") from None

    def encode_data(self, value: Any) -> bytes:
        if value is None:
            return b""
        return json_text.one_line(bytes(value) if isinstance(value, Raw) else _encode(value))

    def is_json(self, data: bytes) -> bool:
        return True  # otherwise the command would not have been decoded

    def encode_command(self, command: Command) -> bytes:
        return _encode(command)

    def encode_reply(self, id: int, name: str, result: Struct) -> bytes:
        return b'{"id":%d,"%s":%b}' % (id, name.encode(), _encode(result))

    def encode_rpc_reply(self, id: int, value: Any) -> bytes:
        if type(value) is Raw:  # as `encode_data`, for the usual result of a handler
            data = bytes(value)
            if _NEWLINE in data or _RETURN in data:
                data = json_text.one_line(data)
        else:
            data = self.encode_data(value)
        return b'{"id":%d,"rpc":{"data":%b}}' % (id, data or b"null")

    def encode_error(self, id: int, error: ClientError) -> bytes:
        return b'{"id":%d,"error":%b}' % (id, _encode(Error(error.code, error.message, error.temporary)))

    def encode_member(self, info: ClientInfo) -> bytes:
        return b"%b:%b" % (_encode(info.client), _encode(self.make_info(info)))

    def encode_presence_reply(self, id: int, members: Iterable[bytes]) -> bytes:
        return b'{"id":%d,"presence":{"presence":{%b}}}' % (id, b",".join(members))

    def encode_push(self, channel: str, name: str, body: Struct) -> bytes:
        if channel:  # as `_bare_push`, without a further call for each publication
            return b'{"push":{"channel":%b,"%b":%b}}' % (_encode(channel), name.encode(), _encode(body))
        return b'{"push":%b}' % _bare_push(channel, name, body)

    def make_pub(self, publication: Publication, epoch: str = "") -> Pub:
        if publication.binary:
            raise Disconnect(*errors.INAPPROPRIATE_PROTOCOL)
        # Text that arrived in another encoding still has its line ends, or consists of them.
        data = publication.data
        if _NEWLINE in data or _RETURN in data:
            data = json_text.one_line(data) or b"null"
        return messages.make_pub(publication, data, epoch)

    def make_full_pub(self, publication: Publication, epoch: str = "") -> Pub:
        # With deltas the data is always a string: JSON text, or a delta between two JSON texts.
        if publication.binary:
            raise Disconnect(*errors.INAPPROPRIATE_PROTOCOL)
        text = publication.data.decode()
        return messages.make_pub(publication, _encode(text if text.strip("\r\n") else "null"), epoch)

    def make_delta_pub(self, publication: Publication, delta: bytes, epoch: str = "") -> Pub | None:
        if publication.binary:
            return None
        try:
            return messages.make_pub(publication, _encode(delta.decode()), epoch, delta=True)
        except UnicodeDecodeError:
            return None


class JSONPushEncoding(JSONEncoding):
    """The unidirectional encoding: a JSON connect request, then bare pushes."""

    unidirectional = True

    def decode_command(self, message: bytes) -> Command:
        try:
            if len(message) > FEWEST_FIELDS:
                _check_objects(message, _decode_push_outline, MAX_OBJECTS)
            return Command(id=1, connect=_decode_connect(message or b"{}"))
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return Command(id=1, connect=_decode_without_nulls(message, ConnectRequest))

    def decode_commands(self, message: bytes, fields: int = MAX_FIELDS) -> Iterator[Command]:
        yield self.decode_command(message)

    def end_of_commands(self, data: bytes, limit: int) -> int:
        raise CommandTooLong("the one request is too long")

    def encode_command(self, command: Command) -> bytes:
        return _encode(command.connect)

    def encode_reply(self, id: int, name: str, result: Struct) -> bytes:
        return b'{"%s":%b}' % (name.encode(), _encode(result))

    def encode_push(self, channel: str, name: str, body: Struct) -> bytes:
        return _bare_push(channel, name, body)


_NEWLINE, _RETURN = b"\n\r"

MAX_OBJECTS = MAX_FIELDS // 2
"""JSON objects in one command, outside the application's data: subscriptions of a connect, or nodes of a filter."""


class _NumberedCommand(Struct):
    id: int = 0


class _DataOutline(Struct):
    data: Raw = Raw(b"")


class _Outline(Struct):
    """The application's data in a command, which is not decoded, and costs little."""

    rpc: _DataOutline | None = None
    publish: _DataOutline | None = None
    send: _DataOutline | None = None
    connect: _DataOutline | None = None
    subscribe: _DataOutline | None = None


def _check_objects(message: bytes, decode_outline: Callable[[bytes], Any], limit: int) -> None:
    """Refuse a command whose decoding takes long, before it is decoded.

    limit: objects outside the application's data. Raises TooManyFields, and ProtocolError for invalid JSON.
    """
    objects = message.count(b"{")
    if objects <= limit:
        return
    try:
        outline = decode_outline(message)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise ProtocolError("not a command") from None
    parts = msgspec.structs.astuple(outline) if isinstance(outline, _Outline) else (outline,)
    if objects - sum(bytes(part.data).count(b"{") for part in parts if part is not None) > limit:
        raise TooManyFields("too many objects")


def _bare_push(channel: str, name: str, body: Struct) -> bytes:
    if channel:
        return b'{"channel":%b,"%b":%b}' % (_encode(channel), name.encode(), _encode(body))
    return b'{"%b":%b}' % (name.encode(), _encode(body))


# Levels of nested Structs in which `_NullRemoval` looks: a command, a connect request, a subscription and the deepest
# filter that is accepted. Each level reads the text again.
_LEVELS = 3 + MAX_DEPTH
# Structs of one message from which it removes nulls: the nodes of a filter, or the subscriptions of a connect request.
_STRUCTS = 3 + MAX_NODES

_decode_fields = msgspec.json.Decoder(dict[str, Raw]).decode
_RequestType = TypeVar("_RequestType", bound=Struct)


def _decode_without_nulls(text: bytes, struct: type[_RequestType]) -> _RequestType:
    """Decode a request that the strict decoder refused, with null in a field meaning that the field is absent.

    A request that is null itself is empty. Raises ProtocolError.
    """
    if text.strip() == b"null":
        return struct()
    try:
        if b"null" in text:
            return msgspec.json.decode(_NullRemoval().without_nulls(text, struct, _LEVELS), type=struct)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        pass
    raise ProtocolError("not a request of this type")


class _NullRemoval:
    """Removes null fields from one message. left: number of Structs that may still be changed; the others stay."""

    def __init__(self) -> None:
        self.left = _STRUCTS

    def without_nulls(self, text: bytes, struct: type[Struct], levels: int) -> bytes:
        """Return the JSON object `text` without the fields that are null, apart from the application's data.

        Items of lists and values of maps stay, null or not. Raises msgspec.MsgspecError.
        """
        self.left -= 1
        kept: dict[str, Raw] = {}
        types = _field_types(struct)
        for name, raw in _decode_fields(text).items():
            value = bytes(raw)
            container, nested = types.get(name, (None, None))
            if value == b"null" and container is not Raw:
                continue
            if nested is not None and b"null" in value and value[:1] in (b"{", b"["):
                if container is dict:
                    items = _decode_fields(value).items()
                    raw = Raw(_encode({key: self._nested(item, nested, levels) for key, item in items}))
                elif container is list:
                    raw = Raw(_encode([self._nested(item, nested, levels) for item in _decode_items(value)]))
                else:
                    raw = self._nested(raw, nested, levels)
            kept[name] = raw
        return _encode(kept)

    def _nested(self, raw: Raw, struct: type[Struct], levels: int) -> Raw:
        value = bytes(raw)
        if levels > 1 and self.left > 0 and value.startswith(b"{") and b"null" in value:
            return Raw(self.without_nulls(value, struct, levels - 1))
        return raw


@cache
def _field_types(struct: type[Struct]) -> dict[str, tuple[type, type[Struct] | None]]:
    """Return, by the field of a request: Raw, dict, list or object, and the Struct in it."""
    info = inspect.type_info(struct)
    assert isinstance(info, inspect.StructType)
    return {field.name: _field_type(field.type) for field in info.fields}


def _field_type(type: inspect.Type) -> tuple[type, type[Struct] | None]:
    match type:
        case inspect.UnionType(types=types):
            return _field_type(types[0])
        case inspect.RawType():
            return Raw, None
        case inspect.StructType(cls=cls):
            return object, cls
        case inspect.DictType(value_type=inspect.StructType(cls=cls)):
            return dict, cls
        case inspect.ListType(item_type=inspect.StructType(cls=cls)):
            return list, cls
    return object, None


_encode = msgspec.json.Encoder().encode
_decode_items = msgspec.json.Decoder(list[Raw]).decode
_decode_command = msgspec.json.Decoder(Command).decode
_decode_connect = msgspec.json.Decoder(ConnectRequest).decode
_decode_id = msgspec.json.Decoder(_NumberedCommand).decode
_decode_outline = msgspec.json.Decoder(_Outline).decode
_decode_push_outline = msgspec.json.Decoder(_DataOutline).decode

JSON_ENCODING: Encoding = JSONEncoding()
JSON_PUSHES: Encoding = JSONPushEncoding()
