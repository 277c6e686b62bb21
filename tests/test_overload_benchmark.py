"""The real overload benchmark measures what it says: its schedule, its callers, its sums, its verdicts, its guards."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import apps  # noqa: E402
from benchmarks.overload import cases, generator, outcomes, real, servers  # noqa: E402
from benchmarks.overload.outcomes import Outcome  # noqa: E402

CONFIG_KIND = {"t0": (apps.PATH, "key")}


def phase(seconds: float, **rates: float) -> dict[str, Any]:
    return {"seconds": seconds, "rates": rates}


# The schedule


def test_the_schedule_is_a_poisson_process_of_the_wanted_rate() -> None:
    at, kind = generator.arrivals([phase(100, a=50.0)], ["a"], 1)
    gaps = [later - earlier for earlier, later in pairwise(at)]
    mean = sum(gaps) / len(gaps)
    variance = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    assert set(kind) == {0}
    assert mean == pytest.approx(1 / 50, rel=0.03)
    assert variance == pytest.approx(mean**2, rel=0.1)  # exponential: as wide as it is long


def test_each_phase_has_its_own_rate_and_nothing_is_sent_where_the_rate_is_zero() -> None:
    at, _ = generator.arrivals([phase(10, a=20.0), phase(10), phase(10, a=200.0)], ["a"], 1)
    counts = [sum(begin <= instant < begin + 10 for instant in at) for begin in (0, 10, 20)]
    assert counts[1] == 0
    assert counts[0] == pytest.approx(200, rel=0.25)
    assert counts[2] == pytest.approx(2000, rel=0.1)
    assert at == sorted(at)


def test_another_kinds_rate_moves_no_arrival_of_the_first() -> None:
    def first(other: float) -> list[float]:
        at, kind = generator.arrivals([phase(10, a=30.0, b=other)], ["a", "b"], 7)
        return [instant for instant, index in zip(at, kind, strict=True) if index == 0]

    assert first(0.0) == first(400.0)


def test_the_schedule_follows_from_the_seed() -> None:
    plan = [phase(5, a=100.0)]
    assert generator.arrivals(plan, ["a"], 1) == generator.arrivals(plan, ["a"], 1)
    assert generator.arrivals(plan, ["a"], 1) != generator.arrivals(plan, ["a"], 2)


# The wire


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok", (200, True)),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\no", None),
        (b"HTTP/1.1 200 OK\r\ncontent-le", None),
        (b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n", (503, False)),
        (b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 17\r\n\r\nconnection: close", (503, True)),
    ],
)
def test_an_answer_is_its_status_and_whether_the_connection_stays(data: bytes, expected: Any) -> None:
    assert generator.answer(data) == expected


def test_the_request_carries_the_path_and_the_key_it_is_given() -> None:
    lines = generator.request_bytes(8123, "/v1/other", "sk_live_x").split(b"\r\n")
    assert lines[0] == b"GET /v1/other HTTP/1.1"
    assert lines.count(b"x-api-key: sk_live_x") == 1
    assert lines[-2:] == [b"", b""]


def test_a_websocket_handshake_asks_for_an_upgrade_only() -> None:
    head = generator.upgrade_bytes(8123, "/v1/events/1", "k").decode().lower()
    assert head.endswith("\r\n\r\n")
    assert [line for line in head.split("\r\n") if line.startswith("connection")] == ["connection: upgrade"]


class Server(asyncio.Protocol):
    """Answers each request with the next of the given answers, an empty one never; tells who hung up."""

    def __init__(self, answers: Iterator[bytes], hung_up: asyncio.Semaphore) -> None:
        self.answers = answers
        self.hung_up = hung_up

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport

    def data_received(self, data: bytes) -> None:
        for _ in range(data.count(b"\r\n\r\n")):
            self.transport.write(next(self.answers))

    def connection_lost(self, exc: Exception | None) -> None:
        self.hung_up.release()


@asynccontextmanager
async def listening(answers: Iterator[bytes], hung_up: asyncio.Semaphore) -> Any:
    server = await asyncio.get_running_loop().create_server(lambda: Server(answers, hung_up), "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


def forever(*answers: bytes) -> Iterator[bytes]:
    while True:
        yield from answers


OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
NO = b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n"


async def run(answers: Iterator[bytes], hung_up: asyncio.Semaphore | None = None, **changes: Any) -> dict[str, Any]:
    async with listening(answers, hung_up or asyncio.Semaphore(0)) as port:
        plan: dict[str, Any] = {
            "port": port,
            "pid": os.getpid(),
            "phases": [phase(0.1, t0=300.0)],
            "kinds": CONFIG_KIND,
            "patience": 10.0,
            **changes,
        }
        loop = generator.OpenLoop(**plan)
        await loop.run()
        return loop.result()


async def test_every_scheduled_request_is_sent_once_and_answered() -> None:
    record = await run(forever(OK))
    at, _ = generator.arrivals([phase(0.1, t0=300.0)], ["t0"], 1)
    assert record["at"] == [round(instant * 1e6) for instant in at]
    assert record["status"] == [200] * len(at)
    assert min(record["late"]) >= 0
    assert all(latency >= late for latency, late in zip(record["latency"], record["late"], strict=True))
    assert len(record["marks"]) == 2


async def test_idle_connections_are_used_again_unless_each_request_wants_its_own() -> None:
    shared = await run(forever(OK), connections=40)
    alone = await run(forever(OK), fresh=True)
    assert shared["opened"] == 0
    assert alone["opened"] == len(alone["status"])


async def test_a_caller_gives_up_after_its_patience_and_closes_its_connection() -> None:
    hung_up = asyncio.Semaphore(0)
    record = await run(forever(b""), hung_up, patience=0.05)
    assert set(record["status"]) == {generator.GAVE_UP}
    assert min(record["latency"]) >= 50_000
    for _ in range(record["opened"]):
        await asyncio.wait_for(hung_up.acquire(), 10)


async def test_a_refused_caller_tries_again_as_often_as_it_is_told_to() -> None:
    record = await run(forever(NO), retries=2, backoff=0.01)
    calls = record["attempt"].count(0)
    assert [record["attempt"].count(number) for number in range(4)] == [calls, calls, calls, 0]
    assert set(record["status"]) == {503}


async def test_a_served_caller_does_not_try_again() -> None:
    assert set((await run(forever(OK), retries=2))["attempt"]) == {0}


async def test_a_server_that_is_not_there_loses_requests_and_does_not_hang_the_generator() -> None:
    async with listening(forever(OK), asyncio.Semaphore(0)) as port:
        pass
    loop = generator.OpenLoop(
        port=port, pid=os.getpid(), phases=[phase(0.05, t0=200.0)], kinds=CONFIG_KIND, patience=1.0
    )
    await loop.run()
    assert set(loop.result()["status"]) == {generator.LOST}


# What callers saw


def rows(*specs: tuple[float, int, float], kind: str = "t0") -> list[Outcome]:
    return [Outcome(at, kind, status, latency, 0.0, 0) for at, status, latency in specs]


def steady(begin: float, end: float, status: int, latency: float = 0.01) -> list[Outcome]:
    return rows(*((begin + step / 100, status, latency) for step in range(round((end - begin) * 100))))


def test_only_what_is_served_within_the_objective_is_good() -> None:
    assert [row.good for row in rows((0, 200, 0.5), (0, 200, 0.51), (0, 503, 0.01), (0, 0, 1.0))] == [
        True,
        False,
        False,
        False,
    ]


def test_recovery_ends_where_serving_lasts() -> None:
    taken = steady(0, 1, 503) + steady(1, 1.5, 200) + steady(1.5, 2, 503) + steady(2, 6, 200)
    assert outcomes.recovery(taken, 0, 6, outcomes.serves(0.95)) == pytest.approx(2.0)
    assert outcomes.recovery(steady(0, 6, 200), 0, 6, outcomes.serves(0.95)) == 0


def test_what_never_recovers_took_at_least_as_long_as_was_watched() -> None:
    assert outcomes.recovery(steady(0, 4, 503), 0, 4, outcomes.serves(0.95)) == 4


def test_a_median_is_back_when_most_are_served_as_fast_as_before() -> None:
    taken = steady(0, 1, 200, 0.2) + steady(1, 2, 0, 1.0) + steady(2, 6, 200, 0.023)
    assert outcomes.recovery(taken, 0, 6, outcomes.as_fast(0.02, 1.2)) == pytest.approx(1.8)  # to 95 % of a window: 2
    assert outcomes.recovery(taken, 0, 6, outcomes.as_fast(0.02, 1.1)) == 6


def test_fairness_is_judged_against_what_each_could_have_had() -> None:
    light = rows(*((step / 10, 200, 0.01) for step in range(10)), kind="light")
    heavy = rows(*((step / 100, 200 if step < 10 else 503, 0.01) for step in range(100)), kind="heavy")
    assert outcomes.fairness(light + heavy, 1.0, 20.0) == pytest.approx(1.0)  # max-min: 10 and 10
    assert outcomes.fairness(light + heavy, 1.0, 100.0) < 0.7  # the heavy one could have had 90


def record(case: cases.Case, status: Callable[[float], int], latency: float = 0.02) -> dict[str, Any]:
    """One request every 10 ms, and two seconds of server time in each second of the load."""
    at = [step * 10_000 for step in range(round(case.lasts * 100))]
    edges = [0.0, case.warm, case.warm + case.seconds, case.lasts]
    return {
        "at": at,
        "kind": [0] * len(at),
        "status": [status(instant / 1e6) for instant in at],
        "latency": [round(latency * 1e6)] * len(at),
        "late": [1_000] * len(at),
        "attempt": [0] * len(at),
        "marks": [[edge, round(edge * 0.8e9), round(edge * 0.85e9)] for edge in edges],
    }


STEP = cases.Case("S1", "2x", "await", {"t0": 2.0})


def test_a_run_is_summed_up_by_its_phases() -> None:
    def status(at: float) -> int:
        return 503 if STEP.warm <= at < STEP.warm + STEP.seconds and round(at * 100) % 2 else 200

    found = cases.Slot(STEP, record(STEP, status), 50.0, 0.02).measured()
    assert found["offered"] == pytest.approx(2.0)
    assert found["goodput"] == pytest.approx(1.0)
    assert found["ideal"] == pytest.approx((1 - 2 * 0.02) / (1 - 0.02))
    assert found["of_ideal"] == pytest.approx(found["goodput"] / found["ideal"])
    assert found["refused"] == pytest.approx(0.5)
    assert found["refusals_answered"] == 1.0
    assert (found["timed_out"], found["broken"], found["recovery_s"], found["usual_success"]) == (0, 0, 0, 1)
    assert found["p99_ms"] == pytest.approx(20)
    assert found["core_used"] == pytest.approx(0.8)
    assert found["core_others"] == pytest.approx(0.05)


def test_time_outs_and_lost_connections_are_no_refusals() -> None:
    statuses = [200, 503, 0, -1]
    found = cases.Slot(STEP, record(STEP, lambda at: statuses[round(at * 100) % 4]), 50.0, 0.02).measured()
    assert (found["refused"], found["timed_out"], found["broken"]) == pytest.approx((0.25, 0.25, 0.25))
    assert found["refusals_answered"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("measured", "drift", "reasons"),
    [
        ({"late_p99_ms": 19.0, "not_sent": 0.0, "core_others": 0.05}, 0.1, 0),
        ({"late_p99_ms": 21.0}, 0.0, 1),
        ({"not_sent": 0.01, "core_others": 0.3}, 0.0, 2),
        ({}, 0.3, 1),
    ],
)
def test_a_run_that_the_machine_spoiled_says_why(measured: dict[str, float], drift: float, reasons: int) -> None:
    assert len(cases.unreliable(measured, drift)) == reasons


# The cases


def test_every_case_has_its_own_title_and_goals_that_are_measured() -> None:
    titles = [case.title for case in cases.CASES]
    assert len(set(titles)) == len(titles)
    assert set(cases.QUICK) <= set(titles)
    always = {"times_usual_p99", "of_max", "jain", "others", "critical", "critical_of_ideal"}
    measured = set(cases.Slot(STEP, record(STEP, lambda at: 200 if at < 4 else 503), 50.0, 0.02).measured())
    assert {goal.metric for case in cases.CASES for goal in case.goals} <= always | measured


def test_a_plan_offers_multiples_of_capacity_over_connections_that_are_open() -> None:
    case = replace(STEP, load={"t0": 2.0, "t1": 0.5}, slow=True)
    plan = case.plan(100.0, 3)
    assert [phase["rates"] for phase in plan["phases"]] == [{"t0": 70.0}, {"t0": 200.0, "t1": 50.0}, {"t0": 70.0}]
    assert [phase["signal"] for phase in plan["phases"]] == [None, "SIGUSR1", "SIGUSR2"]
    assert list(plan["kinds"]) == ["t0", "t1"]
    assert plan["connections"] == 250
    assert replace(case, fresh=True).plan(100.0, 3)["connections"] == 0


def test_a_shorter_run_keeps_its_loads() -> None:
    short = STEP.scaled(0.5)
    assert (short.lasts, short.load) == (STEP.lasts / 2, STEP.load)


# Verdicts and tables


@pytest.mark.parametrize(
    ("value", "at_least", "outcome"),
    [
        (0.9, True, "held"),
        (0.89, True, "missed"),
        (0.9, False, "held"),
        (0.91, False, "missed"),
        (None, True, "not measured"),
    ],
)
def test_a_goal_is_a_least_or_a_greatest_value(value: float | None, at_least: bool, outcome: str) -> None:
    assert real.Aim("S1", "claim", value, 0.9, "", at_least).outcome == outcome


def results(*runs: tuple[dict[str, float], Sequence[str]], case: cases.Case) -> real.Results:
    found = real.Results()
    for number, (measured, reasons) in enumerate(runs):
        found.add(case, "seawall", real.Taken(number, measured, [0.01] * 99 + [0.05], reasons))
    return found


def test_runs_that_the_machine_spoiled_are_left_out_where_others_are_left() -> None:
    case = next(case for case in cases.CASES if case.title == "S1 10x")
    mixed = results(({"of_ideal": 0.95}, []), ({"of_ideal": 0.2}, ["late"]), ({"of_ideal": 0.93}, []), case=case)
    assert mixed.summaries(case, "seawall")["of_ideal"].median == pytest.approx(0.94)
    spoiled = results(({"of_ideal": 0.2}, ["late"]), case=case)
    assert spoiled.summaries(case, "seawall")["of_ideal"].median == 0.2
    assert "S1 10x, seawall, round 1: late" in real.remarks(spoiled, [case])


def test_a_goal_that_the_event_loop_puts_out_of_reach_is_said_to_be() -> None:
    on_uvloop, on_asyncio = (case for case in cases.CASES if case.scenario == "S17")
    for case, expected in ((on_uvloop, 1), (on_asyncio, 0)):
        assert len(real.out_of_reach(results(({"refusals_answered": 0.2}, []), case=case), case)) == expected
    assert real.out_of_reach(results(({"refusals_answered": 0.99}, []), case=on_uvloop), on_uvloop) == []


def test_the_p99_is_compared_with_that_before_the_overload() -> None:
    case = next(case for case in cases.CASES if case.title == "S1 10x")
    found = results(({"p99_ms": 30.0}, []), case=case)
    usual = found.usual_p99(case, "seawall", 0)
    assert usual == pytest.approx(10.4)
    assert found.summaries(case, "seawall")["times_usual_p99"].median == pytest.approx(30 / 10.4)


def test_a_table_has_a_line_for_each_subject_and_one_for_the_goals() -> None:
    case = next(case for case in cases.CASES if case.title == "S1 10x")
    text = real.rendered(
        results(({"of_ideal": 0.95, "p99_ms": 30.0, "refused": 0.9}, []), case=case), [case], ["seawall"]
    )
    heading, _, line, goals = text.splitlines()
    assert heading.startswith("S1 ")
    assert line.startswith("10x  Seawall, adaptive")
    assert "90.0 %" in line
    assert goals.split() == ["goal", ">=", "0.9", "<=", "3"]


def test_verdicts_are_seawalls() -> None:
    case = next(case for case in cases.CASES if case.title == "S1 10x")
    found = real.verdicts(results(({"of_ideal": 0.95, "p99_ms": 60.0}, []), case=case), [case])
    assert [(verdict.name, verdict.outcome) for verdict in found] == [("S1", "held"), ("S1", "missed")]
    assert {verdict.outcome for verdict in real.verdicts(real.Results(), list(cases.CASES))} == {"not measured"}


# The servers


async def ask(app: apps.ASGIApp, **changes: Any) -> list[int]:
    seen: list[int] = []

    async def send(message: apps.Message) -> None:
        if message["type"] == "http.response.start":
            seen.append(message["status"])

    await app(apps.request(**changes), apps.receive, send)
    return seen


async def test_the_fixed_limit_refuses_what_is_too_much_at_once_and_takes_places_back() -> None:
    release = asyncio.Event()

    async def slow(scope: apps.Scope, receive: apps.Receive, send: apps.Send) -> None:
        await release.wait()
        if scope["path"] == "/broken":
            raise RuntimeError("broken")
        await apps.bare(scope, receive, send)

    app = servers.fixed(slow, 2)
    admitted = [asyncio.create_task(ask(app)), asyncio.create_task(ask(app, path="/broken"))]
    await asyncio.sleep(0)
    assert await ask(app) == [503]
    release.set()
    assert (await asyncio.gather(*admitted, return_exceptions=True))[0] == [200]
    assert list(await asyncio.gather(ask(app), ask(app))) == [[200], [200]]


@pytest.mark.parametrize("name", servers.FIXED)
async def test_every_application_serves_the_measured_request(name: str) -> None:
    assert await ask(servers.application(name, 1.0)) == [200]


@pytest.mark.parametrize("subject", ["bare", "fixed", "uvicorn", "seawall"])
async def test_every_subject_serves_one_request_alone(subject: str) -> None:
    app, _ = servers.guarded(servers.Serving(subject, "await", 1.0))
    assert await ask(app) == [200]


def test_uvicorns_limit_is_above_the_connections_that_are_open() -> None:
    _, settings = servers.guarded(servers.Serving("uvicorn", "await", 1.0, connections=500))
    assert settings == {"limit_concurrency": 500 + servers.ABOVE_OPEN}


def test_each_tenant_of_the_configuration_has_a_key_of_its_own() -> None:
    tenants = servers.seawall_config()["tenants"]
    assert set(tenants) == {*servers.TENANTS, *servers.CLASSES}
    assert len({tenant["keys"][0] for tenant in tenants.values()}) == len(tenants)
    assert [tenants[name]["priority"] for name in servers.CLASSES] == list(servers.CLASSES)


# The command line


def test_help_names_the_scenarios_and_the_subjects() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.overload.real", "--help"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert all(word in done.stdout for word in ("S1-h11", "S17", *servers.SUBJECTS))


@pytest.mark.parametrize("wrong", [["--only", "S99"], ["--subjects", "bare,nobody"], ["--rounds", "0"]])
def test_what_is_not_known_is_an_error(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        real.arguments(wrong)
    assert raised.value.code == 2
    assert wrong[0] in capsys.readouterr().err


def test_a_part_of_the_benchmark_overwrites_no_results() -> None:
    assert real.arguments([]).json == ROOT / "benchmarks" / "results" / "overload_real.json"
    assert real.arguments(["--only", "S1"]).json is None
    assert real.arguments(["--quick"]).json is None


def test_work_that_takes_too_long_is_stopped_and_said_so() -> None:
    def endless() -> None:
        while True:
            pass

    assert real.run_for(0.05, endless) == ["stopped after 0:00: not everything was measured"]
    assert real.run_for(60.0, lambda: None) == []
