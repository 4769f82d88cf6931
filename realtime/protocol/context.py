"""What all sessions of one worker share, wired once by the worker."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Protocol

from realtime import errors
from realtime.auth.tokens import TokenVerifier
from realtime.config.settings import ClientSettings, RPCPingSettings
from realtime.deadlines import Deadlines
from realtime.metrics import Counter, Metrics
from realtime.protocol.channel_rules import ChannelRules
from realtime.protocol.messages import REQUESTS
from realtime.protocol.sessions import Sessions
from realtime.pubsub.engine import Engine
from realtime.pubsub.hub import Hub
from realtime.pubsub.time_slices import TimeSlicer
from realtime.types import ConnectRequest, Credentials, Grant

# What each disconnect that is the client's fault is counted as.
_FAULTS = {
    errors.NO_PONG[0]: "no_pong",
    errors.TOO_MANY_COMMANDS[0]: "command_flood",
    errors.INVALID_TOKEN[0]: "token",
    errors.BAD_PROTOCOL[0]: "command",
    errors.STALE[0]: "stale",
    errors.CONNECTION_LIMIT[0]: "user_connections",
    errors.CHANNEL_LIMIT[0]: "channels",
    errors.INAPPROPRIATE_PROTOCOL[0]: "encoding",
    errors.TOO_MANY_ERRORS[0]: "command_errors",
}
# What else is counted as bad input: a command over the rate, and a position that the store has not come to yet.
_REFUSED = ("command_rate", "recovery_ahead")


class CommandHandler(Protocol):
    """One handler, called with a `ClientSettings` and what it sent."""

    @property
    def prompt(self) -> bool:
        """Whether it may be called by `now` now: it waits for nothing, and nothing speaks against it."""

    def now(self, client: Any, data: Any, /) -> Any:
        """Call it, and have its answer. Raises as its coroutine."""

    def __call__(self, client: Any, data: Any, /) -> Awaitable[Any]: ...


class Handlers(Protocol):
    """The application's handlers, as sessions call them. They raise ClientError and Disconnect, and nothing else.

    The first argument of all but `connecting` is the `ClientSettings` that sent the command.
    """

    @property
    def connecting(self) -> Callable[[ConnectRequest], Awaitable[Credentials | None]] | None: ...

    @property
    def disconnected(self) -> Callable[[Any], Awaitable[Any]] | None: ...

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


class WorkerContext:
    """See the module."""

    def __init__(
        self,
        *,
        settings: ClientSettings,
        rules: ChannelRules,
        tokens: TokenVerifier,
        engine: Engine,
        hub: Hub,
        registry: Sessions,
        deadlines: Deadlines,
        handlers: Handlers,
        run: Runner,
        together: Gather,
        wall_clock: Callable[[], float],
        failed: Callable[[BaseException], None],
        version: str,
        uid: str = "",
        worker: str = "",
        metrics: Metrics | None = None,
        rpc_ping: RPCPingSettings | None = None,
        slices: TimeSlicer | None = None,
    ) -> None:
        """wall_clock: Unix seconds, for what tokens say. failed: told of every mistake of ours, with its traceback.

        together: as for `Operations`. uid: of the node, the same in all its workers. worker: this worker's address, see
        `Engine.instruct`.
        metrics: where commands and bad input are counted. slices: for long work; None for no limit.
        """
        self.settings = settings
        self.rules = rules
        self.tokens = tokens
        self.engine = engine
        self.hub = hub
        self.slices = slices or TimeSlicer.unlimited()
        self.registry = registry
        self.deadlines = deadlines
        self.handlers = handlers
        self.run = run
        self.together = together
        self.wall_clock = wall_clock
        self.failed = failed
        self.version = version
        self.uid = uid
        self.worker = worker
        self.rpc_ping = rpc_ping or RPCPingSettings()
        self._metrics = metrics or Metrics()
        self.commands = {
            name: self._metrics.counter("realtime_commands", "Commands of clients", command=name) for name in REQUESTS
        }
        self.refused = {kind: self._bad_input(kind) for kind in (*_FAULTS.values(), *_REFUSED)}

    def _bad_input(self, kind: str) -> Counter:
        return self._metrics.counter("realtime_bad_input", "Refused input and faults of peers", kind=kind)

    def count_disconnect(self, code: int) -> None:
        """Count a disconnect, if it is for what the client did."""
        kind = _FAULTS.get(code)
        if kind is not None:
            self.refused[kind].value += 1

    def count_error(self, command: str, code: int) -> None:
        """Count an error reply. The application's own codes are one."""
        label = str(code) if code < 400 else "application"
        self._metrics.counter("realtime_command_errors", "Commands that failed", command=command, code=label).value += 1
