"""The laws that Seawall is compared with, each as the concurrency limit of its project: what finds no room is refused.

They are written anew from their sources, which each docstring names, with the defaults found there. The arithmetic of
a law stands in one method, ``update``, which the tests step through by hand. What their projects do in background
threads happens here in a timer, or at the first event after its time.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from math import ceil, floor, isnan, log2, log10, nan, sqrt

from benchmarks.overload.engine import MS, NEVER, Loop, Request, S, Timer, stream


class ConcurrencyLimit:
    """The turnstile that most laws share: at most ``limit`` handlers in flight, others are refused at once.

    A law overrides ``sample``, which is told of every handler that returned.
    """

    name = ""

    def attach(self, loop: Loop, capacity_hint: float) -> None:
        self.loop = loop
        self.limit = 20.0
        self.in_flight = 0
        self.random: random.Random = stream(1, "law", self.name)
        self.reset(capacity_hint)

    def reset(self, capacity_hint: float) -> None:
        """Set the state of the law."""

    def arrive(self, request: Request) -> bool | None:
        if self.in_flight >= int(self.limit):
            return False
        self.in_flight += 1
        request.ticket = self.in_flight
        return True

    def finish(self, request: Request, outcome: str) -> None:
        if outcome != "ignored":
            now = self.loop.now
            self.sample(now, now - request.seen_ns, request.ticket, outcome == "dropped")
        self.in_flight -= 1

    def sample(self, now: int, rtt: int, in_flight: int, dropped: bool) -> None:
        """A handler took ``rtt`` nanoseconds; ``in_flight`` is how many there were when it began, itself included."""

    def started_response(self, request: Request) -> None:
        """A stream counts until it ends: these limits know no other kind of request."""

    def stats(self) -> dict[str, float]:
        return {"limit": self.limit, "in_flight": self.in_flight}


class Nothing(ConcurrencyLimit):
    """No control: every request starts at once."""

    name = "none"

    def reset(self, capacity_hint: float) -> None:
        self.limit = float(NEVER)


class Fixed(ConcurrencyLimit):
    """A limit set by somebody who knows the capacity: by Little's law what it can serve within 100 ms."""

    name = "fixed"

    def reset(self, capacity_hint: float) -> None:
        self.limit = max(1.0, float(round(capacity_hint / 10)))


class Average:
    """An exponential moving average that begins as the plain mean of its first samples.

    Source: Netflix concurrency-limits, limit/measurement/ExpAvgMeasurement.java; failsafe-go, internal/util/ewma.go.
    """

    __slots__ = ("count", "factor", "sum", "value", "warmup")

    def __init__(self, window: int, warmup: int) -> None:
        self.factor, self.warmup = 2 / (window + 1), warmup
        self.count, self.sum, self.value = 0, 0.0, 0.0

    def add(self, sample: float) -> float:
        """Take a sample; the average with it."""
        if self.count < self.warmup:
            self.count += 1
            self.sum += sample
            self.value = self.sum / self.count
        else:
            self.value += (sample - self.value) * self.factor
        return self.value


class Gradient2(ConcurrencyLimit):
    """Netflix's Gradient2 with its defaults, over windows of a second with at least 10 samples.

    ``gradient = max(.5, min(1, long / short))``, ``new = L * gradient + 4``, ``L = .8 L + .2 new``, within 20..200;
    unchanged while fewer than L / 2 are in flight. ``short`` is the mean of the window, ``long`` its exponential
    average over 600 windows, cut by a tenth whenever it is more than twice the short one. Source: Netflix
    concurrency-limits, limit/Gradient2Limit.java and limit/WindowedLimit.java.
    """

    name = "gradient2"

    def reset(self, capacity_hint: float) -> None:
        self.long = Average(600, 10)
        self.next_update = 0
        self.clear()

    def clear(self) -> None:
        """Begin a window."""
        self.count = self.sum = self.peak = 0
        self.least = NEVER

    def sample(self, now: int, rtt: int, in_flight: int, dropped: bool) -> None:
        self.count += 1
        self.sum += rtt
        self.peak = max(self.peak, in_flight)
        self.least = min(self.least, rtt)
        if now > self.next_update:
            self.next_update = now + min(max(self.least * 2, S), S)
            if self.count >= 10:
                self.update(self.sum / self.count, self.peak)
            self.clear()

    def update(self, rtt: float, in_flight: int) -> None:
        """Move the limit after a window."""
        long = self.long.add(rtt)
        if long / rtt > 2:
            self.long.value *= 0.9
        if in_flight < self.limit / 2:
            return
        gradient = max(0.5, min(1.0, long / rtt))
        self.limit = max(20.0, min(200.0, 0.8 * self.limit + 0.2 * (self.limit * gradient + 4)))


