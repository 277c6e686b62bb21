"""What dashboards and rules ask for exists: in what a gate publishes, and in a Prometheus that scrapes one."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families as parse

from harness import KEY, OTHER_KEY, hash_of, hello
from seawall import Seawall
from seawall.client import CircuitOpen, ResilientTransport, RetryPolicy
from seawall.metrics import REGISTRY, SPECS
from seawall.monitoring.alerts import Record, Settings, groups
from seawall.monitoring.dashboards import dashboards
from seawall.monitoring.promql import TARGET
from seawall.testing import drive
from serving import ROOT, Served, asgi_server, free_port, serving
from stores import Server

COMPOSE = ROOT / "examples" / "compose"
ACME, TRIALIST = {"X-API-Key": KEY}, {"X-API-Key": OTHER_KEY}


def panels() -> dict[str, list[str]]:
    """The queries of each panel, and of the variables and annotations, by what they are called."""
    found: dict[str, list[str]] = {}
    for dashboard in dashboards():
        document = json.loads(dashboard.render())
        for panel in document["panels"]:
            if panel["type"] != "row":
                found[f"{dashboard.name}: {panel['title']}"] = [target["expr"] for target in panel["targets"]]
        for variable in document["templating"]["list"]:
            if variable["type"] == "query":
                selector = re.fullmatch(r"label_values\((.*), \w+\)", variable["definition"])
                assert selector is not None
                found[f"{dashboard.name}: ${variable['name']}"] = [selector[1]]
        found[f"{dashboard.name}: annotations"] = [
            annotation["expr"] for annotation in document["annotations"]["list"] if "expr" in annotation
        ]
    return found


def expressions() -> dict[str, list[str]]:
    """All that is asked for, by who asks."""
    rules = [rule for group in groups(Settings()) for rule in group.rules]
    asked = {f"{rule.name} {n}": [rule.expression] for n, rule in enumerate(rules)}
    return {**panels(), **asked}


def selectors(expression: str) -> Iterator[tuple[str, dict[str, tuple[str, str]]]]:
    """Each metric of Seawall that is asked for, and by label the operator and the value that it has to have."""
    for name, matchers in re.findall(r"(?<![\w:])(seawall_\w+)(?:\{([^}]*)\})?", expression):
        found = re.findall(r'(\w+)(=~|!=|!~|=)"([^"]*)"', matchers)
        yield name, {label: (operator, value) for label, operator, value in found}


# A live scrape


def settings(store: Server) -> dict[str, Any]:
    return {
        "version": 1,
        "reload": "100ms",
        "identity": {"tenant": [{"api_key": {"header": "X-API-Key"}}]},
        "plans": {
            "default": {"rate": "3/hour", "quota": "1000/day"},
            "trial": {"rate": "1/hour", "mode": "shadow", "priority": "low"},
            "free": {"rate": "unlimited", "priority": "critical"},
        },
        "defaults": {"plan": "default", "anonymous_plan": "free"},
        "tenants": {
            "acme": {"plan": "default", "keys": [hash_of(KEY)]},
            "globex": {"plan": "default", "keys": [hash_of("third")]},
            "trialist": {"plan": "trial", "keys": [hash_of(OTHER_KEY)]},
        },
        "access": {"deny": ["198.51.100.0/24"]},
        "routes": [
            {"name": "probes", "match": {"path": "/healthz"}, "exempt": True},
            {"name": "live", "match": {"path": "/events"}, "streaming": {"max": 5}},
            {
                "name": "login",
                "match": {"path": "/login"},
                "limits": {"login-ip": {"rate": "100/hour", "per": "client_ip"}},
                "on_backend_failure": "deny",
            },
        ],
        "priorities": {"critical": {"queue": {"timeout": "50ms"}}, "normal": {}, "low": {}},
        "shedding": {"algorithm": "fixed", "limit": {"initial": 1, "min": 1, "max": 1}},
        "backend": {"type": "redis", "url": store.url, "secret": "a secret of the tests", "timeout": "500ms"},
        "metrics": {"path": "/metrics", "allow": ["192.0.2.1"], "tenant_label": {"top": 5}},
    }


class Busy:
    """An application that holds ``/hold`` and ``/events`` until it is let go on."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.held = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/events":
            await send({"type": "http.response.start", "status": 200, "headers": []})
        if scope["path"] in ("/hold", "/events"):
            self.held += 1
            await self.gate.wait()
        if scope["path"] == "/events":
            return await send({"type": "http.response.body", "body": b""})
        await hello(scope, receive, send)


