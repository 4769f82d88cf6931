"""Builds the objects of one worker in four steps. Each returns a frozen record of its parts for the next ones.

    wire_pubsub      the sessions by client and user, the hub, the engine
    wire_handlers    the dispatcher of the application's handlers, and load shedding
    wire_protocol    the sessions' collaborators, and the server API
    wire_transports  the endpoints of the clients' port, and the class of their TCP transport

Every object gets its collaborators as constructor arguments, and looks up none later. Where two objects need each
other, one takes a function that makes the other (`Hub` and its engine), or a method joins them (`App.bind`,
`Sessions.add_handler`).

A TLS listener differs in `TransportParts.transport` and in
the port (`realtime.worker.listening`); the frontend stays the same.
"""

from __future__ import annotations

import resource
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from twisted.internet.defer import Deferred
from twisted.logger import Logger
from twisted.python.failure import Failure

from realtime import cache
from realtime._version import __version__
from realtime.app import App
from realtime.client_log import ClientLog
from realtime.config.settings import MessageSettings, Settings
from realtime.deadlines import Deadlines
from realtime.handlers.call import HandlerServices
from realtime.handlers.compute_pool import ComputePool
from realtime.handlers.coroutines import drive, gather
from realtime.handlers.dispatch import Dispatcher
from realtime.http.hosts import HostNames
from realtime.process import log
from realtime.process.child import Child
from realtime.process.node import NodeIdentity
from realtime.process.reactor import next_turn_caller, turn_end_caller
from realtime.process.transport import DirectServer
from realtime.protocol import handover
from realtime.protocol.channel_rules import ChannelRules
from realtime.protocol.commands import COMMANDS
from realtime.protocol.context import SessionCounters, SessionServices, SessionSettings
from realtime.protocol.handover import HandedSession
from realtime.protocol.orders import ChannelsAnswer, ChannelsOrder, EmulateOrder, InvalidateOrder, LandOrder, RoleOrder
from realtime.protocol.session import Session
from realtime.protocol.sessions import Sessions
from realtime.protocol.wire_formats import WireFormat
from realtime.pubsub.engine import MESSAGES_DROPPED, Receiver, worker_address
from realtime.pubsub.fanout import FanoutServices, broadcast
from realtime.pubsub.hub import Hub
from realtime.pubsub.subscriber import Sink
from realtime.pubsub.time_slices import STRANGER_PAUSE, STRANGER_SLICE, TimeSlicer
from realtime.server_api.http_api import HTTPAPI
from realtime.server_api.operations import ServerAPI
from realtime.supervision.loop_time import LoopAccount, LoopWork
from realtime.supervision.pressure import Pressure
from realtime.transports.admission import Admission
from realtime.transports.connection import HandOverEndpoint
from realtime.transports.emulation import Emulation, EmulationLimits
from realtime.transports.frontend import ConnectionEndpoint, HTTPFrontend, HTTPFrontendFactory
from realtime.transports.http_server import HTTPSite
from realtime.transports.outbox import QueuedBytes
from realtime.transports.outgoing import FlushAtTurnEnd
from realtime.transports.routes import make_site
from realtime.transports.streams import StreamContext, make_endpoints
from realtime.transports.websocket import UNIDIRECTIONAL_WIRE_FORMATS, WIRE_FORMATS, WebSocketFactory
from realtime.types import WorkerInfo
from realtime.worker.engine import BrokerEngine
from realtime.worker.handover import HandOverParts
from realtime.worker.io_uring import IOURing
from realtime.worker.key_sets import make_verifier
from realtime.worker.load_shedding import LoadShedding, configure_cache_host
from realtime.worker.loop_time import (
    ChargedReceiver,
    NamespaceAccounts,
    charge_steps,
    charged_frontend,
    charged_transport,
)
from realtime.worker.roles import Role
from realtime.worker.shared_caches import SharedCaches
from realtime.worker.surveys import Surveys

