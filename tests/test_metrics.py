"""Metrics: names in one list, requests counted once, labels bounded by the configuration, served to their readers."""

from __future__ import annotations

import asyncio
import gzip
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.types import Receive, Scope, Send

from harness import KEY, call, config, hash_of, hello, in_flight, metric, outcomes, plan, statuses
from seawall import Seawall, __version__, metrics_app
from seawall.metrics import OUTCOMES, REQUESTS, SPECS, Cells, TenantLabels
from seawall.rate import SECOND
from seawall.testing import Answer, ManualClock, drive, reset

PUBLISHED = {
    "seawall_requests_total": ("outcome", "priority"),
    "seawall_rejections_total": ("reason", "policy", "plan", "priority"),
    "seawall_shadow_rejections_total": ("reason", "policy", "plan", "priority"),
    "seawall_policy_checks_total": ("policy", "plan", "decision"),
    "seawall_inflight_requests": ("priority",),
    "seawall_queued_requests": ("priority",),
    "seawall_streams": ("rule",),
    "seawall_concurrency_limit": (),
    "seawall_concurrency_limit_changes_total": ("reason",),
    "seawall_loop_lag_seconds": (),
    "seawall_utilization_ratio": (),
    "seawall_queue_wait_seconds": ("priority", "result"),
    "seawall_request_duration_seconds": ("priority",),
    "seawall_decision_duration_seconds": ("backend",),
    "seawall_backend_requests_total": ("backend", "result"),
    "seawall_backend_request_duration_seconds": ("backend",),
    "seawall_backend_up": ("backend",),
    "seawall_backend_fallback_decisions_total": ("action",),
    "seawall_tracked_keys": ("store",),
    "seawall_evicted_keys_total": ("store",),
    "seawall_config_reloads_total": ("result",),
    "seawall_config_last_reload_success_timestamp_seconds": (),
    "seawall_config_info": ("hash", "mode"),
    "seawall_build_info": ("version",),
    "seawall_tenant_requests_total": ("tenant", "outcome"),
    "seawall_ignored_headers_total": ("header",),
    "seawall_client_attempts_total": ("host", "result"),
    "seawall_client_retries_total": ("host", "reason"),
    "seawall_client_refusals_total": ("host", "reason"),
    "seawall_client_hedges_total": ("host", "result"),
    "seawall_client_budget_tokens": ("host",),
    "seawall_client_open_circuits": ("host",),
}
"""The names and labels that the documentation promises."""


@pytest.fixture(autouse=True)
def _fresh() -> None:
    reset()


def served(**changes: Any) -> dict[str, Any]:
    """A configuration that serves metrics to the test client."""
    return {"metrics": {"path": "/metrics", "allow": ["192.0.2.1"], **changes}}


def everything(clock: ManualClock, registry: CollectorRegistry, **changes: Any) -> Seawall:
    """A shell that has counted something of every kind."""
    settings = config(
        identity={"tenant": [{"api_key": {"header": "X-API-Key"}}]},
        plans={
            "default": {"rate": "5/minute", "quota": "9/day", "concurrency": 2},
            "trial": {"rate": "1/minute", "mode": "shadow"},
        },
        defaults={"plan": "default"},
        tenants={"acme": {"plan": "trial", "keys": [hash_of(KEY)]}},
        access={"deny": ["198.51.100.0/24"]},
        routes=[{"name": "probes", "match": {"path": "/healthz"}, "exempt": True}],
        **served(tenant_label={"top": 2}),
    )
    app = Seawall(hello, config={**settings, **changes}, clock=clock, registry=registry)
    statuses(app, 7)
    statuses(app, 2, headers={"X-API-Key": KEY})
    statuses(app, 1, "/healthz")
    statuses(app, 1, client=("198.51.100.1", 1))
    return app


# Names


def test_every_metric_is_in_one_list_and_in_the_documentation() -> None:
    assert {spec.name: spec.labels for spec in SPECS} == PUBLISHED
    assert len({spec.name for spec in SPECS}) == len(SPECS)


def test_nothing_is_published_that_is_not_in_the_list(clock: ManualClock, registry: CollectorRegistry) -> None:
    everything(clock, registry)
    by_name = {spec.name: spec for spec in SPECS}
    families = list(parse_text(generate_latest(registry).decode()))
    assert families
    for family in families:
        spec = by_name[family.name + ("_total" if family.type == "counter" else "")]
        assert (family.type, family.documentation) == (spec.kind, spec.help)
        for sample in family.samples:
            assert set(sample.labels) - {"le"} == set(spec.labels)