async def until(true: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline, what
        await asyncio.sleep(0.01)


async def scraped(store: Server, write: Callable[[dict[str, Any]], Path]) -> str:
    """A scrape of a gate to which everything has happened that is counted."""
    configuration = settings(store)
    registry, inner = CollectorRegistry(), Busy()
    app = Seawall(inner, config=write(configuration), registry=registry)
    try:
        await happen(app, inner, registry, store, lambda **changes: write({**configuration, **changes}))
        await grow(registry)
        await call_others()
        return (generate_latest(registry) + generate_latest(REGISTRY)).decode()
    finally:
        inner.gate.set()
        await app.backend.aclose()


async def grow(registry: CollectorRegistry) -> None:
    """Let the limit of another gate grow: it is used up, and the loop has time."""
    inner = Busy()
    shedding = {"limit": {"initial": 2, "min": 2, "max": 100}, "loop_lag_target": "10s"}
    plans = {"default": {"rate": "unlimited"}}
    app = Seawall(inner, config={"version": 1, "plans": plans, "shedding": shedding}, registry=registry)
    held = [asyncio.create_task(drive(app, "/hold")) for _ in range(2)]
    await until(lambda: "seawall_concurrency_limit_changes_total{" in generate_latest(registry).decode(), "it grows")
    inner.gate.set()
    await asyncio.gather(*held)


async def call_others() -> None:
    """Let a client do all that it counts, with a host that is well, then slow, and then broken."""
    late, status = asyncio.Event(), 200

    async def answer(request: httpx2.Request) -> httpx2.Response:
        if late.is_set():
            late.clear()
            await asyncio.sleep(30)  # a second request is quicker
        return httpx2.Response(status)

    transport = ResilientTransport(httpx2.MockTransport(answer), hedge=True, retry=RetryPolicy(base=0))
    async with httpx2.AsyncClient(transport=transport) as client:
        for _ in range(30):
            assert (await client.get("http://other/")).status_code == 200
        late.set()
        assert (await client.get("http://other/")).status_code == 200
        status = 500
        with pytest.raises(CircuitOpen):
            await ask_on(client)


async def ask_on(client: httpx2.AsyncClient) -> None:
    for _ in range(100):
        await client.get("http://other/")


async def happen(
    app: Seawall, inner: Busy, registry: CollectorRegistry, store: Server, change: Callable[..., Path]
) -> None:
    async def status(where: str = "/", **how: Any) -> int:
        return (await drive(app, where, **how)).status

    def value(name: str, **labels: str) -> float:
        return registry.get_sample_value(name, labels) or 0

    assert [await status(headers=ACME) for _ in range(5)] == [200] * 3 + [429] * 2
    assert [await status(headers=TRIALIST) for _ in range(3)] == [200] * 3
    assert await status("/healthz") == 200
    assert await status(client=("198.51.100.1", 1)) == 403
    assert await status(headers={"X-Request-Timeout-Ms": "0"}) == 504
    assert await status(headers={"X-Request-Timeout-Ms": "soon"}) == 200
    assert await status("/metrics") == 200, "which gives the tenants their labels"
    assert await status(headers=ACME) == 429

    stream, hold = (asyncio.create_task(status(where)) for where in ("/events", "/hold"))
    await until(lambda: inner.held == 2, "a stream and a request are held")
    assert await status() == 503, "nobody leaves while it waits"
    waiting, leaving = (asyncio.create_task(status()) for _ in range(2))
    await until(lambda: value("seawall_queued_requests", priority="critical") == 2, "somebody waits")
    leaving.cancel()

    change(plans={})
    await until(lambda: value("seawall_config_reloads_total", result="failed") == 1, "a reload has failed")
    change(mode="enforce")
    await until(lambda: value("seawall_config_reloads_total", result="ok") == 1, "a reload was right")

    store.freeze()
    try:
        inner.gate.set()
        await asyncio.gather(stream, hold, waiting, leaving, return_exceptions=True)
        assert await status(headers={"X-API-Key": "third"}) == 200
        assert await status("/login") == 503
    finally:
        store.thaw()


@pytest.fixture(scope="module")
def live(valkey: Server, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Mapping[str, str]]]:
    """The labels of each sample of a live scrape, by the sample's name."""
    path = tmp_path_factory.mktemp("live") / "seawall.yaml"

    def write(configuration: dict[str, Any]) -> Path:
        path.write_text(yaml.safe_dump(configuration), encoding="utf-8")
        return path

    text = asyncio.run(scraped(valkey, write))
    found: dict[str, list[Mapping[str, str]]] = {}
    for family in parse(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample.labels)
    return found


Live = dict[str, list[Mapping[str, str]]]


