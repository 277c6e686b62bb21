"""Seawall and other laws of overload control in simulated time, in the situations that overload comes in.

    python -m benchmarks.overload               everything, about ten minutes on two cores; writes results/overload.*
    python -m benchmarks.overload --short       the scenarios that the tests run, Seawall alone, one seed
    python -m benchmarks.overload --only S1,S16 --controllers seawall,gradient2 --seeds 2
    python -m benchmarks.overload --golden      rewrite benchmarks/overload/golden/ after a change of a law

The same seeds give the same numbers on every machine; only the time that it takes differs. A goal that is missed is
shown as missed and does not make this program fail.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.harness import RESULTS, Report, draw, environment, say
from benchmarks.overload import golden, laws, report, scenarios
from benchmarks.overload.engine import NEVER, Controller
from benchmarks.overload.scenarios import CURVES, SCENARIOS, Scenario
from benchmarks.overload.seawall import Seawall

CONTROLLERS: dict[str, Callable[[], Controller]] = {report.OURS: Seawall, **laws.LAWS}
ALL: dict[str, Scenario] = {**SCENARIOS, **CURVES}

Job = tuple[str, str, int]


def simulate(job: Job) -> tuple[Job, dict[str, float], int]:
    """Run a scenario under a controller with a seed: its metrics, and how many requests there were."""
    name, controller, seed = job
    run = scenarios.run(ALL[name], lambda setup: CONTROLLERS[controller](), seed)
    return job, ALL[name].measure(run), sum(map(len, run.logs))


def expected(name: str) -> float:
    """About how many requests a scenario has."""
    requests = 0.0
    for source in ALL[name].build().sources:
        start = 0
        for until, mean in source.phases:
            requests += (until - start) / mean if mean < NEVER else 0
            start = until
    return requests


def simulate_all(jobs: Sequence[Job]) -> dict[tuple[str, str], list[dict[str, float]]]:
    """Run all jobs on all cores, the longest first; the metrics of each scenario and controller in order of seeds."""
    began, done, requests = time.monotonic(), 0, 0
    found: dict[Job, dict[str, float]] = {}
    sizes = {name: expected(name) for name in dict.fromkeys(name for name, _, _ in jobs)}
    ordered = sorted(jobs, key=lambda job: -sizes[job[0]])
    total = sum(sizes[name] for name, _, _ in jobs)
    share, shown = 0.0, 0.0
    with multiprocessing.Pool(min(len(jobs), multiprocessing.cpu_count())) as pool:
        for job, metrics, count in pool.imap_unordered(simulate, ordered):
            found[job] = metrics
            done, requests, share = done + 1, requests + count, share + sizes[job[0]] / total
            taken = time.monotonic() - began
            if share - shown >= 0.02 or done == len(jobs):
                shown = share
                say(
                    f"{done}/{len(jobs)} runs, {share:4.0%}, {requests:,} requests, {taken:.0f} s, "
                    f"about {taken * (1 - share) / share:.0f} s to go"
                )
    collected: dict[tuple[str, str], list[dict[str, float]]] = {}
    for job in jobs:
        collected.setdefault(job[:2], []).append(found[job])
    return collected


def chosen(only: str, known: Sequence[str]) -> list[str]:
    """The names that ``only`` lists, each in full or up to a hyphen: S1 is S1-2x, S1-5x and S1-10x."""
    parts = [part for part in only.split(",") if part]
    unknown = [part for part in parts if not any(name == part or name.startswith(part + "-") for name in known)]
    if unknown:
        raise SystemExit(f"unknown: {', '.join(unknown)}; there are {', '.join(known)}")
    return [name for name in known if any(name == part or name.startswith(part + "-") for part in parts)]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.overload", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", help="scenarios, as S1,S4-20s; load for the curves of the plot")
    parser.add_argument("--controllers", help=f"some of {','.join(CONTROLLERS)}")
    parser.add_argument("--seeds", type=int, help="how many, 5 unless told")
    parser.add_argument("--short", action="store_true", help="the scenarios that the tests run")
    parser.add_argument("--golden", action="store_true", help="rewrite the exact counts that the tests compare")
    parser.add_argument("--json", type=Path, help="where to write; results/overload.json if everything runs")
    parser.add_argument("--list", action="store_true", help="name the scenarios")
    options = parser.parse_args(arguments)

    if options.list:
        for name, scenario in SCENARIOS.items():
            print(f"{name:<16}  {scenario.title}")
        return 0
    if options.golden:
        for name in golden.SHORT:
            golden.write(name, golden.counts(golden.simulate(name)))
            say(f"wrote {golden.path(name)}")
        return 0

    everything = not (options.only or options.short or options.controllers)
    names = list(golden.SHORT) if options.short else list(ALL)
    if options.only:
        names = chosen(options.only, list(ALL))
    controllers = list(CONTROLLERS)
    if options.short:
        controllers = [report.OURS]
    if options.controllers:
        controllers = chosen(options.controllers, list(CONTROLLERS))
    seeds = options.seeds or (1 if options.short else 5)

    found = simulate_all([(name, one, seed) for name in names for one in controllers for seed in range(1, seeds + 1)])
    print(report.metrics_table(found, controllers))
    print()
    print(report.goals_table(found, controllers))
    outcomes = [outcome for _, outcome in report.outcomes(found)]
    if outcomes:
        print(f"\n{outcomes.count('met')} of {len(outcomes)} goals are met with each of {seeds} seeds.")

    target = options.json or (RESULTS / "overload.json" if everything else None)
    if target:
        written = Report("overload control, simulated", environment(["seawall"]))
        written.parts = report.document(found, controllers, seeds)
        written.write(target)
        say(f"wrote {target}")
        draw(target, "benchmarks.overload.plots:curves")
    return 0


if __name__ == "__main__":
    sys.exit(main())
