#!/usr/bin/env python
"""A retry storm: callers that try again, each in the way of its library, in front of a bare server and of Seawall.

    python benchmarks/storm.py              everything; writes results/client_storm.{json,svg,png}
    python benchmarks/storm.py --short      a minute; writes nothing without --json
    python benchmarks/storm.py --subjects tenacity,seawall --servers bare

One uvicorn worker on one core, whose handlers wait 10 ms and then compute for some; four processes of callers on
another, each with one client of httpx. C, the capacity of the bare server, is measured just before and after each run.
The load is open: calls leave by a Poisson schedule, whatever has become of those before, and all runs of a round have
the same one. It begins at .7 C, goes on at .85 C, is 2 C for five seconds (the trigger), and .85 C again for as long as
is watched. Each attempt has 500 ms; each call has three retries at most. `Attempts` are those made for the calls that
were offered during the trigger, for each of them; a server has recovered when at least 95 % of the calls succeed in
every two seconds from there on. The `blip` stops the server for a second at half its capacity.

Where others use the machine, it waits a minute at most before each run, and does again, twice at most, what they have
spoiled: callers that were late, a capacity that drifted, a core that was shared. Where they never leave, root may run
it before them, by `chrt -r 1`; the JSON says so.

Needs `pip install -e .[bench]`. Exits with 1 if Seawall or the benchmark broke or time ran out; what was measured never
makes it fail.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    # In place of this directory, in which `import redis` would find a benchmark.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks import harness
from benchmarks.clientbench import outcomes
from benchmarks.clientbench.callers import BARE, OURS, RETRIES, STAMINA, SUBJECTS, TENACITY, Plan
from benchmarks.harness import Report, Summary, Verdict, say, show
from benchmarks.overload.generator import core_ns
from benchmarks.overload.real import closed_loop, generator, minutes, rounded, run_for
from benchmarks.overload.servers import Serving, serve
from benchmarks.server import LOAD_CORE, SERVER_CORE, Running, _child

PACKAGES = ("httpx", "httpx2", "httpx-retries", "tenacity", "stamina", "uvicorn", "uvloop", "httptools", "starlette")
PROCESSES = 4
"""Of callers, each with one client."""
HEAVIER = 5 / 3
"""Times the processor time of the overload benchmark's handlers (3 ms), so that callers in Python can keep up."""
MARGIN = 30.0
"""Seconds that a process may live beyond what its load takes: for the start, and for the last retries."""
QUIET, PATIENCE = 0.15, 60.0
"""How busy both cores may be before a run, 0..1, and the seconds to wait for that."""
TRIES = 3
"""Of a run that others spoil."""
PEERS = (TENACITY, RETRIES, STAMINA)
"""How the names of failures end that are not ours."""

SERVERS: Mapping[str, str] = {"seawall": "Seawall", BARE: "bare uvicorn"}


@dataclass(frozen=True, slots=True)
class Course:
    """A course of load, as multiples of C and seconds."""

    name: str
    warm: float
    """At .7 C, to get to know each other."""
    before: float
    trigger: float
    after: float
    usual: float = 0.85
    peak: float = 2.0
    stop: float = 0.0
    """Seconds for which the server is stopped when the trigger begins."""

    @property
    def lasts(self) -> float:
        """Seconds from the first to the last call."""
        return self.warm + self.before + self.trigger + self.after

    def phases(self, rate: float) -> list[dict[str, Any]]:
        """Those of a schedule, where C is ``rate`` calls a second."""
        loads = ((self.warm, 0.7), (self.before, self.usual), (self.trigger, self.peak), (self.after, self.usual))
        return [{"seconds": seconds, "rates": {"call": multiple * rate}} for seconds, multiple in loads]

    def scaled(self, factor: float) -> Course:
        """The same in a part of the time, but for the trigger."""
        return replace(self, warm=self.warm * factor, before=self.before * factor, after=self.after * factor)


