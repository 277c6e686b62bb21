"""`seawall check`: every mistake in a configuration, each at its place."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from seawall.cli.terminal import FOUND, console, exit_code, plural, say, show
from seawall.config import Format, Report, check, render
from seawall.config.diagnostics import printable
from seawall.policy import Policy


def run(
    paths: Annotated[
        list[Path] | None, typer.Argument(metavar="PATH", help="Files to check; seawall.yaml if none is named.")
    ] = None,
    form: Annotated[
        Format,
        typer.Option("--format", help="text for people; json, an array; github, annotations in a pull request."),
    ] = "text",
    strict: Annotated[bool, typer.Option("--strict", help="Warnings count as errors.")] = False,
) -> None:
    """Say everything that is wrong with a configuration, and where.

    All mistakes are found in one run, in the file and in what it includes. Nothing is started and nothing is changed.

    Exit codes: 0 valid (there may be warnings), 1 mistakes (with --strict also warnings), 2 a file that cannot be read.

    \b
    Examples:
      seawall check
      seawall check --strict deploy/seawall.yaml
      seawall check --format github        # in a GitHub workflow
      seawall check --format json | jq '.[].code'
    """
    reports = [(path, check(path)) for path in paths or [Path("seawall.yaml")]]
    if form == "text":
        for path, report in reports:
            show(report.diagnostics, console())
            console().print(summary(path, report))
    else:
        text = render([found for _, report in reports for found in report.diagnostics], form)
        if text:
            print(text)
        for path, report in reports:
            say(summary(path, report))
    if any(report.unreadable for _, report in reports) and not paths:
        say("seawall: `seawall init` writes a first configuration")
    raise typer.Exit(max(_code(report, strict=strict) for _, report in reports))


def summary(path: Path, report: Report) -> str:
    """One line about one file."""
    name = printable(str(path))
    counts = [
        plural(len(found), noun) for found, noun in ((report.errors, "error"), (report.warnings, "warning")) if found
    ]
    if report.policy is None:
        return f"{name}: {', '.join(counts)}"
    return f"{name}: {', '.join(['ok', *counts])} ({contents(report.policy)})"


def contents(policy: Policy) -> str:
    """How much of what there is in a policy."""
    return ", ".join(
        plural(count, noun)
        for count, noun in (
            (len(policy.plans), "plan"),
            (len(policy.tenants), "tenant"),
            (len(policy.routes), "route"),
            (len(policy.keys), "key"),
        )
    )


def _code(report: Report, *, strict: bool) -> int:
    return exit_code(report) or (FOUND if strict and report.warnings else 0)
