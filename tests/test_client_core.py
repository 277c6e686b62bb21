"""One call with all its attempts: what is sent, when, what comes of it, and that nothing stays behind."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calling import LIBRARIES, URL, Cancelled, Outcome, Played, caller, host_of, play, request
from seawall.client import errors
from seawall.client.breaker import CircuitBreaker, State
from seawall.client.budget import RetryBudget
from seawall.client.core import MOST_HOSTS, Attempt, Caller, Send
from seawall.client.host import MOST_ROUTES
from seawall.client.retry import RetryPolicy
from seawall.client.surroundings import Surroundings
from seawall.client.throttle import AdaptiveThrottle
from seawall.testing import ManualClock

LATE: Outcome = None
libraries = pytest.mark.parametrize("library", LIBRARIES, ids=lambda module: module.__name__)


def leave(played: Played) -> None:
    """Close the answer, if there is one to be closed."""
    if played.host is not None:
        played.host.leave()


# Retries


@libraries
def test_what_succeeds_is_sent_once_and_as_it_is(library: ModuleType, clock: ManualClock) -> None:
    sent = request(library=library, extensions={"timeout": {"connect": 0.5, "read": None, "write": 3.0, "pool": 1.0}})
    played = play(caller(clock, library=library), [200], clock, sent=sent)
    assert played.sent == [sent], "the same object"
    assert (played.status, played.attempts, played.slept, played.ended) == (200, [200], [], "")


@libraries
def test_an_answer_tells_its_attempts(library: ModuleType, clock: ManualClock) -> None:
    outcomes: list[Outcome] = [503, library.ReadError("it broke"), 200]
    played = play(caller(clock, library=library), outcomes, clock, took=0.25)
    assert played.answer.extensions["attempts"] == (
        Attempt(1, 503, None, 0.0, 0.25),
        Attempt(2, None, "ReadError", 0.05, 0.25),
        Attempt(3, 200, None, 0.1, 0.25),
    )
    assert "retries_ended" not in played.answer.extensions


@libraries
@pytest.mark.parametrize("kind", ["ConnectError", "ReadError", "WriteError", "ReadTimeout", "RemoteProtocolError"])
def test_an_error_is_raised_as_it_is_with_its_attempts(library: ModuleType, kind: str, clock: ManualClock) -> None:
    error = getattr(library, kind)("it broke")
    cause = error.__cause__ = OSError("the socket")
    played = play(caller(clock, library=library), [503, 503, error], clock)
    assert played.error is error
    assert error.__cause__ is cause
    assert (played.attempts, played.ended) == ([503, 503, kind], "attempts")


@pytest.mark.parametrize(
    "kind", ["UnsupportedProtocol", "LocalProtocolError", "ProxyError", "PoolTimeout", "TransportError"]
)
def test_what_another_attempt_would_not_change_is_not_tried_again(kind: str, clock: ManualClock) -> None:
    played = play(caller(clock), [getattr(httpx2, kind)("no")], clock)
    assert (type(played.error).__name__, played.ended) == (kind, "")


@pytest.mark.parametrize(
    ("method", "outcome", "attempts"),
    [
        ("POST", 503, 1),
        ("POST", (503, {"retry-after": "1"}), 1),
        ("POST", 429, 1),
        ("POST", httpx2.ReadError, 1),
        ("POST", httpx2.WriteError, 1),
        ("POST", httpx2.ReadTimeout, 1),
        ("POST", httpx2.RemoteProtocolError, 1),
        ("POST", httpx2.ConnectError, 2),
        ("POST", httpx2.ConnectTimeout, 2),
        ("PATCH", 500, 1),
        ("PUT", 500, 2),
        ("DELETE", httpx2.ReadError, 2),
    ],
)
def test_what_may_have_been_done_is_not_done_again(
    method: str, outcome: Any, attempts: int, clock: ManualClock
) -> None:
    played = play(caller(clock), [outcome, 200], clock, sent=request(method, content=b"body"))
    assert len(played.sent) == attempts
    assert played.ended == ("not_repeatable" if attempts == 1 else "")


@pytest.mark.parametrize("outcome", [503, 429, httpx2.ReadError, httpx2.ConnectError])
def test_an_idempotency_key_says_that_it_may(outcome: Any, clock: ManualClock) -> None:
    sent = request("POST", content=b"body", headers={"Idempotency-Key": "8e03978e"})
    played = play(caller(clock), [outcome, 200], clock, sent=sent)
    assert [one.content for one in played.sent] == [b"body"] * 2
    assert [one.headers["idempotency-key"] for one in played.sent] == ["8e03978e"] * 2


@libraries
@pytest.mark.parametrize("outcome", [503, 429, "ReadError", "ConnectError"])
def test_a_streaming_body_is_never_sent_again(library: ModuleType, outcome: Any, clock: ManualClock) -> None:
    async def parts() -> Any:
        yield b"part"

    sent = library.Request("PUT", URL, content=parts(), headers={"Idempotency-Key": "8e03978e"})
    told = getattr(library, outcome)("it broke") if isinstance(outcome, str) else outcome
    played = play(caller(clock, library=library), [told], clock, sent=sent)
    assert (len(played.sent), played.ended) == (1, "not_repeatable")


def test_an_upload_of_files_is_a_streaming_body(clock: ManualClock) -> None:
    sent = request("PUT", files={"file": b"content"})
    assert len(play(caller(clock), [503], clock, sent=sent).sent) == 1


@pytest.mark.parametrize("most", [1, 2, 3, 10])
def test_there_are_as_many_attempts_as_the_policy_says(most: int, clock: ManualClock) -> None:
    calls = caller(clock, retry=RetryPolicy(attempts=most), budget=lambda: RetryBudget(floor=99, capacity=500))
    played = play(calls, [503] * most, clock)
    assert (len(played.sent), played.ended) == (most, "attempts")


# What is sent along


def test_each_retry_says_which_it_is_in_place_of_what_was_there(clock: ManualClock) -> None:
    played = play(caller(clock), [503, 503, 200], clock, sent=request(headers={"X-Retry-Attempt": "7"}))
    assert [one.headers.get_list("x-retry-attempt") for one in played.sent] == [["7"], ["1"], ["2"]]


def test_the_caller_s_own_request_is_not_changed(clock: ManualClock) -> None:
    timeout = {"connect": 5.0, "read": 5.0, "write": 5.0, "pool": 5.0}
    sent = request(headers=[("A", "1"), ("a", "2")], extensions={"timeout": timeout, "trace": print})
    before = sent.headers.raw
    around = Surroundings(2.0, "critical", False)
    played = play(caller(clock, around=around), [503, 200], clock, sent=sent)
    assert sent.headers.raw == before
    assert sent.extensions == {"timeout": timeout, "trace": print}
    assert timeout["connect"] == 5.0
    (first, second) = played.sent
    assert first.headers.get_list("a") == ["1", "2"]
    assert first.extensions["trace"] is print
    assert second.url == sent.url


@libraries
def test_time_outs_are_no_longer_than_there_is_time_for(library: ModuleType, clock: ManualClock) -> None:
    given = {"connect": 5.0, "read": 5.0, "write": None, "pool": 0.2, "other": 1}
    sent = request(library=library, extensions={"timeout": given})
    (one,) = play(caller(clock, library=library), [200], clock, sent=sent).sent
    assert one.extensions["timeout"] == {"connect": 1.0, "read": 5.0, "write": None, "pool": 0.2, "other": 1}
    (one,) = play(caller(clock, library=library, timeout=0.5), [200], clock, sent=sent).sent
    assert one.extensions["timeout"] == {"connect": 0.5, "read": 0.5, "write": 0.5, "pool": 0.2, "other": 1}
    (one,) = play(caller(clock, library=library, connect=None), [200], clock, sent=sent).sent
    assert one is sent
    (one,) = play(caller(clock, library=library), [200], clock).sent
    assert one.extensions["timeout"] == {"connect": 1.0, "pool": 1.0}


def test_the_time_left_goes_along_and_decreases(clock: ManualClock) -> None:
    played = play(caller(clock, timeout=2.0), [503, 503, 200], clock, took=0.3)
    # 2 s, then without .3 and a wait of .05, then without .3 and one of .1, and 10 ms for the way each time
    assert [one.headers["x-request-timeout-ms"] for one in played.sent] == ["1990", "1640", "1240"]
    assert played.within == pytest.approx([2.0, 1.65, 1.25])
    assert [one.extensions["timeout"]["read"] for one in played.sent] == pytest.approx([2.0, 1.65, 1.25])


@pytest.mark.parametrize(
    ("said", "sent"),
    [
        ("500", "500"),
        ("1990", "1990"),
        *((said, "1990") for said in ("1991", "99999", "soon", "", "-1", "9" * 5_000, "\u0665")),
    ],
)
def test_a_shorter_time_that_the_caller_says_itself_stays(said: str, sent: str, clock: ManualClock) -> None:
    given = request(headers={"X-Request-Timeout-Ms": said.encode()})
    (one,) = play(caller(clock, timeout=2.0), [200], clock, sent=given).sent
    assert one.headers.get_list("x-request-timeout-ms") == [sent]


def test_without_a_deadline_none_is_sent(clock: ManualClock) -> None:
    (one,) = play(caller(clock), [200], clock).sent
    assert "x-request-timeout-ms" not in one.headers


@pytest.mark.parametrize("priority", [None, "low"])
def test_the_surrounding_request_s_priority_goes_along_where_the_caller_says_none(
    priority: str | None, clock: ManualClock
) -> None:
    sent = request(headers={} if priority is None else {"X-Request-Priority": priority})
    (one,) = play(caller(clock, around=Surroundings(None, "critical", False)), [200], clock, sent=sent).sent
    assert one.headers.get_list("x-request-priority") == [priority or "critical"]


def test_what_is_not_propagated_holds_here_all_the_same(clock: ManualClock) -> None:
    around = Surroundings(0.5, "critical", True)
    played = play(caller(clock, around=around, propagate=False), [503], clock)
    (one,) = played.sent
    assert {"x-request-timeout-ms", "x-request-priority", "x-retry-attempt"}.isdisjoint(one.headers)
    assert played.within == [0.5]
    assert played.ended == "retried"


def test_what_is_done_for_a_retry_is_not_retried_again(clock: ManualClock) -> None:
    played = play(caller(clock, around=Surroundings(retried=True)), [503], clock)
    assert (len(played.sent), played.status, played.ended) == (1, 503, "retried")
    assert played.sent[0].headers["x-retry-attempt"] == "1"  # nor by who is called in turn


# Deadlines


@pytest.mark.parametrize(
    ("settings", "around", "asked", "left"),
    [
        ({"timeout": 3.0}, None, None, 3.0),
        ({}, 2.0, None, 2.0),
        ({}, None, 1.5, 1.5),
        ({"timeout": 3.0}, 2.0, 1.5, 1.5),
        ({"timeout": 1.0}, 2.0, 1.5, 1.0),
        ({"timeout": 3.0}, 2.0, float("inf"), 2.0),
        ({}, None, float("inf"), None),
        ({}, None, 10**12, None),
        ({"timeout": 3.0}, None, float("nan"), 3.0),
        ({}, None, None, None),
    ],
)
def test_the_earliest_deadline_holds(
    settings: dict[str, float], around: float | None, asked: float | None, left: float | None, clock: ManualClock
) -> None:
    sent = request(extensions={} if asked is None else {"deadline": asked})
    calls = caller(clock, around=Surroundings(left=around), **settings)
    assert play(calls, [200], clock, sent=sent).within == [left]


@libraries
@pytest.mark.parametrize("left", [0.01, 0.0, -5.0, -math.inf])
def test_nothing_is_sent_when_ten_milliseconds_remain(library: ModuleType, left: float, clock: ManualClock) -> None:
    calls = caller(clock, library=library, around=Surroundings(left=left))
    played = play(calls, [], clock)
    assert played.sent == []
    assert isinstance(played.error, errors.DeadlineExceeded)
    assert isinstance(played.error, library.TimeoutException)
    assert str(played.error) == "http://host.test: no time is left to call"
    assert played.error.attempts == ()
    assert (host_of(calls).in_flight, host_of(calls).budget.earned) == (0, 3), "nothing was sent, so nothing is earned"


def test_eleven_milliseconds_are_enough(clock: ManualClock) -> None:
    played = play(caller(clock, timeout=0.011), [200], clock)
    assert [one.headers["x-request-timeout-ms"] for one in played.sent] == ["1"]


def test_no_retry_is_begun_that_would_be_too_late(clock: ManualClock) -> None:
    """The answer that there is is given, and not an error in its place: also if only the way there would be left."""
    for timeout, attempts in ((1.06, 1), (1.07, 2)):
        played = play(caller(clock, timeout=timeout), [503, 200], clock, took=1.0)
        assert len(played.sent) == attempts
    assert play(caller(clock, timeout=1.06), [503], clock, took=1.0).ended == "deadline"


def test_a_hint_beyond_the_deadline_is_the_deadline_s_end(clock: ManualClock) -> None:
    played = play(caller(clock, timeout=5.0), [(503, {"retry-after": "10"})], clock)
    assert (played.status, played.ended) == (503, "deadline")


@libraries
def test_an_answer_that_comes_too_late_is_an_error(library: ModuleType, clock: ManualClock) -> None:
    played = play(caller(clock, library=library, timeout=1.0), [LATE], clock, took=1.0)
    assert isinstance(played.error, errors.DeadlineExceeded)
    assert isinstance(played.error, library.ReadTimeout)
    assert played.error.request.url == URL
    assert (played.attempts, played.ended) == (["DeadlineExceeded"], "deadline_exceeded")


@libraries
@pytest.mark.parametrize("kind", ["ConnectTimeout", "ReadTimeout", "WriteTimeout", "PoolTimeout"])
def test_a_time_out_of_the_library_at_the_deadline_says_so(library: ModuleType, kind: str, clock: ManualClock) -> None:
    """Which is how it is noticed without an event loop."""
    error = getattr(library, kind)("timed out")
    played = play(caller(clock, library=library, timeout=1.0), [error], clock, took=1.0)
    assert isinstance(played.error, errors.DeadlineExceeded)
    assert isinstance(played.error, getattr(library, kind))
    assert played.error.__cause__ is error


class OddTimeout(httpx2.ReadTimeout):
    """As a transport of somebody's own may raise it."""

    def __init__(self, code: int, host: str) -> None:
        super().__init__(f"{host}: {code}")
        self.code = code


