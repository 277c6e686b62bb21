"""The verbs, put together."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Literal, TypeAlias

import typer

from seawall import __version__
from seawall.cells import METRICS_DIR
from seawall.cli import (
    check,
    demo,
    diff,
    explain,
    export,
    hash_key,
    history,
    init,
    run,
    schema,
    simulate,
    status,
    tenant,
    top,
)
from seawall.cli.terminal import is_lively

Look: TypeAlias = Literal["rich"] | None


def build(look: Look | Literal["auto"] = "auto") -> typer.Typer:
    """The command line. ``look`` None is plain help, for pipes and ``NO_COLOR``."""
    if look == "auto":
        look = "rich" if is_lively(sys.stdout) else None
    app = typer.Typer(
        name="seawall",
        rich_markup_mode=look,
        add_completion=False,
        # A traceback with local variables would print keys.
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback(invoke_without_command=True)(_seawall)
    app.command("init")(init.run)
    app.command("check")(check.run)
    app.command("diff")(diff.run)
    app.command("history")(history.run)
    app.command("schema")(schema.run)
    app.command("demo")(demo.run)
    app.command("explain")(explain.run)
    app.command("simulate")(simulate.run)
    app.command("run", context_settings=run.SETTINGS)(run.run)
    app.command("status")(status.run)
    app.command("top")(top.run)
    app.command("hash-key")(hash_key.run)
    export.register(app, typer.Typer(rich_markup_mode=look))
    tenant.register(app, typer.Typer(rich_markup_mode=look))
    return app


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"seawall {__version__}")
        raise typer.Exit


def _seawall(
    context: typer.Context,
    _version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Overload protection and fair admission for ASGI services: plans and limits from one YAML file.

    \b
    See it work:           seawall demo
    Begin:                 seawall init
    After every change:    seawall check
    "Why was I refused?":  seawall explain POST /login --ip 203.0.113.7
    """
    if context.invoked_subcommand != "run":
        os.environ.pop(METRICS_DIR, None)  # what is tried out is not counted among what is served
    if context.invoked_subcommand is None:
        print(context.get_help())
