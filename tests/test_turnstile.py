"""The stages of overload control on a real event loop: who waits, who leaves while it waits, and what comes back.

Time stands still where nobody turns it, so that nothing here ends by a time-out.
"""

from __future__ import annotations

import asyncio
import contextvars
import gc
import threading
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from types import coroutine
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from starlette.types import Message, Receive, Scope, Send

from harness import at_once, config, hello, in_flight, metric, outcomes
from seawall import Seawall
from seawall.admission import DEFAULT_ROUTE, Admission, Answer, Denied, Profile, Terms, TermsCompiler, Ticket
from seawall.backends import LISTED
from seawall.backends.memory import MemoryBackend
from seawall.decision import Mode, Outcome
from seawall.overload.limiter import Class, Limiter, Settings
from seawall.overload.queue import DONE, RUNNING, WAITING
from seawall.policy import Plan, Policy, Priority, Route, Shedding, Streaming
from seawall.testing import ManualClock, drive
from seawall.turnstile import Entrance, Screening, Streams, Turnstile, settings_of
from test_asgi_endings import SlowBackend

MS = 1_000_000
PARTS = frozenset({"rate", "quota", "concurrency", "shedding", "priority"})


def zero() -> float:
    return 0.0


def terms(route: Route = DEFAULT_ROUTE, *, priority: str | None = None, **policy: Any) -> Terms:
    clock = ManualClock()
    backend = MemoryBackend(clock=clock, wall_clock=clock.wall_ns)
    routes = () if route is DEFAULT_ROUTE else (route,)
    compiler = TermsCompiler(Policy(routes=routes, **policy), backend, PARTS)
    return compiler.terms(Profile(Plan("pro"), LISTED, priority), route)


def ticket(terms: Terms, owner: str = "acme", *, deadline: int = 0) -> Ticket:
    made = Ticket({}, terms, owner, owner, lambda _: b"", None)
    made.deadline = deadline
    return made


class Stages:
    """The two stages around one limiter, as a request passes them."""

    def __init__(self, settings: Settings, status: int = 503) -> None:
        self.clock = ManualClock()
        self.waited: list[tuple[int, int, str]] = []
        self.turnstile = Turnstile(settings, self.clock, waited=lambda *what: self.waited.append(what))
        self.admission = Admission(
            [
                Screening(self.turnstile, self.clock, status, zero),
                Entrance(self.turnstile, self.clock, status, zero),
            ]
        )

    @property
    def limiter(self) -> Limiter:
        return self.turnstile.current

    async def enter(self, asking: Ticket) -> Answer:
        answer = self.admission.admit(asking)
        return await answer if isinstance(answer, Awaitable) else answer

    def leave(self, asking: Ticket, outcome: Outcome = Outcome.SUCCESS) -> None:
        self.admission.settle(asking, outcome, refund=False)

    def held(self) -> tuple[int, int, int]:
        """Permits, waiters, and permits of the default rule."""
        return self.limiter.in_flight, len(self.limiter.line), self.limiter.groups[0].in_flight


def fixed(limit: int) -> Settings:
    """The classes of a policy that lists none, and one rule beside the default one."""
    classes = (Class("critical"), Class("normal"), Class("low"))
    return Settings("fixed", initial=limit, least=1, most=limit, classes=classes, groups=2)


async def ended(*tasks: Awaitable[Any]) -> list[Any]:
    """What became of tasks that must end by themselves; one that hangs is cancelled."""
    return await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 5)


async def turn(times: int = 3) -> None:
    """Let everything run that is ready."""
    for _ in range(times):
        await asyncio.sleep(0)


# A policy that changes


def test_rules_keep_their_positions_whatever_their_order_and_however_often_they_change() -> None:
    turnstile = Turnstile(fixed(2), ManualClock())
    names = [f"rule {n}" for n in range(5)]
    for n in range(200):
        before = dict(turnstile._positions)
        order = [*names[n % 5 :], *names[: n % 5], f"new {n}"]
        positions = turnstile.positions(order)
        assert dict(turnstile._positions) == before, "not before it is in force"
        turnstile.change(fixed(2), positions, None, None)
        assert sorted(positions.values()) == [1, 2, 3, 4, 5, 6]
        assert n == 0 or all(positions[name] == before[name] for name in names)
    assert len(turnstile.current.groups) == 7


