"""The sessions of one worker, by client and by user, and the orders that reach them from other workers.

An order is a decision of the server API about a user's connections. Which worker holds them nobody needs to know:
the engine passes every order to every worker (`Engine.instruct`), and each applies it to its own sessions.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Protocol

import msgspec
from msgspec import Struct

from realtime.errors import CONNECTION_EXPIRED, CONNECTION_LIMIT, FORCE_DISCONNECT, SERVER_UNSUBSCRIBE
from realtime.pubsub.slices import HIGH, Slices
from realtime.records import Position, Terms

# Sessions that are acted on before others may have a turn: to end one takes some hundredths of a millisecond.
SESSIONS_AT_ONCE = 32


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
    terms: Terms = Terms()
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


_Addressed = DisconnectOrder | UnsubscribeOrder | SubscribeOrder | RefreshOrder
Order = _Addressed | SupersedeOrder | ChannelsOrder | ChannelsAnswer | EmulateOrder

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Order)


def encode_order(order: Order) -> bytes:
    """The bytes that `Registry.obey` takes, at every worker.

    Raises msgspec.ValidationError when a field holds something of another type, which would fail at all of them.
    """
    data = _encoder.encode(order)
    _decoder.decode(data)
    return data


class Registered(Protocol):
    """A connected session, as the registry sees it."""

    @property
    def client(self) -> str: ...

    @property
    def user(self) -> str: ...

    @property
    def secret(self) -> str: ...

    def disconnect(self, code: int, reason: str) -> None: ...

    def subscribe(self, channel: str, terms: Terms, since: Position | None) -> None: ...

    def end_subscription(self, channel: str, code: int, reason: str) -> None: ...

    def refresh(self, expire_at: float, info: bytes) -> None: ...


class Registry:
    """Which sessions are connected here.

    surveyed: takes the orders of a survey of channels. emulated: takes the commands that came to another worker.
    """

    def __init__(self, slices: Slices | None = None) -> None:
        """slices: for orders that concern many sessions; None to carry out all at once."""
        self._slices = slices
        # What is left to do of such orders, and the orders behind them.
        self._waiting: deque[tuple[list[Registered], Callable[[Registered], None]]] = deque()
        self.surveyed: Callable[[ChannelsOrder | ChannelsAnswer], None] = _leave
        self.emulated: Callable[[EmulateOrder], None] = _leave
        self._by_client: dict[str, Registered] = {}
        self._by_user: dict[str, dict[str, Registered]] = {}
        # Those whose own SupersedeOrder has not come back yet: whatever such order comes before it is an older one's.
        self._superseding: set[str] = set()

    def __len__(self) -> int:
        return len(self._by_client)

    def __iter__(self) -> Iterator[Registered]:
        """The sessions now connected; the registry may change while they are visited."""
        return iter(list(self._by_client.values()))

    def add(self, session: Registered) -> None:
        self._by_client[session.client] = session
        self._by_user.setdefault(session.user, {})[session.client] = session

    def remove(self, session: Registered) -> None:
        """Forget the session; harmless when it was never added."""
        if self._by_client.pop(session.client, None) is None:
            return
        self._superseding.discard(session.client)
        of_user = self._by_user[session.user]
        del of_user[session.client]
        if not of_user:
            del self._by_user[session.user]

    def supersede(self, session: Registered) -> bytes:
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
        match _decoder.decode(order):
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

    def _addressed(self, order: _Addressed) -> list[Registered]:
        of_user = self._by_user.get(order.user, {})
        if order.client:
            # There may be very many of one user, namely of the anonymous one.
            sessions = [of_user[order.client]] if order.client in of_user else []
        else:
            sessions = list(of_user.values())
        return [session for session in sessions if order.session in ("", session.secret)]

    def _act(self, sessions: list[Registered], act: Callable[[Registered], None]) -> None:
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


def _action(order: _Addressed) -> Callable[[Registered], None]:
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
