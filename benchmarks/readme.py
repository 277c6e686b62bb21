#!/usr/bin/env python
"""The comparisons in README.md, docs/benchmarks.md and docs/client.md, from results/*.json: nothing is copied by hand.

python benchmarks/readme.py            renew the parts of these pages that are between markers
python benchmarks/readme.py --check    only say whether they are what the results give; exits with 1 if they are not

A part begins with ``<!-- bench:NAME -->`` and ends with ``<!-- /bench -->``: ``overhead`` is what Seawall adds to a
request, ``redis`` what a decision costs where processes share their counts, ``overload`` what it delivers where too
much is asked for, ``client`` what callers make of an overload, ``call`` what `seawall.client` adds to a call, and
``summary`` the plots of all, for who reads on from there.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    # In place of this directory, in which `import redis` would find a benchmark.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.harness import show

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGE = ROOT / "docs" / "benchmarks.md"
CLIENT = ROOT / "docs" / "client.md"
RESULTS = "benchmarks/results"
FROM_PAGE = f"../{RESULTS}"
BEGIN, END = "<!-- bench:{} -->", "<!-- /bench -->"
NOT_YET = "Not measured yet: `make bench` writes the numbers, and this part of the page."

OURS = ("Seawall", {1: "Seawall, 1 limit", 3: "Seawall, 3 limits"})
FLOOR = ("written out by hand: the least that could do it", {3: "floor: 3 limits written out by hand"})
PEERS: Sequence[tuple[str, Mapping[int, str]]] = (
    ("asgi-ratelimit", {1: "asgi-ratelimit, 1 limit", 3: "asgi-ratelimit, 3 limits"}),
    ("bare hits of `limits` (async fixed window)", {1: "limits fixed window, 1 hit", 3: "limits fixed window, 3 hits"}),
    ("traffik", {1: "traffik, 1 limit", 3: "traffik, 3 limits"}),
    ("slowapi (ASGI)", {1: "slowapi ASGI, 1 limit", 3: "slowapi ASGI, 3 limits"}),
    ("slowapi (BaseHTTP)", {1: "slowapi BaseHTTP, 1 limit", 3: "slowapi BaseHTTP, 3 limits"}),
    ("fastapi-guard", {1: "fastapi-guard, 1 limit"}),
)
"""What is compared, and the rows of the benchmark's direct part that show it with 1 and 3 limits."""


CONTROLLERS = {
    "seawall": "**Seawall**",
    "none": "nothing",
    "gradient2": "Gradient2",
    "vegas": "Vegas",
    "envoy": "Envoy",
    "failsafe": "failsafe-go",
    "bbr": "BBR (kratos)",
}
"""What is compared in the simulation: every law that people run elsewhere, as its authors set it."""
HEADLINES = (
    ("S1-10x", "goodput/ideal"),
    ("S1-10x", "p99/p99 at .7"),
    ("S16-10x", "goodput/ideal"),
    ("S2", "recovery s"),
    ("S17", "answered within 1 s"),
    ("S4-10min", "goodput/max"),
    ("S7-spike", "critical success"),
    ("S6-5x", "others' success"),
    ("S8-routes", "shed"),
    ("S14-80", "shed"),
)
"""The goals of the simulation that the page has a row for: scenario and metric. All that are missed are named below."""
SUBJECTS = {
    "seawall": "**Seawall**",
    "bare": "nothing",
    "uvicorn": "`--limit-concurrency`",
    "fixed": "a fixed limit",
    "aioresilience": "aioresilience",
}
"""What is compared on real servers; the limits of the third and the fourth are tuned by hand."""
CASES = (
    ("S1 10x", "of_ideal", "10 times capacity: goodput of what is possible"),
    ("S1 10x", "p99_ms", "the same: p99 of what is served, ms"),
    ("S16 never awaits, 10x", "of_ideal", "handlers that never await, 10 times: goodput of what is possible"),
    ("S7 background 12x", "critical", "12 times capacity of background: critical requests served in time"),
    ("S6 a tenant at 5 C", "others", "one tenant at 5 times capacity: the others' requests served in time"),
    ("S17 dead clients, uvloop", "p50_recovery_s", "10 times, callers give up: seconds until p50 is as before"),
)
"""The rows of the page: case, metric and words."""


