"""Overload from outside: what a caller is answered, what is counted, and what is given back, through the whole stack.

Most of it needs no event loop: a request is held by stepping its coroutine by hand, and without a loop nobody waits, so
the next one is refused. What waits is tested on a loop whose time stands.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Coroutine, Generator, Mapping, Sequence
from contextlib import suppress
from types import coroutine
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from harness import (
    answering,
    at_once,
    call,
    config,
    hello,
    in_flight,
    limit_headers,
    metric,
    outcomes,
    problem,
    seeded,
    statuses,
)
from seawall import (
    ConfigError,
    LoadSheddingMiddleware,
    PriorityAdmissionMiddleware,
    QuotaMiddleware,
    RateLimitMiddleware,
    Seawall,
)
from seawall.asgi import Middleware
from seawall.backends import Charge, Meter, Verdict
from seawall.backends.memory import MemoryBackend
from seawall.overload.limiter import Limiter
from seawall.rate import Quota, Rate
from seawall.testing import Answer, ManualClock, drive, reset

FEWER = hypothesis_settings().max_examples // 2


@pytest.fixture(autouse=True)
def _fresh() -> None:
    reset()


def fixed(limit: int = 1, **more: Any) -> dict[str, Any]:
    return {"algorithm": "fixed", "limit": {"initial": limit, "min": 1, "max": limit}, **more}


@coroutine
def pause() -> Generator[None, None, None]:
    """Wait for something, once."""
    yield


async def holds(scope: Scope, receive: Receive, send: Send) -> None:
    """An application that takes its time on ``/hold``, and streams on ``/events``."""
    if scope["path"] == "/hold":
        await pause()
    if scope["type"] == "http" and scope["path"] == "/events":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await pause()
        return await send({"type": "http.response.body", "body": b""})
    if scope["type"] == "websocket" and scope["path"] == "/events":
        await receive()
        await send({"type": "websocket.accept"})
        return await pause()
    await hello(scope, receive, send)


class Held:
    """A request that has begun and does not end until it is told to."""

    def __init__(self, app: Any, path: str = "/hold", **changes: Any) -> None:
        self.running: Coroutine[Any, Any, Answer] = drive(app, path, **changes)
        self.running.send(None)

    def end(self) -> Answer:
        return at_once(self.running)


def limiter_of(shell: Any) -> Limiter:
    turnstile = shell.gate.turnstile
    assert turnstile is not None
    limiter: Limiter = turnstile.current
    return limiter


def rests(shell: Any, registry: CollectorRegistry) -> None:
    """Nothing is held any more, and every gauge says so."""
    overload = shell.statistics()["overload"]
    assert (overload["in_flight"], sum(overload["waiting"].values())) == (0, 0)
    assert {group.in_flight for group in limiter_of(shell).groups} == {0}
    assert shell.statistics()["concurrency"] == {"callers": 0, "in_flight": 0}
    assert sum(shell.statistics()["streams"].values()) == 0
    assert in_flight(registry) == 0
    assert metric(registry, "seawall_queued_requests") == {}
    assert metric(registry, "seawall_streams") == {}


class Recording:
    """A backend that counts how often it is asked."""

    name = "recording"

    def __init__(self, clock: ManualClock) -> None:
        self.memory = MemoryBackend(clock=clock, wall_clock=clock.wall_ns)
        self.spends = 0
        self.refunds = 0

    def meter(self, name: str, store: str, rate: Rate | Quota) -> Meter:
        return self.memory.meter(name, store, rate)

    def spend(self, charges: Sequence[Charge]) -> Verdict:
        self.spends += 1
        return self.memory.spend(charges)

    def debit(self, charges: Sequence[Charge]) -> Sequence[int]:
        return self.memory.debit(charges)

    def refund(self, charges: Sequence[Charge], spent_at: int) -> None:
        self.refunds += 1
        self.memory.refund(charges, spent_at)

    def statistics(self) -> dict[str, dict[str, int]]:
        return self.memory.statistics()

    async def aclose(self) -> None:
        await self.memory.aclose()


# The answer to who is shed


@pytest.fixture
def full(clock: ManualClock, registry: CollectorRegistry) -> Seawall:
    """A service that is full."""
    shell = Seawall(holds, config=config(shedding=fixed()), clock=clock, registry=registry)
    shell.held = Held(shell)  # type: ignore[attr-defined]
    return shell


REDUCED = "https://iana.org/assignments/http-problem-types#temporary-reduced-capacity"


def test_who_is_shed_reads_a_problem_that_is_nobody_s_fault(full: Seawall) -> None:
    answer = call(full)
    found = problem(answer)
    after = found.pop("retry_after")
    assert answer.status == 503
    assert found == {
        "type": REDUCED,
        "title": "Temporary Reduced Capacity",
        "status": 503,
        "detail": f"The service is overloaded, and too many wait already. Retry in {after} s.",
        "reason": "queue_full",
    }
    assert answer.headers["retry-after"] == str(after)
    assert answer.headers["cache-control"] == "no-store"
    assert after in (1, 2)


def test_a_refusal_for_overload_tells_nothing_of_limits(clock: ManualClock, registry: CollectorRegistry) -> None:
    """Neither of the caller's, for it is not its doing, nor of the service's."""
    settings = config(plans={"default": {"rate": "9/minute", "quota": "99/day", "concurrency": 9}}, shedding=fixed())
    shell = Seawall(holds, config=settings, clock=clock, registry=registry)
    held = Held(shell)
    answer = call(shell)
    assert limit_headers(answer) == (None, None)
    assert not [name for name in answer.headers if "limit" in name]
    assert held.end().headers["ratelimit-policy"]


def test_a_refusal_is_small(full: Seawall) -> None:
    assert len(call(full).body) <= 500
    assert len(call(full, headers={"Accept": "text/html"}).body) <= 500


def test_head_gets_no_body_and_the_length_of_one(full: Seawall) -> None:
    answer = call(full, method="HEAD")
    assert (answer.status, answer.body) == (503, b"")
    assert int(answer.headers["content-length"]) > 0


def test_people_get_a_page(full: Seawall) -> None:
    answer = call(full, headers={"Accept": "text/html"})
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert b"The service is overloaded" in answer.body
    assert answer.status == 503


def test_grpc_gets_unavailable(full: Seawall) -> None:
    answer = call(full, method="POST", headers={"Content-Type": "application/grpc"})
    assert (answer.status, answer.headers["grpc-status"], answer.body) == (200, "14", b"")
    assert int(answer.headers["grpc-retry-pushback-ms"]) in (1_000, 2_000)


def test_a_websocket_gets_a_real_503_where_the_server_can_send_one(full: Seawall) -> None:
    answer = call(full, type="websocket", extensions={"websocket.http.response": {}})
    assert [message["type"] for message in answer.messages] == [
        "websocket.http.response.start",
        "websocket.http.response.body",
    ]
    assert answer.status == 503
    assert problem(answer)["reason"] == "queue_full"


def test_a_websocket_is_told_to_try_again_later_where_it_cannot(full: Seawall) -> None:
    answer = call(full, type="websocket")
    assert [dict(message) for message in answer.messages] == [
        {"type": "websocket.close", "code": 1013, "reason": "queue_full"}
    ]


@pytest.mark.parametrize("status", [503, 529, 500, 429])
def test_the_status_is_the_policy_s_and_the_problem_stays_the_service_s(
    status: int, clock: ManualClock, registry: CollectorRegistry
) -> None:
    shell = Seawall(holds, config=config(shedding=fixed(status=status)), clock=clock, registry=registry)
    held = Held(shell)
    answer = call(shell)
    assert answer.status == problem(answer)["status"] == status
    assert problem(answer)["type"] == REDUCED
    assert call(shell, method="POST", headers={"Content-Type": "application/grpc"}).headers["grpc-status"] == "14"
    held.end()
    assert outcomes(registry) == {"allowed": 1, "shed": 2}


@pytest.mark.parametrize(("draw", "found"), [(0.0, 1), (0.49, 1), (0.5, 2), (0.999_999, 2)])
def test_the_refused_are_not_all_told_the_same(draw: float, found: int, clock: ManualClock) -> None:
    class Drawn(Middleware):
        parts = frozenset({"shedding"})

    from seawall.config import load_mapping

    shell = Drawn(
        holds,
        load_mapping(config(shedding=fixed())),
        clock=clock,
        random=lambda: draw,
        registry=CollectorRegistry(),
    )
    held = Held(shell)
    assert problem(call(shell))["retry_after"] == found
    held.end()


def test_detail_can_be_left_out(clock: ManualClock, registry: CollectorRegistry) -> None:
    shell = Seawall(holds, config=config(shedding=fixed(), responses={"detail": False}), clock=clock, registry=registry)
    held = Held(shell)
    assert set(problem(call(shell))) == {"type", "title", "status", "reason", "retry_after"}
    held.end()


def test_on_reject_answers_instead(clock: ManualClock, registry: CollectorRegistry) -> None:
    found: list[Any] = []

    def on_reject(scope: Scope, refusal: Any) -> ASGIApp:
        found.append(
            (refusal.status, refusal.reason, refusal.policies, refusal.retry_after in (1, 2), refusal.priority)
        )
        return answering(418)

    shell = Seawall(holds, config=config(shedding=fixed()), on_reject=on_reject, clock=clock, registry=registry)
    held = Held(shell)
    assert call(shell).status == 418
    assert found == [(503, "queue_full", (), True, "normal")]
    held.end()
    assert outcomes(registry) == {"allowed": 1, "shed": 1}


def test_a_preflight_is_never_shed(full: Seawall) -> None:
    headers = {"Origin": "https://example.com", "Access-Control-Request-Method": "POST"}
    assert call(full, method="OPTIONS", headers=headers).status == 200


def test_what_is_exempt_is_never_shed(clock: ManualClock, registry: CollectorRegistry) -> None:
    settings = config(
        shedding=fixed(),
        routes=[{"name": "probes", "match": {"path": "/healthz"}, "exempt": True}],
        access={"exempt": ["192.0.2.8"]},
        metrics={"path": "/metrics", "allow": ["192.0.2.1"]},
    )
    shell = Seawall(holds, config=settings, clock=clock, registry=registry)
    held = Held(shell)
    assert call(shell, "/healthz").status == 200
    assert call(shell, client=("192.0.2.8", 1)).status == 200
    assert call(shell, "/metrics").status == 200
    assert call(shell).status == 503
    held.end()
    assert outcomes(registry) == {"allowed": 1, "exempt": 3, "shed": 1}


# Deadlines


@pytest.mark.parametrize(
    "headers",
    [
        {"X-Request-Timeout-Ms": "0"},
        {"grpc-timeout": "0m"},
        {"X-Request-Timeout-Ms": "500", "X-Request-Start": "t=1772625599.400"},
    ],
)
def test_what_has_expired_is_refused_before_it_costs_anything(
    headers: dict[str, str], clock: ManualClock, registry: CollectorRegistry
) -> None:
    backend = Recording(clock)
    settings = config(plans={"default": {"rate": "2/minute", "concurrency": 1}})
    shell = Seawall(holds, config=settings, backend=backend, clock=clock, registry=registry)
    answer = call(shell, headers=headers)
    assert answer.status == 504
    assert problem(answer) == {
        "type": "about:blank",
        "title": "Gateway Timeout",
        "status": 504,
        "detail": "The request's deadline has passed.",
        "reason": "expired",
    }
    assert "retry-after" not in answer.headers
    assert limit_headers(answer) == (None, None)
    assert backend.spends == 0
    assert outcomes(registry) == {"expired": 1}
    assert metric(registry, "seawall_rejections_total") == {("expired", "", "default", "normal"): 1}
    rests(shell, registry)
    assert statuses(shell, 3) == [200, 200, 429]


def test_grpc_is_told_that_its_deadline_is_exceeded(clock: ManualClock, registry: CollectorRegistry) -> None:
    shell = Seawall(holds, config=config(), clock=clock, registry=registry)
    answer = call(shell, method="POST", headers={"Content-Type": "application/grpc", "grpc-timeout": "0S"})
    assert (answer.status, answer.headers["grpc-status"]) == (200, "4")
    assert "grpc-retry-pushback-ms" not in answer.headers


def test_a_deadline_in_the_future_changes_nothing(clock: ManualClock, registry: CollectorRegistry) -> None:
    shell = Seawall(holds, config=config(), clock=clock, registry=registry)
    assert call(shell, headers={"X-Request-Timeout-Ms": "1"}).status == 200


def test_without_a_limiter_deadlines_still_hold(clock: ManualClock, registry: CollectorRegistry) -> None:
    shell = Seawall(holds, config=config(shedding={"algorithm": "off"}), clock=clock, registry=registry)
    assert shell.statistics()["overload"] == {}
    assert call(shell, headers={"X-Request-Timeout-Ms": "0"}).status == 504
    assert call(shell).status == 200
    assert {name for (name,) in metric(registry, "seawall_concurrency_limit")} == set()


async def test_who_expired_while_it_was_identified_is_not_served(
    clock: ManualClock, registry: CollectorRegistry
) -> None:
    async def identify(scope: Scope) -> str:
        clock.advance(0.05)
        return "acme"

    shell = Seawall(hello, config=config(shedding=fixed()), identify=identify, clock=clock, registry=registry)
    assert (await drive(shell, headers={"X-Request-Timeout-Ms": "20"})).status == 504


async def test_who_expired_while_the_backend_was_asked_is_not_served(
    clock: ManualClock, registry: CollectorRegistry
) -> None:
    class Slow(Recording):
        async def spend(self, charges: Sequence[Charge]) -> Verdict:  # type: ignore[override]
            clock.advance(0.05)
            return super().spend(charges)

    settings = config(plans={"default": {"rate": "2/minute"}}, shedding=fixed())
    shell = Seawall(hello, config=settings, backend=Slow(clock), clock=clock, registry=registry)
    assert (await drive(shell, headers={"X-Request-Timeout-Ms": "20"})).status == 504


# What is spent, and what comes back


def test_who_is_shed_after_it_has_paid_gets_everything_back(clock: ManualClock, registry: CollectorRegistry) -> None:
    settings = config(
        plans={"default": {"rate": "3/minute", "quota": "3/day", "concurrency": 2}},
        routes=[{"name": "all", "match": {"path": "/**"}, "limits": {"own": {"rate": "3/minute", "per": "global"}}}],
        shedding=fixed(),
    )
    shell = Seawall(holds, config=settings, clock=clock, registry=registry)
    held = Held(shell)
    assert statuses(shell, 7) == [503] * 7
    held.end()
    assert statuses(shell, 3) == [200, 200, 429]
    rests(shell, registry)
    assert outcomes(registry) == {"allowed": 3, "shed": 7, "limited": 1}


async def test_who_must_be_shed_is_shed_before_the_backend_is_asked(
    clock: ManualClock, registry: CollectorRegistry
) -> None:
    """The queue is full: it could only be refused, and its tokens given back."""
    backend, end = Recording(clock), asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await end.wait()
        await hello(scope, receive, send)

    settings = config(plans={"default": {"rate": "1000/minute"}}, shedding=fixed())
    shell = Seawall(app, config=settings, backend=backend, clock=clock, registry=registry)
    tasks = [asyncio.create_task(drive(shell)) for _ in range(300)]
    await asyncio.sleep(0)
    waiting = sum(not task.done() for task in tasks)
    refused = sum(task.done() and task.result().status == 503 for task in tasks)
    assert waiting + refused == 300
    assert backend.spends == waiting
    assert backend.refunds == 0
    end.set()
    assert {answer.status for answer in await asyncio.gather(*tasks)} == {200, 503}
    rests(shell, registry)


async def test_tokens_of_who_was_shed_in_the_queue_are_given_back(
    clock: ManualClock, registry: CollectorRegistry
) -> None:
    end = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/hold":
            await end.wait()
        await hello(scope, receive, send)

    settings = config(
        plans={"default": {"rate": "3/hour"}}, shedding=fixed(), priorities={"all": {"queue": {"timeout": "20ms"}}}
    )
    shell = Seawall(app, config=settings, clock=clock, registry=registry)
    held = asyncio.create_task(drive(shell, "/hold"))
    await asyncio.sleep(0)
    waiting = [asyncio.create_task(drive(shell)) for _ in range(2)]
    await asyncio.sleep(0)
    clock.advance(0.021)
    answers = await asyncio.gather(*waiting)  # refused by the next beat
    assert [(answer.status, problem(answer)["reason"]) for answer in answers] == [(503, "queue_timeout")] * 2
    end.set()
    await held
    assert [(await drive(shell)).status for _ in range(3)] == [200, 200, 429]
    assert metric(registry, "seawall_rejections_total") == {
        ("queue_timeout", "", "default", "all"): 2,
        ("rate", "rate", "default", "all"): 1,
    }
    assert metric(registry, "seawall_queue_wait_seconds_count") == {("all", "queue_timeout"): 2}
    rests(shell, registry)


async def test_who_expires_in_the_queue_is_told_504(clock: ManualClock, registry: CollectorRegistry) -> None:
    end = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await end.wait()
        await hello(scope, receive, send)

    settings = config(
        plans={"default": {"rate": "2/hour"}}, shedding=fixed(), priorities={"all": {"queue": {"timeout": "1m"}}}
    )
    shell = Seawall(app, config=settings, clock=clock, registry=registry)
    held = asyncio.create_task(drive(shell))
    await asyncio.sleep(0)
    waiting = asyncio.create_task(drive(shell, headers={"X-Request-Timeout-Ms": "20"}))
    await asyncio.sleep(0)
    clock.advance(0.02)
    answer = await waiting
    assert (answer.status, problem(answer)["reason"]) == (504, "expired")
    end.set()
    await held
    assert (await drive(shell)).status == 200  # its token came back
    assert outcomes(registry) == {"allowed": 2, "expired": 1}
    assert metric(registry, "seawall_queue_wait_seconds_count") == {("all", "expired"): 1}
    rests(shell, registry)


async def test_how_long_was_waited_is_measured_by_priority_and_result(
    clock: ManualClock, registry: CollectorRegistry
) -> None:
    end = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/hold":
            await end.wait()
        await hello(scope, receive, send)

    settings = config(
        shedding=fixed(),
        priorities={name: {"queue": {"timeout": "1m"}} for name in ("high", "normal")},
        routes=[{"name": "vip", "match": {"path": "/vip"}, "priority": "high"}],
    )
    shell = Seawall(app, config=settings, clock=clock, registry=registry)
    held = asyncio.create_task(drive(shell, "/hold"))
    await asyncio.sleep(0)
    waiting = [asyncio.create_task(drive(shell, path)) for path in ("/", "/vip")]
    await asyncio.sleep(0)
    assert metric(registry, "seawall_queued_requests") == {("high",): 1, ("normal",): 1}
    assert metric(registry, "seawall_inflight_requests") == {("normal",): 1}
    clock.advance(0.03)
    end.set()
    assert [answer.status for answer in await asyncio.gather(held, *waiting)] == [200] * 3
    counts = metric(registry, "seawall_queue_wait_seconds_count")
    assert counts == {("high", "admitted"): 1, ("normal", "admitted"): 1}
    sums = metric(registry, "seawall_queue_wait_seconds_sum")
    assert sums == {labels: pytest.approx(0.03) for labels in counts}
    buckets = metric(registry, "seawall_queue_wait_seconds_bucket")
    assert buckets["high", "admitted", "0.05"] == 1
    assert ("high", "admitted", "0.025") not in buckets
    rests(shell, registry)


# An error of the shedder's own


def failing(*args: Any, **kwargs: Any) -> Any:
    raise LookupError("a bug in the limiter")


@pytest.mark.parametrize("method", ["screen", "enter"])
def test_an_error_of_the_shedder_admits(
    method: str,
    clock: ManualClock,
    registry: CollectorRegistry,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A mistake of ours must not become the callers' outage. It is said once, with the place."""
    shell = Seawall(holds, config=config(shedding=fixed()), clock=clock, registry=registry)
    with monkeypatch.context() as broken:
        broken.setattr(Limiter, method, failing)
        assert statuses(shell, 3) == [200] * 3
    (said,) = [record for record in caplog.records if record.exc_info]
    assert isinstance(said.exc_info, tuple)
    assert said.exc_info[0] is LookupError
    held = Held(shell)
    assert call(shell).status == 503
    held.end()
    rests(shell, registry)
    assert outcomes(registry) == {"allowed": 4, "shed": 1}


