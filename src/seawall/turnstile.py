"""The stages of overload control: a deadline, a place among the streams, a way in.

`Screening` comes first and refuses what is better refused before anything is spent for it; `Entrance` comes last, after
whatever waits for a backend, so that what is in flight and how long it takes are the application's alone. Both ask the
same `Limiter`, of which there is one for each event loop: a process controls itself, and nobody else.
"""

from __future__ import annotations

from asyncio import AbstractEventLoop, Future, _get_running_loop
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import count
from time import process_time_ns
from typing import Any, final

from seawall import advice
from seawall.admission import GONE, Answer, Denied, Ticket
from seawall.backends import Key
from seawall.decision import Clock, Outcome
from seawall.overload.limiter import ADMITTED, EXPIRED, MOST_GROUPS, WAITS, Class, Limiter, Reason, Settings
from seawall.policy import Policy

_LAST_GROUP = MOST_GROUPS - 1


def settings_of(policy: Policy, *, priorities: bool) -> Settings | None:
    """The limiter's settings; ``None`` where the policy has none. Without ``priorities`` all requests are alike."""
    shedding = policy.shedding
    if shedding.algorithm == "off":
        return None
    classes = tuple(Class(one.name, one.queue_timeout_ns, one.min_share or 0.0) for one in policy.priorities)
    return Settings(
        algorithm=shedding.algorithm,
        initial=shedding.initial,
        least=shedding.min,
        most=shedding.max,
        target_ns=shedding.loop_lag_target_ns,
        classes=classes if priorities else (Class("none"),),
        groups=len(policy.routes) + 1,
        fair=priorities,
    )


