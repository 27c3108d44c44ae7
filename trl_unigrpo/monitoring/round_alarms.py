"""Rounds that keep every image, that copy the image before, or that make it worse."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .alarm import MOST_INDICES, Alarm
from .events import Generation, RoundNote
from .image_statistics import TWIN_DISTANCE, BoolArray
from .memory import revive


WINDOW = 5
"""Shares are those of the last five generations together."""
KEPT, NEARLY_PERFECT = 0.9, 0.9
"""Nine in ten looks keep the image, whose mean reward is below nine tenths of a perfect one's."""
UNCHANGED = 0.5
"""Half of the images that were painted look like the ones before."""
LONG_WINDOW, ERRORS = 10, 4.0
"""Generations in which more images got worse than better, by so many standard errors of groups."""


Places = NDArray[np.int64]


@dataclass
class Ratio:
    """A ratio of sums over the last generations."""

    recent: list[list[float]] = field(default_factory=list)

    def add(self, part: float, whole: float) -> float:
        """Take in a generation, and return the ratio; NaN until there are as many as it takes."""
        self.recent = [*self.recent, [float(part), float(whole)]][-WINDOW:]
        parts, wholes = np.sum(self.recent, axis=0).tolist()
        return parts / wholes if wholes and len(self.recent) == WINDOW else math.nan


@dataclass
class RoundWatch:
    """
    The memory between two generations, by the number of a round, from "1"; all of it can be written as JSON.

    Attributes:
        kept: looks that kept the image, among all.
        reward: of the images that were kept, by their number.
        unchanged: images that look like the ones before, among those that were painted.
        gains: of the last generations, means of each group of 1 for an image that got better and -1 for one that got
            worse.
        best, lowest: the highest and the lowest reward of an image so far; 0 where none was lower.
    """

    kept: dict[str, Ratio] = field(default_factory=dict)
    reward: dict[str, Ratio] = field(default_factory=dict)
    unchanged: dict[str, Ratio] = field(default_factory=dict)
    gains: dict[str, list[list[float]]] = field(default_factory=dict)
    best: float | None = None
    lowest: float = 0.0

    def __post_init__(self) -> None:
        for ratios in (self.kept, self.reward, self.unchanged):
            ratios.update({number: revive(Ratio, ratio) for number, ratio in ratios.items()})

    def look(self, generation: Generation) -> list[Alarm]:
        """Look at a training generation. Of each kind of alarm the first round speaks for all."""
        known = [note.reward for notes in generation.rounds for note in notes if note.reward is not None]
        self.best = max([*known, *([] if self.best is None else [self.best])], default=None)
        self.lowest = min([*known, self.lowest])
        perfect = sum(generation.weights.values()) if self.best is None else self.best
        if perfect >= 0:  # log-probs and the like are below 0: of these nothing but the best is known
            perfect = max(perfect, sum(generation.weights.values()))
        alarms: dict[str, Alarm] = {}
        for number, places, notes in by_round(generation):
            for alarm in (
                *self._kept(number, places, notes, perfect),
                *self._unchanged(number, places, notes),
                *self._worse(number, places, notes, generation.group_size),
            ):
                alarms.setdefault(alarm.name, alarm)
        return list(alarms.values())

    def _kept(self, number: str, places: Places, notes: Sequence[RoundNote], perfect: float) -> Iterator[Alarm]:
        kept = np.array([note.kept for note in notes])
        rewards = [note.reward for note in notes if note.kept and note.reward is not None]
        share = self.kept.setdefault(number, Ratio()).add(kept.sum(), len(notes))
        reward = self.reward.setdefault(number, Ratio()).add(sum(rewards), len(rewards))
        if share > KEPT and reward < perfect - (1 - NEARLY_PERFECT) * (perfect - self.lowest):
            message = (
                f"{share:.0%} of the looks in round {number} keep the image, whose mean reward is {reward:.3g}, a "
                f"perfect one's {perfect:.3g}. Keeping has been learnt in place of mending: go on from an earlier "
                "checkpoint with round_cost=0 and no_improve='none', or with allow_stop=False for a while."
            )
            yield Alarm("rounds/kept", message, {"share": share, "reward": reward}, _first(places, kept))

    def _unchanged(self, number: str, places: Places, notes: Sequence[RoundNote]) -> Iterator[Alarm]:
        changes = np.array([math.nan if note.change is None else note.change for note in notes])
        same = changes < TWIN_DISTANCE
        share = self.unchanged.setdefault(number, Ratio()).add(same.sum(), np.isfinite(changes).sum())
        if share > UNCHANGED:
            message = (
                f"{share:.0%} of the images of round {number} look like the one before. The policy copies what it is "
                "shown: see whether the reward pays for that, weigh less what should stay, ask for a change in "
                "reflection_template, or raise image_learning_rate."
            )
            yield Alarm("rounds/unchanged", message, {"share": share}, _first(places, same))

    def _worse(self, number: str, places: Places, notes: Sequence[RoundNote], group_size: int) -> Iterator[Alarm]:
        gains = np.array([_gain(note) for note in notes])
        groups = [gains[places // group_size == group] for group in np.unique(places // group_size)]
        means = [float(np.nanmean(group)) for group in groups if np.isfinite(group).any()]
        self.gains[number] = [*self.gains.get(number, []), means][-LONG_WINDOW:]
        recent = np.array([mean for means in self.gains[number] for mean in means])
        if len(self.gains[number]) < LONG_WINDOW or len(recent) < LONG_WINDOW:
            return
        mean, error = float(recent.mean()), float(recent.std(ddof=1)) / math.sqrt(len(recent))
        if mean < -ERRORS * error:
            message = (
                f"round {number} makes more images worse than better, by {-mean:.0%} of them. One round less would do "
                "better: look at what its texts ask for, lower image_learning_rate, or train this round alone "
                f"(train_rounds=[{number}])."
            )
            yield Alarm("rounds/worse", message, {"gain": mean}, _first(places, gains < 0))


def round_metrics(generation: Generation) -> dict[str, float]:
    """Measure how far images are from those that their rounds began with, and how many look alike."""
    found = {}
    for number, _, notes in by_round(generation):
        changes = np.array([note.change for note in notes if note.change is not None])
        if len(changes):
            found[f"rounds/change_{number}"] = float(changes.mean())
            found[f"rounds/unchanged_{number}"] = float((changes < TWIN_DISTANCE).mean())
    return found


def by_round(generation: Generation) -> Iterator[tuple[str, Places, list[RoundNote]]]:
    """Walk through the rounds of a generation: number, from "1", places of the samples that have it, their notes."""
    for m in range(max(map(len, generation.rounds), default=0)):
        places = [place for place, notes in enumerate(generation.rounds) if len(notes) > m]
        yield str(m + 1), np.array(places), [generation.rounds[place][m] for place in places]


def _gain(note: RoundNote) -> float:
    """Return 1 for an image that is better than the one before, -1 for a worse one; NaN where that is not known."""
    if note.kept or note.reward is None or note.before is None:
        return math.nan
    return float(np.sign(note.reward - note.before))


def _first(places: Places, meant: BoolArray) -> tuple[int, ...]:
    return tuple(places[meant].tolist()[:MOST_INDICES])
