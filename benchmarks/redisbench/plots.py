"""The plot of benchmarks/redis.py: what a decision and a request cost the client, and the server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from benchmarks.plots import FAINT, FLOOR, OURS, STYLE, bars, save
from benchmarks.redisbench.measure import BUSY
from benchmarks.redisbench.subjects import EVALSHA, HIREDIS, LIMITS, SEAWALL, SEAWALL_EXACT, THROTTLED

REQUEST = "request"
LINES = {
    SEAWALL: (OURS, "-"),
    SEAWALL_EXACT: (OURS, "--"),
    HIREDIS: (FLOOR, "--"),
    EVALSHA: (FLOOR, "-"),
    LIMITS: ("#c44e52", "-"),
    THROTTLED: ("#dd8452", "-"),
}


def shared(results: Path, target: Path) -> bool:
    """Draw ``redis.json``: processor time of decisions, of requests, of the server, and by callers at once; ``False``
    where no limiter was measured."""
    report = json.loads(results.read_text())
    rows = [
        row for row in report["parts"]["rows"] if not row["denied"] and row["processes"] == 1 and row["limits"] == 3
    ]
    busy = [row for row in rows if row["callers"] == BUSY and row["keys"] == 1]
    limiters = [row for row in busy if not row["subject"].startswith("bare")]
    if not limiters:
        return False
    at = f"3 limits, hot key, all allowed, {BUSY} callers at once"
    with plt.rc_context(STYLE):
        heights = (2.6, 2.4, 3.8, 3.2)
        figure, (decisions, requests, server, callers) = plt.subplots(
            4, 1, figsize=(8.5, sum(heights)), gridspec_kw={"height_ratios": heights}
        )
        _bars(decisions, [row for row in limiters if REQUEST not in row["subject"]], "added_us")
        decisions.set_title(f"Client: a decision ({at})")
        decisions.set_xlabel("CPU microseconds per decision; median, p10 to p90; log scale")
        _bars(requests, [row for row in limiters if REQUEST in row["subject"]], "added_us")
        requests.set_title("Client: added to a request, direct call")
        requests.set_xlabel("CPU microseconds over the same application alone; median, p10 to p90; log scale")
        _bars(server, [row for row in limiters if row["trips"]["median"] > 0], "server_us")
        server.set_title("Server")
        server.set_xlabel("CPU microseconds of the server per decision or request; median, p10 to p90; log scale")
        _by_callers(callers, rows)
        where = report["environment"]
        named = ", ".join(f"{name} {where['versions'][name]}" for name in ("valkey", "redis", "limits", "throttled-py"))
        note = f"Python {where['python']}, {where['processor']}, {where['cpus']} cores; {named}"
        figure.text(0.01, 0.004, note, fontsize=7, color="#666666")
        figure.tight_layout(rect=(0, 0.015, 1, 1), h_pad=2.0)
        save(figure, target)
    return True


def _bars(axes: Axes, rows: list[dict[str, Any]], quantity: str) -> None:
    shown = [row for row in rows if row[quantity]["median"] > 0]
    if shown:
        bars(axes, [row["subject"] for row in shown], [row[quantity] for row in shown], log=True)


def _by_callers(axes: Axes, rows: list[dict[str, Any]]) -> None:
    many = max(row["keys"] for row in rows)
    for name, (colour, dashes) in LINES.items():
        points = sorted(
            (row["callers"], row["added_us"]["median"])
            for row in rows
            if row["subject"] == name and row["keys"] == many and row["added_us"]["median"] > 0
        )
        if points:
            axes.plot(*zip(*points, strict=True), dashes, color=colour, marker="o", markersize=3.5, label=name)
    axes.set_xscale("log")
    axes.set_yscale("log")
    ticks = sorted({row["callers"] for row in rows})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.xaxis.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(True, color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_title(f"Client: a decision by callers at once (3 limits, {many:,} keys)")
    axes.set_xlabel("callers at once, log scale")
    axes.set_ylabel("CPU microseconds per decision")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
