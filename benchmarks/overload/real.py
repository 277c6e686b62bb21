#!/usr/bin/env python
"""Overload on real servers: Seawall beside nothing, uvicorn's own limit, a fixed limit and aioresilience.

    python -m benchmarks.overload.real             everything; writes results/overload_real.json, overload.{svg,png}
    python -m benchmarks.overload.real --quick     under a minute; writes nothing without --json
    python -m benchmarks.overload.real --only S1,S16 --subjects bare,seawall

Each run is one uvicorn worker on one core and an open-loop generator on another: requests leave when a Poisson schedule
says so, latency counts from the schedule, callers give up after a second and close their connection. C, the capacity of
the bare application, is measured just before and after every run, and rho, what a refusal costs beside a service, for
every case. Goodput is what was answered 2xx within 500 ms, as a part of C; Gideal(N) = (1 - N rho) / (1 - rho) is the
most that any policy can reach when N times C is offered. A run in which the generator was more than 20 ms late (p99),
the server's core was shared or C drifted is marked with `!` and left out where others are left.

Needs `pip install -e .[bench]`. What is missing is listed with the reason. Exits with 1 if Seawall or the benchmark
broke or time ran out; what was measured never makes it fail.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import apps, harness
from benchmarks.harness import Report, Summary, Verdict, percentile, say, show
from benchmarks.overload import outcomes
from benchmarks.overload.cases import CASES, QUICK, SERVERS, SETTLE, Case, Slot, unreliable
from benchmarks.overload.servers import SUBJECTS, Serving, key_of, serve
from benchmarks.server import LOAD_CORE, Running
from benchmarks.server import _child as child

PACKAGES = ("uvicorn", "uvloop", "httptools", "h11", "websockets", "starlette", "aioresilience")
FLOOR = "refuse"
PEERS = (", aioresilience",)
"""How the names of failures end that are not ours."""
CALLERS = 24
"""Connections of the closed loop that measures capacity: enough to keep every application busy."""
MARGIN = 25.0
"""Seconds that a server or a generator may live beyond what its run takes."""
BROKEN = "broken"


class TimeIsUp(BaseException):
    """The limit on the whole program's time was reached."""


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is measured."""

    rounds: int
    factor: float
    """Of the time that each case takes."""
    calibration: float
    """Seconds for each measurement of capacity."""


FULL, SHORT = Effort(3, 1.0, 1.0), Effort(1, 0.45, 0.5)


@dataclass(frozen=True, slots=True)
class Taken:
    """What one run gave."""

    round: int
    measured: Mapping[str, float]
    usual: Sequence[float]
    """Latencies at .7 C, in seconds."""
    reasons: Sequence[str]
    """Why it is not to be relied on."""


@dataclass(slots=True)
class Results:
    """Everything that was measured, by case and subject."""

    taken: dict[str, dict[str, list[Taken]]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    """What could not be measured, by case and subject, or by case; and why."""

    def add(self, case: Case, subject: str, taken: Taken) -> None:
        """Keep one run."""
        self.taken.setdefault(case.title, {}).setdefault(subject, []).append(taken)

    def runs(self, case: Case, subject: str) -> list[Taken]:
        """All runs of a case."""
        return self.taken.get(case.title, {}).get(subject, [])

    def relied_on(self, case: Case, subject: str) -> list[Taken]:
        """The runs that the machine did not spoil; all of them where it spoiled all."""
        runs = self.runs(case, subject)
        return [run for run in runs if not run.reasons] or runs

    def usual_p99(self, like: Case, subject: str, number: int) -> float | None:
        """The p99 before the overload over all runs of a scenario's application in one round, in milliseconds."""
        pooled = [
            latency
            for case in CASES
            if (case.scenario, case.app) == (like.scenario, like.app)
            for run in self.runs(case, subject)
            if run.round == number
            for latency in run.usual
        ]
        return percentile(pooled, 0.99) * 1e3 if pooled else None

    def summaries(self, case: Case, subject: str) -> dict[str, Summary]:
        """Each metric over the rounds."""
        samples: dict[str, list[float]] = {}
        for run in self.relied_on(case, subject):
            for name, value in run.measured.items():
                samples.setdefault(name, []).append(value)
            usual = self.usual_p99(case, subject, run.round)
            if usual and "p99_ms" in run.measured:
                samples.setdefault("times_usual_p99", []).append(run.measured["p99_ms"] / usual)
        return {name: Summary.of(values) for name, values in samples.items()}


