"""Decoded images, and the mark of those that are not numbers: a VAE that overflowed leaves NaN, which looks black."""

from collections.abc import Iterable, Sequence

from PIL import Image


_MARK = "not_a_number"


def mark_failed(images: Sequence[Image.Image], finite: Iterable[bool]) -> list[Image.Image]:
    """Mark the images whose pixels were not all finite numbers; returns all."""
    for image, fine in zip(images, finite, strict=True):
        if not fine:
            image.info[_MARK] = True
    return list(images)


def has_failed(image: Image.Image) -> bool:
    """Say whether an image, or what it was copied from, is marked."""
    return _MARK in image.info
