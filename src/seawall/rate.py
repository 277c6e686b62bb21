"""Token buckets and calendar windows as integer arithmetic: no clock, no storage, no floats.

A **bucket**'s whole state is one integer, the instant at which it will be full again (the generic cell rate
algorithm, ITU-T I.371, in plain words). Spending pushes that instant away; it is refused when the instant would lie
more than a whole bucket ahead. A state whose instant has passed equals no state at all, so forgetting it changes
nothing that can be observed.

The time between two tokens is rarely a whole number of nanoseconds (3 per second: 333,333,333 and a third), so a
bucket counts in units of ``1/scale`` nanoseconds, in which it is: draining 3/second and waiting one second admits 3.

A **quota** admits a count within a calendar day or month. Its state is one integer too: the end of the window in
which it was counted, and the count below it. A state from a window that has ended equals no state.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from math import gcd
from typing import Literal, TypeAlias, final
from zoneinfo import ZoneInfo

from seawall.decision import NEVER

SECOND = 1_000_000_000
MAX_AMOUNT = 1_000_000_000_000
MAX_INTEGER = 999_999_999_999_999
"""What a structured field can say (RFC 9651)."""
COUNT_BITS = 48
COUNT_MASK = (1 << COUNT_BITS) - 1
SETBACK = 3_600 * SECOND
"""How far a clock may step back over the start of a window and still be in it."""


@final
@dataclass(frozen=True, slots=True)
class Rate:
    """A token bucket: ``amount`` tokens per ``period_ns``, at most ``burst`` of them saved up.

    ``burst`` defaults to ``amount``, so that "100 per minute" lets a caller who was away send 100 at once.

    >>> Rate(3, SECOND).interval, Rate(3, SECOND).scale
    (1000000000, 3)
    """

    amount: int
    period_ns: int
    burst: int = 0
    scale: int = field(init=False, repr=False, compare=False)
    """Units in a nanosecond."""
    interval: int = field(init=False, repr=False, compare=False)
    """Units between two tokens."""
    capacity: int = field(init=False, repr=False, compare=False)
    """Units that a full bucket holds."""
    ceiling: int = field(init=False, repr=False, compare=False)
    """The furthest a bucket may be from full: empty, and one burst of debt."""

    def __post_init__(self) -> None:
        burst = self.burst or self.amount
        for name, value in (("amount", self.amount), ("period_ns", self.period_ns), ("burst", burst)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if max(self.amount, burst) > MAX_AMOUNT:
            raise ValueError(f"a rate and its burst are at most {MAX_AMOUNT:_}")
        common = gcd(self.amount, self.period_ns)
        put = object.__setattr__
        put(self, "burst", burst)
        put(self, "scale", self.amount // common)
        put(self, "interval", self.period_ns // common)
        put(self, "capacity", burst * self.interval)
        put(self, "ceiling", 2 * self.capacity)

    @property
    def window_s(self) -> int:
        """The ``w`` that headers advertise: the whole seconds in which an empty bucket fills, at least 1."""
        return max(1, round_half_up(self.burst * self.period_ns, self.amount * SECOND))

    @property
    def advertised(self) -> int:
        """The ``q`` that headers advertise: what a caller can spend in ``w``, never less than the burst.

        100/s with a burst of 10 would otherwise read ``q=10;w=1``, a tenth of what is sold.
        """
        return min(max(self.burst, self.amount * self.window_s * SECOND // self.period_ns), MAX_INTEGER)

    def remaining(self, state: int, now: int) -> int:
        """Tokens that can be spent at ``now``, in 0..burst."""
        ahead = state - now * self.scale
        if ahead <= 0:
            return self.burst
        return max(0, (self.capacity - ahead) // self.interval)

    def wait(self, state: int, now: int, cost: int = 1) -> int:
        """Nanoseconds until ``cost`` is admitted if nobody else spends: 0 for now, or ``NEVER``.  Exact (G4)."""
        if cost > self.burst:
            return NEVER
        behind = state + cost * self.interval - self.capacity - now * self.scale
        return -(-behind // self.scale) if behind > 0 else 0

    def debit(self, state: int, now: int, cost: int) -> int:
        """The bucket after ``cost`` tokens were taken without asking, at most one burst of debt."""
        full = now * self.scale
        return min(max(state, full) + cost * self.interval, full + self.ceiling)

    def refund(self, state: int, now: int, cost: int) -> int:
        """The bucket after ``cost`` tokens came back; what has been refilled meanwhile does not overflow."""
        full = now * self.scale
        return max(min(state, full + self.ceiling) - cost * self.interval, full)


def round_half_up(numerator: int, denominator: int) -> int:
    """The nearest whole number, halves upwards (``round`` takes halves to the even neighbour)."""
    return (2 * numerator + denominator) // (2 * denominator)


def spend(state: int, now: int, rate: Rate, cost: int) -> tuple[int, int]:
    """The bucket after an attempt to take ``cost`` tokens, and the wait: 0 taken, else nanoseconds or ``NEVER``.

    A refusal changes nothing but the clamp: after the clock has stepped back, a bucket may not be further from full
    than empty plus the largest debt, or its owner would wait for the clock to catch up (G6). A cost of 0 is a peek.
    """
    full = now * rate.scale
    if state < full:
        state = full
    elif state > full + rate.ceiling:
        state = full + rate.ceiling
    after = state + cost * rate.interval
    if after <= full + rate.capacity or cost == 0:
        return after, 0
    return state, rate.wait(state, now, cost)


Span: TypeAlias = Literal["day", "month"]


@final
@dataclass(slots=True, eq=False)
class Quota:
    """A calendar quota: ``limit`` units per day or month of ``zone``, counted from its midnight.

    The bounds of the current window are remembered here and recomputed when ``wall`` leaves them, so that the
    calendar is consulted once a window and not once a request.
    """

    limit: int
    span: Span
    zone: str = "UTC"
    start_ns: int = field(init=False, default=0, repr=False)
    end_ns: int = field(init=False, default=0, repr=False)
    base: int = field(init=False, default=0, repr=False)
    """The state of a caller who has spent nothing in the current window."""
    _zone: ZoneInfo = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not 1 <= self.limit <= MAX_AMOUNT:
            raise ValueError(f"a quota is 1..{MAX_AMOUNT:_}, not {self.limit}")
        self._zone = ZoneInfo(self.zone)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Quota):
            return NotImplemented
        return (self.limit, self.span, self.zone) == (other.limit, other.span, other.zone)

    def __hash__(self) -> int:
        return hash((self.limit, self.span, self.zone))

    @property
    def window_s(self) -> int:
        """Seconds in the current window: a month has its own, and so has the day of a clock change."""
        return (self.end_ns - self.start_ns) // SECOND

    def enter(self, wall: int) -> int:
        """Make the window around ``wall`` (nanoseconds since the epoch) current; return its empty state.

        A clock that is set back a little does not open the window before again: crossing midnight twice would grant
        the new window's quota twice.
        """
        if not self.start_ns <= wall < self.end_ns and not 0 < self.start_ns - wall <= SETBACK:
            start, end = window(wall // SECOND, self.span, self._zone)
            self.start_ns, self.end_ns = start * SECOND, end * SECOND
            self.base = end << COUNT_BITS
        return self.base

    def used(self, state: int, wall: int) -> int:
        """Units spent in the window around ``wall``.

        A state from a later window is what a clock that ran ahead left behind; it counts as this window's, so that
        stepping back neither grants a second quota nor starves its owner for longer than one window.
        """
        return state & COUNT_MASK if state >= self.enter(wall) else 0

    def remaining(self, state: int, wall: int) -> int:
        """Units that can be spent in the current window, in 0..limit."""
        return max(0, self.limit - self.used(state, wall))

    def wait(self, state: int, wall: int, cost: int = 1) -> int:
        """Nanoseconds until ``cost`` is admitted if nobody else spends: 0, the rest of the window, or ``NEVER``."""
        if cost > self.limit:
            return NEVER
        return 0 if self.used(state, wall) + cost <= self.limit else self.end_ns - wall

    def debit(self, state: int, wall: int, cost: int) -> int:
        """The count after ``cost`` was added without asking. A quota counts debts whole."""
        used = self.used(state, wall)
        return self.base + min(used + cost, COUNT_MASK)

    def refund(self, state: int, wall: int, cost: int, spent_at: int) -> int:
        """The count after ``cost`` came back, unless the window in which it was spent (``spent_at``) is over."""
        used = self.used(state, wall)
        # The clock may be behind the window's start (see `enter`); what is given back at once was spent in it.
        return self.base + (max(0, used - cost) if spent_at >= min(self.start_ns, wall) else used)


def spend_quota(state: int, wall: int, quota: Quota, cost: int) -> tuple[int, int]:
    """The count after an attempt to add ``cost``, and the wait: 0 added, else nanoseconds or ``NEVER``."""
    used = quota.used(state, wall)
    if used + cost <= quota.limit or cost == 0:
        return quota.base + used + cost, 0
    return quota.base + used, quota.wait(state, wall, cost)


def window(at: int, span: Span, zone: ZoneInfo) -> tuple[int, int]:
    """The first second of the calendar day or month around ``at`` (epoch seconds) in ``zone``, and of the next.

    Where midnight does not exist because clocks go forward over it, the window opens at the first instant after.
    """
    local = datetime.fromtimestamp(at, UTC).astimezone(zone)
    first = local.date().replace(day=1) if span == "month" else local.date()
    after = (first + timedelta(days=32)).replace(day=1) if span == "month" else first + timedelta(days=1)
    start, end = (int(datetime(d.year, d.month, d.day, tzinfo=zone).timestamp()) for d in (first, after))
    return start, end
