"""Whose clients are rescued, who gets them, and who is sent away.

Sockets and reactor are real; health and time are not.
"""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import Deferred, fail, succeed

from realtime.config.settings import LoopSettings
from realtime.metrics import Metrics
from realtime.process.fd_passing import ANSWER_TIMEOUT, MAX_IN_FLIGHT, FdReceiver
from realtime.supervision.health import Condition, Health
from realtime.supervisor.listener import SharedPort
from realtime.supervisor.rescue import (
    MAX_HOLD,
    MAX_LINGERING,
    PAUSE_AFTER_FAILURE,
    REFUSE_AFTER,
    RESTART_ALLOWANCE,
    Rescue,
)
from tests.transports.stage import eventually


class Clock:
    """The reactor with a time that the test turns, for all but the refusals' deadlines."""

    def __init__(self) -> None:
        self.now = 100.0

    def seconds(self) -> float:
        return self.now

    def __getattr__(self, name: str) -> Any:
        return getattr(reactor, name)


class Worker:
    """A process that greets what it adopts with its slot. blocked: it does nothing. full: it can adopt nothing."""

    def __init__(self, slot: int) -> None:
        self.slot = slot
        self.blocked = self.full = False
        self.adopted = 0
        self.receiver: FdReceiver | None = None

    def adopt_from(self, stream: int) -> Deferred[object]:
        self.receiver = FdReceiver(reactor, os.dup(stream), self._adopt)
        self._take, self.receiver.doRead = self.receiver.doRead, self._read  # type: ignore[method-assign]
        return succeed({})

    def _read(self) -> None:
        if not self.blocked:
            self._take()

    def _adopt(self, fd: int) -> None:
        if self.full:
            raise OSError(24, "Too many open files")
        self.adopted += 1
        with socket.socket(fileno=os.dup(fd)) as connection:
            connection.sendall(b"%d" % self.slot)

    def end(self) -> None:
        if self.receiver is not None:
            self.receiver.close()


class Scene:
    def __init__(self, slots: int, loop: LoopSettings) -> None:
        self.clock = Clock()
        self.port = SharedPort("127.0.0.1", 0, 4096, slots)
        self.health: dict[int, Health] = {}
        self.workers = {slot: Worker(slot) for slot in range(slots)}
        self.metrics = Metrics()
        self.rescue = Rescue(self.clock, self.port, self.health, self.workers, loop, self.metrics)
        self.clients: list[socket.socket] = []
        for slot in range(slots):
            self.assess(slot)
        self.rescue.check()

    def assess(
        self, slot: int, condition: Condition = Condition.HEALTHY, lag: float = 0.0, since: float = 0.0, busy: int = 0
    ) -> None:
        self.health[slot] = Health(slot, condition, self.clock.now - since, lag=lag, connections=busy)

    def connect(self, clients: int) -> list[socket.socket]:
        """New clients, spread over the slots by the kernel."""
        new = [socket.create_connection(("127.0.0.1", self.port.port)) for _ in range(clients)]
        for one in new:
            one.setblocking(False)
        self.clients += new
        return new

    def count(self, name: str) -> float:
        return sum(sample.value for sample in self.metrics.snapshot() if sample.name == f"realtime_{name}")

    def queued(self, slot: int) -> int:
        count = 0
        try:
            while True:
                self.port.sockets[slot].accept()[0].close()
                count += 1
        except BlockingIOError:
            return count

    async def look_until(self, condition: Callable[[], bool], step: float = 0.0) -> None:
        """Look, as the watch does, until it holds. step: time that passes between two looks."""

        def looked() -> bool:
            self.clock.now += step
            self.rescue.check()
            return condition()

        await eventually(looked)

    async def end(self) -> None:
        self.rescue.close()
        for client in self.clients:
            client.close()
        for worker in self.workers.values():
            worker.end()
        self.port.close()
        await eventually(lambda: not self.rescue._refusals.lingering)


@asynccontextmanager
async def rescuing(slots: int = 2, loop: LoopSettings | None = None) -> AsyncIterator[Scene]:
    scene = Scene(slots, loop or LoopSettings())
    try:
        yield scene
    finally:
        await scene.end()


def heard(clients: list[socket.socket]) -> Counter[bytes]:
    """What the clients have received, whole; those that nobody answered are missing."""
    said: Counter[bytes] = Counter()
    for client in clients:
        with suppress(BlockingIOError):
            said[client.recv(4096, socket.MSG_PEEK)] += 1
    return said


