"""How long calls take, of the last hundred."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from typing import final

SECOND = 1_000_000_000
KEPT = 100
LEAST = 20


@final
class Latencies:
    """The last hundred, and their 95th percentile."""

    __slots__ = ("_order", "_sorted")

    def __init__(self) -> None:
        self._order: deque[int] = deque()
        self._sorted: list[int] = []

    def __repr__(self) -> str:
        return f"<Latencies of {len(self._order)} calls>"

    def add(self, took: int) -> None:
        """One has taken so many nanoseconds."""
        if len(self._order) == KEPT:
            del self._sorted[bisect_left(self._sorted, self._order.popleft())]
        self._order.append(took)
        insort(self._sorted, took)

    def p95(self) -> float | None:
        """In seconds; ``None`` before there are twenty."""
        count = len(self._sorted)
        return self._sorted[(count * 95 - 1) // 100] / SECOND if count >= LEAST else None
