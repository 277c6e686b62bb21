"""`seawall.limit`, `charge`, `usage` and `time_left`: what an endpoint says and asks about its own request."""

from __future__ import annotations

import asyncio
import inspect
import math
import threading
from collections.abc import AsyncIterator
from typing import Annotated, Any

import limits
import pytest
from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request, WebSocket
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.requests import HTTPConnection
from starlette.requests import Request as StarletteRequest
from starlette.responses import PlainTextResponse
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import WebSocketDenialResponse
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocketDisconnect

from harness import call, config, hello, limit_headers, metric, outcomes, plan, problem, statuses
from seawall import (
    ConfigError,
    Decision,
    LimitExceeded,
    LoadSheddingMiddleware,
    QuotaMiddleware,
    RateLimitMiddleware,
    Seawall,
    charge,
    limit,
    time_left,
    usage,
)
from seawall.testing import ManualClock, disabled, drive, reset


@pytest.fixture(autouse=True)
def _fresh() -> None:
    reset()


# limit


def protected(app: Any, clock: ManualClock, registry: CollectorRegistry, **values: Any) -> TestClient:
    """``app`` behind a plan of 10 a minute."""
    app.add_middleware(Seawall, config=plan(**(values or {"rate": "10/minute"})), clock=clock, registry=registry)
    return TestClient(app)


def test_a_dependency_limits_its_route(clock: ManualClock, registry: CollectorRegistry) -> None:
    app = FastAPI()

    @app.get("/limited", dependencies=[Depends(limit("2/minute"))])
    async def limited() -> str:
        return "ok"

    @app.get("/other")
    async def other() -> str:
        return "ok"

    client = protected(app, clock, registry)
    assert [client.get("/limited").status_code for _ in range(3)] == [200, 200, 429]
    assert client.get("/other").status_code == 200
    assert outcomes(registry) == {"allowed": 3, "limited": 1}


def test_a_dependency_of_a_router_is_one_limit_for_all_its_routes(
    clock: ManualClock, registry: CollectorRegistry
) -> None:
    router = APIRouter(prefix="/api", dependencies=[Depends(limit("2/minute"))])

    @router.get("/a")
    async def a() -> str:
        return "a"

    @router.get("/b/{item}")
    def b(item: int) -> int:
        return item

    app = FastAPI()
    app.include_router(router)
    client = protected(app, clock, registry)
    assert [client.get(path).status_code for path in ("/api/a", "/api/b/1", "/api/b/2")] == [200, 200, 429]


def test_a_dependency_of_the_application_limits_everything(clock: ManualClock, registry: CollectorRegistry) -> None:
    app = FastAPI(dependencies=[Depends(limit("1/minute"))])

    @app.get("/a")
    async def a() -> str:
        return "a"

    client = protected(app, clock, registry)
    assert [client.get("/a").status_code for _ in range(2)] == [200, 429]


annotated = limit("1/minute", name="annotated")


def test_a_dependency_may_be_an_annotation(clock: ManualClock, registry: CollectorRegistry) -> None:
    app = FastAPI()

    @app.get("/a")
    async def a(_: Annotated[None, Depends(annotated)]) -> str:
        return "a"

    client = protected(app, clock, registry)
    assert [client.get("/a").status_code for _ in range(2)] == [200, 429]
    assert client.get("/openapi.json").json()["paths"]["/a"]["get"].get("parameters") is None


def test_a_decorator_limits_functions_of_both_kinds(clock: ManualClock, registry: CollectorRegistry) -> None:
    app = FastAPI()

    @app.get("/async/{item}")
    @limit("2/minute")
    async def asynchronous(item: int, q: str = "x") -> str:
        return f"{item}{q}"

    @app.get("/sync/{item}")
    @limit("2/minute")
    def synchronous(item: int, q: str = "x") -> str:
        """Runs in a thread, as it would without the decorator."""
        assert threading.current_thread() is not threading.main_thread()
        return f"{item}{q}"

    client = protected(app, clock, registry)
    for path in ("/async", "/sync"):
        assert [client.get(f"{path}/{number}?q=y").status_code for number in range(3)] == [200, 200, 429]
        assert client.get(f"{path}/x").status_code == 422
    assert (asynchronous.__name__, synchronous.__doc__) == (
        "asynchronous",
        "Runs in a thread, as it would without the decorator.",
    )
    assert list(inspect.signature(asynchronous).parameters) == ["item", "q"]


def test_a_decorator_works_in_starlette_and_on_methods(clock: ManualClock, registry: CollectorRegistry) -> None:
    class Pages:
        @limit("1/minute")
        async def page(self, request: StarletteRequest) -> PlainTextResponse:
            return PlainTextResponse("page")

    app = Starlette(routes=[Route("/", Pages().page)])
    client = protected(app, clock, registry)
    answers = [client.get("/") for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 429]
    assert answers[1].json()["status"] == 429


