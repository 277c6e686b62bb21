#!/usr/bin/env python
"""What these pages say of the code, taken out of the code: keys, mistakes, metrics, verbs, public names.

python docs/generate.py            renew what is between markers, and what is shown below a `yaml wrong` block
python docs/generate.py --check    only say which pages would change; exits with 1 if there are any

A part begins with ``<!-- generated: KIND ARGUMENTS -->`` and ends with ``<!-- /generated -->``.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import os
import re
import sys
import textwrap
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal, Union, get_args, get_origin
from unittest.mock import patch

import typer
from annotated_types import Ge, Le, MaxLen, MinLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo

import seawall
from seawall import testing
from seawall.cli.app import build
from seawall.config import check, render, schema
from seawall.metrics import SPECS
from seawall.notation import NotationError

DOCS = Path(__file__).resolve().parent
PART = re.compile(r"(<!-- generated: (\w+)([^>\n]*) -->\n).*?(<!-- /generated -->)", re.DOTALL)
WRONG = re.compile(r"(^```yaml wrong\n(.*?)^```\n\n```text\n).*?(^```$)", re.DOTALL | re.MULTILINE)

# What is explained once, in a section of its own, wherever it may be written.
NAMED = (
    (schema.Rates, "[a rate](#rates)"),
    (schema.RateItem, "[a rate](#rates)"),
    (schema.Quotas, "[a quota](#quotas)"),
)

METHODS = {"Seawall": ("reload", "reset", "statistics"), "ManualClock": ("advance", "advance_ns", "wall_ns")}
"""What users call of a class; the rest of it is Seawall's own."""

ENVIRONMENT = {"SEAWALL_SECRET": "a secret of the documentation", "SEAWALL_TOKEN": "a-token-of-the-documentation"}
"""What the files of a page may refer to."""

CONSTANTS = {
    "EXPOSE_HEADERS": "The headers that a browser's script may want to read: for `CORSMiddleware(expose_headers=...)`.",
    "__version__": "The version, as text.",
}


def pages() -> list[Path]:
    return sorted(path for path in DOCS.rglob("*.md") if "build" not in path.relative_to(DOCS).parts)


def renewed(text: str) -> str:
    """``text`` with its generated parts as the code has them now."""
    text = PART.sub(lambda found: f"{found[1]}{PARTS[found[2]](found[3].split())}\n{found[4]}", text)
    return WRONG.sub(lambda found: f"{found[1]}{told(found[2])}\n{found[3]}", text)


def told(text: str) -> str:
    """What `seawall check` says of a file with this text."""
    with TemporaryDirectory() as folder, patch.dict(os.environ, ENVIRONMENT):
        path = Path(folder, "seawall.yaml")
        path.write_text(text, encoding="utf-8")
        return render(check(path).diagnostics).replace(f"{path}", path.name)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


# The language