def test_each_kind_of_metric_is_named_as_prometheus_wants_it() -> None:
    for spec in SPECS:
        assert spec.name.startswith("seawall_")
        assert spec.name.endswith("_total") is (spec.kind == "counter")
        assert bool(spec.bounds) is (spec.kind == "histogram")
        assert spec.help.endswith(".")
        assert list(spec.bounds) == sorted(set(spec.bounds))
        if spec.kind == "histogram":
            assert spec.name.endswith("_seconds")


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not on PATH")
def test_promtool_has_nothing_to_say(clock: ManualClock, registry: CollectorRegistry) -> None:
    everything(clock, registry)
    checked = subprocess.run(
        ["promtool", "check", "metrics"], input=generate_latest(registry), capture_output=True, check=False, timeout=20
    )
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, b"")


# Counting


def test_each_request_is_counted_exactly_once(clock: ManualClock, registry: CollectorRegistry) -> None:
    everything(clock, registry)
    assert metric(registry, "seawall_requests_total") == {
        ("allowed", "normal"): 7,
        ("limited", "normal"): 2,
        ("exempt", "none"): 1,
        ("denied", "none"): 1,
    }
    assert metric(registry, "seawall_rejections_total") == {
        ("rate", "rate", "default", "normal"): 2,
        ("denied", "", "", "none"): 1,
    }
    assert metric(registry, "seawall_shadow_rejections_total") == {("rate", "rate", "trial", "normal"): 1}


def test_checks_of_each_policy_are_counted_and_near_is_four_fifths(
    clock: ManualClock, registry: CollectorRegistry
) -> None:
    app = Seawall(hello, config=plan(rate="10/minute", quota="100/day"), clock=clock, registry=registry)
    statuses(app, 12)
    assert metric(registry, "seawall_policy_checks_total") == {
        ("rate", "default", "allow"): 7,
        ("rate", "default", "near"): 3,
        ("rate", "default", "deny"): 2,
        ("quota", "default", "allow"): 12,
    }


@pytest.mark.parametrize(
    ("limit", "found"),
    [
        (1, ["near"]),
        (4, ["allow"] * 3 + ["near"]),
        (5, ["allow"] * 3 + ["near"] * 2),
        (6, ["allow"] * 4 + ["near"] * 2),
    ],
)
def test_near_begins_when_80_percent_are_used(
    limit: int, found: list[str], clock: ManualClock, registry: CollectorRegistry
) -> None:
    app = Seawall(hello, default=f"{limit}/minute", clock=clock, registry=registry)
    decisions: list[str] = []
    before: dict[tuple[str, ...], float] = {}
    for _ in range(limit):
        call(app)
        after = metric(registry, "seawall_policy_checks_total")
        decisions += [labels[2] for labels, value in after.items() if value != before.get(labels, 0)]
        before = after
    assert decisions == found


def test_durations_are_of_admitted_http_requests(clock: ManualClock, registry: CollectorRegistry) -> None:
    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        clock.advance(0.2)
        await hello(scope, receive, send)

    settings = plan(rate={"limit": "1/hour", "burst": 3}) | {
        "routes": [
            {"name": "events", "match": {"path": "/events"}, "streaming": {"max": 5}},
            {"name": "probes", "match": {"path": "/healthz"}, "exempt": True},
        ]
    }
    app = Seawall(slow, config=settings, clock=clock, registry=registry)
    for scope in ("/", "/events", "/healthz"):
        call(app, scope)
    call(app, type="websocket")
    assert call(app).status == 429
    assert metric(registry, "seawall_request_duration_seconds_count") == {("normal",): 1}
    assert metric(registry, "seawall_request_duration_seconds_sum") == {("normal",): 0.2}
    buckets = metric(registry, "seawall_request_duration_seconds_bucket")
    assert {labels for labels, value in buckets.items()} == {
        ("normal", bound) for bound in ("0.25", "0.5", "1.0", "2.5", "5.0", "10.0", "+Inf")
    }


def test_every_decision_is_timed(clock: ManualClock, registry: CollectorRegistry) -> None:
    statuses(Seawall(hello, default="2/minute", clock=clock, registry=registry), 5)
    assert metric(registry, "seawall_decision_duration_seconds_count") == {("memory",): 5}


