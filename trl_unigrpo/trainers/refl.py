"""The maths of ReFL, as functions of tensors: which steps, which loss, and the reward's gradient.

Shapes: B images of H x W pixels, N denoising steps.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


Reward = Callable[..., Tensor]
"""reward(pixels (B, 3, H, W) in [0, 1], prompts, **columns) -> (B,), differentiable in the pixels."""


def late_step_range(num_inference_steps: int, late_steps: float) -> tuple[int, int]:
    """
    The steps [low, high) of which one gets the gradient: {ceil((1 - late_steps) N), .., N - 1}.

    Raises:
        ValueError: for a share outside of (0, 1], or one that holds no step.
    """
    if not 0 < late_steps <= 1:
        raise ValueError(f"late_steps={late_steps}: expected a share of the denoising steps, above 0 and at most 1.")
    # Rounded, or 0.7 of 10 steps would be 6: (1 - 0.7) * 10 is 3.0000000000000004.
    low = math.ceil(round((1 - late_steps) * num_inference_steps, 9))
    if low == num_inference_steps:
        raise ValueError(
            f"late_steps={late_steps} of num_inference_steps={num_inference_steps} holds no step: raise it to "
            f"{1 / num_inference_steps:.3g} or more."
        )
    return low, num_inference_steps


def image_losses(rewards: Tensor, loss: str = "hinge", margin: float = 2.0, scale: float = 1e-3) -> Tensor:
    """
    Compute each image's part of the loss, (B,): scale relu(margin - r), or ("linear") -scale r.

    Below the margin the two have the same gradient.
    """
    return scale * ((margin - rewards).relu() if loss == "hinge" else -rewards)


def reward_gradient(
    reward: Callable[[Tensor], Tensor], pixels: Tensor, losses_of: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """
    Rewards of images, the mean loss over those that have one, and its gradient to the pixels.

    An image without a finite reward, or without a finite gradient of it, does not count: not as 0, not in the mean.
    The backward pass ends at the pixels, so that what the reward kept for it is freed before the model's begins.

    Args:
        reward: (B, 3, H, W) in [0, 1] -> (B,).
        pixels: (B, 3, H, W), about in [-1, 1].
        losses_of: rewards (B,) -> losses (B,).

    Returns:
        Rewards (B,), NaN where they do not count; the loss, NaN if none counts; the gradient (B, 3, H, W).

    Raises:
        ValueError: if the rewards have no gradient to the pixels, or pixels are not finite numbers: the model's
            backward pass would make NaN of them, whatever gradient it is given.
    """
    failed = int((~pixels.isfinite().flatten(1).all(1)).sum())
    if failed:
        raise ValueError(
            f"{failed} of {len(pixels)} images came out of the VAE as NaN or infinity, and so would the gradients of "
            "all weights. Mostly it overflows in half precision: give it bfloat16 or float32. If it has, lower "
            "learning_rate."
        )
    pixels = pixels.detach().requires_grad_()
    rewards = reward(to_unit(pixels))
    counts, gradient = rewards.isfinite(), None
    losses = losses_of(rewards)
    if rewards.requires_grad:
        (gradient,) = torch.autograd.grad(losses[counts].sum(), pixels, allow_unused=True)
    if gradient is None:
        raise ValueError(
            "The reward has no gradient to the pixels, and ReFL follows nothing else. It must be made of "
            "differentiable operations of torch on the pixels that it is given: no PIL, no numpy, no detach(), no "
            "no_grad(). For other rewards use UniGRPOTrainer."
        )
    counts &= gradient.isfinite().flatten(1).all(1)
    loss = losses[counts].mean()
    gradient = gradient.where(counts[:, None, None, None], 0.0) / counts.sum().clamp(min=1)
    return rewards.detach().where(counts, torch.nan), loss.detach(), gradient


def to_unit(pixels: Tensor) -> Tensor:
    """
    Pixels in about [-1, 1] as pixels in [0, 1].

    Clamped, as they are when an image is finished: a pixel beyond black or white can't change it, and gets no
    gradient.
    """
    return ((pixels + 1) / 2).clamp(0, 1)


def as_reward(reward: Any) -> Reward:
    """
    The function behind a reward: its method `differentiable(pixels, prompts)` if it has one, else itself, called as
    reward(pixels, prompts, **columns).

    Raises:
        TypeError: for what is neither, and for a `differentiable` that takes something else than prompts.
    """
    method = getattr(reward, "differentiable", None)
    if method is None:
        if not callable(reward):
            raise TypeError(
                f"reward is a {type(reward).__name__}, expected a function (pixels, prompts, **columns) -> (B,), or "
                "an object with a method differentiable(pixels, prompts) -> (B,)."
            )
        return reward
    if "prompts" not in inspect.signature(method).parameters:
        raise TypeError(
            f"{type(reward).__name__}.differentiable takes {', '.join(inspect.signature(method).parameters)}, not "
            "prompts. Pass a function that makes them of the prompts, such as lambda pixels, prompts, **_: "
            "judge.differentiable(pixels, [f'Does it show {prompt}?' for prompt in prompts])."
        )
    return lambda pixels, prompts, **columns: method(pixels, prompts=prompts)


def check_rewards(rewards: Any, pixels: Tensor) -> Tensor:
    """The rewards of images, with their dtype and device; TypeError if they are not a tensor (B,)."""
    if not isinstance(rewards, Tensor) or rewards.shape != pixels.shape[:1]:
        found = f"a tensor of shape {tuple(rewards.shape)}" if isinstance(rewards, Tensor) else type(rewards).__name__
        raise TypeError(f"The reward returned {found}, expected a tensor of shape ({len(pixels)},): one per image.")
    return rewards.to(pixels)
