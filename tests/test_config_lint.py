"""What a valid configuration is warned about."""

from __future__ import annotations

from datetime import UTC, datetime
from itertools import repeat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seawall.config import load_mapping, loads
from seawall.config.document import read
from seawall.config.lint import check, covers
from seawall.config.loading import check_path, check_text
from seawall.hints import _FIXED
from seawall.identity import _FORWARDING, is_forwarded
from seawall.rate import SECOND

HASH = "sha256:" + "0" * 64
SMALLEST = "version: 1\nplans: {default: {rate: 100/minute}}\n"


def warnings(text: str) -> list[tuple[str, str]]:
    report = check_text(SMALLEST + text, "f.yaml", None)
    assert report.errors == ()
    assert all(found.line > 0 for found in report.warnings)
    return [(found.code, found.path) for found in report.warnings]


def words(text: str) -> str:
    return check_text(SMALLEST + text, "f.yaml", None).render()


def routes(*matches: str) -> str:
    return "routes:\n" + "".join(f"  - {{name: r{n}, {match}}}\n" for n, match in enumerate(matches))


def test_a_small_file_is_warned_about_nothing() -> None:
    assert warnings("") == []


# Routes


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("match: {path: /a}", "match: {path: /a}"),
        ("match: {path: /a}", "match: {path: /A/}"),
        ("match: {path: '/a/{x}'}", "match: {path: '/a/{y}'}"),
        ("match: {path: '/a/{x}'}", "match: {path: /a/b}"),
        ("match: {path: '/**'}", "match: {path: /}"),
        ("match: {path: '/**'}", "match: {path: '/a/{x}/**'}"),
        ("match: {path: '/a/**'}", "match: {path: /a}"),
        ("match: {path: '/a/**'}", "match: {path: '/a/**/b'}"),
        ("match: {path: '/**/z'}", "match: {path: '/a/{b}/z'}"),
        ("match: {path: /a}", "match: {path: /a, methods: [GET]}"),
        ("match: {path: /a, methods: [GET]}", "match: {path: /a, methods: [HEAD]}"),
        ("match: {path: [/a, /b]}", "match: {path: [/b, /a]}"),
        ("match: {path: /a}", "match: {path: /a}, exempt: true"),
    ],
)
def test_a_route_below_one_that_matches_all_of_it_is_never_reached(first: str, second: str) -> None:
    assert warnings(routes(first, second)) == [("W001", "routes[1].name")]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("match: {path: /a}", "match: {path: /b}"),
        ("match: {path: '/a/{x}'}", "match: {path: /a}"),
        ("match: {path: '/a/{x}'}", "match: {path: '/{y}/a'}"),
        ("match: {path: '/{x}'}", "match: {path: /}"),
        ("match: {path: '/a/{x}'}", "match: {path: '/a/**'}"),
        ("match: {path: '/a/**/b'}", "match: {path: '/a/**'}"),
        ("match: {path: '/{x}/**'}", "match: {path: '/**'}"),
        ("match: {path: /a, methods: [GET]}", "match: {path: /a}"),
        ("match: {path: /a, methods: [GET]}", "match: {path: /a, methods: [GET, POST]}"),
        ("match: {path: /Health}, exempt: true", "match: {path: /health}"),
    ],
)
def test_a_route_that_something_reaches_is_not_warned_about(first: str, second: str) -> None:
    assert warnings(routes(first, second)) == []


def test_a_route_of_which_a_part_is_hidden_is_warned_about_that_part() -> None:
    assert warnings(routes("match: {path: '/a/**'}", "match: {path: [/b, /a/c]}")) == [
        ("W001", "routes[1].match.path[1]")
    ]


def test_a_route_hidden_by_an_exempt_one_is_told_about_spellings() -> None:
    assert "route 'r0' above matches all of it, in this spelling" in words(
        routes("match: {path: '/a/**'}, exempt: true", "match: {path: /a/b}")
    )


segments = st.lists(st.sampled_from(["a", "b", "{x}", "**"]), max_size=4)


