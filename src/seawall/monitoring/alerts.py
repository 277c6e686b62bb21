"""Rules for Prometheus: whom to wake, what can wait until the morning, and what is good to know.

What pages is what callers within their plans feel, or what will be felt soon and does not heal by itself. The share of
requests that were shed is held against an objective by multi-window, multi-burn-rate alerts (Google, The Site
Reliability Workbook, chapter 5, "Alerting on SLOs"): a burn rate of 1 spends exactly the budget of 30 days in 30 days,
and one of 14.4 spends 2 % of it in an hour. The long window says that it matters, the short one that it still goes on.

A caller over its own plan is refused by design, and is in none of the ratios.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from textwrap import indent
from typing import Literal, TypeAlias, final

from seawall.backends import LISTED
from seawall.metrics import (
    ALLOWED,
    BACKEND_DURATION,
    BACKEND_REQUESTS,
    BACKEND_UP,
    BUILD_INFO,
    CONFIG_INFO,
    CONFIG_RELOADS,
    EXPIRED,
    FALLBACKS,
    LAST_RELOAD,
    LIMITED,
    OUTCOMES,
    POLICY_CHECKS,
    QUEUE_WAIT,
    REQUESTS,
    SHED,
    TENANT_REQUESTS,
    TRACKED_KEYS,
)
from seawall.monitoring.literal import block, quoted
from seawall.monitoring.promql import Scope, Unlike, matcher, total

Severity: TypeAlias = Literal["page", "ticket", "info"]

SERVICE = ("namespace", "job")
"""What an alert is about: a service, whose instances are many."""
INSTANCE = (*SERVICE, "instance")

BURNS: Sequence[tuple[str, str, str, Severity]] = (
    ("14.4", "1h", "5m", "page"),
    ("6", "6h", "30m", "page"),
    ("3", "1d", "2h", "ticket"),
    ("1", "3d", "6h", "ticket"),
)
"""Burn rate, long and short window: 2, 5, 10 and 10 % of the budget of 30 days are gone when the long one is full."""
LEAST_SHED = 10
"""Refusals in the long window below which nobody is woken: of twenty requests in the night one is 5 %."""
RUNBOOKS = "docs/runbooks"
LOWEST_OBJECTIVE = Decimal(95)
"""Below 93.1 % the highest burn rate is more than everything, and its alert would never fire."""


@final
@dataclass(frozen=True, slots=True)
class Settings:
    """What differs between services.

    ``objective`` is the percentage of requests within their plans that must not be shed; ``critical`` the class that
    must never be. ``max_keys`` is `backend.max_keys`, ``slow`` the seconds from which a call to the store is slow.
    ``job`` holds the rules to one job, for whom each service has its own; ``runbooks`` is where the pages are.
    """

    objective: Decimal = Decimal("99.9")
    critical: str = "critical"
    max_keys: int = 100_000
    slow: float = 0.010
    job: str | None = None
    runbooks: str = RUNBOOKS

    def __post_init__(self) -> None:
        if not (self.objective.is_finite() and LOWEST_OBJECTIVE <= self.objective < 100):
            raise ValueError(f"the objective is {LOWEST_OBJECTIVE} % or more and less than 100, not {self.objective}")


@final
@dataclass(frozen=True, slots=True)
class Record:
    """A value that several rules need, evaluated once."""

    name: str
    expression: str


@final
@dataclass(frozen=True, slots=True)
class Alert:
    """``hold`` is for how long it has to be true. Summary and description may name labels and the value."""

    name: str
    severity: Severity
    expression: str
    summary: str
    description: str
    hold: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)


@final
@dataclass(frozen=True, slots=True)
class Group:
    """Rules that are evaluated one after another."""

    name: str
    rules: Sequence[Record | Alert]


def groups(settings: Settings) -> tuple[Group, ...]:
    """All rules."""
    scope = Scope(() if settings.job is None else (matcher("job", settings.job),))
    return (
        # In one group, so that the ratios are of the same moment.
        Group("seawall-objective", [*_ratios(scope), *_burns(settings, scope)]),
        Group("seawall-overload", list(_overload(settings, scope))),
        Group("seawall-backend", list(_backend(settings, scope))),
        Group("seawall-configuration", list(_configuration(scope))),
        Group("seawall-callers", list(_callers(scope))),
    )


def _ratio_name(window: str) -> str:
    return f"seawall:shed_ratio:rate{window}"


def _ratios(scope: Scope) -> Iterable[Record]:
    windows = dict.fromkeys(window for _, long, short, _ in BURNS for window in (short, long))
    for window in windows:
        shed = scope.rate(REQUESTS, *SERVICE, over=window, where={"outcome": OUTCOMES[SHED]})
        asked = scope.rate(REQUESTS, *SERVICE, over=window, where={"outcome": (OUTCOMES[ALLOWED], OUTCOMES[SHED])})
        yield Record(_ratio_name(window), f"{shed}\n/\n{asked}")


def _burns(settings: Settings, scope: Scope) -> Iterable[Alert]:
    budget = 100 - settings.objective
    for rate, long, short, severity in BURNS:
        share = Decimal(rate) * budget
        over = f"> {_plain(share / 100)}"
        expression = "\nand\n".join(f"{scope.select(_ratio_name(window))} {over}" for window in (long, short))
        if severity == "page":
            shed = scope.increase(REQUESTS, *SERVICE, over=long, where={"outcome": OUTCOMES[SHED]})
            expression += f"\nand\n{shed} >= {LEAST_SHED}"
        yield Alert(
            "SeawallShedBudgetBurnFast" if severity == "page" else "SeawallShedBudgetBurnSlow",
            severity,
            expression,
            "{{ $labels.job }} sheds {{ $value | humanizePercentage }} of its requests",
            f"Of the requests within their callers' plans more than {_plain(share)} % were refused for overload, over "
            f"{long} and over {short}: {rate} times as many as a budget of {_plain(budget)} % allows.",
            labels={"long": long, "short": short},
        )


def _plain(number: Decimal) -> str:
    return f"{number.normalize():f}"


def _overload(settings: Settings, scope: Scope) -> Iterable[Alert]:
    critical = {"outcome": OUTCOMES[SHED], "priority": settings.critical}
    yield Alert(
        "SeawallCriticalShed",
        "page",
        f"{scope.increase(REQUESTS, *SERVICE, where=critical)} > 0",
        f"{{{{ $labels.job }}}} refuses requests of class {settings.critical}",
        f'About {{{{ $value | printf "%.0f" }}}} requests of class {settings.critical} were shed in five minutes. '
        "All other classes are refused before it, so the service can hardly do anything.",
    )
    waits = scope.rate(QUEUE_WAIT, *SERVICE, part="count")
    vain = scope.rate(QUEUE_WAIT, *SERVICE, part="count", where={"result": ("queue_timeout", "queue_full", "expired")})
    yield Alert(
        "SeawallQueueSaturated",
        "ticket",
        f"{vain}\n/\n{waits} > 0.25\nand\n{vain} > 0.1",
        "{{ $value | humanizePercentage }} of those who wait at {{ $labels.job }} wait in vain",
        "The queue is for the moment in which more comes than was just possible. It has been standing for ten minutes: "
        "the service is short of capacity, or its limit is too low.",
        hold="10m",
    )
    late = scope.rate(REQUESTS, *SERVICE, over="30m", where={"outcome": OUTCOMES[EXPIRED]})
    begun = {"outcome": tuple(OUTCOMES[outcome] for outcome in (ALLOWED, SHED, EXPIRED))}
    yield Alert(
        "SeawallDeadlinesMissed",
        "ticket",
        f"{late}\n/\n{scope.rate(REQUESTS, *SERVICE, over='30m', where=begun)} > 0.01",
        "{{ $value | humanizePercentage }} of the requests to {{ $labels.job }} come too late",
        "Their deadline had passed before they could begin, so they were answered with 504 and not served.",
        hold="10m",
    )


def _backend(settings: Settings, scope: Scope) -> Iterable[Alert]:
    mixed_up, capped = {"result": "mismatch"}, {"store": Unlike(LISTED)}
    yield Alert(
        "SeawallBackendDown",
        "page",
        total(f"{scope.series(BACKEND_UP)} == 0", *SERVICE, "backend", function="count"),
        "{{ $value }} instances of {{ $labels.job }} decide without {{ $labels.backend }}",
        "They have not reached the shared store for a minute. What they do meanwhile is what backend.on_failure says: "
        "hold callers to this process's share, let everything in, or refuse.",
        hold="1m",
    )
    yield Alert(
        "SeawallFallbackActive",
        "ticket",
        f"{scope.rate(FALLBACKS, *SERVICE, 'action')} > 0",
        "{{ $labels.job }} keeps deciding without its store (action {{ $labels.action }})",
        "{{ $value | humanize }} decisions a second were made without the store in the last five minutes, for ten "
        "minutes on end: it is away, or lost again and again.",
        hold="10m",
    )
    yield Alert(
        "SeawallBackendSlow",
        "ticket",
        f"{scope.quantile(0.99, BACKEND_DURATION, *SERVICE, 'backend')} > {settings.slow:g}",
        "One call in a hundred to {{ $labels.backend }} takes {{ $labels.job }} {{ $value | humanizeDuration }}",
        "Calls that take longer than backend.timeout are given up, and then each process decides by itself.",
        hold="10m",
    )
    yield Alert(
        "SeawallBackendMismatch",
        "page",
        f"{scope.increase(BACKEND_REQUESTS, *SERVICE, 'backend', over='1h', where=mixed_up)} > 0",
        "{{ $labels.job }} got answers from {{ $labels.backend }} that were none",
        "Something between the service and its store mixes answers up, or it is no Redis. Nothing of it was believed.",
    )
    full = settings.max_keys * 9 // 10
    yield Alert(
        "SeawallKeysNearlyFull",
        "ticket",
        f"{scope.gauge('max', TRACKED_KEYS, *INSTANCE, 'store', where=capped)} > {full}",
        "{{ $labels.instance }} tracks {{ $value }} keys of the store {{ $labels.store }}",
        f"At max_keys ({settings.max_keys}) new callers begin to share buckets and are refused for each other's sake.",
        hold="10m",
    )


def _configuration(scope: Scope) -> Iterable[Alert]:
    last = scope.gauge("max", LAST_RELOAD, *INSTANCE)
    failed = scope.increase(CONFIG_RELOADS, *INSTANCE, where={"result": "failed"})
    yield Alert(
        "SeawallReloadFailed",
        "ticket",
        # When it last failed, the last success was the one that still is: nothing has been mended since.
        f"max_over_time((\n  {last}\n  and\n  {failed} > 0\n)[1d:1m])\n==\n{last}",
        "{{ $labels.instance }} of {{ $labels.job }} cannot read its configuration",
        "The file was changed and is wrong. The last good one stays in force, since {{ $value | humanizeTimestamp }}; "
        "an instance that starts now does not start.",
    )
    hashes = scope.gauge("max", CONFIG_INFO, *SERVICE, "hash")
    yield Alert(
        "SeawallConfigSkew",
        "ticket",
        f"{total(hashes, *SERVICE, function='count')} > 1",
        "The instances of {{ $labels.job }} run {{ $value }} different policies",
        "For ten minutes, which is longer than a reload takes. What callers are held to depends on whom they reach.",
        hold="10m",
    )
    yield Alert(
        "SeawallTargetDown",
        "ticket",
        f"{scope.select('up')} == 0\nand on ({', '.join(INSTANCE)})\npresent_over_time({scope.series(BUILD_INFO)}[1h])",
        "{{ $labels.instance }} of {{ $labels.job }} is not scraped any more",
        "Within the last hour it was. It has ended, hangs, or does not answer Prometheus any more (metrics.allow).",
        hold="5m",
    )
    was = f"present_over_time({scope.series(BUILD_INFO)}[1d])"
    yield Alert(
        "SeawallAbsent",
        "page",
        f"{total(was, *SERVICE, function='group')}\nunless\n"
        f"{total(scope.series(BUILD_INFO), *SERVICE, function='group')}\nor\nabsent({was})",
        "Nothing is known of {{ with $labels.job }}{{ . }}{{ else }}any service{{ end }} any more",
        "No instance is scraped, so no other alert can fire: the service is down, or Prometheus does not reach it.",
        hold="5m",
    )


def _callers(scope: Scope) -> Iterable[Alert]:
    tenant = (*SERVICE, "tenant")
    named = {"tenant": Unlike("other")}
    limited = scope.rate(TENANT_REQUESTS, *tenant, over="15m", where={**named, "outcome": OUTCOMES[LIMITED]})
    asked = scope.rate(TENANT_REQUESTS, *tenant, over="15m", where=named)
    yield Alert(
        "SeawallTenantRefused",
        "info",
        f"{limited}\n/\n{asked} > 0.5\nand\n{limited} > 0.1",
        "{{ $labels.tenant }} is refused {{ $value | humanizePercentage }} of its requests to {{ $labels.job }}",
        "By its own plan, for half an hour: its plan is too small, or its client does not back off.",
        hold="15m",
    )
    policy = (*SERVICE, "plan", "policy")
    near = scope.rate(POLICY_CHECKS, *policy, over="1h", where={"decision": ("near", "deny")})
    checks = scope.rate(POLICY_CHECKS, *policy, over="1h")
    yield Alert(
        "SeawallPlanNearLimit",
        "info",
        f"{near}\n/\n{checks} > 0.5",
        "Callers of plan {{ $labels.plan }} at {{ $labels.job }} are near their {{ $labels.policy }}",
        "In {{ $value | humanizePercentage }} of the decisions of the last hour 80 % or more were used: the limit "
        "begins to shape what callers do.",
        hold="1h",
    )


HEAD = """\
# What to be told of a service with Seawall: `seawall export alerts` writes this file, `promtool check rules` reads it.
# severity: page wakes somebody, ticket is for the next working day, info is for a channel.
# runbook_url leads to a page for each alert: what it means, who is hurt, what to look at, what to do.
"""


def render(rules: Iterable[Group], settings: Settings) -> str:
    """A file of rules for Prometheus."""
    return f"{HEAD}groups:\n{indent(render_groups(rules, settings), '  ')}"


def render_groups(rules: Iterable[Group], settings: Settings) -> str:
    """The list of groups, as it is in a file of rules and in a PrometheusRule."""
    return "".join(_group(group, settings) for group in rules)


def _group(group: Group, settings: Settings) -> str:
    lines = [f"- name: {group.name}\n  rules:\n"]
    lines += [_record(rule) if isinstance(rule, Record) else _alert(rule, settings) for rule in group.rules]
    return "".join(lines)


def _record(rule: Record) -> str:
    return f"    - record: {rule.name}\n      expr: {block(rule.expression, 8)}\n"


def _alert(rule: Alert, settings: Settings) -> str:
    labels = {"severity": rule.severity, **rule.labels}
    return (
        f"    - alert: {rule.name}\n"
        f"      expr: {block(rule.expression, 8)}\n"
        + (f"      for: {rule.hold}\n" if rule.hold else "")
        + f"      labels: {{{', '.join(f'{name}: {value}' for name, value in labels.items())}}}\n"
        f"      annotations:\n"
        f"        summary: {quoted(rule.summary)}\n"
        f"        description: {quoted(rule.description)}\n"
        f"        runbook_url: {quoted(f'{settings.runbooks}/{rule.name}.md')}\n"
    )
