"""Which connections are rescued, which worker gets them, and which clients are refused.

Sockets and reactor are real; health and time are set by the test.
"""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
from twisted.internet import reactor
from twisted.internet.defer import Deferred, fail, succeed
from twisted.logger import capturedLogs, formatEvent

from realtime.client_log import KINDS
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
    RETURN_ALLOWANCE,
    Rescue,
)
from tests.transports.stage import eventually


class Clock:
    """The reactor, with a time that the test sets. The refusals' deadlines use the real time."""

    def __init__(self) -> None:
        self.now = 100.0

    def seconds(self) -> float:
        return self.now

    def __getattr__(self, name: str) -> Any:
        return getattr(reactor, name)


class Worker:
    """A process that sends its slot over each adopted connection. blocked: it does not read. full: adopting fails."""

    has_exited = False

    def __init__(self, slot: int) -> None:
        self.slot = slot
        self.blocked = self.full = False
        self.adopted = 0
        self.receiver: FdReceiver | None = None

    def adopt_from(self, stream: int) -> Deferred[object]:
        self.receiver = FdReceiver(reactor, os.dup(stream), self._adopt)
        self._receive, self.receiver.doRead = self.receiver.doRead, self._read  # type: ignore[method-assign]
        return succeed({})

    def _read(self) -> None:
        if not self.blocked:
            self._receive()

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
        """Connect new clients, which the kernel spreads over the slots."""
        new = [socket.create_connection(("127.0.0.1", self.port.port)) for _ in range(clients)]
        for client in new:
            client.setblocking(False)
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

    async def check_until(self, condition: Callable[[], bool], step: float = 0.0) -> None:
        """Check, as the health monitor does, until `condition` holds. step: seconds between two checks."""

        def checked() -> bool:
            self.clock.now += step
            self.rescue.check()
            return condition()

        await eventually(checked)

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


def received(clients: list[socket.socket]) -> Counter[bytes]:
    """Count the clients by the data that they have received. Clients without data are left out."""
    said: Counter[bytes] = Counter()
    for client in clients:
        with suppress(BlockingIOError):
            said[client.recv(4096, socket.MSG_PEEK)] += 1
    return said


async def served(condition: Condition, lag: float = 0.0) -> Counter[bytes]:
    """Return which workers serve 40 clients while worker 0 is in this condition. Clients of worker 1 stay queued."""
    async with rescuing() as scene:
        scene.assess(0, condition, lag)
        clients = scene.connect(40)
        mine = scene.queued(1)
        await scene.check_until(lambda: scene.count("rescued_connections") == 40 - mine)
        assert scene.count("rescue_failures") == 0
        return received(clients)


async def test_clients_of_a_worker_that_can_not_accept_are_served_by_another() -> None:
    for condition in (Condition.ABSENT, Condition.PRESSED, Condition.DRAINING):
        assert set(await served(condition)) <= {b"1", b""}


async def test_clients_of_a_currently_blocked_loop_are_rescued() -> None:
    assert (await served(Condition.LAGGING, lag=0.06))[b"1"] > 0


async def test_a_worker_whose_loop_turns_keeps_its_clients() -> None:
    async with rescuing() as scene:
        scene.assess(0, Condition.LAGGING, lag=0.0)
        clients = scene.connect(40)
        for _ in range(5):
            scene.rescue.check()
        assert not received(clients)
        assert scene.queued(0) + scene.queued(1) == 40


async def test_rescue_can_be_disabled() -> None:
    async with rescuing(loop=LoopSettings(rescue=False)) as scene:
        scene.assess(0, Condition.ABSENT)
        scene.connect(20)
        scene.rescue.check()
        assert scene.queued(0) + scene.queued(1) == 20


async def test_the_least_loaded_worker_gets_connections_first() -> None:
    async with rescuing(slots=4) as scene:
        scene.assess(0, Condition.ABSENT)
        scene.assess(1, Condition.LAGGING)
        scene.assess(2, busy=1000)
        scene.assess(3, busy=10)
        for worker in scene.workers.values():
            worker.blocked = True  # connections are sent to it, and stay unanswered
        scene.connect(100)
        scene.rescue.check()
        transfers = {slot: scene.rescue._routes[slot].in_flight for slot in (1, 2, 3)}
        assert transfers[1] == 0
        assert 0 <= transfers[3] - transfers[2] <= 1
        assert transfers[3] > 0


