"""Prompts, edits and stories of ShapeWorld as a `datasets.Dataset`."""

from __future__ import annotations

import numpy as np
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from datasets import List as ListFeature

from .edits import apply_changes, changes_of, draw_edit, draw_scene
from .grammar import (
    CATEGORIES,
    SPLITS,
    prompts_by_split,
    sampling_weights,
)
from .render import render_images
from .world import IntArray, PromptSpec


TURNS = 3
"""Instructions in a story."""


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


def shapeworld_edit_dataset(split: str = "train", num_rows: int = 2000, seed: int = 0) -> Dataset:
    """
    Draw images and instructions to edit them.

    Args:
        split: of the instructions, `"train"`, `"validation"` or `"test"`. None is in two of them.
        num_rows: how many; every verb comes about as often.
        seed: of images and instructions.

    Returns:
        A dataset with the columns `prompt` (the instruction), `source_image` (PIL) and `category` (the verb).
    """
    scenes, stories = _stories(split, num_rows, seed, 1)
    prompts = [story[0] for story in stories]
    columns = {"prompt": prompts, "source_image": render_images(scenes), "category": [p.split()[0] for p in prompts]}
    text = Value("string")
    return Dataset.from_dict(
        columns, features=Features({"prompt": text, "source_image": ImageFeature(), "category": text})
    )


def shapeworld_story_dataset(split: str = "train", num_rows: int = 1000, seed: int = 0) -> Dataset:
    """
    Draw images and stories of three instructions, each of which can be followed in what those before it leave.

    Args:
        split: of the instructions, as in [`shapeworld_edit_dataset`].
        num_rows: how many.
        seed: of images and instructions.

    Returns:
        A dataset with the columns `prompt` (the first instruction), `turns` (all three, in order) and `source_image`
        (PIL).
    """
    scenes, stories = _stories(split, num_rows, seed, TURNS)
    text = Value("string")
    return Dataset.from_dict(
        {"prompt": [story[0] for story in stories], "turns": stories, "source_image": render_images(scenes)},
        features=Features({"prompt": text, "turns": ListFeature(text), "source_image": ImageFeature()}),
    )


def _stories(split: str, number: int, seed: int, turns: int) -> tuple[IntArray, list[list[str]]]:
    """Draw scenes (N, 9), and as many instructions in a row for each."""
    check_split(split)
    if number < 1:
        raise ValueError(f"num_rows={number}, expected a positive number")
    rng = np.random.default_rng([seed, SPLITS.index(split), turns])
    scenes: list[IntArray] = []
    stories: list[list[str]] = []
    while len(stories) < number:
        first = scene = draw_scene(rng)
        story: list[str] = []
        while len(story) < turns and (edit := draw_edit(scene, split, rng)) is not None:
            changes = changes_of(edit, scene)
            assert changes is not None
            scene = apply_changes(scene, changes)
            story.append(edit.text)
        if len(story) == turns:
            scenes.append(first)
            stories.append(story)
    return np.stack(scenes), stories


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
