"""Clients that do not make the bad day of a service worse, for httpx2 and httpx.

>>> import httpx2
>>> client = httpx2.AsyncClient(transport=ResilientTransport())

or, for the library that is installed, `AsyncClient` and `Client` with its arguments and those of the transport. Each
part can be used alone: `RetryPolicy`, `RetryBudget`, `AdaptiveThrottle` and `CircuitBreaker` do no I/O and take time
and chance as arguments.
"""

from __future__ import annotations

from typing import Any

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
from seawall.client.transport import ResilientTransport, SyncResilientTransport, _module

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

_OURS = ("retry", "budget", "throttle", "breaker", "concurrency", "hedge", "propagate", "route")


class AsyncClient(_module.AsyncClient):  # type: ignore[misc]
    """The library's ``AsyncClient`` with a `ResilientTransport`: its own arguments, and those of the transport.

    ``deadline`` is the transport's ``timeout``, the seconds for a call with all its attempts: ``timeout`` is what the
    library calls so.
    """

    _transport: Any
    _mounts: dict[Any, Any]

    def __init__(self, *args: Any, deadline: float | None = None, **options: Any) -> None:
        ours = {name: options.pop(name) for name in _OURS if name in options}
        super().__init__(*args, **options)
        transport = ResilientTransport(self._transport, timeout=deadline, **ours)
        self._transport = transport
        self._mounts = {
            pattern: None if mounted is None else transport.around(mounted) for pattern, mounted in self._mounts.items()
        }

    def statistics(self) -> dict[str, dict[str, Any]]:
        """`ResilientTransport.statistics`."""
        found: dict[str, dict[str, Any]] = self._transport.statistics()
        return found


class Client(_module.Client):  # type: ignore[misc]
    """`AsyncClient` for code that blocks."""

    _transport: Any
    _mounts: dict[Any, Any]

    def __init__(self, *args: Any, deadline: float | None = None, **options: Any) -> None:
        ours = {name: options.pop(name) for name in _OURS if name in options}
        super().__init__(*args, **options)
        transport = SyncResilientTransport(self._transport, timeout=deadline, **ours)
        self._transport = transport
        self._mounts = {
            pattern: None if mounted is None else transport.around(mounted) for pattern, mounted in self._mounts.items()
        }

    def statistics(self) -> dict[str, dict[str, Any]]:
        """`ResilientTransport.statistics`."""
        found: dict[str, dict[str, Any]] = self._transport.statistics()
        return found