def _log10(limit: float) -> int:
    return max(1, int(log10(max(1, int(limit)))))


class Vegas(ConcurrencyLimit):
    """Netflix's Vegas with its defaults, which is what its limiters use by default; one step for each request.

    ``queue = ceil(L (1 - least / rtt))``. With g = max(1, floor(log10 L)): L += 6 g while the queue is at most g,
    L += g below 3 g, L -= g above 6 g or after a drop; unchanged while fewer than L / 2 are in flight; within 1..1000.
    Every 30 L requests (times a jitter of .5 to 1) the least time is forgotten. Source: Netflix concurrency-limits,
    limit/VegasLimit.java, limit/functions/Log10RootFunction.java.
    """

    name = "vegas"

    def reset(self, capacity_hint: float) -> None:
        self.least = 0
        self.probes = 0
        self.jitter = self.random.uniform(0.5, 1)

    def sample(self, now: int, rtt: int, in_flight: int, dropped: bool) -> None:
        self.probes += 1
        if self.jitter * 30 * self.limit <= self.probes:
            self.jitter = self.random.uniform(0.5, 1)
            self.probes = 0
            self.least = rtt
        elif self.least == 0 or rtt < self.least:
            self.least = rtt
        else:
            self.update(rtt, in_flight, dropped)

    def update(self, rtt: int, in_flight: int, dropped: bool) -> None:
        """Move the limit after a request that was no probe and not the fastest."""
        queue = ceil(self.limit * (1 - self.least / rtt))
        step = _log10(self.limit)
        if dropped:
            limit = self.limit - step
        elif in_flight * 2 < self.limit:
            return
        elif queue <= step:
            limit = self.limit + 6 * step
        elif queue < 3 * step:
            limit = self.limit + step
        elif queue > 6 * step:
            limit = self.limit - step
        else:
            return
        self.limit = max(1.0, min(1000.0, limit))


class Envoy(ConcurrencyLimit):
    """Envoy's adaptive concurrency: the gradient of the 90th percentile to a least time measured every minute.

    Each 100 ms: ``gradient = max(.5, min(2, 1.25 least / p90))``, ``L = L gradient + sqrt(L gradient)``, within
    3..1000. The least time is the p90 of 50 requests at a limit of 3, measured at the start, every 60 s (up to 15 %
    later) and after five windows in a row at a limit of 3. Source: Envoy, source/extensions/filters/http/
    adaptive_concurrency/controller/gradient_controller.cc; percentile, interval and number as in the example of its
    documentation.
    """

    name = "envoy"
    LEAST_LIMIT = 3.0

    def reset(self, capacity_hint: float) -> None:
        self.least = 0
        self.samples: list[int] = []
        self.limit = self.LEAST_LIMIT
        self.deferred = 0.0
        self.measuring = False
        self.epoch = 0
        self.at_least = 0
        self.timer: Timer | None = None
        self.measure()
        self.loop.call_later(0.1, self.window)

    def sample(self, now: int, rtt: int, in_flight: int, dropped: bool) -> None:
        if now - rtt < self.epoch:
            return
        self.samples.append(rtt)
        if self.measuring and len(self.samples) >= 50:
            self.least = self.percentile()
            self.set(self.deferred)
            self.measuring = False
            self.timer = self.loop.call_later(60 * (1 + 0.15 * self.random.random()), self.measure)

    def percentile(self) -> int:
        """The 90th of the samples, which are forgotten."""
        self.samples.sort()
        value = self.samples[ceil(0.9 * len(self.samples)) - 1]
        self.samples.clear()
        return value

    def measure(self) -> None:
        """Begin to measure the least time."""
        if not self.measuring:
            self.deferred = self.limit
            self.set(self.LEAST_LIMIT)
            self.measuring = True
            self.samples.clear()
            self.epoch = self.loop.now

    def window(self) -> None:
        """A window has ended."""
        self.loop.call_later(0.1, self.window)
        if not self.measuring and self.samples:
            self.update(self.percentile())

    def update(self, rtt: int) -> None:
        """Move the limit after a window whose 90th percentile was ``rtt``."""
        limit = self.limit * max(0.5, min(2.0, 1.25 * self.least / rtt))
        self.set(max(self.LEAST_LIMIT, min(1000.0, float(int(limit + sqrt(limit))))))

    def set(self, limit: float) -> None:
        """Change the limit; after five windows at the least one, measure the least time anew."""
        both = not self.measuring and self.limit == limit == self.LEAST_LIMIT
        self.at_least = self.at_least + 1 if both else 0
        self.limit = limit
        if self.at_least >= 5:
            if self.timer is not None:
                self.timer.cancel()
            self.timer = self.loop.call_later(0, self.measure)


