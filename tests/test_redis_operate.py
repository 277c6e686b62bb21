"""What an operator does about one tenant, for all processes that share a Redis: blocks, and usage that is forgotten."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import pytest
import redis
from prometheus_client import CollectorRegistry

import stores
from harness import config, hello
from proxy import Proxy
from seawall import Seawall
from seawall.backends import OperatedBackend
from seawall.backends.redis import RedisBackend, blocked, session
from seawall.backends.redis.blocked import MOST_BLOCKS, MOST_TEXT
from seawall.backends.redis.link import MOST_UNREAD
from seawall.backends.redis.meters import SharedMeter
from seawall.blocks import Block
from seawall.rate import SECOND, Quota, Rate
from seawall.testing import drive, reset
from sharing import Fleet, Process, until
from stores import HOST, Server, free_port, standalone, version

FOR_EVER = 36_000_000 * SECOND
HOUR = 3_600 * SECOND


@pytest.fixture(autouse=True)
def _fresh() -> None:
    reset()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Signs of life are sent more often than every two seconds."""
    monkeypatch.setattr(session, "BEAT", 0.02)


def lasting(seconds: float = 60.0, reason: str = "") -> Block:
    return Block(time.time_ns() + round(seconds * SECOND), reason)


def is_blocked(process: Process, tenant: str = "acme") -> bool:
    return process.backend.blocks.of(tenant) is not None


def key_of(process: Process) -> str:
    return blocked.key_of(process.backend.names.prefix).decode()


def reader(url: str, **options: Any) -> RedisBackend:
    """As a command line has it, which looks and does not serve."""
    return RedisBackend(url, **{"timeout_ns": 5_000_000_000, "key_prefix": f"p-{uuid4()}", "member": False, **options})


# Blocks


def test_it_is_an_operated_backend(store: Server) -> None:
    assert isinstance(RedisBackend(store.url), OperatedBackend)


@pytest.mark.slow
async def test_a_block_is_seen_by_the_other_process_with_its_next_sign_of_life(valkey: Server) -> None:
    async with Fleet(valkey.url, size=2) as fleet:
        one, other = fleet.processes
        await one.backend.block("acme", lasting(60, "scraping"))
        assert is_blocked(one)
        await until(lambda: is_blocked(other), "the other knows it")
        block = other.backend.blocks.of("acme")
        assert block is not None
        assert block.reason == "scraping"
        assert abs(block.until - time.time_ns() - 60 * SECOND) < 30 * SECOND
        assert not is_blocked(other, "globex")
        await one.backend.block("acme", None)
        assert not is_blocked(one)
        await until(lambda: not is_blocked(other), "it is let in again")


@pytest.mark.usefixtures("quick")
async def test_a_block_ends_by_itself_everywhere_and_leaves_nothing(valkey: Server) -> None:
    async with Fleet(valkey.url, size=2) as fleet:
        one, other = fleet.processes
        await one.backend.block("globex", lasting(0.9))
        await one.backend.block("acme", lasting(0.8))
        await until(lambda: is_blocked(other) and is_blocked(other, "globex"), "the other knows both")
        assert 0 < valkey.command("PTTL", key_of(one)) <= 900
        await until(lambda: not (is_blocked(one) or is_blocked(other)), "they have ended")
        await until(lambda: len(one.backend.blocks) == 0 == len(other.backend.blocks), "nobody asks for them any more")
        await until(lambda: valkey.command("EXISTS", key_of(one)) == 0, "Redis has forgotten")


async def test_blocks_cost_a_request_no_call_and_a_process_one_for_each_sign_of_life(store: Server) -> None:
    async with Fleet(store.url, leases=False) as fleet:
        process = fleet.first
        await process.backend.block("acme", lasting())
        meter = process.meter("rate", "tenant", Rate(1_000, FOR_EVER))
        await process.settled()
        began = time.monotonic()
        store.command("CONFIG", "RESETSTAT")
        for _ in range(100):
            assert await process.admits((meter, "globex", 1))
            assert is_blocked(process)
        await process.settled()
        # Each decision reads a bucket, each sign of life the processes and then the blocks.
        beats = 1 + (time.monotonic() - began) // session.BEAT
        assert 100 <= store.calls()["get"] <= 100 + 2 * beats


