"""Several middlewares in one app decide what one does, count a request once and speak with one voice."""

from __future__ import annotations

import random
from collections.abc import Callable
from time import process_time
from typing import Any, TypeAlias

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from harness import call, config, hello, in_flight, limit_headers, metric, outcomes, plan, problem, statuses
from seawall import QuotaMiddleware, RateLimitMiddleware, Seawall, charge, usage
from seawall.config import load_mapping
from seawall.testing import Answer, ManualClock, drive, reset

Build: TypeAlias = Callable[[dict[str, Any], ManualClock, CollectorRegistry], ASGIApp]


@pytest.fixture(autouse=True)
def _fresh() -> None:
    reset()


SETTINGS = config(
    identity={"tenant": [{"state": "tenant"}]},
    plans={
        "free": {"rate": "3/second", "quota": "12/day", "priority": "low"},
        "pro": {"rate": ["5/second", "20/minute"], "quota": "1_000/month", "concurrency": 3},
        "anonymous": {"rate": "2/second", "quota": "6/day"},
        "off": {"mode": "off", "rate": "1/day"},
    },
    defaults={"plan": "free"},
    tenants={"acme": {"plan": "pro"}, "off": {"plan": "off"}, "shy": {"plan": "pro", "mode": "shadow"}},
    access={"deny": ["192.0.2.9"], "exempt": ["192.0.2.8"]},
    routes=[
        {"name": "probes", "match": {"path": "/healthz"}, "exempt": True},
        {
            "name": "search",
            "match": {"path": "/search"},
            "cost": 2,
            "limits": {"all": {"rate": "4/second", "quota": "40/day", "per": "global"}},
        },
        {"name": "beta", "match": {"path": "/beta"}, "mode": "shadow"},
    ],
)


def whole(settings: dict[str, Any], clock: ManualClock, registry: CollectorRegistry) -> ASGIApp:
    return Seawall(hello, config=settings, clock=clock, registry=registry)


def rate_outside(settings: dict[str, Any], clock: ManualClock, registry: CollectorRegistry) -> ASGIApp:
    inner = QuotaMiddleware(hello, config=settings, clock=clock, registry=registry)
    return RateLimitMiddleware(inner, config=settings, clock=clock, registry=registry)


def quota_outside(settings: dict[str, Any], clock: ManualClock, registry: CollectorRegistry) -> ASGIApp:
    inner = RateLimitMiddleware(hello, config=settings, clock=clock, registry=registry)
    return QuotaMiddleware(inner, config=settings, clock=clock, registry=registry)


def gzip_between(settings: dict[str, Any], clock: ManualClock, registry: CollectorRegistry) -> ASGIApp:
    inner = QuotaMiddleware(hello, config=settings, clock=clock, registry=registry)
    return RateLimitMiddleware(GZipMiddleware(inner), config=settings, clock=clock, registry=registry)


def one_policy_object(settings: dict[str, Any], clock: ManualClock, registry: CollectorRegistry) -> ASGIApp:
    policy = load_mapping(settings)
    inner = RateLimitMiddleware(hello, config=policy, clock=clock, registry=registry)
    return QuotaMiddleware(GZipMiddleware(inner), config=policy, clock=clock, registry=registry)


def twice(settings: dict[str, Any], clock: ManualClock, registry: CollectorRegistry) -> ASGIApp:
    return Seawall(whole(settings, clock, registry), config=settings, clock=clock, registry=registry)


def stage_inside(settings: dict[str, Any], clock: ManualClock, registry: CollectorRegistry) -> ASGIApp:
    return Seawall(rate_outside(settings, clock, registry), config=settings, clock=clock, registry=registry)


class Opaque:
    """Somebody else's middleware, which does not tell what it wraps."""

    def __init__(self, app: ASGIApp) -> None:
        self._wrapped = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._wrapped(scope, receive, send)


def hidden_inside(settings: dict[str, Any], clock: ManualClock, registry: CollectorRegistry) -> ASGIApp:
    return Seawall(Opaque(whole(settings, clock, registry)), config=settings, clock=clock, registry=registry)