class Correlation:
    """The correlation of the last ``capacity`` pairs; 0 with fewer than ``warmup`` or a variation below 1 %.

    Source: failsafe-go, internal/util/windows.go.
    """

    __slots__ = ("pairs", "warmup")

    def __init__(self, capacity: int, warmup: int) -> None:
        self.pairs: deque[tuple[float, float]] = deque(maxlen=capacity)
        self.warmup = warmup

    @staticmethod
    def _variation(values: list[float]) -> tuple[float, float, float]:
        mean = sum(values) / len(values)
        variance = sum(value * value for value in values) / len(values) - mean * mean
        if len(values) < 2 or variance < 0 or mean == 0:
            return nan, nan, nan
        return sqrt(variance) / mean, mean, variance

    def add(self, x: float, y: float) -> tuple[float, float]:
        """Take a pair; the correlation, and the coefficient of variation of y."""
        self.pairs.append((x, y))
        xs, ys = [pair[0] for pair in self.pairs], [pair[1] for pair in self.pairs]
        cv_x, mean_x, variance_x = self._variation(xs)
        cv_y, mean_y, variance_y = self._variation(ys)
        if isnan(cv_x) or isnan(cv_y) or len(xs) < self.warmup:
            return 0.0, 0.0
        if cv_x < 0.01 or cv_y < 0.01:
            return 0.0, cv_y
        covariance = sum(one * other for one, other in self.pairs) / len(xs) - mean_x * mean_y
        return covariance / (sqrt(variance_x) * sqrt(variance_y)), cv_y


