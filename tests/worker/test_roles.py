"""A role, asked for by workers in this process on one clock, with the roles of a real core."""

from __future__ import annotations

from typing import Any

import pytest
from twisted.internet.task import Clock

from realtime.config.settings import EngineSettings
from realtime.errors import EngineUnavailable
from realtime.handlers.coroutines import drive
from realtime.protocol.orders import decode_order
from realtime.pubsub.engine import HoldRole
from realtime.worker.roles import Role
from tests.pubsub.benches import Log
from tests.pubsub.memory_engine import MemoryEngine

LEASE = 6.0


class Worker(Log):
    """A worker that asks for the role. is_away: its engine does not answer."""

    def __init__(self, clock: Clock, address: str, core: Any = None) -> None:
        super().__init__()
        self.clock = clock
        self.engine = MemoryEngine(self, EngineSettings(), clock.seconds, address, core)
        self.engine.overrides[HoldRole] = self.hold
        self.is_away = False
        self.events: list[str] = []
        self.role = Role(
            "tasks",
            f"node/{address}",
            LEASE,
            self.engine,
            clock,
            lambda: self.events.append(f"gained {self.role.term} at {clock.seconds():g}"),
            lambda: self.events.append(f"lost at {clock.seconds():g}"),
        )

    async def hold(self, request: HoldRole) -> Any:
        if self.is_away:
            raise EngineUnavailable("away")
        return self.engine.execute(request)

    def on_order(self, order: bytes) -> None:
        self.role.on_order(decode_order(order))  # type: ignore[arg-type]

    def resign(self) -> None:
        drive(self.role.resign(), lambda result, error: None)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def workers(clock: Clock) -> list[Worker]:
    first = Worker(clock, "0-2")
    made = [first, Worker(clock, "1-3", first.engine.core)]
    for worker in made:
        worker.role.start()
    return made


def pass_time(clock: Clock, workers: list[Worker], seconds: float) -> None:
    """Let time pass in steps; two workers never hold the role together."""
    for _ in range(int(seconds * 4)):
        clock.advance(0.25)
        assert sum(worker.role.is_held for worker in workers) <= 1


def test_the_holder_renews_its_term(clock: Clock, workers: list[Worker]) -> None:
    pass_time(clock, workers, 60)
    assert [worker.events for worker in workers] == [["gained 1 at 0"], []]


def test_another_worker_takes_over_when_the_holder_resigns(clock: Clock, workers: list[Worker]) -> None:
    first, second = workers
    pass_time(clock, workers, 1)
    first.resign()
    assert first.events == ["gained 1 at 0", "lost at 1"]
    assert second.events == ["gained 2 at 1"]
    pass_time(clock, workers, 20)
    assert (first.role.is_held, second.role.is_held) == (False, True)


def test_a_holder_without_its_engine_stops_before_another_worker_begins(clock: Clock, workers: list[Worker]) -> None:
    first, second = workers
    pass_time(clock, workers, 1)
    first.is_away = True
    pass_time(clock, workers, 2 * LEASE)
    assert first.events == ["gained 1 at 0", "lost at 6"]
    (gained,) = second.events
    assert gained.startswith("gained 2 at 6")
    first.is_away = False
    pass_time(clock, workers, 2 * LEASE)
    assert len(first.events) == 2


def test_a_blocked_holder_knows_that_its_time_has_ended(clock: Clock, workers: list[Worker]) -> None:
    first, _ = workers
    clock.rightNow += 2 * LEASE  # no timer runs
    assert first.role.term == 1
    assert not first.role.is_held


def test_an_answer_that_comes_too_late_begins_no_term(clock: Clock) -> None:
    worker = Worker(clock, "0-2")

    async def late(request: HoldRole) -> Any:
        term = worker.engine.execute(request)
        clock.rightNow += LEASE
        return term

    worker.engine.overrides[HoldRole] = late
    worker.role.start()
    assert worker.events == []
