"""What runs on the server, in Lua: whatever reads the index and changes it is one step there, whoever else asks at the time.

The keys of one bucket, all in one hash slot:

    PREFIX{BUCKET}:index    hash     entry → its metadata (`framing.About`)
    PREFIX{BUCKET}:order    zset     under lru: entry → its tick
    PREFIX{BUCKET}:ranks    zset     under gdsf: tick and entry → its rank
    PREFIX{BUCKET}:turns    zset     where a tenant's share is limited: tenant, rank, tick and entry, sorted by name
    PREFIX{BUCKET}:kept     zset     entry → until when it is kept; it is in none of the three above
    PREFIX{BUCKET}:uses     hash     entry → its rank, tick and number of uses: under gdsf of all, under lru of those kept
    PREFIX{BUCKET}:expiry   zset     entry → when it expires
    PREFIX{BUCKET}:tenants  hash     kept bytes of each tenant; where shares are limited, used bytes too
    PREFIX{BUCKET}:state    hash     used and kept (bytes), tick, epoch, age; order, limited: what is in force;
                                     in the first bucket how far back `log` goes (forgotten_until)
    PREFIX{BUCKET}:log      list     in the first bucket: what was erased lately, oldest first
    PREFIX{BUCKET}:v:ENTRY  string   the value

An entry's tick is the number of its last use. Its rank is that too under lru; under gdsf what `policies.gdsf` calls priority,
and among equal ones the lower tick leaves first. So names that begin with a rank and a tick, big-endian, sort as entries leave.

Values never pass through a script: they are written by SET in the transaction that ends with `PUT`, which takes back what
may not stay, and read by MGET in one transaction with the index. Time is the callers': a server's clock may differ, and a
test's does.

A script that finds the parts of the index at odds, because somebody else wrote or the server evicted one of them, mends them:
what is not known for certain is removed, and all that follows from the rest is made anew.
"""

from __future__ import annotations

LOG_LENGTH = 1000
"""Erasures that are remembered for processes that were away."""

