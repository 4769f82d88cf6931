"""Rescues new connections from a worker that can't take them.

The kernel completes handshakes while a worker's loop is blocked, or no worker is there, so clients wait at its socket.
While that lasts the supervisor accepts from its own copy of the socket, and hands the connections to a worker that is
well (`realtime.process.fd_passing`). Nothing of them is read here. Where no worker can take one, it stays queued, for
its own worker may come round; but once no loop has turned for long, clients are told to come back later.
"""

from __future__ import annotations

import random
import socket
from collections import Counter, deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Protocol

from twisted.internet import protocol
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IAddress
from twisted.logger import Logger
from twisted.python.failure import Failure

from realtime.config.settings import LoopSettings
from realtime.metrics import Metrics
from realtime.process import fd_passing, log
from realtime.process.fd_passing import FdSender
from realtime.supervision.health import Condition, Health
from realtime.supervisor.listener import SharedPort

BATCH = 32
"""Connections accepted from one slot in one turn: they keep the supervisor for two milliseconds."""

REFUSE_AFTER = 1.0
"""Seconds for which no loop has turned before clients are sent away: a shorter wait is better than a refusal."""

RESTART_ALLOWANCE = 2.0
"""Seconds within which a worker that died is expected to be replaced."""

MAX_HOLD = 5.0
"""Seconds for which a connection that no worker took is held before its client is sent away."""

LINGER = 1.0
"""Seconds for a client to read its refusal and close."""

MAX_LINGERING = 256
"""Clients that may be reading their refusal: each is a descriptor of the supervisor's."""

PAUSE_AFTER_FAILURE = 1.0
"""Seconds for which a worker that did not take a connection is given no other."""

_RETRY_AFTER = (3, 10)  # as in `realtime.transports.frontend`
_BODY = "the server is overloaded; come back later\n"
_REFUSAL = (
    "HTTP/1.1 503 Service Unavailable\r\nServer: realtime\r\nConnection: close\r\nRetry-After: {after}\r\n"
    "Content-Type: text/plain; charset=utf-8\r\nContent-Length: {length}\r\n\r\n{body}"
)

_log = Logger(observer=log.observer)


class RescueWorker(Protocol):
    """A worker process."""

    def adopt_from(self, stream: int) -> Deferred[object]:
        """Have it adopt what comes over `stream`, which stays open until the answer."""