def test_more_rules_than_there_are_positions_share_the_last() -> None:
    turnstile = Turnstile(fixed(2), ManualClock())
    positions = turnstile.positions([f"rule {n}" for n in range(100)])
    turnstile.change(fixed(2), positions, None, None)
    assert sorted(positions.values()) == [*range(1, 63), *[63] * 38]
    law = turnstile.current.groups[63].law
    turnstile.change(fixed(2), turnstile.positions([f"rule {n}" for n in range(101)]), None, None)
    assert turnstile.current.groups[63].law is law
    assert len(turnstile.current.groups) == 64


def test_a_loop_that_comes_after_a_rule_was_removed_knows_its_position_still() -> None:
    """Its request may have been identified before, and for long."""
    turnstile = Turnstile(fixed(2), ManualClock())
    turnstile.change(Settings("fixed", groups=1), {}, None, None)

    async def groups() -> int:
        return len(turnstile.limiter().groups)

    assert asyncio.run(groups()) == 2


# Settings


def test_the_limiter_s_settings_are_the_policy_s() -> None:
    policy = Policy(
        shedding=Shedding("aimd", 30, 3, 300, 20 * MS),
        priorities=(Priority("gold", 250 * MS), Priority("tin", None, 0.02)),
        routes=(Route("a", ("/a",)), Route("b", ("/b",))),
    )
    found = settings_of(policy, priorities=True)
    assert found is not None
    assert (found.algorithm, found.initial, found.least, found.most, found.target_ns) == ("aimd", 30, 3, 300, 20 * MS)
    assert [(one.name, one.timeout_ns, one.min_share) for one in found.classes] == [
        ("gold", 250 * MS, 0.0),
        ("tin", None, 0.02),
    ]
    assert (found.groups, found.fair) == (3, True)


def test_without_priorities_all_requests_are_alike() -> None:
    found = settings_of(Policy(), priorities=False)
    assert found is not None
    assert ([one.name for one in found.classes], found.fair) == (["none"], False)


def test_shedding_that_is_off_has_no_limiter() -> None:
    assert settings_of(Policy(shedding=Shedding("off")), priorities=True) is None


# Screening


@pytest.mark.parametrize("turnstile", [True, False])
@pytest.mark.parametrize(
    ("deadline", "expired"), [(0, False), (-1, True), (4 * MS, True), (5 * MS, True), (5 * MS + 1, False)]
)
def test_what_has_expired_is_refused_first(turnstile: bool, deadline: int, expired: bool) -> None:
    stages = Stages(fixed(1))
    stages.clock.advance_ns(5 * MS)
    screening = Screening(stages.turnstile if turnstile else None, stages.clock, 503, zero)
    denied = screening.admit(ticket(terms(), deadline=deadline))
    assert (denied is not None) == expired
    if denied is not None:
        assert (denied.status, denied.reason, denied.after) == (504, "expired", None)
        assert stages.limiter.refused == 0  # nothing that the service could help


@pytest.mark.parametrize("status", [503, 529, 429])
async def test_a_refusal_has_the_status_of_the_policy_and_says_when_to_come_back(status: int) -> None:
    stages = Stages(fixed(1), status)
    rule = terms()
    first = ticket(rule)
    assert await stages.enter(first) is None
    stages.limiter.retry[0].seconds = stages.limiter.retry[rule.klass].seconds = 7
    waiters = [asyncio.create_task(stages.enter(ticket(rule))) for _ in range(300)]
    await turn()
    refused = [task.result() for task in waiters if task.done()]
    assert refused
    assert {(one.status, one.reason, one.after, one.timed) for one in refused if one is not None} == {
        (status, "queue_full", 7, True)
    }
    for task in waiters:
        task.cancel()
    await ended(*waiters)
    stages.leave(first)
    assert stages.held() == (0, 0, 0)


async def test_who_would_only_be_refused_later_is_refused_before_it_costs_anything() -> None:
    stages = Stages(fixed(1))
    rule = terms()
    assert await stages.enter(ticket(rule)) is None
    waiters = [asyncio.create_task(stages.enter(ticket(rule))) for _ in range(300)]
    await turn()
    screening = Screening(stages.turnstile, stages.clock, 503, zero)
    denied = screening.admit(ticket(rule))
    assert denied is not None
    assert denied.reason == "queue_full"
    for task in waiters:
        task.cancel()
    await ended(*waiters)


# Waiting for a permit


async def test_a_waiter_gets_the_permit_that_comes_back() -> None:
    stages = Stages(fixed(1))
    first, second = ticket(terms()), ticket(terms())
    assert await stages.enter(first) is None
    waiting = asyncio.create_task(stages.enter(second))
    await turn()
    assert (second.state, stages.held()) == (WAITING, (1, 1, 1))
    stages.leave(first)
    assert await ended(waiting) == [None]
    assert (second.state, second.held, stages.held()) == (RUNNING, True, (1, 0, 1))
    stages.leave(second)
    stages.leave(second)
    assert (second.state, stages.held()) == (DONE, (0, 0, 0))
    assert [(klass, result) for klass, _, result in stages.waited] == [(1, "admitted")]


