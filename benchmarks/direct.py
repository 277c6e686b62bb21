"""Direct ASGI calls: what a middleware adds to a request when no server, socket or parser is in the way.

Each subject is called on a running event loop with the same scope, made anew for each call, and compared with the
application it wraps (or, for `limits`, which has no middleware, with awaiting a coroutine that does nothing). On a
*yielding* loop the loop gets a turn after every call, as it does in a server; work that a subject hands to a
background task is then paid for in the slot that caused it, and not after it.

Time is the process's own processor time, threads included: what a call costs, not how long others kept the core.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks import apps, harness, peers
from benchmarks.harness import Summary

Batch = Callable[[int], Awaitable[int]]
"""Makes that many calls; nanoseconds of processor time that took."""

BARE = "bare ASGI application"
BARE_YIELDING = "bare ASGI application, yielding loop"
NOTHING = "awaiting nothing"
NOTHING_YIELDING = "awaiting nothing, yielding loop"
STARLETTE = "bare Starlette application"
FASTAPI = "bare FastAPI application"
FLOOR = "floor: 3 limits written out by hand"
SEAWALL_3 = "Seawall, 3 limits"
SEAWALL_3_YIELDING = "Seawall, 3 limits, yielding loop"
LIMITS_1_YIELDING = "limits fixed window, 1 hit, yielding loop"

PREBUILT = "prebuilt 429 at once"
SEAWALL_REFUSING = "Seawall refusing, 3 limits"
SEAWALL_GUARDED = "Seawall, 3 limits and overload control, yielding loop"
SEAWALL_SHEDDING = "Seawall shedding"


@dataclass(frozen=True, slots=True)
class Subject:
    """Something that is measured.

    ``build`` makes the application (or, with ``hit``, the function whose result is awaited), ``base`` names the
    subject that is subtracted, ``status`` is what every call must answer, ``fresh`` builds it anew for each slot
    because its state grows with each call.
    """

    name: str
    base: str | None
    build: Callable[[], Any]
    status: int = 200
    hit: bool = False
    yielding: bool = False
    fresh: bool = False
    ours: bool = False


async def nothing() -> None:
    """What awaiting a coroutine costs."""


SUBJECTS = (
    Subject(BARE, None, lambda: apps.bare, ours=True),
    Subject("pure ASGI middleware, closure only", BARE, lambda: apps.passthrough(apps.bare), ours=True),
    Subject(FLOOR, BARE, lambda: apps.floor(apps.bare), ours=True),
    Subject("Seawall, 1 limit", BARE, lambda: apps.seawall(apps.bare, apps.one_limit()), ours=True),
    Subject(SEAWALL_3, BARE, lambda: apps.seawall(apps.bare, apps.three_limits()), ours=True),
    Subject(BARE_YIELDING, None, lambda: apps.bare, yielding=True, ours=True),
    Subject(
        SEAWALL_3_YIELDING,
        BARE_YIELDING,
        lambda: apps.seawall(apps.bare, apps.three_limits()),
        yielding=True,
        ours=True,
    ),
    Subject(
        SEAWALL_GUARDED,
        SEAWALL_3_YIELDING,
        lambda: apps.seawall(apps.bare, apps.guarded()),
        yielding=True,
        ours=True,
    ),
    Subject("asgi-ratelimit, 1 limit", BARE, lambda: peers.asgi_ratelimit(apps.bare, 1)),
    Subject("asgi-ratelimit, 3 limits", BARE, lambda: peers.asgi_ratelimit(apps.bare, 3)),
    Subject(NOTHING, None, lambda: nothing, hit=True, ours=True),
    Subject(NOTHING_YIELDING, None, lambda: nothing, hit=True, yielding=True, ours=True),
    Subject("limits fixed window, 1 hit", NOTHING, lambda: peers.limits_hit("fixed", 1), hit=True),
    Subject(LIMITS_1_YIELDING, NOTHING_YIELDING, lambda: peers.limits_hit("fixed", 1), hit=True, yielding=True),
    Subject("limits fixed window, 3 hits", NOTHING, lambda: peers.limits_hit("fixed", 3), hit=True),
    Subject(
        "limits fixed window, 3 hits, yielding loop",
        NOTHING_YIELDING,
        lambda: peers.limits_hit("fixed", 3),
        hit=True,
        yielding=True,
    ),
    Subject(
        "limits sliding window, 1 hit, yielding loop",
        NOTHING_YIELDING,
        lambda: peers.limits_hit("sliding", 1),
        hit=True,
        yielding=True,
    ),
    Subject(
        "limits moving window, 1 hit, yielding loop",
        NOTHING_YIELDING,
        lambda: peers.limits_hit("moving", 1),
        hit=True,
        yielding=True,
        fresh=True,
    ),
    Subject(STARLETTE, None, peers.starlette_app),
    Subject(
        "Seawall on Starlette, 3 limits",
        STARLETTE,
        lambda: peers.seawall_on(peers.starlette_app, apps.three_limits()),
    ),
    Subject("traffik, 1 limit", STARLETTE, lambda: peers.traffik_app(1)),
    Subject("traffik, 3 limits", STARLETTE, lambda: peers.traffik_app(3)),
    Subject("slowapi ASGI, 1 limit", STARLETTE, lambda: peers.slowapi_app(1, base_http=False)),
    Subject("slowapi ASGI, 3 limits", STARLETTE, lambda: peers.slowapi_app(3, base_http=False)),
    Subject("slowapi BaseHTTP, 1 limit", STARLETTE, lambda: peers.slowapi_app(1, base_http=True)),
    Subject("slowapi BaseHTTP, 3 limits", STARLETTE, lambda: peers.slowapi_app(3, base_http=True)),
    Subject(FASTAPI, None, peers.fastapi_app),
    Subject("Seawall on FastAPI, 3 limits", FASTAPI, lambda: peers.seawall_on(peers.fastapi_app, apps.three_limits())),
    Subject("fastapi-guard, 1 limit", FASTAPI, peers.fastapi_guard),
)

REFUSALS = (
    Subject(BARE, None, lambda: apps.bare, ours=True),
    Subject(PREBUILT, None, lambda: apps.refuse_at_once, 429, ours=True),
    Subject("floor refusing", PREBUILT, lambda: apps.floor(apps.bare, per_hour=1), 429, ours=True),
    Subject(
        SEAWALL_REFUSING, PREBUILT, lambda: apps.seawall(apps.bare, apps.three_limits(apps.REJECT)), 429, ours=True
    ),
    Subject(SEAWALL_SHEDDING, PREBUILT, apps.crowded, 503, ours=True),
    Subject(
        "slowapi ASGI refusing, 3 limits", PREBUILT, lambda: peers.slowapi_app(3, base_http=False, refuse=True), 429
    ),
    Subject("slowapi BaseHTTP refusing", PREBUILT, lambda: peers.slowapi_app(3, base_http=True, refuse=True), 429),
)


@dataclass(slots=True)
class Row:
    """What was found about one subject. Microseconds; ``headers`` is how many limit headers an answer carries."""

    name: str
    base: str | None
    total: Summary | None = None
    added: Summary | None = None
    times_floor: Summary | None = None
    headers: int | None = None
    ours: bool = False
    failure: str = ""


def measure(
    subjects: Sequence[Subject], *, rounds: int, seconds: float, seed: int, progress: Callable[[str], None]
) -> list[Row]:
    """Measure all ``subjects`` in one interleaved run, in slots of about ``seconds``; one row for each, in order."""
    rows = {subject.name: Row(subject.name, subject.base, ours=subject.ours) for subject in subjects}
    slots: dict[str, Callable[[], float]] = {}
    with asyncio.Runner() as runner:
        for subject in subjects:
            try:
                rows[subject.name].headers = runner.run(check(subject))
                slots[subject.name] = slot(subject, runner, seconds)
            except Exception as error:
                rows[subject.name].failure = f"failed: {type(error).__name__}: {error}".splitlines()[0]
                progress(f"{subject.name}: {rows[subject.name].failure}")
        gc.collect()
        gc.freeze()  # what is alive now is everybody's, and should not be walked in anybody's slot
        try:
            samples = harness.interleave(slots, rounds=rounds, seed=seed, progress=progress)
        finally:
            gc.unfreeze()
    added: dict[str, list[float]] = {}
    for name, taken in samples.items():
        row = rows[name]
        row.total = Summary.of(taken).scaled(1e-3)
        if row.base in samples:
            added[name] = harness.differences(taken, samples[row.base])
            row.added = Summary.of(added[name]).scaled(1e-3)
    for name, costs in added.items():
        if FLOOR in added and (shares := harness.ratios(costs, added[FLOOR])):
            rows[name].times_floor = Summary.of(shares)
    return list(rows.values())


async def check(subject: Subject) -> int | None:
    """Call a new instance until it is warm, be sure of its answer; how many limit headers it sends."""
    made = subject.build()
    if subject.hit:
        for _ in range(4):
            if await made() is False:
                raise RuntimeError("refused within its limit")
        return None
    answers: list[apps.Message] = []

    async def send(message: apps.Message) -> None:
        if message["type"] == "http.response.start":
            answers.append(message)

    for _ in range(8):
        await made(apps.request(), apps.receive, send)
    statuses = [answer["status"] for answer in answers]
    if len(statuses) != 8 or statuses[-1] != subject.status:
        raise RuntimeError(f"answered {statuses}, not {subject.status}")
    names = [bytes(name).lower() for name, _ in answers[-1]["headers"]]
    return sum(name.startswith((b"ratelimit", b"x-ratelimit")) or name == b"retry-after" for name in names)


def slot(subject: Subject, runner: asyncio.Runner, seconds: float) -> Callable[[], float]:
    """A function that makes one slot's calls of ``subject`` and says how many nanoseconds one took."""
    batch = batches(subject)

    def time_calls(calls: int) -> float:
        return runner.run(settled(batch(), calls)) / 1e9

    calls = harness.calls_for(seconds, time_calls, at_most=1_000 if subject.fresh else 100_000)
    time_calls(calls)
    return lambda: time_calls(calls) * 1e9 / calls


