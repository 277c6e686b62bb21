"""What an operator does about one tenant: see what it has used, give it all back, keep it out for a while.

The same for a running application (its status page) and for a store that is asked from a command line.
"""

from __future__ import annotations

import inspect
from typing import Any, cast

from seawall.admission import Entry
from seawall.backends import Backend, OperatedBackend, Verdict
from seawall.blocks import Block, Blocks
from seawall.decision import NEVER
from seawall.gate import Gate
from seawall.rate import SECOND

BLOCKED = "blocked by an operator"


class CannotOperate(Exception):
    """Why something cannot be done, in words for whoever asked."""


def entries_of(gate: Gate, tenant: str) -> list[Entry]:
    """The limits that are the tenant's alone, of its plan and of all rules, each once."""
    found: dict[tuple[str, str], Entry] = {}
    for lane in gate.lanes_of(tenant):
        for entry in lane.terms.entries:
            if entry.whose is None:
                found.setdefault((entry.name, entry.kind), entry)
    return list(found.values())


async def show(gate: Gate, blocks: Blocks, tenant: str) -> dict[str, Any]:
    """What the tenant may do, what it has left of it, and whether it is blocked."""
    entries = entries_of(gate, tenant)
    lane = next(iter(gate.lanes_of(tenant)), None)
    if lane is None:
        raise CannotOperate("the file lists no such tenant, and has no plan for others")
    limits: list[dict[str, Any]] = []
    if entries:
        asked: Any = gate.backend.spend([(entry.meter, tenant, 0) for entry in entries])
        verdict = cast("Verdict | None", await asked if inspect.isawaitable(asked) else asked)
        if verdict is None:
            raise CannotOperate("the store is away")
        for at, entry in enumerate(entries):
            wait = entry.wait(verdict.states[at], verdict)
            limits.append(
                {
                    "policy": entry.name,
                    "limit": entry.limit,
                    "left": verdict.left[at],
                    "wait": None if wait == NEVER else round(wait / SECOND, 3),
                }
            )
    block = blocks.of(tenant)
    return {
        "tenant": tenant,
        "listed": tenant in gate.policy.tenants,
        "plan": lane.terms.plan,
        "mode": lane.terms.mode.name.lower(),
        "priority": lane.terms.priority,
        "concurrency": lane.terms.concurrency,
        "limits": limits,
        "blocked": None if block is None else {"until_ns": block.until, "reason": block.reason},
    }


async def reset(gate: Gate, tenant: str) -> list[str]:
    """Forget what the tenant has used of its limits, whose names are returned."""
    entries = entries_of(gate, tenant)
    await _operated(gate.backend).forget([(entry.meter, tenant) for entry in entries])
    return [entry.name for entry in entries]


async def block(backend: Backend, tenant: str, block: Block | None) -> None:
    """Keep the tenant out until then, or with ``None`` let it in again."""
    await _operated(backend).block(tenant, block)


def _operated(backend: Backend) -> OperatedBackend:
    if isinstance(backend, OperatedBackend):
        return backend
    raise CannotOperate(f"the {backend.name} backend cannot do that")
