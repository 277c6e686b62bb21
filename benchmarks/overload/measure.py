"""What a simulated run amounts to: goodput, percentiles, sheds, recovery, fairness.

Requests are counted by when they arrived, goodput by when it was delivered. A request is answered well if its handler
ran to the end and its reply came within the objective, its caller's patience and its deadline. What is still under way
when a run ends has the latency it has reached by then.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from math import inf

from benchmarks.harness import percentile
from benchmarks.overload.engine import MS, REFUSED, SERVED, Log, S, Source

OBJECTIVE_NS = 500 * MS
"""The latency that an answer must not exceed to count."""


def ideal(offered: float, rho: float) -> float:
    """The goodput that no policy can exceed, as a share of capacity, when a refusal costs ``rho`` of a service.

    Gideal(N) = (1 - N rho) / (1 - rho), and no more than what is offered.

    >>> round(ideal(10, 0.018), 3)
    0.835
    """
    return max(0.0, min(offered, (1 - offered * rho) / (1 - rho)))


def jain(shares: Sequence[float]) -> float:
    """Jain's index of fairness: 1 if all are equal, 1/n if one has everything.

    >>> jain([1, 1, 1, 1]), jain([1, 0, 0, 0])
    (1.0, 0.25)
    """
    squares = sum(share * share for share in shares)
    return sum(shares) ** 2 / (len(shares) * squares) if squares else 0.0


def max_min(demands: Sequence[float], capacity: float) -> list[float]:
    """What each gets if the capacity is shared so that the least share is as large as it can be.

    >>> max_min([1, 2, 10], 9)
    [1.0, 2.0, 6.0]
    """
    shares = [0.0] * len(demands)
    left, waiting = capacity, sorted(range(len(demands)), key=lambda index: demands[index])
    for place, index in enumerate(waiting):
        shares[index] = float(min(demands[index], left / (len(waiting) - place)))
        left -= shares[index]
    return shares


@dataclass(slots=True)
class Run:
    """One scenario under one controller with one seed: what was logged, and the terms to judge it by."""

    sources: Sequence[Source]
    logs: Sequence[Log]
    """One for each worker."""
    capacity: float
    """Requests a second that all workers can serve."""
    rho: float
    """The cost of a refusal as a share of that of a service."""
    late_grants: int = 0
    samples: list[tuple[int, dict[str, float]]] = field(default_factory=list)

    def rows(
        self, start: int, end: int, kinds: Collection[int] | None = None, *, by_end: bool = False
    ) -> Iterator[tuple[int, int, int, int, int, int]]:
        """(source, attempt, status, arrived, started, ended) of what arrived, or ended, in [start, end)."""
        for log in self.logs:
            for row in zip(log.source, log.attempt, log.status, log.arrived, log.started, log.ended, strict=True):
                if start <= row[5 if by_end else 3] < end and (kinds is None or row[0] in kinds):
                    yield row

    def _limits(self) -> list[int]:
        """Per source, the latency up to which an answer counts."""
        limits = []
        for source in self.sources:
            bounds = (OBJECTIVE_NS, source.patience_ns, source.deadline_ns)
            limits.append(min(bound for bound in bounds if bound))
        return limits

    def arrived(self, start: int, end: int, kinds: Collection[int] | None = None) -> int:
        """How many requests arrived."""
        return sum(1 for _ in self.rows(start, end, kinds))

    def goodput(self, start: int, end: int, kinds: Collection[int] | None = None) -> float:
        """Answered well, per second of [start, end)."""
        limits = self._limits()
        good = sum(
            1
            for source, _, status, arrived, _, ended in self.rows(start, end, kinds, by_end=True)
            if status == SERVED and ended - arrived <= limits[source]
        )
        return good * S / (end - start)

    def of_ideal(self, start: int, end: int, *, capacity: float = 0.0) -> float:
        """The goodput of [start, end) as a share of what is possible with what arrived then; 0 if nothing is."""
        capacity = capacity or self.capacity
        offered = self.arrived(start, end) * S / (end - start) / capacity
        best = ideal(offered, self.rho) * capacity
        return self.goodput(start, end) / best if best else 0.0

    def success(self, start: int, end: int, kinds: Collection[int] | None = None, *, first: bool = False) -> float:
        """The share of what arrived that was answered well; ``first`` leaves retries out."""
        limits = self._limits()
        count = good = 0
        for source, attempt, status, arrived, _, ended in self.rows(start, end, kinds):
            if not (first and attempt):
                count += 1
                good += status == SERVED and ended - arrived <= limits[source]
        return good / count if count else 1.0

    def shed(self, start: int, end: int, kinds: Collection[int] | None = None) -> float:
        """The share of what arrived that was refused."""
        count = refused = 0
        for row in self.rows(start, end, kinds):
            count += 1
            refused += row[2] == REFUSED
        return refused / count if count else 0.0

    def answered(self, start: int, end: int, within: int) -> float:
        """The share of what arrived that was answered at all, served or refused, ``within`` so many nanoseconds."""
        count = answered = 0
        for _, _, status, arrived, _, ended in self.rows(start, end):
            count += 1
            answered += status <= REFUSED and ended - arrived <= within
        return answered / count if count else 1.0

    def latency(self, share: float, start: int, end: int, kinds: Collection[int] | None = None) -> float:
        """A percentile of the latency of what was admitted, in milliseconds; infinite if nothing was."""
        taken = [
            ended - arrived
            for _, _, status, arrived, started, ended in self.rows(start, end, kinds)
            if started and status != REFUSED
        ]
        return percentile(taken, share) / MS if taken else inf

    def recovery(self, start: int, end: int, *, bar: float = 0.95) -> float:
        """Seconds after ``start`` until the first second in which ``bar`` of the first attempts are answered well.

        In steps of 250 ms; the time until ``end`` if there is no such second.
        """
        limits = self._limits()
        step, span = 250 * MS, 4
        counts = [[0, 0] for _ in range((end - start) // step)]
        for source, attempt, status, arrived, _, ended in self.rows(start, start + len(counts) * step):
            if not attempt:
                window = counts[(arrived - start) // step]
                window[0] += 1
                window[1] += status == SERVED and ended - arrived <= limits[source]
        for place in range(len(counts) - span + 1):
            second = counts[place : place + span]
            if sum(good for _, good in second) >= bar * sum(count for count, _ in second):
                return place * step / S
        return (end - start) / S

    def settled(self, start: int, end: int, *, bar: float) -> float:
        """Seconds after ``start`` until the first 500 ms in which the median latency is at most ``bar`` milliseconds.

        In whole steps of 500 ms; the time until ``end`` if there are none.
        """
        step = 500 * MS
        taken: list[list[int]] = [[] for _ in range((end - start) // step)]
        for _, _, status, arrived, started, ended in self.rows(start, start + len(taken) * step):
            if started and status != REFUSED:
                taken[(arrived - start) // step].append(ended - arrived)
        for place, window in enumerate(taken):
            if window and percentile(window, 0.5) <= bar * MS:
                return place * step / S
        return (end - start) / S


Measure = Callable[[Run], dict[str, float]]
