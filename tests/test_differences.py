"""Two policies and what is different between them, in words: nothing is forgotten, and nothing secret is shown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from seawall.config import load_mapping, loads
from seawall.config.diagnostics import printable
from seawall.config.differences import MANY, SECTIONS, SILENT, TABLES, Change, _moved, differences, summary
from seawall.decision import Mode
from seawall.notation import MAX_PERIOD, duration_text, parse_duration, parse_quota, parse_rates, quota_text, rate_text
from seawall.policy import (
    Access,
    BackendSettings,
    Identity,
    Key,
    Metrics,
    Plan,
    Policy,
    Priority,
    PriorityHeader,
    Responses,
    Route,
    RouteLimit,
    Shedding,
    Status,
    Streaming,
    Tenant,
)
from seawall.rate import MAX_AMOUNT, Quota, Rate
from strategies import rates

REFERENCE = Path(__file__).with_name("data") / "seawall.yaml"
TEXT = REFERENCE.read_text(encoding="utf-8")


def changed(*edits: tuple[str, str]) -> tuple[Change, ...]:
    """The differences after ``edits`` of the reference."""
    text = TEXT
    for old, new in edits:
        assert text.count(old) >= 1, old
        text = text.replace(old, new, 1)
    return differences(loads(TEXT), loads(text))


def told(*edits: tuple[str, str]) -> list[tuple[str, str]]:
    return [(change.text, change.effect) for change in changed(*edits)]


# Examples


def test_an_override_is_said_with_its_tenant() -> None:
    [change] = changed(("{rate: 500/second}", "{rate: 50/second}"))
    assert change == Change("tenants.acme.rate", "acme: rate 500/second -> 50/second", "lowered")
    assert str(change) == change.text


@pytest.mark.parametrize(
    ("old", "new", "text", "effect"),
    [
        ("mode: enforce ", "mode: shadow ", "mode enforce -> shadow", "raised"),
        ("anonymous: per-ip", "anonymous: deny", "identity.anonymous per-ip -> deny", "lowered"),
        ("ipv6_prefix: 64", "ipv6_prefix: 56", "identity.client_ip.ipv6_prefix 64 -> 56", "changed"),
        (
            'trusted_proxies: [10.0.0.0/8, "fd00::/8"]',
            'trusted_proxies: ["fd00::/8"]',
            "identity.client_ip.trusted_proxies 10.0.0.0/8 removed",
            "removed",
        ),
        ("- state: tenant_id", "- state: user", "identity.tenant api_key x-api-key, state tenant_id -> ", "changed"),
        ("deny: [198.51.100.0/24]", "deny: [198.51.100.0/24, 192.0.2.1]", "access.deny 192.0.2.1 added", "added"),
        (
            "deny: [198.51.100.0/24]",
            "deny: [198.51.100.0/24, 192.0.2.1, '2001:db8::/32']",
            "access.deny added: 192.0.2.1, 2001:db8::/32",
            "added",
        ),
        ("concurrency: 50", "concurrency: 70", "plan pro: concurrency 50 -> 70 (1 tenant)", "raised"),
        (
            "rate: {limit: 100/second, burst: 300}",
            "rate: {limit: 100/second, burst: 200}",
            "plan pro: rate 100/second (burst 300) -> 100/second (burst 200) (0 tenants)",
            "lowered",
        ),
        (
            "anonymous: {rate: 30/minute",
            "anonymous: {rate: [30/minute, 200/hour]",
            "plan anonymous: rate 30/minute -> 30/minute, 200/hour (0 tenants and anonymous callers)",
            "lowered",
        ),
        (
            "anonymous: {rate: 30/minute",
            "anonymous: {rate: 1/s",
            "plan anonymous: rate 30/minute -> 1/second (0 tenants and anonymous callers)",
            "changed",
        ),
        (
            "anonymous: {rate: 30/minute",
            "anonymous: {rate: [{limit: 1/s, burst: 30}, 20/minute]",
            "plan anonymous: rate 30/minute -> 1/second (burst 30), 20/minute (0 tenants and anonymous callers)",
            "lowered",
        ),
        ("{rate: unlimited, ", "{rate: 9/s, ", "plan internal: rate unlimited -> 9/second (1 tenant)", "lowered"),
        ("quota: 10_000/day", "quota: 9_999/month", "plan free: quota 10_000/day -> 9_999/month (1 tenant)", "lowered"),
        ("quota: 10_000/day", "quota: 310_000/month", "plan free: quota 10_000/day -> 310_000/month (1 ", "raised"),
        ("quota: 10_000/day", "quota: 300_000/month", "plan free: quota 10_000/day -> 300_000/month (1 ", "changed"),
        ("    quota: 10_000/day", "    #", "plan free: quota 10_000/day -> unlimited (1 tenant)", "raised"),
        (
            "quota: 10_000/day",
            "quota: {limit: 10_000/day, zone: Europe/Berlin}",
            "plan free: quota 10_000/day -> 10_000/day (Europe/Berlin) (1 tenant)",
            "changed",
        ),
        ("priority: normal", "priority: critical", "plan pro: priority normal -> critical (1 tenant)", "raised"),
        ("    priority: low", "    #", "plan free: priority low -> default (1 tenant)", "raised"),
        (", priority: background}", "}", "batch-jobs: priority background -> by plan or route", "changed"),
        (", mode: shadow}", "}", "globex: mode shadow -> enforce", "lowered"),
        ("expires: 2027-06-30", "expires: 2027-06-29", "acme, key fcde2b2e: expires 2027-06-30 -> 2027-06-29", "lower"),
        (
            "expires: 2027-06-30",
            "expires: '2027-06-30T12:00:00Z'",
            "acme, key fcde2b2e: expires 2027-06-30 -> 2027-06-30T12:00:00Z",
            "lowered",
        ),
        (", expires: 2027-06-30", "", "acme, key fcde2b2e: expires 2027-06-30 -> never", "raised"),
        ("path: /login,", "path: [/login, /signin],", "route login: match.path /signin added", "added"),
        ("methods: [POST]", "methods: [GET]", "route login: match.methods POST -> GET, HEAD", "changed"),
        (", methods: [POST]", "", "route login: match.methods POST -> all", "changed"),
        ("exempt: true ", "exempt: false ", "route probes: exempt true -> false", "lowered"),
        ("cost: 5 ", "cost: 6 ", "route search: cost 5 -> 6", "lowered"),
        ("    # mode: shadow", "    mode: shadow", "route search: mode enforce -> shadow", "raised"),
        ("    priority: normal ", "    # ", "route search: priority normal -> by plan", "changed"),
        ("on_backend_failure: deny", "on_backend_failure: local", "route login: on_backend_failure deny -> ", "raised"),
        ("{rate: 5/minute, per", "{rate: 5/h, per", "route login, limit login-ip: rate 5/minute -> 5/hour", "lowered"),
        ("per: [tenant]", "per: client_ip", "route search, limit search-daily: per tenant -> client_ip", "changed"),
        ("max_per_tenant: 10", "max_per_tenant: 20", "route events: streaming.max_per_tenant 10 -> 20", "raised"),
        (", max_per_tenant: 10", "", "route events: streaming.max_per_tenant 10 -> unlimited", "raised"),
        (
            "    streaming: {max",
            "    # {max",
            "route events: streaming removed (max 500, max_per_tenant 10)",
            "removed",
        ),
        ("timeout: 100ms", "timeout: 1500ms", "priority low: queue.timeout 100ms -> 1500ms", "raised"),
        ("{queue: {timeout: 100ms}}", "{}", "priority low: queue.timeout 100ms -> default", "changed"),
        ("min_share: 2%", "min_share: 12.5%", "priority background: min_share 2% -> 12.5%", "raised"),
        (
            "# priority_header: {",
            "priority_header: {",
            "priority_header added (name x-request-priority, raise_from 10.2.0.0/16)",
            "added",
        ),
        ("algorithm: adaptive", "algorithm: aimd", "shedding.algorithm adaptive -> aimd", "changed"),
        ("max: 1000", "max: 2000", "shedding.limit.max 1_000 -> 2_000", "raised"),
        ("target: 10ms", "target: 5ms", "shedding.loop_lag_target 10ms -> 5ms", "lowered"),
        ("  # body_timeout: 10s", "  body_timeout: 2m", "shedding.body_timeout none -> 2m", "lowered"),
        ("max_keys: 100_000", "max_keys: 10_000", "backend.max_keys 100_000 -> 10_000", "changed"),
        ("  # leases: true", "  leases: false", "backend.leases true -> false", "changed"),
        ("detail: true", "detail: false", "responses.detail true -> false", "changed"),
        ("  docs_url: https", "  # https", "responses.docs_url https://example.com/docs/limits -> none", "changed"),
        ("reload: 2s", "reload: off", "reload 2s -> off", "changed"),
        ("{top: 20}", "off", "metrics.tenant_label top 20 -> off", "changed"),
        (
            '  allow: [127.0.0.1, "::1", 10.0.0.0/8]',
            "  #",
            "metrics.allow 127.0.0.1, ::1, 10.0.0.0/8 -> everybody",
            "changed",
        ),
        ("path: /-/seawall", "path: /-/status", "status.path /-/seawall -> /-/status", "changed"),
        ("reload: 2s", "history: seawall.history.jsonl", "history none -> seawall.history.jsonl", "changed"),
    ],
)
def test_a_setting_is_said_in_words(old: str, new: str, text: str, effect: str) -> None:
    [change] = changed((old, new))
    assert (change.text[: len(text)], change.effect[: len(effect)]) == (text, effect)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("version: 1", "version: 1 # a comment"),
        ("timeout: 250ms", "timeout: 250 ms"),
        ("quota: 1_000_000/month", "quota: 1000000/month"),
        ("path: [/healthz, /readyz, /metrics]", "path: [/metrics, /readyz, /healthz, /healthz]"),
        ("  status: 503\n", ""),
    ],
)
def test_the_same_written_in_another_way_is_no_change(old: str, new: str) -> None:
    assert changed((old, new)) == ()


def test_a_tenant_that_moves_is_told_what_that_means() -> None:
    limits = "rate 10/second -> 100/second (burst 300), quota 10_000/day -> 1_000_000/month, concurrency 5 -> 50"
    assert told(("globex: {plan: free", "globex: {plan: pro")) == [
        (f"globex: plan free -> pro ({limits}, priority low -> normal)", "raised")
    ]


def test_a_default_plan_is_told_what_it_means() -> None:
    assert told(("anonymous_plan: anonymous", "anonymous_plan: internal")) == [
        (
            "defaults.anonymous_plan anonymous -> internal (rate 30/minute -> unlimited, priority low -> critical)",
            "raised",
        )
    ]


def test_what_comes_and_goes_is_said_with_what_it_was() -> None:
    assert told(
        ("  pro:\n", "  gold: {rate: 7/minute}\n  pro:\n"),
        (
            "  globex: {plan: free, mode: shadow}",
            "  initech: {plan: free, overrides: {quota: 9/day, priority: normal}}",
        ),
        ("  - name: items\n", "  - name: things\n"),
    ) == [
        ("plan gold: added (rate 7/minute)", "added"),
        ("globex: removed (plan free, mode shadow)", "removed"),
        ("initech: added (plan free, quota 9/day, priority normal)", "added"),
        ("route items: removed (match.path /v1/items/{id})", "removed"),
        ("route things: added between search and events (match.path /v1/items/{id})", "added"),
    ]


def test_a_plan_is_removed_with_its_limits() -> None:
    plan = {"default": {"rate": "1/s"}}
    old = load_mapping({"version": 1, "plans": {**plan, "gold": {"rate": "7/s", "quota": "9/day"}}})
    [change] = differences(old, load_mapping({"version": 1, "plans": plan}))
    assert change == Change("plans.gold", "plan gold: removed (rate 7/second, quota 9/day)", "removed")


def test_priority_and_its_override_are_said_once() -> None:
    assert told(("{rate: 500/second}", "{rate: 500/second, priority: low}")) == [
        ("acme: priority by plan or route -> low", "changed")
    ]


def test_keys_are_counted_and_shown_by_eight_digits() -> None:
    key, other = "ab" * 32, "cd" * 32
    changes = changed(
        ('- "sha256:2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae"', f"- 'sha256:{key}'"),
        ("globex: {plan: free", f"globex: {{plan: free, keys: ['sha256:{other}', 'sha256:{other[::-1]}']"),
    )
    assert [(change.path, change.text, change.effect) for change in changes] == [
        ("tenants.acme.keys", "acme: 1 key added: abababab", "added"),
        ("tenants.acme.keys", "acme: 1 key removed: 2c26b46b", "removed"),
        ("tenants.globex.keys", "globex: 2 keys added: cdcdcdcd, dcdcdcdc", "added"),
    ]


def test_a_key_that_changes_hands_is_removed_and_added() -> None:
    first = '- "sha256:2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae"'
    assert told((first, "- 'sha256:" + "0" * 64 + "'"), ("globex: {", f"globex: {{keys: [{first[2:]}], "))[-1] == (
        "globex: 1 key added: 2c26b46b",
        "added",
    )


def test_keys_of_a_tenant_that_goes_are_counted_with_it() -> None:
    [change] = differences(tenants({"acme": {"keys": ["sha256:" + "0" * 64]}, "globex": {}}), tenants({"globex": {}}))
    assert change.text == "acme: removed (plan default, 1 key)"


def test_the_last_day_of_a_key_may_be_the_first_there_is() -> None:
    old = tenants({"acme": {"keys": [{"hash": "sha256:" + "0" * 64, "expires": "0001-01-01T00:00:00"}]}})
    new = tenants({"acme": {"keys": [{"hash": "sha256:" + "0" * 64, "expires": "9999-12-30"}]}})
    assert differences(old, new)[0].text == "acme, key 00000000: expires 0001-01-01T00:00:00Z -> 9999-12-30"


# Order


def routes(*names: str, **more: Any) -> Policy:
    listed = [{"name": name, "match": {"path": f"/{name}"}} for name in names]
    return load_mapping({"version": 1, "plans": {"default": {"rate": "1/s"}}, "routes": listed, **more})


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ("a b c", "b c a", ["route a: moved last, after c"]),
        ("a b c d", "a d b c", ["route d: moved between a and b"]),
        ("a b c", "c a b", ["route c: moved first, before a"]),
        ("a b c d", "d c b a", 3),
        ("a b c", "x a b c", ["route x: added first, before a (match.path /x)"]),
        ("a b c", "a c", ["route b: removed (match.path /b)"]),
        ("a", "b", ["route a: removed (match.path /a)", "route b: added (match.path /b)"]),
        ("a b c", "c x a", 3),
    ],
)
def test_the_order_of_routes_is_their_meaning(old: str, new: str, text: list[str] | int) -> None:
    found = [change.text for change in differences(routes(*old.split()), routes(*new.split()))]
    assert (len(found) if isinstance(text, int) else found) == text


def test_the_order_of_priorities_is_their_meaning() -> None:
    assert told(
        (
            "  critical: {}\n  normal: {queue: {timeout: 250ms}}\n",
            "  normal: {queue: {timeout: 250ms}}\n  critical: {}\n",
        )
    ) == [("priority normal: moved first, before critical", "changed")]


@given(st.permutations(range(7)), st.sets(st.integers(0, 9)))
def test_as_few_as_possible_are_said_to_have_moved(new: list[int], also: set[int]) -> None:
    """What has not moved is in the same order in both; and no smaller set would do."""
    old = [str(name) for name in range(10)]
    names = [*map(str, new), *(f"new-{name}" for name in also)]
    moved = _moved(old, names)
    kept = [name for name in names if name in old and name not in moved]
    assert kept == sorted(kept)
    longest = [1] * len(new)
    for at, value in enumerate(new):
        longest[at] += max((longest[before] for before in range(at) if new[before] < value), default=0)
    assert len(moved) == len(new) - max(longest)


# Many tenants


def tenants(listed: Mapping[str, Any], plans: Mapping[str, Any] | None = None, **more: Any) -> Policy:
    return load_mapping({"version": 1, "plans": plans or {"default": {"rate": "1/s"}}, "tenants": listed, **more})


def test_a_plan_is_said_once_with_the_tenants_whom_it_touches() -> None:
    listed = {f"t{at}": {"plan": "free"} for at in range(100)}
    listed["own"] = {"plan": "free", "overrides": {"rate": "7/s"}}
    listed["other"] = {"plan": "pro"}
    plans = {"free": {"rate": "1/s"}, "pro": {"rate": "9/s"}}
    old = tenants(listed, plans, defaults={"plan": "free"})
    new = tenants(listed, plans | {"free": {"rate": "2/s"}}, defaults={"plan": "free"})
    [change] = differences(old, new)
    assert change.text == "plan free: rate 1/second -> 2/second (100 tenants and anonymous callers)"
    assert differences(*(replace(policy, identity=Identity(anonymous="deny")) for policy in (old, new)))[0].text == (
        "plan free: rate 1/second -> 2/second (100 tenants)"
    )


def test_what_befalls_many_tenants_alike_is_said_once() -> None:
    plans = {"free": {"rate": "1/s"}, "pro": {"rate": "9/s"}}
    names = [f"t{at}" for at in range(MANY + 1)]
    many = differences(
        *(tenants({name: {"plan": plan} for name in names}, plans, defaults={"plan": "free"}) for plan in plans)
    )
    assert [(change.path, change.text, change.effect) for change in many] == [
        (
            "tenants.*.plan",
            "6 tenants (t0, t1, t2 and 3 more): plan free -> pro (rate 1/second -> 9/second)",
            "raised",
        )
    ]
    few = differences(
        *(tenants({name: {"plan": plan} for name in names[1:]}, plans, defaults={"plan": "free"}) for plan in plans)
    )
    assert [change.path for change in few] == [f"tenants.{name}.plan" for name in names[1:]]
    assert few[0].text == "t1: plan free -> pro (rate 1/second -> 9/second)"


def test_an_override_that_equals_the_plan_before_and_after_is_the_plans_change() -> None:
    """In effect it is: whether the file repeats the plan's rate is nothing that a caller notices."""
    listed = {"acme": {"plan": "default", "overrides": {"rate": "2/s"}}}
    [change] = differences(tenants({"acme": {"plan": "default"}}), tenants(listed, {"default": {"rate": "2/s"}}))
    assert change.text == "plan default: rate 1/second -> 2/second (1 tenant and anonymous callers)"


