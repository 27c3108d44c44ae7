"""Curves as small charts that follow the page's colours, light or dark, and fit a phone."""

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator


SIZE = 3.3, 1.6  # inches
FEW = 20  # points that are marked each
# Colours that stand for the page's own, which it may change from light to dark.
COLOURS = {f"#00000{i + 1}": f"var(--c{i})" for i in range(6)} | {"#00000a": "var(--soft)", "#00000b": "var(--line)"}
CURVES, SOFT, LINE = list(COLOURS)[:6], "#00000a", "#00000b"


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
    """Draw the panel as an SVG element; empty without a finite point."""
    drawn = [_finite(curve) for curve in panel.curves]
    if not any(math.isfinite(y) for _, ys in drawn for y in ys):
        return Markup("")
    with matplotlib.rc_context({"svg.hashsalt": repr(panel), "svg.fonttype": "none", "font.size": 8}):
        figure = Figure(figsize=SIZE, layout="constrained")
        axes = figure.subplots()
        for i, (curve, (x, y)) in enumerate(zip(panel.curves, drawn, strict=True)):
            colour = CURVES[i % len(CURVES)]
            style: dict[str, Any] = {"alpha": 0.35, "linewidth": 0.8} if curve.smooth > 1 else {"linewidth": 1.4}
            axes.plot(x, y, color=colour, marker="o" if len(x) < FEW else None, markersize=2.5, **style)
            if curve.smooth > 1:
                axes.plot(*moving_mean(curve.x, curve.y, curve.smooth), color=colour, linewidth=1.4)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.grid(color=LINE, linewidth=0.6)
        axes.tick_params(length=0, labelcolor=SOFT)
        axes.spines[:].set_visible(False)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = out.getvalue()
    svg = re.sub("|".join(COLOURS), lambda found: COLOURS[found[0]], svg[svg.index("<svg") :])
    svg = re.sub("<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font-family: [^;]*; ?", "", svg)  # the page's own
    opening = Markup('<svg class="chart" role="img" aria-label="{}" ').format(panel.title)
    return opening + Markup(re.sub(r'^<svg |(width|height)="[\d.]+pt" ', "", svg))


def moving_mean(x: Sequence[float], y: Sequence[float], width: int) -> tuple[list[float], list[float]]:
    """
    Average windows of `width` points: the x of each window's last point, and its mean; points not finite left out.
    """
    points = [(a, b) for a, b in zip(x, y, strict=True) if math.isfinite(b)]
    width = max(1, min(width, len(points)))
    ends = range(width, len(points) + 1)
    return [points[i - 1][0] for i in ends], [sum(b for _, b in points[i - width : i]) / width for i in ends]


def _finite(curve: Curve) -> tuple[list[float], list[float]]:
    """Return the curve's points, those that are not finite as gaps."""
    finite = [math.isfinite(a) and math.isfinite(b) for a, b in zip(curve.x, curve.y, strict=True)]
    return list(curve.x), [y if ok else math.nan for y, ok in zip(curve.y, finite, strict=True)]
