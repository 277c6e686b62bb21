"""What is allowed and probably not meant: warnings, each at its place.

It runs on a policy without errors, so it may trust the data; the documents are there to know what was written where.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias, final

from seawall.config.document import Document, Path
from seawall.config.values import expiry, passwords
from seawall.decision import Mode
from seawall.notation import MILLISECOND, shorten
from seawall.policy import Plan, Policy, Route, RouteLimit
from seawall.rate import SECOND, Quota, Rate

Clock: TypeAlias = Callable[[], int]

_ENOUGH = 20
"""So many warnings of one kind are shown: 10,000 expired keys are one piece of news."""

_COMPARISONS = 200_000
"""So many pairs of paths are compared, which is a fraction of a second; a file with more goes without the rest."""

_PATIENCE = 5 * SECOND
"""Who has waited so long has given up; a queue that holds its callers longer works for nobody."""

_LAG = 100 * MILLISECOND
"""A request pays the lag once for each time that it waits, so at this it is slow wherever the limit is."""

_HELD_UP = 250 * MILLISECOND
"""People notice a wait from here on, and while a store is slow every request has it."""

_MEANT_OTHERWISE = {
    "baggage": "is W3C Baggage, of which 'criticality' is read anyway and may only lower",
    "priority": "orders the parts of one page (RFC 9218) and names no class; browsers send it with every request",
    **dict.fromkeys(
        ("grpc-timeout", "x-envoy-expected-rq-timeout-ms", "x-request-timeout-ms", "x-request-start"),
        "says how long a caller waits, and names no class",
    ),
}
"""Headers that `seawall.hints` reads as something else, or whose values are never the name of a class."""
_SAYS_FORWARDED = frozenset(
    ("forwarded", "via", "x-real-ip", "x-client-ip", "true-client-ip", "cf-connecting-ip", "x-cluster-client-ip")
)
"""Headers by which a request is known to be forwarded (`seawall.identity.is_forwarded`), beside ``x-forwarded-*``."""


def check(policy: Policy, main: Document, included: Sequence[Document], clock: Clock = time.time_ns) -> None:
    """Note what ``policy`` is warned about in the documents it came from."""
    _Lint(policy, main, included, clock()).run()


@final
class _Lint:
    def __init__(self, policy: Policy, main: Document, included: Sequence[Document], now: int) -> None:
        self.policy = policy
        self.main = main
        self.now = now
        self.tenants = [
            (document, name, tenant) for document in (main, *included) for name, tenant in _tenants(document)
        ]
        self.used = self._used_plans()
        self.told: Counter[str] = Counter()

    def run(self) -> None:
        self.unused_plans()
        self.plans()
        self.modes()
        self.costs()
        self.of_tenants()
        self.keys()
        self.hidden_routes()
        self.settings()
        self.quotas_in_memory()
        self.priorities()
        self.priority_header()
        self.shedding()
        self.shared_state()

    def warn(
        self, code: str, message: str, *path: str | int, document: Document | None = None, key: bool = False
    ) -> None:
        self.told[code] += 1
        if self.told[code] == _ENOUGH:
            message += " (more of these are not shown)"
        if self.told[code] <= _ENOUGH:
            (document or self.main).report(code, message, path, at_key=key, severity="warning")

    def _used_plans(self) -> set[str]:
        # The default plan counts as used: whom `identify` or an outer middleware names is not in the file.
        used = {tenant.plan.name for tenant in self.policy.tenants.values()}
        used |= {self.policy.default_plan or ""}
        if self.policy.identity.anonymous != "deny":
            used |= {self.policy.anonymous_plan or ""}
        return used

    def unused_plans(self) -> None:
        for name in self.policy.plans:
            if name not in self.used:
                self.warn("W002", f"nobody is on plan '{name}'", "plans", name, key=True)

    def plans(self) -> None:
        for name, plan in self.policy.plans.items():
            self.small_quota(plan.rates, plan.quota, "plans", name, "quota")
        for index, route in enumerate(self.policy.routes):
            for limit in route.limits:
                self.small_quota(limit.rates, limit.quota, "routes", index, "limits", limit.name, "quota")

    def small_quota(
        self, rates: tuple[Rate, ...], quota: Quota | None, *path: str | int, document: Document | None = None
    ) -> None:
        burst = max((rate.burst for rate in rates), default=0)
        if quota is not None and quota.limit < burst:
            message = f"the quota ({quota.limit:_} a {quota.span}) is less than what may come at once ({burst:_})"
            self.warn("W004", message, *path, document=document)

    def modes(self) -> None:
        for name, plan in self.main.root.get("plans", {}).items():
            self.mode(plan, self.main, "plans", name)
        for index, route in enumerate(self.main.root.get("routes", ())):
            self.mode(route, self.main, "routes", index)
        for document, name, tenant in self.tenants:
            if "mode" in tenant:
                self.mode(tenant, document, "tenants", name)

    def mode(self, written: dict[str, Any], document: Document, *path: str | int) -> None:
        above = self.policy.mode
        if "mode" in written and Mode[written["mode"].upper()] > above:
            message = f"'mode: {written['mode']}' has no effect: the file's mode is {above.name.lower()}"
            self.warn("W006", message, *path, "mode", document=document)

    def costs(self) -> None:
        plans = [plan for name, plan in self.policy.plans.items() if name in self.used]
        own = {id(plan) for plan in self.policy.plans.values()}
        for index, route in enumerate(self.policy.routes):
            for limit in route.limits:
                if _never_fits(limit.cost, limit):
                    message = f"a cost of {limit.cost:_} never fits this limit: every request is refused"
                    self.warn("W003", message, "routes", index, "limits", limit.name, "cost")
            if route.exempt or route.cost == 1:
                continue
            refused = [f"plan '{plan.name}'" for plan in plans if _never_fits(route.cost, plan)]
            refused += [
                f"tenant {shorten(tenant.id)}"
                for tenant in self.policy.tenants.values()
                if id(tenant.plan) not in own and _never_fits(route.cost, tenant.plan)
            ]
            if refused:
                more = f" and {len(refused) - 5} more" if len(refused) > 5 else ""
                message = (
                    f"a cost of {route.cost:_} never fits {', '.join(refused[:5])}{more}: every request is refused"
                )
                self.warn("W003", message, "routes", index, "cost")

    def of_tenants(self) -> None:
        for document, name, written in self.tenants:
            if "overrides" not in written:
                continue
            has = self.policy.tenants[name].plan
            plan = self.policy.plans[has.name]
            path = ("tenants", name, "overrides")
            for key, mine, its in (
                ("rate", has.rates, plan.rates),
                ("quota", has.quota, plan.quota),
                ("concurrency", has.concurrency, plan.concurrency),
                ("priority", has.priority, plan.priority),
            ):
                if key in written["overrides"] and mine == its:
                    self.warn("W010", f"this is what plan '{plan.name}' has anyway", *path, key, document=document)
            if has.quota != plan.quota or has.rates != plan.rates:
                self.small_quota(has.rates, has.quota, *path, document=document)

    def keys(self) -> None:
        if not self.policy.keys:
            return
        if not any(kind == "api_key" for kind, _ in self.policy.identity.tenant):
            document, name, _ = next(entry for entry in self.tenants if entry[2].get("keys"))
            message = "these keys are never looked up: identity.tenant has no {api_key: {header: ...}}"
            self.warn("W011", message, "tenants", name, "keys", document=document, key=True)
        for document, name, written in self.tenants:
            for index, key in enumerate(written.get("keys", ())):
                if isinstance(key, dict) and "expires" in key and expiry(key["expires"]) <= self.now:
                    path = ("tenants", name, "keys", index, "expires")
                    self.warn("W009", "this key has expired", *path, document=document)

    def hidden_routes(self) -> None:
        above = _Covering()
        for index, route in enumerate(self.policy.routes):
            hiding = [above.first(path, route) for path in route.paths]
            written = self.main.root["routes"][index]["match"]["path"]
            found = [(number, other) for number, other in enumerate(hiding) if other is not None]
            if len(found) == len(hiding):
                message = f"route '{route.name}' is never reached: {_matches_first(found[0][1])}"
                self.warn("W001", message, "routes", index, "name")
            elif isinstance(written, list):
                for number, other in found:
                    message = f"this path is never reached here: {_matches_first(other)}"
                    self.warn("W001", message, "routes", index, "match", "path", number)
            above.add(route)

    def settings(self) -> None:
        policy, main = self.policy, self.main
        if policy.metrics.path is not None and policy.metrics.allow is None:
            message = "the metrics are open to everybody; list who may read them in metrics.allow"
            self.warn("W007", message, "metrics", key=True)
        for index, net in enumerate(policy.access.exempt):
            if net.prefixlen == 0:
                self.warn("W012", f"{net} is everybody: nothing is limited", "access", "exempt", index)
        if main.text is None:
            return  # a mapping in Python has its secrets from somewhere else
        if policy.backend.secret is not None and main.written(("backend", "secret")) is None:
            self.warn("W005", "a secret in the file; write ${SEAWALL_SECRET}", "backend", "secret", key=True)
        url = main.root.get("backend", {}).get("url", "")
        if passwords(url) and main.written(("backend", "url")) is None:
            self.warn("W005", "a password in the file; write ${REDIS_URL}", "backend", "url", key=True)

    def priorities(self) -> None:
        total = 0.0
        for one in self.policy.priorities:
            if (one.queue_timeout_ns or 0) > _PATIENCE:
                message = "few callers wait so long: what is kept for those who have left delays the others; 1s is long"
                self.warn("W013", message, "priorities", one.name, "queue", "timeout")
            # Rounded, for ten tenths of floating point are a little less than one.
            before, total = total, round(total + (one.min_share or 0.0), 9)
            if before < 1 <= total:
                message = f"together the shares are {total:.0%}: nothing is left for the order of the classes to decide"
                self.warn("W014", message, "priorities", one.name, "min_share")
        if "priorities" in self.main.root:
            self.classes_of_nobody()

    def classes_of_nobody(self) -> None:
        """Classes above all that are given to somebody. Those below are everybody's who lowers its own."""
        policy = self.policy
        header = policy.priority_header
        if header is not None and header.raise_from:
            return
        plans = [plan for name, plan in policy.plans.items() if name in self.used]
        plans += [tenant.plan for tenant in policy.tenants.values()]
        given = {policy.middle_priority, *(plan.priority for plan in plans)}
        given |= {tenant.priority for tenant in policy.tenants.values()} | {route.priority for route in policy.routes}
        for one in policy.priorities:
            if one.name in given:
                return
            message = f"nobody is of class '{one.name}': set the 'priority' of a plan, tenant or route"
            self.warn("W016", message, "priorities", one.name, key=True)

    def priority_header(self) -> None:
        header = self.policy.priority_header
        if header is None:
            return
        why = _MEANT_OTHERWISE.get(header.name)
        if why is None and header.raise_from and _says_forwarded(header.name):
            why = "is what forwarding proxies add, so a request that carries it may not raise its priority"
        if why is not None:
            message = f"{shorten(header.name)} {why}; use one of your own, such as X-Request-Priority"
            self.warn("W015", message, "priority_header", "name")

    def shedding(self) -> None:
        shedding, written = self.policy.shedding, self.main.root.get("shedding", {})
        if shedding.algorithm == "fixed" and "initial" not in written.get("limit", {}):
            message = f"a fixed limit is for who has measured: write limit.initial, or it is {shedding.initial}"
            self.warn("W017", message, "shedding", "algorithm")
        if shedding.algorithm == "off" and "priorities" in self.main.root:
            message = "with 'algorithm: off' nobody waits and nobody is refused for others: the order has no effect"
            self.warn("W018", message, "priorities", key=True)
        if shedding.loop_lag_target_ns > _LAG:
            message = "a request pays this several times, once for each 'await' of its handler; 10ms is usual"
            self.warn("W019", message, "shedding", "loop_lag_target")

    def shared_state(self) -> None:
        backend = self.policy.backend
        if backend.type == "memory":
            return
        if backend.secret is None:
            message = (
                "the hashes under which identities are stored are keyed by a constant, so whoever reads the store can "
                "try out whose they are; write secret: ${SEAWALL_SECRET}"
            )
            self.warn("W020", message, "backend", "type", key=True)
        if backend.timeout_ns > _HELD_UP:
            message = "each request may wait this long before the store is known to be away; 25ms is usual"
            self.warn("W021", message, "backend", "timeout")

    def quotas_in_memory(self) -> None:
        if self.policy.backend.type != "memory" or self.policy.backend.snapshot is not None:
            return
        place = next(self._quotas(), None)
        if place is not None:
            document, path = place
            message = (
                "kept in memory: a restart forgets what was used of a quota, and each process counts its own; "
                "write backend: {snapshot: FILE} for the one, or share the state for both"
            )
            self.warn("W008", message, *path, document=document)

    def _quotas(self) -> Iterator[tuple[Document, Path]]:
        for name, plan in self.policy.plans.items():
            if plan.quota is not None:
                yield self.main, ("plans", name, "quota")
        for document, name, _ in self.tenants:
            if self.policy.tenants[name].plan.quota is not None:
                yield document, ("tenants", name, "overrides", "quota")
        for index, route in enumerate(self.policy.routes):
            for limit in route.limits:
                if limit.quota is not None:
                    yield self.main, ("routes", index, "limits", limit.name, "quota")