@pytest.mark.parametrize("took", [0, 1, 999_999, 1_000_000, 1_000_001, 10 * SECOND, 10 * SECOND + 1, 10**15])
def test_a_histogram_puts_a_value_at_or_below_its_bound(
    took: int, clock: ManualClock, registry: CollectorRegistry
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        clock.advance_ns(took)

    call(Seawall(app, default="9/minute", clock=clock, registry=registry))
    name = "seawall_request_duration_seconds"
    bounds = [*next(spec for spec in SPECS if spec.name == name).bounds, float("inf")]
    found = {float(bound) for _, bound in metric(registry, f"{name}_bucket")}
    assert found == {bound for bound in bounds if took <= bound * SECOND}
    assert metric(registry, f"{name}_sum").get(("normal",), 0) == took / SECOND


async def test_requests_in_flight_are_a_gauge(clock: ManualClock, registry: CollectorRegistry) -> None:
    end = asyncio.Event()

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        await end.wait()

    app = Seawall(slow, default="9/minute", clock=clock, registry=registry)
    tasks = [asyncio.create_task(drive(app)) for _ in range(3)]
    await asyncio.sleep(0)
    assert in_flight(registry) == 3
    end.set()
    await asyncio.gather(*tasks)
    assert in_flight(registry) == 0


def test_what_is_kept_and_in_force_can_be_seen(clock: ManualClock, registry: CollectorRegistry) -> None:
    app = Seawall(hello, config={**plan(rate="9/minute"), "mode": "shadow"}, clock=clock, registry=registry)
    for number in range(5):
        call(app, client=(f"192.0.2.{number}", 1))
    assert metric(registry, "seawall_tracked_keys") == {("address",): 5}
    assert metric(registry, "seawall_build_info") == {(__version__,): 1}
    ((digest, mode),) = metric(registry, "seawall_config_info")
    assert (digest, mode) == (app.policy.digest[:12], "shadow")


def test_evictions_are_counted(clock: ManualClock, registry: CollectorRegistry) -> None:
    settings = plan(rate="1000/second") | {"backend": {"type": "memory", "max_keys": 1_000}}
    app = Seawall(hello, config=settings, clock=clock, registry=registry)
    for number in range(3_000):
        call(app, client=(f"10.0.{number >> 8}.{number & 255}", 1))
        clock.advance(0.01)
    tracked = metric(registry, "seawall_tracked_keys")[("address",)]
    assert tracked <= 1_000
    assert metric(registry, "seawall_evicted_keys_total")[("address",)] == 3_000 - tracked


# Labels


def series(registry: CollectorRegistry) -> set[tuple[str, tuple[str, ...]]]:
    return {(sample.name, tuple(sample.labels.values())) for family in registry.collect() for sample in family.samples}


def test_ten_thousand_hostile_requests_add_no_series(clock: ManualClock, registry: CollectorRegistry) -> None:
    app = everything(clock, registry)
    before = series(registry)
    draw = random.Random(3)

    def noise(length: int) -> str:
        return "".join(chr(draw.randrange(1, 256)) for _ in range(draw.randrange(length)))

    for _ in range(10_000):
        call(
            app,
            {"path": "/" + noise(20)},
            method=noise(8) or "GET",
            client=(draw.choice([noise(12), f"10.{draw.randrange(256)}.{draw.randrange(256)}.1", "2001:db8::1"]), 1),
            headers={"X-API-Key": noise(20), "User-Agent": noise(10), "Host": noise(10), "X-Forwarded-For": noise(10)},
        )
    assert series(registry) == before


def test_the_number_of_series_is_that_of_the_configuration(clock: ManualClock) -> None:
    def count(tenants: int) -> int:
        registry = CollectorRegistry()
        app = everything(clock, registry, tenants={f"t{number}": {} for number in range(tenants)})
        for number in range(min(tenants, 50)):
            call(app, state={"x": f"t{number}"})
        return len(series(registry))

    assert count(1) == count(3_000)


def test_the_busiest_tenants_have_a_series_and_the_rest_is_other(
    clock: ManualClock, registry: CollectorRegistry
) -> None:
    settings = plan(rate="999/minute") | {"identity": {"tenant": [{"state": "id"}]}} | served(tenant_label={"top": 2})
    app = Seawall(hello, config=settings, clock=clock, registry=registry)

    def tenants() -> dict[tuple[str, ...], float]:
        return metric(registry, "seawall_tenant_requests_total")

    for name, count in (("a", 5), ("b", 9), ("c", 2)):
        statuses(app, count, state={"id": name})
    assert tenants() == {("other", "allowed"): 16}
    for name in "abc":
        call(app, state={"id": name})
    assert tenants() == {("other", "allowed"): 17, ("a", "allowed"): 1, ("b", "allowed"): 1}
    statuses(app, 50, state={"id": "c"})
    statuses(app, 50, state={"id": "d"})
    assert tenants() == {("other", "allowed"): 117, ("a", "allowed"): 1, ("b", "allowed"): 1}
    call(app, state={"id": "a"})
    assert tenants()[("a", "allowed")] == 2


def test_a_tenant_s_series_tell_all_its_outcomes(clock: ManualClock, registry: CollectorRegistry) -> None:
    settings = plan(rate="2/minute") | {"identity": {"tenant": [{"state": "id"}]}} | served(tenant_label={"top": 1})
    app = Seawall(hello, config=settings, clock=clock, registry=registry)
    call(app, state={"id": "a"})
    metric(registry, "seawall_tenant_requests_total")
    statuses(app, 3, state={"id": "a"})
    assert metric(registry, "seawall_tenant_requests_total") == {
        ("other", "allowed"): 1,
        ("a", "allowed"): 1,
        ("a", "limited"): 2,
    }


def test_a_tenant_whose_plan_is_off_is_counted_as_itself(clock: ManualClock, registry: CollectorRegistry) -> None:
    settings = plan(rate="2/minute", mode="off") | {"identity": {"tenant": [{"state": "id"}]}}
    app = Seawall(hello, config=settings | served(tenant_label={"top": 1}), clock=clock, registry=registry)
    call(app, state={"id": "a"})
    metric(registry, "seawall_tenant_requests_total")
    call(app, state={"id": "a"})
    assert metric(registry, "seawall_tenant_requests_total") == {("other", "exempt"): 1, ("a", "exempt"): 1}


def test_candidates_for_a_label_are_bounded() -> None:
    cells = Cells()
    labels = TenantLabels(cells, top=3)
    for number in range(10_000):
        labels.cell(f"t{number}", 0)
    assert len(labels._seen) <= 16 * 3
    labels.grant()
    assert len(labels._granted) == 3
    assert sum(cells.values) == 0


@pytest.mark.parametrize("tenant", ["x\udcff", "a\nb", 'a"b\\', "☃", "\x00", "x" * 10_000, "{}", "a b"])
def test_no_id_of_a_tenant_breaks_the_scrape(tenant: str, clock: ManualClock, registry: CollectorRegistry) -> None:
    settings = plan(rate="999/minute") | served(tenant_label={"top": 2})
    app = Seawall(hello, config=settings, identify=lambda scope: tenant, clock=clock, registry=registry)
    for _ in range(3):
        call(app)
        answer = call(app, "/metrics")
        assert answer.status == 200
        families = {family.name: family for family in parse_text(answer.body.decode())}
        assert "seawall_tenant_requests" in families
    assert sum(metric(registry, "seawall_tenant_requests_total").values()) == 3
    assert call(app, "/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"}).status == 200


