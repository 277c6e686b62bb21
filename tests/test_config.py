"""Loading a configuration: the reference, every mistake at its place, includes, secrets, speed."""

# A row of a table is one line, however long.
# ruff: noqa: E501

from __future__ import annotations

import hashlib
import os
import sys
import time
from datetime import UTC, datetime
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import limits
import pytest
import yaml

from seawall.config import ConfigError, Diagnostic, Format, check, load, load_mapping, loads, simple
from seawall.config.loading import check_mapping, check_text, fingerprint
from seawall.decision import Mode
from seawall.notation import DAY, MINUTE, parse_rates
from seawall.policy import Access, Key, Plan, Policy, Priority, Route, RouteLimit, Streaming, Tenant
from seawall.rate import SECOND, Quota, Rate

DATA = Path(__file__).parent / "data"
REFERENCE = DATA / "seawall.yaml"
FORMS: tuple[Format, ...] = ("text", "json", "github")
HASH = "sha256:" + "0" * 64
SMALLEST = "version: 1\nplans: {default: {rate: 100/minute}}\n"


def mistakes(text: str) -> list[Diagnostic]:
    report = check_text(text, "f.yaml", None)
    assert (report.policy is None) == bool(report.errors)
    return list(report.errors)


def mistake(text: str) -> Diagnostic:
    """The only mistake in a file that has otherwise a plan and a version."""
    (found,) = mistakes(SMALLEST + text)
    assert found.line > 0
    return found


# The reference


def test_the_reference_loads_unchanged_and_every_line_of_it_is_in_the_policy() -> None:
    policy = load(REFERENCE)
    free = Plan("free", (Rate(10, SECOND),), Quota(10_000, "day"), 5, "low")
    pro = Plan("pro", (Rate(100, SECOND, 300),), Quota(1_000_000, "month"), 50, "normal")
    internal = Plan("internal", (), None, None, "critical")
    assert policy.mode is Mode.ENFORCE
    assert policy.identity.tenant == (("api_key", "x-api-key"), ("state", "tenant_id"))
    assert policy.identity.anonymous == "per-ip"
    assert policy.identity.trusted_proxies == (ip_network("10.0.0.0/8"), ip_network("fd00::/8"))
    assert policy.identity.ipv6_prefix == 64
    assert policy.plans == {
        "anonymous": Plan("anonymous", (Rate(30, MINUTE),), priority="low"),
        "free": free,
        "pro": pro,
        "internal": internal,
    }
    assert (policy.default_plan, policy.anonymous_plan) == ("free", "anonymous")
    assert policy.tenants == {
        "acme": Tenant("acme", Plan("pro", (Rate(500, SECOND),), Quota(1_000_000, "month"), 50, "normal")),
        "globex": Tenant("globex", free, mode=Mode.SHADOW),
        "batch-jobs": Tenant("batch-jobs", internal, "background"),
    }
    until = int(datetime(2027, 7, 1, tzinfo=UTC).timestamp()) * SECOND
    assert policy.keys == {
        hashlib.sha256(b"foo").digest(): Key("acme"),
        hashlib.sha256(b"bar").digest(): Key("acme", until),
    }
    assert policy.access == Access((ip_network("198.51.100.0/24"),), (ip_network("10.1.0.0/16"),))
    assert policy.routes == (
        Route("probes", ("/healthz", "/readyz", "/metrics"), exempt=True),
        Route(
            "login",
            ("/login",),
            frozenset({"POST"}),
            limits=(
                RouteLimit("login-ip", ("client_ip",), (Rate(5, MINUTE),)),
                RouteLimit("login-pair", ("client_ip", "tenant"), (Rate(20, 60 * MINUTE),)),
            ),
            on_backend_failure="deny",
        ),
        Route(
            "search",
            ("/v1/search",),
            cost=5,
            priority="normal",
            limits=(
                RouteLimit("search-all", ("global",), (Rate(2000, SECOND),)),
                RouteLimit("search-daily", ("tenant",), (), Quota(50_000, "day")),
            ),
        ),
        Route("items", ("/v1/items/{id}",)),
        Route("events", ("/v1/events/**",), streaming=Streaming(500, 10)),
    )
    assert policy.priorities == (
        Priority("critical"),
        Priority("normal", 250_000_000),
        Priority("low", 100_000_000),
        Priority("background", None, 0.02),
    )
    assert (policy.shedding.initial, policy.shedding.min, policy.shedding.max) == (20, 2, 1000)
    assert (policy.shedding.algorithm, policy.shedding.loop_lag_target_ns) == ("adaptive", 10_000_000)
    assert (policy.backend.type, policy.backend.max_keys) == ("memory", 100_000)
    assert (policy.responses.headers, policy.responses.docs_url) == ("draft-11", "https://example.com/docs/limits")
    assert policy.reload_ns == 2 * SECOND
    assert (policy.metrics.path, policy.metrics.tenant_label) == ("/metrics", 20)
    assert policy.status is not None
    assert policy.status.path == "/-/seawall"
    assert policy.digest == hashlib.sha256(REFERENCE.read_bytes()).hexdigest()


def test_what_the_reference_is_warned_about_is_in_the_policy() -> None:
    policy, report = load(REFERENCE), check(REFERENCE)
    assert [str(found) for found in report.warnings] == list(policy.warnings)
    assert report.errors == ()
    assert not report.unreadable
    assert report.files == (REFERENCE,)


def test_the_comments_of_the_reference_are_right_when_they_are_uncommented() -> None:
    text = REFERENCE.read_text()
    text = text.replace("    # header: forwarded ", "    header: forwarded ")
    text = text.replace("    # mode: shadow ", "    mode: shadow ")
    text = text.replace("# priority_header:", "priority_header:")
    text = text.replace("  # body_timeout:", "  body_timeout:").replace("type: memory ", "type: redis ")
    for key in ("url", "timeout", "on_failure", "key_prefix", "instances", "leases", "deny_cache"):
        text = text.replace(f"  # {key}:", f"  {key}:")
    policy = loads(text)
    assert policy.identity.header == "forwarded"
    assert policy.routes[2].mode is Mode.SHADOW
    assert policy.priority_header is not None
    assert policy.priority_header.name == "x-request-priority"
    assert policy.shedding.body_timeout_ns == 10 * SECOND
    assert (policy.backend.type, policy.backend.url) == ("redis", "redis://localhost:6379/0")
    assert (policy.backend.timeout_ns, policy.backend.instances) == (25_000_000, 4)


def test_a_mapping_means_what_the_same_yaml_means() -> None:
    mapping = yaml.safe_load(REFERENCE.read_text())
    ours, theirs = load_mapping(mapping), load(REFERENCE)
    assert ours.tenants == theirs.tenants
    assert (ours.routes, ours.keys, ours.identity) == (theirs.routes, theirs.keys, theirs.identity)
    assert ours.digest != theirs.digest
    assert ours.digest == load_mapping(mapping).digest