# Nothing is forgotten


def parts(annotation: Any) -> Iterator[type]:
    """The classes that an annotation speaks of."""
    if isinstance(annotation, type):
        yield annotation
    for inner in get_args(annotation):
        yield from parts(inner)


def classes(root: type) -> set[type]:
    found = {root}
    for annotation in get_type_hints(root).values():
        for part in parts(annotation):
            if is_dataclass(part) and part not in found | {Rate, Quota}:
                found |= classes(part)
    return found


def test_there_is_a_line_for_each_field_of_each_class() -> None:
    tables = {Policy: SECTIONS, **TABLES}
    assert classes(Policy) == set(tables)
    for cls, table in tables.items():
        silent = SILENT.get(cls, frozenset())
        assert {field.name for field in fields(cls)} == {*table, *silent}, cls
        assert not silent & set(table), cls


NAMES = st.sampled_from("abcdefgh")
TENANT_IDS = st.sampled_from(("acme", "globex", "Füü bär", "a.b", "\u202etrick", "x" * 128))
PRIORITY_NAMES = ("critical", "normal", "low", "background")
CANARIES = [f"{kind}-canary-{at}" for kind in ("url", "secret", "token") for at in range(3)]

quotas = st.builds(
    Quota, st.integers(1, MAX_AMOUNT), st.sampled_from(("day", "month")), st.sampled_from(("UTC", "Asia/Tokyo"))
)
some_rates = st.lists(st.one_of(rates(), st.builds(Rate, st.integers(1, 3), st.just(10**9))), max_size=2).map(tuple)
networks = st.lists(
    st.sampled_from([IPv4Network("10.0.0.0/8"), IPv4Network("192.0.2.1"), IPv6Network("::1"), IPv6Network("fd00::/8")]),
    max_size=4,
).map(tuple)
counts = st.one_of(st.none(), st.integers(1, 3), st.integers(1, 10**6))
durations = st.integers(1, 10**5).map(lambda ms: ms * 10**6)
priorities_of = st.one_of(st.none(), st.sampled_from(PRIORITY_NAMES))
modes = st.sampled_from(Mode)
failures = st.sampled_from(("local", "allow", "deny"))


