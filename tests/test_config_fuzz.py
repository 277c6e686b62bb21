"""Whatever a file holds, the answer is a policy or a list of mistakes (T3)."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from seawall.config import ConfigError, Format, load, load_mapping, loads
from seawall.config.document import Items, Map, read
from seawall.config.loading import Report, check_mapping, check_text
from seawall.config.schema import File
from seawall.policy import Policy

REFERENCE = (Path(__file__).parent / "data" / "seawall.yaml").read_text()
LINES = REFERENCE.splitlines(keepends=True)
FORMS: tuple[Format, ...] = ("text", "json", "github")
BITS = ["", ":", "- ", "{", "}", "[", "]", "&a ", "*a", "!!int ", "'", '"', "\t", "\0", "\n", "  ", "null", "5", "-1"]
BITS += ["${X}", "é", "10/second", "|", ">", "#", "? ", ",", "%", "@", "`", "\ud800", "\ufeff", "---", "<<: "]
BITS += ["9" * 50, "1e999"]


def settles(report: Report) -> None:
    """Either a policy or errors, and all of it can be shown in every form."""
    assert (report.policy is None) == bool(report.errors)
    for form in FORMS:
        assert isinstance(report.render(form), str)


@given(st.integers(0, len(REFERENCE)), st.integers(0, 40), st.sampled_from(BITS))
def test_a_mutated_reference_is_a_policy_or_mistakes(at: int, length: int, bit: str) -> None:
    settles(check_text(REFERENCE[:at] + bit + REFERENCE[at + length :], "f.yaml", None))


@given(
    st.lists(
        st.tuples(st.integers(0, len(LINES) - 1), st.sampled_from(["drop", "double", "indent", "dedent"])), max_size=6
    )
)
def test_a_reference_with_moved_lines_is_a_policy_or_mistakes(changes: list[tuple[int, str]]) -> None:
    lines = list(LINES)
    for index, change in changes:
        line = lines[index]
        lines[index] = {"drop": "", "double": line * 2, "indent": f"  {line}", "dedent": line.removeprefix("  ")}[
            change
        ]
    settles(check_text("".join(lines), "f.yaml", None))


def test_every_truncation_of_the_reference_is_a_policy_or_mistakes() -> None:
    for end in range(0, len(REFERENCE), 23):
        settles(check_text(REFERENCE[:end], "f.yaml", None))


@given(st.binary(max_size=400))
def test_random_bytes_are_mistakes(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "random.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError):
        load(path)


words = st.sampled_from(sorted({key for line in LINES for key in line.replace(":", " ").split()} | set(BITS)))
leaves = st.one_of(words, st.text(max_size=6), st.integers(), st.booleans(), st.none(), st.floats())
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.one_of(words, st.sampled_from(list(File.model_fields))), inner, max_size=4),
    ),
    max_leaves=12,
)
sections = st.fixed_dictionaries(
    {"version": st.just(1)}, optional={name: trees for name in File.model_fields if name != "version"}
)


@given(sections)
@example({"version": 1, "reload": "\ud800"})
def test_a_random_tree_is_a_policy_or_mistakes(tree: dict[str, Any]) -> None:
    settles(check_mapping(tree))
    try:
        text = yaml.safe_dump(tree, allow_unicode=True)
    except (ValueError, yaml.YAMLError):
        return
    settles(check_text(text, "f.yaml", None))


@given(st.data())
def test_a_reference_with_one_value_replaced_is_a_policy_or_mistakes(data: st.DataObject) -> None:
    tree = yaml.safe_load(REFERENCE)
    node: Any = tree
    while True:
        steps = list(node) if isinstance(node, dict) else list(range(len(node)))
        step = data.draw(st.sampled_from(steps))
        if not isinstance(node[step], dict | list) or not node[step] or data.draw(st.integers(0, 3)) == 0:
            break
        node = node[step]
    node[step] = data.draw(trees)
    settles(check_mapping(tree))


def places(node: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    for step, value in node.items() if isinstance(node, Map) else enumerate(node):
        yield (*path, step)
        if isinstance(value, Map | Items):
            yield from places(value, (*path, step))


ROOT = read(REFERENCE, "x", {}).root


@pytest.mark.parametrize("path", list(places(ROOT)), ids=str)
def test_a_blank_field_is_an_error_and_not_a_crash(path: tuple[str | int, ...]) -> None:
    for blank in (None, ""):
        tree = yaml.safe_load(REFERENCE.replace("expires: 2027-06-30", "expires: '2027-06-30'"))
        node: Any = tree
        for step in path[:-1]:
            node = node[step]
        node[path[-1]] = blank
        for report in (check_mapping(tree), check_text(yaml.safe_dump(tree, sort_keys=False), "f.yaml", None)):
            assert report.policy is None
            assert "E012" in {found.code for found in report.errors}


@pytest.mark.parametrize("number", range(len(LINES)))
def test_a_line_blanked_after_its_colon_is_an_error_or_empty_anyway(number: int) -> None:
    line = LINES[number]
    key, colon, rest = line.partition(": ")
    if not colon or not rest.split("#")[0].strip() or line.lstrip().startswith("#"):
        return
    text = "".join([*LINES[:number], f"{key}:\n", *LINES[number + 1 :]])
    settles(check_text(text, "f.yaml", None))
    with pytest.raises(ConfigError):
        loads(text)


def test_ten_times_the_reference_is_mistakes() -> None:
    report = check_text(REFERENCE * 10, "f.yaml", None)
    assert {found.code for found in report.errors} == {"E001"}
    settles(report)


def test_shuffled_lines_are_a_policy_or_mistakes() -> None:
    shuffle = random.Random(1)
    for _ in range(50):
        settles(check_text("".join(shuffle.sample(LINES, len(LINES))), "f.yaml", None))


@given(st.one_of(st.none(), st.integers(), st.text(), st.lists(leaves, max_size=3), trees))
def test_what_is_no_mapping_is_mistakes(value: Any) -> None:
    try:
        found = load_mapping(value)
    except ConfigError:
        return
    assert isinstance(found, Policy)
