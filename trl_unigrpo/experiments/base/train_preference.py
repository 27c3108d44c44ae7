"""The making of ShapeWorld's learned reward: the base's own images, an annotator who errs, a model of the annotator.

Shapes: N prompts, K images of each, M = K (K - 1) / 2 pairs of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_model
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, set_seed

from ...sampling import generate
from ...shapeworld import load_base, shapeworld_dataset
from ...shapeworld.evaluate import MAX_COMPLETION_LENGTH, NUM_INFERENCE_STEPS
from ...shapeworld.grammar import parse_prompt
from ...shapeworld.preference import PreferenceModel, word_ids
from ...shapeworld.render import IMAGE_SIZE
from ...shapeworld.verifier import images_to_array, read_cells, score
from ...shapeworld.world import IntArray
from ...statistics import FloatArray


IMAGES_PER_PROMPT = 8
ATTENTION = {"present": 1.0, "count": 0.5, "total": 0.5, "place": 0.25, "relation": 0.25}
"""Weights with which the annotator looks at the verifier's checks: shapes and colours first, positions last."""
MISTAKES = 0.1
"""The share of pairs in which the annotator names the wrong image."""


@dataclass(frozen=True)
class PaintedGroups:
    """
    Images of the base model, K of each of N prompts, and how the rule checks them.

    Attributes:
        words: (N, 12) ids of words.
        pixels: (N, K, 3, 48, 48) bytes.
        score: (N, K), the rule's.
        checks: name -> (N, K), the share of this kind of check that holds, NaN where the prompt has none.
    """

    words: Tensor
    pixels: Tensor
    score: FloatArray
    checks: Mapping[str, FloatArray]


def paint_groups(
    model: object, tokenizer: PreTrainedTokenizerBase, num_prompts: int, split: str, seed: int
) -> PaintedGroups:
    """Have a base model think and paint `IMAGES_PER_PROMPT` times for each prompt."""
    prompts = list(shapeworld_dataset(split, num_prompts, seed=seed)["prompt"])
    repeated = [prompt for prompt in prompts for _ in range(IMAGES_PER_PROMPT)]
    samples = generate(
        model,
        repeated,
        tokenizer,
        max_completion_length=MAX_COMPLETION_LENGTH,
        num_inference_steps=NUM_INFERENCE_STEPS,
        image_size=IMAGE_SIZE,
        batch_size=480,
        seed=seed,
    )
    images = [sample.image for sample in samples]
    found = score([parse_prompt(prompt) for prompt in repeated], read_cells(images_to_array(images))[0])
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)
    groups = (num_prompts, IMAGES_PER_PROMPT)
    return PaintedGroups(
        words=word_ids(prompts),
        pixels=pixels.unflatten(0, groups),
        score=found.score.reshape(groups),
        checks={name: values.reshape(groups) for name, values in found.checks.items()},
    )


def opinion(checks: Mapping[str, FloatArray]) -> FloatArray:
    """
    Average the checks as the annotator looks at them, weighted by `ATTENTION`.

    Args:
        checks: name -> array of any one shape, NaN where a prompt has no such check.
    """
    attention = np.array([ATTENTION[name] for name in checks])
    values = np.stack(list(checks.values()), -1)
    return (np.nan_to_num(values) @ attention) / (~np.isnan(values) @ attention)


def pair_indices(number: int = IMAGES_PER_PROMPT) -> tuple[IntArray, IntArray]:
    """Name the first and the second image of each pair of a group: two arrays (M,)."""
    first, second = np.array(list(itertools.combinations(range(number), 2))).T
    return first, second


def annotate(checks: Mapping[str, FloatArray], seed: int) -> tuple[Tensor, Tensor]:
    """
    Ask the annotator which image of each pair is better.

    Returns:
        `first_wins` (N, M), a share `MISTAKES` of them wrong, and `told` (N, M): where the annotator sees no
        difference, nothing is said.
    """
    worth = opinion(checks)
    first, second = pair_indices(worth.shape[1])
    gap = worth[:, first] - worth[:, second]
    wrong = np.random.default_rng(seed).random(gap.shape) < MISTAKES
    return torch.from_numpy((gap > 0) ^ wrong), torch.from_numpy(np.abs(gap) > 1e-9)


