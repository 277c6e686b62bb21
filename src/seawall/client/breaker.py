"""A circuit breaker that closes by degrees.

It opens when at least half of at least twenty calls within ten seconds have failed, or have been slow where it was told
what slow is. After a pause a share of the calls is let through again, a twentieth at first and all of them ten seconds
later: a server that comes back is not met by everybody at once, and what one lucky probe says decides nothing. If half
of what is let through fails, it opens again and the pause is twice as long, up to a minute. So it is if it opens before
it has been closed for as long as the pause was; after that, the pause is short again.

A pure state machine: time is an argument, and the share is counted and not drawn.
"""

from __future__ import annotations

from enum import Enum
from math import inf
from typing import final

from seawall.client.window import Window

SECOND = 1_000_000_000
SLICES = 10
_MADE, _FAILED, _SLOW = 0, 1, 2
_EVER = -(1 << 63)


class State(Enum):
    """Whether calls are let through: all, none, or a share that grows."""

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
        "_first_pause",
        "_longest_pause",
        "_made",
        "_ramp",
        "_since",
        "_slow",
        "_window",
        "calls",
        "failures",
        "pause",
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
        if not all(0 < seconds < inf for seconds in (window, pause, ramp, 1.0 if slow is None else slow)):
            raise ValueError("window, pause, ramp and slow are more than 0 seconds, and not for ever")
        if not pause <= longest_pause < inf:
            raise ValueError("longest_pause is not shorter than pause, and not for ever")
        self.failures = failures
        self.calls = calls
        self.slow_calls = slow_calls
        self.state = State.CLOSED
        self.pause = self._first_pause = int(pause * SECOND)
        self._longest_pause = int(longest_pause * SECOND)
        self._ramp = int(ramp * SECOND)
        self._slow = None if slow is None else int(slow * SECOND)
        self._window = Window(int(window * SECOND), SLICES, 3)
        self._since = _EVER
        self._credit = 0.0
        self._made = self._failed = 0

    def __repr__(self) -> str:
        return f"<CircuitBreaker {self.state.value}>"

    def admit(self, now: int) -> bool:
        """Whether to make one more call. Whoever may says how it ended (`record`), or that it was not made (`forget`);
        of calls of which neither is ever said, nothing follows."""
        if self.state is State.CLOSED:
            return True
        if self.state is State.OPEN:
            if now < self._since + self.pause:
                return False
            # From this call on, and not from the end of the pause: nobody has called in between.
            self.state, self._since = State.RAMPING, now
            self._made = self._failed = 0
            self._credit = 1.0
        share = self.FIRST_SHARE + (1 - self.FIRST_SHARE) * (now - self._since) / self._ramp
        if share >= 1:
            return True
        self._credit += share
        # Twenty additions of a twentieth are a little less than one.
        if self._credit < 1 - 1e-9:
            return False
        self._credit -= 1
        return True

    def retry_after(self, now: int) -> float:
        """Seconds until the next call has a chance."""
        return max(0, self._since + self.pause - now) / SECOND if self.state is State.OPEN else 0.0

    def record(self, now: int, *, failed: bool, took: int = 0) -> bool:
        """A call has ended after ``took``. Whether that has changed the state.

        What was begun before the state changed says nothing about what came after.
        """
        state = self.state
        if state is State.OPEN or now - took < self._since:
            return False
        slow = self._slow is not None and took >= self._slow
        if state is State.CLOSED:
            window = self._window
            window.add(now, _MADE)
            if failed:
                window.add(now, _FAILED)
            if slow:
                window.add(now, _SLOW)
            made, fails, slows = window.totals
            if made >= self.calls and (fails >= self.failures * made or slows >= self.slow_calls * made):
                self._open(now, longer=now - self._since < self.pause)
            return self.state is not state
        self._made += 1
        self._failed += failed or slow
        has_ended = now >= self._since + self._ramp
        if self._failed >= self.failures * self._made and (has_ended or self._made >= self.RAMP_CALLS):
            self._open(now, longer=True)
        elif has_ended:
            self.state, self._since = State.CLOSED, now
            self._window.clear()
        return self.state is not state

    def forget(self) -> None:
        """A call that was admitted was not made, or told nothing."""
        if self.state is State.RAMPING:
            self._credit = min(1.0, self._credit + 1)

    def _open(self, now: int, *, longer: bool) -> None:
        self.pause = min(self._longest_pause, 2 * self.pause) if longer else self._first_pause
        self.state, self._since = State.OPEN, now
