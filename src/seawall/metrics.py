"""Every metric in one list, counted in plain integers, read when somebody scrapes.

A child of prometheus-client costs 0.36 us an increment behind a lock, an element of a list 0.03: the request path adds
to `Cells`, at indices that were found when the policy was loaded, and a collector turns them into samples when somebody
asks. Labels come from the configuration alone, so the number of series is bounded by it.

Where processes have `METRICS_DIR` in common, each of them tells what all have counted: counters and histograms are sums
that never fall, whoever ends; gauges are of those that live and have served somebody, together as `Spec.together` says.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Awaitable, Callable, Iterable, Iterator
from itertools import chain, count
from statistics import fmean
from typing import Any, ClassVar, Protocol, TypeAlias, final, get_args
from urllib.parse import unquote_to_bytes
from weakref import WeakKeyDictionary, WeakSet

from prometheus_client import CollectorRegistry, make_asgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from seawall import ticker
from seawall.backends import CALL_RESULTS, Backend, Failure, SharedBackend
from seawall.cells import Cells as Cells
from seawall.cells import Reading as Reading
from seawall.cells import Spec as Spec
from seawall.cells import Values as Values
from seawall.rate import SECOND

OUTCOMES = ("allowed", "limited", "shed", "expired", "denied", "exempt", "cancelled")
ALLOWED, LIMITED, SHED, EXPIRED, DENIED, EXEMPT, CANCELLED = range(len(OUTCOMES))
DECISIONS = ("allow", "deny", "near")
ALLOW, DENY, NEAR = range(len(DECISIONS))

REQUEST_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
QUEUE_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
CALL_BOUNDS = (1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 0.1)
DECISION_BOUNDS = (5e-6, 1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 5e-3, 2.5e-2, 0.1)


REQUESTS = Spec(
    "seawall_requests_total",
    "counter",
    "Requests by how they were answered, each exactly once.",
    ("outcome", "priority"),
)
REJECTIONS = Spec(
    "seawall_rejections_total",
    "counter",
    "Refused requests by reason and by the policy with the longest wait.",
    ("reason", "policy", "plan", "priority"),
)
SHADOW_REJECTIONS = Spec(
    "seawall_shadow_rejections_total", "counter", "Requests that shadow mode would have refused.", REJECTIONS.labels
)
POLICY_CHECKS = Spec(
    "seawall_policy_checks_total",
    "counter",
    "Decisions of single policies; near: allowed with 80 % or more used.",
    ("policy", "plan", "decision"),
)
INFLIGHT = Spec("seawall_inflight_requests", "gauge", "Admitted requests that have not ended.", ("priority",))
QUEUED = Spec("seawall_queued_requests", "gauge", "Requests that wait to be admitted.", ("priority",))
STREAMS = Spec("seawall_streams", "gauge", "Open streams, by the rule whose budget they are in.", ("rule",))
CONCURRENCY_LIMIT = Spec("seawall_concurrency_limit", "gauge", "Requests that may be in flight at once, as of now.")
LIMIT_CHANGES = Spec(
    "seawall_concurrency_limit_changes_total", "counter", "Changes of a concurrency limit by their reason.", ("reason",)
)
LOOP_LAG = Spec("seawall_loop_lag_seconds", "gauge", "How late the event loop runs what is due.", together="max")
UTILIZATION = Spec(
    "seawall_utilization_ratio",
    "gauge",
    "Demand by capacity, 1 where the service is full and more where it sheds: what an autoscaler should follow.",
    together="mean",
)
QUEUE_WAIT = Spec(
    "seawall_queue_wait_seconds",
    "histogram",
    "Time requests waited to be admitted, by what became of them.",
    ("priority", "result"),
    QUEUE_BOUNDS,
)
IGNORED_HEADERS = Spec(
    "seawall_ignored_headers_total", "counter", "Deadline and priority headers that made no sense.", ("header",)
)
REQUEST_DURATION = Spec(
    "seawall_request_duration_seconds",
    "histogram",
    "Time admitted HTTP requests took in the application.",
    ("priority",),
    REQUEST_BOUNDS,
)
DECISION_DURATION = Spec(
    "seawall_decision_duration_seconds", "histogram", "Time it took to decide.", ("backend",), DECISION_BOUNDS
)
BACKEND_REQUESTS = Spec(
    "seawall_backend_requests_total",
    "counter",
    "Calls to the shared store by how they ended: ok, timeout, connection, error, mismatch.",
    ("backend", "result"),
)
BACKEND_DURATION = Spec(
    "seawall_backend_request_duration_seconds",
    "histogram",
    "Time calls to the shared store took.",
    ("backend",),
    CALL_BOUNDS,
)
BACKEND_UP = Spec(
    "seawall_backend_up",
    "gauge",
    "Whether the shared store is asked; 0 while it is known to be away.",
    ("backend",),
    together="min",
)
FALLBACKS = Spec(
    "seawall_backend_fallback_decisions_total",
    "counter",
    "Decisions without the shared store: by this process's share, or everything let in or refused.",
    ("action",),
)
TRACKED_KEYS = Spec("seawall_tracked_keys", "gauge", "Buckets and counters held in memory.", ("store",))
EVICTED_KEYS = Spec(
    "seawall_evicted_keys_total", "counter", "Buckets forgotten after they were full again.", ("store",)
)
CONFIG_RELOADS = Spec(
    "seawall_config_reloads_total",
    "counter",
    "Times that a changed configuration was read; failed: the last good one stays in force.",
    ("result",),
)
LAST_RELOAD = Spec(
    "seawall_config_last_reload_success_timestamp_seconds",
    "gauge",
    "When the policy in force was loaded, in seconds since 1970.",
    together="min",
)
CONFIG_INFO = Spec("seawall_config_info", "gauge", "The policy in force.", ("hash", "mode"), together="max")
BUILD_INFO = Spec("seawall_build_info", "gauge", "The running version.", ("version",), together="max")
TENANT_REQUESTS = Spec(
    "seawall_tenant_requests_total",
    "counter",
    "Requests of the busiest tenants; all others together are 'other'.",
    ("tenant", "outcome"),
)

CLIENT_ATTEMPTS = Spec(
    "seawall_client_attempts_total",
    "counter",
    "Requests that were sent, retries as well, by what came of them: 2xx to 5xx, or error.",
    ("host", "result"),
)
CLIENT_RETRIES = Spec(
    "seawall_client_retries_total",
    "counter",
    "Requests that were sent again, by why: unsent, transient or throttled.",
    ("host", "reason"),
)
CLIENT_REFUSALS = Spec(
    "seawall_client_refusals_total",
    "counter",
    "Requests that were not sent, by why: circuit_open, throttled, too_many_in_flight or deadline_exceeded.",
    ("host", "reason"),
)
CLIENT_HEDGES = Spec(
    "seawall_client_hedges_total",
    "counter",
    "Requests of which a second one was sent beside the first, by whether it was quicker: won or lost.",
    ("host", "result"),
)
CLIENT_BUDGET = Spec("seawall_client_budget_tokens", "gauge", "Tokens that are left for retries.", ("host",))
CLIENT_CIRCUITS = Spec(
    "seawall_client_open_circuits", "gauge", "Circuits that are open, or close again by degrees.", ("host",)
)

SPECS = (
    REQUESTS,
    REJECTIONS,
    SHADOW_REJECTIONS,
    POLICY_CHECKS,
    INFLIGHT,
    QUEUED,
    STREAMS,
    CONCURRENCY_LIMIT,
    LIMIT_CHANGES,
    LOOP_LAG,
    UTILIZATION,
    QUEUE_WAIT,
    IGNORED_HEADERS,
    REQUEST_DURATION,
    DECISION_DURATION,
    BACKEND_REQUESTS,
    BACKEND_DURATION,
    BACKEND_UP,
    FALLBACKS,
    TRACKED_KEYS,
    EVICTED_KEYS,
    CONFIG_RELOADS,
    LAST_RELOAD,
    CONFIG_INFO,
    BUILD_INFO,
    TENANT_REQUESTS,
    CLIENT_ATTEMPTS,
    CLIENT_RETRIES,
    CLIENT_REFUSALS,
    CLIENT_HEDGES,
    CLIENT_BUDGET,
    CLIENT_CIRCUITS,
)


@final
class BackendCalls:
    """The `Observer` that counts."""

    __slots__ = ("_actions", "_bounds", "_cells", "_results", "_seconds")

    def __init__(self, backend: str, cells: Cells) -> None:
        actions: tuple[Failure, ...] = get_args(Failure)
        self._cells = cells
        self._bounds = BACKEND_DURATION.bounds_ns
        self._seconds = cells.index(BACKEND_DURATION, backend)
        counted = cells.block(BACKEND_REQUESTS, "result", CALL_RESULTS, backend=backend)
        self._results = dict(zip(CALL_RESULTS, counted, strict=True))
        self._actions = dict(zip(actions, cells.block(FALLBACKS, "action", actions), strict=True))

    def called(self, result: str, took: int) -> None:
        values, bounds = self._cells.values, self._bounds
        values[self._results[result]] += 1
        values[self._seconds + bisect_left(bounds, took)] += 1
        values[self._seconds + len(bounds) + 1] += took

    def fell_back(self, action: Failure) -> None:
        self._cells.values[self._actions[action]] += 1


@final
class TenantLabels:
    """Which tenants have a series of their own: the busiest since the last `grant`, while labels are left.

    Granted labels are never revoked, or counters would vanish. What one process, or an earlier policy, has granted is
    granted in all, and only one of them grants at a time: over all processes there are at most ``top`` labels and
    "other", or as many as a larger ``top`` has granted before. The candidates are bounded as well.
    """

    def __init__(self, cells: Cells, top: int) -> None:
        self._cells = cells
        self.top = top
        self._granted: dict[str, tuple[int, ...]] = {}
        self._other = cells.block(TENANT_REQUESTS, "outcome", OUTCOMES, tenant="other")
        self._seen: dict[str, int] = {}
        self._adopt()

    def cell(self, tenant: str, outcome: int) -> int:
        """The cell in which a request of ``tenant`` is counted."""
        granted = self._granted.get(tenant)
        if granted is not None:
            return granted[outcome]
        seen = self._seen
        if tenant in seen:
            seen[tenant] += 1
        elif len(self._granted) < self.top and len(seen) < 16 * self.top:
            seen[tenant] = 1
        return self._other[outcome]

    def grant(self) -> None:
        """Give the labels that are left to the busiest. Any thread may, while requests are counted."""
        if not self._seen:
            return
        seen, self._seen = self._seen, {}
        with self._cells.alone() as alone:
            self._adopt()
            left = max(0, self.top - len(self._granted)) if alone else 0
            busiest = sorted(seen.keys() - self._granted.keys(), key=lambda name: (-seen[name], name))
            for tenant in busiest[:left]:
                self._label(tenant)

    def _adopt(self) -> None:
        for tenant, _ in self._cells.known(TENANT_REQUESTS):
            if tenant not in self._granted and tenant != "other":
                self._label(tenant)

    def _label(self, tenant: str) -> None:
        self._granted[tenant] = self._cells.block(TENANT_REQUESTS, "outcome", OUTCOMES, tenant=tenant)


ASGIApp: TypeAlias = Callable[[Any, Any, Any], Awaitable[None]]
_Family: TypeAlias = CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily


_BY_NAME = {spec.name: spec for spec in SPECS}
_TOGETHER: dict[str, Callable[[list[float]], float]] = {"sum": sum, "min": min, "max": max, "mean": fmean}


def _together(readings: Iterable[Reading]) -> list[Reading]:
    """One reading for each series, of all that there are."""
    values: dict[tuple[Spec, tuple[str, ...]], list[float]] = {}
    for spec, labels, value in readings:
        values.setdefault((spec, labels), []).append(value)
    return [(spec, labels, _TOGETHER[spec.together](several)) for (spec, labels), several in values.items()]


@final
class CellCollector(Collector):
    """Turns cells into samples. ``readings`` are asked at each scrape, ``before`` is called first."""

    def __init__(self, cells: Cells, readings: Callable[[], Iterable[Reading]], before: Callable[[], None]) -> None:
        self._cells = cells
        self._readings = readings
        self._before = before

    def describe(self) -> Iterable[Metric]:
        return [_family(spec) for spec in SPECS]

    def collect(self) -> Iterable[Metric]:
        self._before()
        readings = list(self._readings())
        self._cells.publish(readings)
        found = self._cells.together()
        families = {spec: _family(spec) for spec in SPECS}
        for (name, labels), cells in found.counts.items():
            spec = _BY_NAME.get(name)
            if spec is None or (spec.cells, len(spec.labels)) != (len(cells), len(labels)):
                continue  # another version's
            family = families[spec]
            if isinstance(family, HistogramMetricFamily):
                total, buckets = 0, []
                for cell, bound in zip(cells, (*map(str, spec.bounds), "+Inf"), strict=False):
                    total += cell
                    buckets.append((bound, float(total)))
                family.add_metric(labels, buckets, cells[-1] / SECOND)
            else:
                family.add_metric(labels, float(cells[0]))
        if self._cells.files is not None:
            # Counters were counted as they were published.
            readings = [reading for reading in readings if reading[0].kind == "gauge"]
            readings += [
                (spec, labels, value)
                for (name, labels), values in found.readings.items()
                if (spec := _BY_NAME.get(name)) is not None and len(spec.labels) == len(labels)
                for value in values
            ]
        for spec, labels, value in _together(readings):
            families[spec].add_metric(labels, value)  # type: ignore[call-arg, arg-type]  # none of them is a histogram
        return [family for family in families.values() if family.samples]


def _family(spec: Spec) -> _Family:
    if spec.kind == "counter":
        return CounterMetricFamily(spec.name, spec.help, labels=spec.labels)
    if spec.kind == "gauge":
        return GaugeMetricFamily(spec.name, spec.help, labels=spec.labels)
    return HistogramMetricFamily(spec.name, spec.help, labels=spec.labels)


class Source(Protocol):
    """Something that has readings for as long as it lives, and a backend that may be others' as well."""

    @property
    def backend(self) -> Backend: ...

    def readings(self) -> Iterable[Reading]: ...

    def before_scrape(self) -> None: ...


