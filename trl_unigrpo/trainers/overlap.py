"""Rewards that are asked about finished images while others are painted: a slow judge costs the longer of the two."""

import time
from collections.abc import Sequence
from typing import Any

from PIL.Image import Image
from torch import Tensor

from ..trajectory import Trajectory
from .early_scores import AskedPart, EarlyScores, seconds_of
from .rounds import RoundsTrainer
from .trl_bridge import completions_of


class OverlappedRun(RoundsTrainer):
    """
    A run that asks the reward functions that allow it about each chunk of images as soon as that is painted.

    Without such functions nothing here does anything, nor with several rounds, whose scores depend on one another.
    """

    async_loop: Any
    _asked: dict[str, Any] | None = None

    @property
    def _early(self) -> list[EarlyScores]:
        found = (getattr(function, "early", None) for function in self.reward_funcs)
        return [early for early in found if early is not None]

    def _generate(self, prompts: list[Any]) -> Any:
        outputs = super()._generate(prompts)
        if self._early and self.num_rounds == 1:
            rows, known = self._progress.inputs, ("prompt", "completion", "completion_ids")
            columns = {name: [row[name] for row in rows] for name in rows[0] if name not in known}
            texts = {"prompts": prompts, "completions": completions_of(outputs), "completion_ids": outputs[1]}
            self._asked = {**columns, **texts}
        return outputs

    def _score_early(self, trajectories: Sequence[Trajectory], images: Sequence[Image]) -> None:
        """Begin to score the images of some trajectories, while others are painted."""
        if self._asked is None:
            return
        of_row = {t.row: place for place, t in enumerate(self._progress.trajectories)}
        places = [of_row[t.row] for t in trajectories]
        given = {name: [values[i] for i in places] for name, values in self._asked.items()}
        given |= {"images": list(images), "trainer_state": self.state}
        for early in self._early:
            early.begin(self.async_loop, places, given)

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        parts: list[AskedPart] = [part for early in self._early for part in early.parts]
        if parts:
            self._note({"time/reward_ahead": seconds_of(parts, time.perf_counter())})
        return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        try:
            return super()._generate_and_score_completions(inputs)
        finally:  # after an error nobody asks for these scores
            self._asked = None
            for early in self._early:
                early.cancel()
