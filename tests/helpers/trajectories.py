"""Trajectories and tables of steps, without a trainer around them."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from trl_unigrpo.flow.states import States
from trl_unigrpo.trajectory import Image, Round, Steps, Trajectory


def trajectory(prompt_ids: Sequence[int], text_ids: Sequence[int] = (), prompt: Any = "", **more: Any) -> Trajectory:
    """One round without its image; an empty text is none."""
    return Trajectory(prompt, list(prompt_ids), rounds=[Round(list(text_ids))], **more)


def image_at(context: Any, x: Tensor, t: Tensor, size: tuple[int, int]) -> Image:
    """An image whose velocities are asked for at states (K, *latent) and times (K,)."""
    return Image(latents=x.new_zeros(x.shape[1:]), size=size, context=context, steps=States(x, t))


def steps_of(images: Sequence[Image]) -> Steps:
    """The table of images of a trajectory each."""
    return Steps.of([Trajectory("", [], row, [Round([], [image])]) for row, image in enumerate(images)])


def steps_at(contexts: Sequence[Any], x: Tensor, t: Tensor, size: tuple[int, int]) -> Steps:
    """The table of an image of each context, at states (B, K, *latent) and times (B, K)."""
    return steps_of([image_at(*row, size) for row in zip(contexts, x, t, strict=True)])
