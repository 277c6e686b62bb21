"""Who calls the shop, how often, and what became of it."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from dataclasses import dataclass, field
from time import monotonic_ns
from typing import Any, final

from seawall.cli.demo.client import Connection, Response
from seawall.rate import SECOND


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


CALLERS = (
    Caller("acme", "reads items, within its plan", 20, True, ("203.0.113.1",), "demo-key-of-acme"),
    Caller("globex", "reads items, beyond its plan", 25, False, ("203.0.113.2",), "demo-key-of-globex"),
    Caller(
        "initech",
        "searches, and each search costs 5",
        20,
        False,
        ("203.0.113.3",),
        "demo-key-of-initech",
        target="/v1/search?q=pier",
    ),
    Caller("warehouse", "reads items, without a limit", 40, True, ("203.0.113.4",), "demo-key-of-warehouse"),
    Caller("flood", "nobody knows them", 12, False, tuple(f"198.51.100.{host}" for host in range(1, 6))),
    Caller("guesser", "tries passwords", 2, False, ("192.0.2.66",), method="POST", target="/login"),
)
"""About 170 requests a second altogether, whatever is admitted."""


@final
@dataclass(slots=True)
class Tally:
    """What one address of one caller has seen. Times are monotonic nanoseconds.

    ``refused`` counts 429 answers by the policy that they name first. ``errors`` is everything that is neither admitted
    nor such a refusal.
    """

    caller: Caller
    address: str
    asked: int = 0
    admitted: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    errors: int = 0
    error: str = ""
    first_sent: int = 0
    last_answered: int = 0
    allowed_answer: Response | None = None
    refused_answer: Response | None = None

    @property
    def elapsed_ns(self) -> int:
        """From before its first request to after its last answer: longer than the server saw it."""
        return max(0, self.last_answered - self.first_sent)

    def note(self, response: Response) -> None:
        """Count an answer."""
        if response.status == 429:
            self.refused[why_refused(response)] += 1
            self.refused_answer = self.refused_answer or response
        elif response.status == 200:
            self.admitted += 1
            self.allowed_answer = self.allowed_answer or response
        else:
            self.fail(f"status {response.status}")

    def fail(self, error: str) -> None:
        self.errors += 1
        self.error = self.error or error


def why_refused(response: Response) -> str:
    """The policy that a refusal names first."""
    try:
        return str(json.loads(response.body)["violated-policies"][0])
    except (ValueError, KeyError, IndexError, TypeError):
        return "unknown"


async def call(tally: Tally, port: int, until: int) -> None:
    """Send the caller's requests at its pace until the monotonic nanosecond ``until``.

    Whoever is late drops requests instead of catching up: a busy machine must not turn a polite caller into a burst.
    """
    caller = tally.caller
    interval = round(SECOND / caller.pace)
    start = tally.first_sent = tally.last_answered = monotonic_ns()
    headers = caller.headers(tally.address)
    connection = Connection(port)
    due = start
    try:
        while due < until:
            await asyncio.sleep(max(0, due - monotonic_ns()) / SECOND)
            tally.asked += 1
            try:
                tally.note(await connection.request(caller.method, caller.target, headers))
            except OSError as error:
                tally.fail(str(error) or type(error).__name__)
            tally.last_answered = monotonic_ns()
            due += interval * max(1, -(-(tally.last_answered - due) // interval))
    finally:
        connection.close()
