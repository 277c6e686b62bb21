"""The simulation of overload is faithful and repeatable; Seawall does in it what it did, and what it is meant to do."""

from __future__ import annotations

import asyncio
import functools
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from math import inf, log2, sqrt
from pathlib import Path
from typing import Any

import pytest
from benchmarks.harness import Report
from benchmarks.overload import __main__ as program
from benchmarks.overload import engine, golden, laws, measure, report, scenarios
from benchmarks.overload.engine import (
    ACCEPT_NS,
    BACKLOG,
    CALLBACK_NS,
    CLOSE_NS,
    CPU,
    DOWN,
    IO,
    LOST,
    MS,
    NEVER,
    PARSE_NS,
    REFUSE_NS,
    REFUSED,
    RESPOND,
    SERVED,
    SWITCH_NS,
    THREAD,
    UNFINISHED,
    US,
    Controller,
    Downstream,
    Log,
    Loop,
    Request,
    S,
    Source,
    Steps,
)
from benchmarks.overload.measure import Run

ROOT = Path(__file__).resolve().parent.parent


class Scripted:
    """A controller that decides as it is told, and writes down what it sees."""

    name = "scripted"

    def __init__(self, decide: Callable[[Request], bool | None] = lambda request: True) -> None:
        self.decide = decide
        self.seen: list[Request] = []
        self.finished: list[tuple[int, str]] = []
        self.responded: list[int] = []

    def attach(self, loop: Loop, capacity_hint: float) -> None:
        self.loop = loop

    def arrive(self, request: Request) -> bool | None:
        self.seen.append(request)
        return self.decide(request)

    def finish(self, request: Request, outcome: str) -> None:
        self.finished.append((self.loop.now, outcome))

    def started_response(self, request: Request) -> None:
        self.responded.append(self.loop.now)

    def stats(self) -> dict[str, float]:
        return {"finished": len(self.finished)}


def source(steps: Steps, *instants: int, **options: Any) -> Source:
    """Requests of one kind at these instants."""
    return Source([], lambda service: steps, instants=instants, **options)


def run(
    controller: Scripted, *sources: Source, until: int = S, downstream: Downstream | None = None
) -> tuple[Loop, Scripted]:
    loop = Loop(controller, sources, seed=1, downstream=downstream)
    loop.run(until)
    return loop, controller


def ends(loop: Loop) -> list[int]:
    return list(loop.log.ended)


# The loop


def test_requests_arrive_when_they_are_told_to() -> None:
    loop, _ = run(Scripted(), source(((CPU, MS),), 10 * MS, 20 * MS, 30 * MS))
    assert list(loop.log.arrived) == [10 * MS, 20 * MS, 30 * MS]


def test_a_request_takes_its_parsing_its_waiting_and_its_computing() -> None:
    loop, _ = run(Scripted(), source(((IO, 10 * MS), (CPU, 3 * MS)), MS))
    assert ends(loop) == [MS + PARSE_NS + 10 * MS + 3 * MS]


def test_a_refusal_costs_its_parsing_and_its_writing() -> None:
    loop, controller = run(Scripted(lambda request: False), source(((CPU, MS),), MS))
    assert (ends(loop), list(loop.log.status)) == ([MS + PARSE_NS + REFUSE_NS], [REFUSED])
    assert controller.finished == []


def test_what_a_callback_makes_ready_runs_in_the_next_iteration() -> None:
    loop = Loop(Scripted(), [], seed=1)
    order: list[tuple[str, int]] = []

    def first() -> None:
        order.append(("first", loop.iterations))
        loop.call_soon(lambda: order.append(("third", loop.iterations)))

    loop.call_soon(first)
    loop.call_soon(lambda: order.append(("second", loop.iterations)))
    loop.run(S)
    assert order == [("first", 1), ("second", 1), ("third", 2)]


def test_the_order_is_that_of_asyncio() -> None:
    """What is ready, then timers that are due; what these make ready comes an iteration later, as do their own."""

    def script(
        call_soon: Callable[..., object],
        call_later: Callable[..., object],
        burn: Callable[[], None],
        say: Callable[[str], None],
    ) -> None:
        def one() -> None:
            say("one")
            call_soon(say, "soon from one")
            call_later(0.001, say, "timer of 1 ms")
            burn()

        def timer() -> None:
            say("timer of 2 ms")
            call_soon(say, "soon from the timer")

        call_later(0.002, timer)
        call_soon(one)
        call_soon(say, "two")

    simulated: list[str] = []
    loop = Loop(Scripted(), [], seed=1)
    script(loop.call_soon, loop.call_later, lambda: loop.pause(50 * MS), simulated.append)
    loop.run(S)

    real: list[str] = []

    async def main() -> None:
        running = asyncio.get_running_loop()
        script(running.call_soon, running.call_later, lambda: time.sleep(0.05), real.append)
        await asyncio.sleep(0.2)  # the last timer is due after 2 ms

    with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
        runner.run(asyncio.wait_for(main(), 5))
    assert simulated == real
    assert len(real) == 6