TASKS = "tasks"
"""The role of the worker that runs the functions of `@app.every(where="one")`."""

_log = Logger()
_clients = Logger(namespace="realtime.clients")


@dataclass(frozen=True, slots=True)
class PubSubParts:
    """The channels of one worker. node: the id of its node. address: of its process, see `SendOrder`. rules: the
    channel options.

    slices: divides long work into turns of the loop. strangers: divides the work for peers that are not connected as
    clients: they get less of each turn.
    """

    node: str
    address: str
    slices: TimeSlicer
    strangers: TimeSlicer
    rules: ChannelRules
    sessions: Sessions
    engine: BrokerEngine
    hub: Hub


@dataclass(frozen=True, slots=True)
class HandlerParts:
    """The application of one worker, with its handlers. shedding: takes the readings of the heartbeat."""

    client_log: ClientLog
    app: App
    dispatcher: Dispatcher
    shedding: LoadShedding


@dataclass(frozen=True, slots=True)
class ProtocolParts:
    """The client protocol and the server API of one worker.

    open_session: makes the session of a connection from the connection and its opening request. restore_session: makes
    one that comes from another process, see `handover.restore`. deadlines: of sessions and connections; swept by the
    worker.
    """

    open_session: Callable[[Any, Any], Session]
    restore_session: Callable[[str, Any, HandedSession], Session]
    services: SessionServices
    deadlines: Deadlines
    api: HTTPAPI


@dataclass(frozen=True, slots=True)
class TransportParts:
    """The clients' port of one worker. queued: bytes in all outboxes. transport: the class of TCP connections.

    hand_over_endpoints: by the names of their transports.
    """

    admission: Admission
    queued: QueuedBytes
    frontend: HTTPFrontendFactory
    transport: type[DirectServer]
    emulation: Emulation
    hand_over_endpoints: Mapping[str, HandOverEndpoint]


def wire_pubsub(process: Child, app: App) -> PubSubParts:
    """Build the sessions' registry, the hub and the engine."""
    settings, reactor, metrics, ledger = process.settings, process.reactor, process.metrics, process.accounts
    rules, node = ChannelRules(settings.channel), NodeIdentity(settings, process.supervisor).uid
    address = worker_address(process.slot, process.generation, node)
    accounts = NamespaceAccounts(ledger, [namespace.name for namespace in settings.channel.namespaces], rules.namespace)
    slices = TimeSlicer(reactor.seconds, settings.loop.slice, next_turn_caller(reactor), Deferred)
    strangers = TimeSlicer(reactor.seconds, STRANGER_SLICE, partial(reactor.callLater, STRANGER_PAUSE), Deferred)
    sessions = Sessions(slices)

    def make_engine(hub: Receiver) -> BrokerEngine:
        receiver = ChargedReceiver(hub, accounts)
        receiver.on_interruption = interrupted
        follows_ends = bool(app.handlers("on_disconnected"))
        return BrokerEngine(
            receiver,
            settings.engine,
            metrics,
            reactor,
            process.link_lost,
            ledger,
            takes_lost_clients=follows_ends,
            generation=process.generation,
        )

    services = FanoutServices(
        broadcast=_choose_broadcast(settings),
        charge=accounts.charge_steps,
        sent=metrics.counter("realtime_messages_sent", "Messages to clients."),
        overflows=metrics.counter(
            "realtime_undelivered_overflows", "Channels that had too much to deliver, and dropped it"
        ),
        dropped=metrics.counter(*MESSAGES_DROPPED, reason="backlog"),
    )

    def interrupted() -> None:
        shared_caches.on_interruption()
        hub.on_interruption()

    hub = Hub(make_engine, sessions.apply, slices, services, sessions.begin_arrivals)
    engine = hub.engine
    assert isinstance(engine, BrokerEngine)
    lease = settings.workers.cache_lease if settings.workers.count > 1 else 0
    shared_caches = SharedCaches(cache.HOST, engine, address, lease)
    sessions.add_handler(InvalidateOrder, shared_caches.on_order)
    sessions.add_handler(LandOrder, shared_caches.on_landing)
    metrics.gauge("realtime_clients", "Clients that are connected.", lambda: len(sessions))
    metrics.gauge("realtime_subscriptions", "Subscriptions.", lambda: hub.subscriptions)
    metrics.gauge(
        "realtime_undelivered_bytes",
        "Publications that wait for their turn to be delivered",
        lambda: hub.fanout.queued,
    )
    return PubSubParts(node, address, slices, strangers, rules, sessions, engine, hub)