def test_cells_want_the_labels_that_are_declared() -> None:
    cells = Cells()
    assert cells.index(REQUESTS, "allowed", "low") == cells.index(REQUESTS, "allowed", "low")
    assert len(cells) == 1
    with pytest.raises(ValueError, match="seawall_requests_total has the labels"):
        cells.index(REQUESTS, "allowed")
    assert len(cells.block(REQUESTS, "outcome", OUTCOMES, priority="low")) == len(OUTCOMES)


# Registries


def test_middlewares_publish_in_a_registry_of_seawall_s_own(clock: ManualClock) -> None:
    from prometheus_client import REGISTRY as PROCESS

    from seawall.metrics import REGISTRY

    app = Seawall(hello, default="9/minute", clock=clock)
    before = sum(outcomes(REGISTRY).values())
    call(app)
    assert sum(outcomes(REGISTRY).values()) == before + 1
    assert not any(family.name.startswith("seawall") for family in PROCESS.collect())


def test_a_given_registry_has_the_application_s_own_metrics_beside(
    clock: ManualClock, registry: CollectorRegistry
) -> None:
    Counter("mine_total", "Mine.", registry=registry).inc()
    app = Seawall(hello, config=plan(rate="9/minute") | served(), clock=clock, registry=registry)
    call(app)
    body = call(app, "/metrics").body
    assert b"mine_total 1.0" in body
    assert b'seawall_requests_total{outcome="allowed",priority="normal"} 1.0' in body


