"""What Seawall did exactly, scenario by scenario: a change of behaviour shows as a change of these numbers.

The numbers are whole and the same on every machine. They are no goals: whoever changes a law rewrites them with
``python -m benchmarks.overload --golden`` and reads the difference.
"""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.overload import scenarios
from benchmarks.overload.engine import LOST, REFUSED, SERVED, UNFINISHED
from benchmarks.overload.measure import Run
from benchmarks.overload.seawall import Seawall

DIRECTORY = Path(__file__).resolve().parent / "golden"
SEED = 2
"""One that shows what is missed."""
SHORT = tuple(name for name, scenario in scenarios.SCENARIOS.items() if scenario.short)
"""The scenarios that are kept."""


def simulate(name: str) -> Run:
    """The run whose counts are kept."""
    return scenarios.run(scenarios.SCENARIOS[name], lambda setup: Seawall(), SEED)


def counts(run: Run) -> dict[str, int]:
    """How many requests ended in which way, and two sums that no shift of a nanosecond leaves as they are."""
    statuses = [status for log in run.logs for status in log.status]
    pairs = [pair for log in run.logs for pair in zip(log.arrived, log.ended, strict=True)]
    return {
        "requests": len(statuses),
        "served": statuses.count(SERVED),
        "refused": statuses.count(REFUSED),
        "unfinished": statuses.count(UNFINISHED),
        "lost": statuses.count(LOST),
        "started after their deadline": run.late_grants,
        "sum of arrivals, ns": sum(arrived for arrived, _ in pairs),
        "sum of latencies, ns": sum(ended - arrived for arrived, ended in pairs),
    }


def path(name: str) -> Path:
    """Where the counts of a scenario are kept."""
    return DIRECTORY / f"{name}.json"


def read(name: str) -> dict[str, int]:
    """The counts that are kept."""
    kept: dict[str, int] = json.loads(path(name).read_text())
    return kept


def write(name: str, found: dict[str, int]) -> None:
    """Keep these counts."""
    DIRECTORY.mkdir(exist_ok=True)
    path(name).write_text(json.dumps(found, indent=1) + "\n")
