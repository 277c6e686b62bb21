"""Metrics of several processes: what they are together, and real servers whose workers are killed."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families as parse_text

from harness import hello, metric, outcomes, plan, statuses
from seawall import Seawall, metrics
from seawall.backends.memory import MemoryBackend
from seawall.cells import METRICS_DIR
from seawall.metrics import (
    BACKEND_UP,
    BUILD_INFO,
    CONCURRENCY_LIMIT,
    CONFIG_INFO,
    EVICTED_KEYS,
    LAST_RELOAD,
    LOOP_LAG,
    QUEUED,
    REQUESTS,
    STREAMS,
    TENANT_REQUESTS,
    TRACKED_KEYS,
    UTILIZATION,
    Publication,
    Reading,
    TenantLabels,
)
from seawall.testing import ManualClock
from serving import ROOT, Caller, Served, serving

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there is no flock")


# In one process


class Fake:
    """Something that publishes what it is told to."""

    def __init__(self, registry: CollectorRegistry, *readings: Reading) -> None:
        self.publication = Publication.of(registry)
        self.publication.sources.add(self)
        self.told = list(readings)
        self.backend = MemoryBackend()
        self.prepared = 0

    def readings(self) -> Iterable[Reading]:
        return self.told

    def before_scrape(self) -> None:
        self.prepared += 1

    def serve(self) -> None:
        cells = self.publication.cells
        cells.values[cells.index(REQUESTS, "allowed", "normal")] += 1


@pytest.fixture
def together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever publishes in a registry of its own is a process of its own."""
    monkeypatch.setenv(METRICS_DIR, str(tmp_path))
    monkeypatch.setattr(Publication, "_ordinals", repeat(0))


def die(registry: CollectorRegistry) -> None:
    """As SIGKILL leaves it."""
    Publication.of(registry).cells.end()


def registries(count: int) -> list[CollectorRegistry]:
    return [CollectorRegistry() for _ in range(count)]


@pytest.mark.usefixtures("together")
@pytest.mark.parametrize(
    ("spec", "labels", "values", "expected"),
    [
        (CONCURRENCY_LIMIT, (), [20, 30, 0], 50),
        (QUEUED, ("normal",), [1, 2, 3], 6),
        (STREAMS, ("events",), [1, 0, 3], 4),
        (TRACKED_KEYS, ("x",), [10, 20, 30], 60),
        (EVICTED_KEYS, ("x",), [10, 20, 30], 60),
        (LOOP_LAG, (), [0.1, 0.3, 0.2], 0.3),
        (UTILIZATION, (), [0.2, 0.4, 1.2], 0.6),
        (BACKEND_UP, ("redis",), [1, 0, 1], 0),
        (BACKEND_UP, ("redis",), [1, 1, 1], 1),
        (LAST_RELOAD, (), [1.7e9, 1.6e9, 1.8e9], 1.6e9),
        (CONFIG_INFO, ("a", "enforce"), [1, 1, 1], 1),
        (BUILD_INFO, ("1",), [1, 1, 1], 1),
    ],
)
def test_readings_of_several_processes_are_one(
    spec: Any, labels: tuple[str, ...], values: list[float], expected: float
) -> None:
    several = registries(3)
    processes = [Fake(registry, (spec, labels, value)) for registry, value in zip(several, values, strict=True)]
    for process in processes:
        process.serve()
        process.publication.beat()
    for registry in several:
        found = registry.get_sample_value(spec.name, dict(zip(spec.labels, labels, strict=True)))
        assert found == pytest.approx(expected)


@pytest.mark.usefixtures("together")
def test_processes_with_different_policies_are_two_series() -> None:
    one, other = registries(2)
    processes = [Fake(one, (CONFIG_INFO, ("aaa", "enforce"), 1)), Fake(other, (CONFIG_INFO, ("bbb", "enforce"), 1))]
    for process in processes:
        process.serve()
        process.publication.beat()
    assert metric(one, CONFIG_INFO.name) == {("aaa", "enforce"): 1, ("bbb", "enforce"): 1}


