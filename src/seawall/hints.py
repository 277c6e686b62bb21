"""What a request says about itself: by when its answer is needed, and how much it matters.

Whoever calls may say anything, so a word counts only against its speaker. A deadline can make a request expire and
never buys one, and a priority only lowers, except in the one header that the policy names, from a direct peer that the
policy names. Nonsense is never an error: a proxy that writes some would take the whole service down. It is ignored, and
named, so that it can be counted.

`priority` of RFC 9218 is not read: it orders the parts of one page, and says nothing about one caller among others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, final
from urllib.parse import unquote_to_bytes

from seawall.decision import Clock
from seawall.identity import Address, NetworkSet, is_forwarded
from seawall.policy import Policy
from seawall.rate import SECOND

Scope: TypeAlias = Mapping[str, Any]

MAX_NUMBER = 32
"""Bytes of a value that may be a number: twice what any of them needs."""
MAX_NAME = 64
"""Bytes of a value that may be the name of a class, as the configuration has it."""
MAX_BAGGAGE = 2_048
"""So much of the baggage is looked at; W3C Baggage allows four times as much, and the rest is not ours."""
MAX_TIMEOUT = 86_400 * SECOND
"""A timeout above a day is none. Java's "no timeout" is 2**63 - 1 ms; nothing waits for a day, not asyncio either
(`MAXIMUM_SELECT_TIMEOUT`); and an hour would take the deadline from a long export that passes its own on."""
MAX_AHEAD = SECOND
"""So far may the proxy's clock be ahead of ours."""
MAX_WAITED = 3_600 * SECOND
"""No proxy holds a request for longer; what looks so is another unit, another epoch or a broken clock."""

DEFAULT_HEADER = "x-request-priority"
"""The header that may lower the priority where the policy has no `priority_header`."""
GOOGLE = ("CRITICAL_PLUS", "CRITICAL", "SHEDDABLE_PLUS", "SHEDDABLE")
"""Site Reliability Engineering, chapter 21, "Criticality"."""
NETFLIX = ("CRITICAL", "DEGRADED", "BEST_EFFORT", "BULK")
"""Enhancing Netflix Reliability with Service-Level Prioritized Load Shedding."""

_GRPC = b"grpc-timeout"
_ENVOY = b"x-envoy-expected-rq-timeout-ms"
_TIMEOUT = b"x-request-timeout-ms"
_START = b"x-request-start"
_BAGGAGE = b"baggage"
_FIXED = (_GRPC, _ENVOY, _TIMEOUT, _START, _BAGGAGE)

_BLANK = b" \t"
_NONE = MAX_TIMEOUT + 1
_MILLISECOND = 1_000_000
_MAX_DIGITS = 20  # of 2**64 - 1
_GRPC_UNITS = {
    b"H": 3_600 * SECOND,
    b"M": 60 * SECOND,
    b"S": SECOND,
    b"m": _MILLISECOND,
    b"u": 1_000,
    b"n": 1,
}
# From 2001 to 2286 an instant has 10 digits in seconds, 13 in ms, 16 in us, 19 in ns.
_START_UNITS = {10: SECOND, 13: _MILLISECOND, 16: 1_000, 19: 1}


@final
@dataclass(slots=True)
class Hint:
    """What a request has said.

    ``deadline_ns`` is an instant on the clock of `Hints.read`'s ``now_ns``; it has passed if it is not after that, and
    may be negative; 0 is no deadline. ``priority`` is the class asked for, as the policy spells it; ``raises``, whether
    it may also be above the caller's own (`Hints.effective`). ``ignored`` names the headers that were nonsense.
    """

    deadline_ns: int = 0
    priority: str | None = None
    raises: bool = False
    ignored: tuple[str, ...] = ()


