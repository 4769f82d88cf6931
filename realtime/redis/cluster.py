"""A Redis Cluster: its masters, the slots that each of them has, and commands that come to the wrong one.

The map of slots comes from CLUSTER SLOTS. It is read again when a node redirects a command, denies a slot or is lost,
and every few seconds. A command that a node redirects is sent once more, to the node that it names.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from twisted.internet.defer import Deferred
from twisted.logger import Logger

from realtime.config.redis_addresses import RedisAddress
from realtime.errors import EngineUnavailable
from realtime.process.reactor import turn_end_caller
from realtime.redis.connection import Argument, RedisConnection, RedisError, ReplyCallback
from realtime.redis.endpoints import ConnectionFactory, FixedPlace, RedisAccess
from realtime.redis.faults import ServerFacts, explain_refusal
from realtime.redis.keys import hash_tag
from realtime.redis.scripts import Script
from realtime.redis.server import QUEUE_LIMIT, RedisContext, RedisServer
from realtime.redis.slots import SLOTS, slot_of

REFRESH_INTERVAL = 5.0
"""Seconds between two readings of the map of slots: a moved slot without commands shows only there."""

FAILOVER_INTERVAL = 0.5
"""Seconds between two readings while a master is away: another one takes over as soon as the Cluster has elected it."""

REFRESH_PAUSE = 0.1
"""Seconds between two readings, at least, when nodes redirect commands."""

RETRY_DELAY = 0.1
"""Seconds before the second attempt at a command during a migration of its slot, or an election."""

Host = tuple[str, int]

_REDIRECTS = ("MOVED", "ASK")
_LATER = ("TRYAGAIN", "CLUSTERDOWN")
_log = Logger()

Send = Callable[[RedisServer, ReplyCallback], None]
"""Sends a command to a server."""


class RedisCluster:
    """See the module. servers: the masters. `RedisListener.on_moved` is called when slots have another one."""

    def __init__(self, address: RedisAddress, context: RedisContext) -> None:
        self.servers: Sequence[RedisServer] = ()
        self._name = address.name
        self._seeds = list(address.hosts)
        self._access = RedisAccess.to_server(address, context.settings)
        self._context = context
        self._reactor = context.reactor
        self._nodes: dict[Host, ClusterNode] = {}
        self._replicas: list[Host] = []
        # Answers every call with an error: the server of slots that no node has.
        self._nowhere = ClusterNode(self, ("no node", 0), self._access, context)
        self._slots: list[RedisServer] = [self._nowhere] * SLOTS
        self._timer: Any = None
        self._question: _Question | None = None
        self._is_reading = self._is_outdated = self._has_lost_subscription = False
        self._is_closed = False
        self._is_reported = False
        self._read_at = -REFRESH_PAUSE

    @property
    def is_healthy(self) -> bool:
        """Whether every slot has a master, and all of them can be used."""
        return self._nowhere not in self._slots and all(server.is_healthy for server in self.servers)

    def of(self, name: str) -> RedisServer:
        """Return the server with the slot of a name's keys."""
        return self._slots[slot_of(hash_tag(name))]

    def start(self) -> None:
        """Read the map, and connect to the masters."""
        self._read()

    def close(self) -> None:
        """End all connections for good."""
        self._is_closed = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._question is not None:
            self._question.close()
        for server in self.servers:
            server.close()

    def refresh(self) -> None:
        """Read the map soon, as slots may have moved."""
        if self._is_reading:
            self._is_outdated = True
        elif self._timer is not None:
            wait = max(0.0, self._read_at + REFRESH_PAUSE - self._reactor.seconds())
            if self._timer.getTime() - self._reactor.seconds() > wait:
                self._timer.reset(wait)

    def note_lost_subscription(self) -> None:
        """Call `on_moved` after the next reading, even if it shows no change: while a slot moves, a node refuses or
        ends subscriptions that it takes a moment later."""
        self._has_lost_subscription = True
        self.refresh()

    # The map

    def _read(self) -> None:
        self._timer = None
        self._is_reading = True
        self._read_at = self._reactor.seconds()
        ready = [(host, node) for host, node in self._nodes.items() if node.is_ready]
        if ready:
            asked, node = random.choice(ready)
            node.call_here(lambda reply, error: self._on_slots(reply, error, asked), "CLUSTER", "SLOTS")
            return
        candidates = list(dict.fromkeys([*self._nodes, *self._replicas, *self._seeds]))
        random.shuffle(candidates)
        self._read_from(candidates, "")

    def _read_from(self, candidates: list[Host], reason: str) -> None:
        """Ask one candidate after the other, over a connection of its own."""
        if self._is_closed:
            return
        if not candidates:
            self._fail(reason)
            return
        host, *others = candidates
        place = FixedPlace(self._reactor, self._access, *host)

        def settle(reply: Any, error: Exception | None) -> None:
            if error is None:
                self._on_slots(reply, None, host)
            else:
                self._read_from(others, f"{place.name}: {error}")

        self._question = _Question(place, self._access, self._context, settle, "CLUSTER", "SLOTS")

    def _fail(self, reason: str) -> None:
        if not self._is_reported:
            self._is_reported = True
            _log.warn("Redis Cluster {name} is away: {reason}; asking again", name=self._name, reason=reason)
        self._wait(1.0)

    def _wait(self, seconds: float) -> None:
        self._is_reading = False
        if not self._is_closed:
            self._timer = self._reactor.callLater(seconds * random.uniform(0.7, 1.0), self._read)

    def _on_slots(self, reply: Any, error: Exception | None, asked: Host) -> None:
        if self._is_closed:
            return
        if error is not None or not reply:
            self._fail(str(error) if error else "its nodes have no slots yet")
            return
        self._is_reported = False
        slots: list[RedisServer] = [self._nowhere] * SLOTS
        masters: dict[Host, ClusterNode] = {}
        self._replicas = []
        for first, last, master, *replicas in reply:
            host = _host(master, asked)
            node = masters.get(host) or self._nodes.get(host) or ClusterNode(self, host, self._access, self._context)
            masters[host] = node
            slots[first : last + 1] = [node] * (last + 1 - first)
            self._replicas += [_host(replica, asked) for replica in replicas]
        self._take(masters, slots)
        are_ready = self._nowhere not in slots and all(node.is_ready for node in masters.values())
        is_outdated, self._is_outdated = self._is_outdated, False
        self._wait(REFRESH_PAUSE if is_outdated else REFRESH_INTERVAL if are_ready else FAILOVER_INTERVAL)

    def _take(self, masters: dict[Host, ClusterNode], slots: list[RedisServer]) -> None:
        """Use a map from now on."""
        added = [node for host, node in masters.items() if host not in self._nodes]
        removed = [node for host, node in self._nodes.items() if host not in masters]
        have_moved = self._slots != slots or self._has_lost_subscription
        self._has_lost_subscription = False
        self._nodes, self._slots, self.servers = masters, slots, tuple(masters.values())
        for node in removed:
            node.close()
        for node in added:
            node.connect()
        if have_moved:
            self._context.listener.on_moved()

    # Redirected commands

    def redirect(self, node: RedisServer, error: RedisError, done: ReplyCallback, send: Send) -> None:
        """Send a refused command once more: where the node says, or after a moment to the same."""
        self.refresh()

        def settle(reply: Any, again: Exception | None) -> None:
            is_refusal = isinstance(again, RedisError) and again.code in (*_REDIRECTS, *_LATER)
            done(reply, EngineUnavailable(str(again)) if is_refusal else again)

        if error.code in _LATER:
            self._reactor.callLater(RETRY_DELAY, send, node, settle)
            return
        host, _, port = error.text.split(" ")[-1].rpartition(":")
        target = self._nodes.get((host or node.name.rpartition(":")[0], int(port) if port.isdecimal() else 0))
        if target is None or not target.is_ready:
            done(None, EngineUnavailable(error.text))
        else:
            if error.code == "ASK":
                target.call_here(_ignore, "ASKING")
            send(target, settle)


