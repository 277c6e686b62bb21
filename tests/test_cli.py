"""The command line, verb by verb: what is said where, exit codes, and no traceback whatever it is given."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import seawall
import seawall.cli
from seawall.cli import hash_key, terminal
from seawall.cli.app import build
from seawall.config import check, load, loads

REFERENCE = Path(__file__).with_name("data") / "seawall.yaml"
VERBS = (
    "init",
    "check",
    "diff",
    "history",
    "schema",
    "demo",
    "explain",
    "export",
    "run",
    "simulate",
    "status",
    "tenant",
    "top",
    "hash-key",
)

BROKEN = """\
version: 1
plans:
  anonymous: {rate: 10/minute}
  free: {rate: 10_000/dya, concurency: 5}
"""


def invoke(*arguments: str | Path, stdin: bytes | str | None = None) -> Any:
    """Run a verb in this process. What is no clean exit is raised."""
    result = CliRunner().invoke(build(None), [str(argument) for argument in arguments], input=stdin)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def environment(**changes: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(seawall.__file__).parents[1]), **changes}


def run_process(*arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "seawall", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment(**changes), check=False)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


# The program


def test_no_arguments_is_help() -> None:
    result = invoke()
    assert result.exit_code == 0
    assert "seawall demo" in result.stdout
    assert all(verb in result.stdout for verb in VERBS)


def test_version() -> None:
    result = invoke("--version")
    assert (result.exit_code, result.stdout) == (0, f"seawall {seawall.__version__}\n")


@pytest.mark.parametrize("look", [None, "rich"])
@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_examples(verb: str, look: Any) -> None:
    result = CliRunner().invoke(build(look), [verb, "--help"])
    assert result.exit_code == 0
    assert f"seawall {verb}" in result.stdout
    assert "Examples:" in result.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["--nonsense"],
        ["check", "--format", "xml"],
        ["check", "--nonsense"],
        ["init", "a", "b"],
        ["schema", "a"],
        ["explain"],
        ["hash-key", "a", "b"],
        ["demo", "--acts", "5"],
        ["demo", "--acts", ""],
        ["demo", "--port", "70000"],
        ["demo", "--port", "http"],
    ],
)
def test_usage_errors_end_with_2(arguments: list[str]) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr


def test_main_runs_the_arguments_of_the_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["seawall", "--version"])
    with pytest.raises(SystemExit) as ended:
        seawall.cli.main()
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"seawall {seawall.__version__}\n"


def test_python_m_is_the_same_program(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["seawall", "--version"])
    with pytest.raises(SystemExit):
        runpy.run_module("seawall", run_name="__main__")
    assert capsys.readouterr().out == f"seawall {seawall.__version__}\n"


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_the_extra_it_says_what_to_install(
    missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.startswith("seawall.cli.")]:
        monkeypatch.delitem(sys.modules, name)
    for name in [name for name in sys.modules if name.partition(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(SystemExit) as ended:
        seawall.cli.main()
    assert ended.value.code == 2
    assert f'needs {missing}: pip install "seawall[cli]"' in capsys.readouterr().err


def test_another_missing_module_is_not_mistaken_for_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "seawall.cli.app")
    monkeypatch.setitem(sys.modules, "seawall.cli.check", None)
    monkeypatch.delattr(seawall.cli, "check")
    with pytest.raises((ImportError, ModuleNotFoundError), match="check"):
        seawall.cli.main()


def test_a_terminal_that_knows_ascii_only_is_no_error(tmp_path: Path) -> None:
    path = tmp_path / "seawall.yaml"
    path.write_text("version: 1\nplans: {default: {rate: 1/s}}\ntenants: {zoë: {}}\n", encoding="utf-8")
    done = run_process("explain", "/", "--tenant", "zoë", "--config", str(path), PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert "tenant zo\\xeb" in done.stdout


# Colour


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("variables", "lively"),
    [({}, True), ({"NO_COLOR": "1"}, False), ({"NO_COLOR": ""}, True), ({"TERM": "dumb"}, False)],
)
def test_no_colour_where_it_is_not_wanted(
    variables: dict[str, str], lively: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    stream = Terminal()
    terminal.show(check("no such file").diagnostics, terminal.console(stream))
    assert ("\x1b[" in stream.getvalue()) is lively


def test_a_pipe_gets_no_colour_even_if_forced(here: Path) -> None:
    (here / "seawall.yaml").write_text(BROKEN)
    done = run_process("check", FORCE_COLOR="1")
    assert "\x1b" not in done.stdout + done.stderr
    assert done.returncode == 1


# init


@pytest.mark.parametrize("options", [[], ["--minimal"]])
def test_what_init_writes_is_valid_without_a_warning(options: list[str], here: Path) -> None:
    result = invoke("init", *options)
    assert result.exit_code == 0
    report = check("seawall.yaml")
    assert report.diagnostics == ()
    assert report.policy is not None


def test_what_init_says_of_overload_is_what_holds_without_it(here: Path) -> None:
    invoke("init")
    text = (here / "seawall.yaml").read_text()
    said = {line.partition(":")[0]: line for line in re.findall(r"^# ([a-z]+: \{.*)$", text, re.MULTILINE)}
    assert set(said) == {"priorities", "shedding", "status"}
    assert loads(f"{text}\n{said['status']}").status is not None
    as_it_is, classes = loads(text), loads(f"{text}\n{said['priorities']}")
    assert classes.priorities == as_it_is.priorities
    assert loads(f"{text}\n{said['shedding']}").shedding.algorithm == "off"
    assert as_it_is.shedding.algorithm == "adaptive"


def test_init_says_what_to_do_next_in_three_lines_that_run(here: Path) -> None:
    invoke_result = invoke("init", "limits.yaml")
    lines = [line.strip() for line in invoke_result.stdout.splitlines() if line.startswith("    ")]
    program = "\n".join(["from starlette.applications import Starlette", "app = Starlette()", *lines])
    names: dict[str, Any] = {}
    exec(program, names)
    assert names["app"].user_middleware[0].kwargs == {"config": "limits.yaml"}


def test_init_names_the_schema_that_it_writes_beside(here: Path) -> None:
    (here / "deploy").mkdir()
    assert invoke("init", "deploy/seawall.yaml").exit_code == 0
    first = (here / "deploy" / "seawall.yaml").read_text().splitlines()[0]
    match = re.fullmatch(r"# yaml-language-server: \$schema=(\S+)", first)
    assert match
    schema = json.loads((here / "deploy" / match[1]).read_text())
    assert schema["title"] == "Seawall configuration"


def test_init_leaves_the_schema_out_if_asked(here: Path) -> None:
    assert invoke("init", "--no-schema").exit_code == 0
    assert [path.name for path in here.iterdir()] == ["seawall.yaml"]


def test_init_overwrites_nothing_without_force(here: Path) -> None:
    (here / "seawall.yaml").write_text("mine")
    (here / "seawall.schema.json").write_text("mine too")
    refused = invoke("init")
    assert refused.exit_code == 2
    assert "--force" in refused.stderr
    assert (here / "seawall.yaml").read_text() == "mine"
    assert invoke("init", "other.yaml").exit_code == 0
    assert (here / "seawall.schema.json").read_text() == "mine too"
    assert invoke("init", "--force").exit_code == 0
    assert (here / "seawall.yaml").read_text() != "mine"
    assert (here / "seawall.schema.json").read_text() != "mine too"


@pytest.mark.parametrize("path", [".", "missing/seawall.yaml", "a" * 300])
def test_init_where_nothing_can_be_written(path: str, here: Path) -> None:
    result = invoke("init", path)
    assert result.exit_code == 2
    assert result.stderr.startswith("seawall: ")
    assert list(here.iterdir()) == []


# check


def test_check_of_the_reference_file() -> None:
    result = invoke("check", REFERENCE)
    assert result.exit_code == 0
    assert f"{REFERENCE}: ok" in result.stdout
    assert result.stdout.endswith("(4 plans, 3 tenants, 5 routes, 2 keys)\n")


def test_strict_makes_warnings_count(here: Path) -> None:
    assert check(REFERENCE).warnings
    assert invoke("check", "--strict", REFERENCE).exit_code == 1
    assert invoke("init").exit_code == 0
    assert invoke("check", "--strict").exit_code == 0


def test_every_mistake_is_shown_at_its_place(here: Path) -> None:
    (here / "seawall.yaml").write_text(BROKEN)
    result = invoke("check")
    assert result.exit_code == 1
    assert "seawall.yaml:4:16: error[E020]: unknown time unit 'dya'" in result.stdout
    assert "seawall.yaml:4:28: error[E010]: unknown key 'concurency'" in result.stdout
    assert re.search(r"^seawall.yaml: \d errors$", result.stdout, re.MULTILINE)


def test_one_error_is_not_two(here: Path) -> None:
    (here / "seawall.yaml").write_text("version: 1\nplan: {}\nplans: {default: {rate: 1/s}}\n")
    assert invoke("check").stdout.endswith("seawall.yaml: 1 error\n")


def test_check_of_several_files_ends_with_the_worst(here: Path) -> None:
    (here / "broken.yaml").write_text(BROKEN)
    assert invoke("check", REFERENCE, "broken.yaml").exit_code == 1
    assert invoke("check", "broken.yaml", "missing.yaml", REFERENCE).exit_code == 2


def test_json_is_one_array_over_all_files(here: Path) -> None:
    (here / "broken.yaml").write_text(BROKEN)
    result = invoke("check", "--format", "json", "broken.yaml", REFERENCE)
    found = json.loads(result.stdout)
    assert {one["code"] for one in found} >= {"E010", "E020", "W008"}
    assert {one["file"] for one in found} == {"broken.yaml", str(REFERENCE)}
    assert "broken.yaml: " in result.stderr


def test_json_of_nothing_wrong_is_an_empty_array(here: Path) -> None:
    invoke("init")
    assert json.loads(invoke("check", "--format", "json").stdout) == []


def test_github_gets_a_command_for_each_mistake(here: Path) -> None:
    (here / "seawall.yaml").write_text(BROKEN)
    result = invoke("check", "--format", "github")
    lines = result.stdout.splitlines()
    assert len(lines) == len(check("seawall.yaml").diagnostics)
    assert all(
        re.match(r"::(error|warning) file=seawall\.yaml,line=\d+,col=\d+,title=[^:]*::.", line) for line in lines
    )


def test_github_gets_nothing_for_nothing_wrong(here: Path) -> None:
    invoke("init")
    assert invoke("check", "--format", "github").stdout == ""


def test_a_missing_default_file_leads_to_init(here: Path) -> None:
    result = invoke("check")
    assert result.exit_code == 2
    assert "error[E000]" in result.stdout
    assert "seawall init" in result.stderr


BAD_FILES = {
    "garbage": bytes(range(256)) * 64,
    "zeros": bytes(4096),
    "five megabytes": b"version: 1\n" + b"# filling\n" * 500_000,
    "empty": b"",
    "a list": b"- 1\n- 2\n",
    "blank values": b"version:\nplans:\n",
    "deep": b"[" * 5_000,
    "aliases": b"a: &a [1]\nb: *a\n",
    "terminal commands": b'version: 1\n"\\e]0;owned\\a": 1\nplans: {default: {rate: 1/s}}\n',
    "no end": b'version: "1\n',
}


@pytest.mark.parametrize("name", BAD_FILES)
@pytest.mark.parametrize("form", ["text", "json", "github"])
def test_bad_files_are_mistakes_and_not_tracebacks(name: str, form: str, here: Path) -> None:
    (here / "bad.yaml").write_bytes(BAD_FILES[name])
    result = invoke("check", "--format", form, "bad.yaml")
    assert result.exit_code == 1
    assert "\x1b" not in result.stdout
    assert form == "json" or len(result.stdout) < 10_000


@pytest.mark.parametrize("path", ["missing.yaml", ".", "/dev/null/x", "a" * 5_000])
def test_unreadable_files_end_with_2(path: str, here: Path) -> None:
    assert invoke("check", path).exit_code == 2


# schema


def test_schema_goes_to_stdout_or_to_a_file(here: Path) -> None:
    printed = invoke("schema").stdout
    assert json.loads(printed)["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    result = invoke("schema", "-o", "schema.json")
    assert (result.exit_code, result.stdout) == (0, "")
    assert (here / "schema.json").read_text() == printed


def test_schema_where_nothing_can_be_written(here: Path) -> None:
    result = invoke("schema", "--output", "missing/schema.json")
    assert result.exit_code == 2
    assert "cannot be written" in result.stderr


# hash-key


def test_a_printed_hash_is_a_key_of_its_tenant(here: Path) -> None:
    line = invoke("hash-key", stdin="a-key-that-is-long-enough\n").stdout.strip()
    (here / "seawall.yaml").write_text(
        "version: 1\nidentity: {tenant: [{api_key: {header: X-Key}}]}\n"
        f'plans: {{default: {{rate: 1/s}}}}\ntenants: {{acme: {{keys: ["{line}"]}}}}\n'
    )
    result = invoke("explain", "/", "--key", "a-key-that-is-long-enough")
    assert "tenant acme" in result.stdout


def test_the_hash_is_the_sha256_of_the_key() -> None:
    expected = "sha256:" + hashlib.sha256(b"foo").hexdigest() + "\n"
    assert invoke("hash-key", "foo").stdout == expected
    for stdin in ("foo", "foo\n", "foo\r\n"):
        assert invoke("hash-key", stdin=stdin).stdout == expected


def test_a_key_as_an_argument_is_warned_about_and_never_repeated() -> None:
    result = invoke("hash-key", "a-key-that-is-long-enough")
    assert "history" in result.stderr
    assert "a-key-that-is-long-enough" not in result.stdout + result.stderr
    assert "history" not in invoke("hash-key", stdin="a-key-that-is-long-enough").stderr


def test_a_short_key_is_warned_about() -> None:
    assert "guessed" in invoke("hash-key", stdin="foo").stderr
    assert invoke("hash-key", stdin="f" * hash_key.SHORT).stderr == ""


@pytest.mark.parametrize("options", [[], ["--prefix", "acme_"], ["--prefix", ""]])
def test_a_generated_key_is_shown_with_its_hash_and_differs_each_time(options: list[str]) -> None:
    seen = set()
    for _ in range(3):
        result = invoke("hash-key", "--generate", *options)
        assert result.exit_code == 0
        match = re.fullmatch(r"key:  (\S+)\nhash: (\S+)\n", result.stdout)
        assert match
        key, printed = match.groups()
        assert printed == "sha256:" + hashlib.sha256(key.encode()).hexdigest()
        prefix = options[1] if options else "sw_"
        assert key.startswith(prefix)
        assert len(key) - len(prefix) >= 43
        seen.add(key)
    assert len(seen) == 3


@pytest.mark.parametrize(
    "key",
    [
        b"",
        b"\n",
        b"two\nlines",
        b"blank ",
        b" blank",
        b"zo\xc3\xab",
        b"\xff\xfe",
        b"\x00",
        b"tab\tin",
        b"x" * 5_000,
        bytes(5_000_000),
    ],
    ids=["empty", "newline", "lines", "trailing", "leading", "utf8", "binary", "nul", "tab", "long", "huge"],
)
def test_what_cannot_be_a_key_is_refused_and_not_shown(key: bytes) -> None:
    result = invoke("hash-key", stdin=key)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Traceback" not in result.stderr
    assert len(result.stderr) < 200


@pytest.mark.parametrize(
    "arguments", [["--generate", "key"], ["--prefix", "a"], ["--generate", "--prefix", "zoë"], [""]]
)
def test_hash_key_refuses_contradictions(arguments: list[str]) -> None:
    result = invoke("hash-key", *arguments)
    assert (result.exit_code, result.stdout) == (2, "")


def test_on_a_terminal_the_key_is_asked_for_without_showing_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def prompt(text: str, **options: Any) -> str:
        asked.update(options)
        return "typed"

    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr("typer.prompt", prompt)
    assert hash_key._read() == "typed"
    assert asked["hide_input"]


# What the verbs share


def test_a_configuration_with_mistakes_ends_a_verb_that_needs_one(here: Path) -> None:
    (here / "seawall.yaml").write_text(BROKEN)
    result = invoke("explain", "/")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "error[E020]" in result.stderr
    missing = invoke("explain", "/", "--config", "missing.yaml")
    assert (missing.exit_code, missing.stdout) == (2, "")
    assert "seawall init" in missing.stderr


def test_an_error_that_is_no_errno_is_shown_as_it_is() -> None:
    assert terminal.why(OSError("odd")) == "odd"


def test_the_files_that_commands_leave_load(here: Path) -> None:
    invoke("init", "full.yaml")
    invoke("init", "--minimal", "small.yaml")
    assert set(load("full.yaml").plans) == {"anonymous", "free", "pro"}
    assert set(load("small.yaml").plans) == {"default"}
