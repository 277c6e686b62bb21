"""How much each caller has in flight, over the whole fleet: slots, which are taken and given back.

Every process has its own count in Redis, with an expiry that it puts off while it lives, so that the slots of one that
was killed are free again after `LIFE`. A slot is taken in the same call as the charges of its request. Given back it is
by what is sent next, or it is kept for a moment where the limit has slots to spare: at most limit // 4N in each of N
processes.

Taking and giving back are steps, so that calls under way do not undo each other; with each comes how much this process
is sure to have, below which its count never is, and from time to time the count itself. So what is lost with a server
or a reply is put right by the next call.
"""

from __future__ import annotations

from struct import Struct
from typing import final

from seawall.backends import Key, Permit
from seawall.backends.redis.keys import Names
from seawall.rate import SECOND

LIFE = 6 * SECOND
"""Nanoseconds after which a process that gave no sign of life is gone."""
_RECORD = Struct("<B6d")
_NO_LIMIT = 1 << 50


def record(holder: int, floor: int, step: int, limit: int | None, *, exact: bool = False) -> bytes:
    """``holder`` takes ``step`` slots (or gives back, if negative); without those it takes it has at least ``floor``,
    or ``exact`` so many."""
    most = _NO_LIMIT if limit is None else limit
    return _RECORD.pack(2, holder, floor, step, most, exact, LIFE // 1_000)


@final
class Holding:
    """What this process has of one caller's slots: ``running``, ``spare``, and ``asked`` that may be granted yet."""

    __slots__ = ("asked", "key", "limit", "returned", "running", "spare", "unused")

    def __init__(self, key: bytes, limit: int) -> None:
        self.key = key
        self.limit = limit
        self.running = 0
        self.spare = 0
        self.asked = 0
        self.returned = 0
        self.unused = False

    def __repr__(self) -> str:
        return f"<Holding {self.running} running and {self.spare} spare of {self.limit}>"

    @property
    def held(self) -> int:
        """What this process is sure to have."""
        return self.running + self.spare


@final
class SlotPermit(Permit):
    """A wish for a slot of ``holding``. ``waiting`` while it is asked for, ``given_up`` if nobody wants it any more."""

    __slots__ = ("given_up", "holding", "waiting")

    def __init__(self, holding: Holding) -> None:
        self.holding = holding
        self.held = False
        self.waiting = False
        self.given_up = False


@final
class Slots:
    """The slots that this process has, by store and caller; those that have none are forgotten."""

    def __init__(self, names: Names) -> None:
        self._names = names
        self._suffix: dict[str, bytes] = {}
        self.holdings: dict[tuple[str, Key], Holding] = {}

    def holding(self, store: str, key: Key, limit: int) -> Holding:
        known = self.holdings.get((store, key))
        if known is None:
            suffix = self._suffix.get(store)
            if suffix is None:
                suffix = self._suffix[store] = self._names.limit("concurrency", store)
            known = self.holdings[store, key] = Holding(self._names.tags(store)[key] + suffix, limit)
        known.limit = limit
        return known

    def forget(self) -> None:
        """Drop what nothing is held of. Called now and then."""
        empty = [at for at, one in self.holdings.items() if not (one.held or one.asked or one.returned)]
        for at in empty:
            del self.holdings[at]

    def statistics(self) -> dict[str, int]:
        running = [one.running for one in self.holdings.values() if one.running]
        return {"callers": len(running), "in_flight": sum(running)}
