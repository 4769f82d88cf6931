"""The interface of an encoding: the protocol's messages as bytes, and back.

A connection keeps one encoding for its whole life. An encoding makes whole payloads; the transport puts its framing
around them (`realtime.protocol.wire_formats`). All encodings carry the messages of `realtime.protocol.messages`:
`json_encoding` and `protobuf` implement this interface.

A *unidirectional* encoding carries one request, a bare ConnectRequest, and from then on bare pushes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

from msgspec import Raw, Struct, UnsetType

from realtime.errors import ClientError
from realtime.protocol.messages import Command, Info, ProtocolError, Pub
from realtime.types import ClientInfo, Publication

MAX_BATCHED = 16384
"""Commands in one part of a batch, see `Encoding.end_of_commands`: reading their lengths takes some milliseconds."""


MAX_FIELDS = 8192
"""Default of `client.max_command_fields`. A connect command that recovers 1,000 subscriptions has as many."""

FEWEST_FIELDS = 2048
"""The least value of that setting: a command of fewer bytes needs no count."""


class CommandTooLong(ProtocolError):
    """One command is longer than allowed."""


class TooManyFields(ProtocolError):
    """One command has more fields or objects than allowed."""


class Encoding(Protocol):
    """name: "json" or "protobuf". unidirectional: see the module. ping: the payload of a ping."""

    @property
    def name(self) -> str: ...

    @property
    def unidirectional(self) -> bool: ...

    @property
    def ping(self) -> bytes: ...

    # Received messages

    def decode_command(self, message: bytes) -> Command | None:
        """Decode the command of a message that holds at most one, as most do; None for others, see `decode_commands`.

        Raises ProtocolError for an invalid message.
        """

    def decode_commands(self, message: bytes, fields: int = MAX_FIELDS) -> Iterator[Command]:
        """Decode the commands of one message one by one, so that those before an invalid one are carried out.

        fields: the most fields of one command, nested ones included, of which a nested message or object counts twice.
        In JSON only the objects outside the application's data are counted. Raises ProtocolError at the first invalid
        command, and TooManyFields.
        """

    def end_of_commands(self, data: bytes, limit: int) -> int:
        """Return where the last whole command in the first part of a message ends.

        limit: largest size of one command, in bytes. Raises CommandTooLong, also for a command that is not complete
        yet, and ProtocolError for more than MAX_BATCHED commands whose lengths must be read one by one.
        """

    def command_ids(self, message: bytes) -> Iterator[int]:
        """Read the ids of the commands of one message, 0 for none, and nothing else. Raises ProtocolError."""

    def validate_data(self, raw: Raw | UnsetType) -> bytes:
        """Return the application's data, safe to store and pass on; b"" if it is absent. Raises ClientError 107."""

    def decode_data(self, data: bytes) -> Any:
        """Decode validated data for a handler; None for b"". Raises ClientError 107."""

    def encode_data(self, value: Any) -> bytes:
        """Encode a handler's result as data; b"" for None. Raises msgspec.EncodeError, TypeError, ValueError."""

    def is_json(self, data: bytes) -> bool:
        """Return whether every encoding can carry this validated data; otherwise it is published as `binary`."""

    def encode_command(self, command: Command) -> bytes:
        """Encode a command as a message of its own, for the worker that a session moves to."""

    # Sent messages

    def embed(self, data: bytes) -> Raw | UnsetType:
        """Embed content of a token, a handler or the server API; UNSET for b"".

        Also UNSET for bytes behind `json_text.BINARY` that this encoding can't carry.
        """

    def make_info(self, client: ClientInfo) -> Info:
        """Make the message for a client, as other clients see it."""

    def encode_reply(self, id: int, name: str, result: Struct) -> bytes:
        """Encode the reply to command `id`. name: of its request field."""

    def encode_rpc_reply(self, id: int, value: Any) -> bytes:
        """Encode the reply to the RPC command `id`. value: its handler's result. Raises as `encode_data`."""

    def encode_error(self, id: int, error: ClientError) -> bytes:
        """Encode the error reply to command `id`."""

    def encode_member(self, info: ClientInfo) -> bytes:
        """Encode one entry of a presence reply."""

    def encode_presence_reply(self, id: int, members: Iterable[bytes]) -> bytes:
        """Encode the reply to the presence command `id` from its encoded entries: thousands take little time."""

    def encode_push(self, channel: str, name: str, body: Struct) -> bytes:
        """Encode a push. name: of the field that it sets, such as "pub". channel: "" for a push to the connection."""

    def make_pub(self, publication: Publication, epoch: str = "") -> Pub:
        """Make a publication's part of a push or result. Raises Disconnect 3506 if this encoding can't carry it."""

    def make_full_pub(self, publication: Publication, epoch: str = "") -> Pub:
        """As `make_pub`, for a subscription with deltas: the full data. Raises as `make_pub`."""

    def make_delta_pub(self, publication: Publication, delta: bytes, epoch: str = "") -> Pub | None:
        """As `make_full_pub`, with `delta` in place of the data; None if this encoding can't carry it."""
