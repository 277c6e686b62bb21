"""Where requests wait that find no room: by class, between tenants by what they have used, and never for long.

The highest class goes first; within it, the tenant that has used least; within that, the oldest, or the newest while
the queue stands (one that has not been empty for a while holds those whose callers are about to give up, so the newest
are still of use: adaptive LIFO). Nobody waits for long, and while the queue stands far less ("Fail at Scale", ACM Queue
2015, has both).

The queue knows nothing of limits or clocks. It is bounded: who calls asks `worse_than` before it adds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import TypeAlias, final

Owner: TypeAlias = str | bytes

RUNNING, WAITING, GRANTED, DONE = range(4)


class Claim:
    """What a request wants of the limiter, and where it stands.

    ``klass`` is the position of its class (0 is the most important), ``owner`` whose it is, ``group`` the rule that it
    is on, ``deadline`` the instant after which it is of no use (0: none). ``since`` is when it came to wait, then when
    it was let in. ``wake`` is called when its waiting is over, with the reason if it was refused.
    """

    __slots__ = ("deadline", "group", "klass", "owner", "since", "state", "wake")

    klass: int
    owner: Owner
    group: int
    deadline: int
    since: int
    state: int
    wake: Callable[[str], None]


@final
class Usage:
    """What each owner has used lately: the sum of its costs, fading by a tenth every tick.

    Old uses do not shrink, new ones weigh more, so that fading costs nothing per owner. At most `most` are kept, the
    heaviest; whoever is not known has used nothing.
    """

    FADE = 0.9

    def __init__(self, most: int = 1_024) -> None:
        self._most = most
        self._weight = 1.0
        self._used: dict[Owner, float] = {}

    def __len__(self) -> int:
        return len(self._used)

    def add(self, owner: Owner) -> None:
        used = self._used
        used[owner] = used.get(owner, 0.0) + self._weight

    def of(self, owner: Owner) -> float:
        """Comparable between owners at one time, not over time."""
        return self._used.get(owner, 0.0)

    def tick(self) -> None:
        """Let a tenth fade, and forget who has nearly nothing left."""
        self._weight /= self.FADE
        if self._weight > 1e12:
            scale, self._weight = self._weight, 1.0
            self._used = {owner: used / scale for owner, used in self._used.items()}
        if len(self._used) > self._most:
            kept = sorted(self._used.items(), key=lambda item: item[1], reverse=True)[: self._most // 2]
            self._used = dict(kept)

    def clear(self) -> None:
        self._used.clear()
        self._weight = 1.0


@final
class WaitingLine:
    """The claims that wait. Where it is not ``fair``, all of a class are one owner's."""

    __slots__ = ("_classes", "_fair", "_length", "_lengths", "_usage", "since")

    def __init__(self, classes: int, usage: Usage, *, fair: bool = True) -> None:
        self._usage = usage
        self._fair = fair
        self._classes: list[dict[Owner, deque[Claim]]] = [{} for _ in range(classes)]
        self._lengths = [0] * classes
        self._length = 0
        self.since = [0] * classes
        """When each class was last seen without a waiter."""

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Claim]:
        return (claim for owners in self._classes for line in owners.values() for claim in line)

    def __repr__(self) -> str:
        return f"<WaitingLine {'/'.join(map(str, self._lengths))}>"

    def length(self, klass: int) -> int:
        return self._lengths[klass]

    def add(self, claim: Claim, now: int) -> None:
        klass = claim.klass
        if not self._lengths[klass]:
            self.since[klass] = now
        owner = self._owner(claim)
        line = self._classes[klass].get(owner)
        if line is None:
            line = self._classes[klass][owner] = deque()
        line.append(claim)
        self._lengths[klass] += 1
        self._length += 1

    def take(self, klass: int, *, newest: bool) -> Claim:
        """The next of a class that has waiters: of the owner that has used least."""
        owners = self._classes[klass]
        if len(owners) == 1:
            (owner,) = owners
        else:
            used = self._usage.of
            owner = min(owners, key=used)
        line = owners[owner]
        claim = line.pop() if newest else line.popleft()
        self._took(klass, owner, line)
        return claim

    def worst(self) -> Claim:
        """The newest of the heaviest owner of the lowest class that has waiters; it stays."""
        klass = max(klass for klass, length in enumerate(self._lengths) if length)
        owners = self._classes[klass]
        return owners[max(owners, key=self._usage.of)][-1]

    def remove(self, claim: Claim) -> None:
        """Take out one that waits: it was evicted, or has left."""
        owner = self._owner(claim)
        line = self._classes[claim.klass][owner]
        line.remove(claim)
        self._took(claim.klass, owner, line)

    def _owner(self, claim: Claim) -> Owner:
        return claim.owner if self._fair else ""

    def _took(self, klass: int, owner: Owner, line: deque[Claim]) -> None:
        if not line:
            del self._classes[klass][owner]
        self._lengths[klass] -= 1
        self._length -= 1