async def test_unanswered_connections_per_worker_are_bounded_and_others_stay_queued() -> None:
    async with rescuing() as scene:
        scene.assess(0, Condition.ABSENT)
        scene.workers[1].blocked = True
        clients = scene.connect(400)
        for _ in range(4):
            await scene.check_until(lambda: True)
        assert scene.rescue._routes[1].in_flight == MAX_IN_FLIGHT
        scene.workers[1].blocked = False
        mine = scene.queued(1)
        await scene.check_until(lambda: scene.count("rescued_connections") == 400 - mine)
        assert received(clients)[b"1"] == 400 - mine


async def test_connections_sent_to_a_stopped_worker_go_to_exactly_one_other() -> None:
    async with rescuing(slots=3) as scene:
        scene.assess(0, Condition.ABSENT)
        scene.assess(2, busy=1000)
        scene.workers[1].blocked = True
        clients = scene.connect(30)
        theirs = scene.queued(1) + scene.queued(2)
        await scene.check_until(lambda: scene.count("rescued_connections") == 30 - theirs, step=ANSWER_TIMEOUT / 4)
        scene.workers[1].blocked = False
        await scene.check_until(lambda: True)
        assert scene.workers[1].adopted == 0
        assert scene.count("rescue_failures") > 0
        assert received(clients)[b"2"] == 30 - theirs


async def test_a_worker_that_fails_to_adopt_gets_no_connections_for_a_while() -> None:
    async with rescuing() as scene:
        scene.assess(0, Condition.ABSENT)
        scene.workers[1].full = True
        clients = scene.connect(2)
        while scene.count("rescue_failures") == 0:
            clients += scene.connect(1)
            await scene.check_until(lambda: True)
        failed = scene.count("rescue_failures")
        for _ in range(5):
            await scene.check_until(lambda: True)
        assert scene.count("rescue_failures") == failed
        scene.workers[1].full = False
        await scene.check_until(lambda: scene.count("rescued_connections") > 0, step=PAUSE_AFTER_FAILURE / 4)
        assert not scene.rescue._held


async def test_connections_sent_to_a_dying_worker_go_to_another() -> None:
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
        await scene.check_until(lambda: scene.count("rescued_connections") == 30 - theirs)
        assert received(clients)[b"2"] == 30 - theirs


async def test_a_new_process_in_a_slot_gets_a_route_of_its_own() -> None:
    async with rescuing() as scene:
        scene.workers[1].end()
        scene.workers[1] = Worker(1)
        scene.assess(0, Condition.ABSENT)
        clients = scene.connect(20)
        mine = scene.queued(1)
        await scene.check_until(lambda: scene.count("rescued_connections") == 20 - mine)
        assert received(clients)[b"1"] == 20 - mine


async def test_without_a_healthy_worker_clients_stay_queued() -> None:
    async with rescuing() as scene:
        for condition, lag in ((Condition.PRESSED, REFUSE_AFTER / 2), (Condition.ABSENT, 0.0)):
            scene.assess(0, condition, lag)
            scene.assess(1, condition, lag)
            scene.connect(20)
            for _ in range(5):
                scene.rescue.check()
            assert scene.queued(0) + scene.queued(1) == 20


async def test_clients_wait_for_the_successor_of_a_worker_that_has_just_died() -> None:
    async with rescuing() as scene:
        scene.assess(0, Condition.PRESSED, lag=2 * REFUSE_AFTER)
        scene.assess(1, Condition.ABSENT, since=RESTART_ALLOWANCE / 2)
        clients = scene.connect(5)
        scene.rescue.check()
        assert not received(clients)
        scene.clock.now += RESTART_ALLOWANCE
        with capturedLogs() as events:
            await scene.check_until(lambda: received(clients).total() == 5)
        assert scene.count("rescue_refusals") == 5
        assert [formatEvent(event) for event in events if "503" in str(formatEvent(event))] == [
            KINDS["no_worker"].line  # one line for all of them
        ]


async def test_when_every_loop_is_blocked_for_long_clients_get_a_503() -> None:
    async with rescuing() as scene:
        for slot in (0, 1):
            scene.assess(slot, Condition.PRESSED, lag=REFUSE_AFTER)
        clients = scene.connect(10)
        clients[0].send(b"GET / HTTP/1.1\r\n\r\n")
        await scene.check_until(lambda: received(clients).total() == 10)
        for client in clients:
            response = client.recv(4096)
            head, _, body = response.partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 503 Service Unavailable\r\n")
            assert b"\r\nRetry-After: " in head
            assert head.endswith(b"\r\nContent-Length: %d" % len(body))
            assert client.recv(4096) == b""
        assert scene.count("rescue_refusals") == 10
        # The connections are still open: a reset would discard the response.
        assert scene.rescue._refusals.lingering == 10
        for client in clients:
            client.close()
        await eventually(lambda: not scene.rescue._refusals.lingering)


