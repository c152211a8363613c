"""What a state store does on a Redis server: each operation is one script, so that nobody sees half of it."""

from __future__ import annotations

from beluga_airflow.state.watching import PAGE, SWEEP

__all__ = ["NAMES", "SCRIPTS"]

HISTORY_BYTES = 256_000_000
"""Of values in the history; it is shorter where they are large, but never than the last KEPT changes."""
KEPT = 1_000
PAGE_BYTES = 8_000_000
"""Of values after which a page of changes ends."""

NAMES = ("head", "entries", "names", "ends", "changes")
"""Version and bytes so far; `version value` by key; the keys in order; when keys end, in ms; the history."""
_COMMON = f"""
local HEAD, ENTRIES, NAMES, ENDS, CHANGES = unpack(KEYS)
local call = redis.call

local function now()
  local time = call('TIME')
  return time[1] * 1000 + time[2] / 1000
end

local function is_over(key)
  local ends = call('ZSCORE', ENDS, key)
  return ends and tonumber(ends) <= now()
end

local function prune(total)
  while total > {HISTORY_BYTES} and call('XLEN', CHANGES) > {KEPT} do
    local oldest = call('XRANGE', CHANGES, '-', '+', 'COUNT', 1)[1][2]
    if total - oldest[4] <= {HISTORY_BYTES} then return end
    call('XTRIM', CHANGES, 'MAXLEN', call('XLEN', CHANGES) - 1)
  end
end

local function newest()
  local version = call('HGET', HEAD, 'version')
  if not version then
    -- a store begins with the time, in microseconds, so that no version comes back where the server lost everything
    local time = call('TIME')
    version = ('%.0f'):format(time[1] * 1000000 + time[2])
    call('HSET', HEAD, 'version', version)
  end
  return version
end

local function note(key, history, text)
  local version, total = newest() + 1, (call('HGET', HEAD, 'total') or 0) + #(text or '')
  -- first what may fail: a script that fails undoes nothing
  call('XADD', CHANGES, 'MAXLEN', history, ('%.0f-0'):format(version), 'key', key, 'total', total,
       unpack(text and {{'value', text}} or {{}}))
  call('HSET', HEAD, 'version', ('%.0f'):format(version), 'total', total)
  prune(total)
  return version
end

local function remove(key, history)
  -- no memory is needed to begin with, so that a full server can be emptied
  call('HDEL', ENTRIES, key)
  call('ZREM', NAMES, key)
  call('ZREM', ENDS, key)
  note(key, history)
end

local function sweep(history, limit)
  local over = call('ZRANGE', ENDS, '-inf', now(), 'BYSCORE', 'LIMIT', 0, limit)
  for _, key in ipairs(over) do remove(key, history) end
  return #over == limit
end

local function store(key, history, text, ttl)
  local version = note(key, history, text)
  call('HSET', ENTRIES, key, ('%.0f '):format(version) .. text)
  call('ZADD', NAMES, 0, key)
  if ttl == '' then call('ZREM', ENDS, key) else call('ZADD', ENDS, now() + ttl * 1000, key) end
  -- of the two changes that this may have made
  if version % {SWEEP} < 2 then sweep(history, {SWEEP}) end
  return version
end

local function there(from, to, limit)
  -- the keys of a page that are not over, and where the next page begins
  local keys, found = call('ZRANGE', NAMES, from, to, 'BYLEX', 'LIMIT', 0, limit), {{}}
  local ends, time = keys[1] and call('ZMSCORE', ENDS, unpack(keys)), now()
  for at, key in ipairs(keys) do
    if not ends[at] or tonumber(ends[at]) > time then found[#found + 1] = key end
  end
  return found, #keys == limit and '(' .. keys[limit]
end
"""
_OWN = {
    "get": """
local key = ARGV[1]
return not is_over(key) and call('HGET', ENTRIES, key)
""",
    "set": """
local key, history, text, ttl = unpack(ARGV)
if is_over(key) then remove(key, history) end
return store(key, history, text, ttl)
""",
    "swap": """
local key, history, text, ttl, version = unpack(ARGV)
if is_over(key) then remove(key, history) end
local entry = call('HGET', ENTRIES, key)
return (entry and entry:match('^%d+') or '') == version and store(key, history, text, ttl)
""",
    "delete": """
local key, history = unpack(ARGV)
local was_there = call('HEXISTS', ENTRIES, key) == 1
local was_over = is_over(key)
if was_there then remove(key, history) end
return was_there and not was_over
""",
    "keys": f"""
local found, next = there(ARGV[1], ARGV[2], {PAGE})
return {{found, next}}
""",
    "now": f"""
local next, all = ARGV[1], {{}}
while next do
  local found
  found, next = there(next, ARGV[2], {PAGE})
  for at, entry in ipairs(found[1] and call('HMGET', ENTRIES, unpack(found)) or {{}}) do
    all[#all + 1] = found[at]
    all[#all + 1] = entry
  end
end
return {{newest(), all}}
""",
    "changes": f"""
local after, limit, size, all = tonumber(ARGV[1]), tonumber(ARGV[2]), 0, {{}}
local version = newest()
local first = call('XRANGE', CHANGES, ('%.0f-0'):format(after + 1), '+', 'COUNT', 1)[1]
local from = first and tonumber(first[1]:match('^%d+')) or version + 1
while from == after + 1 and #all / 2 < limit and size < {PAGE_BYTES} do
  local start = ('%.0f-0'):format(from + #all / 2)
  local page = call('XRANGE', CHANGES, start, '+', 'COUNT', math.min(10, limit - #all / 2))
  if not page[1] then break end
  for _, entry in ipairs(page) do
    all[#all + 1] = entry[2][2]
    all[#all + 1] = entry[2][6] or false
    size = size + #(entry[2][6] or '')
  end
end
return {{version, from, all}}
""",
    "remove_expired": f"""
return sweep(ARGV[1], {PAGE})
""",
}
SCRIPTS = {name: _COMMON + text for name, text in _OWN.items()}
"""By what they do; each is given NAMES, and its own arguments."""
