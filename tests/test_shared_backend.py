"""A backend that other processes share: asked as the rule says, replaced by what the rule says while it is away."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Awaitable, Callable, Generator, Sequence
from pathlib import Path
from types import ModuleType, coroutine
from typing import Any

import pytest
from fastapi import Depends, FastAPI
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from starlette.requests import Request
from starlette.types import Message, Receive, Scope, Send

from harness import Seeded, at_once, call, config, hello, in_flight, limit_headers, metric, outcomes, plan, problem
from seawall import (
    ConfigError,
    LimitExceeded,
    MemoryBackend,
    QuotaMiddleware,
    RateLimitMiddleware,
    Seawall,
    asgi,
    charge,
    limit,
    usage,
)
from seawall.backends import (
    FULL,
    Backend,
    Charge,
    Failure,
    FleetBackend,
    Full,
    Key,
    Observer,
    Permit,
    SharedBackend,
    Verdict,
)
from seawall.config import load_mapping
from seawall.decision import Clock
from seawall.exchange import Account
from seawall.metrics import CALL_BOUNDS
from seawall.testing import Answer, ManualClock, drive, reset

SERVICE = "https://iana.org/assignments/http-problem-types#temporary-reduced-capacity"


@pytest.fixture(autouse=True)
def _fresh() -> None:
    reset()


@coroutine
def pause() -> Generator[None, None, None]:
    """Wait for something, once."""
    yield


class Store:
    """A shared backend whose store is in this process: memory that can be told to be ``up`` or away.

    A ``slow`` one has to be awaited. What a debit took it says at `tell`, as one across a network would.
    """

    def __init__(
        self, clock: ManualClock, on_failure: Failure = "local", *, slow: bool = False, name: str = "store"
    ) -> None:
        self.name = name
        self.on_failure: Failure = on_failure
        self.up = True
        self.slow = slow
        self.observer: Observer | None = None
        self.memory, self.share = (MemoryBackend(clock=clock, wall_clock=clock.wall_ns) for _ in range(2))
        self.meter = self.memory.meter
        self.asked: list[Failure | None] = []
        self.refunded: list[int] = []
        self.life: list[str] = []
        self.closing: Callable[[], Awaitable[None]] = pause
        self.more: dict[str, dict[str, int]] = {}
        self._debits: list[tuple[Sequence[Charge], list[int]]] = []

    def spend(
        self, charges: Sequence[Charge], failure: Failure | None = None
    ) -> Verdict | None | Awaitable[Verdict | None]:
        self.asked.append(failure)
        return self._later(charges, failure) if self.slow else self._decide(charges, failure)

    async def _later(self, charges: Sequence[Charge], failure: Failure | None) -> Verdict | None:
        await pause()
        return self._decide(charges, failure)

    def _decide(self, charges: Sequence[Charge], failure: Failure | None) -> Verdict | None:
        if self.observer is not None:
            self.observer.called("ok" if self.up else "timeout", 300_000 if self.up else 25_000_000)
        if self.up:
            return self.memory.spend(charges)
        action: Failure = failure or self.on_failure
        if self.observer is not None:
            self.observer.fell_back(action)
        if action != "local":
            return None
        return self.share.spend([(self.share.meter(m.name, m.store, m.rate), key, cost) for m, key, cost in charges])

    def debit(self, charges: Sequence[Charge]) -> Sequence[int]:
        taken = [0] * len(charges)
        self._debits.append((charges, taken))
        return taken

    def tell(self) -> None:
        """The answers to all debits so far arrive."""
        for charges, taken in self._debits:
            taken[:] = self.memory.debit(charges)
        self._debits.clear()

    def refund(self, charges: Sequence[Charge], spent_at: int) -> None:
        self.refunded += [cost for _, _, cost in charges]
        self.memory.refund(charges, spent_at)

    def statistics(self) -> dict[str, dict[str, int]]:
        return {**self.memory.statistics(), **self.more}

    def open(self) -> None:
        self.life.append("open")

    async def aclose(self) -> None:
        await self.closing()
        self.life.append("closed")


@pytest.fixture(params=["at once", "awaited"])
def store(request: pytest.FixtureRequest, clock: ManualClock) -> Store:
    return Store(clock, slow=request.param == "awaited")


RULES = [
    {"name": "safe", "match": {"path": "/login"}, "on_backend_failure": "deny"},
    {"name": "open", "match": {"path": "/docs"}, "on_backend_failure": "allow"},
    {"name": "own", "match": {"path": "/items"}, "on_backend_failure": "local"},
]


def ask(app: Any, scope: str = "/", **changes: Any) -> Answer:
    """One request, to whose answers a store may come late."""
    running = drive(app, scope, **changes)
    try:
        while True:
            running.send(None)
    except StopIteration as stop:
        answer: Answer = stop.value
        return answer


def shell(store: Store, clock: ManualClock, registry: CollectorRegistry, app: Any = hello, **sections: Any) -> Seawall:
    settings = {**plan(rate="2/minute", concurrency=1), "routes": RULES, **sections}
    return Seawall(app, config=settings, backend=store, clock=clock, registry=registry)


def test_a_shared_backend_is_known_by_its_shape(clock: ManualClock) -> None:
    assert isinstance(Store(clock), SharedBackend)
    assert not isinstance(MemoryBackend(), SharedBackend)


# While it answers


def test_a_store_that_answers_decides(store: Store, clock: ManualClock, registry: CollectorRegistry) -> None:
    app = shell(store, clock, registry)
    answers = [ask(app) for _ in range(3)]
    assert [answer.status for answer in answers] == [200, 200, 429]
    assert limit_headers(answers[0])[1] == [("rate", {"r": 1, "t": 30})]
    assert outcomes(registry) == {"allowed": 2, "limited": 1}


def test_the_store_is_told_what_the_rule_says_of_its_absence(
    store: Store, clock: ManualClock, registry: CollectorRegistry
) -> None:
    app = shell(store, clock, registry)
    for path in ("/login", "/docs", "/items", "/other"):
        ask(app, path)
    assert store.asked == ["deny", "allow", "local", None]


def test_what_limits_nothing_asks_no_store(clock: ManualClock, registry: CollectorRegistry) -> None:
    store = Store(clock)
    off = shell(store, clock, registry, mode="off")
    unlimited = shell(store, clock, registry, plans={"default": {"rate": "unlimited"}})
    assert [call(app, "/login").status for app in (off, unlimited)] == [200, 200]
    assert store.asked == []


def test_what_is_shed_after_the_store_was_asked_is_given_back(clock: ManualClock, registry: CollectorRegistry) -> None:
    store = Store(clock, slow=True)
    app = shell(store, clock, registry)
    running = drive(app, headers={"X-Request-Timeout-Ms": "100"})
    running.send(None)
    clock.advance(1)
    with pytest.raises(StopIteration) as stopped:
        running.send(None)
    assert stopped.value.value.status == 504
    assert store.refunded == [1]


# While it is away


@pytest.mark.parametrize(("path", "own"), [("/login", "local"), ("/other", "deny"), ("/login", "allow")])
def test_a_rule_that_denies_is_a_503_and_never_a_429(
    path: str, own: Failure, store: Store, clock: ManualClock, registry: CollectorRegistry
) -> None:
    store.on_failure, store.up = own, False
    app = shell(store, clock, registry)
    answer = ask(app, path)
    assert (answer.status, limit_headers(answer)) == (503, (None, None))
    document = problem(answer)
    after = document.pop("retry_after")
    assert after in (1, 2)
    assert answer.headers["retry-after"] == str(after)
    assert document == {
        "type": SERVICE,
        "title": "Temporary Reduced Capacity",
        "status": 503,
        "detail": f"The limits that hold for this request cannot be checked at the moment. Retry in {after} s.",
        "reason": "backend_unavailable",
    }
    assert outcomes(registry) == {"denied": 1}
    assert metric(registry, "seawall_rejections_total") == {("backend_unavailable", "", "default", "normal"): 1}
    assert metric(registry, "seawall_policy_checks_total") == {}
    assert app.statistics()["concurrency"] == {"callers": 0, "in_flight": 0}
    assert store.refunded == []


@pytest.mark.parametrize(("drawn", "after"), [(0.0, 1), (0.999, 2)])
def test_who_is_denied_comes_back_in_one_or_two_seconds(
    drawn: float, after: int, clock: ManualClock, registry: CollectorRegistry
) -> None:
    store = Store(clock, "deny")
    store.up = False
    settings = load_mapping(plan(rate="1/minute"))
    app = Seeded(hello, settings, backend=store, clock=clock, registry=registry, random=lambda: drawn)
    assert call(app).headers["retry-after"] == str(after)


@pytest.mark.parametrize(("path", "own"), [("/docs", "local"), ("/other", "allow"), ("/docs", "deny")])
def test_a_rule_that_allows_lets_in_unchecked_and_names_its_policies(
    path: str, own: Failure, store: Store, clock: ManualClock, registry: CollectorRegistry
) -> None:
    seen: list[Any] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope)
        charge(request, 5)
        charge(request, -1)
        seen.append(usage(request))
        await hello(scope, receive, send)

    store.on_failure, store.up = own, False
    guarded = shell(store, clock, registry, app, responses={"headers": "both"})
    for _ in range(3):
        answer = ask(guarded, path)
        assert answer.status == 200
        assert answer.headers["ratelimit-policy"] == '"rate";q=2;w=60, "concurrency";q=1;qu="concurrent-requests"'
        assert not {"ratelimit", "x-ratelimit-remaining"} & set(answer.headers)
    assert [list(found) for found in seen] == [["concurrency"]] * 3
    assert outcomes(registry) == {"allowed": 3}
    assert (store.refunded, store._debits) == ([], [])
    store.up = True
    assert [ask(guarded, path).status for _ in range(3)] == [200, 200, 429]


@pytest.mark.parametrize(("path", "own"), [("/items", "deny"), ("/other", "local")])
def test_a_rule_that_goes_on_alone_limits_by_this_process_s_share(
    path: str, own: Failure, store: Store, clock: ManualClock, registry: CollectorRegistry
) -> None:
    store.on_failure, store.up = own, False
    answers = [ask(shell(store, clock, registry), path) for _ in range(3)]
    assert [answer.status for answer in answers] == [200, 200, 429]
    assert limit_headers(answers[0])[1] == [("rate", {"r": 1, "t": 30})]


@pytest.mark.parametrize("whose", ["file", "plan", "route"])
def test_what_is_in_shadow_mode_is_counted_and_served(
    whose: str, store: Store, clock: ManualClock, registry: CollectorRegistry
) -> None:
    store.up = False
    shadow = {"mode": "shadow"}
    app = shell(
        store,
        clock,
        registry,
        routes=[{**RULES[0], **(shadow if whose == "route" else {})}],
        plans={"default": {"rate": "2/minute", **(shadow if whose == "plan" else {})}},
        **(shadow if whose == "file" else {}),
    )
    answer = ask(app, "/login")
    assert (answer.status, limit_headers(answer)) == (200, (None, None))
    reason = {("backend_unavailable", "", "default", "normal"): 1.0}
    assert metric(registry, "seawall_shadow_rejections_total") == reason
    assert metric(registry, "seawall_rejections_total") == {}
    assert outcomes(registry) == {"allowed": 1}


def test_a_websocket_is_denied_before_it_is_accepted(
    store: Store, clock: ManualClock, registry: CollectorRegistry
) -> None:
    store.up = False
    app = shell(store, clock, registry)
    assert ask(app, "/login", type="websocket").messages == [
        {"type": "websocket.close", "code": 1013, "reason": "backend_unavailable"}
    ]
    assert ask(app, "/login", type="websocket", extensions={"websocket.http.response": {}}).status == 503
    assert ask(app, "/docs", type="websocket").status == 101


def test_grpc_clients_are_told_that_it_is_unavailable(clock: ManualClock, registry: CollectorRegistry) -> None:
    store = Store(clock)
    store.up = False
    answer = call(shell(store, clock, registry), "/login", headers={"Content-Type": "application/grpc"})
    assert (answer.headers["grpc-status"], "retry-after" in answer.headers) == ("14", False)


def test_a_shell_further_in_denies_for_both(store: Store, clock: ManualClock, registry: CollectorRegistry) -> None:
    store.on_failure, store.up = "deny", False
    outer = Store(clock)
    inner = RateLimitMiddleware(hello, limit="9/minute", backend=store, clock=clock, registry=registry)
    app = Seawall(inner, config=plan(rate="5/minute"), backend=outer, clock=clock, registry=registry)
    assert ask(app).status == 503
    assert outer.refunded == [1]


@pytest.mark.parametrize("up", [True, False])
@pytest.mark.parametrize("path", ["/login", "/docs", "/items"])
@pytest.mark.parametrize("error", [asyncio.CancelledError, GeneratorExit])
def test_who_leaves_while_the_store_is_asked_holds_nothing(
    error: type[BaseException], path: str, up: bool, clock: ManualClock, registry: CollectorRegistry
) -> None:
    store = Store(clock, slow=True)
    store.up = up
    app = shell(store, clock, registry)
    running = drive(app, path)
    running.send(None)
    with pytest.raises(error):
        running.throw(error())
    assert app.statistics()["concurrency"] == {"callers": 0, "in_flight": 0}
    assert in_flight(registry) == 0
    assert outcomes(registry) == {"cancelled": 1}
    assert store.refunded == []


class Fleet(Store):
    """A store that also counts who has a request in flight, and has one slot for everybody."""

    def __init__(self, clock: ManualClock) -> None:
        super().__init__(clock)
        self.taken: list[Permit] = []

    def permit(self, store: str, key: Key, limit: int) -> Permit:
        return Permit()

    def spend_with(
        self, permit: Permit, charges: Sequence[Charge], failure: Failure | None = None
    ) -> Verdict | Full | None:
        if self.taken:
            return FULL
        self.taken.append(permit)
        return self._decide(charges, failure)

    def release(self, permit: Permit) -> None:
        self.taken = [one for one in self.taken if one is not permit]

    def in_flight(self) -> dict[str, int]:
        return {"callers": len(self.taken), "in_flight": len(self.taken)}


def test_a_store_that_counts_who_is_in_flight_is_read_and_not_guessed_at(
    clock: ManualClock, registry: CollectorRegistry
) -> None:
    seen: list[Any] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append((sorted(usage(Request(scope))), guarded.statistics()["concurrency"], call(guarded).status))
        await hello(scope, receive, send)

    store = Fleet(clock)
    assert isinstance(store, FleetBackend)
    guarded = shell(store, clock, registry, app)
    assert call(guarded).status == 200
    assert seen == [(["rate"], {"callers": 1, "in_flight": 1}, 429)]
    assert guarded.statistics()["concurrency"] == {"callers": 0, "in_flight": 0}


# Limits of endpoints


three = limit("3/minute", per="global", name="three")


@pytest.mark.parametrize(("path", "status"), [("/login", 503), ("/docs", 200)])
def test_a_limit_of_an_endpoint_does_what_the_rule_says(
    path: str, status: int, store: Store, clock: ManualClock, registry: CollectorRegistry
) -> None:
    @three
    async def limited() -> None: ...

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        store.up = False
        await limited()
        await hello(scope, receive, send)

    answer = ask(shell(store, clock, registry, app), path)
    assert answer.status == status
    if status == 503:
        assert problem(answer)["reason"] == "backend_unavailable"
        assert store.refunded == [1]  # of the plan
        assert outcomes(registry) == {"denied": 1}
    else:
        named, closest = limit_headers(answer)
        assert [name for name, _ in named or []] == ["rate", "concurrency", "three"]
        assert closest == [("rate", {"r": 1, "t": 30})]
    assert store.asked == [RULES[path == "/docs"]["on_backend_failure"]] * 2


def test_who_catches_what_a_limit_raises_reads_the_same_status(clock: ManualClock, registry: CollectorRegistry) -> None:
    @three
    async def limited() -> None: ...

    caught: list[int] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        store.up = False
        try:
            await limited()
        except LimitExceeded as error:
            caught.append(error.status_code)
            raise

    store = Store(clock)
    assert call(shell(store, clock, registry, app), "/login").status == 503
    assert caught == [503]


def test_a_limit_of_an_endpoint_goes_on_alone(store: Store, clock: ManualClock, registry: CollectorRegistry) -> None:
    store.up = False
    app = FastAPI()

    @app.get("/", dependencies=[Depends(three)])
    async def endpoint() -> str:
        return "ok"

    app.add_middleware(Seawall, config=plan(rate="9/minute"), backend=store, clock=clock, registry=registry)
    client = TestClient(app)
    assert [client.get("/").status_code for _ in range(4)] == [200, 200, 200, 429]


def test_a_limit_of_an_endpoint_that_nobody_could_check_is_only_counted_in_shadow_mode(
    clock: ManualClock, registry: CollectorRegistry
) -> None:
    @three
    async def limited() -> None: ...

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        store.up = False
        await limited()
        await hello(scope, receive, send)

    store = Store(clock)
    assert call(shell(store, clock, registry, app, mode="shadow"), "/login").status == 200
    reason = {("backend_unavailable", "", "default", "normal"): 1.0}
    assert metric(registry, "seawall_shadow_rejections_total") == reason


# What a charge has taken is known later


def charging(*steps: int | Callable[[], object]) -> Any:
    """An application that charges, and whose store is told of meanwhile."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for step in steps:
            if isinstance(step, int):
                charge(request, step)
                await send({"type": "http.response.body", "body": b"x", "more_body": True})
            else:
                step()
        await send({"type": "http.response.body", "body": b""})

    return app


