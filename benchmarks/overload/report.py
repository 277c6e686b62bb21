"""What the simulation found: goals and whether they are met, all metrics beside each other, as text and as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite
from typing import Any

from benchmarks.harness import show, table
from benchmarks.overload import engine, scenarios

OURS = "seawall"


@dataclass(frozen=True, slots=True)
class Spread:
    """A metric over the seeds."""

    mean: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of at least one value."""
        return cls(sum(values) / len(values), min(values), max(values))

    def document(self) -> dict[str, float | None]:
        """As JSON, which knows no infinity: null says that nothing was admitted."""
        return {name: _rounded(value) for name, value in (("mean", self.mean), ("min", self.least), ("max", self.most))}


def _rounded(value: float) -> float | None:
    return float(f"{value:.5g}") if isfinite(value) else None


Found = Mapping[tuple[str, str], Sequence[Mapping[str, float]]]
"""(scenario, controller) -> the metrics of each seed."""


@dataclass(frozen=True, slots=True)
class Goal:
    """A bar for one metric of one scenario; at most or at least, as ``at_least`` says."""

    claim: str
    scenario: str
    metric: str
    bar: float
    at_least: bool = True

    def holds(self, value: float) -> bool:
        """Whether a value meets the goal."""
        return value >= self.bar if self.at_least else value <= self.bar

    def outcome(self, spread: Spread) -> str:
        """met with every seed, on average, or missed."""
        if self.holds(self.worst(spread)):
            return "met"
        return "met on average" if self.holds(spread.mean) else "missed"

    def worst(self, spread: Spread) -> float:
        """The value of the worst seed."""
        return spread.least if self.at_least else spread.most


def _at_most(claim: str, scenario: str, metric: str, bar: float) -> Goal:
    return Goal(claim, scenario, metric, bar, at_least=False)


GOALS: tuple[Goal, ...] = (
    *(Goal(f"goodput / ideal at {level} C", f"S1-{level}", "goodput/ideal", 0.95) for level in ("2x", "5x", "10x")),
    *(
        Goal(f"goodput / ideal at {level} C, never awaiting", f"S16-{level}", "goodput/ideal", 0.95)
        for level in ("2x", "5x", "10x")
    ),
    *(
        Goal(f"goodput / ideal at {level} C, {what}", f"S16-{kind}-{level}", "goodput/ideal", 0.95)
        for kind, what in (("threads", "thread pool"), ("mix", "all three"))
        for level in ("2x", "10x")
    ),
    Goal("goodput / ideal at 3 C from a cold start", "S10", "goodput/ideal", 0.95),
    Goal("goodput / ideal at 2 C, two workers", "S13", "goodput/ideal", 0.95),
    _at_most("p99 of admitted at 10 C / at .7 C", "S1-10x", "p99/p99 at .7", 3),
    _at_most("the same, never awaiting", "S16-10x", "p99/p99 at .7", 3),
    Goal("critical success under 12 C of background", "S7-spike", "critical success", 0.995),
    Goal("class 0 of four equal ones at 4 C / ideal", "S7-equal", "class 0/ideal", 0.97),
    _at_most("recovery after a spike, s", "S2", "recovery s", 1),
    _at_most("recovery from a retry storm, s", "S3", "recovery s", 2),
    _at_most("dead clients: p50 back to 1.2x after, s", "S17", "p50 back after s", 1),
    Goal("dead clients: answered within 1 s", "S17", "answered within 1 s", 0.98),
    Goal("slow downstream for 20 s: goodput / max", "S4-20s", "goodput/max", 0.90),
    Goal("slow downstream for 10 min: goodput / max", "S4-10min", "goodput/max", 0.90),
    Goal("the last 10 s of that", "S4-10min", "goodput/max, last 10 s", 0.90),
    _at_most("30 min at 1.3 C: p99 last / first minute", "S9", "p99 last/first minute", 1.1),
    _at_most("false sheds at .8 C", "S14-80", "shed", 0.001),
    _at_most("false sheds at .9 C", "S14-90", "shed", 0.01),
    _at_most("false sheds at .8 C, routes of 10 and 200 ms", "S8-routes", "shed", 0.001),
    _at_most("the same under one rule", "S8-one-rule", "shed", 0.001),
    *(
        Goal(f"Jain index, one tenant at {level} C among ten", f"S6-{level}x", "Jain index", 0.99)
        for level in ("1.5", "5")
    ),
    *(
        Goal(f"other tenants' success, one at {level} C", f"S6-{level}x", "others' success", 0.97)
        for level in ("1.5", "5")
    ),
    _at_most("started after their deadline", "S12", "started after their deadline", 0),
    Goal("streams admitted beside requests", "S11", "streams admitted", 1),
    _at_most("false sheds at .7 C beside 700 streams", "S11", "shed at .7", 0.001),
)


