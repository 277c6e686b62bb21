"""The cases of the real benchmark: what is offered to which application, and what is measured. Scenarios S1 to S17.

Loads are multiples of C, the application's capacity. Every case begins at .7 C, which is also what its results are
compared with, and ends with the same load, to see what is left of the overload. Connections are open before the start,
as many as there will be callers waiting: a server that took them one by one would be spared the overload by its own
accept queue (uvloop accepts one connection in each turn of its loop).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.apps import PATH
from benchmarks.harness import percentile
from benchmarks.overload import outcomes
from benchmarks.overload.measure import ideal
from benchmarks.overload.outcomes import Outcome, milliseconds, share, within
from benchmarks.overload.servers import CLASSES, DOWNSTREAM_MAX, FIXED, TENANTS, key_of

Load = Mapping[str, float]
"""Multiples of C by tenant."""

PATIENCE = 1.0
MOST_CONNECTIONS = 4_000
SETTLE = 1.0
"""Seconds at the start of each phase that its steady state leaves out."""
SERVERS = {"httptools": ("httptools", "uvloop"), "h11": ("h11", "asyncio"), "asyncio": ("httptools", "asyncio")}
"""uvicorn's parser and event loop."""


@dataclass(frozen=True, slots=True)
class Goal:
    """What overload.md wants of a metric, at least or at most."""

    metric: str
    bar: float
    at_least: bool = True
    claim: str = ""

    def __str__(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.bar:g}"


OF_IDEAL = Goal("of_ideal", 0.90, claim="goodput / Gideal")


@dataclass(frozen=True, slots=True)
class Case:
    """One application under one course of load."""

    scenario: str
    name: str
    app: str
    load: Load
    before: Load = field(default_factory=lambda: {"t0": 0.7})
    """Also afterwards."""
    warm: float = 3.0
    seconds: float = 5.0
    after: float = 3.0
    patience: float = PATIENCE
    retries: int = 0
    fresh: bool = False
    """A new connection for every request."""
    streams: Mapping[str, int] = field(default_factory=dict)
    slow: bool = False
    """The downstream service is slow during the load."""
    server: str = "httptools"
    goals: Sequence[Goal] = ()
    floor: bool = False
    """Measure a server as well that refuses everything: what no policy can better."""

    @property
    def title(self) -> str:
        """What tables call it."""
        return f"{self.scenario} {self.name}"

    @property
    def kinds(self) -> tuple[str, ...]:
        """The tenants that send requests."""
        return tuple(sorted({*self.before, *self.load}))

    @property
    def total(self) -> float:
        """What is offered during the load, as a multiple of C."""
        return sum(self.load.values())

    @property
    def lasts(self) -> float:
        """Seconds from the first to the last request."""
        return self.warm + self.seconds + self.after

    def on(self, server: str) -> Case:
        """The same on another of `SERVERS`."""
        return replace(self, server=server)

    def scaled(self, factor: float) -> Case:
        """The same in a part of the time."""
        return replace(self, warm=self.warm * factor, seconds=self.seconds * factor, after=self.after * factor)

    def connections(self, capacity: float) -> int:
        """How many are open from the start, streams apart: one for each caller that may be waiting."""
        return 0 if self.fresh else min(MOST_CONNECTIONS, math.ceil(self.total * capacity * self.patience))

    def plan(self, capacity: float, seed: int) -> dict[str, Any]:
        """The generator's command, but for the server's address. ``capacity`` in requests per second."""

        def phase(seconds: float, load: Load, name: str | None = None) -> dict[str, Any]:
            rates = {kind: multiple * capacity for kind, multiple in load.items()}
            return {"seconds": seconds, "rates": rates, "signal": name}

        return {
            "phases": [
                phase(self.warm, self.before),
                phase(self.seconds, self.load, "SIGUSR1" if self.slow else None),
                phase(self.after, self.before, "SIGUSR2" if self.slow else None),
            ],
            "kinds": {kind: (PATH, key_of(kind)) for kind in self.kinds},
            "patience": self.patience,
            "connections": self.connections(capacity),
            "fresh": self.fresh,
            "retries": self.retries,
            "backoff": 0.05,
            "seed": seed,
            "streams": dict(self.streams),
            "streams_key": key_of("t0"),
        }


