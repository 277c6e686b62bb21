"""When to come back: seconds that grow while a class is shed and shrink when it is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import final

MOST = 32


@final
class RetryAfter:
    """``Retry-After`` of one class, by additive increase and multiplicative decrease from 1 to 32 seconds.

    Once a second: at least three refusals for each second that is announced: one more; fewer than one for each: half.
    After Kubernetes' API priority and fairness (``droppedRequestsTracker``), whose reason holds here: what is
    announced has to grow with how many are told it, or all that were refused make the next overload when they return.
    """

    __slots__ = ("refused", "seconds")

    def __init__(self) -> None:
        self.seconds = 1
        self.refused = 0

    def clear(self) -> None:
        """Begin anew."""
        self.seconds, self.refused = 1, 0

    def tick(self) -> None:
        refused, self.refused = self.refused, 0
        if refused >= 3 * self.seconds:
            self.seconds = min(self.seconds + 1, MOST)
        elif refused < self.seconds:
            self.seconds = max(self.seconds // 2, 1)

    def draw(self, random: Callable[[], float]) -> int:
        """The seconds to announce, from ``seconds`` to a fifth more (rounded up), so that nobody returns in step.

        ``random`` is from 0 to 1.
        """
        return self.seconds + int(random() * max(2.0, 1 + self.seconds / 5))
