"""The benchmark of the client's overhead measures what it says."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest
from benchmarks import client as bench
from benchmarks import harness, readme

from serving import ROOT


def test_what_is_added_is_the_difference_of_neighbours_and_its_bar_is_that_of_the_issue() -> None:
    samples = {
        "bare": [100.0, 200.0, 300.0],
        "resilient": [130.0, 240.0, 330.0],
        "bare, blocking": [50.0, 50.0, 50.0],
        "resilient, blocking": [150.0, 150.0, 150.0],
    }
    rows = {row.name: row for row in bench.rows_of("memory", httpx2, samples)}
    assert rows["bare"].added is None
    added, ratio = rows["resilient"].added, rows["resilient"].ratio
    assert added is not None
    assert ratio is not None
    assert (added.median, ratio.median) == (30.0, 1.2)
    found = {verdict.claim: verdict.outcome for verdict in bench.verdicts(list(rows.values()))}
    assert found == {
        "httpx2, memory, resilient: added to a call of the bare client": "held",
        "httpx2, memory, resilient, blocking: added to a call of the bare client": "missed",
    }
    assert "httpx2, memory, resilient, blocking" in bench.rendered(list(rows.values()))


def test_every_subject_really_calls() -> None:
    with bench.serving() as url, asyncio.Runner() as runner:
        for transports in (
            lambda: bench.in_memory(httpx2),
            lambda: (httpx2.AsyncHTTPTransport(), httpx2.HTTPTransport()),
        ):
            with bench.slots(httpx2, transports, url, runner, calls=3) as subjects:
                assert set(subjects) == {*bench.WAITING, *bench.BLOCKING}
                assert all(slot() > 0 for slot in subjects.values())


@pytest.mark.slow
def test_a_quick_run_writes_its_results(tmp_path: Path) -> None:
    path = tmp_path / "client.json"
    command = [sys.executable, "benchmarks/client.py", "--quick", "--json", str(path)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=110, capture_output=True)
    report = json.loads(path.read_text(encoding="utf-8"))
    rows = report["parts"]["client"]["rows"]
    assert {(row["library"], row["part"]) for row in rows} == {
        (library, part) for library in ("httpx2", "httpx") for part in ("memory", "loopback")
    }
    text = readme.call(report)
    told = [row for row in rows if row["added"] is not None]
    for row in told:
        name = f"{row['library']}, {row['part']}, {row['name']}"
        assert f"| {name} | {harness.show(row['added']['median'])} |" in text
    assert text.count("\n| httpx") == len(told) == 12
    assert "Of 12 bars that the benchmark sets" in text


def test_what_was_not_measured_is_said() -> None:
    assert readme.call(None).startswith("Not measured yet")
