"""Painting without a trainer: trajectories, and tables of steps."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from trl_unigrpo.flow.states import States
from trl_unigrpo.sampling import paint
from trl_unigrpo.trajectory import Image, Round, Steps, Trajectory


def trajectory(prompt_ids: Sequence[int], text_ids: Sequence[int] = (), prompt: Any = "", **more: Any) -> Trajectory:
    """One round without its image; an empty text is none."""
    return Trajectory(prompt, list(prompt_ids), rounds=[Round(list(text_ids))], **more)


def prompts_alone(prompts):
    """Trajectories of prompts without a thinking."""
    return [Trajectory(prompt, [], row, [Round()]) for row, prompt in enumerate(prompts)]


def painted_steps(model, trajectories, plan, generators) -> Steps:
    """The table of the steps that images were painted with."""
    for trajectory, image in zip(trajectories, paint(model, trajectories, plan, generators), strict=True):
        trajectory.rounds[-1].images.append(image)
    return Steps.of(trajectories)


def image_at(context: Any, x: Tensor, t: Tensor, size: tuple[int, int]) -> Image:
    """An image whose velocities are asked for at states (K, *latent) and times (K,)."""
    return Image(latents=x.new_zeros(x.shape[1:]), size=size, context=context, steps=States(x, t))


def steps_of(images: Sequence[Image]) -> Steps:
    """The table of images of a trajectory each."""
    return Steps.of([Trajectory("", [], row, [Round([], [image])]) for row, image in enumerate(images)])


def steps_at(contexts: Sequence[Any], x: Tensor, t: Tensor, size: tuple[int, int]) -> Steps:
    """The table of an image of each context, at states (B, K, *latent) and times (B, K)."""
    return steps_of([image_at(*row, size) for row in zip(contexts, x, t, strict=True)])
