"""What all sessions of one worker share, wired once by the worker."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Protocol

from realtime.protocol.deadlines import Deadlines
from realtime.protocol.registry import Registry
from realtime.protocol.rules import Rules
from realtime.protocol.tokens import TokenVerifier
from realtime.pubsub.engine import Engine
from realtime.pubsub.hub import Hub
from realtime.records import ConnectRequest, Credentials, Grant
from realtime.settings import Client


class Handlers(Protocol):
    """The application's handlers, as sessions call them. They raise ClientError and Disconnect, and nothing else.

    The first argument of all but `connecting` is the `Client` that sent the command.
    """

    @property
    def connecting(self) -> Callable[[ConnectRequest], Awaitable[Credentials | None]] | None: ...

    @property
    def disconnected(self) -> Callable[[Any], Awaitable[Any]] | None: ...

    @property
    def message(self) -> Callable[[Any, Any], Awaitable[Any]] | None: ...

    @property
    def has_procedures(self) -> bool: ...

    def subscribing(self, channel: str) -> Callable[[Any, str, Any], Awaitable[Grant | None]] | None: ...

    def publishing(self, channel: str) -> Callable[[Any, str, Any], Awaitable[Any]] | None: ...

    def procedure(self, method: str) -> Callable[[Any, Any], Awaitable[Any]] | None: ...


class Runner(Protocol):
    """Starts a coroutine at once; calls `done(result, error)` when it ended, perhaps before returning."""

    def __call__(
        self, coroutine: Coroutine[Any, Any, Any], done: Callable[[Any, BaseException | None], None]
    ) -> object: ...


class Node:
    """See the module."""

    def __init__(
        self,
        *,
        settings: Client,
        rules: Rules,
        tokens: TokenVerifier,
        engine: Engine,
        hub: Hub,
        registry: Registry,
        deadlines: Deadlines,
        handlers: Handlers,
        run: Runner,
        wall_clock: Callable[[], float],
        failed: Callable[[BaseException], None],
        version: str,
        uid: str = "",
        worker: str = "",
    ) -> None:
        """wall_clock: Unix seconds, for what tokens say. failed: told of every mistake of ours, with its traceback.

        uid: of the node, the same in all its workers. worker: this worker's address, see `Engine.instruct`.
        """
        self.settings = settings
        self.rules = rules
        self.tokens = tokens
        self.engine = engine
        self.hub = hub
        self.registry = registry
        self.deadlines = deadlines
        self.handlers = handlers
        self.run = run
        self.wall_clock = wall_clock
        self.failed = failed
        self.version = version
        self.uid = uid
        self.worker = worker
