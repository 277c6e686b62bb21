"""The language, as models: what may be written, what each key means, what its value may be.

The models hold what was written, checked but not converted; `compile` turns them into a `Policy`. So that the JSON
Schema for editors comes from the same source, each key has its description here and nowhere else.

Blank values need no rule of their own: the reader has already refused every one of them, and what a model says about
a value of ``None`` or ``""`` is dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias, final

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    Tag,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from seawall.backends import Failure
from seawall.backends.redis import address
from seawall.config import values
from seawall.notation import (
    A_DURATION,
    A_QUOTA,
    A_RATE,
    DAY,
    HOUR,
    MILLISECOND,
    MINUTE,
    NotationError,
    check_zone,
    parse_duration,
    parse_quota,
    parse_rates,
)
from seawall.rate import MAX_AMOUNT, SECOND


def fault(code: str, message: str, expected: str = "", *, at: str = "") -> PydanticCustomError:
    """A mistake in a value. ``expected`` says what belongs there and quotes nothing; ``at`` is the key to point at."""
    # Pydantic renders messages as UTF-8; half a surrogate pair may come from a mapping or from the environment.
    message = message.encode(errors="backslashreplace").decode()
    return PydanticCustomError(
        "seawall", "{message}", {"code": code, "message": message, "expected": expected, "at": at}
    )


@final
@dataclass(frozen=True)
class Text:
    """The annotation of a text value: what refuses it, and what editors show and complete."""

    check: Callable[[Any], object]
    """Raises `ValueError` for what is wrong with a value."""
    expected: str
    examples: tuple[str, ...] = ()
    pattern: str | None = None
    code: str = "E014"
    any_type: bool = False
    """The check explains values of other types too: "10 has no time unit" is more help than "10 is not text"."""

    def validate(self, value: Any) -> Any:
        try:
            self.check(value)
        except NotationError as error:
            raise fault(error.code, error.message, error.expected) from None
        except ValueError as error:
            raise fault(getattr(error, "code", self.code), str(error), self.expected) from None
        return value

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema = handler(source)
        if self.any_type:
            return core_schema.no_info_before_validator_function(self.validate, schema)
        return core_schema.no_info_after_validator_function(self.validate, schema)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        described: dict[str, Any] = {"type": "string", "minLength": 1}
        if self.examples:
            described["examples"] = list(self.examples)
        if self.pattern is not None:
            described["pattern"] = self.pattern
        return described


def duration(shortest: int, longest: int, *examples: str, off: bool = False) -> Text:
    """The annotation of a duration between two lengths in nanoseconds; or ``off``."""

    def check(value: Any) -> None:
        if off and value == "off":
            return
        if not shortest <= parse_duration(value) <= longest:
            raise NotationError(f"'{value}' is out of range: {_long(shortest)} to {_long(longest)}", A_DURATION)

    return Text(check, A_DURATION, examples, _DURATION + ("|^off$" if off else ""), "E020", any_type=True)


def _long(length: int) -> str:
    units = ((DAY, "d"), (HOUR, "h"), (MINUTE, "m"), (SECOND, "s"), (MILLISECOND, "ms"))
    return next(f"{length // unit}{spelling}" for unit, spelling in units if length % unit == 0)


_COUNT = r"[0-9]+(_[0-9]+)*"
_ONE_RATE = rf"\s*{_COUNT}\s*(/|[pP][eE][rR])\s*({_COUNT})?\s*[A-Za-z]+\s*"
_RATE = rf"^{_ONE_RATE}(:?[,;|]{_ONE_RATE})*$|^unlimited$"
_QUOTA = rf"^\s*{_COUNT}\s*(/|[pP][eE][rR])\s*1?\s*([dD]|[dD][aA][yY][sS]?|[mM][oO][nN][tT][hH][sS]?)\s*$|^unlimited$"
_DURATION = rf"^\s*{_COUNT}\s*[A-Za-z]+\s*$"
_NAME = r"^[a-z0-9][a-z0-9_-]{0,63}$"

# The arms of a union are told apart by shape. Pydantic puts their tags into the places it reports; no key can be
# equal to one, because no text has a control character.
TEXT, MAPPING, LIST = "\0text", "\0mapping", "\0list"


def _shape(value: object) -> str:
    if isinstance(value, dict | BaseModel):
        return MAPPING
    return LIST if isinstance(value, list) else TEXT


BY_SHAPE = Discriminator(_shape)

RateText: TypeAlias = Annotated[
    str, Text(parse_rates, A_RATE, ("10/second", "5/15min", "1_000/day", "unlimited"), _RATE, any_type=True)
]
QuotaText: TypeAlias = Annotated[
    str, Text(parse_quota, A_QUOTA, ("10_000/day", "1_000_000/month", "unlimited"), _QUOTA, any_type=True)
]
Zone: TypeAlias = Annotated[str, Text(check_zone, "a time zone", ("Europe/Berlin", "America/New_York"), code="E021")]
Name: TypeAlias = Annotated[str, Text(values.check_name, "a name", pattern=_NAME, code="E032")]
LimitName: TypeAlias = Annotated[str, Text(values.check_limit_name, "a name", pattern=_NAME, code="E032")]
Reference: TypeAlias = str
"""A name that the file defines elsewhere: `checks` knows whether it does."""
TenantId: TypeAlias = Annotated[str, Text(values.check_tenant, "a tenant's id", code="E032")]
NetworkText: TypeAlias = Annotated[
    str, Text(values.network, "an address or network", ("10.0.0.0/8", "fd00::/8", "127.0.0.1"), code="E040")
]
TrustedNetwork: TypeAlias = Annotated[
    str, Text(values.check_trusted, "an address or network", ("10.0.0.0/8", "fd00::/8"), code="E040")
]
HeaderName: TypeAlias = Annotated[str, Text(values.check_header, "a header's name", ("X-API-Key",))]
StateName: TypeAlias = Annotated[str, Text(values.check_state, "a key of scope['state']", ("tenant_id",))]
PerText: TypeAlias = Annotated[
    str,
    Text(
        values.check_per,
        "client_ip, tenant, global or state:NAME",
        ("client_ip", "tenant", "global", "state:user_id"),
        r"^(client_ip|tenant|global|state:.+)$",
    ),
]
PathTemplate: TypeAlias = Annotated[
    str, Text(values.check_path, "a path", ("/login", "/v1/items/{id}", "/v1/events/**"), "^/", code="E042")
]
FileText: TypeAlias = Annotated[str, Text(values.check_file, "a file", ("seawall.history.jsonl",))]
ExactPath: TypeAlias = Annotated[str, Text(values.check_exact_path, "a path", ("/metrics",), "^/", code="E042")]
Method: TypeAlias = Annotated[str, Text(values.check_method, "a method such as GET", values.METHODS)]
KeyHash: TypeAlias = Annotated[
    str,
    Text(
        values.key_digest, "a key's hash, made by `seawall hash-key`", pattern=r"^sha256:[0-9a-fA-F]{64}$", code="E033"
    ),
]
Expiry: TypeAlias = Annotated[
    str, Text(values.expiry, "a day such as 2027-06-30", ("2027-06-30", "2027-06-30T12:00:00Z"))
]
Percentage: TypeAlias = Annotated[
    str, Text(values.percentage, "a percentage such as 2%", ("2%",), r"^\s*[0-9.]+\s*%\s*$", any_type=True)
]
Mode: TypeAlias = Literal["off", "shadow", "enforce"]
Cost: TypeAlias = Annotated[int, Field(ge=1, le=1_000_000)]
Count: TypeAlias = Annotated[int, Field(ge=1, le=1_000_000)]


class Section(BaseModel):
    """A mapping with known keys and nothing else."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, hide_input_in_errors=True)


