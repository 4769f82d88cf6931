"""One worker process: serves the sockets of its slot, and drains.

    python -m realtime.worker.process …      started by the supervisor, see `realtime.process.child`

`realtime.worker.wiring` builds the objects of the worker. `Worker.start` opens the ports once the broker can be reached
and the application has started; `Worker.drain` moves the clients to other workers and ends the process.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from msgspec.structs import asdict
from twisted.internet.defer import Deferred, maybeDeferred
from twisted.internet.task import LoopingCall, deferLater
from twisted.logger import Logger
from twisted.python.failure import Failure

from realtime import app as application
from realtime.app.blocking_calls import find_blocking_calls
from realtime.deadlines import RESOLUTION
from realtime.errors import SHUTDOWN, EngineUnavailable
from realtime.handlers.coroutines import drive, gather
from realtime.process import child, transport
from realtime.process.fd_passing import FdReceiver
from realtime.process.heartbeat import LoadGauges
from realtime.pubsub.engine import ReportSubscriptions
from realtime.supervision.loop_time import LoopWork
from realtime.transports.connection import ClientConnection
from realtime.worker.formats import formats
from realtime.worker.handover_source import HandOverSource
from realtime.worker.handover_target import HandOverTarget
from realtime.worker.listening import ListeningPort, adopt
from realtime.worker.lost_clients import DisconnectedHandler, report_lost_clients
from realtime.worker.wiring import wire_handlers, wire_handover, wire_protocol, wire_pubsub, wire_tasks, wire_transports

_log = Logger()

FORMATS = formats()
"""See `realtime.worker.formats`."""

# Seconds between two reports of the number of subscriptions to the engine.
REPORT_INTERVAL = 1.0
# The share of a drain's time in which clients are disconnected; the rest is for the answers that they still wait for.
DISCONNECT_SHARE = 0.5
# Seconds in which a connection without a request may send one more, or its first, whose response announces its end. A
# proxy answers 502 if its connection ends with a request on the way.
HTTP_DRAIN = 1.0
# The share of a drain's time, at its end, for the `finally` blocks of calls that take too long, for the `on_stop`
# handlers and for the end of the application's tasks; and the share of that for the tasks.
STOP_SHARE = 0.2
TASKS_SHARE = 0.25
# Seconds for the broker to learn that another worker may run the functions with where="one"; else their term runs out.
RESIGN_TIMEOUT = 1.0
# Seconds between two looks at what a drain waits for.
_DRAIN_INTERVAL = 0.05
# Seconds; shorter pauses between two disconnects are skipped.
_MIN_PAUSE = 0.01
# Seconds between two disconnects of the slowest clients, while too many bytes are queued.
_QUEUE_CHECK_INTERVAL = 0.05


class Worker:
    """One worker: `start` serves, `drain` ends."""

    def __init__(self, process: child.Child) -> None:
        """Load the application and build the worker. Raises SettingsError or ApplicationFailed when the
        application can't be loaded."""
        self._process = process
        self._reactor = process.reactor
        app = application.load(process.settings.app)
        for line in find_blocking_calls(app) if process.slot == 0 else ():  # the others would say the same
            _log.warn("{line}", line=line)
        self._pubsub = wire_pubsub(process, app)
        self._handlers = wire_handlers(process, app, self._pubsub.node)
        self._protocol = wire_protocol(process, self._pubsub, self._handlers)
        self._transports = wire_transports(process, self._pubsub, self._handlers, self._protocol)
        self._role = wire_tasks(process, self._pubsub, self._handlers)
        self._ports: list[ListeningPort] = []
        self._handover = wire_handover(process, self._pubsub, self._handlers, self._protocol, self._transports)
        self._receivers: list[FdReceiver] = []
        self._takeovers: list[HandOverTarget] = []
        self._is_handing_over = False
        self._linked: Deferred[None] = Deferred()
        self._reported_subscriptions = 0

    async def start(self) -> None:
        """Serve. Returns when the engine can be reached, the application has started, and the ports are open."""
        process, hub, dispatcher = self._process, self._pubsub.hub, self._handlers.dispatcher
        gauges = LoadGauges(
            connections=lambda: self._transports.admission.connections,
            subscriptions=lambda: hub.subscriptions,
            queued_bytes=lambda: self._transports.queued.size,
            threads_busy=lambda: dispatcher.threads.busy,
            threads_waiting=lambda: dispatcher.threads.waiting,
        )
        process.heartbeat.observe(gauges, self._handlers.shedding.beat)
        queued, limit = self._transports.queued, process.settings.loop.max_queued_bytes
        process.heartbeat.tasks.add(
            _QUEUE_CHECK_INTERVAL, lambda: queued.drop_largest(limit), is_needed=lambda: 0 < limit < queued.size
        )
        self._schedule()
        await self._linked
        await dispatcher.start()
        transports, strangers = self._transports, self._pubsub.strangers
        self._ports = [
            adopt(
                self._reactor,
                fd,
                transports.frontend,
                transports.transport,
                process.accounts,
                lambda: strangers.is_busy,
                process.metrics,
            )
            for fd in process.listen
        ]
        dispatcher.start_recurring("each")
        if self._role is not None:
            self._role.start()
        if dispatcher.disconnected is not None:
            self._pubsub.engine.on_clients_lost = partial(self._report_lost_clients, dispatcher.disconnected)
            self._report_lost_clients(dispatcher.disconnected)

    def _report_lost_clients(self, disconnected: DisconnectedHandler) -> None:
        run_all = partial(gather, ledger=self._process.accounts)
        reported = report_lost_clients(self._pubsub.engine, disconnected, run_all)
        drive(reported, _log_failed_report, self._process.accounts)

    def _schedule(self) -> None:
        """Schedule the periodic work of the worker."""
        tasks, ledger = self._process.heartbeat.tasks, self._process.accounts
        tasks.add(RESOLUTION, self._sweep_deadlines, is_needed=self._has_deadlines)
        tasks.add(REPORT_INTERVAL, self._report_subscriptions, is_needed=self._has_new_subscriptions)
        interval = self._process.settings.client.channel_position_check_delay
        if interval:
            looping = LoopingCall(ledger.charging(ledger.open(LoopWork.TIMERS), self._check_positions))
            looping.clock = self._reactor
            looping.start(interval, now=False)

    # The supervisor's messages.

    def link(self, slot: int, stream: int) -> None:
        """Reach the broker over a fresh stream."""
        self._pubsub.engine.attach(stream)
        if not self._linked.called:
            self._linked.callback(None)

    def adopt(self, stream: int) -> None:
        """Serve the connections that arrive over a stream from the supervisor."""
        self._receivers.append(FdReceiver(self._reactor, stream, self._adopt_connection))

    def take_over(self, stream: int) -> None:
        """Take over connections of another process from a stream."""
        self._takeovers = [takeover for takeover in self._takeovers if takeover.is_open]
        self._takeovers.append(HandOverTarget(self._handover, stream))

    async def hand_over(self, stream: int, connections: int, timeout: float) -> dict[str, object]:
        """Hand connections over to another process; see `control.HandConnectionsOver`."""
        if self._is_handing_over:
            return child.hand_nothing_over(stream, "another hand-over is under way")
        self._is_handing_over = True
        source = HandOverSource(self._handover, stream)
        try:
            if connections < 0:
                await self._stop_accepting()
            return asdict(await source.run(self._sessions, connections, timeout))
        finally:
            self._is_handing_over = False

    async def _stop_accepting(self) -> None:
        for receiver in self._receivers:
            receiver.close()
        for port in self._ports:
            await maybeDeferred(port.stopListening)
        self._transports.frontend.start_draining()

    def _sessions(self) -> list[Any]:
        """Return all sessions, also those that have not sent their connect command."""
        connections = (getattr(reader, "protocol", None) for reader in self._reactor.getReaders())
        sessions = (connection.session for connection in connections if isinstance(connection, ClientConnection))
        services = self._protocol.services
        others = {session: None for session in sessions if session is not None and session.services is services}
        return list(dict.fromkeys(self._pubsub.sessions) | others)

    def _adopt_connection(self, fd: int) -> None:
        """Serve a connection that the supervisor has accepted. Raises OSError."""
        family = self._ports[0].addressFamily
        transport.adopt(self._reactor, fd, family, self._transports.frontend, self._transports.transport)

    # Periodic work.

    def _has_deadlines(self) -> bool:
        return bool(self._transports.admission.connections) or self._protocol.deadlines.any()

    def _sweep_deadlines(self) -> None:
        self._protocol.deadlines.sweep(self._reactor.seconds())

    def _has_new_subscriptions(self) -> bool:
        return self._pubsub.hub.subscriptions != self._reported_subscriptions

    def _report_subscriptions(self) -> None:
        # The engine remembers the number, and reports it to a broker that starts later too.
        self._reported_subscriptions = self._pubsub.hub.subscriptions
        self._pubsub.engine.tell(ReportSubscriptions(self._reported_subscriptions))

    def _check_positions(self) -> Deferred[None]:
        return Deferred.fromCoroutine(self._find_gaps())

    async def _find_gaps(self) -> None:
        # Without an engine there is nothing to compare with; when it is back, all subscriptions are renewed anyway.
        with suppress(EngineUnavailable):
            await self._pubsub.hub.check_positions(lambda channel: self._pubsub.rules.options(channel).history_options)

    # The end.

    async def drain(self, timeout: float) -> None:
        """Stop accepting, make the clients reconnect elsewhere over a while, and finish their calls.

        timeout: seconds until the process ends anyway.
        """
        process, deadline = self._process, self._reactor.seconds() + timeout
        admission, dispatcher = self._transports.admission, self._handlers.dispatcher
        dispatcher.stop_recurring("each")
        resigned = Deferred.fromCoroutine(self._resign())
        for takeover in self._takeovers:
            takeover.close()
        await self._stop_accepting()
        frontend = self._transports.frontend
        http_until = self._reactor.seconds() + min(HTTP_DRAIN, timeout * DISCONNECT_SHARE)
        await self._disconnect_all(min(self._spread(), timeout * DISCONNECT_SHARE))
        stop_at = deadline - timeout * STOP_SHARE
        while self._reactor.seconds() < stop_at and (
            admission.connections
            or dispatcher.running
            or frontend.is_busy
            or ((frontend.serving or frontend.pending) and self._reactor.seconds() < http_until)
        ):
            await deferLater(self._reactor, _DRAIN_INTERVAL)
            await self._disconnect_all(0.0)  # the clients whose handshake ended meanwhile
        for session in list(self._pubsub.sessions):
            session.disconnect(*SHUTDOWN)  # their commands take too long
        # The rest is the application's, so it needs the loop's own thread.
        await process.end_relief()
        await dispatcher.stop_handlers((1 - TASKS_SHARE) * max(deadline - self._reactor.seconds(), 0.0))
        # After the `on_stop` handlers, which may end tasks in an order of their own; before the engine is closed, since
        # a `finally` block may publish.
        await process.cancel_tasks(TASKS_SHARE * timeout * STOP_SHARE)
        await dispatcher.stop(max(deadline - self._reactor.seconds(), 0.0))
        left = max(deadline - self._reactor.seconds(), _DRAIN_INTERVAL)
        resigned.addTimeout(min(RESIGN_TIMEOUT, left), self._reactor).addErrback(lambda failure: None)
        await resigned
        self._pubsub.engine.close()

    async def _resign(self) -> None:
        """Leave the functions with where="one" to another worker, once none of them runs here."""
        if self._role is not None:
            dispatcher = self._handlers.dispatcher
            dispatcher.stop_recurring("one")
            while dispatcher.is_running_once():
                await deferLater(self._reactor, _DRAIN_INTERVAL)
            await self._role.resign()

    def _spread(self) -> float:
        """Return over how many seconds to disconnect the clients, without regard to the time of the drain.

        An SDK comes back half a second to a second after its first disconnect, so that it adds half a second of spread.
        """
        settings = self._process.settings.shutdown
        rate = settings.reconnect_rate or math.inf
        return max(settings.spread, len(self._pubsub.sessions) / rate)

    async def _disconnect_all(self, spread: float) -> None:
        """Disconnect every client with 3001, the last one after `spread` seconds, once its commands are answered."""
        sessions = list(self._pubsub.sessions)
        started = self._reactor.seconds()
        for index, session in enumerate(sessions):
            pause = started + spread * index / len(sessions) - self._reactor.seconds()
            if pause > _MIN_PAUSE:
                await deferLater(self._reactor, pause)
            session.drain()


def _log_failed_report(result: object, error: BaseException | None) -> None:
    if error is not None:
        _log.failure("calling on_disconnected for the clients of a dead worker raised", Failure(error))


def main(argv: Sequence[str]) -> int:
    """See `realtime.process.child.main`."""
    return child.main(argv, Worker)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
