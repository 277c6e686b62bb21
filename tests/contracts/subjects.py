"""The backends that must behave alike, each with a clock that the tests turn."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass

from seawall.backends import Backend, Charge, Verdict
from seawall.backends.memory import MemoryBackend
from seawall.testing import ManualClock


@dataclass
class Subject:
    """A backend under test. Whether it answers at once or has to be awaited is its own affair."""

    backend: Backend
    clock: ManualClock

    async def spend(self, *charges: Charge) -> Verdict:
        answer: Verdict | Awaitable[Verdict] = self.backend.spend(charges)
        return await answer if inspect.isawaitable(answer) else answer

    async def admits(self, *charges: Charge) -> bool:
        return (await self.spend(*charges)).admitted

    async def left(self, *charges: Charge) -> list[int]:
        """What is left of the buckets of ``charges``, without spending anything."""
        return (await self.spend(*[(meter, key, 0) for meter, key, _ in charges])).left


def memory(clock: ManualClock) -> Backend:
    return MemoryBackend(clock=clock, wall_clock=clock.wall_ns)


class Awaited:
    """A backend whose every answer has to be awaited, as one across a network: the memory backend a loop tick later."""

    name = "awaited"

    def __init__(self, inner: MemoryBackend) -> None:
        self.inner = inner
        self.meter, self.debit, self.refund = inner.meter, inner.debit, inner.refund
        self.statistics, self.aclose = inner.statistics, inner.aclose

    async def spend(self, charges: Sequence[Charge]) -> Verdict:
        return self.inner.spend(charges)


def awaited(clock: ManualClock) -> Backend:
    return Awaited(MemoryBackend(clock=clock, wall_clock=clock.wall_ns))