async def test_a_block_that_is_put_again_is_the_new_one(valkey: Server) -> None:
    async with Fleet(valkey.url) as fleet:
        backend = fleet.first.backend
        await backend.block("acme", lasting(600, "first"))
        await backend.block("globex", lasting(60))
        await backend.block("acme", lasting(60, "second"))
        assert {(name, block.reason) for name, block in backend.blocks} == {("acme", "second"), ("globex", "")}
        await backend.block("acme", Block(time.time_ns() - SECOND))
        assert [name for name, _ in backend.blocks] == ["globex"]


async def test_it_is_the_server_s_clock_that_ends_a_block(valkey: Server) -> None:
    """Who is an hour behind or ahead blocks for as long as was meant."""
    prefix = f"p-{uuid4()}"
    for wrong in (-HOUR, HOUR):
        backend = reader(valkey.url, key_prefix=prefix, wall_clock=lambda wrong=wrong: time.time_ns() + wrong)
        await backend.block("acme", Block(time.time_ns() + wrong + 60 * SECOND))
        assert 30_000 < valkey.command("PTTL", f"{prefix}:{{instances}}:blocks") <= 60_000
        block = backend.blocks.of("acme")
        assert block is not None
        assert abs(block.until - time.time_ns() - 60 * SECOND) < 30 * SECOND
        await backend.aclose()


async def test_nobody_can_be_read_in_redis_and_nothing_stays_for_ever(store: Server) -> None:
    backend = reader(store.url, secret="a secret of the tests", member=True)
    tenants = [f"canary-{number}" for number in range(50)]
    meter = backend.meter("rate", "tenant", Rate(10, HOUR))
    for tenant in tenants:
        await backend.block(tenant, lasting(60, "scraping"))
        await backend.spend([(meter, tenant, 1)])  # type: ignore[misc]
    await backend.block(tenants[0], None)
    await backend.forget([(meter, tenants[1])])
    stored = [store.command(*words, key) for key in store.command("KEYS", "*") for words in (["GET"], ["PTTL"])]
    expiries = [each for each in stored if isinstance(each, int)]
    assert len(expiries) >= 50
    assert min(expiries) > 0
    assert not any("canary" in str(each) for each in [*stored, *store.command("KEYS", "*")])
    assert any("scraping" in str(each) for each in stored)
    await backend.aclose()


def test_another_secret_calls_a_tenant_something_else() -> None:
    names = {RedisBackend("redis://localhost", secret=secret).names.pseudonym("acme") for secret in ("a", "b", None)}
    assert len(names) == 3
    assert all(len(name) == 22 for name in names)


@pytest.mark.parametrize("reason", ["\x1b[31mred\nline", "\ud800 of nobody", "\N{RIGHT-TO-LEFT OVERRIDE}", "x" * 9_999])
async def test_a_reason_is_one_line_of_bounded_length(valkey: Server, reason: str) -> None:
    backend = reader(valkey.url)
    await backend.block("acme", lasting(60, reason))
    block = backend.blocks.of("acme")
    assert block is not None
    assert block.reason.isprintable()
    assert len(block.reason) == min(len(reason), MOST_TEXT)
    await backend.aclose()