class RateForm(Section):
    """A rate with a burst of its own."""

    limit: RateText = Field(description="The rate.")
    burst: Annotated[int, Field(ge=1, le=MAX_AMOUNT)] | None = Field(
        None,
        description="How many requests may come at once after a pause. Default: the rate's amount.",
        examples=[300],
    )

    @model_validator(mode="after")
    def _one_rate(self) -> RateForm:
        try:
            parse_rates(self.limit, self.burst)
        except NotationError as error:
            raise fault(error.code, error.message, error.expected, at="burst") from None
        return self


RateItem: TypeAlias = Annotated[Annotated[RateText, Tag(TEXT)] | Annotated[RateForm, Tag(MAPPING)], BY_SHAPE]
Rates: TypeAlias = Annotated[
    Annotated[RateText, Tag(TEXT)]
    | Annotated[RateForm, Tag(MAPPING)]
    | Annotated[list[RateItem], Field(min_length=1, max_length=8), Tag(LIST)],
    BY_SHAPE,
]


class QuotaForm(Section):
    """A quota by the calendar of a time zone."""

    limit: QuotaText = Field(description="The quota, per calendar day or month.")
    zone: Zone = Field("UTC", description="The IANA time zone whose midnight begins a day. Default: UTC.")


Quotas: TypeAlias = Annotated[Annotated[QuotaText, Tag(TEXT)] | Annotated[QuotaForm, Tag(MAPPING)], BY_SHAPE]

