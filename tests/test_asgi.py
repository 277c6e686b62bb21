"""The shell as a whole: who is held to what, in which order the questions are asked, and what passes untouched."""

from __future__ import annotations

import calendar
import logging
from datetime import UTC, datetime, timedelta
from math import floor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from starlette.types import Receive, Scope, Send

import seawall
from harness import (
    KEY,
    OTHER_KEY,
    Seen,
    at_once,
    call,
    config,
    hash_of,
    hello,
    metric,
    outcomes,
    plan,
    problem,
    statuses,
)
from seawall import ConfigError, QuotaMiddleware, RateLimitMiddleware, Refusal, Seawall
from seawall.backends.memory import MemoryBackend
from seawall.policy import Plan, Policy
from seawall.rate import SECOND, Rate
from seawall.testing import Answer, ManualClock, drive, reset


@pytest.fixture(autouse=True)
def _fresh() -> None:
    reset()


# How much is let in


@pytest.mark.parametrize(
    ("notation", "burst", "amount", "per"),
    [
        ("100/second", 10, 100, 1.0),
        ("5/s", 5, 5, 1.0),
        ("3 per 2 second", 3, 3, 2.0),
        ("5/15min", 5, 5, 900.0),
        ("10/second", 10, 10, 1.0),
    ],
)
def test_no_interval_admits_more_than_a_burst_and_its_share(
    notation: str, burst: int, amount: int, per: float, clock: ManualClock
) -> None:
    """A(a, b) <= B + r (b - a), and a caller who asks all the time gets all of it."""
    app = Seawall(hello, config=plan(rate={"limit": notation, "burst": burst}), clock=clock)
    admitted: list[int] = []
    step = round(per / amount * SECOND / 7)
    for _ in range(40 * 7):
        if call(app).status == 200:
            admitted.append(clock())
        clock.advance_ns(step)
    for first in range(len(admitted)):
        for last in range(first, len(admitted)):
            length = admitted[last] - admitted[first]
            assert last - first + 1 <= burst + floor(amount * length / (per * SECOND))
    total = (40 * 7 - 1) * step
    assert len(admitted) == burst + floor(amount * total / (per * SECOND))


_GAPS = st.lists(st.integers(0, 3_000_000_000), min_size=1, max_size=40)


