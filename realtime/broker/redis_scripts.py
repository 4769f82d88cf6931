"""The scripts of channels on Redis.

A channel has two keys. The *metadata* are the packed values offset, epoch, generation, and the latest version and its
epoch if there is one: offset and epoch are the position of the top. The *history* is a list of entries
(`realtime.broker.redis_messages`), the newest last; the offset of an entry follows from its place. Lists and one packed
string cost Redis less than streams and hashes: 8.5 against 10.3 microseconds for a publication.

Metadata that are missing (expired, evicted, flushed) or of another generation of the server (`RedisServer.generation`)
no longer describe what subscribers have received: the channel gets a new epoch, and loses its history. So an epoch
never comes back. "" as the generation stands for any. ARGV[1] of each
script is the generation.

Everything that may be refused (types of keys, values, memory) is refused before the first write.
"""

from __future__ import annotations

from realtime.redis.scripts import Script

_META = """
local call = redis.call
local meta, offset, epoch, generation, version, version_epoch = call('GET', KEYS[1])
if meta then
  offset, epoch, generation, version, version_epoch = cmsgpack.unpack(meta)
  if type(offset) ~= 'number' or type(epoch) ~= 'string' then
    return redis.error_reply('BADMETA ' .. KEYS[1] .. ' does not hold metadata of a channel')
  end
  if generation ~= ARGV[1] and ARGV[1] ~= '' then epoch = nil end
end
"""

# Without a function around it, which each run would define.
_NEW_EPOCH = """
  local time, letters = call('TIME'), {}
  local hash = redis.sha1hex(KEYS[1] .. SEED .. time[1] .. '.' .. time[2])
  for i = 1, 8 do
    local n = tonumber(string.sub(hash, 4 * i - 3, 4 * i), 16) % 52
    letters[i] = string.char(n < 26 and 65 + n or 71 + n)
  end
  epoch = table.concat(letters)
"""

_PUBLISH = (
    """
local known = KEYS[4] and redis.call('GET', KEYS[4])
if known then return {known} end
"""
    + _META
    + """
if not epoch then"""
    + _NEW_EPOCH.replace("SEED", "ARGV[2]")
    + """
  offset, version = 0, nil
  call('DEL', KEYS[2])
end
if ARGV[6] then
  if version and ARGV[6] <= version and (ARGV[7] == '' or ARGV[7] == version_epoch) then
    local position = cmsgpack.pack(offset, epoch)
    call('PEXPIRE', KEYS[1], ARGV[5])
    if KEYS[4] then call('SET', KEYS[4], position, 'PX', 300000) end
    return {position}
  end
  version, version_epoch = ARGV[6], ARGV[7]
end
offset = offset + 1
local length, size = call('RPUSH', KEYS[2], ARGV[2]), tonumber(ARGV[3])
if length == size + 1 then
  call('LPOP', KEYS[2])
elseif length > size then
  call('LTRIM', KEYS[2], -size, -1)
end
call('PEXPIRE', KEYS[2], ARGV[4])
local position = cmsgpack.pack(offset, epoch)
if version then
  call('SET', KEYS[1], position .. cmsgpack.pack(ARGV[1], version, version_epoch), 'PX', ARGV[5])
else
  call('SET', KEYS[1], position .. cmsgpack.pack(ARGV[1]), 'PX', ARGV[5])
end
if KEYS[4] then call('SET', KEYS[4], position, 'PX', 300000) end
call('PUBLISH', KEYS[3], ARGV[2] .. position)
return position
"""
)

_PUBLISH_ONCE = """
if redis.call('SET', KEYS[2], '', 'NX', 'PX', 300000) then
  return redis.call('PUBLISH', KEYS[1], ARGV[2])
end
return false
"""

_HISTORY = (
    _META
    + """
local ttl = ARGV[2]
if not epoch then
  if ttl == '' then return {} end
"""
    + _NEW_EPOCH.replace("SEED", "ARGV[3]")
    + """
  local position = cmsgpack.pack(0, epoch)
  call('DEL', KEYS[2])
  call('SET', KEYS[1], position .. cmsgpack.pack(ARGV[1]), 'PX', ttl)
  return {position, 0}
end
local limit, since, room = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
local page = {cmsgpack.pack(offset, epoch), 0}
if limit ~= 0 then
  local oldest = offset - call('LLEN', KEYS[2]) + 1
  local first, step, count
  if ARGV[7] then
    first, step = since and since - 1 or offset, -1
    count = first > offset and 0 or first - oldest + 1
  else
    first, step = since and math.max(since + 1, oldest) or oldest, 1
    count = offset - first + 1
  end
  if limit > 0 then count = math.min(count, limit) end
  page[2] = first
  local index, found = first - oldest, 2
  while count > 0 do
    local part = math.min(count, 50)
    local from, to = index, index + step * (part - 1)
    local entries = call('LRANGE', KEYS[2], math.min(from, to), math.max(from, to))
    for i = 1, part do
      local entry = entries[step > 0 and i or part + 1 - i]
      room = room - #entry - 64
      if room < 0 and found > 2 then count = 0 break end
      found = found + 1
      page[found] = entry
    end
    count, index = count - part, index + step * part
  end
end
if ttl ~= '' then call('PEXPIRE', KEYS[1], ttl) end
return page
"""
)


class ChannelScripts:
    """The scripts of one kind of server. is_cluster: channels belong to slots."""

    def __init__(self, *, is_cluster: bool) -> None:
        def script(source: str) -> Script:
            return Script(source.replace("'PUBLISH'", "'SPUBLISH'") if is_cluster else source)

        self.publish = script(_PUBLISH)
        """Number, store and route a publication. KEYS: metadata, history, pub/sub channel, and the idempotency key if
        there is one. ARGV: entry, size, milliseconds of the history's life and of the metadata's, and the
        version (20 digits) and its epoch if there is one. Returns the packed position, in a
        list if nothing was published."""
        self.publish_once = script(_PUBLISH_ONCE)
        """Route a publication without history. KEYS: pub/sub channel, idempotency key. ARGV: the message. Returns None
        if the key is known."""
        self.history = script(_HISTORY)
        """Read a page. KEYS: metadata, history. ARGV: milliseconds of the metadata's life ("" to change
        nothing, and to return an empty list without valid metadata), a seed, limit (-1 for none), offset of `since` or
        "", bytes, and anything for a reverse page. Returns the packed position of the top, the offset of the first
        entry, and the entries."""
