"""What becomes of requests while the store of their limits fails: every fault of it, on real servers.

The bars are for a machine with nothing else to do, and are in the table at the end of the run with what was measured;
the tests hold times to ten times as much, and everything that can be counted to the letter.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
import time
from asyncio import CancelledError as Cancelled
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from functools import partial
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

import seawall
from faults import CALLERS, EVERY, TIGHT_CALLERS, Load, Service, Trial, endure, note, settings, start
from harness import hello, in_flight, problem, structured
from proxy import Proxy
from seawall.backends.redis.leases import HELD
from seawall.backends.redis.slots import LIFE
from seawall.rate import SECOND
from seawall.testing import Answer, drive
from serving import Caller, asgi_server, serving
from stores import HOST, Cluster, Sentinels, Server, cluster, free_port, sentinel, standalone, version
from test_turnstile import stepped

pytestmark = pytest.mark.slow

TESTS = Path(__file__).parent

Step = tuple[Callable[[], object], float]


@pytest.fixture(autouse=True)
def _quick_threads() -> Iterator[None]:
    """The proxy runs in a thread: in it, 5 ms for the turn of a thread would be a fault of its own."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(0.0005)
    yield
    sys.setswitchinterval(before)


@pytest.fixture(autouse=True)
def _no_errors(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """A store that fails is a warning; an error in the log is one of ours."""
    yield
    assert [record.getMessage() for record in caplog.get_records("call") if record.levelno >= logging.ERROR] == []


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """One for all faults that it survives."""
    with standalone() as server:
        yield server


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    with Proxy(server.address) as proxy:
        yield proxy


def ms(seconds: float) -> str:
    return f"+{seconds * 1000:.1f} ms"


def steps(*what: Step) -> Callable[[], None]:
    """Each of them, for its time."""

    def run() -> None:
        for change, seconds in what:
            change()
            time.sleep(seconds)

    return run


def write_down(
    fault: str,
    bar: str,
    trial: Trial,
    load: Load,
    *,
    added: float | None = None,
    p99: float | None = None,
    back: float | None = None,
    per_second: float | None = None,
    also: str = "",
) -> None:
    """A line of the table: the bars are for the slowest request, for 99 of 100 after the first moment (each beside what
    was before), for the return of the store and for connections made in a second."""
    rest = trial.then(load)
    more = max(0.0, rest.p99 - trial.before.p99)
    told = [f"{ms(trial.added)}, then p99 {rest.p99 * 1000:.1f} ms", f"back {trial.back:.2f} s", "5xx 0"]
    if trial.bound is not None:
        told.append(f"admitted {trial.admitted} of {trial.bound}")
    if per_second is not None:
        told.append(f"connections {trial.made}")
    if also:
        told.append(also)
    if trial.fault.lag > 0.01:
        told.append(f"(loop late {ms(trial.fault.lag)})")
    pairs = ((trial.added, added), (more, p99), (trial.back, back))
    met = all(limit is None or value <= limit for value, limit in pairs)
    # Ten times their bars, and what the event loop of the test was late by is not the store's.
    assert all(limit is None or value - trial.fault.lag <= 10 * limit for value, limit in pairs)
    if per_second is not None:
        assert trial.made <= per_second * (trial.fault.ended - trial.fault.begun) + 1
    note(fault, bar, ", ".join(told), met=met)


# Silence


@pytest.mark.parametrize("leases", [False, True], ids=["", "leases"])
async def test_a_frozen_store_costs_one_budget_and_then_nothing(leases: bool, server: Server, proxy: Proxy) -> None:
    async with Service(proxy.url, leases=leases) as service:
        trial, load = await endure(service, server.freeze, server.thaw, 1.2, proxy=proxy)
    bar = "<= 40 ms once, then p99 <= 1 ms; back <= 1 s; 5xx 0; <= 1 connection/s"
    write_down("frozen (SIGSTOP)" + ", leases" * leases, bar, trial, load, added=0.04, p99=0.001, back=1, per_second=1)
    assert trial.fallbacks > 0


async def test_a_black_hole_costs_one_budget_and_then_nothing(proxy: Proxy) -> None:
    async with Service(proxy.url) as service:
        trial, load = await endure(service, proxy.silent, proxy.passing, 1.2, proxy=proxy)
    bar = "<= 40 ms once, then p99 <= 1 ms; back <= 1 s; 5xx 0; <= 1 connection/s"
    write_down("black hole", bar, trial, load, added=0.04, p99=0.001, back=1, per_second=1)
    assert trial.fallbacks > 0


async def test_a_store_that_accepts_and_never_answers_costs_one_budget(proxy: Proxy) -> None:
    def hurt() -> None:
        proxy.refusing()
        proxy.silent()

    async with Service(proxy.url) as service:
        trial, load = await endure(service, hurt, proxy.passing, 1.2, proxy=proxy)
    bar = "budget kept; fds stable; mismatches 0; <= 1 connection/s"
    write_down("accepts, never answers", bar, trial, load, added=0.04, p99=0.001, back=2, per_second=1)


# Refusal


@pytest.mark.parametrize("leases", [False, True], ids=["", "leases"])
async def test_a_killed_store_costs_nothing(leases: bool) -> None:
    with standalone() as mortal:
        async with Service(mortal.url, leases=leases) as service:
            trial, load = await endure(service, mortal.kill, mortal.restart, 0.8, losses=1)
    write_down("refused (kill)" + ", leases" * leases, "<= 5 ms; 5xx 0", trial, load, added=0.005, p99=0.001, back=2)


async def test_a_store_that_restarts_empty_gives_one_burst_more() -> None:
    with standalone() as mortal:
        async with Service(mortal.url) as service:
            trial, load = await endure(service, mortal.restart, None, 0.4, losses=1)
    write_down("restart, empty", "0 errors; <= one burst per key extra", trial, load, back=1)


async def test_a_store_that_comes_and_goes_is_borne(proxy: Proxy) -> None:
    hurt = steps(*[(proxy.refusing, 0.1), (proxy.passing, 0.1)] * 15)
    async with Service(proxy.url) as service:
        trial, load = await endure(service, hurt, None, 3.0, proxy=proxy)
    bar = "<= 40 ms; 5xx 0; probes only"
    write_down("flapping, 100 ms for 3 s", bar, trial, load, added=0.04, back=1, also=f"connections {trial.made}")
    assert trial.made <= 3 / 0.2 + 1, "a connection a probe"


# Broken connections


async def test_a_connection_is_never_used_after_part_of_a_reply(proxy: Proxy) -> None:
    parts = [(partial(proxy.resetting, n), 0.3) for n in (1, 30, 0, 7, 400)]
    async with Service(proxy.url) as service:
        trial, load = await endure(service, steps(*parts), proxy.passing, 1.6, proxy=proxy)
    bar = "mismatches 0, fds stable"
    write_down("reset mid-reply", bar, trial, load, added=0.04, p99=0.001, back=1, also="mismatches 0, fds stable")


async def test_a_reply_that_comes_byte_by_byte_is_nobody_s(proxy: Proxy) -> None:
    async with Service(proxy.url) as service:
        trial, load = await endure(service, proxy.dripping, proxy.passing, 1.5, proxy=proxy)
    bar = "mismatches 0, fds stable; <= 1 connection/s"
    also = "mismatches 0, fds stable"
    write_down("1 byte per 100 ms", bar, trial, load, added=0.04, p99=0.001, back=2, per_second=1, also=also)


async def test_what_is_no_reply_is_not_believed(proxy: Proxy) -> None:
    kinds = (b":1\r\n", b"*3\r\n:1\r\n:2\r\n:3\r\n", b"\x00" * 9, b"$5\r\nab")
    parts = [(partial(proxy.garbage, answer), 0.3) for answer in kinds]
    async with Service(proxy.url) as service:
        trial, load = await endure(service, steps(*parts), proxy.passing, 1.3, proxy=proxy)
        mismatches = service.calls.get("mismatch", 0)
    assert mismatches > 0
    write_down("garbage for replies", "counted, mismatches 0", trial, load, added=0.04, p99=0.001, back=2)


# Slowness


async def test_a_slow_store_costs_the_budget_and_no_connections(proxy: Proxy) -> None:
    delays = [(partial(proxy.delayed, delay, reply_only=True), 0.4) for delay in (0.03, 0.08, 0.2)]
    async with Service(proxy.url) as service:
        trial, load = await endure(service, steps(*delays), proxy.passing, 1.2, proxy=proxy)
    bar = "p99 <= 30 ms; <= 1 connection/s"
    write_down("slow 30, 80, 200 ms (proxy)", bar, trial, load, p99=0.03, back=1, per_second=1)


async def test_a_store_that_is_just_in_time_decides(proxy: Proxy) -> None:
    async with Service(proxy.url, timeout="1s") as service:
        trial, load = await endure(service, partial(proxy.delayed, 0.02, reply_only=True), proxy.passing, 0.5)
    also = f"decided without the store {trial.fallbacks}"
    write_down("slow 20 ms, budget 1 s", "the store decides; 5xx 0", trial, load, also=also)
    assert trial.fallbacks == 0


async def test_a_paused_store_costs_the_budget(server: Server, proxy: Proxy) -> None:
    def hurt() -> None:
        server.command("CLIENT", "PAUSE", 500, "ALL")

    async with Service(proxy.url) as service:
        trial, load = await endure(service, hurt, None, 0.6, proxy=proxy)
    bar = "p99 <= 30 ms; <= 1 connection/s"
    write_down("slow (CLIENT PAUSE 500)", bar, trial, load, p99=0.03, back=1, per_second=1)


# Errors


async def test_a_flushed_script_is_sent_again_in_time(server: Server, proxy: Proxy) -> None:
    flushes = steps(*[(lambda: server.command("SCRIPT", "FLUSH"), 0.02)] * 30)
    async with Service(proxy.url) as service:
        trial, load = await endure(service, flushes, None, 0.7, proxy=proxy)
        assert service.calls.get("error", 0) == 0
    also = f"decided without the store {trial.fallbacks}"
    write_down("SCRIPT FLUSH, 50 a second", "EVAL in the budget; 0 errors", trial, load, added=0.04, also=also)
    assert trial.made == 0


async def test_a_store_that_becomes_a_replica_is_left_and_found_again(server: Server, proxy: Proxy) -> None:
    def hurt() -> None:
        server.command("REPLICAOF", HOST, free_port())

    async with Service(proxy.url) as service:
        trial, load = await endure(service, hurt, lambda: server.command("REPLICAOF", "NO", "ONE"), 0.8, proxy=proxy)
    bar = "resume <= 2 s; 5xx 0"
    write_down("READONLY (REPLICAOF)", bar, trial, load, added=0.04, p99=0.001, back=2)
    assert trial.fallbacks > 0


async def test_a_store_that_forbids_the_script_is_left_until_it_allows_it(server: Server) -> None:
    server.command("ACL", "SETUSER", "app", "on", ">secret", "~*", "+@all")
    forbid = partial(server.command, "ACL", "SETUSER", "app", "-eval", "-evalsha")
    allow = partial(server.command, "ACL", "SETUSER", "app", "+eval", "+evalsha")
    with Proxy(server.address) as proxy:
        async with Service(proxy.url.replace("//", "//app:secret@")) as service:
            trial, load = await endure(service, forbid, allow, 0.8, proxy=proxy)
        assert trial.made == 0
        assert trial.fallbacks > 0
    write_down("NOPERM (ACL SETUSER)", "5xx 0", trial, load, added=0.04, p99=0.001, back=1)


async def test_a_store_that_is_full_decides(server: Server, proxy: Proxy) -> None:
    fill = partial(server.command, "CONFIG", "SET", "maxmemory", 1)
    empty = partial(server.command, "CONFIG", "SET", "maxmemory", 0)
    async with Service(proxy.url) as service:
        trial, load = await endure(service, fill, empty, 0.5, proxy=proxy)
        errors = service.calls.get("error", 0)
    also = f"decided without the store {trial.fallbacks}"
    write_down("maxmemory, noeviction", "decide or go local; 5xx 0", trial, load, added=0.04, back=1, also=also)
    if version(server.binary) >= (7,):
        assert errors == 0, "the script says that it may write"


async def test_a_store_that_evicts_forgets_and_breaks_nothing(
    server: Server, proxy: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    def evict() -> None:
        server.command("CONFIG", "SET", "maxmemory-policy", "allkeys-lru", "maxmemory", 1)

    def keep() -> None:
        server.command("CONFIG", "SET", "maxmemory-policy", "noeviction", "maxmemory", 0)

    server.command("CONFIG", "SET", "maxmemory-policy", "allkeys-lru", "maxmemory", "1gb")
    async with Service(proxy.url) as service:
        # What is evicted is forgotten: nothing bounds what is admitted.
        trial, load = await endure(service, evict, keep, 0.5, proxy=proxy, losses=None)
    evicted = int(server.info("stats")["evicted_keys"])
    assert evicted > 0
    [warning] = [record.getMessage() for record in caplog.records if "maxmemory-policy" in record.getMessage()]
    assert warning.startswith(f"{HOST}:{proxy.port} evicts keys when its memory is full (allkeys-lru)")
    write_down(
        "maxmemory, allkeys-lru",
        "5xx 0; a warning at start-up",
        trial,
        load,
        added=0.04,
        back=1,
        also=f"evicted {evicted}",
    )


# From the start


async def test_a_service_starts_without_its_store_and_finds_it_later() -> None:
    with standalone() as late:
        late.kill()
        async with Service(late.url) as service:
            trial, load = await start(service, late.restart, losses=1)
    write_down("away at start-up", "starts, serves, recovers; 5xx 0", trial, load, back=1)


async def test_a_service_starts_with_a_wrong_password_and_goes_on_with_the_right_one(server: Server) -> None:
    server.command("ACL", "SETUSER", "late", "on", ">other", "~*", "+@all")
    change = partial(server.command, "ACL", "SETUSER", "late", ">secret")
    with Proxy(server.address) as proxy:
        async with Service(proxy.url.replace("//", "//late:secret@")) as service:
            trial, load = await start(service, change, losses=0)
        assert proxy.connections <= 8, "a connection a probe"
    write_down("wrong password", "starts, serves, recovers; 5xx 0", trial, load, back=1)


# Of the service's own making


LOOPS = ["asyncio"] if sys.platform == "win32" else ["asyncio", "uvloop"]


@pytest.mark.parametrize("kind", LOOPS)
def test_a_stalled_event_loop_is_not_blamed_on_the_store(
    kind: str, proxy: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    """Replies come while it stalls; which loop looks at what first after it is the loop's business."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/stall":
            time.sleep(0.5)  # noqa: ASYNC251
        await hello(scope, receive, send)

    async def stall_under_load() -> int:
        # What is asked is under way for some time, so that there is always something to be late for.
        proxy.delayed(0.003, reply_only=True)
        async with Service(proxy.url, app=app, timeout="250ms") as service:
            await service.until_it_decides()
            async with Load(service) as load:
                await load.during(0.3)
                for _ in range(3):
                    await service.ask("/stall", 250)
                    assert service.up
                    await load.during(0.1)
                    assert service.up
            assert load.wrong == []
            assert service.calls.get("connection", 0) == 0
            return service.fallbacks

    with asyncio.Runner(loop_factory=import_module(kind).new_event_loop) as runner:
        fallbacks = runner.run(stall_under_load())
    opened = sum("is away" in record.getMessage() for record in caplog.records)
    assert opened == 0
    assert proxy.connections == 1
    note(
        f"event loop stalled 500 ms ({kind})",
        "breaker stays closed",
        f"opened {opened} in 3 stalls, connections 0, 5xx 0, decided without the store {fallbacks}",
    )


async def test_thousands_of_cancelled_requests_cost_no_connection_and_mix_nothing_up(proxy: Proxy) -> None:
    async with Service(proxy.url, timeout="1s") as service:
        await service.until_it_decides()
        connections, cancelled = proxy.connections, 0
        async with Load(service) as load:
            await load.during(0.1)
            until = time.perf_counter() + 6  # or the load's own callers have spent their plans
            for wait in range(3_000):
                if time.perf_counter() > until:
                    break
                victim = asyncio.create_task(service.ask("/other", f"198.18.{wait // 250}.{wait % 250}"))
                for _ in range(wait % 4):
                    await asyncio.sleep(0)
                if wait % 50 == 0:
                    await asyncio.sleep(0.001)
                victim.cancel()
                with suppress(asyncio.CancelledError):
                    await victim
                    cancelled -= 1
                cancelled += 1
            await load.during(0.1)
        assert load.wrong == []
        assert service.app.statistics()["concurrency"] == {"callers": 0, "in_flight": 0}
        made = proxy.connections - connections
        mismatches = service.calls.get("mismatch", 0)
    assert cancelled > 200
    assert (made, mismatches) == (0, 0)
    note("cancels under load", "0 connections, 0 mismatches", f"{cancelled} cancelled, {made}, {mismatches}")


@pytest.mark.parametrize("away", [False, True], ids=["answering", "silent"])
async def test_whatever_is_thrown_wherever_a_request_waits_nothing_leaks(away: bool, proxy: Proxy) -> None:
    """The coroutine is stepped by hand: cancelled wherever it waits, when it is woken or before, once and twice."""
    own = seawall.limit("1000000/day", name="own")

    @own
    async def endpoint() -> None:
        await asyncio.sleep(0)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await receive()
            seawall.charge(Request(scope), 1)
            await endpoint()
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await asyncio.sleep(0)
            await send({"type": "http.response.body", "body": b"x"})
        finally:
            await asyncio.sleep(0)

    policy = settings(proxy.url, timeout="10s" if not away else "50ms")
    policy["plans"]["default"]["concurrency"] = 1
    policy["shedding"] = {"algorithm": "fixed", "limit": {"initial": 1, "min": 1, "max": 1}}
    async with Service(proxy.url, app=app, config=policy) as service:
        await service.until_it_decides()
        connections, tasks = proxy.connections, len(asyncio.all_tasks())

        async def attempt(at: int, when: str, times: int) -> int:
            waited: int = await stepped(drive(service.app, client=("192.0.2.1", 1)), at, Cancelled, when, times)
            return waited

        async def is_let_in() -> bool:
            """There is one place for all and one for each caller: in time that whoever was cancelled is heard of."""
            for _ in range(100):
                if (await service.ask("/", 1)).status == 200:
                    return True
                await asyncio.sleep(0.005)
            return False

        most = await attempt(1 << 30, "woken", 1)
        tried = leaks = 0
        for at, when, times in product([1] if away else range(1, most + 1), ("at once", "woken"), (1, 2)):
            if away:
                # Only who asks first waits for it.
                proxy.passing()
                await service.until_it_decides()
                proxy.silent()
            with suppress(Cancelled):
                await attempt(at, when, times)
            tried += 1
            overload, callers = service.app.statistics()["overload"], service.app.statistics()["concurrency"]
            held = (overload["in_flight"], sum(overload["waiting"].values()), callers["in_flight"])
            leaks += held != (0, 0, 0) or not await is_let_in()
        assert leaks == 0
        assert in_flight(service.registry) == 0
        assert len(asyncio.all_tasks()) == tasks
        assert proxy.connections == connections
        proxy.passing()
    assert most >= 5
    note(
        f"cancel at every await, twice ({'silent' if away else 'answering'} store)",
        "0 leaks",
        f"{leaks} leaks, {tried} ways to be cancelled, connections 0",
    )


async def test_each_rule_does_what_it_says_while_the_store_is_away(proxy: Proxy) -> None:
    policy = settings(proxy.url, on_failure="deny")
    limit = {"rate": {"limit": "3/day", "burst": 3}, "per": "client_ip"}
    policy["routes"] = [
        {"name": name, "match": {"path": f"/{name}"}, "limits": {name: limit}, "on_backend_failure": name}
        for name in ("local", "allow", "deny")
    ] + [{"name": "silent", "match": {"path": "/silent"}, "limits": {"silent": limit}}]
    async with Service(proxy.url, config=policy) as service:
        await service.until_it_decides()
        proxy.silent()
        answers: dict[str, list[Answer]] = {}
        for name in ("local", "allow", "deny", "silent"):
            answers[name] = [await service.ask(f"/{name}", 7) for _ in range(6)]
        statuses = {name: [answer.status for answer in got] for name, got in answers.items()}
        assert statuses["local"] == [200] * 3 + [429] * 3
        assert statuses["allow"] == [200] * 6
        assert statuses["deny"] == statuses["silent"] == [503] * 6
        for answer in answers["deny"]:
            assert problem(answer)["reason"] == "backend_unavailable"
            assert answer.headers["retry-after"] in ("1", "2")
        proxy.passing()
        await service.until_it_decides()
        assert [(await service.ask(f"/{name}", 8)).status for name in answers] == [200] * 4
    note("local, allow, deny (silent store)", "their share, all, 503", "3 and 3 x 429; 6; 6 x 503, and 503 by default")


async def test_two_versions_of_a_policy_share_one_store(server: Server, proxy: Proxy) -> None:
    """A rolling deploy: what one version counted means the same to the other, as far as it can."""

    def version_of(burst: int, **plan: Any) -> dict[str, Any]:
        made = settings(proxy.url, key_prefix="rolling", deny_cache=False)
        made["plans"] = {"default": {"rate": {"limit": "8/day", "burst": burst}, **plan}}
        return made

    old, new = version_of(100), version_of(40, quota="10000/day")
    # Another value of the backend's settings, or both would share one connection.
    new["backend"]["max_keys"] = 50_000
    async with Service(proxy.url, config=old) as one, Service(proxy.url, config=new) as other:
        await one.until_it_decides()
        await other.until_it_decides()
        answers = [await service.ask("/rolling", 9) for _ in range(150) for service in (one, other)]
        calls = [service.calls for service in (one, other)]
        fallbacks = one.fallbacks + other.fallbacks
    admitted = sum(answer.status == 200 for answer in answers)
    assert {answer.status for answer in answers} == {200, 429}
    assert admitted <= 2 * 100
    assert fallbacks == 0
    assert [call.get("error", 0) + call.get("mismatch", 0) for call in calls] == [0, 0]
    errors = server.info("errorstats")
    assert "errorstat_WRONGTYPE" not in errors
    note("rolling deploy, bursts 100 and 40", "<= 2x burst; no WRONGTYPE", f"admitted {admitted}, WRONGTYPE 0, 5xx 0")


# Several nodes


@pytest.fixture(scope="module")
def nodes() -> Iterator[Cluster]:
    """Three, of which each answers for its own slots whatever becomes of the others."""
    with cluster(arguments=["--cluster-require-full-coverage", "no"]) as nodes:
        yield nodes


def slots_in_use(node: Server, service: Service) -> dict[int, list[str]]:
    """What a service has on a node, by slot."""
    found: dict[int, list[str]] = {}
    for key in node.command("KEYS", f"{service.prefix}:*"):
        found.setdefault(node.command("CLUSTER", "KEYSLOT", key), []).append(key)
    return found


async def test_slots_move_from_node_to_node_and_requests_follow(nodes: Cluster) -> None:
    first, second, _ = nodes.nodes

    def move() -> None:
        for slot in list(slots_in_use(first, service))[:10]:
            nodes.migrate(slot, second)

    async with Service(nodes.url) as service:
        trial, load = await endure(service, move, None, 0.5)
        errors = service.calls.get("error", 0)
    assert errors == 0
    assert all("errorstat_CROSSSLOT" not in node.info("errorstats") for node in nodes.nodes)
    also = f"CROSSSLOT 0, decided without the store {trial.fallbacks}"
    write_down(
        "cluster: 10 slots move (MOVED)", "within budget; 0 CROSSSLOT", trial, load, added=0.025, back=1, also=also
    )


def busy_slot(node: Server, service: Service, idle: Collection[int]) -> tuple[int, list[str]]:
    """A slot that is asked for, of a caller with two keys. (Never StopIteration, which no future can hold.)"""
    for _ in range(500):
        for slot, keys in slots_in_use(node, service).items():
            if len(keys) == 2 and slot not in idle:
                return slot, keys
        time.sleep(0.01)
    raise AssertionError("nobody has two keys")


async def test_a_move_that_stops_in_the_middle_stops_one_caller_s_slot_only(nodes: Cluster) -> None:
    """First some of a caller's keys are on either node, which is TRYAGAIN; then none is where it was, which is ASK.

    Who has nothing in flight has no key for its slots, which is TRYAGAIN to who is asked then.
    """
    second, third = nodes.nodes[1:]
    told: list[tuple[int, float]] = []

    def look() -> None:
        told.append((service.fallbacks, time.perf_counter()))

    def stop_in_the_middle() -> None:
        slot, keys = busy_slot(second, service, idle)
        migration = nodes.migration(slot, third)
        migration.begin()
        look()
        migration.move(keys[0])
        time.sleep(0.4)
        look()
        migration.move()
        time.sleep(0.1)
        look()
        time.sleep(0.4)
        look()
        migration.finish()

    # A budget that a busy machine keeps: whoever is late counts here as decided without the store.
    async with Service(nodes.url, timeout="250ms") as service:
        await service.until_it_decides()
        idle = slots_in_use(second, service)
        trial, load = await endure(service, stop_in_the_middle, None, 1.2)
        opened = service.calls.get("error", 0) + service.calls.get("timeout", 0)
    pairs = ((told[0], told[1]), (told[2], told[3]))
    (torn, torn_for), (asking, asking_for) = ((after[0] - before[0], after[1] - before[1]) for before, after in pairs)
    errors = [node.info("errorstats").keys() for node in nodes.nodes]
    assert "errorstat_TRYAGAIN" in errors[1]
    assert "errorstat_ASK" in errors[1]
    assert all("errorstat_CROSSSLOT" not in each for each in errors)
    # One caller asks 33 times a second. All others are decided by the store.
    assert torn <= torn_for / EVERY + 2
    assert asking <= asking_for / EVERY + 2
    also = f"without the store: TRYAGAIN {torn}, ASK {asking}; other calls failed {opened}; CROSSSLOT 0"
    bar = "within budget; 0 CROSSSLOT"
    write_down("cluster: stopped half-way (ASK, TRYAGAIN)", bar, trial, load, added=0.025, back=1, also=also)


async def test_a_node_that_is_killed_takes_only_its_own_slots_along(nodes: Cluster) -> None:
    victim = nodes.nodes[2]
    told: list[int] = []

    def kill() -> None:
        told.append(len(slots_in_use(victim, service)))
        victim.kill()

    # A budget that a busy machine keeps: whoever is late counts here as decided without the store.
    async with Service(nodes.url, timeout="250ms") as service:
        trial, load = await endure(service, kill, victim.restart, 0.6, losses=1)
    [its_callers] = told
    # Those of the dead node ask 33 times a second each; the others are decided by the store as before.
    most = (its_callers + TIGHT_CALLERS) * (trial.away / EVERY + 2)
    assert 0 < trial.fallbacks <= most
    asked = len(load.since(trial.fault.begun, trial.fault.begun + trial.away).requests)
    also = f"without the store {trial.fallbacks} of {asked}, {its_callers} of {CALLERS + 2} callers are its"
    write_down("cluster: a node killed", "other slots as before; 5xx 0", trial, load, added=0.04, p99=0.005, also=also)


@pytest.fixture(scope="module")
def sentinels() -> Iterator[Sentinels]:
    with sentinel() as sentinels:
        yield sentinels


async def test_a_planned_failover_is_followed(sentinels: Sentinels) -> None:
    retiring, heir = sentinels.master, sentinels.replica

    def fail_over() -> None:
        sentinels.failover()
        sentinels.wait_for_master(heir)

    def wait_for_the_other() -> None:
        # Until it is told, the old master decides as well.
        while retiring.info("replication")["role"] == "master":
            time.sleep(0.005)
        heir.command("CONFIG", "RESETSTAT")

    async with Service(sentinels.url) as service:
        # What the heir has not heard of is lost.
        trial, load = await endure(service, fail_over, wait_for_the_other, 0.1, losses=1)
    assert heir.calls()["evalsha"] > 0
    also = f"in all {trial.away:.2f} s, decided without the store {trial.fallbacks}"
    write_down("Sentinel failover", "resume <= 2 s; 5xx 0", trial, load, added=0.04, back=2, also=also)


async def test_the_death_of_a_master_under_sentinels_is_survived(sentinels: Sentinels) -> None:
    for each in sentinels.sentinels:
        each.command("SENTINEL", "SET", sentinels.service, "failover-timeout", 1000)
    dying, heir = sentinels.master, sentinels.replica

    def die() -> None:
        dying.kill()

    async with Service(sentinels.url) as service:
        trial, load = await endure(service, die, lambda: sentinels.wait_for_master(heir), 0.1, losses=1)
    also = f"in all {trial.away:.2f} s, of which until a new one is named {trial.away - trial.back:.2f}"
    write_down("master killed under Sentinel", "resume <= 2 s; 5xx 0", trial, load, added=0.04, back=2, also=also)


# Processes that end

GRACE = 1
UVICORN = (*asgi_server("uvicorn-httptools", "faults:served"), "--factory", "--timeout-graceful-shutdown", str(GRACE))


@pytest.mark.parametrize("frozen", [False, True], ids=["answering", "frozen"])
async def test_a_server_that_is_told_to_end_under_load_does_so_in_time(
    frozen: bool, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = settings(server.url, leases=True)
    policy["plans"]["default"]["concurrency"] = 1_000
    monkeypatch.setenv("FAULTS_POLICY", json.dumps(policy))
    statuses: list[int] = []

    async def call(port: int) -> None:
        """Ask until nobody listens any more."""
        with suppress(OSError, asyncio.IncompleteReadError):
            caller = await Caller.connect(port)
            try:
                while True:
                    statuses.append((await caller.ask("/")).status)
            finally:
                await caller.closed()

    with serving(UVICORN, tmp_path / "log", cwd=TESTS) as served:
        async with asyncio.timeout(30), asyncio.TaskGroup() as group:
            for _ in range(20):
                group.create_task(call(served.port))
            await asyncio.sleep(0.6)
            asked = len(statuses)
            if frozen:
                server.freeze()
            begun = time.perf_counter()
            served.process.send_signal(signal.SIGTERM)
            try:
                await asyncio.to_thread(served.process.wait, 20)
            finally:
                server.thaw()
            took = time.perf_counter() - begun
        ended = served.process.returncode
    assert asked > 100
    assert set(statuses) == {200}
    assert ended in (0, -signal.SIGTERM), (tmp_path / "log").read_text()
    assert took <= GRACE + 10
    note(
        f"SIGTERM under load ({'frozen' if frozen else 'answering'} store)",
        f"exit <= grace ({GRACE} s) + 1 s; 5xx 0",
        f"exit {took:.2f} s, 5xx 0 of {len(statuses)}",
        met=took <= GRACE + 1,
    )


async def test_what_a_killed_process_held_is_free_again(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two slots of two, and a part of a quota that it had taken ahead."""
    slots, quota, asked = 2, 1_000_000, 45
    policy = settings(server.url, leases=True, instances=2, timeout="1s")
    policy["plans"]["default"] = {"quota": f"{quota}/month", "concurrency": slots}
    policy["routes"] = []
    monkeypatch.setenv("FAULTS_POLICY", json.dumps(policy))

    async with Service(server.url, config=policy) as service, asyncio.timeout(60):
        await service.until_it_decides()
        with serving(UVICORN, tmp_path / "log", cwd=TESTS) as served:
            callers = [await Caller.connect(served.port) for _ in range(slots)]
            answers = [await callers[0].ask("/") for _ in range(asked)]
            for caller in callers:
                await caller.send("/hold")
                answers.append(await caller.start())
            refused = await service.ask("/", HOST)
            os.kill(served.process.pid, signal.SIGKILL)
            begun = time.perf_counter()
            for caller in callers:
                caller.abort()
        asked += slots
        lefts: list[int] = []
        slots_free = 0.0
        while not lefts or lefts[-1] < quota - asked:
            answer = await service.ask("/", HOST)
            if answer.status == 200:
                if not lefts:
                    slots_free = time.perf_counter() - begun
                asked += 1
                lefts.append(left(answer))
            await asyncio.sleep(0.1)
        quota_free = time.perf_counter() - begun
    assert {each.status for each in answers} == {200}
    assert (refused.status, problem(refused)["reason"]) == (429, "concurrency")
    assert lefts[0] < quota - asked + len(lefts) - 1, "it had taken some ahead"
    assert lefts[-1] <= quota - asked + 64, "of what it had taken, what it had spent comes back as well"
    assert slots_free <= LIFE / SECOND + 10
    assert quota_free <= HELD / SECOND + 10
    note(
        "SIGKILL holding slots and leases",
        f"freed <= lease ({LIFE / SECOND:g} s slots, {HELD / SECOND:g} s quota) + 1 s",
        f"slots {slots_free:.2f} s, quota {quota_free:.2f} s",
        met=slots_free <= LIFE / SECOND + 1 and quota_free <= HELD / SECOND + 1,
    )


def left(answer: Answer) -> int:
    """What is left of the quota."""
    [(_, parameters)] = structured(answer.headers["ratelimit"])
    return int(parameters["r"])