SHARED = (
    ("Seawall", "**Seawall**"),
    ("Seawall, exact", "**Seawall**, a call for every decision"),
    ("limits (redis-py)", "`limits` with redis-py"),
    ("throttled-py", "throttled-py"),
    ("plain evalsha by redis-py", "one `evalsha` by redis-py, written out by hand"),
    ("floor: hiredis on a raw socket", "the same by hiredis on a raw socket: the least that could do it"),
    ("Seawall, request", "whole request: **Seawall**"),
    ("Seawall, exact, request", "whole request: **Seawall**, a call for every decision"),
    ("Seawall in memory, request", "whole request: Seawall in memory"),
    ("slowapi, request", "whole request: slowapi"),
    ("slowapi with headers, request", "whole request: slowapi with headers"),
    ("fastapi-limiter, request", "whole request: fastapi-limiter"),
)
"""What is compared where counts are shared, and how the page calls it."""
SHARED_PACKAGES = ("redis", "hiredis", "limits", "throttled-py", "slowapi", "fastapi-limiter")
CALLERS = 32
"""Callers at once in the page's table."""
STORM_SERVERS = (("seawall", "In front of Seawall"), ("bare", "In front of a bare uvicorn"))
STORM_CLIENTS = (
    ("seawall", "**seawall.client**"),
    ("bare", "httpx, no retries"),
    ("tenacity", "tenacity"),
    ("httpx-retries", "httpx-retries"),
    ("stamina", "stamina"),
)
STORM_PEERS = STORM_CLIENTS[2:]
STORM_COLUMNS = (
    ("sent", "attempts / calls, while it lasts", 1),
    ("attempts", "attempts of a call", 1),
    ("ok", "succeed", 100),
    ("p99_ms", "p99 of those", 1e-3),
    ("ok_after", "succeed, afterwards", 100),
    ("recovery_s", "recovered after", 1),
)
"""Of the page's tables: the metric, its heading, and what it is multiplied with."""
STORM_UNITS = {"ok": " %", "ok_after": " %", "p99_ms": " s", "recovery_s": " s"}


def overhead(report: Mapping[str, Any] | None, *, plot: bool) -> str:
    """What Seawall adds to a request. ``report`` is the benchmark's JSON, ``None`` where there is none."""
    rows = {row["name"]: row for row in (report or {}).get("parts", {}).get("direct", {}).get("rows", ())}
    added = {name: row["added"]["median"] for name, row in rows.items() if row.get("added")}
    if report is None or not all(name in added for name in OURS[1].values()):
        return f"{NOT_YET}\n"
    ours = {limits: added[name] for limits, name in OURS[1].items()}
    lines = [
        f"{_where(report)}\n",
        "| Added to a request, over the same application without it | 1 limit | 3 limits |",
        "|---|--:|--:|",
        f"| **Seawall**: identity, headers, metrics | **{show(ours[1])} us** | **{show(ours[3])} us** |",
    ]
    cheaper = []
    for label, subjects in (FLOOR, *PEERS):
        ratios = {limits: added[name] / ours[limits] for limits, name in subjects.items() if name in added}
        cells = [
            f"{_times(ratios[limits])} x" if limits in ratios else "not measured" if limits in subjects else "-"
            for limits in (1, 3)
        ]
        lines.append(f"| {label} | {' | '.join(cells)} |")
        lower = [f"{_times(ratio)} x with {_plural(limits)}" for limits, ratio in ratios.items() if ratio < 1]
        if lower and label != FLOOR[0]:
            cheaper.append(f"{label} ({', '.join(lower)})")
    lines.append(f"\nCheaper than Seawall in this run: {'; '.join(cheaper) or 'none of them'}.")
    lines += _verdicts(report.get("verdicts", ()))
    if plot:
        lines.append(f"\n![What a request costs with Seawall, its floor and other limiters]({FROM_PAGE}/overhead.svg)")
    return "\n".join(lines) + "\n"


