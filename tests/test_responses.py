"""What a refusal looks like, to every kind of client."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable
from itertools import count
from typing import Any
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from starlette.types import Receive, Scope, Send

from harness import answering, call, config, hello, limit_headers, plan, problem, seeded, statuses
from seawall import Seawall
from seawall.asgi import Middleware
from seawall.decision import NEVER
from seawall.rate import SECOND
from seawall.responses import EXPOSE_HEADERS, MAX_BODY, period_text, retry_after, wants_html
from seawall.testing import Answer, ManualClock, drive, reset


@pytest.fixture(autouse=True)
def _fresh() -> None:
    reset()


def no_jitter() -> float:
    return 0.0


def all_jitter() -> float:
    return 1.0 - 2**-53


def refusal(
    settings: dict[str, Any], clock: ManualClock, random_: Callable[[], float] = no_jitter, **changes: Any
) -> Answer:
    """The first refusal under ``settings``."""
    app = seeded(hello, settings, random_, clock)
    for _ in range(1_000):
        answer = call(app, **changes)
        if answer.status != 200:
            return answer
    raise AssertionError("nothing was refused")


# Problem documents


def test_a_rate_refusal_is_this_document_and_these_headers(clock: ManualClock) -> None:
    settings = config(plans={"free": {"rate": "10/second"}})
    answer = refusal(settings, clock)
    assert (answer.status, problem(answer)) == (
        429,
        {
            "type": "https://iana.org/assignments/http-problem-types#quota-exceeded",
            "title": "Quota Exceeded",
            "status": 429,
            "detail": "Plan 'free' allows 10 requests per second (policy 'rate'). Retry in 1 s.",
            "violated-policies": ["rate"],
            "reason": "rate",
            "retry_after": 1,
        },
    )
    assert answer.headers == {
        "content-type": "application/problem+json",
        "content-length": str(len(answer.body)),
        "cache-control": "no-store",
        "ratelimit-policy": '"rate";q=10;w=1',
        "ratelimit": '"rate";r=0;t=1',
        "retry-after": "1",
    }


def test_a_quota_refusal_counts_down_to_midnight(clock: ManualClock) -> None:
    answer = refusal(plan(quota="2/day"), clock)
    document = problem(answer)
    assert document["detail"] == "Plan 'default' allows 2 requests per day (policy 'quota'). Retry in 43200 s."
    assert (document["reason"], document["violated-policies"], document["retry_after"]) == ("quota", ["quota"], 43_200)
    assert answer.headers["ratelimit"] == '"quota";r=0;t=43200'


@pytest.mark.parametrize(("source", "seconds"), [(no_jitter, 1), (all_jitter, 2)])
async def test_a_concurrency_refusal_asks_for_one_or_two_seconds(
    source: Callable[[], float], seconds: int, clock: ManualClock
) -> None:
    inside: list[Answer] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if not inside:
            inside.append(await drive(shell))
        await hello(scope, receive, send)

    shell = seeded(app, plan(rate="9/minute", concurrency=1), source, clock)
    assert (await drive(shell)).headers["ratelimit"] == '"rate";r=8;t=7'  # nothing was debited for the other one
    assert problem(inside[0]) == {
        "type": "https://iana.org/assignments/http-problem-types#quota-exceeded",
        "title": "Quota Exceeded",
        "status": 429,
        "detail": f"Plan 'default' allows 1 request at once (policy 'concurrency'). Retry in {seconds} s.",
        "violated-policies": ["concurrency"],
        "reason": "concurrency",
        "retry_after": seconds,
    }
    policies, current = limit_headers(inside[0])
    assert policies == [("rate", {"q": 9, "w": 60}), ("concurrency", {"q": 1, "qu": "concurrent-requests"})]
    assert current == [("concurrency", {"r": 0, "t": 1})]
    assert inside[0].headers["retry-after"] == str(seconds)


@pytest.mark.parametrize(
    ("headers", "found"),
    [
        ("legacy", {"x-ratelimit-limit": "1", "x-ratelimit-remaining": "0", "x-ratelimit-reset": "1772625601"}),
        ("off", {}),
    ],
)
async def test_a_concurrency_refusal_in_other_forms(headers: str, found: dict[str, str], clock: ManualClock) -> None:
    inside: list[Answer] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if not inside:
            inside.append(await drive(shell))
        await hello(scope, receive, send)

    shell = seeded(app, plan(concurrency=1) | {"responses": {"headers": headers}}, no_jitter, clock)
    await drive(shell)
    assert {name: value for name, value in inside[0].headers.items() if "ratelimit" in name} == found
    assert inside[0].headers["retry-after"] == "1"


def test_every_policy_that_refuses_is_listed_the_longest_wait_first(clock: ManualClock) -> None:
    settings = plan(rate="2/minute", quota="2/day") | {
        "routes": [
            {
                "name": "r",
                "match": {"path": "/**"},
                "limits": {"hourly": {"rate": "2/hour", "per": "global"}, "wide": {"rate": "99/hour", "per": "global"}},
            }
        ]
    }
    answer = refusal(settings, clock)
    document = problem(answer)
    assert document["violated-policies"] == ["quota", "hourly", "rate"]
    assert document["reason"] == "quota"
    policies, current = limit_headers(answer)
    assert [name for name, _ in policies or ()] == ["rate", "quota", "hourly", "wide"]
    assert current == [("quota", {"r": 0, "t": 43_200})]


def test_a_limit_of_a_route_speaks_of_the_endpoint(clock: ManualClock) -> None:
    settings = config(
        routes=[
            {
                "name": "login",
                "match": {"path": "/login"},
                "limits": {"login-ip": {"rate": {"limit": "4/15min", "burst": 2}, "per": "client_ip"}},
            }
        ]
    )
    answer = refusal(settings, clock, path="/login")
    assert problem(answer)["detail"] == (
        "This endpoint allows 4 requests per 15 minutes with a burst of 2 (policy 'login-ip'). Retry in 225 s."
    )


def test_what_never_fits_is_refused_without_a_time(clock: ManualClock) -> None:
    settings = plan(rate="3/second", quota="1/day") | {"routes": [{"name": "r", "match": {"path": "/**"}, "cost": 4}]}
    answer = refusal(settings, clock)
    assert problem(answer) == {
        "type": "https://iana.org/assignments/http-problem-types#quota-exceeded",
        "title": "Quota Exceeded",
        "status": 429,
        "detail": "Plan 'default' holds at most 3 (policy 'rate'), and this request costs 4.",
        "violated-policies": ["rate", "quota"],
        "reason": "rate",
    }
    assert "retry-after" not in answer.headers


def test_detail_false_leaves_out_what_and_why(clock: ManualClock) -> None:
    settings = plan(rate="1/minute") | {"responses": {"detail": False}}
    answer = refusal(settings, clock)
    assert problem(answer) == {
        "type": "https://iana.org/assignments/http-problem-types#quota-exceeded",
        "title": "Quota Exceeded",
        "status": 429,
        "reason": "rate",
        "retry_after": 60,
    }
    page = refusal(settings, clock, headers={"Accept": "text/html"})
    assert b"default" not in page.body
    assert b"60" not in page.body


def test_docs_url_is_a_link(clock: ManualClock) -> None:
    settings = plan(rate="1/minute") | {"responses": {"docs_url": "https://example.com/limits"}}
    assert refusal(settings, clock).headers["link"] == '<https://example.com/limits>; rel="help"'
    denied = config(responses=settings["responses"], access={"deny": ["192.0.2.1"]})
    assert refusal(denied, clock).headers["link"] == '<https://example.com/limits>; rel="help"'


def test_a_challenge_names_how_to_authenticate(clock: ManualClock) -> None:
    for header, scheme in (("Authorization", "Bearer"), ("X-API-Key", "ApiKey")):
        settings = config(identity={"tenant": [{"api_key": {"header": header}}], "anonymous": "deny"})
        assert refusal(settings, clock).headers["www-authenticate"] == scheme


@pytest.mark.parametrize(
    ("settings", "path"),
    [
        (plan(rate="1/minute"), "/"),
        (plan(quota="1/day"), "/"),
        (config(access={"deny": ["192.0.2.1"]}), "/"),
        (config(identity={"anonymous": "deny"}), "/"),
        (config(), "/\n"),
    ],
)
@pytest.mark.parametrize("accept", ["*/*", "text/html"])
def test_no_shared_cache_may_store_a_refusal(
    settings: dict[str, Any], path: str, accept: str, clock: ManualClock
) -> None:
    answer = refusal(settings, clock, path=path, headers={"Accept": accept})
    assert answer.headers["cache-control"] == "no-store"
    assert int(answer.headers["content-length"]) == len(answer.body)
    assert set(answer.headers) - {name.lower() for name in EXPOSE_HEADERS} <= {
        "content-type",
        "content-length",
        "cache-control",
        "www-authenticate",
    }


LONGEST = "x" * 64
WORST = {
    "version": 1,
    "plans": {
        LONGEST: {"rate": [{"limit": "999_999_999_999/99years", "burst": 1}] * 8, "quota": "1/month", "concurrency": 1}
    },
    "routes": [
        {
            "name": LONGEST,
            "match": {"path": "/**"},
            "limits": {
                f"{'y' * 56}{number:02d}": {"rate": "1/99years", "quota": "1/month", "per": "global"}
                for number in range(20)
            },
        }
    ],
    "responses": {"headers": "both"},
}


@pytest.mark.parametrize("accept", ["*/*", "text/html"])
def test_bodies_are_at_most_500_bytes_whatever_the_names(accept: str, clock: ManualClock) -> None:
    answer = refusal(WORST, clock, all_jitter, headers={"Accept": accept})
    assert len(answer.body) <= MAX_BODY == 500
    if accept == "*/*":
        document = problem(answer)
        assert (document["status"], document["reason"]) == (429, "rate")
        assert document["violated-policies"][0].startswith("y")
        assert document["retry_after"] == int(answer.headers["retry-after"])


@given(
    plan_name=st.from_regex(r"[a-z0-9][a-z0-9_-]{0,63}", fullmatch=True),
    limit_names=st.lists(
        st.from_regex(r"[a-z0-9][a-z0-9_-]{0,63}", fullmatch=True).filter(
            lambda name: name not in ("rate", "quota", "concurrency", "streams")
        ),
        unique=True,
        max_size=6,
    ),
    amount=st.integers(1, 3),
    unit=st.sampled_from(["ms", "second", "99years", "15min"]),
    headers=st.sampled_from(["draft-11", "legacy", "both", "off"]),
    detail=st.booleans(),
)
def test_any_refusal_is_a_small_document_that_agrees_with_its_headers(
    plan_name: str, limit_names: list[str], amount: int, unit: str, headers: str, detail: bool
) -> None:
    settings: dict[str, Any] = {
        "version": 1,
        "plans": {plan_name: {"rate": f"{amount}/{unit}", "quota": f"{amount}/month"}},
        "responses": {"headers": headers, "detail": detail},
    }
    if limit_names:
        limits = {name: {"rate": f"1/{unit}", "per": "client_ip"} for name in limit_names}
        settings["routes"] = [{"name": "r", "match": {"path": "/**"}, "limits": limits}]
    answer = refusal(settings, ManualClock(), random.Random(amount).random)
    assert len(answer.body) <= MAX_BODY
    document = problem(answer)
    assert str(document["retry_after"]) == answer.headers["retry-after"]
    assert document["status"] == 429
    if headers in ("draft-11", "both"):
        policies, current = limit_headers(answer)
        assert current is not None
        assert current[0][0] in dict(policies or ())
        assert current[0][1]["r"] == 0
        assert current[0][1]["t"] <= document["retry_after"]
        if "violated-policies" in document:
            assert current[0][0] == document["violated-policies"][0]


# Retry-After


@given(wait=st.integers(1, 10**18), grows=st.integers(0, 10**9), drawn=st.floats(0, 1, exclude_max=True))
def test_retry_after_is_the_wait_and_a_jitter_upwards(wait: int, grows: int, drawn: float) -> None:
    """max(t, ceil(wait + U(0, min(0.2 * wait, 30 s)))), at least 1."""
    seconds = retry_after(wait, grows, lambda: drawn)
    shortest = max(1, grows, -(-wait // SECOND))
    longest = max(1, grows, -(-(wait + min(wait // 5, 30 * SECOND)) // SECOND))
    assert shortest <= seconds <= longest
    assert retry_after(wait, grows, no_jitter) == shortest


@pytest.mark.parametrize(
    ("rate", "shortest", "longest"),
    [("1/100ms", 1, 1), ("1/second", 1, 2), ("1/10second", 10, 12), ("1/minute", 60, 72), ("1/hour", 3_600, 3_630)],
)
def test_the_jitter_is_a_fifth_and_at_most_half_a_minute(
    rate: str, shortest: int, longest: int, clock: ManualClock
) -> None:
    assert refusal(plan(rate=rate), clock, no_jitter).headers["retry-after"] == str(shortest)
    assert refusal(plan(rate=rate), clock, all_jitter).headers["retry-after"] == str(longest)


@given(
    rate=st.sampled_from(["3/second", "7/minute", "5/15min", "1/hour"]),
    cost=st.integers(1, 3),
    gaps=st.lists(st.floats(0, 20), min_size=1, max_size=10),
    seed=st.integers(0, 100),
)
def test_who_comes_back_when_told_is_let_in(rate: str, cost: int, gaps: list[float], seed: int) -> None:
    clock = ManualClock()
    settings = plan(rate={"limit": rate, "burst": 3}) | {
        "routes": [{"name": "r", "match": {"path": "/**"}, "cost": cost}]
    }
    app = seeded(hello, settings, random.Random(seed).random, clock)
    for gap in gaps:
        clock.advance(gap)
        answer = call(app)
        if answer.status == 429:
            current = limit_headers(answer)[1]
            assert current is not None
            parameters = current[0][1]
            assert int(answer.headers["retry-after"]) >= int(parameters["t"])
            clock.advance(int(answer.headers["retry-after"]))
            assert call(app).status == 200


def test_five_thousand_obedient_clients_do_not_come_back_together() -> None:
    """D9: refused in one instant, they spread over the jitter and not over one second of it."""
    clock = ManualClock()
    each = seeded(hello, plan(rate="1/minute"), random.Random(1).random, clock)
    back: dict[int, int] = {}
    for number in range(5_000):
        client = (f"10.0.{number // 250}.{number % 250}", 1)
        call(each, client=client)
        seconds = int(call(each, client=client).headers["retry-after"])
        back[seconds] = back.get(seconds, 0) + 1
    assert min(back) >= 60
    assert max(back) <= 72
    assert len(back) == 12
    assert max(back.values()) < 2 * 5_000 / 12


def test_clients_of_one_bucket_come_back_spread_too() -> None:
    clock = ManualClock()
    settings = plan(rate={"limit": "10/minute", "burst": 10}) | {"identity": {"anonymous": "shared"}}
    app = seeded(hello, settings, random.Random(2).random, clock)
    statuses(app, 10)
    at = {}
    for number in range(1_000):
        at[number] = int(call(app).headers["retry-after"])
    assert set(at.values()) == {7, 8}


# HTML


@pytest.mark.parametrize(
    ("accept", "html"),
    [
        ("text/html", True),
        ("TEXT/HTML", True),
        ("text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", True),
        ("text/html;q=0.9,application/json;q=0.9", True),
        ("application/json, text/html", True),
        ("text/html;level=1;q=0.7, application/json;q=0.3", True),
        ("text/html;q=0.5, */*;q=0.4", True),
        ("text/html;q=0.5, application/json", False),
        ("text/html;q=0.5, application/problem+json", False),
        ("text/html;q=0.5, */*", False),
        ("text/html;q=0.5, application/*", False),
        ("text/html;q=0", False),
        ("text/html;q=0, */*", False),
        ("text/html;q=nonsense", False),
        ("text/html;q=nan", False),
        ("application/json", False),
        ("*/*", False),
        ("", False),
        ("html", False),
        ("text/htmlx", False),
        (",;,;q=,", False),
        ("x" * 2_000 + ",text/html", False),
    ],
)
def test_a_page_is_sent_to_those_who_prefer_it(accept: str, html: bool, clock: ManualClock) -> None:
    answer = refusal(plan(rate="1/minute"), clock, headers={"Accept": accept})
    assert answer.headers["content-type"] == ("text/html; charset=utf-8" if html else "application/problem+json")


def test_a_page_says_what_the_document_says(clock: ManualClock) -> None:
    answer = refusal(plan(rate="1/minute"), clock, headers={"Accept": "text/html"})
    assert (answer.status, answer.headers["retry-after"]) == (429, "60")
    assert answer.body.decode() == (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Quota Exceeded</title><h1>Quota Exceeded</h1>'
        "<p>Plan 'default' allows 1 request per minute (policy 'rate'). Retry in 60 s.</p></html>"
    )


@given(st.binary(max_size=3_000))
def test_no_accept_header_breaks_a_refusal(accept: bytes) -> None:
    wants_html(accept)
    wants_html(b"text/html," + accept)


def test_no_accept_header_is_json(clock: ManualClock) -> None:
    assert refusal(plan(rate="1/minute"), clock).headers["content-type"] == "application/problem+json"


# HEAD, WebSocket, gRPC


def test_head_has_the_headers_and_no_body(clock: ManualClock) -> None:
    get = refusal(plan(rate="1/minute"), clock)
    head = refusal(plan(rate="1/minute"), clock, method="HEAD")
    assert (head.status, head.headers, head.body) == (429, get.headers, b"")


def test_a_websocket_is_answered_where_the_server_can(clock: ManualClock) -> None:
    app = seeded(hello, plan(rate="1/minute"), no_jitter, clock)
    extensions: dict[str, dict[str, str]] = {"websocket.http.response": {}}
    assert call(app, type="websocket", extensions=extensions).status == 101
    answer = call(app, type="websocket", extensions=extensions)
    assert [message["type"] for message in answer.messages] == [
        "websocket.http.response.start",
        "websocket.http.response.body",
    ]
    assert (answer.status, problem(answer)["reason"], answer.headers["retry-after"]) == (429, "rate", "60")
    assert answer.headers["ratelimit"] == '"rate";r=0;t=60'


@pytest.mark.parametrize("extensions", [{}, None, {"other": {}}, ...])
def test_a_websocket_is_closed_with_1013_where_it_cannot(extensions: Any, clock: ManualClock) -> None:
    app = seeded(hello, plan(rate="1/minute"), no_jitter, clock)
    changes: dict[str, Any] = {} if extensions is ... else {"extensions": extensions}
    call(app, type="websocket", **changes)
    answer = call(app, type="websocket", **changes)
    assert answer.messages == [{"type": "websocket.close", "code": 1013, "reason": "rate"}]


def test_the_handshake_is_received_before_a_websocket_is_refused(clock: ManualClock) -> None:
    order: list[str] = []

    async def receive() -> dict[str, Any]:
        order.append("receive")
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        order.append(message["type"])

    app: Middleware = seeded(hello, config(access={"deny": ["192.0.2.1"]}), no_jitter, clock)
    scope = {"type": "websocket", "path": "/", "headers": [], "client": ("192.0.2.1", 1)}
    asyncio.run(app(scope, receive, send))
    assert order == ["receive", "websocket.close"]


@pytest.mark.parametrize("content_type", ["application/grpc", "application/grpc+proto", "application/grpc-web+json"])
def test_grpc_is_refused_by_trailers_only(content_type: str, clock: ManualClock) -> None:
    app = seeded(hello, plan(rate="1/minute"), no_jitter, clock)
    call(app)
    answer = call(app, method="POST", headers={"Content-Type": content_type})
    assert answer.status == 200
    assert answer.body == b""
    assert answer.headers["content-type"] == "application/grpc"
    assert answer.headers["grpc-status"] == "8"
    assert unquote(answer.headers["grpc-message"]) == (
        "Plan 'default' allows 1 request per minute (policy 'rate'). Retry in 60 s."
    )
    assert answer.headers["grpc-retry-pushback-ms"] == "60000"
    assert [message["type"] for message in answer.messages] == ["http.response.start", "http.response.body"]


@pytest.mark.parametrize(
    ("settings", "path", "status"),
    [
        (config(identity={"anonymous": "deny"}), "/", "16"),
        (config(access={"deny": ["192.0.2.1"]}), "/", "7"),
        (config(), "/\n", "3"),
    ],
)
def test_grpc_has_a_status_for_every_refusal(
    settings: dict[str, Any], path: str, status: str, clock: ManualClock
) -> None:
    app = seeded(hello, settings, no_jitter, clock)
    answer = call(app, {"path": path}, method="POST", headers={"Content-Type": "application/grpc"})
    assert (answer.status, answer.headers["grpc-status"]) == (200, status)
    assert "grpc-retry-pushback-ms" not in answer.headers


def test_grpc_hears_no_more_than_it_should(clock: ManualClock) -> None:
    app = seeded(hello, plan(rate="1/minute") | {"responses": {"detail": False}}, no_jitter, clock)
    call(app)
    answer = call(app, method="POST", headers={"Content-Type": "application/grpc"})
    assert "default" not in answer.headers.get("grpc-message", "")


# How it is made


async def test_a_refusal_does_not_read_the_request_s_body(clock: ManualClock) -> None:
    async def receive() -> dict[str, Any]:
        raise AssertionError("the body was read")

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    app = seeded(answering(200), plan(rate="1/minute"), no_jitter, clock)
    scope: dict[str, Any] = {"type": "http", "method": "POST", "path": "/", "headers": [], "client": ("192.0.2.1", 1)}
    for _ in range(2):
        await app(dict(scope), receive, send)
    assert sent[2]["status"] == 429


def test_many_different_refusals_keep_a_bounded_number_of_prepared_bytes(clock: ManualClock) -> None:
    """Overrides make a set of bytes for each tenant; ten thousand of them are not kept."""
    tenants = {f"t{number}": {"overrides": {"rate": f"1/{number % 50 + 1}min"}} for number in range(5_000)}
    settings = plan(rate="1/minute") | {"identity": {"tenant": [{"state": "id"}]}, "tenants": tenants}
    app = seeded(hello, settings, no_jitter, clock)
    for number in range(5_000):
        state = {"id": f"t{number}"}
        assert statuses(app, 2, state=state) == [200, 429]
    assert len(app.gate.answers._prepared) <= 4_096
    assert call(app, state={"id": "t7"}).headers["retry-after"] == "480"


def test_each_refusal_has_its_own_seconds(clock: ManualClock) -> None:
    drawn = count(0)
    app = seeded(hello, plan(rate="1/minute"), lambda: (next(drawn) % 12) / 12, clock)
    call(app)
    found = [problem(call(app))["retry_after"] for _ in range(12)]
    assert found == [60, *range(61, 72)]


@pytest.mark.parametrize(
    ("period", "text"),
    [
        (SECOND, "second"),
        (2 * SECOND, "2 seconds"),
        (60 * SECOND, "minute"),
        (900 * SECOND, "15 minutes"),
        (3_600 * SECOND, "hour"),
        (30 * 86_400 * SECOND, "30 days"),
        (SECOND // 4, "250 milliseconds"),
        (SECOND // 1_000, "millisecond"),
        (SECOND + 1, "1 seconds"),
    ],
)
def test_periods_are_written_as_people_say_them(period: int, text: str) -> None:
    assert period_text(period) == text


def test_bodies_are_ascii_and_parse(clock: ManualClock) -> None:
    for settings, path in ((WORST, "/"), (config(), "/\n"), (plan(quota="1/day"), "/")):
        json.loads(refusal(settings, clock, path=path).body.decode("ascii"))


def test_a_wait_without_end_is_no_number_of_seconds() -> None:
    assert NEVER < 0


def test_seawall_draws_its_jitter_itself(clock: ManualClock) -> None:
    app = Seawall(hello, default="1/minute", clock=clock, registry=CollectorRegistry())
    call(app)
    found = {int(call(app).headers["retry-after"]) for _ in range(300)}
    assert min(found) >= 60
    assert max(found) <= 72
    assert len(found) > 5
