"""What the demo shows: a table that lives, or plain lines; and at the end of each act what came of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from time import monotonic_ns
from typing import TYPE_CHECKING, Any, Literal, Protocol, final

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from seawall.cli.demo.callers import Caller, Tally, latencies, percentile
from seawall.cli.demo.client import Response
from seawall.cli.demo.verdict import Account, Check, by_caller
from seawall.rate import SECOND

if TYPE_CHECKING:
    from seawall.cli.demo.acts import Act, Played

BAR = 12
_INTERESTING = ("ratelimit", "retry-after", "cache-control", "content-type")


@final
@dataclass(frozen=True, slots=True)
class Row:
    """A caller with all its addresses. ``p50`` and ``p99`` are of what was served, in seconds."""

    caller: Caller
    plan: str
    priority: str
    asked: int
    admitted: int
    refused: Counter[str]
    at_most: int | None
    p50: float | None
    p99: float | None

    @property
    def why(self) -> str:
        """What refused it, the most frequent first."""
        return ", ".join(f"{policy} {count}" for policy, count in self.refused.most_common())


def rows(accounts: Iterable[Account]) -> list[Row]:
    """One row a caller, in the order of the accounts."""
    return [_row(group) for group in by_caller(accounts)]


def _row(group: Sequence[Account]) -> Row:
    bounds = [one.at_most for one in group if one.at_most is not None]
    tallies = [one.tally for one in group]
    took = latencies(tallies)
    return Row(
        caller=tallies[0].caller,
        plan=group[0].plan,
        priority=group[0].priority,
        asked=sum(one.asked for one in tallies),
        admitted=sum(one.admitted for one in tallies),
        refused=sum((one.refused for one in tallies), Counter()),
        at_most=sum(bounds) if bounds else None,
        p50=percentile(took, 0.5),
        p99=percentile(took, 0.99),
    )


def milliseconds(seconds: float | None) -> str:
    """``17 ms``, ``1.2 ms``, or a dash."""
    if seconds is None:
        return "-"
    return f"{seconds * 1e3:.0f} ms" if seconds >= 0.01 else f"{seconds * 1e3:.1f} ms"


class View(Protocol):
    """Shows the demo while it runs."""

    every: float
    """Seconds between two calls of `show`."""

    def act(self, act: Act, accounts: Sequence[Account], seconds: float, told: str = "") -> AbstractContextManager[Any]:
        """Show who is going to call; then, in the block, what becomes of them. ``told`` is a sentence more."""

    def show(self, accounts: Sequence[Account]) -> None: ...

    def say(self, text: str) -> None:
        """Something happens."""


@final
class PlainView:
    """A line a second, and one for the first refusal of each caller. Lines begin with the seconds since ``began``."""

    every = 0.25

    def __init__(self, console: Console, began: int) -> None:
        self._console = console
        self._began = began
        self._known: set[str] = set()
        self._shown = 0

    def say(self, text: str) -> None:
        self._console.print(f"{(monotonic_ns() - self._began) / SECOND:5.1f} s  {text}")

    @contextmanager
    def act(self, act: Act, accounts: Sequence[Account], seconds: float, told: str = "") -> Iterator[None]:
        self._console.print(introduction(act, accounts, seconds, told))
        self._known.clear()
        self._shown = monotonic_ns()
        self.say("served/asked so far")
        yield

    def show(self, accounts: Sequence[Account]) -> None:
        for line in first_refusals(accounts, self._known):
            self.say(line)
        now = monotonic_ns()
        if now - self._shown >= SECOND:
            self._shown = now
            cells = [f"{row.caller.name} {f'{row.admitted}/{row.asked}':<9}" for row in rows(accounts)]
            self.say(" ".join(cells).rstrip())


@final
class LiveView:
    """A table that is painted anew four times a second, and stays as it is at the end of an act."""

    every = 0.25

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, auto_refresh=False)
        self._known: set[str] = set()
        self._lines: list[str] = []
        self._began = 0
        self._seconds = 0.0

    @contextmanager
    def act(self, act: Act, accounts: Sequence[Account], seconds: float, told: str = "") -> Iterator[None]:
        self._console.print(introduction(act, accounts, seconds, told))
        self._known.clear()
        self._lines.clear()
        self._began, self._seconds = monotonic_ns(), seconds
        self._live = Live(console=self._console, auto_refresh=False)
        with self._live:
            yield

    def say(self, text: str) -> None:
        self._console.print(text)  # above the table, where there is one

    def show(self, accounts: Sequence[Account]) -> None:
        self._lines += first_refusals(accounts, self._known)
        elapsed = (monotonic_ns() - self._began) / SECOND
        progress = Text(f"{min(elapsed, self._seconds):.0f} of {self._seconds:.0f} s", style="dim")
        group = Group(self._table(rows(accounts)), progress, *map(Text, self._lines))
        self._live.update(group, refresh=True)

    def _table(self, current: Sequence[Row]) -> Table:
        table = _table(("who", "class", ">asked", ">served", ">refused", "", ">p99", "refused by"))
        unicode = self._console.encoding.startswith("utf")
        for row in current:
            table.add_row(
                row.caller.name,
                row.priority,
                str(row.asked),
                Text(str(row.admitted), style="green"),
                Text(str(row.refused.total()), style="red" if row.refused else "dim"),
                bar(row, unicode=unicode),
                milliseconds(row.p99),
                row.why,
            )
        return table


def _table(titles: Iterable[str]) -> Table:
    """A table whose columns are to the right where the title begins with ``>``."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in titles:
        justify: Literal["left", "right"] = "right" if title.startswith(">") else "left"
        table.add_column(title.removeprefix(">"), justify=justify, no_wrap=title != "refused by")
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
            lines.append(f"first {answer.status} for {name}: {detail(answer)}")
    return lines


