-- Decides a batch of requests: each takes all of its charges or none, in the order of the batch, on this server's time.
--
-- KEYS     one for each charge, in order.
-- ARGV[1]  a number that the reply begins with, so that it is known to be the reply to this.
-- ARGV[2]  terms and decisions, packed. First how many terms (2 bytes), each of them a kind (1 byte) and its numbers
--          (doubles, whole, below 2^53). Then for each decision the operation and the number of charges (2 bytes), the
--          instant of a refund (a double), and for each charge which of the terms hold for it (2 bytes).
-- Reply    ARGV[1], the time in seconds and microseconds; for each decision a status, and unless that is ELSEWHEN three
--          numbers for each of its charges. Nothing is written before everything is decided.
--
-- A bucket is the instant at which it is full again: whole microseconds `q`, and `f` of `s` parts of one more, because
-- the time between two tokens is rarely whole. It is kept with the rate's `s` and capacity, so that a rate that has
-- changed since finds the fraction that was used. A quota is the end of its window and what was used in it, and for
-- each holder of a lease what it has not spent yet, and until when. Slots are for each holder how many it has, and
-- until when.

local DEBIT, REFUND = 1, 2 -- and 0, which is to spend
local BUCKET, QUOTA, SLOTS = 0, 1, 2
local REFUSED, DONE, ELSEWHEN = 0, 1, 2
local SETBACK = 3600000000 -- how far a clock may step back over the start of a window and still be in it
local PACE = 100000 -- how long before it is there a lease may be taken: its holder spends it as it comes

local read, pack = struct.unpack, struct.pack
local ceil, max, min = math.ceil, math.max, math.min
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local out = {tonumber(ARGV[1]), tonumber(time[1]), tonumber(time[2])}
local data, at, nth = ARGV[2], 1, 0
local states, dirty = {}, {} -- by key: what is known now, and the kinds of those that have to be written

