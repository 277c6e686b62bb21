"""One service under load while its store fails: what that cost its callers, and the table of it.

Every caller of the load pays a price of its own, a prime, and nothing comes back while a test lasts: what an answer
says was used of a limit is a multiple of the caller's price and of nobody else's. So one answer made of another
caller's reply is noticed, whatever was lost or counted twice meanwhile. A few more callers share a tight limit, which
they ask four times as often as it admits.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self

from prometheus_client import CollectorRegistry
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from harness import hello, metric
from proxy import Proxy
from seawall import Seawall
from seawall.testing import Answer, drive

BUDGET = 0.025
"""Seconds for one decision."""
SLACK = 10 * BUDGET
"""What a request may wait beyond it on a machine that is busy with other things."""
CALLERS = 48
EVERY = 0.03
"""Seconds from one request of a caller to its next."""
TIGHT_CALLERS = 4
TIGHT_RATE, TIGHT_BURST = 30, 15
BURST, QUOTA = 100_000, 10_000_000

_numbers = itertools.count()
_LIMIT = re.compile(r'"(rate|quota)";r=(\d+)')


@dataclass(frozen=True, slots=True)
class Line:
    """One of the table: a fault, what is promised of it, and what was measured."""

    fault: str
    bar: str
    measured: str
    missed: bool


TABLE: list[Line] = []


def note(fault: str, bar: str, measured: str, *, met: bool = True) -> None:
    TABLE.append(Line(fault, bar, measured, not met))


def table() -> list[str]:
    """The table as text, empty where no fault was tried."""
    if not TABLE:
        return []
    lines = [Line("fault", "bar", "measured", missed=False), *TABLE]
    fault, bar = (max(len(getattr(line, name)) for line in lines) for name in ("fault", "bar"))
    return [
        f"{line.fault:{fault}} | {line.bar:{bar}} | {line.measured}{' | missed' if line.missed else ''}"
        for line in lines
    ]


def _primes(count: int, above: int) -> list[int]:
    numbers = (number for number in itertools.count(above + 1) if all(number % n for n in range(2, number)))
    return list(itertools.islice(numbers, count))


PRICES = _primes(CALLERS, 50)


def settings(url: str, **backend: Any) -> dict[str, Any]:
    """A policy with a rule for each price, of which every other lets everything in while the store is away."""
    rules = [
        {
            "name": f"price-{price}",
            "match": {"path": f"/{price}"},
            "cost": price,
            "on_backend_failure": "allow" if price in PRICES[1::2] else "local",
        }
        for price in PRICES
    ]
    tight = {"rate": {"limit": f"{TIGHT_RATE}/second", "burst": TIGHT_BURST}, "per": "client_ip"}
    return {
        "version": 1,
        "plans": {"default": {"rate": {"limit": "8/day", "burst": BURST}, "quota": f"{QUOTA}/month", "concurrency": 2}},
        "routes": [
            *rules,
            {"name": "tight", "match": {"path": "/tight"}, "limits": {"tight": tight}},
            {"name": "denied", "match": {"path": "/denied"}, "on_backend_failure": "deny"},
        ],
        "shedding": {"algorithm": "off"},
        "backend": {
            "type": "redis",
            "url": url,
            "timeout": f"{BUDGET * 1000:g}ms",
            "secret": "of these tests",
            "key_prefix": f"faults-{next(_numbers)}",
            "leases": False,
            **backend,
        },
    }


def living(app: ASGIApp) -> ASGIApp:
    """The application, with a start and an end."""

    async def lived(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            await app(scope, receive, send)
            return
        for event in ("startup", "shutdown"):
            await receive()
            await send({"type": f"lifespan.{event}.complete"})

    return lived


def served() -> ASGIApp:
    """What a server process serves, by the policy in its environment: ``/hold`` begins to answer and goes on for ever,
    and everything else takes 20 ms."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/hold":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await asyncio.Event().wait()
        await asyncio.sleep(0.02)
        await hello(scope, receive, send)

    return Seawall(living(app), config=json.loads(os.environ["FAULTS_POLICY"]))


