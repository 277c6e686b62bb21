"""YAML text as plain data that remembers where everything stood.

PyYAML's parser (libyaml's where it is there, otherwise the one in Python) turns text into events; its constructors are
not used. From the events this module builds dicts, lists and scalars by its own, smaller rules:

* booleans are ``true`` and ``false`` and nothing else, so a tenant named ``no`` keeps its name (YAML 1.2, core schema);
* keys are text, whatever they look like;
* nothing may be said twice, nothing may refer to anything else, nothing may name a type;
* ``${VARIABLES}`` are replaced in text values only, and the text they bring in is not looked at again.

Each dict and list carries the positions of its entries as ``line << 24 | column``, one int for a key and one for a
value: 10,000 tenants have 100,000 of them, and an object for each would double the time a file takes to load.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from typing import Any, TypeAlias, final

import yaml

from seawall.config.diagnostics import Diagnostic, Severity
from seawall.notation import as_text, shorten

MAX_BYTES = 4 * 1024 * 1024
MAX_DEPTH = 20
MAX_PROBLEMS = 1000

Path: TypeAlias = tuple[str | int, ...]

_COLUMN_BITS = 24
_COLUMN_MASK = (1 << _COLUMN_BITS) - 1


@final
class Map(dict[str, Any]):
    """A mapping. ``marks`` has, for each key, where the key stands and where its value does."""

    __slots__ = ("marks",)

    def __init__(self) -> None:
        super().__init__()
        self.marks: dict[str, tuple[int, int]] = {}


@final
class Items(list[Any]):
    """A list. ``marks`` has where each entry stands."""

    __slots__ = ("marks",)

    def __init__(self) -> None:
        super().__init__()
        self.marks: list[int] = []


@final
@dataclass(slots=True)
class Document:
    """One file, or one mapping given in Python, and what is wrong with it so far.

    ``expanded`` has, for each value that came out of variables (the ``id`` of its container, and its key or index),
    what was written for it, or ``None`` where that could not be expanded, which has been reported.
    """

    name: str
    text: str | None = None
    root: Any = None
    lines: Sequence[str] = ()
    expanded: dict[tuple[int, str | int], str | None] = field(default_factory=dict)
    problems: list[Diagnostic] = field(default_factory=list)
    complete: bool = True
    """False where a part could not be read: what is missing from ``root`` is then no mistake of its own."""
    dropped: int = 0
    """Mistakes that came after the first thousand."""
    discarded: list[tuple[Path, Any]] = field(default_factory=list)
    """What stood under duplicate keys."""

    @property
    def full(self) -> bool:
        """Whether so much is wrong that more would help nobody."""
        return len(self.problems) >= MAX_PROBLEMS

    def report(
        self,
        code: str,
        message: str,
        path: Path = (),
        *,
        at_key: bool = False,
        severity: Severity = "error",
        unreadable: bool = False,
    ) -> None:
        """Note a mistake at ``path``, or at the nearest thing to it that was written.

        A value whose variable is undefined has had its error, and gets no other.
        """
        if self.expanded and self.expanded.get(self._origin(path), "") is None:
            return
        self.add(code, message, self.mark(path, at_key=at_key), path, severity=severity, unreadable=unreadable)

    def add(
        self,
        code: str,
        message: str,
        mark: int | None,
        path: Path = (),
        *,
        severity: Severity = "error",
        unreadable: bool = False,
    ) -> None:
        """Note a mistake at a position. Its line of source is filled in by `redaction.seal`."""
        if self.full and severity == "error":
            self.dropped += 1
            return
        line, column = (0, 0) if mark is None else ((mark >> _COLUMN_BITS) + 1, (mark & _COLUMN_MASK) + 1)
        self.problems.append(
            Diagnostic(self.name, line, column, severity, code, message, dotted(path), unreadable=unreadable)
        )

    def blank(self, path: Path, mark: int | None) -> None:
        """Note that there is nothing where ``path`` promises something."""
        what = f"'{path[-1]}'" if isinstance(path[-1], str) else "an entry of the list"
        self.add("E012", f"{what} is blank; give it a value, or remove it", mark, path)

    def mark(self, path: Path, *, at_key: bool = False) -> int | None:
        """Where ``path`` stands, or as much of it as there is. ``None`` where nothing has a position."""
        if self.text is None:
            return None
        node, mark = self.root, 0
        for depth, step in enumerate(path):
            if isinstance(node, Map) and isinstance(step, str) and step in node.marks:
                key_mark, value_mark = node.marks[step]
                mark = key_mark if node[step] is None or (at_key and depth == len(path) - 1) else value_mark
            elif isinstance(node, Items) and isinstance(step, int) and step < len(node.marks):
                mark = node.marks[step]
            else:
                break
            node = node[step]
        return mark

    def line(self, path: Path) -> int:
        """The line on which ``path`` begins, from 1; 0 where there is no text."""
        mark = self.mark(path, at_key=True)
        return 0 if mark is None else (mark >> _COLUMN_BITS) + 1

    def written(self, path: Path) -> str | None:
        """What was written for the value at ``path`` if variables were replaced in it, else nothing."""
        return self.expanded.get(self._origin(path)) if self.expanded else None

    def _origin(self, path: Path) -> tuple[int, str | int]:
        node: Any = self.root
        parent: Any = None
        name: str | int = ""
        for step in path:
            try:
                parent, name, node = node, step, node[step]
            except (LookupError, TypeError):
                break
        return id(parent), name


def position(line: int, column: int) -> int:
    """One int for a place, both counted from 0."""
    return line << _COLUMN_BITS | column


def dotted(path: Path) -> str:
    """``plans.free.rate``, ``routes[2].match.path``."""
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
    return text.removeprefix(".")


_PLAIN = re.compile(
    r"""(?P<null>~|null|Null|NULL|)
      | (?P<true>true|True|TRUE)
      | (?P<false>false|False|FALSE)
      | (?P<int>[-+]?[0-9]+(?:_[0-9]+)*)
      | (?P<octal>0o[0-7]+)
      | (?P<hex>0x[0-9a-fA-F]+)
      | (?P<float>[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))
    """,
    re.VERBOSE,
)


_LONGEST_NUMBER = 40
"""Characters. Nothing here is that large, and Python refuses to convert what has thousands of digits."""


def plain(text: str) -> str | int | float | bool | None:
    """What an unquoted scalar means: null, a boolean, a number, otherwise the text itself."""
    match = _PLAIN.fullmatch(text)
    if match is None or len(text) > _LONGEST_NUMBER:
        return text
    kind = match.lastgroup
    if kind == "int":
        return int(text)
    if kind == "octal":
        return int(text, 8)
    if kind == "hex":
        return int(text, 16)
    if kind == "float":
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return None if kind == "null" else kind == "true"


_VARIABLE = re.compile(
    r"\$(?:(?P<dollar>\$)|\{(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?::-(?P<default>[^{}]*))?\}|(?P<bad>\{))"
)


def adopt(mapping: Mapping[Any, Any], name: str, environment: Mapping[str, str]) -> Document:
    """A mapping given in Python, held to the rules of a file: text keys, no blanks, variables replaced."""
    document = Document(name)
    document.root = _adopted(mapping, document, environment, ())
    return document


def _adopted(value: Any, document: Document, environment: Mapping[str, str], path: Path) -> Any:
    if len(path) > MAX_DEPTH:
        # Also how a mapping that contains itself ends.
        document.add("E004", f"nested more than {MAX_DEPTH} levels deep", None, path[:4])
        document.complete = False
        return ""
    value = as_text(value)
    if isinstance(value, Mapping):
        node = Map()
        for key, inner in value.items():
            if not isinstance(key, str | int) or isinstance(key, bool):
                document.add("E003", f"a key is text, not a {type(key).__name__}", None, path)
                continue
            if str(key) in node:
                document.add("E001", f"duplicate key {shorten(str(key))}", None, (*path, str(key)))
            child = _adopted(inner, document, environment, (*path, str(key)))
            node[str(key)] = _expanded(child, document, environment, node, str(key), path)
        return node
    if isinstance(value, list | tuple):
        items = Items()
        for index, inner in enumerate(value):
            child = _adopted(inner, document, environment, (*path, index))
            items.append(_expanded(child, document, environment, items, index, path))
        return items
    if isinstance(value, date):
        return value.isoformat()
    if value is None or value == "":
        if path:
            document.blank(path, None)
        return None
    if not isinstance(value, str | int | float):
        document.add("E013", f"a {type(value).__name__} is not a value of the configuration", None, path)
        return ""
    if isinstance(value, int) and abs(value) >= 10**_LONGEST_NUMBER:
        document.add("E014", "this number is too large", None, path)
        return ""
    return value


def _expanded(
    value: Any, document: Document, environment: Mapping[str, str], node: Any, name: str | int, path: Path
) -> Any:
    if not isinstance(value, str) or "$" not in value:
        return value
    try:
        replaced = expand(value, environment)
    except VariableError as error:
        document.add("E051", str(error), None, (*path, name))
        document.expanded[id(node), name] = None
        return value
    if "${" in value:
        document.expanded[id(node), name] = value
        if not replaced:
            document.blank((*path, name), None)
    return replaced


class VariableError(ValueError):
    """A ``${VARIABLE}`` that cannot be replaced."""


def expand(text: str, environment: Mapping[str, str]) -> str:
    """``text`` with its variables replaced, once: what they bring in is text and not looked at again.

    ``${NAME:-default}`` gives the default where ``NAME`` is unset or empty, as a shell does. ``$$`` is a dollar sign.
    """

    def value(match: re.Match[str]) -> str:
        if match["dollar"]:
            return "$"
        if match["bad"]:
            raise VariableError("'${' begins a variable: write ${NAME}, ${NAME:-default}, or '$${' for the text itself")
        name, default = match["name"], match["default"]
        found = environment.get(name)
        if default is not None:
            return found or default
        if found is None:
            raise VariableError(f"the variable '{name}' is not defined; set it, or write ${{{name}:-default}}")
        return found

    return _VARIABLE.sub(value, text)


def read(
    text: str, name: str, environment: Mapping[str, str], *, parser: Callable[[str], Any] | None = None
) -> Document:
    """``text`` as data with positions, and with everything that is wrong with it as YAML.

    ``parser`` makes a PyYAML parser for a text; the default is the fastest that is installed.
    """
    document = Document(name, text)
    document.lines = _LINE_BREAK.split(text)
    if (bad := _UNPRINTABLE.search(text)) is not None:
        line = text.count("\n", 0, bad.start()) + text.count("\r", 0, bad.start()) - text.count("\r\n", 0, bad.start())
        column = bad.start() - max(text.rfind("\n", 0, bad.start()), text.rfind("\r", 0, bad.start())) - 1
        document.add("E005", f"the character U+{ord(bad[0]):04X} is not allowed", position(line, column))
        document.complete = False
        return document
    reader = _Reader(document, environment)
    try:
        reader.build(parser or _PARSER, text)
    except _Stop:
        document.complete = False
    except yaml.YAMLError as error:
        document.complete = False
        _syntax_error(document, error)
    return document


_LINE_BREAK = re.compile(r"\r\n|\n|\r")
_UNPRINTABLE = re.compile("[^\t\n\r -~\xa0-\u2027\u202a-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]")
"""What neither parser takes, and the three line breaks (U+0085, U+2028, U+2029) that editors do not count as lines."""


class _Pure(yaml.reader.Reader, yaml.scanner.Scanner, yaml.parser.Parser):
    """PyYAML's parser in Python: events only, no composer, resolver or constructor."""

    def __init__(self, text: str) -> None:
        yaml.reader.Reader.__init__(self, text)
        yaml.scanner.Scanner.__init__(self)
        yaml.parser.Parser.__init__(self)