-- The holders that `raw` tells of from `p` on and that have not expired, and how much those had that have.
local function holders(raw, p)
  local list, gone = {}, 0
  for i = p, #raw, 24 do
    local who, count, till = read('<ddd', raw, i)
    if till > now then list[#list + 1] = {who, count, till} else gone = gone + count end
  end
  return list, gone
end

local function known(kind, key)
  local state = states[key]
  if state then return state end
  local raw = redis.call('GET', key)
  if kind == BUCKET then
    if raw and #raw == 32 then state = {read('<dddd', raw)} else state = {0, 0, 1, 1} end
  elseif kind == QUOTA then
    state = {stop = 0, used = 0, leases = {}}
    if raw and #raw >= 16 and #raw % 24 == 16 then
      local gone
      state.leases, gone = holders(raw, 17)
      state.stop, state.used = read('<dd', raw)
      state.used = max(0, state.used - gone)
    end
  else
    state = raw and #raw % 24 == 0 and holders(raw, 1) or {}
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

-- Each kind takes the operation, the key, its terms and the instant of a refund, and says: whether it fits, how it is
-- before and after, whether a step of the clock was mended (or the like: what was before is kept in any case), and of
-- both states the numbers to reply, with a third. Nothing is said by a quota whose caller is wrong about its window.

-- The third number is the lease that it got, or of a debit whether it hit the bottom.
local function bucket(op, key, t, since)
  local s, cap, capf = t[1], t[4], t[5]
  local state, mended = known(BUCKET, key), false
  local q, f = state[1], state[2]
  if q < now then
    q, f = now, 0
  else
    if q > now and (state[3] ~= s or state[4] ~= cap) then
      -- Another rate was in force: what was used of it is used of this one.
      q, f = now + ceil(min(q + 1 - now, 2 * state[4] + 2) / (state[4] + 1) * cap), 0
    end
    local ahead, most = q - now, t[6]
    if ahead > most or (ahead == most and f > t[7]) then
      q, f, mended = now + most, t[7], true -- kept, or a clock that stepped back would starve this bucket
    end
  end
  local q0, f0 = q, f
  if op == REFUND then
    if now - since < cap then -- later, what was spent then is there again by itself
      q, f = q - t[2], f - t[3]
      if f < 0 then q, f = q - 1, f + s end
      if q < now then q, f = now, 0 end
    end
    return true, {q0, f0, s, cap}, {q, f, s, cap}, mended, q0, f0, q, f, 0
  end
  q, f = q + t[2], f + t[3]
  if f >= s then q, f = q + 1, f - s end
  local ahead, granted = q - now, 0
  if op == DEBIT then
    local most = t[6]
    if ahead > most or (ahead == most and f > t[7]) then q, f, granted = now + most, t[7], 1 end
  elseif (ahead > cap or (ahead == cap and f > capf)) and t[2] + t[3] > 0 then
    local before = {q0, f0, s, cap}
    return false, before, before, mended, q0, f0, q0, f0, 0
  elseif t[8] + t[9] > 0 then
    local lq, lf = q + t[8], f + t[9]
    if lf >= s then lq, lf = lq + 1, lf - s end
    if lq - now < cap + PACE then q, f, granted = lq, lf, 1 end
  end
  return true, mended and {q0, f0, s, cap}, {q, f, s, cap}, mended, q0, f0, q, f, granted
end

-- The third number is the lease that it got.
local function quota(op, key, t, since)
  local start, stop, limit, cost, lease, who = t[1], t[2], t[3], t[4], t[5], t[6]
  if now >= stop or now < start - SETBACK then return end
  -- Only who knows better may be early: somebody whose clock is ahead would open the window for everybody.
  if now < start and t[9] == 0 and known(QUOTA, key).stop < stop then return end
  local state = known(QUOTA, key)
  local used, leases = state.used, state.leases
  if state.stop < stop then used, leases = 0, {} end
  local before, mended, granted = {stop = stop, used = used, leases = leases}, state.stop > stop, 0
  if op == REFUND then
    -- A lease that has expired is back already.
    local back = who == 0
    for i = 1, #leases do back = back or leases[i][1] == who end
    if back and since >= min(start, now) then used = max(0, used - cost) end
  elseif op == DEBIT then
    used = min(used + cost, 281474976710655)
  elseif used + cost > limit and cost > 0 then
    if who > 0 then before.leases, mended = with(leases, who, t[7], now + t[8]), true end
    return false, before, before, mended, used, 0, used, 0, 0
  else
    used = used + cost
    if lease > 0 and used + lease <= limit then used, granted = used + lease, 1 end
  end
  if who > 0 then leases = with(leases, who, granted * lease, now + t[8]) end
  return true, before, {stop = stop, used = used, leases = leases}, mended, before.used, 0, used, 0, granted
end

-- The second number is whether there was a slot, the third how many others have. What a holder is sure to have it has,
-- whatever was lost before.
local function slots(op, key, t, since)
  local who, floor, step, limit, exact, till = t[1], t[2], t[3], t[4], t[5], now + t[6]
  local list, others, mine = known(SLOTS, key), 0, 0
  for i = 1, #list do
    if list[i][1] == who then mine = list[i][2] else others = others + list[i][2] end
  end
  local base = exact == 1 and floor or max(mine + min(step, 0), floor)
  local count = base + max(step, 0)
  local fits = step <= 0 or others + count <= limit
  local before, after = with(list, who, base, till), with(list, who, count, till)
  return fits, before, after, true, base, fits and 1 or 0, count, 1, others
end

local decide = {[BUCKET] = bucket, [QUOTA] = quota, [SLOTS] = slots}
local numbers = {[BUCKET] = '<ddddddddd', [QUOTA] = '<ddddddddd', [SLOTS] = '<dddddd'}

local terms, kinds, number = {}, {}, nil
number, at = read('<H', data)
for i = 0, number - 1 do
  local kind, t
  kind, at = read('<B', data, at)
  t = {read(numbers[kind], data, at)}
  terms[i], kinds[i], at = t, kind, t[#t]
end

local olds, befores, mends, which = {}, {}, {}, {} -- of the charges of one decision
local a0, b0, a1, b1, c = {}, {}, {}, {}, {}

while at <= #data do
  local op, count, since
  op, count, since, at = read('<BBd', data, at)
  local first, status = nth, DONE
  for i = 1, count do
    local term, fits, after
    nth = nth + 1
    term, at = read('<H', data, at)
    local key, kind = KEYS[nth], kinds[term]
    which[i], olds[i] = kind, states[key]
    fits, befores[i], after, mends[i], a0[i], b0[i], a1[i], b1[i], c[i] = decide[kind](op, key, terms[term], since)
    if fits then states[key] = after -- seen by whoever comes next, also where a request charges one key twice
    elseif fits == nil then status = ELSEWHEN
    elseif status == DONE then status = REFUSED end
  end
  local n = #out + 1
  out[n] = status
  if status ~= DONE then
    for i = count, 1, -1 do
      local key = KEYS[first + i]
      states[key] = mends[i] and befores[i] or olds[i]
      if mends[i] and status == REFUSED then dirty[key] = which[i] end
    end
  end
  if status ~= ELSEWHEN then
    local before = status == REFUSED or op == DEBIT
    for i = 1, count do
      if status == DONE then dirty[KEYS[first + i]] = which[i] end
      out[n + 1], out[n + 2], out[n + 3] = before and a0[i] or a1[i], before and b0[i] or b1[i], c[i]
      n = n + 3
    end
  end
end

for key, kind in pairs(dirty) do
  local state, value, till = states[key], '', 0
  if kind == BUCKET then
    till = state[1] + (state[2] > 0 and 1 or 0)
    if till > now then value = pack('<dddd', state[1], state[2], state[3], state[4]) end
  else
    local list = state
    if kind == QUOTA then
      if state.used > 0 then till = state.stop end
      value, list = pack('<dd', state.stop, state.used), state.leases
    end
    for i = 1, #list do
      value = value .. pack('<ddd', list[i][1], list[i][2], list[i][3])
      if kind == SLOTS then till = max(till, list[i][3]) end
    end
  end
  if till > now then
    redis.call('SET', key, value, 'PX', ceil((till - now) / 1000))
  else
    redis.call('DEL', key)
  end
end
return out
