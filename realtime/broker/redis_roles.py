"""Roles on Redis (`realtime.pubsub.roles`): held by one worker of all nodes, for a time by the clock of Redis.

A role has two keys: its holder, which expires, and the number of its latest term. ARGV[1] of each script is the
generation of the server (`RedisServer.run`), which does not matter here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from realtime.broker.delivery import Reply
from realtime.pubsub.engine import HoldRole, ResignRole, Term
from realtime.redis.scripts import Script
from realtime.redis.servers import RedisServer

HOLD = Script(
    """
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[2] then return {0, redis.call('PTTL', KEYS[1])} end
local number = holder and tonumber(redis.call('GET', KEYS[2])) or redis.call('INCR', KEYS[2])
redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
return {number, tonumber(ARGV[3])}
"""
)

RESIGN = Script("return redis.call('GET', KEYS[1]) == ARGV[2] and redis.call('DEL', KEYS[1]) or 0")


class RedisRoles:
    """Carries out the requests about roles. key: makes a key of a kind and a name. find_server: by name."""

    def __init__(self, key: Callable[[str, str], bytes], find_server: Callable[[str], RedisServer]) -> None:
        self._key = key
        self._find_server = find_server

    def hold(self, request: HoldRole, reply: Reply) -> None:
        """See `HoldRole`."""

        def answered(found: Any, error: Exception | None) -> None:
            if error is not None:
                reply(None, error)
            else:
                reply(Term(int(found[0]), max(int(found[1]), 0) / 1000))

        keys = self._key("role", request.name), self._key("term", request.name)
        terms = request.holder, int(request.seconds * 1000)
        self._find_server(request.name).run(answered, HOLD, keys, terms)

    def resign(self, request: ResignRole, done: Callable[[bool, Exception | None], None]) -> None:
        """End the term of a holder; call `done` with whether it was the holder."""

        def answered(found: Any, error: Exception | None) -> None:
            done(error is None and found == 1, error)

        self._find_server(request.name).run(answered, RESIGN, (self._key("role", request.name),), (request.holder,))