_RATE_HELP = (
    "A token bucket: 10/second, 5/15min, {limit: 100/second, burst: 300}, a list of rates that all hold, or unlimited."
)
_QUOTA_HELP = "A calendar quota: 10_000/day, 1_000_000/month, {limit: 10_000/day, zone: Europe/Berlin} or unlimited."
_PRIORITY_HELP = "The class of these requests, one of `priorities`: what matters least is refused first."
_MODE_HELP = "off: nothing is counted or refused. shadow: count what would be refused. enforce: refuse. "


class ApiKeySource(Section):
    """A tenant known by its API key."""

    header: HeaderName = Field(description="The request header that carries the key.")


class TenantSource(Section):
    """One way to learn a request's tenant."""

    api_key: ApiKeySource | None = Field(None, description="Look the key up by its SHA-256 in tenants.<id>.keys.")
    state: StateName | None = Field(
        None, description="Take the tenant from scope['state'], set by an authentication middleware outside Seawall."
    )

    @model_validator(mode="after")
    def _one_of_them(self) -> TenantSource:
        if (self.api_key is None) == (self.state is None):
            raise fault("E015", "a source of tenants is either {api_key: {header: ...}} or {state: ...}")
        return self


class ClientIp(Section):
    """How a caller's address is found behind proxies."""

    trusted_proxies: list[TrustedNetwork] | None = Field(
        None, description="Networks whose forwarding header is believed. Default: nobody's."
    )
    trusted_hops: Annotated[int, Field(ge=1, le=32)] | None = Field(
        None, description="Instead of networks: believe this many hops, counted from the right.", examples=[1]
    )
    ipv6_prefix: Annotated[int, Field(ge=32, le=128)] = Field(
        64, description="One bucket per IPv6 network of this size. Default: 64, what one household gets."
    )
    header: Literal["x-forwarded-for", "forwarded"] = Field(
        "x-forwarded-for", description="The one forwarding header that is read. Default: x-forwarded-for."
    )

    @model_validator(mode="after")
    def _one_kind_of_trust(self) -> ClientIp:
        if self.trusted_proxies is not None and self.trusted_hops is not None:
            raise fault("E015", "trusted_proxies and trusted_hops exclude each other", at="trusted_hops")
        if values.covers_everything(self.trusted_proxies or ()):
            raise fault("E041", "together these networks are every address", at="trusted_proxies")
        return self


class Identity(Section):
    """Who a request is from."""

    tenant: list[TenantSource] = Field(
        default=[], max_length=16, description="Tried in order; the first that yields a value wins."
    )
    anonymous: Literal["per-ip", "shared", "deny"] = Field(
        "per-ip",
        description="What a request without a tenant is: one caller per address, one for all, or refused (401).",
    )
    client_ip: ClientIp = Field(default=ClientIp(), description="How a caller's address is found behind proxies.")


class Defaults(Section):
    """The plans of whoever has none."""

    plan: Reference | None = Field(
        None, description="The plan of a tenant without one. Default: the plan `default`, else the only plan."
    )
    anonymous_plan: Reference | None = Field(
        None, description="The plan of callers without a tenant. Default: the plan `anonymous`, else the default plan."
    )


