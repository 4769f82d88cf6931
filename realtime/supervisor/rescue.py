"""Rescues new connections from a worker that can't accept them.

The kernel completes TCP handshakes while a worker's loop is blocked, or while a slot has no worker, so clients queue at
the slot's socket. In that time the supervisor accepts from its own copy of the socket, and passes the connections to a
healthy worker (`realtime.process.fd_passing`). It reads nothing from them. While no worker can take a connection it
stays queued, because its own worker may recover. Once no loop has turned for long, no worker has come back for long, or
the server stops, clients get a 503 and a Retry-After; so do the clients of a dead worker beside workers that stay under
pressure.
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

from realtime.client_log import ClientLog
from realtime.config.settings import LoopSettings
from realtime.metrics import Metrics
from realtime.process import fd_passing, log
from realtime.process.fd_passing import FdSender
from realtime.supervision.health import Condition, Health
from realtime.supervisor.listener import SharedPort

BATCH = 32
"""Connections accepted from one slot per turn of the loop: these take two milliseconds of the supervisor's time."""

REFUSE_AFTER = 1.0
"""Seconds without a turn of any loop before clients are refused: a shorter wait is better than a refusal."""

RESTART_ALLOWANCE = 2.0
"""Seconds within which a dead worker is expected to be replaced, while another one is blocked."""

RETURN_ALLOWANCE = 5.0
"""Seconds within which one of the workers is expected back, while all are dead: they may load a large application."""

MAX_HOLD = 5.0
"""Seconds for which a client waits while no worker takes it and its own worker is gone, before it is refused."""

LINGER = 1.0
"""Seconds for a refused client to read the response and close."""

MAX_LINGERING = 256
"""Refused clients that may be open at a time: each takes a descriptor of the supervisor."""

PAUSE_AFTER_FAILURE = 1.0
"""Seconds for which a worker that did not take a connection gets no other."""

_RETRY_AFTER = (3, 10)  # as in `realtime.transports.frontend`
_BODY = "the server is overloaded; come back later\n"
_REFUSAL = (
    "HTTP/1.1 503 Service Unavailable\r\nServer: realtime\r\nConnection: close\r\nRetry-After: {after}\r\n"
    "Content-Type: text/plain; charset=utf-8\r\nContent-Length: {length}\r\n\r\n{body}"
)

_log = Logger(observer=log.observer)


class RescueWorker(Protocol):
    """A worker process."""

    has_exited: bool

    def adopt_from(self, stream: int) -> Deferred[object]:
        """Order it to adopt the connections sent over `stream`. Keep `stream` open until the answer."""


