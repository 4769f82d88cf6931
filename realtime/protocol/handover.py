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

The cut is one point of the engine's deliveries to both workers. The source delivers what comes before it, and the
target what comes after it. So a client misses nothing, receives nothing twice, and no reply or push of its session
changes its place, in channels with and without history. The engine moves the clients and their presence at the cut;
there is no leave and no join.

Failures. `expect` and `cut` raise: nothing has moved, and the source calls `resume` for each session; the target calls
`finish`. Once `cut` has returned, the sessions can't stay: the source either exports them or disconnects them. The target
calls `finish` in any case, also when the source has died: the engine forgets the clients that have not arrived.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from msgspec import Struct

from realtime.http.handshake import OpeningRequest
from realtime.protocol.context import Connection, SessionServices, SessionSettings
from realtime.types import ClientInfo, Position, Publication

if TYPE_CHECKING:
    from realtime.protocol.session import CommandFunction, Session


class HandedSubscription(Struct, frozen=True, array_like=True, kw_only=True):
    """The state of one subscription. The fields are those of `subscription.Subscription`, with these differences.

    options: the channel's options as the subscription has them, as the target's configuration may differ. request: the filter of the subscribe
    request. position: where the channel's deliveries continue at the cut; None without one. base: of the next delta.
    replay: whether `position` and `base` are those of an unfinished replay. is_entered: whether it has entered presence.
    """

    channel: str
    source: str
    override: dict[str, bool]
    info: bytes = b""
    positioned: bool = False
    recoverable: bool = False
    announced: bool = False
    delta: bool = False
    filter: bytes = b""
    expire_at: float = 0.0
    is_entered: bool = False
    position: Position | None = None
    base: Publication | None = None
    is_behind: bool = False


class HandedSession(Struct, frozen=True, array_like=True, kw_only=True):
    """The state of one session, without its connection.

    Times in loop time are here in seconds from now on, None for none: stale_in, ping_in, pong_in, expire_in, rate_in,
    failures_ago. state: of `SessionState`, by name. name, version, meta: see `ConnectedClient`. commands: the commands
    that have not started, one in each message. orders: orders to this session since the cut. client_state: reserved
    for the application's own state of the client.
    """

    request: OpeningRequest
    state: str
    info: ClientInfo
    name: str = ""
    version: str = ""
    meta: bytes = b""
    is_refreshable: bool = False
    subscriptions: list[HandedSubscription] = []
    commands: list[bytes] = []
    orders: list[bytes] = []
    stale_in: float | None = None
    ping_in: float | None = None
    pong_in: float | None = None
    expire_in: float | None = None
    rate_in: float = 0.0
    failures: tuple[int, int, float] | None = None
    client_state: bytes | None = None


# The source


def suspend(session: Session, ready: Callable[[], None]) -> None:
    """Start no further command of the session, and call `ready` once when it can be cut, perhaps at once.

    Commands under way are answered first, and subscriptions of the server that are being made are finished. Until then the
    session goes on otherwise: pings, publications, orders, limits. Messages that still come (`Session.receive`) wait. If
    the session ends meanwhile, `ready` is not called; the connection is closed then, as ever. A session whose client has not
    sent its connect command yet, or was refused, can move as well: the engine does not know it.
    """
    raise NotImplementedError


def resume(session: Session) -> None:
    """Undo `suspend`: the waiting commands start. Not after `cut` has returned."""
    raise NotImplementedError


def channels_of(sessions: Iterable[Session]) -> list[str]:
    """Return the channels of suspended sessions, each once, for `expect`."""
    raise NotImplementedError


async def cut(services: SessionServices, batch: str, target: str, sessions: Sequence[Session]) -> list[Session]:
    """Move suspended sessions that are ready to the target, as far as engine and hub are concerned.

    target: the address of the target's process, see `engine.SendOrder`. Returns when their connections have been sent
    everything that precedes the cut: the sessions that have not ended meanwhile, all of which `export` takes now.
    Raises EngineUnavailable or ClientError: nothing was moved, and `resume` is possible.
    """
    raise NotImplementedError


def export(session: Session) -> HandedSession:
    """End the session here without a trace, and return its state.

    The application's `on_disconnected` is not called, the connection is not closed, and the session sends nothing more.
    """
    raise NotImplementedError


# The target


async def expect(services: SessionServices, batch: str, channels: Sequence[str]) -> None:
    """Subscribe this worker to the channels, and hold their events from the cut on.

    Raises EngineUnavailable or ClientError; then nothing is held, and the source is told not to cut.
    """
    raise NotImplementedError


def arrived(services: SessionServices, batch: str) -> Awaitable[None]:
    """Wait until the cut of the batch has reached this worker. Call it when the source has said that the cut is made.

    If the stream to the engine was interrupted, this returns all the same: the subscriptions then have a gap, as after any
    interruption.
    """
    raise NotImplementedError


def restore(
    settings: SessionSettings,
    services: SessionServices,
    commands: Mapping[str, CommandFunction],
    batch: str,
    connection: Connection,
    handed: HandedSession,
) -> Session:
    """Make the session of a connection that has arrived. The first three arguments: as for `Session`.

    `connection.form`, `secret` and `sink` are those it had at the source. The session may send at once: what was
    queued at the source goes before. It may also close the connection at once, for example when it has expired meanwhile.
    """
    raise NotImplementedError


def finish(services: SessionServices, batch: str) -> list[ClientInfo]:
    """End the batch: no further session of it arrives. Idempotent; also for a batch that was never expected or cut.

    Returns the clients that the engine had moved here and that did not arrive; it has forgotten them. When the source has
    died, `on_disconnected` is due for these (`realtime.worker.lost_clients`); otherwise it has been called there.
    """
    raise NotImplementedError
