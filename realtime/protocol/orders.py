"""Orders: messages about connections that one worker sends to all workers, or to one.

To the engine an order is opaque bytes (`engine.SendOrder`). `realtime.protocol.sessions` carries out the orders about
sessions, and passes the others on.
"""

from __future__ import annotations

import msgspec
from msgspec import Struct

from realtime.errors import FORCE_DISCONNECT, SERVER_UNSUBSCRIBE
from realtime.types import Position, SubscribeOptions


class _Order(Struct, frozen=True, array_like=True):
    """user: the owner of the connections; "" for anonymous clients, not for all users."""

    user: str


class DisconnectOrder(_Order, frozen=True, array_like=True, tag="disconnect"):
    """Close the connections of `user`, except for the client ids in `whitelist`.

    client, session: only the connection with this client id, or this session secret (see `Connection.secret`).
    """

    client: str = ""
    whitelist: tuple[str, ...] = ()
    code: int = FORCE_DISCONNECT[0]
    reason: str = FORCE_DISCONNECT[1]
    session: str = ""


class UnsubscribeOrder(_Order, frozen=True, array_like=True, tag="unsubscribe"):
    """End the subscriptions of `user` to `channel`, of every origin, and notify the clients.

    client, session: as in DisconnectOrder. code, reason: of the unsubscribe push; from code 2500 on, SDKs subscribe
    again.
    """

    channel: str
    client: str = ""
    session: str = ""
    code: int = SERVER_UNSUBSCRIBE[0]
    reason: str = SERVER_UNSUBSCRIBE[1]


class SubscribeOrder(_Order, frozen=True, array_like=True, tag="subscribe"):
    """Subscribe the connections of `user` to `channel`; subscribed connections get these options.

    The sender has checked that the channel's namespace exists. since: a position known to the client, which receives
    the publications after it as far as history still has them; None for future publications only. client, session: as
    in DisconnectOrder.
    """

    channel: str
    options: SubscribeOptions = SubscribeOptions()
    client: str = ""
    session: str = ""
    since: Position | None = None


class RefreshOrder(_Order, frozen=True, array_like=True, tag="refresh"):
    """Change the expiry of the connections of `user`, and notify the clients.

    expire_at: Unix seconds, 0.0 for never; a time in the past, or `expired`, closes them with 3005. info: the new
    `conn_info` of the clients, as JSON text; b"" leaves it. client, session: as in DisconnectOrder.
    """

    expire_at: float = 0.0
    expired: bool = False
    info: bytes = b""
    client: str = ""
    session: str = ""


class SupersedeOrder(_Order, frozen=True, array_like=True, tag="supersede"):
    """Close the connections of `user` that are older than `client`, with 3504."""

    client: str


class ChannelsOrder(Struct, frozen=True, array_like=True, tag="channels"):
    """Ask each worker for its channels with subscribers that match `pattern` (see `channel_patterns`).

    address: of the asking worker, which receives the ChannelsAnswers.
    """

    id: int
    address: str
    pattern: str


class ChannelsAnswer(Struct, frozen=True, array_like=True, tag="channels_answer"):
    """A part of the answer to the ChannelsOrder of this id: numbers of subscribers by channel.

    found: None for too many channels. has_more: further parts follow from the same worker.
    """

    id: int
    found: dict[str, int] | None
    has_more: bool = False


class EmulateOrder(Struct, frozen=True, array_like=True, tag="emulate"):
    """Pass `data` to the session of this secret, as a message of its client that a worker received.

    number: of the order, counted up by the worker with the session if that worker received the message itself, else 0.
    worker: the address of that worker: the session may have moved to another one meanwhile.
    """

    secret: str
    data: bytes
    number: int = 0
    worker: str = ""


class InvalidateOrder(Struct, frozen=True, array_like=True, tag="invalidate"):
    """Carry out an invalidation of caches, see `realtime.cache.Invalidation`. address: of the sender, which has."""

    address: str
    cache: str
    keys: list[bytes] | None
    tags: list[str] | None


class RoleOrder(Struct, frozen=True, array_like=True, tag="role"):
    """Ask for the role of this name, if you want it: its holder has resigned. See `engine.ResignRole`."""

    name: str


class LandOrder(Struct, frozen=True, array_like=True, tag="land"):
    """The end of a lease, for the workers that wait for its value. The fields are those of `realtime.cache.Landing`."""

    flight: str
    value: bytes | None = None
    made: float = 0.0
    is_void: bool = False


AddressedOrder = DisconnectOrder | UnsubscribeOrder | SubscribeOrder | RefreshOrder
Order = (
    AddressedOrder
    | SupersedeOrder
    | ChannelsOrder
    | ChannelsAnswer
    | EmulateOrder
    | InvalidateOrder
    | LandOrder
    | RoleOrder
)

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Order)


def encode_order(order: Order) -> bytes:
    """Encode an order for `Sessions.apply`.

    Raises msgspec.ValidationError for a field of a wrong type, with which every worker would fail.
    """
    data = _encoder.encode(order)
    _decoder.decode(data)
    return data


def decode_order(data: bytes) -> Order:
    """Decode an order. Raises msgspec.MsgspecError for bytes that `encode_order` did not make."""
    order: Order = _decoder.decode(data)
    return order