class Plan(Section):
    """What one class of callers may do. What is left out is unlimited."""

    rate: Rates | None = Field(None, description=_RATE_HELP)
    quota: Quotas | None = Field(None, description=_QUOTA_HELP)
    concurrency: Count | None = Field(None, description="Requests of one caller in flight at once.", examples=[5])
    priority: Reference | None = Field(None, description=_PRIORITY_HELP)
    mode: Mode | None = Field(None, description=_MODE_HELP + "May only lower the file's mode.")


class Overrides(Section):
    """What one tenant has instead of its plan's values."""

    rate: Rates | None = Field(None, description="Instead of the plan's rate, burst included. " + _RATE_HELP)
    quota: Quotas | None = Field(None, description="Instead of the plan's quota. " + _QUOTA_HELP)
    concurrency: Count | None = Field(None, description="Instead of the plan's concurrency.")
    priority: Reference | None = Field(None, description="Instead of the plan's priority.")


class KeyForm(Section):
    """An API key that expires."""

    hash: KeyHash = Field(description="sha256: and the SHA-256 of the key, as `seawall hash-key` prints it.")
    expires: Expiry | None = Field(None, description="The last day (UTC) on which it is valid, or an ISO 8601 time.")


TenantKey: TypeAlias = Annotated[Annotated[KeyHash, Tag(TEXT)] | Annotated[KeyForm, Tag(MAPPING)], BY_SHAPE]


class Terms(Section):
    """What one caller may do that is known by name."""

    plan: Reference | None = Field(None, description="One of `plans`. Default: defaults.plan.")
    priority: Reference | None = Field(None, description=_PRIORITY_HELP + " Wins over the route's and the plan's.")
    mode: Mode | None = Field(None, description=_MODE_HELP + "May only lower the file's mode.")
    overrides: Overrides | None = Field(None, description="Values that replace the plan's for this tenant.")


class RuntimeTenant(Terms):
    """A caller that a database knows."""

    id: TenantId | None = Field(None, description="Its id, where it was found by something else.")


class Tenant(Terms):
    """One caller that is known by name."""

    keys: list[TenantKey] = Field(
        default=[], max_length=100, description="Hashes of its API keys. Several may be live while one is rotated."
    )


class Access(Section):
    """Rules by client address, before identity."""

    deny: list[NetworkText] = Field(default=[], max_length=10_000, description="Refused with 403.")
    exempt: list[NetworkText] = Field(default=[], max_length=10_000, description="Neither limited nor sampled.")


class Match(Section):
    """Which requests a route is about."""

    path: Annotated[
        Annotated[PathTemplate, Tag(TEXT)]
        | Annotated[list[PathTemplate], Field(min_length=1, max_length=1000), Tag(LIST)],
        BY_SHAPE,
    ] = Field(description="A path or a list of paths: {name} is one segment, ** any number of them.")
    methods: Annotated[list[Method], Field(min_length=1, max_length=32)] | None = Field(
        None, description="Default: every method. GET includes HEAD and WebSocket.", examples=[["POST"]]
    )


class RouteLimit(Section):
    """A limit of one route, on top of its callers' plans. It has a rate, a quota, or both."""

    rate: Rates | None = Field(None, description=_RATE_HELP)
    quota: Quotas | None = Field(None, description=_QUOTA_HELP)
    per: Annotated[
        Annotated[PerText, Tag(TEXT)] | Annotated[list[PerText], Field(min_length=1, max_length=8), Tag(LIST)], BY_SHAPE
    ] = Field(description="Whose bucket it is: client_ip, tenant, global, state:NAME, or a list of them together.")
    cost: Cost = Field(1, description="What one request takes. Default: 1, whatever the route's cost.")

    @model_validator(mode="after")
    def _limits_something(self) -> RouteLimit:
        if self.rate is None and self.quota is None:
            raise fault("E011", "a limit needs a 'rate' or a 'quota'")
        if not rates(self.rate) and (self.quota is None or self.quota == "unlimited"):
            raise fault("E015", "this limit limits nothing: it is unlimited", at="rate")
        if isinstance(self.per, list):
            if len(set(self.per)) < len(self.per):
                raise fault("E015", "the same is there twice", at="per")
            if "global" in self.per and len(self.per) > 1:
                raise fault("E015", "'global' is one bucket for all; it cannot be combined", at="per")
        return self


