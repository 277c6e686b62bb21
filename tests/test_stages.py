"""How much at a time and how much in a time: counts that do not leak, and refunds that are given once."""

from __future__ import annotations

from collections import Counter
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from contracts.subjects import Awaited
from seawall.admission import DEFAULT_ROUTE, Admission, Denied, Profile, Terms, TermsCompiler, Ticket
from seawall.backends import LISTED, Backend, Key
from seawall.backends.memory import MemoryBackend
from seawall.decision import NEVER, Outcome
from seawall.policy import Plan, Policy, Route, RouteLimit
from seawall.rate import SECOND, Quota, Rate
from seawall.stages import CALLER, Spending, TenantConcurrency
from seawall.testing import ManualClock
from strategies import DAY, HOUR

ALL = frozenset({"rate", "quota", "concurrency"})


class Bench:
    """A backend, its clock, and terms that use it."""

    def __init__(self, *, awaited: bool = False) -> None:
        self.clock = ManualClock()
        memory = MemoryBackend(clock=self.clock, wall_clock=self.clock.wall_ns)
        self.backend: Backend = Awaited(memory) if awaited else memory
        self.compiler = TermsCompiler(Policy(), self.backend, ALL)

    def terms(self, *rates: Rate, quota: Quota | None = None, concurrency: int | None = None, **route: Any) -> Terms:
        rule = Route("route", ("/x",), **route) if route else DEFAULT_ROUTE
        return self.compiler.terms(Profile(Plan("pro", rates, quota, concurrency), LISTED), rule)

    def left(self, terms: Terms, whose: Key = "acme") -> list[int]:
        answer: Any = self.backend.spend([(meter, whose, 0) for meter, _, _ in terms.charges])
        return list(answer.left)


def ticket(terms: Terms, principal: Key = "acme") -> Ticket:
    return Ticket({}, terms, None, principal, lambda _: b"addr", b"addr")


def refused(answer: object) -> Denied:
    assert isinstance(answer, Denied)
    return answer


# Concurrency


def test_a_caller_has_as_many_requests_in_flight_as_its_plan_says() -> None:
    stage, terms = TenantConcurrency(), Bench().terms(concurrency=3)
    tickets = [ticket(terms) for _ in range(5)]
    answers = [stage.admit(asked) for asked in tickets]
    assert answers[:3] == [None] * 3
    for answer in answers[3:]:
        denied = refused(answer)
        assert (denied.status, denied.reason) == (CALLER, "concurrency")
        assert denied.waits == (("concurrency", 1),)
        assert denied.terms is terms
    assert stage.admit(ticket(terms, "globex")) is None
    assert stage.statistics() == {"callers": 2, "in_flight": 4}
    assert repr(stage) == "<TenantConcurrency 4 in flight, 2 callers>"
    stage.settle(tickets[0], Outcome.SUCCESS, refund=False)
    assert stage.admit(ticket(terms)) is None


def test_who_has_no_concurrency_limit_is_not_counted() -> None:
    stage, terms = TenantConcurrency(), Bench().terms()
    asked = ticket(terms)
    assert stage.admit(asked) is None
    assert not asked.held
    stage.settle(asked, Outcome.SUCCESS, refund=False)
    assert stage.statistics() == {"callers": 0, "in_flight": 0}


@given(st.lists(st.tuples(st.sampled_from(("ask", "settle", "again")), st.integers(0, 9)), max_size=60))
def test_concurrency_counts_leak_under_no_interleaving(steps: list[tuple[str, int]]) -> None:
    """Asked, settled, settled again, in any order: what is counted is what is running, and nothing is left over."""
    stage, terms = TenantConcurrency(), Bench().terms(concurrency=2)
    callers: list[Key] = ["acme", b"acme", "globex"]
    running: list[Ticket] = []
    done: list[Ticket] = []
    for step, number in steps:
        if step == "ask":
            asked = ticket(terms, callers[number % 3])
            before = stage.in_flight(asked.principal)
            answer = stage.admit(asked)
            assert (answer is None) == (before < 2) == asked.held
            (running if answer is None else done).append(asked)
        elif step == "settle" and running:
            asked = running.pop(number % len(running))
            stage.settle(asked, Outcome.DROPPED, refund=bool(number % 2))
            done.append(asked)
        elif step == "again" and done:
            stage.settle(done[number % len(done)], Outcome.SUCCESS, refund=False)
        counts = Counter(asked.principal for asked in running)
        assert {caller: stage.in_flight(caller) for caller in callers} == {caller: counts[caller] for caller in callers}
        assert stage.statistics() == {"callers": len(counts), "in_flight": counts.total()}
    for asked in running:
        stage.settle(asked, Outcome.SUCCESS, refund=False)
    assert stage.statistics() == {"callers": 0, "in_flight": 0}


def test_a_refusal_for_concurrency_debits_nothing() -> None:
    bench = Bench()
    terms = bench.terms(Rate(10, SECOND), concurrency=1)
    admission = Admission([TenantConcurrency(), Spending(bench.backend)])
    assert admission.admit(ticket(terms)) is None
    assert refused(admission.admit(ticket(terms))).reason == "concurrency"
    assert bench.left(terms) == [9]


