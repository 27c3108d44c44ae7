"""What a run tells those who watch it, beside the events of `transformers.TrainerCallback`."""

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

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
        advantages: N, of the image's rewards.
        extra: column -> N values that reward functions logged, such as a judge's answers.
        reward: N, the weighted sum of the image's rewards that the advantages come from, NaN where there is none.
        weights: function that judges images -> what it counts in the reward; one of weight 0 is a held-out score.
    """

    mode: str
    group_size: int
    prompts: Sequence[Any]
    thinking: Sequence[str]
    images: Sequence[Image.Image]
    rewards: Mapping[str, Sequence[float]]
    advantages: Sequence[float]
    extra: Mapping[str, Sequence[Any]]
    reward: Sequence[float] = ()
    weights: Mapping[str, float] = field(default_factory=dict)


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
        Images have been painted and rewarded; nothing has been trained on them yet.

        Args:
            metrics: name -> values that the next log averages. A watcher may add some, the same in all processes.
        """

    def on_update(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, update: Update, **kwargs: Any
    ) -> None:
        """Gradients are complete and clipped; the optimizer's step comes next."""
