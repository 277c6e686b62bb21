"""What `seawall.client` raises: what happened, and at the same time an error of the library that is in use.

``except CircuitOpen`` catches ours whichever library it is; ``except httpx.TransportError`` catches them with all other
failures of a call, so that code which handles those needs no change.
"""

from __future__ import annotations

from typing import Any, ClassVar


class ClientError(Exception):
    """What all of them are. ``attempts`` are those that were made, as in the ``extensions`` of an answer."""

    attempts: tuple[Any, ...] = ()
    reason: ClassVar[str] = ""
    """What it is called in metrics, and in the extension ``retries_ended``."""


class NotSent(ClientError):
    """Refused here: nothing was sent. ``retry_after`` is seconds until it is worth trying again, as far as is known."""

    retry_after: float = 0.0


class CircuitOpen(NotSent):
    """Too many calls to this host have failed lately."""

    reason = "circuit_open"


class Throttled(NotSent):
    """This host accepts so little of what it is sent that this request would have been refused, probably."""

    reason = "throttled"


class TooManyInFlight(NotSent):
    """As many requests to this host are in flight as may be at once."""

    reason = "too_many_in_flight"


class RetryBudgetExhausted(ClientError):
    """It has failed, and there have been so many retries that it is not tried again. Its cause is the failure."""

    reason = "budget"

    def __str__(self) -> str:
        return f"{super().__str__()} (not tried again: the retry budget is exhausted)"


class DeadlineExceeded(ClientError):
    """There is no time left to call, or the answer has not come in time."""

    reason = "deadline_exceeded"


_made: dict[tuple[type, type], Any] = {}


def also(kind: type[ClientError], base: type[Exception]) -> Any:
    """The class of errors that are both: ``base`` itself where that is of ``kind``, as errors of a client within the
    transport of another one are."""
    if issubclass(base, kind):
        return base
    made = _made.get((kind, base))
    if made is None:

        def reduced(error: Exception) -> tuple[Any, ...]:
            return _again, (kind, base, error.args, error.__dict__)

        parts = {"__module__": kind.__module__, "__doc__": kind.__doc__, "__reduce__": reduced}
        made = _made[kind, base] = type(kind.__name__, (kind, base), parts)
    return made


def also_of(kind: type[ClientError], error: Exception) -> Any:
    """``error`` as an error that is also of ``kind``: its own class is still caught, and its attributes are there."""
    return _again(kind, type(error), error.args, error.__dict__)


def _again(kind: type[ClientError], base: type[Exception], args: tuple[Any, ...], state: dict[str, Any]) -> Any:
    # Not through `__init__`: that of a transport's own errors may take anything.
    made = also(kind, base)
    error = made.__new__(made, *args)
    error.args = args
    error.__dict__.update(state)
    return error
