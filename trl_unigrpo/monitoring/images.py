"""Generated images on disk and in the metrics."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, disable_progress_bars, enable_progress_bars
from datasets import Image as ImageFeature
from PIL import Image

from .image_statistics import thumbnail


def write_completion_images(
    output_dir: str | Path,
    step: int,
    columns: dict[str, list[Any]],
    images: Sequence[Image.Image],
) -> None:
    """Write `completions/images_STEP.parquet`: the columns, and beside them `image`, which `datasets` reads back."""
    folder = Path(output_dir) / "completions"
    folder.mkdir(parents=True, exist_ok=True)
    dataset = Dataset.from_dict({**columns, "image": list(images)}).cast_column("image", ImageFeature())
    disable_progress_bars()  # one per logging step would bury the training's own
    dataset.to_parquet(folder / f"images_{step:05d}.parquet")
    enable_progress_bars()


def pixel_spread(images: Sequence[Image.Image]) -> float:
    """Mean over images of the standard deviation of their pixels, in [0, 255]: near 0 where images turn blank."""
    return float(np.mean([np.asarray(image, dtype=np.float32).std() for image in images]))


MOST_PAIRED = 96  # images that the diversity looks at


def diversity(images: Sequence[Image.Image], group_size: int) -> float:
    """
    How much the images of one prompt differ: the mean over pairs of a group of the root mean squared difference of
    their 8 x 8 thumbnails, in [0, 1]. Of the first groups up to 96 images; NaN for groups of one.
    """
    groups = max(1, min(len(images), MOST_PAIRED) // group_size)
    thumbnails_ND = np.stack([thumbnail(image) for image in images[: groups * group_size]])
    vectors_PGD = thumbnails_ND.reshape(-1, group_size, thumbnails_ND.shape[1])
    first, second = np.triu_indices(group_size, 1)
    if not len(first):
        return float("nan")
    return float(np.sqrt(((vectors_PGD[:, first] - vectors_PGD[:, second]) ** 2).mean(2)).mean())
