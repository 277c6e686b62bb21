#!/usr/bin/env python
"""What Seawall adds to a request, in memory, beside a hand-written floor and the peers. One interleaved run.

    python benchmarks/overhead.py           everything, about ten minutes; writes results/overhead.{json,svg,png}
    python benchmarks/overhead.py --quick   the same at CI size, under a minute; writes nothing without --json
    python benchmarks/overhead.py --only direct --only server

Needs `pip install -e .` and, for the peers, `pip install slowapi asgi-ratelimit traffik fastapi-guard limits uvicorn
httptools uvloop prometheus-client matplotlib`. A peer that is missing or does not work is listed with the reason.

Parts: **direct** ASGI calls; **keys** (time, growth and memory by number of live keys); **refusals**; **server**
(uvicorn under load, processor time per request). The verdicts at the end are computed from what was measured. Timings
never make this program fail; it exits with 1 if Seawall or the benchmark itself broke.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    # In place of this directory, in which `import redis` would find another benchmark.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks import direct, harness, keys, peers, server
from benchmarks.harness import Report, Summary, Verdict, say, show

PARTS = ("direct", "keys", "refusals", "server")


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is measured."""

    rounds: int
    """Of direct calls and of access to tables."""
    slot: float
    """Seconds per slot of direct calls."""
    servers: int
    """How often all servers are started."""
    server_rounds: int
    """Each time."""
    server_slot: float
    sizes: tuple[int, ...]
    """Live keys."""
    stack_growth: int
    """Keys that the whole stack grows to."""
    limits_sizes: tuple[int, ...]
    limits_seconds: float
    growths: int
    """How often a table grows, with and without the garbage collector."""


FULL = Effort(100, 0.004, 4, 6, 0.6, (1, 1_000, 100_000, 1_000_000), 1_000_000, (1, 1_000, 10_000, 100_000), 2.0, 3)
QUICK = Effort(8, 0.004, 1, 4, 0.2, (1, 1_000, 100_000), 30_000, (1, 1_000), 0.2, 3)


@dataclass(slots=True)
class Part:
    """What one part found: numbers for the report, named ``measured`` numbers for verdicts, text, what broke."""

    data: dict[str, Any]
    measured: dict[str, float]
    text: str
    broken: list[str]


# Parts


def run_direct(effort: Effort, seed: int) -> Part:
    """Part 1: direct ASGI calls."""
    rows = direct.measure(direct.SUBJECTS, rounds=effort.rounds, seconds=effort.slot, seed=seed, progress=_progress)
    added = {row.name: row.added.median for row in rows if row.added}
    names = {
        "direct.seawall": direct.SEAWALL_3,
        "direct.seawall_yielding": direct.SEAWALL_3_YIELDING,
        "direct.limits_hit": direct.LIMITS_1_YIELDING,
        "direct.admission": direct.SEAWALL_GUARDED,
    }
    measured = {short: added[name] for short, name in names.items() if name in added}
    for row in rows:
        if row.name == direct.SEAWALL_3 and row.times_floor:
            measured["direct.times_floor"] = row.times_floor.median
    return Part(
        {"unit": "us", "rows": rows},
        measured,
        direct.rendered(rows) + "\n\n" + where_we_lose(rows),
        _broken(rows),
    )


def where_we_lose(rows: Sequence[direct.Row]) -> str:
    """Which peers add less than Seawall with as many limits, in words."""
    seawall = {
        limits: row.added.median
        for row in rows
        for limits in (1, 3)
        if row.added and row.name == f"Seawall, {limits} limit{'s' * (limits > 1)}"
    }
    lost = []
    for row in rows:
        limits = 3 if " 3 " in row.name else 1
        ours = row.ours or row.name.startswith("Seawall")
        if not ours and row.added and limits in seawall and row.added.median < seawall[limits]:
            lost.append(
                f"{row.name} adds {show(row.added.median)} us, Seawall with as many limits {show(seawall[limits])} us"
            )
    if not seawall:
        return "Seawall was not measured."
    return "Cheaper than Seawall: " + ("; ".join(lost) + "." if lost else "none of the peers.")


