"""Tensors that a run keeps on the device, and a run whose device has no memory left."""

import warnings

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.helpers.painting import trajectory
from tests.helpers.tiny_unified import IMAGE_SIZE, images_of, spy_paint, tiny_bagel
from trl_unigrpo.flow import flow_timesteps
from trl_unigrpo.flow.sampler import RolloutPlan
from trl_unigrpo.flow.states import LinePoints, columns
from trl_unigrpo.models.bagel import BagelForUnifiedGeneration
from trl_unigrpo.sampling import decode, paint
from trl_unigrpo.trainers.kept import KeptVelocities
from trl_unigrpo.trajectory import Image, Round, Steps, Trajectory


class OnAccelerator(Tensor):
    """Stands for a tensor on an accelerator: what is made of it is there too, until it is brought to the CPU."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        out = super().__torch_function__(function, types, args, kwargs or {})
        to_cpu = function is Tensor.to and str(args[1]) == "cpu"
        return out.as_subclass(Tensor) if to_cpu or function is Tensor.cpu else out


def accelerated(images):
    for image in images:
        image.latents = image.latents.as_subclass(OnAccelerator)
        parts = {name: x.as_subclass(OnAccelerator) for name, x in columns(image.steps).items() if x.ndim > 1}
        image.steps = type(image.steps)(**{**columns(image.steps), **parts})
    return images


def test_records_of_a_rollout_wait_on_the_cpu(make_trainer, train, monkeypatch):
    calls = spy_paint(monkeypatch, change=accelerated)
    seen = train(make_trainer(max_steps=1))
    (painted,) = [images for *_, images in calls]
    assert all(type(image.latents) is OnAccelerator for image in painted)
    images = images_of(seen.batches)
    assert len(images) == len(painted) == 8
    for image in images:
        assert {type(x) for x in (image.latents, *columns(image.steps).values())} == {Tensor}


def test_velocities_wait_on_the_cpu():
    latents = torch.zeros(3, 2)
    x = torch.arange(12.0).view(2, 3, 2)
    image = Image(latents, (8, 8), None, LinePoints(x=x, t=torch.tensor([0.9, 0.4]), target=-x), seed=(1,))
    steps, kept = Steps.of([Trajectory("", [], 0, [Round([], [image])])]), KeptVelocities()
    kept.keep("old", steps, (2 * x).as_subclass(OnAccelerator))
    assert [type(velocity) for rows in kept.state().values() for _, velocity in rows] == [Tensor]
    assert torch.equal(kept.at("old", steps), 2 * x)


# Memory that runs out


class Small(BagelForUnifiedGeneration):
    """A model on a device that holds `holds` images at once, in some part of the work."""

    holds, part, failures = 3, "velocity", 0

    def _need(self, part, number):
        if part == self.part and number > self.holds:
            self.failures += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def encode_context(self, contexts):
        self._need("context", len(contexts))
        return super().encode_context(contexts)

    def predict_velocity(self, context, latents, timesteps, image_size):
        if timesteps[0] < 0.9:  # when noise has been drawn
            self._need("velocity", len(latents))
        return super().predict_velocity(context, latents, timesteps, image_size)

    def decode_latents(self, latents, *args, **kwargs):
        self._need("image", len(latents))
        return super().decode_latents(latents, *args, **kwargs)


def small_model(**changes):
    model = tiny_bagel()
    model.__class__ = Small
    for name, value in changes.items():
        setattr(model, name, value)
    return model


SIZE = (IMAGE_SIZE, IMAGE_SIZE)
TRAJECTORIES = [trajectory([1, 8 + i % 2], [9, 10, 2]) for i in range(7)]


def painted(model, batch_size=None):
    """Seven images, two noisy steps each, and what their generators draw next."""
    generators = [torch.Generator().manual_seed(i) for i in range(7)]
    plan = RolloutPlan(flow_timesteps(5), SIZE, windows=torch.tensor([0, 1]), batch_size=batch_size)
    images = paint(model, TRAJECTORIES, plan, generators)
    return images, torch.stack([torch.randn(2, generator=generator) for generator in generators])


@pytest.mark.parametrize("part", ["context", "velocity"])
def test_images_are_those_of_the_batch_that_the_memory_holds(part):
    model = small_model(part=part, holds=1)
    with pytest.warns(UserWarning, match=r"The memory ran out .* from here on 1 at once. Set image_batch_size=1"):
        images, drawn = painted(model)
    expected, drawn_there = painted(tiny_bagel(), batch_size=1)
    assert model.failures == 2  # 7, 3
    assert torch.equal(drawn, drawn_there)
    for image, other in zip(images, expected, strict=True):
        assert torch.equal(image.latents, other.latents)
        for name, x in columns(image.steps).items():
            assert torch.equal(x, getattr(other.steps, name)), name
        assert torch.equal(image.context.ids, other.context.ids)


def test_images_are_decoded_in_batches_that_the_memory_holds():
    images, _ = painted(tiny_bagel())
    model = small_model(part="image")
    with pytest.warns(UserWarning, match="from here on 3 at once"):
        shown = decode(model, images)
    expected = decode(tiny_bagel(), images, at_once=3)
    assert all(np.array_equal(*pair) for pair in zip(shown, expected, strict=True))


def test_what_the_memory_holds_is_remembered_for_the_run_and_said_once(make_trainer, train):
    model = small_model()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        seen = train(make_trainer(model=model, max_steps=3))  # two generations
    assert model.failures == 2  # 8, 4
    assert sum("from here on 2 at once" in str(one.message) for one in caught) == 1
    same = train(make_trainer(max_steps=3, image_batch_size=2))
    for image, other in zip(images_of(seen.batches), images_of(same.batches), strict=True):
        assert torch.equal(image.latents, other.latents)


def test_remedy_where_not_even_one_image_fits():
    model = small_model(holds=0)
    remedy = r"Tried to allocate 2.00 GiB\.\n.*expandable_segments:True.*gradient_checkpointing.*nf4"
    with pytest.raises(torch.OutOfMemoryError, match=remedy):
        painted(model)
    assert model.failures == 3  # 7, 3, 1


def test_other_errors_are_not_tried_again(monkeypatch):
    calls = []

    def broken(*args, **kwargs):
        calls.append(1)
        raise RuntimeError("shapes differ")

    model = tiny_bagel()
    monkeypatch.setattr(model, "predict_velocity", broken)
    with pytest.raises(RuntimeError, match="shapes differ$"):
        painted(model)
    assert len(calls) == 1
