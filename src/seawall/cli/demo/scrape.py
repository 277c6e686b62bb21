"""What the servers say of themselves: `/metrics`, read as anybody would."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from time import monotonic_ns
from typing import final

from seawall.cli.demo.client import Connection

_SAMPLE = re.compile(r"(\w+)(?:\{([^}]*)\})? ([0-9.e+-]+)")
_LABEL = re.compile(r'(\w+)="([^"]*)"')

EVERY = 0.2
"""Seconds between two readings."""


@final
class Scrape:
    """Samples by name and labels; of several servers, all of them."""

    def __init__(self, text: str) -> None:
        found = filter(None, map(_SAMPLE.fullmatch, text.splitlines()))
        self._samples = [
            (name, dict(_LABEL.findall(labels or "")), float(value))
            for name, labels, value in (sample.groups() for sample in found)
        ]

    def by(self, name: str, *labels: str) -> Counter[tuple[str, ...]]:
        """The sum of a counter for each value of ``labels``, without those that are 0."""
        sums: Counter[tuple[str, ...]] = Counter()
        for sample, found, value in self._samples:
            if sample == name:
                sums[tuple(found.get(label, "") for label in labels)] += int(value)
        return +sums

    def value(self, name: str) -> float | None:
        """The sum of a gauge over its labels; ``None`` where there is no such gauge."""
        values = [value for sample, _, value in self._samples if sample == name]
        return sum(values) if values else None


@final
@dataclass(frozen=True, slots=True)
class Reading:
    """What one server's gauges say. ``at`` is the monotonic nanosecond before it was asked."""

    at: int
    limit: float | None
    inflight: float | None
    queued: float | None
    up: float | None
    """1 where its store is asked, 0 while that is known to be away, ``None`` without one."""

    @classmethod
    def of(cls, at: int, scrape: Scrape) -> Reading:
        return cls(
            at,
            scrape.value("seawall_concurrency_limit"),
            scrape.value("seawall_inflight_requests"),
            scrape.value("seawall_queued_requests"),
            scrape.value("seawall_backend_up"),
        )


@final
@dataclass(slots=True)
class Watch:
    """Reads the metrics of the servers at ``ports``, from time to time and when it is told to."""

    ports: Sequence[int]
    asked: int = 0
    """How often a server was asked: as many requests are counted as exempt."""
    readings: list[list[Reading]] = field(init=False)
    """Of each server."""
    _connections: list[Connection] = field(init=False)

    def __post_init__(self) -> None:
        self.readings = [[] for _ in self.ports]
        self._connections = [Connection(port) for port in self.ports]

    async def scrape(self) -> Scrape:
        """What all servers say, together. `OSError` where one does not answer."""
        texts = []
        for connection, readings in zip(self._connections, self.readings, strict=True):
            self.asked += 1
            at = monotonic_ns()
            text = (await connection.request("GET", "/metrics", {})).body.decode(errors="replace")
            readings.append(Reading.of(at, Scrape(text)))
            texts.append(text)
        return Scrape("\n".join(texts))

    async def until(self, done: asyncio.Event) -> None:
        """Read now and then, until ``done`` is set. Who does not answer is asked again."""
        while not done.is_set():
            with suppress(OSError):  # then the counts will not agree in the end
                await self.scrape()
            with suppress(TimeoutError):
                await asyncio.wait_for(done.wait(), EVERY)

    def all_up_since(self, at: int) -> int | None:
        """When every server was first known to ask its store, of the readings since ``at``."""
        seen = [next((one.at for one in readings if one.at >= at and one.up == 1), None) for readings in self.readings]
        return None if None in seen else max(one for one in seen if one is not None)

    def close(self) -> None:
        for connection in self._connections:
            connection.close()


def differing(before: Counter[tuple[str, ...]], after: Counter[tuple[str, ...]]) -> Counter[tuple[str, ...]]:
    """What was counted between two scrapes."""
    return Counter({key: after[key] - before[key] for key in after if after[key] != before[key]})


def spans(readings: Iterable[Reading]) -> list[tuple[int, int]]:
    """From when to when a store was known to be away, by the readings of one server."""
    found: list[tuple[int, int]] = []
    away: int | None = None
    last = 0
    for reading in readings:
        if reading.up == 0 and away is None:
            away = reading.at
        elif reading.up and away is not None:
            found.append((away, reading.at))
            away = None
        last = reading.at
    if away is not None:
        found.append((away, last))
    return found