def secrets(kind: str) -> st.SearchStrategy[str | None]:
    return st.one_of(st.none(), st.sampled_from([canary for canary in CANARIES if canary.startswith(kind)]))


def values(annotation: Any, field: str) -> st.SearchStrategy[Any]:
    """What a field may hold, from its annotation: a new field needs nothing here unless its type is new."""
    if field in ("url", "secret", "token"):
        return secrets(field)
    if get_origin(annotation) in (Union, UnionType):
        return st.one_of([values(part, field) for part in get_args(annotation)])
    if annotation == tuple[Rate, ...]:
        return some_rates
    if get_origin(annotation) is tuple and set(parts(annotation)) >= {IPv4Network, IPv6Network}:
        return networks
    if field == "limits":
        return st.lists(of(RouteLimit), max_size=3, unique_by=lambda limit: limit.name).map(tuple)
    if field == "per":
        return st.sampled_from((("client_ip",), ("tenant",), ("client_ip", "state:user")))
    if field == "paths":
        return st.lists(st.sampled_from(("/a", "/b", "/c/{id}")), min_size=1, max_size=3).map(tuple)
    if field == "priority":
        return priorities_of
    if field == "name":
        return NAMES
    if annotation is Quota:
        return quotas
    if annotation is int:
        return durations if field.endswith("_ns") else st.integers(1, 10**6)
    if annotation is float:
        return st.integers(1, 10**8).map(lambda share: share / 10**8)
    if annotation is str:
        return st.sampled_from(("/one", "/two", "three"))
    if is_dataclass(annotation):
        assert isinstance(annotation, type)
        return of(annotation)
    return st.from_type(annotation)


