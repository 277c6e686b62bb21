"""YAML as data with positions: what is read, what is refused, and that both of PyYAML's parsers agree."""

from __future__ import annotations

import time
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from seawall.config import document
from seawall.config.document import MAX_DEPTH, PURE_PARSER, Document, Items, Map, adopt, expand, plain, read

REFERENCE = (Path(__file__).parent / "data" / "seawall.yaml").read_text()


def parsed(text: str, **environment: str) -> Any:
    found = read(text, "x.yaml", environment)
    assert found.problems == []
    return found.root


def codes(text: str, **environment: str) -> list[tuple[str, int, int]]:
    return [(p.code, p.line, p.column) for p in read(text, "x.yaml", environment).problems]


def message(text: str) -> str:
    return read(text, "x.yaml", {}).problems[0].message


def positions(node: Any) -> Any:
    """A tree with everything a reader knows, for comparison."""
    if isinstance(node, Map):
        return {key: (node.marks[key], positions(value)) for key, value in node.items()}
    if isinstance(node, Items):
        return [(mark, positions(value)) for mark, value in zip(node.marks, node, strict=True)]
    return (type(node), node if node == node else "nan")


def same(text: str) -> None:
    fast, pure = read(text, "x", {}), read(text, "x", {}, parser=PURE_PARSER)
    assert fast.complete == pure.complete
    assert [p.code for p in fast.problems] == [p.code for p in pure.problems]
    if fast.complete:
        assert positions(fast.root) == positions(pure.root)
        assert fast.problems == pure.problems


def test_both_parsers_read_the_reference_alike() -> None:
    same(REFERENCE)


@given(
    st.recursive(
        st.one_of(st.text(max_size=8), st.integers(), st.booleans(), st.none(), st.floats(allow_nan=False)),
        lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
        max_leaves=8,
    ),
    st.sampled_from([None, True, False]),
)
def test_both_parsers_read_any_tree_alike(tree: Any, flow: bool | None) -> None:
    same(yaml.safe_dump(tree, default_flow_style=flow, allow_unicode=True))


def test_without_libyaml_the_parser_in_python_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "yaml.cyaml", None)
    monkeypatch.delattr(yaml, "cyaml", raising=False)
    assert document._fastest() is PURE_PARSER


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"),
        ("on", "on"),
        ("y", "y"),
        ("off", "off"),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("10", 10),
        ("-1_000", -1000),
        ("007", 7),
        ("0o17", 15),
        ("0x1f", 31),
        ("1.5", 1.5),
        ("1e3", 1000.0),
        (".inf", float("inf")),
        ("-.INF", float("-inf")),
        ("1_000/day", "1_000/day"),
        ("2027-06-30", "2027-06-30"),
        ("10:30", "10:30"),
        ("1__0", "1__0"),
        ("9" * 5000, "9" * 5000),
    ],
)
def test_a_plain_scalar_is_what_yaml_1_2_says(text: str, value: object) -> None:
    assert plain(text) == value
    assert type(plain(text)) is type(value)


def test_not_a_number_is_read() -> None:
    found = plain(".nan")
    assert isinstance(found, float)
    assert found != found


def test_quoted_scalars_and_keys_are_always_text() -> None:
    assert parsed("no: '1'\n1: \"true\"\ntrue: 'null'\n") == {"no": "1", "1": "true", "true": "null"}


def test_a_document_may_begin_with_dashes_and_a_version() -> None:
    assert parsed("%YAML 1.2\n---\na: 1\n...\n") == {"a": 1}


def test_a_duplicate_key_is_reported_at_the_second_with_the_line_of_the_first() -> None:
    found = read("a: 1\nb: {c: 1}\na: {x: 1, x: 2}\n", "f.yaml", {})
    assert [(p.message.split("'")[1], p.line, p.column) for p in found.problems] == [("a", 3, 1), ("x", 3, 11)]
    assert found.problems[0].message == "duplicate key 'a' (first at line 1)"
    assert found.problems[1].path == "a.x"
    assert found.root == {"a": 1, "b": {"c": 1}}
    assert found.complete


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: &x 1\n", [("E003", 1, 4)]),
        ("a: &x {b: 1}\nc: *x\n", [("E003", 1, 4), ("E003", 2, 4)]),
        ("a: !!str 1\n", [("E003", 1, 4)]),
        ("a: ! x\n", [("E003", 1, 4)]),
        ("a: !x [1]\n", [("E003", 1, 4)]),
        ("<<: {a: 1}\n", [("E003", 1, 1)]),
        ("a: 1\n---\nb: 1\n", [("E003", 2, 1)]),
        ("%TAG ! tag:x,2000:\n---\na: 1\n", [("E003", 1, 1)]),
        ("[a]: 1\n", [("E003", 1, 1)]),
        ("? {a: 1}\n: 1\n", [("E003", 1, 3)]),
        ("a: &x 1\n*x : 1\n", [("E003", 1, 4), ("E003", 2, 1)]),
    ],
)
def test_what_makes_yaml_surprising_is_refused(text: str, expected: list[tuple[str, int, int]]) -> None:
    assert codes(text) == expected


