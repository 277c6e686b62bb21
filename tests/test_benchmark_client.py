"""The retry storm measures what it says: its schedule, its recovery, its counts, its JSON, its page."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import harness, readme  # noqa: E402
from benchmarks import storm as bench  # noqa: E402
from benchmarks.clientbench import outcomes  # noqa: E402
from benchmarks.clientbench.callers import OURS, SUBJECTS, TENACITY, OpenLoop, Plan, calling, network  # noqa: E402
from benchmarks.clientbench.outcomes import Outcome, Storm  # noqa: E402
from benchmarks.overload.generator import arrivals  # noqa: E402


def plan(seed: int = 1, rate: float = 100.0) -> Plan:
    return Plan(OURS, 0, bench.STORM.phases(rate), seed, 60.0)


# The schedule


def test_the_load_is_what_the_course_says_and_twice_as_much_while_the_trigger_lasts() -> None:
    times, _ = arrivals(bench.STORM.phases(1_000.0), ["call"], 1)
    warm, begin = bench.STORM.warm, bench.STORM.warm + bench.STORM.before
    spans = {0.7: (0.0, warm), 0.85: (warm, begin), 2.0: (begin, begin + 5.0)}
    for multiple, (start, end) in spans.items():
        found = sum(start <= at < end for at in times) / (end - start)
        assert found == pytest.approx(1_000 * multiple, rel=0.1)
    assert times == sorted(times)
    assert times[-1] < bench.STORM.lasts


def test_all_subjects_of_a_round_have_one_schedule_and_no_two_processes_have() -> None:
    assert OpenLoop(plan(7)).at == OpenLoop(plan(7)).at
    assert OpenLoop(plan(7)).at != OpenLoop(plan(8)).at


def test_a_shorter_course_has_the_same_trigger() -> None:
    short = bench.STORM.scaled(0.5)
    assert (short.trigger, short.lasts) == (5.0, (bench.STORM.lasts + 5.0) / 2)


def test_a_blip_is_measured_before_one_server_only_and_whatever_its_length() -> None:
    short = [course.scaled(0.3) for course in bench.COURSES]
    chosen = bench.cells(short, ["seawall", "bare"], [TENACITY, OURS])
    assert sorted((course.name, server) for course, server, _ in chosen) == [
        *[("blip", "seawall")] * 2,
        *[("storm", "bare")] * 2,
        *[("storm", "seawall")] * 2,
    ]


# What became of the calls


def calls(success: Any, *, rate: int = 100, end: float = 20.0) -> list[Outcome]:
    """As many a second as ``rate``, of which those fail for whose schedule ``success`` says so."""
    return [Outcome(nth / rate, success(nth), 0.1, 0.0, 1) for nth in range(int(rate * end))]


def storm(found: list[Outcome], attempts: tuple[float, ...] = ()) -> Storm:
    return Storm(found, attempts, begin=5.0, over=10.0, end=20.0, capacity=100.0)


@pytest.mark.parametrize(
    ("fails", "seconds"),
    [
        (lambda nth: False, 0.0),
        (lambda nth: 500 <= nth < 1_000, 0.0),
        (lambda nth: 500 <= nth < 1_300, 2.9),  # the first two seconds with no more than ten failures
        (lambda nth: 500 <= nth < 1_100 or 1_500 <= nth < 1_550, 5.4),  # for good
        (lambda nth: nth >= 500, 10.0),
        (lambda nth: nth >= 1_950, 10.0),  # at the very end: nobody has seen it recover
        (lambda nth: nth % 25 == 0, 0.0),  # 96 % is enough
    ],
)
def test_recovery_is_when_95_of_100_succeed_for_good(fails: Any, seconds: float) -> None:
    assert storm(calls(lambda nth: not fails(nth))).recovery() == pytest.approx(seconds, abs=0.11)


def test_attempts_belong_to_the_call_they_were_made_for_and_to_the_moment_they_left() -> None:
    records = [
        {"at": [1_000_000, 6_000_000], "status": [200, 503], "took": [50_000, 9_000_000], "late": [0, 0]}
        | {"attempts": [1_000_000, 6_000_000, 7_000_000, 12_000_000], "of": [0, 1, 1, 1]},
        {"at": [7_000_000, 11_000_000], "status": [200, 0], "took": [2_000_000, 0], "late": [0, 40_000]}
        | {"attempts": [7_500_000, 8_000_000], "of": [0, 0]},  # and none for what was refused here
    ]
    found = outcomes.storm(records, begin=5.0, over=10.0, end=20.0, capacity=2.0)
    assert [(call.at, call.ok, call.attempts) for call in found.calls] == [
        (1.0, True, 1),
        (6.0, False, 3),
        (7.0, True, 2),
        (11.0, False, 0),
    ]
    measured = found.measured()
    assert measured["attempts"] == 2.5
    assert measured["sent"] == 2.0  # four of them before the trigger was over
    assert measured["attempts_after"] == 0.0
    assert measured["ok"] == 0.5
    assert measured["ok_after"] == 0.0
    assert measured["offered"] == 2 / 5.0 / 2.0
    assert measured["goodput"] == 1 / 5.0 / 2.0
    assert measured["p99_ms"] == 2_000.0
    assert "p99_after_ms" not in measured
    assert measured["late_p99_ms"] == pytest.approx(40.0, rel=0.1)


def test_a_course_has_a_point_for_each_half_second() -> None:
    course = storm(calls(lambda nth: nth % 2 == 0), (0.1, 0.2, 19.9, 20.1)).course()
    assert {name: len(points) for name, points in course.items()} == {"offered": 40, "sent": 40, "good": 40}
    assert set(course["offered"]) == {1.0}
    assert course["sent"][0] == 0.04
    assert course["sent"][-1] == 0.02
    assert course["good"][10] == pytest.approx(0.5)


def test_a_run_that_others_spoil_is_told_from_one_that_they_do_not() -> None:
    fine = {"late_p99_ms": 5.0, "drift": 0.02, "core_others": 0.01}
    assert bench.unreliable(fine) == []
    for name, value in {"late_p99_ms": 80.0, "drift": 0.3, "core_others": 0.4}.items():
        assert len(bench.unreliable({**fine, name: value})) == 1


# The report


def taken(number: int, attempts: float, recovery: float, *reasons: str) -> bench.Taken:
    measured = {"attempts": attempts, "sent": 1.0, "recovery_s": recovery, "ok": 0.5, "ok_after": 1.0}
    return bench.Taken(number, measured, {"offered": [1.0], "sent": [attempts], "good": [0.5]}, {}, reasons)


def results() -> bench.Results:
    found = bench.Results()
    found.taken = {
        ("storm", "seawall", OURS): [taken(0, 1.05, 1.0), taken(0, 3.0, 20.0, "spoiled"), taken(1, 1.07, 3.0)],
        ("storm", "bare", TENACITY): [taken(0, 4.0, 16.0, "spoiled")],
    }
    found.failures = {"storm, bare, stamina": "ImportError: none"}
    return found


def test_runs_that_others_spoiled_do_not_count_unless_there_are_no_others() -> None:
    found = results()
    assert found.summaries("storm", "seawall", OURS)["attempts"].median == pytest.approx(1.06)
    assert found.summaries("storm", "bare", TENACITY)["attempts"].median == 4.0
    assert found.median_course("storm", "seawall", OURS)["sent"] == [pytest.approx(1.06)]


def test_the_goals_are_those_of_our_client_before_seawall() -> None:
    outcomes = {verdict.name: verdict.outcome for verdict in bench.verdicts(results())}
    assert outcomes == {"sent": "held", "attempts": "held", "recovery": "held"}
    assert {verdict.outcome for verdict in bench.verdicts(bench.Results())} == {"not measured"}


def test_only_what_is_ours_makes_it_fail() -> None:
    found = results()
    assert bench.broken(found) == []
    found.failures["storm, bare, seawall"] = "RuntimeError: gone"
    assert bench.broken(found) == ["storm, bare, seawall"]


def test_the_json_has_for_each_course_its_terms_its_medians_and_every_run(tmp_path: Path) -> None:
    found = results()
    report = bench.Report("a retry storm", {"python": "3"})
    report.parts = {"courses": bench.summarised(found, bench.COURSES), "failures": found.failures}
    report.verdicts = bench.verdicts(found)
    report.write(tmp_path / "storm.json")
    read = json.loads((tmp_path / "storm.json").read_text())
    part = read["parts"]["courses"]["storm"]
    assert (part["begin"], part["over"], part["end"], part["peak"]) == (9.0, 14.0, 30.0, 2.0)
    ours = part["servers"]["seawall"][OURS]
    assert ours["metrics"]["recovery_s"]["median"] == 2.0
    assert [run["unreliable"] for run in ours["runs"]] == [[], ["spoiled"], []]
    assert read["verdicts"][0]["outcome"] == "held"
    table = bench.rendered(found, bench.COURSES)
    assert "storm, Seawall" in table
    assert "2/3 !" in table
    assert any("ImportError" in line for line in bench.remarks(found))


WHERE = {"implementation": "CPython", "python": "3.11", "processor": "a processor", "cpus": 2, "load_average": 1.5}
WHERE |= {"real_time": False, "at": "2026-01-01T00:00:00Z", "commit": "abc"}


def test_the_page_has_a_table_for_each_server_and_says_who_never_recovered() -> None:
    found = results()
    versions = dict.fromkeys(("httpx", "tenacity", "httpx-retries", "stamina"), "1.0")
    parts = {"effort": {"rounds": 2}, "courses": bench.summarised(found, bench.COURSES)}
    report = {"environment": {**WHERE, "versions": versions}, "parts": parts, "verdicts": []}
    text = readme.storm(json.loads(json.dumps(report, default=harness.plain)), plot=True)
    assert "Medians of 2 rounds, CPython 3.11, a processor, 2 cores, load 1.5, 2026-01-01" in text
    assert "| In front of Seawall |" in text
    assert "| **seawall.client** | 1.00 | 1.06 | 50.0 % | - | 100 % | 2.00 s |" in text
    assert "| tenacity | 1.00 | 4.00 | 50.0 % | - | 100 % | not in 16 s |" in text
    assert "stamina |" not in text
    assert "(../benchmarks/results/client_storm.svg)" in text
    assert readme.storm(None, plot=True).startswith("Not measured yet")


def test_a_mistyped_subject_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.arguments(["--subjects", "tenacious"])
    assert "tenacious is none of bare, tenacity" in capsys.readouterr().err


def test_a_short_run_writes_nothing_unless_it_is_told_where() -> None:
    assert bench.arguments(["--short"]).json is None
    assert bench.arguments([]).json.name == "client_storm.json"
    chosen = bench.selection(bench.arguments(["--short"]))
    assert bench.expected_seconds(*chosen) < 90


# Real callers


@pytest.fixture(params=list(SUBJECTS))
def subject(request: pytest.FixtureRequest) -> str:
    module = {"httpx-retries": "httpx_retries", "tenacity": "tenacity", "stamina": "stamina"}.get(request.param)
    if module is not None:
        pytest.importorskip(module)
    name: str = request.param
    return name


async def test_every_attempt_of_a_call_that_reaches_nobody_is_noted(subject: str) -> None:
    noted: list[int] = []
    call, client = calling(subject, "http://127.0.0.1:1/", noted.append)
    async with client:
        with pytest.raises(Exception, match="connect"):
            await call(3)
    assert set(noted) == {3}
    assert len(noted) == (1 if subject == "bare" else 4)


ANSWERS = {
    b"/ok": b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok",
    b"/shed": b"HTTP/1.1 503 Unavailable\r\nretry-after: 7\r\ncontent-length: 0\r\n\r\n",
    b"/closed": b"",
}


async def answering(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One connection of a server that is told by the path what to do: answer in two parts, close, or never answer."""
    try:
        while head := await reader.readuntil(b"\r\n\r\n"):
            answer = ANSWERS.get(head.split()[1])
            if answer is None:
                continue
            writer.write(answer[:20])
            await asyncio.sleep(0)
            writer.write(answer[20:])
            if not answer:
                break
    except asyncio.IncompleteReadError:
        pass
    finally:
        writer.close()


