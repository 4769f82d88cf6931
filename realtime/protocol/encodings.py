"""What a connection speaks: the protocol's messages as bytes, and back.

One connection keeps to one encoding for its whole life. An encoding makes whole payloads; the framing around them is
the transport's (`realtime.protocol.wire_formats`). All encodings carry the messages of `realtime.protocol.messages`.

A *unidirectional* encoding carries one request, a bare ConnectRequest, and from then on bare pushes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import msgspec
from msgspec import Raw, Struct, UnsetType

from realtime import errors, json_text
from realtime.errors import ClientError, Disconnect
from realtime.protocol import messages
from realtime.protocol.messages import Command, ConnectRequest, Error, ProtocolError, Pub
from realtime.types import Publication


class Encoding(Protocol):
    """name: "json" or "protobuf". unidirectional: see the module. ping: the payload that asks for a sign of life."""

    @property
    def name(self) -> str: ...

    @property
    def unidirectional(self) -> bool: ...

    @property
    def ping(self) -> bytes: ...

    # What comes in

    def command(self, message: bytes) -> Command | None:
        """The command of a message that holds no more than one, as most do; None for others: ask for `commands`.

        Raises ProtocolError when it can't be read.
        """

    def commands(self, message: bytes) -> Iterator[Command]:
        """The commands of one message, one after another, so that those before a bad one are acted on.

        Raises ProtocolError at the first that can't be read.
        """

    def payload(self, raw: Raw | UnsetType) -> bytes:
        """What an application sent, fit to be stored and passed on; b"" when absent. Raises ClientError 107."""

    def value(self, data: bytes) -> Any:
        """A payload as handlers get it; None for b"". Raises ClientError 107."""

    def made(self, value: Any) -> bytes:
        """A payload of what a handler returned; b"" for None. Raises msgspec.EncodeError, TypeError, ValueError."""

    def is_json(self, data: bytes) -> bool:
        """Whether every encoding can carry a `payload`; what is not JSON is published as `binary`."""

    # What goes out

    def reply(self, id: int, name: str, result: Struct) -> bytes:
        """The reply to command `id`, whose request field was `name`."""

    def answer(self, id: int, value: Any) -> bytes:
        """The reply to the RPC with command `id`. value: what the handler returned; raises as `made`."""

    def error_reply(self, id: int, error: ClientError) -> bytes:
        """The reply that says why command `id` failed."""

    def push(self, channel: str, name: str, body: Struct) -> bytes:
        """A push. name: the field that it sets, such as "pub". channel: "" for one that concerns the connection."""

    def pub(self, publication: Publication, epoch: str = "") -> Pub:
        """A publication as a part of a push or a result. Raises Disconnect 3506 for data that can't be carried."""

    def whole(self, publication: Publication, epoch: str = "") -> Pub:
        """The same, for a subscription on which deltas were agreed. Raises as `pub`."""

    def patch(self, publication: Publication, delta: bytes, epoch: str = "") -> Pub | None:
        """The same with `delta` in place of the data; None when this encoding can't carry it."""


class JSON:
    """One text message holds JSON objects joined by newlines. Embedded values stand as they were written."""

    name = "json"
    unidirectional = False
    ping = b"{}"

    def command(self, message: bytes) -> Command | None:
        if _NEWLINE in message:
            return None
        try:
            return _decode_command(message)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            raise ProtocolError("not a command") from None

    def commands(self, message: bytes) -> Iterator[Command]:
        # A single newline at the end is tolerated.
        for line in message.removesuffix(b"\n").split(b"\n"):
            command = self.command(line)
            assert command is not None
            yield command

    def payload(self, raw: Raw | UnsetType) -> bytes:
        return json_text.payload(raw)

    def value(self, data: bytes) -> Any:
        return json_text.value(data)

    def made(self, value: Any) -> bytes:
        if value is None:
            return b""
        return json_text.one_line(bytes(value) if isinstance(value, Raw) else _encode(value))

    def is_json(self, data: bytes) -> bool:
        return True  # or it would not have been decoded

    def reply(self, id: int, name: str, result: Struct) -> bytes:
        return b'{"id":%d,"%s":%b}' % (id, name.encode(), _encode(result))

    def answer(self, id: int, value: Any) -> bytes:
        return b'{"id":%d,"rpc":{"data":%b}}' % (id, self.made(value) or b"null")

    def error_reply(self, id: int, error: ClientError) -> bytes:
        return b'{"id":%d,"error":%b}' % (id, _encode(Error(error.code, error.message, error.temporary)))

    def push(self, channel: str, name: str, body: Struct) -> bytes:
        return b'{"push":%b}' % _bare_push(channel, name, body)

    def pub(self, publication: Publication, epoch: str = "") -> Pub:
        if publication.binary:
            raise Disconnect(*errors.INAPPROPRIATE_PROTOCOL)
        # Of text that came by another encoding the line ends are still there.
        return messages.pub(publication, json_text.one_line(publication.data), epoch)

    def whole(self, publication: Publication, epoch: str = "") -> Pub:
        # Where deltas may come, the data is a string in any case: JSON text, or a delta between two such texts.
        if publication.binary:
            raise Disconnect(*errors.INAPPROPRIATE_PROTOCOL)
        return messages.pub(publication, _encode(publication.data.decode()), epoch)

    def patch(self, publication: Publication, delta: bytes, epoch: str = "") -> Pub | None:
        if publication.binary:
            return None
        try:
            return messages.pub(publication, _encode(delta.decode()), epoch, delta=True)
        except UnicodeDecodeError:
            return None


class JSONPushes(JSON):
    """The same for transports on which only the server talks."""

    unidirectional = True

    def command(self, message: bytes) -> Command:
        try:
            return Command(id=1, connect=_decode_connect(message or b"{}"))
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            raise ProtocolError("not a connect request") from None

    def commands(self, message: bytes) -> Iterator[Command]:
        yield self.command(message)

    def reply(self, id: int, name: str, result: Struct) -> bytes:
        return b'{"%s":%b}' % (name.encode(), _encode(result))

    def push(self, channel: str, name: str, body: Struct) -> bytes:
        return _bare_push(channel, name, body)


_NEWLINE = 10


def _bare_push(channel: str, name: str, body: Struct) -> bytes:
    if channel:
        return b'{"channel":%b,"%b":%b}' % (_encode(channel), name.encode(), _encode(body))
    return b'{"%b":%b}' % (name.encode(), _encode(body))


_encode = msgspec.json.Encoder().encode
_decode_command = msgspec.json.Decoder(Command).decode
_decode_connect = msgspec.json.Decoder(ConnectRequest).decode

JSON_ENCODING: Encoding = JSON()
JSON_PUSHES: Encoding = JSONPushes()