_PRELUDE = """
local index, order, expiry, state, log = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local ranks, turns, kept, uses, tenants = KEYS[6], KEYS[7], KEYS[8], KEYS[9], KEYS[10]
local place, now = KEYS[#KEYS], tonumber(ARGV[1])
local gdsf, limited, age  -- what is in force: `look` finds out
local tick = 0  -- of the latest use
local new = {}  -- entries whose values were written just now
local write = redis.call  -- `mend` collects instead

local function look()
  local noted = redis.call('HMGET', state, 'order', 'limited', 'age')
  gdsf, limited, age = noted[1] == 'gdsf', noted[2] == '1', tonumber(noted[3]) or 0
end

local function about(packed)  -- nil: damaged
  local ok, fields = pcall(cmsgpack.unpack, packed)
  if ok and type(fields) == 'table' and type(fields[1]) == 'number' and type(fields[2]) == 'number'
    and type(fields[3]) == 'string' and type(fields[5]) == 'table' and type(fields[7]) == 'number' then return fields end
end

local function number(name, part)
  return tonumber(redis.call('HGET', part or state, name) or 0) or 0
end

local function add(what, sign, fields)  -- an entry to the bytes that are 'used' or 'kept', or take it away
  local size = sign * fields[1]
  redis.call('HINCRBY', state, what, size)
  if limited or what == 'kept' then
    local whose = what .. ':' .. fields[3]
    if redis.call('HINCRBY', tenants, whose, size) == 0 then redis.call('HDEL', tenants, whose) end
  end
end

local function rank(fields, num_uses)
  if not gdsf then return tick end
  return age + num_uses * math.max(0, fields[7]) / math.max(1, fields[1])
end

local function ticked(key, use)
  return struct.pack('>d', use.tick) .. key
end

local function turns_of(tenant)  -- what the names of its turns begin with
  return struct.pack('>I4', #tenant) .. tenant
end

local function turn(key, use, fields)
  return turns_of(fields[3]) .. struct.pack('>d', use.rank) .. ticked(key, use)
end

local function use_of(key)  -- nil: not known
  local last = not gdsf and tonumber(redis.call('ZSCORE', order, key))
  if last then return {rank = last, tick = last, count = 1} end
  local packed = redis.call('HGET', uses, key)
  if packed and #packed == 24 then
    local use = {}
    use.rank, use.tick, use.count = struct.unpack('>ddd', packed)
    use.kept_until = redis.call('ZSCORE', kept, key)
    return use
  end
end

local function settle(key, use, fields)  -- where it is found by whoever looks for what leaves first, or among what is kept
  if gdsf or use.kept_until then write('HSET', uses, key, struct.pack('>ddd', use.rank, use.tick, use.count)) end
  if use.kept_until then
    write('ZADD', kept, use.kept_until, key)
    return
  end
  if gdsf then
    write('ZADD', ranks, use.rank, ticked(key, use))
  else
    write('ZADD', order, use.tick, key)
  end
  if limited then write('ZADD', turns, 0, turn(key, use, fields)) end
end

local function unsettle(key, use, fields)
  if gdsf or use.kept_until then redis.call('HDEL', uses, key) end
  if use.kept_until then
    redis.call('ZREM', kept, key)
    return
  end
  if gdsf then
    redis.call('ZREM', ranks, ticked(key, use))
  else
    redis.call('ZREM', order, key)
  end
  if limited then redis.call('ZREM', turns, turn(key, use, fields)) end
end

local function each(listed, work)
  for at = 1, #listed, 2 do work(listed[at], listed[at + 1]) end
end

local function mend(anew)  -- anew: in another order than before
  local known, kept_until = {}, {}
  each(redis.call('HGETALL', uses), function(key, packed)
    if #packed == 24 then known[key] = packed end
  end)
  each(redis.call('ZRANGE', ranks, 0, -1, 'WITHSCORES'), function(name, score)
    local last, key = string.sub(name, 1, 8), string.sub(name, 9)
    if #key > 0 and not known[key] then known[key] = struct.pack('>d', score) .. last .. struct.pack('>d', 1) end
  end)
  each(redis.call('ZRANGE', order, 0, -1, 'WITHSCORES'), function(key, score)
    known[key] = known[key] or struct.pack('>ddd', -1, score, 1)
  end)
  each(redis.call('ZRANGE', kept, 0, -1, 'WITHSCORES'), function(key, score)
    kept_until[key] = score
    known[key] = known[key] or struct.pack('>ddd', -1, 0, 1)
  end)
  local entries = redis.call('HGETALL', index)

  local waiting = {}
  local function flush()
    for part, words in pairs(waiting) do redis.call(unpack(words)) end
    waiting = {}
  end
  write = function(command, part, one, other)
    local words = waiting[part] or {command, part}
    waiting[part] = words
    words[#words + 1] = one
    words[#words + 1] = other
    if #words > 1000 then flush() end
  end
  local function drop(key)
    if not new[key] then redis.call('UNLINK', place .. key) end
  end
  local sums, sums_of = {used = 0, kept = 0}, {}
  local function sum(what, fields)
    local whose = what .. ':' .. fields[3]
    sums[what] = sums[what] + fields[1]
    if limited or what == 'kept' then sums_of[whose] = (sums_of[whose] or 0) + fields[1] end
  end

  redis.call('UNLINK', order, ranks, turns, kept, uses, expiry, tenants)
  local latest = number('tick')
  each(entries, function(key, packed)
    local fields, use = about(packed), {kept_until = kept_until[key]}
    if not (fields and known[key]) then
      redis.call('HDEL', index, key)
      return drop(key)
    end
    use.rank, use.tick, use.count = struct.unpack('>ddd', known[key])
    known[key] = nil
    if not gdsf then
      use.rank = use.tick
    elseif anew or use.rank < 0 then
      use.rank = rank(fields, use.count)
    end
    latest = math.max(latest, use.tick)
    settle(key, use, fields)
    sum('used', fields)
    if use.kept_until then sum('kept', fields) end
    if fields[2] > 0 then write('ZADD', expiry, fields[2], key) end
  end)
  flush()
  write = redis.call
  for key in pairs(known) do drop(key) end
  for whose, size in pairs(sums_of) do redis.call('HSET', tenants, whose, size) end
  redis.call('HSET', state, 'used', sums.used, 'kept', sums.kept, 'tick', latest)
end

local function check()
  look()
  local count, num_kept = redis.call('HLEN', index), redis.call('ZCARD', kept)
  local num_others = redis.call('ZCARD', gdsf and ranks or order)
  if num_others + num_kept ~= count
    or (number('used') ~= 0) ~= (count > 0)
    or redis.call('HLEN', uses) ~= (gdsf and count or num_kept)
    or redis.call('ZCARD', turns) ~= (limited and num_others or 0)
    or (redis.call('HLEN', tenants) > 0) ~= (num_kept > 0 or limited and count > 0) then mend() end
end

local function unindex(key)  -- its size; false: it was not there
  redis.call('ZREM', expiry, key)
  local packed = redis.call('HGET', index, key)
  if not packed then return false end
  local fields, use = about(packed), use_of(key)
  redis.call('HDEL', index, key)
  if not (fields and use) then
    mend()
    return 0
  end
  unsettle(key, use, fields)
  add('used', -1, fields)
  if use.kept_until then add('kept', -1, fields) end
  return fields[1]
end

local function remove(key)
  redis.call('UNLINK', place .. key)
  return unindex(key)
end

local function touch(key)
  tick = tick + 1
  local fields, use = about(redis.call('HGET', index, key)), use_of(key)
  if not (fields and use) then return end
  unsettle(key, use, fields)
  use.tick, use.count = tick, use.count + 1
  use.rank = rank(fields, use.count)
  settle(key, use, fields)
end

local function take_ticks(count)
  tick = redis.call('HINCRBY', state, 'tick', count) - count
end

local function let_go(key)  -- of an entry that was kept
  local fields, use = about(redis.call('HGET', index, key)), use_of(key)
  if fields and use and use.kept_until then
    unsettle(key, use, fields)
    add('kept', -1, fields)
    use.kept_until = nil
    settle(key, use, fields)
  else
    redis.call('ZREM', kept, key)
    mend()
  end
end

local function sweep()  -- what is over by now
  repeat
    local gone = redis.call('ZRANGEBYSCORE', expiry, '-inf', now, 'LIMIT', 0, 100)
    for _, key in ipairs(gone) do remove(key) end
  until #gone == 0
  repeat
    local free = redis.call('ZRANGEBYSCORE', kept, '-inf', now, 'LIMIT', 0, 100)
    for _, key in ipairs(free) do let_go(key) end
  until #free == 0
end
"""

