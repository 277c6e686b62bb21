"""The breaker of a shared store: open at the first failure, one probe at a time, closed by what succeeds."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seawall.backends.breaker import Breaker
from seawall.rate import SECOND
from seawall.testing import ManualClock

INTERVAL = SECOND // 4


def breaker(clock: ManualClock, random: float = 0.5) -> Breaker:
    return Breaker(clock, lambda: random, interval_ns=INTERVAL)


def test_it_opens_at_the_first_failure(clock: ManualClock) -> None:
    node = breaker(clock)
    assert node.closed
    assert node.fail("timeout")
    assert not node.closed


def test_only_the_failure_that_opens_it_says_so(clock: ManualClock) -> None:
    node = breaker(clock)
    assert [node.fail("timeout") for _ in range(3)] == [True, False, False]
    assert node.statistics()["opened"] == 1


def test_a_success_closes_it_and_says_so_once(clock: ManualClock) -> None:
    node = breaker(clock)
    assert not node.succeed()
    node.fail("timeout")
    assert [node.succeed(), node.succeed()] == [True, False]
    assert node.closed


def test_a_closed_breaker_sends_no_probe(clock: ManualClock) -> None:
    node = breaker(clock)
    clock.advance(60)
    assert not node.begin_probe()
    assert node.state == "closed"


@pytest.mark.parametrize(("random", "expected"), [(0.0, 0.8), (0.5, 1.0), (1.0, 1.2)])
def test_a_probe_is_due_after_the_interval_with_its_jitter(clock: ManualClock, random: float, expected: float) -> None:
    node = breaker(clock, random)
    node.fail("refused")
    assert node.probe_in() == int(INTERVAL * expected)
    clock.advance_ns(node.probe_in() - 1)
    assert not node.begin_probe()
    clock.advance_ns(1)
    assert node.begin_probe()


def test_one_probe_is_out_at_a_time(clock: ManualClock) -> None:
    node = breaker(clock)
    node.fail("timeout")
    clock.advance_ns(node.probe_in())
    assert [node.begin_probe(), node.begin_probe()] == [True, False]
    assert node.state == "half-open"
    assert not node.closed, "requests wait for what the probe says"


def test_a_failed_probe_opens_it_for_another_interval(clock: ManualClock) -> None:
    node = breaker(clock)
    node.fail("timeout")
    clock.advance_ns(node.probe_in())
    node.begin_probe()
    clock.advance_ns(INTERVAL // 10)
    assert not node.fail("refused"), "it was open before"
    assert (node.state, node.probe_in()) == ("open", INTERVAL)


def test_failures_of_calls_that_were_under_way_do_not_put_the_probe_off(clock: ManualClock) -> None:
    node = breaker(clock)
    node.fail("timeout")
    clock.advance_ns(INTERVAL // 2)
    node.fail("timeout")
    assert node.probe_in() == INTERVAL // 2


def test_a_probe_whose_loop_was_closed_is_replaced(clock: ManualClock) -> None:
    node = breaker(clock)
    node.fail("timeout")
    clock.advance_ns(node.probe_in())
    assert node.begin_probe()
    clock.advance_ns(node.probe_in())
    assert node.begin_probe()


def test_a_probe_that_is_overdue_is_due_now(clock: ManualClock) -> None:
    node = breaker(clock)
    node.fail("timeout")
    clock.advance(60)
    assert node.probe_in() == 0


def test_it_says_where_it_stands(clock: ManualClock) -> None:
    node = breaker(clock)
    assert node.statistics() == {"state": "closed", "reason": "", "opened": 0, "since": 0}
    assert repr(node) == "<Breaker closed>"
    clock.advance(1)
    node.fail("timeout")
    clock.advance(1)
    node.fail("refused")
    assert node.statistics() == {"state": "open", "reason": "refused", "opened": 1, "since": SECOND}
    assert repr(node) == "<Breaker open, last failure: refused>"
    node.succeed()
    assert node.statistics() == {"state": "closed", "reason": "refused", "opened": 1, "since": 2 * SECOND}


@given(
    st.lists(
        st.one_of(st.just("fail"), st.just("succeed"), st.just("probe"), st.integers(1, 2 * INTERVAL)),
        max_size=40,
    ),
    st.lists(st.floats(0, 1), min_size=1),
)
def test_whatever_happens_probes_are_rare_and_never_end(events: list[str | int], draws: list[float]) -> None:
    clock = ManualClock()
    turn = iter(range(10**6))
    node = Breaker(clock, lambda: draws[next(turn) % len(draws)], interval_ns=INTERVAL)
    probes: list[int] = []
    for event in events:
        if event == "fail":
            node.fail("timeout")
        elif event == "succeed":
            if node.succeed():
                probes.clear()  # a new outage begins a new count
        elif event == "probe":
            if node.begin_probe():
                probes.append(clock())
        elif isinstance(event, int):
            clock.advance_ns(event)
        assert node.closed == (node.state == "closed")
        if not node.closed:
            assert 0 <= node.probe_in() <= 1.2 * INTERVAL, "the next probe is never further away than one interval"
    assert all(later - earlier >= int(0.8 * INTERVAL) for earlier, later in pairwise(probes))
