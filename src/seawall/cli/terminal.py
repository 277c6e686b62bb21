"""What the verbs have in common: where results and messages go, when there is colour, how a verb ends.

Results go to stdout and messages to stderr. Exit codes: 0 is fine, 1 is "something is wrong with what you asked about",
2 is "what you asked could not be done": a file that cannot be read, an argument that makes no sense.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn, TextIO

import typer
from rich.console import Console
from rich.text import Text

from seawall.config import Diagnostic, Report, check
from seawall.config.diagnostics import printable
from seawall.policy import Policy

FOUND = 1
UNUSABLE = 2

CONFIG_HELP = "The configuration file."


def is_lively(stream: TextIO) -> bool:
    """Whether ``stream`` is a terminal that may be given colours and repainted (https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def console(stream: TextIO | None = None) -> Console:
    """A console on ``stream`` (stdout) that takes text as it is: no markup, no wrapping, no colour in a pipe."""
    stream = stream or sys.stdout
    lively = is_lively(stream)
    return Console(
        file=stream,
        force_terminal=lively,
        color_system="auto" if lively else None,
        markup=False,
        emoji=False,
        highlight=False,
        soft_wrap=True,
    )


def say(message: str) -> None:
    """A message for the person at the terminal, on stderr."""
    print(printable(message), file=sys.stderr)


def fail(message: str, code: int = UNUSABLE) -> NoReturn:
    """End the verb with a message."""
    say(f"seawall: {message}")
    raise typer.Exit(code)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what is logged off the terminal: a verb says itself what matters."""
    handler = logging.NullHandler()
    logger = logging.getLogger("seawall")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def why(error: OSError) -> str:
    """What the operating system says, without its number and without the path, which the message has already."""
    return error.strerror or str(error)


def write(path: Path, text: str, *, replace: bool = True) -> None:
    """Write a file, or end the verb. With ``replace`` false, one that is there is left alone."""
    try:
        with path.open("w" if replace else "x", encoding="utf-8", newline="\n") as file:
            file.write(text)
    except FileExistsError:
        fail(f"{path} is there already; --force replaces it")
    except (OSError, ValueError) as error:
        fail(f"{path} cannot be written: {why(error) if isinstance(error, OSError) else error}")


def show(diagnostics: Iterable[Diagnostic], where: Console) -> None:
    """Diagnostics as people read them, in colour where there is any."""
    for diagnostic in diagnostics:
        text = Text(str(diagnostic))
        head = text.plain.partition("\n")[0]
        colour = "bold red" if diagnostic.severity == "error" else "bold yellow"
        mark = f"{diagnostic.severity}[{diagnostic.code}]"
        at = head.find(mark)
        text.stylize(colour, at, at + len(mark))
        where.print(text)


def exit_code(report: Report) -> int:
    """What a verb that needs this configuration ends with."""
    return UNUSABLE if report.unreadable else FOUND if report.errors else 0


def policy_of(path: Path) -> Policy:
    """The policy in ``path``, or the end of the verb with everything that is wrong with it."""
    report = check(path)
    if report.policy is None:
        show(report.errors, console(sys.stderr))
        if report.unreadable:
            say("seawall: --config names another file; `seawall init` writes a first one")
        raise typer.Exit(exit_code(report))
    return report.policy


def plural(count: int, noun: str) -> str:
    """``1 error``, ``2 errors``."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")