def _fastest() -> Callable[[str], Any]:
    try:
        from yaml import cyaml
    except ImportError:
        return _Pure
    parser: Callable[[str], Any] = cyaml.CParser  # type: ignore[attr-defined]
    return parser


PURE_PARSER: Callable[[str], Any] = _Pure
_PARSER = _fastest()


class _Stop(Exception):
    """Nothing after this point can be read."""


@final
class _Reader:
    """One pass over the events of one text."""

    def __init__(self, document: Document, environment: Mapping[str, str]) -> None:
        self.document = document
        self.environment = environment
        self.stack: list[tuple[Any, Any, bool, str | int]] = []
        """The containers around the current one: node, marks, whether it is a mapping, the name of what is open."""
        self.refused = 0

    def build(self, parser: Callable[[str], Any], text: str) -> None:
        # One long function with everything in locals: it goes round 100,000 times for a large file.
        next_event = parser(text).get_event
        document, stack, meanings = self.document, self.stack, dict[str, Any]()
        scalar_type, map_type, items_type = yaml.ScalarEvent, yaml.MappingStartEvent, yaml.SequenceStartEvent
        node: Any = None
        marks: Any = None
        in_map = duplicate = started = False
        key: str | None = None
        key_mark = 0
        value: Any
        name: Any
        while True:
            event = next_event()
            kind = type(event)
            mark = event.start_mark
            at = mark.line << _COLUMN_BITS | mark.column
            if kind is scalar_type:
                scalar = event.value
                if event.anchor is not None or event.tag is not None:
                    self.refuse_properties(event, at)
                if in_map and key is None:
                    key, key_mark = scalar, at
                    if key in marks:
                        first = (marks[key][0] >> _COLUMN_BITS) + 1
                        message = f"duplicate key {shorten(key)} (first at line {first})"
                        document.add("E001", message, at, self.path(key))
                        duplicate = True
                    elif key == "<<" and event.implicit[0]:
                        self.refuse("merge keys ('<<') are not supported: write the settings out", at)
                        document.complete = False
                    continue
                if event.implicit[0]:
                    value = meanings.get(scalar, meanings)
                    if value is meanings:
                        value = meanings[scalar] = plain(scalar)
                else:
                    value = scalar
                if "$" in scalar and type(value) is str:
                    value = self.expanded(value, at, node, key, duplicate)
                if (value is None or value == "") and node is not None:
                    # A blank value has no place of its own: parsers put it wherever the next thing begins.
                    document.blank(self.path(key if key is not None else len(node)), key_mark if in_map else at)
            elif kind is map_type or kind is items_type:
                if event.anchor is not None or event.tag is not None:
                    self.refuse_properties(event, at)
                if in_map and key is None:
                    self.refuse("a key is plain text, not a list or a mapping", at)
                    raise _Stop
                value = Map() if kind is map_type else Items()
            elif kind is yaml.MappingEndEvent or kind is yaml.SequenceEndEvent:
                node, marks, in_map, _ = stack.pop()
                continue
            elif kind is yaml.AliasEvent:
                self.refuse("aliases ('*...') are not supported: write the settings out", at)
                document.complete = False
                if in_map and key is None:
                    raise _Stop
                value = None
            elif kind is yaml.DocumentStartEvent:
                if started or event.tags:
                    self.refuse("a file is one document: a second '---', or '%TAG', is not supported", at)
                    raise _Stop
                started = True
                continue
            elif kind is yaml.StreamEndEvent:
                return
            else:
                continue

            if in_map:
                name, key = key, None
                if duplicate:
                    # Its value is read for mistakes of its own, and kept only to know what may be a secret.
                    duplicate = False
                    document.discarded.append((self.path(name), value))
                else:
                    node[name] = value
                    marks[name] = (key_mark, at)
            elif node is None:
                name, document.root = "", value
            else:
                name = len(node)
                node.append(value)
                marks.append(at)
            if kind is not scalar_type and value is not None:
                stack.append((node, marks, in_map, name))
                if len(stack) > MAX_DEPTH:
                    document.add("E004", f"nested more than {MAX_DEPTH} levels deep", at, self.path()[:4])
                    raise _Stop
                node, marks, in_map = value, value.marks, kind is map_type

    def path(self, *end: str | int) -> Path:
        return (*(name for _, _, _, name in self.stack[1:]), *end)

    def expanded(self, text: str, at: int, node: Any, key: str | None, duplicate: bool) -> str:
        name = key if key is not None else len(node) if node is not None else ""
        try:
            value = expand(text, self.environment)
        except VariableError as error:
            self.document.add("E051", str(error), at, self.path(name))
            value = None
        if "${" in text and not duplicate:
            self.document.expanded[id(node), name] = text if value is not None else None
        return value if value is not None else text

    def refuse_properties(self, event: Any, at: int) -> None:
        if event.anchor is not None:
            self.refuse("anchors ('&...') are not supported: write the settings out", at)
        if event.tag is not None:
            self.refuse("tags ('!...') are not supported: a value is what it looks like", at)
            self.document.complete = False

    def refuse(self, message: str, at: int) -> None:
        self.document.add("E003", message, at, self.path())
        self.refused += 1
        if self.refused == _ENOUGH:
            raise _Stop


