"""A policy, ready to be asked: everything that one request needs and that does not change between requests.

`Gate` is built when a policy is loaded and replaced whole when it changes. A `Lane` is what one kind of caller finds on
one rule: the terms, the metric cells and the header bytes, so that the request path adds to integers and joins bytes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Awaitable, Callable, Sequence
from hashlib import blake2b
from typing import Any, TypeAlias, final

from seawall import advice
from seawall.admission import DEFAULT_ROUTE, Admission, Closest, Denied, Entry, Profile, Stage, Terms, TermsCompiler
from seawall.backends import KNOWN, Backend, Charge, FleetBackend, Key, SharedBackend, Verdict
from seawall.backends.secret import hash_key
from seawall.config import ConfigError
from seawall.config.diagnostics import printable
from seawall.config.runtime import compile_tenant
from seawall.decision import Clock, Mode
from seawall.directory import MOST_KNOWN, Known
from seawall.hints import Hint, Hints
from seawall.identity import ClientIP, NetworkSet, TenantSource, show_address
from seawall.metrics import (
    ALLOW,
    ALLOWED,
    DECISIONS,
    DENY,
    EXEMPT,
    IGNORED_HEADERS,
    INFLIGHT,
    LIMIT_CHANGES,
    NEAR,
    OUTCOMES,
    POLICY_CHECKS,
    QUEUE_WAIT,
    REJECTIONS,
    REQUEST_DURATION,
    REQUESTS,
    SHADOW_REJECTIONS,
    Cells,
    TenantLabels,
    Values,
)
from seawall.policy import Policy
from seawall.rate import SECOND, Quota
from seawall.responses import Answers, grows, policy_header
from seawall.routing import RouteTable
from seawall.stages import SharedSpending, Spending, TenantConcurrency, unanswered
from seawall.turnstile import Entrance, Screening, Streams, Turnstile, settings_of

Scope: TypeAlias = Any
Identify: TypeAlias = Callable[[Any], "str | None | Awaitable[str | None]"]

NOBODY = b"anonymous"
"""The caller that all anonymous ones are together. Bytes, for a tenant may be called anything."""

EAGER_LANES = 4_096
"""Lanes that are compiled with the policy. Where tenants' overrides make more, theirs are when first used."""


RESULTS = ("admitted", "queue_timeout", "queue_full", "expired", "overload", "cancelled")
"""What becomes of a request that waits."""
_WAIT_BOUNDS = QUEUE_WAIT.bounds_ns


@final
class Checks:
    """The entries of a spend and the cells for what each decides, laid out for one pass over a verdict."""

    __slots__ = ("_deny", "_rows", "entries")

    def __init__(self, entries: Sequence[Entry], plan: str, cells: Cells) -> None:
        blocks = [cells.block(POLICY_CHECKS, "decision", DECISIONS, policy=entry.name, plan=plan) for entry in entries]
        self.entries = entries
        self._deny = tuple((block[ALLOW], block[DENY]) for block in blocks)
        self._rows = tuple(
            (at, entry.near, entry.q, block[ALLOW], block[NEAR])
            for at, (entry, block) in enumerate(zip(entries, blocks, strict=True))
        )

    def count(self, verdict: Verdict, values: Values) -> Closest | None:
        """Count what each policy decided; of an admission, find the entry closest to exhaustion in the same pass."""
        if verdict.waits is not None:
            for (allow, deny), wait in zip(self._deny, verdict.waits, strict=True):
                values[deny if wait else allow] += 1
            return None
        nearest = -1
        lowest = 2.0
        for (at, near, q, allow, nearly), left in zip(self._rows, verdict.left, strict=True):
            values[nearly if left <= near else allow] += 1
            share = left / q
            if share < lowest or (share == lowest and self._grows_later(at, nearest, verdict)):
                lowest, nearest = share, at
        return self.entries[nearest], nearest, verdict

    def _grows_later(self, one: int, other: int, verdict: Verdict) -> bool:
        entries = self.entries
        if entries[one].rate is entries[other].rate:
            # Two limits written alike: 0.1 instead of 0.5 us, and the fuller one grows first.
            return verdict.states[one] > verdict.states[other]
        return grows(entries[one], one, verdict) > grows(entries[other], other, verdict)


