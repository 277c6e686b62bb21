"""`seawall demo`: a real server, callers of several plans, and a summary that is computed from what happened.

`shop` is the application and `seawall.yaml` its limits; `serve` is the process that serves it and `server` what starts
and ends that; `callers` send requests through `client`; `verdict` compares what they got with what their plans give;
`screen` shows it.
"""

from __future__ import annotations

import asyncio
import json
import sys
from contextlib import suppress
from importlib.util import find_spec
from math import isnan
from pathlib import Path
from time import monotonic_ns, sleep
from typing import Annotated, Any

import typer
from rich.console import Console

from seawall.cli.demo import screen
from seawall.cli.demo.callers import CALLERS, Caller, Tally, call
from seawall.cli.demo.client import Connection
from seawall.cli.demo.server import Server, ServerFailed
from seawall.cli.demo.verdict import Account, Check, account, judge
from seawall.cli.explanation import explain
from seawall.cli.terminal import FOUND, console, fail, is_lively, say, write
from seawall.config import load
from seawall.rate import SECOND

CONFIG = Path(__file__).with_name("seawall.yaml")
SERVE_PORT = 8000
INTERRUPTED = 130


def run(
    seconds: Annotated[float, typer.Option("--seconds", min=1, max=300, help="How long the callers call.")] = 20,
    plain: Annotated[bool, typer.Option("--plain", help="A line a second, also on a terminal.")] = False,
    serve: Annotated[bool, typer.Option("--serve", help="Only serve, until Ctrl-C, for you to be the caller.")] = False,
    port: Annotated[
        int | None,
        typer.Option("--port", min=0, max=65535, help="The server's port.  [default: a free one; with --serve 8000]"),
    ] = None,
    report: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write what happened to a file as well.")
    ] = None,
) -> None:
    """See it work: a real server, callers of three plans and a flood, about 20 seconds.

    The server and everything that calls it is on 127.0.0.1 and ends with the demo.

    Exit codes: 0 every plan was held, 1 one was not (or the server counted something else), 2 it could not be run.

    \b
    Examples:
      seawall demo
      seawall demo --seconds 5 --plain --json result.json
      seawall demo --serve          # and be the caller yourself
    """
    if isnan(seconds):
        raise typer.BadParameter("nan is no number of seconds", param_hint="--seconds")
    if find_spec("uvicorn") is None:
        fail('the demo needs uvicorn: pip install "seawall[cli]"')
    try:
        if serve:
            _serve(SERVE_PORT if port is None else port)
            return
        _demonstrate(seconds, port or 0, report, lively=is_lively(sys.stdout) and not plain)
    except ServerFailed as error:
        fail(str(error))
    except KeyboardInterrupt:
        say("stopped")
        raise typer.Exit(INTERRUPTED) from None


def _serve(port: int) -> None:
    """Serve until Ctrl-C."""
    with Server(port) as server, suppress(KeyboardInterrupt):
        print(f"Serving at {server.url} until Ctrl-C. In another terminal:\n")
        print(screen.try_it(server.url, str(CONFIG)), flush=True)
        while server.is_running():
            sleep(0.2)
        fail(f"the server has ended: {server.said()}", FOUND)
    print()


def _demonstrate(seconds: float, port: int, report: Path | None, *, lively: bool) -> None:
    """Run the demo, and end the verb with its verdict."""
    out = console()
    with Server(port) as server:
        accounts, scrape, checks = asyncio.run(perform(server, seconds, out, lively=lively))
    out.print(screen.answers([one.tally for one in accounts]), end="")
    out.print(screen.metrics_slice(scrape), end="")
    out.print(screen.summary(accounts))
    out.print(screen.verdict(checks))
    out.print(f"To be the caller yourself: seawall demo --serve --port {SERVE_PORT}, and in another terminal:\n")
    out.print(screen.try_it(f"http://127.0.0.1:{SERVE_PORT}", str(CONFIG)))
    if report is not None:
        write(report, json.dumps(as_json(accounts, checks), indent=2) + "\n")
    if not all(check.ok for check in checks):
        raise typer.Exit(FOUND)


async def perform(
    server: Server, seconds: float, out: Console, *, lively: bool
) -> tuple[list[Account], str, list[Check]]:
    """Let the callers call for ``seconds``: what they got, what the server counted, what is to be said about it."""
    own = Connection(server.port)
    try:
        await own.request("GET", "/healthz", {})
    except OSError as error:
        raise ServerFailed(f"the server does not answer: {error or 'in time'}; {server.said()}") from None
    accounts = await open_accounts(CALLERS)
    out.print(screen.introduction(accounts, server.url, server.app))
    view: screen.View = screen.LiveView(out, seconds) if lively else screen.PlainView(out)
    began = monotonic_ns()
    until = began + round(seconds * SECOND)
    with view.running():
        async with asyncio.TaskGroup() as group:
            calls = [group.create_task(call(one.tally, server.port, until)) for one in accounts]
            while not all(task.done() for task in calls):
                await asyncio.wait(calls, timeout=view.every)
                view.show(accounts, (monotonic_ns() - began) / SECOND)
    try:
        scrape = (await own.request("GET", "/metrics", {})).body.decode()
    except OSError as error:
        scrape = f"# {error}"  # which agrees with nothing
    own.close()
    return accounts, scrape, judge(accounts, scrape, exempt=2)


async def open_accounts(callers: tuple[Caller, ...]) -> list[Account]:
    """An account for each address of each caller, with the limits that the loaded policy has for its request."""
    policy = load(CONFIG)
    return [
        account(Tally(caller, address), await explain(policy, caller.scope(address)))
        for caller in callers
        for address in caller.addresses
    ]


def as_json(accounts: list[Account], checks: list[Check]) -> dict[str, Any]:
    """What happened, for a program."""
    return {
        "ok": all(check.ok for check in checks),
        "callers": [
            {
                "name": one.tally.caller.name,
                "address": one.tally.address,
                "plan": one.plan,
                "seconds": one.tally.elapsed_ns / SECOND,
                "asked": one.tally.asked,
                "admitted": one.tally.admitted,
                "at_least": one.at_least,
                "at_most": one.at_most,
                "refused": dict(one.tally.refused),
                "errors": one.tally.errors,
            }
            for one in accounts
        ],
        "checks": [{"ok": check.ok, "text": check.text} for check in checks],
    }
