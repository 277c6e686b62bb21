"""`seawall top`: a running service, live."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from select import select
from typing import Annotated, Any, NoReturn, final

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from seawall.cli.status import URL_HELP, Unreachable, address_of, counts, fetch, limit_text
from seawall.cli.terminal import console, fail, is_lively, say
from seawall.config.diagnostics import printable

MOST_CALLERS = 10
_KEYBOARD = 0
OUTCOMES = ("allowed", "limited", "shed", "expired", "denied", "exempt", "cancelled")


def run(
    url: Annotated[str, typer.Argument(metavar="URL", help=URL_HELP)],
    interval: Annotated[
        float, typer.Option("--interval", "-i", min=0.1, max=3600, help="Seconds between two looks.")
    ] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Print the first line and end.")] = False,
) -> None:
    """Watch a running service: requests a second by outcome, limit, in flight and queue by class, who is refused.

    q or Ctrl-C leaves. Not a terminal: a line for each look.

    Exit codes: 0 left; 2 the service cannot be asked to begin with.

    \b
    Examples:
      seawall top localhost:8000
      seawall top localhost:8000 --interval 10 >> seawall.log
      seawall top localhost:8000 --once
    """
    address = address_of(url)
    try:
        first = fetch(address)
    except Unreachable as error:
        fail(str(error))
    if is_lively(sys.stdout) and not once:
        with suppress(KeyboardInterrupt), _ending(), _keys() as pressed:
            watch(address, first, interval, pressed, console())
    else:
        with suppress(KeyboardInterrupt), _pipe():
            follow(address, first, interval, once=once)


@final
class Pace:
    """How fast what is counted grows, between the last two documents."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        self.document = document
        self._at = time.monotonic()
        self.rates: dict[str, float] | None = None
        """Requests a second by outcome; ``None`` where there is nothing to compare with."""
        self.shed: dict[str, float] | None = None

    def add(self, document: Mapping[str, Any]) -> None:
        before, self.document = self.document, document
        at, self._at = self._at, time.monotonic()
        seconds = self._at - at
        self.rates = _growth(before["requests"], document["requests"], seconds)
        self.shed = _growth(before["shed"], document["shed"], seconds)


def _growth(before: Mapping[str, float], after: Mapping[str, float], seconds: float) -> dict[str, float] | None:
    grown = {name: value - before.get(name, 0) for name, value in after.items()}
    # Another process has answered, or the same one that has begun anew.
    if seconds <= 0 or any(change < 0 for change in grown.values()):
        return None
    return {name: change / seconds for name, change in grown.items()}


def follow(address: str, first: Mapping[str, Any], interval: float, *, once: bool) -> None:
    """A line for each look, for ever; with ``once`` the first one."""
    pace = Pace(first)
    while True:
        time.sleep(interval)
        try:
            pace.add(fetch(address))
        except Unreachable as error:
            if once:
                fail(str(error))
            say(f"seawall: {error}")
            continue
        print(line(pace), flush=True)
        if once:
            return


def line(pace: Pace) -> str:
    """All that matters, in one line."""
    document = pace.document
    parts = [printable(document["time"])]
    parts += [f"{name} {_per_second(pace.rates, name)}" for name in OUTCOMES if document["requests"].get(name)]
    overload = document["overload"]
    if isinstance(overload.get("limit"), int | float):
        parts.append(f"in flight {sum(document['inflight'].values()):,}/{overload['limit']:,}")
        parts.append(f"queued {sum(document['queued'].values()):,}")
    if document["refused"]:
        busiest = document["refused"][0]
        parts.append(f"most refused {printable(busiest['caller'])} {busiest['count']:,}")
    parts += [printable(one["text"]) for one in document["attention"] if one["level"] == "alert"]
    return "  ".join(parts)


def _per_second(rates: Mapping[str, float] | None, name: str) -> str:
    return "-" if rates is None else f"{rates.get(name, 0.0):,.1f}/s"