@final
class Lane:
    """What one kind of caller finds on one rule."""

    __slots__ = (
        "__weakref__",
        "_cells",
        "_policies",
        "_quotas",
        "_rejections",
        "_since",
        "_until",
        "admitted",
        "checks",
        "enforced",
        "inflight",
        "others",
        "requests",
        "seconds",
        "terms",
        "timed",
    )

    def __init__(self, terms: Terms, cells: Cells) -> None:
        self.terms = terms
        self._cells = cells
        self._rejections: dict[tuple[str, str], int] = {}
        self.enforced = terms.enforced
        self.admitted = EXEMPT if terms.mode is Mode.OFF else ALLOWED
        self.others: dict[str, Lane] = {}
        self.requests = list(cells.block(REQUESTS, "outcome", OUTCOMES, priority=terms.priority))
        self.requests[EXEMPT] = cells.index(REQUESTS, OUTCOMES[EXEMPT], "none")
        self.inflight = cells.index(INFLIGHT, terms.priority)
        # Streams last as long as somebody listens, which says nothing about the service.
        self.timed = terms.route.streaming is None
        self.seconds = cells.index(REQUEST_DURATION, terms.priority)
        self.checks = Checks(terms.entries, terms.plan, cells)
        self._quotas = [entry.rate for entry in terms.entries if isinstance(entry.rate, Quota)]
        self._since = self._until = 0
        self._policies = b""

    def policies(self, wall: int) -> bytes:
        """The value of ``RateLimit-Policy`` at ``wall``: it changes only as a quota enters another window."""
        if not self._since <= wall < self._until:
            for quota in self._quotas:
                quota.enter(wall)
            self._since = max((quota.start_ns for quota in self._quotas), default=0)
            self._until = min((quota.end_ns for quota in self._quotas), default=1 << 63)
            streaming = self.terms.route.streaming
            streams = None if streaming is None else streaming.max_per_tenant
            self._policies = policy_header(self.terms.entries, self.terms.concurrency, streams)
        return self._policies

    def reject(self, denied: Denied) -> None:
        """Count a refusal, or in shadow mode what would have been one."""
        terms = self.terms
        spec = REJECTIONS if denied.enforced else SHADOW_REJECTIONS
        policy = denied.waits[0][0] if denied.waits else denied.reason
        at = self._rejections.get((denied.reason, policy))
        if at is None:
            name = policy if denied.waits else ""
            at = self._rejections[denied.reason, policy] = self._cells.index(
                spec, denied.reason, name, terms.plan, terms.priority
            )
        self._cells.values[at] += 1


@final
class Callers:
    """Callers of one profile, and their lanes by the position of the rule (-1 for the default rule)."""

    __slots__ = ("lanes", "profile")

    def __init__(self, profile: Profile, rules: int) -> None:
        self.profile = profile
        self.lanes: list[Lane | None] = [None] * (rules + 1)


