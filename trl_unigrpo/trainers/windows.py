"""Plans of rollouts: which of the denoising steps are stochastic, and sizes of groups."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..flow import flow_timesteps, sde_window
from ..flow.guidance import Guidance
from ..flow.per_round import of_round
from ..flow.sampler import RolloutPlan
from ..image_sizes import Size
from ..seeding import SIZE, WINDOW, row_generator
from .unigrpo_config import UniGRPOConfig


def draw_windows(
    args: UniGRPOConfig, generation: int, process: int, rows: Sequence[int], round_index: int = 0
) -> Tensor:
    """
    Draw step indices (K,) of the batch's window or (len(rows), K) of each image's, by `args.sde_window_scope`.

    Args:
        generation: number of the generation batch, which the draw depends on beside the seed.
        process: index of the process that has the images.
        rows: places of their trajectories in the generation batch.
        round_index: number of their round, from 0; each has a draw of its own.
    """
    (low, high), size = (of_round(args, name, round_index) for name in ("sde_window_range", "sde_window_size"))
    key, later = (args.seed, WINDOW, generation), (round_index,) if round_index else ()

    def draw(*part: int) -> list[int]:
        return list(sde_window((low, high), size, args.sde_window_mode, (*key, *part, *later)))

    if args.sde_window_scope == "generation":
        return torch.tensor(draw())
    if args.sde_window_scope == "rank":
        return torch.tensor(draw(process))
    span = args.pool_size if args.sde_window_scope == "group" else 1
    return torch.tensor([draw(row // span) for row in rows])


def draw_size(args: UniGRPOConfig, training: bool, generation: int, group: int) -> Size:
    """
    Draw the size (height, width) of the images of one group, all sizes of the configuration alike.

    Args:
        generation: number of the generation batch; 0 in evaluation, which so has the same sizes each time.
        group: place of the group in the generation batch, or in the evaluation.
    """
    sizes = args.sizes(training)
    generator = row_generator(args.seed, SIZE, generation, group)
    return sizes[int(torch.randint(len(sizes), (), generator=generator))]


def guidance_of(args: UniGRPOConfig, training: bool) -> Guidance | None:
    """Give the guidance of training or of evaluation; None for none."""
    scale = args.guidance_scale if training else args.eval_guidance_scale
    return Guidance(scale) if scale > 1 else None


def rollout_plan(args: UniGRPOConfig, training: bool, windows: Tensor | None, round_index: int = 0) -> RolloutPlan:
    """Plan how images of a round are sampled, in training or in evaluation; without windows by the ODE."""
    steps = of_round(args, "num_inference_steps", round_index) if training else args.eval_num_inference_steps
    return RolloutPlan(
        timesteps=flow_timesteps(steps, args.timestep_shift),
        image_size=args.sizes(training)[0],  # of several, trajectories have their own
        windows=windows,
        sde_type=args.sde_type,
        noise_level=of_round(args, "noise_level", round_index),
        batch_size=args.image_batch_size,
        guidance=guidance_of(args, training),
    )