# Small files


def test_the_smallest_file_holds_everybody() -> None:
    policy = loads(SMALLEST)
    assert policy.plans == {"default": Plan("default", (Rate(100, MINUTE),))}
    assert (policy.default_plan, policy.anonymous_plan) == ("default", "default")
    assert policy.warnings == ()
    assert [priority.name for priority in policy.priorities] == ["critical", "normal", "low"]


@pytest.mark.parametrize(
    "rates",
    ["100/minute", limits.parse("100/minute"), ["100/minute"], [limits.parse("100/minute")], parse_rates("100/minute")],
)
def test_one_rate_is_the_smallest_file(rates: Any) -> None:
    policy, file = simple(rates), loads(SMALLEST)
    assert policy.plans == file.plans
    assert (policy.default_plan, policy.anonymous_plan) == (file.default_plan, file.anonymous_plan)
    assert policy.digest


def test_one_rate_that_cannot_be_read_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"did you mean '10/second'"):
        simple("10")
    with pytest.raises(ConfigError, match="did you mean '5/second'"):
        simple(["10/second", 5])  # type: ignore[arg-type]


def test_no_plans_limit_nobody() -> None:
    policy = loads("version: 1\n")
    assert (policy.plans, policy.default_plan, policy.anonymous_plan) == ({}, None, None)


def test_the_only_plan_is_the_default() -> None:
    policy = loads("version: 1\nplans: {a: {}}\ntenants: {x: {}}\n")
    assert (policy.default_plan, policy.anonymous_plan, policy.tenants["x"].plan.name) == ("a", "a", "a")


def test_the_plan_anonymous_is_for_callers_without_a_tenant() -> None:
    policy = loads("version: 1\nplans: {anonymous: {}, pro: {}}\n")
    assert (policy.default_plan, policy.anonymous_plan) == (None, "anonymous")
    assert loads("version: 1\nplans: {anonymous: {}, default: {}}\n").default_plan == "default"


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("plans: {a: {}, b: {}}\n", "plans"),
        ("plans: {a: {}, b: {}}\nidentity: {anonymous: deny, tenant: [{state: user}]}\n", "plans"),
        ("plans: {a: {}, b: {}}\nidentity: {anonymous: deny}\ntenants: {x: {}, y: {}}\n", "tenants.x"),
        ("tenants: {x: {}}\n", "tenants.x"),
    ],
)
def test_who_needs_a_plan_must_have_one(text: str, path: str) -> None:
    (found,) = mistakes("version: 1\n" + text)
    assert (found.code, found.path) == ("E034", path)


@pytest.mark.parametrize(
    "text",
    [
        "identity: {anonymous: deny}\n",
        "defaults: {anonymous_plan: a}\n",
        "defaults: {plan: a}\nidentity: {tenant: [{state: user}]}\ntenants: {x: {}}\n",
    ],
)
def test_who_is_refused_or_has_a_plan_needs_no_default(text: str) -> None:
    assert loads("version: 1\nplans: {a: {}, b: {}}\n" + text)


def test_a_tenant_without_overrides_shares_its_plan() -> None:
    policy = loads(SMALLEST + "tenants: {x: {}, y: {plan: default}, z: {overrides: {concurrency: 3}}}\n")
    assert policy.tenants["x"].plan is policy.tenants["y"].plan is policy.plans["default"]
    assert policy.tenants["z"].plan == Plan("default", (Rate(100, MINUTE),), None, 3)


def test_overrides_replace_whole_values() -> None:
    text = "version: 1\nplans: {p: {rate: {limit: 10/s, burst: 99}, quota: 5/day, concurrency: 2, priority: low}}\n"
    text += "tenants:\n  a: {overrides: {rate: 20/s}}\n  b: {overrides: {quota: unlimited, priority: critical}}\n"
    policy = loads(text)
    assert policy.tenants["a"].plan == Plan("p", (Rate(20, SECOND, 20),), Quota(5, "day"), 2, "low")
    assert policy.tenants["b"].plan == Plan("p", (Rate(10, SECOND, 99),), None, 2, "critical")


def test_rates_may_be_a_list_with_bursts_of_their_own() -> None:
    policy = loads(
        "version: 1\nplans: {p: {rate: [10/s, {limit: 100/minute, burst: 7}], quota: {limit: 5/month, zone: Asia/Tokyo}}}\n"
    )
    assert policy.plans["p"] == Plan("p", (Rate(10, SECOND), Rate(100, MINUTE, 7)), Quota(5, "month", "Asia/Tokyo"))


def test_get_includes_head() -> None:
    policy = loads(SMALLEST + "routes: [{name: a, match: {path: /a, methods: [GET, POST]}}]\n")
    assert policy.routes[0].methods == frozenset({"GET", "HEAD", "POST"})


def test_reload_may_be_off() -> None:
    assert loads(SMALLEST + "reload: off\n").reload_ns is None


@pytest.mark.parametrize(
    ("expires", "moment"),
    [
        ("2027-06-30", datetime(2027, 7, 1, tzinfo=UTC)),
        ("2028-02-28", datetime(2028, 2, 29, tzinfo=UTC)),
        ("2027-06-30T12:00:00Z", datetime(2027, 6, 30, 12, tzinfo=UTC)),
        ("2027-06-30T12:00:00", datetime(2027, 6, 30, 12, tzinfo=UTC)),
        ("2027-06-30T12:00:00+02:00", datetime(2027, 6, 30, 10, tzinfo=UTC)),
        ("2027-06-30 12:00:00.5", datetime(2027, 6, 30, 12, 0, 0, 500_000, tzinfo=UTC)),
    ],
)
def test_a_key_is_valid_to_the_end_of_its_day(expires: str, moment: datetime) -> None:
    policy = loads(SMALLEST + f"tenants: {{x: {{keys: [{{hash: '{HASH}', expires: '{expires}'}}]}}}}\n")
    (key,) = policy.keys.values()
    assert key.expires_ns is not None
    assert datetime.fromtimestamp(key.expires_ns / 1e9, UTC) == moment


def test_tenants_may_have_any_printable_name() -> None:
    policy = loads(
        SMALLEST
        + "tenants: {no: {}, on: {}, 5: {}, 'a b/c': {}, Ünï: {}, [bracket]: {}}\n".replace("[bracket]", "'[key]'")
    )
    assert list(policy.tenants) == ["no", "on", "5", "a b/c", "Ünï", "[key]"]


# Mistakes, one by one