@pytest.mark.usefixtures("together")
def test_a_scrape_shows_others_what_it_has_read() -> None:
    one, other = registries(2)
    processes = [Fake(registry, (QUEUED, ("normal",), 2)) for registry in (one, other)]
    for process in processes:
        process.serve()
    assert metric(one, QUEUED.name) == {("normal",): 2}
    assert metric(other, QUEUED.name) == {("normal",): 4}
    processes[0].told = [(QUEUED, ("normal",), 7)]
    assert metric(one, QUEUED.name) == {("normal",): 9}
    assert metric(other, QUEUED.name) == {("normal",): 9}


@pytest.mark.usefixtures("together")
def test_a_process_that_has_served_nobody_has_no_gauges_for_others() -> None:
    """Such as the parent of all workers, which has loaded the application for them."""
    worker, parent = registries(2)
    idle = Fake(parent, (CONCURRENCY_LIMIT, (), 20))
    idle.publication.beat()
    process = Fake(worker, (CONCURRENCY_LIMIT, (), 20))
    process.serve()
    assert metric(worker, CONCURRENCY_LIMIT.name) == {(): 20}


@pytest.mark.usefixtures("together")
def test_every_tenth_beat_folds_what_died(tmp_path: Path) -> None:
    one, other = registries(2)
    processes = [Fake(registry) for registry in (one, other)]
    for process in processes:
        process.serve()
    die(other)
    for _ in range(metrics.ROUND - 1):
        processes[0].publication.beat()
    assert (len(list(tmp_path.glob("*.cells"))), processes[0].prepared) == (2, 0)
    processes[0].publication.beat()
    assert (len(list(tmp_path.glob("*.cells"))), processes[0].prepared) == (1, 1)
    assert outcomes(one) == {"allowed": 2}


@pytest.mark.usefixtures("together")
def test_a_beat_comes_by_itself_once_something_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[Any] = []
    monkeypatch.setattr(metrics.ticker, "every", lambda seconds, chore: begun.append((seconds, chore)))
    process = Fake(CollectorRegistry())
    assert begun == []
    for _ in range(3):
        process.serve()
    assert begun == [(metrics.BEAT, process.publication.beat)]


def test_a_middleware_that_is_made_in_another_thread_meanwhile_is_no_mistake(registry: CollectorRegistry) -> None:
    process = Fake(registry, (QUEUED, ("normal",), 1))

    class Growing:
        begun = False

        def __iter__(self) -> Iterator[Fake]:
            yield process
            if not self.begun:
                self.begun = True
                raise RuntimeError("Set changed size during iteration")

    process.publication.sources = Growing()  # type: ignore[assignment]
    assert metric(registry, QUEUED.name) == {("normal",): 1}


@pytest.mark.usefixtures("together")
def test_what_a_newer_version_counts_is_left_out() -> None:
    from seawall.cells import Spec

    old, new = registries(2)
    process, newer = Fake(old), Fake(new)
    process.serve()
    newer.serve()
    cells = newer.publication.cells
    for spec in (
        Spec("seawall_of_tomorrow_total", "counter", "New."),
        Spec(REQUESTS.name, "counter", "With another label.", (*REQUESTS.labels, "new")),
    ):
        cells.values[cells.index(spec, *("x" for _ in spec.labels))] += 1
    cells.publish([(Spec("seawall_new", "gauge", "New."), (), 1), (Spec(QUEUED.name, "gauge", "Other."), (), 1)])
    assert outcomes(old) == {"allowed": 2}
    assert b"tomorrow" not in generate_latest(old)
    assert metric(old, QUEUED.name) == {}


