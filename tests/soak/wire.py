"""The bytes between a soak's clients and the server: commands, replies and WebSocket frames, with little work for each.

Both encodings give the same Structs. A client's frames have the mask 0, which the server must apply all the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import msgspec
from centrifuge.protocol import client_pb2
from msgspec import Raw, Struct

from tests.conformance.messages import write_message

TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10


class Error(Struct):
    code: int
    message: str = ""
    temporary: bool = False


class Pub(Struct):
    data: Raw = Raw(b"")
    offset: int = 0
    epoch: str = ""
    delta: bool = False


class Subscribed(Struct):
    epoch: str = ""
    offset: int = 0
    recovered: bool = False
    was_recovering: bool = False
    publications: list[Pub] = []
    delta: bool = False


class Connected(Struct):
    client: str = ""
    session: str = ""
    node: str = ""
    subs: dict[str, Subscribed] = {}


class Info(Struct):
    client: str = ""


class Member(Struct):
    info: Info


class Code(Struct):
    code: int = 0
    reason: str = ""


class Presence(Struct):
    presence: dict[str, Info] = {}


class Push(Struct):
    """connect: to unidirectional clients, in place of a reply."""

    channel: str = ""
    connect: Connected | None = None
    pub: Pub | None = None
    join: Member | None = None
    leave: Member | None = None
    unsubscribe: Code | None = None
    disconnect: Code | None = None


class Reply(Struct):
    """A reply, a push, or with neither a ping."""

    id: int = 0
    error: Error | None = None
    push: Push | None = None
    connect: Connected | None = None
    subscribe: Subscribed | None = None
    presence: Presence | None = None


class JSON:
    """Messages that are lines of JSON."""

    opcode = TEXT
    subprotocol = ""
    content_type = "application/json"
    pong = b"{}"
    _decode = msgspec.json.Decoder(Reply).decode

    @staticmethod
    def encode(commands: Iterable[dict[str, Any]]) -> bytes:
        return b"\n".join(msgspec.json.encode(command) for command in commands)

    @classmethod
    def replies(cls, message: bytes) -> Iterator[Reply]:
        return map(cls._decode, message.split(b"\n"))

    @staticmethod
    def whole(data: bytes) -> tuple[bytes, bytes]:
        """Split the bytes of a stream into its whole messages and the rest."""
        messages, _, rest = data.rpartition(b"\n")
        return messages, rest

    @staticmethod
    def emulation(session: str, node: str, commands: bytes) -> bytes:
        """Return the body of an emulation request."""
        return msgspec.json.encode({"session": session, "node": node, "data": commands.decode()})

    @staticmethod
    def text(pub: Pub, delta: bool) -> bytes:
        """Return the data of a publication. delta: whether the subscription has deltas, which are JSON strings."""
        return msgspec.json.decode(pub.data, type=str).encode() if delta else bytes(pub.data)


class Unidirectional(JSON):
    """Lines of JSON that are pushes."""

    _push = msgspec.json.Decoder(Push).decode

    @classmethod
    def replies(cls, message: bytes) -> Iterator[Reply]:
        for line in message.split(b"\n"):
            push = cls._push(line)
            if push.connect:
                yield Reply(1, connect=push.connect)
            elif push.channel or push.disconnect:
                yield Reply(push=push)


class Protobuf:
    """Messages behind their lengths."""

    opcode = BINARY
    subprotocol = "centrifuge-protobuf"
    content_type = "application/octet-stream"
    pong = b"\0"

    @staticmethod
    def encode(commands: Iterable[dict[str, Any]]) -> bytes:
        return b"".join(sized(client_pb2.Command(**_with_bytes(command)).SerializeToString()) for command in commands)

    @classmethod
    def replies(cls, message: bytes) -> Iterator[Reply]:
        at = 0
        while at < len(message):
            size, at = varint(message, at)
            yield _reply(client_pb2.Reply.FromString(message[at : at + size]))
            at += size

    @staticmethod
    def whole(data: bytes) -> tuple[bytes, bytes]:
        at = end = 0
        try:
            while end < len(data):
                size, start = varint(data, end)
                if start + size > len(data):
                    break
                at = end = start + size
        except IndexError:
            pass
        return data[:at], data[at:]

    @staticmethod
    def emulation(session: str, node: str, commands: bytes) -> bytes:
        return write_message("EmulationRequest", {"node": node, "session": session, "data": commands})

    @staticmethod
    def text(pub: Pub, delta: bool) -> bytes:
        return bytes(pub.data)


Encoding = type[JSON] | type[Protobuf]


def varint(data: bytes, at: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        byte = data[at]
        at += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, at
        shift += 7


def sized(data: bytes) -> bytes:
    """Return the data behind its length."""
    number, out = len(data), bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes(out) + bytes([number]) + data


def _with_bytes(value: dict[str, Any]) -> dict[str, Any]:
    """Return a command with its data as JSON text, which Protobuf carries as bytes."""
    return {
        key: msgspec.json.encode(item) if key == "data" else _with_bytes(item) if isinstance(item, dict) else item
        for key, item in value.items()
    }


def _reply(found: Any) -> Reply:
    reply = Reply(found.id)
    if found.HasField("push"):
        push = found.push
        reply.push = Push(push.channel)
        if push.HasField("pub"):
            reply.push.pub = _pub(push.pub)
        elif push.HasField("join"):
            reply.push.join = Member(Info(push.join.info.client))
        elif push.HasField("leave"):
            reply.push.leave = Member(Info(push.leave.info.client))
        elif push.HasField("unsubscribe"):
            reply.push.unsubscribe = Code(push.unsubscribe.code, push.unsubscribe.reason)
        elif push.HasField("disconnect"):
            reply.push.disconnect = Code(push.disconnect.code, push.disconnect.reason)
    elif found.HasField("error"):
        reply.error = Error(found.error.code, found.error.message, found.error.temporary)
    elif found.HasField("subscribe"):
        reply.subscribe = _subscribed(found.subscribe)
    elif found.HasField("connect"):
        one = found.connect
        subs = {channel: _subscribed(result) for channel, result in one.subs.items()}
        reply.connect = Connected(one.client, one.session, one.node, subs)
    elif found.HasField("presence"):
        reply.presence = Presence({client: Info(info.client) for client, info in found.presence.presence.items()})
    return reply


def _pub(found: Any) -> Pub:
    # The SDK's schema has no epoch here; it matters to JSON clients alone.
    return Pub(Raw(found.data), found.offset, "", found.delta)


def _subscribed(found: Any) -> Subscribed:
    publications = [_pub(one) for one in found.publications]
    return Subscribed(found.epoch, found.offset, found.recovered, found.was_recovering, publications, found.delta)


# WebSocket frames (RFC 6455, section 5).


def frame(opcode: int, payload: bytes, *, final: bool = True) -> bytes:
    """Return a frame of a client."""
    first, length = (0x80 if final else 0) | opcode, len(payload)
    if length < 126:
        head = bytes((first, 0x80 | length))
    elif length < 65536:
        head = bytes((first, 0xFE)) + length.to_bytes(2, "big")
    else:
        head = bytes((first, 0xFF)) + length.to_bytes(8, "big")
    return head + b"\0\0\0\0" + payload


def frames(data: bytes) -> tuple[list[tuple[int, bytes]], bytes]:
    """Return opcode and payload of each whole frame of the server in `data`, and the rest."""
    found, at, end = [], 0, len(data)
    while end - at >= 2:
        length, start = data[at + 1], at + 2
        if length >= 126:
            start += 2 if length == 126 else 8
            if start > end:
                break
            length = int.from_bytes(data[at + 2 : start], "big")
        if start + length > end:
            break
        found.append((data[at] & 0x0F, data[start : start + length]))
        at = start + length
    return found, data[at:]


def handshake(path: str, subprotocol: str = "") -> bytes:
    offer = f"Sec-WebSocket-Protocol: {subprotocol}\r\n" if subprotocol else ""
    return (
        f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n{offer}"
        "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    ).encode()


def request(method: str, path: str, content_type: str = "", body: bytes = b"", more: str = "") -> bytes:
    """Return an HTTP request. more: further header lines, each with its end."""
    head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{more}"
    if content_type:
        head += f"Content-Type: {content_type}\r\nContent-Length: {len(body)}\r\n"
    return head.encode() + b"\r\n" + body


def chunks(data: bytes) -> tuple[bytes, bytes]:
    """Return the content of the whole chunks in `data`, and the rest."""
    content = b""
    while True:
        size, line, after = data.partition(b"\r\n")
        if not line or len(after) < (length := int(size, 16)) + 2:
            return content, data
        content, data = content + after[:length], after[length + 2 :]