def test_a_time_out_of_a_transport_s_own_is_still_caught_at_the_deadline(clock: ManualClock) -> None:
    played = play(caller(clock, timeout=1.0), [OddTimeout(7, "there")], clock, took=1.0)
    assert isinstance(played.error, errors.DeadlineExceeded)
    assert isinstance(played.error, OddTimeout)
    assert played.error.code == 7
    assert played.error.request.url == URL


def test_a_deadline_of_a_client_inside_the_transport_is_one(clock: ManualClock) -> None:
    """As of an application that is called in its own process, and calls others itself."""
    inner = errors.also(errors.DeadlineExceeded, httpx2.ReadTimeout)("no time is left to call")
    played = play(caller(clock, timeout=1.0), [inner], clock, took=1.0)
    assert isinstance(played.error, errors.DeadlineExceeded)
    assert played.error.__cause__ is inner


def test_another_error_at_the_deadline_is_what_it_is(clock: ManualClock) -> None:
    played = play(caller(clock, timeout=1.0), [httpx2.ReadError("broken")], clock, took=1.0)
    assert (type(played.error), played.ended) == (httpx2.ReadError, "deadline")


@pytest.mark.parametrize("asked", ["soon", object()])
def test_a_deadline_that_is_no_number_is_a_mistake_and_leaves_nothing(asked: Any, clock: ManualClock) -> None:
    calls = caller(clock)
    played = play(calls, [], clock, sent=request(extensions={"deadline": asked}))
    assert isinstance(played.error, ValueError | TypeError)
    assert host_of(calls).in_flight == 0