def of(cls: type) -> st.SearchStrategy[Any]:
    hints = get_type_hints(cls)
    return st.builds(cls, **{field.name: values(hints[field.name], field.name) for field in fields(cls) if field.init})


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    """Any policy whose parts agree, as those of files do."""
    plans = {name: replace(draw(of(Plan)), name=name) for name in sorted(draw(st.sets(NAMES, min_size=1, max_size=3)))}
    listed = {}
    for name in draw(st.lists(TENANT_IDS, max_size=4, unique=True)):
        plan = draw(st.sampled_from(sorted(plans)).map(plans.__getitem__))
        priority = None
        if draw(st.booleans()):
            priority = draw(priorities_of)
            plan = replace(plan, rates=draw(some_rates), priority=priority or plan.priority)
        listed[name] = Tenant(name, plan, priority, draw(modes))
    hashes = [bytes([value]) * 32 for value in range(6)]
    owned = (
        draw(st.dictionaries(st.sampled_from(hashes), st.sampled_from(sorted(listed)), max_size=4)) if listed else {}
    )
    order = draw(st.lists(st.sampled_from(PRIORITY_NAMES), min_size=1, unique=True))
    return Policy(
        mode=draw(modes),
        plans=plans,
        tenants=listed,
        keys={digest: Key(name, draw(st.one_of(st.none(), durations))) for digest, name in owned.items()},
        default_plan=draw(st.one_of(st.none(), st.sampled_from(sorted(plans)))),
        anonymous_plan=draw(st.one_of(st.none(), st.sampled_from(sorted(plans)))),
        routes=tuple(draw(st.lists(of(Route), max_size=4, unique_by=lambda route: route.name))),
        priorities=tuple(replace(draw(of(Priority)), name=name) for name in order),
        **{
            field.name: draw(values(get_type_hints(Policy)[field.name], field.name))
            for field in fields(Policy)
            if field.name
            not in {"mode", "plans", "tenants", "keys", "default_plan", "anonymous_plan", "routes", "priorities"}
            | SILENT[Policy]
        },
    )