# Measuring


@contextmanager
def generator() -> Iterator[subprocess.Popen[str]]:
    """A load generator's process."""
    with child([sys.executable, "-m", "benchmarks.overload.generator", str(LOAD_CORE)]) as process:
        yield process


def ask(process: subprocess.Popen[str], command: Mapping[str, Any]) -> Any:
    """The generator's answer to one command."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps(command) + "\n")
    process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise RuntimeError("the load generator ended without an answer")
    return json.loads(line)


def closed_loop(load: subprocess.Popen[str], server: Running, seconds: float) -> tuple[float, float]:
    """Requests per second that a server answers at most, and its processor nanoseconds for each."""
    before = server.cpu_ns()
    arguments = {"port": server.port, "connections": CALLERS, "seconds": seconds}
    counts = ask(load, {"limit": seconds + MARGIN, "closed": arguments})
    if counts["errors"] or not counts["requests"]:
        raise RuntimeError(f"calibration: {counts}")
    return counts["requests"] / counts["seconds"], (server.cpu_ns() - before) / counts["requests"]


def connection_cost(load: subprocess.Popen[str], server: Running, rate: float, seconds: float) -> float:
    """Processor nanoseconds of a server for a request on a new connection, at ``rate`` requests per second."""
    plan = {
        "port": server.port,
        "pid": server.process.pid,
        "phases": [{"seconds": seconds, "rates": {"t0": rate}}],
        "kinds": {"t0": (apps.PATH, key_of("t0"))},
        "patience": 1.0,
        "fresh": True,
    }
    record = ask(load, {"limit": seconds + MARGIN, "open": plan})
    (_, before, _), (_, after, _) = record["marks"]
    used: int = after - before
    return used / max(1, len(record["at"]))


@dataclass(slots=True)
class Bench:
    """One case in one round: servers for calibration that run all the time, and one server for each run."""

    case: Case
    loops_per_ms: float
    seconds: float
    load: subprocess.Popen[str]
    bare: Running
    rho: float

    @classmethod
    @contextmanager
    def open(cls, case: Case, loops_per_ms: float, seconds: float) -> Iterator[Bench]:
        """Start what calibration needs, and measure what a refusal costs."""
        with ExitStack() as stack:
            load = stack.enter_context(generator())
            limit = 10 * (case.lasts + MARGIN)
            bare = stack.enter_context(serve(serving(case, "bare", loops_per_ms, limit)))
            closed_loop(load, bare, seconds / 3)
            capacity, service = closed_loop(load, bare, seconds)
            with serve(serving(case, FLOOR, loops_per_ms, 4 * MARGIN)) as refusing:
                closed_loop(load, refusing, seconds / 3)
                _, refusal = closed_loop(load, refusing, seconds)
                if case.fresh:
                    connecting = connection_cost(load, refusing, 4 * capacity, seconds) - refusal
                    refusal, service = refusal + connecting, service + connecting
            yield cls(case, loops_per_ms, seconds, load, bare, refusal / service)

    def capacity(self) -> float:
        """C at this moment, in requests per second."""
        return closed_loop(self.load, self.bare, self.seconds)[0]

    def run(self, subject: str, capacity: float, seed: int) -> Any:
        """The generator's record of one run."""
        limit = self.case.lasts + self.case.patience + MARGIN
        plan = self.case.plan(capacity, seed)
        opened = self.case.connections(capacity) + sum(self.case.streams.values())
        with serve(serving(self.case, subject, self.loops_per_ms, limit, opened)) as server, generator() as load:
            return ask(load, {"limit": limit, "open": {**plan, "port": server.port, "pid": server.process.pid}})


