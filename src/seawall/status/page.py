"""The status page: one HTML document that loads nothing and is whole without its script.

Rendering happens here and nowhere else. The script is sent the same ``<main>`` again and puts what differs in place, so
that names that strangers chose are escaped by one function, `text`.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from hashlib import sha256
from html import escape
from importlib.resources import files
from typing import Any, TypeAlias, final

from seawall.config.diagnostics import printable
from seawall.status.document import Document, when

REFRESH = 10
"""Seconds after which a browser without scripts loads the page again."""

_MOST_CHARACTERS = 300


@final
class Html(str):
    """Text that is markup already."""

    __slots__ = ()


Cell: TypeAlias = "str | int | float | Html | None"


def page(document: Document) -> str:
    """The whole page."""
    return _FRAME.format(
        style=asset("page.css"),
        script=asset("page.js"),
        refresh=REFRESH,
        title=_title(document),
        version=text(document["version"]),
        main=main(document),
    )


def content_security_policy() -> str:
    """What the page may do: its own style and script, and asking this origin again."""
    return (
        f"default-src 'none'; style-src '{_hash('page.css')}'; script-src '{_hash('page.js')}'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


@cache
def asset(name: str) -> str:
    """A file beside this one."""
    return files("seawall.status").joinpath(name).read_text("utf-8")


def _hash(name: str) -> str:
    return "sha256-" + b64encode(sha256(asset(name).encode()).digest()).decode()


def text(value: object) -> Html:
    """Anything as it can be shown in markup: no tags, nothing invisible, and of a length that fits."""
    shown = printable(str(value))
    if len(shown) > _MOST_CHARACTERS:
        shown = shown[: _MOST_CHARACTERS - 3] + "..."
    return Html(escape(shown))


def _title(document: Document) -> str:
    alerts = sum(one["level"] == "alert" for one in document["attention"])
    return f"({alerts}) Seawall" if alerts else "Seawall"


def main(document: Document) -> str:
    """The part of the page that changes."""
    failed = document["reload"]["error"] is not None
    parts = (
        _attention(document["attention"]),
        _reload(document["reload"], whole=True) if failed else "",
        _requests(document),
        _overload(document),
        _refused(document),
        _policy(document["policy"], document["limits"]),
        "" if failed else _reload(document["reload"], whole=False),
        _backend(document["backend"]),
        _process(document),
        _history(document["history"]),
    )
    return f'<main data-title="{_title(document)}">\n{"".join(parts)}</main>'


def _attention(items: Sequence[Mapping[str, Any]]) -> str:
    rows = [f'<li class="{"alert" if one["level"] == "alert" else "note"}">{text(one["text"])}</li>' for one in items]
    if not any(one["level"] == "alert" for one in items):
        rows.append('<li class="well">Nothing needs attention.</li>')
    listed = "\n".join(rows)
    return (
        '<section id="attention" class="whole" aria-live="polite" aria-labelledby="attention-title">\n'
        f'<h2 id="attention-title">Needs attention</h2>\n<ul>\n{listed}\n</ul>\n</section>\n'
    )


def _requests(document: Document) -> str:
    outcomes = [
        (outcome, count, Html(f'<td class="number live" data-own data-rate="{text(outcome)}"></td>'))
        for outcome, count in document["requests"].items()
    ]
    body = _table(("outcome", "requests", Html('<th scope="col" class="number live">per second</th>')), outcomes)
    reasons = [
        (reason, document["rejections"].get(reason, 0), document["shadow"].get(reason, 0))
        for reason in sorted({*document["rejections"], *document["shadow"]})
    ]
    if reasons:
        body += _heading("Why they were refused") + _table(("reason", "refused", "in shadow mode, would be"), reasons)
    return _section("requests", "Requests", body)


def _overload(document: Document) -> str:
    overload = document["overload"]
    body = ""
    if overload:
        body = _facts(
            (
                "concurrency limit",
                f"{overload['limit']:,}" + (f" ({overload['reason']})" if overload["reason"] else ""),
            ),
            ("in flight", overload["in_flight"]),
            ("event loop lag", f"{overload['lag'] * 1e3:.1f} ms"),
            ("utilization", f"{overload['utilization'] * 100:.0f} %"),
        )
        body += _CHART
    classes = [
        (name, document["inflight"].get(name, 0), document["queued"].get(name, 0), document["shed"].get(name, 0))
        for name in {**document["inflight"], **document["queued"], **document["shed"]}
    ]
    body += _heading("By class") + _table(("class", "in flight", "queued", "shed"), classes)
    if document["streams"]:
        body += _heading("Open streams") + _table(("rule", "open"), document["streams"].items())
    return _section("overload", "Overload", body)


def _refused(document: Document) -> str:
    refused = [
        (_name(one["caller"]), one["kind"], one["count"], _counts(one["reasons"]), _counts(one["policies"]))
        for one in document["refused"]
    ]
    body = _table(("caller", "kind", "refused", "reasons", "policies"), refused, otherwise="Nobody, lately.")
    blocked = [(_name(one["tenant"]), _when(one["until"]), one.get("reason")) for one in document["blocked"]]
    if blocked:
        body += _heading("Blocked") + _table(("tenant", "until", "reason"), blocked)
    return _section("refused", "Who was refused", body, whole=True)


def _policy(policy: Mapping[str, Any], limits: Iterable[Mapping[str, Any]]) -> str:
    body = _facts(
        ("mode", policy["mode"]),
        ("digest", Html(f"<code>{text(policy['digest'])}</code>")),
        ("files", Html("<br>".join(text(file) for file in policy["files"])) if policy["files"] else "none"),
        ("tenants", policy["tenants"]),
        ("routes", policy["routes"]),
    )
    rows = [
        (_name(one["plan"]), one["rate"], one["quota"], one["concurrency"], one["priority"], one["mode"])
        for one in limits
    ]
    body += _heading("Limits") + _table(("plan", "rate", "quota", "at once", "priority", "mode"), rows)
    if policy["warnings"]:
        body += _heading("Warnings") + _lines("\n".join(policy["warnings"]))
    return _section("policy", "Policy", body, whole=True)


def _reload(reload: Mapping[str, Any], *, whole: bool) -> str:
    body = _facts(
        ("looks for changes", "never" if reload["every"] is None else f"every {reload['every']:g} s"),
        ("applied", reload["applied"]),
        ("failed", reload["failed"]),
        ("in force since", _when(reload["loaded"])),
    )
    error = reload["error"]
    if error is not None:
        body += _heading("What is wrong since ", _when(error["time"])) + _lines(error["text"])
    return _section("reload", "Reload", body, whole=whole)


def _backend(backend: Mapping[str, Any]) -> str:
    facts: list[tuple[str, Cell]] = [("type", backend["type"])]
    if backend["type"] != "memory":
        facts += [("state", "up" if backend["up"] else "away"), ("when it is away", backend["on_failure"])]
    body = _facts(*facts)
    stores = [(name, *(held.get(key) for key in _STORE)) for name, held in backend["stores"].items()]
    if stores:
        body += _heading("Held in memory") + _table(("store", *_STORE), stores)
    return _section("backend", "Backend", body)


_STORE = ("keys", "evicted", "overflowed")


def _history(history: Iterable[Mapping[str, Any]]) -> str:
    changes = [(_when(one["time"]), Html("<br>".join(map(text, one["diff"])))) for one in reversed(list(history))]
    body = _table(("when", "what"), changes, otherwise="None on record.")
    return _section("history", "Last changes", body, whole=True)


def _process(document: Document) -> str:
    workers = document["workers"]
    counts = "this process alone" if workers == 1 else f"{workers} processes together"
    body = _facts(
        ("as of", _when(document["time"])),
        ("process", document["pid"]),
        ("up for", f"{int(document['uptime']):,} s"),
        ("counts are of", counts),
    )
    return _section("process", "Process", body)


def _section(name: str, title: str, body: str, *, whole: bool = False) -> str:
    kind = ' class="whole"' if whole else ""
    heading = f'<h2 id="{name}-title">{title}</h2>'
    return f'<section id="{name}"{kind} aria-labelledby="{name}-title">\n{heading}\n{body}</section>\n'


def _heading(title: str, more: str = "") -> str:
    return f"<h3>{title}{more}</h3>\n"


def _facts(*facts: tuple[str, Cell]) -> str:
    return "<dl>\n" + "".join(f"<dt>{name}</dt><dd>{_shown(value)}</dd>\n" for name, value in facts) + "</dl>\n"


def _table(columns: Sequence[str], rows: Iterable[Sequence[Cell]], *, otherwise: str = "None.") -> str:
    """A table whose first column names its rows. A cell or a column that is `Html` of its own kind is put as it is."""
    rows = list(rows)
    if not rows:
        return f"<p>{otherwise}</p>\n"
    numeric = [any(type(cell) is int for cell in cells) for cells in zip(*rows, strict=True)]
    head = "".join(
        column if _is_cell(column) else f'<th scope="col"{_NUMBER if number else ""}>{column}</th>'
        for column, number in zip(columns, numeric, strict=True)
    )
    body = "".join(f"<tr>{''.join(map(_cell, row, numeric, range(len(row))))}</tr>\n" for row in rows)
    return f'<div class="wide">\n<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>\n</div>\n'


_NUMBER = ' class="number"'


def _is_cell(value: object) -> bool:
    return isinstance(value, Html) and value.startswith(("<td", "<th"))


def _cell(value: Cell, number: bool, at: int) -> str:
    if _is_cell(value):
        return str(value)
    if at == 0:
        return f'<th scope="row">{_shown(value)}</th>'
    return f"<td{_NUMBER if number else ''}>{_shown(value)}</td>"


def _shown(value: Cell) -> str:
    if isinstance(value, Html):
        return value
    if value is None:
        return "-"
    return f"{value:,}" if type(value) is int else text(value)


def _name(name: object) -> Html:
    """A name that a stranger may have chosen, whichever way it is written."""
    return Html(f"<bdi>{text(name)}</bdi>")


def _counts(counts: Mapping[str, int]) -> Html:
    """``rate 12, quota 3``, the most frequent first."""
    ordered = sorted(counts.items(), key=lambda one: (-one[1], one[0]))
    return Html(", ".join(f"{text(name)} {count:,}" for name, count in ordered) or "-")


def _when(instant: str) -> Html:
    """An instant for people, and as it was for machines."""
    return Html(f'<time datetime="{text(instant)}">{text(when(instant))}</time>')


def _lines(lines: str) -> str:
    """Lines as they are, but for what a browser would obey."""
    shown = "\n".join(escape(printable(line)) for line in lines.split("\n"))
    return f"<pre>{shown}</pre>\n"


_CHART = """\
<svg data-own role="img" viewBox="0 0 120 40" preserveAspectRatio="none" \
aria-label="The concurrency limit and the requests in flight of the last two minutes">
<polyline class="limit"/><polyline class="flight"/></svg>
<p class="legend live">Last two minutes: <span class="limit">the limit</span> and, dashed,
<span class="flight">what is in flight</span>.</p>
"""

_FRAME = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="robots" content="noindex">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>{style}</style>
<noscript><meta http-equiv="refresh" content="{refresh}"></noscript>
</head>
<body>
<header>
<h1>Seawall</h1>
<p>version {version}</p>
<p id="state" role="status"></p>
</header>
{main}
<footer><p>The same as JSON: <code>curl -H 'Accept: application/json'</code> this address.</p></footer>
<script>{script}</script>
</body>
</html>
"""