# Budget


@libraries
@pytest.mark.parametrize("kind", ["ConnectError", "ConnectTimeout", "ReadTimeout", "RemoteProtocolError"])
def test_an_exhausted_budget_keeps_the_error_that_there_was(library: ModuleType, kind: str, clock: ManualClock) -> None:
    budget = RetryBudget(floor=0, ratio=0)
    error = getattr(library, kind)("it broke", request=request(library=library))
    played = play(caller(clock, library=library, budget=lambda: budget), [error], clock)
    assert isinstance(played.error, errors.RetryBudgetExhausted)
    assert isinstance(played.error, getattr(library, kind))
    assert played.error.__cause__ is error
    assert played.error.request is error.request
    assert str(played.error) == "it broke (not tried again: the retry budget is exhausted)"
    assert (played.attempts, played.ended) == ([kind], "budget")


def test_a_budget_that_was_exhausted_inside_the_transport_is_no_other_mistake(clock: ManualClock) -> None:
    inner = errors.also(errors.RetryBudgetExhausted, httpx2.ReadError)("it broke")
    played = play(caller(clock, budget=lambda: RetryBudget(floor=0)), [inner], clock)
    assert isinstance(played.error, errors.RetryBudgetExhausted)
    assert (played.error.__cause__, played.ended) == (inner, "budget")
    assert str(played.error) == "it broke (not tried again: the retry budget is exhausted)"


