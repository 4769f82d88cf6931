"""The connections of each user over all nodes, in Redis, for `client.user_connection_limit`.

A user has one hash there: the number of connections by the run of a node's broker. A node writes its whole number, so
that each write also repairs what Redis has lost. The hash expires when no node renews it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

from realtime.redis.scripts import Script
from realtime.redis.servers import RedisServer

LIFETIME = 600.0
"""Seconds that a user's numbers are kept without a renewal."""

WRITES_AT_ONCE = 200
"""Users whose numbers are written in one turn of the loop, and renewed in one step: some milliseconds."""

ADMIT = Script("""
local run, own, limit, lifetime = unpack(ARGV, 2, 5)
for at = 6, #ARGV do
  redis.call('HDEL', KEYS[1], ARGV[at])
end
local total, runs = tonumber(own), {}
local all = redis.call('HGETALL', KEYS[1])
for at = 1, #all, 2 do
  if all[at] ~= run then
    total = total + tonumber(all[at + 1])
    runs[#runs + 1] = all[at]
  end
end
if total > tonumber(limit) then
  return runs
end
redis.call('HSET', KEYS[1], run, own)
redis.call('PEXPIRE', KEYS[1], lifetime)
return false
""")
"""Counts a connection, unless the user then has more than `limit`. Returns the other runs with connections if so.

Arguments: run, its number of connections with this one, limit, milliseconds to live, and runs that have ended.
"""

SET = Script("""
local run, own, lifetime = unpack(ARGV, 2)
if tonumber(own) > 0 then
  redis.call('HSET', KEYS[1], run, own)
  redis.call('PEXPIRE', KEYS[1], lifetime)
else
  redis.call('HDEL', KEYS[1], run)
end
return false
""")
"""Writes the number of connections of a run. Arguments: run, number, milliseconds to live."""


class UserConnections:
    """See the module.

    run: the name of this run of the broker. key, server: of a user. counts: this node's connections by user, which the
    owner changes and then reports by `changed`. is_dead: whether a run has ended. call_soon: calls a function in the
    next turn of the loop.
    """

    def __init__(
        self,
        run: str,
        key: Callable[[str], bytes],
        server: Callable[[str], RedisServer],
        counts: Mapping[str, int],
        is_dead: Callable[[str], bool],
        call_soon: Callable[[Callable[[], None]], object],
    ) -> None:
        self._run = run
        self._key = key
        self._server = server
        self._counts = counts
        self._is_dead = is_dead
        self._call_soon = call_soon
        self._lifetime = math.ceil(1000 * LIFETIME)
        self._changed: dict[str, None] = {}
        self._round: Iterator[str] = iter(())
        self._due = 0.0
        self._renewed_at = -math.inf

    def admit(self, user: str, limit: int, done: Callable[[bool], None]) -> None:
        """Call `done` with whether a connection that is counted already is within the limit over all nodes.

        While Redis is away, only those of this node count.
        """

        def asked(runs: Any, error: Exception | None) -> None:
            dead = [] if error is not None or runs is None else [run for run in runs if self._is_dead(run.decode())]
            if dead:
                self._ask(user, limit, dead, answered)
            else:
                answered(runs, error)

        def answered(runs: Any, error: Exception | None) -> None:
            done(error is not None or runs is None)

        if self._counts.get(user, 0) > limit:
            done(False)
        else:
            self._ask(user, limit, [], asked)

    def _ask(self, user: str, limit: int, dead: list[bytes], done: Callable[[Any, Exception | None], None]) -> None:
        arguments: list[bytes | str | int] = [self._run, self._counts.get(user, 0), limit, self._lifetime, *dead]
        self._server(user).run(done, ADMIT, (self._key(user),), arguments)

    def changed(self, user: str) -> None:
        """Write the number of this node's connections of a user, in the next turn."""
        if not self._changed:
            self._call_soon(self._write_some)
        self._changed[user] = None

    def _write_some(self) -> None:
        users = list(islice(self._changed, WRITES_AT_ONCE))
        for user in users:
            del self._changed[user]
            self._set(user)
        if self._changed:  # a worker restores its clients, or has ended
            self._call_soon(self._write_some)

    def _set(self, user: str) -> None:
        arguments = (self._run, self._counts.get(user, 0), self._lifetime)
        self._server(user).run(_ignore, SET, (self._key(user),), arguments)

    def renew(self, now: float) -> None:
        """Write the numbers that are due at this time: each of them three times in LIFETIME. Call it often."""
        period = LIFETIME / 3
        elapsed = min(now - self._renewed_at, period)
        self._renewed_at = now
        self._due = min(self._due + len(self._counts) * elapsed / period, WRITES_AT_ONCE)
        while self._due >= 1 and self._counts:
            user = next(self._round, None)
            if user is None:
                self._round = iter(list(self._counts))
                continue
            self._due -= 1
            if user:
                self._set(user)


def _ignore(reply: Any, error: Exception | None) -> None:
    pass
