"""Which denoising steps of a generation batch are stochastic."""

import torch
from torch import Tensor

from ..flow import sde_window
from ..seeding import WINDOW
from .unigrpo_config import UniGRPOConfig


def draw_windows(args: UniGRPOConfig, generation: int, process: int, count: int) -> Tensor:
    """
    Draw step indices (K,) of the batch's window or (count, K) of each image's, by `args.sde_window_scope`.

    Args:
        generation: number of the generation batch, which the draw depends on beside the seed.
        process: index of the process, which has `count` images.
    """
    low, high = args.sde_window_range
    key = (args.seed, WINDOW, generation)

    def draw(*part: int) -> list[int]:
        return list(sde_window((low, high), args.sde_window_size, args.sde_window_mode, (*key, *part)))

    if args.sde_window_scope == "generation":
        return torch.tensor(draw())
    if args.sde_window_scope == "rank":
        return torch.tensor(draw(process))
    span = (args.num_generations or 1) if args.sde_window_scope == "group" else 1
    return torch.tensor([draw(row // span) for row in range(process * count, (process + 1) * count)])