@pytest.mark.usefixtures("together")
def test_a_real_application_counts_alike_in_one_and_in_several_processes(clock: ManualClock) -> None:
    settings = plan(rate="5/minute", concurrency=2) | {
        "shedding": {"algorithm": "fixed", "limit": {"initial": 9}},
        "routes": [{"name": "probes", "match": {"path": "/healthz"}, "exempt": True}],
    }

    def serve(apps: list[Seawall]) -> None:
        for app in apps:
            statuses(app, 7)
            statuses(app, 2, "/healthz")

    def told(registry: CollectorRegistry) -> dict[str, float]:
        lines = generate_latest(registry).decode().splitlines()
        samples = [line.rpartition(" ") for line in lines if not line.startswith("#")]
        timed = {UTILIZATION.name, LAST_RELOAD.name}
        return {name: float(value) for name, _, value in samples if name not in timed}

    one, other = registries(2)
    apps = [Seawall(hello, config=settings, clock=clock, registry=registry) for registry in (one, other)]
    serve(apps)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(METRICS_DIR)
        alone = CollectorRegistry()
        both = [Seawall(hello, config=settings, clock=clock, registry=alone) for _ in range(2)]
        serve(both)
    for registry in (one, other):
        Publication.of(registry).beat()
    assert told(one) == told(other) == told(alone)
    assert outcomes(one) == {"allowed": 10, "limited": 4, "exempt": 4}


# Labels of tenants


def tenants(registry: CollectorRegistry) -> dict[str, int]:
    found: Counter[str] = Counter()
    for (tenant, _), value in metric(registry, TENANT_REQUESTS.name).items():
        found[tenant] += int(value)
    return dict(found)


def labelled(registry: CollectorRegistry) -> set[str]:
    """Also those that have no requests yet."""
    text = generate_latest(registry).decode()
    return set(re.findall(r'seawall_tenant_requests_total\{outcome="allowed",tenant="([^"]+)"\}', text)) - {"other"}


def count(labels: TenantLabels, registry: CollectorRegistry, tenant: str, times: int = 1) -> None:
    for _ in range(times):
        Publication.of(registry).cells.values[labels.cell(tenant, 0)] += 1


@pytest.mark.usefixtures("together")
def test_a_label_that_one_process_grants_is_granted_in_all() -> None:
    one, other = registries(2)
    first, second = (TenantLabels(Publication.of(registry).cells, 2) for registry in (one, other))
    count(first, one, "acme", 5)
    first.grant()
    count(second, other, "acme", 7)
    count(second, other, "zeta", 3)
    second.grant()
    count(second, other, "acme", 100)
    count(second, other, "zeta", 10)
    assert tenants(one) == {"other": 15, "acme": 100, "zeta": 10}
    # One that starts later knows them from the first request on.
    (late,) = registries(1)
    count(TenantLabels(Publication.of(late).cells, 2), late, "zeta", 1)
    assert tenants(one)["zeta"] == 11


@pytest.mark.usefixtures("together")
def test_the_series_of_tenants_stay_bounded_over_processes_that_come_and_go() -> None:
    draw = random.Random(5)
    living: list[tuple[CollectorRegistry, TenantLabels]] = []
    told: dict[str, int] = {}
    sent = 0
    for turn in range(400):
        if len(living) < 3 or draw.random() < 0.05:
            registry = CollectorRegistry()
            living.append((registry, TenantLabels(Publication.of(registry).cells, 4)))
        registry, labels = draw.choice(living)
        count(labels, registry, f"t{draw.randrange(20)}", times := draw.randrange(5))
        sent += times
        if draw.random() < 0.2:
            labels.grant()
        if draw.random() < 0.03:
            die(registry)
            living = [one for one in living if one[0] is not registry]
        if turn % 10 == 0 and living:
            Publication.of(living[0][0]).cells.files.fold()  # type: ignore[union-attr]
            found = tenants(living[-1][0])
            assert sum(found.values()) == sent
            assert len(labelled(living[-1][0])) <= 4
            assert all(found.get(tenant, 0) >= value for tenant, value in told.items())
            told = found
    assert len(labelled(living[-1][0])) == 4


@pytest.mark.usefixtures("together")
def test_no_two_processes_grant_at_a_time() -> None:
    one, other = registries(2)
    first, second = (TenantLabels(Publication.of(registry).cells, 1) for registry in (one, other))
    count(first, one, "a")
    count(second, other, "b")
    with Publication.of(one).cells.alone():
        second.grant()
    assert labelled(one) == set()
    count(second, other, "b")
    second.grant()
    first.grant()
    assert labelled(one) == {"b"}


