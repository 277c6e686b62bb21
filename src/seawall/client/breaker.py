"""A circuit breaker that closes by degrees.

It opens when at least half of at least twenty calls within ten seconds have failed, or have been slow where it was told
what slow is. After a pause a share of the calls is let through again, a twentieth at first and all of them ten seconds
later: a server that comes back is not met by everybody at once, and what one lucky probe says decides nothing. If half
of what is let through fails, it opens again and the pause is twice as long, up to a minute; once it has closed and
stayed so for as long as the pause was, the pause is short again.

A pure state machine: time is an argument, and the share is counted and not drawn.
"""

from __future__ import annotations

from enum import Enum
from typing import final

SECOND = 1_000_000_000
SLICES = 10


class State(Enum):
    CLOSED = "closed"
    OPEN = "open"
    RAMPING = "ramping"


@final
class CircuitBreaker:
    """The breaker of one host, or of one route on it. Times are monotonic nanoseconds, settings in seconds.

    ``failures`` is the share of failed calls at which it opens (.5), ``slow`` the seconds from which a call counts as
    slow (``None``: none does) and ``slow_calls`` the share of those (.5); ``calls`` is how many there have to be (20)
    within ``window`` (10). ``pause`` is how long it stays open at first (5), ``longest_pause`` at last (60), ``ramp``
    the time from a twentieth to all (10).
    """

    __slots__ = (
        "_credit",
        "_failed",
        "_made",
        "_most_pause",
        "_since",
        "_slice",
        "_slices",
        "_slow_ns",
        "calls",
        "failures",
        "first_pause",
        "pause",
        "ramp",
        "slow_calls",
        "state",
    )

    FIRST_SHARE = 0.05
    RAMP_CALLS = 5
    """Calls on the ramp before half of them say anything."""

    def __init__(
        self,
        *,
        failures: float = 0.5,
        calls: int = 20,
        window: float = 10.0,
        slow: float | None = None,
        slow_calls: float = 0.5,
        pause: float = 5.0,
        longest_pause: float = 60.0,
        ramp: float = 10.0,
    ) -> None:
        if not 0 < failures <= 1 or not 0 < slow_calls <= 1 or calls < 1:
            raise ValueError("failures and slow_calls are above 0 and at most 1, calls is at least 1")
        if min(window, pause, longest_pause, ramp) <= 0 or (slow is not None and slow <= 0):
            raise ValueError("window, pause, longest_pause, ramp and slow are more than 0 seconds")
        self.failures = failures
        self.calls = calls
        self.slow_calls = slow_calls
        self.ramp = int(ramp * SECOND)
        self.first_pause = self.pause = int(pause * SECOND)
        self.state = State.CLOSED
        self._slow_ns = None if slow is None else int(slow * SECOND)
        self._most_pause = int(longest_pause * SECOND)
        self._slice = int(window * SECOND / SLICES)
        self._slices: dict[int, list[int]] = {}
        self._since = 0
        self._credit = 0.0
        self._made = self._failed = 0

    def __repr__(self) -> str:
        return f"<CircuitBreaker {self.state.value}>"

    def share(self, now: int) -> float:
        """The share of calls that is let through, 0 to 1."""
        if self.state is State.CLOSED:
            return 1.0
        passed = now - self._since - (self.pause if self.state is State.OPEN else 0)
        if passed < 0:
            return 0.0
        return min(1.0, self.FIRST_SHARE + (1 - self.FIRST_SHARE) * passed / self.ramp)

    def admit(self, now: int) -> bool:
        """Whether to make one more call; whoever may has to say how it ended (`record`, or `forget`)."""
        if self.state is State.CLOSED:
            return True
        if self.state is State.OPEN:
            if now < self._since + self.pause:
                return False
            self.state, self._since, self._credit = State.RAMPING, self._since + self.pause, 1.0
            self._made = self._failed = 0
            if now >= self._since + self.ramp:
                # Nobody has called for long: one call finds out before all others do.
                self._since = now
        self._credit += self.share(now)
        if self._credit < 1:
            return False
        self._credit -= 1
        return True

    def retry_after(self, now: int) -> float:
        """Seconds until the next call has a chance."""
        return max(0, self._since + self.pause - now) / SECOND if self.state is State.OPEN else 0.0

    def record(self, now: int, *, failed: bool, took: int = 0) -> bool:
        """A call has ended after ``took``. Whether that has changed the state."""
        before = self.state
        slow = self._slow_ns is not None and took >= self._slow_ns
        if before is State.CLOSED:
            self._note(now, failed, slow)
        elif before is State.RAMPING:
            self._made += 1
            self._failed += failed or slow
            if self._made >= self.RAMP_CALLS and self._failed >= self.failures * self._made:
                self._open(now, min(self._most_pause, 2 * self.pause))
            elif now >= self._since + self.ramp:
                self.state, self._since = State.CLOSED, now
                self._slices.clear()
        # What ends while it is open was begun before.
        return self.state is not before

    def forget(self) -> None:
        """A call that was admitted was not made."""
        if self.state is State.RAMPING:
            self._credit = min(1.0, self._credit + 1)

    def _note(self, now: int, failed: bool, slow: bool) -> None:
        if self.pause > self.first_pause and now - self._since >= self.pause:
            self.pause = self.first_pause
        at = now // self._slice
        for old in [slot for slot in self._slices if slot <= at - SLICES]:
            del self._slices[old]
        counts = self._slices.setdefault(at, [0, 0, 0])
        counts[0] += 1
        counts[1] += failed
        counts[2] += slow
        made, fails, slows = (sum(each) for each in zip(*self._slices.values(), strict=True))
        if made >= self.calls and (fails >= self.failures * made or slows >= self.slow_calls * made):
            self._open(now, self.pause)

    def _open(self, now: int, pause: int) -> None:
        self.state, self._since, self.pause = State.OPEN, now, pause
        self._slices.clear()
