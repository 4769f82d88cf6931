"""Line charts as SVG, readable on light and dark backgrounds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 640, 320
LEFT, RIGHT, TOP, BOTTOM = 64, 24, 40, 52

STYLE = """
text { font: 12px system-ui, sans-serif; fill: #1f2328 }
.title { font-weight: 600; font-size: 14px }
.grid { stroke: #8c959f; stroke-opacity: .35 }
.line { stroke: #0969da; fill: none; stroke-width: 2 }
.bar { stroke: #0969da; stroke-opacity: .6 }
.dot { fill: #0969da }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 }
  .line, .bar { stroke: #58a6ff }
  .dot { fill: #58a6ff }
}
"""


@dataclass(frozen=True)
class Point:
    """One point of a chart. y: the plotted value. low, high: the range of the measurements at x."""

    x: float
    y: float
    low: float
    high: float


def chart(title: str, x_label: str, y_label: str, points: list[Point], logarithmic: bool = True) -> str:
    """Return a chart of the points, sorted by x; the y axis starts at 0. logarithmic: the x axis; needs x above 0."""
    points = sorted(points, key=lambda point: point.x)
    scale = math.log10 if logarithmic else float
    first, last = scale(points[0].x), scale(points[-1].x)
    step = _step(max(point.high for point in points) * 1.1)
    top = step * math.ceil(max(point.high for point in points) * 1.05 / step)

    def x(value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (scale(value) - first) / ((last - first) or 1)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * value / top

    parts = [_text(WIDTH / 2, 22, title, "middle", "title")]
    for number in range(round(top / step) + 1):
        level = y(number * step)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{level:.1f}" y2="{level:.1f}"/>')
        parts.append(_text(LEFT - 8, level + 4, f"{number * step:,g}", "end"))
    for point in points:
        parts.append(_text(x(point.x), HEIGHT - BOTTOM + 18, f"{point.x:,g}", "middle"))
    parts.append(_text(WIDTH / 2, HEIGHT - 12, x_label, "middle"))
    parts.append(f'<g transform="rotate(-90)">{_text(-HEIGHT / 2, 16, y_label, "middle")}</g>')
    path = " ".join(f"{x(point.x):.1f},{y(point.y):.1f}" for point in points)
    parts.append(f'<polyline class="line" points="{path}"/>')
    for point in points:
        at = f"{x(point.x):.1f}"
        parts.append(f'<line class="bar" x1="{at}" x2="{at}" y1="{y(point.low):.1f}" y2="{y(point.high):.1f}"/>')
        parts.append(f'<circle class="dot" cx="{at}" cy="{y(point.y):.1f}" r="3.5"/>')
    body = "\n".join(parts)
    view = f'viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {view} role="img" aria-label="{escape(title)}">'
    return f"{head}\n<style>{STYLE}</style>\n{body}\n</svg>\n"


def _step(most: float) -> float:
    """Return a round distance between grid lines, for four to eight lines."""
    power: float = 10 ** math.floor(math.log10(most))
    return next(power * part for part in (0.1, 0.2, 0.25, 0.5, 1.0, 2.0) if most / (power * part) <= 8)


def _text(x: float, y: float, text: str, anchor: str, kind: str = "") -> str:
    name = f' class="{kind}"' if kind else ""
    return f'<text{name} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