def test_an_exhausted_budget_takes_no_answer_away(clock: ManualClock) -> None:
    played = play(caller(clock, budget=lambda: RetryBudget(floor=0)), [503], clock)
    assert (played.status, played.ended) == (503, "budget")


def test_a_transport_s_own_error_is_still_caught(clock: ManualClock) -> None:
    class OddError(httpx2.ConnectError):
        def __init__(self, code: int, host: str) -> None:
            super().__init__(f"{host}: {code}")
            self.code = code

    played = play(caller(clock, budget=lambda: RetryBudget(floor=0)), [OddError(7, "there")], clock)
    assert isinstance(played.error, OddError)
    assert isinstance(played.error, errors.RetryBudgetExhausted)
    assert played.error.code == 7
    assert str(played.error).startswith("there: 7 (not")


def test_what_is_refused_here_earns_nothing(clock: ManualClock) -> None:
    calls = caller(clock, concurrency=1, budget=lambda: RetryBudget(floor=0))
    play(calls, [200], clock)
    for _ in range(50):
        assert isinstance(play(calls, [], clock).error, errors.TooManyInFlight)
    assert host_of(calls).budget.earned == pytest.approx(0.1)


# Refusals of our own


def broken(clock: ManualClock, **options: Any) -> Caller:
    """A caller whose circuit is open."""
    calls = caller(clock, retry=RetryPolicy(attempts=1), breaker=CircuitBreaker, **options)
    for _ in range(20):
        leave(play(calls, [500], clock))
    return calls


@libraries
def test_an_open_circuit_says_so_and_when(library: ModuleType, clock: ManualClock) -> None:
    calls = broken(clock, library=library)
    clock.advance(2)
    played = play(calls, [], clock)
    assert isinstance(played.error, errors.CircuitOpen)
    assert isinstance(played.error, errors.NotSent)
    assert isinstance(played.error, library.TransportError)
    assert played.error.retry_after == 3.0
    assert played.error.request.url == URL
    assert str(played.error) == "http://host.test: its circuit is open"


@libraries
def test_a_host_that_accepts_too_little_is_not_asked(library: ModuleType, clock: ManualClock) -> None:
    calls = caller(clock, library=library, throttle=AdaptiveThrottle, retry=RetryPolicy(attempts=1), random=lambda: 0.0)
    for _ in range(20):
        leave(play(calls, [429], clock))
    played = play(calls, [], clock)
    assert isinstance(played.error, errors.Throttled)
    assert isinstance(played.error, library.TransportError)
    assert "accepts too little" in str(played.error)
    assert calls.statistics()[URL[:-1]]["throttled"] == 0.9


@libraries
def test_more_than_may_be_in_flight_are_refused(library: ModuleType, clock: ManualClock) -> None:
    calls = caller(clock, library=library, concurrency=2)
    first, second = play(calls, [200], clock), play(calls, [200], clock)
    played = play(calls, [], clock)
    assert isinstance(played.error, errors.TooManyInFlight)
    assert isinstance(played.error, library.PoolTimeout)
    assert "2 requests are in flight" in str(played.error)
    leave(first)
    assert play(calls, [200], clock).status == 200
    leave(second)


def test_local_refusals_are_no_failures_and_no_requests_of_the_circuit(clock: ManualClock) -> None:
    made: list[CircuitBreaker] = []

    def make() -> CircuitBreaker:
        made.append(CircuitBreaker())
        return made[-1]

    calls = caller(clock, concurrency=1, breaker=make, retry=RetryPolicy(attempts=1))
    for _ in range(19):
        leave(play(calls, [500], clock))
    held = play(calls, [200], clock)
    assert made[0].state is State.OPEN, "of twenty, nineteen have failed"
    clock.advance(5)
    refused = play(calls, [], clock)
    assert isinstance(refused.error, errors.TooManyInFlight)
    leave(held)
    assert play(calls, [200], clock).status == 200, "what was not sent has left its place on the ramp"


def test_throttled_answers_say_nothing_to_the_circuit(clock: ManualClock) -> None:
    calls = caller(clock, breaker=CircuitBreaker, retry=RetryPolicy(attempts=1))
    for outcome in [429, (503, {"retry-after": "1"})] * 50:
        leave(play(calls, [outcome], clock))
    for _ in range(19):
        leave(play(calls, [500], clock))
    assert calls.statistics()[URL[:-1]]["circuits"] == {"": "closed"}
    leave(play(calls, [500], clock))
    assert calls.statistics()[URL[:-1]]["circuits"] == {"": "open"}


