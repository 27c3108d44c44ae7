"""The events of a run for those who watch it, beside those of `transformers.TrainerCallback`."""

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


@dataclass(frozen=True)
class Generation:
    """
    One generation batch of all processes: N samples, the G of one prompt side by side.

    Attributes:
        mode: "train" or "eval".
        group_size: G.
        prompts: N, as the dataset has them: texts or conversations.
        thinking: N texts.
        images: N.
        rewards: function -> N numbers, NaN where it has none.
        weights: function that judges images -> what it counts in the reward; one of weight 0 is a held-out score.
        advantages: N, of the image's rewards.
        extra: column -> N values that reward functions logged, such as a judge's answers.
    """

    mode: str
    group_size: int
    prompts: Sequence[Any]
    thinking: Sequence[str]
    images: Sequence[Image.Image]
    rewards: Mapping[str, Sequence[float]]
    weights: Mapping[str, float]
    advantages: Sequence[float]
    extra: Mapping[str, Sequence[Any]]

    @cached_property
    def reward(self) -> NDArray[np.float64]:
        """(N,) the weighted sum of the image's rewards that the advantages come from, NaN where there is none."""
        rewards = np.array([self.rewards[name] for name in self.weights], dtype=np.float64)
        total = np.nansum(rewards * np.array([*self.weights.values()])[:, None], axis=0)
        return np.where(np.isnan(rewards).all(axis=0), np.nan, total)


@dataclass(frozen=True)
class Update:
    """
    The gradients of one optimizer step, before it is taken.

    Attributes:
        grad_norm: expert ("text", "image") -> norm before clipping.
        metrics: of the image's objective, such as "flow/velocity_mse" -> mean over what the step accumulated.
    """

    grad_norm: Mapping[str, float]
    metrics: Mapping[str, float]


class Watcher(TrainerCallback):
    """
    A callback with two more events. Both are called in all processes, with the same values in each, so that what a
    watcher asks of `control` is asked in all.
    """

    def on_generation(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        generation: Generation,
        metrics: MutableMapping[str, list[float]],
        **kwargs: Any,
    ) -> None:
        """
        Take note that images have been painted and rewarded; nothing has been trained on them yet.

        Args:
            metrics: name -> values that the next log averages. A watcher may add some, the same in all processes.
        """

    def on_update(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, update: Update, **kwargs: Any
    ) -> None:
        """Take note that gradients are complete and clipped; the optimizer's step comes next."""