def test_every_metric_that_is_asked_for_is_in_a_live_scrape(live: Live) -> None:
    asked = {name for queries in expressions().values() for query in queries for name, _ in selectors(query)}
    assert asked - set(live) == set()


def test_every_metric_in_the_list_is_asked_for_and_published(live: Live) -> None:
    asked = {name for queries in panels().values() for query in queries for name, _ in selectors(query)}
    for spec in SPECS:
        parts = [f"{spec.name}_{part}" for part in ("bucket", "count")] if spec.kind == "histogram" else [spec.name]
        assert asked.intersection(parts), spec.name
        assert live.keys() >= set(parts), spec.name


def test_every_label_and_value_that_is_asked_for_is_in_a_live_scrape(live: Live) -> None:
    for who, queries in expressions().items():
        for query in queries:
            for name, matchers in selectors(query):
                for label, (operator, value) in matchers.items():
                    if label in TARGET:
                        continue
                    there = {labels[label] for labels in live[name]}
                    if not value.startswith("$"):
                        wanted = set(value.split("|")) if operator == "=~" else {value}
                        assert wanted <= there, (who, name, label)


def test_every_label_of_an_aggregation_or_a_legend_is_one_of_a_metric(live: Live) -> None:
    for who, queries in expressions().items():
        for query in queries:
            known = {*TARGET, *(label for name, _ in selectors(query) for labels in live[name] for label in labels)}
            grouped = {label for by in re.findall(r"by \(([^)]*)\)", query) for label in by.split(", ")}
            assert grouped <= known, who
    for dashboard in dashboards():
        for panel in json.loads(dashboard.render())["panels"]:
            for target in panel.get("targets", ()):
                kept = {label for by in re.findall(r"by \(([^)]*)\)", target["expr"]) for label in by.split(", ")}
                assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= kept, panel["title"]


def test_what_alerts_count_is_there_before_it_has_happened(store: Server, tmp_path: Path) -> None:
    """Prometheus sees no increase in the first value of a series."""
    path, registry = tmp_path / "seawall.yaml", CollectorRegistry()
    path.write_text(yaml.safe_dump(settings(store)), encoding="utf-8")
    app = Seawall(hello, config=path, registry=registry)
    counted = 0
    for group in groups(Settings()):
        for rule in group.rules:
            for selector in re.findall(r"increase\((seawall_\w+\{[^}]*\})", rule.expression):
                [(name, matchers)] = selectors(selector)
                samples = [s.labels for family in registry.collect() for s in family.samples if s.name == name]
                wanted = {label: value for label, (_, value) in matchers.items()}
                assert [labels for labels in samples if wanted.items() <= labels.items()], selector
                counted += 1
    assert counted >= 5
    assert app.policy.digest


# A real Prometheus


