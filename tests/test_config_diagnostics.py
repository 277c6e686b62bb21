"""How mistakes read: in a terminal, in JSON, in a GitHub check."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seawall import config, notation
from seawall.config import CODES, ConfigError, Diagnostic, render
from seawall.config.diagnostics import printable, snippet


def diagnostic(message: str = "no", *, source: str | None = None, column: int = 1, code: str = "E014") -> Diagnostic:
    return Diagnostic("f.yaml", 7, column, "error", code, message, "a.b", source)


def test_a_mistake_is_shown_with_its_line_and_a_caret() -> None:
    assert str(diagnostic(source="  a: {b: 5}", column=10)) == (
        "f.yaml:7:10: error[E014]: no\n    7 |   a: {b: 5}\n      |          ^ a.b"
    )


def test_a_mistake_that_its_message_locates_has_no_line() -> None:
    assert str(diagnostic(source="a: 1", code="E010")) == "f.yaml:7:1: error[E010]: no"


def test_a_mistake_without_a_line_to_show_says_its_path() -> None:
    assert str(diagnostic()) == "f.yaml:7:1: error[E014]: no (a.b)"
    assert str(Diagnostic("f.yaml", 0, 0, "error", "E000", "gone")) == "f.yaml: error[E000]: gone"


def test_the_text_of_the_error_is_all_mistakes() -> None:
    found = (diagnostic("one"), diagnostic("two"))
    assert str(ConfigError(found)) == f"{found[0]}\n{found[1]}"
    assert ConfigError(found).diagnostics == found


def test_a_tab_before_the_caret_does_not_move_it() -> None:
    assert snippet("\ta: 5", 5) == (" a: 5", 4)


@pytest.mark.parametrize("column", [1, 30, 500, 980, 1000])
def test_a_long_line_is_cut_around_its_caret(column: int) -> None:
    source = "".join(chr(ord("a") + n % 26) for n in range(1000))
    shown, caret = snippet(source, column)
    assert len(shown) == 120
    assert shown[caret] == source[column - 1]
    assert ("..." in shown[:3], "..." in shown[-3:]) == (column > 60, column < 940)


@given(st.text(max_size=300), st.integers(1, 310), st.text(max_size=50))
def test_nothing_that_a_terminal_obeys_is_ever_shown(source: str, column: int, message: str) -> None:
    found = Diagnostic("f\x1b.yaml", 1, column, "error", "E014", message, message, source)
    for line in str(found).split("\n"):
        assert re.search(r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]", line) is None
    assert str(found).count("\n") <= 2
    github = render([found], "github")
    assert re.search(r"[\x00-\x1f\x7f]", github) is None


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", "plain"),
        ("ünï", "ünï"),
        ("a\tb", "a\\tb"),
        ("\x1b[2J", "\\x1b[2J"),
        ("\u202e", "\\u202e"),
        ("\ud800", "\\ud800"),
        ("\U000e0001", "\\U000e0001"),
    ],
)
def test_control_characters_are_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_json_has_every_field() -> None:
    (found,) = json.loads(render([diagnostic(source="a: 1")], "json"))
    assert found == {
        "file": "f.yaml",
        "line": 7,
        "column": 1,
        "severity": "error",
        "code": "E014",
        "message": "no",
        "path": "a.b",
        "source": "a: 1",
        "unreadable": False,
    }


def test_github_gets_one_command_a_mistake() -> None:
    found = Diagnostic("a,b:c%.yaml", 3, 4, "warning", "W001", "50% of\nit: x, y", "a.b")
    title = CODES["W001"].replace(",", "%2C")
    assert render([found], "github") == (
        f"::warning file=a%2Cb%3Ac%25.yaml,line=3,col=4,title=W001%3A {title}::50%25 of\\x0ait: x, y (a.b)"
    )
    nowhere = Diagnostic("f.yaml", 0, 0, "error", "E000", "gone")
    assert render([nowhere], "github").startswith("::error file=f.yaml,title=E000%3A ")


def test_every_code_has_a_meaning_and_every_meaning_a_use() -> None:
    sources = [*Path(config.__file__).parent.glob("*.py"), Path(notation.__file__)]
    text = "".join(path.read_text() for path in sources if path.name != "diagnostics.py")
    assert set(re.findall(r'"([EW][0-9]{3})"', text)) == set(CODES)


def test_json_of_many_mistakes_in_one_long_line_stays_small() -> None:
    line = "x" * 100_000
    mistakes = [Diagnostic("a.yaml", 1, 50_000, "error", "E020", "bad", source=line) for _ in range(100)]
    assert len(render(mistakes, "json")) < 100_000
    assert all(len(each["source"]) <= 120 for each in json.loads(render(mistakes, "json")))
