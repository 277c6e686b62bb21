"""How measurements are taken, summed up, compared and written down; shared by every benchmark in this directory.

A machine that does other work makes any single number wrong, and makes two numbers taken one after the other
incomparable: its clock and its caches drift by more than what is to be measured. So every subject is measured in
short slots, a round has one slot of each subject in shuffled order, and differences and ratios are formed between
slots of the same round. What is reported is the median over rounds, and the 10th and 90th percentile as the spread.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"

T = TypeVar("T")


# Statistics


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which ``share`` (0..1) of ``values`` lies, interpolated linearly between neighbours.

    >>> percentile([1.0, 2.0, 3.0, 4.0], 0.5)
    2.5
    """
    if not values:
        raise ValueError("no values")
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


@dataclass(frozen=True, slots=True)
class Summary:
    """One quantity over all rounds, in the unit of its samples."""

    median: float
    p10: float
    p90: float
    rounds: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Summary:
        """The summary of at least one sample."""
        return cls(percentile(samples, 0.5), percentile(samples, 0.1), percentile(samples, 0.9), len(samples))

    def scaled(self, factor: float) -> Summary:
        """The same quantity in another unit."""
        return Summary(self.median * factor, self.p10 * factor, self.p90 * factor, self.rounds)


def differences(samples: Sequence[float], base: Sequence[float]) -> list[float]:
    """Round by round, what ``samples`` took longer than ``base``: drift that both saw cancels."""
    return [one - other for one, other in zip(samples, base, strict=True)]


def ratios(samples: Sequence[float], base: Sequence[float]) -> list[float]:
    """Round by round, how many times ``base`` ``samples`` are. Rounds in which noise left no base are left out.

    Not the ratio of two medians: where slots come in two speeds (a sibling core that is busy or not), each median may
    fall on another of them, and their ratio is then a tale of the machine.
    """
    return [one / other for one, other in zip(samples, base, strict=True) if other > 0]


# Interleaved measurement


def interleave(
    slots: Mapping[str, Callable[[], float]],
    *,
    rounds: int,
    seed: int,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, list[float]]:
    """Call every slot once a round, in an order shuffled anew each round; the samples of each, in order of rounds."""
    order = list(slots)
    shuffler = random.Random(seed)
    samples: dict[str, list[float]] = {name: [] for name in slots}
    for number in range(rounds):
        shuffler.shuffle(order)
        progress(f"round {number + 1}/{rounds}")
        for name in order:
            samples[name].append(slots[name]())
    return samples


def calls_for(seconds: float, time_calls: Callable[[int], float], *, at_least: int = 8, at_most: int = 200_000) -> int:
    """How many calls take about ``seconds``. ``time_calls(n)`` makes n calls and says how many seconds they took."""
    calls = at_least
    while True:
        taken = max(time_calls(calls), 1e-9)
        if taken >= seconds / 4 or calls >= at_most:
            return max(at_least, min(at_most, int(calls * seconds / taken)))
        calls = min(at_most, max(calls * 2, int(calls * seconds / taken / 3)))


# Verdicts


@dataclass(frozen=True, slots=True)
class Verdict:
    """A bar and whether a measurement kept below it. ``value`` is ``None`` where its part did not run."""

    name: str
    claim: str
    value: float | None
    bar: float
    unit: str

    @property
    def outcome(self) -> str:
        """held, missed or not measured."""
        if self.value is None:
            return "not measured"
        return "held" if self.value <= self.bar else "missed"

    def __str__(self) -> str:
        measured = "" if self.value is None else f"{show(self.value)} {self.unit}, "
        return f"({self.name}) {self.outcome:<6} {self.claim}: {measured}bar {show(self.bar)} {self.unit}"


# Tables


