"""Messages between nodes, over pub/sub, and the entries of histories: MessagePack of the Structs below.

The body is an array: the number of its kind, the version of this format, the sender, the number of the message, then
the fields of the kind. A node drops what it can't decode: messages of strangers, and of versions of the package with
another format.

A publication ends with offset and epoch. The script that assigns them appends them to the rest, the *entry*, which is
also what the history of the channel keeps: the offsets of its entries follow from their places.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import msgspec
from msgspec import Struct

from realtime.errors import RealtimeError
from realtime.types import ClientInfo, Publication

VERSION: Literal[1] = 1


class BadMessage(RealtimeError):
    """Bytes on Redis that are no message of this version."""


class NodeMessage(Struct, array_like=True, frozen=True, gc=False):
    """sender: a run of a node's broker. number: by which it knows its own message again; it counts up."""

    version: Literal[1]
    sender: str
    number: int


class ChannelPublication(NodeMessage, tag=1, frozen=True, gc=False):
    """A publication. offset, epoch: its position, (0, "") without history. The others are those of `Publication`."""

    data: bytes
    info: ClientInfo | None
    tags: dict[str, str] | None
    delta: bool
    binary: bool
    offset: int
    epoch: str

    @property
    def publication(self) -> Publication:
        """What subscribers receive."""
        return Publication(self.data, self.offset, self.info, self.tags, self.delta, self.binary)


class ChannelJoin(NodeMessage, tag=2, frozen=True, gc=False):
    """A client has joined the channel."""

    info: ClientInfo


class ChannelLeave(NodeMessage, tag=3, frozen=True, gc=False):
    """A client has left the channel."""

    info: ClientInfo


ChannelMessage = ChannelPublication | ChannelJoin | ChannelLeave

encode: Callable[[object], bytes] = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(ChannelMessage).decode
_decode_position = msgspec.msgpack.Decoder(tuple[int, str]).decode

_NO_POSITION = 2
"""Bytes of the position (0, "") at the end of a publication."""


def decode(body: bytes) -> ChannelMessage:
    """Return a message of a channel. Raises BadMessage."""
    try:
        return _decode(body)
    except (ValueError, RecursionError) as error:
        # msgspec's own errors and UnicodeDecodeError are ValueErrors.
        raise BadMessage(str(error)) from error


def entry_of(publication: bytes) -> bytes:
    """Return the bytes of a publication without its position, which is (0, "")."""
    return publication[:-_NO_POSITION]


def decode_entry(entry: bytes, offset: int, epoch: str) -> ChannelPublication:
    """Return an entry of a history with its position. Raises BadMessage."""
    message = decode(entry + encode(offset) + encode(epoch))
    if type(message) is not ChannelPublication:
        raise BadMessage("not a publication")
    return message


def decode_position(packed: bytes) -> tuple[int, str]:
    """Return offset and epoch, as a script returns them: packed one after the other. Raises BadMessage."""
    try:
        return _decode_position(b"\x92" + packed)
    except (ValueError, TypeError) as error:
        raise BadMessage(str(error)) from error