@pytest.mark.parametrize(
    ("text", "code", "path", "words"),
    [
        # keys and types
        ("mod: off", "E010", "mod", "unknown key 'mod'; did you mean 'mode'?"),
        ("shedding: {x: 1}", "E010", "shedding.x", "unknown key 'x'; known are algorithm, limit, loop_lag_target,"),
        ("routes: [{name: a, match: {path: /a, method: [GET]}}]", "E010", "routes[0].match.method", "did you mean 'methods'?"),
        ("metrics: {tenant_label: {topp: 5, top: 5}}", "E010", "metrics.tenant_label.topp", "did you mean 'top'?"),
        ("tenants: []", "E013", "tenants", "'tenants' is a mapping, not a list"),
        ("routes: {}", "E013", "routes", "'routes' is a list, not a mapping"),
        ("access: {deny: 10.0.0.0/8}", "E013", "access.deny", "'deny' is a list, not text; write it in [brackets]"),
        ("access: {deny: [5]}", "E013", "access.deny[0]", "an entry of 'deny' is text, not the number 5; write it in quotes"),
        ("routes: [5]", "E013", "routes[0]", "an entry of 'routes' is a mapping, not the number 5"),
        ("responses: {detail: 1}", "E013", "responses.detail", "'detail' is true or false, not the number 1"),
        ("responses: {detail: no}", "E013", "responses.detail", "'detail' is true or false, not text"),
        ("shedding: {status: true}", "E013", "shedding.status", "'status' is a whole number, not 'true'"),
        ("shedding: {status: '503'}", "E013", "shedding.status", "not text; leave out the quotes"),
        ("shedding: {limit: {max: 1.5}}", "E013", "shedding.limit.max", "is a whole number, not the number 1.5"),
        ("metrics: {tenant_label: [5]}", "E013", "metrics.tenant_label", "is text or a mapping, not a list"),
        ("metrics: {tenant_label: 20}", "E014", "metrics.tenant_label", "is one of off, not '20'"),
        ("mode: of", "E014", "mode", "'mode' is one of off, shadow, enforce, not 'of'; did you mean 'off'?"),
        ("mode: true", "E014", "mode", "is one of off, shadow, enforce"),
        ("routes: [{name: a}]", "E011", "routes[0].match", "'match' is missing"),
        ("status: {path: /s}", "E011", "status.allow", "'allow' is missing; list the networks"),
        ("status: {allow: []}", "E014", "status.allow", "'allow' has at least 1 entry"),
        ("mode:", "E012", "mode", "'mode' is blank"),
        ("priorities: {critical: }", "E012", "priorities.critical", "'critical' is blank"),
        ("responses: {docs_url: ''}", "E012", "responses.docs_url", "'docs_url' is blank"),
        # notations
        ("tenants: {x: {overrides: {rate: 5}}}", "E020", "tenants.x.overrides.rate", "did you mean '5/second'?"),
        ("tenants: {x: {overrides: {rate: {limit: 5/s, burst: 0}}}}", "E014", "tenants.x.overrides.rate.burst", "'burst' is at least 1"),
        ("tenants: {x: {overrides: {rate: {limit: 5/sx, burst: 7}}}}", "E020", "tenants.x.overrides.rate.limit", "unknown time unit"),
        ("tenants: {x: {overrides: {rate: {limit: unlimited, burst: 7}}}}", "E020", "tenants.x.overrides.rate.burst", "has no burst"),
        ("tenants: {x: {overrides: {rate: [5/s, 7]}}}", "E020", "tenants.x.overrides.rate[1]", "did you mean '7/second'?"),
        ("tenants: {x: {overrides: {rate: []}}}", "E014", "tenants.x.overrides.rate", "has at least 1 entry"),
        ("tenants: {x: {overrides: {quota: 5/hour}}}", "E020", "tenants.x.overrides.quota", "per calendar day or month"),
        ("tenants: {x: {overrides: {quota: [5/day]}}}", "E013", "tenants.x.overrides.quota", "is text or a mapping, not a list"),
        ("tenants: {x: {overrides: {quota: {limit: 5/day, zone: Europe/Berln}}}}", "E021", "tenants.x.overrides.quota.zone", "did you mean 'Europe/Berlin'?"),
        ("reload: 2", "E020", "reload", "did you mean '2s'?"),
        ("reload: 1ms", "E020", "reload", "'1ms' is out of range: 100ms to 1d"),
        ("reload: offf", "E020", "reload", "is not a duration"),
        ("priorities: {a: {min_share: 2}}", "E014", "priorities.a.min_share", "'2' has no '%'; did you mean '2%'?"),
        ("priorities: {a: {min_share: 0%}}", "E014", "priorities.a.min_share", "is not a percentage"),
        ("priorities: {a: {min_share: 101%}}", "E014", "priorities.a.min_share", "is not a percentage"),
        ("priorities: {a: {min_share: true}}", "E014", "priorities.a.min_share", "is text such as 2%"),
        # numbers
        ("tenants: {x: {overrides: {concurrency: 0}}}", "E014", "tenants.x.overrides.concurrency", "'concurrency' is at least 1"),
        ("routes: [{name: a, match: {path: /a}, cost: 1_000_001}]", "E014", "routes[0].cost", "'cost' is at most 1_000_000"),
        ("routes: [{name: a, match: {path: /a}, cost: .nan}]", "E013", "routes[0].cost", "'cost' is a whole number, not the number nan"),
        ("identity: {client_ip: {ipv6_prefix: 31}}", "E014", "identity.client_ip.ipv6_prefix", "is at least 32"),
        ("identity: {client_ip: {trusted_hops: 33}}", "E014", "identity.client_ip.trusted_hops", "is at most 32"),
        ("backend: {max_keys: 999}", "E014", "backend.max_keys", "is at least 1_000"),
        ("priorities: {}", "E014", "priorities", "has at least 1 entry"),
        # names
        ("routes: [{name: Log in, match: {path: /a}}]", "E032", "routes[0].name", "did you mean 'log-in'?"),
        ("routes: [{name: ÄÖ, match: {path: /a}}]", "E032", "routes[0].name", "is not a name"),
        ("priorities: {-a: {}}", "E032", "priorities.-a", "did you mean 'a'?"),
        ("tenants: {'a\\tb': {}}".replace("'", '"'), "E032", "tenants.a\tb", "1 to 128 printable characters"),
        ("tenants: {'': {}}", "E032", "tenants.", "1 to 128 printable characters"),
        (f"tenants: {{{'x' * 129}: {{}}}}", "E032", f"tenants.{'x' * 129}", "1 to 128 printable characters"),
        ("identity: {tenant: [{api_key: {header: 'X Key'}}]}", "E014", "identity.tenant[0].api_key.header", "'X Key' is not a header's name"),
        ("identity: {tenant: [{state: ' x'}]}", "E014", "identity.tenant[0].state", "1 to 64 printable characters"),
        ("identity: {tenant: [{}]}", "E015", "identity.tenant[0]", "either {api_key:"),
        ("identity: {tenant: [{state: x, api_key: {header: x}}]}", "E015", "identity.tenant[0]", "either {api_key:"),
        # references
        ("tenants: {x: {plan: defualt}}", "E030", "tenants.x.plan", "unknown plan 'defualt'; did you mean 'default'?"),
        ("tenants: {x: {plan: gold}}", "E030", "tenants.x.plan", "unknown plan 'gold'; defined are default"),
        ("tenants: {x: {priority: hi}}", "E030", "tenants.x.priority", "defined are critical, normal, low"),
        ("tenants: {x: {overrides: {priority: hi}}}", "E030", "tenants.x.overrides.priority", "unknown priority 'hi'"),
        ("defaults: {plan: free}", "E030", "defaults.plan", "unknown plan 'free'"),
        ("defaults: {anonymous_plan: free}", "E030", "defaults.anonymous_plan", "unknown plan 'free'"),
        ("routes: [{name: a, match: {path: /a}, priority: lo}]", "E030", "routes[0].priority", "did you mean 'low'?"),
        # addresses
        ("access: {exempt: [10.0.0.1/8]}", "E040", "access.exempt[0]", "did you mean '10.0.0.0/8'?"),
        ("access: {exempt: [localhost]}", "E040", "access.exempt[0]", "is not an address or network"),
        ("access: {exempt: ['*']}", "E040", "access.exempt[0]", "'*' is not a network"),
        ("identity: {client_ip: {trusted_proxies: ['*']}}", "E041", "identity.client_ip.trusted_proxies[0]", "let every caller choose"),
        ("identity: {client_ip: {trusted_proxies: [0.0.0.0/0]}}", "E041", "identity.client_ip.trusted_proxies[0]", "let every caller choose"),
        ("identity: {client_ip: {trusted_proxies: ['::/0']}}", "E041", "identity.client_ip.trusted_proxies[0]", "let every caller choose"),
        ("identity: {client_ip: {trusted_proxies: [0.0.0.0/1, 128.0.0.0/1]}}", "E041", "identity.client_ip.trusted_proxies", "every address"),
        ("identity: {client_ip: {trusted_proxies: [nope]}}", "E040", "identity.client_ip.trusted_proxies[0]", "is not an address"),
        ("identity: {client_ip: {trusted_proxies: [10.0.0.0/8], trusted_hops: 1}}", "E015", "identity.client_ip.trusted_hops", "exclude each other"),
        ("priority_header: {name: x, raise_from: ['::/1', '8000::/1']}", "E041", "priority_header.raise_from", "every address"),
        # paths and methods
        ("routes: [{name: a, match: {path: a}}]", "E042", "routes[0].match.path", "did you mean '/a'?"),
        ("routes: [{name: a, match: {path: [/a, '/a?b']}}]", "E042", "routes[0].match.path[1]", "only the path is matched"),
        ("routes: [{name: a, match: {path: '/a/{b}c'}}]", "E042", "routes[0].match.path", "are whole segments"),
        ("routes: [{name: a, match: {path: '/a/{b}/{b}'}}]", "E042", "routes[0].match.path", "is there twice"),
        ("routes: [{name: a, match: {path: /a/*}}]", "E042", "routes[0].match.path", "write '{name}' for one segment"),
        ("routes: [{name: a, match: {path: /a/b**}}]", "E042", "routes[0].match.path", "are whole segments"),
        ("routes: [{name: a, match: {path: /a%20b}}]", "E042", "routes[0].match.path", "matched after decoding"),
        ("routes: [{name: a, match: {path: //a}}]", "E042", "routes[0].match.path", "empty segment"),
        ('routes: [{name: a, match: {path: "/a\\n"}}]', "E042", "routes[0].match.path", "no control characters"),
        (f"routes: [{{name: a, match: {{path: /{'a' * 1024}}}}}]", "E042", "routes[0].match.path", "at most 1024"),
        ("routes: [{name: a, match: {path: []}}]", "E014", "routes[0].match.path", "has at least 1 entry"),
        ("metrics: {path: '/m/{x}', allow: ['::1']}", "E042", "metrics.path", "is one exact path"),
        ("metrics: {path: /x, allow: ['::1']}\nstatus: {path: /x, allow: ['::1']}", "E015", "status", "both at '/x'"),
        ("routes: [{name: a, match: {path: /a, methods: [post]}}]", "E014", "routes[0].match.methods[0]", "did you mean 'POST'?"),
        ("routes: [{name: a, match: {path: /a, methods: [GETT]}}]", "E014", "routes[0].match.methods[0]", "did you mean 'GET'?"),
        ("routes: [{name: a, match: {path: /a, methods: [WEBSOCKET]}}]", "E014", "routes[0].match.methods[0]", "matched where GET is"),
        ("routes: [{name: a, match: {path: /a, methods: ['a b c d']}}]", "E014", "routes[0].match.methods[0]", "is not a method"),
        ("routes: [{name: a, match: {path: /a, methods: []}}]", "E014", "routes[0].match.methods", "has at least 1 entry"),
        # route limits
        ("routes: [{name: a, match: {path: /a}, limits: {b: {rate: 5/s}}}]", "E011", "routes[0].limits.b.per", "write whose limit it is"),
        ("routes: [{name: a, match: {path: /a}, limits: {b: {per: tenant}}}]", "E011", "routes[0].limits.b", "needs a 'rate' or a 'quota'"),
        ("routes: [{name: a, match: {path: /a}, limits: {b: {per: tenant, rate: unlimited}}}]", "E015", "routes[0].limits.b.rate", "limits nothing"),
        ("routes: [{name: a, match: {path: /a}, limits: {b: {per: tenat, rate: 5/s}}}]", "E014", "routes[0].limits.b.per", "did you mean 'tenant'?"),
        ("routes: [{name: a, match: {path: /a}, limits: {b: {per: 'state:', rate: 5/s}}}]", "E014", "routes[0].limits.b.per", "1 to 64 printable"),
        ("routes: [{name: a, match: {path: /a}, limits: {b: {per: [tenant, tenant], rate: 5/s}}}]", "E015", "routes[0].limits.b.per", "there twice"),
        ("routes: [{name: a, match: {path: /a}, limits: {b: {per: [tenant, global], rate: 5/s}}}]", "E015", "routes[0].limits.b.per", "cannot be combined"),
        ("routes: [{name: a, match: {path: /a}, limits: {quota: {per: tenant, rate: 5/s}}}]", "E032", "routes[0].limits.quota", "give this limit another"),
        ("routes: [{name: a, match: {path: /a}, limits: {rate-2: {per: tenant, rate: 5/s}}}]", "E032", "routes[0].limits.rate-2", "give this limit another"),
        ("routes: [{name: a, match: {path: /a}, exempt: true, cost: 5}]", "E015", "routes[0].cost", "an exempt route has no cost"),
        ("routes: [{name: a, match: {path: /a}, streaming: {max: 5, max_per_tenant: 6}}]", "E015", "routes[0].streaming.max_per_tenant", "more than max (5)"),
        ("routes: [{name: a, match: {path: /a}}, {name: a, match: {path: /b}}]", "E031", "routes[1].name", "defined twice (first at line 3)"),
        # sections
        ("shedding: {limit: {min: 5, initial: 4}}", "E015", "shedding.limit.initial", "not in 5..1000"),
        ("shedding: {limit: {min: 5, max: 4}}", "E015", "shedding.limit.min", "more than max (4)"),
        ("shedding: {status: 404}", "E014", "shedding.status", "is a 5xx or 429, not 404"),
        ("backend: {type: redis}", "E011", "backend.type", "needs a 'url'"),
        ("backend: {type: limits}", "E011", "backend.type", "needs a 'url'"),
        ("backend: {url: redis://x}", "E015", "backend.url", "memory is never shared"),
        ("backend: {type: redis, url: localhost}", "E014", "backend.url", "is scheme://"),
        ("backend: {type: redis, url: memcached://x}", "E014", "backend.url", "begins with redis://"),
        ("backend: {type: redis, url: redis://x/db}", "E014", "backend.url", "a database is a number"),
        ("backend: {type: redis, url: redis://x?socket_timeout=1}", "E014", "backend.url", "`backend.timeout`"),
        ("backend: {type: redis, url: 'unix:/run/redis.sock'}", "E014", "backend.url", "is scheme://"),
        ("backend: {key_prefix: 'a b'}", "E014", "backend.key_prefix", "letters, digits"),
        ("backend: {secret: short}", "E014", "backend.secret", "8 to 1024 printable characters"),
        ("responses: {docs_url: 'javascript:x'}", "E014", "responses.docs_url", "http:// or https://"),
        ("priority_header: {name: 'a:b'}", "E014", "priority_header.name", "is not a header's name"),
        # includes and variables
        ("include: /etc/*.yaml", "E050", "include", "is relative to the file"),
        ("include: [a.yaml, ~/x]", "E050", "include[1]", "is relative to the file"),
        ('include: "a\\x01"', "E050", "include", "printable"),
        ("mode: ${NOT_DEFINED_HERE}", "E051", "mode", "'NOT_DEFINED_HERE' is not defined"),
        ("mode: '${'", "E051", "mode", "begins a variable"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_error_at_its_place(text: str, code: str, path: str, words: str) -> None:
    found = mistake(text + "\n")
    assert (code, path) == (found.code, found.path)
    assert words in found.message


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("plans: {}\n", "E011", "'version' is missing; write version: 1"),
        ("version: 2\n", "E014", "version 2 is not known to this release; write version: 1"),
        ("version: '1'\n", "E013", "'version' is a whole number, not text; leave out the quotes"),
        ("version: true\n", "E013", "'version' is a whole number, not 'true'"),
        ("version: 1.0\n", "E013", "'version' is a whole number"),
        ("version:\n", "E012", "'version' is blank"),
        ("", "E006", "the file is empty"),
        ("# nothing\n", "E006", "the file is empty"),
        ("~\n", "E006", "the file is empty"),
        ("- a\n", "E006", "the file is not a mapping"),
        ("a\n", "E006", "the file is not a mapping"),
        ("${HOME}\n", "E006", "the file is not a mapping"),
        ("${NOT_DEFINED_HERE}\n", "E051", "is not defined"),
    ],
)
def test_a_file_begins_with_its_version(text: str, code: str, words: str) -> None:
    found = mistakes(text)[0]
    assert (found.code, found.line) == (code, 1)
    assert words in found.message


def test_every_mistake_is_reported_in_one_run_as_the_manual_shows_it() -> None:
    text = (
        "version: 1\nidentity: {anonymous: deny}\nplans:\n"
        "  free: {rate: 10_000/dya, concurency: 5}\n  pro: {rate: 1/s}\n"
        "defaults: {plan: free}\n\ntenants:\n  acme: {plan: pro}\n  acme: {plan: free}\n"
    )
    with pytest.raises(ConfigError) as caught:
        loads(text, "seawall.yaml")
    assert str(caught.value) == (
        "seawall.yaml:4:16: error[E020]: unknown time unit 'dya' in '10_000/dya'; did you mean 'day'?\n"
        "    4 |   free: {rate: 10_000/dya, concurency: 5}\n"
        "      |                ^ plans.free.rate\n"
        "seawall.yaml:4:28: error[E010]: unknown key 'concurency'; did you mean 'concurrency'?\n"
        "seawall.yaml:10:3: error[E001]: duplicate key 'acme' (first at line 9)"
    )
    assert [found.code for found in caught.value.diagnostics] == ["E020", "E010", "E001"]


def test_mistakes_of_all_kinds_come_together() -> None:
    text = (
        "a: 1\na: 2\nmode: ${NOT_DEFINED_HERE}\nplans: {p: {rate: 5, priority: x}}\ntenants: {t: {plan: q}}\nreload:\n"
    )
    assert {"E001", "E010", "E011", "E012", "E020", "E030", "E051"} == {found.code for found in mistakes(text)}


def test_one_blank_is_one_mistake() -> None:
    text = "routes:\n  - name: a\n    match: {path: /a}\n    limits:\n      b: {per: tenant, rate: }\n"
    assert [found.code for found in mistakes(SMALLEST + text)] == ["E012"]


def test_what_could_not_be_read_is_not_also_unknown() -> None:
    assert [found.path for found in mistakes("version: 1\nplans: 5\ntenants: {x: {plan: a}}\n")] == ["plans"]
    assert [found.path for found in mistakes(SMALLEST + "priorities: 5\ntenants: {x: {priority: a}}\n")] == [
        "priorities"
    ]
    assert [found.path for found in mistakes(SMALLEST + "tenants: 5\nroutes: 7\n")] == ["tenants", "routes"]
    found = mistakes(
        SMALLEST + "tenants: {x: {keys: 5}, y: {keys: [{hash: 5}]}, z: 5}\nroutes: [5, {name: 5, limits: 5}]\n"
    )
    assert {"E013", "E011", "E033"} >= {one.code for one in found}


def test_a_plan_that_is_referred_to_may_itself_be_wrong() -> None:
    found = mistakes("version: 1\nplans: {p: {rate: 5}}\ntenants: {t: {plan: p}}\n")
    assert [one.path for one in found] == ["plans.p.rate"]


def test_names_of_limits_are_unique_with_all_that_is_derived_from_them() -> None:
    text = """
routes:
  - name: a
    match: {path: /a}
    limits:
      both: {rate: 5/s, quota: 5/day, per: tenant}
      many: {rate: [5/s, 9/minute, {limit: 10/hour}], per: tenant}
  - name: b
    match: {path: /b}
    limits:
      both-quota: {rate: 5/s, per: tenant}
      many-3: {rate: 5/s, per: tenant}
      both: {rate: 5/s, per: tenant}
      many-4: {rate: 5/s, per: tenant}
"""
    found = mistakes(SMALLEST + text)
    assert [one.path for one in found] == [
        "routes[1].limits.both-quota",
        "routes[1].limits.many-3",
        "routes[1].limits.both",
    ]
    assert found[1].message == "limit 'many-3' is defined twice (first at line 9)"


def test_a_name_and_what_is_derived_from_it_stay_within_64_characters() -> None:
    text = f"routes: [{{name: a, match: {{path: /a}}, limits: {{{'n' * 60}: {{rate: 5/s, quota: 5/day, per: tenant}}}}}}]\n"
    found = mistake(text)
    assert found.code == "E032"
    assert "-quota" in found.message


def test_a_key_belongs_to_one_tenant_and_is_listed_once() -> None:
    text = f"tenants:\n  a: {{keys: ['{HASH}']}}\n  b: {{keys: [{{hash: '{HASH}'}}]}}\n"
    found = mistake(text)
    assert (found.code, found.path) == ("E031", "tenants.b.keys[0]")
    assert "(first for tenant 'a', f.yaml:4)" in found.message
    upper = "SHA256:".lower() + "AB" * 32
    found = mistake(f"tenants: {{a: {{keys: ['{upper}', '{upper.lower()}']}}}}\n")
    assert (found.code, found.path) == ("E031", "tenants.a.keys[1]")


def test_a_mapping_has_mistakes_without_lines() -> None:
    with pytest.raises(ConfigError) as caught:
        load_mapping({"version": 1, "plans": {"p": {"rate": 5}}, "routes": [
            {"name": "a", "match": {"path": "/a"}}, {"name": "a", "match": {"path": "/b"}}]})  # fmt: skip
    assert str(caught.value) == (
        "<mapping>: error[E020]: '5' has no time unit; did you mean '5/second'? (plans.p.rate)\n"
        "<mapping>: error[E031]: route 'a' is defined twice (routes[1].name)"
    )


def test_a_key_listed_twice_in_a_mapping_names_the_mapping() -> None:
    report = check_mapping(
        {"version": 1, "plans": {"p": {}}, "tenants": {"a": {"keys": [HASH]}, "b": {"keys": [HASH]}}}
    )
    assert "(first for tenant 'a', <mapping>)" in report.errors[0].message


# Files


def test_what_keeps_a_file_from_being_read_is_told_from_what_is_wrong_in_it(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path, "a\0b", tmp_path / "x" / "y"):
        report = check(path)
        assert report.unreadable
        assert [found.code for found in report.errors] == ["E000"]
        with pytest.raises(ConfigError, match="cannot be read"):
            load(path)


@pytest.mark.skipif(sys.platform == "win32", reason="no FIFOs")
@pytest.mark.parametrize("name", ["seawall.yaml", "tenants.d/a.yaml"])
@pytest.mark.parametrize("what", ["a pipe", "a device", "a directory"])
def test_what_is_no_regular_file_is_refused_at_its_place_and_at_once(what: str, name: str, tmp_path: Path) -> None:
    main = files(tmp_path, main=SMALLEST + "include: tenants.d/a.yaml\n")
    path = tmp_path / name
    path.unlink(missing_ok=True)
    if what == "a pipe":
        os.mkfifo(path)
    elif what == "a device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    report = check(main)
    (found,) = report.errors
    why = "Is a directory" if what == "a directory" else "it is not a regular file"
    assert (found.file, found.code, report.unreadable) == (str(path), "E000", True)
    assert found.message == f"cannot be read: {why}"
    assert fingerprint(main, report.includes) == report.seen


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_unreadable(tmp_path: Path) -> None:  # pragma: no cover
    path = tmp_path / "secret.yaml"
    path.write_text(SMALLEST)
    path.chmod(0)
    assert check(path).unreadable


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"x" * (5 * 1024 * 1024), "E004"),
        (b"\x80\x81\x82", "E005"),
        (b"version: 1\n\xff", "E005"),
        (b"\x89PNG\r\n\x1a\n\0\0\0", "E005"),
        ("version: 1\n".encode("utf-16"), "E005"),
        (b"\0\0\0\0", "E005"),
        (b"", "E006"),
    ],
)
def test_what_is_no_configuration_is_refused_without_a_traceback(content: bytes, code: str, tmp_path: Path) -> None:
    path = tmp_path / "seawall.yaml"
    path.write_bytes(content)
    report = check(path)
    assert [code] == [found.code for found in report.errors]
    assert not report.unreadable
    with pytest.raises(ConfigError):
        load(path)


