"""The limiter on a loop of its own, whose time is turned by hand: what holds after every step, and each rule once."""

from __future__ import annotations

import random
from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from seawall.decision import Outcome
from seawall.overload import limiter as module
from seawall.overload.laws import REASONS, AimdLaw, FixedLimit, Gradient2Law, LagLaw, LatencyLaw, Window
from seawall.overload.limiter import (
    ADMITTED,
    BEAT_NS,
    CALM_NS,
    EXPIRED,
    GROUP_WINDOW_NS,
    MOST_GROUPS,
    MOST_WAITING,
    OVERLOAD,
    QUEUE_FULL,
    QUEUE_TIMEOUT,
    STANDING_NS,
    WAITS,
    WINDOW_NS,
    Algorithm,
    Class,
    Limiter,
    Load,
    Settings,
)
from seawall.overload.queue import DONE, GRANTED, RUNNING, WAITING, Claim
from seawall.testing import ManualClock

MS = 1_000_000
SECOND = 1_000 * MS
TARGET = 10 * MS


class FakeLoop:
    """An event loop as far as a limiter needs one. Time passes between iterations only, or when a handler burns it."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.ready: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []
        self.timers: list[tuple[int, int, Callable[..., Any], tuple[Any, ...]]] = []
        self.number = 0

    def call_soon(self, callback: Callable[..., Any], *args: Any) -> None:
        self.ready.append((callback, args))

    def call_later(self, delay: float, callback: Callable[..., Any], *args: Any) -> object:
        self.number += 1
        heappush(self.timers, (self.clock() + round(delay * SECOND), self.number, callback, args))
        return self.number

    def iterate(self) -> None:
        """One iteration: timers that are due go behind what is ready, and what that makes ready comes later."""
        while self.timers and self.timers[0][0] <= self.clock():
            _, _, callback, args = heappop(self.timers)
            self.ready.append((callback, args))
        batch, self.ready = self.ready, []
        for callback, args in batch:
            callback(*args)

    def settle(self) -> None:
        """All that happens in no time."""
        for _ in range(10_000):
            if not self.ready and not (self.timers and self.timers[0][0] <= self.clock()):
                return
            self.iterate()
        raise AssertionError("the loop spins")

    def run(self, nanoseconds: int) -> None:
        """Let time pass while the loop is idle."""
        end = self.clock() + nanoseconds
        self.settle()
        while self.timers and self.timers[0][0] <= end:
            self.clock.advance_ns(self.timers[0][0] - self.clock())
            self.settle()
        self.clock.advance_ns(end - self.clock())


class Told:
    """A law that says what it is told to."""

    reason = "lag"

    def __init__(self, limit: float) -> None:
        self.limit = self.wanted = limit

    def observe(self, window: Window) -> bool:
        changed = self.limit != self.wanted
        self.limit = self.wanted
        return changed


class Service:
    """A limiter and its requests. A request that is granted begins in the next iteration, as a task does."""

    def __init__(
        self, given: Settings, *, loop: FakeLoop | None = None, no_loop: bool = False, processor: Any = None
    ) -> None:
        self.loop = loop or FakeLoop()
        self.waited: list[tuple[int, int, str]] = []
        self.changes: list[str] = []
        self.limiter = Limiter(
            given,
            clock=self.loop.clock,
            timers=None if no_loop else self.loop,
            changed=self.changes.append,
            waited=lambda *what: self.waited.append(what),
            processor=processor,
        )
        self.told: dict[Claim, list[str]] = {}

    @property
    def now(self) -> int:
        return self.loop.clock()

    def claim(self, klass: int = 0, owner: str = "acme", *, group: int = 0, deadline: int = 0) -> Claim:
        made = Claim()
        made.klass, made.owner, made.group, made.deadline, made.state = klass, owner, group, deadline, DONE
        self.told[made] = []
        made.wake = lambda reason: self.woken(made, reason)
        return made

    def woken(self, claim: Claim, reason: str) -> None:
        self.told[claim].append(reason)
        if reason is ADMITTED:
            self.loop.call_soon(self.begin, claim)

    def begin(self, claim: Claim) -> None:
        if claim.state == GRANTED:
            self.limiter.start(claim, self.now)

    def ask(self, claim: Claim) -> str:
        """What becomes of a request on its arrival."""
        return self.limiter.screen(claim, self.now) or self.limiter.enter(claim, self.now)

    def arrive(self, klass: int = 0, owner: str = "acme", *, group: int = 0, deadline: int = 0) -> tuple[Claim, str]:
        claim = self.claim(klass, owner, group=group, deadline=deadline)
        return claim, self.ask(claim)

    def fill(self, count: int, klass: int = 0, owner: str = "acme", *, group: int = 0) -> list[Claim]:
        """Requests that are in flight."""
        claims = []
        for _ in range(count):
            claim, reason = self.arrive(klass, owner, group=group)
            assert reason is ADMITTED
            claims.append(claim)
        return claims

    def end(self, claim: Claim, outcome: Outcome = Outcome.SUCCESS) -> None:
        self.limiter.release(claim, outcome, self.now)

    def serve(self, taking: int, *, group: int = 0, klass: int = 0, outcome: Outcome = Outcome.SUCCESS) -> str:
        """One request from start to end, if it is let in at once."""
        claim, reason = self.arrive(klass, group=group)
        if reason is ADMITTED:
            self.loop.run(taking)
            self.end(claim, outcome)
        return reason

    def end_all(self) -> None:
        """Whoever is in flight ends, whoever waits leaves."""
        for claim in [*self.limiter.line, *self.told]:
            self.end(claim, Outcome.IGNORED)
        self.loop.settle()
        assert (self.limiter.in_flight, len(self.limiter.line)) == (0, 0)

    def names(self, claims: list[Claim]) -> str:
        return "".join(str(claim.owner) for claim in claims)


CLASSES = (Class("critical"), Class("normal"), Class("low"))
PATIENT = tuple(Class(one.name, 60 * SECOND) for one in CLASSES)


def fixed(limit: int, classes: tuple[Class, ...] = PATIENT, **changes: Any) -> Service:
    return Service(Settings("fixed", initial=limit, least=1, most=limit, classes=classes, **changes))


def adaptive(initial: int = 20, classes: tuple[Class, ...] = PATIENT, **changes: Any) -> Service:
    return Service(Settings("adaptive", initial=initial, classes=classes, **changes))


# What holds after every step


class Steps(RuleBasedStateMachine):
    """Requests arrive, wait, leave and end in any order, while the limit moves, time passes and the loop lags."""

    @initialize(
        limit=st.integers(1, 5),
        algorithm=st.sampled_from(["adaptive", "fixed"]),
        share=st.sampled_from([0.0, 0.1, 0.5]),
        fair=st.booleans(),
        patience=st.sampled_from([None, 20 * MS, SECOND]),
    )
    def start_up(self, limit: int, algorithm: Algorithm, share: float, fair: bool, patience: int | None) -> None:
        classes = (Class("critical"), Class("normal", patience), Class("background", patience, share))
        self.service = Service(
            Settings(algorithm, initial=limit, least=1, most=8, classes=classes, groups=2, fair=fair)
        )
        self.limiter = self.service.limiter
        self.share = share
        if algorithm == "adaptive":
            self.limiter.law = self.law = Told(limit)
        else:
            self.law = Told(limit)
        self.forced: set[Claim] = set()
        self.screened: list[Claim] = []
        self.woken: list[Claim] = []
        self.running: list[Claim] = []
        self.ended: list[Claim] = []
        self.service.woken = self.when_woken  # type: ignore[method-assign]

    # What the limiter says

    def when_woken(self, claim: Claim, reason: str) -> None:
        told = self.service.told[claim]
        assert told == [], "told twice"
        told.append(reason)
        if reason is ADMITTED:
            assert claim.state == GRANTED
            self.admitted(claim)
            self.woken.append(claim)
        else:
            assert claim.state == DONE
            assert reason in (QUEUE_FULL, QUEUE_TIMEOUT, EXPIRED, OVERLOAD)
            assert reason is not EXPIRED or 0 < claim.deadline <= self.service.now
            self.ended.append(claim)

    def admitted(self, claim: Claim) -> None:
        """Room, time, and nobody more important."""
        assert self.limiter.in_flight <= self.limiter.limit
        assert not 0 < claim.deadline <= self.service.now
        if not (self.share and claim.klass == 2):
            more_important = [self.limiter.line.length(klass) for klass in range(claim.klass)]
            assert not any(more_important), "an inversion between classes"

    # What happens

    @rule(
        klass=st.integers(0, 2),
        owner=st.sampled_from("abc"),
        group=st.integers(0, 1),
        patience=st.one_of(st.just(0), st.integers(1, 100)),
    )
    def arrive(self, klass: int, owner: str, group: int, patience: int) -> None:
        deadline = self.service.now + patience * MS if patience else 0
        claim = self.service.claim(klass, owner, group=group, deadline=deadline)
        reason = self.limiter.screen(claim, self.service.now)
        if reason is ADMITTED:
            self.screened.append(claim)
        else:
            assert reason in (OVERLOAD, QUEUE_FULL)
            self.ended.append(claim)

    @precondition(lambda self: self.screened)
    @rule(data=st.data())
    def enter(self, data: st.DataObject) -> None:
        """Now, or after a while with the backend."""
        claim = data.draw(st.sampled_from(self.screened))
        self.screened.remove(claim)
        if 0 < claim.deadline <= self.service.now:
            self.ended.append(claim)
            return
        waiting = len(self.limiter.line)
        reason = self.limiter.enter(claim, self.service.now)
        if reason is ADMITTED:
            assert not waiting, "it overtook those that wait"
            self.admitted(claim)
            self.running.append(claim)
        elif reason is WAITS:
            assert claim.state == WAITING
            assert len(self.limiter.line) <= MOST_WAITING
        else:
            assert reason in (OVERLOAD, QUEUE_FULL)
            self.ended.append(claim)

    @rule(klass=st.integers(0, 2), group=st.integers(0, 1))
    def watch(self, klass: int, group: int) -> None:
        """In shadow mode."""
        claim = self.service.claim(klass, group=group)
        self.limiter.force(claim, self.service.now)
        self.forced.add(claim)
        self.running.append(claim)

    @precondition(lambda self: self.woken)
    @rule(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        claim = data.draw(st.sampled_from(self.woken))
        self.woken.remove(claim)
        self.limiter.start(claim, self.service.now)
        (self.running if claim.state == RUNNING else self.ended).append(claim)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), outcome=st.sampled_from(Outcome))
    def end(self, data: st.DataObject, outcome: Outcome) -> None:
        claim = data.draw(st.sampled_from(self.running))
        self.running.remove(claim)
        self.ended.append(claim)
        self.limiter.release(claim, outcome, self.service.now)

    @precondition(lambda self: self.woken or len(self.limiter.line))
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        """A task is cancelled while it waits, or in the tick of its grant."""
        claim = data.draw(st.sampled_from([*self.woken, *self.limiter.line]))
        if claim in self.woken:
            self.woken.remove(claim)
        self.ended.append(claim)
        self.limiter.release(claim, Outcome.IGNORED, self.service.now)

    @precondition(lambda self: self.ended)
    @rule(data=st.data(), outcome=st.sampled_from(Outcome))
    def end_again(self, data: st.DataObject, outcome: Outcome) -> None:
        self.limiter.release(data.draw(st.sampled_from(self.ended)), outcome, self.service.now)

    @rule(limit=st.integers(1, 8))
    def move_the_limit(self, limit: int) -> None:
        """With the next window. It cancels nothing, as the invariants say."""
        self.law.wanted = limit

    @rule(milliseconds=st.sampled_from([1, 4, 9, 10, 11, 30, 120, 700]))
    def pass_time(self, milliseconds: int) -> None:
        """The loop sleeps, and is late."""
        self.service.loop.clock.advance_ns(milliseconds * MS)
        self.service.loop.iterate()

    @rule(milliseconds=st.sampled_from([1, 6, 25]))
    def burn(self, milliseconds: int) -> None:
        """A handler computes: within the same iteration."""
        self.service.loop.clock.advance_ns(milliseconds * MS)

    @rule()
    def iterate(self) -> None:
        self.service.loop.iterate()

    @precondition(lambda self: not (self.running or self.woken or self.screened or len(self.limiter.line)))
    @rule()
    def sleep(self) -> None:
        """Nobody comes for an hour."""
        self.service.loop.run(3_600 * SECOND)

    # What holds

    @invariant()
    def permits_are_those_of_who_holds_one(self) -> None:
        holding = [*self.running, *self.woken]
        assert {claim.state for claim in self.running} <= {RUNNING}
        assert {claim.state for claim in self.woken} <= {GRANTED}
        assert self.limiter.in_flight == len(holding)
        assert [group.in_flight for group in self.limiter.groups] == [
            sum(claim.group == group for claim in holding) for group in range(2)
        ]

    @invariant()
    def whoever_waits_is_in_the_line(self) -> None:
        waiting = [claim for claim in self.service.told if claim.state == WAITING]
        assert sorted(map(id, self.limiter.line)) == sorted(map(id, waiting))
        assert len(self.limiter.line) == len(waiting) <= MOST_WAITING
        assert {claim.state for claim in self.ended} <= {DONE}

    @invariant()
    def the_limit_is_the_law_s(self) -> None:
        if self.limiter.settings.algorithm == "adaptive":
            assert self.limiter.limit == max(int(self.law.limit), 1)

    @invariant()
    def whoever_waits_is_thought_of(self) -> None:
        """A timer is booked while somebody waits or is served, which grants and refuses."""
        if self.limiter.line or any(claim not in self.forced for claim in self.woken):
            assert self.service.loop.timers

    def teardown(self) -> None:
        """Nobody waits for ever, whatever has happened."""
        if not hasattr(self, "limiter"):
            return
        loop, limiter = self.service.loop, self.limiter

        def begin_all() -> None:
            while self.woken or loop.ready:
                for claim in self.woken:
                    limiter.start(claim, self.service.now)
                    (self.running if claim.state == RUNNING else self.ended).append(claim)
                self.woken = []
                loop.iterate()

        begin_all()
        if limiter.line and loop.timers:
            loop.clock.advance_ns(max(0, loop.timers[0][0] - loop.clock()))
            loop.iterate()
            begin_all()
            # All room is taken, without anybody having ended.
            assert not limiter.line or limiter.in_flight >= limiter.limit
        for _ in range(200):
            loop.clock.advance_ns(BEAT_NS)
            loop.iterate()
            begin_all()
        assert not limiter.line, "somebody waits for ever"
        self.permits_are_those_of_who_holds_one()
        for claim in self.running:
            limiter.release(claim, Outcome.SUCCESS, self.service.now)
        self.running = []
        self.permits_are_those_of_who_holds_one()
        loop.run(SECOND)
        assert not loop.timers, "the heart beats for nobody"
        self.thresholds_open()

    def thresholds_open(self) -> None:
        """A little load for as long as it takes to be calm, and the least important is welcome."""
        self.law.wanted = 8
        loop = self.service.loop
        for _ in range(CALM_NS // WINDOW_NS + 10):
            claim = self.service.claim(0)
            if self.service.ask(claim) is ADMITTED:
                loop.run(3 * BEAT_NS)
                self.limiter.release(claim, Outcome.IGNORED, self.service.now)
            loop.run(WINDOW_NS - 3 * BEAT_NS)
        assert self.limiter.thresholds.klass is None
        assert self.service.ask(self.service.claim(2)) is ADMITTED


TestSteps = Steps.TestCase
TestSteps.settings = settings(stateful_step_count=60)


# Room, and no room


def test_requests_are_let_in_up_to_the_limit_and_then_wait() -> None:
    service = fixed(3)
    held = service.fill(3)
    claim, reason = service.arrive()
    assert (reason, claim.state, service.limiter.in_flight) == (WAITS, WAITING, 3)
    service.end(held[0])
    service.loop.settle()
    assert (claim.state, service.told[claim], service.limiter.in_flight) == (RUNNING, [ADMITTED], 3)


def test_without_a_loop_nobody_waits() -> None:
    service = Service(Settings("fixed", initial=1, least=1, most=1), no_loop=True)
    service.fill(1)
    assert service.arrive()[1] is QUEUE_FULL
    assert service.waited == []


def test_the_line_is_bounded() -> None:
    """And who is refused then is refused before anything is spent for it."""
    service = fixed(2, (Class("one", 60 * SECOND),), fair=False)
    service.fill(2)
    reasons = [service.arrive()[1] for _ in range(MOST_WAITING + 50)]
    waiting = reasons.count(WAITS)
    assert module.LEAST_WAITING <= waiting <= MOST_WAITING
    assert reasons == [WAITS] * waiting + [QUEUE_FULL] * (MOST_WAITING + 50 - waiting)
    assert service.limiter.screen(service.claim(), service.now) is QUEUE_FULL
    assert len(service.limiter.line) == waiting


def crowded(service: Service, klass: int = 1, owner: str = "x") -> list[Claim]:
    """As many waiters of a class as there can be."""
    found = []
    while True:
        claim, reason = service.arrive(klass, owner)
        if reason is not WAITS:
            assert reason is QUEUE_FULL
            return found
        found.append(claim)


def test_who_is_more_important_takes_the_place_of_the_worst() -> None:
    service = fixed(1)
    service.fill(1)
    waiting = crowded(service, 2)
    claim, reason = service.arrive(1)
    assert reason is WAITS
    assert service.told[waiting[-1]] == [QUEUE_FULL]
    assert [service.told[one] for one in waiting[:-1]] == [[]] * (len(waiting) - 1)
    assert (claim.state, service.arrive(2)[1]) == (WAITING, QUEUE_FULL)
    assert service.waited == [(2, 0, QUEUE_FULL)]


def test_who_has_used_less_takes_the_place_of_who_has_used_more() -> None:
    service = fixed(1)
    service.fill(1)
    heavy = crowded(service, 1, "heavy")
    for _ in range(3):
        service.limiter.usage.add("heavy")
    assert service.arrive(1, "light")[1] is WAITS
    assert service.told[heavy[-1]] == [QUEUE_FULL]


def test_without_fairness_nobody_takes_another_one_s_place() -> None:
    service = fixed(1, fair=False)
    service.fill(1)
    crowded(service, 1, "heavy")
    for _ in range(3):
        service.limiter.usage.add("heavy")
    assert service.arrive(1, "light")[1] is QUEUE_FULL


def served_in_order(service: Service, held: Claim, claims: list[Claim]) -> list[Claim]:
    """The order in which waiters are served one by one."""
    order: list[Claim] = []
    running = held
    while len(order) < len(claims):
        service.end(running)
        service.loop.settle()
        (running,) = [claim for claim in claims if claim.state == RUNNING]
        order.append(running)
    service.end(running)
    return order


def test_the_more_important_go_first_and_owners_take_turns() -> None:
    service = fixed(1)
    (held,) = service.fill(1)
    waiting = [(2, "z"), (1, "a"), (1, "a"), (1, "b"), (0, "c"), (1, "b")]
    claims = [service.arrive(klass, owner)[0] for klass, owner in waiting]
    assert service.names(served_in_order(service, held, claims)) == "cababz"


def test_requests_of_one_owner_go_in_the_order_of_their_arrival() -> None:
    service = fixed(1)
    (held,) = service.fill(1)
    claims = [service.arrive()[0] for _ in range(6)]
    assert served_in_order(service, held, claims) == claims


def test_without_fairness_requests_go_in_the_order_of_their_arrival() -> None:
    service = fixed(1, fair=False)
    (held,) = service.fill(1)
    claims = [service.arrive(0, owner)[0] for owner in "abaab"]
    assert service.names(served_in_order(service, held, claims)) == "abaab"


def test_the_newest_go_first_where_the_queue_stands() -> None:
    """Those who wait longest are about to give up; and only in the class that stands."""
    service = fixed(1)
    (held,) = service.fill(1)
    claims = [service.arrive(1)[0] for _ in range(3)]
    service.loop.run(STANDING_NS + BEAT_NS)
    claims += [service.arrive(0)[0] for _ in range(2)]
    order = served_in_order(service, held, claims)
    assert order == [claims[3], claims[4], claims[2], claims[1], claims[0]]


def test_a_class_with_a_share_is_not_starved() -> None:
    """Of the work of a saturated service it gets its share, whoever is more important."""
    service = fixed(1, (Class("critical", 60 * SECOND), Class("background", 60 * SECOND, 0.1)))
    (held,) = service.fill(1)
    for _ in range(3):
        service.arrive(1)
    served = [0, 0]
    running = held
    for _ in range(200):
        while service.limiter.line.length(0) < 2:
            service.arrive(0)
        if not service.limiter.line.length(1):
            service.arrive(1)
        service.end(running)
        service.loop.settle()
        (running,) = [claim for claim in service.told if claim.state == RUNNING]
        served[running.klass] += 1
    assert served[1] == pytest.approx(200 * 0.1, abs=2)


def test_a_class_without_a_share_waits_until_nobody_is_more_important() -> None:
    service = fixed(1, PATIENT[:2])
    (held,) = service.fill(1)
    low = service.arrive(1)[0]
    running = held
    for _ in range(50):
        service.arrive(0)
        service.end(running)
        service.loop.settle()
        (running,) = [claim for claim in service.told if claim.state == RUNNING]
        assert low.state == WAITING


def test_what_was_used_fades_while_there_is_overload() -> None:
    """By a tenth a window: who was heavy three seconds ago is as good as anybody."""
    service = fixed(1)
    (running,) = service.fill(1)

    def serve(owner: str, count: int) -> None:
        nonlocal running
        for _ in range(count):
            claim = service.arrive(1, owner)[0]
            service.end(running)
            service.loop.settle()
            assert claim.state == RUNNING
            running = claim
            service.loop.run(20 * MS)

    serve("heavy", 50)
    serve("other", 25)
    used = service.limiter.usage
    assert used.of("heavy") < used.of("other")
    serve("other", 150)
    assert used.of("heavy") < used.of("other") / 20


# How long one waits


def test_who_has_waited_for_as_long_as_its_class_allows_is_refused() -> None:
    service = fixed(1, (Class("critical", 60 * SECOND), Class("normal", 250 * MS)))
    service.fill(1)
    claim = service.arrive(1)[0]
    service.loop.run(250 * MS)
    assert service.told[claim] == []
    service.loop.run(2 * BEAT_NS)
    assert service.told[claim] == [QUEUE_TIMEOUT]
    assert service.waited[0][::2] == (1, QUEUE_TIMEOUT)
    assert 250 * MS < service.waited[0][1] <= 250 * MS + 2 * BEAT_NS


def test_who_has_no_time_out_of_its_own_waits_for_less_than_a_second() -> None:
    service = fixed(1, CLASSES)
    service.fill(1)
    claims = [service.arrive(klass)[0] for klass in (1, 2, 0)]
    service.loop.run(SECOND)
    assert [service.told[claim] for claim in claims] == [[QUEUE_TIMEOUT]] * 3


def test_a_deadline_ends_the_waiting() -> None:
    service = fixed(1)
    service.fill(1)
    claim = service.arrive(1, deadline=30 * MS)[0]
    service.loop.run(29 * MS)
    assert service.told[claim] == []
    service.loop.run(BEAT_NS)
    assert service.told[claim] == [EXPIRED]


def test_nobody_is_granted_what_it_has_no_time_for() -> None:
    """Not even in the tick before the beat that would refuse it."""
    service = fixed(1)
    (held,) = service.fill(1)
    late, next_ = service.arrive(1, deadline=5 * MS)[0], service.arrive(1)[0]
    service.loop.run(5 * MS)
    service.end(held)
    assert (service.told[late], service.told[next_]) == ([EXPIRED], [ADMITTED])


def test_who_expires_between_its_grant_and_its_beginning_is_not_started() -> None:
    service = fixed(1)
    (held,) = service.fill(1)
    late, next_ = service.arrive(1, deadline=5 * MS)[0], service.arrive(1)[0]
    service.end(held)
    assert (late.state, service.told[late]) == (GRANTED, [ADMITTED])
    service.loop.clock.advance_ns(5 * MS)
    assert service.limiter.start(late, service.now) is EXPIRED
    assert (late.state, next_.state, service.limiter.in_flight) == (DONE, GRANTED, 1)


def test_the_most_important_leave_most_of_their_time_for_the_work() -> None:
    """A quarter of what is left until the deadline is for waiting."""
    service = fixed(1, CLASSES)
    service.fill(1)
    claim = service.arrive(0, deadline=80 * MS)[0]
    service.loop.run(20 * MS)
    assert service.told[claim] == []
    service.loop.run(BEAT_NS)
    assert service.told[claim] == [QUEUE_TIMEOUT]


# Time as a limit: passes


def test_handlers_that_never_await_are_seen_by_the_time_that_they_take() -> None:
    """None is in flight when the next one arrives, so no limit of requests can see them."""
    service = adaptive()
    found = []
    for _ in range(10):
        claim, reason = service.arrive()
        found.append(reason)
        if reason is ADMITTED:
            service.loop.clock.advance_ns(2 * MS)
            service.end(claim)
    assert found == [ADMITTED] * 3 + [WAITS] * 7  # half of the target is used up
    assert service.limiter.in_flight == 0


def test_a_new_pass_lets_in_again_one_by_one() -> None:
    service = adaptive()
    first = service.claim()
    assert service.ask(first) is ADMITTED
    service.loop.clock.advance_ns(6 * MS)
    service.end(first)
    waiting = [service.arrive()[0] for _ in range(5)]
    for served in range(1, 6):
        service.loop.iterate()
        started = [claim for claim in waiting if claim.state != WAITING]
        assert served <= len(started) <= 2 * served
    service.loop.settle()
    assert [claim.state for claim in waiting] == [RUNNING] * 5


def test_a_pass_grants_one_and_the_next_one_another_while_there_is_room() -> None:
    """Also where those who were let in have not begun yet."""
    service = adaptive()
    first = service.claim()
    assert service.ask(first) is ADMITTED
    service.loop.clock.advance_ns(6 * MS)
    service.end(first)
    waiting = [service.arrive()[0] for _ in range(4)]
    service.begin = lambda claim: None  # type: ignore[method-assign]
    for granted in range(1, 5):
        service.loop.iterate()
        assert [claim.state for claim in waiting].count(GRANTED) == granted
    assert service.limiter.in_flight == 4


def test_whoever_begins_passes_on_what_room_is_left() -> None:
    """In chains and not in bursts: one for each, at once."""
    service = fixed(1)
    (held,) = service.fill(1)
    waiting = [service.arrive()[0] for _ in range(4)]
    service.limiter.limit = 3
    service.end(held)
    assert [claim.state for claim in waiting] == [GRANTED, WAITING, WAITING, WAITING]
    service.begin(waiting[0])
    assert [claim.state for claim in waiting] == [RUNNING, GRANTED, WAITING, WAITING]
    service.begin(waiting[1])
    service.begin(waiting[2])
    assert [claim.state for claim in waiting] == [RUNNING, RUNNING, RUNNING, WAITING]


def test_after_a_long_pass_everybody_waits_for_the_next() -> None:
    service = adaptive()
    claim, _ = service.arrive()
    service.loop.clock.advance_ns(3 * TARGET)
    service.end(claim)
    service.loop.iterate()
    late, reason = service.arrive()
    assert reason is WAITS
    service.loop.settle()
    assert late.state == RUNNING


@pytest.mark.parametrize("algorithm", ["adaptive", "gradient2", "aimd"])
def test_passes_count_for_every_law_but_the_fixed_one(algorithm: Algorithm) -> None:
    service = Service(Settings(algorithm))
    service.arrive()
    service.loop.clock.advance_ns(TARGET)
    assert service.arrive()[1] is WAITS


def test_a_limit_that_somebody_has_fixed_is_the_only_one() -> None:
    service = fixed(5)
    for _ in range(5):
        assert service.arrive()[1] is ADMITTED
        service.loop.clock.advance_ns(SECOND)
    assert service.arrive()[1] is WAITS


# The heartbeat


def test_the_heart_beats_while_somebody_is_there_and_stops_by_itself() -> None:
    service = adaptive()
    assert service.loop.timers == []
    (held,) = service.fill(1)
    for _ in range(5):
        service.loop.run(BEAT_NS)
        assert len(service.loop.timers) == 1
    service.end(held)
    service.loop.run(BEAT_NS)
    assert service.loop.timers == []


def test_the_heart_beats_for_a_request_that_waited_for_its_backend() -> None:
    service = adaptive()
    claim = service.claim()
    assert service.limiter.screen(claim, service.now) is ADMITTED
    service.loop.run(5 * BEAT_NS)
    assert service.limiter.enter(claim, service.now) is ADMITTED
    assert service.loop.timers


def late(service: Service, lag: int, windows: int = 1) -> None:
    """Windows in which the loop is late by so much each time."""
    for _ in range(windows):
        end = service.now + WINDOW_NS + lag + 1
        while service.now < end:
            due = service.loop.timers[0][0]
            service.loop.clock.advance_ns(max(0, due - service.now) + lag)
            service.loop.settle()


def test_the_lag_is_how_late_the_beats_are() -> None:
    service = adaptive()
    service.fill(1)
    late(service, 7 * MS, 2)
    assert service.limiter.statistics()["lag"] == pytest.approx(0.007)


def test_a_lag_above_the_target_lowers_the_limit_and_cancels_nothing() -> None:
    service = adaptive()
    held = service.fill(10)
    before = service.limiter.limit
    late(service, 3 * TARGET, 10)
    assert service.limiter.limit < min(before, 10)
    assert [claim.state for claim in held] == [RUNNING] * 10
    assert service.limiter.in_flight == 10
    assert set(service.changes) == {"lag"}
    for claim in held:
        service.end(claim)
    assert service.limiter.in_flight == 0


def test_one_long_call_is_no_overload() -> None:
    service = adaptive()
    service.fill(5)
    service.loop.run(3 * WINDOW_NS)
    before = service.limiter.limit
    service.loop.clock.advance_ns(200 * MS)
    service.loop.run(3 * WINDOW_NS)
    assert service.limiter.limit >= before
    assert "lag" not in service.changes


def test_what_was_measured_long_ago_is_forgotten() -> None:
    service = adaptive()
    service.fill(1)
    late(service, 3 * TARGET, 3)
    for claim in list(service.told):
        service.end(claim)
    service.loop.run(CALM_NS + SECOND)
    service.arrive()
    assert service.limiter.statistics()["lag"] == 0
    assert service.limiter.thresholds.klass is None


def test_a_pause_does_not_let_newcomers_overtake_who_waits() -> None:
    service = adaptive(10)
    service.fill(1)
    service.loop.clock.advance_ns(CALM_NS + SECOND)  # a handler computes, in this very pass
    waiting = [service.arrive(0)[0] for _ in range(4)]
    service.loop.iterate()
    assert [claim.state for claim in waiting].count(WAITING) == 2  # one by the pass, one by the beat
    newcomer, reason = service.arrive(2)
    assert (reason, newcomer.state) == (WAITS, WAITING)


# Rules and their latency


def test_requests_of_a_rule_are_counted_by_rule() -> None:
    service = adaptive(groups=3)
    held = service.fill(2, group=1) + service.fill(1, group=2)
    assert [group.in_flight for group in service.limiter.groups] == [0, 2, 1]
    for claim in held:
        service.end(claim)
    assert [group.in_flight for group in service.limiter.groups] == [0, 0, 0]


def test_there_are_not_more_groups_than_are_worth_telling_apart() -> None:
    assert len(adaptive(groups=500).limiter.groups) == MOST_GROUPS


def test_a_rule_without_room_refuses_at_once_and_others_are_served() -> None:
    service = adaptive(groups=2)
    service.limiter.groups[1].limit = 1
    (held,) = service.fill(1, group=1)
    assert service.limiter.screen(service.claim(group=1), service.now) is OVERLOAD
    assert service.limiter.enter(service.claim(group=1), service.now) is OVERLOAD
    assert service.arrive(group=0)[1] is ADMITTED
    service.end(held)
    assert service.arrive(group=1)[1] is ADMITTED


def test_a_waiter_whose_rule_has_no_room_in_its_turn_is_refused_and_the_next_one_served() -> None:
    service = fixed(2, groups=2)
    held = service.fill(2)
    one, other = service.arrive(group=1)[0], service.arrive(group=0)[0]
    service.limiter.groups[1].limit = 0
    service.end(held[0])
    assert (service.told[one], service.told[other]) == ([OVERLOAD], [ADMITTED])


@pytest.mark.parametrize(
    ("outcome", "found"), [(Outcome.SUCCESS, (1, 0)), (Outcome.IGNORED, (0, 0)), (Outcome.DROPPED, (0, 1))]
)
def test_only_what_ended_well_is_a_sample(outcome: Outcome, found: tuple[int, int]) -> None:
    service = fixed(5)
    service.serve(3 * MS, outcome=outcome)
    group = service.limiter.groups[0]
    assert (group.samples, group.dropped) == found


def test_a_waiter_s_waiting_is_not_in_its_latency() -> None:
    service = fixed(1)
    (held,) = service.fill(1)
    claim = service.arrive()[0]
    service.loop.run(300 * MS)
    service.end(held, Outcome.IGNORED)
    service.loop.settle()
    service.loop.run(2 * MS)
    service.end(claim)
    assert service.limiter.groups[0].window().latency == pytest.approx(2 * MS, rel=0.01)


def test_a_request_that_was_refused_or_left_is_no_sample() -> None:
    service = fixed(1)
    (held,) = service.fill(1)
    waiting = service.arrive()[0]
    service.end(waiting)
    service.end(held, Outcome.IGNORED)
    window = service.limiter.groups[0].window()
    assert (window.samples, window.dropped) == (0, 0)
    assert service.waited == [(0, 0, "cancelled")]


@pytest.mark.slow
def test_a_downstream_that_becomes_slower_closes_its_rule_and_no_other() -> None:
    """And when it is well again the rule opens, with requests and without."""
    for used in (True, False):
        service = adaptive(100, groups=2)
        limits = service.limiter.groups

        def load(taking: int, seconds: float, service: Service = service) -> None:
            """Forty at a time on the second rule, one at a time on the first."""
            end = service.now + round(seconds * SECOND)
            while service.now < end:
                held = [claim for claim in (service.arrive(group=1) for _ in range(40)) if claim[1] is ADMITTED]
                other = service.arrive(group=0)
                service.loop.run(taking)
                for claim, reason in [*held, other]:
                    if reason is not WAITS:
                        service.end(claim)
                service.loop.run(MS)

        load(20 * MS, 6)
        opened = limits[1].limit
        load(400 * MS, 4)
        assert limits[1].limit < opened
        assert limits[0].limit <= opened
        assert "latency" in service.changes
        if used:
            load(20 * MS, 30)
        else:
            for _ in range(120):
                service.serve(GROUP_WINDOW_NS, group=0)
        assert limits[1].limit == opened == 1000


def test_drops_of_a_rule_lower_its_limit_by_a_tenth_a_window_at_most() -> None:
    service = adaptive(200, groups=1)
    for _ in range(60):
        held = [claim for claim, reason in (service.arrive() for _ in range(40)) if reason is ADMITTED]
        service.loop.run(20 * MS)
        for claim in held:
            service.end(claim, Outcome.DROPPED)
    (group,) = service.limiter.groups
    windows = service.now // GROUP_WINDOW_NS
    assert 40 * 0.9**windows - 1 <= group.limit <= 36
    assert "drop" in service.changes


def test_a_rule_is_not_judged_by_latency_while_the_loop_lags() -> None:
    """Requests wait for the loop several times, which says nothing of what is behind it."""
    service = adaptive(100)
    for taking, lag in ((20 * MS, 0), (300 * MS, 2 * TARGET)):
        for _ in range(12):
            held = [claim for claim, reason in (service.arrive() for _ in range(30)) if reason is ADMITTED]
            if lag:
                late(service, lag, 3)
            else:
                service.loop.run(taking)
            for claim in [*held, *service.limiter.line]:
                service.end(claim)
            service.loop.run(MS)
    assert service.limiter.groups[0].limit == 1000
    assert "latency" not in service.changes


# The laws


@pytest.mark.parametrize(
    ("algorithm", "law"),
    [("adaptive", LagLaw), ("aimd", AimdLaw), ("gradient2", Gradient2Law), ("fixed", FixedLimit)],
)
def test_each_algorithm_has_its_law(algorithm: Algorithm, law: type) -> None:
    limiter = Service(Settings(algorithm, initial=30, least=3, most=300, target_ns=7 * MS)).limiter
    assert type(limiter.law) is law
    assert limiter.limit == 30
    assert all(type(group.law) is (LatencyLaw if law is LagLaw else type(None)) for group in limiter.groups)
    assert getattr(limiter.law, "target_ns", 7 * MS) == 7 * MS


def test_aimd_is_told_of_drops() -> None:
    service = Service(Settings("aimd", initial=20, least=2))
    held = service.fill(10)
    for claim in held[:5]:
        service.end(claim, Outcome.DROPPED)
    service.loop.run(2 * WINDOW_NS)
    assert service.limiter.limit < 20
    assert service.changes[0] == "drop"


def test_gradient2_is_told_of_all_requests_together() -> None:
    service = Service(Settings("gradient2", initial=20, least=2, groups=2))
    for taking in (10 * MS, 100 * MS):
        for _ in range(round(3 * GROUP_WINDOW_NS / taking)):
            held = service.fill(9, group=0) + service.fill(9, group=1)
            service.loop.run(taking)
            for claim in held:
                service.end(claim)
            service.loop.run(MS)
    assert service.changes[0] == "growth"
    assert service.changes[-1] == "latency"


@pytest.mark.parametrize("ask", ["screen", "enter", "force"])
@pytest.mark.parametrize("calm", [True, False])
def test_a_class_that_is_gone_meanwhile_is_the_last_one_and_holds_no_permit_for_ever(ask: str, calm: bool) -> None:
    """A request may wait for a backend between being screened and entering, and the policy changes."""
    several = (Class("high", min_share=0.1), Class("normal"), Class("low"))
    service = Service(Settings("fixed", initial=1, least=1, most=1, classes=several))
    limiter = service.limiter
    if not calm:
        assert limiter.enter(service.claim(1), service.now) == ADMITTED
        assert limiter.enter(service.claim(1), service.now) == WAITS
    late = service.claim(2)
    limiter.change(Settings("fixed", initial=4, least=1, most=4, classes=several[:2]))
    others = limiter.in_flight + len(limiter.line)
    reason = getattr(limiter, ask)(late, service.now)
    assert reason in (ADMITTED, WAITS)
    limiter.release(late, Outcome.IGNORED, service.now)
    assert limiter.in_flight + len(limiter.line) == others
    limiter.groups[0].limit = 0
    refused = service.claim(2)
    assert limiter.screen(refused, service.now) == OVERLOAD
    assert limiter.announce(refused.klass, lambda: 0.0) == 1
    limiter.change(Settings("fixed", initial=4, least=1, most=4, classes=several[:1]))
    assert limiter.announce(refused.klass, lambda: 0.0) == 1  # it is told a step later


def test_a_rule_begins_without_what_another_was_measured_at() -> None:
    """At the position of one that is gone."""
    service = Service(Settings(groups=3))
    limiter = service.limiter
    busy = service.claim(group=2)
    assert limiter.enter(busy, service.now) == ADMITTED
    laws = [group.law for group in limiter.groups]
    limiter.groups[2].limit = 4
    limiter.change(Settings(groups=3), others={2, 9})
    assert [group.law is law for group, law in zip(limiter.groups, laws, strict=True)] == [True, True, False]
    assert (limiter.groups[2].limit, limiter.groups[2].in_flight) == (1000, 1)
    limiter.release(busy, Outcome.SUCCESS, service.now)
    assert (limiter.in_flight, limiter.groups[2].in_flight) == (0, 0)


def test_reasons_of_changes_are_a_closed_list() -> None:
    service = adaptive(groups=2)
    draw = random.Random(3)
    for _ in range(150):
        held = [claim for claim, why in (service.arrive(group=draw.randrange(2)) for _ in range(30)) if why is ADMITTED]
        late(service, draw.choice([0, 0, MS, 3 * TARGET]))
        for claim in [*held, *service.limiter.line]:
            service.end(claim, draw.choice(list(Outcome)))
    assert service.changes
    assert set(service.changes) <= set(REASONS)


# At the door


def storm(service: Service, seconds: float, each: int, taking: int = 20 * MS) -> list[tuple[int, str]]:
    """So many requests of every class every 20 ms, each in flight for ``taking``: what became of them on arrival."""
    found: list[tuple[int, str]] = []
    running: list[tuple[int, Claim]] = []
    end = service.now + round(seconds * SECOND)
    while service.now < end:
        for at, claim in list(running):
            if at <= service.now:
                running.remove((at, claim))
                service.end(claim)
        service.loop.settle()
        known = {claim for _, claim in running}
        running += [
            (service.now + taking, claim) for claim in service.told if claim.state == RUNNING and claim not in known
        ]
        for number in range(3 * each):
            claim, reason = service.arrive(number % 3, f"o{number % 5}")
            found.append((claim.klass, reason))
            if reason is ADMITTED:
                running.append((service.now + taking, claim))
        service.told = {claim: told for claim, told in service.told.items() if claim.state != DONE}
        service.loop.run(20 * MS)
    service.end_all()
    return found


def test_under_a_storm_the_least_important_are_refused_at_the_door() -> None:
    service = fixed(4, CLASSES)
    storm(service, 2, each=6)
    found = storm(service, 2, each=6)
    shed = [sum(why is OVERLOAD for klass, why in found if klass == one) for one in range(3)]
    asked = len(found) // 3
    assert shed[2] > asked * 0.9
    assert shed[0] < asked * 0.5
    assert service.limiter.statistics()["shed_from"] is not None


def test_after_a_storm_the_door_opens_by_itself_and_everything_is_at_rest() -> None:
    service = fixed(4, CLASSES)
    storm(service, 3, each=6)
    assert service.limiter.thresholds.klass is not None
    for _ in range((CALM_NS + SECOND) // (25 * MS)):
        service.serve(20 * MS)
        service.loop.run(5 * MS)
    assert service.limiter.thresholds.klass is None
    assert service.serve(MS, klass=2) is ADMITTED
    overload = service.limiter.statistics()
    assert (overload["in_flight"], sum(overload["waiting"].values()), overload["shed_from"]) == (0, 0, None)


def test_what_is_announced_grows_while_a_class_is_shed_and_shrinks_after() -> None:
    service = fixed(2, CLASSES)
    storm(service, 10, each=8)
    limiter = service.limiter
    announced = [limiter.announce(klass, lambda: 0.0) for klass in range(3)]
    assert announced[2] >= 5
    assert announced[0] <= announced[2]
    for _ in range(240):
        service.serve(20 * MS)
        service.loop.run(5 * MS)
    assert [limiter.announce(klass, lambda: 0.0) for klass in range(3)] == [1, 1, 1]


def test_what_was_announced_an_hour_ago_is_not_announced_again() -> None:
    service = fixed(2, CLASSES)
    storm(service, 10, each=8)
    service.loop.run(3_600 * SECOND)
    service.fill(1)
    assert service.limiter.announce(2, lambda: 0.0) == 1


def test_what_was_used_long_ago_does_not_count() -> None:
    service = fixed(2, CLASSES)
    storm(service, 2, each=6)
    for _ in range((CALM_NS + 2 * SECOND) // (25 * MS)):
        service.serve(20 * MS)
        service.loop.run(5 * MS)
    assert service.limiter.usage.of("o0") == 0


# Shadow mode


def test_whoever_only_watches_is_let_in_and_told_who_would_have_been_refused() -> None:
    service = fixed(1)
    limiter = service.limiter
    claims = [service.claim() for _ in range(MOST_WAITING + 10)]
    reasons = [limiter.force(claim, service.now) for claim in claims]
    assert limiter.in_flight == len(claims)
    assert reasons == sorted(reasons)  # first nobody, then everybody
    assert set(reasons) == {ADMITTED, QUEUE_FULL}
    assert [claim.state for claim in claims] == [RUNNING] * len(claims)
    for claim in claims:
        service.end(claim)
    assert limiter.in_flight == 0


# What an operator sees


def test_statistics_say_what_is_held() -> None:
    service = fixed(2)
    held = service.fill(2)
    service.arrive(1)
    service.arrive(2)
    service.arrive(2)
    assert service.limiter.statistics() == {
        "limit": 2,
        "reason": "start",
        "in_flight": 2,
        "waiting": {"critical": 0, "normal": 1, "low": 2},
        "lag": 0.0,
        "utilization": 0.0,
        "shed_from": None,
        "refused": 0,
    }
    assert repr(service.limiter) == "<Limiter 2/2 in flight, 3 waiting, fixed, <Thresholds open>>"
    assert [claim.state for claim in held] == [RUNNING] * 2


def test_what_is_refused_is_counted() -> None:
    service = fixed(1, (Class("one", 20 * MS),))
    service.fill(1)
    for _ in range(200):
        service.arrive()
    refused = service.limiter.refused
    assert 200 - MOST_WAITING <= refused < 200
    service.loop.run(SECOND)
    assert service.limiter.refused == 200


@pytest.mark.parametrize(
    ("busy", "in_use", "arrivals", "admitted", "found"),
    [
        (0.3, 0.0, 10, 10, 0.3),
        (0.3, 0.8, 10, 10, 0.8),
        (2.5, 0.0, 10, 10, 1.0),  # several threads: a loop has one core
        (0.5, 0.0, 0, 0, 0.5),
        (1.0, 1.0, 30, 10, 3.0),
        (1.0, 0.0, 5, 0, 5.0),
    ],
)
def test_utilization_is_demand_by_capacity(
    busy: float, in_use: float, arrivals: int, admitted: int, found: float
) -> None:
    used = 0
    load = Load(lambda: used, 0)
    for window in range(1, 1_000):
        used += round(busy * WINDOW_NS)
        load.add(window * WINDOW_NS, in_use, arrivals, admitted)
    assert load.ratio(999 * WINDOW_NS) == pytest.approx(found, rel=0.01)


def test_utilization_is_smoothed_over_five_seconds() -> None:
    load = Load(None, 0)
    load.add(500 * MS, 1.0, 1, 1)
    assert load.ratio(500 * MS) == pytest.approx(0.1)
    load.add(SECOND, 1.0, 1, 1)
    assert load.ratio(SECOND) == pytest.approx(0.19)


def test_utilization_falls_while_nobody_comes() -> None:
    load = Load(None, 0)
    for window in range(1, 200):
        load.add(window * WINDOW_NS, 1.0, 20, 10)
    at = 199 * WINDOW_NS
    falling = [load.ratio(at + seconds * SECOND) for seconds in range(6)]
    assert falling == sorted(falling, reverse=True)
    assert falling[-1] == 0
    assert load.ratio(at - SECOND) == falling[0]  # a clock that was set back changes nothing


def test_the_limiter_says_how_much_it_is_used() -> None:
    used = ManualClock()
    service = Service(Settings("fixed", initial=10, least=1, most=10), processor=used)
    held = service.fill(5)
    service.loop.run(30 * SECOND)
    assert service.limiter.statistics()["utilization"] == pytest.approx(0.5, rel=0.05)
    for claim in held:
        service.end(claim)
    service.loop.run(10 * SECOND)
    assert service.limiter.statistics()["utilization"] == pytest.approx(0, abs=0.01)


def test_an_adaptive_limit_that_grows_when_it_is_reached_is_no_measure_of_use() -> None:
    service = adaptive()
    service.fill(20)
    service.loop.run(10 * SECOND)
    assert service.limiter.statistics()["utilization"] == 0


# Long runs


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.0, 0.05])
@pytest.mark.parametrize("seed", range(3))
def test_a_minute_of_everything_leaves_nothing(seed: int, share: float) -> None:
    """Ten thousand requests of all kinds, some of which are cancelled, some expire, through two storms."""
    draw = random.Random(seed)
    classes = (Class("critical"), Class("normal", 50 * MS), Class("low", None, share))
    service = Service(Settings("adaptive", initial=20, classes=classes, groups=3))
    ends: list[tuple[int, int, Claim]] = []
    number = 0
    known: set[Claim] = set()
    while service.now < 60 * SECOND:
        storming = 10 * SECOND < service.now < 20 * SECOND or 30 * SECOND < service.now < 35 * SECOND
        for _ in range(draw.randrange(20 if storming else 3)):
            deadline = service.now + draw.randrange(1, 400) * MS if draw.random() < 0.2 else 0
            service.arrive(draw.randrange(3), f"o{draw.randrange(9)}", group=draw.randrange(3), deadline=deadline)
        for claim in list(service.limiter.line):
            if draw.random() < 0.02:
                service.end(claim)
        service.loop.clock.advance_ns(draw.choice([0, MS, 3 * MS, 25 * MS if storming else MS]))
        service.loop.iterate()
        service.loop.run(draw.choice([1, 2, 5]) * MS)
        for claim in [claim for claim in service.told if claim.state == RUNNING and claim not in known]:
            number += 1
            known.add(claim)
            heappush(ends, (service.now + draw.choice([5, 20, 80]) * MS, number, claim))
        while ends and ends[0][0] <= service.now:
            claim = heappop(ends)[2]
            service.end(claim, draw.choice(list(Outcome)))
            known.discard(claim)
        service.told = {claim: told for claim, told in service.told.items() if claim.state != DONE}
    service.end_all()
    service.loop.run(SECOND)
    limiter = service.limiter
    assert (limiter.in_flight, len(limiter.line)) == (0, 0)
    assert [group.in_flight for group in limiter.groups] == [0, 0, 0]
    assert service.loop.timers == []
    assert {result for _, _, result in service.waited} >= {"admitted", "cancelled", QUEUE_TIMEOUT}


@given(st.lists(st.integers(0, 4), min_size=1, max_size=30), st.integers(1, 6))
def test_owners_who_all_want_everything_get_the_same(owners: list[int], limit: int) -> None:
    """Tenant fairness within one request, of a queue that always has some of each."""
    assume(len(set(owners)) > 1)
    service = fixed(limit, PATIENT[:1])
    running = service.fill(limit, owner="first")
    everybody = [f"o{number}" for number in sorted(set(owners))]
    served = dict.fromkeys(everybody, 0)
    for _ in range(40):
        waiting = {str(claim.owner) for claim in service.limiter.line}
        for owner in everybody:
            if owner not in waiting:
                service.arrive(0, owner)
        service.end(running.pop(0))
        service.loop.settle()
        (begun,) = [claim for claim in service.told if claim.state == RUNNING and claim not in running]
        running.append(begun)
        served[str(begun.owner)] += 1
    assert max(served.values()) - min(served.values()) <= 1
