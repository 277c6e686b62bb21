"""What an answer says about when to come back.

Whoever answers may say anything, so nothing here raises, and what makes no sense says nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC
from email.utils import parsedate_to_datetime

LONGEST = 366 * 86_400.0
"""Seconds. Who says more says never."""
_SECONDS = re.compile(r"[0-9]{1,18}")
_ITEM = re.compile(
    r'\s*(?:"(?:[^"\\]|\\.){0,256}"|[A-Za-z*][A-Za-z0-9_.*/:-]{0,255})((?:\s*;\s*[a-z*][a-z0-9_.*-]*=[^,;"]{1,32})*)'
)


def retry_after(value: str, now: float) -> float | None:
    """The seconds that a ``Retry-After`` asks for: of a number, or of a date after ``now`` (seconds since the epoch).

    Of a date that has passed 0; of what is neither ``None``. RFC 9110, section 10.2.3.

    >>> retry_after("120", 0.0)
    120.0
    """
    value = value.strip()
    if _SECONDS.fullmatch(value):
        return min(float(value), LONGEST)
    try:
        date = parsedate_to_datetime(value)
        at = (date if date.tzinfo is not None else date.replace(tzinfo=UTC)).timestamp()
    except (ValueError, TypeError, OverflowError, IndexError):
        return None
    return min(max(0.0, at - now), LONGEST)


def rate_limit(value: str) -> float | None:
    """The seconds after which a ``RateLimit`` that has nothing left grows again: the longest ``t`` of its items with
    ``r=0`` (draft-ietf-httpapi-ratelimit-headers-11). ``None`` where there is none.

    >>> rate_limit('"burst";r=0;t=5, "daily";r=100;t=3600')
    5.0
    """
    longest = None
    if len(value) > 4_096:
        return None
    for item in value.split(","):
        found = _ITEM.fullmatch(item)
        if found is None:
            continue
        parameters = dict(pair.strip().split("=", 1) for pair in found[1].split(";") if "=" in pair)
        left, wait = parameters.get("r", "").strip(), parameters.get("t", "").strip()
        if left == "0" and _SECONDS.fullmatch(wait):
            longest = max(longest or 0.0, min(float(wait), LONGEST))
    return longest


def hint(headers: Mapping[str, str], now: float) -> float | None:
    """What an answer asks to wait, in seconds: its ``Retry-After``, else its ``RateLimit``."""
    after = headers.get("retry-after")
    if after is not None:
        told = retry_after(after, now)
        if told is not None:
            return told
    limits = headers.get("ratelimit")
    return None if limits is None else rate_limit(limits)