class Failsafe(ConcurrencyLimit):
    """failsafe-go's adaptive limiter with its defaults: Vegas on smoothed 90th percentiles, held by correlations.

    A window ends after a second and 50 samples. Its p90 goes through a median of 5 and an average of 5; the baseline is
    an average of 10 of those. ``queue = ceil(L (1 - baseline / recent))``; with g = 1 below 100 and 2 above: L -= g if
    the queue exceeds 6 g, or if the limiter is full and throughput does not grow with what is in flight while times do;
    L += g if the queue is below 3 g; and never more than 5 times what is in flight. Within 1..200. Source: failsafe-go,
    adaptivelimiter/adaptivelimiter.go (``updateLimit``, ``computeChange``).
    """

    name = "failsafe"

    def reset(self, capacity_hint: float) -> None:
        self.samples: list[int] = []
        self.peak = 0
        self.median: deque[float] = deque(maxlen=5)
        self.recent = Average(5, 10)
        self.baseline = Average(10, 10)
        self.throughputs = Correlation(50, 10)
        self.times = Correlation(50, 10)
        self.next_update = 0

    def sample(self, now: int, rtt: int, in_flight: int, dropped: bool) -> None:
        if not dropped:
            self.samples.append(rtt)
            self.peak = max(self.peak, in_flight)
        if now > self.next_update and len(self.samples) >= 50:
            self.samples.sort()
            least, p90 = self.samples[0], self.samples[ceil(0.9 * len(self.samples)) - 1]
            self.median.append(p90)
            filtered = sorted(self.median)[2] if len(self.median) == 5 else p90
            self.update(self.recent.add(filtered), self.peak)
            self.samples.clear()
            self.peak = 0
            self.next_update = now + min(max(2 * least, S), 30 * S)

    def update(self, recent: float, in_flight: int) -> None:
        """Move the limit after a window."""
        baseline = self.baseline.add(recent)
        queue = ceil(self.limit * (1 - baseline / recent))
        throughput, variation = self.throughputs.add(in_flight, in_flight / (recent / S))
        times, _ = self.times.add(in_flight, recent)
        step = 2 if self.limit >= 100 else 1
        full = self.in_flight >= int(self.limit)
        limit = self.limit + step * self.direction(queue, step, full, throughput, variation, times)
        if limit > in_flight * 5:
            limit = self.limit - step
        self.limit = max(1.0, min(200.0, limit))

    @staticmethod
    def direction(queue: int, step: int, full: bool, throughput: float, variation: float, times: float) -> int:
        """1 to raise the limit, -1 to lower it, 0 to hold it."""
        if queue > 6 * step:
            return -1
        if full and (throughput < 0 or (throughput < 0.3 and times > 0.5) or (variation < 0.2 and times > 0.5)):
            return -1
        return 1 if queue < 3 * step else 0


class Kratos(ConcurrencyLimit):
    """The BBR of go-kratos: while the processor is busy, at most what passed at best within the least time.

    Buckets of 100 ms over 10 s. ``most = most passed in a bucket * least mean time of a bucket in ms * 10 / 1000``;
    refused is what finds more than that in flight while the smoothed use of the processor is at least 80 %, or was
    within the second since the first refusal. The use is read every 500 ms and smoothed with .95. Source: go-kratos
    aegis, ratelimit/bbr/bbr.go.
    """

    name = "bbr"
    BUCKET_NS = 100 * MS
    BUCKETS = 100
    READ_NS = 500 * MS

    def reset(self, capacity_hint: float) -> None:
        self.usage = 0
        self.idle = self.read_at = 0
        self.first_refusal = 0
        self.buckets: deque[list[int]] = deque()  # [number, passed, milliseconds]
        self.cached_at = -1
        self.cached = 0

    def read(self, now: int) -> None:
        """Read the use of the processor, in thousandths, as often as its thread would have since the last time."""
        times, idle = (now - self.read_at) // self.READ_NS, self.loop.idle_ns
        if times:
            used = 1000 - (idle - self.idle) * 1000 // (now - self.read_at)
            for _ in range(times):
                self.usage = int(self.usage * 0.95 + used * 0.05)
            self.idle, self.read_at = idle, self.read_at + times * self.READ_NS

    def most(self) -> int:
        """How many may be in flight, from the full buckets; found once in a bucket's time."""
        number = self.loop.now // self.BUCKET_NS
        if number != self.cached_at:
            self.cached_at = number
            while self.buckets and self.buckets[0][0] <= number - self.BUCKETS:
                self.buckets.popleft()
            full = [bucket for bucket in self.buckets if bucket[0] < number]
            passed = max((bucket[1] for bucket in full), default=1)
            least = ceil(min((bucket[2] / bucket[1] for bucket in full), default=1.0))
            self.cached = self.update(passed, least)
        return self.cached

    @staticmethod
    def update(passed: int, least: int) -> int:
        """The limit, from the most that passed in a bucket and the least time in milliseconds."""
        return floor(max(1, passed) * max(1, least) * 10 / 1000 + 0.5)

    def arrive(self, request: Request) -> bool | None:
        now = self.loop.now
        self.read(now)
        over = self.in_flight > 1 and self.in_flight > self.most()
        if self.usage < 800:
            if self.first_refusal and now - self.first_refusal > S:
                self.first_refusal = 0
            refused = over and self.first_refusal > 0
        else:
            refused = over
            if over and not self.first_refusal:
                self.first_refusal = now
        if refused:
            return False
        self.in_flight += 1
        return True

    def finish(self, request: Request, outcome: str) -> None:
        now = self.loop.now
        number = now // self.BUCKET_NS
        if not self.buckets or self.buckets[-1][0] != number:
            self.buckets.append([number, 0, 0])
        self.buckets[-1][1] += 1
        self.buckets[-1][2] += (now - request.seen_ns) // MS
        self.in_flight -= 1

    def stats(self) -> dict[str, float]:
        return {"limit": self.most(), "in_flight": self.in_flight, "usage": self.usage / 1000}


