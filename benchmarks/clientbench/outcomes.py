"""What became of the calls of a storm: attempts, goodput, recovery, latency; and their course.

Times are seconds from the start of the run. A call belongs to the moment it was *scheduled* for, whenever it ended; an
attempt to the moment it was made.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from benchmarks.harness import percentile

WINDOW, STEP = 2.0, 0.1
"""Recovery: what is judged at once, and how finely it is located; in seconds."""
WANTED = 0.95
"""The part of the calls that has to succeed."""
BIN = 0.5
"""Seconds of one point of a course."""


class Outcome(NamedTuple):
    """One call."""

    at: float
    ok: bool
    """Answered 2xx, at whichever attempt."""
    took: float
    """From its schedule to its end."""
    late: float
    """How late its process began it."""
    attempts: int


@dataclass(frozen=True, slots=True)
class Storm:
    """All calls of one run, and when which load began and ended."""

    calls: Sequence[Outcome]
    """In the order of their schedule."""
    attempts: Sequence[float]
    """When each was made, ascending."""
    begin: float
    """Of the trigger."""
    over: float
    """The end of the trigger."""
    end: float
    """Of all load."""
    capacity: float
    """Calls per second that the server can answer."""

    def within(self, begin: float, end: float) -> list[Outcome]:
        """The calls that were scheduled in [begin, end)."""
        return [call for call in self.calls if begin <= call.at < end]

    def recovery(self) -> float:
        """Seconds from the end of the trigger until `WANTED` of the calls succeed, for good.

        For good: from there on in every `WINDOW` until the end of the load. Where the last one misses it, all the time
        that was watched: "at least that".
        """
        steps = math.floor((self.end - self.over - WINDOW) / STEP + 1e-9)
        for step in range(steps, -1, -1):
            start = self.over + step * STEP
            if success(self.within(start, start + WINDOW)) < WANTED:
                return self.end - self.over if step == steps else (step + 1) * STEP
        return 0.0

    def measured(self) -> dict[str, float]:
        """All metrics, by name. Shares are 0..1, rates multiples of capacity, latencies milliseconds."""
        usual, storm, after = (
            self.within(*span) for span in ((0.0, self.begin), (self.begin, self.over), (self.over, self.end))
        )
        seconds = self.over - self.begin
        ended = [call.at + call.took for call in self.calls if call.ok]
        found = {
            "capacity": self.capacity,
            "offered": len(storm) / seconds / self.capacity,
            "sent": sum(self.begin <= at < self.over for at in self.attempts) / max(1, len(storm)),
            "attempts_before": per_call(usual),
            "attempts": per_call(storm),
            "attempts_after": per_call(after),
            "goodput": sum(self.begin <= at < self.over for at in ended) / seconds / self.capacity,
            "goodput_after": sum(self.over <= at < self.end for at in ended) / max(1, len(after)),
            "ok_before": success(usual),
            "ok": success(storm),
            "ok_after": success(after),
            "recovery_s": self.recovery(),
            "late_p99_ms": percentile([call.late for call in self.calls], 0.99) * 1e3,
        }
        for name, calls in (("p99_before_ms", usual), ("p99_ms", storm), ("p99_after_ms", after)):
            took = [call.took for call in calls if call.ok]
            if took:
                found[name] = percentile(took, 0.99) * 1e3
        return found

    def course(self) -> dict[str, list[float]]:
        """By `BIN`: what was ``offered``, what was ``sent`` and what succeeded (``good``), as multiples of capacity."""
        bins = math.ceil(self.end / BIN)
        counts = {"offered": [0] * bins, "sent": [0] * bins, "good": [0] * bins}
        ended = [call.at + call.took for call in self.calls if call.ok]
        for name, times in (("offered", [call.at for call in self.calls]), ("sent", self.attempts), ("good", ended)):
            for at in times:
                if at < self.end:
                    counts[name][int(at / BIN)] += 1
        return {name: [round(count / BIN / self.capacity, 3) for count in each] for name, each in counts.items()}


def success(calls: Sequence[Outcome]) -> float:
    """The part of ``calls`` that succeeded; of none it is 1, so that nothing is blamed for it."""
    return sum(call.ok for call in calls) / len(calls) if calls else 1.0


def per_call(calls: Sequence[Outcome]) -> float:
    """Attempts for each of ``calls``."""
    return sum(call.attempts for call in calls) / len(calls) if calls else 0.0


def storm(records: Sequence[Mapping[str, Any]], *, begin: float, over: float, end: float, capacity: float) -> Storm:
    """One run of what the processes recorded."""
    calls: list[Outcome] = []
    for record in records:
        made = [0] * len(record["at"])
        for number in record["of"]:
            made[number] += 1
        columns = (record[name] for name in ("at", "status", "took", "late"))
        calls += [
            Outcome(at / 1e6, 200 <= status < 300, took / 1e6, late / 1e6, attempts)
            for at, status, took, late, attempts in zip(*columns, made, strict=True)
        ]
    attempts = sorted(at / 1e6 for record in records for at in record["attempts"])
    return Storm(sorted(calls), attempts, begin, over, end, capacity)
