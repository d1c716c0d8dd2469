"""What runs on the server, in Lua: whatever reads the index and changes it is one step there, whoever else asks at the time.

The keys of one bucket, all in one hash slot:

    PREFIX{BUCKET}:index    hash     entry → its metadata (`framing.About`)
    PREFIX{BUCKET}:order    zset     entry → when it was last used, in ticks of `state`
    PREFIX{BUCKET}:expiry   zset     entry → when it expires
    PREFIX{BUCKET}:state    hash     used (bytes), tick, epoch; in the first bucket how far back `log` goes (forgotten_until)
    PREFIX{BUCKET}:log      list     in the first bucket: what was erased lately, oldest first
    PREFIX{BUCKET}:v:ENTRY  string   the value

Values never pass through a script: they are written by SET in the transaction that ends with `PUT`, which takes back what
may not stay, and read by MGET in one transaction with the index. Time is the callers': a server's clock may differ, and a
test's does.

A script that finds the parts of the index at odds, because somebody else wrote or the server evicted one of them, mends them:
what is not known for certain is removed.
"""

from __future__ import annotations

LOG_LENGTH = 1000
"""Erasures that are remembered for processes that were away."""

_PRELUDE = """
local index, order, expiry, state, log = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local place, now = KEYS[6], tonumber(ARGV[1])

local function about(packed)  -- nil: damaged
  local ok, fields = pcall(cmsgpack.unpack, packed)
  if ok and type(fields) == 'table' and type(fields[1]) == 'number' and type(fields[2]) == 'number'
    and type(fields[5]) == 'table' then return fields end
end

local function number(name)
  return tonumber(redis.call('HGET', state, name) or 0) or 0
end

local function mend()
  for _, key in ipairs(redis.call('ZRANGE', order, 0, -1)) do
    if redis.call('HEXISTS', index, key) == 0 then
      redis.call('UNLINK', place .. key)
      redis.call('ZREM', order, key)
      redis.call('ZREM', expiry, key)
    end
  end
  local all, used = redis.call('HGETALL', index), 0
  for at = 1, #all, 2 do
    local fields = about(all[at + 1])
    if fields and redis.call('ZSCORE', order, all[at]) then
      used = used + fields[1]
    else
      redis.call('UNLINK', place .. all[at])
      redis.call('HDEL', index, all[at])
      redis.call('ZREM', order, all[at])
      redis.call('ZREM', expiry, all[at])
    end
  end
  redis.call('HSET', state, 'used', used)
end

local function unindex(key)  -- whether it was there
  local packed = redis.call('HGET', index, key)
  redis.call('ZREM', order, key)
  redis.call('ZREM', expiry, key)
  if not packed then return false end
  redis.call('HDEL', index, key)
  local fields = about(packed)
  if fields then redis.call('HINCRBY', state, 'used', -fields[1]) else mend() end
  return true
end

local function remove(key)
  redis.call('UNLINK', place .. key)
  return unindex(key)
end

local function sweep()
  repeat
    local gone = redis.call('ZRANGEBYSCORE', expiry, '-inf', now, 'LIMIT', 0, 100)
    for _, key in ipairs(gone) do remove(key) end
  until #gone == 0
end

local function check()
  local count = redis.call('HLEN', index)
  if redis.call('ZCARD', order) ~= count or (number('used') > 0) ~= (count > 0) then mend() end
end

local function touch(key)
  redis.call('ZADD', order, 'XX', redis.call('HINCRBY', state, 'tick', 1), key)
end
"""

PUT = (
    _PRELUDE
    + """
-- ARGV: now, capacity, epoch or '', number of entries, (key, size, expiry or '', metadata)..., keys used in faster tiers...
local capacity, epoch, count = tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])

local function work()
  check()
  for at = 5 + 4 * count, #ARGV do touch(ARGV[at]) end
  local tick = redis.call('HINCRBY', state, 'tick', count) - count  -- refused where memory is full, before anything is changed
  sweep()
  for at = 5, 4 + 4 * count, 4 do unindex(ARGV[at]) end  -- first of all: no victim below may be what was just written
  local num_evicted, evicted = 0, 0
  for at = 5, 4 + 4 * count, 4 do
    local key, size = ARGV[at], tonumber(ARGV[at + 1])
    if (epoch and number('epoch') > epoch) or size > capacity then
      remove(key)
    else
      local used = number('used')
      while used + size > capacity do
        local victim = redis.call('ZRANGE', order, 0, 0)[1]
        if victim then remove(victim) else mend() end
        num_evicted, evicted = num_evicted + 1, evicted + used - number('used')
        used = number('used')
      end
      tick = tick + 1
      redis.call('HINCRBY', state, 'used', size)
      redis.call('HSET', index, key, ARGV[at + 3])
      redis.call('ZADD', order, tick, key)
      if ARGV[at + 2] ~= '' then redis.call('ZADD', expiry, ARGV[at + 2], key) end
    end
  end
  local answer = {number('epoch'), num_evicted, evicted}
  for at = 5, 4 + 4 * count, 4 do answer[#answer + 1] = redis.call('HEXISTS', index, ARGV[at]) end
  return answer
end

local ok, answer = pcall(work)
if ok then return answer end
-- The values were written before this script ran, and nothing may lie there that no index knows.
for at = 5, 4 + 4 * count, 4 do pcall(remove, ARGV[at]) end
return redis.error_reply(type(answer) == 'table' and answer.err or answer)
"""
)

