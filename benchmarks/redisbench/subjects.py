"""What is measured: limiters that share their counts through Redis, each set up as its own documentation says.

A **decision** is one awaited answer whether a caller may go on; a **request** is a whole call of an application with
the middleware around it, and is compared with the same application alone. Callers are told apart by their address. The
limits are never reached, or the first of them is used up from the first call on.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

import hiredis

from benchmarks import apps, peers
from benchmarks.apps import PER_DAY, PER_HOUR

if TYPE_CHECKING:
    from seawall.backends.redis import RedisBackend

POOL = 512
"""Connections that redis-py may open for each subject: with its default of 100 it raises at 256 callers."""
DAY = 86_400

Decide = Callable[[str], Awaitable[bool]]
"""Whether the caller with this address may go on."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What a subject is set up for: where its server is, and what it is to limit."""

    url: str
    prefix: str
    """What its keys begin with, where it can be told; no other subject's do."""
    limits: int
    """1: so many per hour. 3: per hour, day and minute."""
    denied: bool
    """Whether the first limit is one a day."""
    bucket: tuple[int, int] | None = None
    """Units a second and burst of Seawall's first limit, where they are to be others."""
    instances: int = 1
    """Processes that share the limit."""


Build = Callable[[Setup], AbstractAsyncContextManager[Decide]]


@dataclass(frozen=True, slots=True)
class Subject:
    """Something that is measured.

    ``base`` names what an admitted call is compared with, ``sends`` the commands it sends besides scripts, ``shared``
    says whether its counts are in Redis, ``refuses`` whether it ever does, ``ours`` whether a failure of it is ours.
    """

    name: str
    base: str
    build: Build
    sends: frozenset[str] = frozenset()
    shared: bool = True
    refuses: bool = True
    ours: bool = False


# The floors

# All or nothing over any number of token buckets: the instant at which each is full again, in microseconds.
SCRIPT = """
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local after = {}
for at = 1, #KEYS do
    local interval, burst = tonumber(ARGV[2 * at - 1]), tonumber(ARGV[2 * at])
    local full = tonumber(redis.call('GET', KEYS[at]) or now)
    after[at] = math.max(full, now) + interval
    if after[at] - now > interval * burst then
        return 0
    end
end
for at = 1, #KEYS do
    redis.call('SET', KEYS[at], string.format('%.2f', after[at]), 'PX', math.ceil((after[at] - now) / 1000) + 1)
end
return 1
"""


def script_arguments(setup: Setup) -> list[bytes]:
    """Of each limit the microseconds between two tokens, and the burst."""
    first = (DAY, 1) if setup.denied else (3_600, PER_HOUR)
    periods = (first, (DAY, PER_DAY), (60, PER_HOUR))[: setup.limits]
    return [b"%r" % number for seconds, amount in periods for number in (seconds * 1e6 / amount, amount)]


@asynccontextmanager
async def nothing(setup: Setup) -> AsyncIterator[Decide]:
    """What the callers themselves cost."""
    answer = not setup.denied

    async def decide(key: str) -> bool:
        return answer

    yield decide


class Wire:
    """RESP on a raw asyncio transport: replies are handed out in the order of commands, and nothing else is done."""

    def __init__(self) -> None:
        self._new_future = asyncio.get_running_loop().create_future
        self._pack = hiredis.pack_command
        self._reader = hiredis.Reader()
        self._waiting: deque[Any] = deque()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self._reader.feed(data)
        while (reply := self._reader.gets()) is not False:
            self._waiting.popleft().set_result(reply)

    def eof_received(self) -> None: ...

    def pause_writing(self) -> None: ...

    def resume_writing(self) -> None: ...

    def connection_lost(self, exc: Exception | None) -> None:
        for future in self._waiting:
            future.set_exception(exc or ConnectionError("closed"))

    def call(self, *command: bytes) -> Awaitable[Any]:
        """Send one command; its reply, once it is there."""
        future = self._new_future()
        self._waiting.append(future)
        self.transport.write(self._pack(command))
        return cast("Awaitable[Any]", future)


