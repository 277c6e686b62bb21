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
_MOST = 4_096
"""Characters of a value that are looked at."""
_SECONDS = re.compile(r"[0-9]+(?:\.[0-9]+)?")
# RFC 9651: a list of items with parameters.
_BARE = (
    r'"(?:[\x20\x21\x23-\x5b\x5d-\x7e]|\\["\\])*"'  # a string
    r"|%\"[\x20\x21\x23-\x7e]*\""  # a display string
    r"|:[A-Za-z0-9+/=]*:"  # bytes
    r"|@?-?[0-9]{1,15}(?:\.[0-9]{1,3})?"  # a number, or a date
    r"|\?[01]"
    r"|[A-Za-z*][A-Za-z0-9!#$%&'*+.^_`|~:/-]*"  # a token
)
_KEY = r"[a-z*][a-z0-9_.*-]*"
_PARAMETER = re.compile(rf";\x20*({_KEY})(?:=({_BARE}))?")
_ITEM = re.compile(rf"[ \t]*(?:{_BARE})((?:;\x20*{_KEY}(?:=(?:{_BARE}))?)*)[ \t]*(,|\Z)")


def retry_after(value: str, now: float) -> float | None:
    """The seconds that a ``Retry-After`` asks for: of a number, or of a date after ``now`` (seconds since the epoch).

    Of a date that has passed 0; of what is neither ``None``. RFC 9110, section 10.2.3; a fraction is not in it, and
    meant by those who send one. Of several numbers, which is what two proxies make of two headers, the largest.

    >>> retry_after("120", 0.0)
    120.0
    """
    value = value.strip()
    if len(value) > _MOST:
        return None
    numbers = [part.strip() for part in value.split(",")]
    if all(_SECONDS.fullmatch(number) for number in numbers):
        return min(max(map(float, numbers)), LONGEST)
    try:
        date = parsedate_to_datetime(value)
        at = (date if date.tzinfo is not None else date.replace(tzinfo=UTC)).timestamp()
    except Exception:  # the parser of mails finds many ways to fail, and not all of them are documented
        return None
    return min(max(0.0, at - now), LONGEST)


def rate_limit(value: str) -> float | None:
    """The seconds after which a ``RateLimit`` that has nothing left grows again: the longest ``t`` of its items with
    ``r=0`` (draft-ietf-httpapi-ratelimit-headers-11). ``None`` where there is none, or where it is not a list of
    structured fields (RFC 9651 ignores such a field as a whole).

    >>> rate_limit('"burst";r=0;t=5, "daily";r=100;t=3600')
    5.0
    """
    longest: float | None = None
    at, more = 0, len(value) <= _MOST
    while more:
        item = _ITEM.match(value, at)
        if item is None:
            return None
        at, more = item.end(), item[2] == ","
        said = dict(_PARAMETER.findall(item[1]))
        left, wait = said.get("r", ""), said.get("t", "")
        if left.isdigit() and int(left) == 0 and wait.isdigit():
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
