"""Averages of the trained weights in a run: one that paints and is the old policy, one that is evaluated and saved.

The old policy of an objective on lines is the one that painted the images. In DiffusionNFT (arXiv 2509.16117, and its
code) that is an average of the trained weights: it samples, gives the old velocities, and after the passes over each
batch becomes decay * old + (1 - decay) * trained, with a decay of min(step / 1000, .5), or up to .999 for one reward.
AWM's code (arXiv 2509.25050) has the same average, with min(step / 1000, .3): where a run is `off_policy` it samples,
and else the velocities are tied to it. Both evaluate a second average, of each step's weights.
"""

import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from ..models.averages import WeightAverage, copy_weights
from ..models.contract import UnifiedModelMixin
from ..models.reference import trained_weights
from ..models.sharding import gathered, sliced
from .averages_config import AveragesConfig
from .sharded import ShardedRun
from .training_loop import TrainingLoop
from .vllm_thinking import EngineRun


FILE = "averages.pt"
"""In a checkpoint: the averages and, as the model's own files hold an average, the trained weights."""


class Averages(TrainerCallback):
    """
    The averages of a run, each of them None where it is off.

    Attributes:
        old: of the image expert's weights, the old policy of its objective.
        ema: of all trained weights, what is evaluated and saved.
    """

    def __init__(self, base: UnifiedModelMixin, args: AveragesConfig):
        self._base, self._args, self._step = base, args, 0
        self.old = None if args.image_old_policy_decay is None else WeightAverage(base, base.is_image_parameter)
        self.ema = None if args.ema_decay is None else WeightAverage(base)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        decay, step = self._args.ema_decay, state.global_step
        if self.ema is not None and decay is not None:
            self.ema.update(min(decay, (1 + step) / (10 + step)))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.finish()

    def begin_generation(self, step: int) -> None:
        """Move the old policy towards the trained one, if that has made optimizer steps since."""
        decay, warmup = self._args.image_old_policy_decay, self._args.image_old_policy_warmup_steps
        if self.old is not None and decay is not None and step > self._step:
            self._step = step
            self.old.update(decay * min(1.0, step / warmup) if warmup else decay)

    def finish(self) -> None:
        """Make the average the model's weights for good, where there is one, and let go of both."""
        if self.ema is not None:
            copy_weights(trained_weights(self._base), self.ema.weights)
        self.old = self.ema = None

    @property
    def _of(self) -> dict[str, WeightAverage]:
        """The averages that are on, by name."""
        return {name: average for name in ("old", "ema") if (average := getattr(self, name)) is not None}

    def state(self) -> dict[str, Any]:
        """Give what a checkpoint keeps; nothing where no average is on."""
        weights = {name: average.weights for name, average in self._of.items()}
        if self.ema is not None:
            weights["trained"] = trained_weights(self._base)
        return {name: gathered(self._base, of) for name, of in weights.items()}

    def restore(self, state: Mapping[str, Any], checkpoint: str) -> None:
        """Take over what [`state`] gave. An average that the checkpoint lacks starts from its weights."""
        own = trained_weights(self._base)
        state = {name: sliced(self._base, weights) for name, weights in state.items()}
        copy_weights(own, state.get("trained", own))
        for name, average in self._of.items():
            if name not in state:
                option = {"old": "image_old_policy_decay", "ema": "ema_decay"}[name]
                warnings.warn(f"{checkpoint} holds no average for {option}: it starts from the weights there.")
            average.restore(state.get(name, {key: own[key] for key in average.weights}))


class AveragedRun(TrainingLoop, EngineRun, ShardedRun):
    """The hooks of `GRPOTrainer` that put averaged weights where they belong."""

    args: Any
    _averages: Averages | None = None  # of the training in progress

    def _old_policy(self) -> AbstractContextManager[None]:
        """Make the image expert that of the old policy, where this is an average; in evaluation it is not."""
        if self._averages is None or self._averages.old is None or not self.model.training:
            return nullcontext()
        return self._averages.old.in_place()

    def _saved_weights(self) -> AbstractContextManager[None]:
        """Make the model the one that is evaluated and saved."""
        if self._averages is None or self._averages.ema is None:
            return nullcontext()
        return self._averages.ema.in_place()

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._begin_averages()
        return super().train(*args, **kwargs)

    def _begin_averages(self) -> None:
        if self._averages is not None:
            self.remove_callback(self._averages)
        self._averages = Averages(self.unified, self.args)
        self.callback_handler.callbacks.insert(0, self._averages)  # others are to find the averages as they are now

    def _keep_slices(self) -> None:
        super()._keep_slices()
        self._begin_averages()

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if self._averages is not None and self.model.training:
            self._averages.begin_generation(self.state.global_step)
        return super()._generate_and_score_completions(inputs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        with self._saved_weights():
            return super().evaluation_loop(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        with self._saved_weights():
            super().save_model(output_dir, _internal_call)

    def _add_to_checkpoint(self, folder: Path) -> None:
        super()._add_to_checkpoint(folder)
        state = {} if self._averages is None else self._averages.state()
        if state and self.args.should_save and not self.args.save_only_model:
            torch.save(state, folder / FILE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self._averages is not None:
            file, state = Path(checkpoint) / FILE, {}
            if file.is_file():
                state = torch.load(file, map_location="cpu", weights_only=True)
            self._averages.restore(state, checkpoint)

    def _load_best_model(self) -> None:
        if self._averages is not None:
            self._averages.finish()  # the best checkpoint holds an average of its own
        super()._load_best_model()
