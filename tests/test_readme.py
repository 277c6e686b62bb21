"""What the README, the page about overload and the comparisons say in words, tables and formulas is true."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
from benchmarks import readme as bench
from benchmarks.overload.cases import CASES
from benchmarks.overload.laws import LAWS
from benchmarks.overload.report import GOALS
from benchmarks.overload.servers import SUBJECTS
from fastapi import FastAPI

from pages import README, blocks, equip, shell
from seawall import Seawall
from seawall.gate import RESULTS
from seawall.metrics import SPECS
from seawall.overload import laws, thresholds
from seawall.overload.limiter import Class, Limiter, Settings
from seawall.testing import ManualClock, reset
from serving import ROOT


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory as the reader's: app.py is in it, and ``seawall`` is on the path."""
    equip(tmp_path, monkeypatch)
    (tmp_path / "app.py").write_text(blocks(README, "python")[0].text, encoding="utf-8")
    return tmp_path


def test_workers_share_what_they_count_where_the_file_says_so(workplace: Path) -> None:
    text = "version: 1\nplans: {default: {rate: 1/s}}\nbackend: {type: redis, url: redis://localhost}\n"
    (workplace / "shared.yaml").write_text(text, encoding="utf-8")
    assert "ok, 1 warning" in shell("seawall check shared.yaml", workplace)
    assert Seawall(FastAPI(), config="shared.yaml").backend.name == "redis"


def test_four_workers_are_warned_about(workplace: Path) -> None:
    line = f"WEB_CONCURRENCY=4 {sys.executable} -c 'import app; app.app.build_middleware_stack()' 2>&1"
    assert "4 workers" in shell(line, workplace)


# docs/overload.md


OVERLOAD = (ROOT / "docs" / "overload.md").read_text(encoding="utf-8")


CONSTANTS = re.findall(r"^\| [^|]+ \| ([0-9.]+)( ms)? \| `([a-zA-Z_.]+)` \|$", OVERLOAD, re.MULTILINE)


@pytest.mark.parametrize(("number", "unit", "name"), CONSTANTS, ids=[name for _, _, name in CONSTANTS])
def test_a_constant_in_the_documentation_is_the_code_s(number: str, unit: str, name: str) -> None:
    module, _, path = name.partition(".")
    value = attrgetter(path)(import_module(f"seawall.overload.{module}"))
    assert value / (1e6 if unit else 1) == float(number)


def test_the_constants_of_the_documentation_are_all_tested() -> None:
    section = OVERLOAD.partition("## Constants")[2]
    assert len(CONSTANTS) == section.count("\n| ") - 1 > 10


def test_the_formulas_of_the_documentation_are_those_of_the_docstrings() -> None:
    """But for spaces and marks: whoever changes one of them is told of the other."""
    told = "".join(str(thing.__doc__) for thing in (laws.LagLaw, thresholds))
    written = re.findall(r"^    .*?((?:L|cap) \+?= .+)$", OVERLOAD, re.MULTILINE)
    assert len(written) == 3
    for formula in written:
        assert squeezed(formula) in squeezed(told), formula


def squeezed(text: str) -> str:
    return re.sub(r"[\s`]", "", text)