def test_a_byte_that_is_not_utf_8_is_reported_where_it_is() -> None:
    report = check_text("version: 1\na: \ud800", "x", None)
    assert [(found.code, found.line, found.column) for found in report.errors] == [("E005", 2, 4)]


def test_a_byte_order_mark_is_not_in_the_way(tmp_path: Path) -> None:
    path = tmp_path / "seawall.yaml"
    path.write_text(SMALLEST, "utf-8-sig")
    assert load(path).plans
    assert loads("\ufeff" + SMALLEST).plans


def test_windows_line_ends_do_not_move_mistakes(tmp_path: Path) -> None:
    path = tmp_path / "seawall.yaml"
    path.write_bytes(b"version: 1\r\nmode: x\r\n")
    assert [(found.line, found.source) for found in check(path).errors] == [(2, "mode: x")]


def test_a_path_may_be_text_or_bytes_or_path(tmp_path: Path) -> None:
    path = tmp_path / "seawall.yaml"
    path.write_text(SMALLEST)
    assert load(path) == load(str(path)) == load(os.fsencode(path))  # type: ignore[arg-type]


# Includes


def files(tmp_path: Path, **contents: str) -> Path:
    (tmp_path / "tenants.d").mkdir(exist_ok=True)
    for name, text in contents.items():
        (tmp_path / ("seawall.yaml" if name == "main" else f"tenants.d/{name}.yaml")).write_text(text)
    return tmp_path / "seawall.yaml"


