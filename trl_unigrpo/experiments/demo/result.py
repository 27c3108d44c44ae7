"""What the demo measured, before and after."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ...shapeworld.evaluate import Evaluation
from ...shapeworld.grammar import CATEGORIES
from ...statistics import Interval, mean_interval


@dataclass
class DemoResult:
    """What the demo measured; `before` and `after` are paired, prompt by prompt and noise by noise."""

    before: Evaluation
    after: Evaluation
    greedy_before: Evaluation
    greedy_after: Evaluation
    history: list[dict[str, float]]
    summary: dict[str, Any]


def latent_drift(before: Evaluation, after: Evaluation) -> float:
    """How far the spread of the latents moved: |std after / std before - 1|."""
    return abs(float(after.latents.std() / before.latents.std()) - 1)


def category_rows(before: Evaluation, after: Evaluation) -> list[tuple[str, Interval, Interval, Interval]]:
    """Category, reward before, after, and the paired gain; the last row is all of them."""
    categories, prompts = np.array(before.categories), np.array(before.prompts)
    rows = []
    for name in (*CATEGORIES, "all"):
        chosen = np.ones(len(categories), dtype=bool) if name == "all" else categories == name
        if chosen.any():
            old, new, of = before.reward[chosen], after.reward[chosen], prompts[chosen]
            rows.append((name, mean_interval(old, of), mean_interval(new, of), mean_interval(new - old, of)))
    return rows
