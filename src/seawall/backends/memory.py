"""State in this process: plain functions, no lock, no timer, O(1) whatever the number of keys.

A meter keeps its buckets in a few hundred dicts and not in one, because a dict of 700,000 keys takes 22..146 ms in the
one insert that makes it grow; one of a few thousand takes less than a scheduler's tick. The values are plain
integers, so that the garbage collector has nothing to walk.

Keys are forgotten incrementally: whoever brings a new key looks at the oldest of its shard and of another in turn,
drops those that are full again (which no later decision can notice, G11) and moves the others to the end of their line.
There is no sweep.
Where nothing can be forgotten and the store is at its cap, new keys share a few overflow buckets: strangers may then be
refused for each other's sake, but nobody's exhausted bucket is ever reset by somebody else's flood.

A limit that changes gets another meter, which finds each caller's usage when it first comes: a bucket keeps the
fraction that is used, a quota its count. The meter before lives for as long as it holds anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from threading import Lock
from time import monotonic_ns, time_ns
from typing import Any, TypeAlias, cast, final
from weakref import WeakSet, WeakValueDictionary

from seawall.backends import KNOWN, LISTED, TENANTS, Charge, Key, Meter, Verdict, stored
from seawall.blocks import Block, Blocks
from seawall.decision import NEVER, Clock
from seawall.rate import COUNT_BITS, COUNT_MASK, SECOND, Quota, Rate, spend, spend_quota

SHARD_KEYS = 2_000
FEW_SHARDS = 17
"""Of a limit that a single tenant may have for itself: thousands of them take no more than their keys do."""
OWN = frozenset({LISTED, KNOWN})
"""Stores whose tenants may each have limits of their own."""
OVERFLOW_BUCKETS = 64


Count: TypeAlias = tuple[str, str, Key, int, int]
"""What a caller has used of a quota: the policy's name, the kind of key, the key, the end of the window in seconds
since the epoch, and the units."""


@final
class _Family:
    """The meters of one name, all buckets or all quotas: a caller has a state in at most one of them."""

    __slots__ = ("kept", "meters", "own")

    def __init__(self) -> None:
        self.kept: dict[tuple[str, Key], int] = {}
        """States out of a snapshot, by kind of key, of callers who have not come since."""
        self.own: dict[Key, MemoryMeter] = {}
        """By tenant, of `OWN` stores: nobody could look through all."""
        self.meters: WeakSet[MemoryMeter] = WeakSet()
        """Of all other callers: few, for all of a store have one rate but for those before a reload."""


class _Store:
    """What is counted and capped together: all meters over one kind of identity. ``meters`` are those with keys, and
    some that had."""

    __slots__ = ("cap", "evicted", "keys", "meters", "overflowed", "turn")

    def __init__(self, cap: int) -> None:
        self.cap = cap
        self.keys = 0
        self.evicted = 0
        self.overflowed = 0
        self.meters: list[MemoryMeter] = []
        self.turn = 0

    def forget_next(self, now: int, wall: int) -> None:
        """Look at the oldest key of some meter, each in its turn."""
        self.turn += 1
        at = self.turn % len(self.meters)
        meter = self.meters[at]
        if meter.held:
            meter.forget_next(now, wall)
        elif len(self.meters) > 1:
            # Nothing keeps it here, so that it goes with the last policy that speaks of it.
            self.meters[at] = self.meters[-1]
            self.meters.pop()
            meter.enrolled = False

    def forget_one(self, now: int, wall: int) -> bool:
        """Whether a key was forgotten: of the meters that hold any, each is asked in its turn."""
        holding = [meter for meter in self.meters if meter.held]
        for _ in range(8):
            self.turn += 1
            if holding[self.turn % len(holding)].forget_next(now, wall):
                return True
        return False


@final
class MemoryMeter(Meter):
    """A limit and its buckets: full-again instants (or window counts) by key, spread over ``size`` dicts."""

    __slots__ = (
        "capacity",
        "ceiling",
        "counts",
        "enrolled",
        "family",
        "hand",
        "held",
        "interval",
        "overflow",
        "quota",
        "scale",
        "shards",
        "size",
    )

    def __init__(self, name: str, store: str, rate: Rate | Quota, counts: _Store, family: _Family, size: int) -> None:
        super().__init__(name, store, rate)
        self.counts = counts
        self.family = family
        self.enrolled = False
        # An odd number, and by remainder: dicts index by the low bits of the same hash, and keys that agree in
        # those would all collide inside their shard.
        self.size = size
        self.shards: list[dict[Key, int]] = [{} for _ in range(size)]
        self.overflow: dict[Key, int] = {}
        self.held = 0
        self.hand = 0
        bucket = rate if isinstance(rate, Rate) else None
        self.scale = bucket.scale if bucket else 0
        self.interval = bucket.interval if bucket else 0
        self.capacity = bucket.capacity if bucket else 0
        self.ceiling = bucket.ceiling if bucket else 0
        self.quota = rate if isinstance(rate, Quota) else None

    def locate(self, key: Key) -> dict[Key, int]:
        """The dict that ``key`` is in, or would be in."""
        return self.overflow if key in self.overflow else self.shards[hash(key) % self.size]

    def reap(self, shard: dict[Key, int], now: int, wall: int) -> bool:
        """Whether the oldest key of ``shard`` was full again and is forgotten; otherwise it becomes the youngest."""
        key = next(iter(shard), None)
        if key is None:
            return False
        state = shard.pop(key)
        if state <= now * self.scale if self.quota is None else state < self.quota.enter(wall):
            self._drop(key)
            self.counts.evicted += 1
            return True
        shard[key] = self.attempt(state, now, wall, 0)[0]
        return False

    def hold(self, shard: dict[Key, int], key: Key, state: int) -> None:
        """Track ``key``, which is not tracked yet."""
        if not self.enrolled:
            self.enrolled = True
            self.counts.meters.append(self)
        self.held += 1
        self.counts.keys += 1
        if self.store in OWN:
            self.family.own[key] = self
        shard[key] = state

    def _drop(self, key: Key) -> None:
        self.held -= 1
        self.counts.keys -= 1
        if self.store in OWN:
            self.family.own.pop(key, None)

    def inherited(self, key: Key, now: int, wall: int) -> int | None:
        """The state of ``key`` by this limit, out of the meter of the limit that it was before; taken from there."""
        family = self.family
        if self.store in TENANTS:
            before = family.own.get(key)
            if before is not None:
                return self._take(before, key, now, wall)
        if len(family.meters) > (self.store not in OWN):
            for other in family.meters:
                if (
                    other is not self
                    and other.held
                    and (other.store == self.store or {other.store, self.store} <= TENANTS)
                ):
                    state = self._take(other, key, now, wall)
                    if state is not None:
                        return state
        kept = family.kept.pop((stored(self.store), key), None) if family.kept else None
        if kept is None or self.quota is None:
            return None
        # Of another span or zone, perhaps: what counts is whether its own window has ended.
        return self.quota.enter(wall) + (kept & COUNT_MASK if (kept >> COUNT_BITS) * SECOND > wall else 0)

    def _take(self, other: MemoryMeter, key: Key, now: int, wall: int) -> int | None:
        state = other.shards[hash(key) % other.size].pop(key, None)
        if state is None:
            return None
        other._drop(key)
        if self.quota is None:
            used = min(max(0, state - now * other.scale), other.ceiling)
            return now * self.scale - (-used * self.capacity // other.capacity)
        return self.quota.enter(wall) + cast(Quota, other.quota).used(state, wall)

    def forget_next(self, now: int, wall: int) -> bool:
        """`reap` in the next shard that holds anything, as far as one is near."""
        for _ in range(128):
            self.hand += 1
            shard = self.shards[self.hand % self.size]
            if shard:
                return self.reap(shard, now, wall)
        return False

    def attempt(self, state: int, now: int, wall: int, cost: int) -> tuple[int, int]:
        """`seawall.rate.spend` or `spend_quota`, whichever this limit is."""
        if self.quota is not None:
            return spend_quota(state, wall, self.quota, cost)
        return spend(state, now, cast(Rate, self.rate), cost)


@final
class MemoryBackend:
    """Buckets and quotas in memory, exact for one process.

    ``max_keys`` is the number of keys that each store tracks: addresses, unlisted tenants and combinations are each
    capped on their own, rates apart from quotas. 100,000 by default, at most about 250 bytes each.
    """

    name = "memory"

    def __init__(self, *, max_keys: int = 100_000, clock: Clock = monotonic_ns, wall_clock: Clock = time_ns) -> None:
        if max_keys < 1:
            raise ValueError(f"max_keys must be at least 1, not {max_keys}")
        self._max_keys = max_keys
        self._clock = clock
        self._wall = wall_clock
        self._stores: dict[str, _Store] = {}
        self._meters: WeakValueDictionary[tuple[str, str, Rate | Quota], MemoryMeter] = WeakValueDictionary()
        self._families: dict[tuple[str, type[Rate | Quota]], _Family] = {}
        self.blocks = Blocks(wall_clock)
        self._making = Lock()
        """A policy that is loaded anew is compiled in another thread."""

    def __repr__(self) -> str:
        keys = sum(store.keys for store in self._stores.values())
        return f"<MemoryBackend {keys} keys in {len(self._stores)} stores, at most {self._max_keys} each>"

    def meter(self, name: str, store: str, rate: Rate | Quota) -> MemoryMeter:
        """The meter for a limit; the same one for the same name, store and rate."""
        with self._making:
            return self._meters.get((name, store, rate)) or self._make(name, store, rate)

    def _make(self, name: str, store: str, rate: Rate | Quota) -> MemoryMeter:
        capped = store != LISTED
        counted = f"{store}-quota" if capped and isinstance(rate, Quota) else store
        counts = self._stores.get(counted)
        if counts is None:
            counts = self._stores[counted] = _Store(self._max_keys if capped else -1)
        # A quota of its own: it remembers the window it is in, by this backend's clock, and its limit may be a share.
        own = Quota(rate.limit, rate.span, rate.zone) if isinstance(rate, Quota) else rate
        size = max(257, self._max_keys // SHARD_KEYS | 1)
        if store in OWN:
            size = FEW_SHARDS if capped else 1
        family = self._families.setdefault((name, type(rate)), _Family())
        made = self._meters[name, store, rate] = MemoryMeter(name, store, own, counts, family, size)
        if store not in OWN:
            family.meters.add(made)
        return made

    def resize(self, max_keys: int) -> None:
        """Track ``max_keys`` from now on. Where there are more, new ones share buckets until enough are forgotten."""
        self._max_keys = max_keys
        for store in self._stores.values():
            if store.cap >= 0:
                store.cap = max_keys

    def spend(self, charges: Sequence[Charge]) -> Verdict:
        """Take all of ``charges`` or none.

        Written into the buckets as it goes and taken back when one refuses, because almost always none does. The
        arithmetic is `seawall.rate.spend` written out: calling it costs 0.9 instead of 0.6 us for three limits.
        """
        now = self._clock()
        wall = self._wall()
        states: list[int] = []
        lefts: list[int] = []
        own: Any = charges  # of meters of our own; a cast would cost 0.05 us
        for meter, key, cost in own:
            shard = meter.shards[hash(key) % meter.size]
            state = shard.get(key)
            if state is None:
                shard, known = self._track(meter, shard, key, now, wall)
                if known != key:
                    charges = [*charges[: len(states)], (meter, known, cost), *charges[len(states) + 1 :]]
                    key = known
                state = shard[key]
            scale = meter.scale
            if scale:
                full = now * scale
                if state < full:
                    state = full
                elif state > full + meter.ceiling:
                    state = full + meter.ceiling
                after = state + cost * meter.interval
                left = full + meter.capacity - after
                if left < 0:
                    if cost:
                        break
                    left = 0
                lefts.append(left // meter.interval)
            else:
                quota = meter.quota
                if not quota.start_ns <= wall < quota.end_ns:
                    quota.enter(wall)
                base = quota.base
                used = (state & COUNT_MASK if state >= base else 0) + cost
                left = quota.limit - used
                if left < 0:
                    if cost:
                        break
                    left = 0
                after = base + used
                lefts.append(left)
            shard[key] = after
            states.append(after)
        else:
            return Verdict(charges, states, lefts, None, now, wall)
        return self._refuse(charges, len(states), now, wall)

    def _refuse(self, charges: Sequence[Charge], taken: int, now: int, wall: int) -> Verdict:
        """Give the first ``taken`` charges back and say of each what it would have had to wait.

        Written out like `spend`, for a service that refuses is one that has no time: 1.5 instead of 4.5 us.
        """
        if taken:
            self._give_back(charges[:taken], now, wall, wall)
        states: list[int] = []
        lefts: list[int] = []
        waits: list[int] = []
        own: Any = charges
        for meter, key, cost in own:
            scale = meter.scale
            shard = meter.shards[hash(key) % meter.size]
            state = shard.get(key)
            if state is None:
                shard = meter.overflow
                state = shard.get(key, now * scale)
            if scale:
                full = now * scale
                if state < full:
                    state = full
                elif state > full + meter.ceiling:
                    # Kept though it is a refusal, or a clock that stepped back would starve this bucket (G6).
                    shard[key] = state = full + meter.ceiling
                room = full + meter.capacity - state
                short = cost * meter.interval - room
                if short > 0 and cost:
                    waits.append(-(-short // scale) if cost * meter.interval <= meter.capacity else NEVER)
                else:
                    waits.append(0)
                lefts.append(room // meter.interval if room > 0 else 0)
            else:
                quota = meter.quota
                base = quota.enter(wall)
                if state > base | COUNT_MASK:
                    shard[key] = state = base + (state & COUNT_MASK)  # from a window ahead of a clock set back
                left = quota.limit - (state - base if state >= base else 0)
                if cost > left and cost:
                    waits.append(quota.end_ns - wall if cost <= quota.limit else NEVER)
                else:
                    waits.append(0)
                lefts.append(max(0, left))
            states.append(state)
        return Verdict(charges, states, lefts, waits, now, wall)

    def debit(self, charges: Sequence[Charge]) -> list[int]:
        """Take ``charges`` without asking, down to one burst of debt in a bucket; say what was taken."""
        now, wall = self._clock(), self._wall()
        taken = []
        for meter, key, cost in cast("Sequence[tuple[MemoryMeter, Key, int]]", charges):
            shard = meter.locate(key)
            if key not in shard:
                shard, key = self._track(meter, shard, key, now, wall)
            rate = meter.rate
            if isinstance(rate, Rate):
                before = max(shard[key], now * rate.scale)
                shard[key] = after = rate.debit(before, now, cost)
                taken.append(max(0, after - before) // rate.interval)
            else:
                shard[key] = rate.debit(shard[key], wall, cost)
                taken.append(cost)
        return taken

    def refund(self, charges: Sequence[Charge], spent_at: int) -> None:
        """Give ``charges`` back that were spent at ``spent_at``."""
        self._give_back(charges, self._clock(), self._wall(), spent_at)

    def _give_back(self, charges: Sequence[Charge], now: int, wall: int, spent_at: int) -> None:
        for meter, key, cost in cast("Sequence[tuple[MemoryMeter, Key, int]]", charges):
            shard = meter.locate(key)
            state = shard.get(key)
            if state is None:
                # After a change of the limit it is where the caller was seen last.
                state = meter.inherited(key, now, wall)
                if state is None:
                    continue  # forgotten, hence full already
                meter.hold(shard, key, state)
            if meter.quota is not None:
                shard[key] = meter.quota.refund(state, wall, cost, spent_at)
            elif (wall - spent_at) * meter.scale < meter.capacity:
                # Later than an empty bucket takes to fill, what was spent then is there again by itself.
                shard[key] = cast(Rate, meter.rate).refund(state, now, cost)

    def _track(
        self, meter: MemoryMeter, shard: dict[Key, int], key: Key, now: int, wall: int
    ) -> tuple[dict[Key, int], Key]:
        """Make room for a key that is not tracked: the dict to keep it in, and the key it got."""
        counts = meter.counts
        full = now * meter.scale
        shared = b"overflow:%d" % (hash(key) % OVERFLOW_BUCKETS)
        # Two for one, so that a store shrinks while new keys come: of this shard, and of the next limit's next one.
        meter.reap(shard, now, wall)
        if counts.meters:
            counts.forget_next(now, wall)
        before = meter.inherited(key, now, wall)
        # What was counted elsewhere is not given up for want of room: there is no more of it than there was there.
        if before is None and 0 <= counts.cap <= counts.keys and not counts.forget_one(now, wall):
            counts.overflowed += 1
            meter.overflow.setdefault(shared, full)
            return meter.overflow, shared
        if before is None:
            # What it may have spent in overflow goes along, or whoever comes and goes at the cap has two bursts. Not of
            # a quota: that does not refill, and would be refused to strangers for the rest of its window.
            before = meter.overflow.get(shared, full) if meter.scale else full
        meter.hold(shard, key, before)
        return shard, key

    def quotas(self) -> Iterator[list[Count]]:
        """What callers have used of calendar quotas in windows that have not ended, a part of it at a time.

        For a snapshot, which another thread may make while requests are served: each part is whole by itself.
        """
        for (name, kind), family in list(self._families.items()):
            if kind is Quota:
                kept = list(family.kept.items())
                yield [(name, store, key, state >> COUNT_BITS, state & COUNT_MASK) for (store, key), state in kept]
        with self._making:
            meters = list(self._meters.values())
        for meter in meters:
            if meter.quota is not None and meter.held:
                store = stored(meter.store)
                for shard in meter.shards:
                    states = list(shard.items())
                    yield [(meter.name, store, key, state >> COUNT_BITS, state & COUNT_MASK) for key, state in states]

    def restore(self, counts: Iterable[Count]) -> None:
        """Take up what `quotas` told before, for callers who have not come since."""
        for name, store, key, end, used in counts:
            family = self._families.setdefault((name, Quota), _Family())
            family.kept[store, key] = (end << COUNT_BITS) + used

    async def forget(self, charges: Sequence[tuple[Meter, Key]]) -> None:
        """Let these callers have spent nothing."""
        for meter, key in cast("Sequence[tuple[MemoryMeter, Key]]", charges):
            shard = meter.locate(key)
            if key in shard:
                shard[key] = meter.quota.enter(self._wall()) if meter.quota else self._clock() * meter.scale
            else:
                meter.inherited(key, self._clock(), self._wall())

    async def block(self, tenant: str, block: Block | None) -> None:
        """Keep a tenant out of this process until then, or let it in again."""
        if block is None:
            self.blocks.remove(tenant)
        else:
            self.blocks.add(tenant, block)

    def clear(self) -> None:
        """Forget every key (tests)."""
        for meter in list(self._meters.values()):
            meter.held = 0
            for shard in (*meter.shards, meter.overflow):
                shard.clear()
        for family in self._families.values():
            family.own.clear()
        for store in self._stores.values():
            store.keys = 0

    def statistics(self) -> dict[str, dict[str, int]]:
        """Per store: ``keys`` tracked now, ``evicted`` so far, ``overflowed`` charges that shared a bucket."""
        return {
            name: {"keys": store.keys, "evicted": store.evicted, "overflowed": store.overflowed}
            for name, store in sorted(self._stores.items())
        }

    async def aclose(self) -> None:
        """Nothing to release."""
