"""Scores of an evaluation against those of the first one, prompt by prompt."""

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .image_statistics import FloatArray
from .shift import Change


LEAST = 8
"""Prompts with a score, below which nothing is compared."""
MOST_DATASETS = 4
"""Evaluation datasets that are told apart."""

ScoresByName = dict[str, list[float | None]]
"""Score -> one value per sample, None where there is none."""


@dataclass
class Evaluations:
    """
    The memory between two evaluations; all of it can be written as JSON. Evaluations repeat prompts and noise:
    differences are compared, whose spread is far below that of the prompts.

    Attributes:
        first: checksum of the prompts -> scores of the first evaluation of them.
        scores: of the evaluation in progress.
        checksum: of its prompts so far.
    """

    first: dict[str, ScoresByName] = field(default_factory=dict)
    scores: ScoresByName = field(default_factory=dict)
    checksum: int = 0

    def add(self, prompts: Sequence[Any], scores: Mapping[str, FloatArray]) -> None:
        """Take in a batch of an evaluation."""
        self.checksum = zlib.crc32(repr(list(prompts)).encode(), self.checksum)
        for name, values in scores.items():
            known = [None if math.isnan(value) else value for value in values.tolist()]
            self.scores.setdefault(name, []).extend(known)

    def end(self) -> tuple[ScoresByName, dict[str, Change]]:
        """
        Return the scores of the evaluation that ends here, and how they differ from the first of the same prompts.
        """
        scores, key = self.scores, str(self.checksum)
        self.scores, self.checksum = {}, 0
        if key not in self.first:
            if len(self.first) < MOST_DATASETS:
                self.first[key] = scores
            return scores, {}
        changes = {name: paired_change(self.first[key].get(name, []), values) for name, values in scores.items()}
        return scores, {name: change for name, change in changes.items() if change is not None}


def paired_change(before: Sequence[float | None], now: Sequence[float | None]) -> Change | None:
    """Compare means over samples that have a score in both; None for fewer than eight of them."""
    if len(before) != len(now):
        return None
    pairs = np.array([before, now], dtype=float)
    pairs = pairs[:, ~np.isnan(pairs).any(0)]
    difference = pairs[1] - pairs[0]
    if len(difference) < LEAST:
        return None
    error = float(difference.std(ddof=1)) / math.sqrt(len(difference))
    before_mean, now_mean = pairs.mean(1).tolist()
    return Change(before_mean, now_mean, float(difference.mean()) / max(error, 1e-9))
