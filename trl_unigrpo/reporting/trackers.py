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
    """Lay the images out in rows of `columns`, scaled down to `CELL` pixels where they are larger; shapes stay."""
    if not images:
        raise ValueError("No images: a grid needs at least one.")
    cells = [_cell(image) for image in images]
    width, height = (max(cell.size[side] for cell in cells) for side in range(2))
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    whole = Image.new("RGB", (columns * (width + GAP) - GAP, rows * (height + GAP) - GAP), "white")
    for i, cell in enumerate(cells):
        left, top = i % columns * (width + GAP), i // columns * (height + GAP)
        whole.paste(cell, (left + (width - cell.width) // 2, top + (height - cell.height) // 2))
    return whole


def _cell(image: Image.Image) -> Image.Image:
    scale = CELL / max(image.size)
    if scale >= 1:
        return image.convert("RGB")
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image.convert("RGB").resize((width, height), Image.Resampling.BOX)


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