async def test_what_is_held_is_given_back_whoever_is_asked_twice() -> None:
    stages = Stages(fixed(3))
    tickets = [ticket(terms()) for _ in range(3)]
    for one in tickets:
        assert await stages.enter(one) is None
    for one in tickets:
        for outcome in Outcome:
            stages.leave(one, outcome)
    assert stages.held() == (0, 0, 0)


async def test_a_waiter_cancelled_in_the_tick_of_its_grant_passes_it_on() -> None:
    stages = Stages(fixed(1))
    first, second, third = (ticket(terms(), name) for name in ("a", "b", "c"))
    assert await stages.enter(first) is None
    waiting = [asyncio.create_task(stages.enter(one)) for one in (second, third)]
    await turn()
    stages.leave(first)
    waiting[0].cancel()  # its future has a result, and it has not run
    assert (await ended(*waiting))[1] is None
    assert waiting[0].cancelled()
    assert (second.state, third.state, stages.held()) == (DONE, RUNNING, (1, 0, 1))
    stages.leave(third)
    assert stages.held() == (0, 0, 0)


async def test_of_a_crowd_that_is_cancelled_in_every_second_tick_everybody_else_is_served() -> None:
    stages = Stages(fixed(4))
    rule = terms()
    held = [ticket(rule) for _ in range(4)]
    for one in held:
        assert await stages.enter(one) is None
    asking = [ticket(rule, f"o{number % 5}") for number in range(200)]
    tasks = {one: asyncio.create_task(stages.enter(one)) for one in asking}
    await turn()
    waiting = [one for one in asking if one.state == WAITING]
    for tick in range(200):
        for one in held:
            stages.leave(one)
        if tick % 2:
            for one in waiting:
                if one.state not in (WAITING, DONE):
                    tasks[one].cancel()
        await turn()
        held = [one for one in waiting if one.state == RUNNING]
        assert len(held) <= 4
    cancelled = [one for one in waiting if tasks[one].cancelled()]
    assert 0 < len(cancelled) < len(waiting)
    assert [tasks[one].result() for one in waiting if one not in cancelled] == [None] * (len(waiting) - len(cancelled))
    assert stages.held() == (0, 0, 0)


async def test_a_waiter_whose_deadline_passes_is_expired_and_not_overloaded() -> None:
    stages = Stages(fixed(1))
    assert await stages.enter(ticket(terms())) is None
    waiting = asyncio.create_task(stages.enter(ticket(terms(), deadline=20 * MS)))
    await turn()
    stages.clock.advance_ns(20 * MS)
    (denied,) = await ended(waiting)  # by the next beat, 10 ms of real time
    assert isinstance(denied, Denied)
    assert (denied.status, denied.reason, denied.after, denied.timed) == (504, "expired", None, False)
    assert stages.held() == (1, 0, 1)
    assert [result for _, _, result in stages.waited] == ["expired"]


async def test_a_waiter_that_waits_too_long_is_told_when_to_come_back() -> None:
    stages = Stages(fixed(1))
    assert await stages.enter(ticket(terms())) is None
    waiting = asyncio.create_task(stages.enter(ticket(terms())))
    await turn()
    stages.clock.advance(60)
    (denied,) = await ended(waiting)
    assert isinstance(denied, Denied)
    assert (denied.status, denied.reason, denied.after) == (503, "queue_timeout", 1)
    assert stages.held() == (1, 0, 1)


async def test_who_had_a_permit_when_its_deadline_passed_and_has_not_begun_is_not_started() -> None:
    """Work that has expired is not started, and the permit is the next one's."""
    stages = Stages(fixed(1))
    first, late, next_ = ticket(terms()), ticket(terms(), "late", deadline=20 * MS), ticket(terms(), "next")
    assert await stages.enter(first) is None
    waiting = [asyncio.create_task(stages.enter(one)) for one in (late, next_)]
    await turn()
    stages.leave(first)
    stages.clock.advance_ns(20 * MS)  # between its grant and its turn on the loop
    denied, entered = await ended(*waiting)
    assert entered is None
    assert isinstance(denied, Denied)
    assert (denied.status, denied.reason) == (504, "expired")
    stages.leave(next_)
    assert stages.held() == (0, 0, 0)


