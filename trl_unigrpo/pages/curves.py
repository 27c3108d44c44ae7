"""Curves as small SVG charts that follow the page's colours, light or dark, and fit a phone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup
from matplotlib.ticker import MaxNLocator


WIDTH, HEIGHT = 320, 150
LEFT, RIGHT, TOP, BOTTOM = 46, 8, 8, 20
COLOURS = 6  # classes c0 ... c5 of the base template


@dataclass(frozen=True)
class Curve:
    """
    A line of a chart.

    Attributes:
        name: in the legend; "" for none.
        x, y: equally many numbers; points that are not finite are left out and interrupt the line.
        smooth: number of points in the moving mean that is drawn over the faint line of the points; 1 for none.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    smooth: int = 1


@dataclass(frozen=True)
class Panel:
    """A chart: its title, what it means, and its curves."""

    title: str
    curves: Sequence[Curve]
    note: str = ""


def chart(panel: Panel) -> Markup:
    """The panel as an SVG element with at most four ticks on each axis; empty without a finite point."""
    points = [
        (x, y) for c in panel.curves for x, y in zip(c.x, c.y, strict=True) if math.isfinite(x) and math.isfinite(y)
    ]
    if not points:
        return Markup("")
    x_low, x_high = _span([x for x, _ in points])
    y_low, y_high = _span([y for _, y in points])

    def place(x: float, y: float) -> tuple[float, float]:
        right = LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
        down = HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)
        return round(right, 1), round(down, 1)

    parts = [
        Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">').format(WIDTH, HEIGHT, panel.title)
    ]
    for value in _ticks(y_low, y_high):
        _, y = place(x_low, value)
        parts.append(Markup('<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(LEFT, WIDTH - RIGHT, y, y))
        parts.append(Markup('<text x="{}" y="{}" text-anchor="end">{:.4g}</text>').format(LEFT - 5, y + 3.5, value))
    for value in _ticks(x_low, x_high, whole=True):
        x, _ = place(value, y_low)
        parts.append(Markup('<text x="{}" y="{}" text-anchor="middle">{:.6g}</text>').format(x, HEIGHT - 4, value))
    for i, curve in enumerate(panel.curves):
        faint = curve.smooth > 1
        parts += _lines([place(x, y) if math.isfinite(y) else None for x, y in _pairs(curve)], i, faint)
        if faint:
            xs, means = moving_mean(curve.x, curve.y, curve.smooth)
            parts += _lines([place(x, y) for x, y in zip(xs, means, strict=True)], i, False)
    return Markup("").join([*parts, Markup("</svg>")])


def moving_mean(x: Sequence[float], y: Sequence[float], width: int) -> tuple[list[float], list[float]]:
    """The x of each window's last point, and the mean of the window's `width` points; points not finite left out."""
    points = [(a, b) for a, b in zip(x, y, strict=True) if math.isfinite(b)]
    width = max(1, min(width, len(points)))
    ends = range(width, len(points) + 1)
    return [points[i - 1][0] for i in ends], [sum(b for _, b in points[i - width : i]) / width for i in ends]


def _pairs(curve: Curve) -> list[tuple[float, float]]:
    return list(zip(curve.x, curve.y, strict=True))


def _span(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    if high > low:
        return low, high
    margin = abs(low) / 10
    return (low - margin, high + margin) if low else (0.0, 1.0)


def _ticks(low: float, high: float, whole: bool = False) -> list[float]:
    return [float(t) for t in MaxNLocator(4, integer=whole).tick_values(low, high) if low <= t <= high]


def _lines(points: Sequence[tuple[float, float] | None], colour: int, faint: bool) -> list[Markup]:
    """The points as polylines, one for each stretch without a gap; a point alone as a dot."""
    kind = f"c{colour % COLOURS}" + (" faint" if faint else "")
    stretches: list[list[tuple[float, float]]] = [[]]
    for point in points:
        if point is None:
            stretches.append([])
        else:
            stretches[-1].append(point)
    found = []
    for stretch in filter(None, stretches):
        if len(stretch) == 1:
            x, y = stretch[0]
            found.append(Markup('<circle class="{}" cx="{}" cy="{}" r="2.5"/>').format(kind, x, y))
        else:
            path = " ".join(f"{x:g},{y:g}" for x, y in stretch)
            found.append(Markup('<polyline class="{}" points="{}"/>').format(kind, path))
    return found
