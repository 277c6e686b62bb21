"""The adaptive throttle: the formula of the SRE book, over two minutes, and never for what nobody knows yet."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seawall.client.throttle import SECOND, AdaptiveThrottle
from seawall.client.window import Window

ALWAYS, NEVER = 0.0, 1 - 2**-53
"""Draws that refuse whatever the probability is, and that refuse nothing."""


def fed(requests: int, accepts: int, now: int = 0, **settings: float) -> AdaptiveThrottle:
    throttle = AdaptiveThrottle(**settings)  # type: ignore[arg-type]
    for number in range(requests):
        assert throttle.admit(now, lambda: NEVER)
        throttle.record(now, accepted=number < accepts)
    return throttle


@given(st.integers(0, 400), st.integers(0, 400), st.sampled_from([1.0, 1.1, 1.5, 2.0, 4.0]))
def test_the_share_is_that_of_the_formula(requests: int, accepts: int, k: float) -> None:
    accepts = min(accepts, requests)
    expected = max(0.0, (requests - k * accepts) / (requests + 1)) if requests >= 20 else 0.0
    assert fed(requests, accepts, k=k).probability() == pytest.approx(min(0.9, expected))


def test_of_fewer_than_twenty_nothing_follows() -> None:
    throttle = fed(19, 0)
    assert (throttle.probability(), throttle.admit(0, lambda: ALWAYS)) == (0.0, True)
    throttle.record(0, accepted=False)
    assert throttle.probability() == 0.9
    assert not throttle.admit(0, lambda: ALWAYS)


def test_a_host_that_accepts_half_is_left_alone() -> None:
    throttle = fed(100, 50)
    assert all(throttle.admit(0, lambda: ALWAYS) for _ in range(1_000))


def test_a_hundred_under_way_are_not_refused_for_each_other_s_sake() -> None:
    """None of them has been accepted yet, because none has been answered."""
    throttle = AdaptiveThrottle()
    assert all(throttle.admit(0, lambda: ALWAYS) for _ in range(100))


def test_what_is_refused_here_counts_as_a_request() -> None:
    throttle = fed(100, 40)
    before = throttle.probability()
    assert [throttle.admit(0, lambda: ALWAYS) for _ in range(10)] == [False] * 10
    assert before == pytest.approx(20 / 101)
    assert throttle.probability() == pytest.approx(30 / 111)


def test_never_is_more_than_nine_in_ten_refused() -> None:
    throttle = fed(1_000, 0)
    assert throttle.probability() == 0.9
    draw = random.Random(1).random
    sent = sum(throttle.admit(0, draw) for _ in range(10_000))
    assert 900 <= sent <= 1_100
    assert throttle.probability() == 0.9
    assert throttle.admit(0, lambda: 0.9)
    assert not throttle.admit(0, lambda: math.nextafter(0.9, 0))


def test_what_is_sent_tends_to_k_times_what_is_accepted() -> None:
    """A host that takes 10 a second, and a client that wants 100."""
    throttle, draw, sent, taken = AdaptiveThrottle(), random.Random(1).random, 0, [0] * 600
    for number in range(100 * 600):
        second = number // 100
        now = number * SECOND // 100
        if throttle.admit(now, draw):
            sent += second >= 300
            is_accepted = taken[second] < 10 and draw() < 0.5
            taken[second] += is_accepted
            throttle.record(now, accepted=is_accepted)
    assert 1.8 <= sent / sum(taken[300:]) <= 2.6


def test_it_forgets_what_is_two_minutes_old() -> None:
    throttle = fed(100, 0)
    assert not throttle.admit(119 * SECOND, lambda: ALWAYS)
    # What it has refused in the meantime is one request, and one says nothing.
    assert (throttle.probability(119 * SECOND), throttle.probability(120 * SECOND)) == (0.9, 0.0)
    assert throttle.admit(120 * SECOND, lambda: ALWAYS)


def test_twenty_accepted_in_a_row_end_it() -> None:
    """Or what a spike of seconds has begun would go on for minutes, for what is refused here counts as well."""
    throttle = fed(1_000, 0)
    for _ in range(19):
        throttle.record(SECOND, accepted=True)
    assert throttle.probability() == 0.9
    throttle.record(SECOND, accepted=True)
    assert (throttle.probability(), throttle.admit(SECOND, lambda: ALWAYS)) == (0.0, True)


def test_nineteen_and_a_refusal_do_not() -> None:
    throttle = fed(1_000, 0)
    for number in range(100):
        throttle.record(SECOND, accepted=number % 20 != 19)
    assert throttle.probability() > 0.7


def test_a_host_that_is_well_again_soon_gets_everything() -> None:
    """Ten requests a second, of which one is sent."""
    throttle, draw = fed(1_000, 0), random.Random(1).random
    refused = 0
    for number in range(10 * 120):
        now = number * SECOND // 10
        if throttle.admit(now, draw):
            throttle.record(now, accepted=True)
        else:
            refused += now >= 40 * SECOND
    assert (refused, throttle.probability()) == (0, 0.0)


def test_a_clock_that_goes_back_changes_nothing() -> None:
    throttle = fed(100, 0, now=1_000 * SECOND)
    assert not throttle.admit(500 * SECOND, lambda: ALWAYS)
    throttle.record(0, accepted=True)
    assert throttle.probability() == 0.9
    assert throttle.admit(1_130 * SECOND, lambda: ALWAYS)


@pytest.mark.parametrize(
    "settings",
    [
        {"k": 0.9},
        {"k": math.nan},
        {"window": 0},
        {"window": math.nan},
        {"window": math.inf},
        {"most": 1.0},
        {"most": -0.1},
        {"least": 0},
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="k and least are at least 1"):
        AdaptiveThrottle(**settings)  # type: ignore[arg-type]


def test_it_says_how_it_stands() -> None:
    assert repr(fed(100, 40)) == "<AdaptiveThrottle 40/100 accepted, 0.20 refused>"


# The window that it counts in, and the breaker too


@given(st.lists(st.tuples(st.integers(-20, 400), st.integers(0, 1)), max_size=80), st.sampled_from([1, 7, 10, 12]))
def test_a_window_holds_what_is_young_and_nothing_that_is_old(events: list[tuple[int, int]], slices: int) -> None:
    """Against a list of all events, on a clock that may go back, which counts as standing still."""
    span, window, newest = 120, Window(120, slices, 2), 0
    noted: list[tuple[int, int]] = []
    for step, column in events:
        at = step if not noted else noted[-1][0] + step - 20
        window.add(at, column)
        newest = max(newest, at)
        noted.append((newest, column))
        one = span // slices
        for which in (0, 1):
            young = sum(then > newest - span + one and its == which for then, its in noted)
            not_old = sum(then > newest - span - one and its == which for then, its in noted)
            assert young <= window.totals[which] <= not_old
    window.clear()
    assert window.totals == [0, 0]
    assert repr(window) == "<Window [0, 0]>"