@given(
    amount=st.integers(1, 20),
    period=st.sampled_from(["second", "2second", "minute", "7second"]),
    burst=st.integers(1, 12),
    cost=st.integers(1, 4),
    gaps=_GAPS,
)
def test_any_schedule_is_admitted_exactly_as_the_bucket_says(
    amount: int, period: str, burst: int, cost: int, gaps: list[int]
) -> None:
    """Against a bucket of exact fractions; who waits for what `Retry-After` says is let in."""
    clock = ManualClock()
    settings = plan(rate={"limit": f"{amount}/{period}", "burst": burst})
    settings["routes"] = [{"name": "all", "match": {"path": "/**"}, "cost": cost}]
    app = Seawall(hello, config=settings, clock=clock, registry=CollectorRegistry())
    length = {"second": 1, "2second": 2, "minute": 60, "7second": 7}[period] * SECOND
    tokens, at = burst * length, 0  # in tokens times nanoseconds
    for gap in gaps:
        clock.advance_ns(gap)
        tokens, at = min(burst * length, tokens + (clock() - at) * amount), clock()
        answer = call(app)
        fits = tokens >= cost * length
        assert (answer.status == 200) is fits
        if fits:
            tokens -= cost * length
        elif cost > burst:
            assert "retry-after" not in answer.headers
        else:
            wait = -(-(cost * length - tokens) // amount)
            assert wait <= int(answer.headers["retry-after"]) * SECOND
            clock.advance(int(answer.headers["retry-after"]))
            tokens, at = min(burst * length, tokens + (clock() - at) * amount), clock()
            assert call(app).status == 200
            tokens -= cost * length


@pytest.mark.parametrize(
    ("at", "quota", "seconds"),
    [
        ("2028-02-28T23:59:59Z", "2/day", 1),
        ("2028-02-29T00:00:00Z", "2/day", 86_400),
        ("2028-02-29T12:00:00Z", "2/month", 43_200),
        ("2027-02-28T23:59:00Z", "2/month", 60),
        ("2026-12-31T23:59:50Z", "2/month", 10),
        ("2026-04-30T00:00:00Z", "2/month", 86_400),
    ],
)
def test_a_quota_is_whole_again_at_its_window_s_end_and_not_before(at: str, quota: str, seconds: int) -> None:
    clock = ManualClock(at)
    app = Seawall(hello, config=plan(quota=quota), clock=clock)
    assert statuses(app, 3) == [200, 200, 429]
    clock.advance_ns(seconds * SECOND - 1)
    assert call(app).status == 429
    clock.advance_ns(1)
    assert statuses(app, 3) == [200, 200, 429]


@pytest.mark.parametrize("month", range(1, 13))
def test_a_month_advertises_its_own_seconds(month: int) -> None:
    clock = ManualClock(f"2028-{month:02d}-15T00:00:00Z")
    app = Seawall(hello, config=plan(quota="7/month"), clock=clock)
    assert call(app).headers["ratelimit-policy"] == f'"quota";q=7;w={calendar.monthrange(2028, month)[1] * 86_400}'


def test_a_quota_ends_at_the_midnight_of_its_zone() -> None:
    clock = ManualClock("2026-03-28T22:59:59Z")  # Berlin: 23:59:59 on the eve of the clock change
    app = Seawall(hello, config=plan(quota={"limit": "1/day", "zone": "Europe/Berlin"}), clock=clock)
    assert statuses(app, 2) == [200, 429]
    clock.advance(1)
    answer = call(app)
    assert (answer.status, answer.headers["ratelimit-policy"]) == (200, f'"quota";q=1;w={23 * 3600}')


def test_several_rates_all_hold(clock: ManualClock) -> None:
    app = Seawall(hello, config=plan(rate=["1/second", "3/minute"]), clock=clock)
    found = []
    for _ in range(6):
        found += statuses(app, 2)
        clock.advance(1)
    assert found == [200, 429, 200, 429, 200, 429, 429, 429, 429, 429, 429, 429]


def test_a_refused_request_takes_nothing_from_any_limit(clock: ManualClock) -> None:
    """1/second and 10/day: a client that hammers still gets its ten a day."""
    app = Seawall(hello, config=plan(rate="1/second", quota="10/day"), clock=clock)
    admitted = 0
    for _ in range(12):
        admitted += statuses(app, 20).count(200)
        clock.advance(1)
    assert admitted == 10


def test_cost_multiplies_the_plan_and_not_the_limits_of_the_route(clock: ManualClock) -> None:
    route = {
        "name": "search",
        "match": {"path": "/search"},
        "cost": 5,
        "limits": {
            "search-all": {"rate": "100/minute", "per": "global"},
            "heavy": {"rate": "9/minute", "per": "client_ip", "cost": 3},
        },
    }
    app = Seawall(hello, config=plan(rate="20/minute", quota="1000/day") | {"routes": [route]}, clock=clock)
    call(app, "/search")
    left = seawall_usage(app, "/search")
    assert left == {"rate": 10, "quota": 990, "search-all": 98, "heavy": 3}


def seawall_usage(app: Seawall, path: str, **changes: Any) -> dict[str, int]:
    """What is left after one more request."""
    found: dict[str, int] = {}

    async def ask(scope: Scope, receive: Receive, send: Send) -> None:
        from starlette.requests import Request

        found.update({name: decision.remaining for name, decision in seawall.usage(Request(scope)).items()})
        await hello(scope, receive, send)

    inner, app.app = app.app, ask
    try:
        call(app, path, **changes)
    finally:
        app.app = inner
    return found


def test_a_cost_that_never_fits_is_refused_without_a_time_to_come_back(clock: ManualClock) -> None:
    settings = plan(rate="3/second") | {"routes": [{"name": "big", "match": {"path": "/big"}, "cost": 4}]}
    app = Seawall(hello, config=settings, clock=clock)
    answer = call(app, "/big")
    document = problem(answer)
    assert (answer.status, answer.headers.get("retry-after"), document.get("retry_after")) == (429, None, None)
    assert document["detail"] == "Plan 'default' holds at most 3 (policy 'rate'), and this request costs 4."


# Settings


def test_default_is_the_smallest_file(clock: ManualClock) -> None:
    one = Seawall(hello, default="3/minute", clock=clock, registry=CollectorRegistry())
    other = Seawall(
        hello,
        config={"version": 1, "plans": {"default": {"rate": "3/minute"}}},
        clock=clock,
        registry=CollectorRegistry(),
    )
    for client in ("192.0.2.1", "192.0.2.2", "2001:db8::1"):
        for _ in range(5):
            left, right = (call(app, client=(client, 1)) for app in (one, other))
            assert (left.status, left.headers.get("ratelimit"), left.body[:100]) == (
                right.status,
                right.headers.get("ratelimit"),
                right.body[:100],
            )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "give either config= or default=, not neither"),
        ({"config": config(), "default": "1/second"}, "give either config= or default=, not both"),
        ({"config": 7}, "config= is a path, a mapping or a Policy, not int"),
        ({"default": "1/dya"}, "default=: unknown time unit 'dya'"),
        ({"default": "0/second"}, "default=: '0/second' lets nobody in"),
        ({"config": "/nowhere/seawall.yaml"}, "cannot be read"),
    ],
)
def test_misuse_is_a_config_error_at_start_up(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Seawall(hello, **arguments)
    assert words in str(caught.value)


@pytest.mark.parametrize("kind", [RateLimitMiddleware, QuotaMiddleware])
def test_the_single_stages_take_a_limit_or_a_file(kind: Any) -> None:
    for arguments in ({}, {"config": config(), "limit": "1/day"}):
        with pytest.raises(ConfigError, match="give either config= or limit="):
            kind(hello, **arguments)
    with pytest.raises(ConfigError, match="per= is client_ip, tenant, global"):
        kind(hello, limit="1/day", per="adress")
    with pytest.raises(ConfigError, match="per= is client_ip, tenant, global"):
        kind(hello, limit="1/day", per=[])


def test_a_path_a_text_path_and_a_policy_are_all_a_config(tmp_path: Path, clock: ManualClock) -> None:
    file = tmp_path / "seawall.yaml"
    file.write_text("version: 1\nplans: {default: {rate: 1/minute}}\n")
    policy = Policy(
        plans={"default": Plan("default", (Rate(1, 60 * SECOND),))}, default_plan="default", anonymous_plan="default"
    )
    for given_config in (file, str(file), policy):
        app = Seawall(hello, config=given_config, clock=clock, registry=CollectorRegistry())
        assert statuses(app, 2) == [200, 429]


def test_identify_needs_a_plan_for_whom_it_names() -> None:
    settings = {
        "version": 1,
        "identity": {"anonymous": "deny"},
        "plans": {"a": {"rate": "1/second"}, "b": {"rate": "2/second"}},
    }
    with pytest.raises(ConfigError, match=r"set defaults\.plan"):
        Seawall(hello, config=settings, identify=lambda scope: "x")


def test_a_rate_of_the_limits_library_is_a_default(clock: ManualClock) -> None:
    import limits

    app = Seawall(hello, default=limits.parse("2/minute"), clock=clock)
    assert statuses(app, 3) == [200, 200, 429]


def test_the_default_plan_is_named_default_or_the_only_one(clock: ManualClock) -> None:
    plans = {"default": {"rate": "1/minute"}, "anonymous": {"rate": "2/minute"}, "other": {"rate": "3/minute"}}
    state = {"tenant": [{"state": "id"}]}
    app = Seawall(hello, config=config(plans=plans, identity=state), clock=clock, registry=CollectorRegistry())
    assert statuses(app, 4) == [200, 200, 429, 429]
    assert statuses(app, 4, state={"id": "x"}) == [200, 429, 429, 429]
    only = Seawall(
        hello, config=config(plans={"solo": {"rate": "2/minute"}}), clock=clock, registry=CollectorRegistry()
    )
    assert statuses(only, 3) == [200, 200, 429]


def test_a_plan_without_limits_limits_nothing_and_says_nothing(clock: ManualClock) -> None:
    app = Seawall(hello, config=plan(rate="unlimited"), clock=clock)
    answer = call(app)
    assert (answer.status, answer.headers) == (200, {"content-type": "text/plain"})


def test_unlimited_removes_only_its_own_entry(clock: ManualClock) -> None:
    app = Seawall(hello, config=plan(rate="unlimited", quota="2/day"), clock=clock)
    assert statuses(app, 3) == [200, 200, 429]


def test_a_clock_that_is_a_plain_function_goes_with_the_wall_clock() -> None:
    app = Seawall(hello, config=plan(quota="5/day"), clock=lambda: 0)
    now = datetime.now(UTC)
    left = (now.replace(hour=0, minute=0, second=0, microsecond=0) + timedelta(days=1) - now).total_seconds()
    assert abs(int(call(app).headers["ratelimit"].rpartition("=")[2]) - left) < 60


def test_a_backend_of_ones_own_replaces_the_configured_one(clock: ManualClock) -> None:
    backend = MemoryBackend(clock=clock, wall_clock=clock.wall_ns)
    one, other = (Seawall(hello, default="2/minute", backend=backend, clock=clock) for _ in range(2))
    assert [call(app).status for app in (one, other, one)] == [200, 200, 429]


# Identity


KEYED = {
    "identity": {"tenant": [{"api_key": {"header": "X-API-Key"}}, {"state": "tenant_id"}]},
    "plans": {"free": {"rate": "2/minute"}, "pro": {"rate": "4/minute"}, "anonymous": {"rate": "1/minute"}},
    "defaults": {"plan": "free"},
    "tenants": {"acme": {"plan": "pro", "keys": [hash_of(KEY)]}, "globex": {"keys": [hash_of(OTHER_KEY)]}},
}


def test_a_key_is_a_tenant_and_a_wrong_key_is_its_address(clock: ManualClock) -> None:
    app = Seawall(hello, config=config(**KEYED), clock=clock)
    assert statuses(app, 5, headers={"X-API-Key": KEY}) == [200] * 4 + [429]
    assert statuses(app, 3, headers={"X-API-Key": OTHER_KEY}) == [200, 200, 429]
    assert statuses(app, 2, headers={"X-API-Key": "guess"}) == [200, 429]
    assert call(app, headers={"X-API-Key": "another guess"}).status == 429


def test_an_unlisted_id_is_on_the_default_plan_with_a_bucket_of_its_own(clock: ManualClock) -> None:
    app = Seawall(hello, config=config(**KEYED), clock=clock)
    for tenant in ("x", "y", "z" * 500, "☃"):
        assert statuses(app, 3, state={"tenant_id": tenant}) == [200, 200, 429]
    assert statuses(app, 5, state={"tenant_id": "acme"}) == [200] * 4 + [429]


@pytest.mark.parametrize("value", [None, "", False])
def test_nobody_in_the_state_is_anonymous(value: Any, clock: ManualClock) -> None:
    app = Seawall(hello, config=config(**KEYED), clock=clock)
    assert statuses(app, 2, state={"tenant_id": value}) == [200, 429]


def test_identify_replaces_every_other_source(clock: ManualClock) -> None:
    app = Seawall(hello, config=config(**KEYED), identify=lambda scope: "acme", clock=clock)
    assert statuses(app, 5, state={"tenant_id": "globex"}) == [200] * 4 + [429]


def test_identify_that_names_nobody_is_anonymous_without_further_sources(clock: ManualClock) -> None:
    app = Seawall(hello, config=config(**KEYED), identify=lambda scope: None, clock=clock)
    assert statuses(app, 2, headers={"X-API-Key": KEY}) == [200, 429]


async def test_identify_may_be_awaited(clock: ManualClock) -> None:
    async def identify(scope: Scope) -> str:
        return "acme"

    app = Seawall(hello, config=config(**KEYED), identify=identify, clock=clock)
    assert [(await drive(app)).status for _ in range(5)] == [200] * 4 + [429]


def test_identify_that_fails_is_anonymous_and_said_once(clock: ManualClock, caplog: pytest.LogCaptureFixture) -> None:
    def identify(scope: Scope) -> str:
        raise LookupError("no database")

    app = Seawall(hello, config=config(**KEYED), identify=identify, clock=clock)
    assert statuses(app, 3, headers={"X-API-Key": KEY}) == [200, 429, 429]
    (record,) = caplog.records
    place = f"{__file__}:{identify.__code__.co_firstlineno + 1}"
    assert record.getMessage() == f"identify= failed; its callers are anonymous (LookupError at {place})"


def test_what_a_caller_has_sent_is_not_logged_with_an_exception(
    clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(scope: Scope, *_: Any) -> Any:
        raise LookupError(f"\n\x1b[31m{dict(scope['headers'])[b'x-api-key']!r}") from ValueError(str(scope["headers"]))

    app = Seawall(hello, config=config(**KEYED), identify=fails, on_reject=fails, clock=clock)
    assert statuses(app, 2, headers={"X-API-Key": KEY}) == [200, 429]
    written = [logging.Formatter().format(record) for record in caplog.records]
    assert [text.partition(" ")[0] for text in written] == ["identify=", "on_reject="]
    assert not any(KEY in text or not text.isprintable() for text in written)


def test_anonymous_callers_per_address(clock: ManualClock) -> None:
    app = Seawall(hello, default="1/minute", clock=clock)
    assert [call(app, client=(f"192.0.2.{n}", 1)).status for n in (1, 2, 1, 2)] == [200, 200, 429, 429]


def test_anonymous_callers_that_share_one_bucket(clock: ManualClock) -> None:
    app = Seawall(hello, config=plan(rate="2/minute") | {"identity": {"anonymous": "shared"}}, clock=clock)
    assert [call(app, client=(f"192.0.2.{n}", 1)).status for n in (1, 2, 3)] == [200, 200, 429]


DENY = config(
    identity={"tenant": [{"api_key": {"header": "X-API-Key"}}], "anonymous": "deny"},
    tenants={"acme": {"keys": [hash_of(KEY)]}},
    routes=[{"name": "probes", "match": {"path": "/healthz"}, "exempt": True}],
)


def test_nobody_is_refused_with_401_where_the_file_says_so(clock: ManualClock, registry: CollectorRegistry) -> None:
    app = Seawall(hello, config=DENY, clock=clock, registry=registry)
    answer = call(app)
    assert answer.status == 401
    assert problem(answer) == {
        "type": "about:blank",
        "title": "Unauthorized",
        "status": 401,
        "detail": "This service wants to know who is calling.",
        "reason": "unidentified",
    }
    assert "ratelimit-policy" not in answer.headers
    assert answer.headers["www-authenticate"]
    assert outcomes(registry) == {"denied": 1}
    assert metric(registry, "seawall_rejections_total") == {("unidentified", "", "", "none"): 1}


def test_probes_are_served_where_nobody_else_is(clock: ManualClock, registry: CollectorRegistry) -> None:
    app = Seawall(hello, config=DENY, clock=clock, registry=registry)
    assert statuses(app, 3, "/healthz") == [200, 200, 200]
    assert call(app, "/", headers={"X-API-Key": KEY}).status == 200
    assert outcomes(registry) == {"exempt": 3, "allowed": 1}


@pytest.mark.parametrize(
    "lowered", [{"mode": "shadow"}, {"routes": [{"name": "r", "match": {"path": "/**"}, "mode": "shadow"}]}]
)
def test_nobody_is_served_in_shadow_mode_and_counted(
    lowered: dict[str, Any], clock: ManualClock, registry: CollectorRegistry
) -> None:
    """401 follows the modes of file and route."""
    app = Seawall(hello, config={**DENY, **lowered}, clock=clock, registry=registry)
    assert call(app).status == 200
    assert outcomes(registry) == {"allowed": 1}
    shadow = metric(registry, "seawall_shadow_rejections_total")
    assert [labels[0] for labels in shadow] == ["unidentified"]
    assert metric(registry, "seawall_rejections_total") == {}


# Access


ACCESS = {"access": {"deny": ["198.51.100.0/24", "2001:db8:bad::/48"], "exempt": ["10.1.0.0/16"]}}


@pytest.mark.parametrize("address", ["198.51.100.7", "::ffff:198.51.100.7", "2001:db8:bad::1"])
def test_a_blocked_address_is_refused_with_403(address: str, clock: ManualClock, registry: CollectorRegistry) -> None:
    app = Seawall(hello, config=plan(rate="1/minute") | ACCESS, clock=clock, registry=registry)
    answer = call(app, client=(address, 1))
    assert answer.status == 403
    assert problem(answer) == {
        "type": "about:blank",
        "title": "Forbidden",
        "status": 403,
        "detail": "Access from here is not allowed.",
        "reason": "denied",
    }
    assert not {"ratelimit", "ratelimit-policy", "retry-after"} & set(answer.headers)
    assert outcomes(registry) == {"denied": 1}
    assert metric(registry, "seawall_rejections_total") == {("denied", "", "", "none"): 1}


def test_an_exempt_address_is_neither_limited_nor_told_of_limits(
    clock: ManualClock, registry: CollectorRegistry
) -> None:
    app = Seawall(hello, config=plan(rate="1/minute") | ACCESS, clock=clock, registry=registry)
    answers = [call(app, client=("10.1.2.3", 1)) for _ in range(3)]
    assert [(answer.status, "ratelimit" in answer.headers) for answer in answers] == [(200, False)] * 3
    assert outcomes(registry) == {"exempt": 3}


@pytest.mark.parametrize("path", ["/a\n", "/\x00", "/a\x7f", "/\x9f", "/a\r\nb", "/\x1b[31m"])
def test_a_control_character_in_the_path_is_refused_with_400(
    path: str, clock: ManualClock, registry: CollectorRegistry
) -> None:
    seen = Seen()
    app = Seawall(seen, config=plan(rate="1/minute"), clock=clock, registry=registry)
    answer = call(app, {"path": path})
    assert (answer.status, problem(answer)["reason"], problem(answer)["type"]) == (400, "denied", "about:blank")
    assert seen.paths == []
    assert outcomes(registry) == {"denied": 1}
    assert call(app).status == 200  # it cost nothing


@pytest.mark.parametrize("path", ["/naïve", "/☃", "/a b", "/\u00ad", "/\u2028x", "/\ufffd", "/\ue000"])
def test_other_characters_are_no_control_characters(path: str, clock: ManualClock) -> None:
    assert call(Seawall(hello, config=plan(rate="1/minute"), clock=clock), {"path": path}).status == 200


# Order, pairwise. Each line is a request to which two rules apply, and the outcome of the earlier one.


ORDERED = {
    "version": 1,
    "identity": {"tenant": [{"api_key": {"header": "X-API-Key"}}], "anonymous": "deny"},
    "plans": {
        "default": {"rate": "1/minute", "quota": "100/day", "concurrency": 1},
        "free": {"mode": "off", "rate": "1/minute"},
    },
    "tenants": {"acme": {"keys": [hash_of(KEY)]}, "globex": {"plan": "free", "keys": [hash_of(OTHER_KEY)]}},
    "access": {"deny": ["198.51.100.0/24"], "exempt": ["10.1.0.0/16", "198.51.100.99/32"]},
    "routes": [
        {"name": "probes", "match": {"path": ["/healthz", "/x/**", "/metrics"]}, "exempt": True},
        {"name": "off", "match": {"path": "/off"}, "mode": "off"},
    ],
    "metrics": {"path": "/metrics", "allow": ["192.0.2.1"]},
}
PREFLIGHT = {"Origin": "https://example.com", "Access-Control-Request-Method": "PUT"}


@pytest.mark.parametrize(
    ("request_", "status", "counted"),
    [
        pytest.param({"method": "OPTIONS", "headers": PREFLIGHT, "path": "/\n"}, 200, {}, id="preflight before 400"),
        pytest.param(
            {"method": "OPTIONS", "headers": PREFLIGHT, "client": ("198.51.100.1", 1)},
            200,
            {},
            id="preflight before 403",
        ),
        pytest.param({"method": "OPTIONS", "headers": PREFLIGHT}, 200, {}, id="preflight before 401"),
        pytest.param(
            {"path": "/metrics", "client": ("198.51.100.1", 1)}, 404, {"exempt": 1}, id="metrics before access"
        ),
        pytest.param({"path": "/metrics"}, 200, {"exempt": 1}, id="metrics before 401"),
        pytest.param({"path": "/x/\n"}, 400, {"denied": 1}, id="400 before exempt"),
        pytest.param({"path": "/\n", "client": ("10.1.0.1", 1)}, 400, {"denied": 1}, id="400 before exempt address"),
        pytest.param({"path": "/\n"}, 400, {"denied": 1}, id="400 before 401"),
        pytest.param(
            {"path": "/healthz", "client": ("198.51.100.1", 1)}, 200, {"exempt": 1}, id="exempt before access"
        ),
        pytest.param({"path": "/off", "client": ("198.51.100.1", 1)}, 200, {"exempt": 1}, id="off before access"),
        pytest.param({"path": "/healthz"}, 200, {"exempt": 1}, id="exempt before 401"),
        pytest.param({"path": "/off"}, 200, {"exempt": 1}, id="off before 401"),
        pytest.param(
            {"client": ("198.51.100.99", 1), "headers": {"X-API-Key": KEY}},
            403,
            {"denied": 1},
            id="deny before exempt address",
        ),
        pytest.param({"client": ("198.51.100.1", 1)}, 403, {"denied": 1}, id="403 before 401"),
        pytest.param(
            {"client": ("198.51.100.1", 1), "headers": {"X-API-Key": OTHER_KEY}},
            403,
            {"denied": 1},
            id="403 before a plan that is off",
        ),
        pytest.param({"client": ("10.1.0.1", 1)}, 200, {"exempt": 1}, id="exempt address before 401"),
        pytest.param({"headers": {"X-API-Key": OTHER_KEY}}, 200, {"exempt": 1}, id="a plan that is off"),
    ],
)
def test_the_questions_are_asked_in_this_order(
    request_: dict[str, Any], status: int, counted: dict[str, int], clock: ManualClock, registry: CollectorRegistry
) -> None:
    app = Seawall(hello, config=ORDERED, clock=clock, registry=registry)
    assert call(app, **request_).status == status
    assert outcomes(registry) == counted


async def test_concurrency_is_asked_before_the_rate_and_debits_nothing(clock: ManualClock) -> None:
    seen: list[Answer] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/outer":
            seen.append(await drive(shell, "/inner", headers={"X-API-Key": KEY}))
        await hello(scope, receive, send)

    settings = {
        **ORDERED,
        "plans": {"default": {"rate": "2/minute", "quota": "100/day", "concurrency": 1}, "free": {"rate": "1/minute"}},
    }
    shell = Seawall(app, config=settings, clock=clock)
    outer = await drive(shell, "/outer", headers={"X-API-Key": KEY})
    assert outer.status == 200
    assert problem(seen[0])["violated-policies"] == ["concurrency"]
    # Both rules would have refused the next one; the earlier question answers.
    assert (await drive(shell, "/a", headers={"X-API-Key": KEY})).headers["ratelimit"] == '"rate";r=0;t=30'
    both = await drive(shell, "/outer", headers={"X-API-Key": KEY})
    assert problem(both)["violated-policies"] == ["rate"]


# Modes


def four_levels(level: str, mode: str) -> dict[str, Any]:
    settings: dict[str, Any] = config(
        identity={"tenant": [{"state": "tenant"}]},
        plans={"default": {"rate": "1/minute", "quota": "5/day", "concurrency": 1}},
        tenants={"acme": {}},
        routes=[{"name": "all", "match": {"path": "/**"}, "limits": {"extra": {"rate": "1/minute", "per": "global"}}}],
    )
    match level:
        case "file":
            settings["mode"] = mode
        case "plan":
            settings["plans"]["default"]["mode"] = mode
        case "tenant":
            settings["tenants"]["acme"]["mode"] = mode
        case "route":
            settings["routes"][0]["mode"] = mode
    return settings


LEVELS = ["file", "plan", "tenant", "route"]
ACME: dict[str, Any] = {"state": {"tenant": "acme"}}


@pytest.mark.parametrize("level", LEVELS)
def test_off_serves_everything_as_exempt_and_spends_nothing(
    level: str, clock: ManualClock, registry: CollectorRegistry
) -> None:
    app = Seawall(hello, config=four_levels(level, "off"), clock=clock, registry=registry)
    answers = [call(app, **ACME) for _ in range(3)]
    assert [(answer.status, answer.headers) for answer in answers] == [(200, {"content-type": "text/plain"})] * 3
    assert outcomes(registry) == {"exempt": 3}
    assert sum(store["keys"] for store in app.statistics()["backend"].values()) == 0


@pytest.mark.parametrize("level", LEVELS)
def test_shadow_serves_counts_and_says_nothing(level: str, clock: ManualClock, registry: CollectorRegistry) -> None:
    app = Seawall(hello, config=four_levels(level, "shadow"), clock=clock, registry=registry)
    answers = [call(app, **ACME) for _ in range(3)]
    assert [(answer.status, answer.headers) for answer in answers] == [(200, {"content-type": "text/plain"})] * 3
    assert outcomes(registry) == {"allowed": 3}
    assert metric(registry, "seawall_shadow_rejections_total") == {("rate", "rate", "default", "normal"): 2}
    assert metric(registry, "seawall_rejections_total") == {}


def test_a_would_be_refusal_debits_nothing(clock: ManualClock, registry: CollectorRegistry) -> None:
    settings = plan(rate="1/minute", quota="5/day", mode="shadow")
    app = Seawall(hello, config=settings, clock=clock, registry=registry)
    statuses(app, 4)
    clock.advance(60)
    assert seawall_usage(app, "/") == {"rate": 0, "quota": 3}


async def test_shadow_counts_too_many_at_once_and_serves_them(clock: ManualClock, registry: CollectorRegistry) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/outer":
            assert (await drive(shell, "/inner")).status == 200
        await hello(scope, receive, send)

    shell = Seawall(app, config=plan(concurrency=1, mode="shadow"), clock=clock, registry=registry)
    assert (await drive(shell, "/outer")).status == 200
    assert metric(registry, "seawall_shadow_rejections_total") == {
        ("concurrency", "concurrency", "default", "normal"): 1
    }
    assert shell.statistics()["concurrency"] == {"callers": 0, "in_flight": 0}


@pytest.mark.parametrize("file_mode", ["off", "shadow", "enforce"])
@pytest.mark.parametrize("level", ["plan", "tenant", "route"])
@pytest.mark.parametrize("mode", ["off", "shadow", "enforce"])
def test_the_effective_mode_is_the_lowest(
    file_mode: str, level: str, mode: str, clock: ManualClock, registry: CollectorRegistry
) -> None:
    app = Seawall(hello, config={**four_levels(level, mode), "mode": file_mode}, clock=clock, registry=registry)
    lowest = min(file_mode, mode, key=["off", "shadow", "enforce"].index)
    expected = {"off": {"exempt": 2}, "shadow": {"allowed": 2}, "enforce": {"allowed": 1, "limited": 1}}[lowest]
    statuses(app, 2, **ACME)
    assert outcomes(registry) == expected


def test_a_mode_lowers_only_what_it_is_of(clock: ManualClock) -> None:
    settings = config(
        identity={"tenant": [{"state": "tenant"}]},
        plans={"default": {"rate": "1/minute"}, "trial": {"rate": "1/minute", "mode": "shadow"}},
        tenants={"acme": {}, "globex": {"mode": "shadow"}, "new": {"plan": "trial"}},
        routes=[{"name": "beta", "match": {"path": "/beta"}, "mode": "shadow"}],
    )
    app = Seawall(hello, config=settings, clock=clock)
    assert statuses(app, 2, state={"tenant": "acme"}) == [200, 429]
    assert statuses(app, 2, state={"tenant": "globex"}) == [200, 200]
    assert statuses(app, 2, state={"tenant": "new"}) == [200, 200]
    assert statuses(app, 2, "/beta", state={"tenant": "acme"}) == [200, 200]


# Who is counted as what


PRIORITIES = config(
    identity={"tenant": [{"state": "tenant"}]},
    plans={"default": {"priority": "low"}, "plain": {}},
    tenants={
        "own": {"priority": "critical"},
        "plain": {"plan": "plain"},
        "listed": {},
        "over": {"overrides": {"priority": "critical"}},
    },
    routes=[{"name": "r", "match": {"path": "/route"}, "priority": "normal"}],
)


@pytest.mark.parametrize(
    ("tenant", "path", "priority"),
    [
        ("listed", "/", "low"),
        ("listed", "/route", "normal"),
        ("own", "/", "critical"),
        ("own", "/route", "critical"),
        ("plain", "/", "normal"),
        ("over", "/", "critical"),
        ("nobody-listed", "/", "low"),
    ],
)
def test_priority_is_the_tenant_s_then_the_route_s_then_the_plan_s(
    tenant: str, path: str, priority: str, clock: ManualClock, registry: CollectorRegistry
) -> None:
    app = Seawall(hello, config=PRIORITIES, clock=clock, registry=registry)
    call(app, path, state={"tenant": tenant})
    assert metric(registry, "seawall_requests_total") == {("allowed", priority): 1}


def test_what_is_exempt_has_no_priority(clock: ManualClock, registry: CollectorRegistry) -> None:
    app = Seawall(hello, config=DENY, clock=clock, registry=registry)
    call(app, "/healthz")
    assert metric(registry, "seawall_requests_total") == {("exempt", "none"): 1}


# What passes untouched


@pytest.mark.parametrize("kind", ["lifespan", "webtransport", "something"])
async def test_other_scopes_pass(kind: str, registry: CollectorRegistry) -> None:
    passed: list[tuple[Scope, Receive, Send]] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        passed.append((scope, receive, send))

    async def receive() -> Any: ...
    async def send(message: Any) -> None: ...

    scope = {"type": kind}
    await Seawall(app, default="1/day", registry=registry)(scope, receive, send)
    assert passed == [(scope, receive, send)]
    assert passed[0][0] is scope
    assert outcomes(registry) == {}


def test_a_preflight_is_never_counted_and_never_limited(clock: ManualClock, registry: CollectorRegistry) -> None:
    app = Seawall(hello, default="1/day", clock=clock, registry=registry)
    assert statuses(app, 5, method="OPTIONS", headers=PREFLIGHT) == [200] * 5
    assert outcomes(registry) == {}
    assert call(app).status == 200


@pytest.mark.parametrize("headers", [{}, {"Origin": "https://example.com"}, {"Access-Control-Request-Method": "PUT"}])
def test_options_that_is_no_preflight_is_a_request_like_any(headers: dict[str, str], clock: ManualClock) -> None:
    app = Seawall(hello, default="1/day", clock=clock)
    assert statuses(app, 2, method="OPTIONS", headers=headers) == [200, 429]


def test_a_preflight_s_headers_on_another_method_buy_nothing(clock: ManualClock) -> None:
    app = Seawall(hello, default="1/day", clock=clock)
    assert statuses(app, 2, method="GET", headers=PREFLIGHT) == [200, 429]


def test_every_method_and_a_websocket_is_one_request(clock: ManualClock, registry: CollectorRegistry) -> None:
    app = Seawall(hello, default="6/day", clock=clock, registry=registry)
    methods = ["GET", "HEAD", "POST", "DELETE", "BREW"]
    assert [call(app, method=method).status for method in methods] == [200] * 5
    assert call(app, type="websocket").status == 101
    assert call(app).status == 429
    assert outcomes(registry) == {"allowed": 6, "limited": 1}


def test_the_application_gets_the_very_scope_and_receive(clock: ManualClock) -> None:
    given_scope: list[Any] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        given_scope.append(scope)
        given_scope.append(receive)
        await hello(scope, receive, send)

    async def receive() -> Any: ...
    async def send(message: Any) -> None: ...

    scope: dict[str, Any] = {"type": "http", "method": "GET", "path": "/", "headers": []}
    at_once(Seawall(app, default="1/day", clock=clock)(scope, receive, send))
    assert given_scope[0] is scope
    assert given_scope[1] is receive


# on_reject


def test_on_reject_answers_instead(clock: ManualClock, registry: CollectorRegistry) -> None:
    refusals: list[Refusal] = []

    async def teapot(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 418, "headers": []})
        await send({"type": "http.response.body", "body": b"short and stout"})

    def on_reject(scope: Scope, refusal: Refusal) -> Any:
        refusals.append(refusal)
        return teapot if scope["path"] == "/pot" else None

    app = Seawall(hello, default="1/minute", on_reject=on_reject, clock=clock, registry=registry)
    call(app)
    assert (call(app, "/pot").status, call(app).status) == (418, 429)
    assert outcomes(registry) == {"allowed": 1, "limited": 2}
    first = refusals[0]
    assert (first.status, first.reason, first.policies, first.plan, first.priority) == (
        429,
        "rate",
        ("rate",),
        "default",
        "normal",
    )
    assert first.retry_after is not None
    assert 60 <= first.retry_after <= 72
    assert (
        first.detail == f"Plan 'default' allows 1 request per minute (policy 'rate'). Retry in {first.retry_after} s."
    )


def test_on_reject_that_fails_is_said_once_and_the_refusal_sent(
    clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    def on_reject(scope: Scope, refusal: Refusal) -> Any:
        raise KeyError("oops")

    app = Seawall(hello, default="1/minute", on_reject=on_reject, clock=clock)
    assert statuses(app, 3) == [200, 429, 429]
    assert [record.getMessage().partition(" (")[0] for record in caplog.records] == [
        "on_reject= failed; refusals are answered as usual"
    ]


def test_on_reject_is_asked_for_every_kind_of_refusal(clock: ManualClock) -> None:
    reasons: list[tuple[int, str]] = []
    settings = {**ORDERED, "plans": {"default": {"rate": "1/minute"}, "free": {"rate": "1/minute"}}}
    app = Seawall(
        hello,
        config=settings,
        clock=clock,
        on_reject=lambda scope, refusal: reasons.append((refusal.status, refusal.reason)),
    )
    call(app, "/%0a")
    call(app, client=("198.51.100.1", 1))
    call(app)
    statuses(app, 2, headers={"X-API-Key": KEY})
    assert reasons == [(400, "denied"), (403, "denied"), (401, "unidentified"), (429, "rate")]


# What operators read


def test_a_request_describes_itself(clock: ManualClock) -> None:
    found: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        found.append(repr(scope["seawall"]))
        await hello(scope, receive, send)

    shell = Seawall(app, config=config(**KEYED), clock=clock)
    call(shell)
    call(shell, headers={"X-API-Key": KEY})
    assert found == [
        "<Exchange with an anonymous caller on default, open>",
        "<Exchange with tenant 'acme' on default, open>",
    ]


def test_a_middleware_describes_itself(clock: ManualClock) -> None:
    app = Seawall(hello, default="1/minute", clock=clock)
    call(app)
    assert (
        repr(app)
        == "<Seawall <Gate enforce, 0 tenants, 0 rules>, <MemoryBackend 1 keys in 2 stores, at most 100000 each>>"
    )
    assert app.statistics() == {
        "backend": {
            "address": {"keys": 1, "evicted": 0, "overflowed": 0},
            "id": {"keys": 0, "evicted": 0, "overflowed": 0},
        },
        "concurrency": {"callers": 0, "in_flight": 0},
        "overload": {
            "limit": 20,
            "reason": "start",
            "in_flight": 0,
            "waiting": {"critical": 0, "normal": 0, "low": 0},
            "lag": 0.0,
            "utilization": 0.0,
            "shed_from": None,
            "refused": 0,
        },
        "streams": {},
    }
