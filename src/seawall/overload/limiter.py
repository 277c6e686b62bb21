"""The turnstile: who is let in now, who waits, who is refused; one per event loop.

Every function here is synchronous, takes the time as an argument and returns what to do, so nothing needs a lock. The
shell awaits what waits; ``wake`` of a `Claim` tells it when that is over.

A request is asked about twice. `screen` comes before anything is spent for it: may it be refused at once? `enter` comes
last: is there room, may it wait? In between a backend may have been asked. `release` ends it, whatever became of it.

**Two ways to be out of room.** In-flight requests at the limit are one. The other is time: a handler that never awaits
runs from start to end in the step that admits it, so at every arrival nothing is in flight, and a limit of requests
sees nothing. What sees it is the loop's *pass*: the first request of an iteration notes the instant and books a
callback for the next one; once handlers have used up the pass (half of the lag target), or the last one was long (twice
the target), later requests wait in the queue, whose grants count as in flight, and the limit holds again. 0.3 us, no
timer.

**Grants** are given one at a time, by each ending request, pass and beat: a burst of grants would be the overload that
it comes from (CockroachDB's grant chains).

**The heartbeat** is a timer every 10 ms while there is something in flight or waiting: how late it is is the lag.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from math import log
from typing import Any, Literal, Protocol, TypeAlias, final

from seawall.decision import Clock, Outcome
from seawall.overload.laws import (
    AimdLaw,
    FixedLimit,
    Gradient2Law,
    LagLaw,
    LatencyLaw,
    Limit,
    Window,
    geometric_mean,
)
from seawall.overload.queue import DONE, GRANTED, RUNNING, WAITING, Claim, Usage, WaitingLine
from seawall.overload.retry import RetryAfter
from seawall.overload.thresholds import Thresholds

Algorithm: TypeAlias = Literal["adaptive", "gradient2", "aimd", "fixed"]
Reason: TypeAlias = str

MILLISECOND = 1_000_000
BEAT_NS = 10 * MILLISECOND
WINDOW_NS = 100 * MILLISECOND
GROUP_WINDOW_NS = 300 * MILLISECOND
CALM_NS = 5_000 * MILLISECOND
STANDING_NS = 50 * MILLISECOND
PATIENCE_NS = STANDING_NS
"""How long a request waits at most where its class does not say; who waits for longer makes a queue stand."""
LEAST_LAGS = 2
"""Samples of the lag without which a window goes on: one long call must not look like overload."""
MOST_GROUPS = 64
MOST_WAITING = 128
LEAST_WAITING = 8
LEAST_GROUP = 4
BEST_FADES = 0.999
"""By how much the most that was admitted in a window is forgotten with each: half in a minute."""

ADMITTED: Reason = ""
WAITS: Reason = "waits"
OVERLOAD: Reason = "overload"
QUEUE_FULL: Reason = "queue_full"
QUEUE_TIMEOUT: Reason = "queue_timeout"
EXPIRED: Reason = "expired"


class Timers(Protocol):
    """What the limiter needs of an event loop."""

    def call_soon(self, callback: Callable[..., Any], *args: Any) -> Any: ...
    def call_later(self, delay: float, callback: Callable[..., Any], *args: Any) -> Any: ...


@final
@dataclass(frozen=True, slots=True)
class Class:
    """One class of requests. ``timeout_ns`` is how long it may wait, ``min_share`` (0..1) what it gets in any case."""

    name: str
    timeout_ns: int | None = None
    min_share: float = 0.0


@final
@dataclass(frozen=True, slots=True)
class Settings:
    """``groups`` is how many rules there are, ``fair`` whether owners are told apart."""

    algorithm: Algorithm = "adaptive"
    initial: int = 20
    least: int = 2
    most: int = 1000
    target_ns: int = 10 * MILLISECOND
    classes: tuple[Class, ...] = (Class("normal"),)
    groups: int = 1
    fair: bool = True


@final
class Group:
    """Requests of one rule: how many are in flight, and how long they take."""

    __slots__ = ("dropped", "in_flight", "law", "limit", "log_sum", "peak", "samples", "seen")

    def __init__(self, law: Limit | None, limit: int) -> None:
        self.law = law
        self.limit = limit
        self.in_flight = 0
        self.clear()

    def clear(self) -> None:
        self.peak = self.in_flight
        self.samples = self.dropped = self.seen = 0
        self.log_sum = 0.0

    @staticmethod
    def together(groups: Sequence[Group]) -> Window:
        """The window of all requests, whatever rule they are on."""
        whole = Group(None, 0)
        for group in groups:
            whole.samples += group.samples
            whole.seen += group.seen
            whole.dropped += group.dropped
            whole.log_sum += group.log_sum
        window = whole.window()
        window.peak = sum(group.peak for group in groups)
        return window

    def window(self, duration: int = GROUP_WINDOW_NS) -> Window:
        samples = self.samples
        return Window(
            duration=duration,
            peak=self.peak,
            in_flight=self.seen / samples if samples else 0.0,
            samples=samples,
            latency=geometric_mean(self.log_sum, samples),
            dropped=self.dropped,
        )


@final
class Load:
    """Demand by capacity, smoothed over five seconds: what an autoscaler should follow.

    Of each window the larger of the processor time per second (of one core, which is all an event loop has) and what
    is taken of a limit, times ``arrivals / admitted``: at twice the capacity 2, so that twice as many instances are
    right. It falls while nobody comes.
    """

    __slots__ = ("_at", "_processor", "_ratio", "_used")

    SMOOTHED_NS = 5_000 * MILLISECOND

    def __init__(self, processor: Clock | None, now: int) -> None:
        self._processor = processor
        self._used = processor() if processor is not None else 0
        self._at = now
        self._ratio = 0.0

    def add(self, now: int, in_use: float, arrivals: int, admitted: int) -> None:
        self._ratio = self._after(now, in_use) if arrivals <= admitted else self._after(now, in_use, arrivals, admitted)
        self._at = now
        if self._processor is not None:
            self._used = self._processor()

    def ratio(self, now: int) -> float:
        """As of ``now``, also where no window has ended for long."""
        return self._after(now, 0.0)

    def _after(self, now: int, in_use: float, arrivals: int = 1, admitted: int = 1) -> float:
        passed = now - self._at
        if passed <= 0:
            return self._ratio
        busy = (self._processor() - self._used) / passed if self._processor is not None else 0.0
        value = max(min(busy, 1.0), in_use) * arrivals / max(admitted, 1)
        return self._ratio + (value - self._ratio) * min(1.0, passed / self.SMOOTHED_NS)


@final
class Limiter:
    """Admits requests up to a limit that a law finds.

    ``timers`` is the event loop, ``None`` where there is none: then nothing can wait, and nothing is measured.
    ``changed`` is called with the reason of each change of a limit, ``waited`` with the class of each request that has
    waited, the nanoseconds and what became of it. ``processor`` is the nanoseconds of processor time that the process
    has used.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        clock: Clock,
        timers: Timers | None,
        changed: Callable[[str], None] | None = None,
        waited: Callable[[int, int, str], None] | None = None,
        processor: Clock | None = None,
    ) -> None:
        self.settings = settings
        self.timers = timers
        self._clock = clock
        self._load = Load(processor, clock())
        self._changed = changed
        self._waited = waited
        self.law = _law(settings)
        self.limit = int(self.law.limit)
        self.in_flight = 0
        self.groups: list[Group] = []
        self.usage = Usage()
        self._set_classes(settings)
        self._set_times(settings)
        self._set_groups(settings)
        self._pass_start = -1
        self._pass_booked = False
        self._last_pass = 0
        self._beat: Any = None
        self._beat_due = 0
        self._lags: list[int] = []
        self._loop_bound = False
        self._late = self._beats = 0
        self.lag = 0
        self._window_start = clock()
        self._groups_start = self._second_start = self._window_start
        self._peak = 0
        self._arrivals = self._admitted = self._crowded = 0
        self._best = self._usual = 0.0
        self._calm = True
        self._crowded_at = 0
        self.refused = 0

    def _set_classes(self, settings: Settings) -> None:
        classes = len(settings.classes)
        self.line = WaitingLine(classes, self.usage, fair=settings.fair)
        self.thresholds = Thresholds(classes)
        self.retry = [RetryAfter() for _ in settings.classes]
        self._credits = [0.0] * classes
        self._first = 0 if classes > 1 else -1
        self._last = classes - 1

    def _set_times(self, settings: Settings) -> None:
        target = settings.target_ns
        self._shares = [one.min_share for one in settings.classes]
        self._shared = any(self._shares)
        self.patience = [
            one.timeout_ns or (30 * target if klass == self._first else PATIENCE_NS)
            for klass, one in enumerate(settings.classes)
        ]
        # A limit that somebody has fixed is the only one that holds.
        gated = settings.algorithm != "fixed" and self.timers is not None
        self._budget = target // 2 if gated else 1 << 62
        self._long_pass = 2 * target if gated else 1 << 62
        self._standing_patience = 3 * target

    def _set_groups(self, settings: Settings) -> None:
        while len(self.groups) < min(settings.groups, MOST_GROUPS):
            self.groups.append(Group(*_group_law(settings)))

    def change(
        self,
        settings: Settings,
        changed: Callable[[str], None] | None = None,
        waited: Callable[[int, int, str], None] | None = None,
        others: Iterable[int] = (),
    ) -> None:
        """Go on by other settings: what is in flight and what waits stays, and so does the limit within its bounds.

        Groups keep their positions; there may be more of them, never fewer. At ``others`` are other rules than before,
        of which nothing is known yet. Requests of a class that there is no more are of the last one.
        """
        before, self.settings = self.settings, settings
        self._changed, self._waited = changed, waited
        if _bounds(settings) != _bounds(before):
            self.law = _law(settings if settings.algorithm == "fixed" else replace(settings, initial=self.limit))
            self.limit = max(int(self.law.limit), 1)
            for group in self.groups:
                group.law, group.limit = _group_law(settings)
        names = [one.name for one in settings.classes]
        if names != [one.name for one in before.classes] or settings.fair != before.fair:
            waiters, now = list(self.line), self._clock()
            self._set_classes(settings)
            for claim in waiters:
                name = before.classes[claim.klass].name
                claim.klass = names.index(name) if name in names else len(names) - 1
                self.line.add(claim, now)
        self._set_times(settings)
        for at in others:
            if at < len(self.groups):
                group = self.groups[at]
                group.law, group.limit = _group_law(settings)
                group.clear()
        self._set_groups(settings)

    def __repr__(self) -> str:
        return (
            f"<Limiter {self.in_flight}/{self.limit} in flight, {len(self.line)} waiting, "
            f"{self.settings.algorithm}, {self.thresholds!r}>"
        )

    # Asked by the shell

    def screen(self, claim: Claim, now: int) -> Reason:
        """Whether ``claim`` is to be refused before anything is done for it: the reason, or ``ADMITTED``."""
        self._arrivals += 1
        self._wind_up(now)
        group = self.groups[claim.group]
        if group.in_flight >= group.limit:
            return self._refuse(claim, OVERLOAD, now)
        if self._calm:
            return ADMITTED
        return self._screen(claim, now)

    def _screen(self, claim: Claim, now: int) -> Reason:
        klass = self._place(claim)
        # A threshold is what was too much in the last window; where there is room now, it is not.
        if not self.thresholds.ask(klass, claim.owner) and self._credits[klass] < 1 and not self._has_room(now):
            return self._refuse(claim, OVERLOAD, now)
        if len(self.line) >= self._most_waiting(claim.klass) and not self._displaces(claim):
            self._crowded += 1
            return self._refuse(claim, QUEUE_FULL, now)
        return ADMITTED

    def _has_room(self, now: int) -> bool:
        """Whether one more may begin at once."""
        return (
            self.in_flight < self.limit
            and (self._calm or not self.line)
            and (now - self._pass_start < self._budget or not self._pass_booked)
            and self._last_pass < self._long_pass
        )

    def enter(self, claim: Claim, now: int) -> Reason:
        """Let ``claim`` in (``ADMITTED``), or have it wait (``WAITS``); otherwise the reason to refuse it."""
        if claim.deadline and now >= claim.deadline:
            return EXPIRED
        group = self.groups[claim.group]
        if self._has_room(now) and group.in_flight < group.limit:
            claim.since = now
            claim.state = RUNNING
            self._admit(claim, group)
            if self._beat is None:
                self._start_beat(now)  # a backend was asked for longer than the last one took
            return ADMITTED
        return self._wait(claim, group, now)

    def _wait(self, claim: Claim, group: Group, now: int) -> Reason:
        if self.in_flight >= self._peak:
            self._peak = self.in_flight + 1  # somebody was turned away from it: the limit is in use
        if group.in_flight >= group.limit:
            return self._refuse(claim, OVERLOAD, now)
        if self.timers is None:
            return self._refuse(claim, QUEUE_FULL, now)
        self._place(claim)
        self._calm = False
        self._crowded_at = now
        line = self.line
        if len(line) >= self._most_waiting(claim.klass):
            self._crowded += 1
            if not self._displaces(claim):
                return self._refuse(claim, QUEUE_FULL, now)
            worst = line.worst()
            line.remove(worst)
            self._turn_away(worst, QUEUE_FULL, now)
        claim.since = now
        claim.state = WAITING
        line.add(claim, now)
        self._wind_up(now)
        return WAITS

    def force(self, claim: Claim, now: int) -> Reason:
        """Let ``claim`` in whatever the limit is, for who only watches; the reason for which it would be refused."""
        group = self.groups[claim.group]
        crowded = self.in_flight >= self.limit + self._most_waiting(claim.klass)
        claim.since = now
        claim.state = RUNNING
        self._admit(claim, group)
        return self._refuse(claim, QUEUE_FULL, now) if crowded else ADMITTED

    def start(self, claim: Claim, now: int) -> Reason:
        """A waiter that was let in begins, and passes on what room is left. ``EXPIRED`` if it came too late by then."""
        if claim.deadline and now >= claim.deadline:
            self.release(claim, Outcome.IGNORED, now)
            return EXPIRED
        claim.state = RUNNING
        claim.since = now
        if self.line:
            self._grant(now)
        return ADMITTED

    def release(self, claim: Claim, outcome: Outcome, now: int) -> None:
        """Give back what ``claim`` holds, or stop it waiting. Safe twice, and in any state."""
        state = claim.state
        claim.state = DONE
        if state == WAITING:
            self.line.remove(claim)
            if self._waited is not None:
                self._waited(claim.klass, now - claim.since, "cancelled")
            return
        if state == DONE:
            return
        self.in_flight -= 1
        group = self.groups[claim.group]
        if state == RUNNING:
            if outcome is Outcome.SUCCESS:
                group.samples += 1
                group.seen += group.in_flight
                group.log_sum += log(now - claim.since + 1)
            elif outcome is Outcome.DROPPED:
                group.dropped += 1
        group.in_flight -= 1
        if not self._calm and self.line:
            self._grant(now)

    def announce(self, klass: int, random: Callable[[], float]) -> int:
        """Seconds after which a refused request of a class may come back."""
        return self.retry[min(klass, self._last)].draw(random)

    # The queue

    def _place(self, claim: Claim) -> int:
        """Its class: the last one where it came under settings that had more, and was asked elsewhere since."""
        if claim.klass > self._last:
            claim.klass = self._last
        return claim.klass

    def _most_waiting(self, klass: int) -> int:
        """How long the line may be for one more of a class. For the first of several it is time alone that counts."""
        if klass == self._first:
            return MOST_WAITING
        return min(max(LEAST_WAITING, 2 * self.limit), MOST_WAITING)

    def _displaces(self, claim: Claim) -> bool:
        """Whether ``claim`` is worth more than the worst that waits."""
        worst = self.line.worst()
        if claim.klass != worst.klass:
            return claim.klass < worst.klass or self._credits[claim.klass] >= 1
        used = self.usage.of
        return self.settings.fair and used(claim.owner) < used(worst.owner)

    def _stands(self, klass: int, now: int) -> bool:
        return now - self.line.since[klass] > STANDING_NS

    def _grant(self, now: int) -> None:
        """Let one waiter in, if there is room; refuse those that it comes too late for."""
        line = self.line
        while self.in_flight < self.limit and line:
            klass = self._next_class()
            claim = line.take(klass, newest=self._stands(klass, now))
            group = self.groups[claim.group]
            reason = self._too_late(claim, now) or (OVERLOAD if group.in_flight >= group.limit else "")
            if reason:
                self._turn_away(claim, reason, now)
                continue
            claim.state = GRANTED
            self._admit(claim, group)
            if self._waited is not None:
                self._waited(klass, now - claim.since, "admitted")
            claim.wake(ADMITTED)
            return

    def _next_class(self) -> int:
        """The highest class that waits, unless a lower one has not had its share."""
        lengths = [self.line.length(klass) for klass in range(len(self._credits))]
        if self._shared:
            for klass in range(len(lengths) - 1, 0, -1):
                if lengths[klass] and self._credits[klass] >= 1:
                    return klass
        return next(klass for klass, length in enumerate(lengths) if length)

    def _too_late(self, claim: Claim, now: int) -> Reason:
        """Why a waiter has waited long enough, or ``""``."""
        if claim.deadline and now >= claim.deadline:
            return EXPIRED
        return QUEUE_TIMEOUT if now - claim.since > self._allowed(claim, now) else ""

    def _allowed(self, claim: Claim, now: int) -> int:
        """How long a waiter may wait."""
        klass = claim.klass
        patience = self.patience[klass]
        if klass == self._first:
            if claim.deadline:
                patience = min(patience, (claim.deadline - claim.since) // 4)
        elif self._stands(klass, now) and self.settings.classes[klass].timeout_ns is None:
            patience = min(patience, self._standing_patience)
        return patience

    def _sweep(self, now: int) -> None:
        """Refuse who has waited long enough."""
        late = [(claim, reason) for claim in self.line if (reason := self._too_late(claim, now))]
        for claim, reason in late:
            self.line.remove(claim)
            self._turn_away(claim, reason, now)

    def _turn_away(self, claim: Claim, reason: Reason, now: int) -> None:
        """Refuse one that waited."""
        claim.state = DONE
        self._crowded += reason is QUEUE_TIMEOUT
        self._refuse(claim, reason, now)
        if self._waited is not None:
            self._waited(claim.klass, now - claim.since, reason)
        claim.wake(reason)

    def _refuse(self, claim: Claim, reason: Reason, now: int) -> Reason:
        self.refused += 1
        self._crowded_at = now
        self._calm = False
        self.retry[self._place(claim)].refused += 1
        return reason

    def _admit(self, claim: Claim, group: Group) -> None:
        self._admitted += 1
        self.in_flight += 1
        if self.in_flight > self._peak:
            self._peak = self.in_flight
        group.in_flight += 1
        if group.in_flight > group.peak:
            group.peak = group.in_flight
        if self._calm:
            return
        if self.settings.fair:
            self.usage.add(claim.owner)
        if self._shared:
            credits_, shares = self._credits, self._shares
            for klass, share in enumerate(shares):
                if share:
                    credits_[klass] = min(credits_[klass] + share, 2.0)
            klass = self._place(claim)
            credits_[klass] = max(credits_[klass] - 1, 0.0)

    # The loop

    def _wind_up(self, now: int) -> None:
        """Have this pass end and the heart beat: there is somebody to do it for."""
        if self.timers is None:
            return
        if not self._pass_booked:
            self._book_pass(self.timers, now)
        if self._beat is None:
            self._start_beat(now)

    def _book_pass(self, timers: Timers, now: int) -> None:
        self._pass_booked = True
        self._pass_start = now
        timers.call_soon(self._end_pass)

    def _end_pass(self) -> None:
        now = self._clock()
        self._last_pass = now - self._pass_start
        self._pass_start = now
        self._pass_booked = False
        if self._calm or not self.line:
            return
        self._grant(now)
        if self.timers is not None and self.line and self.in_flight < self.limit:
            self._book_pass(self.timers, now)

    def _start_beat(self, now: int) -> None:
        if now - self._window_start > CALM_NS and not self.in_flight and not self.line:
            self._forget(now)
        self._beat_due = now + BEAT_NS
        if self.timers is not None:
            self._beat = self.timers.call_later(BEAT_NS / 1e9, self._on_beat)

    def _forget(self, now: int) -> None:
        """Nothing has happened for so long that what was measured says nothing any more."""
        self._calm_down()
        self._lags.clear()
        self._window_start = self._groups_start = self._second_start = now
        self._arrivals = self._admitted = self._crowded = 0
        self._last_pass = self.lag = 0
        self._best = 0.0
        self._peak = self.in_flight
        for group in self.groups:
            group.clear()

    def _calm_down(self) -> None:
        """There was no overload for so long that nothing is held against anybody."""
        self._calm = True
        self.thresholds.open()
        self.usage.clear()
        self._credits = [0.0] * len(self._credits)
        for retry in self.retry:
            retry.clear()

    def _on_beat(self) -> None:
        now = self._clock()
        lag = max(0, now - self._beat_due)
        self._beat = None
        if self.in_flight or self.line:
            self._start_beat(now)  # first, so that no error here is the last beat
        self._lags.append(lag)
        if now - self._window_start >= WINDOW_NS and len(self._lags) >= LEAST_LAGS:
            self._tick(now)
        if self.line:
            self._sweep(now)
            self._grant(now)

    def _tick(self, now: int) -> None:
        """A window has ended."""
        seconds = (now - self._window_start) / 1e9
        rate = self._admitted / seconds
        self._best = max(rate, self._best * BEST_FADES)
        lags = sorted(self._lags)
        late = sum(lags)
        self._late += late
        self._beats += len(lags)
        self._loop_bound = late * 2 > self.settings.target_ns * len(lags)
        self.lag = lags[len(lags) // 2] if len(lags) > 3 else lags[0]
        self._lags.clear()
        window = Window(lag=self.lag, worst=lags[-1], peak=self._peak, needed=self._best * self._usual / 1e9)
        if self.settings.algorithm == "aimd":
            window.dropped = sum(group.dropped for group in self.groups)
        if self.settings.algorithm != "gradient2" and self.law.observe(window):
            self._apply()
        if now - self._groups_start >= GROUP_WINDOW_NS:
            self._observe_groups(now - self._groups_start)
            self._groups_start = now
        if not self._calm:
            self.usage.tick()
            standing = any(
                self.line.length(klass) and self._stands(klass, now) for klass in range(len(self.settings.classes))
            )
            self.thresholds.tick(
                seconds,
                admitted=rate,
                best=self._best,
                overloaded=self._crowded > 0 or standing,
            )
            if now - self._second_start >= 10 * WINDOW_NS:
                self._second_start = now
                for retry in self.retry:
                    retry.tick()
            if now - self._crowded_at > CALM_NS and not self.line:
                self._calm_down()
        self._load.add(now, self._in_use(), self._arrivals, self._admitted)
        self._peak = self.in_flight
        self._arrivals = self._admitted = self._crowded = 0
        self._window_start = now

    def _in_use(self) -> float:
        """The share that is taken of what is limited by a number, 0..1."""
        if self.settings.algorithm != "adaptive":
            return min(1.0, self._peak / self.limit)
        # What grows as soon as it is used up says nothing; what congestion has closed does.
        closed = [group.peak / group.limit for group in self.groups if group.limit < self.settings.most]
        return min(1.0, max(closed, default=0.0))

    def _observe_groups(self, passed: int) -> None:
        # Requests wait for the loop several times, so where it lags their latency says nothing of what is behind it:
        # not over all of the time that they were measured in, and not at its end.
        frozen = self._loop_bound or self._late * 2 > self.settings.target_ns * self._beats
        self._late = self._beats = 0
        whole = Group.together(self.groups)
        if self._calm and whole.samples >= LatencyLaw.SAMPLES:
            self._usual += (whole.latency - self._usual) / (10 if self._usual else 1)
        if self.settings.algorithm == "gradient2" and self.law.observe(whole):
            self._apply()
        for group in self.groups:
            if group.law is not None and not frozen and group.law.observe(group.window(passed)):
                group.limit = max(int(group.law.limit), 1)
                if self._changed is not None:
                    self._changed(group.law.reason)
            group.clear()

    def _apply(self) -> None:
        self.limit = max(int(self.law.limit), 1)
        if self._changed is not None:
            self._changed(self.law.reason)

    def statistics(self) -> dict[str, Any]:
        """What the limiter holds now; times in seconds."""
        return {
            "limit": self.limit,
            "reason": self.law.reason,
            "in_flight": self.in_flight,
            "waiting": {one.name: self.line.length(klass) for klass, one in enumerate(self.settings.classes)},
            "lag": self.lag / 1e9,
            "utilization": self._load.ratio(self._clock()),
            "shed_from": self.thresholds.klass,
            "refused": self.refused,
        }


def _bounds(settings: Settings) -> tuple[object, ...]:
    """What a law is made of; where it starts only where it stays there."""
    fixed = settings.initial if settings.algorithm == "fixed" else None
    return settings.algorithm, fixed, settings.least, settings.most, settings.target_ns


def _law(settings: Settings) -> Limit:
    bounds = (settings.initial, settings.least, settings.most)
    match settings.algorithm:
        case "adaptive":
            return LagLaw(*bounds, settings.target_ns)
        case "aimd":
            return AimdLaw(*bounds, settings.target_ns)
        case "gradient2":
            return Gradient2Law(*bounds)
        case "fixed":
            return FixedLimit(settings.initial, 1, max(settings.initial, settings.most))


def _group_law(settings: Settings) -> tuple[Limit | None, int]:
    if settings.algorithm == "adaptive":
        return LatencyLaw(min(LEAST_GROUP, settings.most), settings.most), settings.most
    return None, 1 << 30
