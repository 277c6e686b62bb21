"""How many requests at a time: the laws, apart from the turnstile that applies them.

A law is told, once a window, what the window was like, and answers with a limit and the reason for it. It has no clock,
no loop and no requests: everything that time and chance have to say is in the `Window`. Each class states its formula;
``tests/test_overload_laws.py`` evaluates them.

Two laws share the work in `adaptive`, because one signal is not enough. `LagLaw` watches the event loop, on which
everything is served: it holds where the processor is short, whatever is waited for. `LatencyLaw` watches how long the
requests of one rule take, which is what tells of a downstream that is short while the loop is idle. The smaller limit
holds.
"""

from __future__ import annotations

from math import exp, inf, log, log2
from typing import Protocol, final

UNKNOWN = -1
"""A lag of which there is no sample."""


@final
class Window:
    """What happened between two evaluations of a law.

    ``lag`` is the loop's, in nanoseconds (`UNKNOWN` without a sample), ``worst`` the largest one. ``peak`` is the most
    requests in flight at once, ``in_flight`` the mean as the ending requests saw it. ``samples`` is how many requests
    ended well, ``latency`` their geometric mean in nanoseconds, ``dropped`` how many ended with a time-out or an
    overloaded downstream, ``duration`` how long the window was, in nanoseconds. ``needed`` is how many in flight it
    takes to keep the service busy.
    """

    __slots__ = ("dropped", "duration", "in_flight", "lag", "latency", "needed", "peak", "samples", "worst")

    def __init__(
        self,
        *,
        lag: int = UNKNOWN,
        worst: int = 0,
        peak: int = 0,
        in_flight: float = 0.0,
        samples: int = 0,
        latency: float = 0.0,
        dropped: int = 0,
        duration: int = 500_000_000,
        needed: float = 0.0,
    ) -> None:
        self.needed = needed
        self.duration = duration
        self.lag = lag
        self.worst = max(worst, lag)
        self.peak = peak
        self.in_flight = in_flight
        self.samples = samples
        self.latency = latency
        self.dropped = dropped

    def __repr__(self) -> str:
        return f"<Window lag {self.lag} ns, peak {self.peak}, {self.samples} samples of {self.latency:.0f} ns>"


class Limit(Protocol):
    """A law. ``limit`` is how many requests may be in flight, ``reason`` why it last changed."""

    limit: float
    reason: str

    def observe(self, window: Window) -> bool:
        """Learn from a window that has ended; whether the limit was changed."""
        ...


REASONS = ("start", "lag", "growth", "cold_start", "latency", "rebaseline", "drop", "relax")
"""Why a limit changed: the values of a metric label, so the list is closed."""


class _Bounded:
    """A limit between its bounds."""

    def __init__(self, initial: float, least: float, most: float) -> None:
        self.limit = min(max(float(initial), least), most)
        self.least = float(least)
        self.most = float(most)
        self.reason = "start"

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.limit:.1f} of {self.least:.0f}..{self.most:.0f}, {self.reason}>"

    def _move(self, limit: float, reason: str) -> bool:
        limit = min(max(limit, self.least), self.most)
        if limit == self.limit:
            return False
        self.limit = limit
        self.reason = reason
        return True


@final
class FixedLimit(_Bounded):
    """``L = initial``, for ever. For who has measured, and for comparison."""

    def observe(self, window: Window) -> bool:
        return False


