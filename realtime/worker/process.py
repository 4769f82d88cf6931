"""One worker process: wires the core to its shell, serves its slot's sockets, and drains.

    python -m realtime.worker.process …      started by the supervisor, see `realtime.process.child`

Everything is built here, once, and handed what it needs; nothing looks anything up later.
"""

from __future__ import annotations

import asyncio
import os
import resource
import socket
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred, maybeDeferred
from twisted.internet.task import LoopingCall, deferLater
from twisted.logger import Logger
from twisted.python.failure import Failure

from realtime import app as application
from realtime._version import __version__
from realtime.config.settings import Settings
from realtime.deadlines import RESOLUTION, Deadlines
from realtime.errors import SHUTDOWN, EngineUnavailable
from realtime.handlers.compute_pool import ComputePool
from realtime.handlers.coroutines import drive, gather
from realtime.handlers.dispatch import Dispatcher
from realtime.handlers.threads import HandlerThreads
from realtime.process import child, transport
from realtime.process.fd_passing import FdReceiver
from realtime.protocol.channel_rules import ChannelRules
from realtime.protocol.commands import COMMANDS
from realtime.protocol.context import SessionCounters, SessionServices, SessionSettings
from realtime.protocol.orders import ChannelsAnswer, ChannelsOrder, EmulateOrder
from realtime.protocol.session import Session
from realtime.protocol.sessions import Sessions
from realtime.pubsub.engine import ReportSubscriptions
from realtime.pubsub.hub import Hub
from realtime.pubsub.time_slices import TimeSlicer
from realtime.server_api.http_api import HTTPAPI
from realtime.server_api.operations import NodeIdentity, ServerAPI
from realtime.supervision.loop_time import LoopWork
from realtime.supervision.pressure import Pressure
from realtime.transports.admission import Admission
from realtime.transports.emulation import Emulation
from realtime.transports.frontend import ConnectionEndpoint, HTTPFrontend, HTTPFrontendFactory
from realtime.transports.outbox import QueuedBytes
from realtime.transports.outgoing import FlushAtTurnEnd
from realtime.transports.routes import make_site
from realtime.transports.streams import StreamContext, make_endpoints
from realtime.transports.websocket import UNIDIRECTIONAL_WIRE_FORMATS, WIRE_FORMATS, WebSocketFactory
from realtime.worker import listening
from realtime.worker.engine import BrokerEngine
from realtime.worker.io_uring import IOURing
from realtime.worker.key_sets import make_verifier
from realtime.worker.load_shedding import Shedding
from realtime.worker.loop_time import ChargedReceiver, charged_steps, charged_transport
from realtime.worker.surveys import Surveys

# Seconds between two reports of the number of subscriptions to the engine.
TALLY_INTERVAL = 1.0
# Of a drain's time, the share in which clients are told to come back; the rest is for what they still wait for.
TELLING_SHARE = 0.5
# The share that handlers which do not end leave to the application's on_stop.
STOPPING_SHARE = 0.2

_log = Logger()


