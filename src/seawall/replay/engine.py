"""A policy that decides on requests of the past, with the objects that serve and a clock that the log turns.

`Replay.decide` asks what `seawall.asgi.Middleware` asks, in the same order, of a `Gate` of its own; a test holds the
two together. What a log cannot tell is left out: deadlines and priorities are in headers, and how much the service
could do is known to nobody afterwards, so nothing is shed.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping
from dataclasses import replace
from heapq import heappop, heappush
from typing import Any, TypeAlias, final

from seawall.admission import Denied, Ticket
from seawall.asgi import ALL_PARTS
from seawall.backends import Key
from seawall.backends.memory import MemoryBackend
from seawall.cells import Cells
from seawall.decision import Mode, Outcome
from seawall.gate import NOBODY, Gate, Lane
from seawall.identity import show_address
from seawall.policy import BackendSettings, Policy
from seawall.replay.fields import Field, Wanted
from seawall.replay.logs import Request
from seawall.routing import has_control_character
from seawall.stages import TenantConcurrency

Caller: TypeAlias = Key | None
"""A tenant's id, the bytes of an address, `NOBODY` for all anonymous callers together; ``None`` before anybody asks."""

ALLOWED, EXEMPT, REFUSED, SHADOW = range(4)
"""Served; served without being limited; refused; served where all that is missing is ``mode: enforce``."""

CLAIM = "seawall.replay"
"""The key of ``scope["state"]`` by which a line is believed who it is."""
SHARED_KEYS = 10_000_000
"""Callers that are told apart where a shared store would keep them all."""

Ruling: TypeAlias = tuple[int, Caller, Lane | None, int, str]
"""What became of a request: the outcome; whose it was; its lane, if it came so far; the status of a refusal (0); and
what refused it, "" for nothing: the limit with the longest wait, or another reason."""

_READS = frozenset({"GET", "HEAD"})
_HASHED = "sha256:"
_REMEMBERED = 100_000
_EXEMPT: Ruling = (EXEMPT, None, None, 0, "")


def wanted(policy: Policy, fields: Mapping[str, Field], *others: Policy) -> Wanted:
    """What ``policy`` (and ``others``, with which it is compared) would like to know of each request."""
    both = (policy, *others)
    sources = [source for each in both for source in each.identity.tenant]
    states = {
        kind.removeprefix("state:")
        for each in both
        for route in each.routes
        for limit in route.limits
        for kind in limit.per
        if kind.startswith("state:")
    }
    return Wanted(
        fields,
        key_headers=tuple(dict.fromkeys(name for kind, name in sources if kind == "api_key")),
        forwarded=policy.identity.header,
        tenant_states=tuple(dict.fromkeys(name for kind, name in sources if kind == "state")),
        states=tuple(sorted({*states, *(role[6:] for role in fields if role.startswith("state:"))})),
    )


def without_unknown(policy: Policy, known: Collection[str]) -> tuple[Policy, list[str]]:
    """``policy`` without the limits per ``state:NAME`` of which no log says anything, and the names of those.

    All requests would share one bucket of each.
    """
    dropped: list[str] = []
    routes = []
    for route in policy.routes:
        kept = []
        for limit in route.limits:
            unknown = any(kind.startswith("state:") and kind[6:] not in known for kind in limit.per)
            if unknown:
                dropped.append(limit.name)
            else:
                kept.append(limit)
        routes.append(replace(route, limits=tuple(kept)))
    return replace(policy, routes=tuple(routes)), dropped


