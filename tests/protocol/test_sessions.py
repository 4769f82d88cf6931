"""Orders that concern very many sessions: in turns with other work, and in their sequence all the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from realtime.protocol.orders import DisconnectOrder, RefreshOrder, SubscribeOrder, UnsubscribeOrder, encode_order
from realtime.protocol.sessions import SESSIONS_AT_ONCE, Sessions
from realtime.pubsub.time_slices import TimeSlicer
from realtime.types import Position, SubscribeOptions

MANY = 5 * SESSIONS_AT_ONCE


class Session:
    """What was done to it."""

    def __init__(self, worker: Worker, client: str, user: str) -> None:
        self.worker, self.client, self.user, self.secret = worker, client, user, f"secret of {client}"
        self.done: list[Any] = []
        worker.registry.add(self)

    def _note(self, *what: Any) -> None:
        self.done.append(what)
        self.worker.now += 0.001

    def disconnect(self, code: int, reason: str) -> None:
        self._note("disconnect", code)
        self.worker.registry.remove(self)

    def subscribe(self, channel: str, terms: SubscribeOptions, since: Position | None) -> None:
        self._note("subscribe", channel)

    def end_subscription(self, channel: str, code: int, reason: str) -> None:
        self._note("unsubscribe", channel)

    def refresh(self, expire_at: float, info: bytes) -> None:
        self._note("refresh", expire_at)


class Worker:
    def __init__(self) -> None:
        self.now = 0.0
        self.turns: list[Callable[[], None]] = []
        self.registry = Sessions(TimeSlicer(lambda: self.now, 0.005, self.turns.append))

    def sessions(self, number: int = MANY, user: str = "") -> list[Session]:
        return [Session(self, f"{user}{count}", user) for count in range(number)]

    def order(self, order: Any) -> None:
        self.registry.apply(encode_order(order))

    def turn(self) -> None:
        """One turn of the loop."""
        turns, self.turns[:] = list(self.turns), []
        for run in turns:
            run()

    def finish(self) -> None:
        while self.turns:
            self.turn()


@pytest.fixture
def worker() -> Worker:
    return Worker()


def test_many_sessions_are_not_ended_in_one_turn(worker: Worker) -> None:
    worker.sessions()
    worker.order(DisconnectOrder(""))
    worker.turn()
    assert MANY / 2 < len(worker.registry) < MANY
    worker.finish()
    assert len(worker.registry) == 0


def test_orders_are_carried_out_in_their_sequence(worker: Worker) -> None:
    many, (ann,) = worker.sessions(), worker.sessions(1, "ann")
    worker.order(SubscribeOrder("", "news"))
    worker.order(UnsubscribeOrder("", "news", client=many[-1].client))
    worker.order(RefreshOrder("ann", 5.0))
    assert ann.done == []
    worker.order(RefreshOrder("", expired=True))
    worker.finish()
    every = [("subscribe", "news"), ("disconnect", 3005)]
    assert all(session.done == every for session in many[:-1])
    assert many[-1].done == [every[0], ("unsubscribe", "news"), every[1]]
    assert ann.done == [("refresh", 5.0)]


def test_who_comes_later_is_not_meant(worker: Worker) -> None:
    worker.sessions()
    worker.order(DisconnectOrder(""))
    late = Session(worker, "late", "")
    worker.finish()
    assert late.done == [] and len(worker.registry) == 1


def test_what_concerns_few_is_done_at_once(worker: Worker) -> None:
    many, (ann,) = worker.sessions(), worker.sessions(1, "ann")
    worker.order(DisconnectOrder("ann"))
    worker.order(DisconnectOrder("", client=many[7].client))
    worker.order(DisconnectOrder("", session=many[8].secret))
    worker.order(DisconnectOrder("", client=ann.client))
    assert [len(session.done) for session in (ann, *many[6:10])] == [1, 0, 1, 1, 0]
    assert not worker.turns
