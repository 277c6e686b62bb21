"""What the tests draw, and the slow, obvious models that results are held against."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TypeAlias

from hypothesis import strategies as st

from seawall.backends import Key
from seawall.rate import MAX_AMOUNT, SECOND, Quota, Rate, spend, spend_quota

MINUTE = 60 * SECOND
HOUR = 60 * MINUTE
DAY = 24 * HOUR

Schedule: TypeAlias = Sequence[tuple[int, int]]
"""Nanoseconds to wait and then the cost to ask for, again and again."""

ModelCharge: TypeAlias = tuple[Hashable, Rate | Quota, Key, int]
"""Which meter, by any name; its rate; whose bucket of it; the cost."""


def small_rates() -> st.SearchStrategy[Rate]:
    """Rates whose buckets are soon empty and soon full, most of them with no whole interval."""
    return st.builds(
        Rate,
        amount=st.integers(1, 12),
        period_ns=st.sampled_from((1, 2, 3, 7, 10, 60, 97, 1_000)),
        burst=st.integers(0, 15),
    )


def rates() -> st.SearchStrategy[Rate]:
    """Every rate there may be, the named ones among them."""
    anything = st.builds(
        Rate,
        amount=st.one_of(st.integers(1, 1_000), st.integers(1, MAX_AMOUNT)),
        period_ns=st.one_of(st.sampled_from((SECOND, 2 * SECOND, 15 * MINUTE, 30 * DAY)), st.integers(1, 3_000 * DAY)),
        burst=st.one_of(st.just(0), st.integers(1, 1_000), st.integers(1, MAX_AMOUNT)),
    )
    return st.one_of(small_rates(), anything)


@st.composite
def schedules(draw: st.DrawFn, rate: Rate, *, steps_back: bool = False) -> list[tuple[int, int]]:
    """Waits on the scale of the time between two tokens, and costs on the scale of the bucket."""
    token = max(1, rate.period_ns // rate.amount)
    full = token * rate.burst
    waits = [st.just(0), st.just(token), st.integers(0, 2 * token), st.integers(0, 2 * full)]
    if steps_back:
        waits += [st.integers(-3 * full, 0), st.integers(-2 * token, 0)]
    costs = [st.just(1), st.just(0), st.integers(1, rate.burst), st.just(rate.burst), st.just(rate.burst + 1)]
    return draw(st.lists(st.tuples(st.one_of(waits), st.one_of(costs)), max_size=25))


@dataclass
class CountingBucket:
    """A token bucket as it is taught: a number of tokens that grows with time and is bounded by the burst.

    Written with fractions and without any of Seawall's own arithmetic. ``tokens`` is negative when in debt; a clock
    that steps back takes away what it had given, down to one burst of debt.
    """

    rate: Rate
    now: int = 0
    tokens: Fraction = field(init=False)

    def __post_init__(self) -> None:
        self.tokens = Fraction(self.rate.burst)

    def at(self, now: int) -> CountingBucket:
        grown = self.tokens + Fraction(self.rate.amount * (now - self.now), self.rate.period_ns)
        self.tokens = max(min(grown, Fraction(self.rate.burst)), Fraction(-self.rate.burst))
        self.now = now
        return self

    def take(self, cost: int) -> bool:
        if cost > max(self.tokens, Fraction()):
            return False
        self.tokens -= cost
        return True

    def debit(self, cost: int) -> None:
        self.tokens = max(self.tokens - cost, Fraction(-self.rate.burst))

    def refund(self, cost: int) -> None:
        self.tokens = min(self.tokens + cost, Fraction(self.rate.burst))

    @property
    def remaining(self) -> int:
        return max(0, int(self.tokens // 1))


def most_admitted(rate: Rate, admitted: Iterable[tuple[int, int]]) -> Fraction:
    """The largest excess of ``admitted`` (instants and costs) over B + r(b - a), over all windows; at most 0 by G1."""
    events = list(admitted)
    worst = Fraction(-rate.burst)
    for first in range(len(events)):
        total = 0
        for at, cost in events[first:]:
            total += cost
            allowed = rate.burst + Fraction(rate.amount * (at - events[first][0]), rate.period_ns)
            worst = max(worst, Fraction(total - allowed))
    return worst


def limits() -> st.SearchStrategy[Rate | Quota]:
    """Small limits of both kinds, for sequences of calls on a backend."""
    quotas = st.builds(
        Quota, limit=st.integers(1, 6), span=st.just("day"), zone=st.sampled_from(("UTC", "Europe/Berlin"))
    )
    buckets = st.builds(
        Rate,
        amount=st.integers(1, 5),
        period_ns=st.sampled_from((SECOND, 3 * SECOND, HOUR, DAY)),
        burst=st.integers(0, 6),
    )
    return st.one_of(buckets, quotas)


@dataclass
class ModelBackend:
    """A backend that forgets nothing and is in no hurry: one dict, and `seawall.rate` called charge by charge.

    ``spend`` returns the waits, all 0 where it was admitted. A call may name a bucket once only.
    """

    states: dict[tuple[Hashable, Key], int] = field(default_factory=dict)

    def spend(self, charges: Sequence[ModelCharge], now: int, wall: int) -> list[int]:
        after: dict[tuple[Hashable, Key], int] = {}
        clamped: dict[tuple[Hashable, Key], int] = {}
        waits = []
        for meter, rate, key, cost in charges:
            state = self.states.get((meter, key), 0)
            after[meter, key], wait = self._attempt(rate, state, now, wall, cost)
            clamped[meter, key] = self._attempt(rate, state, now, wall, 0)[0]
            waits.append(wait)
        self.states |= clamped if any(waits) else after
        return waits

    def debit(self, charges: Sequence[ModelCharge], now: int, wall: int) -> None:
        for meter, rate, key, cost in charges:
            state = self.states.get((meter, key), 0)
            self.states[meter, key] = rate.debit(state, now if isinstance(rate, Rate) else wall, cost)

    def refund(self, charges: Sequence[ModelCharge], now: int, wall: int, spent_at: int) -> None:
        for meter, rate, key, cost in charges:
            state = self.states.get((meter, key), 0)
            if isinstance(rate, Rate):
                self.states[meter, key] = rate.refund(state, now, cost)
            else:
                self.states[meter, key] = rate.refund(state, wall, cost, spent_at)

    def left(self, meter: Hashable, rate: Rate | Quota, key: Key, now: int, wall: int) -> int:
        return rate.remaining(self.states.get((meter, key), 0), now if isinstance(rate, Rate) else wall)

    @staticmethod
    def _attempt(rate: Rate | Quota, state: int, now: int, wall: int, cost: int) -> tuple[int, int]:
        if isinstance(rate, Rate):
            return spend(state, now, rate, cost)
        return spend_quota(state, wall, rate, cost)
