"""Limits as spend.lua knows them: the key of a charge, its numbers, and what a reply says of it."""

from __future__ import annotations

from struct import Struct
from typing import Protocol, TypeAlias, final

from seawall.backends import LISTED, Key, Meter, stored
from seawall.backends.redis.keys import Names
from seawall.backends.redis.leases import HELD, SPENT_BY, Lease
from seawall.backends.share import LocalMeter
from seawall.rate import COUNT_MASK, Quota, Rate

MICROSECOND = 1_000
_LONGEST_US = 1 << 51
"""The deepest that a bucket may be in debt, in microseconds: 71 years, so that an instant, a debt and a charge stay
below 2^53 together, up to which a double counts. The debt is of two bursts, so one may take half as long to refill."""
_MOST_RECORDS = 256
_TERM = Struct("<B9d")


class ServerClock(Protocol):
    """What is known of a server's time: ``wall`` nanoseconds since the epoch, ``sure`` once it was told."""

    @property
    def sure(self) -> bool: ...

    def wall(self) -> int: ...


@final
class BucketMeter(Meter):
    """A token bucket in Redis. ``local`` is this process's share of it, ``denied`` what is known to be refused: the
    cost, until when (by this process's clock), and the bucket then.

    The script counts in microseconds and parts of one, of which there are ``per_us``: what Redis's clock has, and as
    exact as `seawall.rate`, whose units are these parts.
    """

    __slots__ = ("_records", "bucket", "denied", "leases", "local", "per_us", "suffix", "tags")

    def __init__(self, name: str, store: str, rate: Rate, names: Names, local: LocalMeter) -> None:
        super().__init__(name, store, rate)
        self.bucket = rate
        self.local = local
        self.tags = names.tags(stored(store))
        self.suffix = names.limit("rate", name, stored(store))
        self.per_us = MICROSECOND * rate.scale
        if rate.ceiling // self.per_us >= _LONGEST_US:
            raise ValueError(f"the limit {name!r} takes more than 35 years to refill: lower its burst")
        self.denied: dict[Key, tuple[int, int, int]] = {}
        self.leases: dict[Key, Lease] = {}
        self._records: dict[int, bytes] = {}

    def most_ahead(self, instances: int) -> int:
        """Units that a lease may be, beyond the one that is being spent."""
        return max(1, self.bucket.burst // (4 * instances)) - 1

    def unspent(self, lease: Lease, wall: int) -> int:
        """The bucket in which nothing of ``lease`` was taken that is not spent yet, at ``wall``."""
        return max(lease.state - lease.left * self.bucket.interval, wall * self.bucket.scale)

    def lapsed(self, lease: Lease, now: int, wall: int) -> bool:
        """Whether ``lease`` may not be spent any more."""
        return False

    def draw(self, lease: Lease, cost: int, now: int, wall: int) -> tuple[int, int] | None:
        """The bucket once ``cost`` has been paid from ``lease``, which has as much, and what is left; less than
        nothing while it is too early for that."""
        rate, left = self.bucket, lease.left - cost
        full = wall * rate.scale
        state = max(lease.state - left * rate.interval, full + cost * rate.interval)
        room = (full + rate.capacity - state) // rate.interval
        # Only what was taken before its time has to wait for it; otherwise this process's clock may be behind.
        return state, room if room > left or lease.paced else left

    def overdrawn(self, state: int, now: int) -> bool:
        """Whether more was taken than there is at ``now``."""
        return state > now * self.bucket.scale + self.bucket.capacity

    def record(self, cost: int, lease: int, clock: ServerClock, holder: int = 0, mine: int = 0) -> bytes:
        """A charge of ``cost``, and the wish for ``lease`` units ahead."""
        record = None if lease else self._records.get(cost)
        if record is None:
            rate, per_us = self.bucket, self.per_us
            pairs = (cost * rate.interval, rate.capacity, rate.ceiling, lease * rate.interval)
            record = _TERM.pack(0, per_us, *(number for units in pairs for number in divmod(units, per_us)))
            if not lease:
                if len(self._records) >= _MOST_RECORDS:
                    self._records.clear()
                self._records[cost] = record
        return record

    def forget_window(self) -> None:
        """A bucket has none."""

    def empty(self, now: int) -> int:
        """The bucket of somebody who has spent nothing."""
        return now * self.bucket.scale

    def reading(self, whole: int, part: int, now: int) -> tuple[int, int]:
        """The bucket that a reply tells of, and what is left in it. Raises `ValueError` for one that cannot be."""
        rate, per_us = self.bucket, self.per_us
        state = whole * per_us + part
        ahead = state - now * rate.scale
        if not 0 <= part < per_us or not 0 <= ahead <= rate.ceiling:
            raise ValueError("no such bucket")
        room = rate.capacity - ahead
        return state, room // rate.interval if room > 0 else 0


@final
class QuotaMeter(Meter):
    """A calendar quota in Redis. ``local`` and ``denied`` are as a bucket's."""

    __slots__ = ("_base", "_mark", "_records", "denied", "leases", "local", "quota", "suffix", "tags")

    def __init__(self, name: str, store: str, rate: Quota, names: Names, local: LocalMeter) -> None:
        # One of its own: it remembers the window it is in, by the server's clock.
        self.quota = Quota(rate.limit, rate.span, rate.zone)
        super().__init__(name, store, self.quota)
        self.local = local
        self.tags = names.tags(stored(store))
        self.suffix = names.limit("quota", name, stored(store), rate.span, rate.zone)
        self._base = 0
        self._mark = rate.limit << 2 | (store == LISTED) << 1
        self._records: dict[int, bytes] = {}
        self.denied: dict[Key, tuple[int, int, int]] = {}
        self.leases: dict[Key, Lease] = {}

    def most_ahead(self, instances: int) -> int:
        """Units that a lease may be. Less than of a bucket, for what is lost of a quota is lost for the day."""
        return max(1, self.quota.limit // (100 * instances)) - 1

    def unspent(self, lease: Lease, wall: int) -> int:
        """The count without what of ``lease`` is not spent yet."""
        return max(lease.state - lease.left, self.quota.enter(wall))

    def lapsed(self, lease: Lease, now: int, wall: int) -> bool:
        """Whether ``lease`` may not be spent any more: its window is over, or it may be somebody else's by now."""
        return lease.state < self.quota.enter(wall) or now - lease.asked >= SPENT_BY

    def draw(self, lease: Lease, cost: int, now: int, wall: int) -> tuple[int, int] | None:
        """The count once ``cost`` has been paid from ``lease``, and what is left; nothing where that has lapsed."""
        if self.lapsed(lease, now, wall):
            return None
        state = self.unspent(lease, wall) + cost
        return state, self.quota.limit - (state - self.quota.base)

    def overdrawn(self, state: int, now: int) -> bool:
        """A quota never is: there is nothing to wait for."""
        return False

    def record(self, cost: int, lease: int, clock: ServerClock, holder: int = 0, mine: int = 0) -> bytes:
        """A charge of ``cost`` in the window that the server's ``clock`` is in, as far as is known, and the wish of
        ``holder`` for ``lease`` units ahead, who has ``mine`` if it is refused. Without a holder nothing is noted of
        who has how much. Two meters of one key, as after a change of the limit, are noted as two holders."""
        quota = self.quota
        if quota.enter(clock.wall()) != self._base:
            self._base = quota.base
            self._records.clear()
        sure = clock.sure
        at = cost if sure else -1 - cost
        record = None if holder else self._records.get(at)
        if record is None:
            window = (quota.start_ns // MICROSECOND, quota.end_ns // MICROSECOND)
            who = holder and holder ^ self._mark
            record = _TERM.pack(1, *window, quota.limit, cost, lease, who, mine, HELD // MICROSECOND, sure)
            if not holder:
                if len(self._records) >= _MOST_RECORDS:
                    self._records.clear()
                self._records[at] = record
        return record

    def forget_window(self) -> None:
        """Find the window anew, by what the server's time is known to be."""
        self.quota.start_ns = self.quota.end_ns = 0

    def empty(self, now: int) -> int:
        """The count of somebody who has spent nothing."""
        return self.quota.enter(now)

    def reading(self, used: int, part: int, now: int) -> tuple[int, int]:
        """The count that a reply tells of, and what is left. Raises `ValueError` for one that cannot be."""
        if not 0 <= used <= COUNT_MASK or part:
            raise ValueError("no such count")
        return self.quota.enter(now) + used, max(0, self.quota.limit - used)


SharedMeter: TypeAlias = BucketMeter | QuotaMeter