MAIN = SMALLEST + "include: tenants.d/*.yaml\n"


def test_included_tenants_are_tenants(tmp_path: Path) -> None:
    path = files(tmp_path, main=MAIN, b="tenants: {b: {}}\n", a=f"tenants: {{a: {{keys: ['{HASH}']}}}}\n")
    policy, report = load(path), check(path)
    assert list(policy.tenants) == ["a", "b"]
    assert list(policy.keys.values()) == [Key("a")]
    assert report.files == (path, tmp_path / "tenants.d/a.yaml", tmp_path / "tenants.d/b.yaml")


def test_included_files_are_part_of_the_digest(tmp_path: Path) -> None:
    path = files(tmp_path, main=MAIN, a="tenants: {a: {}}\n")
    before = load(path).digest
    assert before == hashlib.sha256((MAIN + "tenants: {a: {}}\n").encode()).hexdigest()
    files(tmp_path, a="tenants: {a: {mode: shadow}}\n")
    assert load(path).digest != before


def test_a_pattern_that_matches_nothing_is_no_mistake(tmp_path: Path) -> None:
    assert load(files(tmp_path, main=MAIN)).tenants == {}
    assert load(files(tmp_path, main=SMALLEST + "include: [none.yaml, also/none.yaml]\n")).tenants == {}


