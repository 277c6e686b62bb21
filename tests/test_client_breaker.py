"""The client's circuit breaker: opens when half has failed, lets more through by degrees, and does not flap."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seawall.client.breaker import SECOND, CircuitBreaker, State

MILLISECOND = SECOND // 1_000


def tell(breaker: CircuitBreaker, now: int, failed: int, succeeded: int = 0, took: int = 0) -> None:
    """Calls that end at one time, the successes first."""
    for number in range(succeeded + failed):
        breaker.record(now, failed=number >= succeeded, took=took)


def opened(now: int = 0, **settings: float) -> CircuitBreaker:
    breaker = CircuitBreaker(**settings)  # type: ignore[arg-type]
    tell(breaker, now, failed=20)
    assert breaker.state is State.OPEN
    return breaker


# Opening


@pytest.mark.parametrize(
    ("failed", "succeeded", "state"),
    [
        (10, 10, State.OPEN),
        (9, 11, State.CLOSED),
        (19, 0, State.CLOSED),
        (20, 0, State.OPEN),
        (49, 51, State.CLOSED),
        (50, 50, State.OPEN),
        (50, 51, State.CLOSED),
    ],
)
def test_it_opens_at_half_of_at_least_twenty(failed: int, succeeded: int, state: State) -> None:
    breaker = CircuitBreaker()
    tell(breaker, 0, failed, succeeded)
    assert breaker.state is state


def test_the_twentieth_call_may_be_a_success() -> None:
    breaker = CircuitBreaker()
    tell(breaker, 0, failed=19)
    assert breaker.record(0, failed=False)
    assert breaker.state is State.OPEN


def test_ten_seconds_are_looked_at() -> None:
    breaker = CircuitBreaker()
    tell(breaker, 0, failed=19)
    tell(breaker, 10 * SECOND, failed=1)
    assert breaker.state is State.CLOSED
    breaker = CircuitBreaker()
    tell(breaker, 0, failed=19)
    tell(breaker, 9 * SECOND, failed=1)
    assert breaker.state is State.OPEN


@given(st.lists(st.tuples(st.integers(0, 3_000), st.booleans()), max_size=150))
def test_it_is_closed_exactly_as_long_as_less_than_half_has_failed(calls: list[tuple[int, bool]]) -> None:
    breaker, now, noted = CircuitBreaker(), 0, []
    for later, failed in calls:
        now += later * MILLISECOND
        breaker.record(now, failed=failed)
        noted.append((now // SECOND, failed))
        young = [its for second, its in noted if second > now // SECOND - 10]
        opens = len(young) >= 20 and sum(young) >= len(young) / 2
        assert (breaker.state is State.OPEN) is opens
        if opens:
            break


def test_slow_calls_open_it_as_failures_do() -> None:
    breaker = CircuitBreaker(slow=1.0, slow_calls=0.8)
    tell(breaker, 100 * SECOND, failed=0, succeeded=4, took=SECOND - 1)
    tell(breaker, 100 * SECOND, failed=0, succeeded=15, took=SECOND)
    assert breaker.state is State.CLOSED
    assert breaker.record(100 * SECOND, failed=False, took=SECOND)
    assert breaker.state is State.OPEN


def test_without_a_bound_nothing_is_slow() -> None:
    breaker = CircuitBreaker()
    tell(breaker, 10**6 * SECOND, failed=0, succeeded=100, took=10**5 * SECOND)
    assert breaker.state is State.CLOSED


# Open


def test_while_it_is_open_nothing_is_sent_and_it_says_until_when() -> None:
    breaker = opened()
    assert not any(breaker.admit(now * MILLISECOND) for now in range(5_000))
    assert breaker.retry_after(0) == 5.0
    assert breaker.retry_after(4 * SECOND) == 1.0
    assert breaker.admit(5 * SECOND)
    assert breaker.retry_after(5 * SECOND) == 0.0


def test_calls_from_before_it_opened_change_nothing() -> None:
    breaker = opened(now=100 * SECOND)
    for _ in range(50):
        assert not breaker.record(101 * SECOND, failed=True, took=5 * SECOND)
    assert breaker.admit(105 * SECOND)
    for _ in range(50):
        # Begun before, ended by a time-out after the first probe has gone out.
        assert not breaker.record(106 * SECOND, failed=True, took=10 * SECOND)
    assert (breaker.state, breaker.pause) == (State.RAMPING, 5 * SECOND)


def test_calls_from_the_ramp_do_not_open_it_after_it_has_closed() -> None:
    breaker = opened()
    breaker.admit(5 * SECOND)
    breaker.record(15 * SECOND, failed=False, took=0)
    assert breaker.state is State.CLOSED
    tell(breaker, 16 * SECOND, failed=50, took=2 * SECOND)
    assert breaker.state is State.CLOSED
    tell(breaker, 16 * SECOND, failed=20, took=SECOND // 2)
    assert breaker.state is State.OPEN


# Closing by degrees


def ramp(breaker: CircuitBreaker, begin: int, per_second: int = 1_000) -> list[float]:
    """The shares that are let through, by second, of calls that all succeed."""
    shares = []
    for second in range(10):
        admitted = 0
        for number in range(per_second):
            now = begin + second * SECOND + number * SECOND // per_second
            if breaker.admit(now):
                admitted += 1
                breaker.record(now, failed=False)
        shares.append(admitted / per_second)
    return shares


def test_the_share_goes_from_a_twentieth_to_all_in_ten_seconds() -> None:
    breaker = opened()
    shares = ramp(breaker, 5 * SECOND)
    # The mean of each second on the line from .05 to 1.
    assert shares == pytest.approx([0.05 + 0.095 * (second + 0.5) for second in range(10)], abs=0.01)
    assert breaker.state is State.RAMPING
    assert breaker.admit(15 * SECOND)
    assert breaker.record(15 * SECOND, failed=False)
    assert breaker.state is State.CLOSED
    assert all(breaker.admit(16 * SECOND) for _ in range(100))


def test_a_host_that_nobody_has_called_for_long_is_called_by_degrees_too() -> None:
    breaker = opened()
    assert sum(breaker.admit(3_600 * SECOND) for _ in range(100)) == 5 + 1


def test_one_success_of_a_probe_closes_nothing() -> None:
    breaker = opened()
    assert breaker.admit(5 * SECOND)
    assert not breaker.record(5 * SECOND, failed=False)
    assert sum(breaker.admit(5 * SECOND) for _ in range(100)) == 5


def test_five_calls_of_which_half_fail_open_it_again_for_twice_as_long() -> None:
    breaker = opened()
    breaker.admit(5 * SECOND)
    tell(breaker, 5 * SECOND, failed=2, succeeded=2)
    assert breaker.state is State.RAMPING
    assert breaker.record(5 * SECOND, failed=True)
    assert (breaker.state, breaker.pause) == (State.OPEN, 10 * SECOND)
    assert not breaker.admit(15 * SECOND - 1)
    assert breaker.admit(15 * SECOND)


def test_few_calls_that_all_fail_do_not_close_it() -> None:
    """Whoever calls once in seven seconds has made two by the end of the ramp."""
    breaker = opened()
    for now in (5, 12):
        assert breaker.admit(now * SECOND) is (now == 5)
        breaker.record(now * SECOND, failed=True)
    assert breaker.admit(19 * SECOND)
    assert breaker.record(19 * SECOND, failed=True)
    assert breaker.state is State.OPEN


def test_slow_calls_on_the_ramp_are_failures() -> None:
    breaker = opened(slow=0.1)
    breaker.admit(5 * SECOND)
    tell(breaker, 6 * SECOND, failed=0, succeeded=5, took=SECOND // 10)
    assert breaker.state is State.OPEN


def test_the_pause_doubles_up_to_a_minute_and_is_short_again_after_as_long_a_peace() -> None:
    breaker, now, pauses = opened(), 0, []
    for _ in range(6):
        pauses.append(breaker.pause // SECOND)
        now += breaker.pause
        assert breaker.admit(now)
        tell(breaker, now, failed=5)
        assert breaker.state is State.OPEN
    assert pauses == [5, 10, 20, 40, 60, 60]
    now += breaker.pause
    assert ramp(breaker, now)[-1] > 0.9
    now += 10 * SECOND
    assert breaker.record(now, failed=False)
    tell(breaker, now + 60 * SECOND - 1, failed=20)
    assert breaker.pause == 60 * SECOND, "it was not closed for as long as it had been open"
    now += 60 * SECOND - 1 + breaker.pause
    assert ramp(breaker, now)[-1] > 0.9
    now += 10 * SECOND
    assert breaker.record(now, failed=False)
    tell(breaker, now + 60 * SECOND, failed=20)
    assert breaker.pause == 5 * SECOND


def test_what_was_admitted_and_never_recorded_does_not_wedge_it() -> None:
    breaker = opened()
    assert sum(breaker.admit(5 * SECOND + at * MILLISECOND) for at in range(20_000)) > 14_000
    assert breaker.state is State.RAMPING
    assert breaker.record(25 * SECOND, failed=False)
    assert breaker.state is State.CLOSED


def test_a_call_that_was_not_made_gives_its_place_to_the_next() -> None:
    breaker = opened()
    assert breaker.admit(5 * SECOND)
    assert not breaker.admit(5 * SECOND)
    breaker.forget()
    assert breaker.admit(5 * SECOND)
    for _ in range(50):
        breaker.forget()
    assert [breaker.admit(5 * SECOND) for _ in range(3)] == [True, False, False], "one place, and not fifty"


def test_forgetting_says_nothing_while_it_is_closed_or_open() -> None:
    breaker = CircuitBreaker()
    breaker.forget()
    tell(breaker, 0, failed=20)
    breaker.forget()
    assert not breaker.admit(SECOND)


@given(
    st.lists(
        st.tuples(st.integers(0, 5_000), st.sampled_from(["ok", "fail", "forget", "nothing"]), st.integers(0, 3_000)),
        max_size=200,
    )
)
def test_whatever_happens_it_opens_for_a_minute_at_most_and_then_lets_somebody_through(
    calls: list[tuple[int, str, int]],
) -> None:
    breaker, now = CircuitBreaker(), 0
    for later, end, took in calls:
        now += later * MILLISECOND
        if breaker.admit(now):
            now += took * MILLISECOND
            if end == "forget":
                breaker.forget()
            elif end != "nothing":
                breaker.record(now, failed=end == "fail", took=took * MILLISECOND)
        assert 5 * SECOND <= breaker.pause <= 60 * SECOND
    assert any(breaker.admit(now + 60 * SECOND) for _ in range(20))


# Servers that come and go, under a load of 100 calls a second


@dataclass(slots=True)
class Story:
    """What a breaker has done."""

    changes: list[tuple[float, State]] = field(default_factory=list)
    sent: list[int] = field(default_factory=list)
    """Calls, by second."""


def live(works: Callable[[float, int], bool], seconds: int, per_second: int = 100) -> Story:
    """``works`` is told the time, and how many calls of this second it has got."""
    breaker, story = CircuitBreaker(), Story()
    state = breaker.state
    for second in range(seconds):
        sent = 0
        for number in range(per_second):
            now = second * SECOND + number * SECOND // per_second
            if breaker.admit(now):
                sent += 1
                breaker.record(now, failed=not works(now / SECOND, sent))
            if breaker.state is not state:
                state = breaker.state
                story.changes.append((now / SECOND, state))
        story.sent.append(sent)
    return story


@pytest.mark.parametrize("period", [1.0, 2.0, 3.0, 5.0, 8.0])
def test_it_does_not_flap_with_a_server_that_does(period: float) -> None:
    """Down as long as it is up: ten minutes of it make a few changes, and not hundreds."""
    story = live(lambda now, _: now % (2 * period) >= period, 600)
    # At a minute's pause, and a ramp or less after it, that is 3 changes in 60 seconds, and some more on the way there.
    assert 3 <= len(story.changes) <= 3 * 600 / 60 + 9
    gaps = [after - before for (before, _), (after, _) in zip(story.changes, story.changes[1:], strict=False)]
    assert min(gaps) >= 0.5


def test_it_does_not_flap_with_a_server_that_fails_above_a_third_of_the_load() -> None:
    story = live(lambda _, sent: sent <= 30, 600)
    assert 3 <= len(story.changes) <= 3 * 600 / 60 + 9
    assert max(story.sent[100:]) <= 100


def test_it_opens_once_for_an_outage_and_all_are_sent_again_after_it() -> None:
    story = live(lambda now, _: not 10 <= now < 18, 60)
    assert [state for _, state in story.changes] == [State.OPEN, State.RAMPING, State.CLOSED]
    opens, ramps, closes = (at for at, _ in story.changes)
    assert opens == pytest.approx(15, abs=1), "when half of the last ten seconds was bad"
    assert ramps == pytest.approx(opens + 5, abs=0.02)
    assert closes == pytest.approx(ramps + 10, abs=0.02)
    assert story.sent[-20:] == [100] * 20


def test_after_the_longest_outage_all_are_sent_again_within_a_minute_and_a_ramp() -> None:
    story = live(lambda now, _: not 10 <= now < 600, 700)
    assert story.changes[-1][1] is State.CLOSED
    assert story.changes[-1][0] <= 600 + 60 + 11
    assert story.sent[-20:] == [100] * 20
    assert sum(story.sent[20:600]) <= 600, "and a dead server was asked once a second"


def test_a_server_that_fails_now_and_then_is_left_alone() -> None:
    calls = iter(range(10**6))
    story = live(lambda *_: next(calls) % 5 > 1, 120)
    assert (story.changes, story.sent) == ([], [100] * 120)


@pytest.mark.parametrize(
    "settings",
    [
        {"failures": 0},
        {"failures": 1.1},
        {"failures": math.nan},
        {"slow_calls": 0},
        {"calls": 0},
        {"window": 0},
        {"window": math.nan},
        {"pause": 0},
        {"pause": 61},
        {"ramp": 0},
        {"slow": 0},
        {"longest_pause": math.nan},
        {"longest_pause": math.inf},
        {"window": math.inf},
        {"slow": math.inf},
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        CircuitBreaker(**settings)  # type: ignore[arg-type]


def test_it_says_how_it_stands() -> None:
    assert [repr(CircuitBreaker()), repr(opened())] == ["<CircuitBreaker closed>", "<CircuitBreaker open>"]