def show(value: float | None) -> str:
    """A number with about three significant digits, never in exponent notation; a dash for none.

    >>> show(1234567.0), show(12.34), show(0.01234)
    ('1,234,567', '12.3', '0.0123')
    """
    if value is None:
        return "-"
    if value == 0 or math.isinf(value) or math.isnan(value):
        return f"{value:g}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(digits, 4)}f}"


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns of plain text: the first to the left, the others to the right, a row shorter than the heading free."""
    lines = [list(headings), *(list(row) for row in rows)]
    full = [line for line in lines if len(line) == len(headings)]
    widths = [max(len(line[column]) for line in full) for column in range(len(headings))]
    widths[0] = max(widths[0], *(len(line[0]) for line in lines))
    rendered = []
    for line in lines:
        cells = [line[0].ljust(widths[0])]
        if len(line) == len(headings):
            cells += [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        else:
            cells += line[1:]
        rendered.append("  ".join(cells).rstrip())
    rendered.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(rendered)


# Reports


@dataclass(slots=True)
class Report:
    """What a benchmark found: where it ran, one entry per part, the verdicts."""

    title: str
    environment: dict[str, Any]
    parts: dict[str, Any] = field(default_factory=dict)
    verdicts: list[Verdict] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """Write everything as JSON, with stable key order so that two runs can be compared by diff."""
        document = {
            "title": self.title,
            "environment": self.environment,
            "parts": self.parts,
            "verdicts": [{**asdict(verdict), "outcome": verdict.outcome} for verdict in self.verdicts],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=1, sort_keys=True, default=plain) + "\n")


def draw(results: Path, plot: str) -> None:
    """Plots beside ``results``, where matplotlib is installed.

    ``plot`` is the ``module:function`` that draws ``results`` into a file, or says ``False``: there is nothing to draw.
    """
    try:
        into = resolve_name(plot)
    except ImportError as error:
        say(f"no plots: {error}")
        return
    for suffix in (".svg", ".png"):
        target = results.with_suffix(suffix)
        if into(results, target):
            say(f"wrote {target}")


def plain(value: object) -> Any:
    """A JSON shape for dataclasses; numbers are rounded where nothing is lost."""
    if is_dataclass(value) and not isinstance(value, type):
        return {
            name: float(f"{item:.5g}") if isinstance(item, float) and math.isfinite(item) else item
            for name, item in asdict(value).items()
        }
    raise TypeError(f"{type(value).__name__} does not go into a report")


def environment(packages: Sequence[str]) -> dict[str, Any]:
    """Where this ran: interpreter, processor, load of the machine, and the version of each package."""
    return {
        "python": platform.python_version(),
        "implementation": platform.python_implementation(),
        "processor": processor(),
        "cpus": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),
        "commit": commit(),
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": {name: version(name) for name in packages},
    }


def header(where: Mapping[str, Any]) -> str:
    """An `environment`, in two lines."""
    versions = ", ".join(f"{name} {number}" for name, number in where["versions"].items())
    return (
        f"Python {where['python']}, {where['processor']}, {where['cpus']} cores, load {where['load_average']}, "
        f"commit {where['commit']}\n{versions}"
    )


def version(package: str) -> str:
    """The installed version of a distribution, or ``not installed``."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def processor() -> str:
    """The processor's own name where the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def commit() -> str:
    """The commit that is checked out, with a ``+`` where src/ differs from it, or ``unknown``."""
    try:
        git = ["git", "-C", str(ROOT)]
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, timeout=10)
        dirty = subprocess.run([*git, "status", "--porcelain", "src"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return head.stdout.strip() + "+" * bool(dirty.stdout.strip()) if head.returncode == 0 else "unknown"


# Processes


def listed(parser: argparse.ArgumentParser, option: str, text: str | None, known: Sequence[str]) -> list[str]:
    """The words of an option's ``A,B``; its error ends the program where one is none of ``known``."""
    words = [word.strip() for word in (text or "").split(",") if word.strip()]
    if set(words) - set(known):
        parser.error(f"--{option}: {', '.join(sorted(set(words) - set(known)))} is none of {', '.join(known)}")
    return words


def micros(column: Iterable[float]) -> list[int]:
    """Seconds in whole microseconds."""
    return [round(value * 1e6) for value in column]


def say(text: str) -> None:
    """Progress, on stderr, so that stdout holds results only."""
    print(text, file=sys.stderr, flush=True)


def pin(core: int, pid: int = 0) -> None:
    """Keep this process, or the main thread of another, on one core, where the system can."""
    if hasattr(os, "sched_setaffinity"):
        available = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(pid, {available[core % len(available)]})


def probe(module: str, arguments: Mapping[str, Any], *, timeout: float) -> Any:
    """Run ``python -m module`` with JSON on stdin in a process of its own; the JSON on its stdout.

    For what must not see another measurement's heap: memory, growth, pauses of the garbage collector.
    """
    done = subprocess.run(
        [sys.executable, "-m", module],
        input=json.dumps(arguments),
        stdout=subprocess.PIPE,
        text=True,
        timeout=timeout,
        cwd=ROOT,
        env=child_environment(),
    )
    if done.returncode != 0:
        raise RuntimeError(f"{module} {dict(arguments)} ended with exit code {done.returncode}")
    return json.loads(done.stdout)


def child_environment() -> dict[str, str]:
    """The environment for a child that imports what this process imports."""
    paths = [str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