def spreads(found: Found) -> dict[tuple[str, str], dict[str, Spread]]:
    """(scenario, controller) -> metric -> its spread over the seeds."""
    return {
        key: {metric: Spread.of([run[metric] for run in runs]) for metric in runs[0]} for key, runs in found.items()
    }


def goals_table(found: Found, controllers: Sequence[str]) -> str:
    """Each goal that was measured: Seawall's mean, its worst seed, the outcome, the means of the others."""
    measured = spreads(found)
    others = [name for name in controllers if name != OURS]
    rows = []
    for goal in GOALS:
        means = {name: measured.get((goal.scenario, name), {}).get(goal.metric) for name in controllers}
        ours = means.get(OURS)
        if not any(means.values()):
            continue
        rows.append(
            [
                f"{goal.scenario}: {goal.claim}",
                _shown(ours.mean) if ours else "-",
                _shown(goal.worst(ours)) if ours else "-",
                ("at least " if goal.at_least else "at most ") + f"{goal.bar:g}",
                goal.outcome(ours) if ours else "-",
                *(_shown(spread.mean) if (spread := means[name]) else "-" for name in others),
            ]
        )
    return table([f"goal, of {OURS}", "mean", "worst", "goal", "outcome", *others], rows) if rows else ""


def metrics_table(found: Found, controllers: Sequence[str]) -> str:
    """Each scenario with all its metrics, the mean over the seeds for each controller."""
    measured = spreads(found)
    rows: list[list[str]] = []
    for name in dict.fromkeys(scenario for scenario, _ in found):
        if name not in scenarios.SCENARIOS:
            continue
        rows.append([f"{name}: {scenarios.SCENARIOS[name].title}"])
        by_controller = {one: measured[name, one] for one in controllers if (name, one) in measured}
        rows += [
            [
                f"  {metric}",
                *(_shown(by_controller[one][metric].mean) if one in by_controller else "-" for one in controllers),
            ]
            for metric in next(iter(by_controller.values()))
        ]
    return table(["mean over the seeds", *controllers], rows) if rows else ""


def _shown(value: float) -> str:
    return "none" if value == inf else show(value)


def document(found: Found, controllers: Sequence[str], seeds: int) -> dict[str, Any]:
    """The parts of the report."""
    measured = spreads(found)
    parts: dict[str, Any] = {
        "seeds": seeds,
        "controllers": list(controllers),
        "costs": {
            "parse_ns": engine.PARSE_NS,
            "refuse_ns": engine.REFUSE_NS,
            "accept_ns": engine.ACCEPT_NS,
            "close_ns": engine.CLOSE_NS,
            "callback_ns": engine.CALLBACK_NS,
        },
        "goals": [],
        "scenarios": {},
        "curves": {},
    }
    for goal in GOALS:
        means = {
            one: measured[goal.scenario, one][goal.metric] for one in controllers if (goal.scenario, one) in measured
        }
        if means:
            parts["goals"].append(
                {
                    "claim": goal.claim,
                    "scenario": goal.scenario,
                    "metric": goal.metric,
                    "bar": goal.bar,
                    "at_least": goal.at_least,
                    "outcome": goal.outcome(means[OURS]) if OURS in means else None,
                    "controllers": {one: spread.document() for one, spread in means.items()},
                }
            )
    for (name, controller), metrics in measured.items():
        shown = {metric: spread.document() for metric, spread in metrics.items()}
        if name in scenarios.SCENARIOS:
            entry = parts["scenarios"].setdefault(name, {"title": scenarios.SCENARIOS[name].title, "controllers": {}})
            entry["controllers"][controller] = shown
        else:
            _, handlers, level = name.split("-")
            parts["curves"].setdefault(handlers, {}).setdefault(controller, {})[level] = shown
    return parts


def outcomes(found: Found) -> Iterable[tuple[Goal, str]]:
    """Each goal that was measured for Seawall, and its outcome."""
    measured = spreads(found)
    for goal in GOALS:
        if (goal.scenario, OURS) in measured:
            yield goal, goal.outcome(measured[goal.scenario, OURS][goal.metric])
