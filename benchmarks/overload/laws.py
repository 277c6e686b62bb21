"""The laws that Seawall is compared with, each as the concurrency limit of its project: what finds no room is refused.

They are written anew from their sources, which each docstring names, with the defaults found there. Their clocks run in
simulated time; what their projects do in background threads (windows, recalculations) happens at the first event after
its time.
"""

from __future__ import annotations

from math import log2

from benchmarks.overload.engine import MS, S, Loop, Request, Timer


class Nothing:
    """No control: every request starts at once."""

    name = "none"

    def attach(self, loop: Loop, capacity_hint: float) -> None:
        self.in_flight = 0

    def arrive(self, request: Request) -> bool | None:
        self.in_flight += 1
        return True

    def finish(self, request: Request, outcome: str) -> None:
        self.in_flight -= 1

    def started_response(self, request: Request) -> None:
        """Nothing to give back."""

    def stats(self) -> dict[str, float]:
        return {"in_flight": self.in_flight}


class LoopLag:
    """Additive increase, multiplicative decrease on the lag of the event loop, refusing at once.

    A heartbeat every 10 ms while requests are in flight; its lag is how late it came. ``m`` is the 25th percentile of
    the lags of a window of 100 ms. Above the target T = 10 ms::

        L = max(2, min(L, peak + 1) * max(0.7, 1 - 0.4(m - T) / T))

    else, if the peak of in-flight reached half of L: ``L += max(1, log2(L) * (1 - m / T))``. Cold start: 20, doubled
    per window while the peak reaches L and m < T / 4, until the first congestion. Source: overload.md.
    """

    name = "lag-aimd"
    PERIOD_NS = 10 * MS
    WINDOW_NS = 100 * MS
    TARGET_NS = 10 * MS

    def attach(self, loop: Loop, capacity_hint: float) -> None:
        self.loop = loop
        self.limit = 20.0
        self.in_flight = 0
        self.peak = 0
        self.starting = True
        self.lags: list[int] = []
        self.due = 0
        self.window_end = self.WINDOW_NS
        self.timer: Timer | None = None

    def arrive(self, request: Request) -> bool | None:
        if self.in_flight >= self.limit:
            return False
        self.in_flight += 1
        if self.in_flight > self.peak:
            self.peak = self.in_flight
        if self.timer is None:
            self._arm()
        return True

    def finish(self, request: Request, outcome: str) -> None:
        self.in_flight -= 1

    def started_response(self, request: Request) -> None:
        """A stream counts until it ends: these limits know no other kind of request."""

    def stats(self) -> dict[str, float]:
        return {"limit": self.limit, "in_flight": self.in_flight}

    def _arm(self) -> None:
        self.due = self.loop.now + self.PERIOD_NS
        self.timer = self.loop.call_later(self.PERIOD_NS / S, self._beat)

    def _beat(self) -> None:
        now = self.loop.now
        self.lags.append(now - self.due)
        if now >= self.window_end:
            self.lags.sort()
            self.update(self.lags[len(self.lags) // 4])
            self.lags.clear()
            self.peak = self.in_flight
            self.window_end = now + self.WINDOW_NS
        if self.in_flight:
            self._arm()
        else:
            self.timer = None

    def update(self, lag: int) -> None:
        """Move the limit after a window in which the lag was ``lag`` nanoseconds."""
        target, peak = self.TARGET_NS, self.peak
        if lag > target:
            self.starting = False
            self.limit = max(2.0, min(self.limit, peak + 1) * max(0.7, 1 - 0.4 * (lag - target) / target))
        elif self.starting and peak >= self.limit and lag < target / 4:
            self.limit = min(1000.0, self.limit * 2)
        elif 2 * peak >= self.limit:
            self.limit = min(1000.0, self.limit + max(1.0, log2(self.limit) * (1 - lag / target)))
