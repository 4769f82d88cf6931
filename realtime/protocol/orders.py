"""Orders: decisions about connections that one worker sends to all workers, or to one.

The engine passes an order on without reading it (`engine.SendOrder`). `realtime.protocol.sessions` carries out the
orders about sessions.
"""

from __future__ import annotations

import msgspec
from msgspec import Struct

from realtime.errors import FORCE_DISCONNECT, SERVER_UNSUBSCRIBE
from realtime.types import Position, SubscribeOptions


class _Order(Struct, frozen=True, array_like=True):
    """user: whose connections are meant; "" for those of anonymous clients, and never for everybody's."""

    user: str


class DisconnectOrder(_Order, frozen=True, array_like=True, tag="disconnect"):
    """Close the connections of `user`, but none whose client id is in `whitelist`.

    client, session: only the connection of that client id, or of that session secret (see `Connection.secret`).
    """

    client: str = ""
    whitelist: tuple[str, ...] = ()
    code: int = FORCE_DISCONNECT[0]
    reason: str = FORCE_DISCONNECT[1]
    session: str = ""


class UnsubscribeOrder(_Order, frozen=True, array_like=True, tag="unsubscribe"):
    """End the subscription of `user` to `channel`, whoever began it, and tell the client.

    client, session: as in DisconnectOrder. code, reason: of the unsubscribe push; from 2500 on, SDKs come back.
    """

    channel: str
    client: str = ""
    session: str = ""
    code: int = SERVER_UNSUBSCRIBE[0]
    reason: str = SERVER_UNSUBSCRIBE[1]


class SubscribeOrder(_Order, frozen=True, array_like=True, tag="subscribe"):
    """Subscribe `user` to `channel` from the server's side; a connection that is subscribed already stays as it is.

    The giver has checked that the channel's namespace exists. terms: of the subscription. since: a position known to
    the client, after which it is sent what it missed if that is still kept; None for what comes from now on.
    client, session: as in DisconnectOrder.
    """

    channel: str
    terms: SubscribeOptions = SubscribeOptions()
    client: str = ""
    session: str = ""
    since: Position | None = None


class RefreshOrder(_Order, frozen=True, array_like=True, tag="refresh"):
    """Let the connections of `user` expire at another time, and tell the clients.

    expire_at: Unix seconds, 0.0 for never; a time that has passed, or `expired`, closes them with 3005. info: what
    others see of the client from now on, as JSON text; b"" leaves it. client, session: as in DisconnectOrder.
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
    """Tell the worker at `address` which channels that `pattern` fits have subscribers here; see `protocol.globs`."""

    id: int
    address: str
    pattern: str


class ChannelsAnswer(Struct, frozen=True, array_like=True, tag="channels_answer"):
    """The answer to the ChannelsOrder of this id: subscribers by channel, None when they are too many to tell."""

    id: int
    found: dict[str, int] | None


class EmulateOrder(Struct, frozen=True, array_like=True, tag="emulate"):
    """Hand `data` to the session of this secret, as a message of its client: it came to another worker."""

    secret: str
    data: bytes


AddressedOrder = DisconnectOrder | UnsubscribeOrder | SubscribeOrder | RefreshOrder
Order = AddressedOrder | SupersedeOrder | ChannelsOrder | ChannelsAnswer | EmulateOrder

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Order)


def encode_order(order: Order) -> bytes:
    """The bytes that `Sessions.apply` takes, at every worker.

    Raises msgspec.ValidationError when a field holds something of another type, which would fail at all of them.
    """
    data = _encoder.encode(order)
    _decoder.decode(data)
    return data


def decode_order(data: bytes) -> Order:
    """The order in `data`. Raises msgspec.MsgspecError for bytes that `encode_order` did not make."""
    order: Order = _decoder.decode(data)
    return order
