"""Whether a shared store is asked at all: closed, open, half-open. Time and chance are arguments, timers others'."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypedDict, final

from seawall.decision import Clock


class Standing(TypedDict):
    """``reason`` is the last failure's, ``opened`` how often it opened, ``since`` the instant of the last change."""

    state: Literal["closed", "open", "half-open"]
    reason: str
    opened: int
    since: int


@final
class Breaker:
    """One node's: it opens at the first failure, so that an outage costs a time-out once and not each request.

    While it is open, one probe at a time asks whether the node is back: every ``interval_ns`` nanoseconds times
    0.8..1.2, so that the processes of a fleet do not ask in step. Whoever probes says `fail` or `succeed` sooner
    than that; a probe that has said neither when the next one is due was lost with its event loop, and is replaced.

    ``random`` is from 0 to 1.
    """

    __slots__ = ("_clock", "_due", "_interval", "_opened", "_probing", "_random", "_reason", "_since", "closed")

    def __init__(self, clock: Clock, random: Callable[[], float], *, interval_ns: int = 250_000_000) -> None:
        self.closed = True
        self._clock = clock
        self._random = random
        self._interval = interval_ns
        self._due = 0
        self._probing = False
        self._reason = ""
        self._opened = 0
        self._since = clock()

    def __repr__(self) -> str:
        return f"<Breaker {self.state}{f', last failure: {self._reason}' if self._reason else ''}>"

    @property
    def state(self) -> Literal["closed", "open", "half-open"]:
        """Half-open while a probe is out."""
        return "closed" if self.closed else "half-open" if self._probing else "open"

    def fail(self, reason: str) -> bool:
        """Open, or stay so; whether it was closed.

        Only what opens it and what ends a probe sets the time of the next: calls that were under way when it opened
        and fail one after another do not put it off.
        """
        was_closed = self.closed
        self._reason = reason
        if was_closed or self._probing:
            self._schedule()
        self._probing = self.closed = False
        if was_closed:
            self._opened += 1
            self._since = self._clock()
        return was_closed

    def succeed(self) -> bool:
        """Close; whether it was open."""
        if self.closed:
            return False
        self.closed, self._probing = True, False
        self._since = self._clock()
        return True

    def probe_in(self) -> int:
        """Nanoseconds until the next probe is due, while it is not closed; 0 for now."""
        return max(0, self._due - self._clock())

    def begin_probe(self) -> bool:
        """Whether to send a probe now: it is open, and the next one is due."""
        if self.closed or self._clock() < self._due:
            return False
        self._probing = True
        self._schedule()
        return True

    def _schedule(self) -> None:
        self._due = self._clock() + int(self._interval * (0.8 + 0.4 * self._random()))

    def statistics(self) -> Standing:
        """Where it stands; ``since`` is an instant of its own clock, in nanoseconds."""
        return {"state": self.state, "reason": self._reason, "opened": self._opened, "since": self._since}