@asynccontextmanager
async def hiredis_socket(setup: Setup) -> AsyncIterator[Decide]:
    """One connection, one script call per decision, no pool, no deadline, no check of what comes back."""
    place = urlsplit(setup.url)
    _, wire = await asyncio.get_running_loop().create_connection(Wire, place.hostname, place.port)
    digest = await wire.call(b"SCRIPT", b"LOAD", SCRIPT.encode())
    prefix, arguments = setup.prefix.encode(), script_arguments(setup)
    endings = [b":%d" % number for number in range(setup.limits)]
    count = b"%d" % setup.limits

    async def decide(key: str) -> bool:
        start = prefix + key.encode()
        reply = await wire.call(b"EVALSHA", digest, count, *[start + ending for ending in endings], *arguments)
        return bool(reply == 1)

    try:
        yield decide
    finally:
        wire.transport.close()


@asynccontextmanager
async def evalsha(setup: Setup) -> AsyncIterator[Decide]:
    """The same script by `redis.asyncio`, as it comes."""
    from redis.asyncio import Redis

    async with Redis.from_url(setup.url, max_connections=POOL) as client:
        digest = await client.script_load(SCRIPT)
        prefix, arguments = setup.prefix, script_arguments(setup)

        async def decide(key: str) -> bool:
            keys = [f"{prefix}{key}:{number}" for number in range(setup.limits)]
            return bool(await client.evalsha(digest, len(keys), *keys, *arguments) == 1)

        yield decide


# Peers: decisions


@asynccontextmanager
async def limits(setup: Setup) -> AsyncIterator[Decide]:
    """`limits` with redis-py, fixed windows: one hit after the other, until one is refused."""
    from limits import RateLimitItemPerDay, RateLimitItemPerHour, RateLimitItemPerMinute
    from limits.aio.storage import RedisStorage
    from limits.aio.strategies import FixedWindowRateLimiter

    storage = RedisStorage(
        f"async+{setup.url}", implementation="redispy", key_prefix=setup.prefix, max_connections=POOL
    )
    limiter = FixedWindowRateLimiter(storage)
    first = RateLimitItemPerDay(1) if setup.denied else RateLimitItemPerHour(PER_HOUR)
    items = [first, RateLimitItemPerDay(PER_DAY), RateLimitItemPerMinute(PER_HOUR)][: setup.limits]

    async def decide(key: str) -> bool:
        for item in items:
            if not await limiter.hit(item, key):
                return False
        return True

    try:
        yield decide
    finally:
        await cast(Any, storage.bridge).storage.aclose()


@asynccontextmanager
async def throttled(setup: Setup) -> AsyncIterator[Decide]:
    """throttled-py with its default, a token bucket: one limit after the other, until one is refused."""
    from throttled.asyncio import Throttled, rate_limiter, store

    shared = store.RedisStore(server=setup.url, options={"CONNECTION_POOL_KWARGS": {"max_connections": POOL}})
    first = rate_limiter.per_day(1) if setup.denied else rate_limiter.per_hour(PER_HOUR)
    quotas = [first, rate_limiter.per_day(PER_DAY), rate_limiter.per_min(PER_HOUR)][: setup.limits]
    throttles = [
        Throttled(quota=quota, store=shared, key_prefix=f"{setup.prefix}{number}")
        for number, quota in enumerate(quotas)
    ]

    async def decide(key: str) -> bool:
        for throttle in throttles:
            if (await throttle.limit(key)).limited:
                return False
        return True

    try:
        yield decide
    finally:
        await shared._backend.get_client().aclose()


# Peers: whole requests


def whole(app: apps.ASGIApp) -> Decide:
    """A request of ``app`` from the address that is asked for, as a decision."""

    async def decide(key: str) -> bool:
        status = 0

        async def send(message: apps.Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]

        await app(apps.request(client=(key, 51234)), apps.receive, send)
        if status not in (200, 429):
            raise RuntimeError(f"answered {status}")
        return status == 200

    return decide


def alone(make: Callable[[], apps.ASGIApp]) -> Build:
    """An application without any limit."""

    @asynccontextmanager
    async def build(setup: Setup) -> AsyncIterator[Decide]:
        yield whole(make())

    return build


