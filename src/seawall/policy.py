"""What a configuration file means, once everything in it has been checked: frozen values, swapped whole.

A ``Policy`` is data. It holds no state of any caller, no bytes of any answer and no reference to a backend; what a
running middleware derives from it (`seawall.admission`) is derived again when a reload brings the next one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Network, IPv6Network
from typing import Literal, TypeAlias, final

from seawall.backends import Failure
from seawall.decision import Mode
from seawall.rate import Quota, Rate

Network: TypeAlias = IPv4Network | IPv6Network
Per: TypeAlias = tuple[str, ...]
"""Whose bucket: any of ``client_ip``, ``tenant``, ``global``, ``state:NAME``, together."""

RESERVED = frozenset({"rate", "quota", "concurrency", "streams"})
"""Names of the policies that every plan has; no route limit may take one."""


def is_reserved(name: str) -> bool:
    """Whether a name belongs to plans: those above, and ``rate-2``, ``rate-3`` of a plan with several rates."""
    return name in RESERVED or (name.startswith("rate-") and name[5:].isdecimal())


@final
@dataclass(frozen=True, slots=True)
class Plan:
    """What one class of callers may do. ``rates`` and ``quota`` empty mean unlimited."""

    name: str
    rates: tuple[Rate, ...] = ()
    quota: Quota | None = None
    concurrency: int | None = None
    priority: str | None = None
    mode: Mode = Mode.ENFORCE


@final
@dataclass(frozen=True, slots=True)
class Tenant:
    """A caller the file names. ``plan`` is its plan with its overrides already applied (and the plan's name kept)."""

    id: str
    plan: Plan
    priority: str | None = None
    mode: Mode = Mode.ENFORCE


@final
@dataclass(frozen=True, slots=True)
class Key:
    """An API key, known only by the SHA-256 under which `Policy.keys` lists it."""

    tenant: str
    expires_ns: int | None = None
    """The first wall-clock nanosecond at which it is no longer valid."""


@final
@dataclass(frozen=True, slots=True)
class RouteLimit:
    """A limit that a route adds to its callers' plans. At least one of ``rates`` and ``quota`` is there."""

    name: str
    per: Per
    rates: tuple[Rate, ...] = ()
    quota: Quota | None = None
    cost: int = 1
    of_plan: bool = False
    """Whether what a request costs its plan goes to this as well: the one limit of a middleware without a file."""


@final
@dataclass(frozen=True, slots=True)
class Streaming:
    max: int
    max_per_tenant: int | None = None


@final
@dataclass(frozen=True, slots=True)
class Route:
    """One entry of ``routes``. ``paths`` are templates: ``{name}`` is one segment, ``**`` any number of them."""

    name: str
    paths: tuple[str, ...]
    methods: frozenset[str] | None = None
    """``None`` is every method. HEAD and WebSocket are in it wherever GET is."""
    exempt: bool = False
    mode: Mode = Mode.ENFORCE
    cost: int = 1
    priority: str | None = None
    limits: tuple[RouteLimit, ...] = ()
    on_backend_failure: Failure | None = None
    streaming: Streaming | None = None


@final
@dataclass(frozen=True, slots=True)
class Identity:
    """Where a caller's name and address are read from.

    ``tenant`` lists ``("api_key", header)`` and ``("state", name)`` in the order in which they are tried; header names
    are lower case.
    """

    tenant: tuple[tuple[Literal["api_key", "state"], str], ...] = ()
    anonymous: Literal["per-ip", "shared", "deny"] = "per-ip"
    trusted_proxies: tuple[Network, ...] = ()
    trusted_hops: int = 0
    ipv6_prefix: int = 64
    header: Literal["x-forwarded-for", "forwarded"] = "x-forwarded-for"


@final
@dataclass(frozen=True, slots=True)
class Access:
    deny: tuple[Network, ...] = ()
    exempt: tuple[Network, ...] = ()


@final
@dataclass(frozen=True, slots=True)
class Priority:
    """One class of requests. ``queue_timeout_ns`` and ``min_share`` (0..1) are ``None`` where the default holds."""

    name: str
    queue_timeout_ns: int | None = None
    min_share: float | None = None


@final
@dataclass(frozen=True, slots=True)
class PriorityHeader:
    name: str
    raise_from: tuple[Network, ...] = ()


@final
@dataclass(frozen=True, slots=True)
class Shedding:
    algorithm: Literal["adaptive", "gradient2", "aimd", "fixed", "off"] = "adaptive"
    initial: int = 20
    min: int = 2
    max: int = 1000
    loop_lag_target_ns: int = 10_000_000
    status: int = 503
    body_timeout_ns: int | None = None


@final
@dataclass(frozen=True, slots=True)
class BackendSettings:
    type: Literal["memory", "redis", "limits"] = "memory"
    max_keys: int = 100_000
    url: str | None = field(default=None, repr=False)
    timeout_ns: int = 25_000_000
    on_failure: Failure = "local"
    key_prefix: str = "seawall"
    secret: str | None = field(default=None, repr=False)
    instances: int | None = None
    leases: bool = True
    deny_cache: bool = True
    snapshot: str | None = None


@final
@dataclass(frozen=True, slots=True)
class Responses:
    headers: Literal["draft-11", "legacy", "both", "off"] = "draft-11"
    detail: bool = True
    docs_url: str | None = None


@final
@dataclass(frozen=True, slots=True)
class Metrics:
    """``path`` ``None``: not served. ``allow`` ``None``: everybody. ``tenant_label`` 0: no series per tenant."""

    path: str | None = None
    allow: tuple[Network, ...] | None = None
    tenant_label: int = 0


@final
@dataclass(frozen=True, slots=True)
class Status:
    path: str
    allow: tuple[Network, ...]
    token: str | None = field(default=None, repr=False)


@final
@dataclass(frozen=True, slots=True)
class Policy:
    """The whole of a configuration. ``plans`` has every plan, ``default_plan`` and ``anonymous_plan`` name two.

    ``digest`` is the SHA-256 of what was loaded (files and includes, in order), in hexadecimal; ``warnings`` holds the
    rendered diagnostics of a load that succeeded.
    """

    mode: Mode = Mode.ENFORCE
    identity: Identity = Identity()
    plans: Mapping[str, Plan] = field(default_factory=dict)
    default_plan: str | None = None
    anonymous_plan: str | None = None
    tenants: Mapping[str, Tenant] = field(default_factory=dict)
    keys: Mapping[bytes, Key] = field(default_factory=dict)
    access: Access = Access()
    routes: tuple[Route, ...] = ()
    priorities: tuple[Priority, ...] = (Priority("critical"), Priority("normal"), Priority("low"))
    priority_header: PriorityHeader | None = None
    shedding: Shedding = Shedding()
    backend: BackendSettings = BackendSettings()
    responses: Responses = Responses()
    reload_ns: int | None = 2_000_000_000
    metrics: Metrics = Metrics()
    status: Status | None = None
    history: str | None = None
    digest: str = ""
    warnings: tuple[str, ...] = ()

    @property
    def middle_priority(self) -> str:
        """The priority of whoever declares none: ``normal``, or the middle class of the file."""
        names = [priority.name for priority in self.priorities]
        return "normal" if "normal" in names else names[(len(names) - 1) // 2]
