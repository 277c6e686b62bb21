"""`seawall history`: which policy held since when, and whether the record of it is as it was written."""

from __future__ import annotations

import json
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.text import Text

from seawall.cli.terminal import FOUND, UNUSABLE, console, fail, say, show, why
from seawall.config import check
from seawall.config.diagnostics import printable
from seawall.history import Problem, Record, read, verify

_SHOWN = 5
"""Changes of a record that the table shows. JSON has them all."""


def run(
    path: Annotated[
        Path, typer.Argument(metavar="FILE", help="A configuration with a 'history', or the record itself.")
    ] = Path("seawall.yaml"),
    number: Annotated[int | None, typer.Option("-n", min=1, metavar="N", help="The last N changes only.")] = None,
    form: Annotated[
        Literal["text", "json"], typer.Option("--format", help="text for people; json, with every change.")
    ] = "text",
) -> None:
    """Show the changes of a policy, the newest last, and verify that nobody has changed the record.

    Each record has the hash of the one before. So what is changed, dropped or moved is found, but for lines cut off at
    the end and for a chain that is written anew. The last hash is for you to keep elsewhere: with it, those are found
    as well.

    Exit codes: 0 all is as it was written, 1 it is not, 2 there is no record or it cannot be read.

    \b
    Examples:
      seawall history
      seawall history -n 20 deploy/seawall.yaml
      seawall history seawall.history.jsonl --format json | jq '.records[-1].diff'
    """
    record = _record(path)
    try:
        records = list(deque(read(record), maxlen=number))
        problem = verify(record)
    except FileNotFoundError:
        fail(f"{record} is not there; it is written when a service with this configuration starts")
    except OSError as error:
        fail(f"{record} cannot be read: {why(error)}")
    if form == "json":
        print(json.dumps(_document(record, records, problem), indent=2))
    else:
        for line in _table(records):
            console().print(line)
        console().print(f"last hash: {records[-1].hash}" if records else "no change is recorded yet")
    if problem is not None:
        say(f"seawall: {record} is not as it was written, {problem}")
        raise typer.Exit(FOUND)


def _record(path: Path) -> Path:
    """The record that ``path`` is or names."""
    if path.suffix == ".jsonl" or _has_records(path):
        return path
    report = check(path)
    if report.policy is None:
        show(report.errors, console(sys.stderr))
        say("seawall: `seawall history` also takes the record itself")
        raise typer.Exit(UNUSABLE)
    if report.policy.history is None:
        fail(f"{path} keeps no history; write 'history: seawall.history.jsonl' into it, and each change is recorded")
    return path.parent / report.policy.history


def _has_records(path: Path) -> bool:
    try:
        return any(True for _ in read(path))
    except OSError:
        return False  # `check` says what is wrong with it


def _table(records: Sequence[Record]) -> Iterator[Text]:
    if not records:
        return
    rows = [("seq", "time", "digest", ["changes"])]
    rows += [(str(one.seq), one.time, one.digest[:12], _shown(one.diff)) for one in records]
    widths = [max(map(len, column)) for column in list(zip(*rows, strict=True))[:3]]
    for at, (seq, time, digest, changes) in enumerate(rows):
        cells = (seq.rjust(widths[0]), time.ljust(widths[1]), digest.ljust(widths[2]))
        head = printable("  ".join(cells))
        for line, change in enumerate(changes):
            text = Text(" " * len(head) if line else head, "dim" if at else "bold")
            yield text.append("  ").append(printable(change), "none" if at else "bold")


def _shown(diff: Sequence[str]) -> list[str]:
    """The changes of a record, of which there may be none: a comment is another text and the same policy."""
    if len(diff) > _SHOWN:
        return [*diff[: _SHOWN - 1], f"... and {len(diff) - _SHOWN + 1:,} more"]
    return list(diff) or ["nothing but the text"]


def _document(record: Path, records: Sequence[Record], problem: Problem | None) -> dict[str, object]:
    return {
        "file": str(record),
        "records": [{**one.as_dict(), "hash": one.hash} for one in records],
        "problem": None if problem is None else asdict(problem),
    }
