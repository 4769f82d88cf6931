"""A user of Redis servers, with awaitable calls."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import Deferred

from realtime.config.settings import RedisSettings
from realtime.metrics import Metrics
from realtime.process.transport import DirectConnector
from realtime.redis.scripts import Script
from realtime.redis.servers import RedisServer, RedisServers
from realtime.supervision.loop_time import LoopTimeLedger
from tests.system.brokers import until


class DirectReactor:
    """The reactor, with the transports of the server's own (`realtime.process.reactor.ServerReactor`)."""

    def __getattr__(self, name: str) -> Any:
        return getattr(reactor, name)

    def connectTCP(self, *arguments: Any, **more: Any) -> Any:
        connector = DirectConnector(*arguments, **{"bindAddress": None} | more, reactor=reactor)
        connector.connect()
        return connector


class User:
    """A `RedisListener` that logs. messages: received so far. losses: reasons of lost connections."""

    def __init__(self, settings: RedisSettings, reactor: Any = reactor) -> None:
        self.messages: list[tuple[bytes, bytes]] = []
        self.losses: list[str] = []
        self.metrics = Metrics()
        ledger = LoopTimeLedger(time.monotonic_ns)
        self.servers = RedisServers(settings, reactor, self, self.metrics, ledger)
        self.moves = 0
        self.lost_subscriptions: list[bytes] = []
        self.servers.start()

    @property
    def server(self) -> RedisServer:
        return self.servers.servers[0]

    async def ready(self) -> None:
        """Returns when all servers are ready."""
        await until(lambda: self.value("realtime_redis_away") == 0)

    def value(self, name: str) -> float:
        """Return the sum of the series of a metric."""
        return sum(sample.value for sample in self.metrics.snapshot([name]))

    async def close(self) -> None:
        """End the connections."""
        self.servers.close()
        await until(lambda: not any(server.is_ready for server in self.servers.servers))

    def on_message(self, server: RedisServer, channel: bytes, payload: bytes) -> None:
        self.messages.append((channel, payload))

    def on_ready(self, server: RedisServer) -> None:
        pass

    def on_lost(self, server: RedisServer, reason: str) -> None:
        self.losses.append(reason)

    def on_unsubscribed(self, server: RedisServer, channel: bytes) -> None:
        self.lost_subscriptions.append(channel)

    def on_moved(self) -> None:
        self.moves += 1

    def call(self, *command: bytes | str | int, of: str = "") -> Deferred[Any]:
        return _answer(lambda done: self.servers.of(of).call(done, *command))

    def echo(self, server: RedisServer, text: str) -> Deferred[Any]:
        """Have a server return a text."""
        return _answer(lambda done: server.call(done, "ECHO", text))

    def run(self, script: Script, keys: list[Any], arguments: list[Any], of: str = "") -> Deferred[Any]:
        return _answer(lambda done: self.servers.of(of).run(done, script, keys, arguments))

    def subscribe(self, channel: bytes, of: str = "") -> Deferred[Any]:
        return _answer(lambda done: self.servers.of(of).subscribe(channel, done))

    def unsubscribe(self, channel: bytes, of: str = "") -> Deferred[Any]:
        return _answer(lambda done: self.servers.of(of).unsubscribe(channel, done))


def _answer(ask: Callable[[Callable[[Any, Exception | None], None]], None]) -> Deferred[Any]:
    answer: Deferred[Any] = Deferred()

    def done(reply: Any, error: Exception | None) -> None:
        if error is None:
            answer.callback(reply)
        else:
            answer.errback(error)

    ask(done)
    return answer
