"""The Redis servers of the configuration: who has a key."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, Protocol

from msgspec.structs import replace

from realtime.config.redis_addresses import RedisAddress
from realtime.config.redis_settings import RedisSettings, addresses_in_use
from realtime.metrics import Metrics, Sample
from realtime.redis.cluster import RedisCluster
from realtime.redis.endpoints import FixedPlace, RedisAccess
from realtime.redis.faults import ServerFacts
from realtime.redis.sentinel import SentinelPlace
from realtime.redis.server import RedisContext, RedisListener, RedisServer
from realtime.redis.slots import shard_of
from realtime.supervision.loop_time import LoopTimeLedger

__all__ = ["RedisListener", "RedisServer", "RedisServers"]

LAG_ALARM = 1.0
"""Seconds of a server's lag from which on it is a problem."""

_CACHED_SHARDS = 65536


class RedisServers:
    """All servers of the configuration. servers: each has a part of the keys; it changes with `on_moved`.

    of: returns the server that has all keys of a name (a channel, a user, a control channel ...); it may be away.
    """

    def __init__(
        self,
        settings: RedisSettings,
        reactor: Any,
        listener: RedisListener,
        metrics: Metrics,
        ledger: LoopTimeLedger,
    ) -> None:
        self._context = RedisContext(settings, reactor, listener, metrics, ledger)
        self._shards: list[_Shard] = [
            self._shard(number, address) for number, address in enumerate(addresses_in_use(settings))
        ]
        self.of: Callable[[str], RedisServer] = lambda name: self._shards[0].of(name)
        if len(self._shards) > 1:
            # The computation takes some microseconds.
            number = lru_cache(_CACHED_SHARDS)(lambda name: shard_of(name.encode(), len(self._shards)))
            self.of = lambda name: self._shards[number(name)].of(name)
        metrics.sources.append(self._samples)

    @property
    def servers(self) -> Sequence[RedisServer]:
        return [server for shard in self._shards for server in shard.servers]

    def start(self) -> None:
        """Connect; `RedisListener.on_ready` follows for each server that is there."""
        for shard in self._shards:
            shard.start()

    def close(self) -> None:
        """End all connections for good."""
        for shard in self._shards:
            shard.close()

    def _shard(self, number: int, address: RedisAddress) -> _Shard:
        context = self._context
        if address.topology == "cluster":
            return RedisCluster(address, context)
        if address.topology == "sentinel":
            return _WatchedServer(address, context)
        return _SingleServer(address, context, lambda: self._use_cluster(number, address))

    def _use_cluster(self, number: int, address: RedisAddress) -> None:
        """Take the whole Cluster in place of one node of it that a plain address names."""
        before, hosts = self._shards[number], address.hosts or ((address.path, 0),)
        cluster = RedisCluster(replace(address, topology="cluster", hosts=hosts), self._context)
        self._shards[number] = cluster
        before.close()
        cluster.start()

    def _samples(self) -> Iterator[Sample]:
        """The state of the servers."""
        away = lagging = 0
        for shard in self._shards:
            away += not shard.is_healthy
            for server in shard.servers:
                lagging += server.lag >= LAG_ALARM
                labels = [("server", server.name)]
                yield Sample(
                    "realtime_redis_ready", "gauge", "1 while the server answers.", labels, float(server.is_ready)
                )
                yield Sample(
                    *("realtime_redis_lag_seconds", "gauge", "Time of the server's latest answer."), labels, server.lag
                )
        yield Sample(
            *("realtime_redis_away", "gauge", "Servers, Sentinel sets and Clusters that can't be used."), [], away
        )
        yield Sample("realtime_redis_lagging", "gauge", f"Servers with a lag above {LAG_ALARM:g} s.", [], lagging)


class _Shard(Protocol):
    """What one address names. servers: the masters. is_healthy: all of them can be used."""

    @property
    def servers(self) -> Sequence[RedisServer]: ...
    @property
    def is_healthy(self) -> bool: ...
    def of(self, name: str) -> RedisServer: ...
    def start(self) -> None: ...
    def close(self) -> None: ...


class _OneServer:
    """A shard that is one server at a time. _server: the connection to it; set by the subclass."""

    _server: RedisServer

    @property
    def servers(self) -> Sequence[RedisServer]:
        return (self._server,)

    @property
    def is_healthy(self) -> bool:
        return self._server.is_healthy

    def of(self, name: str) -> RedisServer:
        return self._server


class _SingleServer(_OneServer):
    """One server at a fixed place. on_cluster: called when it turns out to be a node of a Cluster."""

    def __init__(self, address: RedisAddress, context: RedisContext, on_cluster: Callable[[], None]) -> None:
        access = RedisAccess.to_server(address, context.settings)
        host, port = address.hosts[0] if address.hosts else (address.path, 0)
        self._on_cluster = on_cluster
        self._server = RedisServer(FixedPlace(context.reactor, access, host, port), access, context, self._accept)

    def start(self) -> None:
        self._server.connect()

    def close(self) -> None:
        self._server.close()

    def _accept(self, facts: ServerFacts) -> str:
        if facts.mode == "cluster":
            self._on_cluster()
            return "it is a node of a Cluster"
        return "" if facts.role == "master" else "it is a replica; name its master, or the Sentinels"


class _WatchedServer(_OneServer):
    """The master of a set of Sentinels."""

    def __init__(self, address: RedisAddress, context: RedisContext) -> None:
        access = RedisAccess.to_server(address, context.settings)
        self._place = SentinelPlace(address, access, context, self._move)
        self._server = RedisServer(self._place, access, context, self._accept)
        self._is_named = False

    def start(self) -> None:
        self._place.start()

    def close(self) -> None:
        self._place.close()
        self._server.close()

    def _move(self) -> None:
        if self._is_named:
            self._server.connect_elsewhere("the Sentinels name another master")
        else:
            self._is_named = True
            self._server.connect()

    def _accept(self, facts: ServerFacts) -> str:
        if not self._place.is_current:
            return "the Sentinels name another master"
        return "" if facts.role == "master" else "it is a replica; waiting for the Sentinels"
