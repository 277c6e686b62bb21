"""Plots of what the benchmarks wrote: light background, labelled axes, units, nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

OURS, FLOOR, PEER, FAINT = "#0b6e99", "#444444", "#b9bec4", "#e4e6e9"

STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "svg.fonttype": "none",
    "svg.hashsalt": "seawall",
}


def overhead(results: Path, target: Path) -> bool:
    """Draw ``overhead.json``: added cost, cost by live keys, processor time in a server. Missing parts are left out;
    ``False`` where all are."""
    report = json.loads(results.read_text())
    parts = report["parts"]
    panels: list[tuple[Callable[[Axes, Any], None], Any, float]] = []
    if "direct" in parts:
        panels.append((direct_panel, parts["direct"]["rows"], 5.6))
    if "access" in parts.get("keys", {}):
        panels.append((keys_panel, parts["keys"]["access"], 3.6))
    if "server" in parts:
        panels.append((server_panel, parts["server"]["rows"], 3.2))
    if not panels:
        return False
    with plt.rc_context(STYLE):
        heights = [height for _, _, height in panels]
        figure, all_axes = plt.subplots(
            len(panels), 1, figsize=(8.5, sum(heights)), gridspec_kw={"height_ratios": heights}, squeeze=False
        )
        for (draw, data, _), axes in zip(panels, all_axes[:, 0], strict=True):
            draw(axes, data)
        figure.text(0.01, 0.004, footer(report["environment"]), fontsize=7, color="#666666")
        figure.tight_layout(rect=(0, 0.015, 1, 1), h_pad=2.0)
        save(figure, target)
    return True


def save(figure: Figure, target: Path) -> None:
    """Write a figure and close it. The date stays out, so that the same numbers are the same file."""
    figure.savefig(target, dpi=110, facecolor="white", metadata={"Date": None} if target.suffix == ".svg" else {})
    plt.close(figure)


def footer(environment: dict[str, Any]) -> str:
    """Where it was measured, in a line."""
    versions = environment["versions"]
    named = ", ".join(f"{name} {versions[name]}" for name in ("limits", "slowapi", "traffik", "fastapi-guard"))
    return f"Python {environment['python']}, {environment['processor']}, {environment['cpus']} cores; {named}"


def colour(name: str) -> str:
    """Seawall stands out, the floor is dark, peers are grey."""
    if name.startswith("Seawall"):
        return OURS
    return FLOOR if name.startswith(("floor", "pure ASGI")) else PEER


def bars(axes: Axes, names: Sequence[str], summaries: Sequence[dict[str, float]], *, log: bool) -> None:
    """Horizontal bars of medians, lowest on top, with the 10th to 90th percentile as whiskers."""
    order = sorted(range(len(names)), key=lambda index: -summaries[index]["median"])
    values = [summaries[index]["median"] for index in order]
    whiskers = [
        [max(0.0, summaries[index]["median"] - summaries[index]["p10"]) for index in order],
        [max(0.0, summaries[index]["p90"] - summaries[index]["median"]) for index in order],
    ]
    axes.barh(
        range(len(order)),
        values,
        color=[colour(names[index]) for index in order],
        xerr=whiskers,
        error_kw={"ecolor": "#777777", "elinewidth": 0.8},
        height=0.72,
    )
    axes.set_yticks(range(len(order)), [names[index] for index in order])
    longest = max(summary["p90"] for summary in summaries)
    if log:
        axes.set_xscale("log")
        axes.set_xlim(right=longest * 1.9)
    else:
        axes.set_xlim(0, longest * 1.12)
    for row, index in enumerate(order):
        value = summaries[index]["median"]
        axes.text(
            max(value, summaries[index]["p90"]) * (1.06 if log else 1) + (0 if log else longest * 0.012),
            row,
            f"{value:,.1f}",
            va="center",
            fontsize=8,
            color="#333333",
        )
    axes.xaxis.grid(True, color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:g}"))


def direct_panel(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """What each subject adds to a direct call."""
    shown = [row for row in rows if row["added"] and row["added"]["median"] > 0]
    bars(axes, [row["name"] for row in shown], [row["added"] for row in shown], log=True)
    axes.set_title("Added to a request, direct call (lower is better)")
    axes.set_xlabel("CPU microseconds over the same application alone; median, p10 to p90; log scale")


def server_panel(axes: Axes, rows: dict[str, Any]) -> None:
    """Processor time of a server per request, everything included."""
    shown = {name: row["cpu_us"] for name, row in rows.items() if "cpu_us" in row}
    bars(axes, list(shown), list(shown.values()), log=False)
    axes.set_title("uvicorn, one worker: processor time per request, everything included")
    axes.set_xlabel("microseconds of server CPU per request, median and p10 to p90")


def keys_panel(axes: Axes, access: dict[str, Any]) -> None:
    """Cost per call by number of live keys."""
    series = {
        "limits": ("limits fixed window, 1 hit", PEER, "-"),
        "stack uniform": ("Seawall, 3 limits, uniformly random", OURS, "--"),
        "stack hot": ("Seawall, 3 limits, 64 hot callers", OURS, "-"),
        "backend uniform": ("memory backend, 1 charge, uniformly random", FLOOR, "--"),
        "backend hot": ("memory backend, 1 charge, 64 hot keys", FLOOR, "-"),
    }
    for name, (label, line_colour, dashes) in series.items():
        table, _, pattern = name.partition(" ")
        points = []
        for key, value in access.items():
            words = key.split()
            if words[0] == table and words[2:] == ([pattern] if pattern else []):
                points.append((int(words[1]), value["us"]["median"]))
        points.sort()
        if points:
            axes.plot(*zip(*points, strict=True), dashes, color=line_colour, marker="o", markersize=3.5, label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.grid(True, color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_title("Cost by number of live keys")
    axes.set_xlabel("live keys, log scale")
    axes.set_ylabel("CPU microseconds per call")
    axes.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axes.legend(frameon=False, fontsize=8, loc="upper left")