def matches(template: list[str], path: list[str]) -> bool:
    if not template:
        return not path
    if template[0] == "**":
        return matches(template[1:], path) or (bool(path) and matches(template, path[1:]))
    return bool(path) and (template[0] in ("{x}", path[0])) and matches(template[1:], path[1:])


@given(segments, segments, st.lists(st.sampled_from(["a", "b", "c"]), max_size=5))
def test_what_covers_a_template_matches_whatever_it_matches(
    general: list[str], specific: list[str], path: list[str]
) -> None:
    if covers(general, specific) and matches(specific, path):
        assert matches(general, path)


@given(segments)
def test_every_template_covers_itself(template: list[str]) -> None:
    assert covers(template, template)
    assert covers(["**"], template)


def test_very_many_routes_are_compared_only_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("seawall.config.lint._COMPARISONS", 2)
    assert len(warnings(routes(*["match: {path: /a}"] * 9))) < 8


# Plans


def test_a_plan_that_nobody_is_on_is_reported() -> None:
    text = "version: 1\nplans: {a: {}, anonymous: {}, default: {}}\n"
    found = check_text(text, "f", None).warnings
    assert [(one.code, one.path) for one in found] == [("W002", "plans.a")]
    assert check_text(text + "tenants: {x: {plan: a}}\n", "f", None).warnings == ()
    found = check_text(text + "identity: {anonymous: deny}\n", "f", None).warnings
    assert [one.path for one in found] == ["plans.a", "plans.anonymous"]


def test_a_quota_below_what_may_come_at_once_is_reported() -> None:
    text = "tenants: {x: {overrides: {quota: 99/day}}}\n" + routes(
        "match: {path: /}, limits: {l: {per: tenant, rate: 5/s, quota: 4/day}, m: {per: global, rate: 5/s}}"
    )
    assert [path for code, path in warnings(text) if code == "W004"] == [
        "tenants.x.overrides",
        "routes[0].limits.l.quota",
    ]
    plan = check_text("version: 1\nplans: {p: {rate: {limit: 5/s, burst: 50}, quota: 49/month}}\n", "f", None)
    assert "plans.p.quota" in {found.path for found in plan.warnings if found.code == "W004"}
    assert "the quota (49 a month) is less than what may come at once (50)" in plan.render()


def test_a_cost_that_never_fits_is_reported_for_whom_it_concerns() -> None:
    text = "tenants: {small: {overrides: {rate: 7/s}}, big: {overrides: {rate: 999/s}}}\n"
    text += routes("match: {path: /}, cost: 101", "match: {path: /b}, cost: 100", "match: {path: /c}, cost: 1")
    report = check_text(SMALLEST + text, "f", None)
    assert [(f.code, f.path) for f in report.warnings] == [("W003", "routes[0].cost"), ("W003", "routes[1].cost")]
    assert "a cost of 101 never fits plan 'default', tenant 'small': every request is refused" in report.render()
    assert "a cost of 100 never fits tenant 'small': every" in report.render()


def test_a_cost_beyond_a_quota_or_a_limit_never_fits() -> None:
    text = "version: 1\nplans: {p: {quota: 5/day}}\n" + routes(
        "match: {path: /}, cost: 6, limits: {l: {per: global, rate: 5/s, cost: 6}}"
    )
    found = {one.path for one in check_text(text, "f", None).warnings if one.code == "W003"}
    assert found == {"routes[0].cost", "routes[0].limits.l.cost"}


def test_many_whom_a_cost_concerns_are_counted() -> None:
    tenants = ", ".join(f"t{n}: {{overrides: {{rate: {n + 1}/s}}}}" for n in range(9))
    assert "and 5 more" in words(f"tenants: {{{tenants}}}\n" + routes("match: {path: /}, cost: 101"))


# Modes


