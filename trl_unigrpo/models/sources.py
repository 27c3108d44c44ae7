"""Source images: what a prompt shows to be edited, from what a dataset holds to what a model sees."""

import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import PreTrainedTokenizerBase

from ..image_sizes import GivenSize, read_square
from ..images import checked_rgb
from ..trajectory import Trajectory
from .contract import UnifiedModelMixin
from .prompts import system_ids


EXPECTED = "a PIL image, the path of one, or a list of these"


@dataclass(frozen=True)
class Sources:
    """
    The source images of one prompt, encoded once for all that is made of it.

    Attributes:
        shown: in the model's own form, for `Trajectory.images`.
        size: (height, width) in pixels of the image that is painted of them.
        originals: as they were given, in RGB.
    """

    shown: list[Any]
    size: tuple[int, int]
    originals: list[Image.Image]


def source_fault(value: Any) -> str | None:
    """Say what is wrong with what a dataset holds as the source images of a prompt; None if they can be read."""
    values = value if isinstance(value, (list, tuple)) else [value]
    if not values:
        return f"an empty list, expected {EXPECTED}"
    for one in values:
        if isinstance(one, dict):
            one = one.get("path") if one.get("bytes") is None else b""
        if isinstance(one, (str, Path)) and not Path(one).is_file():
            return f"{str(one)!r}, and there is no such file"
        if not isinstance(one, (str, Path, bytes, Image.Image)):
            return f"{one!r}, expected {EXPECTED}"
    return None


def read_sources(value: Any) -> list[Image.Image]:
    """
    Read the source images of a prompt, in RGB: of PIL images, paths, or what `datasets` holds of an undecoded image.

    Raises:
        ValueError: for what is none.
    """
    if (fault := source_fault(value)) is not None:
        raise ValueError(f"The source image of a prompt is {fault}.")
    return [read_source(one) for one in (value if isinstance(value, (list, tuple)) else [value])]


def read_source(value: Any) -> Image.Image:
    """Read one source image, in RGB; ValueError if it can't be."""
    with _opened(value) as image:
        return checked_rgb(image)


def source_size(value: Any) -> tuple[int, int]:
    """Give the width and height of one source image, from its header alone; ValueError if it can't be read."""
    with _opened(value) as image:
        return image.size


@contextmanager
def _opened(value: Any) -> Iterator[Image.Image]:
    value = _stored(value)
    if isinstance(value, Image.Image):
        yield value
        return
    try:
        with Image.open(io.BytesIO(value) if isinstance(value, bytes) else value) as image:
            yield image
    except OSError as error:
        raise ValueError(f"A source image can't be read: {error}. Leave its row out, or mend the file.") from error


def _stored(value: Any) -> Any:
    """Take what `datasets` holds of an undecoded image: its bytes, or the path of its file."""
    if not isinstance(value, dict):
        return value
    return value["path"] if value.get("bytes") is None else value["bytes"]


def source_bytes(value: Any) -> bytes:
    """Give the bytes that tell one source image from another: those of its file, or its pixels."""
    value = _stored(value)
    if isinstance(value, Image.Image):
        return value.tobytes()
    return value if isinstance(value, bytes) else Path(value).read_bytes()


def size_like(source: tuple[int, int], area: int, step: int, longest: int | None = None) -> tuple[int, int]:
    """
    Give the size (height, width) of an edited image: about `area` pixels, the sides as the source's are to each other.

    Args:
        source: (height, width) of the source.
        step: both sides are multiples of it.
        longest: no side is longer; a multiple of the step.
    """
    scale = math.sqrt(area / (source[0] * source[1]))
    if longest is not None:
        scale = min(scale, longest / max(source))
    height, width = (max(step, round(side * scale / step) * step) for side in source)
    return height, width


def show_sources(model: UnifiedModelMixin, value: Any, image_size: GivenSize) -> Sources:
    """
    Read the source images of a prompt, and have the model see them.

    The painted image is as the first of them is, with about as many pixels as the square `image_size`. Each is
    resized, not cropped, to so many pixels: sides that the model can't take never reach it.
    """
    originals, area = read_sources(value), read_square(image_size) ** 2
    sizes = [size_like((image.height, image.width), area, model.side_step, model.longest_side) for image in originals]
    shown = [model.source_image(image, size) for image, size in zip(originals, sizes, strict=True)]
    return Sources(shown, sizes[0], originals)


def check_edits(model: UnifiedModelMixin) -> None:
    """Raise ValueError if a model takes no source images."""
    if not model.edits:
        raise ValueError(
            f"{model.painter_name} is text to image only: it takes no source images. Take a model that edits, such "
            "as BAGEL or a pipeline with an `image` argument, or leave the source images out."
        )


def shown_images(model: UnifiedModelMixin, sources: Sequence[Sources]) -> dict[str, list[list[Any]]]:
    """Give the argument that shows source images where a model computes texts; none where it does not see them."""
    return {"images": [one.shown for one in sources]} if sources and model.image_placeholder is not None else {}


def place_sources(
    model: UnifiedModelMixin,
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Any],
    prompt_ids: Sequence[Sequence[int]],
    sources: Sequence[Sources],
    **template: Any,
) -> list[list[int]]:
    """
    Put a placeholder for each source image into the tokens of prompts: behind the system message, before the
    instruction, where BAGEL learnt to see them. Nothing is added for a model whose texts are written without.

    Args:
        messages: the prompts, with their system messages.
        template: further arguments of `apply_chat_template`.

    Raises:
        ValueError: where a prompt's tokens do not begin with its system message.
    """
    if not sources or model.image_placeholder is None:
        return [list(ids) for ids in prompt_ids]
    heads = system_ids(tokenizer, messages, **template)
    return place_images(model.image_placeholder, prompt_ids, heads, [len(one.shown) for one in sources])


def place_images(
    placeholder: int, prompt_ids: Sequence[Sequence[int]], heads: Sequence[Sequence[int]], counts: Sequence[int]
) -> list[list[int]]:
    """
    Put so many placeholders into the tokens of each prompt, behind those of its system message.

    Raises:
        ValueError: where a prompt's tokens do not begin with its system message.
    """
    placed = []
    for ids, head, count in zip(prompt_ids, heads, counts, strict=True):
        if count and list(ids[: len(head)]) != list(head):
            raise ValueError(
                "A prompt's tokens do not begin with those of its system message, behind which source images stand: "
                "the chat template folds it into the user's turn. Leave it out: system_prompt=''."
            )
        placed.append([*ids[: len(head)], *[placeholder] * count, *ids[len(head) :]])
    return placed


def with_sources(trajectories: Sequence[Trajectory], sources: Sequence[Sources]) -> list[Trajectory]:
    """Let trajectories show their source images, and be painted in the size that follows from them."""
    if not sources:
        return list(trajectories)
    pairs = zip(trajectories, sources, strict=True)
    return [replace(trajectory, images=one.shown, size=one.size) for trajectory, one in pairs]
