"""The events of a run for those who watch it, beside those of `transformers.TrainerCallback`."""

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers import GenerationConfig, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..flow import Transition
from ..flow.states import SDESteps
from ..trajectory import Trajectory
from .image_statistics import ImageStatistics


MadeOf = Callable[[Image.Image], Image.Image]


def unchanged(image: Image.Image) -> Image.Image:
    """Give the image itself."""
    return image


@dataclass(frozen=True)
class RoundNote:
    """
    One round of a sample, as it went.

    Attributes:
        text: that was sampled.
        reward: of the image that stands after it; None where it has none.
        before: the same of the image that it began with.
        advantage: of the round's text and image.
        kept: whether it kept the image that it began with.
        change: how far its own image is from that one, see [`image_distance`]; None where it has none, or began with
            none.
        origin: place of the sample whose image it began with, where that is another one's.
        asked: the user's turn that the round answers, in a story.
    """

    text: str
    reward: float | None
    before: float | None
    advantage: float
    kept: bool = False
    change: float | None = None
    origin: int | None = None
    asked: str = ""


@dataclass(frozen=True)
class Series:
    """
    The images of one sample.

    Attributes:
        sources: that it edits.
        painted: in each round; None where one was kept.
        begun: that each round began with, where it is another sample's; else None.
    """

    sources: Sequence[Image.Image] = ()
    painted: Sequence[Image.Image | None] = ()
    begun: Sequence[Image.Image | None] = ()

    def made(self, made: MadeOf) -> "Series":
        """Give the same of what is made of each image."""

        def each(images: Sequence[Image.Image | None]) -> list[Any]:
            return [None if image is None else made(image) for image in images]

        return Series(each(self.sources), each(self.painted), each(self.begun))


@dataclass(frozen=True)
class Generation:
    """
    One generation batch of all processes: N samples, the G of one prompt side by side.

    Attributes:
        mode: "train" or "eval".
        group_size: G.
        prompts: N, as the dataset has them: texts or conversations.
        thinking: N texts.
        images: of this process' samples, which stand side by side.
        statistics: N, of the images of all processes.
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
    statistics: Sequence[ImageStatistics]
    rewards: Mapping[str, Sequence[float]]
    weights: Mapping[str, float]
    advantages: Sequence[float]
    extra: Mapping[str, Sequence[Any]]
    first: int = 0
    """Place of this process' first sample among the N."""
    rounds: Sequence[Sequence[RoundNote]] = ()
    """N, of each sample; none where all samples are one image of a text."""
    series: Sequence[Series] = ()
    """Of this process' samples, where there are `rounds`."""

    def fetch(self, places: Sequence[int], made: MadeOf = unchanged) -> dict[int, Image.Image]:
        """
        Bring the images at some places to the first process: place -> image; nothing in the others.

        All processes must call it, with the same places.

        Args:
            made: of each image before it travels: a full one is 3 MB at 1024 pixels.
        """
        return self._fetch({place: made(self.images[place - self.first]) for place in places if self.holds(place)})

    def fetch_series(self, places: Sequence[int], made: MadeOf = unchanged) -> dict[int, Series]:
        """Bring all that some samples painted and edit, as [`fetch`] does; nothing where there are no `rounds`."""
        if not self.rounds:
            return {}
        held = {place: self.series[place - self.first] for place in places if self.holds(place)}
        return self._fetch({place: one.made(made) for place, one in held.items()})

    def _fetch(self, own: dict[int, Any]) -> dict[int, Any]:
        if not (dist.is_available() and dist.is_initialized()):
            return own
        parts: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(own, parts)
        return {place: one for part in parts or [] for place, one in part.items()}

    def first_of(self, count: int | None) -> "Generation":
        """Give the first samples of this batch alone; all for None."""
        if count is None or count >= len(self.prompts):
            return self
        own = max(0, min(len(self.images), count - self.first))
        return replace(
            self,
            prompts=self.prompts[:count],
            thinking=self.thinking[:count],
            images=self.images[:own],
            statistics=self.statistics[:count],
            rewards={name: values[:count] for name, values in self.rewards.items()},
            advantages=self.advantages[:count],
            extra={name: values[:count] for name, values in self.extra.items()},
            rounds=self.rounds[:count],
            series=self.series[:own],
        )

    def holds(self, place: int) -> bool:
        """Say whether this process has the image at a place."""
        return self.first <= place < self.first + len(self.images)

    @cached_property
    def reward(self) -> NDArray[np.float64]:
        """
        (N,) the weighted sum of the image's rewards that the advantages come from, NaN where there is none: a held-out
        score alone, of weight 0, makes no reward of 0.
        """
        counted = {name: weight for name, weight in self.weights.items() if weight} or self.weights
        rewards = np.array([self.rewards[name] for name in counted], dtype=np.float64)
        total = np.nansum(rewards * np.array([*counted.values()])[:, None], axis=0)
        return np.where(np.isnan(rewards).all(axis=0), np.nan, total)


@dataclass(frozen=True)
class Rollout:
    """
    The images that one process has painted for training, before they are rewarded.

    Attributes:
        trajectories: B of them, with their images.
        group_size: G, of one prompt side by side.
        transition: of the update, states -> Gaussians; None where steps are not noisy.
        windows: (P, K) times of the noisy steps of each process, where all images of a generation must have one
            window; else None.
    """

    trajectories: Sequence[Trajectory]
    group_size: int
    transition: Callable[[SDESteps], Transition] | None
    windows: Tensor | None


@dataclass(frozen=True)
class ImageLoss:
    """
    One micro-batch's loss of the image expert, before it is back-propagated.

    Attributes:
        velocity: (S, *latent) of the current weights, without gradient.
        states: where it was predicted.
        first_pass: whether these weights are those that the images were sampled with.
        objective: what it is trained on.
        regularizer: scalar with its gradient; None without one.
        reference: (S, *latent) of the reference model; None without a regulariser.
        rounds: (S,) numbers of the states' rounds, or one for all.
    """

    velocity: Tensor
    states: Any
    first_pass: bool
    objective: Any
    regularizer: Tensor | None
    reference: Tensor | None = None
    rounds: Tensor | int = 0


@dataclass(frozen=True)
class Update:
    """
    The gradients of one optimizer step, before it is taken.

    Attributes:
        grad_norm: expert ("text", "image") -> norm before clipping.
        metrics: of the image's objective, such as "flow/velocity_mse" -> mean over what the step accumulated.
        text_kl: of the micro-batches since the last log; none without a text KL.
    """

    grad_norm: Mapping[str, float]
    metrics: Mapping[str, float]
    text_kl: Sequence[float] = ()


class Watcher(TrainerCallback):
    """
    A callback with more events, in the order of a step. What a watcher asks of `control` must be asked in all
    processes: `on_generation` and `on_update` are called with the same values in each.
    """

    def on_ready(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """The trainer is made, and its weights are as they will be trained."""

    def on_rollout_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        generation_config: GenerationConfig | None,
        **kwargs: Any,
    ) -> None:
        """Thinkings are about to be sampled: as the configuration says, or (None) by vLLM."""

    def on_rollout(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, rollout: Rollout, **kwargs: Any
    ) -> None:
        """Images of a training's generation batch have been painted."""

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

    def on_image_loss(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        image_loss: ImageLoss,
        **kwargs: Any,
    ) -> None:
        """Velocities of the current weights have met those of the old ones."""

    def on_update(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, update: Update, **kwargs: Any
    ) -> None:
        """Take note that gradients are complete and clipped; the optimizer's step comes next."""