STORM = Course("storm", warm=4.0, before=5.0, trigger=5.0, after=16.0)
BLIP = Course("blip", warm=2.0, before=3.0, trigger=1.0, after=8.0, usual=0.5, peak=0.5, stop=1.0)
COURSES = (STORM, BLIP)


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is measured."""

    rounds: int
    factor: float
    """Of the time around the trigger."""
    calibration: float
    """Seconds for each measurement of capacity."""
    tries: int = TRIES
    patience: float = PATIENCE
    """Seconds to wait for a machine that others use."""


FULL, SHORT = Effort(3, 1.0, 1.0), Effort(1, 0.2, 0.5, tries=1, patience=0.0)


@dataclass(frozen=True, slots=True)
class Taken:
    """What one run gave."""

    round: int
    measured: Mapping[str, float]
    course: Mapping[str, Sequence[float]]
    errors: Mapping[str, int]
    reasons: Sequence[str]
    """Why it is not to be relied on."""


@dataclass(slots=True)
class Results:
    """Everything that was measured, by course, server and subject."""

    taken: dict[tuple[str, str, str], list[Taken]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def relied_on(self, course: str, server: str, subject: str) -> list[Taken]:
        """The runs that the machine did not spoil; all of them where it spoiled all."""
        runs = self.taken.get((course, server, subject), [])
        return [run for run in runs if not run.reasons] or runs

    def summaries(self, course: str, server: str, subject: str) -> dict[str, Summary]:
        """Each metric over the rounds."""
        samples: dict[str, list[float]] = {}
        for run in self.relied_on(course, server, subject):
            for name, value in run.measured.items():
                samples.setdefault(name, []).append(value)
        return {name: Summary.of(values) for name, values in samples.items()}

    def median_course(self, course: str, server: str, subject: str) -> dict[str, list[float]]:
        """The median over the rounds at each point."""
        runs = self.relied_on(course, server, subject)
        return {
            name: [
                round(harness.percentile(values, 0.5), 3)
                for values in zip(*(run.course[name] for run in runs), strict=True)
            ]
            for name in (runs[0].course if runs else ())
        }


# Measuring


@contextmanager
def callers(plan: Plan) -> Iterator[subprocess.Popen[str]]:
    """A process of callers that is ready to begin."""
    with _child([sys.executable, "-m", "benchmarks.clientbench.callers", str(LOAD_CORE)]) as process:
        tell(process, asdict(plan))
        yield process


def tell(process: subprocess.Popen[str], what: Mapping[str, Any]) -> None:
    assert process.stdin is not None
    process.stdin.write(json.dumps(what) + "\n")
    process.stdin.flush()


def hear(process: subprocess.Popen[str]) -> Any:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError("a process of callers ended without an answer")
    return json.loads(line)


def has_the_cores() -> bool:
    """Whether this runs before all others, so that they have what it leaves."""
    return hasattr(os, "sched_getscheduler") and os.sched_getscheduler(0) in (os.SCHED_RR, os.SCHED_FIFO)


def quiet(seconds: float) -> None:
    """Wait until nobody else uses the two cores, for so long at most."""
    if has_the_cores():
        return
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        before = [core_ns(core) for core in (SERVER_CORE, LOAD_CORE)]
        time.sleep(1.0)
        busy = [core_ns(core) - was for core, was in zip((SERVER_CORE, LOAD_CORE), before, strict=True)]
        if max(busy) < QUIET * 1e9:
            return


def run(course: Course, subject: str, server: Running, capacity: float, seed: int) -> tuple[list[Any], float]:
    """One course of load: the record of each process, and the part of the server's core that others used."""
    phases = course.phases(capacity / PROCESSES)
    limit = course.lasts + 2 * MARGIN
    with ExitStack() as stack:
        plans = [Plan(subject, server.port, phases, seed * PROCESSES + nth, limit) for nth in range(PROCESSES)]
        processes = [stack.enter_context(callers(plan)) for plan in plans]
        for process in processes:
            hear(process)
        start = time.monotonic() + 0.2
        core, own = core_ns(SERVER_CORE), server.cpu_ns()
        for process in processes:
            tell(process, {"start": start})
        if course.stop:
            time.sleep(max(0.0, start + course.warm + course.before - time.monotonic()))
            os.kill(server.process.pid, signal.SIGSTOP)
            time.sleep(course.stop)
            os.kill(server.process.pid, signal.SIGCONT)
        records = [hear(process) for process in processes]
        others = core_ns(SERVER_CORE) - core - (server.cpu_ns() - own)
        return records, max(0.0, others / 1e9 / (time.monotonic() - start))