def test_a_mode_above_the_files_has_no_effect() -> None:
    text = """version: 1
mode: shadow
plans: {default: {mode: enforce}, low: {mode: off}}
tenants: {a: {mode: enforce, plan: low}, b: {mode: shadow}}
routes: [{name: r, match: {path: /}, mode: enforce}]
"""
    report = check_text(text, "f", None)
    assert {"plans.default.mode", "tenants.a.mode", "routes[0].mode"} == {f.path for f in report.warnings}
    assert "'mode: enforce' has no effect: the file's mode is shadow" in report.render()


# Tenants and keys


def test_an_override_that_changes_nothing_is_reported() -> None:
    text = "version: 1\nplans: {p: {rate: 60/minute, concurrency: 5, priority: low}}\ntenants:\n"
    text += (
        "  a: {overrides: {rate: 60 per minute, concurrency: 5, priority: low}}\n  b: {overrides: {rate: 61/minute}}\n"
    )
    found = check_text(text, "f", None).warnings
    assert [one.path.rpartition(".")[2] for one in found if one.code == "W010"] == ["rate", "concurrency", "priority"]


def test_keys_that_nothing_reads_are_reported() -> None:
    keys = f"tenants: {{a: {{}}, b: {{keys: ['{HASH}']}}}}\n"
    assert warnings(keys) == [("W011", "tenants.b.keys")]
    assert warnings(keys + "identity: {tenant: [{state: x}, {api_key: {header: X-Key}}]}\n") == []


def test_an_expired_key_is_reported_in_its_file() -> None:
    keys = f"{{hash: '{HASH}', expires: 2027-06-30}}"
    text = SMALLEST + f"identity: {{tenant: [{{api_key: {{header: x}}}}]}}\ntenants: {{a: {{keys: [{keys}]}}}}\n"
    policy = loads(text)
    for moment, expected in [
        (datetime(2027, 6, 30, 23, 59, 59, tzinfo=UTC), []),
        (datetime(2027, 7, 1, tzinfo=UTC), ["tenants.a.keys[0].expires"]),
    ]:
        main = read(text, "f", {})
        check(policy, main, [], clock=repeat(int(moment.timestamp()) * SECOND).__next__)
        assert expected == [found.path for found in main.problems if found.code == "W009"]