def overload(simulated: Mapping[str, Any] | None, real: Mapping[str, Any] | None, *, plots: Collection[str]) -> str:
    """What Seawall delivers under overload, beside others. ``plots`` are the files that are there to be shown."""
    parts = ["**Simulated** " + (_simulated(simulated) if simulated else f"{NOT_YET}\n")]
    if "overload.svg" in plots:
        parts.append(f"![Goodput and latency over load, simulated]({FROM_PAGE}/overload.svg)\n")
    parts.append("**On real servers** " + (_real(real) if real else f"{NOT_YET}\n"))
    if "overload_real.svg" in plots:
        parts.append(f"![Goodput and latency over load, on real servers]({FROM_PAGE}/overload_real.svg)\n")
    return "\n".join(parts)


def shared(report: Mapping[str, Any] | None, *, plot: bool) -> str:
    """What a decision costs where processes share their counts. ``report`` is the benchmark's JSON, if there is one."""
    rows = (report or {}).get("parts", {}).get("rows", ())
    if report is None or not rows:
        return f"{NOT_YET}\n"
    many = max(row["keys"] for row in rows)
    found = {
        (row["subject"], row["limits"], row["keys"]): row
        for row in rows
        if not row["denied"] and row["callers"] == CALLERS and row["processes"] == 1
    }
    lines = [
        f"{_where_shared(report)}\n",
        f"| | client, 1 limit | 3 limits | 3 limits, {many:,} keys | round trips, 3 limits | server, 3 limits |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name, words in SHARED:
        columns = ((1, 1, "added_us"), (3, 1, "added_us"), (3, many, "added_us"), (3, 1, "trips"), (3, 1, "server_us"))
        cells = []
        for limits, keys, quantity in columns:
            row = found.get((name, limits, keys))
            unit = "" if quantity == "trips" or row is None else " us"
            cells.append(show(row and row[quantity]["median"]) + unit)
        if any(cell != "-" for cell in cells):
            lines.append(f"| {words} | {' | '.join(cells)} |")
    lost = _lost(report["parts"]["losses"])
    lines.append(f"\nCheaper than Seawall, in how many of all cases of this run, and at best by how much: {lost}")
    lines += _verdicts(report.get("verdicts", ()))
    if plot:
        lines.append(f"\n![What a shared decision costs with Seawall, its floors and others]({FROM_PAGE}/redis.svg)")
    return "\n".join(lines) + "\n"


def storm(report: Mapping[str, Any] | None, *, plot: bool) -> str:
    """What callers make of an overload. ``report`` is the benchmark's JSON, if there is one."""
    courses = (report or {}).get("parts", {}).get("courses", {})
    if report is None or not courses.get("storm", {}).get("servers"):
        return f"{NOT_YET}\n"
    where = report["environment"]
    versions = ", ".join(f"{name} {where['versions'][name]}" for name in ("httpx", *(each for each, _ in STORM_PEERS)))
    run = (
        f"Medians of {_plural(report['parts']['effort']['rounds'], 'round')}, "
        f"{_machine(where, ', run before all others' if where['real_time'] else '')}; {versions}.\n"
    )
    lines = [run]
    for server, title in STORM_SERVERS:
        lines += _storm_table(courses["storm"], server, title)
    title = "A server that stands still for a second, at half its capacity"
    lines += _storm_table(courses.get("blip", {}), "seawall", title, "ok", "attempts", "p99_ms")
    del lines[-1]
    lines += _verdicts(report.get("verdicts", ()))
    if plot:
        lines.append(f"\n![Attempts and goodput in a retry storm, by client]({FROM_PAGE}/client_storm.svg)")
    return "\n".join(lines) + "\n"


def _storm_table(course: Mapping[str, Any], server: str, title: str, *only: str) -> list[str]:
    """What is known of each client in front of one server, with some of the columns or all."""
    columns = [column for column in STORM_COLUMNS if not only or column[0] in only]
    lines = []
    for name, words in STORM_CLIENTS:
        metrics = course.get("servers", {}).get(server, {}).get(name, {}).get("metrics")
        if metrics:
            watched = course["end"] - course["over"]
            cells = [_storm_cell(metrics.get(metric), metric, factor, watched) for metric, _, factor in columns]
            lines.append(f"| {words} | {' | '.join(cells)} |")
    if not lines:
        return []
    headings = " | ".join(heading for _, heading, _ in columns)
    return [f"| {title} | {headings} |", f"|---|{'--:|' * len(columns)}", *lines, ""]


def _storm_cell(summary: Mapping[str, float] | None, metric: str, factor: float, watched: float) -> str:
    if summary is None:
        return "-"
    if metric == "recovery_s" and summary["median"] > watched - 0.05:
        return f"not in {watched:g} s"
    return show(summary["median"] * factor) + STORM_UNITS.get(metric, "")


def call(report: Mapping[str, Any] | None) -> str:
    """What the client adds to a call. ``report`` is the benchmark's JSON, if there is one."""
    rows = (report or {}).get("parts", {}).get("client", {}).get("rows", ())
    added = [row for row in rows if row["added"] is not None]
    if report is None or not added:
        return f"{NOT_YET}\n"
    run = (
        f"One interleaved run of {_plural(added[0]['added']['rounds'], 'round')}, {_machine(report['environment'])}.\n"
    )
    lines = [run, "| | added, us | p10..p90 | x bare |", "|---|--:|--:|--:|"]
    for row in added:
        cost, ratio = row["added"], row["ratio"]["median"]
        cells = (show(cost["median"]), f"{show(cost['p10'])}..{show(cost['p90'])}", f"{ratio:.2f}")
        lines.append(f"| {row['library']}, {row['part']}, {row['name']} | {' | '.join(cells)} |")
    return "\n".join(lines + _verdicts(report.get("verdicts", ()))) + "\n"


SUMMARY = (
    ("overload", "Goodput and latency over load, simulated", "Under overload, simulated, beside the laws of others"),
    ("overload_real", "Goodput and latency over load, on real servers", "The same on real servers"),
    (
        "client_storm",
        "Attempts and goodput in a retry storm, by client",
        "Callers in a retry storm, beside other libraries",
    ),
    ("redis", "What a shared decision costs with Seawall, its floors and others", "Through Redis"),
    ("overhead", "What a request costs with Seawall, its floor and other limiters", "In memory"),
)
"""The plots of the summary: their file, what they show, and the words before them."""


def summary(reports: Mapping[str, Mapping[str, Any] | None], *, plots: Collection[str]) -> str:
    """Every plot that is there, and how many of its bars Seawall holds. ``reports`` are by the name of their file."""
    lines = []
    for name, shows, words in SUMMARY:
        report = reports.get(name)
        if report is None:
            lines.append(f"**{words}**: not measured yet.\n")
            continue
        judged = report["parts"]["goals"] if name == "overload" else report.get("verdicts", ())
        outcomes = [each["outcome"] for each in judged if each["outcome"] not in (None, "not measured")]
        held = sum(outcome in ("met", "held") for outcome in outcomes)
        lines.append(f"**{words}**: {held} of {len(outcomes)} goals are held.\n")
        if f"{name}.svg" in plots:
            lines.append(f"![{shows}]({RESULTS}/{name}.svg)\n")
    return "\n".join(lines)


def _where_shared(report: Mapping[str, Any]) -> str:
    """Which run this is, and what its columns are."""
    where = report["environment"]
    versions = ", ".join(f"{name} {where['versions'].get(name)}" for name in SHARED_PACKAGES)
    return (
        f"One interleaved run, {CALLERS} callers at once in one process on one core, Valkey "
        f"{where['versions']['valkey']} on the other, a hot key, all allowed, medians: {where['implementation']} "
        f"{where['python']}, {where['processor']}, load {where['load_average']}, {where['at'][:10]}, commit "
        f"{where['commit']}; {versions}. Client: processor time per decision over that of the callers themselves, of "
        "whole requests over that of the application alone. Round trips and the server's time are per decision."
    )


def _lost(losses: Sequence[Mapping[str, Any]]) -> str:
    """Who is cheaper than Seawall in what, how often, and by how much at best, as a list."""
    groups: dict[str, list[str]] = {}
    for each in losses:
        ours = dict(SHARED)[each["ours"]].replace("*", "")
        name = each["peer"].removesuffix(", request")
        found = f"{name} in {each['cells']} of {each['of']} ({_times(each['worst'])} x)"
        groups.setdefault(f"{ours}, {each['quantity']}", []).append(found)
    if not groups:
        return "none of them."
    return "\n\n" + "\n".join(f"* {what}: {', '.join(found)}" for what, found in groups.items())


def _simulated(report: Mapping[str, Any]) -> str:
    """The goals in simulated time: a table of some, and what came of all."""
    parts, where = report["parts"], report["environment"]
    known = [name for name in CONTROLLERS if name in parts["controllers"]]
    goals = {(goal["scenario"], goal["metric"]): goal for goal in parts["goals"]}
    run = (
        f"in the same situations, with the objects that serve: means of {_plural(parts['seeds'], 'seed')}, "
        f"{where['at'][:10]}, commit {where['commit']}. The same seeds give the same numbers on every machine."
    )
    lines = [
        f"{run}\n",
        f"| Goal | bar | {' | '.join(CONTROLLERS[name] for name in known)} |",
        f"|---|--:|{'--:|' * len(known)}",
    ]
    for key in HEADLINES:
        goal = goals.get(key)
        if goal is not None:
            means = [_mean(goal["controllers"].get(name)) for name in known]
            lines.append(f"| {goal['claim']} | {_bar(goal)} | {' | '.join(means)} |")
    judged = [goal for goal in parts["goals"] if goal["outcome"] is not None]
    met = sum(goal["outcome"] == "met" for goal in judged)
    lines.append(f"\nOf {len(judged)} goals, {met} are met with each seed.")
    for goal in judged:
        if goal["outcome"] != "met":
            value = _mean(goal["controllers"]["seawall"])
            lines.append(
                f"{_gap(lines)}* {goal['outcome']}: {goal['scenario']}, {goal['claim']}: {value}, goal {_bar(goal)}"
            )
    return "\n".join(lines) + "\n"


def _gap(lines: Sequence[str]) -> str:
    """A blank line before the first entry of a list."""
    return "" if lines[-1].lstrip().startswith("* ") else "\n"


def _mean(spread: Mapping[str, Any] | None) -> str:
    """A metric's mean over the seeds. Without one nothing was admitted that could be measured, or nobody came back."""
    if spread is None:
        return "-"
    return "never" if spread["mean"] is None else show(spread["mean"])


def _bar(goal: Mapping[str, Any]) -> str:
    return f"{'>=' if goal['at_least'] else '<='} {goal['bar']:g}"


def _real(report: Mapping[str, Any]) -> str:
    """The same on real servers: medians over the rounds."""
    cases, where = report["parts"]["cases"], report["environment"]
    known = [name for name in SUBJECTS if any(name in case["subjects"] for case in cases.values())]
    run = (
        f"one worker of uvicorn {where['versions'].get('uvicorn')} on one core, an open-loop generator on the other: "
        f"medians of {_plural(report['parts']['effort']['rounds'], 'round')}, {where['implementation']} "
        f"{where['python']}, {where['processor']}, load {where['load_average']}, {where['at'][:10]}, "
        f"commit {where['commit']}."
    )
    lines = [
        f"{run}\n",
        f"| | {' | '.join(SUBJECTS[name] for name in known)} |",
        f"|---|{'--:|' * len(known)}",
    ]
    for title, metric, words in CASES:
        subjects = cases.get(title, {}).get("subjects", {})
        medians = [subjects.get(name, {}).get("metrics", {}).get(metric) for name in known]
        if any(medians):
            lines.append(f"| {words} | {' | '.join(show(median and median['median']) for median in medians)} |")
    lines += _verdicts(report.get("verdicts", ()))
    return "\n".join(lines) + "\n"


def _where(report: Mapping[str, Any]) -> str:
    """Which run this is."""
    where = report["environment"]
    absent = ("not installed", None)
    peers = ("slowapi", "limits", "asgi-ratelimit", "traffik", "fastapi-guard")
    versions = ", ".join(
        f"{name} {where['versions'][name]}" for name in peers if where["versions"].get(name) not in absent
    )
    return (
        f"One interleaved run in memory, direct ASGI calls, medians: {_machine(where)}; {versions}. "
        "`x` is times Seawall with as many limits: the ratios carry over to other machines, the microseconds do not."
    )


def _machine(where: Mapping[str, Any], how: str = "") -> str:
    """What was measured on, ``how``, and when."""
    return (
        f"{where['implementation']} {where['python']}, {where['processor']}, {where['cpus']} cores, "
        f"load {where['load_average']}{how}, {where['at'][:10]}, commit {where['commit']}"
    )


def _verdicts(verdicts: Sequence[Mapping[str, Any]]) -> list[str]:
    """How many of the bars that Seawall sets itself were held, and all that were not."""
    judged = [verdict for verdict in verdicts if verdict["value"] is not None]
    if not judged:
        return []
    missed = [verdict for verdict in judged if verdict["outcome"] == "missed"]
    lines = [f"\nOf {len(judged)} bars that the benchmark sets, {len(judged) - len(missed)} were held."]
    for verdict in missed:
        value, bar = (f"{show(verdict[key])} {verdict['unit'].strip()}".rstrip() for key in ("value", "bar"))
        lines.append(f"{_gap(lines)}* missed: {verdict['claim']}: {value}, and the bar is {bar}")
    return lines


def _times(ratio: float) -> str:
    return f"{ratio:.{2 if ratio < 1 else 1 if ratio < 10 else 0}f}"


def _plural(count: int, noun: str = "limit") -> str:
    return f"{count} {noun}{'s' * (count > 1)}"


def renewed(text: str, contents: Mapping[str, str]) -> str:
    """``text`` with each of ``contents`` between the markers of its name."""
    for name, content in contents.items():
        begin = BEGIN.format(name)
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(END)}", re.DOTALL)
        if len(pattern.findall(text)) != 1:
            raise ValueError(f"the page needs {begin} ... {END} once")
        # A function, for a backslash in a replacement would mean something.
        text = pattern.sub(lambda _, whole=f"{begin}\n{content}{END}": whole, text)  # type: ignore[misc]
    return text


