"""Presence over all nodes, in Redis.

Each node's broker keeps the presence of its own clients (`realtime.pubsub.presence`). This module writes it to Redis,
where all nodes have one list of each channel, in three keys of one slot:

    presence   hash   id: of this list; entries, clients: numbers of its fields and of the listed clients; n<run>: the
                      entries of one run of a broker; g<run>: their removal by another node (going), and their return
                      (back, again)
    clients    hash   client -> one byte of flags, the run of its broker, its ClientInfo
    users      hash   u<user>: number of listed clients; total: of all

A script changes the list, counts, and publishes the join or the leave, all at once. So each join and leave is published
exactly once, whatever happens between the nodes. The changes of a channel go out one batch after the other; after an
error they are kept, and sent again.

* Every node renews the time to live of the lists that have clients of it, and compares their numbers. A list that
  Redis has lost, or a part of which it has, is begun anew, without joins.
* A node that renews or reads a list removes the entries of runs that have ended (`is_dead`), with their leaves. If such
  a run has only been paused, it adds its clients again, with joins.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import msgspec

from realtime.metrics import Metrics
from realtime.pubsub.presence import PresenceEntry
from realtime.redis.scripts import Script
from realtime.redis.servers import RedisServer
from realtime.types import ClientInfo

BATCH = 200
"""Changes of one channel in one call of a script, and entries that one call removes: less than a millisecond."""

SENT_AT_ONCE = 200
"""Channels whose changes are sent in one turn of the loop: some milliseconds."""

PAGE = 1000
"""Clients that are read at once. Longer lists are read in steps of about this size."""

RENEWALS_AT_ONCE = 200
"""Channels renewed in one step: some milliseconds."""

RUN_SIZE = 8
"""Characters of a run's name, see `realtime.pubsub.history.make_epoch`."""

Done = Callable[[Any, Exception | None], None]

# Flags of an entry.
_PRESENT, _ANNOUNCED = 1, 2

_COMMON = """
local meta, clients, users = KEYS[1], KEYS[2], KEYS[3]

local function listed(value)
  return string.byte(value) % 2 == 1
end

local function announced(value)
  return string.byte(value) % 4 >= 2
end

local function count(value, change)
  local run = 'n' .. string.sub(value, 2, 9)
  if listed(value) then
    -- The first field behind the head of the array: the others are bytes, which cmsgpack can't read.
    local _, user = cmsgpack.unpack_one(value, 10)
    redis.call('HINCRBY', meta, 'clients', change)
    redis.call('HINCRBY', users, 'total', change)
    if redis.call('HINCRBY', users, 'u' .. user, change) <= 0 then
      redis.call('HDEL', users, 'u' .. user)
    end
  end
  redis.call('HINCRBY', meta, 'entries', change)
  if redis.call('HINCRBY', meta, run, change) <= 0 then
    redis.call('HDEL', meta, run)
  end
end

local function tidy(ttl)
  -- Without a removal to remember there are three fields: id, entries, clients.
  if redis.call('EXISTS', clients) == 0 and redis.call('HLEN', meta) <= 3 then
    redis.call('DEL', meta, users)
  else
    redis.call('PEXPIRE', meta, ttl)
    redis.call('PEXPIRE', clients, ttl)
    redis.call('PEXPIRE', users, ttl)
  end
end

local function runs()
  local found = {}
  for _, field in ipairs(redis.call('HKEYS', meta)) do
    if string.sub(field, 1, 1) == 'n' then
      found[#found + 1] = string.sub(field, 2)
    end
  end
  return found
end
"""

