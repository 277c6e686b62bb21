"""`seawall simulate`: who would have been refused by a policy, found out from access logs."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from seawall.cli.terminal import UNUSABLE, console, exit_code, fail, is_lively, plural, say, show, why, write
from seawall.config import check
from seawall.config.diagnostics import printable
from seawall.policy import Policy
from seawall.rate import SECOND
from seawall.replay.engine import wanted
from seawall.replay.fields import Field, Misnamed, parse_field
from seawall.replay.logs import AccessLog, LogError
from seawall.replay.plot import bars, png, svg
from seawall.replay.simulation import By, Simulation, stamp
from seawall.replay.tally import SERVED, Row, Timeline

_BARS = " ▁▂▃▄▅▆▇█"
_MOST_SERIES = 6


def run(
    policy_file: Annotated[Path, typer.Argument(metavar="[FILE]", help="The configuration to try.")] = Path(
        "seawall.yaml"
    ),
    log: Annotated[
        list[str] | None,
        typer.Option("--log", "-l", metavar="LOG", help="An access log, also .gz; - is stdin; may be repeated."),
    ] = None,
    field: Annotated[
        list[str] | None,
        typer.Option("--field", "-f", metavar="ROLE=NAME", help="Where a line says what; may be repeated."),
    ] = None,
    compare: Annotated[
        Path | None, typer.Option("--compare", metavar="OLD", help="Say what changes against this configuration.")
    ] = None,
    by: Annotated[By | None, typer.Option("--by", help="One table only: by policy, tenant, route or hour.")] = None,
    top: Annotated[int, typer.Option("--top", metavar="N", min=1, help="How many callers are listed.")] = 10,
    since: Annotated[
        str | None, typer.Option("--since", metavar="TIME", help="Count from here on, such as 2026-03-01T08:00.")
    ] = None,
    until: Annotated[str | None, typer.Option("--until", metavar="TIME", help="Count what is before.")] = None,
    tenant: Annotated[str | None, typer.Option("--tenant", metavar="ID", help="Count this tenant only.")] = None,
    form: Annotated[
        Literal["text", "json", "csv"], typer.Option("--format", help="text for people, json, or csv: one table.")
    ] = "text",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Where the result goes, instead of stdout.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw admitted and refused over time: .svg or .png.")
    ] = None,
) -> None:
    """Try a policy before it bites: who would have been refused, by which limit, how often and when.

    Every line of the log is a request, and is decided on by the objects that serve. Formats are found out: common,
    combined, or JSON with one object a line, also compressed. Nothing is sent anywhere and nothing is changed.

    A ROLE is time, start, ip, method, path, request (the request line), status, duration, tenant, key, forwarded or
    state:NAME. A NAME is a key of the JSON (request.headers.X-Tenant) or the number of a field in a text, counted from
    1; duration=NAME:ms says the unit (s, ms, us, ns), and NAME~PATTERN takes the first group of a regular expression.

    Exit codes: 0 done, whatever would be refused; 1 mistakes in a configuration; 2 a file that cannot be used.

    \b
    Examples:
      seawall simulate new.yaml --log access.log
      seawall simulate new.yaml --log access.log.2.gz --log access.log.1 --log access.log --compare seawall.yaml
      seawall simulate --log caddy.json --field tenant=request.headers.X-Tenant --by tenant --top 50
      seawall simulate --log access.log --since 2026-03-01 --until 2026-03-08 --plot week.svg
      zstdcat access.log.zst | seawall simulate --log - --format csv > refused.csv
    """
    if not log:
        fail("which log? --log access.log")
    if plot is not None and plot.suffix not in (".svg", ".png"):
        fail("--plot is a file that ends in .svg or .png")
    fields = _fields(field or [])
    window = _instant("--since", since, 0), _instant("--until", until, 1 << 63)
    policy = _policy(policy_file)
    against = _policy(compare) if compare is not None else None
    others = () if against is None else (against,)
    try:
        with ExitStack() as opened:
            logs = [opened.enter_context(AccessLog(path, wanted(policy, fields, *others))) for path in log]
            simulation = Simulation(policy, logs, against=against, since=window[0], until=window[1], tenant=tenant)
            _run(simulation)
    except LogError as error:
        message, *details = str(error).split("\n")
        for each in (f"seawall: {message}", *details):
            say(each)
        raise typer.Exit(UNUSABLE) from None
    if not simulation.tally.requests:
        fail(f"no request in {', '.join(each.name for each in logs)}" + _restrictions(since, until, tenant))
    if plot is not None:
        _draw(plot, simulation.tally.timeline)
    if form == "json":
        _put(json.dumps(simulation.document(top), indent=2) + "\n", output)
    elif form == "csv":
        _put(simulation.csv(by or "policy", top), output)
    elif output is not None:
        write(output, report(simulation, policy_file, compare, by, top).plain + "\n")
    else:
        where = console()
        where.print(report(simulation, policy_file, compare, by, top))
        if sys.stdout.isatty():
            _chart(simulation.tally.timeline, where)
    if form != "text":
        for note in simulation.notes():
            say(f"note: {note}")


def _fields(texts: Sequence[str]) -> dict[str, Field]:
    try:
        return dict(map(parse_field, texts))
    except Misnamed as error:
        fail(str(error))


def _policy(path: Path) -> Policy:
    found = check(path)
    if found.policy is None:
        show(found.errors, console(sys.stderr))
        raise typer.Exit(exit_code(found))
    return found.policy


def _instant(option: str, text: str | None, default: int) -> int:
    """Nanoseconds since the epoch; UTC where no zone is named."""
    if text is None:
        return default
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        fail(f"{option} is a date or a time, such as 2026-03-01 or 2026-03-01T08:00+01:00, not '{text[:40]}'")
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1) * 1_000


def _restrictions(since: str | None, until: str | None, tenant: str | None) -> str:
    given = (("--since", since), ("--until", until), ("--tenant", tenant))
    told = ", ".join(f"{option} {value}" for option, value in given if value is not None)
    return f" with {told}" if told else ""


def _run(simulation: Simulation) -> None:
    """Replay, with a bar on a terminal."""
    # Nothing here makes cycles, and looking for them in a window of 100,000 requests takes a fifth of the time.
    collecting = gc.isenabled()
    gc.disable()
    try:
        with _progress(sum(log.size for log in simulation.logs)) as progress:
            simulation.run(progress)
    finally:
        if collecting:
            gc.enable()


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    if not is_lively(sys.stderr):
        yield lambda _: None
        return
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        console=Console(file=sys.stderr),
        transient=True,
    )
    with bar:
        # Of a pipe nobody knows the size.
        task = bar.add_task("replaying", total=total or None)
        yield lambda done: bar.update(task, completed=done)


def _put(text: str, output: Path | None) -> None:
    if output is None:
        sys.stdout.write(text)
    else:
        write(output, text)


def _draw(path: Path, timeline: Timeline) -> None:
    width, columns = timeline.columns(120)
    drawing = bars(columns, width)
    if path.suffix == ".svg":
        write(path, svg(drawing))
        return
    try:
        path.write_bytes(png(drawing))
    except OSError as error:
        fail(f"{path} cannot be written: {why(error)}")


def report(simulation: Simulation, path: Path, old: Path | None, by: By | None, top: int) -> Text:
    """A simulation as people read it."""
    text = Text()
    for line in _summary(simulation, path, old):
        text.append(f"{line}\n")
    tables: tuple[By, ...] = ("policy", "tenant") if by is None else (by,)
    for each in tables:
        rows = simulation.table(each)
        if each == "tenant":
            rows = rows[:top]
        if rows:
            text.append("\n")
            _append_table(text, _cells(each, rows, shadow=simulation.tally.shadow > 0))
    if simulation.comparison is not None:
        changes = simulation.comparison.changes()[:top]
        if changes:
            text.append("\n")
            _append_table(text, _changes(changes))
    for note in simulation.notes():
        text.append("\nnote  ", style="bold")
        text.append(printable(note))
    text.rstrip()
    return text


def _summary(simulation: Simulation, path: Path, old: Path | None) -> Iterator[str]:
    tally = simulation.tally
    names = ", ".join(printable(log.name) for log in simulation.logs)
    yield f"{names}: {plural(tally.requests, 'request')} from {_clock(tally.first)} to {_clock(tally.last)}"
    with_status = ", ".join(f"{count:,} with {status}" for status, count in sorted(tally.statuses.items()))
    detail = f": {with_status}" if with_status else ""
    yield f"{printable(str(path))} refuses {tally.refused:,} of them ({_share(tally.refused, tally.requests)}){detail}"
    if tally.shadow:
        yield f"and would refuse {tally.shadow:,} more ({_share(tally.shadow, tally.requests)}) but for its shadow mode"
    if tally.exempt:
        yield f"{tally.exempt:,} {'is' if tally.exempt == 1 else 'are'} exempt"
    if tally.refused_then:
        yield f"{tally.refused_then:,} were answered 429 at the time"
    comparison = simulation.comparison
    if comparison is not None:
        changes = f"{comparison.newly:,} newly refused, {comparison.no_longer:,} no longer refused"
        yield f"against {printable(str(old))}, which refuses {comparison.refused_before:,}: {changes}"


_TITLES = {"policy": "limit", "tenant": "caller", "route": "rule", "hour": "hour"}


def _cells(by: By, rows: Sequence[Row], *, shadow: bool) -> list[tuple[str, ...]]:
    """A table with its head. The first column and those after the share are text, the others numbers."""
    head = [_TITLES[by], "refused", *(["shadow"] if shadow else []), "of", "share"]
    head += ["first", "last"] if by == "policy" else ["by", "on"] if by != "route" else ["by"]
    cells = [tuple(head)]
    for row in rows:
        name = _clock(int(row.name) * SECOND) if by == "hour" else printable(row.name)
        line = [name, f"{row.refused:,}", *([f"{row.shadow:,}"] if shadow else []), f"{row.requests:,}"]
        line.append(_share(row.refused + row.shadow, row.requests))
        if by == "policy":
            line += [_clock(row.first), _clock(row.last)] if row.first else ["", ""]
        else:
            line.append(_most(row.by))
            if by != "route":
                line.append(_most(row.on))
        cells.append(tuple(line))
    return cells


def _changes(changes: Sequence[dict[str, object]]) -> list[tuple[str, ...]]:
    cells: list[tuple[str, ...]] = [("caller", "newly refused", "no longer", "by", "by before")]
    for change in changes:
        newly, gone = change["newly_by"], change["no_longer_by"]
        assert isinstance(newly, dict)
        assert isinstance(gone, dict)
        numbers = (f"{change['newly_refused']:,}", f"{change['no_longer_refused']:,}")
        cells.append((printable(str(change["name"])), *numbers, _most(newly), _most(gone)))
    return cells


_NUMBERS = frozenset({"refused", "shadow", "of", "share", "newly refused", "no longer"})


def _append_table(text: Text, cells: Sequence[tuple[str, ...]]) -> None:
    head = cells[0]
    widths = [max(len(line[column]) for line in cells) for column in range(len(head))]
    for number, line in enumerate(cells):
        padded = (
            cell.rjust(width) if title in _NUMBERS else cell.ljust(width)
            for cell, width, title in zip(line, widths, head, strict=True)
        )
        text.append("  ".join(padded).rstrip(), style="bold" if number == 0 else "")
        text.append("\n")


def _most(counts: dict[str, int]) -> str:
    """The most frequent two of some counts."""
    if len(counts) == 1:
        return printable(next(iter(counts)))
    shown = [f"{printable(name)} {count:,}" for name, count in list(counts.items())[:2]]
    if len(counts) > 2:
        shown.append(f"{len(counts) - 2} more")
    return ", ".join(shown)


def _share(part: int, whole: int) -> str:
    share = 100 * part / whole if whole else 0.0
    return f"{share:.1f} %" if not part or share >= 0.05 else "<0.1 %"


def _clock(at: int) -> str:
    return stamp(at).replace("T", " ")


def _chart(timeline: Timeline, where: Console) -> None:
    try:
        _BARS.encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return
    where.print(chart(timeline, where.width))


def chart(timeline: Timeline, width: int) -> Text:
    """Requests and refusals over time, a line of bars for each limit that refused most, each by its own maximum."""
    totals: dict[str, int] = {}
    seconds, columns = timeline.columns(max(10, width - 45))
    for _, counts in columns:
        for series, count in counts.items():
            if series != SERVED:
                totals[series] = totals.get(series, 0) + count
    lines = [("requests", [sum(counts.values()) for _, counts in columns])]
    busiest = sorted(totals, key=lambda name: -totals[name])[:_MOST_SERIES]
    lines += [(series, [counts.get(series, 0) for _, counts in columns]) for series in busiest]
    label = min(28, max(len(name) for name, _ in lines))
    text = Text("\n")
    for name, values in lines:
        most = max(values)
        bars = "".join(_BARS[-(-value * 8 // most) if most else 0] for value in values)
        text.append(f"{printable(name)[:label]:<{label}}  ")
        text.append(bars, style="" if name == "requests" else "red")
        text.append(f"  at most {most:,}\n")
    text.append(f"{'':<{label}}  {_clock(columns[0][0] * SECOND)}, {_span(seconds)} a column")
    return text


def _span(seconds: int) -> str:
    """A width of time in its largest whole unit."""
    for unit, size in (("days", 86_400), ("hours", 3_600), ("minutes", 60), ("seconds", 1)):
        if seconds % size == 0:
            number = seconds // size
            return f"{number} {unit if number != 1 else unit[:-1]}"
    raise AssertionError("seconds are whole")
