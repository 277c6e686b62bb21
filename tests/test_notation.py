"""What people write for rates, quotas and durations."""

from __future__ import annotations

import re
from contextlib import suppress
from typing import Any

import limits
import pytest
from hypothesis import given
from hypothesis import strategies as st
from limits.limits import GRANULARITIES, RateLimitItem, RateLimitItemPerMinute

from seawall import notation
from seawall.notation import DAY, HOUR, MINUTE, MONTH, YEAR, NotationError, parse_duration, parse_quota, parse_rates
from seawall.rate import MAX_AMOUNT, SECOND, Quota, Rate

spaces = st.text(" \t", max_size=2)
units = st.sampled_from([name + s for name in GRANULARITIES for s in ("", "s")])
cased_units = st.builds(lambda unit, upper: unit.upper() if upper else unit, units, st.booleans())


@st.composite
def limits_rates(draw: st.DrawFn) -> str:
    """One rate in a spelling that `limits` reads."""
    multiple = draw(st.sampled_from(["", "1", "2", "15", "007", "90"]))
    per = draw(st.sampled_from(["/", "per", " per ", "PER", " Per"]))
    amount = draw(st.integers(1, MAX_AMOUNT))
    padding = [draw(spaces) for _ in range(5)]
    return f"{padding[0]}{amount}{padding[1]}{per}{padding[2]}{multiple}{padding[3]}{draw(cased_units)}{padding[4]}"


@given(st.lists(limits_rates(), min_size=1, max_size=4), st.sampled_from([",", ";", "|", ":,", ":;", ":|"]))
def test_whatever_limits_reads_is_read_alike(rates: list[str], separator: str) -> None:
    text = separator.join(rates)
    expected = [(item.amount, item.get_expiry() * SECOND) for item in limits.parse_many(text)]
    if any(period > notation.MAX_PERIOD for _, period in expected):
        return
    assert expected == [(rate.amount, rate.period_ns) for rate in parse_rates(text)]


@given(st.text("0123456789/ perscondmiuthayPER,;|:_.-", max_size=24))
def test_any_text_is_read_as_limits_reads_it_or_refused_with_words(text: str) -> None:
    try:
        theirs = [(item.amount, item.get_expiry() * SECOND) for item in limits.parse_many(text)]
    except ValueError:
        theirs = []
    # Nobody would be let in, or `limits` would read a span of 0 as 1, or the numbers are beyond all use.
    refused = re.search(r"(/|per)\s*0+\s*[a-z]", text, re.IGNORECASE) or any(
        not 1 <= amount <= MAX_AMOUNT or period > notation.MAX_PERIOD for amount, period in theirs
    )
    try:
        ours = [(rate.amount, rate.period_ns) for rate in parse_rates(text)]
    except NotationError:
        ours = []
    assert theirs == ours or not theirs or (refused and not ours)


@given(st.sampled_from(list(GRANULARITIES.values())), st.integers(1, MAX_AMOUNT), st.integers(1, 90))
def test_an_item_of_limits_is_a_rate(granularity: type[RateLimitItem], amount: int, multiples: int) -> None:
    item = granularity(amount, multiples)
    assert (Rate(amount, item.get_expiry() * SECOND),) == parse_rates(item)


def test_an_item_of_a_subclass_of_limits_is_a_rate() -> None:
    class Mine(RateLimitItemPerMinute):
        pass

    assert parse_rates(Mine(5)) == (Rate(5, MINUTE),)