def _tenants(document: Document) -> Iterable[tuple[str, dict[str, Any]]]:
    found: dict[str, dict[str, Any]] = document.root.get("tenants", {})
    return found.items()


def _says_forwarded(header: str) -> bool:
    return header in _SAYS_FORWARDED or header.startswith("x-forwarded-")


def _never_fits(cost: int, limits: Plan | RouteLimit) -> bool:
    return any(rate.burst < cost for rate in limits.rates) or (limits.quota is not None and limits.quota.limit < cost)


def _matches_first(other: Route) -> str:
    spelling = ", in this spelling" if other.exempt else ""
    return f"route '{other.name}' above matches all of it{spelling}"


@final
class _Covering:
    """The paths of the routes so far, asked whether one of them matches all that another path matches."""

    def __init__(self) -> None:
        self.by_first: dict[str, list[tuple[list[str], Route]]] = {}
        self.compared = 0

    def add(self, route: Route) -> None:
        for path in route.paths:
            segments = _segments(path, route)
            first = segments[0] if segments and _is_literal(segments[0]) else "*"
            self.by_first.setdefault(first.lower(), []).append((segments, route))

    def first(self, path: str, route: Route) -> Route | None:
        """The first route that leaves nothing of ``path`` to ``route``."""
        if self.compared > _COMPARISONS:
            return None
        segments = _segments(path, route)
        candidates = list(self.by_first.get("*", ()))
        if segments and _is_literal(segments[0]):
            candidates += self.by_first.get(segments[0].lower(), ())
        for general, other in candidates:
            self.compared += 1
            if other.methods is not None and (route.methods is None or not route.methods <= other.methods):
                continue
            specific = segments if other.exempt else [segment.lower() for segment in segments]
            if covers(general, specific):
                return other
        return None


