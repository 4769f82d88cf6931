"""Sessions that move to another worker with their connections: their state, and both ends of the move.

Connections move in *batches*, from the *source* to the *target*. The transports move the connections themselves
(`realtime.worker.handover`); this module moves the sessions, their subscriptions, and their places at the engine.

    source                                    target
    suspend(session, ready)  each
                 ── channels_of(sessions) ──▶ await expect(services, batch, channels)
                 ◀── expected ───────────────
    await cut(services, batch, target, sessions)
    export(session)  each
                 ── HandedSession each ─────▶ await arrived(services, batch)
                                              restore(…, batch, connection, handed)  each
                 ── all sent ───────────────▶ finish(services, batch)

The cut is one point of the engine's deliveries to both workers. The source delivers the events before it, and the
target those after it. So a client misses nothing, receives nothing twice, and no reply or push of its session changes
its place, in channels with and without history. The engine moves the clients and their presence at the cut; there is
no leave and no join. The application sees no end of the connection: `on_disconnected` is not called. In the target the
client is a new object, for which `on_connecting` is not called.

Failures. `expect` and `cut` raise: nothing has moved, and the source calls `resume` for each session; the target calls
`finish`. Once `cut` has returned, the sessions can't stay: the source either exports them or disconnects them. The
target calls `finish` in any case, also when the source has died: the engine forgets the clients that have not arrived.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache, partial

import msgspec
from msgspec import Struct

from realtime import errors
from realtime.auth.tokens import OVERRIDABLE
from realtime.errors import ClientError
from realtime.http.handshake import OpeningRequest
from realtime.protocol.channel_rules import ResolvedChannel
from realtime.protocol.client import ConnectedClient, meta_of, release, restore_state, state_of
from realtime.protocol.command_queue import CommandQueue
from realtime.protocol.context import Connection, SessionServices, SessionSettings
from realtime.protocol.messages import FilterNode
from realtime.protocol.replay import Replays
from realtime.protocol.session import CommandFunction, Session
from realtime.protocol.session_state import CONNECTED, Departure, SessionState
from realtime.protocol.session_timers import HandedLimits
from realtime.protocol.subscription import Replay, Subscription, SubscriptionSource
from realtime.pubsub import filters
from realtime.pubsub.backlog import DeltaBase
from realtime.pubsub.engine import Cut
from realtime.pubsub.hub import Place
from realtime.types import ClientInfo, Position, Publication

# Channels that one batch subscribes to side by side.
_EXPECTED_AT_ONCE = 256


class HandedSubscription(Struct, frozen=True, array_like=True, kw_only=True):
    """The state of one subscription; see `subscription.Subscription` for the fields without a word here.

    source: of `SubscriptionSource`, by name. info: `chan_info`. override: options that the channel's do not have.
    position, base, base_epoch: `hub.Place` at the cut, or of an unfinished replay (is_behind). is_lost: it has a gap.
    """

    channel: str
    source: str
    override: dict[str, bool]
    info: bytes
    positioned: bool
    recoverable: bool
    announced: bool
    delta: bool
    tf: FilterNode | None
    expire_at: float
    is_entered: bool
    is_lost: bool = False
    position: Position | None = None
    base: Publication | None = None
    base_epoch: str = ""
    is_behind: bool = False

    @property
    def place(self) -> Place:
        """The place in the channel where the subscription continues."""
        return Place(self.position, DeltaBase(self.base, self.base_epoch) if self.base is not None else None)


class HandedSession(Struct, frozen=True, array_like=True, kw_only=True):
    """The state of one session, without its connection.

    state: of `SessionState`, by name. name, version, meta: see `ConnectedClient`. replays: the channels of unfinished
    replays, in the order of their turns. commands: those that have not started, each as a message. orders: to this
    session since the cut was prepared. client_state: the application's own, see `protocol.client_state`.
    """

    request: OpeningRequest
    state: str
    info: ClientInfo
    limits: HandedLimits
    name: str = ""
    version: str = ""
    meta: bytes = b""
    is_refreshable: bool = False
    subscriptions: list[HandedSubscription] = []
    replays: list[str] = []
    commands: list[bytes] = []
    orders: list[bytes] = []
    client_state: bytes | None = None


# The source


def suspend(session: Session, ready: Callable[[], None]) -> None:
    """Start no further command of the session, and call `ready` when it can be cut, perhaps at once.

    Commands and actions of the server that are under way are finished first, and a replay stops at the end of a page.
    The session goes on otherwise: pings, publications, orders, limits. Messages that still come (`Session.receive`)
    wait. If the session ends meanwhile, `ready` is not called. A session whose client has not sent its connect command
    yet, or was refused, can move as well: the engine does not know it.
    """
    session.departure = Departure(ready)
    if session.queue is None:
        session.queue = CommandQueue(session)
    session.settle()


def resume(session: Session) -> None:
    """Undo `suspend`: the waiting commands start. Not after `cut` has returned. Harmless for an ended session."""
    departure, session.departure = session.departure, None
    if departure is None or session.state is SessionState.CLOSED:
        return
    for order in departure.orders:
        session.services.sessions.carry_out(order, session)
    for subscription in _lost(session, departure):
        session.subscription_lost_position(subscription)
    session.resume_limits()
    session.drained()


def check_state(session: Session) -> None:
    """Raise StateError if the application's state of the client can't move, so that the session has to stay."""
    if session.handle is not None:
        state_of(session.handle)


def channels_of(sessions: Iterable[Session]) -> list[str]:
    """Prepare suspended sessions for `cut`, and return their channels, each once, for `expect`.

    From now on orders to a session wait for its next worker, or for `resume`, and its limits of time stand still. A
    session that is not ready any more, since the server has begun a subscription, is left out of the cut; its `ready`
    is called again.
    """
    channels: dict[str, None] = {}
    for session in sessions:
        departure = session.departure
        if departure is None:
            continue
        departure.is_ready = departure.is_frozen = session.is_settled
        if departure.is_frozen:
            session.services.deadlines.clear(session)
            channels.update(dict.fromkeys(session.subscriptions))
    return list(channels)


async def cut(services: SessionServices, batch: str, target: str, sessions: Sequence[Session]) -> list[Session]:
    """Move prepared sessions to the target, as far as engine and hub are concerned.

    target: the address of the target's process, see `engine.SendOrder`. Returns when their connections have been sent
    everything that precedes the cut: the sessions that have moved and have not ended meanwhile, all of which `export`
    takes now. Raises EngineUnavailable or ClientError: nothing was moved, and `resume` is possible.
    """
    moving = [session for session in sessions if _is_prepared(session)]
    clients = [session for session in moving if session.state is CONNECTED]
    presence: dict[str, list[str]] = {}
    for session in clients:
        for subscription in session.subscriptions.values():
            if subscription.is_entered:
                presence.setdefault(subscription.channel, []).append(session.client)
    if clients:
        secrets = {session.client: session.secret for session in clients if session.secret}
        await services.engine.ask(Cut(batch, target, [session.client for session in clients], secrets, presence))
    # This is the cut: no delivery comes between the answer and the next lines.
    moving = [session for session in moving if _is_prepared(session)]
    for session in moving:
        services.sessions.remove(session)
        for channel, subscription in session.subscriptions.items():
            services.hub.hand_out(channel, subscription, partial(_note_place, session, channel))
    while not all(map(_is_handed_out, moving)):
        await services.slices.yield_to_loop()
    return [session for session in moving if _is_prepared(session)]


def _is_prepared(session: Session) -> bool:
    departure = session.departure
    return departure is not None and departure.is_frozen and session.state is not SessionState.CLOSED


def _note_place(session: Session, channel: str, place: Place | None) -> None:
    assert session.departure is not None
    session.departure.places[channel] = place


def _is_handed_out(session: Session) -> bool:
    departure = session.departure
    return departure is None or len(departure.places) == len(session.subscriptions) or not _is_prepared(session)


def _lost(session: Session, departure: Departure) -> list[Subscription]:
    return [session.subscriptions[channel] for channel in departure.lost if channel in session.subscriptions]


def export(session: Session) -> HandedSession:
    """End the session here without a trace, and return its state.

    The application's `on_disconnected` is not called, the connection is not closed, and the session sends nothing more.
    Raises StateError if the application's state of the client has changed since `check_state`, and can't move now.
    """
    departure, queue, handle = session.departure, session.queue, session.handle
    assert departure is not None and queue is not None
    if session.services.client_log.debug:
        session.services.client_log.went(session.describe, "it moves to another worker")
    session.services.sessions.finish_orders(session)
    encode_command = session.encoding.encode_command
    handed = HandedSession(
        request=session.request,
        state=session.state.name,
        info=session.info,
        limits=session.handed_limits,
        name=handle.name if handle is not None else "",
        version=handle.version if handle is not None else "",
        meta=meta_of(handle) if handle is not None else b"",
        client_state=state_of(handle) if handle is not None else None,
        is_refreshable=session.is_refreshable,
        subscriptions=[_exported(session, departure, one) for one in session.subscriptions.values()],
        replays=session.replays.channels() if session.replays is not None else [],
        commands=[encode_command(command) for command in queue.take_all()],
        orders=departure.orders,
    )
    session.state, session.queue = SessionState.CLOSED, None
    session.services.deadlines.clear(session)
    if handle is not None:
        release(handle)
    return handed


def _exported(session: Session, departure: Departure, subscription: Subscription) -> HandedSubscription:
    channel, options, replay = subscription.channel, subscription.channel_options, subscription.replay
    usual = session.services.rules.options(channel)
    place = departure.places.get(channel)
    position, base = place if place is not None else (None, None)
    if replay is not None:
        position = replay.position
        base = DeltaBase(replay.delta_base, position.epoch) if replay.delta_base is not None else None
    return HandedSubscription(
        channel=channel,
        source=subscription.source.name,
        override={name: value for name in OVERRIDABLE if (value := getattr(options, name)) != getattr(usual, name)},
        info=subscription.info.chan_info,
        positioned=subscription.positioned,
        recoverable=subscription.recoverable,
        announced=subscription.announced,
        delta=subscription.delta,
        tf=subscription.tf,
        expire_at=subscription.expire_at,
        is_entered=subscription.is_entered,
        is_lost=place is None or channel in departure.lost,
        position=position,
        base=base.publication if base is not None else None,
        base_epoch=base.epoch if base is not None else "",
        is_behind=replay is not None,
    )


# The target


async def expect(services: SessionServices, batch: str, channels: Sequence[str]) -> None:
    """Subscribe this worker to the channels, and hold their events from the cut on.

    Channels whose namespace this worker does not know are left out. Raises EngineUnavailable or ClientError; then
    nothing is held, and the batch must not be cut.
    """
    expected: list[tuple[str, str]] = []
    for channel in channels:
        with suppress(ClientError):
            expected.append((channel, services.rules.options(channel).priority))
    services.hub.open_batch(batch)
    try:
        for start in range(0, len(expected), _EXPECTED_AT_ONCE):
            some = expected[start : start + _EXPECTED_AT_ONCE]
            await services.gather([services.hub.expect(batch, channel, priority) for channel, priority in some])
    except BaseException:
        services.hub.release(batch)
        raise


async def arrived(services: SessionServices, batch: str) -> None:
    """Wait until the cut of the batch has reached this worker. Call it when the source has said that the cut is made.

    If the stream to the engine was interrupted, this returns all the same: the subscriptions then have a gap, as after
    any interruption.
    """
    await services.hub.arrived(batch)


def restore(
    settings: SessionSettings,
    services: SessionServices,
    commands: Mapping[str, CommandFunction],
    batch: str,
    connection: Connection,
    handed: HandedSession,
) -> Session:
    """Make the session of a connection that has arrived. The first three arguments: as for `Session`.

    `connection.form`, `secret` and `sink` are those it had at the source. The session may send at once, behind what
    was queued at the source, and it may close the connection at once, for example when it has expired meanwhile. An
    exception ends the session, as the end of its connection would; StateError if this application can't restore its
    state of the client.
    """
    limits = handed.limits
    settings = _as_agreed(settings, limits.ping_interval, limits.pong_timeout)
    session = Session(settings, services, commands, connection, handed.request)
    session.info, session.is_refreshable = handed.info, handed.is_refreshable
    session.state = SessionState[handed.state]
    session.restore_limits(limits)
    try:
        if session.state is CONNECTED:
            _restore_client(session, batch, handed)
        for message in handed.commands:
            session.receive(message)
    except BaseException:
        session.closed()
        raise
    return session


@lru_cache(maxsize=4)
def _as_agreed(settings: SessionSettings, ping_interval: float, pong_timeout: float) -> SessionSettings:
    """Return the settings with the pings that the client expects, if the configuration of this worker has others."""
    client = settings.client
    if (client.ping_interval, client.pong_timeout) == (ping_interval, pong_timeout):
        return settings
    client = msgspec.structs.replace(client, ping_interval=ping_interval, pong_timeout=pong_timeout)
    return msgspec.structs.replace(settings, client=client)


def _restore_client(session: Session, batch: str, handed: HandedSession) -> None:
    services, request = session.services, handed.request
    session.handle = ConnectedClient(
        session, handed.name, handed.version, request.headers, request.remote_address, handed.meta
    )
    restore_state(session.handle, handed.client_state)
    if services.client_log.debug:
        services.client_log.came(session.describe)
    unknown: list[str] = []  # channels whose namespace the configuration of this worker does not have
    for one in handed.subscriptions:
        options = services.rules.options("")
        try:
            options = services.rules.options(one.channel)
        except ClientError:
            unknown.append(one.channel)
        session.subscriptions[one.channel] = _restored(session, one, options)
    present = [one.presence for one in session.subscriptions.values() if one.is_entered]
    services.engine.claim(batch, session.info, session.secret, present)
    for one in handed.subscriptions:
        subscription = session.subscriptions.get(one.channel)
        if subscription is None:
            continue  # the connection has been closed
        if one.channel in unknown:
            session.unsubscribe(one.channel, *errors.SERVER_UNSUBSCRIBE)
        elif one.is_lost or not services.hub.adopt(
            batch, one.channel, subscription, one.place, is_behind=one.is_behind
        ):
            session.subscription_lost_position(subscription)
        elif not one.is_entered:
            session.run_in_background(subscription.show())  # this worker's configuration may say so
    if session.state is CONNECTED:
        services.sessions.adopt(batch, session, handed.orders)
        _restore_replays(session, handed.replays)
        session.schedule_deadline()


def _restored(session: Session, handed: HandedSubscription, options: ResolvedChannel) -> Subscription:
    connection = session.connection
    info = ClientInfo(session.info.user, session.info.client, session.info.conn_info, handed.info)
    subscription = Subscription(
        session,
        connection.sink,
        connection.form,
        handed.channel,
        options.with_override(handed.override),
        info,
        SubscriptionSource[handed.source],
    )
    subscription.positioned, subscription.recoverable = handed.positioned, handed.recoverable
    subscription.announced, subscription.delta = handed.announced, handed.delta
    subscription.expire_at, subscription.is_entered = handed.expire_at, handed.is_entered
    if handed.tf is not None:  # it was granted, whatever the limits of this worker's configuration
        subscription.filter, subscription.tf = filters.compiled(handed.tf, sys.maxsize, sys.maxsize), handed.tf
    if handed.is_behind and handed.position is not None:
        subscription.replay = Replay(handed.position, handed.base)
    subscription.is_active = True
    return subscription


def _restore_replays(session: Session, channels: Sequence[str]) -> None:
    for channel in channels:
        subscription = session.subscriptions.get(channel)
        if subscription is not None and subscription.replay is not None:
            session.replays = session.replays or Replays(session, session.connection)
            session.replays.add(subscription, subscription.replay)
    if session.replays is not None:
        session.replays.resume()


def finish(services: SessionServices, batch: str) -> list[ClientInfo]:
    """End the batch: no further session of it arrives. Idempotent; also for a batch that was never expected or cut.

    Returns the clients that the engine had moved here and that did not arrive; it has forgotten them. When the source
    has died, `on_disconnected` is due for these (`realtime.worker.lost_clients`); otherwise it has been called there.
    """
    services.hub.release(batch)
    services.sessions.end_arrivals(batch)
    return services.engine.forget_arrivals(batch)
