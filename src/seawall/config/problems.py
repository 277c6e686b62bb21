"""What pydantic found wrong, said at the place in the file and in words that help.

Pydantic gives a location in the data, a type and the value. The words are ours: its own quote values that may be
secret, name Python types, and know no suggestions.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from seawall.config.document import Document, Path
from seawall.notation import shorten, suggestion

_EXPECTED = {
    "string_type": "text",
    "int_type": "a whole number",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
}
_ARMS = {"text": "text", "mapping": "a mapping", "list": "a list"}
_ARM = re.compile("(text|mapping|list)'")
_KEY_OF_A_KEY = "[key]"
"""What pydantic ends a location with when the key itself is wrong."""


_Model = TypeVar("_Model", bound=BaseModel)


def validate(document: Document, model: type[_Model]) -> _Model | None:
    """``document`` as ``model``, or ``None`` after everything wrong with it has been noted in the document."""
    try:
        return model.model_validate(document.root)
    except ValidationError as error:
        for details in error.errors(include_url=False):
            if document.full:
                # Suggestions cost more than everything else: a hostile file must not keep a reload busy for minutes.
                document.dropped += 1
            else:
                _note(document, model, details)
        return None


def _note(document: Document, model: type[BaseModel], details: ErrorDetails) -> None:
    kind, value, context = details["type"], details["input"], details.get("ctx", {})
    path: Path = tuple(step for step in details["loc"] if not (isinstance(step, str) and step.startswith("\0")))
    at_key = len(path) > 1 and path[-1] == _KEY_OF_A_KEY and path[-2] == value
    if at_key:
        path = path[:-1]
    elif value is None or value == "" or (kind == "seawall" and _has_blanks(value)):
        return None  # the reader has said that it is blank
    expected = ""
    if kind == "seawall":
        code, message, expected = context["code"], context["message"], context["expected"]
        if context["at"]:
            path = (*path, context["at"])
    elif kind == "extra_forbidden":
        return _unknown_key(document, model, path)
    elif kind == "missing":
        return document.report("E011", f"{_name(path)} is missing{_WHAT_TO_WRITE.get(str(path[-1]), '')}", path)
    elif kind in _EXPECTED or kind.startswith("union_tag"):
        code, expected = "E013", _EXPECTED.get(kind) or _arms(context)
        message = f"{_name(path)} is {expected}, not {_described(value)}{_mend(kind, value)}"
    elif kind == "literal_error":
        code, expected = "E014", f"one of {_choices(context)}"
        message = f"{_name(path)} is {expected}, not {shorten(value)}" + suggestion(
            str(value), _choices(context).split(", ")
        )
    else:
        code, expected = "E014", _bound(kind, context) or details["msg"]
        message = f"{_name(path)} {expected}"
        expected = f"a value that {expected}"
    written = document.written(path)
    if written is not None and not at_key:
        # The message may quote the value, and the value came from a variable: it may be a secret.
        message = f"{shorten(written)} does not expand to {expected or 'a value that is allowed here'}"
    document.report(code, message, path, at_key=at_key)


_WHAT_TO_WRITE = {
    "version": "; write version: 1",
    "allow": '; list the networks that may see it, such as [127.0.0.1, "::1"]',
    "per": "; write whose limit it is: client_ip, tenant, global, state:NAME, or a list of them",
}


def _has_blanks(value: Any) -> bool:
    return isinstance(value, dict) and any(inner is None or inner == "" for inner in value.values())


def _unknown_key(document: Document, model: type[BaseModel], path: Path) -> None:
    known = _keys_at(model, path[:-1])
    if "keys" in path[:-1]:
        # Whatever stands below `keys` may be a key as it is used, also where a name should be.
        document.report("E010", f"unknown key here; known are {', '.join(known)}", path[:-1])
        return
    name = str(path[-1])
    listed = f"known are {', '.join(known)}" if len(known) <= 8 else ""
    document.report(
        "E010", f"unknown key {shorten(name)}{suggestion(name, known, otherwise=listed)}", path, at_key=True
    )


def _keys_at(annotation: Any, path: Path) -> tuple[str, ...]:
    """The keys that the model at ``path`` below ``annotation`` knows."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        if not path:
            return tuple(annotation.model_fields)
        field = annotation.model_fields.get(str(path[0]))
        return _keys_at(field.annotation, path[1:]) if field is not None else ()
    arms = get_args(annotation)
    if get_origin(annotation) is Annotated:
        return _keys_at(arms[0], path)
    if get_origin(annotation) in (dict, list):
        return _keys_at(arms[-1], path[1:]) if path else ()
    return next((keys for arm in arms if (keys := _keys_at(arm, path))), ())


def _name(path: Path) -> str:
    if not path:
        return "the file"
    if isinstance(path[-1], str):
        return shorten(path[-1])
    outer = next((step for step in reversed(path) if isinstance(step, str)), None)
    return "an entry" if outer is None else f"an entry of {shorten(outer)}"


def _described(value: Any) -> str:
    if isinstance(value, bool):
        return f"'{str(value).lower()}'"
    if isinstance(value, int | float):
        return f"the number {str(value)[:40]}"
    return "a mapping" if isinstance(value, dict) else "a list" if isinstance(value, list) else "text"


def _mend(kind: str, value: Any) -> str:
    if kind == "list_type" and not isinstance(value, dict):
        return "; write it in [brackets]"
    if kind == "int_type" and isinstance(value, str) and value.replace("_", "").isdecimal():
        return "; leave out the quotes"
    if kind == "string_type" and not isinstance(value, dict | list):
        return "; write it in quotes"
    return ""


def _arms(context: dict[str, Any]) -> str:
    return " or ".join(_ARMS[tag] for tag in _ARM.findall(str(context["expected_tags"])))


def _choices(context: dict[str, Any]) -> str:
    return str(context["expected"]).replace("'", "").replace(" or ", ", ")


def _bound(kind: str, context: dict[str, Any]) -> str:
    if kind == "greater_than_equal":
        return f"is at least {context['ge']:_}"
    if kind == "less_than_equal":
        return f"is at most {context['le']:_}"
    if kind == "too_short":
        return f"has at least {context['min_length']} {'entry' if context['min_length'] == 1 else 'entries'}"
    if kind == "too_long":
        return f"has at most {context['max_length']:_} entries"
    return ""