@final
class Hints:
    """Reads deadline and priority off a request's headers, in one pass over them.

    ``peer`` finds the direct peer of a scope (`ClientIP.peer`); ``wall_clock`` is what proxies date their requests by.
    """

    headers: tuple[str, ...]
    """All that `Hint.ignored` may name."""

    def __init__(self, policy: Policy, peer: Callable[[Scope], Address | None], wall_clock: Clock) -> None:
        configured = policy.priority_header
        header = DEFAULT_HEADER if configured is None else configured.name
        self._header = header.encode()
        self._raisers = NetworkSet(configured.raise_from) if configured is not None and configured.raise_from else None
        self._peer = peer
        self._wall = wall_clock
        self._names = frozenset((*_FIXED, self._header))
        self.headers = tuple(sorted(name.decode() for name in self._names))
        self._classes = tuple(priority.name for priority in policy.priorities)
        self._ranks = class_ranks(self._classes)
        self._lowered = {
            (own, asked): self._classes[max(at, rank)]
            for at, own in enumerate(self._classes)
            for rank, asked in enumerate(self._classes)
        }

    def __repr__(self) -> str:
        raising = "" if self._raisers is None else ", may raise"
        return f"<Hints {self._header.decode()}{raising}, {len(self._classes)} classes>"

    def read(self, scope: Scope, now_ns: int) -> Hint | None:
        """What the headers say, or ``None`` for the normal case that they say nothing.

        ``now_ns`` is the monotonic time of arrival. Among several deadlines the earliest counts, among several
        priorities the lowest. Never raises, whatever the values are.
        """
        # All that a request pays that says nothing: 0.27 us for nine headers, 0.17 of it the empty loop; 0.41 and 0.21
        # where the names come fresh from a server and have to be hashed. `isdisjoint` over a `map` of the names takes a
        # fifth more, a dict of the headers twice as long.
        said: dict[bytes, bytes] | None = None
        names = self._names
        for name, value in scope["headers"]:
            if name in names:
                if said is None:
                    said = {name: value}
                else:
                    said[name] = _combined(name, said[name], value) if name in said else value
        return None if said is None else self._hint(said, scope, now_ns)

    def effective(self, asked: str | None, own: str, raises: bool) -> str:
        """The class of a request whose tenant, route or plan has the class ``own``, and which asks for ``asked``."""
        if asked is None:
            return own
        return asked if raises else self._lowered.get((own, asked), own)

    def _hint(self, said: Mapping[bytes, bytes], scope: Scope, now_ns: int) -> Hint | None:
        if len(said) == 1 and _START in said:
            return None  # what nginx sends with every request, and nothing to take it off
        total = left = _NONE
        rank, raises = -1, False
        ignored: tuple[str, ...] = ()
        for name, value in said.items():
            timeout_of = _TIMEOUTS.get(name)
            if timeout_of is not None:
                timeout = timeout_of(value.strip(_BLANK)) if len(value) <= MAX_NUMBER else None
                if timeout is None:
                    ignored += (name.decode(),)
                elif name == _ENVOY:
                    left = timeout
                elif timeout < total:
                    total = timeout
            elif name != _START:
                word = criticality(value) if name == _BAGGAGE else value
                if word is None:
                    continue
                asked = self._ranks.get(word.strip(_BLANK).lower(), -1) if len(word) <= MAX_NAME else -1
                if asked < 0:
                    ignored += (name.decode(),)
                    continue
                rank = max(rank, asked)
                # Baggage never raises: tracing libraries pass on what a stranger sent, also from peers that may raise.
                raises = raises or (name != _BAGGAGE and self._may_raise(scope))
        if total <= MAX_TIMEOUT:
            start = said.get(_START)
            if start is not None:
                # Not off Envoy's: what it sends is what it has left of its own timeout, so this would count twice.
                waited = self._waited(start)
                if waited is None:
                    ignored += (_START.decode(),)
                else:
                    total -= waited
            left = min(left, total)
        priority = None if rank < 0 else self._classes[rank]
        if left <= MAX_TIMEOUT:
            # 0 is taken; one nanosecond earlier is as good.
            return Hint(now_ns + left or -1, priority, raises, ignored)
        return Hint(0, priority, raises, ignored) if priority is not None or ignored else None

    def _waited(self, value: bytes) -> int | None:
        """Nanoseconds since a proxy took the request, by the instant it wrote down."""
        if len(value) > MAX_NUMBER:
            return None
        whole, _, fraction = value.strip(_BLANK).removeprefix(b"t=").partition(b".")
        unit = _START_UNITS.get(len(whole))
        # Whole seconds would take up to one too many off a deadline.
        if unit is None or not (whole + fraction).isdigit() or (unit == SECOND and not fraction):
            return None
        start = int(whole) * unit + int(fraction or b"0") * unit // 10 ** len(fraction)
        waited = self._wall() - start
        return max(0, waited) if -MAX_AHEAD <= waited <= MAX_WAITED else None

    def _may_raise(self, scope: Scope) -> bool:
        if self._raisers is None:
            return False
        peer = self._peer(scope)
        return peer is not None and peer in self._raisers and not is_forwarded(scope["headers"])