@final
class LagLaw(_Bounded):
    """Concurrency by the lag of the event loop.

    With ``m`` the lag of the window and ``T`` the target:

    * ``m > T``: ``L = max(least, min(L, peak + 1) * max(.6, 1 - .2 (m - T) / T))``
    * else, where the limit is in use (``2 peak >= L``): ``L += max(1, log2(L) (1 - m / T))``
    * until the first congestion, where the limit is reached (``peak >= L``) and even the worst lag is below ``T / 4``:
      ``L = 2 L``

    Under ``m > T`` it does not fall below ``min(needed, 16)``. Where most of the lag is the cost of refusing, less of
    what is admitted makes it no better, and a loop that waits for I/O meanwhile is idle (BBR's product of bandwidth and
    delay is the same thought; its being a floor, and a low one, is why a wrong estimate does no harm).

    A limit that nobody reaches does not grow, so that it means something when it is reached. The step down is bounded,
    so that one strange window costs at most two fifths; it starts from what was really in flight, or a limit that had
    drifted high would take seconds to bite.

    ``target_ns`` is 10 ms by default: each ``await`` queues again behind everybody, so a request pays the lag several
    times, and it has to be far below what its caller will wait.
    """

    NEEDED = 16

    def __init__(self, initial: float, least: float, most: float, target_ns: int = 10_000_000) -> None:
        super().__init__(initial, least, most)
        self.target_ns = target_ns
        self.cold = True

    def observe(self, window: Window) -> bool:
        lag, limit = window.lag, self.limit
        if lag == UNKNOWN:
            return False
        excess = (lag - self.target_ns) / self.target_ns
        if excess > 0:
            self.cold = False
            lower = min(limit, window.peak + 1) * max(0.6, 1 - 0.2 * excess)
            return self._move(max(lower, min(limit, window.needed, self.NEEDED)), "lag")
        if self.cold and window.peak >= limit and window.worst * 4 < self.target_ns:
            return self._move(limit * 2, "cold_start")
        if 2 * window.peak >= limit:
            return self._move(limit + max(1.0, log2(limit) * -excess), "growth")
        return False


