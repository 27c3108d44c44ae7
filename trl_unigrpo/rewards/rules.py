"""Rewards that need no model: the form and length of the thinking, sharpness and file size of the image."""

from collections.abc import Callable, Sequence
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image
from trl.rewards import think_format_reward

from .common import Scores, check_images, to_rgb


def think_format(completions: Sequence[Any], **kwargs: Any) -> list[float]:
    """
    Return 1 where a completion begins with one `<think>...</think>`, else 0: TRL's rule, for plain texts as well.
    """
    messages = [[{"content": text}] if isinstance(text, str) else text for text in completions]
    return list(think_format_reward(messages, **kwargs))


def length_score(length: float, low: float, high: float, margin: float) -> float:
    """Return 1 for a length within [low, high], 0 from `margin` beyond them on, linear between."""
    beyond = max(low - length, length - high, 0)
    return max(0.0, 1 - beyond / margin) if margin > 0 else float(beyond == 0)


def thinking_length(low: int, high: int, margin: int = 0) -> Callable[..., list[float]]:
    """
    Make a reward for thinkings of `low` to `high` tokens: [`length_score`] of each completion's tokens.

    Args:
        low, high, margin: in tokens, the end token included. Beyond them the reward falls to 0 over `margin`.

    Raises:
        ValueError: unless 0 <= low <= high and 0 <= margin.
    """
    if not 0 <= low <= high or margin < 0:
        raise ValueError(f"low={low}, high={high}, margin={margin}: expected 0 <= low <= high and 0 <= margin.")

    def thinking_length(completion_ids: Sequence[Sequence[int]], **kwargs: Any) -> list[float]:
        return [length_score(len(ids), low, high, margin) for ids in completion_ids]

    return thinking_length


def laplacian_variance(image: Image.Image) -> float | None:
    """
    Compute the variance of the Laplacian of the brightness (0 to 255), over the pixels with four neighbours: large
    where edges are sharp, and for noise. `None` for an image without such pixels.
    """
    gray = np.asarray(to_rgb(image).convert("L"), dtype=np.float64)
    if min(gray.shape) < 3:
        return None
    neighbours = gray[:-2, 1:-1] + gray[2:, 1:-1] + gray[1:-1, :-2] + gray[1:-1, 2:]
    return float((neighbours - 4 * gray[1:-1, 1:-1]).var())


def sharpness(prompts: Sequence[Any], images: Sequence[Image.Image] = (), **kwargs: Any) -> Scores:
    """Return the [`laplacian_variance`] of each image."""
    check_images(images, len(prompts))
    return [laplacian_variance(image) for image in images]


def jpeg_kilobytes(image: Image.Image, quality: int = 95) -> float:
    """Measure the size of an image as JPEG, in 1000 bytes."""
    file = BytesIO()
    to_rgb(image).save(file, format="JPEG", quality=quality)
    return file.tell() / 1000


def jpeg_size(prompts: Sequence[Any], images: Sequence[Image.Image] = (), **kwargs: Any) -> Scores:
    """
    Return the [`jpeg_kilobytes`] of each image: incompressibility (arXiv 2305.13301); weigh it with -1 for
    compressibility.
    """
    check_images(images, len(prompts))
    return [jpeg_kilobytes(image) for image in images]