@pytest.mark.parametrize("error", [httpx2.ConnectError, httpx2.ReadTimeout, httpx2.RemoteProtocolError])
def test_errors_of_the_host_open_its_circuit_and_say_nothing_of_what_it_accepts(
    error: type[Exception], clock: ManualClock
) -> None:
    calls = caller(clock, breaker=CircuitBreaker, throttle=AdaptiveThrottle, retry=RetryPolicy(attempts=1))
    for _ in range(20):
        assert play(calls, [error], clock).error is not None
    statistics = calls.statistics()[URL[:-1]]
    assert (statistics["circuits"], statistics["throttled"]) == ({"": "open"}, 0.0)


@pytest.mark.parametrize("error", [httpx2.PoolTimeout, httpx2.UnsupportedProtocol, httpx2.LocalProtocolError])
def test_errors_of_our_own_making_open_nothing(error: type[Exception], clock: ManualClock) -> None:
    calls = caller(clock, breaker=CircuitBreaker, throttle=AdaptiveThrottle)
    for _ in range(100):
        assert isinstance(play(calls, [error], clock).error, error)
    statistics = calls.statistics()[URL[:-1]]
    assert (statistics["circuits"], statistics["throttled"], statistics["in_flight"]) == ({"": "closed"}, 0.0, 0)


def test_a_host_that_hangs_opens_its_circuit(clock: ManualClock) -> None:
    calls = caller(clock, breaker=CircuitBreaker, timeout=0.3)
    for _ in range(20):
        assert isinstance(play(calls, [LATE], clock, took=0.3).error, errors.DeadlineExceeded)
    assert calls.statistics()[URL[:-1]]["circuits"] == {"": "open"}


def test_callers_with_less_time_than_it_takes_do_not_open_its_circuit(clock: ManualClock) -> None:
    calls = caller(clock, breaker=CircuitBreaker)
    for _ in range(30):
        leave(play(calls, [200], clock, took=0.2))
    for _ in range(100):
        hurried = request(extensions={"deadline": 0.1})
        assert isinstance(play(calls, [LATE], clock, sent=hurried, took=0.1).error, errors.DeadlineExceeded)
    assert calls.statistics()[URL[:-1]]["circuits"] == {"": "closed"}
    for _ in range(40):
        patient = request(extensions={"deadline": 0.2})
        play(calls, [LATE], clock, sent=patient, took=0.2)
    assert calls.statistics()[URL[:-1]]["circuits"] == {"": "open"}


def test_routes_have_circuits_of_their_own(clock: ManualClock) -> None:
    calls = caller(
        clock,
        breaker=CircuitBreaker,
        retry=RetryPolicy(attempts=1),
        route=lambda request: request.url.path.split("/")[1],
    )
    for _ in range(20):
        leave(play(calls, [500], clock, sent=request(url=f"{URL}slow/1")))
    assert isinstance(play(calls, [], clock, sent=request(url=f"{URL}slow/2")).error, errors.CircuitOpen)
    leave(play(calls, [200], clock, sent=request(url=f"{URL}fast/1")))
    named = request(url=f"{URL}slow/2", extensions={"route": "other"})
    leave(play(calls, [200], clock, sent=named))
    assert calls.statistics()[URL[:-1]]["circuits"] == {"slow": "open", "fast": "closed", "other": "closed"}


def test_routes_and_hosts_that_are_remembered_are_bounded(clock: ManualClock) -> None:
    calls = caller(clock, breaker=CircuitBreaker)
    for number in range(MOST_ROUTES + 5):
        leave(play(calls, [200], clock, sent=request(extensions={"route": str(number)})))
    assert len(host_of(calls).breakers) == MOST_ROUTES
    for number in range(MOST_HOSTS + 5):
        leave(play(calls, [200], clock, sent=request(url=f"http://host-{number}.test/")))
    statistics = calls.statistics()
    assert len(statistics) == MOST_HOSTS
    assert "http://host-4.test" not in statistics
    assert "http://host-5.test" in statistics
    assert repr(calls) == "<Caller of 1000 hosts through httpx2>"


def test_a_circuit_that_is_forgotten_is_not_counted_as_open(clock: ManualClock) -> None:
    calls = caller(clock, breaker=lambda: CircuitBreaker(calls=1), retry=RetryPolicy(attempts=1))
    leave(play(calls, [500], clock))
    assert host_of(calls).open_circuits == 1
    for number in range(MOST_ROUTES):
        leave(play(calls, [200], clock, sent=request(extensions={"route": str(number)})))
    assert host_of(calls).open_circuits == 0


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("http://host.test/a?b=c", "http://host.test"),
        ("http://user:secret@host.test/", "http://host.test"),
        ("https://host.test:443/", "https://host.test"),
        ("https://host.test:8443/", "https://host.test:8443"),
        ("http://[::1]:80/", "http://[::1]"),
        ("http://b\u00fccher.test/", "http://xn--bcher-kva.test"),
    ],
)
def test_a_host_is_its_scheme_name_and_port(url: str, name: str, clock: ManualClock) -> None:
    calls = caller(clock)
    leave(play(calls, [200], clock, sent=request(url=url)))
    assert list(calls.statistics()) == [name]
    assert repr(host_of(calls)) == f"<Host {name}, 0 in flight>"