def opaque_between(settings: dict[str, Any], clock: ManualClock, registry: CollectorRegistry) -> ASGIApp:
    inner = QuotaMiddleware(hello, config=settings, clock=clock, registry=registry)
    return RateLimitMiddleware(Opaque(inner), config=settings, clock=clock, registry=registry)


def quota_outside_of_opaque(settings: dict[str, Any], clock: ManualClock, registry: CollectorRegistry) -> ASGIApp:
    inner = RateLimitMiddleware(hello, config=settings, clock=clock, registry=registry)
    return QuotaMiddleware(Opaque(inner), config=settings, clock=clock, registry=registry)


FEWER = settings().max_examples // 5

ALIKE = [rate_outside, quota_outside, gzip_between, one_policy_object, twice, stage_inside, hidden_inside]

SCHEDULE = st.lists(
    st.tuples(
        st.sampled_from([None, "acme", "x", "y", "shy", "off"]),
        st.sampled_from(["/", "/search", "/healthz", "/beta", "/a%0a"]),
        st.sampled_from(["192.0.2.1", "192.0.2.2", "192.0.2.8", "192.0.2.9"]),
        st.sampled_from([0.0, 0.0, 0.1, 0.4, 1.0, 30.0, 86_400.0]),
    ),
    min_size=1,
    max_size=40,
)


def decided(answer: Answer) -> Any:
    """What an answer says, but for the jitter."""
    said = None if answer.status == 200 else {**problem(answer), "retry_after": None, "detail": None}
    return answer.status, *limit_headers(answer), said


@pytest.mark.parametrize("build", ALIKE)
@settings(max_examples=FEWER)
@given(schedule=SCHEDULE)
def test_a_stack_decides_what_one_middleware_decides(build: Build, schedule: list[tuple[Any, ...]]) -> None:
    one_clock, other_clock = ManualClock("2026-03-04T12:00:00Z"), ManualClock("2026-03-04T12:00:00Z")
    one_registry, other_registry = CollectorRegistry(), CollectorRegistry()
    one, other = whole(SETTINGS, one_clock, one_registry), build(SETTINGS, other_clock, other_registry)
    for tenant, path, address, gap in schedule:
        one_clock.advance(gap)
        other_clock.advance(gap)
        changes: dict[str, Any] = {"state": {"tenant": tenant}, "client": (address, 1)}
        assert decided(call(one, path, **changes)) == decided(call(other, path, **changes))
    assert outcomes(one_registry) == outcomes(other_registry)
    for name in ("seawall_requests_total", "seawall_rejections_total", "seawall_policy_checks_total"):
        assert metric(one_registry, name) == metric(other_registry, name)


@pytest.mark.parametrize("build", [opaque_between, quota_outside_of_opaque])
@settings(max_examples=FEWER)
@given(schedule=SCHEDULE)
def test_stages_that_cannot_see_each_other_still_admit_what_one_admits(
    build: Build, schedule: list[tuple[Any, ...]]
) -> None:
    """Their headers come in one set, whichever order they are in."""
    one_clock, other_clock = ManualClock("2026-03-04T12:00:00Z"), ManualClock("2026-03-04T12:00:00Z")
    one_registry, other_registry = CollectorRegistry(), CollectorRegistry()
    one, other = whole(SETTINGS, one_clock, one_registry), build(SETTINGS, other_clock, other_registry)
    for tenant, path, address, gap in schedule:
        one_clock.advance(gap)
        other_clock.advance(gap)
        changes: dict[str, Any] = {"state": {"tenant": tenant}, "client": (address, 1)}
        left, right = call(one, path, **changes), call(other, path, **changes)
        assert left.status == right.status
        if left.status == 200:
            (policies, current), (other_policies, other_current) = limit_headers(left), limit_headers(right)
            assert sorted(map(repr, policies or ())) == sorted(map(repr, other_policies or ()))
            assert current == other_current
            assert len([name for name, _ in right.messages[0]["headers"] if name == b"ratelimit"]) <= 1
    assert outcomes(one_registry) == outcomes(other_registry)


