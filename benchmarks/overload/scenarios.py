"""The situations that a controller is put into, and what is measured in each. Numbered as in the design: S1 to S17.

Handlers: **K1** waits 10 ms and then computes 3 ms, both +-20 %; **K2** computes 4 ms and never awaits. Capacity C is
what one core can serve of a mix at most: one over the mean processor time of a request, its parsing included. Loads are
in units of C. Unless a scenario says otherwise, 20 s at .7 C come first.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from benchmarks.overload.engine import (
    ACCEPT_NS,
    CPU,
    IO,
    MS,
    NEVER,
    PARSE_NS,
    REFUSE_NS,
    Controller,
    Downstream,
    Loop,
    S,
    Source,
    Steps,
)
from benchmarks.overload.measure import Measure, Run, ideal

WARM = 20 * S

# Handlers


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of handler: what one request does, and its mean processor time in nanoseconds, parsing left out."""

    draw: Callable[[random.Random], Steps]
    cpu_ns: int


def _varied(steps: Steps, bits: int = 6) -> Callable[[random.Random], Steps]:
    """Draw from 2**bits variants whose times lie evenly within 20 % of those in ``steps``, each step on its own."""
    size = 1 << bits
    shuffler = random.Random(len(steps))
    columns = []
    for what, ns in steps:
        column = [(what, ns * (8 * size + (2 * number + 1 - size) * 8 // 5) // (8 * size)) for number in range(size)]
        shuffler.shuffle(column)
        columns.append(column)
    variants = list(zip(*columns, strict=True))
    return lambda service: variants[service.getrandbits(bits)]


def kind(*steps: tuple[int, int]) -> Kind:
    """Handlers of these steps, each time +-20 %."""
    return Kind(_varied(steps), sum(ns for what, ns in steps if what == CPU))


K1 = kind((IO, 10 * MS), (CPU, 3 * MS))
K2 = kind((CPU, 4 * MS))

# Setups


@dataclass(slots=True)
class Setup:
    """All that a run needs but the controller and the seed."""

    sources: Sequence[Source]
    until: int
    capacity: float
    """C, in requests a second, of one worker."""
    rho: float
    downstream: Downstream | None = None
    script: Sequence[tuple[int, Callable[[Loop], None]]] = ()
    """What happens to the loop, and when."""
    workers: int = 1
    classes: int = 4


def capacity(cpu_ns: int, *, connects: bool = False) -> float:
    """Requests a second that one core can serve."""
    return S / (cpu_ns + PARSE_NS + ACCEPT_NS * connects)


def cost_of_refusal(cpu_ns: int, *, connects: bool = False) -> float:
    """The processor time of a refusal as a share of that of a service."""
    extra = PARSE_NS + ACCEPT_NS * connects
    return (REFUSE_NS + extra) / (cpu_ns + extra)


def load(unit: float, *phases: tuple[float, float]) -> list[tuple[int, int]]:
    """Phases of (until second, load in ``unit`` requests a second) as a source takes them."""
    return [(round(until * S), round(S / (unit * level)) if level else NEVER) for until, level in phases]


@dataclass(frozen=True, slots=True)
class Scenario:
    """A situation under a name, and how to measure what came of it."""

    name: str
    title: str
    build: Callable[[], Setup]
    measure: Measure
    short: bool = False
    """Among those that the tests run."""


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a scenario."""

    metrics: Mapping[str, float]
    counts: Mapping[str, int] = field(default_factory=dict)


def run(scenario: Scenario, make: Callable[[Setup], Controller], seed: int, *, sample_ns: int = 0) -> Run:
    """Run a scenario from the start."""
    logs, late, samples = [], 0, []
    for worker in range(scenario.build().workers):
        setup = scenario.build()
        loop = Loop(
            make(setup),
            setup.sources,
            seed=seed,
            capacity_hint=setup.capacity,
            downstream=setup.downstream,
            worker=worker,
            workers=setup.workers,
            sample_ns=sample_ns,
        )
        for at, happens in setup.script:
            loop.call_at(at, happens, loop)
        loop.run(setup.until + S)  # what arrived last ends as well
        logs.append(loop.log)
        late += loop.late_grants
        samples += loop.samples
    return Run(setup.sources, logs, setup.capacity * setup.workers, setup.rho, late, samples)


# S1, S2, S16: steps and spikes


def _step(handlers: Kind, level: float, seconds: int = 30) -> Setup:
    unit = capacity(handlers.cpu_ns)
    until = WARM + seconds * S
    source = Source(load(unit, (20, 0.7), (until / S, level)), handlers.draw)
    return Setup([source], until, unit, cost_of_refusal(handlers.cpu_ns))


def _stepped(level: float, seconds: int, run: Run) -> dict[str, float]:
    end = WARM + seconds * S
    best = ideal(level, run.rho)
    before = run.latency(0.99, 5 * S, WARM)
    after = run.latency(0.99, WARM, end)
    return {
        "goodput/ideal": run.goodput(WARM, end) / run.capacity / best,
        "p99 ms": after,
        "p99/p99 at .7": after / before,
        "shed at .7": run.shed(5 * S, WARM),
    }


def step(name: str, title: str, handlers: Kind, level: float, seconds: int = 30, *, short: bool = False) -> Scenario:
    """A step from .7 C to ``level`` C."""
    return Scenario(
        name, title, partial(_step, handlers, level, seconds), partial(_stepped, level, seconds), short=short
    )


def _spike(handlers: Kind, level: float, seconds: int) -> Setup:
    unit = capacity(handlers.cpu_ns)
    source = Source(load(unit, (20, 0.7), (20 + seconds, level), (40 + seconds, 0.7)), handlers.draw)
    return Setup([source], (40 + seconds) * S, unit, cost_of_refusal(handlers.cpu_ns))


def _spiked(level: float, seconds: int, run: Run) -> dict[str, float]:
    end = WARM + seconds * S
    return {
        "goodput/ideal": run.goodput(WARM, end) / run.capacity / ideal(level, run.rho),
        "p99 ms": run.latency(0.99, WARM, end),
        "recovery s": run.recovery(end, end + 20 * S),
        "shed after": run.shed(end + 2 * S, end + 20 * S),
    }


# S14: false sheds


def _steady(level: float, seconds: int) -> Setup:
    unit = capacity(K1.cpu_ns)
    source = Source(load(unit, (20, 0.7), (20 + seconds, level)), K1.draw)
    return Setup([source], (20 + seconds) * S, unit, cost_of_refusal(K1.cpu_ns))


def _false_sheds(seconds: int, run: Run) -> dict[str, float]:
    end = WARM + seconds * S
    return {"shed": run.shed(WARM, end), "p99 ms": run.latency(0.99, WARM, end)}


SCENARIOS: dict[str, Scenario] = {
    scenario.name: scenario
    for scenario in (
        step("S1-2x", "step to 2 C", K1, 2, short=True),
        step("S1-5x", "step to 5 C", K1, 5),
        step("S1-10x", "step to 10 C", K1, 10, short=True),
        Scenario("S2", "10 C for 5 s", partial(_spike, K1, 10, 5), partial(_spiked, 10, 5), short=True),
        *(
            Scenario(
                f"S14-{round(level * 100)}",
                f"steady {level} C",
                partial(_steady, level, 60),
                partial(_false_sheds, 60),
                short=level in (0.8, 0.9),
            )
            for level in (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
        ),
        step("S16-2x", "never awaiting, step to 2 C", K2, 2),
        step("S16-5x", "never awaiting, step to 5 C", K2, 5),
        step("S16-10x", "never awaiting, step to 10 C", K2, 10, short=True),
    )
}
