"""Measures of a model: rewards, image quality, and what it thinks and paints for a dozen prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image
from transformers import PreTrainedTokenizerBase

from ...evaluation import Guidance
from ...shapeworld import evaluate_model
from ...shapeworld.evaluate import Evaluation
from ...shapeworld.grammar import CATEGORIES
from ...shapeworld.quality import latent_distance
from ...statistics import mean_interval
from .systems import Scale
from .training import digits


TRACES = 12


def evaluate_in_mode(
    model: Any, tokenizer: PreTrainedTokenizerBase, mode: str, scale: Scale, guidance_scale: float | None = None
) -> Evaluation:
    """Score a model in one of `System.modes`; "guided" needs the scale."""
    if mode == "guided" and guidance_scale is None:
        raise ValueError("The mode 'guided' needs the scale of the guidance: set eval_guidance_scale.")
    return evaluate_model(
        model,
        tokenizer,
        scale.num_prompts,
        scale.split,
        thinking=mode != "direct",
        do_sample=mode != "greedy",
        guidance=Guidance(guidance_scale) if mode == "guided" and guidance_scale else None,
    )


def summary(model: Any, evaluation: Evaluation, thinking: bool) -> dict[str, Any]:
    """Collect the numbers of an evaluation; `plan` is None without thinking."""
    categories = np.array(evaluation.categories)
    error = mean_interval(evaluation.error, evaluation.prompts)
    return {
        "reward": [round(value, 4) for value in evaluation.reward.tolist()],
        "strict": digits(float(evaluation.strict.mean())),
        "plan": digits(float(evaluation.plan.mean())) if thinking else None,
        "picture_error": digits(error.mean),
        "picture_error_interval": [digits(error.low), digits(error.high)],
        "latent_distance": digits(latent_distance(model, evaluation.images, evaluation.prompts)),
        "categories": {
            name: digits(float(evaluation.reward[categories == name].mean()))
            for name in CATEGORIES
            if (categories == name).any()
        },
    }


def trace_rows(categories: Sequence[str], number: int = TRACES) -> list[int]:
    """Choose rows of the first prompts of each category, one of each before a second one, ordered by category."""
    seen: Mapping[str, list[int]] = {name: [] for name in CATEGORIES}
    for row, category in enumerate(categories):
        seen[category].append(row)
    places = sorted((place, order) for order, name in enumerate(CATEGORIES) for place in range(len(seen[name])))
    chosen = sorted((order, place) for place, order in places[:number])
    return [seen[CATEGORIES[order]][place] for order, place in chosen]


def sample_traces(evaluation: Evaluation) -> list[dict[str, Any]]:
    """List prompt, thinking and scores of the dozen."""
    return [
        {
            "prompt": evaluation.prompts[row],
            "category": evaluation.categories[row],
            "thinking": evaluation.thinking[row],
            "reward": digits(float(evaluation.reward[row])),
            "picture_error": digits(float(evaluation.error[row])),
        }
        for row in trace_rows(evaluation.categories)
    ]


def strip(evaluation: Evaluation) -> Image.Image:
    """Put the images of the dozen side by side, in one row."""
    images = [np.asarray(evaluation.images[row].convert("RGB")) for row in trace_rows(evaluation.categories)]
    return Image.fromarray(np.concatenate(images, axis=1))