class Adds(BaseHTTPMiddleware):
    async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        response = await call_next(request)
        response.headers["x-added"] = "1"
        return response


async def test_a_stack_around_a_base_http_middleware_decides_the_same() -> None:
    one_clock, other_clock = ManualClock("2026-03-04T12:00:00Z"), ManualClock("2026-03-04T12:00:00Z")
    one_registry, other_registry = CollectorRegistry(), CollectorRegistry()
    one = whole(SETTINGS, one_clock, one_registry)
    inner = QuotaMiddleware(hello, config=SETTINGS, clock=other_clock, registry=other_registry)
    other = Adds(RateLimitMiddleware(Adds(inner), config=SETTINGS, clock=other_clock, registry=other_registry))
    draw = random.Random(7)
    for _ in range(400):
        gap = draw.choice([0.0, 0.0, 0.0, 0.2, 1.0, 60.0])
        one_clock.advance(gap)
        other_clock.advance(gap)
        path = draw.choice(["/", "/search", "/healthz", "/beta"])
        changes: dict[str, Any] = {"state": {"tenant": draw.choice([None, "acme", "x"])}}
        left, right = await drive(one, path, **changes), await drive(other, path, **changes)
        assert decided(left) == decided(right)
        assert right.headers["x-added"] == "1"
    assert outcomes(one_registry) == outcomes(other_registry)


@pytest.mark.parametrize("build", ALIKE)
@pytest.mark.parametrize(
    "request_",
    [
        pytest.param({"scope": "/healthz"}, id="an exempt route"),
        pytest.param({"client": ("192.0.2.8", 1)}, id="an exempt address"),
        pytest.param({"state": {"tenant": "off"}}, id="a plan that is off"),
    ],
)
def test_what_is_exempt_is_counted_once(
    build: Build, request_: dict[str, Any], clock: ManualClock, registry: CollectorRegistry
) -> None:
    call(build(SETTINGS, clock, registry), **request_)
    assert outcomes(registry) == {"exempt": 1}


def test_identity_is_resolved_once(clock: ManualClock, registry: CollectorRegistry) -> None:
    asked: list[str] = []

    def identify(scope: Scope) -> str:
        asked.append(scope["path"])
        return "acme"

    for build in (RateLimitMiddleware, QuotaMiddleware):
        app: ASGIApp = hello
        for kind in (build, QuotaMiddleware if build is RateLimitMiddleware else RateLimitMiddleware):
            app = kind(Opaque(app), config=SETTINGS, identify=identify, clock=clock, registry=registry)
        asked.clear()
        call(app)
        assert asked == ["/"]


@pytest.mark.parametrize("hidden", [False, True])
async def test_identity_by_a_bound_method_is_resolved_once(
    hidden: bool, clock: ManualClock, registry: CollectorRegistry
) -> None:
    """``self.method`` is another object each time it is written."""

    class Directory:
        asked = 0

        async def identify(self, scope: Scope) -> str:
            self.asked += 1
            return "acme"

    directory = Directory()
    inner: ASGIApp = QuotaMiddleware(
        hello, config=SETTINGS, identify=directory.identify, clock=clock, registry=registry
    )
    app = RateLimitMiddleware(
        Opaque(inner) if hidden else inner, config=SETTINGS, identify=directory.identify, clock=clock, registry=registry
    )
    await drive(app)
    assert directory.asked == 1


def test_a_seawall_in_a_seawall_with_one_policy_does_nothing_and_says_so_once(
    clock: ManualClock, caplog: pytest.LogCaptureFixture, registry: CollectorRegistry
) -> None:
    def build() -> Seawall:
        inner = Seawall(hello, default="2/minute", clock=clock, registry=registry)
        return Seawall(inner, default="2/minute", clock=clock, registry=registry)

    app = build()
    build()
    assert [record.getMessage() for record in caplog.records] == [
        "Seawall is installed twice with one policy; the inner one does nothing"
    ]
    assert statuses(app, 3) == [200, 200, 429]


def test_two_stages_of_one_policy_are_not_installed_twice(
    clock: ManualClock, caplog: pytest.LogCaptureFixture, registry: CollectorRegistry
) -> None:
    rate_outside(plan(rate="1/second", concurrency=3), clock, registry)
    assert caplog.records == []


