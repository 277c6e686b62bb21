"""What the status page says, as one document of plain values: what JSON has, what is rendered, what `top` reads."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

from seawall._version import __version__
from seawall.cells import Cells
from seawall.decision import Mode
from seawall.metrics import BUILD_INFO, INFLIGHT, OUTCOMES, REJECTIONS, REQUESTS, SHADOW_REJECTIONS
from seawall.notation import instant_text, quota_text, rate_text
from seawall.policy import Plan, Policy

Document: TypeAlias = dict[str, Any]
Count: TypeAlias = tuple[str, tuple[str, ...], float]
"""The name of a metric, the labels of a series (in the order of its `Spec`) and what it stands at."""

MOST_REFUSED = 20
MOST_CHANGES = 10
MOST_LINES = 20
"""Lines of one change."""
MOST_ROWS = 100
"""Plans, files, warnings and blocked tenants. A page of thousands is read by nobody."""
MOST_TEXT = 20_000
"""Characters of diagnostics."""

_WITHOUT = {
    "local": "each process holds its share of the limits",
    "allow": "everybody is let in, unchecked",
    "deny": "whoever has a limit is refused",
}
"""What `on_failure` makes of requests while a backend is away. A rule's own may differ."""


class Reloading(Protocol):
    """How a file that is watched fares. Instants are seconds since the epoch."""

    @property
    def applied(self) -> int: ...
    @property
    def failed(self) -> int: ...
    @property
    def loaded_at(self) -> float: ...
    @property
    def error(self) -> str | None: ...
    @property
    def error_at(self) -> float | None: ...


def document(
    policy: Policy,
    *,
    now: float,
    started: float,
    counts: Iterable[Count],
    held: Mapping[str, Any],
    up: bool = True,
    reload: Reloading | None = None,
    files: Sequence[str] = (),
    refused: Sequence[Mapping[str, Any]] = (),
    blocked: Sequence[Mapping[str, Any]] = (),
    history: Sequence[Mapping[str, Any]] = (),
    workers: int = 1,
) -> Document:
    """The document at ``now``, in seconds since the epoch as ``started`` is.

    ``counts`` are of ``workers`` processes together, and ``held`` (`Middleware.statistics`) is of this one; ``up`` is
    whether the backend answers; ``refused`` is the busiest first, ``history`` the oldest first.
    """
    totals = _Totals(counts)
    overload = dict(held.get("overload") or {})
    said: Document = {
        "version": __version__,
        "time": instant_text(now),
        "pid": os.getpid(),
        "workers": workers,
        "uptime": round(max(now - started, 0.0), 3),
        "attention": [],
        "policy": {
            "mode": policy.mode.name.lower(),
            "digest": policy.digest[:12],
            "files": list(files[:MOST_ROWS]),
            "tenants": len(policy.tenants),
            "plans": len(policy.plans),
            "routes": len(policy.routes),
            "warnings": list(policy.warnings[:MOST_ROWS]),
        },
        "reload": _reload(policy, reload, started),
        "limits": [_limits(plan) for plan in list(policy.plans.values())[:MOST_ROWS]],
        "requests": {outcome: totals.requests.get(outcome, 0) for outcome in OUTCOMES},
        "rejections": totals.rejections,
        "shadow": totals.shadow,
        "inflight": {one.name: totals.inflight.get(one.name, 0) for one in policy.priorities},
        "queued": dict(overload.get("waiting") or {}),
        "shed": {one.name: totals.shed.get(one.name, 0) for one in policy.priorities},
        "overload": overload,
        "streams": dict(held.get("streams") or {}),
        "backend": {
            "type": policy.backend.type,
            "up": up,
            "on_failure": policy.backend.on_failure,
            "stores": dict(held.get("backend") or {}),
        },
        "refused": [dict(one) for one in refused[:MOST_REFUSED]],
        "blocked": [dict(one) for one in blocked[:MOST_ROWS]],
        "history": [_change(one) for one in history[-MOST_CHANGES:]],
    }
    said["attention"] = list(_attention(policy, said))
    return said


