"""The public API as a type checker sees it: ``mypy --strict`` accepts this file, and every ignore in it is needed."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any, assert_type

import limits
from fastapi import Depends, FastAPI, Request, WebSocket
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

import seawall
from seawall import (
    EXPOSE_HEADERS,
    ConfigError,
    Decision,
    LimitExceeded,
    QuotaMiddleware,
    RateLimitMiddleware,
    Refusal,
    Seawall,
    charge,
    limit,
    metrics_app,
    time_left,
    usage,
)
from seawall.testing import Answer, ManualClock, disabled, drive, reset

app = FastAPI()
registry = CollectorRegistry()


async def identify(scope: Scope) -> str | None:
    return "acme"


def on_reject(scope: Scope, refusal: Refusal) -> ASGIApp | None:
    assert_type(refusal.status, int)
    assert_type(refusal.policies, tuple[str, ...])
    assert_type(refusal.retry_after, int | None)
    return PlainTextResponse("slow down", refusal.status)


# As a middleware: of the application, in a list, around anything.
app.add_middleware(Seawall, config="seawall.yaml")
app.add_middleware(Seawall, config=Path("seawall.yaml"), identify=identify, on_reject=on_reject, registry=registry)
app.add_middleware(Seawall, config={"version": 1, "plans": {"default": {"rate": "1/second"}}})
app.add_middleware(Seawall, default="100/minute", clock=ManualClock())
app.add_middleware(Seawall, default=limits.parse("100/minute"))
app.add_middleware(RateLimitMiddleware, limit="10/second", per="client_ip")
app.add_middleware(QuotaMiddleware, limit="10_000/day", zone="Europe/Berlin", per=["client_ip", "tenant"])
app.mount("/metrics", metrics_app(registry))
Starlette(middleware=[Middleware(Seawall, default="100/minute", identify=lambda scope: None)])
wrapped: ASGIApp = Seawall(app, default="100/minute")


# As a dependency and as a decorator: the endpoint keeps its type.
@app.get("/dependency", dependencies=[Depends(limit("5/minute"))])
async def dependency(_: Annotated[None, Depends(limit("5/minute", per=("tenant",), cost=2, name="mine"))]) -> str:
    return "ok"


@limit("5/minute", per="global")
async def decorated(item: int, q: str = "") -> bytes:
    return b"ok"


@limit(["1/second", limits.parse("5/minute")])
def synchronous(item: int) -> float:
    return 1.0


kept: Callable[[int], float] = synchronous
decorated("x")  # type: ignore[arg-type, unused-coroutine]


# About a request.
@app.get("/charge")
async def charging(request: Request) -> dict[str, int]:
    charge(request, 7)
    charge(request, 7.5)  # type: ignore[arg-type]
    left = usage(request)
    assert_type(left, dict[str, Decision])
    assert_type(left["rate"].remaining, int)
    assert_type(left["rate"].retry_after, float)
    left["rate"].remaining = 3  # type: ignore[misc]
    return {name: decision.remaining for name, decision in left.items()}


@app.websocket("/ws")
async def socket(websocket: WebSocket) -> None:
    charge(websocket, 1)
    usage(websocket)
    assert_type(time_left(websocket), float | None)
    assert_type(time_left(), float | None)


def errors() -> str:
    try:
        Seawall(app, config="seawall.yaml", default="1/second")
    except ConfigError as error:
        return str(error)
    except LimitExceeded as refused:
        assert_type(refused.status_code, int)
    return seawall.__version__


# Tests.
async def testing(receive: Receive, send: Send) -> None:
    clock = ManualClock(at="2028-02-28T23:59:59Z")
    clock.advance(1.5)
    assert_type(clock(), int)
    assert_type(clock.wall_ns(), int)
    with disabled():
        answer = await drive(wrapped, "/", method="POST", headers={"X-API-Key": "foo"})
    assert_type(answer, Answer)
    assert_type(answer.status, int)
    assert_type(answer.headers, dict[str, str])
    reset()


exposed: list[str] = EXPOSE_HEADERS
hook: Callable[[Any], str | None | Awaitable[str | None]] = identify