def class_ranks(classes: Sequence[str]) -> dict[bytes, int]:
    """The rank (0 is the highest) of the class that each known word asks for, by the word in lower case.

    A class's own name is that class. The words of Google and Netflix are spread evenly, the first on the first class
    and the last on the last: word ``i`` of ``m`` on rank ``round(i * (n - 1) / (m - 1))`` of ``n``. ``CRITICAL``, which
    both have, is the first class unless one has that name.

    >>> ranks = class_ranks(["gold", "silver", "bronze"])
    >>> [ranks[word] for word in (b"critical", b"degraded", b"best_effort", b"bulk", b"silver")]
    [0, 1, 1, 2, 1]
    """
    last = len(classes) - 1
    ranks: dict[bytes, int] = {}
    for words in (GOOGLE, NETFLIX):
        gaps = len(words) - 1
        for at, word in enumerate(words):
            ranks[word.lower().encode()] = (2 * at * last + gaps) // (2 * gaps)
    ranks.update((name.lower().encode(), rank) for rank, name in enumerate(classes))
    return ranks


def criticality(baggage: bytes) -> bytes | None:
    """The value of the key ``criticality`` in a W3C baggage; ``None`` without one, nothing for two that differ.

    >>> criticality(b"user=foo, criticality=BULK;ttl=1")
    b'BULK'
    """
    if b"criticality" not in baggage:
        return None
    if len(baggage) > MAX_BAGGAGE:
        # Cut at a comma: the beginning of a value may be another one.
        baggage = baggage[: MAX_BAGGAGE + 1].rpartition(b",")[0]
    found = None
    for member in baggage.split(b","):
        key, _, rest = member.partition(b"=")
        if key.strip(_BLANK) == b"criticality":
            value = unquote_to_bytes(rest.partition(b";")[0].strip(_BLANK))
            if found is not None and found != value:
                return b""
            found = value
    return found


def _combined(name: bytes, before: bytes, value: bytes) -> bytes:
    """A header that came again: baggage is a list; of others an equal one changes nothing, and another spoils both."""
    if name == _BAGGAGE:
        return before + b"," + value if len(before) <= MAX_BAGGAGE else before
    return before if before == value else b""


def _grpc_timeout(value: bytes) -> int | None:
    # A zero is not in the grammar, and every server takes it as what it says.
    unit, digits = _GRPC_UNITS.get(value[-1:]), value[:-1]
    return int(digits) * unit if unit is not None and digits.isdigit() and len(digits) <= 8 else None


def _milliseconds(value: bytes) -> int | None:
    # isdigit() of bytes knows ASCII only, and int() alone would take b"+1_0".
    return int(value) * _MILLISECOND if value.isdigit() and len(value) <= _MAX_DIGITS else None


def _envoy_milliseconds(value: bytes) -> int | None:
    timeout = _milliseconds(value)
    return _NONE if timeout == 0 else timeout


_TIMEOUTS: Mapping[bytes, Callable[[bytes], int | None]] = {
    _GRPC: _grpc_timeout,
    _ENVOY: _envoy_milliseconds,
    _TIMEOUT: _milliseconds,
}
