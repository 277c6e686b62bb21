"""What is known of one host, and what follows from it for the next request."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, TypeAlias, final

from seawall.client.breaker import SECOND, CircuitBreaker, State
from seawall.client.budget import RetryBudget
from seawall.client.errors import CircuitOpen, ClientError, Throttled, TooManyInFlight
from seawall.client.latency import Latencies
from seawall.client.meters import Meters
from seawall.client.retry import Failure
from seawall.client.spell import Spell
from seawall.client.throttle import AdaptiveThrottle

MOST_ROUTES = 1_000
"""Routes whose circuits are remembered: those that were called last."""

Refused: TypeAlias = tuple[type[ClientError], str, float]
"""What to raise, why, and the seconds until it is worth trying again."""

logger = logging.getLogger("seawall.client")


@final
class Host:
    """One host of one client. ``in_flight`` are its requests of which the answer has not been read. Times are monotonic
    nanoseconds."""

    __slots__ = (
        "__weakref__",
        "_exhausted",
        "_throttled",
        "breakers",
        "budget",
        "in_flight",
        "latencies",
        "meters",
        "name",
        "open_circuits",
        "shown",
        "throttle",
    )

    def __init__(self, name: str, budget: RetryBudget, throttle: AdaptiveThrottle | None) -> None:
        self.name = name
        self.budget = budget
        self.throttle = throttle
        self.breakers: OrderedDict[str, CircuitBreaker] = OrderedDict()
        self.latencies = Latencies()
        self.in_flight = 0
        self.open_circuits = 0
        self.shown = [0, 0]
        self.meters = Meters.of(self)
        self._exhausted = Spell()
        self._throttled = Spell()
        self._show()

    def __repr__(self) -> str:
        return f"<Host {self.name}, {self.in_flight} in flight>"

    def breaker(self, route: str, make: Callable[[], CircuitBreaker]) -> CircuitBreaker:
        """The one of a route, made where there is none."""
        breakers = self.breakers
        breaker = breakers.get(route)
        if breaker is None:
            breaker = breakers[route] = make()
            if len(breakers) > MOST_ROUTES:
                _, forgotten = breakers.popitem(last=False)
                if forgotten.state is not State.CLOSED:
                    self._count_open()
        elif len(breakers) > 1:
            breakers.move_to_end(route)
        return breaker

    def enter(
        self, now: int, breaker: CircuitBreaker | None, most: int | None, random: Callable[[], float]
    ) -> Refused | None:
        """Take a place in flight for one request, or say why there is none. At most ``most`` have one."""
        throttle = self.throttle
        if throttle is not None:
            if not throttle.admit(now, random):
                if self._throttled.seen(now):
                    self._say("throttling", "requests to %s are refused here, for it accepts too few", self.name)
                return Throttled, "it accepts too little of what it is sent", 0.0
            if self._throttled.lasts and not throttle.probability() and self._throttled.unseen(now):
                self._say("throttling_over", "requests to %s are all sent again", self.name)
        if breaker is not None and breaker.state is not State.CLOSED:
            before = breaker.state
            if not breaker.admit(now):
                return CircuitOpen, "its circuit is open", breaker.retry_after(now)
            if breaker.state is not before:
                self._changed(breaker)
        if most is not None and self.in_flight >= most:
            if breaker is not None:
                breaker.forget()
            return TooManyInFlight, f"{most} requests are in flight", 0.0
        self.in_flight += 1
        return None

    def leave(self) -> None:
        """Give a place in flight back."""
        self.in_flight -= 1

    def answered(
        self, now: int, breaker: CircuitBreaker | None, status: int | None, failure: Failure, took: int
    ) -> None:
        """A request was answered ``took`` after it was sent."""
        self.meters.attempt(status)
        if self.throttle is not None:
            self.throttle.record(now, accepted=failure is not Failure.THROTTLED)
        if failure is Failure.NONE:
            self.latencies.add(took)
        # A server that sheds is at work; to shut it off would be the outage that it avoids.
        if breaker is None or failure is Failure.THROTTLED:
            return
        if breaker.record(now, failed=failure is not Failure.NONE, took=took):
            self._changed(breaker)

    def failed(self, now: int, breaker: CircuitBreaker | None, took: int) -> None:
        """A request was sent and not answered, and that is the host's doing. Of what it accepts that says nothing."""
        if breaker is not None and breaker.record(now, failed=True, took=took):
            self._changed(breaker)

    def may_hedge(self, breaker: CircuitBreaker | None, most: int | None) -> int:
        """What a second request beside the first has cost of the budget; 0 where there is to be none."""
        if breaker is not None and breaker.state is not State.CLOSED:
            return 0
        if (self.throttle is not None and self.throttle.probability()) or (most is not None and self.in_flight >= most):
            return 0
        cost = self.budget.withdraw(Failure.TRANSIENT)
        if cost is None:
            return 0
        self.in_flight += 1
        self._show()
        return cost

    def withdraw(self, now: int, failure: Failure) -> int | None:
        """Pay for a retry (`RetryBudget.withdraw`)."""
        cost = self.budget.withdraw(failure)
        if cost is None:
            if self._exhausted.seen(now):
                text = "the retry budget of %s is exhausted, and most failures are final for now"
                self._say("budget_exhausted", text, self.name)
            return None
        if self._exhausted.unseen(now):
            self._say("budget_back", "the retry budget of %s is there again", self.name)
        self._show()
        return cost

    def undo(self, cost: int) -> None:
        """A retry that was paid for was not sent."""
        self.budget.undo(cost)
        self._show()

    def succeeded(self, cost: int) -> None:
        """A request has succeeded; what its retry has cost is given back."""
        budget = self.budget
        if budget.tokens < budget.capacity:
            budget.succeeded(cost)
            self._show()

    def _show(self) -> None:
        self.meters.show(self)

    def _changed(self, breaker: CircuitBreaker) -> None:
        self._count_open()
        route = next((name for name, one in self.breakers.items() if one is breaker), "")
        state = {
            State.CLOSED: "closed",
            State.OPEN: f"open for {breaker.pause / SECOND:g} s",
            State.RAMPING: "closing by degrees",
        }[breaker.state]
        # A route may be a part of the path, which may have line breaks in it.
        shown = route if route.isprintable() else ascii(route)
        where = f"{self.name}, route {shown}," if route else self.name
        self._say(f"circuit_{breaker.state.value}", "the circuit to %s is %s", where, state)

    def _count_open(self) -> None:
        self.open_circuits = sum(one.state is not State.CLOSED for one in self.breakers.values())
        self._show()

    def _say(self, event: str, text: str, *values: str) -> None:
        logger.warning(text, *values, extra={"event": event, "host": self.name})

    def statistics(self, now: int) -> dict[str, Any]:
        """As `ResilientTransport.statistics` gives them."""
        return {
            "in_flight": self.in_flight,
            "retries": round(self.budget.earned, 1),
            "tokens": self.budget.tokens,
            "throttled": 0.0 if self.throttle is None else round(self.throttle.probability(now), 3),
            "circuits": {route: breaker.state.value for route, breaker in self.breakers.items()},
            "p95": self.latencies.p95(),
        }