MANY = "10_000/minute"


def left_after(
    store: Store, clock: ManualClock, registry: CollectorRegistry, *steps: int | Callable[[], object]
) -> int:
    """What is left of `MANY` for the next request, that one paid."""
    ask(shell(store, clock, registry, charging(*steps), plans={"default": {"rate": MANY}}))
    store.tell()
    headers = limit_headers(ask(shell(store, clock, registry, plans={"default": {"rate": MANY}})))[1] or []
    return int(headers[0][1]["r"])


def test_what_a_charge_took_is_given_back_once_it_is_known(
    store: Store, clock: ManualClock, registry: CollectorRegistry
) -> None:
    assert left_after(store, clock, registry, 1_000, store.tell, -400) == 9_998 - 600
    assert store.refunded == [400]


def test_what_a_charge_may_have_taken_is_not_given_back(
    store: Store, clock: ManualClock, registry: CollectorRegistry
) -> None:
    assert left_after(store, clock, registry, 1_000, -400) == 9_999 - 1_000
    assert store.refunded == [1]  # what the request itself was charged


def test_what_was_not_known_yet_may_be_given_back_later(
    store: Store, clock: ManualClock, registry: CollectorRegistry
) -> None:
    assert left_after(store, clock, registry, 1_000, -400, store.tell, -400, -900) == 9_999
    assert store.refunded == [1, 400, 600]


