"""`seawall diff`: what one configuration allows and another does not."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.text import Text

from seawall.cli.terminal import FOUND, UNUSABLE, console, fail, show
from seawall.config import Report, check
from seawall.config.differences import Change, differences, summary
from seawall.config.document import MAX_BYTES
from seawall.config.loading import check_text

STDIN = "-"
_MARKS = {"added": "+", "removed": "-"}


def run(
    old: Annotated[Path, typer.Argument(metavar="OLD", help="A configuration; - reads it from stdin.")],
    new: Annotated[Path, typer.Argument(metavar="NEW", help="Another one; - reads it from stdin.")],
    form: Annotated[
        Literal["text", "json", "markdown"],
        typer.Option("--format", help="text for people; json; markdown, for a comment on a pull request."),
    ] = "text",
) -> None:
    """Say what changes when one configuration takes the place of another.

    It compares what the files mean, with what they include: comments, order that means nothing and defaults written
    out are no change. 'raised' lets callers do more than before, 'lowered' less. Secrets are never shown.

    Exit codes, as diff has them: 0 the same, 1 different, 2 a file that is wrong or cannot be read.

    \b
    Examples:
      seawall diff old.yaml seawall.yaml
      git show HEAD:seawall.yaml | seawall diff - seawall.yaml
      seawall diff old.yaml new.yaml --format markdown
      seawall diff old.yaml new.yaml --format json | jq '.changes[] | select(.effect == "lowered")'
    """
    if str(old) == str(new) == STDIN:
        fail("only one of the two can be read from stdin")
    reports = [_report(path) for path in (old, new)]
    before, after = (report.policy for report in reports)
    if before is None or after is None:
        for report in reports:
            show(report.errors, console(sys.stderr))
        raise typer.Exit(UNUSABLE)
    changes = differences(before, after)
    if form == "json":
        print(json.dumps({"changes": [asdict(change) for change in changes], "summary": summary(changes)}, indent=2))
    elif form == "markdown":
        print("\n".join(_markdown(changes)))
    else:
        for line in _text(changes):
            console().print(line)
    raise typer.Exit(FOUND if changes else 0)


def _report(path: Path) -> Report:
    if str(path) != STDIN:
        return check(path)
    content = sys.stdin.buffer.read(MAX_BYTES + 1)
    return check_text(content.decode(errors="surrogateescape"), "<stdin>", None)


def _sections(changes: Sequence[Change]) -> Iterator[tuple[str, Iterator[Change]]]:
    return groupby(changes, lambda change: change.path.partition(".")[0])


def _text(changes: Sequence[Change]) -> Iterator[Text]:
    for section, found in _sections(changes):
        yield Text(section, "bold")
        for change in found:
            line = Text("  ").append(_MARKS.get(change.effect, "~"), "cyan").append(f" {change.text}")
            yield line.append(" (").append(change.effect, "bold").append(")") if _tells(change) else line
    if changes:
        yield Text()
    yield Text(summary(changes))


def _tells(change: Change) -> bool:
    """Whether the effect says what the mark and the words do not."""
    return change.effect in ("raised", "lowered")


def _markdown(changes: Sequence[Change]) -> Iterator[str]:
    for section, found in _sections(changes):
        yield f"**{section}**\n"
        yield from (f"- {_code(change.text)} ({change.effect})" for change in found)
        yield ""
    yield summary(changes)


def _code(text: str) -> str:
    """``text`` as a code span: nothing in it is markup, a link or a mention."""
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    padding = " " if "`" in (text[0], text[-1]) else ""
    return f"{fence}{padding}{text}{padding}{fence}"
