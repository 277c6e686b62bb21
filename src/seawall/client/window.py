"""Counts of the last so many seconds, in slices of time."""

from __future__ import annotations

from typing import final


@final
class Window:
    """Sums over a sliding time, by column: ``totals[column]``. Times are monotonic nanoseconds.

    ``span`` is cut into ``slices``, of which the newest is being filled: what is older than ``span`` is never in the
    sums, and what is younger than ``span`` without one slice always is. A clock that goes back counts into the newest.
    """

    __slots__ = ("_at", "_counts", "_newest", "_slice", "_until", "totals")

    def __init__(self, span: int, slices: int, columns: int) -> None:
        self._slice = max(1, span // slices)
        self._counts = [[0] * columns for _ in range(slices)]
        self._at = 0
        self._until = self._slice
        self._newest = self._counts[0]
        self.totals = [0] * columns

    def __repr__(self) -> str:
        return f"<Window {self.totals}>"

    def turn(self, now: int) -> None:
        """Forget what is too old."""
        if now < self._until:
            return
        at, counts = now // self._slice, self._counts
        for slot in range(max(self._at + 1, at - len(counts) + 1), at + 1):
            old = counts[slot % len(counts)]
            for column, count in enumerate(old):
                self.totals[column] -= count
                old[column] = 0
        self._at, self._until = at, (at + 1) * self._slice
        self._newest = counts[at % len(counts)]

    def add(self, now: int, column: int) -> None:
        """Count one."""
        if now >= self._until:
            self.turn(now)
        self._newest[column] += 1
        self.totals[column] += 1

    def clear(self) -> None:
        """Forget everything."""
        for counts in (self.totals, *self._counts):
            counts[:] = [0] * len(counts)
