"""A policy and some logs, from the first line to what there is to say about them."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any, Literal, TypeAlias, final, get_args

from seawall.config.diagnostics import printable
from seawall.decision import Mode
from seawall.policy import Policy
from seawall.rate import SECOND
from seawall.replay.engine import Replay, without_unknown
from seawall.replay.logs import WINDOW, AccessLog, merged
from seawall.replay.tally import Comparison, Row, Tally

By: TypeAlias = Literal["policy", "tenant", "route", "hour"]
BYS: tuple[By, ...] = get_args(By)

STEP = 4_096
"""Requests between two reports of progress."""


@final
class Simulation:
    """What ``policy`` makes of ``logs``; with ``against``, beside what that makes of them.

    ``since`` and ``until`` are ns since the epoch, the end excluded. Requests before ``since`` are decided on, for what
    they used is used, but not counted; so are those of others than ``tenant``.
    """

    def __init__(
        self,
        policy: Policy,
        logs: Sequence[AccessLog],
        *,
        against: Policy | None = None,
        since: int = 0,
        until: int = 1 << 63,
        tenant: str | None = None,
    ) -> None:
        self.policy = policy
        self.logs = logs
        self._until = until
        self._known = {role.removeprefix("state:") for log in logs for role in log.fields if role.startswith("state:")}
        self._states = logs[0].wanted.states if logs else ()
        self.left_out: list[str] = []
        self.replay = self._replay(policy)
        self.before = None if against is None else self._replay(against)
        self.tally = Tally(policy, since=since, until=until, tenant=tenant)
        self.comparison = None if against is None else Comparison(policy)

    def __repr__(self) -> str:
        return f"<Simulation of {len(self.logs)} logs: {self.tally.requests} requests, {self.tally.refused} refused>"

    def _replay(self, policy: Policy) -> Replay:
        policy, left_out = without_unknown(policy, self._known)
        self.left_out += [name for name in left_out if name not in self.left_out]
        return Replay(policy, self._states)

    def run(self, progress: Callable[[int], None] = lambda _: None) -> None:
        """Decide on every request; ``progress`` is told the bytes read so far, now and then."""
        decide, add, until = self.replay.decide, self.tally.add, self._until
        for number, request in enumerate(merged(self.logs), 1):
            if request.at >= until:
                break
            ruling = decide(request)
            add(request, ruling)
            if self.before is not None:
                self._compare(request, ruling, self.before)
            if number % STEP == 0:
                progress(sum(log.position for log in self.logs))

    def _compare(self, request: Any, ruling: Any, before: Replay) -> None:
        was = before.decide(request)
        caller = ruling[1] if ruling[1] is not None else was[1]
        if self.comparison is not None and self.tally.covers(request, caller):
            label = self.tally.label
            self.comparison.add(ruling, was, label(ruling[4], ruling[2]), label(was[4], was[2]))

    def table(self, by: By) -> list[Row]:
        """The rows of one table, the most refused first; hours are in their order."""
        tables = {
            "policy": self.tally.limits,
            "tenant": self.tally.callers,
            "route": self.tally.routes,
            "hour": self.tally.hours,
        }
        return tables[by]()

    def notes(self) -> list[str]:
        """What somebody who believes the numbers should know."""
        policy, fields = self.policy, [log.fields for log in self.logs]
        told = {role for each in fields for role in each}
        notes = []
        for log in self.logs:
            if log.unreadable:
                where = "; ".join(f"line {number}: {reason}" for number, reason in log.examples)
                notes.append(f"{log.name}: {log.unreadable:,} of {log.lines:,} lines are unreadable ({where})")
            if log.cut:
                notes.append(f"{log.name} ends too early ({log.cut}); what was there is counted")
            for role in log.absent:
                named = f"'{log.wanted.fields[role]}' of --field {role}"
                notes.append(f"{log.name}: none of the first lines has the field {named}")
            if log.instants.zoneless:
                notes.append(f"{log.name}: times without a zone are taken as UTC")
        if self.replay.late:
            late = f"{self.replay.late:,} requests stand more than {WINDOW:,} lines too late in their log"
            notes.append(f"{late}, and are taken to have come when those around them did")
        if policy.tenants and not told & {"tenant", "key"}:
            notes.append("no log names a tenant, so all callers are anonymous: --field tenant=NAME or --field key=NAME")
        if "key" in told and not any(kind == "api_key" for kind, _ in policy.identity.tenant):
            notes.append("this policy reads no API keys (identity.tenant), so those of the log change nothing")
        if "ip" not in told:
            notes.append("no log names an address, so anonymous callers are all one: --field ip=NAME")
        holds = [plan.name for plan in policy.plans.values() if plan.concurrency]
        holds += [route.name for route in policy.routes if route.streaming]
        if holds and not self.tally.timed:
            notes.append(
                "no log says how long requests took, so concurrency and streams refuse nobody: --field duration=NAME"
            )
        if self.left_out:
            notes.append(f"left out, for no log tells the state that they are per: {', '.join(self.left_out)}")
        if policy.shedding.algorithm != "off" and policy.mode is not Mode.OFF:
            notes.append(
                "overload, deadlines and priorities are no part of this: a log does not tell what the service could do"
            )
        return notes

    def document(self, top: int) -> dict[str, Any]:
        """Everything, for machines. ``callers`` and ``changes`` are the first ``top``."""
        tally, comparison = self.tally, self.comparison
        found: dict[str, Any] = {
            "policy": {"digest": self.policy.digest, "mode": self.policy.mode.name.lower()},
            "logs": [
                {
                    "name": log.name,
                    "format": log.form,
                    "fields": {role: str(field) for role, field in log.fields.items()},
                    "lines": log.lines,
                    "unreadable": log.unreadable,
                }
                for log in self.logs
            ],
            "from": stamp(tally.first) if tally.requests else None,
            "to": stamp(tally.last) if tally.requests else None,
            "requests": tally.requests,
            "refused": tally.refused,
            "refused_by_status": {str(status): count for status, count in sorted(tally.statuses.items())},
            "shadow": tally.shadow,
            "exempt": tally.exempt,
            "refused_at_the_time": tally.refused_then,
            "limits": [as_record(row) for row in self.table("policy")],
            "callers": [as_record(row) for row in self.table("tenant")[:top]],
            "routes": [as_record(row) for row in self.table("route")],
            "hours": [as_record(row) for row in self.table("hour")],
        }
        if comparison is not None:
            found["comparison"] = {
                "refused_before": comparison.refused_before,
                "newly_refused": comparison.newly,
                "no_longer_refused": comparison.no_longer,
                "changes": comparison.changes()[:top],
            }
        found["notes"] = self.notes()
        return found

    def csv(self, by: By, top: int) -> str:
        """One table as CSV; with a comparison, its changes."""
        if self.comparison is not None:
            records = self.comparison.changes()[:top]
        else:
            rows = self.table(by)
            records = [as_record(row) for row in (rows[:top] if by == "tenant" else rows)]
        names = list(records[0]) if records else ["name"]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(names)
        for record in records:
            writer.writerow([_cell(record[name]) for name in names])
        return text.getvalue()


def as_record(row: Row) -> dict[str, Any]:
    """A row with its share (0..1), and instants in ISO 8601."""
    record = asdict(row)
    if row.kind == "hour":
        record["name"] = stamp(int(row.name) * SECOND)
    record |= {
        "share": round(row.share, 6),
        "first": stamp(row.first) if row.first else None,
        "last": stamp(row.last) if row.last else None,
        "by": record.pop("by"),
        "on": record.pop("on"),
    }
    return record


def stamp(at: int) -> str:
    """An instant (ns since the epoch) in ISO 8601, to the second, in UTC."""
    return f"{datetime.fromtimestamp(at // SECOND, UTC):%Y-%m-%dT%H:%M:%SZ}"


def _cell(value: object) -> object:
    """A value as spreadsheets take it: no formula and no control character, whoever chose a tenant's id or a path."""
    if isinstance(value, dict):
        value = "; ".join(f"{name} {count}" for name, count in value.items())
    if isinstance(value, str):
        value = printable(value)
        return f"'{value}" if value[:1] in ("=", "+", "-", "@") else value
    return "" if value is None else value