def current(results: Path = ROOT / RESULTS) -> dict[str, str]:
    """The parts that the results in this tree give, by name."""

    def read(name: str) -> Any:
        path = results / name
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    plots = {path.name for path in results.glob("*.svg")}
    reports = {name: read(f"{name}.json") for name, *_ in SUMMARY}
    return {
        "overhead": overhead(reports["overhead"], plot="overhead.svg" in plots),
        "redis": shared(reports["redis"], plot="redis.svg" in plots),
        "overload": overload(reports["overload"], reports["overload_real"], plots=plots),
        "client": storm(reports["client_storm"], plot="client_storm.svg" in plots),
        "call": call(read("client.json")),
        "summary": summary(reports, plots=plots),
    }


def pages(contents: Mapping[str, str]) -> Iterator[tuple[Path, str, str]]:
    """The pages: where, what is there, and what should be."""
    rest = contents.keys() - {"summary", "client", "call"}
    for path, names in ((README, {"summary"}), (CLIENT, {"client", "call"}), (PAGE, rest)):
        text = path.read_text(encoding="utf-8")
        yield path, text, renewed(text, {name: contents[name] for name in names})


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if something would change")
    asked = parser.parse_args(argv)
    changed = [(path, wanted) for path, text, wanted in pages(current()) if text != wanted]
    if asked.check:
        differing = " and ".join(path.name for path, _ in changed)
        print(f"{differing}: not what the results give: python benchmarks/readme.py" if changed else "up to date")
        return 1 if changed else 0
    for path, wanted in changed:
        path.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
