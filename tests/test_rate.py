"""Token buckets and calendar windows, held against exact models: no clock, no backend, integers only."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from fractions import Fraction
from typing import Any
from zoneinfo import ZoneInfo, available_timezones

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from seawall.decision import NEVER
from seawall.rate import COUNT_MASK, MAX_AMOUNT, SECOND, SETBACK, Quota, Rate, Span, spend, spend_quota, window
from strategies import DAY, HOUR, MINUTE, CountingBucket, most_admitted, rates, schedules, small_rates

START = 1_767_225_600 * SECOND  # no bucket may depend on where its clock starts
NAMED = {
    "100/s burst 10": Rate(100, SECOND, 10),
    "5/s": Rate(5, SECOND),
    "3 per 2 s": Rate(3, 2 * SECOND),
    "3/s": Rate(3, SECOND),
    "5/15min": Rate(5, 15 * MINUTE),
    "6/min": Rate(6, MINUTE),
    "1e12/s": Rate(MAX_AMOUNT, SECOND),
    "1e12/1ms burst 1": Rate(MAX_AMOUNT, SECOND // 1000, 1),
    "1 per 100 years": Rate(1, 36_500 * DAY),
    "7 per 30 days burst 1e12": Rate(7, 30 * DAY, MAX_AMOUNT),
}


def named(cases: dict[str, Rate]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("rate", cases.values(), ids=cases)


def run(rate: Rate, schedule: list[tuple[int, int]], state: int = 0) -> list[tuple[int, int]]:
    """The instants and costs of what is admitted."""
    now, admitted = START, []
    for pause, cost in schedule:
        now += pause
        state, wait = spend(state, now, rate, cost)
        if wait == 0:
            admitted.append((now, cost))
    return admitted


def drain(rate: Rate, now: int, state: int = 0) -> tuple[int, int]:
    """How many single tokens are admitted at ``now``, and the state after the one that was not."""
    count = 0
    while True:
        state, wait = spend(state, now, rate, 1)
        if wait:
            return count, state
        count += 1


# Token bucket


@given(st.data(), rates())
def test_no_window_admits_more_than_the_burst_and_what_grew_in_it(data: st.DataObject, rate: Rate) -> None:
    """G1, for all windows: A(a, b) <= B + r(b - a)."""
    admitted = run(rate, data.draw(schedules(rate)))
    assert most_admitted(rate, admitted) <= 0


@given(st.data(), rates())
def test_a_counting_bucket_decides_alike(data: st.DataObject, rate: Rate) -> None:
    """G2: same decisions and remaining as a bucket of fractions, for forward and backward clocks, debits, refunds."""
    now, state, model = START, START * rate.scale, CountingBucket(rate, START)
    for pause, cost in data.draw(schedules(rate, steps_back=True)):
        now = max(0, now + pause)
        action = data.draw(st.sampled_from(("spend", "spend", "spend", "debit", "refund")))
        model.at(now)
        if action == "spend":
            state, wait = spend(state, now, rate, cost)
            assert (wait == 0) == model.take(cost)
        elif action == "debit":
            state = rate.debit(spend(state, now, rate, 0)[0], now, cost)
            model.debit(cost)
        else:
            state = rate.refund(spend(state, now, rate, 0)[0], now, cost)
            model.refund(cost)
        assert rate.remaining(state, now) == model.remaining


@given(st.data(), rates())
def test_a_refusal_changes_nothing(data: st.DataObject, rate: Rate) -> None:
    """G3: whoever keeps asking is admitted at the same instant as whoever waits."""
    now, state = START, 0
    for pause, cost in data.draw(schedules(rate)):
        now += pause
        before = spend(state, now, rate, 0)[0]
        state, wait = spend(state, now, rate, cost)
        if wait:
            assert state == before
            hammered = state
            for _ in range(5):
                hammered = spend(hammered, now, rate, cost)[0]
            assert hammered == state


@given(st.data(), rates(), st.integers(0, 20))
def test_a_wait_is_exact(data: st.DataObject, rate: Rate, extra: int) -> None:
    """G4: alone, the cost is admitted after the wait and refused one nanosecond earlier."""
    now, state = START, 0
    for pause, cost in data.draw(schedules(rate, steps_back=True)):
        now += pause
        state, wait = spend(state, now, rate, cost)
        assert rate.wait(state, now, cost) == wait or wait == 0
        if wait > 0:
            assert spend(state, now + wait, rate, cost)[1] == 0
            assert spend(state, now + wait + extra, rate, cost)[1] == 0
            assert spend(state, now + wait - 1, rate, cost)[1] == 1


@given(st.data(), rates())
def test_what_remains_is_exactly_what_is_admitted_now(data: st.DataObject, rate: Rate) -> None:
    now, state = START, 0
    for pause, cost in data.draw(schedules(rate, steps_back=True)):
        now += pause
        state, _ = spend(state, now, rate, cost)
        left = rate.remaining(state, now)
        assert 0 <= left <= rate.burst
        assert spend(state, now, rate, left)[1] == 0
        assert spend(state, now, rate, left + 1)[1] != 0


@given(rates(), st.integers(1, 1_000))
def test_a_cost_above_the_burst_can_never_fit(rate: Rate, more: int) -> None:
    """G5: refused for good, and it does not touch the bucket."""
    assert spend(0, START, rate, rate.burst + more) == (START * rate.scale, NEVER)
    assert rate.wait(0, START, rate.burst + more) == NEVER
    assert spend(0, START, rate, rate.burst)[1] == 0


@given(st.data(), rates())
def test_a_peek_is_free_and_never_refused(data: st.DataObject, rate: Rate) -> None:
    schedule = data.draw(schedules(rate))
    peeked = [pair for pause, cost in schedule for pair in ((pause, 0), (0, cost), (0, 0))]
    assert [p for p in run(rate, peeked) if p[1]] == [p for p in run(rate, schedule) if p[1]]
    assert [spend(state, START, rate, 0)[1] for state in (0, START * rate.scale, 1 << 120, -5)] == [0] * 4


@given(st.data(), rates())
def test_a_clock_that_jumps_ahead_admits_at_most_what_it_skipped(data: st.DataObject, rate: Rate) -> None:
    """G6: a forward step f admits at most min(B, r f) more than the true time."""
    before, after = data.draw(schedules(rate)), data.draw(schedules(rate))
    jump = data.draw(st.integers(0, 3 * rate.period_ns * rate.burst // rate.amount))
    admitted = run(rate, [*before, (jump, 0), *after])
    true_time = sum(pause for pause, _ in before + after)
    bound = rate.burst + Fraction(rate.amount * true_time, rate.period_ns)
    extra = min(Fraction(rate.burst), Fraction(rate.amount * jump, rate.period_ns))
    assert sum(cost for _, cost in admitted) <= bound + extra


@given(st.data(), rates())
def test_a_clock_that_steps_back_starves_nobody(data: st.DataObject, rate: Rate) -> None:
    """G6: however far it steps, a unit is granted within the largest debt and one token; nobody waits for the clock.

    The bucket cannot tell a step back from a debt, which the clamp must not erase.
    """
    now, state = START, 0
    for pause, cost in data.draw(schedules(rate)):
        now += pause
        state = spend(state, now, rate, cost)[0]
    now -= data.draw(st.integers(0, START))
    state, wait = spend(state, now, rate, 1)
    worst = -(-(rate.burst + 1) * rate.period_ns // rate.amount)
    assert wait <= worst
    assert not wait or spend(state, now + wait, rate, 1)[1] == 0


def test_a_refused_call_writes_the_clamp_back() -> None:
    """G6: otherwise the owner, asking again and again, would wait for the clock to catch up."""
    rate = Rate(1, SECOND, 2)
    _, empty = drain(rate, START)
    back = START - HOUR
    state, wait = spend(empty, back, rate, 1)
    assert (state, wait) == (back + rate.ceiling, 3 * SECOND)
    for second in range(1, 3):
        state, wait = spend(state, back + second * SECOND, rate, 1)
        assert wait == (3 - second) * SECOND
    assert spend(state, back + 3 * SECOND, rate, 1)[1] == 0


@given(st.data(), rates())
def test_the_clamp_does_not_erase_a_debt_of_up_to_one_burst(data: st.DataObject, rate: Rate) -> None:
    debt = data.draw(st.integers(0, rate.burst))
    state = rate.debit(0, START, rate.burst)
    state = rate.debit(state, START, debt)
    # A refusal writes back what it clamps.
    state, wait = spend(spend(state, START, rate, 1)[0], START, rate, 1)
    assert wait == -(-(debt + 1) * rate.period_ns // rate.amount)


@given(rates(), st.integers(1, 3 * MAX_AMOUNT))
def test_a_debit_goes_at_most_one_burst_into_debt(rate: Rate, cost: int) -> None:
    state = rate.debit(0, START, cost)
    model = CountingBucket(rate, START)
    model.debit(cost)
    assert state == START * rate.scale + min(cost, 2 * rate.burst) * rate.interval
    assert rate.remaining(state, START) == model.remaining
    assert rate.debit(state, START, 2 * rate.burst) == START * rate.scale + rate.ceiling


@given(st.data(), small_rates())
def test_losing_the_state_costs_one_burst_a_time(data: st.DataObject, rate: Rate) -> None:
    """G8: k losses admit at most (k + 1) B + r(b - a)."""
    now, state, total, losses = START, 0, 0, 0
    for pause, cost in data.draw(schedules(rate)):
        now += pause
        if data.draw(st.booleans()):
            state, losses = 0, losses + 1
        state, wait = spend(state, now, rate, cost)
        total += cost if wait == 0 else 0
    assert total <= (losses + 1) * rate.burst + Fraction(rate.amount * (now - START), rate.period_ns)


@given(st.data(), rates())
def test_a_bucket_that_is_full_again_equals_none(data: st.DataObject, rate: Rate) -> None:
    """G11: what evicts a key whose instant has passed changes no later answer."""
    state = START * rate.scale - data.draw(st.integers(0, 1 << 70))
    assert rate.remaining(state, START) == rate.remaining(0, START) == rate.burst
    assert rate.wait(state, START, 1) == rate.wait(0, START, 1) == 0
    for cost in (0, 1, rate.burst, rate.burst + 1):
        assert spend(state, START, rate, cost) == spend(0, START, rate, cost)
        assert rate.debit(state, START, cost) == rate.debit(0, START, cost)
        assert rate.refund(state, START, cost) == rate.refund(0, START, cost)


@given(st.data(), rates())
def test_a_refund_undoes_its_spend_and_never_overfills(data: st.DataObject, rate: Rate) -> None:
    now, state = START, 0
    for pause, cost in data.draw(schedules(rate)):
        now += pause
        before = spend(state, now, rate, 0)[0]
        state, wait = spend(state, now, rate, cost)
        if wait == 0:
            assert rate.refund(state, now, cost) == before
        assert rate.remaining(rate.refund(state, now, 5 * rate.burst), now) == rate.burst
        assert rate.refund(state, now, 5 * rate.burst) == now * rate.scale


def test_a_refund_after_a_step_back_is_of_what_the_step_has_left() -> None:
    """A bucket may not be further from full than its ceiling; what comes back comes back to it then."""
    rate = Rate(1, SECOND, 5)
    state = spend(0, START, rate, 5)[0]
    earlier = START - HOUR
    assert rate.refund(state, earlier, 1) == rate.debit(state, earlier, 0) - rate.interval


def test_three_a_second_drained_admits_three_after_one_second() -> None:
    """The interval of 3/s is no whole number of nanoseconds; rounded, the third would come a nanosecond late."""
    rate = Rate(3, SECOND)
    assert drain(rate, START)[0] == 3
    for seconds in range(1, 50):
        count, state = 0, drain(rate, START)[1]
        for second in range(1, seconds + 1):
            more, state = drain(rate, START + second * SECOND, state)
            count += more
        assert count == 3 * seconds


@named(NAMED)
def test_a_named_rate_yields_its_amount_per_period(rate: Rate) -> None:
    """Emptied at once, and then again after whole periods: nothing rounds away, whatever the numbers."""
    state, wait = spend(0, START, rate, rate.burst)
    assert (wait, rate.remaining(state, START)) == (0, 0)
    now = START
    for _ in range(10):
        now += rate.period_ns
        due = min(rate.amount, rate.burst)
        assert rate.remaining(state, now) == due
        assert rate.remaining(state, now - 1) < due or rate.amount > rate.period_ns or rate.amount > rate.burst
        state, wait = spend(state, now, rate, due)
        assert wait == 0
        assert spend(state, now, rate, 1)[1] > 0


def test_a_hundred_a_second_with_a_burst_of_ten_is_both() -> None:
    """throttled-py limits nothing where burst/rate < 0.5 s: 10 at once here, then one each 10 ms, 100 in a second."""
    rate = NAMED["100/s burst 10"]
    count, state = drain(rate, START)
    assert (count, rate.wait(state, START)) == (10, 10 * SECOND // 1000)
    for millisecond in range(1, 1001):
        more, state = drain(rate, START + millisecond * SECOND // 1000, state)
        count += more
    assert count == 110


def test_five_a_second_is_five_and_not_half_of_it() -> None:
    """traffik enforces 5/s as 2.5/s."""
    rate, state, count = NAMED["5/s"], 0, 0
    for tick in range(0, 60 * SECOND, SECOND // 20):
        state, wait = spend(state, START + tick, rate, 1)
        count += wait == 0
    assert count == 5 + 5 * 60 - 1


def test_six_a_minute_is_not_one_each_ten_seconds() -> None:
    """traefik#8330: the burst defaults to the amount."""
    assert drain(NAMED["6/min"], START)[0] == 6


