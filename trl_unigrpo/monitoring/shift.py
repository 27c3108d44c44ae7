"""Numbers held against those at the start of the run: have they changed beyond what prompts differ by?"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np


SPAN = 8
"""Groups at the start and now, at least: all of the first and of the last generation, if these have more."""
BEYOND_CHANCE = 5.0
"""Standard errors. By Student's t with 14 degrees of freedom, chance goes beyond in 2 of 10,000 comparisons."""


@dataclass(frozen=True)
class Change:
    """
    A number at the start of a run and now.

    Attributes:
        before, now: means at the start and now.
        errors: now - before, in standard errors.
    """

    before: float
    now: float
    errors: float


@dataclass
class Shift:
    """
    Means of groups, one per prompt, since prompts differ more than the samples of one do: a run with one prompt per
    generation needs eight generations to know its start, one with eight prompts a single one.
    """

    first: list[float] = field(default_factory=list)
    recent: list[float] = field(default_factory=list)

    def add(self, means: Sequence[float]) -> None:
        """Take in the means of a generation's groups."""
        if len(self.first) < SPAN:
            self.first += means
        else:
            self.recent = [*self.recent, *means][-max(SPAN, len(means)) :]

    def change(self) -> Change | None:
        """Compare now with the start; None until there are as many groups as a comparison takes."""
        if len(self.recent) < SPAN:
            return None
        samples = np.array(self.first), np.array(self.recent)
        before, now = (float(sample.mean()) for sample in samples)
        error = math.sqrt(sum(float(sample.var(ddof=1)) / len(sample) for sample in samples))
        return Change(before, now, (now - before) / max(error, 1e-9))