def counted(cells: Cells) -> tuple[list[Count], int]:
    """What all processes that share ``cells`` have counted, and how many of them live. Raises `OSError`."""
    found = cells.together()
    # Each that lives says which version it is; of this one that is not among what the others say.
    others = [len(values) for (name, _), values in found.readings.items() if name == BUILD_INFO.name]
    return [(name, labels, values[0]) for (name, labels), values in found.counts.items()], 1 + sum(others)


class _Totals:
    """Counts added up over the labels that the document does not tell apart."""

    def __init__(self, counts: Iterable[Count]) -> None:
        self.requests: dict[str, int] = {}
        self.shed: dict[str, int] = {}
        self.inflight: dict[str, int] = {}
        self.rejections: dict[str, int] = {}
        self.shadow: dict[str, int] = {}
        by_first = {
            REQUESTS.name: self.requests,
            INFLIGHT.name: self.inflight,
            REJECTIONS.name: self.rejections,
            SHADOW_REJECTIONS.name: self.shadow,
        }
        for name, labels, value in counts:
            into = by_first.get(name)
            if into is None or not value:
                continue
            into[labels[0]] = into.get(labels[0], 0) + int(value)
            if into is self.requests and labels[0] == "shed":
                self.shed[labels[1]] = self.shed.get(labels[1], 0) + int(value)


def _reload(policy: Policy, reload: Reloading | None, started: float) -> Document:
    every = None if policy.reload_ns is None or reload is None else policy.reload_ns / 1e9
    if reload is None:
        return {"every": every, "applied": 0, "failed": 0, "loaded": instant_text(started), "error": None}
    error = None
    if reload.error is not None:
        error = {"time": instant_text(reload.error_at or reload.loaded_at), "text": reload.error[:MOST_TEXT]}
    return {
        "every": every,
        "applied": reload.applied,
        "failed": reload.failed,
        "loaded": instant_text(reload.loaded_at),
        "error": error,
    }


def _change(record: Mapping[str, Any]) -> Document:
    """A record of the history (`seawall.history`), without most of a change that is long."""
    lines = list(record["diff"])
    more = [f"and {len(lines) - MOST_LINES:,} more"] if len(lines) > MOST_LINES else []
    return {**record, "diff": [*lines[:MOST_LINES], *more]}


def _limits(plan: Plan) -> Document:
    return {
        "plan": plan.name,
        "rate": ", ".join(map(rate_text, plan.rates)) or "unlimited",
        "quota": "unlimited" if plan.quota is None else quota_text(plan.quota),
        "concurrency": plan.concurrency,
        "priority": plan.priority,
        "mode": plan.mode.name.lower(),
    }


def _attention(policy: Policy, said: Document) -> Iterable[Document]:
    """What an operator should know first. An ``alert`` is something to do, a ``note`` is not."""
    error = said["reload"]["error"]
    if error is not None:
        yield _alert(f"The last reload failed at {when(error['time'])}; what was loaded before is in force.")
    backend = said["backend"]
    if not backend["up"]:
        yield _alert(f"The {backend['type']} backend is away: {_WITHOUT[policy.backend.on_failure]}.")
    cut = said["overload"].get("shed_from")
    if cut is not None:
        some, *rest = list(said["queued"])[cut:]
        yield _alert(f"Shedding now: some of class {some}" + (f", and all of {', '.join(rest)}." if rest else "."))
    if policy.mode is Mode.SHADOW:
        yield _note("Shadow mode: limits are counted, and nobody is refused.")
    elif policy.mode is Mode.OFF:
        yield _note("Switched off: nothing is counted against a limit, and nobody is refused.")
    if policy.warnings:
        count = len(policy.warnings)
        yield _note("The configuration has 1 warning." if count == 1 else f"The configuration has {count} warnings.")


def _alert(text: str) -> Document:
    return {"level": "alert", "text": text}


def _note(text: str) -> Document:
    return {"level": "note", "text": text}


def when(instant: str) -> str:
    """An instant in ISO 8601, UTC, as people read it: ``2026-03-04 12:00:00 UTC``."""
    return instant.replace("T", " ").partition(".")[0].removesuffix("Z") + " UTC"
