"""The servers under test: one uvicorn worker on a core of its own, an application, and what guards it.

The applications burn processor time by a count of loops, never by the clock, so that a core that is shared shows. The
guards: none; uvicorn's ``--limit-concurrency``; a fixed limit written by hand; aioresilience's adaptive limiter as its
documentation sets it up; Seawall from a configuration. ``refuse`` answers nothing but a prebuilt 503: the floor of a
refusal on this server.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import Any

from benchmarks import apps, harness
from benchmarks.apps import ASGIApp, Message, Receive, Scope, Send
from benchmarks.overload.generator import STREAMS, TICK
from benchmarks.server import SERVER_CORE, Running
from benchmarks.server import _child as child

IO_SECONDS, CPU_MS, NEVER_MS = 0.010, 3.0, 4.0
"""What a request does: wait without the processor, use it; and use it where nothing is waited for."""
DOWNSTREAM, SLOWER = 20, 20
"""Places of the downstream service, and how many times slower it is while it is slow."""
DOWNSTREAM_MAX = DOWNSTREAM / (IO_SECONDS * SLOWER)
"""What the slow downstream can do, in requests per second."""
EVENT_SECONDS = 2.0
"""Between two events of a stream."""

TENANTS = tuple(f"t{number}" for number in range(10))
CLASSES = ("critical", "normal", "low", "background")
FIXED = {"await": 12, "never": 4, "threads": 12, "mix": 12, "downstream": 12, "streams": 12}
"""The fixed limit by application, found by trial: at .7 C it refuses next to nothing, at 10 C the p99 is about three
times as long. Where handlers never await, none helps: nothing is ever in flight when a request arrives."""
ABOVE_OPEN = 32
"""uvicorn's limit, over the connections that callers keep open. It counts those too, so that a lower one refuses
everybody until enough of them are closed."""


@dataclass(frozen=True, slots=True)
class Serving:
    """One server: what is served, how, and how long it may live."""

    subject: str
    app: str
    loops_per_ms: float
    http: str = "httptools"
    loop: str = "uvloop"
    connections: int = 0
    """That callers hold open beforehand, streams included."""
    limit: float = 120.0
    """Seconds after which it ends by itself, whatever has become of its parent."""


# Work


def burn(loops: int) -> int:
    """Use the processor for a number of loops."""
    value = 1
    for _ in range(loops):
        value = value * 48271 % 2147483647
    return value


def calibrate() -> float:
    """Loops that take a millisecond of processor time here: the median of many short trials."""
    loops, taken = 4_000, []
    for _ in range(200):
        began = time.thread_time_ns()
        burn(loops)
        taken.append((time.thread_time_ns() - began) / 1e6)
    return loops / harness.percentile(taken, 0.5)


# Applications


def awaiting(loops: int) -> ASGIApp:
    """Waits without the processor first, and uses it after."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(IO_SECONDS)
        burn(loops)
        await apps.bare(scope, receive, send)

    return app


def never_awaiting(loops: int) -> ASGIApp:
    """Runs from its start to its end in one step of the event loop."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        burn(loops)
        await apps.bare(scope, receive, send)

    return app


def mixed(one: ASGIApp, other: ASGIApp) -> ASGIApp:
    """Every second request to each."""
    turn = False

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal turn
        turn = not turn
        await (one if turn else other)(scope, receive, send)

    return app


def in_threads(loops: int) -> ASGIApp:
    """A ``def`` handler of Starlette: it blocks and then burns in the thread pool, under the interpreter's lock."""
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

    def handler(request: Request) -> Response:
        time.sleep(IO_SECONDS)
        burn(loops)
        return Response(b'{"ok": true}', media_type="application/json")

    return Starlette(routes=[Route("/v1/items/{id}", handler)])


def with_downstream(loops: int) -> ASGIApp:
    """Calls a service with `DOWNSTREAM` places; SIGUSR1 makes that service `SLOWER` times slower, SIGUSR2 mends it.

    The switch is a signal and not a request, because a request to an overloaded server might be refused.
    """
    places = asyncio.Semaphore(DOWNSTREAM)
    delay = IO_SECONDS

    def switch(seconds: float) -> Callable[[int, Any], None]:
        def handler(number: int, frame: Any) -> None:
            nonlocal delay
            delay = seconds

        return handler

    signal.signal(signal.SIGUSR1, switch(IO_SECONDS * SLOWER))
    signal.signal(signal.SIGUSR2, switch(IO_SECONDS))

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async with places:
            await asyncio.sleep(delay)
        burn(loops)
        await apps.bare(scope, receive, send)

    return app


def streaming(other: ASGIApp) -> ASGIApp:
    """SSE and WebSocket below `STREAMS`, an event every `EVENT_SECONDS`; everything else to ``other``."""
    event = b"data: " + TICK + b"\n\n"

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if not scope["path"].startswith(STREAMS):
            await other(scope, receive, send)
            return
        await receive()
        if scope["type"] == "websocket":
            await send({"type": "websocket.accept"})
            message: Message = {"type": "websocket.send", "bytes": TICK}
        else:
            headers = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-store")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            message = {"type": "http.response.body", "body": event, "more_body": True}
        gone = asyncio.ensure_future(receive())
        while not gone.done():
            await send(message)
            await asyncio.wait([gone], timeout=EVENT_SECONDS)

    return app


def application(name: str, loops_per_ms: float) -> ASGIApp:
    """One of the applications by name."""
    work, longer = round(CPU_MS * loops_per_ms), round(NEVER_MS * loops_per_ms)
    match name:
        case "await":
            return awaiting(work)
        case "never":
            return never_awaiting(longer)
        case "threads":
            return in_threads(work)
        case "mix":
            return mixed(awaiting(work), never_awaiting(longer))
        case "downstream":
            return with_downstream(work)
        case "streams":
            return streaming(awaiting(work))
    raise ValueError(f"no application {name}")


