"""The plot of the real benchmark: goodput and p99 over offered load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from benchmarks.overload.cases import CASES, CURVE
from benchmarks.overload.servers import SUBJECTS
from benchmarks.plots import FAINT, FLOOR, OURS, STYLE, save

GREY = "#8a9097"
KEY: Any = {"frameon": False, "fontsize": 8}
LINES = {
    "bare": (GREY, ":", "o"),
    "uvicorn": (GREY, "--", "s"),
    "fixed": (FLOOR, "--", "^"),
    "aioresilience": (GREY, "-.", "D"),
    "seawall": (OURS, "-", "o"),
}
"""Colour, dashes and marker by subject: Seawall stands out, what one would write by hand is dark, peers are grey."""


def draw(results: Path, target: Path) -> bool:
    """Draw the results' curve into ``target``; ``False`` where fewer than two of its points were measured."""
    report = json.loads(results.read_text())
    titles = [case.title for case in CASES if case.scenario == CURVE]
    measured = report["parts"]["cases"]
    points = [measured[title] for title in titles if measured.get(title, {}).get("subjects")]
    if len(points) < 2:
        return False
    with plt.rc_context(STYLE):
        figure, (goodput, latency) = plt.subplots(1, 2, figsize=(9.5, 4.7))
        for subject, (colour, dashes, marker) in LINES.items():
            style: Any = {"color": colour, "linestyle": dashes, "marker": marker, "markersize": 3.5}
            style["linewidth"] = 2.0 if subject == "seawall" else 1.2
            for axes, metric in ((goodput, "goodput"), (latency, "p99_ms")):
                _line(axes, points, subject, metric, style)
        _ideal(goodput, points)
        _dressed(goodput, "Goodput", "answered 2xx within 500 ms, as a part of C")
        _dressed(latency, "p99 of what is served", "milliseconds from the scheduled arrival, log scale")
        goodput.set_ylim(bottom=0)
        latency.set_yscale("log")
        latency.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        figure.legend(
            *goodput.get_legend_handles_labels(), loc="lower center", ncol=3, bbox_to_anchor=(0.5, 0.03), **KEY
        )
        figure.text(0.01, 0.008, _footer(report), fontsize=7, color="#666666")
        figure.tight_layout(rect=(0, 0.13, 1, 1), w_pad=2.5)
        save(figure, target)
    return True


def _line(axes: Axes, points: list[dict[str, Any]], subject: str, metric: str, style: Any) -> None:
    """Medians, and the 10th to 90th percentile as whiskers."""
    found = []
    for point in points:
        summary = point["subjects"].get(subject, {}).get("metrics", {}).get(metric)
        if summary:
            found.append((point["offered"], summary["median"], summary["p10"], summary["p90"]))
    if found:
        x, y, low, high = zip(*found, strict=True)
        below = [max(0.0, value - least) for value, least in zip(y, low, strict=True)]
        above = [max(0.0, most - value) for value, most in zip(y, high, strict=True)]
        axes.errorbar(x, y, yerr=[below, above], elinewidth=0.7, label=SUBJECTS[subject], **style)


def _ideal(axes: Axes, points: list[dict[str, Any]]) -> None:
    """Gideal as it was on this machine: the median over the subjects of each case."""
    found = []
    for point in points:
        values = sorted(
            subject["metrics"]["ideal"]["median"] for subject in point["subjects"].values() if subject["metrics"]
        )
        if values:
            found.append((point["offered"], values[len(values) // 2]))
    if found:
        axes.plot(*zip(*found, strict=True), color="#c9a227", linewidth=1.0, label="Gideal: no policy can do better")


def _dressed(axes: Axes, title: str, unit: str) -> None:
    axes.set_xscale("log")
    axes.set_xticks([0.5, 1, 2, 3, 5, 10], ["0.5", "1", "2", "3", "5", "10"])
    axes.minorticks_off()
    axes.grid(True, color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_title(title)
    axes.set_xlabel("offered load, as a multiple of capacity C, log scale")
    axes.set_ylabel(unit)


def _footer(report: dict[str, Any]) -> str:
    where = report["environment"]
    named = ", ".join(
        f"{name} {where['versions'][name]}" for name in ("uvicorn", "uvloop", "httptools", "aioresilience")
    )
    return (
        f"10 ms of waiting, then 3 ms of CPU; rounds: {report['parts']['effort']['rounds']}. Python {where['python']}, "
        f"{where['processor']}, commit {where['commit']}; {named}"
    )
