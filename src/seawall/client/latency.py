"""How long calls take, of the last hundred."""

from __future__ import annotations

from collections import deque
from typing import final

SECOND = 1_000_000_000
KEPT = 100
LEAST = 20


@final
class Latencies:
    """The last hundred, and their 95th percentile."""

    __slots__ = ("_last", "add")

    def __init__(self) -> None:
        self._last: deque[int] = deque(maxlen=KEPT)
        self.add = self._last.append
        """One has taken so many nanoseconds."""

    def __repr__(self) -> str:
        return f"<Latencies of {len(self._last)} calls>"

    def p95(self) -> float | None:
        """In seconds; ``None`` before there are twenty. Sorted when asked for, which is not with every call."""
        count = len(self._last)
        return sorted(self._last)[(count * 95 - 1) // 100] / SECOND if count >= LEAST else None
