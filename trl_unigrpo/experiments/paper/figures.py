"""
The page's figures.

A system has one colour in all of them; without thinking it is dashed or hollow. They are about as wide as a phone's
page is at twice its size, on white, so that they read there and on a dark page. The same results give the same bytes.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter
from PIL import Image

from .claims import REFERENCE
from .order import WITHOUT_THINKING
from .tables import rows


WIDTH = 5.4
"""Inches, at 72 points: 518 pixels of a web page."""

STYLE: dict[Any, Any] = {
    "svg.hashsalt": "trl-unigrpo",
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.alpha": 0.3,
    "text.parse_math": False,
}

# Okabe and Ito's palette, which colour-blind readers tell apart, and shades of it. Methods that share a figure are
# far from each other in it.
SYSTEM_COLORS = {
    "base": "#6b6b6b",
    "sft": "#a0a0a0",
    "sft_clean": "#c4c4c4",
    "refl": "#b8860b",
    "fpo": "#56b4e9",
    "awm": "#009e73",
    "nft": "#7a9a01",
    "flow_grpo": "#0072b2",
    "text_grpo": "#e69f00",
    "two_stage": "#8c564b",
    "unifpo": "#cc79a7",
    "unigrpo": "#d55e00",
    "uniawm": "#5b3a8e",
    "uninft": "#882255",
    "velocity_mse": "#d55e00",
    "none": "#000000",
    "latent_kl": "#0072b2",
    "latent_kl_matched": "#56b4e9",
    "velocity_mse_10": "#cc79a7",
    "guidance_off": "#d55e00",
    "guidance_on": "#0072b2",
}
OTHER_COLOR = "#4d4d4d"

SCALE = 3
"""An image of 48 pixels is enlarged so many times, each pixel to a square."""
TILE_GAP = 8
"""Pixels between enlarged images."""


def color(system: str) -> str:
    """Give a system's colour: that of its method with thinking, and of its regulariser in a long run."""
    return SYSTEM_COLORS.get(system.removesuffix("_thinking").removeprefix("long_"), OTHER_COLOR)


def svg(figure: Figure) -> str:
    """Write the figure as SVG without date, version or random names."""
    out = io.StringIO()
    figure.savefig(out, format="svg", facecolor="white", metadata={"Date": None, "Creator": None})
    return out.getvalue()


def spaced(heights: Sequence[float], gap: float) -> list[float]:
    """
    Place labels at heights as near as can be to those given, in their order and at least `gap` apart.

    Labels that touch form a block around the mean of what they want; blocks that touch are merged.
    """
    order = np.argsort(heights, kind="stable")
    blocks: list[list[float]] = []  # [lowest label, number of labels]
    for height in np.asarray(heights, dtype=float)[order]:
        blocks.append([height, 1])
        while len(blocks) > 1 and blocks[-2][0] + gap * blocks[-2][1] > blocks[-1][0]:
            upper, lower = blocks.pop(), blocks.pop()
            number = lower[1] + upper[1]
            wanted = lower[1] * lower[0] + upper[1] * (upper[0] - gap * lower[1])
            blocks.append([wanted / number, number])
    placed = np.empty(len(order))
    placed[order] = [low + gap * i for low, number in blocks for i in range(int(number))]
    return placed.tolist()


Label = tuple[str, float, float, str]
"""Its text, the point (x, y) that it names, and its colour."""


def label_right(axes: Axes, labels: Sequence[Label], gap: float) -> None:
    """Write names right of the axes, each at its point's height or as near as they fit, `gap` axes' heights apart."""
    axes.get_ylim()  # settles the limits, on which the heights depend
    to_axes = axes.transData + axes.transAxes.inverted()
    heights = spaced([to_axes.transform((x, y))[1] for _, x, y, _ in labels], gap)
    for (text, x, y, of), height in zip(labels, heights, strict=True):
        axes.annotate(
            text,
            (x, y),
            (1.03, height),
            textcoords="axes fraction",
            color=[0.75 * part for part in to_rgb(of)],  # thin strokes need more contrast than lines
            va="center",
            fontsize=8.5,
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": of,
                "alpha": 0.4,
                "linewidth": 0.7,
                "relpos": (0, 0.5),
                "shrinkA": 0,
                "shrinkB": 0,
            },
        )


