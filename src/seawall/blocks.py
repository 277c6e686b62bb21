"""Tenants that an operator has blocked, each until an instant.

A block is for the minutes in which somebody has to be kept out and nobody wants to write a policy. It ends by itself.
Where state is shared it is known to all processes (`SharedBackend`); otherwise to the one that was told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, final

from seawall.decision import Clock


class Block(NamedTuple):
    """``until`` is wall-clock nanoseconds, ``reason`` what an operator has said, for operators."""

    until: int
    reason: str = ""


@final
class Blocks:
    """Who is blocked. Empty nearly always, which is the one thing that a request asks.

    ``name`` is what a tenant is called here: by itself, or for a shared store by a hash.
    """

    __slots__ = ("_name", "_of", "_wall")

    def __init__(self, wall_clock: Clock, name: Callable[[str], str] = str) -> None:
        self._wall = wall_clock
        self._name = name
        self._of: dict[str, Block] = {}

    def __len__(self) -> int:
        return len(self._of)

    def __repr__(self) -> str:
        return f"<Blocks of {len(self._of)} tenants>"

    def __iter__(self) -> Iterator[tuple[str, Block]]:
        """The blocks that hold, by the names under which they are kept."""
        now = self._wall()
        return iter([(name, block) for name, block in list(self._of.items()) if block.until > now])

    def of(self, tenant: str) -> Block | None:
        """The block of ``tenant``, if it holds."""
        name = self._name(tenant)
        block = self._of.get(name)
        if block is None or block.until > self._wall():
            return block
        self._of.pop(name, None)
        return None

    def add(self, tenant: str, block: Block) -> None:
        """Block ``tenant``, from now on, instead of what held for it."""
        self._of[self._name(tenant)] = block

    def remove(self, tenant: str) -> None:
        self._of.pop(self._name(tenant), None)

    def replace(self, blocks: Mapping[str, Block]) -> None:
        """What a shared store says there is, by name."""
        self._of = dict(blocks)
