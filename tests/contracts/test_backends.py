"""What every backend must do: the specification of `seawall.backends.Backend`, run against each of them."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from seawall.backends import SharedBackend
from seawall.decision import NEVER
from seawall.rate import SECOND, SETBACK, Quota, Rate
from strategies import DAY, HOUR, MINUTE, ModelBackend, ModelCharge, limits, most_admitted

if TYPE_CHECKING:
    from contracts.conftest import Make
    from contracts.subjects import Subject
    from seawall.backends import Charge, Key

MILLISECOND = SECOND // 1000

COSTS = st.one_of(st.just(1), st.integers(1, 8))
PAUSES = st.one_of(st.just(0), st.integers(0, 2 * SECOND), st.integers(0, 5 * HOUR), st.just(DAY))
KEYS: st.SearchStrategy[Key] = st.one_of(st.just("a"), st.just(b"a"), st.just("b"))
BACKWARD = st.one_of(st.integers(-SETBACK, 0), st.integers(-3 * SECOND, 0))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data(), st.lists(limits(), min_size=1, max_size=4), st.booleans())
async def test_every_answer_is_that_of_the_arithmetic(
    make: Make, data: st.DataObject, rates: list[Rate | Quota], back: bool
) -> None:
    """Decisions, waits and what is left equal `seawall.rate`, over any sequence of calls, clocks that step back too."""
    async with make() as subject:
        await follow_the_arithmetic(subject, data, rates, back=back)


async def follow_the_arithmetic(
    subject: Subject, data: st.DataObject, rates: list[Rate | Quota], *, back: bool
) -> None:
    model = ModelBackend()
    # The model's quotas are its own: they remember a window as well.
    own: list[Rate | Quota] = [
        Quota(rate.limit, rate.span, rate.zone) if isinstance(rate, Quota) else rate for rate in rates
    ]
    meters = [subject.backend.meter(f"m{n}", "tenant", rate) for n, rate in enumerate(rates)]
    spent_at = subject.clock.wall_ns()
    earliest = 0
    for _ in range(data.draw(st.integers(1, 12))):
        subject.clock.advance_ns(data.draw(st.one_of(PAUSES, BACKWARD) if back else PAUSES))
        subject.clock.advance_ns(max(0, earliest - subject.clock()))
        subject.clock.advance_ns(-(subject.clock() % subject.tick))
        now, wall = subject.clock(), subject.clock.wall_ns()
        # A refused call may or may not note what it would have clamped; a step back would show which.
        most = 1 if back else len(rates)
        chosen = data.draw(st.lists(st.integers(0, len(rates) - 1), min_size=1, max_size=most, unique=True))
        pairs = [(n, data.draw(KEYS), data.draw(COSTS)) for n in chosen]
        charges: list[Charge] = [(meters[n], key, cost) for n, key, cost in pairs]
        expected: list[ModelCharge] = [(n, own[n], key, cost) for n, key, cost in pairs]
        action = data.draw(st.sampled_from(("spend", "spend", "spend", "peek", "debit", "refund")))
        if action == "debit":
            await subject.debit(*charges)
            model.debit(expected, now, wall)
        elif action == "refund":
            # What was spent longer ago than a bucket takes to fill may have come back by itself.
            if all(wall - spent_at < rate.capacity // rate.scale for rate in rates if isinstance(rate, Rate)):
                await subject.refund(charges, spent_at)
                model.refund(expected, now, wall, spent_at)
        elif action == "peek":
            for (meter, key, _), wanted in zip(charges, expected, strict=True):
                assert await subject.admits((meter, key, 0))
                model.spend([(*wanted[:3], 0)], now, wall)
        else:
            verdict = await subject.spend(*charges)
            waits = model.spend(expected, now, wall)
            spent_at = verdict.wall
            assert (verdict.now, verdict.wall) == (subject.now, wall)
            assert (verdict.waits or [0] * len(charges)) == waits
            assert verdict.admitted == (not any(waits))
            assert verdict.left == [model.left(n, own[n], key, now, wall) for n, key, _ in pairs]
            for (n, *_), state, left in zip(pairs, verdict.states, verdict.left, strict=True):
                assert own[n].remaining(state, verdict.now if isinstance(own[n], Rate) else wall) == left
        # Whether it is noted that nothing is used at this time, or forgotten, is the backend's affair as well.
        if any(is_unused(rate, model.states.get((n, key), 0), now, wall) for n, rate, key, _ in expected):
            earliest = now


def is_unused(rate: Rate | Quota, state: int, now: int, wall: int) -> bool:
    return state <= now * rate.scale if isinstance(rate, Rate) else rate.used(state, wall) == 0


@pytest.mark.weak
async def test_a_verdict_says_what_its_headers_need(subject: Subject) -> None:
    rate, quota = Rate(10, SECOND), Quota(3, "day")
    charges: list[Charge] = [
        (subject.backend.meter("rate", "tenant", rate), "acme", 4),
        (subject.backend.meter("quota", "tenant", quota), "acme", 2),
    ]
    first = await subject.spend(*charges)
    assert (first.admitted, first.waits, first.left) == (True, None, [6, 1])
    assert (first.now, first.wall) == (subject.now, subject.clock.wall_ns())
    assert list(first.charges) == charges
    second = await subject.spend(*charges)
    assert (second.admitted, second.waits, second.left) == (False, [0, DAY], [6, 1])
    assert list(second.charges) == charges


@pytest.mark.weak
async def test_nothing_to_charge_is_admitted(subject: Subject) -> None:
    verdict = await subject.spend()
    assert (verdict.admitted, verdict.states, verdict.left) == (True, [], [])


@pytest.mark.weak
@pytest.mark.parametrize("refusing", [0, 1, 2])
async def test_a_refusal_debits_nothing_anywhere(subject: Subject, refusing: int) -> None:
    """All or nothing, wherever in the order the one that refuses stands."""
    rates: list[Rate | Quota] = [Rate(10, SECOND), Quota(10, "day"), Rate(10, HOUR)]
    meters = [subject.backend.meter(f"m{n}", "tenant", rate) for n, rate in enumerate(rates)]
    exhausted: Charge = (meters[refusing], "acme", 10)
    assert await subject.admits(exhausted)
    charges: list[Charge] = [(meter, "acme", 3) for meter in meters]
    before = await subject.left(*charges)
    for _ in range(20):
        verdict = await subject.spend(*charges)
        assert verdict.waits is not None
        assert [wait > 0 for wait in verdict.waits] == [n == refusing for n in range(3)]
    assert await subject.left(*charges) == before == [0 if n == refusing else 10 for n in range(3)]


@pytest.mark.weak
async def test_a_second_limit_is_not_burnt_by_what_the_first_refuses(subject: Subject) -> None:
    """slowapi burns 10 of 1000/day for the 1 that 1/second admits."""
    second = subject.backend.meter("second", "tenant", Rate(1, SECOND))
    day = subject.backend.meter("day", "tenant", Rate(1000, DAY))
    admitted = [await subject.admits((second, "acme", 1), (day, "acme", 1)) for _ in range(10)]
    assert admitted == [True] + [False] * 9
    assert await subject.left((day, "acme", 1)) == [999]
    reverse = [await subject.admits((day, "other", 1), (second, "other", 1)) for _ in range(10)]
    assert reverse == admitted
    assert await subject.left((day, "other", 1)) == [999]


@pytest.mark.weak
async def test_a_refused_cost_is_not_charged(subject: Subject) -> None:
    """The fixed window of limits charges it: 4 of 5 used, then 3 refused, and the last one is gone."""
    quota = subject.backend.meter("quota", "tenant", Quota(5, "day"))
    assert await subject.admits((quota, "acme", 4))
    assert not await subject.admits((quota, "acme", 3))
    assert await subject.admits((quota, "acme", 1))


async def test_a_hundred_a_second_with_a_burst_of_ten_limits(subject: Subject) -> None:
    """throttled-py's token bucket limits nothing where burst / rate is below half a second."""
    meter = subject.backend.meter("rate", "tenant", Rate(100, SECOND, 10))
    admitted = []
    for millisecond in range(1_000):
        admitted += [(millisecond * MILLISECOND, 1)] if await subject.admits((meter, "acme", 1)) else []
        subject.clock.advance_ns(MILLISECOND)
    assert len(admitted) == 10 + 99
    assert most_admitted(Rate(100, SECOND, 10), admitted) <= 0


