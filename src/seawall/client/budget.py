"""How much of the traffic may be retries: what keeps a bad minute of a server from becoming an outage.

Two accounts, and a retry is paid from both. One earns with every request, retried or not, so that of all requests at
most a tenth is sent again, and three more (Finagle's and Envoy's idea); nor can more than three be saved up, or an hour
of calm would pay for a storm. The other is the one of AWS SDKs: 50 tokens, 14 for a retry of what was transient and 5
for one of what was too much, given back when the retry succeeds, and 1 earned by each success without one. AWS begins
with 500, which is a hundred retries for nothing to each host: 1.12 attempts a request in a storm.

A success is any answer that is no failure, a 404 as well, where AWS counts 2xx only: whoever asks what is there would
never earn again.
"""

from __future__ import annotations

from math import inf
from typing import final

from seawall.client.retry import Failure

RATIO = 0.1
FLOOR = 3.0
CAPACITY = 50
COSTS = {Failure.UNSENT: 14, Failure.TRANSIENT: 14, Failure.THROTTLED: 5}
EARNED = 1


@final
class RetryBudget:
    """The two accounts of one host.

    ``ratio`` is the share of requests that may be retried (0 to 1, .1 by default), ``floor`` how many may be before any
    was earned, and can be saved up (3), ``capacity`` the tokens of the other account (50). At no time have there been
    more retries than ``floor + ratio * requests``.
    """

    __slots__ = ("capacity", "earned", "ratio", "saved", "tokens")

    def __init__(self, ratio: float = RATIO, floor: float = FLOOR, capacity: int = CAPACITY) -> None:
        if not 0 <= ratio <= 1 or not floor >= 0 or not 0 <= capacity < inf:
            raise ValueError("ratio is 0 to 1, floor and capacity are at least 0, and capacity is a number")
        self.ratio = ratio
        self.capacity = capacity
        self.earned = floor
        self.saved = max(floor, 1.0)
        self.tokens = capacity

    def __repr__(self) -> str:
        return f"<RetryBudget {self.earned:.1f} retries, {self.tokens}/{self.capacity} tokens>"

    def request(self) -> None:
        """A request is sent for the first time."""
        self.earned = min(self.saved, self.earned + self.ratio)

    def withdraw(self, failure: Failure) -> int | None:
        """Pay for a retry: what it cost, to be given back if it succeeds, or ``None`` if there is not enough."""
        cost = COSTS[failure]
        # Ten additions of a tenth are a little less than one.
        if self.earned < 1 - 1e-9 or self.tokens < cost:
            return None
        self.earned -= 1
        self.tokens -= cost
        return cost

    def succeeded(self, cost: int = 0) -> None:
        """A request has succeeded, after a retry that cost so much."""
        self.tokens = min(self.capacity, self.tokens + (cost or EARNED))

    def undo(self, cost: int) -> None:
        """A retry that was paid for was not sent."""
        self.earned = min(self.saved, self.earned + 1)
        self.tokens = min(self.capacity, self.tokens + cost)