def measure(
    courses: Sequence[Course],
    servers: Sequence[str],
    subjects: Sequence[str],
    effort: Effort,
    seed: int,
    results: Results,
) -> None:
    """Every course against every server with every subject, in rounds of shuffled order, into ``results``."""
    loops_per_ms = HEAVIER * harness.probe("benchmarks.overload.servers", {}, timeout=120)
    shuffler = random.Random(seed)
    chosen = cells(courses, servers, subjects)
    total = effort.rounds * len(chosen)
    for number in range(effort.rounds):
        order = list(chosen)
        shuffler.shuffle(order)
        limit = TRIES * sum(course.lasts + 2 * MARGIN + effort.patience for course, _, _ in order)
        with serve(Serving(BARE, "await", loops_per_ms, limit=limit)) as reference, generator() as load:
            bench = Bench(loops_per_ms, effort, reference, load, seed + number)
            closed_loop(load, reference, effort.calibration)
            for place, (course, server, subject) in enumerate(order, 1):
                name = f"{course.name}, {server}, {subject}"
                say(f"  round {number + 1}/{effort.rounds}  {name:<34} {number * len(order) + place}/{total}")
                for _ in range(effort.tries):
                    if name in results.failures:
                        break
                    try:
                        one = bench.run(course, server, subject, number)
                    except Exception as error:
                        results.failures[name] = f"{type(error).__name__}: {error}"
                        say(f"  {name} failed: {error}")
                        break
                    results.taken.setdefault((course.name, server, subject), []).append(one)
                    if not one.reasons:
                        break
                    say(f"    spoiled: {', '.join(one.reasons)}")


@dataclass(frozen=True, slots=True)
class Bench:
    """One round: a bare server for calibration that runs all the time, and a server for each run."""

    loops_per_ms: float
    effort: Effort
    reference: Running
    load: subprocess.Popen[str]
    seed: int

    def capacity(self) -> float:
        """C at this moment, in calls per second."""
        return closed_loop(self.load, self.reference, self.effort.calibration)[0]

    def run(self, course: Course, server: str, subject: str, number: int) -> Taken:
        """One run, measured."""
        quiet(self.effort.patience)
        before = self.capacity()
        with serve(Serving(server, "await", self.loops_per_ms, limit=course.lasts + 2 * MARGIN)) as served:
            closed_loop(self.load, served, self.effort.calibration / 2)
            records, others = run(course, subject, served, before, self.seed)
        return taken(course, records, before, self.capacity(), others, number)


def cells(courses: Sequence[Course], servers: Sequence[str], subjects: Sequence[str]) -> list[tuple[Course, str, str]]:
    """What is measured. A blip is of the network or of the machine, so one server is enough."""
    return [
        (course, server, subject)
        for course in courses
        for server in servers
        for subject in subjects
        if course.name != BLIP.name or server == servers[0]
    ]


def taken(
    course: Course, records: Sequence[Mapping[str, Any]], before: float, after: float, others: float, number: int
) -> Taken:
    """One run, of which ``others`` is the part of the server's core that was not the server's."""
    begin = course.warm + course.before
    storm = outcomes.storm(
        records, begin=begin, over=begin + course.trigger, end=course.lasts, capacity=(before + after) / 2
    )
    measured = {**storm.measured(), "core_others": others, "drift": abs(before - after) / max(before, after)}
    errors: dict[str, int] = {}
    for record in records:
        for name, count in record["errors"].items():
            errors[name] = errors.get(name, 0) + count
    return Taken(number, measured, storm.course(), errors, unreliable(measured))


def unreliable(measured: Mapping[str, float]) -> list[str]:
    """Why a run says less about its subject than about the machine; empty for most runs."""
    reasons = []
    if measured["late_p99_ms"] > 50:
        reasons.append(f"the callers were {measured['late_p99_ms']:.0f} ms late")
    if measured["drift"] > 0.15:
        reasons.append(f"capacity drifted by {measured['drift']:.0%}")
    if measured["core_others"] > 0.1 and not has_the_cores():
        reasons.append(f"others used {measured['core_others']:.0%} of the server's core")
    return reasons


# Reporting