@final
class Turnstile:
    """The limiter of whatever event loop runs, made when its first request comes.

    There may be several in turn (each test client brings its own) and at once, in threads. One that is closed is
    forgotten with the next that comes.
    """

    __slots__ = ("_changed", "_clock", "_last", "_limiters", "_positions", "_settings", "_waited")

    def __init__(
        self,
        settings: Settings,
        clock: Clock,
        *,
        changed: Callable[[str], None] | None = None,
        waited: Callable[[int, int, Reason], None] | None = None,
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._changed = changed
        self._waited = waited
        self._positions: Mapping[str, int] = {}
        self._limiters: dict[AbstractEventLoop | None, Limiter] = {}
        self._last: tuple[AbstractEventLoop | None, Limiter] = (None, self._switch(None))

    def __repr__(self) -> str:
        return f"<Turnstile {self.current!r}>"

    @property
    def current(self) -> Limiter:
        """The limiter that was asked last."""
        return self._last[1]

    @property
    def refused(self) -> int:
        """What all limiters have refused so far, those of loops that are closed aside."""
        return sum(limiter.refused for limiter in list(self._limiters.values()))

    def positions(self, rules: Sequence[str]) -> dict[str, int]:
        """The group of each rule, to `change` to: the one it has, or one that is free; 0 is of what matches none, and
        the last one is of all for which there is none."""
        kept = {name: self._positions[name] for name in rules if name in self._positions}
        taken = set(kept.values())
        free = (at for at in count(1) if at not in taken)
        return {name: kept[name] if name in kept else min(next(free), _LAST_GROUP) for name in rules}

    def change(
        self,
        settings: Settings,
        positions: Mapping[str, int],
        changed: Callable[[str], None] | None,
        waited: Callable[[int, int, Reason], None] | None,
    ) -> None:
        """Have every limiter go on by other settings, each on its loop, with the rules at ``positions``."""
        others = {at for name, at in positions.items() if self._positions.get(name) != at} - {_LAST_GROUP}
        # Never fewer: who was told its position by an earlier policy may come to a loop's limiter first.
        groups = max(self._settings.groups, settings.groups, 1 + max(positions.values(), default=0))
        settings = replace(settings, groups=groups)
        self._settings, self._changed, self._waited = settings, changed, waited
        self._positions = positions
        running = _get_running_loop()
        for loop, limiter in list(self._limiters.items()):
            if loop is None or loop is running:
                limiter.change(settings, changed, waited, others)
            elif not loop.is_closed():
                with suppress(RuntimeError):  # closed in this very moment
                    loop.call_soon_threadsafe(limiter.change, settings, changed, waited, others)

    def limiter(self) -> Limiter:
        loop = _get_running_loop()
        last, limiter = self._last
        return limiter if loop is last else self._switch(loop)

    def _switch(self, loop: AbstractEventLoop | None) -> Limiter:
        limiter = self._limiters.get(loop)
        if limiter is None:
            for other in list(self._limiters):
                if other is not None and other.is_closed():
                    self._limiters.pop(other, None)
            limiter = self._limiters[loop] = self._new(loop)
        self._last = (loop, limiter)
        return limiter

    def _new(self, loop: AbstractEventLoop | None) -> Limiter:
        return Limiter(
            self._settings,
            clock=self._clock,
            timers=loop,
            changed=self._changed,
            waited=self._waited,
            processor=process_time_ns,
        )


def shed(ticket: Ticket, reason: Reason, after: int | None, status: int) -> Denied:
    """A refusal that is nobody's fault."""
    return Denied(504 if reason is EXPIRED else status, reason, terms=ticket.terms, after=after)


@final
class Screening:
    """What can be refused at once: expired, above the threshold, or with nowhere left to wait."""

    name = "screening"

    def __init__(self, turnstile: Turnstile | None, clock: Clock, status: int, random: Callable[[], float]) -> None:
        self._turnstile = turnstile
        self._clock = clock
        self._status = status
        self._random = random

    def __repr__(self) -> str:
        return f"<Screening by {self._turnstile!r}>"

    def admit(self, ticket: Ticket) -> Denied | None:
        # Not the time of arrival: who it is may have been asked elsewhere since.
        now = self._clock()
        if ticket.deadline and ticket.deadline <= now:
            return shed(ticket, EXPIRED, None, 504)
        if self._turnstile is None:
            return None
        try:
            limiter = self._turnstile.limiter()
            reason = limiter.screen(ticket, now)
            ticket.limiter = limiter
            if reason is ADMITTED:
                return None
            return shed(ticket, reason, limiter.announce(ticket.klass, self._random), self._status)
        except Exception:
            _broken(ticket)
            return None

    def settle(self, ticket: Ticket, outcome: Outcome, *, refund: bool) -> None:
        """It has taken nothing."""


@final
class Entrance:
    """A permit, now or after waiting for it."""

    name = "entrance"

    def __init__(self, turnstile: Turnstile, clock: Clock, status: int, random: Callable[[], float]) -> None:
        self._turnstile = turnstile
        self._clock = clock
        self._status = status
        self._random = random

    def __repr__(self) -> str:
        return f"<Entrance through {self._turnstile!r}>"

    def admit(self, ticket: Ticket) -> Answer | Awaitable[Answer]:
        limiter = ticket.limiter
        if limiter is None:
            return None  # screening has failed
        try:
            if not ticket.terms.guarded:
                return self._watch(ticket, limiter)
            reason = limiter.enter(ticket, self._clock())
        except Exception:
            _broken(ticket)
            return None
        if reason is ADMITTED:
            ticket.held = True
            return None
        if reason is WAITS:
            return self._wait(ticket, limiter)
        return self._refused(ticket, limiter, reason)

    def _watch(self, ticket: Ticket, limiter: Limiter) -> Answer:
        """Shadow mode: everybody enters, and who would have been refused is told so."""
        reason = limiter.force(ticket, self._clock())
        ticket.held = True
        return None if reason is ADMITTED else self._refused(ticket, limiter, reason)

    async def _wait(self, ticket: Ticket, limiter: Limiter) -> Answer:
        future: Future[Reason] = _running_loop().create_future()
        ticket.wake = partial(_wake, future)
        ticket.listen()
        try:
            reason = await future
            if reason is ADMITTED:
                if await ticket.has_left():
                    limiter.release(ticket, Outcome.IGNORED, self._clock())
                    return Denied(499, GONE, terms=ticket.terms)
                reason = limiter.start(ticket, self._clock())
                if reason is ADMITTED:
                    ticket.held = True
                    return None
        except Exception:
            with suppress(Exception):
                limiter.release(ticket, Outcome.IGNORED, self._clock())
            _broken(ticket)
            return None
        except BaseException:  # cancelled
            limiter.release(ticket, Outcome.IGNORED, self._clock())
            raise
        return self._refused(ticket, limiter, reason)

    def _refused(self, ticket: Ticket, limiter: Limiter, reason: Reason) -> Denied:
        try:
            after = None if reason is EXPIRED else limiter.announce(ticket.klass, self._random)
        except Exception:
            _broken(ticket)
            after = 1
        return shed(ticket, reason, after, self._status)

    def settle(self, ticket: Ticket, outcome: Outcome, *, refund: bool) -> None:
        limiter = ticket.limiter
        if limiter is not None:
            try:
                limiter.release(ticket, outcome, self._clock())
            except Exception:
                _broken(ticket)


def _broken(ticket: Ticket) -> None:
    """A mistake of ours must not become the callers' outage: the request goes in, and holds nothing."""
    ticket.limiter = None
    advice.once("overload", "overload control has failed; the request is admitted", exc_info=True)


def _running_loop() -> AbstractEventLoop:
    loop = _get_running_loop()
    if loop is None:
        raise RuntimeError("a request can wait only where an event loop runs")
    return loop


def _wake(future: Future[Any], reason: Reason) -> None:
    if not future.done():  # cancelled, and not told yet
        future.set_result(reason)


@final
class Streams:
    """Streams have a budget of their own, for they last as long as somebody listens.

    A count for each rule that declares ``streaming``, and one for each of its callers, which is there only while it is
    not zero.
    """

    name = "streams"

    def __init__(self, status: int, random: Callable[[], float]) -> None:
        self.status = status
        self._random = random
        self.open: dict[str, int] = {}
        self._of_caller: dict[tuple[str, Key], int] = {}

    def __repr__(self) -> str:
        return f"<Streams {sum(self.open.values())} open on {len(self.open)} rules>"

    def admit(self, ticket: Ticket) -> Denied | None:
        route = ticket.terms.route
        streaming = route.streaming
        if streaming is None:
            return None
        rule = route.name
        running, own = self.open.get(rule, 0), self._of_caller.get((rule, ticket.principal), 0)
        if running >= streaming.max:
            # Nobody knows when a listener leaves.
            return Denied(self.status, "overload", ((self.name, 1),), ticket.terms, after=1 + int(self._random() * 2))
        if streaming.max_per_tenant is not None and own >= streaming.max_per_tenant and ticket.terms.enforced:
            return Denied(429, "concurrency", ((self.name, 1),), ticket.terms)
        self.open[rule] = running + 1
        self._of_caller[rule, ticket.principal] = own + 1
        ticket.stream = (rule, ticket.principal)
        ticket.held = True
        return None

    def settle(self, ticket: Ticket, outcome: Outcome, *, refund: bool) -> None:
        stream = ticket.stream
        if stream is None:
            return
        ticket.stream = None
        rule, _ = stream
        self.open[rule] -= 1
        left = self._of_caller[stream] - 1
        if left:
            self._of_caller[stream] = left
        else:
            del self._of_caller[stream]
