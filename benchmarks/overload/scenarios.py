"""The situations that a controller is put into, and what is measured in each. Numbered as in the design: S1 to S17.

Handlers: **K1** waits 10 ms and then computes 3 ms, both +-20 %; **K2** computes 4 ms and never awaits. Capacity C is
what one core can serve of a mix at most: one over the mean processor time of a request, its parsing included. Loads are
in units of C. Unless a scenario says otherwise, 20 s at .7 C come first, it is about K1, and what is measured begins
with the change after those.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf

from benchmarks.overload.engine import (
    ACCEPT_NS,
    CPU,
    DOWN,
    IO,
    MS,
    NEVER,
    PARSE_NS,
    REFUSE_NS,
    RESPOND,
    THREAD,
    US,
    Controller,
    Downstream,
    Loop,
    S,
    Source,
    Steps,
)
from benchmarks.overload.measure import Measure, Run, ideal, jain, max_min

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
    return Kind(_varied(steps), sum(ns for what, ns in steps if what in (CPU, THREAD)))


def _heavy_tailed(most_ns: int, bits: int = 12) -> Kind:
    """10 ms of waiting, then processor time from Pareto's distribution: shape 1.5, at least 1 ms, cut at ``most_ns``.

    Drawn from a table of quantiles in whole microseconds, so that the last bit of a power does not matter.
    """
    size = 1 << bits
    times = [min(most_ns, round(1_000 * (1 - (place + 0.5) / size) ** (-1 / 1.5)) * US) for place in range(size)]
    variants = [((IO, 10 * MS), (CPU, ns)) for ns in times]
    return Kind(lambda service: variants[service.getrandbits(bits)], sum(times) // size)


K1 = kind((IO, 10 * MS), (CPU, 3 * MS))
K2 = kind((CPU, 4 * MS))
SLOW = kind((IO, 200 * MS), (CPU, 3 * MS))
THREADED = kind((THREAD, 4 * MS))
CALLING = kind((DOWN, 10 * MS), (CPU, 3 * MS))
PARETO = _heavy_tailed(100 * MS)

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


def run(scenario: Scenario, make: Callable[[Setup], Controller], seed: int, *, sample_ns: int = 0) -> Run:
    """Run a scenario from the start."""
    logs, late, samples = [], 0, []
    setup = scenario.build()
    for worker in range(setup.workers):
        setup = scenario.build()  # anew for each: a downstream has a state
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


# S1, S10, S13, S16, and the curves over the offered load: steps


def _step(mix: Sequence[Kind], level: float, seconds: int, workers: int, warm: int) -> Setup:
    cpu_ns = sum(handlers.cpu_ns for handlers in mix) // len(mix)
    unit = capacity(cpu_ns)
    share = unit * workers / len(mix)
    sources = [
        Source(load(share, (warm, 0.7), (warm + seconds, level)), handlers.draw, kind=f"route {group}", group=group)
        for group, handlers in enumerate(mix)
    ]
    return Setup(sources, (warm + seconds) * S, unit, cost_of_refusal(cpu_ns), workers=workers)


def _stepped(seconds: int, warm: int, run: Run) -> dict[str, float]:
    start, end = warm * S, (warm + seconds) * S
    found = {
        "goodput/ideal": run.of_ideal(start, end),
        "p99 ms": run.latency(0.99, start, end),
    }
    if warm:
        found["p99/p99 at .7"] = found["p99 ms"] / run.latency(0.99, 5 * S, start)
    else:
        early = start + 2 * S
        found["goodput/ideal, first 2 s"] = run.of_ideal(start, early)
    return found


def step(
    name: str,
    title: str,
    *mix: Kind,
    level: float,
    seconds: int = 30,
    workers: int = 1,
    warm: int = 20,
    short: bool = False,
) -> Scenario:
    """A step from .7 C to ``level`` C, in equal shares of each kind in ``mix``, which are rules of their own."""
    return Scenario(
        name,
        title,
        partial(_step, mix, level, seconds, workers, warm),
        partial(_stepped, seconds, warm),
        short=short,
    )


# S2: a spike


def _spike() -> Setup:
    unit = capacity(K1.cpu_ns)
    source = Source(load(unit, (20, 0.7), (25, 10), (45, 0.7)), K1.draw)
    return Setup([source], 45 * S, unit, cost_of_refusal(K1.cpu_ns))


def _spiked(run: Run) -> dict[str, float]:
    end = 25 * S
    return {
        "goodput/ideal": run.of_ideal(WARM, end),
        "p99 ms": run.latency(0.99, WARM, end),
        "recovery s": run.recovery(end, end + 20 * S),
        "shed, 2 s after": run.shed(end + 2 * S, end + 20 * S),
    }


# S3: callers that retry


def _retries() -> Setup:
    unit = capacity(K1.cpu_ns)
    source = Source(
        load(unit, (20, 0.7), (30, 0.85), (35, 2), (65, 0.85)),
        K1.draw,
        patience_ns=500 * MS,
        retries=3,
        retry_after_ns=50 * MS,
    )
    return Setup([source], 65 * S, unit, cost_of_refusal(K1.cpu_ns))


def _retried(run: Run) -> dict[str, float]:
    start, end = 30 * S, 35 * S
    return {
        "recovery s": run.recovery(end, end + 30 * S),
        "goodput/C in the storm": run.goodput(start, end) / run.capacity,
        "goodput/C after": run.goodput(end + 2 * S, end + 30 * S) / run.capacity,
        "p99 ms in the storm": run.latency(0.99, start, end),
    }


# S4: a slow downstream

SLOTS, SLOWER = 20, 20


def _slow_downstream(seconds: int) -> Setup:
    unit = capacity(CALLING.cpu_ns)
    source = Source(load(unit, (40 + seconds, 0.7)), CALLING.draw)
    downstream = Downstream(SLOTS, [(WARM, WARM + seconds * S, SLOWER)])
    return Setup([source], (40 + seconds) * S, unit, cost_of_refusal(CALLING.cpu_ns), downstream=downstream)


def _slowed_down(seconds: int, run: Run) -> dict[str, float]:
    start, end = WARM, WARM + seconds * S
    most = SLOTS * S / (SLOWER * 10 * MS)
    return {
        "goodput/max": run.goodput(start, end) / most,
        "goodput/max, last 10 s": run.goodput(end - 10 * S, end) / most,
        "p99 ms": run.latency(0.99, start, end),
        "recovery s": run.recovery(end, end + 20 * S),
    }


# S5: a processor that is slower, or stops


def _half_speed() -> Setup:
    unit = capacity(K1.cpu_ns)

    def slow(times: int, loop: Loop) -> None:
        loop.slow = times

    script = [(20 * S, partial(slow, 2)), (50 * S, partial(slow, 1))]
    return Setup([Source(load(unit, (70, 0.7)), K1.draw)], 70 * S, unit, cost_of_refusal(K1.cpu_ns), script=script)


def _halved(run: Run) -> dict[str, float]:
    start, end = WARM, 50 * S
    return {
        "goodput/ideal": run.of_ideal(start, end, capacity=run.capacity / 2),
        "p99 ms": run.latency(0.99, start, end),
        "recovery s": run.recovery(end, end + 20 * S),
    }


def _pauses() -> Setup:
    unit = capacity(K1.cpu_ns)
    script = [(second * S, lambda loop: loop.pause(100 * MS)) for second in range(20, 50)]
    return Setup([Source(load(unit, (50, 0.7)), K1.draw)], 50 * S, unit, cost_of_refusal(K1.cpu_ns), script=script)


def _sheds(start: int, end: int, run: Run) -> dict[str, float]:
    return {"shed": run.shed(start, end), "p99 ms": run.latency(0.99, start, end)}


# S6: one tenant among ten

OTHERS = 9


def _one_tenant(level: float) -> Setup:
    unit = capacity(K1.cpu_ns)
    sources = [Source(load(unit, (20, 0.25), (50, level)), K1.draw, tenant="heavy")]
    sources += [Source(load(unit, (50, 0.05)), K1.draw, tenant=f"light {number}") for number in range(OTHERS)]
    return Setup(sources, 50 * S, unit, cost_of_refusal(K1.cpu_ns))


def _shared(run: Run) -> dict[str, float]:
    """Fairness from a second after the step on, while the total is what it is."""
    start, end = WARM + S, 50 * S
    tenants = range(1 + OTHERS)
    demands = [run.arrived(start, end, {tenant}) * S / (end - start) for tenant in tenants]
    oracle = max_min(demands, ideal(sum(demands) / run.capacity, run.rho) * run.capacity)
    shares = [run.goodput(start, end, {tenant}) / oracle[tenant] for tenant in tenants]
    return {
        "Jain index": jain(shares),
        "others' success": run.success(start, end, set(tenants[1:])),
        "least success of another": min(run.success(start, end, {tenant}) for tenant in tenants[1:]),
        "heavy/oracle": shares[0],
        "goodput/ideal": run.of_ideal(start, end),
    }


# S7: classes

CLASSES = 4


def _equal_classes() -> Setup:
    unit = capacity(K1.cpu_ns)
    sources = [
        Source(load(unit, (20, 0.7 / CLASSES), (50, 1)), K1.draw, priority=priority) for priority in range(CLASSES)
    ]
    return Setup(sources, 50 * S, unit, cost_of_refusal(K1.cpu_ns))


def _classed(run: Run) -> dict[str, float]:
    start, end = WARM, 50 * S
    best = ideal(CLASSES, run.rho) * run.capacity
    found = {f"class {priority}/ideal": run.goodput(start, end, {priority}) / best for priority in range(CLASSES)}
    return {
        **found,
        "goodput/ideal": run.of_ideal(start, end),
        "p99 ms of class 0": run.latency(0.99, start, end, {0}),
    }


def _background() -> Setup:
    unit = capacity(K1.cpu_ns)
    sources = [
        Source(load(unit, (50, 0.5)), K1.draw, priority=0),
        Source(load(unit, (20, 0.2), (30, 12), (50, 0.2)), K1.draw, priority=CLASSES - 1),
    ]
    return Setup(sources, 50 * S, unit, cost_of_refusal(K1.cpu_ns))


def _critical(run: Run) -> dict[str, float]:
    start, end = WARM, 30 * S
    return {
        "critical success": run.success(start, end, {0}),
        "critical p99 ms": run.latency(0.99, start, end, {0}),
        "goodput/ideal": run.of_ideal(start, end),
        "recovery s": run.recovery(end, end + 20 * S),
    }


# S8: two kinds of route, heavy tails


def _routes(level: float, rules: tuple[int, int]) -> Setup:
    unit = capacity(K1.cpu_ns)
    sources = [
        Source(load(unit / 2, (20, 0.7), (80, level)), handlers.draw, group=group)
        for handlers, group in zip((K1, SLOW), rules, strict=True)
    ]
    return Setup(sources, 80 * S, unit, cost_of_refusal(K1.cpu_ns))


def _routed(run: Run) -> dict[str, float]:
    start, end = WARM, 80 * S
    return {
        "shed": run.shed(start, end),
        "goodput/ideal": run.of_ideal(start, end),
        "p99 ms fast": run.latency(0.99, start, end, {0}),
        "p99 ms slow": run.latency(0.99, start, end, {1}),
        "slow success/fast success": run.success(start, end, {1}) / max(run.success(start, end, {0}), 1e-9),
    }


def _pareto(level: float) -> Setup:
    unit = capacity(PARETO.cpu_ns)
    source = Source(load(unit, (20, 0.7), (80, level)), PARETO.draw)
    return Setup([source], 80 * S, unit, cost_of_refusal(PARETO.cpu_ns))


def _tailed(run: Run) -> dict[str, float]:
    start, end = WARM, 80 * S
    return {
        "shed": run.shed(start, end),
        "goodput/ideal": run.of_ideal(start, end),
        "p99 ms": run.latency(0.99, start, end),
    }


# S9: long


def _long(minutes: int) -> Setup:
    unit = capacity(K1.cpu_ns)
    until = 20 + minutes * 60
    return Setup([Source(load(unit, (20, 0.7), (until, 1.3)), K1.draw)], until * S, unit, cost_of_refusal(K1.cpu_ns))


def _lasted(minutes: int, run: Run) -> dict[str, float]:
    end = WARM + minutes * 60 * S
    first, last = run.latency(0.99, WARM, WARM + 60 * S), run.latency(0.99, end - 60 * S, end)
    return {
        "p99 last/first minute": last / first if last < inf else inf,
        "p99 ms, last minute": last,
        "goodput/ideal": run.of_ideal(WARM, end),
    }


# S11: streams beside requests

SSE, WEBSOCKETS = 500, 200


def _streams() -> Setup:
    event = ((IO, S), (CPU, 30 * US))
    sse: Steps = ((CPU, 500 * US), (RESPOND, 0), *(event * 100))
    websocket: Steps = ((RESPOND, 0), *(event * 100))
    busy = (SSE + WEBSOCKETS) * 30 * US / S
    unit = capacity(K1.cpu_ns) * (1 - busy)
    spread = 5 * S
    sources = [
        Source(load(unit, (50, 0.7), (70, 2)), K1.draw),
        Source([(spread, spread // (SSE + 1))], lambda service: sse, kind="sse", group=1, even=True),
        Source([(spread, spread // (WEBSOCKETS + 1))], lambda service: websocket, kind="websocket", group=2, even=True),
    ]
    return Setup(sources, 70 * S, unit, cost_of_refusal(K1.cpu_ns))


def _streamed(run: Run) -> dict[str, float]:
    middle, end = 50 * S, 70 * S
    return {
        "streams admitted": 1 - run.shed(0, WARM, {1, 2}),
        "shed at .7": run.shed(5 * S, middle, {0}),
        "p99 ms at .7": run.latency(0.99, 5 * S, middle, {0}),
        "goodput/ideal at 2x": run.of_ideal(middle, end),
        "p99 ms at 2x": run.latency(0.99, middle, end, {0}),
    }


# S12: deadlines


def _deadlines(level: float) -> Setup:
    unit = capacity(K1.cpu_ns)
    sources = [
        Source(load(unit / 2, (20, 0.7), (50, level)), K1.draw, deadline_ns=deadline) for deadline in (50 * MS, S)
    ]
    return Setup(sources, 50 * S, unit, cost_of_refusal(K1.cpu_ns))


def _dated(run: Run) -> dict[str, float]:
    start, end = WARM, 50 * S
    return {
        "started after their deadline": run.late_grants,
        "goodput/ideal": run.of_ideal(start, end),
        "success at .7, 50 ms": run.success(5 * S, start, {0}),
        "success, 50 ms": run.success(start, end, {0}),
        "success, 1 s": run.success(start, end, {1}),
    }


# S14: false sheds


def _steady(level: float) -> Setup:
    unit = capacity(K1.cpu_ns)
    source = Source(load(unit, (20, 0.7), (80, level)), K1.draw)
    return Setup([source], 80 * S, unit, cost_of_refusal(K1.cpu_ns))


# S15: a synchronous call now and then


def _synchronous() -> Setup:
    unit = capacity(K1.cpu_ns)
    sources = [
        Source(load(unit, (20, 0.7), (80, 0.5)), K1.draw),
        Source([(WARM, NEVER), (80 * S, S)], lambda service: ((CPU, 200 * MS),), kind="sync", group=1, even=True),
    ]
    return Setup(sources, 80 * S, unit, cost_of_refusal(K1.cpu_ns))


# S17: callers that are gone


def _dead_clients(handlers: Kind, level: float) -> Setup:
    unit = capacity(handlers.cpu_ns, connects=True)
    source = Source(load(unit, (20, 0.7), (24, level), (44, 0.7)), handlers.draw, patience_ns=S, connects=True)
    return Setup([source], 44 * S, unit, cost_of_refusal(handlers.cpu_ns, connects=True))


def _outlived(run: Run) -> dict[str, float]:
    start, end = WARM, 24 * S
    usual = run.latency(0.5, 5 * S, start)
    return {
        "p50 back after s": run.settled(end, end + 20 * S, bar=1.2 * usual),
        "answered within 1 s": run.answered(start, end, S),
        "goodput/ideal": run.of_ideal(start, end),
        "recovery s": run.recovery(end, end + 20 * S),
        "p99 ms": run.latency(0.99, start, end),
    }


FALSE_SHEDS = partial(_sheds, WARM, 80 * S)
CURVE = (0.5, 0.7, 0.9, 1.0, 1.1, 1.3, 1.6, 2.0, 3.0, 5.0, 7.0, 10.0)
"""The loads of the plots."""

SCENARIOS: dict[str, Scenario] = {
    scenario.name: scenario
    for scenario in (
        step("S1-2x", "step to 2 C", K1, level=2),
        step("S1-5x", "step to 5 C", K1, level=5),
        step("S1-10x", "step to 10 C", K1, level=10, short=True),
        Scenario("S2", "10 C for 5 s", _spike, _spiked, short=True),
        Scenario("S3", "callers who retry 3 times after 500 ms, 2 C for 5 s at .85 C", _retries, _retried, short=True),
        Scenario(
            "S4-20s", "downstream 20x slower for 20 s", partial(_slow_downstream, 20), partial(_slowed_down, 20), True
        ),
        Scenario(
            "S4-10min", "downstream 20x slower for 10 min", partial(_slow_downstream, 600), partial(_slowed_down, 600)
        ),
        Scenario("S5-half", "processor at half speed for 30 s, .7 C", _half_speed, _halved),
        Scenario("S5-pauses", "a pause of 100 ms each second, .7 C", _pauses, partial(_sheds, WARM, 50 * S)),
        Scenario("S6-1.5x", "one tenant at 1.5 C among ten", partial(_one_tenant, 1.5), _shared),
        Scenario("S6-5x", "one tenant at 5 C among ten", partial(_one_tenant, 5), _shared, True),
        Scenario("S7-equal", "four classes, 1 C each", _equal_classes, _classed, short=True),
        Scenario("S7-spike", "12 C of background for 10 s over critical at .5 C", _background, _critical, short=True),
        Scenario("S8-routes", "routes of 10 and 200 ms, .8 C", partial(_routes, 0.8, (0, 1)), _routed),
        Scenario("S8-routes-2x", "routes of 10 and 200 ms, 2 C", partial(_routes, 2, (0, 1)), _routed),
        Scenario("S8-one-rule", "the same under one rule, .8 C", partial(_routes, 0.8, (0, 0)), _routed, True),
        Scenario("S8-pareto", "heavy-tailed processor time, .8 C", partial(_pareto, 0.8), _tailed),
        Scenario("S8-pareto-2x", "heavy-tailed processor time, 2 C", partial(_pareto, 2), _tailed),
        Scenario("S9", "1.3 C for 30 min", partial(_long, 30), partial(_lasted, 30)),
        step("S10", "cold start into 3 C", K1, level=3, seconds=20, warm=0, short=True),
        Scenario("S11", "500 SSE and 200 WebSockets beside .7 C and 2 C", _streams, _streamed, short=True),
        Scenario("S12", "deadlines of 50 ms and 1 s, 2 C", partial(_deadlines, 2), _dated, short=True),
        step("S13", "two workers, step to 2 C", K1, level=2, workers=2),
        *(
            Scenario(
                f"S14-{round(level * 100)}",
                f"steady {level} C",
                partial(_steady, level),
                FALSE_SHEDS,
                short=level in (0.8, 0.9),
            )
            for level in (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
        ),
        Scenario("S15", "a synchronous call of 200 ms each second, .5 C", _synchronous, FALSE_SHEDS, short=True),
        step("S16-2x", "never awaiting, step to 2 C", K2, level=2),
        step("S16-5x", "never awaiting, step to 5 C", K2, level=5),
        step("S16-10x", "never awaiting, step to 10 C", K2, level=10, short=True),
        step("S16-threads-2x", "def handlers in the thread pool, step to 2 C", THREADED, level=2),
        step("S16-threads-10x", "def handlers in the thread pool, step to 10 C", THREADED, level=10),
        step("S16-mix-2x", "all three kinds in equal parts, step to 2 C", K1, K2, THREADED, level=2),
        step("S16-mix-10x", "all three kinds in equal parts, step to 10 C", K1, K2, THREADED, level=10),
        *(
            Scenario(name, title, partial(_dead_clients, handlers, level), _outlived, short=name == "S17")
            for name, title, handlers, level in (
                ("S17", "10 C for 4 s, callers give up after 1 s", K1, 10),
                ("S17-20x", "20 C for 4 s, more than can even be refused, callers give up after 1 s", K1, 20),
                ("S17-never-awaiting", "never awaiting, 10 C for 4 s, callers give up after 1 s", K2, 10),
            )
        ),
    )
}

CURVES: dict[str, Scenario] = {
    scenario.name: scenario
    for scenario in (
        step(f"load-{name}-{level:g}", f"step to {level:g} C", handlers, level=level, seconds=20)
        for name, handlers in (("K1", K1), ("K2", K2))
        for level in CURVE
    )
}
