"""This process's share of limits that are kept in a shared store, for as long as the store is away.

Of ``instances`` processes each holds callers to 1/instances of every limit, at least to one unit: a bucket of rate r
and burst B is one of r / N and max(1, B // N), a quota of L is max(1, L // N) in a window. Where P processes run and N
are expected, all together admit of one key within a time D at most

    P * max(1, B // N, C) + P/N * r * D      and of a quota      P * max(1, L // N, C)      in each of its windows,

C being the largest single cost among what they admit. Costs come into it because what a caller may ask for at once
does not shrink with its share: a request of cost 50 on a bucket of 100 would otherwise be refused for the whole outage,
whatever its owner does, once there are three processes. Such a one is admitted where the share is untouched and charged
in full, so that the share is in debt afterwards: the rate holds, and the next one is as far away as it should be.

It is `MemoryBackend` that counts. A bucket stays one of the whole rate and each unit is charged N times, so that a
change of N converts no state: what was used stays used.
"""

from __future__ import annotations

from collections.abc import Sequence
from threading import Lock
from typing import Protocol, cast, final
from weakref import WeakValueDictionary

from seawall.backends import Charge, Failure, Key, Meter, Observer, Verdict
from seawall.backends.memory import MemoryBackend, MemoryMeter
from seawall.decision import Clock
from seawall.rate import MAX_AMOUNT, Quota, Rate


@final
class LocalMeter(Meter):
    """The share of one limit. What counts it is made when it is first needed: most never are."""

    __slots__ = ("inner", "most")

    def __init__(self, name: str, store: str, rate: Rate | Quota) -> None:
        super().__init__(name, store, rate)
        self.inner: MemoryMeter | None = None
        self.most = 0
        """What can be charged at once without a debt, N times a whole number of units."""


class Shared(Protocol):
    """A limit in a shared store, and this process's share of it."""

    @property
    def local(self) -> LocalMeter: ...


def locally(charges: Sequence[tuple[Shared, Key, int]]) -> list[Charge]:
    """The same of this process's share."""
    return [(meter.local, key, cost) for meter, key, cost in charges]


