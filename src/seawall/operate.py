"""What an operator does about one tenant: see what it has used, give it all back, keep it out for a while.

The same for a running application (its status page) and for a store that is asked from a command line.
"""

from __future__ import annotations

import inspect
from typing import Any, cast

from seawall.admission import Entry, bounded_id
from seawall.backends import Backend, OperatedBackend, SharedBackend, Verdict
from seawall.blocks import Block, Blocks
from seawall.config.runtime import check_tenant
from seawall.directory import Known
from seawall.gate import Gate
from seawall.notation import instant_text, quota_text, rate_text
from seawall.rate import SECOND, Rate

NOBODY = "the file lists no such tenant, and has no plan for others"


class CannotOperate(Exception):
    """Why something cannot be done, in words for whoever asked."""


def entries_of(gate: Gate, tenant: str, known: Known | None = None) -> list[Entry]:
    """The limits that are the tenant's alone, of its plan and of all rules, each once."""
    found: dict[tuple[str, str], Entry] = {}
    for lane in gate.lanes_of(tenant, known):
        for entry in lane.terms.entries:
            if entry.whose is None:
                found.setdefault((entry.name, entry.kind), entry)
    return list(found.values())


async def show(gate: Gate, blocks: Blocks, tenant: str, known: Known | None = None) -> dict[str, Any]:
    """What the tenant may do, what it has left of it, and whether it is blocked.

    ``known`` is what a database says of one that the file does not list. Raises `OSError` where a store is away.
    """
    tenant = _called(tenant)
    entries = entries_of(gate, tenant, known)
    lane = next(iter(gate.lanes_of(tenant, known)), None)
    if lane is None:
        raise CannotOperate(NOBODY)
    limits: list[dict[str, Any]] = []
    if entries:
        verdict = await _peek(gate.backend, entries, tenant)
        for at, entry in enumerate(entries):
            limits.append(
                {
                    "policy": entry.name,
                    "allowance": rate_text(entry.rate) if isinstance(entry.rate, Rate) else quota_text(entry.rate),
                    "limit": entry.limit,
                    "left": verdict.left[at],
                    "wait": round(entry.wait(verdict.states[at], verdict) / SECOND, 3),
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
        "blocked": None if block is None else {"until": instant_text(block.until / SECOND), "reason": block.reason},
    }


async def _peek(backend: Backend, entries: list[Entry], tenant: str) -> Verdict:
    """The tenant's buckets as they are, in the store and not in this process's share of it."""
    charges = [(entry.meter, tenant, 0) for entry in entries]
    asked: Any = backend.spend(charges, "deny") if isinstance(backend, SharedBackend) else backend.spend(charges)
    verdict = cast("Verdict | None", await asked if inspect.isawaitable(asked) else asked)
    if verdict is None:
        raise OSError("it is away")
    return verdict


async def reset(gate: Gate, tenant: str, known: Known | None = None) -> list[str]:
    """Forget what the tenant has used of its limits, whose names are returned.

    Of one that neither the file nor ``known`` lists, of all plans, for nobody says which one it has been on. Raises
    `OSError` where a store is away.
    """
    tenant = _called(tenant)
    if not gate.lanes_of(tenant, known):
        raise CannotOperate(NOBODY)
    entries = entries_of(gate, tenant, known)
    if known is None and tenant not in gate.policy.tenants:
        for plan in gate.policy.plans:
            entries += entries_of(gate, tenant, Known(tenant, check_tenant({"plan": plan}), 0, 0))
    meters = dict.fromkeys((entry.meter, tenant) for entry in entries)
    await _operated(gate.backend).forget(list(meters))
    return list(dict.fromkeys(entry.name for entry in entries))


async def block(backend: Backend, tenant: str, block: Block | None) -> None:
    """Keep the tenant out until then, or with ``None`` let it in again. Raises `OSError` where a store is away."""
    try:
        await _operated(backend).block(_called(tenant), block)
    except ValueError as error:
        raise CannotOperate(str(error)) from None


def _called(tenant: str) -> str:
    """The id under which a tenant is known."""
    return bounded_id(tenant) or tenant


def _operated(backend: Backend) -> OperatedBackend:
    if isinstance(backend, OperatedBackend):
        return backend
    raise CannotOperate(f"the {backend.name} backend cannot do that")
