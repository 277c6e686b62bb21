-- Decides a batch of requests: each takes all of its charges or none, in the order of the batch, on this server's time.
--
-- KEYS     one for each charge, in order.
-- ARGV[1]  a number that the reply begins with, so that it is known to be the reply to this.
-- ARGV[2]  the decisions, packed: operation and number of charges (2 bytes), the instant of a refund (a double), then
--          for each charge its kind (1 byte) and its numbers (doubles, whole, below 2^53).
-- Reply    ARGV[1], the time in seconds and microseconds; for each decision a status, and two or three numbers for
--          each of its charges. Nothing is written before everything is decided.
--
-- A bucket is the instant at which it is full again: whole microseconds `q`, and `f` of `s` parts of one more, because
-- the time between two tokens is rarely whole. It is kept with the rate's `s` and capacity, so that a rate that has
-- changed since finds the fraction that was used. A quota is the end of its window and what was used in it, and for
-- each holder of a lease what it has not spent yet, and until when. Slots are for each holder how many it has, and
-- until when.

local SPEND, DEBIT, REFUND = 0, 1, 2
local BUCKET, QUOTA, SLOTS = 0, 1, 2
local REFUSED, DONE, ELSEWHEN = 0, 1, 2
local SETBACK = 3600000000 -- how far a clock may step back over the start of a window and still be in it

local read, pack = struct.unpack, struct.pack
local ceil, max, min = math.ceil, math.max, math.min
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local out = {tonumber(ARGV[1]), tonumber(time[1]), tonumber(time[2])}
local data, at, nth = ARGV[2], 1, 0
local states, dirty = {}, {} -- by key: what is known now, and the kinds of those that have to be written

