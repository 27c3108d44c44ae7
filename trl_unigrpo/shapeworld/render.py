"""The renderer: images of 48 x 48 pixels, nine cells of 16 x 16, one anti-aliased shape a cell on a dark ground."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from .world import (
    COLORS,
    GRID_SIDE,
    NUM_CELLS,
    NUM_CODES,
    SHAPES,
    IntArray,
)


Float32Array = NDArray[np.float32]

CELL_SIZE = 16
IMAGE_SIZE = GRID_SIDE * CELL_SIZE

BACKGROUND = np.array([-0.9, -0.9, -0.85], dtype=np.float32)
PALETTE: Float32Array = np.array(
    [
        [1.0, -0.7, -0.7],
        [-0.7, 0.6, -0.7],
        [-0.6, -0.4, 1.0],
        [1.0, 0.9, -0.8],
        [1.0, -0.1, 0.9],
        [-0.6, 0.9, 1.0],
    ],
    dtype=np.float32,
)
"""(6, 3): RGB in [-1, 1] of each of `COLORS`."""


def shape_masks(size: int = CELL_SIZE, oversample: int = 4) -> Float32Array:
    """Give the coverage (5, size, size) in [0, 1] of each of `SHAPES`: the mean over `oversample`^2 points."""
    points = (np.arange(size * oversample) + 0.5) * (CELL_SIZE / (size * oversample))
    y, x = points[:, None], points[None, :]
    dy, dx = abs(y - CELL_SIZE / 2), abs(x - CELL_SIZE / 2)
    radius = np.hypot(dy, dx)
    inside = [
        radius <= 6.0,
        (dy < 5.2) & (dx < 5.2),
        (y > 2) & (y < 14) & (dx < (y - 2) * 0.55),
        ((dy < 2) & (dx < 6.5)) | ((dx < 2) & (dy < 6.5)),
        (radius >= 3.6) & (radius <= 6.8),
    ]
    blocks = np.stack(inside).reshape(len(SHAPES), size, oversample, size, oversample)
    return blocks.mean((2, 4), dtype=np.float32)


def _clean_cells() -> Float32Array:
    templates = np.empty((NUM_CODES, 3, CELL_SIZE, CELL_SIZE), dtype=np.float32)
    templates[:] = BACKGROUND[:, None, None]
    ink = (PALETTE - BACKGROUND)[:, None, :, None, None] * shape_masks()[None, :, None]
    templates[1:] += ink.reshape(len(COLORS) * len(SHAPES), 3, CELL_SIZE, CELL_SIZE)
    return templates


CLEAN_CELLS = _clean_cells()
"""(31, 3, 16, 16) in [-1, 1]: the clean cell of each code."""
_CLEAN_CELLS_UINT8 = np.round((CLEAN_CELLS + 1) * 127.5).astype(np.uint8).transpose(0, 2, 3, 1).copy()


def _check(cells: IntArray) -> IntArray:
    cells = np.asarray(cells).reshape(-1, NUM_CELLS)
    if cells.size and (cells.min() < 0 or cells.max() >= NUM_CODES):
        raise ValueError(
            f"cell codes go from 0 to {NUM_CODES - 1}, got {cells.min()} to {cells.max()}: unreadable cells (-1) "
            "can't be rendered, replace them by 0"
        )
    return cells


def render_tensor(cells: IntArray) -> torch.Tensor:
    """Render cells (B, 9) or (9,) as images (B, 3, 48, 48), float32 in [-1, 1]."""
    tiles = CLEAN_CELLS[_check(cells)].reshape(-1, GRID_SIDE, GRID_SIDE, 3, CELL_SIZE, CELL_SIZE)
    return torch.from_numpy(tiles.transpose(0, 3, 1, 4, 2, 5).reshape(-1, 3, IMAGE_SIZE, IMAGE_SIZE))


def render_images(cells: IntArray) -> list[Image.Image]:
    """Render cells (B, 9) or (9,) as RGB images of 48 x 48 pixels."""
    tiles = _CLEAN_CELLS_UINT8[_check(cells)].reshape(-1, GRID_SIDE, GRID_SIDE, CELL_SIZE, CELL_SIZE, 3)
    pixels = tiles.transpose(0, 1, 3, 2, 4, 5).reshape(-1, IMAGE_SIZE, IMAGE_SIZE, 3)
    return [Image.fromarray(image) for image in pixels]
