"""The laws, against what their docstrings say: windows with numbers, by hand; and what holds for any windows at all."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import exp, inf, log, log2
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from seawall.overload.laws import (
    REASONS,
    UNKNOWN,
    AimdLaw,
    FixedLimit,
    Gradient2Law,
    LagLaw,
    LatencyLaw,
    Limit,
    Window,
    geometric_mean,
)

MS = 1_000_000
SECOND = 1_000 * MS
T = 10 * MS
WINDOW = 300 * MS


def follow(law: Limit, steps: Iterable[tuple[Window, float, str]]) -> None:
    """Tell a law of windows; each comes with the limit and the reason after it."""
    for number, (window, limit, reason) in enumerate(steps):
        before = law.limit
        changed = law.observe(window)
        assert (law.limit, law.reason) == (pytest.approx(limit, rel=1e-4), reason), f"after window {number}, {window}"
        assert changed == (law.limit != before)


# By the lag of the loop


def lagged(lag: float, peak: int, worst: float = 0.0) -> Window:
    """A window with a lag in targets."""
    return Window(lag=round(lag * T), worst=round(worst * T), peak=peak)


def test_the_law_of_the_lag_follows_its_formula() -> None:
    follow(
        LagLaw(20, 2, 1000, T),
        [
            (lagged(0.2, 20), 40, "cold_start"),
            (lagged(0.2, 39), 40 + log2(40) * 0.8, "growth"),  # not reached, but in use
            (lagged(0.2, 60), 2 * (40 + log2(40) * 0.8), "cold_start"),
            (lagged(0.2, 100, worst=0.3), 88.515 + log2(88.515) * 0.8, "growth"),  # one beat was late
            (lagged(1.5, 50), 51 * 0.9, "lag"),
            (lagged(2.0, 100), 45.9 * 0.8, "lag"),  # from what was in flight, if that is less than the limit
            (lagged(9.0, 100), 36.72 * 0.6, "lag"),  # two fifths at most
            (lagged(0.1, 30), 22.032 + log2(22.032) * 0.9, "growth"),  # there is no second cold start
            (lagged(1.0, 30), 26.046 + 1, "growth"),
        ],
    )


def test_a_limit_that_nobody_reaches_does_not_grow() -> None:
    law = LagLaw(20, 2, 1000, T)
    assert not law.observe(lagged(0, 9))
    assert law.observe(lagged(0, 10))
    assert law.limit == pytest.approx(20 + log2(20))


def test_a_window_without_a_sample_teaches_nothing() -> None:
    law = LagLaw(20, 2, 1000, T)
    assert not law.observe(Window(lag=UNKNOWN, peak=50))
    assert (law.limit, law.cold) == (20, True)


def test_the_first_congestion_ends_the_cold_start() -> None:
    law = LagLaw(20, 2, 1000, T)
    law.observe(lagged(1.1, 20))
    for _ in range(50):
        before = law.limit
        law.observe(lagged(0, 1000))
        assert law.limit <= before + max(1, log2(before)) + 1e-9


@given(st.floats(1, 1000), st.integers(1, 1000))
def test_a_loop_that_is_well_again_gives_everything_back(limit: float, least: int) -> None:
    """At least one for every window in which the limit is reached."""
    law = LagLaw(limit, least, 1000, T)
    for _ in range(20):
        law.observe(lagged(9, 0))
    windows = 0
    while law.limit < law.most:
        law.observe(lagged(0.9, int(law.limit)))
        windows += 1
        assert windows <= 1000 - least + 1


# By latency


def answered(milliseconds: float, in_flight: float, peak: int | None = None, samples: int = 50) -> Window:
    return Window(
        latency=milliseconds * MS,
        in_flight=in_flight,
        peak=int(in_flight) if peak is None else peak,
        samples=samples,
        duration=WINDOW,
    )


def learned(usual: float, most: float = 1000) -> LatencyLaw:
    """A law that has seen enough to know how long requests take."""
    law = LatencyLaw(4, most)
    for _ in range(LatencyLaw.LEARNS):
        assert not law.observe(answered(usual, 5))
    return law


def test_the_law_of_latency_learns_what_is_usual_while_it_is_open() -> None:
    law = LatencyLaw(4, 1000)
    for number in range(LatencyLaw.LEARNS):
        assert not law.observe(answered(8 if number % 2 else 12, 5))
    found = [law.baseline / MS]
    for milliseconds in (12, 8, 19):
        assert not law.observe(answered(milliseconds, 5))
        found.append(law.baseline / MS)
    assert found == pytest.approx([10, 10.1, 10.1 - 2.1 / 5, 9.68 + 9.32 / 20])
    assert law.open


def test_nobody_is_refused_before_it_is_known_what_is_usual() -> None:
    """What ends first after a start is what is quick."""
    law = LatencyLaw(4, 1000)
    for number in range(LatencyLaw.LEARNS):
        assert not law.observe(answered(1 + 50 * number, 50))
    assert law.open


def closed(usual: float = 8.4, latency: float = 20, peak: int = 40) -> LatencyLaw:
    """A law that has just closed."""
    law = learned(usual)
    assert law.observe(answered(latency, peak * 0.75, peak))
    assert (law.limit, law.reason) == (max(peak / 2, 4), "latency")
    return law


def test_the_law_of_latency_stays_open_up_to_twice_the_usual() -> None:
    law = learned(10)
    assert not law.observe(answered(20, 500))
    assert law.observe(answered(21.1, 500))  # of 10.5, which it is now


def test_the_law_of_latency_goes_down_while_that_helps_and_up_again() -> None:
    """A queue of our own: latency falls as fewer are sent."""
    law = closed()
    follow(
        law,
        [
            (answered(20, 25), 20, "latency"),  # more than L are still under way
            (answered(20, 20), 16, "latency"),  # the first step has nothing to be compared with
            (answered(16, 16), 16 * 0.8, "latency"),  # log R has fallen as much as log N
            (answered(13.5, 12), 12.8 * 0.8, "latency"),  # more than half as much
        ],
    )
    assert law.knee == 16
    follow(
        law,
        [
            (answered(10.9, 10), 10.24 * 1.5 + 1, "relax"),  # within 1.3 of 8.4
            (answered(12, 11), 16.36 * 0.8, "latency"),
            (answered(12, 9), 13.088 * 1.05 + 1, "rebaseline"),  # it has not helped
            (answered(12, 15), 14.7424 * 1.05 + 1, "relax"),
            (answered(15, 3), 16.47952 * 1.5 + 1, "relax"),  # not in use
        ],
    )
    assert law.baseline == 12 * MS


def test_a_downstream_that_has_become_slower_by_itself_is_left_alone() -> None:
    """Fewer requests did not make it faster, so they are not what is slow about it."""
    law = closed(latency=60)
    follow(
        law,
        [
            (answered(60, 20), 16, "latency"),
            (answered(60, 16), 16 * 1.2 + 1, "rebaseline"),
            (answered(60, 20), 20.2 * 1.2 + 1, "relax"),
        ],
    )
    assert (law.baseline, law.knee) == (60 * MS, inf)
    windows = 0
    while not law.open:
        law.observe(answered(60, law.limit))
        windows += 1
    assert windows < 30


def test_far_above_the_knee_it_goes_down_by_half_and_below_it_quickly_up() -> None:
    law = closed(usual=10, latency=210, peak=400)
    follow(
        law,
        [
            (answered(210, 200), 200, "latency"),  # 2 R have not passed yet
            (answered(210, 200), 100, "latency"),  # more than twenty times the usual
            (answered(105, 100), 80, "latency"),
            (answered(100, 80), 80 * 1.5 + 1, "rebaseline"),
            (answered(100, 121), 121 * 1.5 + 1, "relax"),
            (answered(100, 182), 182.5 * 1.05 + 1, "relax"),
        ],
    )
    assert law.knee == 200


def test_nothing_is_judged_before_what_was_sent_after_the_step_can_have_ended() -> None:
    law = closed(latency=2_000)
    judged = [law.observe(answered(2_000, 20)) for _ in range(14)]
    assert judged == [False] * 13 + [True]  # 4 s are 13 windows and a third


def test_latency_near_the_usual_relaxes_whatever_else() -> None:
    law = closed()
    assert law.observe(answered(10.9, 200))  # within 1.3 of 8.4, although more than L are under way, and at once
    assert (law.limit, law.reason) == (pytest.approx(20 * 1.5 + 1), "relax")


@pytest.mark.parametrize(
    ("samples", "dropped", "lowers"),
    [(0, 1, False), (0, 2, True), (38, 2, False), (37, 3, True), (57, 3, False), (56, 3, True), (950, 50, False)],
)
def test_more_than_a_twentieth_of_drops_lowers_the_limit(samples: int, dropped: int, lowers: bool) -> None:
    law = LatencyLaw(4, 1000)
    window = Window(samples=samples, dropped=dropped, latency=10.0 * MS if samples else 0.0, in_flight=50.0, peak=60)
    assert law.observe(window) == lowers
    assert law.limit == (pytest.approx(54) if lowers else 1000)
    if lowers:
        assert law.reason == "drop"
        law.observe(Window(samples=samples, dropped=dropped, latency=10.0 * MS, in_flight=50.0, peak=80))
        assert law.limit == pytest.approx(54 * 0.9)


def test_without_samples_it_relaxes() -> None:
    law = closed()
    follow(
        law,
        [
            (Window(peak=18, samples=9, latency=999.0 * MS, in_flight=18), 20 * 1.2 + 1, "relax"),
            (Window(peak=0), 25 * 1.5 + 1, "relax"),
        ],
    )


@pytest.mark.parametrize("most", [4, 10])
def test_a_law_that_its_bounds_keep_open_does_not_say_that_it_has_changed(most: int) -> None:
    law = learned(10, most)
    for milliseconds in (10, 100, 1_000, 10):
        assert not law.observe(answered(milliseconds, 30))
    assert law.limit == most


# What was


def test_gradient2_follows_its_formula() -> None:
    law = Gradient2Law(20, 4, 1000)
    follow(
        law,
        [
            (answered(10, 20), 0.8 * 20 + 0.2 * (20 + 4), "growth"),
            # long = 25, a gradient of 1.5 * 25 / 40
            (answered(40, 20), 0.8 * 20.8 + 0.2 * (20.8 * 0.9375 + 4), "growth"),
            # long = 50, a gradient of .75
            (answered(100, 20), 0.8 * 21.34 + 0.2 * (21.34 * 0.75 + 4), "latency"),
            (answered(100, 5), 21.073, "latency"),  # fewer than L / 2 in flight
            (Window(peak=99), 21.073, "latency"),  # nobody has ended
        ],
    )


def test_gradient2_s_gradient_is_between_a_half_and_one() -> None:
    law = Gradient2Law(100, 4, 1000)
    law.observe(answered(10, 100))
    before = law.limit
    law.observe(answered(100_000, 200))
    assert law.limit == pytest.approx(0.8 * before + 0.2 * (0.75 * before + 4), rel=1e-4)  # long is half of it
    for _ in range(8):
        law.observe(answered(10, 200))
    before = law.limit
    law.observe(answered(1_000_000, 200))
    assert law.limit >= 0.9 * before


def test_gradient2_s_long_average_falls_faster_while_it_is_twice_the_latency() -> None:
    law = Gradient2Law(20, 4, 1000)
    law.observe(answered(100, 5))
    law.observe(answered(10, 5))
    assert law._long == pytest.approx((100 + 10) / 2 * 0.95 * MS)


def test_gradient2_s_average_becomes_slow_after_ten_windows() -> None:
    law = Gradient2Law(20, 4, 1000)
    for _ in range(10):
        law.observe(answered(10, 5))
    law.observe(answered(15, 5))
    assert law._long == pytest.approx((10 + 5 * 2 / 601) * MS)


def test_aimd_follows_its_formula() -> None:
    follow(
        AimdLaw(20, 4, 1000, T),
        [
            (lagged(0.5, 10), 21, "growth"),
            (lagged(1.0, 10), 21, "growth"),  # not in use
            (lagged(1.1, 10), 21 * 0.9, "lag"),
            (Window(lag=0, peak=99, dropped=1), 18.9 * 0.9, "drop"),
            (Window(lag=UNKNOWN, peak=99), 17.01 + 1, "growth"),
        ],
    )


@pytest.mark.parametrize(("initial", "limit"), [(7, 7), (0, 1), (5_000, 1_000)])
def test_a_fixed_limit_stays(initial: int, limit: int) -> None:
    law = FixedLimit(initial, 1, 1_000)
    assert not law.observe(Window(lag=SECOND, peak=9, dropped=9))
    assert (law.limit, law.reason) == (limit, "start")


def test_a_mean_of_logarithms_is_moved_little_by_one_slow_request() -> None:
    values = [10.0] * 99 + [10_000.0]
    assert geometric_mean(sum(map(log, values)), 100) == pytest.approx(10 * exp(log(1_000) / 100))
    assert geometric_mean(0.0, 0) == 0


# Any windows at all

WINDOWS = st.builds(
    lambda ended, **other: Window(samples=ended[0], latency=ended[1], **other),
    ended=st.one_of(
        st.just((0, 0.0)),
        st.tuples(
            st.integers(1, 5_000), st.one_of(st.floats(1, 1e12), st.sampled_from([8.0 * MS, 10.0 * MS, 50.0 * MS]))
        ),
    ),
    lag=st.one_of(st.just(UNKNOWN), st.integers(0, 100 * T), st.sampled_from([T, T // 4])),
    worst=st.integers(0, 100 * T),
    peak=st.integers(0, 3_000),
    in_flight=st.floats(0, 3_000),
    dropped=st.one_of(st.just(0), st.integers(0, 50)),
    duration=st.integers(1, 10 * SECOND),
)
BOUNDS = st.tuples(st.integers(1, 50), st.integers(0, 2_000), st.integers(0, 2_000)).map(
    lambda drawn: (drawn[0] + min(drawn[1], drawn[2]), drawn[0], drawn[0] + drawn[1])
)
LAWS: dict[str, Callable[[int, int, int], Any]] = {
    "lag": LagLaw,
    "latency": lambda initial, least, most: LatencyLaw(least, most),
    "gradient2": Gradient2Law,
    "aimd": AimdLaw,
    "fixed": FixedLimit,
}


@pytest.mark.parametrize("name", LAWS)
@given(bounds=BOUNDS, windows=st.lists(WINDOWS, max_size=40))
def test_a_limit_never_leaves_its_bounds_and_says_when_it_moves(
    name: str, bounds: tuple[int, int, int], windows: list[Window]
) -> None:
    _, least, most = bounds
    law = LAWS[name](*bounds)
    assert least <= law.limit <= most
    for window in windows:
        before = law.limit
        changed = law.observe(window)
        assert least <= law.limit <= most
        assert changed == (law.limit != before)
        assert law.reason in REASONS


def opens(law: LatencyLaw, window: Callable[[float], Window], within: int) -> None:
    windows = 0
    while not law.open:
        law.observe(window(law.limit))
        windows += 1
        assert windows <= within, law


@given(st.lists(WINDOWS, max_size=30), st.integers(0, 9), st.integers(0, 5_000))
def test_whatever_has_happened_a_law_opens_by_itself_when_nobody_comes(
    windows: list[Window], samples: int, peak: int
) -> None:
    """Few requests are nobody as well, however slow, and however many of them are under way."""
    law = LatencyLaw(4, 1000)
    for window in windows:
        law.observe(window)
    opens(law, lambda limit: Window(samples=samples, latency=9e11 if samples else 0.0, peak=peak), 120)


@given(st.lists(WINDOWS, max_size=30), st.floats(0.1, 1.3))
def test_whatever_has_happened_a_law_opens_when_latency_is_what_it_was(windows: list[Window], part: float) -> None:
    law = LatencyLaw(4, 1000)
    law.observe(answered(10, 5))
    for window in windows:
        if window.latency >= 10 * MS:
            law.observe(window)
    opens(law, lambda limit: answered(10 * part, limit), 120)


CONGESTED = st.builds(
    lambda milliseconds, in_flight, more, samples, dropped: Window(
        latency=milliseconds * MS if samples else 0.0,
        in_flight=in_flight,
        peak=int(in_flight) + more,
        samples=samples,
        dropped=dropped,
        duration=WINDOW,
    ),
    st.sampled_from([1.0, 5.0, 10.0, 20.0, 30.0, 100.0, 400.0]),
    st.floats(1, 40),
    st.integers(0, 10),
    st.sampled_from([0, 50, 50, 50]),
    st.sampled_from([0, 0, 0, 20]),
)
DROPS = Window(peak=5, dropped=20, duration=WINDOW)


@given(st.lists(CONGESTED, max_size=15), st.floats(1, 100), st.integers(8, 500))
@example([DROPS], 10.0, 8)
def test_whatever_has_happened_a_law_makes_room_for_a_steady_demand(
    windows: list[Window], milliseconds: float, demand: int
) -> None:
    """A service that takes as long as it takes, whatever is sent there, is not short: nobody is refused for ever."""
    law = LatencyLaw(4, 1000)
    for window in windows:
        law.observe(window)
    passed = 0
    while not law.open and law.limit <= demand:
        under_way = min(int(law.limit), demand)
        law.observe(answered(milliseconds, under_way, samples=int(under_way * WINDOW / MS / milliseconds)))
        passed += 1
        assert passed <= 200, law


def test_a_law_is_told_from_another_by_its_repr() -> None:
    assert repr(LagLaw(20, 2, 1000)) == "<LagLaw 20.0 of 2..1000, start>"
    assert repr(closed()) == "<LatencyLaw 20.0 of 4..1000, latency>"
    assert repr(Window(lag=5, peak=3, samples=2, latency=7.0)) == "<Window lag 5 ns, peak 3, 2 samples of 7 ns>"