def meaning(value: Any) -> Any:
    """A policy as plain data, without what means nothing."""
    if is_dataclass(value) and not isinstance(value, Rate | Quota):
        silent = SILENT.get(type(value), frozenset()) if isinstance(value, Policy) else frozenset()
        return {
            field.name: frozenset(getattr(value, field.name))
            if isinstance(getattr(value, field.name), tuple) and field.name in UNORDERED
            else meaning(getattr(value, field.name))
            for field in fields(value)
            if field.name not in silent
        }
    if isinstance(value, Mapping):
        return {key: meaning(inner) for key, inner in value.items()}
    return [meaning(inner) for inner in value] if isinstance(value, tuple) else value


UNORDERED = {"trusted_proxies", "deny", "exempt", "paths", "raise_from", "allow"}
slowly = settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


@pytest.mark.slow
@slowly
@given(policies())
def test_a_policy_does_not_differ_from_itself(policy: Policy) -> None:
    assert differences(policy, policy) == ()
    assert differences(policy, replace(policy, digest="ab" * 32, warnings=("W001",))) == ()


@pytest.mark.slow
@slowly
@given(policies(), policies())
def test_two_policies_differ_exactly_if_they_mean_something_else(old: Policy, new: Policy) -> None:
    assert (differences(old, new) == ()) == (meaning(old) == meaning(new))


