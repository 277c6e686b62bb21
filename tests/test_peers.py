"""Where other limiters break: each a regression test that Seawall passes."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from fastapi import APIRouter, FastAPI
from fastapi.testclient import TestClient
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from harness import KEY, call, config, hash_of, hello, metric, outcomes, plan, problem, statuses
from seawall import RateLimitMiddleware, Seawall
from seawall.rate import SECOND
from seawall.testing import Answer, ManualClock, drive, reset


@pytest.fixture(autouse=True)
def _fresh() -> None:
    reset()


# slowapi


def test_included_routers_mounts_and_404s_are_limited(clock: ManualClock) -> None:
    router = APIRouter()

    @router.get("/included")
    async def included() -> str:
        return "ok"

    app = FastAPI()
    app.include_router(router, prefix="/v1")
    app.mount("/mounted", Starlette(routes=[Route("/page", lambda request: PlainTextResponse("ok"))]))
    app.add_middleware(Seawall, default="3/minute", clock=clock)
    client = TestClient(app)
    assert [client.get(path).status_code for path in ("/v1/included", "/mounted/page", "/nowhere", "/v1/included")] == [
        200,
        200,
        404,
        429,
    ]


def test_a_short_limit_s_refusals_do_not_burn_a_long_one(clock: ManualClock) -> None:
    """``1/second`` and ``1000/day``: one of a hundred at once is admitted, and one of the day is used."""
    app = Seawall(hello, config=plan(rate="1/second", quota="1000/day"), clock=clock)
    assert statuses(app, 100).count(200) == 1
    clock.advance(1)
    answer = call(app)
    assert answer.headers["ratelimit"] == '"rate";r=0;t=1'
    half = Seawall(hello, config=plan(rate="1/second", quota="2/day"), clock=clock, registry=CollectorRegistry())
    statuses(half, 100)
    clock.advance(1)
    assert call(half).status == 200


def test_path_parameters_buy_no_bucket(clock: ManualClock) -> None:
    settings = config(
        routes=[
            {"name": "i", "match": {"path": "/items/{id}"}, "limits": {"i": {"rate": "2/minute", "per": "client_ip"}}}
        ]
    )
    app = Seawall(hello, config=settings, clock=clock)
    assert [call(app, f"/items/{number}").status for number in range(4)] == [200, 200, 429, 429]


def test_the_start_of_a_stream_is_sent_once(clock: ManualClock) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for number in range(10):
            await send({"type": "http.response.body", "body": b".", "more_body": number < 9})

    answer = call(Seawall(app, default="9/minute", clock=clock))
    assert [message["type"] for message in answer.messages].count("http.response.start") == 1
    assert answer.body == b"." * 10


# fastapi-limiter


def test_two_clients_are_two_buckets(clock: ManualClock) -> None:
    app = Seawall(hello, default="1/minute", clock=clock)
    assert [call(app, client=(f"192.0.2.{n}", 1)).status for n in (1, 2, 1)] == [200, 200, 429]


@pytest.mark.parametrize("trusted", [[], ["192.0.2.1"]])
def test_the_leftmost_forwarded_address_is_not_believed(trusted: list[str], clock: ManualClock) -> None:
    settings = plan(rate="1/minute") | {"identity": {"client_ip": {"trusted_proxies": trusted}}}
    app = Seawall(hello, config=settings, clock=clock)
    headers = [{"X-Forwarded-For": f"10.0.0.{number}, 203.0.113.5"} for number in range(3)]
    assert [call(app, headers=each).status for each in headers] == [200, 429, 429]


# throttled-py, traffik, litestar, asgi-ratelimit


def test_a_burst_smaller_than_half_a_second_s_rate_still_limits(clock: ManualClock) -> None:
    """100/s with a burst of 10: one that keeps whole seconds in a store never sees it empty."""
    app = Seawall(hello, config=plan(rate={"limit": "100/second", "burst": 10}), clock=clock)
    assert statuses(app, 20).count(200) == 10
    clock.advance(0.05)
    assert statuses(app, 20).count(200) == 5


def test_fractions_of_a_token_are_kept(clock: ManualClock) -> None:
    """16 requests at 0.7 of the rate apart: a bucket that rounds down loses the fractions."""
    app = Seawall(hello, config=plan(rate={"limit": "7/10second", "burst": 1}), clock=clock)
    admitted = 0
    for _ in range(16):
        admitted += call(app).status == 200
        clock.advance_ns(10 * SECOND // 7 + 1)
    assert admitted == 16


def test_a_thousand_and_more_keys_reset_no_exhausted_limit(clock: ManualClock) -> None:
    app = Seawall(hello, default="1/hour", clock=clock)
    assert statuses(app, 2, client=("203.0.113.1", 1)) == [200, 429]
    for number in range(5_000):
        call(app, client=(f"10.0.{number >> 8}.{number & 255}", 1))
    assert call(app, client=("203.0.113.1", 1)).status == 429


def test_five_a_second_is_five_a_second(clock: ManualClock) -> None:
    app = Seawall(hello, default="5/s", clock=clock)
    admitted = 0
    for _ in range(1_000):
        admitted += call(app).status == 200
        clock.advance(0.01)
    assert admitted == 5 + 5 * 10 - 1


@pytest.mark.parametrize("rate", ["20/minute", "1/second", "5/15min"])
def test_every_429_says_when_to_come_back(rate: str, clock: ManualClock) -> None:
    app = Seawall(hello, default=rate, clock=clock)
    for _ in range(30):
        answer = call(app)
        if answer.status == 429:
            assert int(answer.headers["retry-after"]) >= 1


def test_a_lowered_limit_limits(clock: ManualClock) -> None:
    before, after = (
        RateLimitMiddleware(hello, limit=limit, clock=clock, registry=CollectorRegistry())
        for limit in ("100/minute", "2/minute")
    )
    assert statuses(before, 5) == [200] * 5
    assert statuses(after, 3) == [200, 200, 429]


def test_six_a_minute_may_come_at_once(clock: ManualClock) -> None:
    """traefik#8330: it is not one each ten seconds."""
    assert statuses(Seawall(hello, default="6/minute", clock=clock), 7) == [200] * 6 + [429]


