"""The verifier's score with cells that are read softly, so that it has a gradient to the pixels: a reward for ReFL.

Shapes: B images, G groups, 9 cells, 31 codes; a column of 3 cells is a line of the grid, and so is a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..messages import user_text
from .grammar import parse_prompt
from .render import CELL_SIZE, CLEAN_CELLS, IMAGE_SIZE
from .verifier import MAX_CELL_ERROR
from .world import (
    EMPTY,
    GRID_SIDE,
    NUM_CODES,
    RELATION_TABLE,
    PromptSpec,
    SpecArrays,
    cell_colors,
    cell_shapes,
    encode_specs,
)


TEMPERATURE = 0.005
"""
Mean squared distance, pixels in [-1, 1], over which a cell's code is in doubt.

The nearest two clean cells, a green circle and a green square, are 0.0365 apart: a clean drawing scores as the
verifier says within 5e-4. At 0.02 every wrong image has a gradient, but that holds within 0.1 only, and ReFL learns
no more.
"""

_TEMPLATE_ROWS = torch.from_numpy(CLEAN_CELLS.reshape(NUM_CODES, -1))
# The three lines of each relation, (4, 3, 3) cells, in its direction: columns from the left for "left of".
_LINES = torch.from_numpy(np.argsort(-RELATION_TABLE.sum(2), axis=1, kind="stable").reshape(-1, GRID_SIDE, GRID_SIDE))


def soft_shapeworld_reward(
    pixels: Tensor, prompts: Sequence[str | list[dict[str, Any]]], temperature: float = TEMPERATURE, **kwargs: Any
) -> Tensor:
    """
    Expect the score of [`shapeworld_reward`] if each cell is read at random by `cell_probabilities`.

    Args:
        pixels: (B, 3, 48, 48) in [0, 1].
        prompts: B prompts of the grammar, plain or conversational (the last user message counts).
        temperature: of the reading; towards 0 the reward is the verifier's own.

    Returns:
        (B,) in [0, 1], in the dtype of `pixels`, differentiable.

    Raises:
        ValueError: for pixels of another shape, another number of prompts, or a prompt that is not of the grammar.
    """
    if len(prompts) != len(pixels):
        raise ValueError(f"{len(pixels)} images for {len(prompts)} prompts: expected one image per prompt")
    specs = [parse_prompt(user_text(prompt)) for prompt in prompts]
    return expected_score(specs, cell_probabilities(pixels, temperature))


def cell_probabilities(pixels: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """
    Say how likely each cell holds each code: softmax(-error / temperature).

    The error is the mean squared distance to the clean cell, pixels in [-1, 1]. An unreadable cell is one more class,
    of the constant error `MAX_CELL_ERROR`: the verifier's rule is the limit of temperature 0.

    Args:
        pixels: (B, 3, 48, 48) in [0, 1].
        temperature: above 0.

    Returns:
        (B, 9, 32): codes 0 to 30, then unreadable; each row sums to 1.
    """
    if pixels.ndim != 4 or tuple(pixels.shape[1:]) != (3, IMAGE_SIZE, IMAGE_SIZE):
        raise ValueError(
            f"pixels have shape {tuple(pixels.shape)}, expected (B, 3, {IMAGE_SIZE}, {IMAGE_SIZE}): set "
            f"image_size={IMAGE_SIZE}, the size in which ShapeWorld's shapes are drawn"
        )
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}, expected a number above 0")
    tiles = (2 * pixels - 1).unflatten(3, (GRID_SIDE, CELL_SIZE)).unflatten(2, (GRID_SIDE, CELL_SIZE))
    rows = tiles.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    templates = _TEMPLATE_ROWS.to(rows)
    squares = rows.square().sum(-1, keepdim=True) - 2 * rows @ templates.T + templates.square().sum(-1)
    errors = squares / rows.shape[-1]
    unreadable = torch.full_like(errors[..., :1], MAX_CELL_ERROR)
    return (-torch.cat([errors, unreadable], -1) / temperature).softmax(-1)


def expected_score(specs: Sequence[PromptSpec], probabilities: Tensor) -> Tensor:
    """
    Average `verifier.score` over images whose cells are drawn independently of each other, in closed form.

    Args:
        specs: the meanings of B prompts.
        probabilities: (B, 9, 32) of each cell's codes, unreadable last.

    Returns:
        (B,) in [0, 1].
    """
    asked = encode_specs(list(specs))
    device = probabilities.device
    count, region, relation = (torch.from_numpy(x).to(device) for x in (asked.count, asked.region, asked.relation))
    match = torch.from_numpy(matching_codes(asked)).to(probabilities)
    hit = torch.einsum("bgk,bck->bgc", match, probabilities[..., :NUM_CODES])  # (B, G, 9) the cell is of the group
    found = count_distribution(hit)
    outside = none_of(hit, ~region)
    # An unreadable cell counts as an object.
    objects = count_distribution(1 - probabilities[..., EMPTY])
    related = stands_in_order(hit[:, 0], hit[:, 1], _LINES.to(device)[relation])

    # name of the verifier's check: (probability that it holds, where it applies), each (B, number of checks)
    used, restricted = count > 0, ~region.all(-1)
    checks = {
        "present": (1 - found[..., 0], used),
        "count": (found.gather(2, count[..., None])[..., 0], count > 1),
        "place": (outside * (1 - none_of(hit, region)), used & restricted),
        "relation": (related[:, None], relation[:, None] >= 0),
        "total": (objects.gather(1, count.sum(1, keepdim=True)), torch.ones_like(relation[:, None], dtype=torch.bool)),
    }
    holds = torch.cat([probability * applies for probability, applies in checks.values()], 1)
    return holds.sum(1) / torch.cat([applies for _, applies in checks.values()], 1).sum(1)


def matching_codes(asked: SpecArrays) -> np.ndarray:
    """Mark the codes whose objects belong to each group, (B, G, 31)."""
    codes = np.arange(NUM_CODES)
    color, shape = asked.color[..., None], asked.shape[..., None]
    of_color, of_shape = (color < 0) | (color == cell_colors(codes)), (shape < 0) | (shape == cell_shapes(codes))
    return (codes != EMPTY) & of_color & of_shape


def none_of(hit: Tensor, cells: Tensor) -> Tensor:
    """Give the probability (...) that none of the chosen of n independent events happens: `hit`, `cells` (..., n)."""
    return (1 - hit * cells).prod(-1)


def count_distribution(hit: Tensor) -> Tensor:
    """
    Count how many of n independent events happen (the Poisson-binomial distribution), one event after the other:

        P_n(k) = (1 - hit_n) P_{n-1}(k) + hit_n P_{n-1}(k - 1)

    Args:
        hit: (..., n) probabilities.

    Returns:
        (..., n + 1) probabilities of 0 to n.
    """
    nothing = torch.zeros_like(hit[..., :1])
    distribution = torch.ones_like(nothing)
    for p in hit.split(1, -1):
        distribution = torch.cat([distribution * (1 - p), nothing], -1) + torch.cat([nothing, distribution * p], -1)
    return distribution


def stands_in_order(first: Tensor, second: Tensor, lines: Tensor) -> Tensor:
    """
    Give the probability that both groups have an object, and every one of the first lies on a line before every one
    of the second. A cell is of one group at most.

    Summed over k, the last line with an object of the first group: up to it none is of the second; behind it none is
    of the first, and at least one of the second.

    Args:
        first, second: (B, 9) probabilities that a cell is of each group.
        lines: (B, 3, 3) cells of the first, second and third line.

    Returns:
        (B,).
    """
    a, b = (x.gather(1, lines.flatten(1)).view_as(lines) for x in (first, second))
    no_a, no_b, neither = (1 - a).prod(-1), (1 - b).prod(-1), (1 - a - b).prod(-1)  # (B, 3) by line
    total = torch.zeros_like(first[:, 0])
    for k in range(lines.shape[1] - 1):
        before = no_b[:, :k].prod(1) * (no_b - neither)[:, k]
        behind = no_a[:, k + 1 :].prod(1) - neither[:, k + 1 :].prod(1)
        total = total + before * behind
    return total