class Prometheus:
    """A server process that scrapes one application."""

    def __init__(self, port: int) -> None:
        self.port = port

    def get(self, path: str, **parameters: str) -> Any:
        """What its API answers to what it must know."""
        answered = self._answer(f"/api/v1/{path}?{urllib.parse.urlencode(parameters)}")
        assert answered is not None, path
        answer = json.loads(answered[1])
        assert answer["status"] == "success", (parameters, answer)
        return answer["data"]

    def is_ready(self) -> bool:
        answered = self._answer("/-/ready")
        return answered is not None and answered[0] == 200

    def _answer(self, target: str) -> tuple[int, bytes] | None:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request("GET", target)
            answer = connection.getresponse()
            return answer.status, answer.read()
        except ConnectionError:
            return None
        finally:
            connection.close()

    def ask(self, expression: str) -> list[Any]:
        data = self.get("query", query=expression)
        found: list[Any] = data["result"]
        return found

    def wait(self, true: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + 60
        while not true():
            assert time.monotonic() < deadline, what
            time.sleep(0.1)


@pytest.fixture
def example(store: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    """The service of examples/compose, on this machine instead of in containers."""
    place = tmp_path / "compose"
    shutil.copytree(COMPOSE, place)
    configuration = place / "seawall" / "seawall.yaml"
    text = configuration.read_text(encoding="utf-8")
    configuration.write_text(text.replace("172.30.83.10", "127.0.0.1"), encoding="utf-8")
    monkeypatch.setenv("SEAWALL_CONFIG", str(configuration))
    monkeypatch.setenv("SEAWALL_SECRET", "a secret of the tests")
    monkeypatch.setenv("REDIS_URL", store.url)
    with serving(asgi_server("uvicorn-httptools", "app:app"), tmp_path / "log", cwd=place) as served:
        yield served


@pytest.fixture
def prometheus(example: Served, tmp_path: Path) -> Iterator[Prometheus]:
    """A Prometheus with the configuration and the rules of the example, which scrapes each second."""
    configuration = yaml.safe_load((COMPOSE / "prometheus.yml").read_text(encoding="utf-8"))
    configuration["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    [job] = configuration["scrape_configs"]
    del job["dns_sd_configs"]
    job["static_configs"] = [{"targets": [f"127.0.0.1:{example.port}"]}]
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(configuration), encoding="utf-8")
    shutil.copy(COMPOSE / "alerts.yml", tmp_path)
    running = Prometheus(free_port())
    with (tmp_path / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={tmp_path / 'prometheus.yml'}",
                f"--storage.tsdb.path={tmp_path / 'data'}",
                f"--web.listen-address=127.0.0.1:{running.port}",
            ],
            stdout=log,
            stderr=log,
        )
    try:
        running.wait(running.is_ready, "Prometheus does not start")
        yield running
    finally:
        process.kill()
        process.wait()


HAVE_DATA = {
    "overview": {
        "Requests",
        "Refused",
        "Shed",
        "Utilization",
        "Shared store",
        "Policies in force",
        "Requests by outcome",
        "Refused, by reason",
        "What shadow mode would refuse",
        "Utilization, by instance",
        "In flight, and how many may be",
        "Loop lag",
        "Latency of admitted requests",
        "Latency of admitted requests, by class",
        "Policies and versions",
        "Since the policy was loaded",
    },
    "tenants": {
        "Requests by tenant",
        "Who was refused",
        "Refused, by plan and policy",
        "Near the limit",
        "Decisions of single policies",
        "What shadow mode would refuse",
        "What enforcing it would change",
    },
    "backend": {
        "Instances that ask their store",
        "Calls, by how they ended",
        "Calls that failed",
        "Latency of calls",
        "Time to decide",
        "Calls per decision",
        "Decided without the store",
    },
}
"""What a service shows to which a few hundred requests have come, of which some were refused."""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not on PATH")
def test_a_prometheus_scrapes_the_example_and_answers_every_panel(example: Served, prometheus: Prometheus) -> None:
    def scrapes() -> int:
        return sum(int(sample["value"][1]) for sample in prometheus.ask("count_over_time(seawall_build_info[5m])"))

    def traffic() -> None:
        connection = example.connect()  # one for each round: the server closes those that are idle for 5 s
        for headers in ({}, {"X-API-Key": "acme-demo-key"}, {"X-API-Key": "globex-demo-key"}):
            for _ in range(60):
                connection.request("GET", "/", headers=headers)
                connection.getresponse().read()
        connection.close()

    for round_ in range(4):
        traffic()
        prometheus.wait(lambda: scrapes() > round_, "Prometheus does not scrape the example")  # noqa: B023
    traffic()
    before = scrapes()
    prometheus.wait(lambda: scrapes() > before + 1, "Prometheus has stopped")

    [target] = prometheus.get("targets")["activeTargets"]
    assert (target["health"], target["lastError"], target["labels"]["job"]) == ("up", "", "shop")
    instead = {"$__rate_interval": "1m", "$__range": "5m", "$namespace": ".*", "$plan": ".*"}
    empty: dict[str, set[str]] = {}
    for who, queries in panels().items():
        dashboard, _, title = who.partition(": ")
        for query in queries:
            for name, value in instead.items():
                query = query.replace(name, value)
            answer = prometheus.ask(re.sub(r"\$\w+", ".+", query))
            if not answer:
                empty.setdefault(dashboard, set()).add(title)
    assert {f"{name}: {title}" for name, titles in HAVE_DATA.items() for title in titles} <= set(panels())
    assert {name for name in HAVE_DATA if empty.get(name, set()) & HAVE_DATA[name]} == set(), empty

    pages = [*(ROOT / "docs" / "runbooks").glob("*.md"), ROOT / "docs" / "monitoring.md"]
    for page in pages:
        for query in re.findall(r"^```promql\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
            prometheus.ask(query)

    def evaluated() -> list[Any]:
        return [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]

    prometheus.wait(lambda: all(rule["health"] != "unknown" for rule in evaluated()), "rules are not evaluated")
    rules = evaluated()
    assert {rule.get("lastError", "") for rule in rules} == {""}
    assert len(rules) == sum(len(group.rules) for group in groups(Settings()))
    assert [rule["name"] for rule in rules if rule.get("state") == "firing"] == []
    recorded = {rule.name for group in groups(Settings()) for rule in group.rules if isinstance(rule, Record)}
    assert [name for name in recorded if not prometheus.ask(name)] == []