def serving(case: Case, subject: str, loops_per_ms: float, limit: float, connections: int = 0) -> Serving:
    """The server for a subject in a case."""
    http, loop = SERVERS[case.server]
    return Serving(subject, case.app, loops_per_ms, http, loop, connections, limit)


def measure(
    cases: Sequence[Case], subjects: Sequence[str], effort: Effort, seed: int, limit: float, results: Results
) -> None:
    """Every case against every subject, in ``effort.rounds`` rounds, into ``results``; `TimeIsUp` after ``limit`` s."""
    loops_per_ms: float = harness.probe("benchmarks.overload.servers", {}, timeout=120)
    shuffler = random.Random(seed)
    began, done, total = time.monotonic(), 0, effort.rounds * runs_of(cases, subjects)
    for number in range(effort.rounds):
        for case in cases:
            order = [*subjects, *([FLOOR] if case.floor else [])]
            shuffler.shuffle(order)
            try:
                with Bench.open(case, loops_per_ms, effort.calibration) as bench:
                    before = bench.capacity()
                    for place, subject in enumerate(order, 1):
                        spent = time.monotonic() - began
                        say(
                            f"  round {number + 1}/{effort.rounds}  {case.title:<32} {subject:<14} "
                            f"{done + place}/{total}  {minutes(spent)} of at most {minutes(limit)}"
                        )
                        before = one(bench, subject, before, seed + number, number, results)
            except Exception as error:
                results.failures[case.title] = f"{type(error).__name__}: {error}"
                say(f"  {case.title} failed: {error}")
            done += len(order)


def one(bench: Bench, subject: str, before: float, seed: int, number: int, results: Results) -> float:
    """One run into ``results``, or the reason why there is none; capacity after it, in requests per second."""
    name = f"{bench.case.title}, {subject}"
    if name in results.failures:
        return before
    try:
        record = bench.run(subject, before, seed)
    except Exception as error:
        results.failures[name] = str(error)
        say(f"  {name} failed: {error}")
        return before
    after = bench.capacity()
    results.add(bench.case, subject, taken(bench.case, record, before, after, bench.rho, number))
    return after


def taken(case: Case, record: Mapping[str, Any], before: float, after: float, rho: float, number: int) -> Taken:
    """One run, measured."""
    measured = Slot(case, record, (before + after) / 2, rho).measured()
    rows = outcomes.outcomes(record, case.kinds)
    usual = outcomes.served(outcomes.within(rows, min(SETTLE, case.warm / 3), case.warm))
    return Taken(number, measured, usual, unreliable(measured, abs(before - after) / max(before, after)))


def runs_of(cases: Sequence[Case], subjects: Sequence[str]) -> int:
    """How many runs a round has."""
    return sum(len(subjects) + case.floor for case in cases)


def expected_seconds(cases: Sequence[Case], subjects: Sequence[str], effort: Effort) -> float:
    """About how long everything takes."""
    each = [(len(subjects) + case.floor) * (case.lasts + 3.0 + effort.calibration) for case in cases]
    return effort.rounds * (sum(each) + len(cases) * (2.5 + 4 * effort.calibration)) + 3.0


