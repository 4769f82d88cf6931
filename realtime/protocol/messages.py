"""The client protocol's messages, as Structs for every encoding (`realtime.protocol.encodings`). In JSON:

    client -> server   Command   {"id": 3, "publish": {"channel": "news", "data": {...}}}
    server -> client   Reply     {"id": 3, "publish": {}}       answers the command of that id
                                 {"id": 3, "error": {"code": 103, "message": "permission denied"}}
                       Push      {"push": {"channel": "news", "pub": {"data": {...}, "offset": 7}}}
                       ping      {}    answered by the empty command {}

One WebSocket text message holds one or more of them, joined by a newline. Exactly one request field is set in a
command, and exactly one result field, or `error`, in its reply. Zero values are omitted, except for the few keys that
the SDKs read unconditionally.

Data of applications (`data`, `conn_info`, `chan_info`) is embedded JSON. It passes through as written, including the
spelling of numbers and the order of keys. Only raw line ends, which valid JSON has between tokens alone, are removed,
since a newline separates messages. `realtime.json_text.payload` is the one strict entrance for such text.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from msgspec import UNSET, Meta, Raw, Struct, UnsetType
from msgspec.structs import astuple

from realtime.errors import RealtimeError
from realtime.types import ClientInfo, Publication

_UInt32 = Annotated[int, Meta(ge=0, le=2**32 - 1)]
# A uint64. msgspec can't express its upper limit: `_check_offset` does.
_Offset = Annotated[int, Meta(ge=0)]
MAX_OFFSET = 2**64 - 1
_Int32 = Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)]
_Int64 = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]


class ProtocolError(RealtimeError):
    """The peer sent an invalid message: the connection is closed with 3501."""


def _check_offset(offset: int) -> None:
    if offset > MAX_OFFSET:
        raise ValueError("an offset of more than 64 bits")


# -- requests ---------------------------------------------------------------------------------------------------------


class StreamPosition(Struct, frozen=True, gc=False):
    offset: _Offset = 0
    epoch: str = ""

    def __post_init__(self) -> None:
        _check_offset(self.offset)


class FilterNode(Struct, frozen=True, gc=False):
    """A condition on the tags of publications: a leaf, or "and", "or", "not" over `nodes`."""

    op: str = ""
    key: str = ""
    cmp: str = ""
    val: str = ""
    vals: list[str] = []
    nodes: list[FilterNode] = []


class SubscribeRequest(Struct, frozen=True, gc=False):
    channel: str = ""
    token: str = ""
    recover: bool = False
    epoch: str = ""
    offset: _Offset = 0
    data: Raw | UnsetType = UNSET
    positioned: bool = False
    recoverable: bool = False
    join_leave: bool = False
    delta: str = ""
    tf: FilterNode | None = None
    flag: _Int64 = 0
    type: _Int32 = 0

    def __post_init__(self) -> None:
        _check_offset(self.offset)


class ConnectRequest(Struct, frozen=True, gc=False):
    token: str = ""
    data: Raw | UnsetType = UNSET
    subs: dict[str, SubscribeRequest] | None = None
    name: str = ""
    version: str = ""
    headers: dict[str, str] | None = None


class UnsubscribeRequest(Struct, frozen=True, gc=False):
    channel: str = ""


class PublishRequest(Struct, frozen=True, gc=False):
    channel: str = ""
    data: Raw | UnsetType = UNSET
    type: _Int32 = 0


class PresenceRequest(Struct, frozen=True, gc=False):
    channel: str = ""


class PresenceStatsRequest(Struct, frozen=True, gc=False):
    channel: str = ""


class HistoryRequest(Struct, frozen=True, gc=False):
    channel: str = ""
    limit: _Int32 = 0
    since: StreamPosition | None = None
    reverse: bool = False


class SendRequest(Struct, frozen=True, gc=False):
    data: Raw | UnsetType = UNSET


class RPCRequest(Struct, frozen=True, gc=False):
    data: Raw | UnsetType = UNSET
    method: str = ""


class RefreshRequest(Struct, frozen=True, gc=False):
    token: str = ""


class SubRefreshRequest(Struct, frozen=True, gc=False):
    channel: str = ""
    token: str = ""


class Command(Struct, frozen=True, gc=False):
    """One command, as on the wire. `request` finds the one field that is set; the most frequent fields come first."""

    id: _UInt32 = 0
    rpc: RPCRequest | None = None
    publish: PublishRequest | None = None
    send: SendRequest | None = None
    connect: ConnectRequest | None = None
    subscribe: SubscribeRequest | None = None
    unsubscribe: UnsubscribeRequest | None = None
    presence: PresenceRequest | None = None
    presence_stats: PresenceStatsRequest | None = None
    history: HistoryRequest | None = None
    ping: Raw | UnsetType = UNSET
    refresh: RefreshRequest | None = None
    sub_refresh: SubRefreshRequest | None = None

    def request(self) -> tuple[str, Any]:
        """Return the name and value of the one request field; ("", None) for the empty command, which is a pong.

        Raises ProtocolError for an id without a request, for more than one request, and for the unused `ping`.
        """
        absent = astuple(self).count(None)
        if absent == _OTHERS and self.ping is UNSET:  # the short paths
            if self.rpc is not None:
                return "rpc", self.rpc
            if self.publish is not None:
                return "publish", self.publish
        ping = self.ping is not UNSET and bytes(self.ping) != b"null"
        if ping or absent < _OTHERS or (self.id and absent == len(REQUESTS)):
            raise ProtocolError("a command has exactly one request, and never `ping`")
        for name in REQUESTS:
            value = getattr(self, name)
            if value is not None:
                return name, value
        return "", None


# The names of all requests.
REQUESTS = [name for name in Command.__struct_fields__ if name not in ("id", "ping")]
_OTHERS = len(REQUESTS) - 1  # the absent requests of a command with one


# -- results -------------------------------------------------------------------------------------------------------


class Error(Struct, frozen=True, gc=False, omit_defaults=True):
    code: int
    message: str
    temporary: bool = False


class Info(Struct, frozen=True, gc=False, omit_defaults=True):
    user: str
    client: str
    conn_info: Raw | UnsetType = UNSET
    chan_info: Raw | UnsetType = UNSET


class Pub(Struct, frozen=True, gc=False, omit_defaults=True):
    """data: absent for an empty publication."""

    data: Raw | UnsetType = UNSET
    info: Info | None = None
    offset: int = 0
    tags: dict[str, str] | None = None
    epoch: str = ""
    delta: bool = False


class SubscribeResult(Struct, frozen=True, gc=False, omit_defaults=True):
    expires: bool = False
    ttl: int = 0
    recoverable: bool = False
    epoch: str = ""
    publications: list[Pub] | None = None
    recovered: bool = False
    offset: int = 0
    positioned: bool = False
    data: Raw | UnsetType = UNSET
    was_recovering: bool = False
    delta: bool = False


class ConnectResult(Struct, frozen=True, gc=False, omit_defaults=True):
    client: str
    version: str
    expires: bool = False
    ttl: int = 0
    data: Raw | UnsetType = UNSET
    subs: dict[str, SubscribeResult] | None = None
    ping: int = 0
    pong: bool = False
    session: str = ""
    node: str = ""
    time: int = 0


class Empty(Struct, frozen=True, gc=False):
    """A result without fields, which is sent as an empty object."""


class PresenceResult(Struct, frozen=True, gc=False):
    presence: dict[str, Info]


class PresenceStatsResult(Struct, frozen=True, gc=False):
    num_clients: int
    num_users: int


class HistoryResult(Struct, frozen=True, gc=False):
    publications: list[Pub]
    epoch: str
    offset: int


class RPCResult(Struct, frozen=True, gc=False, omit_defaults=True):
    data: Raw | UnsetType = UNSET


class RefreshResult(Struct, frozen=True, gc=False, omit_defaults=True):
    client: str = ""
    version: str = ""
    expires: bool = False
    ttl: int = 0


class SubRefreshResult(Struct, frozen=True, gc=False, omit_defaults=True):
    expires: bool = False
    ttl: int = 0


EMPTY = Empty()

# -- pushes, apart from Pub --------------------------------------------------------------------------------------------


class JoinPush(Struct, frozen=True, gc=False):
    """The body of join and leave."""

    info: Info


class UnsubscribePush(Struct, frozen=True, gc=False):
    """The server ended a subscription; with a code from 2500 on the client subscribes again."""

    code: int
    reason: str


class SubscribePush(Struct, frozen=True, gc=False, omit_defaults=True):
    """The server subscribed the client."""

    recoverable: bool = False
    epoch: str = ""
    offset: int = 0
    positioned: bool = False
    data: Raw | UnsetType = UNSET


class MessagePush(Struct, frozen=True, gc=False):
    """A message from the application to one client, outside any channel."""

    data: Raw


class DisconnectPush(Struct, frozen=True, gc=False):
    """The server closes the connection, on transports without a close frame."""

    code: int
    reason: str


class RefreshPush(Struct, frozen=True, gc=False, omit_defaults=True):
    """The server changed the expiry of the connection."""

    expires: bool = False
    ttl: int = 0


def make_info(client: ClientInfo) -> Info:
    """Make the message for a client, as other clients see it in JSON."""
    conn_info, chan_info = client.conn_info, client.chan_info
    return Info(
        client.user,
        client.client,
        embed(conn_info) if conn_info else UNSET,
        embed(chan_info) if chan_info else UNSET,
    )


def make_binary_info(client: ClientInfo) -> Info:
    """Make the message for a client, for an encoding that carries any bytes."""
    return Info(client.user, client.client, embed_bytes(client.conn_info), embed_bytes(client.chan_info))


def make_pub(
    publication: Publication,
    data: bytes,
    epoch: str = "",
    delta: bool = False,
    make_info: Callable[[ClientInfo], Info] = make_info,
) -> Pub:
    """Make the message for a publication, with `data` in place of its own. delta: whether `data` is a delta."""
    return Pub(
        Raw(data) if data else UNSET,
        make_info(publication.info) if publication.info else None,
        publication.offset,
        publication.tags,
        epoch,
        delta,
    )


def embed(data: bytes) -> Raw | UnsetType:
    """Embed JSON text in a message, unchanged; b"" omits the key, and so do bytes behind `json_text.BINARY`."""
    return Raw(data) if data and data[0] else UNSET


def embed_bytes(data: bytes) -> Raw | UnsetType:
    """Embed JSON text, or the bytes behind `json_text.BINARY`; b"" omits the key."""
    return Raw(data if data[0] else data[1:]) if data else UNSET
