"""The documentation is true: its blocks run, its names exist, its generated parts are the code's, its links lead on."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer

from pages import DOCS, NOT_RUN, PAGES, README, Reader, blocks, commands, equip, is_slow, named_commands
from seawall import Seawall
from seawall.cli.app import build
from seawall.config import CODES
from seawall.metrics import SPECS
from seawall.testing import ManualClock, drive, reset
from serving import ROOT
from stores import standalone


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def of_pages(pages: list[Path]) -> Any:
    marked = [pytest.param(page, marks=pytest.mark.slow) if is_slow(page) else page for page in pages]
    return pytest.mark.parametrize("page", marked, ids=name_of)


@pytest.fixture(autouse=True)
def _leave_nothing_behind() -> Any:
    yield
    reset()


# What is shown happens


@of_pages(PAGES)
def test_what_a_page_shows_is_what_happens(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    equip(tmp_path, monkeypatch)
    monkeypatch.setenv("SEAWALL_SECRET", "a secret of the tests")
    monkeypatch.setenv("SEAWALL_TOKEN", "a-token-of-the-tests")
    monkeypatch.setenv("REDIS_URL", "redis://127.0.0.1:1")
    with Reader(page, tmp_path) as reader:
        if is_slow(page) and "REDIS_URL" in page.read_text(encoding="utf-8"):
            with standalone() as server:
                monkeypatch.setenv("REDIS_URL", server.url)
                reader.read()
        else:
            reader.read()


def test_what_is_not_run_has_a_reason_and_is_there() -> None:
    lines = [command.line for page in PAGES for block in blocks(page, "console") for command in commands(block)]
    assert [start for start in NOT_RUN if not any(line.startswith(start) for line in lines)] == []
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = {line.split()[1] for line in lines if line.startswith("make ")}
    assert named <= targets


def test_limit_charge_and_usage_do_what_their_block_says(tmp_path: Path) -> None:
    page = DOCS / "stages" / "route-limits.md"
    [block] = [block for block in blocks(page, "python") if "import charge" in block.text]
    reader = Reader(page, tmp_path)
    reader.python(block)
    app = Seawall(reader.names["app"], default="100/minute", clock=ManualClock())

    def call(path: str, method: str = "GET") -> Any:
        return asyncio.run(drive(app, path, method=method))

    resets = [call("/password-reset", "POST") for _ in range(4)]
    assert [answer.status for answer in resets] == [200, 200, 200, 429]
    assert [call("/report").status for _ in range(2)] == [200, 429]
    # Four were admitted so far, then this one: what was refused has cost nothing.
    assert json.loads(call("/complete?words=20", "POST").body) == {"left": 75}
    assert json.loads(call("/complete?words=0", "POST").body) == {"left": 74}


@cache
def verbs() -> dict[str, set[str]]:
    """The options of each verb; a verb below another one is two words."""
    found: dict[str, set[str]] = {}

    def collect(name: str, command: Any) -> None:
        found[name] = {option for each in command.params for option in (*each.opts, *each.secondary_opts)}
        for word, inner in getattr(command, "commands", {}).items():
            collect(f"{name} {word}".strip(), inner)

    collect("", typer.main.get_command(build(None)))
    return found


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_command_that_is_named_exists(page: Path) -> None:
    for where, words in named_commands(page):
        verb = next((name for name in (" ".join(words[:2]), words[0]) if name in verbs()), "")
        alternatives = words[0].split("|") if not verb else []
        assert verb or words[0].startswith("-") or set(alternatives) <= set(verbs()), f"{where}: seawall {words[0]}"
        options = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)} - {"--help", "--version"}
        if verb != "run":  # which hands on what the server knows
            assert options <= verbs()[verb], f"{where}: seawall {' '.join(words)}"


SCRAPED = {"job", "instance", "namespace", "pod"}
"""Labels that Prometheus and its operator add."""


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_metric_that_is_named_exists(page: Path) -> None:
    known = {spec.name: set(spec.labels) for spec in SPECS}
    parts = {f"{spec.name}{part}" for spec in SPECS if spec.bounds for part in ("_bucket", "_sum", "_count")}
    text = page.read_text(encoding="utf-8")
    for name, labels in re.findall(r"\b(seawall_[a-z_]+)(?:\{([^}\n]*)\})?", text):
        assert name in known or name in parts, f"{name_of(page)}: {name}"
        if labels and name in known:
            asked = set(re.findall(r"([a-z_]+)(?=\s*(?:,|$|=|!))", re.sub(r'"[^"]*"', "", labels)))
            assert asked <= known[name] | SCRAPED, f"{name_of(page)}: {name}{{{labels}}}"


TEST = re.compile(r"`(?:(test_\w+\.py)::)?(test_\w+)`")


@cache
def where_tests_are() -> dict[str, set[str]]:
    """The files in which a test of each name is."""
    found: dict[str, set[str]] = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for name in re.findall(r"^\s*(?:async )?def (test_\w+)\(", path.read_text(encoding="utf-8"), re.MULTILINE):
            found.setdefault(name, set()).add(path.name)
    return found


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_test_that_is_named_exists(page: Path) -> None:
    for file, name in TEST.findall(page.read_text(encoding="utf-8")):
        assert name in where_tests_are(), f"{name_of(page)}: {name}"
        assert not file or file in where_tests_are()[name], f"{name_of(page)}: {file}::{name}"


def test_what_is_quoted_from_the_log_is_in_the_code() -> None:
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py"))
    page = (DOCS / "failure-behaviour.md").read_text(encoding="utf-8")
    column = re.findall(r"^\| [^|]+\|[^|]+\|[^|]+\|([^|]+)\|[^|]+\|$", page, re.MULTILINE)
    quoted = {words for cell in column for words in re.findall(r"`([^`]+)`", cell) if " " in words}
    assert len(quoted) >= 10
    for words in quoted:
        parts = [part.strip(" ():") for part in words.split("...")]
        assert [part for part in parts if part not in source] == [], words


STAGES = [DOCS / "overload.md", *sorted((DOCS / "stages").glob("*.md"))]


@pytest.mark.parametrize("page", STAGES, ids=name_of)
def test_the_page_of_a_stage_has_its_sections_in_one_order(page: Path) -> None:
    wanted = ["Overview", "How it decides", "Limitations", "An example", "Metrics"]
    text = page.read_text(encoding="utf-8")
    titles = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert [title for title in titles if title in wanted] == wanted
    example = text.partition("## An example")[2].partition("\n## ")[0]
    assert "```yaml" in example
    assert "The above can be understood as follows." in example


# What is said of the code


@cache
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["generate"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_generated_parts_are_what_the_code_says(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    if "<!-- generated: verbs -->" in text and "Files to check" not in generator().verbs([]):
        pytest.skip(f"typer {typer.__version__} with this click does not tell what arguments are for")
    assert generator().renewed(text) == text, "python docs/generate.py"


def test_every_key_of_the_language_is_in_the_reference() -> None:
    text = (DOCS / "configuration.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"<!-- generated: keys ?(\S*) -->", text))
    assert shown == {path for path, _ in generator().models()} | {"rate", "quota"}
    titles = re.findall(r"^#+ (?:`)?(.+?)(?:`)?$", text, re.MULTILINE)
    assert {generator().heading(path) for path, _ in generator().models()} <= set(titles)
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        assert "```yaml" in section, section.partition("\n")[0]


def test_every_diagnostic_is_explained_with_an_example() -> None:
    text = (DOCS / "diagnostics.md").read_text(encoding="utf-8")
    found = re.findall(r"^### ([EW]\d{3}): ([^\n]+)\n(.*?)(?=^##|\Z)", text, re.MULTILINE | re.DOTALL)
    assert {code: meaning for code, meaning, _ in found} == dict(CODES)
    assert [code for code, _, section in found if f"[{code}]: " not in section] == []


# The site


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_asks_nobody_else_for_anything(tmp_path: Path) -> None:
    pytest.importorskip("furo", reason="the extra docs is not installed")
    pytest.importorskip("myst_parser", reason="the extra docs is not installed")
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-W",
        "--keep-going",
        "-n",
        "-q",
        "-b",
        "html",
        "-d",
        str(tmp_path / "t"),
    ]
    built = subprocess.run([*command, str(DOCS), str(tmp_path / "site")], capture_output=True, text=True, check=False)
    assert (built.returncode, built.stderr) == (0, "")
    loaded = re.compile(
        r"<(?:script|img|iframe|source|video)\b[^>]*\bsrc=\"(?:https?:)?//|<link\b[^>]*\bhref=\"(?:https?:)?//"
    )
    for page in (tmp_path / "site").rglob("*.html"):
        assert loaded.search(page.read_text(encoding="utf-8")) is None, page
    for sheet in (tmp_path / "site").rglob("*.css"):
        assert re.search(r"@import|url\([\"']?(?:https?:)?//", sheet.read_text(encoding="utf-8")) is None, sheet
    assert {path.stem for path in (tmp_path / "site").glob("*.html")} >= {page.stem for page in DOCS.glob("*.md")}


def test_links_of_the_readme_lead_somewhere() -> None:
    """Those of the other pages are the build's."""
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", README.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        linked = (ROOT / path) if path else README
        assert linked.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.+)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^a-z0-9 _-]", "", title.lower()).replace(" ", "-") for title in titles}, target
