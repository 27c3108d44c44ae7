"""The gallery's images in the trackers that a run reports to, read back from what these wrote."""

import io
import os
import uuid

import numpy as np
import pytest
from PIL import Image

from tests.helpers.tiny_unified import prompts_dataset
from trl_unigrpo.monitoring.events import Watcher
from trl_unigrpo.reporting.trackers import CELL, grid


def grey(*levels, side=10):
    return [Image.new("RGB", (side, side), (level,) * 3) for level in levels]


def test_the_grid_has_its_images_in_rows():
    pixels = np.asarray(grid(grey(0, 50, 100, 150, 200), columns=3))
    assert pixels.shape == (22, 34, 3)
    for i, level in enumerate((0, 50, 100, 150, 200)):
        top, left = i // 3 * 12, i % 3 * 12
        assert (pixels[top : top + 10, left : left + 10] == level).all()
    assert (pixels[12:, 24:] == 255).all() and (pixels[10:12] == 255).all()
    assert np.asarray(grid(grey(7), columns=4)).shape == (10, 10, 3)


def test_large_images_are_scaled_down():
    wide = Image.new("RGB", (1024, 512), (9, 8, 7))
    assert grid([wide] * 2, 2).size == (2 * CELL + 2, CELL // 2)
    with pytest.raises(ValueError, match="No images"):
        grid([], 2)


class Grids(Watcher):
    """The grids that should arrive."""

    def __init__(self):
        self.trained, self.evaluated = {}, {}

    def on_generation(self, args, state, control, generation, **kwargs):
        grids = self.trained if generation.mode == "train" else self.evaluated
        grids[state.global_step] = np.asarray(grid(generation.images, 4 if generation.mode == "train" else 8))


def run(make_trainer, tracker, **arguments):
    notes = Grids()
    trainer = make_trainer(
        report_to=[tracker],
        gallery_steps=1,
        max_steps=4,
        callbacks=[notes],
        eval_dataset=prompts_dataset(copies=1),
        eval_strategy="steps",
        eval_steps=2,
        num_generations_eval=1,
        per_device_eval_batch_size=4,
        **arguments,
    )
    trainer.train()
    return notes


def test_tensorboard_has_the_images(make_trainer, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    notes = run(make_trainer, "tensorboard")
    (file,) = {path.parent for path in tmp_path.rglob("events.out.tfevents*")}
    events = EventAccumulator(str(file), size_guidance={"images": 0})
    events.Reload()
    for name, grids in (("gallery/train", notes.trained), ("gallery/eval", notes.evaluated)):
        found = {event.step: Image.open(io.BytesIO(event.encoded_image_string)) for event in events.Images(name)}
        assert list(found) == list(grids) and len(grids) == 2
        for step, image in found.items():
            assert np.array_equal(np.asarray(image), grids[step])
    assert "train/reward" in events.Tags()["scalars"]


def test_wandb_has_the_images(make_trainer, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    try:
        notes = run(make_trainer, "wandb")
    finally:
        wandb.finish()
    for name, grids in (("train", notes.trained), ("eval", notes.evaluated)):
        files = sorted(tmp_path.rglob(f"media/images/gallery/{name}_*.png"), key=os.path.getmtime)
        assert len(files) == len(grids) == 2
        for file, pixels in zip(files, grids.values(), strict=True):
            assert np.array_equal(np.asarray(Image.open(file)), pixels)


def test_trackio_has_the_images(make_trainer):
    folder = pytest.importorskip("trackio.utils").TRACKIO_DIR  # fixed when it is imported
    project = f"test-{uuid.uuid4().hex}"
    notes = run(make_trainer, "trackio", project=project)
    files = [file for file in folder.rglob("*.png") if project in str(file)]
    found = [np.asarray(Image.open(file).convert("RGB")) for file in files]
    expected = [*notes.trained.values(), *notes.evaluated.values()]
    assert len(found) == len(expected)
    for pixels in expected:
        assert any(np.array_equal(pixels, other) for other in found)
