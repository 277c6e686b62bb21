"""`seawall.testing`: what tests of applications lean on."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

import seawall.testing
from harness import call, hello, outcomes, plan, statuses
from seawall import QuotaMiddleware, Seawall
from seawall.backends.memory import MemoryBackend
from seawall.metrics import REGISTRY
from seawall.testing import Answer, ManualClock, disabled, drive, reset


@pytest.fixture(autouse=True)
def _fresh() -> None:
    reset()


# ManualClock


def test_a_clock_stands_until_it_is_told() -> None:
    clock = ManualClock()
    assert (clock(), clock(), clock.wall_ns()) == (0, 0, 1_767_225_600 * 10**9)
    clock.advance(1.5)
    clock.advance_ns(1)
    assert (clock(), clock.wall_ns()) == (1_500_000_001, 1_767_225_601_500_000_001)


@pytest.mark.parametrize(
    ("at", "wall"),
    [
        ("1970-01-01T00:00:00Z", 0),
        ("2028-02-28T23:59:59Z", 1_835_395_199 * 10**9),
        ("2028-02-28T23:59:59.000001Z", 1_835_395_199 * 10**9 + 1_000),
        ("2026-01-01T01:00:00+01:00", 1_767_225_600 * 10**9),
        ("2026-01-01T00:00:00", 1_767_225_600 * 10**9),
        ("2026-01-01", 1_767_225_600 * 10**9),
        ("1969-12-31T23:59:59Z", -(10**9)),
    ],
)
def test_a_clock_starts_at_an_instant_exactly(at: str, wall: int) -> None:
    assert ManualClock(at).wall_ns() == wall


def test_a_clock_may_be_set_back() -> None:
    clock = ManualClock()
    clock.advance(7_200)
    app = Seawall(hello, default="2/minute", clock=clock)
    assert statuses(app, 3) == [200, 200, 429]
    clock.advance(-3_600)
    assert clock() == 3_600 * 10**9
    assert call(app).status == 429
    clock.advance(120)
    assert statuses(app, 3) == [200, 200, 429]


def test_a_new_caller_has_a_whole_bucket_whatever_the_clock_says() -> None:
    clock = ManualClock()
    clock.advance(-2)
    assert clock() == -2 * 10**9
    assert statuses(Seawall(hello, default="2/minute", clock=clock), 3) == [200, 200, 429]


def test_a_clock_says_what_time_it_is() -> None:
    assert repr(ManualClock("2028-02-28T23:59:59Z")) == "<ManualClock 2028-02-28T23:59:59+00:00>"


# drive


async def test_drive_returns_the_answer_of_an_application() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        response = JSONResponse({"path": request.scope["path"], "q": request.query_params.get("q")}, 201)
        response.set_cookie("a", "1")
        await response(scope, receive, send)

    answer = await drive(app, "/search%20me?q=1")
    assert (answer.status, answer.body) == (201, b'{"path":"/search me","q":"1"}')
    assert answer.headers["content-type"] == "application/json"
    assert [message["type"] for message in answer.messages] == ["http.response.start", "http.response.body"]


@pytest.mark.parametrize(
    ("scope", "changes", "expected"),
    [
        ("/", {}, {"path": "/", "method": "GET", "client": ("192.0.2.1", 50_000), "headers": []}),
        ("/a%2Fb?x=1", {}, {"path": "/a/b", "raw_path": b"/a%2Fb", "query_string": b"x=1"}),
        ({"path": "/a\n"}, {"method": "PUT"}, {"path": "/a\n", "method": "PUT"}),
        ("/", {"headers": {"X-API-Key": "foo", "N": 1}}, {"headers": [(b"x-api-key", b"foo"), (b"n", b"1")]}),
        ("/", {"headers": [(b"A", b"\xff")]}, {"headers": [(b"A", b"\xff")]}),
        ("/", {"type": "websocket"}, {"type": "websocket", "scheme": "ws"}),
        ({"path": "/x"}, {"path": "/y"}, {"path": "/y"}),
    ],
)
def test_drive_builds_the_scope_that_is_meant(scope: Any, changes: Any, expected: dict[str, Any]) -> None:
    seen: list[Scope] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope)

    answer = call(app, scope, **changes)
    assert {name: seen[0][name] for name in expected} == expected
    assert ("method" in seen[0]) is (seen[0]["type"] == "http")
    assert answer == Answer()


@pytest.mark.parametrize("kind", ["http", "websocket"])
async def test_drive_has_one_request_and_then_the_client_is_gone(kind: str) -> None:
    received: list[Any] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        received.extend([await receive() for _ in range(3)])

    await drive(app, type=kind)
    assert [message["type"] for message in received] == (
        ["http.request", "http.disconnect", "http.disconnect"]
        if kind == "http"
        else ["websocket.connect", "websocket.disconnect", "websocket.disconnect"]
    )


@pytest.mark.parametrize(
    ("messages", "status"),
    [
        ([{"type": "websocket.accept"}, {"type": "websocket.close", "code": 4000}], 101),
        ([{"type": "websocket.close", "code": 1013}], 1013),
        ([{"type": "websocket.close"}], 1000),
        ([{"type": "websocket.http.response.start", "status": 429, "headers": []}], 429),
    ],
)
async def test_drive_tells_how_a_websocket_began(messages: list[Any], status: int) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for message in messages:
            await send(message)

    answer = await drive(app, type="websocket")
    assert (answer.status, answer.messages) == (status, messages)


async def test_drive_lets_an_error_through() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise LookupError

    with pytest.raises(LookupError):
        await drive(app)


# disabled


def test_disabled_lets_everything_through_and_counts_nothing() -> None:
    registry = CollectorRegistry()
    app = Seawall(hello, default="1/minute", registry=registry)
    assert statuses(app, 2) == [200, 429]
    before = outcomes(registry)
    with disabled():
        assert statuses(app, 3) == [200] * 3
        assert statuses(app, 1, {"path": "/\n"}) == [200]
    assert outcomes(registry) == before
    assert call(app).status == 429


def test_disabled_nests_and_ends_with_an_error() -> None:
    app = Seawall(hello, default="1/minute")
    call(app)

    def nested() -> None:
        with disabled():
            with disabled():
                assert call(app).status == 200
            assert call(app).status == 200
            raise LookupError

    with pytest.raises(LookupError):
        nested()
    assert call(app).status == 429


def test_a_request_that_began_before_ends_as_usual() -> None:
    registry = CollectorRegistry()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(0)
        await hello(scope, receive, send)

    shell = Seawall(app, config=plan(concurrency=1), registry=registry)
    running = drive(shell)
    running.send(None)
    with disabled(), pytest.raises(StopIteration):
        running.send(None)
    assert outcomes(registry) == {"allowed": 1}
    assert shell.statistics()["concurrency"]["in_flight"] == 0


# reset


def test_reset_forgets_what_callers_have_used() -> None:
    clock = ManualClock()
    apps = [Seawall(hello, config=plan(rate="1/minute", quota="1/day"), clock=clock) for _ in range(2)]
    for _ in range(2):
        assert [statuses(app, 2) for app in apps] == [[200, 429]] * 2
        reset()


def test_reset_forgets_what_a_given_backend_holds() -> None:
    app = Seawall(hello, default="1/minute", backend=MemoryBackend())
    assert statuses(app, 2) == [200, 429]
    reset()
    assert statuses(app, 2) == [200, 429]


def test_reset_forgets_what_was_counted() -> None:
    registry = CollectorRegistry()
    app, other = Seawall(hello, default="1/minute", registry=registry), Seawall(hello, default="1/minute")
    statuses(app, 2)
    call(other)
    reset()
    assert (outcomes(registry), outcomes(REGISTRY)) == ({}, {})
    statuses(app, 2)
    assert outcomes(registry) == {"allowed": 1, "limited": 1}


def test_reset_forgets_what_was_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    app = Seawall(hello, default="9/minute")
    for _ in range(2):
        for _ in range(2):
            call(app, headers={"X-Forwarded-For": "203.0.113.1"})
        reset()
    assert len(caplog.records) == 2


def test_reset_keeps_stacks_as_they_were() -> None:
    settings = plan(rate="5/minute", quota="2/day")
    registry = CollectorRegistry()
    app = Seawall(QuotaMiddleware(hello, config=settings, registry=registry), config=settings, registry=registry)
    for _ in range(2):
        assert statuses(app, 3) == [200, 200, 429]
        assert outcomes(registry) == {"allowed": 2, "limited": 1}
        reset()


def test_reset_in_the_middle_of_a_request_breaks_nothing() -> None:
    registry = CollectorRegistry()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        reset()
        await hello(scope, receive, send)

    shell = Seawall(app, config=plan(rate="5/minute", concurrency=1), registry=registry)
    assert statuses(shell, 3) == [200] * 3
    assert shell.statistics()["concurrency"] == {"callers": 0, "in_flight": 0}
    reset()
    from harness import in_flight

    assert in_flight(registry) == 0


def test_the_module_exports_what_it_documents() -> None:
    assert seawall.testing.__all__ == ["Answer", "ManualClock", "disabled", "drive", "reset"]
