"""What is tried again, after how long, and how much of the traffic that may be: the published cases of others."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calling import Outcome, caller, host_of, play
from seawall.client.budget import CAPACITY, COSTS, FLOOR, RATIO, RetryBudget
from seawall.client.retry import Failure, RetryPolicy, failure_of
from seawall.testing import ManualClock

# The standard mode of AWS SDKs, version 2.1 ("Retries SEP"), as the tests of botocore (tests/unit/retries/
# test_standard_retry_v2_1.py) and of the SDK for Swift (RetryIntegrationTests, case1 to case6) have it. Each row is
# what one attempt is answered, the tokens left when its retry was paid or its success counted, and the wait.

Row = tuple[int, int, float | None]
AWS: dict[str, tuple[dict[str, float], int, Sequence[Row]]] = {
    "succeeds after two retries": ({}, 500, [(500, 486, 0.05), (500, 472, 0.1), (200, 486, None)]),
    "fails as often as it may": ({}, 500, [(502, 486, 0.05), (502, 472, 0.1), (502, 472, None)]),
    "the quota ends": ({}, 14, [(500, 0, 0.05), (502, 0, None)]),
    "there is no quota": ({}, 0, [(500, 0, None)]),
    "waits grow": (
        {"attempts": 5},
        500,
        [(500, 486, 0.05), (500, 472, 0.1), (500, 458, 0.2), (500, 444, 0.4), (500, 444, None)],
    ),
    "waits grow up to a cap": (
        {"attempts": 5, "cap": 0.2},
        500,
        [(500, 486, 0.05), (500, 472, 0.1), (500, 458, 0.2), (500, 444, 0.2), (500, 444, None)],
    ),
    "throttling costs 5 and waits seconds": ({}, 500, [(429, 495, 1.0), (429, 490, 2.0), (200, 495, None)]),
    "each failure costs its own": ({}, 500, [(500, 486, 0.05), (429, 481, 2.0), (200, 486, None)]),
    "a success without a retry gives one": ({}, 480, [(200, 481, None)]),
    "nobody has more than there are": ({}, 500, [(200, 500, None)]),
}


@pytest.mark.parametrize("name", AWS)
def test_the_cases_of_aws_standard_mode(name: str) -> None:
    settings, tokens, rows = AWS[name]
    clock = ManualClock()
    # Our second account, of a tenth of all requests, has no counterpart there: it is full here.
    budget = RetryBudget(floor=100, capacity=500)
    budget.tokens = tokens
    calls = caller(clock, retry=RetryPolicy(**settings), budget=lambda: budget)  # type: ignore[arg-type]
    seen: list[int] = []

    def outcomes() -> Iterator[int]:
        for number, (status, _, _) in enumerate(rows):
            if number:
                seen.append(budget.tokens)
            yield status

    played = play(calls, outcomes(), clock)
    seen.append(budget.tokens)
    assert seen == [left for _, left, _ in rows]
    assert played.slept == pytest.approx([wait for _, _, wait in rows if wait is not None])
    assert played.status == rows[-1][0]


@pytest.mark.parametrize(
    ("status", "hint", "theirs", "ours"),
    [
        # AWS clamps `x-amz-retry-after` (milliseconds) to what its backoff gives and five seconds more. Ours is a
        # standard header of hosts that mean it: a floor, with the jitter on top, so that not all come back at once.
        (500, "1.5", 1.5, 1.55),
        (500, "0", 0.05, 0.05),
        (500, "10", 5.05, 10.05),
        (500, "invalid", 0.05, 0.05),
    ],
)
def test_a_hint_is_a_floor_and_the_jitter_comes_on_top(status: int, hint: str, theirs: float, ours: float) -> None:
    clock = ManualClock()
    played = play(caller(clock), [(status, {"retry-after": hint}), 200], clock)
    assert played.slept == [pytest.approx(ours)]
    assert theirs <= ours


def test_an_answer_that_is_no_failure_is_a_success_to_the_budget() -> None:
    """To AWS a 400 is none, and gives nothing back; there, who asks what does not exist never earns again."""
    clock = ManualClock()
    budget = RetryBudget()
    budget.tokens = 5
    calls = caller(clock, budget=lambda: budget)
    play(calls, [404], clock)
    assert budget.tokens == 6


@pytest.mark.parametrize(("attempt", "most"), [*enumerate([0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 20, 20], 1)])
def test_the_ceiling_doubles_up_to_the_cap(attempt: int, most: float) -> None:
    assert RetryPolicy().ceiling(Failure.TRANSIENT, attempt) == pytest.approx(most)


@given(st.floats(0, 1, exclude_max=True), st.integers(1, 10), st.sampled_from([Failure.TRANSIENT, Failure.THROTTLED]))
def test_jitter_is_full(draw: float, attempt: int, failure: Failure) -> None:
    policy = RetryPolicy()
    wait = policy.wait(failure, attempt, None, None, lambda: draw)
    assert wait == pytest.approx(draw * policy.ceiling(failure, attempt))


# gRPC, proposal A6 ("gRPC Retry Design"): {maxAttempts: 4, initialBackoff: .1s, maxBackoff: 1s, backoffMultiplier: 2,
# retryableStatusCodes: [UNAVAILABLE]}; UNAVAILABLE is 503 here, and what is no failure of the host is fatal there.

A6 = RetryPolicy(attempts=4, base=0.1, throttled_base=0.1, cap=1.0)


@pytest.mark.parametrize(
    ("outcomes", "waits", "attempts"),
    [
        ([200], [], 1),
        ([503, 200], [0.1], 2),
        ([503, 503, 200], [0.1, 0.2], 3),
        ([503, 503, 503, 503], [0.1, 0.2, 0.4], 4),
        ([400], [], 1),
        ([503, 400], [0.1], 2),
        ([501], [], 1),
    ],
)
def test_the_cases_of_grpc_a6(outcomes: Sequence[Outcome], waits: list[float], attempts: int) -> None:
    clock = ManualClock()
    played = play(caller(clock, retry=A6), outcomes, clock)
    assert played.slept == pytest.approx(waits)
    assert [sent.headers.get("x-retry-attempt") for sent in played.sent] == [None, "1", "2", "3"][:attempts]
    assert played.status == outcomes[-1]


@pytest.mark.parametrize(
    ("pushback", "theirs", "ours"),
    [
        ("1", "after 1 s", 1.1),
        ("0", "at once", 0.1),
        # Who is told a time by hand is told one; what no human can have meant comes from something broken on the way,
        # and is no reason to give up. "Never" is said by a long time: see the next test.
        ("-1", "never", 0.1),
        ("soon", "never", 0.1),
    ],
)
def test_pushback_is_waited_for(pushback: str, theirs: str, ours: float) -> None:
    clock = ManualClock()
    played = play(caller(clock, retry=A6), [(503, {"retry-after": pushback}), 200], clock)
    assert played.slept == [pytest.approx(ours)]


@pytest.mark.parametrize("pushback", ["31", "86400", "Fri, 31 Dec 9999 23:59:59 GMT", "9" * 50])
def test_pushback_of_more_than_anybody_waits_is_the_answer(pushback: str) -> None:
    clock = ManualClock()
    played = play(caller(clock, retry=A6), [(503, {"retry-after": pushback})], clock)
    assert (played.status, played.slept, played.ended) == (503, [], "hint")
    assert played.attempts == [503]


def test_the_backoff_goes_on_after_a_pushback() -> None:
    """In A6 it begins again. A host that has asked to wait and still fails is not asked more often for it."""
    clock = ManualClock()
    played = play(caller(clock, retry=A6), [503, (503, {"retry-after": "1"}), 503, 200], clock)
    assert played.slept == pytest.approx([0.1, 1.2, 0.4])


def test_the_deadline_holds_for_all_attempts_together() -> None:
    clock = ManualClock()
    played = play(caller(clock, retry=A6, timeout=1.0), [503, 503, 503], clock, took=0.2)
    # .2 + .1 + .2 + .2 + .2 = .9, and a wait of .4 does not fit any more.
    assert (played.status, played.slept, played.ended) == (503, pytest.approx([0.1, 0.2]), "deadline")


def test_a_few_failures_are_tried_again_and_many_are_not() -> None:
    """A6's throttle begins with 10 tokens and stops at 5: five failures. Ours: three retries, 42 of 50 tokens."""
    clock = ManualClock()
    calls = caller(clock)
    played = [play(calls, [503] * 3, clock) for _ in range(3)]
    assert [len(one.sent) for one in played] == [3, 2, 1]
    assert [one.ended for one in played] == ["attempts", "budget", "budget"]
    assert host_of(calls).budget.tokens == 50 - 3 * 14
    # A6's comes back with .1 for each success, ours with a tenth of a retry and a token.
    assert [play(calls, [200], clock).status for _ in range(5)] == [200] * 5
    assert len(play(calls, [503] * 2, clock).sent) == 1, "there are 13 tokens"
    assert play(calls, [200], clock).status == 200
    assert len(play(calls, [503, 200], clock).sent) == 2