@pytest.mark.parametrize(
    ("text", "amount", "period"),
    [
        ("10/second", 10, SECOND),
        ("10/s", 10, SECOND),
        ("10 per 15 minutes", 10, 15 * MINUTE),
        ("5/15min", 5, 15 * MINUTE),
        ("5/m", 5, MINUTE),
        ("1_000/day", 1000, DAY),
        ("3/100ms", 3, SECOND // 10),
        ("3/1_000ms", 3, SECOND),
        ("2/week", 2, 7 * DAY),
        ("2/2weeks", 2, 14 * DAY),
        ("2/month", 2, MONTH),
        ("2/year", 2, YEAR),
        ("7/2hrs", 7, 2 * HOUR),
        ("7/Hour", 7, HOUR),
        ("0007/hour", 7, HOUR),
        (f"{'0' * 5000}7/hour", 7, HOUR),
    ],
)
def test_a_rate_is_an_amount_per_span(text: str, amount: int, period: int) -> None:
    assert parse_rates(text) == (Rate(amount, period),)


@pytest.mark.parametrize("text", ["unlimited", " Unlimited "])
def test_unlimited_is_no_rate(text: str) -> None:
    assert parse_rates(text) == ()
    assert parse_quota(text) is None


def test_several_rates_keep_their_order() -> None:
    assert parse_rates(["100/minute", "10/second"]) == (Rate(100, MINUTE), Rate(10, SECOND))
    assert parse_rates("100/minute; 10/second") == (Rate(100, MINUTE), Rate(10, SECOND))
    assert parse_rates(("unlimited",)) == ()


def test_a_burst_is_what_may_be_saved_up() -> None:
    assert parse_rates("10/second", 30) == (Rate(10, SECOND, 30),)
    assert parse_rates(["10/second"], 30) == (Rate(10, SECOND, 30),)
    assert parse_rates(limits.parse("10/second"), 30) == (Rate(10, SECOND, 30),)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("10_000/dya", "unknown time unit 'dya' in '10_000/dya'; did you mean 'day'?"),
        ("10", "'10' has no time unit; did you mean '10/second'?"),
        (10, "'10' has no time unit; did you mean '10/second'?"),
        ("0", "'0' has no time unit; write a whole number above 0 with its unit, such as '10/second'"),
        (0, "'0' has no time unit; write a whole number above 0 with its unit, such as '10/second'"),
        (-5, "'-5' has no time unit; write a whole number above 0 with its unit, such as '10/second'"),
        (0.5, "'0.5' has no time unit; write a whole number above 0 with its unit, such as '10/second'"),
        ("0/second", "'0/second' lets nobody in; an amount is at least 1"),
        ("5/0minute", "the time in '5/0minute' is 0; it is at least 1ms"),
        ("", "a rate is blank; write a rate such as 10/second"),
        ("  ", "a rate is blank; write a rate such as 10/second"),
        (None, "a rate is blank; write a rate such as 10/second"),
        (True, "'true' is not a rate; write a rate such as 10/second"),
        ({}, "'{}' is not a rate; write a rate such as 10/second"),
        ([], "an empty list is not a rate; write a rate such as 10/second, or unlimited"),
        ("-5/s", "'-5/s' is negative; write a rate such as 10/second"),
        ("0.5/second", "'0.5' in '0.5/second' is not a whole number; did you mean '1/2s'?"),
        (".5/second", "'.5' in '.5/second' is not a whole number; did you mean '1/2s'?"),
        ("1.5 per 2 minutes", "'1.5' in '1.5 per 2 minutes' is not a whole number; did you mean '3/4min'?"),
        ("0.0/second", "'0.0/second' is not a rate; write one such as 10/second, 5/15min or 1_000/day, or unlimited"),
        ("10/", "'10/' has no time unit; write a rate such as 10/second"),
        ("/s", "'/s' has no amount; write a rate such as 10/second"),
        ("10/M", "unknown time unit 'M' in '10/M'; use ms, s, min, h, day, week, month or year"),
        ("5/15µs", "unknown time unit 'µs' in '5/15µs'; use ms, s, min, h, day, week, month or year"),
        ("unlimted", "'unlimted' is not a rate; did you mean 'unlimited'?"),
        ("fast", "'fast' is not a rate; write one such as 10/second, 5/15min or 1_000/day, or unlimited"),
        ("9999999999999/s", "'9999999999999' in '9999999999999/s' is too large; it is at most 1_000_000_000_000"),
        ("5/101year", "'101' in '5/101year' is too large; it is at most 100"),
        (["10/second", "unlimited"], "'unlimited' cannot be combined with other rates"),
    ],
)
def test_what_is_no_rate_is_refused_with_what_to_write(value: object, message: str) -> None:
    with pytest.raises(NotationError) as caught:
        parse_rates(value)  # type: ignore[arg-type]
    assert (message, "E020", "a rate such as 10/second") == (
        caught.value.message,
        caught.value.code,
        caught.value.expected,
    )


@pytest.mark.parametrize(
    ("value", "burst"),
    [
        ("10/second", 0),
        ("10/second", True),
        ("10/second", MAX_AMOUNT + 1),
        ("10/second", 1.5),
        ("unlimited", 5),
        ("10/second;5/minute", 5),
        (["10/second", "5/minute"], 5),
    ],
)
def test_a_burst_is_a_count_and_belongs_to_one_rate(value: str, burst: int) -> None:
    with pytest.raises(NotationError, match="burst"):
        parse_rates(value, burst)


def test_a_long_value_is_quoted_in_part() -> None:
    with pytest.raises(NotationError) as caught:
        parse_rates("x" * 100_000)
    assert len(caught.value.message) < 200


