"""The storages of the limits library as a backend: what is counted there, what is not promised, and when it is away."""

from __future__ import annotations

import asyncio
import gc
import importlib.util
import logging
import os
import shutil
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from typing import Any, ClassVar
from weakref import ref

import limits
import pytest
from hypothesis import given
from hypothesis import strategies as st
from limits.aio.storage import Storage

from seawall.backends import DENIED_FOR, Charge, Failure, OperatedBackend, SharedBackend, Verdict
from seawall.backends.share import LocalMeter
from seawall.blocks import Block
from seawall.decision import NEVER
from seawall.rate import SECOND, Quota, Rate
from seawall.testing import ManualClock
from stores import Server, free_port
from strategies import DAY, HOUR, MINUTE, rates, schedules

if int(limits.__version__.partition(".")[0]) < 5:
    pytest.skip(f"the limits backend needs limits 5, and this is {limits.__version__}", allow_module_level=True)

from seawall.backends import limits as module
from seawall.backends.limits import LimitsBackend, LimitsMeter


class Shelf(Storage):
    """A storage that keeps its counters for all loops, counts downwards by negative increments, and can be broken."""

    STORAGE_SCHEME: ClassVar[list[str]] = ["async+shelf"]
    counts: ClassVar[dict[str, int]] = {}
    calls: ClassVar[list[str]] = []
    fault: ClassVar[Callable[[], Awaitable[None]] | None] = None
    made: ClassVar[int] = 0

    def __init__(self, uri: str, **options: Any) -> None:
        super().__init__(uri, **options)
        Shelf.made += 1

    @classmethod
    def clean(cls) -> None:
        cls.counts, cls.calls, cls.fault, cls.made = {}, [], None, 0

    @property
    def base_exceptions(self) -> type[Exception]:
        return ConnectionError

    async def _step(self, name: str) -> None:
        type(self).calls.append(name)
        await asyncio.sleep(0)
        if Shelf.fault is not None:
            await Shelf.fault()

    async def get(self, key: str) -> int:
        await self._step("get")
        return self.counts.get(key, 0)

    async def incr(self, key: str, expiry: int, amount: int = 1) -> int:
        await self._step("incr")
        assert expiry >= 1
        self.counts[key] = self.counts.get(key, 0) + amount
        return self.counts[key]

    async def get_expiry(self, key: str) -> float:
        raise NotImplementedError

    async def check(self) -> bool:
        raise NotImplementedError

    async def reset(self) -> int | None:
        raise NotImplementedError

    async def clear(self, key: str) -> None:
        await self._step("clear")
        self.counts.pop(key, None)


class Seen:
    """An observer that remembers."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.actions: list[Failure] = []

    def called(self, result: str, took: int) -> None:
        assert took >= 0
        self.calls.append(result)

    def fell_back(self, action: Failure) -> None:
        self.actions.append(action)


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    Shelf.clean()
    yield
    Shelf.clean()


class Bench:
    """A backend on a storage of this process, and its clock."""

    def __init__(self, url: str = "async+shelf://", **options: Any) -> None:
        self.clock: ManualClock = options.pop("clock", None) or ManualClock("2026-03-04T12:00:00Z")
        options = {"timeout_ns": SECOND, **options}
        self.backend = LimitsBackend(
            url, clock=self.clock, wall_clock=self.clock.wall_ns, random=lambda: 0.5, **options
        )
        self.seen = self.backend.observer = Seen()

    def meter(self, rate: Rate | Quota, name: str = "rate", store: str = "address") -> LimitsMeter:
        return self.backend.meter(name, store, rate)

    async def spend(self, *charges: Charge) -> Verdict:
        verdict = await answer(self.backend, charges)
        assert verdict is not None
        return verdict

    async def admits(self, meter: LimitsMeter, cost: int = 1, key: str | bytes = b"a") -> bool:
        return (await self.spend((meter, key, cost))).admitted

    async def break_down(self, meter: LimitsMeter) -> None:
        """Let the storage fail, and the backend notice."""
        Shelf.fault = refused
        await self.spend((meter, b"whoever", 0))
        assert not self.backend.up

    async def settled(self) -> None:
        """Until nothing is under way beside the requests."""
        while self.backend._pending:
            await asyncio.wait(self.backend._pending)


async def answer(backend: LimitsBackend, charges: Sequence[Charge], failure: Failure | None = None) -> Verdict | None:
    said = backend.spend(charges, failure)
    return said if said is None or isinstance(said, Verdict) else await said


async def refused() -> None:
    raise ConnectionRefusedError


async def hang() -> None:
    await asyncio.Event().wait()


async def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - what is waited for is in another process
            await asyncio.sleep(0.01)


def local(verdict: Verdict | None) -> bool:
    """Whether it was this process's share that decided."""
    assert verdict is not None
    return all(isinstance(meter, LocalMeter) for meter, _, _ in verdict.charges)


def test_it_is_a_shared_backend() -> None:
    assert isinstance(Bench().backend, SharedBackend)
    assert repr(Bench().backend) == "<LimitsBackend on shelf, <Breaker closed>>"


# Counting