@final
class LatencyLaw(_Bounded):
    """Concurrency by how long requests of one kind take: for what is waited for outside of the event loop.

    Of each window with at least `SAMPLES` samples it takes their geometric mean ``R`` (a mean of logarithms: one slow
    route among fast ones, or a heavy tail, moves it little) and the mean number in flight ``N``. ``R0`` is the latency
    when nothing waits.

    * open (``L = most``) until ``R > 2 R0``: a law that is fed by latency may refuse nobody before it has seen
      congestion. ``R0`` follows ``R``, by a fifth downwards and a twentieth upwards a window
      (at first it is the mean of `LEARNS` windows). Then ``L = peak / 2``.
    * going down: by Little's law a saturated downstream answers faster in proportion as less is sent there. If since
      the last step ``log R`` has fallen at least half as much as ``log N``, requests wait in a queue of our own making:
      ``knee`` is the ``N`` before, and ``L = .8 L`` (``.5 L`` where R is 20 times what it was when open). If it has
      not, what is waited for has become slower by itself, and that is its latency now: ``R0 = R``, and up again.
    * going up, while ``R <= 1.3 R0``: ``L = 1.5 L + 1`` where that is below the knee or the limit is not in use
      (``2 peak < L``), ``1.2 L + 1`` where no knee is known, else ``1.05 L + 1``; at ``most`` it is open again.
      ``R > 1.3 R0``: down again, by ``.8``.
    * nothing is judged until ``2 R`` after the last change (after a step down: since no more than ``L`` are in flight),
      for what ends before was sent before. The first step has nothing to be compared with, and is followed by a second.
    * ``R`` is within 1.3 of what it was when open: ``L = 1.5 L + 1``, whatever else.
    * a window with drops (more than a twentieth of its requests): ``L = .9 min(L, peak)``. One without samples: up.

    A baseline that follows latency under load drifts until the limit means nothing (Gradient2, failsafe-go: without
    bound over ten minutes at 1.3 times capacity), one that never moves refuses for ever after the downstream has
    changed. Moving it exactly when less load did not help does neither.
    """

    SAMPLES = 10
    LEARNS = 10

    def __init__(self, least: float, most: float) -> None:
        super().__init__(most, least, most)
        self._seen = 0
        self.baseline = 0.0
        self.knee = inf
        self._usual = 0.0
        self._step: tuple[float, float] | None = None
        self._settled = 0

    @property
    def open(self) -> bool:
        return self.limit >= self.most

    def observe(self, window: Window) -> bool:
        if window.dropped > max(1, (window.samples + window.dropped) // 20):
            return self._move(min(self.limit, window.peak) * 0.9, "drop")
        if window.samples < self.SAMPLES:
            # Nobody asks, so nothing is learned; what tightens has to relax by itself all the same.
            return not self.open and self._relax(window)
        latency, in_flight = window.latency, max(window.in_flight, 1.0)
        if self.open:
            return self._watch(window.peak, in_flight, latency)
        if latency <= self._usual * 1.3:
            self.baseline = min(self.baseline, latency)
            self._step = None
            return self._move(self.limit * 1.5 + 1, "relax")
        if self._settled < 0 and in_flight > self.limit:
            return False
        self._settled = max(self._settled, 0) + window.duration
        if self._settled < 2 * latency:
            return False
        if self._step is None:
            self.baseline += min(0.0, latency - self.baseline) / 5 if self.baseline else latency
            return self._relax(window) if latency <= self.baseline * 1.3 else self._down(0.8, in_flight, latency)
        # At the floor nothing can be found out by sending less.
        if self.limit > self.least and self._helped(self._step, in_flight, latency):
            self.knee = self._step[0] or inf
            return self._down(0.5 if latency > self._usual * 20 else 0.8, in_flight, latency)
        self.baseline = latency
        self._step = None
        return self._relax(window, "rebaseline")

    def _watch(self, peak: int, in_flight: float, latency: float) -> bool:
        """Open: learn what is usual, until it is not."""
        if self._seen < self.LEARNS:
            # What ends first after a start is what is quick.
            self._seen += 1
            self.baseline += (latency - self.baseline) / self._seen
            return False
        if latency <= self.baseline * 2:
            # Not down at once: the least of many windows is not what is usual where fast and slow requests are mixed.
            self.baseline += (latency - self.baseline) / (20 if latency > self.baseline else 5)
            return False
        self._usual = self.baseline
        if not self._down(peak / 2 / self.limit, in_flight, latency):
            self._step = None
            return False
        # What is under way grows faster here than what ends can tell, so nothing is compared with this window.
        self._step = (0.0, 0.0)
        return True

    @staticmethod
    def _helped(step: tuple[float, float], in_flight: float, latency: float) -> bool:
        """Whether requests have become faster as fewer were under way."""
        if not step[0]:
            return True
        fewer = log(step[0] / in_flight)
        return fewer < 0.1 or log(step[1] / latency) >= fewer / 2

    def _down(self, factor: float, in_flight: float, latency: float) -> bool:
        self._step, self._settled = (in_flight, latency), -1
        return self._move(self.limit * factor, "latency")

    def _relax(self, window: Window, reason: str = "relax") -> bool:
        self._settled = 0
        limit = self.limit
        if limit * 1.5 + 1 < self.knee < inf or 2 * window.peak < limit:
            return self._move(limit * 1.5 + 1, reason)
        return self._move(limit * (1.05 if self.knee < inf else 1.2) + 1, reason)


@final
class Gradient2Law(_Bounded):
    """Netflix's Gradient2 (concurrency-limits, ``Gradient2Limit``), window by window.

    ``long`` is the exponential average of ``R`` over 600 windows (the first ten: their mean), lowered by a twentieth
    where it is twice ``R``; ``g = max(.5, min(1, 1.5 long / R))``; ``L = .8 L + .2 (g L + 4)``, and no change where
    fewer than ``L / 2`` were in flight. Their code and their comment differ by the factor 1.5, the tolerance; this
    is the code. Its baseline drifts under long overload, which is why it is not the default.
    """

    def __init__(self, initial: float, least: float, most: float) -> None:
        super().__init__(initial, least, most)
        self._long = 0.0
        self._seen = 0

    def observe(self, window: Window) -> bool:
        if not window.samples:
            return False
        self._seen += 1
        weight = 1 / self._seen if self._seen <= 10 else 2 / 601
        self._long += (window.latency - self._long) * weight
        if self._long > 2 * window.latency:
            self._long *= 0.95
        if window.peak < self.limit / 2:
            return False
        gradient = max(0.5, min(1.0, 1.5 * self._long / window.latency))
        limit = 0.8 * self.limit + 0.2 * (gradient * self.limit + 4)
        return self._move(limit, "growth" if limit > self.limit else "latency")


@final
class AimdLaw(_Bounded):
    """Additive increase, multiplicative decrease: ``L = .9 L`` after a window with a drop, or in which the loop lagged
    behind by more than ``target_ns``; else ``L + 1`` where the limit was in use (``2 peak >= L``).
    """

    def __init__(self, initial: float, least: float, most: float, target_ns: int = 10_000_000) -> None:
        super().__init__(initial, least, most)
        self.target_ns = target_ns

    def observe(self, window: Window) -> bool:
        if window.dropped:
            return self._move(self.limit * 0.9, "drop")
        if window.lag > self.target_ns:
            return self._move(self.limit * 0.9, "lag")
        return 2 * window.peak >= self.limit and self._move(self.limit + 1, "growth")


def geometric_mean(log_sum: float, count: int) -> float:
    """The geometric mean of ``count`` values whose natural logarithms add up to ``log_sum``."""
    return exp(log_sum / count) if count else 0.0
