"""The runs' scores: means and paired differences with their intervals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...statistics import CrossedInterval, FloatArray, crossed_interval
from .loading import FinishedRun, Prompts
from .order import position


class GridScores:
    """The runs by system, and the means and differences over them."""

    def __init__(self, runs: Sequence[FinishedRun], prompts: Prompts):
        self.prompts = prompts
        self.by_system: dict[str, list[FinishedRun]] = {}
        for run in sorted(runs, key=lambda run: (position(run.system), run.seed)):
            self.by_system.setdefault(run.system, []).append(run)
        self.systems = list(self.by_system)

    def runs(self, system: str, mode: str | None = None) -> list[FinishedRun]:
        """List a system's runs by seed; those that were evaluated in `mode`."""
        return [run for run in self.by_system.get(system, []) if mode is None or mode in run.record["evaluations"]]

    def starts(self, system: str) -> list[FinishedRun]:
        """List the runs of the system from whose model this one starts; none for the shipped base."""
        start = self.by_system[system][0].record["start"]
        return self.by_system.get(start, []) if start not in (None, "base", system) else []

    def trained(self, system: str) -> bool:
        return any(run.record["rollouts"] for run in self.by_system.get(system, []))

    def mean(self, system: str, mode: str, category: str | None = None, score: str = "rule") -> CrossedInterval | None:
        """Average a score; None where it is not defined: a category with one prompt has no interval."""
        rows = {run.seed: run.scores(mode, score) for run in self.runs(system, mode)}
        if not self.trained(system):  # its runs are all the same one
            rows = dict(list(rows.items())[:1])
        return self._interval(list(rows.values()), category)

    def difference(self, left: tuple[str, str], right: tuple[str, str], score: str = "rule") -> CrossedInterval | None:
        """
        Average left - right, both (system, mode), over the seeds that both have and the same prompts; None if none.

        A system that was not trained has one row of scores, which stands beside each seed of the other.
        """
        rows = [{run.seed: run.scores(side[1], score) for run in self.runs(*side)} for side in (left, right)]
        if not all(rows):
            return None
        for mine, side, other in ((0, left, 1), (1, right, 0)):
            if not self.trained(side[0]):
                first = next(iter(rows[mine].values()))
                rows[mine] = dict.fromkeys(rows[other], first)
        common = [seed for seed in rows[0] if seed in rows[1]]
        return self._interval([rows[0][seed] - rows[1][seed] for seed in common])

    def _interval(self, rows: Sequence[FloatArray], category: str | None = None) -> CrossedInterval | None:
        chosen = np.array([category in (None, of) for of in self.prompts.categories])
        texts = np.array(self.prompts.texts)[chosen]
        if not rows or len(set(texts)) < 2:
            return None
        return crossed_interval(np.stack(rows)[:, chosen], texts.tolist())