def test_what_the_selector_finds_comes_before_timers_that_are_due() -> None:
    loop = Loop(Scripted(), [source(((CPU, MS),), MS)], seed=1)
    seen: list[int] = []
    loop.call_at(MS, lambda: seen.append(loop.now))
    loop.run(S)
    assert seen == [MS + PARSE_NS + CALLBACK_NS]  # after the parsing, before the task: that comes an iteration later


def test_all_that_have_arrived_are_parsed_before_any_handler_runs() -> None:
    loop, controller = run(Scripted(), source(((CPU, MS),), MS, MS + 10, MS + 20, MS + 30))
    assert controller.seen[1].seen_ns == MS + PARSE_NS + MS + 3 * PARSE_NS
    assert loop.log.started[1:] == engine.array("q", [controller.seen[1].seen_ns + n * MS for n in range(3)])


def test_requests_are_served_first_come_first_served() -> None:
    loop, _ = run(Scripted(), source(((CPU, 5 * MS),), *(MS + n * 100_000 for n in range(20))))
    assert list(loop.log.arrived) == sorted(loop.log.arrived)


def test_an_await_goes_behind_everything_that_is_ready() -> None:
    """Found by the selector while others compute, its task waits for all that was ready before."""
    short, long = source(((IO, MS), (CPU, MS)), MS), source(((CPU, 20 * MS),), MS + 1, MS + 2, MS + 3)
    loop, _ = run(Scripted(), short, long)
    # Three long ones are parsed and run in the iterations that the I/O ends in, and before its task.
    assert loop.log.source[-1] == 0
    assert ends(loop)[-1] == MS + 4 * PARSE_NS + 3 * 20 * MS + MS


def test_a_concurrency_limit_is_blind_to_handlers_that_never_await() -> None:
    most = 0
    running = 0

    def decide(request: Request) -> bool:
        nonlocal most, running
        running += 1
        most = max(most, running)
        return True

    class Counting(Scripted):
        def finish(self, request: Request, outcome: str) -> None:
            nonlocal running
            running -= 1

    loop = Loop(Counting(decide), [Source([(S, MS)], lambda service: ((CPU, 4 * MS),))], seed=1)
    loop.run(S)
    assert most == 1
    assert loop.log.status.count(UNFINISHED) > 600  # the queue is elsewhere


def test_a_timer_fires_on_a_whole_millisecond_after_an_idle_loop_began_to_wait() -> None:
    loop = Loop(Scripted(), [], seed=1)
    seen: list[int] = []
    loop.call_later(0.0103, lambda: seen.append(loop.now))
    loop.run(S)
    assert seen == [11 * MS + CALLBACK_NS]


def test_a_cancelled_timer_does_not_fire() -> None:
    loop = Loop(Scripted(), [], seed=1)
    seen: list[int] = []
    timer = loop.call_later(0.01, seen.append, 1)
    loop.call_later(0.005, timer.cancel)
    loop.run(S)
    assert seen == []


def test_a_waiting_request_starts_an_iteration_after_it_was_granted() -> None:
    def decide(request: Request) -> None:
        request.loop.call_at(request.loop.now + 5 * MS, request.start)

    loop, controller = run(Scripted(decide), source(((CPU, MS),), MS))
    granted = MS + PARSE_NS + 5 * MS + CALLBACK_NS
    assert ends(loop) == [granted + MS]
    assert controller.finished == [(granted + MS, "success")]


def test_a_woken_request_can_still_be_refused() -> None:
    def decide(request: Request) -> None:
        request.loop.call_soon(request.start, lambda one: False)

    loop, controller = run(Scripted(decide), source(((CPU, MS),), MS))
    assert list(loop.log.status) == [REFUSED]
    assert controller.finished == []


def test_a_request_that_does_not_wait_cannot_be_started() -> None:
    _, controller = run(Scripted(), source(((CPU, MS),), MS))
    with pytest.raises(RuntimeError, match="waits"):
        controller.seen[0].start()
    with pytest.raises(RuntimeError, match="waits"):
        controller.seen[0].refuse()


def test_a_slower_processor_takes_longer_for_everything() -> None:
    loop = Loop(Scripted(), [source(((IO, 10 * MS), (CPU, 3 * MS)), MS)], seed=1)
    loop.slow = 2
    loop.run(S)
    assert ends(loop) == [MS + 2 * PARSE_NS + 10 * MS + 6 * MS]


def test_a_start_after_the_deadline_is_counted() -> None:
    loop, _ = run(Scripted(), source(((CPU, 30 * MS),), MS, 2 * MS, 3 * MS, deadline_ns=30 * MS))
    assert loop.late_grants == 1