def watch(
    address: str, first: Mapping[str, Any], interval: float, pressed: Callable[[float], str], screen: Console
) -> None:
    """Paint what there is until q is pressed."""
    pace, trouble = Pace(first), ""
    with Live(console=screen, screen=True, auto_refresh=False) as live:
        while True:
            live.update(view(address, pace, trouble), refresh=True)
            if pressed(interval) in ("q", "Q"):
                return
            try:
                pace.add(fetch(address))
                trouble = ""
            except Unreachable as error:
                trouble = str(error)


def view(address: str, pace: Pace, trouble: str) -> Group:
    """The screen: what needs attention first."""
    document = pace.document
    policy = document["policy"]
    head = Text()
    head.append("Seawall", style="bold").append(f"  {printable(address)}  {printable(document['time'])}", style="none")
    about = Text(
        f"{policy['mode']}, policy {policy['digest']}, up for {document['uptime']:,.0f} s; q leaves", style="dim"
    )
    alerts = [
        Text(printable(one["text"]), style="bold red" if one["level"] == "alert" else "yellow")
        for one in document["attention"]
    ]
    if trouble:
        alerts.insert(0, Text(f"What is shown is old: {printable(trouble)}", style="bold red"))
    return Group(
        head,
        about,
        *alerts,
        Text(),
        _outcomes(pace),
        Text(),
        Text(limit_text(document["overload"])),
        _classes(pace),
        Text(),
        _callers(document),
    )


def _table(*columns: str) -> Table:
    """One whose columns but the first are numbers."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for at, column in enumerate(columns):
        table.add_column(column, justify="right" if at else "left", min_width=10, no_wrap=True)
    return table


def _outcomes(pace: Pace) -> Table:
    table = _table("requests", "per second", "in all")
    for name, value in pace.document["requests"].items():
        style = "none" if value else "dim"
        table.add_row(printable(name), _per_second(pace.rates, name), f"{value:,}", style=style)
    return table


def _classes(pace: Pace) -> Table:
    document = pace.document
    table = _table("class", "in flight", "queued", "shed", "in all")
    for name in {**document["inflight"], **document["queued"], **document["shed"]}:
        table.add_row(
            printable(name),
            f"{document['inflight'].get(name, 0):,}",
            f"{document['queued'].get(name, 0):,}",
            _per_second(pace.shed, name),
            f"{document['shed'].get(name, 0):,}",
        )
    return table


def _callers(document: Mapping[str, Any]) -> Table:
    table = _table("most refused", "kind", "refused")
    table.add_column("why", no_wrap=True, overflow="ellipsis")
    for one in document["refused"][:MOST_CALLERS]:
        name = Text(printable(one["caller"]), overflow="ellipsis")
        table.add_row(name, printable(one["kind"]), f"{one['count']:,}", counts(one["reasons"]))
    return table


@contextmanager
def _keys() -> Iterator[Callable[[float], str]]:
    """A function that waits so many seconds for a key, and gives it; nothing where there is no keyboard."""
    if sys.platform == "win32" or not os.isatty(_KEYBOARD):
        yield _wait
        return
    import termios
    import tty

    before = termios.tcgetattr(_KEYBOARD)
    try:
        tty.setcbreak(_KEYBOARD)
        yield _pressed
    finally:
        termios.tcsetattr(_KEYBOARD, termios.TCSADRAIN, before)


def _wait(seconds: float) -> str:
    time.sleep(seconds)
    return ""


def _pressed(seconds: float) -> str:
    if not select([_KEYBOARD], [], [], seconds)[0]:
        return ""
    # Nothing at all: the terminal is gone.
    return os.read(_KEYBOARD, 1).decode("latin-1") or "q"


@contextmanager
def _ending() -> Iterator[None]:
    """Leave the terminal as it was also when the process is told to end."""

    def leave(number: int, _: object) -> NoReturn:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _pipe() -> Iterator[None]:
    """End quietly when nobody reads any more."""
    try:
        yield
    except BrokenPipeError:
        # Or Python would complain as it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