def wire_handlers(process: Child, app: App, node: str) -> HandlerParts:
    """Build the dispatcher of the application's handlers, and give its caches the worker's load. node: its id."""
    settings, reactor, metrics = process.settings, process.reactor, process.metrics
    pressure = Pressure(settings.loop, reactor.seconds)
    client_log = _client_log(process)
    services = HandlerServices(
        reactor=reactor,
        settings=settings.workers,
        metrics=metrics,
        log=_log,
        ledger=process.accounts,
        marker=process.marker,
        pressure=pressure,
        compute_pool=ComputePool(
            reactor, settings.workers, settings.app, metrics, settings.log, process.name, process.lock
        ),
        slow_call=settings.loop.lagging,
        client_log=client_log,
        lock=process.lock,
        worker=WorkerInfo(process.slot, settings.workers.count, node),
    )
    dispatcher = Dispatcher(app, services)
    configure_cache_host(cache.HOST, pressure, dispatcher.run_coroutine, metrics)
    shedding = LoadShedding(pressure, dispatcher.throttles, process.page, metrics, _log)
    return HandlerParts(client_log, app, dispatcher, shedding)


def _client_log(process: Child) -> ClientLog:
    """Build the log of refusals, with no writer for the levels that are off."""
    level = process.settings.log.level
    client_log = ClientLog(
        process.metrics,
        process.reactor.seconds,
        info=(lambda line: _clients.info("{line}", line=line)) if log.is_on("info", level) else None,
        debug=(lambda line: _clients.debug("{line}", line=line)) if log.is_on("debug", level) else None,
    )
    process.heartbeat.tasks.add(1.0, client_log.report_left_out, is_needed=lambda: client_log.has_left_out)
    return client_log


def wire_tasks(process: Child, pubsub: PubSubParts, handlers: HandlerParts) -> Role | None:
    """Have one worker of all run the periodic functions with where="one"; None without any."""
    dispatcher = handlers.dispatcher
    if not dispatcher.has_recurring("one"):
        return None

    def gained() -> None:
        _log.info('this worker runs the functions with where="one" from now on (term {term})', term=role.term)
        dispatcher.start_recurring("one")

    def lost() -> None:
        lost_terms.value += 1
        dispatcher.give_up_recurring()

    help = 'Times at which this worker stopped running the functions with where="one".'
    lost_terms = process.metrics.counter("realtime_task_terms_ended", help)
    role = Role(
        TASKS, pubsub.address, process.settings.workers.task_lease, pubsub.engine, process.reactor, gained, lost
    )
    help = 'Number of the term in which this worker runs the functions with where="one", else 0.'
    process.metrics.gauge("realtime_task_term", help, lambda: role.term)
    dispatcher.find_term(lambda: role.term if role.is_held else 0)
    pubsub.sessions.add_handler(RoleOrder, role.on_order)
    return role