def test_a_file_that_two_patterns_match_is_included_once(tmp_path: Path) -> None:
    text = SMALLEST + "include: [tenants.d/*.yaml, tenants.d/a.yaml, '*']\n"
    path = files(tmp_path, main=text, a="tenants: {a: {}}\n")
    path.rename(tmp_path / ".hidden.yaml")
    (tmp_path / "link.yaml").symlink_to(tmp_path / "tenants.d/a.yaml")
    assert list(load(tmp_path / ".hidden.yaml").tenants) == ["a"]


def test_a_tenant_defined_in_two_files_names_both_places(tmp_path: Path) -> None:
    path = files(tmp_path, main=MAIN + "tenants:\n  x: {}\n", a="tenants:\n  a: {}\n  x: {}\n", b="tenants: {a: {}}\n")
    found = check(path).errors
    assert [(Path(f.file).name, f.line, f.path.split(".")[1]) for f in found] == [
        ("a.yaml", 3, "x"),
        ("b.yaml", 1, "a"),
    ]
    assert found[0].message == f"tenant 'x' is defined twice (first at {path}:5)"
    assert found[1].message == f"tenant 'a' is defined twice (first at {tmp_path}/tenants.d/a.yaml:2)"


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("include: x.yaml\ntenants: {}\n", "E050", "does not include others"),
        ("plans: {}\ntenants: {}\n", "E050", "has 'tenants' only, not 'plans'"),
        ("tenant: {}\n", "E050", "has 'tenants' only, not 'tenant'"),
        ("tenants: {a: {plan: gold}}\n", "E030", "unknown plan 'gold'"),
        ("tenants: {a: {rate: 5}}\n", "E010", "unknown key 'rate'"),
        ("tenants: {a: \n", "E002", "not YAML"),
        ("tenants:\n", "E012", "'tenants' is blank"),
        ("", "E006", "the file is empty"),
        ("[]", "E006", "not a mapping"),
    ],
)
def test_a_mistake_in_an_included_file_has_that_files_name(text: str, code: str, words: str, tmp_path: Path) -> None:
    found = check(files(tmp_path, main=MAIN, team=text)).errors[0]
    assert (Path(found.file).name, found.code) == ("team.yaml", code)
    assert words in found.message