CHANGE = Script(
    _COMMON
    + """
local run, ttl, fresh, publish, channel, joined, left = unpack(ARGV, 2, 8)
local id = redis.call('HGET', meta, 'id')
local gone = redis.call('HGET', meta, 'g' .. run)
if id == false then
  -- The first write: Redis refuses it, and with it the whole script, when it has no memory left.
  redis.call('HSET', meta, 'id', fresh, 'entries', 0, 'clients', 0)
  redis.call('DEL', clients, users)
  id = fresh
end
if gone == 'going' then
  -- It is not: a removal under way stops.
  redis.call('HSET', meta, 'g' .. run, 'back')
end
for at = 9, #ARGV, 3 do
  local client, mode, value = ARGV[at], ARGV[at + 1], ARGV[at + 2]
  local old = redis.call('HGET', clients, client)
  if mode == 'leave' then
    if old then
      redis.call('HDEL', clients, client)
      count(old, -1)
      if announced(old) then
        redis.call(publish, channel, left .. string.sub(old, 10))
      end
    end
  elseif old ~= value then
    redis.call('HSET', clients, client, value)
    if old then
      count(old, -1)
    end
    count(value, 1)
    if not old and announced(value) and (mode == 'join' or gone) then
      redis.call(publish, channel, joined .. string.sub(value, 10))
    end
  end
end
tidy(ttl)
return {id, gone or ''}
"""
)
"""Adds clients to a list and removes others. Returns the list's id, and whether another node has removed the run.

Arguments: run, milliseconds to live, id of a new list, PUBLISH or SPUBLISH, the channel's name there, beginnings of
joins and leaves; then for each client its id, `join`, `restore` or `leave`, and its value. A restored client joins only
if another node has removed it.
"""

RENEW = Script(
    _COMMON
    + """
local run, ttl, id, entries = unpack(ARGV, 2)
local gone = redis.call('HGET', meta, 'g' .. run)
if gone == 'going' then
  return {'removed'}
end
if redis.call('HGET', meta, 'id') ~= id then
  return {'lost'}
end
local total = redis.call('HMGET', meta, 'n' .. run, 'entries', 'clients')
local is_whole = tonumber(total[2]) == redis.call('HLEN', clients)
  and tonumber(total[3]) == tonumber(redis.call('HGET', users, 'total') or 0)
local is_complete = tonumber(total[1] or 0) == tonumber(entries)
if is_whole and gone == 'back' and not is_complete then
  redis.call('HSET', meta, 'g' .. run, 'again')
  return {'removed'}
end
if not (is_whole and is_complete) then
  redis.call('DEL', meta, clients, users)
  return {'damaged'}
end
if gone then
  redis.call('HDEL', meta, 'g' .. run)
end
tidy(ttl)
return {'whole', unpack(runs())}
"""
)
"""Renews a list. Returns `whole` and the runs that have entries; or else why a run has to add its entries again.

Arguments: run, milliseconds to live, id of the list and number of entries as the run knows them. A damaged list is
deleted: every run finds out by its next renewal.
"""

READ = Script(
    _COMMON
    + """
local total = redis.call('HLEN', clients)
local distinct = math.max(0, redis.call('HLEN', users) - 1)
local result = {redis.call('HGET', meta, 'clients') or '0', distinct, total, runs()}
if total <= tonumber(ARGV[2]) then
  result[5] = redis.call('HVALS', clients)
end
return result
"""
)
"""Returns the numbers of clients, users and entries, the runs that have entries, and the entries if they are not more
than the only argument."""

REMOVE = Script(
    _COMMON
    + """
local run, publish, channel, left, cursor, limit = unpack(ARGV, 2)
if redis.call('EXISTS', meta) == 0 then
  return '0'
end
if cursor == '0' then
  redis.call('HSET', meta, 'g' .. run, 'going')
elseif redis.call('HGET', meta, 'g' .. run) ~= 'going' then
  return '0'
end
local scanned = redis.call('HSCAN', clients, cursor, 'COUNT', limit)
for at = 1, #scanned[2], 2 do
  local client, value = scanned[2][at], scanned[2][at + 1]
  if string.sub(value, 2, 9) == run and redis.call('HDEL', clients, client) == 1 then
    count(value, -1)
    if announced(value) then
      redis.call(publish, channel, left .. string.sub(value, 10))
    end
  end
end
return scanned[1]
"""
)
"""Removes entries of a run that has ended, with their leaves. Returns the cursor of the next call, `0` at the end.

Arguments: run, PUBLISH or SPUBLISH, the channel's name there, beginning of leaves, cursor (`0` for the first call),
number of entries to look at. Several nodes may do the same at the same time.
"""

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(ClientInfo).decode


class Names:
    """The names in Redis that belong to one channel. keys: of its list. topic: of its publications, joins and leaves.

    joined, left: beginnings of messages there, which end with the bytes of a ClientInfo.
    """

    __slots__ = ("joined", "keys", "left", "topic")

    def __init__(self, keys: tuple[bytes, bytes, bytes], topic: bytes, joined: bytes, left: bytes) -> None:
        self.keys = keys
        self.topic = topic
        self.joined = joined
        self.left = left


