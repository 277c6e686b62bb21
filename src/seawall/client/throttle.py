"""Not sending what would be refused anyway ("Handling Overload", Site Reliability Engineering, chapter 21).

Over two minutes a client counts what it wanted to send and what was accepted. Where more than ``K`` times as much was
wanted, each further request is refused locally with the probability

    p = max(0, (requests - K * accepts) / (requests + 1))      at most .9

``requests`` counts what was refused locally as well, so that a client that is refused much sends little, and goes on
finding out whether that is still so. With ``K = 2`` twice as much is sent as is accepted. Of a few requests nothing
follows, so there have to be twenty.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import final

SECOND = 1_000_000_000
SLICES = 12


@final
class AdaptiveThrottle:
    """Counts of one host in slices of ten seconds. Times are monotonic nanoseconds."""

    __slots__ = ("_accepts", "_at", "_requests", "_slice", "k", "least", "most", "total_accepts", "total_requests")

    def __init__(self, k: float = 2.0, window: float = 120.0, most: float = 0.9, least: int = 20) -> None:
        if k < 1 or window <= 0 or not 0 <= most < 1:
            raise ValueError("k is at least 1, window more than 0, most 0 to 1 without 1")
        self.k = k
        self.most = most
        self.least = least
        self._slice = int(window * SECOND / SLICES)
        self._requests = [0] * SLICES
        self._accepts = [0] * SLICES
        self._at = 0
        self.total_requests = self.total_accepts = 0

    def __repr__(self) -> str:
        return (
            f"<AdaptiveThrottle {self.total_accepts}/{self.total_requests} accepted, {self.probability():.2f} refused>"
        )

    def probability(self) -> float:
        """The share of requests that is refused now."""
        if self.total_requests < self.least:
            return 0.0
        return min(self.most, max(0.0, (self.total_requests - self.k * self.total_accepts) / (self.total_requests + 1)))

    def admit(self, now: int, random: Callable[[], float]) -> bool:
        """Whether to send one more."""
        self._turn(now)
        probability = 0.0 if self.total_requests <= self.k * self.total_accepts else self.probability()
        admitted = not probability or random() >= probability
        self._requests[self._at % SLICES] += 1
        self.total_requests += 1
        return admitted

    def accepted(self, now: int) -> None:
        """One that was sent was not refused for being too much."""
        self._turn(now)
        self._accepts[self._at % SLICES] += 1
        self.total_accepts += 1

    def forget(self) -> None:
        """One that was admitted was not sent."""
        if self.total_requests:
            at = self._at % SLICES
            taken = min(1, self._requests[at])
            self._requests[at] -= taken
            self.total_requests -= taken

    def _turn(self, now: int) -> None:
        at = now // self._slice
        for slot in range(max(self._at + 1, at - SLICES + 1), at + 1):
            self.total_requests -= self._requests[slot % SLICES]
            self.total_accepts -= self._accepts[slot % SLICES]
            self._requests[slot % SLICES] = self._accepts[slot % SLICES] = 0
        self._at = max(self._at, at)
