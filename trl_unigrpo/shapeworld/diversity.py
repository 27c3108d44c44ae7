"""Diversity of the images of one prompt: the first thing that reinforcement learning loses."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .world import (
    COLORS,
    NUM_CELLS,
    IntArray,
    cell_colors,
)


@dataclass(frozen=True)
class Diversity:
    """Averages over prompts.

    Args:
        position_entropy: bits, of the cell in which an object lies; at most log2(9) = 3.17.
        color_entropy: bits, of the colour of an object; at most log2(6) = 2.58.
        distinct_images: share in (0, 1] of a prompt's images that differ in at least one cell.
    """

    position_entropy: float
    color_entropy: float
    distinct_images: float


def _entropy(counts: IntArray) -> float:
    """Compute the entropy in bits of a histogram; 0 for an empty one."""
    share = counts[counts > 0] / max(int(counts.sum()), 1)
    return float(-(share * np.log2(share)).sum()) + 0.0


def cell_diversity(cells: IntArray) -> Diversity:
    """Measure the diversity within the images of each prompt, cells (prompts, images per prompt, 9).

    Colour entropy says something only for prompts that leave the colour open, position entropy for those that leave
    the place open. Unreadable cells are no objects here.
    """
    if cells.ndim != 3 or cells.shape[-1] != NUM_CELLS or 0 in cells.shape:
        raise ValueError(f"cells have shape {cells.shape}, expected (prompts, images per prompt, {NUM_CELLS})")
    positions = [_entropy((group > 0).sum(0)) for group in cells]
    colors = [_entropy(np.bincount(cell_colors(group[group > 0]), minlength=len(COLORS))) for group in cells]
    distinct = [len(np.unique(group, axis=0)) / len(group) for group in cells]
    return Diversity(float(np.mean(positions)), float(np.mean(colors)), float(np.mean(distinct)))
