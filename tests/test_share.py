"""A process's share of a limit, held against a token bucket of that size, and against what N of them admit together."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from fractions import Fraction
from threading import Thread
from typing import TypeAlias
from weakref import ref

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from seawall.backends import LISTED
from seawall.backends.memory import MemoryBackend
from seawall.backends.share import LocalMeter, LocalShare
from seawall.decision import NEVER
from seawall.rate import MAX_AMOUNT, SECOND, Quota, Rate
from seawall.testing import ManualClock
from strategies import DAY, HOUR, CountingBucket, limits, most_admitted, rates, schedules, small_rates

Events: TypeAlias = list[tuple[int, int, int]]
"""Nanoseconds to wait, which process, the cost."""


class Bench:
    """One process's share, and its clock."""

    def __init__(self, instances: int = 1, *, clock: ManualClock | None = None, max_keys: int = 1_000) -> None:
        self.clock = clock or ManualClock()
        self.share = LocalShare(max_keys=max_keys, clock=self.clock, wall_clock=self.clock.wall_ns)
        self.share.instances = instances
        self.clock.advance_ns(1)  # what is spent in the nanosecond of a change may be from before it

    def meter(self, rate: Rate | Quota, name: str = "rate", store: str = "address") -> LocalMeter:
        return self.share.meter(name, store, rate)

    def admits(self, meter: LocalMeter, cost: int = 1, key: str | bytes = b"a") -> bool:
        return self.share.spend([(meter, key, cost)]).admitted

    def left(self, meter: LocalMeter, key: str | bytes = b"a") -> int:
        return self.share.spend([(meter, key, 0)]).left[0]

    def admitted_at_once(self, meter: LocalMeter) -> int:
        count = 0
        while self.admits(meter):
            count += 1
        return count