def test_labels_outlive_the_policy_that_granted_them(registry: CollectorRegistry) -> None:
    cells = Publication.of(registry).cells
    before = TenantLabels(cells, 2)
    count(before, registry, "a")
    before.grant()
    after = TenantLabels(cells, 1)
    count(after, registry, "b", 9)
    after.grant()
    count(after, registry, "b")
    count(after, registry, "a")
    assert labelled(registry) == {"a"}
    assert tenants(registry) == {"other": 11, "a": 1}


def test_fewer_labels_than_are_granted_revoke_none(registry: CollectorRegistry) -> None:
    labels = TenantLabels(Publication.of(registry).cells, 5)
    for number in range(5):
        count(labels, registry, f"t{number}")
    count(labels, registry, "late")
    labels._seen["late"] += 1
    labels.top = 2
    labels.grant()
    assert len(labelled(registry)) == 2
    labels.top = 1
    count(labels, registry, "later", 5)
    labels._seen["later"] = 5
    labels.grant()
    assert len(labelled(registry)) == 2


# Real servers

APP = """
import asyncio, os
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from seawall import Seawall

async def work(request):
    await asyncio.sleep(0.002)
    return PlainTextResponse(str(os.getpid()))

async def directory(request):
    return PlainTextResponse(os.environ.get("SEAWALL_METRICS_DIR", ""))

def tenant(scope):
    return dict(scope["headers"]).get(b"x-tenant", b"").decode() or None

app = Starlette(routes=[Route("/", work), Route("/worker", work), Route("/directory", directory)])
app = Seawall(app, identify=tenant, config={
    "version": 1,
    "plans": {"default": {"rate": "unlimited"}},
    "shedding": {"algorithm": "off"},
    "routes": [{"name": "about", "match": {"path": ["/worker", "/directory"]}, "exempt": True}],
    "metrics": {"path": "/metrics", "allow": ["127.0.0.1"], "tenant_label": {"top": 2}},
})
"""
PATIENCE = 30.0
OPTIONS = ("--host", "127.0.0.1", "--port", "{port}", "--log-level", "warning")


@contextmanager
def running(folder: Path, workers: int, directory: Path | None = None) -> Iterator[Served]:
    """`seawall run` with so many workers, all of which serve, until the block ends."""
    (folder / "app.py").write_text(APP)
    with started(["-m", "seawall", "run", "app:app", "--workers", str(workers), *OPTIONS], folder, directory) as served:
        all_workers(served.port, workers)
        yield served


@contextmanager
def started(command: list[str], folder: Path, directory: Path | None = None) -> Iterator[Served]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        if directory is None:
            patch.delenv(METRICS_DIR, raising=False)
        else:
            patch.setenv(METRICS_DIR, str(directory))
        with serving(command, folder / "log", cwd=folder) as served:
            yield served


async def _ask(port: int, path: str) -> str | None:
    """The body of an answer over a connection of its own; ``None`` if there is none."""
    try:
        caller = await Caller.connect(port)
    except OSError:
        return None
    try:
        reply = await caller.ask(path, headers={"Connection": "close"})
        assert reply.status == 200
        return reply.body.decode()
    except (OSError, EOFError):
        return None
    finally:
        caller.leave()


async def _asked(port: int, count: int, path: str) -> list[str | None]:
    places = asyncio.Semaphore(16)

    async def one() -> str | None:
        async with places:
            return await _ask(port, path)

    return await asyncio.gather(*(one() for _ in range(count)))


def asked(port: int, count: int, path: str = "/") -> list[str]:
    """The bodies of so many answers; every request must have one."""
    bodies = asyncio.run(_asked(port, count, path))
    assert None not in bodies
    return [body for body in bodies if body is not None]