async def test_who_expired_while_a_backend_was_asked_is_not_started() -> None:
    stages = Stages(fixed(1))
    late = ticket(terms(), deadline=20 * MS)
    screening, entrance = (stage for stage in stages.admission._stages)
    assert screening.admit(late) is None
    stages.clock.advance_ns(20 * MS)
    denied = entrance.admit(late)
    assert isinstance(denied, Denied)
    assert (denied.status, denied.reason, stages.held()) == (504, "expired", (0, 0, 0))


# Shadow mode


async def test_shadow_mode_lets_everybody_in_and_says_who_would_have_been_refused() -> None:
    stages = Stages(fixed(1))
    rule = terms(mode=Mode.SHADOW)
    tickets = [ticket(rule) for _ in range(200)]
    answers = [await stages.enter(one) for one in tickets]
    refused = [one for one in answers if one is not None]
    assert answers[0] is None
    assert 0 < len(refused) < 199
    assert {(one.reason, one.enforced) for one in refused} == {("queue_full", False)}
    for one in tickets:
        stages.leave(one)
    assert stages.held() == (0, 0, 0)


# Streams


def streaming(most: int, own: int | None = None, **policy: Any) -> Terms:
    return terms(Route("events", ("/events",), streaming=Streaming(most, own)), **policy)


def settle(streams: Streams, asking: Ticket) -> None:
    streams.settle(asking, Outcome.IGNORED, refund=False)


def test_streams_are_admitted_to_the_number_and_places_come_back() -> None:
    streams, rule = Streams(503, zero), streaming(3)
    tickets = [ticket(rule, name) for name in "abcd"]
    answers = [streams.admit(one) for one in tickets]
    assert answers[:3] == [None] * 3
    denied = answers[3]
    assert denied is not None
    assert (denied.status, denied.reason, denied.waits[0][0], denied.after) == (503, "overload", "streams", 1)
    assert repr(streams) == "<Streams 3 open on 1 rules>"
    settle(streams, tickets[3])  # it has none
    settle(streams, tickets[0])
    settle(streams, tickets[0])
    assert streams.open == {"events": 2}
    assert streams.admit(tickets[3]) is None
    for one in tickets:
        settle(streams, one)
    assert (streams.open, streams._of_caller) == ({"events": 0}, {})


def test_streams_of_one_caller_are_its_own_matter() -> None:
    streams, rule = Streams(503, zero), streaming(10, 2)
    assert [streams.admit(ticket(rule, "a")) for _ in range(2)] == [None] * 2
    denied = streams.admit(ticket(rule, "a"))
    assert denied is not None
    assert (denied.status, denied.reason, denied.waits[0][0]) == (429, "concurrency", "streams")
    assert streams.admit(ticket(rule, "b")) is None


def test_a_caller_in_shadow_mode_may_have_more_streams() -> None:
    streams = Streams(503, zero)
    rule = streaming(10, 1, mode=Mode.SHADOW)
    assert [streams.admit(ticket(rule)) for _ in range(3)] == [None] * 3


def test_when_to_come_back_for_a_stream_is_one_or_two_seconds() -> None:
    afters = []
    for draw in (0.0, 0.49, 0.5, 0.99):
        streams = Streams(503, lambda draw=draw: draw)  # type: ignore[misc]
        assert streams.admit(ticket(streaming(1))) is None
        denied = streams.admit(ticket(streaming(1)))
        assert denied is not None
        afters.append(denied.after)
    assert afters == [1, 1, 2, 2]


def test_what_is_no_stream_takes_no_place() -> None:
    streams = Streams(503, zero)
    assert streams.admit(ticket(terms())) is None
    assert streams.open == {}


# Loops


def test_every_loop_has_a_limiter_of_its_own() -> None:
    turnstile = Turnstile(fixed(1), ManualClock())

    async def found() -> list[Limiter]:
        limiters = [turnstile.limiter()]
        await turn()
        return [*limiters, turnstile.limiter()]

    one, other = asyncio.run(found()), asyncio.run(found())
    assert one[0] is one[1]
    assert other[0] is other[1]
    assert one[0] is not other[0]
    assert turnstile.current is other[0]
    assert repr(turnstile) == f"<Turnstile {other[0]!r}>"


def test_without_a_loop_nobody_can_wait() -> None:
    stages = Stages(fixed(1))
    assert at_once(stages.enter(ticket(terms()))) is None
    denied = at_once(stages.enter(ticket(terms())))
    assert isinstance(denied, Denied)
    assert (denied.status, denied.reason) == (503, "queue_full")


