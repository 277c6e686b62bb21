"""The JSON Schema that editors use."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from seawall.config import json_schema, loads
from seawall.config.document import read

REFERENCE = (Path(__file__).parent / "data" / "seawall.yaml").read_text()
SCHEMA = json_schema()
TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,), "array": (list,), "string": (str,), "integer": (int,), "boolean": (bool,),
}  # fmt: skip


def faults(value: Any, schema: dict[str, Any], path: str = "") -> Iterator[str]:
    """The parts of JSON Schema that ours uses: enough to hold a file against it without a dependency."""
    known = {
        "$ref", "$defs", "$schema", "title", "description", "examples", "default", "type", "properties", "required",
        "additionalProperties", "patternProperties", "propertyNames", "items", "minItems", "maxItems", "anyOf", "enum",
        "const", "pattern", "minLength", "minimum", "maximum", "minProperties", "maxProperties",
    }  # fmt: skip
    assert set(schema) <= known, set(schema) - known
    if "$ref" in schema:
        yield from faults(value, SCHEMA["$defs"][schema["$ref"].removeprefix("#/$defs/")], path)
    if "anyOf" in schema and all(list(faults(value, arm, path)) for arm in schema["anyOf"]):
        yield f"{path}: none of anyOf"
    if "type" in schema:
        right = isinstance(value, TYPES[schema["type"]]) and (
            schema["type"] != "integer" or not isinstance(value, bool)
        )
        if not right:
            yield f"{path}: not {schema['type']}"
            return
    if ("enum" in schema and value not in schema["enum"]) or ("const" in schema and value != schema["const"]):
        yield f"{path}: not one of {schema.get('enum', schema.get('const'))}"
    if isinstance(value, str) and "pattern" in schema and not re.search(schema["pattern"], value):
        yield f"{path}: {value} unlike {schema['pattern']}"
    if isinstance(value, int) and not schema.get("minimum", value) <= value <= schema.get("maximum", value):
        yield f"{path}: out of range"
    if isinstance(value, str | list | dict):
        least = max(schema.get(key, 0) for key in ("minLength", "minItems", "minProperties"))
        if not least <= len(value) <= min(schema.get(key, len(value)) for key in ("maxItems", "maxProperties")):
            yield f"{path}: wrong length"
    if isinstance(value, dict):
        yield from (f"{path}: {key} is missing" for key in schema.get("required", ()) if key not in value)
        for key, inner in value.items():
            yield from faults_of_entry(key, inner, schema, f"{path}.{key}")
    if isinstance(value, list) and "items" in schema:
        for index, inner in enumerate(value):
            yield from faults(inner, schema["items"], f"{path}[{index}]")


def faults_of_entry(key: str, value: Any, schema: dict[str, Any], path: str) -> Iterator[str]:
    if key in schema.get("properties", {}):
        yield from faults(value, schema["properties"][key], path)
        return
    for pattern, inner in schema.get("patternProperties", {}).items():
        if re.search(pattern, key):
            yield from faults(value, inner, path)
            return
    if schema.get("additionalProperties") is False:
        yield f"{path}: unknown"
    elif isinstance(schema.get("additionalProperties"), dict):
        yield from faults(value, schema["additionalProperties"], path)


def data(text: str) -> Any:
    return json.loads(json.dumps(read(text, "x", {"A": "x"}).root))


def test_the_reference_is_valid_by_the_schema() -> None:
    assert list(faults(data(REFERENCE), SCHEMA)) == []


def test_the_reference_is_valid_by_the_schema_for_jsonschema() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.Draft202012Validator(SCHEMA).validate(data(REFERENCE))


@pytest.mark.parametrize(
    "text",
    [
        "version: 2",
        "{}",
        "version: 1\nmod: off",
        "version: 1\nmode: of",
        "version: 1\nplans: {Big: {}}",
        "version: 1\nplans: {p: {rate: 5}}",
        "version: 1\nplans: {p: {rate: fast}}",
        "version: 1\nplans: {p: {quota: 5/hour}}",
        "version: 1\nplans: {p: {concurrency: 0}}",
        "version: 1\nplans: {p: {concurrency: true}}",
        "version: 1\nroutes: [{name: a}]",
        "version: 1\nroutes: [{name: a, match: {path: a}}]",
        "version: 1\ntenants: {a: {keys: [secret]}}",
        "version: 1\nreload: 5",
    ],
)
def test_what_check_refuses_by_its_shape_the_schema_refuses_too(text: str) -> None:
    assert list(faults(data(text), SCHEMA))
    with pytest.raises(ValueError, match="error"):
        loads(text)


@pytest.mark.parametrize(
    "text",
    [
        "version: 1\nmode: ${MODE:-off}",
        "version: 1\nplans: {p: {rate: '${A}', quota: '${A}'}}\nreload: ${A}",
        "version: 1\nplans: {p: {rate: 10 per 15 minutes; 5/day}}",
        "version: 1\nplans: {p: {rate: [unlimited, {limit: 1_000/ms, burst: 5}]}}",
        "version: 1\nreload: off",
        "version: 1\nmetrics: {tenant_label: off}",
    ],
)
def test_what_is_allowed_is_allowed_by_the_schema(text: str) -> None:
    assert (
        list(faults(yaml.load(text, yaml.BaseLoader) and yaml.safe_load(text.replace(": off", ": 'off'")), SCHEMA))
        == []
    )


def keys(schema: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(schema, dict):
        for name, value in schema.get("properties", {}).items() if isinstance(schema.get("properties"), dict) else ():
            yield f"{path}.{name}", value
        for name, value in schema.items():
            yield from keys(value, f"{path}.{name}")
    elif isinstance(schema, list):
        for item in schema:
            yield from keys(item, path)


def test_every_key_has_a_title_and_a_description() -> None:
    found = list(keys(SCHEMA))
    assert len(found) > 70
    for path, key in found:
        described = {**SCHEMA["$defs"].get(key.get("$ref", "").removeprefix("#/$defs/"), {}), **key}
        assert described.get("title"), path
        assert described.get("description"), path


def test_null_is_nowhere_a_value() -> None:
    assert "null" not in json.dumps(SCHEMA)
    assert "\\u0000" not in json.dumps(SCHEMA)


def test_the_schema_says_which_draft_it_is() -> None:
    assert SCHEMA["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert list(SCHEMA["properties"])[:2] == ["version", "mode"]
