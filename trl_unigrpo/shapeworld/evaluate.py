"""Scores of a model on prompts of ShapeWorld that it has never seen."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase

from ..flow.guidance import Guidance
from ..sampling import generate
from ..statistics import FloatArray
from .dataset import shapeworld_dataset
from .diversity import Diversity, cell_diversity
from .grammar import parse_prompt
from .plan import score_plans
from .render import IMAGE_SIZE
from .verifier import (
    image_error,
    images_to_array,
    read_cells,
    score,
)
from .world import NUM_CELLS


NUM_INFERENCE_STEPS = 10
MAX_COMPLETION_LENGTH = 24
EVALUATION_SEED = 1234


@dataclass
class Evaluation:
    """
    One sample for each of N prompts, and what it scored.

    Attributes:
        reward, strict: (N,) share of the prompt's checks that hold, and 1 where all do.
        plan: (N,) the score of a perfect drawing of the thinking.
        error: (N,) image errors.
        latents: (N, tokens, channels) of the images.
    """

    prompts: list[str]
    categories: list[str]
    thinking: list[str]
    images: list[Image.Image]
    reward: FloatArray
    strict: FloatArray
    plan: FloatArray
    error: FloatArray
    latents: torch.Tensor

    def save(self, file: Path) -> None:
        """Write one line of JSON per prompt."""
        with file.open("w", encoding="utf-8") as out:
            for row in zip(self.prompts, self.categories, self.thinking, self.reward, self.error, strict=True):
                names = ("prompt", "category", "thinking", "reward", "image_error")
                out.write(json.dumps(dict(zip(names, row, strict=True))) + "\n")


def evaluate_model(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    num_prompts: int | None = 1050,
    split: str = "test",
    seed: int = EVALUATION_SEED,
    thinking: bool = True,
    do_sample: bool = True,
    batch_size: int = 210,
    guidance: Guidance | None = None,
    noise_seed: int | None = None,
) -> Evaluation:
    """
    Paint `num_prompts` prompts of a split, balanced over categories, and score the images.

    The same arguments give the same prompts, the same random numbers and so a paired comparison of two models.

    Args:
        seed: of the choice of prompts, the thinkings and each image's noise.
        thinking: False paints from the prompt alone.
        do_sample: False for a greedy thinking.
        guidance: classifier-free guidance of the images; None for none.
        noise_seed: of the thinkings and images, for other samples of the same prompts; by default `seed`.
    """
    dataset = shapeworld_dataset(split, num_prompts, seed=seed)
    prompts = list(dataset["prompt"])
    samples = generate(
        model,
        prompts,
        tokenizer,
        thinking=thinking,
        do_sample=do_sample,
        max_completion_length=MAX_COMPLETION_LENGTH,
        num_inference_steps=NUM_INFERENCE_STEPS,
        image_size=IMAGE_SIZE,
        guidance=guidance,
        batch_size=batch_size,
        seed=seed if noise_seed is None else noise_seed,
    )
    images, texts = [sample.image for sample in samples], [sample.thinking for sample in samples]
    specs = [parse_prompt(prompt) for prompt in prompts]
    scores = score(specs, read_cells(images_to_array(images))[0])
    return Evaluation(
        prompts=prompts,
        categories=list(dataset["category"]),
        thinking=texts,
        images=images,
        reward=scores.score,
        strict=scores.strict,
        plan=score_plans(specs, texts),
        error=image_error(images),
        latents=torch.stack([sample.latents for sample in samples]),
    )


def group_diversity(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    categories: tuple[str, ...] = ("two_object", "color_attr"),
    seed: int = 5,
    thinking: bool = True,
    split: str = "test",
    per_category: int = 10,
) -> Diversity:
    """Measure how much 16 samples of one prompt differ: the mean over the first prompts of each category."""
    dataset = shapeworld_dataset(split, seed=seed)
    prompts = [
        prompt
        for category in categories
        for prompt in [row["prompt"] for row in dataset if row["category"] == category][:per_category]
        for _ in range(16)
    ]
    samples = generate(
        model,
        prompts,
        tokenizer,
        thinking=thinking,
        max_completion_length=MAX_COMPLETION_LENGTH,
        num_inference_steps=NUM_INFERENCE_STEPS,
        image_size=IMAGE_SIZE,
        batch_size=160,
        seed=seed,
    )
    cells = read_cells(images_to_array([sample.image for sample in samples]))[0]
    return cell_diversity(cells.reshape(-1, 16, NUM_CELLS))