def plain_numbers(axis: Axis) -> None:
    """Set ticks of a logarithmic axis at 1, 2 and 5 times the powers of ten, or a few even ones, as numbers."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)) if high > 10 * low else MaxNLocator(4))
    axis.set_major_formatter(FormatStrFormatter("%g"))
    axis.set_minor_formatter(NullFormatter())


def table_figure(results: Mapping[str, Any]) -> Figure | None:
    """Draw Table 1 as points with their intervals, the best on top."""
    shown = rows(results, "table1")
    if not shown:
        return None
    figure = Figure(figsize=(WIDTH, 0.9 + 0.24 * len(shown)), layout="constrained")
    axes = figure.subplots()
    for y, (name, system, mode) in enumerate(sorted(shown, key=lambda row: row[1]["modes"][row[2]]["rule"]["mean"])):
        found = system["modes"][mode]["rule"]
        axes.plot([found["low"], found["high"]], [y, y], color=color(name), linewidth=2.4, solid_capstyle="butt")
        hollow = "white" if mode == "direct" else color(name)
        axes.plot(found["mean"], y, "o", color=color(name), markerfacecolor=hollow, markersize=5.5)
        both = {"direct", "sampled"} <= set(system["modes"])
        axes.text(
            -0.02,
            y,
            system["title"] + ", no thinking" * (both and mode == "direct"),
            transform=axes.get_yaxis_transform(),
            ha="right",
            va="center",
            weight="bold" if name == REFERENCE[0] else "normal",
        )
    axes.set_yticks([])
    axes.set_ylim(-0.7, len(shown) - 0.3)
    axes.set_xlabel("the rule's score on held-out prompts (hollow: without thinking)", loc="right")
    return figure


def curves_figure(results: Mapping[str, Any]) -> Figure | None:
    """Draw Figure 3: training reward over rollouts and over CPU seconds."""
    systems = results["systems"]
    shown = {
        name: curve
        for name, curve in results["curves"].items()
        if systems[name]["group"] == "table1" and name not in ("sft", "sft_clean")
    }
    if not shown:
        return None
    figure = Figure(figsize=(WIDTH, 7.6), layout="constrained")
    panels = figure.subplots(2, 1, sharey=True)
    for axes, key, label in zip(panels, ("rollouts", "cpu_seconds"), ("rollouts", "CPU seconds"), strict=True):
        labels = []
        for name, curve in shown.items():
            own = name == REFERENCE[0]
            axes.fill_between(curve[key], curve["low"], curve["high"], color=color(name), alpha=0.15, linewidth=0)
            axes.plot(
                curve[key],
                curve["reward"],
                color=color(name),
                linewidth=2.6 if own else 1.4,
                linestyle="--" if name in WITHOUT_THINKING else "-",
                zorder=3 if own else 2,
            )
            labels.append((systems[name]["title"], curve[key][-1], curve["reward"][-1], color(name)))
        axes.set_xlabel(label)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.set_ylabel("learned reward of the rollouts")
        axes.set_xlim(left=0)
        label_right(axes, labels, 0.058)
    return figure


def guidance_figure(results: Mapping[str, Any]) -> Figure | None:
    """Draw Figure 4: guidance in training x guidance in evaluation."""
    if not results["figure4"]:
        return None
    figure = Figure(figsize=(WIDTH, 2.8), layout="constrained")
    axes = figure.subplots()
    labels = []
    for offset, (name, cells) in zip((-0.04, 0.04), results["figure4"]["cells"].items(), strict=False):
        points = [(x + offset, cells[mode]) for x, mode in enumerate(("sampled", "guided")) if cells.get(mode)]
        for x, of in points:
            axes.plot([x, x], [of["low"], of["high"]], color=color(name), linewidth=2.4, solid_capstyle="butt")
        axes.plot([x for x, _ in points], [of["mean"] for _, of in points], "o-", color=color(name), linewidth=1.2)
        if points:
            x, of = points[-1]
            labels.append((results["systems"][name]["title"], x, of["mean"], color(name)))
    scale = results["figure4"]["guidance_scale"]
    axes.set_xticks([0, 1], ["without guidance", "with guidance" + (f", scale {scale:g}" if scale else "")])
    axes.set_xlim(-0.3, 1.3)
    axes.set_xlabel("evaluated")
    axes.set_ylabel("the rule's score on held-out prompts")
    label_right(axes, labels, 0.13)
    return figure


def hacking_figure(results: Mapping[str, Any]) -> Figure | None:
    """Draw the way of each long run: the learned reward to the right, the rule up; thin lines are single seeds."""
    curves = results["validation"]
    if not curves:
        return None
    figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
    axes = figure.subplots()
    first = next(iter(curves.values()))  # all start from the same model
    axes.plot(first["learned"][0][0], first["rule"][0][0], "s", color=color("base"), markersize=6, zorder=3)
    labels = []
    for name, curve in curves.items():
        for learned, rule in zip(curve["learned"], curve["rule"], strict=True):
            axes.plot(learned, rule, color=color(name), linewidth=0.7, alpha=0.3)
        learned, rule = (np.mean(curve[key], axis=0) for key in ("learned", "rule"))
        axes.plot(learned, rule, color=color(name), linewidth=2.2)
        axes.plot(learned[-1], rule[-1], "o", color=color(name), markersize=6)
        labels.append((results["systems"][name]["title"], learned[-1], rule[-1], color(name)))
    axes.set_xlabel("learned reward, which is trained on")
    axes.set_ylabel("the rule's score, which is not")
    label_right(axes, labels, 0.07)
    return figure


def regularizer_figure(results: Mapping[str, Any]) -> Figure | None:
    """Draw Figure 5: learned reward, rule and image error over the long runs, from lowest to highest seed."""
    curves = results["validation"]
    if not curves:
        return None
    figure = Figure(figsize=(WIDTH, 8.4), layout="constrained")
    panels = figure.subplots(3, 1, sharex=True)
    names = {"learned": "learned reward", "rule": "the rule's score", "image_error": "image error"}
    for axes, (key, label) in zip(panels, names.items(), strict=True):
        labels = []
        for name, curve in curves.items():
            seeds = np.array(curve[key])
            mean, x = seeds.mean(0), curve["rollouts"]
            axes.fill_between(x, seeds.min(0), seeds.max(0), color=color(name), alpha=0.12, linewidth=0)
            axes.plot(x, mean, color=color(name), linewidth=1.8)
            labels.append((results["systems"][name]["title"], x[-1], mean[-1], color(name)))
        if key == "image_error":
            axes.set_yscale("log")
            plain_numbers(axes.yaxis)
        axes.set_ylabel(label)
        axes.set_xlim(left=0)
        label_right(axes, labels, 0.11)
    panels[-1].set_xlabel("rollouts")
    panels[-1].xaxis.set_major_locator(MaxNLocator(4, integer=True, steps=[1, 2, 5, 10]))
    panels[-1].xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    return figure


def trace_image(output: Path, trace: Mapping[str, Any], systems: Sequence[str]) -> Image.Image | None:
    """
    Put one prompt's images side by side, enlarged, in the order of `systems`; None if one of them is not there.

    Args:
        output: the folder of the runs, whose strips the images are cut from.
        trace: an entry of the results' `traces`.
    """
    tiles = []
    for system in systems:
        sample = trace["samples"][system]
        file = output / sample["strip"]
        if not file.is_file():
            return None
        with Image.open(file) as strip:
            side = strip.height
            if strip.width < side * (sample["index"] + 1):
                raise ValueError(
                    f"{file} is {strip.width} x {side} pixels: it has no image {sample['index'] + 1}, which "
                    "run.json names. Delete the run's folder, and it is done again."
                )
            tile = strip.convert("RGB").crop((side * sample["index"], 0, side * (sample["index"] + 1), side))
        tiles.append(tile.resize((side * SCALE, side * SCALE), Image.Resampling.NEAREST))
    sheet = Image.new(
        "RGB", (sum(tile.width + TILE_GAP for tile in tiles) - TILE_GAP, max(tile.height for tile in tiles)), "white"
    )
    for i, tile in enumerate(tiles):
        sheet.paste(tile, (sum(of.width + TILE_GAP for of in tiles[:i]), 0))
    return sheet


def write_figures(results: Mapping[str, Any], output: Path, folder: Path) -> dict[str, Any]:
    """
    Draw what the results have into `folder`.

    Args:
        output: the folder of the runs, for the images of the traces.

    Returns:
        Name -> file name within `folder` for each figure that there is; `traces` is a list, in the order of the
        results' traces, with None where an image is not there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn: dict[str, Any] = {}
    with matplotlib.rc_context(STYLE):
        figures = {
            "hacking": hacking_figure(results),
            "table": table_figure(results),
            "curves": curves_figure(results),
            "guidance": guidance_figure(results),
            "regularizer": regularizer_figure(results),
        }
        for name, figure in figures.items():
            if figure is not None:
                drawn[name] = f"{name}.svg"
                (folder / drawn[name]).write_text(svg(figure), encoding="utf-8")
    drawn["traces"] = []
    for number, trace in enumerate(results["traces"], 1):
        image = trace_image(output, trace, list(trace["samples"]))
        if image is not None:
            image.save(folder / f"trace-{number:02d}.png", optimize=True)
        drawn["traces"].append(f"trace-{number:02d}.png" if image is not None else None)
    return drawn