BEAT = 1.0
"""Seconds after which other processes see what is read off in this one."""
ROUND = 10
"""Beats after which what has ended is put into one file, and labels are granted."""


@final
class Publication:
    """What is published through one registry: the cells that all its sources add to, and their readings.

    Where several processes count, what one publishes in its first registry is added to what others do in theirs.
    """

    _all: ClassVar[WeakKeyDictionary[CollectorRegistry, Publication]] = WeakKeyDictionary()
    _ordinals: ClassVar[Iterator[int]] = count()

    def __init__(self, registry: CollectorRegistry) -> None:
        self.cells = Cells.of_environment(next(self._ordinals), self._begin)
        self.sources: WeakSet[Source] = WeakSet()
        self._chore: ticker.Chore | None = None
        self._beats = 0
        registry.register(CellCollector(self.cells, self._readings, self._before))

    @classmethod
    def of(cls, registry: CollectorRegistry | None) -> Publication:
        """The publication of ``registry``, or of `REGISTRY`; a second source on one registry joins the first."""
        registry = REGISTRY if registry is None else registry
        known = cls._all.get(registry)
        if known is None:
            known = cls._all[registry] = cls(registry)
        return known

    def _begin(self) -> None:
        if self._chore is None:
            self._chore = ticker.every(BEAT, self.beat)

    def beat(self) -> None:
        """Once a second, in a thread, where several processes count."""
        files = self.cells.files
        if files is None:
            return
        self.cells.publish(self._readings())
        self._beats += 1
        if self._beats % ROUND == 0:
            self._prepare()
            files.fold()

    def _before(self) -> None:
        if self.cells.files is None:
            self._prepare()

    def _prepare(self) -> None:
        for source in self._living():
            source.before_scrape()

    def _living(self) -> list[Source]:
        while True:
            try:
                return list(self.sources)
            except RuntimeError:
                continue  # another thread has just made one

    def _readings(self) -> list[Reading]:
        sources = self._living()
        # A backend once, however many use it.
        backends = {id(source.backend): source.backend for source in sources}.values()
        return _together(chain(*(source.readings() for source in sources), *map(_of_backend, backends)))


