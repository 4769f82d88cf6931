"""The Redis servers of the configuration: who has a key, and connections that come back by themselves."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from twisted.internet.endpoints import HostnameEndpoint
from twisted.internet.interfaces import IStreamClientEndpoint
from twisted.internet.protocol import Factory
from twisted.logger import Logger
from twisted.python.failure import Failure

from realtime.config.redis_settings import RedisSettings
from realtime.errors import EngineUnavailable
from realtime.metrics import Metrics
from realtime.process.reactor import turn_end_caller
from realtime.redis.connection import Argument, RedisConnection, RedisError, ReplyCallback
from realtime.redis.scripts import Script
from realtime.supervision.loop_time import LoopTimeLedger

IDENTITY_INTERVAL = 1.0
"""Seconds between two checks that the server still has the data that it had when we connected."""

RECONNECT_DELAYS = (0.1, 5.0)
"""Seconds before the first attempt to reconnect, and the most; they double, with jitter."""

QUEUE_LIMIT = 64 * 1024 * 1024
"""Bytes of commands that may be queued for one server in a turn of the loop."""

_log = Logger()


def _ignore(reply: Any, error: Exception | None) -> None:
    pass


class RedisServer:
    """One server: the connection to it, made anew whenever it ends.

    name: host and port, for log lines. generation: identifies the data that the server has, by its run id and its
    replication id; it changes when they may be other data: after a restart, and when another server's replaced them.
    "" with `strict_epoch` off. is_ready: connected and identified; otherwise every call fails at once.
    is_cluster: channels belong to slots (SPUBLISH and SSUBSCRIBE in place of PUBLISH and SUBSCRIBE).
    """

    def __init__(
        self,
        name: str,
        endpoint: IStreamClientEndpoint,
        settings: RedisSettings,
        reactor: Any,
        listener: RedisListener,
        metrics: Metrics,
        ledger: LoopTimeLedger,
    ) -> None:
        """endpoint: connects to the server within a time limit of its own."""
        self.name = name
        self.generation = ""
        self.is_cluster = False
        self._endpoint = endpoint
        self._settings = settings
        self._reactor = reactor
        self._listener = listener
        self._ledger = ledger
        self._connection: RedisConnection | None = None
        self._ready: RedisConnection | None = None  # the connection, once it is identified
        self._identity: tuple[str, str] = ("", "")
        self._closed = False
        self._delay = RECONNECT_DELAYS[0]
        self._timer: Any = None  # of the next attempt, or of the next check
        self._is_reported = False
        self._losses = metrics.counter("realtime_redis_lost_connections", "Connections to Redis that ended.")
        self._lag = 0.0
        metrics.gauge(
            "realtime_redis_lag_seconds", "Time of Redis' latest answer to a check.", lambda: self._lag, server=name
        )
        metrics.gauge("realtime_redis_ready", "1 while this server answers.", lambda: self.is_ready, server=name)

    @property
    def is_ready(self) -> bool:
        """Whether the server is connected and identified."""
        return self._ready is not None and self._ready.is_open

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

        Its ARGV[1] is the generation of the server, and `arguments` follow.
        """
        if self._ready is not None:
            self._ready.run(done, script, keys, (self.generation, *arguments))
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
            self._settings.io_timeout,
            QUEUE_LIMIT,
            self._ledger,
        )
        connected = self._endpoint.connect(Factory.forProtocol(lambda: connection))
        connected.addCallbacks(self._on_connected, self._on_not_connected)

    def close(self) -> None:
        """End the connection for good."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._connection is not None:
            self._connection.end("this server is leaving")

    def _on_connected(self, connection: RedisConnection) -> None:
        if self._closed:
            connection.end("this server is leaving")
            return
        self._connection = connection
        # Until identified it has to answer as fast as it has to connect.
        self._timer = self._reactor.callLater(
            self._settings.connect_timeout, lambda: self._refuse(f"no greeting within {self._settings.connect_timeout}")
        )
        connection.call(self._on_greeting, b"HELLO", 3, *self._credentials())
        connection.call(self._on_identity, b"INFO", b"server")
        connection.call(self._on_replication, b"INFO", b"replication")

    def _credentials(self) -> list[Argument]:
        return [b"SETNAME", b"realtime"]

    def _on_not_connected(self, failure: Failure) -> None:
        self._retry(failure.getErrorMessage())

    def _refuse(self, reason: str) -> None:
        self._timer = None
        if self._connection is not None:
            self._connection.end(reason)

    def _on_greeting(self, reply: Any, error: Exception | None) -> None:
        if isinstance(error, RedisError) and self._connection is not None:
            self._connection.end(f"Redis refused the connection: {error}")

    def _on_identity(self, reply: Any, error: Exception | None) -> None:
        if error is None:
            self._identity = (_field(reply, b"run_id"), "")

    def _on_replication(self, reply: Any, error: Exception | None) -> None:
        if error is not None:
            if self._connection is not None:
                self._connection.end(f"Redis does not identify itself: {error}")
            return
        self._identity = (self._identity[0], _field(reply, b"master_replid"))
        self.generation = "/".join(self._identity) if self._settings.strict_epoch else ""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._reactor.callLater(IDENTITY_INTERVAL, self._check)
        self._delay = RECONNECT_DELAYS[0]
        self._is_reported = False
        self._ready = self._connection
        _log.info("connected to Redis {name}", name=self.name)
        self._listener.on_ready(self)

    def _check(self) -> None:
        """Compare the server's identity; a server that has other data now is connected to anew."""
        connection, sent = self._connection, self._reactor.seconds()

        def compare(reply: Any, error: Exception | None) -> None:
            if connection is None or error is not None:
                return  # without an answer the connection has ended
            self._lag = self._reactor.seconds() - sent
            if _field(reply, b"master_replid") != self._identity[1]:
                connection.end("the data of the server were replaced")
            else:
                self._timer = self._reactor.callLater(IDENTITY_INTERVAL, self._check)

        self._timer = None
        if connection is not None:
            connection.call(compare, b"INFO", b"replication")

    def _retry(self, reason: str) -> None:
        if self._closed:
            return
        if not self._is_reported:  # once per outage
            self._is_reported = True
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
        self._listener.on_message(self, channel, payload)

    def on_unsubscribed(self, channel: bytes) -> None:
        """See `ConnectionOwner`."""
        self._listener.on_moved()

    def on_end(self, connection: RedisConnection, reason: str) -> None:
        """See `ConnectionOwner`."""
        was_ready = self._ready is not None
        self._connection = self._ready = None
        if was_ready:
            self._losses.value += 1
            self._listener.on_lost(self, reason)
        self._retry(reason)