class Rescue:
    """The rescue of the connections queued at one shared port. Call `check` after each health check.

    stopping: set it when the server begins to stop: no worker that drains comes back.
    """

    def __init__(
        self,
        reactor: Any,
        port: SharedPort,
        health: Mapping[int, Health],
        processes: Mapping[int, RescueWorker],
        loop: LoopSettings,
        metrics: Metrics,
    ) -> None:
        """health, processes: by slot, live mappings. loop: with its limits; `loop.rescue` False disables the rescue."""
        self._reactor = reactor
        self._sockets = port.sockets
        self._health = health
        self._processes = processes
        self.stopping = False
        self.configure(loop)
        self._able_at = reactor.seconds()  # when a worker could last accept connections
        self._routes: dict[int, _RouteToWorker] = {}
        self._held: deque[_RescuedConnection] = deque()  # accepted, but not taken by any worker yet
        self._refusals = _RefusalFactory(reactor)
        self._unlogged: Counter[int] = Counter()  # connections rescued since the slot's worker became unable, by slot
        help = "Connections queued for this worker that another worker took."
        self._rescued = lambda slot: metrics.counter("realtime_rescued_connections", help, worker=str(slot))
        for slot in range(len(self._sockets)):
            self._rescued(slot)
        self._client_log = ClientLog(now=reactor.seconds, info=lambda line: _log.info("{line}", line=line))
        self._refused = metrics.counter("realtime_rescue_refusals", "Clients that the supervisor refused with a 503.")
        help = "Failures of a worker to take a connection from the supervisor, which then tried another worker."
        self._failed = metrics.counter("realtime_rescue_failures", help)

    def configure(self, loop: LoopSettings) -> None:
        """Use other limits of lag from now on, or begin or end the rescue."""
        self._active = loop.rescue
        self._max_lag = loop.lagging or loop.max_lag

    def check(self) -> None:
        """Rescue the connections of all workers that can't accept them."""
        if not self._active:
            return
        if any(map(self._can_accept, self._health.values())):
            self._able_at = self._reactor.seconds()
        self._client_log.report_left_out()
        self._update_routes()
        self._place_held()
        for slot in range(len(self._sockets)):
            if self._needs_rescue(slot):
                self._rescue_queued(slot)
            elif slot in self._unlogged:
                count = self._unlogged.pop(slot)
                _log.info(
                    "passed {count} connections queued for worker {slot} to other workers", count=count, slot=slot
                )

    @property
    def is_idle(self) -> bool:
        """Whether no connection is under way between the kernel and a worker, and none is being refused."""
        return not (self._held or self._refusals.lingering or any(route.in_flight for route in self._routes.values()))

    def close(self) -> None:
        """Stop the rescue and close all held connections, because the server ends."""
        self._active = False
        for route in self._routes.values():
            route.close()
        for rescued in self._held:
            rescued.connection.close()
        self._held.clear()

    # Slots that need a rescue, and workers that can help.

    def _needs_rescue(self, slot: int) -> bool:
        """Return whether connections queued at the slot are better off with another worker."""
        health = self._health.get(slot)
        return health is not None and not self._can_accept(health)

    def _can_accept(self, health: Health) -> bool:
        """Return whether the worker accepts connections, and its loop turns at this moment."""
        in_time = self._max_lag == 0 or health.lag < self._max_lag
        return in_time and health.condition in (Condition.HEALTHY, Condition.LAGGING)

    def _update_routes(self) -> None:
        """Open routes to new healthy processes, end the routes to replaced ones, and reclaim overdue connections."""
        for slot, route in list(self._routes.items()):
            if self._processes.get(slot) is not route.process:
                del self._routes[slot]
                route.end()
        for slot, process in self._processes.items():
            health = self._health.get(slot)
            if slot not in self._routes and health is not None and self._can_accept(health):
                self._routes[slot] = _RouteToWorker(self._reactor, slot, process)
        for route in self._routes.values():
            route.reclaim_overdue()

    def _helpers(self) -> list[_RouteToWorker]:
        """Return the routes to all workers that can take a connection now, the least loaded first."""
        now = self._reactor.seconds()
        routes = self._routes.values()
        able = [route for route in routes if route.is_available(now) and self._can_accept(self._health[route.slot])]
        return sorted(able, key=self._load)

    def _load(self, route: _RouteToWorker) -> tuple[bool, int, int]:
        health = self._health[route.slot]
        return health.condition is Condition.LAGGING, route.in_flight, health.connections

    def _is_hopeless(self, slot: int) -> bool:
        """Return whether no worker will accept the slot's clients soon: each worker has been blocked, draining or dead
        for long; or the slot's own is dead or draining, and the others have long been under pressure; or the server
        stops."""
        if self.stopping:
            return True
        now = self._reactor.seconds()
        is_gone = self._health[slot].condition in (Condition.ABSENT, Condition.DRAINING)
        if is_gone and now - self._able_at >= MAX_HOLD:
            return True
        slots = [self._health.get(slot) for slot in range(len(self._sockets))]
        all_dead = all(health is not None and health.condition is Condition.ABSENT for health in slots)
        allowance = {
            Condition.DRAINING: REFUSE_AFTER,
            Condition.ABSENT: RETURN_ALLOWANCE if all_dead else RESTART_ALLOWANCE,
        }

        def is_lost(health: Health) -> bool:
            if health.condition is Condition.PRESSED:
                return health.lag >= REFUSE_AFTER
            return health.condition in allowance and now - health.since >= allowance[health.condition]

        return all(health is not None and is_lost(health) for health in slots)

    # The connections.

    def _rescue_queued(self, slot: int) -> None:
        """Accept the connections queued at the slot, one batch per turn, while they can be passed on or refused."""
        is_hopeless = self._is_hopeless(slot)
        for _ in range(BATCH):
            if self._held or not (self._helpers() or (is_hopeless and self._refusals.has_room)):
                return
            connection = _accept(self._sockets[slot])
            if connection is None:
                return
            self._place(_RescuedConnection(connection, slot, self._reactor.seconds()))
        # More connections may be queued. Let the loop turn before the next batch.
        self._reactor.callLater(0, self._continue, slot)

    def _continue(self, slot: int) -> None:
        if self._active and self._needs_rescue(slot):
            self._rescue_queued(slot)

    def _place(self, rescued: _RescuedConnection) -> None:
        """Pass the connection to a worker, hold it until one can take it, or refuse the client."""
        if any(self._send(route, rescued) for route in self._helpers()):
            return
        if self._is_hopeless(rescued.slot) or self._reactor.seconds() - rescued.since >= MAX_HOLD:
            self._refuse(rescued.connection)
        else:
            self._held.append(rescued)

    def _send(self, route: _RouteToWorker, rescued: _RescuedConnection) -> bool:
        def settled(is_taken: bool) -> None:
            if is_taken:
                self._rescued(rescued.slot).value += 1
                self._unlogged[rescued.slot] += 1
                return
            self._failed.value += 1
            route.pause()
            if self._active:
                self._place(rescued)
            else:
                rescued.connection.close()

        return route.send(rescued.connection, settled)

    def _place_held(self) -> None:
        for _ in range(len(self._held)):
            self._place(self._held.popleft())

    def _refuse(self, connection: socket.socket) -> None:
        self._refused.value += 1
        self._client_log.refuse("no_worker")
        with connection, suppress(OSError):  # the client may have disconnected
            self._reactor.adoptStreamConnection(connection.fileno(), connection.family, self._refusals)


