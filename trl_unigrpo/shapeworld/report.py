"""The demo's report: one HTML file that shows the curves, the pictures before and after, and the settings."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from jinja2 import Environment, PackageLoader, select_autoescape
from matplotlib.figure import Figure
from PIL import Image


if TYPE_CHECKING:
    from trl_unigrpo.shapeworld.demo import DemoResult
    from trl_unigrpo.unigrpo_config import UniGRPOConfig

PICTURES_PER_CATEGORY = 2
SHOWN_SETTINGS = (
    "num_generations",
    "num_iterations",
    "generation_batch_size",
    "learning_rate",
    "image_learning_rate",
    "text_weight",
    "flow_weight",
    "flow_epsilon",
    "flow_regularizer",
    "flow_regularizer_weight",
    "num_inference_steps",
    "noise_level",
    "sde_type",
    "sde_window_range",
    "sde_window_size",
    "timestep_shift",
    "max_completion_length",
    "temperature",
)


def write_report(file: Path, result: DemoResult, args: UniGRPOConfig) -> None:
    """Write the report. It needs no other file and no network."""
    from trl_unigrpo.shapeworld.demo import category_rows

    environment = Environment(
        loader=PackageLoader("trl_unigrpo.shapeworld"), autoescape=select_autoescape(default=True)
    )
    html = environment.get_template("report.html.jinja").render(
        summary=result.summary,
        categories=category_rows(result.before, result.after),
        curves=curves(result.history),
        examples=examples(result),
        settings={name: getattr(args, name) for name in SHOWN_SETTINGS},
    )
    file.write_text(html, encoding="utf-8")


def curves(history: Sequence[dict[str, float]]) -> str:
    """The training curves as an SVG element: reward, length of the thinking and ties to the reference, per rollout."""
    panels = {
        "reward": "reward of the rollouts",
        "flow/velocity_mse": "velocity MSE to the reference",
        "completions/mean_length": "thinking, tokens",
    }
    with matplotlib.rc_context({"svg.hashsalt": "trl-unigrpo", "font.size": 8}):
        figure = Figure(figsize=(10, 2.6), layout="constrained")
        for axes, (key, title) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
            values = np.array([row[key] for row in history if key in row])
            axes.plot(np.arange(1, len(values) + 1), values, color="#b9c4d6", linewidth=1)
            width = min(10, len(values))
            if width:
                smooth = np.convolve(values, np.ones(width) / width, mode="valid")
                axes.plot(np.arange(width, len(values) + 1), smooth, color="#1d4ed8", linewidth=1.8)
            axes.set_title(title)
            axes.set_xlabel("rollout")
            axes.grid(alpha=0.25)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()[out.getvalue().index("<svg") :]


def examples(result: DemoResult) -> list[dict[str, Any]]:
    """The first prompts of each category, with what the model thought and painted before and after."""
    shown: dict[str, int] = {}
    rows = []
    for i, category in enumerate(result.before.categories):
        if shown.setdefault(category, 0) < PICTURES_PER_CATEGORY:
            shown[category] += 1
            sides = [
                {"thinking": e.thinking[i], "image": data_uri(e.images[i]), "reward": float(e.reward[i])}
                for e in (result.before, result.after)
            ]
            rows.append(
                {"prompt": result.before.prompts[i], "category": category, "before": sides[0], "after": sides[1]}
            )
    return sorted(rows, key=lambda row: list(shown).index(row["category"]))


def data_uri(image: Image.Image) -> str:
    """The image as a PNG inside of a URL."""
    out = io.BytesIO()
    image.save(out, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()
