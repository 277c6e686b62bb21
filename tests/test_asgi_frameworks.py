"""FastAPI and Starlette around and inside: routers, mounts, 404s, WebSockets, CORS, BaseHTTPMiddleware, lifespan."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from fastapi import APIRouter, Depends, FastAPI, WebSocket
from fastapi.responses import StreamingResponse
from fastapi.testclient import TestClient
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.testclient import WebSocketDenialResponse
from starlette.websockets import WebSocketDisconnect

from harness import in_flight, outcomes, plan
from seawall import EXPOSE_HEADERS, Seawall
from seawall.testing import ManualClock, drive, reset


@pytest.fixture(autouse=True)
def _fresh() -> None:
    reset()


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


def application(clock: ManualClock, registry: CollectorRegistry, **changes: Any) -> FastAPI:
    """Every kind of route that an application may have, behind two requests a minute for each address."""
    app = FastAPI()
    deep = APIRouter(prefix="/deep")
    router = APIRouter(prefix="/api")

    @deep.get("/{item}")
    async def nested(item: str) -> str:
        return item

    @router.get("/users/{user}")
    def of_user(user: int) -> int:
        return user

    @app.get("/plain")
    async def plain() -> str:
        return "ok"

    @app.get("/depends")
    async def depends(value: str = Depends(lambda: "injected")) -> str:
        return value

    @app.get("/stream")
    async def stream() -> StreamingResponse:
        async def chunks() -> AsyncIterator[bytes]:
            for number in range(3):
                yield b"%d" % number

        return StreamingResponse(chunks())

    @app.get("/boom")
    async def boom() -> None:
        raise LookupError("a bug")

    @app.websocket("/ws")
    async def socket(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.send_text("hi")
        await websocket.close()

    router.include_router(deep)
    app.include_router(router)
    app.mount("/sub", Starlette(routes=[Route("/page", lambda request: PlainTextResponse("page"))]))
    app.add_middleware(Seawall, config=plan(rate="2/minute"), clock=clock, registry=registry, **changes)
    return app


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/plain", 200),
        ("/depends", 200),
        ("/stream", 200),
        ("/api/users/1", 200),
        ("/api/users/x", 422),
        ("/api/deep/thing", 200),
        ("/sub/page", 200),
        ("/sub/nothing", 404),
        ("/nothing", 404),
        ("/openapi.json", 200),
        ("/docs", 200),
    ],
)
def test_every_kind_of_route_is_limited(
    path: str, status: int, clock: ManualClock, registry: CollectorRegistry
) -> None:
    client = TestClient(application(clock, registry))
    answers = [client.get(path) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [status, status, 429]
    assert [answer.headers["ratelimit"] for answer in answers] == [
        '"rate";r=1;t=30',
        '"rate";r=0;t=30',
        '"rate";r=0;t=30',
    ]
    assert outcomes(registry) == {"allowed": 2, "limited": 1}


def test_other_paths_and_values_buy_no_other_bucket(clock: ManualClock, registry: CollectorRegistry) -> None:
    client = TestClient(application(clock, registry))
    paths = ["/api/users/1", "/api/users/2", "/api/users/3", "/plain?x=1", "/nothing", "/sub/page"]
    assert [client.get(path).status_code for path in paths] == [200, 200, 429, 429, 429, 429]


def test_an_error_of_the_application_is_its_own(clock: ManualClock, registry: CollectorRegistry) -> None:
    client = TestClient(application(clock, registry), raise_server_exceptions=False)
    assert [client.get("/boom").status_code for _ in range(3)] == [500, 500, 429]
    assert outcomes(registry) == {"allowed": 2, "limited": 1}
    assert in_flight(registry) == 0


def test_a_stream_arrives_whole(clock: ManualClock, registry: CollectorRegistry) -> None:
    answer = TestClient(application(clock, registry)).get("/stream")
    assert (answer.content, answer.headers["ratelimit"]) == (b"012", '"rate";r=1;t=30')


def test_a_websocket_is_limited_at_connect(clock: ManualClock, registry: CollectorRegistry) -> None:
    client = TestClient(application(clock, registry))
    for _ in range(2):
        with client.websocket_connect("/ws") as socket:
            assert socket.receive_text() == "hi"
    with pytest.raises(WebSocketDenialResponse) as caught, client.websocket_connect("/ws"):
        pass
    assert caught.value.status_code == 429
    assert caught.value.json()["violated-policies"] == ["rate"]
    assert outcomes(registry) == {"allowed": 2, "limited": 1}


@pytest.mark.parametrize("root", ["", "/prefix"])
def test_rules_are_about_the_path_below_the_root(root: str, clock: ManualClock, registry: CollectorRegistry) -> None:
    settings = plan(rate="100/minute") | {
        "routes": [
            {"name": "l", "match": {"path": "/plain"}, "limits": {"one": {"rate": "1/minute", "per": "client_ip"}}}
        ]
    }
    app = application(clock, CollectorRegistry())
    app.user_middleware.clear()
    app.add_middleware(Seawall, config=settings, clock=clock, registry=registry)
    client = TestClient(app, root_path=root)
    assert [client.get(f"{root}/plain").status_code for _ in range(2)] == [200, 429]
    assert client.get(f"{root}/depends").status_code == 200


def test_a_seawall_inside_a_mount_sees_the_path_below_it(clock: ManualClock, registry: CollectorRegistry) -> None:
    settings = plan(rate="unlimited") | {
        "routes": [
            {"name": "l", "match": {"path": "/page"}, "limits": {"one": {"rate": "1/minute", "per": "client_ip"}}}
        ]
    }
    inner = Starlette(
        routes=[Route("/page", lambda request: PlainTextResponse("page"))],
        middleware=[Middleware(Seawall, config=settings, clock=clock, registry=registry)],
    )
    client = TestClient(Starlette(routes=[Mount("/sub", inner)]))
    assert [client.get("/sub/page").status_code for _ in range(2)] == [200, 429]


def test_redirects_say_nothing_when_nothing_is_left(clock: ManualClock, registry: CollectorRegistry) -> None:
    app = Starlette(routes=[Route("/old", lambda request: RedirectResponse("/new"))])
    app.add_middleware(Seawall, default="1/minute", clock=clock, registry=registry)
    answer = TestClient(app).get("/old", follow_redirects=False)
    assert (answer.status_code, "ratelimit" in answer.headers) == (307, False)


# Lifespan


def test_it_works_with_lifespan_events_and_without(clock: ManualClock, registry: CollectorRegistry) -> None:
    events: list[str] = []

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[dict[str, str]]:
        events.append("up")
        yield {"shared": "state"}
        events.append("down")

    async def state(request: Request) -> Response:
        return PlainTextResponse(request.state.shared)

    app = Starlette(routes=[Route("/", state)], lifespan=lifespan)
    app.add_middleware(Seawall, default="2/minute", clock=clock, registry=registry)
    with TestClient(app) as client:
        assert client.get("/").text == "state"
    assert events == ["up", "down"]
    without = TestClient(application(clock, registry))
    assert without.get("/plain").status_code == 200


def test_the_state_of_a_lifespan_may_name_the_tenant(clock: ManualClock, registry: CollectorRegistry) -> None:
    class Authenticate:
        def __init__(self, app: Any) -> None:
            self.app = app

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            scope.setdefault("state", {})["tenant_id"] = dict(scope["headers"]).get(b"x-user", b"").decode()
            await self.app(scope, receive, send)

    app = Starlette(routes=[Route("/", lambda request: PlainTextResponse("ok"))])
    settings = plan(rate="1/minute") | {"identity": {"tenant": [{"state": "tenant_id"}]}}
    app.add_middleware(Seawall, config=settings, clock=clock, registry=registry)
    app.add_middleware(Authenticate)
    client = TestClient(app)
    users = ["ada", "bob", "ada", "", ""]
    assert [client.get("/", headers={"X-User": user}).status_code for user in users] == [200, 200, 429, 200, 429]


# Middlewares around


class Tags(BaseHTTPMiddleware):
    async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        response = await call_next(request)
        response.headers["x-tag"] = "1"
        return response


@pytest.mark.parametrize("outside", [True, False])
@pytest.mark.parametrize("path", ["/plain", "/stream", "/nothing", "/api/deep/x"])
def test_base_http_middleware_outside_and_inside(
    outside: bool, path: str, clock: ManualClock, registry: CollectorRegistry
) -> None:
    app = application(clock, registry)
    if outside:
        app.add_middleware(Tags)
    else:
        app.user_middleware.append(Middleware(Tags))
    client = TestClient(app)
    answers = [client.get(path) for _ in range(3)]
    assert answers[0].headers["ratelimit"] == '"rate";r=1;t=30'
    assert answers[2].status_code == 429
    assert answers[2].json()["reason"] == "rate"
    assert ["x-tag" in answer.headers for answer in answers] == [True, True, outside]
    assert outcomes(registry) == {"allowed": 2, "limited": 1}


def test_gzip_outside_compresses_answers_and_not_their_headers(clock: ManualClock, registry: CollectorRegistry) -> None:
    app = application(clock, registry)
    app.add_middleware(GZipMiddleware, minimum_size=1)
    client = TestClient(app)
    answers = [client.get("/plain") for _ in range(3)]
    assert [answer.headers["content-encoding"] for answer in answers] == ["gzip"] * 3
    assert answers[2].json()["status"] == 429


# CORS


@pytest.fixture
def browser(clock: ManualClock, registry: CollectorRegistry) -> Iterator[TestClient]:
    app = application(clock, registry)
    app.add_middleware(
        CORSMiddleware, allow_origins=["https://example.com"], allow_methods=["*"], expose_headers=EXPOSE_HEADERS
    )
    with TestClient(app, headers={"Origin": "https://example.com"}) as client:
        yield client


def test_a_browser_reads_a_refusal_and_when_to_come_back(browser: TestClient) -> None:
    """What ``fetch`` shows a script: an allowed origin, and exposed headers."""
    answer = [browser.get("/plain") for _ in range(3)][-1]
    assert answer.status_code == 429
    assert answer.headers["access-control-allow-origin"] == "https://example.com"
    exposed = {name.strip().lower() for name in answer.headers["access-control-expose-headers"].split(",")}
    assert {"retry-after", "ratelimit", "ratelimit-policy"} <= exposed
    assert int(answer.headers["retry-after"]) >= 30


def test_preflights_through_cors_are_not_counted(browser: TestClient, registry: CollectorRegistry) -> None:
    for _ in range(10):
        answer = browser.options("/plain", headers={"Access-Control-Request-Method": "PUT"})
        assert answer.status_code == 200
    assert outcomes(registry) == {}
    assert browser.get("/plain").status_code == 200


def test_preflights_pass_where_cors_is_inside(clock: ManualClock, registry: CollectorRegistry) -> None:
    app = application(clock, registry)
    app.user_middleware.append(Middleware(CORSMiddleware, allow_origins=["*"], allow_methods=["*"]))
    client = TestClient(app)
    headers = {"Origin": "https://example.com", "Access-Control-Request-Method": "PUT"}
    assert [client.options("/plain", headers=headers).status_code for _ in range(5)] == [200] * 5
    assert outcomes(registry) == {}


def test_exposed_headers_are_all_that_an_answer_may_carry() -> None:
    assert EXPOSE_HEADERS == [
        "RateLimit",
        "RateLimit-Policy",
        "Retry-After",
        "X-RateLimit-Limit",
        "X-RateLimit-Remaining",
        "X-RateLimit-Reset",
        "Link",
    ]


# Starlette alone


def test_starlette_alone(clock: ManualClock, registry: CollectorRegistry) -> None:
    async def socket(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.close()

    app = Starlette(
        routes=[Route("/", lambda request: PlainTextResponse("ok")), WebSocketRoute("/ws", socket)],
        middleware=[Middleware(Seawall, default="2/minute", clock=clock, registry=registry)],
    )
    client = TestClient(app)
    assert client.get("/").status_code == 200
    with client.websocket_connect("/ws") as connection, pytest.raises(WebSocketDisconnect):
        connection.receive_text()
    assert client.get("/").status_code == 429


async def test_two_applications_in_one_process_have_their_own_buckets(clock: ManualClock) -> None:
    apps = [application(clock, CollectorRegistry()) for _ in range(2)]
    for app in apps:
        assert [(await drive(app, "/plain")).status for _ in range(3)] == [200, 200, 429]