def share_of(rate: Rate, instances: int) -> Rate:
    return Rate(rate.amount, rate.period_ns * instances, max(1, rate.burst // instances))


# The size of a share


@pytest.mark.parametrize(("instances", "expected"), [(1, 10), (2, 5), (3, 3), (10, 1), (40, 1)])
@pytest.mark.parametrize("rate", [Rate(10, HOUR), Quota(10, "day")], ids=["bucket", "quota"])
def test_a_share_is_the_limit_over_the_instances_and_at_least_one(
    rate: Rate | Quota, instances: int, expected: int
) -> None:
    bench = Bench(instances)
    meter = bench.meter(rate)
    assert bench.left(meter) == expected
    assert bench.admitted_at_once(meter) == expected


@given(small_rates(), st.integers(1, 20), st.data())
def test_a_share_decides_as_a_bucket_of_its_size_would(rate: Rate, instances: int, data: st.DataObject) -> None:
    """The oracle is a counting bucket of r/N and max(1, B // N) that lends what a larger cost lacks when it is full."""
    part = share_of(rate, instances)
    bench = Bench(instances)
    meter = bench.meter(rate)
    oracle = CountingBucket(part)
    for wait, cost in data.draw(schedules(part)):
        bench.clock.advance_ns(wait)
        oracle.at(bench.clock())
        expected = cost == 0 or (cost <= rate.burst and oracle.tokens >= min(cost, part.burst))
        verdict = bench.share.spend([(meter, b"a", cost)])
        if expected:
            oracle.tokens -= cost
        assert verdict.admitted == expected
        assert verdict.left == [oracle.remaining]


@given(small_rates(), st.integers(1, 20), st.data())
def test_the_wait_of_a_share_is_exact(rate: Rate, instances: int, data: st.DataObject) -> None:
    bench = Bench(instances)
    meter = bench.meter(rate)
    for wait, cost in data.draw(schedules(share_of(rate, instances))):
        bench.clock.advance_ns(wait)
        verdict = bench.share.spend([(meter, b"a", cost)])
        if verdict.waits is None:
            continue
        if cost > rate.burst:
            assert verdict.waits == [NEVER]
            continue
        bench.clock.advance_ns(verdict.waits[0] - 1)
        assert not bench.admits(meter, cost), "one nanosecond too early"
        bench.clock.advance_ns(1)
        assert bench.admits(meter, cost)


@given(rates(), st.integers(1, 50), st.data())
def test_the_states_of_a_share_have_left_what_it_says(rate: Rate, instances: int, data: st.DataObject) -> None:
    bench = Bench(instances)
    meter = bench.meter(rate)
    for wait, cost in data.draw(schedules(share_of(rate, instances))):
        bench.clock.advance_ns(wait)
        verdict = bench.share.spend([(meter, b"a", cost)])
        assert rate.remaining(verdict.states[0], verdict.now) == verdict.left[0]
        until = rate.wait(verdict.states[0], verdict.now)
        if verdict.left == [0]:
            bench.clock.advance_ns(until - 1)
            assert bench.left(meter) == 0, "one nanosecond too early"
            bench.clock.advance_ns(1)
            assert bench.left(meter) >= 1


@given(rates(), st.data())
def test_the_share_of_one_is_the_whole_limit_to_the_bit(rate: Rate, data: st.DataObject) -> None:
    bench = Bench(1)
    memory = MemoryBackend(clock=bench.clock, wall_clock=bench.clock.wall_ns)
    whole, meter = memory.meter("rate", "address", rate), bench.meter(rate)
    for wait, cost in data.draw(schedules(rate)):
        bench.clock.advance_ns(wait)
        expected, actual = memory.spend([(whole, b"a", cost)]), bench.share.spend([(meter, b"a", cost)])
        assert (actual.states, actual.left, actual.waits) == (expected.states, expected.left, expected.waits)
        assert bench.share.debit([(meter, b"a", 1)]) == memory.debit([(whole, b"a", 1)])


def test_a_quota_says_what_is_left_until_its_window_ends(clock: ManualClock) -> None:
    bench = Bench(2, clock=clock)
    quota = Quota(10, "day")
    meter = bench.meter(quota)
    verdict = bench.share.spend([(meter, b"a", 4)])
    assert verdict.left == [1]
    assert quota.remaining(verdict.states[0], verdict.wall) == 1
    refused = bench.share.spend([(meter, b"a", 2)])
    assert refused.waits == [12 * HOUR - 1]
    assert quota.end_ns - refused.wall == 12 * HOUR - 1, "the rate that the meter was made with is in its window"
    clock.advance(12 * 3600)
    assert bench.left(meter) == 5


# What N processes admit together


@st.composite
def outages(draw: st.DrawFn, limit: int, processes: int, token: int) -> Events:
    event = st.tuples(
        st.one_of(st.just(0), st.just(token), st.integers(0, 3 * token)),
        st.integers(0, processes - 1),
        st.one_of(st.just(1), st.integers(1, limit + 1)),
    )
    return draw(st.lists(event, max_size=60))


def run(rate: Rate | Quota, processes: int, expected: int, events: Events) -> list[list[tuple[int, int]]]:
    """What each process admitted: instants and costs."""
    clock = ManualClock()
    benches = [Bench(expected, clock=clock) for _ in range(processes)]
    meters = [bench.meter(rate) for bench in benches]
    admitted: list[list[tuple[int, int]]] = [[] for _ in benches]
    for wait, who, cost in events:
        clock.advance_ns(wait)
        if benches[who].admits(meters[who], cost):
            admitted[who].append((clock(), cost))
    return admitted


@given(small_rates(), st.integers(1, 5), st.integers(1, 8), st.data())
def test_all_processes_together_keep_the_published_bound(
    rate: Rate, processes: int, expected: int, data: st.DataObject
) -> None:
    token = max(1, expected * rate.period_ns // rate.amount)
    admitted = run(rate, processes, expected, data.draw(outages(rate.burst, processes, token)))
    everything = sorted(event for one in admitted for event in one)
    assume(everything)
    largest = max(cost for _, cost in everything)
    burst = processes * max(1, rate.burst // expected, largest)
    # P * max(1, B // N, C) + P/N * r * D over every window: the excess over a bucket of that burst and that rate.
    whole = Rate(rate.amount * processes, rate.period_ns * expected, burst)
    assert most_admitted(whole, everything) <= 0


@given(st.integers(1, 12), st.integers(1, 5), st.integers(1, 8), st.data())
def test_all_processes_together_keep_the_published_bound_of_a_quota(
    limit: int, processes: int, expected: int, data: st.DataObject
) -> None:
    admitted = run(Quota(limit, "day"), processes, expected, data.draw(outages(limit, processes, DAY // 4)))
    windows: dict[int, list[int]] = {}
    for one in admitted:
        for at, cost in one:
            windows.setdefault(at // DAY, []).append(cost)
    for costs in windows.values():
        assert sum(costs) <= processes * max(1, limit // expected, *costs)


def test_processes_that_were_expected_reach_the_whole_limit_and_no_more() -> None:
    """The bound is not far off either: it is reached."""
    events = [(0, who, 1) for who in range(4) for _ in range(10)]
    admitted = run(Rate(20, HOUR), 4, 4, events)
    assert [len(one) for one in admitted] == [5, 5, 5, 5]


# Costs larger than a share


@pytest.mark.parametrize("rate", [Rate(10, 10 * SECOND), Quota(10, "day")], ids=["bucket", "quota"])
def test_a_cost_beyond_the_share_is_admitted_while_the_share_is_untouched(rate: Rate | Quota) -> None:
    bench = Bench(5)
    meter = bench.meter(rate)
    assert bench.admits(meter, 10)
    assert not bench.admits(meter, 1)
    assert bench.share.spend([(meter, b"b", 1)]).admitted
    assert not bench.admits(meter, 10, b"b"), "somebody has used a unit of it"


def test_a_cost_beyond_the_share_is_paid_for_at_the_rate_of_the_share() -> None:
    bench = Bench(5)
    meter = bench.meter(Rate(10, 10 * SECOND))  # a share of 2, and one more every 5 seconds
    assert bench.admits(meter, 10)
    assert bench.share.spend([(meter, b"a", 1)]).waits == [(10 - 2 + 1) * 5 * SECOND]
    assert bench.share.spend([(meter, b"a", 10)]).waits == [10 * 5 * SECOND]


@pytest.mark.parametrize("rate", [Rate(10, 10 * SECOND), Quota(10, "day")], ids=["bucket", "quota"])
def test_a_cost_beyond_the_whole_limit_never_fits(rate: Rate | Quota) -> None:
    bench = Bench(5)
    verdict = bench.share.spend([(bench.meter(rate), b"a", 11)])
    assert verdict.waits == [NEVER]
    assert verdict.left == [2]


# All or none


def test_all_charges_are_taken_or_none() -> None:
    bench = Bench(2)
    rate, quota = bench.meter(Rate(4, HOUR)), bench.meter(Quota(2, "day"), "quota")
    assert bench.share.spend([(rate, b"a", 1), (quota, b"a", 1)]).left == [1, 0]
    refused = bench.share.spend([(rate, b"a", 1), (quota, b"a", 1)])
    assert refused.left == [1, 0]
    assert refused.waits == [0, DAY - 1]


def test_a_refused_cost_beyond_the_share_leaves_no_debt() -> None:
    bench = Bench(2)
    rate, quota = bench.meter(Rate(4, HOUR)), bench.meter(Quota(2, "day"), "quota")
    bench.admits(quota)
    assert not bench.share.spend([(rate, b"a", 4), (quota, b"a", 1)]).admitted
    assert bench.left(rate) == 2


def test_the_verdict_names_the_meters_and_costs_it_was_asked_about() -> None:
    bench = Bench(3)
    meter = bench.meter(Rate(10, HOUR))
    charges = [(meter, b"a", 2)]
    assert bench.share.spend(charges).charges == charges


def test_a_key_beyond_the_cap_is_reported_as_the_bucket_that_it_shares() -> None:
    bench = Bench(2, max_keys=1)
    meter = bench.meter(Rate(10, HOUR))
    assert bench.admits(meter, 1, b"first")
    verdict = bench.share.spend([(meter, b"second", 2)])
    [(spent, key, cost)] = verdict.charges
    assert (spent, cost) == (meter, 2)
    assert str(key).startswith("b'overflow:")
    bench.share.refund(verdict.charges, verdict.wall)
    assert bench.share.spend([(meter, b"second", 0)]).left == [5]
    assert bench.share.statistics()["address"] == {"keys": 1, "evicted": 0, "overflowed": 2}


# Giving back, and taking without asking


@given(limits(), st.integers(1, 8), st.data())
def test_what_is_given_back_at_once_was_never_taken(rate: Rate | Quota, instances: int, data: st.DataObject) -> None:
    bench = Bench(instances)
    meter = bench.meter(rate)
    whole = rate.burst if isinstance(rate, Rate) else rate.limit
    bench.admits(meter, data.draw(st.integers(0, whole)))
    before = bench.share.spend([(meter, b"a", 0)])
    verdict = bench.share.spend([(meter, b"a", data.draw(st.integers(1, whole)))])
    assume(verdict.admitted)
    bench.share.refund(verdict.charges, verdict.wall)
    after = bench.share.spend([(meter, b"a", 0)])
    assert (after.states, after.left) == (before.states, before.left)


def test_a_debit_goes_into_debt_and_says_what_it_took() -> None:
    bench = Bench(2)
    meter = bench.meter(Rate(4, 4 * SECOND))
    assert bench.share.debit([(meter, b"a", 3)]) == [3]
    assert bench.share.spend([(meter, b"a", 1)]).waits == [4 * SECOND], "2 of debt, and one to spend"
    assert bench.share.debit([(meter, b"a", 100)]) == [1]


def test_a_debit_of_a_quota_is_counted_whole() -> None:
    bench = Bench(2)
    meter = bench.meter(Quota(4, "day"))
    assert bench.share.debit([(meter, b"a", 100)]) == [100]
    assert bench.left(meter) == 0


# Instances come and go


@pytest.mark.parametrize("rate", [Rate(12, HOUR), Quota(12, "day")], ids=["bucket", "quota"])
@pytest.mark.parametrize(("before", "after"), [(1, 4), (4, 1), (2, 3), (50, 2), (2, 50)])
def test_what_was_exhausted_stays_so_when_the_number_of_instances_changes(
    rate: Rate | Quota, before: int, after: int
) -> None:
    bench = Bench(before)
    meter = bench.meter(rate)
    assert bench.admitted_at_once(meter) == max(1, 12 // before)
    bench.share.instances = after
    room = max(0, 12 - max(1, 12 // before) * before) // after  # what the division left over
    assert bench.admitted_at_once(meter) == room == 0


@pytest.mark.parametrize("rate", [Rate(12, HOUR), Quota(12, "day")], ids=["bucket", "quota"])
def test_a_share_that_is_in_use_follows_the_number_of_instances(rate: Rate | Quota) -> None:
    bench = Bench(1)
    meter = bench.meter(rate)
    lefts = []
    for instances in (1, 5, 20, 3, 1):
        bench.share.instances = instances
        lefts.append(bench.left(meter))
    assert lefts == [12, 2, 1, 4, 12]


def test_half_of_a_share_is_half_of_the_next_one() -> None:
    bench = Bench(1)
    meter = bench.meter(Rate(12, HOUR))
    bench.admits(meter, 6)
    bench.share.instances = 3
    assert bench.left(meter) == 2
    bench.share.instances = 6
    assert bench.left(meter) == 1
    bench.share.instances = 1
    assert bench.left(meter) == 6


@dataclass
class Turn:
    wait: int
    cost: int
    instances: int


@given(small_rates(), st.data())
def test_however_many_instances_there_are_one_process_keeps_the_whole_limit(rate: Rate, data: st.DataObject) -> None:
    token = max(1, rate.period_ns // rate.amount)
    turns = st.builds(
        Turn, st.one_of(st.just(0), st.integers(0, 5 * token)), st.integers(1, rate.burst), st.integers(1, 20)
    )
    bench = Bench()
    meter = bench.meter(rate)
    admitted = []
    for turn in data.draw(st.lists(turns, max_size=50)):
        bench.clock.advance_ns(turn.wait)
        bench.share.instances = turn.instances
        if bench.admits(meter, turn.cost):
            admitted.append((bench.clock(), turn.cost))
    assert most_admitted(rate, admitted) <= 0


@given(st.integers(1, 12), st.data())
def test_however_many_instances_there_are_one_process_keeps_the_whole_quota(limit: int, data: st.DataObject) -> None:
    turns = st.builds(Turn, st.just(0), st.integers(1, limit), st.integers(1, 20))
    bench = Bench()
    meter = bench.meter(Quota(limit, "day"))
    admitted = 0
    for turn in data.draw(st.lists(turns, max_size=50)):
        bench.share.instances = turn.instances
        admitted += turn.cost if bench.admits(meter, turn.cost) else 0
    assert admitted <= limit


def test_nothing_is_given_back_twice_because_more_instances_came() -> None:
    bench = Bench(1)
    meter = bench.meter(Rate(12, HOUR))
    verdict = bench.share.spend([(meter, b"a", 3)])
    bench.admits(meter, 9)
    bench.share.instances = 3
    bench.share.refund(verdict.charges, verdict.wall)
    assert bench.left(meter) == 1, "3 of 12, which is 1 of 4"


def test_there_is_at_least_one_instance() -> None:
    with pytest.raises(ValueError, match="at least 1, not 0"):
        Bench(0)


# Thousands of limits


def test_a_limit_that_is_never_needed_makes_nothing() -> None:
    bench = Bench(2)
    meters = [bench.meter(Rate(10, HOUR), f"t{number}", LISTED) for number in range(5_000)]
    assert all(meter.inner is None for meter in meters)
    bench.share.instances = 3
    assert all(meter.inner is None for meter in meters)
    assert bench.admits(meters[0])
    assert [meter.inner is None for meter in meters[:2]] == [False, True]
    assert bench.left(meters[0]) == 2


def test_the_same_limit_is_the_same_meter() -> None:
    bench = Bench(2)
    assert bench.meter(Rate(10, HOUR)) is bench.meter(Rate(10, HOUR))
    assert bench.meter(Quota(10, "day")) is bench.meter(Quota(10, "day"))
    assert bench.meter(Rate(10, HOUR)) is not bench.meter(Rate(10, HOUR), store=LISTED)


@pytest.mark.parametrize("rate", [Rate(10, HOUR), Quota(10, "day")], ids=["bucket", "quota"])
def test_a_meter_is_forgotten_with_the_last_who_has_it(rate: Rate | Quota) -> None:
    bench = Bench(2)
    meter = bench.meter(rate)
    known = ref(meter)
    verdict = bench.share.spend([(meter, b"a", 1)])
    del meter
    assert bench.meter(rate) is known() is verdict.charges[0][0]
    del verdict
    gc.collect()
    assert known() is None
    assert bench.left(bench.meter(rate)) == 4  # its keys are not


def test_meters_are_made_while_the_number_of_instances_changes() -> None:
    """By a thread that compiles a policy, and the event loop's."""
    bench = Bench(2)
    meters = [bench.meter(Rate(10, HOUR), f"before {number}") for number in range(2_000)]
    compiling = Thread(target=lambda: meters.extend(bench.meter(Rate(10, HOUR), str(n)) for n in range(10_000)))
    compiling.start()
    changes = 0
    while compiling.is_alive() or not changes:
        changes += 1
        bench.share.instances = 2 + changes % 2
    compiling.join()
    bench.share.instances = 5
    assert [bench.left(meters[at]) for at in (0, 1_999, 2_000, -1)] == [2] * 4


def test_quotas_that_become_alike_stay_apart() -> None:
    """What a share of 5 becomes for 10 instances is no quota of 10."""
    bench = Bench(10)
    five, ten = bench.meter(Quota(5, "day"), "five"), bench.meter(Quota(10, "day"), "ten")
    assert bench.admits(five)
    assert bench.left(ten) == 1


def test_the_largest_limit_can_be_shared_by_any_number() -> None:
    bench = Bench(1_000)
    meter = bench.meter(Rate(MAX_AMOUNT, HOUR))
    assert bench.left(meter) == MAX_AMOUNT // 1_000


def test_a_share_says_what_it_is() -> None:
    assert repr(Bench(3).share) == "<LocalShare 1/3 in <MemoryBackend 0 keys in 0 stores, at most 1000 each>>"


def test_the_bound_needs_the_costs_it_names() -> None:
    """A control: without C, the published bound would be broken by one cost larger than a share."""
    [one] = run(Rate(10, HOUR), 1, 5, [(0, 0, 10)])
    assert most_admitted(share_of(Rate(10, HOUR), 5), one) == Fraction(10 - 2)
