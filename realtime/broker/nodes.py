"""The nodes that share one Redis, and the orders between them.

Each run of a node's broker announces itself in Redis every few seconds. Redis' clock alone decides how old an
announcement is. A run has ended for the others when they have not seen an announcement for `dead_after` seconds, during
which they themselves saw Redis all the time: no run ends while Redis, or this node, is stopped. A run that stops says
so, and a new run of the same node ends the earlier ones.

All nodes receive the messages on one channel, and each node those on a channel of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import msgspec
from msgspec import Struct
from twisted.logger import Logger

from realtime.metrics import Metrics
from realtime.redis.scripts import Script
from realtime.redis.servers import RedisServer
from realtime.types import NodeInfo

ANNOUNCE_INTERVAL = 3.0
"""Seconds between two announcements, at most."""

LISTED = 7.0
"""Seconds for which a node without a further announcement is still listed and counted."""

SUPERSEDED = 5.0
"""Seconds, at most, after which the earlier runs of a node have ended: until then its workers restore their clients."""

ALL = "all"
"""Name of the channel of all nodes."""

ANNOUNCE = Script("""
local run, info, lifetime = unpack(ARGV, 2)
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('HSET', KEYS[1], run, string.format('%016d', now) .. info)
redis.call('PEXPIRE', KEYS[1], lifetime)
local result = {now}
local all = redis.call('HGETALL', KEYS[1])
for at = 1, #all, 2 do
  local age = now - tonumber(string.sub(all[at + 1], 1, 16))
  if age > tonumber(lifetime) then
    redis.call('HDEL', KEYS[1], all[at])
  else
    result[#result + 1] = {all[at], age, string.sub(all[at + 1], 17)}
  end
end
return result
""")
"""Announces a run. Arguments: its name, its NodeInfo, milliseconds to live.

Returns the time in milliseconds, then of each run its name, the age of its announcement in milliseconds, and its
NodeInfo.
"""


class NodeOrder(Struct, array_like=True, frozen=True, tag=1):
    """An order for the workers of other nodes. The fields are those of `engine.SendOrder`."""

    version: Literal[1]
    node: str
    order: bytes
    worker: str = ""
    session: str = ""


class NodeEnded(Struct, array_like=True, frozen=True, tag=2):
    """A run of a broker that has ended."""

    version: Literal[1]
    node: str
    run: str


class NodeChanged(Struct, array_like=True, frozen=True, tag=3):
    """A run of a broker with other numbers of workers than before, or a new one."""

    version: Literal[1]
    node: str
    run: str
    info: NodeInfo


NodeMessage = NodeOrder | NodeEnded | NodeChanged

_log = Logger()

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(NodeMessage).decode
_decode_info = msgspec.msgpack.Decoder(NodeInfo).decode


class _Run(Struct):
    """Another run of a broker.

    seen: the time of its latest announcement, by this process's clock. has_left: it has said so. superseded: the time
    when a later run of the same node was first seen. is_reported: its end has been passed on.
    """

    info: NodeInfo
    seen: float
    has_left: bool = False
    superseded: float = math.inf
    is_reported: bool = False


class Nodes:
    """See the module.

    run: the name of this run. describe: returns this node with its numbers. server, topic: the server and the name in
    Redis of the channel ALL, which the owner subscribes to, as to the channel of this node's id. key: of the registry,
    on the server of ALL. deliver: hands an order to workers of this node. ended: called once for each run that has
    ended. dead_after: see the module. now: this process's clock.
    """

    def __init__(
        self,
        run: str,
        describe: Callable[[], NodeInfo],
        server: Callable[[str], RedisServer],
        topic: Callable[[str], bytes],
        key: bytes,
        deliver: Callable[[NodeOrder], object],
        ended: Callable[[str], object],
        dead_after: float,
        now: Callable[[], float],
        metrics: Metrics,
    ) -> None:
        self._run = run
        self._describe = describe
        self._uid = describe().uid
        self._server = server
        self._topic = topic
        self._key = key
        self._deliver = deliver
        self._ended = ended
        self._dead_after = dead_after
        self._interval = min(ANNOUNCE_INTERVAL, dead_after / 6)
        self._listed = min(LISTED, dead_after)
        self._restoring = min(SUPERSEDED, dead_after / 2)
        self._now = now
        self._runs: dict[str, _Run] = {}
        self._watching_since = math.inf  # this process has seen Redis all the time since
        self._seen_at = -math.inf  # time of the latest answer of Redis, by this process's clock and by Redis'
        self._redis_time = 0.0
        self._announced_at = -math.inf
        self._workers = -1
        self._dropped = metrics.counter(
            "realtime_node_messages_dropped", "Messages of other nodes that could not be decoded."
        )
        metrics.gauge("realtime_nodes", "Nodes that share this Redis, this one included.", lambda: len(self.infos()))

    # Announcements

    def on_ready(self) -> None:
        """Handle a fresh connection to the server of the registry: announce this run at once."""
        self._watching_since = math.inf
        self._workers = -1
        self.announce()

    def on_lost(self) -> None:
        """Handle the end of the connection: no run ends while this node can't see it."""
        self._watching_since = math.inf

    def tick(self) -> None:
        """Announce this run if it is due. Call it several times a second."""
        if self._now() - self._announced_at >= self._interval or self._describe().workers != self._workers:
            self.announce()

    def announce(self) -> None:
        """Announce this run, and learn of the others."""
        server, info = self._server(ALL), self._describe()
        self._announced_at = self._now()
        if not server.is_ready:
            return
        if self._announced_at - self._seen_at > self._dead_after / 2:
            # After a pause the others must know before this node adds its clients again.
            self._publish(ALL, NodeChanged(1, self._uid, self._run, info), _ignore)
        has_changed, self._workers = info.workers != self._workers, info.workers

        def announced(reply: Any, error: Exception | None) -> None:
            # A node that subscribes too late for the message finds the announcement.
            if has_changed and error is None:
                self._publish(ALL, NodeChanged(1, self._uid, self._run, info), _ignore)
            self._on_announced(reply, error)

        lifetime = math.ceil(3000 * self._dead_after)
        server.run(announced, ANNOUNCE, (self._key,), (self._run, _encode(info), lifetime))

    def leave(self, done: Callable[[Any, Exception | None], None]) -> None:
        """End this run for the others; done: called when Redis knows, or can't be reached."""
        self._publish(ALL, NodeEnded(1, self._uid, self._run), _ignore)
        self._server(ALL).call(done, b"HDEL", self._key, self._run)

    def _on_announced(self, reply: Any, error: Exception | None) -> None:
        now = self._now()
        if error is not None:
            self._watching_since = math.inf
            return
        redis_time = reply[0] / 1000
        elapsed, elapsed_there = now - self._seen_at, redis_time - self._redis_time
        # A longer pause of this node or of Redis, or a step of Redis' clock: the ages of the others say nothing yet.
        if elapsed > self._dead_after / 2 or abs(elapsed - elapsed_there) > self._dead_after / 4:
            self._watching_since = now
        self._watching_since = min(self._watching_since, now)
        self._seen_at, self._redis_time = now, redis_time
        for run, age, packed in reply[1:]:
            try:
                self._see(_text(run), _decode_info(packed), now - age / 1000)
            except (ValueError, RecursionError):
                self._dropped.value += 1
        known = now - 3 * self._dead_after
        self._runs = {run: other for run, other in self._runs.items() if other.seen > known}
        self._supersede_silent()
        self._report_ends()

    def _see(self, run: str, info: NodeInfo, seen: float) -> None:
        if run == self._run:
            return
        other = self._runs.get(run)
        if other is None:
            self._runs[run] = _Run(info, seen)
            _log.info("node {name} ({uid}) shares Redis with this one", name=info.name, uid=info.uid)
        elif seen >= other.seen:
            if other.is_reported and not (other.has_left or other.superseded < math.inf):
                other.is_reported = False
                _log.info("node {name} ({uid}) is back", name=info.name, uid=info.uid)
            other.info, other.seen = info, seen

    def _report_ends(self) -> None:
        for run, other in self._runs.items():
            if not other.is_reported and self.is_dead(run):
                other.is_reported = True
                _log.info(
                    "node {name} ({uid}) {how}; its clients leave",
                    name=other.info.name,
                    uid=other.info.uid,
                    how="has left" if other.has_left else f"has been silent for {self._now() - other.seen:.0f} s",
                )
                self._ended(run)

    def _supersede(self, uid: str, latest: str) -> None:
        """End the other runs of a node."""
        for run, other in self._runs.items():
            if other.info.uid == uid and run != latest:
                other.superseded = min(other.superseded, self._now())

    def _supersede_silent(self) -> None:
        """End runs that are silent while another run of the same node is not."""
        latest: dict[str, tuple[float, str]] = {self._uid: (math.inf, self._run)}
        for run, other in self._runs.items():
            latest[other.info.uid] = max(latest.get(other.info.uid, (-math.inf, "")), (other.seen, run))
        for other in self._runs.values():
            seen, run = latest[other.info.uid]
            if other.seen < seen - self._interval:
                self._supersede(other.info.uid, run)

    def is_dead(self, run: str) -> bool:
        """Whether the clients of a run have to leave."""
        if run == self._run:
            return False
        now, other = self._now(), self._runs.get(run)
        if other is not None and (other.has_left or now - other.superseded > self._restoring):
            return True
        seen = other.seen if other is not None else -math.inf
        return now - max(seen, self._watching_since) > self._dead_after

    def infos(self) -> list[NodeInfo]:
        """Return the nodes that are there, this one first."""
        return [self._describe(), *sorted(self._others(), key=lambda info: (info.name, info.uid))]

    def _others(self) -> Iterator[NodeInfo]:
        now = self._now()
        for other in self._runs.values():
            if now - other.seen <= self._listed and not other.has_left and other.superseded == math.inf:
                yield other.info

    # Messages

    def on_message(self, payload: bytes) -> None:
        """Handle a message to all nodes, or to this one."""
        try:
            message = _decode(payload)
        except (ValueError, RecursionError):
            self._dropped.value += 1
            return
        match message:
            case NodeOrder(node=node):
                if node != self._uid or message.worker:
                    self._deliver(message)
            case NodeEnded(run=run):
                if run in self._runs:
                    self._runs[run].has_left = True
                    self._report_ends()
            case NodeChanged(run=run, info=info):
                if run not in self._runs and run != self._run:
                    self._supersede(info.uid, run)
                self._see(run, info, self._now())

    def send_to_all(self, order: bytes, done: Callable[[int, Exception | None], None]) -> None:
        """Send an order to all other nodes. done: gets the number of their workers, or the error."""

        def sent(_: Any, error: Exception | None) -> None:
            # Nodes that are silent, too: the caller notices that their answers are missing.
            there = (
                other for run, other in self._runs.items() if other.superseded == math.inf and not self.is_dead(run)
            )
            done(sum(other.info.workers for other in there), error)

        self._publish(ALL, NodeOrder(1, self._uid, order), sent)

    def send_to(
        self, node: str, worker: str, session: str, order: bytes, done: Callable[[int, Exception | None], None]
    ) -> None:
        """Send an order to one worker of another node. done: gets 1, 0 if the node is not there, or the error.

        A client may have made the name up: only the names of nodes become names of channels.
        """
        if not any(other.info.uid == node and not other.has_left for other in self._runs.values()):
            done(0, None)
            return

        def sent(receivers: Any, error: Exception | None) -> None:
            done(int(error is None and receivers > 0), error)

        self._publish(node, NodeOrder(1, self._uid, order, worker, session), sent)

    def _publish(self, name: str, message: NodeMessage, done: Callable[[Any, Exception | None], None]) -> None:
        server = self._server(name)
        server.call(done, b"SPUBLISH" if server.is_cluster else b"PUBLISH", self._topic(name), _encode(message))


def _text(reply: bytes | str) -> str:
    return reply.decode() if isinstance(reply, bytes) else reply


def _ignore(reply: Any, error: Exception | None) -> None:
    pass
