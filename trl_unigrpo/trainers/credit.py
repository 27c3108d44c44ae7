"""Which reward pays for which round of a trajectory, for its thinking and for its image, and what is subtracted.

The actions of round m are its text and its image. They may be paid for the images from m on, and the reward of the
image before, r_(m-1), may be subtracted: it was there before they were, so that this changes the variance and not what
is learnt. An improvement r_m - r_(m-1) paid to rounds before m would teach to paint bad first images.

Shapes: N trajectories of all processes, groups of G side by side; R rounds, of which the last R' begin with an image:
all but the first, or all in an edit, which begins with its source. Rewards are those of the image that stands after
each round, the last one's again where a trajectory has ended; NaN where the image has none.
"""

import torch
from torch import Tensor

from .scoring import group_advantages


KEPT = 0.9
"""Share of the former slope that a new one leaves in the running mean."""


def returns(rewards: Tensor, painted: Tensor, paid: str, cost: float = 0.0, counted: Tensor | None = None) -> Tensor:
    """
    Give what each round's actions led to, (N, R).

    Args:
        rewards: (N, R).
        painted: (N, R) whether the round painted an image.
        paid: "final", the last image; "own", the round's; "sum", all from the round's on.
        cost: of each image after the first that a round's actions led to.
        counted: (N, R) whether a round counts in a sum, as those behind a story's last turn don't; None for all.
    """
    net = rewards - cost * painted
    if paid == "own":
        return net
    if paid == "sum":
        net = net if counted is None else net.where(counted, 0.0)
        return net.flip(1).cumsum(1).flip(1)
    later = painted.sum(1, keepdim=True) - torch.arange(1, rewards.shape[1] + 1, device=rewards.device)
    return rewards[:, -1:] - cost * later


def before(stood: Tensor, group_size: int) -> Tensor:
    """
    Give the reward of the image before each round that begins with one, (N, R'): the group's mean where it is not
    known, which subtracts nothing.

    Args:
        stood: (N, R') of these images, NaN where one has none.
    """
    groups = stood.unflatten(0, (-1, group_size))
    return torch.where(groups.isnan(), groups.nanmean(1, keepdim=True).nan_to_num(), groups).flatten(0, 1)


def slope(led_to: Tensor, earlier: Tensor, group_size: int) -> float | None:
    """
    Regress what rounds led to on the reward of the image before, within groups: the factor between 0 and 1 that leaves
    the least variance. None where there is nothing to regress.

    Args:
        led_to: (N, R) as [`returns`] gives it, NaN where the round has no action.
        earlier: (N, R') as [`before`] gives it.
    """
    y = led_to[:, led_to.shape[1] - earlier.shape[1] :]
    # In float64 the mean of equal numbers is that number: a group that began with one image varies by nothing.
    y, x = (part.cpu().double().unflatten(0, (-1, group_size)) for part in (y, earlier))
    known = ~y.isnan()
    y, x = (part - part.where(known, torch.nan).nanmean(1, keepdim=True) for part in (y, x))
    variance = (x[known] ** 2).sum().item()
    return min(max((x[known] * y[known]).sum().item() / variance, 0.0), 1.0) if variance > 0 else None


def running(former: float | None, new: float | None) -> float | None:
    """Go on with a running mean of slopes, which begins with the first."""
    if former is None or new is None:
        return former if new is None else new
    return KEPT * former + (1 - KEPT) * new


def improvements(led_to: Tensor, earlier: Tensor, rule: str, group_size: int) -> Tensor:
    """
    Take from rounds that begin with an image what is no improvement on it.

    Args:
        led_to: (N, R) as [`returns`] gives it.
        earlier: (N, R') as [`before`] gives it.
        rule: "clamp", nothing was gained (AlphaGRPO's code); "min", the least of the group was (its paper).
    """
    first = led_to.shape[1] - earlier.shape[1]
    gain = (led_to[:, first:] - earlier).unflatten(0, (-1, group_size))
    if rule == "clamp":
        none = torch.zeros_like(gain)
    else:
        none = gain.where(~gain.isnan(), torch.inf).amin(1, keepdim=True).expand_as(gain)
    gain = torch.where(gain <= 0, none, gain).flatten(0, 1)
    return torch.cat([led_to[:, :first], gain], 1)


