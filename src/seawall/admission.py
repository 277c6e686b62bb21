"""One gate: a request gets a ticket, the stages are asked in order, and what they took is settled in reverse.

Everything that depends only on the policy is worked out before a request comes: `Terms` are what holds for one kind of
caller on one rule. A stage that needs no I/O answers with a plain value, which is atomic on an event loop, so nothing
here takes a lock; one that does answers with an awaitable, and the two are told apart at one place.

A refusal is a value. `Admission.settle` never awaits and never raises, and it may be called twice.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Literal, Protocol, TypeAlias, final
from uuid import UUID

from seawall.backends import LISTED, Backend, Charge, Failure, Key, Meter, Permit, Verdict
from seawall.decision import NEVER, Mode, Outcome
from seawall.overload.limiter import Limiter
from seawall.overload.queue import DONE, Claim
from seawall.policy import Per, Plan, Policy, Route, RouteLimit
from seawall.rate import Quota, Rate

DEFAULT_ROUTE = Route(name="default", paths=())
"""The rule of everything that matches none: the caller's plan, and no exemption."""

GONE = "gone"
"""Why a request is not served whose caller has left while it waited. Nobody is answered, and nobody counts it."""
SHED = frozenset({"overload", "queue_full", "queue_timeout"})
"""Reasons that are about the service, whoever calls."""
SERVICE = SHED | {"expired", GONE}
"""Reasons that follow the mode of the file and the rule alone."""

MAX_ID = 128
_SURROGATE = re.compile("[\ud800-\udfff]")


@final
@dataclass(frozen=True, slots=True)
class Profile:
    """What is the same for every caller of a kind: a plan with its overrides, a priority, a mode.

    ``store`` says what their keys are: ids of tenants that are listed, or looked up, other ids, addresses, or the one
    key of all anonymous callers together (``global``).
    """

    plan: Plan
    store: str
    priority: str | None = None
    mode: Mode = Mode.ENFORCE


Whose: TypeAlias = Callable[["Ticket"], Key] | None
"""Finds the key of a bucket; ``None`` is the caller that the plan is of, by far the most frequent."""


@final
class Entry:
    """One limit of some terms. ``q`` is what headers advertise of it, ``near`` the rest at which 80 % are used,
    ``item`` and ``full_item`` are its RateLimit header but for the numbers."""

    __slots__ = (
        "cost",
        "full_item",
        "item",
        "kind",
        "limit",
        "meter",
        "name",
        "near",
        "of_plan",
        "q",
        "rate",
        "whose",
    )

    def __init__(self, name: str, meter: Meter, whose: Whose, cost: int, *, of_plan: bool) -> None:
        rate = meter.rate
        bucket = isinstance(rate, Rate)
        self.name = name
        self.meter = meter
        self.rate = rate
        self.whose = whose
        self.cost = cost
        self.of_plan = of_plan
        self.kind: Literal["rate", "quota"] = "rate" if bucket else "quota"
        self.limit = rate.burst if isinstance(rate, Rate) else rate.limit
        self.q = rate.advertised if isinstance(rate, Rate) else rate.limit
        self.near = self.limit // 5
        self.item = f'"{name}";r=%d;t=%d'.encode()
        self.full_item = f'"{name}";r=%d'.encode()

    def wait(self, state: int, verdict: Verdict, cost: int = 1) -> int:
        """Nanoseconds until ``cost`` is admitted if nobody else spends: 0 for now, or ``NEVER``."""
        return self.rate.wait(state, verdict.now if self.kind == "rate" else verdict.wall, cost)

    def adjust(self, verdict: Verdict, at: int, cost: int) -> None:
        """Let a verdict say what it is after ``cost`` more was charged, or with a negative one came back."""
        rate, state = self.rate, verdict.states[at]
        now = verdict.now if isinstance(rate, Rate) else verdict.wall
        if cost > 0:
            state = rate.debit(state, now, cost)
        elif isinstance(rate, Rate):
            state = rate.refund(state, now, -cost)
        else:
            state = rate.refund(state, now, -cost, now)
        verdict.states[at] = state
        verdict.left[at] = rate.remaining(state, now)