def wire_protocol(process: Child, pubsub: PubSubParts, handlers: HandlerParts) -> ProtocolParts:
    """Build the sessions' collaborators and the server API, and bind the application to it."""
    settings, reactor, metrics = process.settings, process.reactor, process.metrics
    run_all = partial(gather, ledger=process.accounts)
    session_settings = SessionSettings(
        client=settings.client, version=f"realtime {__version__}", uid=pubsub.node, rpc_ping=settings.rpc.ping
    )
    services = SessionServices(
        rules=pubsub.rules,
        tokens=make_verifier(settings.client, process.loop_reactor, metrics, time.time, process.lock),
        engine=pubsub.engine,
        hub=pubsub.hub,
        slices=pubsub.slices,
        strangers=pubsub.strangers,
        sessions=pubsub.sessions,
        deadlines=Deadlines(reactor.seconds(), _report_deadline_error),
        handlers=handlers.dispatcher,
        run=partial(drive, ledger=process.accounts),
        gather=run_all,
        wall_clock=time.time,
        report_error=_report_error,
        counters=SessionCounters(metrics),
        client_log=handlers.client_log,
    )
    surveys = Surveys(pubsub.engine, pubsub.hub, pubsub.address, reactor)
    pubsub.sessions.add_handler(ChannelsOrder, surveys.on_order)
    pubsub.sessions.add_handler(ChannelsAnswer, surveys.on_order)
    server_api = ServerAPI(pubsub.engine, pubsub.rules, surveys, run_all, slices=pubsub.slices)
    handlers.dispatcher.bind(server_api)
    return ProtocolParts(
        open_session=partial(Session, session_settings, services, COMMANDS),
        restore_session=partial(handover.restore, session_settings, services, COMMANDS),
        services=services,
        deadlines=services.deadlines,
        api=HTTPAPI(
            server_api,
            run_all,
            metrics,
            pubsub.slices,
            handlers.client_log,
            process.settings.http_api.max_batch_commands,
        ),
    )


def wire_transports(
    process: Child, pubsub: PubSubParts, handlers: HandlerParts, protocol: ProtocolParts
) -> TransportParts:
    """Build the endpoints of the clients' port, and the frontend that connections come to first."""
    settings, metrics, ledger = process.settings, process.metrics, process.accounts
    protocol_account = ledger.open(LoopWork.PROTOCOL)
    queued = QueuedBytes()
    turn_end = _turn_end(process, pubsub, protocol_account)
    own_names = HostNames((*settings.http_server.host_names, socket.gethostname()))
    admission = _admission(process, handlers, own_names)

    def websocket(transport: MessageSettings, wire_formats: Mapping[str, WireFormat]) -> WebSocketFactory:
        return WebSocketFactory(
            protocol.open_session,
            transport,
            settings.client,
            protocol.deadlines,
            metrics,
            process.reactor,
            admission,
            wire_formats=wire_formats,
            slices=pubsub.slices,
            strangers=pubsub.strangers,
            charge_work=partial(charge_steps, ledger, protocol_account),
            queued=queued,
            turn_end=turn_end,
        )

    limits = EmulationLimits(
        settings.emulation, settings.websocket.message_size_limit, metrics, process.reactor.callLater
    )
    emulation = Emulation(pubsub.engine, pubsub.node, pubsub.address, limits, pubsub.strangers, handlers.client_log)
    pubsub.sessions.add_handler(EmulateOrder, emulation.receive)
    stream_context = StreamContext(
        protocol.open_session, settings, protocol.deadlines, metrics, admission, emulation, queued, turn_end
    )
    stream_endpoints, cors_routes = make_endpoints(settings, stream_context)
    bidirectional = websocket(settings.websocket, WIRE_FORMATS)
    unidirectional = websocket(settings.uni_websocket, UNIDIRECTIONAL_WIRE_FORMATS)
    endpoints = _enabled_endpoints(settings, bidirectional, unidirectional, stream_endpoints)
    hand_over_endpoints: dict[str, HandOverEndpoint] = {one.transport_name: one for one in stream_endpoints.values()}
    if not settings.websocket.disabled:
        hand_over_endpoints["websocket"] = bidirectional
    if settings.uni_websocket.enabled:
        hand_over_endpoints["uni_websocket"] = unidirectional
    site = make_site(
        handlers.app,
        handlers.dispatcher,
        protocol.api,
        settings,
        metrics,
        another_worker_available=process.page.has_substitute,
        cors_routes=cors_routes,
        proxies=admission.proxies,
        own_names=own_names,
        client_log=handlers.client_log,
    )
    frontend = _frontend(process, endpoints, site, protocol.deadlines, admission, pubsub.strangers)
    transport = charged_transport(ledger, frontend.protocol)
    return TransportParts(admission, queued, frontend, transport, emulation, hand_over_endpoints)