@pytest.mark.parametrize("method", ["release", "announce"])
def test_an_error_of_the_shedder_is_no_error_of_the_service(
    method: str, clock: ManualClock, registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it is too late to admit, or the permit is lost."""
    shell = Seawall(holds, config=config(shedding=fixed(2)), clock=clock, registry=registry)
    held = [Held(shell) for _ in range(2 if method == "announce" else 1)]
    with monkeypatch.context() as broken:
        broken.setattr(Limiter, method, failing)
        assert call(shell).status in ((200, 503) if method == "announce" else (200,))
    for request in held:
        assert request.end().status == 200
    assert call(shell).status == 200


async def test_an_error_of_a_beat_does_not_stop_the_heart(
    clock: ManualClock, registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    end = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await end.wait()
        await hello(scope, receive, send)

    failed = asyncio.Event()
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: failed.set())
    settings = config(shedding=fixed(), priorities={"all": {"queue": {"timeout": "20ms"}}})
    shell = Seawall(app, config=settings, clock=clock, registry=registry)
    held = asyncio.create_task(drive(shell))
    await asyncio.sleep(0)
    with monkeypatch.context() as broken:
        broken.setattr(Limiter, "_sweep", failing)
        waiting = asyncio.create_task(drive(shell))
        await failed.wait()
    clock.advance(1)
    try:
        assert (await asyncio.wait_for(waiting, 0.2)).status == 503
    finally:
        end.set()
        await held


async def test_a_slow_identify_is_no_lag(clock: ManualClock, registry: CollectorRegistry) -> None:
    """Nor does it use up the pass: whoever is alone never waits."""

    async def identify(scope: Scope) -> str:
        for _ in range(3):
            await asyncio.sleep(0)
        clock.advance(0.05)  # while the loop had nothing to do
        return "acme"

    shell = Seawall(hello, config=config(), identify=identify, clock=clock, registry=registry)
    for _ in range(5):
        assert (await drive(shell)).status == 200
    assert metric(registry, "seawall_queue_wait_seconds_count") == {}


# Priority


PRIORITIES = config(
    identity={"tenant": [{"state": "tenant"}]},
    plans={"default": {"rate": "unlimited"}, "cheap": {"rate": "unlimited", "priority": "low"}},
    defaults={"plan": "default"},
    tenants={"vip": {"plan": "cheap", "priority": "critical"}, "poor": {"plan": "cheap"}, "plain": {}},
    routes=[{"name": "report", "match": {"path": "/report"}, "priority": "background"}],
    priorities={name: {"queue": {"timeout": "1m"}} for name in ("critical", "normal", "low", "background")},
    priority_header={"name": "X-Class", "raise_from": ["10.2.0.0/16"]},
    shedding=fixed(),
)


def priority_of(app: Any, registry: CollectorRegistry, path: str = "/", **changes: Any) -> str:
    """The class that a request is counted under."""
    before = metric(registry, "seawall_requests_total")
    call(app, path, **changes)
    after = metric(registry, "seawall_requests_total")
    ((_, found),) = [labels for labels in after if after[labels] != before.get(labels, 0)]
    return found


@pytest.mark.parametrize(
    ("tenant", "path", "header", "found"),
    [
        ("vip", "/", None, "critical"),
        ("vip", "/report", None, "critical"),  # the tenant's own wins over the route's
        ("poor", "/report", None, "background"),  # the route's over the plan's
        ("poor", "/", None, "low"),
        ("plain", "/", None, "normal"),
        ("vip", "/", "low", "low"),
        ("vip", "/", "LOW", "low"),
        ("plain", "/", "critical", "normal"),  # it may only lower
        ("poor", "/", "normal", "low"),
        ("plain", "/", "BULK", "background"),  # the words of others
        ("plain", "/", "nonsense", "normal"),
    ],
)
def test_a_priority_is_the_tenant_s_then_the_route_s_then_the_plan_s_and_a_header_lowers_it(
    tenant: str, path: str, header: str | None, found: str, clock: ManualClock, registry: CollectorRegistry
) -> None:
    shell = Seawall(hello, config=PRIORITIES, clock=clock, registry=registry)
    headers = {} if header is None else {"X-Class": header}
    assert priority_of(shell, registry, path, state={"tenant": tenant}, headers=headers) == found


@pytest.mark.parametrize(
    ("peer", "more", "found"),
    [
        ("10.2.3.4", {}, "critical"),
        ("10.3.0.1", {}, "normal"),
        ("192.0.2.1", {}, "normal"),
        ("10.2.3.4", {"X-Forwarded-For": "192.0.2.9"}, "normal"),
        ("10.2.3.4", {"Forwarded": "for=192.0.2.9"}, "normal"),
        ("192.0.2.1", {"X-Forwarded-For": "10.2.3.4"}, "normal"),
    ],
)
def test_only_the_peers_that_the_policy_names_may_raise_a_priority(
    peer: str, more: dict[str, str], found: str, clock: ManualClock, registry: CollectorRegistry
) -> None:
    shell = Seawall(hello, config=PRIORITIES, clock=clock, registry=registry)
    changes: dict[str, Any] = {"client": (peer, 1), "state": {"tenant": "plain"}}
    assert priority_of(shell, registry, headers={"X-Class": "critical", **more}, **changes) == found
    assert priority_of(shell, registry, headers={"baggage": "criticality=critical", **more}, **changes) == "normal"


async def served(shell: Any, order: list[str], end: asyncio.Event, *requests: tuple[str, dict[str, Any]]) -> None:
    """Hold the one place, let these wait in this order, and let everything be served."""
    held = asyncio.create_task(drive(shell, "/hold", state={"tenant": "plain"}))
    await asyncio.sleep(0)
    tasks = []
    for path, changes in requests:
        tasks.append(asyncio.create_task(drive(shell, path, **changes)))
        await asyncio.sleep(0)
    end.set()
    assert {answer.status for answer in await asyncio.gather(held, *tasks)} == {200}
    assert order.pop(0) == "/hold"


async def test_who_matters_more_is_served_first(clock: ManualClock, registry: CollectorRegistry) -> None:
    order: list[str] = []
    end = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        order.append(scope["path"])
        if scope["path"] == "/hold":
            await end.wait()
        await hello(scope, receive, send)

    shell = Seawall(app, config=PRIORITIES, clock=clock, registry=registry)
    await served(
        shell,
        order,
        end,
        ("/report", {"state": {"tenant": "plain"}}),
        ("/lowered", {"state": {"tenant": "vip"}, "headers": {"X-Class": "low"}}),
        ("/plain", {"state": {"tenant": "plain"}}),
        # Of the same class as the one before, and its tenant has had less.
        ("/claims", {"state": {"tenant": "poor"}, "headers": {"X-Class": "critical"}}),
        ("/vip", {"state": {"tenant": "vip"}}),
    )
    assert order == ["/vip", "/plain", "/claims", "/lowered", "/report"]
    rests(shell, registry)


async def test_a_tenant_that_sends_much_does_not_delay_one_that_sends_little(
    clock: ManualClock, registry: CollectorRegistry
) -> None:
    order: list[str] = []
    end = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        order.append(scope["path"])
        if scope["path"] == "/hold":
            await end.wait()
        await hello(scope, receive, send)

    shell = Seawall(app, config=PRIORITIES, clock=clock, registry=registry)
    many = [(f"/many{number}", {"state": {"tenant": "many"}}) for number in range(5)]
    await served(shell, order, end, *many, ("/few", {"state": {"tenant": "few"}}))
    assert order.index("/few") <= 1


# Nonsense in headers

HINTS = (
    "grpc-timeout",
    "x-envoy-expected-rq-timeout-ms",
    "x-request-timeout-ms",
    "x-request-start",
    "baggage",
    "x-class",
)


@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("grpc-timeout", "soon"),
        ("x-request-timeout-ms", "-1"),
        ("x-envoy-expected-rq-timeout-ms", "1e3"),
        ("x-class", "the most important"),
        ("baggage", "criticality=very"),
    ],
)
def test_nonsense_is_ignored_and_counted(
    header: str, value: str, clock: ManualClock, registry: CollectorRegistry
) -> None:
    shell = Seawall(hello, config=PRIORITIES, clock=clock, registry=registry)
    assert [call(shell, headers={header: value}).status for _ in range(3)] == [200] * 3
    assert metric(registry, "seawall_ignored_headers_total") == {(header,): 3}
    assert outcomes(registry) == {"allowed": 3}


VALUES = st.one_of(
    st.binary(max_size=40),
    st.text(alphabet="0123456789.-+ tmSHun=,;%", max_size=24).map(str.encode),
    st.sampled_from([b"", b"critical", b"low", b"\xff", b"criticality=low", b"criticality=%ff,criticality=low"]),
    st.binary(min_size=2_000, max_size=9_000),
)


@hypothesis_settings(max_examples=FEWER)
@given(st.lists(st.tuples(st.sampled_from(HINTS), VALUES), max_size=6), st.sampled_from(["10.2.0.1", "192.0.2.1"]))
def test_no_header_is_ever_an_error(headers: list[tuple[str, bytes]], peer: str) -> None:
    registry = CollectorRegistry()
    shell = Seawall(hello, config=PRIORITIES, clock=ManualClock(), registry=registry)
    raw = [(name.encode(), value) for name, value in headers]
    answer = call(shell, headers=raw, client=(peer, 1))
    assert answer.status in (200, 504)
    assert sum(outcomes(registry).values()) == 1
    ignored = metric(registry, "seawall_ignored_headers_total")
    assert set(ignored.values()) <= {1}
    assert {name for (name,) in ignored} <= {name for name, _ in headers}
    rests(shell, registry)


def test_headers_are_not_read_where_nothing_depends_on_them(clock: ManualClock, registry: CollectorRegistry) -> None:
    shell = RateLimitMiddleware(hello, limit="9/minute", clock=clock, registry=registry)
    assert call(shell, headers={"X-Request-Timeout-Ms": "0", "X-Request-Priority": "nonsense"}).status == 200
    assert metric(registry, "seawall_ignored_headers_total") == {}


# Every request is counted once


@hypothesis_settings(max_examples=FEWER)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["hold", "call", "expired", "end", "stream", "websocket", "nonsense"]),
            st.sampled_from([None, "vip", "poor", "off", "shy"]),
        ),
        max_size=40,
    ),
    st.sampled_from(["enforce", "shadow"]),
)
def test_every_request_is_counted_exactly_once(steps: list[tuple[str, str | None]], mode: str) -> None:
    registry, clock = CollectorRegistry(), ManualClock()
    settings = config(
        mode=mode,
        identity={"tenant": [{"state": "tenant"}]},
        plans={
            "default": {"rate": "9/minute", "concurrency": 2},
            "off": {"mode": "off"},
            "cheap": {"rate": "5/second", "priority": "low"},
        },
        defaults={"plan": "default"},
        tenants={
            "vip": {"plan": "cheap", "priority": "critical"},
            "poor": {"plan": "cheap"},
            "off": {"plan": "off"},
            "shy": {"plan": "default", "mode": "shadow"},
        },
        routes=[{"name": "events", "match": {"path": "/events"}, "streaming": {"max": 2, "max_per_tenant": 1}}],
        shedding=fixed(2),
    )
    shell = Seawall(holds, config=settings, clock=clock, registry=registry)
    held: list[Coroutine[Any, Any, Answer]] = []
    answers: list[Answer] = []

    def begin(path: str, **changes: Any) -> None:
        running = drive(shell, path, **changes)
        try:
            running.send(None)
        except StopIteration as stop:
            answers.append(stop.value)
        else:
            held.append(running)

    for step, tenant in steps:
        changes: dict[str, Any] = {"state": {"tenant": tenant}}
        clock.advance(0.05)
        match step:
            case "hold":
                begin("/hold", **changes)
            case "stream":
                begin("/events", **changes)
            case "websocket":
                begin("/events", type="websocket", **changes)
            case "expired":
                begin("/", headers={"X-Request-Timeout-Ms": "0"}, **changes)
            case "nonsense":
                begin("/", headers={"grpc-timeout": "?"}, **changes)
            case "end" if held:
                answers.append(at_once(held.pop(0)))
            case _:
                begin("/", **changes)
    answers += map(at_once, held)
    reasons = Counter(reason for answer in answers if (reason := refused(answer)))
    assert mode == "enforce" or not reasons
    rejected: Counter[str] = Counter()
    for (reason, *_), count in metric(registry, "seawall_rejections_total").items():
        rejected[reason] += int(count)
    assert rejected == reasons
    found = Counter(outcomes(registry))
    assert found.total() == len(answers)
    assert found["allowed"] + found["exempt"] == len(answers) - reasons.total()
    assert found["shed"] == reasons["overload"] + reasons["queue_full"]
    assert found["limited"] == reasons["rate"] + reasons["concurrency"]
    assert found["expired"] == reasons["expired"]
    rests(shell, registry)


def refused(answer: Answer) -> str:
    """Why, if it was."""
    if answer.status in (200, 101):
        return ""
    return str(answer.messages[0]["reason"] if answer.status == 1013 else problem(answer)["reason"])


def test_the_policy_of_a_rejection_is_named_where_one_is_to_blame(
    clock: ManualClock, registry: CollectorRegistry
) -> None:
    settings = config(
        shedding=fixed(), routes=[{"name": "events", "match": {"path": "/events"}, "streaming": {"max": 1}}]
    )
    shell = Seawall(holds, config=settings, clock=clock, registry=registry)
    stream, held = Held(shell, "/events"), Held(shell)
    assert call(shell).status == 503
    assert call(shell, "/events").status == 503
    stream.end()
    held.end()
    assert metric(registry, "seawall_rejections_total") == {
        ("queue_full", "", "default", "normal"): 1,
        ("overload", "streams", "default", "normal"): 1,
    }


def test_a_rejection_is_counted_under_its_own_reason(clock: ManualClock, registry: CollectorRegistry) -> None:
    shell = streaming(clock, registry, max=2, max_per_tenant=1)
    streams = [Held(shell, "/events", state={"tenant": "a"})]
    assert call(shell, "/events", state={"tenant": "a"}).status == 429
    streams.append(Held(shell, "/events", state={"tenant": "b"}))
    assert call(shell, "/events", state={"tenant": "a"}).status == 503
    for stream in streams:
        stream.end()
    assert metric(registry, "seawall_rejections_total") == {
        ("concurrency", "streams", "default", "normal"): 1,
        ("overload", "streams", "default", "normal"): 1,
    }


# Streams


def streaming(clock: ManualClock, registry: CollectorRegistry, limit: int = 1, **budget: int) -> Seawall:
    settings = config(
        identity={"tenant": [{"state": "tenant"}]},
        defaults={"plan": "default"},
        routes=[{"name": "events", "match": {"path": "/events"}, "streaming": budget}],
        shedding=fixed(limit),
    )
    return Seawall(holds, config=settings, clock=clock, registry=registry)


@pytest.mark.parametrize("kind", ["http", "websocket"])
def test_a_stream_gives_its_permit_back_as_it_begins(
    kind: str, clock: ManualClock, registry: CollectorRegistry
) -> None:
    shell = streaming(clock, registry, max=5)
    streams = [Held(shell, "/events", type=kind) for _ in range(3)]
    assert shell.statistics()["overload"]["in_flight"] == 0
    assert metric(registry, "seawall_streams") == {("events",): 3}
    assert in_flight(registry) == 3
    assert call(shell).status == 200
    for stream in streams:
        stream.end()
    rests(shell, registry)
    assert outcomes(registry) == {"allowed": 4}
    assert limiter_of(shell).groups[1].samples == 0


def test_a_stream_that_has_not_begun_holds_a_permit(clock: ManualClock, registry: CollectorRegistry) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await pause()
        await holds(scope, receive, send)

    settings = config(
        routes=[{"name": "events", "match": {"path": "/events"}, "streaming": {"max": 5}}], shedding=fixed()
    )
    shell = Seawall(app, config=settings, clock=clock, registry=registry)
    stream = Held(shell, "/events")
    assert shell.statistics()["overload"]["in_flight"] == 1
    stream.running.send(None)
    assert shell.statistics()["overload"]["in_flight"] == 0
    stream.end()
    rests(shell, registry)


def test_an_answer_in_chunks_elsewhere_holds_its_permit_to_the_end(
    clock: ManualClock, registry: CollectorRegistry
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"a", "more_body": True})
        await pause()
        await send({"type": "http.response.body", "body": b"b"})

    shell = Seawall(app, config=config(shedding=fixed()), clock=clock, registry=registry)
    held = Held(shell)
    assert call(shell).status == 503
    held.end()
    rests(shell, registry)


def test_a_websocket_gives_its_permit_back_when_it_is_accepted(clock: ManualClock, registry: CollectorRegistry) -> None:
    """Also where no rule says so: it lasts as long as somebody listens."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await pause()
        await send({"type": "websocket.accept"})
        await pause()

    shell = Seawall(app, config=config(shedding=fixed()), clock=clock, registry=registry)
    chat = Held(shell, "/chat", type="websocket")
    assert shell.statistics()["overload"]["in_flight"] == 1
    assert call(shell, "/chat", type="websocket").status == 1013
    chat.running.send(None)
    assert shell.statistics()["overload"]["in_flight"] == 0
    chat.end()
    rests(shell, registry)
    assert limiter_of(shell).groups[0].samples == 0


def test_the_budget_of_streams_is_the_service_s(clock: ManualClock, registry: CollectorRegistry) -> None:
    shell = streaming(clock, registry, max=2)
    streams = [Held(shell, "/events", state={"tenant": name}) for name in "ab"]
    answer = call(shell, "/events", state={"tenant": "c"})
    found = problem(answer)
    assert found.pop("retry_after") in (1, 2)
    assert found == {
        "type": REDUCED,
        "title": "Temporary Reduced Capacity",
        "status": 503,
        "detail": f"All streams that this endpoint may have are taken (policy 'streams'). "
        f"Retry in {answer.headers['retry-after']} s.",
        "violated-policies": ["streams"],
        "reason": "overload",
    }
    assert "ratelimit" not in answer.headers
    streams.pop().end()
    streams.append(Held(shell, "/events", state={"tenant": "c"}))
    for stream in streams:
        stream.end()
    rests(shell, registry)


def test_how_many_streams_one_caller_has_is_its_own_doing(clock: ManualClock, registry: CollectorRegistry) -> None:
    shell = streaming(clock, registry, max=9, max_per_tenant=2)
    streams = [Held(shell, "/events", state={"tenant": "a"}) for _ in range(2)]
    answer = call(shell, "/events", state={"tenant": "a"})
    assert answer.status == 429
    assert (problem(answer)["reason"], problem(answer)["violated-policies"]) == ("concurrency", ["streams"])
    assert answer.headers["ratelimit"].startswith('"streams";r=0')
    assert '"streams";q=2;qu="concurrent-requests"' in answer.headers["ratelimit-policy"]
    streams.append(Held(shell, "/events", state={"tenant": "b"}))
    for stream in streams:
        stream.end()
    rests(shell, registry)
    assert outcomes(registry) == {"allowed": 3, "limited": 1}


def test_a_stream_that_is_refused_for_something_else_gives_its_place_back(
    clock: ManualClock, registry: CollectorRegistry
) -> None:
    settings = config(
        plans={"default": {"rate": "1/hour"}},
        routes=[{"name": "events", "match": {"path": "/events"}, "streaming": {"max": 5}}],
        shedding=fixed(),
    )
    shell = Seawall(holds, config=settings, clock=clock, registry=registry)
    held = Held(shell)
    assert call(shell, "/events", client=("192.0.2.1", 1)).status == 429
    assert call(shell, "/events", client=("192.0.2.2", 1)).status == 503
    assert shell.statistics()["streams"] == {"events": 0}
    held.end()
    rests(shell, registry)


def test_streams_have_a_budget_where_nothing_else_is_shed(clock: ManualClock, registry: CollectorRegistry) -> None:
    settings = config(
        routes=[{"name": "events", "match": {"path": "/events"}, "streaming": {"max": 1}}],
        shedding={"algorithm": "off"},
    )
    shell = Seawall(holds, config=settings, clock=clock, registry=registry)
    stream = Held(shell, "/events")
    assert call(shell, "/events").status == 503
    stream.end()
    assert call(shell, "/").status == 200


async def test_a_thousand_streams_do_not_lower_the_limit_of_requests(
    clock: ManualClock, registry: CollectorRegistry
) -> None:
    """D8: they hold no permit, and how long they last is in no latency."""
    end = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/events":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await end.wait()
            return await send({"type": "http.response.body", "body": b""})
        await hello(scope, receive, send)

    settings = config(routes=[{"name": "events", "match": {"path": "/events"}, "streaming": {"max": 1_000}}])
    shell = Seawall(app, config=settings, clock=clock, registry=registry)
    before = (await drive(shell)).status, shell.statistics()["overload"]["limit"]
    streams = []
    for _ in range(1_000):
        streams.append(asyncio.create_task(drive(shell, "/events")))
        await asyncio.sleep(0)
    assert shell.statistics()["streams"] == {"events": 1_000}
    assert shell.statistics()["overload"]["in_flight"] == 0
    for _ in range(20):
        clock.advance(0.01)
        assert (await drive(shell)).status == 200
    assert (await drive(shell, "/events")).status == 503
    overload = shell.statistics()["overload"]
    assert overload["limit"] >= before[1]
    assert {group.limit for group in limiter_of(shell).groups} == {1_000}
    clock.advance(3_600)
    end.set()
    await asyncio.gather(*streams)
    assert [group.samples for group in limiter_of(shell).groups][1] == 0
    rests(shell, registry)
    assert outcomes(registry) == {"allowed": 1_021, "shed": 1}


# A permit is held until the handler has returned


def test_who_hangs_up_does_not_free_its_permit_while_the_handler_runs(
    clock: ManualClock, registry: CollectorRegistry
) -> None:
    """D6: open and abort must not run more handlers than the limit."""
    running = most = 0

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        assert (await receive())["type"] == "http.request"
        assert (await receive())["type"] == "http.disconnect"
        await pause()
        running -= 1

    shell = Seawall(app, config=config(shedding=fixed(3)), clock=clock, registry=registry)
    refused = 0
    for _ in range(5):
        held = []
        for _ in range(10):
            request = drive(shell)
            try:
                request.send(None)  # the disconnect
            except StopIteration as stop:
                refused += stop.value.status == 503
            else:
                request.send(None)
                held.append(request)
        assert shell.statistics()["overload"]["in_flight"] == 3
        for request in held:
            at_once(request)
    assert (most, refused) == (3, 35)
    rests(shell, registry)


# A body that comes slowly holds a permit no longer than it may


class Uploaded:
    """A service for one request at a time whose bodies have a tenth of a second, and callers who send them in parts."""

    def __init__(self, clock: ManualClock, registry: CollectorRegistry, reads: ASGIApp | None = None) -> None:
        self.seen: list[str] = []
        self.sent: list[Message] = []
        self.parts: asyncio.Queue[Message] = asyncio.Queue()
        settings = config(shedding=fixed(1, body_timeout="100ms"), priorities={"all": {"queue": {"timeout": "10s"}}})
        self.shell = Seawall(reads or self.app, config=settings, clock=clock, registry=registry)

    async def app(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Frameworks raise where the caller has left; this one notes it and goes on."""
        while True:
            message = await receive()
            self.seen.append(message.get("body", b"").decode() or message["type"])
            if not message.get("more_body", False):
                break
        await hello(scope, receive, send)

    def send_part(self, body: bytes, *, more: bool = True) -> None:
        self.parts.put_nowait({"type": "http.request", "body": body, "more_body": more})

    def begin(self) -> asyncio.Task[None]:
        async def send(message: Message) -> None:
            self.sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/", "headers": [], "client": ("192.0.2.1", 1)}
        return asyncio.create_task(self.shell(scope, self.parts.get, send))

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])


async def test_a_body_that_does_not_come_is_refused_and_its_permit_is_free(
    clock: ManualClock, registry: CollectorRegistry
) -> None:
    """D7. The application is told that its caller has left, which is how it ends."""
    upload = Uploaded(clock, registry)
    upload.send_part(b"a")
    request = upload.begin()
    await asyncio.sleep(0.01)
    assert upload.shell.statistics()["overload"]["in_flight"] == 1
    await asyncio.wait_for(request, 5)
    assert upload.seen == ["a", "http.disconnect"]
    assert upload.status == 408
    assert json.loads(upload.sent[1]["body"]) == {
        "type": "about:blank",
        "title": "Request Timeout",
        "status": 408,
        "detail": "The request's body took too long to arrive.",
        "reason": "expired",
    }
    assert len(upload.sent) == 2  # not the application's own answer as well
    assert outcomes(registry) == {"expired": 1}
    rests(upload.shell, registry)


async def test_an_application_that_raises_as_its_caller_leaves_is_no_error_then(
    clock: ManualClock, registry: CollectorRegistry
) -> None:
    async def reads(scope: Scope, receive: Receive, send: Send) -> None:
        await Request(scope, receive).body()
        await hello(scope, receive, send)

    upload = Uploaded(clock, registry, reads)
    upload.send_part(b"a")
    await asyncio.wait_for(upload.begin(), 5)
    assert upload.status == 408
    rests(upload.shell, registry)


async def test_a_body_in_time_is_whole_and_what_comes_after_it_takes_as_long_as_it_takes(
    clock: ManualClock, registry: CollectorRegistry
) -> None:
    seen: list[str] = []

    async def reads(scope: Scope, receive: Receive, send: Send) -> None:
        for _ in range(3):
            message = await receive()
            seen.append(message.get("body", b"").decode() or message["type"])
        await hello(scope, receive, send)

    upload = Uploaded(clock, registry, reads)
    upload.send_part(b"a")
    upload.send_part(b"b", more=False)
    request = upload.begin()
    await asyncio.sleep(0.15)
    assert not request.done()
    upload.parts.put_nowait({"type": "http.disconnect"})
    await asyncio.wait_for(request, 5)
    assert (seen, upload.status) == (["a", "b", "http.disconnect"], 200)
    assert outcomes(registry) == {"allowed": 1}


async def test_who_has_answered_already_may_read_as_slowly_as_it_likes(
    clock: ManualClock, registry: CollectorRegistry
) -> None:
    """There is no second answer, and what it sends is sent."""

    async def echoes(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while (message := await receive()).get("more_body"):
            await send({"type": "http.response.body", "body": message["body"], "more_body": True})
        await send({"type": "http.response.body", "body": b"."})

    upload = Uploaded(clock, registry, echoes)
    upload.send_part(b"a")
    await asyncio.wait_for(upload.begin(), 5)
    assert b"".join(message.get("body", b"") for message in upload.sent) == b"a."
    assert outcomes(registry) == {"allowed": 1}
    rests(upload.shell, registry)


async def test_a_slow_body_that_waits_for_a_permit_is_answered_in_any_case(
    clock: ManualClock, registry: CollectorRegistry
) -> None:
    end = asyncio.Event()

    async def reads(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/hold":
            await end.wait()
        else:
            await Request(scope, receive).body()
        await hello(scope, receive, send)

    upload = Uploaded(clock, registry, reads)
    held = asyncio.create_task(drive(upload.shell, "/hold"))
    await asyncio.sleep(0)
    upload.send_part(b"a")
    request = upload.begin()
    await asyncio.sleep(0.15)
    end.set()
    await held
    upload.send_part(b"b", more=False)
    await asyncio.wait_for(request, 5)
    assert upload.sent
    assert upload.status in (200, 408)


# Shadow mode, and what is off


def test_shadow_mode_refuses_nobody_and_counts_who_would_have_been(
    clock: ManualClock, registry: CollectorRegistry
) -> None:
    settings = config(
        mode="shadow",
        routes=[{"name": "events", "match": {"path": "/events"}, "streaming": {"max": 1}}],
        shedding=fixed(1),
    )
    shell = Seawall(holds, config=settings, clock=clock, registry=registry)
    streams = [Held(shell, "/events") for _ in range(2)]
    held = [Held(shell) for _ in range(200)]
    assert call(shell, headers={"X-Request-Timeout-Ms": "0"}).status == 200
    found = metric(registry, "seawall_shadow_rejections_total")
    assert 0 < found.pop(("queue_full", "", "default", "normal")) < 202
    assert found == {
        ("overload", "streams", "default", "normal"): 1,
        ("expired", "", "default", "normal"): 1,
    }
    assert {request.end().status for request in [*held, *streams]} == {200}
    assert metric(registry, "seawall_rejections_total") == {}
    assert outcomes(registry) == {"allowed": 203}
    rests(shell, registry)


async def test_in_shadow_mode_nobody_waits(clock: ManualClock, registry: CollectorRegistry) -> None:
    shell = Seawall(holds, config=config(mode="shadow", shedding=fixed(1)), clock=clock, registry=registry)
    tasks = [asyncio.create_task(drive(shell, "/hold")) for _ in range(50)]
    await asyncio.gather(*tasks)
    assert metric(registry, "seawall_queue_wait_seconds_count") == {}
    rests(shell, registry)


def test_a_rule_in_shadow_mode_lets_its_own_requests_in(clock: ManualClock, registry: CollectorRegistry) -> None:
    settings = config(shedding=fixed(1), routes=[{"name": "beta", "match": {"path": "/beta"}, "mode": "shadow"}])
    shell = Seawall(holds, config=settings, clock=clock, registry=registry)
    held = Held(shell)
    assert statuses(shell, 2, "/beta") == [200, 200]
    assert call(shell).status == 503
    held.end()
    rests(shell, registry)


@pytest.mark.parametrize("who", ["plan", "tenant"])
def test_a_tenant_that_is_off_is_shed_like_everybody_and_otherwise_exempt(
    who: str, clock: ManualClock, registry: CollectorRegistry
) -> None:
    """Plans and tenants govern what a caller may have; what the service can do is nobody's privilege."""
    settings = config(
        identity={"tenant": [{"state": "tenant"}]},
        plans={
            "default": {"rate": "1/hour", "concurrency": 1, **({"mode": "off"} if who == "plan" else {})},
        },
        defaults={"plan": "default"},
        tenants={"acme": {"plan": "default", **({"mode": "off"} if who == "tenant" else {})}},
        shedding=fixed(2),
    )
    shell = Seawall(holds, config=settings, clock=clock, registry=registry)
    changes: dict[str, Any] = {"state": {"tenant": "acme"}}
    held = [Held(shell, **changes) for _ in range(2)]
    answer = call(shell, **changes)
    assert (answer.status, limit_headers(answer)) == (503, (None, None))
    assert call(shell, headers={"X-Request-Timeout-Ms": "0"}, **changes).status == 504
    for request in held:
        assert request.end().headers.get("ratelimit-policy") is None
    assert outcomes(registry) == {"exempt": 2, "shed": 1, "expired": 1}
    rests(shell, registry)


def test_a_file_that_is_off_sheds_nobody(clock: ManualClock, registry: CollectorRegistry) -> None:
    shell = Seawall(holds, config=config(mode="off", shedding=fixed(1)), clock=clock, registry=registry)
    held = [Held(shell) for _ in range(3)]
    assert {request.end().status for request in held} == {200}
    assert outcomes(registry) == {"exempt": 3}


def test_a_rule_that_is_off_sheds_nobody(clock: ManualClock, registry: CollectorRegistry) -> None:
    settings = config(shedding=fixed(1), routes=[{"name": "free", "match": {"path": "/hold"}, "mode": "off"}])
    shell = Seawall(holds, config=settings, clock=clock, registry=registry)
    held = [Held(shell) for _ in range(3)]
    assert {request.end().status for request in held} == {200}


# What the limiter learns


def ends_with(status: int = 200, error: BaseException | None = None, *, late: bool = False) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if error is not None and not late:
            raise error
        await send({"type": "http.response.start", "status": status, "headers": []})
        if error is not None:
            raise error
        await send({"type": "http.response.body", "body": b""})

    return app


@pytest.mark.parametrize(
    ("app", "found"),
    [
        (ends_with(200), (1, 0)),
        (ends_with(204), (1, 0)),
        (ends_with(302), (1, 0)),
        (ends_with(400), (0, 0)),
        (ends_with(404), (0, 0)),
        (ends_with(429), (0, 0)),
        (ends_with(500), (0, 0)),
        (ends_with(503), (0, 1)),
        (ends_with(504), (0, 1)),
        (ends_with(error=TimeoutError()), (0, 1)),
        (ends_with(error=ConnectionRefusedError()), (0, 1)),
        (ends_with(error=asyncio.CancelledError()), (0, 0)),
        (ends_with(error=ValueError("a bug")), (0, 0)),
        (ends_with(error=TimeoutError(), late=True), (0, 0)),
    ],
)
def test_the_law_learns_from_what_the_application_did(
    app: ASGIApp, found: tuple[int, int], clock: ManualClock, registry: CollectorRegistry
) -> None:
    """D14: what callers can make of it by themselves (404, leaving) teaches nothing."""
    shell = Seawall(app, config=config(), clock=clock, registry=registry)
    with suppress(Exception, asyncio.CancelledError):
        call(shell)
    (group,) = limiter_of(shell).groups
    assert (group.samples, group.dropped) == found
    rests(shell, registry)


def test_what_was_refused_teaches_nothing(clock: ManualClock, registry: CollectorRegistry) -> None:
    settings = config(plans={"default": {"rate": "2/hour"}}, shedding=fixed())
    shell = Seawall(holds, config=settings, clock=clock, registry=registry)
    held = Held(shell)
    call(shell)
    call(shell, headers={"X-Request-Timeout-Ms": "0"})
    held.end()
    statuses(shell, 3)
    (group,) = limiter_of(shell).groups
    assert (group.samples, group.dropped) == (2, 0)


def test_latency_is_the_application_s_alone(clock: ManualClock, registry: CollectorRegistry) -> None:
    """Without the time in which a backend was asked."""

    class Slow(Recording):
        def spend(self, charges: Sequence[Charge]) -> Verdict:
            clock.advance(0.5)
            return super().spend(charges)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        clock.advance(0.003)
        await hello(scope, receive, send)

    shell = Seawall(
        app,
        config=config(plans={"default": {"rate": "9/minute"}}),
        backend=Slow(clock),
        clock=clock,
        registry=registry,
    )
    call(shell)
    assert limiter_of(shell).groups[0].window().latency == pytest.approx(3_000_000, rel=0.001)


def test_rules_are_told_apart(clock: ManualClock, registry: CollectorRegistry) -> None:
    routes = [{"name": f"r{number}", "match": {"path": f"/{number}"}} for number in range(100)]
    shell = Seawall(hello, config=config(routes=routes), clock=clock, registry=registry)
    for path in ("/none", "/0", "/0", "/1", "/98", "/99"):
        call(shell, path)
    samples = [group.samples for group in limiter_of(shell).groups]
    assert (samples[0], samples[1], samples[2], samples[-1], sum(samples)) == (1, 2, 1, 2, 6)


def test_changes_of_the_limit_are_counted_by_reason(clock: ManualClock, registry: CollectorRegistry) -> None:
    shell = Seawall(hello, config=config(), clock=clock, registry=registry)
    assert limiter_of(shell)._changed is not None
    limiter_of(shell)._changed("lag")
    limiter_of(shell)._changed("lag")
    assert metric(registry, "seawall_concurrency_limit_changes_total") == {("lag",): 2}


# The stages without a file


def test_load_shedding_works_alone(clock: ManualClock, registry: CollectorRegistry) -> None:
    shell = LoadSheddingMiddleware(holds, algorithm="fixed", initial=2, min=1, max=2, clock=clock, registry=registry)
    held = [Held(shell) for _ in range(2)]
    answer = call(shell)
    assert (answer.status, problem(answer)["reason"]) == (503, "queue_full")
    assert call(shell, headers={"X-Request-Timeout-Ms": "0"}).status == 504
    for request in held:
        assert limit_headers(request.end()) == (None, None)
    rests(shell, registry)
    assert list(shell.statistics()["overload"]["waiting"]) == ["none"]


def test_load_shedding_without_a_word_is_adaptive(clock: ManualClock, registry: CollectorRegistry) -> None:
    shell = LoadSheddingMiddleware(hello, clock=clock, registry=registry)
    assert repr(limiter_of(shell)) == "<Limiter 0/20 in flight, 0 waiting, adaptive, <Thresholds open>>"
    assert call(shell).status == 200


def test_load_shedding_tells_no_priorities_apart(clock: ManualClock, registry: CollectorRegistry) -> None:
    shell = LoadSheddingMiddleware(hello, config=PRIORITIES, clock=clock, registry=registry)
    assert limiter_of(shell).settings.fair is False
    assert len(limiter_of(shell).settings.classes) == 1
    assert call(shell, headers={"X-Class": "low"}).status == 200


async def test_priority_admission_works_alone(clock: ManualClock, registry: CollectorRegistry) -> None:
    order: list[str] = []
    end = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        order.append(scope["path"])
        await end.wait()
        await hello(scope, receive, send)

    shell = PriorityAdmissionMiddleware(app, classes=["gold", "silver", "tin"], clock=clock, registry=registry)
    limiter = limiter_of(shell)
    assert list(limiter.statistics()["waiting"]) == ["gold", "silver", "tin"]
    held = [asyncio.create_task(drive(shell, "/hold")) for _ in range(limiter.limit)]
    await asyncio.sleep(0)
    waiting = [
        asyncio.create_task(drive(shell, f"/{name}", headers={"X-Request-Priority": name}))
        for name in ("tin", "silver", "gold", "bulk")
    ]
    await asyncio.sleep(0)
    end.set()
    await asyncio.gather(*held, *waiting)
    assert order[len(held) :] == ["/silver", "/gold", "/tin", "/bulk"]  # gold is above the middle, which is everybody's
    assert outcomes(registry) == {"allowed": len(held) + 4}
    assert call(shell, headers={"X-Request-Timeout-Ms": "0"}).status == 200  # deadlines belong to the shedding


def test_priority_admission_counts_under_its_classes(clock: ManualClock, registry: CollectorRegistry) -> None:
    shell = PriorityAdmissionMiddleware(hello, classes=["gold", "silver", "tin"], clock=clock, registry=registry)
    call(shell)
    call(shell, headers={"X-Request-Priority": "tin"})
    assert metric(registry, "seawall_requests_total") == {("allowed", "silver"): 1, ("allowed", "tin"): 1}


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: LoadSheddingMiddleware(hello, config(), algorithm="fixed"),
            "give either config= or algorithm=, initial=, min= or max=, not both",
        ),
        (
            lambda: LoadSheddingMiddleware(hello, config(), initial=3),
            "give either config= or algorithm=, initial=, min= or max=, not both",
        ),
        (lambda: PriorityAdmissionMiddleware(hello), "give either config= or classes=, not neither"),
        (
            lambda: PriorityAdmissionMiddleware(hello, config(), classes=["a"]),
            "give either config= or classes=, not both",
        ),
        (lambda: LoadSheddingMiddleware(hello, algorithm="vegas"), "vegas"),
        (lambda: LoadSheddingMiddleware(hello, initial=0), "initial"),
        (lambda: LoadSheddingMiddleware(hello, min=5, max=3), r"min \(5\) is more than max \(3\)"),
        (lambda: LoadSheddingMiddleware(hello, initial=2_000), "initial is 2000, and not in 2..1000"),
        (lambda: LoadSheddingMiddleware(hello, 7), "config= is a path, a mapping or a Policy, not int"),  # type: ignore[arg-type]
        (lambda: PriorityAdmissionMiddleware(hello, classes=[]), "priorities"),
        (lambda: PriorityAdmissionMiddleware(hello, classes=["not a name!"]), "priorities"),
    ],
)
def test_misuse_is_told_at_start_up(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build()


@pytest.mark.parametrize("classes", ["critical", ["a", "a"]])
def test_classes_that_are_no_list_of_names_are_misuse(classes: Any) -> None:
    with pytest.raises(ConfigError):
        PriorityAdmissionMiddleware(hello, classes=classes)


# Stacked


STACKED = config(
    identity={"tenant": [{"state": "tenant"}]},
    plans={
        "default": {"rate": "9/second", "quota": "60/day", "concurrency": 3},
        "cheap": {"rate": "7/second", "priority": "low"},
        "off": {"mode": "off"},
    },
    defaults={"plan": "default"},
    tenants={"vip": {"plan": "default", "priority": "critical"}, "poor": {"plan": "cheap"}, "off": {"plan": "off"}},
    routes=[
        {"name": "events", "match": {"path": "/events"}, "streaming": {"max": 2, "max_per_tenant": 1}},
        {"name": "beta", "match": {"path": "/beta"}, "mode": "shadow"},
    ],
    shedding=fixed(2),
)
STAGES = {
    "rate": RateLimitMiddleware,
    "quota": QuotaMiddleware,
    "shedding": LoadSheddingMiddleware,
    "priority": PriorityAdmissionMiddleware,
}


def stack(order: Sequence[str], settings: Mapping[str, Any], clock: ManualClock, registry: CollectorRegistry) -> Any:
    app: Any = holds
    for name in order:
        app = STAGES[name](app, config=settings, clock=clock, registry=registry)
    return app


def decided(answer: Answer) -> Any:
    """What an answer says, but for the jitter."""
    said = None if answer.status in (200, 101, 1013) else {**problem(answer), "retry_after": None, "detail": None}
    return answer.status, *limit_headers(answer), said


@pytest.mark.parametrize(
    "order",
    [
        ("rate", "quota", "shedding", "priority"),
        ("priority", "shedding", "quota", "rate"),
        ("shedding", "rate", "priority", "quota"),
    ],
)
@hypothesis_settings(max_examples=FEWER // 2)
@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["/hold", "/hold", "/", "/events", "/beta", "end", "end"]),
            st.sampled_from([None, "vip", "poor", "off", "x"]),
            st.sampled_from(
                [{}, {}, {"X-Request-Timeout-Ms": "0"}, {"X-Request-Priority": "low"}, {"baggage": "criticality=?"}]
            ),
            st.sampled_from([0.0, 0.0, 0.1, 1.0]),
        ),
        max_size=40,
    )
)
def test_a_stack_decides_what_one_middleware_decides(order: Sequence[str], steps: list[tuple[Any, ...]]) -> None:
    """Requests under way at once, streams, deadlines and priorities included."""
    clocks = [ManualClock("2026-03-04T12:00:00Z") for _ in range(2)]
    registries = [CollectorRegistry() for _ in range(2)]
    shells = [
        Seawall(holds, config=STACKED, clock=clocks[0], registry=registries[0]),
        stack(order, STACKED, clocks[1], registries[1]),
    ]
    held: list[tuple[Coroutine[Any, Any, Answer], ...]] = []
    for path, tenant, headers, gap in steps:
        for clock in clocks:
            clock.advance(gap)
        if path == "end":
            if held:
                one, other = (at_once(running) for running in held.pop(0))
                assert decided(one) == decided(other)
            continue
        pair = tuple(drive(shell, path, state={"tenant": tenant}, headers=headers) for shell in shells)
        found: list[Any] = []
        for running in pair:
            try:
                running.send(None)
                found.append("under way")
            except StopIteration as stop:
                found.append(decided(stop.value))
        assert found[0] == found[1]
        if found[0] == "under way":
            held.append(pair)
    for pair in held:
        for running in pair:
            at_once(running)
    for name in (
        "requests_total",
        "rejections_total",
        "shadow_rejections_total",
        "ignored_headers_total",
        "policy_checks_total",
    ):
        assert metric(registries[0], f"seawall_{name}") == metric(registries[1], f"seawall_{name}")
    for shell, registry in zip(shells, registries, strict=True):
        rests(shell, registry)


