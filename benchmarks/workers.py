#!/usr/bin/env python
"""What it costs that several workers tell the same metrics: counting in mapped files, and scrapes of many of them.

    python benchmarks/workers.py            about two minutes; writes results/workers.json
    python benchmarks/workers.py --quick    the same at CI size, some seconds; writes nothing without --json

**request**: a whole request, alone and as one of several workers, in one interleaved run; the increments themselves.
**scrape**: what reading the files of so many workers takes that have died, before and after they were folded.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks import apps, direct, harness
from benchmarks.direct import Subject
from benchmarks.harness import Report, Summary, Verdict, say, show
from seawall.cellfiles import CellFiles
from seawall.cells import METRICS_DIR, Cells, Values
from seawall.metrics import SPECS

ALONE = "Seawall, 3 limits"
TOGETHER = "Seawall, 3 limits, one of several workers"
ALONE_GUARDED = "Seawall, 3 limits and overload control"
TOGETHER_GUARDED = "Seawall, 3 limits and overload control, one of several workers"
INCREMENTS = 10
"""Of a request with three limits: three checks, two of the decision, in flight and out, the outcome, two durations."""


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is measured: rounds of calls, seconds a slot, rounds of scrapes, dead workers."""

    rounds: int
    slot: float
    scrapes: int
    dead: Sequence[int]


FULL = Effort(120, 0.02, 30, (1, 8, 64))
QUICK = Effort(6, 0.004, 3, (1, 8))


@contextmanager
def a_directory() -> Iterator[Path]:
    """In memory, where `seawall run` has it as well."""
    memory = Path("/dev/shm")
    with TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as directory:
        yield Path(directory)


def one_of_several(directory: Path, config: dict[str, Any]) -> apps.ASGIApp:
    """The whole stack, counting in a file."""
    os.environ[METRICS_DIR] = str(directory)
    try:
        return apps.seawall(apps.bare, config)
    finally:
        del os.environ[METRICS_DIR]


def request(effort: Effort, seed: int) -> tuple[dict[str, Any], dict[str, float], str]:
    """A whole request, and an increment."""
    with a_directory() as directory:
        subjects = (
            Subject(direct.BARE_YIELDING, None, lambda: apps.bare, yielding=True),
            Subject(ALONE, direct.BARE_YIELDING, lambda: apps.seawall(apps.bare, apps.three_limits()), yielding=True),
            Subject(TOGETHER, ALONE, lambda: one_of_several(directory, apps.three_limits()), yielding=True),
            Subject(
                ALONE_GUARDED, direct.BARE_YIELDING, lambda: apps.seawall(apps.bare, apps.guarded()), yielding=True
            ),
            Subject(TOGETHER_GUARDED, ALONE_GUARDED, lambda: one_of_several(directory, apps.guarded()), yielding=True),
        )
        rows = direct.measure(
            subjects, rounds=effort.rounds, seconds=effort.slot, seed=seed, progress=lambda text: say(f"  {text}")
        )
        increments = increment(directory, effort, seed)
    for row in rows:
        if row.failure:
            raise RuntimeError(f"{row.name}: {row.failure}")
    added = {row.name: row.added.median for row in rows if row.added}
    text = (
        direct.rendered(rows)
        + "\n\n"
        + harness.table(
            ["an increment", "ns", "p10..p90"],
            [[name, show(one.median), f"{show(one.p10)}..{show(one.p90)}"] for name, one in increments.items()],
        )
    )
    measured = {"request": added[TOGETHER], "guarded": added[TOGETHER_GUARDED], "alone": added[ALONE]}
    return {"unit": "us", "rows": rows, "increments_ns": increments}, measured, text


def increment(directory: Path, effort: Effort, seed: int) -> dict[str, Summary]:
    """Nanoseconds of ``values[index] += 1``."""
    listed = Cells()
    mapped = Cells(CellFiles(directory, 99))
    spec = next(spec for spec in SPECS if not spec.labels)
    for cells in (listed, mapped):
        cells.values[cells.index(spec)] += 1

    def slot(values: Values, at: int) -> Callable[[], float]:
        def run() -> float:
            calls = 2_000
            began = time.process_time_ns()
            for _ in range(calls):
                values[at] += 1
                values[at] += 1
                values[at] += 1
                values[at] += 1
                values[at] += 1
            return (time.process_time_ns() - began) / calls / 5

        return run

    slots = {
        "in a list": slot(listed.values, listed.index(spec)),
        "in a mapped file": slot(mapped.values, mapped.index(spec)),
    }
    samples = harness.interleave(slots, rounds=effort.rounds, seed=seed)
    return {name: Summary.of(taken) for name, taken in samples.items()}


def scrape(effort: Effort) -> tuple[dict[str, Any], dict[str, float], str]:
    """Milliseconds of reading all files, by the number of workers that have died and of the series of each."""
    data: dict[str, Any] = {}
    lines = []
    measured: dict[str, float] = {}
    for series in (100, 1_000):
        for dead in effort.dead:
            say(f"  {dead} dead workers of {series} series")
            with a_directory() as directory:
                for _ in range(dead):
                    worker = Cells(CellFiles(directory, 0))
                    number = 0
                    while len(worker) < series:
                        for spec in SPECS:
                            worker.index(spec, *(f"{label}{number}" for label in spec.labels))
                        number += 1
                    worker.values[worker.index(SPECS[0], "allowed", "normal")] += 1
                    worker.end()
                files = CellFiles(directory, 0)
                before = Summary.of([timed(files.read) for _ in range(effort.scrapes)])
                folding = timed(files.fold)
                after = Summary.of([timed(files.read) for _ in range(effort.scrapes)])
            data[f"{dead} dead, {series} series"] = {"before": before, "folding": folding, "after": after}
            lines.append([f"{dead} workers, {series:,} series", *map(show, (before.median, folding, after.median))])
            measured[f"scrape.{dead}.{series}"] = before.median
    text = harness.table(["that have died", "read ms", "fold ms", "then read ms"], lines)
    return {"unit": "ms", **data}, measured, text


def timed(work: Callable[[], object]) -> float:
    """Milliseconds of processor time."""
    began = time.process_time_ns()
    work()
    return (time.process_time_ns() - began) / 1e6


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """What the command line asks for."""
    description, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="CI size")
    parser.add_argument("--seed", type=int, default=1, help="of the order within rounds")
    parser.add_argument("--json", type=Path, metavar="PATH", help="where the results go")
    asked = parser.parse_args(argv)
    if asked.json is None and not asked.quick:
        asked.json = harness.RESULTS / "workers.json"
    return asked


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write."""
    asked = arguments(argv)
    logging.disable(logging.WARNING)
    effort = QUICK if asked.quick else FULL
    report = Report("workers", harness.environment(("prometheus-client",)))
    report.parts["effort"] = effort
    measured: dict[str, float] = {}
    for name, (data, found, text) in (
        ("request", request(effort, asked.seed)),
        ("scrape", scrape(effort)),
    ):
        report.parts[name] = data
        measured |= found
        print(f"\n## {name}\n\n{text}", flush=True)
    report.verdicts = [
        Verdict("a", "a request as one of several workers, over one alone", measured["request"], 1.0, "us"),
        Verdict("b", "a scrape after 64 workers died, of 1,000 series", measured.get("scrape.64.1000"), 100.0, "ms"),
    ]
    print("\n## verdicts\n")
    print("\n".join(str(verdict) for verdict in report.verdicts))
    if asked.json:
        report.write(asked.json)
        say(f"wrote {asked.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
