"""The sessions of one worker, by client and by user, and the orders that reach them from other workers.

An order is a decision of the server API about a user's connections. Which worker holds them nobody needs to know:
the engine passes every order to every worker (`Engine.instruct`), and each applies it to its own sessions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import msgspec
from msgspec import Struct

from realtime.errors import FORCE_DISCONNECT, SERVER_UNSUBSCRIBE


class DisconnectOrder(Struct, frozen=True, array_like=True, tag="disconnect"):
    """Close the connections of `user`: all, or the one named `client`, but none that `whitelist` names."""

    user: str
    client: str = ""
    whitelist: tuple[str, ...] = ()
    code: int = FORCE_DISCONNECT[0]
    reason: str = FORCE_DISCONNECT[1]


class UnsubscribeOrder(Struct, frozen=True, array_like=True, tag="unsubscribe"):
    """End the subscription of `user` to `channel`, on all connections or the one named `client`."""

    user: str
    channel: str
    client: str = ""


Order = DisconnectOrder | UnsubscribeOrder

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

    def disconnect(self, code: int, reason: str) -> None: ...

    def end_subscription(self, channel: str, code: int, reason: str) -> None: ...


class Registry:
    """Which sessions are connected here."""

    def __init__(self) -> None:
        self._by_client: dict[str, Registered] = {}
        self._by_user: dict[str, dict[str, Registered]] = {}

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
        of_user = self._by_user[session.user]
        del of_user[session.client]
        if not of_user:
            del self._by_user[session.user]

    def obey(self, order: bytes) -> None:
        """Carry out one order on the sessions of this worker.

        Raises msgspec.MsgspecError on bytes that `encode_order` did not make.
        """
        match _decoder.decode(order):
            case DisconnectOrder() as order_:
                for session in self._addressed(order_.user, order_.client):
                    if session.client not in order_.whitelist:
                        session.disconnect(order_.code, order_.reason)
            case UnsubscribeOrder() as order_:
                for session in self._addressed(order_.user, order_.client):
                    session.end_subscription(order_.channel, *SERVER_UNSUBSCRIBE)

    def _addressed(self, user: str, client: str) -> list[Registered]:
        sessions = self._by_user.get(user, {})
        if client:
            session = sessions.get(client)
            return [session] if session else []
        return list(sessions.values())
