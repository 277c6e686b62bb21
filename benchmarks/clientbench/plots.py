"""The plot of benchmarks/storm.py: attempts and goodput over time, a line for each client, a column for each server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks.clientbench.callers import BARE, OURS, RETRIES, STAMINA, SUBJECTS, TENACITY
from benchmarks.plots import FAINT, FLOOR, STYLE, save
from benchmarks.plots import OURS as COLOUR

LINES = {
    BARE: (FLOOR, ":"),
    TENACITY: ("#c44e52", "-"),
    RETRIES: ("#dd8452", "-"),
    STAMINA: ("#8172b3", "-"),
    OURS: (COLOUR, "-"),
}
"""Colour and dashes by subject."""
SERVERS = (("seawall", "in front of Seawall"), ("bare", "in front of a bare uvicorn"))
ROWS = (("sent", "Attempts, in multiples of capacity"), ("good", "Calls that succeed, in multiples of capacity"))


def storm(results: Path, target: Path) -> bool:
    """Draw ``client_storm.json``; ``False`` where there was no storm."""
    report = json.loads(results.read_text())
    part = report["parts"]["courses"].get("storm", {"servers": {}})
    servers = [(name, words) for name, words in SERVERS if part["servers"].get(name)]
    if not servers:
        return False
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(
            len(ROWS), len(servers), figsize=(1.5 + 4.2 * len(servers), 6.2), sharex=True, sharey="row", squeeze=False
        )
        for column, (server, words) in enumerate(servers):
            for line, (quantity, title) in enumerate(ROWS):
                axes = grid[line][column]
                _panel(axes, part, part["servers"][server], quantity)
                axes.set_title(f"{title}\n{words}" if column == 0 else f"\n{words}")
            grid[-1][column].set_xlabel("seconds since the trigger began")
        handles, labels = grid[0][0].get_legend_handles_labels()
        figure.legend(
            handles, labels, frameon=False, fontsize=8, loc="lower center", ncols=3, bbox_to_anchor=(0.5, 0.02)
        )
        where = report["environment"]
        names = ("httpx", "httpx-retries", "tenacity", "stamina")
        versions = ", ".join(f"{name} {where['versions'][name]}" for name in names)
        note = f"Python {where['python']}, {where['processor']}, {where['cpus']} cores; {versions}"
        figure.text(0.01, 0.004, note, fontsize=7, color="#666666")
        figure.tight_layout(rect=(0, 0.085, 1, 1), h_pad=1.5)
        save(figure, target)
    return True


def _panel(axes: Axes, part: dict[str, Any], subjects: dict[str, Any], quantity: str) -> None:
    begin, width = part["begin"], part["bin"]
    axes.axvspan(0, part["over"] - begin, color=FAINT, linewidth=0)
    offered = next(iter(subjects.values()))["course"]["offered"]
    at = [(index + 0.5) * width - begin for index in range(len(offered))]
    axes.plot(at, offered, color="#999999", linewidth=0.8, label="offered")
    for subject, (colour, dashes) in LINES.items():
        if subject in subjects:
            width_of = 2.0 if subject == OURS else 1.2
            course = subjects[subject]["course"][quantity]
            axes.plot(at, course, dashes, color=colour, linewidth=width_of, label=SUBJECTS[subject])
    axes.set_ylim(bottom=0)
    axes.set_xlim(-4, part["end"] - begin)
    axes.yaxis.grid(True, color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
