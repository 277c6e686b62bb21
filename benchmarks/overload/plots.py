"""The plot of the simulation: what is delivered and how long it takes, over what is offered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from benchmarks.overload.measure import ideal
from benchmarks.overload.scenarios import K1, cost_of_refusal
from benchmarks.plots import FAINT, FLOOR, OURS, STYLE, save

COLOURS = {
    "seawall": OURS,
    "none": FLOOR,
    "fixed": "#9a6fb0",
    "gradient2": "#c44e52",
    "vegas": "#dd8452",
    "envoy": "#937860",
    "failsafe": "#55a868",
    "bbr": "#8172b3",
    "toobusy": "#ccb974",
    "lag-aimd": "#64b5cd",
}


TITLES = {"K1": "10 ms of I/O, then 3 ms of CPU", "K2": "4 ms of CPU, never awaiting"}


def curves(results: Path, target: Path) -> bool:
    """Draw ``overload.json``: goodput as a share of the ideal, and the p99 of what was admitted, by kind of handler;
    ``False`` where no curve was simulated."""
    parts = json.loads(results.read_text())["parts"]
    kinds = [kind for kind in TITLES if kind in parts["curves"]]
    if not kinds:
        return False
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(
            2, len(kinds), figsize=(5.5 * len(kinds), 7.5), sharex=True, sharey="row", squeeze=False
        )
        for column, kind in enumerate(kinds):
            upper, lower = grid[0, column], grid[1, column]
            _panel(upper, parts["curves"][kind], "goodput/ideal")
            _panel(lower, parts["curves"][kind], "p99 ms")
            upper.set_title(TITLES[kind])
            lower.set_xlabel("offered load in units of capacity, log scale")
        upper, lower = grid[0, 0], grid[1, 0]
        upper.set_ylim(0, 1.05)
        upper.set_ylabel("answers within 500 ms, share of the ideal")
        lower.set_ylabel("p99 latency of what was admitted, ms, log scale")
        lower.set_yscale("log")
        lower.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        lower.set_xscale("log")
        ticks = (0.5, 0.7, 1, 2, 3, 5, 7, 10)
        lower.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        lower.minorticks_off()
        handles, labels = upper.get_legend_handles_labels()
        order = sorted(range(len(labels)), key=lambda place: list(COLOURS).index(labels[place]))
        figure.legend(
            [handles[place] for place in order],
            [labels[place] for place in order],
            frameon=False,
            fontsize=8,
            ncols=len(labels),
            loc="upper center",
        )
        rho = cost_of_refusal(K1.cpu_ns)
        note = (
            f"simulated; 20 s at each load after 20 s at .7, mean of {parts['seeds']} seeds; a refusal costs {rho:.1%}"
            f" of a service on the left, so that {ideal(10, rho):.0%} of capacity is the ideal at 10x;"
            " what cannot be seen lies on none"
        )
        figure.text(0.01, 0.004, note, fontsize=7, color="#666666")
        figure.tight_layout(rect=(0, 0.015, 1, 0.965), h_pad=2.0)
        save(figure, target)
    return True


def _panel(axes: Axes, by_controller: dict[str, Any], metric: str) -> None:
    for name, loads in by_controller.items():
        points = sorted((float(load), metrics[metric]["mean"]) for load, metrics in loads.items())
        points = [(load, value) for load, value in points if value is not None]
        ours = name == "seawall"
        axes.plot(
            [load for load, _ in points],
            [value for _, value in points],
            color=COLOURS[name],
            linewidth=2.4 if ours else 1.2,
            marker="o",
            markersize=4 if ours else 2.5,
            label=name,
            zorder=3 if ours else 2,
        )
    axes.grid(True, color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
