"""Steering on a real group of sockets: the kernel follows the weights, and may refuse the program."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Iterator

import pytest
from twisted.logger import LogEvent, globalLogPublisher

from realtime.metrics import Metrics
from realtime.supervision.balance import FULL
from realtime.supervision.health import Condition, Health
from realtime.supervisor import steering as module
from realtime.supervisor.listener import SharedPort
from realtime.supervisor.steering import MIN_UPDATE_INTERVAL, Steering

SLOTS = 3


class Scene:
    """A port with three slots and no workers, and a clock that the test sets."""

    def __init__(self, enabled: bool = True) -> None:
        self.port = SharedPort("127.0.0.1", 0, 4096, SLOTS)
        self.now = 100.0
        self.metrics = Metrics()
        self.health: dict[int, Health] = {}
        self.steering = Steering(self.port, self.health, lambda: self.now, self.metrics, enabled)
        self.clients: list[socket.socket] = []

    def assess(self, slot: int, condition: Condition = Condition.HEALTHY, utilization: float = 0.0) -> None:
        before = self.health.get(slot)
        self.health[slot] = health = Health(slot, condition, 0.0, utilization=utilization)
        if before is None or before.condition is not condition:
            self.steering.condition_changed(slot, health)

    def update(self, after: float = 0.0) -> tuple[int, ...]:
        self.now += after
        self.steering.update()
        return self.steering.weights

    def connect(self, clients: int) -> list[int]:
        """Connect `clients` clients. Returns how many are queued at each slot, in total."""
        for _ in range(clients):
            self.clients.append(socket.create_connection(("127.0.0.1", self.port.port)))
        return [self.steering.accept_queue(slot)[0] for slot in range(SLOTS)]

    def gauges(self, name: str) -> dict[str, float]:
        return {
            dict(sample.labels)["worker"]: sample.value for sample in self.metrics.snapshot() if sample.name == name
        }

    def close(self) -> None:
        for client in self.clients:
            client.close()
        self.port.close()


@pytest.fixture
def scene() -> Iterator[Scene]:
    scene = Scene()
    for slot in range(SLOTS):
        scene.assess(slot)
    yield scene
    scene.close()


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    logged: list[str] = []

    def observe(event: LogEvent) -> None:
        if event["log_namespace"] == module.__name__:
            logged.append(event["log_format"].format(**event))

    globalLogPublisher.addObserver(observe)
    yield logged
    globalLogPublisher.removeObserver(observe)


@pytest.mark.parametrize("only", range(SLOTS))
def test_the_kernels_index_of_a_socket_is_the_number_of_its_slot(scene: Scene, only: int) -> None:
    for slot in {0, 1, 2} - {only}:
        scene.assess(slot, Condition.PRESSED)
    scene.update()
    assert scene.connect(20) == [20 if slot == only else 0 for slot in range(SLOTS)]


def test_new_connections_follow_the_weights(scene: Scene) -> None:
    scene.assess(1, utilization=0.5)
    scene.assess(2, Condition.ABSENT)
    assert scene.steering.weights == (FULL, FULL // 2, 0)
    first, second, third = scene.connect(600)
    assert third == 0
    assert 330 < first < 470  # expected 400, with a standard deviation of 11.5
    assert first + second == 600


def test_without_an_accepting_worker_the_kernel_chooses(scene: Scene) -> None:
    scene.assess(0, Condition.PRESSED)
    scene.update()
    for slot in range(SLOTS):
        scene.assess(slot, Condition.PRESSED)
    assert scene.update() == (0, 0, 0)
    assert all(depth > 0 for depth in scene.connect(90))


def test_a_condition_changes_weights_at_once_and_load_changes_them_seldom(scene: Scene) -> None:
    equal = scene.update()
    scene.assess(0, utilization=0.5)
    assert scene.update(after=MIN_UPDATE_INTERVAL / 2) == equal
    scene.assess(1, Condition.PRESSED)
    assert scene.steering.weights == (FULL // 2, 0, FULL)
    scene.assess(0)
    assert scene.update(after=MIN_UPDATE_INTERVAL / 2) == (FULL // 2, 0, FULL)
    assert scene.update(after=MIN_UPDATE_INTERVAL / 2) == (FULL, 0, FULL)


def test_an_unchanged_program_is_not_replaced(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    replaced: Counter[bytes] = Counter()
    monkeypatch.setattr(module, "_attach", lambda member, code: replaced.update([code]))
    for _ in range(100):
        scene.update(after=MIN_UPDATE_INTERVAL)
    assert replaced.total() == 0


def test_a_refusal_of_the_kernel_is_logged_once_and_keeps_its_hash(
    monkeypatch: pytest.MonkeyPatch, warnings: list[str]
) -> None:
    def refuse(member: socket.socket, code: bytes) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(module, "_attach", refuse)
    scene = Scene()
    try:
        for slot in range(SLOTS):
            scene.assess(slot)
            assert scene.update(after=MIN_UPDATE_INTERVAL) == (0, 0, 0)
        assert warnings == [
            "steering is off, the kernel spreads new connections by its hash: the kernel refuses its program: "
            "Operation not permitted; allow SO_ATTACH_REUSEPORT_CBPF, or set loop.steering = false"
        ]
        assert all(depth > 0 for depth in scene.connect(90))
    finally:
        scene.close()


def test_steering_can_be_disabled(warnings: list[str]) -> None:
    scene = Scene(enabled=False)
    try:
        scene.assess(0)
        assert scene.update() == (0, 0, 0)
        assert all(depth > 0 for depth in scene.connect(90))
        assert warnings == []
    finally:
        scene.close()


def test_steering_is_off_while_workers_of_a_killed_server_listen(warnings: list[str]) -> None:
    left_behind = Scene()
    port = left_behind.port.port
    left_behind.port._lock.close()  # type: ignore[union-attr]  # its supervisor was killed
    successor = SharedPort("127.0.0.1", port, 64, SLOTS)
    try:
        assert successor.has_other_listeners and not left_behind.port.has_other_listeners
        health = {slot: Health(slot, Condition.HEALTHY, 0.0) for slot in range(SLOTS)}
        steering = Steering(successor, health, lambda: 0.0, Metrics(), enabled=True)
        steering.update()
        assert steering.weights == (0, 0, 0)
        assert warnings == [
            "steering is off, the kernel spreads new connections by its hash: workers of a killed server "
            "still listen on this port; restart this server once they are gone"
        ]
    finally:
        successor.close()
        left_behind.close()


def test_weights_and_queues_are_gauges(scene: Scene) -> None:
    scene.assess(0, Condition.PRESSED)
    scene.assess(1, Condition.PRESSED)
    scene.update()
    scene.connect(7)
    assert scene.gauges("realtime_slot_weight") == {"0": 0, "1": 0, "2": FULL}
    assert scene.gauges("realtime_accept_queue_depth") == {"0": 0, "1": 0, "2": 7}
    assert scene.gauges("realtime_accept_queue_limit") == dict.fromkeys("012", 4096.0)
