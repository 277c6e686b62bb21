#!/usr/bin/env python
"""The README's comparison, written from results/overhead.json: nobody copies a number by hand.

python benchmarks/readme.py            renew the part of README.md between its two markers
python benchmarks/readme.py --check    only say whether it is what the results give; exits with 1 if it is not
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

from benchmarks.harness import show

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results" / "overhead.json"
PLOT = "benchmarks/results/overhead.svg"
BEGIN, END = "<!-- bench:overhead -->", "<!-- /bench -->"

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


def block(report: Mapping[str, Any] | None, *, plot: bool) -> str:
    """The text between the markers. ``report`` is the benchmark's JSON, ``None`` where there is none."""
    rows = {row["name"]: row for row in (report or {}).get("parts", {}).get("direct", {}).get("rows", ())}
    added = {name: row["added"]["median"] for name, row in rows.items() if row.get("added")}
    if report is None or not all(name in added for name in OURS[1].values()):
        return "Not measured yet: `make bench` writes the numbers, and this part of the page.\n"
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
        lines.append(f"\n![What a request costs with Seawall, its floor and other limiters]({PLOT})")
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
        f"One interleaved run in memory, direct ASGI calls, medians: {where['implementation']} {where['python']}, "
        f"{where['processor']}, {where['cpus']} cores, load {where['load_average']}, {where['at'][:10]}, "
        f"commit {where['commit']}; {versions}. `x` is times Seawall with as many limits: the ratios carry over to "
        "other machines, the microseconds do not."
    )


def _verdicts(verdicts: Sequence[Mapping[str, Any]]) -> list[str]:
    """How many of the bars that Seawall sets itself were held, and all that were not."""
    judged = [verdict for verdict in verdicts if verdict["value"] is not None]
    if not judged:
        return []
    missed = [verdict for verdict in judged if verdict["outcome"] == "missed"]
    lines = [f"\nOf {len(judged)} bars that the benchmark sets, {len(judged) - len(missed)} were held."]
    for verdict in missed:
        value, bar = (f"{show(verdict[key])} {verdict['unit']}" for key in ("value", "bar"))
        lines.append(f"{'' if len(lines) > 1 else chr(10)}* missed: {verdict['claim']}: {value}, and the bar is {bar}")
    return lines


def _times(ratio: float) -> str:
    return f"{ratio:.{2 if ratio < 1 else 1 if ratio < 10 else 0}f}"


def _plural(limits: int) -> str:
    return f"{limits} limit{'s' * (limits > 1)}"


def renewed(text: str, content: str) -> str:
    """``text`` with ``content`` between its markers."""
    pattern = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise ValueError(f"the page needs {BEGIN} ... {END} once")
    return pattern.sub(lambda _: f"{BEGIN}\n{content}{END}", text)


def current() -> str:
    """The block that the results in this tree give."""
    report = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else None
    return block(report, plot=(ROOT / PLOT).exists())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if something would change")
    asked = parser.parse_args(argv)
    text = README.read_text(encoding="utf-8")
    wanted = renewed(text, current())
    if asked.check:
        print("up to date" if text == wanted else "README.md differs from the results: python benchmarks/readme.py")
        return 0 if text == wanted else 1
    README.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
