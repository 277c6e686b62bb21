"""Who has been refused lately, by what, and the log lines that say so.

A refusal is noted with one look-up in a dict and written nowhere: a service that refuses has no time. Windows of ten
seconds are added up beside the requests, fading by a third each, so that whoever stopped an hour ago is gone and a
caller who begins is seen even while thousands come. From each window the busiest are logged, one line a caller and
reason with how often, whatever the number of requests.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeAlias, final

from seawall.backends import Key

logger = logging.getLogger("seawall")

WINDOW = 10.0
"""Seconds."""
MOST_NOTED = 4_096
"""Callers and reasons that one window tells apart; further ones are counted together."""
MOST_KEPT = 512
MOST_LOGGED = 5
_FADE = 2 / 3

Note: TypeAlias = tuple[Key, str, str, str]
"""Who (a tenant's id as text, an address or nobody as bytes), the reason, the policy, the rule."""


@final
class Refusals:
    """What is noted by the requests of one middleware, whatever its policy is."""

    def __init__(self) -> None:
        self._noted: dict[Note, int] = {}
        self._others = 0
        self._kept: Counter[Note] = Counter()

    def __repr__(self) -> str:
        return f"<Refusals of {len({note[0] for note in (*self._noted, *self._kept)})} callers>"

    def note(self, caller: Key, reason: str, policy: str, rule: str) -> None:
        """Note a refusal."""
        noted, note = self._noted, (caller, reason, policy, rule)
        seen = noted.get(note)
        if seen is not None:
            noted[note] = seen + 1
        elif len(noted) < MOST_NOTED:
            noted[note] = 1
        else:
            self._others += 1

    def turn(self, name: Callable[[Key], str]) -> None:
        """Begin another window, and log what was in this one. ``name`` is what a caller is called in a log."""
        noted, self._noted = self._noted, {}
        noted = noted.copy()  # at once: a request may be about to note something in it
        others, self._others = self._others, 0
        kept = Counter({note: int(count * _FADE) for note, count in self._kept.items()})
        kept.update(noted)
        self._kept = Counter(dict((+kept).most_common(MOST_KEPT)))
        if not noted or not logger.isEnabledFor(logging.INFO):
            return
        busiest = Counter(noted).most_common(MOST_LOGGED)
        for (caller, reason, policy, rule), count in busiest:
            shown = name(caller)
            logger.info(
                "refused %s %d times in %g s: %s%s on rule %s",
                shown,
                count,
                WINDOW,
                reason,
                f" ({policy})" if policy and policy != reason else "",
                rule,
                extra={
                    "event": "refused",
                    "caller": shown,
                    "reason": reason,
                    "policy": policy,
                    "rule": rule,
                    "count": count,
                },
            )
        more = sum(noted.values()) + others - sum(count for _, count in busiest)
        if more:
            logger.info(
                "refused others %d times in %g s", more, WINDOW, extra={"event": "refused_others", "count": more}
            )

    def busiest(self, most: int, name: Callable[[Key], tuple[str, str]]) -> list[dict[str, Any]]:
        """Whoever was refused most lately, with how often by reason and by policy. ``name`` says what a caller is
        called, and what it is."""
        found: dict[Key, dict[str, Any]] = {}
        for (caller, reason, policy, _), count in (Counter(self._kept) + Counter(self._noted)).items():
            one = found.get(caller)
            if one is None:
                shown, kind = name(caller)
                one = found[caller] = {"caller": shown, "kind": kind, "count": 0, "reasons": {}, "policies": {}}
            one["count"] += count
            one["reasons"][reason] = one["reasons"].get(reason, 0) + count
            if policy:
                one["policies"][policy] = one["policies"].get(policy, 0) + count
        return sorted(found.values(), key=lambda one: (-one["count"], one["caller"]))[:most]


_CALM = 5
"""Seconds without a refusal after which shedding is over."""


@final
class Journal:
    """One log line as shedding begins and one as it ends, and the `Refusals` of each window."""

    def __init__(self, refusals: Refusals) -> None:
        self._refusals = refusals
        self._seconds = 0
        self._refused = 0
        self._since: tuple[int, int] | None = None
        self._last = 0

    def tick(self, refused: int, name: Callable[[Key], str]) -> None:
        """A second has passed. ``refused`` is how many were shed so far, ``name`` what a caller is called in a log."""
        self._seconds += 1
        if refused < self._refused:
            self._refused = 0  # the event loop that had counted is gone
        if refused > self._refused:
            if self._since is None:
                self._since = (self._seconds, self._refused)
                logger.warning(
                    "shedding: more comes than the service can do; %d requests were shed in the last second",
                    refused - self._refused,
                    extra={"event": "shedding", "count": refused - self._refused},
                )
            self._last = self._seconds
        elif self._since is not None and self._seconds - self._last >= _CALM:
            began, before = self._since
            count, lasted = refused - before, self._last - began + 1
            self._since = None
            logger.warning(
                "shedding is over after %d s; %d requests were shed",
                lasted,
                count,
                extra={"event": "shedding_over", "count": count, "seconds": lasted},
            )
        self._refused = refused
        if self._seconds % WINDOW == 0:
            self._refusals.turn(name)