def all_workers(port: int, count: int, but: int = 0) -> set[int]:
    """The numbers of the processes that serve, once there are so many, ``but`` not being one of them."""
    until = time.monotonic() + PATIENCE
    seen: Counter[int] = Counter()
    while time.monotonic() < until:
        seen.update(int(body) for body in asyncio.run(_asked(port, 16 * count, "/worker")) if body)
        if but not in seen and len(seen) >= count:
            return set(seen)
        if but in seen:
            seen.clear()
    raise AssertionError(f"{len(seen)} of {count} workers serve")


def scraped(text: str, name: str, **labels: str) -> float:
    return sum(
        sample.value
        for family in parse_text(text)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


def allowed(port: int, scrapes: int = 24) -> set[float]:
    """What so many scrapes, each over a connection of its own, say was let through."""
    return {scraped(text, "seawall_requests_total", outcome="allowed") for text in asked(port, scrapes, "/metrics")}


@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, 4])
def test_any_worker_tells_what_all_have_answered_also_after_one_was_killed(workers: int, tmp_path: Path) -> None:
    with running(tmp_path, workers) as server:
        first = Counter(asked(server.port, 300))
        assert first.total() == 300
        assert allowed(server.port) == {300}
        victim = int(first.most_common(1)[0][0])
        os.kill(victim, signal.SIGKILL)
        second = [body for body in asyncio.run(_asked(server.port, 300, "/")) if body]
        all_workers(server.port, workers, but=victim)
        third = asked(server.port, 100)
        assert str(victim) not in third
        (total,) = allowed(server.port)
        # Whom the kernel had handed to the victim was not served by anybody.
        assert total == 300 + len(second) + 100
        # Also histograms are sums.
        (text,) = asked(server.port, 1, "/metrics")
        assert scraped(text, "seawall_request_duration_seconds_count") == total
        assert scraped(text, "seawall_inflight_requests") == 0
        assert scraped(text, "seawall_build_info") == 1
    assert server.process.returncode == 0


@pytest.mark.slow
def test_under_load_counters_never_fall_though_workers_are_killed_and_restarted(tmp_path: Path) -> None:
    async def main(port: int) -> tuple[int, int, list[float]]:
        answered = sent = 0
        ended = asyncio.Event()

        async def load() -> None:
            nonlocal answered, sent
            while not ended.is_set():
                sent += 1
                if await _ask(port, "/") is not None:
                    answered += 1

        async def kill() -> None:
            for _ in range(3):
                await asyncio.sleep(0.7)
                worker = await _ask(port, "/worker")
                if worker is not None:
                    os.kill(int(worker), signal.SIGKILL)

        async def scrape() -> list[float]:
            found = []
            while not ended.is_set():
                text = await _ask(port, "/metrics")
                if text is not None:
                    found.append(scraped(text, "seawall_requests_total", outcome="allowed"))
            return found

        callers = [asyncio.create_task(load()) for _ in range(12)]
        scrapes = asyncio.create_task(scrape())
        await kill()
        await asyncio.sleep(1.5)
        ended.set()
        await asyncio.gather(*callers)
        return answered, sent, await scrapes

    with running(tmp_path, 3) as server:
        answered, sent, found = asyncio.run(main(server.port))
        all_workers(server.port, 3)
        (total,) = allowed(server.port)
    assert found == sorted(found)
    assert len(found) > 10
    # A request that is counted may have had no time to be answered.
    assert answered <= total <= sent
    assert answered > 100


def lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def directory_of(server: Served) -> Path:
    (name,) = set(asked(server.port, 5, "/directory"))
    return Path(name)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_the_directory_of_a_run_is_removed_at_its_end(how: signal.Signals, tmp_path: Path) -> None:
    with running(tmp_path, 2) as server:
        directory = directory_of(server)
        assert directory.stat().st_mode & 0o777 == 0o700
        assert list(directory.glob("0.*.cells"))
        server.process.send_signal(how)
        assert server.process.wait(PATIENCE) == 0
    assert not directory.exists()