def _segments(path: str, route: Route) -> list[str]:
    """The segments of a template, as they are compared: an exempt route keeps its spelling."""
    if route.exempt:
        return path[1:].split("/")
    return [segment.lower() for segment in path.strip("/").split("/")]


def _is_literal(segment: str) -> bool:
    return segment != "**" and not segment.startswith("{")


def covers(general: Sequence[str], specific: Sequence[str]) -> bool:
    """Whether every path of the template ``specific`` is one of ``general``, both in segments.

    Never says so wrongly; may miss a case in which ``**`` of the one corresponds to several segments of the other.
    """
    # reached[i]: some way to match what has been seen of `specific` ends before general[i].
    reached = _skipping({0}, general)
    for segment in specific:
        after = set()
        for at in reached:
            if at == len(general):
                continue
            if general[at] == "**":
                after.add(at)
            elif segment != "**" and (general[at] == segment or (not _is_literal(general[at]) and segment != "")):
                after.add(at + 1)
        reached = _skipping(after, general)
        if not reached:
            return False
    return len(general) in reached


def _skipping(reached: set[int], general: Sequence[str]) -> set[int]:
    """``reached``, and what is reached by letting ``**`` match nothing."""
    found = set(reached)
    for at in sorted(reached):
        while at < len(general) and general[at] == "**":
            at += 1
            found.add(at)
    return found