# fastapi-guard


def test_every_cookie_arrives(clock: ManualClock) -> None:
    cookies = [(b"set-cookie", b"%d=x" % number) for number in range(5)]

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": cookies})
        await send({"type": "http.response.body", "body": b""})

    answer = call(Seawall(app, default="9/minute", clock=clock))
    assert [pair for pair in answer.messages[0]["headers"] if pair[0] == b"set-cookie"] == cookies


def test_one_address_takes_the_memory_of_one_number(clock: ManualClock) -> None:
    """Not a list of the times of its requests."""
    app = Seawall(hello, default="1000/second", clock=clock)
    statuses(app, 3_000)
    assert app.statistics()["backend"]["address"] == {"keys": 1, "evicted": 0, "overflowed": 0}


# aioresilience, fastapi-balancer


async def test_client_errors_take_nothing_from_anybody(clock: ManualClock, registry: CollectorRegistry) -> None:
    async def not_found(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 404, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    app = Seawall(not_found, config=plan(concurrency=10), clock=clock, registry=registry)
    assert {(await drive(app)).status for _ in range(2_000)} == {404}
    assert app.statistics()["concurrency"] == {"callers": 0, "in_flight": 0}


async def test_a_capacity_of_five_peaks_at_five_and_cancelled_ones_leak_nothing(clock: ManualClock) -> None:
    running = peak = 0

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal running, peak
        running += 1
        peak = max(peak, running)
        try:
            for _ in range(5):
                await asyncio.sleep(0)
            await hello(scope, receive, send)
        finally:
            running -= 1

    shell = Seawall(app, config=plan(concurrency=5), clock=clock)
    for turn in range(20):
        tasks = [asyncio.create_task(drive(shell)) for _ in range(99)]
        for _ in range(turn % 7):
            await asyncio.sleep(0)
        for task in tasks[::3]:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    assert (running, peak) == (0, 5)
    assert shell.statistics()["concurrency"] == {"callers": 0, "in_flight": 0}


# express-rate-limit, better-auth


def test_mapped_addresses_are_their_ipv4_and_not_one_bucket(clock: ManualClock) -> None:
    app = Seawall(hello, default="1/minute", clock=clock)
    found = [
        call(app, client=(address, 1)).status
        for address in ("::ffff:192.0.2.1", "::ffff:192.0.2.2", "192.0.2.1", "::FFFF:C000:202")
    ]
    assert found == [200, 200, 429, 429]


def test_an_ipv6_network_is_one_caller(clock: ManualClock) -> None:
    app = Seawall(hello, default="1/minute", clock=clock)
    found = [call(app, client=(f"2001:db8::{number:x}:1", 1)).status for number in range(5)]
    assert found == [200, 429, 429, 429, 429]
    assert call(app, client=("2001:db8:0:1::1", 1)).status == 200


# Starlette


def test_the_url_of_a_poisoned_host_decides_nothing(clock: ManualClock) -> None:
    settings = config(
        routes=[
            {"name": "free", "match": {"path": "/free"}, "exempt": True},
            {"name": "paid", "match": {"path": "/paid"}, "limits": {"p": {"rate": "1/hour", "per": "client_ip"}}},
        ]
    )
    app = Seawall(hello, config=settings, clock=clock)
    assert [call(app, "/paid", headers={"Host": host}).status for host in ("x/free?", "x/free#", "free")] == [
        200,
        429,
        429,
    ]


# What their users ask for


def test_a_plan_per_key_and_headers_without_touching_endpoints(clock: ManualClock) -> None:
    settings = config(
        identity={"tenant": [{"api_key": {"header": "Authorization"}}]},
        plans={"default": {"rate": "1/minute"}, "pro": {"rate": "3/minute"}},
        tenants={"acme": {"plan": "pro", "keys": [hash_of(KEY)]}},
    )
    app = Seawall(hello, config=settings, clock=clock)
    answers = [call(app, headers={"Authorization": f"Bearer {KEY}"}) for _ in range(4)]
    assert [answer.status for answer in answers] == [200, 200, 200, 429]
    assert answers[0].headers["ratelimit"] == '"rate";r=2;t=20'


def test_no_silent_fallback_to_the_address_where_the_file_says_deny(clock: ManualClock) -> None:
    settings = plan(rate="1/minute") | {"identity": {"tenant": [{"state": "user"}], "anonymous": "deny"}}
    app = Seawall(hello, config=settings, clock=clock)
    assert [call(app).status, call(app, state={"user": "ada"}).status] == [401, 200]


def test_websockets_and_streams_work(clock: ManualClock) -> None:
    app = Seawall(hello, default="2/minute", clock=clock)
    assert [call(app, type="websocket").status for _ in range(3)] == [101, 101, 1013]


def test_shadow_before_enforce(clock: ManualClock, registry: CollectorRegistry) -> None:
    app = Seawall(hello, config={**plan(rate="1/minute"), "mode": "shadow"}, clock=clock, registry=registry)
    assert statuses(app, 5) == [200] * 5
    assert sum(metric(registry, "seawall_shadow_rejections_total").values()) == 4
    assert outcomes(registry) == {"allowed": 5}


def test_allowed_traffic_is_in_the_metrics_per_rule(clock: ManualClock, registry: CollectorRegistry) -> None:
    settings = plan(rate="99/minute") | {
        "routes": [{"name": "s", "match": {"path": "/s"}, "limits": {"search": {"rate": "9/minute", "per": "global"}}}]
    }
    app = Seawall(hello, config=settings, clock=clock, registry=registry)
    statuses(app, 3, "/s")
    assert metric(registry, "seawall_policy_checks_total")[("search", "default", "allow")] == 3


class Broken:
    """A backend whose every call fails."""

    name = "broken"

    def __init__(self) -> None:
        from seawall.backends.memory import MemoryBackend

        self.memory = MemoryBackend()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.memory, name)

    def spend(self, charges: Any) -> Any:
        raise ConnectionError("the store is away")


def test_an_error_inside_holds_no_permit_and_is_counted_once(clock: ManualClock, registry: CollectorRegistry) -> None:
    """A backend that raises is a bug in the backend; the shell at least stays whole."""
    app = Seawall(hello, config=plan(rate="9/minute", concurrency=1), backend=Broken(), clock=clock, registry=registry)
    for _ in range(3):
        with pytest.raises(ConnectionError):
            call(app)
    assert app.statistics()["concurrency"] == {"callers": 0, "in_flight": 0}
    assert sum(outcomes(registry).values()) == 3


def test_429_and_503_are_not_mixed_up(clock: ManualClock) -> None:
    """Whatever a caller's own plan refuses is a 429 of one type."""
    for values in ({"rate": "1/hour"}, {"quota": "1/day"}):
        app = Seawall(hello, config=plan(**values), clock=clock, registry=CollectorRegistry())
        call(app)
        refused: Answer = call(app)
        assert (refused.status, problem(refused)["type"]) == (
            429,
            "https://iana.org/assignments/http-problem-types#quota-exceeded",
        )
