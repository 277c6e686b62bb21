"""What clients count, by host, in the cells that the middlewares count in as well."""

from __future__ import annotations

import re
from threading import Lock
from typing import ClassVar, final

from seawall.metrics import (
    CLIENT_ATTEMPTS,
    CLIENT_BUDGET,
    CLIENT_CIRCUITS,
    CLIENT_HEDGES,
    CLIENT_REFUSALS,
    CLIENT_RETRIES,
    Publication,
    Spec,
)

MOST_HOSTS = 50
"""Hosts with series of their own; all further ones together are ``other``."""


@final
class Meters:
    """The series of one host."""

    _of: ClassVar[dict[str, Meters]] = {}
    _lock: ClassVar[Lock] = Lock()
    """Clients run in threads, where ``+=`` is two steps."""

    def __init__(self, host: str) -> None:
        self._host = host
        self._cells = Publication.of(None).cells

    @classmethod
    def of(cls, host: str) -> Meters:
        """Those of ``host``, as long as there are not too many."""
        with cls._lock:
            found = cls._of.get(host)
            if found is None:
                name = host if len(cls._of) < MOST_HOSTS else "other"
                found = cls._of.get(name) or cls._of.setdefault(name, cls(name))
            return found

    def attempt(self, result: str) -> None:
        self._add(CLIENT_ATTEMPTS, result)

    def retry(self, reason: str) -> None:
        self._add(CLIENT_RETRIES, reason)

    def refused(self, error: str) -> None:
        """By the name of the error that was raised."""
        self._add(CLIENT_REFUSALS, re.sub(r"(?<!^)(?=[A-Z])", "_", error).lower())

    def hedge(self) -> None:
        self._add(CLIENT_HEDGES)

    def budget(self, tokens: int) -> None:
        self._set(CLIENT_BUDGET, tokens)

    def breaker(self, open_circuits: int) -> None:
        self._set(CLIENT_CIRCUITS, open_circuits)

    def _add(self, spec: Spec, *labels: str) -> None:
        with self._lock:
            self._cells.values[self._cells.index(spec, self._host, *labels)] += 1

    def _set(self, spec: Spec, value: int) -> None:
        with self._lock:
            self._cells.values[self._cells.index(spec, self._host)] = value
