"""The gallery's pictures in TensorBoard, wandb and trackio, for those that a run reports to."""

import importlib
import math
from collections.abc import Iterable, Sequence
from typing import Any

from PIL import Image
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback


CELL = 160  # pixels of a picture in the grid, at most
GAP = 2


def grid(images: Sequence[Image.Image], columns: int) -> Image.Image:
    """The images in rows of `columns`, scaled down to `CELL` pixels where they are larger."""
    if not images:
        raise ValueError("No images: a grid needs at least one.")
    width, height = images[0].size
    scale = min(1.0, CELL / max(width, height))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    whole = Image.new("RGB", (columns * (size[0] + GAP) - GAP, rows * (size[1] + GAP) - GAP), "white")
    for i, image in enumerate(images):
        cell = image.convert("RGB")
        if cell.size != size:
            cell = cell.resize(size, Image.Resampling.BOX)
        whole.paste(cell, (i % columns * (size[0] + GAP), i // columns * (size[1] + GAP)))
    return whole


def log_picture(
    name: str, picture: Image.Image, step: int, report_to: Iterable[str], callbacks: Iterable[TrainerCallback] = ()
) -> None:
    """
    Send a picture to the trackers that are running.

    Args:
        name: such as "gallery/train".
        report_to: of the configuration.
        callbacks: of the trainer, of which TensorBoard's has the writer.
    """
    for callback in callbacks:
        writer = getattr(callback, "tb_writer", None)
        if isinstance(callback, TensorBoardCallback) and writer is not None:
            writer.add_image(name, _pixels(picture), step, dataformats="HWC")
    for tracker in ("wandb", "trackio"):
        if tracker in report_to:
            module = importlib.import_module(tracker)
            if tracker == "trackio" or module.run is not None:
                module.log({name: module.Image(picture), "train/global_step": step})


def _pixels(picture: Image.Image) -> Any:
    import numpy as np

    return np.asarray(picture)
