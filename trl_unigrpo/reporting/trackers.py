"""The gallery's images in TensorBoard, wandb and trackio, for those that a run reports to."""

import importlib
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from PIL import Image
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback


CELL = 128  # pixels of an image in the grid, at most
GAP = 2


def grid(images: Sequence[Image.Image], columns: int) -> Image.Image:
    """Lay the images out in rows of `columns`, scaled down to `CELL` pixels where they are larger."""
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


def log_image(
    name: str,
    draw: Callable[[], Image.Image],
    step: int,
    report_to: Iterable[str],
    callbacks: Iterable[TrainerCallback] = (),
) -> None:
    """
    Send an image to the trackers that are running.

    Args:
        name: such as "gallery/train".
        draw: makes the image; not called where no tracker runs.
        report_to: of the configuration.
        callbacks: of the trainer, of which TensorBoard's has the writer.
    """
    writers = [callback.tb_writer for callback in callbacks if isinstance(callback, TensorBoardCallback)]
    writers = [writer for writer in writers if writer is not None]
    modules = {tracker: importlib.import_module(tracker) for tracker in ("wandb", "trackio") if tracker in report_to}
    if "wandb" in modules and modules["wandb"].run is None:
        del modules["wandb"]
    if not writers and not modules:
        return
    image = draw()
    for writer in writers:
        writer.add_image(name, np.asarray(image), step, dataformats="HWC")
    for module in modules.values():
        module.log({name: module.Image(image), "train/global_step": step})