def test_two_applications_on_one_registry_add_up(clock: ManualClock, registry: CollectorRegistry) -> None:
    apps = [Seawall(hello, default=f"{rate}/minute", clock=clock, registry=registry) for rate in (2, 3)]
    for number, app in enumerate(apps):
        for client in range(number + 1):
            statuses(app, 4, client=(f"192.0.2.{client}", 1))
    assert outcomes(registry) == {"allowed": 8, "limited": 4}
    assert metric(registry, "seawall_tracked_keys") == {("address",): 3}
    assert len(metric(registry, "seawall_config_info")) == 2
    assert metric(registry, "seawall_build_info") == {(__version__,): 1}


def test_two_registries_know_nothing_of_each_other(clock: ManualClock) -> None:
    one, other = CollectorRegistry(), CollectorRegistry()
    call(Seawall(hello, default="9/minute", clock=clock, registry=one))
    Seawall(hello, default="9/minute", clock=clock, registry=other)
    assert (outcomes(one), outcomes(other)) == ({"allowed": 1}, {})


def test_a_middleware_that_is_gone_leaves_its_counts_and_takes_its_gauges(
    clock: ManualClock, registry: CollectorRegistry
) -> None:
    import gc

    app = Seawall(hello, default="9/minute", clock=clock, registry=registry)
    call(app)
    del app
    gc.collect()
    assert outcomes(registry) == {"allowed": 1}
    assert metric(registry, "seawall_tracked_keys") == {}


def test_a_counter_never_falls(clock: ManualClock, registry: CollectorRegistry) -> None:
    app = everything(clock, registry)
    before = metric(registry, "seawall_requests_total")
    call(app)
    after = metric(registry, "seawall_requests_total")
    assert all(after[key] >= value for key, value in before.items())


# Who may read them


def scrape(app: Any, **changes: Any) -> Answer:
    return call(app, "/metrics", **changes)


def test_metrics_are_served_at_their_path_and_counted_as_exempt(
    clock: ManualClock, registry: CollectorRegistry
) -> None:
    app = Seawall(hello, config=plan(rate="1/minute") | served(), clock=clock, registry=registry)
    answers = [scrape(app) for _ in range(3)]
    assert [answer.status for answer in answers] == [200] * 3
    assert answers[0].headers["content-type"].startswith("text/plain")
    assert "ratelimit" not in answers[0].headers
    assert metric(registry, "seawall_requests_total") == {("exempt", "none"): 3}


def test_metrics_are_not_served_unless_configured(clock: ManualClock, registry: CollectorRegistry) -> None:
    app = Seawall(hello, config=plan(rate="1/minute"), clock=clock, registry=registry)
    assert scrape(app).body == b"hello"


@pytest.mark.parametrize(
    "scope",
    [
        {"path": "/metrics/"},
        {"path": "//metrics"},
        {"path": "/METRICS"},
        {"path": "/metrics", "method": "POST"},
        {"path": "/metrics", "method": "OPTIONS"},
        {"path": "/metrics", "type": "websocket"},
        {"path": "/metrics\n"},
    ],
)
def test_only_get_and_head_on_the_exact_path_are_a_scrape(
    scope: dict[str, Any], clock: ManualClock, registry: CollectorRegistry
) -> None:
    app = Seawall(hello, config=plan(rate="9/minute") | served(), clock=clock, registry=registry)
    assert b"seawall_" not in call(app, scope).body
    assert "exempt" not in outcomes(registry)


def test_metrics_are_served_below_a_root_path(clock: ManualClock, registry: CollectorRegistry) -> None:
    app = Seawall(hello, config=plan(rate="9/minute") | served(), clock=clock, registry=registry)
    assert b"seawall_" in call(app, {"path": "/api/metrics", "root_path": "/api"}).body


