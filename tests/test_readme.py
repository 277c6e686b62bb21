"""The README is true: its blocks are taken out of the file itself, run, and compared with what it shows."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
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

from seawall import Seawall
from seawall.gate import RESULTS
from seawall.metrics import SPECS
from seawall.overload import laws, thresholds
from seawall.overload.limiter import Class, Limiter, Settings
from seawall.testing import ManualClock, drive, reset
from serving import ROOT, Served, most, serving

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")

NOT_RUN = {
    'pip install ".[cli]" fastapi': "needs a package index; the wheel and its extras have tests in test_packaging.py",
    "make test": "is what runs this",
    "make lint": "takes a minute, and .ci/run runs it beside the tests",
    "make bench": "takes ten minutes and installs the peers; test_benchmarks.py makes a quick run",
}
"""Commands that a test cannot run, with the reason."""

SERVE = "uvicorn app:app --no-proxy-headers &"


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block: its language, its text, and the line of the README on which it begins."""

    language: str
    text: str
    line: int

    def __str__(self) -> str:
        return f"line-{self.line}"


def blocks(language: str) -> list[Block]:
    return [
        Block(found[1], found[2], TEXT[: found.start(2)].count("\n") + 1)
        for found in re.finditer(r"^```(\w*)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
        if found[1] == language
    ]


@dataclass(frozen=True, slots=True)
class Command:
    """A line after ``$``, and what the README shows below it."""

    line: str
    shown: str


def commands(block: Block) -> list[Command]:
    parts = re.split(r"^\$ ", block.text, flags=re.MULTILINE)
    assert parts[0] == "", f"README.md:{block.line}: a console block begins with a command"
    return [Command(line, shown) for line, _, shown in (part.partition("\n") for part in parts[1:])]


def matches(shown: str, got: str) -> bool:
    """Whether ``got`` is what is shown, in which ``...`` stands for anything."""
    pattern = ".*".join(map(re.escape, shown.strip("\n").split("...")))
    return re.fullmatch(pattern, got.replace("\r\n", "\n").strip("\n"), re.DOTALL) is not None


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory as the reader's: app.py and seawall.yaml are in it, and ``seawall`` is on the path."""
    (tmp_path / "app.py").write_text(blocks("python")[0].text, encoding="utf-8")
    (tmp_path / "seawall.yaml").write_text(blocks("yaml")[0].text, encoding="utf-8")
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "seawall").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m seawall "$@"\n')
    (tools / "seawall").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    source = str(ROOT / "src")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")])))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def shell(line: str, cwd: Path) -> str:
    """What ``line`` prints."""
    done = subprocess.run(["bash", "-c", line], cwd=cwd, capture_output=True, text=True, timeout=120, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("block", blocks("console"), ids=str)
def test_a_console_block_prints_what_it_shows(block: Block, workplace: Path) -> None:
    if "$ curl" in block.text and not shutil.which("curl"):
        pytest.skip("curl is not installed")
    served: Served | None = None
    with ExitStack() as stack:
        for command in commands(block):
            if command.line in NOT_RUN:
                continue
            if command.line == SERVE:
                arguments = ["-m", "uvicorn", "app:app", "--no-proxy-headers", "--port", "{port}"]
                served = stack.enter_context(serving(arguments, workplace / "log", cwd=workplace))
            elif served is not None:
                check_call(command, served, workplace)
            else:
                assert matches(command.shown, got := shell(command.line, workplace)), got


def check_call(command: Command, served: Served, workplace: Path) -> None:
    """Compare a call of the server. Where time counts, a slow machine may see what the bound allows it to see."""
    line = command.line.replace("localhost:8000", f"127.0.0.1:{served.port}")
    if "uniq -c" in line:
        started = time.monotonic()
        got = {status: int(count) for count, status in map(str.split, shell(line, workplace).splitlines())}
        shown = {status: int(count) for count, status in map(str.split, command.shown.splitlines())}
        assert sum(got.values()) == sum(shown.values())
        assert shown["200"] <= got["200"] <= most(shown["200"], 100 / 60, time.monotonic() - started)
        return
    got_text = ""
    for _ in range(5):  # the first may still find a token that came back
        got_text = shell(line, workplace)
        if matches(command.shown, got_text):
            return
    raise AssertionError(got_text)


def test_what_is_not_run_is_in_the_readme_and_exists() -> None:
    everything = {command.line for block in blocks("console") for command in commands(block)}
    assert set(NOT_RUN) - everything == set()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = {"".join(found) for found in re.findall(r"`make ([a-z-]+)`|^\$ make ([a-z-]+)$", TEXT, re.MULTILINE)}
    assert {"demo", "test", "help"} <= named <= targets


@pytest.mark.slow
def test_commands_within_sentences_run(workplace: Path) -> None:
    lines = [line for line in re.findall(r"`(seawall [^`]+)`", TEXT.replace("\n", " ")) if len(line.split()) > 2]
    assert any("--forwarded-for" in line for line in lines)
    for line in lines:
        done = subprocess.run(["bash", "-c", line], cwd=workplace, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, ""), line


@pytest.mark.parametrize("block", blocks("yaml"), ids=str)
def test_a_yaml_block_passes_check(block: Block, workplace: Path) -> None:
    text = block.text
    if "plans:" not in text:
        text = f"plans: {{default: {{rate: 100/minute}}}}\n{text}"
    if "version:" not in text:
        text = f"version: 1\n{text}"
    (workplace / "block.yaml").write_text(text, encoding="utf-8")
    told = shell("seawall check block.yaml; echo $?", workplace)
    assert told.endswith("\n0\n"), told


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_a_python_block_runs(block: Block, workplace: Path) -> None:
    app = run(block)
    assert asyncio.run(drive(app, "/")).status in (200, 404)


def run(block: Block) -> Any:
    """Run a block as the continuation of app.py, tests in it included; its application."""
    names: dict[str, Any] = {"__name__": "app", "FastAPI": FastAPI, "Seawall": Seawall, "app": FastAPI()}
    if "app.get" not in block.text:
        names["app"].get("/")(home)
    exec(compile(block.text, f"README.md:{block.line}", "exec"), names)
    for name, value in names.items():
        if name.startswith("test_"):
            value()
    return names["app"]


async def home() -> dict[str, str]:
    return {"hello": "world"}


def test_limit_charge_and_usage_do_what_their_block_says(workplace: Path) -> None:
    [block] = [block for block in blocks("python") if "import charge" in block.text]
    app = Seawall(run(block), default="100/minute", clock=ManualClock())

    def call(path: str, method: str = "GET") -> Any:
        return asyncio.run(drive(app, path, method=method))

    resets = [call("/password-reset", "POST") for _ in range(4)]
    assert [answer.status for answer in resets] == [200, 200, 200, 429]
    assert [call("/report").status for _ in range(2)] == [200, 429]
    # Four were admitted so far, then this one: what was refused has cost nothing.
    assert json.loads(call("/complete?words=20", "POST").body) == {"left": 75}
    assert json.loads(call("/complete?words=0", "POST").body) == {"left": 74}


# What is said in words and tables


def test_the_table_of_verbs_is_the_command_line(workplace: Path) -> None:
    told = shell("seawall --help", workplace).partition("Commands:")[2]
    verbs = set(re.findall(r"^  ([a-z-]+) ", told, re.MULTILINE))
    assert set(re.findall(r"^\| `seawall ([a-z-]+)` \|", TEXT, re.MULTILINE)) == verbs


def test_the_table_of_metrics_has_their_names_and_labels() -> None:
    known = {spec.name: ",".join(spec.labels) for spec in SPECS}
    named = dict(re.findall(r"`(seawall_[a-z_]+)(?:\{([a-z,]+)\})?`", TEXT))
    assert set(named) == set(known)
    assert {name: labels for name, labels in named.items() if labels} == {
        name: known[name] for name, labels in named.items() if labels
    }


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
    named = set(re.findall(r"^\| `([a-z_]+(?:\.py|/))` \|", page, re.MULTILINE))
    package = ROOT / "src" / "seawall"
    there = {path.name for path in package.glob("[a-z]*.py")}
    there |= {f"{path.name}/" for path in package.iterdir() if (path / "__init__.py").exists()}
    assert named == there


# The comparison


def test_the_comparisons_are_what_the_results_give() -> None:
    assert bench.renewed(TEXT, bench.current()) == TEXT, "python benchmarks/readme.py"


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
    assert re.findall(r"!\[[^]]+\]\(([^)]+)\)", text) == ["benchmarks/results/overload.svg"]


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
    assert set(parts) == set(re.findall(r"<!-- bench:([a-z]+) -->", TEXT))
    assert parts["overhead"].startswith("Not measured yet")
    assert parts["overload"] == bench.overload(None, REAL, plots={"overload_real.svg"})


@pytest.fixture(autouse=True)
def _leave_nothing_behind() -> Iterator[None]:
    yield
    reset()