class Worker:
    """The objects of one worker, and its two acts: `start` and `drain`."""

    def __init__(self, process: child.Child) -> None:
        """Load the application and wire everything. Raises SettingsError when the application can't be used."""
        settings, reactor, metrics = process.settings, process.reactor, process.metrics
        self._process = process
        self._reactor = reactor
        self._spread = settings.shutdown.spread
        self._app = application.load(settings.app)
        self._slices = TimeSlicer(reactor.seconds, settings.loop.slice, _soon, Deferred)
        self._registry = Sessions(self._slices)
        self._hub = Hub(self._registry.apply, self._slices)
        rules = ChannelRules(settings.channel)
        namespaces = [namespace.name for namespace in settings.channel.namespaces]
        receiver = ChargedReceiver(self._hub, process.accounts, namespaces, rules.namespace)
        self._hub.fanout.charged = receiver.steps
        self._engine = self._hub.engine = BrokerEngine(
            receiver, settings.engine, metrics, reactor, process.link_lost, process.accounts
        )
        pressure = Pressure(settings.loop, reactor.seconds)
        self._dispatcher = Dispatcher(
            self._app,
            reactor,
            settings.workers,
            metrics,
            _log,
            process.marker,
            pressure,
            ComputePool(reactor, settings.workers, settings.app, metrics),
            settings.loop.lagging,
            process.accounts,
        )
        shedding = Shedding(pressure, process.page, metrics, _log)
        shedding.serve(self._dispatcher)
        process.heartbeat.add_listener(shedding.beat)
        self._deadlines = Deadlines(reactor.seconds())
        facts = NodeIdentitySource(settings)
        all_together = partial(gather, accounts=process.accounts)
        self._session_settings = SessionSettings(
            client=settings.client, version=f"realtime {__version__}", uid=facts().uid, rpc_ping=settings.rpc.ping
        )
        self._session_services = SessionServices(
            rules=rules,
            tokens=make_verifier(settings.client, reactor, metrics, time.time),
            engine=self._engine,
            hub=self._hub,
            slices=self._slices,
            sessions=self._registry,
            deadlines=self._deadlines,
            handlers=self._dispatcher,
            run=partial(drive, accounts=process.accounts),
            gather=all_together,
            wall_clock=time.time,
            report_error=_mistake,
            counters=SessionCounters(metrics),
        )
        surveys = Surveys(self._engine, self._hub, str(process.slot), reactor)
        self._registry.add_handler(ChannelsOrder, surveys.obey)
        self._registry.add_handler(ChannelsAnswer, surveys.obey)
        operations = ServerAPI(self._engine, rules, facts, surveys, all_together)
        self._dispatcher.bind(operations)
        api = HTTPAPI(operations, all_together, metrics, self._slices)
        self._admission = Admission(
            settings.client,
            metrics,
            reactor.seconds,
            shedding.refuse_handshake,
            settings.workers.count,
            resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        )
        self._queued = QueuedBytes()
        protocol = process.accounts.open(LoopWork.PROTOCOL)
        turn_end = FlushAtTurnEnd(process.turn_number, lambda flush: _soon(process.accounts.charging(protocol, flush)))
        websocket, uni_websocket = (
            WebSocketFactory(
                self._open_session,
                transport_settings,
                settings.client,
                self._deadlines,
                metrics,
                reactor,
                self._admission,
                wire_formats=wire_formats,
                slices=self._slices,
                charge_work=partial(charged_steps, process.accounts, protocol),
                queued=self._queued,
                turn_end=turn_end,
            )
            for transport_settings, wire_formats in (
                (settings.websocket, WIRE_FORMATS),
                (settings.uni_websocket, UNIDIRECTIONAL_WIRE_FORMATS),
            )
        )
        self._hub.fanout.sent = websocket.sent
        if settings.workers.io_uring:
            self._send_by_ring()
        emulation = Emulation(self._engine, self._session_settings.uid, str(process.slot))
        self._registry.add_handler(EmulateOrder, emulation.receive)
        stream_context = StreamContext(
            self._open_session,
            settings,
            self._deadlines,
            metrics,
            self._admission,
            emulation,
            self._queued,
            turn_end,
        )
        stream_endpoints, cors_routes = make_endpoints(settings, stream_context)
        endpoints: dict[str, ConnectionEndpoint] = {**stream_endpoints}
        site = make_site(
            self._app,
            self._dispatcher,
            api,
            settings,
            metrics,
            another_worker_available=process.page.has_relief,
            cors_routes=cors_routes,
            proxies=self._admission.proxies,
        )
        if not settings.websocket.disabled:
            endpoints[settings.websocket.handler_prefix] = websocket
        if settings.uni_websocket.enabled:
            endpoints[settings.uni_websocket.handler_prefix] = uni_websocket
        self._front = HTTPFrontendFactory(settings.http_server, endpoints, site, self._deadlines, metrics)
        self._transport = charged_transport(process.accounts, HTTPFrontend)
        self._ports: list[Any] = []
        self._takers: list[FdReceiver] = []
        self._linked: Deferred[None] = Deferred()
        self._tallied = 0
        self._measure()

    def _send_by_ring(self) -> None:
        try:
            self._hub.fanout.broadcast = IOURing().broadcast
        except (OSError, AttributeError) as error:  # no such call, or no such function of the C library
            _log.info("fan-out takes a system call for each delivery: no io_uring here: {error}", error=error)

    def _open_session(self, connection: Any, request: Any) -> Session:
        return Session(self._session_settings, self._session_services, COMMANDS, connection, request)

    def _measure(self) -> None:
        process = self._process
        process.heartbeat.measure(WorkerLoad(self._admission, self._hub, self._queued, self._dispatcher.threads))
        process.metrics.gauge("realtime_clients", "Clients that are connected.", lambda: len(self._registry))
        process.metrics.gauge("realtime_subscriptions", "Subscriptions.", lambda: self._hub.subscriptions)
        traffic = self._hub.fanout
        process.metrics.gauge(
            "realtime_undelivered_bytes",
            "Publications that wait for their turn to be delivered",
            lambda: traffic.queued,
        )
        traffic.overflows = process.metrics.counter(
            "realtime_undelivered_overflows", "Channels that had too much to deliver, and dropped it"
        )

    async def start(self) -> None:
        """Serve: returns when the engine can be reached, the application has started, and the port is open."""
        accounts = self._process.accounts
        tasks = self._process.heartbeat.tasks
        tasks.add(RESOLUTION, self._sweep, is_needed=self._in_use)
        tasks.add(TALLY_INTERVAL, self._tally, is_needed=lambda: self._hub.subscriptions != self._tallied)
        check_delay = self._process.settings.client.channel_position_check_delay
        if check_delay:
            looping = LoopingCall(accounts.charging(accounts.open(LoopWork.TIMERS), self._check_positions))
            looping.clock = self._reactor
            looping.start(check_delay, now=False)
        await self._linked
        await self._dispatcher.start()
        self._ports = [listening.adopt(self._reactor, fd, self._front) for fd in self._process.listen]
        for port in self._ports:
            port.transport = self._transport
            port.doRead = accounts.charging(accounts.open(LoopWork.HTTP), port.doRead)

    def link(self, slot: int, stream: int) -> None:
        """Reach the broker over a fresh stream."""
        self._engine.attach(stream)
        if not self._linked.called:
            self._linked.callback(None)

    def adopt(self, stream: int) -> None:
        """Adopt the connections that come over a stream from the supervisor."""
        self._takers.append(FdReceiver(self._reactor, stream, self._adopt))

    def _adopt(self, fd: int) -> None:
        """Serve a connection that the supervisor has accepted. Raises OSError."""
        transport.adopt(self._reactor, fd, self._ports[0].addressFamily, self._front, self._transport)

    def _in_use(self) -> bool:
        return bool(self._admission.connections) or self._deadlines.any()

    def _sweep(self) -> None:
        self._deadlines.sweep(self._reactor.seconds())

    def _tally(self) -> None:
        # The engine remembers it, also for a broker that comes later.
        self._tallied = self._hub.subscriptions
        self._engine.tell(ReportSubscriptions(self._tallied))

    def _check_positions(self) -> Deferred[None]:
        return Deferred.fromCoroutine(self._find_gaps())

    async def _find_gaps(self) -> None:
        # An engine that is away has every subscription renewed when it is back.
        with suppress(EngineUnavailable):
            await self._hub.check_positions(
                lambda channel: self._session_services.rules.options(channel).history_options
            )

    async def drain(self, timeout: float) -> None:
        """Accept no more, have the clients reconnect, spread over a while, and finish what they wait for."""
        until = self._reactor.seconds() + timeout
        for taker in self._takers:
            taker.close()
        for port in self._ports:
            await maybeDeferred(port.stopListening)
        await self._tell_clients(min(self._spread, timeout * TELLING_SHARE))
        waiting = until - timeout * STOPPING_SHARE
        while (self._admission.connections or self._dispatcher.running) and self._reactor.seconds() < waiting:
            await deferLater(self._reactor, 0.05)
            await self._tell_clients(0.0)  # those whose handshake was under way
        await self._dispatcher.stop(max(until - self._reactor.seconds(), 0.0))
        self._engine.close()

    async def _tell_clients(self, spread: float) -> None:
        """Disconnect every client with 3001, the last one after `spread` seconds."""
        sessions = list(self._registry)
        began = self._reactor.seconds()
        for number, session in enumerate(sessions):
            wait = began + spread * number / len(sessions) - self._reactor.seconds()
            if wait > 0.01:
                await deferLater(self._reactor, wait)
            session.disconnect(*SHUTDOWN)