def minutes(seconds: float) -> str:
    """Minutes and seconds."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


# Reporting

COLUMNS = (
    ("goodput", "goodput/C"),
    ("ideal", "Gideal"),
    ("of_ideal", "of Gideal"),
    ("p50_ms", "p50 ms"),
    ("p99_ms", "p99 ms"),
    ("times_usual_p99", "x p99 at .7C"),
    ("refused", "refused"),
    ("refused_p99_ms", "its p99 ms"),
    ("timed_out", "timed out"),
    ("usual_success", "ok at .7C"),
)
"""Of every table: metric and heading."""
EXTRA = {
    "recovery_s": "recovery s",
    "p50_recovery_s": "p50 back s",
    "refusals_answered": "answered < 1 s",
    "of_max": "of max",
    "jain": "Jain",
    "others": "others ok",
    "critical": "critical ok",
    "critical_of_ideal": "critical/ideal",
    "attempts": "tries/call",
    "streams_alive": "streams up",
    BROKEN: "broken",
}
"""Of the tables of scenarios that measure them."""
SHARES = {"refused", "timed_out", "usual_success", "others", "critical", "streams_alive", "refusals_answered", BROKEN}
SHOWN_ALWAYS = {"recovery_s"}


def rendered(results: Results, cases: Sequence[Case], subjects: Sequence[str]) -> str:
    """A table for each scenario: medians over the rounds, and the spread of what matters most."""
    parts = []
    for scenario in dict.fromkeys(case.scenario for case in cases):
        chosen = [case for case in cases if case.scenario == scenario and case.title in results.taken]
        if not chosen:
            continue
        summaries = {
            (case.title, subject): results.summaries(case, subject)
            for case in chosen
            for subject in (*subjects, FLOOR)
            if results.runs(case, subject)
        }
        columns = [*COLUMNS, *extra_columns(chosen, summaries.values())]
        lines = []
        for case in chosen:
            lines += [
                row(case, subject, summaries[case.title, subject], columns, results)
                for subject in (*subjects, FLOOR)
                if (case.title, subject) in summaries
            ]
            if case.goals:
                wanted = {goal.metric: str(goal) for goal in case.goals}
                lines.append(["  goal", *(wanted.get(metric, "") for metric, _ in columns), "", ""])
        headings = [scenario, *(heading for _, heading in columns), "p10..p90", "runs"]
        parts.append(harness.table(headings, lines))
    return "\n\n".join(parts)


def extra_columns(cases: Sequence[Case], measured: Iterator[Any] | Any) -> list[tuple[str, str]]:
    """The columns that only some scenarios have: of their goals, and of what went wrong."""
    wanted = {goal.metric for case in cases for goal in case.goals} | SHOWN_ALWAYS
    found = list(measured)
    if any(summary.get(BROKEN) and summary[BROKEN].median > 0.001 for summary in found):
        wanted.add(BROKEN)
    for metric in ("attempts", "streams_alive"):
        if any(metric in summary for summary in found):
            wanted.add(metric)
    return [(metric, heading) for metric, heading in EXTRA.items() if metric in wanted]


def row(
    case: Case,
    subject: str,
    summaries: Mapping[str, Summary],
    columns: Sequence[tuple[str, str]],
    results: Results,
) -> list[str]:
    """One line of a table."""
    cells = [f"{case.name}  {SUBJECTS.get(subject, 'refuse everything (floor)')}"]
    for metric, _ in columns:
        summary = summaries.get(metric)
        if summary is None:
            cells.append("-")
        elif metric in SHARES:
            cells.append(f"{summary.median * 100:.1f} %")
        else:
            cells.append(
                f"{summary.median:.3f}" if metric in ("goodput", "ideal", "of_ideal") else show(summary.median)
            )
    spread = summaries.get(main_metric(case))
    runs = results.runs(case, subject)
    spoiled = sum(bool(run.reasons) for run in runs)
    cells.append(f"{spread.p10:.2f}..{spread.p90:.2f}" if spread else "-")
    cells.append(f"{len(runs) - spoiled}/{len(runs)} !" if spoiled else str(len(runs)))
    return cells


def main_metric(case: Case) -> str:
    """What the spread is shown of: the first goal's metric, else goodput."""
    return case.goals[0].metric if case.goals else "goodput"


@dataclass(frozen=True, slots=True)
class Aim(Verdict):
    """A verdict whose bar may also be a least value."""

    at_least: bool = True

    @property
    def outcome(self) -> str:
        """held, missed or not measured."""
        if self.value is None:
            return "not measured"
        return "held" if (self.value >= self.bar if self.at_least else self.value <= self.bar) else "missed"

    def __str__(self) -> str:
        measured = "" if self.value is None else f"{show(self.value)}{self.unit}, "
        bound = ">=" if self.at_least else "<="
        return f"({self.name}) {self.outcome:<6} {self.claim}: {measured}goal {bound} {show(self.bar)}{self.unit}"