def run_refusals(effort: Effort, seed: int) -> Part:
    """Part 3: what a 429 costs, over an application that answers one at once."""
    rows = direct.measure(direct.REFUSALS, rounds=effort.rounds, seconds=effort.slot, seed=seed, progress=_progress)
    added = {row.name: row.added.median for row in rows if row.added}
    names = {"refusals.direct": direct.SEAWALL_REFUSING, "refusals.shed": direct.SEAWALL_SHEDDING}
    measured = {short: added[name] for short, name in names.items() if name in added}
    return Part({"unit": "us", "rows": rows}, measured, direct.rendered(rows), _broken(rows))


def run_server(effort: Effort, seed: int) -> Part:
    """Part 4: processor time per request of a real server."""
    samples, failures = server.measure(
        generations=effort.servers,
        rounds=effort.server_rounds,
        seconds=effort.server_slot,
        connections=16,
        seed=seed,
    )
    lines: list[list[str]] = []
    data: dict[str, Any] = {}
    measured: dict[str, float] = {}
    for served in server.SERVED:
        if served.name not in samples:
            lines.append([served.name, failures[served.name]])
            data[served.name] = {"failure": failures[served.name]}
            continue
        cpu, rate = samples[served.name].cpu, Summary.of(samples[served.name].rate)
        base = samples.get(served.base or "")
        added = Summary.of(harness.differences(cpu, base.cpu)) if base else None
        total = Summary.of(cpu)
        data[served.name] = {"base": served.base, "cpu_us": total, "requests_per_second": rate, "added_us": added}
        lines.append(
            [
                served.name,
                show(total.median),
                show(added.median if added else None),
                f"{show(added.p10)}..{show(added.p90)}" if added else "-",
                show(rate.median),
            ]
        )
        if added:
            measured[f"server.{served.name}"] = added.median
    text = harness.table(["application", "cpu us/request", "added us", "p10..p90", "requests/s"], lines)
    broken = [f"{name} in the server {why}" for name, why in failures.items() if name.startswith("Seawall")]
    return Part({"unit": "us", "rows": data}, measured, text, broken)


def run_keys(effort: Effort, seed: int) -> Part:
    """Part 2: what live keys cost in time, in pauses and in memory."""
    part = Part({}, {"keys.largest": float(effort.sizes[-1])}, "", [])
    for section in (access_section, growth_section, memory_section):
        try:
            section(part, effort, seed)
        except Exception as error:
            part.broken.append(f"keys, {section.__name__}: {error}")
    part.text = part.text.strip()
    return part


def access_section(part: Part, effort: Effort, seed: int) -> None:
    """Time per call by number of live keys, hot and uniform, as times what one key costs."""
    say("  access")
    samples = harness.probe(
        "benchmarks.keys",
        {"probe": "access", "sizes": effort.sizes, "rounds": effort.rounds, "seed": seed, "stacks": True},
        timeout=1800,
    )
    lines = []
    data: dict[str, Any] = {}
    for table, base in (("backend", "calling"), ("stack", "bare")):
        one = _costs(samples, table, base, effort.sizes[0], "hot")
        for size in effort.sizes:
            for pattern in ("hot", "uniform"):
                taken = _costs(samples, table, base, size, pattern)
                costs = Summary.of(taken).scaled(1e-3)
                ratio = Summary.of(harness.ratios(taken, one)).median
                data[f"{table} {size} {pattern}"] = {"us": costs, "ratio": ratio}
                part.measured[f"keys.{table}.{pattern}.{size}"] = ratio
                label = {"backend": "memory backend, 1 charge", "stack": "whole stack, 3 limits"}[table]
                lines.append(
                    [
                        f"{label}, {pattern}",
                        f"{size:,}",
                        show(costs.median),
                        f"{show(costs.p10)}..{show(costs.p90)}",
                        show(ratio),
                    ]
                )
    first = None
    for size in effort.limits_sizes:
        hits: list[float] = harness.probe(
            "benchmarks.keys", {"probe": "limits", "size": size, "seconds": effort.limits_seconds}, timeout=600
        )
        costs = Summary.of(hits).scaled(1e-3)
        first = first or costs.median
        data[f"limits {size}"] = {"us": costs, "ratio": costs.median / first}
        lines.append(
            [
                "limits fixed window, 1 hit, yielding loop",
                f"{size:,}",
                show(costs.median),
                f"{show(costs.p10)}..{show(costs.p90)}",
                show(costs.median / first),
            ]
        )
    part.data["access"] = data
    part.text += harness.table(["table and pattern", "live keys", "cpu us/call", "p10..p90", "x one key"], lines)


