"""What `seawall.client` raises: what happened, and at the same time an error of the library that is in use.

``except CircuitOpen`` catches ours whichever library it is; ``except httpx.TransportError`` catches them with all other
failures of a call, so that code which handles those needs no change.
"""

from __future__ import annotations

from typing import Any


class ClientError(Exception):
    """What all of them are. ``attempts`` are those that were made, as in the ``extensions`` of an answer."""

    attempts: tuple[Any, ...] = ()


class NotSent(ClientError):
    """Refused here: nothing was sent. ``retry_after`` is seconds until it is worth trying again, as far as is known."""

    retry_after: float = 0.0


class CircuitOpen(NotSent):
    """Too many calls to this host have failed lately."""


class Throttled(NotSent):
    """This host accepts so little of what it is sent that this request would have been refused, probably."""


class TooManyInFlight(NotSent):
    """As many requests to this host are in flight as may be at once."""


class RetryBudgetExhausted(ClientError):
    """It has failed, and there have been so many retries that it is not tried again. Its cause is the failure."""


class DeadlineExceeded(ClientError):
    """There is no time left to call, or the answer has not come in time."""


_made: dict[tuple[type, type], Any] = {}


def also(kind: type[ClientError], base: type[Exception]) -> Any:
    """The class of errors that are both."""
    if issubclass(base, kind):
        return base
    made = _made.get((kind, base))
    if made is None:
        made = _made[kind, base] = type(kind.__name__, (kind, base), {"__module__": kind.__module__})
    return made
