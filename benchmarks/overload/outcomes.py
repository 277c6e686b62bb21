"""What callers saw of a server, from the generator's records: goodput, latency, refusals, recovery, fairness.

Times are seconds from the start of the run; a request belongs to the moment it was *scheduled* for, whenever it ended.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.harness import percentile
from benchmarks.overload.generator import GAVE_UP
from benchmarks.overload.measure import jain, max_min

SLO = 0.5
"""Seconds within which an answer is of use to its caller."""
WINDOW, STEP, HOLD = 0.5, 0.1, 2.0
"""Recovery: what is judged at once, how finely it is located, how long it must last; in seconds."""
REFUSALS = (429, 503)


class Outcome(NamedTuple):
    """One attempt of one request."""

    at: float
    kind: str
    status: int
    """`GAVE_UP` and below: no answer."""
    latency: float
    """From its schedule to its answer, or to when its caller gave up."""
    late: float
    """How late the generator sent it."""
    attempt: int

    @property
    def good(self) -> bool:
        """Served while it still was of use."""
        return 200 <= self.status < 300 and self.latency <= SLO


def outcomes(record: Mapping[str, Any], kinds: Sequence[str]) -> list[Outcome]:
    """The rows of a generator's record, in the order of their schedule."""
    rows = [
        Outcome(at / 1e6, kinds[kind], status, latency / 1e6, late / 1e6, attempt)
        for at, kind, status, latency, late, attempt in zip(
            *(record[column] for column in ("at", "kind", "status", "latency", "late", "attempt")), strict=True
        )
    ]
    rows.sort()
    return rows


def within(rows: Sequence[Outcome], begin: float, end: float) -> list[Outcome]:
    """Those scheduled in [begin, end)."""
    return [row for row in rows if begin <= row.at < end]


def share(rows: Sequence[Outcome], holds: Callable[[Outcome], bool]) -> float:
    """The part of ``rows`` for which something holds, 0..1; of none it is 1, so that nothing is blamed for it."""
    return sum(map(holds, rows)) / len(rows) if rows else 1.0


def milliseconds(latencies: Sequence[float], at: float) -> float | None:
    """A percentile of latencies, in milliseconds; ``None`` of none."""
    return percentile(latencies, at) * 1e3 if latencies else None


def served(rows: Sequence[Outcome]) -> list[float]:
    """The latencies of all that were served, however late."""
    return [row.latency for row in rows if 200 <= row.status < 300]


# Recovery


def recovery(rows: Sequence[Outcome], begin: float, end: float, recovered: Callable[[list[Outcome]], bool]) -> float:
    """Seconds from ``begin`` until a `WINDOW` is ``recovered``, and the `HOLD` that begins with it is, too.

    Where that never happens before ``end`` it is the time from ``begin`` to ``end``: "at least that".
    """
    for step in range(math.ceil((end - begin) / STEP)):
        start = begin + step * STEP
        if start + WINDOW > end:
            break
        if recovered(within(rows, start, start + WINDOW)) and recovered(within(rows, start, min(end, start + HOLD))):
            return start - begin
    return end - begin


def serves(wanted: float) -> Callable[[list[Outcome]], bool]:
    """Whether at least this part of the first attempts is served in time."""
    return lambda rows: share([row for row in rows if row.attempt == 0], lambda row: row.good) >= wanted


def as_fast(median: float, times: float) -> Callable[[list[Outcome]], bool]:
    """Whether the median latency, of what was not served infinite, is at most ``times`` what it was, ``median``."""

    def judge(rows: list[Outcome]) -> bool:
        latencies = [row.latency if 200 <= row.status < 300 else math.inf for row in rows]
        return not latencies or sorted(latencies)[len(latencies) // 2] <= median * times

    return judge


# Fairness


def fairness(rows: Sequence[Outcome], seconds: float, capacity: float) -> float:
    """Jain's index over kinds of goodput as a part of the max-min share of ``capacity`` requests per second."""
    kinds = sorted({row.kind for row in rows})
    demands = [sum(row.kind == kind for row in rows) / seconds for kind in kinds]
    got = [sum(row.good for row in rows if row.kind == kind) / seconds for kind in kinds]
    fair = max_min(demands, capacity)
    return jain([one / other for one, other in zip(got, fair, strict=True) if other > 0])


def unanswered(row: Outcome) -> bool:
    """Whether the caller gave up, or lost its connection."""
    return row.status <= GAVE_UP


def refused(row: Outcome) -> bool:
    """Whether it was refused."""
    return row.status in REFUSALS
