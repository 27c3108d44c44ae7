"""Generated images on disk and in the metrics."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, disable_progress_bars, enable_progress_bars
from datasets import Image as ImageFeature
from PIL import Image


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