@dataclass(frozen=True, slots=True)
class Slot:
    """One run of one case against one subject, as the generator recorded it."""

    case: Case
    record: Mapping[str, Any]
    capacity: float
    """C, in requests per second, measured just before and after."""
    rho: float
    """The cost of a refusal as a part of the cost of a service, on this server with this application."""

    def measured(self) -> dict[str, float]:
        """All metrics of the run, by name. Shares are 0..1, latencies milliseconds, recoveries seconds."""
        case = self.case
        rows = outcomes.outcomes(self.record, case.kinds)
        start, end = case.warm, case.warm + case.seconds
        usual = within(rows, min(SETTLE, start / 3), start)
        load, after = within(rows, start, end), within(rows, end, end + case.after)
        offered = len(load) / case.seconds / self.capacity
        goodput = sum(row.good for row in load) / case.seconds / self.capacity
        most = ideal(offered, self.rho)
        found: dict[str, float | None] = {
            "capacity_rps": self.capacity,
            "rho": self.rho,
            "offered": offered,
            "goodput": goodput,
            "ideal": most,
            "of_ideal": goodput / most if most and not case.slow else None,
            **self._latencies(usual, load, start),
            **self._refusals(load),
            "usual_success": share(usual, lambda row: row.good),
            "recovery_s": outcomes.recovery(after, end, end + case.after, outcomes.serves(0.95)),
            **self._median_recovery(usual, after, end),
            **self._machine(rows),
            **self._tenants(load),
        }
        if case.slow:  # neither C nor rho is what limits it
            del found["ideal"]
            found["of_max"] = goodput * self.capacity / DOWNSTREAM_MAX
        if case.retries:
            found["attempts"] = len(load) / max(1, sum(row.attempt == 0 for row in load))
        if "streams" in self.record:
            found |= self._streams(self.record["streams"])
        return {name: value for name, value in found.items() if value is not None}

    def _latencies(self, usual: list[Outcome], load: list[Outcome], start: float) -> dict[str, float | None]:
        served = outcomes.served(load)
        settled = outcomes.served(within(load, start + min(SETTLE, self.case.seconds / 3), math.inf))
        return {
            "usual_p50_ms": milliseconds(outcomes.served(usual), 0.5),
            "usual_p99_ms": milliseconds(outcomes.served(usual), 0.99),
            "p50_ms": milliseconds(served, 0.5),
            "p99_ms": milliseconds(served, 0.99),
            "settled_p99_ms": milliseconds(settled, 0.99),
        }

    def _refusals(self, load: list[Outcome]) -> dict[str, float | None]:
        refused = [row for row in load if outcomes.refused(row)]
        unserved = [row for row in load if not 200 <= row.status < 300]
        quickly = sum(row.latency <= 1.0 for row in refused)
        return {
            "refused": len(refused) / max(1, len(load)),
            "refused_p99_ms": milliseconds([row.latency for row in refused], 0.99),
            "timed_out": share(load, lambda row: row.status == 0) if load else 0.0,
            "broken": sum(not outcomes.refused(row) and row.status != 0 for row in unserved) / max(1, len(load)),
            "refusals_answered": quickly / len(unserved) if unserved else None,
        }

    def _median_recovery(self, usual: list[Outcome], after: list[Outcome], end: float) -> dict[str, float | None]:
        served = outcomes.served(usual)
        if not served:
            return {}
        fast = outcomes.as_fast(percentile(served, 0.5), 1.2)
        return {"p50_recovery_s": outcomes.recovery(after, end, end + self.case.after, fast)}

    def _machine(self, rows: list[Outcome]) -> dict[str, float | None]:
        """How late the generator was, and whose the server's core was during the load."""
        (_, _, _), (began, cpu, core), (ended, cpu_after, core_after), _ = self.record["marks"]
        span = ended - began
        return {
            "late_p99_ms": milliseconds([row.late for row in rows if row.attempt == 0], 0.99),
            "not_sent": share(rows, lambda row: row.status == -2) if rows else 0.0,
            "core_used": (cpu_after - cpu) / 1e9 / span,
            "core_others": max(0.0, (core_after - core) / 1e9 - (cpu_after - cpu) / 1e9) / span,
        }

    def _tenants(self, load: list[Outcome]) -> dict[str, float | None]:
        case, capacity = self.case, ideal(self.case.total, self.rho) * self.capacity
        found: dict[str, float | None] = {}
        if case.scenario == "S6":
            others = [row for row in load if row.kind != "t0"]
            found["others"] = share(others, lambda row: row.good)
            found["jain"] = outcomes.fairness(load, case.seconds, capacity)
        if "critical" in case.load:
            critical = [row for row in load if row.kind == "critical"]
            fair = min(len(critical) / case.seconds, capacity)
            found["critical"] = share(critical, lambda row: row.good)
            found["critical_of_ideal"] = sum(row.good for row in critical) / case.seconds / fair if fair else None
            found["critical_p99_ms"] = milliseconds(outcomes.served(critical), 0.99)
        return found

    def _streams(self, streams: Mapping[str, Any]) -> dict[str, float | None]:
        silence = streams["silence"]
        return {
            "streams_alive": streams["alive"] / streams["asked"],
            "streams_silence_s": percentile(silence, 0.99) if silence else None,
        }


