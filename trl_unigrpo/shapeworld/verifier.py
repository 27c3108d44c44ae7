"""A rule that scores images, the way GenEval does: is every object there, how many, where, in which colour?

The path is image -> cells (`read_cells`) -> checks against what the prompt asks for (`score`). Everything works on
whole batches; the reward function needs the prompts' texts and the images, nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..messages import user_text
from ..statistics import BoolArray
from .grammar import parse_prompt
from .render import CELL_SIZE, CLEAN_CELLS, IMAGE_SIZE
from .world import (
    GRID_SIDE,
    NUM_CELLS,
    RELATION_TABLE,
    UNREADABLE,
    IntArray,
    PromptSpec,
    cell_colors,
    cell_shapes,
    encode_specs,
)


ScoreArray = NDArray[np.float64]

MAX_CELL_ERROR = 0.08
"""A cell whose mean squared distance to every clean cell is above this, pixels in [-1, 1], is unreadable."""

_TEMPLATE_ROWS = CLEAN_CELLS.reshape(len(CLEAN_CELLS), -1)
_TEMPLATE_NORMS = np.square(_TEMPLATE_ROWS).sum(1)


def images_to_array(images: Sequence[Image.Image]) -> NDArray[np.float32]:
    """Read pixels (B, 3, 48, 48) in [-1, 1] off B images of 48 x 48 pixels, of any PIL mode."""
    for index, image in enumerate(images):
        if not isinstance(image, Image.Image) or image.size != (IMAGE_SIZE, IMAGE_SIZE):
            is_image = isinstance(image, Image.Image)
            got = f"{image.width} x {image.height} pixels" if is_image else type(image).__name__
            raise ValueError(
                f"images[{index}] is {got}, expected a PIL image of {IMAGE_SIZE} x {IMAGE_SIZE} pixels: set "
                f"image_size={IMAGE_SIZE}, the size in which ShapeWorld's shapes are drawn"
            )
    if not images:
        return np.zeros((0, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=np.float32)
    pixels = np.stack([np.asarray(image if image.mode == "RGB" else image.convert("RGB")) for image in images])
    return pixels.transpose(0, 3, 1, 2) * np.float32(2 / 255) - np.float32(1)


def read_cells(pixels: NDArray[np.float32]) -> tuple[IntArray, ScoreArray]:
    """Read images (B, 3, 48, 48), pixels in [-1, 1], by the nearest clean cell.

    Returns:
        Cell codes (B, 9), -1 where the nearest clean cell is further than `MAX_CELL_ERROR`, and the squared distance
        to the nearest clean cell (B, 9), averaged over the cell's pixels and channels.
    """
    tiles = pixels.reshape(-1, 3, GRID_SIDE, CELL_SIZE, GRID_SIDE, CELL_SIZE).transpose(0, 2, 4, 1, 3, 5)
    rows = np.ascontiguousarray(tiles, dtype=np.float32).reshape(-1, _TEMPLATE_ROWS.shape[1])
    codes = (_TEMPLATE_NORMS - 2 * rows @ _TEMPLATE_ROWS.T).argmin(1)
    # This takes the difference itself, not the expanded square, which cancels to noise on clean images.
    residual = rows - _TEMPLATE_ROWS[codes]
    error = np.einsum("ij,ij->i", residual, residual).astype(np.float64) / rows.shape[1]
    cells = np.where(error <= MAX_CELL_ERROR, codes, UNREADABLE)
    return cells.reshape(-1, NUM_CELLS), error.reshape(-1, NUM_CELLS)


def image_error(images: Sequence[Image.Image]) -> ScoreArray:
    """Measure how far each of B images is from clean drawing, whatever it shows: (B,), 0 is clean.

    The squared distance to the nearest clean cell, pixels in [-1, 1], averaged over the cells. Eight-bit rounding
    alone gives about 4e-6.
    """
    return read_cells(images_to_array(images))[1].mean(1)


@dataclass(frozen=True)
class VerifierScores:
    """The scores of B images, all in [0, 1].

    Args:
        score: (B,), the share of a prompt's checks that hold. This is the reward.
        strict: (B,), 1 where every check holds.
        checks: name -> (B,), the share of this kind of check that holds, NaN where the prompt has none:
            `present` (each group has at least one object), `count` (exactly as many as asked for, where that is more
            than one), `place` (all of the group within its region), `relation` (the two objects lie as asked), `total`
            (exactly as many objects in the image as the prompt asks for, unreadable cells counting as objects).
    """

    score: ScoreArray
    strict: ScoreArray
    checks: dict[str, ScoreArray]


def score(specs: Sequence[PromptSpec], cells: IntArray) -> VerifierScores:
    """Score cells (B, 9) against B specs. Every check counts alike."""
    asked = encode_specs(list(specs))
    if len(asked) != len(cells):
        raise ValueError(f"{len(asked)} specs for {len(cells)} images: expected one spec per image")
    # Shapes: B images, G groups, 9 cells.
    color, shape = cell_colors(cells)[:, None], cell_shapes(cells)[:, None]
    any_color, any_shape = (asked.color < 0)[..., None], (asked.shape < 0)[..., None]
    match = (cells > 0)[:, None] & (any_color | (color == asked.color[..., None]))
    match &= any_shape | (shape == asked.shape[..., None])
    found, used, restricted = match.sum(-1), asked.count > 0, ~asked.region.all(-1)
    pairs = match[:, 0, :, None] & match[:, 1, None, :]
    wrong = pairs & ~RELATION_TABLE[asked.relation]
    related, has_relation = pairs.any((1, 2)) & ~wrong.any((1, 2)), asked.relation >= 0
    present = found >= 1

    results: dict[str, tuple[BoolArray, BoolArray]] = {  # name -> (holds, applies), each (B, number of checks)
        "present": (present, used),
        "count": (found == asked.count, asked.count > 1),
        "place": (present & ~(match & ~asked.region).any(-1), used & restricted),
        "relation": (related[:, None], has_relation[:, None]),
        "total": (((cells != 0).sum(1) == asked.count.sum(1))[:, None], np.ones((len(cells), 1), dtype=bool)),
    }
    passed = {name: (holds & applies).sum(1) for name, (holds, applies) in results.items()}
    asked_for = {name: applies.sum(1) for name, (_, applies) in results.items()}
    total = sum(passed.values()) / np.maximum(sum(asked_for.values()), 1)
    checks = {
        name: np.divide(passed[name], number, out=np.full(len(cells), np.nan), where=number > 0)
        for name, number in asked_for.items()
    }
    return VerifierScores(total, (total == 1).astype(np.float64), checks)


def shapeworld_reward(
    prompts: Sequence[str | list[dict[str, Any]]],
    completions: Sequence[Any],
    images: Sequence[Image.Image],
    **kwargs: Any,
) -> list[float]:
    """Give the share of each prompt's checks that its image passes, in [0, 1]: a TRL reward function.

    Args:
        prompts: B prompts of the grammar, plain or conversational (the last user message counts).
        completions: not read, the image alone is scored.
        images: B images of 48 x 48 pixels, one per completion.
    """
    if len(prompts) != len(images):
        raise ValueError(f"{len(images)} images for {len(prompts)} prompts: expected one image per prompt")
    specs = [parse_prompt(user_text(prompt)) for prompt in prompts]
    cells, _ = read_cells(images_to_array(images))
    return [float(value) for value in score(specs, cells).score]
