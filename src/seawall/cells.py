"""Counters as elements of one sequence: ``values[index] += 1`` is the whole of counting.

In one process the sequence is a list. Where several serve one application, and `METRICS_DIR` in their environment names
a directory for it, it is memory that is mapped from a file of this process there, so that any of them can tell what all
have counted (`seawall.cellfiles`). An increment takes 0.09 us then and not 0.04 (benchmarks/workers.py).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Literal, Protocol, TypeAlias, cast, final
from weakref import WeakSet

from seawall.cellfiles import RESERVED, CellFile, CellFiles, Found, Kind, Series, encoded, line
from seawall.rate import SECOND

METRICS_DIR = "SEAWALL_METRICS_DIR"
"""The environment variable with the directory that processes of one application have in common."""

logger = logging.getLogger("seawall")


@final
@dataclass(frozen=True, slots=True)
class Spec:
    """One metric as it is published. ``bounds`` are a histogram's, in seconds; ``together`` is what the gauges of
    several processes, or of several applications in one, are together.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    bounds: tuple[float, ...] = ()
    together: Literal["sum", "min", "max", "mean"] = "sum"

    @property
    def bounds_ns(self) -> tuple[int, ...]:
        """The bounds as they are compared with a measured time."""
        return tuple(int(bound * SECOND) for bound in self.bounds)

    @property
    def cells(self) -> int:
        """How many cells a series has: a histogram one for each bound, one for what is above, one for the sum."""
        return len(self.bounds) + 2 if self.bounds else 1


Reading: TypeAlias = tuple[Spec, tuple[str, ...], float]
"""A value that is not counted but read off when somebody scrapes."""


class Values(Protocol):
    """Integers at places."""

    def __getitem__(self, at: int, /) -> int: ...

    def __setitem__(self, at: int, value: int, /) -> None: ...


