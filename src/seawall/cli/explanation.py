"""What Seawall makes of one request, found out by asking Seawall.

The request is driven through a real `Seawall` in front of an application that notes what arrives, with an empty memory
of its own. What was decided is read off that run: the answer, the metric that went up, the lane the request was in. The
reasons come from the objects that decided (`Gate`, `RouteTable`, `ClientIP`, `TenantSource`, `Hints`, `Limiter`), asked
again with one condition changed: a rule without its methods, a key at the beginning of time, a request without one of
its headers. Nothing here knows a rule by itself.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Literal, TypeAlias, final

from seawall.admission import DEFAULT_ROUTE, Entry, Terms, Ticket, charges_of
from seawall.asgi import Seawall
from seawall.backends.memory import MemoryBackend
from seawall.decision import Mode
from seawall.exchange import SCOPE_KEY, Exchange
from seawall.gate import Gate, Lane
from seawall.hints import Hint
from seawall.identity import TenantSource, show_address
from seawall.metrics import REJECTIONS, REQUESTS, SHADOW_REJECTIONS, Cells
from seawall.policy import Identity, Policy, Route, Streaming
from seawall.rate import SECOND, Rate
from seawall.responses import allowance
from seawall.routing import RouteTable, has_control_character, path_below_root
from seawall.testing import Answer, ManualClock, drive

Scope: TypeAlias = MutableMapping[str, Any]

CLAIM = "seawall.explain"
"""The key of ``scope["state"]`` by which a request is given a tenant without proving it."""


@final
@dataclass(frozen=True, slots=True)
class Rule:
    """Which rule holds. ``position`` counts from 1; 0 is the default rule, of everything that matches none."""

    name: str
    position: int
    paths: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]
    """The rules before it, and why each of them does not match."""
    hidden: tuple[str, ...]
    """Rules after it that would match as well."""


@final
@dataclass(frozen=True, slots=True)
class Caller:
    """Who is calling. ``kind`` is ``unasked`` where the decision did not depend on it."""

    kind: Literal["tenant", "anonymous", "unidentified", "unasked"]
    tenant: str | None
    listed: bool
    plan: str | None
    overridden: bool
    """Whether the tenant has overrides of its plan."""
    address: str
    bucket: str
    address_from: str
    sources: tuple[str, ...]
    """What each source of identity said, in the order in which they were asked."""


@final
@dataclass(frozen=True, slots=True)
class Limit:
    """One limit of the request: ``amount`` in ``period_ns``, at most ``burst`` at once (a quota has none)."""

    name: str
    kind: Literal["rate", "quota"]
    allowance: str
    amount: int
    period_ns: int
    burst: int | None
    cost: int
    whose: str
    remaining: int
    fits: bool
    """Whether the cost can ever be paid."""


@final
@dataclass(frozen=True, slots=True)
class Overload:
    """What becomes of a request when more comes than the service can do. Times are in seconds.

    ``initial``, ``min`` and ``max`` are requests in flight at once, ``waits`` is how long this one waits for its turn
    at most, ``min_share`` the part of the service (0..1) that its class has in any case. ``enforced`` is whether it is
    refused then, and with ``status``. ``streaming`` is the budget of a rule for streams.
    """

    algorithm: str
    initial: int
    min: int
    max: int
    classes: tuple[str, ...]
    """All classes, the most important first; of the request's own `Explanation.priority` says which it is."""
    waits: float
    min_share: float | None
    status: int
    enforced: bool
    streaming: Streaming | None


@final
@dataclass(frozen=True, slots=True)
class Explanation:
    """Everything about one request that the configuration decides.

    ``outcome`` is the metric's (allowed, limited, expired, denied, exempt), or ``passed`` where a request is not even
    counted. ``status`` and ``body`` are there if Seawall answers by itself. ``deadline`` is in seconds from its
    arrival, 0 where that has been before. ``overload`` is ``None`` where nothing is shed.
    """

    method: str
    path: str
    websocket: bool
    outcome: str
    because: str
    status: int | None
    rule: Rule
    caller: Caller
    mode: str
    modes: Mapping[str, str]
    lowered_by: tuple[str, ...]
    priority: str
    priority_from: str
    deadline: float | None
    deadline_from: str
    overload: Overload | None
    limits: tuple[Limit, ...]
    concurrency: int | None
    would_refuse: bool
    headers: tuple[tuple[str, str], ...]
    body: str
    notes: tuple[str, ...] = field(default=())