class Rescue:
    """The rescue of one shared port's clients. `check` after each look at the workers' health."""

    def __init__(
        self,
        reactor: Any,
        port: SharedPort,
        health: Mapping[int, Health],
        processes: Mapping[int, RescueWorker],
        loop: LoopSettings,
        metrics: Metrics,
    ) -> None:
        """health, processes: by slot, as they change. loop: its limits, and `rescue`: False does nothing."""
        self._reactor = reactor
        self._sockets = port.sockets
        self._health = health
        self._processes = processes
        self._active = loop.rescue
        self._blocked = loop.lagging or loop.pressed
        self._routes: dict[int, _RouteToWorker] = {}
        self._held: deque[_RescuedConnection] = deque()  # taken by nobody so far
        self._refusals = _Refusals(reactor)
        self._tally: Counter[int] = Counter()  # rescued since the slot came to need it, by slot
        help = "Connections that waited for this worker and were handed to another."
        self._rescued = {
            slot: metrics.counter("realtime_rescued", help, worker=str(slot)) for slot in range(len(self._sockets))
        }
        self._refused = metrics.counter("realtime_rescue_refused", "Clients that the supervisor sent away with a 503.")
        help = "Times that a worker did not take a connection from the supervisor; another was tried."
        self._failed = metrics.counter("realtime_rescue_failed", help)

    def check(self) -> None:
        """Do what is due."""
        if not self._active:
            return
        self._update_routes()
        self._pass_on_held()
        for slot in range(len(self._sockets)):
            if self._in_need(slot):
                self._empty(slot)
            elif slot in self._tally:
                count = self._tally.pop(slot)
                _log.info("rescued {count} connections that waited for worker {slot}", count=count, slot=slot)

    def close(self) -> None:
        """Stop, for the server ends."""
        self._active = False
        for route in self._routes.values():
            route.close()
        for rescued in self._held:
            rescued.connection.close()
        self._held.clear()

    # Who needs it, and who can help.

    def _in_need(self, slot: int) -> bool:
        """Whether a connection that is queued at the slot is better off elsewhere."""
        health = self._health.get(slot)
        return health is not None and not self._is_well(health)

    def _is_well(self, health: Health) -> bool:
        """Whether the worker takes connections, at this moment too."""
        in_time = self._blocked == 0 or health.lag < self._blocked
        return in_time and health.condition in (Condition.HEALTHY, Condition.LAGGING)

    def _update_routes(self) -> None:
        """Have a way to each process that serves, and none to one that has ended."""
        for slot, route in list(self._routes.items()):
            if self._processes.get(slot) is not route.process:
                del self._routes[slot]
                route.process_ended()
        for slot, process in self._processes.items():
            health = self._health.get(slot)
            if slot not in self._routes and health is not None and self._is_well(health):
                self._routes[slot] = _RouteToWorker(self._reactor, slot, process)
        for route in self._routes.values():
            route.reclaim_overdue()

    def _helpers(self) -> list[_RouteToWorker]:
        """The ways to those that can take a connection now, best first."""
        now = self._reactor.seconds()
        able = [way for route in self._routes.values() if route.takes(now) and self._is_well(self._health[route.slot])]
        return sorted(able, key=self._burden)

    def _burden(self, route: _RouteToWorker) -> tuple[bool, int, int]:
        health = self._health[route.slot]
        return health.condition is Condition.LAGGING, route.in_flight, health.connections

    def _is_hopeless(self) -> bool:
        """Whether every worker is blocked for long, or dead and not coming back."""
        now = self._reactor.seconds()
        slots = [self._health.get(slot) for slot in range(len(self._sockets))]
        blocked = [one and one.condition is Condition.PRESSED and one.lag >= REFUSE_AFTER for one in slots]
        gone = [one and one.condition is Condition.ABSENT and now - one.since >= RESTART_ALLOWANCE for one in slots]
        return any(blocked) and all(map(any, zip(blocked, gone, strict=True)))

    # What becomes of a connection.

    def _empty(self, slot: int) -> None:
        """Take what waits at the slot, a batch at a time, as long as there is something to be done with it."""
        hopeless = self._is_hopeless()
        for _ in range(BATCH):
            if self._held or not (self._helpers() or (hopeless and self._refusals.has_room)):
                return
            connection = _accept(self._sockets[slot])
            if connection is None:
                return
            self._place(_RescuedConnection(connection, slot, self._reactor.seconds()))
        # More may wait. The loop turns first.
        self._reactor.callLater(0, self._go_on, slot)

    def _go_on(self, slot: int) -> None:
        if self._active and self._in_need(slot):
            self._empty(slot)

    def _place(self, rescued: _RescuedConnection) -> None:
        """Give it to a worker, hold it until one can take it, or send the client away."""
        if any(self._give(way, rescued) for route in self._helpers()):
            return
        if self._is_hopeless() or self._reactor.seconds() - rescued.since >= MAX_HOLD:
            self._refuse(rescued.connection)
        else:
            self._held.append(rescued)

    def _give(self, route: _RouteToWorker, rescued: _RescuedConnection) -> bool:
        def settled(taken: bool) -> None:
            if taken:
                self._rescued[rescued.slot].value += 1
                self._tally[rescued.slot] += 1
                return
            self._failed.value += 1
            route.rest()
            if self._active:
                self._place(rescued)
            else:
                rescued.connection.close()

        return route.give(rescued.connection, settled)

    def _pass_on_held(self) -> None:
        for _ in range(len(self._held)):
            self._place(self._held.popleft())

    def _refuse(self, connection: socket.socket) -> None:
        self._refused.value += 1
        with connection, suppress(OSError):  # it may have gone
            self._reactor.adoptStreamConnection(connection.fileno(), connection.family, self._refusals)


