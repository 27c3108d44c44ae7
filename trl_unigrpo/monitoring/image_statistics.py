"""The looks of images in a few numbers: those that reward hacking moved in public runs.

Shapes: N images; P groups of G; D numbers of a thumbnail.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..statistics import BoolArray, FloatArray


WORKING_SIDE = 128
"""Pixels of the shorter side of the copy that all but the noise is measured on: averages of blocks, so that shares,
colours and edges stay what they are, at a sixteenth of the time for 512 pixels."""
NOISE_SIDE = 512
"""Noise is measured on the pixels themselves, as blocks would average it away: this many a side, in the middle."""
THUMBNAIL_SIDE = 8
DARK, BRIGHT = 0.25, 0.75
EDGE = 0.1
TWIN_DISTANCE = 5 / 255
MOST_PAIRED = 96
"""Images that the diversity looks at, at most."""


@dataclass(frozen=True)
class ImageStatistics:
    """
    The numbers of one image, whose values go from 0 (black) to 1 (white).

    Attributes:
        dark_share: share of pixels darker than a quarter, in [0, 1].
        bright_share: share of pixels brighter than three quarters, in [0, 1].
        color_entropy: bits of the histogram of 8 x 8 x 8 colours, in [0, 9].
        edge_density: share of pixels at which brightness changes by more than 0.1, in [0, 1].
        noise: standard deviation of the noise, by Immerkaer's estimate.
        thumbnail: (192,) colours of 8 x 8 blocks.
    """

    dark_share: float
    bright_share: float
    color_entropy: float
    edge_density: float
    noise: float
    thumbnail: FloatArray


def image_statistics(image: Image.Image) -> ImageStatistics:
    """Measure an image of any size and mode; parts that are transparent count as they are stored."""
    rgb = image.convert("RGB")
    small = rgb.reduce(max(1, min(rgb.size) // WORKING_SIDE))
    colors = np.asarray(small)
    luma = np.asarray(small.convert("L"), dtype=np.float64) / 255
    return ImageStatistics(
        dark_share=float((luma < DARK).mean()),
        bright_share=float((luma > BRIGHT).mean()),
        color_entropy=_color_entropy(colors),
        edge_density=_edge_density(luma),
        noise=noise_residual(rgb),
        thumbnail=thumbnail(small),
    )


def thumbnail(image: Image.Image) -> FloatArray:
    """Average the colours of 8 x 8 blocks: (192,), in [0, 1]."""
    small = image.convert("RGB").resize((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float64).flatten() / 255


def image_distance(image: Image.Image, other: Image.Image) -> float:
    """
    Return the root mean squared difference of the 8 x 8 thumbnails of two images of any sizes, in [0, 1]. What a VAE
    loses of an image that is copied averages out in them.
    """
    return float(np.sqrt(((thumbnail(image) - thumbnail(other)) ** 2).mean()))


def _color_entropy(colors: NDArray[np.uint8]) -> float:
    red, green, blue = np.moveaxis(colors >> 5, -1, 0).astype(np.int64)
    counts = np.bincount((red << 6 | green << 3 | blue).ravel())
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log2(share)).sum()) + 0.0


def _edge_density(luma: FloatArray) -> float:
    """Return the share of pixels that differ from those to the right and below, where both of these exist."""
    if min(luma.shape) < 2:
        return 0.0
    right, down = np.diff(luma, axis=1)[:-1], np.diff(luma, axis=0)[:, :-1]
    return float((right**2 + down**2 > EDGE**2).mean())


def noise_residual(image: Image.Image) -> float:
    """
    Estimate the standard deviation of an image's noise, in [0, 1], by what second differences across and along leave
    of it.

        sigma = sqrt(pi / 2) / 6 * mean |L|,   L = image convolved with [1 -2 1]^T [1 -2 1]

    L has no answer to flat areas, slopes and straight edges along an axis, and sum of squares 36. Exact for white
    Gaussian noise; noise of high frequency ("blue") counts more. Other edges and fine texture count too, so that it
    says something only beside the same model's earlier images. Source: J. Immerkaer, Fast noise variance estimation,
    Computer Vision and Image Understanding 64 (1996).
    """
    width, height = image.size
    left, top = max(0, width - NOISE_SIDE) // 2, max(0, height - NOISE_SIDE) // 2
    pixels = image.crop((left, top, min(width, left + NOISE_SIDE), min(height, top + NOISE_SIDE))).convert("L")
    values = np.asarray(pixels, dtype=np.int16)
    if min(values.shape) < 3:
        return 0.0
    answer = np.diff(np.diff(values, n=2, axis=0), n=2, axis=1)
    return math.sqrt(math.pi / 2) / 6 * float(np.abs(answer).mean()) / 255


def near_twins(
    thumbnails: FloatArray, groups: Sequence[int], images_per_thinking: int = 1
) -> tuple[BoolArray, BoolArray]:
    """
    Find images that nearly repeat another one: the root mean square of what their thumbnails differ by is below 5/255.

    Args:
        thumbnails: (N, 192).
        groups: N numbers, the same for images of one prompt.
        images_per_thinking: K images side by side that were painted after one text, and are to be alike.

    Returns:
        (N,) whether an image has a twin of its own prompt and another text, and (N,) whether it has one of another
        prompt.
    """
    squares = (thumbnails**2).sum(1)
    distances = squares[:, None] + squares - 2 * thumbnails @ thumbnails.T
    near = distances < thumbnails.shape[1] * TWIN_DISTANCE**2
    same = np.equal.outer(groups, groups)
    texts = np.arange(len(thumbnails)) // images_per_thinking
    own = near & same & np.not_equal.outer(texts, texts)
    return own.any(1), (near & ~same).any(1)


def diversity(statistics: Sequence[ImageStatistics], group_size: int) -> float:
    """
    Measure how much the images of one prompt differ: the mean over pairs of a group of the root mean squared
    difference of their 8 x 8 thumbnails, in [0, 1]. Of the first groups up to 96 images; NaN for groups of one.
    """
    groups = max(1, min(len(statistics), MOST_PAIRED) // group_size)
    thumbnails_ND = np.stack([image.thumbnail for image in statistics[: groups * group_size]])
    vectors_PGD = thumbnails_ND.reshape(-1, group_size, thumbnails_ND.shape[1])
    first, second = np.triu_indices(group_size, 1)
    if not len(first):
        return float("nan")
    return float(np.sqrt(((vectors_PGD[:, first] - vectors_PGD[:, second]) ** 2).mean(2)).mean())


def pixel_spread(image: Image.Image) -> float:
    """Measure the standard deviation of an image's pixels, in [0, 255]: near 0 where it turns blank."""
    return float(np.asarray(image, dtype=np.float32).std())