_ENOUGH = 20
"""After so many anchors and aliases the file is not a configuration, and reading on is what a bomb wants."""


def _syntax_error(document: Document, error: yaml.YAMLError) -> None:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    problem = str(getattr(error, "problem", None) or "it cannot be read")
    at = 0
    if mark is not None:
        line = min(mark.line, len(document.lines) - 1)
        at = position(line, min(mark.column, len(document.lines[line])))
        if document.lines[line][mark.column : mark.column + 1] == "\t":
            problem = "a tab where spaces are expected"
    document.add("E002", f"not YAML: {next((said for part, said in _PLAIN_WORDS if part in problem), problem)}", at)


_PLAIN_WORDS = (
    ("tab", "tabs cannot indent; use spaces"),
    ("mapping values are not allowed", "no ':' is expected here; check the indentation, or quote the text"),
    ("could not find expected ':'", "a ':' is missing after this key, or the text above needs quotes"),
    ("expected ',' or '}'", "a ',' or '}' is missing"),
    ("expected ',' or ']'", "a ',' or ']' is missing"),
    ("block end", "this line does not fit the indentation above it"),
    ("expected <block end>", "this line does not fit the indentation above it"),
    ("did not find expected key", "this line does not fit the indentation above it"),
    ("did not find expected '-' indicator", "this line does not fit the indentation of the list above it"),
    ("unexpected end of stream", "a quote or bracket is never closed"),
    ("cannot start any token", "this character needs quotes around its text"),
    ("escape", "unknown escape after the backslash; in single quotes a backslash is only itself"),
)
