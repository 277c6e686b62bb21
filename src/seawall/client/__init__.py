"""Clients that do not make the bad day of a service worse, for httpx2 and httpx.

>>> import httpx2
>>> client = httpx2.AsyncClient(transport=ResilientTransport())

or, for the library that is installed, `AsyncClient` and `Client` with its arguments and those of the transport. Each
part can be used alone: `RetryPolicy`, `RetryBudget`, `AdaptiveThrottle` and `CircuitBreaker` do no I/O and take time
and chance as arguments.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from seawall.client.breaker import CircuitBreaker, State
from seawall.client.budget import RetryBudget
from seawall.client.core import Attempt
from seawall.client.errors import (
    CircuitOpen,
    ClientError,
    DeadlineExceeded,
    NotSent,
    RetryBudgetExhausted,
    Throttled,
    TooManyInFlight,
)
from seawall.client.retry import Failure, RetryPolicy
from seawall.client.throttle import AdaptiveThrottle
from seawall.client.transport import DEFAULT, ResilientTransport, SyncResilientTransport

if TYPE_CHECKING:
    import httpx2 as library
else:
    library = DEFAULT.module

__all__ = [
    "AdaptiveThrottle",
    "AsyncClient",
    "Attempt",
    "CircuitBreaker",
    "CircuitOpen",
    "Client",
    "ClientError",
    "DeadlineExceeded",
    "Failure",
    "NotSent",
    "ResilientTransport",
    "RetryBudget",
    "RetryBudgetExhausted",
    "RetryPolicy",
    "State",
    "SyncResilientTransport",
    "Throttled",
    "TooManyInFlight",
]

_OURS = ("retry", "budget", "throttle", "breaker", "concurrency", "hedge", "connect", "propagate", "route")


class AsyncClient(library.AsyncClient):
    """The library's ``AsyncClient`` with a `ResilientTransport`: its own arguments, and those of the transport.

    ``deadline`` is the transport's ``timeout``, the seconds for a call with all its attempts: ``timeout`` is what the
    library calls so.
    """

    def __init__(self, *args: Any, deadline: float | None = None, **options: Any) -> None:
        ours = {name: options.pop(name) for name in _OURS if name in options}
        super().__init__(*args, **options)
        self._resilient = ResilientTransport(self._transport, timeout=deadline, **ours)
        self._transport, self._mounts = _wrapped(self._resilient, self._mounts)

    def statistics(self) -> dict[str, dict[str, Any]]:
        """`ResilientTransport.statistics`."""
        return self._resilient.statistics()


class Client(library.Client):
    """`AsyncClient` for code that blocks."""

    def __init__(self, *args: Any, deadline: float | None = None, **options: Any) -> None:
        ours = {name: options.pop(name) for name in _OURS if name in options}
        super().__init__(*args, **options)
        self._resilient = SyncResilientTransport(self._transport, timeout=deadline, **ours)
        self._transport, self._mounts = _wrapped(self._resilient, self._mounts)

    def statistics(self) -> dict[str, dict[str, Any]]:
        """`ResilientTransport.statistics`."""
        return self._resilient.statistics()


def _wrapped(resilient: Any, mounts: dict[Any, Any]) -> tuple[Any, dict[Any, Any]]:
    """The transport of a client and those of its ``mounts``, which know the same of all hosts."""
    around = resilient.around
    return resilient, {pattern: None if mount is None else around(mount) for pattern, mount in mounts.items()}