def test_head_has_the_headers_and_no_body(clock: ManualClock, registry: CollectorRegistry) -> None:
    app = Seawall(hello, config=plan(rate="9/minute") | served(), clock=clock, registry=registry)
    answer = scrape(app, method="HEAD")
    assert (answer.status, answer.body) == (200, b"")
    assert answer.headers["content-type"].startswith("text/plain")


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_other_peers_get_the_404_of_a_path_that_does_not_exist(
    method: str, clock: ManualClock, registry: CollectorRegistry
) -> None:
    app = Seawall(hello, config=plan(rate="9/minute") | served(), clock=clock, registry=registry)
    answer = scrape(app, method=method, client=("192.0.2.2", 1))
    assert (answer.status, answer.body) == (404, b"Not Found" if method == "GET" else b"")
    assert answer.headers == {"content-type": "text/plain; charset=utf-8", "content-length": "9"}
    assert metric(registry, "seawall_requests_total") == {("exempt", "none"): 1}


def test_without_a_list_everybody_is_answered(clock: ManualClock, registry: CollectorRegistry) -> None:
    settings = plan(rate="9/minute") | {"metrics": {"path": "/metrics"}}
    app = Seawall(hello, config=settings, clock=clock, registry=registry)
    assert scrape(app, client=("203.0.113.9", 1), headers={"X-Forwarded-For": "1.2.3.4"}).status == 200


FORWARDED = ["X-Forwarded-For", "Forwarded", "X-Real-IP", "X-Forwarded-Host", "Via"]


@pytest.mark.parametrize("header", FORWARDED)
@pytest.mark.parametrize("value", ["192.0.2.1", "for=192.0.2.1", "203.0.113.9", "", "garbage"])
def test_a_proxy_that_nobody_configured_opens_nothing(
    header: str, value: str, clock: ManualClock, registry: CollectorRegistry
) -> None:
    """An nginx on the same machine is the direct peer 127.0.0.1."""
    settings = plan(rate="9/minute") | {"metrics": {"path": "/metrics", "allow": ["127.0.0.1"]}}
    app = Seawall(hello, config=settings, clock=clock, registry=registry)
    assert scrape(app, client=("127.0.0.1", 1)).status == 200
    assert scrape(app, client=("127.0.0.1", 1), headers={header: value}).status == 404


@pytest.mark.parametrize(
    ("peer", "forwarded", "status"),
    [
        ("127.0.0.1", None, 200),
        ("127.0.0.1", "10.9.9.9", 200),
        ("127.0.0.1", "203.0.113.9", 404),
        ("127.0.0.1", "10.9.9.9, 203.0.113.9", 404),
        ("127.0.0.1", "203.0.113.9, 10.9.9.9", 200),
        ("203.0.113.9", "10.9.9.9", 404),
        ("203.0.113.9", None, 404),
    ],
)
def test_a_trusted_proxy_opens_for_those_it_forwards_for(
    peer: str, forwarded: str | None, status: int, clock: ManualClock, registry: CollectorRegistry
) -> None:
    settings = plan(rate="9/minute") | {
        "identity": {"client_ip": {"trusted_proxies": ["127.0.0.1"]}},
        "metrics": {"path": "/metrics", "allow": ["127.0.0.1", "10.0.0.0/8"]},
    }
    app = Seawall(hello, config=settings, clock=clock, registry=registry)
    headers = {} if forwarded is None else {"X-Forwarded-For": forwarded}
    assert scrape(app, client=(peer, 1), headers=headers).status == status


@pytest.mark.parametrize("client", [None, ("", 0), ("testclient", 1), ("/run/app.sock", 0), ()])
def test_a_peer_without_an_address_is_in_no_list(client: Any, clock: ManualClock, registry: CollectorRegistry) -> None:
    app = Seawall(hello, config=plan(rate="9/minute") | served(), clock=clock, registry=registry)
    assert scrape(app, client=client).status == 404


# Formats


def test_openmetrics_is_for_those_who_ask(clock: ManualClock, registry: CollectorRegistry) -> None:
    app = everything(clock, registry)
    answer = scrape(app, headers={"Accept": "application/openmetrics-text; version=1.0.0; charset=utf-8"})
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    names = {family.name for family in parse_openmetrics(answer.body.decode())}  # type: ignore[no-untyped-call]
    assert {"seawall_requests", "seawall_request_duration_seconds", "seawall_tenant_requests"} <= names


