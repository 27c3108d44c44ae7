"""Find out by trying what a pipeline does with source images."""

from contextlib import suppress

import torch

from .painter import Painter


PROBE_SIDE = 64
"""Pixels to a side of the source images that a pipeline is tried with."""


@torch.no_grad()
def edits_images(painter: Painter) -> bool:
    """
    Say whether a pipeline's call takes a source image, and each step depends on that.

    It does not for one whose later steps need what its first has kept of the image: a state can't be computed alone.
    """
    if not painter.loop.edits:
        return False
    black = torch.zeros(PROBE_SIDE, PROBE_SIDE, 3, dtype=torch.uint8)
    try:
        first, second = painter.probe([black]), painter.probe([black + 255])
    except Exception:  # whatever a pipeline raises
        return False
    return not torch.equal(first, second)


def side_step(painter: Painter) -> int:
    """Find the smallest number of pixels by which sides of a pipeline's images may differ."""
    height, width = painter.probe_size
    for step in (getattr(painter.pipeline, "vae_scale_factor", 8) * factor for factor in (1, 2, 4, 8)):
        with suppress(ValueError):
            painter.latent_shape((height + step, width))
            painter.latent_shape((height, width + step))
            return step
    return height