def slowapi(*, headers: bool) -> Build:
    """`SlowAPIASGIMiddleware`, the limits by address for every route. It blocks the event loop while it asks Redis."""

    @asynccontextmanager
    async def build(setup: Setup) -> AsyncIterator[Decide]:
        from slowapi import Limiter, _rate_limit_exceeded_handler
        from slowapi.errors import RateLimitExceeded
        from slowapi.middleware import SlowAPIASGIMiddleware
        from slowapi.util import get_remote_address

        first = "1/day" if setup.denied else f"{PER_HOUR}/hour"
        rates: list[Any] = [first, f"{PER_DAY}/day", f"{PER_HOUR}/minute"][: setup.limits]
        limiter = Limiter(
            key_func=get_remote_address,
            default_limits=rates,
            storage_uri=setup.url,
            key_prefix=setup.prefix,
            headers_enabled=headers,
        )

        def configure(app: Any) -> None:
            app.state.limiter = limiter
            app.add_exception_handler(RateLimitExceeded, _rate_limit_exceeded_handler)
            app.add_middleware(SlowAPIASGIMiddleware)

        logging.getLogger("slowapi").setLevel(logging.ERROR)  # or each refusal pays for a line on stderr
        try:
            yield whole(peers.starlette_app(configure))
        finally:
            cast(Any, limiter._storage).storage.close()

    return build


@asynccontextmanager
async def fastapi_limiter(setup: Setup) -> AsyncIterator[Decide]:
    """Its dependency on a FastAPI route, with pyrate-limiter's GCRA in Redis, which takes several rates in one call.

    The factory is what makes it count each caller: a `Limiter` on one bucket, as in its own first example, is one
    bucket for all of them.
    """
    from fastapi import Depends, FastAPI, Response
    from fastapi_limiter.depends import RateLimiter
    from pyrate_limiter import BucketFactory, Duration, Limiter, Rate, RateItem, RedisStateStore, StateBucket
    from redis.asyncio import Redis

    day, hour, minute = (int(duration) for duration in (Duration.DAY, Duration.HOUR, Duration.MINUTE))
    rates = [Rate(PER_HOUR, hour)]
    if setup.limits == 3:
        rates = [Rate(PER_HOUR, minute), Rate(PER_HOUR + 1, hour), Rate(PER_DAY, day)]
    if setup.denied:
        rates = [Rate(number, number * day) for number in range(1, setup.limits + 1)]

    class Buckets(BucketFactory):
        def __init__(self, client: Any) -> None:
            self.client = client
            self.buckets: dict[str, Any] = {}
            self.clock = RedisStateStore.default_clock

        def wrap_item(self, name: str, weight: int = 1) -> RateItem:
            return RateItem(name, self.clock.now(), weight=weight)

        def get(self, item: RateItem) -> Any:
            bucket = self.buckets.get(item.name)
            if bucket is None:
                store = RedisStateStore(self.client, f"{setup.prefix}{item.name}")
                bucket = self.buckets[item.name] = StateBucket(rates, store=store)
            return bucket

    async with Redis.from_url(setup.url, max_connections=POOL) as client:
        app = FastAPI(openapi_url=None)
        limiter = Limiter(Buckets(client))

        @app.get("/v1/items/{id}", dependencies=[Depends(RateLimiter(limiter=limiter))])
        async def item(id: str) -> Response:
            return Response(b'{"ok": true}', media_type="application/json")

        yield whole(app)


# Seawall

TIMEOUT_NS = 1_000_000_000
"""Far above the default: what a call costs is measured here, and not how long others kept the core."""


def store(setup: Setup, *, exact: bool) -> RedisBackend:
    """The backend, as it comes or with a call for every decision. It never decides by itself: that would be seen."""
    from seawall.backends.redis import RedisBackend

    return RedisBackend(
        setup.url,
        timeout_ns=TIMEOUT_NS,
        key_prefix=setup.prefix.rstrip(":"),
        secret="benchmark",
        instances=setup.instances,
        on_failure="deny",
        leases=not exact,
        deny_cache=not exact,
    )


