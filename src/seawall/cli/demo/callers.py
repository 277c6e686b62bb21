"""Who calls the shop, how often, and what became of it."""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from math import ceil
from time import monotonic_ns
from typing import Any, Literal, NamedTuple, TypeAlias, final

from seawall.admission import SHED
from seawall.cli.demo.client import Connection, Response
from seawall.rate import SECOND

Outcome: TypeAlias = Literal["served", "limited", "shed", "failed"]

KEPT = 32
"""Connections of a crowd that are open before it comes."""
_LEFT = re.compile(r'"rate";r=(\d+)')


@final
@dataclass(frozen=True, slots=True)
class Caller:
    """Somebody with a steady pace, in requests per second from each of its addresses.

    ``polite`` asks for less than its plan and so must never be refused.
    """

    name: str
    doing: str
    pace: float
    polite: bool
    addresses: tuple[str, ...]
    key: str | None = None
    method: str = "GET"
    target: str = "/v1/items/7"

    def headers(self, address: str) -> dict[str, str]:
        """What it sends. The demo stands in for the proxy that names the address."""
        return {"X-Forwarded-For": address} | ({"X-API-Key": self.key} if self.key else {})

    def scope(self, address: str) -> dict[str, Any]:
        """Its request as the application sees it."""
        path, _, query = self.target.partition("?")
        return {
            "type": "http",
            "method": self.method,
            "path": path,
            "raw_path": path.encode(),
            "query_string": query.encode(),
            "client": ("127.0.0.1", 50_000),
            "headers": [(name.lower().encode(), value.encode()) for name, value in self.headers(address).items()],
        }


_ACME = Caller("acme", "reads items, within its plan", 20, True, ("203.0.113.1",), "demo-key-of-acme")
_GLOBEX = Caller("globex", "reads items, within its plan", 5, True, ("203.0.113.2",), "demo-key-of-globex")
_INITECH = Caller(
    "initech",
    "searches, and each search costs 5",
    4,
    True,
    ("203.0.113.3",),
    "demo-key-of-initech",
    target="/v1/search?q=pier",
)
_WAREHOUSE = Caller("warehouse", "reads items, without a limit", 30, True, ("203.0.113.4",), "demo-key-of-warehouse")
_VISITORS = Caller("visitors", "have no key", 1, True, ("198.51.100.1", "198.51.100.2", "198.51.100.3"))
_GUESSER = Caller("guesser", "tries passwords", 3, False, ("192.0.2.66",), method="POST", target="/login")
_UMBRELLA = Caller("umbrella", "uses a plan by the hour", 10, True, ("203.0.113.6",), "demo-key-of-umbrella")

STEADY = (_ACME, _GLOBEX, _INITECH, _WAREHOUSE, _VISITORS)
FLOOD = (
    _ACME,
    replace(_GLOBEX, doing="floods: six times its plan", pace=60, polite=False),
    _INITECH,
    _WAREHOUSE,
    _VISITORS,
    _GUESSER,
)
OUTAGE = (
    _UMBRELLA,
    replace(_GLOBEX, doing="reads items, beyond its plan", pace=30, polite=False),
    replace(_WAREHOUSE, pace=10),
)


def crowd(capacity: float) -> tuple[Caller, ...]:
    """Three kinds of callers, one of each class, whose paces are together three times ``capacity``."""
    storefront = "demo-key-of-storefront"
    return (
        Caller(
            "checkouts", "are critical", 0.25 * capacity, False, ("203.0.113.7",), storefront, "POST", "/v1/checkout"
        ),
        Caller("pages", "are normal", capacity, False, ("203.0.113.7",), storefront, target="/v1/pages/7"),
        Caller(
            "crawler", "can wait", 1.75 * capacity, False, ("203.0.113.8",), "demo-key-of-crawler", target="/v1/pages/7"
        ),
    )


@final
class Answered(NamedTuple):
    """What became of one request: when it was due and how long it took from then on, in monotonic nanoseconds.

    ``left`` is what the answer said to be left of the caller's rate.
    """

    at: int
    took: int
    outcome: Outcome
    left: int | None = None


