"""The demo's measurements before and after training, and the numbers that come of them."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ...shapeworld.diversity import Diversity
from ...shapeworld.evaluate import Evaluation
from ...shapeworld.grammar import CATEGORIES
from ...statistics import Interval, mean_interval


@dataclass(frozen=True)
class Measured:
    """One model: its samples on the held-out prompts, and how much those of one prompt differ."""

    sampled: Evaluation
    greedy: Evaluation
    diversity: Diversity


@dataclass
class DemoResult:
    """All that the demo measured; `before` and `after` are paired, prompt by prompt and noise by noise."""

    before: Evaluation
    after: Evaluation
    greedy_before: Evaluation
    greedy_after: Evaluation
    history: list[dict[str, float]]
    summary: dict[str, Any]


def summary_of(before: Measured, after: Measured) -> dict[str, Any]:
    """Compute the numbers of `summary.json` that follow from the measurements alone."""
    old, new, prompts = before.sampled, after.sampled, before.sampled.prompts
    rewards = mean_interval(old.reward, prompts), mean_interval(new.reward, prompts)
    gain = mean_interval(new.reward - old.reward, prompts)
    greedy_gain = mean_interval(after.greedy.reward - before.greedy.reward, prompts)
    return {
        "reward_before": rewards[0].mean,
        "reward_after": rewards[1].mean,
        "ci95_before": [rewards[0].low, rewards[0].high],
        "ci95_after": [rewards[1].low, rewards[1].high],
        "gain": gain.mean,
        "ci95_gain": [gain.low, gain.high],
        "greedy_before": float(before.greedy.reward.mean()),
        "greedy_after": float(after.greedy.reward.mean()),
        "greedy_gain": greedy_gain.mean,
        "ci95_greedy_gain": [greedy_gain.low, greedy_gain.high],
        "strict_before": float(old.strict.mean()),
        "strict_after": float(new.strict.mean()),
        "n_eval": len(prompts),
        "picture_error_before": float(old.error.mean()),
        "picture_error_after": float(new.error.mean()),
        "latent_drift": latent_drift(old, new),
        "diversity_before": vars(before.diversity),
        "diversity_after": vars(after.diversity),
    }


def latent_drift(before: Evaluation, after: Evaluation) -> float:
    """Say how far the spread of the latents moved: |std after / std before - 1|."""
    return abs(float(after.latents.std() / before.latents.std()) - 1)


def category_rows(before: Evaluation, after: Evaluation) -> list[tuple[str, Interval, Interval, Interval]]:
    """List category, reward before, after, and the paired gain; the last row is all of them."""
    categories, prompts = np.array(before.categories), np.array(before.prompts)
    rows = []
    for name in (*CATEGORIES, "all"):
        chosen = np.ones(len(categories), dtype=bool) if name == "all" else categories == name
        if chosen.any():
            old, new, of = before.reward[chosen], after.reward[chosen], prompts[chosen]
            rows.append((name, mean_interval(old, of), mean_interval(new, of), mean_interval(new - old, of)))
    return rows
