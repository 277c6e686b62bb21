"""What clients count, by host, in the cells that the middlewares count in as well."""

from __future__ import annotations

from threading import RLock
from typing import TYPE_CHECKING, ClassVar, final
from weakref import WeakSet, finalize

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

if TYPE_CHECKING:
    from seawall.client.host import Host

MOST_HOSTS = 50
"""Hosts with series of their own; all further ones together are ``other``."""
_RESULTS = {None: "error", 1: "1xx", 2: "2xx", 3: "3xx", 4: "4xx", 5: "5xx"}


@final
class Meters:
    """The series of one host, which several clients may call."""

    _of: ClassVar[dict[str, Meters]] = {}
    _lock: ClassVar[RLock] = RLock()
    """Clients run in threads, where ``+=`` is two steps; and where a host ends, which may be within any step."""

    def __init__(self, host: str) -> None:
        self._host = host
        self._cells = Publication.of(None).cells
        self._attempts: dict[int | None, int] = {}
        self._hosts: WeakSet[Host] = WeakSet()

    @classmethod
    def of(cls, host: Host) -> Meters:
        """Those of ``host``, whose gauges are shown for as long as it lives; of too many hosts, those of the rest."""
        with cls._lock:
            found = cls._of.get(host.name)
            if found is None:
                name = host.name if len(cls._of) < MOST_HOSTS else "other"
                found = cls._of.get(name) or cls._of.setdefault(name, cls(name))
            found._hosts.add(host)
        finalize(host, found.show).atexit = False
        return found

    def attempt(self, status: int | None) -> None:
        """One request was sent and answered with ``status``, or ended without an answer."""
        result = None if status is None else status // 100
        at = self._attempts.get(result)
        if at is None:
            at = self._cells.index(CLIENT_ATTEMPTS, self._host, _RESULTS.get(result, "other"))
            if result in _RESULTS:
                self._attempts[result] = at
        with self._lock:
            self._cells.values[at] += 1

    def retry(self, reason: str) -> None:
        self._add(CLIENT_RETRIES, reason)

    def refused(self, reason: str) -> None:
        self._add(CLIENT_REFUSALS, reason)

    def hedge(self, *, won: bool) -> None:
        self._add(CLIENT_HEDGES, "won" if won else "lost")

    def show(self) -> None:
        """Show the tokens and the circuits of all clients of the host as they are now."""
        with self._lock:
            hosts = list(self._hosts)
            values, index = self._cells.values, self._cells.index
            values[index(CLIENT_BUDGET, self._host)] = sum(host.budget.tokens for host in hosts)
            values[index(CLIENT_CIRCUITS, self._host)] = sum(host.open_circuits for host in hosts)

    def _add(self, spec: Spec, label: str) -> None:
        at = self._cells.index(spec, self._host, label)
        with self._lock:
            self._cells.values[at] += 1