@final
@dataclass(slots=True)
class Tally:
    """What one address of one caller has seen. Times are monotonic nanoseconds.

    ``limited`` counts 429 answers by the policy that they name first, ``shed`` the refusals of a service that has too
    much to do, by their reason. ``errors`` is everything else that is not admitted.
    """

    caller: Caller
    address: str
    asked: int = 0
    admitted: int = 0
    limited: Counter[str] = field(default_factory=Counter)
    shed: Counter[str] = field(default_factory=Counter)
    errors: int = 0
    error: str = ""
    first_sent: int = 0
    last_answered: int = 0
    answered: list[Answered] = field(default_factory=list)
    allowed_answer: Response | None = None
    refused_answer: Response | None = None

    @property
    def refused(self) -> Counter[str]:
        """Refusals by what they name."""
        return self.limited + self.shed

    @property
    def elapsed_ns(self) -> int:
        """From before its first request to after its last answer: longer than the server saw it."""
        return max(0, self.last_answered - self.first_sent)

    async def send(self, connection: Connection, due: int) -> None:
        """Send a request that was due at ``due``, and count what becomes of it."""
        self.asked += 1
        left: int | None = None
        try:
            response = await connection.request(self.caller.method, self.caller.target, self.headers())
        except OSError as error:
            outcome = self.fail(str(error) or type(error).__name__)
        else:
            outcome, left = self.note(response), left_in(response)
        self.last_answered = monotonic_ns()
        self.answered.append(Answered(due, self.last_answered - due, outcome, left))

    def headers(self) -> dict[str, str]:
        return self.caller.headers(self.address)

    def note(self, response: Response) -> Outcome:
        """Count an answer."""
        if response.status == 200:
            self.admitted += 1
            self.allowed_answer = self.allowed_answer or response
            return "served"
        reason, policy = why_refused(response)
        if reason in SHED:
            self.shed[reason] += 1
        elif response.status == 429:
            self.limited[policy] += 1
        else:
            return self.fail(f"status {response.status}")
        self.refused_answer = self.refused_answer or response
        return "shed" if reason in SHED else "limited"

    def fail(self, error: str) -> Outcome:
        self.errors += 1
        self.error = self.error or error
        return "failed"


def why_refused(response: Response) -> tuple[str, str]:
    """The reason of a refusal, and the policy that it names first."""
    try:
        problem = json.loads(response.body)
        return str(problem["reason"]), str(problem.get("violated-policies", ["unknown"])[0])
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        return "unknown", "unknown"


def left_in(response: Response) -> int | None:
    """What an answer says to be left of the caller's rate."""
    found = _LEFT.search(response.header("ratelimit") or "")
    return int(found[1]) if found else None


async def call(tally: Tally, ports: Sequence[int], until: int) -> None:
    """Send the caller's requests at its pace until the monotonic nanosecond ``until``, to each port in turn.

    Whoever is late drops requests instead of catching up: a busy machine must not turn a polite caller into a burst.
    """
    interval = round(SECOND / tally.caller.pace)
    due = tally.first_sent = tally.last_answered = monotonic_ns()
    connections = [Connection(port) for port in ports]
    try:
        while due < until:
            await asyncio.sleep(max(0, due - monotonic_ns()) / SECOND)
            await tally.send(connections[tally.asked % len(connections)], monotonic_ns())
            due += interval * max(1, -(-(tally.last_answered - due) // interval))
    finally:
        for connection in connections:
            connection.close()


async def keep_coming(tally: Tally, port: int, until: int, random: Callable[[float], float]) -> None:
    """Let callers come at random until ``until``, whatever becomes of those before them; done with the last answer.

    They share `KEPT` connections, as they do behind a proxy, and open more when these are taken. ``random`` draws the
    time between two of them, in seconds, for a rate a second.
    """
    connections = [Connection(port) for _ in range(KEPT)]
    with suppress(OSError):  # which the first request will find out, and count
        for connection in connections:
            await connection.open()
    idle = connections.copy()

    async def come(due: int) -> None:
        if not idle:
            connections.append(Connection(port))
            idle.append(connections[-1])
        connection = idle.pop()
        await tally.send(connection, due)
        idle.append(connection)

    due = tally.first_sent = tally.last_answered = monotonic_ns()
    try:
        async with asyncio.TaskGroup() as coming:
            while (due := due + round(random(tally.caller.pace) * SECOND)) < until:
                await asyncio.sleep(max(0, due - monotonic_ns()) / SECOND)
                coming.create_task(come(due))
    finally:
        for connection in connections:
            connection.close()


async def capacity(tally: Tally, port: int, seconds: float, callers: int = 20) -> float:
    """What a server can do of a caller's requests a second: so many ask again as soon as they are answered."""
    began = tally.first_sent = monotonic_ns()
    until = began + round(seconds * SECOND)

    async def insist() -> None:
        connection = Connection(port)
        try:
            while monotonic_ns() < until:
                await tally.send(connection, monotonic_ns())
        finally:
            connection.close()

    async with asyncio.TaskGroup() as group:
        for _ in range(callers):
            group.create_task(insist())
    return tally.admitted * SECOND / (monotonic_ns() - began)


def latencies(tallies: Iterable[Tally]) -> list[float]:
    """How long it took what was served, in seconds, sorted."""
    return sorted(one.took / SECOND for tally in tallies for one in tally.answered if one.outcome == "served")


def percentile(values: Sequence[float], part: float) -> float | None:
    """The nearest-rank percentile of sorted ``values``, ``part`` being from 0 to 1; ``None`` of nothing."""
    return values[max(0, ceil(part * len(values)) - 1)] if values else None