TOUCH = (
    _PRELUDE
    + """
-- ARGV: now, keys...
for at = 2, #ARGV do touch(ARGV[at]) end
"""
)

DISCARD = (
    _PRELUDE
    + """
-- ARGV: now, (key, metadata)...: removes those that still have this metadata. How many.
local count = 0
for at = 2, #ARGV, 2 do
  if redis.call('HGET', index, ARGV[at]) == ARGV[at + 1] then
    remove(ARGV[at])
    count = count + 1
  end
end
return count
"""
)

DELETE = (
    _PRELUDE
    + """
-- ARGV: now, keys...: how many were there
local count = 0
for at = 2, #ARGV do
  if remove(ARGV[at]) then count = count + 1 end
end
return count
"""
)

MATCH = (
    _PRELUDE
    + """
-- ARGV: now, cursor, '=' and tenant or '', likewise model, likewise tag, 'remove' or 'tell'
-- (next cursor, keys within the scope)
local function tagged(tags, tag)
  for _, one in ipairs(tags) do
    if '=' .. one == tag then return true end
  end
  return false
end

if ARGV[2] == '0' then check() end
local found = redis.call('HSCAN', index, ARGV[2], 'COUNT', 500)
local keys = {}
for at = 1, #found[2], 2 do
  local key, fields = found[2][at], about(found[2][at + 1])
  if not fields then
    remove(key)
  elseif (ARGV[3] == '' or ARGV[3] == '=' .. fields[3])
    and (ARGV[4] == '' or ARGV[4] == '=' .. fields[4])
    and (ARGV[5] == '' or tagged(fields[5], ARGV[5])) then
    if ARGV[6] == 'remove' then
      remove(key)
      keys[#keys + 1] = key
    elseif fields[2] == 0 or fields[2] > now then
      keys[#keys + 1] = key
    end
  end
end
return {found[1], keys}
"""
)

TOTALS = (
    _PRELUDE
    + """
-- ARGV: now. (entries, used bytes)
check()
sweep()
return {redis.call('HLEN', index), number('used')}
"""
)

ERASE = (
    _PRELUDE
    + f"""
-- ARGV: now, the caller's epoch, what is erased. In the first bucket: notes it down under a new epoch, which is the answer. It
-- is the server's time in microseconds, so that it grows even where the server has lost its memory.
local time = redis.call('TIME')
local epoch = math.max(number('epoch') + 1, tonumber(ARGV[2]) + 1, time[1] * 1000000 + time[2])
redis.call('HSET', state, 'epoch', string.format('%.0f', epoch))
redis.call('RPUSH', log, string.format('%.0f', epoch) .. ' ' .. ARGV[3])
while redis.call('LLEN', log) > {LOG_LENGTH} do
  redis.call('HSET', state, 'forgotten_until', string.match(redis.call('LPOP', log), '^%d+'))
end
return epoch
"""
)

RAISE = (
    _PRELUDE
    + """
-- ARGV: now, epoch. In every other bucket: what was prepared before `epoch` is not stored from here on.
if number('epoch') < tonumber(ARGV[2]) then redis.call('HSET', state, 'epoch', ARGV[2]) end
"""
)

RESET = """
-- For a bucket in which a key holds something of another type: removes those parts of its index; `mend` does the rest.
local types = {'hash', 'zset', 'zset', 'hash', 'list'}
local count = 0
for at, wanted in ipairs(types) do
  local found = redis.call('TYPE', KEYS[at]).ok
  if found ~= 'none' and found ~= wanted then count = count + redis.call('UNLINK', KEYS[at]) end
end
return count
"""

STRAYS = """
-- ARGV: entries whose values were seen. Removes the values that no index knows. How many.
local count = 0
for _, key in ipairs(ARGV) do
  if redis.call('HEXISTS', KEYS[1], key) == 0 then count = count + redis.call('UNLINK', KEYS[6] .. key) end
end
return count
"""
