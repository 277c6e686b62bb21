"""However a request ends, everything that it held comes back, and it is counted once.

The coroutine is stepped by hand, and something is thrown into it wherever it waits.
"""

from __future__ import annotations

import asyncio
import contextvars
import gc
from collections.abc import Coroutine, Generator, Sequence
from contextlib import suppress
from types import coroutine
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from starlette.requests import Request
from starlette.types import Message, Receive, Scope, Send

from harness import at_once, call, config, hello, in_flight, metric, outcomes, plan, statuses
from seawall import RateLimitMiddleware, Seawall, charge, limit
from seawall.backends import Backend, Charge, Meter, Verdict
from seawall.backends.memory import MemoryBackend
from seawall.rate import Quota, Rate
from seawall.testing import ManualClock, drive, reset


@pytest.fixture(autouse=True)
def _fresh() -> None:
    reset()


@coroutine
def pause() -> Generator[None, None, None]:
    """Wait for something, once."""
    yield


class SlowBackend:
    """A backend behind a network: it waits before it has spent, and again before the answer is there."""

    name = "slow"

    def __init__(self, clock: ManualClock) -> None:
        self.memory = MemoryBackend(clock=clock, wall_clock=clock.wall_ns)

    def meter(self, name: str, store: str, rate: Rate | Quota) -> Meter:
        return self.memory.meter(name, store, rate)

    async def spend(self, charges: Sequence[Charge]) -> Verdict:
        await pause()
        verdict = self.memory.spend(charges)
        await pause()
        return verdict

    def debit(self, charges: Sequence[Charge]) -> Sequence[int]:
        return self.memory.debit(charges)

    def refund(self, charges: Sequence[Charge], spent_at: int) -> None:
        self.memory.refund(charges, spent_at)

    def statistics(self) -> dict[str, dict[str, int]]:
        return self.memory.statistics()

    async def aclose(self) -> None:
        await self.memory.aclose()


async def waits_everywhere(scope: Scope, receive: Receive, send: Send) -> None:
    await pause()
    try:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await pause()
        await send({"type": "http.response.body", "body": b"a", "more_body": True})
        await send({"type": "http.response.body", "body": b"b"})
    finally:
        await pause()


ten_a_minute = limit("10/minute", per="global", name="ten")
one_a_minute = limit("1/minute", per="global", name="one")


@ten_a_minute
async def limited() -> None:
    await pause()


async def with_a_limit(scope: Scope, receive: Receive, send: Send) -> None:
    await limited()
    charge(Request(scope), 3)
    await waits_everywhere(scope, receive, send)


@one_a_minute
async def exhausted() -> None: ...


async def refuses(scope: Scope, receive: Receive, send: Send) -> None:
    await pause()
    await exhausted()