class ClusterNode(RedisServer):
    """A master of a Cluster. Its calls follow redirections."""

    further_questions = (("CLUSTER", "INFO"),)

    def __init__(self, cluster: RedisCluster, host: Host, access: RedisAccess, context: RedisContext) -> None:
        super().__init__(FixedPlace(context.reactor, access, *host), access, context, _accept)
        self._cluster = cluster

    def call_here(self, done: ReplyCallback, *command: Argument) -> None:
        """Send a command that no other node can carry out."""
        super().call(done, *command)

    def call(self, done: ReplyCallback, *command: Argument) -> None:
        """See `RedisServer`."""

        def send(server: RedisServer, done: ReplyCallback) -> None:
            RedisServer.call(server, done, *command)

        send(self, self._following(done, send))

    def run(self, done: ReplyCallback, script: Script, keys: Sequence[Argument], arguments: Sequence[Argument]) -> None:
        """See `RedisServer`."""

        def send(server: RedisServer, done: ReplyCallback) -> None:
            RedisServer.run(server, done, script, keys, arguments)

        send(self, self._following(done, send))

    def _following(self, done: ReplyCallback, send: Send) -> ReplyCallback:
        def settle(reply: Any, error: Exception | None) -> None:
            if isinstance(error, RedisError) and error.code in (*_REDIRECTS, *_LATER):
                self._cluster.redirect(self, error, done, send)
            else:
                done(reply, error)

        return settle

    def subscribe(self, channel: bytes, done: ReplyCallback | None = None) -> None:
        """See `RedisServer`. A redirected subscription fails; `on_moved` follows."""

        def settle(reply: Any, error: Exception | None) -> None:
            if isinstance(error, RedisError) and error.code in (*_REDIRECTS, *_LATER):
                self._cluster.note_lost_subscription()
                error = EngineUnavailable(error.text)
            if done is not None:
                done(reply, error)

        super().subscribe(channel, settle)

    def on_refused(self, error: RedisError) -> Exception:
        """See `ConnectionOwner`."""
        known = super().on_refused(error)
        return error if error.code in (*_REDIRECTS, *_LATER) else known

    def on_unsubscribed(self, channel: bytes) -> None:
        """See `ConnectionOwner`: the channel's slot has moved."""
        super().on_unsubscribed(channel)
        self._cluster.note_lost_subscription()

    def on_end(self, connection: RedisConnection, reason: str) -> None:
        """See `ConnectionOwner`."""
        super().on_end(connection, reason)
        self._cluster.refresh()