def test_a_request_that_waits_without_a_loop_is_told_why_it_cannot() -> None:
    """As when a loop's limiter is asked from somewhere else."""
    stages = Stages(fixed(1))
    entrance = Entrance(stages.turnstile, stages.clock, 503, zero)
    asked = ticket(terms())

    async def fill() -> None:
        assert await stages.enter(ticket(terms())) is None
        asked.limiter = stages.turnstile.limiter()
        answer = entrance.admit(asked)
        assert isinstance(answer, Coroutine)
        context = contextvars.copy_context()
        found: list[BaseException] = []

        def elsewhere() -> None:
            with suppress(StopIteration):
                try:
                    context.run(answer.send, None)
                except RuntimeError as error:
                    found.append(error)

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert "where an event loop runs" in str(found[0])

    asyncio.run(fill())


def test_requests_of_a_loop_that_has_died_take_no_room_from_the_next() -> None:
    """Test clients bring a loop each, and do not always let everything end."""
    stages = Stages(fixed(1))

    async def abandon() -> None:
        assert await stages.enter(ticket(terms())) is None

    for _ in range(3):
        asyncio.run(abandon())


def test_a_request_is_given_back_to_the_loop_that_it_came_from() -> None:
    stages = Stages(fixed(1))
    asked = ticket(terms())

    async def enter(asking: Ticket) -> Limiter:
        assert await stages.enter(asking) is None
        return stages.limiter

    first = asyncio.run(enter(asked))
    second = asyncio.run(enter(ticket(terms())))
    stages.leave(asked)
    assert (first.in_flight, second.in_flight) == (0, 1)