async def test_as_many_as_there_may_be_are_read_and_one_more_is_refused(
    valkey: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = (reader(valkey.url, key_prefix="many") for _ in range(2))
    # Of the longest reasons: four bytes for each character, in a text that is read whole.
    most = {
        one.names.pseudonym(f"tenant-{n}"): lasting(600, "\N{GRINNING FACE}" * MOST_TEXT) for n in range(MOST_BLOCKS)
    }
    text, till = blocked.written(most)
    assert len(text) < MOST_UNREAD
    valkey.command("SET", "many:{instances}:blocks", text, "PXAT", till)
    with pytest.raises(ValueError, match=r"1,000 tenants are blocked, and that is the most"):
        await one.block("one more", lasting())
    await one.fetch_blocks()
    assert len(one.blocks) == MOST_BLOCKS
    await other.block("tenant-7", lasting(60, "instead"))
    await other.block("tenant-8", None)
    await other.block("one more", lasting())
    assert len(other.blocks) == MOST_BLOCKS
    for backend in (one, other):
        await backend.aclose()


@pytest.mark.parametrize(
    "text", ["", "garbage", "[]", '{"blocks": 7}', '{"blocks": {"a": [1]}}', '{"till": "x"}', "[" * 9_000]
)
async def test_what_is_no_list_of_blocks_changes_nothing_and_is_replaced(
    valkey: Server, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    backend = reader(valkey.url)
    key = blocked.key_of(backend.names.prefix)
    await backend.block("acme", lasting())
    valkey.command("SET", key, text, "PX", 60_000)
    await backend.fetch_blocks()
    assert backend.blocks.of("acme") is not None
    assert "cannot be read" in caplog.text
    await backend.block("globex", lasting())
    assert [name for name, _ in backend.blocks] == ["globex"]
    assert json.loads(valkey.command("GET", key))["blocks"].keys() == {backend.names.pseudonym("globex")}
    await backend.aclose()


@pytest.mark.usefixtures("quick")
async def test_who_knows_a_block_that_was_lost_puts_it_back_and_never_one_that_was_taken_back() -> None:
    with standalone() as server:
        async with Fleet(server.url, size=2) as fleet:
            one, other = fleet.processes
            await one.backend.block("acme", lasting(60, "scraping"))
            await one.backend.block("globex", lasting(60))
            await until(lambda: is_blocked(other, "globex"), "the other knows both")
            await one.backend.block("globex", None)
            await until(lambda: not is_blocked(other, "globex"), "one is let in")
            server.restart()
            await until(lambda: server.command("EXISTS", key_of(one)), "it is there again")
            assert 0 < server.command("PTTL", key_of(one)) <= 60_000
            late = fleet.process(member=False)
            await late.backend.fetch_blocks()
            assert [(name[0], block.reason) for name, block in late.backend.blocks] == [("#", "scraping")]
            await late.backend.block("acme", None)
            await until(lambda: not is_blocked(one) and not is_blocked(other), "it is let in everywhere")
            for _ in range(5):  # and stays so: what is empty is there for as long as it might be missed
                await asyncio.sleep(session.BEAT)
                assert json.loads(server.command("GET", key_of(one)))["blocks"] == {}
            await late.backend.aclose()


@pytest.mark.usefixtures("quick")
async def test_while_the_server_is_away_what_was_known_holds_until_its_end() -> None:
    with standalone() as server:
        async with Fleet(server.url, timeout_ns=50_000_000) as fleet:
            process = fleet.first
            await process.backend.block("acme", lasting(60))
            await process.backend.block("globex", lasting(1))
            server.kill()
            await until(lambda: not process.backend.up, "it is away")
            assert is_blocked(process)
            await until(lambda: not is_blocked(process, "globex"), "it has ended")
            assert is_blocked(process)


async def test_a_server_that_is_away_is_said_in_time() -> None:
    meter_of = Rate(5, FOR_EVER)
    backend = reader(f"redis://{HOST}:{free_port()}", timeout_ns=25_000_000)
    meter = backend.meter("rate", "tenant", meter_of)
    for asked in (backend.block("acme", lasting()), backend.forget([(meter, "acme")]), backend.fetch_blocks()):
        with pytest.raises(OSError, match=rf"^{HOST}:\d+ is away \(.*Connect"):
            await asked
    assert backend.blocks.of("acme") is None
    await backend.aclose()
    with standalone() as server, Proxy(server.address) as proxy:
        frozen = reader(proxy.url, timeout_ns=25_000_000)
        await frozen.block("acme", lasting())
        server.freeze()
        began = time.monotonic()
        with pytest.raises(OSError, match=rf"^{HOST}:\d+ is away \(no answer within 1 s\)$"):
            await frozen.block("acme", None)
        assert time.monotonic() - began < 10
        assert frozen.blocks.of("acme") is not None
        asked = asyncio.create_task(frozen.fetch_blocks())
        await asyncio.sleep(0)
        proxy.refusing()
        with pytest.raises(OSError, match=r"is away \(connection lost\)"):
            await asked
        server.thaw()
        await frozen.aclose()


async def test_a_right_that_is_missing_is_said_to_who_asks() -> None:
    with Server(users={"app": "on >hunter2 ~seawall:* +@all -del"}) as server:
        backend = reader(server.url_as("app", "hunter2"), key_prefix="seawall")
        with pytest.raises(OSError, match=r"^127\.0\.0\.1:\d+: NOPERM .*'del'"):
            await backend.forget([(backend.meter("rate", "tenant", Rate(5, FOR_EVER)), "acme")])
        await backend.aclose()


async def test_a_server_without_memory_blocks_all_the_same() -> None:
    with standalone() as server:
        if version(server.binary) < (7,):
            pytest.skip("it cannot be told that a script may write all the same")
        server.command("CONFIG", "SET", "maxmemory", "1mb")
        with pytest.raises(redis.ResponseError, match="maxmemory"):
            server.command("SET", "a", "b")
        backend = reader(server.url)
        await backend.block("acme", lasting())
        assert backend.blocks.of("acme") is not None
        await backend.aclose()


@pytest.mark.usefixtures("quick")
async def test_who_only_looks_is_not_counted_among_the_processes(valkey: Server) -> None:
    async with Fleet(valkey.url, size=2, instances=None) as fleet:
        looker = fleet.process(member=False)
        await looker.backend.fetch_blocks()
        meter = looker.meter("rate", "tenant", Rate(5, FOR_EVER))
        assert await looker.left(meter) == 5
        await until(lambda: fleet.first.backend.instances == 2, "the others are counted")
        assert looker.backend.session()._beating is None
        await looker.backend.aclose()
        assert await fleet.first.left(meter) == 5
        assert fleet.first.backend.instances == 2


@pytest.mark.usefixtures("quick")
async def test_a_block_reaches_requests_and_the_status_page(store: Server, registry: CollectorRegistry) -> None:
    settings = config(
        identity={"tenant": [{"state": "tenant"}]},
        tenants={"acme": {}},
        status={"path": "/-/seawall", "allow": ["127.0.0.1"]},
    )
    prefix = f"p-{uuid4()}"
    backend = reader(store.url, key_prefix=prefix, member=True)
    operator = reader(store.url, key_prefix=prefix)
    app: Any = Seawall(hello, config=settings, backend=backend, registry=registry)
    backend.open()
    await operator.block("acme", lasting(60, "scraping"))
    await until(lambda: backend.blocks.of("acme"), "the application knows it")
    assert [(one["tenant"], one["reason"]) for one in app.status()["blocked"]] == [("acme", "scraping")]
    assert (await drive(app, state={"tenant": "acme"})).status == 403
    assert (await drive(app, state={"tenant": "globex"})).status == 200
    for each in (backend, operator):
        await each.aclose()


def test_a_block_is_shown_by_the_tenant_s_id_where_that_is_known() -> None:
    backend = RedisBackend("redis://localhost")
    tenants = {f"tenant-{number}": None for number in range(100)}
    names = [backend.names.pseudonym(tenant) for tenant in ("tenant-7", "unlisted", "stranger")]
    backend.blocks.replace({name: lasting() for name in names})
    assert [name for name, _ in backend.blocks] == [f"#{name[:8]}" for name in names]
    for _ in range(2):
        shown = [name for name, _ in backend.blocks.shown(tenants)]
        assert shown == ["tenant-7", *(f"#{name[:8]}" for name in names[1:])]
    assert backend.blocks.of("unlisted") is not None  # it has come, and was turned away
    assert [name for name, _ in backend.blocks.shown(tenants)] == ["tenant-7", "unlisted", f"#{names[2][:8]}"]
    backend.blocks.replace({names[0]: lasting()})
    backend.blocks.replace(dict.fromkeys(names, lasting()))
    assert [name for name, _ in backend.blocks] == ["tenant-7", *(f"#{name[:8]}" for name in names[1:])]


# What was used


def meters_of(process: Process) -> list[SharedMeter]:
    return [
        process.meter("rate", "tenant", Rate(4_000, FOR_EVER)),
        process.meter("quota", "tenant", Quota(4_000, "month")),
        process.meter("login", "tenant", Rate(5, FOR_EVER)),
    ]


@pytest.mark.parametrize("leases", [True, False])
async def test_who_is_reset_has_used_nothing_for_all_processes(valkey: Server, leases: bool) -> None:
    async with Fleet(valkey.url, size=2, leases=leases) as fleet:
        one, other = fleet.processes
        meters, others = meters_of(one), meters_of(other)
        for _ in range(5):
            assert await one.admits(*((meter, "acme", 1) for meter in meters))
            assert await one.admits((meters[0], "globex", 1))
        assert not await one.admits((meters[2], "acme", 1))
        await one.backend.forget([(meter, "acme") for meter in meters])
        # What is ahead of nobody is left to all, and what was refused here is not any more.
        assert [await other.left(meter, "acme") for meter in others] == [4_000, 4_000, 5]
        assert await one.admits(*((meter, "acme", 1) for meter in meters))
        await one.settled()
        assert [await one.left(meter, "acme") for meter in meters] == [3_999, 3_999, 4]
        assert await fleet.read(meters[0], "globex") <= 3_995


async def test_what_was_taken_ahead_is_forgotten_where_it_is_reset(valkey: Server) -> None:
    async with Fleet(valkey.url) as fleet:
        process = fleet.first
        meters = meters_of(process)[:2]
        for _ in range(20):
            assert await process.admits(*((meter, "acme", 1) for meter in meters))
        assert any(meter.leases["acme"].left for meter in meters)
        await process.backend.forget([(meter, "acme") for meter in meters])
        assert [meter.leases["acme"].left for meter in meters] == [0, 0]
        assert [await process.left(meter, "acme") for meter in meters] == [4_000, 4_000]
        assert await process.admits(*((meter, "acme", 1) for meter in meters))
        await process.backend.aclose()
        assert [await fleet.read(meter, "acme") for meter in meters] == [3_999, 3_999]


async def test_what_another_process_had_ahead_is_at_most_a_lease_too_much(valkey: Server) -> None:
    async with Fleet(valkey.url, size=2) as fleet:
        one, other = fleet.processes
        (meter, quota, _), others = meters_of(one), meters_of(other)[:2]
        for _ in range(20):
            assert await other.admits(*((each, "acme", 1) for each in others))
        ahead = [each.leases["acme"].left for each in others]
        assert any(ahead)
        await one.backend.forget([(meter, "acme"), (quota, "acme")])
        await other.backend.aclose()  # which gives back what it has
        assert [await fleet.read(each, "acme") for each in (meter, quota)] == [4_000, 4_000]


async def test_what_the_share_has_counted_is_forgotten_as_well() -> None:
    with standalone() as server:
        async with Fleet(server.url, timeout_ns=100_000_000) as fleet:
            process = fleet.first
            meter = process.meter("login", "tenant", Rate(2, FOR_EVER))
            untouched = process.meter("search", "tenant", Rate(2, FOR_EVER))
            server.kill()
            assert [await process.admits((meter, "acme", 1)) for _ in range(3)] == [True, True, False]
            with pytest.raises(OSError, match="is away"):
                await process.backend.forget([(meter, "acme")])
            server.restart()
            await until(lambda: process.backend.up, "it is back")
            await process.backend.forget([(meter, "acme"), (untouched, "acme")])
            server.kill()
            await until(lambda: not process.backend.up, "it is away")
            assert [await process.admits((meter, "acme", 1)) for _ in range(3)] == [True, True, False]


# Several servers


@pytest.fixture(scope="module")
def cluster() -> Iterator[stores.Cluster]:
    with stores.cluster() as nodes:
        yield nodes


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
async def test_blocks_and_resets_find_their_nodes_in_a_cluster(cluster: stores.Cluster) -> None:
    async with Fleet(cluster.url, size=2) as fleet:
        one, other = fleet.processes
        await one.backend.block("acme", lasting())
        await until(lambda: is_blocked(other), "the other knows it")
        limits = [(process.meter("login", "tenant", Rate(5, FOR_EVER)), process) for process in fleet.processes]
        (meter, _), (same, _) = limits
        address = one.meter("ip", "address", Rate(5, FOR_EVER))
        tenants = [f"tenant-{number}" for number in range(10)]
        for tenant in tenants:
            assert await one.admits((meter, tenant, 5), (address, tenant.encode(), 5))
        await other.backend.forget([(same, tenant) for tenant in tenants])
        await one.backend.forget([(address, tenant.encode()) for tenant in tenants])
        assert [await fleet.read(meter, tenant) for tenant in tenants] == [5] * 10
        assert [await fleet.read(address, tenant.encode()) for tenant in tenants] == [5] * 10


@pytest.mark.slow
@pytest.mark.parametrize("step", ["moving", "moved"])
async def test_a_newcomer_finds_blocks_that_move_to_another_node(cluster: stores.Cluster, step: str) -> None:
    """It asks some node, whoever that is, and is sent on: for good, or for the moment."""
    source = cluster.node_of(blocked.SLOT)
    target = next(node for node in cluster.nodes if node is not source)
    for seed in cluster.nodes:
        migration = cluster.migration(blocked.SLOT, target)
        migration.begin()
        migration.move()  # what others have left there
        backend = reader(f"redis+cluster://{HOST}:{seed.port}")
        if step == "moved":
            migration.finish()
        await backend.block("acme", lasting())
        await backend.fetch_blocks()
        await backend.block("globex", lasting(90))
        assert [name for name, _ in backend.blocks] == ["acme", "globex"]
        key = blocked.key_of(backend.names.prefix).decode()
        if step == "moving":
            migration.move()
            migration.finish()
        assert target.command("EXISTS", key) == 1
        target.command("DEL", key)
        await backend.aclose()
        source, target = target, source


@pytest.mark.slow
async def test_a_seed_that_is_down_keeps_no_operator_from_a_cluster(cluster: stores.Cluster) -> None:
    seeds = ",".join(f"{HOST}:{port}" for port in (free_port(), cluster.nodes[1].port))
    backend = reader(f"redis+cluster://{seeds}")
    await backend.block("acme", lasting())
    assert backend.blocks.of("acme") is not None
    await backend.aclose()
    alone = reader(f"redis+cluster://{HOST}:{free_port()},{HOST}:{free_port()}")
    with pytest.raises(OSError, match="is away"):
        await alone.block("acme", lasting())
    await alone.aclose()


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
async def test_a_block_survives_a_failover(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    with stores.sentinel() as servers:
        async with Fleet(servers.url, size=2) as fleet:
            one, other = fleet.processes
            await one.backend.block("acme", lasting(600, "scraping"))
            await until(lambda: is_blocked(other), "the other knows it")
            master, replica = servers.master, servers.replica
            await until(lambda: replica.command("EXISTS", key_of(one)), "the replica has it")
            master.kill()
            await asyncio.to_thread(servers.wait_for_master, replica)
            await until(lambda: other.backend.up, "it is found", within=30)
            assert is_blocked(one)
            assert is_blocked(other)
            late = fleet.process(member=False)
            await late.backend.fetch_blocks()
            assert is_blocked(late)
            await late.backend.block("acme", None)
            await until(lambda: not is_blocked(other), "it is let in")
            await late.backend.aclose()
