"""The vocabulary every other module speaks: what was decided, how a request ended, what a clock is.

Nothing here has behaviour, reads a clock or knows HTTP, so everything may import it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import TypeAlias, final

Clock: TypeAlias = Callable[[], int]
"""Nanoseconds, as an integer. Monotonic for buckets, since the Unix epoch for calendar windows."""

NEVER = -1
"""A wait that does not end: the cost is larger than the limit can ever hold."""


class Mode(IntEnum):
    """How strictly a limit is applied. The effective mode is the lowest of file, plan, tenant and route."""

    OFF = 0
    SHADOW = 1
    ENFORCE = 2


class Outcome(Enum):
    """How an admitted request ended, as the limit laws need to know it.

    Three endings, because a boolean would teach a law that a caller's 404 is a failing service.
    """

    SUCCESS = "success"
    IGNORED = "ignored"
    DROPPED = "dropped"


@final
@dataclass(frozen=True, slots=True)
class Decision:
    """What one policy says to one caller.

    ``remaining`` is what the caller may still spend now, ``retry_after`` the seconds until one more unit may be
    spent (0.0 while something remains, ``math.inf`` where it can never fit), ``window`` the seconds over which
    ``limit`` is replenished.
    """

    admitted: bool
    rule: str
    limit: int
    remaining: int
    retry_after: float
    window: float


@final
@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request is answered by Seawall and not by the application.

    ``status`` is the HTTP status, ``reason`` the value of the metric label, ``policies`` the names of all policies
    that refused (the one with the longest wait first), ``retry_after`` whole seconds with their jitter, or ``None``
    where waiting does not help.
    """

    status: int
    reason: str
    policies: tuple[str, ...] = ()
    retry_after: int | None = None
    detail: str = ""
    plan: str = ""
    priority: str = ""
