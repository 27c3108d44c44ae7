"""Rewards that fail, that say nothing, or that rise while another score falls."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from .alarm import MOST_INDICES, Alarm
from .evaluations import Evaluations
from .events import Generation
from .image_statistics import FloatArray
from .memory import revive
from .shift import BEYOND_CHANCE, Change, Shift


FAILED, FAILED_GENERATIONS = 0.1, 3
"""A tenth of the samples without a score, in three generations in a row: not a hiccup of a server."""
FLAT, FLAT_GENERATIONS = 0.8, 5
"""Four fifths of the groups of the last five generations without a signal: a fifth of the work trains."""
ERRORS = 4.0
"""Standard errors by which rewards rise, and held-out scores fall; both at once."""
RISEN = 2.0
"""Standard errors that are a rise at all."""
STALLED = 100
"""Generations after which a reward should have risen: the public curves of unified models had by then."""


@dataclass
class RewardWatch:
    """
    The memory between two generations; all of it can be written as JSON.

    Attributes:
        failures: share of samples without a score, in the last generations.
        flat: (groups without a signal, groups), in the last generations.
        train: score -> group means at the start and now, in training.
        best: group means of the reward where it was highest, and now.
        generations: how many there were.
        evaluations: scores of the first evaluation, and of the one in progress.
        evaluated: score -> its change in the last evaluation.
    """

    failures: list[float] = field(default_factory=list)
    flat: list[list[int]] = field(default_factory=list)
    train: dict[str, Shift] = field(default_factory=dict)
    best: Shift = field(default_factory=Shift)
    generations: int = 0
    evaluations: Evaluations = field(default_factory=Evaluations)
    evaluated: dict[str, Change] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.train = {name: revive(Shift, shift) for name, shift in self.train.items()}
        self.evaluated = {name: revive(Change, change) for name, change in self.evaluated.items()}
        self.best, self.evaluations = revive(Shift, self.best), revive(Evaluations, self.evaluations)

    def look(self, generation: Generation) -> list[Alarm]:
        """Look at a training generation."""
        scores = _scores(generation)
        self.generations += 1
        for name, values in scores.items():
            groups = values.reshape(-1, generation.group_size)
            means = np.nanmean(groups[~np.isnan(groups).all(1)], axis=1).tolist()
            self.train.setdefault(name, Shift()).add(means)
            if name == REWARD:
                self.best.add(means)
        return [
            *self._failed(generation),
            *self._flat(generation, scores),
            *self._fallen(scores),
            *self._stalled(),
            *self._gap(scores),
        ]

    def _failed(self, generation: Generation) -> list[Alarm]:
        failed = np.isnan(np.array(list(generation.rewards.values()))).all(0)
        self.failures = [*self.failures, float(failed.mean())][-FAILED_GENERATIONS:]
        if len(self.failures) < FAILED_GENERATIONS or min(self.failures) < FAILED:
            return []
        message = (
            f"{self.failures[-1]:.0%} of the samples have no score, and at least {FAILED:.0%} had none in each of the "
            f"last {FAILED_GENERATIONS} generations. They train nothing: look at the reward's log or server."
        )
        return [Alarm("reward/failures", message, {"share": self.failures[-1]}, _places(failed))]

    def _flat(self, generation: Generation, scores: Mapping[str, FloatArray]) -> list[Alarm]:
        groups = scores[REWARD].reshape(-1, generation.group_size)
        flat = np.array([_spread(group) <= 1e-6 * np.nanmax(np.abs(group), initial=0.0) for group in groups])
        self.flat = [*self.flat, [int(flat.sum()), len(flat)]][-FLAT_GENERATIONS:]
        without, whole = np.sum(self.flat, axis=0)
        if len(self.flat) < FLAT_GENERATIONS or without < FLAT * whole:
            return []
        message = (
            f"in {without} of the last {whole} groups all samples got the same reward, which trains nothing. Use "
            "prompts that are neither too easy nor too hard, a reward with more steps, or a larger num_generations."
        )
        share = float(without) / float(whole)
        return [Alarm("reward/zero_variance", message, {"share": share}, _places(flat.repeat(generation.group_size)))]

    def _fallen(self, scores: Mapping[str, FloatArray]) -> list[Alarm]:
        change = self.best.change()
        if change is None or change.errors > -BEYOND_CHANCE:
            if change is not None and change.errors > BEYOND_CHANCE:
                self.best = Shift(first=self.best.recent)
            return []
        message = (
            f"the reward has fallen to {change.now:.3g} from {change.before:.3g}. Look at the images: if they are "
            "broken, go on from an earlier checkpoint with lower learning rates, one SDE window per generation and "
            "groups of 16 or more."
        )
        worst = np.argsort(np.nan_to_num(scores[REWARD], nan=np.inf), kind="stable")[:MOST_INDICES]
        values = {"before": change.before, "now": change.now}
        return [Alarm("reward/fallen", message, values, tuple(sorted(int(i) for i in worst)))]

    def _stalled(self) -> list[Alarm]:
        change = self.train[REWARD].change()
        if self.generations < STALLED or change is None or change.errors > RISEN:
            return []
        message = (
            f"after {self.generations} generations the reward is {change.now:.3g}, at the start {change.before:.3g}. "
            "It may be too noisy, or groups too small (the paper's have 24), or learning rates too low: see "
            "flow/clip_frac."
        )
        return [Alarm("reward/stalled", message, {"before": change.before, "now": change.now})]

    def evaluate(self, generation: Generation) -> None:
        """Take in a batch of an evaluation."""
        self.evaluations.add(generation.prompts, _scores(generation))

    def evaluation_ends(self) -> list[Alarm]:
        """Look at an evaluation whose batches have all been taken in."""
        scores, self.evaluated = self.evaluations.end()
        return self._gap({name: np.array(values, dtype=float) for name, values in scores.items()})

    def _gap(self, scores: Mapping[str, FloatArray]) -> list[Alarm]:
        """Find a reward that rises, in training or evaluation, while a score that trains nothing falls in one."""
        changes = {f"{name} in training": shift.change() for name, shift in self.train.items()}
        changes |= {f"{name} in evaluation": change for name, change in self.evaluated.items()}
        rises = {
            name: change
            for name, change in changes.items()
            if change is not None and name.startswith(f"{REWARD} ") and change.errors > ERRORS
        }
        falls = {
            name: change
            for name, change in changes.items()
            if change is not None and name != f"{REWARD} in training" and change.errors < -ERRORS
        }
        if not rises or not falls:
            return []
        said = [
            f"{name} went from {change.before:.3g} to {change.now:.3g}" for name, change in {**rises, **falls}.items()
        ]
        message = (
            f"{'; '.join(said)}. The policy learns what pleases the reward and not what the held-out score measures: "
            "compare the images, stop at the best held-out score, raise flow_regularizer_weight, or train on both."
        )
        values = {
            f"{name}, {when}": number
            for name, change in {**rises, **falls}.items()
            for when, number in (("before", change.before), ("now", change.now))
        }
        return [Alarm("reward/held_out", message, values, _worst(scores))]


REWARD = "the reward"
"""The weighted sum that is trained on, among the scores."""


def _scores(generation: Generation) -> dict[str, FloatArray]:
    """Return the reward, and each function of weight 0 under its own name: N numbers, NaN where there is none."""
    held_out = [name for name, weight in generation.weights.items() if not weight]
    return {REWARD: generation.reward, **{name: np.array(generation.rewards[name], dtype=float) for name in held_out}}


def _spread(values: FloatArray) -> float:
    known = values[~np.isnan(values)]
    return float(np.ptp(known)) if len(known) else 0.0


def _places(chosen: FloatArray) -> tuple[int, ...]:
    return tuple(int(i) for i in np.flatnonzero(chosen)[:MOST_INDICES])


def _worst(scores: Mapping[str, FloatArray]) -> tuple[int, ...]:
    """Find samples of high reward and low held-out scores, by rank; none without a held-out score."""
    known = np.flatnonzero(~np.isnan([*scores.values()]).any(0))
    if len(scores) < 2:
        return ()
    ranks = {name: values[known].argsort().argsort() for name, values in scores.items()}
    gap = ranks[REWARD] * len(ranks) - np.sum(list(ranks.values()), axis=0)
    return tuple(sorted(known[np.argsort(-gap, kind="stable")[:MOST_INDICES]].tolist()))
