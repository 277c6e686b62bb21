"""State in one process: capped, forgetting only what nobody can notice, a bounded amount of work in every call."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from seawall.backends import KNOWN, LISTED, Charge, Key, Meter
from seawall.backends.memory import OVERFLOW_BUCKETS, MemoryBackend, MemoryMeter
from seawall.decision import NEVER
from seawall.rate import SECOND, Quota, Rate
from seawall.testing import ManualClock
from strategies import DAY, HOUR, ModelBackend, most_admitted

MILLISECOND = SECOND // 1000


class Bench:
    """A memory backend and its clock."""

    def __init__(self, max_keys: int = 100_000) -> None:
        self.clock = ManualClock()
        self.backend = MemoryBackend(max_keys=max_keys, clock=self.clock, wall_clock=self.clock.wall_ns)

    def meter(self, rate: Rate | Quota, name: str = "rate", store: str = "address") -> MemoryMeter:
        return self.backend.meter(name, store, rate)

    def admits(self, *charges: Charge) -> bool:
        return self.backend.spend(charges).admitted

    def exhaust(self, meter: MemoryMeter, key: Key) -> None:
        assert self.admits((meter, key, meter.rate.burst if isinstance(meter.rate, Rate) else meter.rate.limit))
        assert not self.admits((meter, key, 1))

    def tracked(self, *meters: MemoryMeter) -> int:
        return sum(len(shard) for meter in meters for shard in meter.shards)

    def stats(self, store: str = "address") -> dict[str, int]:
        return self.backend.statistics()[store]


def key(number: int) -> bytes:
    """An address."""
    return number.to_bytes(16)


# The cap


@pytest.mark.parametrize("rate", [Rate(1, HOUR), Quota(1, "day")], ids=repr)
def test_a_store_never_tracks_more_than_its_cap(rate: Rate | Quota) -> None:
    bench = Bench(max_keys=500)
    meter = bench.meter(rate)
    store = "address" if isinstance(rate, Rate) else "address-quota"
    for number in range(5_000):
        bench.admits((meter, key(number), 1))
        assert bench.tracked(meter) == bench.stats(store)["keys"] <= 500
    assert bench.stats(store) == {"keys": 500, "evicted": 0, "overflowed": 4_500}
    assert len(meter.overflow) <= OVERFLOW_BUCKETS


@pytest.mark.parametrize("rate", [Rate(3, HOUR), Quota(3, "day")], ids=repr)
def test_a_flood_of_keys_resets_nobody(rate: Rate | Quota) -> None:
    """throttled-py's LRU of 1,024 keys does: 1,100 junk keys and an exhausted limit is fresh again."""
    bench = Bench(max_keys=1_000)
    meter = bench.meter(rate)
    victims = [key(number) for number in range(200)]
    for victim in victims:
        bench.exhaust(meter, victim)
    for number in range(1_000, 11_000):
        bench.admits((meter, key(number), 1))
        if number % 100 == 0:
            assert not bench.admits((meter, victims[number // 100 % 200], 1))
    assert not any(bench.admits((meter, victim, 1)) for victim in victims)


def test_an_attacker_rotating_its_keys_gets_no_more_than_cap_and_overflow_hold() -> None:
    """D1: at the cap, ten times as many identities share a few buckets; they buy nothing."""
    bench = Bench(max_keys=300)
    meter = bench.meter(Rate(2, DAY))
    admitted = sum(bench.admits((meter, key(number % 3_000), 1)) for number in range(30_000))
    assert admitted == 2 * (300 + OVERFLOW_BUCKETS)


def test_what_is_full_again_makes_room() -> None:
    bench = Bench(max_keys=1_000)
    meter = bench.meter(Rate(10, SECOND))
    for number in range(1_000):
        assert bench.admits((meter, key(number), 5))
    bench.clock.advance(1)
    for number in range(1_000, 3_000):
        assert bench.admits((meter, key(number), 5))
        bench.clock.advance_ns(MILLISECOND)
    assert bench.stats()["overflowed"] == 0
    assert bench.stats()["evicted"] == 3_000 - bench.stats()["keys"]


def test_a_store_shrinks_while_new_keys_come() -> None:
    """Two are looked at for each that comes, so what a burst of callers left behind does not stay."""
    bench = Bench()
    meter = bench.meter(Rate(10, SECOND))
    for number in range(20_000):
        bench.admits((meter, key(number), 1))
    bench.clock.advance(HOUR // SECOND)
    for number in range(20_000, 40_000):
        bench.admits((meter, key(number), 1))
        bench.clock.advance(1)
    assert bench.tracked(meter) == bench.stats()["keys"] < 2_000


def test_quotas_of_yesterday_make_room() -> None:
    bench = Bench(max_keys=1_000)
    meter = bench.meter(Quota(5, "day"))
    for number in range(1_000):
        assert bench.admits((meter, key(number), 5))
    bench.clock.advance_ns(DAY)
    for number in range(1_000, 1_500):
        assert bench.admits((meter, key(number), 5))
    assert bench.stats("address-quota")["evicted"] > 500
    assert not any(bench.admits((meter, key(number), 1)) for number in range(1_000, 1_500))


@given(st.data(), st.integers(1, 4))
@settings(max_examples=30)
def test_forgetting_changes_no_decision(data: st.DataObject, amount: int) -> None:
    """G11: beside a twin that forgets nothing, with many strangers passing through, every answer is the same."""
    rate = Rate(amount, SECOND)
    bench, twin = Bench(max_keys=400), Bench(max_keys=1_000_000)
    meters = [each.meter(rate) for each in (bench, twin)]
    regulars = [key(number) for number in range(20)]
    stranger = 1_000
    for pause, whose, cost in data.draw(
        st.lists(
            st.tuples(st.integers(0, SECOND), st.sampled_from(regulars), st.integers(0, 5)), min_size=30, max_size=60
        )
    ):
        for each in (bench, twin):
            each.clock.advance_ns(pause)
        answers = [each.backend.spend([(m, whose, cost)]) for each, m in zip((bench, twin), meters, strict=True)]
        assert answers[0].waits == answers[1].waits
        assert answers[0].left == answers[1].left
        for _ in range(20):
            stranger += 1
            for each, m in zip((bench, twin), meters, strict=True):
                assert each.admits((m, key(stranger), 1))
                each.clock.advance_ns(10 * MILLISECOND)
    assert bench.stats()["overflowed"] == 0
    assert bench.stats()["keys"] <= 400 < twin.stats()["keys"] + twin.stats()["evicted"]


# Overflow


def full_bench(rate: Rate | Quota, max_keys: int = 300) -> tuple[Bench, MemoryMeter]:
    """A backend at its cap with nothing to forget."""
    bench = Bench(max_keys=max_keys)
    meter = bench.meter(rate)
    number = 1 << 64
    while bench.tracked(meter) < max_keys:
        bench.exhaust(meter, key(number))
        number += 1
    return bench, meter


def test_at_the_cap_new_keys_share_a_few_buckets() -> None:
    bench, meter = full_bench(Rate(3, HOUR))
    admitted = sum(bench.admits((meter, key(number), 1)) for number in range(10_000))
    assert admitted == 3 * OVERFLOW_BUCKETS
    assert bench.stats() == {"keys": 300, "evicted": 0, "overflowed": 10_000}


def test_a_key_in_overflow_is_never_granted_more_than_one_of_its_own() -> None:
    """Restrictive only: whatever it shares, and with whomever, it stays within its own limit."""
    bench, meter = full_bench(Rate(3, HOUR))
    admitted = [bench.admits((meter, key(7), 1)) for _ in range(10)]
    assert admitted == [True] * 3 + [False] * 7


def test_a_key_that_leaves_overflow_takes_along_what_it_spent_there() -> None:
    """Otherwise whoever comes and goes at the cap has two bursts: one shared, one of its own."""
    bench = Bench(max_keys=300)
    meter = bench.meter(Rate(2, HOUR))
    number = 1 << 64
    while bench.tracked(meter) < 300:
        assert bench.admits((meter, key(number), 1))
        number += 1
    bench.clock.advance_ns(HOUR // 2 - SECOND)
    assert [bench.admits((meter, key(7), 1)) for _ in range(3)] == [True, True, False]
    bench.clock.advance_ns(SECOND)  # now all others are full again
    for other in range(100, 200):
        bench.admits((meter, key(other), 1))
    assert bench.stats()["keys"] < 300
    assert not bench.admits((meter, key(7), 1))


def test_a_verdict_names_the_bucket_that_was_charged() -> None:
    bench, meter = full_bench(Rate(3, HOUR))
    listed = bench.meter(Rate(5, HOUR), "plan", LISTED)
    charges: list[Charge] = [(listed, "acme", 1), (meter, key(7), 1), (listed, "globex", 2)]
    verdict = bench.backend.spend(charges)
    assert verdict.admitted
    assert [(m, cost) for m, _, cost in verdict.charges] == [(m, cost) for m, _, cost in charges]
    assert [k for _, k, _ in verdict.charges][::2] == ["acme", "globex"]
    assert verdict.charges[1][1] in meter.overflow
    assert charges[1] == (meter, key(7), 1)  # what was passed in is not changed
    assert verdict.left == [4, 2, 3]


def test_a_refund_of_an_overflowed_charge_goes_where_it_was_taken() -> None:
    bench, meter = full_bench(Rate(3, HOUR))
    tracked = {k: state for shard in meter.shards for k, state in shard.items()}
    verdict = bench.backend.spend([(meter, key(7), 3)])
    assert not bench.admits((meter, key(7), 1))
    bench.backend.refund(verdict.charges, verdict.wall)
    assert bench.backend.spend([(meter, key(7), 0)]).left == [3]
    assert {k: state for shard in meter.shards for k, state in shard.items()} == tracked
    # A refund by the key itself finds no bucket of its own, and is nothing.
    bench.admits((meter, key(7), 3))
    bench.backend.refund([(meter, key(7), 3)], verdict.wall)
    assert bench.backend.spend([(meter, key(7), 0)]).left == [0]


def test_a_refusal_in_overflow_debits_nothing() -> None:
    bench, meter = full_bench(Rate(3, HOUR))
    other = bench.meter(Rate(1, HOUR), "other", LISTED)
    bench.exhaust(other, "acme")
    charges: list[Charge] = [(meter, key(7), 2), (other, "acme", 1)]
    assert bench.backend.spend(charges).waits == [0, HOUR]
    assert bench.backend.spend(charges[::-1]).waits == [HOUR, 0]
    assert bench.backend.spend([(meter, key(7), 0)]).left == [3]
    assert bench.backend.spend([(meter, key(7), 4)]).waits == [NEVER]
    assert bench.backend.spend([(meter, key(7), 3)]).left == [0]


def test_a_debit_in_overflow_stays_there() -> None:
    bench, meter = full_bench(Rate(3, HOUR))
    verdict = bench.backend.spend([(meter, key(7), 1)])
    assert bench.backend.debit(verdict.charges) == [1]
    assert bench.backend.debit([(meter, key(7), 1)]) == [1]
    assert not bench.admits((meter, key(7), 1))
    assert bench.stats()["keys"] == bench.tracked(meter) == 300


@pytest.mark.parametrize("rate", [Rate(3, HOUR), Quota(3, "day")], ids=repr)
def test_listed_tenants_never_share(rate: Rate | Quota) -> None:
    """The configuration bounds them; they are neither capped nor forgotten, however full everything else is."""
    bench, _ = full_bench(Rate(3, HOUR))
    listed = bench.meter(rate, "plan", LISTED)
    for number in range(2_000):
        bench.exhaust(listed, f"tenant-{number}")
    assert bench.stats(LISTED) == {"keys": 2_000, "evicted": 0, "overflowed": 0}
    assert not any(bench.admits((listed, f"tenant-{number}", 1)) for number in range(2_000))


def test_stores_are_capped_apart_and_rates_apart_from_quotas() -> None:
    bench = Bench(max_keys=300)
    meters = [
        bench.meter(rate, "limit", store) for store in ("address", "id") for rate in (Rate(1, DAY), Quota(1, "day"))
    ]
    for number in range(1_000):
        bench.admits((meters[0], key(number), 1))
    assert bench.stats("address")["overflowed"] == 700
    for meter in meters[1:]:
        assert bench.admits((meter, key(0), 1))
    assert {store: counts["overflowed"] for store, counts in bench.backend.statistics().items()} == {
        "address": 700,
        "address-quota": 0,
        "id": 0,
        "id-quota": 0,
    }


def test_meters_of_one_store_are_capped_together() -> None:
    bench = Bench(max_keys=300)
    meters = [bench.meter(Rate(1, DAY), name) for name in ("a", "b", "c")]
    for number in range(1_000):
        bench.admits(*[(meter, key(number), 1) for meter in meters])
    assert bench.tracked(*meters) == bench.stats()["keys"] == 300


def test_room_is_made_in_any_meter_of_the_store() -> None:
    """A store full of one meter's keys that are full again serves another meter's new ones."""
    bench = Bench(max_keys=600)
    old, new = bench.meter(Rate(1, SECOND), "old"), bench.meter(Rate(1, DAY), "new")
    for number in range(600):
        assert bench.admits((old, key(number), 1))
    bench.clock.advance(1)
    for number in range(600):
        bench.admits((new, key(number), 1))
        assert bench.tracked(old, new) == bench.stats()["keys"] <= 600
    assert bench.tracked(new) > 300


# The work in a call


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch, calls: list[int]) -> Iterator[None]:
    """Appends how often a key was looked at to be forgotten, for each spend."""
    reap, spend = MemoryMeter.reap, MemoryBackend.spend
    looks = 0

    def counting_reap(self: MemoryMeter, *args: Any) -> bool:
        nonlocal looks
        looks += 1
        return reap(self, *args)

    def counting_spend(self: MemoryBackend, charges: list[Charge]) -> Any:
        nonlocal looks
        looks = 0
        verdict = spend(self, charges)
        calls.append(looks)
        return verdict

    with monkeypatch.context() as patch:
        patch.setattr(MemoryMeter, "reap", counting_reap)
        patch.setattr(MemoryBackend, "spend", counting_spend)
        yield


@pytest.mark.parametrize("keys", [100, 1_000, 20_000])
def test_a_call_looks_at_a_bounded_number_of_keys(monkeypatch: pytest.MonkeyPatch, keys: int) -> None:
    """However many there are: none for a key that is known, two for a new one, ten for one that finds no room."""
    calls: list[int] = []
    bench = Bench(max_keys=keys)
    meter = bench.meter(Rate(1, DAY))
    with counted(monkeypatch, calls):
        for number in range(keys):
            bench.backend.spend([(meter, key(number), 1)])
        assert max(calls) <= 2
        calls.clear()
        for number in range(100):
            bench.backend.spend([(meter, key(number), 1)])
        assert set(calls) == {0}
        calls.clear()
        for number in range(100):
            bench.backend.spend([(meter, key(number + keys), 1)])
        assert max(calls) <= 10
        calls.clear()
        bench.clock.advance_ns(2 * DAY)
        for number in range(100):
            bench.backend.spend([(meter, key(number + 2 * keys), 1)])
        assert max(calls) <= 10


def test_no_dict_grows_so_large_that_it_is_felt() -> None:
    """One dict of 700,000 keys takes 22 to 146 ms in the one insert that makes it grow."""
    bench = Bench()
    meter = bench.meter(Rate(1, DAY))
    assert len(meter.shards) >= 256
    for number in range(100_000):
        bench.admits((meter, key(number), 1))
    assert max(len(shard) for shard in meter.shards) < 1_000
    large = MemoryBackend(max_keys=10_000_000).meter("rate", "address", Rate(1, DAY))
    assert 10_000_000 / len(large.shards) < 3_000
    assert len(large.shards) % 2 == 1  # a power of two would repeat the bits by which dicts index


def test_keys_that_differ_little_are_spread_evenly() -> None:
    bench = Bench()
    meter = bench.meter(Rate(1, DAY))
    for number in range(51_400):
        bench.admits((meter, number.to_bytes(4), 1))
    sizes = [len(shard) for shard in meter.shards]
    assert max(sizes) < 2 * 51_400 / len(sizes)


def test_nothing_is_left_for_the_garbage_collector() -> None:
    bench = Bench()
    meters = [bench.meter(Rate(1, DAY)), bench.meter(Quota(5, "day"))]
    for number in range(10_000):
        bench.admits(*[(meter, key(number), 1) for meter in meters])
    states = [state for meter in meters for shard in meter.shards for state in shard.values()]
    assert {type(state) for state in states} == {int}
    assert not any(gc.is_tracked(state) for state in states)


async def test_no_timer_thread_or_task_is_started() -> None:
    threads, tasks = threading.active_count(), len(asyncio.all_tasks())
    bench = Bench(max_keys=100)
    meter = bench.meter(Rate(1, SECOND))
    for number in range(1_000):
        bench.admits((meter, key(number), 1))
    bench.backend.refund([(meter, key(0), 1)], 0)
    assert (threading.active_count(), len(asyncio.all_tasks())) == (threads, tasks)


def test_every_key_of_a_full_store_is_looked_at_in_its_turn() -> None:
    """Whatever limit and shard it is in: once all are full again, as many are forgotten as there were."""
    bench = Bench(max_keys=300)
    meters = [bench.meter(Rate(1, HOUR), f"limit-{n}") for n in range(3)]
    for n in range(300):
        bench.backend.spend([(meters[n % 3], key(n), 1)])
    counts = meters[0].counts
    assert [meter.held for meter in meters] == [100] * 3
    assert not counts.forget_one(bench.clock(), bench.clock.wall_ns())
    bench.clock.advance_ns(HOUR)
    assert [counts.forget_one(bench.clock(), bench.clock.wall_ns()) for _ in range(297)] == [True] * 297
    assert bench.stats()["keys"] == 3


# A limit that changes


@pytest.mark.parametrize("others", range(5))
def test_usage_outlives_every_change_of_a_limit_also_of_who_came_alone(others: int) -> None:
    """However many keys the store had looked at before: a meter that has one is kept by the store."""
    bench = Bench()
    in_force = bench.meter(Rate(10, HOUR))
    bench.exhaust(in_force, b"me")
    for n in range(others):
        bench.admits((in_force, key(n), 1))
    for amount in (20, 30):
        in_force = bench.meter(Rate(amount, HOUR))  # the one before is its store's alone
        assert not bench.admits((in_force, b"me", 1))
    assert bench.stats()["keys"] == 1 + others


@pytest.mark.parametrize("store", [LISTED, KNOWN])
def test_tenants_with_limits_of_their_own_are_not_looked_through(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever comes anew may have had another limit before, which is not searched for among those of all others."""
    bench = Bench()
    own = [bench.meter(Rate(10 + n, DAY), store=store) for n in range(500)]
    for n, meter in enumerate(own):
        bench.exhaust(meter, f"tenant {n}")
    asked: list[MemoryMeter] = []
    take = MemoryMeter._take
    monkeypatch.setattr(
        MemoryMeter, "_take", lambda self, other, *now: (asked.append(other), take(self, other, *now))[1]
    )
    assert bench.admits((bench.meter(Rate(7, DAY), store="id"), "somebody else", 1))
    assert bench.admits((own[0], "one more", 1))
    assert [each.store for each in asked] in ([], ["id"])
    assert not bench.admits((bench.meter(Rate(1000, DAY), store=store), "tenant 7", 1))
    assert asked[-1] is own[7]
    assert sum(meter.size for meter in own) <= 500 * 17


def test_tenants_that_are_looked_up_share_no_bucket_with_strangers() -> None:
    bench = Bench(max_keys=300)
    strangers, known = bench.meter(Rate(10, DAY), store="id"), bench.meter(Rate(20, DAY), store=KNOWN)
    for n in range(400):
        bench.admits((strangers, f"stranger {n}", 10))
    assert bench.backend.spend([(known, "globex", 1)]).left == [19]
    assert bench.stats("id")["overflowed"] > 0
    assert bench.stats(KNOWN) == {"keys": 1, "evicted": 0, "overflowed": 0}


@pytest.mark.parametrize("limit", [Rate(10, DAY), Quota(10, "day")], ids=repr)
def test_a_tenant_that_is_no_longer_listed_keeps_its_usage_though_the_store_is_full(limit: Rate | Quota) -> None:
    bench = Bench(max_keys=300)
    listed, others = bench.meter(limit, store=LISTED), bench.meter(limit, store="id")
    bench.exhaust(listed, "acme")
    for n in range(400):
        bench.admits((others, f"stranger {n}", 1))
    assert not bench.admits((others, "acme", 1))
    assert not bench.admits((listed, "acme", 1))


@pytest.mark.parametrize(("before", "after"), [(Rate(10, DAY), Rate(20, DAY)), (Quota(10, "day"), Quota(20, "day"))])
def test_what_is_given_back_after_a_change_goes_where_the_usage_went(before: Rate | Quota, after: Rate | Quota) -> None:
    """The half of a bucket is half of another, one of a count is one of it; what nobody has used is not given back."""
    bench = Bench()
    old, new = bench.meter(before, store=LISTED), bench.meter(after, store=LISTED)
    spent = bench.backend.spend([(old, "acme", 5)])
    left = bench.backend.spend([(new, "acme", 0)]).left
    assert left == ([10] if isinstance(after, Rate) else [15])
    bench.backend.refund(spent.charges, spent.wall)
    assert bench.backend.spend([(new, "acme", 0)]).left == [20]
    bench.backend.refund([(old, "somebody else", 5)], spent.wall)
    assert bench.stats(LISTED)["keys"] == 1


# Odds and ends


def test_what_is_cleared_is_as_new() -> None:
    bench, meter = full_bench(Rate(3, HOUR))
    bench.admits((meter, key(7), 3))
    bench.backend.clear()
    assert bench.stats()["keys"] == bench.tracked(meter) == 0
    assert bench.backend.spend([(meter, key(7), 3)]).admitted
    assert bench.stats()["keys"] == bench.tracked(meter) == 1


def test_a_cap_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="max_keys must be at least 1"):
        MemoryBackend(max_keys=0)


def test_an_operator_sees_how_full_it_is() -> None:
    bench = Bench(max_keys=300)
    bench.admits((bench.meter(Rate(1, DAY)), key(1), 1), (bench.meter(Quota(1, "day")), key(1), 1))
    assert repr(bench.backend) == "<MemoryBackend 2 keys in 2 stores, at most 300 each>"
    assert repr(bench.meter(Rate(1, DAY))).startswith("<MemoryMeter rate in address: Rate(")
    assert repr(Meter("m", "s", Quota(1, "day"))).startswith("<Meter m in s: Quota(")


def test_it_reads_real_clocks_by_default() -> None:
    backend = MemoryBackend()
    verdict = backend.spend([(backend.meter("rate", "address", Rate(1, DAY)), b"", 1)])
    assert verdict.admitted
    assert verdict.now > 0
    assert verdict.wall > 1_700_000_000 * SECOND


# Any sequence of calls


class MemoryMachine(RuleBasedStateMachine):
    """Random calls on a store that is soon full, beside a model that forgets nothing.

    What the backend admits, each key's own bucket would have admitted as well: forgetting and sharing are restrictive
    only. While nothing has been shared, the two agree in every answer.
    """

    keys = st.integers(0, 40).map(key)

    @initialize(rate=st.sampled_from([Rate(2, SECOND), Rate(1, HOUR, 3), Quota(3, "day")]), cap=st.integers(1, 12))
    def start(self, rate: Rate | Quota, cap: int) -> None:
        self.bench, self.model, self.cap, self.rate = Bench(max_keys=cap), ModelBackend(), cap, rate
        self.own = Quota(rate.limit, rate.span) if isinstance(rate, Quota) else rate
        self.capped, self.listed = self.bench.meter(rate), self.bench.meter(rate, "plan", LISTED)
        self.store = "address-quota" if isinstance(rate, Quota) else "address"
        self.last: tuple[list[Charge], int] | None = None
        self.before = {"keys": 0, "evicted": 0, "overflowed": 0}

    def spend(self, meter: MemoryMeter, whose: Key, cost: int, shares: Callable[[], bool]) -> None:
        now, wall = self.bench.clock(), self.bench.clock.wall_ns()
        verdict = self.bench.backend.spend([(meter, whose, cost)])
        self.last = (list(verdict.charges), verdict.wall) if verdict.admitted else None
        if verdict.admitted or not shares():
            waits = self.model.spend([(meter.store, self.own, whose, cost)], now, wall)
            assert not any(waits) if verdict.admitted else verdict.waits == waits
            if not shares():
                assert verdict.left == [self.model.left(meter.store, self.own, whose, now, wall)]

    @rule(whose=keys, cost=st.integers(0, 4))
    def stranger(self, whose: bytes, cost: int) -> None:
        self.spend(self.capped, whose, cost, lambda: self.bench.stats(self.store)["overflowed"] > 0)

    @rule(whose=st.sampled_from(("acme", "globex")), cost=st.integers(0, 4))
    def tenant(self, whose: str, cost: int) -> None:
        self.spend(self.listed, whose, cost, lambda: False)

    @rule(pause=st.one_of(st.integers(0, SECOND), st.integers(0, HOUR), st.just(DAY)))
    def wait(self, pause: int) -> None:
        self.bench.clock.advance_ns(pause)

    @precondition(lambda self: self.last is not None)
    @rule()
    def give_back(self) -> None:
        assert self.last is not None
        (charges, spent_at), self.last = self.last, None
        now, wall = self.bench.clock(), self.bench.clock.wall_ns()
        self.bench.backend.refund(charges, spent_at)
        meter, whose, cost = charges[0]
        if whose not in self.capped.overflow:
            self.model.refund([(meter.store, self.own, whose, cost)], now, wall, spent_at)

    @invariant()
    def counts_are_right(self) -> None:
        stats = self.bench.stats(self.store)
        assert stats["keys"] == self.bench.tracked(self.capped) <= self.cap
        assert self.bench.stats(LISTED)["keys"] <= 2
        assert all(stats[name] >= self.before[name] for name in ("evicted", "overflowed"))
        self.before = stats


MemoryMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
test_any_sequence_of_calls = MemoryMachine.TestCase


@given(st.lists(st.tuples(st.integers(0, HOUR), st.integers(0, 30), st.integers(1, 3)), max_size=60))
def test_each_key_stays_within_its_own_limit_whatever_is_forgotten_or_shared(steps: list[tuple[int, int, int]]) -> None:
    """G1 for every identity, with a cap so small that each is tracked, forgotten and pushed into overflow in turn."""
    rate, bench = Rate(2, HOUR), Bench(max_keys=3)
    meter = bench.meter(rate)
    admitted: dict[int, list[tuple[int, int]]] = {}
    for pause, whose, cost in steps:
        bench.clock.advance_ns(pause)
        if bench.admits((meter, key(whose), cost)):
            admitted.setdefault(whose, []).append((bench.clock(), cost))
    assert all(most_admitted(rate, events) <= 0 for events in admitted.values())