# What is tried again


@pytest.mark.parametrize(
    ("status", "headers", "failure"),
    [
        *((status, {}, Failure.NONE) for status in (101, 200, 204, 301, 304, 400, 401, 403, 404, 408, 409, 418, 499)),
        *((status, {}, Failure.NONE) for status in (501, 505, 507, 511, 599)),
        *((status, {}, Failure.TRANSIENT) for status in (500, 502, 503, 504)),
        (429, {}, Failure.THROTTLED),
        (429, {"retry-after": "1"}, Failure.THROTTLED),
        (503, {"retry-after": "1"}, Failure.THROTTLED),
        (500, {"retry-after": "1"}, Failure.TRANSIENT),
    ],
)
def test_what_an_answer_is(status: int, headers: dict[str, str], failure: Failure) -> None:
    assert failure_of(status, headers) is failure


SAFE = ["GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE", "QUERY", "get", "delete"]


@pytest.mark.parametrize("method", SAFE)
def test_what_may_be_done_twice_is_tried_again(method: str) -> None:
    assert RetryPolicy().may_retry(method, idempotent=False, replayable=True, failure=Failure.TRANSIENT)


@pytest.mark.parametrize("method", ["POST", "PATCH", "CONNECT", "PURGE", "post", ""])
@pytest.mark.parametrize("failure", [Failure.TRANSIENT, Failure.THROTTLED, Failure.UNSENT])
def test_what_may_not_is_so_only_if_nobody_has_seen_it_or_it_says_so(method: str, failure: Failure) -> None:
    policy = RetryPolicy()
    unsent = failure is Failure.UNSENT
    assert policy.may_retry(method, idempotent=False, replayable=True, failure=failure) is unsent
    assert policy.may_retry(method, idempotent=True, replayable=True, failure=failure)


