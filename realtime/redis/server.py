"""One Redis server: a connection that comes back by itself, and the identity of the server's data."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from twisted.internet.defer import Deferred
from twisted.internet.protocol import Factory
from twisted.logger import Logger
from twisted.python.failure import Failure

from realtime.config.redis_settings import RedisSettings
from realtime.errors import EngineUnavailable
from realtime.metrics import Metrics
from realtime.process.reactor import turn_end_caller
from realtime.redis.connection import Argument, RedisConnection, RedisError, ReplyCallback
from realtime.redis.endpoints import ConnectionFactory, RedisAccess
from realtime.redis.faults import ErrorCounters, ServerFacts, explain_loss, explain_refusal
from realtime.redis.scripts import Script
from realtime.supervision.loop_time import LoopTimeLedger

IDENTITY_INTERVAL = 1.0
"""Seconds between two checks that the server still has the data that it had when we connected."""

RECONNECT_DELAYS = (0.1, 5.0)
"""Seconds before the first attempt to reconnect, and the most; they double, with jitter."""

DENIAL_MEMORY = 60.0
"""Seconds for which a server counts as faulty after it has denied a permission."""

QUEUE_LIMIT = 64 * 1024 * 1024
"""Bytes of commands that may be queued for one server in a turn of the loop."""

_log = Logger()


def _ignore(reply: Any, error: Exception | None) -> None:
    pass


class ServerPlace(Protocol):
    """Where a server is. name: for log lines; with Sentinels it changes."""

    @property
    def name(self) -> str: ...

    def connect(self, factory: Factory) -> Deferred[Any]:
        """Connect to the server that is there now. Fails with any exception."""


@dataclass(frozen=True, slots=True)
class RedisContext:
    """What all servers share. reactor: the server's own, with monotonic `seconds`."""

    settings: RedisSettings
    reactor: Any
    listener: RedisListener
    metrics: Metrics
    ledger: LoopTimeLedger


