"""The benchmarks measure what they say: their statistics, their verdicts, and the floor they compare with."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import apps, direct, harness, load, overhead  # noqa: E402


def statuses(app: apps.ASGIApp, requests: list[dict[str, Any]]) -> list[int]:
    """What ``app`` answers to each of ``requests``, in turn."""
    seen: list[int] = []

    async def send(message: apps.Message) -> None:
        if message["type"] == "http.response.start":
            seen.append(message["status"])

    async def run() -> None:
        for scope in requests:
            await app(scope, apps.receive, send)

    asyncio.run(run())
    return seen


def recorders(names: str, calls: list[str]) -> dict[str, Callable[[], float]]:
    """Slots that take no time and write down when it was their turn."""

    def slot(name: str) -> float:
        calls.append(name)
        return 1.0

    return {name: partial(slot, name) for name in names}


# Statistics


@pytest.mark.parametrize(
    ("share", "expected"), [(0.0, 1.0), (0.1, 1.4), (0.5, 3.0), (0.9, 4.6), (1.0, 5.0)], ids=lambda value: str(value)
)
def test_a_percentile_lies_between_its_neighbours(share: float, expected: float) -> None:
    assert harness.percentile([5.0, 1.0, 4.0, 2.0, 3.0], share) == pytest.approx(expected)


def test_a_percentile_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="no values"):
        harness.percentile([], 0.5)


def test_a_summary_survives_one_slot_that_was_disturbed() -> None:
    summary = harness.Summary.of([10.0] * 20 + [9_000.0])
    assert (summary.median, summary.p10, summary.p90, summary.rounds) == (10.0, 10.0, 10.0, 21)


def test_differences_cancel_the_drift_that_both_saw() -> None:
    drift = [1.0, 2.0, 4.0, 8.0]
    assert harness.differences([base + 3.0 for base in drift], drift) == [3.0] * 4


def test_ratios_are_of_the_same_round_whatever_speed_it_had() -> None:
    floor = [3.0, 3.0, 6.0, 6.0, 6.0]  # the medians would say 10 / 6
    assert harness.ratios([10.0, 10.0, 10.0, 20.0, 20.0], floor) == pytest.approx(
        [10 / 3, 10 / 3, 5 / 3, 10 / 3, 10 / 3]
    )
    assert harness.ratios([1.0, 2.0], [0.0, 1.0]) == [2.0]


def test_every_round_has_one_slot_of_each_subject_and_its_own_order() -> None:
    calls: list[str] = []
    samples = harness.interleave(recorders("abcd", calls), rounds=6, seed=1)
    rounds = ["".join(calls[start : start + 4]) for start in range(0, 24, 4)]
    assert {"".join(sorted(order)) for order in rounds} == {"abcd"}
    assert len(set(rounds)) > 1
    assert [len(taken) for taken in samples.values()] == [6] * 4


def test_the_order_follows_from_the_seed() -> None:
    def order(seed: int) -> list[str]:
        calls: list[str] = []
        harness.interleave(recorders("abcdef", calls), rounds=3, seed=seed)
        return calls

    assert order(7) == order(7)
    assert order(7) != order(8)


def test_slots_are_sized_by_time() -> None:
    assert harness.calls_for(0.01, lambda calls: calls * 1e-5) == 1_000
    assert harness.calls_for(0.01, lambda calls: calls * 10.0) == 8
    assert harness.calls_for(0.01, lambda calls: 0.0) == 200_000


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "-"),
        (0.0, "0"),
        (0.0123, "0.0123"),
        (1.234, "1.23"),
        (12.34, "12.3"),
        (123.4, "123"),
        (12345.6, "12,346"),
    ],
)
def test_numbers_are_shown_with_three_digits(value: float | None, expected: str) -> None:
    assert harness.show(value) == expected


def test_a_table_keeps_the_reason_of_what_failed() -> None:
    text = harness.table(["subject", "us"], [["fast", "1.0"], ["broken", "failed: not installed"], ["x"]])
    assert text.splitlines() == [
        "subject                     us",
        "-------  ---------------------",
        "fast                       1.0",
        "broken   failed: not installed",
        "x",
    ]


# Verdicts


GOOD = {
    "direct.seawall": 9.9,
    "direct.seawall_yielding": 6.0,
    "direct.times_floor": 3.3,
    "direct.limits_hit": 7.0,
    "keys.largest": 1_000_000.0,
    "keys.backend.hot.1000000": 1.2,
    "keys.backend.uniform.1000000": 2.4,
    "keys.stack.hot.1000000": 1.1,
    "keys.stack.uniform.1000000": 1.5,
    "growth.backend gc off": 300.0,
    "growth.backend gc on": 400.0,
    "growth.stack gc off": 500.0,
    "growth.stack gc on": 999.0,
    "growth.dict gc off": 96_000.0,
    "memory.backend.tenant id": 174.0,
    "memory.backend.UUID": 206.0,
    "refusals.direct": 8.0,
    "server.Seawall refusing": 9.0,
    "direct.admission": 3.0,
    "refusals.shed": 9.0,
}


def test_every_bar_is_held_by_numbers_below_it() -> None:
    found = overhead.verdicts(GOOD)
    assert [verdict.name for verdict in found] == list("abcddddeeeefgghh")
    assert {verdict.outcome for verdict in found} == {"held"}


@pytest.mark.parametrize(
    ("name", "value", "missed"),
    [
        ("direct.seawall", 10.1, "a"),
        ("direct.seawall_yielding", 7.1, "b"),
        ("direct.times_floor", 4.1, "c"),
        ("direct.admission", 5.1, "h"),
        ("refusals.shed", 10.1, "h"),
        ("keys.backend.hot.1000000", 1.31, "d"),
        ("keys.stack.uniform.1000000", 2.51, "d"),
        ("growth.stack gc on", 1_001.0, "e"),
        ("memory.backend.UUID", 251.0, "f"),
        ("refusals.direct", 10.5, "g"),
        ("server.Seawall refusing", 10.5, "g"),
    ],
)
def test_a_number_over_its_bar_misses_that_bar_only(name: str, value: float, missed: str) -> None:
    found = overhead.verdicts({**GOOD, name: value})
    assert "".join(verdict.name for verdict in found if verdict.outcome == "missed") == missed


def test_what_was_not_measured_is_neither_held_nor_missed() -> None:
    assert {verdict.outcome for verdict in overhead.verdicts({})} == {"not measured"}
    without_peer = {name: value for name, value in GOOD.items() if name != "direct.limits_hit"}
    assert [verdict.name for verdict in overhead.verdicts(without_peer) if verdict.outcome == "not measured"] == ["b"]


def test_the_worst_call_is_that_of_the_least_disturbed_growth() -> None:
    runs = [{"cpu": {"max": 900.0}}, {"cpu": {"max": 310.0}}, {"cpu": {"max": 5_000.0}}]
    assert overhead.worst(runs) == 310.0


def test_the_report_says_where_a_peer_is_cheaper() -> None:
    def row(name: str, added: float) -> direct.Row:
        return direct.Row(name, None, added=harness.Summary(added, added, added, 1))

    rows = [row("Seawall, 1 limit", 5.0), row("Seawall, 3 limits", 8.0), row("quick, 3 limits", 6.0), row("slow", 9.0)]
    assert overhead.where_we_lose(rows) == (
        "Cheaper than Seawall: quick, 3 limits adds 6.00 us, Seawall with as many limits 8.00 us."
    )


# What is measured


def test_the_floor_admits_exactly_its_burst_per_caller() -> None:
    app = apps.floor(apps.bare, per_hour=5)
    assert statuses(app, [apps.request() for _ in range(9)]) == [200] * 5 + [429] * 4


def test_the_floor_holds_the_address_whatever_the_tenant() -> None:
    app = apps.floor(apps.bare, per_hour=3)
    strangers = [apps.request(headers=[(b"x-api-key", b"unknown")]) for _ in range(4)]
    assert statuses(app, strangers) == [200] * 3 + [429]
    assert statuses(app, [apps.request()]) == [429]
    assert statuses(app, [apps.request(client=("203.0.113.8", 1))]) == [200]


def test_the_floor_holds_the_daily_allowance() -> None:
    app = apps.floor(apps.bare, per_hour=100, per_day=4)
    assert statuses(app, [apps.request() for _ in range(6)]) == [200] * 4 + [429] * 2


def test_the_floor_names_the_tightest_limit() -> None:
    answers: list[apps.Message] = []

    async def send(message: apps.Message) -> None:
        answers.append(message)

    asyncio.run(apps.floor(apps.bare, per_hour=100, per_day=10)(apps.request(), apps.receive, send))  # type: ignore[arg-type]
    headers = dict(answers[0]["headers"])
    assert headers[b"ratelimit"] == b'"quota";r=9;t=8640'
    assert headers[b"ratelimit-policy"] == b'"rate";q=100;w=3600, "quota";q=10;w=86400, "per-ip";q=100;w=3600'


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", True),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\no", False),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n", False),
        (b"HTTP/1.1 429 Too Many\r\ncontent-length: 3\r\nserver: x\r\n\r\nno!", True),
        (b"HTTP/1.1 204 No Content\r\n\r\n", True),
    ],
)
def test_the_load_generator_knows_where_an_answer_ends(data: bytes, expected: bool) -> None:
    assert load.complete(data) is expected


def test_a_quick_run_measures_and_writes_its_report(tmp_path: Path) -> None:
    target = tmp_path / "overhead.json"
    command = [sys.executable, "benchmarks/overhead.py", "--quick", "--only", "direct", "--rounds", "2"]
    done = subprocess.run(
        [*command, "--json", str(target), "--no-plot"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stdout + done.stderr
    report = json.loads(target.read_text())
    rows = {row["name"]: row for row in report["parts"]["direct"]["rows"]}
    assert rows[direct.FLOOR]["added"]["median"] > 0
    assert rows[direct.SEAWALL_3]["headers"] == 2
    assert {verdict["name"] for verdict in report["verdicts"]} == set("abcdefgh")
    for subject in direct.SUBJECTS:  # a peer that is not installed says so, and is not left out
        assert rows[subject.name]["total"] or rows[subject.name]["failure"].startswith("failed: ")


@pytest.mark.parametrize(
    ("plot", "drawn", "said"),
    [
        ("plotting:curve", ["run.png", "run.svg"], "wrote {}/run.svg\nwrote {}/run.png\n"),
        ("plotting:nothing", [], ""),
        ("not_installed:curve", [], "no plots: No module named 'not_installed'\n"),
    ],
)
def test_a_plot_is_drawn_where_it_can_be_and_there_is_something_to_draw(
    plot: str,
    drawn: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plotting = ModuleType("plotting")
    vars(plotting).update(curve=lambda _, target: target.write_text("drawn"), nothing=lambda _, target: False)
    monkeypatch.setitem(sys.modules, "plotting", plotting)
    harness.draw(tmp_path / "run.json", plot)
    assert sorted(path.name for path in tmp_path.iterdir()) == drawn
    assert capsys.readouterr().err == said.format(tmp_path, tmp_path)


def test_a_run_begins_with_where_it_is() -> None:
    where = {**harness.environment(["pytest", "no-such-package"]), "processor": "a processor", "load_average": 0.5}
    first, second = harness.header(where).splitlines()
    assert f", a processor, {where['cpus']} cores, load 0.5, commit {where['commit']}" in first
    assert second == f"pytest {pytest.__version__}, no-such-package not installed"


def test_help_names_the_parts() -> None:
    done = subprocess.run(
        [sys.executable, "benchmarks/overhead.py", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0
    assert all(part in done.stdout for part in overhead.PARTS)