@final
class Replay:
    """One policy and the requests of one log.

    ``states`` are the names of `Request.states`. ``late`` counts requests that came too late in the order to be timed
    right.
    """

    def __init__(self, policy: Policy, states: tuple[str, ...] = ()) -> None:
        claimed = replace(policy.identity, tenant=(("state", CLAIM), *policy.identity.tenant))
        self.policy = replace(
            policy,
            identity=claimed,
            shedding=replace(policy.shedding, algorithm="off"),
            backend=BackendSettings(max_keys=policy.backend.max_keys),
        )
        self._now = 0
        self.late = 0
        most = policy.backend.max_keys if policy.backend.type == "memory" else SHARED_KEYS
        self.gate = Gate(
            self.policy,
            MemoryBackend(max_keys=most, clock=self._clock, wall_clock=self._clock),
            Cells(),
            parts=ALL_PARTS,
            concurrency=TenantConcurrency(),
            clock=self._clock,
            wall_clock=self._clock,
            random=random.random,
        )
        self._states = states
        self._key_headers = [name.encode() for kind, name in policy.identity.tenant if kind == "api_key"]
        self._forwarding = policy.identity.header.encode()
        paths = (policy.metrics.path, policy.status.path if policy.status else None)
        self._own_paths = frozenset(path for path in paths if path is not None)
        self._addresses: dict[tuple[str, str | None], tuple[bytes, bool, bool]] = {}
        self._ends: list[tuple[int, int, Ticket]] = []
        self._held = 0

    def __repr__(self) -> str:
        return f"<Replay {self.gate!r}>"

    def _clock(self) -> int:
        """Nanoseconds since the epoch, also for buckets: in a log no clock is set back."""
        return self._now

    def decide(self, request: Request) -> Ruling:
        """What becomes of ``request``, the next one in the order of time."""
        at, took, method, path, ip, _, forwarded, told, key, states = request
        if at >= self._now:
            self._now = at
        else:
            self.late += 1
        if self._ends:
            self._end()
        gate = self.gate
        # A log has no headers that tell a preflight; browsers send hardly any other OPTIONS.
        if method == "OPTIONS" or (path in self._own_paths and method in _READS):
            return _EXEMPT
        if not path.isprintable() and has_control_character(path) and gate.policy.mode is not Mode.OFF:
            return self._turned_away(gate.policy.mode, None, 400, "control character in the path")
        position = gate.routes.match(path, method)
        if gate.passes[position]:
            return _EXEMPT
        scope: dict[str, Any] = {"type": "http", "client": (ip, 0), "headers": ()}
        speaks = forwarded or told or key or states
        if speaks:
            self._tell(scope, request)
        known = self._addresses.get((ip, forwarded))
        if known is None:
            known = self._address(scope, ip, forwarded)
        address, denied_here, exempt_here = known
        if denied_here:
            return self._turned_away(gate.modes[position], address, 403, "access.deny")
        if exempt_here:
            return _EXEMPT
        tenant = gate.tenants.find(scope) if speaks else None
        found = gate.lane(scope, position, tenant, address)
        if found is None:
            return self._turned_away(gate.modes[position], address, 401, "nobody is identified")
        lane, principal, _ = found
        terms = lane.terms
        ticket = Ticket(scope, terms, tenant, principal, gate.clients.key, address)
        denied = gate.admit(ticket)
        if denied is None:
            if ticket.held:
                self._hold(ticket, self._now + took if took > 0 else self._now)
            # Whoever nothing limits still takes a place among the streams.
            return EXEMPT if terms.mode is Mode.OFF else ALLOWED, principal, lane, 0, ""
        assert isinstance(denied, Denied), "in memory, and with nothing to wait for, an answer is there at once"
        gate.admission.settle(ticket, Outcome.IGNORED, refund=True)
        cause = denied.waits[0][0] if denied.waits else denied.reason
        return REFUSED if denied.enforced else SHADOW, principal, lane, denied.status, cause

    def _address(self, scope: dict[str, Any], ip: str, forwarded: str | None) -> tuple[bytes, bool, bool]:
        """The key of a client's bucket, and whether the access lists deny it or exempt it; worked out once for each."""
        gate = self.gate
        client = gate.clients.resolve(scope)
        if len(self._addresses) >= _REMEMBERED:
            self._addresses.clear()
        known = gate.clients.bucket(client), client in gate.denies, client in gate.exempts
        self._addresses[ip, forwarded] = known
        return known

    def _turned_away(self, mode: Mode, caller: Caller, status: int, cause: str) -> Ruling:
        """Of somebody who has no lane."""
        return REFUSED if mode is Mode.ENFORCE else SHADOW, caller, None, status, cause

    def _hold(self, ticket: Ticket, until: int) -> None:
        self._held += 1
        heappush(self._ends, (until, self._held, ticket))

    def _end(self) -> None:
        """Let those end that have by now."""
        ends, now = self._ends, self._now
        while ends and ends[0][0] <= now:
            self.gate.admission.settle(heappop(ends)[2], Outcome.SUCCESS, refund=False)

    def _tell(self, scope: dict[str, Any], request: Request) -> None:
        """What a line says of its caller, as a server and an authentication middleware would hand it over."""
        headers = []
        if request.forwarded is not None:
            headers.append((self._forwarding, request.forwarded.encode("latin-1", "replace")))
        state: dict[str, object] = dict(zip(self._states, request.states, strict=True))
        state[CLAIM] = request.tenant
        if request.key is not None:
            known = self._of_hash(request.key)
            if known is not None and request.tenant is None:
                state[CLAIM] = known
            value = request.key.encode("utf-8", "replace")
            headers += [(name, value) for name in self._key_headers]
        scope["headers"] = headers
        scope["state"] = state

    def _of_hash(self, key: str) -> str | None:
        """The tenant of a key that the log has by its SHA-256, as the configuration does."""
        if not key.startswith(_HASHED) or len(key) != 71 or not self._key_headers:
            return None
        try:
            known = self.policy.keys.get(bytes.fromhex(key[7:]))
        except ValueError:
            return None
        return known.tenant if known and (known.expires_ns is None or self._now < known.expires_ns) else None


def shown(caller: Caller, policy: Policy) -> tuple[str, str]:
    """A caller as people know it, and what kind of caller that is."""
    if caller is None:
        return "nobody asked", "unasked"
    if isinstance(caller, str):
        return caller, "tenant"
    if caller == NOBODY:
        return "all anonymous callers", "anonymous"
    prefix = policy.identity.ipv6_prefix
    return show_address(caller) + (f"/{prefix}" if len(caller) == 16 and prefix < 128 else ""), "address"
