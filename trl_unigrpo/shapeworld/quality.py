"""A score of images that no training sees: how far they are, as a set, from clean drawings, in the way of FID."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..models.registry import unified_model
from ..statistics import FloatArray
from .corpus import NO_ERRORS, draw_plans, paint
from .grammar import parse_prompt
from .render import render_images
from .verifier import images_to_array
from .world import encode_specs


DRAWINGS_PER_PROMPT = 10


def frechet_distance(a: FloatArray, b: FloatArray) -> float:
    """
    Compute the squared Wasserstein-2 distance of Gaussians fitted to two sets of points, as FID (arXiv 1706.08500):

        |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))

    Args:
        a: (N, C) points, N > 1.
        b: (M, C) points, M > 1.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"Points of shape {a.shape} and {b.shape}: expected (N, C) and (M, C), at least two of each.")
    roots = [_square_root(np.atleast_2d(np.cov(points, rowvar=False))) for points in (a, b)]
    # The eigenvalues of C_a C_b are the squared singular values of the product of the roots.
    shared = np.linalg.svd(roots[0] @ roots[1], compute_uv=False).sum()
    spread = np.square(roots[0]).sum() + np.square(roots[1]).sum()  # tr C_a + tr C_b
    return max(0.0, float(np.square(a.mean(0) - b.mean(0)).sum() + spread - 2 * shared))


def _square_root(covariance: FloatArray) -> FloatArray:
    """Take the symmetric root of a positive semi-definite matrix."""
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(values.clip(0))) @ vectors.T


def image_tokens(model: Any, images: Sequence[Image.Image]) -> FloatArray:
    """Encode images of 48 x 48 pixels by the autoencoder: (tokens of all images, C)."""
    base = unified_model(model)
    pixels = torch.from_numpy(images_to_array(images)).to(base.device)
    return base.encode_images(pixels).flatten(0, 1).double().cpu().numpy()


def clean_drawings(prompts: Sequence[str], seed: int = 0) -> list[Image.Image]:
    """Draw `DRAWINGS_PER_PROMPT` random scenes for each prompt, each as the prompt asks, without a mistake."""
    rng = np.random.default_rng(seed)
    specs = encode_specs([parse_prompt(prompt) for prompt in prompts for _ in range(DRAWINGS_PER_PROMPT)])
    return render_images(paint(draw_plans(specs, rng), NO_ERRORS, rng))


def latent_distance(model: Any, images: Sequence[Image.Image], prompts: Sequence[str]) -> float:
    """
    Compute the Frechet distance between the autoencoder's tokens of images and of clean drawings of the same prompts.

    It sees decay of the images and a narrowed choice of colours, shapes and numbers alike, and not if an image fits
    its own prompt. 0 would be a painter of clean images as varied as the prompts allow.

    Args:
        model: a unified model; all that are trained from the shipped base share its autoencoder.
        images: B images of 48 x 48 pixels.
        prompts: their B prompts.
    """
    return frechet_distance(image_tokens(model, images), image_tokens(model, clean_drawings(prompts)))