async def served(condition: Condition, lag: float = 0.0) -> Counter[bytes]:
    """Who serves 40 clients while worker 0 is in this condition; the rest of them stays queued at worker 1."""
    async with rescuing() as scene:
        scene.assess(0, condition, lag)
        clients = scene.connect(40)
        mine = scene.queued(1)
        await scene.look_until(lambda: scene.count("rescued") == 40 - mine)
        assert scene.count("rescue_failed") == 0
        return heard(clients)


async def test_the_clients_of_a_worker_that_can_not_take_them_are_served_by_another() -> None:
    for condition in (Condition.ABSENT, Condition.PRESSED, Condition.DRAINING):
        assert set(await served(condition)) <= {b"1", b""}


async def test_a_loop_that_is_blocked_right_now_is_enough() -> None:
    assert (await served(Condition.LAGGING, lag=0.06))[b"1"] > 0


async def test_a_worker_that_is_well_keeps_its_clients() -> None:
    async with rescuing() as scene:
        scene.assess(0, Condition.LAGGING, lag=0.0)
        clients = scene.connect(40)
        for _ in range(5):
            scene.rescue.check()
        assert not heard(clients)
        assert scene.queued(0) + scene.queued(1) == 40


async def test_it_can_be_switched_off() -> None:
    async with rescuing(loop=LoopSettings(rescue=False)) as scene:
        scene.assess(0, Condition.ABSENT)
        scene.connect(20)
        scene.rescue.check()
        assert scene.queued(0) + scene.queued(1) == 20


async def test_the_healthiest_worker_is_the_first_to_help() -> None:
    async with rescuing(slots=4) as scene:
        scene.assess(0, Condition.ABSENT)
        scene.assess(1, Condition.LAGGING)
        scene.assess(2, busy=1000)
        scene.assess(3, busy=10)
        for worker in scene.workers.values():
            worker.blocked = True  # so that they are given, and stay unanswered
        scene.connect(100)
        scene.rescue.check()
        transfers = {slot: scene.rescue._routes[slot].in_flight for slot in (1, 2, 3)}
        assert transfers[1] == 0
        assert 0 <= transfers[3] - transfers[2] <= 1
        assert transfers[3] > 0


async def test_no_worker_has_too_many_unanswered_and_the_rest_stays_queued() -> None:
    async with rescuing() as scene:
        scene.assess(0, Condition.ABSENT)
        scene.workers[1].blocked = True
        clients = scene.connect(400)
        for _ in range(4):
            await scene.look_until(lambda: True)
        assert scene.rescue._routes[1].in_flight == MAX_IN_FLIGHT
        scene.workers[1].blocked = False
        mine = scene.queued(1)
        await scene.look_until(lambda: scene.count("rescued") == 400 - mine)
        assert heard(clients)[b"1"] == 400 - mine


async def test_what_a_stopped_worker_was_given_goes_to_another_and_to_that_one_alone() -> None:
    async with rescuing(slots=3) as scene:
        scene.assess(0, Condition.ABSENT)
        scene.assess(2, busy=1000)
        scene.workers[1].blocked = True
        clients = scene.connect(30)
        theirs = scene.queued(1) + scene.queued(2)
        await scene.look_until(lambda: scene.count("rescued") == 30 - theirs, step=ANSWER_TIMEOUT / 4)
        scene.workers[1].blocked = False
        await scene.look_until(lambda: True)
        assert scene.workers[1].adopted == 0
        assert scene.count("rescue_failed") > 0
        assert heard(clients)[b"2"] == 30 - theirs


async def test_a_worker_that_can_adopt_nothing_is_left_alone_for_a_while() -> None:
    async with rescuing() as scene:
        scene.assess(0, Condition.ABSENT)
        scene.workers[1].full = True
        clients = scene.connect(2)
        while scene.count("rescue_failed") == 0:
            clients += scene.connect(1)
            await scene.look_until(lambda: True)
        failed = scene.count("rescue_failed")
        for _ in range(5):
            await scene.look_until(lambda: True)
        assert scene.count("rescue_failed") == failed
        scene.workers[1].full = False
        await scene.look_until(lambda: scene.count("rescued") > 0, step=PAUSE_AFTER_FAILURE / 4)
        assert not scene.rescue._held


async def test_what_a_dying_worker_was_given_goes_to_another() -> None:
    async with rescuing(slots=3) as scene:
        scene.assess(0, Condition.ABSENT)
        scene.assess(2, busy=1000)
        scene.workers[1].blocked = True
        clients = scene.connect(30)
        theirs = scene.queued(1) + scene.queued(2)
        scene.rescue.check()
        dead = scene.workers.pop(1)
        dead.end()
        scene.assess(1, Condition.ABSENT)
        await scene.look_until(lambda: scene.count("rescued") == 30 - theirs)
        assert heard(clients)[b"2"] == 30 - theirs