class WorkerLoad:
    """The load of a worker, for its heartbeat."""

    def __init__(self, admission: Admission, hub: Hub, queued: QueuedBytes, threads: HandlerThreads) -> None:
        self._admission = admission
        self._hub = hub
        self._queued = queued
        self._threads = threads

    @property
    def connections(self) -> int:
        return self._admission.connections

    @property
    def subscriptions(self) -> int:
        return self._hub.subscriptions

    @property
    def queued_bytes(self) -> int:
        return self._queued.size

    @property
    def threads_busy(self) -> int:
        return self._threads.busy

    @property
    def threads_waiting(self) -> int:
        return self._threads.waiting


class NodeIdentitySource:
    """What this node is known by: told by the supervisor's host, port and age, so that all workers say the same."""

    def __init__(self, settings: Settings) -> None:
        host, port = socket.gethostname(), settings.http_server.port
        self._uid = str(uuid.uuid5(uuid.NAMESPACE_URL, f"realtime://{host}:{port}"))
        self._name = settings.node.name or f"{host}_{port}"
        self._since = _beginning(os.getppid())

    def __call__(self) -> NodeIdentity:
        uptime = time.clock_gettime(time.CLOCK_BOOTTIME) - self._since
        return NodeIdentity(self._uid, self._name, __version__, max(0.0, uptime))


def _beginning(pid: int) -> float:
    """When a process began, by the clock of CLOCK_BOOTTIME: field 22 of proc_pid_stat(5), of which the second may hold
    anything in its brackets. Nothing else of /proc is read, for the rest may be hidden."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[19]) / os.sysconf("SC_CLK_TCK")


def _soon(function: Callable[[], None]) -> None:
    """Call it in the loop's next turn. For this, Twisted's `callLater` takes ten times as long."""
    asyncio.get_running_loop().call_soon(function)


def _mistake(error: BaseException) -> None:
    """Log a bug of ours once, with its traceback."""
    _log.failure("a session failed", Failure(error))


if __name__ == "__main__":
    sys.exit(child.main(sys.argv[1:], Worker))
