"""Agreement of a reward with the rule, where it matters: among images of one prompt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..sampling import generate
from ..statistics import FloatArray, Interval, mean_interval
from .dataset import shapeworld_dataset
from .evaluate import MAX_COMPLETION_LENGTH, NUM_INFERENCE_STEPS
from .render import IMAGE_SIZE
from .verifier import shapeworld_reward


GROUP_SIZE = 16


def rank_agreement(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    reward: Callable[..., list[float | None]],
    num_prompts: int = 42,
    split: str = "test",
    seed: int = 7,
) -> Interval:
    """
    Correlate the ranks that a reward and the rule give to 16 images of each prompt: the mean over prompts whose images
    differ in both.
    """
    dataset = shapeworld_dataset(split, num_prompts, seed=seed)
    prompts = [prompt for prompt in dataset["prompt"] for _ in range(GROUP_SIZE)]
    samples = generate(
        model,
        prompts,
        tokenizer,
        max_completion_length=MAX_COMPLETION_LENGTH,
        num_inference_steps=NUM_INFERENCE_STEPS,
        image_size=IMAGE_SIZE,
        batch_size=210,
        seed=seed,
    )
    shown: dict[str, Any] = {
        "prompts": prompts,
        "completions": [sample.thinking for sample in samples],
        "images": [sample.image for sample in samples],
    }
    judged, ruled = (np.array(f(**shown), dtype=float).reshape(-1, GROUP_SIZE) for f in (reward, shapeworld_reward))
    found = [rank_correlation(*rows) for rows in zip(judged, ruled, strict=True) if all(row.std() > 0 for row in rows)]
    return mean_interval(found)


def rank_correlation(first: FloatArray, second: FloatArray) -> float:
    """Correlate the ranks of two rows (N,) of scores, equal ones sharing theirs (Spearman's)."""
    ranks = [(row[:, None] > row).sum(1) + (row[:, None] == row).sum(1) / 2 for row in (first, second)]
    return float(np.corrcoef(*ranks)[0, 1])
