"""One interleaved run: every subject at every number of callers and processes, case by case, in shuffled rounds.

Client processor time is that of the processes that ask, without what the callers themselves cost in the same round.
Round trips are the commands that came over the wire, from ``INFO commandstats``: scripts, and what a subject is known
to send besides them (commands inside of scripts are in there too, and have other names); `MONITOR` holds that against
what really comes before anything is counted. The server's processor time is what it says of itself.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

from benchmarks import harness
from benchmarks.harness import Summary, say
from benchmarks.redisbench.subjects import NOTHING, SEAWALL, SEAWALL_EXACT, SUBJECTS, Setup, Subject, named
from benchmarks.redisbench.valkey import Server, serve
from benchmarks.server import _child as child

SERVER_CORE = 0
BUSY = 32
"""Callers at once where only one number is wanted."""
BURST = 80
"""Of a bucket, for each process that shares it: the least for which leases are to save most of the calls."""
REFILL, DEMAND = 3_000, 2_000
"""Units a second that it gets back, and that each process asks for at most."""
AUDITED = 32
"""Calls under `MONITOR`, of every subject."""
WATCHED, WATCHED_KEYS = 1_024, 64
"""Calls under it of Seawall without leases, and callers that they are for."""
HEARTBEAT = ":instances"
"""How the key ends under which the instances of Seawall are counted."""


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is measured."""

    rounds: int
    slot: float
    """Seconds, about."""
    keys: tuple[int, ...]
    """The first is a hot key."""
    callers: tuple[int, ...]
    """At once, in each process."""
    processes: tuple[int, ...]
    window: float
    """Seconds for which a key is refused."""


@dataclass(frozen=True, slots=True)
class Case:
    """What all subjects are asked."""

    limits: int
    keys: int
    denied: bool

    def __str__(self) -> str:
        limits = f"{self.limits} limit{'s' * (self.limits > 1)}"
        keys = "hot key" if self.keys == 1 else f"{self.keys:,} keys"
        return f"{limits}, {keys}, {'denied' if self.denied else 'allowed'}"


@dataclass(frozen=True, slots=True)
class Cell:
    """A case, with so many callers at once in each of so many processes."""

    case: Case
    callers: int
    processes: int

    def __str__(self) -> str:
        return f"{self.case}, {self.callers} at once" + f" in {self.processes} processes" * (self.processes > 1)


@dataclass(slots=True)
class Sample:
    """One slot, per decision: client and server microseconds of processor time, round trips; and decisions a second."""

    cpu: float
    trips: float
    server: float
    rate: float
    connections: int
    """Opened in this slot."""


@dataclass(slots=True)
class Results:
    """Everything that was taken: by cell and subject the samples, round by round; of what failed, the reason."""

    server: str = ""
    """Its version."""
    samples: dict[Cell, dict[str, list[Sample]]] = field(default_factory=dict)
    refused: float | None = None
    """Round trips a second about a key that is refused all the while, asked for by one process."""
    exact: dict[int, float | None] = field(default_factory=dict)
    """By the number of limits, round trips per decision without leases, the most."""
    leased: dict[int, float | None] = field(default_factory=dict)
    """By the number of processes N, round trips per decision on a hot bucket with a burst of N times `BURST`."""
    failures: dict[str, str] = field(default_factory=dict)

    def fail(self, what: str, reason: str) -> None:
        """Note ``what`` did not work, once."""
        if what not in self.failures:
            self.failures[what] = reason
            say(f"  {what}: {reason}")


class Failed(Exception):
    """A worker could not do what it was told."""


