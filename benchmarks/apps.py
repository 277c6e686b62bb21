"""The applications that are measured against each other, other than the peers': bare, the floor, Seawall.

All answer the same request, of one tenant known by its API key, from one address, with the same nine headers.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from hashlib import sha256
from time import monotonic_ns
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]

API_KEY = b"sk_live_4eC39HqLyjWDarjtT1zdp7dc"
PATH = "/v1/items/1042"
HEADERS: list[tuple[bytes, bytes]] = [
    (b"host", b"api.example.com"),
    (b"user-agent", b"python-httpx/0.28.1"),
    (b"accept", b"application/json"),
    (b"accept-encoding", b"gzip, deflate, br"),
    (b"connection", b"keep-alive"),
    (b"x-request-id", b"6f1c9a52-51d0-4a55-9c39-8a8a3b5e3c11"),
    (b"x-api-key", API_KEY),
    (b"cookie", b"theme=dark; session=2f1a7c0e9d"),
    (b"traceparent", b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"),
]


def request(**changes: Any) -> dict[str, Any]:
    """The scope of the request that is measured, as uvicorn makes it."""
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "server": ("127.0.0.1", 8000),
        "client": ("203.0.113.7", 51234),
        "scheme": "http",
        "method": "GET",
        "root_path": "",
        "path": PATH,
        "raw_path": PATH.encode(),
        "query_string": b"",
        "headers": HEADERS,
        "state": {},
        **changes,
    }


async def receive() -> Message:
    """A request without a body."""
    return {"type": "http.request", "body": b"", "more_body": False}


async def send(message: Message) -> None:
    """A server that takes anything at no cost."""


async def bare(scope: Scope, receive: Receive, send: Send) -> None:
    """An application that only answers: what every cost is added to."""
    await send(
        {
            "type": "http.response.start",
            "status": 200,
            "headers": [(b"content-type", b"application/json"), (b"content-length", b"12")],
        }
    )
    await send({"type": "http.response.body", "body": b'{"ok": true}'})


def passthrough(app: ASGIApp) -> ASGIApp:
    """The least that a middleware can do which sees the answer: a closure around ``send``, and nothing in it."""

    async def middleware(scope: Scope, receive: Receive, send: Send) -> None:
        async def watch(message: Message) -> None:
            await send(message)

        await app(scope, receive, watch)

    return middleware


REFUSAL_BODY = (
    b'{"type":"https://iana.org/assignments/http-problem-types#quota-exceeded","title":"Quota Exceeded","status":429}'
)
REFUSAL_HEADERS = [
    (b"content-type", b"application/problem+json"),
    (b"content-length", b"%d" % len(REFUSAL_BODY)),
    (b"retry-after", b"1"),
    (b"cache-control", b"no-store"),
]


async def refuse_at_once(scope: Scope, receive: Receive, send: Send) -> None:
    """The least that a refusal can cost: a prebuilt 429, whoever asks."""
    await send({"type": "http.response.start", "status": 429, "headers": REFUSAL_HEADERS})
    await send({"type": "http.response.body", "body": REFUSAL_BODY})


# The amounts of all limits below: never reached by a benchmark, yet never full again between two calls, so that no
# subject gets by with what an untouched bucket costs.
PER_HOUR = 50_000_000
PER_DAY = 1_000_000_000


def floor(app: ASGIApp, *, per_hour: int = PER_HOUR, per_day: int = PER_DAY) -> ASGIApp:
    """The work of three limits written out by hand, with nothing that could be configured: the floor.

    One function scans the headers for the API key, looks its SHA-256 up, takes one token from each of three integer
    buckets in plain dicts (a rate and a daily allowance of the tenant, a rate of the address), all or none, formats
    `RateLimit` and `RateLimit-Policy` for the tightest, and counts. It never forgets a key, matches no route, trusts
    the peer's address as it is, and cannot be told anything. What Seawall costs beyond it is what the rest costs.
    """
    tenants = {sha256(API_KEY).digest(): "acme"}
    tenant_rate: dict[str, int] = {}
    tenant_daily: dict[str, int] = {}
    address_rate: dict[str, int] = {}
    hourly, daily = 3600 * 10**9 // per_hour, 86400 * 10**9 // per_day
    hourly_capacity, daily_capacity = hourly * per_hour, daily * per_day
    policy = b'"rate";q=%d;w=3600, "quota";q=%d;w=86400, "per-ip";q=%d;w=3600' % (per_hour, per_day, per_hour)
    names = (b"rate", b"quota", b"per-ip")
    counters = [0, 0, 0, 0]

    async def middleware(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        tenant = None
        for name, value in scope["headers"]:
            if name == b"x-api-key":
                tenant = tenants.get(sha256(value).digest())
                break
        address = scope["client"][0]
        if tenant is None:
            tenant = address
        now = monotonic_ns()
        first = max(tenant_rate.get(tenant, 0), now) + hourly
        second = max(tenant_daily.get(tenant, 0), now) + daily
        third = max(address_rate.get(address, 0), now) + hourly
        r1 = (now + hourly_capacity - first) // hourly
        r2 = (now + daily_capacity - second) // daily
        r3 = (now + hourly_capacity - third) // hourly
        if r1 < 0 or r2 < 0 or r3 < 0:
            counters[1] += 1
            await refuse_at_once(scope, receive, send)
            return
        tenant_rate[tenant] = first
        tenant_daily[tenant] = second
        address_rate[address] = third
        counters[0] += 1
        tightest, left, wait = 0, r1, (first - now - 1) % hourly
        if r2 * per_hour < left * per_day:
            tightest, left, wait = 1, r2, (second - now - 1) % daily
        if tightest == 0 and r3 < left:
            tightest, left, wait = 2, r3, (third - now - 1) % hourly
        limit = b'"%b";r=%d;t=%d' % (names[tightest], left, wait // 10**9 + 1)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                counters[2] += 1
                message["headers"] = [*message["headers"], (b"ratelimit-policy", policy), (b"ratelimit", limit)]
            await send(message)

        await app(scope, receive, send_with_headers)
        counters[3] += 1

    return middleware


# Seawall

REJECT = "1/day"


def three_limits(rate: str | dict[str, Any] = f"{PER_HOUR}/hour") -> dict[str, Any]:
    """Identity by API key; a rate and a quota of the tenant, a rate of the address; headers and metrics: all of it."""
    return {
        "version": 1,
        "identity": {"tenant": [{"api_key": {"header": "X-API-Key"}}]},
        "plans": {"default": {"rate": rate, "quota": f"{PER_DAY}/day"}},
        "tenants": {"acme": {"plan": "default", "keys": ["sha256:" + sha256(API_KEY).hexdigest()]}},
        "routes": [
            {
                "name": "items",
                "match": {"path": "/v1/items/{id}"},
                "limits": {"per-ip": {"rate": f"{PER_HOUR}/hour", "per": "client_ip"}},
            }
        ],
        "shedding": {"algorithm": "off"},
        "metrics": {"path": "/metrics", "allow": ["127.0.0.1"]},
    }


def one_limit() -> dict[str, Any]:
    """The smallest file: one rate per address."""
    return {
        "version": 1,
        "plans": {"default": {"rate": f"{PER_HOUR}/hour"}},
        "shedding": {"algorithm": "off"},
    }


def seawall(app: ASGIApp, config: dict[str, Any], **settings: Any) -> ASGIApp:
    """The whole stack around ``app``, with a metrics registry of its own; ``settings`` go to `Seawall`."""
    from prometheus_client import CollectorRegistry

    from seawall import Seawall

    return Seawall(app, config, registry=CollectorRegistry(), **settings)  # type: ignore[no-any-return,unused-ignore]


def guarded() -> dict[str, Any]:
    """Three limits and overload control, with its defaults."""
    return {**three_limits(), "shedding": {"algorithm": "adaptive"}}


def crowded() -> ASGIApp:
    """Seawall where there is no room: every request is shed before anything is spent."""
    whole: Any = seawall(bare, guarded())
    prepared = False

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal prepared
        if not prepared:
            prepared = True
            for group in whole.gate.turnstile.limiter().groups:
                group.limit = group.in_flight = 1
        await whole(scope, receive, send)

    return app