@pytest.mark.parametrize("url", ["async+shelf://", "async+memory://", "memory://"])
async def test_a_limit_holds(url: str) -> None:
    bench = Bench(url)
    meter = bench.meter(Rate(3, HOUR))
    assert [(await bench.spend((meter, b"a", 1))).left for _ in range(4)] == [[2], [1], [0], [0]]
    assert not await bench.admits(meter)
    assert await bench.admits(meter, key=b"b")
    assert await bench.admits(meter, key="a"), "text is never the bytes of an address"


async def test_callers_at_the_same_time_get_no_more_than_the_limit() -> None:
    bench = Bench(deny_cache=False)
    meter = bench.meter(Rate(5, HOUR))
    verdicts = await asyncio.gather(*(bench.spend((meter, b"a", 1)) for _ in range(50)))
    assert sum(verdict.admitted for verdict in verdicts) == 5
    assert [*Shelf.counts.values()] == [5], "what was refused was given back"


@pytest.mark.parametrize("rate", [Rate(5, HOUR), Quota(5, "day")], ids=["bucket", "quota"])
async def test_a_cost_beyond_the_limit_never_fits(rate: Rate | Quota) -> None:
    bench = Bench()
    verdict = await bench.spend((bench.meter(rate), b"a", 6))
    assert (verdict.waits, verdict.left) == ([NEVER], [5])


async def test_a_peek_writes_nothing() -> None:
    bench = Bench()
    meter = bench.meter(Rate(1, HOUR))
    assert await bench.admits(meter)
    calls = len(Shelf.calls)
    verdict = await bench.spend((meter, b"a", 0))
    assert (verdict.admitted, verdict.left) == (True, [0])
    assert Shelf.calls[calls:] == ["get", "get"]


async def test_a_quota_is_counted_in_its_calendar_window() -> None:
    bench = Bench()
    meter = bench.meter(Quota(2, "day", "Europe/Berlin"))  # whose next day begins at 23:00 UTC
    assert await bench.admits(meter, 2)
    verdict = await bench.spend((meter, b"a", 1))
    assert verdict.waits == [11 * HOUR]
    assert meter.rate.remaining(verdict.states[0], verdict.wall) == verdict.left[0] == 0
    bench.clock.advance_ns(11 * HOUR - 1)
    assert not await bench.admits(meter)
    bench.clock.advance_ns(1)
    assert await bench.admits(meter, 2)


async def test_a_window_shorter_than_a_second_is_counted_in_whole_seconds() -> None:
    """A tenth of a second is less than clocks differ between hosts."""
    bench = Bench()
    meter = bench.meter(Rate(100, SECOND, 10))
    verdicts = [await bench.spend((meter, b"a", 10)) for _ in range(11)]
    assert [verdict.admitted for verdict in verdicts] == [True] * 10 + [False]
    assert [verdict.left[0] for verdict in verdicts[:3]] == [10, 10, 10], "no more than the burst at once"
    assert (await bench.spend((meter, b"a", 11))).waits == [NEVER]


# What the counter promises


@given(rates(), st.data())
def test_the_wait_is_exact_and_the_state_says_what_is_left(rate: Rate, data: st.DataObject) -> None:
    """The meter alone, on counts as there may be."""
    meter = Bench().meter(rate)
    before, count = data.draw(st.integers(0, meter.limit)), data.draw(st.integers(0, meter.limit))
    cost = data.draw(st.integers(1, rate.burst))
    start = data.draw(st.integers(0, 10)) * meter.span
    wall = start + data.draw(st.integers(0, meter.span - 1))

    def fits(at: int) -> bool:
        if at < start + meter.span:
            return meter.used(before, count, at, start + meter.span) + cost <= meter.limit
        if at < start + 2 * meter.span:
            return meter.used(count, 0, at, start + 2 * meter.span) + cost <= meter.limit
        return True

    wait = meter.wait(before, count, cost, wall, start + meter.span)
    assert fits(wall + wait)
    assert wait == 0 or not fits(wall + wait - 1)
    now = data.draw(st.integers(0, DAY))
    left = meter.left(before, count, wall, start + meter.span)
    state = meter.state(left, before, count, now, wall, start + meter.span)
    assert rate.remaining(state, now) == left
    if not left:
        assert rate.wait(state, now) == meter.wait(before, count, 1, wall, start + meter.span)


@given(
    st.builds(Rate, st.integers(1, 12), st.sampled_from((SECOND, 3 * SECOND, MINUTE)), st.integers(0, 15)), st.data()
)
def test_no_window_sees_twice_its_count_and_the_meter_counts_as_the_storage(rate: Rate, data: st.DataObject) -> None:
    Shelf.clean()
    bench = Bench(deny_cache=False)
    meter = bench.meter(rate)
    admitted: list[tuple[int, int]] = []
    plan = data.draw(schedules(rate))

    async def play() -> None:
        for wait, cost in plan:
            bench.clock.advance_ns(wait)
            verdict = await bench.spend((meter, b"a", cost))
            assert rate.remaining(verdict.states[0], verdict.now) == verdict.left[0]
            if verdict.admitted:
                admitted.append((bench.clock(), cost))
            elif cost <= rate.burst:
                assert verdict.waits is not None
                bench.clock.advance_ns(verdict.waits[0] - 1)
                assert not await bench.admits(meter, cost)
                bench.clock.advance_ns(1)
                assert await bench.admits(meter, cost)
                admitted.append((bench.clock(), cost))

    asyncio.run(play())
    for at, _ in admitted:
        seen = sum(cost for when, cost in admitted if at <= when < at + meter.span)
        assert seen < 2 * meter.limit or seen == 0