def test_a_stream_tells_when_its_response_begins() -> None:
    _, controller = run(Scripted(), source(((CPU, MS), (RESPOND, 0), *(((IO, 10 * MS), (CPU, US)) * 3)), MS))
    assert controller.responded == [MS + PARSE_NS + MS]
    assert controller.finished == [(MS + PARSE_NS + MS + 3 * (10 * MS + US), "success")]


def test_what_is_under_way_at_the_end_is_unfinished() -> None:
    loop, _ = run(Scripted(), source(((IO, 10 * S),), MS, 500 * MS), until=S)
    assert list(loop.log.status) == [UNFINISHED, UNFINISHED]
    assert ends(loop) == [S, S]


# Callers


def test_the_end_of_a_stream_is_read_an_iteration_after_the_data() -> None:
    """The server was busy until the caller had given up: it starts the handler, and learns of it right after."""
    seen: list[tuple[int, bool]] = []

    def decide(request: Request) -> bool:
        def look() -> None:
            seen.append((request.loop.iterations, request.gone))

        if request.kind == "late":
            look()
            request.loop.call_soon(look)
        return True

    busy = source(((CPU, 2 * S),), MS)
    late = source(((IO, 10 * MS), (CPU, MS)), 2 * MS, kind="late", patience_ns=S)
    loop, controller = run(Scripted(decide), busy, late, until=4 * S)
    iteration = seen[0][0]
    assert seen == [(iteration, False), (iteration + 1, True)]
    assert controller.seen[1].seen_ns > S + 2 * MS  # it had long been closed when the task took its first step
    assert [outcome for _, outcome in controller.finished] == ["success", "ignored"]
    assert list(loop.log.status) == [SERVED, SERVED]  # the handler ran to its end


def test_a_caller_who_gives_up_costs_the_server_a_close() -> None:
    loop, controller = run(Scripted(), source(((IO, 200 * MS), (CPU, MS)), MS, patience_ns=100 * MS))
    assert controller.seen[0].gone
    assert controller.finished == [(MS + PARSE_NS + 200 * MS + MS, "ignored")]
    assert loop.idle_ns == S - PARSE_NS - MS - CLOSE_NS - (S - ends(loop)[0])


def test_a_caller_with_an_answer_does_not_give_up() -> None:
    _, controller = run(Scripted(), source(((CPU, MS),), MS, patience_ns=100 * MS))
    assert not controller.seen[0].gone
    assert not controller.seen[0].closed


def test_a_caller_retries_after_a_refusal_as_often_as_it_may() -> None:
    loop, controller = run(Scripted(lambda request: False), source(((CPU, MS),), MS, retries=3, retry_after_ns=10 * MS))
    assert list(loop.log.attempt) == [0, 1, 2, 3]
    assert all(one.called_ns == MS for one in controller.seen)
    gaps = [later.arrived_ns - ended for later, ended in zip(controller.seen[1:], ends(loop), strict=False)]
    assert all(0 <= gap < 20 * MS for gap in gaps)


def test_a_caller_retries_after_a_time_out_while_the_first_attempt_goes_on() -> None:
    loop, controller = run(
        Scripted(), source(((IO, 300 * MS), (CPU, MS)), MS, patience_ns=100 * MS, retries=1), until=2 * S
    )
    assert [one.arrived_ns for one in controller.seen] == [MS, 101 * MS]
    assert controller.seen[1].connects  # it closed the connection that it had
    assert [outcome for _, outcome in controller.finished] == ["ignored", "ignored"]
    assert list(loop.log.status) == [SERVED, SERVED]