class RedisServer:
    """One server: the connection to it, made anew whenever it ends.

    name: host and port, for log lines. generation: identifies the data that the server has, by its run id and its
    replication id; it changes when they may be other data: after a restart, and when another server's replaced them.
    "" with `strict_epoch` off. is_cluster: channels belong to slots (SPUBLISH and SSUBSCRIBE in place of PUBLISH and
    SUBSCRIBE). lag: seconds of the latest answer to a check, or of the check that waits for one.
    """

    # Commands whose answers belong to the facts, besides INFO.
    further_questions: Sequence[Sequence[str]] = ()

    def __init__(
        self, place: ServerPlace, access: RedisAccess, context: RedisContext, accept: Callable[[ServerFacts], str]
    ) -> None:
        """accept: called with the facts of a server at each connection; returns why it is not the one, "" if it is."""
        self.generation = ""
        self.is_cluster = False
        self._place = place
        self._access = access
        self._context = context
        self._accept = accept
        self._reactor = context.reactor
        self._errors = ErrorCounters(context.metrics)
        self._connecting: Deferred[Any] | None = None
        self._connection: RedisConnection | None = None
        self._ready: RedisConnection | None = None  # the connection, once it is identified
        self._facts: ServerFacts | None = None
        self._further_facts = b""
        self._closed = False
        self._delay = RECONNECT_DELAYS[0]
        self._timer: Any = None  # of the next attempt, or of the next check
        self._reported = ""  # the reason that the log has, once per outage
        self._denied_at: float | None = None
        self._losses = context.metrics.counter("realtime_redis_lost_connections", "Connections to Redis that ended.")
        self._lag = 0.0
        self._checked_at: float | None = None  # the time of a check without an answer

    @property
    def name(self) -> str:
        return self._place.name

    @property
    def is_ready(self) -> bool:
        """Whether the server is connected and identified."""
        return self._ready is not None and self._ready.is_open

    @property
    def is_healthy(self) -> bool:
        """Whether the server is ready, and has not denied a permission lately."""
        denied = self._denied_at is not None and self._reactor.seconds() - self._denied_at < DENIAL_MEMORY
        return self.is_ready and not denied

    @property
    def lag(self) -> float:
        waiting = 0.0 if self._checked_at is None else self._reactor.seconds() - self._checked_at
        return max(self._lag, waiting)

    # Commands

    def call(self, done: ReplyCallback, *command: Argument) -> None:
        """Send a command. done: gets (reply, None) or (None, error): EngineUnavailable if there is no reply, and
        Redis may then have carried the command out; RedisError if Redis refused. All commands of one turn of the loop
        leave in one write."""
        if self._ready is not None:
            self._ready.call(done, *command)
        else:
            done(None, self._away())

    def run(self, done: ReplyCallback, script: Script, keys: Sequence[Argument], arguments: Sequence[Argument]) -> None:
        """Run a script, as `call` sends a command. If Redis does not know it any more, it is sent again.

        Its ARGV[1] is the generation of the server that runs it, and `arguments` follow.
        """
        if self._ready is not None:
            self._ready.run(done, script, keys, self.generation, arguments)
        else:
            done(None, self._away())

    def subscribe(self, channel: bytes, done: ReplyCallback = _ignore) -> None:
        """Subscribe to a channel; done: called before its first message. It ends with the connection."""
        if self._ready is not None:
            self._ready.subscribe(done, channel, is_sharded=self.is_cluster)
        else:
            done(None, self._away())

    def unsubscribe(self, channel: bytes, done: ReplyCallback = _ignore) -> None:
        """Undo `subscribe`; done: called after the last message."""
        if self._ready is not None:
            self._ready.unsubscribe(done, channel, is_sharded=self.is_cluster)
        else:
            done(None, self._away())

    def _away(self) -> EngineUnavailable:
        return EngineUnavailable(f"Redis {self.name} is away")

    # The connection

    def connect(self) -> None:
        """Connect, and again after every loss, until `close`."""
        self._timer = None
        connection = RedisConnection(
            self._reactor,
            turn_end_caller(self._reactor),
            self,
            self._access.io_timeout,
            QUEUE_LIMIT,
            self._context.ledger,
        )
        self._connecting = self._place.connect(ConnectionFactory(connection))
        self._connecting.addCallbacks(lambda _: self._on_connected(connection), self._on_not_connected)

    def close(self) -> None:
        """End the connection for good."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._connecting is not None:
            self._connecting.cancel()
        if self._connection is not None:
            self._connection.end("this server is leaving")

    def connect_elsewhere(self, reason: str) -> None:
        """End the connection, and ask the place again."""
        if self._connection is not None:
            self._connection.end(reason)
        self.connect_soon()

    def connect_soon(self) -> None:
        """Make the next attempt now, not after the delay. Nothing is changed while a connection is there."""
        self._delay = RECONNECT_DELAYS[0]
        if self._connection is None and self._timer is not None and not self._closed:
            self._timer.reset(0)

    def _on_connected(self, connection: RedisConnection) -> None:
        if self._closed:
            connection.end("this server is leaving")
            return
        self._connection = connection
        # Until identified it has to answer as fast as it has to connect.
        self._timer = self._reactor.callLater(
            self._access.connect_timeout, lambda: self._refuse(f"no greeting within {self._access.connect_timeout:g} s")
        )
        connection.call(self._on_greeting, *self._access.greeting)
        if self._access.db:
            connection.call(self._on_greeting, "SELECT", self._access.db)
        for question in self.further_questions:
            connection.call(self._on_further_facts, *question)
        connection.call(self._on_facts, "INFO")

    def _on_not_connected(self, failure: Failure) -> None:
        self._retry(failure.getErrorMessage())

    def _refuse(self, reason: str) -> None:
        self._timer = None
        if self._connection is not None:
            self._connection.end(reason)

    def _on_greeting(self, reply: Any, error: Exception | None) -> None:
        if isinstance(error, RedisError) and self._connection is not None:
            self._connection.end(explain_refusal(error, self._access))

    def _on_further_facts(self, reply: Any, error: Exception | None) -> None:
        self._on_greeting(reply, error)
        self._further_facts = reply or b""

    def _on_facts(self, reply: Any, error: Exception | None) -> None:
        connection = self._connection
        if connection is None or not connection.is_open:
            return
        if error is not None:
            if isinstance(error, RedisError):
                connection.end(explain_refusal(error, self._access))
            return
        facts = ServerFacts.parse(reply + self._further_facts)
        if reason := facts.unfitness or self._accept(facts):
            connection.end(reason)
            return
        assert self._timer is not None
        self._timer.cancel()
        self._timer = self._reactor.callLater(IDENTITY_INTERVAL, self._check)
        self.generation = facts.generation if self._context.settings.strict_epoch else ""
        self.is_cluster = facts.has_sharded_channels
        if self._facts is None or self._facts.warnings != facts.warnings:
            for line in facts.warnings:
                _log.warn("Redis {name}: {line}", name=self.name, line=line)
        self._facts = facts
        self._delay = RECONNECT_DELAYS[0]
        self._reported = ""
        self._checked_at = self._denied_at = None
        self._ready = connection
        _log.info("connected to {program} {name}", program=facts.program, name=self.name)
        self._context.listener.on_ready(self)

    def _check(self) -> None:
        """Compare the server's identity; a server that has other data now is connected to anew."""
        connection = self._connection

        def compare(reply: Any, error: Exception | None) -> None:
            if connection is None or error is not None or self._facts is None:
                return  # without an answer the connection has ended
            assert self._checked_at is not None
            self._lag, self._checked_at = self._reactor.seconds() - self._checked_at, None
            facts = ServerFacts.parse(reply)
            if facts.role != "master":
                connection.end("the server is a replica now")
            elif facts.replication_id != self._facts.replication_id:
                connection.end("the data of the server were replaced")
            else:
                self._timer = self._reactor.callLater(IDENTITY_INTERVAL, self._check)

        self._timer = None
        if connection is not None:
            self._checked_at = self._reactor.seconds()
            connection.call(compare, "INFO", "replication")

    def _retry(self, reason: str) -> None:
        if self._closed:
            return
        if reason != self._reported:
            # Once per outage, and again when the remedy is another one.
            is_first, self._reported = not self._reported, reason
            if is_first or reason.startswith("engine.redis"):
                _log.warn(
                    "Redis {name} is away: {reason}; connecting again until it is back", name=self.name, reason=reason
                )
        delay = self._delay * random.uniform(0.5, 1.0)
        self._delay = min(2 * self._delay, RECONNECT_DELAYS[1])
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._reactor.callLater(delay, self.connect)

    # Calls of the connection

    def on_message(self, channel: bytes, payload: bytes) -> None:
        """See `ConnectionOwner`."""
        self._context.listener.on_message(self, channel, payload)

    def on_unsubscribed(self, channel: bytes) -> None:
        """See `ConnectionOwner`."""
        self._context.listener.on_unsubscribed(self, channel)

    def on_refused(self, error: RedisError) -> Exception:
        """See `ConnectionOwner`."""
        self._errors.count(error.code)
        if error.code in ("NOPERM", "NOAUTH"):
            if self._ready is not None and self._denied_at is None:
                reason = explain_refusal(error, self._access)
                _log.error("Redis {name} denies a permission: {reason}", name=self.name, reason=reason)
            self._denied_at = self._reactor.seconds()
        elif error.code == "READONLY" and self._ready is not None:
            # The master has become a replica. Commands behind this one fail in the same way, so they lose nothing.
            self._reactor.callLater(0, self._ready.end, "the server is a replica now")
        return EngineUnavailable(error.text) if error.is_temporary else error

    def on_end(self, connection: RedisConnection, reason: str) -> None:
        """See `ConnectionOwner`."""
        was_ready = self._ready is not None
        self._connection = self._ready = None
        self._lag, self._checked_at = 0.0, None
        if was_ready:
            self._losses.value += 1
            self._context.listener.on_lost(self, reason)
        self._retry(explain_loss(reason, self._access))


class RedisListener(Protocol):
    """The user of the servers. Nothing of this may raise."""

    def on_message(self, server: RedisServer, channel: bytes, payload: bytes) -> None:
        """Handle a message on a channel that is subscribed at this server."""

    def on_ready(self, server: RedisServer) -> None:
        """Handle a fresh connection, without subscriptions: subscribe again, and check the positions of channels
        before passing their messages on."""

    def on_lost(self, server: RedisServer, reason: str) -> None:
        """Handle the end of a connection; its calls have failed."""

    def on_unsubscribed(self, server: RedisServer, channel: bytes) -> None:
        """Handle the end of a subscription by the server, whose slot moves. `on_moved` follows: subscribe again then,
        also where `RedisServers.of` is the same."""

    def on_moved(self) -> None:
        """Handle a change of `RedisServers.of`: some keys have another server now."""
