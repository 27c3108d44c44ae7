"""Reward functions that fail, named where they raise and masked where they leave out scores, and process rewards."""

from typing import Any

import torch
from torch import Tensor, nn

from ..rewards.thinking import reward_scope
from .trl_bridge import get_callable_name, is_async_callable, nanstd


def with_name(reward_func: Any) -> Any:
    """A reward function of the same scope whose errors say which one it was; reward models stay as they are."""
    if not callable(reward_func) or isinstance(reward_func, nn.Module):
        return reward_func
    name = get_callable_name(reward_func)

    async def score_async(*args: Any, **kwargs: Any) -> Any:
        try:
            return _checked(name, await reward_func(*args, **kwargs))
        except Exception as error:
            error.add_note(f"Raised by the reward function {name!r}.")
            raise

    def score(*args: Any, **kwargs: Any) -> Any:
        try:
            return _checked(name, reward_func(*args, **kwargs))
        except Exception as error:
            error.add_note(f"Raised by the reward function {name!r}.")
            raise

    named: Any = score_async if is_async_callable(reward_func) else score
    named.__name__, named.scope = name, reward_scope(reward_func)
    return named


def _checked(name: str, scores: Any) -> list[Any]:
    if scores is None or isinstance(scores, (str, int, float)):
        raise TypeError(
            f"The reward function {name!r} returned {scores!r}, expected a list with a number, or None where it has "
            "no score, for every completion."
        )
    return list(scores)


def mask_failed_rewards(rewards: Tensor, group_size: int) -> tuple[Tensor, float]:
    """
    Mask samples whose score is incomplete, so that a failure is never read as a low score.

    A reward function may leave out a whole group, where it does not apply. If it scores some samples of a group but
    not others (None, NaN or infinity), it failed on these: all their rewards become NaN, their advantage is then 0.

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


def process_advantages(
    rewards: Tensor, weights: Tensor, group_size: int, scale_rewards: str
) -> tuple[Tensor, dict[str, float]]:
    """
    Advantages (B,) of the weighted sum of the process rewards, and metrics of it.

    Args:
        rewards: (B, F) of F process rewards, groups side by side.
        weights: (F,) of the functions among each other.
        group_size, scale_rewards: see [`group_advantages`].
    """
    rewards, failed = mask_failed_rewards(rewards, group_size)
    total = (rewards * weights.to(rewards.device)).nansum(dim=1)
    total = total.masked_fill(rewards.isnan().all(dim=1), torch.nan)
    groups = total.view(-1, group_size)
    alike = (groups == groups[:, :1]).all(dim=1)
    metrics = {
        "process/reward": total.nanmean().item(),
        "process/frac_none": failed,
        "process/frac_zero_std": alike.float().mean().item(),
    }
    return group_advantages(total, group_size, scale_rewards), metrics


def group_advantages(rewards: Tensor, group_size: int, scale_rewards: str) -> Tensor:
    """
    (r - mean of its group) / (std + 1e-4), TRL's group advantage; 0 for samples without a reward.

    Args:
        rewards: (B,), groups side by side, NaN where there is none.
        group_size: G, samples per prompt.
        scale_rewards: "group" or "batch", what the standard deviation is taken over, or "none" to leave it out.
    """
    groups = rewards.view(-1, group_size)
    advantages = groups - groups.nanmean(dim=1, keepdim=True)
    if scale_rewards == "group":
        advantages = advantages / (nanstd(groups, dim=1, keepdim=True) + 1e-4)
    elif scale_rewards == "batch":
        advantages = advantages / (nanstd(rewards) + 1e-4)
    return advantages.flatten().nan_to_num(nan=0.0)