def test_an_included_file_that_cannot_be_read_is_unreadable(tmp_path: Path) -> None:
    path = files(tmp_path, main=MAIN)
    (tmp_path / "tenants.d/gone.yaml").symlink_to(tmp_path / "nowhere")
    assert check(path).unreadable


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_an_included_link_that_leads_nowhere_or_in_a_circle_is_unreadable(tmp_path: Path) -> None:
    path = files(tmp_path, main=MAIN)
    for name in ("nowhere.yaml", "circle.yaml"):
        (tmp_path / "tenants.d" / name).symlink_to("circle.yaml" if name == "circle.yaml" else "missing")
    found = check(path)
    assert [(Path(one.file).name, one.code) for one in found.errors] == [
        ("circle.yaml", "E000"),
        ("nowhere.yaml", "E000"),
    ]
    assert found.unreadable
    assert fingerprint(path, found.includes) == found.seen


def test_a_directory_is_not_included(tmp_path: Path) -> None:
    path = files(tmp_path, main=SMALLEST + "include: 'tenants.d/*'\n", a="tenants: {a: {}}\n")
    (tmp_path / "tenants.d/old").mkdir()
    assert list(load(path).tenants) == ["a"]


def test_a_file_does_not_include_itself(tmp_path: Path) -> None:
    found = check(files(tmp_path, main=SMALLEST + "include: ['*.yaml']\n")).errors
    assert [(f.code, f.path, f.message) for f in found] == [("E050", "include[0]", "the file includes itself")]


def test_included_files_are_limited_in_number_and_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = files(tmp_path, main=MAIN, a="tenants: {a: {}}\n", b="tenants: {b: {}}\n")
    monkeypatch.setattr("seawall.config.loading.MAX_TOTAL_BYTES", 100)
    assert [(found.code, found.path) for found in check(path).errors] == [("E004", "include")]
    monkeypatch.setattr("seawall.config.loading.MAX_FILES", 1)
    assert [found.message for found in check(path).errors] == ["more than 1 files are included"]


def test_text_includes_from_its_base(tmp_path: Path) -> None:
    files(tmp_path, a="tenants: {a: {}}\n")
    assert list(loads(MAIN, base=tmp_path).tenants) == ["a"]


# Variables and secrets


def test_variables_are_replaced_in_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEAWALL_TEST_RATE", "7/second")
    monkeypatch.delenv("SEAWALL_TEST_NONE", raising=False)
    policy = loads("version: 1\nmode: ${SEAWALL_TEST_NONE:-shadow}\nplans: {p: {rate: '${SEAWALL_TEST_RATE}'}}\n")
    assert (policy.mode, policy.plans["p"].rates) == (Mode.SHADOW, (Rate(7, SECOND),))
    assert load_mapping({"version": 1, "plans": {"p": {"rate": "${SEAWALL_TEST_RATE}"}}}).plans == policy.plans


