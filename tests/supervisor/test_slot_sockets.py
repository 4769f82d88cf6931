"""Sockets of slots that come and go, with real sockets: no connection is reset."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from realtime.metrics import Metrics
from realtime.supervision.health import Condition, Health
from realtime.supervisor.listener import SharedPort
from realtime.supervisor.slot_sockets import LINGER, SlotSockets
from realtime.supervisor.steering import Steering


class Scene:
    """A port of `slots` healthy slots, whose connections nobody accepts."""

    def __init__(self, slots: int, enabled: bool = True) -> None:
        self.now = 100.0
        self.port = SharedPort("127.0.0.1", 0, 128, slots)
        self.health = {slot: Health(slot, Condition.HEALTHY, 0.0) for slot in range(slots)}
        self.steering = Steering(self.port, self.health, lambda: self.now, Metrics(), enabled)
        self.steering.update()
        self.sockets = SlotSockets(self.port, self.steering, self.health, lambda: self.now)
        self.clients: list[socket.socket] = []

    def connect(self, count: int) -> None:
        self.clients += [socket.create_connection(("127.0.0.1", self.port.port)) for _ in range(count)]

    def queued(self) -> list[int]:
        return [self.steering.accept_queue(slot)[0] for slot in range(len(self.port.sockets))]

    def take(self, slot: int) -> None:
        while self.steering.accept_queue(slot)[0]:
            self.clients.append(self.port.sockets[slot].accept()[0])

    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.sockets.close_due()

    def close(self) -> None:
        for client in self.clients:
            client.close()
        self.port.close()


@pytest.fixture(params=[True, False], ids=["steered", "not steered"])
def scene(request: pytest.FixtureRequest) -> Iterator[Scene]:
    scene = Scene(3, request.param)
    yield scene
    scene.close()


def test_new_connections_avoid_a_slot_that_is_closed(scene: Scene) -> None:
    scene.sockets.avoid(1)
    scene.connect(30)
    assert scene.queued() == [30, 0, 0]


def test_a_socket_is_closed_after_a_while_and_once_its_queue_is_empty(scene: Scene) -> None:
    scene.connect(60)
    assert all(scene.queued())
    scene.sockets.avoid(1)
    scene.sockets.close_from(1)
    scene.take(2)
    scene.wait(LINGER - 0.1)
    assert len(scene.port.sockets) == 3
    scene.wait(0.2)
    assert len(scene.port.sockets) == 2, "clients still wait at slot 1"
    scene.take(1)
    scene.wait(0.1)
    assert (len(scene.port.sockets), list(scene.health)) == (1, [0])
    for client in scene.clients:
        client.setblocking(False)
        with pytest.raises(BlockingIOError):
            client.recv(1)  # it would be reset otherwise


def test_a_slot_with_a_process_keeps_its_socket(scene: Scene) -> None:
    scene.sockets.avoid(1)
    scene.sockets.close_from(2)
    scene.wait(LINGER)
    assert len(scene.port.sockets) == 2


def test_a_slot_that_comes_back_keeps_its_socket(scene: Scene) -> None:
    scene.sockets.avoid(1)
    scene.sockets.close_from(1)
    kept = list(scene.port.sockets)
    scene.sockets.open(3)
    scene.wait(LINGER)
    assert scene.port.sockets == kept
    scene.connect(60)
    assert all(scene.queued())


def test_a_new_slot_gets_connections_once_its_worker_is_healthy() -> None:
    scene = Scene(1)
    scene.sockets.open(2)
    scene.steering.update()
    scene.health[1] = Health(1, Condition.HEALTHY, 0.0)
    scene.steering.condition_changed(1, scene.health[1])
    scene.connect(40)
    assert all(scene.queued())
    scene.close()