def test_the_waits_in_the_documentation_are_those_of_the_classes() -> None:
    limiter = Limiter(Settings(classes=(Class("first"), Class("second"))), clock=ManualClock(), timers=None)
    told = " ".join(OVERLOAD.split())
    first, second = (patience // 1_000_000 for patience in limiter.patience)
    assert f"Where the file has none, that is {second} ms" in told
    assert f"for the first of several classes {first} ms" in told


def test_the_reasons_in_the_documentation_are_all_there_are() -> None:
    [row] = re.findall(r"^\| `seawall_concurrency_limit_changes_total.*$", OVERLOAD, re.MULTILINE)
    assert set(re.findall(r"`([a-z_]+)`", row)) == set(laws.REASONS) - {"start"}
    [row] = re.findall(r"^\| `seawall_queue_wait_seconds.*$", OVERLOAD, re.MULTILINE)
    assert set(re.findall(r"`([a-z_]+)`", row)) == set(RESULTS)


def test_the_metrics_of_the_documentation_exist() -> None:
    known = {spec.name: ",".join(spec.labels) for spec in SPECS}
    named = dict(re.findall(r"`(seawall_[a-z_]+)(?:\{([a-z,]+)\})?`", OVERLOAD))
    assert {name: known.get(name) for name, labels in named.items() if labels} == {
        name: labels for name, labels in named.items() if labels
    }
    assert set(named) <= set(known)


def test_the_map_names_every_module() -> None:
    page = (ROOT / "docs" / "contributing.md").read_text(encoding="utf-8")
    cells = re.findall(r"^\| (`[a-z_]+(?:\.py|/)`[^|]*) \|", page, re.MULTILINE)
    named = {name for cell in cells for name in re.findall(r"`([a-z_]+(?:\.py|/))`", cell)}
    package = ROOT / "src" / "seawall"
    there = {path.name for path in package.glob("[a-z]*.py")}
    there |= {f"{path.name}/" for path in package.iterdir() if (path / "__init__.py").exists()}
    assert named == there


# The comparison


def test_the_comparisons_are_what_the_results_give() -> None:
    for path, text, wanted in bench.pages(bench.current()):
        assert text == wanted, f"{path.name}: python benchmarks/readme.py"


REPORT = {
    "environment": {
        "implementation": "CPython",
        "python": "3.11.7",
        "processor": "a processor",
        "cpus": 2,
        "load_average": 0.1,
        "at": "2026-01-01T00:00:00Z",
        "commit": "abc",
        "versions": {"slowapi": "0.1.9", "traffik": "not installed"},
    },
    "parts": {
        "direct": {
            "rows": [
                {"name": name, "added": {"median": added} if added else None}
                for name, added in {
                    "Seawall, 1 limit": 5.0,
                    "Seawall, 3 limits": 8.0,
                    "floor: 3 limits written out by hand": 2.0,
                    "asgi-ratelimit, 1 limit": 4.0,
                    "asgi-ratelimit, 3 limits": 9.6,
                    "traffik, 1 limit": None,
                    "slowapi ASGI, 1 limit": 100.0,
                }.items()
            ]
        }
    },
    "verdicts": [
        {"claim": "fast", "value": 8.0, "bar": 10.0, "unit": "us", "outcome": "held"},
        {"claim": "small", "value": 300.0, "bar": 250.0, "unit": "B", "outcome": "missed"},
        {"claim": "unknown", "value": None, "bar": 1.0, "unit": "x", "outcome": "not measured"},
    ],
}


def test_the_comparison_says_where_seawall_loses() -> None:
    text = bench.overhead(REPORT, plot=False)
    assert "| **Seawall**: identity, headers, metrics | **5.00 us** | **8.00 us** |" in text
    assert "| asgi-ratelimit | 0.80 x | 1.2 x |" in text
    assert "| slowapi (ASGI) | 20 x | not measured |" in text
    assert "| traffik | not measured | not measured |" in text
    assert "Cheaper than Seawall in this run: asgi-ratelimit (0.80 x with 1 limit)." in text
    assert "Of 2 bars that the benchmark sets, 1 were held." in text
    assert "* missed: small: 300 B, and the bar is 250 B" in text
    assert "slowapi 0.1.9. `x`" in text
    assert "![" not in text


def goal(scenario: str, metric: str, outcome: str, *, at_least: bool = True, **means: float | None) -> dict[str, Any]:
    return {
        "claim": f"the claim of {scenario}",
        "scenario": scenario,
        "metric": metric,
        "bar": 0.95,
        "at_least": at_least,
        "outcome": outcome,
        "controllers": {name: {"mean": mean, "min": mean, "max": mean} for name, mean in means.items()},
    }


SIMULATED = {
    "environment": {"at": "2026-01-01T00:00:00Z", "commit": "abc"},
    "parts": {
        "seeds": 5,
        "controllers": ["seawall", "vegas", "none", "toobusy"],
        "goals": [
            goal("S1-10x", "goodput/ideal", "met", seawall=0.99, vegas=1.0, none=0.02, toobusy=0.5),
            goal("S2", "recovery s", "met on average", at_least=False, seawall=0.9, vegas=0.0, none=None),
            goal("S11", "streams admitted", "missed", seawall=0.5, vegas=1.0),
        ],
    },
}
REAL: dict[str, Any] = {
    "environment": {
        **{key: REPORT["environment"][key] for key in ("implementation", "python", "processor", "load_average")},
        "at": "2026-01-01T00:00:00Z",
        "commit": "abc",
        "versions": {"uvicorn": "0.50"},
    },
    "parts": {
        "effort": {"rounds": 3},
        "cases": {
            "S1 10x": {
                "subjects": {
                    "seawall": {"metrics": {"of_ideal": {"median": 0.93}, "p99_ms": {"median": 51.2}}},
                    "bare": {"metrics": {"of_ideal": {"median": 0.03}}},
                    "refuse": {"metrics": {"of_ideal": {"median": 0.0}}},
                }
            },
            "S16 never awaits, 10x": {"subjects": {}},
        },
    },
    "verdicts": [
        {"claim": "goodput", "value": 0.93, "bar": 0.9, "unit": "", "outcome": "held"},
        {"claim": "recovery", "value": 2.5, "bar": 2.0, "unit": " s", "outcome": "missed"},
    ],
}


def test_the_overload_part_has_peers_beside_seawall_and_names_what_is_missed() -> None:
    text = bench.overload(SIMULATED, REAL, plots={"overload.svg"})
    assert "means of 5 seeds, 2026-01-01, commit abc." in text
    assert "| Goal | bar | **Seawall** | nothing | Vegas |" in text
    assert "| the claim of S1-10x | >= 0.95 | 0.990 | 0.0200 | 1.00 |" in text
    assert "| the claim of S2 | <= 0.95 | 0.900 | never | 0 |" in text
    assert "Of 3 goals, 1 are met with each seed." in text
    assert "* met on average: S2, the claim of S2: 0.900, goal <= 0.95\n* missed: S11, the claim of S11: 0.500," in text
    assert "medians of 3 rounds, CPython 3.11.7, a processor, load 0.1, 2026-01-01, commit abc." in text
    assert "| | **Seawall** | nothing |" in text
    assert "| 10 times capacity: goodput of what is possible | 0.930 | 0.0300 |" in text
    assert "| the same: p99 of what is served, ms | 51.2 | - |" in text
    assert "never await" not in text
    assert (
        "Of 2 bars that the benchmark sets, 1 were held.\n\n* missed: recovery: 2.50 s, and the bar is 2.00 s\n" in text
    )
    assert re.findall(r"!\[[^]]+\]\(([^)]+)\)", text) == ["../benchmarks/results/overload.svg"]


@pytest.mark.parametrize(
    ("simulated", "real", "missing"), [(SIMULATED, None, "real servers"), (None, REAL, "Simulated"), (None, None, "")]
)
def test_the_half_of_the_overload_part_without_results_says_so(simulated: Any, real: Any, missing: str) -> None:
    text = bench.overload(simulated, real, plots=())
    assert text.count("Not measured yet") == (simulated is None) + (real is None)
    assert re.search(rf"\*\*[^*]*{missing}\*\* Not measured yet", text)
    assert text.endswith("\n")


def test_every_headline_is_a_goal_of_the_simulation_and_every_row_a_case() -> None:
    assert set(bench.HEADLINES) <= {(goal.scenario, goal.metric) for goal in GOALS}
    assert set(bench.CONTROLLERS) <= {"seawall", *LAWS}
    assert {title for title, _, _ in bench.CASES} <= {case.title for case in CASES}
    assert set(bench.SUBJECTS) == set(SUBJECTS)


def test_the_summary_counts_what_is_held_and_shows_the_plots_that_are_there() -> None:
    text = bench.summary({"overload": SIMULATED, "overhead": REPORT}, plots={"overload.svg"})
    assert "**Under overload, simulated, beside the laws of others**: 1 of 3 goals are held." in text
    assert "**In memory**: 1 of 2 goals are held." in text
    assert "**Through Redis**: not measured yet." in text
    assert re.findall(r"!\[[^]]+\]\(([^)]+)\)", text) == ["benchmarks/results/overload.svg"]


def test_without_results_the_comparison_says_so() -> None:
    assert bench.overhead(None, plot=False).startswith("Not measured yet")


def test_a_page_without_markers_is_not_written_to() -> None:
    with pytest.raises(ValueError, match="once"):
        bench.renewed("no markers", {"overload": "text"})


def test_each_part_is_written_between_its_own_markers() -> None:
    page = "a <!-- bench:overhead -->x<!-- /bench --> b <!-- bench:overload -->y<!-- /bench --> c"
    assert bench.renewed(page, {"overload": "new \\1\n"}) == (
        "a <!-- bench:overhead -->x<!-- /bench --> b <!-- bench:overload -->\nnew \\1\n<!-- /bench --> c"
    )


def test_the_parts_are_read_from_the_directory_of_results(tmp_path: Path) -> None:
    (tmp_path / "overload_real.json").write_text(json.dumps(REAL))
    (tmp_path / "overload_real.svg").touch()
    parts = bench.current(tmp_path)
    texts = "".join(path.read_text(encoding="utf-8") for path in (bench.README, bench.PAGE, bench.CLIENT))
    assert set(parts) == set(re.findall(r"<!-- bench:([a-z]+) -->", texts))
    assert parts["overhead"].startswith("Not measured yet")
    assert parts["overload"] == bench.overload(None, REAL, plots={"overload_real.svg"})


@pytest.fixture(autouse=True)
def _leave_nothing_behind() -> Iterator[None]:
    yield
    reset()
