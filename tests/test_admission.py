"""What holds for whom, and the order in which it is asked: terms by table, keys by property, stages by stand-ins."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.subjects import Awaited
from seawall.admission import (
    DEFAULT_ROUTE,
    Admission,
    Answer,
    Denied,
    Entry,
    Profile,
    Stage,
    Terms,
    TermsCompiler,
    Ticket,
    charges_of,
)
from seawall.backends import LISTED, Backend, Key, Verdict
from seawall.backends.memory import MemoryBackend
from seawall.decision import NEVER, Mode, Outcome
from seawall.policy import Identity, Plan, Policy, Priority, Route, RouteLimit, Tenant
from seawall.rate import SECOND, Quota, Rate
from seawall.stages import CALLER, Spending
from seawall.testing import ManualClock
from strategies import DAY, HOUR

ALL = frozenset({"rate", "quota", "concurrency"})
PLAN = Plan("pro", (Rate(10, SECOND),), Quota(100, "day"), concurrency=5)


def memory() -> MemoryBackend:
    clock = ManualClock()
    return MemoryBackend(clock=clock, wall_clock=clock.wall_ns)


def compiler(parts: frozenset[str] = ALL, backend: Backend | None = None, **policy: Any) -> TermsCompiler:
    return TermsCompiler(Policy(**policy), backend or memory(), parts)


def terms(plan: Plan = PLAN, route: Route = DEFAULT_ROUTE, *, store: str = LISTED, **policy: Any) -> Terms:
    return compiler(**policy).terms(Profile(plan, store), route)


def ticket(
    terms: Terms, principal: Key = "acme", *, address: bytes | None = b"\x7f\x00\x00\x01", state: Any = None
) -> Ticket:
    scope = {} if state is None else {"state": state}
    return Ticket(scope, terms, "acme", principal, lambda _: b"resolved", address)


def route(*limits: RouteLimit, **changes: Any) -> Route:
    return Route("route", ("/x",), limits=limits, **changes)


# What holds for whom


@pytest.mark.parametrize("tenant", ["critical", None])
@pytest.mark.parametrize("of_route", ["high", None])
@pytest.mark.parametrize("of_plan", ["low", None])
def test_a_priority_is_the_tenants_then_the_routes_then_the_plans_then_normal(
    tenant: str | None, of_route: str | None, of_plan: str | None
) -> None:
    profile = Profile(Plan("pro", priority=of_plan), LISTED, priority=tenant)
    found = compiler().terms(profile, route(priority=of_route)).priority
    assert found == (tenant or of_route or of_plan or "normal")


@pytest.mark.parametrize(
    ("classes", "middle"),
    [("abc", "b"), ("ab", "a"), ("a", "a"), ("abcd", "b"), (("x", "y", "normal"), "normal")],
)
def test_who_declares_no_priority_has_the_middle_class(classes: tuple[str, ...], middle: str) -> None:
    assert terms(priorities=tuple(map(Priority, classes))).priority == middle


@given(*[st.sampled_from(Mode)] * 4)
def test_the_mode_is_the_lowest_of_file_plan_tenant_and_route(file: Mode, plan: Mode, tenant: Mode, rule: Mode) -> None:
    profile = Profile(Plan("pro", mode=plan), LISTED, mode=tenant)
    assert compiler(mode=file).terms(profile, route(mode=rule)).mode is min(file, plan, tenant, rule)


def test_cost_multiplies_the_plan_and_not_the_limits_of_the_route() -> None:
    """They take 1 unless they say otherwise; concurrency takes 1."""
    limits = (
        RouteLimit("cheap", ("global",), (Rate(10, SECOND),), Quota(9, "day")),
        RouteLimit("dear", ("tenant",), (Rate(10, SECOND),), cost=3),
    )
    found = terms(route=route(*limits, cost=5))
    costs = {entry.name: (entry.cost, entry.of_plan) for entry in found.entries}
    assert costs == {
        "rate": (5, True),
        "quota": (5, True),
        "cheap": (1, False),
        "cheap-quota": (1, False),
        "dear": (3, False),
    }
    assert [cost for *_, cost in found.charges] == [5, 5, 1, 1, 3]


@pytest.mark.parametrize(
    ("limit", "names"),
    [
        (RouteLimit("a", ("global",), (Rate(1, SECOND),)), ["a"]),
        (RouteLimit("a", ("global",), quota=Quota(1, "day")), ["a"]),
        (RouteLimit("a", ("global",), (Rate(1, SECOND), Rate(9, HOUR))), ["a", "a-2"]),
        (RouteLimit("a", ("global",), (Rate(1, SECOND), Rate(9, HOUR)), Quota(1, "day")), ["a", "a-2", "a-quota"]),
    ],
)
def test_every_entry_of_a_limit_has_a_name_of_its_own(limit: RouteLimit, names: list[str]) -> None:
    assert [entry.name for entry in terms(Plan("none"), route(limit)).entries] == names


def test_several_rates_of_a_plan_are_numbered() -> None:
    plan = Plan("pro", (Rate(1, SECOND), Rate(9, HOUR), Rate(99, DAY)), Quota(5, "month"))
    assert [(entry.name, entry.kind) for entry in terms(plan).entries] == [
        ("rate", "rate"),
        ("rate-2", "rate"),
        ("rate-3", "rate"),
        ("quota", "quota"),
    ]


@pytest.mark.parametrize(
    ("parts", "names", "concurrency"),
    [
        (ALL, ["rate", "quota", "a", "a-quota"], 5),
        (frozenset({"rate"}), ["rate", "a"], None),
        (frozenset({"quota"}), ["quota", "a-quota"], None),
        (frozenset({"concurrency"}), [], 5),
    ],
)
def test_only_the_parts_of_the_middleware_are_compiled(
    parts: frozenset[str], names: list[str], concurrency: int | None
) -> None:
    limit = RouteLimit("a", ("global",), (Rate(1, SECOND),), Quota(1, "day"))
    found = compiler(parts).terms(Profile(PLAN, LISTED), route(limit))
    assert [entry.name for entry in found.entries] == names
    assert found.concurrency == concurrency


def test_unlimited_is_no_entry_at_all() -> None:
    found = terms(Plan("internal", concurrency=3))
    assert (found.entries, found.charges, found.concurrency, found.plan) == ((), (), 3, "internal")


def test_an_entry_knows_what_headers_say_of_it() -> None:
    rate, quota = terms(Plan("p", (Rate(100, SECOND, 10),), Quota(50, "day"))).entries
    assert (rate.limit, rate.q, rate.near, rate.kind) == (10, 100, 2, "rate")
    assert (quota.limit, quota.q, quota.near, quota.kind) == (50, 50, 10, "quota")


# Whose bucket

PER: list[tuple[tuple[str, ...], str, Key]] = [
    (("global",), "global", "everybody"),
    (("tenant",), LISTED, "acme"),
    (("client_ip",), "address", b"\x7f\x00\x00\x01"),
    (("state:user",), "state", "ann"),
    (("client_ip", "global"), "address", b"\x7f\x00\x00\x01"),
    (("global", "tenant"), LISTED, "acme"),
    (("client_ip", "tenant"), "combination", b"b4:\x7f\x00\x00\x01s4:acme"),
    (("tenant", "state:user"), "combination", b"s4:acmes3:ann"),
    (("state:user", "state:org", "client_ip"), "combination", b"s3:anns2:42b4:\x7f\x00\x00\x01"),
]


@pytest.mark.parametrize(("per", "store", "whose"), PER)
def test_a_limit_is_per_whom_it_says(per: tuple[str, ...], store: str, whose: Key) -> None:
    limit = RouteLimit("a", per, (Rate(1, SECOND),), Quota(1, "day"))
    found = terms(Plan("none"), route(limit))
    asked = ticket(found, state={"user": "ann", "org": 42})
    assert [(meter.store, key) for meter, key, _ in charges_of(asked, found.charges)] == [(store, whose)] * 2


@pytest.mark.parametrize("store", [LISTED, "id", "address", "global"])
def test_a_limit_per_tenant_is_in_the_store_of_its_caller(store: str) -> None:
    """Listed tenants, others, addresses of anonymous callers: apart, because they are capped apart."""
    limit = RouteLimit("a", ("tenant",), (Rate(1, SECOND),))
    found = compiler().terms(Profile(PLAN, store), route(limit))
    assert {entry.meter.store for entry in found.entries} == {store}


def test_the_address_is_resolved_when_it_is_needed_and_once() -> None:
    calls = []

    def resolve(scope: Any) -> bytes:
        calls.append(scope)
        return b"addr"

    limits = [RouteLimit(name, ("client_ip",), (Rate(1, SECOND),)) for name in "ab"]
    found, scope = terms(Plan("none"), route(*limits)), {"it": "self"}
    lazy = Ticket(scope, found, None, "acme", resolve, None)
    assert calls == []
    assert [key for _, key, _ in charges_of(lazy, found.charges)] == [b"addr", b"addr"]
    assert lazy.address == b"addr"
    assert calls == [scope]


@pytest.mark.parametrize("state", [None, {}, {"user": None}, {"other": "x"}])
def test_requests_without_the_state_share_one_bucket(state: Any) -> None:
    """Rather than escape the limit."""
    found = terms(Plan("none"), route(RouteLimit("a", ("state:user",), (Rate(1, SECOND),))))
    assert charges_of(ticket(found, state=state), found.charges)[0][1] == ""


def test_a_long_value_of_state_makes_a_short_key() -> None:
    found = terms(Plan("none"), route(RouteLimit("a", ("state:user",), (Rate(1, SECOND),))))
    keys = {charges_of(ticket(found, state={"user": c * 100_000}), found.charges)[0][1] for c in "ab"}
    assert len(keys) == 2
    assert all(len(key) <= 128 for key in keys)


IDS = st.one_of(
    st.text(max_size=12),
    st.text(alphabet="sb0123456789:\x00", max_size=8),
    st.sampled_from(("\ud800", "\udfff", "x" * 200)),
)
PARTS = st.tuples(
    st.one_of(IDS, st.binary(max_size=16)), st.sampled_from((b"unknown", b"\x00" * 4, b"s1:a", b"1:as")), IDS, IDS
)


@given(PARTS, PARTS)
def test_combinations_are_injective_whatever_is_in_them(one: tuple[Any, ...], other: tuple[Any, ...]) -> None:
    """T1 for keys in memory: no id can be written so that it runs into the next one, nor text as bytes."""
    found = terms(
        Plan("none"), route(RouteLimit("a", ("tenant", "client_ip", "state:x", "state:y"), (Rate(1, SECOND),)))
    )

    def combined(parts: tuple[Any, ...]) -> Key:
        principal, address, x, y = parts
        asked = ticket(found, principal, address=address, state={"x": x, "y": y})
        return charges_of(asked, found.charges)[0][1]

    same = one == other and type(one[0]) is type(other[0])
    assert (combined(one) == combined(other)) == same


# Profiles


def test_listed_tenants_of_one_plan_share_a_profile_and_overrides_have_their_own() -> None:
    pro, changed = PLAN, Plan("pro", (Rate(500, SECOND),))
    tenants = [Tenant("a", pro), Tenant("b", pro), Tenant("c", pro, priority="low"), Tenant("d", pro, mode=Mode.SHADOW)]
    tenants.append(Tenant("e", changed))
    listed, other, anonymous = compiler(
        plans={"pro": pro}, default_plan="pro", tenants={tenant.id: tenant for tenant in tenants}
    ).profiles()
    assert listed["a"] is listed["b"]
    assert len({id(profile) for profile in listed.values()}) == 4
    assert {profile.store for profile in listed.values()} == {LISTED}
    assert (listed["c"].priority, listed["d"].mode, listed["e"].plan) == ("low", Mode.SHADOW, changed)
    assert other == Profile(pro, "id")
    assert anonymous is None


@pytest.mark.parametrize(("anonymous", "store"), [("per-ip", "address"), ("shared", "global"), ("deny", None)])
def test_anonymous_callers_are_who_the_policy_says(
    anonymous: Literal["per-ip", "shared", "deny"], store: str | None
) -> None:
    _, other, found = compiler(
        plans={"pro": PLAN}, anonymous_plan="pro", identity=Identity(anonymous=anonymous)
    ).profiles()
    assert other is None
    assert (found.store if found else None) == store


# Adjusted verdicts


@given(
    st.sampled_from([Rate(5, SECOND), Quota(5, "day")]), st.integers(0, 5), st.lists(st.integers(-12, 12), max_size=5)
)
def test_an_adjusted_verdict_says_what_the_backend_says(rate: Rate | Quota, cost: int, changes: list[int]) -> None:
    """What headers tell after `seawall.charge` is what the next request will find."""
    backend = memory()
    entry = Entry("a", backend.meter("a", LISTED, rate), None, cost, of_plan=True)
    verdict = backend.spend([(entry.meter, "acme", cost)])
    for change in changes:
        entry.adjust(verdict, 0, change)
        if change > 0:
            backend.debit([(entry.meter, "acme", change)])
        elif change < 0:
            backend.refund([(entry.meter, "acme", -change)], verdict.wall)
        found = backend.spend([(entry.meter, "acme", 0)])
        assert (verdict.states, verdict.left) == (found.states, found.left)
        assert entry.wait(verdict.states[0], verdict) == entry.wait(found.states[0], found)


# The order of the stages


class Asked:
    """A stage that notes what it is asked, and answers as told."""

    def __init__(self, name: str, log: list[str], answer: Any = None) -> None:
        self.name = name
        self.log = log
        self.answer = answer

    def admit(self, ticket: Ticket) -> Any:
        self.log.append(self.name)
        return self.answer() if callable(self.answer) else self.answer

    def settle(self, ticket: Ticket, outcome: Outcome, *, refund: bool) -> None:
        self.log.append(f"settle {self.name} {outcome.value}{' refund' * refund}")


async def later(answer: Answer) -> Answer:
    return answer


NO = Denied(CALLER, "no")


async def resolved(answer: Answer | Awaitable[Answer]) -> Answer:
    return await answer if inspect.isawaitable(answer) else answer


@pytest.mark.parametrize("waits", ["", "a", "b", "c", "ab", "abc"])
@pytest.mark.parametrize("refuses", ["", "a", "b", "c", "ac"])
async def test_stages_are_asked_in_order_until_one_refuses(waits: str, refuses: str) -> None:
    """The same whether a stage answers at once or has to be awaited."""
    log: list[str] = []

    def stage(name: str) -> Stage:
        answer = NO if name in refuses else None
        return Asked(name, log, (lambda: later(answer)) if name in waits else answer)

    admission = Admission([stage(name) for name in "abc"])
    answer = admission.admit(ticket(terms()))
    assert await resolved(answer) is (NO if refuses else None)
    assert "".join(log) == ("abc"[: "abc".index(refuses[0]) + 1] if refuses else "abc")
    first_wait = min(("abc".index(name) for name in waits), default=9)
    first_no = min(("abc".index(name) for name in refuses), default=8)
    assert inspect.isawaitable(answer) == (first_wait <= first_no and first_wait < 3)


def test_what_is_taken_is_settled_in_reverse() -> None:
    log: list[str] = []
    admission = Admission([Asked("a", log), Asked("b", log)])
    asked = ticket(terms())
    asked.held = True
    admission.settle(asked, Outcome.DROPPED, refund=True)
    admission.settle(asked, Outcome.SUCCESS, refund=False)
    assert log == ["settle b dropped refund", "settle a dropped refund", "settle b success", "settle a success"]


def test_no_stages_let_everything_pass() -> None:
    assert Admission([]).admit(ticket(terms())) is None


def test_an_operator_sees_the_order_of_the_stages() -> None:
    assert repr(Admission([Asked("a", []), Asked("b", [])])) == "<Admission a -> b>"


@given(st.lists(st.tuples(st.integers(1, 3), st.sampled_from(("acme", "globex")), st.booleans()), max_size=12))
async def test_an_awaited_backend_gives_the_same_answers(steps: list[tuple[int, str, bool]]) -> None:
    """The plain and the awaited answer are told apart at one place, and nothing else differs."""
    plain, inner = memory(), memory()
    admissions = [Admission([Spending(backend)]) for backend in (plain, Awaited(inner))]
    found = [
        compiler(backend=backend).terms(Profile(Plan("p", (Rate(5, SECOND),), Quota(7, "day")), LISTED), DEFAULT_ROUTE)
        for backend in (plain, Awaited(inner))
    ]
    for repeats, whose, refund in steps:
        for _ in range(repeats):
            tickets = [ticket(each, whose) for each in found]
            answers = [admission.admit(asked) for admission, asked in zip(admissions, tickets, strict=True)]
            assert [inspect.isawaitable(answer) for answer in answers] == [False, True]
            one, other = [await resolved(answer) for answer in answers]
            assert (one and (one.reason, one.waits)) == (other and (other.reason, other.waits))
            assert tickets[0].charged == tickets[1].charged == (one is None)
            verdicts = [asked.verdict for asked in tickets if isinstance(asked.verdict, Verdict)]
            assert verdicts[0].left == verdicts[1].left
            for admission, asked in zip(admissions, tickets, strict=True):
                admission.settle(asked, Outcome.SUCCESS, refund=refund)
                assert asked.charged == (one is None and not refund)


def test_a_refusal_knows_the_entry_that_waits_longest() -> None:
    found = terms(Plan("p", (Rate(1, SECOND), Rate(1, HOUR)), Quota(5, "day")))
    admission, asked = Admission([Spending(memory())]), ticket(found)
    assert admission.admit(asked) is None
    denied = admission.admit(ticket(found))
    assert isinstance(denied, Denied)
    first = denied.first
    assert first is not None
    assert (first[0].name, first[1], first[2].waits) == ("rate-2", 1, [SECOND, HOUR, 0])


@pytest.mark.parametrize(
    ("waits", "timed"),
    [((("a", 1),), True), ((("a", 1), ("b", 9)), True), ((("a", NEVER), ("b", 9)), False), ((), False)],
)
def test_a_refusal_knows_whether_waiting_helps(waits: tuple[tuple[str, int], ...], timed: bool) -> None:
    assert Denied(CALLER, "rate", waits).timed == timed
