"""The page that is kept of a demo: what happened, drawn and in tables, in one file that needs nothing else.

No script, no font and nothing from anywhere: it can be mailed. It follows the reader's choice of light or dark.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from html import escape
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from seawall import __version__
from seawall.cli.demo.callers import Answered, Outcome, Tally, percentile
from seawall.cli.demo.plots import Point, Series, Span, lines, stacked
from seawall.cli.demo.scrape import Reading, spans
from seawall.cli.demo.screen import milliseconds, rows, shown_headers
from seawall.cli.demo.verdict import Account
from seawall.rate import SECOND

if TYPE_CHECKING:
    from seawall.cli.demo.acts import Act, Played

MARK = '<meta name="generator" content="seawall demo">'
"""By which a page of an earlier demo is known, which may be replaced."""

BAR_SECONDS, LINE_SECONDS = 0.25, 0.5
"""What one bar, and one point of a percentile, is about."""

PACKAGES = ("uvicorn", "uvloop", "httptools", "fastapi", "starlette", "hiredis", "prometheus-client", "pydantic")

# Okabe and Ito's colours, which are told apart with every kind of colour vision; darker or lighter where the
# background asks for it. What means the same is never told by colour alone: names stand beside it, p99 is dashed.
LIGHT = {
    "served": "#0072b2",
    "limited": "#b87400",
    "shed": "#b0437f",
    "failed": "#1a1a1a",
    "critical": "#0072b2",
    "normal": "#b86b00",
    "low": "#00805c",
    "one": "#0072b2",
    "other": "#b86b00",
    "third": "#00805c",
}
DARK = {
    "served": "#4ba3dd",
    "limited": "#f0b429",
    "shed": "#e58fbf",
    "failed": "#f2f2f2",
    "critical": "#4ba3dd",
    "normal": "#f0b429",
    "low": "#2fc79a",
    "one": "#4ba3dd",
    "other": "#f0b429",
    "third": "#2fc79a",
}
LIGHT_PAGE = {"back": "#ffffff", "text": "#1b1f24", "faint": "#57606a", "rule": "#d8dee4", "span": "#eceff3"}
DARK_PAGE = {"back": "#14181d", "text": "#e6e9ed", "faint": "#a0a9b4", "rule": "#333b45", "span": "#262d36"}
GOOD, BAD = {"light": "#1a7f4b", "dark": "#4cc38a"}, {"light": "#b42318", "dark": "#ff8a7a"}


def refuses(path: Path) -> str | None:
    """Why the page cannot be written to ``path``, if that is known beforehand."""
    if path.is_dir():
        return f"{path} is a directory"
    if not os.access(path.parent, os.W_OK):
        return f"nothing can be written into {path.parent}"
    try:
        with path.open("rb") as file:
            if MARK.encode() not in file.read(1_000):
                return f"{path} is there already and is no page of a demo"
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"{path}: {error.strerror}"
    return None


def page(played: Sequence[Played], missing: Sequence[tuple[Act, str]], seconds: float) -> str:
    """The page about a demo that took ``seconds``."""
    held = sum(one.held for one in played)
    verdict = f"{held} of {len(played)} acts held"
    told = (
        f"Real servers and real callers on one machine, for {seconds:.0f} s. Everything below is computed from what "
        "happened, and compared with what the servers counted at <code>/metrics</code>."
    )
    body = [
        "<h1>Seawall demo</h1>",
        f'<p class="{"good" if held == len(played) else "bad"}"><strong>{verdict}</strong></p>',
        f"<p>{told}</p>",
        _table(("act", "", "held"), [_overview(one) for one in played] + [_absent(*one) for one in missing]),
        *map(_act, played),
        "<h2>Where it was measured</h2>",
        _table(("", ""), [tuple(map(escape, pair)) for pair in machine()]),
    ]
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n{MARK}\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>Seawall demo: {verdict}</title>\n<style>\n{_style()}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def _overview(one: Played) -> tuple[str, ...]:
    return (f'<a href="#act-{one.act.number}">{one.act.number}</a>', escape(one.act.title), _mark(one.held))


def _absent(act: Act, what: str) -> tuple[str, ...]:
    return (str(act.number), escape(f"{act.title}: it needs {what}"), "not played")


def _mark(ok: bool) -> str:
    return '<span class="good">ok</span>' if ok else '<span class="bad">FAIL</span>'


# An act


def _act(one: Played) -> str:
    """The section of an act."""
    figures = "\n".join(f"<figure>{figure}</figure>" for figure in plots(one))
    checks = "".join(f"<li>{_mark(check.ok)} {escape(check.text)}</li>" for check in one.checks)
    notes = "".join(f"<p>{escape(note)}.</p>" for note in one.notes)
    return "\n".join(
        [
            f'<section id="act-{one.act.number}">',
            f"<h2>Act {one.act.number}: {escape(one.act.title)} {_mark(one.held)}</h2>",
            f"<p>{escape(one.act.story)}</p>",
            notes,
            figures,
            *([_callers("Before", one.before)] if one.before else []),
            _callers("The callers", one.accounts),
            f"<h3>What had to be so</h3>\n<ul>{checks}</ul>",
            _compared(one),
            *_exchange(one.accounts),
            "</section>",
        ]
    )


def plots(one: Played) -> list[str]:
    """The figures of an act."""
    seconds = (one.ended - one.began) / SECOND
    answered = [answer for account in (*one.before, *one.accounts) for answer in account.tally.answered]
    marked = [Span((start - one.began) / SECOND, (end - one.began) / SECOND, label) for start, end, label in one.spans]
    figures = [
        stacked("What became of the requests", "requests/s", outcomes(answered, one.began, seconds), seconds, marked),
        lines("Time of what was served", "ms (log)", times(one, seconds), seconds, marked, log=True),
    ]
    if one.before:
        gauges: tuple[tuple[str, str, Callable[[Reading], float | None]], ...] = (
            ("concurrency limit", "other", lambda reading: reading.limit),
            ("in flight", "one", lambda reading: reading.inflight),
            ("waiting", "third", lambda reading: reading.queued),
        )
        series = [
            Series(name, colour, [(_since(reading.at, one), read(reading)) for reading in one.readings[0]])
            for name, colour, read in gauges
        ]
        figures.append(lines("The server's limit", "requests", series, seconds, marked))
    if one.outage is not None:
        away = [
            Span(_since(start, one), _since(end, one), f"process {row + 1} decides alone", row, len(one.readings))
            for row, readings in enumerate(one.readings)
            for start, end in spans(readings)
        ]
        first = one.accounts[0].tally
        left = Series("left, as answers say", "one", [(_since(item.at, one), item.left) for item in first.answered])
        figures.append(lines(f"What {first.caller.name} has left", "requests", [left], seconds, away))
    return figures


def _since(at: int, one: Played) -> float:
    return (at - one.began) / SECOND


def outcomes(answered: Iterable[Answered], began: int, seconds: float) -> list[Series]:
    """Requests a second by what became of them, for each bar."""
    kinds: tuple[Outcome, ...] = get_args(Outcome)
    count = max(1, round(seconds / BAR_SECONDS))
    bars = {kind: [0] * count for kind in kinds}
    for one in answered:
        bars[one.outcome][min(count - 1, max(0, int((one.at - began) / SECOND / BAR_SECONDS)))] += 1
    return [
        Series(kind, kind, [(index * BAR_SECONDS, found / BAR_SECONDS) for index, found in enumerate(bars[kind])])
        for kind in kinds
        if any(bars[kind])
    ]


def times(one: Played, seconds: float) -> list[Series]:
    """The median and the 99th percentile of the time of what was served, in milliseconds, for each class."""
    found = []
    for name in dict.fromkeys(account.priority for account in one.accounts):
        tallies = [each.tally for each in (*one.before, *one.accounts) if each.priority == name]
        for part, label, dashed in ((0.5, "p50", False), (0.99, "p99", True)):
            points = over_time(tallies, one.began, seconds, part)
            found.append(Series(f"{name} {label}", name, points, dashed))
    return found


def over_time(tallies: Iterable[Tally], began: int, seconds: float, part: float) -> list[Point]:
    """A percentile of the time of what was served, in milliseconds, at the middle of each stretch."""
    count = max(1, round(seconds / LINE_SECONDS))
    took: list[list[float]] = [[] for _ in range(count)]
    for tally in tallies:
        for one in tally.answered:
            if one.outcome == "served":
                at = int((one.at - began) / SECOND / LINE_SECONDS)
                took[min(count - 1, max(0, at))].append(one.took / SECOND * 1e3)
    return [((index + 0.5) * LINE_SECONDS, percentile(sorted(found), part)) for index, found in enumerate(took)]


def _callers(title: str, accounts: Sequence[Account]) -> str:
    body = []
    for row in rows(accounts):
        most = "-" if row.at_most is None else f"{row.at_most:,}"
        texts = (row.caller.name, row.caller.doing, row.plan, row.priority)
        numbers = (f"{row.asked:,}", f"{row.admitted:,}", most, f"{row.refused.total():,}")
        took = (milliseconds(row.p50), milliseconds(row.p99))
        body.append(tuple(map(escape, (*texts, *numbers, *took, row.why))))
    titles = ("who", "", "plan", "class", ">asked", ">served", ">at most", ">refused", ">p50", ">p99", "refused by")
    return f"<h3>{title}</h3>\n{_table(titles, body)}"


def _compared(one: Played) -> str:
    body = [(escape(each.what), f"{each.callers:,}", f"{each.server:,}") for each in one.compared]
    return f"<h3>Both sides of the count</h3>\n{_table(('', '>callers saw', '>/metrics says'), body)}"


def _exchange(accounts: Iterable[Account]) -> Iterable[str]:
    """One answer that was allowed and one that was refused, of the first caller that has both."""
    for one in accounts:
        tally = one.tally
        if tally.allowed_answer and tally.refused_answer:
            texts = []
            for answer in (tally.allowed_answer, tally.refused_answer):
                head = "\n".join(f"{name}: {value}" for name, value in shown_headers(answer))
                body = "" if answer.status == 200 else f"\n\n{answer.body.decode(errors='replace')}"
                texts.append(f"HTTP/1.1 {answer.status}\n{head}{body}")
            shown = "".join(f"<pre>{escape(text)}</pre>" for text in texts)
            yield f"<h3>{escape(f'{tally.caller.name}: {tally.caller.method} {tally.caller.target}')}</h3>\n{shown}"
            return


def _table(titles: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A table of cells that are HTML already; those of a column whose title begins with ``>`` are to the right."""
    sides = [' class="number"' if title.startswith(">") else "" for title in titles]
    cells = [f"<th{side}>{title.removeprefix('>')}</th>" for side, title in zip(sides, titles, strict=True)]
    head = f"<thead><tr>{''.join(cells)}</tr></thead>" if any(titles) else ""
    lines_ = [
        "<tr>" + "".join(f"<td{side}>{cell}</td>" for side, cell in zip(sides, row, strict=True)) + "</tr>"
        for row in body
    ]
    return f'<div class="wide"><table>{head}<tbody>{"".join(lines_)}</tbody></table></div>'


