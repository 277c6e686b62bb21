"""The backends that must behave alike, each with a clock that the tests turn."""

from __future__ import annotations

import asyncio
import inspect
import re
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any, ClassVar, Self
from uuid import uuid4

from pages import DOCS, blocks
from seawall.backends import Backend, Charge, Verdict
from seawall.backends.limits import LimitsBackend
from seawall.backends.memory import MemoryBackend
from seawall.backends.redis import RedisBackend
from seawall.backends.redis.node import Script
from seawall.testing import ManualClock

MICROSECOND = 1_000


@dataclass
class Subject:
    """A backend under test, for as long as a block lasts. Whether it answers at once or later is its own affair."""

    backend: Backend
    clock: ManualClock

    tick: ClassVar[int] = 1
    """Nanoseconds between two instants that it can tell apart."""

    @property
    def now(self) -> int:
        """The time of its buckets."""
        return self.clock()

    async def spend(self, *charges: Charge) -> Verdict:
        answer: Verdict | None | Awaitable[Verdict | None] = self.backend.spend(charges)
        verdict = await answer if inspect.isawaitable(answer) else answer
        assert verdict is not None
        return verdict

    async def debit(self, *charges: Charge) -> list[int]:
        return list(self.backend.debit(charges))

    async def refund(self, charges: Sequence[Charge], spent_at: int) -> None:
        self.backend.refund(charges, spent_at)

    async def admits(self, *charges: Charge) -> bool:
        return (await self.spend(*charges)).admitted

    async def left(self, *charges: Charge) -> list[int]:
        """What is left of the buckets of ``charges``, without spending anything."""
        return (await self.spend(*[(meter, key, 0) for meter, key, _ in charges])).left

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.backend.aclose()


def memory(clock: ManualClock) -> Subject:
    return Subject(MemoryBackend(clock=clock, wall_clock=clock.wall_ns), clock)


class Awaited:
    """A backend whose every answer has to be awaited, as one across a network: the memory backend a loop tick later."""

    name = "awaited"

    def __init__(self, inner: MemoryBackend) -> None:
        self.inner = inner
        self.meter, self.debit, self.refund = inner.meter, inner.debit, inner.refund
        self.statistics, self.aclose = inner.statistics, inner.aclose

    async def spend(self, charges: Sequence[Charge]) -> Verdict:
        return self.inner.spend(charges)


def awaited(clock: ManualClock) -> Subject:
    return Subject(Awaited(MemoryBackend(clock=clock, wall_clock=clock.wall_ns)), clock)


@cache
def _documented() -> Any:
    """The backend that the documentation writes."""
    [block] = [block for block in blocks(DOCS / "extending.md", "python") if "class DictBackend" in block.text]
    names: dict[str, Any] = {}
    exec(compile(block.text.partition("\napp.")[0], str(block), "exec"), names)
    return names["DictBackend"]


def documented(clock: ManualClock) -> Subject:
    return Subject(_documented()(clock=clock, wall_clock=clock.wall_ns), clock)


@dataclass
class Calls:
    """Counts what a backend says of itself."""

    results: list[str] = field(default_factory=list)
    fallen: list[str] = field(default_factory=list)

    def called(self, result: str, took: int) -> None:
        self.results.append(result)

    def fell_back(self, action: str) -> None:
        self.fallen.append(action)


@cache
def _own_text() -> str:
    return files("seawall.backends.redis").joinpath("spend.lua").read_text("utf-8")


def script_at(wall: int) -> Script:
    """The script on a server whose clock stands at ``wall``, and whose keys outlive the test."""
    seconds, microseconds = divmod(wall // MICROSECOND, 1_000_000)
    stood, times = re.subn(r"redis\.call\('TIME'\)", f"{{'{seconds}', '{microseconds}'}}", _own_text())
    kept, expiries = re.subn(r"'PX', ceil\(.*\)\)$", "'PX', 600000)", stood, flags=re.MULTILINE)
    assert (times, expiries) == (1, 1), "the script reads the clock once, and each write expires"
    return Script(kept)


def questions_open(backend: RedisBackend) -> int:
    """How many have no answer yet, on the running loop."""
    nodes = backend.session()._routes.nodes.values()
    return sum(len(node._pending) + sum(len(batch.asks) for batch in node._flights) for node in nodes)


class Served(Subject):
    """A backend whose state is in a server. The clock of the server is the test's, and what is asked has been answered
    when a method returns; the new text of the script for each instant is one that the server does not know."""

    backend: RedisBackend
    tick = MICROSECOND

    def __init__(self, url: str, clock: ManualClock) -> None:
        self.script = script_at(clock.wall_ns())
        self.calls = Calls()
        backend = RedisBackend(
            url,
            timeout_ns=5_000_000_000,
            key_prefix=f"contract-{uuid4()}",
            leases=False,
            deny_cache=False,
            clock=clock,
            wall_clock=clock.wall_ns,
            script=self.script,
        )
        backend.observer = self.calls
        super().__init__(backend, clock)
        self._stands_at = clock.wall_ns()

    @property
    def now(self) -> int:
        return self.clock.wall_ns()

    def turn(self) -> None:
        """Let the server's clock stand where this one does."""
        if self.clock.wall_ns() != self._stands_at:
            self._stands_at = self.clock.wall_ns()
            turned = script_at(self._stands_at)
            self.script.text, self.script.name = turned.text, turned.name

    async def settled(self) -> None:
        """Wait until everything has been answered, by the server and in time."""
        # It tells nobody that a note has been answered.
        while questions_open(self.backend):  # noqa: ASYNC110
            await asyncio.sleep(0)
        assert set(self.calls.results) <= {"ok"}
        assert self.calls.fallen == []

    async def spend(self, *charges: Charge) -> Verdict:
        self.turn()
        verdict = await super().spend(*charges)
        await self.settled()
        return verdict

    async def debit(self, *charges: Charge) -> list[int]:
        self.turn()
        taken = self.backend.debit(charges)
        await self.settled()
        return list(taken)

    async def refund(self, charges: Sequence[Charge], spent_at: int) -> None:
        self.turn()
        self.backend.refund(charges, spent_at)
        await self.settled()


class Counted(Subject):
    """A storage of the limits library, whose counters are of this process's clock."""

    backend: LimitsBackend

    def __init__(self, url: str, clock: ManualClock) -> None:
        self.calls = Calls()
        backend = LimitsBackend(
            url,
            timeout_ns=5_000_000_000,
            key_prefix=f"contract-{uuid4()}",
            deny_cache=False,
            clock=clock,
            wall_clock=clock.wall_ns,
        )
        backend.observer = self.calls
        super().__init__(backend, clock)

    async def settled(self) -> None:
        if self.backend._pending:
            await asyncio.wait(self.backend._pending)
        assert set(self.calls.results) <= {"ok"}
        assert self.calls.fallen == []

    async def spend(self, *charges: Charge) -> Verdict:
        verdict = await super().spend(*charges)
        await self.settled()
        return verdict

    async def debit(self, *charges: Charge) -> list[int]:
        taken = self.backend.debit(charges)
        await self.settled()
        return list(taken)

    async def refund(self, charges: Sequence[Charge], spent_at: int) -> None:
        self.backend.refund(charges, spent_at)
        await self.settled()