@final
class Terms:
    """What holds for one profile on one rule.

    ``klass`` is the position of the priority, ``group`` that of the rule among those whose latency is told apart
    (`Turnstile.positions`). ``enforced`` is whether the caller's limits are, ``guarded`` whether the
    service is protected from it. ``failure`` is what the rule says of a shared backend that is away, ``None`` for
    nothing.
    """

    __slots__ = (
        "charges",
        "concurrency",
        "enforced",
        "entries",
        "failure",
        "group",
        "guarded",
        "klass",
        "mode",
        "plan",
        "priority",
        "profile",
        "route",
    )

    def __init__(
        self,
        profile: Profile,
        route: Route,
        mode: Mode,
        priority: str,
        entries: tuple[Entry, ...],
        concurrency: int | None,
        *,
        klass: int = 0,
        group: int = 0,
        guarded: bool = True,
    ) -> None:
        self.profile = profile
        self.route = route
        self.plan = profile.plan.name
        self.mode = mode
        self.priority = priority
        self.entries = entries
        self.concurrency = concurrency
        self.klass = klass
        self.group = group
        self.enforced = mode is Mode.ENFORCE
        self.guarded = guarded
        self.failure: Failure | None = route.on_backend_failure
        self.charges = tuple((entry.meter, entry.whose, entry.cost) for entry in entries)


class Ticket(Claim):
    """One request on its way through the gate: who it is, what holds for it, what it has taken.

    ``address`` is the key of the client's address, ``resolved`` when first needed. ``charged`` and ``verdict`` are what
    the spending stage took, ``permit`` what the concurrency stage did, ``stream`` what the streams' did, ``limiter``
    who has to be told of its end. A stage that took what must be given back in any case sets ``held``; a request that
    holds nothing is not settled.
    """

    __slots__ = (
        "_resolve",
        "charged",
        "held",
        "limiter",
        "permit",
        "principal",
        "resolved",
        "scope",
        "stream",
        "tenant",
        "terms",
        "verdict",
    )

    def __init__(
        self,
        scope: Any,
        terms: Terms,
        tenant: str | None,
        principal: Key,
        resolve: Callable[[Any], bytes],
        address: bytes | None,
    ) -> None:
        self.scope = scope
        self.terms = terms
        self.tenant = tenant
        self.principal = principal
        self._resolve = resolve
        self.resolved = address
        self.verdict: Verdict | None = None
        self.charged = False
        self.held = False
        self.permit: Key | Permit | None = None
        self.stream: tuple[str, Key] | None = None
        self.limiter: Limiter | None = None
        self.deadline = 0
        self.klass = terms.klass
        self.group = terms.group
        self.owner = principal
        self.state = DONE

    def listen(self) -> None:
        """Notice from now on whether the caller hangs up. Called as it begins to wait."""

    async def has_left(self) -> bool:
        """Whether the caller is known to be gone. Asked of those that have waited."""
        return False

    @property
    def address(self) -> bytes:
        if self.resolved is None:
            self.resolved = self._resolve(self.scope)
        return self.resolved


Closest: TypeAlias = tuple[Entry, int, Verdict]
"""An entry, its position in the verdict, and the verdict."""


@final
class Denied:
    """What a stage says instead of nothing.

    ``waits`` pairs the policies that refuse with nanoseconds (or ``NEVER``), the longest first. ``first`` is the entry
    of that one in the spend that was refused, if it was a spend; ``terms`` are those of the request,
    and ``timed`` whether waiting helps, for as long as is known. ``after`` is that in seconds, where the service says.
    """

    __slots__ = ("after", "first", "reason", "status", "terms", "timed", "waits")

    def __init__(
        self,
        status: int,
        reason: str,
        waits: tuple[tuple[str, int], ...] = (),
        terms: Terms | None = None,
        first: Closest | None = None,
        after: int | None = None,
    ) -> None:
        self.status = status
        self.reason = reason
        self.waits = waits
        self.terms = terms
        self.first = first
        self.after = after
        self.timed = after is not None or (bool(waits) and waits[0][1] != NEVER)

    @property
    def enforced(self) -> bool:
        """Whether it is meant, or only counted."""
        terms = self.terms
        return terms is None or (terms.guarded if self.reason in SERVICE else terms.enforced)


Answer: TypeAlias = Denied | None