def train_preference(
    groups: PaintedGroups,
    steps: int = 3000,
    prompts_per_step: int = 32,
    learning_rate: float = 2e-3,
    seed: int = 0,
    show_progress: bool = True,
) -> PreferenceModel:
    """
    Train on the annotator's answers: the cross-entropy of Bradley and Terry's model over all pairs of a prompt.

    Args:
        groups: the images.
        steps: optimizer steps; the learning rate rises over a tenth of them, and falls along a cosine.
        prompts_per_step: prompts, each with all of its images.
        learning_rate: of AdamW, at its highest.
        seed: of the weights, the annotator's mistakes and the order.

    Returns:
        The model in evaluation mode; its answers to `groups` have mean 0.
    """
    first_wins, told = annotate(groups.checks, seed)
    first, second = pair_indices(groups.pixels.shape[1])
    set_seed(seed)
    model = PreferenceModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    for _ in tqdm(range(steps), "training the reward", disable=not show_progress):
        rows = torch.randint(len(groups.words), (prompts_per_step,))
        answers = judge(model, groups, rows)
        margins = answers[:, first] - answers[:, second]
        said = told[rows]
        loss = F.binary_cross_entropy_with_logits(margins[said], first_wins[rows][said].float())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()
    model.center.fill_(judge_all(model, groups).mean())
    return model


def judge(model: PreferenceModel, groups: PaintedGroups, rows: Tensor) -> Tensor:
    """Give the model's answers (R, K) to the images of R prompts."""
    pixels = groups.pixels[rows]
    words = groups.words[rows].repeat_interleave(pixels.shape[1], 0)
    return model(words, pixels.flatten(0, 1) / 255).view(pixels.shape[:2])


@torch.no_grad()
def judge_all(model: PreferenceModel, groups: PaintedGroups, prompts_per_step: int = 100) -> FloatArray:
    """Give the model's answers (N, K) to all images."""
    rows = torch.arange(len(groups.words)).split(prompts_per_step)
    return torch.cat([judge(model, groups, of) for of in rows]).double().numpy()


def pair_accuracy(answers: FloatArray, groups: PaintedGroups) -> dict[str, tuple[float, int]]:
    """
    Say how often answers (N, K) order two images of a prompt as the rule does.

    Returns:
        Name -> (the share in [0, 1], the number of pairs): of "all" pairs that the rule tells apart, and for each
        check of those that differ in this check alone.
    """
    first, second = pair_indices(answers.shape[1])

    def gaps(values: FloatArray) -> FloatArray:
        found = np.nan_to_num(values)
        return found[:, first] - found[:, second]

    by_check = {name: gaps(values) for name, values in groups.checks.items()}
    differ = {name: np.abs(gap) > 1e-9 for name, gap in by_check.items()}
    alone = {name: differ[name] & (sum(differ.values()) == 1) for name in differ}
    right = (gaps(answers) > 0) == (gaps(groups.score) > 0)
    chosen = {"all": np.abs(gaps(groups.score)) > 1e-9, **alone}
    return {name: (float(right[pairs].mean()), int(pairs.sum())) for name, pairs in chosen.items() if pairs.any()}


def build_preference(
    file: str | Path, seed: int = 0, num_prompts: int = 6000, num_held_out: int = 700, steps: int = 3000
) -> dict[str, tuple[float, int]]:
    """
    Paint, train, save, and measure on the validation prompts.

    Args:
        file: of the weights, `.safetensors`; its folder is made.
        seed: of prompts, images, annotator and training.
        num_prompts, num_held_out: of the training and the validation split.
        steps: optimizer steps.

    Returns:
        What `pair_accuracy` says of the held-out pairs.
    """
    base, tokenizer = load_base()
    groups = paint_groups(base, tokenizer, num_prompts, "train", seed)
    model = train_preference(groups, steps, seed=seed)
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    save_model(model, str(file))
    held_out = paint_groups(base, tokenizer, num_held_out, "validation", seed)
    return pair_accuracy(judge_all(model, held_out), held_out)
