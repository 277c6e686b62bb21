"""Admitted and refused requests over time as a picture, in SVG or PNG, with nothing but the standard library.

A drawing is a list of boxes and texts in a plane of `WIDTH` by `HEIGHT`; each format is one way to write them down.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Literal, NamedTuple, TypeAlias, final
from xml.sax.saxutils import escape

from seawall.config.diagnostics import printable
from seawall.replay.tally import SERVED

WIDTH = 960
HEIGHT = 360
COLOURS = ("#c0392b", "#e67e22", "#8e44ad", "#16a085", "#d4ac0d", "#7f8c8d")
"""Of the limits that refused most; the last one is all others together."""
ADMITTED = "#9db8d2"
INK = "#333333"
PAPER = "#ffffff"
GRID = "#e4e4e4"

_LEFT, _TOP, _RIGHT, _BOTTOM = 70, 46, 20, 40
_SCALE = 2
_LETTER = 6
"""Width of a letter of a PNG, of which 5 are dots."""

Column: TypeAlias = tuple[int, Mapping[str, int]]


@final
class Box(NamedTuple):
    x: float
    y: float
    width: float
    height: float
    colour: str
    title: str = ""


@final
class Words(NamedTuple):
    x: float
    y: float
    """Of the line that the letters stand on."""
    text: str
    anchor: Literal["start", "middle", "end"] = "start"


Drawing: TypeAlias = list[Box | Words]


def bars(columns: Sequence[Column], width: int) -> Drawing:
    """Stacked bars: what was admitted, and above it what each limit refused. ``width`` is a column's, in seconds."""
    totals: dict[str, int] = {}
    for _, counts in columns:
        for series, count in counts.items():
            if series != SERVED:
                totals[series] = totals.get(series, 0) + count
    ranked = sorted(totals, key=lambda series: (-totals[series], series))
    own = len(COLOURS) if len(ranked) <= len(COLOURS) else len(COLOURS) - 1
    colours = {series: COLOURS[min(at, len(COLOURS) - 1)] for at, series in enumerate(ranked)}
    most = max((sum(counts.values()) for _, counts in columns), default=0)
    top = _round_up(most)
    high, wide = HEIGHT - _TOP - _BOTTOM, WIDTH - _LEFT - _RIGHT
    floor = HEIGHT - _BOTTOM
    drawing: Drawing = [Box(0, 0, WIDTH, HEIGHT, PAPER)]
    for part in range(5):
        y = floor - high * part / 4
        drawing.append(Box(_LEFT, y, wide, 1, GRID))
        drawing.append(Words(_LEFT - 6, y + 4, f"{top * part / 4:,.10g}", "end"))
    each = wide / max(1, len(columns))
    for at, (begin, counts) in enumerate(columns):
        y = float(floor)
        when = f"{datetime.fromtimestamp(begin, UTC):%Y-%m-%d %H:%M:%S}Z"
        for series in (SERVED, *ranked):
            count = counts.get(series, 0)
            if count:
                # What was refused is seen, however little it is.
                tall = max(1.0, high * count / top)
                y -= tall
                title = f"{when}: {count:,} {series or 'admitted'}"
                colour = colours.get(series, ADMITTED)
                drawing.append(Box(_LEFT + at * each, y, max(1.0, each * 0.9), tall, colour, title))
    drawing += _times(columns, each, floor)
    drawing += _legend([("admitted", ADMITTED), *((name, colours[name]) for name in ranked[:own])], len(ranked) - own)
    drawing.append(Words(WIDTH - _RIGHT, HEIGHT - 8, f"requests in {_span(width)}, times in UTC", "end"))
    return drawing


