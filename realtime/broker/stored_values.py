"""The values of caches in Redis, `Cache(storage="redis")`: one computation for all nodes, and invalidations.

All keys of a cache lie in one slot. A *value* is a hash: the packed value, its age, and the *stamp* of its tags. An
invalidation by tag, or of the whole cache, gives the tag a random text, and the stamp consists of the texts of a
value's tags: values with another stamp no longer count, and a computation that began under another one is not stored.
The *lock*, by which one worker of all nodes computes, has a stamp, too, and an earlier one no longer holds. An
invalidation by key removes the value and the lock: a computation whose lock is another one's is not stored either.

ARGV[1] of each script is the generation of the server (`RedisServer.generation`). It belongs to the stamp, as a server
that has lost its data may have lost an invalidation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from realtime.broker.delivery import Reply
from realtime.pubsub.engine import DropValues, FetchValue, FoundValue, StoreValue, ValueState
from realtime.pubsub.history import make_epoch
from realtime.redis.scripts import Script
from realtime.redis.servers import RedisServer

_STAMP = """
local stamp = {ARGV[1]}
for i = 3, #KEYS do stamp[i - 1] = redis.call('GET', KEYS[i]) or '' end
stamp = table.concat(stamp, ' ')
"""

FETCH = Script(
    _STAMP
    + """
local found = redis.call('HMGET', KEYS[1], 'stamp', 'made', 'value')
local counts = found[1] == stamp
if counts and tonumber(found[2]) >= tonumber(ARGV[4]) then return {'found', found[2], found[3]} end
local held = redis.call('GET', KEYS[2])
if not held or string.sub(held, -#stamp) ~= stamp then
  redis.call('SET', KEYS[2], ARGV[2] .. ' ' .. stamp, 'PX', ARGV[3])
  return {'granted', stamp}
end
if counts then return {'found', found[2], found[3]} end
return {'held'}
"""
)

STORE = Script(
    _STAMP
    + """
if redis.call('GET', KEYS[2]) ~= ARGV[2] .. ' ' .. ARGV[3] then return 0 end
redis.call('DEL', KEYS[2])
if stamp ~= ARGV[3] or ARGV[5] == '' then return 0 end
redis.call('HSET', KEYS[1], 'stamp', stamp, 'made', ARGV[4], 'value', ARGV[5])
redis.call('PEXPIRE', KEYS[1], ARGV[6])
return 1
"""
)

MARK = Script("for i = 1, #KEYS do redis.call('SET', KEYS[i], ARGV[2], 'PX', ARGV[3]) end")


class StoredValues:
    """Carries out the requests about values. key: makes a key of a kind and a name. find_server: by name."""

    def __init__(self, key: Callable[[str, str], bytes], find_server: Callable[[str], RedisServer]) -> None:
        self._key = key
        self._find_server = find_server

    def fetch(self, request: FetchValue, reply: Reply) -> None:
        """See `FetchValue`."""

        def fetched(found: Any, error: Exception | None) -> None:
            match found:
                case _ if error is not None:
                    reply(None, error)
                case [b"found", made, value]:
                    reply(FoundValue(ValueState.FOUND, bytes(value), int(made) / 1000))
                case [b"granted", stamp]:
                    reply(FoundValue(ValueState.GRANTED, stamp=bytes(stamp)))
                case _:
                    reply(FoundValue(ValueState.HELD))

        terms = request.token, _milliseconds(request.lease), _milliseconds(request.fresh_from)
        keys = self._keys(request.cache, request.key, request.tags)
        self._find_server(request.cache).run(fetched, FETCH, keys, terms)

    def store(self, request: StoreValue, reply: Reply) -> None:
        """See `StoreValue`."""
        made, kept = _milliseconds(request.made), _milliseconds(request.kept)
        terms = request.token, request.stamp, made, request.value, kept
        keys = self._keys(request.cache, request.key, request.tags)
        self._find_server(request.cache).run(
            lambda stored, error: reply(error is None and stored == 1, error), STORE, keys, terms
        )

    def drop(self, request: DropValues, reply: Reply) -> None:
        """See `DropValues`."""

        def dropped(result: Any, error: Exception | None) -> None:
            reply(None, error)

        server, base = self._find_server(request.cache), self._key("cache", request.cache)
        if request.keys is not None:
            names = [name for key in request.keys for name in _names(base, key)]
            server.call(dropped, b"DEL", *(names or [base]))
        else:
            marks = [_tag(base, tag) for tag in request.tags] if request.tags is not None else [base]
            server.run(dropped, MARK, marks or [base + b".none"], [make_epoch(), _milliseconds(request.kept)])

    def _keys(self, cache: str, key: bytes, tags: Sequence[str]) -> list[bytes]:
        base = self._key("cache", cache)
        return [*_names(base, key), base, *(_tag(base, tag) for tag in tags)]


def _names(base: bytes, key: bytes) -> tuple[bytes, bytes]:
    """Return the names of a value and of its lock."""
    return base + b".value." + key, base + b".lock." + key


def _tag(base: bytes, tag: str) -> bytes:
    return base + b".tag." + tag.encode()


def _milliseconds(seconds: float) -> int:
    return int(seconds * 1000) or 1
