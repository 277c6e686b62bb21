"""Plots as SVG text: bars that are stacked, lines, and spans in which something was the matter.

They need no script and no font of their own. Colours are variables of the page (``--served``), which has them for light
and for dark. Numbers are rounded to tenths of a pixel.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, log10
from typing import TypeAlias, final

WIDTH, HEIGHT = 720.0, 240.0
LEFT, RIGHT, TOP, BOTTOM = 58.0, 12.0, 46.0, 40.0
TICKS = 5
FLAT = 1.0
"""The height of an axis on which there is nothing but 0."""

Point: TypeAlias = tuple[float, float | None]
"""A time in seconds, and a value; ``None`` where there is none, which is a gap."""


@final
@dataclass(frozen=True, slots=True)
class Series:
    """Values over time. ``colour`` is the name of a variable of the page."""

    name: str
    colour: str
    points: Sequence[Point]
    dashed: bool = False


@final
@dataclass(frozen=True, slots=True)
class Span:
    """From when to when, in seconds, something was the matter. Of ``rows`` that lie on each other it takes one."""

    start: float
    end: float
    label: str
    row: int = 0
    rows: int = 1


@final
@dataclass(frozen=True, slots=True)
class Axis:
    """From values to pixels, which are ``length`` long. With ``log`` both ends are powers of ten."""

    low: float
    high: float
    length: float
    log: bool = False

    def at(self, value: float) -> float:
        """Where a value is, within the axis: what is beyond an end is at it."""
        low, high = self.low, self.high
        if self.log:
            low, high, value = log10(low), log10(high), log10(max(value, low))
        return min(1.0, max(0.0, (value - low) / (high - low))) * self.length

    def ticks(self) -> list[float]:
        """Round values from one end to the other."""
        if self.log:
            return [10.0**power for power in range(round(log10(self.low)), round(log10(self.high)) + 1)]
        step = round_step((self.high - self.low) / TICKS)
        return [index * step for index in range(ceil(self.low / step - 1e-9), floor(self.high / step + 1e-9) + 1)]


def round_step(least: float) -> float:
    """The smallest of 1, 2 and 5 times a power of ten that is not below ``least``, which is positive."""
    power = 10.0 ** floor(log10(least))
    return next(times * power for times in (1.0, 2.0, 5.0, 10.0) if times * power >= least * (1 - 1e-9))


def upwards(values: Iterable[float], length: float) -> Axis:
    """An axis from 0 to somewhat more than the largest of ``values``."""
    highest = max(values, default=0.0) or FLAT
    step = round_step(highest / TICKS)
    return Axis(0.0, step * ceil(highest / step - 1e-9), length)


def by_powers(values: Iterable[float], length: float) -> Axis:
    """A logarithmic axis around ``values``, of which those that are not positive do not count."""
    known = [value for value in values if value > 0] or [FLAT]
    low, high = floor(log10(min(known))), ceil(log10(max(known)))
    return Axis(10.0**low, 10.0 ** max(high, low + 1), length, log=True)


def stacked(title: str, unit: str, series: Sequence[Series], seconds: float, spans: Sequence[Span] = ()) -> str:
    """Bars of several series on each other. All have points at the same times, which are where the bars begin."""
    times = [at for at, _ in series[0].points] if series else []
    sums = [sum(one.points[index][1] or 0.0 for one in series) for index in range(len(times))]
    across, up = _across(seconds), upwards(sums, HEIGHT - TOP - BOTTOM)
    drawn = []
    for index, begins in enumerate(times):
        ends = times[index + 1] if index + 1 < len(times) else seconds
        left = across.at(begins)
        width = max(0.5, across.at(ends) - left - 1)
        below = 0.0
        for one in series:
            value = one.points[index][1] or 0.0
            if value <= 0:
                continue
            bottom, top = up.at(below), up.at(below + value)
            below += value
            drawn.append(
                f'<rect x="{_px(LEFT + left)}" y="{_px(HEIGHT - BOTTOM - top)}" width="{_px(width)}" '
                f'height="{_px(top - bottom)}" style="fill:var(--{one.colour})"/>'
            )
    return _figure(title, unit, series, across, up, drawn, spans, bars=True)


def lines(
    title: str, unit: str, series: Sequence[Series], seconds: float, spans: Sequence[Span] = (), *, log: bool = False
) -> str:
    """A line for each series, interrupted where it has no value; a value between two gaps is a dot."""
    values = [value for one in series for _, value in one.points if value is not None]
    across = _across(seconds)
    up = (by_powers if log else upwards)(values, HEIGHT - TOP - BOTTOM)
    drawn = []
    for one in series:
        for part in _unbroken(one.points):
            places = [(LEFT + across.at(at), HEIGHT - BOTTOM - up.at(value)) for at, value in part]
            if len(places) == 1:
                (x, y) = places[0]
                drawn.append(f'<circle cx="{_px(x)}" cy="{_px(y)}" r="2.5" style="fill:var(--{one.colour})"/>')
            else:
                path = " ".join(f"{_px(x)},{_px(y)}" for x, y in places)
                drawn.append(f'<polyline points="{path}" {_stroke(one)}/>')
    return _figure(title, unit, series, across, up, drawn, spans, bars=False)


def _across(seconds: float) -> Axis:
    return Axis(0.0, seconds if seconds > 0 else FLAT, WIDTH - LEFT - RIGHT)


def _unbroken(points: Iterable[Point]) -> list[list[tuple[float, float]]]:
    parts: list[list[tuple[float, float]]] = [[]]
    for at, value in points:
        if value is None:
            parts.append([])
        else:
            parts[-1].append((at, value))
    return [part for part in parts if part]


def _stroke(one: Series) -> str:
    dashes = ";stroke-dasharray:5 3" if one.dashed else ""
    return f'class="line" style="stroke:var(--{one.colour}){dashes}"'


def _figure(
    title: str,
    unit: str,
    series: Sequence[Series],
    across: Axis,
    up: Axis,
    drawn: Sequence[str],
    spans: Sequence[Span],
    *,
    bars: bool,
) -> str:
    """The frame of a plot: title, legend, axes with their units, spans, and what is ``drawn``."""
    floor_y, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    middle = (TOP + floor_y) / 2
    said = f"{title}, {unit} over seconds: " + (", ".join(one.name for one in series) or "nothing")
    out = [
        f'<svg class="plot" viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img" aria-label="{escape(said)}">',
        f'<text class="title" x="{LEFT:g}" y="14">{escape(title)}</text>',
        *_legend(series, bars=bars),
    ]
    for span in spans:
        left, width = across.at(span.start), across.at(span.end) - across.at(span.start)
        height = (floor_y - TOP) / span.rows
        top = TOP + span.row * height
        out.append(
            f'<rect class="span" x="{_px(LEFT + left)}" y="{_px(top)}" width="{_px(width)}" height="{_px(height)}"/>'
            f'<text class="label" x="{_px(LEFT + left + 4)}" y="{_px(top + 11)}">{escape(span.label)}</text>'
        )
    for value in up.ticks():
        y = floor_y - up.at(value)
        out.append(
            f'<line class="grid" x1="{LEFT:g}" x2="{right:g}" y1="{_px(y)}" y2="{_px(y)}"/>'
            f'<text class="tick" x="{LEFT - 6:g}" y="{_px(y + 4)}" text-anchor="end">{value:g}</text>'
        )
    for value in across.ticks():
        x = LEFT + across.at(value)
        out.append(f'<text class="tick" x="{_px(x)}" y="{floor_y + 15:g}" text-anchor="middle">{value:g}</text>')
    out += drawn
    out += [
        f'<line class="axis" x1="{LEFT:g}" x2="{right:g}" y1="{floor_y:g}" y2="{floor_y:g}"/>',
        f'<text class="label" x="{(LEFT + right) / 2:g}" y="{HEIGHT - 8:g}" text-anchor="middle">seconds</text>',
        f'<text class="label unit" transform="translate(13 {middle:g}) rotate(-90)">{escape(unit)}</text>',
    ]
    if not drawn:
        out.append(f'<text class="label" x="{WIDTH / 2:g}" y="{middle:g}" text-anchor="middle">nothing to show</text>')
    return "\n".join([*out, "</svg>"])


def _legend(series: Sequence[Series], *, bars: bool) -> Iterable[str]:
    x = LEFT
    for one in series:
        if bars:
            yield f'<rect x="{_px(x)}" y="24" width="14" height="10" style="fill:var(--{one.colour})"/>'
        else:
            yield f'<line x1="{_px(x)}" x2="{_px(x + 18)}" y1="29" y2="29" {_stroke(one)}/>'
        yield f'<text class="label" x="{_px(x + 22)}" y="33">{escape(one.name)}</text>'
        x += 34 + 6.2 * len(one.name)


def _px(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