def test_a_stage_inside_seawall_does_nothing(clock: ManualClock, registry: CollectorRegistry) -> None:
    inner = RateLimitMiddleware(hello, config=plan(rate="2/minute"), clock=clock, registry=registry)
    app = Seawall(inner, config=plan(rate="2/minute"), clock=clock, registry=registry)
    assert statuses(app, 3) == [200, 200, 429]


def test_ten_thousand_tenants_loaded_twice_cost_a_request_nothing(
    clock: ManualClock, registry: CollectorRegistry
) -> None:
    """Whether two policies are one is known when they are loaded, not asked by each request. Bound: a tenth of what
    one comparison takes; the measured cost is a hundredth."""
    settings = plan(rate="1_000_000/minute") | {"tenants": {f"t{number}": {} for number in range(10_000)}}
    one, other = load_mapping(settings), load_mapping(settings)
    started = process_time()
    assert one == other
    comparison = process_time() - started
    inner = QuotaMiddleware(hello, config=one, clock=clock, registry=registry)
    app = RateLimitMiddleware(inner, config=other, clock=clock, registry=registry)
    call(app)
    started = process_time()
    statuses(app, 100)
    assert (process_time() - started) / 100 < max(comparison / 5, 0.000_5)


# Different policies


def nested(clock: ManualClock, registry: CollectorRegistry, app: ASGIApp = hello, **inner: Any) -> ASGIApp:
    """A limit for the service outside, one of a single application inside."""
    return Seawall(
        Opaque(Seawall(app, config=plan(**(inner or {"rate": "2/minute"})), clock=clock, registry=registry)),
        config=plan(rate="5/hour", quota="9/day", concurrency=2),
        clock=clock,
        registry=registry,
    )


def test_two_policies_both_hold(clock: ManualClock, registry: CollectorRegistry) -> None:
    app = nested(clock, registry)
    found = []
    for _ in range(4):
        found += statuses(app, 3)
        clock.advance(60)
    assert found == [200, 200, 429, 200, 200, 429, 200, 429, 429, 429, 429, 429]


def test_two_policies_count_a_request_once(clock: ManualClock, registry: CollectorRegistry) -> None:
    app = nested(clock, registry)
    statuses(app, 4)
    assert outcomes(registry) == {"allowed": 2, "limited": 2}
    assert in_flight(registry) == 0


def test_a_refusal_inside_gives_back_what_the_outer_one_charged(
    clock: ManualClock, registry: CollectorRegistry
) -> None:
    seen: list[int] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(usage(Request(scope))["quota"].remaining)
        await hello(scope, receive, send)

    shell = nested(clock, registry, app)
    assert statuses(shell, 9) == [200, 200] + [429] * 7
    clock.advance(3600)
    assert call(shell).status == 200
    assert seen == [8, 7, 6]


def test_headers_of_two_policies_come_in_one_set(clock: ManualClock, registry: CollectorRegistry) -> None:
    answer = call(nested(clock, registry))
    assert [name for name, _ in answer.messages[0]["headers"]] == [b"content-type", b"ratelimit-policy", b"ratelimit"]
    policies, current = limit_headers(answer)
    assert policies is not None
    assert [parameters.get("q") for _, parameters in policies] == [5, 9, 2, 2]
    assert current == [("rate", {"r": 1, "t": 30})]


def test_a_refusal_inside_is_answered_once_and_names_its_policy(
    clock: ManualClock, registry: CollectorRegistry
) -> None:
    app = nested(clock, registry)
    answer = [call(app) for _ in range(3)][-1]
    assert problem(answer)["violated-policies"] == ["rate"]
    assert "2 requests per minute" in problem(answer)["detail"]
    assert len(answer.messages) == 2


def test_a_quota_refused_inside_is_refused_with_its_own_window(clock: ManualClock, registry: CollectorRegistry) -> None:
    app = nested(clock, registry, quota="1/day")
    call(app)
    refused = call(app)
    assert refused.headers["ratelimit"] == '"quota";r=0;t=43200'