class Service:
    """`Seawall` on a store around an application that says hello, from its start to its shutdown."""

    def __init__(self, url: str, app: ASGIApp = hello, config: dict[str, Any] | None = None, **backend: Any) -> None:
        self.registry = CollectorRegistry()
        self.settings = config or settings(url, **backend)
        self.app = Seawall(living(app), config=self.settings, registry=self.registry)
        self._messages: asyncio.Queue[Message] = asyncio.Queue()
        self._said: asyncio.Queue[Message] = asyncio.Queue()
        self._life: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._life = asyncio.create_task(
            self.app({"type": "lifespan", "state": {}}, self._messages.get, self._said.put)
        )
        await self._tell("startup")
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._life is not None
        await self._tell("shutdown")
        await self._life

    async def _tell(self, event: str) -> None:
        self._messages.put_nowait({"type": f"lifespan.{event}"})
        async with asyncio.timeout(10):
            assert (await self._said.get())["type"] == f"lifespan.{event}.complete"

    @property
    def prefix(self) -> str:
        prefix: str = self.settings["backend"]["key_prefix"]
        return prefix

    @property
    def leasing(self) -> bool:
        """Whether units may be taken ahead."""
        leasing: bool = self.settings["backend"]["leases"]
        return leasing

    @property
    def up(self) -> bool:
        """Whether the metrics say that the store is asked."""
        return metric(self.registry, "seawall_backend_up") == {("redis",): 1}

    @property
    def fallbacks(self) -> int:
        """Decisions without the store."""
        return int(sum(metric(self.registry, "seawall_backend_fallback_decisions_total").values()))

    @property
    def calls(self) -> dict[str, int]:
        """Calls of the store, by how they ended."""
        counted = metric(self.registry, "seawall_backend_requests_total")
        return {result: int(value) for (_, result), value in counted.items()}

    async def ask(self, path: str = "/", caller: int | str = 0) -> Answer:
        """The answer to a request of a caller, an address or the last part of one."""
        address = caller if isinstance(caller, str) else f"192.0.2.{caller}"
        return await drive(self.app, path, client=(address, 50_000))

    async def until_it_decides(self, within: float = 30.0) -> float:
        """Seconds until a request is decided by the store, and the next 20 are."""
        begun = time.perf_counter()
        async with asyncio.timeout(within):
            while True:
                before, known = self.fallbacks, time.perf_counter() - begun
                if self.up:
                    for _ in range(20):
                        await self.ask("/other", caller=250)
                    if self.fallbacks == before:
                        return known
                await asyncio.sleep(0.005)


@dataclass(frozen=True, slots=True)
class Request:
    """When it was sent, how long it took, both in seconds, and what came back."""

    sent: float
    took: float
    status: int
    tight: bool


