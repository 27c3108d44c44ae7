"""Images read in RGB; and the mark of those that were decoded to no numbers: a VAE that overflowed leaves NaN, which
looks black."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

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


def checked_rgb(image: Image.Image) -> Image.Image:
    """
    Convert the image to RGB. Transparent parts show white.

    Raises:
        ValueError: if the image is empty, has more pixels than Pillow's `Image.MAX_IMAGE_PIXELS`, or more than 8 bits
            per channel.
    """
    limit = Image.MAX_IMAGE_PIXELS
    if not image.width or not image.height or (limit is not None and image.width * image.height > limit):
        raise ValueError(
            f"An image of {image.height} x {image.width} pixels (height x width): expected at least one pixel and at "
            f"most {limit}. Make it smaller before it gets here; the model sees far fewer."
        )
    if image.mode[0] in "IF":
        raise ValueError(
            f"An image of mode {image.mode!r}: expected 8 bits per channel. Scale its values to 0 .. 255 and convert "
            'it, for example `Image.fromarray((array / array.max() * 255).astype("uint8"))`.'
        )
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    opaque = Image.new("RGB", image.size, "white")
    opaque.paste(image, mask=image.getchannel("A"))
    return opaque


Alike = TypeVar("Alike")


def places_alike(keys: Sequence[Any]) -> list[list[int]]:
    """List the places of each key, such as an image's size, in the order in which keys come first."""
    places: dict[Any, list[int]] = {}
    for place, key in enumerate(keys):
        places.setdefault(key, []).append(place)
    return list(places.values())


def alike_together(keys: Sequence[Any], run: Callable[[list[int]], Iterable[Alike]]) -> list[Alike]:
    """
    Run a function once for all places with the same key.

    Args:
        run: gives something for each of the places that it gets.

    Returns:
        What it gave for each place, in the order of the places.
    """
    found: dict[int, Alike] = {}
    for some in places_alike(keys):
        found.update(zip(some, run(some), strict=True))
    return [found[place] for place in range(len(keys))]
