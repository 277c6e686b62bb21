"""What the demo shows: a table that lives, or plain lines; and at the end what came of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, final

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from seawall.cli.demo.callers import Caller, Tally
from seawall.cli.demo.client import Response
from seawall.cli.demo.verdict import Account, Check, by_caller

BAR = 24
_INTERESTING = ("ratelimit", "retry-after", "cache-control", "content-type")


@final
@dataclass(frozen=True, slots=True)
class Row:
    """A caller with all its addresses."""

    caller: Caller
    plan: str
    asked: int
    admitted: int
    refused: Counter[str]
    at_most: int | None

    @property
    def why(self) -> str:
        """The policies that refused, the most frequent first."""
        return ", ".join(f"{policy} {count}" for policy, count in self.refused.most_common())


def rows(accounts: Iterable[Account]) -> list[Row]:
    """One row a caller, in the order of the accounts."""
    return [_row(group) for group in by_caller(accounts)]


def _row(group: Sequence[Account]) -> Row:
    bounds = [one.at_most for one in group if one.at_most is not None]
    return Row(
        caller=group[0].tally.caller,
        plan=group[0].plan,
        asked=sum(one.tally.asked for one in group),
        admitted=sum(one.tally.admitted for one in group),
        refused=sum((one.tally.refused for one in group), Counter()),
        at_most=sum(bounds) if bounds else None,
    )


class View(Protocol):
    """Shows the demo while it runs."""

    every: float
    """Seconds between two calls of `show`."""

    def running(self) -> AbstractContextManager[Any]: ...

    def show(self, accounts: Sequence[Account], elapsed: float) -> None: ...


@final
class PlainView:
    """A line a second, and one for the first refusal of each caller."""

    every = 1.0

    def __init__(self, console: Console) -> None:
        self._console = console
        self._known: set[str] = set()

    def running(self) -> AbstractContextManager[Any]:
        self._console.print("admitted/asked so far")
        return nullcontext()

    def show(self, accounts: Sequence[Account], elapsed: float) -> None:
        cells = [f"{row.caller.name} {f'{row.admitted}/{row.asked}':<9}" for row in rows(accounts)]
        self._console.print(f"{elapsed:3.0f} s  " + " ".join(cells).rstrip())
        for line in first_refusals(accounts, self._known):
            self._console.print(f"       {line}")


@final
class LiveView:
    """A table that is painted anew four times a second."""

    every = 0.25

    def __init__(self, console: Console, seconds: float) -> None:
        self._console = console
        self._seconds = seconds
        self._live = Live(console=console, auto_refresh=False)
        self._known: set[str] = set()
        self._lines: list[str] = []
        self._before: dict[str, tuple[float, int]] = {}

    def running(self) -> AbstractContextManager[Any]:
        return self._live

    def show(self, accounts: Sequence[Account], elapsed: float) -> None:
        self._lines += first_refusals(accounts, self._known)
        progress = Text(f"{min(elapsed, self._seconds):.0f} of {self._seconds:.0f} s", style="dim")
        group = Group(self._table(rows(accounts), elapsed), progress, *map(Text, self._lines))
        self._live.update(group, refresh=True)

    def _table(self, current: Sequence[Row], elapsed: float) -> Table:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for title in ("who", "plan", "asks/s", "asked", "admitted", "429"):
            table.add_column(title, justify="left" if title in ("who", "plan") else "right")
        table.add_column("")
        table.add_column("why")
        for row in current:
            table.add_row(
                row.caller.name,
                row.plan,
                f"{row.asked / max(elapsed, 0.1):.0f}",
                str(row.asked),
                Text(str(row.admitted), style="green"),
                Text(str(row.refused.total()), style="red" if row.refused else "dim"),
                bar(row, unicode=self._console.encoding.startswith("utf")),
                row.why,
            )
        return table


def bar(row: Row, *, unicode: bool) -> Text:
    """How much of what was asked was admitted."""
    admitted = round(BAR * row.admitted / row.asked) if row.asked else 0
    refused = BAR - admitted if row.refused else 0
    full, light = ("█", "░") if unicode else ("#", ".")
    return Text(full * admitted, style="green").append(light * refused, style="red")


def first_refusals(accounts: Iterable[Account], known: set[str]) -> list[str]:
    """A line for each caller that was refused for the first time since ``known`` was passed before."""
    lines = []
    for one in accounts:
        name, answer = one.tally.caller.name, one.tally.refused_answer
        if answer is not None and name not in known:
            known.add(name)
            lines.append(f"first 429 for {name}: {detail(answer)}")
    return lines


def detail(response: Response) -> str:
    """The sentence of a refusal."""
    text = response.body.decode(errors="replace")
    _, found, rest = text.partition('"detail":"')
    return rest.partition('",')[0] if found else text


def introduction(accounts: Sequence[Account], url: str, app: str) -> Text:
    """Who is going to call, and what their plans give them."""
    text = Text()
    text.append("Seawall demo\n", style="bold")
    text.append(f"A {app} app on a real uvicorn at {url}, protected by one middleware and one YAML file.\n\n")
    for one, *_ in by_caller(accounts):
        caller = one.tally.caller
        many = len(caller.addresses)
        pace = f"{caller.pace:g}/s" + (f" from each of {many} addresses" if many > 1 else "")
        gives = "; ".join(f"{limit.name}: {limit.allowance}" for limit in one.limits) or "unlimited"
        text.append(f"  {caller.name:<10}", style="bold").append(f"{one.plan:<10} {caller.doing}, {pace}\n")
        text.append(f"{'':<23}{gives}\n", style="dim")
    return text


def answers(tallies: Iterable[Tally]) -> Text:
    """The headers of one answer that was allowed and of one that was refused, of the same caller if there is one."""
    text = Text()
    both = [tally for tally in tallies if tally.allowed_answer and tally.refused_answer]
    for tally in both[:1]:
        for answer in (tally.allowed_answer, tally.refused_answer):
            if answer is not None:
                text.append(f"\n{tally.caller.name}: {tally.caller.method} {tally.caller.target}\n", style="bold")
                text.append_text(_answer(answer))
    return text


def _answer(response: Response) -> Text:
    text = Text(f"  HTTP/1.1 {response.status}\n", style="green" if response.status == 200 else "red")
    for name, value in response.headers:
        if name.lower().startswith(_INTERESTING):
            text.append(f"  {name}: {value}\n", style="none")
    if response.status != 200:
        text.append(f"\n  {response.body.decode(errors='replace')}\n", style="none")
    return text


def metrics_slice(scrape: str) -> Text:
    """The lines of a scrape that tell what happened."""
    text = Text("\nGET /metrics\n", style="bold")
    for line in scrape.splitlines():
        if line.startswith(("seawall_requests_total{", "seawall_rejections_total{")) and not line.endswith(" 0.0"):
            text.append(f"  {line}\n", style="none")
    return text


def summary(accounts: Sequence[Account]) -> Table:
    """What each caller got, beside the most that its plan gives in the time that it took."""
    table = Table(box=None, pad_edge=False, header_style="bold", title="\nWhat happened", title_justify="left")
    for title in ("who", "plan", "asked", "admitted", "at most", "429", "refused by"):
        table.add_column(title, justify="left" if title in ("who", "plan", "refused by") else "right")
    for row in rows(accounts):
        most = "-" if row.at_most is None else str(row.at_most)
        counts = (str(row.asked), str(row.admitted), most, str(row.refused.total()))
        table.add_row(row.caller.name, row.plan, *counts, row.why)
    return table


def verdict(checks: Sequence[Check]) -> Text:
    """What was checked, what failed, and whether all is well."""
    text = Text("\n")
    for check in checks:
        text.append("  ok    " if check.ok else "  FAIL  ", style="green" if check.ok else "bold red")
        text.append(f"{check.text}\n", style="none")
    failed = sum(not check.ok for check in checks)
    text.append(
        f"\n{failed} of {len(checks)} checks failed.\n" if failed else "\nEvery plan was held.\n",
        style="bold red" if failed else "bold green",
    )
    return text


def try_it(url: str, config: str) -> str:
    """Lines to type while the server runs."""
    return f"""\
  curl -i {url}/v1/items/7 -H 'X-API-Key: demo-key-of-acme'
  for i in 1 2 3 4 5 6 7 8; do curl -s -o /dev/null -w '%{{http_code}} ' {url}/v1/items/7; done; echo
  curl -i -X POST {url}/login
  curl -s {url}/metrics | grep -E '_(requests|rejections)_total.* [1-9]'
  seawall explain /v1/search --key demo-key-of-initech --config {config}"""
