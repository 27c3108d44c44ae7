"""Sizes of images, (height, width) in pixels, from the forms in which a user may write them."""

from collections.abc import Sequence
from numbers import Real
from typing import Any, TypeAlias


Size: TypeAlias = tuple[int, int]
GivenSize: TypeAlias = int | str | Sequence[int]
"""One size as a user writes it."""

FORMS = (
    "the side of a square such as 512, height and width such as [384, 640] or '384x640', or a list of sizes such as "
    "[[512, 512], [384, 640]] or ['512x512', '384x640']"
)
"""The values that `read_sizes` takes, in words."""


def read_sizes(value: Any, name: str = "image_size") -> list[Size]:
    """
    Read one size, or a list of them. Two numbers are height and width, never two squares.

    Args:
        name: of the option, for errors.

    Raises:
        ValueError: for anything else, and for sides below 1.

    Examples:
        >>> read_sizes(512)
        [(512, 512)]
        >>> read_sizes([384, 640])
        [(384, 640)]
        >>> read_sizes(["512x512", "384x640"])
        [(512, 512), (384, 640)]
    """
    if isinstance(value, (list, tuple)) and len(value) == 1:
        return read_sizes(value[0], name)
    sizes = [_size(value)]
    # Bare numbers in a list are one size or none: three of them could be squares, or a list without its brackets.
    if sizes == [None] and isinstance(value, (list, tuple)) and not any(_side(item) is not None for item in value):
        sizes = [_size(item) for item in value]
    found = [size for size in sizes if size is not None and min(size) >= 1]
    if not found or len(found) < len(sizes):
        raise ValueError(f"{name}={value!r}: expected {FORMS}, sides of at least 1 pixel.")
    return found


def read_size(value: Any, name: str = "image_size") -> Size:
    """Read one size; ValueError for a list of several, as for what is none."""
    sizes = read_sizes(value, name)
    if len(sizes) > 1:
        raise ValueError(f"{name}={value!r}: expected one size here. Pass one of them.")
    return sizes[0]


def read_square(value: Any, name: str = "image_size") -> int:
    """Read the side of a square, which stands for an area: edited images have it, and the shape of their source."""
    sizes = read_sizes(value, name)
    height, width = sizes[0]
    if len(sizes) > 1 or height != width:
        raise ValueError(
            f"{name}={value!r} with source images: an edited image has the shape of its source. Pass the side of a "
            f"square of as many pixels, such as {round((height * width) ** 0.5)}."
        )
    return height


def plain_size(size: Size) -> int | list[int]:
    """Write a size as users do: the side of a square, else [height, width]."""
    return size[0] if size[0] == size[1] else list(size)


def _size(value: Any) -> Size | None:
    """Read one size; None if it is none."""
    parts = value.lower().split("x") if isinstance(value, str) else value
    sides = [_side(part) for part in parts] if isinstance(parts, (list, tuple)) else [_side(parts)]
    if None in sides or len(sides) not in (1, 2):
        return None
    return sides[0], sides[-1]  # type: ignore[return-value]


def _side(value: Any) -> int | None:
    """Read one number of pixels, which YAML may have left a text; None if it is no whole number."""
    if isinstance(value, bool) or not isinstance(value, (str, Real)):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return int(number) if number.is_integer() else None