def unreliable(measured: Mapping[str, float], drift: float) -> list[str]:
    """Why a run says less about its subject than about the machine; empty for most runs.

    ``drift``: by how much capacity differed between just before and just after, as a part of the larger.
    """
    reasons = []
    if measured.get("late_p99_ms", 0.0) > 20:
        reasons.append(f"the generator was {measured['late_p99_ms']:.0f} ms late")
    if measured.get("not_sent", 0.0) > 0.001:
        reasons.append(f"{measured['not_sent']:.1%} could not be sent")
    if measured.get("core_others", 0.0) > 0.10:
        reasons.append(f"others used {measured['core_others']:.0%} of the server's core")
    if drift > 0.20:
        reasons.append(f"capacity drifted by {drift:.0%}")
    return reasons


# The list


def _step(scenario: str, name: str, app: str, load: float, *goals: Goal, server: str = "httptools") -> Case:
    return Case(scenario, name, app, {"t0": load}, goals=goals, server=server)


def _tenants(heavy: float) -> Case:
    light = dict.fromkeys(TENANTS[1:], 0.05)
    goals = (
        Goal("jain", 0.99, claim="Jain index against the max-min oracle"),
        Goal("others", 0.97, claim="success of the other tenants"),
        OF_IDEAL,
    )
    return Case(
        "S6",
        f"a tenant at {heavy:g} C",
        "await",
        {"t0": heavy, **light},
        {"t0": 0.25, **light},
        seconds=6.0,
        goals=goals,
    )


SLOW_P99 = Goal("times_usual_p99", 3.0, at_least=False, claim="p99 of admitted against the p99 at .7 C")
EQUAL = dict.fromkeys(CLASSES, 1.0)

CASES: tuple[Case, ...] = (
    _step("S1", "0.5x", "await", 0.5),
    _step("S1", "1x", "await", 1.0),
    _step("S1", "1.5x", "await", 1.5),
    _step("S1", "2x", "await", 2.0, OF_IDEAL),
    _step("S1", "3x", "await", 3.0),
    _step("S1", "5x", "await", 5.0, OF_IDEAL),
    _step("S1", "10x", "await", 10.0, OF_IDEAL, SLOW_P99),
    _step("S1-h11", "2x", "await", 2.0, OF_IDEAL, server="h11"),
    _step("S1-h11", "10x", "await", 10.0, OF_IDEAL, server="h11"),
    replace(
        _step("S2", "10x for 5 s", "await", 10.0, Goal("recovery_s", 1.0, False, "recovery to 95 % after a spike")),
        after=6.0,
    ),
    Case(
        "S3",
        "retries, 2x for 5 s",
        "await",
        {"t0": 2.0},
        {"t0": 0.85},
        after=7.0,
        patience=0.5,
        retries=3,
        goals=(Goal("recovery_s", 2.0, False, "recovery to 95 % after a retry storm"),),
    ),
    Case(
        "S4",
        "downstream 20x slower, 20 s",
        "downstream",
        {"t0": 0.7},
        seconds=20.0,
        after=6.0,
        slow=True,
        goals=(Goal("of_max", 0.90, claim="goodput / what the slow downstream can do"),),
    ),
    _tenants(1.5),
    _tenants(5.0),
    Case(
        "S7",
        "four classes at 1 C",
        "await",
        EQUAL,
        dict.fromkeys(CLASSES, 0.175),
        goals=(Goal("critical_of_ideal", 0.97, claim="class 0 at 4x of its ideal"), OF_IDEAL),
    ),
    Case(
        "S7",
        "background 12x",
        "await",
        {"critical": 0.5, "background": 12.0},
        {"critical": 0.5, "background": 0.2},
        seconds=6.0,
        goals=(Goal("critical", 0.995, claim="critical success under 12x background"), OF_IDEAL),
    ),
    Case(
        "S11",
        "700 streams, 5x",
        "streams",
        {"t0": 5.0},
        {"t0": 0.65},
        streams={"sse": 500, "websocket": 200},
        goals=(OF_IDEAL,),
    ),
    *(_step("S16", f"never awaits, {load}x", "never", load, OF_IDEAL) for load in (2, 5, 10)),
    *(_step("S16", f"def in threads, {load}x", "threads", load, OF_IDEAL) for load in (2, 10)),
    *(_step("S16", f"mix, {load}x", "mix", load, OF_IDEAL) for load in (2, 10)),
    *(
        Case(
            "S17",
            f"dead clients, {loop}",
            "await",
            {"t0": 10.0},
            seconds=4.0,
            after=8.0,
            fresh=True,
            server=server,
            floor=True,
            goals=(
                Goal("p50_recovery_s", 1.0, False, "p50 back to 1.2x after dead clients"),
                Goal("refusals_answered", 0.98, claim="refusals answered within 1 s"),
            ),
        )
        for loop, server in (("uvloop", "httptools"), ("asyncio", "asyncio"))
    ),
)
QUICK = ("S1 10x", "S16 never awaits, 10x")
CURVE = "S1"
"""The scenario whose cases are the points of the plot."""
assert {case.app for case in CASES} <= set(FIXED)