class Stage(Protocol):
    """One question that a request is asked. Adding a stage is writing one of these."""

    name: str

    def admit(self, ticket: Ticket) -> Answer | Awaitable[Answer]:
        """``None`` to let it pass. What it took is noted on the ticket, whatever the answer."""
        ...

    def settle(self, ticket: Ticket, outcome: Outcome, *, refund: bool) -> None:
        """Give back what is held: called where the ticket says ``held`` or ``refund`` is due, also twice."""
        ...


@final
class Admission:
    """Asks the stages. `admit` returns ``None`` (come in), a `Denied`, or an awaitable of either."""

    __slots__ = ("_reversed", "_stages")

    def __init__(self, stages: Iterable[Stage]) -> None:
        self._stages = tuple(stages)
        self._reversed = self._stages[::-1]

    def __repr__(self) -> str:
        return f"<Admission {' -> '.join(stage.name for stage in self._stages)}>"

    def admit(self, ticket: Ticket) -> Answer | Awaitable[Answer]:
        for stage in self._stages:
            answer = stage.admit(ticket)
            if answer is not None:
                if type(answer) is Denied:
                    return answer
                return self._wait(ticket, answer, self._stages.index(stage))
        return None

    async def _wait(self, ticket: Ticket, answer: Any, at: int) -> Answer:
        denied: Answer = await answer
        for stage in self._stages[at + 1 :]:
            if denied is not None:
                break
            later = stage.admit(ticket)
            denied = later if later is None or isinstance(later, Denied) else await later
        return denied

    def settle(self, ticket: Ticket, outcome: Outcome, *, refund: bool) -> None:
        """In reverse order. ``refund`` gives back what was spent as well: it was us who refused."""
        for stage in self._reversed:
            stage.settle(ticket, outcome, refund=refund)


@final
class TermsCompiler:
    """Works out what holds for whom. Asked when a policy is loaded, and once for each rare combination later.

    ``parts`` are what is enforced here: ``rate``, ``quota``, ``concurrency``, ``shedding``, ``priority``. ``groups``
    are those of the rules whose latency is told apart.
    """

    def __init__(
        self, policy: Policy, backend: Backend, parts: frozenset[str], groups: Mapping[str, int] | None = None
    ) -> None:
        self._policy = policy
        self._backend = backend
        self._parts = parts
        self._classes = [priority.name for priority in policy.priorities]
        self._groups = groups or {}

    def profiles(self) -> tuple[dict[str, Profile], Profile | None, Profile | None]:
        """The profiles of the listed tenants, of other tenants, and of anonymous callers."""
        policy = self._policy
        shared: dict[tuple[int, str | None, Mode], Profile] = {}
        listed = {}
        for tenant in policy.tenants.values():
            kind = (id(tenant.plan), tenant.priority, tenant.mode)
            profile = shared.get(kind)
            if profile is None:
                profile = shared[kind] = Profile(tenant.plan, LISTED, tenant.priority, tenant.mode)
            listed[tenant.id] = profile
        other = Profile(policy.plans[policy.default_plan], "id") if policy.default_plan else None
        anonymous = None
        if policy.anonymous_plan and policy.identity.anonymous != "deny":
            store = "address" if policy.identity.anonymous == "per-ip" else "global"
            anonymous = Profile(policy.plans[policy.anonymous_plan], store)
        return listed, other, anonymous

    def terms(self, profile: Profile, route: Route) -> Terms:
        """What holds for callers of ``profile`` on ``route``."""
        policy, plan = self._policy, profile.plan
        # A tenant's own priority, then the route's, then the plan's.
        priority = profile.priority or route.priority or plan.priority or policy.middle_priority
        return self._terms(profile, route, priority)

    def with_priority(self, terms: Terms, priority: str) -> Terms:
        """The same for a request that has another priority."""
        return self._terms(terms.profile, terms.route, priority)

    def _terms(self, profile: Profile, route: Route, priority: str) -> Terms:
        policy, plan = self._policy, profile.plan
        mode = min(policy.mode, plan.mode, profile.mode, route.mode)
        own = RouteLimit("rate", ("tenant",), plan.rates, plan.quota, route.cost, of_plan=True)
        parts = self._parts if mode is not Mode.OFF else frozenset()
        entries = self._entries(own, "quota", profile, parts)
        for limit in route.limits:
            entries += self._entries(limit, quota_name(limit), profile, parts)
        return Terms(
            profile,
            route,
            mode,
            priority,
            tuple(entries),
            plan.concurrency if "concurrency" in parts else None,
            klass=self._classes.index(priority) if "priority" in self._parts else 0,
            group=self._groups.get(route.name, 0),
            guarded=min(policy.mode, route.mode) is Mode.ENFORCE,
        )

    def outside(self, limit: RouteLimit, profile: Profile) -> list[Entry]:
        """The entries of a limit that is not in the policy, whichever parts of that are enforced here."""
        return self._entries(limit, quota_name(limit), profile, frozenset({"rate", "quota"}))

    def _entries(self, limit: RouteLimit, quota: str, profile: Profile, parts: frozenset[str]) -> list[Entry]:
        store, whose = _whose(limit.per, profile)
        named: list[tuple[str, Rate | Quota]] = []
        if "rate" in parts:
            for number, rate in enumerate(limit.rates, 1):
                named.append((limit.name if number == 1 else f"{limit.name}-{number}", rate))
        if limit.quota is not None and "quota" in parts:
            named.append((quota, limit.quota))
        return [
            Entry(name, self._backend.meter(name, store, rate), whose, limit.cost, of_plan=limit.of_plan)
            for name, rate in named
        ]


