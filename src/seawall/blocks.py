"""Tenants that an operator has blocked, each until an instant.

A block is for the minutes in which somebody has to be kept out and nobody wants to write a policy. It ends by itself.
In Redis it is known to all processes; otherwise to the one that was told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import NamedTuple, final

from seawall.decision import Clock

MOST_COMPARED = 20_000
"""Tenants of a file among whom is looked for who is blocked: 30 ms, once for each block."""
_SHOWN = 8


class Block(NamedTuple):
    """``until`` is wall-clock nanoseconds, ``reason`` what an operator has said, for operators."""

    until: int
    reason: str = ""


@final
class Blocks:
    """Who is blocked. Empty nearly always, which is the one thing that a request asks.

    ``name`` is what a tenant is called here: by itself, or for a shared store by a hash.
    """

    __slots__ = ("_ids", "_name", "_of", "_searched", "_wall")

    def __init__(self, wall_clock: Clock, name: Callable[[str], str] = str) -> None:
        self._wall = wall_clock
        self._name = name
        self._of: dict[str, Block] = {}
        self._ids: dict[str, str] = {}
        """Of those who are blocked, as far as they are known, by name."""
        self._searched: tuple[object, frozenset[str]] = (None, frozenset())

    def __len__(self) -> int:
        return len(self._of)

    def __repr__(self) -> str:
        return f"<Blocks of {len(self._of)} tenants>"

    def __iter__(self) -> Iterator[tuple[str, Block]]:
        """The blocks that hold, as far as known by the tenants' ids."""
        return iter(self.shown())

    def shown(self, tenants: Iterable[str] = ()) -> list[tuple[str, Block]]:
        """The blocks that hold, each with its tenant's id, the one that ends first before the others.

        Known by it are those who were blocked or turned away here, and the first `MOST_COMPARED` of ``tenants``; of all
        others it is "#" and the beginning of their name.
        """
        holding = self.by_name()
        strangers = frozenset(holding.keys() - self._ids.keys())
        among, searched = self._searched
        if strangers and not (among is tenants and searched == strangers):
            self._searched = tenants, strangers
            for tenant in islice(tenants, MOST_COMPARED):
                if self._name(tenant) in strangers:
                    self.learn(tenant)
        ordered = sorted(holding.items(), key=lambda one: one[1].until)
        return [(self._ids.get(name) or f"#{name[:_SHOWN]}", block) for name, block in ordered]

    def by_name(self) -> dict[str, Block]:
        """The blocks that hold, by the names under which they are kept."""
        now = self._wall()
        return {name: block for name, block in self._of.copy().items() if block.until > now}

    def of(self, tenant: str) -> Block | None:
        """The block of ``tenant``, if it holds."""
        name = self._name(tenant)
        block = self._of.get(name)
        if block is None:
            return None
        if block.until > self._wall():
            self._ids[name] = tenant
            return block
        self._of.pop(name, None)
        return None

    def learn(self, tenant: str) -> None:
        """Know the id of somebody who is blocked, or is about to be."""
        self._ids[self._name(tenant)] = tenant

    def add(self, tenant: str, block: Block) -> None:
        """Block ``tenant``, from now on, instead of what held for it."""
        self.learn(tenant)
        self.replace({**self._of, self._name(tenant): block})

    def remove(self, tenant: str) -> None:
        self._of.pop(self._name(tenant), None)

    def replace(self, blocks: Mapping[str, Block]) -> None:
        """What a shared store says there is, by name. What has ended is forgotten."""
        now = self._wall()
        self._of = {name: block for name, block in blocks.items() if block.until > now}
        self._ids = {name: tenant for name, tenant in self._ids.copy().items() if name in self._of}