class _Question:
    """One command over a connection of its own. done: called once."""

    def __init__(
        self, place: FixedPlace, access: RedisAccess, context: RedisContext, done: ReplyCallback, *command: Argument
    ) -> None:
        self._access = access
        self._done: ReplyCallback | None = done
        self._command = command
        self._connection = connection = RedisConnection(
            context.reactor,
            turn_end_caller(context.reactor),
            self,
            access.connect_timeout,
            QUEUE_LIMIT,
            context.ledger,
        )
        self._connecting: Deferred[Any] = place.connect(ConnectionFactory(connection))
        self._connecting.addCallbacks(
            lambda _: self._ask(), lambda failure: self._settle(None, EngineUnavailable(failure.getErrorMessage()))
        )

    def close(self) -> None:
        """End the connection; idempotent."""
        self._connecting.cancel()
        self._connection.end("this server is leaving")

    def _ask(self) -> None:
        self._connection.call(self._on_greeting, *self._access.greeting)
        self._connection.call(self._settle, *self._command)

    def _on_greeting(self, reply: Any, error: Exception | None) -> None:
        if isinstance(error, RedisError):
            self._settle(None, EngineUnavailable(explain_refusal(error, self._access)))

    def _settle(self, reply: Any, error: Exception | None) -> None:
        done, self._done = self._done, None
        if done is not None:
            self._connection.end("answered")
            done(reply, error)

    # Calls of the connection

    def on_message(self, channel: bytes, payload: bytes) -> None:
        """See `ConnectionOwner`. There are no subscriptions."""

    def on_unsubscribed(self, channel: bytes) -> None:
        """See `ConnectionOwner`. There are no subscriptions."""

    def on_refused(self, error: RedisError) -> Exception:
        """See `ConnectionOwner`."""
        return error

    def on_end(self, connection: RedisConnection, reason: str) -> None:
        """See `ConnectionOwner`."""
        self._settle(None, EngineUnavailable(reason))


def _ignore(reply: Any, error: Exception | None) -> None:
    pass


def _accept(facts: ServerFacts) -> str:
    return "" if facts.mode == "cluster" and facts.role == "master" else "the node is no master of the Cluster now"


def _host(node: Sequence[Any], asked: Host) -> Host:
    """Return host and port of a node in an answer to CLUSTER SLOTS. A node that knows no own address has none."""
    host = node[0].decode() if node[0] else ""
    return host if host and host != "?" else asked[0], int(node[1])