class Streaming(Section):
    """A budget of its own for server-sent events and WebSockets."""

    max: Count = Field(description="Streams open at once in one process.", examples=[500])
    max_per_tenant: Count | None = Field(None, description="Streams of one caller open at once.", examples=[10])

    @model_validator(mode="after")
    def _part_of_the_whole(self) -> Streaming:
        if self.max_per_tenant is not None and self.max_per_tenant > self.max:
            raise fault("E015", f"max_per_tenant is more than max ({self.max})", at="max_per_tenant")
        return self


class Route(Section):
    """A rule for some paths. The first that matches a request wins."""

    name: Name = Field(description="A name, unique in the file: in metrics, logs and `seawall explain`.")
    match: Match = Field(description="Which requests it is about.")
    exempt: bool = Field(False, description="Neither limited nor sampled, but still counted.")
    mode: Mode | None = Field(None, description=_MODE_HELP + "May only lower the file's mode.")
    cost: Cost = Field(1, description="What one request takes from its caller's own rate and quota. Default: 1.")
    priority: Reference | None = Field(None, description=_PRIORITY_HELP + " Wins over the plan's.")
    limits: dict[LimitName, RouteLimit] = Field(
        default={}, description="Further limits by name. A name is unique in the file: one bucket per name and caller."
    )
    on_backend_failure: Failure | None = Field(
        None, description="While shared state is away: this process's share (local), let in (allow), refuse (deny)."
    )
    streaming: Streaming | None = Field(None, description="A budget of its own for long-lived answers.")

    @model_validator(mode="after")
    def _exempt_from_what(self) -> Route:
        if self.exempt:
            for key in ("limits", "cost", "priority", "streaming", "on_backend_failure"):
                if key in self.model_fields_set:
                    raise fault("E015", f"an exempt route has no {key}", at=key)
        return self


class Queue(Section):
    """Waiting for a place."""

    timeout: Annotated[str, duration(MILLISECOND, MINUTE, "250ms")] | None = Field(
        None, description="How long a request may wait before it is refused."
    )


class Priority(Section):
    """One class of requests."""

    queue: Queue | None = Field(None, description="How its requests wait.")
    min_share: Percentage | None = Field(
        None, description="The part of the service that keeps this class from starving."
    )


class PriorityHeader(Section):
    """A request header by which callers lower their own priority."""

    name: HeaderName = Field(description="The header, such as X-Request-Priority.")
    raise_from: list[TrustedNetwork] = Field(
        default=[], max_length=1000, description="Peers whose header may also raise the priority. Default: nobody's."
    )

    @model_validator(mode="after")
    def _not_everybody(self) -> PriorityHeader:
        if values.covers_everything(self.raise_from):
            raise fault("E041", "together these networks are every address", at="raise_from")
        return self


class ConcurrencyLimit(Section):
    """The bounds of the adaptive limit."""

    initial: Count = Field(20, description="Where it starts. Default: 20.")
    min: Count = Field(2, description="It never goes below. Default: 2.")
    max: Count = Field(1000, description="It never goes above. Default: 1000.")

    @model_validator(mode="after")
    def _in_order(self) -> ConcurrencyLimit:
        if self.min > self.max:
            raise fault("E015", f"min ({self.min}) is more than max ({self.max})", at="min")
        if not self.min <= self.initial <= self.max:
            raise fault("E015", f"initial is {self.initial}, and not in {self.min}..{self.max}", at="initial")
        return self


