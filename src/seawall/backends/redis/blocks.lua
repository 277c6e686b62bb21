-- Blocks a tenant or lets it in again. All blocks are one JSON text, {"till": 0, "blocks": {"name": [0, "reason"]}}: of
-- each the instant until which it holds, in milliseconds, and the last such instant that there has been.
--
-- KEYS[1]  where the text is.
-- ARGV     the tenant's name, for how many milliseconds (0: no longer), the reason, and how many blocks there may be.
-- Reply    the text; or how many blocks there are, where that is too many for one more.

local name, length, reason, most = ARGV[1], tonumber(ARGV[2]), ARGV[3], tonumber(ARGV[4])
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local till, blocks, count = now, {}, 0

local function read()
  local known = cjson.decode(redis.call('GET', KEYS[1]))
  till = math.max(till, known.till)
  for other, block in pairs(known.blocks) do
    if other ~= name and block[1] > now then blocks[other], count = {block[1], block[2]}, count + 1 end
  end
end

pcall(read) -- what is not there, or is something else, blocks nobody
if length > 0 then
  if count >= most then return count end
  blocks[name] = {now + length, reason}
  till = math.max(till, now + length)
end

-- It outlives the last block that it has had, also where that is taken back: so if it is missing, it was lost.
local text = cjson.encode({till = till, blocks = blocks})
if till > now then
  redis.call('SET', KEYS[1], text, 'PX', till - now)
else
  redis.call('DEL', KEYS[1])
end
return text