class Opaque:
    """Somebody else's middleware, which does not tell what it wraps."""

    def __init__(self, app: ASGIApp) -> None:
        self._wrapped = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._wrapped(scope, receive, send)


def apart(clock: ManualClock, registry: CollectorRegistry, **more: Any) -> tuple[Any, LoadSheddingMiddleware]:
    settings = config(
        plans={"default": {"rate": "3/hour"}},
        shedding=fixed(1),
        routes=[{"name": "events", "match": {"path": "/events"}, "streaming": {"max": 5}}],
    )
    inner = LoadSheddingMiddleware(more.get("app", holds), config=settings, clock=clock, registry=registry)
    return RateLimitMiddleware(Opaque(inner), config=settings, clock=clock, registry=registry), inner


def test_shedding_further_in_undoes_what_was_charged_outside(clock: ManualClock, registry: CollectorRegistry) -> None:
    app, inner = apart(clock, registry)
    held = Held(app)
    assert statuses(app, 5) == [503] * 5
    held.end()
    assert statuses(app, 3) == [200, 200, 429]
    assert limiter_of(inner).in_flight == 0
    assert outcomes(registry) == {"allowed": 3, "shed": 5, "limited": 1}


@pytest.mark.parametrize("kind", ["http", "websocket"])
def test_shedding_further_in_lets_streams_go_as_they_begin(
    kind: str, clock: ManualClock, registry: CollectorRegistry
) -> None:
    app, inner = apart(clock, registry)
    stream = Held(app, "/events", type=kind)
    try:
        assert limiter_of(inner).in_flight == 0
    finally:
        stream.end()


