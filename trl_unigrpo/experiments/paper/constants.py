"""Settings that are computed from the configuration and the demos, as functions that runs call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any


def of_settings(maker: str, *names: str) -> Mapping[str, Callable[[], Any]]:
    """Take settings of these names over from one of `shapeworld.settings`' functions."""

    return {name: partial(_setting, maker, name) for name in names}


def _setting(maker: str, name: str) -> Any:
    from ...shapeworld import settings

    return getattr(settings, maker)()[name]


def times(factor: float, name: str) -> Callable[[], float]:
    """
    Multiply the configuration's own value, which the trainer carries to the size of latents and the length of steps.

    So does it with the product, so that the resolved value is multiplied by the factor, too.
    """
    return lambda: factor * getattr(_configuration(), name)


def matched_kl_weight() -> float:
    """
    Find the weight at which the latent KL is as large as the velocity MSE for the same change of velocity.

    The KL of a step is w_t |v - v_ref|^2 with w_t of that step alone. The weight of the velocity MSE is divided by the
    mean of w_t over the steps of all windows that may be drawn. Both are carried to size and steps by the same factor.
    """
    import torch

    from ...flow import flow_timesteps, latent_kl, transition
    from ...flow.per_round import PER_ROUND, of_round
    from ...flow.schedule import window_steps

    args = _configuration()
    number, size, window, noise_level = (of_round(args, name, 0) for name in PER_ROUND)
    steps = torch.tensor(window_steps(window, size, args.sde_window_mode))
    grid = flow_timesteps(number, args.timestep_shift)
    coefficients = transition(args.sde_type, grid[steps], grid[steps + 1], noise_level, grid[1])
    ones = torch.ones(len(steps), 1, dtype=torch.float64)
    return args.flow_regularizer_weight / latent_kl(ones, 0 * ones, coefficients, num_batch_dims=1).mean().item()


def _configuration() -> Any:
    from ...shapeworld.settings import demo_settings
    from ...trainers.unigrpo_config import UniGRPOConfig

    return UniGRPOConfig(output_dir="", **demo_settings())