local function known(kind, key)
  local state = states[key]
  if state then return state end
  local raw = redis.call('GET', key)
  if kind == BUCKET then
    state = {q = 0, f = 0, s = 1, c = 1}
    if raw and #raw == 32 then state.q, state.f, state.s, state.c = read('<dddd', raw) end
  elseif kind == QUOTA then
    state = {stop = 0, used = 0, leases = {}}
    if raw and #raw >= 16 and #raw % 24 == 16 then
      state.stop, state.used = read('<dd', raw)
      for p = 17, #raw, 24 do
        local who, rest, till = read('<ddd', raw, p)
        if till > now then state.leases[#state.leases + 1] = {who, rest, till}
        else state.used = max(0, state.used - rest) end -- its holder is gone
      end
    end
  else
    state = {}
    if raw and #raw % 24 == 0 then
      for p = 1, #raw, 24 do
        local who, count, till = read('<ddd', raw, p)
        if till > now then state[#state + 1] = {who, count, till} end
      end
    end
  end
  states[key] = state
  return state
end

-- A list in which `who` has `count` until `till`; who has nothing is not in it.
local function with(list, who, count, till)
  local new = {}
  for i = 1, #list do
    if list[i][1] ~= who then new[#new + 1] = list[i] end
  end
  if count > 0 then new[#new + 1] = {who, count, till} end
  return new
end

-- Of a bucket: how it is, how it is after the operation, whether that fits, whether a step of the clock was mended, and
-- the lease it got (of a debit: whether it hit the bottom).
local function bucket(op, key, since)
  local s, cost, costf, cap, capf, most, mostf, lease, leasef
  s, cost, costf, cap, capf, most, mostf, lease, leasef, at = read('<ddddddddd', data, at)
  local state = known(BUCKET, key)
  local q, f, mended = state.q, state.f, false
  if q > now and (state.s ~= s or state.c ~= cap) then
    -- Another rate was in force: what was used of it is used of this one.
    q, f = now + ceil(min(q + 1 - now, 2 * state.c + 2) / (state.c + 1) * cap), 0
  end
  if q < now then
    q, f = now, 0
  elseif q - now > most or (q - now == most and f > mostf) then
    q, f, mended = now + most, mostf, true -- kept, or a clock that stepped back would starve this bucket
  end
  local before = {q = q, f = f, s = s, c = cap}
  if op == REFUND then
    if now - since < cap then -- later, what was spent then is there again by itself
      q, f = q - cost, f - costf
      if f < 0 then q, f = q - 1, f + s end
      if q < now then q, f = now, 0 end
    end
    return before, {q = q, f = f, s = s, c = cap}, true, mended, 0
  end
  q, f = q + cost, f + costf
  if f >= s then q, f = q + 1, f - s end
  local ahead, granted = q - now, 0
  if op == DEBIT then
    if ahead > most or (ahead == most and f > mostf) then q, f, granted = now + most, mostf, 1 end
  elseif (ahead > cap or (ahead == cap and f > capf)) and cost + costf > 0 then
    return before, before, false, mended, 0
  elseif lease + leasef > 0 then
    local lq, lf = q + lease, f + leasef
    if lf >= s then lq, lf = lq + 1, lf - s end
    if lq - now < cap or (lq - now == cap and lf <= capf) then q, f, granted = lq, lf, 1 end
  end
  return before, {q = q, f = f, s = s, c = cap}, true, mended, granted
end

-- The same of a quota; nothing where the caller is wrong about which window it is.
local function quota(op, key, since)
  local start, stop, limit, cost, lease, who, mine, span
  start, stop, limit, cost, lease, who, mine, span, at = read('<dddddddd', data, at)
  if now >= stop or now < start - SETBACK then return end
  local state = known(QUOTA, key)
  local used, leases = state.used, state.leases
  if state.stop < stop then used, leases = 0, {} end
  local before = {stop = stop, used = used, leases = leases}
  local fits, granted = true, 0
  if op == REFUND then
    if since >= min(start, now) then used = max(0, used - cost) end
  elseif op == DEBIT then
    used = min(used + cost, 281474976710655)
  elseif used + cost > limit and cost > 0 then
    return before, before, false, state.stop > stop, 0
  else
    used = used + cost
    if lease > 0 and used + lease <= limit then used, granted = used + lease, 1 end
  end
  if who > 0 then leases = with(leases, who, mine + granted * lease, now + span) end
  return before, {stop = stop, used = used, leases = leases}, fits, state.stop > stop, granted
end

-- The same of slots, and how many others have. What a holder is sure to have it has, whatever was lost before.
local function slots(op, key, since)
  local who, floor, step, limit, exact, span
  who, floor, step, limit, exact, span, at = read('<dddddd', data, at)
  local list, others, mine = known(SLOTS, key), 0, 0
  for i = 1, #list do
    if list[i][1] == who then mine = list[i][2] else others = others + list[i][2] end
  end
  local base = exact == 1 and floor or max(mine + min(step, 0), floor)
  local count = base + max(step, 0)
  local fits = step <= 0 or others + count <= limit
  local before, after = with(list, who, base, now + span), with(list, who, count, now + span)
  before.mine, before.fits, after.mine, after.fits = base, fits and 1 or 0, count, 1
  return before, after, fits, true, others
end

local kinds_of = {[BUCKET] = bucket, [QUOTA] = quota, [SLOTS] = slots}

while at <= #data do
  local op, count, since
  op, count, since, at = read('<BBd', data, at)
  local first, status = nth, DONE
  local olds, befores, afters, mends, extras, kinds = {}, {}, {}, {}, {}, {}
  for i = 1, count do
    nth = nth + 1
    local key, kind, fits = KEYS[nth], nil, nil
    kind, at = read('<B', data, at)
    kinds[i], olds[i] = kind, states[key]
    befores[i], afters[i], fits, mends[i], extras[i] = kinds_of[kind](op, key, since)
    if fits == nil then status = ELSEWHEN
    elseif not fits and status == DONE then status = REFUSED end
    -- Seen by whoever comes next, also where a request charges one key twice.
    if fits then states[key] = afters[i] end
  end
  out[#out + 1] = status
  if status ~= DONE then
    for i = count, 1, -1 do
      local key = KEYS[first + i]
      states[key] = mends[i] and befores[i] or olds[i]
      if mends[i] and status == REFUSED then dirty[key] = kinds[i] end
    end
  end
  if status ~= ELSEWHEN then
    for i = 1, count do
      local kind, state = kinds[i], (status == DONE and op ~= DEBIT) and afters[i] or befores[i]
      if status == DONE then dirty[KEYS[first + i]] = kind end
      local n = #out
      if kind == BUCKET then out[n + 1], out[n + 2] = state.q, state.f
      elseif kind == QUOTA then out[n + 1], out[n + 2] = state.used, 0
      else out[n + 1], out[n + 2] = state.mine, state.fits end
      out[n + 3] = extras[i]
    end
  end
end

for key, kind in pairs(dirty) do
  local state, value, till = states[key], nil, 0
  if kind == BUCKET then
    value, till = pack('<dddd', state.q, state.f, state.s, state.c), state.q
  else
    local list = state
    if kind == QUOTA then
      value, till, list = pack('<dd', state.stop, state.used), state.stop, state.leases
    else
      value = ''
    end
    for i = 1, #list do
      value = value .. pack('<ddd', list[i][1], list[i][2], list[i][3])
      if kind == SLOTS then till = max(till, list[i][3]) end
    end
  end
  if till > now and (kind ~= QUOTA or state.used > 0) then
    redis.call('SET', key, value, 'PX', ceil((till - now) / 1000))
  else
    redis.call('DEL', key)
  end
end
return out