def test_a_refusal_gives_back_what_is_known_of_charges(
    store: Store, clock: ManualClock, registry: CollectorRegistry
) -> None:
    @limit("1/hour", per="global", name="one")
    async def limited() -> None: ...

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await limited()
        for amount in (20, 30):
            store.tell()
            charge(Request(scope), amount)
            scope["seawall"].pay()
        await limited()

    guarded = shell(store, clock, registry, app, plans={"default": {"rate": MANY, "quota": "9_999/day"}})
    assert ask(guarded).status == 429
    assert sorted(store.refunded) == [1, 21, 21]  # the first call of `limited`, the rate, the quota


def test_a_long_stream_of_charges_is_kept_in_little_room(clock: ManualClock, registry: CollectorRegistry) -> None:
    store = Store(clock)
    steps = [step for _ in range(500) for step in (2, store.tell)]
    assert left_after(store, clock, registry, *steps, -900) == 9_998 - 100
    store = Store(clock)
    left_after(store, clock, registry, *[2] * 500, store.tell, -900)
    assert 2 <= store.refunded[0] < 100  # the oldest are closed, unknown as they were


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("debit"), st.integers(1, 9)),
            st.tuples(st.just("tell"), st.integers(0, 9)),
            st.tuples(st.just("withdraw"), st.integers(0, 30)),
        ),
        max_size=30,
    ),
    st.integers(0, 5),
)
def test_never_more_is_given_back_than_was_taken_for_certain(steps: list[tuple[str, int]], cost: int) -> None:
    account, open_debits = Account([cost, cost]), []
    certain, returned = cost, 0
    for step, amount in steps:
        if step == "debit":
            taken = [0]
            account.add([1], taken)
            open_debits.append((amount, taken))
        elif step == "tell" and open_debits:
            most, taken = open_debits.pop(amount % len(open_debits))
            taken[0] = min(most, amount)
            certain += taken[0]
        elif step == "withdraw":
            amounts = account.withdraw([1], amount)
            assert amounts == ({1: min(amount, certain - returned)} if min(amount, certain - returned) else {})
            returned += sum(amounts.values())
    assert account.withdraw([0, 1]) == {at: rest for at, rest in ((0, cost), (1, certain - returned)) if rest}
    assert account.withdraw([0, 1]) == {}


