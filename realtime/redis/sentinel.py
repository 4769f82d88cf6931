"""The master of a set of Sentinels: each Sentinel is asked, and tells at once when it has named another one.

A connection to each Sentinel stays open. What most of the reachable Sentinels name counts; the server that they name
must call itself a master, too (`RedisServer`), as a demoted one is named for some seconds after a failover.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.protocol import Factory
from twisted.logger import Logger
from twisted.python.failure import Failure

from realtime.config.redis_addresses import RedisAddress
from realtime.process.reactor import turn_end_caller
from realtime.redis.connection import RedisConnection, RedisError
from realtime.redis.endpoints import ConnectionFactory, FixedPlace, RedisAccess, format_host
from realtime.redis.faults import explain_loss, explain_refusal
from realtime.redis.server import QUEUE_LIMIT, RedisContext

ASK_INTERVAL = 1.0
"""Seconds between two questions to a Sentinel: a message about another master may be lost with its connection."""

RECONNECT_DELAY = 1.0
"""Seconds before the next connection to a Sentinel, with jitter."""

Master = tuple[str, int]
"""Host and port."""

_SWITCHED = b"+switch-master"
_log = Logger()


class SentinelPlace:
    """The place of the master. See `ServerPlace`.

    on_change: called when the Sentinels name another master than before, also the first.
    """

    def __init__(
        self, address: RedisAddress, server_access: RedisAccess, context: RedisContext, on_change: Callable[[], None]
    ) -> None:
        self._master_name = address.sentinel_master_name or context.settings.sentinel_master_name
        self._access = server_access
        self._reactor = context.reactor
        self._on_change = on_change
        self._named: Master | None = None
        self._tried: Master | None = None
        access = RedisAccess.to_sentinel(address, context.settings)
        self._sentinels = [
            _Sentinel(FixedPlace(context.reactor, access, host, port), access, self._master_name, context, self._vote)
            for host, port in address.hosts
        ]

    @property
    def name(self) -> str:
        return self._master_name + (f" ({format_host(*self._named)})" if self._named else "")

    @property
    def is_current(self) -> bool:
        """Whether the master of the latest connection is still the one that the Sentinels name."""
        return self._tried == self._named

    def start(self) -> None:
        """Connect to the Sentinels, for as long as the place is not closed."""
        for sentinel in self._sentinels:
            sentinel.connect()

    def close(self) -> None:
        """End the connections to the Sentinels."""
        for sentinel in self._sentinels:
            sentinel.close()

    def connect(self, factory: Factory) -> Deferred[Any]:
        """Connect to the master. Called once the Sentinels have named one."""
        assert self._named is not None
        self._tried = self._named
        return FixedPlace(self._reactor, self._access, *self._named).connect(factory)

    def _vote(self) -> None:
        """Take the master that most Sentinels name. In a tie the one in use stays."""
        votes = Counter(sentinel.master for sentinel in self._sentinels if sentinel.master)
        if not votes:
            return
        [(master, most)] = votes.most_common(1)
        if master != self._named and (self._named is None or votes[self._named] < most):
            if self._named is not None:
                _log.info(
                    "the Sentinels have replaced {before} by {now} as {master}",
                    before=format_host(*self._named),
                    now=format_host(*master),
                    master=self._master_name,
                )
            self._named = master
            self._on_change()


class _Sentinel:
    """A connection to one Sentinel. master: what it names; None while it does not answer."""

    def __init__(
        self,
        place: FixedPlace,
        access: RedisAccess,
        master_name: str,
        context: RedisContext,
        on_answer: Callable[[], None],
    ) -> None:
        self.master: Master | None = None
        self._is_reported = False
        self._connecting: Deferred[Any] | None = None
        self._place = place
        self._access = access
        self._master_name = master_name
        self._context = context
        self._reactor = context.reactor
        self._on_answer = on_answer
        self._connection: RedisConnection | None = None
        self._timer: Any = None
        self._is_closed = False

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
        self._is_closed = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._connecting is not None:
            self._connecting.cancel()
        if self._connection is not None:
            self._connection.end("this server is leaving")

    def _on_connected(self, connection: RedisConnection) -> None:
        if self._is_closed:
            connection.end("this server is leaving")
            return
        self._connection = connection
        connection.call(self._on_reply, *self._access.greeting)
        connection.subscribe(self._on_reply, _SWITCHED)
        self._ask()

    def _ask(self) -> None:
        self._timer = None
        if self._connection is not None:
            self._connection.call(self._on_master, "SENTINEL", "GET-MASTER-ADDR-BY-NAME", self._master_name)

    def _on_not_connected(self, failure: Failure) -> None:
        self._retry(failure.getErrorMessage())

    def _on_reply(self, reply: Any, error: Exception | None) -> None:
        if isinstance(error, RedisError) and self._connection is not None:
            self._connection.end(explain_refusal(error, self._access))

    def _on_master(self, reply: Any, error: Exception | None) -> None:
        connection = self._connection
        if connection is None or not connection.is_open:
            return
        if error is not None:
            self._on_reply(reply, error)
        elif reply is None:
            connection.end(f"engine.redis.sentinel_master_name: {self._place.name} knows no {self._master_name!r}")
        else:
            host, port = reply
            self._timer = self._reactor.callLater(ASK_INTERVAL, self._ask)
            self._name(host.decode(), int(port))

    def _name(self, host: str, port: int) -> None:
        self._is_reported = False
        self.master = host, port
        self._on_answer()

    def _retry(self, reason: str) -> None:
        self.master = None
        if self._is_closed:
            return
        if not self._is_reported:
            self._is_reported = True
            _log.warn("Sentinel {name} is away: {reason}; connecting again", name=self._place.name, reason=reason)
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._reactor.callLater(RECONNECT_DELAY * random.uniform(0.5, 1.0), self.connect)

    # Calls of the connection

    def on_message(self, channel: bytes, payload: bytes) -> None:
        """See `ConnectionOwner`: another master, as `name old-host old-port host port`."""
        words = payload.decode(errors="replace").split(" ")
        if len(words) == 5 and words[0] == self._master_name and words[4].isdecimal():
            self._name(words[3], int(words[4]))

    def on_unsubscribed(self, channel: bytes) -> None:
        """See `ConnectionOwner`. Sentinels don't do this."""

    def on_refused(self, error: RedisError) -> Exception:
        """See `ConnectionOwner`."""
        return error

    def on_end(self, connection: RedisConnection, reason: str) -> None:
        """See `ConnectionOwner`."""
        self._connection = None
        self._retry(explain_loss(reason, self._access))
