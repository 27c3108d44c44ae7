"""Compare what should stay in an edit with the source, or with the image before, pixel by pixel."""

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


class ConsistencyReward:
    """
    How much of each image of a story is as in the one before, and of the first one as in its source: a turn should
    change no more than it asks for. None for a first image without a source.

    Args:
        compare: what compares two images, [`preserve`] or [`preserve_structure`].
    """

    every_round = True

    def __init__(self, compare: Callable[..., Scores] = preserve):
        self.compare, self.__name__ = compare, "consistency"

    def __call__(
        self,
        prompts: Sequence[Any],
        images: Sequence[Image.Image] = (),
        previous_images: Sequence[Sequence[Image.Image]] | None = None,
        source_images: Sequence[Any] | None = None,
        masks: Sequence[Any] | None = None,
        round_index: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> Scores:
        """
        Score a batch as TRL asks for it.

        Args:
            previous_images, source_images, round_index: as the trainer hands them over.
            masks: for each image a list of one mask a turn, white where that turn belongs, or None for all of them.
        """
        check_images(images, len(prompts))
        none: list[Any] = [None] * len(images)
        before = [
            stood[-1] if stood else source
            for stood, source in zip(previous_images or none, source_images or none, strict=True)
        ]
        turns = zip(masks or none, round_index or [-1] * len(images), strict=True)
        mask = [None if own is None else own[turn] for own, turn in turns]
        known = [place for place, image in enumerate(before) if image is not None]
        pairs = [[some[place] for place in known] for some in (prompts, images, before, mask)]
        scores = dict(zip(known, self.compare(*pairs), strict=True))
        return [scores.get(place) for place in range(len(images))]


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