# From the start of the application to its end


class Life:
    """An application's lifespan as a server runs it: ``told`` is what it was answered, ``raised`` what came out."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.raised: BaseException | None = None

    async def run(self, app: Any) -> Life:
        messages = iter(("lifespan.startup", "lifespan.shutdown"))

        async def receive() -> Message:
            return {"type": next(messages)}

        async def send(message: Message) -> None:
            self.told.append(message["type"])

        try:
            await app({"type": "lifespan", "asgi": {"version": "3.0"}}, receive, send)
        except Exception as error:
            self.raised = error
        return self


async def lives(scope: Scope, receive: Receive, send: Send) -> None:
    for phase in ("startup", "shutdown"):
        assert (await receive())["type"] == f"lifespan.{phase}"
        await send({"type": f"lifespan.{phase}.complete"})


def noting(store: Store, app: Any) -> Any:
    """``app``, whose messages of lifespan are noted in the life of ``store``."""

    async def outer(scope: Scope, receive: Receive, send: Send) -> None:
        async def tell(message: Message) -> None:
            store.life.append(message["type"].removeprefix("lifespan."))
            await send(message)

        await app(scope, receive, tell)

    return outer


async def test_the_store_is_connected_before_the_start_and_closed_before_the_end_is_told(
    clock: ManualClock, registry: CollectorRegistry
) -> None:
    store = Store(clock)
    store.up = False  # nobody waits for it
    app = noting(store, shell(store, clock, registry, lives))
    for _ in range(2):
        life = await Life().run(app)
        assert (life.told, life.raised) == (["lifespan.startup.complete", "lifespan.shutdown.complete"], None)
        assert store.life == ["open", "startup.complete", "closed", "shutdown.complete"]
        store.life.clear()


def test_it_is_closed_with_a_real_application(clock: ManualClock, registry: CollectorRegistry) -> None:
    store, app = Store(clock), FastAPI()
    app.add_middleware(Seawall, default="2/minute", backend=store, clock=clock, registry=registry)
    with TestClient(app) as client:
        assert client.get("/").status_code == 404
        assert store.life == ["open"]
    assert store.life == ["open", "closed"]
    assert TestClient(app).get("/").status_code == 404  # without lifespan


async def fails_to_start(scope: Scope, receive: Receive, send: Send) -> None:
    await receive()
    await send({"type": "lifespan.startup.failed", "message": "no"})
    raise RuntimeError("no")


async def fails_to_end(scope: Scope, receive: Receive, send: Send) -> None:
    await receive()
    await send({"type": "lifespan.startup.complete"})
    await receive()
    raise RuntimeError("no")


async def fails_and_says_so(scope: Scope, receive: Receive, send: Send) -> None:
    await receive()
    await send({"type": "lifespan.startup.complete"})
    await receive()
    await send({"type": "lifespan.shutdown.failed", "message": "no"})


async def ends_without_a_word(scope: Scope, receive: Receive, send: Send) -> None:
    await receive()
    await send({"type": "lifespan.startup.complete"})


async def knows_no_lifespan(scope: Scope, receive: Receive, send: Send) -> None:
    raise AssertionError(scope["type"])


async def ignores_lifespan(scope: Scope, receive: Receive, send: Send) -> None:
    return


@pytest.mark.parametrize(
    ("app", "life"),
    [
        (fails_to_start, ["open", "closed", "startup.failed"]),
        (fails_to_end, ["open", "startup.complete", "closed"]),
        (fails_and_says_so, ["open", "startup.complete", "closed", "shutdown.failed"]),
        (ends_without_a_word, ["open", "startup.complete", "closed"]),
        # The server goes on without, and serves.
        (knows_no_lifespan, ["open"]),
        (ignores_lifespan, ["open"]),
    ],
)
async def test_however_the_application_ends_the_server_sees_what_it_would_without_seawall(
    app: Any, life: list[str], clock: ManualClock, registry: CollectorRegistry
) -> None:
    store = Store(clock)
    bare, guarded = await Life().run(app), await Life().run(noting(store, shell(store, clock, registry, app)))
    assert guarded.told == bare.told
    assert repr(guarded.raised) == repr(bare.raised)
    assert store.life == life


async def hangs() -> None:
    await asyncio.Event().wait()


async def breaks() -> None:
    raise OSError("broken pipe")


@pytest.mark.parametrize(("closing", "said"), [(hangs, "TimeoutError"), (breaks, "broken pipe")])
async def test_a_store_that_cannot_be_closed_keeps_no_application_from_ending(
    closing: Any,
    said: str,
    clock: ManualClock,
    registry: CollectorRegistry,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(asgi, "_CLOSING", 0.01)
    store = Store(clock)
    store.closing = closing
    with caplog.at_level(logging.WARNING, logger="seawall"):
        life = await Life().run(shell(store, clock, registry, lives))
    assert life.told == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    assert "the store backend could not be closed in order" in caplog.text
    assert said in caplog.text


def test_a_lifespan_passes_untouched_where_nothing_is_shared(clock: ManualClock) -> None:
    given_scope, given_receive, given_send = {"type": "lifespan"}, object(), object()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert (scope, receive, send) == (given_scope, given_receive, given_send)

    middleware: Any = Seawall(app, default="1/minute", clock=clock)
    at_once(middleware(given_scope, given_receive, given_send))


# Metrics


def test_calls_and_decisions_without_them_are_counted(
    store: Store, clock: ManualClock, registry: CollectorRegistry
) -> None:
    app = shell(store, clock, registry)
    ask(app)
    assert metric(registry, "seawall_backend_up") == {("store",): 1}
    store.up = False
    for path in ("/login", "/docs", "/docs", "/items"):
        ask(app, path)
    assert metric(registry, "seawall_backend_requests_total") == {("store", "ok"): 1, ("store", "timeout"): 4}
    assert metric(registry, "seawall_backend_fallback_decisions_total") == {("deny",): 1, ("allow",): 2, ("local",): 1}
    assert metric(registry, "seawall_backend_request_duration_seconds_sum") == {("store",): pytest.approx(0.1003)}
    buckets = metric(registry, "seawall_backend_request_duration_seconds_bucket")
    assert [buckets.get(("store", str(bound)), 0) for bound in (*CALL_BOUNDS, "+Inf")] == [0, 0, *[1] * 5, *[5] * 4]
    assert metric(registry, "seawall_backend_up") == {}


def test_there_is_nothing_to_say_of_a_store_that_is_not_shared(clock: ManualClock, registry: CollectorRegistry) -> None:
    call(Seawall(hello, default="1/minute", clock=clock, registry=registry))
    assert not [family.name for family in registry.collect() if family.name.startswith("seawall_backend")]


def test_a_backend_of_several_middlewares_is_read_once(clock: ManualClock, registry: CollectorRegistry) -> None:
    store = Store(clock)
    store.more = {"link": {"sent": 3}}  # whatever it has to say
    app = shell(store, clock, registry, shell(store, clock, registry))
    other = shell(store, clock, registry)
    call(app)
    call(other, client=("192.0.2.2", 1))
    assert metric(registry, "seawall_tracked_keys") == {("address",): 2}
    assert metric(registry, "seawall_backend_up") == {("store",): 1}
    assert app.statistics()["backend"]["link"] == {"sent": 3}


def test_one_of_two_stores_of_a_name_that_is_away_is_told(clock: ManualClock, registry: CollectorRegistry) -> None:
    apps = [shell(Store(clock), clock, registry) for _ in range(3)]
    backend = apps[1].backend
    assert isinstance(backend, Store)
    backend.up = False
    assert metric(registry, "seawall_backend_up") == {}
    backend.up = True
    assert metric(registry, "seawall_backend_up") == {("store",): 1}


# What is said at the start


def test_nothing_is_said_to_be_forgotten_that_is_shared(
    clock: ManualClock, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["uvicorn", "--workers", "4"])
    file = tmp_path / "seawall.yaml"
    file.write_text("version: 1\nplans: {default: {quota: 5/day}}\n")
    with caplog.at_level(logging.WARNING, logger="seawall"):
        Seawall(hello, config=file, backend=Store(clock), clock=clock)
        QuotaMiddleware(hello, limit="5/day", backend=Store(clock), clock=clock)
        assert caplog.messages == []
        Seawall(hello, config=file, clock=clock)
        QuotaMiddleware(hello, limit="5/day", clock=clock)
    assert [text.count("restart forgets") for text in caplog.messages] == [1, 0, 1]
    assert "backend: {type: redis, url: ...}" in caplog.messages[1]


# What a file names


class Named(Store):
    """What a backend's class is called with."""

    def __init__(self, url: str, **options: Any) -> None:
        self.url, self.options = url, options
        super().__init__(ManualClock(), options["on_failure"])


