"""The request that a call is made for, where it is made while serving one behind Seawall."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from seawall.endpoint import time_left
from seawall.exchange import current_exchange


@final
@dataclass(frozen=True, slots=True)
class Surroundings:
    """``left`` is seconds until its deadline, ``priority`` its class, ``retried`` whether it is itself a retry: then
    what it calls is not tried again, or three layers would make twenty-seven attempts."""

    left: float | None = None
    priority: str | None = None
    retried: bool = False


NONE = Surroundings()


def surroundings() -> Surroundings:
    """Those of the running context."""
    exchange = current_exchange.get()
    if exchange is None or exchange.scope is None:
        return NONE
    retried = any(
        name == b"x-retry-attempt" and value.strip() not in (b"", b"0") for name, value in exchange.scope["headers"]
    )
    visit = exchange.inside[-1] if exchange.inside else exchange
    return Surroundings(time_left(), visit.terms.priority, retried)
