"""A state that comes and goes with every request, as one that begins and ends: what a log line is written for."""

from __future__ import annotations

from typing import final

SECOND = 1_000_000_000
QUIET = 10 * SECOND
"""Nanoseconds without it after which it is over."""


@final
class Spell:
    """Times are monotonic nanoseconds."""

    __slots__ = ("_last", "lasts")

    def __init__(self) -> None:
        self.lasts = False
        self._last = 0

    def __repr__(self) -> str:
        return f"<Spell {'that lasts' if self.lasts else 'that is over'}>"

    def seen(self, now: int) -> bool:
        """It is so now. Whether that is new."""
        begins = not self.lasts
        self.lasts, self._last = True, now
        return begins

    def unseen(self, now: int) -> bool:
        """It is not so now. Whether that ends it."""
        if not self.lasts or now - self._last < QUIET:
            return False
        self.lasts = False
        return True
