"""Units taken ahead of use, so that a key that is asked for often costs a call now and then instead of each time.

A lease is debited before any of it is spent, so what is admitted stays what was debited; only when it is admitted may
shift. Of a bucket with burst B in N processes one lease is at most l = max(1, B // 4N) units with the one that is being
spent, hence

    admitted in [a, b]  <=  B + r (b - a) + N (l - 1).

Of a bucket that is empty a lease is of what comes next, at most 0.1 s ahead; its holder spends each unit when it would
have been there, and refuses in between without a call.

How much is taken follows how fast it goes: twice as much where the last lease went within a second, half as much where
it did not. What is left after a second is given back, and so is everything at the end of the process; what a process
that is killed had of a bucket, the bucket regains by itself. A quota does not, so there the server notes who holds how
much and takes it back when the holder has not been heard of for `HELD`: at most l for each that was killed, spent or
not.

Only one call for a lease of a key is under way at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from seawall.backends import Key
from seawall.rate import SECOND

if TYPE_CHECKING:
    from seawall.backends.redis.meters import SharedMeter

IDLE = SECOND
"""Nanoseconds after which what is left of a lease is given back."""
SPENT_BY = 5 * SECOND
"""Nanoseconds for which a quota's lease may be spent, well before `HELD`."""
HELD = 10 * SECOND
"""Nanoseconds for which the server notes who holds how much of a quota."""
MOST_LEASES = 8_192
"""Keys that are watched for becoming hot."""


@final
class Lease:
    """What this process has of one bucket or quota. ``state`` is that with all leases debited, as last heard.

    ``noted``: the server may have noted how much it is, and has to be told when it is spent.

    ``paced``: some of it was not there yet when it was taken, so each unit waits for its time.
    """

    __slots__ = ("asked", "asking", "key", "left", "meter", "noted", "paced", "state", "want")

    def __init__(self, meter: SharedMeter, key: Key, now: int) -> None:
        self.meter = meter
        self.key = key
        self.asked = now
        self.asking = False
        self.left = 0
        self.noted = False
        self.paced = False
        self.state = 0
        self.want = 0

    def __repr__(self) -> str:
        return f"<Lease {self.left} of {self.meter.name}, {self.want} next time>"

    def ask(self, now: int, most: int) -> int:
        """How much to ask for with the call that is made at ``now``; 0 while one is under way."""
        if self.asking:
            return 0
        self.want = min(most, 2 * self.want + 1 if now - self.asked < IDLE else self.want // 2)
        self.asked = now
        self.asking = self.want > 0
        return self.want

    def answer(self, granted: int | None) -> None:
        """How much a call that asked for more has brought: all of it, or 0; ``None`` where it was refused anyway."""
        self.asking = False
        if granted:
            self.left += granted
            self.noted = True
        elif granted == 0:
            self.want //= 4  # so that the next one asks for half
        else:
            self.want = (self.want - 1) // 2  # as if it had not asked