def test_shedding_further_in_learns_of_time_outs(clock: ManualClock, registry: CollectorRegistry) -> None:
    app, inner = apart(clock, registry, app=ends_with(error=TimeoutError()))
    with pytest.raises(TimeoutError):
        call(app)
    assert limiter_of(inner).groups[0].dropped == 1


# What an operator sees


def test_statistics_say_how_much_is_taken_of_what(clock: ManualClock, registry: CollectorRegistry) -> None:
    shell = streaming(clock, registry, limit=7, max=5)
    held, stream = Held(shell), Held(shell, "/events")
    found = shell.statistics()
    overload = found["overload"]
    assert (overload["limit"], overload["in_flight"], overload["shed_from"]) == (7, 1, None)
    assert overload["waiting"] == {"critical": 0, "normal": 0, "low": 0}
    assert found["streams"] == {"events": 1}
    assert "<Limiter 1/7 in flight" in repr(shell.gate.turnstile)
    assert metric(registry, "seawall_concurrency_limit") == {(): 7}
    held.end()
    stream.end()
    rests(shell, registry)


def test_seeded_shells_of_the_harness_shed_nothing(clock: ManualClock) -> None:
    """Rates and quotas alone have no limiter."""
    shell = seeded(hello, config(shedding=fixed(1)), lambda: 0.0, clock)
    assert shell.gate.turnstile is None
    assert shell.statistics()["overload"] == {}


def test_a_reset_forgets_what_was_measured(clock: ManualClock, registry: CollectorRegistry) -> None:
    shell = Seawall(holds, config=config(shedding=fixed(1)), clock=clock, registry=registry)
    held = Held(shell)
    assert call(shell).status == 503
    reset()
    assert call(shell).status == 200
    held.end()
    assert outcomes(registry)["allowed"] >= 1