class TooBusy(ConcurrencyLimit):
    """node-toobusy: a share of what comes is refused that grows with the smoothed lag of the loop.

    Every 500 ms ``lag = lag / 3 + 2/3 of the last``; refused with probability (lag - 70 ms) / 70 ms. Source:
    STRML/node-toobusy, toobusy.js.
    """

    name = "toobusy"
    HIGH_NS = 70 * MS
    INTERVAL_NS = 500 * MS

    def reset(self, capacity_hint: float) -> None:
        self.lag = 0.0
        self.last = 0
        self.loop.call_later(self.INTERVAL_NS / S, self.beat)

    def beat(self) -> None:
        """The timer has fired."""
        self.update(max(0, self.loop.now - self.last - self.INTERVAL_NS))
        self.last = self.loop.now
        self.loop.call_later(self.INTERVAL_NS / S, self.beat)

    def update(self, lag: int) -> None:
        """Smooth a new sample of the lag."""
        self.lag = lag / 3 + self.lag * 2 / 3

    def arrive(self, request: Request) -> bool | None:
        if self.lag > self.HIGH_NS and self.random.random() < (self.lag - self.HIGH_NS) / self.HIGH_NS:
            return False
        self.in_flight += 1
        return True

    def stats(self) -> dict[str, float]:
        return {"lag": self.lag / MS, "in_flight": self.in_flight}


class LoopLag(ConcurrencyLimit):
    """Additive increase, multiplicative decrease on the lag of the event loop: Seawall's global limit on its own.

    A heartbeat every 10 ms while requests are in flight; its lag is how late it came. ``m`` is the 25th percentile of
    the lags of a window of 100 ms. Above the target T = 10 ms::

        L = max(2, min(L, peak + 1) * max(0.7, 1 - 0.4(m - T) / T))

    else, if the peak of in-flight reached half of L: ``L += max(1, log2(L) * (1 - m / T))``. Cold start: 20, doubled
    per window while the peak reaches L and m < T / 4, until the first congestion; at most 1000. Source: overload.md.
    """

    name = "lag-aimd"
    PERIOD_NS = 10 * MS
    WINDOW_NS = 100 * MS
    TARGET_NS = 10 * MS

    def reset(self, capacity_hint: float) -> None:
        self.peak = 0
        self.starting = True
        self.lags: list[int] = []
        self.due = 0
        self.window_end = self.WINDOW_NS
        self.beating = False

    def arrive(self, request: Request) -> bool | None:
        if self.in_flight >= int(self.limit):
            return False
        self.in_flight += 1
        if self.in_flight > self.peak:
            self.peak = self.in_flight
        if not self.beating:
            self.beat_later()
        return True

    def finish(self, request: Request, outcome: str) -> None:
        self.in_flight -= 1

    def beat_later(self) -> None:
        """Set the next heartbeat."""
        self.beating = True
        self.due = self.loop.now + self.PERIOD_NS
        self.loop.call_later(self.PERIOD_NS / S, self.beat)

    def beat(self) -> None:
        """The timer has fired."""
        now = self.loop.now
        self.lags.append(now - self.due)
        if now >= self.window_end:
            self.lags.sort()
            self.update(self.lags[len(self.lags) // 4])
            self.lags.clear()
            self.peak = self.in_flight
            self.window_end = now + self.WINDOW_NS
        self.beating = False
        if self.in_flight:
            self.beat_later()

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


LAWS: dict[str, Callable[[], ConcurrencyLimit]] = {
    law.name: law for law in (Nothing, Fixed, Gradient2, Vegas, Envoy, Failsafe, Kratos, TooBusy, LoopLag)
}
