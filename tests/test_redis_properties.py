"""What holds for every sequence of calls and every name: the script in Redis is the arithmetic of this process, and
keys tell nothing and collide with nothing."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from contracts.subjects import Served
from seawall.backends import Charge, Key, Verdict
from seawall.backends.memory import MemoryBackend
from seawall.backends.redis.keys import Names, slot_of, tag_of
from seawall.rate import MAX_AMOUNT, SECOND, SETBACK, Quota, Rate
from seawall.testing import ManualClock
from stores import Server
from strategies import DAY, HOUR, MINUTE

MICROSECOND = 1_000
LONGEST = 60 * 365 * DAY
"""What a bucket may take to fill twice; Redis's own numbers end soon after."""

STARTS = (
    "2026-03-28T22:59:59.999999Z",  # the shortest day of Berlin begins
    "2026-10-24T21:30:00Z",  # its longest
    "2028-02-28T23:59:59Z",
    "2027-12-31T10:00:00Z",
)
KEYS: st.SearchStrategy[Key] = st.sampled_from(("a", b"a"))
ZONES = ("UTC", "Europe/Berlin", "Asia/Kathmandu", "Australia/Lord_Howe", "America/Los_Angeles")


def rates() -> st.SearchStrategy[Rate]:
    """Buckets of every size and with every fraction of a microsecond between two tokens."""
    built = st.builds(
        Rate,
        amount=st.one_of(st.integers(1, 12), st.sampled_from((97, 1_000, 999_983)), st.integers(1, MAX_AMOUNT)),
        period_ns=st.one_of(st.sampled_from((SECOND, 3 * SECOND, 15 * MINUTE, 30 * DAY)), st.integers(1, 10 * SECOND)),
        burst=st.one_of(st.just(0), st.integers(1, 9), st.integers(1, MAX_AMOUNT)),
    )
    return built.filter(lambda rate: rate.ceiling // rate.scale < LONGEST)


def quotas() -> st.SearchStrategy[Quota]:
    limit = st.one_of(st.integers(1, 9), st.integers(1, MAX_AMOUNT))
    return st.builds(Quota, limit=limit, span=st.sampled_from(("day", "month")), zone=st.sampled_from(ZONES))


@st.composite
def costs(draw: st.DrawFn, limit: Rate | Quota) -> int:
    most = limit.burst if isinstance(limit, Rate) else limit.limit
    return draw(st.one_of(st.just(1), st.just(0), st.integers(1, most), st.just(most), st.just(most + 1)))


@st.composite
def pauses(draw: st.DrawFn, limit: Rate | Quota, *, back: bool) -> int:
    """On the scale of one of the limits, in whole microseconds, which is what a server's clock tells."""
    token, full = HOUR, 40 * DAY
    if isinstance(limit, Rate):
        token, full = limit.interval // limit.scale, limit.capacity // limit.scale
    waits = [st.just(0), st.just(MICROSECOND), st.integers(0, 2 * token), st.integers(0, 2 * full)]
    if back:
        waits += [st.integers(-SETBACK, 0), st.integers(-2 * token, 0), st.integers(-3 * full, 0)]
    return draw(st.one_of(waits)) // MICROSECOND * MICROSECOND


def said(verdict: Verdict | None) -> tuple[object, ...]:
    """All of a verdict, with one state for all that are those of somebody who has used nothing."""
    assert verdict is not None
    states = []
    for (meter, _, _), state in zip(verdict.charges, verdict.states, strict=True):
        rate = meter.rate
        unused = verdict.now * rate.scale if isinstance(rate, Rate) else rate.enter(verdict.wall)
        states.append(max(state, unused))
    return (verdict.waits, verdict.left, states, verdict.now, verdict.wall)


@pytest.mark.slow
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.data(),
    st.sampled_from(STARTS),
    st.lists(st.one_of(rates(), rates(), quotas()), min_size=1, max_size=4),
    st.booleans(),
)
async def test_the_script_says_what_the_memory_backend_says(
    valkey: Server, data: st.DataObject, start: str, limits: list[Rate | Quota], back: bool
) -> None:
    """Verdicts, waits, buckets and debits, of everything that is asked in one turn, with clocks that step back."""
    clock = ManualClock(start)
    memory = MemoryBackend(clock=clock.wall_ns, wall_clock=clock.wall_ns)
    ours = [memory.meter(f"m{n}", "tenant", limit) for n, limit in enumerate(limits)]
    async with Served(valkey.url, clock) as subject:
        theirs = [subject.backend.meter(f"m{n}", "tenant", limit) for n, limit in enumerate(limits)]
        spent_at, earliest = clock.wall_ns(), 0
        for _ in range(data.draw(st.integers(1, 8))):
            clock.advance_ns(data.draw(pauses(data.draw(st.sampled_from(limits)), back=back)))
            clock.advance_ns(max(0, earliest - clock()))
            subject.turn()
            now, touched = clock.wall_ns(), set()
            expected: list[Any] = []
            actual: list[Any] = []
            for _ in range(data.draw(st.integers(1, 4))):
                kind = data.draw(st.sampled_from(("spend", "spend", "spend", "debit", "refund")))
                # A refused call may or may not note what it would have clamped; a step back would show which.
                most = 1 if back else len(limits)
                chosen = data.draw(st.lists(st.integers(0, len(limits) - 1), min_size=1, max_size=most, unique=True))
                keys = [data.draw(KEYS) for _ in chosen]
                paid = [data.draw(costs(limits[n])) for n in chosen]
                touched |= set(zip(chosen, keys, strict=True))
                own: list[Charge] = [(ours[n], key, cost) for n, key, cost in zip(chosen, keys, paid, strict=True)]
                asked: list[Charge] = [(theirs[n], key, cost) for n, key, cost in zip(chosen, keys, paid, strict=True)]
                match kind:
                    case "spend":
                        expected.append(memory.spend(own))
                        actual.append(subject.backend.spend(asked))
                    case "debit":
                        expected.append(memory.debit(own))
                        actual.append(subject.backend.debit(asked))
                    case "refund" if all(is_refundable(limits[n], now - spent_at) for n in chosen):
                        memory.refund(own, spent_at)
                        subject.backend.refund(asked, spent_at)
            answers = [await answer if inspect.isawaitable(answer) else answer for answer in actual]
            await subject.settled()
            for answer, wanted in zip(answers, expected, strict=True):
                if isinstance(wanted, Verdict):
                    assert said(answer) == said(wanted)
                    spent_at = wanted.wall
                else:
                    assert answer == wanted
            if back and any(is_unused(limits[n], memory.spend([(ours[n], key, 0)])) for n, key in touched):
                # Whether it is noted that nothing is used at this time, or forgotten, is the backend's affair.
                earliest = clock()