class _RescuedConnection:
    """An accepted connection without a worker. slot: the queue that it came from. since: when it was accepted."""

    __slots__ = ("connection", "since", "slot")

    def __init__(self, connection: socket.socket, slot: int, since: float) -> None:
        self.connection = connection
        self.slot = slot
        self.since = since


class _RouteToWorker:
    """Passes connections to one worker process. It is available once the process has answered `adopt_from`."""

    def __init__(self, reactor: Any, slot: int, process: RescueWorker) -> None:
        self.slot = slot
        self.process = process
        self._reactor = reactor
        self._sender: FdSender | None = None
        self._closed = False
        self._paused_until = 0.0
        try:
            ours, theirs = fd_passing.pair()
        except OSError as error:
            _log.error(
                "can't open a socket pair to pass connections to worker {slot}: {error}; check `ulimit -n`",
                slot=slot,
                error=error,
            )
            return
        answer = process.adopt_from(theirs.fileno())
        answer.addCallbacks(lambda _: self._open(ours), lambda _: ours.close())
        answer.addBoth(lambda _: theirs.close())

    def _open(self, ours: socket.socket) -> None:
        if self._closed:
            ours.close()
        else:
            self._sender = FdSender(self._reactor, ours)

    @property
    def in_flight(self) -> int:
        return self._sender.in_flight if self._sender else 0

    def is_available(self, now: float) -> bool:
        """Return whether the worker can be sent a connection."""
        return self._sender is not None and self._sender.has_room and now >= self._paused_until

    def send(self, connection: socket.socket, settled: Callable[[bool], None]) -> bool:
        """See `FdSender.send`."""
        return self._sender is not None and self._sender.send(connection, settled)

    def pause(self) -> None:
        """Send no connections for PAUSE_AFTER_FAILURE seconds."""
        self._paused_until = self._reactor.seconds() + PAUSE_AFTER_FAILURE

    def reclaim_overdue(self) -> None:
        if self._sender is not None:
            self._sender.reclaim_overdue()

    def close(self) -> None:
        self._closed = True
        if self._sender is not None:
            self._sender.close()

    def end(self) -> None:
        """End the route to a process that has exited, or that no longer serves its slot."""
        if not self.process.has_exited:
            self.close()
            return
        self._closed = True
        if self._sender is not None:
            self._sender.worker_ended()


class _Refusal(protocol.Protocol):
    """Refuses one client: sends a whole response, ends our side, and ignores its input."""

    factory: _RefusalFactory

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


class _RefusalFactory(protocol.ServerFactory):
    """Makes and counts refusals. lingering: refused clients whose connections are still open."""

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
        """Whether the supervisor has descriptors to spare for another refusal."""
        return self.lingering < MAX_LINGERING


def _accept(listening: socket.socket) -> socket.socket | None:
    """Accept a queued connection. None without one, and without a free descriptor."""
    while True:
        try:
            connection, _ = listening.accept()
        except ConnectionAbortedError:
            continue
        except OSError:
            return None
        connection.setblocking(False)
        return connection