def detail(response: Response) -> str:
    """The sentence of a refusal."""
    text = response.body.decode(errors="replace")
    _, found, rest = text.partition('"detail":"')
    return rest.partition('",')[0] if found else text


def introduction(act: Act, accounts: Sequence[Account], seconds: float, told: str = "") -> Text:
    """What is played, who is going to call, and what their plans give them."""
    text = Text()
    text.append(f"\nAct {act.number}: {act.title}, {seconds:g} s\n", style="bold")
    text.append(f"{act.story}{f' {told}' if told else ''}\n\n")
    for one, *_ in by_caller(accounts):
        caller = one.tally.caller
        many = len(caller.addresses)
        pace = f"{caller.pace:.0f}/s" + (f" from each of {many} addresses" if many > 1 else "")
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
    for name, value in shown_headers(response):
        text.append(f"  {name}: {value}\n", style="none")
    if response.status != 200:
        text.append(f"\n  {response.body.decode(errors='replace')}\n", style="none")
    return text


def shown_headers(response: Response) -> list[tuple[str, str]]:
    """Those that Seawall has written, and what belongs to them."""
    return [(name, value) for name, value in response.headers if name.lower().startswith(_INTERESTING)]


def summary(accounts: Sequence[Account]) -> Table:
    """What each caller got, beside the most that its plan gives in the time that it took."""
    table = _table(("who", ">asked", ">served", ">at most", ">refused", ">p50", ">p99", "refused by"))
    for row in rows(accounts):
        most = "-" if row.at_most is None else str(row.at_most)
        counts = (str(row.asked), str(row.admitted), most, str(row.refused.total()))
        table.add_row(row.caller.name, *counts, milliseconds(row.p50), milliseconds(row.p99), row.why)
    return table


def verdict(checks: Sequence[Check], notes: Sequence[str] = ()) -> Text:
    """What was checked and what failed, and what else there is to say."""
    text = Text("\n")
    for check in checks:
        text.append("  ok    " if check.ok else "  FAIL  ", style="green" if check.ok else "bold red")
        text.append(f"{check.text}\n", style="none")
    for note in notes:
        text.append(f"        {note}\n", style="dim")
    return text


def closing(played: Sequence[Played], missing: Sequence[tuple[Act, str]]) -> Text:
    """Which acts held."""
    text = Text("\n")
    for act, what in missing:
        text.append(f"Act {act.number} was not played. It needs {what}.\n", style="yellow")
    failed = [one.act for one in played if not one.held]
    for act in failed:
        text.append(f"Act {act.number} ({act.title}) did not hold.\n", style="bold red")
    held = len(played) - len(failed)
    return text.append(f"{held} of {len(played)} acts held.\n", style="bold red" if failed else "bold green")


def try_it(url: str, config: str) -> str:
    """Lines to type while the server runs."""
    return f"""\
  curl -i {url}/v1/items/7 -H 'X-API-Key: demo-key-of-acme'
  for i in 1 2 3 4 5 6 7 8; do curl -s -o /dev/null -w '%{{http_code}} ' {url}/v1/items/7; done; echo
  curl -i -X POST {url}/login
  curl -s {url}/metrics | grep -E '_(requests|rejections)_total.* [1-9]'
  seawall explain /v1/search --key demo-key-of-initech --config {config}"""
