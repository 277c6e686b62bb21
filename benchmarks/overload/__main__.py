"""Seawall and other laws of overload control in simulated time: python -m benchmarks.overload --help."""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time

from benchmarks.harness import say, show, table
from benchmarks.overload import laws, scenarios
from benchmarks.overload.seawall import Seawall

CONTROLLERS = {"seawall": Seawall, **laws.LAWS}


def _job(job: tuple[str, str, int]) -> tuple[tuple[str, str, int], dict[str, float], float, int]:
    name, controller, seed = job
    began = time.perf_counter()
    scenario = scenarios.SCENARIOS[name]
    run = scenarios.run(scenario, lambda setup: CONTROLLERS[controller](), seed)
    return job, scenario.measure(run), time.perf_counter() - began, sum(map(len, run.logs))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overload")
    parser.add_argument("--only", default="")
    parser.add_argument("--controllers", default=",".join(CONTROLLERS))
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    only = [part for part in arguments.only.split(",") if part]
    names = [
        name for name in scenarios.SCENARIOS if not only or any(name == o or name.startswith(o + "-") for o in only)
    ]
    jobs = [
        (name, controller, seed)
        for name in names
        for controller in arguments.controllers.split(",")
        for seed in range(1, arguments.seeds + 1)
    ]
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    with multiprocessing.Pool() as pool:
        for number, (job, metrics, _, _) in enumerate(pool.imap(_job, jobs), 1):
            found.setdefault(job[:2], []).append(metrics)
            say(f"{number}/{len(jobs)} {job}")
    rows = []
    for (name, controller), results in found.items():
        for metric in results[0]:
            values = [result[metric] for result in results]
            rows.append(
                [name, controller, metric, show(sum(values) / len(values)), show(min(values)), show(max(values))]
            )
    print(table(["scenario", "controller", "metric", "mean", "min", "max"], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
