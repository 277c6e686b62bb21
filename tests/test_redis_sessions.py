"""From the first connection to the last: event loops that come and go, who is counted, and what an operator is told."""

from __future__ import annotations

import asyncio
import gc
import inspect
import logging
import re
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext, suppress
from typing import Any
from uuid import uuid4

import hiredis
import pytest

import stores
from proxy import Proxy
from seawall.backends.redis import RedisBackend, session
from seawall.backends.redis.keys import slot_of, tag_of
from seawall.backends.redis.meters import SharedMeter
from seawall.rate import SECOND, Quota, Rate
from seawall.testing import ManualClock, reset
from sharing import Fleet, Process, until
from stores import HOST, Server, free_port, standalone

FOR_EVER = 36_000_000 * SECOND
YEAR = 365 * 86_400 * SECOND


@pytest.fixture(autouse=True)
def _fresh() -> None:
    reset()


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, logger="seawall")
    return caplog


def warnings(log: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in log.records if record.levelno >= logging.WARNING]


def bucket(process: Process, burst: int) -> SharedMeter:
    return process.meter("rate", "tenant", Rate(burst, FOR_EVER))


def process_at(url: str, **options: Any) -> Process:
    return Process(RedisBackend(url, **{"timeout_ns": 5_000_000_000, "key_prefix": f"p-{uuid4()}", **options}))


def connections(server: Server) -> int:
    """How many of ours the server has."""
    return sum("name=seawall" in line for line in server.command("CLIENT", "LIST").splitlines())


# Loops


def test_one_loop_after_another_connects_anew(store: Server) -> None:
    process = process_at(store.url, leases=False)
    meter = bucket(process, 10)

    async def serve() -> tuple[int, int]:
        process.backend.open()
        left = (await process.spend((meter, "a", 1))).left[0]
        ours = connections(store)
        await process.backend.aclose()
        return left, ours

    assert [asyncio.run(serve()) for _ in range(3)] == [(9, 1), (8, 1), (7, 1)]
    assert process.calls.fallen == []


@pytest.mark.filterwarnings("ignore")  # what asyncio says of transports whose loop is gone
def test_a_loop_that_was_closed_with_everything_open_keeps_nobody_from_connecting(store: Server) -> None:
    process = process_at(store.url)
    meter = bucket(process, 10)

    async def serve() -> int:
        return (await process.spend((meter, "a", 1))).left[0]

    for left in (9, 8):
        loop = asyncio.new_event_loop()
        assert loop.run_until_complete(serve()) == left
        loop.close()

    async def close() -> int:
        assert await serve() == 7
        sessions = len(process.backend._sessions)
        await process.backend.aclose()
        return sessions

    assert asyncio.run(close()) == 1
    assert process.calls.fallen == []
    gc.collect()


@pytest.mark.filterwarnings("ignore")
def test_a_loop_that_was_closed_while_it_looked_for_nodes_keeps_nobody_from_connecting() -> None:
    process = process_at(f"redis+cluster://{HOST}:{free_port()}", timeout_ns=1_000_000)
    meter = bucket(process, 10)

    for _ in range(2):
        loop = asyncio.new_event_loop()
        answer = loop.create_task(process.spend((meter, "a", 1)))
        loop.call_soon(loop.stop)
        loop.run_forever()
        loop.close()
        del answer

    async def close() -> None:
        assert await process.admits((meter, "a", 1))
        await process.backend.aclose()

    asyncio.run(close())
    assert process.calls.fallen == ["local"]
    gc.collect()


