"""Scouts: a pool of cheap images of each prompt, of which the best and the worst are painted exactly and trained on.

    1. think for the whole pool, and paint it in a few steps       `_paint_first`
    2. reward these images, and choose some of each pool           `best_and_worst`
    3. paint the chosen exactly, from the same noise               the trainer's `_paint`
    4. reward them again; advantages are those within the pool     `_calculate_rewards`; TRL's
    5. go on with the chosen alone, whose advantages are centred   `_chosen`

Source: Sol-RL (arXiv 2604.06916).

Advantages within the pool have the mean 0 over the pool. Over the chosen of it they have not: where most images are
good the worst stand far below the mean, the best close above it, and training on both alone pushes away from all that
the policy paints. Measured (docs/log.md), that broke the images. So what the chosen of a pool have in common is taken
from them, and their scale stays that of the pool.

Shapes: P groups of M trajectories, of which G are trained on; N of all processes, F reward functions.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..flow import flow_timesteps
from ..flow.sampler import RolloutPlan
from ..trajectory import Trajectory
from .editing import taken
from .overlap import OverlappedRun
from .rounds import Walk
from .scoring import STANDING, Standing, group_advantages


@dataclass
class Scouts:
    """
    The pool of a generation batch, of one process.

    Attributes:
        scores: (N, F) of the scouts of all processes.
        standing: for each trajectory the scores that it keeps; None where its image is painted again.
        chosen: places of those that are trained on.
    """

    scores: Tensor
    standing: list[list[float] | None]
    chosen: list[int]


def best_and_worst(rewards: Tensor, count: int, refill: bool = True) -> list[int]:
    """
    Choose `count` trajectories for each of P pools: the best and the worst, in turns.

    A pool whose rewards are all the same teaches nothing. Its places go to others' trajectories, those with the
    largest advantages first. One without a reward is chosen only where there is no other.

    Args:
        rewards: (P, M), NaN where there is none.
        count: at most M.
        refill: whether such places are given away.

    Returns:
        P x count places in the P x M, ascending.
    """
    pools, size = rewards.shape
    known, rewards = ~rewards.isnan(), rewards.double()
    from_top = (-rewards).nan_to_num(nan=torch.inf).argsort(dim=1, stable=True).argsort(dim=1)
    from_bottom = known.sum(1, keepdim=True) - 1 - from_top
    turn = torch.minimum(2 * from_top, 2 * from_bottom + 1)
    advantages = group_advantages(rewards.flatten(), size, "group").view(pools, size).abs()
    live = known & (advantages.amax(1, keepdim=True) > 0)
    worth = (2 * (live & (turn < count)) + live + known).flatten().tolist()
    size_of = advantages.flatten().tolist()
    places = range(pools * size)
    together = [places] if refill else [places[i : i + size] for i in range(0, len(places), size)]
    ordered = [sorted(some, key=lambda i: (-worth[i], -size_of[i])) for some in together]
    return sorted(i for some in ordered for i in some[: len(some) * count // size])


def agreement(before: Tensor, after: Tensor) -> dict[str, float]:
    """Correlate rewards (n,) of scouts with those of their exact images; nothing where one is constant."""
    share = torch.corrcoef(torch.stack([before, after]))[0, 1] if len(before) > 1 else before.new_tensor(torch.nan)
    return {} if share.isnan() else {"scouts/agreement": share.item()}


def centred(advantages: Tensor, pools: Tensor, known: Tensor) -> Tensor:
    """
    Take from the advantages of each pool's chosen what they have in common.

    Args:
        advantages: (B,) of the chosen.
        pools: (B,) numbers of their pools.
        known: (B,) whether they have a reward. Advantages of others are 0, and count in no mean.
    """
    found = torch.zeros_like(advantages)
    for pool in pools.unique():
        own = known & (pools == pool)
        found[own] = advantages[own] - advantages[own].mean()
    return found


class ScoutingRun(OverlappedRun):
    """The hooks by which a pool is painted and a part of it trained on. Without scouts nothing here does anything."""

    _scouts: Scouts | None = None

    @contextmanager
    def _pool(self, inputs: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
        """Give the rows of the whole pool, whose size is then that of TRL's groups."""
        if self.mode == "eval" or self.args.scout_generations is None:
            yield inputs
            return
        size, self.num_generations = self.num_generations, self.args.scout_generations
        try:
            yield [dict(row) for row in inputs for _ in range(self.num_generations // size)]
        finally:
            self.num_generations, self._scouts = size, None

    def _plan(self, trajectories: list[Trajectory]) -> RolloutPlan:
        raise NotImplementedError

    def _paint(self, trajectories: list[Trajectory]) -> list[Any]:
        raise NotImplementedError

    def _paint_first(self, trajectories: list[Trajectory]) -> list[Any]:
        """Paint the first image of each trajectory, with scouts of all but the chosen in a few steps."""
        args, count = self.args, self.args.num_generations or 1
        if self.mode == "eval" or args.scout_generations is None:
            return self._paint(trajectories)
        plan, few = self._plan(trajectories), flow_timesteps(args.scout_num_inference_steps, args.timestep_shift)
        exact = plan.windows is None and len(few) == len(plan.timesteps)
        with self._phases("scout"):
            scouts = replace(plan, timesteps=few, windows=None)
            images = self._paint(trajectories) if exact else self._painted(trajectories, scouts)
            scores = self._score_scouts(trajectories, images)
        own = scores[self.accelerator.process_index * len(images) :][: len(images)]
        of_one_size = len({t.size for t in trajectories}) == 1  # else micro-batches are dealt by whole groups
        chosen = best_and_worst(self._book.total(own).cpu().view(-1, self.group_size), count, refill=of_one_size)
        self._scouts = Scouts(scores, [*own.tolist()], chosen)
        if exact:
            return images
        if args.scout_reward == "scouts":
            self._asked = None  # nobody is asked about what is painted now
        for i in chosen:
            trajectories[i].rounds[-1].images.clear()
            if args.scout_reward == "repainted":
                self._scouts.standing[i] = None
        for i, image in zip(chosen, self._paint([trajectories[i] for i in chosen]), strict=True):
            images[i] = image
        return images

    def _note_speed(self, images: int) -> None:
        if self._scouts is None:  # images of few steps and of all steps have no speed in common
            super()._note_speed(images)

    def _score_scouts(self, trajectories: list[Trajectory], images: list[Any]) -> Tensor:
        """Score scouts: (N, F), without failures."""
        rows = self._progress.inputs
        for row, image in zip(rows, images, strict=True):
            row["images"] = image
            if self.num_rounds > 1:
                row |= {"previous_images": [], "round_index": 0, "source_images": row.get("source_images")}
        prompts, texts = [row["prompt"] for row in rows], [t.rounds[0].text_ids for t in trajectories]
        scores = self._score(rows, prompts, self._completions(trajectories), texts)
        self._pending_extra_logs.clear()
        return scores

    def _kept_scores(self, walk: Walk, number: int) -> list[list[float] | None]:
        if number == 0 and self._scouts is not None:
            return self._scouts.standing
        return super()._kept_scores(walk, number)

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        """Score the images that were painted again; all others have the scores of their scouts."""
        if self._scouts is None or self._progress.walk is not None:  # rounds ask for `_kept_scores`
            return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        for row, scores in zip(inputs, self._scouts.standing, strict=True):
            row[STANDING] = Standing(scores, settled=True)
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        again = torch.tensor([scores is None for scores in self._scouts.standing], device=rewards.device)
        again = self.accelerator.gather(again)
        before, after = (self._book.total(scores)[again] for scores in (self._scouts.scores, rewards))
        known = ~(before + after).isnan()
        self._note(agreement(before[known], after[known]))
        return rewards

    def _goes_on(self, walk: Walk, place: int, number: int) -> bool:
        chosen = self._scouts is None or place in self._scouts.chosen
        return chosen and super()._goes_on(walk, place, number)

    def _chosen(
        self, outputs: dict[str, Any], trajectories: list[Trajectory]
    ) -> tuple[dict[str, Any], list[Trajectory]]:
        """Take what is trained on out of TRL's outputs, which are those of the whole pool."""
        if self._scouts is None:
            return outputs, trajectories
        rows = self._scouts.chosen
        outputs = {key: taken(value, rows) for key, value in outputs.items()}
        if self.num_rounds == 1:  # else `_acts` has left the others out of all advantages
            known = ~self._book.total(self._book.rewards).isnan()
            known = known[self.accelerator.process_index * len(trajectories) :][rows].cpu()
            for name in {"advantages", "text_advantages"} & {*outputs}:
                outputs[name] = centred(outputs[name], torch.tensor(rows) // self.group_size, known)
        mask = outputs["completion_mask"] * outputs.get("tool_mask", 1)
        outputs["num_items_in_batch"] = self.accelerator.gather(mask.sum()).sum()
        return outputs, [trajectories[i] for i in rows]

    def _acts(self, walk: Walk) -> tuple[Tensor, Tensor]:
        acted, painted = super()._acts(walk)
        if self._scouts is None:
            return acted, painted
        chosen = torch.zeros(len(walk.inputs), dtype=torch.bool)
        chosen[self._scouts.chosen] = True
        return acted & self.accelerator.gather(chosen.to(acted.device))[:, None], painted