def round_advantages(
    led_to: Tensor, earlier: Tensor, baseline: float, rule: str, group_size: int, scale_rewards: str
) -> Tensor:
    """
    Compute the advantages (N, R) of each round's actions, within the trajectories of its group that have some.

    Args:
        led_to: (N, R) as [`returns`] gives it, NaN where a round has no action or no reward: its advantage is 0.
        earlier: (N, R') as [`before`] gives it.
        baseline: factor of what is subtracted; without meaning where `rule` is one of [`improvements`].
        rule: "none", or one of those.
        group_size, scale_rewards: see [`~trl_unigrpo.trainers.scoring.group_advantages`].
    """
    if rule == "none":
        first = led_to.shape[1] - earlier.shape[1]
        worth = torch.cat([led_to[:, :first], led_to[:, first:] - baseline * earlier], 1)
    else:
        worth = improvements(led_to, earlier, rule, group_size)
    return torch.stack([group_advantages(part, group_size, scale_rewards) for part in worth.unbind(1)], 1)


def alike(rewards: Tensor, group_size: int) -> Tensor:
    """
    Mark the samples (N,) of groups whose rewards are all the same, failures left out: their advantages are 0. In
    float32 the mean of equal numbers is not always that number, and TRL divides what is left by 1e-4.

    Args:
        rewards: (N, F) of F functions, groups side by side, NaN where there is none.
    """
    groups = rewards.unflatten(0, (-1, group_size))
    low, high = (groups.where(~groups.isnan(), end) for end in (torch.inf, -torch.inf))
    return (high.amax(1) <= low.amin(1)).all(-1).repeat_interleave(group_size)


def two_levels(advantages: Tensor, known: Tensor, images_per_thinking: int) -> tuple[Tensor, Tensor]:
    """
    Split advantages A into a thinking's and an image's, each with the baseline of its own level:

        A_text = mean of A over the K images of the thinking,    A_image = A - A_text

    With A = (r - mean of the group) / s these are (mean of the thinking - mean of the group) / s and
    (r - mean of the thinking) / s. What the painter's noise does to the reward is averaged out of the first, and what
    the thinking does to it is gone from the second. Neither baseline knows more of an action than its own share of a
    mean, so both gradients keep their direction: they are (1 - K / G) and (1 - 1 / K) times the true ones, as GRPO's
    is (1 - 1 / G) times. Source: two-level baselines (docs/trainer.md).

    Args:
        advantages: (B,) with the group's baseline, thinkings of K side by side.
        known: (B,) whether a sample has a reward; one without is in no mean, and its image has advantage 0.

    Returns:
        the thinkings' (B,), K times each and 0 where none of its images has a reward, and the images' (B,).
    """
    values, known = (x.unflatten(0, (-1, images_per_thinking)) for x in (advantages, known))
    means = (values.where(known, 0.0).sum(1) / known.sum(1).clamp(min=1))[:, None].expand_as(values)
    same = alike(values.where(known, torch.nan).flatten()[:, None], images_per_thinking).view_as(values)
    return means.flatten(), (values - means).where(known & ~same, 0.0).flatten()


def spreads(rewards: Tensor, images_per_thinking: int, group_size: int) -> dict[str, float]:
    """
    Measure how far rewards (N,) spread: among the images of a thinking, and the thinkings of a group beyond what their
    images explain (one-way analysis of variance: the variance of K-means is that between plus that within over K).
    """
    groups = rewards.unflatten(0, (-1, group_size // images_per_thinking, images_per_thinking))
    within, means = groups.var(-1), groups.mean(-1)
    within = within[~within.isnan()].mean()
    between = means.var(-1) if means.shape[-1] > 1 else means[:0, 0]
    between = between[~between.isnan()].mean() - within / images_per_thinking
    found = {"within": within, "between": between}
    return {f"thinking/reward_std_{name}": x.clamp(min=0).sqrt().item() for name, x in found.items() if not x.isnan()}


def choose_image(rewards: Tensor, how: str, generator: torch.Generator, perfect: float, keep_perfect: float) -> int:
    """
    Choose the image that all of a group go on from.

    Args:
        rewards: (G,) of its images, NaN where there is none; if all are, the first is chosen.
        how: "worst"; "softmax", at random by softmax(-reward); "spread", the farthest from the mean;
            "random".
        perfect: the reward from which on an image is perfect.
        keep_perfect: probability of a perfect image, if there is one. Else one is chosen among the others.
    """
    rewards = rewards.double().cpu()
    known = (~rewards.isnan()).nonzero().flatten()
    best = known[rewards[known] >= perfect]
    if not len(known):
        return 0
    lucky = torch.rand(1, generator=generator, dtype=torch.float64).item() < keep_perfect
    if len(best) and (lucky or len(best) == len(known)):
        return int(best[torch.randint(len(best), (1,), generator=generator)])
    rest = known[rewards[known] < perfect]
    if how == "random":
        return int(rest[torch.randint(len(rest), (1,), generator=generator)])
    if how == "softmax":
        return int(rest[torch.multinomial((-rewards[rest]).softmax(0), 1, generator=generator)])
    if how == "spread":
        return int(rest[(rewards[rest] - rewards[known].mean()).abs().argmax()])
    return int(rest[rewards[rest].argmin()])