# Guards


UNAVAILABLE_BODY = b'{"type":"about:blank","title":"Service Unavailable","status":503}'
UNAVAILABLE: Message = {
    "type": "http.response.start",
    "status": 503,
    "headers": [
        (b"content-type", b"application/problem+json"),
        (b"content-length", b"%d" % len(UNAVAILABLE_BODY)),
        (b"retry-after", b"1"),
        (b"cache-control", b"no-store"),
    ],
}


async def refuse(scope: Scope, receive: Receive, send: Send) -> None:
    """The least that a refusal can cost: a prebuilt 503, whoever asks."""
    await send(UNAVAILABLE)
    await send({"type": "http.response.body", "body": UNAVAILABLE_BODY})


def fixed(app: ASGIApp, limit: int) -> ASGIApp:
    """At most ``limit`` requests in flight, streams apart, the others refused at once: what one writes by hand."""
    in_flight = 0

    async def middleware(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal in_flight
        if scope["type"] != "http" or scope["path"].startswith(STREAMS):
            await app(scope, receive, send)
            return
        if in_flight >= limit:
            await refuse(scope, receive, send)
            return
        in_flight += 1
        try:
            await app(scope, receive, send)
        finally:
            in_flight -= 1

    return middleware


def aioresilience(app: ASGIApp) -> ASGIApp:
    """Its adaptive limiter and its middleware for Starlette, with the numbers of its documentation."""
    from aioresilience import AdaptiveConcurrencyLimiter
    from aioresilience.config import AdaptiveConcurrencyConfig
    from aioresilience.integrations.fastapi import AdaptiveConcurrencyMiddleware

    limiter = AdaptiveConcurrencyLimiter("benchmark", AdaptiveConcurrencyConfig(initial_limit=100))
    return AdaptiveConcurrencyMiddleware(app, limiter=limiter)  # type: ignore[no-any-return,unused-ignore]


def key_of(tenant: str) -> str:
    """The API key of a tenant."""
    return f"sk_live_{sha256(tenant.encode()).hexdigest()[:24]}"


def seawall_config() -> dict[str, Any]:
    """Nothing but overload: ten equal tenants, one more per class, streams in a budget of their own."""
    tenants = {name: {"keys": [_hashed(name)]} for name in TENANTS}
    classed = {name: {"keys": [_hashed(name)], "priority": name} for name in CLASSES}
    return {
        "version": 1,
        "identity": {"tenant": [{"api_key": {"header": "X-API-Key"}}]},
        "plans": {"default": {"rate": "unlimited"}},
        "tenants": {**tenants, **classed},
        "routes": [{"name": "events", "match": {"path": STREAMS + "**"}, "streaming": {"max": 1000}}],
        "priorities": {"critical": {}, "normal": {}, "low": {}, "background": {"min_share": "2%"}},
        "shedding": {"algorithm": "adaptive"},
    }


def _hashed(tenant: str) -> str:
    return "sha256:" + sha256(key_of(tenant).encode()).hexdigest()


SUBJECTS: Mapping[str, str] = {
    "bare": "bare application",
    "uvicorn": "uvicorn --limit-concurrency, by hand",
    "fixed": "fixed limit, by hand",
    "aioresilience": "aioresilience, adaptive",
    "seawall": "Seawall, adaptive",
}
"""What is compared, and what the tables call it."""


def guarded(serving: Serving) -> tuple[ASGIApp, dict[str, Any]]:
    """The application behind its guard, and the settings of uvicorn that are part of the guard."""
    if serving.subject == "refuse":
        return refuse, {}
    app = application(serving.app, serving.loops_per_ms)
    match serving.subject:
        case "bare":
            return app, {}
        case "uvicorn":
            return app, {"limit_concurrency": serving.connections + ABOVE_OPEN}
        case "fixed":
            return fixed(app, FIXED[serving.app]), {}
        case "aioresilience":
            return aioresilience(app), {}
        case "seawall":
            return apps.seawall(app, seawall_config()), {}
    raise ValueError(f"no subject {serving.subject}")


# Processes


@contextmanager
def serve(serving: Serving) -> Iterator[Running]:
    """A server in a process group of its own, which ends with the block."""
    with child([sys.executable, "-m", "benchmarks.overload.servers", json.dumps(asdict(serving))]) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line.strip().isdecimal():
            raise RuntimeError(line.strip() or f"ended at start with exit code {process.wait(10)}")
        yield Running(process, int(line))


def main() -> None:
    """Serve what the first argument says on a free port, which is printed; without one, print `calibrate`'s number."""
    harness.pin(SERVER_CORE)
    if len(sys.argv) < 2:
        json.load(sys.stdin)
        print(json.dumps(calibrate()))
        return
    serving = Serving(**json.loads(sys.argv[1]))
    signal.alarm(max(1, round(serving.limit)))
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    import uvicorn

    try:
        app, settings = guarded(serving)
    except Exception as error:
        print(f"{type(error).__name__}: {error}".splitlines()[0], flush=True)
        raise SystemExit(0) from None
    config = uvicorn.Config(
        app,
        http=serving.http,
        loop=serving.loop,
        lifespan="off",
        log_level="warning",
        access_log=False,
        timeout_keep_alive=75,  # idle connections of the generator are not what is measured
        **settings,
    )
    with socket.create_server(("127.0.0.1", 0), backlog=config.backlog) as listener:
        print(listener.getsockname()[1], flush=True)
        if serving.subject == "uvicorn":  # it logs every refusal, as it does by default: at full cost, unseen
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main()