def quota_name(limit: RouteLimit) -> str:
    """What the quota of a limit is called: as the limit, unless that is what its rate is called."""
    return f"{limit.name}-quota" if limit.rates else limit.name


def _whose(per: Per, profile: Profile) -> tuple[str, Whose]:
    """The store of a limit's keys, and how a request's key is found."""
    kinds = tuple(kind for kind in per if kind != "global")
    if not kinds:
        return "global", _everybody
    if kinds == ("tenant",):
        return profile.store, None
    if kinds == ("client_ip",):
        return "address", _address
    if len(kinds) == 1:
        name = kinds[0].removeprefix("state:")
        return "state", lambda ticket: _state(ticket, name)
    return "combination", lambda ticket: _combination(ticket, kinds)


def bounded_id(value: object) -> str | None:
    """A caller's id as text of at most 128 characters; ``None`` for what is no text, whole number or UUID.

    Longer ones by their hash, so that a key stays small, and so are those that no output could encode. Anything else
    would be one caller today and another tomorrow, as the ``repr`` of an object is.
    """
    if isinstance(value, str):
        text = value
    elif isinstance(value, int | UUID) and not isinstance(value, bool):
        text = str(value)
    else:
        return None
    if len(text) > MAX_ID or (not text.isascii() and _SURROGATE.search(text)):
        return "blake2b:" + blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
    return text


def _everybody(_: Ticket) -> Key:
    return "everybody"


def _address(ticket: Ticket) -> Key:
    return ticket.resolved or ticket.address


def _state(ticket: Ticket, name: str) -> str:
    """The text of ``scope["state"][name]``; all requests without it share one bucket rather than escape the limit."""
    return bounded_id(state_of(ticket.scope, name)) or ""


def state_of(scope: Mapping[str, Any], name: str) -> object:
    """What a middleware further out has left under ``name``; servers and frameworks differ in what ``state`` is."""
    state = scope.get("state")
    return state.get(name) if isinstance(state, Mapping) else getattr(state, name, None)


def _combination(ticket: Ticket, kinds: Per) -> bytes:
    """Injective over its parts: each says its kind and its length."""
    parts = []
    for kind in kinds:
        value: Key = (
            ticket.address
            if kind == "client_ip"
            else ticket.principal
            if kind == "tenant"
            else _state(ticket, kind.removeprefix("state:"))
        )
        raw = value if isinstance(value, bytes) else value.encode("utf-8", "surrogatepass")
        parts.append(b"%c%d:%b" % (b"b" if isinstance(value, bytes) else b"s", len(raw), raw))
    return b"".join(parts)


def charges_of(ticket: Ticket, terms: Iterable[tuple[Meter, Whose, int]]) -> list[Charge]:
    """The charges of a request, with the keys filled in."""
    principal = ticket.principal
    charges: list[Charge] = []
    for meter, whose, cost in terms:
        charges.append((meter, principal if whose is None else whose(ticket), cost))
    return charges
