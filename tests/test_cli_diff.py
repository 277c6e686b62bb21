"""`seawall diff` and `seawall history`: what changed, in words, and how a script learns of it."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from seawall import watch
from seawall.cli import diff
from seawall.cli import history as verb
from seawall.config import differences, load, loads
from seawall.config.differences import MANY
from seawall.history import MOST, append
from seawall.policy import Policy
from seawall.rate import SECOND
from serving import ROOT
from test_cli import invoke, run_process

OLD = """\
version: 1
plans:
  free: {rate: 10/second}
  pro: {rate: 100/second, concurrency: 50}
defaults: {plan: free}
tenants:
  acme: {plan: pro}
"""
NEW = """\
version: 1 # a comment
plans:
  free: {rate: 10/second}
  pro: {rate: 100/second, concurrency: 20}
defaults: {plan: free}
tenants:
  acme: {plan: pro, overrides: {rate: 500/second}}
  globex: {plan: free}
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current directory with two configurations."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old.yaml").write_text(OLD, encoding="utf-8")
    (tmp_path / "new.yaml").write_text(NEW, encoding="utf-8")
    return tmp_path


# diff


def test_a_line_for_each_change_by_section(here: Path) -> None:
    result = invoke("diff", "old.yaml", "new.yaml")
    assert result.exit_code == 1
    assert result.stderr == ""
    assert result.stdout == (
        "plans\n"
        "  ~ plan pro: concurrency 50 -> 20 (1 tenant) (lowered)\n"
        "tenants\n"
        "  + globex: added (plan free)\n"
        "  ~ acme: rate 100/second -> 500/second (raised)\n"
        "\n"
        "3 changes: 1 raised, 1 lowered, 1 added\n"
    )


def test_what_is_removed_has_a_minus_and_what_neither_loosens_nor_tightens_no_word(here: Path) -> None:
    (here / "new.yaml").write_text(OLD.replace("  acme: {plan: pro}", "  {}") + "reload: 5s\n", encoding="utf-8")
    assert invoke("diff", "old.yaml", "new.yaml").stdout == (
        "tenants\n  - acme: removed (plan pro)\nreload\n  ~ reload 2s -> 5s\n\n2 changes: 1 removed, 1 changed\n"
    )


@pytest.mark.parametrize("form", ["text", "markdown"])
def test_the_same_is_0_also_if_it_is_written_in_another_way(form: str, here: Path) -> None:
    (here / "new.yaml").write_text("# a comment\n" + OLD.replace("10/second", "10 per second"), encoding="utf-8")
    result = invoke("diff", "old.yaml", "new.yaml", "--format", form)
    assert (result.exit_code, result.stdout) == (0, "no changes\n")


def test_json_is_for_scripts(here: Path) -> None:
    result = invoke("diff", "old.yaml", "new.yaml", "--format", "json")
    assert result.exit_code == 1
    told = json.loads(result.stdout)
    assert told["summary"] == "3 changes: 1 raised, 1 lowered, 1 added"
    assert told["changes"][2] == {
        "path": "tenants.acme.rate",
        "text": "acme: rate 100/second -> 500/second",
        "effect": "raised",
    }
    assert json.loads(invoke("diff", "old.yaml", "old.yaml", "--format", "json").stdout)["changes"] == []


def test_markdown_is_for_a_pull_request(here: Path) -> None:
    result = invoke("diff", "old.yaml", "new.yaml", "--format", "markdown")
    assert result.exit_code == 1
    assert result.stdout == (
        "**plans**\n\n"
        "- `plan pro: concurrency 50 -> 20 (1 tenant)` (lowered)\n\n"
        "**tenants**\n\n"
        "- `globex: added (plan free)` (added)\n"
        "- `acme: rate 100/second -> 500/second` (raised)\n\n"
        "3 changes: 1 raised, 1 lowered, 1 added\n"
    )


@pytest.mark.parametrize(
    ("text", "code"),
    [("plain", "`plain`"), ("a `b` c", "``a `b` c``"), ("`", "`` ` ``"), ("a```", "```` a``` ````")],
)
def test_no_text_ends_its_code_span(text: str, code: str) -> None:
    assert diff._code(text) == code


@pytest.mark.parametrize(("arguments", "added"), [(("-", "new.yaml"), True), (("new.yaml", "-"), False)])
def test_one_of_the_files_may_be_stdin(arguments: tuple[str, str], added: bool, here: Path) -> None:
    result = invoke("diff", *arguments, stdin=OLD.encode())
    assert result.exit_code == 1
    assert f"globex: {'added' if added else 'removed'} (plan free)" in result.stdout


def test_both_cannot_be(here: Path) -> None:
    result = invoke("diff", "-", "-", stdin=OLD)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "only one of the two" in result.stderr