@pytest.mark.slow
@slowly
@given(policies(), policies())
def test_the_way_back_is_the_opposite(old: Policy, new: Policy) -> None:
    """If priorities are in the same order, by which they are compared."""
    new = replace(new, priorities=old.priorities)
    opposite = {"raised": "lowered", "lowered": "raised", "added": "removed", "removed": "added", "changed": "changed"}
    there = Counter(change.effect for change in differences(old, new))
    back = Counter(opposite[change.effect] for change in differences(new, old))
    assert there == back


@pytest.mark.slow
@slowly
@given(policies(), policies())
def test_a_change_is_a_line_without_secrets(old: Policy, new: Policy) -> None:
    for change in differences(old, new):
        for shown in (change.text, change.path):
            assert shown == printable(shown)
            assert len(shown) <= 1_100
            assert not any(canary in shown for canary in CANARIES)
            assert not any(digest.hex()[:9] in shown for digest in {**old.keys, **new.keys})
    for field in ("url", "secret", "token"):
        assert f"{field}-canary" not in repr(differences(old, new))


def places(value: Any, cls: type, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where in ``value`` there are instances of ``cls``."""
    if isinstance(value, cls):
        yield path
    if is_dataclass(value) and not isinstance(value, Rate | Quota):
        for field in fields(value):
            yield from places(getattr(value, field.name), cls, (*path, field.name))
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from places(inner, cls, (*path, key))
    elif isinstance(value, tuple):
        for at, inner in enumerate(value):
            yield from places(inner, cls, (*path, at))


def reached(value: Any, path: tuple[Any, ...]) -> Any:
    for step in path:
        value = value[step] if isinstance(value, tuple | Mapping) else getattr(value, step)
    return value


def put(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """``value`` with ``new`` at ``path``."""
    if not path:
        return new
    step, rest = path[0], path[1:]
    if isinstance(value, Mapping):
        return {**value, step: put(value[step], rest, new)}
    if isinstance(value, tuple):
        return (*value[:step], put(value[step], rest, new), *value[step + 1 :])
    return replace(value, **{step: put(getattr(value, step), rest, new)})


FULL = replace(
    loads(TEXT.replace("# priority_header", "priority_header")),
    history="one",
    backend=BackendSettings("redis", url="url-canary-0", secret="secret-canary-0", snapshot="file"),
    status=Status("/one", (IPv4Network("10.0.0.0/8"),), "token-canary-0"),
)
"""A policy in which every class has an instance."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cls", "field"),
    [(cls, field) for cls, table in TABLES.items() for field in table] + [(Policy, "mode"), (Policy, "reload_ns")],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