@final
class _Recorder:
    """An application that answers 200 and keeps the scope it was called with."""

    def __init__(self) -> None:
        self.scope: Scope | None = None

    async def __call__(
        self, scope: Scope, receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Awaitable[None]]
    ) -> None:
        self.scope = dict(scope)
        if scope["type"] == "websocket":
            await send({"type": "websocket.accept", "headers": []})
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})


async def explain(
    policy: Policy, scope: Mapping[str, Any], *, tenant: str | None = None, at: str | None = None
) -> Explanation:
    """What ``policy`` makes of ``scope``, as its first request.

    ``tenant`` is believed without proof, whatever the policy's sources are. ``at`` is when that is, in ISO 8601; by
    default now.
    """
    scope = dict(scope)
    if tenant is not None:
        scope["state"] = {**scope.get("state", {}), CLAIM: tenant}
        claim: tuple[Literal["state"], str] = ("state", CLAIM)
        policy = replace(policy, identity=replace(policy.identity, tenant=(claim, *policy.identity.tenant)))
    recorder = _Recorder()
    # Time stands still, or a fast bucket would have refilled before it is looked at.
    clock = ManualClock(at or datetime.now(UTC).isoformat())
    backend = MemoryBackend(max_keys=policy.backend.max_keys, clock=clock, wall_clock=clock.wall_ns)
    shell = Seawall(recorder, policy, backend=backend, clock=clock)
    before = _counts(shell.gate.cells)
    if scope.get("type") == "websocket":
        # Servers that can refuse a connection with a status are the ones worth explaining.
        scope["extensions"] = {"websocket.http.response": {}}
    answer = await drive(shell, scope)
    counted = [series for series, count in _counts(shell.gate.cells).items() if count > before.get(series, 0)]
    return _Case(policy, shell.gate, scope, recorder.scope, answer, counted).told()


def _counts(cells: Cells) -> dict[tuple[str, tuple[str, ...]], int]:
    kept = (REQUESTS, REJECTIONS, SHADOW_REJECTIONS)
    return {(spec.name, labels): cells.values[at] for spec, labels, at in cells.series() if spec in kept}