class _List:
    """The part of a channel's list that comes from this run.

    id: of the list, "" while unknown. entries: clients that the run has there, once all changes are carried out.
    changes: not sent yet, by client: mode and value. sent: those under way, none with a renewal. One script of a list
    is under way at a time: a call for which Redis lacks the script may be carried out behind later ones. waiting,
    asked: callbacks for the changes that are not sent, and for those under way. rest: entries that are to be added
    again. touched: clients that changed since that began.
    """

    __slots__ = ("asked", "changes", "entries", "id", "rest", "sent", "touched", "waiting")

    def __init__(self) -> None:
        self.id = ""
        self.entries = 0
        self.changes: dict[str, tuple[str, bytes]] = {}
        self.sent: dict[str, tuple[str, bytes]] | None = None
        self.waiting: list[Done] = []
        self.asked: list[Done] = []
        self.rest: Iterator[PresenceEntry] | None = None
        self.touched: set[str] = set()

    @property
    def is_idle(self) -> bool:
        """Whether Redis has all that this run knows."""
        return not (self.changes or self.rest) and self.sent is None


class SharedPresence:
    """See the module.

    run: the name of this run of the broker, of RUN_SIZE characters. ttl: seconds within which a list without a node
    that renews it is no longer right. names, server: of a channel. entries: returns the clients of this node in a
    channel. is_dead: whether the clients of a run have to leave. refused: notes an error of a channel's command, and
    returns it. call_soon: calls a function in the next turn of the loop, so that the changes of one turn go out
    together.
    """

    def __init__(
        self,
        run: str,
        ttl: float,
        names: Callable[[str], Names],
        server: Callable[[str], RedisServer],
        entries: Callable[[str], list[PresenceEntry]],
        is_dead: Callable[[str], bool],
        refused: Callable[[Exception, str], Exception],
        call_soon: Callable[[Callable[[], None]], object],
        metrics: Metrics,
    ) -> None:
        assert len(run) == RUN_SIZE
        self._run = run
        self._period = ttl / 3
        self._lifetime = math.ceil(ttl * 2000)
        self._names = names
        self._server = server
        self._entries = entries
        self._is_dead = is_dead
        self._refused = refused
        self._call_soon = call_soon
        self._lists: dict[str, _List] = {}
        self._unsent: dict[str, None] = {}  # channels with changes of this turn
        self._removals: set[tuple[str, str]] = set()  # under way, by channel and run
        # The channels to renew before all others, and the round over all of them.
        self._first: list[str] = []
        self._round: Iterator[str] = iter(())
        self._due = 0.0  # channels of the round
        self._renewed_at = -math.inf
        self._fresh = 0
        self._restored = metrics.counter(
            "realtime_presence_restored", "Channels whose presence was written to Redis again, as it was lost there."
        )
        self._removed = metrics.counter(
            "realtime_presence_removals", "Channels in which this node removed the clients of a node that had ended."
        )

    # Changes

    def put(self, channel: str, entry: PresenceEntry, *, is_new: bool, announce: bool) -> None:
        """Add a client of this node, or replace its entry. announce: publish a join, if the list has not got it."""
        listed = self._lists.get(channel)
        if listed is None:
            listed = self._lists[channel] = _List()
        listed.entries += is_new
        self._change(channel, listed, entry.info.client, "join" if announce else "restore", self._value(entry))

    def remove(self, channel: str, entry: PresenceEntry) -> None:
        """Remove a client of this node; publish a leave."""
        listed = self._lists[channel]
        listed.entries -= 1
        self._change(channel, listed, entry.info.client, "leave", b"")

    def when_stored(self, channel: str, done: Done) -> None:
        """Call `done` with (None, None) once Redis has carried out all changes of this channel so far, or with an
        error."""
        listed = self._lists.get(channel)
        if listed is not None and listed.changes:
            listed.waiting.append(done)
        elif listed is not None and listed.sent:
            listed.asked.append(done)
        else:
            done(None, None)

    @property
    def is_stored(self) -> bool:
        """Whether Redis has carried out all changes, and all removals that have begun."""
        return not self._removals and all(listed.is_idle for listed in self._lists.values())

    def _change(self, channel: str, listed: _List, client: str, mode: str, value: bytes) -> None:
        earlier = listed.changes.get(client)
        if earlier is not None and earlier[0] == "join" and mode == "restore":
            mode = "join"
        listed.changes[client] = (mode, value)
        if listed.rest is not None:
            listed.touched.add(client)
        if listed.sent is None and channel not in self._unsent:
            if not self._unsent:
                self._call_soon(self._send_some)
            self._unsent[channel] = None

    def _value(self, entry: PresenceEntry) -> bytes:
        flags = _PRESENT * entry.present + _ANNOUNCED * entry.announce
        return b"%d%b%b" % (flags, self._run.encode(), _encode(entry.info))

    def _send_some(self) -> None:
        channels = list(islice(self._unsent, SENT_AT_ONCE))
        for channel in channels:
            del self._unsent[channel]
        if self._unsent:  # a worker restores its clients
            self._call_soon(self._send_some)
        for channel in channels:
            listed = self._lists.get(channel)
            if listed is not None and listed.sent is None:
                self._send(channel, listed)

    def _send(self, channel: str, listed: _List) -> None:
        """Send the next batch of changes, if there are any."""
        changes = listed.changes
        batch = dict(islice(changes.items(), BATCH))
        for client in batch:
            del changes[client]
        if not changes:
            listed.asked, listed.waiting = listed.waiting, []
        self._add_rest(listed, batch)
        if not batch:
            self._finish(channel, listed)
            return
        listed.sent = batch
        names, server = self._names(channel), self._server(channel)
        self._fresh += 1
        arguments: list[bytes | str | int] = [
            self._run,
            self._lifetime,
            f"{self._run}{self._fresh}",
            _publish(server),
            names.topic,
            names.joined,
            names.left,
        ]
        for client, (mode, value) in batch.items():
            arguments += (client, mode, value)
        server.run(lambda reply, error: self._on_sent(channel, listed, reply, error), CHANGE, names.keys, arguments)

    def _add_rest(self, listed: _List, batch: dict[str, tuple[str, bytes]]) -> None:
        """Fill a batch with entries that are to be added again."""
        while listed.rest is not None and len(batch) < BATCH:
            entry = next(listed.rest, None)
            if entry is None:
                listed.rest = None
                listed.touched.clear()
            elif entry.info.client not in listed.touched:
                batch[entry.info.client] = ("restore", self._value(entry))

    def _on_sent(self, channel: str, listed: _List, reply: Any, error: Exception | None) -> None:
        sent, listed.sent = listed.sent, None
        assert sent is not None
        if error is not None:
            listed.changes = sent | listed.changes
            asked, listed.asked, listed.waiting = listed.asked + listed.waiting, [], []
            self._refused(error, channel)
            for done in asked:
                done(None, error)
            return  # the next renewal sends it again
        id, gone = _text(reply[0]), reply[1]
        is_other = listed.id not in ("", id)
        listed.id = id
        if (is_other or gone == b"going") and listed.rest is None:
            self._begin_again(channel, listed)
        asked, listed.asked = listed.asked, []
        for done in asked:
            done(None, None)
        if listed.sent is None:
            self._send(channel, listed)

    def _finish(self, channel: str, listed: _List) -> None:
        """Forget a list that has no clients of this node any more."""
        if not listed.entries and listed.is_idle and self._lists.get(channel) is listed:
            del self._lists[channel]

    def _begin_again(self, channel: str, listed: _List) -> None:
        """Add all clients of this node again, in batches."""
        self._restored.value += 1
        listed.touched = set(listed.changes)
        listed.rest = iter(self._entries(channel))

    # Renewal

    def renew(self, now: float) -> bool:
        """Renew lists that are due at this time: each of them three times in `ttl`. Call it often.

        Returns True if there are more of them: call it again soon.
        """
        elapsed = min(now - self._renewed_at, self._period)
        self._renewed_at = now
        self._due = min(self._due + len(self._lists) * elapsed / self._period, RENEWALS_AT_ONCE)
        for channel in self._first[-RENEWALS_AT_ONCE:]:
            self._renew(channel)
        del self._first[-RENEWALS_AT_ONCE:]
        while self._due >= 1 and self._lists:
            next_channel = next(self._round, None)
            if next_channel is None:
                self._round = iter(list(self._lists))
            else:
                self._due -= 1
                self._renew(next_channel)
        return bool(self._first)

    def renew_all(self) -> None:
        """Renew all lists from now on, in steps: Redis was away, and may have lost them."""
        self._first = list(self._lists)

    def _renew(self, channel: str) -> None:
        listed = self._lists.get(channel)
        if listed is None:
            return
        if not listed.is_idle:
            if listed.sent is None:
                self._send(channel, listed)
            return
        arguments = (self._run, self._lifetime, listed.id, listed.entries)
        listed.sent = {}

        def renewed(reply: Any, error: Exception | None) -> None:
            listed.sent = None
            if error is None:
                self._on_renewed(channel, listed, _text(reply[0]), [_text(run) for run in reply[1:]])
            if listed.sent is None and not listed.is_idle:
                self._send(channel, listed)

        self._server(channel).run(renewed, RENEW, self._names(channel).keys, arguments)

    def _on_renewed(self, channel: str, listed: _List, state: str, runs: list[str]) -> None:
        if state != "whole":
            listed.id = ""
            self._begin_again(channel, listed)
            return
        for run in runs:
            if self._is_dead(run):
                self._remove_run(channel, run, _ignore)

    # Runs that have ended

    def _remove_run(self, channel: str, run: str, done: Done) -> None:
        """Remove the entries of a run in one channel, step by step."""
        if (channel, run) in self._removals:
            done(None, None)
            return
        self._removals.add((channel, run))
        self._removed.value += 1
        names, server = self._names(channel), self._server(channel)

        def step(cursor: str) -> None:
            arguments = (run, _publish(server), names.topic, names.left, cursor, BATCH)
            server.run(stepped, REMOVE, names.keys, arguments)

        def stepped(reply: Any, error: Exception | None) -> None:
            if error is None and _text(reply) != "0":
                step(_text(reply))
            else:
                self._removals.discard((channel, run))
                done(None, error)

        step("0")

    # Questions

    def count(self, channel: str, done: Done) -> None:
        """Call `done` with the numbers of clients and of users that are present, or with an error."""

        def read(reply: Any, error: Exception | None) -> None:
            done(None if error is not None else (int(reply[0]), int(reply[1])), error)

        self._read(channel, 0, read)

    def present(self, channel: str, done: Done) -> None:
        """Call `done` with an iterator of the infos of all clients that are present, or with an error."""

        def read(reply: Any, error: Exception | None) -> None:
            if error is not None:
                done(None, error)
            elif len(reply) > 4:
                done(self._present(reply[4]), None)
            else:
                self._scan(channel, done)

        self._read(channel, PAGE, read)

    def _read(self, channel: str, limit: int, done: Done) -> None:
        """Call `done` with the reply to READ, after the removal of all runs that have ended."""
        dead: list[str] = []

        def read(reply: Any, error: Exception | None) -> None:
            if error is None:
                dead.extend(run for run in map(_text, reply[3]) if self._is_dead(run))
            if dead:
                remove(None, None)
            else:
                done(reply, error)

        def remove(_: Any, error: Exception | None) -> None:
            if error is not None:
                done(None, error)
            elif dead:
                self._remove_run(channel, dead.pop(), remove)
            else:
                ask(done)  # some entries may be left: another node is at the removal, too

        def ask(then: Done) -> None:
            self._server(channel).run(then, READ, self._names(channel).keys, (limit,))

        ask(read)

    def _scan(self, channel: str, done: Done) -> None:
        found: dict[bytes, bytes] = {}
        key, server = self._names(channel).keys[1], self._server(channel)

        def scanned(reply: Any, error: Exception | None) -> None:
            if error is not None:
                done(None, error)
                return
            cursor, fields = reply
            found.update(zip(fields[::2], fields[1::2], strict=True))
            if cursor == b"0":
                done(self._present(list(found.values())), None)
            else:
                server.call(scanned, b"HSCAN", key, cursor, b"COUNT", PAGE)

        server.call(scanned, b"HSCAN", key, b"0", b"COUNT", PAGE)

    def _present(self, values: list[bytes]) -> Iterator[ClientInfo]:
        return (_decode(value[1 + RUN_SIZE :]) for value in values if value[0] & _PRESENT)


def _publish(server: RedisServer) -> str:
    return "SPUBLISH" if server.is_cluster else "PUBLISH"


def _text(reply: bytes | str) -> str:
    return reply.decode() if isinstance(reply, bytes) else reply


def _ignore(reply: Any, error: Exception | None) -> None:
    pass
