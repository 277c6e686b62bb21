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
    arms = refined.get("anyOf") or refined.get("oneOf")
    if isinstance(arms, list) and arms:
        refined.pop("oneOf", None)
        left = [arm for arm in arms if arm != {"type": "null"}]
        refined.pop("anyOf", None)
        if len(left) == 1:
            refined = {**left[0], **refined}
        else:
            refined["anyOf"] = left
    if "default" in refined and refined["default"] is None:
        del refined["default"]
    if refined.get("type") == "string":
        if isinstance(refined.get("pattern"), str):
            refined["pattern"] = f"{refined['pattern']}|{_VARIABLE}"
        if isinstance(refined.get("enum"), list):
            choices = {"type": "string", "enum": refined.pop("enum")}
            refined["anyOf"] = [choices, {"type": "string", "pattern": _VARIABLE}]
    return refined
