"""The peers, each set up as its own documentation says, in memory, with limits that are never reached.

Those that are written for Starlette or FastAPI (they read ``scope["app"]``) are added to a Starlette or FastAPI
application by ``add_middleware`` and compared with the same application without them; the others wrap the bare ASGI
application. Where a peer can take its key from a header it takes the API key, as Seawall does here.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any

from benchmarks.apps import PER_DAY, PER_HOUR, ASGIApp

PACKAGES = (
    "limits",
    "slowapi",
    "asgi-ratelimit",
    "traffik",
    "fastapi-guard",
    "starlette",
    "fastapi",
    "uvicorn",
    "uvloop",
    "httptools",
    "prometheus-client",
)

Hit = Callable[[], Awaitable[Any]]


# Frameworks


def starlette_app(configure: Callable[[Any], None] = lambda app: None) -> ASGIApp:
    """A Starlette application with one route, and whatever ``configure`` adds."""
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

    async def item(request: Request) -> Response:
        return Response(b'{"ok": true}', media_type="application/json")

    app = Starlette(routes=[Route("/v1/items/{id}", item)])
    configure(app)
    return app


def fastapi_app(configure: Callable[[Any], None] = lambda app: None) -> ASGIApp:
    """The same as a FastAPI application."""
    from fastapi import FastAPI, Response

    app = FastAPI(openapi_url=None)

    @app.get("/v1/items/{id}")
    async def item(id: str) -> Response:
        return Response(b'{"ok": true}', media_type="application/json")

    configure(app)
    return app


# limits: no middleware of its own; a hit is what an application would await


def limits_hit(strategy: str, hits: int) -> Hit:
    """``hits`` awaited hits on a new ``limits.aio.storage.MemoryStorage``, each of a limit of its own."""
    from limits import RateLimitItemPerDay, RateLimitItemPerHour, RateLimitItemPerMinute
    from limits.aio.storage import MemoryStorage
    from limits.aio.strategies import (
        FixedWindowRateLimiter,
        MovingWindowRateLimiter,
        RateLimiter,
        SlidingWindowCounterRateLimiter,
    )

    strategies: dict[str, type[RateLimiter]] = {
        "fixed": FixedWindowRateLimiter,
        "sliding": SlidingWindowCounterRateLimiter,
        "moving": MovingWindowRateLimiter,
    }
    limiter = strategies[strategy](MemoryStorage())
    hour, day, minute = RateLimitItemPerHour(PER_HOUR), RateLimitItemPerDay(PER_DAY), RateLimitItemPerMinute(PER_HOUR)

    async def one() -> bool:
        return await limiter.hit(hour, "acme")

    async def three() -> bool:
        return (
            await limiter.hit(hour, "acme")
            and await limiter.hit(day, "acme")
            and await limiter.hit(minute, "203.0.113.7")
        )

    return {1: one, 3: three}[hits]


def limits_fill(keys: int) -> tuple[Callable[[str], Awaitable[bool]], Callable[[], Awaitable[None]]]:
    """A fixed window over ``keys`` callers: a hit for one of them, and what makes all of them known."""
    from limits import RateLimitItemPerDay
    from limits.aio.storage import MemoryStorage
    from limits.aio.strategies import FixedWindowRateLimiter

    limiter = FixedWindowRateLimiter(MemoryStorage())
    day = RateLimitItemPerDay(PER_DAY)

    async def hit(key: str) -> bool:
        return await limiter.hit(day, key)

    async def fill() -> None:
        for number in range(keys):
            await limiter.hit(day, f"tenant-{number}")

    return hit, fill


# slowapi


def _api_key(request: Any) -> str:
    return str(request.headers["x-api-key"])


def slowapi_app(limits: int, *, base_http: bool, refuse: bool = False) -> ASGIApp:
    """`SlowAPIASGIMiddleware` or `SlowAPIMiddleware`, limits by API key for every route, headers enabled."""
    from slowapi import Limiter, _rate_limit_exceeded_handler
    from slowapi.errors import RateLimitExceeded
    from slowapi.middleware import SlowAPIASGIMiddleware, SlowAPIMiddleware

    rates: list[Any] = [f"{PER_HOUR}/hour", f"{PER_DAY}/day", f"{PER_HOUR}/minute"][:limits]
    if refuse:
        rates[0] = "1/day"

    def configure(app: Any) -> None:
        app.state.limiter = Limiter(key_func=_api_key, default_limits=rates, headers_enabled=True)
        app.add_exception_handler(RateLimitExceeded, _rate_limit_exceeded_handler)
        app.add_middleware(SlowAPIMiddleware if base_http else SlowAPIASGIMiddleware)

    logging.getLogger("slowapi").setLevel(logging.ERROR)  # or each refusal pays for a line on stderr
    return starlette_app(configure)


# asgi-ratelimit


def asgi_ratelimit(app: ASGIApp, limits: int) -> ASGIApp:
    """`RateLimitMiddleware` on its memory backend, a rule of one or three windows for every path. Sends no headers."""
    from ratelimit import RateLimitMiddleware, Rule
    from ratelimit.backends.simple import MemoryBackend

    async def authenticate(scope: Any) -> tuple[str, str]:
        for name, value in scope["headers"]:
            if name == b"x-api-key":
                return value.decode(), "default"
        return "anonymous", "default"

    rule = (
        Rule(hour=PER_HOUR, zone="all")
        if limits == 1
        else Rule(minute=PER_HOUR, hour=PER_HOUR, day=PER_DAY, zone="all")
    )
    return RateLimitMiddleware(app, authenticate, MemoryBackend(), {r"^/": [rule]})  # type: ignore[no-untyped-call,unused-ignore]


# traffik


def traffik_app(limits: int) -> ASGIApp:
    """`ThrottleMiddleware` with one or three `HTTPThrottle` on the in-memory backend, its default strategy."""
    from traffik import HTTPThrottle
    from traffik.backends.inmemory import InMemoryBackend
    from traffik.middleware import ThrottleMiddleware

    async def by_key(connection: Any) -> str:
        return str(connection.headers["x-api-key"])

    async def by_address(connection: Any) -> str:
        return str(connection.client.host)

    settings = [("rate", f"{PER_HOUR}/hour", by_key), ("quota", f"{PER_DAY}/day", by_key)]
    settings.append(("per-ip", f"{PER_HOUR}/hour", by_address))

    def configure(app: Any) -> None:
        throttles = [
            HTTPThrottle(uid=f"bench:{limits}:{uid}", rate=rate, identifier=identifier)
            for uid, rate, identifier in settings[:limits]
        ]
        backend: Any = InMemoryBackend(namespace=f"bench{limits}")
        app.add_middleware(ThrottleMiddleware, middleware_throttles=throttles, backend=backend)

    return starlette_app(configure)


# fastapi-guard


def fastapi_guard() -> ASGIApp:
    """`SecurityMiddleware` with rate limiting by address and its other protections off, as far as they go off."""
    from guard import SecurityConfig, SecurityMiddleware

    config = SecurityConfig(
        enable_redis=False,
        enable_rate_limiting=True,
        rate_limit=PER_HOUR,
        rate_limit_window=60,
        enable_ip_banning=False,
        enable_penetration_detection=False,
        enable_cors=False,
        security_headers=None,
        log_request_level=None,
        log_suspicious_level=None,
    )

    def configure(app: Any) -> None:
        app.add_middleware(SecurityMiddleware, config=config)

    logging.getLogger("guard_core").setLevel(logging.ERROR)
    return fastapi_app(configure)


# Seawall in the same frameworks, for the same comparison


def seawall_on(framework: Callable[[Callable[[Any], None]], ASGIApp], config: dict[str, Any]) -> ASGIApp:
    """Seawall added to a framework's application as a user adds it."""
    from prometheus_client import CollectorRegistry

    from seawall import Seawall

    return framework(lambda app: app.add_middleware(Seawall, config=config, registry=CollectorRegistry()))
