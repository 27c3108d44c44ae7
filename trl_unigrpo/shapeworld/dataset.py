"""Prompts of ShapeWorld as a `datasets.Dataset`."""

from __future__ import annotations

import numpy as np
from datasets import Dataset

from .grammar import (
    CATEGORIES,
    SPLITS,
    prompts_by_split,
    sampling_weights,
)
from .world import PromptSpec


def check_split(split: str) -> dict[str, PromptSpec]:
    """Look up the prompts of a split; a ValueError for a split that does not exist."""
    if split not in SPLITS:
        raise ValueError(f"split={split!r} does not exist, expected one of {', '.join(SPLITS)}")
    return prompts_by_split()[split]


def shapeworld_dataset(split: str = "train", num_prompts: int | None = None, seed: int = 0) -> Dataset:
    """Draw prompts of one split, in random order.

    Args:
        split: `"train"`, `"validation"` or `"test"`. No meaning of a prompt is in two of them.
        num_prompts: how many. Every category gets the same number (the first ones one more where it doesn't divide),
            its families by their shares; no prompt comes twice as long as its category has others. `None`: every
            prompt of the split once, categories as large as they are.
        seed: of the choice and of the order.

    Returns:
        A dataset with the columns `prompt` (str) and `category` (str).
    """
    specs = check_split(split)
    rng = np.random.default_rng([seed, SPLITS.index(split)])
    texts = np.array(list(specs))
    if num_prompts is None:
        chosen = rng.permutation(len(texts))
    else:
        if num_prompts < 1:
            raise ValueError(f"num_prompts={num_prompts}, expected a positive number, or None for the whole split")
        chosen = rng.permutation(_balanced(list(specs.values()), num_prompts, rng))
    categories = [spec.category for spec in specs.values()]
    return Dataset.from_dict({"prompt": texts[chosen].tolist(), "category": [categories[i] for i in chosen]})


def _balanced(specs: list[PromptSpec], number: int, rng: np.random.Generator) -> np.ndarray:
    """Choose indices of `number` prompts, balanced over the categories."""
    category = np.array([CATEGORIES.index(spec.category) for spec in specs])
    # The largest of log(weight) + Gumbel noise are a weighted draw without replacement.
    keys = np.log(sampling_weights(specs)) + rng.gumbel(size=len(specs))
    chosen = []
    for index in range(len(CATEGORIES)):
        rows = np.flatnonzero(category == index)
        ranked = rows[np.argsort(-keys[rows])]
        chosen.append(np.resize(ranked, number // len(CATEGORIES) + (index < number % len(CATEGORIES))))
    return np.concatenate(chosen)