class Crew:
    """So many processes for each subject. What some of them are told they do at the same time."""

    def __init__(self, workers: Mapping[str, Sequence[subprocess.Popen[str]]], size: int) -> None:
        self.workers = workers
        self.size = size

    def tell(self, name: str, commands: Sequence[Mapping[str, Any]]) -> list[Any]:
        """Give the first process of the subject of that name the first command and so on; their answers."""
        told = list(zip(self.workers[name], commands, strict=False))
        for worker, command in told:
            assert worker.stdin is not None
            worker.stdin.write(json.dumps(command) + "\n")
            worker.stdin.flush()
        answers = []
        for worker, _ in told:
            assert worker.stdout is not None
            line = worker.stdout.readline()
            if not line:
                raise RuntimeError(f"a process of {name} ended")
            answers.append(json.loads(line))
        for answer in answers:
            if answer and "error" in answer:
                raise Failed(answer["error"])
        return answers

    def tell_all(self, name: str, **command: Any) -> list[Any]:
        """Give all processes of one subject the same command."""
        return self.tell(name, [command] * self.size)


@contextmanager
def crew(names: Collection[str], size: int) -> Iterator[Crew]:
    """``size`` processes for each of ``names``, for as long as the block lasts."""
    command = [sys.executable, "-m", "benchmarks.redisbench.worker"]
    with ExitStack() as stack:
        yield Crew(
            {
                name: [stack.enter_context(child([*command, str(number), name])) for number in range(size)]
                for name in names
            },
            size,
        )


def measure(effort: Effort, names: Collection[str], *, seed: int) -> Results:
    """Measure all of ``names`` on a server of their own."""
    results = Results()
    cases = [Case(limits, keys, denied) for limits in (1, 3) for keys in effort.keys for denied in (False, True)]
    with serve(SERVER_CORE) as server, crew(names, max(effort.processes)) as workers:
        results.server = server.version()
        for number, case in enumerate(cases):
            say(f"{number + 1}/{len(cases)} {case}:")
            measure_case(server, workers, case, effort, names, seed + number, results)
        if SEAWALL_EXACT in names:
            for limits in (1, 3):
                results.exact[limits] = per_decision_exact(server, workers, effort, limits, results)
        if SEAWALL in names:
            results.refused = per_second_refused(server, workers, effort, results)
            for processes in effort.processes:
                results.leased[processes] = per_request_leased(server, workers, effort, processes, results)
    return results


def applicable(case: Case, names: Collection[str]) -> list[Subject]:
    """The subjects among ``names`` that have something to do in ``case``: an application alone refuses nobody."""
    return [subject for subject in SUBJECTS if subject.name in names and (subject.refuses or not case.denied)]


def base_of(subject: Subject, case: Case) -> str:
    """What ``subject`` is compared with: of a refusal nothing is the application's."""
    return NOTHING if case.denied else subject.base


@contextmanager
def opened(
    server: Server, workers: Crew, setup: Setup, subjects: Sequence[Subject], keys: int, results: Results
) -> Iterator[list[Subject]]:
    """The subjects that could be set up in all workers, and whose round trips are counted right, within the block."""
    usable = []
    for subject in subjects:
        own = asdict(replace(setup, prefix=f"b{SUBJECTS.index(subject)}:"))
        try:
            workers.tell_all(subject.name, do="open", setup=own, keys=keys, workers=workers.size)
        except Failed as failure:
            results.fail(subject.name, str(failure))  # whatever the case
            continue
        try:
            if subject.shared:
                audit(server, workers, subject)
            if setup.denied:
                fill(workers, subject)
            usable.append(subject)
        except Failed as failure:
            results.fail(f"{subject.name}, {Case(setup.limits, keys, setup.denied)}", str(failure))
    try:
        yield usable
    finally:
        for subject in subjects:
            workers.tell_all(subject.name, do="close")
        server.forget()


