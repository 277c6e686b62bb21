"""A configuration that changes while it is in force."""

from __future__ import annotations

import asyncio
import gc
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette

import seawall
from seawall import ConfigError, QuotaMiddleware, RateLimitMiddleware, Seawall, history
from seawall.testing import ManualClock, drive
from seawall.watch import Watch
from serving import asgi_server, serving

HEAD = "version: 1\nreload: off\n"
"""Tests look themselves, so that nothing happens while they do not."""
ACME = {"X-API-Key": "foo"}
KEY = "sha256:2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae"


def plans(rate: str = "10/minute", more: str = "") -> str:
    return f"{HEAD}plans: {{default: {{rate: {rate}}}}}\n{more}"


def tenants(plan: str, more: str = "") -> str:
    return (
        f"{HEAD}identity: {{tenant: [{{api_key: {{header: X-API-Key}}}}]}}\n"
        f"plans: {{default: {{rate: 1000/minute}}, pro: {plan}}}\n"
        f"tenants: {{acme: {{plan: pro, keys: ['{KEY}']}}}}\n{more}"
    )


async def hello(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "lifespan":
        while True:
            kind = (await receive())["type"]
            await send({"type": f"{kind}.complete"})
            if kind == "lifespan.shutdown":
                return
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"hello"})