def is_refundable(limit: Rate | Quota, ago: int) -> bool:
    """What was spent longer ago than a bucket takes to fill may have come back by itself."""
    return isinstance(limit, Quota) or ago // MICROSECOND < limit.capacity // limit.scale // MICROSECOND


def is_unused(limit: Rate | Quota, verdict: Verdict) -> bool:
    if isinstance(limit, Rate):
        return verdict.states[0] <= verdict.now * limit.scale
    return verdict.left[0] == limit.limit


IDS = st.one_of(
    st.text(max_size=12),
    st.binary(max_size=12),
    st.text("{}*?[]:\n\r\0 \\%", max_size=6),
    st.text(st.characters(categories=["Cs"]), max_size=3),  # lone surrogates, which have no UTF-8
)


@given(
    st.lists(st.tuples(st.sampled_from(("tenant", "address", "tenant:", "")), IDS), max_size=8), st.none() | st.text()
)
def test_no_two_callers_have_one_tag(callers: list[tuple[str, Key]], secret: str | None) -> None:
    names = Names("seawall", secret)
    tags = [names.tags(store)[key] for store, key in callers]
    assert len(set(tags)) == len(set(callers))
    again = Names("seawall", secret)
    assert [again.tags(store)[key] for store, key in reversed(callers)] == tags[::-1]


@given(st.lists(st.lists(st.text(max_size=4), max_size=4).map(tuple), unique=True, max_size=6))
def test_no_two_limits_have_one_ending(limits: list[tuple[str, ...]]) -> None:
    """Parts are told apart by their lengths: ("ab", "c") is not ("a", "bc")."""
    names = Names("seawall", None)
    assert len({names.limit(*limit) for limit in limits}) == len(limits)


@given(IDS)
def test_nobody_chooses_a_slot_or_breaks_a_key(key: Key) -> None:
    """Of a key only letters, digits, "-" and "_" are a caller's doing, all of them within the one pair of braces."""
    tag = Names("seawall", None).tags("tenant")[key]
    assert re.fullmatch(rb"seawall:\{[A-Za-z0-9_-]{22}\}:", tag)


def test_another_secret_or_prefix_is_another_name() -> None:
    """And both are needed to know one: neither the prefix alone nor a secret that looks like one gives it away."""
    tags = {
        names.tags("tenant")["acme"].partition(b":")[2]
        for names in (Names("a", None), Names("b", None), Names("a", "s"), Names("a", "t"), Names("a", "a"))
    }
    assert len(tags) == 5


def test_callers_are_spread_over_the_slots_of_a_cluster() -> None:
    """With n callers in m slots a slot has n/m, and the sum of squares of the deviations is near m (chi-square)."""
    callers, groups = 16_000, 64
    tags = Names("seawall", None).tags("tenant")
    found = Counter(slot_of(tag_of(tags[f"tenant-{n}"])) % groups for n in range(callers))
    expected = callers / groups
    chi_square = sum((found[group] - expected) ** 2 / expected for group in range(groups))
    assert chi_square < 130  # 63 degrees of freedom: above with a chance of one in a million


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(key=IDS)
def test_a_slot_is_the_one_that_the_server_finds(valkey: Server, key: Key) -> None:
    names = Names("seawall", None)
    prefix = names.tags("tenant")[key]
    assert slot_of(tag_of(prefix)) == valkey.command("CLUSTER", "KEYSLOT", prefix + names.limit("rate", "tenant"))
