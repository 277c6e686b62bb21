"""The headers of answers that the application gives, and that nothing else of them is touched."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from starlette.types import Message, Receive, Scope, Send

from harness import answering, at_once, call, config, hello, limit_headers, plan, statuses, structured
from seawall import Seawall
from seawall.rate import SECOND
from seawall.testing import ManualClock, drive, reset


@pytest.fixture(autouse=True)
def _fresh() -> None:
    reset()


# draft-11


@pytest.mark.parametrize(
    ("rate", "advertised"),
    [
        ("10/second", {"q": 10, "w": 1}),
        ({"limit": "100/second", "burst": 10}, {"q": 100, "w": 1}),
        ({"limit": "100/second", "burst": 300}, {"q": 300, "w": 3}),
        ("3 per 2 second", {"q": 3, "w": 2}),
        ("5/15min", {"q": 5, "w": 900}),
        ({"limit": "1/minute", "burst": 3}, {"q": 3, "w": 180}),
        ("1000/ms", {"q": 1_000_000, "w": 1}),
        ("1/month", {"q": 1, "w": 30 * 86_400}),
    ],
)
def test_a_bucket_advertises_what_fits_into_the_time_it_takes_to_fill(
    rate: Any, advertised: dict[str, int], clock: ManualClock
) -> None:
    policies, _ = limit_headers(call(Seawall(hello, config=plan(rate=rate), clock=clock)))
    assert policies == [("rate", advertised)]


def test_every_policy_is_named_and_only_the_closest_is_counted_down(clock: ManualClock) -> None:
    settings = plan(rate="10/second", quota="3/day", concurrency=5)
    answer = call(Seawall(hello, config=settings, clock=clock))
    assert answer.headers["ratelimit-policy"] == (
        '"rate";q=10;w=1, "quota";q=3;w=86400, "concurrency";q=5;qu="concurrent-requests"'
    )
    assert answer.headers["ratelimit"] == '"quota";r=2;t=43200'


def test_the_closest_is_the_one_with_the_least_of_its_share_left(clock: ManualClock) -> None:
    app = Seawall(hello, config=plan(rate="10/minute", quota="12/day"), clock=clock)
    assert [call(app).headers["ratelimit"] for _ in range(3)] == [f'"rate";r={left};t=6' for left in (9, 8, 7)]
    clock.advance(60)
    assert call(app).headers["ratelimit"] == '"quota";r=8;t=43140'


def test_of_two_as_close_the_one_that_takes_longer_to_grow_is_counted_down(clock: ManualClock) -> None:
    app = Seawall(hello, config=plan(rate=["2/second", "2/minute"]), clock=clock)
    assert call(app).headers["ratelimit"] == '"rate-2";r=1;t=30'
    other = Seawall(hello, config=plan(rate=["2/minute", "2/second"]), clock=clock, registry=CollectorRegistry())
    assert call(other).headers["ratelimit"] == '"rate";r=1;t=30'


def test_t_is_when_one_more_is_left_and_not_a_second_earlier(clock: ManualClock) -> None:
    app = Seawall(hello, config=plan(rate="3/second", quota="100/day"), clock=clock)
    assert call(app).headers["ratelimit"] == '"rate";r=2;t=1'
    clock.advance(0.5)
    assert call(app).headers["ratelimit"] == '"rate";r=2;t=1'
    slow = Seawall(hello, config=plan(rate="6/minute"), clock=clock, registry=CollectorRegistry())
    assert call(slow).headers["ratelimit"] == '"rate";r=5;t=10'
    clock.advance_ns(1)
    assert call(slow).headers["ratelimit"] == '"rate";r=4;t=10'
    clock.advance_ns(10 * SECOND - 2)
    assert call(slow).headers["ratelimit"] == '"rate";r=3;t=1'


def test_t_is_left_out_where_nothing_is_used(clock: ManualClock) -> None:
    """A request that was given back: nothing is used, so there is nothing to wait for."""
    from starlette.requests import Request

    from seawall import charge

    async def free(scope: Scope, receive: Receive, send: Send) -> None:
        charge(Request(scope), -1)
        await hello(scope, receive, send)

    assert call(Seawall(free, default="5/minute", clock=clock)).headers["ratelimit"] == '"rate";r=5'


def test_a_quota_counts_down_to_the_end_of_its_window(clock: ManualClock) -> None:
    app = Seawall(hello, config=plan(quota="5/day"), clock=clock)
    clock.advance(43_199.25)
    assert call(app).headers["ratelimit"] == '"quota";r=4;t=1'


def test_a_month_s_window_changes_with_the_month() -> None:
    clock = ManualClock("2026-01-31T23:59:59Z")
    app = Seawall(hello, config=plan(quota="5/month"), clock=clock)
    assert call(app).headers["ratelimit-policy"] == f'"quota";q=5;w={31 * 86_400}'
    clock.advance(1)
    assert call(app).headers["ratelimit-policy"] == f'"quota";q=5;w={28 * 86_400}'


def test_concurrency_alone_is_advertised_without_a_count(clock: ManualClock) -> None:
    answer = call(Seawall(hello, config=plan(concurrency=5), clock=clock))
    assert answer.headers["ratelimit-policy"] == '"concurrency";q=5;qu="concurrent-requests"'
    assert "ratelimit" not in answer.headers
    assert structured(answer.headers["ratelimit-policy"]) == [("concurrency", {"q": 5, "qu": "concurrent-requests"})]


@pytest.mark.parametrize("status", [200, 201, 204, 304, 400, 404, 422, 500, 503])
def test_answers_of_every_status_tell_what_is_left(status: int, clock: ManualClock) -> None:
    app = Seawall(answering(status), default="2/minute", clock=clock)
    assert "ratelimit" in call(app).headers


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308, 304])
def test_a_redirect_with_nothing_left_does_not_say_so(status: int, clock: ManualClock) -> None:
    app = Seawall(answering(status), default="2/minute", clock=clock)
    assert call(app).headers["ratelimit"] == '"rate";r=1;t=30'
    last = call(app)
    assert (last.status, last.headers) == (status, {"ratelimit-policy": '"rate";q=2;w=60'})


# The other forms


def test_legacy_headers_count_to_an_instant() -> None:
    clock = ManualClock("2026-03-04T12:00:00Z")
    now = clock.wall_ns() // SECOND
    app = Seawall(hello, config=plan(rate="2/minute") | {"responses": {"headers": "legacy"}}, clock=clock)
    assert call(app).headers == {
        "content-type": "text/plain",
        "x-ratelimit-limit": "2",
        "x-ratelimit-remaining": "1",
        "x-ratelimit-reset": str(now + 30),
    }
    call(app)
    refused = call(app)
    assert (refused.headers["x-ratelimit-remaining"], refused.headers["x-ratelimit-reset"]) == ("0", str(now + 30))
    assert int(refused.headers["retry-after"]) >= 30


@given(nanoseconds=st.integers(0, 10 * SECOND), period=st.sampled_from(["second", "2second", "7second", "minute"]))
def test_at_the_legacy_reset_one_more_is_there(nanoseconds: int, period: str) -> None:
    clock = ManualClock("2026-03-04T12:00:00Z")
    clock.advance_ns(nanoseconds)
    settings = plan(rate=f"1/{period}") | {"responses": {"headers": "legacy"}}
    app = Seawall(hello, config=settings, clock=clock, registry=CollectorRegistry())
    assert statuses(app, 1) == [200]
    reset_at = int(call(app).headers["x-ratelimit-reset"])
    clock.advance_ns(max(0, reset_at * SECOND - clock.wall_ns()))
    assert call(app).status == 200


def test_both_is_both_and_off_is_none(clock: ManualClock) -> None:
    both = call(Seawall(hello, config=plan(rate="2/minute") | {"responses": {"headers": "both"}}, clock=clock))
    assert {name for name in both.headers if "ratelimit" in name} == {
        "ratelimit",
        "ratelimit-policy",
        "x-ratelimit-limit",
        "x-ratelimit-remaining",
        "x-ratelimit-reset",
    }
    off = Seawall(hello, config=plan(rate="1/minute", concurrency=3) | {"responses": {"headers": "off"}}, clock=clock)
    assert call(off).headers == {"content-type": "text/plain"}
    refused = call(off)
    assert (refused.status, [name for name in refused.headers if "ratelimit" in name]) == (429, [])
    assert "retry-after" in refused.headers


def test_legacy_headers_of_a_plan_with_concurrency_only_are_none(clock: ManualClock) -> None:
    app = Seawall(hello, config=plan(concurrency=3) | {"responses": {"headers": "legacy"}}, clock=clock)
    assert call(app).headers == {"content-type": "text/plain"}


@given(
    rates=st.lists(
        st.tuples(st.integers(1, 10**12), st.sampled_from(["ms", "second", "15min", "month"])), min_size=1, max_size=8
    ),
    quota=st.none() | st.integers(1, 10**12),
    concurrency=st.none() | st.integers(1, 10**6),
    requests=st.integers(1, 4),
)
def test_headers_are_structured_fields_whatever_the_limits(
    rates: list[tuple[int, str]], quota: int | None, concurrency: int | None, requests: int
) -> None:
    values: dict[str, Any] = {"rate": [f"{amount}/{unit}" for amount, unit in rates]}
    if quota:
        values["quota"] = f"{quota}/month"
    if concurrency:
        values["concurrency"] = concurrency
    app = Seawall(hello, config=plan(**values), clock=ManualClock(), registry=CollectorRegistry())
    for _ in range(requests):
        policies, current = limit_headers(call(app))
        assert policies is not None
        assert current is not None
        names = [name for name, _ in policies]
        assert names == list(dict.fromkeys(names))
        ((name, parameters),) = current
        assert name in names
        advertised = dict(policies)[name]
        assert set(parameters) <= {"r", "t"}
        r, q = parameters["r"], advertised["q"]
        assert isinstance(r, int)
        assert isinstance(q, int)
        assert 0 <= r <= q


# What is not touched


def test_the_application_s_own_headers_keep_their_order_and_come_first(clock: ManualClock) -> None:
    own = [(b"set-cookie", b"a=1"), (b"x-b", b"2"), (b"set-cookie", b"b=2"), (b"X-Odd", b"3"), (b"set-cookie", b"c=3")]
    app = Seawall(answering(200, own), default="2/minute", clock=clock)
    start = call(app).messages[0]
    assert list(start["headers"])[:5] == own
    assert [name for name, _ in start["headers"]][5:] == [b"ratelimit-policy", b"ratelimit"]


def test_the_application_s_message_objects_are_never_changed(clock: ManualClock) -> None:
    headers = [(b"content-type", b"text/plain")]
    messages: list[Message] = [
        {"type": "http.response.start", "status": 200, "headers": headers},
        {"type": "http.response.body", "body": b"x", "more_body": False},
    ]
    before = copy.deepcopy(messages)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for message in messages:
            await send(message)

    shell = Seawall(app, default="9/minute", clock=clock)
    assert statuses(shell, 3) == [200] * 3
    assert messages == before
    assert messages[0]["headers"] is headers


@pytest.mark.parametrize("headers", ["missing", "tuple", "iterator", "lists"])
def test_headers_may_come_in_any_form(headers: str, clock: ManualClock) -> None:
    pair = (b"x-a", b"1")
    message: dict[str, Any] = {"type": "http.response.start", "status": 200}
    match headers:
        case "tuple":
            message["headers"] = (pair,)
        case "iterator":
            message["headers"] = iter([pair])
        case "lists":
            message["headers"] = [list(pair)]

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(message)
        await send({"type": "http.response.body"})

    answer = call(Seawall(app, default="9/minute", clock=clock))
    assert answer.headers["ratelimit"] == '"rate";r=8;t=7'
    assert answer.headers.get("x-a") == (None if headers == "missing" else "1")


def test_a_stream_passes_chunk_by_chunk_and_starts_once(clock: ManualClock) -> None:
    sent: list[Message] = []
    chunks: list[Message] = [
        {"type": "http.response.body", "body": b"%d" % number, "more_body": number < 4} for number in range(5)
    ]
    seen_when_sent: list[int] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for chunk in chunks:
            await send(chunk)
            seen_when_sent.append(len(sent))

    async def receive() -> Message:
        return {"type": "http.request"}

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
    at_once(Seawall(app, default="9/minute", clock=clock)(scope, receive, send))
    assert [message["type"] for message in sent] == ["http.response.start"] + ["http.response.body"] * 5
    assert all(one is other for one, other in zip(sent[1:], chunks, strict=True))
    assert seen_when_sent == [2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    "message",
    [
        {"type": "http.response.debug", "info": {}},
        {"type": "http.response.push", "path": "/style.css", "headers": []},
        {"type": "http.response.early_hint", "links": [b"</style.css>"]},
    ],
)
def test_messages_before_the_start_pass_and_count_nothing(message: Message, clock: ManualClock) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(message)
        await hello(scope, receive, send)

    answer = call(Seawall(app, default="9/minute", clock=clock))
    assert answer.messages[0] is message
    assert answer.headers["ratelimit"] == '"rate";r=8;t=7'


def test_trailers_and_pathsend_pass(clock: ManualClock) -> None:
    last: list[Message] = [
        {"type": "http.response.pathsend", "path": "/etc/hostname"},
        {"type": "http.response.trailers", "headers": [(b"x", b"y")], "more_trailers": False},
    ]

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "trailers": True, "headers": []})
        for message in last:
            await send(message)

    answer = call(Seawall(app, default="9/minute", clock=clock))
    assert answer.messages[0]["trailers"] is True
    assert answer.messages[1:] == last


# WebSocket


def test_a_websocket_s_accept_tells_what_is_left(clock: ManualClock) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "websocket.accept", "subprotocol": "chat", "headers": [(b"x-a", b"1")]})
        await send({"type": "websocket.send", "text": "hi"})
        await send({"type": "websocket.close", "code": 1000})

    answer = call(Seawall(app, default="9/minute", clock=clock), type="websocket")
    assert answer.messages[0] == {
        "type": "websocket.accept",
        "subprotocol": "chat",
        "headers": [(b"x-a", b"1"), (b"ratelimit-policy", b'"rate";q=9;w=60'), (b"ratelimit", b'"rate";r=8;t=7')],
    }
    assert answer.messages[1:] == [{"type": "websocket.send", "text": "hi"}, {"type": "websocket.close", "code": 1000}]


def test_a_websocket_that_the_application_closes_or_denies_passes(clock: ManualClock) -> None:
    async def closes(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "websocket.close", "code": 4001})

    async def denies(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "websocket.http.response.start", "status": 403, "headers": []})
        await send({"type": "websocket.http.response.body", "body": b"no"})

    assert call(Seawall(closes, default="9/minute", clock=clock), type="websocket").messages == [
        {"type": "websocket.close", "code": 4001}
    ]
    denied = call(Seawall(denies, default="9/minute", clock=clock, registry=CollectorRegistry()), type="websocket")
    assert (denied.status, denied.headers["ratelimit"], denied.body) == (403, '"rate";r=8;t=7', b"no")


async def test_headers_are_the_same_with_an_event_loop(clock: ManualClock) -> None:
    app = Seawall(hello, config=config(plans={"default": {"rate": "9/minute"}}), clock=clock)
    assert (await drive(app)).headers["ratelimit"] == '"rate";r=8;t=7'
