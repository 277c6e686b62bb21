"""The language as a JSON Schema, for completion and hover in editors (`# yaml-language-server: $schema=...`)."""

from __future__ import annotations

from typing import Any

from seawall.config.schema import File

_VARIABLE = r"\$\{"


def json_schema() -> dict[str, Any]:
    """JSON Schema, draft 2020-12, of a configuration file. What only `check` can see (references) is not in it."""
    schema = _refined(File.model_json_schema())
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "Seawall configuration"}


def _refined(node: Any) -> Any:
    """``node`` without null, which is never a value here, and with ``${VARIABLES}`` allowed wherever text is."""
    if isinstance(node, list):
        return [_refined(item) for item in node]
    if not isinstance(node, dict):
        return node
    refined = {key: _refined(value) for key, value in node.items()}
    if isinstance(refined.get("default"), dict | list | None):
        # A whole section as a default says less than the descriptions of its keys.
        refined.pop("default", None)
    if "patternProperties" in refined:
        refined["additionalProperties"] = False
    arms = refined.pop("anyOf", None) or refined.pop("oneOf", None)
    if arms is not None:
        left = [arm for arm in arms if arm != {"type": "null"}]
        return {**left[0], **refined} if len(left) == 1 else {**refined, "anyOf": left}
    if refined.get("type") == "string":
        if "pattern" in refined:
            refined["pattern"] += f"|{_VARIABLE}"
        if "enum" in refined:
            refined["anyOf"] = [{"enum": refined.pop("enum")}, {"pattern": _VARIABLE}]
    return refined
