"""The sessions of one worker, by client and by user, and the orders that other workers send to them.

An order is a decision of the server API about a user's connections. The server API need not know which worker holds
them: the engine passes every order to every worker (`engine.SendOrder`), and each applies it to its own sessions.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, TypeVar

from realtime.errors import CONNECTION_EXPIRED, CONNECTION_LIMIT
from realtime.protocol.orders import (
    AddressedOrder,
    ChannelsAnswer,
    ChannelsOrder,
    DisconnectOrder,
    EmulateOrder,
    InvalidateOrder,
    LandOrder,
    Order,
    RefreshOrder,
    RoleOrder,
    SubscribeOrder,
    SupersedeOrder,
    UnsubscribeOrder,
    decode_order,
    encode_order,
)
from realtime.pubsub.time_slices import HIGH, TimeSlicer
from realtime.types import Position, SubscribeOptions

# Sessions of one order that are handled at once, while the slice of this turn has time. Ending a session takes some
# hundredths of a millisecond, and as long again for each of its subscriptions.
SESSIONS_AT_ONCE = 32

# An order that concerns no session of this worker.
HandledOrder = TypeVar(
    "HandledOrder", ChannelsOrder, ChannelsAnswer, EmulateOrder, InvalidateOrder, LandOrder, RoleOrder
)


class RegisteredSession(Protocol):
    """A connected session, as `Sessions` sees it."""

    @property
    def client(self) -> str: ...

    @property
    def user(self) -> str: ...

    @property
    def secret(self) -> str: ...

    def disconnect(self, code: int, reason: str) -> None: ...

    def drain(self) -> None: ...

    def subscribe(self, channel: str, options: SubscribeOptions, since: Position | None) -> None: ...

    def unsubscribe(self, channel: str, code: int, reason: str) -> None: ...

    def refresh(self, expire_at: float, info: bytes) -> None: ...


class Sessions:
    """The connected sessions of this worker."""

    def __init__(self, slices: TimeSlicer | None = None) -> None:
        """slices: divides orders that concern many sessions; None to carry out each order at once."""
        self._slices = slices
        # The rest of a divided order, and all orders behind it.
        self._pending: deque[tuple[deque[RegisteredSession], Callable[[RegisteredSession], None]]] = deque()
        # Orders since the cut of each batch of sessions that arrive from another worker (`protocol.handover`).
        self._arriving: dict[str, list[AddressedOrder | SupersedeOrder]] = {}
        self._handlers: dict[type[Order], Callable[[Any], None]] = {}
        self._by_client: dict[str, RegisteredSession] = {}
        self._by_user: dict[str, dict[str, RegisteredSession]] = {}
        # By user: sessions whose connect command is under way.
        self._connecting: dict[str, set[RegisteredSession]] = {}
        # Client ids with their own SupersedeOrder on its way: until it arrives, an order of that kind is from an older
        # connection, and must not close them.
        self._superseding: set[str] = set()

    def __len__(self) -> int:
        return len(self._by_client)

    def __iter__(self) -> Iterator[RegisteredSession]:
        """Iterate over a copy: sessions may be added and removed meanwhile."""
        return iter(list(self._by_client.values()))

    def add(self, session: RegisteredSession) -> None:
        self._by_client[session.client] = session
        self._by_user.setdefault(session.user, {})[session.client] = session

    def remove(self, session: RegisteredSession) -> None:
        """Forget the session; harmless when it was never added."""
        if self._by_client.pop(session.client, None) is None:
            return
        self._superseding.discard(session.client)
        of_user = self._by_user[session.user]
        del of_user[session.client]
        if not of_user:
            del self._by_user[session.user]

    def begin_connecting(self, session: RegisteredSession) -> None:
        """Apply orders that take something away to this session, too, until `end_connecting`."""
        self._connecting.setdefault(session.user, set()).add(session)

    def end_connecting(self, session: RegisteredSession) -> None:
        """End `begin_connecting`, when the connect command has ended."""
        of_user = self._connecting[session.user]
        of_user.discard(session)
        if not of_user:
            del self._connecting[session.user]

    def supersede(self, session: RegisteredSession) -> bytes:
        """Return the order that ends the older connections of this session's user; the caller passes it to the engine.

        All workers receive all orders in one sequence, which decides between connections that begin at the same time.
        """
        self._superseding.add(session.client)
        return encode_order(SupersedeOrder(session.user, session.client))

    def add_handler(self, kind: type[HandledOrder], handler: Callable[[HandledOrder], None]) -> None:
        """Pass orders of this kind, which concern no session here, to `handler`; without one they are ignored."""
        self._handlers[kind] = handler

    def apply(self, data: bytes) -> None:
        """Carry out one encoded order on the sessions that are connected now, or whose user is known by now.

        Orders about sessions are carried out in order of arrival. Raises msgspec.MsgspecError for bytes that
        `encode_order` did not make.
        """
        match decode_order(data):
            case (
                ChannelsOrder()
                | ChannelsAnswer()
                | EmulateOrder()
                | InvalidateOrder()
                | LandOrder()
                | RoleOrder() as order
            ):
                handler = self._handlers.get(type(order))
                if handler is not None:
                    handler(order)
            case SupersedeOrder() as newest:
                self._remember(newest)
                self._superseding.discard(newest.client)
                older = [
                    session
                    for session in self._by_user.get(newest.user, {}).values()
                    if session.client != newest.client and session.client not in self._superseding
                ]
                self._for_each(older, lambda session: session.disconnect(*CONNECTION_LIMIT))
            case order:
                self._remember(order)
                self._for_each(self._addressed(order), _action(order))

    def _remember(self, order: AddressedOrder | SupersedeOrder) -> None:
        for orders in self._arriving.values():
            orders.append(order)

    # Sessions that move

    def finish_orders(self, session: RegisteredSession) -> None:
        """Carry out the divided orders that concern this session now."""
        for waiting, action in self._pending:
            if session in waiting:
                waiting.remove(session)
                action(session)

    def begin_arrivals(self, batch: str) -> None:
        """Keep the orders from now on for the sessions of a batch, until `end_arrivals`."""
        self._arriving[batch] = []

    def adopt(self, batch: str, session: RegisteredSession, earlier: Iterable[bytes]) -> None:
        """Add a session that has arrived, and carry out the orders since the cut, after `earlier` ones to it alone."""
        self.add(session)
        for data in earlier:
            self.carry_out(data, session)
        for order in list(self._arriving.get(batch, ())):
            if isinstance(order, SupersedeOrder):
                if order.user == session.user and order.client != session.client:
                    session.disconnect(*CONNECTION_LIMIT)
            elif (
                order.user == session.user
                and order.client in ("", session.client)
                and order.session in ("", session.secret)
            ):
                _action(order)(session)

    def carry_out(self, data: bytes, session: RegisteredSession) -> None:
        """Carry out an encoded order on one session."""
        order = decode_order(data)
        assert isinstance(order, AddressedOrder)
        _action(order)(session)

    def end_arrivals(self, batch: str) -> None:
        """Keep no more orders for a batch. Idempotent."""
        self._arriving.pop(batch, None)

    def _addressed(self, order: AddressedOrder) -> list[RegisteredSession]:
        of_user = self._by_user.get(order.user, {})
        if order.client:
            # A user may have very many connections: all anonymous clients are one user.
            sessions = [of_user[order.client]] if order.client in of_user else []
        else:
            sessions = list(of_user.values())
        if isinstance(order, DisconnectOrder | UnsubscribeOrder) or (isinstance(order, RefreshOrder) and order.expired):
            connecting = self._connecting.get(order.user, ())
            sessions += [one for one in connecting if order.client in ("", one.client)]
        return [session for session in sessions if order.session in ("", session.secret)]

    def _for_each(self, sessions: list[RegisteredSession], action: Callable[[RegisteredSession], None]) -> None:
        slices = self._slices
        if not self._pending and (slices is None or len(sessions) <= SESSIONS_AT_ONCE):
            for count, session in enumerate(sessions, 1):
                action(session)
                if slices is not None and count < len(sessions):
                    slices.start_slice()
                    if not slices.has_time:
                        sessions = sessions[count:]
                        break
            else:
                return
        assert slices is not None
        self._pending.append((deque(sessions), action))
        if len(self._pending) == 1:
            slices.add(self._apply_pending(), HIGH)

    def _apply_pending(self) -> Iterator[None]:
        while self._pending:
            sessions, action = self._pending[0]
            while sessions:
                action(sessions.popleft())
                yield
            self._pending.popleft()


def _action(order: AddressedOrder) -> Callable[[RegisteredSession], None]:
    """Return the function that carries out the order on one session."""
    match order:
        case DisconnectOrder(code=code, reason=reason, whitelist=whitelist):
            return lambda session: None if session.client in whitelist else session.disconnect(code, reason)
        case UnsubscribeOrder(channel=channel, code=code, reason=reason):
            return lambda session: session.unsubscribe(channel, code, reason)
        case SubscribeOrder(channel=channel, options=options, since=since):
            return lambda session: session.subscribe(channel, options, since)
        case RefreshOrder(expired=True):
            return lambda session: session.disconnect(*CONNECTION_EXPIRED)
        case RefreshOrder(expire_at=expire_at, info=info):
            return lambda session: session.refresh(expire_at, info)