class _RescuedConnection:
    """A connection on its route. slot: where it was queued. since: when it was accepted."""

    __slots__ = ("connection", "since", "slot")

    def __init__(self, connection: socket.socket, slot: int, since: float) -> None:
        self.connection = connection
        self.slot = slot
        self.since = since


class _RouteToWorker:
    """The way to one worker process. It leads there once the process has answered."""

    def __init__(self, reactor: Any, slot: int, process: RescueWorker) -> None:
        self.slot = slot
        self.process = process
        self._reactor = reactor
        self._sender: FdSender | None = None
        self._closed = False
        self._rested = 0.0
        try:
            ours, theirs = fd_passing.pair()
        except OSError as error:
            _log.error("connections can't be handed to worker {slot}: {error}", slot=slot, error=error)
            return
        with_answer = process.adopt_from(theirs.fileno())
        with_answer.addCallbacks(lambda _: self._open(ours), lambda _: ours.close())
        with_answer.addBoth(lambda _: theirs.close())

    def _open(self, ours: socket.socket) -> None:
        if self._closed:
            ours.close()
        else:
            self._sender = FdSender(self._reactor, ours)

    @property
    def in_flight(self) -> int:
        return self._sender.in_flight if self._sender else 0

    def takes(self, now: float) -> bool:
        """Whether it can be given a connection."""
        return self._sender is not None and self._sender.has_room and now >= self._rested

    def give(self, connection: socket.socket, settled: Callable[[bool], None]) -> bool:
        return self._sender is not None and self._sender.send(connection, settled)

    def rest(self) -> None:
        self._rested = self._reactor.seconds() + PAUSE_AFTER_FAILURE

    def reclaim_overdue(self) -> None:
        if self._sender is not None:
            self._sender.reclaim_overdue()

    def close(self) -> None:
        self._closed = True
        if self._sender is not None:
            self._sender.close()

    def process_ended(self) -> None:
        self._closed = True
        if self._sender is not None:
            self._sender.worker_ended()


class _Refusal(protocol.Protocol):
    """Sends one client away: a whole response, then the end of our side; what it sends is not looked at."""

    factory: _Refusals

    def connectionMade(self) -> None:
        transport: Any = self.transport
        text = _REFUSAL.format(after=random.randint(*_RETRY_AFTER), length=len(_BODY), body=_BODY)
        transport.write(text.encode("ascii"))
        transport.loseWriteConnection()
        self.factory.lingering += 1
        self._deadline = self.factory.reactor.callLater(LINGER, transport.abortConnection)

    def connectionLost(self, reason: Failure = protocol.connectionDone) -> None:
        self.factory.lingering -= 1
        if self._deadline.active():
            self._deadline.cancel()


class _Refusals(protocol.ServerFactory):
    """The clients that are being sent away."""

    noisy = False

    def __init__(self, reactor: Any) -> None:
        self.reactor = reactor
        self.lingering = 0

    def buildProtocol(self, addr: IAddress | None) -> _Refusal:  # type: ignore[override]
        refusal = _Refusal()
        refusal.factory = self
        return refusal

    @property
    def has_room(self) -> bool:
        """Whether the supervisor has descriptors to spare for another."""
        return self.lingering < MAX_LINGERING


def _accept(listening: socket.socket) -> socket.socket | None:
    """A connection that waits; None when there is none, or no descriptor for it."""
    while True:
        try:
            connection, _ = listening.accept()
        except ConnectionAbortedError:
            continue
        except OSError:
            return None
        connection.setblocking(False)
        return connection
