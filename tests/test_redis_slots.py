"""What callers have in flight over all processes together: never more than their limit, and nothing left over."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from struct import iter_unpack
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from starlette.types import Receive, Scope, Send

import stores
from harness import hello, limit_headers, metric, plan, problem
from seawall import Seawall
from seawall.backends import FULL, Charge, Failure, Verdict
from seawall.backends.redis import RedisBackend
from seawall.backends.redis import backend as backend_module
from seawall.backends.redis.meters import SharedMeter
from seawall.backends.redis.slots import LIFE, SlotPermit
from seawall.rate import SECOND, Rate
from seawall.testing import ManualClock, drive
from sharing import Fleet, Process, until
from stores import Server, free_port, standalone

FOR_EVER = 36_000_000 * SECOND


def wish(process: Process, limit: int, key: str = "a") -> SlotPermit:
    return process.backend.permit("tenant", key, limit)


def noted(server: Server, permit: SlotPermit) -> dict[int, int]:
    """How many slots each process has that the server knows of."""
    raw: Any = server.client().get(permit.holding.key)
    return {int(who): int(count) for who, count, _ in iter_unpack("<ddd", raw or b"")}


def taken(server: Server, permit: SlotPermit) -> int:
    return sum(noted(server, permit).values())


async def beat(fleet: Fleet, times: int = 1) -> None:
    """Let two seconds pass, after which each process says what it has."""
    for _ in range(times):
        await fleet.advance(2)
        for process in fleet.processes:
            process.backend.renew()
        await fleet.settled()


def bucket(process: Process, burst: int, name: str = "rate", store: str = "tenant") -> SharedMeter:
    return process.meter(name, store, Rate(burst, FOR_EVER))


# How many


async def test_what_a_tenant_has_in_flight_counts_as_well_once_it_is_listed(valkey: Server) -> None:
    async with Fleet(valkey.url, ManualClock(), size=2) as fleet:
        permits = [
            process.backend.permit(store, "a", 3)
            for process, store in ((fleet.first, "id"), (fleet.first, "tenant"), (fleet.processes[1], "tenant"))
        ]
        for process, permit in zip([fleet.first, *fleet.processes], permits, strict=True):
            assert isinstance(await process.with_slot(permit), Verdict)
        await beat(fleet)
        assert taken(valkey, permits[0]) == 3
        for process in fleet.processes:
            assert await process.with_slot(wish(process, 3)) is FULL
        for process, permit in zip([fleet.first, *fleet.processes], permits, strict=True):
            process.backend.release(permit)
        await beat(fleet)
        assert taken(valkey, permits[0]) == 0


class Callers:
    """Requests of one caller, over all processes, each for as long as it is told."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.running = 0
        self.tasks: list[asyncio.Task[None]] = []

    def begin(self, process: Process, charges: Sequence[Charge]) -> None:
        self.tasks.append(asyncio.create_task(self._request(process, charges)))

    async def _request(self, process: Process, charges: Sequence[Charge]) -> None:
        permit = wish(process, self.limit)
        try:
            answer = await process.with_slot(permit, *charges)
            if not isinstance(answer, Verdict) or not answer.admitted:
                return
            self.running += 1
            assert self.running <= self.limit
            try:
                await asyncio.Event().wait()
            finally:
                self.running -= 1
        finally:
            process.backend.release(permit)

    def end(self, nth: int) -> None:
        """That of a request, whatever it is waiting for."""
        if self.tasks:
            self.tasks.pop(nth % len(self.tasks)).cancel()


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("begin"), st.integers(0, 2)),
            st.tuples(st.just("begin"), st.integers(0, 2)),
            st.tuples(st.just("end"), st.integers(0, 99)),
            st.tuples(st.sampled_from(("turn", "settle", "beat")), st.just(0)),
        ),
        max_size=60,
    ),
    st.integers(1, 20),
    st.integers(1, 3),
    st.booleans(),
)
async def test_never_more_are_in_flight_than_the_limit_and_all_slots_are_free_afterwards(
    valkey: Server, steps: list[tuple[str, int]], limit: int, size: int, charged: bool
) -> None:
    async with Fleet(valkey.url, ManualClock(), size) as fleet:
        callers = Callers(limit)
        charges = [[(bucket(process, 40), "a", 1)] if charged else [] for process in fleet.processes]
        done: list[asyncio.Task[None]] = []
        for step, number in steps:
            match step:
                case "begin":
                    callers.begin(fleet.processes[number % size], charges[number % size])
                    done = [*callers.tasks]
                case "end":
                    callers.end(number)
                case "turn":
                    await asyncio.sleep(0)
                case "settle":
                    await fleet.settled()
                case "beat":
                    await beat(fleet)
        for task in callers.tasks:
            task.cancel()
        ended = await asyncio.gather(*callers.tasks, *done, return_exceptions=True)
        assert not [error for error in ended if isinstance(error, Exception)]
        await fleet.settled()
        await beat(fleet, 2)
        assert callers.running == taken(valkey, wish(fleet.first, limit)) == 0
        assert [process.backend.in_flight() for process in fleet.processes] == [{"callers": 0, "in_flight": 0}] * size
        last = fleet.processes[-1]
        answers = [await last.with_slot(wish(last, limit)) for _ in range(limit + 1)]
        assert [answer is FULL for answer in answers] == [False] * limit + [True]