def test_a_slot_is_given_back_when_a_rate_refuses() -> None:
    bench, stage = Bench(), TenantConcurrency()
    terms = bench.terms(Rate(1, SECOND), concurrency=5)
    admission = Admission([stage, Spending(bench.backend)])
    assert admission.admit(ticket(terms)) is None
    asked = ticket(terms)
    assert refused(admission.admit(asked)).reason == "rate"
    assert asked.held
    admission.settle(asked, Outcome.IGNORED, refund=True)
    admission.settle(asked, Outcome.IGNORED, refund=True)
    assert stage.in_flight("acme") == 1
    assert bench.left(terms) == [0]


# Spending


def test_a_request_pays_every_policy_at_once_or_none() -> None:
    bench = Bench()
    stage = Spending(bench.backend)
    limit = RouteLimit("login-ip", ("client_ip",), (Rate(2, HOUR),))
    terms = bench.terms(Rate(10, SECOND), quota=Quota(10, "day"), limits=(limit,), cost=3)
    for _ in range(2):
        asked = ticket(terms)
        assert stage.admit(asked) is None
        assert asked.charged
    asked = ticket(terms)
    denied = refused(stage.admit(asked))
    assert not asked.charged
    assert denied.first is not None
    assert denied.first[2] is asked.verdict
    assert denied.waits == (("login-ip", HOUR // 2),)
    assert bench.left(terms)[:2] == [4, 4]


def test_the_violated_policies_are_sorted_the_longest_wait_first() -> None:
    bench = Bench()
    terms = bench.terms(Rate(1, SECOND), Rate(1, HOUR), quota=Quota(1, "day"))
    stage = Spending(bench.backend)
    assert stage.admit(ticket(terms)) is None
    denied = refused(stage.admit(ticket(terms)))
    assert denied.waits == (("quota", DAY), ("rate-2", HOUR), ("rate", SECOND))
    assert (denied.status, denied.reason, denied.terms) == (CALLER, "quota", terms)
    bench.clock.advance(1)
    assert [name for name, _ in refused(stage.admit(ticket(terms))).waits] == ["quota", "rate-2"]


def test_what_can_never_fit_comes_first() -> None:
    bench = Bench()
    terms = bench.terms(Rate(5, SECOND), quota=Quota(1, "month"), cost=2)
    stage = Spending(bench.backend)
    assert refused(stage.admit(ticket(terms))).waits == (("quota", NEVER),)
    small = bench.terms(Rate(1, SECOND), quota=Quota(2, "month"), cost=2)
    bench.backend.debit([(small.charges[1][0], "acme", 2)])
    denied = refused(stage.admit(ticket(small)))
    assert [name for name, _ in denied.waits] == ["rate", "quota"]
    assert denied.waits[0][1] == NEVER
    assert denied.reason == "rate"


def test_nothing_to_charge_asks_no_backend() -> None:
    class Untouched:
        def __getattr__(self, name: str) -> Any:
            raise AssertionError(name)

    backend: Any = Untouched()
    asked = ticket(Bench().terms())
    stage = Spending(backend)
    assert stage.admit(asked) is None
    stage.settle(asked, Outcome.SUCCESS, refund=True)
    assert asked.verdict is None


def test_a_refund_is_given_once_and_only_when_asked_for() -> None:
    bench = Bench()
    terms = bench.terms(Rate(10, HOUR), quota=Quota(10, "day"), cost=4)
    stage = Spending(bench.backend)
    kept, returned = ticket(terms), ticket(terms)
    assert stage.admit(kept) is None
    assert stage.admit(returned) is None
    assert bench.left(terms) == [2, 2]
    stage.settle(kept, Outcome.SUCCESS, refund=False)
    assert bench.left(terms) == [2, 2]
    for _ in range(3):
        stage.settle(returned, Outcome.DROPPED, refund=True)
        assert bench.left(terms) == [6, 6]


def test_a_refused_request_has_nothing_to_give_back() -> None:
    bench = Bench()
    terms = bench.terms(Rate(3, HOUR), cost=3)
    stage = Spending(bench.backend)
    assert stage.admit(ticket(terms)) is None
    asked = ticket(terms)
    refused(stage.admit(asked))
    stage.settle(asked, Outcome.IGNORED, refund=True)
    assert bench.left(terms) == [0]


async def test_an_awaited_refusal_is_the_same_refusal() -> None:
    bench = Bench(awaited=True)
    terms = bench.terms(Rate(1, SECOND), quota=Quota(1, "day"))
    stage = Spending(bench.backend)
    first, second = ticket(terms), ticket(terms)
    pending: Any = stage.admit(first)
    assert await pending is None
    assert first.charged
    pending = stage.admit(second)
    assert refused(await pending).waits == (("quota", DAY), ("rate", SECOND))
    assert not second.charged
    stage.settle(first, Outcome.DROPPED, refund=True)
    pending = stage.admit(ticket(terms))
    assert await pending is None


def test_an_operator_sees_where_it_spends() -> None:
    assert repr(Spending(Bench().backend)) == "<Spending from <MemoryBackend 0 keys in 0 stores, at most 100000 each>>"