def _costs(samples: Mapping[str, list[float]], table: str, base: str, size: int, pattern: str) -> list[float]:
    return harness.differences(samples[f"{table} {size} {pattern}"], samples[f"{base} {size} {pattern}"])


def growth_section(part: Part, effort: Effort, seed: int) -> None:
    """The worst single call while a table grows, beside the worst of a call that does nothing."""
    lines = []
    data: dict[str, Any] = {}
    plan = [("backend", effort.sizes[-1]), ("stack", effort.stack_growth), ("dict", effort.sizes[-1])]
    for table, size in plan:
        for collect in (False, True) if table != "dict" else (False,):
            runs = []
            for number in range(effort.growths if table != "dict" else 1):
                say(f"  growth of {table} to {size:,} keys, gc {'on' if collect else 'off'}, {number + 1}")
                arguments = {"probe": "growth", "table": table, "keys": size, "collect": collect}
                runs.append(harness.probe("benchmarks.keys", arguments, timeout=900))
            name = f"{table} gc {'on' if collect else 'off'}"
            data[name] = {"keys": size, "runs": runs, "unit": "us"}
            part.measured[f"growth.{name}"] = worst(runs)
            label = {"backend": "memory backend", "stack": "whole stack", "dict": "one plain dict"}[table]
            lines.append([f"{label}, {size:,} keys, gc {'on' if collect else 'off'}", *_growth_cells(runs)])
    headings = ["growth to", "p50 us", "p99.99", "max wall", "idle max", "max cpu, each run", "idle max cpu"]
    part.data["growth"] = data
    part.text += "\n\n" + harness.table(headings, lines)
    part.text += (
        "\nwall: as the clock has it; cpu: the thread's own time, without what other processes did meanwhile;"
        "\nidle: calls that do nothing, timed between the others: the machine's own pauses. The bar is on the cpu time"
        "\nof the worst call, in the best of the runs: growth is the same in every run, the machine's noise is not."
    )


def worst(runs: Sequence[Mapping[str, Mapping[str, float]]]) -> float:
    """The worst call's processor time in the run that was disturbed least, in microseconds."""
    return min(run["cpu"]["max"] for run in runs)