@pytest.mark.parametrize(
    ("conditions", "after"),
    [
        ([Condition.ABSENT, Condition.ABSENT], RETURN_ALLOWANCE),
        ([Condition.DRAINING, Condition.DRAINING], REFUSE_AFTER),
        ([Condition.ABSENT, Condition.DRAINING], RESTART_ALLOWANCE),
    ],
)
async def test_when_no_worker_comes_back_clients_get_a_503(conditions: list[Condition], after: float) -> None:
    async with rescuing() as scene:
        for slot, condition in enumerate(conditions):
            scene.assess(slot, condition)
        clients = scene.connect(10)
        await scene.check_until(lambda: True, step=after - 0.1)
        assert scene.count("rescue_refusals") == 0
        await scene.check_until(lambda: scene.count("rescue_refusals") == 10, step=0.2)
        await eventually(lambda: sum(said.startswith(b"HTTP/1.1 503") for said in received(clients).elements()) == 10)


async def test_clients_of_a_dead_worker_are_refused_beside_workers_that_stay_under_pressure() -> None:
    async with rescuing() as scene:
        scene.assess(0, Condition.ABSENT)
        scene.assess(1, Condition.PRESSED, lag=REFUSE_AFTER / 2)
        clients = scene.connect(20)
        await scene.check_until(lambda: True, step=MAX_HOLD - 0.1)
        assert scene.count("rescue_refusals") == 0
        await scene.check_until(lambda: scene.count("rescue_refusals") > 0, step=0.2)
        # The worker under pressure turns its loop, and answers its own clients itself.
        assert scene.count("rescue_refusals") + scene.queued(1) == 20
        refused = scene.count("rescue_refusals")
        await eventually(
            lambda: sum(said.startswith(b"HTTP/1.1 503") for said in received(clients).elements()) == refused
        )


async def test_while_the_server_stops_clients_get_a_503_at_once() -> None:
    async with rescuing() as scene:
        scene.assess(0, Condition.DRAINING)
        scene.assess(1, Condition.ABSENT)
        clients = scene.connect(4)
        scene.rescue.check()
        assert scene.count("rescue_refusals") == 0
        scene.rescue.stopping = True
        await scene.check_until(lambda: scene.count("rescue_refusals") == 4)
        await eventually(lambda: sum(b"Retry-After: " in said for said in received(clients).elements()) == 4)


async def test_the_number_of_refused_clients_still_open_is_bounded() -> None:
    async with rescuing() as scene:
        for slot in (0, 1):
            scene.assess(slot, Condition.PRESSED, lag=REFUSE_AFTER)
        scene.connect(MAX_LINGERING + 20)
        await scene.check_until(lambda: scene.rescue._refusals.lingering == MAX_LINGERING)
        for _ in range(5):
            scene.rescue.check()
        assert scene.queued(0) + scene.queued(1) == 20


async def test_a_connection_that_no_worker_takes_is_refused_after_a_while() -> None:
    async with rescuing() as scene:
        scene.assess(0, Condition.ABSENT)
        scene.workers[1].full = True
        clients = []
        while not scene.rescue._held:
            clients += scene.connect(1)
            await scene.check_until(lambda: True)
        scene.assess(1, Condition.PRESSED)
        await scene.check_until(lambda: scene.count("rescue_refusals") > 0, step=MAX_HOLD / 4)
        await eventually(lambda: any(said.startswith(b"HTTP/1.1 503") for said in received(clients)))


async def test_without_free_descriptors_the_supervisor_leaves_clients_queued() -> None:
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
        await scene.check_until(lambda: scene.count("rescued_connections") == 20 - mine)


async def test_a_process_that_refuses_the_route_gets_no_connections() -> None:
    async with rescuing() as scene:
        refusing = Worker(1)
        refusing.adopt_from = lambda stream: fail(ConnectionError())  # type: ignore[assignment,method-assign]
        scene.workers[1].end()
        scene.workers[1] = refusing
        scene.assess(0, Condition.ABSENT)
        scene.connect(20)
        for _ in range(5):
            await scene.check_until(lambda: True)
        assert scene.queued(0) + scene.queued(1) == 20
