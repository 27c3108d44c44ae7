"""Rewards that failed."""

import torch
from torch import Tensor


def mask_failed_rewards(rewards: Tensor, group_size: int) -> tuple[Tensor, float]:
    """
    Mask samples whose score is incomplete, so that a failure is never read as a low score.

    A reward function may leave out a whole group, where it does not apply. If it scores some samples of a group and not
    others (None, NaN or infinity), it failed on these: all their rewards become NaN, which gives them advantage 0.

    Args:
        rewards: (B, F) of F functions, groups side by side.
        group_size: G, samples per prompt.

    Returns:
        The masked rewards and the share of samples that have none.
    """
    rewards = torch.where(torch.isfinite(rewards), rewards, torch.nan)
    missing = rewards.isnan().view(-1, group_size, rewards.shape[1])
    failed = (missing & ~missing.all(dim=1, keepdim=True)).any(dim=2).flatten()
    rewards = rewards.masked_fill(failed[:, None], torch.nan)
    return rewards, rewards.isnan().all(dim=1).float().mean().item()