def test_a_dependency_works_on_a_websocket(clock: ManualClock, registry: CollectorRegistry) -> None:
    app = FastAPI()

    @app.websocket("/ws")
    async def socket(websocket: WebSocket, _: None = Depends(limit("1/minute"))) -> None:
        await websocket.accept()
        await websocket.close()

    client = protected(app, clock, registry)
    with client.websocket_connect("/ws") as connection, pytest.raises(WebSocketDisconnect):
        connection.receive_text()
    with pytest.raises(WebSocketDenialResponse) as caught, client.websocket_connect("/ws"):
        pass
    assert caught.value.status_code == 429
    assert caught.value.headers["content-type"] == "application/problem+json"
    assert outcomes(registry) == {"allowed": 1, "limited": 1}


def test_a_decorator_works_on_a_websocket(clock: ManualClock, registry: CollectorRegistry) -> None:
    @limit("1/minute")
    async def socket(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.close()

    client = protected(Starlette(routes=[WebSocketRoute("/ws", socket)]), clock, registry)
    with client.websocket_connect("/ws") as connection, pytest.raises(WebSocketDisconnect):
        connection.receive_text()
    with pytest.raises(WebSocketDenialResponse) as caught, client.websocket_connect("/ws"):
        pass
    assert caught.value.status_code == 429


def test_a_limit_reached_on_an_open_websocket_closes_it_with_1013(
    clock: ManualClock, registry: CollectorRegistry
) -> None:
    each_message = limit("2/minute", name="messages")

    @each_message
    async def handle(text: str) -> str:
        return text.upper()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        for text in ("a", "b", "c"):
            await send({"type": "websocket.send", "text": await handle(text)})

    answer = call(Seawall(app, default="9/minute", clock=clock, registry=registry), type="websocket")
    assert [message.get("text") for message in answer.messages[1:3]] == ["A", "B"]
    assert [(message["type"], message.get("code")) for message in answer.messages[3:]] == [("websocket.close", 1013)]
    assert sum(outcomes(registry).values()) == 1


def test_a_refusal_is_the_real_one_whatever_the_application_makes_of_it(
    clock: ManualClock, registry: CollectorRegistry
) -> None:
    app = FastAPI()

    @app.exception_handler(HTTPException)
    async def on_http(request: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse({"mine": True}, status_code=599, headers={"x-mine": "1"})

    @app.get("/handled", dependencies=[Depends(limit("1/minute", name="handled"))])
    async def handled() -> str:
        return "ok"

    @app.get("/caught")
    async def caught() -> str:
        try:
            await inner()
        except LimitExceeded:
            return "never mind"
        return "ok"

    client = protected(app, clock, registry)
    for path, name in (("/handled", "handled"), ("/caught", "inner")):
        answers = [client.get(path) for _ in range(2)]
        assert [answer.status_code for answer in answers] == [200, 429]
        assert answers[1].json()["violated-policies"] == [name]
        assert "x-mine" not in answers[1].headers
    assert outcomes(registry) == {"allowed": 2, "limited": 2}


@limit("1/minute", name="inner")
async def inner() -> None: ...


def test_a_refusal_needs_no_exception_handler_at_all(clock: ManualClock, registry: CollectorRegistry) -> None:
    @limit("1/minute", name="bare")
    async def endpoint() -> None: ...

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await endpoint()
        await hello(scope, receive, send)

    shell = Seawall(app, default="9/minute", clock=clock, registry=registry)
    assert statuses(shell, 2) == [200, 429]
    assert problem(call(shell))["violated-policies"] == ["bare"]


def test_its_refusal_has_all_headers_and_the_document(clock: ManualClock, registry: CollectorRegistry) -> None:
    app = FastAPI()

    @app.get("/", dependencies=[Depends(limit("1/minute", name="tight"))])
    async def page() -> str:
        return "ok"

    client = protected(app, clock, registry)
    allowed, refused = client.get("/"), client.get("/")
    assert allowed.headers["ratelimit-policy"] == '"rate";q=10;w=60, "tight";q=1;w=60'
    assert allowed.headers["ratelimit"] == '"tight";r=0;t=60'
    assert refused.headers["ratelimit-policy"] == '"rate";q=10;w=60, "tight";q=1;w=60'
    assert refused.headers["ratelimit"] == '"tight";r=0;t=60'
    assert 60 <= int(refused.headers["retry-after"]) <= 72
    document = refused.json()
    assert document["detail"].startswith("This endpoint allows 1 request per minute (policy 'tight').")
    assert (document["violated-policies"], document["reason"]) == (["tight"], "rate")


def test_its_refusal_gives_the_plan_back_what_it_took(clock: ManualClock, registry: CollectorRegistry) -> None:
    app = FastAPI()

    @app.get("/", dependencies=[Depends(limit("1/minute"))])
    async def page() -> str:
        return "ok"

    @app.get("/left")
    async def left(request: Request) -> dict[str, int]:
        return {name: decision.remaining for name, decision in usage(request).items()}

    client = protected(app, clock, registry, rate="10/minute", quota="20/day", concurrency=2)
    for _ in range(9):
        client.get("/")
    assert client.get("/left").json() == {"rate": 8, "quota": 18, "concurrency": 1}


def test_two_limits_on_one_route_both_hold_and_the_first_is_not_charged_for_the_second(
    clock: ManualClock, registry: CollectorRegistry
) -> None:
    app = FastAPI()
    wide, tight = limit("5/minute", name="wide"), limit("2/minute", name="tight")

    @app.get("/", dependencies=[Depends(wide), Depends(tight)])
    async def page() -> str:
        return "ok"

    @app.get("/wide", dependencies=[Depends(wide)])
    async def only() -> str:
        return "ok"

    client = protected(app, clock, registry)
    assert [client.get("/").status_code for _ in range(5)] == [200, 200, 429, 429, 429]
    assert [client.get("/wide").status_code for _ in range(4)] == [200, 200, 200, 429]


def test_one_object_is_one_bucket_however_many_routes_share_it(clock: ManualClock, registry: CollectorRegistry) -> None:
    app = FastAPI()
    shared = limit("2/minute")

    @app.get("/a", dependencies=[Depends(shared)])
    async def a() -> str:
        return "a"

    @app.get("/b")
    @shared
    async def b() -> str:
        return "b"

    client = protected(app, clock, registry)
    assert [client.get(path).status_code for path in ("/a", "/b", "/a", "/b")] == [200, 200, 429, 429]


def test_each_object_has_its_own_bucket_even_when_made_on_one_line(
    clock: ManualClock, registry: CollectorRegistry
) -> None:
    each = [limit("1/minute") for _ in range(3)]
    app = FastAPI()
    for number, one in enumerate(each):

        async def page() -> str:
            return "ok"

        app.add_api_route(f"/{number}", page, dependencies=[Depends(one)])
    client = protected(app, clock, registry)
    assert [client.get(f"/{number}").status_code for number in (0, 1, 2, 0, 1, 2)] == [200] * 3 + [429] * 3
    names = {client.get(f"/{number}").json()["violated-policies"][0] for number in range(3)}
    assert len(names) == 3


def test_its_default_name_says_where_it_was_made(clock: ManualClock, registry: CollectorRegistry) -> None:
    app = FastAPI()
    line = inspect.currentframe().f_lineno + 1  # type: ignore[union-attr]
    here = limit("1/minute")

    @app.get("/", dependencies=[Depends(here)])
    async def page() -> str:
        return "ok"

    client = protected(app, clock, registry)
    client.get("/")
    assert client.get("/").json()["violated-policies"] == [f"test-endpoint-{line}"]


@pytest.mark.parametrize(
    ("per", "found"),
    [
        ("client_ip", [200, 429, 200, 200]),
        ("tenant", [200, 200, 429, 200]),
        ("global", [200, 429, 429, 429]),
        ("state:team", [200, 429, 429, 200]),
        (["client_ip", "tenant"], [200, 200, 200, 200]),
        (("tenant", "state:team"), [200, 200, 429, 200]),
    ],
)
def test_a_limit_counts_per_what_it_is_told(
    per: Any, found: list[int], clock: ManualClock, registry: CollectorRegistry
) -> None:
    @limit("1/minute", per=per, name="per")
    async def endpoint() -> None: ...

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await endpoint()
        await hello(scope, receive, send)

    settings = plan(rate="9/minute") | {"identity": {"tenant": [{"state": "tenant"}]}}
    shell = Seawall(app, config=settings, clock=clock, registry=registry)
    requests = [
        ("192.0.2.1", "a", "red"),
        ("192.0.2.1", "b", "red"),
        ("192.0.2.2", "a", "red"),
        ("192.0.2.3", "c", "blue"),
    ]
    answers = [
        call(shell, client=(address, 1), state={"tenant": tenant, "team": team}).status
        for address, tenant, team in requests
    ]
    assert answers == found


def test_a_limit_takes_its_own_cost_and_not_the_route_s(clock: ManualClock, registry: CollectorRegistry) -> None:
    @limit("10/minute", cost=4, name="dear")
    async def endpoint() -> None: ...

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await endpoint()
        await hello(scope, receive, send)

    settings = plan(rate="100/minute") | {"routes": [{"name": "r", "match": {"path": "/**"}, "cost": 7}]}
    shell = Seawall(app, config=settings, clock=clock, registry=registry)
    assert statuses(shell, 3) == [200, 200, 429]


def test_a_limit_may_be_several_rates_or_an_item_of_the_limits_library(
    clock: ManualClock, registry: CollectorRegistry
) -> None:
    written: list[Any] = [["1/second", "2/minute"], "1/second;2/minute", limits.parse("2/minute")]
    for number, rate in enumerate(written):
        each = limit(rate, name=f"several-{number}")

        @each
        async def endpoint() -> None: ...

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await endpoint()
            await hello(scope, receive, send)

        shell = Seawall(app, default="9/minute", clock=clock, registry=CollectorRegistry())
        found = []
        for _ in range(4):
            found += statuses(shell, 1)
            clock.advance(1)
        assert found == [200, 200, 429, 429]
        clock.advance(60)


@pytest.mark.parametrize("mode", ["shadow", "off"])
def test_a_limit_follows_the_mode(mode: str, clock: ManualClock, registry: CollectorRegistry) -> None:
    @limit("1/minute", name=f"in-{mode}")
    async def endpoint() -> None: ...

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await endpoint()
        await hello(scope, receive, send)

    shell = Seawall(app, config={**plan(rate="9/minute"), "mode": mode}, clock=clock, registry=registry)
    answers = [call(shell) for _ in range(3)]
    assert [(answer.status, "ratelimit" in answer.headers) for answer in answers] == [(200, False)] * 3
    shadow = metric(registry, "seawall_shadow_rejections_total")
    assert shadow == ({("rate", "in-shadow", "default", "normal"): 2} if mode == "shadow" else {})
    assert outcomes(registry) == ({"allowed": 3} if mode == "shadow" else {"exempt": 3})


def test_an_exempt_route_and_an_app_without_seawall_are_not_limited(
    clock: ManualClock, registry: CollectorRegistry
) -> None:
    @limit("1/minute", name="free")
    async def endpoint() -> str:
        return "ok"

    def build() -> FastAPI:
        app = FastAPI()
        app.get("/")(endpoint)
        return app

    free = config(routes=[{"name": "all", "match": {"path": "/**"}, "exempt": True}])
    exempt = build()
    exempt.add_middleware(Seawall, config=free, clock=clock, registry=registry)
    for app in (exempt, build()):
        client = TestClient(app)
        assert [client.get("/").status_code for _ in range(3)] == [200] * 3


async def test_a_limit_outside_of_any_request_lets_through() -> None:
    @limit("1/minute", name="outside")
    async def job(x: int) -> int:
        return x

    assert [await job(n) for n in range(3)] == [0, 1, 2]


def test_disabled_switches_limits_off(clock: ManualClock, registry: CollectorRegistry) -> None:
    app = FastAPI()

    @app.get("/", dependencies=[Depends(limit("1/minute"))])
    async def page() -> str:
        return "ok"

    client = protected(app, clock, registry)
    with disabled():
        assert [client.get("/").status_code for _ in range(3)] == [200] * 3
    assert [client.get("/").status_code for _ in range(2)] == [200, 429]


def test_its_checks_and_refusals_are_metrics(clock: ManualClock, registry: CollectorRegistry) -> None:
    @limit("5/minute", name="counted")
    async def endpoint() -> None: ...

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await endpoint()
        await hello(scope, receive, send)

    shell = Seawall(app, default="90/minute", clock=clock, registry=registry)
    statuses(shell, 7)
    checks = metric(registry, "seawall_policy_checks_total")
    found = {decision: value for (policy, _, decision), value in checks.items() if policy == "counted"}
    assert found == {"allow": 3, "near": 2, "deny": 2}
    assert metric(registry, "seawall_rejections_total") == {("rate", "counted", "default", "normal"): 2}


def test_a_limit_works_under_a_stage_alone(clock: ManualClock, registry: CollectorRegistry) -> None:
    @limit("1/minute", name="alone")
    async def endpoint() -> None: ...

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await endpoint()
        await hello(scope, receive, send)

    shell = RateLimitMiddleware(app, limit="9/minute", clock=clock, registry=registry)
    assert statuses(shell, 2) == [200, 429]


def test_a_limit_under_quotas_alone_is_enforced(clock: ManualClock, registry: CollectorRegistry) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await inner()
        await hello(scope, receive, send)

    shell = QuotaMiddleware(app, limit="9/day", clock=clock, registry=registry)
    assert statuses(shell, 3) == [200, 429, 429]


@pytest.mark.parametrize("kinds", [(RateLimitMiddleware, QuotaMiddleware), (QuotaMiddleware, RateLimitMiddleware)])
@pytest.mark.parametrize("hidden", [False, True])
def test_a_limit_is_enforced_by_whichever_stage_has_rates(
    kinds: tuple[Any, Any], hidden: bool, clock: ManualClock, registry: CollectorRegistry
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await inner()
        await hello(scope, receive, send)

    settings = plan(rate="9/minute", quota="9/day")
    stage: Any = kinds[0](app, config=settings, clock=clock, registry=registry)

    async def opaque(scope: Scope, receive: Receive, send: Send) -> None:
        await stage(scope, receive, send)

    shell = kinds[1](opaque if hidden else stage, config=settings, clock=clock, registry=registry)
    answers = [call(shell) for _ in range(2)]
    assert [answer.status for answer in answers] == [200, 429]
    assert problem(answers[1])["violated-policies"] == ["inner"]
    assert outcomes(registry) == {"allowed": 1, "limited": 1}


def test_a_limit_hit_twice_is_named_once(clock: ManualClock, registry: CollectorRegistry) -> None:
    router = APIRouter(dependencies=[Depends(annotated)])

    @router.get("/")
    @ten
    @ten
    async def page() -> str:
        return "ok"

    app = FastAPI()
    app.include_router(router)
    answer = protected(app, clock, registry).get("/")
    assert answer.headers["ratelimit-policy"] == '"rate";q=10;w=60, "annotated";q=1;w=60, "ten";q=10;w=60'
    assert answer.headers["ratelimit"] == '"annotated";r=0;t=60'


ten = limit("10/minute", name="ten")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"rate": "5/dya"}, "unknown time unit 'dya'"),
        ({"rate": ""}, "limit()"),
        ({"rate": 5}, "limit()"),
        ({"rate": []}, "limit()"),
        ({"rate": "5/minute", "cost": 0}, "cost is a whole number"),
        ({"rate": "5/minute", "cost": True}, "cost is a whole number"),
        ({"rate": "5/minute", "cost": 1.5}, "cost is a whole number"),
        ({"rate": "5/minute", "cost": 1_000_001}, "cost is a whole number"),
        ({"rate": "5/minute", "per": "adress"}, "per= is client_ip"),
        ({"rate": "5/minute", "per": []}, "per= is client_ip"),
        ({"rate": "5/minute", "per": "state:"}, "per= is client_ip"),
        ({"rate": "5/minute", "name": "Bad Name"}, "name"),
        ({"rate": "5/minute", "name": "x" * 65}, "name"),
        ({"rate": "5/minute", "name": "rate"}, "rate"),
        ({"rate": "5/minute", "name": "quota"}, "quota"),
        ({"rate": "5/minute", "name": "concurrency"}, "concurrency"),
        ({"rate": "5/minute", "name": "streams"}, "streams"),
    ],
)
def test_a_limit_that_makes_no_sense_is_refused_where_it_is_written(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        limit(**arguments)
    assert words in str(caught.value)


def test_only_functions_are_decorated() -> None:
    class View: ...

    async def stream() -> AsyncIterator[int]:
        yield 1

    def numbers() -> Any:
        yield 1

    for wrong in (View, stream, numbers, 7):
        with pytest.raises(TypeError, match=r"seawall\.limit decorates a function"):
            limit("1/minute")(wrong)  # type: ignore[type-var]


def test_a_limit_describes_itself() -> None:
    assert "login" in repr(limit("5/minute", name="login"))
    assert "client_ip" in repr(limit("5/minute", name="login"))


def test_a_limit_reached_in_a_task_group_is_refused_like_any(clock: ManualClock, registry: CollectorRegistry) -> None:
    """What comes out is a group of exceptions, which no handler of HTTP exceptions knows."""
    app = FastAPI()

    @app.get("/")
    async def page() -> str:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(inner())
            tasks.create_task(asyncio.sleep(0))
        return "ok"

    app.add_middleware(Seawall, default="9/minute", clock=clock, registry=registry)
    client = TestClient(app, raise_server_exceptions=False)
    answers = [client.get("/") for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 429, 429]
    assert outcomes(registry) == {"allowed": 1, "limited": 2}


def test_raised_by_hand_it_is_an_http_exception_like_any(clock: ManualClock, registry: CollectorRegistry) -> None:
    app = FastAPI()

    @app.get("/")
    async def page() -> None:
        raise LimitExceeded

    client = protected(app, clock, registry)
    assert client.get("/").status_code == 429
    assert outcomes(registry) == {"allowed": 1}


def test_raised_by_hand_and_caught_by_nobody_it_is_the_application_s_error(
    clock: ManualClock, registry: CollectorRegistry
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise LimitExceeded

    with pytest.raises(LimitExceeded):
        call(Seawall(app, default="9/minute", clock=clock, registry=registry))
    assert outcomes(registry) == {"allowed": 1}


def test_a_limit_reached_after_the_answer_began_is_the_application_s_error(
    clock: ManualClock, registry: CollectorRegistry
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await inner()
        await inner()

    with pytest.raises(LimitExceeded):
        call(Seawall(app, default="9/minute", clock=clock, registry=registry))
    assert outcomes(registry) == {"allowed": 1}


# charge


class Charging:
    """An application that charges what it is told to, before, during or after its answer."""

    def __init__(self) -> None:
        self.steps: list[int | None] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = StarletteRequest(scope)
        self.left = {name: decision.remaining for name, decision in usage(request).items()}
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for step in self.steps:
            if step is None:
                await send({"type": "http.response.body", "body": b".", "more_body": True})
            else:
                charge(request, step)
        await send({"type": "http.response.body", "body": b""})


class Account:
    """One caller of a plan, and what it has left."""

    def __init__(self, clock: ManualClock, **values: Any) -> None:
        self.app = Charging()
        self.shell = Seawall(self.app, config=plan(**values), clock=clock, registry=CollectorRegistry())

    def spend(self, *steps: int | None) -> int:
        self.app.steps = list(steps)
        return call(self.shell).status

    def left(self) -> dict[str, int]:
        """What is left, without spending anything."""
        self.spend(-1)
        return {name: left + 1 for name, left in self.app.left.items()}


def test_a_charge_is_added_to_rate_and_quota(clock: ManualClock) -> None:
    account = Account(clock, rate="20/minute", quota="100/day")
    account.spend(4)
    assert account.left() == {"rate": 15, "quota": 95}


def test_a_negative_charge_gives_back_at_most_what_was_charged(clock: ManualClock) -> None:
    account = Account(clock, rate="20/minute", quota="100/day")
    for _ in range(5):
        account.spend()
    account.spend(-1_000)
    assert account.left() == {"rate": 15, "quota": 95}
    account.spend(3, -2)
    assert account.left() == {"rate": 13, "quota": 93}


@pytest.mark.parametrize(
    ("steps", "quota"),
    [
        ((1_000, None, -1_000), 994),
        ((1_000, None, -500, None, -500), 994),
        ((1_000, None, 1_000, None, -2_000), 994),
        ((1_000, None, -1_000, None, -1_000), 995),
        ((None, 30, None, -30), 994),
        ((-5, None, 7, None, -9), 995),
    ],
)
def test_charging_back_and_forth_mints_nothing(steps: tuple[int | None, ...], quota: int, clock: ManualClock) -> None:
    """A bucket whose debt was capped gets back what it was really charged, and not what was asked for."""
    account = Account(clock, rate="10/minute", quota="1000/day")
    for _ in range(5):
        account.spend()
    account.spend(*steps)
    assert account.left() == {"rate": 5, "quota": quota}


@given(
    before=st.integers(0, 5),
    steps=st.lists(st.none() | st.integers(-25, 25), max_size=12),
    cost=st.integers(1, 3),
)
def test_no_sequence_of_charges_gives_more_back_than_the_request_was_charged(
    before: int, steps: list[int | None], cost: int
) -> None:
    clock = ManualClock()
    app = Charging()
    settings = plan(rate="20/minute", quota="1000/day")
    settings["routes"] = [{"name": "r", "match": {"path": "/**"}, "cost": cost}]
    shell = Seawall(app, config=settings, clock=clock, registry=CollectorRegistry())
    statuses(shell, before)
    app.steps = list(steps)
    call(shell)
    assert app.left == {"rate": 20 - (before + 1) * cost, "quota": 1000 - (before + 1) * cost}
    app.steps = [-cost]
    if call(shell).status == 200:  # otherwise it is in debt
        assert app.left["quota"] + cost <= 1000 - before * cost
        assert app.left["rate"] + cost <= 20 - before * cost


def test_a_bucket_goes_into_debt_by_at_most_one_burst(clock: ManualClock) -> None:
    account = Account(clock, rate="10/minute")
    account.spend(1_000_000)
    clock.advance_ns(66 * 10**9 - 1)
    assert account.spend() == 429
    clock.advance_ns(1)
    assert [account.spend(), account.spend()] == [200, 429]


def test_a_quota_counts_a_debt_whole(clock: ManualClock) -> None:
    account = Account(clock, quota="10/day")
    account.spend(1_000)
    assert account.spend() == 429
    clock.advance(43_200)
    assert [account.spend() for _ in range(11)] == [200] * 10 + [429]


def test_a_refund_is_void_once_the_window_is_over(clock: ManualClock) -> None:
    left: list[int] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        request = StarletteRequest(scope)
        if scope["path"] == "/slow":
            clock.advance(43_200)
            at_midnight.append(call(shell))
            charge(request, -1)
        left.append(usage(request)["quota"].remaining)
        await hello(scope, receive, send)

    at_midnight: list[Any] = []
    shell = Seawall(app, config=plan(quota="10/day"), clock=clock)
    call(shell, "/slow")
    call(shell)
    assert left[-1] == 8


def test_a_charge_shows_in_the_answer_s_own_headers(clock: ManualClock) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        charge(StarletteRequest(scope), 3)
        await hello(scope, receive, send)

    shell = Seawall(app, config=plan(rate="10/minute", quota="100/day"), clock=clock)
    assert call(shell).headers["ratelimit"] == '"rate";r=6;t=6'
    in_debt = [call(shell) for _ in range(2)]
    assert [answer.headers["ratelimit"] for answer in in_debt] == ['"rate";r=2;t=6', '"rate";r=0;t=18']


def test_a_charge_does_not_touch_the_limits_of_a_route(clock: ManualClock) -> None:
    app = Charging()
    settings = plan(rate="50/minute")
    settings["routes"] = [
        {"name": "r", "match": {"path": "/**"}, "limits": {"own": {"rate": "50/minute", "per": "global"}}}
    ]
    shell = Seawall(app, config=settings, clock=clock)
    app.steps = [10]
    call(shell)
    call(shell)
    assert app.left == {"rate": 38, "own": 48}


def test_a_charge_after_the_answer_and_with_a_failing_application_counts(clock: ManualClock) -> None:
    left: list[int] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        request = StarletteRequest(scope)
        left.append(usage(request)["rate"].remaining)
        await hello(scope, receive, send)
        charge(request, 2)
        raise LookupError

    shell = Seawall(app, default="10/minute", clock=clock)
    for _ in range(3):
        with pytest.raises(LookupError):
            call(shell)
    assert left == [9, 6, 3]


def test_a_refused_request_s_charges_are_void(clock: ManualClock) -> None:
    @limit("1/minute", name="once")
    async def endpoint() -> None: ...

    left: list[int] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        request = StarletteRequest(scope)
        left.append(usage(request)["rate"].remaining)
        if scope["path"] == "/refused":
            charge(request, 5)
            await endpoint()
            await endpoint()
        await hello(scope, receive, send)

    shell = Seawall(app, default="10/minute", clock=clock)
    assert [call(shell).status, call(shell, "/refused").status, call(shell).status] == [200, 429, 200]
    assert left == [9, 8, 8]


async def test_a_charge_from_a_thread_and_in_a_stream(clock: ManualClock, registry: CollectorRegistry) -> None:
    app = FastAPI()

    @app.get("/thread")
    def thread(request: Request) -> str:
        assert threading.current_thread() is not threading.main_thread()
        charge(request, 4)
        return "ok"

    @app.get("/stream")
    async def stream(request: Request) -> StreamingResponse:
        async def chunks() -> AsyncIterator[bytes]:
            for _ in range(3):
                yield b"token"
                charge(request, 2)

        return StreamingResponse(chunks())

    @app.get("/left")
    async def left(request: Request) -> int:
        return usage(request)["rate"].remaining

    app.add_middleware(Seawall, default="30/minute", clock=clock, registry=registry)
    assert (await drive(app, "/thread")).headers["ratelimit"] == '"rate";r=25;t=2'
    assert (await drive(app, "/left")).body == b"24"
    assert (await drive(app, "/stream")).body == b"token" * 3
    assert (await drive(app, "/left")).body == b"16"


def test_many_threads_lose_no_charge(clock: ManualClock) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        request = StarletteRequest(scope)

        def work() -> None:
            for _ in range(2_000):
                charge(request, 1)

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        await hello(scope, receive, send)

    shell = Seawall(app, config=plan(quota="100_000/day"), clock=clock)
    assert call(shell).headers["ratelimit"] == f'"quota";r={100_000 - 1 - 16_000};t=43200'


@pytest.mark.parametrize("cost", [math.nan, math.inf, 1.0, True, False, "1", None, b"1"])
def test_a_cost_that_is_no_whole_number_is_a_type_error(cost: Any) -> None:
    with pytest.raises(TypeError, match="whole number"):
        charge(StarletteRequest({"type": "http"}), cost)


@pytest.mark.parametrize("cost", [10**9 + 1, -(10**9) - 1, 10**400])
def test_a_huge_cost_is_a_value_error(cost: int) -> None:
    with pytest.raises(ValueError, match="at most"):
        charge(StarletteRequest({"type": "http"}), cost)


def test_a_charge_of_what_is_exempt_or_outside_of_seawall_is_nothing() -> None:
    charge(StarletteRequest({"type": "http"}), 5)
    assert usage(StarletteRequest({"type": "http"})) == {}


def test_a_charge_in_shadow_mode_is_charged_and_says_nothing(clock: ManualClock) -> None:
    account = Account(clock, rate="20/minute", mode="shadow")
    account.spend(4)
    assert account.left() == {"rate": 15}


def test_a_would_be_refusal_was_charged_nothing_and_gives_nothing_back(clock: ManualClock) -> None:
    account = Account(clock, rate="2/minute", mode="shadow")
    for _ in range(2):
        account.spend()
    account.spend(-1)
    account.spend(5)
    clock.advance(30)
    account.spend()
    assert account.app.left == {"rate": 0}


def test_a_charge_for_a_plan_without_limits_is_nothing(clock: ManualClock) -> None:
    account = Account(clock, rate="unlimited")
    assert account.spend(5) == 200


@pytest.mark.parametrize("per", ["client_ip", "global", "tenant"])
def test_a_charge_reaches_a_stage_without_a_file(per: str, clock: ManualClock, registry: CollectorRegistry) -> None:
    app = Charging()
    app.steps = [4]
    rate = RateLimitMiddleware(app, limit="50/minute", per=per, clock=clock, registry=registry)
    quota = QuotaMiddleware(app, limit="50/day", per=per, clock=clock, registry=registry)
    for shell, name in ((rate, "rate"), (quota, "quota")):
        call(shell)
        call(shell)
        assert app.left == {name: 44}


# usage


def test_usage_tells_what_is_left_of_every_policy(clock: ManualClock) -> None:
    found: list[dict[str, Decision]] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        found.append(usage(StarletteRequest(scope)))
        await hello(scope, receive, send)

    settings = plan(rate={"limit": "2/minute", "burst": 3}, quota="2/day", concurrency=4)
    settings["routes"] = [
        {"name": "r", "match": {"path": "/**"}, "limits": {"own": {"rate": "1/second", "per": "global"}}}
    ]
    answer = call(Seawall(app, config=settings, clock=clock))
    assert found == [
        {
            "rate": Decision(True, "rate", 3, 2, 0.0, 90.0),
            "quota": Decision(True, "quota", 2, 1, 0.0, 86_400.0),
            "own": Decision(False, "own", 1, 0, 1.0, 1.0),
            "concurrency": Decision(True, "concurrency", 4, 3, 0.0, 0.0),
        }
    ]
    policies, _ = limit_headers(answer)
    assert [name for name, _ in policies or ()] == list(found[0])


def test_usage_includes_limits_of_the_endpoint(clock: ManualClock, registry: CollectorRegistry) -> None:
    app = FastAPI()

    @app.get("/", dependencies=[Depends(limit("3/minute", name="mine"))])
    async def page(request: Request) -> dict[str, int]:
        return {name: decision.remaining for name, decision in usage(request).items()}

    client = protected(app, clock, registry)
    assert client.get("/").json() == {"rate": 9, "mine": 2}


def test_usage_works_on_a_websocket(clock: ManualClock) -> None:
    found: list[int] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        from starlette.requests import HTTPConnection

        found.append(usage(HTTPConnection(scope))["rate"].remaining)
        await hello(scope, receive, send)

    call(Seawall(app, default="9/minute", clock=clock), type="websocket")
    assert found == [8]


def test_usage_of_a_cost_that_never_fits_waits_for_ever(clock: ManualClock) -> None:
    """In shadow mode, where such a request is served."""
    found: list[dict[str, Decision]] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        found.append(usage(StarletteRequest(scope)))
        await hello(scope, receive, send)

    settings = {**plan(rate="1/minute"), "mode": "shadow"}
    settings["routes"] = [{"name": "r", "match": {"path": "/**"}, "cost": 2}]
    call(Seawall(app, config=settings, clock=clock))
    assert found[0]["rate"].remaining == 1


def test_a_limit_that_limits_nothing_is_refused_when_it_is_made() -> None:
    with pytest.raises(ConfigError, match="limits nothing"):
        limit("unlimited")


def test_a_limit_belongs_to_the_tenant_that_the_inner_shell_knows(
    clock: ManualClock, registry: CollectorRegistry
) -> None:
    hourly = limit("1/hour", per="tenant")

    @hourly
    async def inner() -> None: ...

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await inner()
        await hello(scope, receive, send)

    config = {**plan(rate="100/minute"), "identity": {"tenant": [{"state": "id"}]}}
    shell = RateLimitMiddleware(
        Seawall(app, config=config, clock=clock, registry=registry), limit="100/second", clock=clock, registry=registry
    )
    assert [call(shell, state={"id": each}).status for each in ("a", "b", "a")] == [200, 200, 429]


def test_what_shadow_would_refuse_is_given_back_as_enforcing_would(
    clock: ManualClock, registry: CollectorRegistry
) -> None:
    left: list[int] = []

    @limit("1/hour")
    async def inner() -> None: ...

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        left.append(usage(HTTPConnection(scope))["rate"].remaining)
        await inner()
        await hello(scope, receive, send)

    shell = Seawall(app, config={**plan(rate="5/hour"), "mode": "shadow"}, clock=clock, registry=registry)
    assert statuses(shell, 6) == [200] * 6
    assert left == [4, 3, 3, 3, 3, 3]


# time_left


def asked_for_time(clock: ManualClock, found: list[float | None], **pauses: float) -> Any:
    """An application that notes what is left of its time, with and without its request, and again after a pause."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        found.append(time_left())
        found.append(time_left(HTTPConnection(scope)))
        clock.advance(pauses.get("works", 0.0))
        found.append(time_left())
        await hello(scope, receive, send)

    return app


def in_ms(timeout: object) -> dict[str, Any]:
    return {"headers": [(b"x-request-timeout-ms", str(timeout).encode())]}


@pytest.mark.parametrize(
    ("timeout", "works", "expected"), [(1_500, 0.5, [1.5, 1.5, 1.0]), (1_500, 2.0, [1.5, 1.5, 0.0])]
)
def test_time_left_is_what_the_caller_still_waits_and_never_negative(
    timeout: int, works: float, expected: list[float], clock: ManualClock
) -> None:
    found: list[float | None] = []
    call(Seawall(asked_for_time(clock, found, works=works), default="9/minute", clock=clock), **in_ms(timeout))
    assert found == expected


@pytest.mark.parametrize("said", [{}, in_ms("soon"), {"headers": [(b"x-request-start", b"t=1767225600.1")]}])
def test_a_request_without_a_deadline_has_no_time_left_to_tell(said: dict[str, Any], clock: ManualClock) -> None:
    found: list[float | None] = []
    call(Seawall(asked_for_time(clock, found), default="9/minute", clock=clock), **said)
    assert found == [None, None, None]


def test_nobody_reads_deadlines_where_nothing_is_shed(clock: ManualClock) -> None:
    found: list[float | None] = []
    call(RateLimitMiddleware(asked_for_time(clock, found), limit="9/minute", clock=clock), **in_ms(900))
    call(asked_for_time(clock, found), **in_ms(900))
    assert found == [None] * 6


def test_time_left_is_known_whichever_of_stacked_middlewares_reads_it(clock: ManualClock) -> None:
    found: list[float | None] = []
    sheds = LoadSheddingMiddleware(asked_for_time(clock, found), algorithm="adaptive", clock=clock)
    call(RateLimitMiddleware(sheds, limit="9/minute", clock=clock), **in_ms(900))
    assert found == [0.9, 0.9, 0.9]


def test_time_left_of_a_websocket_is_of_its_handshake(clock: ManualClock) -> None:
    found: list[float | None] = []
    shell = Seawall(asked_for_time(clock, found), default="9/minute", clock=clock)
    call(shell, type="websocket", **in_ms(900))
    assert found == [0.9, 0.9, 0.9]


def test_an_endpoint_in_a_thread_knows_its_time(clock: ManualClock, registry: CollectorRegistry) -> None:
    app = FastAPI()

    @app.get("/")
    def page() -> float | None:
        return time_left()

    client = protected(app, clock, registry)
    assert client.get("/", headers={"X-Request-Timeout-Ms": "700"}).json() == 0.7


async def test_a_task_that_has_outlived_its_request_has_all_the_time(clock: ManualClock) -> None:
    ended = asyncio.Event()
    tasks: list[asyncio.Task[float | None]] = []

    async def later() -> float | None:
        await ended.wait()
        return time_left()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        tasks.append(asyncio.ensure_future(later()))
        await hello(scope, receive, send)

    await drive(Seawall(app, default="9/minute", clock=clock), "/", **in_ms(900))
    ended.set()
    assert await tasks[0] is None
