"""A process that calls one limiter: so many callers at once, each taking the next turn from one counter.

Run as a process of its own (``python -m benchmarks.redisbench.worker NUMBER SUBJECT``) it takes one JSON command a line
on stdin and answers one JSON line. What it calls stays open between commands, with connections and whatever it
remembers; but its event loop stands still, so that nothing that it does in the background is paid for by others.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import random
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from functools import cache
from itertools import chain, cycle, islice
from typing import Any

from benchmarks import harness
from benchmarks.redisbench.subjects import Decide, Setup, Subject, named

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


async def drive(decide: Decide, keys: Iterable[str], *, callers: int, wanted: bool, pause: float = 0) -> Taken:
    """Ask once for each of ``keys``. After an answer a caller waits for ``pause`` seconds, 0 being its next turn."""
    turns = iter(keys)
    calls = wrong = 0
    begin = asyncio.Event()

    async def caller() -> None:
        nonlocal calls, wrong
        await begin.wait()
        for key in turns:
            calls += 1
            if await decide(key) is not wanted:
                wrong += 1
            await asyncio.sleep(pause)

    async with asyncio.TaskGroup() as group:
        for _ in range(callers):
            group.create_task(caller())
        await asyncio.sleep(0)
        began, cpu = time.perf_counter_ns(), time.process_time_ns()
        begin.set()
    return Taken(calls, wrong, time.process_time_ns() - cpu, time.perf_counter_ns() - began)


def until(deadline: float, keys: Iterable[str]) -> Iterator[str]:
    """``keys`` until ``deadline`` (`time.monotonic`)."""
    for key in keys:
        if time.monotonic() >= deadline:
            return
        yield key


@cache
def addresses(count: int) -> Sequence[str]:
    """As many addresses, in an order in which neighbours have nothing in common."""
    found = [f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}" for number in range(count)]
    random.Random(count).shuffle(found)
    return found


class Worker:
    """One subject. ``number`` is which of its processes this is."""

    def __init__(self, number: int, subject: Subject) -> None:
        self.number = number
        self.subject = subject
        self._stack = AsyncExitStack()
        self._decide: Decide | None = None
        self._wanted = True
        self._keys: Sequence[str] = ()
        self._turns: Iterator[str] = iter(())

    async def open(self, setup: dict[str, Any], keys: int, workers: int) -> None:
        """Set it up for so many keys, of which each worker begins with others."""
        self._keys = addresses(keys)
        start = self.number * keys // workers
        self._turns = chain(islice(self._keys, start, None), cycle(self._keys))
        self._wanted = not setup["denied"]
        self._decide = await self._stack.enter_async_context(self.subject.build(Setup(**setup)))
        gc.collect()
        gc.freeze()  # what is alive now is not walked in any slot

    async def fill(self, part: int, of: int) -> dict[str, Any]:
        """Use the limits of every ``of``-th caller up, from the ``part``-th on."""
        return await self._drive(self._keys[part::of], FILLERS)

    async def run(self, callers: int, calls: int) -> dict[str, Any]:
        """One slot of so many calls."""
        return await self._drive(islice(self._turns, calls), callers)

    async def last(self, callers: int, seconds: float, pause: float = 0) -> dict[str, Any]:
        """One slot of so many seconds."""
        return await self._drive(until(time.monotonic() + seconds, self._turns), callers, pause)

    async def _drive(self, keys: Iterable[str], callers: int, pause: float = 0) -> dict[str, Any]:
        if self._decide is None:
            raise RuntimeError("not open")
        return asdict(await drive(self._decide, keys, callers=callers, wanted=self._wanted, pause=pause))

    async def close(self) -> None:
        """Give everything back."""
        gc.unfreeze()
        self._decide = None
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
        worker = Worker(number, named(sys.argv[2]))
        for line in sys.stdin:
            print(json.dumps(runner.run(worker.obey(json.loads(line)))), flush=True)
        runner.run(worker.close())


if __name__ == "__main__":
    main()