def models(annotation: Any = schema.File, path: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """Every section of the language with its path, in which ``*`` is any name or position."""
    if any(annotation == named for named, _ in NAMED):
        return
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield path, annotation
        for name, field in annotation.model_fields.items():
            yield from models(field.annotation, f"{path}.{name}" if path else name)
        return
    inner = f"{path}.*" if get_origin(annotation) in (list, dict) else path
    for arm in get_args(annotation):
        yield from models(arm, inner)


def keys(arguments: Sequence[str]) -> str:
    """The keys of the section at a path; without one, of the whole file."""
    path = arguments[0] if arguments else ""
    model = BY_NAME.get(path) or next(model for at, model in models() if at == path)
    rows = []
    for name, field in model.model_fields.items():
        meaning, default = meaning_and_default(field)
        value = restricted(
            f"{path}.{name}" if path else name, field.annotation, *field.metadata, extra=field.json_schema_extra
        )
        if field.examples and " such as " not in value:
            value += f" such as {choices(f'`{example}`' for example in field.examples)}"
        rows.append((f"`{name}`", value, default, meaning.replace("<", "&lt;")))
    return table(("Key", "Value", "Default", ""), rows)


def heading(path: str) -> str:
    """What the section at a path is called: ``tenants.keys`` for that of the entries of ``tenants.*.keys``."""
    return path.replace(".*", "") or "The file"


def anchor(path: str) -> str:
    return re.sub(r"[^\w-]", "", heading(path).lower().replace(" ", "-"))


BY_NAME: dict[str, type[BaseModel]] = {"rate": schema.RateForm, "quota": schema.QuotaForm}


def meaning_and_default(field: FieldInfo) -> tuple[str, str]:
    """The description, and the default that it states; or the default itself."""
    meaning, _, stated = (field.description or "").partition(" Default: ")
    if not stated and meaning.startswith("Default: "):
        stated, _, meaning = meaning.removeprefix("Default: ").partition(". ")
    default = field.default
    if field.is_required():
        return meaning, "*required*"
    if isinstance(default, bool):
        return meaning, f"`{str(default).lower()}`"
    if isinstance(default, int | str):
        written = f"{default:_}" if isinstance(default, int) else default
        return meaning, f"`{written}`{stated.rstrip('.').removeprefix(written)}"
    return meaning, stated.rstrip(".")


def words(path: str, annotation: Any) -> str:
    """What may be written for a value of this type at ``path``."""
    for named, text in NAMED:
        if annotation == named:
            return text
    inner = get_args(annotation)
    origin = get_origin(annotation)
    if origin is Annotated:
        return restricted(path, *inner)
    if origin is Literal:
        return choices(f"`{choice}`" for choice in inner)
    if origin in (Union, types.UnionType):
        one, *others = dict.fromkeys(words(path, arm) for arm in inner if arm is not type(None))
        return choices([one, *(other.replace(f"a list of: {one}", "a list of these") for other in others)], mark=",")
    if origin is list:
        return f"a list of: {words(f'{path}.*', inner[0])}"
    if origin is dict:
        return f"{words(path, inner[0])} and {words(f'{path}.*', inner[1])}, for each"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"[a mapping](#{anchor(path)})"
    return {bool: "`true` or `false`", int: "a whole number", str: "a name"}[annotation]


def restricted(path: str, annotation: Any, *metadata: Any, extra: Any = None) -> str:
    """The same, where something more is known of the value."""
    flat = [inner for each in metadata for inner in (each.metadata if isinstance(each, FieldInfo) else [each])]
    for each in metadata:
        if isinstance(each, FieldInfo) and each.json_schema_extra:
            extra = each.json_schema_extra
    if isinstance(extra, dict) and "const" in extra:
        return f"`{extra['const']}`"
    for each in flat:
        if isinstance(each, schema.Text):
            return text_of(each)
    told = words(path, annotation)
    least = next((bound.ge for bound in flat if isinstance(bound, Ge)), None)
    most = next((bound.le for bound in flat if isinstance(bound, Le)), None)
    longest = next((bound.max_length for bound in flat if isinstance(bound, MaxLen)), None)
    shortest = next((bound.min_length for bound in flat if isinstance(bound, MinLen)), 0)
    if least is not None and most is not None:
        told += f" from {least:_} to {most:_}"
    if longest is not None:
        told += f" ({shortest} to {longest:_})" if shortest else f" (at most {longest:_})"
    return told


def text_of(text: schema.Text) -> str:
    """What a text value is, with examples and, for a duration, its range."""
    told = text.expected
    examples = [f"`{example}`" for example in text.examples]
    said = told.partition(" such as ")
    told = said[0] + (f" such as {choices(examples)}" if examples else said[1] + said[2])
    try:
        text.check("36000d")
    except NotationError as error:
        _, _, reach = error.message.partition("out of range: ")
        told += f", {reach}" if reach else ""
    except ValueError:
        pass  # no duration
    return told


def choices(each: Iterable[str], *, last: str = "or", mark: str = "") -> str:
    *others, final = each
    return f"{', '.join(others)}{mark if others else ''} {last} {final}" if others else final


# Metrics, verbs, names


def metrics(arguments: Sequence[str]) -> str:
    """The metrics with these names; without any, all."""
    chosen = [spec for spec in SPECS if spec.name in arguments or not arguments]
    missing = set(arguments) - {spec.name for spec in chosen}
    if missing:
        raise ValueError(f"no such metrics: {missing}")
    rows = [(f"`{s.name}{{{','.join(s.labels)}}}`" if s.labels else f"`{s.name}`", s.kind, s.help) for s in chosen]
    return table(("Metric", "Kind", ""), rows)


def verbs(_: Sequence[str]) -> str:
    """The command line: each verb, what it is for, its options."""
    group: Any = typer.main.get_command(build(None))
    sections: list[str] = []
    for name, command in sorted(group.commands.items()):
        sections += verb(f"seawall {name}", command, "##")
    return "\n\n".join(sections)


def verb(name: str, command: Any, level: str) -> Iterator[str]:
    """One verb, and those below it."""
    inner = getattr(command, "commands", {})
    arguments = [each for each in command.params if each.param_type_name == "argument"]
    options = [each for each in command.params if each.param_type_name == "option"]
    usage = [name, *(["VERB"] if inner else []), *(["[OPTIONS]"] if options else []), *map(called, arguments)]
    yield f"{level} {name}"
    yield f"```text\n{' '.join(usage)}\n```"
    for paragraph in re.split(r"\n\n+", inspect.cleandoc(command.help or "")):
        if paragraph.startswith("\b"):
            yield f"```text\n{textwrap.dedent(paragraph.removeprefix(chr(8)).strip(chr(10)))}\n```"
        else:
            yield re.sub(r"^(#.*)$", r"`\1`", paragraph, flags=re.MULTILINE)  # a comment, and no heading
    rows = [(f"`{called(each)}`", one_line(each.help)) for each in arguments]
    spelled = ((each, (*each.opts, *each.secondary_opts)) for each in options)
    rows += [(", ".join(f"`{option}`" for option in spellings), one_line(each.help)) for each, spellings in spelled]
    if rows:
        yield table(("", ""), rows)
    for word, each in sorted(inner.items()):
        yield from verb(f"{name} {word}", each, f"{level}#")


def called(argument: Any) -> str:
    """How an argument is called in the usage line."""
    name = str(argument.metavar or argument.name.upper())
    return name if argument.required or name.startswith("[") else f"[{name}]"


def one_line(text: str | None) -> str:
    return " ".join((text or "").split())


def api(arguments: Sequence[str]) -> str:
    """The public names of a module, with their docstrings."""
    module = {"seawall": seawall, "testing": testing}[arguments[0]]
    sections: list[str] = []
    for name in sorted(module.__all__, key=lambda name: (not name[0].isupper() or name.isupper(), name.lower())):
        sections += [f"### {name}", *described(name, getattr(module, name))]
    return "\n\n".join(sections)


def described(name: str, thing: Any) -> Iterator[str]:
    if not callable(thing):
        values = "" if isinstance(thing, str) else f" {', '.join(f'`{item}`' for item in thing)}."
        yield f"{CONSTANTS[name]}{values}"
        return
    yield f"```python theirs\n{definition(name, thing)}\n```"
    yield prose(thing)
    for method in METHODS.get(name, ()):
        if function := getattr(thing, method, None):
            yield f"```python theirs\ndef {written(method, function)}: ...\n```"
            yield prose(function)


def definition(name: str, thing: Any) -> str:
    """How a class or a function is called. The annotations are the source's own words, the same on every Python."""
    if dataclasses.is_dataclass(thing):
        fields = [f"    {field.name}: {field.type}" for field in dataclasses.fields(thing)]
        return "\n".join([f"class {name}:", *fields])
    if not inspect.isclass(thing):
        return f"def {written(name, thing)}: ..."
    if issubclass(thing, Exception):
        return f"class {name}({thing.__bases__[0].__name__}): ..."
    constructor = textwrap.indent(f"def {written('__init__', thing.__init__)}: ...", "    ")
    return f"class {name}:\n{constructor}"


def written(name: str, function: Any) -> str:
    """The call of a function, on several lines where it is long."""
    parameters = []
    signature = inspect.signature(function)
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in parameters:
            parameters.append("*")
        text = f"{'**' * (parameter.kind is parameter.VAR_KEYWORD)}{parameter.name}"
        if parameter.annotation is not parameter.empty:
            text += f": {words_of(parameter.annotation)}"
        if parameter.default is not parameter.empty:
            text += f" = {literal(parameter.default)}"
        parameters.append(text)
    result = signature.return_annotation
    end = "" if result is signature.empty else f" -> {words_of(result)}"
    whole = f"{name}({', '.join(parameters)}){end}"
    if len(whole) < 100:
        return whole
    return f"{name}(\n" + "".join(f"    {each},\n" for each in parameters) + f"){end}"


def literal(default: object) -> str:
    """A default as it is written; a function by its name."""
    return f'"{default}"' if isinstance(default, str) else getattr(default, "__name__", repr(default))


def words_of(annotation: Any) -> str:
    """An annotation without the names of modules."""
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return re.sub(r"\b(?:\w+\.)+(?=\w)", "", text)


def prose(thing: Any) -> str:
    """A docstring as Markdown: double backticks are single ones, an example is a block."""
    text = inspect.cleandoc(thing.__doc__ or "").replace("``", "`")
    return re.sub(r"(?:^(?:>>>|\.\.\.) .*\n?)+", example, text, flags=re.MULTILINE).rstrip()


def example(found: re.Match[str]) -> str:
    code = "".join(f"{line[4:]}\n" for line in found[0].splitlines())
    spaced = re.sub(r"((?:^(?:from|import) .*\n)+)(?=.)", r"\1\n", code, flags=re.MULTILINE)
    return f"```python\n{spaced}```\n"


PARTS: dict[str, Callable[[Sequence[str]], str]] = {"keys": keys, "metrics": metrics, "verbs": verbs, "api": api}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a page would change")
    arguments = parser.parse_args()
    changed = []
    for page in pages():
        text = page.read_text(encoding="utf-8")
        new = renewed(text)
        if new != text:
            changed.append(page.name)
            if not arguments.check:
                page.write_text(new, encoding="utf-8")
    sys.stdout.write("".join(f"{name}\n" for name in changed))
    return int(arguments.check and bool(changed))


if __name__ == "__main__":
    sys.exit(main())