async def test_each_caller_has_its_own_slots(valkey: Server) -> None:
    async with Fleet(valkey.url, ManualClock(), 2) as fleet:
        one, two = fleet.processes
        for process, key, full in ((one, "a", False), (two, "a", True), (two, "b", False), (one, "b", True)):
            assert (await process.with_slot(wish(process, 1, key)) is FULL) == full
        assert await two.with_slot(two.backend.permit("address", "a", 1)) is not FULL
        assert [process.backend.in_flight() for process in fleet.processes] == [
            {"callers": 1, "in_flight": 1},
            {"callers": 2, "in_flight": 2},
        ]


async def test_a_limit_that_was_raised_holds_at_once(valkey: Server) -> None:
    async with Fleet(valkey.url, ManualClock()) as fleet:
        process = fleet.first
        assert await process.with_slot(wish(process, 1)) is not FULL
        assert await process.with_slot(wish(process, 1)) is FULL
        assert await process.with_slot(wish(process, 2)) is not FULL
        assert await process.with_slot(wish(process, 1)) is FULL


async def test_a_process_that_was_forked_is_somebody_of_its_own(
    valkey: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As workers are that are forked after the application was made, and has limited something."""
    async with Fleet(valkey.url, ManualClock()) as fleet:
        process = fleet.first
        parents, session = wish(process, 3), process.backend.session()
        assert await process.with_slot(parents) is not FULL
        meter = bucket(process, 80)
        for _ in range(4):
            assert await process.admits((meter, "a", 1))
        holder = process.backend.holder
        monkeypatch.setattr(backend_module, "getpid", lambda: 0)
        process.backend._switch(session.loop)
        assert (process.backend.holder != holder, process.backend.in_flight()["in_flight"]) == (True, 0)
        assert (meter.leases, len(process.backend.watched)) == ({}, 0)
        answers = [await process.with_slot(wish(process, 3)) for _ in range(3)]
        assert [answer is FULL for answer in answers] == [False, False, True]
        assert sorted(noted(valkey, parents).values()) == [1, 2]
        await session.aclose()


# All or nothing


async def test_a_slot_and_its_charges_are_one_call_and_all_or_nothing(valkey: Server) -> None:
    async with Fleet(valkey.url, ManualClock(), 2, deny_cache=False) as fleet:
        one, two = fleet.processes
        mine, theirs = bucket(one, 3), bucket(two, 3)
        first = wish(one, 1)
        before = one.asked
        answer = await one.with_slot(first, (mine, "a", 1))
        assert isinstance(answer, Verdict)
        assert (answer.admitted, answer.left, first.held) == (True, [2], True)
        assert one.asked == before + 1
        second = wish(two, 1)
        assert await two.with_slot(second, (theirs, "a", 1)) is FULL
        assert (second.held, await fleet.read(theirs)) == (False, 2)
        one.backend.release(first)
        third = wish(two, 1)
        answer = await two.with_slot(third, (theirs, "a", 3))
        assert isinstance(answer, Verdict)
        assert (answer.admitted, answer.left, third.held) == (False, [2], False)
        two.backend.release(third)
        await fleet.settled()
        assert taken(valkey, third) == 0


async def test_who_has_no_slot_is_refused_for_that_and_not_for_its_rate(valkey: Server) -> None:
    async with Fleet(valkey.url, ManualClock(), 2, deny_cache=False) as fleet:
        one, two = fleet.processes
        assert await one.with_slot(wish(one, 1), (bucket(one, 1), "a", 1)) is not FULL
        permit = wish(two, 1)
        answer = await two.with_slot(permit, (bucket(two, 1), "a", 1))
        assert answer is FULL or (isinstance(answer, Verdict) and not answer.admitted)
        two.backend.release(permit)
        await fleet.settled()
        assert taken(valkey, permit) == 1


async def test_what_was_paid_from_a_lease_is_given_back_where_there_is_no_slot(valkey: Server) -> None:
    async with Fleet(valkey.url, ManualClock(), 2) as fleet:
        one, two = fleet.processes
        meter = bucket(two, 80)
        for _ in range(4):
            assert await two.admits((meter, "a", 1))
        left = meter.leases["a"].left
        assert await one.with_slot(wish(one, 1)) is not FULL
        assert await two.with_slot(wish(two, 1), (meter, "a", 1)) is FULL
        assert (meter.leases["a"].left, left) == (3, 3)


# Giving up


async def test_who_gives_up_while_it_waits_keeps_nothing(valkey: Server) -> None:
    async with Fleet(valkey.url, ManualClock()) as fleet:
        process = fleet.first
        permit = wish(process, 1)
        task = asyncio.create_task(process.with_slot(permit))
        await asyncio.sleep(0)
        assert permit.waiting
        process.backend.release(permit)
        process.backend.release(permit)
        assert (permit.held, permit.given_up) == (False, True)
        await task
        await fleet.settled()
        assert (permit.held, taken(valkey, permit)) == (False, 0)
        assert process.backend.in_flight()["in_flight"] == 0


async def test_who_is_cancelled_between_the_grant_and_its_next_step_keeps_nothing(
    valkey: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Fleet(valkey.url, ManualClock()) as fleet:
        process = fleet.first
        permit = wish(process, 1)

        async def request() -> None:
            try:
                await process.with_slot(permit)
                raise AssertionError("it was cancelled before")
            finally:
                process.backend.release(permit)

        task = asyncio.create_task(request())
        grant = process.backend.grant

        def granted(which: SlotPermit) -> None:
            grant(which)
            assert which.held
            task.cancel()

        monkeypatch.setattr(process.backend, "grant", granted)
        with pytest.raises(asyncio.CancelledError):
            await task
        await fleet.settled()
        assert (permit.held, taken(valkey, permit)) == (False, 0)


async def test_a_slot_is_given_back_once(valkey: Server) -> None:
    async with Fleet(valkey.url, ManualClock(), 2) as fleet:
        one, two = fleet.processes
        mine = [wish(one, 3) for _ in range(2)]
        for permit in mine:
            await one.with_slot(permit)
        await two.with_slot(wish(two, 3))
        for _ in range(3):
            one.backend.release(mine[0])
        await fleet.settled()
        assert sorted(noted(valkey, mine[0]).values()) == [1, 1]
        assert one.backend.in_flight() == {"callers": 1, "in_flight": 1}


# Spare ones


async def test_spare_slots_are_used_again_without_a_call_and_given_back_unused(valkey: Server) -> None:
    async with Fleet(valkey.url, ManualClock()) as fleet:
        process = fleet.first
        permits = [wish(process, 8) for _ in range(5)]
        for permit in permits:
            await process.with_slot(permit)
        for permit in permits:
            process.backend.release(permit)
        await fleet.settled()
        holding = permits[0].holding
        assert (holding.spare, taken(valkey, permits[0])) == (2, 2)  # 8 // 4
        before = process.asked
        again = [wish(process, 8) for _ in range(2)]
        for permit in again:
            assert await process.with_slot(permit) is not FULL
        assert (process.asked, holding.spare, process.backend.in_flight()["in_flight"]) == (before, 0, 2)
        for permit in again:
            process.backend.release(permit)
        await beat(fleet)
        assert taken(valkey, permits[0]) == 2  # they were used since the beat before
        await beat(fleet)
        assert (holding.spare, taken(valkey, permits[0])) == (0, 0)
        await beat(fleet)
        assert process.backend.slots.holdings == {}


async def test_a_spare_slot_does_not_pay_for_charges(valkey: Server) -> None:
    async with Fleet(valkey.url, ManualClock(), deny_cache=False) as fleet:
        process = fleet.first
        permits = [wish(process, 8) for _ in range(2)]
        for permit in permits:
            await process.with_slot(permit)
        for permit in permits:
            process.backend.release(permit)
        meter = bucket(process, 1)
        for admitted, left in ((True, 0), (False, 0)):
            permit = wish(process, 8)
            answer = await process.with_slot(permit, (meter, "a", 1))
            assert isinstance(answer, Verdict)
            assert (answer.admitted, answer.left) == (admitted, [left])
            process.backend.release(permit)
        assert process.backend.in_flight()["in_flight"] == 0


async def test_without_leases_no_slot_is_spare(valkey: Server) -> None:
    async with Fleet(valkey.url, ManualClock(), leases=False) as fleet:
        process = fleet.first
        for _ in range(3):
            permit = wish(process, 80)
            await process.with_slot(permit)
            process.backend.release(permit)
            await fleet.settled()
            assert taken(valkey, permit) == 0


# What is lost is put right


@pytest.mark.slow
async def test_what_a_restart_has_lost_is_there_again_within_a_beat() -> None:
    with standalone() as server:
        async with Fleet(server.url, size=2) as fleet:
            one, two = fleet.processes
            permits = [wish(one, 4) for _ in range(3)]
            for permit in permits:
                await one.with_slot(permit)
            server.restart()
            await until(lambda: not (one.backend.up and two.backend.up), "it is seen to be away")
            await until(lambda: one.backend.up and two.backend.up, "it is back")
            await until(lambda: taken(server, permits[0]) == 3, "the process says what it has", within=10)
            assert await two.with_slot(wish(two, 4)) is not FULL
            assert await two.with_slot(wish(two, 4)) is FULL
            one.backend.release(permits[0])
            await until(lambda: taken(server, permits[0]) == 3, "it is given back")


async def test_what_a_server_has_forgotten_is_known_to_the_next_call(valkey: Server) -> None:
    async with Fleet(valkey.url, ManualClock(), 2) as fleet:
        one, two = fleet.processes
        permits = [wish(one, 4) for _ in range(3)]
        for permit in permits[:2]:
            await one.with_slot(permit)
        valkey.client().delete(permits[0].holding.key)
        await one.with_slot(permits[2])
        assert taken(valkey, permits[0]) == 3
        assert await two.with_slot(wish(two, 4)) is not FULL
        assert await two.with_slot(wish(two, 4)) is FULL


async def test_what_the_server_has_too_many_of_is_free_after_a_beat(valkey: Server) -> None:
    """As when a reply is lost, or what gave a slot back."""
    async with Fleet(valkey.url, ManualClock(), 2) as fleet:
        one, two = fleet.processes
        kept, lost = wish(one, 2), wish(one, 2)
        for permit in (kept, lost):
            await one.with_slot(permit)
        one.backend.release(lost)
        lost.holding.returned = 0
        await fleet.settled()
        assert taken(valkey, kept) == 2
        await beat(fleet)
        assert taken(valkey, kept) == 1
        assert await two.with_slot(wish(two, 2)) is not FULL


async def test_what_a_process_had_that_is_gone_is_free_after_its_life(valkey: Server) -> None:
    async with Fleet(valkey.url, ManualClock(), 2) as fleet:
        gone, alive = fleet.processes
        permit = wish(gone, 1)
        await gone.with_slot(permit)
        await fleet.advance(ns=LIFE - 1_000)
        assert await alive.with_slot(wish(alive, 1)) is FULL
        await fleet.advance(ns=1_000)
        assert await alive.with_slot(wish(alive, 1)) is not FULL
        gone.backend.release(permit)


WORKER = """
import asyncio, sys
from seawall.backends.redis import RedisBackend
from seawall.backends.redis import backend as backend_module

async def main(url, prefix):
    backend = RedisBackend(url, key_prefix=prefix, timeout_ns=5_000_000_000)
    for _ in range(3):
        await backend.spend_with(backend.permit("tenant", "a", 3), [])
    print(backend.in_flight()["in_flight"], flush=True)
    await asyncio.Event().wait()

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.mark.slow
async def test_what_a_killed_process_had_is_free_within_its_life_and_it_is_not_counted_any_more(valkey: Server) -> None:
    async with Fleet(valkey.url, instances=None) as fleet:
        process = fleet.first
        command = [sys.executable, "-c", WORKER, valkey.url, fleet.options["key_prefix"]]
        worker = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
        try:
            assert worker.stdout is not None
            assert await worker.stdout.readline() == b"3\n"
            assert await process.with_slot(wish(process, 3)) is FULL
            await until(lambda: process.backend.instances == 2, "both are counted")
        finally:
            worker.kill()
            await worker.wait()
        killed, answer, permit = time.monotonic(), None, wish(process, 3)
        async with asyncio.timeout(LIFE / SECOND + 1):
            while not isinstance(answer, Verdict):
                await asyncio.sleep(0.02)
                answer = await process.with_slot(permit)
        assert time.monotonic() - killed >= LIFE / SECOND - 2 - 1  # its last sign of life was 2 s old at most
        process.backend.release(permit)
        await until(lambda: process.backend.instances == 1, "it is alone")
        assert process.backend.share.instances == 1


# While the server is away


@pytest.fixture
async def alone() -> AsyncIterator[Process]:
    """A process of three whose server was never there, and that knows it."""
    process = Process(RedisBackend(f"redis://127.0.0.1:{free_port()}", instances=3))
    process.backend.open()
    await until(lambda: not process.backend.up, "it is known to be away")
    process.calls.fallen.clear()
    yield process
    await process.backend.aclose()


@pytest.mark.parametrize(("limit", "share"), [(9, 3), (3, 1), (2, 1), (1, 1), (11, 3)])
async def test_a_process_alone_has_its_share_of_the_slots(alone: Process, limit: int, share: int) -> None:
    permits = [wish(alone, limit) for _ in range(share)]
    for permit in permits:
        assert isinstance(await alone.with_slot(permit), Verdict)
    assert await alone.with_slot(wish(alone, limit)) is FULL
    assert alone.calls.fallen == ["local"] * (share + (share < limit))
    alone.backend.release(permits[0])
    alone.backend.release(permits[0])
    assert isinstance(await alone.with_slot(wish(alone, limit)), Verdict)
    assert await alone.with_slot(wish(alone, limit)) is FULL


async def test_a_process_alone_takes_no_slot_for_what_its_rate_refuses(alone: Process) -> None:
    meter, permit = bucket(alone, 3), wish(alone, 9)
    assert isinstance(await alone.with_slot(permit, (meter, "a", 1)), Verdict)
    alone.backend.release(permit)
    permit = wish(alone, 9)
    answer = await alone.with_slot(permit, (meter, "a", 1))
    assert isinstance(answer, Verdict)
    assert (answer.admitted, permit.held, alone.backend.in_flight()["in_flight"]) == (False, False, 0)


async def test_what_a_process_alone_has_charged_is_given_back_there(alone: Process) -> None:
    meter = bucket(alone, 9)
    verdict = await alone.spend((meter, "a", 3))
    assert (verdict.admitted, verdict.left) == (True, [0])
    alone.backend.refund(verdict.charges, verdict.wall)
    assert (await alone.spend((meter, "a", 0))).left == [3]
    assert alone.backend.debit([(verdict.charges[0][0], "a", 2)]) == [2]
    assert (await alone.spend((meter, "a", 0))).left == [1]


@pytest.mark.parametrize(("failure", "held"), [("allow", 5), ("deny", 0)])
async def test_nobody_decides_on_slots_where_the_rule_says_so(alone: Process, failure: Failure, held: int) -> None:
    permits = [wish(alone, 9) for _ in range(5)]
    for permit in permits:
        assert alone.backend.spend_with(permit, [(bucket(alone, 1), "a", 1)], failure) is None
    assert alone.calls.fallen == [failure] * 5
    assert alone.backend.in_flight()["in_flight"] == held
    for permit in permits:
        alone.backend.release(permit)
    assert alone.backend.in_flight()["in_flight"] == 0


@pytest.mark.parametrize("patient", [True, False])
async def test_whose_call_is_not_answered_has_a_slot_of_its_share(store: Server, patient: bool) -> None:
    async with Fleet(store.url, timeout_ns=20_000_000) as fleet:
        process = fleet.first
        store.freeze()
        try:
            permit = wish(process, 1)
            task = asyncio.create_task(process.with_slot(permit))
            await asyncio.sleep(0)
            if not patient:
                process.backend.release(permit)
            assert isinstance(await task, Verdict)
            assert (permit.held, process.calls.fallen) == (patient, ["local"])
        finally:
            store.thaw()
        process.backend.release(permit)
        await until(lambda: process.backend.up, "it is back")
        # The server has granted the slot later on, which this process has never heard of.
        assert taken(store, permit) == 1
        again = wish(process, 1)
        assert await process.with_slot(again) is not FULL
        process.backend.release(again)
        await fleet.settled()
        assert taken(store, again) == 0


# On a cluster


@pytest.fixture(scope="module")
def cluster() -> Iterator[stores.Cluster]:
    with stores.cluster() as nodes:
        yield nodes


@pytest.mark.slow
async def test_slots_and_charges_in_other_slots_of_a_cluster_are_all_or_nothing(cluster: stores.Cluster) -> None:
    async with Fleet(cluster.url, size=2, deny_cache=False, leases=False) as fleet:
        one, two = fleet.processes

        async def left() -> list[int]:
            return [await two.left(bucket(two, 5, store=store), key) for store, key in KEYS]

        def charges(process: Process, cost: int = 1) -> list[Charge]:
            return [(bucket(process, 5, store=store), key, cost) for store, key in KEYS]

        permit = wish(one, 1)
        answer = await one.with_slot(permit, *charges(one))
        assert isinstance(answer, Verdict)
        assert (answer.admitted, answer.left, permit.held) == (True, [4] * 6, True)
        assert await two.with_slot(other := wish(two, 1), *charges(two)) is FULL
        await fleet.settled()
        assert (other.held, await left()) == (False, [4] * 6)
        one.backend.release(permit)
        await fleet.settled()
        refused = charges(two)
        refused[3] = (*refused[3][:2], 5)
        answer = await two.with_slot(other := wish(two, 1), *refused)
        assert isinstance(answer, Verdict)
        assert (answer.admitted, answer.left, other.held) == (False, [4] * 6, False)
        await fleet.settled()
        assert await left() == [4] * 6
        assert await one.with_slot(wish(one, 1)) is not FULL


KEYS = [("address", f"{number}") for number in range(6)]


async def test_what_lies_on_a_node_that_is_away_is_decided_for_here(cluster: stores.Cluster) -> None:
    async with Fleet(cluster.url, deny_cache=False, leases=False) as fleet:
        process = fleet.first
        charges = [(bucket(process, 5, store=store), key, 1) for store, key in KEYS]
        assert await process.admits(*charges)
        gone = process.backend.session()._routes.node(0)
        gone._fail("error", "as if it were away", counted=True)
        verdict = await process.spend(*charges)
        assert (verdict.admitted, process.calls.fallen) == (True, ["local"] * len(process.calls.fallen))
        assert 3 in verdict.left
        await until(lambda: process.backend.up, "it is back")


async def test_who_gives_up_while_nodes_of_a_cluster_are_asked_keeps_nothing(cluster: stores.Cluster) -> None:
    async with Fleet(cluster.url, leases=False) as fleet:
        process = fleet.first
        permit = wish(process, 1)
        task = asyncio.create_task(
            process.with_slot(permit, *((bucket(process, 5, store=store), key, 1) for store, key in KEYS))
        )
        await asyncio.sleep(0)
        assert permit.waiting
        task.cancel()
        process.backend.release(permit)
        await asyncio.gather(task, return_exceptions=True)
        await fleet.settled()
        assert permit.held is False
        assert await process.with_slot(wish(process, 1)) is not FULL


# As a request sees it


class Held:
    """An application whose requests take until they are told to end."""

    def __init__(self) -> None:
        self.end = asyncio.Event()
        self.running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.running += 1
        await self.end.wait()
        self.running -= 1
        await hello(scope, receive, send)


@pytest.mark.parametrize("rate", [None, "9/minute"])
async def test_two_instances_of_an_application_share_what_a_caller_has_in_flight(
    valkey: Server, rate: str | None
) -> None:
    async with Fleet(valkey.url, size=2) as fleet:
        held, registry = Held(), CollectorRegistry()
        settings: dict[str, Any] = plan(concurrency=2, rate=rate or "unlimited")
        apps = [
            Seawall(held, config=settings, backend=process.backend, registry=CollectorRegistry() if nth else registry)
            for nth, process in enumerate(fleet.processes)
        ]
        running = [asyncio.create_task(drive(app)) for app in apps]
        await until(lambda: held.running == 2, "both are in flight")
        for app in apps:
            answer = await drive(app)
            assert (answer.status, problem(answer)["reason"]) == (429, "concurrency")
            assert problem(answer)["violated-policies"] == ["concurrency"]
            policies, _ = limit_headers(answer)
            assert ("concurrency", {"q": 2, "qu": "concurrent-requests"}) in (policies or [])
            assert app.statistics()["concurrency"] == {"callers": 1, "in_flight": 1}
        reasons = metric(registry, "seawall_rejections_total")
        assert reasons == {("concurrency", "concurrency", "default", "normal"): 1}
        held.end.set()
        answers = await asyncio.gather(*running)
        assert [answer.status for answer in answers] == [200, 200]
        await fleet.settled()
        assert [app.statistics()["concurrency"]["in_flight"] for app in apps] == [0, 0]
        assert [(await drive(app)).status for app in (*apps, *apps)] == [200] * 4


async def test_a_request_that_is_cancelled_gives_its_slot_back_to_the_fleet(valkey: Server) -> None:
    async with Fleet(valkey.url, size=2) as fleet:
        held = Held()
        one, two = (
            Seawall(held, config=plan(concurrency=1, rate="90/minute"), backend=process.backend)
            for process in fleet.processes
        )
        for turns in range(12):
            task = asyncio.create_task(drive(one))
            for _ in range(turns):
                await asyncio.sleep(0)
            if turns == 11:
                await until(lambda: held.running, "it is in flight")
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await fleet.settled()
            assert one.statistics()["concurrency"] == {"callers": 0, "in_flight": 0}
            held.running = 0
        held.end.set()
        assert (await drive(two)).status == 200
