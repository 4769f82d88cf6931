"""Settings, services and counters shared by all sessions of one worker.

The worker builds one `SessionSettings`, `SessionServices` and `SessionCounters`, and passes them to every session. The
Protocols describe the shell as a session uses it: a connection, the application's handlers, and a runner of coroutines.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Protocol

from msgspec import Struct, field

from realtime.auth.tokens import TokenVerifier
from realtime.client_log import ClientLog
from realtime.config.settings import ClientSettings, RPCPingSettings
from realtime.deadlines import Deadlines
from realtime.metrics import Metrics
from realtime.protocol.channel_rules import ChannelRules
from realtime.protocol.encodings import FEWEST_FIELDS
from realtime.protocol.messages import REQUESTS
from realtime.protocol.sessions import Sessions
from realtime.protocol.wire_formats import WireFormat
from realtime.pubsub.engine import Engine
from realtime.pubsub.hub import Hub
from realtime.pubsub.subscriber import Sink
from realtime.pubsub.time_slices import TimeSlicer
from realtime.types import ConnectRequest, Credentials, Grant


class Connection(Protocol):
    """The transport of one session. form: the wire format of the payloads that it takes.

    transport_name: such as "websocket", for the log. secret: identifies the session to clients that send commands over
    other connections (emulation); "" for none. needs_pings: whether the session pings the client by protocol; otherwise
    the transport checks the connection. is_held: the socket is not read, because code of the application blocks the
    handling of what was read before. is_drained: whether the socket has taken all frames. is_congested: so many
    bytes are queued that no further command of the client may start.
    """

    @property
    def form(self) -> WireFormat: ...

    @property
    def transport_name(self) -> str: ...

    @property
    def secret(self) -> str: ...

    @property
    def needs_pings(self) -> bool: ...

    @property
    def sink(self) -> Sink: ...

    @property
    def is_held(self) -> bool: ...

    @property
    def is_drained(self) -> bool: ...

    @property
    def is_congested(self) -> bool: ...

    def send(self, payload: bytes, *, is_push: bool = False) -> None:
        """Send one message to this client alone. A reply is queued without limit, a push as those of the fan-out."""

    def when_drained(self, callback: Callable[[], None]) -> None:
        """Call `callback` once when the socket has taken all frames, however often this is asked for until then."""

    def unsent(self) -> int:
        """Return the number of bytes that have not reached the client's host."""

    def pace(self, is_paced: bool) -> None:
        """Keep few bytes in the kernel's buffer, or as many as fit."""

    def hold(self) -> bool:
        """Send nothing until `release`, which sends everything at once. False if there is nothing to release."""

    def release(self) -> None: ...

    def close(self, code: int, reason: str) -> None:
        """Close the connection after the queued frames have left, or at a deadline."""

    def abort(self) -> None:
        """End the connection at once: its session has raised an exception."""

    def pause(self) -> None:
        """Read no more from the client until `resume`. Both may be called any number of times."""

    def resume(self) -> None: ...


class CommandHandler(Protocol):
    """One handler, called with a `ConnectedClient` and the data of its command."""

    @property
    def is_immediate(self) -> bool:
        """Whether `call_now` may be called now: the handler never waits, and no limit holds it back."""

    def call_now(self, client: Any, data: Any, /) -> Any:
        """Call the handler and return its result. Raises as its coroutine."""

    def __call__(self, client: Any, data: Any, /) -> Awaitable[Any]: ...


class Handlers(Protocol):
    """The application's handlers, as sessions call them. They raise ClientError and Disconnect, and nothing else.

    The first argument of all but `connecting` is the `ConnectedClient` that sent the command.
    """

    @property
    def connecting(self) -> Callable[[ConnectRequest], Awaitable[Credentials | None]] | None: ...

    @property
    def connected(self) -> Callable[[Any], Awaitable[Any]] | None: ...

    @property
    def disconnected(self) -> Callable[[Any, int, str], Awaitable[Any]] | None: ...

    @property
    def message(self) -> CommandHandler | None: ...

    @property
    def has_procedures(self) -> bool: ...

    def subscribing(self, channel: str) -> Callable[[Any, str, Any], Awaitable[Grant | None]] | None: ...

    def publishing(self, channel: str) -> Callable[[Any, str, Any], Awaitable[Any]] | None: ...

    def procedure(self, method: str) -> CommandHandler | None: ...


class Runner(Protocol):
    """Starts a coroutine at once; calls `done(result, error)` when it ended, perhaps before returning."""

    def __call__(
        self, coroutine: Coroutine[Any, Any, Any], done: Callable[[Any, BaseException | None], None]
    ) -> object: ...


Gather = Callable[[Sequence[Coroutine[Any, Any, Any]]], Awaitable[list[Any]]]
"""Runs coroutines side by side, beginning with all of them in order; returns their results in that order."""


class SessionCounters:
    """Counts commands and error replies of clients.

    commands: counters of received commands, by name. replays: counters of recoveries that exceeded the room in their
    reply: those "begun", "completed" and "lost" to history's limits.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self.commands = {
            name: metrics.counter("realtime_commands", "Commands of clients", command=name) for name in REQUESTS
        }
        self.replays = {
            event: metrics.counter(
                "realtime_recovery_replays", "Recoveries that exceed client.recovery_reply_size.", event=event
            )
            for event in ("begun", "completed", "lost")
        }

    def count_error(self, command: str, code: int) -> None:
        """Count an error reply. All codes of the application share one label."""
        label = str(code) if code < 400 else "application"
        self._metrics.counter("realtime_command_errors", "Commands that failed", command=command, code=label).value += 1


FIELDS_OF_A_SUBSCRIPTION = 16
"""Fields of one subscription in a connect command, as `client.max_command_fields` counts them, and some more."""


class SessionSettings(Struct, frozen=True, kw_only=True):
    """Settings of all sessions.

    version: of the server, as the connect reply names it. uid: of the node, the same in all its workers.
    """

    client: ClientSettings
    version: str
    uid: str = ""
    rpc_ping: RPCPingSettings = RPCPingSettings()

    @property
    def first_fields(self) -> int:
        """Fields of the commands in a first message: enough to recover all subscriptions that a client may have."""
        limit, channels = self.client.max_command_fields, self.client.channel_limit
        return min(limit, max(FEWEST_FIELDS, FIELDS_OF_A_SUBSCRIPTION * channels)) if channels else limit


class SessionServices(Struct, frozen=True, kw_only=True):
    """Collaborators of all sessions.

    slices: divides long work. strangers: the same for clients that are not connected yet; None for `slices`. gather:
    as for `ServerAPI`. wall_clock: returns Unix seconds, for the expiry of tokens. report_error: takes an exception
    that is a bug of the server or the application, with its traceback. client_log: counts and logs refusals.
    """

    rules: ChannelRules
    tokens: TokenVerifier
    engine: Engine
    hub: Hub
    sessions: Sessions
    deadlines: Deadlines
    handlers: Handlers
    slices: TimeSlicer
    run: Runner
    gather: Gather
    wall_clock: Callable[[], float]
    report_error: Callable[[BaseException], None]
    counters: SessionCounters
    client_log: ClientLog = field(default_factory=ClientLog)
    strangers: TimeSlicer | None = None
