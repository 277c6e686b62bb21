"""Where the state of buckets and quotas lives, behind one protocol.

A backend is asked once a request, with everything the request is to be charged, and takes all of it or none of it.
It hands out a `Meter` for each limit when a policy is compiled, so that a decision looks nothing up by name.
"""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from typing import Protocol, TypeAlias

from seawall.rate import Quota, Rate

Key: TypeAlias = str | bytes
"""Whose bucket it is: a tenant's id as text, an address or a combination as bytes."""

LISTED = "tenant"
"""The store of the tenants that the configuration lists: bounded by it, hence neither capped nor evicted."""


class Meter:
    """One limit as one backend keeps it: its name, the store its keys are counted in, and its rate.

    All that have these three in common are one, with one set of buckets.
    """

    __slots__ = ("name", "rate", "store")

    def __init__(self, name: str, store: str, rate: Rate | Quota) -> None:
        self.name = name
        self.store = store
        self.rate = rate

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name} in {self.store}: {self.rate}>"


Charge: TypeAlias = tuple[Meter, Key, int]
"""A meter, whose bucket of it, and the cost."""


class Verdict:
    """The answer to one `Backend.spend`.

    ``charges`` are those that were spent (a backend may have replaced keys). In the same order, ``states`` are the
    buckets afterwards, ``left`` what can still be spent of each, and ``waits`` nanoseconds (0: would be admitted), or
    ``None`` where all were admitted. ``now`` and ``wall`` are the backend's clock, which is the one that counts.
    """

    __slots__ = ("charges", "left", "now", "states", "waits", "wall")

    def __init__(
        self,
        charges: Sequence[Charge],
        states: list[int],
        left: list[int],
        waits: list[int] | None,
        now: int,
        wall: int,
    ) -> None:
        self.charges = charges
        self.states = states
        self.left = left
        self.waits = waits
        self.now = now
        self.wall = wall

    @property
    def admitted(self) -> bool:
        return self.waits is None


class Backend(Protocol):
    """Atomic and all-or-nothing over the charges of one call. Functions that need no I/O return plain values."""

    name: str

    def meter(self, name: str, store: str, rate: Rate | Quota) -> Meter:
        """The meter for a limit. Called when a policy is compiled, never on the request path."""
        ...

    def spend(self, charges: Sequence[Charge]) -> Verdict | Awaitable[Verdict]:
        """Take all of ``charges``, or none of them. A cost of 0 is a peek."""
        ...

    def debit(self, charges: Sequence[Charge]) -> Sequence[int]:
        """Take ``charges`` without asking, and without waiting for anything.

        Buckets go into debt by at most one burst, quotas count all of it. Returns what was taken of each for certain,
        which is what may be given back.
        """
        ...

    def refund(self, charges: Sequence[Charge], spent_at: int) -> None:
        """Give ``charges`` back that were spent at ``spent_at`` (`Verdict.wall`), without waiting for anything.

        Void once their window is over.
        """
        ...

    def statistics(self) -> dict[str, dict[str, int]]:
        """Per store: ``keys`` tracked now, ``evicted`` so far, ``overflowed`` charges that shared a bucket."""
        ...

    async def aclose(self) -> None:
        """Release connections. A backend is not used afterwards."""
        ...
