"""What the number of live keys costs: time per call, the worst call while a table grows, memory per key.

Each measurement is a function that runs in a process of its own (`harness.probe` feeds ``python -m benchmarks.keys``),
so that no other subject's heap is in its way. Two tables are measured: the memory backend alone (one charge a call),
and the whole middleware with three limits on two identities, which keeps three keys for each caller.
"""

from __future__ import annotations

import asyncio
import gc
import json
import random
import resource
import sys
import time
import tracemalloc
import uuid
from array import array
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks import apps, harness, peers

HOT = 64
"""Keys in the hot working set."""

BATCH = 2_048
"""Calls in one timed slot: with so few, random keys of a large table are cold when they are met."""

REFILL_S = 1_000
"""Seconds until a token is back: longer than any measurement here, so that no key is full again and forgotten."""

BURST = 10_000_000
"""More than any caller here spends."""


# The tables


@dataclass(frozen=True, slots=True)
class Table:
    """Something that keeps keys: ``call`` makes one decision for a key, ``live`` says how many keys it keeps."""

    call: Callable[[str | bytes], object]
    live: Callable[[], int]


def memory_backend(keys: int) -> Any:
    """A memory backend whose cap ``keys`` do not reach."""
    from seawall.backends.memory import MemoryBackend

    return MemoryBackend(max_keys=max(100_000, keys + keys // 10))


def live_keys(backend: Any) -> int:
    """How many keys ``backend`` tracks."""
    return sum(store["keys"] for store in backend.statistics().values())


def backend_table(keys: int) -> Table:
    """The memory backend alone: one charge a call."""
    from seawall.rate import SECOND, Rate

    backend = memory_backend(keys)
    meter = backend.meter("rate", "id", Rate(1, REFILL_S * SECOND, BURST))
    spend = backend.spend

    def call(key: str | bytes) -> object:
        return spend(((meter, key, 1),))

    return Table(call, lambda: live_keys(backend))


def dict_table(keys: int) -> Table:
    """One plain dict: what a table costs that grows in one piece."""
    states: dict[str | bytes, int] = {}

    def call(key: str | bytes) -> object:
        states[key] = max(states.get(key, 0), time.monotonic_ns()) + REFILL_S * 10**9
        return None

    return Table(call, lambda: len(states))


TABLES: dict[str, Callable[[int], Table]] = {"backend": backend_table, "dict": dict_table}


def stack(keys: int) -> tuple[apps.ASGIApp, Callable[[], int]]:
    """Seawall with a rate and a quota of the tenant and a rate of the address, and how many keys it keeps."""
    rate = {"limit": f"1/{REFILL_S}s", "burst": BURST}
    config = apps.three_limits(rate)
    config["identity"] = {"tenant": [{"state": "tenant_id"}]}
    config["routes"][0]["limits"]["per-ip"]["rate"] = rate
    del config["tenants"]
    backend = memory_backend(keys)
    return apps.seawall(apps.bare, config, backend=backend), lambda: live_keys(backend)


def check_live(name: str, live: int, keys: int) -> None:
    """Refuse to report on keys that are not there."""
    if not keys * 0.99 <= live <= keys + 100:
        raise RuntimeError(f"{name} keeps {live} keys, not {keys}")


def caller(number: int) -> dict[str, Any]:
    """The request of one of many callers, who all have their own tenant id and their own address."""
    address = f"10.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}"
    return apps.request(state={"tenant_id": f"tenant-{number}"}, client=(address, 51234))


def nothing(key: str | bytes) -> object:
    """A call that does nothing: what calling costs."""
    return None


# Time per call by number of live keys


def access(sizes: Sequence[int], rounds: int, seed: int, stacks: bool) -> dict[str, list[float]]:
    """Nanoseconds per call for each table, size and pattern, round by round, all interleaved in one process.

    Keys are new strings each time, as they are when they come from a request: only what the table holds is cold.
    ``hot`` draws from 64 callers while all others live, ``uniform`` from all; ``calling`` is the loop itself, and
    ``bare`` the application without the middleware, with the same keys.
    """
    rng = random.Random(seed)
    slots: dict[str, Callable[[], float]] = {}
    with asyncio.Runner() as runner:
        for size in sizes:
            table = backend_table(size)
            for number in range(size):
                table.call(f"tenant-{number}")
            check_live(f"backend {size}", table.live(), size)
            for pattern, choices in patterns(size, rng).items():
                slots[f"backend {size} {pattern}"] = partial(time_calls, table.call, choices, rng)
                slots[f"calling {size} {pattern}"] = partial(time_calls, nothing, choices, rng)
        for size in sizes if stacks else ():
            app, live = stack(size)
            callers = max(1, size // 3)
            runner.run(fill(app, callers))
            check_live(f"stack {size}", live(), 3 * callers)
            for pattern, choices in patterns(callers, rng).items():
                slots[f"stack {size} {pattern}"] = partial(requests_slot, runner, app, choices, rng)
                slots[f"bare {size} {pattern}"] = partial(requests_slot, runner, apps.bare, choices, rng)
        gc.collect()
        gc.freeze()
        return harness.interleave(slots, rounds=rounds, seed=seed, progress=harness.say)


def patterns(size: int, rng: random.Random) -> dict[str, range | list[int]]:
    """Which keys are drawn from, by name."""
    return {"hot": [rng.randrange(size) for _ in range(HOT)] if size > 1 else [0], "uniform": range(size)}


def time_calls(call: Callable[[str | bytes], object], choices: Sequence[int], rng: random.Random) -> float:
    """Processor nanoseconds per call over one batch of keys."""
    keys = [f"tenant-{number}" for number in rng.choices(choices, k=BATCH)]
    began = time.process_time_ns()
    for key in keys:
        call(key)
    return (time.process_time_ns() - began) / BATCH


def requests_slot(runner: asyncio.Runner, app: apps.ASGIApp, choices: Sequence[int], rng: random.Random) -> float:
    """`time_requests` on the running loop."""
    return runner.run(time_requests(app, choices, rng))


async def time_requests(app: apps.ASGIApp, choices: Sequence[int], rng: random.Random) -> float:
    """Processor nanoseconds per request over one batch of callers."""
    scopes = [caller(number) for number in rng.choices(choices, k=BATCH)]
    receive, send = apps.receive, apps.send
    began = time.process_time_ns()
    for scope in scopes:
        await app(scope, receive, send)
    return (time.process_time_ns() - began) / BATCH


async def fill(app: apps.ASGIApp, callers: int) -> None:
    for number in range(callers):
        await app(caller(number), apps.receive, apps.send)


def limits_access(size: int, seconds: float) -> list[float]:
    """Nanoseconds per awaited hit of limits' fixed window among ``size`` live keys, on a loop that yields.

    Its storage starts a task on a hit that walks all keys; the walk belongs to the hit that started it, and runs as
    soon as the loop gets a turn. One sample per 16 calls, until ``seconds`` are over.
    """

    async def measure() -> list[float]:
        hit, fill_storage = peers.limits_fill(size)
        await fill_storage()
        await asyncio.sleep(0)
        samples: list[float] = []
        until = time.perf_counter() + seconds
        while not samples or time.perf_counter() < until:
            began = time.process_time_ns()
            for number in range(16):
                await hit(f"tenant-{number % size}")
                await asyncio.sleep(0)
            middle = time.process_time_ns()
            for _ in range(16):
                await asyncio.sleep(0)
            samples.append((2 * middle - began - time.process_time_ns()) / 16)
        return samples

    return asyncio.run(measure())


# The worst call while a table grows


def growth(table: str, keys: int, collect: bool) -> dict[str, dict[str, float]]:
    """Microseconds of single calls while ``table`` grows from nothing to ``keys``: median, p99.99 and maximum.

    Between any two of them a call that does nothing is timed in the same way: what it shows is the machine's. The
    thread's own processor time is taken as well, which leaves out what other processes did in the meantime. ``at`` is
    which call took longest: growth strikes at the same one in every run, the machine anywhere.
    """
    if not collect:
        gc.disable()
    with asyncio.Runner() as runner:
        return runner.run(grow(table, keys))


async def grow(table: str, keys: int) -> dict[str, dict[str, float]]:
    """The body of `growth`. All calls are awaited, so that the two kinds of table cost the loop the same."""
    make: Callable[[int], Any]
    if table == "stack":
        app, live = stack(keys)
        make, count, each = caller, max(1, keys // 3), 3
        call, idle = request_of(app), request_of(apps.bare)
    else:
        grown = TABLES[table](keys)
        make, count, each, live = tenant_key, keys, 1, grown.live
        call, idle = awaited(grown.call), awaited(nothing)
    series = {name: array("q", bytes(8 * count)) for name in ("wall", "cpu", "idle wall", "idle cpu")}
    wall, cpu, idle_wall, idle_cpu = series.values()
    clock, own = time.perf_counter_ns, time.thread_time_ns
    gc.collect()
    gc.freeze()
    for number in range(count):
        key = make(number)
        cpu_before, before = own(), clock()
        await call(key)
        after, cpu_after = clock(), own()
        wall[number], cpu[number] = after - before, cpu_after - cpu_before
        cpu_before, before = own(), clock()
        await idle(key)
        after, cpu_after = clock(), own()
        idle_wall[number], idle_cpu[number] = after - before, cpu_after - cpu_before
    check_live(table, live(), each * count)
    worst = {name: float(values.index(max(values))) for name, values in series.items()}
    return {name: {**tail(values), "at": worst[name]} for name, values in series.items()}


def request_of(app: apps.ASGIApp) -> Callable[[Any], Awaitable[object]]:
    """A function that sends one request to ``app``."""
    return lambda scope: app(scope, apps.receive, apps.send)


def awaited(call: Callable[[str | bytes], object]) -> Callable[[Any], Awaitable[object]]:
    """``call`` as something to await."""

    async def run(key: str | bytes) -> object:
        return call(key)

    return run


def tail(nanoseconds: Sequence[int]) -> dict[str, float]:
    """Median, p99.99 and maximum, in microseconds."""
    ordered = sorted(nanoseconds)
    return {
        "p50": ordered[len(ordered) // 2] / 1e3,
        "p99.99": ordered[min(len(ordered) - 1, int(len(ordered) * 0.9999))] / 1e3,
        "max": ordered[-1] / 1e3,
    }


# Memory per key


def tenant_key(number: int) -> str:
    return f"tenant-{number:07d}"


def uuid_key(number: int) -> str:
    return str(uuid.UUID(int=number * 0x9E3779B97F4A7C15F39CC0605CEDC835 % 2**128))


def ipv6_key(number: int) -> bytes:
    return (0x2001_0DB8 << 96 | number << 64).to_bytes(16)


KINDS: dict[str, Callable[[int], str | bytes]] = {"tenant id": tenant_key, "UUID": uuid_key, "IPv6 /64": ipv6_key}


def memory(table: str, kind: str, keys: int, trace: bool) -> float:
    """Bytes per live key: growth of the resident set, or what tracemalloc saw allocated."""
    add, live = adder(table, kind, keys)
    for number in range(100):
        add(number)
    gc.collect()
    if trace:
        tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0] if trace else resident()
    for number in range(100, keys + 100):
        add(number)
    gc.collect()
    after = tracemalloc.get_traced_memory()[0] if trace else resident()
    check_live(table, live(), keys + 100)
    return (after - before) / keys


def adder(table: str, kind: str, keys: int) -> tuple[Callable[[int], object], Callable[[], int]]:
    """What makes the n-th key known, and what counts them. For the stack a key is one of three of a caller."""
    if table == "stack":
        app, live = stack(keys)

        def request(number: int) -> None:
            if number % 3:
                return
            try:
                app(caller(number // 3), apps.receive, apps.send).send(None)  # type: ignore[attr-defined]
            except StopIteration:
                return
            raise RuntimeError("the middleware waits for something, in memory")

        return request, live
    made, key = TABLES[table](keys), KINDS[kind]
    return lambda number: made.call(key(number)), made.live


def resident() -> int:
    """Bytes of memory that this process occupies."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()


PROBES: dict[str, Callable[..., Any]] = {
    "access": access,
    "limits": limits_access,
    "growth": growth,
    "memory": memory,
}


def main() -> None:
    """Run the probe that stdin names, with the arguments it gives."""
    arguments = json.load(sys.stdin)
    json.dump(PROBES[arguments.pop("probe")](**arguments), sys.stdout)


if __name__ == "__main__":
    main()