def _times(columns: Sequence[Column], each: float, floor: float) -> Drawing:
    drawing: Drawing = []
    step = max(1, -(-len(columns) // 7))
    for at in range(0, len(columns), step):
        moment = datetime.fromtimestamp(columns[at][0], UTC)
        drawing.append(Box(_LEFT + at * each, floor, 1, 4, INK))
        drawing.append(Words(_LEFT + at * each, floor + 18, f"{moment:%m-%d %H:%M}", "start"))
    return drawing


def _legend(entries: Sequence[tuple[str, str]], others: int) -> Drawing:
    drawing: Drawing = []
    x, y = float(_LEFT), 18.0
    for name, colour in [*entries, *([(f"{others} others", COLOURS[-1])] if others > 0 else [])]:
        needed = 26 + _LETTER * 1.1 * len(name)
        if x + needed > WIDTH - _RIGHT and x > _LEFT:
            x, y = float(_LEFT), y + 16
        drawing += [Box(x, y - 9, 10, 10, colour), Words(x + 15, y, name)]
        x += needed
    return drawing


def _round_up(count: int) -> int:
    """The next of 4, 8, 12, 20, 28, 40, 80, ...: what has quarters that people can read."""
    size = 4
    while True:
        for factor in (1, 2, 3, 5, 7):
            if count <= size * factor:
                return size * factor
        size *= 10


def _span(seconds: int) -> str:
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds % size == 0:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"


def svg(drawing: Drawing) -> str:
    """A drawing as an SVG that needs nothing else; a bar tells its numbers to whoever points at it."""
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12" role="img">',
        "<title>Requests over time, and by which limit they are refused</title>",
    ]
    for item in drawing:
        if isinstance(item, Box):
            box = f'<rect x="{item.x:g}" y="{item.y:g}" width="{item.width:g}" height="{item.height:g}"'
            title = f"><title>{escape(printable(item.title))}</title></rect>" if item.title else "/>"
            lines.append(f'{box} fill="{item.colour}"{title}')
        else:
            text = escape(printable(item.text))
            lines.append(f'<text x="{item.x:g}" y="{item.y:g}" text-anchor="{item.anchor}" fill="{INK}">{text}</text>')
    return "\n".join([*lines, "</svg>\n"])


def png(drawing: Drawing) -> bytes:
    """A drawing as a PNG of twice its size (W3C Portable Network Graphics, truecolour, one filter for all rows)."""
    wide, high = WIDTH * _SCALE, HEIGHT * _SCALE
    rows = [bytearray(wide * 3) for _ in range(high)]
    for item in drawing:
        if isinstance(item, Box):
            _fill(rows, item.x, item.y, item.width, item.height, item.colour)
        else:
            _write(rows, item)
    raw = b"".join(b"\0" + row for row in rows)
    header = struct.pack(">IIBBBBB", wide, high, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(raw, 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


def _fill(rows: list[bytearray], x: float, y: float, width: float, height: float, colour: str) -> None:
    left, right = (max(0, min(round(each * _SCALE), WIDTH * _SCALE)) for each in (x, x + width))
    top, bottom = (max(0, min(round(each * _SCALE), HEIGHT * _SCALE)) for each in (y, y + height))
    pixels = bytes.fromhex(colour[1:]) * (right - left)
    for row in rows[top:bottom]:
        row[left * 3 : right * 3] = pixels


def _write(rows: list[bytearray], words: Words) -> None:
    text = printable(words.text)
    length = len(text) * _LETTER
    x = words.x - {"start": 0.0, "middle": length / 2, "end": float(length)}[words.anchor]
    for letter in text:
        at = (ord(letter) - 32) * 5
        for across, dots in enumerate(_FONT[at : at + 5] or _UNKNOWN):
            for down in range(8):
                if dots >> down & 1:
                    _fill(rows, x + across, words.y - 7 + down, 1, 1, INK)
        x += _LETTER


_FONT = bytes.fromhex("""
    0000000000 00005f0000 0007000700 147f147f14 242a7f2a12 2313086462 3649552250 0005030000 001c224100 0041221c00
    14083e0814 08083e0808 0050300000 0808080808 0060600000 2010080402 3e5149453e 00427f4000 4261514946 2141454b31
    1814127f10 2745454539 3c4a494930 0171090503 3649494936 064949291e 0036360000 0056360000 0814224100 1414141414
    0041221408 0201510906 324979413e 7e1111117e 7f49494936 3e41414122 7f4141221c 7f49494941 7f09090901 3e4149497a
    7f0808087f 00417f4100 2040413f01 7f08142241 7f40404040 7f020c027f 7f0408107f 3e4141413e 7f09090906 3e4151215e
    7f09192946 4649494931 01017f0101 3f4040403f 1f2040201f 3f4038403f 6314081463 0708700807 6151494543 007f414100
    0204081020 0041417f00 0402010204 4040404040 0001020400 2054545478 7f48444438 3844444420 384444487f 3854545418
    087e090102 0c5252523e 7f08040478 00447d4000 2040443d00 7f10284400 00417f4000 7c04180478 7c08040478 3844444438
    7c14141408 081414187c 7c08040408 4854545420 043f444020 3c4040207c 1c2040201c 3c4030403c 4428102844 0c5050503c
    4464544c44 0008364100 00007f0000 0041360800 0804081008
""")
"""The printable letters of ASCII, five columns of eight dots each: a byte for a column, the lowest bit on top."""
_UNKNOWN = bytes.fromhex("7f4141417f")
