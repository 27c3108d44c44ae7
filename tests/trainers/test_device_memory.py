"""What a run keeps on the device, and what it does when that has no memory left."""

import torch
from torch import Tensor

from tests.helpers.tiny_unified import images_of, spy_paint
from trl_unigrpo.flow.states import LinePoints, columns
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
