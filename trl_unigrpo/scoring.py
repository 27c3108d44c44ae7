"""Reward functions that fail: named where they raise, masked where they leave out scores."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from trl.trainer.utils import get_callable_name, is_async_callable


def with_name(reward_func: Any) -> Any:
    """A reward function whose errors say which one it was; reward models are returned as they are."""
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

    named: Callable[..., Any] = score_async if is_async_callable(reward_func) else score
    named.__name__ = name
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