# All or none


async def test_where_one_limit_refuses_nothing_is_written() -> None:
    bench = Bench()
    rate, quota = bench.meter(Rate(10, HOUR)), bench.meter(Quota(1, "day"), "quota")
    first = await bench.spend((rate, b"a", 1), (quota, b"a", 1))
    assert (first.left, first.waits) == ([9, 0], None)
    written = dict(Shelf.counts)
    second = await bench.spend((rate, b"a", 1), (quota, b"a", 1))
    assert (second.left, second.waits) == ([9, 0], [0, 12 * HOUR])
    assert Shelf.counts == written


@pytest.mark.parametrize("url", ["async+shelf://", "async+memory://"], ids=["by increments", "by decrements"])
async def test_who_was_too_slow_gives_all_of_it_back(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between reading and counting, another process takes the last unit of the second limit."""
    bench = Bench(url)
    rate, quota = bench.meter(Rate(10, HOUR)), bench.meter(Quota(5, "day"), "quota")
    await bench.spend((quota, b"a", 4))
    real = LimitsBackend._add
    stolen: list[int] = []

    async def add(self: LimitsBackend, storage: Storage, meter: LimitsMeter, window: Any, amount: int) -> int:
        if meter is quota and not stolen:
            stolen.append(await real(self, storage, meter, window, 1))
        return await real(self, storage, meter, window, amount)

    monkeypatch.setattr(LimitsBackend, "_add", add)
    verdict = await bench.spend((rate, b"a", 3), (quota, b"a", 1))
    assert stolen == [5]
    assert (verdict.waits, verdict.left) == ([0, 12 * HOUR], [10, 0])
    assert (await bench.spend((rate, b"a", 0), (quota, b"a", 0))).left == [10, 0]


async def test_one_bucket_named_twice_is_charged_twice() -> None:
    bench = Bench()
    meter = bench.meter(Rate(3, HOUR))
    assert (await bench.spend((meter, b"a", 1), (meter, b"a", 1))).admitted
    assert not (await bench.spend((meter, b"a", 1), (meter, b"a", 1))).admitted
    assert await bench.admits(meter)


# Keys


async def test_keys_say_nothing_of_callers_and_limits() -> None:
    bench = Bench(key_prefix="app")
    await bench.spend((bench.meter(Rate(1234, HOUR), "secret-limit", "secret-store"), "secret-tenant", 1))
    [key] = Shelf.counts
    prefix, _, digest = key.partition(":")
    assert prefix == "app"
    assert len(digest) == 32
    assert set(digest) <= set("0123456789abcdef")


async def test_a_changed_limit_keeps_what_was_used() -> None:
    bench = Bench()
    assert (await bench.spend((bench.meter(Rate(10, HOUR)), b"a", 4))).left == [6]
    assert (await bench.spend((bench.meter(Rate(20, HOUR)), b"a", 0))).left == [16]


@pytest.mark.parametrize("rate", [Rate(10, HOUR), Quota(10, "day")], ids=["bucket", "quota"])
async def test_a_meter_is_forgotten_with_the_last_who_has_it(rate: Rate | Quota) -> None:
    bench = Bench()
    meter = bench.meter(rate)
    known = ref(meter)
    verdict = await bench.spend((meter, b"a", 1))
    del meter
    assert bench.meter(rate) is known() is verdict.charges[0][0]
    del verdict
    gc.collect()
    assert known() is None
    assert (await bench.spend((bench.meter(rate), b"a", 0))).left == [9]


def window_key(bench: Bench, name: str, store: str, key: str | bytes) -> str:
    return bench.meter(Rate(10, HOUR), name, store).window(key, bench.clock.wall_ns()).current


names = st.text(st.characters(min_codepoint=32), max_size=4)


@given(*[st.tuples(names, names, st.one_of(st.text(max_size=4), st.binary(max_size=4)))] * 2)
def test_two_callers_never_share_a_key(one: tuple[str, str, Any], other: tuple[str, str, Any]) -> None:
    bench = Bench()
    assert (window_key(bench, *one) == window_key(bench, *other)) == (one == other)


def test_another_secret_makes_other_keys() -> None:
    keys = {
        window_key(Bench(key_prefix=prefix, secret=secret), "rate", "address", b"a").partition(":")[2]
        for prefix in ("one", "two")
        for secret in (None, "one", "two")
    }
    assert len(keys) == 4, "a secret makes the hash, and the prefix does without one"


def test_a_prefix_that_a_storage_would_not_take_is_refused() -> None:
    for prefix in ("two words", "line\r\nfeed", "ü", "x" * 65):
        with pytest.raises(ValueError, match="key_prefix"):
            Bench(key_prefix=prefix)


# The deny cache


async def test_a_known_refusal_costs_no_call() -> None:
    bench = Bench()
    meter = bench.meter(Rate(1, HOUR))
    await bench.admits(meter)
    first = await bench.spend((meter, b"a", 1))
    calls = len(Shelf.calls)
    bench.clock.advance(0.25)
    again = bench.backend.spend([(meter, b"a", 1)])
    assert isinstance(again, Verdict), "and no waiting"
    assert first.waits is not None
    assert again.waits == [first.waits[0] - SECOND // 4]
    assert len(Shelf.calls) == calls
    assert await bench.admits(meter, key=b"b")
    assert (await bench.spend((meter, b"a", 0))).admitted, "it is about this cost alone"


async def test_a_refusal_is_remembered_for_a_second_at_most() -> None:
    bench = Bench()
    meter = bench.meter(Rate(1, HOUR))
    await bench.admits(meter)
    verdict = await bench.spend((meter, b"a", 1))
    bench.backend.refund(verdict.charges, bench.clock.wall_ns())
    await bench.settled()
    bench.clock.advance(0.999)
    assert not await bench.admits(meter)
    bench.clock.advance(0.001)
    assert await bench.admits(meter)


async def test_a_refusal_is_not_remembered_beyond_its_wait() -> None:
    bench = Bench()
    meter = bench.meter(Rate(10, SECOND))
    bench.clock.advance(0.5)
    await bench.admits(meter, 10)
    verdict = await bench.spend((meter, b"a", 1))
    assert verdict.waits is not None
    assert verdict.waits[0] < DENIED_FOR
    bench.clock.advance_ns(verdict.waits[0])
    assert await bench.admits(meter)


async def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_DENIED", 3)
    bench = Bench()
    meter = bench.meter(Rate(1, HOUR))
    for number in range(10):
        key = b"%d" % number
        await bench.admits(meter, key=key)
        await bench.admits(meter, key=key)
    assert bench.backend._denied is not None
    assert len(bench.backend._denied) == 3


async def test_without_a_deny_cache_every_refusal_is_asked_for() -> None:
    bench = Bench(deny_cache=False)
    meter = bench.meter(Rate(1, HOUR))
    for _ in range(3):
        await bench.admits(meter)
    calls = len(Shelf.calls)
    await bench.admits(meter)
    assert Shelf.calls[calls:] == ["get", "get"], "one round trip: nothing is written"


# The storage is away


@pytest.mark.parametrize(
    ("fault", "result", "reason"),
    [(refused, "connection", "connection: ConnectionRefusedError"), (hang, "timeout", "timeout")],
    ids=["refused", "frozen"],
)
async def test_a_storage_that_fails_is_asked_once(
    fault: Callable[[], Awaitable[None]], result: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    bench = Bench(instances=2, timeout_ns=20_000_000)
    meter = bench.meter(Rate(4, HOUR))
    Shelf.fault = fault
    assert local(await answer(bench.backend, [(meter, b"a", 1)]))
    assert not bench.backend.up
    calls = len(Shelf.calls)
    verdicts = [bench.backend.spend([(meter, b"a", 1)]) for _ in range(2)]
    assert [verdict.admitted for verdict in verdicts if isinstance(verdict, Verdict)] == [True, False], "half of 4"
    assert len(Shelf.calls) == calls
    assert bench.seen.calls == [result]
    assert bench.seen.actions == ["local"] * 3
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings == [f"the storage of the limits backend is away ({reason}): local decides"]


@pytest.mark.parametrize("action", ["allow", "deny"])
async def test_where_a_rule_allows_or_denies_nobody_knows_a_verdict(action: Failure) -> None:
    bench = Bench()
    meter = bench.meter(Rate(4, HOUR))
    Shelf.fault = refused
    assert await answer(bench.backend, [(meter, b"a", 1)], action) is None
    assert bench.backend.spend([(meter, b"a", 1)], action) is None
    assert bench.seen.actions == [action, action]
    assert bench.backend.statistics() == {}, "nothing was counted here either"


async def test_the_rule_comes_before_the_backend() -> None:
    bench = Bench(on_failure="deny")
    meter = bench.meter(Rate(4, HOUR))
    Shelf.fault = refused
    assert await answer(bench.backend, [(meter, b"a", 1)]) is None
    assert local(await answer(bench.backend, [(meter, b"a", 1)], "local"))
    assert bench.seen.actions == ["deny", "local"]


async def test_an_error_of_any_kind_is_no_error_of_the_request() -> None:
    bench = Bench()
    meter = bench.meter(Rate(4, HOUR))

    async def surprise() -> None:
        raise ZeroDivisionError

    Shelf.fault = surprise
    assert local(await bench.spend((meter, b"a", 1)))
    assert bench.seen.calls == ["error"]


async def test_a_client_that_cancels_itself_is_an_error_and_no_cancellation() -> None:
    bench = Bench()
    meter = bench.meter(Rate(4, HOUR))

    async def give_up() -> None:
        raise asyncio.CancelledError

    Shelf.fault = give_up
    assert local(await bench.spend((meter, b"a", 1)))
    assert bench.seen.calls == ["error"]


async def test_a_client_that_cannot_be_made_any_more_is_no_error_of_the_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = Bench()
    meter = bench.meter(Rate(4, HOUR))
    monkeypatch.setattr(Shelf, "__init__", lambda self, uri, **options: 1 / 0)
    assert local(await bench.spend((meter, b"a", 1)))
    assert bench.seen.calls == ["error"]


async def test_a_request_waits_no_longer_than_the_time_out() -> None:
    bench = Bench(timeout_ns=20_000_000)
    meter = bench.meter(Rate(4, HOUR))
    Shelf.fault = hang
    began = time.monotonic()
    await bench.spend((meter, b"a", 1))
    assert time.monotonic() - began < 1


async def test_many_small_delays_are_one_deadline() -> None:
    bench = Bench(timeout_ns=100_000_000)
    meter = bench.meter(Rate(4, HOUR))

    async def slow() -> None:
        await asyncio.sleep(0.09)

    Shelf.fault = slow
    taken = bench.backend.debit([(meter, b"%d" % number, 1) for number in range(20)])
    await bench.settled()
    assert bench.seen.calls == ["timeout"], "each step is in time, all of them are not"
    assert 0 < sum(taken) < 20


async def test_a_stalled_event_loop_does_not_blame_the_storage() -> None:
    bench = Bench(timeout_ns=200_000_000)
    meter = bench.meter(Rate(4, HOUR))

    async def soon() -> None:
        await asyncio.sleep(0.001)

    Shelf.fault = soon
    spending = asyncio.ensure_future(bench.spend((meter, b"a", 1)))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    time.sleep(0.5)  # noqa: ASYNC251 - that is what it is about
    assert not local(await spending)
    assert bench.backend.up


async def test_a_storage_that_is_away_while_the_loop_stalls_all_the_time_is_noticed() -> None:
    bench = Bench(timeout_ns=20_000_000)
    meter = bench.meter(Rate(4, HOUR))
    Shelf.fault = hang
    ended = False

    async def stall() -> None:
        while not ended:
            time.sleep(0.03)  # noqa: ASYNC251 - that is what it is about
            await asyncio.sleep(0)

    stalling = asyncio.ensure_future(stall())
    async with asyncio.timeout(5):
        assert local(await bench.spend((meter, b"a", 1)))
    ended = True
    await stalling


async def test_a_cancelled_request_is_cancelled_and_leaves_nothing_running() -> None:
    bench = Bench()
    meter = bench.meter(Rate(4, HOUR))
    Shelf.fault = hang
    spending = asyncio.ensure_future(bench.spend((meter, b"a", 1)))
    await asyncio.sleep(0.001)
    spending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await spending
    await asyncio.sleep(0)
    assert bench.backend.up, "a caller that leaves says nothing of the storage"
    await until(lambda: asyncio.all_tasks() == {asyncio.current_task()})


async def test_a_probe_closes_the_breaker_without_a_request() -> None:
    bench = Bench(timeout_ns=200_000_000)
    meter = bench.meter(Rate(4, HOUR))
    await bench.break_down(meter)
    Shelf.fault = None
    bench.clock.advance(0.25)
    await until(lambda: bench.backend.up)
    assert not local(await bench.spend((meter, b"a", 1)))


async def test_a_probe_of_a_storage_that_is_too_slow_closes_nothing() -> None:
    bench = Bench(timeout_ns=20_000_000)
    meter = bench.meter(Rate(4, HOUR))
    await bench.break_down(meter)

    async def slow() -> None:
        await asyncio.sleep(0.05)

    Shelf.fault = slow
    bench.clock.advance(0.25)
    bench.backend.spend([(meter, b"a", 1)])
    await bench.settled()
    assert len(bench.seen.calls) == 2
    assert bench.seen.calls[1] == "timeout"
    assert not bench.backend.up


async def test_a_broken_connection_is_given_up_and_a_slow_one_kept() -> None:
    bench = Bench(timeout_ns=20_000_000)
    meter = bench.meter(Rate(4, HOUR))
    Shelf.made = 0
    for fault, made in ((hang, 1), (refused, 1), (hang, 2)):
        Shelf.fault = fault
        bench.clock.advance(0.25)
        await answer(bench.backend, [(meter, b"a", 1)])
        await bench.settled()
        assert Shelf.made == made, fault


async def test_a_connection_on_which_nothing_comes_is_given_up_after_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_STUCK", 0.0)
    bench = Bench(timeout_ns=20_000_000)
    meter = bench.meter(Rate(4, HOUR))
    Shelf.made = 0
    Shelf.fault = hang
    for made in (1, 2):
        bench.clock.advance(0.25)
        await answer(bench.backend, [(meter, b"a", 1)])
        await bench.settled()
        assert Shelf.made == made


async def test_requests_send_one_probe_at_a_time() -> None:
    bench = Bench()
    meter = bench.meter(Rate(4, HOUR))
    await bench.break_down(meter)
    Shelf.fault = hang
    Shelf.calls.clear()
    bench.clock.advance(0.25)
    for _ in range(20):
        assert isinstance(bench.backend.spend([(meter, b"a", 1)]), Verdict)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert Shelf.calls == ["get"]
    await bench.settled()
    assert bench.seen.calls == ["connection", "timeout"]


def test_it_recovers_on_another_loop_than_it_failed_on() -> None:
    bench = Bench()
    meter = bench.meter(Rate(4, HOUR))
    asyncio.run(bench.break_down(meter))
    Shelf.fault = None
    bench.clock.advance(0.25)

    async def later() -> None:
        assert local(await bench.spend((meter, b"a", 1)))
        await bench.settled()
        assert not local(await bench.spend((meter, b"a", 1)))

    asyncio.run(later())


def test_every_loop_has_connections_of_its_own() -> None:
    bench = Bench()
    meter = bench.meter(Rate(4, HOUR))
    lefts = [asyncio.run(bench.spend((meter, b"a", 1))).left for _ in range(3)]
    assert lefts == [[3], [2], [1]]
    assert len(bench.backend._storages) == 1, "those of closed loops are gone"


# Taking without asking, and giving back


@pytest.mark.parametrize("url", ["async+shelf://", "async+memory://"], ids=["by increments", "by decrements"])
@pytest.mark.parametrize("rate", [Rate(10, HOUR), Quota(10, "day")], ids=["bucket", "quota"])
async def test_what_is_refunded_can_be_spent_again(url: str, rate: Rate | Quota) -> None:
    bench = Bench(url)
    meter = bench.meter(rate)
    verdict = await bench.spend((meter, b"a", 7))
    bench.backend.refund(verdict.charges, verdict.wall)
    await bench.settled()
    assert (await bench.spend((meter, b"a", 0))).left == [10]


@pytest.mark.parametrize(("rate", "over"), [(Rate(10, HOUR), 2 * 3600), (Quota(10, "day"), 12 * 3600)], ids=repr)
async def test_a_refund_is_void_when_its_window_is_over(rate: Rate | Quota, over: int) -> None:
    bench = Bench()
    meter = bench.meter(rate)
    verdict = await bench.spend((meter, b"a", 7))
    written = dict(Shelf.counts)
    bench.clock.advance(over)
    bench.backend.refund(verdict.charges, verdict.wall)
    await bench.settled()
    assert Shelf.counts == written


async def test_a_refund_in_the_next_window_still_counts_where_the_last_one_is_in_sight() -> None:
    bench = Bench()
    meter = bench.meter(Rate(10, HOUR))
    verdict = await bench.spend((meter, b"a", 10))
    bench.clock.advance(3600)
    assert (await bench.spend((meter, b"a", 0))).left == [0]
    bench.backend.refund(verdict.charges, verdict.wall)
    await bench.settled()
    assert (await bench.spend((meter, b"a", 0))).left == [10]


async def test_a_debit_is_known_when_the_storage_has_answered() -> None:
    bench = Bench()
    rate, quota = bench.meter(Rate(10, HOUR)), bench.meter(Quota(10, "day"), "quota")
    taken = bench.backend.debit([(rate, b"a", 25), (quota, b"a", 25)])
    assert taken == [0, 0]
    await bench.settled()
    assert taken == [10, 25], "a bucket takes a window's worth, a quota all"
    assert (await bench.spend((rate, b"a", 0), (quota, b"a", 0))).left == [0, 0]


async def test_a_debit_that_fails_took_nothing_for_certain() -> None:
    bench = Bench()
    meter = bench.meter(Rate(10, HOUR))
    Shelf.fault = refused
    taken = bench.backend.debit([(meter, b"a", 3)])
    await bench.settled()
    assert taken == [0]
    assert not bench.backend.up


async def test_while_the_storage_is_away_debits_are_this_process_s_and_refunds_are_lost() -> None:
    bench = Bench()
    meter = bench.meter(Rate(10, HOUR))
    before = await bench.spend((meter, b"a", 2))
    await bench.break_down(meter)
    written = dict(Shelf.counts)
    assert bench.backend.debit([(meter, b"a", 3)]) == [0], "what may be given back is in the storage, and this is not"
    bench.backend.refund(before.charges, before.wall)
    assert (await bench.spend((meter, b"a", 0))).left == [7]
    assert Shelf.counts == written


async def test_what_this_process_decided_is_this_process_s_to_change() -> None:
    bench = Bench(timeout_ns=SECOND)
    meter = bench.meter(Rate(10, HOUR))
    await bench.break_down(meter)
    verdict = await bench.spend((meter, b"a", 5))
    bench.clock.advance(0.25)
    Shelf.fault = None
    await until(lambda: bench.backend.up)
    written = dict(Shelf.counts)
    bench.backend.refund(verdict.charges, verdict.wall)
    assert bench.backend.debit(verdict.charges) == [5]
    await bench.settled()
    assert Shelf.counts == written
    Shelf.fault = refused
    await bench.spend((meter, b"b", 1))
    assert (await bench.spend((meter, b"a", 0))).left == [5]


async def test_nothing_to_change_changes_nothing() -> None:
    bench = Bench()
    bench.backend.refund([], 0)
    assert bench.backend.debit([]) == []
    await bench.settled()
    assert Shelf.calls == []


async def test_what_is_under_way_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_PENDING", 5)
    bench = Bench()
    meter = bench.meter(Rate(1_000, HOUR))
    taken = [bench.backend.debit([(meter, b"a", 1)]) for _ in range(8)]
    assert len(bench.backend._pending) == 5
    await bench.settled()
    assert taken == [[1]] * 5 + [[0]] * 3
    assert sorted(bench.seen.calls) == ["ok"] * 5 + ["timeout"] * 3


# Beginning and ending


async def test_it_connects_before_the_first_request() -> None:
    bench = Bench()
    bench.backend.open()
    bench.backend.open()
    assert Shelf.calls == [], "nobody waits for it"
    await bench.settled()
    assert bench.seen.calls == ["ok", "ok"]


async def test_it_begins_without_its_storage() -> None:
    bench = Bench()
    Shelf.fault = refused
    bench.backend.open()
    await bench.settled()
    assert not bench.backend.up


async def test_what_is_under_way_ends_before_it_is_closed() -> None:
    bench = Bench()
    taken = bench.backend.debit([(bench.meter(Rate(10, HOUR)), b"a", 1)])
    await bench.backend.aclose()
    assert taken == [1]
    assert not bench.backend._storages


async def test_a_closed_backend_looks_for_its_storage_no_more() -> None:
    bench = Bench()
    meter = bench.meter(Rate(10, HOUR))
    await bench.break_down(meter)
    timer = bench.backend._timer
    await bench.backend.aclose()
    assert timer is not None
    assert timer.cancelled()


# What an operator does


async def test_who_is_forgotten_has_used_nothing_in_the_windows_that_are_in_sight() -> None:
    bench = Bench()
    rate, quota = bench.meter(Rate(4, MINUTE)), bench.meter(Quota(4, "day"), "quota")
    for _ in range(3):
        assert (await bench.spend((rate, b"a", 1), (quota, b"a", 1), (rate, b"b", 1))).admitted
    bench.clock.advance(61)  # half of what was used in the window before is in sight
    assert not (await bench.spend((rate, b"a", 4))).admitted
    assert not (await bench.spend((rate, b"b", 4))).admitted
    await bench.backend.forget([(rate, b"a"), (quota, b"a")])
    assert await bench.admits(rate, 4)
    assert await bench.admits(quota, 4)
    assert not (await bench.spend((rate, b"b", 4))).admitted
    await bench.backend.forget([])


async def test_nobody_is_forgotten_while_the_storage_is_away() -> None:
    bench = Bench()
    meter = bench.meter(Rate(1, MINUTE))
    await bench.break_down(meter)
    assert [await bench.admits(meter) for _ in range(2)] == [True, False]
    with pytest.raises(OSError, match="connection: ConnectionRefusedError"):
        await bench.backend.forget([(meter, b"a")])
    assert not await bench.admits(meter)
    Shelf.fault = None
    await bench.backend.forget([(meter, b"a")])
    assert await bench.admits(meter)
    await bench.backend.aclose()


async def test_a_block_holds_in_this_process_and_is_asked_of_nobody() -> None:
    bench = Bench()
    assert isinstance(bench.backend, OperatedBackend)
    await bench.backend.block("acme", Block(bench.clock.wall_ns() + SECOND, "scraping"))
    assert [(tenant, block.reason) for tenant, block in bench.backend.blocks] == [("acme", "scraping")]
    await bench.backend.block("acme", None)
    assert (len(bench.backend.blocks), Shelf.calls) == (0, [])


# The URL


def test_an_unknown_storage_is_refused_with_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"no asynchronous storage for 'etcd://'; there are .*async\+memcached://"):
        LimitsBackend("etcd://user:secret@127.0.0.1:2379")
    with pytest.raises(ValueError, match="no scheme in the url; there are"):
        LimitsBackend("127.0.0.1:11211")


@pytest.mark.parametrize("package", ["memcachio", "motor"])
def test_a_missing_driver_is_named_with_the_command_that_installs_it(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    scheme = {"memcachio": "memcached", "motor": "mongodb"}[package]
    with pytest.raises(ValueError, match=rf"async\+{scheme}:// needs a driver: pip install {package}"):
        LimitsBackend(f"{scheme}://127.0.0.1:1")


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("async+redis+cluster://user:hidden@127.0.0.1", "Missing host or port in location 127.0.0.1"),
        ("async+redis+cluster://user:hidden@127.0.0.1:port", "Unable to parse storage uri of redis"),
        ("async+redis://user:hidden@[::1:6379", ""),
    ],
)
def test_what_is_wrong_with_a_url_is_said_without_its_password(url: str, expected: str) -> None:
    with pytest.raises(ValueError, match=r"location|storage uri|cannot be read") as caught:
        LimitsBackend(url)
    # The first releases of limits 5 do not say it themselves.
    assert str(caught.value) in (expected, "the url of redis cannot be read")


def test_an_old_limits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "__version__", "4.7.3")
    with pytest.raises(ValueError, match=r"needs limits 5 and this is 4\.7\.3: pip install 'limits>=5'"):
        Bench()


# A real memcached


class Memcached:
    """A server of its own, on a port that stays the same."""

    def __init__(self) -> None:
        binary = os.environ.get("SEAWALL_TEST_MEMCACHED") or shutil.which("memcached")
        if binary is None:
            pytest.skip("there is no memcached on PATH, and SEAWALL_TEST_MEMCACHED names none")
        if importlib.util.find_spec("memcachio") is None:
            pytest.skip("memcachio, the driver of memcached, is not installed")
        self.binary = binary
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def url(self) -> str:
        return f"memcached://127.0.0.1:{self.port}"

    def start(self) -> None:
        user = ["-u", "nobody"] if os.geteuid() == 0 else []
        self.process = subprocess.Popen([self.binary, "-l", "127.0.0.1", "-p", str(self.port), "-m", "16", *user])

    def send(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)
        if number is signal.SIGSTOP:
            os.waitid(os.P_PID, self.process.pid, os.WSTOPPED)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait(5)
            self.process = None


@pytest.fixture
def memcached() -> Iterator[Memcached]:
    server = Memcached()
    yield server
    server.kill()


@pytest.fixture
async def shared(memcached: Memcached) -> AsyncIterator[LimitsBackend]:
    """A backend that has connected."""
    backend = LimitsBackend(memcached.url, timeout_ns=250_000_000)
    backend.observer = Seen()
    backend.open()
    await asyncio.wait(backend._pending)
    await until(lambda: backend.up)
    yield backend
    await backend.aclose()


async def test_limits_hold_in_memcached(memcached: Memcached, shared: LimitsBackend) -> None:
    other = LimitsBackend(memcached.url, timeout_ns=250_000_000, deny_cache=False)
    rate, quota = Rate(7, 10 * HOUR), Quota(1_000, "month")
    meters = [
        (backend.meter("rate", "address", rate), backend.meter("quota", "address", quota))
        for backend in (shared, other)
    ]
    verdicts = await asyncio.gather(
        *(
            answer(backend, [(one, b"a", 1), (two, b"a", 1)])
            for backend, (one, two) in zip((shared, other), meters, strict=True)
            for _ in range(20)
        )
    )
    assert sum(verdict.admitted for verdict in verdicts if verdict is not None and not local(verdict)) == 7
    last = await answer(other, [(meters[1][0], b"a", 0), (meters[1][1], b"a", 0)])
    assert last is not None
    assert last.left == [0, 993], "what was refused was given back"
    await other.aclose()


async def test_limits_hold_in_the_redis_of_the_library() -> None:
    with Server() as server:
        backend = LimitsBackend(server.url, timeout_ns=SECOND)
        rate, quota = (
            backend.meter("rate", "address", Rate(7, HOUR)),
            backend.meter("quota", "address", Quota(90, "day")),
        )
        charges = [(rate, b"a", 1), (quota, b"a", 1)]
        verdicts = await asyncio.gather(*(answer(backend, charges) for _ in range(20)))
        assert not any(map(local, verdicts))
        assert sum(verdict.admitted for verdict in verdicts if verdict is not None) == 7
        last = await answer(backend, [(rate, b"a", 0), (quota, b"a", 0)])
        assert last is not None
        assert last.left == [0, 83]
        assert all(0 < server.command("TTL", key) <= 2 * DAY // SECOND for key in server.command("KEYS", "*"))
        server.kill()
        assert local(await answer(backend, [(rate, b"b", 1)]))
        server.restart()
        await until(lambda: backend.up)
        await backend.aclose()


async def test_a_window_of_months_holds_in_memcached(shared: LimitsBackend) -> None:
    """Beyond 30 days memcached takes an expiry for a date, which would be one in 1970."""
    meter = shared.meter("rate", "address", Rate(2, 40 * DAY))
    verdicts = [await answer(shared, [(meter, b"a", 1)]) for _ in range(3)]
    assert [verdict.admitted for verdict in verdicts if verdict is not None] == [True, True, False]
    assert not any(map(local, verdicts))


async def test_debits_and_refunds_reach_memcached(shared: LimitsBackend) -> None:
    meter = shared.meter("rate", "address", Rate(10, HOUR))
    verdict = await answer(shared, [(meter, b"a", 5)])
    assert verdict is not None
    taken = shared.debit([(meter, b"a", 4)])
    await asyncio.wait(shared._pending)
    assert taken == [4]
    shared.refund(verdict.charges, verdict.wall)
    await asyncio.wait(shared._pending)
    again = await answer(shared, [(meter, b"a", 0)])
    assert again is not None
    assert again.left == [6]


async def test_a_frozen_memcached_costs_one_time_out_and_no_error(memcached: Memcached, shared: LimitsBackend) -> None:
    meter = shared.meter("rate", "address", Rate(10, HOUR))
    memcached.send(signal.SIGSTOP)
    began = time.monotonic()
    verdicts = await asyncio.gather(*(answer(shared, [(meter, b"a", 1)]) for _ in range(20)))
    assert time.monotonic() - began < 2.5
    assert all(map(local, verdicts))
    assert isinstance(shared.spend([(meter, b"a", 1)]), Verdict), "from now on at once"
    memcached.send(signal.SIGCONT)
    await until(lambda: shared.up)
    assert not local(await answer(shared, [(meter, b"a", 1)]))


async def test_a_memcached_that_dies_and_comes_back_is_used_again(memcached: Memcached, shared: LimitsBackend) -> None:
    meter = shared.meter("rate", "address", Rate(10, HOUR))
    assert not local(await answer(shared, [(meter, b"a", 1)]))
    memcached.kill()
    assert local(await answer(shared, [(meter, b"a", 1)]))
    assert isinstance(shared.spend([(meter, b"a", 1)]), Verdict)
    memcached.start()
    await until(lambda: shared.up)
    assert not local(await answer(shared, [(meter, b"a", 1)]))


async def test_it_begins_while_memcached_is_away(memcached: Memcached) -> None:
    memcached.kill()
    backend = LimitsBackend(memcached.url)
    backend.open()
    meter = backend.meter("rate", "address", Rate(10, HOUR))
    assert local(await answer(backend, [(meter, b"a", 1)]))
    await backend.aclose()
