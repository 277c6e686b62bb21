"""Who was refused, by what, where and when: counts over a replay, and the tables that they make."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, final

from seawall.admission import DEFAULT_ROUTE
from seawall.gate import Lane
from seawall.policy import Policy, is_reserved
from seawall.rate import SECOND
from seawall.replay.engine import EXEMPT, REFUSED, Caller, Ruling, shown
from seawall.replay.logs import Request

HOUR = 3_600
WIDTHS = (1, 2, 5, 10, 30, 60, 120, 300, 600, 1_800, HOUR, 2 * HOUR, 6 * HOUR, 12 * HOUR, 24 * HOUR, 7 * 24 * HOUR)
"""Seconds of one column over time; wider ones are twice as wide as the one before."""
MOST_COLUMNS = 2_000
MOST_SHAPES = 1_000
SERVED = ""
"""What a request of a timeline was refused by if it was not."""
ELSEWHERE = "other paths"

_VARIABLE = re.compile(r"[0-9]+|(?=.*[0-9])(?:[0-9a-fA-F-]{8,}|[a-z]{1,8}_[0-9A-Za-z]{8,})|.{33,}", re.DOTALL)
Cause: TypeAlias = tuple[Caller, str, str, str, bool]
"""Whose request, refused by which limit, on which rule, shown as which path; and whether it was really refused."""


@final
@dataclass(slots=True)
class Row:
    """One line of a table. ``refused`` and ``shadow`` (would be refused) are of ``requests``; instants are in ns, 0 for
    never. ``by`` and ``on`` say what refused those, and on which paths, the most frequent first."""

    name: str
    kind: str = ""
    requests: int = 0
    refused: int = 0
    shadow: int = 0
    first: int = 0
    last: int = 0
    by: dict[str, int] = field(default_factory=dict)
    on: dict[str, int] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """The part (0..1) of the requests that was refused or would be."""
        return (self.refused + self.shadow) / self.requests if self.requests else 0.0

    def add(self, cause: str, path: str, count: Sequence[int], *, enforced: bool) -> None:
        number, first, last = count
        if enforced:
            self.refused += number
        else:
            self.shadow += number
        self.first = min(self.first or first, first)
        self.last = max(self.last, last)
        self.by[cause] = self.by.get(cause, 0) + number
        self.on[path] = self.on.get(path, 0) + number


@final
class Timeline:
    """Counts by what became of requests, in columns of time that are merged as they become too many."""

    def __init__(self) -> None:
        self.width = WIDTHS[0]
        self._columns: dict[int, dict[str, int]] = {}

    def add(self, second: int, series: str) -> None:
        column = self._columns.get(second // self.width)
        if column is None:
            column = self._columns[second // self.width] = {}
            if len(self._columns) > MOST_COLUMNS:
                self._columns = self._merged(_wider(self.width))
                self.width = _wider(self.width)
                column = self._columns[second // self.width]
        column[series] = column.get(series, 0) + 1

    def columns(self, most: int) -> tuple[int, list[tuple[int, dict[str, int]]]]:
        """At most ``most`` columns without gaps: their width in seconds, and each one's beginning and counts."""
        if not self._columns:
            return self.width, []
        first, last = min(self._columns) * self.width, max(self._columns) * self.width
        width = self.width
        while last // width - first // width >= most:
            width = _wider(width)
        columns = self._merged(width)
        return width, [(at * width, columns.get(at, {})) for at in range(first // width, last // width + 1)]

    def _merged(self, width: int) -> dict[int, dict[str, int]]:
        merged: dict[int, dict[str, int]] = {}
        for at, counts in self._columns.items():
            column = merged.setdefault(at * self.width // width, {})
            for series, count in counts.items():
                column[series] = column.get(series, 0) + count
        return merged


def _wider(width: int) -> int:
    """The next width, which is a multiple of it or close to one."""
    return next((each for each in WIDTHS if each > width and each % width == 0), 2 * width)


@final
class Tally:
    """What became of the requests between ``since`` and ``until`` (ns, the end excluded), of one ``tenant`` or all.

    The requests before it are decided on as well, for what they used is used.
    """

    def __init__(self, policy: Policy, *, since: int = 0, until: int = 1 << 63, tenant: str | None = None) -> None:
        self.policy = policy
        self.requests = 0
        self.exempt = 0
        self.refused_then = 0
        """Refused by 429 at the time, as the log says."""
        self.first = 0
        self.last = 0
        self.timed = False
        self.statuses: dict[int, int] = {}
        self.timeline = Timeline()
        self._since, self._until, self._tenant = since, until, tenant
        self._lanes: dict[Lane, int] = {}
        self._callers: dict[Caller, int] = {}
        self._causes: dict[Cause, list[int]] = {}
        self._hours: dict[int, int] = {}
        self._refused_hours: dict[tuple[int, str, str, bool], list[int]] = {}
        self._labels: dict[tuple[str, Lane | None], str] = {}
        self._shapes: set[str] = set()

    @property
    def refused(self) -> int:
        return sum(self.statuses.values())

    @property
    def shadow(self) -> int:
        return sum(count[0] for (*_, enforced), count in self._causes.items() if not enforced)

    def covers(self, request: Request, caller: Caller) -> bool:
        """Whether it is one of those that are counted."""
        return self._since <= request.at < self._until and (self._tenant is None or caller == self._tenant)

    def add(self, request: Request, ruling: Ruling) -> None:
        outcome, caller, lane, status, cause = ruling
        at = request.at
        if not self._since <= at < self._until or (self._tenant is not None and caller != self._tenant):
            return
        self.requests += 1
        self.first = self.first or at
        self.last = at
        if request.took >= 0:
            self.timed = True
        if request.status == 429:
            self.refused_then += 1
        second = at // SECOND
        hour = second // HOUR
        self._hours[hour] = self._hours.get(hour, 0) + 1
        if outcome == EXEMPT:
            self.exempt += 1
        else:
            self._callers[caller] = self._callers.get(caller, 0) + 1
        if lane is not None:
            self._lanes[lane] = self._lanes.get(lane, 0) + 1
        if cause:
            enforced = outcome == REFUSED
            if enforced:
                self.statuses[status] = self.statuses.get(status, 0) + 1
            label = self.label(cause, lane)
            path = self._where(lane, request.path)
            _count(self._causes, (caller, label, lane.terms.route.name if lane else "", path, enforced), at)
            _count(self._refused_hours, (hour, label, path, enforced), at)
            self.timeline.add(second, label if enforced else f"{label} (shadow)")
        else:
            self.timeline.add(second, SERVED)

    def label(self, cause: str, lane: Lane | None) -> str:
        """A limit as people know it: those of plans by their plan, streams by their rule."""
        label = self._labels.get((cause, lane))
        if label is None:
            label = cause
            if lane is not None and is_reserved(cause):
                streams = cause == "streams"
                label += f" ({f'rule {lane.terms.route.name}' if streams else f'plan {lane.terms.plan}'})"
            self._labels[cause, lane] = label
        return label

    def _where(self, lane: Lane | None, path: str) -> str:
        """The path of a rule as the file has it, or what requests to a path of no rule have in common."""
        if lane is not None:
            route = lane.terms.route
            if route is not DEFAULT_ROUTE:
                return route.paths[0] if len(route.paths) == 1 else route.name
        shape = shape_of(path)
        if shape not in self._shapes:
            if len(self._shapes) >= MOST_SHAPES:
                return ELSEWHERE
            self._shapes.add(shape)
        return shape

    def limits(self) -> list[Row]:
        """Each limit that a request had to pass (and other reasons of refusals), the one that refused most first."""
        rows: dict[str, Row] = {}
        for lane, count in self._lanes.items():
            terms = lane.terms
            names = [entry.name for entry in terms.entries]
            if terms.concurrency is not None:
                names.append("concurrency")
            if terms.route.streaming is not None:
                names.append("streams")
            for name in names:
                label = self.label(name, lane)
                row = rows.setdefault(label, Row(label, "limit"))
                row.requests += count
        for (_, label, _, path, enforced), counted in self._causes.items():
            row = rows.setdefault(label, Row(label, "rule", requests=self.requests))
            row.add(label, path, counted, enforced=enforced)
        return _busiest(rows.values())

    def callers(self) -> list[Row]:
        """Each caller that was refused or would have been, the one with most refusals first."""
        rows: dict[Caller, Row] = {}
        for (caller, label, _, path, enforced), count in self._causes.items():
            row = rows.get(caller)
            if row is None:
                name, kind = shown(caller, self.policy)
                row = rows[caller] = Row(name, kind, self._callers[caller])
            row.add(label, path, count, enforced=enforced)
        return _busiest(rows.values())

    def routes(self) -> list[Row]:
        """Each rule, the one that refused most first. ``default`` is everything that matches none."""
        rows: dict[str, Row] = {}
        for lane, count in self._lanes.items():
            name = lane.terms.route.name
            rows.setdefault(name, Row(name, "rule")).requests += count
        for (_, label, rule, path, enforced), counted in self._causes.items():
            row = rows.setdefault(rule or "before any rule", Row(rule or "before any rule", "rule"))
            if not rule:
                row.requests += counted[0]
            row.add(label, path, counted, enforced=enforced)
        return _busiest(rows.values())

    def hours(self) -> list[Row]:
        """Each hour in which there was a request, in their order; its name is when it begins, in UTC."""
        rows = {hour: Row(str(hour * HOUR), "hour", count) for hour, count in sorted(self._hours.items())}
        for (hour, label, path, enforced), count in self._refused_hours.items():
            rows[hour].add(label, path, count, enforced=enforced)
        for row in rows.values():
            _order(row)
        return list(rows.values())


@final
class Comparison:
    """What becomes of the same requests by another policy: who is refused now and was not, and the reverse."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._newly: dict[Caller, dict[str, int]] = {}
        self._no_longer: dict[Caller, dict[str, int]] = {}
        self.refused_before = 0
        self.refused_by_both = 0

    def add(self, now: Ruling, before: Ruling, label: str, label_before: str) -> None:
        """``label`` is the limit that refuses now, ``label_before`` the one that did."""
        refused, was = now[0] == REFUSED, before[0] == REFUSED
        if was:
            self.refused_before += 1
            if refused:
                self.refused_by_both += 1
        if refused == was:
            return
        caller = now[1] if now[1] is not None else before[1]
        counts = (self._newly if refused else self._no_longer).setdefault(caller, {})
        cause = label if refused else label_before
        counts[cause] = counts.get(cause, 0) + 1

    @property
    def newly(self) -> int:
        return sum(sum(counts.values()) for counts in self._newly.values())

    @property
    def no_longer(self) -> int:
        return sum(sum(counts.values()) for counts in self._no_longer.values())

    def changes(self) -> list[dict[str, Any]]:
        """Each caller for whom something changes, the most changes first."""
        rows: list[dict[str, Any]] = []
        for caller in dict.fromkeys((*self._newly, *self._no_longer)):
            name, kind = shown(caller, self._policy)
            newly, gone = _ordered(self._newly.get(caller, {})), _ordered(self._no_longer.get(caller, {}))
            rows.append(
                {
                    "name": name,
                    "kind": kind,
                    "newly_refused": sum(newly.values()),
                    "no_longer_refused": sum(gone.values()),
                    "newly_by": newly,
                    "no_longer_by": gone,
                }
            )
        rows.sort(key=lambda row: (-row["newly_refused"] - row["no_longer_refused"], row["name"]))
        return rows


def shape_of(path: str) -> str:
    """A path without what differs between requests to one endpoint.

    >>> shape_of("/v1/items/4711/parts/0a1b2c3d-0000-4000-8000-000000000000")
    '/v1/items/{}/parts/{}'
    """
    return "/".join("{}" if _VARIABLE.fullmatch(segment) else segment for segment in path[:512].split("/"))


def _count(counts: dict[Any, list[int]], key: object, at: int) -> None:
    known = counts.get(key)
    if known is None:
        counts[key] = [1, at, at]
    else:
        known[0] += 1
        known[2] = at


def _busiest(rows: Iterable[Row]) -> list[Row]:
    ordered = sorted(rows, key=lambda row: (-row.refused, -row.shadow, -row.requests, row.name))
    for row in ordered:
        _order(row)
    return ordered


def _order(row: Row) -> None:
    row.by, row.on = _ordered(row.by), _ordered(row.on)


def _ordered(counts: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])))
