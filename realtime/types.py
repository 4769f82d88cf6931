"""The types that several packages share: clients, publications, positions, and the options around them.

They are msgspec Structs. The Structs on the data plane between worker and broker are arrays: a new field goes to the
end, with a default. Payloads are `bytes` of JSON text, passed on unparsed, byte for byte as the publisher sent them.
The types from `ConnectRequest` on belong to the application's API; their `data` and `info` are plain Python values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

from msgspec import Struct, field


class ClientInfo(Struct, frozen=True, array_like=True, gc=False):
    """A client as others see it: in presence, joins, leaves and on its publications.

    user: the application's user id, "" for an anonymous connection. client: the id of this connection.
    conn_info, chan_info: JSON text of the connection's and the subscription's credentials, or b"" for none. A zero byte
    in front marks other bytes, which only Protobuf clients receive.
    """

    user: str
    client: str
    conn_info: bytes = b""
    chan_info: bytes = b""


class Position(Struct, frozen=True, array_like=True, gc=False):
    """A place in a channel's history. offset: the number of the last publication, 0 before the first.

    epoch: identifies one numbering. It changes when the numbering restarts, so offsets of different epochs cannot be
    compared. A publication without history has the position (0, "").
    """

    offset: int = 0
    epoch: str = ""


class Publication(Struct, frozen=True, array_like=True, gc=False):
    """One published message. offset: its number in the channel's history, 0 without history.

    info: the client that published it, None for the server. delta: subscribers that negotiated deltas may receive it as
    one. binary: the data is not JSON text.
    """

    data: bytes
    offset: int = 0
    info: ClientInfo | None = None
    tags: dict[str, str] | None = None
    delta: bool = False
    binary: bool = False


class HistoryPage(Struct, frozen=True, array_like=True):
    """The publications that a history query returned. position: the top of the stream at that moment."""

    publications: list[Publication]
    position: Position


class HistoryOptions(Struct, frozen=True, array_like=True, gc=False):
    """The limits of a channel's history.

    size: number of publications. ttl: seconds after the latest publication until all are dropped. meta_ttl: seconds
    after the last access until offset and epoch are dropped too. A channel has history if size and ttl are positive.
    """

    size: int = 0
    ttl: float = 0.0
    meta_ttl: float = 2_592_000.0

    @property
    def enabled(self) -> bool:
        """Whether the channel numbers and stores publications."""
        return self.size > 0 and self.ttl > 0


class SubscribeOptions(Struct, frozen=True, array_like=True):
    """The options of one subscription, in addition to its channel's.

    info: shown to others in the channel. data: returned to the client in the subscribe reply. Both are JSON text, other
    bytes behind `json_text.BINARY`, or b"" for none. expire_at: Unix seconds, 0.0 for never. override: values by option
    name that replace the channel's; `tokens.OVERRIDABLE` names the options.
    """

    info: bytes = b""
    data: bytes = b""
    expire_at: float = 0.0
    override: dict[str, bool] = {}


class EngineStats(Struct, frozen=True, array_like=True, gc=False):
    """The numbers of clients, distinct users, channels with a subscriber, and subscriptions, over all workers."""

    clients: int = 0
    users: int = 0
    channels: int = 0
    subscriptions: int = 0


class NodeInfo(Struct, frozen=True, array_like=True, gc=False):
    """A node: one server with its workers. uid: unique. uptime: seconds since the node started.

    stats: over its workers. workers: their number.
    """

    uid: str = ""
    name: str = ""
    version: str = ""
    uptime: float = 0.0
    stats: EngineStats = EngineStats()
    workers: int = 0


class WorkerInfo(Struct, frozen=True):
    """A worker, as `App.worker`. slot: its number, from 0 on; a reload has two processes of one slot for a while.

    count: of the slots of its server. node: the uid of its server, which is new at each start; see `App.info`.
    """

    slot: int = 0
    count: int = 1
    node: str = ""


class ChannelCounts(dict[str, int]):
    """Numbers of subscribers by channel. silent_workers: workers that did not answer, so that their channels lack."""

    def __init__(self, counts: Mapping[str, int], silent_workers: int = 0) -> None:
        super().__init__(counts)
        self.silent_workers = silent_workers


class ConnectRequest(Struct, frozen=True, kw_only=True):
    """A client's request to connect, for `App.on_connecting`. All of it is the client's unverified statement.

    token: the connection token, "" for none. data: the decoded data of the connect command, None if absent. headers:
    of the opening request, with names in lower case. query: of the opening request's URL. remote_address: the client's
    IP address. name, version: of the SDK or application.
    """

    token: str = ""
    data: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    query: dict[str, str] = field(default_factory=dict)
    remote_address: str = ""
    name: str = ""
    version: str = ""

    def __repr__(self) -> str:  # keeps tokens and cookies out of logs
        return f"<ConnectRequest of {self.name!r} from {self.remote_address!r}>"


class Grant(Struct, frozen=True):
    """Permission to subscribe, with options: a result of `App.on_subscribe`.

    data: sent to the client in the subscribe reply. info: shown to other clients in this channel. expire_at: Unix
    seconds at which the subscription expires; None for never. override: replaces the channel's own options "presence",
    "join_leave", "force_push_join_leave", "force_recovery", "force_positioning".
    """

    data: Any = None
    info: Any = None
    expire_at: int | None = None
    override: dict[str, bool] = {}


class Credentials(Struct, frozen=True):
    """The identity of an accepted connection: a result of `App.on_connecting`.

    user: the application's user id, "" for an anonymous connection. info: shown to other clients in presence, joins and
    publications. data: sent to the client in the connect reply. expire_at: Unix seconds at which the connection
    expires; None for never. channels, subs: the channels to subscribe the client to at once, without and with options.
    meta: for handlers alone, as `Client.meta`.
    """

    user: str = ""
    info: Any = None
    data: Any = None
    expire_at: int | None = None
    channels: tuple[str, ...] | list[str] = ()
    subs: dict[str, Grant] = {}
    meta: Any = None


class PublishOptions(TypedDict, total=False):
    """The options of `App.publish` and `App.broadcast`. Each has a default: off, empty or 0.

    tags: labels of the publication, for subscribers with a tags filter. skip_history: neither number nor store it.
    idempotency_key: a repeat within 300 s publishes nothing and returns the first position. delta: send subscribers
    that negotiated deltas the difference from the previous publication. version: the version of the published state;
    if the channel has seen this version or a later one, nothing is published and the position is the newest one; needs
    history. version_epoch: a new epoch starts the versions anew. binary: `data` is bytes and is sent unchanged; unless
    it is JSON text, only Protobuf clients can receive it.
    """

    tags: dict[str, str] | None
    skip_history: bool
    idempotency_key: str
    delta: bool
    version: int
    version_epoch: str
    binary: bool
