"""How much each caller has in flight, over the whole fleet: slots, which are taken and given back.

Every process has its own count in Redis, with an expiry that it puts off while it lives, so that the slots of one that
was killed are free again after `LIFE`. A slot is taken in the same call as the charges of its request. It is given back
with whatever else is sent in that turn of the loop, or kept for a moment where the limit has slots to spare: at most
limit // 4N in each of N processes.

Taking and giving back are steps, so that calls under way do not undo each other; with each comes how much this process
is sure to have, below which its count never is, and from time to time the count itself. So what is lost with a server
or a reply is put right by the next call.
"""

from __future__ import annotations

from collections import deque
from struct import Struct
from typing import final

from seawall.backends import Key, Permit
from seawall.backends.redis.keys import Names
from seawall.rate import SECOND

LIFE = 6 * SECOND
"""Nanoseconds after which a process that gave no sign of life is gone."""
AGAIN = 2 * SECOND
"""Nanoseconds after which the server is told again of what is held."""
MOST_LOOKED_AT = 64
"""Callers that are looked at together, 20 times a second; more where it would take longer than 2 s to see them all."""
_RECORD = Struct("<B6d")
_NO_LIMIT = 1 << 50


def record(holder: int, floor: int, step: int, limit: int | None, *, exact: bool = False) -> bytes:
    """``holder`` takes ``step`` slots (or gives back, if negative); without those it takes it has at least ``floor``,
    or ``exact`` so many."""
    most = _NO_LIMIT if limit is None else limit
    return _RECORD.pack(2, holder, floor, step, most, exact, LIFE // 1_000)


@final
class Holding:
    """What this process has of one caller's slots: ``running``, ``spare``, and ``asked`` that may be granted yet.

    ``returned`` are those that the server has not been told of, ``telling`` is how many calls are about to tell it
    something, ``sent`` when it was told what there is.
    """

    __slots__ = ("asked", "key", "limit", "returned", "running", "sent", "spare", "telling", "unused", "whose")

    def __init__(self, whose: tuple[str, Key], key: bytes, limit: int, now: int) -> None:
        self.whose = whose
        self.key = key
        self.limit = limit
        self.sent = now
        self.running = 0
        self.spare = 0
        self.asked = 0
        self.returned = 0
        self.telling = 0
        self.unused = False

    def __repr__(self) -> str:
        return f"<Holding {self.running} running and {self.spare} spare of {self.limit}>"

    @property
    def empty(self) -> bool:
        return not (self.held or self.asked or self.returned)

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

    def asked(self) -> None:
        """It is asked for, until it is `answered`."""
        self.waiting = True
        self.holding.asked += 1

    def answered(self) -> None:
        """There is an answer, or there will be none."""
        self.waiting = False
        self.holding.asked -= 1


@final
class Slots:
    """The slots that this process has, by store and caller. Those that have none are forgotten in their turn."""

    def __init__(self, names: Names) -> None:
        self._names = names
        self._suffix: dict[str, bytes] = {}
        self.holdings: dict[tuple[str, Key], Holding] = {}
        self.round: deque[Holding] = deque()

    def add(self, store: str, key: Key, limit: int, now: int) -> Holding:
        """Begin to hold slots of a caller."""
        suffix = self._suffix.get(store)
        if suffix is None:
            suffix = self._suffix[store] = self._names.limit("concurrency", store)
        whose = (store, key)
        new = self.holdings[whose] = Holding(whose, self._names.tags(store)[key] + suffix, limit, now)
        self.round.append(new)
        return new

    def due(self, now: int) -> list[Holding]:
        """Of those that were not looked at for longest, who has to be spoken of at ``now``: every `AGAIN` each."""
        found = []
        for _ in range(min(len(self.round), max(MOST_LOOKED_AT, len(self.round) // 40))):
            one = self.round.popleft()
            if one.empty:
                del self.holdings[one.whose]
                continue
            self.round.append(one)
            if now - one.sent >= AGAIN:
                one.sent = now
                found.append(one)
        return found

    def statistics(self) -> dict[str, int]:
        running = [one.running for one in self.holdings.values() if one.running]
        return {"callers": len(running), "in_flight": sum(running)}