SECRET = "hunter2-hunter2"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("tenants: {x: {keys: ['${S}']}}", "'${S}' does not expand to a key's hash, made by `seawall hash-key`"),
        ("tenants: {x: {overrides: {rate: '${S}'}}}", "'${S}' does not expand to a rate such as 10/second"),
        ("tenants: {x: {overrides: {rate: '5/${S}'}}}", "'5/${S}' does not expand to a rate such as 10/second"),
        ("tenants: {x: {overrides: {concurrency: '${S}'}}}", "'${S}' does not expand to a whole number"),
        ("tenants: {x: {plan: '${S}'}}", "'${S}' does not expand to a plan of this file"),
        ("mode: ${S}", "'${S}' does not expand to one of off, shadow, enforce"),
        ("reload: ${S}", "'${S}' does not expand to a duration"),
        ("access: {deny: ['${S}']}", "'${S}' does not expand to an address or network"),
        ("backend: {type: redis, url: '${S}'}", "'${S}' does not expand to a backend's url"),
        (
            "routes: [{name: '${S}', match: {path: /}}, {name: '${S}', match: {path: /}}]",
            "route '${S}' is defined twice",
        ),
        ("routes: [{name: a, match: {path: '${S}'}}]", "'${S}' does not expand to a path"),
        ("shedding: {status: 200, algorithm: '${S}'}", "'${S}' does not expand to one of adaptive"),
    ],
)
def test_what_a_variable_brought_in_is_never_shown(text: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("S", SECRET)
    report = check_text(SMALLEST + text + "\n", "f.yaml", None)
    assert words in report.render()
    for form in FORMS:
        assert "hunter2" not in report.render(form)


@pytest.mark.parametrize(
    "text",
    [
        f"tenants: {{x: {{keys: [{SECRET}], pln: default}}}}",
        f"tenants: {{x: {{keys: [{{hash: {SECRET}, expired: 5}}]}}}}",
        f"tenants: {{x: {{keys: {SECRET}}}}}",
        f"tenants: {{x: {{keys: {{{SECRET}: 1}}}}}}",
        f"tenants: {{x: {{keys: [{SECRET}: 5]}}}}",
        f"tenants: {{x: {{keys: [[{SECRET}]]}}}}",
        f"tenants: {{x: {{key: {SECRET}}}}}",
        f"tenants: {{x: {{kyes: [{SECRET}]}}}}",
        f"tenants: {{x: {{keys: ['a\n   {SECRET}'], pln: default}}}}",
        f"tenants: {{x: {{keys: ['{HASH}'], keys: [{SECRET}]}}}}",
        f"tenants: {{x: {{keys: [{{{SECRET}: 1, {SECRET}: 2}}]}}}}",
        f"tenants: {{x: {{keys: [{SECRET}, pln: *x}}}}",
        f"tenants: {{x: {{keys: [{SECRET}]}}, y: *x}}",
        f"tenants: {{x: {{keys: [{SECRET}]}}, y: [}}",
        f"tenants:\n  x:\n    keys: ['{SECRET}\n",
        f"tenants:\n  x:\n    keys:\n    - {HASH}\n\n    # old\n    - @{SECRET}\n",
        f"tenants:\n  x:\n    keys:\n      - hash: {HASH}\n        expires: 2027-01-01\n      - *{SECRET}\n",
        f"tenants:\n  x:\n    keys:\n      - &{SECRET}\n",
        f"tenants:\n  x:\n    keys:\n      - {HASH}\n      -   {HASH}\n          {SECRET}: {SECRET}: x\n",
        f"tenants:\n  x:\n    keys:\n      - {SECRET}\n      -\t{SECRET}: {SECRET}: x",
        f"backend: {{secret: {SECRET}, tipe: memory}}",
        f"backend: {{secret: [{SECRET}]}}",
        f"backend: {{sekret: {SECRET}}}",
        f"backend: {{type: memory, url: 'redis://user:{SECRET}@host'}}",
        f"backend: {{type: redis, url: 'rediss://host?ssl_password={SECRET}&ssl_keyfile=/k', x: 1}}",
        f"backend: {{type: redis, url: 'redis://host?password={SECRET}&db=x'}}",
        f"backend: {{type: redis, url: 'redis://user:{SECRET}@host', x: 1}}",
        f"backend: {{type: redis, url: 'redis://user:{SECRET}@host with space'}}",
    ],
)
def test_a_secret_in_the_file_is_never_shown(text: str) -> None:
    report = check_text(SMALLEST + text + "\n", "f.yaml", None)
    assert report.errors
    for form in FORMS:
        assert "hunter2" not in report.render(form)


def test_a_raw_key_is_refused_with_the_command_that_hashes_it() -> None:
    found = mistake(f"tenants: {{x: {{keys: [{SECRET}]}}}}\n")
    assert (found.code, found.source) == ("E033", None)
    assert "run `seawall hash-key`" in found.message


def test_a_line_with_a_hash_is_shown() -> None:
    found = mistake(f"tenants: {{x: {{keys: ['{HASH}'], pln: default}}}}\n")
    assert found.source is not None


def test_very_many_secrets_hide_all_lines() -> None:
    keys = "\n".join(f"      - secret-number-{n}" for n in range(300))
    report = check_text(SMALLEST + f"tenants:\n  x:\n    keys:\n{keys}\nmod: x\n", "f.yaml", None)
    assert "secret-number" not in report.render("json")


# Size


def big(tenants: range) -> str:
    lines = ["tenants:"]
    for n in tenants:
        digest = hashlib.sha256(str(n).encode()).hexdigest()
        lines.append(f"  tenant-{n}:\n    plan: pro\n    keys:\n      - sha256:{digest}")
        if n % 3 == 0:
            lines.append(f"    overrides: {{rate: {100 + n % 50}/second}}")
    return "\n".join(lines) + "\n"


@pytest.mark.slow
def test_ten_thousand_tenants_load_within_a_second_of_ten(tmp_path: Path) -> None:
    plans = "version: 1\nplans: {default: {}, pro: {rate: 100/second}}\n"
    whole = plans + big(range(10_000))
    begun = time.perf_counter()
    policy = loads(whole)
    assert time.perf_counter() - begun < 10
    assert (len(policy.tenants), len(policy.keys)) == (10_000, 10_000)
    parts = {f"team{n}": big(range(n * 500, n * 500 + 500)) for n in range(20)}
    split = load(files(tmp_path, main=plans + "include: tenants.d/*.yaml\n", **parts))
    assert split.tenants == policy.tenants
    assert split.keys == policy.keys


@pytest.mark.slow
def test_a_file_with_a_hundred_thousand_mistakes_is_refused_in_seconds() -> None:
    text = SMALLEST + "tenants: {" + ", ".join(f"t{n}: {{plan: gold{n}, ratee: 5}}" for n in range(50_000)) + "}\n"
    begun = time.perf_counter()
    report = check_text(text, "f.yaml", None)
    assert time.perf_counter() - begun < 20
    assert len(report.errors) == 1001
    assert "more mistakes are not shown" in report.errors[-1].message


def test_a_policy_is_a_policy() -> None:
    assert isinstance(load(REFERENCE), Policy)
    assert DAY == 86_400 * SECOND


def test_an_overridden_priority_is_the_tenant_s_own() -> None:
    """It wins over a route's, as one that stands beside the plan does."""
    text = "version: 1\nplans: {default: {rate: 1/s}}\ntenants: {a: {plan: default, overrides: {priority: critical}}}\n"
    assert loads(text).tenants["a"].priority == "critical"