def test_a_quoted_merge_key_is_a_name() -> None:
    assert parsed("'<<': 1\n") == {"<<": 1}


def test_a_file_full_of_anchors_is_not_read_to_its_end() -> None:
    found = read("".join(f"k{n}: &a{n} 1\n" for n in range(1000)), "x", {})
    assert len(found.problems) == 20
    assert not found.complete


def test_a_bomb_is_refused_at_once() -> None:
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30)]
    begun = time.perf_counter()
    found = read("\n".join(levels), "bomb.yaml", {})
    assert time.perf_counter() - begun < 0.5
    assert not found.complete
    assert {problem.code for problem in found.problems} == {"E003"}


@pytest.mark.parametrize("bracket", ["[", "{a: ", "- "])
def test_deep_nesting_is_refused_before_it_is_built(bracket: str) -> None:
    begun = time.perf_counter()
    found = read(bracket * 100_000, "deep.yaml", {})
    assert time.perf_counter() - begun < 1.0
    assert [p.code for p in found.problems] in (["E004"], ["E002"])


def test_as_many_levels_as_allowed_are_read() -> None:
    assert parsed("[" * MAX_DEPTH + "1" + "]" * MAX_DEPTH)
    assert codes("[" * (MAX_DEPTH + 1) + "1" + "]" * (MAX_DEPTH + 1)) == [("E004", 1, MAX_DEPTH + 1)]


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("a:\n\t- b\n", 2, "tabs cannot indent; use spaces"),
        ("a: b: c\n", 1, "no ':' is expected here"),
        ("a: {b: 1\nc: 2\n", 2, "a ',' or '}' is missing"),
        ("a: [b\nc: 2\n", 2, "a ',' or ']' is missing"),
        ("a: 'b\n", 2, "a quote or bracket is never closed"),
        ("a:\n  b: 1\n c: 2\n", 3, "this line does not fit the indentation above it"),
        ("a:\n  - 1\n  b: 2\n", 3, "this line does not fit the indentation"),
        ("a: @b\n", 1, "this character needs quotes"),
        ('a: "\\q"\n', 1, "unknown escape after the backslash"),
        ("a: 1\nb\nc: 1\n", 3, "a ':' is missing after this key"),
        ("a: %\n", 1, "this character needs quotes"),
    ],
)
def test_broken_yaml_is_said_in_plain_words_at_its_line(text: str, line: int, words: str) -> None:
    for parser in (None, PURE_PARSER):
        found = read(text, "x", {}, parser=parser)
        (problem,) = found.problems
        assert problem.code == "E002"
        assert problem.message.startswith("not YAML: ")
        assert words in problem.message
        assert not found.complete
    assert read(text, "x", {}).problems[0].line == line


@pytest.mark.parametrize("character", ["\0", "\x07", "\x1b", "\x85", "\u2028", "\ufeff", "\ufffe", "\ud800"])
def test_control_characters_and_hidden_line_breaks_are_refused_where_they_are(character: str) -> None:
    assert codes(f"a: 1\r\nb: 2\nccc: {character}") == [("E005", 3, 6)]


def test_blank_values_are_reported_at_their_key() -> None:
    text = "a:\nb: ''\nc: [1, '', ~]\nd: {e: , f: 1}\n"
    assert codes(text) == [("E012", 1, 1), ("E012", 2, 1), ("E012", 3, 8), ("E012", 3, 12), ("E012", 4, 5)]
    assert message("a:") == "'a' is blank; give it a value, or remove it"
    assert message("a: ['']") == "an entry of the list is blank; give it a value, or remove it"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("$A", "$A"),
        ("${A}", "one"),
        ("x${A}y${B}z", "xoney2z"),
        ("$${A}", "${A}"),
        ("$$", "$"),
        ("$$$$", "$$"),
        ("${EMPTY}", ""),
        ("${EMPTY:-default}", "default"),
        ("${NONE:-}", ""),
        ("${NONE:-a b:c/d}", "a b:c/d"),
        ("${AGAIN}", "${A}"),
        ("100$", "100$"),
    ],
)
def test_variables_are_replaced_once(text: str, value: str) -> None:
    assert expand(text, {"A": "one", "B": "2", "EMPTY": "", "AGAIN": "${A}"}) == value