@settings(deadline=None, max_examples=20)
@given(data=st.data())
def test_one_field_that_changes_is_said_with_its_section(cls: type, field: str, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(list(places(FULL, cls))))
    new = data.draw(values(get_type_hints(cls)[field], field))
    changed = put(FULL, (*path, field), new)
    assume(meaning(changed) != meaning(FULL))
    found = differences(FULL, changed)
    assert found
    section = {"reload_ns": "reload", "keys": "tenants"}.get((*path, field)[0], (*path, field)[0])
    assert {change.path.split(".")[0] for change in found} == {section}
    assert not any("canary" in change.text for change in found)


@pytest.mark.parametrize("section", [Access, Identity, Metrics, Responses, Shedding, Streaming, PriorityHeader])
def test_the_full_policy_has_one_of_each(section: type) -> None:
    assert list(places(FULL, section))


@pytest.mark.parametrize(
    ("old", "new", "text", "effect"),
    [
        (None, "canary", "backend.url added", "added"),
        ("canary", None, "backend.url removed", "removed"),
        ("canary", "canary-2", "backend.url changed", "changed"),
    ],
)
def test_of_a_secret_only_that_it_changed_is_said(old: str | None, new: str | None, text: str, effect: str) -> None:
    for field in ("url", "secret"):
        before, after = (Policy(backend=BackendSettings(**{field: value})) for value in (old, new))
        assert [(change.text, change.effect) for change in differences(before, after)] == [
            (text.replace("url", field), effect)
        ]