PUT = (
    _PRELUDE
    + """
-- ARGV: now, capacity, how much of it one tenant may fill, how much of it may be kept, the caller's order, '1' if it insists,
-- epoch or '', number of entries, (key, size, expiry or '', metadata)..., keys used in faster tiers...
local capacity, share, most_kept = tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local mine, insists, epoch, count = ARGV[5], ARGV[6] == '1', tonumber(ARGV[7]), tonumber(ARGV[8])
local last = 8 + 4 * count

local function agree()  -- an empty bucket, or one that has lost its `state`, takes the order of whoever comes first
  local noted, empty = redis.call('HMGET', state, 'order', 'limited'), redis.call('HLEN', index) == 0
  local before = noted[1] or 'lru'
  local after = (insists or empty or not noted[1]) and mine or before
  local limits = share < capacity or noted[2] == '1' and not empty
  if after == noted[1] and limits == (noted[2] == '1') then return end
  redis.call('HSET', state, 'order', after, 'limited', limits and '1' or '0')
  look()
  if after ~= before or limits ~= (noted[2] == '1') then mend(after ~= before) end
end

local function first()  -- of all that may leave
  local name = redis.call('ZRANGE', gdsf and ranks or order, 0, 0)[1]
  return name and (gdsf and string.sub(name, 9) or name)
end

local function first_of(tenant)
  local start = turns_of(tenant)
  local name = redis.call('ZRANGEBYLEX', turns, '[' .. start, '(' .. start .. string.char(255), 'LIMIT', 0, 1)[1]
  return name and string.sub(name, #start + 17)
end

local function evict(key)
  if gdsf and key == first() then
    local use = use_of(key)
    if use and use.rank > age then
      age = use.rank
      redis.call('HSET', state, 'age', age)
    end
  end
  return remove(key)
end

local num_evicted, evicted = 0, 0

local function make_room(size, tenant)  -- false, and nothing was evicted: what is kept leaves none
  local function beyond(what)  -- its share, with so much more
    return share < capacity and number(what .. ':' .. tenant, tenants) + size > share
  end
  local mended = false
  while true do
    if number('kept') + size > capacity or beyond('kept') then return false end
    local victim
    if beyond('used') then
      victim = first_of(tenant)
    elseif number('used') + size > capacity then
      victim = first()
    else
      return true
    end
    local freed = victim and evict(victim)
    if freed then
      num_evicted, evicted = num_evicted + 1, evicted + freed
    elseif mended then
      return false
    else
      mend()
      mended = true
    end
  end
end

local function work()
  for at = 9, last, 4 do new[ARGV[at]] = true end
  agree()
  check()
  take_ticks(#ARGV - last + count)  -- refused where memory is full, before anything is changed
  for at = 9, last, 4 do unindex(ARGV[at]) end  -- first of all: nothing that goes below may be what was just written
  sweep()
  while number('kept') > most_kept do  -- the capacity was larger
    local key = redis.call('ZRANGE', kept, 0, 0)[1]
    if key then let_go(key) else mend() end
  end
  for at = last + 1, #ARGV do touch(ARGV[at]) end
  for at = 9, last, 4 do
    local key, size, fields = ARGV[at], tonumber(ARGV[at + 1]), about(ARGV[at + 3])
    tick = tick + 1
    if (epoch and number('epoch') > epoch) or not make_room(size, fields[3]) then
      remove(key)
    else
      redis.call('HSET', index, key, ARGV[at + 3])
      settle(key, {rank = rank(fields, 1), tick = tick, count = 1}, fields)
      add('used', 1, fields)
      if ARGV[at + 2] ~= '' then redis.call('ZADD', expiry, ARGV[at + 2], key) end
    end
  end
  local answer = {number('epoch'), num_evicted, evicted}
  for at = 9, last, 4 do answer[#answer + 1] = redis.call('HEXISTS', index, ARGV[at]) end
  return answer
end

local ok, answer = pcall(work)
if ok then return answer end
-- The values were written before this script ran, and nothing may lie there that no index knows.
for at = 9, last, 4 do pcall(remove, ARGV[at]) end
return redis.error_reply(type(answer) == 'table' and answer.err or answer)
"""
)