async def test_a_new_process_in_a_slot_gets_a_way_of_its_own() -> None:
    async with rescuing() as scene:
        scene.workers[1].end()
        scene.workers[1] = Worker(1)
        scene.assess(0, Condition.ABSENT)
        clients = scene.connect(20)
        mine = scene.queued(1)
        await scene.look_until(lambda: scene.count("rescued") == 20 - mine)
        assert heard(clients)[b"1"] == 20 - mine


async def test_without_a_helper_clients_wait_for_their_own_worker() -> None:
    async with rescuing() as scene:
        for condition, lag in ((Condition.PRESSED, REFUSE_AFTER / 2), (Condition.ABSENT, 0.0)):
            scene.assess(0, condition, lag)
            scene.assess(1, condition, lag)
            scene.connect(20)
            for _ in range(5):
                scene.rescue.check()
            assert scene.queued(0) + scene.queued(1) == 20


async def test_a_worker_that_has_just_died_may_be_waited_for() -> None:
    async with rescuing() as scene:
        scene.assess(0, Condition.PRESSED, lag=2 * REFUSE_AFTER)
        scene.assess(1, Condition.ABSENT, since=RESTART_ALLOWANCE / 2)
        clients = scene.connect(5)
        scene.rescue.check()
        assert not heard(clients)
        scene.clock.now += RESTART_ALLOWANCE
        await scene.look_until(lambda: heard(clients).total() == 5)
        assert scene.count("rescue_refused") == 5


async def test_when_every_loop_is_blocked_for_long_clients_are_told_to_come_back() -> None:
    async with rescuing() as scene:
        for slot in (0, 1):
            scene.assess(slot, Condition.PRESSED, lag=REFUSE_AFTER)
        clients = scene.connect(10)
        clients[0].send(b"GET / HTTP/1.1\r\n\r\n")
        await scene.look_until(lambda: heard(clients).total() == 10)
        for client in clients:
            response = client.recv(4096)
            head, _, body = response.partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 503 Service Unavailable\r\n")
            assert b"\r\nRetry-After: " in head
            assert head.endswith(b"\r\nContent-Length: %d" % len(body))
            assert client.recv(4096) == b""
        assert scene.count("rescue_refused") == 10
        # They are still there: a reset would take the response from them.
        assert scene.rescue._refusals.lingering == 10
        for client in clients:
            client.close()
        await eventually(lambda: not scene.rescue._refusals.lingering)


async def test_those_who_are_told_to_come_back_use_no_more_than_so_many_descriptors() -> None:
    async with rescuing() as scene:
        for slot in (0, 1):
            scene.assess(slot, Condition.PRESSED, lag=REFUSE_AFTER)
        scene.connect(MAX_LINGERING + 20)
        await scene.look_until(lambda: scene.rescue._refusals.lingering == MAX_LINGERING)
        for _ in range(5):
            scene.rescue.check()
        assert scene.queued(0) + scene.queued(1) == 20


async def test_a_connection_that_nobody_took_is_not_held_for_ever() -> None:
    async with rescuing() as scene:
        scene.assess(0, Condition.ABSENT)
        scene.workers[1].full = True
        clients = []
        while not scene.rescue._held:
            clients += scene.connect(1)
            await scene.look_until(lambda: True)
        scene.assess(1, Condition.PRESSED)
        await scene.look_until(lambda: scene.count("rescue_refused") > 0, step=MAX_HOLD / 4)
        await eventually(lambda: any(said.startswith(b"HTTP/1.1 503") for said in heard(clients)))


async def test_without_descriptors_of_its_own_the_supervisor_leaves_them_queued() -> None:
    async with rescuing() as scene:
        scene.assess(0, Condition.ABSENT)
        scene.connect(20)
        real = scene.port.sockets[0]

        class Exhausted:
            def accept(self) -> None:
                raise OSError(24, "Too many open files")

        scene.rescue._sockets[0] = Exhausted()  # type: ignore[call-overload]
        scene.rescue.check()
        scene.rescue._sockets[0] = real
        mine = scene.queued(1)
        await scene.look_until(lambda: scene.count("rescued") == 20 - mine)


async def test_a_process_that_does_not_open_its_way_is_no_helper() -> None:
    async with rescuing() as scene:
        mute = Worker(1)
        mute.adopt_from = lambda stream: fail(ConnectionError())  # type: ignore[assignment,method-assign]
        scene.workers[1].end()
        scene.workers[1] = mute
        scene.assess(0, Condition.ABSENT)
        scene.connect(20)
        for _ in range(5):
            await scene.look_until(lambda: True)
        assert scene.queued(0) + scene.queued(1) == 20