def verdicts(results: Results, cases: Sequence[Case]) -> list[Verdict]:
    """Seawall's medians against the goals of overload.md."""
    found: list[Verdict] = []
    for case in cases:
        summaries = results.summaries(case, "seawall")
        for goal in case.goals:
            summary = summaries.get(goal.metric)
            value = summary.median if summary else None
            unit = " s" if goal.metric.endswith("_s") else ""
            found.append(Aim(case.scenario, f"{goal.claim}, {case.name}", value, goal.bar, unit, goal.at_least))
    return found


def remarks(results: Results, cases: Sequence[Case]) -> list[str]:
    """What could not be reached, and which runs the machine spoiled."""
    lines = [f"{name}: not measured: {reason}" for name, reason in results.failures.items()]
    for case in cases:
        for subject, runs in results.taken.get(case.title, {}).items():
            lines += [
                f"{case.title}, {subject}, round {run.round + 1}: {', '.join(run.reasons)}"
                for run in runs
                if run.reasons
            ]
        lines += [f"{case.title}: {why}" for why in out_of_reach(results, case)]
    return lines


def out_of_reach(results: Results, case: Case) -> list[str]:
    """Why callers cannot be answered in time here, whatever the policy, where they were not."""
    goal = next((goal for goal in case.goals if goal.metric == "refusals_answered"), None)
    found = {subject: results.summaries(case, subject).get("refusals_answered") for subject in ("seawall", FLOOR)}
    reached = {subject: summary.median for subject, summary in found.items() if summary}
    reasons = []
    if goal and reached.get(FLOOR, 1.0) < goal.bar:
        reasons.append(f"a server that refuses everything answers {reached[FLOOR]:.1%} of it within 1 s")
    if goal and reached.get("seawall", 1.0) < goal.bar and SERVERS[case.server][1] == "uvloop":
        reasons.append(
            "uvloop accepts one connection in each turn of its loop (libuv since 1.45): while handlers compute, "
            "callers with new connections stay in the accept queue, where no application sees them"
        )
    return reasons


def parts(results: Results, cases: Sequence[Case], subjects: Sequence[str]) -> dict[str, Any]:
    """The report's JSON: for each case its terms, and for each subject the summaries and every run."""
    found: dict[str, Any] = {}
    for case in cases:
        measured = {}
        for subject in (*subjects, FLOOR):
            runs = results.runs(case, subject)
            if runs:
                measured[subject] = {
                    "metrics": results.summaries(case, subject),
                    "runs": [
                        {"round": run.round, "unreliable": run.reasons, "metrics": rounded(run.measured)}
                        for run in runs
                    ],
                }
        found[case.title] = {
            "offered": case.total,
            "app": case.app,
            "server": SERVERS[case.server],
            "goals": {goal.metric: str(goal) for goal in case.goals},
            "subjects": measured,
        }
    return found


def rounded(measured: Mapping[str, float]) -> dict[str, float]:
    """Five digits of each."""
    return {name: float(f"{value:.5g}") for name, value in measured.items()}


