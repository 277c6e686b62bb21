"""Where the state of buckets and quotas lives, behind one protocol.

A backend is asked once a request, with everything the request is to be charged, and takes all of it or none of it.
It hands out a `Meter` for each limit when a policy is compiled, so that a decision looks nothing up by name.
"""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from typing import Literal, Protocol, TypeAlias, runtime_checkable

from seawall.blocks import Block, Blocks
from seawall.rate import SECOND, Quota, Rate

Key: TypeAlias = str | bytes
"""Whose bucket it is: a tenant's id as text, an address or a combination as bytes."""

Failure: TypeAlias = Literal["local", "allow", "deny"]
"""Who decides while the store of a shared backend is away: this process for its share of the limit, or nobody, and
then everything is let in or nothing is."""

CALL_RESULTS = ("ok", "timeout", "connection", "error", "mismatch")
"""How a call to a shared store may end: answered in time, not in time, not connected (any more), answered with an
error, answered with what is no answer to it."""

DENIED_FOR = SECOND
"""Nanoseconds for which a shared backend believes a refusal without asking, at most: what is given back or forgotten
elsewhere is to be seen."""

LISTED = "tenant"
"""The store of the tenants that the configuration lists: bounded by it, hence neither capped nor evicted."""
KNOWN = "known"
"""The store of tenants out of somebody's database, who may all have limits of their own. It is capped, but apart from
strangers' ids."""
TENANTS = frozenset({LISTED, KNOWN, "id"})
"""The stores whose keys are tenants' ids. Who is in one may be in the other after a reload, with what it has used."""


def stored(store: str) -> str:
    """The store under whose name a shared store knows callers: tenants are one, listed or not."""
    return LISTED if store in TENANTS else store


class Meter:
    """One limit as one backend keeps it: its name, the store its keys are counted in, and its rate.

    All that have these three in common are one, with one set of buckets.
    """

    __slots__ = ("__weakref__", "name", "rate", "store")

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
        """The meter for a limit: the same one for as long as somebody has it.

        Called when a policy is compiled, in whatever thread, and never on the request path.
        """
        ...

    def spend(self, charges: Sequence[Charge]) -> Verdict | None | Awaitable[Verdict | None]:
        """Take all of ``charges``, or none of them. A cost of 0 is a peek.

        The answer is a `Verdict`; only a `SharedBackend` may know none.
        """
        ...

    def debit(self, charges: Sequence[Charge]) -> Sequence[int]:
        """Take ``charges`` without asking, and without waiting for anything.

        Buckets go into debt by at most one burst, quotas count all of it. Returns what was taken of each for certain,
        which is what may be given back, as a list that a backend across a network completes when it knows: zeros until
        then, and for ever where it never does. So the list is kept, and read when something is to be given back.
        """
        ...

    def refund(self, charges: Sequence[Charge], spent_at: int) -> None:
        """Give ``charges`` back that were spent at ``spent_at`` (`Verdict.wall`), without waiting for anything.

        Void once their window is over; a bucket's is the time in which it fills.
        """
        ...

    def statistics(self) -> dict[str, dict[str, int]]:
        """Per store: ``keys`` tracked now, ``evicted`` so far, ``overflowed`` charges that shared a bucket."""
        ...

    async def aclose(self) -> None:
        """Release connections. A backend is not used afterwards, but for a `SharedBackend`."""
        ...


class Observer(Protocol):
    """What counts how a shared backend fares. Called on the request path: it neither waits nor raises."""

    def called(self, result: str, took: int) -> None:
        """The store was called: one of `CALL_RESULTS`, after ``took`` nanoseconds."""
        ...

    def fell_back(self, action: Failure) -> None:
        """A request was decided on without the store, which was away."""
        ...


@runtime_checkable
class SharedBackend(Backend, Protocol):
    """A backend whose state is in a store that other processes use as well, and that may be away.

    It answers within its time-out, whatever the store does, and its functions never raise because of the store. It
    outlives event loops: whoever uses it after `aclose`, or on another loop, makes it connect anew.
    """

    observer: Observer | None
    """Who is told of calls and of decisions without the store. Set before the first request, by whoever counts."""

    @property
    def on_failure(self) -> Failure:
        """What holds for requests whose rule says nothing."""
        ...

    @property
    def up(self) -> bool:
        """Whether the store is asked: not while it is known to be away."""
        ...

    def spend(
        self, charges: Sequence[Charge], failure: Failure | None = None
    ) -> Verdict | None | Awaitable[Verdict | None]:
        """Take all of ``charges``, or none of them; while the store is away, what ``failure`` says.

        ``local`` is answered with a `Verdict` about this process's share, ``allow`` and ``deny`` with ``None``: nothing
        was taken, and nobody knows what is left. Without ``failure`` it is ``on_failure``.
        """
        ...

    def open(self) -> None:
        """Begin to connect, on the running loop. Waits for nothing and raises nothing, safe twice.

        Not needed: the first `spend` connects as well, but pays for it.
        """
        ...


class Permit:
    """A wish for one of the slots that a caller has over the whole fleet. ``held`` once it was granted."""

    __slots__ = ("held",)

    held: bool


class Full:
    """What a fleet answers whose caller has no slot left. Nothing was taken then. There is one, `FULL`."""

    __slots__ = ()


FULL = Full()


@runtime_checkable
class FleetBackend(SharedBackend, Protocol):
    """A shared backend that also counts what its callers have in flight in all processes together."""

    def permit(self, store: str, key: Key, limit: int) -> Permit:
        """A wish for one of ``limit`` slots, to hand to `spend_with`. It is released in any case."""
        ...

    def spend_with(
        self, permit: Permit, charges: Sequence[Charge], failure: Failure | None = None
    ) -> Verdict | Full | None | Awaitable[Verdict | Full | None]:
        """Take the slot and all of ``charges``, or none of it; otherwise as `spend`.

        While the store is away ``local`` is this process's share of the slots.
        """
        ...

    def release(self, permit: Permit) -> None:
        """Give the slot back, now or as soon as it is granted. Safe twice."""
        ...

    def in_flight(self) -> dict[str, int]:
        """``callers`` of this process with requests in flight, and ``in_flight`` over all of them."""
        ...


@runtime_checkable
class OperatedBackend(Backend, Protocol):
    """A backend by which an operator can interfere. What it keeps for others, they see within seconds."""

    blocks: Blocks
    """Who is kept out. Asked by each request with a tenant, never waited for."""

    async def forget(self, charges: Sequence[tuple[Meter, Key]]) -> None:
        """Let these callers have spent nothing. Raises `OSError` where a store is away."""
        ...

    async def block(self, tenant: str, block: Block | None) -> None:
        """Keep a tenant out until then, or let it in again. Raises `OSError` where a store is away."""
        ...