def test_a_retry_that_is_refused_here_gives_the_answer_that_there_was(clock: ManualClock) -> None:
    calls = caller(clock, breaker=lambda: CircuitBreaker(calls=1))
    played = play(calls, [500], clock)
    assert (played.status, played.ended, played.attempts) == (500, "circuit_open", [500])
    assert played.host is None, "it was left when the answer was read"
    assert host_of(calls).budget.tokens == 50
    assert host_of(calls).in_flight == 0


def test_a_retry_that_is_refused_here_is_refused_where_the_answer_is_gone(clock: ManualClock) -> None:
    calls = caller(clock, breaker=lambda: CircuitBreaker(calls=1))
    played = play(calls, [500], clock, keep=False)
    assert isinstance(played.error, errors.CircuitOpen)
    assert (played.ended, played.attempts) == ("circuit_open", [500])


def test_a_retry_that_is_refused_after_an_error_has_that_for_a_cause(clock: ManualClock) -> None:
    error = httpx2.ReadError("it broke")
    played = play(caller(clock, breaker=lambda: CircuitBreaker(calls=1)), [error], clock)
    assert isinstance(played.error, errors.CircuitOpen)
    assert played.error.__cause__ is error
    assert played.attempts == ["ReadError"]


def test_a_wait_that_took_too_long_gives_the_answer_that_there_was(clock: ManualClock) -> None:
    """A machine that slept, an event loop that was blocked."""
    calls = caller(clock, timeout=1.0)
    call = calls.call(request())
    call.send(None)
    call.send(httpx2.Response(503, headers={"content-length": "4"}, stream=httpx2.ByteStream(b"body")))
    call.send(True)
    clock.advance(60)
    with pytest.raises(StopIteration) as end:
        call.send(None)
    answer, host = end.value.value
    assert (answer.status_code, answer.extensions["retries_ended"], host) == (503, "deadline_exceeded", None)


@pytest.mark.parametrize(
    ("method", "headers", "left", "within"),
    [
        ("GET", {"content-length": "16384"}, None, 1.0),
        ("GET", {"content-length": "16385"}, None, 0.0),
        ("GET", {"content-length": "0"}, None, 1.0),
        ("GET", {"content-length": "9" * 5_000}, None, 0.0),
        ("GET", {"content-length": "many"}, None, 0.0),
        ("GET", {}, None, 0.0),
        ("HEAD", {"content-length": "99999"}, None, 1.0),
        ("GET", {"content-length": "4"}, 0.5, 0.5),
        ("GET", {"content-length": "4"}, 5.0, 1.0),
    ],
)
def test_a_small_answer_is_read_for_its_connection_s_sake(
    method: str, headers: Mapping[str, str], left: float | None, within: float, clock: ManualClock
) -> None:
    call = caller(clock, timeout=left).call(request(method))
    call.send(None)
    step: Any = call.send(httpx2.Response(503, headers=headers, stream=httpx2.ByteStream(b"")))
    assert step.within == within
    call.close()


# Hedging


def hedging(clock: ManualClock, *, calls: int = 30, **options: Any) -> Caller:
    """A caller that knows that this host takes 100 ms."""
    made = caller(clock, hedge=True, **options)
    for _ in range(calls):
        leave(play(made, [200], clock, took=0.1))
    return made


def first_step(calls: Caller, sent: Any = None) -> Send:
    step = calls.call(request() if sent is None else sent).send(None)
    assert isinstance(step, Send)
    return step


def test_what_takes_longer_than_95_of_100_is_sent_a_second_time(clock: ManualClock) -> None:
    calls = hedging(clock)
    call = calls.call(request())
    step: Any = call.send(None)
    assert (step.hedge_after, host_of(calls).in_flight) == (0.1, 1)
    second = step.hedge(step)
    assert second.headers["x-retry-attempt"] == "1", "it is one more than was asked for"
    assert (host_of(calls).in_flight, host_of(calls).budget.tokens) == (2, 36)
    step.won = True
    with pytest.raises(StopIteration) as end:
        call.send(httpx2.Response(200, stream=httpx2.ByteStream(b"")))
    answer, host = end.value.value
    assert answer.extensions["attempts"][0].hedged
    assert (host.in_flight, host.budget.tokens) == (1, 50), "the loser is gone, and what has helped is given back"


def test_a_hedge_that_ends_in_cancellation_leaves_no_place_taken(clock: ManualClock) -> None:
    calls = hedging(clock)
    call = calls.call(request())
    step: Any = call.send(None)
    step.hedge(step)
    with pytest.raises(Cancelled):
        call.throw(Cancelled())
    assert (host_of(calls).in_flight, host_of(calls).budget.tokens) == (0, 36), "it was sent, and so it was paid for"


@pytest.mark.parametrize(
    ("why", "method", "options", "extensions"),
    [
        ("it may have been done", "POST", {}, {}),
        ("there is no time for it", "GET", {}, {"deadline": 0.1}),
        ("it is done for a retry", "GET", {"around": Surroundings(retried=True)}, {}),
        ("nobody knows yet what is long", "GET", {"calls": 19}, {}),
    ],
)
def test_there_is_no_hedge_where(
    why: str, method: str, options: dict[str, Any], extensions: dict[str, Any], clock: ManualClock
) -> None:
    assert first_step(hedging(clock, **options), request(method, extensions=extensions)).hedge is None


@pytest.mark.parametrize(("after", "is_sent"), [(0.289, True), (0.29, False), (0.5, False)])
def test_there_is_no_hedge_that_would_not_even_arrive(after: float, is_sent: bool, clock: ManualClock) -> None:
    calls = hedging(clock)
    step: Any = first_step(calls, request(extensions={"deadline": 0.3}))
    clock.advance(after)
    assert (step.hedge(step) is not None, step.cost > 0, host_of(calls).budget.tokens < 50) == (is_sent,) * 3


