"""Times and durations as logs write them, in nanoseconds.

A million lines hold a few thousand different seconds, so a second is worked out once and its fraction added.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import final

from seawall.rate import SECOND

LATEST = 7_258_118_400 * SECOND
"""The year 2200: what is written as later is a number of another kind."""
LONGEST = 30 * 86_400 * SECOND
"""No request takes longer than 30 days."""
UNITS: Mapping[str, int] = {
    "ns": 1,
    "us": 1_000,
    "\N{MICRO SIGN}s": 1_000,
    "\N{GREEK SMALL LETTER MU}s": 1_000,
    "ms": 1_000_000,
    "s": SECOND,
}
_REMEMBERED = 4_096
_FRACTION = r"(?:[.,]([0-9]{1,18}))?"
_ZONE = r" ?(Z|UTC|[+-][0-9]{2}:?[0-9]{2})?"
_ISO = re.compile(rf"([0-9]{{4}}[-/][0-9]{{2}}[-/][0-9]{{2}}[T ][0-9]{{2}}:[0-9]{{2}}:[0-9]{{2}}){_FRACTION}{_ZONE}")
_CLF = re.compile(rf"([0-9]{{2}}/[A-Z][a-z]{{2}}/[0-9]{{4}}:[0-9]{{2}}:[0-9]{{2}}:[0-9]{{2}}){_FRACTION}{_ZONE}")
_NUMBER = re.compile(r"([0-9]{1,19})(?:\.([0-9]{1,18}))?")
_DURATION = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,18})?(?:[eE][+-]?[0-9]{1,2})?) ?(ns|us|\u00b5s|\u03bcs|ms|s)?")
_NAMES = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_MONTHS = {name: at for at, name in enumerate(_NAMES, 1)}


@final
class Instants:
    """Reads instants: ``10/Oct/2000:13:55:36 -0700``, ISO 8601, seconds (or ms, us, ns by their size) since the epoch.

    What names no zone is UTC, and ``zoneless`` says that there was such.
    """

    def __init__(self) -> None:
        self.zoneless = False
        self._seconds: dict[tuple[str, str | None], int] = {}
        self._known: dict[str, int] = {}

    def read(self, value: object) -> tuple[int, bool]:
        """Nanoseconds since the epoch, and whether that is only known to the second. ``ValueError`` for nonsense."""
        if isinstance(value, str):
            known = self._known.get(value)
            return (known, True) if known is not None else self._of_text(value)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError("no time")
        return _in_range(_by_size(value)), isinstance(value, int) and value < 100_000_000_000

    def _of_text(self, text: str) -> tuple[int, bool]:
        found = _ISO.fullmatch(text) or _CLF.fullmatch(text)
        if found is None:
            number = _NUMBER.fullmatch(text)
            if number is None:
                raise ValueError("no time")
            whole, fraction = int(number[1]), number[2]
            at = _by_size(whole)
            if fraction is not None:
                at += _fraction(fraction) * (at // whole if whole else SECOND) // SECOND
            return _in_range(at), fraction is None and whole < 100_000_000_000
        prefix, fraction, zone = found.groups()
        second = self._seconds.get((prefix, zone))
        if second is None:
            if len(self._seconds) >= _REMEMBERED:
                self._seconds.clear()
                self._known.clear()
            second = self._seconds[prefix, zone] = _in_range(_second(prefix, zone))
            self.zoneless = self.zoneless or zone is None
        if fraction is None:
            self._known[text] = second
            return second, True
        return second + _fraction(fraction), False


def read_duration(value: object, unit: int | None) -> int:
    """Nanoseconds, -1 for none. Numbers are in ``unit`` (ns); without one, whole numbers are ms and others seconds."""
    if isinstance(value, str):
        found = _DURATION.fullmatch(value)
        if found is None:
            return -1
        number, suffix = found.groups()
        scale = UNITS[suffix] if suffix else unit or (1_000_000 if number.isdigit() else SECOND)
        took = int(number) * scale if number.isdigit() else round(float(number) * scale)
    elif isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < LONGEST:
        return -1
    else:
        took = round(value * (unit or (1_000_000 if isinstance(value, int) else SECOND)))
    return took if 0 <= took <= LONGEST else -1


def _by_size(value: float) -> int:
    """A number since the epoch by how large it is: seconds, ms, us or ns."""
    if not 0 <= value < LATEST:  # also what is not a number
        raise ValueError("no time")
    for most, unit in ((100_000_000_000, SECOND), (100_000_000_000_000, 1_000_000), (100_000_000_000_000_000, 1_000)):
        if value < most:
            # A float has no more than microseconds left.
            return value * unit if isinstance(value, int) else round(value * unit / 1_000) * 1_000
    return int(value)


def _in_range(at: int) -> int:
    if not 0 <= at < LATEST:
        raise ValueError("a time that is not between 1970 and 2200")
    return at


def _fraction(digits: str) -> int:
    return int(digits[:9].ljust(9, "0"))


def _second(prefix: str, zone: str | None) -> int:
    """The instant of a date and a time without a fraction."""
    if prefix[2] == "/":
        month = _MONTHS.get(prefix[3:6])
        if month is None:
            raise ValueError("no time")
        date = (int(prefix[7:11]), month, int(prefix[:2]))
    else:
        date = (int(prefix[:4]), int(prefix[5:7]), int(prefix[8:10]))
    moment = datetime(*date, int(prefix[-8:-6]), int(prefix[-5:-3]), int(prefix[-2:]), tzinfo=UTC)
    offset = 0
    if zone is not None and zone[0] in "+-":
        offset = (int(zone[1:3]) * 3_600 + int(zone[-2:]) * 60) * (-1 if zone[0] == "-" else 1)
    return (int(moment.timestamp()) - offset) * SECOND