def test_warnings_about_an_included_tenant_have_that_files_name(tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text("tenants: {a: {overrides: {rate: 100/minute, quota: 5/day}}}\n")
    (tmp_path / "main.yaml").write_text(SMALLEST + "include: t.yaml\n")
    report = check_path(tmp_path / "main.yaml")
    assert {"t.yaml"} == {Path(found.file).name for found in report.warnings}
    assert {"W010", "W004", "W008"} == {found.code for found in report.warnings}
    assert report.policy is not None
    assert len(report.policy.warnings) == 3


def test_the_twentieth_warning_of_a_kind_is_the_last() -> None:
    tenants = ", ".join(f"t{n}: {{overrides: {{rate: 100/minute}}}}" for n in range(50))
    found = check_text(SMALLEST + f"tenants: {{{tenants}}}\n", "f", None).warnings
    assert len(found) == 20
    assert found[-1].message.endswith("(more of these are not shown)")


# Sections


def test_metrics_open_to_everybody_are_reported() -> None:
    assert warnings("metrics: {path: /metrics}\n") == [("W007", "metrics")]
    assert warnings("metrics: {path: /metrics, allow: [127.0.0.1]}\n") == []
    assert warnings("metrics: {tenant_label: {top: 5}}\n") == []


def test_exempting_everybody_is_reported() -> None:
    assert warnings("access: {exempt: [10.0.0.0/8, 0.0.0.0/0]}\n") == [("W012", "access.exempt[1]")]


def test_a_quota_in_memory_is_reported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "version: 1\nplans: {default: {quota: 5/day}, b: {quota: 5/month}}\ntenants: {x: {plan: b}}\n"
    found = check_text(text, "f", None)
    assert [(one.code, one.path) for one in found.warnings] == [("W008", "plans.default.quota")]
    assert "a restart forgets" in found.render()
    shared = check_text(text + "backend: {type: redis, url: redis://x}\n", "f", None).warnings
    assert "W008" not in {one.code for one in shared}
    route = routes("match: {path: /}, limits: {l: {per: tenant, quota: 5/day}}")
    assert warnings(route) == [("W008", "routes[0].limits.l.quota")]


def test_a_secret_in_the_file_is_reported_and_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "backend: {type: redis, url: 'redis://user:hunter2@host', secret: hunter2hunter2}\n"
    assert {("W005", "backend.url"), ("W005", "backend.secret")} <= set(warnings(text))
    assert "hunter2" not in words(text)
    text = "backend: {type: redis, url: 'redis://:pa@hunter2@host'}\n"
    assert ("W005", "backend.url") in warnings(text)
    assert "hunter2" not in words(text)
    for option in ("password", "sentinel_password"):
        text = f"backend: {{type: redis, url: 'redis+sentinel://host/main?db=1&{option}=hunter2'}}\n"
        assert ("W005", "backend.url") in warnings(text)
        assert "hunter2" not in words(text)
    monkeypatch.setenv("SECRET", "hunter2hunter2")
    text = "backend: {type: redis, url: 'redis://user:${SECRET}@host', secret: '${SECRET}'}\n"
    assert "W005" not in {code for code, _ in warnings(text)}
    assert "hunter2" not in words(text)


def test_a_mapping_may_hold_its_secrets() -> None:
    backend = {"type": "redis", "url": "redis://u:hunter2@h", "secret": "hunter2hunter2"}
    policy = load_mapping({"version": 1, "backend": backend})
    assert not any("W005" in text or "hunter2" in text for text in policy.warnings)


# Overload


CLASSES = "plans: {default: {rate: 100/minute, priority: gold}}\npriorities: {gold: %s, silver: %s, tin: %s}\n"


def of_classes(*classes: str) -> list[tuple[str, str]]:
    report = check_text("version: 1\n" + CLASSES % classes, "f", None)
    assert report.errors == ()
    return [(found.code, found.path) for found in report.warnings]


@pytest.mark.parametrize(("timeout", "warned"), [("5s", False), ("5001ms", True), ("1m", True), ("250ms", False)])
def test_a_queue_in_which_nobody_waits_to_the_end_is_reported(timeout: str, warned: bool) -> None:
    found = of_classes("{}", f"{{queue: {{timeout: {timeout}}}}}", "{}")
    assert found == [("W013", "priorities.silver.queue.timeout")] * warned


@pytest.mark.parametrize(
    ("shares", "at"),
    [
        (("50%", "25%", "24.9%"), None),
        (("50%", "25%", "25%"), "tin"),
        (("30%", "70%", "5%"), "silver"),
        (("6%", "57%", "37%"), "tin"),  # as floats a little less than 1
        (("100%", "1%", "1%"), "gold"),
    ],
)
def test_shares_that_leave_nothing_are_reported_where_they_reach_the_whole(
    shares: tuple[str, ...], at: str | None
) -> None:
    found = of_classes(*(f"{{min_share: {share}}}" for share in shares))
    assert found == ([("W014", f"priorities.{at}.min_share")] if at else [])


NOBODY = "priorities: {vip: {}, critical: {}, normal: {}, low: {}}\n"


def test_classes_above_everybody_s_are_reported() -> None:
    assert warnings(NOBODY) == [("W016", "priorities.vip"), ("W016", "priorities.critical")]
    assert "nobody is of class 'vip': set the 'priority' of a plan, tenant or route" in words(NOBODY)


@pytest.mark.parametrize(
    "text",
    [
        "tenants: {a: {priority: vip}}\n",
        "tenants: {a: {overrides: {priority: vip}}}\n",
        "routes: [{name: a, match: {path: /}, priority: vip}]\n",
        "priority_header: {name: X-Class, raise_from: [10.2.0.0/16]}\n",
    ],
)
def test_a_class_that_somebody_may_have_is_not_reported(text: str) -> None:
    assert warnings(NOBODY + text) == []


def test_a_plan_that_nobody_is_on_gives_its_class_to_nobody() -> None:
    text = "version: 1\nplans: {default: {}, gold: {priority: vip}}\n" + NOBODY
    codes = {(found.code, found.path) for found in check_text(text, "f", None).warnings}
    assert codes == {("W002", "plans.gold"), ("W016", "priorities.vip"), ("W016", "priorities.critical")}


def test_the_classes_that_are_not_written_are_not_judged() -> None:
    assert warnings("shedding: {algorithm: adaptive}\n") == []


@pytest.mark.parametrize("name", [*_FIXED, b"priority", b"Baggage"])
def test_a_priority_header_with_another_meaning_is_reported(name: bytes) -> None:
    """Whatever `hints` reads as something else; `Priority` never names a class."""
    assert warnings(f"priority_header: {{name: {name.decode()}}}\n") == [("W015", "priority_header.name")]


@pytest.mark.parametrize(
    "name",
    [
        "x-forwarded-priority",
        "via",
        "forwarded",
        "X-Real-IP",
        "x-priority",
        "x-class",
        *sorted(n.decode() for n in _FORWARDING),
    ],
)
def test_a_header_that_looks_forwarded_cannot_raise(name: str) -> None:
    forwarded = is_forwarded([(name.lower().encode(), b"critical")])
    assert warnings(f"priority_header: {{name: {name}, raise_from: [10.2.0.1]}}\n") == (
        [("W015", "priority_header.name")] if forwarded else []
    )
    assert warnings(f"priority_header: {{name: {name}}}\n") == []  # it lowers as any other does


def test_a_fixed_limit_that_nobody_wrote_is_reported() -> None:
    assert warnings("shedding: {algorithm: fixed}\n") == [("W017", "shedding.algorithm")]
    assert warnings("shedding: {algorithm: fixed, limit: {max: 50}}\n") == [("W017", "shedding.algorithm")]
    assert warnings("shedding: {algorithm: fixed, limit: {initial: 50}}\n") == []
    assert "write limit.initial, or it is 20" in words("shedding: {algorithm: fixed}\n")


def test_an_order_that_decides_nothing_is_reported() -> None:
    classes = "priorities: {normal: {}, low: {}}\n"
    assert warnings(classes + "shedding: {algorithm: 'off'}\n") == [("W018", "priorities")]
    assert warnings("shedding: {algorithm: 'off'}\n") == []


@pytest.mark.parametrize(("target", "warned"), [("100ms", False), ("101ms", True), ("500ms", True)])
def test_a_lag_that_is_taken_for_a_latency_is_reported(target: str, warned: bool) -> None:
    assert warnings(f"shedding: {{loop_lag_target: {target}}}\n") == [("W019", "shedding.loop_lag_target")] * warned


# Shared state


@pytest.mark.parametrize("where", ["type: redis, url: redis://x", "type: limits, url: memcached://x"])
def test_identities_that_are_stored_without_a_secret_are_reported(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEAWALL_SECRET", "a long secret")
    assert warnings(f"backend: {{{where}}}\n") == [("W020", "backend.type")]
    assert "keyed by a constant" in words(f"backend: {{{where}}}\n")
    assert warnings(f"backend: {{{where}, secret: '${{SEAWALL_SECRET}}'}}\n") == []


@pytest.mark.parametrize(("timeout", "warned"), [("250ms", False), ("251ms", True), ("10s", True)])
def test_a_time_out_that_requests_would_feel_is_reported(
    timeout: str, warned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEAWALL_SECRET", "a long secret")
    shared = f"backend: {{type: redis, url: redis://x, secret: '${{SEAWALL_SECRET}}', timeout: {timeout}}}\n"
    assert warnings(shared) == [("W021", "backend.timeout")] * warned
    assert warnings(f"backend: {{timeout: {timeout}}}\n") == []


@pytest.mark.parametrize(
    "text",
    [
        "reload: 5s\n",
        "status: {allow: ['::1']}\n",
        "backend: {type: memory}\n",
        "priorities: {normal: {}}\n",
        "backend: {}\n",
    ],
)
def test_what_says_what_it_does_is_not_warned_about(text: str) -> None:
    assert warnings(text) == []