def test_a_new_connection_is_accepted_before_it_is_read() -> None:
    loop, _ = run(Scripted(), source(((CPU, MS),), MS, connects=True))
    assert ends(loop) == [MS + ACCEPT_NS // 2 * 2 + PARSE_NS + MS]
    assert loop.iterations == 5  # accept, make the transport, add the reader, parse, run the task


def test_connections_beyond_the_backlog_are_lost() -> None:
    busy = source(((CPU, S),), MS)
    crowd = Source([(2 * MS, NEVER), (900 * MS, 100_000)], lambda service: ((CPU, US),), connects=True, even=True)
    loop, _ = run(Scripted(), busy, crowd, until=10 * S)
    sent = len(loop.log) - 1
    assert sent > BACKLOG
    assert list(loop.log.status).count(LOST) == sent - BACKLOG


# Downstream and threads


def test_a_downstream_serves_as_many_at_a_time_as_it_has_slots() -> None:
    loop, _ = run(Scripted(), source(((DOWN, 100 * MS),), MS, 2 * MS, 3 * MS), downstream=Downstream(2))
    assert ends(loop) == [
        MS + PARSE_NS + 100 * MS,
        2 * MS + PARSE_NS + 100 * MS,
        MS + PARSE_NS + 200 * MS,  # it waited for the first slot
    ]


def test_a_slow_downstream_is_slow_for_calls_that_begin_then() -> None:
    downstream = Downstream(9, [(10 * MS, 20 * MS, 20)])
    loop, _ = run(Scripted(), source(((DOWN, 10 * MS),), MS, 15 * MS, 30 * MS), downstream=downstream)
    assert [
        ended - arrived - PARSE_NS for arrived, ended in sorted(zip(loop.log.arrived, ends(loop), strict=True))
    ] == [
        10 * MS,
        200 * MS,
        10 * MS,
    ]


def test_a_downstream_goes_on_while_the_loop_is_busy() -> None:
    calls = source(((DOWN, 10 * MS),), MS, MS + 1)
    loop, _ = run(Scripted(), calls, source(((CPU, 100 * MS),), 2 * MS), downstream=Downstream(1))
    assert ends(loop) == [2 * MS + PARSE_NS + 100 * MS] * 3


def test_a_thread_computes_while_the_loop_waits() -> None:
    loop, _ = run(Scripted(), source(((THREAD, 4 * MS),), MS))
    assert ends(loop) == [MS + PARSE_NS + 4 * MS]


def test_threads_take_turns_with_the_interpreter_lock() -> None:
    """The first has it 5 ms before the loop can start the second, 5 more, and its rest before the loop again."""
    long, short = source(((THREAD, 12 * MS),), MS), source(((THREAD, 3 * MS),), MS + 1)
    loop, _ = run(Scripted(), long, short)
    assert list(loop.log.source) == [1, 0]
    assert ends(loop)[0] == MS + 2 * PARSE_NS + 2 * SWITCH_NS + 3 * MS + 2 * MS


def test_the_loop_waits_behind_the_threads_at_every_iteration() -> None:
    threads = source(((THREAD, 50 * MS),), MS, MS + 1)
    _, controller = run(Scripted(), threads, source(((CPU, MS),), 10 * MS))
    waited = controller.seen[2].seen_ns - 10 * MS
    assert waited > 3 * SWITCH_NS  # before it is parsed for both, and before its task


def test_the_loop_lets_threads_go_on_after_a_switch_interval() -> None:
    thread, computing = source(((THREAD, 100 * MS),), MS), source(((CPU, 3 * MS),), *[10 * MS] * 4)
    loop, _ = run(Scripted(), thread, computing)
    started = sorted(at for at, which in zip(loop.log.started, loop.log.source, strict=True) if which == 1)
    gaps = [later - earlier for earlier, later in pairwise(started)]
    assert gaps == [3 * MS, 3 * MS + SWITCH_NS, 3 * MS]


def test_no_more_threads_run_than_the_pool_has() -> None:
    """Ten more wait: the first of 10 ms ends in the second round of 40 threads, and is answered after another round."""
    instants = [MS + n for n in range(engine.POOL_THREADS + 10)]
    loop, _ = run(Scripted(), source(((THREAD, 10 * MS),), *instants))
    assert list(loop.log.status) == [SERVED] * len(instants)
    rounds = (ends(loop)[0] - MS) / (engine.POOL_THREADS * SWITCH_NS)
    assert rounds == pytest.approx(2, abs=0.1)


# Repeatable


def poisson(mean: int, seed: int, controller: Controller, *, until: int = 20 * S, **options: Any) -> Loop:
    loop = Loop(controller, [Source([(until, mean)], scenarios.K1.draw)], seed=seed, **options)
    loop.run(until + S)
    return loop


def columns(loop: Loop) -> list[object]:
    log = loop.log
    return [log.source, log.status, log.arrived, log.started, log.ended]


def test_the_same_seed_gives_the_same_run() -> None:
    assert columns(poisson(2 * MS, 1, laws.Gradient2())) == columns(poisson(2 * MS, 1, laws.Gradient2()))


def test_another_seed_gives_another_run() -> None:
    assert columns(poisson(2 * MS, 1, laws.Nothing())) != columns(poisson(2 * MS, 2, laws.Nothing()))


def test_all_controllers_see_the_same_work() -> None:
    def work(controller: laws.ConcurrencyLimit) -> list[tuple[int, Steps]]:
        seen: list[tuple[int, Steps]] = []
        arrive = controller.arrive

        def watching(request: Request) -> bool | None:
            seen.append((request.arrived_ns, request.steps))
            return arrive(request)

        controller.arrive = watching  # type: ignore[method-assign]
        poisson(2 * MS, 3, controller, until=5 * S)
        return sorted(seen)

    assert work(laws.Fixed()) == work(laws.Vegas())


@pytest.mark.slow
def test_the_numbers_do_not_depend_on_the_hash_seed() -> None:
    statement = "from benchmarks.overload import golden; print(golden.counts(golden.simulate('S6-5x')))"
    paths = os.pathsep.join([str(ROOT), str(ROOT / "src")])
    found = {
        subprocess.run(
            [sys.executable, "-c", statement],
            capture_output=True,
            text=True,
            check=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": paths, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1


def test_gaps_have_the_mean_that_was_asked_for() -> None:
    gaps = engine._GAPS
    assert sum(gaps) == pytest.approx(len(gaps) << 20, rel=1e-6)
    loop = poisson(2 * MS, 1, laws.Nothing(), until=100 * S)
    assert len(loop.log) == pytest.approx(50_000, rel=0.02)


def test_two_workers_share_the_arrivals_of_one() -> None:
    whole = sorted(poisson(5 * MS, 4, laws.Nothing()).log.arrived)
    halves = [sorted(poisson(5 * MS, 4, laws.Nothing(), worker=n, workers=2).log.arrived) for n in range(2)]
    assert sorted(halves[0] + halves[1]) == whole
    assert len(halves[0]) == pytest.approx(len(whole) / 2, rel=0.1)


@pytest.mark.parametrize("kind", [scenarios.K1, scenarios.K2, scenarios.SLOW, scenarios.THREADED, scenarios.PARETO])
def test_handlers_take_on_average_what_capacity_is_computed_from(kind: scenarios.Kind) -> None:
    service = random.Random(1)
    drawn = [sum(ns for what, ns in kind.draw(service) if what in (CPU, THREAD)) for _ in range(20_000)]
    assert sum(drawn) / len(drawn) == pytest.approx(kind.cpu_ns, rel=0.05)


def test_the_capacity_is_what_can_be_served_at_most() -> None:
    """At twice the capacity a limit that is high enough keeps the processor busy all the time."""
    unit = scenarios.capacity(scenarios.K1.cpu_ns)
    loop = poisson(round(S / (2 * unit)), 1, laws.Fixed(), until=20 * S, capacity_hint=unit)
    served = sum(
        1 for ended, status in zip(loop.log.ended, loop.log.status, strict=True) if status == SERVED and ended < 20 * S
    )
    rho = scenarios.cost_of_refusal(scenarios.K1.cpu_ns)
    assert served / 20 / unit / measure.ideal(2, rho) == pytest.approx(1, abs=0.01)


# Measures


def made(*rows: tuple[int, int, int, int], sources: Sequence[Source] = ()) -> Run:
    """A run of (status, arrived, started, ended) in milliseconds, all of the first source."""
    log = Log()
    for status, arrived, started, ended in rows:
        log.source.append(0)
        log.attempt.append(0)
        log.status.append(status)
        log.arrived.append(arrived * MS)
        log.started.append(started * MS)
        log.ended.append(ended * MS)
    return Run(sources or [Source([], lambda service: ())], [log], 100.0, 0.02)


def test_the_ideal_pays_for_every_refusal() -> None:
    assert measure.ideal(10, 0.018) == pytest.approx(0.82 / 0.982)
    assert measure.ideal(0.5, 0.018) == 0.5
    assert measure.ideal(100, 0.018) == 0


def test_goodput_is_judged_by_what_is_possible_with_what_arrived() -> None:
    served = [(SERVED, at, at, at + 5) for at in range(0, 1_000, 20)]
    refused = [(REFUSED, at, 0, at + 1) for at in range(0, 1_000, 5)]
    assert made(*served).of_ideal(0, S) == 1.0  # 50 a second of 100, and no more were asked for
    best = measure.ideal(2.5, 0.02) * 100
    assert made(*served, *refused).of_ideal(0, S) == pytest.approx(50 / best)
    assert made(*served, *refused * 30).of_ideal(0, S) == 0  # more than can even be refused


def test_fairness_is_judged_against_the_largest_least_share() -> None:
    assert measure.max_min([1, 2, 10], 9) == [1, 2, 6]
    assert measure.max_min([5, 5], 4) == [2, 2]
    assert measure.jain([1, 1, 1, 1]) == 1
    assert measure.jain([1, 0, 0, 0]) == 0.25
    assert measure.jain([0, 0]) == 0


def test_an_answer_after_the_objective_does_not_count() -> None:
    found = made((SERVED, 0, 1, 100), (SERVED, 0, 1, 501), (REFUSED, 0, 0, 1), (UNFINISHED, 0, 1, 1000))
    assert found.success(0, S) == 0.25
    assert found.goodput(0, S) == 1.0
    assert found.shed(0, S) == 0.25
    assert found.answered(0, S, 200 * MS) == 0.5


def test_an_answer_after_the_deadline_or_the_patience_does_not_count() -> None:
    for bound in ({"deadline_ns": 50 * MS}, {"patience_ns": 50 * MS}):
        impatient = Source([], lambda service: (), **bound)  # type: ignore[arg-type]
        assert made((SERVED, 0, 1, 49), (SERVED, 0, 1, 51), sources=[impatient]).success(0, S) == 0.5


def test_latency_is_that_of_what_was_admitted() -> None:
    found = made((SERVED, 0, 1, 100), (SERVED, 0, 1, 300), (REFUSED, 0, 0, 900), (UNFINISHED, 0, 0, 900))
    assert found.latency(0.5, 0, S) == 200
    assert made((REFUSED, 0, 0, 900)).latency(0.5, 0, S) == inf


def test_recovery_is_the_first_good_second() -> None:
    bad = [(REFUSED, at, 0, at + 1) for at in range(0, 700, 10)]
    good = [(SERVED, at, at, at + 20) for at in range(700, 5_000, 10)]
    assert made(*bad, *good).recovery(0, 4 * S) == 0.75
    assert made(*good).recovery(S, 4 * S) == 0
    assert made(*bad, *good, (REFUSED, 4_500, 0, 4_501)).recovery(0, 4 * S) == 0.75  # one later is no relapse
    assert made(*bad).recovery(0, S) == 1.0  # never


def test_latency_has_settled_when_its_median_is_back() -> None:
    slow = [(SERVED, at, at, at + 200) for at in range(0, 1_400, 10)]
    fast = [(SERVED, at, at, at + 20) for at in range(1_400, 5_000, 10)]
    assert made(*slow, *fast).settled(0, 4 * S, bar=24) == 1.5
    assert made(*slow).settled(0, S, bar=24) == 1.0


# The laws, step by step


def attached(law: laws.ConcurrencyLimit, capacity_hint: float = 330.0) -> laws.ConcurrencyLimit:
    Loop(law, [], seed=1, capacity_hint=capacity_hint)
    return law


def test_a_limit_set_by_hand_is_what_can_be_served_in_100_ms() -> None:
    assert attached(laws.Fixed(), 333.0).limit == 33


def test_an_average_begins_as_the_mean() -> None:
    average = laws.Average(3, 2)
    assert [average.add(value) for value in (10, 20, 25)] == [10, 15, 20]


def test_gradient2_follows_its_formula() -> None:
    law = laws.Gradient2()
    attached(law)
    law.update(10.0, 20)  # the gradient is 1: new = 20 + 4, L = .8 * 20 + .2 * 24
    assert law.limit == pytest.approx(20.8)
    law.update(40.0, 20)  # long = (10 + 40) / 2 = 25, gradient 25 / 40
    assert law.limit == pytest.approx(0.8 * 20.8 + 0.2 * (20.8 * 0.625 + 4))
    before = law.limit
    law.update(40.0, 9)  # fewer than half of the limit in flight
    assert law.limit == before


def test_gradient2_lets_its_long_average_fall_faster_when_it_is_twice_the_short_one() -> None:
    law = laws.Gradient2()
    attached(law)
    law.update(100.0, 20)
    law.update(10.0, 20)  # (100 + 10) / 2 = 55, more than twice 10
    assert law.long.value == pytest.approx(49.5)


def test_gradient2_does_not_leave_its_bounds() -> None:
    law = laws.Gradient2()
    attached(law)
    for _ in range(500):
        law.update(10.0, 200)
    assert law.limit == 200
    for _ in range(50):
        law.update(100.0, 200)
    assert law.limit >= 20


def test_gradient2_takes_windows_of_a_second() -> None:
    law = laws.Gradient2()
    attached(law)
    for number in range(100):
        law.sample((number + 1) * 25 * MS, 10 * MS, 20, False)
    # The first sample ends the first window, too small to count; others end at 1.05 and 2.075 s.
    assert law.long.count == 2


def test_vegas_follows_its_formula() -> None:
    law = laws.Vegas()
    attached(law)
    law.least = 10 * MS
    law.update(10 * MS, 20, False)  # no queue: + 6 log10(20) = 6
    assert law.limit == 26
    law.update(int(10.8 * MS), 20, False)  # queue = ceil(26 * (1 - 10 / 10.8)) = 2, below 3: + 1
    assert law.limit == 27
    law.update(12 * MS, 20, False)  # queue = ceil(27 / 6) = 5, between 3 and 6
    assert law.limit == 27
    law.update(20 * MS, 20, False)  # queue = 14
    assert law.limit == 26
    law.update(10 * MS, 12, False)  # not in use
    assert law.limit == 26
    law.update(10 * MS, 12, True)  # dropped
    assert law.limit == 25


def test_vegas_forgets_the_least_time_now_and_then() -> None:
    law = laws.Vegas()
    attached(law)
    law.sample(0, 10 * MS, 1, False)
    assert law.least == 10 * MS
    for _ in range(30 * 20):
        law.sample(0, 20 * MS, 1, False)
    assert law.least == 20 * MS


def test_envoy_follows_its_formula() -> None:
    law = laws.Envoy()
    attached(law)
    law.measuring, law.least, law.limit = False, 10 * MS, 100.0
    law.update(20 * MS)  # gradient 12.5 / 20
    assert law.limit == int(62.5 + sqrt(62.5))
    law.update(5 * MS)  # gradient 2, not 2.5
    assert law.limit == int(140 + sqrt(140))
    law.update(S)  # gradient .5
    assert law.limit == int(75.5 + sqrt(75.5))


def test_envoy_measures_the_least_time_with_three_in_flight_and_then_lets_go() -> None:
    law = laws.Envoy()
    attached(law)
    assert (law.limit, law.measuring) == (3, True)
    for number in range(50):
        law.sample(S, (number + 1) * MS, 1, False)
    assert (law.least, law.measuring) == (45 * MS, False)


def test_envoy_measures_anew_after_five_windows_at_the_least_limit() -> None:
    law = laws.Envoy()
    attached(law)
    law.measuring, law.least, law.limit = False, 10 * MS, 3.0
    for _ in range(5):
        law.update(100 * MS)
    law.loop.run(S // 20)
    assert law.measuring


def test_failsafe_decides_by_the_queue_and_the_correlations() -> None:
    direction = laws.Failsafe.direction
    assert direction(7, 1, False, 1, 1, 0) == -1  # the queue is long
    assert direction(0, 1, True, -0.1, 1, 0) == -1  # full, and throughput falls as more are in flight
    assert direction(0, 1, True, 0.2, 1, 0.6) == -1  # full, times grow with what is in flight, throughput does not
    assert direction(0, 1, True, 0.9, 0.1, 0.6) == -1  # full, times grow, throughput is flat
    assert direction(0, 1, False, -0.1, 0.1, 0.6) == 1  # not full
    assert direction(2, 1, True, 0.9, 1, 0.6) == 1
    assert direction(3, 1, True, 0.9, 1, 0.6) == 0


def test_failsafe_follows_its_formula() -> None:
    law = laws.Failsafe()
    attached(law)
    law.update(10 * MS, 20)
    assert law.limit == 21
    law.update(30 * MS, 20)  # baseline 20, queue = ceil(21 / 3) = 7
    assert law.limit == 20
    law.update(20 * MS, 3)  # more than five times what is in flight
    assert law.limit == 19


def test_a_correlation_needs_pairs_and_variation() -> None:
    window = laws.Correlation(50, 3)
    assert window.add(1, 2) == (0, 0)
    assert window.add(2, 4) == (0, 0)
    assert window.add(3, 6)[0] == pytest.approx(1)
    assert laws.Correlation(50, 2).add(1, 1) == (0, 0)


def test_kratos_follows_its_formula() -> None:
    assert laws.Kratos.update(30, 20) == 6  # 30 in 100 ms are 300 a second, times 20 ms
    assert laws.Kratos.update(0, 0) == 0


def test_kratos_refuses_only_while_the_processor_is_busy_and_a_second_longer() -> None:
    law = laws.Kratos()
    attached(law)
    request = Request(law.loop, Source([], lambda service: ()), 0, (), 0, 0)
    law.in_flight, law.read_at = 10, 10 * S
    law.loop.now = 10 * S
    assert law.arrive(request)
    law.usage = 800
    assert not law.arrive(request)
    law.usage = 700
    assert not law.arrive(request)
    law.loop.now += S + 1
    law.read_at = law.loop.now
    assert law.arrive(request)


def test_toobusy_follows_its_formula() -> None:
    law = laws.TooBusy()
    attached(law)
    law.update(300 * MS)
    law.update(300 * MS)
    assert law.lag == pytest.approx((100 + 200 / 3) * MS)  # 1/3 of the new, 2/3 of the old
    request = Request(law.loop, Source([], lambda service: ()), 0, (), 0, 0)
    law.lag = 140 * MS  # twice as much: everything is refused
    assert not any(law.arrive(request) for _ in range(100))
    law.lag = 105 * MS
    assert 30 < sum(bool(law.arrive(request)) for _ in range(100)) < 70
    law.lag = 70 * MS
    assert all(law.arrive(request) for _ in range(100))


def test_the_law_of_the_lag_follows_its_formula() -> None:
    law = laws.LoopLag()
    attached(law)
    law.peak = 20
    law.update(2 * MS)  # cold start
    assert law.limit == 40
    law.update(2 * MS)  # half of the limit is in use
    assert law.limit == pytest.approx(40 + log2(40) * 0.8)
    law.peak = 30
    law.update(15 * MS)
    assert law.limit == pytest.approx(31 * 0.8)
    law.update(100 * MS)
    assert law.limit == pytest.approx(31 * 0.8 * 0.7)
    law.peak = 40
    law.update(0)  # there is no second cold start
    assert law.limit == pytest.approx(17.36 + log2(17.36))


# The program


def test_every_scenario_of_the_design_is_there() -> None:
    numbers = {name.partition("-")[0] for name in scenarios.SCENARIOS}
    assert numbers == {f"S{number}" for number in range(1, 18)}


@pytest.mark.slow
def test_every_goal_names_a_metric_that_its_scenario_measures() -> None:
    for goal in report.GOALS:
        assert goal.scenario in scenarios.SCENARIOS
        if goal.scenario in golden.SHORT:
            assert goal.metric in metrics(goal.scenario)


def test_the_program_lists_what_it_has(capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["--list"]) == 0
    assert capsys.readouterr().out.count("\n") == len(scenarios.SCENARIOS)


def test_a_name_stands_for_all_its_variants() -> None:
    known = list(scenarios.SCENARIOS)
    assert program.chosen("S1,S4-20s", known) == ["S1-2x", "S1-5x", "S1-10x", "S4-20s"]
    with pytest.raises(SystemExit, match="unknown: S99"):
        program.chosen("S99", known)


def test_the_report_says_what_was_met_and_what_was_missed() -> None:
    goal = report.Goal("claim", "S2", "recovery s", 1.0, at_least=False)
    assert goal.outcome(report.Spread.of([0.5, 1.0])) == "met"
    assert goal.outcome(report.Spread.of([0.5, 1.5])) == "met on average"
    assert goal.outcome(report.Spread.of([1.5, 1.5])) == "missed"
    found = {
        ("S2", "seawall"): [{"recovery s": 0.5, "p99 ms": inf}],
        ("S2", "none"): [{"recovery s": 20.0, "p99 ms": 7.0}],
    }
    text = report.goals_table(found, ["seawall", "none"])
    assert "S2: recovery after a spike, s" in text
    assert "met" in text
    written = report.document(found, ["seawall", "none"], 1)
    assert written["goals"][0]["controllers"]["none"]["mean"] == 20
    assert written["scenarios"]["S2"]["controllers"]["seawall"]["p99 ms"]["mean"] is None


def test_the_curves_are_drawn_from_what_was_written(tmp_path: Path) -> None:
    plots = pytest.importorskip("benchmarks.overload.plots", reason="matplotlib is not installed", exc_type=ImportError)
    point = {"goodput/ideal": 0.9, "p99 ms": 40.0}
    found = {
        (f"load-{kind}-{level}", one): [point]
        for kind in ("K1", "K2")
        for level in ("0.5", "10")
        for one in ("seawall", "none")
    }
    written = Report("curves", {})
    written.parts = report.document(found, ["seawall", "none"], 1)
    written.write(tmp_path / "overload.json")
    plots.curves(tmp_path / "overload.json", tmp_path / "overload.svg")
    drawn = (tmp_path / "overload.svg").read_text()
    assert "seawall" in drawn
    assert "never awaiting" in drawn


# Seawall in it


@functools.cache
def simulated(name: str) -> Run:
    return golden.simulate(name)


@functools.cache
def metrics(name: str) -> dict[str, float]:
    return scenarios.SCENARIOS[name].measure(simulated(name))


@pytest.mark.parametrize("name", golden.SHORT)
def test_seawall_does_exactly_what_it_did(name: str) -> None:
    """A difference is no fault in itself: look at it, then ``python -m benchmarks.overload --golden``."""
    assert golden.read(name) == golden.counts(simulated(name))


def test_nothing_is_kept_of_scenarios_that_are_gone() -> None:
    assert sorted(path.stem for path in golden.DIRECTORY.iterdir()) == sorted(golden.SHORT)


MISSED: set[tuple[str, str]] = set()
"""Goals that are not met yet: (scenario, metric). One that is met must leave this list."""

SPREAD = {("S1-10x", "p99/p99 at .7"): 1.25}
"""How many times the bar a single seed may have where the mean over seeds is what meets it."""


@pytest.mark.parametrize(
    "goal",
    [
        pytest.param(
            goal,
            id=f"{goal.scenario}: {goal.claim}",
            marks=[pytest.mark.xfail(reason="not reached yet")] if (goal.scenario, goal.metric) in MISSED else [],
        )
        for goal in report.GOALS
        if goal.scenario in golden.SHORT
    ],
)
def test_seawall_meets_its_goal(goal: report.Goal) -> None:
    value = metrics(goal.scenario)[goal.metric]
    allowed = SPREAD.get((goal.scenario, goal.metric), 1)
    assert goal.holds(value / allowed), f"{goal.metric} is {value:.4g}, the goal {goal.bar:g}"