def summarised(results: Results, courses: Sequence[Course]) -> dict[str, Any]:
    """The report's JSON: by course, server and subject the summaries, the median course, and every run."""
    found: dict[str, Any] = {}
    for course in courses:
        servers: dict[str, Any] = {}
        for (name, server, subject), runs in results.taken.items():
            if name == course.name:
                servers.setdefault(server, {})[subject] = {
                    "metrics": results.summaries(name, server, subject),
                    "course": results.median_course(name, server, subject),
                    "runs": [
                        {
                            "round": run.round,
                            "unreliable": run.reasons,
                            "errors": run.errors,
                            "metrics": rounded(run.measured),
                        }
                        for run in runs
                    ],
                }
        begin = course.warm + course.before
        terms = {"begin": begin, "over": begin + course.trigger, "end": course.lasts, "bin": outcomes.BIN}
        found[course.name] = {**terms, "usual": course.usual, "peak": course.peak, "servers": servers}
    return found


COLUMNS: Mapping[str, tuple[tuple[str, str], ...]] = {
    STORM.name: (
        ("attempts", "attempts/call"),
        ("sent", "sent/offered"),
        ("goodput", "goodput/C"),
        ("ok", "ok"),
        ("p99_ms", "p99 ms"),
        ("attempts_after", "after: attempts"),
        ("ok_after", "ok"),
        ("recovery_s", "recovery s"),
    ),
    BLIP.name: (
        ("attempts", "attempts/call"),
        ("ok", "ok"),
        ("p99_ms", "p99 ms"),
        ("attempts_after", "after: attempts"),
        ("ok_after", "ok"),
    ),
}
"""Of every table: metric and heading."""
SHARES = {"ok", "ok_after"}


def rendered(results: Results, courses: Sequence[Course]) -> str:
    """A table for each course and server: medians over the rounds, and the spread of what matters most."""
    texts = []
    for course in courses:
        for server in dict.fromkeys(server for name, server, _ in results.taken if name == course.name):
            lines = []
            for subject in SUBJECTS:
                summaries = results.summaries(course.name, server, subject)
                if summaries:
                    lines.append(row(SUBJECTS[subject], summaries, course, results.taken[course.name, server, subject]))
            columns = [heading for _, heading in COLUMNS[course.name]]
            headings = [f"{course.name}, {SERVERS[server]}", *columns, "attempts p10..p90", "runs"]
            texts.append(harness.table(headings, lines))
    return "\n\n".join(texts)


def row(name: str, summaries: Mapping[str, Summary], course: Course, runs: Sequence[Taken]) -> list[str]:
    """One line of a table."""
    cells = [name]
    for metric, _ in COLUMNS[course.name]:
        summary = summaries.get(metric)
        cells.append("-" if summary is None else f"{summary.median:.1%}" if metric in SHARES else show(summary.median))
    spread = summaries["attempts"]
    cells.append(f"{spread.p10:.2f}..{spread.p90:.2f}")
    spoiled = sum(bool(run.reasons) for run in runs)
    cells.append(f"{len(runs) - spoiled}/{len(runs)} !" if spoiled else str(len(runs)))
    return cells


LEGEND = """
Medians over the rounds. attempts/call: made for a call that was offered during the trigger, whenever they were. sent:
attempts that left while the trigger lasted. goodput: calls that ended well while it lasted. ok: of the calls that were
offered then. after: of those that were offered afterwards. recovery: until 95 % succeed for good; all that was watched
where they never do. p99: of the calls that ended well, all waiting included. ! where the machine spoiled some runs."""


def verdicts(results: Results) -> list[Verdict]:
    """What `seawall.client` has to hold in front of Seawall."""
    summaries = results.summaries(STORM.name, OURS, OURS)

    def retries(metric: str) -> float | None:
        return 100 * (summaries[metric].median - 1) if metric in summaries else None

    recovery = summaries["recovery_s"].median if "recovery_s" in summaries else None
    return [
        Verdict("sent", "retries of 100 calls while the storm lasts, of calls offered", retries("sent"), 10.0, "%"),
        Verdict(
            "attempts", "retries of 100 calls of the storm, whenever they are made", retries("attempts"), 10.0, "%"
        ),
        Verdict("recovery", "recovery after the storm", recovery, 2.0, "s"),
    ]


def remarks(results: Results) -> list[str]:
    """What could not be measured, and which runs the machine spoiled."""
    lines = [f"{name}: not measured: {reason}" for name, reason in results.failures.items()]
    for key, runs in results.taken.items():
        lines += [f"{', '.join(key)}, round {run.round + 1}: {', '.join(run.reasons)}" for run in runs if run.reasons]
    return lines