def measure_case(
    server: Server,
    workers: Crew,
    case: Case,
    effort: Effort,
    names: Collection[str],
    seed: int,
    results: Results,
) -> None:
    """The samples of one case."""
    setup = Setup(server.url, "", case.limits, case.denied, instances=workers.size)
    with opened(server, workers, setup, applicable(case, names), case.keys, results) as subjects:
        slots: dict[str, Callable[[], float]] = {}
        for callers in effort.callers:
            for processes in effort.processes:
                cell = Cell(case, callers, processes)
                for subject in subjects:
                    name = f"{subject.name}, {cell}"
                    try:
                        slots[name] = partial(
                            guarded, results, name, slot_of(server, workers, subject, cell, effort.slot, results)
                        )
                    except Failed as failure:
                        results.fail(name, str(failure))
        harness.interleave(slots, rounds=effort.rounds, seed=seed, progress=lambda text: say(f"  {text}"))
    for cell, taken in results.samples.items():
        if cell.case == case:
            for name in [name for name, samples in taken.items() if len(samples) != effort.rounds]:
                del taken[name]


def guarded(results: Results, name: str, slot: Callable[[], float]) -> float:
    """A slot; or nothing, once it has failed."""
    if name in results.failures:
        return 0.0
    try:
        return slot()
    except Failed as failure:
        results.fail(name, str(failure))
        return 0.0


def slot_of(
    server: Server, workers: Crew, subject: Subject, cell: Cell, seconds: float, results: Results
) -> Callable[[], float]:
    """What takes one sample of about ``seconds``, warmed up."""

    def wall(calls: int) -> float:
        return calls / run(server, workers, subject, cell, calls).rate

    calls = harness.calls_for(seconds, wall, at_least=2 * cell.callers * cell.processes)

    def slot() -> float:
        sample = run(server, workers, subject, cell, calls)
        results.samples.setdefault(cell, {}).setdefault(subject.name, []).append(sample)
        return sample.cpu

    return slot