@pytest.mark.parametrize("method", [*SAFE, "POST"])
@pytest.mark.parametrize("failure", Failure)
def test_a_body_that_is_gone_is_never_sent_again(method: str, failure: Failure) -> None:
    assert not RetryPolicy().may_retry(method, idempotent=True, replayable=False, failure=failure)


@pytest.mark.parametrize(
    "settings",
    [
        {"attempts": 0},
        {"attempts": 11},
        {"base": -1},
        {"cap": math.nan},
        {"throttled_base": math.inf},
        {"longest": 3_601},
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        RetryPolicy(**settings)  # type: ignore[arg-type]


@given(
    st.sampled_from(Failure),
    st.integers(1, 10),
    st.none() | st.floats(0, 1e9),
    st.none() | st.floats(-10, 1e5),
    st.floats(0, 1),
)
def test_every_wait_is_in_time_and_not_before_the_hint(
    failure: Failure, attempt: int, hint: float | None, left: float | None, draw: float
) -> None:
    policy = RetryPolicy()
    wait = policy.wait(failure, attempt, hint, left, lambda: draw)
    if wait is None:
        assert (hint or 0) > policy.longest or (left is not None and left <= (hint or 0) + policy.cap)
    else:
        assert (hint or 0) <= wait <= min(policy.longest, hint or 0) + policy.cap
        assert left is None or wait < left


# The budget


def test_its_numbers_are_those_of_the_design() -> None:
    assert (RATIO, FLOOR, CAPACITY) == (0.1, 3, 50)
    assert COSTS == {Failure.UNSENT: 14, Failure.TRANSIENT: 14, Failure.THROTTLED: 5}


EVENTS = st.lists(
    st.sampled_from(["request", "success", "retried", "undo", Failure.UNSENT, Failure.TRANSIENT, Failure.THROTTLED]),
    max_size=300,
)


@given(
    EVENTS,
    st.sampled_from([0.0, 0.1, 0.25, 1 / 3, 1.0]),
    st.sampled_from([0, 1, 3, 20, 1_000]),
    st.sampled_from([0, 13, 14, 50, 500]),
)
def test_no_schedule_gets_more_retries_than_the_budget_allows(
    events: list[str | Failure], ratio: float, floor: int, capacity: int
) -> None:
    budget = RetryBudget(ratio, floor, capacity)
    requests = retries = 0
    paid: list[int] = []
    for event in events:
        if isinstance(event, Failure):
            cost = budget.withdraw(event)
            if cost is not None:
                assert cost == COSTS[event]
                paid.append(cost)
                retries += 1
        elif event == "request":
            budget.request()
            requests += 1
        elif event == "undo":
            if paid:
                budget.undo(paid.pop())
                retries -= 1
        else:
            budget.succeeded(paid.pop() if event == "retried" and paid else 0)
        assert retries <= floor + ratio * requests + 1e-6
        assert 0 <= budget.tokens <= capacity
        assert -1e-6 <= budget.earned <= max(floor, 1), "no more is saved up than there is to begin with"


@given(
    st.lists(st.lists(st.sampled_from([200, 404, 429, 500, 503, "break", "late"]), min_size=3, max_size=3), max_size=60)
)
def test_no_schedule_of_calls_makes_more_attempts_than_the_budget_allows(calls: list[list[int | str]]) -> None:
    """Through the core, with its deadlines, hints and cancellations."""
    clock = ManualClock()
    budget = RetryBudget()
    client = caller(clock, budget=lambda: budget, timeout=60.0)
    attempts = 0
    for number, outcomes in enumerate(calls, 1):
        told = [named(outcome) for outcome in outcomes]
        attempts += len(play(client, told, clock, took=0.01, stop_at=4 if number % 5 == 0 else None).sent)
        assert attempts <= number + FLOOR + RATIO * number + 1e-6
        assert 0 <= budget.tokens <= CAPACITY


def named(outcome: int | str) -> Outcome:
    if isinstance(outcome, int):
        return (outcome, {"retry-after": "1"}) if outcome == 429 else outcome
    return None if outcome == "late" else httpx2.ReadError("broken")


def test_a_storm_is_held_to_a_tenth_and_what_there_was_at_first() -> None:
    clock = ManualClock()
    calls = caller(clock)
    attempts = sum(len(play(calls, [503] * 3, clock).sent) for _ in range(10_000))
    # Nothing succeeds, so nothing is earned back of the tokens: three retries, and not a thousand.
    assert attempts == 10_003


def test_a_storm_of_refusals_is_held_to_what_succeeds() -> None:
    clock = ManualClock()
    calls = caller(clock, random=lambda: 0.0)
    attempts = 0
    for number in range(10_000):
        refused = number % 2 == 0
        attempts += len(play(calls, [429] * 3 if refused else [200], clock).sent)
    assert 10_900 <= attempts <= 11_003


@pytest.mark.parametrize(("ratio", "floor", "capacity"), [(-0.1, 3, 50), (1.1, 3, 50), (0.1, -1, 50), (0.1, 3, -1)])
def test_a_budget_that_makes_no_sense_is_refused(ratio: float, floor: float, capacity: int) -> None:
    with pytest.raises(ValueError, match="ratio is 0 to 1"):
        RetryBudget(ratio, floor, capacity)


@pytest.mark.parametrize("values", [(math.nan, 3), (0.1, math.nan), (0.1, 3, math.nan), (0.1, 3, math.inf)])
def test_a_budget_of_no_number_is_refused(values: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="ratio is 0 to 1"):
        RetryBudget(*values)  # type: ignore[arg-type]


def test_it_says_what_is_left() -> None:
    assert repr(RetryBudget()) == "<RetryBudget 3.0 retries, 50/50 tokens>"