# Command line


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """What the command line asks for."""
    description, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", "--quick", action="store_true", help="a minute: the storm, one round, two subjects")
    parser.add_argument("--rounds", type=int, metavar="N", help=f"default {FULL.rounds}, short {SHORT.rounds}")
    parser.add_argument("--subjects", metavar="A,B", help="of " + ", ".join(SUBJECTS))
    parser.add_argument("--servers", metavar="A,B", help="of " + ", ".join(SERVERS))
    parser.add_argument("--courses", metavar="A,B", help="of " + ", ".join(course.name for course in COURSES))
    parser.add_argument("--seed", type=int, default=1, help="of the schedules and of the order within rounds")
    parser.add_argument("--json", type=Path, metavar="PATH", help="where the results go; the plots go beside it")
    parser.add_argument("--no-plot", action="store_true", help="write no plots")
    asked = parser.parse_args(argv)
    if asked.rounds is not None and asked.rounds < 1:
        parser.error("--rounds must be at least 1")
    if asked.json is None and not (asked.short or asked.subjects or asked.servers or asked.courses):
        asked.json = harness.RESULTS / "client_storm.json"
    for name, known in (("subjects", SUBJECTS), ("servers", SERVERS), ("courses", [each.name for each in COURSES])):
        setattr(asked, name, harness.listed(parser, name, getattr(asked, name), list(known)) or list(known))
    return asked


def selection(asked: argparse.Namespace) -> tuple[list[Course], list[str], list[str], Effort]:
    """The courses, the servers, the subjects and the effort that are asked for."""
    effort = SHORT if asked.short else FULL
    if asked.rounds:
        effort = replace(effort, rounds=asked.rounds)
    courses = [course.scaled(effort.factor) for course in COURSES if course.name in asked.courses]
    subjects = asked.subjects
    if asked.short:
        subjects = [subject for subject in (TENACITY, OURS) if subject in subjects] or subjects
        courses = [course for course in courses if course.name == STORM.name] or courses
    return courses, asked.servers, subjects, effort


def expected_seconds(
    courses: Sequence[Course], servers: Sequence[str], subjects: Sequence[str], effort: Effort
) -> float:
    """About how long everything takes: a run ends some seconds after its load, and every process takes a moment."""
    chosen = cells(courses, servers, subjects)
    return effort.rounds * sum(course.lasts + 6 + 2.5 * effort.calibration for course, _, _ in chosen) + 10


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is asked for, print it, write it; 1 if something broke or time ran out."""
    asked = arguments(argv)
    courses, servers, subjects, effort = selection(asked)
    total = effort.rounds * len(cells(courses, servers, subjects))
    expected = expected_seconds(courses, servers, subjects, effort)
    limit = effort.tries * (expected + total * effort.patience) + 60
    report = Report("a retry storm", harness.environment(PACKAGES))
    print(harness.header(report.environment))
    say(f"{total} runs, about {minutes(expected)} minutes, at most {minutes(limit)}")
    results = Results()
    stopped = run_for(limit, lambda: measure(courses, servers, subjects, effort, asked.seed, results))
    report.environment["real_time"] = has_the_cores()
    report.environment["load_average_after"] = round(os.getloadavg()[0], 2)
    report.parts = {
        "effort": effort,
        "processes": PROCESSES,
        "subjects": SUBJECTS,
        "courses": summarised(results, courses),
        "failures": results.failures,
    }
    report.verdicts = verdicts(results)
    print("\n" + rendered(results, courses))
    print(LEGEND)
    print("\n## goals, seawall.client before Seawall\n")
    print("\n".join(str(verdict) for verdict in report.verdicts))
    for line in [*remarks(results), *stopped]:
        print(f"note: {line}")
    if asked.json:
        report.write(asked.json)
        say(f"wrote {asked.json}")
        if not asked.no_plot:
            harness.draw(asked.json, "benchmarks.clientbench.plots:storm")
    return 1 if stopped or broken(results) or not results.taken else 0


def broken(results: Results) -> list[str]:
    """What failed that is ours."""
    return [name for name in results.failures if not name.endswith(PEERS)]


if __name__ == "__main__":
    sys.exit(main())
