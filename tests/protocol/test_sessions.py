"""The sessions of a worker: orders for many of them are divided over turns of the loop, and keep their sequence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from realtime.protocol.orders import (
    ChannelsOrder,
    DisconnectOrder,
    EmulateOrder,
    RefreshOrder,
    SubscribeOrder,
    UnsubscribeOrder,
    encode_order,
)
from realtime.protocol.sessions import SESSIONS_AT_ONCE, Sessions
from realtime.pubsub.time_slices import TimeSlicer
from realtime.types import Position, SubscribeOptions

MANY = 5 * SESSIONS_AT_ONCE


class RecordedSession:
    """Records the calls to it."""

    def __init__(self, worker: Worker, client: str, user: str) -> None:
        self.worker, self.client, self.user, self.secret = worker, client, user, f"secret of {client}"
        self.done: list[Any] = []
        worker.sessions.add(self)

    def _record(self, *call: Any) -> None:
        self.done.append(call)
        self.worker.now += 0.001

    def drain(self) -> None: ...

    def disconnect(self, code: int, reason: str) -> None:
        self._record("disconnect", code)
        self.worker.sessions.remove(self)

    def subscribe(self, channel: str, options: SubscribeOptions, since: Position | None) -> None:
        self._record("subscribe", channel)

    def unsubscribe(self, channel: str, code: int, reason: str) -> None:
        self._record("unsubscribe", channel)

    def refresh(self, expire_at: float, info: bytes) -> None:
        self._record("refresh", expire_at)


class Worker:
    def __init__(self) -> None:
        self.now = 0.0
        self.turns: list[Callable[[], None]] = []
        self.sessions = Sessions(TimeSlicer(lambda: self.now, 0.005, self.turns.append))

    def add(self, count: int = MANY, user: str = "") -> list[RecordedSession]:
        return [RecordedSession(self, f"{user}{number}", user) for number in range(count)]

    def order(self, order: Any) -> None:
        self.sessions.apply(encode_order(order))

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


def test_an_order_for_many_sessions_takes_several_turns(worker: Worker) -> None:
    worker.add()
    worker.order(DisconnectOrder(""))
    worker.turn()
    assert MANY / 2 < len(worker.sessions) < MANY
    worker.finish()
    assert len(worker.sessions) == 0


def test_orders_are_carried_out_in_order_of_arrival(worker: Worker) -> None:
    many, (ann,) = worker.add(), worker.add(1, "ann")
    worker.order(SubscribeOrder("", "news"))
    worker.order(UnsubscribeOrder("", "news", client=many[-1].client))
    worker.order(RefreshOrder("ann", 5.0))
    assert ann.done == []
    worker.order(RefreshOrder("", expired=True))
    worker.finish()
    to_all = [("subscribe", "news"), ("disconnect", 3005)]
    assert all(session.done == to_all for session in many[:-1])
    assert many[-1].done == [to_all[0], ("unsubscribe", "news"), to_all[1]]
    assert ann.done == [("refresh", 5.0)]


def test_an_order_does_not_concern_later_sessions(worker: Worker) -> None:
    worker.add()
    worker.order(DisconnectOrder(""))
    late = RecordedSession(worker, "late", "")
    worker.finish()
    assert late.done == [] and len(worker.sessions) == 1


def test_an_order_for_few_sessions_is_carried_out_at_once(worker: Worker) -> None:
    many, (ann,) = worker.add(), worker.add(1, "ann")
    worker.order(DisconnectOrder("ann"))
    worker.order(DisconnectOrder("", client=many[7].client))
    worker.order(DisconnectOrder("", session=many[8].secret))
    worker.order(DisconnectOrder("", client=ann.client))
    assert [len(session.done) for session in (ann, *many[6:10])] == [1, 0, 1, 1, 0]
    assert not worker.turns


def test_a_superseding_order_spares_connections_that_began_later(worker: Worker) -> None:
    old, new, newer = worker.add(3, "ann")
    first, second = worker.sessions.supersede(new), worker.sessions.supersede(newer)
    worker.sessions.apply(first)
    assert [session.done for session in (old, new, newer)] == [[("disconnect", 3504)], [], []]
    worker.sessions.apply(second)
    assert [session.done for session in (new, newer)] == [[("disconnect", 3504)], []]


def test_orders_that_concern_no_session_go_to_their_handlers(worker: Worker) -> None:
    passed: list[Any] = []
    worker.order(EmulateOrder("a secret", b"{}"))  # without a handler, it is ignored
    worker.sessions.add_handler(EmulateOrder, passed.append)
    for order in (EmulateOrder("a secret", b"{}"), ChannelsOrder(1, "0", "*")):
        worker.order(order)
    assert passed == [EmulateOrder("a secret", b"{}")]


def test_sessions_may_be_removed_while_they_are_visited(worker: Worker) -> None:
    worker.add(3)
    for session in worker.sessions:
        session.disconnect(3000, "")
    assert len(worker.sessions) == 0 and list(worker.sessions) == []


def test_few_sessions_with_many_subscriptions_are_divided_too(worker: Worker) -> None:
    worker.add(SESSIONS_AT_ONCE)
    worker.order(DisconnectOrder(""))
    assert SESSIONS_AT_ONCE / 2 < len(worker.sessions) < SESSIONS_AT_ONCE
    worker.finish()
    assert len(worker.sessions) == 0
