"""Not sending what would be refused anyway ("Handling Overload", Site Reliability Engineering, chapter 21).

Over two minutes a client counts what it wanted to send and what was accepted. Where more than ``K`` times as much was
wanted, each further request is refused locally with the probability

    p = max(0, (requests - K * accepts) / (requests + 1))      at most .9

``requests`` counts what was refused locally as well, so that a client that is refused much sends little, and goes on
finding out whether that is still so. With ``K = 2`` twice as much is sent as is accepted. Of a few requests nothing
follows, so there have to be twenty.

Two things are added. A request counts when it has ended: of those under way nobody knows yet whether they are accepted,
and the first hundred of a service that has just started would be refused for each other's sake. And it is over when
twenty in a row were accepted: with K = 2 a host that is too much for refuses every second one, and what a spike of five
seconds has begun would go on for minutes.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import final

from seawall.client.window import Window

SECOND = 1_000_000_000
SLICES = 12
_REQUESTS, _ACCEPTS = 0, 1


@final
class AdaptiveThrottle:
    """The throttle of one host. Times are monotonic nanoseconds, settings in seconds.

    ``k`` is how many times as much is sent as is accepted (2, at least 1), ``window`` the time that is looked at (120),
    ``most`` the largest share that is refused here (.9), ``least`` how many requests say something, and how many in a
    row end it (20).
    """

    __slots__ = ("_in_a_row", "_window", "k", "least", "most")

    def __init__(self, k: float = 2.0, window: float = 120.0, most: float = 0.9, least: int = 20) -> None:
        if not k >= 1 or not 0 < window < inf or not 0 <= most < 1 or least < 1:
            raise ValueError("k and least are at least 1, window is a time, most 0 to 1 without 1")
        self.k = k
        self.most = most
        self.least = least
        self._window = Window(int(window * SECOND), SLICES, 2)
        self._in_a_row = 0

    def __repr__(self) -> str:
        requests, accepts = self._window.totals
        return f"<AdaptiveThrottle {accepts}/{requests} accepted, {self.probability():.2f} refused>"

    def probability(self, now: int = 0) -> float:
        """The share of requests that is refused, 0 to ``most``: as of ``now``, or of the last request after that."""
        self._window.turn(now)
        requests, accepts = self._window.totals
        if requests < self.least:
            return 0.0
        return min(self.most, max(0.0, (requests - self.k * accepts) / (requests + 1)))

    def admit(self, now: int, random: Callable[[], float]) -> bool:
        """Whether to send one more; whoever does says how it ended (`record`), if it was for the host to say.

        ``random`` gives 0 to 1 without 1.
        """
        window = self._window
        window.turn(now)
        requests, accepts = window.totals
        if requests <= self.k * accepts or random() >= self.probability():
            return True
        window.add(now, _REQUESTS)
        return False

    def record(self, now: int, *, accepted: bool) -> None:
        """One that was sent was answered. ``accepted``: it was not refused for being too much."""
        window = self._window
        window.add(now, _REQUESTS)
        if not accepted:
            self._in_a_row = 0
            return
        window.add(now, _ACCEPTS)
        self._in_a_row += 1
        if self._in_a_row >= self.least and window.totals[_REQUESTS] > self.k * window.totals[_ACCEPTS]:
            window.clear()