class Shedding(Section):
    """How much the service takes at once, and what it answers beyond."""

    algorithm: Literal["adaptive", "gradient2", "aimd", "fixed", "off"] = Field(
        "adaptive", description="The law that moves the concurrency limit. Default: adaptive."
    )
    limit: ConcurrencyLimit = Field(default=ConcurrencyLimit(), description="The bounds of the concurrency limit.")
    loop_lag_target: Annotated[str, duration(MILLISECOND, 10 * SECOND, "10ms")] = Field(
        "10ms", description="How late the event loop may run before requests are refused. Default: 10ms."
    )
    status: int = Field(503, description="The status of these refusals: 503, another 5xx, or 429. Default: 503.")
    body_timeout: Annotated[str, duration(100 * MILLISECOND, HOUR, "10s")] | None = Field(
        None, description="How long a slow upload may hold a place."
    )

    @model_validator(mode="after")
    def _a_refusal(self) -> Shedding:
        if self.status != 429 and not 500 <= self.status <= 599:
            raise fault("E014", f"status is a 5xx or 429, not {self.status}", at="status")
        return self


class Backend(Section):
    """Where the state of limits is kept."""

    type: Literal["memory", "redis", "limits"] = Field(
        "memory", description="memory: this process. redis: shared. limits: any storage of the limits library."
    )
    max_keys: Annotated[int, Field(ge=1_000, le=10_000_000)] = Field(
        100_000, description="Callers tracked in memory; full buckets are forgotten first. Default: 100_000."
    )
    url: (
        Annotated[str, Text(values.check_url, "a backend's url", ("redis://localhost:6379/0", "${REDIS_URL}"))] | None
    ) = Field(
        None,
        description=(
            "redis://, rediss://, valkey://, unix://, redis+sentinel://, redis+cluster://; or a storage URI of limits."
        ),
    )
    timeout: Annotated[str, duration(MILLISECOND, 10 * SECOND, "25ms")] = Field(
        "25ms", description="The time for one decision, hard. Default: 25ms."
    )
    on_failure: Failure = Field(
        "local", description="While shared state is away: this process's share (local), let in (allow), refuse (deny)."
    )
    key_prefix: Annotated[str, Text(values.check_key_prefix, "a key prefix", ("seawall",))] = Field(
        "seawall", description="What shared keys begin with. Default: seawall."
    )
    secret: Annotated[str, Text(values.check_secret, "a secret", ("${SEAWALL_SECRET}",))] | None = Field(
        None, description="Keys the hashes under which identities are stored."
    )
    instances: Annotated[int, Field(ge=1, le=10_000)] | None = Field(
        None, description="Processes that are expected, for the local share. Default: counted."
    )
    leases: bool = Field(
        True, description="Serve hot keys from tokens taken ahead. false: one exact call per decision."
    )
    deny_cache: bool = Field(True, description="Answer a known refusal without a call until its retry time.")
    snapshot: FileText | None = Field(
        None, description="Where quotas kept in memory outlive a restart, relative to this file. Default: nowhere."
    )

    @model_validator(mode="after")
    def _has_its_url(self) -> Backend:
        if self.type == "memory" and self.url is not None:
            raise fault("E015", "a url needs 'type: redis' or 'type: limits': memory is never shared", at="url")
        if self.type != "memory" and self.snapshot is not None:
            raise fault(
                "E015", "a snapshot needs 'type: memory': shared state outlives a restart by itself", at="snapshot"
            )
        if self.type != "memory" and self.url is None:
            raise fault("E011", f"'type: {self.type}' needs a 'url'", at="type")
        if self.type == "redis" and self.url is not None:
            try:
                address.parse(self.url)
            except address.AddressError as error:
                raise fault("E014", str(error), "a redis url", at="url") from None
        return self


class Responses(Section):
    """What callers are told."""

    headers: Literal["draft-11", "legacy", "both", "off"] = Field(
        "draft-11", description="RateLimit (IETF draft), X-RateLimit-* (legacy), both, or none. Default: draft-11."
    )
    detail: bool = Field(True, description="Say which policy refused, and for how long.")
    docs_url: (
        Annotated[str, Text(values.check_docs_url, "an http(s) address", ("https://example.com/limits",), "^https?://")]
        | None
    ) = Field(None, description="A page about your limits, linked from every refusal.")


class TopTenants(Section):
    """A series for each of the busiest tenants."""

    top: Annotated[int, Field(ge=1, le=1000)] = Field(description="How many; the rest is 'other'.", examples=[20])