def test_there_is_no_hedge_of_a_streaming_body(clock: ManualClock) -> None:
    assert first_step(hedging(clock), request("PUT", content=iter([b"part"]))).hedge is None


def test_there_is_no_hedge_without_asking_for_it(clock: ManualClock) -> None:
    calls = caller(clock)
    for _ in range(30):
        leave(play(calls, [200], clock, took=0.1))
    assert first_step(calls).hedge is None


def test_an_idempotency_key_allows_a_hedge(clock: ManualClock) -> None:
    sent = request("POST", headers={"Idempotency-Key": "8e03978e"})
    assert first_step(hedging(clock), sent).hedge is not None


def test_the_budget_denies_a_hedge(clock: ManualClock) -> None:
    step: Any = first_step(hedging(clock, budget=lambda: RetryBudget(floor=0, ratio=0)))
    assert (step.hedge(step), step.cost) == (None, 0)


def test_the_limit_of_what_is_in_flight_denies_a_hedge(clock: ManualClock) -> None:
    calls = hedging(clock, concurrency=2)
    both = [calls.call(request()) for _ in range(2)]
    steps: list[Any] = [call.send(None) for call in both]
    assert [step.hedge(step) for step in steps] == [None, None]
    assert host_of(calls).in_flight == 2


def test_a_circuit_that_is_not_closed_denies_a_hedge(clock: ManualClock) -> None:
    calls = hedging(clock, breaker=lambda: CircuitBreaker(calls=40), retry=RetryPolicy(attempts=1))
    step: Any = first_step(calls)
    for _ in range(60):
        leave(play(calls, [500], clock)) if host_of(calls).breakers[""].state is State.CLOSED else None
    assert step.hedge(step) is None


def test_a_throttle_denies_a_hedge(clock: ManualClock) -> None:
    calls = hedging(clock, throttle=AdaptiveThrottle, retry=RetryPolicy(attempts=1))
    step: Any = first_step(calls)
    for _ in range(60):
        leave(play(calls, [429], clock))
    assert step.hedge(step) is None


# Nothing stays behind


OUTCOMES = st.sampled_from(
    [200, 404, 429, 500, 503, httpx2.ConnectError, httpx2.ReadError, httpx2.PoolTimeout, LATE, ValueError("a bug")]
)


@given(
    st.lists(
        st.tuples(
            st.lists(OUTCOMES, min_size=3, max_size=3),
            st.none() | st.integers(1, 9),
            st.sampled_from(["GET", "POST"]),
            st.booleans(),
            st.floats(0, 2),
        ),
        max_size=25,
    ),
    st.sampled_from([None, 1, 3]),
    st.integers(0, 99),
)
def test_nothing_stays_behind_whatever_happens_and_wherever_it_is_cancelled(
    calls: list[tuple[list[Outcome], int | None, str, bool, float]], concurrency: int | None, seed: int
) -> None:
    clock = ManualClock()
    draw = random.Random(seed).random
    client = caller(
        clock,
        random=draw,
        throttle=AdaptiveThrottle,
        breaker=lambda: CircuitBreaker(calls=5),
        budget=RetryBudget,
        concurrency=concurrency,
        timeout=3.0,
    )
    attempts = 0
    for number, (outcomes, stop_at, method, keep, took) in enumerate(calls, 1):
        before = host_of(client).budget.tokens if number > 1 else 50
        played = play(client, outcomes, clock, sent=request(method), took=took, stop_at=stop_at, keep=keep)
        host = host_of(client)
        attempts += len(played.sent)
        retries = max(0, len(played.sent) - 1)
        assert host.in_flight == (1 if played.host is not None else 0)
        leave(played)
        assert host.in_flight == 0
        if isinstance(played.error, Cancelled) and not retries and played.steps > 1:
            assert host.budget.tokens == before, "a retry that was paid for and not sent is given back"
        assert attempts <= number + 3 + 0.1 * number + 1e-6
        assert 0 <= host.budget.tokens <= 50
        if isinstance(played.error, ValueError):
            assert str(played.error) == "a bug"
    # Whatever the states are, they are well again within the longest pause and a ramp.
    for _ in range(80):
        clock.advance(1)
        leave(play(client, [200], clock))
    statistics = client.statistics()[URL[:-1]]
    assert (statistics["circuits"], statistics["throttled"], statistics["in_flight"]) == ({"": "closed"}, 0, 0)


@pytest.mark.parametrize("stop_at", [1, 2, 3, 4, 5, 6, 7, 8])
def test_a_cancellation_at_any_step_gives_everything_back(stop_at: int, clock: ManualClock) -> None:
    """Steps: send, discard, sleep, send, discard, sleep, send."""
    breaker = CircuitBreaker()
    calls = caller(clock, throttle=AdaptiveThrottle, breaker=lambda: breaker, budget=RetryBudget)
    played = play(calls, [503, 503, 200], clock, stop_at=stop_at)
    host = host_of(calls)
    if stop_at == 8:
        assert (played.status, played.steps) == (200, 7)
        leave(played)
    else:
        assert isinstance(played.error, Cancelled)
    assert host.in_flight == 0
    # What was sent has been paid for, and is given back if it has succeeded; what was not sent has not.
    retries = len(played.sent) - 1
    assert host.budget.tokens == 50 - 14 * (1 if stop_at == 8 else retries)
    assert host.budget.earned == 3 - retries
    assert calls.statistics()[URL[:-1]]["throttled"] == 0