@pytest.mark.parametrize(
    ("text", "zone", "quota"),
    [
        ("10_000/day", "UTC", Quota(10_000, "day")),
        ("1 per month", "UTC", Quota(1, "month")),
        ("5/1days", "Europe/Berlin", Quota(5, "day", "Europe/Berlin")),
    ],
)
def test_a_quota_is_an_amount_per_day_or_month_of_a_zone(text: str, zone: str, quota: Quota) -> None:
    assert parse_quota(text, zone) == quota


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            "10/hour",
            "'10/hour' is not a quota: quotas are per calendar day or month; for another span of time use a rate",
        ),
        (
            "5/2day",
            "'5/2day' is not a quota: quotas are per calendar day or month; for another span of time use a rate",
        ),
        ("5/day;9/month", "'5/day;9/month' is not a quota: a quota is one amount per calendar day or month"),
        ("10/dya", "unknown time unit 'dya' in '10/dya'; did you mean 'day'?"),
        ("10", "'10' has no time unit; did you mean '10/day'?"),
        (10, "'10' has no time unit; did you mean '10/day'?"),
        ("0/day", "'0/day' lets nobody in; an amount is at least 1"),
        ("", "a quota is blank; write a quota such as 10_000/day"),
        (None, "a quota is blank; write a quota such as 10_000/day"),
        ("much", "'much' is not a quota; write a quota such as 10_000/day, or unlimited"),
        ("-1/day", "'-1/day' is negative; write a quota such as 10_000/day"),
    ],
)
def test_what_is_no_quota_is_refused_with_what_to_write(value: str, message: str) -> None:
    with pytest.raises(NotationError) as caught:
        parse_quota(value)
    assert (message, "E020") == (caught.value.message, caught.value.code)


@pytest.mark.parametrize(
    ("zone", "hint"),
    [
        ("europe/berln", "did you mean 'Europe/Berlin'?"),
        ("../../etc/passwd", "write one such as Europe/Berlin"),
        ("", "write one such as Europe/Berlin"),
        ("a\0b", "write one such as Europe/Berlin"),
        (5, "write one such as Europe/Berlin"),
    ],
)
def test_an_unknown_zone_is_refused_with_one_that_is_near(zone: str, hint: str) -> None:
    with pytest.raises(NotationError) as caught:
        parse_quota("1/day", zone)
    assert caught.value.message.endswith(hint)
    assert caught.value.code == "E021"


def test_a_machine_without_zones_is_told_to_install_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notation, "available_timezones", set)
    with pytest.raises(NotationError, match="pip install tzdata"):
        parse_quota("1/day", "Europe/Nowhere")


@pytest.mark.parametrize(
    ("text", "nanoseconds"),
    [
        ("250ms", 250_000_000),
        ("5s", 5 * SECOND),
        ("2m", 2 * MINUTE),
        ("1h", HOUR),
        ("1d", DAY),
        (" 1_000 seconds ", 1000 * SECOND),
    ],
)
def test_a_duration_is_a_count_of_units(text: str, nanoseconds: int) -> None:
    assert parse_duration(text) == nanoseconds


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("5", "'5' has no time unit; did you mean '5s'?"),
        (5, "'5' has no time unit; did you mean '5s'?"),
        ("0s", "'0s' is no time at all; write a duration such as 250ms or 5s"),
        ("-1s", "'-1s' is negative; write a duration such as 250ms or 5s"),
        ("1.5s", "'1.5s' is not whole; did you mean '1500ms'?"),
        ("1.00001s", "'1.00001s' is not a duration; write a duration such as 250ms or 5s"),
        ("5 sceonds", "unknown time unit 'sceonds' in '5 sceonds'; did you mean 'second'?"),
        ("", "a duration is blank; write a duration such as 250ms or 5s"),
        (None, "a duration is blank; write a duration such as 250ms or 5s"),
        (False, "'false' is not a duration; write a duration such as 250ms or 5s"),
        ("soon", "'soon' is not a duration; write a duration such as 250ms or 5s"),
        ("101year", "'101' in '101year' is too large; it is at most 100"),
    ],
)
def test_what_is_no_duration_is_refused_with_what_to_write(value: str, message: str) -> None:
    with pytest.raises(NotationError) as caught:
        parse_duration(value)
    assert (message, "E020") == (caught.value.message, caught.value.code)


@given(st.one_of(st.text(), st.integers(), st.floats(), st.none(), st.booleans(), st.lists(st.text(), max_size=3)))
def test_nothing_makes_a_notation_fail_in_any_other_way(value: object) -> None:
    parsers: list[Any] = [parse_rates, parse_quota, parse_duration]
    for parse in parsers:
        with suppress(NotationError):
            parse(value)


def test_a_word_too_long_to_be_a_slip_gets_no_suggestion() -> None:
    assert notation.suggestion("d" * 100, ["day"]) == ""
    assert notation.suggestion("xyz", ["day"]) == ""