@pytest.mark.parametrize("form", ["text", "json", "markdown"])
def test_what_is_wrong_is_said_of_both_files(form: str, here: Path) -> None:
    (here / "old.yaml").write_text(OLD.replace("10/second", "10/secnd"), encoding="utf-8")
    (here / "new.yaml").write_text(NEW.replace("concurrency", "concurency"), encoding="utf-8")
    result = invoke("diff", "old.yaml", "new.yaml", "--format", form)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "old.yaml:3:16: error[E020]: unknown time unit 'secnd'" in result.stderr
    assert "new.yaml:4:27: error[E010]: unknown key 'concurency'" in result.stderr


@pytest.mark.parametrize("content", [b"", b"\xff", b"version: 2", b"x" * (5 << 20)])
def test_what_is_wrong_with_stdin_is_said_as_of_a_file(content: bytes, here: Path) -> None:
    result = invoke("diff", "-", "new.yaml", stdin=content)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("<stdin>")


def test_a_file_that_is_not_there_is_2(here: Path) -> None:
    result = invoke("diff", "old.yaml", "nowhere.yaml")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "nowhere.yaml: error[E000]: cannot be read" in result.stderr


def test_secrets_are_not_shown(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_URL", "redis://user:canary-password@localhost")
    backend = "backend: {type: redis, url: '${REDIS_URL}', secret: a-canary-secret}\n"
    status = "status: {allow: [127.0.0.1], token: a-canary-of-a-token}\n"
    (here / "old.yaml").write_text(OLD + backend, encoding="utf-8")
    (here / "new.yaml").write_text(OLD + backend.replace("a-canary", "another-canary") + status, encoding="utf-8")
    for form in ("text", "json", "markdown"):
        for files in (("old.yaml", "new.yaml"), ("new.yaml", "old.yaml")):
            result = invoke("diff", *files, "--format", form)
            assert result.exit_code == 1
            assert "canary" not in result.stdout + result.stderr


def test_there_are_no_colours_in_a_pipe_and_some_on_a_terminal(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "\x1b" not in run_process("diff", "old.yaml", "new.yaml").stdout
    monkeypatch.setattr("seawall.cli.terminal.is_lively", lambda stream: True)
    monkeypatch.setenv("TERM", "xterm")
    assert "\x1b[1mplans\x1b[0m" in invoke("diff", "old.yaml", "new.yaml").stdout


# history


@pytest.fixture
def recorded(here: Path) -> Path:
    """A configuration with a record of four changes beside it."""
    config = here / "seawall.yaml"
    config.write_text(NEW + "history: record.jsonl\n", encoding="utf-8")
    record = here / "record.jsonl"
    first, second = loads(OLD), load(config)
    append(record, first, {"seawall.yaml": "0"}, 1.7e9)
    append(record, second, {"seawall.yaml": "1"}, 1.7e9 + 60, first)
    append(record, loads(OLD + "# a comment"), {"seawall.yaml": "2"}, 1.7e9 + 120, first)
    many = "".join(f"  t{at}: {{}}\n" for at in range(7))
    append(record, loads(OLD + many), {"seawall.yaml": "3"}, 1.7e9 + 180, first)
    return config


TABLE = """\
seq  time                      digest        changes
  1  2023-11-14T22:13:20.000Z  {digests[0]}  first policy: 2 plans, 1 tenant, 0 routes
  2  2023-11-14T22:14:20.000Z  {digests[1]}  plan pro: concurrency 50 -> 20 (1 tenant)
                                             globex: added (plan free)
                                             acme: rate 100/second -> 500/second
                                             history none -> record.jsonl
  3  2023-11-14T22:15:20.000Z  {digests[2]}  nothing but the text
  4  2023-11-14T22:16:20.000Z  {digests[3]}  t0: added (plan free)
                                             t1: added (plan free)
                                             t2: added (plan free)
                                             t3: added (plan free)
                                             ... and 3 more
last hash: {hash}
"""


@pytest.mark.parametrize("which", ["seawall.yaml", "record.jsonl", None])
def test_the_record_is_a_table_with_the_newest_last(which: str | None, recorded: Path) -> None:
    made = json.loads(invoke("history", "--format", "json").stdout)["records"]
    result = invoke("history", *([which] if which else []))
    assert (result.exit_code, result.stderr) == (0, "")
    digests = [one["digest"][:12] for one in made]
    assert result.stdout == TABLE.format(digests=digests, hash=made[-1]["hash"])


def test_a_record_may_have_any_name(recorded: Path) -> None:
    other = recorded.with_name("changes")
    recorded.with_name("record.jsonl").rename(other)
    assert invoke("history", "changes", "-n", "1").stdout.count("added") == 4


def test_the_last_few_are_shown_and_all_are_verified(recorded: Path) -> None:
    result = invoke("history", "-n", "2")
    assert [line.split()[0] for line in result.stdout.splitlines()[:3]] == ["seq", "3", "4"]
    record = recorded.with_name("record.jsonl")
    record.write_text(record.read_text().replace("first policy", "fist policy"))
    result = invoke("history", "-n", "2")
    assert result.exit_code == 1
    assert (
        result.stderr
        == "seawall: record.jsonl is not as it was written, line 2: it was not written after line 1 as it is now\n"
    )
    assert result.stdout.splitlines()[1].startswith("  3")


def test_json_has_every_change_and_what_is_wrong(recorded: Path) -> None:
    record = recorded.with_name("record.jsonl")
    lines = record.read_bytes().splitlines(keepends=True)
    record.write_bytes(b"".join([*lines[:2], *lines[3:]]))
    result = invoke("history", "--format", "json")
    assert result.exit_code == 1
    told = json.loads(result.stdout)
    assert told["problem"] == {"line": 3, "text": "this is record 4, and record 3 belongs here"}
    assert told["file"] == "record.jsonl"
    assert [one["seq"] for one in told["records"]] == [1, 2, 4]
    assert len(told["records"][-1]["diff"]) == 7
    assert len(told["records"][-1]["hash"]) == 64


def test_a_configuration_without_a_history_says_how_to_switch_it_on(here: Path) -> None:
    result = invoke("history", "new.yaml")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "new.yaml keeps no history; write 'history: seawall.history.jsonl' into it" in result.stderr


def test_the_record_lies_beside_the_configuration_that_names_it(
    recorded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    below = recorded.parent / "below"
    below.mkdir()
    monkeypatch.chdir(below)
    assert invoke("history", "../seawall.yaml").exit_code == 0


def test_a_record_that_is_not_there_yet_is_2(recorded: Path) -> None:
    recorded.with_name("record.jsonl").unlink()
    result = invoke("history")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == (
        "seawall: record.jsonl is not there; it is written when a service with this configuration starts\n"
    )


def test_a_record_without_a_line_is_no_change(here: Path) -> None:
    (here / "record.jsonl").touch()
    result = invoke("history", "record.jsonl")
    assert (result.exit_code, result.stdout) == (0, "no change is recorded yet\n")


def test_a_configuration_that_is_wrong_is_2(here: Path) -> None:
    (here / "new.yaml").write_text("version: 2", encoding="utf-8")
    result = invoke("history", "new.yaml")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "new.yaml:1:10: error" in result.stderr


@pytest.mark.parametrize("arguments", [["nowhere.yaml"], ["nowhere.jsonl"], ["."], ["-n", "0"], ["a", "b"]])
def test_what_cannot_be_read_is_2(arguments: list[str], here: Path) -> None:
    (here / "directory.jsonl").mkdir()
    for given in (arguments, ["directory.jsonl"]):
        result = invoke("history", *given)
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr


def test_nothing_in_a_record_is_obeyed_by_the_terminal(recorded: Path) -> None:
    record = recorded.with_name("record.jsonl")
    record.write_text(record.read_text().replace("first policy", "\\u001b[2J\\ud800").replace("2023-", "\\u001b[2J"))
    result = invoke("history")
    assert "\\x1b[2J\\ud800: 2 plans" in result.stdout
    assert "\x1b" not in result.stdout + result.stderr


@pytest.mark.skipif(os.name == "nt", reason="no such modes")
@pytest.mark.parametrize("name", ["record.jsonl", "seawall.yaml"])
def test_a_file_one_may_not_read_is_2(name: str, recorded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(verb, "read", refused)
    result = invoke("history", name)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "seawall: record.jsonl cannot be read: Permission denied\n"


# The page


@pytest.mark.parametrize(
    ("sentence", "value"),
    [
        (r"when its content has stayed as it is for (\d+) ms", watch._SETTLES * 1_000),
        (r"\*\*When\*\*: every (\d+) s, or as `reload` says", Policy().reload_ns),
        (r"so is what befalls more than (five) tenants alike", MANY),
        (r"the differences in words, at most ([\d,]+)", MOST),
        (r"of API keys the first (\d+) digits of their hashes", len(differences._digits(bytes(32)))),
    ],
)
def test_a_number_of_the_page_is_the_code_s(sentence: str, value: float) -> None:
    """Its commands are run by test_docs.py."""
    text = " ".join((ROOT / "docs" / "policy-changes.md").read_text(encoding="utf-8").split())
    found = re.search(sentence, text)
    assert found is not None
    said = 5 if found[1] == "five" else int(found[1].replace(",", ""))
    assert said == value / (SECOND if "reload" in sentence else 1)