class Scenario:
    """A shell whose every part waits, and one request to it."""

    def __init__(self, kind: str) -> None:
        self.registry = CollectorRegistry()
        self.clock = ManualClock("2026-03-04T12:00:00Z")
        self.before = 0
        settings = plan(rate="10/minute", quota="10/day", concurrency=1)
        changes: dict[str, Any] = {}
        app: Any = waits_everywhere
        backend: Backend | None = None
        identify = None
        match kind:
            case "slow backend":
                backend = SlowBackend(self.clock)
            case "slow identify":

                async def identify(scope: Scope) -> str:
                    await pause()
                    return "acme"

            case "refused by the rate":
                settings = plan(rate="1/minute", quota="10/day", concurrency=1)
                self.before = 1
            case "refused by a slow backend":
                settings, backend = plan(rate="1/minute", concurrency=1), SlowBackend(self.clock)
                self.before = 1
            case "limit":
                app = with_a_limit
            case "limit on a slow backend":
                app, backend = with_a_limit, SlowBackend(self.clock)
            case "refused by limit on a slow backend":
                app, backend = refuses, SlowBackend(self.clock)
                self.before = 1
            case "refused by limit":
                app = refuses
                self.before = 1
            case "shadow":
                settings = {**plan(rate="1/minute", concurrency=1), "mode": "shadow"}
                self.before = 1
            case "exempt":
                settings = config(routes=[{"name": "all", "match": {"path": "/**"}, "exempt": True}])
            case "denied":
                settings = {**settings, "identity": {"anonymous": "deny"}}
            case "websocket denied":
                settings = plan(rate="1/minute", concurrency=1)
                changes = {"type": "websocket", "extensions": {"websocket.http.response": {}}}
                self.before = 1
            case "nested":
                settings = plan(rate="10/minute", concurrency=1)
                app = Seawall(
                    waits_everywhere,
                    config=plan(rate="5/minute", concurrency=2),
                    registry=self.registry,
                    backend=SlowBackend(self.clock),
                    clock=self.clock,
                )
            case "nested, refused inside":
                app = RateLimitMiddleware(hello, limit="1/hour", registry=self.registry, clock=self.clock)
                self.before = 1
        self.shells: list[Any] = [
            Seawall(app, config=settings, backend=backend, identify=identify, registry=self.registry, clock=self.clock)
        ]
        if isinstance(app, Seawall | RateLimitMiddleware):
            self.shells.append(app)
        self.scope = {
            "type": "http",
            "method": "GET",
            "path": "/",
            "headers": [],
            "client": ("192.0.2.1", 1),
            **changes,
        }

    def request(self) -> Coroutine[None, None, None]:
        async def receive() -> Message:
            await pause()
            return {"type": "http.request"}

        async def send(message: Message) -> None:
            await pause()

        started: Coroutine[None, None, None] = self.shells[0](dict(self.scope), receive, send)
        return started

    def warm_up(self) -> None:
        for _ in range(self.before):
            finish(self.request())

    def check(self, requests: int) -> None:
        assert sum(outcomes(self.registry).values()) == requests
        assert in_flight(self.registry) == 0
        for shell in self.shells:
            assert shell.statistics()["concurrency"] == {"callers": 0, "in_flight": 0}


def finish(running: Coroutine[None, None, None]) -> int:
    """Step to the end; the number of times it waited."""
    waited = 0
    with suppress(StopIteration, Exception):
        while True:
            running.send(None)
            waited += 1
    return waited


KINDS = [
    "plain",
    "slow backend",
    "slow identify",
    "refused by the rate",
    "refused by a slow backend",
    "limit",
    "refused by limit",
    "limit on a slow backend",
    "refused by limit on a slow backend",
    "shadow",
    "exempt",
    "denied",
    "websocket denied",
    "nested",
    "nested, refused inside",
]


def interrupted(running: Coroutine[None, None, None], after: int, error: BaseException, again: int | None) -> None:
    """Throw ``error`` after so many waits, and once more ``again`` waits later; then let it end."""
    for _ in range(after):
        running.send(None)
    try:
        running.throw(error)
        if again is not None:
            for _ in range(again):
                running.send(None)
            running.throw(type(error)())
        while True:
            running.send(None)
    except (StopIteration, RuntimeError, asyncio.CancelledError, GeneratorExit):
        pass


@pytest.mark.parametrize("error", [asyncio.CancelledError, GeneratorExit, RuntimeError, OSError])
@pytest.mark.parametrize("kind", KINDS)
def test_whatever_is_thrown_wherever_it_waits_everything_comes_back(kind: str, error: type[BaseException]) -> None:
    points = Scenario(kind)
    points.warm_up()
    count = finish(points.request())
    points.check(points.before + 1)
    assert count >= 2
    for after in range(1, count + 1):
        for again in (None, 0, 1):
            scenario = Scenario(kind)
            scenario.warm_up()
            with suppress(OSError):
                interrupted(scenario.request(), after, error(), again)
            try:
                scenario.check(scenario.before + 1)
            except AssertionError as failed:
                raise AssertionError(f"thrown at wait {after} of {count}, again {again}") from failed


@pytest.mark.parametrize("kind", KINDS)
def test_a_coroutine_that_is_closed_gives_everything_back(kind: str) -> None:
    points = Scenario(kind)
    points.warm_up()
    for after in range(1, finish(points.request()) + 1):
        scenario = Scenario(kind)
        scenario.warm_up()
        running = scenario.request()
        for _ in range(after):
            running.send(None)
        # The application waits once more in its `finally`, which is a RuntimeError of `close`.
        with suppress(RuntimeError):
            running.close()
        finish(running)
        scenario.check(scenario.before + 1)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "slow identify"])
