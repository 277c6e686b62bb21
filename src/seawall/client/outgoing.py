"""A request as it is sent: with what the other side should know, and no longer than there is time for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

Request: TypeAlias = Any
Response: TypeAlias = Any

TRAVEL = 0.01
"""Seconds of the time left that are kept for the way there."""
_ATTEMPT = "x-retry-attempt"
_TIMEOUT = "x-request-timeout-ms"
_PRIORITY = "x-request-priority"
_TIMEOUT_SAID, _PRIORITY_SAID = _TIMEOUT.encode(), _PRIORITY.encode()


def outgoing(
    request: Request, *, connect: float | None, left: float | None, attempt: int, priority: str | None, tell: bool
) -> Request:
    """``request``, or a copy of it where something has to be added.

    ``connect`` is the most seconds for a connection and for one out of the pool, ``left`` those until there has to be
    an answer, ``attempt`` how many there were before. With ``tell`` the time left and the ``priority`` go along; what
    the caller says itself stays, but for a longer time than there is.
    """
    timeouts = _timeouts(request.extensions.get("timeout") or {}, connect, left)
    told: dict[str, str] = {}
    if attempt:
        told[_ATTEMPT] = str(attempt)
    if tell and (left is not None or priority is not None):
        said = {name.lower(): value for name, value in request.headers.raw}
        if left is not None:
            milliseconds = max(1, int((left - TRAVEL) * 1_000))
            if not _is_shorter(said.get(_TIMEOUT_SAID, b""), milliseconds):
                told[_TIMEOUT] = str(milliseconds)
        if priority is not None and _PRIORITY_SAID not in said:
            told[_PRIORITY] = priority
    if timeouts is None and not told:
        return request
    # A request of the library's own making would read, encode and sort everything once more: 20 us.
    copy = object.__new__(type(request))
    copy.__dict__.update(request.__dict__)
    if timeouts is not None:
        copy.extensions = {**request.extensions, "timeout": timeouts}
    if told:
        headers = copy.headers = type(request.headers)(request.headers)
        for name, value in told.items():
            headers[name] = value
    return copy


def _timeouts(
    given: Mapping[str, float | None], connect: float | None, left: float | None
) -> dict[str, float | None] | None:
    """The time-outs of the library, none of them longer than there is time for; ``None`` where they are so already."""
    at_once = connect if left is None else left if connect is None else min(connect, left)
    wanted: dict[str, float | None] | None = None
    for name, most in (("connect", at_once), ("pool", at_once), ("read", left), ("write", left)):
        if most is None:
            continue
        seconds = given.get(name)
        if seconds is None or seconds > most:
            if wanted is None:
                wanted = {**given}
            wanted[name] = most
    return wanted


def _is_shorter(said: bytes, milliseconds: int) -> bool:
    return said.isdigit() and len(said) < 16 and int(said) <= milliseconds