def test_an_inner_concurrency_is_held_and_given_back(clock: ManualClock, registry: CollectorRegistry) -> None:
    app = nested(clock, registry, concurrency=1)
    assert statuses(app, 3) == [200] * 3


def test_charges_reach_both_policies(clock: ManualClock, registry: CollectorRegistry) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        charge(Request(scope), 3)
        await hello(scope, receive, send)

    shell = nested(clock, registry, app, quota="5/day")
    assert statuses(shell, 2) == [200, 200]
    assert problem(call(shell))["violated-policies"] in (["quota"], ["rate"])


def test_an_outer_exemption_leaves_the_inner_policy_in_force_and_counts_once(
    clock: ManualClock, registry: CollectorRegistry
) -> None:
    inner = Seawall(hello, config=plan(rate="1/minute"), clock=clock, registry=registry)
    free = config(routes=[{"name": "free", "match": {"path": "/free"}, "exempt": True}])
    app = Seawall(inner, config=free, clock=clock, registry=registry)
    assert statuses(app, 2, "/free") == [200, 429]
    assert sum(outcomes(registry).values()) == 2


def test_an_inner_exemption_is_counted_by_the_outer_one_alone(clock: ManualClock, registry: CollectorRegistry) -> None:
    inner = config(routes=[{"name": "free", "match": {"path": "/free"}, "exempt": True}])
    app = Seawall(
        Seawall(hello, config=inner, clock=clock, registry=registry),
        config=plan(rate="9/minute"),
        clock=clock,
        registry=registry,
    )
    assert call(app, "/free").headers["ratelimit"] == '"rate";r=8;t=7'
    assert outcomes(registry) == {"allowed": 1}


def test_metrics_served_inside_are_counted_once(clock: ManualClock, registry: CollectorRegistry) -> None:
    inner = config(metrics={"path": "/metrics", "allow": ["192.0.2.1"]})
    app = Seawall(
        Seawall(hello, config=inner, clock=clock, registry=registry),
        config=plan(rate="9/minute"),
        clock=clock,
        registry=registry,
    )
    assert call(app, "/metrics").status == 200
    assert sum(outcomes(registry).values()) == 1


@pytest.mark.parametrize(
    ("inner", "request_", "status", "reason"),
    [
        ({"access": {"deny": ["192.0.2.1"]}}, {}, 403, "denied"),
        ({"identity": {"anonymous": "deny"}}, {}, 401, "unidentified"),
    ],
)
def test_an_inner_401_or_403_gives_the_outer_charge_back(
    inner: dict[str, Any],
    request_: dict[str, Any],
    status: int,
    reason: str,
    clock: ManualClock,
    registry: CollectorRegistry,
) -> None:
    app = Seawall(
        Seawall(hello, config={**config(), **inner}, clock=clock, registry=registry),
        config=plan(rate="1/minute"),
        clock=clock,
        registry=registry,
    )
    answers = [call(app, **request_) for _ in range(3)]
    assert [(answer.status, problem(answer)["reason"]) for answer in answers] == [(status, reason)] * 3
    assert "ratelimit" not in answers[0].headers
    assert outcomes(registry) == {"denied": 3}


def test_an_outer_shadow_says_nothing_and_the_inner_policy_speaks(
    clock: ManualClock, registry: CollectorRegistry
) -> None:
    inner = Seawall(hello, config=plan(rate="2/minute"), clock=clock, registry=registry)
    app = Seawall(inner, config={**plan(rate="1/hour"), "mode": "shadow"}, clock=clock, registry=registry)
    first = call(app)
    assert (first.headers["ratelimit-policy"], first.headers["ratelimit"]) == ('"rate";q=2;w=60', '"rate";r=1;t=30')
    assert statuses(app, 2) == [200, 429]
    assert call(app).headers["ratelimit-policy"] == '"rate";q=2;w=60'


