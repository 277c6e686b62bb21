"""What clients count, by host, in the cells that the middlewares count in as well."""

from __future__ import annotations

from collections import deque
from threading import Lock, RLock
from typing import TYPE_CHECKING, ClassVar, final
from weakref import finalize

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
        self._shown = [0, 0]
        self._changes: deque[tuple[list[int], int, int]] = deque()
        self._changing = Lock()

    @classmethod
    def of(cls, host: Host) -> Meters:
        """Those of ``host``, whose gauges are shown for as long as it lives; of too many hosts, those of the rest."""
        with cls._lock:
            found = cls._of.get(host.name)
            if found is None:
                name = host.name if len(cls._of) < MOST_HOSTS else "other"
                found = cls._of.get(name) or cls._of.setdefault(name, cls(name))
        finalize(host, found._show, host.shown, 0, 0).atexit = False
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

    def show(self, host: Host) -> None:
        """Show the tokens and the circuits of ``host`` as they are now, among those of all clients of it.

        By what has changed: of too many hosts there are hundreds here, and this is done within calls.
        """
        self._show(host.shown, host.budget.tokens, host.open_circuits)

    def _show(self, shown: list[int], tokens: int, circuits: int) -> None:
        # A host may end within any step, in this thread as well: so nobody waits, and who is at it does all there is.
        self._changes.append((shown, tokens, circuits))
        while self._changes and self._changing.acquire(blocking=False):
            try:
                if self._changes:
                    self._change(*self._changes.popleft())
            finally:
                self._changing.release()

    def _change(self, shown: list[int], *now: int) -> None:
        values, index = self._cells.values, self._cells.index
        for at, spec in enumerate((CLIENT_BUDGET, CLIENT_CIRCUITS)):
            self._shown[at] += now[at] - shown[at]
            shown[at] = now[at]
            values[index(spec, self._host)] = self._shown[at]

    def _add(self, spec: Spec, label: str) -> None:
        at = self._cells.index(spec, self._host, label)
        with self._lock:
            self._cells.values[at] += 1