def test_a_cancelled_probe_gives_its_place_on_the_ramp_to_the_next(clock: ManualClock) -> None:
    calls = broken(clock)
    clock.advance(5)
    for _ in range(30):
        assert isinstance(play(calls, [], clock, stop_at=1).error, Cancelled)
    leave(play(calls, [200], clock))


def test_cancelled_requests_are_no_sign_of_a_host_that_accepts_too_little(clock: ManualClock) -> None:
    calls = caller(clock, throttle=AdaptiveThrottle, random=lambda: 0.0)
    for _ in range(200):
        assert isinstance(play(calls, [], clock, stop_at=1).error, Cancelled)
    assert play(calls, [200], clock).status == 200


def test_a_request_that_cannot_be_prepared_leaves_nothing(clock: ManualClock) -> None:
    calls = broken(clock)
    clock.advance(5)
    for _ in range(30):
        played = play(calls, [], clock, sent=request(extensions={"timeout": "soon"}))
        assert isinstance(played.error, AttributeError)
    assert host_of(calls).in_flight == 0
    leave(play(calls, [200], clock))


# Log lines and statistics


def events(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.event for record in caplog.records]  # type: ignore[attr-defined]


def test_each_change_of_a_circuit_is_logged_once(clock: ManualClock, caplog: pytest.LogCaptureFixture) -> None:
    calls = broken(clock)
    for _ in range(50):
        assert isinstance(play(calls, [], clock).error, errors.CircuitOpen)
    clock.advance(5)
    for _ in range(50):
        clock.advance(0.3)
        leave(play(calls, [200], clock))
    assert events(caplog) == ["circuit_open", "circuit_ramping", "circuit_closed"]
    assert [record.getMessage() for record in caplog.records] == [
        "the circuit to http://host.test is open for 5 s",
        "the circuit to http://host.test is closing by degrees",
        "the circuit to http://host.test is closed",
    ]
    assert {record.name for record in caplog.records} == {"seawall.client"}
    assert {record.host for record in caplog.records} == {"http://host.test"}  # type: ignore[attr-defined]
    assert {record.levelno for record in caplog.records} == {logging.WARNING}


def test_a_route_s_circuit_is_named(clock: ManualClock, caplog: pytest.LogCaptureFixture) -> None:
    calls = caller(clock, breaker=lambda: CircuitBreaker(calls=1), route=lambda _: "search")
    leave(play(calls, [500], clock))
    assert caplog.records[0].getMessage() == "the circuit to http://host.test, route search, is open for 5 s"


def test_a_route_writes_no_lines_of_its_own(clock: ManualClock, caplog: pytest.LogCaptureFixture) -> None:
    calls = caller(clock, breaker=lambda: CircuitBreaker(calls=1), route=lambda request: request.url.path)
    leave(play(calls, [500], clock, sent=request(url=f"{URL}a%0AERROR%20all%20is%20lost\u202e")))
    assert caplog.records[0].getMessage() == (
        "the circuit to http://host.test, route '/a\\nERROR all is lost\\u202e', is open for 5 s"
    )


def test_an_exhausted_budget_is_logged_when_it_begins_and_when_it_is_over(
    clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    """In a storm every tenth request has earned a retry again, and no line is written for each."""
    calls = caller(clock, budget=lambda: RetryBudget(capacity=10**6), random=lambda: 0.0)
    for _ in range(1_000):
        clock.advance(0.01)
        leave(play(calls, [503] * 3, clock))
    assert events(caplog) == ["budget_exhausted"]
    for _ in range(1_000):
        clock.advance(0.01)
        leave(play(calls, [200], clock))
    leave(play(calls, [503, 200], clock))
    assert events(caplog) == ["budget_exhausted", "budget_back"]


def test_throttling_is_logged_when_it_begins_and_when_it_is_over(
    clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    calls = caller(clock, throttle=AdaptiveThrottle, retry=RetryPolicy(attempts=1), random=random.Random(1).random)
    for number in range(2_000):
        clock.advance(0.01)
        leave(play(calls, [429 if number % 3 else 200], clock))
    assert events(caplog) == ["throttling"]
    for _ in range(2_000):
        clock.advance(0.1)
        leave(play(calls, [200], clock))
    assert events(caplog) == ["throttling", "throttling_over"]


def test_statistics_say_what_is_known_of_each_host(clock: ManualClock) -> None:
    calls = caller(clock, breaker=CircuitBreaker, throttle=AdaptiveThrottle)
    for number in range(100):
        leave(play(calls, [200], clock, took=0.001 * (number + 1)))
    held = play(calls, [503, 200], clock)
    assert calls.statistics() == {
        "http://host.test": {
            "in_flight": 1,
            "retries": 2.0,
            "tokens": 50,
            "throttled": 0.0,
            "circuits": {"": "closed"},
            "p95": pytest.approx(0.095, abs=0.002),
        }
    }
    leave(held)
    assert caller(clock).statistics() == {}


def test_statistics_are_those_of_now_also_of_a_host_that_nobody_calls(clock: ManualClock) -> None:
    calls = caller(clock, throttle=AdaptiveThrottle, retry=RetryPolicy(attempts=1))
    for _ in range(100):
        leave(play(calls, [429], clock))
    assert calls.statistics()["http://host.test"]["throttled"] == 0.9
    clock.advance(121)
    assert calls.statistics()["http://host.test"]["throttled"] == 0.0