class Bench:
    """A file, and an app that is protected by it."""

    def __init__(self, path: Path, clock: ManualClock, registry: CollectorRegistry) -> None:
        self.path = path / "seawall.yaml"
        self.clock = clock
        self.registry = registry
        self.shell: Any = None

    def begin(self, text: str) -> Bench:
        self.path.write_text(text)
        self.shell = Seawall(hello, self.path, clock=self.clock, registry=self.registry)
        return self

    @property
    def watch(self) -> Watch:
        watch = self.shell._watch
        assert isinstance(watch, Watch)
        return watch

    def change(self, text: str) -> None:
        self.path.write_text(text)
        self.watch.look()

    async def left(self, **changes: Any) -> str:
        return (await drive(self.shell, **changes)).headers.get("ratelimit", "")

    def counted(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(name, labels) or 0.0


@pytest.fixture
def bench(tmp_path: Path, clock: ManualClock, registry: CollectorRegistry) -> Bench:
    return Bench(tmp_path, clock, registry)


async def test_a_changed_rate_is_in_force_and_keeps_the_fraction_that_is_used(bench: Bench) -> None:
    bench.begin(plans("10/minute"))
    for _ in range(5):
        await drive(bench.shell)
    bench.change(plans("100/minute"))
    answer = await drive(bench.shell)
    assert answer.headers["ratelimit-policy"] == '"rate";q=100;w=60'
    assert answer.headers["ratelimit"] == '"rate";r=49;t=1'
    assert bench.counted("seawall_config_reloads_total", result="ok") == 1


async def test_a_changed_quota_keeps_its_count(bench: Bench) -> None:
    bench.begin(tenants("{quota: 10/day}"))
    for _ in range(8):
        await drive(bench.shell, headers=ACME)
    bench.change(tenants("{quota: 20/day}"))
    assert (await bench.left(headers=ACME)).startswith('"quota";r=11;')
    bench.change(tenants("{quota: 5/day}"))
    assert (await drive(bench.shell, headers=ACME)).status == 429
    bench.change(tenants("{quota: 20/day}"))
    assert (await bench.left(headers=ACME)).startswith('"quota";r=10;')


async def test_a_limit_that_goes_back_and_forth_never_grants_a_fresh_one(bench: Bench) -> None:
    bench.begin(plans("10/minute"))
    admitted = 0
    for rate in ("10/minute", "20/minute", "10/minute", "20/minute"):
        bench.change(plans(rate))
        for _ in range(3):
            admitted += (await drive(bench.shell)).status == 200
    # Three tenths, then three twentieths, and so on: less than the larger burst in any case.
    assert admitted == 12
    bench.change(plans("10/minute"))
    assert (await bench.left()).startswith('"rate";r=0;')


async def test_a_tenant_that_gets_a_plan_of_its_own_keeps_what_it_used(bench: Bench) -> None:
    bench.begin(tenants("{rate: 10/minute}"))
    for _ in range(5):
        await drive(bench.shell, headers=ACME)
    bench.change(tenants("{rate: 10/minute}").replace("plan: pro", "plan: pro, overrides: {rate: 50/minute}"))
    assert await bench.left(headers=ACME) == '"rate";r=24;t=2'


async def test_an_identified_tenant_that_is_listed_keeps_what_it_used(bench: Bench) -> None:
    text = f"{HEAD}identity: {{tenant: [{{state: tenant}}]}}\nplans: {{default: {{rate: 10/minute}}}}\n"
    bench.begin(text)
    state = {"state": {"tenant": "acme"}}
    for _ in range(4):
        await drive(bench.shell, **state)
    bench.change(text + "tenants: {acme: {}}\n")
    assert (await bench.left(**state)).startswith('"rate";r=5;')
    bench.change(text)
    assert (await bench.left(**state)).startswith('"rate";r=4;')


async def test_a_wrong_file_changes_nothing_but_the_counter_the_log_and_the_state(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.begin(plans("10/minute"))
    await drive(bench.shell)
    bench.change(plans("10/fortnight"))
    assert (await bench.left()).startswith('"rate";r=8;')
    assert bench.counted("seawall_config_reloads_total", result="failed") == 1
    assert bench.counted("seawall_config_reloads_total", result="ok") == 0
    (record,) = [record for record in caplog.records if getattr(record, "event", "") == "reload_failed"]
    assert "seawall.yaml:3:25: error[E020]: unknown time unit 'fortnight'" in record.getMessage()
    assert "E020" in (bench.watch.state.error or "")
    assert bench.watch.state.error_at is not None


async def test_a_wrong_file_is_counted_once_and_forgotten_when_it_is_right_again(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.begin(plans("10/minute"))
    bench.change("version: 1\nplans: {")
    bench.watch.look()
    bench.watch.look()
    assert bench.counted("seawall_config_reloads_total", result="failed") == 1
    loaded = bench.watch.state.loaded_at
    bench.change(plans("10/minute"))
    assert bench.watch.state.error is None
    assert bench.watch.state.loaded_at > loaded
    assert bench.watch.state.applied == 0
    assert bench.counted("seawall_config_last_reload_success_timestamp_seconds") == bench.watch.state.loaded_at


async def test_a_file_that_is_gone_leaves_in_force_what_was(bench: Bench) -> None:
    bench.begin(plans("10/minute"))
    bench.path.unlink()
    bench.watch.look()
    assert "cannot be read" in (bench.watch.state.error or "")
    assert await bench.left() == '"rate";r=9;t=6'


@pytest.mark.skipif(sys.platform == "win32", reason="no FIFOs")
async def test_a_file_that_becomes_a_pipe_is_not_waited_for(bench: Bench) -> None:
    bench.begin(plans("10/minute"))
    bench.path.unlink()
    os.mkfifo(bench.path)
    bench.watch.look()
    assert "not a regular file" in (bench.watch.state.error or "")
    assert await bench.left() == '"rate";r=9;t=6'


async def test_what_cannot_be_put_in_force_is_an_error_like_any_other(bench: Bench) -> None:
    """A tenant may be anybody's here, so that a policy without a default plan cannot hold."""
    text = f"{HEAD}plans: {{a: {{rate: 1/minute}}, b: {{rate: 2/minute}}}}\ndefaults: {{plan: a, anonymous_plan: b}}\n"
    bench.path.write_text(text)
    bench.shell = Seawall(hello, bench.path, identify=lambda _: "acme", clock=bench.clock, registry=bench.registry)
    bench.change(text.replace("plan: a, ", ""))
    assert "set defaults.plan" in (bench.watch.state.error or "")
    assert (await bench.left()) == '"rate";r=0;t=60'


# Ways of saving


def in_place(path: Path, text: str) -> None:
    path.write_text(text)


def as_vim(path: Path, text: str) -> None:
    backup = path.with_name(path.name + "~")
    path.rename(backup)
    path.write_text(text)
    backup.unlink()


def by_rename(path: Path, text: str) -> None:
    other = path.with_name(".new")
    other.write_text(text)
    other.replace(path)


def keeping_its_times(path: Path, text: str) -> None:
    times = path.stat()
    path.write_text(text)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize("save", [in_place, as_vim, by_rename, keeping_its_times], ids=lambda save: save.__name__)
async def test_a_change_is_seen_however_it_is_saved(bench: Bench, save: Callable[[Path, str], None]) -> None:
    bench.begin(plans("10/minute"))
    save(bench.path, plans("11/minute"))  # of the same length
    bench.watch.look()
    assert await bench.left() == '"rate";r=10;t=6'


async def test_a_configmap_that_is_swapped_is_seen(bench: Bench, tmp_path: Path) -> None:
    """Kubernetes swaps a link to a directory of links: neither the file's name nor its own link changes."""
    volume = tmp_path / "volume"
    for number in (1, 2):
        (volume / f"..{number}").mkdir(parents=True)
        (volume / f"..{number}" / "seawall.yaml").write_text(plans(f"1{number}/minute"))
    (volume / "..data").symlink_to("..1")
    (volume / "seawall.yaml").symlink_to("..data/seawall.yaml")
    shell: Any = Seawall(hello, volume / "seawall.yaml", clock=bench.clock, registry=bench.registry)
    (volume / "..tmp").symlink_to("..2")
    (volume / "..tmp").replace(volume / "..data")
    shutil.rmtree(volume / "..1")
    shell._watch.look()
    assert (await drive(shell)).headers["ratelimit-policy"] == '"rate";q=12;w=60'


async def test_included_files_are_watched_also_those_that_come_and_go(bench: Bench, tmp_path: Path) -> None:
    teams = tmp_path / "teams"
    teams.mkdir()
    text = plans("10/minute", "identity: {tenant: [{state: tenant}]}\ninclude: teams/*.yaml\n")
    bench.begin(text)
    state = {"state": {"tenant": "acme"}}
    (teams / "a.yaml").write_text("tenants: {acme: {overrides: {rate: 20/minute}}}")
    bench.watch.look()
    assert await bench.left(**state) == '"rate";r=19;t=3'
    (teams / "a.yaml").write_text("tenants: {acme: {overrides: {rate: 40/minute}}}")
    bench.watch.look()
    assert await bench.left(**state) == '"rate";r=37;t=2'
    assert [path.name for path in bench.watch.files] == ["seawall.yaml", "a.yaml"]
    (teams / "a.yaml").unlink()
    bench.watch.look()
    assert (await drive(bench.shell, **state)).headers["ratelimit-policy"] == '"rate";q=10;w=60'


def test_nothing_is_read_again_while_nothing_changes(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.begin(plans())
    monkeypatch.setattr("seawall.watch.check", None)
    for _ in range(3):
        bench.watch.look()


def test_a_file_that_is_being_written_is_read_when_it_is_whole(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.begin(plans("10/minute"))
    pieces = iter([plans("20/minute")[:30], plans("20/minute")[:40], plans("20/minute")])

    def write(_: float) -> None:
        piece = next(pieces, None)
        if piece is not None:
            bench.path.write_text(piece)

    monkeypatch.setattr("seawall.watch.sleep", write)
    bench.change("version: 1")
    assert bench.watch.state.failed == 0
    assert bench.watch.state.applied == 1


# What is in force


async def test_middlewares_of_one_file_change_together(bench: Bench) -> None:
    bench.path.write_text(plans("{limit: 10/minute}, quota: 100/day"))
    inner: Any = QuotaMiddleware(hello, bench.path, clock=bench.clock, registry=bench.registry)
    outer: Any = RateLimitMiddleware(inner, bench.path, clock=bench.clock, registry=bench.registry)
    await drive(outer)
    bench.path.write_text(plans("{limit: 20/minute}, quota: 200/day"))
    outer._watch.look()
    answer = await drive(outer)
    assert answer.headers["ratelimit-policy"] == '"rate";q=20;w=60, "quota";q=200;w=86400'
    assert answer.headers["ratelimit"] == '"rate";r=17;t=3'
    assert bench.counted("seawall_config_reloads_total", result="ok") == 2
    assert bench.counted("seawall_requests_total", outcome="allowed", priority="normal") == 2


def by_two_names(bench: Bench, reload: str) -> tuple[Any, Any, str]:
    """Two middlewares, the names of whose files lead to one, and what it says."""
    text = plans("20/minute").replace("reload: off", f"reload: {reload}")
    bench.path.write_text(text.replace("20", "10"))
    link = bench.path.with_name("link.yaml")
    link.symlink_to(bench.path)
    one, other = (Seawall(hello, path, registry=CollectorRegistry()) for path in (bench.path, link))
    assert one._watch is not other._watch
    return one, other, text


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_who_knows_a_file_by_another_name_looks_as_soon_as_it_has_changed(bench: Bench) -> None:
    one, other, text = by_two_names(bench, "1h")
    bench.path.write_text(text)
    one._watch.look()
    until(lambda: other._watch.state.applied == 1)
    assert other.policy.digest == one.policy.digest


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_who_does_not_want_to_reload_does_not_when_others_do(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other, text = by_two_names(bench, "off")
    looked = list[object]()
    monkeypatch.setattr(Watch, "look_soon", looked.append)
    bench.path.write_text(text)
    one._watch.look()
    assert (one.policy.digest == other.policy.digest, looked) == (False, [])


async def test_a_second_middleware_finds_the_file_as_it_is(bench: Bench) -> None:
    bench.begin(plans("10/minute"))
    bench.path.write_text(plans("20/minute"))
    other: Any = Seawall(hello, bench.path, clock=bench.clock, registry=CollectorRegistry())
    assert other.policy.digest == bench.shell.policy.digest
    assert (await bench.left()).startswith('"rate";r=19;')


async def test_a_request_that_is_being_served_ends_by_what_it_began_with(bench: Bench) -> None:
    inside, go_on = asyncio.Event(), asyncio.Event()

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        inside.set()
        await go_on.wait()
        await hello(scope, receive, send)

    bench.path.write_text(tenants("{rate: 10/minute, concurrency: 1}"))
    shell: Any = Seawall(slow, bench.path, clock=bench.clock, registry=bench.registry)
    first = asyncio.ensure_future(drive(shell, headers=ACME))
    await inside.wait()
    bench.path.write_text(tenants("{rate: 20/minute, concurrency: 2}"))
    shell._watch.look()
    inside.clear()
    second = asyncio.ensure_future(drive(shell, headers=ACME))
    await inside.wait()
    assert (await drive(shell, headers=ACME)).status == 429  # the first counts in the second's two
    go_on.set()
    assert (await first).headers["ratelimit-policy"].startswith('"rate";q=10;w=60')
    assert (await second).headers["ratelimit-policy"].startswith('"rate";q=20;w=60')
    assert shell.gate.concurrency.statistics() == {"callers": 0, "in_flight": 0}


async def test_what_is_taken_is_given_back_where_it_was_though_identification_took_until_the_next_policy(
    bench: Bench,
) -> None:
    go_on = asyncio.Event()

    async def slowly(_: Any) -> str:
        await go_on.wait()
        return "acme"

    rule = "routes: [{name: events, match: {path: /}, streaming: {max: 5}}]\nshedding: {algorithm: fixed}\n"
    bench.path.write_text(plans("10/minute", rule))
    shell: Any = Seawall(hello, bench.path, identify=slowly, clock=bench.clock, registry=bench.registry)
    streams, turnstile = shell.gate.streams, shell.gate.turnstile
    request = asyncio.ensure_future(drive(shell))
    await asyncio.sleep(0)
    bench.path.write_text(plans("10/minute", "shedding: {algorithm: 'off'}\n"))
    shell._watch.look()
    assert shell.gate.streams is shell.gate.turnstile is None
    go_on.set()
    assert (await request).status == 200
    assert (streams.open, turnstile.current.in_flight) == ({"events": 0}, 0)


async def test_the_limit_and_who_waits_outlive_a_reload(bench: Bench) -> None:
    inside, go_on = asyncio.Event(), asyncio.Event()

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        inside.set()
        await go_on.wait()
        await hello(scope, receive, send)

    def shedding(limit: int, classes: str, route: str) -> str:
        return (
            f"{HEAD}plans: {{default: {{rate: unlimited}}}}\npriorities: {classes}\n"
            f"routes: [{{name: {route}, match: {{path: /}}}}]\n"
            f"shedding: {{algorithm: fixed, limit: {{initial: {limit}, min: 1, max: 100}}}}\n"
        )

    bench.path.write_text(shedding(1, "{high: {queue: {timeout: 9s}}, low: {queue: {timeout: 9s}}}", "one"))
    shell: Any = Seawall(slow, bench.path, registry=bench.registry)
    first = asyncio.ensure_future(drive(shell))
    await inside.wait()
    second = asyncio.ensure_future(drive(shell))
    await asyncio.sleep(0)
    limiter = shell.gate.turnstile.current
    assert (limiter.in_flight, len(limiter.line)) == (1, 1)
    bench.path.write_text(shedding(2, "{top: {}, high: {queue: {timeout: 9s}}}", "other"))
    shell._watch.look()
    assert shell.gate.turnstile.current is limiter
    assert (limiter.limit, limiter.in_flight, len(limiter.line)) == (2, 1, 1)
    go_on.set()
    assert [(await one).status for one in (first, second)] == [200, 200]
    assert limiter.in_flight == 0


async def test_a_memory_backend_grows_and_shrinks_with_its_file(bench: Bench) -> None:
    bench.begin(plans(more="backend: {max_keys: 1000}\n"))
    backend = bench.shell.gate.backend
    bench.change(plans(more="backend: {max_keys: 2000}\n"))
    assert bench.shell.gate.backend is backend
    assert "at most 2000 each" in repr(backend)


async def test_reload_reads_at_once_and_raises_what_is_wrong(bench: Bench) -> None:
    bench.begin(plans("10/minute"))
    bench.path.write_text(plans("20/minute"))
    seawall.reload()
    assert await bench.left() == '"rate";r=19;t=3'
    bench.path.write_text(plans("20/fortnight"))
    with pytest.raises(ConfigError, match="fortnight"):
        seawall.reload()
    assert (await bench.left()).startswith('"rate";r=18;')


def test_a_file_is_not_watched_for_nobody(bench: Bench) -> None:
    bench.begin(plans())
    path = bench.watch._absolute
    assert path in Watch._all
    bench.shell = None
    gc.collect()
    assert path not in Watch._all


# By itself


def until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    end = monotonic() + seconds
    while not condition():
        assert monotonic() < end, "it has not happened"
        sleep(0.01)


def test_the_file_is_looked_at_by_itself_as_often_as_it_says(bench: Bench) -> None:
    bench.begin(plans("10/minute").replace("reload: off", "reload: 100ms"))
    bench.path.write_text(plans("20/minute").replace("reload: off", "reload: 150ms"))
    until(lambda: bench.watch.state.applied == 1)
    assert bench.watch.every == 0.15
    bench.path.write_text(plans("30/minute"))
    until(lambda: bench.watch.state.applied == 2)
    assert bench.watch.every is None


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGHUP")
async def test_a_hangup_reloads_where_it_means_nothing_else(bench: Bench) -> None:
    before = signal.getsignal(signal.SIGHUP)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        bench.begin(plans("10/minute"))
        messages = iter([{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}])

        async def receive() -> Any:
            message = next(messages)
            if message["type"] == "lifespan.shutdown":
                bench.path.write_text(plans("20/minute"))
                os.kill(os.getpid(), signal.SIGHUP)
                await asyncio.to_thread(until, lambda: bench.watch.state.applied == 1)
            return message

        async def send(_: Any) -> None:
            pass

        async with asyncio.timeout(30):
            await bench.shell({"type": "lifespan"}, receive, send)
        assert await bench.left() == '"rate";r=19;t=3'
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_hangup_that_is_ignored_stays_ignored(bench: Bench) -> None:
    before = signal.getsignal(signal.SIGHUP)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        seawall.asgi.on_hangup()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_what_is_served_in_another_thread_is_changed_on_its_loop(bench: Bench) -> None:
    """So that no request finds one half of a stack before and the other after."""
    bench.begin(plans("10/minute"))
    where: list[threading.Thread] = []
    follow = bench.shell._follow
    bench.shell._follow = lambda *given: (where.append(threading.current_thread()), follow(*given))
    begun, ended = threading.Event(), threading.Event()

    def serve() -> None:
        async def receive() -> Any:
            if not begun.is_set():
                return {"type": "lifespan.startup"}
            await asyncio.to_thread(ended.wait, 30)
            return {"type": "lifespan.shutdown"}

        async def send(_: Any) -> None:
            begun.set()

        asyncio.run(bench.shell({"type": "lifespan"}, receive, send))

    server = threading.Thread(target=serve)
    server.start()
    try:
        assert begun.wait(30)
        bench.path.write_text(plans("20/minute"))
        seawall.reload()
        assert where == [server]
    finally:
        ended.set()
        server.join(30)


VALID = plans("10/minute", "routes: [{name: a, match: {path: /a}, limits: {b: {rate: 5/minute, per: client_ip}}}]\n")


async def test_of_two_changes_the_later_one_holds_though_the_loop_hears_of_it_first(bench: Bench) -> None:
    """One found by the thread that looks, and one by the application itself before the loop has come to the first."""
    bench.begin(plans("10/minute"))
    bench.shell._loops.add(asyncio.get_running_loop())
    bench.path.write_text(plans("20/minute"))
    looking = threading.Thread(target=bench.watch.look)
    looking.start()
    looking.join()  # the loop is kept from it
    assert bench.shell.policy is not bench.watch.policy
    bench.path.write_text(plans("30/minute"))
    seawall.reload()
    await asyncio.sleep(0.01)
    assert bench.shell.policy is bench.watch.policy
    assert await bench.left() == '"rate";r=29;t=2'


def last_step(bench: Bench, change: Callable[[], None]) -> None:
    """Serve on a loop that ends before it comes to what it is told by ``change`` in a thread."""
    loop = asyncio.new_event_loop()
    bench.shell._loops.add(loop)

    def step() -> None:
        other = threading.Thread(target=change)
        other.start()
        other.join()
        loop.stop()

    loop.call_soon(step)
    loop.run_forever()
    loop.close()


@pytest.mark.parametrize("again", ["look", "reload"])
def test_what_a_loop_did_not_come_to_before_it_ended_is_done_on_the_next(bench: Bench, again: str) -> None:
    bench.begin(plans("10/minute"))
    where: list[Any] = []
    follow = bench.shell._follow
    bench.shell._follow = lambda *given: (where.append(asyncio._get_running_loop()), follow(*given))
    last_step(bench, lambda: bench.change(plans("20/minute")))
    assert bench.shell.policy is not bench.watch.policy

    async def serve() -> None:
        loop = asyncio.get_running_loop()
        bench.shell._loops.add(loop)
        await asyncio.to_thread(getattr(bench.watch, again))
        assert await bench.left() == '"rate";r=19;t=3'
        assert where == [loop]

    asyncio.run(serve())


def test_what_no_loop_is_there_for_is_done_without(bench: Bench) -> None:
    bench.begin(plans("10/minute"))
    last_step(bench, lambda: bench.change(plans("20/minute")))
    bench.watch.look()
    assert bench.shell.policy is bench.watch.policy


async def test_who_reloads_on_the_loop_that_has_been_told_does_not_wait_for_it(bench: Bench) -> None:
    bench.begin(plans("10/minute"))
    bench.shell._loops.add(asyncio.get_running_loop())
    looking = threading.Thread(target=bench.change, args=[plans("20/minute")])
    looking.start()
    looking.join()
    assert bench.shell.policy is not bench.watch.policy
    seawall.reload()
    assert bench.shell.policy is bench.watch.policy


async def test_a_working_directory_that_is_gone_is_no_matter_to_a_path_that_was_not(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.path.write_text(plans("10/minute"))
    (tmp_path / "release").mkdir()
    monkeypatch.chdir(tmp_path / "release")
    bench.shell = Seawall(hello, "../seawall.yaml", clock=bench.clock, registry=bench.registry)
    (tmp_path / "release").rmdir()
    bench.change(plans("20/minute"))
    assert await bench.left() == '"rate";r=19;t=3'


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_child_that_is_forked_in_the_middle_of_a_reload_reloads(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.begin(plans("10/minute"))
    begun = threading.Event()

    def slow(seconds: float) -> None:
        begun.set()
        threading.Event().wait(0.2)

    monkeypatch.setattr("seawall.watch.sleep", slow)
    bench.path.write_text(plans("20/minute"))
    looking = threading.Thread(target=bench.watch.look)
    looking.start()
    assert begun.wait(30)
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        try:
            bench.path.write_text(plans("30/minute"))
            bench.watch.reload()
            assert bench.shell.policy.plans["default"].rates[0].amount == 30
        except BaseException:
            os._exit(1)
        os._exit(0)
    looking.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert bench.watch.state.applied == 1


def test_a_snapshot_is_kept_on_while_a_change_that_cannot_be_is_refused(bench: Bench) -> None:
    """Whoever else reads the file may be the one who cannot."""
    bench.begin(plans("10/minute", "backend: {snapshot: quotas}\n"))
    other: Any = Seawall(hello, bench.path, identify=lambda _: "acme", clock=bench.clock, registry=CollectorRegistry())
    keeper = bench.shell._keeper
    assert keeper is other._keeper
    bench.change(f"{HEAD}plans: {{a: {{rate: 1/s}}, b: {{rate: 1/s}}}}\ndefaults: {{anonymous_plan: a}}\n")
    assert "set defaults.plan" in (bench.watch.state.error or "")
    assert bench.shell._keeper is other._keeper is keeper
    bench.change(plans("10/minute"))
    assert bench.shell._keeper is other._keeper is None


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, len(VALID)), length=st.integers(0, 12), put=st.text(max_size=6))
def test_a_file_that_is_damaged_never_crashes_and_is_never_in_force_when_wrong(
    tmp_path: Path, at: int, length: int, put: str
) -> None:
    path = tmp_path / "seawall.yaml"
    path.write_text(VALID)
    shell: Any = Seawall(hello, path, registry=CollectorRegistry())
    before = shell.policy.digest
    path.write_bytes((VALID[:at] + put + VALID[at + length :]).encode(errors="surrogatepass"))
    valid = seawall.config.check(path).policy is not None
    shell._watch._try()
    assert (shell._watch.state.error is None) == valid
    assert (shell.policy.digest == before) == (not valid or path.read_text() == VALID)


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    yield
    gc.collect()


def test_an_application_that_is_served_gets_the_policy_that_its_file_has_now(bench: Bench) -> None:
    app = Starlette()
    bench.path.write_text(plans())
    app.add_middleware(Seawall, config=bench.path, registry=bench.registry)
    bench.path.write_text("version: 2\n")
    with pytest.raises(ConfigError):
        app.build_middleware_stack()


# What is remembered of it


async def test_a_change_is_said_in_words(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "seawall")
    bench.begin(plans("10/minute"))
    bench.change(plans("20/minute"))
    (record,) = [record for record in caplog.records if getattr(record, "event", "") == "reload"]
    assert "is in force" in record.getMessage()
    assert "rate 10/minute -> 20/minute" in record.getMessage()
    (change,) = bench.watch.changes()
    assert change["digest"] == bench.shell.policy.digest
    assert len(change["diff"]) == 1
    bench.change("# only a remark\n" + plans("20/minute"))
    assert "nothing that anybody would notice" in caplog.records[-1].getMessage()


def test_each_change_is_appended_to_the_history(bench: Bench, tmp_path: Path) -> None:
    more = "history: seawall.history.jsonl\n"
    bench.begin(plans("10/minute", more))
    bench.watch.look()
    for rate in ("20/minute", "20/fortnight", "30/minute"):
        bench.change(plans(rate, more))
    path = tmp_path / "seawall.history.jsonl"
    records = list(history.read(path))
    assert [record.seq for record in records] == [1, 2, 3]
    assert [any("10/minute -> 20/minute" in text for text in record.diff) for record in records] == [False, True, False]
    assert records[-1].digest == bench.shell.policy.digest
    assert list(records[-1].files) == [str(bench.path)]
    assert history.verify(path) is None
    assert [change["seq"] for change in bench.watch.changes()] == [1, 2, 3]


def test_the_first_record_is_of_the_files_that_the_policy_is_made_of(bench: Bench, tmp_path: Path) -> None:
    more = "history: seawall.history.jsonl\n"
    bench.path.write_text(plans("10/minute", more))
    watch = Watch.of(bench.path)
    bench.path.write_text(plans("20/fortnight", more))
    with pytest.raises(ConfigError):
        Watch.of(bench.path)
    watch.look()
    (record,) = history.read(tmp_path / "seawall.history.jsonl")
    assert record.digest == watch.policy.digest
    assert record.files == {str(bench.path): sha256(plans("10/minute", more).encode()).hexdigest()}


def test_a_history_that_cannot_be_written_keeps_nobody_from_changing(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    more = "history: missing/history.jsonl\n"
    bench.begin(plans("10/minute", more))
    bench.change(plans("20/minute", more))
    assert bench.watch.state.applied == 1
    assert "history.jsonl cannot be written" in caplog.text


# On a real server


@pytest.mark.slow
@pytest.mark.parametrize("save", [in_place, as_vim, by_rename, keeping_its_times], ids=lambda save: save.__name__)
def test_a_reload_under_load_drops_no_request(tmp_path: Path, save: Callable[[Path, str], None]) -> None:
    """And is in force within a few seconds, at the interval of two seconds that is the default."""
    path = tmp_path / "seawall.yaml"
    text = "version: 1\nplans: {default: {rate: {limit: 1000/second, burst: 100000}}}\nshedding: {algorithm: 'off'}\n"
    path.write_text(text)
    (tmp_path / "served.py").write_text(
        f"from seawall import Seawall\nfrom harness import hello\napp = Seawall(hello, {str(path)!r})\n"
    )
    answers: list[tuple[int, str]] = []
    errors: list[Exception] = []
    stop = threading.Event()
    arguments = [*asgi_server("uvicorn-httptools", "served:app"), "--app-dir", str(tmp_path)]
    with serving(arguments, tmp_path / "log", cwd=Path(__file__).parent) as server:

        def call() -> None:
            connection = server.connect()
            while not stop.is_set():
                try:
                    connection.request("GET", "/")
                    answer = connection.getresponse()
                    answer.read()
                    answers.append((answer.status, answer.headers["ratelimit-policy"]))
                except Exception as error:
                    errors.append(error)
                    return
            connection.close()

        callers = [threading.Thread(target=call) for _ in range(4)]
        for caller in callers:
            caller.start()
        try:
            until(lambda: len(answers) > 50)
            save(path, text.replace("100000", "200000"))
            began = monotonic()
            until(lambda: '"rate";q=200000;w=200' in {policy for _, policy in answers[-20:]}, 30)
            print(f"in force after {monotonic() - began:.1f} s")
        finally:
            stop.set()
            for caller in callers:
                caller.join()
    assert errors == []
    assert {status for status, _ in answers} == {200}
    assert {policy for _, policy in answers} == {'"rate";q=100000;w=100', '"rate";q=200000;w=200'}
