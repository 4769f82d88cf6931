"""Moves of clients from a hot worker: one at a time, counted and logged."""

from __future__ import annotations

from typing import Any

import pytest
from twisted.internet.defer import Deferred
from twisted.logger import capturedLogs, formatEvent

from realtime.config.settings import LoopSettings
from realtime.metrics import Metrics
from realtime.supervision.health import Condition, Health
from realtime.supervisor import rebalancer
from realtime.supervisor.handover import HandOverResult
from realtime.supervisor.rebalancer import Rebalancer


class Scene:
    """A hot worker 0 and an idle worker 1, named processes, and hand-overs that the test ends."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        self.may_move = True
        self.metrics = Metrics()
        self.begun: list[tuple[Any, Any, int]] = []
        self.ended: list[Deferred[HandOverResult]] = []
        monkeypatch.setattr(rebalancer, "hand_over", self.hand_over)
        health = {
            0: Health(0, Condition.HEALTHY, 0.0, utilization=0.9, connections=100),
            1: Health(1, Condition.HEALTHY, 0.0, utilization=0.1, connections=100),
        }
        processes: Any = {0: "first", 1: "second"}
        self.rebalancer = Rebalancer(
            health, processes, LoopSettings(), self.metrics, lambda: self.now, lambda: self.may_move
        )

    def hand_over(self, source: Any, target: Any, connections: int, timeout: float) -> Deferred[HandOverResult]:
        self.begun.append((source, target, connections))
        self.ended.append(Deferred())
        return self.ended[-1]

    def wait(self, seconds: int) -> None:
        for _ in range(seconds):
            self.now += 1.0
            self.rebalancer.check()


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch) -> Scene:
    return Scene(monkeypatch)


def test_a_move_is_counted_and_logged_and_the_next_one_waits_for_its_end(scene: Scene) -> None:
    scene.wait(200)
    assert scene.begun == [("first", "second", 22)]
    with capturedLogs() as events:
        scene.ended[0].callback(HandOverResult(moved=21, left=1))
    assert [formatEvent(event) for event in events] == [
        "worker 0 has been busier than worker 1 for 30 s (90% of the time against 10%); clients that have moved: 21"
        " (loop.rebalance)"
    ]
    (sample,) = [one for one in scene.metrics.snapshot() if one.name == "realtime_rebalanced_connections"]
    assert (sample.value, dict(sample.labels)) == (21, {"worker": "0"})
    scene.wait(60)
    assert len(scene.begun) == 2


def test_nothing_moves_while_workers_are_being_replaced(scene: Scene) -> None:
    scene.may_move = False
    scene.wait(200)
    assert scene.begun == []


def test_it_can_be_switched_off_and_on(scene: Scene) -> None:
    scene.rebalancer.configure(LoopSettings(rebalance=False))
    scene.wait(200)
    assert scene.begun == []
    scene.rebalancer.configure(LoopSettings(rebalance_delay=5.0))
    scene.wait(7)
    assert len(scene.begun) == 1
