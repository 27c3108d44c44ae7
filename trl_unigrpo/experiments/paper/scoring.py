"""Measures of a model: rule, learned reward, questions, image quality, and what it thinks and paints for a dozen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image
from transformers import PreTrainedTokenizerBase

from ...evaluation import Guidance
from ...shapeworld import evaluate_model, image_error, preference_reward
from ...shapeworld.evaluate import Evaluation
from ...shapeworld.grammar import CATEGORIES
from ...shapeworld.quality import latent_distance
from ...shapeworld.question_points import question_points
from ...shapeworld.second_look import evaluate_second_look
from ...statistics import mean_interval
from .numbers import digits
from .systems import Scale


TRACES = 12


def evaluate_in_mode(
    model: Any, tokenizer: PreTrainedTokenizerBase, mode: str, scale: Scale, guidance_scale: float | None = None
) -> Evaluation:
    """Score a model in one of `System.modes`; "guided" needs the scale."""
    if mode == "guided" and guidance_scale is None:
        raise ValueError("The mode 'guided' needs the scale of the guidance: set eval_guidance_scale.")
    found = evaluate_model(
        model,
        tokenizer,
        scale.num_prompts,
        scale.split,
        thinking=mode != "direct",
        do_sample=mode != "greedy",
        guidance=Guidance(guidance_scale) if mode == "guided" and guidance_scale else None,
    )
    return second_images(model, tokenizer, found) if mode == "rounds" else found


def second_images(model: Any, tokenizer: PreTrainedTokenizerBase, first: Evaluation) -> Evaluation:
    """Have a model look at its images and paint them again or keep them; score what it then has."""
    look = evaluate_second_look(model, tokenizer, first)
    return replace(
        first,
        thinking=[f"{thinking} {said}" for thinking, said in zip(first.thinking, look.said, strict=True)],
        images=look.images,
        reward=look.reward,
        strict=look.strict,
        error=image_error(look.images),
    )


def learned_rewards(evaluation: Evaluation) -> list[float]:
    """Score the images by the reward that is trained on."""
    return preference_reward(evaluation.prompts, [""] * len(evaluation.prompts), images=evaluation.images)


def validation_scores(evaluation: Evaluation) -> dict[str, float]:
    """Average what a point of `validation.jsonl` has."""
    means = {"learned": np.array(learned_rewards(evaluation)), "rule": evaluation.reward}
    means["image_error"] = evaluation.error
    return {name: float(values.mean()) for name, values in means.items()}


def summary(model: Any, evaluation: Evaluation, thinking: bool) -> dict[str, Any]:
    """Collect the numbers of an evaluation; `plan` is None without thinking."""
    error = mean_interval(evaluation.error, evaluation.prompts)
    return {
        "rule": [round(value, 3) for value in evaluation.reward.tolist()],
        "learned": [round(value, 3) for value in learned_rewards(evaluation)],
        "questions": digits(float(question_points(evaluation.prompts, evaluation.images).mean())),
        "strict": digits(float(evaluation.strict.mean())),
        "plan": digits(float(evaluation.plan.mean())) if thinking else None,
        "image_error": digits(error.mean),
        "image_error_interval": [digits(error.low), digits(error.high)],
        "latent_distance": digits(latent_distance(model, evaluation.images, evaluation.prompts)),
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
    learned = learned_rewards(evaluation)
    return [
        {
            "prompt": evaluation.prompts[row],
            "category": evaluation.categories[row],
            "thinking": evaluation.thinking[row],
            "rule": digits(float(evaluation.reward[row])),
            "learned": digits(learned[row]),
            "image_error": digits(float(evaluation.error[row])),
        }
        for row in trace_rows(evaluation.categories)
    ]


def strip(evaluation: Evaluation) -> Image.Image:
    """Put the images of the dozen side by side, in one row."""
    images = [np.asarray(evaluation.images[row].convert("RGB")) for row in trace_rows(evaluation.categories)]
    return Image.fromarray(np.concatenate(images, axis=1))
