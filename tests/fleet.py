"""Processes that share their limits through one server: each is this file, run with its part as JSON.

They connect, wait for each other, decide all at the same time, and print what they were told.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from seawall.backends.redis import RedisBackend
from seawall.rate import Rate

START_TIMEOUT = 60.0


@dataclass
class Part:
    """What one process does: so many decisions, so many at a time, each of one charge of 1 for every limit.

    A limit is (name, store, amount, period in nanoseconds); the caller of the n-th decision of a store is the n-th of
    ``callers``, again and again, with the name of the store before it.
    """

    url: str
    limits: Sequence[tuple[str, str, int, int]]
    decisions: int
    concurrency: int = 32
    callers: Sequence[str] = ("acme",)
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class Told:
    """What it was told: the ``numbers`` of the decisions that were admitted, and what was left of each limit then; how
    many were refused; how many calls ended how, and how many decisions fell back."""

    numbers: list[int]
    lefts: list[list[int]]
    refused: int
    results: dict[str, int]
    fallen: int

    @property
    def admitted(self) -> int:
        return len(self.lefts)


def run(parts: Sequence[Part]) -> list[Told]:
    """All of them at the same time."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        for _ in parts
    ]
    try:
        for process, part in zip(processes, parts, strict=True):
            assert process.stdin is not None
            process.stdin.write(json.dumps(asdict(part)) + "\n")
            process.stdin.flush()
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        told = []
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        for process in processes:
            said, _ = process.communicate(timeout=START_TIMEOUT)
            assert process.returncode == 0
            told.append(Told(**json.loads(said)))
        return told
    finally:
        for process in processes:
            process.kill()
            process.communicate()


async def _decide(part: Part) -> Told:
    told = Told([], [], 0, {}, 0)

    class Observer:
        def called(self, result: str, took: int) -> None:
            told.results[result] = told.results.get(result, 0) + 1

        def fell_back(self, action: str) -> None:
            told.fallen += 1

    backend = RedisBackend(part.url, timeout_ns=10_000_000_000, **part.options)
    backend.observer = Observer()
    meters = [backend.meter(name, store, Rate(amount, period)) for name, store, amount, period in part.limits]
    await backend.spend([(meters[0], "warm-up", 0)])  # type: ignore[misc]
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    numbers = iter(range(part.decisions))

    async def caller() -> None:
        for number in numbers:
            who = part.callers[number % len(part.callers)]
            answer = backend.spend([(meter, f"{meter.store} {who}", 1) for meter in meters])
            verdict = await answer if inspect.isawaitable(answer) else answer
            assert verdict is not None
            if verdict.waits is None:
                told.numbers.append(number)
                told.lefts.append(verdict.left)
            else:
                told.refused += 1
            await asyncio.sleep(0)

    await asyncio.gather(*(caller() for _ in range(part.concurrency)))
    await backend.aclose()
    return told


if __name__ == "__main__":
    print(json.dumps(asdict(asyncio.run(_decide(Part(**json.loads(sys.stdin.readline())))))))
