"""The demo's report: one HTML page with what changed, the images before and after, the curves, and the settings."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup
from PIL import Image

from ...reporting.description import SETTINGS
from ...reporting.pages import (
    Curve,
    Panel,
    data_uri,
    render_page,
    write_page,
)
from ...reporting.run_files import NoRunError, read_run
from ...reporting.run_page import trust
from .result import DemoResult, category_rows


if TYPE_CHECKING:
    from ...trainers.unigrpo_config import UniGRPOConfig

IMAGES_PER_CATEGORY = 2
SMOOTH = 10  # rollouts in the moving mean of the curves


def write_demo_report(file: Path, result: DemoResult, args: UniGRPOConfig) -> None:
    """Write the report. It needs no other file and no network; beside the run's gallery, it names its alarms."""
    try:
        run = read_run(file.parent)
    except NoRunError:
        run = None
    html = render_page(
        "report.html.jinja",
        summary=result.summary,
        categories=category_rows(result.before, result.after),
        panels=curves(result.history),
        examples=examples(result),
        settings={name: getattr(args, name) for name in SETTINGS},
        trust=trust(run) if run is not None else None,
        gallery="gallery.html" if (file.parent / "gallery.html").is_file() else None,
    )
    write_page(file, html)


def curves(history: Sequence[dict[str, float]]) -> list[Panel]:
    """Draw the training curves: reward, length of the thinking and ties to the reference, per rollout."""
    panels = {
        "reward": "Reward of the rollouts",
        "flow/velocity_mse": "Velocity MSE to the reference",
        "completions/mean_length": "Thinking, tokens",
    }
    found = []
    for key, title in panels.items():
        values = [row[key] for row in history if key in row]
        found.append(Panel(title, [Curve("", range(1, len(values) + 1), values, SMOOTH)], "Over rollouts."))
    return found


def examples(result: DemoResult) -> list[dict[str, Any]]:
    """Take the first prompts of each category, with the thinkings and images of before and after."""
    shown: dict[str, int] = {}
    rows = []
    for i, category in enumerate(result.before.categories):
        if shown.setdefault(category, 0) < IMAGES_PER_CATEGORY:
            shown[category] += 1
            sides = [
                {"thinking": e.thinking[i], "image": png_uri(e.images[i]), "reward": float(e.reward[i])}
                for e in (result.before, result.after)
            ]
            rows.append(
                {"prompt": result.before.prompts[i], "category": category, "before": sides[0], "after": sides[1]}
            )
    return sorted(rows, key=lambda row: list(shown).index(row["category"]))


def png_uri(image: Image.Image) -> Markup:
    """Put the image, exact, inside of a URL."""
    out = io.BytesIO()
    image.save(out, format="PNG", optimize=True)
    return Markup(data_uri(out.getvalue(), "png"))