SHARED = {
    "type": "redis",
    "url": "redis://u:hunter2@localhost:1/3",
    "timeout": "7ms",
    "on_failure": "deny",
    "key_prefix": "shop",
    "secret": "a long secret",
    "instances": 4,
    "leases": False,
    "deny_cache": False,
    "max_keys": 5_000,
}


def stand_in(monkeypatch: pytest.MonkeyPatch, kind: str, **names: Any) -> None:
    """Let the module of a backend be one with these names."""
    module: Any = ModuleType(f"seawall.backends.{kind}")
    vars(module).update(names)
    monkeypatch.setitem(sys.modules, module.__name__, module)


def named(app: Seawall) -> Named:
    assert isinstance(app.backend, Named)
    return app.backend


@pytest.mark.parametrize("kind", ["redis", "limits"])
def test_the_backend_that_a_file_names_is_told_all_its_settings(
    kind: str, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, kind, **{f"{kind.capitalize()}Backend": Named})
    backend = named(Seawall(hello, config=config(backend={**SHARED, "type": kind}), clock=clock))
    assert (backend.url, backend.options) == (
        "redis://u:hunter2@localhost:1/3",
        {
            "timeout_ns": 7_000_000,
            "key_prefix": "shop",
            "secret": "a long secret",
            "instances": 4,
            "max_keys": 5_000,
            "on_failure": "deny",
            "deny_cache": False,
            **({"leases": False} if kind == "redis" else {}),
            "clock": clock,
            "wall_clock": clock.wall_ns,
        },
    )