def run(server: Server, workers: Crew, subject: Subject, cell: Cell, calls: int) -> Sample:
    """So many calls, over all processes, after half as many that do not count: a hot key is hot then."""
    command = {"do": "run", "callers": cell.callers, "calls": calls // cell.processes}
    workers.tell(subject.name, [{**command, "calls": calls // cell.processes // 2}] * cell.processes)
    return sampled(server, workers, subject, [command] * cell.processes)


def sampled(server: Server, workers: Crew, subject: Subject, commands: Sequence[Mapping[str, Any]]) -> Sample:
    """What the server and the first processes of ``subject`` do, told ``commands``."""
    before = server.work()
    taken = workers.tell(subject.name, commands)
    done = server.work().since(before)
    calls = sum(answer["calls"] for answer in taken)
    wrong = sum(answer["wrong"] for answer in taken)
    if wrong > calls // 100:
        raise Failed(f"{wrong} of {calls} decisions were not what the case is about")
    return Sample(
        sum(answer["cpu_ns"] for answer in taken) / calls / 1e3,
        done.round_trips(subject.sends) / calls,
        max(0.0, done.cpu_us - server.asking_us) / calls,
        calls / max(answer["wall_ns"] for answer in taken) * 1e9,
        done.connections,
    )


def about_callers(seen: Sequence[Sequence[str]]) -> int:
    """How many of these commands are not those by which instances say, every few seconds, that they live, and see who
    is blocked."""
    return sum(not any(word.strip('"').endswith(HEARTBEAT) for word in words[:4]) for words in decisions(seen))


def decisions(seen: Sequence[Sequence[str]]) -> list[Sequence[str]]:
    """Without the looks at who is blocked, which come with the signs of life; no decision reads by itself."""
    return [words for words in seen if words[0].strip('"').upper() != "GET"]


def per_decision_exact(server: Server, workers: Crew, effort: Effort, limits: int, results: Results) -> float | None:
    """Round trips per decision without leases, at the number of callers that needs most; ``None`` if that failed."""
    most = None
    try:
        setup = Setup(server.url, "", limits, denied=False)
        with opened(server, workers, setup, [named(SEAWALL_EXACT)], WATCHED_KEYS, results) as subjects:
            for _ in subjects:
                for callers in effort.callers:
                    command = {"do": "run", "callers": callers, "calls": WATCHED}
                    seen, _ = server.watched(partial(workers.tell, SEAWALL_EXACT, [command]))
                    most = max(most or 0.0, about_callers(seen) / WATCHED)
    except Failed as failure:
        results.fail(f"{SEAWALL_EXACT}, watched, {limits} limits", str(failure))
        return None
    return most


def per_second_refused(server: Server, workers: Crew, effort: Effort, results: Results) -> float | None:
    """Round trips a second about one key that has been used up; ``None`` if that failed."""
    setup = Setup(server.url, "", 1, denied=True)
    command = {"do": "last", "callers": BUSY, "seconds": effort.window}
    try:
        with opened(server, workers, setup, [named(SEAWALL)], 1, results) as subjects:
            for _ in subjects:
                seen, _ = server.watched(partial(workers.tell, SEAWALL, [command]))
                return about_callers(seen) / effort.window
    except Failed as failure:
        results.fail(f"{SEAWALL}, a refused key", str(failure))
    return None


def per_request_leased(server: Server, workers: Crew, effort: Effort, processes: int, results: Results) -> float | None:
    """Round trips per decision where a hot bucket is just large enough for leases; ``None`` if that failed."""
    setup = Setup(server.url, "", 1, denied=False, bucket=(REFILL * processes, BURST * processes), instances=processes)
    command = {"do": "last", "callers": BUSY, "seconds": effort.window, "pause": BUSY / DEMAND}
    warmer = {**command, "seconds": effort.window / 4}
    try:
        with opened(server, workers, setup, [named(SEAWALL)], 1, results) as subjects:
            for subject in subjects:
                workers.tell(SEAWALL, [warmer] * processes)
                return sampled(server, workers, subject, [command] * processes).trips
    except Failed as failure:
        results.fail(f"{SEAWALL}, leased, {processes} processes", str(failure))
    return None


def audit(server: Server, workers: Crew, subject: Subject) -> None:
    """Hold the rule by which round trips are counted against what came over the wire."""
    command = {"do": "run", "callers": 4, "calls": AUDITED}
    seen, done = server.watched(partial(workers.tell, subject.name, [command]))
    if len(decisions(seen)) != done.round_trips(subject.sends):
        names = Counter(words[0] for words in seen)
        raise Failed(f"over the wire came {dict(names)}, counted were {done.round_trips(subject.sends)}")


def fill(workers: Crew, subject: Subject) -> None:
    """Use the limits up: in Redis each worker those of its part of the callers, in memory everybody's own."""
    of = workers.size if subject.shared else 1
    workers.tell(subject.name, [{"do": "fill", "part": number % of, "of": of} for number in range(workers.size)])


# Rows


@dataclass(slots=True)
class Row:
    """What was found about one subject in one cell: ``cpu_us`` over the callers' own, ``added_us`` over the base's."""

    limits: int
    keys: int
    denied: bool
    callers: int
    processes: int
    subject: str
    base: str
    cpu_us: Summary
    added_us: Summary
    trips: Summary
    server_us: Summary
    per_second: Summary
    connections: int


def rows(results: Results) -> list[Row]:
    """All that was measured beside the callers' own cost."""
    found = []
    for cell, taken in results.samples.items():
        case = cell.case
        for subject in SUBJECTS:
            name, base = subject.name, base_of(subject, case)
            if name == NOTHING or not {name, base, NOTHING} <= taken.keys():
                continue
            samples = taken[name]
            cpu = [sample.cpu for sample in samples]
            found.append(
                Row(
                    case.limits,
                    case.keys,
                    case.denied,
                    cell.callers,
                    cell.processes,
                    name,
                    base,
                    Summary.of(harness.differences(cpu, [sample.cpu for sample in taken[NOTHING]])),
                    Summary.of(harness.differences(cpu, [sample.cpu for sample in taken[base]])),
                    Summary.of([sample.trips for sample in samples]),
                    Summary.of([sample.server for sample in samples]),
                    Summary.of([sample.rate for sample in samples]),
                    sum(sample.connections for sample in samples),
                )
            )
    return found