def _of_backend(backend: Backend) -> Iterable[Reading]:
    for store, numbers in backend.statistics().items():
        if "keys" in numbers:
            yield TRACKED_KEYS, (store,), numbers["keys"]
            yield EVICTED_KEYS, (store,), numbers["evicted"]
    if isinstance(backend, SharedBackend):
        yield BACKEND_UP, (backend.name,), float(backend.up)


_NEGOTIATED = frozenset({b"accept", b"accept-encoding"})

REGISTRY = CollectorRegistry(auto_describe=False)
"""Where middlewares publish that were given no registry: a registry of Seawall's own, not the process's."""


def metrics_app(registry: CollectorRegistry | None = None) -> ASGIApp:
    """An ASGI app to mount that answers a scrape in the format it asks for (text or OpenMetrics, plain or gzip).

    ``registry`` is the one that the middleware was given; without it, the one that middlewares use by themselves.
    """
    exposition: ASGIApp = make_asgi_app(REGISTRY if registry is None else registry)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            raise RuntimeError(f"metrics are served over HTTP, not {scope['type']}")
        # The library decodes whatever it finds, and falls over what is not UTF-8.
        headers = [(name, value) for name, value in scope["headers"] if name in _NEGOTIATED and value.isascii()]

        async def send_plain(message: Any) -> None:
            if message["type"] == "http.response.start":
                # ASGI has them in lower case, as the library has not.
                message = {**message, "headers": [(name.lower(), value) for name, value in message["headers"]]}
            elif scope["method"] == "HEAD":
                message = {**message, "body": b""}
            await send(message)

        query = scope.get("query_string", b"")
        try:
            unquote_to_bytes(query).decode()
        except UnicodeDecodeError:
            query = b""
        await exposition({**scope, "headers": headers, "query_string": query}, receive, send_plain)

    return app