def test_equal_settings_share_one_backend_for_as_long_as_somebody_uses_it(
    clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, "redis", RedisBackend=Named)

    def built(clock: Clock = clock, **changes: Any) -> Seawall:
        return Seawall(hello, config=config(backend={**SHARED, **changes}), clock=clock)

    one, other, later = built(), built(), built(ManualClock())
    assert one.backend is other.backend
    assert len({id(app.backend) for app in (one, built(url="redis://h"), later)}) == 3
    reset()
    assert one.backend is other.backend  # a store is not forgotten by forgetting what is here
    stacked = Seawall(built(), config=config(backend=SHARED), clock=clock)
    assert stacked.backend is one.backend


def test_what_a_backend_does_not_like_is_a_mistake_in_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(url: str, **options: Any) -> Backend:
        raise ValueError("the storage is not known")

    stand_in(monkeypatch, "limits", LimitsBackend=refuses)
    with pytest.raises(ConfigError, match="backend: the storage is not known") as caught:
        Seawall(hello, config=config(backend={**SHARED, "type": "limits"}))
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(("missing", "error"), [("hiredis", ConfigError), ("ssl", ImportError)])
def test_a_missing_extra_is_said_with_the_command_that_installs_it(
    missing: str, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named '{missing}'", name=missing)

    stand_in(monkeypatch, "redis", __getattr__=fails)
    with pytest.raises(error) as caught:
        Seawall(hello, config=config(backend=SHARED))
    assert ("the redis backend needs: pip install 'seawall[redis]'" in str(caught.value)) is (error is ConfigError)