def test_text_is_for_everybody_else(clock: ManualClock, registry: CollectorRegistry) -> None:
    app = everything(clock, registry)
    for accept in ("text/plain", "*/*", "nonsense;;q", ""):
        names = {family.name for family in parse_text(scrape(app, headers={"Accept": accept}).body.decode())}
        assert "seawall_requests" in names


def test_gzip_is_for_those_who_ask(clock: ManualClock, registry: CollectorRegistry) -> None:
    answer = scrape(everything(clock, registry), headers={"Accept-Encoding": "gzip"})
    assert answer.headers["content-encoding"] == "gzip"
    assert b"seawall_requests_total" in gzip.decompress(answer.body)


def test_a_scrape_may_ask_for_single_names(clock: ManualClock, registry: CollectorRegistry) -> None:
    answer = call(everything(clock, registry), "/metrics?name[]=seawall_build_info")
    assert [family.name for family in parse_text(answer.body.decode())] == ["seawall_build_info"]


@pytest.mark.parametrize(
    "headers",
    [
        [(b"\xff\xfe", b"x")],
        [(b"accept", b"\xff\xfe")],
        [(b"accept-encoding", b"\xff")],
        [(b"accept", b"text/plain"), (b"accept", b"\x80")],
        [(b"x", b"y" * 65_536)],
    ],
)
def test_no_header_breaks_a_scrape(
    headers: list[tuple[bytes, bytes]], clock: ManualClock, registry: CollectorRegistry
) -> None:
    app = Seawall(hello, config=plan(rate="9/minute") | served(), clock=clock, registry=registry)
    assert scrape(app, headers=headers).status == 200


@pytest.mark.parametrize("query", [b"\xff", b"name[]=\xff", b"name%5B%5D=%ff", b"&&&=", b"name[]=" + b"a" * 65_536])
def test_no_query_breaks_a_scrape(query: bytes, clock: ManualClock, registry: CollectorRegistry) -> None:
    app = Seawall(hello, config=plan(rate="9/minute") | served(), clock=clock, registry=registry)
    assert scrape(app, query_string=query).status == 200


# metrics_app


def test_metrics_app_is_mounted(clock: ManualClock, registry: CollectorRegistry) -> None:
    app = FastAPI()

    @app.get("/")
    def page() -> str:
        return "ok"

    app.mount("/metrics", metrics_app(registry))
    app.add_middleware(Seawall, default="9/minute", clock=clock, registry=registry)
    client = TestClient(app)
    client.get("/")
    answer = client.get("/metrics/")
    assert answer.status_code == 200
    assert 'seawall_requests_total{outcome="allowed",priority="normal"}' in answer.text


def test_metrics_app_without_a_registry_is_seawall_s_own(clock: ManualClock) -> None:
    app = Starlette(routes=[Mount("/m", metrics_app())])
    app.add_middleware(Seawall, default="9/minute", clock=clock)
    client = TestClient(app)
    assert "seawall_build_info" in client.get("/m/").text


@pytest.mark.parametrize("headers", [[(b"\xff", b"x")], [(b"accept", b"\xff")]])
def test_no_header_breaks_a_mounted_metrics_app(
    headers: list[tuple[bytes, bytes]], registry: CollectorRegistry
) -> None:
    assert call(metrics_app(registry), "/", headers=headers).status == 200


async def test_metrics_app_is_for_http(registry: CollectorRegistry) -> None:
    with pytest.raises(RuntimeError, match="metrics are served over HTTP, not websocket"):
        await drive(metrics_app(registry), type="websocket")


def test_header_names_are_lower_case(clock: ManualClock, registry: CollectorRegistry) -> None:
    """ASGI says so, and HTTP/2 servers refuse others."""
    app = Seawall(hello, config=plan(rate="9/minute") | served(), clock=clock, registry=registry)
    for answer in (scrape(app, headers={"Accept-Encoding": "gzip"}), call(metrics_app(registry))):
        names = [name for name, _ in answer.messages[0]["headers"]]
        assert names == [name.lower() for name in names]


def test_the_file_of_the_whole_language_publishes_a_bounded_number_of_series(clock: ManualClock) -> None:
    registry = CollectorRegistry()
    Seawall(hello, config=Path(__file__).parent / "data" / "seawall.yaml", clock=clock, registry=registry)
    assert 0 < len(series(registry)) < 1_500
