"""Numbers as pictures without a plotting library: a line of blocks, a plot of braille dots, a self-contained SVG."""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Mapping, Sequence

Series = Sequence[tuple[float, float]]  # (step, value), in order of steps

_BLOCKS = "▁▂▃▄▅▆▇█"
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # Unicode 0x2800: two columns of four dots, by row
# Okabe and Ito's colours, which people with any colour vision can tell apart.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


def sparkline(series: Series, width: int = 24) -> str:
    """The values as one line of block characters; NaN and infinities are `!`. Empty for no values."""
    values = [value for _, value in _thinned(series, width)]
    low, high = _range(values)
    span = (high - low) or 1.0
    return "".join(
        _BLOCKS[round((value - low) / span * (len(_BLOCKS) - 1))] if math.isfinite(value) else "!" for value in values
    )


def braille(series: Mapping[str, Series], width: int = 72, height: int = 16) -> str:
    """A terminal plot with axes, `width` x `height` characters for the dots; several series share it, and a legend names them."""
    points = {name: [p for p in line if math.isfinite(p[1])] for name, line in series.items()}
    every = [p for line in points.values() for p in line]
    if not every:
        return "nothing to plot"
    low, high = _range([value for _, value in every])
    first, last = min(step for step, _ in every), max(step for step, _ in every)
    cells = [[0] * width for _ in range(height)]
    for line in points.values():
        for column, row in _pixels(line, (first, last), (low, high), width * 2, height * 4):
            cells[row // 4][column // 2] |= _DOTS[row % 4][column % 2]
    labels = [f"{high:.4g}", *[""] * (height - 2), f"{low:.4g}"]
    margin = max(map(len, labels))
    lines = [f"{label:>{margin}} │{''.join(chr(0x2800 + cell) for cell in row)}" for label, row in zip(labels, cells)]
    ends = f"{first:g}{f'{last:g}':>{max(1, width - len(f'{first:g}'))}}"
    return "\n".join([*lines, f"{'':>{margin}} └{'─' * width}", f"{'':>{margin}}  {ends}", "  ".join(points)])


def svg(
    series: Mapping[str, Series], title: str, *, width: int = 640, height: int = 260, log_scale: bool = False
) -> str:
    """One chart as an SVG element: a line per series, labelled axes, a legend. Not finite values break the line."""
    left, right, top, bottom = 62, 12, 28, 34
    shown = {
        name: [(s, v) for s, v in _thinned(line, 1000) if math.isfinite(v) and (v > 0 or not log_scale)]
        for name, line in series.items()
    }
    every = [p for line in shown.values() for p in line]
    if not every:
        return f"<p>{html.escape(title)}: no finite values</p>"
    scale = math.log10 if log_scale else float
    low, high = _range([scale(value) for _, value in every])
    if log_scale:  # whole decades, so that the axis has round numbers
        low, high = math.floor(low), math.ceil(high)
    first, last = min(step for step, _ in every), max(step for step, _ in every)
    step_span, span = (last - first) or 1.0, (high - low) or 1.0

    def place(step: float, value: float) -> tuple[float, float]:
        x = left + (step - first) / step_span * (width - left - right)
        return x, height - bottom - (scale(value) - low) / span * (height - top - bottom)

    parts = [
        f'<svg viewBox="0 0 {width} {height}" role="img" xmlns="http://www.w3.org/2000/svg">',
        f"<title>{html.escape(title)}</title>",
        f'<text x="{left}" y="16" class="title">{html.escape(title)}</text>',
    ]
    for tick in _ticks(low, high, least=1.0 if log_scale else 0.0):
        y = height - bottom - (tick - low) / span * (height - top - bottom)
        text = f"{10**tick:.3g}" if log_scale else f"{tick:.4g}"
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    for tick in _ticks(first, last):
        x = left + (tick - first) / step_span * (width - left - right)
        parts.append(f'<text x="{x:.1f}" y="{height - 14}" text-anchor="middle">{tick:g}</text>')
    legend = width - right
    for index, (name, line) in enumerate(shown.items()):
        color = COLORS[index % len(COLORS)]
        coordinates = [place(*point) for point in line]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in coordinates)
        if len(coordinates) == 1:
            x, y = coordinates[0]
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>')
        else:
            # Dashed from the second line on: equal curves lie on each other, and both are to be seen.
            dashes = f' stroke-dasharray="{4 + 2 * index} 5"' if index else ""
            parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.5"{dashes}/>')
        if len(shown) > 1:
            parts.append(f'<text x="{legend}" y="16" text-anchor="end" style="fill:{color}">{html.escape(name)}</text>')
            legend -= 9 * len(name) + 14
    return "".join([*parts, "</svg>"])


def _thinned(series: Series, count: int) -> list[tuple[float, float]]:
    """At most `count` points: of every stretch the last, so that the newest value is always there."""
    points = list(series)
    if len(points) <= count:
        return points
    return [points[(index + 1) * len(points) // count - 1] for index in range(count)]


def _range(values: Sequence[float]) -> tuple[float, float]:
    finite = [value for value in values if math.isfinite(value)]
    return (min(finite), max(finite)) if finite else (0.0, 0.0)


def _pixels(
    line: Series, steps: tuple[float, float], values: tuple[float, float], columns: int, rows: int
) -> list[tuple[int, int]]:
    """The dots of a line: every column between two points has one, and a steep part is filled from row to row."""
    step_span, span = (steps[1] - steps[0]) or 1.0, (values[1] - values[0]) or 1.0
    ends = [
        (round((s - steps[0]) / step_span * (columns - 1)), round((1 - (v - values[0]) / span) * (rows - 1)))
        for s, v in line
    ]
    dots = list(ends)
    for (x0, y0), (x1, y1) in itertools.pairwise(ends):
        count = max(x1 - x0, abs(y1 - y0))
        dots += [(x0 + (x1 - x0) * i // count, y0 + round((y1 - y0) * i / count)) for i in range(1, count)]
    return dots


def _ticks(low: float, high: float, *, least: float = 0.0) -> list[float]:
    """About four round numbers between low and high, at least `least` apart."""
    if not high > low:
        return [low]
    raw = max((high - low) / 4, least)
    unit = 10 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= raw)
    start = math.ceil(low / step)
    return [round(index * step, 12) for index in range(start, math.floor(high / step + 1e-9) + 1)]