def seawall(*, exact: bool) -> Build:
    """The backend alone: all limits of a caller in one spend."""

    @asynccontextmanager
    async def build(setup: Setup) -> AsyncIterator[Decide]:
        from seawall.backends import Verdict
        from seawall.rate import SECOND, Quota, Rate

        first = Rate(1, DAY * SECOND) if setup.denied else Rate(PER_HOUR, 3_600 * SECOND)
        if setup.bucket:
            first = Rate(setup.bucket[0], SECOND, setup.bucket[1])
        backend = store(setup, exact=exact)
        rates = (first, Quota(PER_DAY, "day"), Rate(PER_HOUR, 60 * SECOND))[: setup.limits]
        meters = [backend.meter(f"limit-{number}", "address", rate) for number, rate in enumerate(rates)]

        async def decide(key: str) -> bool:
            verdict = backend.spend([(meter, key, 1) for meter in meters])
            if type(verdict) is not Verdict:
                verdict = await cast("Awaitable[Verdict | None]", verdict)
                if verdict is None:
                    raise RuntimeError("decided without the server")
            return verdict.admitted

        try:
            yield decide
        finally:
            await backend.aclose()

    return build


def seawall_request(*, shared: bool, exact: bool = False) -> Build:
    """The whole middleware, with headers and metrics, on shared state or in memory."""

    @asynccontextmanager
    async def build(setup: Setup) -> AsyncIterator[Decide]:
        plan: dict[str, Any] = {"rate": "1/day" if setup.denied else f"{PER_HOUR}/hour"}
        config: dict[str, Any] = {
            "version": 1,
            "plans": {"default": plan},
            "shedding": {"algorithm": "off"},
            "backend": {"max_keys": 1_000_000},
        }
        if setup.limits == 3:
            plan["quota"] = f"{PER_DAY}/day"
            per_ip = {"rate": f"{PER_HOUR}/minute", "per": "client_ip"}
            config["routes"] = [{"name": "items", "match": {"path": "/v1/items/{id}"}, "limits": {"per-ip": per_ip}}]
        if not shared:
            yield whole(apps.seawall(apps.bare, config))
            return
        backend = store(setup, exact=exact)
        try:
            yield whole(apps.seawall(apps.bare, config, backend=backend))
        finally:
            await backend.aclose()

    return build


NOTHING = "awaiting nothing"
SEAWALL = "Seawall"
SEAWALL_EXACT = "Seawall, exact"
SEAWALL_REQUEST = "Seawall, request"
SEAWALL_EXACT_REQUEST = "Seawall, exact, request"
SEAWALL_MEMORY_REQUEST = "Seawall in memory, request"
HIREDIS = "floor: hiredis on a raw socket"
EVALSHA = "plain evalsha by redis-py"
LIMITS = "limits (redis-py)"
THROTTLED = "throttled-py"
BARE = "bare ASGI application"
STARLETTE = "bare Starlette application"
FASTAPI = "bare FastAPI application"
SLOWAPI = "slowapi, request"
SLOWAPI_HEADERS = "slowapi with headers, request"
FASTAPI_LIMITER = "fastapi-limiter, request"

SUBJECTS = (
    Subject(NOTHING, NOTHING, nothing, shared=False, ours=True),
    Subject(HIREDIS, NOTHING, hiredis_socket, ours=True),
    Subject(EVALSHA, NOTHING, evalsha, ours=True),
    Subject(SEAWALL, NOTHING, seawall(exact=False), ours=True),
    Subject(SEAWALL_EXACT, NOTHING, seawall(exact=True), ours=True),
    Subject(LIMITS, NOTHING, limits),
    Subject(THROTTLED, NOTHING, throttled),
    Subject(BARE, NOTHING, alone(lambda: apps.bare), shared=False, refuses=False, ours=True),
    Subject(STARLETTE, NOTHING, alone(peers.starlette_app), shared=False, refuses=False),
    Subject(FASTAPI, NOTHING, alone(peers.fastapi_app), shared=False, refuses=False),
    Subject(SEAWALL_REQUEST, BARE, seawall_request(shared=True), ours=True),
    Subject(SEAWALL_EXACT_REQUEST, BARE, seawall_request(shared=True, exact=True), ours=True),
    Subject(SEAWALL_MEMORY_REQUEST, BARE, seawall_request(shared=False), shared=False, ours=True),
    Subject(SLOWAPI, STARLETTE, slowapi(headers=False)),
    Subject(SLOWAPI_HEADERS, STARLETTE, slowapi(headers=True), frozenset({"get", "ttl"})),
    Subject(FASTAPI_LIMITER, FASTAPI, fastapi_limiter),
)


def named(name: str) -> Subject:
    """The subject of that name."""
    return next(subject for subject in SUBJECTS if subject.name == name)