KEEP = (
    _PRELUDE
    + """
-- ARGV: now, until when, how much may be kept of one tenant and in all, keys...: how many are kept so long from now on
local kept_until, share, most_kept = tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local count = 0
check()
sweep()
for at = 5, #ARGV do
  local key = ARGV[at]
  local fields, use = about(redis.call('HGET', index, key)), use_of(key)
  if fields and use then
    if kept_until <= now then
      if use.kept_until then let_go(key) end
    elseif use.kept_until then
      if tonumber(use.kept_until) < kept_until then redis.call('ZADD', kept, ARGV[2], key) end
      count = count + 1
    elseif number('kept') + fields[1] <= most_kept and number('kept:' .. fields[3], tenants) + fields[1] <= share then
      unsettle(key, use, fields)
      use.kept_until = ARGV[2]
      settle(key, use, fields)
      add('kept', 1, fields)
      count = count + 1
    end
  end
end
return count
"""
)

TOUCH = (
    _PRELUDE
    + """
-- ARGV: now, keys...
look()
take_ticks(#ARGV - 1)
for at = 2, #ARGV do touch(ARGV[at]) end
"""
)

DISCARD = (
    _PRELUDE
    + """
-- ARGV: now, (key, metadata)...: removes those that still have this metadata. How many.
look()
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
look()
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

if ARGV[2] == '0' then check() else look() end
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
-- ARGV: now. (entries, used bytes, kept bytes)
check()
sweep()
return {redis.call('HLEN', index), number('used'), number('kept')}
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
local types = {'hash', 'zset', 'zset', 'hash', 'list', 'zset', 'zset', 'zset', 'hash', 'hash'}
local count = 0
for at, wanted in ipairs(types) do
  local found = redis.call('TYPE', KEYS[at]).ok
  if found ~= 'none' and found ~= wanted then count = count + redis.call('UNLINK', KEYS[at]) end
end
redis.call('HDEL', KEYS[4], 'used')  -- whoever ran into it may have stopped half way: at odds, for `check`
return count
"""

STRAYS = """
-- ARGV: entries whose values were seen. Removes the values that no index knows. How many.
local count = 0
for _, key in ipairs(ARGV) do
  if redis.call('HEXISTS', KEYS[1], key) == 0 then count = count + redis.call('UNLINK', KEYS[#KEYS] .. key) end
end
return count
"""