@final
class Cells:
    """The counters of one registry.

    A series is its first index; a histogram has one cell for each bound, one for what is above, and one for the sum in
    nanoseconds. Asking again for a series gives the same cells, so that counters survive a new policy. Any thread may
    ask. ``values`` is another sequence from the first count on, and after a fork: nobody keeps it for long.

    With ``files`` they are one process's part of what several count. Its own file is made when it first counts: what
    serves nobody, such as the parent of all workers, has none. ``began`` is called then.
    """

    def __init__(self, files: CellFiles | None = None, began: Callable[[], None] = lambda: None) -> None:
        self.files = files
        self._began = began
        self._file: CellFile | None = None
        self._lock = Lock()
        self._series: dict[Series, tuple[Spec, int]] = {}
        self._readings: dict[Series, int] = {}
        self._placed: list[tuple[bytes, int]] = []
        self._end = 0 if files is None else RESERVED
        self._is_full = False
        self.values: Values = [] if files is None else _Unopened(self)
        if files is not None:
            _mapped.add(self)

    @classmethod
    def of_environment(cls, ordinal: int, began: Callable[[], None]) -> Cells:
        """In the directory that `METRICS_DIR` names, if it does and can be used."""
        directory = os.environ.get(METRICS_DIR)
        if directory:
            try:
                return cls(CellFiles(Path(directory), ordinal), began)
            except OSError as error:
                _say_unusable(directory, error)
        return cls()

    def __repr__(self) -> str:
        return f"<Cells of {len(self._series):,} series in {self._file or 'a list'}>"

    def __len__(self) -> int:
        return len(self._series)

    def clear(self) -> None:
        """Start all counts of this process again (tests)."""
        values = self.values
        if not isinstance(values, _Unopened):
            for spec, _, at in self.series():
                for cell in range(at, at + spec.cells):
                    values[cell] = 0

    def index(self, spec: Spec, *labels: str) -> int:
        """The (first) cell of a series."""
        known = self._series.get((spec.name, labels))
        return self._add(spec, labels) if known is None else known[1]

    def _add(self, spec: Spec, labels: tuple[str, ...]) -> int:
        if len(labels) != len(spec.labels):
            raise ValueError(f"{spec.name} has the labels {spec.labels}, not {labels}")
        series = spec.name, labels
        with self._lock:
            known = self._series.get(series)
            if known is None:  # no other thread was quicker
                at = self._place("gauge" if spec.kind == "gauge" else "count", series, spec.cells)
                known = self._series[series] = spec, at
        return known[1]

    def _place(self, kind: Kind, series: Series, cells: int) -> int:
        """The first of so many cells that nobody has; where there are no more, those that everybody has."""
        at = self._end
        if self.files is None:
            cast(list[int], self.values).extend([0] * cells)
        else:
            text = line(kind, series, cells)
            if self._file is not None and self._file.is_mine:
                try:
                    self._file.append(text, cells)
                except OSError as error:
                    if not self._is_full:
                        why = error.strerror or error
                        logger.warning("metrics: there is no room for %s and what else is new (%s)", series[0], why)
                    self._is_full = True
                    return 0
            self._placed.append((text, cells))
        self._end = at + cells
        return at

    def block(self, spec: Spec, varying: str, choices: Sequence[str], **labels: str) -> tuple[int, ...]:
        """The cells of the series that differ in the label ``varying``, one for each of ``choices``."""
        return tuple(
            self.index(spec, *(choice if label == varying else labels[label] for label in spec.labels))
            for choice in choices
        )

    def series(self) -> Iterable[tuple[Spec, tuple[str, ...], int]]:
        """Every series that this process counts, and its first cell."""
        least = 0 if self.files is None else RESERVED
        for (_, labels), (spec, at) in list(self._series.items()):  # at once: a scrape may come from another thread
            if at >= least:
                yield spec, labels, at

    def known(self, spec: Spec) -> set[tuple[str, ...]]:
        """The labels of all series of ``spec`` that any process has. Raises `OSError`."""
        series = {*self._series}
        if self.files is not None:
            series |= self.files.read().counts.keys()
        return {labels for name, labels in series if name == spec.name}

    @contextmanager
    def alone(self) -> Iterator[bool]:
        """Whether no other process is within such a block; it is not waited for."""
        if self.files is None:
            yield True
        else:
            with self.files.alone() as alone:
                yield alone

    def together(self) -> Found:
        """What all processes have counted, and the readings of the others. Raises `OSError`."""
        found = Found() if self.files is None else self.files.read(but=self._file.name if self._file else None)
        values = self.values
        for spec, labels, at in self.series():
            found.add((spec.name, labels), [values[cell] for cell in range(at, at + spec.cells)])
        return found

    def publish(self, readings: Iterable[Reading]) -> None:
        """Show other processes the readings of this one. Those of counters stay when they are not read any more."""
        if self._file is None or not self._file.is_mine:
            return
        gone = dict(self._readings)
        for spec, labels, value in readings:
            if spec.kind == "counter":
                at = self.index(spec, *labels)
                self.values[at] = max(self.values[at], int(value))
                continue
            series = spec.name, labels
            gone.pop(series, None)
            with self._lock:
                if series not in self._readings:
                    self._readings[series] = self._place("reading", series, 1)
            self.values[self._readings[series]] = encoded(value)
        for at in gone.values():
            self.values[at] = 0

    def open(self) -> Values:
        """Where to count, as there is something to be counted."""
        with self._lock:
            values = self.values
            if not isinstance(values, _Unopened):
                return values
            values = self.values = self._opened()
        if self.files is not None:
            self._began()
        return values

    def _opened(self) -> Values:
        if self.files is not None:
            try:
                file = self._file = self.files.create()
                for text, cells in self._placed:
                    file.append(text, cells)
                return file.values
            except OSError as error:
                _say_unusable(self.files, error)
                self.end()
                self.files = self._file = None
        return [0] * self._end

    def end(self) -> None:
        """Count no more, as far as other processes can tell (tests, which cannot end a process for each)."""
        if self._file is not None:
            self._file.close()

    def start_anew(self) -> None:
        """After a fork: what the parent has counted is the parent's. All series stay where they are."""
        self._lock = Lock()
        if self.files is not None:
            self._file = None
            self._end = RESERVED + sum(cells for _, cells in self._placed)
            self.values = _Unopened(self)


@final
class _Unopened:
    """What there is to count in before the first is counted."""

    def __init__(self, cells: Cells) -> None:
        self._cells = cells

    def __getitem__(self, at: int, /) -> int:
        values = self._cells.values
        return 0 if values is self else values[at]

    def __setitem__(self, at: int, value: int, /) -> None:
        self._cells.open()[at] = value


def _say_unusable(where: object, error: OSError) -> None:
    logger.error(
        "%s: %s cannot be used (%s), so each process tells only what it has counted itself",
        METRICS_DIR,
        where,
        error.strerror or error,
    )


_mapped: WeakSet[Cells] = WeakSet()


def _start_anew() -> None:
    for cells in list(_mapped):
        cells.start_anew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_anew)
