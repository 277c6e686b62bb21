"""What people write for rates, quotas and durations, turned into numbers.

A rate is an amount per a span of time, ``10/second`` or ``10 per 15 minutes``: everything the `limits` library reads,
read alike, and also short units (``10/s``), milliseconds, weeks and ``1_000``. A month is 30 days and a year 360, as
`limits` has it; whoever wants calendar months wants a quota.

Two things that `limits` accepts are refused: an amount of 0, which would refuse everybody, and a span of 0
(``5/0minute``), which it silently reads as 1.

Every error says what to write instead. It is a value (`NotationError`) that a configuration file's diagnostics
place at its line and column.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from difflib import get_close_matches
from fractions import Fraction
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, final
from zoneinfo import ZoneInfo, available_timezones

from seawall.rate import MAX_AMOUNT, SECOND, Quota, Rate

if TYPE_CHECKING:
    from limits import RateLimitItem

RateLike: TypeAlias = "str | RateLimitItem | Sequence[str | RateLimitItem]"

MILLISECOND = SECOND // 1000
MINUTE = 60 * SECOND
HOUR = 60 * MINUTE
DAY = 24 * HOUR
MONTH = 30 * DAY
YEAR = 12 * MONTH
MAX_PERIOD = 100 * YEAR
"""The longest span of a rate. Nobody means more, and state far beyond 2**63 has no place in a shared store."""

_SPELLINGS: dict[int, tuple[str, ...]] = {
    MILLISECOND: ("ms", "millisecond", "milliseconds"),
    SECOND: ("s", "sec", "secs", "second", "seconds"),
    MINUTE: ("min", "m", "mins", "minute", "minutes"),
    HOUR: ("h", "hr", "hrs", "hour", "hours"),
    DAY: ("day", "d", "days"),
    7 * DAY: ("week", "w", "weeks"),
    MONTH: ("month", "months"),
    YEAR: ("year", "years"),
}
_UNITS = {spelling: ns for ns, spellings in _SPELLINGS.items() for spelling in spellings}
_SHORTEST = {ns: spellings[0] for ns, spellings in _SPELLINGS.items()}
_WHOLE = dict(zip(_SPELLINGS, ("ms", "second", "minute", "hour", "day", "week", "month", "year"), strict=True))
_WORDS = ("second", "minute", "hour", "day", "week", "month", "year", "ms", "sec", "min")

_COUNT = r"[0-9]+(?:_[0-9]+)*"
_RATE = re.compile(rf"\s*({_COUNT})\s*(?:/|per)\s*({_COUNT})?\s*([a-z]+)\s*", re.IGNORECASE)
_ALMOST_RATE = re.compile(
    rf"\s*([0-9_]*\.?[0-9_]*)\s*(?:/|per\b)\s*({_COUNT})?\s*(\S.*?)?\s*", re.IGNORECASE | re.DOTALL
)
_SEPARATOR = re.compile(":?[,;|]")
"""Between several rates; the optional colon is a slip in the expression of `limits`, kept because it is accepted."""
_DURATION = re.compile(rf"\s*({_COUNT})\s*([a-z]+)\s*", re.IGNORECASE)
_DECIMAL_DURATION = re.compile(r"\s*([0-9]*\.[0-9]+)\s*([a-z]+)\s*", re.IGNORECASE)
_NUMBER = re.compile(r"\s*[0-9_]*\.?[0-9_]+\s*")

A_RATE = "a rate such as 10/second"
A_QUOTA = "a quota such as 10_000/day"
A_DURATION = "a duration such as 250ms or 5s"


@final
class NotationError(ValueError):
    """A rate, quota or duration that cannot be read.

    ``message`` quotes what was written; ``expected`` says what belongs there without quoting anything, for a value
    that may be a secret because it came from an environment variable.
    """

    def __init__(self, message: str, expected: str, code: Literal["E020", "E021"] = "E020") -> None:
        super().__init__(message)
        self.message = message
        self.expected = expected
        self.code = code


def parse_rates(value: RateLike, burst: int | None = None) -> tuple[Rate, ...]:
    """The rates that ``value`` means, in its order; none for ``unlimited``.

    ``burst`` is how many tokens may be saved up; it defaults to the amount, and belongs to one rate only.

    >>> parse_rates("5/15min")[0].period_ns == 15 * 60 * SECOND
    True
    """
    if isinstance(value, str):
        return _parse_text(value, burst)
    if isinstance(value, list | tuple):
        return _parse_sequence(value, burst)
    item = as_text(value)
    if not isinstance(item, str):
        raise NotationError(_not_text(value, "/second", A_RATE), A_RATE)
    return _parse_text(item, burst)


def _parse_sequence(values: Sequence[Any], burst: int | None) -> tuple[Rate, ...]:
    if not values:
        raise NotationError(f"an empty list is not a rate; write {A_RATE}, or unlimited", A_RATE)
    if len(values) > 1 and burst is not None:
        raise NotationError(_BURST_OF_MANY, A_RATE)
    rates = [parse_rates(value, burst) for value in values]
    if len(values) > 1 and not all(rates):
        raise NotationError("'unlimited' cannot be combined with other rates", A_RATE)
    return tuple(rate for group in rates for rate in group)


_BURST_OF_MANY = "a burst belongs to one rate; give each rate its own {limit: ..., burst: ...}"


@lru_cache(maxsize=4096)
def _parse_text(text: str, burst: int | None) -> tuple[Rate, ...]:
    burst = _checked_burst(burst)
    if text.strip().lower() == "unlimited":
        if burst is not None:
            raise NotationError("'unlimited' has no burst", A_RATE)
        return ()
    parts = _SEPARATOR.split(text)
    if len(parts) > 1 and burst is not None:
        raise NotationError(_BURST_OF_MANY, A_RATE)
    return tuple(_parse_one(part, burst) for part in parts)


def _parse_one(text: str, burst: int | None) -> Rate:
    match = _RATE.fullmatch(text)
    if match is None:
        raise NotationError(_why_no_rate(text), A_RATE)
    amount, multiple, unit = match.groups()
    unit_ns = _unit(unit)
    if unit_ns is None:
        raise NotationError(_unknown_unit(unit, text), A_RATE)
    count = _count(amount, text, MAX_AMOUNT)
    period_ns = unit_ns * (1 if multiple is None else _count(multiple, text, MAX_PERIOD // unit_ns))
    if count < 1:
        raise NotationError(f"{shorten(text)} lets nobody in; an amount is at least 1", A_RATE)
    if period_ns < 1:
        raise NotationError(f"the time in {shorten(text)} is 0; it is at least 1ms", A_RATE)
    return Rate(count, period_ns, burst or 0)


def _checked_burst(burst: Any) -> int | None:
    if burst is None:
        return None
    if isinstance(burst, bool) or not isinstance(burst, int) or not 1 <= burst <= MAX_AMOUNT:
        raise NotationError(f"a burst is a whole number, 1..{MAX_AMOUNT:_}, not {shorten(burst)}", "a whole number")
    return burst


def _count(digits: str, text: str, largest: int) -> int:
    # Leading zeros are counted out first: int() refuses more than 4300 digits with an error of its own.
    significant = digits.replace("_", "").lstrip("0")
    if len(significant) > 30 or int(significant or "0") > largest:
        raise NotationError(f"{shorten(digits)} in {shorten(text)} is too large; it is at most {largest:_}", A_RATE)
    return int(significant or "0")


def _unit(spelling: str) -> int | None:
    # Short units are read as written, because 'M' may mean a minute or a month.
    return _UNITS.get(spelling) or (_UNITS.get(spelling.lower()) if len(spelling) > 2 else None)


def _unknown_unit(unit: str, text: str) -> str:
    return f"unknown time unit {shorten(unit)} in {shorten(text)}" + suggestion(
        unit, _WORDS, otherwise="use ms, s, min, h, day, week, month or year"
    )


def _why_no_rate(text: str) -> str:
    bare = text.strip()
    if not bare:
        return f"a rate is blank; write {A_RATE}"
    if bare.startswith("-"):
        return f"{shorten(bare)} is negative; write {A_RATE}"
    if _NUMBER.fullmatch(bare):
        return _no_unit(bare, "/second")
    if match := _ALMOST_RATE.fullmatch(text):
        amount, multiple, unit = match.groups()
        if unit is None:
            return f"{shorten(bare)} has no time unit; write {A_RATE}"
        unit_ns = _unit(unit)
        if unit_ns is None:
            return _unknown_unit(unit, bare)
        if (fraction := _fraction(amount)) is not None:
            span = fraction.denominator * int((multiple or "1").replace("_", "")[:12])
            better = f"{fraction.numerator}/{span}{_SHORTEST[unit_ns]}"
            return f"{shorten(amount)} in {shorten(bare)} is not a whole number; did you mean {shorten(better)}?"
        if not amount:
            return f"{shorten(bare)} has no amount; write {A_RATE}"
    if (word := close(bare.lower(), ("unlimited",))) is not None:
        return f"{shorten(bare)} is not a rate; did you mean {shorten(word)}?"
    return f"{shorten(bare)} is not a rate; write one such as 10/second, 5/15min or 1_000/day, or unlimited"


def _fraction(amount: str) -> Fraction | None:
    if "." not in amount or "_" in amount or len(amount) > 20 or not any(c in "123456789" for c in amount):
        return None
    return Fraction(amount if amount[0] != "." else "0" + amount)


def as_text(value: object) -> object:
    """A rate of the `limits` library in this notation; any other value as it is."""
    if not any(base.__module__.partition(".")[0] == "limits" for base in type(value).__mro__):
        return value
    from limits import RateLimitItem

    return f"{value.amount}/{value.get_expiry()}second" if isinstance(value, RateLimitItem) else value


def parse_quota(value: str, zone: str = "UTC") -> Quota | None:
    """The quota that ``value`` means, counted by the calendar of ``zone``; ``None`` for ``unlimited``."""
    if not isinstance(value, str):
        raise NotationError(_not_text(value, "/day", A_QUOTA), A_QUOTA)
    bare = value.strip()
    if bare.lower() == "unlimited":
        return None
    match = _RATE.fullmatch(value)
    if match is None:
        raise NotationError(_why_no_quota(bare), A_QUOTA)
    amount, multiple, unit = match.groups()
    unit_ns = _unit(unit)
    if unit_ns is None:
        raise NotationError(_unknown_unit(unit, bare), A_QUOTA)
    if unit_ns not in (DAY, MONTH) or (multiple is not None and _count(multiple, bare, MAX_AMOUNT) != 1):
        raise NotationError(
            f"{shorten(bare)} is not a quota: quotas are per calendar day or month; "
            "for another span of time use a rate",
            A_QUOTA,
        )
    limit = _count(amount, bare, MAX_AMOUNT)
    if limit < 1:
        raise NotationError(f"{shorten(bare)} lets nobody in; an amount is at least 1", A_QUOTA)
    check_zone(zone)
    return Quota(limit, "day" if unit_ns == DAY else "month", zone)


def _why_no_quota(bare: str) -> str:
    if not bare:
        return f"a quota is blank; write {A_QUOTA}"
    if _NUMBER.fullmatch(bare):
        return _no_unit(bare, "/day")
    if _SEPARATOR.search(bare):
        return f"{shorten(bare)} is not a quota: a quota is one amount per calendar day or month"
    message = _why_no_rate(bare)
    return message.replace(A_RATE, A_QUOTA).replace(
        "is not a rate; write one such as 10/second, 5/15min or 1_000/day", f"is not a quota; write {A_QUOTA}"
    )


def check_zone(zone: Any) -> None:
    """Raise `NotationError` unless ``zone`` is a time zone of the IANA database."""
    try:
        ZoneInfo(zone)
    except (KeyError, ValueError, OSError, TypeError):
        known = available_timezones()
        if not known:
            raise NotationError(
                "there is no time zone database on this machine: pip install tzdata", "a time zone", "E021"
            ) from None
        spelled = {name.lower(): name for name in known}
        near = close(zone.lower(), spelled) if isinstance(zone, str) else None
        hint = f"did you mean {shorten(spelled[near])}?" if near else "write one such as Europe/Berlin"
        raise NotationError(f"unknown time zone {shorten(zone)}; {hint}", "a time zone", "E021") from None


def parse_duration(text: str) -> int:
    """Nanoseconds in ``text``: ``250ms``, ``5s``, ``2m``, ``1h``, ``1d``. Never 0."""
    if not isinstance(text, str):
        raise NotationError(_not_text(text, "s", A_DURATION), A_DURATION)
    bare = text.strip()
    if match := _DURATION.fullmatch(text):
        count, unit = match.groups()
        unit_ns = _unit(unit)
        if unit_ns is None:
            raise NotationError(_unknown_unit(unit, bare), A_DURATION)
        length = _count(count, bare, MAX_PERIOD // unit_ns) * unit_ns
        if length == 0:
            raise NotationError(f"{shorten(bare)} is no time at all; write {A_DURATION}", A_DURATION)
        return length
    if not bare:
        raise NotationError(f"a duration is blank; write {A_DURATION}", A_DURATION)
    if bare.startswith("-"):
        raise NotationError(f"{shorten(bare)} is negative; write {A_DURATION}", A_DURATION)
    if _NUMBER.fullmatch(bare):
        raise NotationError(_no_unit(bare, "s"), A_DURATION)
    if (match := _DECIMAL_DURATION.fullmatch(bare)) and (unit_ns := _unit(match[2])) and (count := _fraction(match[1])):
        exact = Fraction(count) * unit_ns
        if exact % MILLISECOND == 0:
            better = f"{exact / MILLISECOND}ms"
            raise NotationError(f"{shorten(bare)} is not whole; did you mean {shorten(better)}?", A_DURATION)
    raise NotationError(f"{shorten(bare)} is not a duration; write {A_DURATION}", A_DURATION)


def rate_text(rate: Rate) -> str:
    """``rate`` as it is written: ``10/second``, ``5/15min``, ``100/second (burst 300)`` where it has one of its own."""
    unit = next((unit for unit in reversed(_SPELLINGS) if rate.period_ns % unit == 0), 1)
    count = rate.period_ns // unit
    span = _WHOLE.get(unit, "ns") if count == 1 else f"{count}{_SHORTEST.get(unit, 'ns')}"
    burst = f" (burst {rate.burst:_})" if rate.burst != rate.amount else ""
    return f"{rate.amount:_}/{span}{burst}"


def quota_text(quota: Quota) -> str:
    """``quota`` as it is written: ``10_000/day``, ``10_000/day (Europe/Berlin)`` in a zone of its own."""
    return f"{quota.limit:_}/{quota.span}" + ("" if quota.zone == "UTC" else f" ({quota.zone})")


def duration_text(length_ns: int) -> str:
    """A duration as it is written, in the largest unit in which it is whole: ``250ms``, ``90s``, ``2h``."""
    units = ((DAY, "d"), (HOUR, "h"), (MINUTE, "m"), (SECOND, "s"), (MILLISECOND, "ms"), (1, "ns"))
    return next(f"{length_ns // unit}{spelling}" for unit, spelling in units if length_ns % unit == 0)


def _not_text(value: object, unit: str, expected: str) -> str:
    what = expected.partition(" such")[0]
    if value is None:
        return f"{what} is blank; write {expected}"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return f"{shorten(value)} is not {what}; write {expected}"
    return _no_unit(str(value), unit)


def _no_unit(number: str, unit: str) -> str:
    if not number.replace("_", "").isdecimal() or not number.strip("_0"):
        return f"{shorten(number)} has no time unit; write a whole number above 0 with its unit, such as '10{unit}'"
    return f"{shorten(number)} has no time unit; did you mean {shorten(number + unit)}?"


def close(word: str, known: Iterable[str]) -> str | None:
    """The one of ``known`` that ``word`` was probably meant to be."""
    # The comparison is quadratic in the length: nobody mistypes a name of more than 80 characters.
    near = get_close_matches(word, list(known), 1, 0.6) if len(word) <= 80 else []
    return near[0] if near else None


def suggestion(word: str, known: Iterable[str], *, otherwise: str = "") -> str:
    """The end of an error message: ``; did you mean 'day'?``, or ``otherwise``, or nothing."""
    near = close(word, known)
    if near is None:
        return f"; {otherwise}" if otherwise else ""
    return f"; did you mean {shorten(near)}?"


_SHOWN = 80


def shorten(value: object) -> str:
    """``value`` in quotes, as an error shows it: at most 80 characters."""
    text = value if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else repr(value)
    return f"'{text if len(text) <= _SHOWN else text[: _SHOWN - 3] + '...'}'"


def instant_text(seconds: float) -> str:
    """An instant (seconds since the epoch) in ISO 8601, UTC, in milliseconds."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
