"""Curves of training, thinned to what a figure shows, and of validation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ...statistics import FloatArray
from .loading import FinishedRun


POINTS = 48


def curve(runs: Sequence[FinishedRun], starts: Sequence[FinishedRun] = ()) -> dict[str, Any] | None:
    """
    Average the curve of one system; None where no run logged a reward.

    Args:
        runs: of the system, one per seed.
        starts: of the system from whose model it starts: its rollouts and seconds come before.

    Returns:
        Lists of at most `POINTS` numbers, each over a block of rollout batches: `rollouts` and `cpu_seconds` at its
        end, `reward` with the `low` and `high`est seed; and `seeds`.
    """
    logged = [run for run in runs if any("reward" in row for row in run.history)]
    if not logged:
        return None
    before = {run.seed: run.record for run in starts}
    tables = []
    for run in logged:
        rows = [row for row in run.history if "reward" in row]
        start = before.get(run.seed, {"rollouts": 0, "train_cpu_seconds": 0.0})
        tables.append(
            {
                "rollouts": np.array([row["rollouts"] for row in rows]) + start["rollouts"],
                "cpu_seconds": np.array([row["cpu_seconds"] for row in rows]) + start["train_cpu_seconds"],
                "reward": np.array([row["reward"] for row in rows]),
            }
        )
    length = min(len(table["reward"]) for table in tables)
    blocks = np.array_split(np.arange(length), min(length, POINTS))

    def by_seed(key: str, last: bool = False) -> FloatArray:
        """Average each block: (seeds, blocks)."""
        return np.array([[table[key][block[-1:] if last else block].mean() for block in blocks] for table in tables])

    reward = by_seed("reward")
    return {
        "seeds": len(tables),
        "rollouts": [round(value) for value in by_seed("rollouts", last=True).mean(0)],
        "cpu_seconds": [round(value, 1) for value in by_seed("cpu_seconds", last=True).mean(0).tolist()],
        "reward": _listed(reward.mean(0)),
        "low": _listed(reward.min(0)),
        "high": _listed(reward.max(0)),
    }


def validation_curve(runs: Sequence[FinishedRun]) -> dict[str, Any] | None:
    """
    List the points of a system's validations, None without any: `rollouts`, and of each seed `learned`, `rule` and
    `image_error`, as far as the shortest goes.
    """
    logged = [run for run in runs if run.validation]
    if not logged:
        return None
    length = min(len(run.validation) for run in logged)
    return {
        "seeds": [run.seed for run in logged],
        "rollouts": [round(row["rollouts"]) for row in logged[0].validation[:length]],
        **{
            name: [[row[name] for row in run.validation[:length]] for run in logged]
            for name in ("learned", "rule", "image_error")
        },
    }


def _listed(values: FloatArray) -> list[float]:
    return [float(f"{value:.4g}") for value in values]