async def test_the_network_of_the_callers_ends_as_the_one_of_httpx_does() -> None:
    noted: list[int] = []
    server = await asyncio.start_server(answering, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with (
        server,
        httpx.AsyncClient(transport=network(noted.append), base_url=f"http://127.0.0.1:{port}") as client,
    ):

        async def get(path: str, number: int) -> httpx.Response:
            return await client.get(path, timeout=httpx.Timeout(5.0, read=0.1), extensions={"call": number})

        for number in range(3):
            answer = await get("/ok", number)
            assert (answer.status_code, answer.text) == (200, "ok")
        assert len(client._transport.idle) == 1  # one connection was enough
        answer = await get("/shed", 3)
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "7")
        with pytest.raises(httpx.ReadTimeout):
            await get("/never", 4)
        with pytest.raises(httpx.ReadError):
            await get("/closed", 5)
        assert client._transport.idle == []
    assert noted == [0, 1, 2, 3, 4, 5]


@pytest.mark.slow
def test_a_storm_of_seconds_is_measured_from_real_processes() -> None:
    storm = bench.Course("storm", warm=0.5, before=0.5, trigger=0.5, after=1.5)
    found = bench.Results()
    effort = bench.Effort(1, 1.0, 0.2, tries=1, patience=0.0)
    bench.measure([storm], ["seawall"], [OURS], effort, 1, found)
    assert found.failures == {}
    [one] = found.taken["storm", "seawall", OURS]
    assert one.measured["attempts"] > 0
    assert one.measured["attempts_before"] > 0
    assert 0 < one.measured["ok_before"] <= 1
    assert one.measured["offered"] == pytest.approx(2.0, rel=0.9)  # of a capacity that others may have changed
    assert sum(one.course["good"]) > 0