@final
class Gate:
    """Everything that one policy needs at run time. Immutable, but for lanes that are compiled when first asked for.

    ``before`` is the gate whose place this one is going to take. What is in flight, waits or is open is known to both.
    """

    def __init__(
        self,
        policy: Policy,
        backend: Backend,
        cells: Cells,
        *,
        parts: frozenset[str],
        concurrency: TenantConcurrency,
        clock: Clock,
        wall_clock: Clock,
        random: Callable[[], float],
        before: Gate | None = None,
    ) -> None:
        self._before = before
        self.policy = policy
        self.backend = backend
        self.shared = backend if isinstance(backend, SharedBackend) else None
        self.fleet = backend if isinstance(backend, FleetBackend) else None
        self._random = random
        self.cells = cells
        self.parts = parts
        self.concurrency = concurrency
        self.clock = clock
        self.wall_clock = wall_clock
        self.clients = ClientIP(policy.identity)
        shedding, priorities = "shedding" in parts, "priority" in parts
        self._settings = settings = settings_of(policy, priorities=priorities) if shedding or priorities else None
        self.turnstile: Turnstile | None = None
        if settings is not None:
            # What is not told apart waits as the class that has none.
            names = [one.name for one in settings.classes]
            self._waits = [
                dict(zip(RESULTS, cells.block(QUEUE_WAIT, "result", RESULTS, priority=name), strict=True))
                for name in names
            ]
            self.turnstile = before.turnstile if before is not None else None
            if self.turnstile is None:
                self.turnstile = Turnstile(settings, clock, changed=self._changed, waited=self._waited)
        self.hints = Hints(policy, self.clients.peer, wall_clock) if shedding or priorities else None
        self._deadlines, self._priorities = shedding, priorities
        body_timeout = policy.shedding.body_timeout_ns
        self.body_timeout = body_timeout / SECOND if shedding and body_timeout is not None else None
        self._ignored = {name: cells.index(IGNORED_HEADERS, name) for name in self.hints.headers} if self.hints else {}
        self.streams: Streams | None = None
        self.admission = Admission(self._stages())
        self.admit = self.admission.admit
        authorization = any(name == "authorization" for _, name in policy.identity.tenant)
        self.answers = Answers(policy.responses, random, challenge=b"Bearer" if authorization else b"ApiKey")
        self.routes = RouteTable(policy.routes)
        # Known before the caller is, so that probes are served under `anonymous: deny`. The last is the default rule's.
        self.passes = [
            route.exempt or Mode.OFF in (route.mode, policy.mode) for route in (*policy.routes, DEFAULT_ROUTE)
        ]
        self.modes = [min(route.mode, policy.mode) for route in (*policy.routes, DEFAULT_ROUTE)]
        self.denies = NetworkSet(policy.access.deny)
        self.exempts = NetworkSet(policy.access.exempt)
        self.guarded = bool(self.denies or self.exempts)
        self.tenants = TenantSource(policy.identity, policy.keys, wall_clock)
        self.labels: TenantLabels | None = None
        if policy.metrics.tenant_label:
            self.labels = (before.labels if before is not None else None) or TenantLabels(cells, 0)
        self.nobody = cells.block(REQUESTS, "outcome", OUTCOMES, priority="none")
        for one in policy.priorities:
            # Also of classes that only a header gives: an alert on the first needs a series that was 0 before.
            cells.block(REQUESTS, "outcome", OUTCOMES, priority=one.name)
        self._positions = self.turnstile.positions([route.name for route in policy.routes]) if self.turnstile else {}
        self._compiler = TermsCompiler(policy, backend, parts, self._positions)
        self._listed, self._others, self._anonymous = self._callers()
        self._log_key = hash_key(policy.backend.key_prefix, policy.backend.secret)
        self._known: dict[Known, Callers] = {}
        self._alike: dict[str, Callers] = {}
        if before is None:
            self.enter_into_force()

    def enter_into_force(self) -> None:
        """Let what outlives a policy go on by this one: the limiters, the streams that are open, the tenants' labels.

        Of a gate that follows another, called as it takes its place.
        """
        policy, self._before = self.policy, None
        if self.turnstile is not None and self._settings is not None:
            self.turnstile.change(self._settings, self._positions, self._changed, self._waited)
        if self.streams is not None:
            self.streams.status = policy.shedding.status
        if self.labels is not None:
            self.labels.top = policy.metrics.tenant_label

    def _stages(self) -> list[Stage]:
        """The questions, in the order in which they are asked."""
        policy, parts, turnstile, random = self.policy, self.parts, self.turnstile, self._random
        status = policy.shedding.status
        stages: list[Stage] = []
        if self.hints is not None:
            stages.append(Screening(turnstile, self.clock, status, random))
        if self._deadlines and any(route.streaming for route in policy.routes):
            self.streams = (self._before.streams if self._before is not None else None) or Streams(status, random)
            stages.append(self.streams)
        plans = [*policy.plans.values(), *(tenant.plan for tenant in policy.tenants.values())]
        limited = "concurrency" in parts and any(plan.concurrency for plan in plans)
        if limited and self.fleet is None:
            stages.append(self.concurrency)
        if parts & {"rate", "quota"}:
            shared = self.shared
            stages.append(Spending(self.backend) if shared is None else SharedSpending(shared, random))
        if turnstile is not None:
            stages.append(Entrance(turnstile, self.clock, status, random))
        return stages

    def __repr__(self) -> str:
        policy = self.policy
        return f"<Gate {policy.mode.name.lower()}, {len(policy.tenants)} tenants, {len(policy.routes)} rules>"

    def _callers(self) -> tuple[dict[str, Callers], Callers | None, Callers | None]:
        rules = len(self.policy.routes)
        listed, other, anonymous = self._compiler.profiles()
        alike: dict[int, Callers] = {}
        for profile in listed.values():
            alike.setdefault(id(profile), Callers(profile, rules))
        others = Callers(other, rules) if other else None
        nameless = Callers(anonymous, rules) if anonymous else None
        groups = [group for group in (others, nameless) if group]
        if len(alike) * (rules + 1) <= EAGER_LANES:
            groups += alike.values()
        for group in groups:
            for position in range(-1, rules):
                self._open_lane(group, position)
        return {tenant: alike[id(profile)] for tenant, profile in listed.items()}, others, nameless

    def _open_lane(self, callers: Callers, position: int) -> Lane:
        route = DEFAULT_ROUTE if position < 0 else self.policy.routes[position]
        lane = callers.lanes[position] = Lane(self._compiler.terms(callers.profile, route), self.cells)
        return lane

    def hinted(self, lane: Lane, hint: Hint) -> Lane:
        """The lane for a request that has said something about itself; what was nonsense is counted."""
        for name in hint.ignored:
            self.cells.values[self._ignored[name]] += 1
        if hint.priority is None or not self._priorities or self.hints is None:
            return lane
        own = lane.terms.priority
        asked = self.hints.effective(hint.priority, own, hint.raises)
        if asked == own:
            return lane
        other = lane.others.get(asked)
        if other is None:
            other = lane.others[asked] = Lane(self._compiler.with_priority(lane.terms, asked), self.cells)
        return other

    def deadline(self, hint: Hint) -> int:
        """The instant after which a request is of no use, 0 for none."""
        return hint.deadline_ns if self._deadlines else 0

    def _changed(self, reason: str) -> None:
        self.cells.values[self.cells.index(LIMIT_CHANGES, reason)] += 1

    def _waited(self, klass: int, waited: int, result: str) -> None:
        """Count how long a request has waited, and what became of it."""
        at = self._waits[klass][result]
        self.cells.values[at + bisect_left(_WAIT_BOUNDS, waited)] += 1
        self.cells.values[at + len(_WAIT_BOUNDS) + 1] += waited

    def caller(self, key: Key) -> tuple[str, str]:
        """Who a key is of, for the status page, and of what kind."""
        if isinstance(key, str):
            return key, "tenant"
        if key == NOBODY:
            return "anonymous", "anonymous"
        shown = show_address(key)
        prefix = self.policy.identity.ipv6_prefix
        return (f"{shown}/{prefix}" if len(key) == 16 and prefix < 128 else shown), "address"

    def called(self, key: Key) -> str:
        """Who a key is of, for logs: an address by a short keyed hash, which tells addresses apart and nothing else."""
        if isinstance(key, str):
            return printable(key)
        return "anonymous" if key == NOBODY else f"address {blake2b(key, digest_size=5, key=self._log_key).hexdigest()}"

    def lanes_of(self, tenant: str, known: Known | None = None) -> list[Lane]:
        """All lanes of a tenant, of whom ``known`` is as for `lane`: of the default rule, then of each in the file."""
        callers = self._listed.get(tenant) or (self._others if known is None else self.known(known))
        if callers is None:
            return []
        rules = range(-1, len(self.policy.routes))
        return [callers.lanes[position] or self._open_lane(callers, position) for position in rules]

    def entries(self, limit: Any, lane: Lane) -> list[Entry]:
        """The entries that a limit outside the policy has for the callers of ``lane``."""
        return self._compiler.outside(limit, lane.terms.profile)

    def spend(self, charges: Sequence[Charge], terms: Terms) -> Verdict | None | Awaitable[Verdict | None]:
        """`Backend.spend`, for a limit outside the policy."""
        return self.backend.spend(charges) if self.shared is None else self.shared.spend(charges, terms.failure)

    def unanswered(self, terms: Terms) -> Denied | None:
        """What becomes of a request whose `spend` nobody answered."""
        return None if self.shared is None else unanswered(self.shared, terms, self._random)

    def known(self, known: Known) -> Callers | None:
        """The callers that a tenant out of a database is one of."""
        callers = self._known.get(known)
        if callers is None and known.written is not None:
            try:
                tenant = compile_tenant(known.id, known.written, self.policy)
            except ConfigError as error:
                advice.once(str(error), f"{error.diagnostics[0].message}; it is held to the default plan")
                return self._others
            if len(self._known) >= MOST_KNOWN:
                self._known.clear()
                self._alike.clear()
            terms = known.written.model_dump_json(exclude={"id"})
            callers = self._alike.get(terms)
            if callers is None:
                profile = Profile(tenant.plan, KNOWN, tenant.priority, tenant.mode)
                callers = self._alike[terms] = Callers(profile, len(self.policy.routes))
            self._known[known] = callers
        return callers

    def lane(
        self, scope: Scope, position: int, tenant: str | None, address: bytes | None, known: Known | None = None
    ) -> tuple[Lane, Key, bytes | None] | None:
        """The lane of an identified tenant (``None``: of nobody) on a rule, and the keys of its buckets.

        ``None`` where nobody is refused. ``known`` is what a database says of a tenant that the file does not list.
        """
        if tenant is not None:
            callers = self._listed.get(tenant) or (self._others if known is None else self.known(known))
            principal: Key = tenant
        else:
            callers = self._anonymous
            if callers is not None and callers.profile.store == "address":
                if address is None:
                    address = self.clients.key(scope)
                principal = address
            else:
                principal = NOBODY
        if callers is None:
            return None
        return callers.lanes[position] or self._open_lane(callers, position), principal, address