class Metrics(Section):
    """Prometheus metrics."""

    path: ExactPath | None = Field(None, description="Where they are served. Default: nowhere.")
    allow: list[NetworkText] | None = Field(
        None, max_length=1000, description="Peers that are answered. Default: everybody, with a warning."
    )
    tenant_label: Annotated[Annotated[Literal["off"], Tag(TEXT)] | Annotated[TopTenants, Tag(MAPPING)], BY_SHAPE] = (
        Field("off", description="off, or {top: 20}: a series for each of the 20 busiest tenants, the rest is 'other'.")
    )


class Status(Section):
    """The status page, as JSON and HTML."""

    path: ExactPath = Field("/-/seawall", description="Where it is served. Default: /-/seawall.")
    allow: list[NetworkText] = Field(min_length=1, max_length=1000, description="Peers that are answered. Required.")
    token: Annotated[str, Text(values.check_token, "a token", ("${SEAWALL_TOKEN}",))] | None = Field(
        None, description="What a peer has to show to block or reset a tenant. Default: nobody may."
    )


Includes: TypeAlias = Annotated[
    str, Text(values.check_include, "a pattern such as tenants.d/*.yaml", ("tenants.d/*.yaml",), code="E050")
]


class Included(Section):
    """A file that another one includes: tenants, and nothing else."""

    # Other keys are refused by `loading`, which can say that they belong into the main file.
    model_config = ConfigDict(extra="ignore")

    tenants: dict[TenantId, Tenant] = Field(description="Tenants by their id.")


class File(Section):
    """Seawall's configuration: plans, tenants and routes, and how the service protects itself."""

    version: Annotated[int, Field(json_schema_extra={"const": 1})] = Field(
        description="The version of the language. It is 1."
    )
    mode: Mode = Field("enforce", description=_MODE_HELP + "Plans, tenants and routes may lower it. Default: enforce.")
    identity: Identity = Field(default=Identity(), description="Who a request is from.")
    defaults: Defaults = Field(default=Defaults(), description="The plans of whoever has none.")
    plans: dict[Name, Plan] = Field(default={}, description="Plans by name: what one class of callers may do.")
    tenants: dict[TenantId, Tenant] = Field(default={}, description="Tenants by their id.")
    include: (
        Annotated[
            Annotated[Includes, Tag(TEXT)] | Annotated[list[Includes], Field(min_length=1, max_length=100), Tag(LIST)],
            BY_SHAPE,
        ]
        | None
    ) = Field(None, description="Files with further tenants, relative to this one: a pattern or a list of them.")
    access: Access = Field(default=Access(), description="Rules by client address, before identity.")
    routes: list[Route] = Field(default=[], max_length=10_000, description="Top to bottom, the first match wins.")
    priorities: Annotated[dict[Name, Priority], Field(min_length=1, max_length=16)] | None = Field(
        None, description="Classes of requests, the highest first. Default: critical, normal, low."
    )
    priority_header: PriorityHeader | None = Field(None, description="A header by which callers lower their priority.")
    shedding: Shedding = Field(default=Shedding(), description="What the service takes at once, and beyond.")
    backend: Backend = Field(default=Backend(), description="Where the state of limits is kept.")
    responses: Responses = Field(default=Responses(), description="What callers are told.")
    reload: Annotated[str, duration(100 * MILLISECOND, DAY, "2s", "off", off=True)] = Field(
        "2s", description="How often the file's content is checked for changes; or off. Default: 2s."
    )
    history: FileText | None = Field(
        None,
        description="Where each change of this configuration is recorded, relative to this file. Default: nowhere.",
    )
    metrics: Metrics = Field(default=Metrics(), description="Prometheus metrics.")
    status: Status | None = Field(None, description="The status page. Default: none.")

    @model_validator(mode="after")
    def _two_paths(self) -> File:
        if self.status is not None and self.metrics.path == self.status.path:
            raise fault("E015", f"metrics and status are both at '{self.status.path}'", at="status")
        return self


def rates(written: Rates | None) -> tuple[Any, ...]:
    """The `Rate` values of a ``rate`` that has been checked."""
    if written is None:
        return ()
    return tuple(
        rate
        for item in (written if isinstance(written, list) else [written])
        for rate in (parse_rates(item) if isinstance(item, str) else parse_rates(item.limit, item.burst))
    )
