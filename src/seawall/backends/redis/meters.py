"""Limits as spend.lua knows them: the key of a charge, its numbers, and what a reply says of it."""

from __future__ import annotations

from struct import Struct
from typing import TypeAlias, final

from seawall.backends import Key, Meter
from seawall.backends.redis.keys import Names
from seawall.backends.share import LocalMeter
from seawall.rate import Quota, Rate

MICROSECOND = 1_000
_LONGEST_US = 1 << 51
"""A bucket that takes 71 years to fill is outside of what a double can count in microseconds."""
_MOST_RECORDS = 256
_BUCKET = Struct("<B7d")
_LEASE = Struct("<2d")
_NO_LEASE = _LEASE.pack(0, 0)
_QUOTA = Struct("<B8d")


@final
class BucketMeter(Meter):
    """A token bucket in Redis. ``local`` is this process's share of it, ``denied`` what is known to be refused: the
    cost, until when (by this process's clock), and the bucket then.

    The script counts in microseconds and parts of one, of which there are ``per_us``: what Redis's clock has, and as
    exact as `seawall.rate`, whose units are these parts.
    """

    __slots__ = ("_records", "bucket", "denied", "local", "per_us", "suffix", "tags")

    def __init__(self, name: str, store: str, rate: Rate, names: Names, local: LocalMeter) -> None:
        super().__init__(name, store, rate)
        self.bucket = rate
        self.local = local
        self.tags = names.tags(store)
        self.suffix = names.limit("rate", name, store)
        self.per_us = MICROSECOND * rate.scale
        if rate.ceiling // self.per_us >= _LONGEST_US:
            raise ValueError(f"the limit {name!r} takes more than 35 years to refill: lower its burst")
        self.denied: dict[Key, tuple[int, int, int]] = {}
        self._records: dict[int, bytes] = {}

    def key(self, key: Key) -> bytes:
        return self.tags[key] + self.suffix

    def record(self, cost: int, lease: int, wall: int) -> bytes:
        """A charge of ``cost``, and the wish for ``lease`` units ahead."""
        rate, per_us = self.bucket, self.per_us
        record = self._records.get(cost)
        if record is None:
            if len(self._records) >= _MOST_RECORDS:
                self._records.clear()
            numbers = (*divmod(cost * rate.interval, per_us), *divmod(rate.capacity, per_us))
            record = self._records[cost] = _BUCKET.pack(0, per_us, *numbers, *divmod(rate.ceiling, per_us))
        return record + (_LEASE.pack(*divmod(lease * rate.interval, per_us)) if lease else _NO_LEASE)

    def empty(self, now: int) -> int:
        """The bucket of somebody who has spent nothing."""
        return now * self.bucket.scale

    def state(self, whole: int, part: int, now: int) -> int:
        """The bucket that a reply tells of. Raises `ValueError` for one that cannot be."""
        state = whole * self.per_us + part
        full = now * self.bucket.scale
        if not 0 <= part < self.per_us or not full <= state <= full + self.bucket.ceiling:
            raise ValueError("no such bucket")
        return state


@final
class QuotaMeter(Meter):
    """A calendar quota in Redis. ``local`` and ``denied`` are as a bucket's."""

    __slots__ = ("denied", "local", "quota", "suffix", "tags")

    def __init__(self, name: str, store: str, rate: Quota, names: Names, local: LocalMeter) -> None:
        # One of its own: it remembers the window it is in, by the server's clock.
        self.quota = Quota(rate.limit, rate.span, rate.zone)
        super().__init__(name, store, self.quota)
        self.local = local
        self.tags = names.tags(store)
        self.suffix = names.limit("quota", name, store, rate.span, rate.zone)
        self.denied: dict[Key, tuple[int, int, int]] = {}

    def key(self, key: Key) -> bytes:
        return self.tags[key] + self.suffix

    def record(self, cost: int, lease: int, wall: int) -> bytes:
        """A charge of ``cost`` in the window around ``wall``."""
        quota = self.quota
        quota.enter(wall)
        start, stop = quota.start_ns // MICROSECOND, quota.end_ns // MICROSECOND
        return _QUOTA.pack(1, start, stop, quota.limit, cost, 0, 0, 0, 0)

    def empty(self, now: int) -> int:
        """The count of somebody who has spent nothing."""
        return self.quota.enter(now)

    def state(self, used: int, part: int, now: int) -> int:
        """The count that a reply tells of. Raises `ValueError` for one that cannot be."""
        if used < 0 or part:
            raise ValueError("no such count")
        return self.quota.enter(now) + used


SharedMeter: TypeAlias = BucketMeter | QuotaMeter