def machine() -> list[tuple[str, str]]:
    """Where it ran, and with what: nothing that names the machine or its user."""
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return [
        ("when", datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")),
        ("Seawall", __version__),
        ("Python", f"{platform.python_implementation()} {platform.python_version()}"),
        ("system", f"{platform.system()} {platform.release()}, {platform.machine()}, {os.cpu_count()} cores"),
        ("packages", ", ".join(found)),
    ]


def _style() -> str:
    light = {**LIGHT, **LIGHT_PAGE, "good": GOOD["light"], "bad": BAD["light"]}
    dark = {**DARK, **DARK_PAGE, "good": GOOD["dark"], "bad": BAD["dark"]}
    return (
        f":root {{ color-scheme: light dark; {_variables(light)} }}\n"
        f"@media (prefers-color-scheme: dark) {{ :root {{ {_variables(dark)} }} }}\n{_RULES}"
    )


def _variables(values: dict[str, str]) -> str:
    return " ".join(f"--{name}: {value};" for name, value in values.items())


_RULES = """\
body { background: var(--back); color: var(--text); font: 16px/1.5 system-ui, sans-serif; max-width: 62rem;
  margin: 2rem auto; padding: 0 1rem; }
h1, h2, h3 { line-height: 1.2; }
h2 { margin-top: 3rem; border-top: 1px solid var(--rule); padding-top: 1.5rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem; }
a { color: inherit; }
.good { color: var(--good); font-weight: 600; }
.bad { color: var(--bad); font-weight: 600; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; }
th, td { text-align: left; padding: .2rem .8rem .2rem 0; border-bottom: 1px solid var(--rule); vertical-align: top; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
ul { list-style: none; padding: 0; font-size: .875rem; }
pre { overflow-x: auto; border: 1px solid var(--rule); padding: .6rem .8rem; font-size: .8125rem; white-space: pre-wrap;
  overflow-wrap: anywhere; }
figure { margin: 1rem 0; }
.plot { width: 100%; height: auto; display: block; }
.plot text { fill: var(--text); font: 12px system-ui, sans-serif; }
.plot .title { font-weight: 600; font-size: 13px; }
.plot .tick, .plot .label { fill: var(--faint); font-size: 11px; }
.plot .unit { text-anchor: middle; }
.plot .line { fill: none; stroke-width: 2; stroke-linejoin: round; }
.plot .grid { stroke: var(--rule); stroke-width: 1; }
.plot .axis { stroke: var(--faint); stroke-width: 1; }
.plot .span { fill: var(--span); }
@media print { section { break-inside: avoid; } }
"""