@final
class LocalShare:
    """Exact for what one process may admit. ``max_keys`` is that of `MemoryBackend`."""

    def __init__(self, *, max_keys: int, clock: Clock, wall_clock: Clock) -> None:
        self._memory = MemoryBackend(max_keys=max_keys, clock=clock, wall_clock=wall_clock)
        self._wall = wall_clock
        self._meters: WeakValueDictionary[tuple[str, str, Rate | Quota], LocalMeter] = WeakValueDictionary()
        self._making = Lock()
        self._instances = 1
        self._changed = 0

    def __repr__(self) -> str:
        return f"<LocalShare 1/{self._instances} in {self._memory!r}>"

    @property
    def instances(self) -> int:
        """Processes that share the limits, at least 1."""
        return self._instances

    @instances.setter
    def instances(self, number: int) -> None:
        if number < 1:
            raise ValueError(f"instances must be at least 1, not {number}")
        if number != self._instances:
            self._instances = number
            self._changed = self._wall()
            with self._making:
                for meter in self._meters.values():
                    if meter.inner is not None:
                        self._fit(meter, meter.inner)

    def meter(self, name: str, store: str, rate: Rate | Quota) -> LocalMeter:
        """The meter for a limit; the same one for the same name, store and rate.

        It keeps ``rate`` itself, so that a quota is in the window that the last verdict is about.
        """
        with self._making:
            known = self._meters.get((name, store, rate))
            if known is None:
                known = self._meters[name, store, rate] = LocalMeter(name, store, rate)
            return known

    def spend(self, charges: Sequence[Charge]) -> Verdict:
        """Take all of ``charges``, whose meters are all `LocalMeter`, or none.

        The verdict speaks of the whole limit's rate but for ``left``, which is what this process may still admit in
        small costs, and for ``waits``, which are exact for it. ``states`` are buckets of that rate with so much left;
        they tell exactly when there will be a unit again, but where some are left, one more seems to come as soon as
        it would to the whole limit.
        """
        times = self._instances
        own = cast("Sequence[tuple[LocalMeter, Key, int]]", charges)
        scaled: list[Charge] = []
        owing = False
        for meter, key, cost in own:
            counted = meter.inner or self._make(meter)
            units = cost * times
            if units > meter.most:
                whole = meter.rate.burst if isinstance(meter.rate, Rate) else meter.rate.limit
                units = meter.most if cost <= whole else meter.most + 1
                owing = True
            scaled.append((counted, key, units))
        verdict = self._memory.spend(scaled)
        spent = verdict.charges
        if owing and verdict.waits is None:
            for at, ((meter, _, cost), (inner, key, units)) in enumerate(zip(own, spent, strict=True)):
                debt = cost * times - units
                if debt:
                    self._memory.debit([(inner, key, debt)])
                    if isinstance(meter.rate, Rate):
                        verdict.states[at] += debt * meter.rate.interval
        lefts, states, now, wall = verdict.left, verdict.states, verdict.now, verdict.wall
        for at, (meter, _, _) in enumerate(own):
            left = lefts[at] = lefts[at] // times
            rate = meter.rate
            if isinstance(rate, Rate):
                full = now * rate.scale
                grows = states[at] - full + ((left + 1) * times - meter.most) * rate.interval
                if left:
                    grows = min(grows, rate.interval)
                states[at] = full + (rate.burst - left - 1) * rate.interval + grows
            else:
                states[at] = rate.enter(wall) + rate.limit - left
        if spent is not scaled:
            charges = [(meter, key, cost) for (meter, _, cost), (_, key, _) in zip(own, spent, strict=True)]
        return Verdict(charges, states, lefts, verdict.waits, now, wall)

    def stand_in(
        self, charges: Sequence[tuple[Shared, Key, int]], action: Failure, observer: Observer | None
    ) -> Verdict | None:
        """Decide about ``charges`` of a store that is away, as ``action`` says, and tell ``observer``."""
        if observer is not None:
            observer.fell_back(action)
        return self.spend(locally(charges)) if action == "local" else None

    def debit(self, charges: Sequence[Charge]) -> list[int]:
        """Take ``charges`` without asking, down to at most one burst of the whole limit in debt; say what was taken."""
        times = self._instances
        return [taken // times for taken in self._memory.debit(self._scaled(charges, times))]

    def refund(self, charges: Sequence[Charge], spent_at: int) -> None:
        """Give ``charges`` back that were spent at ``spent_at``.

        Of what was spent before ``instances`` changed nobody knows any more how often it was charged: once, at least.
        """
        times = self._instances if spent_at > self._changed else 1
        self._memory.refund(self._scaled(charges, times), spent_at)

    async def forget(self, charges: Sequence[tuple[Meter, Key]]) -> None:
        """Let these callers have spent nothing of their share."""
        own = cast("Sequence[tuple[LocalMeter, Key]]", charges)
        await self._memory.forget([(meter.inner, key) for meter, key in own if meter.inner is not None])

    def _scaled(self, charges: Sequence[Charge], times: int) -> list[Charge]:
        own = cast("Sequence[tuple[LocalMeter, Key, int]]", charges)
        return [(meter.inner or self._make(meter), key, cost * times) for meter, key, cost in own]

    def _make(self, meter: LocalMeter) -> MemoryMeter:
        inner = meter.inner = self._memory.meter(meter.name, meter.store, meter.rate)
        self._fit(meter, inner)
        return inner

    def _fit(self, meter: LocalMeter, inner: MemoryMeter) -> None:
        """Let ``inner`` hold this process's share, in units that are charged N times each."""
        times, rate = self._instances, meter.rate
        if isinstance(rate, Rate):
            meter.most = max(1, rate.burst // times) * times
            inner.capacity = meter.most * rate.interval
            # Its ceiling is twice its burst: as far from full as the largest cost reaches, and one share of debt.
            furthest = max(meter.most, (rate.burst * times + 1) // 2)
            inner.rate = Rate(rate.amount, rate.period_ns, min(furthest, MAX_AMOUNT))
            inner.ceiling = inner.rate.ceiling
        elif inner.quota is not None:
            meter.most = inner.quota.limit = max(1, rate.limit // times) * times

    def statistics(self) -> dict[str, dict[str, int]]:
        """Per store: ``keys`` tracked now, ``evicted`` so far, ``overflowed`` charges that shared a bucket."""
        return self._memory.statistics()
