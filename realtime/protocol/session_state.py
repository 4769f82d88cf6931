"""The states of a session.

    OPENED ──connect──▶ CONNECTED ──▶ CLOSED
       └───refused────▶ REFUSED ───────▲

Any state may end in CLOSED. A refused session is closed by its client, or after `session_timers.REFUSED_DELAY`.
"""

from __future__ import annotations

import enum
from collections.abc import Callable

from realtime.protocol.orders import AddressedOrder, encode_order
from realtime.pubsub.hub import Place


class SessionState(enum.Enum):
    OPENED = enum.auto()
    REFUSED = enum.auto()
    CONNECTED = enum.auto()
    CLOSED = enum.auto()


# Module constants for the receive path: looking up a member of an Enum takes six times as long.
OPENED, CONNECTED = ACCEPTING = (SessionState.OPENED, SessionState.CONNECTED)
"""The states in which a session accepts commands."""


class Departure:
    """A session that is about to move to another worker (`realtime.protocol.handover`).

    ready: called when nothing is under way, once until `is_ready` is false again. is_frozen: the subscriptions do not
    change any more. orders: to the session since then, encoded. lost: channels with a gap since then. places: by
    channel, of the subscriptions that the hub has handed out.
    """

    __slots__ = ("is_frozen", "is_ready", "lost", "orders", "places", "ready")

    def __init__(self, ready: Callable[[], None]) -> None:
        self.ready = ready
        self.is_ready = self.is_frozen = False
        self.orders: list[bytes] = []
        self.lost: set[str] = set()
        self.places: dict[str, Place | None] = {}

    def put_off(self, order: AddressedOrder) -> bool:
        """Leave an order to the session's next worker. Returns False if the session is not about to move at once."""
        if self.is_frozen:
            self.orders.append(encode_order(order))
        return self.is_frozen
