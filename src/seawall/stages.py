"""The stages that hold a caller to its plan: how much at a time, and how much in a time."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import cast, final

from seawall.admission import Answer, Denied, Entry, Terms, Ticket, charges_of
from seawall.backends import Backend, FleetBackend, Full, Key, Permit, SharedBackend, Verdict
from seawall.decision import NEVER, Outcome

CALLER = 429
"""The status of everything that is the caller's own doing. 503 is for the service's."""
UNAVAILABLE = 503


@final
class TenantConcurrency:
    """Requests of one caller in flight at once: a count per caller, which is there only while it is not zero.

    The slot is given back when the application's coroutine has returned and not when the client disconnects: servers do
    not cancel the handler, so a caller who aborts would otherwise run as many handlers as it likes.
    """

    name = "concurrency"

    def __init__(self) -> None:
        self._in_flight: dict[Key, int] = {}

    def __repr__(self) -> str:
        return f"<TenantConcurrency {sum(self._in_flight.values())} in flight, {len(self._in_flight)} callers>"

    def in_flight(self, principal: Key) -> int:
        return self._in_flight.get(principal, 0)

    def admit(self, ticket: Ticket) -> Denied | None:
        limit = ticket.terms.concurrency
        if limit is None:
            return None
        principal = ticket.principal
        running = self._in_flight.get(principal, 0)
        if running >= limit:
            return full(ticket.terms)
        self._in_flight[principal] = running + 1
        ticket.permit = principal
        ticket.held = True
        return None

    def settle(self, ticket: Ticket, outcome: Outcome, *, refund: bool) -> None:
        principal = ticket.permit
        if principal is None or isinstance(principal, Permit):
            return
        ticket.permit = None
        running = self._in_flight[principal] - 1
        if running:
            self._in_flight[principal] = running
        else:
            del self._in_flight[principal]

    def statistics(self) -> dict[str, int]:
        """``callers`` with requests in flight, and ``in_flight`` over all of them."""
        return {"callers": len(self._in_flight), "in_flight": sum(self._in_flight.values())}


class Spending:
    """All rates and quotas of a request, in one spend that takes all or nothing."""

    name = "rate"

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def __repr__(self) -> str:
        return f"<Spending from {self._backend!r}>"

    def admit(self, ticket: Ticket) -> Answer | Awaitable[Answer]:
        entries = ticket.terms.charges
        if not entries:
            return None
        verdict = self._backend.spend(charges_of(ticket, entries))
        if type(verdict) is not Verdict:
            return self._wait(ticket, cast("Awaitable[Verdict]", verdict))
        ticket.verdict = verdict
        if verdict.waits is None:
            ticket.charged = True
            return None
        return self._deny(ticket, verdict)

    async def _wait(self, ticket: Ticket, pending: Awaitable[Verdict]) -> Answer:
        ticket.verdict = verdict = await pending
        ticket.charged = verdict.admitted
        return None if verdict.admitted else self._deny(ticket, verdict)

    def _deny(self, ticket: Ticket, verdict: Verdict) -> Denied:
        return refused_spend(ticket.terms, ticket.terms.entries, verdict)

    def settle(self, ticket: Ticket, outcome: Outcome, *, refund: bool) -> None:
        if not refund or not ticket.charged or ticket.verdict is None:
            return
        ticket.charged = False
        self._backend.refund(ticket.verdict.charges, ticket.verdict.wall)


@final
class SharedSpending(Spending):
    """The same from a store that may be away. Nobody then knows what is left, and the rule says what that means."""

    def __init__(self, backend: SharedBackend, random: Callable[[], float]) -> None:
        super().__init__(backend)
        self._shared = backend
        self._fleet = backend if isinstance(backend, FleetBackend) else None
        self._random = random

    def admit(self, ticket: Ticket) -> Answer | Awaitable[Answer]:
        terms = ticket.terms
        charges = charges_of(ticket, terms.charges)
        answer: Verdict | Full | None | Awaitable[Verdict | Full | None]
        if self._fleet is not None and terms.concurrency is not None:
            permit = self._fleet.permit(terms.profile.store, ticket.principal, terms.concurrency)
            # Known to the ticket before it is granted, or whoever is cancelled in between keeps it for ever.
            ticket.permit, ticket.held = permit, True
            answer = self._fleet.spend_with(permit, charges, terms.failure)
        elif charges:
            answer = self._shared.spend(charges, terms.failure)
        else:
            return None
        if type(answer) is Verdict or answer is None or isinstance(answer, Full):
            return self._decide(ticket, answer)
        return self._ask(ticket, cast("Awaitable[Verdict | Full | None]", answer))

    async def _ask(self, ticket: Ticket, pending: Awaitable[Verdict | Full | None]) -> Answer:
        return self._decide(ticket, await pending)

    def _decide(self, ticket: Ticket, answer: Verdict | Full | None) -> Answer:
        if type(answer) is Verdict:
            if not answer.charges:
                return None  # a slot, and nothing that headers could speak of
            ticket.verdict = answer
            if answer.waits is None:
                ticket.charged = True
                return None
            return self._deny(ticket, answer)
        return unanswered(self._shared, ticket.terms, self._random) if answer is None else full(ticket.terms)

    def settle(self, ticket: Ticket, outcome: Outcome, *, refund: bool) -> None:
        permit = ticket.permit
        if self._fleet is not None and isinstance(permit, Permit):
            ticket.permit = None
            self._fleet.release(permit)
        super().settle(ticket, outcome, refund=refund)


def full(terms: Terms) -> Denied:
    """What to say to a caller who has as much in flight as it may.

    Nobody can know when a request of its own ends; one second is when it is worth trying again.
    """
    return Denied(CALLER, "concurrency", (("concurrency", 1),), terms)


def unanswered(backend: SharedBackend, terms: Terms, random: Callable[[], float]) -> Denied | None:
    """What becomes of a request whose limits nobody could check: 503 where that is to deny it, or ``None``.

    When the store is back nobody knows; 1 or 2 s is when it is worth trying again.
    """
    if (terms.failure or backend.on_failure) != "deny":
        return None
    return Denied(UNAVAILABLE, "backend_unavailable", terms=terms, after=1 + int(random() * 2))


def refused_spend(terms: Terms, entries: Sequence[Entry], verdict: Verdict) -> Denied:
    """What to say of a spend that was refused: everything that refuses, the longest wait first."""
    pairs: list[tuple[str, int]] = []
    first, longest = 0, 0
    for at, wait in enumerate(verdict.waits or ()):
        if wait:
            pairs.append((entries[at].name, wait))
            if longest != NEVER and (wait > longest or wait == NEVER):
                first, longest = at, wait
    if len(pairs) > 1:
        pairs.sort(key=lambda pair: pair[1] if pair[1] != NEVER else 1 << 63, reverse=True)
    return Denied(CALLER, entries[first].kind, tuple(pairs), terms, (entries[first], first, verdict))
