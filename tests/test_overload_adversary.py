"""Callers who mean harm, and ten minutes of everything at once, on the simulated loop with the limiter that serves."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import pytest
from benchmarks.overload import scenarios
from benchmarks.overload.engine import (
    CPU,
    DOWN,
    IO,
    MS,
    NEVER,
    RESPOND,
    SERVED,
    UNFINISHED,
    Downstream,
    Loop,
    Request,
    S,
    Source,
)
from benchmarks.overload.measure import Run
from benchmarks.overload.scenarios import K1, K2, Kind, kind, load
from benchmarks.overload.seawall import Seawall

from seawall.overload.limiter import LEAST_GROUP, Class

HONEST, ATTACKER = 0, 1
RULE, OTHER_RULE = 1, 2
UNIT = scenarios.capacity(K1.cpu_ns)
RHO = scenarios.cost_of_refusal(K1.cpu_ns)
BEGINS, ENDS, UNTIL = 2 * S, 7 * S, 11 * S
FIXED = (2, 4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True, slots=True)
class Attack:
    """What the attacker's requests do, how many come in a second, and how they end for the law."""

    kind: Kind
    rate: int
    outcome: str = "success"


ATTACKS = {
    # 404s that cost nearly nothing, in a flood that takes half of the processor
    "ignored": Attack(kind((CPU, MS // 3)), 1_500, "ignored"),
    # requests that end with 503 or a time-out, as many
    "failing": Attack(kind((CPU, MS // 3)), 1_500, "dropped"),
    # requests that compute for long
    "heavy": Attack(kind((CPU, 60 * MS)), 30),
    # requests that wait for long, and then succeed or fail
    "slow": Attack(kind((IO, 2 * S), (CPU, MS)), 50),
    "slow and failing": Attack(kind((IO, 2 * S), (CPU, MS)), 50, "dropped"),
}


class Watched(Seawall):
    """The production limiter, whose limits are sampled; an attacker's requests end as it likes."""

    def __init__(self, attack: Attack | None, limit: int | None = None) -> None:
        if limit is None:
            super().__init__()
        else:
            super().__init__("fixed", initial=limit)
        self._attack = attack

    def finish(self, request: Request, outcome: str) -> None:
        if self._attack is not None and request.kind == "attacker" and outcome == "success":
            outcome = self._attack.outcome
        super().finish(request, outcome)

    def stats(self) -> dict[str, float]:
        return {"limit": self.limiter.limit, "rule": self.limiter.groups[RULE].limit}


@functools.cache
def attacked(
    name: str, rule: int, *, limit: int | None = None, level: float = 0.6, storm: float | None = None
) -> tuple[Run, Loop]:
    """Honest callers at ``level`` of the capacity, and an attack from ``BEGINS`` to ``ENDS``; ``storm`` is their level
    after it."""
    attack = ATTACKS[name]
    after = level if storm is None else storm
    sources = [
        Source(load(UNIT, (ENDS / S, level), (UNTIL / S, after)), K1.draw, tenant="honest", group=RULE),
        Source(
            [(BEGINS, NEVER), (ENDS, S // attack.rate)],
            attack.kind.draw,
            kind="attacker",
            tenant="attacker",
            group=rule,
        ),
    ]
    loop = Loop(Watched(attack, limit), sources, seed=1, sample_ns=50 * MS)
    loop.run(UNTIL + 3 * S)
    return Run(sources, [loop.log], UNIT, RHO, loop.late_grants, loop.samples), loop


def between(run: Run, start: int, end: int, *names: str) -> list[float]:
    """The smallest of the named limits, as sampled."""
    return [min(found[name] for name in names) for at, found in run.samples if start <= at < end]


@functools.cache
def optimum(name: str) -> int:
    """The largest fixed limit with which honest callers get 95 % of what they get with the best one."""
    found = {limit: attacked(name, RULE, limit=limit)[0].goodput(BEGINS + S, ENDS, {HONEST}) for limit in FIXED}
    return max(limit for limit, goodput in found.items() if goodput >= 0.95 * max(found.values()))


@pytest.mark.slow
@pytest.mark.parametrize("rule", [RULE, OTHER_RULE])
@pytest.mark.parametrize("name", ["ignored", "failing", "heavy"])
def test_an_attacker_cannot_push_the_limit_out_of_its_bounds(name: str, rule: int) -> None:
    """D14: between the floor and twice the true optimum, from a second after its beginning."""
    best = optimum(name)
    assert best < FIXED[-1]  # there is one, or this proved nothing
    run, _ = attacked(name, rule)
    limits = between(run, BEGINS + S, ENDS, "limit", "rule")
    assert min(limits) >= min(2, LEAST_GROUP)
    assert max(limits) <= 2 * best


@pytest.mark.parametrize("name", ["ignored", "slow", "slow and failing"])
def test_an_attack_on_one_rule_is_not_felt_on_another(name: str) -> None:
    """As far as it does not take the processor: what waits on one rule closes that one."""
    run, _ = attacked(name, OTHER_RULE)
    assert run.success(BEGINS + S, ENDS, {HONEST}) >= 0.98
    assert min(between(run, BEGINS, ENDS, "rule")) >= 100


@pytest.mark.parametrize("rule", [RULE, OTHER_RULE])
@pytest.mark.parametrize("name", ATTACKS)
def test_what_an_attack_has_tightened_relaxes_when_it_is_over(name: str, rule: int) -> None:
    run, loop = attacked(name, rule)
    assert run.success(ENDS + 2 * S, UNTIL, {HONEST}) >= 0.98
    assert all(status != UNFINISHED for status in loop.log.status)


@pytest.mark.xfail(reason="defect: a limit grown by requests that only waited is kept when they are gone")
def test_what_an_attack_has_loosened_is_not_kept_when_it_is_over() -> None:
    """A hundred requests that wait need a high limit, which a storm of requests that compute must not find."""
    found = {
        limit: attacked("slow", OTHER_RULE, limit=limit, storm=5)[0].goodput(ENDS + 2 * S, UNTIL, {HONEST})
        for limit in FIXED
    }
    best = max(limit for limit, goodput in found.items() if goodput >= 0.95 * max(found.values()))
    run, _ = attacked("slow", OTHER_RULE, storm=5)
    assert max(between(run, ENDS + S // 2, UNTIL, "limit")) <= 2 * best


# Ten minutes


MINUTE = 60 * S


def everything() -> list[Source]:
    """Callers of all kinds and classes: some give up, some retry, some have a deadline, some listen for long."""
    calls = kind((DOWN, 10 * MS), (CPU, 2 * MS))
    streams = kind((CPU, MS), (RESPOND, 0), (IO, 20 * S))
    burst = [
        (2 * MINUTE, S // 20),
        (2 * MINUTE + 8 * S, S // 900),
        (6 * MINUTE, S // 20),
        (6 * MINUTE + 4 * S, S // 2_000),
    ]
    return [
        Source([*burst, (10 * MINUTE, S // 20)], K1.draw, priority=3, tenant="batch", group=1),
        Source([(10 * MINUTE, S // 30)], K1.draw, priority=1, tenant="a", group=2, deadline_ns=150 * MS),
        Source([(10 * MINUTE, S // 20)], calls.draw, priority=0, tenant="b", group=3),
        Source([(10 * MINUTE, S // 20)], calls.draw, priority=2, tenant="c", group=3, patience_ns=400 * MS, retries=2),
        Source(
            [(10 * MINUTE, S // 10)],
            K2.draw,
            tenant="d",
            patience_ns=250 * MS,
            retries=1,
            retry_after_ns=S,
            connects=True,
        ),
        Source([(10 * MINUTE, S // 2)], streams.draw, kind="sse", tenant="e", group=4),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.0, 0.05])
def test_ten_minutes_of_everything_leave_nothing_behind(share: float) -> None:
    classes = (Class("critical"), Class("normal", 250 * MS), Class("low"), Class("background", None, share))
    controller = Seawall(classes=classes)
    sources = everything()
    slow = [(3 * MINUTE, 3 * MINUTE + 20 * S, 20), (8 * MINUTE, 8 * MINUTE + 5 * S, 200)]
    loop = Loop(controller, sources, seed=3, downstream=Downstream(10, slow))
    for second in range(4 * 60, 4 * 60 + 30, 3):
        loop.call_at(second * S, loop.pause, 120 * MS)
    for at, times in ((7 * MINUTE, 3), (7 * MINUTE + 10 * S, 1)):
        loop.call_at(at, functools.partial(setattr, loop, "slow", times))
    loop.run(11 * MINUTE)
    limiter = controller.limiter
    assert (limiter.in_flight, len(limiter.line)) == (0, 0)
    assert {group.in_flight for group in limiter.groups} == {0}
    assert loop.running == 0
    assert loop.late_grants == 0
    assert UNFINISHED not in loop.log.status
    run = Run(sources, [loop.log], UNIT, RHO)
    quiet = 9 * MINUTE, 10 * MINUTE
    assert run.success(*quiet, {0, 1, 2, 3, 4}) >= 0.99
    assert run.success(0, 10 * MINUTE, {2}) >= 0.9  # critical, all storms and the slow downstream included
    shed = [one for one, status in zip(loop.log.source, loop.log.status, strict=True) if status != SERVED]
    assert shed.count(0) > 1_000  # it was a storm