def test_two_loops_at_once_each_keep_their_limit() -> None:
    stages = Stages(fixed(1))
    turns = [threading.Event() for _ in range(3)]
    found: list[Answer | str] = []

    async def one() -> None:
        assert await stages.enter(ticket(terms(), "one")) is None
        turns[0].set()
        await asyncio.to_thread(turns[1].wait, 10)
        try:
            found.append(await asyncio.wait_for(stages.enter(ticket(terms(), "two")), 0.05))
        except TimeoutError:
            found.append("waits")

    async def other() -> None:
        await asyncio.to_thread(turns[0].wait, 10)
        assert await stages.enter(ticket(terms(), "three")) is None
        turns[1].set()

    threads = [threading.Thread(target=asyncio.run, args=(main(),)) for main in (one, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["waits"]


def test_two_loops_at_once_give_back_all_they_took() -> None:
    """Whatever the limit means to them: no request is refused for ever, and nothing is left."""
    registry = CollectorRegistry()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(0)
        await hello(scope, receive, send)

    shell = Seawall(app, config=config(shedding=FIXED_TWO), registry=registry)
    limiters: set[Limiter] = set()
    statuses: list[int] = []

    async def serve() -> None:
        async def one() -> None:
            statuses.append((await drive(shell)).status)
            assert shell.gate.turnstile is not None
            limiters.add(shell.gate.turnstile.current)

        for _ in range(30):
            await asyncio.gather(*(one() for _ in range(4)))

    threads = [threading.Thread(target=asyncio.run, args=(serve(),)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(statuses) == 240
    assert set(statuses) <= {200, 503}
    assert [(limiter.in_flight, len(limiter.line)) for limiter in limiters] == [(0, 0)] * len(limiters)
    assert sum(outcomes(registry).values()) == 240
    assert in_flight(registry) == 0


# What a server gives an application


class Cycle:
    """What uvicorn gives an application: its ``receive`` belongs to an object that knows who has left."""

    def __init__(self, *messages: Message) -> None:
        self.disconnected = False
        self.messages = list(messages)
        self.asked = 0

    async def receive(self) -> Message:
        self.asked += 1
        await asyncio.sleep(0)
        return self.messages.pop(0) if self.messages else {"type": "http.disconnect"}


class Queued:
    """What hypercorn and others give it: a queue of messages."""

    def __init__(self, *messages: Message) -> None:
        self.queue: asyncio.Queue[Message] = asyncio.Queue()
        for message in messages:
            self.queue.put_nowait(message)

    def __call__(self) -> Any:
        return self.queue.get()


def part(body: bytes, more: bool = True) -> Message:
    return {"type": "http.request", "body": body, "more_body": more}


GONE: Message = {"type": "http.disconnect"}


# Wherever a request waits, and whatever is thrown there

FIXED_TWO = {"algorithm": "fixed", "limit": {"initial": 2, "min": 1, "max": 2}}
FIXED_ONE = {"algorithm": "fixed", "limit": {"initial": 1, "min": 1, "max": 1}}
PATIENT = {"normal": {"queue": {"timeout": "1m"}}}


@coroutine
def stepped(running: Coroutine[Any, Any, Any], at: int, throw: type[BaseException], when: str, times: int) -> Any:
    """Run a coroutine as part of a task, and throw something into it where it waits for the ``at``-th time.

    At once, or when it is woken (``when``); ``times`` in a row. Returns how often it waited.
    """
    waited = 0
    error: BaseException | None = None
    while True:
        try:
            yielded = running.send(None) if error is None else running.throw(error)
        except StopIteration:
            return waited
        error = None
        waited += 1
        if at <= waited < at + times:
            error = throw()
            if when == "at once":
                # As a task does that is cancelled: it is not woken any more by what it waited for.
                if asyncio.isfuture(yielded):
                    yielded._asyncio_future_blocking = False
                    if not asyncio.isfuture(getattr(yielded, "_fut_waiter", None)):
                        yielded.cancel()
                continue
        yield yielded


class Crowd:
    """A service for one request at a time: one is served, the one that is tried waits, and another one behind it."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.registry = CollectorRegistry()
        self.clock = ManualClock()
        self.end = asyncio.Event()
        settings = {
            **config(
                plans={"default": {"rate": "100/minute", "concurrency": 1}},
                shedding=FIXED_ONE,
                priorities=PATIENT,
                routes=[{"name": "events", "match": {"path": "/events"}, "streaming": {"max": 3}}],
            ),
            **({"mode": "shadow"} if kind == "shadow" else {}),
        }
        self.shell = Seawall(
            self.app, config=settings, backend=SlowBackend(self.clock), registry=self.registry, clock=self.clock
        )

    async def app(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/holds":
            await self.end.wait()
        await asyncio.sleep(0)
        try:
            if scope["type"] == "websocket":
                await receive()
                await send({"type": "websocket.accept"})
                await asyncio.sleep(0)
                await send({"type": "websocket.close", "code": 1000})
                return
            await receive()
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await asyncio.sleep(0)
            await send({"type": "http.response.body", "body": b"x"})
        finally:
            await asyncio.sleep(0)

    def request(self, receive: Receive | None = None) -> Coroutine[Any, Any, None]:
        """The one that is tried."""
        websocket = self.kind == "websocket"
        if receive is None:
            receive = Queued({"type": "websocket.connect"} if websocket else part(b"", more=False))

        async def send(message: Message) -> None:
            await asyncio.sleep(0)

        scope = {
            "type": "websocket" if websocket else "http",
            "method": "GET",
            "path": "/events" if self.kind == "stream" else "/",
            "headers": [],
            "client": ("192.0.2.2", 1),
        }
        running: Coroutine[Any, Any, None] = self.shell(scope, receive, send)
        return running

    async def try_it(self, at: int, throw: type[BaseException], when: str, times: int) -> int:
        """Let one request in three be interrupted; how often it waited if it was not."""
        holder = asyncio.create_task(drive(self.shell, "/holds", client=("192.0.2.1", 1)))
        await turn(6)

        async def tried() -> int:
            waited: int = await stepped(self.request(), at, throw, when, times)
            return waited

        victim = asyncio.create_task(tried())
        await turn(6)
        behind = asyncio.create_task(drive(self.shell, client=("192.0.2.3", 1)))
        await turn(6)
        self.end.set()
        found = await ended(victim)
        # In no time but what the loop needs, for the clock stands: nobody waits for ever.
        assert [answer.status for answer in await ended(holder, behind)] == [200, 200]
        return found[0] if isinstance(found[0], int) else 0

    def check(self) -> None:
        gate = self.shell.gate
        assert gate.turnstile is not None
        assert gate.streams is not None
        limiter = gate.turnstile.current
        assert (limiter.in_flight, len(limiter.line)) == (0, 0)
        assert {group.in_flight for group in limiter.groups} == {0}
        assert self.shell.statistics()["concurrency"] == {"callers": 0, "in_flight": 0}
        assert sum(gate.streams.open.values()) == 0
        assert in_flight(self.registry) == 0
        assert sum(outcomes(self.registry).values()) == 3


@pytest.mark.parametrize(
    ("kind", "throw"),
    [
        *((kind, asyncio.CancelledError) for kind in ("plain", "stream", "websocket", "shadow")),
        *((kind, RuntimeError) for kind in ("plain", "stream", "websocket", "shadow")),
    ],
)
async def test_whatever_is_thrown_wherever_it_waits_the_permit_comes_back(
    kind: str, throw: type[BaseException]
) -> None:
    """Above all while it waits for a permit, in the tick of its grant, and while its caller is looked for."""
    points = Crowd(kind)
    count = await points.try_it(1 << 30, throw, "woken", 1)
    points.check()
    assert count >= 6
    for at in range(1, count + 1):
        for when in ("at once", "woken"):
            for times in (1, 2):
                crowd = Crowd(kind)
                await crowd.try_it(at, throw, when, times)
                try:
                    crowd.check()
                except AssertionError as failed:
                    raise AssertionError(f"thrown {when} at wait {at} of {count}, {times} times") from failed


async def test_a_request_that_is_cancelled_while_it_waits_is_counted_as_that() -> None:
    crowd = Crowd("plain")
    holder = asyncio.create_task(drive(crowd.shell, "/holds", client=("192.0.2.1", 1)))
    await turn(6)
    waiting = asyncio.create_task(drive(crowd.shell, client=("192.0.2.2", 1)))
    await turn(6)
    assert crowd.shell.statistics()["overload"]["waiting"]["normal"] == 1
    waiting.cancel()
    await ended(waiting)
    assert crowd.shell.statistics()["overload"]["waiting"]["normal"] == 0
    crowd.end.set()
    await holder
    assert outcomes(crowd.registry) == {"allowed": 1, "cancelled": 1}
    waits = metric(crowd.registry, "seawall_queue_wait_seconds_count")
    assert waits == {("normal", "cancelled"): 1}


@pytest.mark.parametrize("kind", ["uvicorn", "other servers"])
async def test_who_has_waited_leaves_nothing_for_the_garbage_collector(kind: str) -> None:
    """Thousands of cycles a second are a pause of every request in turn, and most of all under overload."""
    crowd = Crowd("plain")

    async def rounds(count: int) -> None:
        for _ in range(count):
            crowd.end.clear()
            holder = asyncio.create_task(drive(crowd.shell, "/holds", client=("192.0.2.1", 1)))
            await turn(6)
            message = part(b"", more=False)
            receive = Cycle(message).receive if kind == "uvicorn" else Queued(message)
            waiting = asyncio.create_task(crowd.request(receive))
            del receive
            await turn(6)
            assert crowd.shell.statistics()["overload"]["waiting"]["normal"] == 1
            crowd.end.set()
            await asyncio.wait((holder, waiting))
            crowd.clock.advance(1)

    await rounds(2)
    gc.disable()
    gc.freeze()
    try:
        await rounds(20)
        left = gc.collect()
    finally:
        gc.unfreeze()
        gc.enable()
    assert left < 20


# Callers that hang up while they wait


class Uploads:
    """One request holds the only permit while another one waits, whose body the application reads."""

    def __init__(self) -> None:
        self.end = asyncio.Event()
        self.bodies: list[bytes] = []
        self.kinds: list[str] = []
        self.on_part: Callable[[], None] = lambda: None
        self.sent: list[Message] = []
        self.registry = CollectorRegistry()
        self.shell = Seawall(
            self.app,
            config=config(
                plans={"default": {"rate": "100/minute"}},
                shedding=FIXED_ONE,
                priorities=PATIENT,
                identity={"anonymous": "shared"},
            ),
            registry=self.registry,
            clock=ManualClock(),
        )

    async def app(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/holds":
            await self.end.wait()
            return await hello(scope, receive, send)
        body = b""
        while True:
            message = await receive()
            self.kinds.append(message["type"])
            self.on_part()
            body += message.get("body", b"")
            if not message.get("more_body", False):
                break
        self.bodies.append(body)
        await hello(scope, receive, send)

    async def waiting(self, receive: Receive, kind: str = "http") -> tuple[asyncio.Task[Any], asyncio.Task[None]]:
        holder = asyncio.create_task(drive(self.shell, "/holds"))
        await turn()

        async def send(message: Message) -> None:
            self.sent.append(message)

        scope = {"type": kind, "method": "POST", "path": "/", "headers": [], "client": ("192.0.2.2", 1)}
        request = asyncio.create_task(self.shell(scope, receive, send))
        await turn()
        assert self.shell.statistics()["overload"]["waiting"]["normal"] == 1
        return holder, request

    async def serve(
        self,
        receive: Receive,
        meanwhile: Callable[[], None] = lambda: None,
        afterwards: Callable[[], None] = lambda: None,
    ) -> None:
        holder, request = await self.waiting(receive)
        meanwhile()
        self.end.set()
        await holder
        afterwards()
        await ended(request)
        overload = self.shell.statistics()["overload"]
        assert (overload["in_flight"], sum(overload["waiting"].values())) == (0, 0)


async def test_uvicorn_knows_by_itself_and_is_not_asked_for_messages() -> None:
    uploads, cycle = Uploads(), Cycle(part(b"a"), part(b"b", more=False))
    await uploads.serve(cycle.receive, meanwhile=lambda: uploads.kinds.append(str(cycle.asked)))
    assert uploads.kinds == ["0", "http.request", "http.request"]
    assert uploads.bodies == [b"ab"]
    assert outcomes(uploads.registry) == {"allowed": 2}


async def test_who_has_hung_up_on_uvicorn_while_it_waited_is_not_served() -> None:
    uploads, cycle = Uploads(), Cycle(part(b"a", more=False))
    await uploads.serve(cycle.receive, meanwhile=lambda: setattr(cycle, "disconnected", True))
    assert (uploads.bodies, uploads.sent, cycle.asked) == ([], [], 0)
    assert outcomes(uploads.registry) == {"allowed": 1, "cancelled": 1}
    assert metric(uploads.registry, "seawall_rejections_total") == {}


async def test_the_permit_of_who_has_left_is_the_next_one_s() -> None:
    uploads, cycle = Uploads(), Cycle(part(b"a", more=False))
    holder, request = await uploads.waiting(cycle.receive)
    behind = asyncio.create_task(drive(uploads.shell, "/behind", client=("192.0.2.3", 1)))
    await turn()
    cycle.disconnected = True
    uploads.end.set()
    assert [answer.status for answer in await ended(holder, behind)] == [200, 200]
    await request
    assert uploads.bodies == [b""]


async def test_what_a_caller_has_spent_before_it_left_is_not_given_back() -> None:
    """Or open and abort would be free."""
    uploads = Uploads()
    for _ in range(3):
        uploads.end.clear()
        cycle = Cycle(part(b"", more=False))
        await uploads.serve(cycle.receive, meanwhile=lambda cycle=cycle: setattr(cycle, "disconnected", True))  # type: ignore[misc]
    uploads.end.set()
    answer = await drive(uploads.shell, "/holds")
    assert answer.headers["ratelimit"].startswith('"rate";r=93;')


BODIES = [
    [part(b"", more=False)],
    [part(b"whole", more=False)],
    [part(b"a"), part(b"b"), part(b"c", more=False)],
    [part(b"a"), part(b""), part(b"", more=False)],
    [part(b"x" * 50_000), part(b"y" * 50_000), part(b"z" * 50_000, more=False)],
]


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("there", range(4))
async def test_a_body_that_was_looked_at_reaches_the_application_whole_and_in_order(
    body: list[Message], there: int
) -> None:
    """However much of it was there while its caller was looked for, and however much comes later."""
    uploads, receive = Uploads(), Queued(*body[:there])

    def rest() -> None:
        for message in body[there:]:
            receive.queue.put_nowait(message)

    await uploads.serve(receive, afterwards=rest)
    assert uploads.bodies == [b"".join(message["body"] for message in body)]
    assert outcomes(uploads.registry) == {"allowed": 2}


@pytest.mark.parametrize("tick", range(6))
async def test_no_message_is_lost_whenever_it_comes(tick: int) -> None:
    """In the very tick in which its caller is looked for, as well."""
    uploads, receive = Uploads(), Queued()
    holder, request = await uploads.waiting(receive)
    uploads.end.set()
    await turn(tick)
    receive.queue.put_nowait(part(b"a"))
    await turn(1)
    receive.queue.put_nowait(part(b"b", more=False))
    await ended(request)
    await holder
    assert uploads.bodies == [b"ab"]


@pytest.mark.parametrize("body", [[], [part(b"whole", more=False)]])
@pytest.mark.parametrize("before", [True, False])
async def test_who_has_hung_up_while_it_waited_is_not_served(body: list[Message], before: bool) -> None:
    uploads, receive = Uploads(), Queued(*body, *([GONE] if before else []))
    await uploads.serve(receive, meanwhile=lambda: None if before else receive.queue.put_nowait(GONE))
    assert (uploads.bodies, uploads.sent) == ([], [])
    assert outcomes(uploads.registry) == {"allowed": 1, "cancelled": 1}


async def test_who_hangs_up_later_is_the_application_s_to_notice() -> None:
    uploads, receive = Uploads(), Queued(part(b"a"))
    uploads.on_part = lambda: receive.queue.put_nowait(GONE)
    await uploads.serve(receive)
    assert uploads.kinds == ["http.request", "http.disconnect"]


async def test_a_websocket_s_messages_are_left_to_the_application() -> None:
    uploads = Uploads()
    asked: list[str] = []

    async def receive() -> Message:
        asked.append("asked")
        return {"type": "websocket.connect"}

    holder, request = await uploads.waiting(receive, "websocket")
    uploads.end.set()
    await ended(holder, request)
    assert len(asked) <= 2  # the application's own
