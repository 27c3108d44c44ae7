"""Scores of a model that looks again at its images, or edits images, on prompts and instructions new to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from transformers import PreTrainedTokenizerBase

from ..sampling import Sample, generate
from ..statistics import FloatArray
from .dataset import shapeworld_edit_dataset, shapeworld_story_dataset
from .edits import EditScores, draw_scene, parse_edit, score_edits, score_stories, untouched_cells
from .evaluate import EVALUATION_SEED, NUM_INFERENCE_STEPS, Evaluation
from .grammar import parse_prompt
from .plan import parse_plan, plan_cells
from .reflection import MAX_REFLECTION_LENGTH, REFLECTION_TEMPLATE, diagnosis_f1, parse_reflection
from .render import IMAGE_SIZE, render_images
from .second_corpus import DESCRIBE
from .verifier import image_error, images_to_array, read_cells, score
from .world import EMPTY, MAX_OBJECTS


_AT_ONCE = 210


def look_and_paint(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    instructions: Sequence[str],
    images: Sequence[Image.Image],
    seed: int = EVALUATION_SEED,
    do_sample: bool = True,
) -> list[Sample]:
    """Show a model images, each before its instruction; sample what it says, and the image that it paints then."""
    return generate(
        model,
        instructions,
        tokenizer,
        do_sample=do_sample,
        max_completion_length=MAX_REFLECTION_LENGTH,
        num_inference_steps=NUM_INFERENCE_STEPS,
        image_size=IMAGE_SIZE,
        system_prompt="",
        batch_size=_AT_ONCE,
        seed=seed + 1,  # other noise than the first look's
        source_images=images,
    )


@dataclass
class SecondLook:
    """
    N images of a model, and what it made of them when it looked again.

    Attributes:
        said: what it said about its images.
        images: those that it has now; kept ones are as they were.
        first, reward: (N,) shares of the prompt's checks that hold before and after.
        first_strict, strict: (N,) 1 where all do.
        diagnosis: (N,) F1 of what it found.
        kept: (N,) 1 where it kept its image.
        harmed: (N,) share of the objects that it did not mean to change that changed; NaN where it kept the image.
    """

    said: list[str]
    images: list[Image.Image]
    first: FloatArray
    reward: FloatArray
    first_strict: FloatArray
    strict: FloatArray
    diagnosis: FloatArray
    kept: FloatArray
    harmed: FloatArray


def evaluate_second_look(
    model: Any, tokenizer: PreTrainedTokenizerBase, first: Evaluation, seed: int = EVALUATION_SEED
) -> SecondLook:
    """Have a model look again at the images that it painted, and repair or keep them."""
    asked = [REFLECTION_TEMPLATE.format(prompt=prompt) for prompt in first.prompts]
    samples = look_and_paint(model, tokenizer, asked, first.images, seed)
    looks = [parse_reflection(sample.thinking) for sample in samples]
    kept = np.array([look is not None and not look.fixes for look in looks])
    images = [old if keep else new.image for old, new, keep in zip(first.images, samples, kept, strict=True)]
    specs = [parse_prompt(prompt) for prompt in first.prompts]
    before, after = (read_cells(images_to_array(some))[0] for some in (first.images, images))
    old, new = score(specs, before), score(specs, after)
    harmed = np.full(len(specs), np.nan)
    for row, look in enumerate(looks):
        stays = before[row] > EMPTY
        if look is not None and look.fixes:
            stays[list(look.fixes)] = False
            harmed[row] = (before[row] != after[row])[stays].mean() if stays.any() else np.nan
    return SecondLook(
        said=[sample.thinking for sample in samples],
        images=images,
        first=old.score,
        reward=new.score,
        first_strict=old.strict,
        strict=new.strict,
        diagnosis=np.array(
            [diagnosis_f1(*row) for row in zip(specs, before, [s.thinking for s in samples], strict=True)]
        ),
        kept=kept.astype(float),
        harmed=harmed,
    )


@dataclass
class Edited:
    """
    N drawings that a model edited.

    Attributes:
        instructions, categories: what it was told, and the verb of that.
        sources, images: what it was shown, and what it made of it.
        said: its thinkings.
        scores: how well it did.
        error: (N,) image errors.
    """

    instructions: list[str]
    categories: list[str]
    sources: list[Image.Image]
    images: list[Image.Image]
    said: list[str]
    scores: EditScores
    error: FloatArray


def evaluate_edits(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    num_rows: int = 630,
    split: str = "test",
    seed: int = EVALUATION_SEED,
) -> Edited:
    """Have a model edit drawings as instructions of a split say, and score the images."""
    dataset = shapeworld_edit_dataset(split, num_rows, seed)
    texts, sources = list(dataset["prompt"]), list(dataset["source_image"])
    samples = look_and_paint(model, tokenizer, texts, sources, seed)
    images = [sample.image for sample in samples]
    before, after = (read_cells(images_to_array(some))[0] for some in (sources, images))
    return Edited(
        instructions=texts,
        categories=list(dataset["category"]),
        sources=sources,
        images=images,
        said=[sample.thinking for sample in samples],
        scores=score_edits([parse_edit(text) for text in texts], before, after),
        error=image_error(images),
    )


@dataclass
class StoryScores:
    """
    N stories of three edits, which a model made one after the other, each of its own image before.

    Attributes:
        turns: the instructions of each.
        scores: of the last images: done as the last turn says, all else as the turns before should have left it.
        untouched: (N,) share of the cells that no turn was to change that are as in the first image.
    """

    turns: list[list[str]]
    scores: EditScores
    untouched: FloatArray


def evaluate_stories(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    num_rows: int = 210,
    split: str = "test",
    seed: int = EVALUATION_SEED,
) -> StoryScores:
    """Have a model follow stories of a split, turn by turn."""
    dataset = shapeworld_story_dataset(split, num_rows, seed)
    turns, sources = [list(story) for story in dataset["turns"]], list(dataset["source_image"])
    images = sources
    for number, texts in enumerate(zip(*turns, strict=True)):
        images = [sample.image for sample in look_and_paint(model, tokenizer, texts, images, seed + number)]
    before, after = (read_cells(images_to_array(some))[0] for some in (sources, images))
    stories = [[parse_edit(text) for text in story] for story in turns]
    return StoryScores(turns, score_stories(stories, before, after), untouched_cells(stories, before, after))


def reading_accuracy(
    model: Any, tokenizer: PreTrainedTokenizerBase, num_images: int = 630, seed: int = EVALUATION_SEED
) -> float:
    """Tell how well a model reads: the share of the objects of random drawings that it names, in their places."""
    rng = np.random.default_rng(seed)
    cells = np.stack([draw_scene(rng, 1, MAX_OBJECTS) for _ in range(num_images)])
    samples = look_and_paint(model, tokenizer, [DESCRIBE] * num_images, render_images(cells), seed, do_sample=False)
    said = np.stack([plan_cells(parse_plan(sample.thinking) or []) for sample in samples])
    return float((said == cells)[cells > EMPTY].mean())
