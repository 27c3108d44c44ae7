"""The images of a logged generation as a table beside TRL's own of the completions."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