@pytest.mark.slow
def test_a_directory_that_is_named_is_used_and_stays_and_counts_go_on_after_a_restart(tmp_path: Path) -> None:
    directory = tmp_path / "metrics"
    for turn in (1, 2):
        with running(tmp_path, 2, directory) as server:
            asked(server.port, 50)
            assert allowed(server.port) == {50 * turn}
            assert directory_of(server) == directory
    assert list(directory.glob("0.*"))


@pytest.mark.slow
def test_one_worker_needs_no_directory(tmp_path: Path) -> None:
    with running(tmp_path, 1) as server:
        asked(server.port, 20)
        assert directory_of(server) == Path()
        assert allowed(server.port) == {20}
    assert server.process.returncode == -signal.SIGTERM  # as uvicorn ends


@pytest.mark.slow
def test_labels_of_tenants_stay_bounded_over_workers(tmp_path: Path) -> None:
    async def load(port: int) -> None:
        caller = await Caller.connect(port)
        for number in range(200):
            assert (await caller.ask("/", headers={"X-Tenant": f"t{number % 10}"})).status == 200
        await caller.closed()

    async def loads(port: int) -> None:
        await asyncio.gather(*(load(port) for _ in range(6)))

    name = TENANT_REQUESTS.name
    with running(tmp_path, 3) as server:
        until = time.monotonic() + PATIENCE
        sent = 0
        while True:
            asyncio.run(loads(server.port))
            sent += 1_200
            text = asked(server.port, 1, "/metrics")[0]
            assert scraped(text, name) == sent
            found = set(re.findall(rf'{name}\{{.*tenant="([^"]*)"', text)) - {"other"}
            assert len(found) <= 2
            if len(found) == 2 and all(scraped(text, name, tenant=label) for label in found):
                break
            assert time.monotonic() < until


RECIPE = ROOT / "examples" / "workers"


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--preload"]])
def test_the_recipe_for_gunicorn_tells_what_all_workers_have_counted(options: list[str], tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(APP)
    conf = str(RECIPE / "gunicorn_conf.py")
    command = ["-m", "gunicorn", "-c", conf, *options, "--log-level", "warning", "-b", "127.0.0.1:{port}", "app:app"]
    with started(command, tmp_path) as server:
        directory = directory_of(server)
        first = Counter(asked(server.port, 200))
        os.kill(int(first.most_common(1)[0][0]), signal.SIGKILL)
        second = [body for body in asyncio.run(_asked(server.port, 200, "/")) if body]
        old = all_workers(server.port, 4, but=int(first.most_common(1)[0][0]))
        assert allowed(server.port) == {200 + len(second)}
        server.process.send_signal(signal.SIGHUP)  # all workers are replaced
        until = time.monotonic() + PATIENCE
        while any(map(lives, old)):
            assert time.monotonic() < until
            time.sleep(0.05)
        asked(server.port, 50)
        assert allowed(server.port) == {200 + len(second) + 50}
        assert directory.is_dir()
    assert server.process.returncode == 0
    assert not directory.exists()


@pytest.mark.slow
def test_the_example_of_several_workers_does_what_it_says(tmp_path: Path) -> None:
    command = ["-m", "seawall", "run", "--app-dir", str(RECIPE), "app:app", "--workers", "2", *OPTIONS]
    with started(command, tmp_path) as server:
        asked(server.port, 50)
        assert allowed(server.port) == {50}


@pytest.mark.slow
def test_the_benchmark_measures_both_ways_to_count_and_writes_its_report(tmp_path: Path) -> None:
    target = tmp_path / "workers.json"
    command = [sys.executable, "benchmarks/workers.py", "--quick", "--json", str(target)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stdout + done.stderr
    parts = json.loads(target.read_text())["parts"]
    assert all(row["failure"] == "" and row["total"]["median"] > 0 for row in parts["request"]["rows"])
    assert {name: 0 < found["median"] < 1e5 for name, found in parts["request"]["increments_ns"].items()} == {
        "in a list": True,
        "in a mapped file": True,
    }
    assert parts["scrape"]["8 dead, 1000 series"]["before"]["median"] > 0