def batches(subject: Subject) -> Callable[[], Batch]:
    """What gives the batch of a slot: always the same one, or one around a new instance where state would grow."""
    if subject.fresh:
        return lambda: batch_of(subject, subject.build())
    batch = batch_of(subject, subject.build())
    return lambda: batch


def batch_of(subject: Subject, made: Any) -> Batch:
    """A batch around one instance: one of four loops, so that none of them pays for the others."""
    receive, send, sleep, clock = apps.receive, apps.send, asyncio.sleep, time.process_time_ns

    async def requests(calls: int) -> int:
        began = clock()
        for _ in range(calls):
            await made(apps.request(), receive, send)
        return clock() - began

    async def requests_yielding(calls: int) -> int:
        began = clock()
        for _ in range(calls):
            await made(apps.request(), receive, send)
            await sleep(0)
        return clock() - began

    async def hits(calls: int) -> int:
        began = clock()
        for _ in range(calls):
            await made()
        return clock() - began

    async def hits_yielding(calls: int) -> int:
        began = clock()
        for _ in range(calls):
            await made()
            await sleep(0)
        return clock() - began

    if subject.hit:
        return hits_yielding if subject.yielding else hits
    return requests_yielding if subject.yielding else requests


async def settled(batch: Batch, calls: int) -> int:
    """Run a batch, then give its background tasks their turns outside its time and everybody else's."""
    taken = await batch(calls)
    for _ in range(3):
        await asyncio.sleep(0)
    return taken


def rendered(rows: Sequence[Row]) -> str:
    """The rows as a table."""
    lines: list[list[str]] = []
    for row in rows:
        if row.total is None:
            lines.append([row.name, row.failure])
            continue
        added = row.added
        lines.append(
            [
                row.name,
                harness.show(row.total.median),
                harness.show(added.median if added else None),
                f"{harness.show(added.p10)}..{harness.show(added.p90)}" if added else "-",
                harness.show(row.times_floor.median if row.times_floor else None),
                "-" if row.headers is None else str(row.headers),
            ]
        )
    return harness.table(["subject", "cpu us/call", "added us", "p10..p90", "x floor", "headers"], lines)
