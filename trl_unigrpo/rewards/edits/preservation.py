"""Compare what should stay in an edit with the source, pixel by pixel."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from ..common import Scores, check_images, to_rgb


Comparison = Callable[[np.ndarray, np.ndarray], "np.ndarray | None"]
"""From two images (H, W, 3), 0 to 255, to how alike they are (H, W), 1 where they are equal; None if it can't tell."""


def preserve(
    prompts: Sequence[Any],
    images: Sequence[Image.Image] = (),
    source_images: Sequence[Any] = (),
    mask: Sequence[Any] | None = None,
    **kwargs: Any,
) -> Scores:
    """
    Return 1 - the mean absolute difference (0 to 1) of each edited image and its source, over what should stay.

    Args:
        source_images: for each image its source, or a list whose first is; resized to the image.
        mask: for each image one that is white where the edit belongs. Without one, or where it is None, all of the
            image should stay.
    """
    return _compared(prompts, images, source_images, mask, lambda a, b: 1 - np.abs(a - b).mean(2) / 255)


def preserve_structure(
    prompts: Sequence[Any],
    images: Sequence[Image.Image] = (),
    source_images: Sequence[Any] = (),
    mask: Sequence[Any] | None = None,
    **kwargs: Any,
) -> Scores:
    """
    Return the structural similarity (SSIM) of each edited image and its source, averaged over what should stay. Needs
    scikit-image: `pip install "trl-unigrpo[edit]"`. None for images of fewer than 7 pixels to a side.

    Args:
        source_images, mask: see [`preserve`].
    """
    return _compared(prompts, images, source_images, mask, _structure)


def _structure(a: np.ndarray, b: np.ndarray) -> np.ndarray | None:
    try:
        from skimage.metrics import structural_similarity
    except ImportError as error:
        raise ImportError("SSIM needs scikit-image: pip install 'trl-unigrpo[edit]'.") from error
    if min(a.shape[:2]) < 7:  # its window
        return None
    _, alike = structural_similarity(a, b, channel_axis=2, data_range=255, full=True)
    return np.asarray(alike).mean(2)


def _compared(
    prompts: Sequence[Any],
    images: Sequence[Image.Image],
    source_images: Sequence[Any],
    mask: Sequence[Any] | None,
    compare: Comparison,
) -> Scores:
    check_images(images, len(prompts))
    sources = [one[0] if isinstance(one, (list, tuple)) else one for one in source_images]
    check_images(sources, len(images))
    masks = [None] * len(images) if mask is None else mask
    return [_alike(*row, compare) for row in zip(images, sources, masks, strict=True)]


def _alike(image: Image.Image, source: Image.Image, mask: Any, compare: Comparison) -> float | None:
    """Average over the pixels that the mask leaves; None where it leaves none."""
    resized = to_rgb(source).resize(image.size, Image.Resampling.BICUBIC)
    alike = compare(*(np.asarray(x, dtype=np.float64) for x in (to_rgb(image), resized)))
    if alike is None:
        return None
    stays = np.ones(alike.shape, dtype=bool)
    if mask is not None:
        mask = mask if isinstance(mask, Image.Image) else Image.fromarray(np.asarray(mask, dtype=np.uint8) * 255)
        stays = np.asarray(mask.convert("L").resize(image.size, Image.Resampling.NEAREST)) < 128
    return float(alike[stays].mean()) if stays.any() else None
