"""Objectives without stochastic steps: how well the velocity matches straight lines from noise to the finished image.

A line goes from the image x0 at t = 0 to noise at t = 1: x_t = (1 - t) x0 + t noise, with velocity noise - x0. The
matching loss l = mean((v(x_t, t) - (noise - x0))^2) stands for -log p(x0), so that ratios of policies come from the
image alone, whatever sampler made it.
"""

import torch
from torch import Tensor

from .ratio import latent_mean, same_float
from .schedule import shift_timesteps
from .transition import expand_left


def line_times(count: int, shift: float, generator: torch.Generator) -> Tensor:
    """`count` times in [0, 1], one in each of as many equal parts of the unshifted schedule, sorted.

    Args:
        count: K >= 1.
        shift: Shift s of t = s u / (1 + (s - 1) u).
        generator: On the CPU.

    Returns:
        (K,), float32.
    """
    u = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    return shift_timesteps(u, shift).float()


def line_state(image: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """The point x_t = (1 - t) image + t noise of each line, (*batch, *latent) for times (*batch)."""
    t = expand_left(t.to(noise), noise)
    return (1 - t) * image + t * noise


def matching_log_ratio(
    velocity: Tensor, old_velocity: Tensor, target: Tensor, num_batch_dims: int, centred: bool = True
) -> Tensor:
    """Compare with the old policy's how well a velocity matches the line's.

        log r = l_old - l = mean over latent dims of (v_old - target)^2 - (v - target)^2
        log r + mean (v - v_old)^2 = 2 mean (target - v_old) (v - v_old)                        (centred)

    coded by products with v - v_old, which keep their digits where v is close to v_old. Where the old policy matches
    the lines on average, E log r = -mean (v - v_old)^2, which does not shrink with the latent as the width, about
    2 rms(target - v_old) rms(v - v_old) / sqrt(D), does: at real sizes one side of the clip would take every gradient
    and the other none. Centred, as RatioNorm centres FlowGRPO's, both sides are alike, and the gradient at v = v_old
    is the same.
    FPO (arXiv 2507.21053) averages it over the lines of one image before it takes the ratio exp(log r); AWM
    (arXiv 2509.25050) takes the ratio of each line. Both use the same lines for both policies; neither centres.

    Args:
        velocity: (*batch, *latent) of the current policy at a point of the line; carries the gradient.
        old_velocity: Same shape, of the old policy at the same point.
        target: Same shape, the line's velocity noise - image.
        num_batch_dims: How many leading dims are batch.
        centred: Whether to add mean (v - v_old)^2.

    Returns:
        (*batch), float32 (float64 if an input is float64).

    Examples:
        >>> one = torch.ones(1, 4)
        >>> matching_log_ratio(0.5 * one, 0.0 * one, one, num_batch_dims=1, centred=False)  # 1 - 0.25
        tensor([0.7500])
        >>> matching_log_ratio(0.5 * one, 0.0 * one, one, num_batch_dims=1)
        tensor([1.])
    """
    velocity, old_velocity, target = same_float(velocity, old_velocity, target)
    moved = velocity - old_velocity
    towards = 2 * (target - old_velocity)
    return latent_mean(moved * (towards if centred else towards - moved), num_batch_dims)


def nft_loss(
    velocity: Tensor,
    old_velocity: Tensor,
    state: Tensor,
    target: Tensor,
    timesteps: Tensor,
    advantages: Tensor,
    beta: float,
    max_advantage: float = 5.0,
) -> Tensor:
    """DiffusionNFT's loss: match images of high reward, and mirror the velocity away from those of low reward.

        v+ = (1 - beta) v_old + beta v,    v- = (1 + beta) v_old - beta v,    r = 1/2 + clip(A, ±c) / (2 c)
        loss = c / beta [r ||x0+ - x0||^2 / w+  +  (1 - r) ||x0- - x0||^2 / w-]

    where x0± = x_t - t v± estimates the image x0, ||.||^2 is the mean over the latent and w± = mean |x0± - x0|,
    without gradient. Source: DiffusionNFT (arXiv 2509.16117).

    Args:
        velocity: (*batch, *latent) of the current policy; carries the gradient.
        old_velocity: Same shape, of the policy that sampled the images.
        state: Same shape, x_t.
        target: Same shape, the line's velocity; x0 = x_t - t target.
        timesteps: (*batch) t.
        advantages: Broadcastable to (*batch).
        beta: > 0, how far v+ and v- lie from v_old.
        max_advantage: c > 0.

    Returns:
        (*batch), float32 (float64 if an input is float64).

    Examples:
        >>> old, target, t = torch.zeros(1, 2), torch.ones(1, 2), torch.ones(1)
        >>> nft_loss(old, old, target, target, t, torch.tensor([5.0]), beta=1.0)  # r = 1; one off, over w+ = 1
        tensor([5.])
    """
    velocity, old_velocity, state, target = same_float(velocity, old_velocity, state, target)
    num_batch_dims = timesteps.dim()
    t = expand_left(timesteps.to(state), state)
    image = state - t * target
    share = 0.5 + advantages.clamp(-max_advantage, max_advantage) / (2 * max_advantage)

    def distance(towards: Tensor) -> Tensor:
        error = state - t * towards - image
        width = latent_mean(error.detach().abs(), num_batch_dims).clamp(min=1e-5)
        return latent_mean(error.square(), num_batch_dims) / width

    positive = distance((1 - beta) * old_velocity + beta * velocity)
    negative = distance((1 + beta) * old_velocity - beta * velocity)
    return max_advantage / beta * (share * positive + (1 - share) * negative)