def _growth_cells(runs: Sequence[Mapping[str, Mapping[str, float]]]) -> list[str]:
    middle = sorted(runs, key=lambda run: run["cpu"]["max"])[len(runs) // 2]
    return [
        show(middle["wall"]["p50"]),
        show(middle["wall"]["p99.99"]),
        show(middle["wall"]["max"]),
        show(middle["idle wall"]["max"]),
        " ".join(f"{run['cpu']['max']:.0f}" for run in runs),
        show(middle["idle cpu"]["max"]),
    ]


def memory_section(part: Part, effort: Effort, seed: int) -> None:
    """Bytes per tracked key."""
    lines = []
    data: dict[str, Any] = {}
    size = effort.sizes[-1]
    cases = [("backend", kind) for kind in keys.KINDS] + [("stack", "tenant id and IPv4"), ("dict", "tenant id")]
    for table, kind in cases:
        say(f"  memory of {table}, {kind}")
        found = {
            how: harness.probe(
                "benchmarks.keys",
                {"probe": "memory", "table": table, "kind": kind, "keys": size, "trace": how == "traced"},
                timeout=900,
            )
            for how in ("resident", "traced")
        }
        data[f"{table}, {kind}"] = {"keys": size, "unit": "B/key", **found}
        if table != "dict":
            part.measured[f"memory.{table}.{kind}"] = max(found.values())
        label = {"backend": "memory backend", "stack": "whole stack", "dict": "one plain dict"}[table]
        lines.append([f"{label}, {size:,} keys, {kind}", show(found["resident"]), show(found["traced"])])
    part.data["memory"] = data
    part.text += "\n\n" + harness.table(["memory", "RSS B/key", "tracemalloc B/key"], lines)


def _progress(text: str) -> None:
    say(f"  {text}")


def _broken(rows: Sequence[direct.Row]) -> list[str]:
    return [f"{row.name}: {row.failure}" for row in rows if row.failure and (row.ours or "Seawall" in row.name)]


RUNNERS: Mapping[str, Callable[[Effort, int], Part]] = {
    "direct": run_direct,
    "keys": run_keys,
    "refusals": run_refusals,
    "server": run_server,
}


# Verdicts


def verdicts(measured: Mapping[str, float]) -> list[Verdict]:
    """The bars that Seawall sets itself, against what was measured. Where a number is missing, so is the verdict."""
    seawall = measured.get("direct.seawall")
    hit = measured.get("direct.limits_hit")
    size = int(measured.get("keys.largest", 1_000_000))
    found = [
        Verdict("a", "whole stack, 3 limits, over the bare application", seawall, 10.0, "us"),
        Verdict(
            "b",
            "whole stack, 3 limits, against one awaited hit of limits (fixed window), yielding loop",
            measured.get("direct.seawall_yielding") if hit else None,
            hit or 0.0,
            "us",
        ),
        Verdict("c", "whole stack, 3 limits, against the floor", measured.get("direct.times_floor"), 4.0, "x"),
    ]
    for table, label in (("backend", "memory backend"), ("stack", "whole stack")):
        for pattern, bar in (("hot", 1.3), ("uniform", 2.5)):
            value = measured.get(f"keys.{table}.{pattern}.{size}")
            found.append(Verdict("d", f"{label}, {pattern}, {size:,} live keys against one", value, bar, "x"))
    for table, label in (("backend", "memory backend"), ("stack", "whole stack")):
        for collector in ("off", "on"):
            value = measured.get(f"growth.{table} gc {collector}")
            found.append(Verdict("e", f"worst call while the {label} grows, gc {collector}", value, 1000.0, "us"))
    memory = [value for name, value in measured.items() if name.startswith("memory.")]
    found.append(Verdict("f", "memory per tracked key, the costliest kind", max(memory, default=None), 250.0, "B"))
    refusing = measured.get("server.Seawall refusing")
    found.append(Verdict("g", "refusal over the server's floor, uvicorn, processor time", refusing, 10.0, "us"))
    found.append(Verdict("g", "refusal over a prebuilt 429, direct call", measured.get("refusals.direct"), 10.0, "us"))
    admission = measured.get("direct.admission")
    found.append(Verdict("h", "overload control, over the same without, yielding loop", admission, 5.0, "us"))
    found.append(
        Verdict("h", "shed request over a prebuilt answer, direct call", measured.get("refusals.shed"), 10.0, "us")
    )
    return found


# Command line


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """What the command line asks for."""
    description, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="CI size: fewer rounds, at most 100,000 keys")
    parser.add_argument("--rounds", type=int, metavar="N", help="rounds of direct calls (default 100, quick 8)")
    parser.add_argument("--only", action="append", choices=PARTS, metavar="PART", help="one of " + ", ".join(PARTS))
    parser.add_argument("--seed", type=int, default=1, help="of the order within rounds and of random keys")
    parser.add_argument("--json", type=Path, metavar="PATH", help="where the results go; the plots go beside it")
    parser.add_argument("--no-plot", action="store_true", help="write no plots")
    asked = parser.parse_args(argv)
    if asked.rounds is not None and asked.rounds < 1:
        parser.error("--rounds must be at least 1")
    if asked.json is None and not asked.quick and not asked.only:
        asked.json = harness.RESULTS / "overhead.json"
    return asked


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is asked for, print it, write it; 1 if something broke."""
    asked = arguments(argv)
    logging.disable(logging.WARNING)
    effort = QUICK if asked.quick else FULL
    if asked.rounds:
        effort = Effort(**{**{name: getattr(effort, name) for name in Effort.__slots__}, "rounds": asked.rounds})
    report = Report("overhead", harness.environment(peers.PACKAGES))
    report.parts["effort"] = effort
    print(harness.header(report.environment))
    measured: dict[str, float] = {}
    broken: list[str] = []
    for name in PARTS:
        if asked.only and name not in asked.only:
            continue
        say(f"{name}:")
        part = RUNNERS[name](effort, asked.seed)
        report.parts[name] = part.data
        measured |= part.measured
        broken += part.broken
        print(f"\n## {name}\n\n{part.text}", flush=True)
    report.verdicts = verdicts(measured)
    print("\n## verdicts\n")
    print("\n".join(str(verdict) for verdict in report.verdicts if verdict.value is not None or not asked.only))
    for line in broken:
        print(f"broken: {line}")
    if asked.json:
        report.write(asked.json)
        say(f"wrote {asked.json}")
        if not asked.no_plot:
            harness.draw(asked.json, "benchmarks.plots:overhead")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