@pytest.mark.parametrize("text", ["${NONE}", "${}", "${1A}", "${A", "${A:-${B}}", "${A-b}", "${ A }"])
def test_what_is_no_variable_is_refused(text: str) -> None:
    with pytest.raises(document.VariableError):
        expand(text, {"A": "x", "B": "y"})


def test_variables_stay_text_and_are_not_replaced_in_keys() -> None:
    assert parsed('${A}: ${A}\nb: [x, "${A}"]\n', A="5") == {"${A}": "5", "b": ["x", "5"]}


def test_an_undefined_variable_is_reported_where_it_stands() -> None:
    found = read("a:\n  b: [x, '${GONE}']\n", "x", {})
    assert [(p.code, p.line, p.column, p.path) for p in found.problems] == [("E051", 2, 10, "a.b[1]")]
    assert "'GONE'" in found.problems[0].message
    found.report("E014", "anything else about it", ("a", "b", 1))
    assert len(found.problems) == 1


def test_a_variable_that_is_empty_makes_a_blank_value() -> None:
    assert codes("a: ${E}\n", E="") == [("E012", 1, 1)]
    assert codes("- ${E}\n", E="") == [("E012", 1, 3)]


def test_a_document_knows_what_was_written_for_a_value() -> None:
    found = read("a: {b: ['${X}', y]}\na: 1", "x", {"X": "secret"})
    assert found.written(("a", "b", 0)) == "${X}"
    assert found.written(("a", "b", 1)) is None
    assert found.written(("a", "nope", 1)) is None
    assert read("a: 1", "x", {}).written(("a",)) is None


def test_a_place_that_was_not_written_is_that_of_the_nearest_thing() -> None:
    found = read("a:\n  b:\n    - {c: 1}\n", "x", {})
    for path, line, column in [
        ((), 1, 1),
        (("a", "b", 0, "c"), 3, 11),
        (("a", "b", 0, "d"), 3, 7),
        (("a", "b", 7), 3, 5),
        (("z",), 1, 1),
    ]:
        found.problems.clear()
        found.report("E011", "missing", path)
        assert [(p.line, p.column) for p in found.problems] == [(line, column)]
    assert found.line(("a", "b")) == 2
    assert Document("m").line(("a",)) == 0


def test_after_a_thousand_mistakes_the_rest_is_counted() -> None:
    found = read("a: {}\n", "x", {})
    for _ in range(1500):
        found.report("E014", "again")
    assert (len(found.problems), found.dropped) == (1000, 500)


def test_a_mapping_given_in_python_is_held_to_the_same_rules() -> None:
    found = adopt(
        {"a": (1, "${X}"), 5: True, "d": date(2027, 6, 30), "t": datetime(2027, 6, 30, tzinfo=UTC), "s": "$$"},
        "m",
        {"X": "x"},
    )
    assert found.problems == []
    assert found.root == {"a": [1, "x"], "5": True, "d": "2027-06-30", "t": "2027-06-30T00:00:00+00:00", "s": "$"}
    assert found.written(("a", 1)) == "${X}"


@pytest.mark.parametrize(
    ("mapping", "code", "path"),
    [
        ({"a": None}, "E012", "a"),
        ({"a": [""]}, "E012", "a[0]"),
        ({"a": "${E}"}, "E012", "a"),
        ({"a": "${GONE}"}, "E051", "a"),
        ({"a": {(): 1}}, "E003", "a"),
        ({True: 1}, "E003", ""),
        ({"a": object()}, "E013", "a"),
        ({"a": b"x"}, "E013", "a"),
        ({"a": 10**5000}, "E014", "a"),
        ({1: 1, "1": 2}, "E001", "1"),
    ],
)
def test_what_a_mapping_in_python_must_not_hold(mapping: dict[Any, Any], code: str, path: str) -> None:
    assert [(code, path, 0)] == [(p.code, p.path, p.line) for p in adopt(mapping, "m", {"E": ""}).problems]


def test_a_mapping_that_contains_itself_is_too_deep() -> None:
    mapping: dict[str, Any] = {}
    mapping["a"] = mapping
    found = adopt(mapping, "m", {})
    assert [p.code for p in found.problems] == ["E004"]
    assert not found.complete
