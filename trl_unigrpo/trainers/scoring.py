"""Rewards of a generation batch: failures named where they raise and masked where they leave out scores, and process
rewards apart from those of the image."""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..rewards.thinking import reward_scope
from .early_scores import EarlyScores, scores_early
from .failed_images import without_failed
from .reward_checks import distinct
from .trl_bridge import get_callable_name, is_async_callable, nanstd


STANDING = "standing"
"""Name under which a sample's [`Standing`] reaches the wrapper of a reward function."""


@dataclass(frozen=True)
class Standing:
    """
    The state of a sample before its round is scored; reward functions don't see it.

    Attributes:
        scores: (F,) of its image, where that was scored in a round before; None where it is a new one.
        optional: whether only functions that ask for every round are called.
        settled: whether a score that is missing among these is not asked for again.
    """

    scores: Sequence[float] | None = None
    optional: bool = False
    settled: bool = False

    def known(self, number: int) -> bool:
        """Say whether a function, by its number, is not to be asked."""
        return self.scores is not None and (self.settled or not math.isnan(self.scores[number]))


def with_names(reward_funcs: Sequence[Any]) -> list[Any]:
    """Give each reward function a name of its own, which its errors say; reward models stay as they are."""
    given = [*map(get_callable_name, reward_funcs)]
    names = distinct(given)
    return [
        _with_name(function, name, number, suffix=name.removeprefix(given[number]))
        if callable(function) and not isinstance(function, nn.Module)
        else function
        for number, (function, name) in enumerate(zip(reward_funcs, names, strict=True))
    ]


def asks_every_round(function: Any) -> bool:
    """Say whether a reward function is to see the image of every round: whether its `every_round` is True."""
    while isinstance(function, partial) and not hasattr(function, "every_round"):
        function = function.func
    return bool(getattr(function, "every_round", False))


def _with_name(reward_func: Any, name: str, number: int, suffix: str) -> Any:
    """
    Wrap a reward function, of the same scope, so that its errors name it, it sees only what is to be scored, and the
    columns that it logs are its own: `suffix` tells them from those of a function of the same name.
    """
    every_round = asks_every_round(reward_func)
    early = EarlyScores(reward_func, partial(_checked, name)) if scores_early(reward_func) else None

    def prepared(arguments: dict[str, Any]) -> tuple[dict[str, Any], list[int] | None, list[Any]]:
        standing = arguments.pop(STANDING, [])
        scores: list[Any] = [None if one.scores is None else one.scores[number] for one in standing]
        known = [place for place, one in enumerate(standing) if one.known(number)]
        given, places = without_failed(arguments, known)
        if standing and standing[0].optional and not every_round:
            places = []
        if "log_extra" in given:
            given["log_extra"] = _whole_columns(given["log_extra"], suffix, places, len(arguments["prompts"]))
        return given, places, scores or [None] * len(arguments["prompts"])

    async def score_async(**kwargs: Any) -> Any:
        with _naming(name):
            given, places, known = prepared(kwargs)
            asked = reward_func if early is None else early.collect
            scores = [] if places == [] else await asked(**given)
            return _spread(_checked(name, scores), places, known)

    def score(**kwargs: Any) -> Any:
        with _naming(name):
            given, places, known = prepared(kwargs)
            scores = [] if places == [] else reward_func(**given)
            return _spread(_checked(name, scores), places, known)

    named: Any = score_async if early is not None or is_async_callable(reward_func) else score
    named.__name__, named.scope, named.every_round = name, reward_scope(reward_func), every_round
    named.early = early
    return named


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Note in whatever is raised which reward function it was."""
    try:
        yield
    except Exception as error:
        error.add_note(f"Raised by the reward function {name!r}.")
        raise


def _checked(name: str, scores: Any) -> list[Any]:
    if scores is None or isinstance(scores, (str, int, float)):
        raise TypeError(
            f"The reward function {name!r} returned {scores!r}, expected a list with a number, or None where it has "
            "no score, for every completion."
        )
    return list(scores)


def _whole_columns(
    log_extra: Callable[[str, list[Any]], None], suffix: str, places: list[int] | None, count: int
) -> Callable[[str, list[Any]], None]:
    """Log columns with a row for each sample, None for those that the function did not see."""

    def log(column: str, values: list[Any]) -> None:
        seen = places is not None and len(values) == len(places)
        log_extra(f"{column}{suffix}", _spread(values, places if seen else None, [None] * count))

    return log


def _spread(scores: list[Any], places: list[int] | None, known: list[Any]) -> list[Any]:
    """Put the scores of some samples at their places among those that are known; without places they are all."""
    if places is None:
        return scores
    for place, score in zip(places, scores, strict=True):
        known[place] = score
    return known


class RewardBook:
    """
    The scores of a generation batch: which of them count for the image, which for the thinking alone, and what
    watchers see of them.

    A reward function's scope is "both", its score counts in the advantage that text and image share, or "text", a
    process reward, which TRL calls and logs like any other but which counts in the text's advantage alone.

    Args:
        reward_funcs: F functions.
        weights: (F,) as the user gave them.
    """

    def __init__(self, reward_funcs: Sequence[Any], weights: Tensor):
        self.is_process = torch.tensor([reward_scope(function) == "text" for function in reward_funcs])
        self.weights = weights
        self.process_advantages = torch.empty(0)
        self.rewards = torch.empty(0)
        self.metrics: dict[str, float] = {}
        self.rows: list[dict[str, Any]] = []

    @property
    def image_weights(self) -> Tensor:
        """(F,) what each function counts in the advantage that TRL computes."""
        return self.weights.masked_fill(self.is_process, 0.0)

    def total(self, scores: Tensor) -> Tensor:
        """(N,) weighted sums of scores (N, F), which the image's advantages come from; NaN where there is none."""
        total = (scores * self.image_weights.to(scores.device)).nansum(1)
        return total.masked_fill(scores.isnan().all(1), torch.nan)

    def enter(self, rewards: Tensor, group_size: int, scale_rewards: str, real: int | None = None) -> Tensor:
        """
        Mask failures and take the process rewards out of a generation batch of all processes, and note its metrics.

        Args:
            rewards: (N, F) as TRL gathered them, groups side by side.
            group_size: G, samples per prompt.
            scale_rewards: see [`group_advantages`].
            real: how many rows count, by default all; others repeat rows, and have no reward.

        Returns:
            The rewards as TRL goes on with them.
        """
        real = len(rewards) if real is None else real
        rewards[real:] = torch.nan
        of_images, failed = mask_failed_rewards(rewards[:, ~self.is_process], group_size, real)
        metrics = {"reward/frac_none": failed}
        if self.is_process.any():
            weights = self.weights[self.is_process]
            found = process_advantages(rewards[:real, self.is_process], weights, group_size, scale_rewards)
            advantages, of_process = found
            self.process_advantages = torch.cat([advantages, advantages.new_zeros(len(rewards) - real)])
            metrics = {**of_process, **metrics}
            # To TRL a sample without a score of its image has none.
            rewards = torch.where(rewards.isfinite(), rewards, torch.nan)
            rewards = rewards.masked_fill(of_images.isnan().all(dim=1, keepdim=True), torch.nan)
        rewards[:, ~self.is_process] = of_images
        if failed:
            warnings.warn(
                "Some samples have no score (None, NaN or infinity, from at least one reward function): they don't "
                "count. The metric `reward/frac_none` has their share."
            )
        self.rewards, self.metrics = rewards, metrics
        return rewards

    def remember(
        self, prompts: Sequence[Any], completions: Sequence[Any], logged: Mapping[str, Sequence[Any]]
    ) -> None:
        """Keep what was scored in this process; `logged` are columns that reward functions logged."""
        whole = {name: values for name, values in logged.items() if len(values) == len(prompts)}
        extra = [dict(zip(whole, values, strict=True)) for values in zip(*whole.values(), strict=True)]
        rows = zip(prompts, completions, extra or [{}] * len(prompts), strict=True)
        names = ("prompt", "thinking", "extra")
        self.rows = [dict(zip(names, row, strict=True)) for row in rows]