# Command line


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """What the command line asks for."""
    description, _, details = (__doc__ or "").partition("\n\n")
    scenarios = list(dict.fromkeys(case.scenario for case in CASES))
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.overload.real",
        description=description,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help=f"a smoke run: {', '.join(QUICK)}; bare and seawall")
    parser.add_argument("--rounds", type=int, metavar="N", help="default 3, quick 1")
    parser.add_argument("--only", metavar="S1,S16", help="scenarios, of " + ", ".join(scenarios))
    parser.add_argument("--subjects", metavar="A,B", help="of " + ", ".join(SUBJECTS))
    parser.add_argument("--server", choices=SERVERS, help="parser and event loop for every case")
    parser.add_argument("--limit", type=float, metavar="MINUTES", help="stop after this long (default: 1.5 x expected)")
    parser.add_argument("--seed", type=int, default=1, help="of the schedules and of the order within rounds")
    parser.add_argument("--json", type=Path, metavar="PATH", help="where the results go; the plot goes beside it")
    parser.add_argument("--no-plot", action="store_true", help="write no plot")
    asked = parser.parse_args(argv)
    if asked.rounds is not None and asked.rounds < 1:
        parser.error("--rounds must be at least 1")
    if asked.json is None and not (asked.quick or asked.only or asked.subjects or asked.server):
        asked.json = harness.RESULTS / "overload_real.json"
    for name, known in (("only", scenarios), ("subjects", list(SUBJECTS))):
        setattr(asked, name, harness.listed(parser, name, getattr(asked, name), known))
    return asked


def selection(asked: argparse.Namespace) -> tuple[list[Case], list[str], Effort]:
    """The cases, the subjects and the effort that are asked for."""
    effort = SHORT if asked.quick else FULL
    if asked.rounds:
        effort = Effort(asked.rounds, effort.factor, effort.calibration)
    chosen = [case for case in CASES if not asked.only or case.scenario in asked.only]
    if asked.quick and not asked.only:
        chosen = [case for case in chosen if case.title in QUICK]
    if asked.server:
        chosen = [case.on(asked.server) for case in chosen]
    subjects = asked.subjects or (["bare", "seawall"] if asked.quick else list(SUBJECTS))
    return [case.scaled(effort.factor) for case in chosen], subjects, effort


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is asked for, print it, write it; 1 if something broke or time ran out."""
    asked = arguments(argv)
    cases, subjects, effort = selection(asked)
    expected = expected_seconds(cases, subjects, effort)
    limit = asked.limit * 60 if asked.limit else 1.5 * expected + 20
    report = Report("overload on real servers", harness.environment(PACKAGES))
    print(harness.header(report.environment))
    say(f"{effort.rounds * runs_of(cases, subjects)} runs, about {minutes(expected)} minutes, at most {minutes(limit)}")
    results = Results()
    stopped = run_for(limit, lambda: measure(cases, subjects, effort, asked.seed, limit, results))
    report.parts = {"effort": effort, "cases": parts(results, cases, subjects), "failures": results.failures}
    report.verdicts = verdicts(results, cases)
    print("\n" + rendered(results, cases, subjects))
    print(LEGEND)
    print("\n## goals, Seawall\n")
    judged = [str(verdict) for verdict in report.verdicts if verdict.value is not None]
    print("\n".join(judged) or "none was measured")
    for line in [*remarks(results, cases), *stopped]:
        print(f"note: {line}")
    if asked.json:
        report.write(asked.json)
        say(f"wrote {asked.json}")
        if not asked.no_plot:
            harness.draw(asked.json, "benchmarks.overload.curves:draw")
    broken = [name for name in results.failures if not name.endswith(PEERS)]
    return 1 if stopped or broken or not results.taken else 0


LEGEND = """
Medians over the rounds; p10..p90 of the first goal's column. p50, p99: of what was served. refused: of all requests.
Gideal: if everybody is answered; callers left to time out cost less. x: times the p99 before the overload.
ok at .7C: served in time before the overload. recovery s: until 95 % are served in time again, or all that was watched.
runs: how many counted, of how many; ! where the machine spoiled some (see the notes)."""


def run_for(limit: float, work: Any) -> list[str]:
    """Do ``work`` for at most ``limit`` seconds; why it ended early, if it did. SIGTERM is taken for an interrupt."""

    def time_is_up(number: int, frame: Any) -> None:
        raise TimeIsUp

    def terminated(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    handlers = {signal.SIGALRM: time_is_up, signal.SIGTERM: terminated}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        work()
    except TimeIsUp:
        return [f"stopped after {minutes(limit)}: not everything was measured"]
    except KeyboardInterrupt:
        return ["interrupted: not everything was measured"]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
    return []


if __name__ == "__main__":
    sys.exit(main())
