"""Which failures are worth another attempt, and when.

The rules are those of the standard mode of AWS SDKs (revised in 2026): three attempts, full jitter between 0 and
``min(cap, base * 2**n)``, 50 ms for what is transient and 1 s for what says that it is too much. A server's own word is
a floor, and the jitter comes on top: of those whom it has told the same, no two come back at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import final

IDEMPOTENT = frozenset({"GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE", "QUERY"})
"""RFC 9110, section 9.2.2; QUERY is safe by its own (draft-ietf-httpbis-safe-method-w-body)."""


class Failure(Enum):
    """What went wrong, as far as it matters for another attempt."""

    NONE = "none"
    """Nothing, or nothing that another attempt would change."""
    UNSENT = "unsent"
    """There was no connection, so nobody has seen the request."""
    TRANSIENT = "transient"
    """A broken connection, no answer in time, or a 500, 502, 503 or 504."""
    THROTTLED = "throttled"
    """The server says that it is too much: 429, or a 503 that says when to come back."""


def failure_of(status: int, headers: Mapping[str, str]) -> Failure:
    """What an answer is."""
    if status < 429:
        return Failure.NONE
    if status == 429:
        return Failure.THROTTLED
    if status == 503:
        return Failure.THROTTLED if "retry-after" in headers else Failure.TRANSIENT
    return Failure.TRANSIENT if status in (500, 502, 504) else Failure.NONE


@final
@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often to try, and how long to wait in between. Times are in seconds.

    ``attempts`` is the number of attempts with the first one, 3 by default; 1 is none after it. ``base`` is the first
    ceiling of the jitter for what is transient (.05), ``throttled_base`` for what is too much (1), ``cap`` the last one
    (20). ``longest`` is the longest that anybody waits for a server's hint (30): if it asks for more, its answer is the
    answer. Raises `ValueError` for what makes no sense.

    >>> RetryPolicy().ceiling(Failure.TRANSIENT, 2)
    0.1
    """

    attempts: int = 3
    base: float = 0.05
    throttled_base: float = 1.0
    cap: float = 20.0
    longest: float = 30.0

    def __post_init__(self) -> None:
        if not 1 <= self.attempts <= 10:
            raise ValueError(f"attempts is 1 to 10, not {self.attempts}")
        for name in ("base", "throttled_base", "cap", "longest"):
            value = getattr(self, name)
            if not 0 <= value <= 3_600:
                raise ValueError(f"{name} is 0 to 3600 seconds, not {value}")

    def may_retry(self, method: str, *, idempotent: bool, replayable: bool, failure: Failure) -> bool:
        """Whether one more attempt is right at all.

        ``idempotent`` is whether the request says so itself, by an Idempotency-Key; ``replayable`` whether its body can
        be sent again.
        """
        if failure is Failure.NONE or not replayable:
            return False
        return failure is Failure.UNSENT or idempotent or method.upper() in IDEMPOTENT

    def ceiling(self, failure: Failure, attempt: int) -> float:
        """The longest wait after ``attempt`` (from 1) has failed, without a hint."""
        base = self.throttled_base if failure is Failure.THROTTLED else self.base
        return min(self.cap, base * float(2 ** (attempt - 1)))

    def wait(
        self, failure: Failure, attempt: int, hint: float | None, left: float | None, random: Callable[[], float]
    ) -> float | None:
        """Seconds to wait after ``attempt`` has failed; ``None`` where the answer is better given now.

        ``hint`` is what the server asks for, ``left`` the time in which the next attempt has to begin.
        """
        wait = self.ceiling(failure, attempt) * random()
        if hint is not None:
            if hint > self.longest:
                return None
            wait += hint
        return None if left is not None and wait >= left else wait