def mask_failed_rewards(rewards: Tensor, group_size: int, real: int | None = None) -> tuple[Tensor, float]:
    """
    Mask samples whose score is incomplete, so that a failure is never read as a low score.

    A reward function may leave out a whole group, where it does not apply. If it scores some samples of a group but
    not others (None, NaN or infinity), it failed on these: all their rewards become NaN, their advantage is then 0.

    Args:
        rewards: (B, F) of F functions, groups side by side.
        group_size: G, samples per prompt.
        real: how many of the rows count, by default all.

    Returns:
        The masked rewards and the share of samples that have none.
    """
    rewards = torch.where(torch.isfinite(rewards), rewards, torch.nan)
    missing = rewards.isnan().view(-1, group_size, rewards.shape[1])
    failed = (missing & ~missing.all(dim=1, keepdim=True)).any(dim=2).flatten()
    rewards = rewards.masked_fill(failed[:, None], torch.nan)
    return rewards, rewards[:real].isnan().all(dim=1).float().mean().item()


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
    Compute advantages of process rewards by TRL's formula, (r - mean of its group) / (std + 1e-4); 0 for samples that
    have none. Those of the image's reward, eq. (1), are TRL's own.

    Args:
        rewards: (B,), groups side by side, NaN where there is none.
        group_size: G, samples per prompt.
        scale_rewards: "group" or "batch", what the standard deviation is taken over, or "none" to leave it out.
    """
    groups = rewards.view(-1, group_size)
    same = (groups == groups.nan_to_num(nan=-torch.inf).amax(dim=1, keepdim=True)) | groups.isnan()
    advantages = groups - groups.nanmean(dim=1, keepdim=True)
    advantages = advantages.masked_fill(same.all(dim=1, keepdim=True), 0.0)  # where the mean is only nearly the number
    if scale_rewards == "group":
        advantages = advantages / (nanstd(groups, dim=1, keepdim=True) + 1e-4)
    elif scale_rewards == "batch":
        advantages = advantages / (nanstd(rewards) + 1e-4)
    return advantages.flatten().nan_to_num(nan=0.0)