def test_a_section_with_a_secret_is_added_without_it() -> None:
    status = Status("/-/seawall", (IPv4Network("127.0.0.1"),), "canary")
    [change] = differences(Policy(), Policy(status=status))
    assert change.text == "status added (path /-/seawall, allow 127.0.0.1, token)"


def test_a_long_list_is_counted_and_a_long_text_cut() -> None:
    hosts = tuple(IPv4Network(f"192.0.2.{host}") for host in range(30))
    [change] = differences(Policy(), Policy(access=Access(deny=hosts)))
    assert change.text.endswith("192.0.2.9 and 20 more")
    long = Route("a", ("/" + "x" * 1023, "/" + "y" * 1023))
    [change] = differences(Policy(), Policy(routes=(long,)))
    assert (len(change.text), change.text[-3:]) == (1_000, "...")
    [change] = differences(Policy(history="/" + "x" * 1_000), Policy(history="/" + "y" * 1_000))
    assert "... -> /yyy" in change.text


def test_a_summary_counts_by_effect() -> None:
    assert summary(()) == "no changes"
    changes = changed(("cost: 5 ", "cost: 4 "), ("detail: true", "detail: false"), ("max: 1000", "max: 2000"))
    assert summary(changes) == "3 changes: 2 raised, 1 changed"
    assert summary(changes[:1]) == "1 change: 1 raised"


# Values in words


@given(rates())
def test_a_rate_in_words_is_that_rate_again(rate: Rate) -> None:
    text, _, burst = rate_text(rate).partition(" (burst ")
    assume(not text.endswith("ns"))
    assert parse_rates(text, int(burst[:-1]) if burst else None) == (rate,)


def test_a_rate_that_cannot_be_written_has_words_all_the_same() -> None:
    assert rate_text(Rate(3, 7)) == "3/7ns"
    assert rate_text(Rate(3, 1, 5)) == "3/ns (burst 5)"


@pytest.mark.parametrize("text", ["10/second", "5/15min", "1_000/day", "3/ms", "1/2h", "7/week", "1/2week", "1/year"])
def test_a_rate_is_written_as_people_write_it(text: str) -> None:
    assert rate_text(parse_rates(text)[0]) == text


@given(st.integers(1, MAX_PERIOD // 10**6))
def test_a_duration_in_words_is_that_duration_again(milliseconds: int) -> None:
    assert parse_duration(duration_text(milliseconds * 10**6)) == milliseconds * 10**6


@given(st.integers(1, MAX_AMOUNT), st.sampled_from(("day", "month")))
def test_a_quota_in_words_is_that_quota_again(limit: int, span: Any) -> None:
    assert parse_quota(quota_text(Quota(limit, span))) == Quota(limit, span)
