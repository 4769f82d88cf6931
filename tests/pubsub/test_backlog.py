"""The backlog of a channel: its order, its counts, and the events that may be dropped."""

from __future__ import annotations

from typing import Any

from realtime.pubsub.backlog import Activation, Backlog, DeltaBase, Event, EventKind
from realtime.types import ClientInfo, Publication

SUBSCRIBER: Any = object()
JOIN = Event(EventKind.JOINED, info=ClientInfo("42", "client"))
LEAVE = Event(EventKind.LEFT, info=ClientInfo("42", "client"))
ACTIVATION = Activation(SUBSCRIBER, [JOIN], None)


def published(data: bytes, offset: int = 0, epoch: str = "") -> Event:
    return Event(EventKind.PUBLISHED, Publication(data, offset), epoch)


def test_jobs_leave_in_order_and_events_and_bytes_are_counted() -> None:
    backlog = Backlog()
    jobs = [published(b"12"), ACTIVATION, JOIN, published(b"345")]
    for job in jobs:
        backlog.append(job)
    assert (backlog.events, backlog.size) == (3, 5)
    assert [backlog.popleft() for _ in range(2)] == jobs[:2]
    assert (backlog.events, backlog.size) == (2, 3)
    assert [backlog.popleft() for _ in range(2)] == jobs[2:]
    assert (backlog.events, backlog.size, len(backlog.jobs)) == (0, 0, 0)


def test_an_activated_subscriber_is_late_until_it_is_discarded() -> None:
    backlog = Backlog()
    backlog.append(ACTIVATION)
    assert backlog.popleft() is ACTIVATION
    assert backlog.late == {SUBSCRIBER}


def test_a_subscriber_that_was_behind_is_not_late() -> None:
    backlog = Backlog()
    backlog.append(ACTIVATION._replace(is_late=False))
    assert backlog.late == set()


def test_dropping_removes_the_named_kinds_and_keeps_activations() -> None:
    backlog = Backlog()
    for job in (JOIN, published(b"12"), ACTIVATION, LEAVE):
        backlog.append(job)
    backlog.drop(EventKind.JOINED, EventKind.LEFT)
    assert (list(backlog.jobs), backlog.events, backlog.size) == ([published(b"12"), ACTIVATION], 1, 2)
    backlog.drop(*EventKind)
    assert (list(backlog.jobs), backlog.events, backlog.size) == ([ACTIVATION], 0, 0)


def test_a_delta_from_one_base_is_one_from_another_with_the_same_data() -> None:
    """A publication of this worker and its copy that has come with a client from another one."""
    base = DeltaBase(Publication(b"1", 7), "e")
    copies = (base, DeltaBase(Publication(b"1"), ""))
    assert all(base.is_same(copy) for copy in copies)
    assert not base.is_same(DeltaBase(Publication(b"2", 7), "e"))
