"""The two libraries that are served, as far as they are told apart."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any, final

NAMES = ("httpx2", "httpx")
"""The maintained continuation first, where both are installed."""


@final
@dataclass(frozen=True, slots=True, eq=False)
class Library:
    """Classes of ``httpx2`` or of ``httpx``, which have the same names."""

    module: Any

    @property
    def name(self) -> str:
        return str(self.module.__name__)

    @classmethod
    def of(cls, transport: object) -> Library:
        """The one that ``transport`` is made for; the default where it does not show."""
        for kind in type(transport).__mro__:
            name = kind.__module__.partition(".")[0]
            if name in NAMES and kind.__name__ in ("AsyncBaseTransport", "BaseTransport"):
                return cls(import_module(name))
        return default()


def default() -> Library:
    """The first that is installed. Raises `ImportError` where none is."""
    for name in NAMES:
        try:
            return Library(import_module(name))
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
    raise ImportError("seawall.client needs httpx2 or httpx: pip install 'seawall[client]'")
