"""Units of hot keys that are taken ahead, and refusals that are believed for a while: what they save, and that they
admit nothing that was not debited."""

from __future__ import annotations

import asyncio
import gc
import inspect
from weakref import ref

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from seawall.backends import Charge, Key, Verdict
from seawall.backends.memory import MemoryBackend
from seawall.backends.redis.backend import MOST_DENIED
from seawall.backends.redis.keys import MOST_TAGS
from seawall.backends.redis.leases import HELD, IDLE, MOST_LEASES, SPENT_BY
from seawall.backends.redis.meters import SharedMeter
from seawall.decision import NEVER
from seawall.rate import SECOND, Quota, Rate
from seawall.testing import ManualClock
from sharing import Fleet, Process, until
from stores import Server

HOUR = 3_600 * SECOND
FOR_EVER = 10_000 * HOUR


def largest(burst: int, size: int) -> int:
    """What the design says that a lease of a bucket may be, with the unit that is being spent."""
    return max(1, burst // (4 * size))


def bucket(process: Process, burst: int, period: int = FOR_EVER, name: str = "rate") -> SharedMeter:
    """One that is full once, or with a shorter period refills ``burst`` in it."""
    return process.meter(name, "tenant", Rate(burst, period))


async def heated(process: Process, meter: SharedMeter, key: Key = "a", spent: int = 3) -> int:
    """Make it hot; what was admitted by that. After 3 there is a lease of none, after 4 one of 3."""
    for _ in range(spent):
        assert await process.admits((meter, key, 1))
    return spent


# What they save


@pytest.mark.parametrize("callers", [1, 32])
@pytest.mark.parametrize("size", [1, 3])
async def test_a_hot_bucket_costs_one_call_in_twenty_requests(valkey: Server, size: int, callers: int) -> None:
    async with Fleet(valkey.url, ManualClock(), size) as fleet:
        pairs = [(process, bucket(process, 80 * size, SECOND // 10)) for process in fleet.processes]

        async def load(rounds: int) -> int:
            asked = sum(process.asked for process in fleet.processes)
            for _ in range(rounds):
                await fleet.advance(0.1)
                for _ in range(64 // callers):
                    calls = [process.admits((meter, "a", 1)) for process, meter in pairs for _ in range(callers)]
                    assert all(await asyncio.gather(*calls))
            return sum(process.asked for process in fleet.processes) - asked

        await load(2)
        before = evalsha(valkey)
        calls = await load(20)
        assert calls <= 20 * 64 * size / 20 + 2 * size  # and a sign of life of each, on a slow machine two
        assert evalsha(valkey) - before <= calls + 20 * size  # by its name and whole, where the server's clock was set


async def test_without_leases_and_deny_cache_every_decision_is_a_call(valkey: Server) -> None:
    async with Fleet(valkey.url, ManualClock(), leases=False, deny_cache=False) as fleet:
        process = fleet.first
        meter = bucket(process, 80)
        before = process.asked
        verdicts = [await process.spend((meter, "a", 1)) for _ in range(100)]
        assert [verdict.admitted for verdict in verdicts] == [True] * 80 + [False] * 20
        assert 100 <= process.asked - before <= 100 + 2  # signs of life
        assert (len(process.backend.watched), meter.leases, meter.denied) == (0, {}, {})


async def test_one_call_for_a_lease_of_a_key_is_under_way_at_a_time(valkey: Server) -> None:
    async with Fleet(valkey.url) as fleet:
        process = fleet.first
        meter = bucket(process, 4_000)
        (node,) = process.backend.session()._routes.nodes.values()
        most = 0

        async def ask() -> None:
            nonlocal most
            for _ in range(40):
                answer = process.backend.spend([(meter, "a", 1)])
                asks = [*node._pending, *(each for batch in node._flights for each in batch.asks)]
                most = max(most, sum(any(getattr(each, "wants", None) or ()) for each in asks))
                if inspect.isawaitable(answer):
                    await answer
                await asyncio.sleep(0)

        await asyncio.gather(*(ask() for _ in range(16)))
        assert most == 1


async def test_a_key_that_is_asked_for_now_and_then_is_not_taken_ahead(valkey: Server) -> None:
    async with Fleet(valkey.url, ManualClock()) as fleet:
        process = fleet.first
        meter = bucket(process, 80)
        for spent in range(1, 6):
            assert await process.admits((meter, "a", 1))
            await fleet.advance(ns=IDLE)
            assert await fleet.read(meter) == 80 - spent


async def test_what_is_taken_follows_how_fast_it_goes(valkey: Server) -> None:
    async with Fleet(valkey.url, ManualClock()) as fleet:
        process = fleet.first
        meter = bucket(process, 800)
        taken = []
        for spent in range(1, 120):
            await process.spend((meter, "a", 1))
            taken.append(800 - spent - await fleet.read(meter))
        assert [taken[at] for at in (0, 1, 3, 7, 15, 31, 63)] == [0, 1, 3, 7, 15, 31, 63]
        while meter.leases["a"].left:
            await process.spend((meter, "a", 1))
        await fleet.advance(ns=IDLE)
        await process.spend((meter, "a", 1))
        assert meter.leases["a"].left == 31


# What they must not change


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), size=st.integers(1, 4), burst=st.integers(1, 200), slow=st.booleans())
async def test_no_more_is_admitted_than_was_debited_and_what_is_left_comes_back(
    valkey: Server, data: st.DataObject, size: int, burst: int, slow: bool
) -> None:
    """A(a, b) <= B + r (b - a) + N (l - 1), over each span of time; without a refill what remains is the exact rest."""
    rate = Rate(burst, FOR_EVER if slow else 10 * SECOND)
    async with Fleet(valkey.url, ManualClock(), size) as fleet:
        clock = fleet.clock
        meters = [process.meter("rate", "tenant", rate) for process in fleet.processes]
        admitted: list[tuple[int, int]] = []

        async def ask(at: int, cost: int) -> None:
            if await fleet.processes[at].admits((meters[at], "a", cost)):
                admitted.append((clock(), cost))

        whose = st.integers(0, size - 1)
        for _ in range(data.draw(st.integers(1, 12))):
            match data.draw(st.sampled_from(("one by one", "at once", "time", "sweep"))):
                case "one by one":
                    at = data.draw(whose)
                    for _ in range(data.draw(st.integers(1, 40))):
                        await ask(at, 1)
                case "at once":
                    calls = data.draw(st.lists(st.tuples(whose, st.integers(1, 6)), min_size=1, max_size=20))
                    await asyncio.gather(*(ask(*call) for call in calls))
                case "time":
                    await fleet.advance(ns=data.draw(st.sampled_from((1_000, SECOND // 10, SECOND, 7 * SECOND))))
                case "sweep":
                    fleet.processes[data.draw(whose)].backend.sweep(64)
        await fleet.settled()
        ahead = size * (largest(burst, size) - 1)
        for first, (begin, _) in enumerate(admitted):
            total = 0
            for end, cost in admitted[first:]:
                total += cost
                refilled = 0 if slow else (end - begin) * burst // (10 * SECOND) + 1
                assert total <= burst + refilled + ahead
        total = sum(cost for _, cost in admitted)
        refilled = clock() * burst // (10 * SECOND) + 1
        assert total <= burst + (0 if slow else refilled)
        await fleet.close()
        if slow:
            assert await fleet.read(meters[0]) == burst - total


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(
            st.sampled_from((0, 0, 0, 1, 7, 100, 1_000, 20_000, 2_000_000)),  # microseconds
            st.sampled_from((1, 1, 1, 1, 2, 5)),
            st.integers(1, 30),
            st.sampled_from(("rate", "rate", "both")),
        ),
        max_size=12,
    ),
    st.sampled_from((Rate(1_000, SECOND, 100), Rate(3, SECOND, 50), Rate(20_000, SECOND, 400))),
    st.integers(20, 3_000),
    st.booleans(),
)
async def test_one_process_decides_with_leases_as_memory_does(
    valkey: Server, steps: list[tuple[int, int, int, str]], rate: Rate, quota: int, deny_cache: bool
) -> None:
    """Verdicts, waits and what is left, also of buckets that are empty, of which units are taken before their time."""
    clock = ManualClock("2026-03-04T12:00:00Z")
    memory = MemoryBackend(clock=clock.wall_ns, wall_clock=clock.wall_ns)
    async with Fleet(valkey.url, clock, deny_cache=deny_cache) as fleet:
        process = fleet.first
        limits: list[tuple[str, Rate | Quota]] = [("rate", rate), ("quota", Quota(quota, "day"))]
        ours = [memory.meter(name, "tenant", limit) for name, limit in limits]
        theirs = [process.meter(name, "tenant", limit) for name, limit in limits]
        for pause, cost, times, which in steps:
            count = 1 if which == "rate" else 2
            for _ in range(times):
                await fleet.advance(ns=pause * 1_000)
                if memory.spend([(ours[0], "a", 0)]).left == [rate.burst] and theirs[0].leases.get("a"):
                    return  # what fits into a bucket and a lease is more than what fits into a bucket
                actual = await process.spend(*((meter, "a", cost) for meter in theirs[:count]))
                expected = memory.spend([(meter, "a", cost) for meter in ours[:count]])
                assert (actual.admitted, actual.now) == (expected.admitted, expected.now)
                if actual.waits and expected.waits and actual.waits != expected.waits:
                    # Refused without a call, for what is taken ahead is not there yet: of the quota it tells nothing.
                    assert actual.waits == [expected.waits[0], 0]
                elif expected.waits is None or (count == 1 and not deny_cache):
                    assert actual.left == expected.left  # a refusal without a call tells of what refused


async def test_of_an_empty_bucket_units_are_taken_ahead_and_spent_when_they_are_there(valkey: Server) -> None:
    """At three times its rate a caller is admitted exactly at its rate, and one request in ten is a call at most."""
    async with Fleet(valkey.url, ManualClock(), deny_cache=False) as fleet:
        process = fleet.first
        meter = process.meter("rate", "tenant", Rate(1_000, SECOND, 100))
        while await process.admits((meter, "a", 1)):
            pass
        before, admitted = process.asked, 0
        for passed in range(1, 301):
            await fleet.advance(ns=SECOND // 1_000)
            verdicts = [await process.spend((meter, "a", 1)) for _ in range(3)]
            admitted += sum(verdict.admitted for verdict in verdicts)
            assert (admitted, verdicts[-1].left, verdicts[-1].waits) == (passed, [0], [SECOND // 1_000])
        assert process.asked - before <= 3 * 300 / 10


@pytest.mark.parametrize("limit", [Rate(400, FOR_EVER), Quota(400, "month")])
async def test_headers_say_of_one_process_what_they_would_without_leases(valkey: Server, limit: Rate | Quota) -> None:
    async with Fleet(valkey.url, ManualClock()) as fleet:
        process = fleet.first
        meter = process.meter("limit", "tenant", limit)
        for spent in range(1, 402):
            cost = 1 if spent < 300 or spent > 310 else 0
            verdict = await process.spend((meter, "a", cost))
            before = 400 - (spent - 1 - max(0, min(spent - 300, 11)))
            assert verdict.left == [before - cost if verdict.admitted else before]
            assert meter.rate.remaining(verdict.states[0], verdict.wall) == verdict.left[0]


async def test_what_costs_more_than_a_lease_is_asked_of_the_server(valkey: Server) -> None:
    async with Fleet(valkey.url, ManualClock()) as fleet:
        process = fleet.first
        meter = bucket(process, 80)
        await heated(process, meter, spent=4)
        assert meter.leases["a"].left == 3
        before = process.asked
        verdict = await process.spend((meter, "a", 5))
        assert (verdict.admitted, verdict.left) == (True, [80 - 9])
        assert process.asked > before
        await fleet.close()
        assert await fleet.read(meter) == 80 - 9


async def test_a_peek_takes_nothing_ahead_and_asks_the_server(valkey: Server) -> None:
    async with Fleet(valkey.url, ManualClock()) as fleet:
        process = fleet.first
        meter = bucket(process, 80)
        for _ in range(4):
            await process.spend((meter, "b", 0))
        assert meter.leases == {}
        await heated(process, meter, spent=4)
        before, left = process.asked, meter.leases["a"].left
        assert await process.left(meter) == 76
        assert (process.asked > before, meter.leases["a"].left) == (True, left)


async def test_what_was_paid_from_a_lease_is_given_back_where_another_limit_refuses(valkey: Server) -> None:
    async with Fleet(valkey.url, ManualClock(), deny_cache=False) as fleet:
        process = fleet.first
        hot, tight = bucket(process, 80), bucket(process, 2, name="tight")
        spent = await heated(process, hot, spent=4)
        left = hot.leases["a"].left
        for _ in range(2):
            assert await process.admits((hot, "a", 1), (tight, "a", 1))
        spent += 2
        assert hot.leases["a"].left == left - 2
        for _ in range(3):
            verdict = await process.spend((hot, "a", 1), (tight, "a", 1))
            assert (verdict.left, verdict.waits is not None and verdict.waits[0]) == ([80 - spent, 0], 0)
            assert hot.leases["a"].left == left - 2
        await fleet.close()
        assert await fleet.read(hot) == 80 - spent


async def test_what_was_paid_from_a_lease_is_given_back_where_nobody_answers(store: Server) -> None:
    async with Fleet(store.url, size=1, timeout_ns=300_000_000) as fleet:
        process = fleet.first
        hot, cold = bucket(process, 80), bucket(process, 2, name="cold")
        await heated(process, hot, spent=4)
        left = hot.leases["a"].left
        store.freeze()
        try:
            assert await process.admits((hot, "a", 1), (cold, "a", 1))  # this process's share
            assert process.calls.fallen == ["local"]
            assert hot.leases["a"].left == left
            assert await process.admits((hot, "a", 1))
            assert (process.calls.fallen, hot.leases["a"].left) == (["local"], left - 1)
        finally:
            store.thaw()


async def test_a_lease_that_is_granted_while_its_holder_ends_is_given_back(valkey: Server) -> None:
    """Of a quota it would be lost for the rest of the month."""
    async with Fleet(valkey.url, ManualClock(), instances=WIDE) as fleet:
        process = fleet.first
        meters = [bucket(process, 800), process.meter("quota", "tenant", Quota(8_000, "month"))]
        for meter in meters:
            await heated(process, meter, spent=3)
        answers = [process.backend.spend([(meter, "a", 1)]) for meter in meters]
        await asyncio.sleep(0)  # sent
        await fleet.close()
        for answer in answers:
            assert inspect.isawaitable(answer)
            verdict = await answer
            assert verdict is not None
            assert verdict.admitted
        assert [await fleet.read(meter) for meter in meters] == [796, 7_996]


# When they end


async def test_what_is_idle_for_a_second_is_given_back(valkey: Server) -> None:
    async with Fleet(valkey.url, ManualClock()) as fleet:
        process = fleet.first
        meter = bucket(process, 80)
        await heated(process, meter, spent=4)
        assert await fleet.read(meter) == 80 - 4 - 3
        await fleet.advance(ns=IDLE - 1_000)
        process.backend.sweep(64)
        assert list(meter.leases) == ["a"]
        await fleet.advance(ns=1_000)
        process.backend.sweep(64)
        await fleet.settled()
        assert meter.leases == {}
        assert await fleet.read(meter) == 80 - 4


async def test_idle_leases_are_looked_for_without_being_asked(valkey: Server) -> None:
    async with Fleet(valkey.url, ManualClock()) as fleet:
        process = fleet.first
        meter = bucket(process, 80)
        await heated(process, meter, spent=4)
        await heated(process, meter, "b", spent=1)
        await fleet.advance(ns=IDLE)
        await until(lambda: not process.backend.watched, "nothing is watched")
        await fleet.settled()
        assert await fleet.read(meter) == 80 - 4


async def test_a_sweep_looks_at_so_many_and_at_each_in_turn(valkey: Server) -> None:
    async with Fleet(valkey.url, ManualClock()) as fleet:
        process = fleet.first
        meter = bucket(process, 80)
        await asyncio.gather(*(process.spend((meter, str(number), 1)) for number in range(10)))
        await fleet.advance(ns=IDLE)
        for left in (6, 2, 0, 0):
            process.backend.sweep(4)
            assert len(meter.leases) == len(process.backend.watched) == left


# Quotas


WIDE = 4
"""More processes than there are, so that no lease is smaller because somebody is seen meanwhile."""
WHOLE = 4_000
QUOTA = Quota(WHOLE, "day")
AHEAD = 9
"""What a lease of `QUOTA` may be, with the unit that is being spent, less that one."""


async def hot_quota(fleet: Fleet, process: Process) -> tuple[SharedMeter, int]:
    """A quota of which a lease is held that is as large as it gets, and what was spent."""
    meter, spent = process.meter("quota", "tenant", QUOTA), 0
    while not (lease := meter.leases.get("a")) or lease.left < AHEAD:
        spent += await heated(process, meter, spent=1)
    assert await fleet.read(meter) == WHOLE - spent - AHEAD
    return meter, spent


async def test_what_a_holder_that_is_gone_had_of_a_quota_is_free_again(valkey: Server) -> None:
    """The server does not know how much of it was spent: at most a whole lease is spent twice."""
    async with Fleet(valkey.url, ManualClock(), instances=WIDE) as fleet:
        gone = fleet.first
        meter, spent = await hot_quota(fleet, gone)
        for _ in range(2):
            assert await gone.admits((meter, "a", 1))
        await fleet.advance(ns=HELD - 1_000)
        assert await fleet.read(meter) == WHOLE - spent - AHEAD
        await fleet.advance(ns=1_000)
        assert await fleet.read(meter) == WHOLE - spent
        gone.backend.watched.clear()  # it says nothing at its end


@pytest.mark.parametrize(
    ("store", "limit"),
    [("tenant", Quota(2 * WHOLE, "day")), ("id", QUOTA)],
    ids=["another limit", "not listed any more"],
)
async def test_a_lease_of_a_quota_that_has_changed_is_given_back_beside_that_of_the_new_one(
    valkey: Server, store: str, limit: Quota
) -> None:
    """Both are noted in one key, as if two had them."""
    async with Fleet(valkey.url, ManualClock(), instances=WIDE) as fleet:
        process = fleet.first
        _, spent = await hot_quota(fleet, process)
        changed = process.meter("quota", store, limit)
        spent += await heated(process, changed, spent=5)
        leases = [lease.left for lease in process.backend.watched]
        assert leases == [AHEAD, 2]
        assert await fleet.read(changed) == limit.limit - spent - sum(leases)
        await fleet.advance(ns=IDLE)
        await until(lambda: not process.backend.watched, "both are given back")
        assert await fleet.read(changed) == limit.limit - spent


async def test_a_meter_is_forgotten_when_nobody_has_it_and_nothing_of_it_is_leased(valkey: Server) -> None:
    async with Fleet(valkey.url, ManualClock(), instances=WIDE) as fleet:
        process, quota = fleet.first, Quota(WHOLE, "day")
        meters = [bucket(process, 80), process.meter("quota", "tenant", quota)]
        for meter in meters:
            await heated(process, meter, spent=4)
        known = [ref(meter) for meter in meters]
        del meter, meters
        gc.collect()
        assert [bucket(process, 80), process.meter("quota", "tenant", quota)] == [each() for each in known]
        await fleet.advance(ns=IDLE)
        await until(lambda: not process.backend.watched, "what is leased is given back")
        await fleet.settled()
        gc.collect()
        assert [each() for each in known] == [None, None]
        assert await fleet.read(bucket(process, 80)) == 76


async def test_what_other_holders_have_of_a_quota_is_theirs(valkey: Server) -> None:
    async with Fleet(valkey.url, ManualClock(), size=2, instances=WIDE) as fleet:
        gone, alive = fleet.processes
        meter, spent = await hot_quota(fleet, gone)
        await fleet.advance(ns=HELD // 2 + 1_000)
        other = alive.meter("quota", "tenant", QUOTA)
        spent += await heated(alive, other, spent=4)
        left = other.leases["a"].left
        assert left == 3
        await fleet.advance(ns=HELD // 2 - 1_000)
        assert await fleet.read(meter) == WHOLE - spent - left
        gone.backend.watched.clear()
        await fleet.close()
        assert await fleet.read(meter) == WHOLE - spent


async def test_a_lease_of_a_quota_is_not_spent_when_it_may_be_somebody_else_s(valkey: Server) -> None:
    async with Fleet(valkey.url, ManualClock(), instances=WIDE) as fleet:
        process = fleet.first
        meter, spent = await hot_quota(fleet, process)
        await fleet.advance(ns=SPENT_BY - 1_000)
        before = process.asked
        assert await process.admits((meter, "a", 1))
        assert process.asked == before
        await fleet.advance(ns=1_000)
        assert await process.admits((meter, "a", 1))
        assert process.asked > before
        await fleet.close()
        assert await fleet.read(meter) <= WHOLE - spent - 2


@pytest.mark.parametrize("late", [SPENT_BY, HELD, 3 * HELD])
async def test_what_was_left_too_long_is_not_given_back_twice(valkey: Server, late: int) -> None:
    """A process that stood still finds its leases taken back by the server, or about to be."""
    async with Fleet(valkey.url, ManualClock(), size=2, instances=WIDE) as fleet:
        late_one, other = fleet.processes
        meter, spent = await hot_quota(fleet, late_one)
        await fleet.advance(ns=late)
        spent += await heated(other, other.meter("quota", "tenant", QUOTA), spent=1)
        late_one.backend.sweep(64)
        await fleet.settled()
        await fleet.advance(ns=HELD)
        assert await fleet.read(meter) == WHOLE - spent


@pytest.mark.parametrize("late", [SPENT_BY, HELD, 3 * HELD])
async def test_what_was_left_too_long_is_not_spent_after_all(valkey: Server, late: int) -> None:
    async with Fleet(valkey.url, ManualClock(), size=2, instances=WIDE) as fleet:
        late_one, other = fleet.processes
        meter, spent = await hot_quota(fleet, late_one)
        await fleet.advance(ns=late)
        theirs = other.meter("quota", "tenant", QUOTA)
        spent += await heated(other, theirs, spent=1)
        while await late_one.admits((meter, "a", 1)):
            spent += 1
        while await other.admits((theirs, "a", 1)):
            spent += 1
        assert spent <= WHOLE


@pytest.mark.parametrize("swept", [False, True])
async def test_a_lease_of_a_quota_ends_with_its_window(valkey: Server, swept: bool) -> None:
    async with Fleet(valkey.url, ManualClock("2026-03-04T23:59:59.5Z"), instances=WIDE) as fleet:
        process = fleet.first
        meter, _ = await hot_quota(fleet, process)
        await fleet.advance(0.5)
        other = fleet.process()
        theirs = other.meter("quota", "tenant", QUOTA)
        spent = await heated(other, theirs, spent=AHEAD)
        if swept:
            await fleet.advance(ns=IDLE)
            process.backend.sweep(64)
            await fleet.settled()
        for _ in range(WHOLE + 100):
            spent += await process.admits((meter, "a", 1))
        await other.backend.aclose()
        assert spent <= WHOLE
        await fleet.close()
        for _ in range(100):
            spent += await other.admits((theirs, "a", 1))
        assert spent == WHOLE
        await other.backend.aclose()


# Refusals


async def refused(process: Process, *charges: Charge) -> list[int]:
    """The waits of a refusal."""
    verdict = await process.spend(*charges)
    assert verdict.waits is not None
    return verdict.waits


async def test_what_is_refused_costs_one_call_a_second_at_most(valkey: Server) -> None:
    async with Fleet(valkey.url, ManualClock(), leases=False) as fleet:
        process = fleet.first
        meter = bucket(process, 2)
        await heated(process, meter, spent=2)
        await fleet.advance(10)
        before = evalsha(valkey)
        (wait,) = await refused(process, (meter, "a", 1))
        assert evalsha(valkey) == before + 1
        for _ in range(4):
            before = evalsha(valkey)
            await asyncio.gather(*(refused(process, (meter, "a", 1)) for _ in range(500)))
            await fleet.advance(ns=SECOND - 1_000)
            assert await refused(process, (meter, "a", 1)) == [wait - SECOND + 1_000]
            assert evalsha(valkey) - before <= 1  # and that would be a sign of life
            await fleet.advance(ns=1_000)
            before = evalsha(valkey)
            wait -= SECOND
            assert await asyncio.gather(*(refused(process, (meter, "a", 1)) for _ in range(50))) == [[wait]] * 50
            assert 1 <= evalsha(valkey) - before <= 2
            for _ in range(100):
                assert await refused(process, (meter, "a", 1)) == [wait]


def evalsha(server: Server) -> int:
    """Calls by the name of a script, or of one that it did not know."""
    calls = server.calls()
    return calls.get("eval", 0) + calls.get("evalsha", 0)


async def test_who_comes_back_when_it_was_told_is_admitted(valkey: Server) -> None:
    async with Fleet(valkey.url, ManualClock(), leases=False) as fleet:
        process = fleet.first
        meter = process.meter("rate", "tenant", Rate(7, SECOND, 1))
        for _ in range(5):
            assert await process.admits((meter, "a", 1))
            (wait,) = await refused(process, (meter, "a", 1))
            asked = process.asked
            whole = -(-wait // 1_000) * 1_000  # the server's clock has microseconds
            await fleet.advance(ns=whole - 1_000)
            assert await refused(process, (meter, "a", 1)) == [wait - whole + 1_000]
            assert process.asked - asked <= 1
            await fleet.advance(ns=1_000)


async def test_what_is_given_back_elsewhere_is_seen_within_a_second(valkey: Server) -> None:
    async with Fleet(valkey.url, ManualClock(), size=2, leases=False) as fleet:
        process, other = fleet.processes
        mine, theirs = bucket(process, 2), bucket(other, 2)
        verdict = await other.spend((theirs, "a", 2))
        await refused(process, (mine, "a", 1))
        other.backend.refund([(theirs, "a", 1)], verdict.wall)
        await fleet.settled()
        await refused(process, (mine, "a", 1))
        await fleet.advance(1)
        assert await process.admits((mine, "a", 1))


@pytest.mark.parametrize("how", ["refund", "debit"])
async def test_what_is_given_back_here_is_seen_at_once(valkey: Server, how: str) -> None:
    async with Fleet(valkey.url, ManualClock(), leases=False) as fleet:
        process = fleet.first
        meter = bucket(process, 2)
        verdict = await process.spend((meter, "a", 2))
        (wait,) = await refused(process, (meter, "a", 1))
        if how == "refund":
            process.backend.refund([(meter, "a", 1)], verdict.wall)
            assert await process.admits((meter, "a", 1))
        else:
            process.backend.debit([(meter, "a", 1)])
            assert await refused(process, (meter, "a", 1)) == [wait + FOR_EVER // 2]


async def test_a_refusal_says_nothing_of_what_costs_less(valkey: Server) -> None:
    async with Fleet(valkey.url, ManualClock(), leases=False) as fleet:
        process = fleet.first
        meter = bucket(process, 5)
        assert await process.admits((meter, "a", 2))
        await refused(process, (meter, "a", 4))
        before = process.asked
        await refused(process, (meter, "a", 4))
        await refused(process, (meter, "a", 5))
        assert process.asked == before
        assert await process.admits((meter, "a", 3))
        assert await process.left(meter) == 0
        assert await refused(process, (meter, "a", 9)) == [NEVER]
        await refused(process, (meter, "b", 6))
        assert await process.admits((meter, "b", 5))


async def test_what_is_known_of_one_limit_is_said_of_that_one(valkey: Server) -> None:
    async with Fleet(valkey.url, ManualClock(), leases=False) as fleet:
        process = fleet.first
        tight, loose = bucket(process, 1), bucket(process, 50, name="loose")
        assert await process.admits((tight, "a", 1), (loose, "a", 1))
        first = await refused(process, (loose, "a", 1), (tight, "a", 1))
        before = process.asked
        assert await refused(process, (loose, "a", 1), (tight, "a", 1)) == first
        assert process.asked == before
        assert await process.admits((loose, "a", 1))
        assert await process.left(loose) == 48


async def test_a_limit_that_has_changed_does_not_see_what_the_old_one_refused(valkey: Server) -> None:
    async with Fleet(valkey.url, ManualClock(), leases=False) as fleet:
        process = fleet.first
        old, new = bucket(process, 4), bucket(process, 8)
        assert await process.admits((old, "a", 3))
        await refused(process, (old, "a", 2))
        assert await process.admits((new, "a", 2))  # a quarter of it
        await refused(process, (new, "a", 1))


async def test_without_a_deny_cache_every_refusal_is_a_call(valkey: Server) -> None:
    async with Fleet(valkey.url, ManualClock(), leases=False, deny_cache=False) as fleet:
        process = fleet.first
        meter = bucket(process, 1)
        await heated(process, meter, spent=1)
        before = process.asked
        for _ in range(20):
            await refused(process, (meter, "a", 1))
        assert process.asked - before >= 20
        assert meter.denied == {}


@pytest.mark.slow
async def test_what_is_remembered_of_callers_has_a_bound(valkey: Server) -> None:
    async with Fleet(valkey.url, ManualClock()) as fleet:
        process = fleet.first
        meter = bucket(process, 80)
        verdict = Verdict([], [0], [0], [SECOND], 0, 0)
        for number in range(100_000):
            process.backend.remember([(meter, str(number), 1)], verdict, 0)
            process.backend.watch(meter, str(number), 0)
        assert len(meter.denied) <= MOST_DENIED
        assert "99999" in meter.denied
        assert len(meter.leases) == len(process.backend.watched) == MOST_LEASES
        await asyncio.gather(*(process.spend((meter, f"new {number}", 81)) for number in range(20_000)))
        assert len(meter.leases) == MOST_LEASES
        assert 0 < len(meter.denied) <= MOST_DENIED
        assert 0 < len(meter.tags) <= MOST_TAGS