class RedisListener(Protocol):
    """The user of the servers. Nothing of this may raise."""

    def on_message(self, server: RedisServer, channel: bytes, payload: bytes) -> None:
        """Handle a message on a channel that is subscribed at this server."""

    def on_ready(self, server: RedisServer) -> None:
        """Handle a fresh connection, without subscriptions: subscribe again, and check the positions of channels
        before passing their messages on."""

    def on_lost(self, server: RedisServer, reason: str) -> None:
        """Handle the end of a connection; its calls have failed."""

    def on_moved(self) -> None:
        """Handle a change of `RedisServers.of`: some keys have another server now."""


class RedisServers:
    """All servers of the configuration. servers: each has a part of the keys."""

    def __init__(
        self,
        settings: RedisSettings,
        reactor: Any,
        listener: RedisListener,
        metrics: Metrics,
        ledger: LoopTimeLedger,
    ) -> None:
        def server(address: str) -> RedisServer:
            host, _, port = address.rpartition("/")[2].rpartition(":")
            endpoint = HostnameEndpoint(reactor, host, int(port), timeout=settings.connect_timeout)
            return RedisServer(f"{host}:{port}", endpoint, settings, reactor, listener, metrics, ledger)

        self.servers: Sequence[RedisServer] = [server(address) for address in settings.address]
        self.of: Callable[[str], RedisServer] = lambda key: self.servers[0]

    def start(self) -> None:
        """Connect; `RedisListener.on_ready` follows for each server that is there."""
        for server in self.servers:
            server.connect()

    def close(self) -> None:
        """End all connections for good."""
        for server in self.servers:
            server.close()


def _field(info: bytes | str, name: bytes) -> str:
    """Return a field of an answer to INFO, "" without it."""
    text = info.encode() if isinstance(info, str) else info
    for line in text.splitlines():
        if line.startswith(name + b":"):
            return line[len(name) + 1 :].decode()
    return ""