async def test_five_a_second_is_five(subject: Subject) -> None:
    """traffik enforces it as 2.5."""
    meter, count = subject.backend.meter("rate", "tenant", Rate(5, SECOND)), 0
    for _ in range(60 * 20):
        count += await subject.admits((meter, "acme", 1))
        subject.clock.advance_ns(SECOND // 20)
    assert count == 5 + 5 * 60 - 1


@pytest.mark.weak
@pytest.mark.parametrize(
    "rate",
    [Rate(100, SECOND, 10), Rate(5, SECOND), Rate(3, SECOND), Rate(3, 2 * SECOND), Rate(5, 15 * MINUTE), Rate(7, DAY)],
    ids=repr,
)
async def test_a_wait_is_exact(subject: Subject, rate: Rate) -> None:
    """G4: alone, admitted after the wait and refused one tick of its clock earlier."""
    meter = subject.backend.meter("rate", "tenant", rate)
    while await subject.admits((meter, "acme", 1)):
        pass
    for cost in (1, rate.burst):
        waits = (await subject.spend((meter, "acme", cost))).waits
        assert waits is not None
        first = -(-waits[0] // subject.tick) * subject.tick
        subject.clock.advance_ns(first - subject.tick)
        assert (await subject.spend((meter, "acme", cost))).waits == [waits[0] - (first - subject.tick)]
        subject.clock.advance_ns(subject.tick)
        assert await subject.admits((meter, "acme", cost))


@pytest.mark.weak
async def test_a_quota_is_whole_again_at_midnight_and_not_before(subject: Subject) -> None:
    meter = subject.backend.meter("quota", "tenant", Quota(2, "day", "Europe/Berlin"))
    verdict = await subject.spend((meter, "acme", 2))
    assert verdict.admitted
    assert (await subject.spend((meter, "acme", 1))).waits == [23 * HOUR]  # the clock starts at 01:00 in Berlin
    subject.clock.advance_ns(23 * HOUR - subject.tick)
    assert not await subject.admits((meter, "acme", 1))
    subject.clock.advance_ns(subject.tick)
    assert await subject.admits((meter, "acme", 2))


@pytest.mark.weak
async def test_what_can_never_fit_is_told_apart_from_what_must_wait(subject: Subject) -> None:
    """G5."""
    rate = subject.backend.meter("rate", "tenant", Rate(5, SECOND))
    quota = subject.backend.meter("quota", "tenant", Quota(5, "day"))
    assert (await subject.spend((rate, "acme", 6), (quota, "acme", 6))).waits == [NEVER, NEVER]
    assert (await subject.spend((rate, "acme", 5), (quota, "acme", 6))).waits == [0, NEVER]
    assert await subject.left((rate, "acme", 0), (quota, "acme", 0)) == [5, 5]


@pytest.mark.weak
async def test_a_peek_costs_nothing_even_when_nothing_is_left(subject: Subject) -> None:
    rate, quota = (
        subject.backend.meter("r", "tenant", Rate(1, HOUR)),
        subject.backend.meter("q", "tenant", Quota(1, "day")),
    )
    for meter in (rate, quota):
        for _ in range(3):
            assert await subject.left((meter, "acme", 0)) == [1]
        assert await subject.admits((meter, "acme", 1))
        await subject.debit((meter, "acme", 1))
        verdict = await subject.spend((meter, "acme", 0))
        assert (verdict.admitted, verdict.left) == (True, [0])


@pytest.mark.weak
async def test_buckets_are_apart_by_key_name_and_store(subject: Subject) -> None:
    rate = Rate(1, HOUR)
    meters = [
        subject.backend.meter(name, store, rate) for name in ("a", "b") for store in ("tenant", "address", "state")
    ]
    keys = ("acme", "Acme", b"acme", "", b"", "acme ", b"\x00", "\x00", "0")
    for meter in meters:
        for key in keys:
            assert await subject.admits((meter, key, 1))
            assert not await subject.admits((meter, key, 1))


@pytest.mark.weak
async def test_the_same_name_store_and_rate_are_the_same_bucket(subject: Subject) -> None:
    """One bucket per name and identity, never one per URL."""
    one, other = (subject.backend.meter("login-ip", "address", Rate(1, HOUR)) for _ in range(2))
    assert await subject.admits((one, b"ip", 1))
    assert not await subject.admits((other, b"ip", 1))
    quotas = [subject.backend.meter("quota", "address", Quota(1, "day")) for _ in range(2)]
    assert await subject.admits((quotas[0], b"ip", 1))
    assert not await subject.admits((quotas[1], b"ip", 1))


async def test_a_bucket_whose_rate_changes_keeps_the_fraction_that_is_used(subject: Subject) -> None:
    before = subject.backend.meter("rate", "tenant", Rate(10, HOUR))
    assert await subject.admits((before, "acme", 5))
    after = subject.backend.meter("rate", "tenant", Rate(100, MINUTE, 200))
    assert await subject.left((after, "acme", 0)) in ([99], [100])  # whole units of two rates seldom meet
    assert await subject.left((after, "globex", 0)) == [200]


@pytest.mark.weak
async def test_a_quota_whose_limit_changes_keeps_its_count(subject: Subject) -> None:
    before = subject.backend.meter("quota", "tenant", Quota(10, "day"))
    assert await subject.admits((before, "acme", 7))
    for limit, left in ((100, 93), (5, 0), (8, 1)):
        assert await subject.left((subject.backend.meter("quota", "tenant", Quota(limit, "day")), "acme", 0)) == [left]


@pytest.mark.weak
@pytest.mark.parametrize("limit", [Rate(10, HOUR), Quota(10, "day")], ids=str)
@pytest.mark.parametrize(("before", "after"), [("id", "tenant"), ("tenant", "id")])
async def test_a_tenant_that_becomes_listed_or_no_longer_is_keeps_what_it_used(
    subject: Subject, limit: Rate | Quota, before: str, after: str
) -> None:
    assert await subject.admits((subject.backend.meter("limit", before, limit), "acme", 3))
    meter = subject.backend.meter("limit", after, limit)
    assert await subject.left((meter, "acme", 0)) == [7]
    assert await subject.admits((meter, "acme", 2))
    assert await subject.left((subject.backend.meter("limit", before, limit), "acme", 0)) == [5]
    assert await subject.left((meter, "globex", 0)) == [10]


async def test_a_refund_gives_back_and_never_overfills(subject: Subject) -> None:
    rate = subject.backend.meter("rate", "tenant", Rate(5, SECOND))
    quota = subject.backend.meter("quota", "tenant", Quota(5, "day"))
    charges: list[Charge] = [(rate, "acme", 3), (quota, "acme", 3)]
    verdict = await subject.spend(*charges)
    await subject.refund(verdict.charges, verdict.wall)
    assert await subject.left(*charges) == [5, 5]
    await subject.refund(verdict.charges, verdict.wall)
    assert await subject.left(*charges) == [5, 5]
    assert await subject.admits((rate, "acme", 5), (quota, "acme", 5))
    assert not await subject.admits((rate, "acme", 1))


@pytest.mark.weak
async def test_a_refund_is_void_once_its_window_is_over(subject: Subject) -> None:
    quota = subject.backend.meter("quota", "tenant", Quota(5, "day"))
    verdict = await subject.spend((quota, "acme", 5))
    subject.clock.advance_ns(DAY)
    assert await subject.admits((quota, "acme", 2))
    await subject.refund(verdict.charges, verdict.wall)
    assert await subject.left((quota, "acme", 0)) == [3]


async def test_a_refund_for_nobody_is_nothing(subject: Subject) -> None:
    for rate in (Rate(5, SECOND), Quota(5, "day")):
        meter = subject.backend.meter("limit", "tenant", rate)
        await subject.refund([(meter, "stranger", 3)], subject.clock.wall_ns())
        assert await subject.left((meter, "stranger", 0)) == [5]


async def test_a_debit_takes_without_asking_down_to_one_burst_of_debt(subject: Subject) -> None:
    rate = subject.backend.meter("rate", "tenant", Rate(5, SECOND))
    quota = subject.backend.meter("quota", "tenant", Quota(5, "day"))
    assert await subject.debit((rate, "acme", 3), (quota, "acme", 3)) == [3, 3]
    assert await subject.left((rate, "acme", 0), (quota, "acme", 0)) == [2, 2]
    assert await subject.debit((rate, "acme", 100), (quota, "acme", 100)) == [7, 100]
    assert await subject.debit((rate, "acme", 1), (quota, "acme", 1)) == [0, 1]
    assert (await subject.spend((rate, "acme", 1))).waits == [6 * SECOND // 5]
    subject.clock.advance_ns(6 * SECOND // 5)
    assert await subject.admits((rate, "acme", 1))
    subject.clock.advance_ns(DAY)
    assert await subject.left((rate, "acme", 0), (quota, "acme", 0)) == [5, 5]


async def test_a_debit_says_whole_tokens_only(subject: Subject) -> None:
    """What is given back later must not be more than was taken: part of a token is none."""
    rate = subject.backend.meter("rate", "tenant", Rate(5, SECOND))
    await subject.debit((rate, "acme", 10))
    subject.clock.advance_ns(SECOND // 2)
    assert await subject.debit((rate, "acme", 10)) == [2]


async def test_five_hundred_at_once_are_admitted_up_to_the_burst(subject: Subject) -> None:
    """E2, CVE-2024-4629: one decision is atomic. Exactly B get in, and no two are told the same of what is left."""
    meter = subject.backend.meter("rate", "tenant", Rate(40, DAY))
    verdicts = await asyncio.gather(*(subject.spend((meter, "acme", 1)) for _ in range(500)))
    assert sorted(v.left[0] for v in verdicts if v.admitted) == list(range(40))
    assert {v.left[0] for v in verdicts if not v.admitted} == {0}


async def test_a_clock_set_back_starves_nobody(subject: Subject) -> None:
    """G6, through a backend: refusals write the clamp back, or the owner would wait for the clock to catch up."""
    meter = subject.backend.meter("rate", "tenant", Rate(2, SECOND))
    subject.clock.advance(10_000)
    assert await subject.admits((meter, "acme", 2))
    subject.clock.advance(-9_000)
    refusals = 0
    while not await subject.admits((meter, "acme", 1)):
        refusals += 1
        subject.clock.advance_ns(SECOND // 10)
    assert refusals == 15  # the largest debt and one token: 1.5 s


async def test_a_clock_set_back_by_months_starves_nobody_of_a_quota(subject: Subject) -> None:
    """What was counted in a window far ahead counts as today's, also where it is refused; tomorrow is another day."""
    quota = subject.backend.meter("quota", "tenant", Quota(3, "day"))
    subject.clock.advance(100 * DAY // SECOND)
    assert await subject.admits((quota, "acme", 3))
    subject.clock.advance(-90 * DAY // SECOND)
    assert (await subject.spend((quota, "acme", 1))).waits == [DAY]
    subject.clock.advance(DAY // SECOND)
    assert await subject.admits((quota, "acme", 3))


async def test_a_peek_writes_the_clamp_back_too(subject: Subject) -> None:
    """Whoever looks at what is left while the clock is behind does not wait from the next request only."""
    meter = subject.backend.meter("rate", "tenant", Rate(2, SECOND))
    subject.clock.advance(10_000)
    assert await subject.admits((meter, "acme", 2))
    subject.clock.advance(-9_000)
    assert await subject.left((meter, "acme", 0)) == [0]
    subject.clock.advance(1.5)
    assert await subject.admits((meter, "acme", 1))


@pytest.mark.weak
async def test_statistics_name_each_store(subject: Subject) -> None:
    for store in ("tenant", "address"):
        assert await subject.admits((subject.backend.meter("rate", store, Rate(1, HOUR)), "somebody", 1))
    statistics = subject.backend.statistics()
    if not isinstance(subject.backend, SharedBackend):  # which counts what it keeps itself
        assert {"tenant", "address"} <= set(statistics)
    assert all(set(counts) >= {"keys", "evicted", "overflowed"} for counts in statistics.values())
    assert all(type(count) is int for counts in statistics.values() for count in counts.values())


@pytest.mark.weak
async def test_a_backend_is_closed_once_and_names_itself(subject: Subject) -> None:
    assert subject.backend.name
    await subject.backend.aclose()