def test_no_fraction_of_a_token_is_lost() -> None:
    """throttled-py admits 11 of 16, because each look at the bucket rounds down."""
    rate = Rate(3, 2 * SECOND)
    _, state = drain(rate, START)
    count = 0
    for tick in range(0, 10 * SECOND + 1, SECOND // 8):
        for _ in range(5):
            state, wait = spend(state, START + tick, rate, 1)
            count += wait == 0
    assert count == 15


@pytest.mark.parametrize(
    ("rate", "q", "w"),
    [
        (Rate(100, SECOND, 10), 100, 1),
        (Rate(100, SECOND, 300), 300, 3),
        (Rate(500, SECOND), 500, 1),
        (Rate(5, SECOND), 5, 1),
        (Rate(3, 2 * SECOND), 3, 2),
        (Rate(3, 2 * SECOND, 2), 2, 1),
        (Rate(5, 15 * MINUTE), 5, 900),
        (Rate(30, MINUTE), 30, 60),
        (Rate(2, SECOND, 3), 4, 2),  # 1.5 s rounds up to 2, where 4 can be spent
        (Rate(2, SECOND, 5), 6, 3),  # 2.5 s rounds up, not to the even 2
        (Rate(1, SECOND // 1000), 1000, 1),
        (Rate(1, 30 * DAY), 1, 30 * 86_400),
        (Rate(MAX_AMOUNT, SECOND, 1), MAX_AMOUNT, 1),
    ],
    ids=repr,
)
def test_a_bucket_advertises_what_can_be_spent_in_the_time_it_fills(rate: Rate, q: int, w: int) -> None:
    assert (rate.advertised, rate.window_s) == (q, w)


@given(rates())
def test_an_advertised_rate_is_close_to_the_real_one(rate: Rate) -> None:
    """w = max(1, round(B / r)) and q = max(B, floor(r w)): never less than the burst, and no tenth of what is sold."""
    fill = Fraction(rate.burst * rate.period_ns, rate.amount * SECOND)
    assert rate.window_s == max(1, (2 * fill + 1) // 2)
    assert rate.advertised == max(rate.burst, Fraction(rate.amount * rate.window_s * SECOND, rate.period_ns) // 1)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((0, SECOND), "amount must be at least 1"),
        ((-1, SECOND), "amount must be at least 1"),
        ((1, 0), "period_ns must be at least 1"),
        ((1, SECOND, -1), "burst must be at least 1"),
        ((MAX_AMOUNT + 1, SECOND), "at most"),
        ((1, SECOND, MAX_AMOUNT + 1), "at most"),
    ],
)
def test_a_rate_that_means_nothing_is_refused(arguments: tuple[int, ...], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Rate(*arguments)


def test_rates_are_values() -> None:
    assert Rate(6, 2 * SECOND, 6) == Rate(6, 2 * SECOND)
    assert Rate(3, SECOND) != Rate(6, 2 * SECOND)
    assert repr(Rate(3, SECOND)) == "Rate(amount=3, period_ns=1000000000, burst=3)"
    rate: Any = Rate(3, SECOND)
    with pytest.raises(AttributeError):
        rate.amount = 4


# Calendar windows


def at(text: str, zone: str = "UTC") -> int:
    """Nanoseconds since the epoch of a local time, or of an instant where it says its offset."""
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=ZoneInfo(zone))
    return int(moment.timestamp()) * SECOND


WINDOWS: list[tuple[str, Span, str, str, str]] = [
    ("UTC", "day", "2026-01-01T00:00:00Z", "2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z"),
    ("UTC", "day", "2026-12-31T23:59:59Z", "2026-12-31T00:00:00Z", "2027-01-01T00:00:00Z"),
    ("UTC", "month", "2026-12-31T23:59:59Z", "2026-12-01T00:00:00Z", "2027-01-01T00:00:00Z"),
    ("UTC", "month", "2027-01-01T00:00:00Z", "2027-01-01T00:00:00Z", "2027-02-01T00:00:00Z"),
    ("UTC", "day", "2028-02-29T12:00:00Z", "2028-02-29T00:00:00Z", "2028-03-01T00:00:00Z"),
    ("UTC", "month", "2028-02-29T23:59:59Z", "2028-02-01T00:00:00Z", "2028-03-01T00:00:00Z"),
    ("UTC", "month", "2100-02-28T23:59:59Z", "2100-02-01T00:00:00Z", "2100-03-01T00:00:00Z"),
    ("UTC", "month", "2026-01-31T00:00:00Z", "2026-01-01T00:00:00Z", "2026-02-01T00:00:00Z"),
    # Clocks forward and back: 23 and 25 hours, and the months around them.
    ("Europe/Berlin", "day", "2026-03-29T12:00:00Z", "2026-03-28T23:00:00Z", "2026-03-29T22:00:00Z"),
    ("Europe/Berlin", "day", "2026-10-25T12:00:00Z", "2026-10-24T22:00:00Z", "2026-10-25T23:00:00Z"),
    ("Europe/Berlin", "month", "2026-03-29T12:00:00Z", "2026-02-28T23:00:00Z", "2026-03-31T22:00:00Z"),
    ("Europe/Berlin", "day", "2025-12-31T23:00:00Z", "2025-12-31T23:00:00Z", "2026-01-01T23:00:00Z"),
    # Midnight does not exist: 23:59:59 is followed by 01:00:00.
    ("America/Havana", "day", "2026-03-08T12:00:00Z", "2026-03-08T05:00:00Z", "2026-03-09T04:00:00Z"),
    ("America/Havana", "day", "2026-03-08T04:59:59Z", "2026-03-07T05:00:00Z", "2026-03-08T05:00:00Z"),
    # Midnight comes twice: 00:59:59 is followed by 00:00:00.
    ("America/Havana", "day", "2026-11-01T05:30:00Z", "2026-11-01T04:00:00Z", "2026-11-02T05:00:00Z"),
    # Back over midnight: 23:00 to 24:00 comes twice, and is one day both times.
    ("America/Santiago", "day", "2026-04-05T03:30:00Z", "2026-04-04T03:00:00Z", "2026-04-05T04:00:00Z"),
    ("Asia/Kathmandu", "day", "2026-05-05T18:15:00Z", "2026-05-05T18:15:00Z", "2026-05-06T18:15:00Z"),
    ("Asia/Kathmandu", "day", "2026-05-05T18:14:59Z", "2026-05-04T18:15:00Z", "2026-05-05T18:15:00Z"),
    # 30 December 2011 was left out.
    ("Pacific/Apia", "day", "2011-12-30T09:59:59Z", "2011-12-29T10:00:00Z", "2011-12-30T10:00:00Z"),
    ("Pacific/Apia", "day", "2011-12-30T10:00:00Z", "2011-12-30T10:00:00Z", "2011-12-31T10:00:00Z"),
    ("Pacific/Apia", "month", "2011-12-30T10:00:00Z", "2011-12-01T10:00:00Z", "2011-12-31T10:00:00Z"),
    ("Pacific/Kiritimati", "day", "2026-01-01T10:00:00Z", "2026-01-01T10:00:00Z", "2026-01-02T10:00:00Z"),
]


@pytest.mark.parametrize(("zone", "span", "moment", "start", "end"), WINDOWS)
def test_a_window_is_what_the_calendar_says(zone: str, span: Span, moment: str, start: str, end: str) -> None:
    quota = Quota(5, span, zone)
    quota.enter(at(moment))
    assert (quota.start_ns, quota.end_ns) == (at(start), at(end))
    assert quota.window_s == (at(end) - at(start)) // SECOND


@pytest.mark.parametrize("year", [2026, 2027, 2028, 2100])
def test_a_month_has_its_own_length(year: int) -> None:
    days = [(date(year + month // 12, month % 12 + 1, 1) - date(year, month, 1)).days for month in range(1, 13)]
    lengths = []
    for month in range(1, 13):
        quota = Quota(1, "month")
        quota.enter(at(f"{year}-{month:02}-15T00:00:00Z"))
        lengths.append(quota.window_s)
    assert lengths == [86_400 * length for length in days]
    assert sum(lengths) == 86_400 * (366 if year == 2028 else 365)


ZONES = sorted(available_timezones() - {"localtime", "Factory"})
MOMENTS = st.integers(at("2012-01-01T00:00:00Z") // SECOND, at("2040-01-01T00:00:00Z") // SECOND)


@given(st.sampled_from(ZONES), st.sampled_from(("day", "month")), MOMENTS)
def test_windows_follow_each_other_without_gap_or_overlap(name: str, span: Span, moment: int) -> None:
    """In every zone there is, with the last second before a window and the first after it."""
    zone = ZoneInfo(name)
    start, end = window(moment, span, zone)
    assert start <= moment < end
    assert window(start, span, zone) == window(end - 1, span, zone) == (start, end)
    assert window(start - 1, span, zone)[1] == start
    assert window(end, span, zone)[0] == end
    here = datetime.fromtimestamp(start, UTC).astimezone(zone)
    before = datetime.fromtimestamp(start - 1, UTC).astimezone(zone)
    assert before.date() < here.date()
    assert here.day == 1 or span == "day"


def spend_all(quota: Quota, moments: list[tuple[int, int]], state: int = 0) -> list[tuple[int, int]]:
    admitted = []
    for wall, cost in moments:
        state, wait = spend_quota(state, wall, quota, cost)
        if wait == 0:
            admitted.append((wall, cost))
    return admitted


SPANS = {"day": DAY, "month": 28 * DAY}


@given(
    st.sampled_from(("day", "month")),
    st.sampled_from(("UTC", "Europe/Berlin", "America/Havana", "Asia/Kathmandu")),
    st.integers(1, 9),
    st.lists(st.tuples(st.one_of(st.integers(0, HOUR), st.integers(0, 20 * DAY)), st.integers(0, 10)), max_size=40),
)
def test_a_quota_admits_its_limit_a_window_and_twice_that_in_any_span(
    span: Span, zone: str, limit: int, steps: list[tuple[int, int]]
) -> None:
    """<= L per window, exactly those that fit, and <= 2 L over any span as long as a window."""
    quota, moments, wall = Quota(limit, span, zone), [], at("2028-02-20T00:00:00Z")
    for pause, cost in steps:
        wall += pause
        moments.append((wall, cost))
    admitted = spend_all(quota, moments)
    used: dict[tuple[int, int], int] = {}
    for wall, cost in moments:
        key = window(wall // SECOND, span, ZoneInfo(zone))
        fits = cost == 0 or used.get(key, 0) + cost <= limit
        used[key] = used.get(key, 0) + cost * fits
        assert ((wall, cost) in admitted) or not fits
    assert sum(cost for _, cost in admitted) == sum(used.values())
    assert all(count <= limit for count in used.values())
    for first, _ in admitted:
        assert sum(cost for wall, cost in admitted if first <= wall < first + SPANS[span]) <= 2 * limit


@given(
    MOMENTS, st.integers(0, SECOND - 1), st.sampled_from(("day", "month")), st.sampled_from(ZONES), st.integers(1, 9)
)
def test_a_quota_is_whole_again_at_the_instant_it_says(
    moment: int, rest: int, span: Span, zone: str, limit: int
) -> None:
    """G4 for quotas: exact to the nanosecond, and it is the first of a local day or month."""
    quota, wall = Quota(limit, span, zone), moment * SECOND + rest
    state, wait = spend_quota(0, wall, quota, limit)
    assert wait == 0
    state, wait = spend_quota(state, wall, quota, 1)
    assert wait == quota.end_ns - wall == quota.wait(state, wall)
    assert spend_quota(state, wall + wait - 1, quota, 1)[1] == 1
    assert spend_quota(state, wall + wait, quota, limit)[1] == 0


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 20))
def test_a_cost_above_a_quota_can_never_fit(limit: int, used: int, more: int) -> None:
    quota = Quota(limit, "day")
    state = quota.debit(0, START, used)
    assert spend_quota(state, START, quota, limit + more) == (state, NEVER)
    assert quota.wait(state, START, limit + more) == NEVER
    assert spend_quota(state, START, quota, 0) == (state, 0)


def test_a_count_that_does_not_overflow_into_the_window() -> None:
    quota = Quota(MAX_AMOUNT, "month")
    state = quota.debit(0, START, 1 << 60)
    assert state == quota.base + COUNT_MASK
    assert (quota.remaining(state, START), quota.used(state, START)) == (0, COUNT_MASK)
    assert MAX_AMOUNT < COUNT_MASK
    assert quota.remaining(state, quota.end_ns) == MAX_AMOUNT


def test_a_debit_of_a_quota_is_counted_whole() -> None:
    quota = Quota(5, "day")
    state = quota.debit(0, START, 12)
    assert (quota.used(state, START), quota.remaining(state, START)) == (12, 0)
    state = quota.refund(state, START, 8, START)
    assert (quota.used(state, START), quota.remaining(state, START)) == (4, 1)


def test_a_refund_of_a_quota_is_void_once_its_window_has_ended() -> None:
    quota = Quota(5, "day")
    evening, morning = at("2026-05-05T23:59:59Z"), at("2026-05-06T00:00:00Z")
    state, _ = spend_quota(0, evening, quota, 5)
    state, _ = spend_quota(state, morning, quota, 2)
    state = quota.refund(state, morning, 5, evening)
    assert quota.used(state, morning) == 2
    state = quota.refund(state, morning, 1, morning)
    assert quota.used(state, morning) == 1
    assert quota.used(quota.refund(state, morning, 9, morning), morning) == 0


STEPS = st.lists(
    st.tuples(st.one_of(st.integers(-SETBACK, SETBACK), st.integers(0, DAY)), st.integers(0, 4)), max_size=40
)


@given(st.integers(1, 5), STEPS)
def test_a_clock_stepping_back_over_midnight_grants_no_quota_twice(limit: int, steps: list[tuple[int, int]]) -> None:
    """However often it crosses the same midnight, by an hour at most: one quota a day that it has seen.

    A step back is one from the furthest it has been, as a clock that was corrected does.
    """
    quota, state, wall, furthest = Quota(limit, "day"), 0, START - 5 * MINUTE, 0
    admitted, days = 0, set()
    for step, cost in steps:
        wall = max(wall + step, furthest - SETBACK)
        furthest = max(furthest, wall)
        state, wait = spend_quota(state, wall, quota, cost)
        admitted += cost if wait == 0 else 0
        days.add(furthest // DAY)
    assert admitted <= limit * len(days)


@given(st.integers(1, 5), st.integers(0, 5), st.integers(0, 40 * DAY))
def test_a_clock_stepping_back_starves_nobody_of_a_quota(limit: int, used: int, back: int) -> None:
    """What was counted ahead of time counts now, and no longer than the rest of a window (and a small step)."""
    quota = Quota(limit, "day")
    assume(used <= limit)
    state, _ = spend_quota(0, START, quota, used)
    now = START - back
    assert quota.remaining(state, now) == limit - used
    state, wait = spend_quota(state, now, quota, limit)
    assert wait <= DAY + SETBACK
    assert not wait or spend_quota(state, now + wait, quota, limit)[1] == 0


def test_a_refund_within_a_small_step_back_is_whole() -> None:
    """All-or-nothing gives back at the instant at which it took, also while the clock is behind the window."""
    quota = Quota(5, "day")
    state, _ = spend_quota(0, START, quota, 2)
    behind = START - SECOND
    state, wait = spend_quota(state, behind, quota, 3)
    assert (wait, quota.remaining(state, behind)) == (0, 0)
    assert quota.remaining(quota.refund(state, behind, 3, behind), behind) == 3
    # What was spent before midnight is not given back after it.
    assert quota.remaining(quota.refund(state, START, 3, START - HOUR), START) == 0


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 3 * DAY))
def test_a_count_of_an_ended_window_equals_none(limit: int, used: int, later: int) -> None:
    """G11 for quotas."""
    quota = Quota(limit, "day")
    state = quota.debit(0, START, used)
    after = quota.end_ns + later
    for cost in range(limit + 2):
        assert spend_quota(state, after, quota, cost) == spend_quota(0, after, quota, cost)
        assert quota.debit(state, after, cost) == quota.debit(0, after, cost)
        assert quota.refund(state, after, cost, after) == quota.refund(0, after, cost, after)
    assert quota.remaining(state, after) == limit


def test_quotas_are_values_whatever_their_window() -> None:
    a, b = Quota(5, "day", "Europe/Berlin"), Quota(5, "day", "Europe/Berlin")
    a.enter(START)
    assert a == b
    assert hash(a) == hash(b)
    assert a != Quota(6, "day", "Europe/Berlin")
    assert a != "5/day"
    assert repr(a) == "Quota(limit=5, span='day', zone='Europe/Berlin')"


@pytest.mark.parametrize("limit", [0, -1, MAX_AMOUNT + 1])
def test_a_quota_that_means_nothing_is_refused(limit: int) -> None:
    with pytest.raises(ValueError, match="a quota is 1"):
        Quota(limit, "day")


def test_the_calendar_is_consulted_once_a_window(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def counted(moment: int, span: Span, zone: ZoneInfo) -> tuple[int, int]:
        asked.append(moment)
        return window(moment, span, zone)

    monkeypatch.setattr("seawall.rate.window", counted)
    quota, state = Quota(1_000, "day"), 0
    for minute in range(3 * 24 * 60):
        state, _ = spend_quota(state, START + minute * MINUTE, quota, 1)
    assert len(asked) == 3
    for second in range(100):
        spend_quota(state, quota.start_ns - second * SECOND, quota, 1)
    assert len(asked) == 3


def test_a_year_of_days_in_every_zone_of_note_adds_up() -> None:
    """No second of a year is in no day or in two, where clocks change at midnight and elsewhere."""
    for name in ("America/Havana", "America/Santiago", "Africa/Cairo", "Asia/Beirut", "America/Nuuk", "Europe/London"):
        zone, end = ZoneInfo(name), window(START // SECOND, "day", ZoneInfo(name))[0]
        lengths = set()
        for _ in range(365):
            start, after = window(end, "day", zone)
            assert start == end
            lengths.add(after - start)
            end = after
        assert timedelta(seconds=end - window(START // SECOND, "day", zone)[0]).days == 365
        assert lengths == {23 * 3600, 24 * 3600, 25 * 3600}