@dataclass(slots=True)
class Phase:
    """The requests that were sent between two instants. ``lag`` is the latest that the event loop was in them: what
    the machine, and not the store, had a part in."""

    begun: float
    ended: float
    requests: list[Request]
    lag: float

    @property
    def worst(self) -> float:
        return max(request.took for request in self.requests)

    @property
    def p99(self) -> float:
        times = sorted(request.took for request in self.requests)
        return times[len(times) * 99 // 100]

    @property
    def usual(self) -> float:
        times = sorted(request.took for request in self.requests)
        return times[len(times) // 2]


@dataclass(slots=True)
class Load:
    """Callers that ask until the block ends."""

    service: Service
    requests: list[Request] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    """What should not have come back."""
    _lags: list[tuple[float, float]] = field(default_factory=list)
    _running: bool = True
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)

    async def __aenter__(self) -> Self:
        callers = [self._call(number, f"/{price}", price) for number, price in enumerate(PRICES)]
        tight = [self._call(251, "/tight", None, EVERY * n / TIGHT_CALLERS) for n in range(TIGHT_CALLERS)]
        self._tasks = [asyncio.create_task(each) for each in (*callers, *tight, self._look_at_the_loop())]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._running = False
        async with asyncio.timeout(10):
            await asyncio.gather(*self._tasks)

    async def _call(self, caller: int, path: str, price: int | None, offset: float | None = None) -> None:
        due = time.perf_counter() + (EVERY * caller / CALLERS if offset is None else offset)
        asked = 0
        while self._running:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            due += EVERY
            asked += 1
            sent = time.perf_counter()
            try:
                answer = await self.service.ask(path, caller)
            except Exception as error:
                self.wrong.append(f"{path}: {error!r}")
                continue
            took = time.perf_counter() - sent
            self.requests.append(Request(sent, took, answer.status, tight=price is None))
            if answer.status != 200 and (price is not None or answer.status != 429):
                self.wrong.append(f"{path}: {answer.status} {answer.body!r}")
            elif price is not None:
                self._compare(answer, price, asked)

    def _compare(self, answer: Answer, price: int, asked: int) -> None:
        said = _LIMIT.match(answer.headers.get("ratelimit", ""))
        if said is None:
            if price not in PRICES[1::2]:
                self.wrong.append(f"/{price}: {answer.headers}")
            return
        used = (BURST if said[1] == "rate" else QUOTA) - int(said[2])
        # What was taken ahead is no multiple where an answer was lost, and not even used where the store has lost it.
        if used < 0 or (not self.service.leasing and (used % price or not 0 < used <= asked * price)):
            self.wrong.append(f"/{price}: {used} of {said[1]} are used after {asked} requests")

    async def _look_at_the_loop(self) -> None:
        while self._running:
            due = time.perf_counter() + 0.001
            await asyncio.sleep(0.001)
            self._lags.append((due, time.perf_counter() - due))

    async def during(self, seconds: float) -> Phase:
        """Let the callers ask for so long."""
        begun = time.perf_counter()
        await asyncio.sleep(seconds)
        return self.since(begun)

    def since(self, begun: float, until: float | None = None) -> Phase:
        """What was sent since, and has been answered."""
        ended = time.perf_counter() if until is None else until
        requests = [request for request in self.requests if begun <= request.sent < ended]
        lags = [late for due, late in self._lags if begun <= due < ended]
        return Phase(begun, ended, requests, max(lags, default=0.0))

    def admitted(self) -> int:
        """How many of those that share the tight limit were let in."""
        return sum(request.status == 200 for request in self.requests if request.tight)

    def bound(self, *, away: float = 0.0, losses: int = 0) -> int:
        """What the tight limit admits at most: B + r t of the store, B more for each time that it lost its state, and
        B + r D of this process's share while it was away for D seconds; and B/4 where that much may be taken ahead."""
        seconds = self.requests[-1].sent - self.requests[0].sent
        share = TIGHT_BURST + TIGHT_RATE * away if away else 0.0
        ahead = TIGHT_BURST // 4 if self.service.leasing else 0
        return int((1 + losses) * TIGHT_BURST + TIGHT_RATE * seconds + share) + ahead + 1


@dataclass(slots=True)
class Trial:
    """What a fault did. ``away`` are the seconds from its begin until the store decided again, ``back`` those of them
    after its end; ``made`` is how many connections were made while it lasted, and ``fallbacks`` how many decisions
    without the store until it was back."""

    before: Phase
    fault: Phase
    after: Phase
    away: float
    back: float
    made: int
    admitted: int
    bound: int | None
    fallbacks: int

    @property
    def added(self) -> float:
        """Seconds that the slowest request took longer than is usual."""
        return max(0.0, self.fault.worst - self.before.usual)

    def then(self, load: Load, after: float = 2 * BUDGET) -> Phase:
        """The fault but for its begin."""
        return load.since(self.fault.begun + after, self.fault.ended)


Change = Callable[[], object]


async def endure(
    service: Service,
    hurt: Change,
    mend: Change | None,
    seconds: float,
    *,
    proxy: Proxy | None = None,
    losses: int | None = 0,
) -> tuple[Trial, Load]:
    """Load a service before, while and after ``hurt`` holds, and assert what holds for every fault.

    ``hurt`` and ``mend`` are called in a thread, so that what they wait for does not hold up the loop. ``losses`` is
    how often the store loses its state, ``None`` for more often than anybody counts.
    """
    await service.until_it_decides()
    files = open_files()
    connections = proxy.connections if proxy is not None else 0
    async with Load(service) as load:
        before = await load.during(0.3)
        begun, known = time.perf_counter(), service.fallbacks
        await asyncio.to_thread(hurt)
        await asyncio.sleep(max(0.0, begun + seconds - time.perf_counter()))
        made = proxy.connections - connections if proxy is not None else 0
        trial = await _recover(load, before, begun, known, mend, losses)
    trial.made = made
    _expect(load, trial.bound)
    await eventually(lambda: open_files() <= files, f"{files} open files, as before")
    return trial, load


async def start(service: Service, mend: Change, *, losses: int) -> tuple[Trial, Load]:
    """The same for a service that has never had its store, until ``mend``."""
    async with Load(service) as load:
        begun = time.perf_counter()
        fault = await load.during(0.6)
        trial = await _recover(load, fault, begun, 0, mend, losses)
    _expect(load, trial.bound)
    return trial, load


async def _recover(
    load: Load, before: Phase, begun: float, known: int, mend: Change | None, losses: int | None
) -> Trial:
    service = load.service
    fault = load.since(begun)
    if mend is not None:
        await asyncio.to_thread(mend)
    back = await service.until_it_decides()
    away = time.perf_counter() - begun
    fallbacks = service.fallbacks - known
    after = await load.during(0.2)
    bound = None if losses is None else load.bound(away=away, losses=losses)
    return Trial(before, fault, after, away, back, 0, load.admitted(), bound, fallbacks)


def _expect(load: Load, bound: int | None) -> None:
    """What holds whatever happens to the store."""
    assert load.wrong == [], "; ".join(load.wrong[:5])
    whole = load.since(0)
    assert whole.worst - whole.lag <= BUDGET + SLACK
    if bound is not None:
        assert load.admitted() <= bound


def open_files() -> int:
    return len(os.listdir("/dev/fd"))


async def eventually(true: Callable[[], bool], what: str, within: float = 5.0) -> float:
    """Wait until it is so; how many seconds that took."""
    begun = time.perf_counter()
    while not true():
        assert time.perf_counter() - begun < within, f"not within {within:g} s: {what}"
        await asyncio.sleep(0.005)
    return time.perf_counter() - begun
