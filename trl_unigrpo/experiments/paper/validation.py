"""Validation during a run: what a person without a rule sees of it, and by which the point to stop at is chosen."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from .numbers import digits


VALIDATION_POINTS = 7
"""Points at which a run of usual length is validated, evenly spaced, besides its start."""
VALIDATION_PROMPTS = 210

PointScores = dict[str, float]
"""`learned`, by which is chosen, and `rule` and `image_error`, for the figure alone."""


def validation_steps(max_steps: int, rollouts: int, points: int) -> list[int]:
    """
    Spread points evenly over a run, its start and its end among them, each after a whole rollout.

    Args:
        max_steps: optimizer steps, the same number for each rollout.
        rollouts: batches of trajectories.
        points: at most so many besides the start.
    """
    points = min(points, rollouts)
    return [max_steps // rollouts * round(rollouts * point / points) for point in range(points + 1)]


class Validation(TrainerCallback):
    """
    A callback that scores the model at some steps, writes a line of JSON for each, and goes back to the best one.

    The best point is the one with the highest learned reward; of equal ones, the first. No other score is looked at.

    Attributes:
        chosen: the line of the point whose weights the model has at the end.
        cpu_seconds: what the validation took so far.

    Args:
        score: the model's scores on validation prompts.
        steps: after which optimizer steps.
        images_per_step: that a run sees, for the lines' "rollouts".
        restores: whether the model gets the weights of its best point at the end.
    """

    def __init__(
        self,
        file: Path,
        model: torch.nn.Module,
        score: Callable[[], PointScores],
        steps: list[int],
        images_per_step: float,
        restores: bool = True,
    ):
        self.file, self.model, self.score = file, model, score
        self.steps, self.images_per_step, self.restores = frozenset(steps), images_per_step, restores
        self.chosen: dict[str, float] = {}
        self.cpu_seconds = 0.0
        self._weights: dict[str, torch.Tensor] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.file.write_text("", encoding="utf-8")
        self._validate(0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in self.steps:
            self._validate(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.restores:
            self.model.load_state_dict(self._weights)
            self._weights = {}

    def _validate(self, step: int) -> None:
        started = time.process_time()
        with undisturbed(self.model):
            scores = self.score()
        line = {"rollouts": round(step * self.images_per_step), **{name: digits(of) for name, of in scores.items()}}
        with self.file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(line) + "\n")
        if not self.restores:
            self.chosen = line  # the last one is the end
        elif not self.chosen or line["learned"] > self.chosen["learned"]:
            self.chosen, self._weights = line, copy.deepcopy(self.model.state_dict())
        self.cpu_seconds += time.process_time() - started


@contextmanager
def undisturbed(model: torch.nn.Module) -> Iterator[None]:
    """Leave the random numbers and the mode of a model's training as they were, whatever is done with it inside."""
    training = {module: module.training for module in model.modules()}
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            for module, mode in training.items():
                module.training = mode
