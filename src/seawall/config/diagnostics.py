"""What is wrong with a configuration, where, and how that reads in a terminal, in JSON and in a GitHub check.

A diagnostic carries its own line of source, so that rendering needs no files. Whatever comes from a file is escaped
before it is shown: a configuration may not move the cursor of whoever checks it.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, TypeAlias, final

Severity: TypeAlias = Literal["error", "warning"]
Format: TypeAlias = Literal["text", "json", "github"]

CODES: Mapping[str, str] = {
    "E000": "a file cannot be read: missing, no permission, a directory",
    "E001": "a key is there twice",
    "E002": "the file is not YAML",
    "E003": "a part of YAML that is not used here: an anchor, an alias, a tag, a second document",
    "E004": "too much: the size of a file, the depth of its nesting, the number of files or of mistakes",
    "E005": "the file is not UTF-8 text, or has control characters",
    "E006": "the file is empty, or is not a mapping",
    "E010": "unknown key",
    "E011": "a key is missing",
    "E012": "a value is blank",
    "E013": "a value of another type: text for a number, a list for a mapping",
    "E014": "a value that is not allowed here: out of range, not one of the choices, badly formed",
    "E015": "settings that contradict each other",
    "E020": "a rate, quota or duration that cannot be read",
    "E021": "unknown time zone",
    "E030": "a plan, priority or other name that is not defined",
    "E031": "defined twice: a tenant, route, limit or API key",
    "E032": "a name that is badly formed or reserved",
    "E033": "an API key that is not given by its hash",
    "E034": "no plan for callers who need one",
    "E040": "an address or network that cannot be read",
    "E041": "everybody would be trusted",
    "E042": "a path that cannot be matched",
    "E050": "an include that is not allowed",
    "E051": "a variable that is not defined, or badly written",
    "W001": "a route that no request can reach",
    "W002": "a plan that nobody is on",
    "W003": "a cost that can never fit",
    "W004": "a quota smaller than what may be spent at once",
    "W005": "a secret in the file",
    "W006": "a mode that the file's own lowers",
    "W007": "metrics open to everybody",
    "W008": "a quota that a restart forgets",
    "W009": "an API key that has expired",
    "W010": "an override equal to the plan",
    "W011": "API keys that nothing reads",
    "W012": "everybody is exempt",
    "W013": "a wait longer than callers have patience",
    "W014": "shares that leave nothing",
    "W015": "a priority header that cannot do what it is for",
    "W016": "a class that nobody is of",
    "W017": "a fixed limit that nobody has chosen",
    "W018": "an order that has no effect",
    "W019": "a lag that requests pay several times",
    "W020": "a shared store without a secret",
    "W021": "a time-out that requests would feel",
}
"""Every code there is. A code keeps its meaning for ever; E are errors, W warnings."""

_NAMED_BY_MESSAGE = frozenset({"E001", "E010"})
"""Errors about a key quote it in full, so their text shows no line of source."""

_WIDTH = 120
_LONG = 1_000


@final
@dataclass(frozen=True, slots=True)
class Diagnostic:
    """One mistake. ``line`` and ``column`` count from 1; both are 0 where there is no text to point into.

    ``path`` is the dotted way from the top of the file to the value. ``source`` is its line, or ``None`` where there
    is none or where the line holds a secret. ``unreadable`` marks what kept a file from being read at all.
    """

    file: str
    line: int
    column: int
    severity: Severity
    code: str
    message: str
    path: str = ""
    source: str | None = None
    unreadable: bool = False

    @property
    def head(self) -> str:
        """What it is and where, in one line."""
        place = f"{printable(self.file)}:{self.line}:{self.column}" if self.line else printable(self.file)
        return f"{place}: {self.severity}[{self.code}]: {printable(self.message)}"

    def __str__(self) -> str:
        head = self.head
        if self.source is None or not self.source.strip():
            # Without a line to show, the path is the only way to the value.
            return f"{head} ({printable(self.path)})" if self.path and self.code not in _NAMED_BY_MESSAGE else head
        if self.code in _NAMED_BY_MESSAGE:
            return head
        shown, caret = snippet(self.source, self.column)
        return f"{head}\n{self.line:>5} | {shown}\n{'':>5} | {' ' * caret}^ {printable(self.path)}".rstrip()


def snippet(source: str, column: int) -> tuple[str, int]:
    """``source`` as it can be shown, at most 120 characters around ``column``; and where that column now is."""
    before, after = (printable(part, tab=" ") for part in (source[: column - 1], source[column - 1 :]))
    start, end = 0, len(before) + len(after)
    if end > _WIDTH:
        start = max(0, min(len(before) - _WIDTH // 2, end - _WIDTH))
        end = start + _WIDTH
    shown = (before + after)[start:end]
    if start:
        shown = "..." + shown[3:]
    if end < len(before) + len(after):
        shown = shown[:-3] + "..."
    return shown, len(before) - start


def printable(text: str, *, tab: str = "\\t") -> str:
    """``text`` without anything a terminal obeys: control, formatting and direction marks become escapes."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(_escaped(character, tab) for character in text)


def _escaped(character: str, tab: str) -> str:
    if character == "\t":
        return tab
    if unicodedata.category(character) not in {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}:
        return character
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def render(diagnostics: Iterable[Diagnostic], form: Format = "text") -> str:
    """All of ``diagnostics``: as people read them, as a JSON array, or as GitHub workflow commands."""
    if form == "json":
        return json.dumps([_record(diagnostic) for diagnostic in diagnostics], indent=2)
    return "\n".join(_github(diagnostic) if form == "github" else str(diagnostic) for diagnostic in diagnostics)


def _record(diagnostic: Diagnostic) -> dict[str, object]:
    record = asdict(diagnostic)
    if diagnostic.source is not None and len(diagnostic.source) > _LONG:
        # Each mistake in a line carries the line: a file of one long line would come back thousands of times.
        record["source"] = snippet(diagnostic.source, diagnostic.column)[0]
    return record


def _github(diagnostic: Diagnostic) -> str:
    properties = {"file": printable(diagnostic.file)}
    if diagnostic.line:
        properties |= {"line": str(diagnostic.line), "col": str(diagnostic.column)}
    properties["title"] = f"{diagnostic.code}: {CODES.get(diagnostic.code, '')}"
    listed = ",".join(
        f"{name}={_data(value).replace(':', '%3A').replace(',', '%2C')}" for name, value in properties.items()
    )
    where = f" ({printable(diagnostic.path)})" if diagnostic.path else ""
    return f"::{diagnostic.severity} {listed}::{_data(printable(diagnostic.message) + where)}"


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


@final
class ConfigError(ValueError):
    """A configuration that is refused. Its text is every mistake in it, each at its place."""

    def __init__(self, diagnostics: Sequence[Diagnostic]) -> None:
        self.diagnostics = tuple(diagnostics)
        super().__init__(render(self.diagnostics))