def test_an_inner_shadow_says_nothing_and_refuses_nothing(clock: ManualClock, registry: CollectorRegistry) -> None:
    inner = Seawall(hello, config={**plan(rate="1/hour"), "mode": "shadow"}, clock=clock, registry=registry)
    app = Seawall(inner, config=plan(rate="3/minute"), clock=clock, registry=registry)
    answers = [call(app) for _ in range(4)]
    assert [answer.status for answer in answers] == [200, 200, 200, 429]
    assert {answer.headers["ratelimit-policy"] for answer in answers} == {'"rate";q=3;w=60'}
    assert metric(registry, "seawall_shadow_rejections_total") == {("rate", "rate", "default", "normal"): 2}


async def test_an_inner_backend_that_waits_is_waited_for(clock: ManualClock, registry: CollectorRegistry) -> None:
    from test_asgi_endings import SlowBackend

    inner = Seawall(hello, config=plan(rate="1/minute"), backend=SlowBackend(clock), clock=clock, registry=registry)
    app = Seawall(inner, config=plan(rate="5/minute"), backend=SlowBackend(clock), clock=clock, registry=registry)
    assert [(await drive(app)).status for _ in range(2)] == [200, 429]


# The stages without a file


def test_the_single_stages_work_alone(clock: ManualClock, registry: CollectorRegistry) -> None:
    rate = RateLimitMiddleware(hello, limit="2/minute", clock=clock, registry=registry)
    assert call(rate).headers["ratelimit-policy"] == '"rate";q=2;w=60'
    quota = QuotaMiddleware(hello, limit="2/day", zone="Europe/Berlin", clock=clock, registry=registry)
    assert call(quota).headers["ratelimit"] == f'"quota";r=1;t={11 * 3600}'
    assert [statuses(app, 2) for app in (rate, quota)] == [[200, 429]] * 2


def test_a_stage_enforces_its_part_of_a_file_and_no_other(clock: ManualClock) -> None:
    settings = plan(rate="2/minute", quota="3/day", concurrency=4)
    rate = RateLimitMiddleware(hello, config=settings, clock=clock)
    assert call(rate).headers["ratelimit-policy"] == '"rate";q=2;w=60, "concurrency";q=4;qu="concurrent-requests"'
    quota = QuotaMiddleware(hello, config=settings, clock=clock)
    assert call(quota).headers["ratelimit-policy"] == '"quota";q=3;w=86400'


@pytest.mark.parametrize(
    ("per", "found"),
    [
        ("client_ip", [200, 429, 200, 200]),
        ("tenant", [200, 200, 429, 200]),
        ("global", [200, 429, 429, 429]),
        ("state:team", [200, 429, 429, 200]),
        (["client_ip", "tenant"], [200, 200, 200, 200]),
    ],
)
def test_a_stage_alone_counts_per_what_it_is_told(per: Any, found: list[int], clock: ManualClock) -> None:
    requests: list[tuple[str, str, str]] = [
        ("192.0.2.1", "a", "red"),
        ("192.0.2.1", "b", "red"),
        ("192.0.2.2", "a", "red"),
        ("192.0.2.3", "c", "blue"),
    ]
    for kind, limit in ((RateLimitMiddleware, "1/minute"), (QuotaMiddleware, "1/day")):
        app = kind(
            hello,
            limit=limit,
            per=per,
            identify=lambda scope: scope["state"]["tenant"],
            clock=clock,
            registry=CollectorRegistry(),
        )
        answers = [
            call(app, client=(address, 1), state={"tenant": tenant, "team": team}).status
            for address, tenant, team in requests
        ]
        assert answers == found, kind.__name__


def test_two_stages_without_a_file_both_hold(clock: ManualClock, registry: CollectorRegistry) -> None:
    inner = QuotaMiddleware(hello, limit="3/day", clock=clock, registry=registry)
    app = RateLimitMiddleware(inner, limit="2/minute", clock=clock, registry=registry)
    first = call(app)
    assert first.headers["ratelimit-policy"] == '"rate";q=2;w=60, "quota";q=3;w=86400'
    assert statuses(app, 2) == [200, 429]
    clock.advance(60)
    assert statuses(app, 3) == [200, 429, 429]
    assert outcomes(registry) == {"allowed": 3, "limited": 3}
