"""The sessions of one worker, by client and by user, and the orders that reach them from other workers.

An order is a decision of the server API about a user's connections. Which worker holds them nobody needs to know:
the engine passes every order to every worker (`Engine.instruct`), and each applies it to its own sessions.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Protocol

from realtime.errors import CONNECTION_EXPIRED, CONNECTION_LIMIT
from realtime.protocol.orders import (
    AddressedOrder,
    ChannelsAnswer,
    ChannelsOrder,
    DisconnectOrder,
    EmulateOrder,
    RefreshOrder,
    SubscribeOrder,
    SupersedeOrder,
    UnsubscribeOrder,
    decode_order,
    encode_order,
)
from realtime.pubsub.time_slices import HIGH, TimeSlicer
from realtime.types import Position, SubscribeOptions

# Sessions that are acted on before others may have a turn: to end one takes some hundredths of a millisecond.
SESSIONS_AT_ONCE = 32


class RegisteredSession(Protocol):
    """A connected session, as the registry sees it."""

    @property
    def client(self) -> str: ...

    @property
    def user(self) -> str: ...

    @property
    def secret(self) -> str: ...

    def disconnect(self, code: int, reason: str) -> None: ...

    def subscribe(self, channel: str, terms: SubscribeOptions, since: Position | None) -> None: ...

    def end_subscription(self, channel: str, code: int, reason: str) -> None: ...

    def refresh(self, expire_at: float, info: bytes) -> None: ...


class Sessions:
    """Which sessions are connected here.

    surveyed: takes the orders of a survey of channels. emulated: takes the commands that came to another worker.
    """

    def __init__(self, slices: TimeSlicer | None = None) -> None:
        """slices: for orders that concern many sessions; None to carry out all at once."""
        self._slices = slices
        # What is left to do of such orders, and the orders behind them.
        self._waiting: deque[tuple[list[RegisteredSession], Callable[[RegisteredSession], None]]] = deque()
        self.surveyed: Callable[[ChannelsOrder | ChannelsAnswer], None] = _leave
        self.emulated: Callable[[EmulateOrder], None] = _leave
        self._by_client: dict[str, RegisteredSession] = {}
        self._by_user: dict[str, dict[str, RegisteredSession]] = {}
        # Those whose own SupersedeOrder has not come back yet: whatever such order comes before it is an older one's.
        self._superseding: set[str] = set()

    def __len__(self) -> int:
        return len(self._by_client)

    def __iter__(self) -> Iterator[RegisteredSession]:
        """The sessions now connected; the registry may change while they are visited."""
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

    def supersede(self, session: RegisteredSession) -> bytes:
        """The order that ends the older connections of this session's user, which the caller passes on.

        All workers get all orders in one sequence, so of two connections that come at the same time one is the older.
        """
        self._superseding.add(session.client)
        return encode_order(SupersedeOrder(session.user, session.client))

    def obey(self, order: bytes) -> None:
        """Carry out one order on the sessions of this worker.

        Those that are connected now are meant; the orders about sessions are carried out in the order in which they
        came. Raises msgspec.MsgspecError on bytes that `encode_order` did not make.
        """
        match decode_order(order):
            case ChannelsOrder() | ChannelsAnswer() as survey:
                self.surveyed(survey)
            case EmulateOrder() as commands:
                self.emulated(commands)
            case SupersedeOrder() as newest:
                self._superseding.discard(newest.client)
                older = [
                    session
                    for session in self._by_user.get(newest.user, {}).values()
                    if session.client != newest.client and session.client not in self._superseding
                ]
                self._act(older, lambda session: session.disconnect(*CONNECTION_LIMIT))
            case addressed:
                self._act(self._addressed(addressed), _action(addressed))

    def _addressed(self, order: AddressedOrder) -> list[RegisteredSession]:
        of_user = self._by_user.get(order.user, {})
        if order.client:
            # There may be very many of one user, namely of the anonymous one.
            sessions = [of_user[order.client]] if order.client in of_user else []
        else:
            sessions = list(of_user.values())
        return [session for session in sessions if order.session in ("", session.secret)]

    def _act(self, sessions: list[RegisteredSession], act: Callable[[RegisteredSession], None]) -> None:
        if self._slices is None or not (self._waiting or len(sessions) > SESSIONS_AT_ONCE):
            for session in sessions:
                act(session)
            return
        self._waiting.append((sessions, act))
        if len(self._waiting) == 1:
            self._slices.add(self._work_off(), HIGH)

    def _work_off(self) -> Iterator[None]:
        while self._waiting:
            sessions, act = self._waiting[0]
            for number, session in enumerate(sessions, 1):
                act(session)
                if number % SESSIONS_AT_ONCE == 0:
                    yield
            self._waiting.popleft()


def _action(order: AddressedOrder) -> Callable[[RegisteredSession], None]:
    """What an order does to one session."""
    match order:
        case DisconnectOrder(code=code, reason=reason, whitelist=spared):
            return lambda session: None if session.client in spared else session.disconnect(code, reason)
        case UnsubscribeOrder(channel=channel, code=code, reason=reason):
            return lambda session: session.end_subscription(channel, code, reason)
        case SubscribeOrder(channel=channel, terms=terms, since=since):
            return lambda session: session.subscribe(channel, terms, since)
        case RefreshOrder(expired=True):
            return lambda session: session.disconnect(*CONNECTION_EXPIRED)
        case RefreshOrder(expire_at=expire_at, info=info):
            return lambda session: session.refresh(expire_at, info)


def _leave(order: object) -> None:
    """Nobody wants to know."""