def test_loops_in_several_threads_share_one_backend(store: Server) -> None:
    process = process_at(store.url, leases=False)
    meter = bucket(process, 200)
    admitted: list[int] = []
    begin = threading.Barrier(4)

    async def serve() -> None:
        process.backend.open()
        begin.wait(10)
        answers = await asyncio.gather(*(process.admits((meter, "a", 1)) for _ in range(40)))
        for _ in range(40):
            answers.append(await process.admits((meter, "a", 1)))
        admitted.append(sum(answers))
        await process.backend.aclose()

    threads = [threading.Thread(target=asyncio.run, args=(serve(),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert (len(admitted), sum(admitted)) == (4, 200)
    assert process.calls.fallen == []
    assert connections(store) == 0


async def test_opening_and_closing_twice_is_once(store: Server) -> None:
    process = process_at(store.url)
    meter = bucket(process, 10)
    await process.backend.aclose()
    for left in (9, 8):
        process.backend.open()
        process.backend.open()
        assert (await process.spend((meter, "a", 1))).left == [left]
        assert connections(store) == 1
        await asyncio.gather(process.backend.aclose(), process.backend.aclose())
        await process.backend.aclose()
        await until(lambda: connections(store) == 0, "it is closed")
    assert process.backend._sessions == {}


async def test_what_is_asked_before_the_end_is_answered_before_it(store: Server) -> None:
    process = process_at(store.url, leases=False)
    meter = bucket(process, 30)
    await process.spend((meter, "a", 1))
    answers = [process.backend.spend([(meter, "a", 1)]) for _ in range(50)]
    await process.backend.aclose()
    verdicts = [await answer for answer in answers if inspect.isawaitable(answer)]
    assert sum(verdict is not None and verdict.admitted for verdict in verdicts) == 29
    assert process.calls.fallen == []
    assert process.backend._sessions == {}


@pytest.mark.parametrize("connected", [True, False])
async def test_an_end_waits_for_a_server_that_is_away_as_long_as_a_call_may_take(
    store: Server, connected: bool
) -> None:
    process = process_at(store.url, timeout_ns=50_000_000)
    meter = bucket(process, 30)
    if connected:
        await process.spend((meter, "a", 1))
    store.freeze()
    try:
        answer = process.backend.spend([(meter, "a", 1)])
        await asyncio.sleep(0)
        begun = time.monotonic()
        await process.backend.aclose()
        assert time.monotonic() - begun < 1
        assert inspect.isawaitable(answer)
        verdict = await answer
        assert verdict is not None
        assert verdict.admitted
        assert process.calls.fallen == ["local"]
    finally:
        store.thaw()


def test_a_decision_needs_a_running_loop(store: Server) -> None:
    process = process_at(store.url)
    meter = bucket(process, 30)
    with pytest.raises(RuntimeError, match="needs a running event loop"):
        process.backend.spend([(meter, "a", 1)])
    process.backend.refund([(meter, "a", 1)], 0)  # nobody waits for it
    assert process.backend.debit([(meter, "a", 1)]) == [0]


# Charges and meters


async def test_nothing_to_charge_is_admitted_without_a_call() -> None:
    process = process_at(f"redis://{HOST}:{free_port()}")
    verdict = await process.spend()
    assert (verdict.admitted, verdict.states, verdict.left, list(verdict.charges)) == (True, [], [], [])
    assert (process.calls.results, process.backend._sessions) == ([], {})


@pytest.mark.parametrize(("years", "fits"), [(35, True), (36, False), (3_600, False)])
def test_a_limit_that_takes_a_lifetime_to_refill_is_refused(years: int, fits: bool) -> None:
    process = process_at("redis://localhost")
    refused: AbstractContextManager[object] = nullcontext()
    if not fits:
        refused = pytest.raises(ValueError, match="'slow' takes more than 35 years to refill")
    with refused:
        process.meter("slow", "tenant", Rate(1, years * YEAR))


async def test_what_was_asked_about_another_day_than_the_server_s_is_asked_again(valkey: Server) -> None:
    clock = ManualClock("2026-03-04T23:59:59Z")
    async with Fleet(valkey.url, clock, deny_cache=False) as fleet:
        process = fleet.first
        meter = process.meter("quota", "tenant", Quota(2, "day"))
        for _ in range(2):
            assert await process.admits((meter, "a", 1))
        await fleet.advance(1)
        clock.advance(-1)  # this process is behind
        verdict = await process.spend((meter, "a", 1))
        assert (verdict.admitted, verdict.left) == (True, [1])
        clock.advance(-1)
        process.backend.told(clock.wall_ns() // 1_000)
        taken = process.backend.debit([(meter, "a", 1)])
        await fleet.settled()
        assert list(taken) == [1]


# Who is counted


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Signs of life are sent more often than every two seconds."""
    monkeypatch.setattr(session, "BEAT", 0.02)


@pytest.mark.usefixtures("quick")
async def test_processes_count_each_other_until_they_say_farewell(valkey: Server) -> None:
    async with Fleet(valkey.url, size=3, instances=None) as fleet:

        def counted() -> list[tuple[int, int]]:
            return [(process.backend.instances, process.backend.share.instances) for process in fleet.processes]

        await until(lambda: counted() == [(3, 3)] * 3, "all three are counted")
        await fleet.processes[0].backend.aclose()
        await until(lambda: counted()[1:] == [(2, 2)] * 2, "one has left")
        await fleet.processes[1].backend.aclose()
        await until(lambda: counted()[2:] == [(1, 1)], "one is alone")


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("expected", "instances", "share"), [(5, 5, 5), (1, 2, 1)])
async def test_the_share_follows_the_number_that_was_named(
    valkey: Server, expected: int, instances: int, share: int
) -> None:
    async with Fleet(valkey.url, size=2, instances=expected) as fleet:
        backend = fleet.first.backend
        await until(lambda: backend.instances == instances, "it has counted")
        assert backend.share.instances == share


# What is said


@pytest.fixture(scope="module")
def limited() -> Iterator[Server]:
    """A server whose memory a test may limit."""
    with standalone() as server:
        yield server


@pytest.mark.parametrize(
    ("memory", "policy", "said"),
    [
        ("64mb", "allkeys-lru", True),
        ("64mb", "volatile-ttl", True),
        ("64mb", "noeviction", False),
        ("0", "allkeys-lru", False),
    ],
)
async def test_memory_that_forgets_is_said_once(
    limited: Server, memory: str, policy: str, said: bool, log: pytest.LogCaptureFixture
) -> None:
    limited.command("CONFIG", "SET", "maxmemory", memory)
    limited.command("CONFIG", "SET", "maxmemory-policy", policy)
    for _ in range(3):
        async with Fleet(limited.url):
            pass
    line = (
        f"{HOST}:{limited.port} evicts keys when its memory is full ({policy}), and whoever is evicted has a fresh"
        " limit: set maxmemory-policy to noeviction"
    )
    assert warnings(log) == [line] * said


async def test_a_right_that_is_missing_is_said_in_one_line_at_the_start(log: pytest.LogCaptureFixture) -> None:
    with Server(users={"app": "on >hunter2 ~seawall:* +@all -evalsha -eval"}) as server:
        process = process_at(server.url_as("app", "hunter2"), key_prefix="seawall")
        process.backend.open()
        await until(lambda: not process.backend.up, "it is known to be away")
        await asyncio.sleep(0.7)  # for some probes
        await process.backend.aclose()
    (line,) = warnings(log)
    assert re.search(r"is away \(NOPERM .*evalsha.*\); each rule does what it says for that$", line)
    assert "hunter2" not in log.text


Answers = Callable[[list[bytes]], bytes | None]


@asynccontextmanager
async def impostor(answers: Answers) -> AsyncIterator[int]:
    """A server that says what it is told to of each command, or what a Valkey would of its introduction."""

    serving: set[asyncio.Task[None] | None] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        serving.add(asyncio.current_task())
        commands = hiredis.Reader()
        with suppress(ConnectionError):
            while data := await reader.read(65_536):
                commands.feed(data)
                while command := commands.gets():
                    said = answers(command)
                    writer.write(HELLO if said is None and command[0] == b"HELLO" else said or b"-ERR no\r\n")
        writer.close()

    port = free_port()
    async with await asyncio.start_server(serve, HOST, port):
        yield port
        await asyncio.gather(*(task for task in serving if task))  # every client has left


HELLO = b"*4\r\n$6\r\nserver\r\n$6\r\nvalkey\r\n$7\r\nversion\r\n$3\r\n9.0\r\n"


async def test_what_a_server_says_is_never_logged_raw(log: pytest.LogCaptureFixture) -> None:
    evil = "\x1b[2J\x07\u202e\u2028evil\x00"
    raw = evil.encode()

    def answers(command: list[bytes]) -> bytes | None:
        match command[0]:
            case b"HELLO":
                version = b"9.\x1b[31m"
                return HELLO.replace(b"$3\r\n9.0", b"$%d\r\n%b" % (len(version), version))
            case b"INFO":
                told = b"maxmemory:5\r\nmaxmemory_policy:all\x1b]0;x\x07\r\n"
                return b"$%d\r\n%b\r\n" % (len(told), told)
            case _:
                return b"-ERR " + raw + b"\r\n"

    async with impostor(answers) as port:
        process = process_at(f"redis://{HOST}:{port}")
        process.backend.open()
        await until(lambda: not process.backend.up, "it is known to be away")
        await until(lambda: len(log.records) == 3, "all is said")
        await process.backend.aclose()
    assert all(record.getMessage().isprintable() for record in log.records), log.messages
    assert any("evil" in line for line in warnings(log))
    assert any("evicts keys" in line for line in warnings(log))


async def test_a_server_that_comes_and_goes_is_not_said_each_time(
    valkey: Server, log: pytest.LogCaptureFixture
) -> None:
    with Proxy(valkey.address) as proxy:
        process = process_at(proxy.url, timeout_ns=20_000_000, leases=False)
        await flap(process, proxy, 3)
        name = f"{HOST}:{proxy.port}"
        away, back = warnings(log)
        assert away.startswith(f"{name} is away (")
        assert back == f"{name} is back"
        await process.backend.aclose()


async def flap(process: Process, proxy: Proxy, times: int) -> None:
    for _ in range(times):
        await asyncio.to_thread(proxy.silent)
        await process.spend((bucket(process, 9), "a", 1))
        assert not process.backend.up
        await asyncio.to_thread(proxy.passing)
        await until(lambda: process.backend.up, "it is back")


@pytest.mark.slow
async def test_what_was_not_said_is_said_later_if_it_is_still_so(
    valkey: Server, log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "QUIET", 2.0)
    with Proxy(valkey.address) as proxy:
        process = process_at(proxy.url, timeout_ns=20_000_000, leases=False)
        await flap(process, proxy, 2)
        assert len(warnings(log)) == 2
        await asyncio.to_thread(proxy.silent)
        await process.spend((bucket(process, 9), "a", 1))
        assert len(warnings(log)) == 2
        await until(lambda: len(warnings(log)) == 3, "it is said to be away at last")
        assert re.search(r"is away \((no answer in time|the probe failed)\)", warnings(log)[-1])
        await asyncio.to_thread(proxy.passing)
        await until(lambda: process.backend.up, "it is back")
        assert warnings(log)[-1].endswith("is back")
        await flap(process, proxy, 1)
        await until(lambda: not process.backend.session()._unsaid, "there is nothing to say")
        assert len(warnings(log)) == 4
        await process.backend.aclose()


async def test_whom_one_connects_to_is_said(valkey: Server, log: pytest.LogCaptureFixture) -> None:
    async with Fleet(valkey.url) as fleet:
        assert log.messages[0].startswith(f"connected to {HOST}:{valkey.port} (")
        assert repr(fleet.first.backend) == f"<RedisBackend at {HOST}:{valkey.port}, up>"
        assert repr(fleet.first.backend.session()).startswith("<Session [<Node")
    assert warnings(log) == []


# Clusters


@pytest.fixture(scope="module")
def cluster() -> Iterator[stores.Cluster]:
    with stores.cluster() as nodes:
        yield nodes


@pytest.mark.slow
async def test_a_slot_that_has_moved_is_asked_for_where_it_is(cluster: stores.Cluster) -> None:
    async with Fleet(cluster.url, leases=False) as fleet:
        process = fleet.first
        meter = bucket(process, 10)
        key = meter.tags["a"]
        assert await process.left(meter) == 10
        assert await process.admits((meter, "a", 1))
        slot = slot_of(tag_of(key))
        source = cluster.node_of(slot)
        target = next(node for node in cluster.nodes if node is not source)
        await asyncio.to_thread(cluster.migrate, slot, target)
        assert await process.left(meter) == 9
        routes = process.backend.session()._routes
        await until(lambda: routes.node(slot).name == f"{HOST}:{target.port}", "the map is read again")
        calls = target.calls().get("evalsha", 0)
        assert await process.left(meter) == 9
        assert target.calls()["evalsha"] > calls
        assert process.calls.fallen == []


async def test_a_seed_that_is_down_keeps_nobody_from_a_cluster(cluster: stores.Cluster) -> None:
    seeds = ",".join(f"{HOST}:{port}" for port in (free_port(), cluster.nodes[1].port))
    process = process_at(f"redis+cluster://{seeds}")
    process.backend.open()
    meter = bucket(process, 10)

    routes = process.backend.session()._routes
    await process.spend((meter, "a", 0))
    names = {f"{HOST}:{node.port}" for node in cluster.nodes}
    await until(lambda: names <= set(routes.nodes), "the map is read")
    process.calls.fallen.clear()
    assert await process.left(meter) == 10
    assert process.calls.fallen == []
    await process.backend.aclose()


async def test_a_cluster_of_which_nobody_is_there_is_decided_for_here() -> None:
    process = process_at(f"redis+cluster://{HOST}:{free_port()},{HOST}:{free_port()}")
    meter = bucket(process, 2)
    answers = [await process.admits((meter, str(number), 1)) for number in range(3)]
    assert answers == [True] * 3
    assert process.calls.fallen == ["local"] * 3
    assert not process.backend.up
    await process.backend.aclose()


# Sentinels


def names(address: tuple[str, int] | None) -> Answers:
    """A Sentinel that names this one as master, or knows of none."""

    def answers(command: list[bytes]) -> bytes | None:
        if command[0] != b"SENTINEL":
            return None
        if address is None:
            return b"*-1\r\n"
        parts = b"".join(b"$%d\r\n%b\r\n" % (len(part), part) for part in (address[0].encode(), b"%d" % address[1]))
        return b"*2\r\n" + parts

    return answers


async def said_of(url: str, log: pytest.LogCaptureFixture) -> str:
    """What is said of a server that nobody reaches."""
    process = process_at(url)
    process.backend.open()
    await until(lambda: warnings(log), "something is said")
    assert await process.admits((bucket(process, 2), "a", 1))
    assert process.calls.fallen == ["local"]
    await process.backend.aclose()
    (line,) = warnings(log)
    return line


async def test_the_first_sentinel_that_answers_is_believed(valkey: Server, log: pytest.LogCaptureFixture) -> None:
    async with impostor(names(valkey.address)) as port, impostor(names(None)) as ignorant:
        url = f"redis+sentinel://{HOST}:{free_port()},{HOST}:{ignorant},{HOST}:{port}/main"
        process = process_at(url)
        assert (await process.spend((bucket(process, 9), "a", 1))).left == [8]
        await process.backend.aclose()
    assert warnings(log) == []


async def test_sentinels_of_which_none_is_there_are_said(log: pytest.LogCaptureFixture) -> None:
    ports = [free_port(), free_port()]
    line = await said_of(f"redis+sentinel://{HOST}:{ports[0]},{HOST}:{ports[1]}/main", log)
    assert line.startswith("master main is away (no Sentinel names a master: ")
    assert all(str(port) in line for port in ports)


async def test_a_sentinel_that_knows_no_master_is_said(log: pytest.LogCaptureFixture) -> None:
    async with impostor(names(None)) as port:
        line = await said_of(f"redis+sentinel://{HOST}:{port}/main", log)
    assert line.startswith("master main is away (no Sentinel names a master: ")


async def test_a_master_that_is_none_yet_is_not_asked(valkey: Server, log: pytest.LogCaptureFixture) -> None:
    with standalone() as replica:
        replica.command("REPLICAOF", *valkey.address)
        async with impostor(names(replica.address)) as port:
            line = await said_of(f"redis+sentinel://{HOST}:{port}/main", log)
            replica.command("REPLICAOF", "NO", "ONE")
            process = process_at(f"redis+sentinel://{HOST}:{port}/main")
            assert (await process.spend((bucket(process, 9), "a", 1))).left == [8]
            await process.backend.aclose()
    assert f"{HOST}:{replica.port} is named as master but is none yet" in line
