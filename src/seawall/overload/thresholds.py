"""Who is refused before anything is done for it: the least important, by just as much as is too much.

A queue that is full refuses too, but late: after a call to the backend, and one request at a time. So while there is
overload, as many as the queue could not serve anyway are refused at the door (DAGOR, SoCC '18, and Breakwater, OSDI
'20, on why the door is the place). Once a window, with ``cap`` the requests a second that can be admitted:

* overloaded: ``cap = .8 cap + .2 admitted`` (the first time: the most there was lately); else ``cap = 1.1 cap``,
  unconditionally: a shedder that relaxes only when it sees less load can keep itself overloaded for ever;
* ``cap <= 2 max(arrivals, admitted)``, or it would take seconds to bite after a calm minute;
* ``1.05 cap`` is handed out, a twentieth more than fits, for the queue to choose from: to the classes in their order,
  all that they asked for in the window (the first of several may have a tenth more than that, or others would take what
  it leaves free for a moment). In the first class for which it is too much every owner gets what it asks for, but at
  most ``r``, the largest that fits (max-min fairness); the classes after it get nothing.

What owners ask for is their arrivals, of which four fifths are carried into each next window, so that a light owner is
not judged by the one request that it happens to send in a tenth of a second.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log
from typing import final

from seawall.overload.queue import Owner

MOST_OWNERS = 1_024
"""Owners of one class that are told apart; of further ones each is taken for one that asks once."""
KEPT = 0.8
SLACK = 1.05
FIRST_SLACK = 1.1
"""And so much more for the first of several classes: what it leaves free for a moment is taken by others."""
_GOLDEN = 0.6180339887498949
_CARRIED = log(1 / KEPT) / (1 - KEPT)
"""What an owner asks for runs from `KEPT` of its sum to all of it within a window: so much less on average."""


@final
class Thresholds:
    """The class that is cut, and how far.

    ``klass`` is the first class that does not get all it asks for, ``None`` while all is open; ``ration`` what each of
    its owners gets of it.
    """

    __slots__ = ("_asked", "_came", "_draw", "_others", "cap", "klass", "ration")

    def __init__(self, classes: int) -> None:
        self._asked: list[dict[Owner, float]] = [{} for _ in range(classes)]
        self._others = [0.0] * classes
        self._came = [0] * classes
        self._draw = 0.0
        self.cap: float | None = None
        self.klass: int | None = None
        self.ration = 0.0

    def __repr__(self) -> str:
        return "<Thresholds open>" if self.klass is None else f"<Thresholds class {self.klass} up to {self.ration:.1f}>"

    def ask(self, klass: int, owner: Owner) -> bool:
        """Note that a request has come; whether it may go on to the queue."""
        self._came[klass] += 1
        asked = self._asked[klass]
        before = asked.get(owner)
        if before is not None:
            asked[owner] = before + 1
        elif len(asked) < MOST_OWNERS:
            asked[owner] = 1.0
        else:
            self._others[klass] += 1
        cut = self.klass
        if cut is None or klass < cut:
            return True
        if klass > cut:
            return False
        share = self.ration / max(before or 1.0, 1.0)
        if share >= 1:
            return True
        # Steps of the golden ratio instead of chance: as even as can be, and the same every time.
        self._draw = draw = (self._draw + _GOLDEN) % 1.0
        return draw < share

    def tick(self, seconds: float, *, admitted: float, best: float, overloaded: bool) -> None:
        """Work out the thresholds for the next window, after one of ``seconds``.

        ``admitted`` is requests a second in it, ``best`` the most there was lately.
        """
        cap = self.cap
        if overloaded:
            cap = max(admitted, best) if cap is None else KEPT * cap + (1 - KEPT) * admitted
        elif cap is not None:
            cap *= 1.1
        if cap is not None:
            self.cap = max(min(cap, 2.0 * max(sum(self._came) / seconds, admitted)), 1.0)
            self._hand_out(self.cap * SLACK * seconds)
        self._came = [0] * len(self._came)
        for klass, asked in enumerate(self._asked):
            self._asked[klass] = {owner: count * KEPT for owner, count in asked.items() if count > 0.1}
            self._others[klass] *= KEPT

    def _hand_out(self, budget: float) -> None:
        """Find the class that is cut. ``budget`` is in requests of this window."""
        self.klass = None
        for klass, came in enumerate(self._came):
            room = budget * FIRST_SLACK if klass == 0 and len(self._came) > 1 else budget
            if came > room:
                asked, others = self._asked[klass], self._others[klass]
                self.klass = klass
                there = (sum(asked.values()) + others) * room / came
                self.ration = max_min(sorted(asked.values()), others, there) / _CARRIED
                return
            budget = max(budget - came, 0.0)

    def open(self) -> None:
        """Refuse nobody, and forget."""
        self.cap = self.klass = None
        for klass in range(len(self._asked)):
            self._asked[klass] = {}
            self._others[klass] = 0.0


def max_min(wanted: Sequence[float], ones: float, budget: float) -> float:
    """The most that each may have of ``budget`` where ``wanted``, the least first, is more than it.

    ``ones`` is how many more there are that want 1 each.
    """
    left = len(wanted) + ones
    for want in wanted:
        if want > 1 and ones:
            if ones * 1.0 <= budget and budget / left >= 1:
                budget -= ones
                left -= ones
                ones = 0
            else:
                return budget / left
        if want * left > budget:
            break
        budget -= want
        left -= 1
    return budget / left if left else 0.0
