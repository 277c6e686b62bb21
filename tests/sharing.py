"""Processes that share one server, as backends on one event loop, with a clock that the test turns for all of them."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Callable
from typing import Any, Self
from uuid import uuid4

from contracts.subjects import Calls, questions_open, script_at
from seawall.backends import Charge, Full, Key, Permit, Verdict
from seawall.backends.redis import RedisBackend
from seawall.backends.redis.meters import SharedMeter
from seawall.testing import ManualClock


async def until(true: Callable[[], object], what: str, within: float = 10.0) -> None:
    """Wait until it is so."""
    deadline = time.monotonic() + within
    while not true():
        assert time.monotonic() < deadline, f"not within {within:g} s: {what}"
        await asyncio.sleep(0.001)


class Process:
    """One of a fleet: its backend, and what that says of its calls."""

    def __init__(self, backend: RedisBackend) -> None:
        self.backend = backend
        self.calls = Calls()
        backend.observer = self.calls
        self.meter = backend.meter

    @property
    def asked(self) -> int:
        """Calls that were answered, a probe and signs of life among them."""
        assert set(self.calls.results) <= {"ok"}
        return len(self.calls.results)

    async def spend(self, *charges: Charge) -> Verdict:
        answer = self.backend.spend(charges)
        verdict = await answer if inspect.isawaitable(answer) else answer
        assert verdict is not None
        return verdict

    async def admits(self, *charges: Charge) -> bool:
        return (await self.spend(*charges)).admitted

    async def with_slot(self, permit: Permit, *charges: Charge) -> Verdict | Full | None:
        answer = self.backend.spend_with(permit, charges)
        return await answer if inspect.isawaitable(answer) else answer

    async def left(self, meter: SharedMeter, key: Key = "a") -> int:
        """What the server says is left, and this process has ahead."""
        return (await self.spend((meter, key, 0))).left[0]

    async def settled(self) -> None:
        """Wait until everything that it asked has been answered."""
        await until(lambda: not questions_open(self.backend), "all is answered")


class Fleet:
    """``size`` processes for as long as a block lasts, all of them connected and counted.

    Without a ``clock`` time is the real one. ``options`` are those of `RedisBackend`.
    """

    def __init__(self, url: str, clock: ManualClock | None = None, size: int = 1, **options: Any) -> None:
        self.clock = clock or ManualClock()
        self.url = url
        self.options: dict[str, Any] = {
            "timeout_ns": 5_000_000_000,
            "key_prefix": f"fleet-{uuid4()}",
            "instances": size,
            **options,
        }
        if clock is not None:
            self.script = script_at(clock.wall_ns())
            self.options |= {"clock": clock, "wall_clock": clock.wall_ns, "script": self.script}
        self.processes = [self.process() for _ in range(size)]

    def process(self, **options: Any) -> Process:
        """One more, which has not connected, and which whoever asks for it closes."""
        return Process(RedisBackend(self.url, **{**self.options, **options}))

    @property
    def first(self) -> Process:
        return self.processes[0]

    async def __aenter__(self) -> Self:
        for process in self.processes:
            process.backend.open()
        await until(self._is_counted, "every process is connected and counted")
        await self.settled()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def _is_counted(self) -> bool:
        return all(process.backend._ahead_ns is not None and process.backend.session().up for process in self.processes)

    async def close(self) -> None:
        """End every process in order."""
        await asyncio.gather(*(process.backend.aclose() for process in self.processes))

    async def settled(self) -> None:
        for process in self.processes:
            await process.settled()

    async def advance(self, seconds: float = 0.0, *, ns: int = 0) -> None:
        """Let time pass for all of them and for the server, when what was asked before is answered."""
        await self.settled()
        self.clock.advance_ns(round(seconds * 1e9) + ns)
        turned = script_at(self.clock.wall_ns())
        self.script.text, self.script.name = turned.text, turned.name

    async def read(self, meter: SharedMeter, key: Key = "a") -> int:
        """What is left in the server, as somebody sees it who has nothing ahead."""
        reader = self.process(leases=False, deny_cache=False)
        try:
            return await reader.left(reader.meter(meter.name, meter.store, meter.rate), key)
        finally:
            await reader.backend.aclose()
