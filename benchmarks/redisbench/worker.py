"""A process that calls limiters: so many callers at once, each taking the next turn from one counter.

Run as a process of its own (``python -m benchmarks.redisbench.worker NUMBER``) it takes one JSON command a line on
stdin and answers one JSON line. Subjects stay open between commands, with connections and whatever they remember.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import random
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from typing import Any

from benchmarks import harness
from benchmarks.redisbench.subjects import SUBJECTS, Decide, Setup

FILLERS = 64
"""Callers at once while limits are used up."""


@dataclass(slots=True)
class Taken:
    """What the calls of one slot took."""

    calls: int
    wrong: int
    """Answers other than those that were to be measured."""
    cpu_ns: int
    """Processor time of the process, all threads."""
    wall_ns: int


async def drive(decide: Decide, keys: Iterable[str], *, callers: int, wanted: bool | None) -> Taken:
    """Ask once for each of ``keys``. The loop gets a turn after each answer, as it does in a server."""
    turns = iter(keys)
    calls = wrong = 0

    async def caller() -> None:
        nonlocal calls, wrong
        for key in turns:
            calls += 1
            if await decide(key) is not wanted:
                wrong += 1
            await asyncio.sleep(0)

    began, cpu = time.perf_counter_ns(), time.process_time_ns()
    async with asyncio.TaskGroup() as group:
        for _ in range(callers):
            group.create_task(caller())
    return Taken(calls, wrong, time.process_time_ns() - cpu, time.perf_counter_ns() - began)


def until(deadline: float, keys: Iterable[str]) -> Iterator[str]:
    """``keys`` until ``deadline`` (`time.monotonic`)."""
    for key in keys:
        if time.monotonic() >= deadline:
            return
        yield key


def addresses(count: int) -> list[str]:
    """As many addresses, in an order in which neighbours have nothing in common."""
    found = [f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}" for number in range(count)]
    random.Random(count).shuffle(found)
    return found


class Worker:
    """The subjects of one case, open. ``number`` is which of the processes this is."""

    def __init__(self, number: int) -> None:
        self.number = number
        self._stack = AsyncExitStack()
        self._decide: dict[str, Decide] = {}
        self._wanted = True
        self._keys: list[str] = []
        self._turns: Iterator[str] = iter(())

    async def open(self, setup: dict[str, Any], names: list[str], keys: int, workers: int) -> dict[str, str]:
        """Set ``names`` up; why it failed, for each that did."""
        self._keys = addresses(keys)
        start = self.number * keys // workers
        self._turns = cycle(self._keys[start:] + self._keys[:start])
        self._wanted = not setup["denied"]
        failures = {}
        for subject in SUBJECTS:
            if subject.name not in names:
                continue
            try:
                own = Setup(**{**setup, "prefix": f"{setup['prefix']}{SUBJECTS.index(subject)}:"})
                self._decide[subject.name] = await self._stack.enter_async_context(subject.build(own))
            except Exception as error:
                failures[subject.name] = f"failed: {type(error).__name__}: {error}".splitlines()[0]
        gc.collect()
        gc.freeze()  # what is alive now is everybody's, and should not be walked in anybody's slot
        return failures

    async def fill(self, name: str, part: int, of: int) -> dict[str, Any]:
        """Use the limits of every ``of``-th caller up, from the ``part``-th on."""
        return asdict(await drive(self._decide[name], self._keys[part::of], callers=FILLERS, wanted=None))

    async def run(self, name: str, callers: int, calls: int) -> dict[str, Any]:
        """One slot of so many calls."""
        keys = islice(self._turns, calls)
        return asdict(await drive(self._decide[name], keys, callers=callers, wanted=self._wanted))

    async def last(self, name: str, callers: int, seconds: float) -> dict[str, Any]:
        """One slot of so many seconds."""
        keys = until(time.monotonic() + seconds, self._turns)
        return asdict(await drive(self._decide[name], keys, callers=callers, wanted=self._wanted))

    async def close(self) -> None:
        """Give everything back."""
        gc.unfreeze()
        self._decide.clear()
        await self._stack.aclose()

    async def obey(self, command: dict[str, Any]) -> Any:
        """The answer to one command; an error is one too."""
        arguments = dict(command)
        verb = arguments.pop("do")
        try:
            return await getattr(self, verb)(**arguments)
        except Exception as error:
            causes = error.exceptions if isinstance(error, ExceptionGroup) else (error,)
            return {"error": f"{type(causes[0]).__name__}: {causes[0]}".splitlines()[0]}


def main() -> None:
    """Serve commands from stdin until it ends."""
    number = int(sys.argv[1])
    logging.disable(logging.WARNING)
    harness.pin(number + 1)  # the server has the first core
    with asyncio.Runner() as runner:
        worker = Worker(number)
        for line in sys.stdin:
            print(json.dumps(runner.run(worker.obey(json.loads(line)))), flush=True)
        runner.run(worker.close())


if __name__ == "__main__":
    main()