@final
class _Case:
    """One request after it was decided, and what there is to say about it."""

    def __init__(
        self,
        policy: Policy,
        gate: Gate,
        asked: Scope,
        arrived: Scope | None,
        answer: Answer,
        counted: list[tuple[str, tuple[str, ...]]],
    ) -> None:
        self.policy = policy
        self.gate = gate
        self.arrived = arrived
        self.answer = answer
        self.scope: Scope = {"type": "http", "method": "GET", "root_path": "", "headers": [], **asked}
        self.websocket = self.scope["type"] == "websocket"
        self.method = "GET" if self.websocket else str(self.scope["method"])
        self.path = path_below_root(self.scope)
        self.outcome = next((labels[0] for name, labels in counted if name == REQUESTS.name), "passed")
        self.unidentified = any(name == REJECTIONS.name and labels[0] == "unidentified" for name, labels in counted)
        self.would_refuse = any(name == SHADOW_REJECTIONS.name for name, _ in counted)
        self.position = gate.routes.match(self.path, self.method)
        self.address = gate.clients.resolve(self.scope)
        self.tenant = gate.tenants.find(self.scope)
        self.found = gate.lane(self.scope, self.position, self.tenant, None)
        visit = arrived.get(SCOPE_KEY) if arrived else None
        self.exchange = visit if isinstance(visit, Exchange) else None
        self.hint = self._read(self.scope["headers"])

    @property
    def route(self) -> Route:
        return DEFAULT_ROUTE if self.position < 0 else self.policy.routes[self.position]

    @property
    def lane(self) -> Lane | None:
        """The lane that the request was in; none where it was turned away or waved through before it had one."""
        if self.exchange is not None:
            return self.exchange.lane
        # Refused in its lane: the application has not seen it.
        if self.found is None or self.outcome not in ("limited", "expired"):
            return None
        lane = self.found[0]
        return lane if self.hint is None else self.gate.hinted(lane, self.hint)

    def _read(self, headers: Iterable[tuple[bytes, bytes]]) -> Hint | None:
        """What ``headers`` say of the request, as of its arrival: time stands still."""
        hints = self.gate.hints
        return None if hints is None else hints.read({**self.scope, "headers": list(headers)}, self.gate.clock())

    def told(self) -> Explanation:
        lane = self.lane
        terms = lane.terms if lane else None
        modes, lowered = self._modes(terms)
        priority, priority_from = self._priority(terms)
        deadline, deadline_from = self._deadline() if terms else (None, "")
        by_seawall = self.arrived is None
        return Explanation(
            method=self.method,
            path=str(self.scope["path"]),
            websocket=self.websocket,
            outcome=self.outcome,
            because=self._because(terms),
            status=self.answer.status if by_seawall else None,
            rule=self._rule(),
            caller=self._caller(terms),
            mode=(terms.mode if terms else min(self.policy.mode, self.route.mode)).name.lower(),
            modes=modes,
            lowered_by=lowered,
            priority=priority,
            priority_from=priority_from,
            deadline=deadline,
            deadline_from=deadline_from,
            overload=self._overload(terms) if terms else None,
            limits=self._limits(lane) if lane else (),
            concurrency=terms.concurrency if terms else None,
            would_refuse=self.would_refuse,
            headers=tuple(self.answer.headers.items()) if self.outcome != "exempt" else (),
            body=self.answer.body.decode() if by_seawall and self.outcome != "exempt" else "",
            notes=self._notes(terms),
        )

    def _because(self, terms: Terms | None) -> str:
        """The decision in a few words."""
        if self.outcome == "passed":
            return "a CORS preflight is never limited and never counted"
        if self.unidentified:
            return "nobody is identified, and the policy wants to know who is calling"
        if self.outcome == "denied":
            control = has_control_character(self.path)
            return "the path has a control character" if control else "the address is in access.deny"
        if self.outcome == "exempt":
            return self._why_exempt(terms)
        if self.outcome == "expired":
            return "its deadline has passed before it came"
        if self.outcome == "limited":
            return "it costs more than can ever be saved up"
        if terms is not None and terms.mode is Mode.SHADOW:
            return "shadow: would be refused" if self.would_refuse else "shadow: counted, never refused"
        return "within its limits" if terms and (terms.entries or terms.concurrency) else "nothing limits it"

    def _why_exempt(self, terms: Terms | None) -> str:
        if self.arrived is None:
            return "Seawall serves metrics on this path"
        if terms is not None:
            return "a mode of off holds for this caller"
        if self.address in self.gate.exempts and not self.gate.passes[self.position]:
            return "the address is in access.exempt"
        return "the rule is exempt" if self.route.exempt else "the mode is off"

    def _rule(self) -> Rule:
        routes = self.policy.routes
        before = routes if self.position < 0 else routes[: self.position]
        after = () if self.position < 0 else routes[self.position + 1 :]
        return Rule(
            name=self.route.name,
            position=self.position + 1,
            paths=self.route.paths,
            skipped=tuple((route.name, self._why_not(route)) for route in before),
            hidden=tuple(route.name for route in after if self._matches(route)),
        )

    def _matches(self, route: Route) -> bool:
        return RouteTable([route]).match(self.path, self.method) == 0

    def _why_not(self, route: Route) -> str:
        if self._matches(replace(route, methods=None)):
            return f"the method is {self.method}, not {' or '.join(sorted(route.methods or ()))}"
        if route.exempt and self._matches(replace(route, exempt=False)):
            return "an exempt rule frees the exact spelling only"
        return "the path is another"

    def _caller(self, terms: Terms | None) -> Caller:
        gate = self.gate
        kind: Literal["tenant", "anonymous", "unidentified", "unasked"] = "unasked"
        if terms is not None:
            kind = "tenant" if self.tenant is not None else "anonymous"
        elif self.unidentified:
            kind = "unidentified"
        asked = kind != "unasked"
        return Caller(
            kind=kind,
            tenant=self.tenant if asked else None,
            listed=asked and self.tenant in self.policy.tenants,
            plan=terms.plan if terms else None,
            overridden=terms is not None and terms.profile.plan != self.policy.plans[terms.plan],
            address=show_address(self.address),
            bucket=self._network(gate.clients.bucket(self.address)),
            address_from=self._address_from(),
            sources=self._sources() if asked else (),
        )

    def _address_from(self) -> str:
        clients = self.gate.clients
        peer = clients.peer(self.scope)
        header = self.policy.identity.header
        sent = any(name == header.encode() for name, _ in self.scope["headers"])
        if not sent:
            return "the direct peer"
        if not clients.trusts(peer):
            return f"the direct peer; it is no trusted proxy, so its {header} header is ignored"
        if self.address == peer:
            return f"the direct peer; its {header} header names nobody"
        return f"the {header} header of the trusted proxy {show_address(peer)}"

    def _sources(self) -> tuple[str, ...]:
        told = []
        identity = self.policy.identity
        for kind, name in identity.tenant:
            alone = replace(identity, tenant=((kind, name),))
            found = TenantSource(alone, self.policy.keys, self.gate.wall_clock).find(self.scope)
            if name == CLAIM:
                told.append("given with --tenant")
            elif kind == "state":
                told.append(f"state {name}: {'nothing' if found is None else found}")
            else:
                told.append(f"header {name}: {self._key_said(name, found, alone)}")
            if found is not None:
                break
        return tuple(told)

    def _key_said(self, header: str, found: str | None, alone: Identity) -> str:
        """What an API key's header yielded. The key is not shown."""
        if found is not None:
            return f"a key of {found}"
        if not any(name == header.encode() for name, _ in self.scope["headers"]):
            return "no key"
        once = TenantSource(alone, self.policy.keys, lambda: 0).find(self.scope)
        return "a key that is not listed" if once is None else f"a key of {once} that has expired"

    def _modes(self, terms: Terms | None) -> tuple[dict[str, str], tuple[str, ...]]:
        levels = {"file": self.policy.mode, "route": self.route.mode}
        if terms is not None:
            levels["plan"] = terms.profile.plan.mode
            levels["tenant"] = terms.profile.mode
        lowest = terms.mode if terms else min(levels.values())
        lowered = tuple(level for level, mode in levels.items() if mode == lowest < Mode.ENFORCE)
        return {level: mode.name.lower() for level, mode in levels.items()}, lowered

    def _priority(self, terms: Terms | None) -> tuple[str, str]:
        if terms is None:
            return "none", "requests that are not limited have none"
        own, source = self._own_priority(terms)
        if terms.priority == own:
            return own, source
        return terms.priority, f"asked for by the {self._asking()} header; its own is {own}, {source}"

    def _own_priority(self, terms: Terms) -> tuple[str, str]:
        """The priority that a request has if it says nothing about itself, and whose it is."""
        candidates = (
            ("the tenant", terms.profile.priority),
            ("the route", self.route.priority),
            ("the plan", terms.profile.plan.priority),
        )
        unset = ("nobody sets one", self.policy.middle_priority)
        source, own = next(((name, priority) for name, priority in candidates if priority is not None), unset)
        return own, source

    def _asking(self) -> str:
        """The headers that alone would ask for the same priority."""
        wanted = self.hint.priority if self.hint else None
        alone = ((name, self._read([(name, value)])) for name, value in self.scope["headers"])
        return " and ".join(dict.fromkeys(name.decode() for name, hint in alone if hint and hint.priority == wanted))

    def _deadline(self) -> tuple[float | None, str]:
        """Seconds from the arrival to the deadline, and the headers without which it would be another."""
        until = self.gate.deadline(self.hint) if self.hint else 0
        if not until:
            return None, ""
        headers = self.scope["headers"]
        said = []
        for name in dict.fromkeys(name for name, _ in headers):
            without = self._read(header for header in headers if header[0] != name)
            if without is None or without.deadline_ns != until:
                said.append(name.decode("latin-1"))
        return max(0, until - self.gate.clock()) / SECOND, " and ".join(said)

    def _overload(self, terms: Terms) -> Overload | None:
        if self.gate.turnstile is None:
            return None
        shedding, limiter = self.policy.shedding, self.gate.turnstile.current
        klass = self.policy.priorities[terms.klass]
        streaming = terms.route.streaming
        return Overload(
            algorithm=shedding.algorithm,
            initial=shedding.initial,
            min=shedding.min,
            max=shedding.max,
            classes=tuple(one.name for one in self.policy.priorities),
            waits=limiter.patience[terms.klass] / SECOND,
            min_share=klass.min_share,
            status=shedding.status,
            enforced=terms.guarded,
            streaming=streaming,
        )

    def _limits(self, lane: Lane) -> tuple[Limit, ...]:
        terms = lane.terms
        if self.found is None or not terms.entries or terms.mode is Mode.OFF:
            return ()
        _, principal, address = self.found
        ticket = Ticket(self.scope, terms, self.tenant, principal, self.gate.clients.key, address)
        # A cost of nothing is a look at what is left.
        verdict: Any = self.gate.backend.spend(charges_of(ticket, [(m, whose, 0) for m, whose, _ in terms.charges]))
        per = {id(entry.meter): limit.per for limit in self.route.limits for entry in self.gate.entries(limit, lane)}
        return tuple(
            self._limit(entry, left, ("tenant",) if entry.of_plan else per[id(entry.meter)], ticket)
            for entry, left in zip(terms.entries, verdict.left, strict=True)
        )

    def _limit(self, entry: Entry, left: int, per: tuple[str, ...], ticket: Ticket) -> Limit:
        rate = entry.rate
        if isinstance(rate, Rate):
            amount, period_ns, burst = rate.amount, rate.period_ns, rate.burst
        else:
            amount, period_ns, burst = rate.limit, rate.end_ns - rate.start_ns, None
        return Limit(
            name=entry.name,
            kind=entry.kind,
            allowance=allowance(entry),
            amount=amount,
            period_ns=period_ns,
            burst=burst,
            cost=entry.cost,
            whose=" and ".join(dict.fromkeys(self._whose(kind, ticket) for kind in per)),
            remaining=left,
            fits=entry.cost <= entry.limit,
        )

    def _whose(self, kind: str, ticket: Ticket) -> str:
        """Whose bucket it is."""
        if kind == "global":
            return "everybody"
        if kind == "client_ip":
            return f"address {self._network(ticket.address)}"
        if kind.startswith("state:"):
            name = kind.removeprefix("state:")
            return f"{kind} {(self.scope.get('state') or {}).get(name, 'nothing')}"
        if self.tenant is not None:
            return f"tenant {self.tenant}"
        if ticket.terms.profile.store == "address":
            return f"address {self._network(ticket.address)}"
        return "all anonymous callers"

    def _network(self, bucket: bytes) -> str:
        prefix = self.policy.identity.ipv6_prefix
        return show_address(bucket) + (f"/{prefix}" if len(bucket) == 16 and prefix < 128 else "")

    def _notes(self, terms: Terms | None) -> tuple[str, ...]:
        notes = []
        if terms is not None and self.hint is not None:
            notes += [f"the {name} header makes no sense and is ignored" for name in self.hint.ignored]
            if self.hint.priority not in (None, terms.priority):
                words = f"the {self._asking()} header asks for {self.hint.priority}, which is above its own"
                notes.append(f"{words}: only a peer in priority_header.raise_from may raise, if it forwards for nobody")
        if self.gate.clients.trusts_nobody and "forwarded" in self._address_from():
            notes.append("no proxy is trusted (identity.client_ip.trusted_proxies)")
        if self.tenant is not None and self.found is None:
            notes.append("this tenant is not in the file, and there is no plan for such (defaults.plan)")
        return tuple(notes)