def wire_handover(
    process: Child, pubsub: PubSubParts, handlers: HandlerParts, protocol: ProtocolParts, transports: TransportParts
) -> HandOverParts:
    """Collect the parts that move connections from and to other processes."""
    return HandOverParts(
        reactor=process.reactor,
        address=pubsub.address,
        services=protocol.services,
        restore=protocol.restore_session,
        endpoints=transports.hand_over_endpoints,
        frontend=transports.frontend,
        transport=transports.transport,
        emulation=transports.emulation,
        admission=transports.admission,
        disconnected=handlers.dispatcher.disconnected,
    )


def _turn_end(process: Child, pubsub: PubSubParts, account: LoopAccount) -> FlushAtTurnEnd:
    """Make the end of the loop's turns, and have relief go on with work that a blocked handler keeps from it."""
    call_at_end = turn_end_caller(process.reactor)
    turn_end = FlushAtTurnEnd(process.turn_number, lambda flush: call_at_end(process.accounts.charging(account, flush)))
    if process.relief is not None:
        process.relief.at_begin += [pubsub.slices.go_on, pubsub.strangers.go_on, turn_end.flush]
    return turn_end


def _admission(process: Child, handlers: HandlerParts, own_names: HostNames) -> Admission:
    return Admission(
        process.settings.client,
        process.metrics,
        process.reactor.seconds,
        handlers.shedding.refuse_handshake,
        process.settings.workers.count,
        resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        own_names,
        handlers.client_log,
    )


def _frontend(
    process: Child,
    endpoints: Mapping[str, ConnectionEndpoint],
    site: HTTPSite,
    deadlines: Deadlines,
    admission: Admission,
    strangers: TimeSlicer,
) -> HTTPFrontendFactory:
    charge = partial(charge_steps, process.accounts, process.accounts.open(LoopWork.HTTP))
    factory = HTTPFrontendFactory(
        process.settings.http_server,
        endpoints,
        site,
        deadlines,
        process.metrics,
        process.reactor,
        admission,
        charge,
        strangers,
    )
    factory.protocol = charged_frontend(process.accounts, HTTPFrontend)
    return factory


def _enabled_endpoints(
    settings: Settings,
    websocket: ConnectionEndpoint,
    uni_websocket: ConnectionEndpoint,
    streams: Mapping[str, ConnectionEndpoint],
) -> dict[str, ConnectionEndpoint]:
    """Return the endpoints of the enabled transports by path. streams: those of the enabled streams."""
    endpoints = dict(streams)
    if not settings.websocket.disabled:
        endpoints[settings.websocket.handler_prefix] = websocket
    if settings.uni_websocket.enabled:
        endpoints[settings.uni_websocket.handler_prefix] = uni_websocket
    return endpoints


def _choose_broadcast(settings: Settings) -> Callable[[bytes, Sequence[Sink]], None]:
    """Return the function that sends one frame to many sockets: by io_uring if it is enabled and available."""
    if settings.workers.io_uring:
        try:
            return IOURing().broadcast
        except (OSError, AttributeError) as error:  # the kernel, or the C library, has no such call
            _log.info("no io_uring ({error}): fan-out makes one system call for each message", error=error)
    return broadcast


def _report_error(error: BaseException) -> None:
    """Log an exception that is a bug of this server, with its traceback."""
    _log.failure("a session raised an unexpected exception", Failure(error))


def _report_deadline_error(error: Exception) -> None:
    """Log an exception of a connection's time limit, with its traceback."""
    _log.failure("a time limit of a connection raised an exception; aborting the connection", Failure(error))