def test_a_request_leaves_nothing_for_the_garbage_collector(kind: str) -> None:
    """Thousands of cycles a second are a pause of every request in turn."""
    scenario = Scenario(kind)
    scenario.warm_up()
    finish(scenario.request())
    gc.disable()
    gc.freeze()  # what earlier tests have left is not looked through
    try:
        for _ in range(200):
            finish(scenario.request())
        left = gc.collect()
    finally:
        gc.unfreeze()
        gc.enable()
    assert left < 150  # not one for each


def test_a_coroutine_that_was_never_started_is_no_request() -> None:
    scenario = Scenario("plain")
    scenario.request().close()
    scenario.check(0)


def test_a_coroutine_closed_from_another_context_ends_quietly() -> None:
    """What a torn down event loop and the garbage collector do."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await pause()

    registry = CollectorRegistry()
    shell = Seawall(app, config=plan(concurrency=1), registry=registry)
    running = drive(shell)
    contextvars.copy_context().run(running.send, None)
    running.close()
    assert (in_flight(registry), shell.statistics()["concurrency"]["in_flight"]) == (0, 0)
    assert outcomes(registry) == {"cancelled": 1}


@pytest.mark.parametrize("kind", ["plain", "slow backend"])
def test_nothing_is_given_back_when_the_caller_leaves(kind: str) -> None:
    scenario = Scenario(kind)
    for _ in range(10):
        running = scenario.request()
        for _ in range(4):
            running.send(None)
        interrupted(running, 0, asyncio.CancelledError(), None)
    assert sum(outcomes(scenario.registry).values()) == 10
    finish(scenario.request())
    assert outcomes(scenario.registry)["limited"] == 1


def test_a_request_that_left_before_its_answer_is_cancelled(clock: ManualClock) -> None:
    scenario = Scenario("plain")
    running = scenario.request()
    running.send(None)
    interrupted(running, 0, asyncio.CancelledError(), None)
    assert outcomes(scenario.registry) == {"cancelled": 1}
    late = scenario.request()
    interrupted(late, 4, asyncio.CancelledError(), None)
    assert outcomes(scenario.registry) == {"cancelled": 1, "allowed": 1}


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


async def raises(scope: Scope, receive: Receive, send: Send) -> None:
    raise LookupError("a bug")


async def raises_late(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200})
    raise LookupError("a bug")


async def says_nothing(scope: Scope, receive: Receive, send: Send) -> None: ...


async def answers_twice(scope: Scope, receive: Receive, send: Send) -> None:
    await hello(scope, receive, send)
    await hello(scope, receive, send)


async def only_a_body(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.body", "body": b"x"})


@pytest.mark.parametrize("app", [raises, raises_late, says_nothing, answers_twice, only_a_body])
def test_an_application_that_misbehaves_is_one_allowed_request(
    app: Any, clock: ManualClock, registry: CollectorRegistry
) -> None:
    shell = Seawall(app, config=plan(rate="3/minute", concurrency=1), clock=clock, registry=registry)
    for _ in range(3):
        with suppress(LookupError):
            call(shell)
    assert call(shell).status == 429
    assert outcomes(registry) == {"allowed": 3, "limited": 1}
    assert in_flight(registry) == 0
    assert shell.statistics()["concurrency"] == {"callers": 0, "in_flight": 0}


def test_an_application_s_error_reaches_the_server(clock: ManualClock, registry: CollectorRegistry) -> None:
    with pytest.raises(LookupError, match="a bug"):
        call(Seawall(raises, default="3/minute", clock=clock, registry=registry))


def test_messages_of_a_double_answer_are_the_server_s_business(clock: ManualClock, registry: CollectorRegistry) -> None:
    answer = call(Seawall(answers_twice, default="3/minute", clock=clock, registry=registry))
    assert [message["type"].rpartition(".")[2] for message in answer.messages] == ["start", "body", "start", "body"]


async def test_a_permit_is_kept_until_the_handler_ends_and_not_until_the_client_leaves(
    clock: ManualClock, registry: CollectorRegistry
) -> None:
    """D6: open and abort must not run more handlers than the limit."""
    gone, end = asyncio.Event(), asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/slow":
            assert (await receive())["type"] == "http.request"
            assert (await receive())["type"] == "http.disconnect"
            gone.set()
            await end.wait()
        await hello(scope, receive, send)

    shell = Seawall(app, config=plan(concurrency=1), clock=clock, registry=registry)
    slow = asyncio.create_task(drive(shell, "/slow"))
    await gone.wait()
    assert (await drive(shell)).status == 429
    assert in_flight(registry) == 1
    end.set()
    await slow
    assert (await drive(shell)).status == 200
    assert in_flight(registry) == 0


async def test_a_permit_is_kept_until_the_stream_ends(clock: ManualClock, registry: CollectorRegistry) -> None:
    """Others give the slot back before the body is streamed."""
    started, end = asyncio.Event(), asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"a", "more_body": True})
        started.set()
        await end.wait()
        await send({"type": "http.response.body", "body": b"b"})

    shell = Seawall(app, config=plan(concurrency=1), clock=clock, registry=registry)
    stream = asyncio.create_task(drive(shell))
    await started.wait()
    assert (await drive(shell)).status == 429
    end.set()
    assert (await stream).body == b"ab"


async def test_a_hundred_at_once_are_admitted_to_the_number(clock: ManualClock, registry: CollectorRegistry) -> None:
    end = asyncio.Event()
    running = peak = 0

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal running, peak
        running += 1
        peak = max(peak, running)
        await end.wait()
        running -= 1
        await hello(scope, receive, send)

    shell = Seawall(app, config=plan(concurrency=5), clock=clock, registry=registry)
    tasks = [asyncio.create_task(drive(shell)) for _ in range(100)]
    await asyncio.sleep(0)
    assert sum(task.done() for task in tasks) == 95
    end.set()
    answers = await asyncio.gather(*tasks)
    assert (peak, sorted({answer.status for answer in answers})) == (5, [200, 429])
    assert outcomes(registry) == {"allowed": 5, "limited": 95}


async def test_concurrency_is_each_caller_s_own(clock: ManualClock, registry: CollectorRegistry) -> None:
    end = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await end.wait()
        await hello(scope, receive, send)

    shell = Seawall(app, config=plan(concurrency=1), clock=clock, registry=registry)
    tasks = [asyncio.create_task(drive(shell, client=(f"192.0.2.{n % 3}", 1))) for n in range(6)]
    await asyncio.sleep(0)
    assert shell.statistics()["concurrency"] == {"callers": 3, "in_flight": 3}
    end.set()
    assert [answer.status for answer in await asyncio.gather(*tasks)] == [200] * 3 + [429] * 3


async def test_cancelled_tasks_give_their_slots_back(clock: ManualClock, registry: CollectorRegistry) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.Event().wait()

    shell = Seawall(app, config=plan(concurrency=3), clock=clock, registry=registry)
    for _ in range(5):
        tasks = [asyncio.create_task(drive(shell)) for _ in range(3)]
        await asyncio.sleep(0)
        assert in_flight(registry) == 3
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    assert in_flight(registry) == 0
    assert outcomes(registry) == {"cancelled": 15}


def test_a_refusal_whose_delivery_fails_is_counted_once(clock: ManualClock, registry: CollectorRegistry) -> None:
    shell = Seawall(hello, config=plan(rate="1/minute", concurrency=1), clock=clock, registry=registry)
    assert statuses(shell, 1) == [200]

    async def receive() -> Message:
        return {"type": "http.request"}

    async def broken(message: Message) -> None:
        raise ConnectionResetError

    scope = {"type": "http", "method": "GET", "path": "/", "headers": [], "client": ("192.0.2.1", 1)}
    with pytest.raises(ConnectionResetError):
        at_once(shell(scope, receive, broken))
    assert outcomes(registry) == {"allowed": 1, "limited": 1}
    assert metric(registry, "seawall_rejections_total") == {("rate", "rate", "default", "normal"): 1}
    assert shell.statistics()["concurrency"] == {"callers": 0, "in_flight": 0}
